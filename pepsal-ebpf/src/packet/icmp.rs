//! ICMP messages about a segment, and the segment that they quote.

use crate::{
    Counter,
    packet::{
        Family, Packet, Parsed, Segment,
        ip::{Ip, PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, Span, parse_v4, parse_v6},
    },
};

/// The quoted segment need only show its ports: errors quote as little as eight bytes of it (RFC 792).
#[inline(always)]
pub(super) fn parse_icmp_error(packet: &impl Packet, ip: &Ip, family: Family) -> Result<Parsed, Counter> {
    let header: [u8; 8] = packet.read(ip.payload.offset).ok_or(Counter::Malformed)?;
    if !is_error(family, header[0]) {
        return Err(Counter::NotTcp);
    }
    let end = ip.payload.offset + ip.payload.len;
    quoted(packet, ip.payload.offset + 8, end, family).map(Parsed::IcmpError)
}

/// The segment that an ICMP redirect (RFC 792; RFC 4861, 4.5) is about, turned round.
#[inline(always)]
pub fn redirected(packet: &impl Packet, family: Family) -> Option<Segment> {
    match family {
        Family::V4 => {
            let [first, _, third, ..]: [u32; 5] = packet.words(0)?;
            let [version, _, len @ ..] = first.to_ne_bytes();
            let at = u32::from(version & 0x0f) * 4;
            let [icmp_type]: [u8; 1] = packet.read(at)?;
            if third.to_ne_bytes()[1] != PROTO_ICMP || icmp_type != REDIRECT_V4 {
                return None;
            }
            quoted(packet, at + 8, u32::from(u16::from_be_bytes(len)), family).ok()
        }
        Family::V6 => {
            let [len_high, len_low, protocol]: [u8; 3] = packet.read(4)?;
            let [icmp_type]: [u8; 1] = packet.read(40)?;
            if protocol != PROTO_ICMPV6 || icmp_type != REDIRECT_V6 {
                return None;
            }
            let end = 40 + u32::from(u16::from_be_bytes([len_high, len_low]));
            // Type, code, checksum, four bytes that are reserved, two addresses.
            let mut at = 40 + 40;
            for _ in 0..REDIRECT_OPTIONS_WALKED {
                let [kind, len]: [u8; 2] = packet.read(at)?;
                if kind == REDIRECTED_HEADER {
                    return quoted(packet, at + 8, end, family).ok();
                }
                at += u32::from(len) * 8;
            }
            None
        }
    }
}

/// The segment that an ICMP message quotes at an offset, turned round. The message ends at `end`.
#[inline(always)]
fn quoted(packet: &impl Packet, at: u32, end: u32, family: Family) -> Result<Segment, Counter> {
    let quoted = match family {
        Family::V4 => parse_v4(packet, packet.words(at).ok_or(Counter::Malformed)?, at)?,
        Family::V6 => parse_v6(packet, packet.words(at).ok_or(Counter::Malformed)?, at)?,
    };
    if quoted.protocol != PROTO_TCP {
        return Err(Counter::NotTcp);
    }
    // What the quoted packet and the quoting one both say is there.
    if quoted.payload.len < 8 || end < quoted.payload.offset + 8 {
        return Err(Counter::Malformed);
    }
    let ports: [u8; 8] = packet.read(quoted.payload.offset).ok_or(Counter::Malformed)?;
    let segment = Segment {
        family,
        source: quoted.source,
        destination: quoted.destination,
        source_port: [ports[0], ports[1]],
        destination_port: [ports[2], ports[3]],
        flags: 0,
        tcp: Span::default(),
        ip_options: Span::default(),
        hop_by_hop: Span::default(),
        destination_options: Span::default(),
    };
    Ok(segment.swapped())
}

