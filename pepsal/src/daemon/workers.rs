//! The threads that carry flows, each with a runtime of its own.
//!
//! A flow stays with the worker that it was given to. What a worker finds ready in one look at its sockets it serves
//! without waking another, whose processor has other work where gateways are busy: sixteen flows at full rate go a third
//! faster so than on a runtime that moves tasks between its threads. Accepting is a worker's business too: a thread of its
//! own for it would be one more to wake for every connection.

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

/// How many turns of flows that a worker has may come before it looks for a new one: on a slow machine a turn takes many
/// milliseconds.
const NEWCOMERS_WAIT_FOR: u32 = 5;

/// How often each thread shows that it is alive. The timers of flows are longer, so that setting one need not wake the
/// thread that sets it.
const ROUND: Duration = Duration::from_millis(500);
/// After this it is asked. A thread with many flows looks at its timers late, on a slow machine very late, and at newcomers
/// soon.
const LATE: Duration = Duration::from_millis(750);
/// A thread that has not come round for so long is stuck, and its flows with it.
const STUCK: Duration = Duration::from_millis(1500);

/// All workers. Their threads last as long as the process.
pub struct Workers(Vec<Worker>);

struct Worker {
    runtime: Handle,
    /// Many of them wake the thread once, and what they take is from its own memory.
    newcomers: UnboundedSender<Newcomer>,
    flows: TaskTracker,
    came_round: Arc<Round>,
}

/// Begins a flow on the runtime that it is called in.
type Newcomer = Box<dyn FnOnce() + Send>;

/// When a thread last came round.
struct Round {
    epoch: Instant,
    last_ms: AtomicU64,
    /// Whether it was asked since.
    asked: AtomicBool,
}

impl Workers {
    /// Starts that many threads, one at least.
    ///
    /// # Errors
    /// When a thread or its descriptors cannot be had.
    pub fn start(count: usize) -> io::Result<Self> {
        (0..count.max(1))
            .map(Worker::start)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Gives a flow to the worker that has the fewest.
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
            // A worker's runtime ends with the process.
            let _ = worker.newcomers.send(Box::new(begin));
        }
    }

    /// The runtime of the worker that accepts connections for all.
    pub fn acceptor(&self) -> &Handle {
        &self.0[0].runtime
    }

    /// Whether no thread is stuck.
    pub fn are_alive(&self) -> bool {
        self.0.iter().all(Worker::is_alive)
    }

    /// Waits until no flow is left.
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
            .global_queue_interval(NEWCOMERS_WAIT_FOR)
            .build()?;
        let (newcomers, arriving) = unbounded_channel();
        runtime.spawn(welcome(arriving));
        let worker = Self {
            runtime: runtime.handle().clone(),
            newcomers,
            flows: TaskTracker::new(),
            came_round: Arc::new(Round::now()),
        };
        let came_round = worker.came_round.clone();
        thread::Builder::new()
            .name(format!("pepsal-{number}"))
            .spawn(move || runtime.block_on(come_round(&came_round)))?;
        Ok(worker)
    }

    fn is_alive(&self) -> bool {
        let (round, age) = (&self.came_round, self.came_round.age());
        if age > LATE && !round.asked.swap(true, Ordering::Relaxed) {
            let round = round.clone();
            let _ = self.newcomers.send(Box::new(move || round.renew()));
        }
        age < STUCK
    }
}

impl Round {
    fn now() -> Self {
        Self {
            epoch: Instant::now(),
            last_ms: AtomicU64::new(0),
            asked: AtomicBool::new(false),
        }
    }

    fn renew(&self) {
        let now = self.epoch.elapsed().as_millis() as u64;
        self.last_ms.store(now, Ordering::Relaxed);
        self.asked.store(false, Ordering::Relaxed);
    }

    fn age(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.epoch.elapsed().saturating_sub(last)
    }
}

async fn welcome(mut arriving: UnboundedReceiver<Newcomer>) {
    while let Some(begin) = arriving.recv().await {
        begin();
    }
}

async fn come_round(round: &Round) {
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        rounds.tick().await;
        round.renew();
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
    fn one_stuck_worker_is_told_from_idle_ones() {
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
