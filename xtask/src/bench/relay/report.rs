//! Results as tables for people, and as JSON for programs.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    contender::Contender,
    goals::{self, Goal},
    machine::Machine,
    observation::{Metric, Observation, Observations, Summary},
    save,
};
use crate::table::{
    self,
    Align::{self, Left, Right},
};

/// What a run was.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    #[serde(flatten)]
    pub machine: Machine,
    /// What daemon and HAProxy say of themselves.
    pub versions: Vec<String>,
    /// Why HAProxy is left out, if it is.
    pub absent: Option<String>,
    /// Further arguments of the daemon.
    pub daemon_arguments: Vec<String>,
    /// Congestion control of ends and gateway, but where a proxy chooses its own.
    pub congestion: String,
    pub rounds: u32,
    /// Payload of each bulk transfer.
    pub bulk_bytes: u64,
    /// What it took.
    pub minutes: f64,
}

/// Everything that is written.
pub struct Report<'a> {
    pub run: Run,
    pub found: &'a Observations,
    pub summaries: Vec<Summary>,
    pub goals: Vec<Goal>,
}

const HEADINGS: [&str; 7] = [
    "what",
    "",
    "forwarding",
    "pepsal",
    "HAProxy",
    "/ forwarding",
    "/ HAProxy",
];
const ALIGNMENT: [Align; 7] = [Left, Left, Right, Right, Right, Right, Right];
/// Those of the above that need no HAProxy.
const WITHOUT_HAPROXY: [usize; 5] = [0, 1, 2, 3, 5];

impl Report<'_> {
    /// The whole report.
    pub fn markdown(&self) -> String {
        let Run {
            machine: Machine { kernel, cpus },
            versions,
            absent,
            congestion,
            rounds,
            minutes,
            ..
        } = &self.run;
        let mut text = format!(
            "{}, Linux {kernel}, {cpus} processors; ends use {congestion}; rounds: {rounds}; {minutes:.1} minutes.\n\n",
            versions.join(", ")
        );
        if self.goals.iter().any(|goal| goal.met.is_some()) {
            text += &goals::markdown(&self.goals);
            text += "\n";
        }
        text += &self.cells();
        text += &format!("\n{NOTES}\n");
        if let Some(absent) = absent {
            text += &format!("{absent}.\n");
        }
        for (contender, calls) in &self.found.syscalls {
            let calls: Vec<_> = calls
                .iter()
                .map(|(name, count)| format!("{name} {count:.2}"))
                .collect();
            text += &format!(
                "\nSystem calls of {contender} for each connection: {}.\n",
                calls.join(", ")
            );
        }
        text
    }

    fn cells(&self) -> String {
        let metrics = self.found.metrics();
        let rows: Vec<_> = [HEADINGS.map(str::to_owned)]
            .into_iter()
            .chain(metrics.into_iter().flat_map(|metric| self.rows(metric)))
            .collect();
        if self.run.absent.is_none() {
            return table::markdown(&rows, ALIGNMENT);
        }
        let rows: Vec<_> = rows
            .iter()
            .map(|row| WITHOUT_HAPROXY.map(|column| row[column].clone()))
            .collect();
        table::markdown(&rows, WITHOUT_HAPROXY.map(|column| ALIGNMENT[column]))
    }

    /// A metric's row, and another one for what the proxies add to forwarding where it is that which counts.
    fn rows(&self, metric: Metric) -> Vec<[String; 7]> {
        let cell = |contender| {
            self.found
                .summary(metric, contender)
                .map(spread)
                .unwrap_or_default()
        };
        let ratio = |to| {
            self.found
                .ratio(metric, to)
                .map(|ratio| format!("{ratio:.2}"))
                .unwrap_or_default()
        };
        let [forwarding, pepsal, haproxy] = Contender::ALL.map(cell);
        let mut rows = vec![[
            metric.to_string(),
            metric.unit().to_owned(),
            forwarding,
            pepsal,
            haproxy,
            ratio(Contender::Forwarding),
            ratio(Contender::Haproxy),
        ]];
        if matches!(
            metric,
            Metric::Memory(..) | Metric::Exchange(_) | Metric::Passing(_)
        ) {
            let above = |contender| self.found.above_forwarding(metric, contender);
            let shown = |value: Option<f64>| value.map(|value| number(metric, value)).unwrap_or_default();
            let (pepsal, haproxy) = (above(Contender::Pepsal), above(Contender::Haproxy));
            let ratio = pepsal.zip(haproxy).filter(|(_, haproxy)| *haproxy > 0.0);
            rows.push([
                format!("{metric}: beyond forwarding"),
                metric.unit().to_owned(),
                String::new(),
                shown(pepsal),
                shown(haproxy),
                String::new(),
                ratio
                    .map(|(pepsal, haproxy)| format!("{:.2}", pepsal / haproxy))
                    .unwrap_or_default(),
            ]);
        }
        rows
    }

    /// Writes `results.json` and `results.md`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(&Json {
            run: &self.run,
            goals: &self.goals,
            cells: &self.summaries,
            samples: &self.found.samples,
            syscalls: &self.found.syscalls,
        })?;
        save(folder, "results.json", json + "\n")?;
        save(folder, "results.md", self.markdown())
    }
}

