//! Bytes that a flow has carried, and the time of the last one.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::flow::side::Side;

/// What a flow has carried, readable while it goes on.
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
    /// Nothing carried yet.
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
    /// When the flow began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// When the flow last carried a byte.
    pub fn last(&self) -> Instant {
        self.started + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    /// Counts bytes that were given to a leg.
    pub fn add(&self, to: Side, bytes: usize) {
        let counter = match to {
            Side::Server => &self.up,
            Side::Client => &self.down,
        };
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_ms
            .store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }
}
