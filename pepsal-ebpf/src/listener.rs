//! Socket lookup of the client legs' namespace: gives the daemon's listeners the connections that are recorded.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, BPF_SK_LOOKUP_F_REPLACE, bpf_sk_lookup},
    programs::SkLookupContext,
};
use pepsal_ebpf::{Counter, FlowKey, MappedAddr, packet::Family};

use crate::{
    maps::{FLOWS, LISTENERS},
    steer::listener,
};

pub const SK_PASS: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// This very listener, whichever group its port is shared in.
const ASSIGN_FLAGS: u64 = (BPF_SK_LOOKUP_F_REPLACE | BPF_SK_LOOKUP_F_NO_REUSEPORT) as u64;

/// Gives the listener a connection that `pepsal_steer` recorded. All others are none of its business, so that local services
/// keep working.
#[inline(always)]
pub fn assign(ctx: &SkLookupContext) -> Option<Counter> {
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
