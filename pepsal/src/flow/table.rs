//! The table of flows: those that the daemon has accepted, each holding its place in the kernel's map.

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

/// How far a flow has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Accepted; the server has not answered yet.
    Pending,
    /// Both legs are connected.
    Open,
}

/// A flow as others may look at it.
#[derive(Debug)]
pub struct Flow {
    /// Its number, which no other flow of this process has.
    pub id: u64,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The original destination.
    pub server: SocketAddr,
    /// What it has carried, and when.
    pub progress: Progress,
    /// Cancelled when this flow has to end.
    pub stop: CancellationToken,
    closed: AtomicBool,
    state: AtomicU8,
    legs: [OnceLock<Watched>; 2],
    counted: Mutex<Counted>,
}

/// A leg as its flow looks at it, without keeping it from being closed.
#[derive(Debug)]
struct Watched {
    stream: Weak<Connection>,
    traffic: Option<Arc<Traffic>>,
}

/// How much of a flow is in the totals.
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

/// A flow at one moment.
#[derive(Debug)]
pub struct Observation {
    /// Bytes from the client to the server.
    pub up: u64,
    /// Bytes from the server to the client.
    pub down: u64,
    /// The client's and the server's leg, where there is one.
    pub legs: [Option<LegObservation>; 2],
}

/// A leg at one moment.
#[derive(Debug)]
pub struct LegObservation {
    /// Its socket.
    pub stream: Arc<Connection>,
    /// The interface that it leaves through, when that is known.
    pub traffic: Option<Arc<Traffic>>,
    /// What the kernel says of it.
    pub info: tcp_info,
}

impl Flow {
    /// Lets a leg be looked at, whose interface is counted in `traffic`.
    pub fn watch(&self, side: Side, stream: &Arc<Connection>, traffic: Option<Arc<Traffic>>) {
        let watched = Watched {
            stream: Arc::downgrade(stream),
            traffic,
        };
        let first = self.legs[side as usize].set(watched);
        debug_assert!(first.is_ok(), "a flow has one leg on either side");
    }

    /// Looks at the flow, and adds what it did since it was last looked at to the totals. So these are right whenever
    /// somebody reads them, and cost the relay nothing.
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

    /// Whether [`Flow::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// How far it has come.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            0 => State::Pending,
            _ => State::Open,
        }
    }

    /// Both legs are connected now.
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

/// All flows.
pub struct FlowTable {
    kernel: Arc<FlowMap>,
    open: Mutex<HashMap<FlowKey, Arc<Flow>>>,
    next_id: AtomicU64,
}

impl FlowTable {
    /// An empty table over the kernel's map.
    pub fn new(kernel: Arc<FlowMap>) -> Self {
        Self {
            kernel,
            open: Mutex::default(),
            next_id: AtomicU64::new(1),
        }
    }

    /// Enters an accepted connection, and takes what the kernel recorded of its SYN. `stop` is cancelled when it has to
    /// end. `None` is one too many: its record had expired, and others have taken its place.
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

    /// How many flows are open or pending.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Every flow at present.
    pub fn snapshot(&self) -> Vec<Arc<Flow>> {
        self.lock().values().cloned().collect()
    }

    /// How many flows the kernel's map has, open ones among them.
    pub fn entries(&self) -> usize {
        self.kernel.all().len()
    }

    /// How many connections the kernel has admitted that are not accepted yet.
    pub fn pending(&self) -> usize {
        // Before flows have to wait for the lock.
        let entries = self.kernel.all();
        let open = self.lock();
        entries.iter().filter(|(key, _)| !open.contains_key(key)).count()
    }

    /// Frees the places of connections whose handshake was not completed within `age`, and returns how many there were
    /// and how many are younger. A handshake that is completed later is accepted all the same. Where a client's further
    /// connections pass because of the bound for each client, its handshakes have `age_at_client_limit`.
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
            // A new SYN may have come since the walk.
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

/// A flow's place in the table and in the kernel's map, free again when this is dropped.
pub struct Place {
    table: Arc<FlowTable>,
    key: FlowKey,
    /// When its SYN came.
    time_ns: u64,
    /// The flow.
    pub flow: Arc<Flow>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.table.lock();
        // A newer flow between the same ports may have taken the place over.
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
    /// The table that `-l` writes: one line a flow, oldest first.
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
