//! The kernel's records of flows.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Result, bail};
use aya::maps::{HashMap, Map, MapData, MapError};
use pepsal_ebpf::{ExtensionHeaders, FlowKey, SynHead, SynRecord};
use tracing::warn;

use crate::wire::{batch, connection_counts::ConnectionCounts};

/// The kernel's map of flows. A flow has an entry from its SYN to its end; the size of the map is the limit of connections.
pub struct FlowMap {
    maps: Mutex<FlowMaps>,
    /// The first of them, for walks over all of it: flows do not wait for the lock that long.
    heads: OwnedFd,
    /// Where there is a bound on them: the connections of each subscriber, of which every entry is one.
    counts: Option<ConnectionCounts>,
}

/// Flags of `BPF_MAP_UPDATE_ELEM`: only a new entry, only one that is there.
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

struct FlowMaps {
    heads: HashMap<MapData, FlowKey, SynHead>,
    extensions: HashMap<MapData, FlowKey, ExtensionHeaders>,
}

impl FlowMap {
    /// The map of the records' first parts, that of their rare second parts, and the counts of connections.
    ///
    /// # Errors
    /// When they are of another type.
    pub(super) fn new(heads: Map, extensions: Map, counts: Option<ConnectionCounts>) -> Result<Self> {
        let Map::HashMap(data) = &heads else {
            bail!("the map of flows is of another type");
        };
        Ok(Self {
            heads: data.fd().as_fd().try_clone_to_owned()?,
            maps: Mutex::new(FlowMaps {
                heads: HashMap::try_from(heads)?,
                extensions: HashMap::try_from(extensions)?,
            }),
            counts,
        })
    }

    /// Returns the arrival time of the flow's SYN in nanoseconds of CLOCK_MONOTONIC; none for a flow without an entry.
    pub fn time_ns(&self, flow: &FlowKey) -> Option<u64> {
        self.lock().heads.get(flow, 0).ok().map(|head| head.time_ns)
    }

    /// Returns the record of the flow's SYN; none for a flow without an entry. Removes the extension headers from the
    /// kernel's map, as they are needed once.
    pub fn record(&self, flow: &FlowKey) -> Option<SynRecord> {
        let mut maps = self.lock();
        let head = maps.heads.get(flow, 0).ok()?;
        let extensions = head.has_extensions().then(|| {
            let extensions = maps.extensions.get(flow, 0).ok();
            let _ = maps.extensions.remove(flow);
            extensions
        });
        Some(SynRecord::new(head, extensions.flatten()))
    }

    /// Adds an entry for a flow, or replaces the one that a SYN has made meanwhile.
    ///
    /// # Errors
    /// When the map is full.
    pub fn insert(&self, flow: &FlowKey, head: &SynHead) -> Result<(), MapError> {
        let mut maps = self.lock();
        match maps.heads.insert(flow, head, BPF_NOEXIST) {
            Ok(()) => {
                self.counts.iter().for_each(|counts| counts.add(flow));
                Ok(())
            }
            Err(_) => maps.heads.insert(flow, head, BPF_EXIST),
        }
    }

    /// Removes the record of a flow whose SYN came at this time, by one system call and without the lock. A newer SYN between
    /// the same ports keeps its own: the connection is still to be accepted.
    pub fn remove_of(&self, flow: &FlowKey, time_ns: u64) {
        let Ok(head) = batch::take::<_, SynHead>(self.heads.as_fd(), flow) else {
            // There may be none any more.
            return;
        };
        if head.time_ns == time_ns || self.put_back(flow, &head).is_err() {
            self.subtract(flow);
        }
    }

    /// Puts an entry back that was taken out.
    ///
    /// # Errors
    /// When a SYN has made a newer one, or the map is full: then the connection is accepted without its record.
    fn put_back(&self, flow: &FlowKey, head: &SynHead) -> Result<(), MapError> {
        self.lock().heads.insert(flow, head, BPF_NOEXIST)
    }

    fn subtract(&self, flow: &FlowKey) {
        self.counts.iter().for_each(|counts| counts.subtract(flow));
    }

    /// Whether the flow's client has as many connections as it may have.
    pub fn is_at_client_limit(&self, flow: &FlowKey) -> bool {
        self.counts
            .as_ref()
            .is_some_and(|counts| counts.is_at_limit(flow))
    }

    /// Removes the flow's entry.
    pub fn remove(&self, flow: &FlowKey) {
        // It may be gone already.
        if self.lock().heads.remove(flow).is_ok() {
            self.subtract(flow);
        }
    }

    /// Returns all entries. The walk takes no lock that flows wait for, and a system call for some thousand entries. Returns
    /// none, with a warning, when the kernel refuses.
    pub fn all(&self) -> Vec<(FlowKey, SynHead)> {
        self.try_all().unwrap_or_else(|error| {
            warn!("cannot read the kernel's map of flows: {error}");
            Vec::new()
        })
    }

    /// The same.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn try_all(&self) -> io::Result<Vec<(FlowKey, SynHead)>> {
        batch::entries(self.heads.as_fd())
    }

    fn lock(&self) -> MutexGuard<'_, FlowMaps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
