//! Egress of every interface: segments that the host has forwarded, or sent, to a server leg as to the client.

use pepsal_ebpf::{
    Counter, DEVICE_MAC,
    packet::{Family, Parsed, parse, redirected},
};

use crate::{
    maps::{INTERFACES, clients_ifindex, servers_ifindex},
    skb::Skb,
    sockets::{Found, Side},
};

/// Whether a client leg has sent the packet: it came in by the clients' device, and is on its way to the client.
#[inline(always)]
pub fn is_of_client_leg(skb: Skb) -> bool {
    skb.ingress_ifindex() == clients_ifindex()
}

/// `Ok` for a packet that is for the servers' side, `Err` for one that passes as it is.
#[inline(always)]
pub fn classify(skb: Skb) -> Result<Counter, Counter> {
    match classify_whole(skb) {
        Err(Counter::Fragment) => Side::Servers.find_fragment(skb).map(|()| Counter::Returned),
        decided => decided,
    }
}

#[inline(always)]
fn classify_whole(skb: Skb) -> Result<Counter, Counter> {
    if skb.is_of_vlan() {
        return Err(Counter::Vlan);
    }
    let family = skb.family().ok_or(Counter::NotIp)?;
    let (segment, counter) = match parse(&skb, family) {
        Ok(Parsed::Tcp(segment)) => (segment, Counter::Returned),
        Ok(Parsed::IcmpError(segment)) => (segment, Counter::IcmpError),
        Err(Counter::NotTcp) => return classify_redirect(skb, family),
        Err(counter) => return Err(counter),
    };
    match Side::Servers.find(skb, &segment) {
        Found::Leg(_) => Ok(counter),
        _ => Err(Counter::NoFlow),
    }
}

/// A redirect about what a server leg sends goes to the client, one about what the server sends to the server.
#[inline(always)]
fn classify_redirect(skb: Skb, family: Family) -> Result<Counter, Counter> {
    let segment = redirected(&skb, family).ok_or(Counter::NotTcp)?;
    let is_of_leg = |segment| matches!(Side::Servers.find(skb, &segment), Found::Leg(_));
    match is_of_leg(segment) || is_of_leg(segment.swapped()) {
        true => Ok(Counter::IcmpRedirect),
        false => Err(Counter::NotTcp),
    }
}

/// Gives a packet to the servers' side. The device pair takes Ethernet frames that are for its inner end. None where the
/// packet cannot be made one.
#[inline(always)]
pub fn to_servers(skb: Skb) -> Option<i32> {
    // SAFETY: a whole value, which the daemon writes before it attaches to the interface.
    let has_header =
        unsafe { INTERFACES.get(skb.ifindex()) }.is_none_or(|interface| interface.has_header != 0);
    let is_framed = has_header || frame(skb);
    (is_framed && skb.write(0, &DEVICE_MAC)).then(|| skb.redirect(servers_ifindex()))
}

#[inline(always)]
fn frame(skb: Skb) -> bool {
    let ethertype = match skb.family() {
        Some(Family::V4) => [0x08, 0x00],
        Some(Family::V6) => [0x86, 0xdd],
        None => return false,
    };
    skb.push_ethernet() && skb.write(12, &ethertype)
}
