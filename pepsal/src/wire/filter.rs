//! The filter by which the programs tell packets of no flow without looking for a socket.
//!
//! A flow's slot contains the generation in which the flow was last known: a SYN writes the present one, and with each new
//! generation the daemon writes it for all flows that are open. A flow that has ended is known for two generations more, in
//! which the kernel brings its sockets to their end. The generation is a byte; after 256 of them old slots say "perhaps" once
//! more, which costs look-ups and nothing else. A daemon that hangs makes no generations, so that its flows stay known.

use std::{
    num::NonZeroUsize,
    ptr::NonNull,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use aya::maps::Map;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pepsal_ebpf::{FILTER_HEADER, FILTER_SLOTS, FlowKey};
use std::os::fd::AsFd;

/// Time between two generations. Twice this is longer than a socket lasts that has ended: TIME_WAIT and FIN_WAIT2 take a
/// minute, a last FIN is repeated for less than two.
pub const GENERATION: Duration = Duration::from_secs(75);

/// The filter, mapped into memory.
#[derive(Debug)]
pub struct Filter {
    memory: NonNull<AtomicU8>,
    /// Keeps the map, and with it the memory, for as long as it is mapped.
    _map: Map,
}

// SAFETY: the memory belongs to the value, and all access to it is atomic.
unsafe impl Send for Filter {}
// SAFETY: as above.
unsafe impl Sync for Filter {}

const BYTES: NonZeroUsize = NonZeroUsize::new(FILTER_HEADER + FILTER_SLOTS).expect("it is not zero");

impl Filter {
    /// Maps the filter, and begins with the first generation.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn new(map: Map) -> Result<Self> {
        let Map::Array(data) = &map else {
            bail!("the filter of flows is of another type");
        };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping of its own, of a map that has this size.
        let memory = unsafe {
            mmap(
                None,
                BYTES,
                protection,
                MapFlags::MAP_SHARED,
                data.fd().as_fd(),
                0,
            )
        };
        let filter = Self {
            memory: memory.context("cannot map the filter of flows")?.cast(),
            _map: map,
        };
        filter.byte(0).store(1, Ordering::Relaxed);
        Ok(filter)
    }

    /// Begins the next generation, to which these flows belong: all that are open.
    pub fn advance<'a>(&self, flows: impl Iterator<Item = &'a FlowKey>) {
        let next = next(self.byte(0).load(Ordering::Relaxed));
        for flow in flows {
            let slot = self.byte(FILTER_HEADER + flow.filter_slot());
            slot.store(next, Ordering::Relaxed);
        }
        self.byte(0).store(next, Ordering::Release);
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        assert!(at < BYTES.get());
        // SAFETY: within the mapping.
        unsafe { self.memory.add(at).as_ref() }
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has a reference into it any more.
        let _ = unsafe { munmap(self.memory.cast(), BYTES.get()) };
    }
}

/// The generation after another. Zero is that of slots which have never had a flow.
fn next(generation: u8) -> u8 {
    generation.checked_add(1).unwrap_or(1)
}
