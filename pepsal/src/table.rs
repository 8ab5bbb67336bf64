//! The table of flows: those that the daemon has accepted, each holding its place in the kernel's map.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, SystemTime},
};

use pepsal_ebpf::{FlowKey, SynRecord};
use tokio::time::Instant;

use crate::{
    metrics::{Event, Metrics},
    relay::Progress,
    steer::{FlowMap, monotonic_ns},
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
    /// The client's address and port.
    pub client: SocketAddr,
    /// The original destination.
    pub server: SocketAddr,
    /// What it has carried, and when.
    pub progress: Progress,
    state: AtomicU8,
}

impl Flow {
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

/// All flows.
pub struct FlowTable {
    kernel: Arc<FlowMap>,
    open: Mutex<HashMap<FlowKey, Arc<Flow>>>,
}

impl FlowTable {
    /// An empty table over the kernel's map.
    pub fn new(kernel: Arc<FlowMap>) -> Self {
        Self {
            kernel,
            open: Mutex::default(),
        }
    }

    /// Enters an accepted connection, and takes what the kernel recorded of its SYN.
    pub fn enter(
        self: &Arc<Self>,
        client: SocketAddr,
        server: SocketAddr,
        metrics: &Metrics,
    ) -> (Place, SynRecord) {
        let key = FlowKey::between(client, server);
        let progress = Progress::default();
        let flow = Arc::new(Flow {
            client,
            server,
            progress,
            state: AtomicU8::new(State::Pending as u8),
        });
        let mut open = self.lock();
        let record = self.kernel.record(&key).unwrap_or_else(|| {
            metrics.count(Event::RecordMissing);
            // A full map means that the flow is one too many; it is here now, and the next ones pass.
            let _ = self.kernel.insert(&key, &SynRecord::EMPTY);
            SynRecord::EMPTY
        });
        open.insert(key, flow.clone());
        (
            Place {
                table: self.clone(),
                key,
                flow,
            },
            record,
        )
    }

    /// How many flows are open or pending.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Every flow at present.
    pub fn snapshot(&self) -> Vec<Arc<Flow>> {
        self.lock().values().cloned().collect()
    }

    /// How many connections the kernel has admitted that are not accepted yet.
    pub fn pending(&self) -> usize {
        let open = self.lock();
        self.kernel
            .keys()
            .iter()
            .filter(|key| !open.contains_key(key))
            .count()
    }

    /// Frees the places of connections whose handshake was not completed within `age`, and returns how many there were
    /// and how many are younger. A handshake that is completed later is accepted all the same.
    pub fn expire(&self, age: Duration) -> (u64, u64) {
        let oldest = monotonic_ns().saturating_sub(age.as_nanos() as u64);
        let (mut expired, mut young) = (0, 0);
        for key in self.kernel.keys() {
            let open = self.lock();
            if open.contains_key(&key) {
                continue;
            }
            match self.kernel.record(&key) {
                Some(record) if record.time_ns < oldest => {
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
            self.table.kernel.remove(&self.key);
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
