//! The kernel's records of flows.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Result, bail};
use aya::maps::{HashMap, Map, MapData, MapError};
use pepsal_ebpf::{ExtensionHeaders, FlowKey, SynHead, SynRecord};
use tracing::warn;

use crate::wire::batch;

/// The kernel's map of flows: from a flow's SYN to its end, at most as many as the limit of connections.
pub struct FlowMap {
    maps: Mutex<FlowMaps>,
    /// The first of them, for walks over all of it: flows do not wait for the lock that long.
    heads: OwnedFd,
}

struct FlowMaps {
    heads: HashMap<MapData, FlowKey, SynHead>,
    extensions: HashMap<MapData, FlowKey, ExtensionHeaders>,
}

impl FlowMap {
    /// The map of the records' first parts, and that of their rare second parts.
    ///
    /// # Errors
    /// When they are of another type.
    pub(super) fn new(heads: Map, extensions: Map) -> Result<Self> {
        let Map::HashMap(data) = &heads else {
            bail!("the map of flows is of another type");
        };
        Ok(Self {
            heads: data.fd().as_fd().try_clone_to_owned()?,
            maps: Mutex::new(FlowMaps {
                heads: HashMap::try_from(heads)?,
                extensions: HashMap::try_from(extensions)?,
            }),
        })
    }

    /// When the flow's SYN came, in nanoseconds of CLOCK_MONOTONIC.
    pub fn time_ns(&self, flow: &FlowKey) -> Option<u64> {
        self.lock().heads.get(flow, 0).ok().map(|head| head.time_ns)
    }

    /// What the flow's SYN said. What is needed of it only once is not kept.
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

    /// Gives a place to a flow that has none.
    ///
    /// # Errors
    /// When the map is full.
    pub fn insert(&self, flow: &FlowKey, head: &SynHead) -> Result<(), MapError> {
        self.lock().heads.insert(flow, head, 0)
    }

    /// Frees the flow's place.
    pub fn remove(&self, flow: &FlowKey) {
        // It may be gone already.
        let _ = self.lock().heads.remove(flow);
    }

    /// All flows at present, without a lock, by a system call for some thousand of them.
    pub fn all(&self) -> Vec<(FlowKey, SynHead)> {
        batch::entries(self.heads.as_fd()).unwrap_or_else(|error| {
            warn!("cannot read the kernel's map of flows: {error}");
            Vec::new()
        })
    }

    fn lock(&self) -> MutexGuard<'_, FlowMaps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
