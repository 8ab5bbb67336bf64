//! The listeners, in the namespace of the client legs. New connections reach them by their entry in an eBPF
//! map, not by their loopback address.

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

/// Length of the accept queue; the kernel limits it to net.core.somaxconn.
const BACKLOG: i32 = 65_535;

/// Maximum number of pending fast open requests.
const FASTOPEN_QUEUE: i32 = 1024;

/// A listening socket. Accepted sockets are not registered with a runtime yet.
pub type Listener = AsyncFd<Socket>;

/// The listeners of a link, one for each address family. One for both would bind the wildcard address, and
/// clients could not use the listening port as source port.
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

    /// Returns the listeners of both families.
    pub fn iter(&self) -> impl Iterator<Item = &Listener> {
        [Some(&self.v4), self.v6.as_ref()].into_iter().flatten()
    }
}

/// The listeners of all links. The first pair is for interfaces without a profile, and has the port of `-p`.
#[derive(Debug)]
pub struct Listeners {
    /// Index: link number.
    pub pairs: Vec<Arc<Pair>>,
}

impl Listeners {
    /// Binds all listeners, in the calling thread's namespace.
    ///
    /// # Errors
    /// When a socket cannot be created or bound.
    pub fn bind(port: u16, legs: &LegConfig, links: &Links) -> Result<Self> {
        let mut pairs = vec![Arc::new(bind_pair(port, legs, None)?)];
        pairs.extend(bind_links(legs, &links.all())?);
        Ok(Self { pairs })
    }

    /// Sets the options of all listeners, for later connections.
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

/// Binds a pair for each link. Their ports are arbitrary: connections reach them by the eBPF map.
///
/// # Errors
/// When a socket cannot be created or bound.
pub fn bind_links(legs: &LegConfig, links: &[Arc<Link>]) -> Result<Vec<Arc<Pair>>> {
    let bind = |link| bind_pair(ANY_PORT, legs, Some(link)).map(Arc::new);
    links.iter().map(bind).collect()
}

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

/// Sets the options that accepted connections inherit. Sets every option, so that a listener in use loses its
/// former ones.
fn tune(listener: impl AsFd + Copy, legs: &LegConfig, link: Option<&Arc<Link>>) -> io::Result<()> {
    let fastopen = if legs.options.fastopen { FASTOPEN_QUEUE } else { 0 };
    options::set_fastopen_queue(listener, fastopen)?;
    if let Some(link) = link {
        // The listener's buffer determines window and window scale of the SYN-ACK; accepted sockets inherit
        // it.
        options::set_receive_buffer(listener, link.profile.receive_buffer.value)?;
    }
    // Accepted sockets inherit it; set later, they would keep the pacing of the former one.
    match legs.initial_congestion_of(Side::Client, link.map(Arc::as_ref)) {
        Some(congestion) => options::set_congestion(listener, congestion.name())?,
        None => options::set_congestion(listener, congestion::default()?.name())?,
    }
    if !legs.options.cork {
        options::set_cork(listener, false)?;
    }
    legs.tune(listener.as_fd(), link.map(Arc::as_ref));
    // Announced by the SYN-ACK, so too late on an accepted socket. 0 is the path's.
    let mss = legs.mss_of(link.map(Arc::as_ref));
    options::set_mss(listener, mss.unwrap_or(0))
}
