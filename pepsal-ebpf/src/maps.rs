//! The maps that the programs share with the daemon and with each other, and the constants that the loader sets.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockMap},
};
use core::ptr::{addr_of, read_volatile, write_volatile};
use pepsal_ebpf::{
    Counter, ExtensionHeaders, FILTER_GENERATIONS, FILTER_HEADER, FILTER_SLOTS, FlowKey, FragmentKey,
    Interface, LINKS_MAX, PORT_SETS_MAX, PREFIXES_MAX, PortSet, PrefixKey, SynHead, SynRecord,
    packet::{Segment, TcpOptions},
    subscriber::Slot,
};

/// Constants that the loader writes into the object before the kernel sees it.
macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident / $reader:ident: $type:ty,)*) => {
        $(
            #[unsafe(no_mangle)]
            static $name: $type = 0;

            $(#[$doc])*
            #[inline(always)]
            pub fn $reader() -> $type {
                // SAFETY: a static; volatile, so that the compiler does not take the zero for granted.
                unsafe { read_volatile(addr_of!($name)) }
            }
        )*
    };
}

settings! {
    /// The packet mark, within [`mark_mask`], of a server leg's packet on its way into an interface's ingress.
    MARK / mark: u32,
    /// The bits of the packet mark that are pepsal's.
    MARK_MASK / mark_mask: u32,
    /// This instance's number, in `tc_index` beside the mark: two instances do not take each other's packets for their own.
    INSTANCE / instance: u16,
    /// The number of the instance that this one took over from; zero without.
    PREDECESSOR / predecessor: u16,
    /// Index of the host end of the clients' device.
    CLIENTS_IFINDEX / clients_ifindex: u32,
    /// Index of the host end of the servers' device.
    SERVERS_IFINDEX / servers_ifindex: u32,
    /// Identifier (RTM_NEWNSID) of the client legs' namespace, as the host's namespace knows it.
    CLIENTS_NETNS / clients_netns: u32,
    /// The same of the server legs' namespace.
    SERVERS_NETNS / servers_netns: u32,
    /// Nanoseconds without a heartbeat after which the daemon counts as hung.
    HEARTBEAT_BOUND_NS / heartbeat_bound_ns: u64,
    /// Non-zero: every intercepted SYN is logged.
    LOG_SYNS / log_syns: u8,
    /// Most connections of one subscriber; zero for no bound.
    CONNS_PER_CLIENT / conns_per_client: u32,
    /// One less than the slots of [`CONNECTIONS`], whose number is a power of two.
    CLIENT_SLOTS_MASK / client_slots_mask: u32,
    /// Number that chooses the hash function of subscribers.
    CLIENT_SEED / client_seed: u64,
}

/// Every flow, from its SYN to its end. The daemon sizes the map to its limit of connections and removes a flow that has
/// ended or was never accepted, so that a full map is what "at the limit" means.
#[map]
pub static FLOWS: HashMap<FlowKey, SynHead> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// The connections of each subscriber: what is in [`FLOWS`], and what is about to be. The daemon sizes the map, and subtracts a
/// flow that it removes.
#[map]
pub static CONNECTIONS: Array<Slot> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// What is large in the records of flows, and rare. The daemon takes it when it accepts; of connections that never come so
/// far the oldest make room.
#[map]
pub static EXTENSIONS: LruHashMap<FlowKey, ExtensionHeaders> = LruHashMap::with_max_entries(EXTENDED_MAX, 0);

/// The daemon's listeners by link and family: a connection gets its receive window and more from the socket that it was
/// accepted from. A slot empties itself when its socket is closed, however the daemon ended.
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries((LINKS_MAX + 1) * 2, 0);

/// Interface index to link.
#[map]
pub static LINKS: HashMap<u32, u32> = HashMap::with_max_entries(LINKS_MAX, 0);

/// Interface index to the properties that decide how a packet is given to the interface.
#[map]
pub static INTERFACES: HashMap<u32, Interface> =
    HashMap::with_max_entries(pepsal_ebpf::INTERFACES_MAX, BPF_F_NO_PREALLOC);

/// The generation of the rules in effect. The daemon writes new rules beside the old ones and changes this word last, so
/// that every connection is judged by one of both and never by a mixture.
#[map]
pub static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

/// Destination prefix to the number of the ports that are intercepted there.
#[map]
pub static DESTINATIONS: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(PREFIXES_MAX, BPF_F_NO_PREALLOC);

/// Source prefix to the number of the destination ports that are intercepted from there.
#[map]
pub static SOURCES: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(PREFIXES_MAX, BPF_F_NO_PREALLOC);

/// The sets of ports that the two tries name.
#[map]
pub static PORT_SETS: HashMap<u32, PortSet> = HashMap::with_max_entries(PORT_SETS_MAX, BPF_F_NO_PREALLOC);

/// The time of the daemon's last heartbeat, in nanoseconds of CLOCK_MONOTONIC.
#[map]
pub static HEARTBEAT: Array<u64> = Array::with_max_entries(1, 0);

/// Fragmented segments of legs, of which the first fragment alone has the ports, with the side of the leg. The oldest make
/// room for new ones: of a packet that is not whole by then the kernel would hardly have seen the end either.
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, u8> = LruHashMap::with_max_entries(FRAGMENTED_MAX, 0);

/// The filter of flows: a generation, padding, and the slots.
#[map]
static FILTER: Array<[u8; FILTER_HEADER + FILTER_SLOTS]> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Where a SYN is looked at: its record does not fit the stack.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

pub struct Scratch {
    pub syn: Segment,
    pub record: SynRecord,
    pub options: TcpOptions,
}

const FRAGMENTED_MAX: u32 = 4096;
const EXTENDED_MAX: u32 = 1024;
const BPF_F_NO_PREALLOC: u32 = 1;
/// The daemon writes to it without system calls.
const BPF_F_MMAPABLE: u32 = 1 << 10;

#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the element is this CPU's own.
        unsafe { *value += 1 };
    }
}

/// Whether there is, or was not long ago, a flow in the slot of this one; true where that is unknown.
#[inline(always)]
pub fn may_be_flow(flow: &FlowKey) -> bool {
    let Some(filter) = FILTER.get_ptr(0) else {
        return true;
    };
    let filter = filter.cast::<u8>();
    // SAFETY: within the element; single bytes, which the daemon and other processors write whole.
    let (generation, known) = unsafe {
        (
            read_volatile(filter),
            read_volatile(filter.add(FILTER_HEADER + flow.filter_slot())),
        )
    };
    known != 0 && generation.wrapping_sub(known) <= FILTER_GENERATIONS
}

/// Notes a flow in its slot.
#[inline(always)]
pub fn note_flow(flow: &FlowKey) {
    if let Some(filter) = FILTER.get_ptr_mut(0) {
        let filter = filter.cast::<u8>();
        // SAFETY: as above.
        unsafe {
            let generation = read_volatile(filter);
            write_volatile(filter.add(FILTER_HEADER + flow.filter_slot()), generation);
        }
    }
}
