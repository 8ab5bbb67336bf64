//! Formats results as tables, and as JSON.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{
    chart,
    contender::Contender,
    goal,
    observation::{Comparison, Metric, Observations, Summary},
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

#[derive(Clone, Debug, Serialize)]
pub struct Run {
    #[serde(flatten)]
    pub machine: Machine,
    /// Versions of daemon and HAProxy.
    pub versions: Vec<String>,
    /// Reason for missing results of HAProxy.
    pub absent: Option<String>,
    /// Whether every gateway had a stateful firewall.
    pub firewall: bool,
    /// Further arguments of the daemon.
    pub daemon_arguments: Vec<String>,
    /// Congestion control of ends and gateway, unless a proxy sets its own.
    pub congestion: String,
    pub rounds: u32,
    /// Payload of each bulk transfer.
    pub bulk_bytes: u64,
    pub minutes: f64,
}

const HEADINGS: [&str; 9] = [
    "what",
    "",
    "forwarding",
    "old build",
    "pepsal",
    "HAProxy",
    "/ forwarding",
    "/ old build",
    "/ HAProxy",
];
const ALIGNMENT: [Align; 9] = [Left, Left, Right, Right, Right, Right, Right, Right, Right];
/// The columns without an old build, without HAProxy, and without both.
const WITHOUT_OLD_BUILD: [usize; 7] = [0, 1, 2, 4, 5, 6, 8];
const WITHOUT_HAPROXY: [usize; 7] = [0, 1, 2, 3, 4, 6, 7];
const WITHOUT_BOTH: [usize; 5] = [0, 1, 2, 4, 6];

impl Study for Observations {
    type Run = Run;
    type Summary = Summary;
    type Comparison = Comparison;

    const NOTES: &str = "\
Medians, with the least and the most in parentheses; the last columns are pepsal's median over the others', and over the \
old build's the median of the ratios of each round. Processor time and memory are the whole machine's, ends included, while nothing else of the benchmark runs.";

    fn summaries(&self) -> Vec<Summary> {
        self.summaries()
    }

    fn comparisons(&self) -> Vec<Comparison> {
        self.comparisons()
    }

    fn goals(&self) -> Vec<Goal> {
        goal::judge(self)
    }

    fn draw(&self, folder: &Path) -> Result<usize> {
        chart::draw(self, folder)
    }

    fn heading(run: &Run) -> String {
        let Run {
            machine: Machine { kernel, cpus },
            versions,
            firewall,
            congestion,
            rounds,
            minutes,
            ..
        } = run;
        let firewall = if *firewall { "with" } else { "without" };
        format!(
            "{}, Linux {kernel}, {cpus} processors; ends use {congestion}; {firewall} firewall; rounds: {rounds}; \
             {minutes:.1} minutes.",
            versions.join(", ")
        )
    }

    fn cells(report: &Report<'_, Self>) -> String {
        let metrics = report.found.metrics().into_iter();
        let rows: Vec<_> = [HEADINGS.map(str::to_owned)]
            .into_iter()
            .chain(metrics.flat_map(|metric| report.found.rows(metric)))
            .collect();
        match (report.comparisons.is_empty(), report.run.absent.is_some()) {
            (false, false) => table::markdown(&rows, ALIGNMENT),
            (true, false) => selected(&rows, WITHOUT_OLD_BUILD),
            (false, true) => selected(&rows, WITHOUT_HAPROXY),
            (true, true) => selected(&rows, WITHOUT_BOTH),
        }
    }

    fn round_by_round(report: &Report<'_, Self>) -> String {
        let mut rows = vec![["what", "median (least–most)", "rounds"].map(str::to_owned)];
        let comparisons = report.comparisons.iter();
        rows.extend(
            comparisons
                .map(|Comparison { metric, ratios }| [metric.to_string(), ratios.spread(), ratios.listed()]),
        );
        table::markdown(&rows, [Left, Right, Left])
    }

