//! Bytes to headers: what steering has to know of a packet, parsed without touching a map or a helper.
//!
//! The parser reads through [`Packet`], which is a socket buffer in the kernel and a slice in the tests. Every read
//! is of a fixed size at a computed offset and is refused past the packet's end, which is all that the verifier asks.
//! The packet starts at its network header.

use crate::{
    Counter, EXTENSION_MAX, FlowKey, IP_OPTIONS_MAX, MappedAddr, SynRecord, TCP_OPTIONS_MAX, map_v4,
};

/// A packet, from its network header on.
pub trait Packet {
    /// The `N` bytes at `offset`, or nothing when the packet ends before them.
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Copies `len` bytes at `offset` to the start of `to`; false when the packet or `to` is shorter.
    fn copy<const N: usize>(&self, offset: u32, len: u32, to: &mut [u8; N]) -> bool;
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
const NOT_A_SYN: u8 = 0x01 | 0x04 | 0x10; // FIN, RST, ACK

impl Segment {
    /// Whether this segment opens a connection: SYN without ACK, RST or FIN.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & SYN != 0 && self.flags & NOT_A_SYN == 0
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

    #[inline(always)]
    fn swapped(self) -> Self {
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

/// Finds the TCP header, or says why the packet is none of pepsal's business.
#[inline(always)]
pub fn parse(packet: &impl Packet, family: Family) -> Result<Parsed, Counter> {
    let ip = match family {
        Family::V4 => parse_v4(packet, 0)?,
        Family::V6 => parse_v6(packet, 0)?,
    };
    match (ip.protocol, family) {
        (PROTO_TCP, _) => parse_tcp(packet, &ip, family).map(Parsed::Tcp),
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

#[inline(always)]
fn parse_v4(packet: &impl Packet, at: u32) -> Result<Ip, Counter> {
    let header: [u8; 20] = packet.read(at).ok_or(Counter::Malformed)?;
    let header_len = u32::from(header[0] & 0x0f) * 4;
    let total_len = u32::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] >> 4 != 4 || header_len < 20 || total_len < header_len {
        return Err(Counter::Malformed);
    }
    // More-fragments flag or a fragment offset.
    if header[6] & 0x3f != 0 || header[7] != 0 {
        return Err(Counter::Fragment);
    }
    Ok(Ip {
        source: map_v4([header[12], header[13], header[14], header[15]]),
        destination: map_v4([header[16], header[17], header[18], header[19]]),
        protocol: header[9],
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
fn parse_v6(packet: &impl Packet, at: u32) -> Result<Ip, Counter> {
    let fixed: [u8; 8] = packet.read(at).ok_or(Counter::Malformed)?;
    let source: [u8; 16] = packet.read(at + 8).ok_or(Counter::Malformed)?;
    let destination: [u8; 16] = packet.read(at + 24).ok_or(Counter::Malformed)?;
    if fixed[0] >> 4 != 6 {
        return Err(Counter::Malformed);
    }
    let mut ip = Ip {
        source,
        destination,
        protocol: fixed[6],
        payload: Span {
            offset: at + 40,
            len: u32::from(u16::from_be_bytes([fixed[4], fixed[5]])),
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
            _ if header[3] != 0 => return Err(Counter::NotTcp),
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

#[inline(always)]
fn parse_tcp(packet: &impl Packet, ip: &Ip, family: Family) -> Result<Segment, Counter> {
    let header: [u8; 20] = packet.read(ip.payload.offset).ok_or(Counter::Malformed)?;
    let header_len = u32::from(header[12] >> 4) * 4;
    let (source_port, destination_port) = ([header[0], header[1]], [header[2], header[3]]);
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
        flags: header[13],
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
    let at = ip.payload.offset + 8;
    let quoted = match family {
        Family::V4 => parse_v4(packet, at)?,
        Family::V6 => parse_v6(packet, at)?,
    };
    if quoted.protocol != PROTO_TCP {
        return Err(Counter::NotTcp);
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
    Ok(Parsed::IcmpError(segment.swapped()))
}

/// Fills `record` with what the SYN says, except for its time and interface; whatever was in `record` is overwritten.
#[inline(always)]
pub fn record_syn(packet: &impl Packet, syn: &Segment, record: &mut SynRecord) -> Result<(), Counter> {
    let start: [u8; 9] = packet.read(0).ok_or(Counter::Malformed)?;
    match syn.family {
        Family::V4 => {
            record.traffic_class = start[1];
            record.ttl = start[8];
            record.flow_label = [0; 4];
        }
        Family::V6 => {
            record.traffic_class = start[0] << 4 | start[1] >> 4;
            record.ttl = start[7];
            record.flow_label = [0, start[1] & 0x0f, start[2], start[3]];
        }
    }
    let mut truncated = 0;
    record.ip_options_len =
        copy_span::<IP_OPTIONS_MAX>(packet, syn.ip_options, &mut record.ip_options, &mut truncated)?;
    record.hop_by_hop_len =
        copy_span::<EXTENSION_MAX>(packet, syn.hop_by_hop, &mut record.hop_by_hop, &mut truncated)?;
    record.destination_len = copy_span::<EXTENSION_MAX>(
        packet,
        syn.destination_options,
        &mut record.destination,
        &mut truncated,
    )?;
    record.truncated = truncated;
    let options = Span {
        offset: syn.tcp.offset + 20,
        len: syn.tcp.len - 20,
    };
    record.tcp_options_len =
        copy_span::<TCP_OPTIONS_MAX>(packet, options, &mut record.tcp_options, &mut truncated)?;
    Ok(())
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

/// The TCP options of a SYN that matter to a proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// Maximum segment size in bytes (RFC 9293).
    pub mss: Option<u16>,
    /// Window scale as a shift count (RFC 7323).
    pub window_scale: Option<u8>,
    /// SACK permitted (RFC 2018).
    pub sack: bool,
    /// Timestamps (RFC 7323).
    pub timestamps: bool,
    /// Fast open, with or without a cookie (RFC 7413).
    pub fast_open: bool,
}

impl TcpOptions {
    /// Reads options until their end or until one that contradicts itself, which hides the rest of them: the kernel
    /// treats them likewise (`tcp_parse_options`).
    pub fn parse(mut options: &[u8]) -> Self {
        let mut parsed = Self::default();
        loop {
            let len = match options {
                [1, ..] => 1,
                [0, ..] | [] => return parsed,
                [_, len, ..] if *len >= 2 => usize::from(*len),
                _ => return parsed,
            };
            let Some((option, rest)) = options.split_at_checked(len) else {
                return parsed;
            };
            match *option {
                [2, _, a, b] => parsed.mss = Some(u16::from_be_bytes([a, b])),
                [3, _, shift] => parsed.window_scale = Some(shift),
                [4, _] => parsed.sack = true,
                [8, 10, ..] => parsed.timestamps = true,
                [34, ..] => parsed.fast_open = true,
                _ => {}
            }
            options = rest;
        }
    }
}
