//! Flows of every kind, checked at both ends.
//!
//! A client opens a connection and sends a [`Plan`], and both ends generate the payload from the plan's seed.
//! The sender of payload ends its direction by FIN after the last byte, unless the plan has a reset by the
//! client.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Result;
use fastrand::Rng;
use pepsal_tests::{Connector, Family, Listener, Namespace, reset};

use super::totals::Totals;

#[derive(Clone, Copy)]
struct Plan {
    seed: u64,
    bytes: u64,
    kind: Kind,
    /// Pause of the client in the middle, in milliseconds.
    pause_ms: u16,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// The client sends and closes its direction; then the server confirms.
    Upload,
    /// The server sends while the client's direction stays open.
    Download,
    /// The server sends after the client has closed its direction.
    HalfClosed,
    /// The client sends half of the payload, and resets.
    UploadReset,
    /// The client receives half of the payload, and resets.
    DownloadReset,
}

const KINDS: [Kind; 5] = [
    Kind::Upload,
    Kind::Download,
    Kind::HalfClosed,
    Kind::UploadReset,
    Kind::DownloadReset,
];

/// The server's confirmation of the complete payload.
const RECEIPT: u8 = 0x2a;

impl Plan {
    /// Sizes from a byte to 2 MiB, evenly over orders of magnitude; one flow in eight pauses for seconds.
    fn draw(random: &mut Rng) -> Self {
        Self {
            seed: random.u64(..),
            bytes: 2_f64.powf(random.f64() * 21.0) as u64,
            kind: KINDS[random.usize(..KINDS.len())],
            pause_ms: match random.u8(..8) {
                0 => random.u16(1000..5000),
                _ => random.u16(..100),
            },
        }
    }

    fn to_bytes(self) -> [u8; 17] {
        let mut bytes = [0; 17];
        bytes[0] = self.kind as u8;
        bytes[1..9].copy_from_slice(&self.seed.to_be_bytes());
        bytes[9..].copy_from_slice(&self.bytes.to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 17]) -> Option<Self> {
        let number = |range: std::ops::Range<usize>| Some(u64::from_be_bytes(bytes[range].try_into().ok()?));
        Some(Self {
            kind: *KINDS.get(usize::from(bytes[0]))?,
            seed: number(1..9)?,
            bytes: number(9..17)?,
            pause_ms: 0,
        })
    }
}

/// Clients, each with one flow after the other.
pub struct Flows {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Flows {
    /// Starts `count` clients.
    pub fn start(
        namespace: &Namespace,
        server: &Server,
        totals: &Arc<Totals>,
        workers: usize,
        seed: u64,
    ) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let workers = (0..workers as u64).map(|worker| {
            let (stop, totals, port) = (stop.clone(), totals.clone(), server.port);
            namespace.spawn(move || {
                let mut random = Rng::with_seed(seed.wrapping_add(worker));
                while !stop.load(Ordering::Relaxed) {
                    let family = Family::BOTH[random.usize(..2)];
                    run(Plan::draw(&mut random), (family.server(), port).into(), &totals);
                }
            })
        });
        Self {
            workers: workers.collect(),
            stop,
        }
    }

    /// Waits for the end of open flows.
    pub fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

fn run(plan: Plan, server: SocketAddr, totals: &Totals) {
    let begin = Instant::now();
    let stream = match Connector::default().connect_here(server) {
        Ok(stream) => stream,
        Err(error) => {
            totals.broke(begin, false, &error, "connect");
            // Waits, because the gateway refuses at once, and a retry would be refused too.
            return thread::sleep(Duration::from_millis(100));
        }
    };
    // A split connection is accepted before the server is connected: it may be refused until the server has
    // sent data.
    match client(plan, &stream, totals) {
        Ok(()) if matches!(plan.kind, Kind::UploadReset | Kind::DownloadReset) => {
            totals.cancelled.add(1);
            // The kernel has closed this socket already: no reset is needed.
            let _ = reset(stream);
        }
        Ok(()) => totals.complete.add(1),
        Err(Ended { error, received }) => {
            totals.broke(begin, received, &error, &format!("client, {} bytes", plan.bytes));
        }
    }
}

struct Ended {
    error: io::Error,
    /// Whether data had been received, so that the connection was open end to end.
    received: bool,
}

fn client(plan: Plan, mut stream: &TcpStream, totals: &Totals) -> Result<(), Ended> {
    let new = |error| Ended {
        error,
        received: false,
    };
    stream.write_all(&plan.to_bytes()).map_err(new)?;
    let pause = Duration::from_millis(plan.pause_ms.into());
    let half = plan.bytes / 2;
    match plan.kind {
        Kind::Upload => {
            let mut payload = Payload::of(plan);
            payload.send(stream, half).map_err(new)?;
            thread::sleep(pause);
            payload.send(stream, plan.bytes - half).map_err(new)?;
            stream.shutdown(Shutdown::Write).map_err(new)?;
            let mut receipt = Vec::new();
            stream.take(2).read_to_end(&mut receipt).map_err(new)?;
            if receipt != [RECEIPT] {
                totals.damaged(
                    plan.bytes,
                    format!("upload of {} bytes: ended without receipt", plan.bytes),
                );
            }
            Ok(())
        }
        Kind::UploadReset => {
            Payload::of(plan).send(stream, half).map_err(new)?;
            thread::sleep(pause);
            Ok(())
        }
        Kind::Download | Kind::HalfClosed | Kind::DownloadReset => {
            if plan.kind == Kind::HalfClosed {
                stream.shutdown(Shutdown::Write).map_err(new)?;
            }
            let mut payload = Payload::of(plan);
            let received = |payload: &Payload| payload.done > 0;
            payload
                .check(stream, half, "download", totals)
                .map_err(|error| Ended {
                    error,
                    received: received(&payload),
                })?;
            thread::sleep(pause);
            if plan.kind == Kind::DownloadReset {
                return Ok(());
            }
            payload
                .check(stream, plan.bytes - half, "download", totals)
                .and_then(|()| expect_end(stream, plan, totals))
                .map_err(|error| Ended {
                    error,
                    received: received(&payload),
                })
        }
    }
}

/// Generator of a plan's payload.
struct Payload {
    random: Rng,
    block: Vec<u8>,
    /// Used bytes of the block.
    used: usize,
    done: u64,
    total: u64,
}

impl Payload {
    fn of(plan: Plan) -> Self {
        const BLOCK_BYTES: usize = 16 * 1024;
        Self {
            random: Rng::with_seed(plan.seed),
            block: vec![0; BLOCK_BYTES],
            used: BLOCK_BYTES,
            done: 0,
            total: plan.bytes,
        }
    }

