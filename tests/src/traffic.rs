//! Verified transfers: pseudo-random bytes one way, digests compared at the end.
//!
//! The client opens a connection and says what it wants: direction, seed and length. The payload follows in that direction.
//! Last, the server reports the digest of the payload as it sent or received it, the client's address and the client's SYN.
//! A [`Session`] asks for one download after the other on one connection.

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

/// Which way the payload goes, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Client to server.
    Upload,
    /// Server to client.
    Download,
}

/// One transfer to be made.
#[derive(Clone, Debug)]
pub struct Transfer {
    direction: Direction,
    bytes: u64,
    seed: u64,
    connector: Connector,
    progress: Arc<AtomicU64>,
    cancel: Cancel,
}

/// Ends transfers before their time.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Mutex<Cancelled>>);

#[derive(Debug, Default)]
struct Cancelled {
    is_cancelled: bool,
    open: Vec<Weak<TcpStream>>,
}

impl Cancel {
    /// Shuts the connections down at the client's end: their transfers fail at once, and so do those that begin later.
    pub fn cancel(&self) {
        let mut cancelled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        cancelled.is_cancelled = true;
        for stream in cancelled.open.drain(..).filter_map(|stream| stream.upgrade()) {
            // Fails on a connection that has just ended, which is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Whether it has been called for.
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

/// A transfer that has run to its end.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// From the call of connect to the last byte of the server's report.
    pub elapsed: Duration,
    /// Payload bytes.
    pub bytes: u64,
    /// Whether both ends counted and digested the same payload.
    pub intact: bool,
    /// The client's own address and port.
    pub local: SocketAddr,
    /// The client's address and port as the server saw them.
    pub peer: SocketAddr,
    /// The client's SYN as the server's kernel received it.
    pub syn: SavedSyn,
}

impl Outcome {
    /// Its path: [`SavedSyn::path`].
    pub fn path(&self) -> Path {
        self.syn.path()
    }
}

impl Transfer {
    /// A transfer of `bytes` from client to server.
    pub fn upload(bytes: u64) -> Self {
        Self::new(Direction::Upload, bytes)
    }

    /// A transfer of `bytes` from server to client.
    pub fn download(bytes: u64) -> Self {
        Self::new(Direction::Download, bytes)
    }

    /// A transfer of `bytes`.
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

    /// The seed of the payload, 1 by default.
    pub fn seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// How the client connects.
    pub fn connector(self, connector: Connector) -> Self {
        Self { connector, ..self }
    }

    /// Where to count the payload bytes that the client has written or read so far. (Written ones may still be far from the
    /// server: [`Server::received`].)
    pub fn progress(self, progress: Arc<AtomicU64>) -> Self {
        Self { progress, ..self }
    }

    /// What ends it before its time.
    pub fn cancelled_by(self, cancel: Cancel) -> Self {
        Self { cancel, ..self }
    }

    /// Connects from `namespace` to `server` and moves the payload.
    ///
    /// # Errors
    /// When the connection fails, or ends otherwise than cleanly. A wrong digest is not an error here: see
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

/// A connection that is kept from one download to the next.
#[derive(Debug)]
pub struct Session(Arc<TcpStream>);

impl Session {
    /// Connects from `namespace` to `server`.
    ///
    /// # Errors
    /// When the connection fails, or `cancel` has been called for.
    pub fn open(
        connector: &Connector,
        namespace: &Namespace,
        server: SocketAddr,
        cancel: &Cancel,
    ) -> Result<Self> {
        let stream = connector.connect(namespace, server).context("connect")?;
        Ok(Self(cancel.watch(stream)?))
    }

    /// Asks for `bytes` drawn from `seed` and reads them. Returns the time from the request to the last byte of the server's
    /// report, and whether both ends digested the same.
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
    /// Starts with the namespace's default congestion control.
    ///
    /// # Errors
    /// When the namespace has no room for sockets.
    pub fn start(namespace: &Namespace) -> Result<Self> {
        Self::listen(namespace, None)
    }

    /// Starts with a congestion control of its own, for instance `cubic`.
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
            // Daemons that start meanwhile do not inherit it.
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

    /// The port it listens on, in both families.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where clients of a [`Topology`](crate::Topology) reach it.
    pub fn address(&self, family: Family) -> SocketAddr {
        (family.server(), self.port).into()
    }

    /// Payload bytes received so far, over all connections.
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Says no more of connections that fail, which it does on standard error: for those whose clients cancel transfers.
    pub fn hush(&self) {
        self.shared.is_hushed.store(true, Ordering::Relaxed);
    }

    /// Ends all connections and accepts no more.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared
            .stop
            .write(1)
            .expect("the counter of an eventfd takes 1");
        for stream in self.shared.open().drain(..).filter_map(|stream| stream.upgrade()) {
            // Fails on a connection that has just ended, which is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; panicking here as well would abort.
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
        // Interrupted by a signal or not, the listeners are asked next.
        let _ = poll(&mut ready, PollTimeout::NONE);
        for listener in listeners {
            // What fails here is a connection that was reset before it was accepted.
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
    // Looked at under the lock, so that no connection escapes `Server::stop`.
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

/// The payload is drawn from the generator in blocks of this size, whatever a write takes.
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

/// What the client wants.
struct Request {
    direction: Direction,
    seed: u64,
    bytes: u64,
    /// Whether the connection ends with it.
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

    /// The next request, if another comes.
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

/// What the server saw.
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
