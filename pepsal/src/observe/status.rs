//! Builds the protocol's status objects.

use std::{
    collections::BTreeMap,
    io, process,
    time::{Duration, SystemTime},
};

use nix::{libc::tcp_info, net::if_::if_nametoindex};
use socket2::SockAddr;
use tokio::time::Instant;

use crate::{
    flow::{
        metrics::Metrics,
        table::{Flow, LegObservation, State},
    },
    observe::{
        exposition::Figures,
        protocol::{
            FlowCounts, FlowState, FlowStatus, Interface, LegName, LegStatus, Legs, Limit, LimitedBy,
            LinkStatus, Status, Ways,
        },
        view::View,
    },
    tcp::options,
    wire::attachment::Attached,
};

impl Status {
    /// Returns the status of the daemon; `attached` lists its attachments.
    pub(super) fn of(view: &View, is_ready: bool, attached: &[Attached], figures: &Figures) -> Self {
        let shared = &view.shared;
        let mut problems = Vec::new();
        if !is_ready {
            problems
                .push("the daemon is starting or stopping: new connections are not intercepted".to_owned());
        }
        let interfaces: Vec<Interface> = attached
            .iter()
            .map(|on| Interface {
                name: on.interface.clone(),
                intercepts: on.intercepts,
                attached_by: if on.is_tcx { "tcx" } else { "clsact" }.to_owned(),
            })
            .collect();
        for name in &view.intercepted {
            if !interfaces.iter().any(|on| on.intercepts && on.name == *name) {
                problems.push(format!(
                    "interface {name} is missing: its connections are not intercepted"
                ));
            }
        }
        for device in &view.devices {
            if if_nametoindex(device.as_str()).is_err() {
                problems.push(format!(
                    "device {device} is missing: new connections are not intercepted"
                ));
            }
        }
        let [up, down] = figures.bytes;
        let link = |link: &std::sync::Arc<crate::link::registry::Link>| {
            let found = link.budget.found();
            LinkStatus {
                interface: link.profile.interface.clone(),
                rtt_seconds: link.profile.rtt.as_secs_f64(),
                rate_bytes_per_second: found.rate,
                ceiling_bytes_per_second: found.ceiling,
                queueing_delay_seconds: found.queueing.as_secs_f64(),
                state: found.state.name().to_owned(),
                throughput_bytes_per_second: found.used,
                congestion: link.profile.congestion.value.to_string(),
            }
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            uptime_seconds: SystemTime::now()
                .duration_since(view.started)
                .unwrap_or_default()
                .as_secs_f64(),
            ready: is_ready,
            problems,
            port: view.port,
            mark: view.mark.to_string(),
            devices: view.devices.clone(),
            interfaces,
            links: shared.links.current().iter().map(link).collect(),
            flows: FlowCounts {
                open: figures.open,
                pending: figures.pending,
                limit: view.limit,
                limit_per_client: view.limit_per_client,
            },
            bytes: Ways { up, down },
            closed: figures.closed.iter().cloned().collect(),
            events: counts(&figures.events),
            packets: counts(&figures.packets),
        }
    }
}

fn counts(counts: &[(&str, u64)]) -> BTreeMap<String, u64> {
    counts.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect()
}

impl FlowStatus {
    /// Returns the figures of a flow. Rates are over its lifetime.
    pub fn of(flow: &Flow, metrics: &Metrics) -> Self {
        let now = Instant::now();
        let seen = flow.observe(metrics);
        let [client, server] = &seen.legs;
        let age = now - flow.progress.started();
        let bytes = Ways {
            up: seen.up,
            down: seen.down,
        };
        Self {
            id: flow.id,
            client: flow.client,
            server: flow.server,
            state: match flow.state() {
                State::Pending => FlowState::Pending,
                State::Open => FlowState::Open,
            },
            age_seconds: age.as_secs_f64(),
            idle_seconds: (now - flow.progress.last()).as_secs_f64(),
            bytes,
            bytes_per_second: bytes.over(Ways::default(), age),
            limited: Ways {
                up: limit(
                    (LegName::Client, client.as_ref()),
                    (LegName::Server, server.as_ref()),
                ),
                down: limit(
                    (LegName::Server, server.as_ref()),
                    (LegName::Client, client.as_ref()),
                ),
            },
            legs: Legs {
                client: client.as_ref().map(LegStatus::of),
                server: server.as_ref().map(LegStatus::of),
            },
        }
    }
}

