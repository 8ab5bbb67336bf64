//! Sends UDP packets at a constant rate and measures each: a probe of a link, or load on it.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::emulator::come_before_programs;
use crate::netns::Namespace;

/// IPv4 and UDP headers of a packet.
const HEADER_BYTES: usize = 28;
/// The sequence number at the start of the payload.
const SEQUENCE_BYTES: usize = 8;
/// Interval at which the receiver checks for the stop.
const TICK: Duration = Duration::from_millis(100);

/// A running stream; dropping it ends the stream.
#[derive(Debug)]
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    fates: Arc<Mutex<Vec<Datagram>>>,
    threads: Vec<JoinHandle<()>>,
}

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Send time.
    pub sent: Instant,
    /// Arrival time; none if lost or in flight.
    pub arrived: Option<Instant>,
}

impl Datagram {
    /// Returns the one-way delay.
    pub fn delay(&self) -> Option<Duration> {
        self.arrived.map(|arrived| arrived - self.sent)
    }
}

impl Datagrams {
    /// Sends a packet of `bytes`, IPv4 and UDP headers included, from one namespace to an IPv4 address of
    /// another, once per interval.
    ///
    /// # Errors
    /// When a socket cannot be created, or `bytes` is too small for headers and sequence number.
    pub fn start(
        from: &Namespace,
        to: &Namespace,
        address: IpAddr,
        interval: Duration,
        bytes: usize,
    ) -> Result<Self> {
        let least = HEADER_BYTES + SEQUENCE_BYTES;
        ensure!(bytes >= least, "a packet has {least} bytes at least, not {bytes}");
        let bind = |namespace: &Namespace, address: SocketAddr| namespace.run(|| UdpSocket::bind(address));
        let receiver = bind(to, (address, 0).into()).context("the receiver's socket")?;
        receiver.set_read_timeout(Some(TICK))?;
        let sender = bind(from, ([0, 0, 0, 0], 0).into()).context("the sender's socket")?;
        sender.connect(receiver.local_addr()?)?;

        let mut stream = Self {
            stop: Arc::default(),
            fates: Arc::default(),
            threads: Vec::new(),
        };
        let (stop, fates) = (Arc::clone(&stream.stop), Arc::clone(&stream.fates));
        stream.spawn("datagrams in", move || receive(&receiver, &fates, &stop));
        let (stop, fates) = (Arc::clone(&stream.stop), Arc::clone(&stream.fates));
        let payload = vec![0; bytes - HEADER_BYTES];
        stream.spawn("datagrams out", move || {
            send(&sender, payload, interval, &fates, &stop)
        });
        Ok(stream)
    }

    /// Returns the packets sent in a period.
    pub fn sent_within(&self, from: Instant, to: Instant) -> Vec<Datagram> {
        let fates = lock(&self.fates);
        let start = fates.partition_point(|datagram| datagram.sent < from);
        let end = fates.partition_point(|datagram| datagram.sent < to);
        fates[start..end.max(start)].to_vec()
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
        self.threads
            .push(thread.expect("threads are far from their limit"));
    }
}

impl Drop for Datagrams {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // The panic has been printed; a second panic here would abort.
            let _ = thread.join();
        }
    }
}

fn lock(fates: &Mutex<Vec<Datagram>>) -> std::sync::MutexGuard<'_, Vec<Datagram>> {
    fates.lock().unwrap_or_else(PoisonError::into_inner)
}

fn send(
    socket: &UdpSocket,
    mut payload: Vec<u8>,
    interval: Duration,
    fates: &Mutex<Vec<Datagram>>,
    stop: &AtomicBool,
) {
    come_before_programs();
    let mut next = Instant::now();
    for sequence in 0_u64.. {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        if stop.load(Ordering::Relaxed) {
            return;
        }
        payload[..SEQUENCE_BYTES].copy_from_slice(&sequence.to_be_bytes());
        lock(fates).push(Datagram {
            sent: Instant::now(),
            arrived: None,
        });
        // A refused packet counts as lost.
        let _ = socket.send(&payload);
        next += interval;
    }
}

fn receive(socket: &UdpSocket, fates: &Mutex<Vec<Datagram>>, stop: &AtomicBool) {
    // Measures the delay of the link, not of the scheduler.
    come_before_programs();
    let mut start = [0; SEQUENCE_BYTES];
    while !stop.load(Ordering::Relaxed) {
        // Without an error the packet is the sender's; the rest of its payload is truncated.
        if socket.recv(&mut start).is_err() {
            continue;
        }
        let now = Instant::now();
        let index = usize::try_from(u64::from_be_bytes(start)).unwrap_or(usize::MAX);
        if let Some(datagram) = lock(fates).get_mut(index) {
            datagram.arrived.get_or_insert(now);
        }
    }
}