#[derive(Serialize)]
struct Json<'a> {
    run: &'a Run,
    goals: &'a [Goal],
    cells: &'a [Summary],
    samples: &'a [Observation],
    syscalls: &'a [(Contender, Vec<(String, f64)>)],
}

const NOTES: &str = "\
Medians, with the least and the most in parentheses; the last columns are pepsal's median over the others'. Processor \
time and memory are the whole machine's, ends included, while nothing else of the benchmark runs.";

fn spread(summary: Summary) -> String {
    let shown = |value| number(summary.metric, value);
    format!(
        "{} ({}–{})",
        shown(summary.median),
        shown(summary.least),
        shown(summary.most)
    )
}

fn number(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Rate(_) | Metric::Processor(_) | Metric::ConnectionTime(..) | Metric::Descriptors(..) => {
            format!("{value:.2}")
        }
        Metric::Connections(_) | Metric::Steering(_) | Metric::Passing(_) => format!("{value:.0}"),
        Metric::Memory(..) | Metric::Exchange(_) | Metric::Syscalls => format!("{value:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(found: &Observations, absent: Option<&str>) -> String {
        let run = Run {
            machine: Machine {
                kernel: "6.18".into(),
                cpus: 2,
            },
            versions: vec!["pepsal 1".into()],
            absent: absent.map(str::to_owned),
            daemon_arguments: Vec::new(),
            congestion: "cubic".to_owned(),
            rounds: 1,
            bulk_bytes: 1,
            minutes: 1.0,
        };
        let report = Report {
            run,
            found,
            summaries: found.summaries(),
            goals: Vec::new(),
        };
        report.markdown()
    }

    #[test]
    fn haproxys_columns_are_left_out_where_it_is_absent() {
        let mut found = Observations::default();
        found.add(1, Contender::Forwarding, Metric::Exchange(100), 50.0);
        found.add(1, Contender::Pepsal, Metric::Exchange(100), 75.0);
        let text = report(&found, Some("HAProxy is left out: no haproxy here"));
        assert!(
            text.contains(
                "| processor of a request, 100 flows | µs | 50.0 (50.0–50.0) | 75.0 (75.0–75.0) | 1.50 |\n"
            ),
            "{text}"
        );
        assert!(
            text.contains("100 flows: beyond forwarding | µs |  | 25.0 |  |\n"),
            "{text}"
        );
        assert!(
            text.ends_with("HAProxy is left out: no haproxy here.\n"),
            "{text}"
        );
        found.add(1, Contender::Haproxy, Metric::Exchange(100), 100.0);
        let text = report(&found, None);
        assert!(
            text.contains("100 flows: beyond forwarding | µs |  | 25.0 | 50.0 |  | 0.50 |\n"),
            "{text}"
        );
    }
}
