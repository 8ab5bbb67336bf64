//! The two legs' sockets: the server leg is made here in the image of the client's SYN, and both get their options.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{MsgFlags, recv, send},
};
use pepsal_ebpf::SynRecord;
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, sleep};
use tracing::debug;

use crate::{
    cli::{Options, Replicate, Source},
    flow::{
        metrics::{Event, Metrics},
        relay::Side,
    },
    host::namespace::Namespace,
    link::{profile::Origin, registry::Link},
    tcp::{congestion, options, stream::Stream},
};

/// When an idle peer is first asked whether it is still there; how often then, and how often in vain, is the host's to say.
const KEEPALIVE: Duration = Duration::from_secs(600);

/// How often a server leg tries for two addresses that another one still has.
const PORT_RETRY: Duration = Duration::from_millis(10);
/// How long it tries.
const PORT_PATIENCE: Duration = Duration::from_millis(250);

/// How legs are made.
#[derive(Debug, Clone)]
pub struct LegConfig {
    source: Source,
    dscp: bool,
    options: bool,
    source_route: bool,
    ttl: bool,
    fastopen: bool,
    quickack: bool,
    cork: bool,
    mss: Option<u16>,
    congestion: Option<String>,
    client_congestion: Option<String>,
    server_congestion: Option<String>,
    /// The host's congestion control, where the legs' namespaces have another.
    host_congestion: Option<String>,
    short_path: Option<ShortPath>,
}

/// What legs do where the kernel's own congestion control is BBR, and nobody asked for any.
///
/// It paces: a timer and an interrupt for every 64 KiB, which cost a fast flow a third of its rate, and which a socket
/// that has once had BBR keeps. On a short path there is nothing to gain from that. So legs begin without, and those
/// whose handshake took longer change to BBR before their first data.
#[derive(Debug, Clone)]
struct ShortPath {
    congestion: &'static str,
    elsewhere: String,
}

impl ShortPath {
    fn new() -> Option<Self> {
        let elsewhere = congestion::default().ok()?;
        elsewhere.starts_with("bbr").then(|| Self {
            congestion: congestion::first_usable(["cubic", "reno"]),
            elsewhere,
        })
    }
}

/// Round trips below which a path is short: a local or a regional network, and no satellite.
const SHORT_PATH: Duration = Duration::from_millis(25);

/// A connection that is to be made to a server.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    /// The client's address and port, from which it is made.
    pub client: SocketAddr,
    /// The server's address and port.
    pub server: SocketAddr,
    /// The client's SYN.
    pub record: &'a SynRecord,
    /// The link that the leg leaves through, where it has a profile.
    pub link: Option<&'a Link>,
    /// The largest segment that fits the way, in bytes, where the leg's route does not know it.
    pub path_mss: Option<u16>,
    /// Whether the client has sent data already, which fast open can carry in the SYN. Without, the SYN would wait for the
    /// client, and the client may be waiting for the server.
    pub has_data: bool,
}

impl LegConfig {
    /// What the command line asks for. `inside` is the congestion control that sockets of the legs' namespaces get when
    /// nobody chooses one.
    pub fn new(options: &Options, inside: &str) -> Self {
        let of_host = congestion::default().ok();
        let replicates = |what| options.steering.replicate.contains(&what);
        let tcp = &options.tcp;
        Self {
            source: options.steering.source,
            dscp: replicates(Replicate::Dscp),
            options: replicates(Replicate::Options) || replicates(Replicate::SourceRoute),
            source_route: replicates(Replicate::SourceRoute),
            ttl: replicates(Replicate::Ttl),
            fastopen: tcp.fastopen,
            quickack: tcp.quickack,
            cork: tcp.cork,
            mss: tcp.mss,
            congestion: tcp.congestion.clone(),
            client_congestion: tcp.client_congestion.clone(),
            server_congestion: tcp.server_congestion.clone(),
            host_congestion: of_host.filter(|of_host| of_host != inside),
            short_path: ShortPath::new(),
        }
    }

    /// The congestion controls that are asked for.
    pub fn congestion(&self) -> impl Iterator<Item = &str> {
        [&self.congestion, &self.client_congestion, &self.server_congestion]
            .into_iter()
            .flatten()
            .map(String::as_str)
    }

