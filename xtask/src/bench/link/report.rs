//! Results as tables for people, and as JSON and CSV for programs.

use std::path::Path as FilePath;

use anyhow::Result;
use serde::Serialize;

use super::{
    chart, goal,
    observation::{Comparison, LATE_MS, Metric, Observation, Observations, State, Summary},
};
use crate::{
    bench::{
        goal::Goal,
        machine::Machine,
        study::{Report, Study},
    },
    table::{
        self,
        Align::{self, Left, Right},
    },
};

/// What a run was.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    #[serde(flatten)]
    pub machine: Machine,
    /// What the daemon says of itself.
    pub daemon: String,
    /// What the old build says of itself, if there was one.
    pub old_build: Option<String>,
    /// Further arguments of the daemon.
    pub daemon_arguments: Vec<String>,
    pub rounds: u32,
    /// Seed of the first round; the next has the next.
    pub seed: u64,
    pub timeout_seconds: f64,
    /// What it took.
    pub minutes: f64,
}

impl Run {
    /// One line about the run.
    pub fn heading(&self) -> String {
        let Run {
            machine: Machine { kernel, cpus },
            daemon,
            old_build,
            rounds,
            seed,
            minutes,
            ..
        } = self;
        let seeds = match rounds {
            1 => format!("seed {seed}"),
            _ => format!("seeds {seed} to {}", seed + u64::from(*rounds) - 1),
        };
        let old_build = old_build
            .as_ref()
            .map(|version| format!("old build {version}, "))
            .unwrap_or_default();
        format!(
            "{daemon}, {old_build}Linux {kernel}, {cpus} processors; rounds: {rounds}, {seeds}; {minutes:.1} minutes."
        )
    }
}

const CELL_HEADINGS: [&str; 9] = [
    "path",
    "loss",
    "what",
    "with",
    "floor",
    "median",
    "min–max",
    "/ floor",
    "n",
];
const CELL_ALIGNMENT: [Align; 9] = [Left, Right, Left, Left, Right, Right, Right, Right, Right];

impl Study for Observations {
    type Run = Run;
    type Summary = Summary;
    type Comparison = Comparison;

    const NOTES: &str = "\
Times in seconds from connect to the last byte's receipt, queueing in milliseconds, medians of n samples with the least \
and the most. `>` is a time limit. The floor is the handshake's and the exchange's round trips (one on a kept connection) \
and the time that the link takes for payload and headers; without a fast open no TCP beats it.";

    fn summaries(&self) -> Vec<Summary> {
        self.summaries()
    }

    fn comparisons(&self) -> Vec<Comparison> {
        self.comparisons()
    }

    fn goals(&self) -> Vec<Goal> {
        goal::judge(self)
    }

    fn draw(&self, folder: &FilePath) -> Result<usize> {
        chart::draw(&self.series, folder)
    }

    fn heading(run: &Run) -> String {
        run.heading()
    }

    fn cells(report: &Report<'_, Self>) -> String {
        let mut rows = vec![CELL_HEADINGS.map(str::to_owned)];
        rows.extend(report.summaries.iter().map(cell_row));
        table::markdown(&rows, CELL_ALIGNMENT)
    }

    fn round_by_round(report: &Report<'_, Self>) -> String {
        let headings = ["path", "loss", "what", "with", "median (least–most)", "rounds"];
        let mut rows = vec![headings.map(str::to_owned)];
        rows.extend(report.comparisons.iter().map(|Comparison { cell, ratios }| {
            [
                cell.path.to_string(),
                cell.loss.to_string(),
                cell.metric.to_string(),
                cell.place.to_string(),
                ratios.spread(),
                ratios.listed(),
            ]
        }));
        table::markdown(&rows, [Left, Right, Left, Left, Right, Left]) + "\n"
    }

    /// Whether the machine kept up.
    fn remarks(report: &Report<'_, Self>) -> String {
        let late = report.found.samples.iter().map(|sample| sample.emulator_late_ms);
        let worst = late.fold(0.0, f64::max);
        match report
            .summaries
            .iter()
            .filter(|summary| summary.overloaded)
            .count()
        {
            0 => format!(
                "The emulator kept up: 99 % of packets were at most {worst:.1} ms late at any time.\n"
            ),
            marked => format!(
                "THE EMULATOR WAS OVERLOADED: more than 1 % of packets were over {LATE_MS} ms late (up to {worst:.1} ms \
                 at p99) in the {marked} rows marked with *; use fewer at once (--parallel).\n"
            ),
        }
    }

    fn files(&self) -> Vec<(&'static str, String)> {
        vec![("results.csv", csv(&self.samples))]
    }
}

fn csv(samples: &[Observation]) -> String {
    let mut text =
        "path,loss_percent,with,what,unit,round,seed,value,floor,state,emulator_late_ms\n".to_owned();
    for sample in samples {
        let cell = &sample.cell;
        let number = |value: Option<f64>| value.map(|value| format!("{value:.6}")).unwrap_or_default();
        let state = match &sample.state {
            State::Done => "done",
            State::TimedOut => "timed out",
            State::Damaged => "damaged",
            State::Failed(_) => "failed",
        };
        let fields = [
            cell.path.to_string(),
            cell.loss.percent().to_string(),
            cell.place.to_string(),
            cell.metric.to_string(),
            cell.metric.unit().to_owned(),
            sample.round.to_string(),
            sample.seed.to_string(),
            number(sample.value),
            number(cell.floor()),
            state.to_owned(),
            format!("{:.3}", sample.emulator_late_ms),
        ];
        text += &fields.map(|field| quoted(&field)).join(",");
        text += "\n";
    }
    text
}

/// A field of a CSV file (RFC 4180).
fn quoted(field: &str) -> String {
    if field.contains([',', '"', '\n']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

fn cell_row(summary: &Summary) -> [String; 9] {
    let value = |value: f64| match summary.cell.metric {
        Metric::Queue(_) => format!("{value:.1}"),
        Metric::Jain | Metric::LinkUse => format!("{value:.3}"),
        Metric::Transfer(..) | Metric::Request(_) | Metric::LoadedRequest(_) => format!("{value:.3}"),
    };
    let limit = |count| if count > 0 { "> " } else { "" };
    let is_mostly_timed_out = summary.timed_out * 2 > summary.samples;
    let ratio = summary
        .floor
        .filter(|floor| *floor > 0.0)
        .map(|floor| format!("{:.2}", summary.median / floor));
    [
        summary.cell.path.to_string(),
        summary.cell.loss.to_string(),
        summary.cell.metric.to_string(),
        summary.cell.place.to_string(),
        summary.floor.map(value).unwrap_or_default(),
        format!(
            "{}{}{}",
            limit(usize::from(is_mostly_timed_out)),
            value(summary.median),
            if summary.overloaded { " *" } else { "" }
        ),
        format!(
            "{}–{}{}",
            value(summary.least),
            limit(summary.timed_out),
            value(summary.most)
        ),
        ratio.unwrap_or_default(),
        summary.samples.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(quoted("10 MiB up"), "10 MiB up");
        assert_eq!(quoted("no proxy, \"BBR\""), "\"no proxy, \"\"BBR\"\"\"");
    }
}
