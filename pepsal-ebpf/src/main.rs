//! pepsal's kernel side: the programs and the maps between them.
//!
//! - [`pepsal_steer`] on the TC ingress of every intercepted interface, [`pepsal_replies`] on that of all the others: mark what
//!   belongs to a flow, so that a policy rule delivers it locally. The verdict is always "next program, please".
//! - [`pepsal_listener`] on the network namespace's socket lookup: gives the daemon's listener the connections that
//!   `pepsal_steer` recorded, and no others.
//! - [`pepsal_window`] on the daemon's own cgroup: sets initial congestion windows, which plain system calls cannot.
//!
//! Whatever cannot be decided is passed on untouched.

#![no_std]
#![no_main]
#![expect(
    missing_docs,
    reason = "the macros export each program a second time, without its documentation"
)]

use core::{
    ffi::c_void,
    hint::black_box,
    mem::MaybeUninit,
    ptr::{addr_of, read_volatile},
};

use aya_ebpf::{
    EbpfContext,
    bindings::{
        __sk_buff, BPF_F_CURRENT_NETNS, BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup,
        bpf_sock_tuple, bpf_sockopt,
    },
    helpers::generated::{
        bpf_fib_lookup, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_setsockopt, bpf_sk_release,
        bpf_skb_load_bytes_relative, bpf_skc_lookup_tcp,
    },
    macros::{cgroup_sockopt, classifier, map, sk_lookup},
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SockMap, lpm_trie},
    programs::{SkLookupContext, SockoptContext, TcContext},
};
use aya_log_ebpf::info;
use pepsal_ebpf::{
    Counter, ExtensionHeaders, FlowKey, FragmentKey, LINKS_MAX, MappedAddr, NO_LINK, PORT_SET_BYTES,
    PORT_SETS_MAX, PREFIXES_MAX, PortSet, PrefixKey, SynHead, SynRecord, TCP_INITIAL_WINDOW, listener_v4,
    listener_v6,
    packet::{Family, Packet, Parsed, Segment, first_fragment, fragment_key, parse, record_syn},
};

/// The mark that steered packets carry, within [`MARK_MASK`].
#[unsafe(no_mangle)]
static MARK: u32 = 0;
/// The bits of the packet mark that are pepsal's.
#[unsafe(no_mangle)]
static MARK_MASK: u32 = 0;
/// Nanoseconds without a heartbeat after which the daemon counts as hung.
#[unsafe(no_mangle)]
static HEARTBEAT_BOUND_NS: u64 = 0;
/// Non-zero: every intercepted SYN is logged.
#[unsafe(no_mangle)]
static LOG_SYNS: u8 = 0;

/// Every flow, from its SYN to its end. The daemon sizes the map to its limit of connections and removes a flow that has
/// ended or was never accepted, so that a full map is what "at the limit" means.
#[map]
static FLOWS: HashMap<FlowKey, SynHead> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

/// What is large in the records of flows, and rare. The daemon takes it when it accepts; of connections that never come so
/// far the oldest make room.
#[map]
static EXTENSIONS: LruHashMap<FlowKey, ExtensionHeaders> = LruHashMap::with_max_entries(EXTENDED_MAX, 0);

/// The daemon's listeners by link and family: a connection gets its receive window and more from the socket that it was
/// accepted from. A slot empties itself when its socket is closed, however the daemon ended.
#[map]
static LISTENERS: SockMap = SockMap::with_max_entries((LINKS_MAX + 1) * 2, 0);

/// Interface index to link.
#[map]
static LINKS: HashMap<u32, u32> = HashMap::with_max_entries(LINKS_MAX, 0);

/// The generation of the rules that hold. The daemon writes new rules beside the old ones and changes this word last, so
/// that every connection is judged by one of both and never by a mixture.
#[map]
static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

/// Destination prefix to the number of the ports that are intercepted there.
#[map]
static DESTINATIONS: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(PREFIXES_MAX, BPF_F_NO_PREALLOC);

