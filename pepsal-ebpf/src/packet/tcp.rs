//! The TCP header: whose segment it is, and whether it opens a connection.

use crate::{
    Counter, FlowKey, MappedAddr,
    packet::{
        Family, Packet,
        ip::{Ip, Span},
    },
};

/// A TCP segment's addressing and flags, with where its headers lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Network protocol.
    pub family: Family,
    /// Source address.
    pub source: MappedAddr,
    /// Destination address.
    pub destination: MappedAddr,
    /// Source port, network order.
    pub source_port: [u8; 2],
    /// Destination port, network order.
    pub destination_port: [u8; 2],
    pub(super) flags: u8,
    pub(super) tcp: Span,
    pub(super) ip_options: Span,
    pub(super) hop_by_hop: Span,
    pub(super) destination_options: Span,
}

pub(super) const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const NOT_A_SYN: u8 = 0x01 | 0x04 | ACK; // FIN, RST, ACK

impl Segment {
    /// Whether this segment opens a connection: SYN without ACK, RST or FIN.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & SYN != 0 && self.flags & NOT_A_SYN == 0
    }

    /// Whether the sender's address is of its link only (RFC 3927, RFC 4291): 169.254.0.0/16, fe80::/10.
    #[inline(always)]
    pub fn is_from_link_local(&self) -> bool {
        let [first, _, _, last] = self.source.words().map(u32::from_be);
        match self.family {
            Family::V4 => last >> 16 == 0xa9fe,
            Family::V6 => first >> 22 == 0xfe80 >> 6,
        }
    }

    /// The key of the flow whose server sent this segment.
    #[inline(always)]
    pub fn answered_flow(&self) -> FlowKey {
        self.swapped().flow()
    }

    /// The key of the flow whose client sent this segment.
    #[inline(always)]
    pub fn flow(&self) -> FlowKey {
        FlowKey::new(
            self.source,
            self.destination,
            self.source_port,
            self.destination_port,
        )
    }

    /// The segment with its two ends exchanged, as one that is an answer to it.
    #[inline(always)]
    pub fn swapped(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}

/// `next` is what follows the IP header's fixed part.
#[inline(always)]
pub(super) fn parse_tcp(
    packet: &impl Packet,
    ip: &Ip,
    next: [u32; 5],
    family: Family,
) -> Result<Segment, Counter> {
    let header = match (family, ip.payload.offset) {
        (Family::V4, 20) | (Family::V6, 40) => next,
        (_, at) => packet.words(at).ok_or(Counter::Malformed)?,
    };
    let [ports, _, _, fourth, _] = header;
    let [a, b, c, d] = ports.to_ne_bytes();
    let (source_port, destination_port) = ([a, b], [c, d]);
    let [offset, flags, ..] = fourth.to_ne_bytes();
    let header_len = u32::from(offset >> 4) * 4;
    // No socket has port 0, so that no leg could have it.
    let has_ports = source_port != [0, 0] && destination_port != [0, 0];
    if header_len < 20 || ip.payload.len < header_len || !has_ports {
        return Err(Counter::Malformed);
    }
    Ok(Segment {
        family,
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        flags,
        tcp: Span {
            offset: ip.payload.offset,
            len: header_len,
        },
        ip_options: ip.options,
        hop_by_hop: ip.hop_by_hop,
        destination_options: ip.destination_options,
    })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{
        Parsed,
        ip::EXT_HOP_BY_HOP,
        parse_bytes,
        sample::{Syn, any_syn},
    };

    proptest! {
        #[test]
        fn etherparse_agrees_on_syns(syn in any_syn()) {
            // It takes hop-by-hop options nowhere but first (RFC 8200, 4.1).
            let hop_by_hop = |(kind, _): &(u8, Vec<u8>)| *kind == EXT_HOP_BY_HOP;
            prop_assume!(!syn.extensions.iter().skip(1).any(hop_by_hop));
            let packet = syn.packet();
            let sliced = SlicedPacket::from_ip(&packet).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let Some((flow, flags)) = sliced_flow(sliced.net.as_ref(), sliced.transport.as_ref()) else {
                return Err(TestCaseError::fail("etherparse sees no TCP"));
            };
            let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, syn.family()) else {
                return Err(TestCaseError::fail("pepsal sees no TCP"));
            };
            prop_assert_eq!((segment.flow(), segment.is_syn()), (flow, flags));
        }

        #[test]
        fn etherparse_agrees_on_packets_with_errors(
            syn in any_syn(),
            errors in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut packet = syn.packet();
            for (index, byte) in errors {
                let index = index.index(packet.len().min(80));
                packet[index] = byte;
            }
            let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, syn.family()) else { return Ok(()) };
            let Ok(sliced) = LaxSlicedPacket::from_ip(&packet) else { return Ok(()) };
            let net = sliced.net.as_ref().map(|net| match net {
                etherparse::LaxNetSlice::Ipv4(ip) => {
                    (IpAddr::from(ip.header().source_addr()), IpAddr::from(ip.header().destination_addr()))
                }
                etherparse::LaxNetSlice::Ipv6(ip) => {
                    (ip.header().source_addr().into(), ip.header().destination_addr().into())
                }
                other => unreachable!("{other:?} is not IP"),
            });
            if let (Some((source, destination)), Some(TransportSlice::Tcp(tcp))) = (net, sliced.transport) {
                let flow = FlowKey::between((source, tcp.source_port()).into(), (destination, tcp.destination_port()).into());
                prop_assert_eq!(segment.flow(), flow);
            }
        }
    }

    /// The flow that etherparse sees, and whether it is a plain SYN.
    fn sliced_flow(
        net: Option<&NetSlice<'_>>,
        transport: Option<&TransportSlice<'_>>,
    ) -> Option<(FlowKey, bool)> {
        let (source, destination): (IpAddr, IpAddr) = match net? {
            NetSlice::Ipv4(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            NetSlice::Ipv6(ip) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            _ => return None,
        };
        let TransportSlice::Tcp(tcp) = transport? else {
            return None;
        };
        let flow = FlowKey::between(
            (source, tcp.source_port()).into(),
            (destination, tcp.destination_port()).into(),
        );
        Some((flow, tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin()))
    }

    #[test]
    fn lengths_within_the_headers_are_malformed() {
        let syn = Syn {
            source: "192.0.2.1:40000".parse().unwrap(),
            destination: "198.51.100.1:80".parse().unwrap(),
            traffic_class: 0,
            ttl: 64,
            flow_label: 0,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            tcp_options: Vec::new(),
            payload: Vec::new(),
        };
        let packet = syn.packet();
        // Total length, header length, data offset.
        for (offset, byte) in [(3, 19), (3, 39), (0, 0x44), (0, 0x4f), (32, 0x40), (32, 0xf0)] {
            let mut packet = packet.clone();
            packet[offset] = byte;
            assert_eq!(
                parse_bytes(&packet, Family::V4),
                Err(Counter::Malformed),
                "byte {offset}: {byte:#x}"
            );
        }
        assert_eq!(parse_bytes(&packet, Family::V6), Err(Counter::Malformed));
        for (source, destination) in [(0, 80), (40_000, 0)] {
            let mut syn = syn.clone();
            syn.source.set_port(source);
            syn.destination.set_port(destination);
            assert_eq!(parse_bytes(&syn.packet(), Family::V4), Err(Counter::Malformed));
        }
    }
}
