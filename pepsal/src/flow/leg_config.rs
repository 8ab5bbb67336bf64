//! How legs are made: the operator's options, and the socket options that follow.

use std::{net::SocketAddr, os::fd::BorrowedFd, time::Duration};

use pepsal_ebpf::SynRecord;

use crate::{
    flow::{
        replicate::{Replicate, Replication, Source},
        side::Side,
    },
    link::{profile::Origin, registry::Link},
    tcp::{
        congestion::{self, Congestion},
        connection::Connection,
        options::{self, tried},
    },
};

/// When an idle peer is first asked whether it is still there; how often then, and how often in vain, is the host's to say.
const KEEPALIVE: Duration = Duration::from_secs(600);

/// The operator's options for legs.
#[derive(Debug, Clone)]
pub struct LegOptions {
    /// Whose address server legs have.
    pub source: Source,
    /// What of the client's SYN is carried over.
    pub replicate: Vec<Replicate>,
    /// TCP fast open, on listeners and server legs.
    pub fastopen: bool,
    /// TCP_QUICKACK.
    pub quickack: bool,
    /// TCP_CORK.
    pub cork: bool,
    /// Maximum segment size in bytes.
    pub mss: Option<u16>,
    /// Congestion control of both legs.
    pub congestion: Option<Congestion>,
    /// Congestion control of client legs.
    pub client_congestion: Option<Congestion>,
    /// Congestion control of server legs.
    pub server_congestion: Option<Congestion>,
}

/// How legs are made.
#[derive(Debug, Clone)]
pub struct LegConfig {
    pub(super) options: LegOptions,
    pub(super) replication: Replication,
    /// The host's congestion control, where the legs' namespaces have another.
    host_congestion: Option<Congestion>,
    short_path: Option<ShortPath>,
}

/// What legs do where the kernel's own congestion control is BBR, and nobody asked for any.
///
/// It paces: a timer and an interrupt for every 64 KiB, which cost a fast flow a third of its rate, and which a socket
/// that has once had BBR keeps. On a short path there is nothing to gain from that. So legs begin without, and those
/// whose handshake took longer change to BBR before their first data.
#[derive(Debug, Clone)]
struct ShortPath {
    congestion: Congestion,
    elsewhere: Congestion,
}

impl ShortPath {
    fn new() -> Option<Self> {
        let elsewhere = congestion::default().ok()?;
        elsewhere.is_bbr().then(|| Self {
            congestion: congestion::first_usable(["cubic", "reno"]),
            elsewhere,
        })
    }
}

/// Round trips below which a path is short: a local or a regional network, and no satellite.
const SHORT_PATH: Duration = Duration::from_millis(25);

impl LegConfig {
    /// What the operator asks for. `inside` is the congestion control that sockets of the legs' namespaces get when
    /// nobody chooses one.
    pub fn new(options: LegOptions, inside: &Congestion) -> Self {
        let of_host = congestion::default().ok();
        Self {
            replication: Replication::new(&options.replicate, options.source),
            options,
            host_congestion: of_host.filter(|of_host| of_host != inside),
            short_path: ShortPath::new(),
        }
    }

    /// The congestion controls that are asked for.
    pub fn congestion(&self) -> impl Iterator<Item = &Congestion> {
        let options = &self.options;
        [
            &options.congestion,
            &options.client_congestion,
            &options.server_congestion,
        ]
        .into_iter()
        .flatten()
    }

    /// The congestion control of a leg: what was given for its link, for its side, for all, and last what its link's
    /// profile found best. `None` is for the kernel to choose.
    pub fn congestion_of<'a>(&'a self, side: Side, link: Option<&'a Link>) -> Option<&'a Congestion> {
        let of_link = link.map(|link| &link.profile.congestion);
        let given = of_link
            .filter(|congestion| congestion.origin == Origin::Given)
            .map(|given| &given.value);
        let of_side = match side {
            Side::Client => &self.options.client_congestion,
            Side::Server => &self.options.server_congestion,
        };
        let derived = of_link.map(|derived| &derived.value);
        given
            .or(of_side.as_ref())
            .or(self.options.congestion.as_ref())
            .or(derived)
    }

