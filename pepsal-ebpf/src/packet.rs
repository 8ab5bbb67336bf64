//! Bytes to headers: what steering has to know of a packet, parsed without touching a map or a helper.
//!
//! The parser reads through [`Packet`], which is a socket buffer in the kernel and a slice in the tests. Every read
//! is of a fixed size at a computed offset and is refused past the packet's end, which is all that the verifier asks.
//! The packet starts at its network header.

use crate::{Counter, EXTENSION_MAX, FlowKey, FragmentKey, IP_OPTIONS_MAX, MappedAddr, SynRecord};

/// A packet, from its network header on.
pub trait Packet {
    /// The `N` bytes at `offset`, or nothing when the packet ends before them.
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// The `N` words at `offset`, as they lie in the packet, or nothing when it ends before them. Headers are looked at by the
    /// word: by the byte, an address takes as long as its look-up.
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]>;

    /// The first `N` words, as they lie in the packet, or the first `M` of a shorter one, followed by zeroes; nothing when
    /// it is shorter still.
    fn start<const N: usize, const M: usize>(&self) -> Option<[u32; N]>;

    /// Copies `len` bytes at `offset` to the start of `to`; false when the packet or `to` is shorter.
    fn copy<const N: usize>(&self, offset: u32, len: u32, to: &mut [u8; N]) -> bool;

    /// Whether it is several segments in one (GRO), whose length may be more than the IP header can express.
    fn is_aggregated(&self) -> bool;
}

/// A packet of one piece, as tests have it.
impl Packet for &[u8] {
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(offset as usize..)?.first_chunk().copied()
    }

    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let (words, _) = self.get(offset as usize..)?.as_chunks();
        Some(words.first_chunk::<N>()?.map(u32::from_ne_bytes))
    }

    fn start<const N: usize, const M: usize>(&self) -> Option<[u32; N]> {
        self.words(0).or_else(|| {
            let mut start = [0; N];
            *start.first_chunk_mut::<M>()? = self.words(0)?;
            Some(start)
        })
    }

    fn copy<const N: usize>(&self, offset: u32, len: u32, to: &mut [u8; N]) -> bool {
        let from = self
            .get(offset as usize..)
            .and_then(|bytes| bytes.get(..len as usize));
        match (from, to.get_mut(..len as usize)) {
            (Some(from), Some(to)) if len > 0 => {
                to.copy_from_slice(from);
                true
            }
            _ => false,
        }
    }

    fn is_aggregated(&self) -> bool {
        false
    }
}

/// The network protocols that can carry TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

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
    flags: u8,
    tcp: Span,
    ip_options: Span,
    hop_by_hop: Span,
    destination_options: Span,
}

/// Some bytes of the packet; length zero when there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Span {
    offset: u32,
    len: u32,
}

const SYN: u8 = 0x02;
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

/// What a packet is to pepsal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A TCP segment.
    Tcp(Segment),
    /// An ICMP error; the segment is the quoted one turned round, so that it is addressed as an answer to it would be.
    IcmpError(Segment),
}

const PROTO_ICMP: u8 = 1;
const PROTO_TCP: u8 = 6;
const PROTO_ICMPV6: u8 = 58;
const EXT_HOP_BY_HOP: u8 = 0;
const EXT_ROUTING: u8 = 43;
const EXT_FRAGMENT: u8 = 44;
const EXT_DESTINATION: u8 = 60;

/// Extension headers that are walked before giving up: each kind once, the destination options twice (RFC 8200, 4.1),
/// with room to spare.
const EXTENSIONS_WALKED: usize = 8;

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

