//! The proxy's own listeners, in the namespace of the client legs. New connections reach them by their place in the eBPF
//! map, not by their address, which is on the loopback.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    sync::Arc,
};

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

use crate::{
    flow::{leg_config::LegConfig, side::Side},
    link::registry::{Link, Links},
    tcp::{congestion, options},
    wire::programs::ListenerPair,
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
    /// Returns the sockets, for the programs' map of listeners.
    pub fn descriptors(&self) -> ListenerPair<'_> {
        ListenerPair {
            v4: self.v4.as_fd(),
            v6: self.v6.as_ref().map(AsFd::as_fd),
        }
    }

    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &Listener> {
        [Some(&self.v4), self.v6.as_ref()].into_iter().flatten()
    }
}

/// The listeners of all links: first those for interfaces without a profile, which have the port that the user chose.
#[derive(Debug)]
pub struct Listeners {
    /// By the links' numbers.
    pub pairs: Vec<Arc<Pair>>,
}

impl Listeners {
    /// Binds all, in the calling thread's namespace.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn bind(port: u16, legs: &LegConfig, links: &Links) -> Result<Self> {
        let mut pairs = vec![Arc::new(bind_pair(port, legs, None)?)];
        pairs.extend(bind_links(legs, &links.all())?);
        Ok(Self { pairs })
    }

    /// Gives all of them other options, for connections that are not there yet.
    pub fn tune(&self, legs: &LegConfig, links: &Links) {
        let links = links.all();
        let numbered = [None].into_iter().chain(links.iter().map(Some));
        for (pair, link) in self.pairs.iter().zip(numbered) {
            for listener in pair.iter() {
                if let Err(error) = tune(listener, legs, link) {
                    warn!("cannot change all options of a listener: {error}");
                }
            }
        }
    }
}

/// Binds a pair for each of these links. Nobody has to know their ports: connections come by the eBPF map.
///
/// # Errors
/// When a socket cannot be had.
pub fn bind_links(legs: &LegConfig, links: &[Arc<Link>]) -> Result<Vec<Arc<Pair>>> {
    let bind = |link| bind_pair(ANY_PORT, legs, Some(link)).map(Arc::new);
    links.iter().map(bind).collect()
}

/// The kernel chooses.
const ANY_PORT: u16 = 0;

fn bind_pair(port: u16, legs: &LegConfig, link: Option<&Arc<Link>>) -> Result<Pair> {
    let v4 = bind(Ipv4Addr::LOCALHOST.into(), port, legs, link)
        .with_context(|| format!("cannot listen on 127.0.0.1 port {port}"))?;
    let v6 = match bind(Ipv6Addr::LOCALHOST.into(), port, legs, link) {
        Ok(listener) => Some(listener),
        Err(error) => {
            warn!("IPv6 connections are not intercepted: cannot listen on [::1]:{port}: {error}");
            None
        }
    };
    Ok(Pair { v4, v6 })
}

fn bind(addr: IpAddr, port: u16, legs: &LegConfig, link: Option<&Arc<Link>>) -> io::Result<Listener> {
    let addr = SocketAddr::new(addr, port);
    let listener = Socket::new(
        Domain::for_address(addr),
        Type::STREAM.nonblocking().cloexec(),
        None,
    )?;
    listener.set_reuse_address(true)?;
    options::set_transparent(&listener, addr.is_ipv6())?;
    if addr.is_ipv6() {
        options::set_v6_only(&listener)?;
    }
    tune(&listener, legs, link)?;
    listener.bind(&addr.into())?;
    listener.listen(BACKLOG)?;
    // SAFETY: a socket owns its descriptor, and nothing replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?)
}

/// What connections get from the listener that they are accepted from. Everything is set, so that a listener that is in
/// use loses what it had before.
fn tune(listener: impl AsFd + Copy, legs: &LegConfig, link: Option<&Arc<Link>>) -> io::Result<()> {
    let fastopen = if legs.options.fastopen { FASTOPEN_QUEUE } else { 0 };
    options::set_fastopen_queue(listener, fastopen)?;
    if let Some(link) = link {
        // The SYN-ACK's window and its scale are what the listener's buffer allows; accepted sockets inherit it.
        options::set_receive_buffer(listener, link.profile.receive_buffer.value)?;
    }
    // Accepted sockets inherit it; chosen later, they would keep the pacing of the one before.
    match legs.initial_congestion_of(Side::Client, link.map(Arc::as_ref)) {
        Some(congestion) => options::set_congestion(listener, congestion.name())?,
        None => options::set_congestion(listener, congestion::default()?.name())?,
    }
    if !legs.options.cork {
        options::set_cork(listener, false)?;
    }
    legs.tune(listener.as_fd(), link.map(Arc::as_ref));
    // What the SYN-ACK announces; on an accepted socket it is too late for that. Zero is the path's.
    let mss = legs.mss_of(link.map(Arc::as_ref));
    options::set_mss(listener, mss.unwrap_or(0))
}
