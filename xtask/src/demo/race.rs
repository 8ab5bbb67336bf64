//! Transfers at once, each with namespaces and a link of its own.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use pepsal_tests::{
    Connector, Daemon, Direction, Family, Link, LinkProfile, Namespace, Outcome, Server, Topology, Transfer,
};

use super::{progress::Progress, quantity};
use crate::signals::Signals;

/// What the endpoints send with: the default of Linux.
pub const STOCK_CONGESTION: &str = "cubic";
/// Assured forwarding, class 2, low drop precedence (RFC 2597): DSCP 18, as a traffic class.
pub const AF21: u8 = 18 << 2;

/// Where pepsal runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Nowhere: plain forwarding.
    Nowhere,
    /// On the gateway between client and link.
    Gateway,
    /// There, and on the router between link and server.
    BothEnds,
}

impl Placement {
    pub const ALL: [Self; 3] = [Self::Nowhere, Self::Gateway, Self::BothEnds];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nowhere => "without pepsal",
            Self::Gateway => "pepsal at the gateway",
            Self::BothEnds => "pepsal at both ends",
        }
    }
}

/// One transfer and its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct Contest {
    pub direction: Direction,
    pub family: Family,
    pub placement: Placement,
}

impl Contest {
    /// What is transferred, wherever pepsal runs.
    pub fn transfer(&self) -> String {
        let direction = match self.direction {
            Direction::Upload => "upload",
            Direction::Download => "download",
        };
        let family = match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        };
        format!("{direction} {family}")
    }
}

impl fmt::Display for Contest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, {}", self.transfer(), self.placement.name())
    }
}

/// A contest that has ended well.
#[derive(Debug)]
pub struct Finish {
    pub contest: Contest,
    pub outcome: Outcome,
}

/// What all contests have in common.
pub struct Race {
    /// The daemon's binary.
    pub daemon: PathBuf,
    /// The satellite link.
    pub profile: LinkProfile,
    /// Size of the file.
    pub bytes: u64,
}

impl Race {
    /// Runs contests at once and returns how they went, in their order; nothing when a signal came first.
    pub fn run(&self, contests: &[Contest], signals: &Signals) -> Result<Option<Vec<Finish>>> {
        let mut lanes = Vec::new();
        // Started by this thread and owned by it: a daemon dies with the thread that started it, at the latest.
        let mut daemons = Vec::new();
        for contest in contests {
            if signals.is_pending() {
                return Ok(None);
            }
            let lane = Lane::new(*contest, &self.profile)?;
            for gateway in lane.gateways() {
                daemons.push(self.start_daemon(&gateway, contest.placement)?);
            }
            lanes.push(Arc::new(lane));
        }

        let mut progress = Progress::new();
        let finished = self.start_transfers(&lanes);
        let mut finishes = Vec::new();
        while finishes.len() < lanes.len() {
            if signals.come_within(TICK)? {
                lanes.iter().for_each(|lane| lane.server.stop());
                return Ok(None);
            }
            for (number, outcome) in finished.try_iter() {
                let contest = contests[number];
                let outcome = outcome.with_context(|| contest.to_string())?;
                progress.finished(&contest, &outcome);
                finishes.push((number, Finish { contest, outcome }));
            }
            progress.show(&lanes, self.bytes);
        }
        progress.clear();
        for daemon in daemons {
            daemon.terminate()?;
        }
        finishes.sort_by_key(|(number, _)| *number);
        Ok(Some(finishes.into_iter().map(|(_, finish)| finish).collect()))
    }

    /// What a daemon is told of the link behind an interface of its own.
    pub fn link_argument(&self, interface: &str) -> String {
        let rate = quantity::exact_rate(self.profile.up_bps);
        // A link without a round trip is nothing to tune for; this is the least that the daemon takes.
        let rtt = quantity::exact_time(self.profile.rtt.max(Duration::from_millis(1)));
        format!("{interface},rate={rate},rtt={rtt}")
    }

    fn start_daemon(&self, gateway: &Gateway<'_>, placement: Placement) -> Result<Daemon> {
        let mut link = self.link_argument(gateway.satellite);
        if placement == Placement::BothEnds {
            link.push_str(",peer=pepsal");
        }
        let arguments = [
            "-i",
            gateway.terrestrial,
            "-i",
            gateway.satellite,
            "--link",
            &link,
        ];
        Daemon::start_quiet(&self.daemon, gateway.namespace, &arguments)
    }

    fn start_transfers(&self, lanes: &[Arc<Lane>]) -> Receiver<(usize, Result<Outcome>)> {
        let (sender, finished) = mpsc::channel();
        for (number, lane) in lanes.iter().enumerate() {
            let (lane, sender, bytes) = (Arc::clone(lane), sender.clone(), self.bytes);
            thread::spawn(move || {
                // Nobody is there to hear it after a signal.
                let _ = sender.send((number, lane.transfer(bytes)));
            });
        }
        finished
    }
}

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(200);
/// A transfer may stand still for this long: the last bytes of a large file are long under way on a slow link.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A contest's own client, gateway, link and server.
pub struct Lane {
    pub contest: Contest,
    server: Server,
    topology: Topology,
    downloaded: Arc<AtomicU64>,
}

impl Lane {
    fn new(contest: Contest, profile: &LinkProfile) -> Result<Self> {
        // The same losses with pepsal and without, others for the other family.
        let seed = match contest.family {
            Family::V4 => profile.seed,
            Family::V6 => profile.seed + 1,
        };
        let builder = Topology::builder().link(Link::Emulated(LinkProfile { seed, ..*profile }));
        let topology = match contest.placement {
            Placement::Nowhere | Placement::Gateway => builder.build()?,
            Placement::BothEnds => builder.router().build()?,
        };
        let server = Server::with_congestion(&topology.server, STOCK_CONGESTION)?;
        Ok(Self {
            contest,
            server,
            topology,
            downloaded: Arc::default(),
        })
    }

    /// Where pepsal is to run.
    fn gateways(&self) -> impl Iterator<Item = Gateway<'_>> {
        let near = (self.contest.placement != Placement::Nowhere).then_some(Gateway {
            namespace: &self.topology.gateway,
            terrestrial: "lan0",
            satellite: "sat0",
        });
        let far = self.topology.router.as_ref().map(|router| Gateway {
            namespace: router,
            terrestrial: "wan0",
            satellite: "sat1",
        });
        near.into_iter().chain(far)
    }

    fn transfer(&self, bytes: u64) -> Result<Outcome> {
        let connector = Connector {
            traffic_class: AF21,
            congestion: Some(STOCK_CONGESTION.to_owned()),
            timeout: PATIENCE,
            ..Connector::default()
        };
        Transfer::new(self.contest.direction, bytes)
            .connector(connector)
            .progress(Arc::clone(&self.downloaded))
            .run(&self.topology.client, self.server.address(self.contest.family))
    }

    /// Bytes of the file that have reached the other end.
    pub fn arrived(&self) -> u64 {
        match self.contest.direction {
            Direction::Upload => self.server.received(),
            Direction::Download => self.downloaded.load(Ordering::Relaxed),
        }
    }
}

/// A place for pepsal, with the names of its interfaces.
struct Gateway<'a> {
    namespace: &'a Namespace,
    terrestrial: &'static str,
    satellite: &'static str,
}
