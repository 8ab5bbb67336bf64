//! Ingress of an intercepted interface: client legs' segments, and new connections.

use core::{
    ffi::c_void,
    hint::black_box,
    ptr::{addr_of, read_volatile},
};

use aya_ebpf::{
    helpers::generated::{bpf_check_mtu, bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_release},
    maps::{LpmTrie, lpm_trie},
    programs::TcContext,
};
use aya_log_ebpf::info;
use pepsal_ebpf::{
    Counter, MappedAddr, NO_LINK, PORT_SET_BYTES, PrefixKey, SynHead, SynRecord, listener_v4, listener_v6,
    packet::{Family, Parsed, Segment, parse, record_syn},
};

use crate::{
    client_limit,
    maps::{
        DESTINATIONS, EXTENSIONS, FLOWS, GENERATION, HEARTBEAT, INTERFACES, LINKS, LISTENERS, PORT_SETS,
        SCRATCH, SOURCES, Scratch, clients_ifindex, conns_per_client, heartbeat_bound_ns, instance, log_syns,
        mark, mark_mask, note_flow, predecessor, servers_ifindex,
    },
    route,
    skb::Skb,
    sockets::{Found, Side, TCP_NEW_SYN_RECV, TCP_TIME_WAIT},
};

const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;
const E2BIG: i32 = -7;
const EEXIST: i32 = -17;

/// What becomes of a server leg's packet that a pepsal has given to this interface's ingress: this instance's own goes on as
/// the client's, without the mark; another's is left for that one's program.
#[inline(always)]
pub fn injected(skb: Skb) -> Option<Counter> {
    if skb.mark() & mark_mask() != mark() {
        return None;
    }
    if skb.tc_index() != u32::from(instance()) {
        return Some(Counter::NoFlow);
    }
    skb.set_mark(skb.mark() & !mark_mask());
    // The instance's number stays: one that has taken over knows by it whose SYN this is.
    Some(Counter::Injected)
}

/// `Ok` for a packet that is for the clients' side, `Err` for one that passes as it is.
#[inline(always)]
pub fn classify(ctx: &TcContext) -> Result<Counter, Counter> {
    match classify_whole(ctx) {
        Err(Counter::Fragment) => Side::Clients
            .find_fragment(Skb(ctx.skb.skb))
            .map(|()| Counter::Steered),
        decided => decided,
    }
}

#[inline(always)]
fn classify_whole(ctx: &TcContext) -> Result<Counter, Counter> {
    let skb = Skb(ctx.skb.skb);
    if skb.is_of_vlan() {
        return Err(Counter::Vlan);
    }
    let family = skb.family().ok_or(Counter::NotIp)?;
    match parse(&skb, family)? {
        Parsed::Tcp(segment) => match Side::Clients.find(skb, &segment) {
            Found::Leg(TCP_NEW_SYN_RECV) if segment.is_syn() => Ok(Counter::Retransmitted),
            // A SYN may take over the ports of a connection in TIME_WAIT: it opens a flow of its own.
            Found::Leg(TCP_TIME_WAIT) | Found::Listener | Found::Nothing if segment.is_syn() => {
                intercept(ctx, segment)
            }
            Found::Leg(_) => Ok(Counter::Steered),
            // With SYN cookies there is no socket until the handshake is over. `pepsal_listener` takes part in every
            // look-up: where it found nothing there is no record either, which spares all foreign segments a question.
            // SAFETY: the record is not looked into.
            Found::Listener if unsafe { FLOWS.get(segment.flow()) }.is_some() => Ok(Counter::Pending),
            _ => Err(Counter::NoFlow),
        },
        Parsed::IcmpError(segment) => match Side::Clients.find(skb, &segment) {
            Found::Leg(_) => Ok(Counter::IcmpError),
            _ => Err(Counter::NoFlow),
        },
    }
}

