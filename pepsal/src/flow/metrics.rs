//! Counters of the daemon. Those of the kernel side are [`pepsal_ebpf::Counter`].

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
    /// A connection was accepted whose SYN record had expired.
    RecordMissing = "record_missing",
    /// A connection was reset at accept: as many flows as allowed were open.
    OverLimit = "over_limit",
    /// Some of the SYN's options could not be set on the server leg.
    OptionsNotReplicated = "options_not_replicated",
    /// A record expired before its connection was accepted.
    RecordExpired = "record_expired",
    /// Accepting failed for want of resources.
    AcceptFailed = "accept_failed",
}

/// Upper bounds in seconds: from a neighbour's answer to the time-out of a connect.
const CONNECT_SECONDS: [f64; 13] = [
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

/// Upper bounds in seconds: from a request to a session of a day.
const DURATION_SECONDS: [f64; 11] = [
    0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0,
];

/// All counters.
#[derive(Debug)]
pub struct Metrics {
    events: [AtomicU64; Event::ALL.len()],
    closed: [AtomicU64; CloseReason::ALL.len()],
    up: AtomicU64,
    down: AtomicU64,
    /// Seconds from a flow's acceptance until its server leg is connected.
    pub connect: Histogram,
    /// Seconds from a flow's acceptance to its end.
    pub duration: Histogram,
    interfaces: RwLock<HashMap<u32, Arc<Traffic>>>,
}

/// What the legs behind one interface have carried.
#[derive(Debug)]
pub struct Traffic {
    /// The interface's name.
    pub interface: String,
    /// Bytes that were relayed out through it.
    pub sent: AtomicU64,
    /// Bytes that came in through it and were relayed.
    pub received: AtomicU64,
    /// Segments with data that were sent through it, retransmissions included.
    pub segments: AtomicU64,
    /// Segments that were sent again.
    pub retransmitted: AtomicU64,
}

impl Default for Metrics {
    /// All zero.
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
    /// Counts an event.
    pub fn count(&self, event: Event) {
        self.events[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How often an event came.
    pub fn events(&self, event: Event) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    /// Counts the end of a flow and how long it was open.
    pub fn close(&self, reason: CloseReason, open: Duration) {
        self.closed[reason as usize].fetch_add(1, Ordering::Relaxed);
        self.duration.observe(open.as_secs_f64());
    }

    /// How many flows ended for a reason.
    pub fn closed(&self, reason: CloseReason) -> u64 {
        self.closed[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts bytes that a flow carried up and down.
    pub fn carried(&self, up: u64, down: u64) {
        self.up.fetch_add(up, Ordering::Relaxed);
        self.down.fetch_add(down, Ordering::Relaxed);
    }

    /// Bytes that flows have carried, up and down. Those of open flows are in it as of when they were last looked at
    /// ([`crate::flow::table::Flow::observe`]).
    pub fn bytes(&self) -> (u64, u64) {
        (self.up.load(Ordering::Relaxed), self.down.load(Ordering::Relaxed))
    }

    /// Where the legs behind the interface of an index are counted; nowhere when there is no such interface.
    pub fn traffic(&self, ifindex: u32, interfaces: &Interfaces) -> Option<Arc<Traffic>> {
        let known = |interfaces: &HashMap<u32, Arc<Traffic>>| interfaces.get(&ifindex).cloned();
        let read = self.interfaces.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(traffic) = known(&read) {
            return Some(traffic);
        }
        drop(read);
        let interface = interfaces.get(&ifindex)?.name.clone();
        let mut interfaces = self.interfaces.write().unwrap_or_else(PoisonError::into_inner);
        // An interface that was made anew has another index, and counts on under its name.
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

    /// Every interface that has carried a leg, by name.
    pub fn interfaces(&self) -> Vec<Arc<Traffic>> {
        let interfaces = self.interfaces.read().unwrap_or_else(PoisonError::into_inner);
        let mut traffic: Vec<_> = interfaces.values().cloned().collect();
        traffic.sort_by(|a, b| a.interface.cmp(&b.interface));
        traffic.dedup_by(|a, b| Arc::ptr_eq(a, b));
        traffic
    }
}
