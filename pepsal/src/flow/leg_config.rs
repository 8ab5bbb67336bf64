//! Settings of legs: the operator's options, and the socket options derived from them.

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

/// Idle time before the first keepalive probe; interval and number of probes are the host's.
const KEEPALIVE: Duration = Duration::from_secs(600);

#[derive(Debug, Clone)]
pub struct LegOptions {
    pub source: Source,
    /// Header fields of the client's SYN that are copied to the server leg.
    pub replicate: Vec<Replicate>,
    /// TCP fast open, on listeners and server legs.
    pub fastopen: bool,
    pub quickack: bool,
    pub cork: bool,
    /// In bytes.
    pub mss: Option<u16>,
    pub congestion: Option<Congestion>,
    pub client_congestion: Option<Congestion>,
    pub server_congestion: Option<Congestion>,
}

#[derive(Debug, Clone)]
pub struct LegConfig {
    pub(super) options: LegOptions,
    pub(super) replication: Replication,
    /// The host's congestion control, if that of the legs' namespaces differs.
    host_congestion: Option<Congestion>,
    short_path: Option<ShortPath>,
}

/// Congestion control of short paths, if the kernel's default is BBR and no option sets one.
///
/// BBR paces: a timer and an interrupt for every 64 KiB cost a fast flow a third of its rate, and a socket
/// that has had BBR once keeps pacing. A short path gains nothing from it. So legs start without BBR, and
/// legs with a longer handshake change to BBR before their first data.
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

/// Round-trip time below which a path is short: a local or regional network, and no satellite.
const SHORT_PATH: Duration = Duration::from_millis(25);

impl LegConfig {
    /// Creates the settings. `inside` is the default congestion control of the legs' namespaces.
    pub fn new(options: LegOptions, inside: &Congestion) -> Self {
        let of_host = congestion::default().ok();
        Self {
            replication: Replication::new(&options.replicate, options.source),
            options,
            host_congestion: of_host.filter(|of_host| of_host != inside),
            short_path: ShortPath::new(),
        }
    }

    /// Returns the congestion controls of the options.
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

    /// Returns the congestion control of a leg: that of its link, its side, or both legs, in this order, else
    /// the default of its link's profile. `None` is the kernel's default.
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

    /// Returns the congestion control of a leg before its handshake.
    pub fn initial_congestion_of<'a>(&'a self, side: Side, link: Option<&'a Link>) -> Option<&'a Congestion> {
        let short = || self.short_path.as_ref().map(|path| &path.congestion);
        let of_host = self.host_congestion.as_ref();
        self.congestion_of(side, link).or_else(short).or(of_host)
    }

    /// Sets the kernel's congestion control on a connected leg without a profile, unless its path is short.
    /// `handshake` is an upper bound of the round-trip time.
    pub fn settle_congestion(&self, side: Side, stream: &Connection, handshake: Duration) {
        let Some(path) = &self.short_path else { return };
        if self.congestion_of(side, None).is_some() {
            return;
        }
        // With fast open the connection exists before a round trip.
        if handshake < SHORT_PATH && !self.options.fastopen {
            return;
        }
        // 0 means no measurement, as after a SYN cookie.
        let short = |rtt_us: u32| (1..SHORT_PATH.as_micros()).contains(&rtt_us.into());
        if !options::tcp_info(stream).is_ok_and(|info| short(info.tcpi_rtt)) {
            tried(
                "congestion control",
                options::set_congestion(stream, path.elsewhere.name()),
            );
        }
    }

    /// Returns the time to wait for the client's first data, which fast open can carry: a fiftieth of the
    /// round trip that it may save. A client that waits for the server is delayed by at most this time.
    pub fn early_data_patience(&self, link: Option<&Link>) -> Option<Duration> {
        let rtt = link.filter(|_| self.options.fastopen)?.profile.rtt;
        Some((rtt / 50).min(Duration::from_millis(20)))
    }

    /// Sets the options that an accepted connection does not inherit from its listener. A refused option is
    /// logged and left out.
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

    /// Returns whether a server leg's SYN can carry the client's data.
    pub fn carries_early_data(&self) -> bool {
        self.options.fastopen
    }

    /// Sets the common options of a server leg before its connect, and of a listener for its accepted legs.
    pub fn tune(&self, socket: BorrowedFd<'_>, link: Option<&Link>) {
        let sock = socket2::SockRef::from(&socket);
        // Until a direction has ended by FIN, every close is a reset.
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
        // Without it a single urgent byte does not make a leg readable, and reads skip it.
        tried("urgent data inline", sock.set_out_of_band_inline(true));
    }

    /// Returns the configured maximum segment size of a leg, in bytes.
    pub fn mss_of(&self, link: Option<&Link>) -> Option<u16> {
        link.and_then(|link| link.profile.mss.value).or(self.options.mss)
    }
}
