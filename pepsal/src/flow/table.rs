//! The flow table: accepted connections, each with its entry in the kernel's flow map.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use nix::libc::tcp_info;
use pepsal_ebpf::{FlowKey, SynRecord};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    flow::{
        metrics::{Event, Metrics, Traffic},
        progress::Progress,
        side::Side,
    },
    host::clock::monotonic_ns,
    tcp::{connection::Connection, options},
    wire::flow_map::FlowMap,
};

/// State of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Accepted; the server leg is not connected yet.
    Pending,
    /// Both legs are connected.
    Open,
}

/// A flow, for monitoring.
#[derive(Debug)]
pub struct Flow {
    /// Unique number in this process.
    pub id: u64,
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub progress: Progress,
    /// Cancelled to reset this flow.
    pub stop: CancellationToken,
    closed: AtomicBool,
    state: AtomicU8,
    legs: [OnceLock<Watched>; 2],
    counted: Mutex<Counted>,
}

/// A leg under observation, by a weak reference to its stream.
#[derive(Debug)]
struct Watched {
    stream: Weak<Connection>,
    traffic: Option<Arc<Traffic>>,
}

/// Progress of a flow that the totals include.
#[derive(Debug, Default)]
struct Counted {
    up: u64,
    down: u64,
    legs: [CountedLeg; 2],
}

#[derive(Debug, Default, Clone, Copy)]
struct CountedLeg {
    sent: u64,
    received: u64,
    segments: u32,
    retransmitted: u32,
}

/// Figures of a flow at one moment.
#[derive(Debug)]
pub struct Observation {
    /// Bytes, from the client to the server.
    pub up: u64,
    /// Bytes, from the server to the client.
    pub down: u64,
    pub legs: [Option<LegObservation>; 2],
}

/// Figures of a leg at one moment.
#[derive(Debug)]
pub struct LegObservation {
    pub stream: Arc<Connection>,
    /// Interface of the leg, if known.
    pub traffic: Option<Arc<Traffic>>,
    pub info: tcp_info,
}

impl Flow {
    /// Registers a leg for observation; `traffic` has the counters of its interface.
    pub fn watch(&self, side: Side, stream: &Arc<Connection>, traffic: Option<Arc<Traffic>>) {
        let watched = Watched {
            stream: Arc::downgrade(stream),
            traffic,
        };
        let first = self.legs[side as usize].set(watched);
        debug_assert!(first.is_ok(), "a flow has one leg on either side");
    }

    /// Reads the figures of the flow, and adds its progress since the last observation to the totals. So the
    /// totals are right at each read, at no cost to the relay.
    pub fn observe(&self, metrics: &Metrics) -> Observation {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let (up, down) = (
            self.progress.up.load(Ordering::Relaxed),
            self.progress.down.load(Ordering::Relaxed),
        );
        metrics.carried(up - counted.up, down - counted.down);
        (counted.up, counted.down) = (up, down);
        let legs = [Side::Client, Side::Server].map(|side| {
            let watched = self.legs[side as usize].get()?;
            let counted = &mut counted.legs[side as usize];
            let (sent, received) = match side {
                Side::Client => (down, up),
                Side::Server => (up, down),
            };
            counted.advance_bytes(sent, received, watched.traffic.as_deref());
            let stream = watched.stream.upgrade()?;
            let info = options::tcp_info(&*stream).ok()?;
            counted.advance_segments(&info, watched.traffic.as_deref());
            Some(LegObservation {
                stream,
                traffic: watched.traffic.clone(),
                info,
            })
        });
        Observation { up, down, legs }
    }

    /// Ends the flow by a reset of both legs.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.stop.cancel();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Returns the state of the flow.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            0 => State::Pending,
            _ => State::Open,
        }
    }

    pub fn set_open(&self) {
        self.state.store(State::Open as u8, Ordering::Relaxed);
    }
}

impl CountedLeg {
    fn advance_bytes(&mut self, sent: u64, received: u64, traffic: Option<&Traffic>) {
        if let Some(traffic) = traffic {
            traffic.sent.fetch_add(sent - self.sent, Ordering::Relaxed);
            traffic
                .received
                .fetch_add(received - self.received, Ordering::Relaxed);
        }
        (self.sent, self.received) = (sent, received);
    }

    fn advance_segments(&mut self, info: &tcp_info, traffic: Option<&Traffic>) {
        let (segments, retransmitted) = (info.tcpi_data_segs_out, info.tcpi_total_retrans);
        if let Some(traffic) = traffic {
            let more = |now: u32, before: u32| u64::from(now.wrapping_sub(before));
            traffic
                .segments
                .fetch_add(more(segments, self.segments), Ordering::Relaxed);
            traffic
                .retransmitted
                .fetch_add(more(retransmitted, self.retransmitted), Ordering::Relaxed);
        }
        (self.segments, self.retransmitted) = (segments, retransmitted);
    }
}

pub struct FlowTable {
    kernel: Arc<FlowMap>,
    open: Mutex<HashMap<FlowKey, Arc<Flow>>>,
    next_id: AtomicU64,
}

