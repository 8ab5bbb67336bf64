//! Byte counters of a flow, and the time of its last byte.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::flow::side::Side;

/// Byte counters of an open flow.
#[derive(Debug)]
pub struct Progress {
    /// Bytes from the client to the server.
    pub up: AtomicU64,
    /// Bytes from the server to the client.
    pub down: AtomicU64,
    started: Instant,
    /// Milliseconds from `started` to the last byte moved.
    last_ms: AtomicU64,
}

impl Default for Progress {
    /// Returns zero counters, with the current time as the start.
    fn default() -> Self {
        Self {
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            started: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }
}

impl Progress {
    /// Returns the time of accept.
    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Returns the time of the last relayed byte.
    pub(crate) fn last(&self) -> Instant {
        self.started + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    /// Adds bytes that were written to a leg.
    pub(crate) fn add(&self, to: Side, bytes: usize) {
        let counter = match to {
            Side::Server => &self.up,
            Side::Client => &self.down,
        };
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_ms
            .store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}
