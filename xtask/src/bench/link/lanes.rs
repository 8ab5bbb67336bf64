//! Links that change while flows fill them, beside a probe: what is left of the link, and what others on it suffer.
//!
//! A [`Lane`] is a link with its flows. A [`LaneJob`] runs it with one contender and takes [`Row`](finding::Row)s, one for each
//! span of time that is judged, and a [`Timeline`](finding::Timeline) for the charts.

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

mod auto;
mod chart;
mod estimate;
mod finding;
mod goal;
mod job;
mod report;
mod scenario;

pub use self::{finding::Found, job::LaneJob};
use super::{
    place::{Congestion, Place, Proxy, Side},
    plan::Rounds,
    site::Equipment,
};

/// A link that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    /// Nothing changes
    Steady,
    /// The rate falls to a fifth for 30 s and returns
    Fade,
    /// A UDP stream takes 40 % of the rate
    Udp,
    /// The profile says twice the rate
    Twice,
    /// The profile says `rate=auto`; left out where the daemon does not accept it
    Auto,
    /// A CUBIC flow that pepsal leaves alone, beside four legs
    Cubic,
    /// 1 % of all packets are lost
    Loss1,
    /// 2 % are lost
    Loss2,
    /// 3 % are lost
    Loss3,
    /// 1 % are lost in bursts of eight on average
    Bursts,
    /// A low orbit: another rate, round trip and silence every 15 s
    Leo,
    /// A subscriber with 50 legs beside one with one
    Subscriber,
    /// 10 MiB from the client at 1 % loss, with pepsal at the client's side
    Up,
    /// Nothing arrives for 15 s
    Outage,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A low orbit of two minutes, and no transfers beside the flows.
    Quick,
    /// Everything that the goals are about.
    Whole,
}

impl Extent {
    /// The lanes that are measured where none is named.
    pub fn lanes(self) -> &'static [Lane] {
        match self {
            Self::Quick => &[Lane::Steady, Lane::Fade, Lane::Udp, Lane::Twice],
            Self::Whole => Lane::value_variants(),
        }
    }

    /// How often they are measured.
    pub fn rounds(self) -> u32 {
        match self {
            Self::Quick => 1,
            Self::Whole => 5,
        }
    }
}

/// Returns the jobs of some lanes, and prints a line for each proxy that a lane leaves out.
///
/// # Errors
/// When a daemon cannot be run.
pub fn jobs(
    lanes: &[Lane],
    extent: Extent,
    rounds: &Rounds,
    proxies: &[Proxy],
    equipment: &Equipment,
) -> Result<Vec<LaneJob>> {
    let mut cases = Vec::new();
    for lane in lanes {
        for place in places(*lane, proxies) {
            if *lane == Lane::Auto && !auto::is_accepted(place, equipment)? {
                println!("{place}: rate=auto is not accepted, so that it is left out");
                continue;
            }
            cases.extend(lane.works(extent).iter().map(|work| (*lane, place, *work)));
        }
    }
    let jobs = rounds.seeds().flat_map(|(round, seed)| {
        cases.iter().map(move |(lane, place, work)| LaneJob {
            lane: *lane,
            place: *place,
            work: *work,
            extent,
            round,
            seed,
        })
    });
    Ok(jobs.collect())
}

/// No proxy with either congestion control, where that is not what another lane measures, and each proxy.
fn places(lane: Lane, proxies: &[Proxy]) -> Vec<Place> {
    let side = if lane == Lane::Up {
        Side::Client
    } else {
        Side::Server
    };
    let without = match lane {
        // A profile changes nothing where there is no proxy: steady has these.
        Lane::Twice | Lane::Auto => &[][..],
        _ => &[Congestion::Cubic, Congestion::Bbr],
    };
    let without = without.iter().map(|congestion| Place::NoProxy(*congestion));
    without
        .chain(proxies.iter().map(|proxy| Place::Proxy(*proxy, side)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_interleaved_and_a_profile_needs_a_proxy() -> Result<()> {
        let rounds = Rounds { count: 2, seed: 7 };
        let equipment = Equipment {
            daemon: "/no/such/daemon".into(),
            old_build: None,
            arguments: Vec::new(),
        };
        let lanes = [Lane::Steady, Lane::Twice];
        let jobs = jobs(&lanes, Extent::Quick, &rounds, &[Proxy::Pepsal], &equipment)?;
        let order: Vec<_> = jobs.iter().map(|job| (job.lane, job.seed)).collect();
        let round = |seed| {
            [
                (Lane::Steady, seed),
                (Lane::Steady, seed),
                (Lane::Steady, seed),
                (Lane::Twice, seed),
            ]
        };
        assert_eq!(order, [round(7), round(8)].concat());
        Ok(())
    }
}