    fn remarks(report: &Report<'_, Self>) -> String {
        let absent = report.run.absent.iter().map(|absent| format!("{absent}.\n"));
        let syscalls = report.found.syscalls.iter().map(|(contender, calls)| {
            let calls: Vec<_> = calls
                .iter()
                .map(|(name, count)| format!("{name} {count:.2}"))
                .collect();
            format!(
                "\nSystem calls of {contender} for each connection: {}.\n",
                calls.join(", ")
            )
        });
        absent.chain(syscalls).collect()
    }
}

impl Observations {
    /// Returns the row of a metric, and a second one for the excess over forwarding of metrics that are
    /// compared by it.
    fn rows(&self, metric: Metric) -> Vec<[String; 9]> {
        let cell = |contender| self.summary(metric, contender).map(spread).unwrap_or_default();
        let ratio = |to| {
            self.ratio(metric, to)
                .map(|ratio| format!("{ratio:.2}"))
                .unwrap_or_default()
        };
        let [forwarding, old_build, pepsal, haproxy] = Contender::ALL.map(cell);
        let mut rows = vec![[
            metric.to_string(),
            metric.unit().to_owned(),
            forwarding,
            old_build,
            pepsal,
            haproxy,
            ratio(Contender::Forwarding),
            self.round_ratios(metric)
                .map(|ratios| ratios.spread())
                .unwrap_or_default(),
            ratio(Contender::Haproxy),
        ]];
        if matches!(
            metric,
            Metric::Memory(..) | Metric::Exchange(_) | Metric::Passing(_)
        ) {
            let above = |contender| self.above_forwarding(metric, contender);
            let shown = |value: Option<f64>| value.map(|value| number(metric, value)).unwrap_or_default();
            let (old_build, pepsal) = (above(Contender::OldBuild), above(Contender::Pepsal));
            let haproxy = above(Contender::Haproxy);
            let ratio = pepsal.zip(haproxy).filter(|(_, haproxy)| *haproxy > 0.0);
            rows.push([
                format!("{metric}: beyond forwarding"),
                metric.unit().to_owned(),
                String::new(),
                shown(old_build),
                shown(pepsal),
                shown(haproxy),
                String::new(),
                String::new(),
                ratio
                    .map(|(pepsal, haproxy)| format!("{:.2}", pepsal / haproxy))
                    .unwrap_or_default(),
            ]);
        }
        rows
    }
}

/// Some of the columns.
fn selected<const N: usize>(rows: &[[String; 9]], columns: [usize; N]) -> String {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| columns.map(|column| row[column].clone()))
        .collect();
    table::markdown(&rows, columns.map(|column| ALIGNMENT[column]))
}

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
        Metric::Connections(_) | Metric::Steering(..) | Metric::Passing(_) => format!("{value:.0}"),
        Metric::ConnectionProcessor(_) | Metric::Memory(..) | Metric::Exchange(_) | Metric::Syscalls => {
            format!("{value:.1}")
        }
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
            firewall: false,
            daemon_arguments: Vec::new(),
            congestion: "cubic".to_owned(),
            rounds: 1,
            bulk_bytes: 1,
            minutes: 1.0,
        };
        Report::new(run, found).markdown()
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

    #[test]
    fn an_old_build_has_columns_and_a_table_of_rounds() {
        let mut found = Observations::default();
        let metric = Metric::Connections(pepsal_tests::Family::V4);
        for (round, old, new) in [(1, 1000.0, 1500.0), (2, 2000.0, 1000.0)] {
            found.add(round, Contender::OldBuild, metric, old);
            found.add(round, Contender::Pepsal, metric, new);
        }
        let text = report(&found, None);
        assert!(
            text.contains("| 1500 (1000–2000) | 1250 (1000–1500) |  |  | 1.00 (0.50–1.50) |  |\n"),
            "{text}"
        );
        assert!(
            text.contains("| new connections, IPv4 | 1.00 (0.50–1.50) | 1.50, 0.50 |\n"),
            "{text}"
        );
    }
}
