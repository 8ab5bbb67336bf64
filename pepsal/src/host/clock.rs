//! The clock of the eBPF programs.

use nix::time::{ClockId, clock_gettime};

/// Returns the time of CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` does.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}
