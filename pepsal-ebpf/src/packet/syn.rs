//! The SYN: what a record keeps of it, and which SYNs no proxy may take.

use crate::{
    Counter, EXTENSION_MAX, IP_OPTIONS_MAX, SynRecord,
    packet::{Family, Packet, Segment, ip::Span},
};

/// Fills `record` with what the SYN says, except for its time and interface; whatever was in `record` is overwritten, and
/// so is `options`.
#[inline(always)]
pub fn record_syn(
    packet: &impl Packet,
    syn: &Segment,
    record: &mut SynRecord,
    options: &mut TcpOptions,
) -> Result<(), Counter> {
    let SynRecord { head, extensions } = record;
    let start: [u8; 9] = packet.read(0).ok_or(Counter::Malformed)?;
    if syn.is_from_link_local() {
        return Err(Counter::LinkLocal);
    }
    match syn.family {
        Family::V4 => {
            refuse_waypoint(packet, syn.ip_options)?;
            head.traffic_class = start[1];
            head.ttl = start[8];
        }
        Family::V6 => {
            head.traffic_class = start[0] << 4 | start[1] >> 4;
            head.ttl = start[7];
        }
    }
    if head.ttl <= 1 {
        return Err(Counter::TtlExceeded);
    }
    let mut truncated = 0;
    head.ip_options_len =
        copy_span::<IP_OPTIONS_MAX>(packet, syn.ip_options, &mut head.ip_options, &mut truncated)?;
    head.hop_by_hop_len =
        copy_span::<EXTENSION_MAX>(packet, syn.hop_by_hop, &mut extensions.hop_by_hop, &mut truncated)?;
    head.destination_len = copy_span::<EXTENSION_MAX>(
        packet,
        syn.destination_options,
        &mut extensions.destination,
        &mut truncated,
    )?;
    head.truncated = truncated;
    let span = Span {
        offset: syn.tcp.offset + 20,
        len: syn.tcp.len - 20,
    };
    if span.len == 0 {
        return Ok(());
    }
    *options = TcpOptions::EMPTY;
    if !packet.copy(span.offset, span.len, &mut options.0) {
        return Err(Counter::Malformed);
    }
    // To walk along the options takes a helper call for each.
    match options.has_any([TCP_MD5, TCP_AO, MPTCP]) {
        true => refuse_of_the_ends(packet, span),
        false => Ok(()),
    }
}

/// Room for the TCP options of a segment, of which there are at most 40 bytes (RFC 9293). Aligned, they are looked at by the
/// word.
#[repr(C, align(8))]
pub struct TcpOptions([u8; 64]);

impl TcpOptions {
    /// None.
    pub const EMPTY: Self = Self([0; 64]);

    /// Whether one of the bytes is one of these, whatever it means there.
    #[inline(always)]
    fn has_any(&self, bytes: [u8; 3]) -> bool {
        const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
        const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
        let mut found = 0;
        for at in [0, 8, 16, 24, 32] {
            let word = [0, 1, 2, 3, 4, 5, 6, 7].map(|byte| self.0[at + byte]);
            for byte in bytes {
                // A byte of zero is what only borrows from its highest bit.
                let zero = u64::from_ne_bytes(word) ^ u64::from_ne_bytes([byte; 8]);
                found |= zero.wrapping_sub(ONES) & !zero & HIGH;
            }
        }
        found != 0
    }
}

#[inline(always)]
fn copy_span<const N: usize>(
    packet: &impl Packet,
    span: Span,
    to: &mut [u8; N],
    truncated: &mut u8,
) -> Result<u8, Counter> {
    if span.len == 0 {
        return Ok(0);
    }
    if span.len > N as u32 {
        *truncated = 1;
        return Ok(0);
    }
    if !packet.copy(span.offset, span.len, to) {
        return Err(Counter::Malformed);
    }
    Ok(span.len as u8)
}

