//! Builds TCP segments, packets around them and ICMP errors, byte by byte, and sends them by a raw socket.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;

use anyhow::Result;
use etherparse::TcpSlice;
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Namespace;
use crate::topology::Family;

/// Control bit SYN.
pub const SYN: u8 = 0x02;
/// Control bit RST.
pub const RST: u8 = 0x04;
/// Control bit ACK.
pub const ACK: u8 = 0x10;
/// Port of [`Tcp::syn`]'s source.
pub const CLIENT_PORT: u16 = 40_000;
/// Port of [`Tcp::syn`]'s destination.
pub const SERVER_PORT: u16 = 80;

/// Fields of a TCP segment.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// The control bits of RFC 9293, section 3.1.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledged: u32,
    /// IPv4 type of service or IPv6 traffic class.
    pub traffic_class: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// IPv6 flow label.
    pub flow_label: u32,
    /// IPv4 options with their padding.
    pub ip_options: Vec<u8>,
    /// IPv6 extension headers: protocol number, and the header without its next-header byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// TCP options with their padding.
    pub tcp_options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
}

impl Tcp {
    /// Returns the client's SYN to the server, without options.
    pub fn syn(family: Family) -> Self {
        Self {
            source: (family.client(), CLIENT_PORT).into(),
            destination: (family.server(), SERVER_PORT).into(),
            flags: SYN,
            sequence: 0,
            acknowledged: 0,
            traffic_class: 0,
            ttl: 64,
            flow_label: 0,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            tcp_options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// Returns the segment of [`Tcp::syn`] with other control bits.
    pub fn with_flags(family: Family, flags: u8) -> Self {
        Self {
            flags,
            ..Self::syn(family)
        }
    }

    /// Returns the client's SYN with IPv6 extension headers.
    pub fn with_extensions(extensions: &[(u8, &[u8])]) -> Self {
        let extensions = extensions
            .iter()
            .map(|(protocol, rest)| (*protocol, rest.to_vec()))
            .collect();
        Self {
            extensions,
            ..Self::syn(Family::V6)
        }
    }

    /// Returns the packet from the IP header on, without checksums, which steering does not check.
    pub fn packet(&self) -> Vec<u8> {
        self.ip(TCP, &self.segment())
    }

    /// Returns TCP header and payload, with a checksum of zero.
    pub fn segment(&self) -> Vec<u8> {
        let mut tcp = [
            self.source.port().to_be_bytes(),
            self.destination.port().to_be_bytes(),
        ]
        .concat();
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        tcp.push((((20 + self.tcp_options.len()) / 4) << 4) as u8);
        tcp.extend([self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.tcp_options);
        tcp.extend(&self.payload);
        tcp
    }

    /// Returns the IP header with another payload.
    pub fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
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
                let following = self
                    .extensions
                    .iter()
                    .map(|(protocol, _)| *protocol)
                    .chain([protocol]);
                let mut chain = Vec::new();
                for (next, (_, rest)) in following.clone().skip(1).zip(&self.extensions) {
                    chain.push(next);
                    chain.extend(rest);
                }
                let first = following.clone().next().expect("at least the payload's");
                let word = 0x6000_0000 | u32::from(self.traffic_class) << 20 | self.flow_label;
                let mut packet = word.to_be_bytes().to_vec();
                packet.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
                packet.extend([first, self.ttl]);
                packet.extend(source.octets());
                packet.extend(destination.octets());
                packet.extend(chain);
                packet.extend(payload);
                packet
            }
            _ => panic!("both ends are of one family"),
        }
    }

    /// Returns the ICMP error about this segment, which quotes its first bytes.
    pub fn icmp_error(&self, icmp_type: u8, quoted_bytes: usize) -> Vec<u8> {
        let packet = self.packet();
        let mut message = vec![icmp_type, 4, 0, 0, 0, 0, 0x05, 0x78];
        message.extend(&packet[..quoted_bytes.min(packet.len())]);
        let router = Self {
            source: self.destination,
            destination: self.source,
            extensions: Vec::new(),
            ..self.clone()
        };
        router.ip(icmp_protocol(self.source.ip()), &message)
    }

