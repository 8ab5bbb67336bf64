//! What a packet is in the eyes of another parser: etherparse reads every header, and what is between them is put together
//! from the RFCs, without a look at `pepsal-ebpf/src/packet`.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    Icmpv4Slice, Icmpv6Slice, IpNumber, Ipv4HeaderSlice, Ipv6FragmentHeaderSlice, Ipv6HeaderSlice,
    Ipv6RawExtHeaderSlice, TcpHeaderSlice, ip_number,
};

/// Source and destination.
pub type Ends = (SocketAddr, SocketAddr);

/// What a packet is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// A segment of this connection.
    Segment(Box<Segment>),
    /// A segment whose TCP options are cut off.
    CutSegment { ends: Ends, kind: Kind },
    /// An ICMP error about a segment that `ends.1` has sent to `ends.0`.
    Error { ends: Ends },
    /// A fragment, with what it has in common with the others of its packet, if that can be told; and the segment that it
    /// begins, if it has the ports.
    Fragment {
        of: Option<FragmentOf>,
        begins: Option<(Ends, Kind)>,
    },
    /// An error about a fragment.
    FragmentQuoted,
    /// Routed by its source, and not at its destination yet.
    Waypoint,
    /// Sound as far as it goes, and of no interest.
    Other,
    /// Contradictory, or cut off before its ports.
    Broken,
}

/// Addresses, identification and protocol.
pub type FragmentOf = (IpAddr, IpAddr, u32, u8);

/// What a segment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Opens a connection.
    Syn,
    /// Answers that.
    SynAck,
    /// Everything else.
    Other,
}

/// A segment, with what is recorded of it if it is a SYN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub ends: Ends,
    pub kind: Kind,
    pub traffic_class: u8,
    pub ttl: u8,
    pub flow_label: u32,
    pub ip_options: Vec<u8>,
    /// The last hop-by-hop options header.
    pub hop_by_hop: Vec<u8>,
    /// The last destination options header.
    pub destination_options: Vec<u8>,
    pub tcp_options: Vec<u8>,
}

impl Segment {
    /// Whether it has a source route that is not at its end (RFC 791).
    pub fn is_at_waypoint(&self) -> bool {
        options(&self.ip_options).any(|TypeLengthValue { kind, data, .. }| {
            let pointer = data.first().copied();
            // The option's length counts its first two bytes.
            matches!(kind, 131 | 137) && pointer.is_some_and(|at| usize::from(at) <= data.len() + 2)
        })
    }

    /// Whether it has more options, of either protocol, than anybody needs, with TCP's such as may be a signature or a join.
    pub fn is_padded(&self) -> bool {
        let is_full = |bytes: &[u8]| options(bytes).filter(|option| option.left >= 3).count() >= 24;
        let is_suspicious = self.tcp_options.iter().any(|byte| matches!(byte, 19 | 29 | 30));
        is_full(&self.ip_options) || is_suspicious && is_full(&self.tcp_options)
    }

    /// Whether it is signed (RFC 2385, RFC 5925).
    pub fn is_signed(&self) -> bool {
        options(&self.tcp_options).any(|option| matches!(option.kind, 19 | 29) && !option.data.is_empty())
    }
}

impl Segment {
    /// Whether it joins a connection of several paths (RFC 8684, 3.2).
    pub fn joins(&self) -> bool {
        options(&self.tcp_options)
            .any(|option| option.kind == 30 && option.data.first().is_some_and(|first| first >> 4 == 1))
    }
}

struct TypeLengthValue<'a> {
    kind: u8,
    data: &'a [u8],
    /// Bytes from its first to the last option's end.
    left: usize,
}

/// The options of an IPv4 or TCP header, until one that contradicts itself.
fn options(mut rest: &[u8]) -> impl Iterator<Item = TypeLengthValue<'_>> {
    std::iter::from_fn(move || {
        let left = rest.len();
        let (kind, data);
        (kind, data, rest) = match *rest {
            [] | [0, ..] => return None,
            [1, ref more @ ..] => (1, &[][..], more),
            [kind, len, ..] => {
                let (option, more) = rest.split_at_checked(len.into())?;
                (kind, option.get(2..)?, more)
            }
            [_] => return None,
        };
        Some(TypeLengthValue { kind, data, left })
    })
}

