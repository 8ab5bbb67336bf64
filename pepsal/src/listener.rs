//! The proxy's own listeners. New connections reach them by their place in the eBPF map, not by their address, which is
//! on the loopback so that nobody outside can connect to it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tracing::warn;

use crate::{
    cli::TcpArgs,
    leg::LegConfig,
    link::{Link, Links},
    relay::Side,
    socket,
};

/// Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 65_535;

/// SYNs with data that may wait to be acknowledged.
const FASTOPEN_QUEUE: i32 = 1024;

/// A link's listeners, one for each family. One for both would be bound to the wildcard address, and would take the
/// listening port away from clients that use it as their source.
#[derive(Debug)]
pub struct Pair {
    /// On 127.0.0.1.
    pub v4: TcpListener,
    /// On ::1, where the host has IPv6.
    pub v6: Option<TcpListener>,
}

impl Pair {
    /// Both.
    pub fn iter(&self) -> impl Iterator<Item = &TcpListener> {
        [Some(&self.v4), self.v6.as_ref()].into_iter().flatten()
    }
}

/// The listeners of all links: first those for interfaces without a profile, which have the port that the user chose.
#[derive(Debug)]
pub struct Listeners {
    /// By the links' numbers.
    pub pairs: Vec<Pair>,
}

impl Listeners {
    /// Binds all.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn bind(port: u16, links: &Links, binder: &Binder<'_>) -> Result<Self> {
        let mut pairs = vec![binder.pair(port, None)?];
        for link in links.iter() {
            // Nobody has to know the port: connections come by the eBPF map.
            pairs.push(binder.pair(0, Some(link))?);
        }
        Ok(Self { pairs })
    }
}

/// What listeners are made by.
#[derive(Debug)]
pub struct Binder<'a> {
    /// The user's socket options.
    pub tcp: &'a TcpArgs,
    /// What accepted legs are to be.
    pub legs: &'a LegConfig,
    /// Whether the instance that this one follows still has the port.
    pub beside_another: bool,
}

impl Binder<'_> {
    fn pair(&self, port: u16, link: Option<&Link>) -> Result<Pair> {
        let v4 = match self.bind(Ipv4Addr::LOCALHOST.into(), port, link) {
            Ok(listener) => listener,
            Err(error) => return refuse(error, "127.0.0.1", port),
        };
        let v6 = match self.bind(Ipv6Addr::LOCALHOST.into(), port, link) {
            Ok(listener) => Some(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return refuse(error, "::1", port),
            Err(error) => {
                warn!("IPv6 connections are not intercepted: cannot listen on [::1]:{port}: {error}");
                None
            }
        };
        Ok(Pair { v4, v6 })
    }

    fn bind(&self, addr: IpAddr, port: u16, link: Option<&Link>) -> io::Result<TcpListener> {
        let addr = SocketAddr::new(addr, port);
        let listener = Socket::new(
            Domain::for_address(addr),
            Type::STREAM.nonblocking().cloexec(),
            None,
        )?;
        listener.set_reuse_address(true)?;
        if self.beside_another {
            listener.set_reuse_port(true)?;
        }
        socket::set_transparent(&listener, addr.is_ipv6())?;
        if addr.is_ipv6() {
            socket::set_v6_only(&listener)?;
        }
        if self.tcp.fastopen {
            socket::set_fastopen_queue(&listener, FASTOPEN_QUEUE)?;
        }
        if let Some(link) = link {
            // The SYN-ACK's window and its scale are what the listener's buffer allows; accepted sockets inherit it.
            socket::set_receive_buffer(&listener, link.profile.receive_buffer.value)?;
        }
        // Accepted sockets inherit it; chosen later, they would keep the pacing of the one before.
        if let Some(congestion) = self.legs.initial_congestion_of(Side::Client, link) {
            socket::set_congestion(&listener, congestion)?;
        }
        // What the SYN-ACK announces; on an accepted socket it is too late for that.
        if let Some(mss) = link.and_then(|link| link.profile.mss.value).or(self.tcp.mss) {
            socket::set_mss(&listener, mss)?;
        }
        listener.bind(&addr.into())?;
        // Only now, so that a port that is in use is refused; for the instance that takes over.
        listener.set_reuse_port(true)?;
        listener.listen(BACKLOG)?;
        TcpListener::from_std(listener.into())
    }
}

fn refuse<T>(error: io::Error, addr: &str, port: u16) -> Result<T> {
    if error.kind() == io::ErrorKind::AddrInUse {
        bail!("port {port} is in use on {addr}: choose another with -p, or stop who listens there");
    }
    Err(error).with_context(|| format!("cannot listen on {addr} port {port}"))
}
