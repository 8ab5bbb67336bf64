//! Resource usage of this process: resident memory, open file descriptors.

use std::fs;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};

/// Resource usage at one moment; `None` if `/proc` does not have it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process {
    /// Resident memory, without the socket buffers in the kernel.
    pub memory_bytes: Option<u64>,
    pub descriptors: Option<u64>,
    pub descriptors_limit: Option<u64>,
}

impl Process {
    pub fn now() -> Self {
        Self {
            memory_bytes: memory_bytes(),
            // The directory itself is one of them.
            descriptors: fs::read_dir("/proc/self/fd")
                .ok()
                .map(|open| (open.count() as u64).saturating_sub(1)),
            descriptors_limit: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
        }
    }
}

/// Returns the resident memory in bytes: the second number of `/proc/self/statm`, in pages (proc(5)).
fn memory_bytes() -> Option<u64> {
    let pages: u64 = fs::read_to_string("/proc/self/statm")
        .ok()?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_descriptors() {
        let before = Process::now();
        assert!(
            before.memory_bytes.is_some_and(|bytes| bytes > 100_000),
            "{before:?}"
        );
        let _open: Vec<_> = (0..100).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let now = Process::now();
        // Other tests open and close descriptors at the same time.
        assert!(
            now.descriptors > before.descriptors.map(|open| open + 50),
            "{now:?}"
        );
        assert!(now.descriptors <= now.descriptors_limit);
    }
}