/// Whether an ICMP type is an error that quotes the packet it is about.
///
/// IPv4: destination unreachable, time exceeded, parameter problem (RFC 1122, 3.2.2). IPv6: the same and packet too
/// big (RFC 4443, 2.1).
#[inline(always)]
fn is_error(family: Family, icmp_type: u8) -> bool {
    match family {
        Family::V4 => matches!(icmp_type, 3 | 11 | 12),
        Family::V6 => matches!(icmp_type, 1..=4),
    }
}

/// Options that are looked at in a redirect of IPv6: the quoted packet comes after the link-layer address, if there is one.
const REDIRECT_OPTIONS_WALKED: usize = 3;
const REDIRECT_V4: u8 = 5;
const REDIRECT_V6: u8 = 137;
/// Redirected header (RFC 4861, 4.6.3).
const REDIRECTED_HEADER: u8 = 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        FlowKey,
        packet::{
            parse_bytes,
            sample::{Syn, any_syn},
        },
    };

    proptest! {
        #[test]
        fn icmp_error_names_the_quoted_flow_turned_round(syn in any_syn(), icmp_type in any::<u8>(), more in 0..50_usize) {
            let segment_at = syn.packet().len() - syn.segment().len();
            let quoted = &syn.packet()[..(segment_at + 8 + more).min(syn.packet().len())];
            let error = icmp_error(&syn, icmp_type, quoted);
            let expected = FlowKey::between(syn.destination, syn.source);
            let parsed = parse_bytes(&error, syn.family());
            if !is_error(syn.family(), icmp_type) {
                prop_assert_eq!(parsed, Err(Counter::NotTcp));
                return Ok(());
            }
            let Ok(Parsed::IcmpError(segment)) = parsed else {
                return Err(TestCaseError::fail(format!("{parsed:?}")));
            };
            prop_assert_eq!(segment.flow(), expected);
            prop_assert!(!segment.is_syn(), "an error opens no flow");
            let needed = error.len() - quoted.len() + segment_at + 8;
            for len in 0..error.len() {
                match parse_bytes(&error[..len], syn.family()) {
                    Err(counter) => {
                        prop_assert!(len < needed);
                        prop_assert_eq!(counter, Counter::Malformed);
                    }
                    Ok(same) => prop_assert_eq!(same, Parsed::IcmpError(segment)),
                }
            }
        }

        #[test]
        fn redirect_names_the_quoted_flow_turned_round(syn in any_syn(), has_address: bool, more in 0..50_usize) {
            let segment_at = syn.packet().len() - syn.segment().len();
            let quoted = &syn.packet()[..(segment_at + 8 + more).min(syn.packet().len())];
            let redirect = match syn.family() {
                Family::V4 => icmp_error(&syn, REDIRECT_V4, quoted),
                Family::V6 => {
                    let link_layer_address: &[u8] = if has_address { &[2, 1, 7, 7, 7, 7, 7, 7] } else { &[] };
                    let body = [&[0; 32], link_layer_address, &[REDIRECTED_HEADER, 9, 0, 0, 0, 0, 0, 0], quoted].concat();
                    icmp_error(&syn, REDIRECT_V6, &body)
                }
            };
            let expected = FlowKey::between(syn.destination, syn.source);
            let segment = redirected(&redirect.as_slice(), syn.family());
            prop_assert_eq!(segment.map(|segment| segment.flow()), Some(expected));
            prop_assert_eq!(redirected(&syn.packet().as_slice(), syn.family()), None);
        }
    }

    /// What a router sends back when it cannot forward the packet: the quoted bytes behind an ICMP header.
    fn icmp_error(syn: &Syn, icmp_type: u8, quoted: &[u8]) -> Vec<u8> {
        let message = [&[icmp_type, 0, 0, 0, 0, 0, 0, 0], quoted].concat();
        let protocol = if syn.family() == Family::V4 {
            PROTO_ICMP
        } else {
            PROTO_ICMPV6
        };
        Syn {
            extensions: Vec::new(),
            ..syn.clone()
        }
        .ip(protocol, &message)
    }
}