impl Ways<u64> {
    /// Returns the rates of the increase since `before` over `time`.
    pub fn over(self, before: Self, time: Duration) -> Ways<f64> {
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / time.as_secs_f64().max(1e-3);
        Ways {
            up: rate(self.up, before.up),
            down: rate(self.down, before.down),
        }
    }
}

impl LegStatus {
    fn of(leg: &LegObservation) -> Self {
        let info = &leg.info;
        let measured = |us: u32| (us > 0 && us != u32::MAX).then(|| f64::from(us) / 1e6);
        let seconds = |us: u64| us as f64 / 1e6;
        let address = |address: io::Result<SockAddr>| address.ok()?.as_socket();
        let socket = leg.stream.socket();
        Self {
            local: address(socket.local_addr()),
            peer: address(socket.peer_addr()),
            interface: leg.traffic.as_ref().map(|traffic| traffic.interface.clone()),
            state: state_name(info.tcpi_state).to_owned(),
            congestion: options::congestion(&*leg.stream).ok(),
            rtt_seconds: measured(info.tcpi_rtt),
            rtt_min_seconds: measured(info.tcpi_min_rtt),
            mss_bytes: info.tcpi_snd_mss,
            cwnd_segments: info.tcpi_snd_cwnd,
            unacknowledged_segments: info.tcpi_unacked,
            unsent_bytes: info.tcpi_notsent_bytes,
            sent_segments: info.tcpi_data_segs_out,
            retransmitted_segments: info.tcpi_total_retrans,
            delivery_rate_bytes_per_second: info.tcpi_delivery_rate,
            pacing_limit_bytes_per_second: Some(info.tcpi_max_pacing_rate).filter(|rate| *rate != u64::MAX),
            send_window_bytes: info.tcpi_snd_wnd,
            busy_seconds: seconds(info.tcpi_busy_time),
            receiver_limited_seconds: seconds(info.tcpi_rwnd_limited),
            send_buffer_limited_seconds: seconds(info.tcpi_sndbuf_limited),
        }
    }
}

/// Returns the limit of a direction: the leg that sends it if data wait there, else the leg that receives it.
/// For a sending leg the kernel has the cause, as times since the connection began.
fn limit(
    (from, _): (LegName, Option<&LegObservation>),
    (to, leaving): (LegName, Option<&LegObservation>),
) -> Option<Limit> {
    let info = &leaving?.info;
    match (info.tcpi_notsent_bytes > 0, info.tcpi_unacked > 0) {
        (true, _) => Some(Limit {
            leg: to,
            by: limited_by(info),
        }),
        (false, true) => Some(Limit {
            leg: from,
            by: LimitedBy::Sender,
        }),
        (false, false) => None,
    }
}

fn limited_by(info: &tcp_info) -> LimitedBy {
    let most = |us: u64| us > info.tcpi_busy_time / 2;
    let window_is_full =
        info.tcpi_unacked.saturating_mul(info.tcpi_snd_mss) + info.tcpi_snd_mss > info.tcpi_snd_wnd;
    match info {
        _ if window_is_full || most(info.tcpi_rwnd_limited) => LimitedBy::Receiver,
        _ if most(info.tcpi_sndbuf_limited) => LimitedBy::SendBuffer,
        // Without a share, `tcpi_max_pacing_rate` is the maximum value.
        _ if info.tcpi_delivery_rate >= info.tcpi_max_pacing_rate / 5 * 4 => LimitedBy::Share,
        _ => LimitedBy::Path,
    }
}

/// Returns the name of a state of the kernel's `net/tcp_states.h`, as `ss` shows it.
fn state_name(state: u8) -> &'static str {
    const NAMES: [&str; 13] = [
        "unknown",
        "established",
        "syn-sent",
        "syn-recv",
        "fin-wait-1",
        "fin-wait-2",
        "time-wait",
        "closed",
        "close-wait",
        "last-ack",
        "listening",
        "closing",
        "new-syn-recv",
    ];
    NAMES.get(usize::from(state)).copied().unwrap_or("unknown")
}
