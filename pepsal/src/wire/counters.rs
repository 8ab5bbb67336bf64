//! Counters of the programs' verdicts.

use aya::maps::{MapData, PerCpuArray};
use pepsal_ebpf::Counter;

/// The counters of the programs.
pub struct Counters(pub(super) PerCpuArray<MapData, u64>);

impl Counters {
    /// How often a verdict was reached, on all processors together.
    pub fn count(&self, counter: Counter) -> u64 {
        self.0
            .get(&(counter as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }
}
