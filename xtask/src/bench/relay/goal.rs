//! Goals of pepsal without a link, and whether it meets them.

use super::{
    contender::Contender::{self, Forwarding, Haproxy, Pepsal},
    frames::{Kind, Packet},
    observation::{Bulk, Metric, Observations, Programs},
};
use crate::bench::goal::{Goal, Verdict};

/// Memory of an idle flow of HAProxy 2.6, used if it is not measured.
const HAPROXY_MEMORY_KB: f64 = 9.4;

/// Returns all goals, judged by medians, and by the worst of several figures.
pub fn judge(found: &Observations) -> Vec<Goal> {
    vec![
        Goal::judged(
            "one bulk flow",
            "≥ 1.0 of forwarding",
            rate(found, 1, Forwarding, 1.0),
        ),
        Goal::judged("one bulk flow", "≥ 1.8 of HAProxy", rate(found, 1, Haproxy, 1.8)),
        Goal::judged(
            "sixteen flows",
            "≥ 0.9 of forwarding",
            rate(found, 16, Forwarding, 0.9),
        ),
        Goal::judged("sixteen flows", "≥ 1.5 of HAProxy", rate(found, 16, Haproxy, 1.5)),
        Goal::judged("CPU-seconds per GB", "≤ 0.7 of HAProxy", processor(found)),
        Goal::judged(
            "new connections per second",
            "≥ 1.2 of HAProxy",
            connections(found, Haproxy, 1.2),
        ),
        Goal::judged(
            "new connections per second",
            "≥ 0.62 of forwarding",
            connections(found, Forwarding, 0.62),
        ),
        Goal::judged(
            "p99 of new connections",
            "no more than HAProxy's",
            connection_time(found),
        ),
        Goal::judged(
            "memory of an idle flow",
            "no more than HAProxy's, or 9.4 kB",
            memory(found),
        ),
        Goal::judged("descriptors of an idle flow", "two", descriptors(found)),
        Goal::judged(
            "processor of a request, fewest flows to most",
            "flat within 20 %",
            processor_growth(found),
        ),
        Goal::judged(
            "memory of a flow, fewest flows to most",
            "flat within 20 %",
            memory_growth(found),
        ),
        Goal::judged(
            "steering of an unsteered packet, ingress and egress",
            "< 250 ns",
            steering(
                found,
                |programs, packet| programs == Programs::Both && packet.is_foreign(),
                250.0,
            ),
        ),
        Goal::judged(
            "steering of a SYN",
            "< 900 ns",
            steering(found, |_, packet| packet.kind == Kind::Syn, 900.0),
        ),
    ]
}

/// Formats minimum and maximum with their unit.
struct Span {
    least: f64,
    most: f64,
}

impl Span {
    fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        values.into_iter().fold(None, |span, value| match span {
            None => Some(Self {
                least: value,
                most: value,
            }),
            Some(Self { least, most }) => Some(Self {
                least: least.min(value),
                most: most.max(value),
            }),
        })
    }

    /// Formats a range with a number of digits, as one figure if both are equal.
    fn shown(&self, digits: usize) -> String {
        let (least, most) = (
            format!("{:.digits$}", self.least),
            format!("{:.digits$}", self.most),
        );
        if least == most {
            least
        } else {
            format!("{least}–{most}")
        }
    }
}

fn ratios(found: &Observations, metrics: impl Iterator<Item = Metric>, to: Contender) -> Option<Span> {
    Span::of(metrics.filter_map(|metric| found.ratio(metric, to)))
}

fn rate(found: &Observations, flows: u32, than: Contender, least: f64) -> Option<Verdict> {
    let bulks = Bulk::all().filter(|bulk| bulk.flows == flows).map(Metric::Rate);
    let span = ratios(found, bulks, than)?;
    Some(Verdict {
        measured: span.shown(2),
        met: span.least >= least,
    })
}

fn processor(found: &Observations) -> Option<Verdict> {
    let span = ratios(found, Bulk::all().map(Metric::Processor), Haproxy)?;
    Some(Verdict {
        measured: span.shown(2),
        met: span.most <= 0.7,
    })
}

fn connections(found: &Observations, than: Contender, least: f64) -> Option<Verdict> {
    let metrics = found.metrics().into_iter();
    let span = ratios(
        found,
        metrics.filter(|metric| matches!(metric, Metric::Connections(_))),
        than,
    )?;
    Some(Verdict {
        measured: span.shown(2),
        met: span.least >= least,
    })
}

/// By address family.
fn connection_time(found: &Observations) -> Option<Verdict> {
    let metrics: Vec<_> = found
        .metrics()
        .into_iter()
        .filter(|metric| matches!(metric, Metric::ConnectionTime(_, 99)))
        .collect();
    let span = |contender| {
        Span::of(
            metrics
                .iter()
                .filter_map(|metric| found.median(*metric, contender)),
        )
    };
    let (pepsal, haproxy) = (span(Pepsal)?, span(Haproxy)?);
    let ratio = ratios(found, metrics.iter().copied(), Haproxy)?;
    Some(Verdict {
        measured: format!("{} ms (HAProxy {} ms)", pepsal.shown(1), haproxy.shown(1)),
        met: ratio.most <= 1.0,
    })
}

fn memory(found: &Observations) -> Option<Verdict> {
    let metric = found
        .metrics()
        .into_iter()
        .find(|metric| matches!(metric, Metric::Memory(..)))?;
    let pepsal = found.above_forwarding(metric, Pepsal)?;
    let haproxy = found.above_forwarding(metric, Haproxy);
    let than = haproxy.map_or_else(String::new, |kilobytes| format!(" (HAProxy {kilobytes:.1} kB)"));
    Some(Verdict {
        measured: format!("{pepsal:.1} kB{than}"),
        met: pepsal <= haproxy.unwrap_or(HAPROXY_MEMORY_KB),
    })
}