/// Source prefix to the number of the destination ports that are intercepted from there.
#[map]
static SOURCES: LpmTrie<PrefixKey, u32> = LpmTrie::with_max_entries(PREFIXES_MAX, BPF_F_NO_PREALLOC);

/// The sets of ports that the two tries name.
#[map]
static PORT_SETS: HashMap<u32, PortSet> = HashMap::with_max_entries(PORT_SETS_MAX, BPF_F_NO_PREALLOC);

/// When the daemon last showed that it is alive, in nanoseconds of CLOCK_MONOTONIC.
#[map]
static HEARTBEAT: Array<u64> = Array::with_max_entries(1, 0);

/// Segments of legs that come in fragments, whose first fragment alone has the ports. The oldest make room for new ones:
/// of a packet that is not whole by then the kernel would hardly have seen the end either.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, u8> = LruHashMap::with_max_entries(FRAGMENTED_MAX, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// Where a SYN is looked at: its record does not fit the stack.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

struct Scratch {
    syn: Segment,
    record: SynRecord,
}

const FRAGMENTED_MAX: u32 = 4096;
const EXTENDED_MAX: u32 = 1024;
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;
const BPF_HDR_START_NET: u32 = 1;
const SK_PASS: u32 = 1;
const E2BIG: i32 = -7;

/// `TCX_NEXT`, which is also `TC_ACT_UNSPEC`: programs after this one, and the rest of the stack, still see the packet.
const NEXT: i32 = -1;

/// TC ingress of an intercepted interface.
#[classifier]
pub fn pepsal_steer(ctx: TcContext) -> i32 {
    count(classify(&ctx, true));
    NEXT
}

/// TC ingress of every other interface: segments of flows, but no new ones.
#[classifier]
pub fn pepsal_replies(ctx: TcContext) -> i32 {
    count(classify(&ctx, false));
    NEXT
}

/// Socket lookup of the network namespace.
#[sk_lookup]
pub fn pepsal_listener(ctx: SkLookupContext) -> u32 {
    if let Some(counter) = assign(&ctx) {
        count(counter);
    }
    SK_PASS
}

/// `setsockopt` of the daemon's sockets.
#[cgroup_sockopt(setsockopt)]
pub fn pepsal_window(ctx: SockoptContext) -> i32 {
    match set_initial_window(ctx.sockopt) {
        Some(answer) => answer,
        None => SOCKOPT_PASS,
    }
}

#[inline(always)]
fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the element is this CPU's own.
        unsafe { *value += 1 };
    }
}

#[inline(always)]
fn classify(ctx: &TcContext, intercept: bool) -> Counter {
    let decided = match try_classify(ctx, intercept) {
        Err(Counter::Fragment) => classify_fragment(ctx.skb.skb),
        decided => decided,
    };
    match decided {
        Ok(counter) => {
            mark(ctx);
            counter
        }
        Err(counter) => counter,
    }
}

/// The first fragment of a leg's segment has the ports; the others go where it has gone. A SYN in fragments is left alone.
#[inline(always)]
fn classify_fragment(skb: *mut __sk_buff) -> Result<Counter, Counter> {
    let packet = Skb(skb);
    let family = family(skb).ok_or(Counter::NotIp)?;
    match first_fragment(&packet, family) {
        Ok(segment) if !segment.is_syn() && matches!(look_up(skb, &segment), Found::Leg(_)) => {
            let key = fragment_key(&packet, family).ok_or(Counter::Fragment)?;
            // Without a place for it the others pass, and the peer has to send the segment again.
            FRAGMENTS.insert(key, 0, 0).map_err(|_| Counter::Fragment)?;
            Ok(Counter::Steered)
        }
        Ok(_) => Err(Counter::Fragment),
        Err(_) => {
            let key = fragment_key(&packet, family).ok_or(Counter::Fragment)?;
            // SAFETY: the value is not looked into.
            match unsafe { FRAGMENTS.get(key) } {
                Some(_) => Ok(Counter::Steered),
                None => Err(Counter::Fragment),
            }
        }
    }
}

