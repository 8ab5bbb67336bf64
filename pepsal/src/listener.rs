//! The proxy's own listeners. New connections reach them by their place in the eBPF map, not by their address, which is
//! on the loopback so that nobody outside can connect to it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

use crate::{
    cli::TcpArgs,
    leg::LegConfig,
    link::{Link, Links},
    preflight,
    relay::Side,
    socket,
};

/// Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 65_535;

/// SYNs with data that may wait to be acknowledged.
const FASTOPEN_QUEUE: i32 = 1024;

/// Where connections are accepted. What it accepts is not yet registered with anybody's runtime.
pub type Listener = AsyncFd<Socket>;

/// A link's listeners, one for each family. One for both would be bound to the wildcard address, and would take the
/// listening port away from clients that use it as their source.
#[derive(Debug)]
pub struct Pair {
    /// On 127.0.0.1.
    pub v4: Listener,
    /// On ::1, where the host has IPv6.
    pub v6: Option<Listener>,
}

impl Pair {
    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &Listener> {
        [Some(&self.v4), self.v6.as_ref()].into_iter().flatten()
    }
}

/// Where a pair listens on the loopback.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Zero leaves it to the kernel.
    pub port: u16,
    /// Whether the instance that this one follows has the port, too.
    pub shared: bool,
}

impl Place {
    const ANY: Self = Self {
        port: 0,
        shared: false,
    };
}

/// The listeners of all links: first those for interfaces without a profile, which have the port that the user chose.
#[derive(Debug)]
pub struct Listeners {
    /// By the links' numbers.
    pub pairs: Vec<Arc<Pair>>,
}

impl Listeners {
    /// Binds all.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn bind(place: Place, tcp: &TcpArgs, legs: &LegConfig, links: &Links) -> Result<Self> {
        let mut pairs = vec![Arc::new(bind_pair(place, tcp, legs, None)?)];
        pairs.extend(bind_links(tcp, legs, &links.all())?);
        Ok(Self { pairs })
    }

    /// Gives all of them other options, for connections that are not there yet.
    pub fn tune(&self, tcp: &TcpArgs, legs: &LegConfig, links: &Links) {
        let links = links.all();
        let numbered = [None].into_iter().chain(links.iter().map(Some));
        for (pair, link) in self.pairs.iter().zip(numbered) {
            for listener in pair.iter() {
                if let Err(error) = tune(listener, tcp, legs, link) {
                    warn!("a listener keeps some of its former options: {error}");
                }
            }
        }
    }
}

/// Binds a pair for each of these links. Nobody has to know their ports: connections come by the eBPF map.
///
/// # Errors
/// When a socket cannot be had.
pub fn bind_links(tcp: &TcpArgs, legs: &LegConfig, links: &[Arc<Link>]) -> Result<Vec<Arc<Pair>>> {
    let bind = |link| bind_pair(Place::ANY, tcp, legs, Some(link)).map(Arc::new);
    links.iter().map(bind).collect()
}

fn bind_pair(place: Place, tcp: &TcpArgs, legs: &LegConfig, link: Option<&Arc<Link>>) -> Result<Pair> {
    let v4 = match bind(Ipv4Addr::LOCALHOST.into(), place, tcp, legs, link) {
        Ok(listener) => listener,
        Err(error) => return refuse(error, "127.0.0.1", place.port),
    };
    let v6 = match bind(Ipv6Addr::LOCALHOST.into(), place, tcp, legs, link) {
        Ok(listener) => Some(listener),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return refuse(error, "::1", place.port),
        Err(error) => {
            warn!(
                "IPv6 connections are not intercepted: cannot listen on [::1]:{}: {error}",
                place.port
            );
            None
        }
    };
    Ok(Pair { v4, v6 })
}

fn refuse<T>(error: io::Error, addr: &str, port: u16) -> Result<T> {
    if error.kind() == io::ErrorKind::AddrInUse {
        bail!("port {port} is in use on {addr}: choose another with -p, or stop who listens there");
    }
    Err(error).with_context(|| format!("cannot listen on {addr} port {port}"))
}

fn bind(
    addr: IpAddr,
    place: Place,
    tcp: &TcpArgs,
    legs: &LegConfig,
    link: Option<&Arc<Link>>,
) -> io::Result<Listener> {
    let addr = SocketAddr::new(addr, place.port);
    let listener = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.nonblocking().cloexec(),
        None,
    )?;
    listener.set_reuse_address(true)?;
    if place.shared {
        listener.set_reuse_port(true)?;
    }
    socket::set_transparent(&listener, addr.is_ipv6())?;
    if addr.is_ipv6() {
        socket::set_v6_only(&listener)?;
    }
    tune(&listener, tcp, legs, link)?;
    listener.bind(&addr.into())?;
    // Only now, so that a port that is in use is refused; for the instance that takes over.
    listener.set_reuse_port(true)?;
    listener.listen(BACKLOG)?;
    // SAFETY: a socket owns its descriptor, and nothing replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

/// What connections get from the listener that they are accepted from. Everything is set, so that a listener that is in
/// use loses what it had before.
fn tune(
    listener: impl AsFd + Copy,
    tcp: &TcpArgs,
    legs: &LegConfig,
    link: Option<&Arc<Link>>,
) -> io::Result<()> {
    let fastopen = if tcp.fastopen { FASTOPEN_QUEUE } else { 0 };
    socket::set_fastopen_queue(listener, fastopen)?;
    if let Some(link) = link {
        // The SYN-ACK's window and its scale are what the listener's buffer allows; accepted sockets inherit it.
        socket::set_receive_buffer(listener, link.profile.receive_buffer.value)?;
    }
    // Accepted sockets inherit it; chosen later, they would keep the pacing of the one before.
    match legs.initial_congestion_of(Side::Client, link.map(Arc::as_ref)) {
        Some(congestion) => socket::set_congestion(listener, congestion)?,
        None => socket::set_congestion(listener, &preflight::default_congestion()?)?,
    }
    if !tcp.cork {
        socket::set_cork(listener, false)?;
    }
    legs.tune(listener.as_fd(), link.map(Arc::as_ref));
    // What the SYN-ACK announces; on an accepted socket it is too late for that. Zero is the path's.
    let mss = link.and_then(|link| link.profile.mss.value).or(tcp.mss);
    socket::set_mss(listener, mss.unwrap_or(0))
}
