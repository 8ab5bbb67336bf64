//! Resource usage of the machine: CPU time and memory.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// Returns the busy time of all CPUs since boot.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let ticks = busy_ticks(&stat).context("/proc/stat has no line for all processors")?;
    let ticks_per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / ticks_per_second as f64))
}

/// Returns the used memory in bytes, without page cache, reclaimable caches, and the free pages of the
/// per-CPU lists, which do not count as free and may be a gigabyte.
///
/// # Errors
/// When `/proc/meminfo` or `/proc/zoneinfo` cannot be read.
pub fn memory() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let used = used_bytes(&meminfo).context("fields are missing in /proc/meminfo")?;
    let zoneinfo = fs::read_to_string("/proc/zoneinfo").context("cannot read /proc/zoneinfo")?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
    Ok(used.saturating_sub(pages_at_hand(&zoneinfo) * page as u64))
}

/// Returns the number of open descriptors of a process.
///
/// # Errors
/// When the process has ended.
pub fn descriptors(process: u32) -> Result<usize> {
    let folder = format!("/proc/{process}/fd");
    Ok(fs::read_dir(&folder)
        .with_context(|| format!("cannot read {folder}"))?
        .count())
}

/// user, nice, system, irq and softirq; not idle, iowait, steal, nor guest, which is in user already.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let ticks: Vec<u64> = line
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    match ticks[..] {
        [user, nice, system, _idle, _iowait, irq, softirq, ..] => Some(user + nice + system + irq + softirq),
        _ => None,
    }
}

fn used_bytes(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = meminfo
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let had_back = kib("MemFree")? + kib("Buffers")? + kib("Cached")? + kib("SReclaimable")?;
    Some(kib("MemTotal")?.checked_sub(had_back)? * 1024)
}

/// Returns the free pages of the per-CPU lists.
fn pages_at_hand(zoneinfo: &str) -> u64 {
    zoneinfo
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:")?.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_at_hand_are_those_of_all_processors_in_all_zones() {
        let zoneinfo = "Node 0, zone    DMA\n  pages free     2816\n  pagesets\n    cpu: 0\n              count:    3\n\
                        \x20             high:     81\n    cpu: 1\n              count:    40\nNode 0, zone Normal\n\
                        \x20   cpu: 0\n              count:    500\n";
        assert_eq!(pages_at_hand(zoneinfo), 543);
    }

    #[test]
    fn busy_is_everything_but_waiting() {
        let stat = "cpu  100 20 30 4000 500 6 7 80 9 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
        assert_eq!(busy_ticks(stat), Some(163));
        assert_eq!(busy_ticks("cpu0 1 2 3\n"), None);
    }

    #[test]
    fn used_is_what_cannot_be_had_back() {
        let meminfo = "MemTotal:       1000 kB\nMemFree:         500 kB\nMemAvailable:    640 kB\nBuffers:          10 kB\n\
                       Cached:          100 kB\nSwapCached:        1 kB\nSReclaimable:     40 kB\n";
        assert_eq!(used_bytes(meminfo), Some(350 * 1024));
        assert_eq!(used_bytes("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn this_machine_is_understood() {
        assert!(busy().unwrap() > Duration::ZERO);
        assert!(memory().unwrap() > 0);
        assert!(descriptors(std::process::id()).unwrap() > 2);
    }
}