#[inline(always)]
fn family(skb: *mut __sk_buff) -> Option<Family> {
    // SAFETY: a field of the context that programs of this type may read.
    match u16::from_be(unsafe { (*skb).protocol } as u16) {
        0x0800 => Some(Family::V4),
        0x86dd => Some(Family::V6),
        _ => None,
    }
}

/// `Ok` for a packet that is to be marked, `Err` for one that passes as it is.
#[inline(always)]
fn try_classify(ctx: &TcContext, intercept: bool) -> Result<Counter, Counter> {
    let skb = ctx.skb.skb;
    // SAFETY: a field of the context that programs of this type may read.
    if unsafe { (*skb).vlan_present } != 0 {
        return Err(Counter::Vlan);
    }
    let family = family(skb).ok_or(Counter::NotIp)?;
    let packet = Skb(skb);
    match parse(&packet, family)? {
        Parsed::Tcp(segment) => match look_up(skb, &segment) {
            Found::Leg(TCP_NEW_SYN_RECV) if segment.is_syn() => Ok(Counter::Retransmitted),
            // A SYN may take over the ports of a connection in TIME_WAIT: it opens a flow of its own.
            Found::Leg(TCP_TIME_WAIT) | Found::Listener | Found::Nothing if segment.is_syn() => {
                intercept_syn(ctx, &packet, segment, intercept)
            }
            Found::Leg(_) => Ok(Counter::Steered),
            // With SYN cookies there is no socket until the handshake is over. `pepsal_listener` takes part in every
            // look-up: where it found nothing there is no record either, which spares all foreign segments a question.
            // SAFETY: the record is not looked into.
            Found::Listener if unsafe { FLOWS.get(segment.flow()) }.is_some() => Ok(Counter::Pending),
            // The SYN went on to the server: what follows it has to go there too, and is not to be taken for a cookie.
            _ if segment.is_syn_ack() && FLOWS.remove(segment.answered_flow()).is_ok() => {
                Err(Counter::Bypassed)
            }
            _ => Err(Counter::Foreign),
        },
        Parsed::IcmpError(segment) => match look_up(skb, &segment) {
            Found::Leg(_) => Ok(Counter::IcmpError),
            _ => Err(Counter::Foreign),
        },
    }
}

#[inline(always)]
fn mark(ctx: &TcContext) {
    // SAFETY: statics that the loader sets; volatile, so that the compiler does not take the zeroes for granted.
    let (mark, mask) = unsafe { (read_volatile(&MARK), read_volatile(&MARK_MASK)) };
    // SAFETY: the packet's mark may be read and written.
    let old = unsafe { (*ctx.skb.skb).mark };
    ctx.set_mark(old & !mask | mark);
}