/// A source route that is not at its end (RFC 791): the destination is the next hop on it. Such a segment's checksum is
/// for another destination, and its connection is with that one.
#[inline(always)]
fn refuse_waypoint(packet: &impl Packet, options: Span) -> Result<(), Counter> {
    match has_option(packet, options, |kind, len, pointer| {
        matches!(kind, 131 | 137) && len > 2 && pointer <= len
    })? {
        true => Err(Counter::SourceRoute),
        false => Ok(()),
    }
}

/// SYNs whose connection is the two ends' own: signed with TCP-MD5 (RFC 2385) or TCP-AO (RFC 5925), for which a proxy has no
/// key and is what they guard against; or of one more path of a connection that is there already (MP_JOIN, RFC 8684, 3.2).
#[inline(always)]
fn refuse_of_the_ends(packet: &impl Packet, options: Span) -> Result<(), Counter> {
    if has_option(packet, options, |kind, len, third| {
        matches!(kind, TCP_MD5 | TCP_AO) && len > 2 || kind == MPTCP && len > 2 && third >> 4 == MP_JOIN
    })? {
        let is_signed = has_option(packet, options, |kind, len, _| {
            matches!(kind, TCP_MD5 | TCP_AO) && len > 2
        })?;
        return match is_signed {
            true => Err(Counter::TcpAuth),
            false => Err(Counter::MpJoin),
        };
    }
    Ok(())
}

/// Whether there is an option, of IPv4 (RFC 791) or TCP (RFC 9293), of which `is_wanted` says yes to its kind, its length
/// and the byte after that.
#[inline(always)]
fn has_option(
    packet: &impl Packet,
    options: Span,
    is_wanted: impl Fn(u8, u8, u8) -> bool,
) -> Result<bool, Counter> {
    let end = options.offset + options.len;
    let mut at = options.offset;
    for _ in 0..OPTIONS_WALKED {
        if at + 3 > end {
            return Ok(false);
        }
        let [kind, len, third] = packet.read(at).ok_or(Counter::Malformed)?;
        match kind {
            0 => return Ok(false),
            1 => at += 1,
            // It contradicts itself, and hides what follows.
            _ if len < 2 || at + u32::from(len) > end => return Ok(false),
            _ if is_wanted(kind, len, third) => return Ok(true),
            _ => at += u32::from(len),
        }
    }
    Err(Counter::Malformed)
}

/// Options that are walked along: so many that a signature behind them would not fit. A SYN with more of them passes.
const OPTIONS_WALKED: usize = 24;

