//! What has been seen on lanes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Lane, estimate::Estimate};
use crate::bench::{
    link::{
        observation::{LATE_MS, State},
        place::{Place, Proxy},
        schedule::Findings,
    },
    statistic,
    study::RoundRatios,
};

/// What was seen in one window, or of one transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub lane: Lane,
    /// The window's name, or the transfer's.
    pub what: &'static str,
    pub place: Place,
    pub round: u32,
    pub seed: u64,
    pub state: State,
    #[serde(flatten)]
    pub figures: Figures,
    /// How late the emulator itself has delivered, in milliseconds, 99th percentile of all packets.
    pub emulator_late_ms: f64,
}

/// Figures of a row, or medians of several.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Figures {
    /// Payload of the flows over what the link carries, of which the stream's part is left out. Headers take 0.035.
    pub used: Option<f64>,
    /// Delay of the probe beyond the link's own, in milliseconds.
    pub probe_p50_ms: Option<f64>,
    pub probe_p95_ms: Option<f64>,
    /// Part of the probe's packets that was lost.
    pub probe_lost: Option<f64>,
    /// What packets have waited for the transmitter by the emulator's account, in milliseconds.
    pub queue_p95_ms: Option<f64>,
    /// Part of what came to the link that its queue dropped.
    pub dropped: Option<f64>,
    /// Part of the UDP stream's packets that was lost.
    pub stream_lost: Option<f64>,
    /// Of the CUBIC flow that bypasses pepsal: its part of the link. Of the subscriber with one leg: its bytes over those of the
    /// subscriber with many.
    pub other: Option<f64>,
    /// What the transfer took, or what passed from the outage's end until the last flow resumed.
    pub seconds: Option<f64>,
}

/// A link and its flows over time.
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    pub lane: Lane,
    pub place: Place,
    pub round: u32,
    pub seed: u64,
    pub moments: Vec<Moment>,
}

/// The end of an interval of a timeline.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    pub seconds: f64,
    /// What the link carries, IP headers included; 0 while nothing passes.
    pub link_mbit: f64,
    /// Payload of all bulk flows in the interval.
    pub goodput_mbit: f64,
    /// What the packets of the interval have waited for the transmitter, their median in milliseconds.
    pub queue_ms: Option<f64>,
    /// Packets that the queue dropped.
    pub dropped: u64,
    /// What the daemon has found.
    pub estimate: Option<Estimate>,
}

/// Everything that was found.
#[derive(Debug, Default, Serialize)]
pub struct Found {
    pub rows: Vec<Row>,
    pub timelines: Vec<Timeline>,
}

impl Findings for Found {
    fn extend(&mut self, more: Self) {
        self.rows.extend(more.rows);
        self.timelines.extend(more.timelines);
    }
}

/// Medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub what: &'static str,
    pub place: Place,
    #[serde(flatten)]
    pub figures: Figures,
    pub rounds: usize,
    /// Whether a row ended at the time limit, so that the truth is more.
    pub is_limited: bool,
    /// Whether the emulator was too late to be believed.
    pub overloaded: bool,
}

/// The two builds of pepsal in one window or transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub what: &'static str,
    /// The new build's place.
    pub place: Place,
    /// The new build's part of the link over the old build's, or its seconds over the old build's.
    #[serde(flatten)]
    pub ratios: RoundRatios,
}

impl Found {
    /// Rows whose flows or transfers did not go on as they should.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        let failed = |row: &&Row| matches!(row.state, State::Damaged | State::Failed(_));
        self.rows.iter().filter(failed)
    }

    /// Of each window and transfer and place, in the order of lanes.
    pub fn summaries(&self) -> Vec<Summary> {
        let mut groups = BTreeMap::<_, Vec<&Row>>::new();
        for row in &self.rows {
            groups
                .entry((row.lane, row.what, row.place))
                .or_default()
                .push(row);
        }
        let summary = |((_, what, place), rows): ((Lane, _, _), Vec<&Row>)| Summary {
            what,
            place,
            figures: Figures::medians(&rows),
            rounds: rows.len(),
            is_limited: rows.iter().any(|row| row.state == State::TimedOut),
            overloaded: rows.iter().any(|row| row.emulator_late_ms > LATE_MS),
        };
        groups.into_iter().map(summary).collect()
    }

    /// The old build's rows beside those of the new one.
    pub fn comparisons(&self) -> Vec<Comparison> {
        let mut pairs = BTreeMap::<_, Vec<(f64, f64)>>::new();
        for new in &self.rows {
            let Place::Proxy(Proxy::Pepsal, side) = new.place else {
                continue;
            };
            let is_old = |row: &&Row| {
                (row.what, row.round, row.place) == (new.what, new.round, Place::Proxy(Proxy::OldBuild, side))
            };
            let old = self.rows.iter().find(is_old);
            let pair = old.and_then(|old| Some((old.figures.main()?, new.figures.main()?)));
            pairs
                .entry((new.lane, new.what, new.place))
                .or_default()
                .extend(pair);
        }
        let comparison = |((_, what, place), pairs)| {
            let ratios = RoundRatios::of(pairs)?;
            Some(Comparison { what, place, ratios })
        };
        pairs.into_iter().filter_map(comparison).collect()
    }
}

impl Figures {
    /// What two builds are compared by.
    fn main(&self) -> Option<f64> {
        self.used.or(self.seconds)
    }

    fn medians(rows: &[&Row]) -> Self {
        let median = |figure: fn(&Self) -> Option<f64>| {
            let values: Vec<_> = rows.iter().filter_map(|row| figure(&row.figures)).collect();
            statistic::median(&values)
        };
        Self {
            used: median(|row| row.used),
            probe_p50_ms: median(|row| row.probe_p50_ms),
            probe_p95_ms: median(|row| row.probe_p95_ms),
            probe_lost: median(|row| row.probe_lost),
            queue_p95_ms: median(|row| row.queue_p95_ms),
            dropped: median(|row| row.dropped),
            stream_lost: median(|row| row.stream_lost),
            other: median(|row| row.other),
            seconds: median(|row| row.seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::link::place::{Congestion, Side};

    fn row(place: Place, round: u32, used: f64) -> Row {
        Row {
            lane: Lane::Steady,
            what: "steady",
            place,
            round,
            seed: 1,
            state: State::Done,
            figures: Figures {
                used: Some(used),
                ..Figures::default()
            },
            emulator_late_ms: 0.1,
        }
    }

    #[test]
    fn builds_are_compared_in_the_same_rounds() {
        let old = Place::Proxy(Proxy::OldBuild, Side::Server);
        let new = Place::Proxy(Proxy::Pepsal, Side::Server);
        let cubic = Place::NoProxy(Congestion::Cubic);
        let found = Found {
            rows: vec![
                row(cubic, 1, 0.5),
                row(old, 1, 0.8),
                row(new, 1, 0.4),
                row(old, 2, 0.5),
                row(new, 2, 1.0),
                row(new, 3, 0.7),
            ],
            timelines: Vec::new(),
        };
        let [comparison] = &found.comparisons()[..] else {
            panic!("there is one window")
        };
        assert_eq!(comparison.ratios.rounds, [0.5, 2.0]);
        let medians: Vec<_> = found
            .summaries()
            .iter()
            .map(|summary| (summary.place, summary.figures.used, summary.rounds))
            .collect();
        assert_eq!(
            medians,
            [(cubic, Some(0.5), 1), (old, Some(0.65), 2), (new, Some(0.7), 3)]
        );
    }
}
