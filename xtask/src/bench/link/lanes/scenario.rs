//! What each lane is: its link over time, what pepsal is told of it, its flows, and the spans of time that are judged.

use std::{net::SocketAddr, time::Duration};

use pepsal_tests::{Connector, Course, Direction, Family, LinkProfile, Passage};

use super::{Extent, Lane};
use crate::{
    bench::link::{
        peer::LinkSeen,
        site::{Ground, Site},
    },
    quantity,
};

const MBIT: u64 = 1_000_000;
/// Towards the client and towards the server.
pub const RATE_BPS: u64 = 50 * MBIT;
const RTT: Duration = Duration::from_millis(600);
/// The highest rate of the low orbit.
pub const LOW_ORBIT_BPS: u64 = 200 * MBIT;
const LOW_ORBIT_RTT: Duration = Duration::from_millis(40);

const FLOWS: usize = 4;
/// Legs of the subscriber with many.
const MANY: usize = 50;
/// The part of the rate that the UDP stream takes.
const STREAM_SHARE: f64 = 0.4;

/// The end of the outage.
pub const OUTAGE_END: Duration = seconds(35);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What is measured on a lane, each on a site of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Downloads without an end.
    Flows,
    /// Transfers of 10 MiB, one after the other.
    Transfers,
}

/// A span of a lane that is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub name: &'static str,
    /// Since the flows began.
    pub from: Duration,
    pub to: Duration,
}

