//! Periodic work: heartbeat, expiry of SYN records, PEPsal's signals at the limit, and the flow table file.

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

/// Interval of the keeper; after six missed heartbeats the programs intercept no new connections.
pub const ROUND: Duration = Duration::from_millis(500);

/// Time limit of a handshake, after which its record is removed: longer than a SYN cookie's round trip over
/// two satellite hops.
const HANDSHAKE: Duration = Duration::from_secs(30);
/// The same at the limit, where expired records block other connections.
const HANDSHAKE_WHEN_FULL: Duration = Duration::from_secs(5);
/// Interval of the search for expired records.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(2);

/// PEPsal's interval of the flow table.
const TABLE_INTERVAL: Duration = Duration::from_secs(300);

/// State of the periodic work.
pub struct Keeper {
    limit: u64,
    crowded: bool,
    /// Time of the last refusal, while the limit is reached.
    full: Option<Instant>,
    refused: u64,
    intercepted: u64,
    /// Whether the last search found handshakes in progress.
    unsettled: bool,
    /// The search that is running, on a thread that may block.
    expiry: Option<JoinHandle<(u64, u64)>>,
    next_expiry: Instant,
    monitor: Option<Monitor>,
    table_file: Option<File>,
    next_table: Instant,
    /// Its watchdog restarts a daemon whose keeper hangs.
    pub service_manager: ServiceManager,
}

impl Keeper {
    /// Opens the flow table file and the monitoring process.
    ///
    /// # Errors
    /// When the file or the process cannot be opened.
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

    /// Does the work of one interval.
    ///
    /// Sends no heartbeat while a worker hangs, because the connections of that worker would be lost.
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

    /// Appends a flow table to the file, if one is configured.
    pub fn write_table(&mut self, shared: &Shared) {
        if let Some(file) = &mut self.table_file
            && let Err(error) = write!(file, "{}", shared.table)
        {
            warn!("cannot write the flow table: {error}");
        }
    }

    /// Removes expired SYN records. Skips the search if no SYN was intercepted since the last one, and none
    /// was in progress then.
    fn expire(&mut self, programs: &Programs, shared: &Arc<Shared>) {
        if let Some(expiry) = self.expiry.take_if(|expiry| expiry.is_finished()) {
            // After a panic the search is repeated.
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
        // With a large map the search takes longer than the interval.
        let shared = shared.clone();
        self.expiry = Some(spawn_blocking(move || {
            shared.table.expire(age, HANDSHAKE_WHEN_FULL)
        }));
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
        // Entries may belong to incomplete handshakes, which do not count as open: those have to expire
        // first.
        let is_over = |refusal: Instant| refusal.elapsed() > HANDSHAKE_WHEN_FULL + EXPIRY_INTERVAL;
        if self.full.is_some_and(is_over) && open * 100 < self.limit * 95 {
            self.full = None;
            info!(open, passed = refused, "below the limit of connections again");
        }
        // PEPsal's signals.
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

/// The process that gets the signals. The descriptor stays valid after the process id is reused.
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
