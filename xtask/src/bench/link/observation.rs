//! What has been measured.

use std::{fmt, time::Duration};

use pepsal_tests::Direction;
use serde::{Serialize, Serializer};

use super::{
    floor::{self, Connection},
    path::{Loss, Path},
    place::{Place, Proxy},
    schedule::Findings,
};
use crate::bench::{statistic, study::RoundRatios};

/// Bytes of the answer to a small request.
pub const REQUEST_BYTES: u64 = 10 << 10;

/// Something that is measured in several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Cell {
    pub path: Path,
    #[serde(rename = "loss_percent")]
    pub loss: Loss,
    pub metric: Metric,
    pub place: Place,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Seconds for so many bytes over a fresh connection.
    Transfer(Way, u64),
    /// Seconds for a small request and its answer on an idle link.
    Request(Connection),
    /// The same while a bulk flow fills the link towards the client.
    LoadedRequest(Connection),
    /// Percentile, in milliseconds, of what packets towards the client wait in the link's queue meanwhile.
    Queue(u8),
    /// Jain's index of eight flows.
    Jain,
    /// The share of the link's rate that eight flows' payload takes, with its headers.
    LinkUse,
}

/// A direction that can be sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Down,
    Up,
}

impl Way {
    pub const BOTH: [Self; 2] = [Self::Down, Self::Up];
}

impl From<Way> for Direction {
    fn from(way: Way) -> Self {
        match way {
            Way::Down => Self::Download,
            Way::Up => Self::Upload,
        }
    }
}

impl Metric {
    /// What its values are counted in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Transfer(..) | Self::Request(_) | Self::LoadedRequest(_) => "s",
            Self::Queue(_) => "ms",
            Self::Jain | Self::LinkUse => "",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connection = |connection: &Connection| match connection {
            Connection::Fresh => "fresh",
            Connection::Kept => "kept",
        };
        match self {
            Self::Transfer(Way::Down, bytes) => write!(formatter, "{} down", size(*bytes)),
            Self::Transfer(Way::Up, bytes) => write!(formatter, "{} up", size(*bytes)),
            Self::Request(c) => write!(
                formatter,
                "{} request, {} connection",
                size(REQUEST_BYTES),
                connection(c)
            ),
            Self::LoadedRequest(c) => write!(formatter, "{}, beside bulk", Self::Request(*c)),
            Self::Queue(percentile) => write!(formatter, "queueing p{percentile}, beside bulk"),
            Self::Jain => formatter.write_str("eight flows, Jain's index"),
            Self::LinkUse => formatter.write_str("eight flows, link use"),
        }
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `10 KiB`, `100 MiB`.
fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

impl Cell {
    /// The least that is possible, in the metric's unit, where physics knows of one.
    pub fn floor(&self) -> Option<f64> {
        let seconds = |way: Way, bytes, connection| {
            Some(floor::floor(self.path, way.into(), bytes, connection).as_secs_f64())
        };
        match self.metric {
            Metric::Transfer(way, bytes) => seconds(way, bytes, Connection::Fresh),
            Metric::Request(connection) | Metric::LoadedRequest(connection) => {
                seconds(Way::Down, REQUEST_BYTES, connection)
            }
            Metric::Queue(_) => Some(0.0),
            Metric::Jain | Metric::LinkUse => None,
        }
    }
}

/// One sample.
#[derive(Clone, Debug, Serialize)]
pub struct Observation {
    #[serde(flatten)]
    pub cell: Cell,
    pub round: u32,
    pub seed: u64,
    /// In the metric's unit; nothing when it failed.
    pub value: Option<f64>,
    pub state: State,
    /// How late the emulator itself delivered meanwhile, in milliseconds, 99th percentile of all packets.
    pub emulator_late_ms: f64,
}

/// How a sample came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should.
    Done,
    /// It was ended at the time limit, which is its value: the truth is more.
    TimedOut,
    /// The digests at both ends differ.
    Damaged,
    /// The connection failed.
    Failed(String),
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => formatter.write_str("done"),
            Self::TimedOut => formatter.write_str("timed out"),
            Self::Damaged => formatter.write_str("the digests differ"),
            Self::Failed(reason) => write!(formatter, "failed: {reason}"),
        }
    }
}

/// How much had arrived when, of one transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    #[serde(flatten)]
    pub cell: Cell,
    pub round: u32,
    /// Payload bytes at the end of each interval of [`SAMPLE_INTERVAL`].
    pub arrived: Vec<u64>,
}

/// Between two samples of a transfer's progress.
pub const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// The emulator is called overloaded when one packet in a hundred is later than this.
pub const LATE_MS: f64 = 2.0;

/// All samples.
#[derive(Default, Serialize)]
pub struct Observations {
    pub samples: Vec<Observation>,
    pub series: Vec<Series>,
}

/// The samples of one cell.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    #[serde(flatten)]
    pub cell: Cell,
    pub unit: &'static str,
    pub floor: Option<f64>,
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub samples: usize,
    /// How many of them ended at the time limit.
    pub timed_out: usize,
    /// Whether the emulator was too late to be believed.
    pub overloaded: bool,
}

