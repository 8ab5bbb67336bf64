//! One flow, from its accepted connection to its end.

pub mod close_reason;
pub mod side;
pub mod progress;
pub(crate) mod settings;
pub(crate) mod listener;
pub(crate) mod leg_config;
pub mod leg;
pub(crate) mod connect;
pub(crate) mod replicate;
pub mod relay;
pub mod conduit;
pub(crate) mod table;
pub(crate) mod metrics;
pub(crate) mod fault_injection;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd},
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use pepsal_ebpf::SynRecord;
use socket2::Socket;
use tokio::time::{sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    flow::{
        close_reason::CloseReason,
        conduit::ConduitPool,
        connect::Attempt,
        leg::Leg,
        leg_config::LegConfig,
        metrics::{Event, Metrics},
        relay::{Limits, relay},
        settings::Settings,
        side::Side,
        table::{Flow, FlowTable, Observation},
    },
    host::{clock::monotonic_ns, namespace::Namespace},
    link::{
        learned::{self, Paths},
        registry::{Link, Links},
    },
    tcp::connection::Connection,
    wire::interfaces::Interfaces,
};

/// State that all flows share.
pub(crate) struct Shared {
    pub settings: ArcSwap<Settings>,
    pub links: Arc<Links>,
    /// Namespace of the host, for server legs of `--source gateway`.
    pub host: Namespace,
    pub interfaces: ArcSwap<Interfaces>,
    /// Learned parameters of paths without a profile.
    pub paths: Arc<Paths>,
    pub table: Arc<FlowTable>,
    pub metrics: Metrics,
    pub conduits: ConduitPool,
    /// Cancelled when open flows have to end.
    pub stop: CancellationToken,
}

/// Serves an accepted connection until its end. Every error resets the client: dropping a [`Leg`] sends a
/// reset.
///
/// The future stays on the worker that polls it first, whose runtime the connection is registered with.
pub(crate) async fn serve(accepted: Socket, client: SocketAddr, server: SocketAddr, shared: Arc<Shared>) {
    let stop = shared.stop.child_token();
    let Some((place, mut record)) = shared.table.enter(client, server, stop, &shared.metrics) else {
        return;
    };
    if record.ingress_ifindex == 0 {
        // The mark of the SYN has the same index.
        record.head.ingress_ifindex = accepted.mark().unwrap_or_default();
    }
    shared.metrics.count(Event::Accepted);
    let settings = shared.settings.load_full();
    let flow = &place.flow;
    // The state of the connect phase is on the heap and freed after it: a flow is open for most of its life,
    // and there are many flows.
    let connected = Box::pin(connect(accepted, flow, record, &settings, &shared));
    let serving = async {
        let [client, server] = match connected.await {
            Ok(ends) => ends,
            Err(reason) => return reason,
        };
        let limits = Limits {
            idle: settings.idle_timeout,
            stop: &flow.stop,
            conduits: &shared.conduits,
        };
        let reason = relay(&client.leg, &server.leg, &flow.progress, &limits).await;
        flow.observe(&shared.metrics);
        client.learn(&flow.progress.down, &shared.paths);
        server.learn(&flow.progress.up, &shared.paths);
        reason
    };
    // Unwinding has dropped, and so reset, the legs; other flows are not affected.
    let reason = AssertUnwindSafe(serving).catch_unwind().await;
    let reason = match reason.unwrap_or(CloseReason::Panicked) {
        CloseReason::Shutdown if flow.is_closed() => CloseReason::Administrative,
        reason => reason,
    };
    // Counts the bytes of a SYN, for a flow that was never relayed.
    let Observation { up, down, .. } = flow.observe(&shared.metrics);
    let open = flow.progress.started().elapsed();
    shared.metrics.close(reason, open);
    let (client, server) = (flow.client, flow.server);
    debug!(%client, %server, up, down, seconds = open.as_secs_f64(), "{reason}");
}

/// A leg with its interface and link.
struct End {
    leg: Leg,
    peer: IpAddr,
    ifindex: u32,
    link: Option<Arc<Link>>,
}

impl End {
    /// Registers a leg for observation, before it sends data, and sets its start values: its share of the
    /// link, or the learned parameters of its path.
    fn start(
        mut leg: Leg,
        link: Option<Arc<Link>>,
        flow: &Flow,
        record: &SynRecord,
        legs: &LegConfig,
        shared: &Shared,
    ) -> Self {
        let (peer, ifindex) = match leg.side() {
            Side::Client => (flow.client.ip(), record.ingress_ifindex),
            Side::Server => (flow.server.ip(), record.egress_ifindex),
        };
        let traffic = shared.metrics.traffic(ifindex, &shared.interfaces.load());
        flow.watch(leg.side(), leg.stream(), traffic);
        match &link {
            Some(link) => {
                let congestion = legs.congestion_of(leg.side(), Some(link));
                let derived = &link.profile.congestion.value;
                leg.join(
                    link,
                    flow.client.ip(),
                    record.traffic_class,
                    congestion.unwrap_or(derived),
                );
            }
            None => {
                let handshake = match leg.side() {
                    Side::Client => Duration::from_nanos(monotonic_ns().saturating_sub(record.time_ns)),
                    Side::Server => flow.progress.started().elapsed(),
                };
                legs.settle_congestion(leg.side(), leg.stream(), handshake);
                shared.paths.resume(ifindex, peer, leg.stream());
            }
        }
        Self {
            leg,
            peer,
            ifindex,
            link,
        }
    }