impl Lane {
    /// What is measured on it.
    pub fn works(self, extent: Extent) -> &'static [Work] {
        match (self, extent) {
            (Self::Up, _) => &[Work::Transfers],
            (Self::Steady | Self::Auto, Extent::Whole) => &[Work::Flows, Work::Transfers],
            _ => &[Work::Flows],
        }
    }

    /// The spans that are judged, in their order; none where no flows are.
    pub fn windows(self, extent: Extent) -> Vec<Window> {
        let window = |name, from, to| Window {
            name,
            from: seconds(from),
            to: seconds(to),
        };
        match self {
            Self::Steady => vec![window("steady", 10, 40)],
            Self::Fade => vec![
                window("fade, from 8 s on", 28, 50),
                window("return, from 10 s on", 60, 80),
            ],
            Self::Udp => vec![window("udp", 10, 60)],
            Self::Twice => vec![window("twice", 10, 60)],
            Self::Auto => vec![window("auto, from 10 s on", 10, 60)],
            Self::Cubic => vec![window("cubic", 20, 100)],
            Self::Loss1 => vec![window("1 % loss", 10, 40)],
            Self::Loss2 => vec![window("2 % loss", 10, 40)],
            Self::Loss3 => vec![window("3 % loss", 10, 40)],
            Self::Bursts => vec![window("bursts", 10, 40)],
            Self::Leo => vec![window("leo", 10, low_orbit(extent).as_secs())],
            Self::Subscriber => vec![window("subscriber", 15, 45)],
            Self::Up => Vec::new(),
            Self::Outage => vec![window("after the outage", 37, 60)],
        }
    }

    /// Names of its transfers, in their order: when the second begins, the daemon knows the path from the first.
    pub fn transfers(self) -> &'static [&'static str] {
        match self {
            Self::Steady => &["10 MiB down", "10 MiB down, again"],
            Self::Auto => &["10 MiB down, auto", "10 MiB down, auto, again"],
            Self::Up => &["10 MiB up"],
            _ => &[],
        }
    }

    /// Which way its transfers go.
    pub fn direction(self) -> Direction {
        match self {
            Self::Up => Direction::Upload,
            _ => Direction::Download,
        }
    }

    /// The link over time, of which the queue holds one bandwidth-delay product.
    pub fn course(self, seed: u64, extent: Extent) -> Course {
        let steady = Course::steady(&self.profile(seed));
        match self {
            Self::Fade => steady
                .then(seconds(20), |step| step.down_bps = RATE_BPS / 5)
                .then(seconds(50), |step| step.down_bps = RATE_BPS),
            Self::Leo => Course::low_orbit(seed, low_orbit(extent)),
            Self::Outage => steady
                .then(seconds(20), |step| step.passage = Passage::Lost)
                .then(OUTAGE_END, |step| step.passage = Passage::Open),
            _ => steady,
        }
    }

    fn profile(self, seed: u64) -> LinkProfile {
        let loss = match self {
            Self::Loss1 | Self::Bursts | Self::Up => 0.01,
            Self::Loss2 => 0.02,
            Self::Loss3 => 0.03,
            _ => 0.0,
        };
        let (rate, rtt) = match self {
            Self::Leo => (LOW_ORBIT_BPS, LOW_ORBIT_RTT),
            _ => (RATE_BPS, RTT),
        };
        LinkProfile {
            seed,
            burst_packets: (self == Self::Bursts).then_some(8.0),
            ..LinkProfile::symmetric(rate, rtt, loss)
        }
    }

    /// What its sites are made of.
    pub fn ground(self, seed: u64) -> Ground {
        let link = self.profile(seed);
        let rate = match self {
            Self::Auto => "auto".to_owned(),
            Self::Twice => quantity::exact_rate(2 * link.down_bps),
            _ => quantity::exact_rate(link.down_bps),
        };
        let rtt = match self {
            // Nothing is known.
            Self::Auto => String::new(),
            _ => quantity::exact_time(link.rtt),
        };
        let seen = || LinkSeen {
            rate: rate.clone(),
            up: rate.clone(),
            rtt: rtt.clone(),
        };
        Ground {
            link,
            seen: [seen(), seen()],
            is_told: true,
            extra_clients: u8::from(self == Self::Subscriber),
            has_bypass: self == Self::Cubic,
        }
    }

    /// How each flow connects, and whereto. [`Lane::has_other`] is about the last one.
    pub fn ends(self, site: &Site, patience: Duration) -> Vec<(Connector, SocketAddr)> {
        let end = (site.connector(patience), site.server());
        let count = if self == Self::Subscriber { MANY } else { FLOWS };
        let mut ends = vec![end; count];
        match self {
            Self::Subscriber => {
                let alone = Connector {
                    source: Some((Family::V4.extra_client(0), 0).into()),
                    ..site.connector(patience)
                };
                ends.push((alone, site.server()));
            }
            Self::Cubic => ends.extend(site.bypass().map(|server| (site.connector(patience), server))),
            _ => {}
        }
        ends
    }

    /// Whether the last flow is compared with the others.
    pub fn has_other(self) -> bool {
        matches!(self, Self::Cubic | Self::Subscriber)
    }

    /// The rate of the UDP stream beside the flows, IP headers included.
    pub fn stream_bps(self) -> Option<f64> {
        (self == Self::Udp).then_some(STREAM_SHARE * RATE_BPS as f64)
    }

    /// The part of the link that the stream leaves to the flows.
    pub fn flows_share(self) -> f64 {
        1.0 - self.stream_bps().unwrap_or(0.0) / RATE_BPS as f64
    }
}

fn low_orbit(extent: Extent) -> Duration {
    match extent {
        Extent::Quick => seconds(120),
        Extent::Whole => seconds(600),
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    #[test]
    fn windows_lie_beside_what_changes_by_what_the_goals_say() {
        let course = Lane::Fade.course(1, Extent::Whole);
        let [fade, back] = Lane::Fade.windows(Extent::Whole)[..] else {
            panic!("a fade has two windows")
        };
        let changes: Vec<_> = course.steps().iter().map(|step| step.at).collect();
        assert_eq!(changes, [seconds(0), fade.from - seconds(8), fade.to]);
        assert_eq!(back.from, fade.to + seconds(10));
        assert_eq!(
            Lane::Outage.windows(Extent::Whole)[0].from,
            OUTAGE_END + seconds(2)
        );
    }

    #[test]
    fn names_tell_windows_and_transfers_apart() {
        let mut names = Vec::new();
        for lane in Lane::value_variants() {
            names.extend(lane.windows(Extent::Whole).iter().map(|window| window.name));
            names.extend(lane.transfers());
        }
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
