//! Verified transfers: pseudo-random bytes in one direction, with a comparison of digests at the end.
//!
//! The client opens a connection and sends a request with direction, seed and length. The payload follows in
//! that direction. Then the server reports the digest of the payload, the client's address and the client's
//! SYN. A [`Session`] requests several downloads on one connection.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use xxhash_rust::xxh3::Xxh3;

use crate::netns::Namespace;
use crate::socket::{Accepted, Connector, Listener};
use crate::syn::{Path, SavedSyn};
use crate::topology::Family;

/// Direction of the payload, from the client's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Client to server.
    Upload,
    /// Server to client.
    Download,
}

/// Parameters of a transfer.
#[derive(Clone, Debug)]
pub struct Transfer {
    direction: Direction,
    bytes: u64,
    seed: u64,
    connector: Connector,
    progress: Arc<AtomicU64>,
    cancel: Cancel,
}

/// Cancels transfers.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Mutex<Cancelled>>);

#[derive(Debug, Default)]
struct Cancelled {
    is_cancelled: bool,
    open: Vec<Weak<TcpStream>>,
}

impl Cancel {
    /// Shuts down the connections at the client's end: present and later transfers fail at once.
    pub fn cancel(&self) {
        let mut cancelled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cancelled.is_cancelled = true;
        for stream in cancelled.open.drain(..).filter_map(|stream| stream.upgrade()) {
            // Fails on a closed connection, which has the same effect.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Returns whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_cancelled
    }

    fn watch(&self, stream: TcpStream) -> Result<Arc<TcpStream>> {
        let stream = Arc::new(stream);
        let mut cancelled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!cancelled.is_cancelled, "cancelled");
        cancelled.open.retain(|stream| stream.strong_count() > 0);
        cancelled.open.push(Arc::downgrade(&stream));
        Ok(stream)
    }
}

/// Result of a complete transfer.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// From connect to the last byte of the server's report.
    pub elapsed: Duration,
    /// Payload bytes.
    pub bytes: u64,
    /// Whether both ends have the same byte count and digest.
    pub intact: bool,
    /// The client's local address and port.
    pub local: SocketAddr,
    /// The client's address and port that the server saw.
    pub peer: SocketAddr,
    /// The client's SYN that the server received.
    pub syn: SavedSyn,
}

impl Outcome {
    /// Returns the path: [`SavedSyn::path`].
    pub fn path(&self) -> Path {
        self.syn.path()
    }
}

impl Transfer {
    /// Returns a transfer of `bytes` from client to server.
    pub fn upload(bytes: u64) -> Self {
        Self::new(Direction::Upload, bytes)
    }

    /// Returns a transfer of `bytes` from server to client.
    pub fn download(bytes: u64) -> Self {
        Self::new(Direction::Download, bytes)
    }

    /// Returns a transfer of `bytes`.
    pub fn new(direction: Direction, bytes: u64) -> Self {
        Self {
            direction,
            bytes,
            seed: 1,
            connector: Connector::default(),
            progress: Arc::default(),
            cancel: Cancel::default(),
        }
    }

    /// Sets the seed of the payload, 1 by default.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Sets the client's connector.
    pub fn connector(self, connector: Connector) -> Self {
        Self { connector, ..self }
    }

    /// Sets the counter of payload bytes that the client has written or read. (The server may have received
    /// less: [`Server::received`].)
    pub fn progress(self, progress: Arc<AtomicU64>) -> Self {
        Self { progress, ..self }
    }

    /// Sets the handle that can cancel the transfer.
    pub fn cancelled_by(self, cancel: Cancel) -> Self {
        Self { cancel, ..self }
    }

