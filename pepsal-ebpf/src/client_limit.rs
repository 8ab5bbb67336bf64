//! The bound on the connections of one subscriber (`--conns-per-client`).

use core::{arch::asm, ptr::read_volatile};

use pepsal_ebpf::{
    FlowKey,
    subscriber::{SLOTS, Slots},
};

use crate::maps::{CONNECTIONS, client_seed, client_slots_mask, conns_per_client};

/// Counts a connection for its subscriber. Returns false, and counts nothing, where the subscriber has as many as it may have.
#[inline(always)]
pub fn take(flow: &FlowKey) -> bool {
    // Of connections that come at once each sees those that were added before it.
    let admitted = add(flow, 1) <= u64::from(conns_per_client());
    if !admitted {
        give_back(flow);
    }
    admitted
}

/// Gives back what [`take`] has counted, for a connection that is not taken after all.
#[inline(always)]
pub fn give_back(flow: &FlowKey) {
    add(flow, -1);
}

/// Adds to all slots of the subscriber, and returns the least of them.
#[inline(always)]
fn add(flow: &FlowKey, connections: i64) -> u64 {
    let slots = Slots::of(flow, client_seed(), client_slots_mask());
    let mut least = u64::MAX;
    for slot in 0..SLOTS {
        // It is there: the mask is that of the map.
        let Some(slot) = CONNECTIONS.get_ptr_mut(slots.index(slot)) else {
            continue;
        };
        // SAFETY: a whole word of the map's memory, which lives as long as the program.
        let now = unsafe {
            atomic_add(slot.cast(), connections);
            read_volatile(slot)
        };
        least = least.min(now.connections());
    }
    least
}

/// `BPF_ATOMIC | BPF_ADD` (RFC 9669, 5.3). The compiler's library has no atomic arithmetic for this target.
///
/// # Safety
/// The pointer has to be that of an aligned word in a map's value.
#[inline(always)]
unsafe fn atomic_add(word: *mut u64, summand: i64) {
    // SAFETY: one instruction on memory that the caller vouches for.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {summand}", word = in(reg) word, summand = in(reg) summand);
    }
}