/// Decides about a connection that is not there yet. The cheap questions come first.
#[inline(always)]
fn intercept_syn(ctx: &TcContext, packet: &Skb, syn: Segment, intercept: bool) -> Result<Counter, Counter> {
    if !intercept {
        return Err(Counter::NotIntercepted);
    }
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Counter::RecordFailed)?;
    // SAFETY: the element is this CPU's own, and programs are not preempted by themselves.
    let scratch = unsafe { &mut *scratch };
    scratch.syn = syn;
    // What is read from a map again is any number to the verifier. Else older ones (seen up to Linux 6.1) would check the
    // rest once for each way through the headers that leads here, and that takes them seconds.
    let Scratch { syn, record } = black_box(scratch);
    if !selected(syn) {
        return Err(Counter::Unselected);
    }
    // A simultaneous open (RFC 9293, 3.5), of which one flow is enough: its server leg will meet this end's SYNs.
    // SAFETY: the record is not looked into.
    if unsafe { FLOWS.get(syn.answered_flow()) }.is_some() {
        return Err(Counter::Simultaneous);
    }
    // SAFETY: a field of the context that programs of this type may read.
    let ingress_ifindex = unsafe { (*ctx.skb.skb).ifindex };
    if !listening(listener(syn.family, ingress_ifindex)) {
        return Err(Counter::NoListener);
    }
    let egress_ifindex = forwarded_to(ctx, syn, ingress_ifindex).ok_or(Counter::NotForwarded)?;
    let heartbeat = HEARTBEAT.get_ptr(0).ok_or(Counter::RecordFailed)?;
    // SAFETY: a helper without arguments, an element that the daemon writes whole, a static that the loader sets.
    let (now, heartbeat, bound) = unsafe {
        (
            bpf_ktime_get_ns(),
            read_volatile(heartbeat),
            read_volatile(&HEARTBEAT_BOUND_NS),
        )
    };
    if now > heartbeat.saturating_add(bound) {
        return Err(Counter::Unresponsive);
    }

    record_syn(packet, syn, record)?;
    let SynRecord { head, extensions } = record;
    head.time_ns = now;
    head.ingress_ifindex = ingress_ifindex;
    head.egress_ifindex = egress_ifindex;

    let (flow, head) = (syn.flow(), &*head);
    if head.has_extensions() {
        // Where it is missing the daemon notices.
        let _ = EXTENSIONS.insert(flow, extensions, 0);
    }
    // The port is used again, or SYN cookies are on: the newest SYN counts, and the flow has its place already.
    if FLOWS.insert(flow, head, BPF_EXIST).is_ok() {
        return Ok(Counter::Retransmitted);
    }
    match FLOWS.insert(flow, head, BPF_NOEXIST) {
        Ok(()) => {}
        Err(E2BIG) => return Err(Counter::LimitReached),
        Err(_) => return Err(Counter::RecordFailed),
    }
    // SAFETY: a static that the loader sets.
    if unsafe { read_volatile(&LOG_SYNS) } != 0 {
        log_syn(ctx, syn, head);
    }
    Ok(Counter::Intercepted)
}

#[inline(always)]
fn log_syn(ctx: &TcContext, syn: &Segment, record: &SynHead) {
    let (sport, dport) = (
        u16::from_be_bytes(syn.source_port),
        u16::from_be_bytes(syn.destination_port),
    );
    let (ifindex, tclass) = (record.ingress_ifindex, record.traffic_class);
    info!(
        ctx,
        "intercepted {:i}:{} -> {:i}:{} ifindex={} tclass={}",
        syn.source.octets(),
        sport,
        syn.destination.octets(),
        dport,
        ifindex,
        tclass
    );
}

/// Whether the selection takes a connection: its destination's and its source's set of ports both have to agree.
#[inline(always)]
fn selected(syn: &Segment) -> bool {
    let Some(generation) = GENERATION.get_ptr(0) else {
        return false;
    };
    // SAFETY: an element that the daemon writes whole. It is read once for both look-ups.
    let generation = unsafe { read_volatile(generation) };
    contains_port(&DESTINATIONS, generation, syn.destination, syn.destination_port)
        && contains_port(&SOURCES, generation, syn.source, syn.destination_port)
}

#[inline(always)]
fn contains_port(
    prefixes: &LpmTrie<PrefixKey, u32>,
    generation: u32,
    addr: MappedAddr,
    port: [u8; 2],
) -> bool {
    let prefix = PrefixKey::new(generation, addr);
    let Some(number) = prefixes.get(lpm_trie::Key::new(PrefixKey::GENERATION_BITS + 128, prefix)) else {
        return false;
    };
    let Some(ports) = PORT_SETS.get_ptr(*number) else {
        return false;
    };
    let port = u32::from(u16::from_be_bytes(port));
    // The mask repeats what the type says, in terms that the verifier follows.
    let byte = (port >> 3) as usize & (PORT_SET_BYTES - 1);
    // SAFETY: within the element.
    let bits = unsafe { *ports.cast::<u8>().add(byte) };
    bits & (1 << (port & 7)) != 0
}