    /// The congestion control of a leg: what was given for its link, for its side, for all, and last what its link's
    /// profile found best. `None` is for the kernel to choose.
    pub fn congestion_of<'a>(&'a self, side: Side, link: Option<&'a Link>) -> Option<&'a str> {
        let of_link = link.map(|link| &link.profile.congestion);
        let given = of_link
            .filter(|congestion| congestion.origin == Origin::Given)
            .map(|given| &given.value);
        let of_side = match side {
            Side::Client => &self.client_congestion,
            Side::Server => &self.server_congestion,
        };
        let derived = of_link.map(|derived| &derived.value);
        given
            .or(of_side.as_ref())
            .or(self.congestion.as_ref())
            .or(derived)
            .map(String::as_str)
    }

    /// What a leg's socket is given before its handshake.
    pub fn initial_congestion_of<'a>(&'a self, side: Side, link: Option<&'a Link>) -> Option<&'a str> {
        let short = || self.short_path.as_ref().map(|path| path.congestion);
        let of_host = self.host_congestion.as_deref();
        self.congestion_of(side, link).or_else(short).or(of_host)
    }

    /// Once a leg without a profile is connected: leaves the congestion control to the kernel unless the path is short.
    /// `handshake` is what a round trip took at most.
    pub fn settle_congestion(&self, side: Side, stream: &Stream, handshake: Duration) {
        let Some(path) = &self.short_path else { return };
        if self.congestion_of(side, None).is_some() {
            return;
        }
        // With fast open there is a connection before there has been a round trip.
        if handshake < SHORT_PATH && !self.fastopen {
            return;
        }
        // No measurement, after a SYN cookie, is zero.
        let short = |rtt_us: u32| (1..SHORT_PATH.as_micros()).contains(&rtt_us.into());
        if !options::tcp_info(stream).is_ok_and(|info| short(info.tcpi_rtt)) {
            tried(
                "congestion control",
                options::set_congestion(stream, &path.elsewhere),
            );
        }
    }

    /// How long to wait for the client's first data, so that fast open can carry it: a fiftieth of the round trip that it
    /// may save. A client that waits for the server is not kept waiting longer than that.
    pub fn early_data_patience(&self, link: Option<&Link>) -> Option<Duration> {
        let rtt = link.filter(|_| self.fastopen)?.profile.rtt;
        Some((rtt / 50).min(Duration::from_millis(20)))
    }

    /// Gives the accepted connection the options that it has not inherited from its listener. One that the kernel
    /// refuses is left out: the flow can do without.
    pub fn tune_client(&self, stream: &Stream, client: SocketAddr, record: &SynRecord) {
        if self.dscp && record.traffic_class != 0 {
            let ipv6 = client.is_ipv6();
            tried(
                "traffic class",
                options::set_traffic_class(stream, ipv6, record.traffic_class),
            );
        }
        if self.quickack {
            tried("quick ack", options::set_quickack(stream, true));
        }
    }

    /// Whether a server leg's SYN can carry what the client has sent already.
    pub fn carries_early_data(&self) -> bool {
        self.fastopen
    }

    /// Connects to the server the way the client meant to.
    ///
    /// # Errors
    /// What `connect` says, and what `socket` and `bind` say when they fail for good.
    pub async fn connect(
        &self,
        attempt: &Attempt<'_>,
        host: &Namespace,
        metrics: &Metrics,
    ) -> io::Result<Stream> {
        let Attempt {
            client,
            server,
            record,
            link,
            path_mss,
            has_data,
        } = *attempt;
        let open = || {
            Socket::new(
                Domain::for_address(server),
                Type::STREAM.nonblocking().cloexec(),
                None,
            )
        };
        let socket = match self.source {
            Source::Client => open()?,
            Source::Gateway => host.run(open)?,
        };
        self.replicate(&socket, server.is_ipv6(), record, metrics);
        self.tune(socket.as_fd(), link);
        let given = self.mss_of(link);
        if let Some(mss) = path_mss.filter(|mss| given.is_none_or(|given| *mss < given)) {
            tried("maximum segment size", options::set_mss(&socket, mss));
        }
        if self.quickack || has_data {
            // What the client has sent already completes the handshake as well as an acknowledgement alone.
            tried("quick ack", options::set_quickack(&socket, self.quickack));
        }
        if let Some(congestion) = self.initial_congestion_of(Side::Server, link) {
            tried("congestion control", options::set_congestion(&socket, congestion));
        }
        if let Some(link) = link {
            // Before the SYN, whose window scale follows from it; then the first acknowledgement opens all of it.
            tried(
                "receive buffer",
                options::set_receive_buffer(&socket, link.profile.receive_buffer.value),
            );
        }
        if has_data && self.fastopen {
            tried("fast open", options::set_fastopen_connect(&socket));
        }
        if self.source == Source::Client {
            // The interface of the client's SYN is where the host gets what the leg sends.
            socket.set_mark(record.ingress_ifindex)?;
            options::set_transparent(&socket, client.is_ipv6())?;
            socket.set_reuse_address(true)?;
            socket.bind(&client.into())?;
        }
        begin_connect(&socket, server).await?;
        let stream = Stream::register(socket)?;
        stream.writable().await?;
        // What there is to know came with the same news.
        match stream.has_error() {
            true => stream.socket().take_error()?.map_or(Ok(stream), Err),
            false => Ok(stream),
        }
    }