    /// Returns the next bytes, at most `most`.
    fn next(&mut self, most: u64) -> &[u8] {
        if self.used == self.block.len() {
            self.random.fill(&mut self.block);
            self.used = 0;
        }
        let bytes = (self.block.len() - self.used).min(usize::try_from(most).unwrap_or(usize::MAX));
        let start = self.used;
        self.used += bytes;
        self.done += bytes as u64;
        &self.block[start..start + bytes]
    }

    fn send(&mut self, mut stream: &TcpStream, bytes: u64) -> io::Result<()> {
        let end = self.done + bytes;
        while self.done < end {
            let left = end - self.done;
            stream.write_all(self.next(left))?;
        }
        Ok(())
    }

    /// Receives `count` bytes and compares them. An early end of stream counts as loss, and so do wrong
    /// bytes.
    fn check(&mut self, mut stream: &TcpStream, bytes: u64, what: &str, totals: &Totals) -> io::Result<()> {
        let end = self.done + bytes;
        let mut received = vec![0; self.block.len()];
        while self.done < end {
            let (left, done, total) = (end - self.done, self.done, self.total);
            let most = received.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = match stream.read(&mut received[..most]) {
                Ok(0) => {
                    totals.damaged(
                        total - done,
                        format!("{what}: orderly end after {done} of {total} bytes"),
                    );
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut rest = &received[..read];
            while !rest.is_empty() {
                let expected = self.next(rest.len() as u64);
                let (these, others) = rest.split_at(expected.len());
                if these != expected {
                    totals.damaged(
                        these.len() as u64,
                        format!("{what}: wrong bytes after {done} of {total}"),
                    );
                    return Err(ErrorKind::InvalidData.into());
                }
                rest = others;
            }
            totals.checked.add(read as u64);
        }
        Ok(())
    }
}

/// Checks that the end of stream follows the last byte.
fn expect_end(mut stream: &TcpStream, plan: Plan, totals: &Totals) -> io::Result<()> {
    let mut surplus = [0];
    if stream.read(&mut surplus)? > 0 {
        totals.damaged(1, format!("bytes after the last of {}", plan.bytes));
    }
    Ok(())
}

/// The server of all flows.
pub struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    acceptors: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on every address of a namespace.
    pub fn start(namespace: &Namespace, totals: Arc<Totals>) -> Result<Self> {
        let v4 = Listener::bind(namespace, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        let port = v4.port();
        let v6 = Listener::bind(namespace, (Ipv6Addr::UNSPECIFIED, port).into())?;
        let stop = Arc::<AtomicBool>::default();
        let acceptors = [v4, v6].map(|listener| {
            let (stop, totals) = (stop.clone(), totals.clone());
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // A timeout, or a connection that was reset before accept.
                    let Ok(accepted) = listener.accept(Duration::from_millis(200)) else {
                        continue;
                    };
                    let totals = totals.clone();
                    thread::spawn(move || serve(&accepted.stream, &totals));
                }
            })
        });
        Ok(Self {
            port,
            stop,
            acceptors: acceptors.into(),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for acceptor in self.acceptors.drain(..) {
            // The panic has been printed.
            let _ = acceptor.join();
        }
    }
}

/// Serves a connection. The client also detects a broken flow, and reports it; this end reports only wrong
/// bytes and early ends by FIN.
fn serve(mut stream: &TcpStream, totals: &Totals) {
    let mut plan = [0; 17];
    if stream.read_exact(&mut plan).is_err() {
        return;
    }
    let Some(plan) = Plan::from_bytes(plan) else {
        return totals.damaged(17, "a plan that was not sent".to_owned());
    };
    let mut payload = Payload::of(plan);
    match plan.kind {
        Kind::Upload => {
            let checked = payload.check(stream, plan.bytes, "upload", totals);
            if checked.and_then(|()| expect_end(stream, plan, totals)).is_ok() {
                // The client may have ended by a fault, and reports it itself.
                let _ = stream.write_all(&[RECEIPT]);
            }
        }
        // No FIN may arrive, neither after half of the payload nor later.
        Kind::UploadReset => {
            let _ = payload.check(stream, plan.bytes, "upload that was reset", totals);
        }
        Kind::Download | Kind::HalfClosed | Kind::DownloadReset => {
            if payload.send(stream, plan.bytes).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
                let _ = stream.read(&mut [0]);
            }
        }
    }
}