#[inline(always)]
fn listening(index: u32) -> bool {
    // SAFETY: a helper call on a map of ours; it returns a socket with a reference, which is given back.
    unsafe {
        let map = addr_of!(LISTENERS).cast_mut().cast::<c_void>();
        let socket = bpf_map_lookup_elem(map, addr_of!(index).cast());
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket);
    }
    true
}

/// The slot of the listener for connections that arrive on an interface.
#[inline(always)]
fn listener(family: Family, ingress_ifindex: u32) -> u32 {
    // SAFETY: a whole word, which the daemon writes before it attaches to the interface.
    let link = unsafe { LINKS.get(ingress_ifindex) }.copied().unwrap_or(NO_LINK);
    match family {
        Family::V4 => listener_v4(link),
        Family::V6 => listener_v6(link),
    }
}

const IPPROTO_TCP: u32 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `struct bpf_fib_lookup` of the kernel's `uapi/linux/bpf.h`, input side.
#[repr(C)]
struct FibLookup {
    family: u8,
    l4_protocol: u8,
    sport: u16,
    dport: u16,
    tot_len: u16,
    ifindex: u32,
    tos_or_flowinfo: u32,
    source: [u32; 4],
    destination: [u32; 4],
    vlan: [u16; 2],
    macs: [u8; 12],
}

const _: () = assert!(size_of::<FibLookup>() == 64);

/// The interface that the gateway would forward the packet to. Its own addresses and destinations without a route are
/// left to the stack, which knows the right answer.
#[inline(always)]
fn forwarded_to(ctx: &TcContext, syn: &Segment, ingress_ifindex: u32) -> Option<u32> {
    let mut lookup = FibLookup {
        family: AF_INET6,
        l4_protocol: 6,
        sport: 0,
        dport: 0,
        tot_len: 0,
        ifindex: ingress_ifindex,
        tos_or_flowinfo: 0,
        source: syn.source.words(),
        destination: syn.destination.words(),
        vlan: [0; 2],
        macs: [0; 12],
    };
    if syn.family == Family::V4 {
        let ([.., s], [.., d]) = (syn.source.words(), syn.destination.words());
        lookup.family = AF_INET;
        lookup.source = [s, 0, 0, 0];
        lookup.destination = [d, 0, 0, 0];
    }
    // SAFETY: the helper reads and writes the struct, whose size it is told.
    let result = unsafe {
        bpf_fib_lookup(
            ctx.as_ptr(),
            (&raw mut lookup).cast(),
            size_of::<FibLookup>() as i32,
            0,
        )
    };
    // Found; found but the encapsulation or the neighbour is still to be resolved, which the stack does.
    matches!(result, 0 | 6 | 7).then_some(lookup.ifindex)
}

const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;

/// What the kernel would deliver a segment to.
enum Found {
    Nothing,
    /// The daemon's, for a flow that is recorded; or anyone's, which is no answer: one on the wildcard address matches
    /// every destination.
    Listener,
    /// A connection, with its state.
    Leg(u32),
}