fn descriptors(found: &Observations) -> Option<Verdict> {
    let metrics = found.metrics().into_iter();
    let metrics = metrics.filter(|metric| matches!(metric, Metric::Descriptors(..)));
    let span = Span::of(metrics.filter_map(|metric| found.median(metric, Pepsal)))?;
    Some(Verdict {
        measured: span.shown(2),
        // One or two pipes may be open during the count.
        met: span.most < 2.05,
    })
}

fn processor_growth(found: &Observations) -> Option<Verdict> {
    growth(found, |metric| matches!(metric, Metric::Exchange(_)))
}

fn memory_growth(found: &Observations) -> Option<Verdict> {
    growth(found, |metric| matches!(metric, Metric::Memory(..)))
}

/// Returns the goal for the change of pepsal's excess cost with the number of flows.
fn growth(found: &Observations, is_meant: impl Fn(&Metric) -> bool) -> Option<Verdict> {
    let metrics: Vec<_> = found.metrics().into_iter().filter(is_meant).collect();
    let costs: Vec<_> = metrics
        .iter()
        .filter_map(|metric| found.above_forwarding(*metric, Pepsal))
        .collect();
    if costs.len() < 2 {
        return None;
    }
    let span = Span::of(costs.iter().copied())?;
    let shown: Vec<_> = costs.iter().map(|cost| format!("{cost:.1}")).collect();
    Some(Verdict {
        measured: format!("{} {}", shown.join(", "), metrics[0].unit()),
        met: span.least > 0.0 && span.most <= 1.2 * span.least,
    })
}

/// Returns the goal for programs and packets below a number of nanoseconds.
fn steering(
    found: &Observations,
    is_meant: impl Fn(Programs, Packet) -> bool,
    below: f64,
) -> Option<Verdict> {
    let metrics = found.metrics().into_iter();
    let meant = metrics.filter(
        |metric| matches!(metric, Metric::Steering(programs, packet) if is_meant(*programs, *packet)),
    );
    let span = Span::of(meant.filter_map(|metric| found.median(metric, Pepsal)))?;
    Some(Verdict {
        measured: format!("{} ns", span.shown(0)),
        met: span.most < below,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(samples: &[(Metric, Contender, f64)]) -> Observations {
        let mut found = Observations::default();
        for (metric, contender, value) in samples {
            found.add(1, *contender, *metric, *value);
        }
        found
    }

    #[test]
    fn the_worst_case_decides() {
        let bulks: Vec<_> = Bulk::all().filter(|bulk| bulk.flows == 1).collect();
        let samples = [
            (Metric::Rate(bulks[0]), Forwarding, 10.0),
            (Metric::Rate(bulks[0]), Pepsal, 12.0),
            (Metric::Rate(bulks[1]), Forwarding, 10.0),
            (Metric::Rate(bulks[1]), Pepsal, 9.0),
        ];
        let verdict = rate(&found(&samples), 1, Forwarding, 1.0).unwrap();
        assert_eq!((verdict.measured.as_str(), verdict.met), ("0.90–1.20", false));
        assert!(rate(&found(&samples), 1, Forwarding, 0.9).unwrap().met);
        assert!(rate(&found(&samples), 1, Haproxy, 1.8).is_none());
        assert!(rate(&found(&samples), 16, Forwarding, 0.9).is_none());
    }

    #[test]
    fn growth_is_of_what_is_added_to_forwarding() {
        let samples = |most| {
            [
                (Metric::Exchange(100), Forwarding, 50.0),
                (Metric::Exchange(100), Pepsal, 60.0),
                (Metric::Exchange(9800), Forwarding, 80.0),
                (Metric::Exchange(9800), Pepsal, most),
            ]
        };
        let flat = processor_growth(&found(&samples(91.0))).unwrap();
        assert_eq!((flat.measured.as_str(), flat.met), ("10.0, 11.0 µs", true));
        assert!(!processor_growth(&found(&samples(93.0))).unwrap().met);
        assert!(memory_growth(&found(&samples(91.0))).is_none());
    }

    #[test]
    fn without_haproxy_its_known_memory_counts() {
        let metric = Metric::Memory(100, 2000);
        let mut samples = vec![(metric, Forwarding, 10.0), (metric, Pepsal, 19.0)];
        assert!(memory(&found(&samples)).unwrap().met);
        samples.push((metric, Haproxy, 18.0));
        let verdict = memory(&found(&samples)).unwrap();
        assert_eq!(
            (verdict.measured.as_str(), verdict.met),
            ("9.0 kB (HAProxy 8.0 kB)", false)
        );
    }

    #[test]
    fn unsteered_packets_and_syns_have_goals_of_their_own() {
        let [syn, .., udp] = Packet::ALL;
        let samples = [
            (Metric::Steering(Programs::Ingress, syn), Pepsal, 600.0),
            (Metric::Steering(Programs::Ingress, udp), Pepsal, 42.0),
            (Metric::Steering(Programs::Both, udp), Pepsal, 260.0),
        ];
        let found = found(&samples);
        let unsteered = steering(&found, |programs, _| programs == Programs::Both, 250.0).unwrap();
        assert_eq!((unsteered.measured.as_str(), unsteered.met), ("260 ns", false));
        let opened = steering(&found, |_, packet| packet.kind == Kind::Syn, 900.0).unwrap();
        assert_eq!((opened.measured.as_str(), opened.met), ("600 ns", true));
    }
}
