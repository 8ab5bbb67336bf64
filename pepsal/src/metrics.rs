//! Counters of the daemon. Those of the kernel side are [`pepsal_ebpf::Counter`].

use std::sync::atomic::{AtomicU64, Ordering};

use crate::flow::CloseReason;

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Things worth counting that are not the end of a flow.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Event {
            $($(#[$doc])* $variant,)*
        }

        impl Event {
            /// Every event.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name in logs.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

events! {
    /// A connection was accepted and became a flow.
    Accepted = "accepted",
    /// A connection to the listener's own address was refused.
    DirectRefused = "direct_refused",
    /// A connection was accepted whose SYN record had expired.
    RecordMissing = "record_missing",
    /// The client's port was bound although a local service has it too.
    SourceForced = "source_forced",
    /// The server leg has the client's address, but not its port.
    SourcePortLost = "source_port_lost",
    /// Some of the SYN's options could not be set on the server leg.
    OptionsNotReplicated = "options_not_replicated",
    /// A record expired before its connection was accepted.
    RecordExpired = "record_expired",
    /// Accepting failed for want of resources.
    AcceptFailed = "accept_failed",
}

/// All counters.
#[derive(Debug)]
pub struct Metrics {
    events: [AtomicU64; Event::ALL.len()],
    closed: [AtomicU64; CloseReason::ALL.len()],
    up: AtomicU64,
    down: AtomicU64,
}

impl Default for Metrics {
    /// All zero.
    fn default() -> Self {
        Self {
            events: [const { AtomicU64::new(0) }; _],
            closed: [const { AtomicU64::new(0) }; _],
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
        }
    }
}

impl Metrics {
    /// Counts an event.
    pub fn count(&self, event: Event) {
        self.events[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often an event came.
    pub fn events(&self, event: Event) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    /// Counts the end of a flow and the bytes that it carried up and down.
    pub fn close(&self, reason: CloseReason, up: u64, down: u64) {
        self.closed[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.up.fetch_add(up, Ordering::Relaxed);
        self.down.fetch_add(down, Ordering::Relaxed);
    }

    /// How many flows ended for a reason.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize].load(Ordering::Relaxed)
    }

    /// Bytes that the flows that have ended carried, up and down.
    pub fn bytes(&self) -> (u64, u64) {
        (self.up.load(Ordering::Relaxed), self.down.load(Ordering::Relaxed))
    }
}