#[inline(always)]
fn look_up(skb: *mut __sk_buff, segment: &Segment) -> Found {
    #[repr(C)]
    struct TupleV4 {
        source: u32,
        destination: u32,
        source_port: [u8; 2],
        destination_port: [u8; 2],
    }
    #[repr(C)]
    struct TupleV6 {
        source: [u32; 4],
        destination: [u32; 4],
        source_port: [u8; 2],
        destination_port: [u8; 2],
    }

    let (source_port, destination_port) = (segment.source_port, segment.destination_port);
    let netns = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the helper reads a tuple of the size it is told and returns a socket with a reference, which is given
    // back after its state was read.
    unsafe {
        let socket = match segment.family {
            Family::V4 => {
                let ([.., source], [.., destination]) = (segment.source.words(), segment.destination.words());
                let mut tuple = TupleV4 {
                    source,
                    destination,
                    source_port,
                    destination_port,
                };
                let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
                bpf_skc_lookup_tcp(skb.cast(), tuple, size_of::<TupleV4>() as u32, netns, 0)
            }
            Family::V6 => {
                let mut tuple = TupleV6 {
                    source: segment.source.words(),
                    destination: segment.destination.words(),
                    source_port,
                    destination_port,
                };
                let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
                bpf_skc_lookup_tcp(skb.cast(), tuple, size_of::<TupleV6>() as u32, netns, 0)
            }
        };
        if socket.is_null() {
            return Found::Nothing;
        }
        let state = read_volatile(addr_of!((*socket).state));
        bpf_sk_release(socket.cast());
        match state {
            TCP_LISTEN => Found::Listener,
            state => Found::Leg(state),
        }
    }
}

/// This very listener, not that of another instance with the same port; and whatever a program before this one chose: when
/// two instances know a flow, the earlier one is about to go.
const ASSIGN_FLAGS: u64 = (BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT) as u64;

/// Gives the listener a connection that `pepsal_steer` recorded. All others are none of its business, so that local services
/// keep working.
#[inline(always)]
fn assign(ctx: &SkLookupContext) -> Option<Counter> {
    let (family, flow) = looked_up_flow(ctx.lookup)?;
    // SAFETY: a newer SYN may overwrite the record meanwhile; either interface is right then.
    let ingress_ifindex = unsafe { FLOWS.get(flow) }?.ingress_ifindex;
    let index = listener(family, ingress_ifindex);
    Some(match LISTENERS.redirect_sk_lookup(ctx, index, ASSIGN_FLAGS) {
        Ok(()) => Counter::Assigned,
        Err(_) => Counter::AssignFailed,
    })
}

/// The fields are read one by one, volatile and whatever the family is: loads that the compiler merges across branches
/// have computed addresses, which the verifier refuses. The other family's addresses read as zeroes.
#[inline(always)]
fn looked_up_flow(lookup: *mut bpf_sk_lookup) -> Option<(Family, FlowKey)> {
    // SAFETY: fields of the context that programs of this type may read, at constant offsets.
    let (family, protocol, client_port, server_port, client_v4, server_v4, client_v6, server_v6) = unsafe {
        (
            read_volatile(addr_of!((*lookup).family)) as u8,
            read_volatile(addr_of!((*lookup).protocol)),
            (read_volatile(addr_of!((*lookup).remote_port)) as u16).to_ne_bytes(),
            (read_volatile(addr_of!((*lookup).local_port)) as u16).to_be_bytes(),
            read_volatile(addr_of!((*lookup).remote_ip4)),
            read_volatile(addr_of!((*lookup).local_ip4)),
            [
                read_volatile(addr_of!((*lookup).remote_ip6[0])),
                read_volatile(addr_of!((*lookup).remote_ip6[1])),
                read_volatile(addr_of!((*lookup).remote_ip6[2])),
                read_volatile(addr_of!((*lookup).remote_ip6[3])),
            ],
            [
                read_volatile(addr_of!((*lookup).local_ip6[0])),
                read_volatile(addr_of!((*lookup).local_ip6[1])),
                read_volatile(addr_of!((*lookup).local_ip6[2])),
                read_volatile(addr_of!((*lookup).local_ip6[3])),
            ],
        )
    };
    let (family, client, server) = match (protocol, family) {
        (IPPROTO_TCP, AF_INET) => (
            Family::V4,
            MappedAddr::v4(client_v4.to_ne_bytes()),
            MappedAddr::v4(server_v4.to_ne_bytes()),
        ),
        (IPPROTO_TCP, AF_INET6) => (
            Family::V6,
            MappedAddr::from_words(client_v6),
            MappedAddr::from_words(server_v6),
        ),
        _ => return None,
    };
    Some((family, FlowKey::new(client, server, client_port, server_port)))
}

