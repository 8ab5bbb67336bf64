//! The running daemon, as far as others may see it.

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

/// What is seen: the running daemon.
pub struct View {
    /// The flows and what is counted of them.
    pub shared: Arc<Shared>,
    /// What the kernel side counts.
    pub counters: Arc<Counters>,
    /// The interfaces whose new connections are to be intercepted.
    pub intercepted: Vec<String>,
    /// Where the programs are attached at present.
    pub attached: AttachedNow,
    /// The mark of server legs' packets on their way into an interface's ingress.
    pub mark: Mark,
    /// The host ends of the devices.
    pub devices: Vec<String>,
    /// Port of the listeners.
    pub port: u16,
    /// Most flows at once.
    pub limit: u32,
    /// Most flows of one subscriber at once; 0 for no bound.
    pub limit_per_client: u32,
    /// Counts the subscribers.
    pub census: Census,
    /// When the daemon was started.
    pub started: SystemTime,
    /// Whether new connections are taken: not yet at the start, and no more at the end.
    pub ready: AtomicBool,
}

impl View {
    /// Notes whether new connections are taken.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether new connections are taken.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }
}

/// Where the programs are attached, for who does not have them at hand.
#[derive(Debug, Default)]
pub struct AttachedNow(Mutex<Vec<Attached>>);

impl AttachedNow {
    /// Takes over what is so now.
    pub fn set(&self, attached: Vec<Attached>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = attached;
    }

    /// What was so last.
    pub fn get(&self) -> Vec<Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
