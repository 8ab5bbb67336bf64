//! Samples and their statistics.

use std::fmt;

use pepsal_tests::Family;
use serde::{Serialize, Serializer};

use super::{contender::Contender, frames::Packet};
use crate::bench::{statistic, study::RoundRatios};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Metric {
    /// Gbit/s of payload.
    Rate(Bulk),
    /// CPU seconds of the machine per 10⁹ bytes of payload.
    Processor(Bulk),
    /// New connections per second.
    Connections(Family),
    /// Percentile of the time from connect to end of stream of such a connection, in milliseconds.
    ConnectionTime(Family, u8),
    /// CPU time of the machine per such connection, in microseconds.
    ConnectionProcessor(Family),
    /// Memory of the machine per additional flow between these numbers of flows, in kB.
    Memory(usize, usize),
    /// Descriptors of the proxy per additional flow.
    Descriptors(usize, usize),
    /// CPU time of the machine per request with this number of open flows, in microseconds.
    Exchange(usize),
    /// Time of the steering programs per packet, in nanoseconds.
    Steering(Programs, Packet),
    /// Total time of the gateway per forwarded packet, in nanoseconds.
    Passing(Packet),
    /// System calls of the proxy per connection with one request.
    Syscalls,
}

/// Programs on the path of a packet through the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Programs {
    /// The ingress program of its input interface.
    Ingress,
    /// The egress program of its output interface.
    Egress,
    /// The sum of both, for a forwarded packet.
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bulk {
    /// Concurrent flows.
    pub flows: u32,
    pub way: Way,
    pub family: Family,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// From the client.
    Up,
    /// To the client.
    Down,
}

impl Metric {
    /// Returns the unit of the values.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Rate(_) => "Gbit/s",
            Self::Processor(_) => "CPU-s/GB",
            Self::Connections(_) => "/s",
            Self::ConnectionTime(..) => "ms",
            Self::Memory(..) => "kB",
            Self::Descriptors(..) | Self::Syscalls => "",
            Self::ConnectionProcessor(_) | Self::Exchange(_) => "µs",
            Self::Steering(..) | Self::Passing(_) => "ns",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(bulk) => write!(formatter, "{bulk}"),
            Self::Processor(bulk) => write!(formatter, "processor, {bulk}"),
            Self::Connections(family) => write!(formatter, "new connections, {}", family.name()),
            Self::ConnectionTime(family, percentile) => {
                write!(formatter, "new connections, {}, p{percentile}", family.name())
            }
            Self::ConnectionProcessor(family) => {
                write!(formatter, "processor of a new connection, {}", family.name())
            }
            Self::Memory(from, to) => write!(formatter, "memory of an idle flow, {from} to {to}"),
            Self::Descriptors(from, to) => write!(formatter, "descriptors of a flow, {from} to {to}"),
            Self::Exchange(flows) => write!(formatter, "processor of a request, {flows} flows"),
            Self::Steering(programs, packet) => write!(formatter, "steering {programs}, {packet}"),
            Self::Passing(packet) => write!(formatter, "forwarded, {packet}"),
            Self::Syscalls => formatter.write_str("system calls of a connection"),
        }
    }
}

impl Serialize for Metric {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Programs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ingress => "on ingress",
            Self::Egress => "on egress",
            Self::Both => "on both",
        })
    }
}

impl fmt::Display for Bulk {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flows = match self.flows {
            1 => "1 flow".to_owned(),
            count => format!("{count} flows"),
        };
        let way = match self.way {
            Way::Up => "up",
            Way::Down => "down",
        };
        write!(formatter, "{flows} {way}, {}", self.family.name())
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Observation {
    pub metric: Metric,
    pub contender: Contender,
    pub round: u32,
    /// Value in the unit of the metric.
    pub value: f64,
}

#[derive(Default, Serialize)]
pub struct Observations {
    pub samples: Vec<Observation>,
    /// Calls per connection by name, most frequent first, for each contender.
    pub syscalls: Vec<(Contender, Vec<(String, f64)>)>,
}

/// Samples of a metric for a contender.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Summary {
    pub metric: Metric,
    pub contender: Contender,
    pub unit: &'static str,
    pub median: f64,
    pub least: f64,
    pub most: f64,
    pub samples: usize,
}

/// Comparison of two builds of pepsal in a metric.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    pub metric: Metric,
    /// Ratios of the new build's values to the old build's.
    #[serde(flatten)]
    pub ratios: RoundRatios,
}

impl Observations {
    /// Adds a sample.
    pub fn add(&mut self, round: u32, contender: Contender, metric: Metric, value: f64) {
        self.samples.push(Observation {
            metric,
            contender,
            round,
            value,
        });
    }

