//! Client, link, server and proxies of one job.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use pepsal_tests::{Connector, Daemon, Family, Link, LinkDelays, Namespace, Server, Topology};

use super::{
    path::{Loss, Path},
    peer::RunningPeer,
    place::{End, Place, Proxy},
};

/// What all lanes have in common.
pub struct Equipment {
    /// The daemon's binary.
    pub daemon: PathBuf,
    /// Another build of it, which is a proxy of its own.
    pub old_build: Option<PathBuf>,
    /// Further arguments of the daemon.
    pub arguments: Vec<String>,
}

/// Ready to be measured; dropping it takes everything down.
///
/// To be dropped by the thread that made it: the proxies end with that thread.
pub struct Lane {
    // Fields drop in order: proxies end before their namespaces.
    proxies: Vec<Running>,
    server: Server,
    topology: Arc<Topology>,
    congestion: &'static str,
}

enum Running {
    Pepsal(Option<Daemon>),
    Peer(#[expect(dead_code, reason = "held until it is dropped")] RunningPeer),
}

impl Lane {
    /// Builds the path with the proxies of a place.
    pub fn new(path: Path, loss: Loss, place: Place, seed: u64, equipment: &Equipment) -> Result<Self> {
        let topology = Topology::builder()
            // Of our own emulator, which knows how long packets wait.
            .link(Link::Tun(path.profile(loss, seed)))
            .router()
            .build()?;
        let server = Server::with_congestion(&topology.server, place.congestion())?;
        // Bulk flows end when they have been measured, and failures are samples.
        server.hush();
        let mut lane = Self {
            proxies: Vec::new(),
            server,
            topology: Arc::new(topology),
            congestion: place.congestion(),
        };
        if let Place::Proxy(proxy, _) = place {
            let is_pair = place.ends().len() > 1;
            for end in place.ends() {
                let running = lane.start(proxy, *end, is_pair, path, equipment)?;
                lane.proxies.push(running);
            }
        }
        Ok(lane)
    }

    fn start(
        &self,
        proxy: Proxy,
        end: End,
        is_pair: bool,
        path: Path,
        equipment: &Equipment,
    ) -> Result<Running> {
        let (gateway, lan, satellite) = match end {
            End::Client => (&self.topology.gateway, "lan0", "sat0"),
            End::Server => {
                let router = self.topology.router.as_ref();
                (router.expect("lanes have a router"), "wan0", "sat1")
            }
        };
        let link = path.link_at(end);
        let daemon = match proxy {
            Proxy::OldBuild => equipment.old_build.as_deref().context("an old build was given")?,
            Proxy::Pepsal => &equipment.daemon,
            Proxy::Peer(peer) => {
                return RunningPeer::start(gateway, &peer.command(lan, satellite, &link)).map(Running::Peer);
            }
        };
        let mut told = format!("{satellite},rate={},rtt={},up={}", link.rate, link.rtt, link.up);
        if is_pair {
            told.push_str(",peer=pepsal");
        }
        let mut arguments = vec!["-i", lan, "-i", satellite, "--drain-timeout", "1s"];
        if path.is_told() {
            arguments.extend(["--link", &told]);
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

    /// Payload bytes that the server has received.
    pub fn received(&self) -> u64 {
        self.server.received()
    }

    /// How long packets have taken on the link so far, where they should not have taken any time.
    pub fn delays(&self) -> LinkDelays {
        self.topology.link_delays().expect("lanes have an emulated link")
    }
}

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

impl Drop for Lane {
    fn drop(&mut self) {
        self.server.stop();
    }
}
