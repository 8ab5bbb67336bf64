//! Counters of the programs' verdicts.

use aya::maps::{MapData, PerCpuArray};
use pepsal_ebpf::Counter;

/// The per-CPU counters that the programs increment, one for each verdict.
pub struct Counters(pub(super) PerCpuArray<MapData, u64>);

impl Counters {
    /// Returns the number of packets with this verdict, on all processors together; 0 when the map cannot be read.
    pub fn count(&self, counter: Counter) -> u64 {
        self.0
            .get(&(counter as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }
}