/// Finds the TCP header, or says why the packet is none of pepsal's business.
#[inline(always)]
pub fn parse(packet: &impl Packet, family: Family) -> Result<Parsed, Counter> {
    // With what is the TCP header most of the time: a second read takes as long as all the rest. A packet that ends before
    // has none.
    let (ip, next) = match family {
        Family::V4 => {
            let [a, b, c, d, e, next @ ..]: [u32; 10] = packet.start::<_, 5>().ok_or(Counter::Malformed)?;
            (parse_v4(packet, [a, b, c, d, e], 0)?, next)
        }
        Family::V6 => {
            let [a, b, c, d, e, f, g, h, i, j, next @ ..]: [u32; 15] =
                packet.start::<_, 10>().ok_or(Counter::Malformed)?;
            (parse_v6(packet, [a, b, c, d, e, f, g, h, i, j], 0)?, next)
        }
    };
    match (ip.protocol, family) {
        (PROTO_TCP, _) => parse_tcp(packet, &ip, next, family).map(Parsed::Tcp),
        (PROTO_ICMP, Family::V4) | (PROTO_ICMPV6, Family::V6) => parse_icmp_error(packet, &ip, family),
        _ => Err(Counter::NotTcp),
    }
}

struct Ip {
    source: MappedAddr,
    destination: MappedAddr,
    protocol: u8,
    payload: Span,
    options: Span,
    hop_by_hop: Span,
    destination_options: Span,
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

#[inline(always)]
fn parse_v4(
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
fn parse_v6(packet: &impl Packet, header: [u32; 10], at: u32) -> Result<Ip, Counter> {
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
            _ if header[3] != 0 => return Err(Counter::Waypoint),
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

/// `next` is what follows the IP header's fixed part.
#[inline(always)]
fn parse_tcp(packet: &impl Packet, ip: &Ip, next: [u32; 5], family: Family) -> Result<Segment, Counter> {
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

/// The quoted segment need only show its ports: errors quote as little as eight bytes of it (RFC 792).
#[inline(always)]
fn parse_icmp_error(packet: &impl Packet, ip: &Ip, family: Family) -> Result<Parsed, Counter> {
    let header: [u8; 8] = packet.read(ip.payload.offset).ok_or(Counter::Malformed)?;
    if !is_error(family, header[0]) {
        return Err(Counter::NotTcp);
    }
    let end = ip.payload.offset + ip.payload.len;
    quoted(packet, ip.payload.offset + 8, end, family).map(Parsed::IcmpError)
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

/// Options that are looked at in a redirect of IPv6: the quoted packet comes after the link-layer address, if there is one.
const REDIRECT_OPTIONS_WALKED: usize = 3;
const REDIRECT_V4: u8 = 5;
const REDIRECT_V6: u8 = 137;
/// Redirected header (RFC 4861, 4.6.3).
const REDIRECTED_HEADER: u8 = 4;

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
        return Err(Counter::Expiring);
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

/// Options that are walked along: so many that a signature behind them would not fit. A SYN with more of them passes.
const OPTIONS_WALKED: usize = 24;

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

/// A source route that is not at its end (RFC 791): the destination is the next hop on it. Such a segment's checksum is
/// for another destination, and its connection is with that one.
#[inline(always)]
fn refuse_waypoint(packet: &impl Packet, options: Span) -> Result<(), Counter> {
    match has_option(packet, options, |kind, len, pointer| {
        matches!(kind, 131 | 137) && len > 2 && pointer <= len
    })? {
        true => Err(Counter::Waypoint),
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
            true => Err(Counter::Signed),
            false => Err(Counter::Joining),
        };
    }
    Ok(())
}

/// Kinds of TCP options.
const TCP_MD5: u8 = 19;
const TCP_AO: u8 = 29;
const MPTCP: u8 = 30;
/// Its subtype that joins a connection.
const MP_JOIN: u8 = 1;

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

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

    use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    /// A SYN to be built, and what it is to be parsed to.
    #[derive(Clone, Debug)]
    struct Syn {
        source: SocketAddr,
        destination: SocketAddr,
        traffic_class: u8,
        ttl: u8,
        flow_label: u32,
        ip_options: Vec<u8>,
        /// Protocol number, and all of the header but its next-header byte.
        extensions: Vec<(u8, Vec<u8>)>,
        tcp_options: Vec<u8>,
        payload: Vec<u8>,
    }

    impl Syn {
        fn family(&self) -> Family {
            if self.source.is_ipv4() {
                Family::V4
            } else {
                Family::V6
            }
        }

        fn flow(&self) -> FlowKey {
            FlowKey::between(self.source, self.destination)
        }

        fn segment(&self) -> Vec<u8> {
            let mut tcp = [
                self.source.port().to_be_bytes(),
                self.destination.port().to_be_bytes(),
            ]
            .concat();
            tcp.extend([1; 8]);
            tcp.push((((20 + self.tcp_options.len()) / 4) << 4) as u8);
            tcp.extend([SYN, 0xff, 0xff, 0, 0, 0, 0]);
            tcp.extend(&self.tcp_options);
            tcp.extend(&self.payload);
            tcp
        }

        fn packet(&self) -> Vec<u8> {
            self.ip(PROTO_TCP, &self.segment())
        }

        /// Without the payload.
        fn headers_len(&self) -> usize {
            self.packet().len() - self.payload.len()
        }

        fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
            match (self.source.ip(), self.destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    let header_len = 20 + self.ip_options.len();
                    let total_len = (header_len + payload.len()) as u16;
                    let mut packet = vec![0x40 | (header_len / 4) as u8, self.traffic_class];
                    packet.extend(total_len.to_be_bytes());
                    packet.extend([0, 1, 0x40, 0, self.ttl, protocol, 0, 0]);
                    packet.extend(source.octets());
                    packet.extend(destination.octets());
                    packet.extend(&self.ip_options);
                    packet.extend(payload);
                    packet
                }
                (IpAddr::V6(source), IpAddr::V6(destination)) => {
                    let mut protocols: Vec<u8> =
                        self.extensions.iter().map(|(protocol, _)| *protocol).collect();
                    protocols.push(protocol);
                    let chain: Vec<u8> = self
                        .extensions
                        .iter()
                        .zip(&protocols[1..])
                        .flat_map(|((_, rest), next)| [&[*next], &rest[..]].concat())
                        .collect();
                    let word = 0x6000_0000 | u32::from(self.traffic_class) << 20 | self.flow_label;
                    let mut packet = word.to_be_bytes().to_vec();
                    packet.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
                    packet.extend([protocols[0], self.ttl]);
                    packet.extend(source.octets());
                    packet.extend(destination.octets());
                    packet.extend(chain);
                    packet.extend(payload);
                    packet
                }
                _ => unreachable!("both ends are of one family"),
            }
        }

        /// The last extension header of a kind as the record is to hold it: whole, or not at all.
        fn extension(&self, protocol: u8) -> Vec<u8> {
            let index = self.extensions.iter().rposition(|(found, _)| *found == protocol);
            let Some(index) = index else { return Vec::new() };
            let next = self
                .extensions
                .get(index + 1)
                .map_or(PROTO_TCP, |(next, _)| *next);
            let header = [&[next], &self.extensions[index].1[..]].concat();
            if header.len() > EXTENSION_MAX {
                Vec::new()
            } else {
                header
            }
        }
    }

    fn parse_bytes(packet: &[u8], family: Family) -> Result<Parsed, Counter> {
        parse(&packet, family)
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

    /// Bytes in multiples of `unit`.
    fn words(unit: usize, count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
        count.prop_flat_map(move |count| prop::collection::vec(any::<u8>(), count * unit))
    }

    /// An extension header that a packet may have on its way: no segments left where it is a routing header.
    fn extension() -> impl Strategy<Value = (u8, Vec<u8>)> {
        let protocol = prop::sample::select(vec![EXT_HOP_BY_HOP, EXT_ROUTING, EXT_DESTINATION]);
        // Now and then longer than a record holds.
        let eights = prop_oneof![9 => 0..4_usize, 1 => 10..20_usize];
        (protocol, eights).prop_flat_map(|(protocol, eights)| {
            prop::collection::vec(any::<u8>(), eights * 8 + 7).prop_map(move |mut rest| {
                rest[0] = eights as u8;
                if protocol == EXT_ROUTING {
                    rest[2] = 0;
                }
                (protocol, rest)
            })
        })
    }

    fn address(family: Family) -> BoxedStrategy<IpAddr> {
        match family {
            Family::V4 => any::<u32>()
                .prop_map(Ipv4Addr::from)
                .prop_filter("of one link only", |address| !address.is_link_local())
                .prop_map(IpAddr::from)
                .boxed(),
            Family::V6 => any::<u128>()
                .prop_map(Ipv6Addr::from)
                .prop_filter("of one link only", |address| !address.is_unicast_link_local())
                .prop_map(IpAddr::from)
                .boxed(),
        }
    }

    fn any_family() -> impl Strategy<Value = Family> {
        prop::sample::select(vec![Family::V4, Family::V6])
    }

    /// Options that mean anything but a source route or a signature.
    fn plain_options(words_of_four: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
        words(4, words_of_four).prop_map(|mut options| {
            for byte in &mut options {
                if matches!(*byte, 19 | 29 | 30 | 131 | 137) {
                    *byte = 1;
                }
            }
            options
        })
    }

    fn syn_of(family: Family) -> impl Strategy<Value = Syn> {
        let is_v4 = family == Family::V4;
        let extensions =
            prop::collection::vec(extension(), if is_v4 { 0..1 } else { 0..EXTENSIONS_WALKED + 1 });
        (
            (address(family), 1_u16..),
            (address(family), 1_u16..),
            (any::<u8>(), 2_u8.., if is_v4 { 0..1 } else { 0..1_u32 << 20 }),
            plain_options(if is_v4 { 0..11 } else { 0..1 }),
            extensions,
            plain_options(0..11),
            prop::collection::vec(any::<u8>(), 0..50),
        )
            .prop_map(
                |(
                    source,
                    destination,
                    (traffic_class, ttl, flow_label),
                    ip_options,
                    extensions,
                    tcp_options,
                    payload,
                )| Syn {
                    source: source.into(),
                    destination: destination.into(),
                    traffic_class,
                    ttl,
                    flow_label,
                    ip_options,
                    extensions,
                    tcp_options,
                    payload,
                },
            )
    }

    fn any_syn() -> impl Strategy<Value = Syn> {
        any_family().prop_flat_map(syn_of)
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_without_panic(
            family in any_family(),
            mut packet in prop::collection::vec(any::<u8>(), 0..200),
            looks_real in any::<bool>(),
        ) {
            if let (true, Some(first)) = (looks_real, packet.first_mut()) {
                *first = if family == Family::V4 { 0x45 } else { 0x60 };
            }
            if let Ok(Parsed::Tcp(segment)) = parse_bytes(&packet, family) {
                let mut record = SynRecord::EMPTY;
                let _ = record_syn(&packet.as_slice(), &segment, &mut record, &mut { TcpOptions::EMPTY });
            }
        }

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

        #[test]
        fn packet_at_a_waypoint_of_its_source_route_is_left_alone(
            mut syn in syn_of(Family::V6), left in 1_u8.., at in any::<prop::sample::Index>(),
        ) {
            syn.extensions.truncate(EXTENSIONS_WALKED - 1);
            let header = (EXT_ROUTING, vec![0, 4, left, 0, 0, 0, 0]);
            syn.extensions.insert(at.index(syn.extensions.len() + 1), header);
            prop_assert_eq!(parse_bytes(&syn.packet(), Family::V6), Err(Counter::Waypoint));
        }

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
            let expected = if left > 0 { Err(Counter::Waypoint) } else { Ok(()) };
            prop_assert_eq!(packet(&syn), expected);

            syn.ip_options = Vec::new();
            let signature = [if is_ao { 29 } else { 19 }, 18];
            syn.tcp_options = [&vec![1; before][..], &signature, &[7; 16], &vec![0; 10 - before - before % 2]].concat();
            syn.tcp_options.resize(syn.tcp_options.len().next_multiple_of(4), 0);
            prop_assert_eq!(packet(&syn), Err(Counter::Signed));
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
            prop_assert_eq!(recorded(&Syn { ttl, ..syn.clone() }), Err(Counter::Expiring));
            syn.tcp_options = [&vec![1; before][..], &[30, 12, subtype << 4], &[7; 9]].concat();
            syn.tcp_options.resize(syn.tcp_options.len().next_multiple_of(4), 0);
            let expected = if subtype == MP_JOIN { Err(Counter::Joining) } else { Ok(()) };
            prop_assert_eq!(recorded(&syn), expected);
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