const SOL_TCP: i32 = 6;
/// `TCP_BPF_IW`: the initial congestion window, in segments.
const TCP_BPF_IW: i32 = 1001;
const SOCKOPT_REFUSE: i32 = 0;
const SOCKOPT_PASS: i32 = 1;

/// Answers [`TCP_INITIAL_WINDOW`]; every other option is the kernel's.
#[inline(always)]
fn set_initial_window(sockopt: *mut bpf_sockopt) -> Option<i32> {
    // SAFETY: fields of the context that programs of this type may read, and the option's value within its bounds.
    unsafe {
        if (*sockopt).level != SOL_TCP || (*sockopt).optname != TCP_INITIAL_WINDOW {
            return None;
        }
        let value = (*sockopt).__bindgen_anon_2.optval.cast::<u32>();
        let end = (*sockopt).__bindgen_anon_3.optval_end.cast::<u32>();
        if value.add(1) > end {
            return Some(SOCKOPT_REFUSE);
        }
        let mut segments = *value;
        let socket = (*sockopt).__bindgen_anon_1.sk;
        if bpf_setsockopt(socket.cast(), SOL_TCP, TCP_BPF_IW, (&raw mut segments).cast(), 4) != 0 {
            return Some(SOCKOPT_REFUSE);
        }
        // The kernel has no such option, and is not to be asked.
        (*sockopt).optlen = -1;
    }
    Some(SOCKOPT_PASS)
}

/// A socket buffer, read from its network header on, whether the device has a link-layer header or not.
struct Skb(*mut __sk_buff);

/// Aligned, bytes are looked at by the word and not one by one.
#[repr(align(8))]
struct Words<const N: usize>([u8; N]);

impl Skb {
    /// Whether the packet has these bytes; where it has not, zeroes are written.
    ///
    /// # Safety
    /// `len` bytes fit.
    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut c_void, len: u32) -> bool {
        // SAFETY: the caller's.
        unsafe { bpf_skb_load_bytes_relative(self.0.cast(), offset, to, len, BPF_HDR_START_NET) == 0 }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut words = MaybeUninit::<Words<N>>::uninit();
        // SAFETY: N bytes fit, and have been written if it says so.
        unsafe {
            self.load(offset, words.as_mut_ptr().cast(), N as u32)
                .then(|| words.assume_init().0)
        }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        // SAFETY: N words fit, and have been written if it says so.
        unsafe {
            self.load(offset, words.as_mut_ptr().cast(), N as u32 * 4)
                .then(|| words.assume_init())
        }
    }

    #[inline(always)]
    fn start<const N: usize, const M: usize>(&self) -> Option<[u32; N]> {
        const { assert!(M <= N) };
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        let to = words.as_mut_ptr().cast();
        // SAFETY: N words fit, and so do M. Where the packet has no N, the helper has written as many zeroes.
        unsafe {
            let read = self.load(0, to, N as u32 * 4) || self.load(0, to, M as u32 * 4);
            read.then(|| words.assume_init())
        }
    }

    #[inline(always)]
    fn copy<const N: usize>(&self, offset: u32, len: u32, to: &mut [u8; N]) -> bool {
        if len == 0 || len > N as u32 {
            return false;
        }
        // Older verifiers (seen up to Linux 6.1) forget that comparison once the length is spilled. What follows repeats
        // it in one register; volatile, as the compiler would leave out what changes nothing.
        // SAFETY: a local variable.
        let len = unsafe { (read_volatile(&len) - 1) & (N.next_power_of_two() as u32 - 1) } + 1;
        // SAFETY: `len` bytes fit.
        unsafe { self.load(offset, to.as_mut_ptr().cast(), len) }
    }
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// What is read of the packets may be shown to GPL-only helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
