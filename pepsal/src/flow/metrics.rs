//! Counters of the daemon. [`pepsal_ebpf::Counter`] has those of the eBPF programs.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prometheus_client::metrics::histogram::Histogram;

use crate::{flow::close_reason::CloseReason, wire::interfaces::Interfaces};

macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Counted events, except the close of a flow.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Event {
            $($(#[$doc])* $variant,)*
        }

        impl Event {
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Returns the name in logs and metrics.
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
    /// A connection was accepted whose SYN record had expired.
    RecordMissing = "record_missing",
    /// A connection was reset at accept: as many flows as allowed were open.
    OverLimit = "over_limit",
    /// Some of the SYN's options could not be set on the server leg.
    OptionsNotReplicated = "options_not_replicated",
    /// A record expired before its connection was accepted.
    RecordExpired = "record_expired",
    /// Accept failed because of missing resources.
    AcceptFailed = "accept_failed",
}

/// Bucket boundaries in seconds: from a reply of a neighbour to the connect timeout.
const CONNECT_SECONDS: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

/// Bucket boundaries in seconds: from one request to a session of a day.
const DURATION_SECONDS: [f64; 11] = [
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0,
];

#[derive(Debug)]
pub struct Metrics {
    events: [AtomicU64; Event::ALL.len()],
    closed: [AtomicU64; CloseReason::ALL.len()],
    up: AtomicU64,
    down: AtomicU64,
    /// Seconds from accept to the connected server leg.
    pub connect: Histogram,
    /// Seconds from accept to the end of the flow.
    pub duration: Histogram,
    interfaces: RwLock<HashMap<u32, Arc<Traffic>>>,
}

/// Traffic counters of the legs of one interface.
#[derive(Debug)]
pub struct Traffic {
    pub interface: String,
    /// Relayed bytes.
    pub sent: AtomicU64,
    /// Relayed bytes.
    pub received: AtomicU64,
    /// Data segments, including retransmissions.
    pub segments: AtomicU64,
    pub retransmitted: AtomicU64,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            events: [const { AtomicU64::new(0) }; _],
            closed: [const { AtomicU64::new(0) }; _],
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            connect: Histogram::new(CONNECT_SECONDS),
            duration: Histogram::new(DURATION_SECONDS),
            interfaces: RwLock::default(),
        }
    }
}

impl Metrics {
    pub fn count(&self, event: Event) {
        self.events[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn events(&self, event: Event) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    /// Counts the end of a flow and how long it was open.
    pub fn close(&self, reason: CloseReason, open: Duration) {
        self.closed[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.duration.observe(open.as_secs_f64());
    }

    /// Returns the number of flows with this close reason.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize].load(Ordering::Relaxed)
    }

    /// Adds the bytes of a flow, up and down.
    pub fn carried(&self, up: u64, down: u64) {
        self.up.fetch_add(up, Ordering::Relaxed);
        self.down.fetch_add(down, Ordering::Relaxed);
    }

    /// Returns the bytes of all flows, up and down. Those of open flows are as of their last observation
    /// ([`crate::flow::table::Flow::observe`]).
    pub fn bytes(&self) -> (u64, u64) {
        (self.up.load(Ordering::Relaxed), self.down.load(Ordering::Relaxed))
    }

    /// Returns the counters of an interface index; none for an unknown interface.
    pub fn traffic(&self, ifindex: u32, interfaces: &Interfaces) -> Option<Arc<Traffic>> {
        let known = |interfaces: &HashMap<u32, Arc<Traffic>>| interfaces.get(&ifindex).cloned();
        let read = self.interfaces.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(traffic) = known(&read) {
            return Some(traffic);
        }
        drop(read);
        let interface = interfaces.get(&ifindex)?.name.clone();
        let mut interfaces = self.interfaces.write().unwrap_or_else(PoisonError::into_inner);
        // A recreated interface has another index, and keeps its counters by name.
        let same = interfaces.values().find(|traffic| traffic.interface == interface);
        let traffic = same.cloned().unwrap_or_else(|| {
            Arc::new(Traffic {
                interface,
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
                segments: AtomicU64::new(0),
                retransmitted: AtomicU64::new(0),
            })
        });
        interfaces.insert(ifindex, traffic.clone());
        Some(traffic)
    }

    /// Returns the counters of all interfaces, sorted by name.
    pub fn interfaces(&self) -> Vec<Arc<Traffic>> {
        let interfaces = self.interfaces.read().unwrap_or_else(PoisonError::into_inner);
        let mut traffic: Vec<_> = interfaces.values().cloned().collect();
        traffic.sort_by(|a, b| a.interface.cmp(&b.interface));
        traffic.dedup_by(|a, b| Arc::ptr_eq(a, b));
        traffic
    }
}