/// What is below TCP or ICMP.
struct Network<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: IpNumber,
    /// What is there of the payload.
    payload: &'a [u8],
    /// How long it says it is.
    declared: usize,
    traffic_class: u8,
    ttl: u8,
    flow_label: u32,
    ip_options: &'a [u8],
    hop_by_hop: &'a [u8],
    destination_options: &'a [u8],
}

/// Looks at a packet from its IP header on.
pub fn see(packet: &[u8], is_v6: bool) -> Seen {
    let network = match network(packet, is_v6) {
        Ok(network) => network,
        Err(seen) => return seen,
    };
    match (network.protocol, is_v6) {
        (ip_number::TCP, _) => tcp(&network),
        (ip_number::ICMP, false) => match Icmpv4Slice::from_slice(network.payload) {
            Ok(icmp) if matches!(icmp.type_u8(), 3 | 11 | 12) => quoted(&network.payload[8..], false),
            Ok(_) => Seen::Other,
            Err(_) => Seen::Broken,
        },
        (ip_number::IPV6_ICMP, true) => match Icmpv6Slice::from_slice(network.payload) {
            Ok(icmp) if matches!(icmp.type_u8(), 1..=4) => quoted(&network.payload[8..], true),
            Ok(_) => Seen::Other,
            Err(_) => Seen::Broken,
        },
        _ => Seen::Other,
    }
}

fn network(packet: &[u8], is_v6: bool) -> Result<Network<'_>, Seen> {
    if is_v6 { v6(packet) } else { v4(packet) }
}

fn v4(packet: &[u8]) -> Result<Network<'_>, Seen> {
    let header = Ipv4HeaderSlice::from_slice(packet).map_err(|_| Seen::Broken)?;
    let declared = usize::from(header.payload_len().map_err(|_| Seen::Broken)?);
    let (source, destination) = (header.source_addr().into(), header.destination_addr().into());
    let payload = up_to(&packet[header.slice().len()..], declared);
    if header.is_fragmenting_payload() {
        let is_first = header.fragments_offset().value() == 0;
        return Err(Seen::Fragment {
            of: Some((
                source,
                destination,
                header.identification().into(),
                header.protocol().0,
            )),
            begins: (is_first && header.protocol() == ip_number::TCP)
                .then(|| beginning(source, destination, payload))
                .flatten(),
        });
    }
    Ok(Network {
        source,
        destination,
        protocol: header.protocol(),
        payload,
        declared,
        traffic_class: (header.dcp().value() << 2) | header.ecn().value(),
        ttl: header.ttl(),
        flow_label: 0,
        ip_options: header.options(),
        hop_by_hop: &[],
        destination_options: &[],
    })
}

/// Extension headers that may come before what they are for: each kind once and the destination options twice would be
/// five (RFC 8200, 4.1).
const EXTENSIONS_MAX: usize = 8;

fn v6(packet: &[u8]) -> Result<Network<'_>, Seen> {
    let header = Ipv6HeaderSlice::from_slice(packet).map_err(|_| Seen::Broken)?;
    // Mapped addresses are not for the wire (RFC 4942, 2.2).
    let addresses = [header.source_addr(), header.destination_addr()];
    if addresses.iter().any(|address| address.to_ipv4_mapped().is_some()) {
        return Err(Seen::Broken);
    }
    let declared = usize::from(header.payload_length());
    let mut network = Network {
        source: header.source_addr().into(),
        destination: header.destination_addr().into(),
        protocol: header.next_header(),
        payload: up_to(&packet[40..], declared),
        declared,
        traffic_class: header.traffic_class(),
        ttl: header.hop_limit(),
        flow_label: header.flow_label().value(),
        ip_options: &[],
        hop_by_hop: &[],
        destination_options: &[],
    };
    for walked in 0.. {
        let is_extension = matches!(
            network.protocol,
            ip_number::IPV6_HEADER_HOP_BY_HOP
                | ip_number::IPV6_ROUTE_HEADER
                | ip_number::IPV6_DESTINATION_OPTIONS
                | ip_number::IPV6_FRAGMENTATION_HEADER
        );
        if !is_extension {
            break;
        }
        if walked == EXTENSIONS_MAX {
            return Err(Seen::Other);
        }
        if network.protocol == ip_number::IPV6_FRAGMENTATION_HEADER {
            return Err(fragment_v6(&network, walked == 0));
        }
        let extension = Ipv6RawExtHeaderSlice::from_slice(network.payload).map_err(|_| Seen::Broken)?;
        let bytes = extension.slice();
        match network.protocol {
            ip_number::IPV6_HEADER_HOP_BY_HOP => network.hop_by_hop = bytes,
            ip_number::IPV6_DESTINATION_OPTIONS => network.destination_options = bytes,
            // Segments left.
            _ if extension.payload()[1] != 0 => return Err(Seen::Waypoint),
            _ => {}
        }
        network.protocol = extension.next_header();
        network.payload = &network.payload[bytes.len()..];
        network.declared -= bytes.len();
    }
    Ok(network)
}

