//! The IP header, with the extension headers of IPv6: whose the packet is, and where its payload lies.

use crate::{Counter, MappedAddr, packet::Packet};

pub(super) struct Ip {
    pub(super) source: MappedAddr,
    pub(super) destination: MappedAddr,
    pub(super) protocol: u8,
    pub(super) payload: Span,
    pub(super) options: Span,
    pub(super) hop_by_hop: Span,
    pub(super) destination_options: Span,
}

/// Some bytes of the packet; length zero when there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) offset: u32,
    pub(super) len: u32,
}

pub(super) const PROTO_ICMP: u8 = 1;
pub(super) const PROTO_TCP: u8 = 6;
pub(super) const PROTO_ICMPV6: u8 = 58;
pub(super) const EXT_HOP_BY_HOP: u8 = 0;
pub(super) const EXT_ROUTING: u8 = 43;
pub(super) const EXT_FRAGMENT: u8 = 44;
pub(super) const EXT_DESTINATION: u8 = 60;

/// Extension headers that are walked before giving up: each kind once, the destination options twice (RFC 8200, 4.1),
/// with room to spare.
pub(super) const EXTENSIONS_WALKED: usize = 8;

#[inline(always)]
pub(super) fn parse_v4(
    packet: &impl Packet,
    [first, second, third, source, destination]: [u32; 5],
    at: u32,
) -> Result<Ip, Counter> {
    let [version, _, len @ ..] = first.to_ne_bytes();
    let [_, _, flags, fragment_offset] = second.to_ne_bytes();
    let [_, protocol, ..] = third.to_ne_bytes();
    let header_len = u32::from(version & 0x0f) * 4;
    let total_len = or_jumbo(packet, u16::from_be_bytes(len), at);
    if version >> 4 != 4 || header_len < 20 || total_len < header_len {
        return Err(Counter::Malformed);
    }
    // More-fragments flag or a fragment offset.
    if flags & 0x3f != 0 || fragment_offset != 0 {
        return Err(Counter::Fragment);
    }
    Ok(Ip {
        source: MappedAddr::v4(source.to_ne_bytes()),
        destination: MappedAddr::v4(destination.to_ne_bytes()),
        protocol,
        payload: Span {
            offset: at + header_len,
            len: total_len - header_len,
        },
        options: Span {
            offset: at + 20,
            len: header_len - 20,
        },
        hop_by_hop: Span::default(),
        destination_options: Span::default(),
    })
}

#[inline(always)]
pub(super) fn parse_v6(packet: &impl Packet, header: [u32; 10], at: u32) -> Result<Ip, Counter> {
    let [first, second, a, b, c, d, e, f, g, h] = header;
    let [version, ..] = first.to_ne_bytes();
    let [len_high, len_low, protocol, _] = second.to_ne_bytes();
    let source = MappedAddr::from_words([a, b, c, d]);
    let destination = MappedAddr::from_words([e, f, g, h]);
    // A mapped address is not for the wire (RFC 4942, 2.2), and would stand for a flow of IPv4 in the maps.
    if version >> 4 != 6 || source.is_v4() || destination.is_v4() {
        return Err(Counter::Malformed);
    }
    let mut ip = Ip {
        source,
        destination,
        protocol,
        payload: Span {
            offset: at + 40,
            len: or_jumbo(packet, u16::from_be_bytes([len_high, len_low]), at),
        },
        options: Span::default(),
        hop_by_hop: Span::default(),
        destination_options: Span::default(),
    };
    for _ in 0..EXTENSIONS_WALKED {
        match ip.protocol {
            EXT_HOP_BY_HOP | EXT_ROUTING | EXT_DESTINATION => {}
            EXT_FRAGMENT => return Err(Counter::Fragment),
            _ => return Ok(ip),
        }
        let header: [u8; 4] = packet.read(ip.payload.offset).ok_or(Counter::Malformed)?;
        let len = (u32::from(header[1]) + 1) * 8;
        if ip.payload.len < len {
            return Err(Counter::Malformed);
        }
        let span = Span {
            offset: ip.payload.offset,
            len,
        };
        match ip.protocol {
            EXT_HOP_BY_HOP => ip.hop_by_hop = span,
            EXT_DESTINATION => ip.destination_options = span,
            // Segments left: this router is a waypoint and the destination is not the final one (RFC 8200, 4.4).
            _ if header[3] != 0 => return Err(Counter::SourceRoute),
            _ => {}
        }
        ip.protocol = header[0];
        ip.payload = Span {
            offset: span.offset + len,
            len: ip.payload.len - len,
        };
    }
    match ip.protocol {
        PROTO_TCP | PROTO_ICMPV6 => Ok(ip),
        _ => Err(Counter::NotTcp),
    }
}

/// A length in an IP header. Aggregated packets above 64 KiB have none there (BIG TCP): the packet's own end is theirs.
#[inline(always)]
fn or_jumbo(packet: &impl Packet, len: u16, at: u32) -> u32 {
    match len {
        0 if at == 0 && packet.is_aggregated() => JUMBO_LEN,
        len => u32::from(len),
    }
}

/// Longer than every packet, and short enough to be added to an offset.
const JUMBO_LEN: u32 = 1 << 24;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{Family, parse_bytes, sample::syn_of};

    proptest! {
        #[test]
        fn packet_at_a_waypoint_of_its_source_route_is_left_alone(
            mut syn in syn_of(Family::V6), left in 1_u8.., at in any::<prop::sample::Index>(),
        ) {
            syn.extensions.truncate(EXTENSIONS_WALKED - 1);
            let header = (EXT_ROUTING, vec![0, 4, left, 0, 0, 0, 0]);
            syn.extensions.insert(at.index(syn.extensions.len() + 1), header);
            prop_assert_eq!(parse_bytes(&syn.packet(), Family::V6), Err(Counter::SourceRoute));
        }
    }
}