    /// What a leg's socket is given before its handshake.
    pub fn initial_congestion_of<'a>(&'a self, side: Side, link: Option<&'a Link>) -> Option<&'a Congestion> {
        let short = || self.short_path.as_ref().map(|path| &path.congestion);
        let of_host = self.host_congestion.as_ref();
        self.congestion_of(side, link).or_else(short).or(of_host)
    }

    /// Once a leg without a profile is connected: leaves the congestion control to the kernel unless the path is short.
    /// `handshake` is what a round trip took at most.
    pub fn settle_congestion(&self, side: Side, stream: &Connection, handshake: Duration) {
        let Some(path) = &self.short_path else { return };
        if self.congestion_of(side, None).is_some() {
            return;
        }
        // With fast open there is a connection before there has been a round trip.
        if handshake < SHORT_PATH && !self.options.fastopen {
            return;
        }
        // No measurement, after a SYN cookie, is zero.
        let short = |rtt_us: u32| (1..SHORT_PATH.as_micros()).contains(&rtt_us.into());
        if !options::tcp_info(stream).is_ok_and(|info| short(info.tcpi_rtt)) {
            tried(
                "congestion control",
                options::set_congestion(stream, path.elsewhere.name()),
            );
        }
    }

    /// How long to wait for the client's first data, so that fast open can carry it: a fiftieth of the round trip that it
    /// may save. A client that waits for the server is not kept waiting longer than that.
    pub fn early_data_patience(&self, link: Option<&Link>) -> Option<Duration> {
        let rtt = link.filter(|_| self.options.fastopen)?.profile.rtt;
        Some((rtt / 50).min(Duration::from_millis(20)))
    }

    /// Gives the accepted connection the options that it has not inherited from its listener. One that the kernel
    /// refuses is left out: the flow can do without.
    pub fn tune_client(&self, stream: &Connection, client: SocketAddr, record: &SynRecord) {
        if self.replication.dscp && record.traffic_class != 0 {
            let ipv6 = client.is_ipv6();
            tried(
                "traffic class",
                options::set_traffic_class(stream, ipv6, record.traffic_class),
            );
        }
        if self.options.quickack {
            tried("quick ack", options::set_quickack(stream, true));
        }
    }

    /// Whether a server leg's SYN can carry what the client has sent already.
    pub fn carries_early_data(&self) -> bool {
        self.options.fastopen
    }

    /// Gives a server leg that is not connected yet, or a listener for its accepted legs, the options that both inherit.
    pub fn tune(&self, socket: BorrowedFd<'_>, link: Option<&Link>) {
        let sock = socket2::SockRef::from(&socket);
        // Until a direction has ended cleanly, whatever closes the leg resets it.
        tried("reset on close", options::reset_on_close(socket, true));
        if self.options.cork {
            tried("cork", options::set_cork(socket, true));
        } else {
            tried("no delay", sock.set_tcp_nodelay(true));
        }
        if let Some(mss) = self.mss_of(link) {
            tried("maximum segment size", options::set_mss(socket, mss));
        }
        let mut idle = KEEPALIVE;
        if let Some(Link { profile, .. }) = link {
            tried(
                "send buffer",
                options::set_send_buffer(socket, profile.send_buffer.value),
            );
            tried("unsent bytes", options::set_unsent(socket, profile.unsent.value));
            tried(
                "shortest retransmission timeout",
                options::set_rto_min(socket, profile.rto_min.value),
            );
            tried(
                "longest retransmission timeout",
                options::set_rto_max(socket, profile.rto_max.value),
            );
            idle = profile.keepalive.value;
        }
        tried("keepalive", options::set_keepalive(socket, idle));
        // Else a leg is not readable for an urgent byte alone, and reading leaves it out.
        tried("urgent data inline", sock.set_out_of_band_inline(true));
    }

    /// The largest segment that a leg may announce and send, where one is given.
    pub fn mss_of(&self, link: Option<&Link>) -> Option<u16> {
        link.and_then(|link| link.profile.mss.value).or(self.options.mss)
    }
}