/// Kinds of TCP options.
const TCP_MD5: u8 = 19;
const TCP_AO: u8 = 29;
const MPTCP: u8 = 30;
/// Its subtype that joins a connection.
const MP_JOIN: u8 = 1;

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::packet::{
        Parsed,
        ip::{EXT_DESTINATION, EXT_HOP_BY_HOP},
        parse_bytes,
        sample::{Syn, any_syn, syn_of},
    };

    proptest! {
        #[test]
        fn syn_is_parsed_and_recorded_as_it_was_built(syn in any_syn()) {
            let packet = syn.packet();
            let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, syn.family()) else {
                return Err(TestCaseError::fail(format!("{:?}", parse_bytes(&packet, syn.family()))));
            };
            prop_assert!(segment.is_syn());
            prop_assert_eq!(segment.flow(), syn.flow());
            let mut record = SynRecord::EMPTY;
            record.head.truncated = 7;
            prop_assert_eq!(record_syn(&packet.as_slice(), &segment, &mut record, &mut { TcpOptions::EMPTY }), Ok(()));
            prop_assert_eq!((record.traffic_class, record.ttl), (syn.traffic_class, syn.ttl));
            prop_assert_eq!(record.ip_options(), &syn.ip_options);
            prop_assert_eq!(record.hop_by_hop(), syn.extension(EXT_HOP_BY_HOP));
            prop_assert_eq!(record.destination(), syn.extension(EXT_DESTINATION));
            let too_long = [EXT_HOP_BY_HOP, EXT_DESTINATION].iter().any(|protocol| {
                let last = syn.extensions.iter().rfind(|(found, _)| found == protocol);
                last.is_some_and(|(_, rest)| rest.len() >= EXTENSION_MAX)
            });
            prop_assert_eq!(record.truncated, u8::from(too_long));
        }

        #[test]
        fn syn_cut_short_is_malformed_or_the_same_flow(syn in any_syn()) {
            let packet = syn.packet();
            for len in 0..packet.len() {
                let cut = &packet[..len];
                match parse_bytes(cut, syn.family()) {
                    Err(counter) => prop_assert_eq!(counter, Counter::Malformed, "{} bytes", len),
                    Ok(Parsed::Tcp(segment)) => {
                        prop_assert_eq!(segment.flow(), syn.flow());
                        let recorded = record_syn(&cut, &segment, &mut { SynRecord::EMPTY }, &mut { TcpOptions::EMPTY });
                        prop_assert_eq!(recorded.is_ok(), len >= syn.headers_len(), "{} bytes", len);
                    }
                    Ok(other) => prop_assert!(false, "{len} bytes: {other:?}"),
                }
            }
        }

        #[test]
        fn syn_with_an_option_that_forbids_splitting_is_left_alone(
            mut syn in syn_of(Family::V4), before in 0_usize..5, is_strict: bool, is_ao: bool, left in 0_u8..4,
        ) {
            let packet = |syn: &Syn| {
                let packet = syn.packet();
                let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, Family::V4) else { panic!("a segment") };
                record_syn(&packet.as_slice(), &segment, &mut SynRecord::EMPTY.clone(), &mut { TcpOptions::EMPTY })
            };
            // A route of three hops, of which `left` are still to come.
            let route = [if is_strict { 137 } else { 131 }, 15, 16 - 4 * left, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 0];
            syn.ip_options = [&[1; 4][..before.min(4)], &route, &[0; 4][before.min(4)..]].concat();
            let expected = if left > 0 { Err(Counter::SourceRoute) } else { Ok(()) };
            prop_assert_eq!(packet(&syn), expected);

            syn.ip_options = Vec::new();
            let signature = [if is_ao { 29 } else { 19 }, 18];
            syn.tcp_options = [&vec![1; before][..], &signature, &[7; 16], &vec![0; 10 - before - before % 2]].concat();
            syn.tcp_options.resize(syn.tcp_options.len().next_multiple_of(4), 0);
            prop_assert_eq!(packet(&syn), Err(Counter::TcpAuth));
        }

        #[test]
        fn syn_that_no_router_or_no_proxy_may_take_is_left_alone(
            mut syn in any_syn(), host in any::<u16>(), ttl in 0_u8..2, before in 0_usize..4, subtype in 0_u8..16,
        ) {
            syn.ip_options = Vec::new();
            syn.extensions = Vec::new();
            let recorded = |syn: &Syn| {
                let packet = syn.packet();
                let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, syn.family()) else { panic!("a segment") };
                record_syn(&packet.as_slice(), &segment, &mut SynRecord::EMPTY.clone(), &mut { TcpOptions::EMPTY })
            };
            let [high, low] = host.to_be_bytes();
            let link_local: IpAddr = match syn.family() {
                Family::V4 => [169, 254, high, low].into(),
                Family::V6 => [0xfe80 | host & 0x3f, 0, 0, 0, 0, 0, 0, host].into(),
            };
            let port = syn.source.port();
            let local = Syn { source: (link_local, port).into(), ..syn.clone() };
            prop_assert_eq!(recorded(&local), Err(Counter::LinkLocal));
            prop_assert_eq!(recorded(&Syn { ttl, ..syn.clone() }), Err(Counter::TtlExceeded));
            syn.tcp_options = [&vec![1; before][..], &[30, 12, subtype << 4], &[7; 9]].concat();
            syn.tcp_options.resize(syn.tcp_options.len().next_multiple_of(4), 0);
            let expected = if subtype == MP_JOIN { Err(Counter::MpJoin) } else { Ok(()) };
            prop_assert_eq!(recorded(&syn), expected);
        }
    }
}