    pub fn metrics(&self) -> Vec<Metric> {
        let mut metrics: Vec<_> = self.samples.iter().map(|sample| sample.metric).collect();
        metrics.sort();
        metrics.dedup();
        metrics
    }

    pub fn summaries(&self) -> Vec<Summary> {
        self.metrics()
            .into_iter()
            .flat_map(|metric| Contender::ALL.map(|contender| self.summary(metric, contender)))
            .flatten()
            .collect()
    }

    /// Returns the statistics of a metric for a contender, if measured.
    pub fn summary(&self, metric: Metric, contender: Contender) -> Option<Summary> {
        let is_meant = |sample: &&Observation| sample.metric == metric && sample.contender == contender;
        let values: Vec<_> = self
            .samples
            .iter()
            .filter(is_meant)
            .map(|sample| sample.value)
            .collect();
        Some(Summary {
            metric,
            contender,
            unit: metric.unit(),
            median: statistic::median(&values)?,
            least: statistic::quantile(&values, 0.0)?,
            most: statistic::quantile(&values, 1.0)?,
            samples: values.len(),
        })
    }

    /// Returns the median of a metric for a contender.
    pub fn median(&self, metric: Metric, contender: Contender) -> Option<f64> {
        self.summary(metric, contender).map(|summary| summary.median)
    }

    /// Returns the ratio of pepsal's median to another's.
    pub fn ratio(&self, metric: Metric, to: Contender) -> Option<f64> {
        let other = self.median(metric, to).filter(|median| *median != 0.0)?;
        Some(self.median(metric, Contender::Pepsal)? / other)
    }

    /// Returns the comparisons of both builds in all metrics that have both.
    pub fn comparisons(&self) -> Vec<Comparison> {
        let comparison = |metric| {
            Some(Comparison {
                metric,
                ratios: self.round_ratios(metric)?,
            })
        };
        self.metrics().into_iter().filter_map(comparison).collect()
    }

    pub fn round_ratios(&self, metric: Metric) -> Option<RoundRatios> {
        let samples = |contender| {
            let is_meant =
                move |sample: &&Observation| sample.metric == metric && sample.contender == contender;
            self.samples.iter().filter(is_meant)
        };
        RoundRatios::of(samples(Contender::OldBuild).filter_map(|old| {
            let new = samples(Contender::Pepsal).find(|new| new.round == old.round)?;
            Some((old.value, new.value))
        }))
    }

    /// Returns the excess of a contender over forwarding.
    pub fn above_forwarding(&self, metric: Metric, contender: Contender) -> Option<f64> {
        Some(self.median(metric, contender)? - self.median(metric, Contender::Forwarding)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_compared_contender_by_contender() {
        let mut found = Observations::default();
        let metric = Metric::Exchange(100);
        for (round, (forwarding, pepsal)) in
            [(10.0, 15.0), (30.0, 90.0), (20.0, 30.0)].into_iter().enumerate()
        {
            found.add(round as u32, Contender::Forwarding, metric, forwarding);
            found.add(round as u32, Contender::Pepsal, metric, pepsal);
        }
        let summary = found.summary(metric, Contender::Pepsal).unwrap();
        assert_eq!(
            (summary.median, summary.least, summary.most, summary.samples),
            (30.0, 15.0, 90.0, 3)
        );
        assert_eq!(found.ratio(metric, Contender::Forwarding), Some(1.5));
        assert_eq!(found.above_forwarding(metric, Contender::Pepsal), Some(10.0));
        assert_eq!(found.ratio(metric, Contender::Haproxy), None);
        assert_eq!(found.summaries().len(), 2);
    }

    #[test]
    fn builds_are_compared_within_a_round() {
        let mut found = Observations::default();
        let metric = Metric::Connections(Family::V4);
        for (round, old, new) in [(1, 100.0, 110.0), (2, 200.0, 180.0), (3, 100.0, 120.0)] {
            found.add(round, Contender::Pepsal, metric, new);
            found.add(round, Contender::OldBuild, metric, old);
        }
        found.add(1, Contender::Pepsal, Metric::Syscalls, 38.0);
        let [comparison] = &found.comparisons()[..] else {
            panic!("one metric has both builds")
        };
        assert_eq!(comparison.ratios.rounds, [1.1, 0.9, 1.2]);
        assert_eq!(comparison.ratios.median, 1.1);
    }

    #[test]
    fn metrics_are_named_for_people() {
        let bulk = Bulk {
            flows: 16,
            way: Way::Down,
            family: Family::V6,
        };
        assert_eq!(Metric::Rate(bulk).to_string(), "16 flows down, IPv6");
        assert_eq!(
            Metric::ConnectionTime(Family::V4, 99).to_string(),
            "new connections, IPv4, p99"
        );
    }
}
