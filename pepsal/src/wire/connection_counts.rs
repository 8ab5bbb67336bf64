//! Connections of each subscriber, as the programs count them where there is a bound on them (`--conns-per-client`).
//!
//! The programs add a connection when they record its SYN, and this process subtracts it when it removes the record: each with
//! one atomic instruction, on memory that both have. So what is counted is what is recorded, however the two meet.

use std::{
    hash::{BuildHasher, RandomState},
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result, bail};
use aya::maps::Map;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use pepsal_ebpf::{
    FlowKey,
    subscriber::{SLOTS, Slot, Slots, slots},
};

/// The bound, and how the slots of subscribers are found: what the programs are loaded with.
#[derive(Debug, Clone, Copy)]
pub struct ClientLimit {
    /// Most connections of one subscriber; 0 for no bound.
    pub connections: u32,
    /// Number that chooses the hash function.
    pub seed: u64,
    /// Slots of the map.
    pub slots: u32,
}

impl ClientLimit {
    /// A bound of `connections` for each subscriber, where the daemon takes `limit` in all. The map has one slot without a bound.
    pub fn new(connections: u32, limit: u32) -> Self {
        Self {
            connections,
            // Random keys are where the standard library gets random numbers.
            seed: RandomState::new().hash_one(()),
            slots: if connections == 0 { 1 } else { slots(limit) },
        }
    }

    /// Returns what has to be kept of the hash to have the index of a slot.
    pub fn mask(&self) -> u32 {
        self.slots - 1
    }
}

/// The counts, mapped into memory.
#[derive(Debug)]
pub struct ConnectionCounts {
    memory: NonNull<AtomicU64>,
    limit: ClientLimit,
    /// Keeps the map, and with it the memory, for as long as it is mapped.
    _map: Map,
}

// SAFETY: the memory belongs to the value, and all access to it is atomic.
unsafe impl Send for ConnectionCounts {}
// SAFETY: as above.
unsafe impl Sync for ConnectionCounts {}

impl ConnectionCounts {
    /// Maps the counts.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn new(map: Map, limit: ClientLimit) -> Result<Self> {
        let Map::Array(data) = &map else {
            bail!("the map of connections is of another type");
        };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping of its own, of a map that has this size.
        let memory = unsafe {
            mmap(
                None,
                bytes(&limit),
                protection,
                MapFlags::MAP_SHARED,
                data.fd().as_fd(),
                0,
            )
        };
        Ok(Self {
            memory: memory.context("cannot map the counts of connections")?.cast(),
            limit,
            _map: map,
        })
    }

    /// Counts a connection that this process has recorded itself. There is a bound on those that the programs take only.
    pub fn add(&self, flow: &FlowKey) {
        for slot in self.slots(flow) {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Gives back the count of a connection whose record was removed.
    pub fn subtract(&self, flow: &FlowKey) {
        for slot in self.slots(flow) {
            slot.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whether further connections of the subscriber pass.
    pub fn is_at_limit(&self, flow: &FlowKey) -> bool {
        let counts = self.slots(flow).map(|slot| slot.load(Ordering::Relaxed));
        counts.min() >= Some(self.limit.connections.into())
    }

    fn slots(&self, flow: &FlowKey) -> impl Iterator<Item = &AtomicU64> {
        let slots = Slots::of(flow, self.limit.seed, self.limit.mask());
        (0..SLOTS).map(move |slot| {
            let index = slots.index(slot) as usize;
            // SAFETY: the mask keeps it within the mapping.
            unsafe { self.memory.add(index).as_ref() }
        })
    }
}

impl Drop for ConnectionCounts {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nobody has a reference into it any more.
        let _ = unsafe { munmap(self.memory.cast(), bytes(&self.limit).get()) };
    }
}

/// Size of the mapping.
fn bytes(limit: &ClientLimit) -> NonZeroUsize {
    let slots = NonZeroUsize::new(limit.slots as usize).expect("there is one at least");
    slots.saturating_mul(NonZeroUsize::new(size_of::<Slot>()).expect("it is not zero"))
}

const _: () = assert!(size_of::<Slot>() == size_of::<AtomicU64>());