fn fragment_v6(network: &Network<'_>, is_first_extension: bool) -> Seen {
    let header = Ipv6FragmentHeaderSlice::from_slice(network.payload)
        .ok()
        .filter(|_| is_first_extension);
    let Some(header) = header else {
        return Seen::Fragment {
            of: None,
            begins: None,
        };
    };
    let (source, destination) = (network.source, network.destination);
    let is_first = header.fragment_offset().value() == 0 && header.next_header() == ip_number::TCP;
    Seen::Fragment {
        of: Some((
            source,
            destination,
            header.identification(),
            header.next_header().0,
        )),
        begins: is_first
            .then(|| beginning(source, destination, &network.payload[8..]))
            .flatten(),
    }
}

/// The ports and flags of a TCP header that is there as far as them.
fn beginning(source: IpAddr, destination: IpAddr, payload: &[u8]) -> Option<(Ends, Kind)> {
    let port = |at: usize| Some(u16::from_be_bytes([*payload.get(at)?, *payload.get(at + 1)?]));
    let ends = ((source, port(0)?).into(), (destination, port(2)?).into());
    let flags = payload.get(13)?;
    let [fin, syn, rst, ack] = [0x01, 0x02, 0x04, 0x10].map(|bit| flags & bit != 0);
    Some((ends, kind(fin, syn, rst, ack)))
}

fn kind(fin: bool, syn: bool, rst: bool, ack: bool) -> Kind {
    match (syn, ack) {
        (true, false) if !fin && !rst => Kind::Syn,
        (true, true) if !fin && !rst => Kind::SynAck,
        _ => Kind::Other,
    }
}

fn tcp(network: &Network<'_>) -> Seen {
    let payload = network.payload;
    let Ok(tcp) = TcpHeaderSlice::from_slice(payload) else {
        let header_len = payload.get(12).map_or(0, |byte| usize::from(byte >> 4) * 4);
        return match beginning(network.source, network.destination, payload) {
            Some((ends, kind))
                if payload.len() >= 20
                    && (20..=network.declared).contains(&header_len)
                    && ends.0.port() > 0
                    && ends.1.port() > 0 =>
            {
                Seen::CutSegment { ends, kind }
            }
            _ => Seen::Broken,
        };
    };
    if tcp.source_port() == 0 || tcp.destination_port() == 0 {
        return Seen::Broken;
    }
    let ends = (
        (network.source, tcp.source_port()).into(),
        (network.destination, tcp.destination_port()).into(),
    );
    Seen::Segment(Box::new(Segment {
        ends,
        kind: kind(tcp.fin(), tcp.syn(), tcp.rst(), tcp.ack()),
        traffic_class: network.traffic_class,
        ttl: network.ttl,
        flow_label: network.flow_label,
        ip_options: network.ip_options.into(),
        hop_by_hop: network.hop_by_hop.into(),
        destination_options: network.destination_options.into(),
        tcp_options: tcp.options().into(),
    }))
}

/// Routers quote as little as eight bytes of a segment (RFC 792).
fn quoted(packet: &[u8], is_v6: bool) -> Seen {
    let network = match network(packet, is_v6) {
        Ok(network) => network,
        Err(Seen::Fragment { .. }) => return Seen::FragmentQuoted,
        Err(seen) => return seen,
    };
    match network.payload {
        _ if network.protocol != ip_number::TCP => Seen::Other,
        [a, b, c, d, _, _, _, _, ..] => {
            let (from, to) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
            Seen::Error {
                ends: ((network.destination, to).into(), (network.source, from).into()),
            }
        }
        _ => Seen::Broken,
    }
}

fn up_to(bytes: &[u8], most: usize) -> &[u8] {
    &bytes[..bytes.len().min(most)]
}
