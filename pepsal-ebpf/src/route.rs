//! The host's own routing, asked for a packet.

use aya_ebpf::{
    bindings::{bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::generated::bpf_fib_lookup,
};
use pepsal_ebpf::packet::{Family, Segment};

use crate::skb::Skb;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// `BPF_FIB_LOOKUP_OUTPUT`: as for a packet that is sent out through the given interface, and no other.
const OUTPUT: u32 = 1 << 1;

/// `struct bpf_fib_lookup` of the kernel's `uapi/linux/bpf.h`, input side.
#[repr(C)]
struct FibLookup {
    family: u8,
    l4_protocol: u8,
    sport: [u8; 2],
    dport: [u8; 2],
    tot_len: u16,
    ifindex: u32,
    tos_or_flowinfo: u32,
    source: [u32; 4],
    destination: [u32; 4],
    vlan: [u16; 2],
    macs: [u8; 12],
}

const _: () = assert!(size_of::<FibLookup>() == 64);

/// The next hop of a packet: the interface, and the neighbour behind it.
pub struct NextHop {
    pub ifindex: u32,
    pub neighbour: bpf_redir_neigh,
}

/// The next hop of a packet that came in by an interface, as the gateway would forward it. The gateway's own addresses and
/// destinations without a route have none.
#[inline(always)]
pub fn forwarded(skb: Skb, segment: &Segment, ingress_ifindex: u32) -> Option<NextHop> {
    look_up(skb, segment, ingress_ifindex, 0)
}

/// The next hop of a packet that leaves by an interface, where its destination is to be reached by that.
#[inline(always)]
pub fn sent(skb: Skb, segment: &Segment, egress_ifindex: u32) -> Option<NextHop> {
    look_up(skb, segment, egress_ifindex, OUTPUT)
}

#[inline(always)]
fn look_up(skb: Skb, segment: &Segment, ifindex: u32, flags: u32) -> Option<NextHop> {
    let mut lookup = FibLookup {
        family: AF_INET6,
        l4_protocol: IPPROTO_TCP,
        sport: segment.source_port,
        dport: segment.destination_port,
        // Else the helper compares the whole frame with the device's packet size, and a device without link-layer header
        // takes no frames.
        tot_len: 1,
        ifindex,
        tos_or_flowinfo: 0,
        source: segment.source.words(),
        destination: segment.destination.words(),
        vlan: [0; 2],
        macs: [0; 12],
    };
    if segment.family == Family::V4 {
        let ([.., s], [.., d]) = (segment.source.words(), segment.destination.words());
        lookup.family = AF_INET;
        lookup.source = [s, 0, 0, 0];
        lookup.destination = [d, 0, 0, 0];
    }
    // SAFETY: the helper reads and writes the struct, whose size it is told.
    let result = unsafe {
        bpf_fib_lookup(
            skb.0.cast(),
            (&raw mut lookup).cast(),
            size_of::<FibLookup>() as i32,
            flags,
        )
    };
    // Found; found but the encapsulation or the neighbour is still to be resolved, which the stack does.
    matches!(result, 0 | 6 | 7).then_some(NextHop {
        ifindex: lookup.ifindex,
        neighbour: bpf_redir_neigh {
            nh_family: u32::from(lookup.family),
            __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
                ipv6_nh: lookup.destination,
            },
        },
    })
}
