//! Ingress of the servers' device: packets that server legs send, into the host like the client's own.

use crate::{
    label::origin,
    maps::{INTERFACES, instance, mark},
    skb::Skb,
};

/// Gives a server leg's packet to the ingress of the interface that the client's SYN came in by. None where that is unknown.
#[inline(always)]
pub fn to_host(skb: Skb) -> Option<i32> {
    let ifindex = origin(skb)?;
    // SAFETY: a whole value, which the daemon writes before it attaches to the interface.
    let interface = unsafe { INTERFACES.get(ifindex) }?;
    // Ethernet takes what is sent to its own address; a device without link-layer header takes what is said to be the
    // host's.
    if !skb.write(0, &interface.mac) {
        return None;
    }
    skb.address_to_this_host();
    skb.set_mark(mark());
    skb.set_tc_index(instance());
    Some(skb.redirect_to_ingress(ifindex))
}
