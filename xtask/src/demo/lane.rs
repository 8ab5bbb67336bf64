//! Namespaces and a link for one transfer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use pepsal_tests::{
    Connector, Direction, Family, Link, LinkProfile, Namespace, Outcome, Server, Topology, Transfer,
};

use super::contest::{Contest, Placement};

/// Congestion control of the endpoints: the default of Linux.
pub const STOCK_CONGESTION: &str = "cubic";
/// Assured forwarding, class 2, low drop precedence (RFC 2597): DSCP 18, as a traffic class.
pub const AF21: u8 = 18 << 2;

/// Timeout of a transfer without progress: the last bytes of a large file are in transit for long on a slow
/// link.
const PATIENCE: Duration = Duration::from_secs(3600);

/// A contest's own client, gateway, link and server.
pub struct Lane {
    pub contest: Contest,
    pub server: Server,
    topology: Topology,
    downloaded: Arc<AtomicU64>,
}

impl Lane {
    pub fn new(contest: Contest, profile: &LinkProfile) -> Result<Self> {
        // The same losses with pepsal and without, different ones for each address family.
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

    pub fn gateways(&self) -> impl Iterator<Item = Gateway<'_>> {
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

    pub fn transfer(&self, bytes: u64) -> Result<Outcome> {
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

/// A gateway for pepsal, with the names of its interfaces.
pub struct Gateway<'a> {
    pub namespace: &'a Namespace,
    pub terrestrial: &'static str,
    pub satellite: &'static str,
}
