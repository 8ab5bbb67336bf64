//! Client, link, server and proxies of one job.

use std::{
    net::SocketAddr,
    path::{Path as FilePath, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use pepsal_tests::{
    Connector, Course, Daemon, Family, Link, LinkCounters, LinkDelays, LinkProfile, Namespace, Server,
    Topology,
};

use super::{
    path::{Loss, Path},
    peer::{LinkSeen, RunningPeer},
    place::{End, Place, Proxy},
};
use crate::bench::statistic;

/// What all sites have in common.
pub struct Equipment {
    /// The daemon's binary.
    pub daemon: PathBuf,
    /// Another build of it, which is a proxy of its own.
    pub old_build: Option<PathBuf>,
    /// Further arguments of the daemon.
    pub arguments: Vec<String>,
}

/// What a site is made of, but for the proxies.
pub struct Ground {
    /// The link between the gateways.
    pub link: LinkProfile,
    /// What a proxy may be told of it: at the client's end, and at the server's.
    pub seen: [LinkSeen; 2],
    /// Whether pepsal is told.
    pub is_told: bool,
    /// Clients with an address of their own besides the first one.
    pub extra_clients: u8,
    /// Whether there is a second server, whose connections pepsal leaves alone and which sends with CUBIC.
    pub has_bypass: bool,
}

impl Ground {
    /// That of a path.
    pub fn of(path: Path, loss: Loss, seed: u64) -> Self {
        Self {
            link: path.profile(loss, seed),
            seen: [End::Client, End::Server].map(|end| path.link_at(end)),
            is_told: path.is_told(),
            extra_clients: 0,
            has_bypass: false,
        }
    }

    fn seen_at(&self, end: End) -> &LinkSeen {
        match end {
            End::Client => &self.seen[0],
            End::Server => &self.seen[1],
        }
    }
}

/// Ready to be measured; dropping it takes everything down.
///
/// To be dropped by the thread that made it: the proxies end with that thread.
pub struct Site {
    // Fields drop in order: proxies end before their namespaces.
    proxies: Vec<Running>,
    server: Server,
    bypass: Option<Server>,
    topology: Arc<Topology>,
    congestion: &'static str,
}

enum Running {
    Pepsal(Option<Daemon>),
    Peer(#[expect(dead_code, reason = "held until it is dropped")] RunningPeer),
}

impl Site {
    /// Builds the ground with the proxies of a place.
    pub fn new(ground: &Ground, place: Place, equipment: &Equipment) -> Result<Self> {
        let topology = Topology::builder()
            // Of our own emulator, which knows how long packets wait.
            .link(Link::Tun(ground.link))
            .router()
            .extra_clients(ground.extra_clients)
            .build()?;
        let serve = |congestion| {
            let server = Server::with_congestion(&topology.server, congestion)?;
            // Bulk flows end when they have been measured, and failures are samples.
            server.hush();
            anyhow::Ok(server)
        };
        let server = serve(place.congestion())?;
        let bypass = ground.has_bypass.then(|| serve("cubic")).transpose()?;
        let mut site = Self {
            proxies: Vec::new(),
            server,
            bypass,
            topology: Arc::new(topology),
            congestion: place.congestion(),
        };
        if let Place::Proxy(proxy, _) = place {
            let is_pair = place.ends().len() > 1;
            for end in place.ends() {
                let running = site.start(proxy, *end, is_pair, ground, equipment)?;
                site.proxies.push(running);
            }
        }
        Ok(site)
    }

    fn start(
        &self,
        proxy: Proxy,
        end: End,
        is_pair: bool,
        ground: &Ground,
        equipment: &Equipment,
    ) -> Result<Running> {
        let (gateway, lan, satellite) = match end {
            End::Client => (&self.topology.gateway, "lan0", "sat0"),
            End::Server => {
                let router = self.topology.router.as_ref();
                (router.expect("sites have a router"), "wan0", "sat1")
            }
        };
        let link = ground.seen_at(end);
        let daemon = match proxy {
            Proxy::OldBuild => equipment.old_build.as_deref().context("an old build was given")?,
            Proxy::Pepsal => &equipment.daemon,
            Proxy::Peer(peer) => {
                return RunningPeer::start(gateway, &peer.command(lan, satellite, link)).map(Running::Peer);
            }
        };
        let mut told = format!("{satellite},rate={}", link.rate);
        for (key, value) in [("rtt", &link.rtt), ("up", &link.up)] {
            if !value.is_empty() {
                told += &format!(",{key}={value}");
            }
        }
        if is_pair {
            told.push_str(",peer=pepsal");
        }
        let mut arguments = vec!["-i", lan, "-i", satellite, "--drain-timeout", "1s"];
        if ground.is_told {
            arguments.extend(["--link", &told]);
        }
        let bypass = self
            .bypass
            .as_ref()
            .map(|server| format!("port={}", server.port()));
        if let Some(rule) = &bypass {
            arguments.extend(["--bypass", rule]);
        }
        arguments.extend(equipment.arguments.iter().map(String::as_str));
        let daemon = Daemon::start_quiet(daemon, gateway, &arguments)?;
        Ok(Running::Pepsal(Some(daemon)))
    }

    /// How the client connects; nothing that it does may stand still for longer than `patience`.
    pub fn connector(&self, patience: Duration) -> Connector {
        Connector {
            congestion: Some(self.congestion.to_owned()),
            timeout: patience,
            ..Connector::default()
        }
    }

    /// Where the client is.
    pub fn client(&self) -> &Namespace {
        &self.topology.client
    }

    /// What it all runs in, for threads of their own.
    pub fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.topology)
    }

    /// Where it connects to.
    pub fn server(&self) -> SocketAddr {
        self.server.address(Family::V4)
    }

    /// Where it connects to past pepsal.
    pub fn bypass(&self) -> Option<SocketAddr> {
        self.bypass.as_ref().map(|server| server.address(Family::V4))
    }

    /// The admin socket of the only pepsal; none where there is another number of them.
    pub fn admin_socket(&self) -> Option<&FilePath> {
        match &self.proxies[..] {
            [Running::Pepsal(Some(daemon))] => Some(daemon.admin_socket()),
            _ => None,
        }
    }

    /// Begins a course of the link and returns this time.
    pub fn begin(&self, course: Course) -> Instant {
        self.topology.begin(course).expect(EMULATED)
    }

    /// What has become of the packets on the link so far.
    pub fn counters(&self) -> LinkCounters {
        self.topology.link_counters().expect(EMULATED)
    }

    /// How late the emulator itself has delivered since `earlier`, in milliseconds: 99th percentile of the worse direction.
    pub fn late_ms(&self, earlier: &LinkDelays) -> f64 {
        let delays = self.delays().since(earlier);
        [delays.up, delays.down]
            .iter()
            .filter_map(|direction| direction.lateness.quantile(0.99))
            .map(statistic::milliseconds)
            .fold(0.0, f64::max)
    }

    /// Payload bytes that the server has received.
    pub fn received(&self) -> u64 {
        self.server.received()
    }

    /// How long packets have taken on the link so far, where they should not have taken any time.
    pub fn delays(&self) -> LinkDelays {
        self.topology.link_delays().expect(EMULATED)
    }
}

const EMULATED: &str = "sites have an emulated link";

impl Drop for Running {
    fn drop(&mut self) {
        if let Self::Pepsal(daemon) = self
            && let Some(daemon) = daemon.take()
        {
            // So that it takes its control group with it. It is killed when it does not.
            let _ = daemon.terminate();
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.server.stop();
        if let Some(server) = &self.bypass {
            server.stop();
        }
    }
}