    /// Connects from `namespace` to `server` and transfers the payload.
    ///
    /// # Errors
    /// When the connection fails, or does not end by FIN. A wrong digest is not an error: see
    /// [`Outcome::intact`].
    pub fn run(&self, namespace: &Namespace, server: SocketAddr) -> Result<Outcome> {
        let start = Instant::now();
        let stream = self.connector.connect(namespace, server).context("connect")?;
        let stream = &*self.cancel.watch(stream)?;
        let request = Request {
            direction: self.direction,
            seed: self.seed,
            bytes: self.bytes,
            is_last: true,
        };
        request.write(stream).context("request")?;
        let (bytes, digest) = match self.direction {
            Direction::Upload => send_payload(stream, self.seed, self.bytes, &self.progress)?,
            Direction::Download => receive_payload(stream, self.bytes, &self.progress)?,
        };
        let report = Report::read(stream).context("the server's report")?;
        let elapsed = start.elapsed();

        let local = stream.local_addr()?;
        stream.shutdown(Shutdown::Write)?;
        let surplus = io::copy(&mut &*stream, &mut io::sink()).context("the server's end of stream")?;
        ensure!(surplus == 0, "{surplus} bytes after the server's report");
        let intact = bytes == self.bytes && report.bytes == bytes && report.digest == digest;
        Ok(Outcome {
            elapsed,
            bytes,
            intact,
            local,
            peer: report.peer,
            syn: report.syn,
        })
    }
}

/// A connection for several downloads.
#[derive(Debug)]
pub struct Session(Arc<TcpStream>);

impl Session {
    /// Connects from `namespace` to `server`.
    ///
    /// # Errors
    /// When the connection fails, or `cancel` was called.
    pub fn open(
        connector: &Connector,
        namespace: &Namespace,
        server: SocketAddr,
        cancel: &Cancel,
    ) -> Result<Self> {
        let stream = connector.connect(namespace, server).context("connect")?;
        Ok(Self(cancel.watch(stream)?))
    }

    /// Requests `bytes` generated from `seed` and reads them. Returns the time from the request to the last
    /// byte of the server's report, and whether both digests are equal.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn download(&self, bytes: u64, seed: u64) -> Result<(Duration, bool)> {
        let start = Instant::now();
        let request = Request {
            direction: Direction::Download,
            seed,
            bytes,
            is_last: false,
        };
        request.write(&self.0).context("request")?;
        let (_, digest) = receive_payload(&self.0, bytes, &AtomicU64::new(0))?;
        let report = Report::read(&self.0).context("the server's report")?;
        let is_intact = report.bytes == bytes && report.digest == digest;
        Ok((start.elapsed(), is_intact))
    }
}

/// Serves transfers on every address of its namespace until it is dropped.
#[derive(Debug)]
pub struct Server {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    received: AtomicU64,
    stopping: AtomicBool,
    is_hushed: AtomicBool,
    stop: EventFd,
    open: Mutex<Vec<Weak<TcpStream>>>,
}