/// Decides about a connection that is not there yet. The cheap questions come first.
#[inline(always)]
fn intercept(ctx: &TcContext, syn: Segment) -> Result<Counter, Counter> {
    let skb = Skb(ctx.skb.skb);
    if !skb.is_for_this_host() {
        return Err(Counter::OtherHost);
    }
    if predecessor() != 0 && skb.tc_index() == u32::from(predecessor()) {
        return Err(Counter::NoFlow);
    }
    let ingress_ifindex = skb.ifindex();
    // SAFETY: a whole value, which the daemon writes before it attaches to the interface.
    if unsafe { INTERFACES.get(ingress_ifindex) }.is_none_or(|interface| interface.intercepts == 0) {
        return Err(Counter::NotIntercepted);
    }
    let scratch = SCRATCH.get_ptr_mut(0).ok_or(Counter::RecordFailed)?;
    // SAFETY: the element is this CPU's own, and programs are not preempted by themselves.
    let scratch = unsafe { &mut *scratch };
    scratch.syn = syn;
    // What is read from a map again is any number to the verifier. Else older ones (seen up to Linux 6.1) would check the
    // rest once for each way through the headers that leads here, and that takes them seconds.
    let Scratch { syn, record, options } = black_box(scratch);
    if !selected(syn) {
        return Err(Counter::NotSelected);
    }
    // A simultaneous open (RFC 9293, 3.5), of which one flow is enough: its server leg will meet this end's SYNs.
    // SAFETY: the record is not looked into.
    if unsafe { FLOWS.get(syn.answered_flow()) }.is_some() {
        return Err(Counter::SimultaneousOpen);
    }
    if !is_listening(listener(syn.family, ingress_ifindex)) {
        return Err(Counter::NoListener);
    }
    if !exists(skb, clients_ifindex()) || !exists(skb, servers_ifindex()) {
        return Err(Counter::NoDevice);
    }
    let next_hop = route::forwarded(skb, syn, ingress_ifindex).ok_or(Counter::NotForwarded)?;
    let heartbeat = HEARTBEAT.get_ptr(0).ok_or(Counter::RecordFailed)?;
    // SAFETY: a helper without arguments, and an element that the daemon writes whole.
    let (now, heartbeat) = unsafe { (bpf_ktime_get_ns(), read_volatile(heartbeat)) };
    if now > heartbeat.saturating_add(heartbeat_bound_ns()) {
        return Err(Counter::HeartbeatExpired);
    }

    record_syn(&skb, syn, record, options)?;
    let SynRecord { head, extensions } = record;
    head.time_ns = now;
    head.ingress_ifindex = ingress_ifindex;
    head.egress_ifindex = next_hop.ifindex;

    let (flow, head) = (syn.flow(), &*head);
    // A SYN that comes again has been counted.
    // SAFETY: the record is not looked into.
    let is_counted = conns_per_client() != 0 && unsafe { FLOWS.get(flow) }.is_none();
    if is_counted && !client_limit::take(&flow) {
        return Err(Counter::ClientLimitReached);
    }
    if head.has_extensions() {
        // Where it is missing the daemon notices.
        let _ = EXTENSIONS.insert(flow, extensions, 0);
    }
    note_flow(&flow);
    let inserted = FLOWS.insert(flow, head, BPF_NOEXIST);
    if is_counted && inserted.is_err() {
        client_limit::give_back(&flow);
    }
    match inserted {
        Ok(()) => {}
        // The port is used again, or SYN cookies are on: the newest SYN counts, and the flow has its place already. Where
        // it has ended meanwhile, the client sends its SYN again.
        Err(EEXIST) => {
            let _ = FLOWS.insert(flow, head, BPF_EXIST);
            return Ok(Counter::Retransmitted);
        }
        Err(E2BIG) => return Err(Counter::LimitReached),
        Err(_) => return Err(Counter::RecordFailed),
    }
    if log_syns() != 0 {
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
fn is_listening(index: u32) -> bool {
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

/// Whether a device is there: what is redirected to one that somebody has removed is lost.
#[inline(always)]
fn exists(skb: Skb, ifindex: u32) -> bool {
    let mut mtu = 0;
    // SAFETY: the helper reads and writes one word.
    unsafe { bpf_check_mtu(skb.0.cast(), ifindex, &raw mut mtu, 0, 0) >= 0 }
}

/// The slot of the listener for connections that arrive on an interface.
#[inline(always)]
pub fn listener(family: Family, ingress_ifindex: u32) -> u32 {
    // SAFETY: a whole word, which the daemon writes before it attaches to the interface.
    let link = unsafe { LINKS.get(ingress_ifindex) }.copied().unwrap_or(NO_LINK);
    match family {
        Family::V4 => listener_v4(link),
        Family::V6 => listener_v6(link),
    }
}