    /// Gives a server leg that is not connected yet, or a listener for its accepted legs, the options that both inherit.
    pub fn tune(&self, socket: BorrowedFd<'_>, link: Option<&Link>) {
        let sock = socket2::SockRef::from(&socket);
        // Until a direction has ended cleanly, whatever closes the leg resets it.
        tried("reset on close", options::reset_on_close(socket, true));
        if self.cork {
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
        link.and_then(|link| link.profile.mss.value).or(self.mss)
    }

    /// Before `connect`, so that it is on the SYN.
    fn replicate(&self, socket: &Socket, ipv6: bool, record: &SynRecord, metrics: &Metrics) {
        if self.dscp && record.traffic_class != 0 {
            tried(
                "traffic class",
                options::set_traffic_class(socket, ipv6, record.traffic_class),
            );
        }
        if self.ttl {
            // The host forwards what the leg sends, which takes a hop off.
            let hops = record.ttl - u8::from(self.source == Source::Gateway);
            tried("time to live", options::set_ttl(socket, ipv6, hops));
        }
        if !self.options {
            return;
        }
        let mut replicated = record.truncated == 0;
        let ip_options = replicable_options(record.ip_options(), self.source_route);
        if !ip_options.is_empty() && !tried("IP options", options::set_ip_options(socket, &ip_options)) {
            replicated = false;
            // The kernel takes a source route only from its beginning; the other options need not go with it.
            let others = replicable_options(&ip_options, false);
            if others != ip_options && !others.is_empty() {
                tried(
                    "IP options but source routes",
                    options::set_ip_options(socket, &others),
                );
            }
        }
        if let Some(header) = settable_header(record.hop_by_hop()) {
            replicated &= tried("hop-by-hop options", options::set_hop_by_hop(socket, &header));
        }
        if let Some(header) = settable_header(record.destination()) {
            replicated &= tried(
                "destination options",
                options::set_destination_options(socket, &header),
            );
        }
        if !replicated {
            metrics.count(Event::OptionsNotReplicated);
        }
    }
}

/// With fast open and a cookie the kernel puts a server leg's SYN off until there is data for it: sends it with what the
/// client has sent, and waits until the server has answered. Returns how many of the client's bytes went with it.
///
/// Only so is a refusal known for one, and does the first window hold that the leg is given once it is connected.
///
/// # Errors
/// What `connect` would have said.
pub async fn open(server: &Stream, client: &Stream) -> io::Result<usize> {
    if !is_connecting(server)? {
        return Ok(0);
    }
    let mut data = [0; SYN_DATA_MAX];
    // An urgent byte is for the relay.
    let peeked = match options::is_at_mark(client)? {
        true => 0,
        false => recv(
            client.as_fd().as_raw_fd(),
            &mut data,
            MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
        )?,
    };
    let sent = match send(
        server.as_fd().as_raw_fd(),
        &data[..peeked],
        MsgFlags::MSG_NOSIGNAL,
    ) {
        // The cookie is gone; the SYN goes without data.
        Err(Errno::EINPROGRESS) => 0,
        sent => sent?,
    };
    if sent > 0 {
        recv(
            client.as_fd().as_raw_fd(),
            &mut data[..sent],
            MsgFlags::MSG_DONTWAIT,
        )?;
    }
    loop {
        server.writable().await?;
        let answered = server.try_write(|_| match is_connecting(server)? {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        });
        match answered {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(()) => return server.socket().take_error()?.map_or(Ok(sent), Err),
        }
    }
}

/// What fits into a SYN on every path that IPv6 allows: 1280 bytes less its header, TCP's and TCP's options.
const SYN_DATA_MAX: usize = 1280 - 40 - 60;

/// `TCP_SYN_SENT` of the kernel's `net/tcp_states.h`.
const TCP_SYN_SENT: u8 = 2;

fn is_connecting(stream: &Stream) -> io::Result<bool> {
    Ok(options::tcp_info(stream)?.tcpi_state == TCP_SYN_SENT)
}

/// Whether an option was taken; the reason why not goes to the log.
fn tried(what: &str, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        debug!("{what} refused: {error}");
    }
    result.is_ok()
}