impl Server {
    /// Starts a server with the namespace's default congestion control.
    ///
    /// # Errors
    /// When the sockets cannot be created.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        Self::listen(namespace, None)
    }

    /// Starts a server with a congestion control, for instance `cubic`.
    ///
    /// # Errors
    /// When the kernel does not have it.
    pub fn with_congestion(namespace: &Namespace, congestion: &str) -> Result<Self> {
        Self::listen(namespace, Some(congestion))
    }

    fn listen(namespace: &Namespace, congestion: Option<&str>) -> Result<Self> {
        let v4 = Listener::bind(namespace, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        let port = v4.port();
        let v6 = Listener::bind(namespace, (Ipv6Addr::UNSPECIFIED, port).into())?;
        if let Some(congestion) = congestion {
            for listener in [&v4, &v6] {
                listener
                    .set_congestion(congestion)
                    .with_context(|| format!("congestion control {congestion}"))?;
            }
        }
        let shared = Arc::new(Shared {
            received: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            is_hushed: AtomicBool::new(false),
            // Daemons that start meanwhile must not inherit it.
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
            open: Mutex::default(),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept_until_stopped(&[v4, v6], &shared)
        });
        Ok(Self {
            port,
            shared,
            thread: Some(thread),
        })
    }

    /// Returns the port, which is the same for both address families.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the server's address in a [`Topology`](crate::Topology).
    pub fn address(&self, family: Family) -> SocketAddr {
        (family.server(), self.port).into()
    }

    /// Returns the payload bytes received so far, over all connections.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Disables messages about failed connections on standard error, for clients that cancel transfers.
    pub fn hush(&self) {
        self.shared.is_hushed.store(true, Ordering::Relaxed);
    }

    /// Closes all connections and accepts no more.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared
            .stop
            .write(1)
            .expect("the counter of an eventfd takes 1");
        for stream in self.shared.open().drain(..).filter_map(|stream| stream.upgrade()) {
            // Fails on a closed connection, which has the same effect.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // The panic has been printed; a second panic here would abort.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn open(&self) -> std::sync::MutexGuard<'_, Vec<Weak<TcpStream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept_until_stopped(listeners: &[Listener; 2], shared: &Arc<Shared>) {
    while !shared.stopping.load(Ordering::Relaxed) {
        let mut ready = [listeners[0].as_fd(), listeners[1].as_fd(), shared.stop.as_fd()]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        // After an interruption too, the listeners are checked next.
        let _ = poll(&mut ready, PollTimeout::NONE);
        for listener in listeners {
            // An error is of a connection that was reset before accept.
            while let Ok(accepted) = listener.accept_waiting() {
                serve_on_own_thread(accepted, shared);
            }
        }
    }
}

fn serve_on_own_thread(accepted: Accepted, shared: &Arc<Shared>) {
    let Accepted { stream, peer, syn } = accepted;
    let stream = Arc::new(stream);
    let mut open = shared.open();
    // Checked under the lock, so that `Server::stop` misses no connection.
    if shared.stopping.load(Ordering::Relaxed) {
        return;
    }
    open.retain(|stream| stream.strong_count() > 0);
    open.push(Arc::downgrade(&stream));
    drop(open);
    let shared = Arc::clone(shared);
    std::thread::spawn(move || {
        if let Err(error) = serve(&stream, peer, syn, &shared.received)
            && !shared.stopping.load(Ordering::Relaxed)
            && !shared.is_hushed.load(Ordering::Relaxed)
        {
            eprintln!("server: connection from {peer}: {error:#}");
        }
    });
}

fn serve(stream: &TcpStream, peer: SocketAddr, syn: SavedSyn, received: &AtomicU64) -> Result<()> {
    let mut request = Request::read(stream).context("request")?;
    loop {
        let (bytes, digest) = match request.direction {
            Direction::Upload => receive_payload(stream, request.bytes, received)?,
            Direction::Download => send_payload(stream, request.seed, request.bytes, &AtomicU64::new(0))?,
        };
        Report {
            bytes,
            digest,
            peer,
            syn: syn.clone(),
        }
        .write(stream)
        .context("report")?;
        if request.is_last {
            break;
        }
        match Request::read_next(stream).context("next request")? {
            Some(next) => request = next,
            None => return Ok(()),
        }
    }
    let surplus = io::copy(&mut &*stream, &mut io::sink()).context("the client's end of stream")?;
    ensure!(surplus == 0, "{surplus} bytes after the payload");
    Ok(())
}

/// Block size of the payload generator, independent of the size of writes.
const BLOCK_BYTES: usize = 64 * 1024;

fn send_payload(mut stream: &TcpStream, seed: u64, bytes: u64, sent: &AtomicU64) -> Result<(u64, u64)> {
    let mut generator = Rng::with_seed(seed);
    let mut digest = Xxh3::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        generator.fill(&mut block);
        let mut rest = &block[..left.min(BLOCK_BYTES as u64) as usize];
        digest.update(rest);
        while !rest.is_empty() {
            let written = retry(|| stream.write(rest))
                .with_context(|| format!("sent {} of {bytes} bytes", bytes - left))?;
            rest = &rest[written..];
            left -= written as u64;
            sent.fetch_add(written as u64, Ordering::Relaxed);
        }
    }
    Ok((bytes, digest.digest()))
}

