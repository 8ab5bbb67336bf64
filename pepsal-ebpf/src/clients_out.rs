//! Ingress of the clients' device: segments that client legs send, out to the client.

use pepsal_ebpf::packet::{Parsed, parse};

use crate::{label::origin, route, skb::Skb};

/// Sends a segment out by the interface that the client's SYN came in by, and if the client is not to be reached there, by
/// the interface that the host's routing names. None where there is no way.
#[inline(always)]
pub fn to_client(skb: Skb) -> Option<i32> {
    let Ok(Parsed::Tcp(segment)) = parse(&skb, skb.family()?) else {
        return None;
    };
    let ifindex = origin(skb)?;
    let next_hop = route::sent(skb, &segment, ifindex).or_else(|| route::forwarded(skb, &segment, ifindex));
    let mut next_hop = next_hop?;
    Some(skb.redirect_to_neighbour(next_hop.ifindex, &mut next_hop.neighbour))
}
