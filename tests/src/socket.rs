//! TCP sockets for tests: options before connect, saved SYNs, timeouts, resets.

use std::ffi::c_int;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::netns::Namespace;
use crate::syn::{Path, SavedSyn};
use crate::topology::Family;
use crate::wait::{PATIENCE, eventually, patience};

/// Options of a client's connection. The default sets a timeout only.
#[derive(Clone, Debug)]
pub struct Connector {
    /// Source address and port; port 0 is any port.
    pub source: Option<SocketAddr>,
    /// IPv4 type of service or IPv6 traffic class; the kernel sets the two ECN bits.
    pub traffic_class: u8,
    /// IPv4 options, at most 40 bytes.
    pub ip_options: Vec<u8>,
    /// IPv6 hop-by-hop options: a whole extension header, first byte zero.
    pub hop_by_hop: Vec<u8>,
    /// IPv6 destination options: a whole extension header, first byte zero.
    pub destination_options: Vec<u8>,
    /// Congestion control, the namespace's default if none.
    pub congestion: Option<String>,
    /// Sends the first data with the SYN, if a cookie is known (RFC 7413): connect then waits for data.
    pub fast_open: bool,
    /// Timeout of connect, and of each read and write.
    pub timeout: Duration,
}

impl Default for Connector {
    fn default() -> Self {
        Self {
            source: None,
            traffic_class: 0,
            ip_options: Vec::new(),
            hop_by_hop: Vec::new(),
            destination_options: Vec::new(),
            congestion: None,
            fast_open: false,
            timeout: patience(PATIENCE),
        }
    }
}

impl From<SocketAddr> for Connector {
    /// Returns a connector with a source address and port.
    fn from(source: SocketAddr) -> Self {
        Self {
            source: Some(source),
            ..Self::default()
        }
    }
}

impl Connector {
    /// Returns a connector with a source port of the client.
    pub fn from_port(family: Family, port: u16) -> Self {
        Self::from(SocketAddr::new(family.client(), port))
    }

    /// Connects from `namespace` to `server`.
    ///
    /// # Errors
    /// The kernel's error, unchanged, so that a test can distinguish a refusal from an unreachable host.
    pub fn connect(&self, namespace: &Namespace, server: SocketAddr) -> io::Result<TcpStream> {
        self.connect_from(namespace.run(|| tcp_socket(server))?, server)
    }

    /// Connects from the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel's error, unchanged.
    pub fn connect_here(&self, server: SocketAddr) -> io::Result<TcpStream> {
        self.connect_from(tcp_socket(server)?, server)
    }

    fn connect_from(&self, socket: Socket, server: SocketAddr) -> io::Result<TcpStream> {
        if self.traffic_class != 0 {
            match server {
                SocketAddr::V4(_) => socket.set_tos_v4(self.traffic_class.into())?,
                SocketAddr::V6(_) => socket.set_tclass_v6(self.traffic_class.into())?,
            }
        }
        for (level, name, option) in [
            (libc::IPPROTO_IP, libc::IP_OPTIONS, &self.ip_options),
            (libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS, &self.hop_by_hop),
            (libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &self.destination_options),
        ] {
            if !option.is_empty() {
                set_option(&socket, level, name, option)?;
            }
        }
        if let Some(congestion) = &self.congestion {
            socket.set_tcp_congestion(congestion.as_bytes())?;
        }
        if self.fast_open {
            set_option(
                &socket,
                libc::IPPROTO_TCP,
                libc::TCP_FASTOPEN_CONNECT,
                &1_i32.to_ne_bytes(),
            )?;
        }
        if let Some(source) = self.source {
            // Allows several connections to share a port, concurrently or one after the other.
            socket.set_reuse_address(true)?;
            socket.bind(&source.into())?;
        }
        socket.connect_timeout(&server.into(), self.timeout)?;
        socket.set_read_timeout(Some(self.timeout))?;
        socket.set_write_timeout(Some(self.timeout))?;
        Ok(socket.into())
    }
}

/// A listening socket that keeps the SYN of every connection.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: SocketAddr,
}

/// An accepted connection with its SYN.
#[derive(Debug)]
pub struct Accepted {
    /// Reads and writes time out after 20 s.
    pub stream: TcpStream,
    /// Address and port of the client.
    pub peer: SocketAddr,
    /// The SYN.
    pub syn: SavedSyn,
}