    /// Returns the segment with source and destination exchanged.
    pub fn swapped(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ..self.clone()
        }
    }
}

/// Returns the length of the IP header in bytes, without options and extension headers.
pub fn ip_header_len(tcp: &Tcp) -> usize {
    if tcp.source.is_ipv4() { 20 } else { 40 }
}

/// Returns the protocol number of ICMP for an address family.
pub fn icmp_protocol(address: IpAddr) -> u8 {
    if address.is_ipv4() { 1 } else { 58 }
}

/// Hop-by-hop options (RFC 8200).
pub const HOP_BY_HOP: u8 = 0;
/// Routing header.
pub const ROUTING: u8 = 43;
/// Fragment header.
pub const FRAGMENT: u8 = 44;
/// Encapsulating security payload (RFC 4303).
pub const ESP: u8 = 50;
/// Authentication header (RFC 4302).
pub const AUTHENTICATION: u8 = 51;
/// Destination options.
pub const DESTINATION: u8 = 60;
/// Mobility header (RFC 6275).
pub const MOBILITY: u8 = 135;

/// Router alert, and padding of the header's rest.
pub const ROUTER_ALERT: &[u8] = &[0, 5, 2, 0, 0, 1, 0];
/// Padding alone.
pub const PADDING: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
/// Type 4 without segments left.
pub const ROUTED: &[u8] = &[0, 4, 0, 0, 0, 0, 0];

const TCP: u8 = 6;

/// Sends IPv4 packets with any source address from a namespace.
#[derive(Debug)]
pub struct Forger(Socket);

impl Forger {
    /// Opens a raw socket.
    ///
    /// # Errors
    /// Without root.
    pub fn new(namespace: &Namespace) -> Result<Self> {
        let raw = Some(Protocol::from(libc::IPPROTO_RAW));
        Ok(Self(namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, raw))?))
    }

    /// Sends a segment; the kernel fills in the IP header's checksum.
    ///
    /// # Errors
    /// When the host has no route.
    pub fn send(&self, tcp: &Tcp) -> Result<()> {
        self.send_packet(tcp.destination, &tcp.ip(TCP, &checked(tcp)))
    }

    /// Sends a part of a segment, from byte `at` on, as a fragment of packet `id`.
    ///
    /// # Errors
    /// When the host has no route.
    pub fn send_fragment(
        &self,
        tcp: &Tcp,
        id: u16,
        part: std::ops::Range<usize>,
        at: u16,
        more: bool,
    ) -> Result<()> {
        let mut packet = tcp.ip(TCP, &checked(tcp)[part]);
        packet[4..6].copy_from_slice(&id.to_be_bytes());
        packet[6..8].copy_from_slice(&((u16::from(more) << 13) | (at / 8)).to_be_bytes());
        self.send_packet(tcp.destination, &packet)
    }

    fn send_packet(&self, destination: SocketAddr, packet: &[u8]) -> Result<()> {
        let to = SocketAddr::new(destination.ip(), 0).into();
        loop {
            match self.0.send_to(packet, &to) {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                sent => return Ok(sent.map(drop)?),
            }
        }
    }
}

/// Returns TCP header and payload of a segment between IPv4 addresses, with checksum.
fn checked(tcp: &Tcp) -> Vec<u8> {
    let octets = |address| match address {
        IpAddr::V4(address) => Ipv4Addr::octets(&address),
        IpAddr::V6(_) => panic!("{address} is not IPv4"),
    };
    let mut segment = tcp.segment();
    let slice = TcpSlice::from_slice(&segment).expect("the header is whole");
    let checksum = slice.calc_checksum_ipv4(octets(tcp.source.ip()), octets(tcp.destination.ip()));
    let checksum = checksum.expect("it is shorter than 64 KiB");
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    segment
}
