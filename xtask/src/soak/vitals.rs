//! Resources that must not grow: the daemon's memory, its descriptors, the entries of its flow map.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail};

/// Resources of a process without flows.
pub struct Vitals {
    resident_bytes: u64,
    /// Without pipes, of which the pool keeps some.
    descriptors: usize,
    flow_map_bytes: u64,
}

/// Memory that an allocator may keep without a leak, in bytes.
const SLACK_BYTES: u64 = 8 << 20;

impl Vitals {
    /// Measures the resources.
    pub fn of(pid: u32) -> Result<Self> {
        let status =
            fs::read_to_string(format!("/proc/{pid}/status")).context("cannot read the memory usage")?;
        let resident_kib: u64 = status
            .lines()
            .find_map(|line| {
                line.strip_prefix("VmRSS:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .context("cannot read the memory usage")?;
        Ok(Self {
            resident_bytes: resident_kib * 1024,
            descriptors: descriptors_but_pipes(pid)?,
            flow_map_bytes: flow_map_bytes(pid)?,
        })
    }

    pub fn rows(&self, later: &Self) -> Vec<[String; 3]> {
        let kib = |bytes: u64| format!("{} KiB", bytes / 1024);
        vec![
            ["without flows", "half time", "end"].map(str::to_owned),
            [
                "resident memory".to_owned(),
                kib(self.resident_bytes),
                kib(later.resident_bytes),
            ],
            [
                "descriptors, but for pipes".to_owned(),
                self.descriptors.to_string(),
                later.descriptors.to_string(),
            ],
            [
                "memory of the flow map".to_owned(),
                kib(self.flow_map_bytes),
                kib(later.flow_map_bytes),
            ],
        ]
    }

    pub fn complaints(&self, later: &Self) -> Vec<String> {
        let mut complaints = Vec::new();
        if later.resident_bytes > self.resident_bytes + SLACK_BYTES {
            complaints.push("the daemon's memory has grown".to_owned());
        }
        if later.descriptors > self.descriptors {
            complaints.push("descriptors have been left open".to_owned());
        }
        if later.flow_map_bytes > self.flow_map_bytes {
            complaints.push("flows have stayed in the map".to_owned());
        }
        complaints
    }
}

fn descriptors_but_pipes(pid: u32) -> Result<usize> {
    let descriptors =
        fs::read_dir(format!("/proc/{pid}/fd")).context("cannot see the daemon's descriptors")?;
    let is_pipe = |target: &PathBuf| target.to_string_lossy().starts_with("pipe:");
    let open = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    Ok(open.filter(|target| !is_pipe(target)).count())
}

/// Returns the kernel memory of the flow map in bytes: the hash table with keys of its size; the LRU of
/// extension headers has the same keys. Entries have separate memory, which the kernel counts from Linux 6.4
/// on.
pub fn flow_map_bytes(pid: u32) -> Result<u64> {
    const HASH: &str = "map_type:\t1";
    const KEY: &str = "key_size:\t36";
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo")).context("cannot see the daemon's descriptors")? {
        // A descriptor that was closed meanwhile.
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        if [HASH, KEY]
            .iter()
            .all(|wanted| info.lines().any(|line| line == *wanted))
        {
            let mut lines = info.lines();
            return lines
                .find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok())
                .context("the kernel does not report the memory of a map");
        }
    }
    bail!("the daemon has no flow map")
}
