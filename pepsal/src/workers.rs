//! The threads that carry flows, each with a runtime of its own.
//!
//! A flow stays with the worker that it was given to. What a worker finds ready in one look at its sockets it serves
//! without waking another, whose processor has other work where gateways are busy: sixteen flows at full rate go a third
//! faster so than on a runtime that moves tasks between its threads. Accepting is a worker's business too: a thread of its
//! own for it would be one more to wake for every connection.

use std::{
    future::pending,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use futures_util::future::join_all;
use tokio::runtime::{Builder, Handle};
use tokio_util::task::TaskTracker;

/// How many turns of flows that a worker has may come before it looks for a new one, or for the question whether it is
/// alive: on a slow machine a turn takes many milliseconds.
const NEWCOMERS_WAIT_FOR: u32 = 5;

/// All workers. Their threads last as long as the process.
pub struct Workers(Vec<Worker>);

struct Worker {
    runtime: Handle,
    flows: TaskTracker,
    /// Whether the thread has come round since it was last asked to.
    came_round: Arc<AtomicBool>,
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
    pub fn spawn(&self, flow: impl Future<Output = ()> + Send + 'static) {
        let fewest = self.0.iter().min_by_key(|worker| worker.flows.len());
        if let Some(worker) = fewest {
            worker.flows.spawn_on(flow, &worker.runtime);
        }
    }

    /// The runtime of the worker that accepts connections for all.
    pub fn acceptor(&self) -> &Handle {
        &self.0[0].runtime
    }

    /// Whether every thread has come round since this was last true. One that has not is stuck, and its flows with it.
    pub fn are_alive(&self) -> bool {
        let alive = self
            .0
            .iter()
            .all(|worker| worker.came_round.load(Ordering::Relaxed));
        if alive {
            self.0.iter().for_each(Worker::ask);
        }
        alive
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
        let worker = Self {
            runtime: runtime.handle().clone(),
            flows: TaskTracker::new(),
            came_round: Arc::new(AtomicBool::new(true)),
        };
        thread::Builder::new()
            .name(format!("pepsal-{number}"))
            .spawn(move || runtime.block_on(pending::<()>()))?;
        Ok(worker)
    }

    fn ask(&self) {
        self.came_round.store(false, Ordering::Relaxed);
        let came_round = self.came_round.clone();
        self.runtime
            .spawn(async move { came_round.store(true, Ordering::Relaxed) });
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    fn eventually(mut condition: impl FnMut() -> bool) {
        while !condition() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn every_worker_has_its_share_of_flows() {
        let workers = Workers::start(3).unwrap();
        (0..9).for_each(|_| workers.spawn(pending()));
        let shares: Vec<usize> = workers.0.iter().map(|worker| worker.flows.len()).collect();
        assert_eq!(shares, [3, 3, 3]);
    }

    #[test]
    fn flow_goes_to_the_worker_that_has_the_fewest() {
        let workers = Workers::start(2).unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        workers.spawn(async { drop(ended.await) });
        workers.spawn(pending());
        drop(end);
        eventually(|| workers.0[0].flows.is_empty());
        workers.spawn(pending());
        assert_eq!(workers.0[0].flows.len(), 1);
    }

    #[test]
    fn one_stuck_worker_is_told_from_idle_ones() {
        let workers = Workers::start(2).unwrap();
        for _ in 0..3 {
            eventually(|| workers.are_alive());
        }
        let ((release, stuck), (begin, begun)) = (mpsc::channel::<()>(), mpsc::channel());
        workers.spawn(async move {
            begin.send(()).unwrap();
            stuck.recv().unwrap_err();
        });
        begun.recv().unwrap();
        // It may have come round just before.
        let others_have = || workers.0[1].came_round.load(Ordering::Relaxed);
        eventually(|| !workers.are_alive() && others_have());
        assert!(!workers.are_alive());
        drop(release);
        eventually(|| workers.are_alive());
    }
}