    /// Stores the path parameters of a leg without a profile.
    fn learn(&self, sent: &AtomicU64, paths: &Paths) {
        if self.link.is_none() && sent.load(Ordering::Relaxed) >= learned::ENOUGH {
            paths.learn(self.ifindex, self.peer, self.leg.stream());
        }
    }
}

/// Connects the server leg of an accepted connection, and prepares both legs for the relay.
async fn connect(
    accepted: Socket,
    flow: &Flow,
    record: SynRecord,
    settings: &Settings,
    shared: &Shared,
) -> Result<[End; 2], CloseReason> {
    let legs = &settings.legs;
    let (client, server, progress) = (flow.client, flow.server, &flow.progress);
    let stream = Connection::register(accepted).map_err(|error| {
        warn!(%client, %server, "cannot register a connection with epoll: {error}");
        CloseReason::LocalFailure
    })?;
    let leg = Leg::new(stream, Side::Client);
    legs.tune_client(leg.stream(), client, &record);
    let link = shared.links.of(record.ingress_ifindex);
    let client_end = End::start(leg, link, flow, &record, legs, shared);
    let client_leg = &client_end.leg;
    let link = shared.links.of(record.egress_ifindex);
    if let Some(patience) = legs.early_data_patience(link.as_deref()) {
        // After the timeout the SYN leaves without data.
        let _ = timeout(patience, client_leg.stream().readable()).await;
    }
    let has_data = has_data(client_leg.stream()).map_err(|_| CloseReason::ClientReset)?;
    let early_data = has_data && legs.carries_early_data();
    let connect = async {
        let attempt = Attempt {
            client,
            server,
            record: &record,
            link: link.as_deref(),
            path_mss: path_mss(&record, server.is_ipv6(), &shared.interfaces.load()),
            has_data,
        };
        let stream = legs.connect(&attempt, &shared.host, &shared.metrics).await?;
        if early_data {
            progress.add(Side::Server, connect::open(&stream, client_leg.stream()).await?);
        }
        Ok(stream)
    };
    let patience = link.as_ref().map_or(settings.connect_timeout, |link| {
        link.profile.connect_timeout.value
    });
    let connected = tokio::select! {
        connected = timeout(patience, connect) => connected.map_err(|_| CloseReason::ConnectTimeout)?,
        reason = client_leg.abandoned() => return Err(reason),
        () = sleep_until(settings.collector.due(progress.started())) => return Err(CloseReason::PendingTimeout),
        () = flow.stop.cancelled() => return Err(CloseReason::Shutdown),
    };
    let stream = connected.map_err(|error| {
        debug!(%client, %server, "cannot connect: {error}");
        CloseReason::of_connect(&error)
    })?;
    let leg = Leg::new(stream, Side::Server);
    let server_end = End::start(leg, link, flow, &record, legs, shared);
    flow.set_open();
    fault_injection::at("flow", server);
    shared
        .metrics
        .connect
        .observe(progress.started().elapsed().as_secs_f64());
    Ok([client_end, server_end])
}

/// Returns the maximum segment size of the interface towards the server, in bytes, if its MTU is below that
/// of the interface towards the client, which the server leg uses otherwise.
fn path_mss(record: &SynRecord, ipv6: bool, interfaces: &Interfaces) -> Option<u16> {
    let mtu = |ifindex| interfaces.get(&ifindex).map(|interface| interface.mtu);
    let [ingress, egress] = [record.ingress_ifindex, record.egress_ifindex].map(mtu);
    let headers = if ipv6 { 60 } else { 40 };
    let mtu = egress.filter(|egress| ingress.is_some_and(|ingress| *egress < ingress))?;
    u16::try_from(mtu.saturating_sub(headers)).ok()
}

/// Returns whether the client has sent data, in its SYN or after the handshake. The kernel reports a reset
/// here once, as an error.
fn has_data(stream: &Connection) -> io::Result<bool> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(stream.as_fd().as_raw_fd(), &mut [0], flags) {
        Ok(bytes) => Ok(bytes > 0),
        Err(Errno::EAGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