impl FlowTable {
    /// Creates an empty table over the kernel's flow map.
    pub fn new(kernel: Arc<FlowMap>) -> Self {
        Self {
            kernel,
            open: Mutex::default(),
            next_id: AtomicU64::new(1),
        }
    }

    /// Adds an accepted connection, and removes its SYN record from the kernel's map. `stop` is cancelled to
    /// reset the flow. Returns `None` when its record had expired and the map is full.
    pub fn enter(
        self: &Arc<Self>,
        client: SocketAddr,
        server: SocketAddr,
        stop: CancellationToken,
        metrics: &Metrics,
    ) -> Option<(Place, SynRecord)> {
        let key = FlowKey::between(client, server);
        let flow = Arc::new(Flow {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            client,
            server,
            progress: Progress::default(),
            stop,
            closed: AtomicBool::new(false),
            state: AtomicU8::new(State::Pending as u8),
            legs: Default::default(),
            counted: Mutex::default(),
        });
        let mut open = self.lock();
        let record = match self.kernel.record(&key) {
            Some(record) => record,
            None if self.kernel.insert(&key, &SynRecord::EMPTY.head).is_ok() => {
                metrics.count(Event::RecordMissing);
                SynRecord::EMPTY
            }
            None => {
                metrics.count(Event::OverLimit);
                return None;
            }
        };
        open.insert(key, flow.clone());
        let place = Place {
            table: self.clone(),
            key,
            time_ns: record.time_ns,
            flow,
        };
        Some((place, record))
    }

    /// Returns the number of open and pending flows.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    pub fn snapshot(&self) -> Vec<Arc<Flow>> {
        self.lock().values().cloned().collect()
    }

    /// Returns the number of entries in the kernel's map, including open flows.
    pub fn entries(&self) -> usize {
        self.kernel.all().len()
    }

    /// Returns the number of recorded connections that are not accepted yet.
    pub fn pending(&self) -> usize {
        // Before the lock, for which flows wait.
        let entries = self.kernel.all();
        let open = self.lock();
        entries.iter().filter(|(key, _)| !open.contains_key(key)).count()
    }

    /// Removes the records of connections whose handshake took longer than `age`. Returns the number of
    /// removed records and of younger ones. A handshake that completes later is still accepted. Records of a client at its
    /// limit of connections expire after `age_at_client_limit`.
    pub fn expire(&self, age: Duration, age_at_client_limit: Duration) -> (u64, u64) {
        let now = monotonic_ns();
        let oldest = |age: Duration| now.saturating_sub(age.as_nanos() as u64);
        let (mut expired, mut young) = (0, 0);
        for (key, head) in self.kernel.all() {
            let oldest = oldest(match self.kernel.is_at_client_limit(&key) {
                true => age_at_client_limit,
                false => age,
            });
            let open = self.lock();
            if open.contains_key(&key) {
                continue;
            }
            if head.time_ns >= oldest {
                young += 1;
                continue;
            }
            // A new SYN may have arrived since the read of the map.
            match self.kernel.time_ns(&key) {
                Some(time_ns) if time_ns < oldest => {
                    self.kernel.remove(&key);
                    expired += 1;
                }
                Some(_) => young += 1,
                None => {}
            }
        }
        (expired, young)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FlowKey, Arc<Flow>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entry of a flow in the table and in the kernel's map, removed on drop.
pub struct Place {
    table: Arc<FlowTable>,
    key: FlowKey,
    /// Arrival of the SYN, in nanoseconds of CLOCK_MONOTONIC.
    time_ns: u64,
    pub flow: Arc<Flow>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.table.lock();
        // A newer flow with the same addresses and ports may have replaced the entry.
        if open
            .get(&self.key)
            .is_some_and(|flow| Arc::ptr_eq(flow, &self.flow))
        {
            open.remove(&self.key);
            self.table.kernel.remove_of(&self.key, self.time_ns);
        }
    }
}

impl fmt::Display for FlowTable {
    /// Formats the table of `-l`: one line per flow, oldest first.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut flows = self.snapshot();
        flows.sort_by_key(|flow| flow.progress.started());
        let now = humantime::format_rfc3339_seconds(SystemTime::now());
        writeln!(f, "=== {now} {} flows ===", flows.len())?;
        if flows.is_empty() {
            return Ok(());
        }
        let header = ("CLIENT", "SERVER", "STATE", "AGE", "IDLE", "UP", "DOWN");
        let (client, server, state, age, idle, up, down) = header;
        writeln!(
            f,
            "{client:<42} {server:<42} {state:<8} {age:>10} {idle:>10} {up:>15} {down:>15}"
        )?;
        let now = Instant::now();
        for flow in flows {
            let (client, server) = (flow.client.to_string(), flow.server.to_string());
            let state = match flow.state() {
                State::Pending => "pending",
                State::Open => "open",
            };
            let age = format!("{} s", (now - flow.progress.started()).as_secs());
            let idle = format!("{} s", (now - flow.progress.last()).as_secs());
            let up = flow.progress.up.load(Ordering::Relaxed);
            let down = flow.progress.down.load(Ordering::Relaxed);
            writeln!(
                f,
                "{client:<42} {server:<42} {state:<8} {age:>10} {idle:>10} {up:>15} {down:>15}"
            )?;
        }
        Ok(())
    }
}
