//! The worker threads, which relay flows, each with its own runtime.
//!
//! A flow stays on its worker. A worker serves all its ready sockets without waking another worker, whose CPU
//! has other work on a busy gateway: sixteen flows at full rate are a third faster than on a runtime that
//! moves tasks between threads. One worker also accepts: a separate thread would have to be woken for every
//! connection.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    runtime::{Builder, Handle},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    time::{MissedTickBehavior, interval},
};
use tokio_util::task::TaskTracker;

/// tokio's `global_queue_interval`: polls of local tasks between two looks at the injection queue. On a slow
/// machine one poll takes many milliseconds.
const INJECTION_INTERVAL: u32 = 5;

/// Interval of each thread's heartbeat. Timers of flows are longer, so that setting one need not wake the
/// thread that sets it.
const BEAT_INTERVAL: Duration = Duration::from_millis(500);
/// Age after which a thread gets a probe by its injection queue: a thread with many flows handles timers
/// late, and injected tasks soon.
const LATE: Duration = Duration::from_millis(750);
/// Age after which a thread counts as hung, with its flows.
const HUNG: Duration = Duration::from_millis(1500);

/// All workers. Their threads run until the process exits.
pub struct Workers(Vec<Worker>);

struct Worker {
    runtime: Handle,
    /// The injection queue: several tasks wake the thread once, and their memory is allocated by it.
    injected: UnboundedSender<Injected>,
    flows: TaskTracker,
    heartbeat: Arc<Heartbeat>,
}

/// Starts a flow on the current runtime.
type Injected = Box<dyn FnOnce() + Send>;

/// The last heartbeat of a thread.
struct Heartbeat {
    epoch: Instant,
    last_ms: AtomicU64,
    /// Whether a probe was sent since.
    probed: AtomicBool,
}

impl Workers {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// When a thread or its descriptors cannot be created.
    pub fn start(count: usize) -> io::Result<Self> {
        (0..count.max(1))
            .map(Worker::start)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Passes a flow to the worker with the fewest flows.
    pub fn spawn<F>(&self, flow: impl FnOnce() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let fewest = self.0.iter().min_by_key(|worker| worker.flows.len());
        if let Some(worker) = fewest {
            let (arriving, flows) = (worker.flows.token(), worker.flows.clone());
            let begin = move || {
                flows.spawn(flow());
                drop(arriving);
            };
            // The receiver exists until the process exits.
            let _ = worker.injected.send(Box::new(begin));
        }
    }

    /// Returns the runtime of the worker that accepts connections for all.
    pub fn acceptor(&self) -> &Handle {
        &self.0[0].runtime
    }

    /// Returns whether no thread hangs.
    pub fn are_alive(&self) -> bool {
        self.0.iter().all(Worker::is_alive)
    }

    /// Waits for the end of all flows.
    pub async fn finished(&self) {
        join_all(self.0.iter().map(|worker| {
            worker.flows.close();
            worker.flows.wait()
        }))
        .await;
    }
}

impl Worker {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .global_queue_interval(INJECTION_INTERVAL)
            .build()?;
        let (injected, queue) = unbounded_channel();
        runtime.spawn(start_injected(queue));
        let worker = Self {
            runtime: runtime.handle().clone(),
            injected,
            flows: TaskTracker::new(),
            heartbeat: Arc::new(Heartbeat::now()),
        };
        let heartbeat = worker.heartbeat.clone();
        thread::Builder::new()
            .name(format!("pepsal-{number}"))
            .spawn(move || runtime.block_on(beat(&heartbeat)))?;
        Ok(worker)
    }

    fn is_alive(&self) -> bool {
        let (heartbeat, age) = (&self.heartbeat, self.heartbeat.age());
        if age > LATE && !heartbeat.probed.swap(true, Ordering::Relaxed) {
            let heartbeat = heartbeat.clone();
            let _ = self.injected.send(Box::new(move || heartbeat.renew()));
        }
        age < HUNG
    }
}

impl Heartbeat {
    fn now() -> Self {
        Self {
            epoch: Instant::now(),
            last_ms: AtomicU64::new(0),
            probed: AtomicBool::new(false),
        }
    }

    fn renew(&self) {
        let now = self.epoch.elapsed().as_millis() as u64;
        self.last_ms.store(now, Ordering::Relaxed);
        self.probed.store(false, Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.epoch.elapsed().saturating_sub(last)
    }
}

async fn start_injected(mut queue: UnboundedReceiver<Injected>) {
    while let Some(begin) = queue.recv().await {
        begin();
    }
}

async fn beat(heartbeat: &Heartbeat) {
    let mut beats = interval(BEAT_INTERVAL);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        beats.tick().await;
        heartbeat.renew();
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::mpsc};

    use super::*;

    fn eventually(mut condition: impl FnMut() -> bool) {
        while !condition() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn every_worker_has_its_share_of_flows() {
        let workers = Workers::start(3).unwrap();
        (0..9).for_each(|_| workers.spawn(pending));
        let shares: Vec<usize> = workers.0.iter().map(|worker| worker.flows.len()).collect();
        assert_eq!(shares, [3, 3, 3]);
    }

    #[test]
    fn flow_goes_to_the_worker_that_has_the_fewest() {
        let workers = Workers::start(2).unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        workers.spawn(|| async { drop(ended.await) });
        workers.spawn(pending);
        drop(end);
        eventually(|| workers.0[0].flows.is_empty());
        workers.spawn(pending);
        assert_eq!(workers.0[0].flows.len(), 1);
    }

    #[test]
    fn one_hung_worker_is_told_from_idle_ones() {
        let workers = Workers::start(2).unwrap();
        assert!(workers.are_alive());
        let ((release, stuck), (begin, begun)) = (mpsc::channel::<()>(), mpsc::channel());
        workers.spawn(|| async move {
            begin.send(()).unwrap();
            stuck.recv().unwrap_err();
        });
        begun.recv().unwrap();
        eventually(|| !workers.are_alive());
        assert!(workers.0[1].is_alive());
        drop(release);
        eventually(|| workers.are_alive());
    }
}
