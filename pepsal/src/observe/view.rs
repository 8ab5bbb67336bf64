//! The state of the daemon that monitoring reads.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use crate::{
    flow::Shared,
    observe::subscribers::Census,
    wire::{attachment::Attached, counters::Counters, mark::Mark},
};

pub struct View {
    pub shared: Arc<Shared>,
    pub counters: Arc<Counters>,
    /// Interfaces of `-i`.
    pub intercepted: Vec<String>,
    pub attached: AttachedNow,
    /// Packet mark of server legs' packets.
    pub mark: Mark,
    /// Host ends of the device pairs.
    pub devices: Vec<String>,
    pub port: u16,
    pub limit: u32,
    /// Most flows of one subscriber at once; 0 for no bound.
    pub limit_per_client: u32,
    /// Counts the subscribers.
    pub census: Census,
    pub started: SystemTime,
    /// Whether new connections are intercepted: false during start and stop.
    pub ready: AtomicBool,
}

impl View {
    /// Sets whether new connections are intercepted.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Returns whether new connections are intercepted.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}

/// The list of attached interfaces, shared between threads.
#[derive(Debug, Default)]
pub struct AttachedNow(Mutex<Vec<Attached>>);

impl AttachedNow {
    pub fn set(&self, attached: Vec<Attached>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = attached;
    }

    pub fn get(&self) -> Vec<Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