/// Sends the SYN. A client that uses its port again at once may be faster than the end of its last flow, whose server leg
/// has the same two addresses: this one then waits for it.
///
/// # Errors
/// `AddrNotAvailable` when the other leg still has them after [`PORT_PATIENCE`]. Another port would not be the client's.
async fn begin_connect(socket: &Socket, server: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        match socket.connect(&server.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && Instant::now() < deadline => {
                sleep(PORT_RETRY).await;
            }
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => return Ok(()),
            begun => return begun,
        }
    }
}

/// `IPOPT_END`, `IPOPT_NOOP`, `IPOPT_LSRR` and `IPOPT_SSRR` of RFC 791.
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;

/// The IPv4 options that may be carried over, padded to whole words. Options that contradict themselves end the list.
fn replicable_options(options: &[u8], source_route: bool) -> Vec<u8> {
    let mut kept = Vec::with_capacity(options.len());
    let mut rest = options;
    while let [kind, after @ ..] = rest {
        let len = match (*kind, after.first()) {
            (OPTION_END, _) => break,
            (OPTION_NOP, _) => 1,
            (_, Some(len)) if *len >= 2 && usize::from(*len) <= rest.len() => usize::from(*len),
            _ => break,
        };
        let (option, next) = rest.split_at(len);
        if source_route || !matches!(*kind, LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE) {
            kept.extend_from_slice(option);
        }
        rest = next;
    }
    kept.resize(kept.len().next_multiple_of(4), OPTION_END);
    kept
}

/// An IPv6 options header as `setsockopt` takes it: the next header is the kernel's to fill in.
fn settable_header(header: &[u8]) -> Option<Vec<u8>> {
    let [_, rest @ ..] = header else { return None };
    let mut settable = vec![0];
    settable.extend_from_slice(rest);
    Some(settable)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::time::timeout;

    use super::*;

    fn socket_at(address: &socket2::SockAddr) -> Socket {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(address).unwrap();
        socket
    }

    #[tokio::test]
    async fn a_leg_waits_for_its_addresses_but_not_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let earlier = socket_at(&any.into());
        begin_connect(&earlier, server).await.unwrap();
        let later = socket_at(&earlier.local_addr().unwrap());

        let start = Instant::now();
        let waiting = timeout(40 * PORT_PATIENCE, begin_connect(&later, server));
        let error = waiting.await.expect("it gives up").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        assert!(start.elapsed() >= PORT_PATIENCE, "{:?}", start.elapsed());

        options::reset_on_close(earlier.as_fd(), true).unwrap();
        let release = async {
            sleep(PORT_PATIENCE / 5).await;
            drop(earlier);
        };
        let (connected, ()) = tokio::join!(begin_connect(&later, server), release);
        connected.unwrap();
    }

    #[test]
    fn source_routes_are_left_out_unless_asked_for() {
        let route = [131, 7, 4, 10, 0, 0, 1];
        let alert = [148, 4, 0, 0];
        let options: Vec<u8> = [&[OPTION_NOP][..], &route, &alert].concat();
        assert_eq!(replicable_options(&options, false), [1, 148, 4, 0, 0, 0, 0, 0]);
        assert_eq!(replicable_options(&options, true), options);
    }

    #[test]
    fn options_that_contradict_themselves_end_the_list() {
        assert_eq!(
            replicable_options(&[148, 4, 0, 0, 7, 40, 4, 0], false),
            [148, 4, 0, 0]
        );
        assert!(replicable_options(&[7, 1, 0, 0], false).is_empty());
        assert!(replicable_options(&[7], false).is_empty());
        assert!(replicable_options(&[0, 148, 4, 0], false).is_empty());
    }

    #[test]
    fn the_next_header_is_left_to_the_kernel() {
        assert_eq!(
            settable_header(&[6, 0, 1, 4, 0, 0, 0, 0]),
            Some(vec![0, 0, 1, 4, 0, 0, 0, 0])
        );
        assert_eq!(settable_header(&[]), None);
    }
}