/// The two builds of pepsal in one cell.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The new build's.
    #[serde(flatten)]
    pub cell: Cell,
    /// The new build's values over the old build's. Where a round has several samples, its median counts.
    #[serde(flatten)]
    pub ratios: RoundRatios,
}

impl Findings for Observations {
    fn extend(&mut self, more: Self) {
        self.samples.extend(more.samples);
        self.series.extend(more.series);
    }
}

impl Observations {
    /// All cells that have a value, sorted.
    pub fn summaries(&self) -> Vec<Summary> {
        let mut cells: Vec<_> = self.samples.iter().map(|sample| sample.cell).collect();
        cells.sort();
        cells.dedup();
        cells.into_iter().filter_map(|cell| self.summary(cell)).collect()
    }

    /// The figures of a cell, if it has any.
    pub fn summary(&self, cell: Cell) -> Option<Summary> {
        let samples: Vec<_> = self.samples.iter().filter(|sample| sample.cell == cell).collect();
        let values: Vec<_> = samples.iter().filter_map(|sample| sample.value).collect();
        Some(Summary {
            cell,
            unit: cell.metric.unit(),
            floor: cell.floor(),
            median: statistic::median(&values)?,
            least: statistic::quantile(&values, 0.0)?,
            most: statistic::quantile(&values, 1.0)?,
            samples: values.len(),
            timed_out: samples
                .iter()
                .filter(|sample| sample.state == State::TimedOut)
                .count(),
            overloaded: samples.iter().any(|sample| sample.emulator_late_ms > LATE_MS),
        })
    }

    /// The new build beside the old one in each cell that both have.
    pub fn comparisons(&self) -> Vec<Comparison> {
        let comparison = |summary: Summary| {
            let cell = summary.cell;
            let Place::Proxy(Proxy::Pepsal, side) = cell.place else {
                return None;
            };
            let old = Cell {
                place: Place::Proxy(Proxy::OldBuild, side),
                ..cell
            };
            let rounds = self.samples.iter().map(|sample| sample.round).max()?;
            let pairs = (1..=rounds)
                .filter_map(|round| Some((self.round_median(old, round)?, self.round_median(cell, round)?)));
            Some(Comparison {
                cell,
                ratios: RoundRatios::of(pairs)?,
            })
        };
        self.summaries().into_iter().filter_map(comparison).collect()
    }

    fn round_median(&self, cell: Cell, round: u32) -> Option<f64> {
        let samples = self.samples.iter();
        let meant = samples.filter(|sample| sample.cell == cell && sample.round == round);
        let values: Vec<_> = meant.filter_map(|sample| sample.value).collect();
        statistic::median(&values)
    }

    /// Samples that make the whole run a failure.
    pub fn failures(&self) -> impl Iterator<Item = &Observation> {
        self.samples
            .iter()
            .filter(|sample| matches!(sample.state, State::Damaged | State::Failed(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::link::place::{Congestion, Side};

    fn sample(value: Option<f64>, state: State) -> Observation {
        Observation {
            cell: Cell {
                path: Path::Geo,
                loss: Loss::NONE,
                metric: Metric::Transfer(Way::Down, 10 << 20),
                place: Place::NoProxy(Congestion::Bbr),
            },
            round: 1,
            seed: 1,
            value,
            state,
            emulator_late_ms: 0.1,
        }
    }

    #[test]
    fn a_summary_is_of_the_samples_that_have_values() {
        let samples = vec![
            sample(Some(3.0), State::Done),
            sample(Some(9.0), State::TimedOut),
            sample(Some(4.0), State::Done),
            sample(None, State::Failed("reset".into())),
        ];
        let all = Observations {
            samples,
            series: Vec::new(),
        };
        let [summary] = &all.summaries()[..] else {
            panic!("one cell")
        };
        assert_eq!((summary.median, summary.least, summary.most), (4.0, 3.0, 9.0));
        assert_eq!((summary.samples, summary.timed_out), (3, 1));
        assert!(!summary.overloaded);
        assert_eq!(all.failures().count(), 1);
    }

    #[test]
    fn builds_are_compared_by_the_medians_of_each_round() {
        let of = |proxy, round, value| {
            let mut sample = sample(Some(value), State::Done);
            sample.cell.place = Place::Proxy(proxy, Side::Pair);
            sample.round = round;
            sample
        };
        let all = Observations {
            samples: vec![
                of(Proxy::OldBuild, 1, 2.0),
                of(Proxy::Pepsal, 1, 1.0),
                of(Proxy::Pepsal, 1, 3.0),
                of(Proxy::OldBuild, 2, 4.0),
                of(Proxy::Pepsal, 2, 2.0),
                of(Proxy::Pepsal, 3, 9.0),
            ],
            series: Vec::new(),
        };
        let [comparison] = &all.comparisons()[..] else {
            panic!("one cell has both builds")
        };
        assert_eq!(comparison.ratios.rounds, [1.0, 0.5]);
    }

    #[test]
    fn metrics_are_named_for_people() {
        assert_eq!(Metric::Transfer(Way::Up, 100 << 10).to_string(), "100 KiB up");
        assert_eq!(
            Metric::LoadedRequest(Connection::Kept).to_string(),
            "10 KiB request, kept connection, beside bulk"
        );
    }
}
