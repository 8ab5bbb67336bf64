//! Flows that fill a link.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use pepsal_tests::{Cancel, Connector, Outcome, Transfer};

use super::{observation::State, site::Site};

/// More than any path carries while a bulk flow is wanted.
const ENDLESS_BYTES: u64 = 1 << 40;

/// Downloads without an end, until they are dropped.
pub struct Bulk {
    cancel: Cancel,
    flows: Vec<Flow>,
}

struct Flow {
    received: Arc<AtomicU64>,
    thread: JoinHandle<Result<Outcome>>,
}

impl Bulk {
    /// Starts so many; none of them may stand still for longer than `patience`.
    pub fn start(site: &Site, count: usize, patience: Duration) -> Self {
        let (connector, server) = (site.connector(patience), site.server());
        Self::of(site, vec![(connector, server); count])
    }

    /// Starts one for each connector and server.
    pub fn of(site: &Site, ends: Vec<(Connector, SocketAddr)>) -> Self {
        let cancel = Cancel::default();
        let flows = ends.into_iter().zip(0..).map(|((connector, server), seed)| {
            let received = Arc::<AtomicU64>::default();
            let transfer = Transfer::download(ENDLESS_BYTES)
                .seed(seed)
                .connector(connector)
                .progress(Arc::clone(&received))
                .cancelled_by(cancel.clone());
            let topology = site.topology();
            let thread = thread::spawn(move || transfer.run(&topology.client, server));
            Flow { received, thread }
        });
        Self {
            flows: flows.collect(),
            cancel,
        }
    }

    /// Bytes of each flow so far.
    pub fn received(&self) -> Vec<u64> {
        self.flows
            .iter()
            .map(|flow| flow.received.load(Ordering::Relaxed))
            .collect()
    }

    /// Whether all flows still run.
    pub fn state(&self) -> State {
        if self.flows.iter().any(|flow| flow.thread.is_finished()) {
            State::Failed("a bulk flow has ended".into())
        } else {
            State::Done
        }
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.cancel.cancel();
        for flow in self.flows.drain(..) {
            // Cancelled flows fail; those that failed before have been seen.
            let _ = flow.thread.join();
        }
    }
}
