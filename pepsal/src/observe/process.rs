//! What the daemon has of what there is a bound for.

use std::fs;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};

/// The process at one moment; nothing where `/proc` does not say.
#[derive(Debug, Clone, Copy, Default)]
pub struct Process {
    /// Memory that it occupies. What the kernel holds for its sockets is not in it.
    pub memory_bytes: Option<u64>,
    /// Open descriptors.
    pub descriptors: Option<u64>,
    /// The most that it may have open.
    pub descriptors_limit: Option<u64>,
}

impl Process {
    /// Looks.
    pub fn now() -> Self {
        Self {
            memory_bytes: memory_bytes(),
            // Itself is one while it is read.
            descriptors: fs::read_dir("/proc/self/fd")
                .ok()
                .map(|open| (open.count() as u64).saturating_sub(1)),
            descriptors_limit: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(soft, _)| soft),
        }
    }
}

/// The second number of `/proc/self/statm`, in pages (proc(5)).
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
        // Other tests open and close some meanwhile.
        assert!(
            now.descriptors > before.descriptors.map(|open| open + 50),
            "{now:?}"
        );
        assert!(now.descriptors <= now.descriptors_limit);
    }
}
