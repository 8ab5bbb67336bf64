//! Fragments: the packet that one belongs to, and the segment that the first shows.

use crate::{
    Counter, FragmentKey, MappedAddr,
    packet::{
        Family, Packet, Segment,
        ip::{EXT_FRAGMENT, PROTO_TCP, Span},
    },
};

/// What a fragment has in common with the others of its packet; nothing of what is whole. An IPv6 fragment header counts only
/// where it comes first, before which there is hardly ever anything.
#[inline(always)]
pub fn fragment_key(packet: &impl Packet, family: Family) -> Option<FragmentKey> {
    match family {
        Family::V4 => {
            let header: [u8; 20] = packet.read(0)?;
            if header[6] & 0x3f == 0 && header[7] == 0 {
                return None;
            }
            // All of the header has to be there.
            let [_]: [u8; 1] = packet.read((u32::from(header[0] & 0x0f) * 4).saturating_sub(1))?;
            Some(FragmentKey::new(
                MappedAddr::v4([header[12], header[13], header[14], header[15]]),
                MappedAddr::v4([header[16], header[17], header[18], header[19]]),
                [header[4], header[5], 0, 0],
                header[9],
            ))
        }
        Family::V6 => {
            let [len_high, len_low, next_header]: [u8; 3] = packet.read(4)?;
            if next_header != EXT_FRAGMENT || u16::from_be_bytes([len_high, len_low]) < 8 {
                return None;
            }
            let header: [u8; 8] = packet.read(40)?;
            let id = [header[4], header[5], header[6], header[7]];
            Some(FragmentKey::new(
                MappedAddr::v6(packet.read(8)?),
                MappedAddr::v6(packet.read(24)?),
                id,
                header[0],
            ))
        }
    }
}

/// The segment whose first fragment this is, of which the ports are needed. It is read apart from [`parse`], which the
/// verifier would otherwise have to go through once more.
#[inline(always)]
pub fn first_fragment(packet: &impl Packet, family: Family) -> Result<Segment, Counter> {
    let (source, destination, protocol, offset, tcp_at, end) = match family {
        Family::V4 => {
            let header: [u8; 20] = packet.read(0).ok_or(Counter::Malformed)?;
            (
                MappedAddr::v4([header[12], header[13], header[14], header[15]]),
                MappedAddr::v4([header[16], header[17], header[18], header[19]]),
                header[9],
                [header[6] & 0x1f, header[7]],
                u32::from(header[0] & 0x0f) * 4,
                u32::from(u16::from_be_bytes([header[2], header[3]])),
            )
        }
        Family::V6 => {
            let payload_len = packet.read(4).ok_or(Counter::Malformed)?;
            let end = 40 + u32::from(u16::from_be_bytes(payload_len));
            let header: [u8; 4] = packet.read(40).ok_or(Counter::Malformed)?;
            let source = packet.read(8).ok_or(Counter::Malformed)?;
            let destination = packet.read(24).ok_or(Counter::Malformed)?;
            (
                MappedAddr::v6(source),
                MappedAddr::v6(destination),
                header[0],
                [header[2], header[3] & 0xf8],
                48,
                end,
            )
        }
    };
    if protocol != PROTO_TCP || offset != [0, 0] {
        return Err(Counter::Fragment);
    }
    if end < tcp_at + 14 {
        return Err(Counter::Malformed);
    }
    let tcp: [u8; 14] = packet.read(tcp_at).ok_or(Counter::Malformed)?;
    Ok(Segment {
        family,
        source,
        destination,
        source_port: [tcp[0], tcp[1]],
        destination_port: [tcp[2], tcp[3]],
        flags: tcp[13],
        tcp: Span::default(),
        ip_options: Span::default(),
        hop_by_hop: Span::default(),
        destination_options: Span::default(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::packet::{ip::EXTENSIONS_WALKED, parse_bytes, sample::any_syn};

    proptest! {
        #[test]
        fn fragments_are_told_apart(syn in any_syn(), offset in 0_u16..8192, more in any::<bool>(), at in any::<prop::sample::Index>()) {
            match syn.family() {
                Family::V4 => {
                    let mut packet = syn.packet();
                    let field = 0x4000 | u16::from(more) << 13 | offset;
                    packet[6..8].copy_from_slice(&field.to_be_bytes());
                    let is_fragment = more || offset > 0;
                    prop_assert_eq!(parse_bytes(&packet, Family::V4) == Err(Counter::Fragment), is_fragment);
                    if is_fragment {
                        let first = first_fragment(&packet.as_slice(), Family::V4);
                        prop_assert_eq!(first.map(|segment| segment.flow()).ok(), (offset == 0).then(|| syn.flow()));
                    }
                    prop_assert_eq!(fragment_key(&packet.as_slice(), Family::V4).is_some(), is_fragment);
                }
                Family::V6 => {
                    let mut syn = syn;
                    syn.extensions.truncate(EXTENSIONS_WALKED - 1);
                    let field = (offset << 3 | u16::from(more)).to_be_bytes();
                    let header = (EXT_FRAGMENT, vec![0, field[0], field[1], 0, 0, 0, 1]);
                    let at = at.index(syn.extensions.len() + 1);
                    syn.extensions.insert(at, header);
                    let packet = syn.packet();
                    prop_assert_eq!(parse_bytes(&packet, Family::V6), Err(Counter::Fragment));
                    if syn.extensions.len() == 1 {
                        let first = first_fragment(&packet.as_slice(), Family::V6);
                        prop_assert_eq!(first.map(|segment| segment.flow()).ok(), (offset == 0).then(|| syn.flow()));
                    }
                    prop_assert_eq!(fragment_key(&packet.as_slice(), Family::V6).is_some(), at == 0);
                }
            }
        }
    }
}
