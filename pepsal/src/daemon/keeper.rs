//! What has to be looked after while flows come and go: the sign of life, places that were never taken, the alarms at
//! the limit, the periodic table.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::fd::OwnedFd,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures_util::FutureExt;
use pepsal_ebpf::Counter;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::Instant,
};
use tracing::{info, warn};

use crate::{
    daemon::{service_manager::ServiceManager, workers::Workers},
    flow::{Shared, metrics::Event},
    wire::programs::Programs,
};

/// How often the keeper makes its round; the programs take a daemon for hung that misses six of them.
pub const ROUND: Duration = Duration::from_millis(500);

/// How long a handshake may take before its place is given up: longer than a SYN cookie's way over two satellite hops.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// The same at the limit, when waiting for the absent shuts out the present.
const HANDSHAKE_WHEN_FULL: Duration = Duration::from_secs(5);
/// How often places are looked for that nobody will take.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(2);

/// PEPsal's interval between two tables.
const TABLE_INTERVAL: Duration = Duration::from_secs(300);

/// The keeper's memory from round to round.
pub struct Keeper {
    limit: u64,
    crowded: bool,
    /// When a connection was last refused a place, as long as the limit is what it was refused for.
    full: Option<Instant>,
    refused: u64,
    intercepted: u64,
    /// Whether connections were being set up when that was last looked at.
    unsettled: bool,
    /// The walk over the map of flows that is under way, on a thread that may block.
    expiry: Option<JoinHandle<(u64, u64)>>,
    next_expiry: Instant,
    monitor: Option<Monitor>,
    table_file: Option<File>,
    next_table: Instant,
    /// Who restarts a daemon whose keeper makes no rounds.
    pub service_manager: ServiceManager,
}

impl Keeper {
    /// Opens the file for the tables and the monitoring process.
    ///
    /// # Errors
    /// When the file cannot be opened, or there is no such process.
    pub fn new(limit: u32, monitor: Option<i32>, table_file: Option<&Path>) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.with_context(|| format!("cannot write the flow table to {}", path.display()))
        };
        Ok(Self {
            limit: limit.into(),
            crowded: false,
            full: None,
            refused: 0,
            intercepted: 0,
            unsettled: false,
            expiry: None,
            next_expiry: Instant::now(),
            monitor: monitor.map(Monitor::open).transpose()?,
            table_file: table_file.map(open).transpose()?,
            next_table: Instant::now() + TABLE_INTERVAL,
            service_manager: ServiceManager::default(),
        })
    }

    /// One round.
    ///
    /// There is no sign of life while a worker is stuck: connections that it would be given were lost.
    pub fn round(&mut self, programs: &mut Programs, shared: &Arc<Shared>, workers: &Workers) {
        if workers.are_alive() {
            if let Err(error) = programs.beat() {
                warn!("{error:#}");
            }
            self.service_manager.alive(shared.table.count());
        }
        self.expire(programs, shared);
        self.watch_limit(programs.count(Counter::LimitReached), shared.table.count() as u64);
        if Instant::now() >= self.next_table {
            self.next_table += TABLE_INTERVAL;
            self.write_table(shared);
        }
    }

    /// Writes a table to the file, when there is one.
    pub fn write_table(&mut self, shared: &Shared) {
        if let Some(file) = &mut self.table_file
            && let Err(error) = write!(file, "{}", shared.table)
        {
            warn!("cannot write the flow table: {error}");
        }
    }

    /// Nothing is listed as long as no SYN was intercepted since all of them were settled.
    fn expire(&mut self, programs: &Programs, shared: &Arc<Shared>) {
        if let Some(expiry) = self.expiry.take_if(|expiry| expiry.is_finished()) {
            // One that panicked is begun again.
            let (expired, young) = expiry.now_or_never().and_then(Result::ok).unwrap_or((0, 1));
            for _ in 0..expired {
                shared.metrics.count(Event::RecordExpired);
            }
            self.unsettled = young > 0;
        }
        let intercepted = programs.count(Counter::Intercepted);
        let is_settled = intercepted == self.intercepted && !self.unsettled;
        if self.expiry.is_some() || Instant::now() < self.next_expiry || is_settled {
            return;
        }
        self.next_expiry = Instant::now() + EXPIRY_INTERVAL;
        self.intercepted = intercepted;
        let age = match self.full {
            Some(_) => HANDSHAKE_WHEN_FULL,
            None => HANDSHAKE,
        };
        // At a high limit it takes longer than a round may.
        let shared = shared.clone();
        self.expiry = Some(spawn_blocking(move || shared.table.expire(age)));
    }

    fn watch_limit(&mut self, refused: u64, open: u64) {
        if refused > self.refused {
            if self.full.is_none() {
                warn!(
                    limit = self.limit,
                    "at the limit of connections: new connections are not intercepted"
                );
            }
            self.full = Some(Instant::now());
        }
        self.refused = refused;
        // Places may be taken by handshakes that never end, which are not open: those have to have been given up.
        let is_over = |refusal: Instant| refusal.elapsed() > HANDSHAKE_WHEN_FULL + EXPIRY_INTERVAL;
        if self.full.is_some_and(is_over) && open * 100 < self.limit * 95 {
            self.full = None;
            info!(open, passed = refused, "below the limit of connections again");
        }
        // PEPsal's alarms.
        if !self.crowded && open * 100 >= self.limit * 99 {
            self.crowded = true;
            self.alarm(Signal::USR1);
        } else if self.crowded && open * 100 <= self.limit * 95 {
            self.crowded = false;
            self.alarm(Signal::USR2);
        }
    }

    fn alarm(&self, signal: Signal) {
        let Some(monitor) = &self.monitor else { return };
        if let Err(error) = pidfd_send_signal(&monitor.process, signal) {
            warn!(process = monitor.pid, "cannot send {}: {error}", name(signal));
        }
    }
}

/// The process that the alarms go to. The descriptor stays that process's when its number is another's.
struct Monitor {
    process: OwnedFd,
    pid: i32,
}

impl Monitor {
    fn open(pid: i32) -> Result<Self> {
        let Some(number) = Pid::from_raw(pid) else {
            bail!("monitoring-pid {pid}: give the number of a process");
        };
        match pidfd_open(number, PidfdFlags::empty()) {
            Ok(process) => Ok(Self { process, pid }),
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => bail!(
                "monitoring-pid {pid}: there is no such process: start the monitor first, or leave the option out"
            ),
            Err(error) => {
                Err(error).with_context(|| format!("monitoring-pid {pid}: cannot open the process"))
            }
        }
    }
}

fn name(signal: Signal) -> &'static str {
    if signal == Signal::USR1 {
        "SIGUSR1"
    } else {
        "SIGUSR2"
    }
}