fn receive_payload(mut stream: &TcpStream, bytes: u64, received: &AtomicU64) -> Result<(u64, u64)> {
    let mut digest = Xxh3::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut left = bytes;
    while left > 0 {
        let most = left.min(BLOCK_BYTES as u64) as usize;
        let read = retry(|| stream.read(&mut block[..most]))
            .with_context(|| format!("received {} of {bytes} bytes", bytes - left))?;
        ensure!(read > 0, "end of stream after {} of {bytes} bytes", bytes - left);
        digest.update(&block[..read]);
        left -= read as u64;
        received.fetch_add(read as u64, Ordering::Relaxed);
    }
    Ok((bytes, digest.digest()))
}

fn retry(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The client's request.
struct Request {
    direction: Direction,
    seed: u64,
    bytes: u64,
    /// Whether it is the last one of the connection.
    is_last: bool,
}

impl Request {
    fn write(&self, mut stream: &TcpStream) -> io::Result<()> {
        let is_download = u8::from(self.direction == Direction::Download);
        let mut message = vec![is_download | u8::from(!self.is_last) << 1];
        message.extend(self.seed.to_be_bytes());
        message.extend(self.bytes.to_be_bytes());
        stream.write_all(&message)
    }

    fn read(stream: &TcpStream) -> io::Result<Self> {
        Self::read_next(stream)?.ok_or_else(|| ErrorKind::UnexpectedEof.into())
    }

    /// Reads the next request; none at the end of stream.
    fn read_next(mut stream: &TcpStream) -> io::Result<Option<Self>> {
        let mut kind = [0];
        if retry(|| stream.read(&mut kind))? == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            direction: match kind[0] & 1 {
                0 => Direction::Upload,
                _ => Direction::Download,
            },
            seed: read_u64(stream)?,
            bytes: read_u64(stream)?,
            is_last: kind[0] & 2 == 0,
        }))
    }
}

/// The server's report.
struct Report {
    bytes: u64,
    digest: u64,
    peer: SocketAddr,
    syn: SavedSyn,
}

impl Report {
    fn write(&self, mut stream: &TcpStream) -> io::Result<()> {
        let peer_v6 = match self.peer.ip() {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        let syn_len = u16::try_from(self.syn.bytes().len()).expect("headers fit into 64 KiB");
        let mut message = Vec::new();
        message.extend(self.bytes.to_be_bytes());
        message.extend(self.digest.to_be_bytes());
        message.extend(peer_v6.octets());
        message.extend(self.peer.port().to_be_bytes());
        message.extend(syn_len.to_be_bytes());
        message.extend(self.syn.bytes());
        stream.write_all(&message)
    }

    fn read(mut stream: &TcpStream) -> Result<Self> {
        let bytes = read_u64(stream)?;
        let digest = read_u64(stream)?;
        let address = Ipv6Addr::from(read_array::<16>(stream)?).to_canonical();
        let port = u16::from_be_bytes(read_array(stream)?);
        let mut syn = vec![0; u16::from_be_bytes(read_array(stream)?).into()];
        stream.read_exact(&mut syn)?;
        Ok(Self {
            bytes,
            digest,
            peer: (address, port).into(),
            syn: SavedSyn::parse(syn)?,
        })
    }
}

fn read_u64(stream: &TcpStream) -> io::Result<u64> {
    read_array(stream).map(u64::from_be_bytes)
}

fn read_array<const N: usize>(mut stream: &TcpStream) -> io::Result<[u8; N]> {
    let mut array = [0; N];
    stream.read_exact(&mut array)?;
    Ok(array)
}
