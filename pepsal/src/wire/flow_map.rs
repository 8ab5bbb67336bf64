//! The kernel's records of flows.

use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, MapData, MapError};
use pepsal_ebpf::{ExtensionHeaders, FlowKey, SynHead, SynRecord};

/// The kernel's map of flows: from a flow's SYN to its end, at most as many as the limit of connections.
pub struct FlowMap(Mutex<FlowMaps>);

struct FlowMaps {
    heads: HashMap<MapData, FlowKey, SynHead>,
    extensions: HashMap<MapData, FlowKey, ExtensionHeaders>,
}

impl FlowMap {
    /// The map of the records' first parts, and that of their rare second parts.
    pub(super) fn new(
        heads: HashMap<MapData, FlowKey, SynHead>,
        extensions: HashMap<MapData, FlowKey, ExtensionHeaders>,
    ) -> Self {
        Self(Mutex::new(FlowMaps { heads, extensions }))
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

    /// All flows at present.
    pub fn keys(&self) -> Vec<FlowKey> {
        self.lock().heads.keys().filter_map(Result::ok).collect()
    }

    fn lock(&self) -> MutexGuard<'_, FlowMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