impl Accepted {
    /// Returns the path: [`SavedSyn::path`].
    pub fn path(&self) -> Path {
        self.syn.path()
    }
}

impl Listener {
    /// Listens in `namespace`; an unspecified address is all addresses of its family, port 0 any port.
    ///
    /// # Errors
    /// When the address is in use, or not the namespace's.
    pub fn bind(namespace: &Namespace, address: SocketAddr) -> io::Result<Self> {
        let socket = namespace.run(|| tcp_socket(address))?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        set_option(
            &socket,
            libc::IPPROTO_TCP,
            libc::TCP_SAVE_SYN,
            &1_i32.to_ne_bytes(),
        )?;
        socket.listen(1024)?;
        socket.set_nonblocking(true)?;
        let address = socket
            .local_addr()?
            .as_socket()
            .expect("a TCP socket has an IP address");
        Ok(Self { socket, address })
    }

    /// Listens on every address of the family of `like` and on any port.
    ///
    /// # Errors
    /// See [`Listener::bind`].
    pub fn bind_any(namespace: &Namespace, like: IpAddr) -> io::Result<Self> {
        let unspecified: IpAddr = match like {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self::bind(namespace, (unspecified, 0).into())
    }

    /// Returns the bound address and port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the bound port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Returns the listener's address and port at an address of its namespace.
    pub fn at(&self, address: IpAddr) -> SocketAddr {
        SocketAddr::new(address, self.port())
    }

    /// Sets the congestion control of later accepted connections.
    ///
    /// # Errors
    /// When the kernel does not have it.
    pub fn set_congestion(&self, congestion: &str) -> io::Result<()> {
        self.socket.set_tcp_congestion(congestion.as_bytes())
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] when none arrives within `timeout`, or its [`patience`].
    pub fn accept(&self, timeout: Duration) -> io::Result<Accepted> {
        let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience(timeout)).map_err(io::Error::other)?;
        if poll(&mut ready, timeout)? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.accept_waiting()
    }

    /// Connects until a connection is forwarded, and returns all connections. Earlier ones are stuck: the
    /// kernel completes their handshakes, which a hung daemon does not accept.
    ///
    /// # Panics
    /// When none is forwarded within [`PATIENCE`], or when one is refused.
    #[track_caller]
    pub fn wait_until_forwarded(&self, client: &Namespace, server: SocketAddr) -> Vec<TcpStream> {
        let mut stuck = Vec::new();
        eventually(PATIENCE, || {
            stuck.push(
                Connector::default()
                    .connect(client, server)
                    .expect("nothing is refused"),
            );
            self.accept(Duration::from_millis(250))
                .is_ok_and(|accepted| accepted.path() == Path::Forwarded)
        });
        stuck
    }

    /// Accepts a waiting connection; without one returns [`io::ErrorKind::WouldBlock`].
    pub(crate) fn accept_waiting(&self) -> io::Result<Accepted> {
        let (socket, peer) = self.socket.accept()?;
        let patience = Some(Connector::default().timeout);
        socket.set_read_timeout(patience)?;
        socket.set_write_timeout(patience)?;
        let peer = peer.as_socket().expect("a TCP socket has an IP address");
        let syn = SavedSyn::parse(saved_syn(&socket)?).map_err(io::Error::other)?;
        Ok(Accepted {
            stream: socket.into(),
            peer,
            syn,
        })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Resets a connection and discards queued data (SO_LINGER with a timeout of 0).
///
/// # Errors
/// None for a connected stream.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}

fn tcp_socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))
}

fn saved_syn(socket: &Socket) -> io::Result<Vec<u8>> {
    // 40 bytes of IPv6 header, extension headers up to some hundred bytes, 60 bytes of TCP header.
    let mut syn = vec![0_u8; 4096];
    let mut len = syn.len() as libc::socklen_t;
    // SAFETY: `syn` has room for `len` bytes, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVED_SYN,
            syn.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    Errno::result(result)?;
    syn.truncate(len as usize);
    Ok(syn)
}

fn set_option(socket: &Socket, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes from `value` during the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    Errno::result(result)?;
    Ok(())
}
