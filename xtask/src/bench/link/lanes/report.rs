//! Results of lanes as tables for people, and as JSON for programs.

use std::path::Path as FilePath;

use anyhow::Result;

use super::{
    chart,
    finding::{Comparison, Found, Summary},
    goal,
};
use crate::{
    bench::{
        goal::Goal,
        link::{observation::LATE_MS, report::Run},
        study::{Report, Study},
    },
    table::{
        self,
        Align::{self, Left, Right},
    },
};

const HEADINGS: [&str; 12] = [
    "what",
    "with",
    "of the link",
    "probe p50",
    "probe p95",
    "probe lost",
    "queue p95",
    "dropped",
    "stream lost",
    "other",
    "seconds",
    "n",
];
const ALIGNMENT: [Align; 12] = [
    Left, Left, Right, Right, Right, Right, Right, Right, Right, Right, Right, Right,
];

impl Study for Found {
    type Run = Run;
    type Summary = Summary;
    type Comparison = Comparison;

    const NOTES: &str = "\
Medians of n rounds. Payload of the flows as a part of what the link carries in that time, of which headers take 0.035; delays \
of a UDP probe beyond the link's own, and its losses; what packets waited for the transmitter, and the part of them that the \
queue dropped. `other` is a CUBIC flow that bypasses pepsal, as a part of the link, or the bytes of a subscriber with one leg \
over those of one with 50. `seconds` is a transfer's time from connect to the last byte's receipt, or the time from the end of \
an outage until the last flow resumed. `>` is a time limit.";

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
        chart::draw(&self.timelines, folder)
    }

    fn heading(run: &Run) -> String {
        run.heading()
    }

    fn cells(report: &Report<'_, Self>) -> String {
        let mut rows = vec![HEADINGS.map(str::to_owned)];
        rows.extend(report.summaries.iter().map(row));
        table::markdown(&rows, ALIGNMENT)
    }

    fn round_by_round(report: &Report<'_, Self>) -> String {
        let headings = ["what", "with", "median (least–most)", "rounds"];
        let mut rows = vec![headings.map(str::to_owned)];
        rows.extend(
            report
                .comparisons
                .iter()
                .map(|Comparison { what, place, ratios }| {
                    [
                        (*what).to_owned(),
                        place.to_string(),
                        ratios.spread(),
                        ratios.listed(),
                    ]
                }),
        );
        table::markdown(&rows, [Left, Left, Right, Left]) + "\n"
    }

    fn remarks(report: &Report<'_, Self>) -> String {
        let late = report.found.rows.iter().map(|row| row.emulator_late_ms);
        let worst = late.fold(0.0, f64::max);
        if worst > LATE_MS {
            format!(
                "THE EMULATOR WAS OVERLOADED: more than 1 % of packets were over {LATE_MS} ms late (up to {worst:.1} ms at p99) \
                 in the rows marked with *; use fewer at once (--parallel).\n"
            )
        } else {
            format!("The emulator kept up: 99 % of packets were at most {worst:.1} ms late at any time.\n")
        }
    }
}

fn row(summary: &Summary) -> [String; 12] {
    let figures = &summary.figures;
    let shown = |figure: Option<f64>, show: fn(f64) -> String| figure.map(show).unwrap_or_default();
    let part = |part| format!("{part:.3}");
    let delay = |ms| format!("+{ms:.0} ms");
    let percent = |part: f64| format!("{:.2} %", part * 100.0);
    let limit = if summary.is_limited { "> " } else { "" };
    let late = if summary.overloaded { " *" } else { "" };
    [
        summary.what.to_owned() + late,
        summary.place.to_string(),
        shown(figures.used, part),
        shown(figures.probe_p50_ms, delay),
        shown(figures.probe_p95_ms, delay),
        shown(figures.probe_lost, percent),
        shown(figures.queue_p95_ms, delay),
        shown(figures.dropped, percent),
        shown(figures.stream_lost, percent),
        shown(figures.other, part),
        figures
            .seconds
            .map(|seconds| format!("{limit}{seconds:.2}"))
            .unwrap_or_default(),
        summary.rounds.to_string(),
    ]
}
