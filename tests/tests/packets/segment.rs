//! TCP segments, and what carries or quotes them, put together byte by byte.

use std::net::{IpAddr, SocketAddr};

use pepsal_ebpf::FlowKey;
use pepsal_tests::Family;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const CLIENT_PORT: u16 = 40_000;
pub const SERVER_PORT: u16 = 80;

/// A TCP segment to be made.
#[derive(Clone, Debug)]
pub struct Tcp {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub flags: u8,
    pub traffic_class: u8,
    pub ttl: u8,
    pub flow_label: u32,
    pub ip_options: Vec<u8>,
    /// IPv6 extension headers: protocol number, and all of the header but its next-header byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub tcp_options: Vec<u8>,
}

impl Tcp {
    /// The client's plain SYN to the server.
    pub fn syn(family: Family) -> Self {
        Self {
            source: (family.client(), CLIENT_PORT).into(),
            destination: (family.server(), SERVER_PORT).into(),
            flags: SYN,
            traffic_class: 0,
            ttl: 64,
            flow_label: 0,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            tcp_options: Vec::new(),
        }
    }

    pub fn with_flags(family: Family, flags: u8) -> Self {
        Self {
            flags,
            ..Self::syn(family)
        }
    }

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

    pub fn key(&self) -> FlowKey {
        FlowKey::between(self.source, self.destination)
    }

    /// From the IP header on, without checksums, which are not steering's to check.
    pub fn packet(&self) -> Vec<u8> {
        self.ip(6, &self.header())
    }

    /// The TCP header.
    pub fn header(&self) -> Vec<u8> {
        let mut tcp = [
            self.source.port().to_be_bytes(),
            self.destination.port().to_be_bytes(),
        ]
        .concat();
        tcp.extend([0; 8]);
        tcp.push((((20 + self.tcp_options.len()) / 4) << 4) as u8);
        tcp.extend([self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        tcp.extend(&self.tcp_options);
        tcp
    }

    /// The same IP header before another payload.
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

    /// What this segment's sender is told when it could not be forwarded: the first bytes of it behind an ICMP header.
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

    pub fn swapped(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ..self.clone()
        }
    }
}

/// Without options and extension headers.
pub fn ip_header_len(tcp: &Tcp) -> usize {
    if tcp.source.is_ipv4() { 20 } else { 40 }
}

pub fn icmp_protocol(address: IpAddr) -> u8 {
    if address.is_ipv4() { 1 } else { 58 }
}

pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const ESP: u8 = 50;
pub const AUTHENTICATION: u8 = 51;
pub const DESTINATION: u8 = 60;
pub const MOBILITY: u8 = 135;

/// Router alert, and padding of the header's rest.
pub const ROUTER_ALERT: &[u8] = &[0, 5, 2, 0, 0, 1, 0];
pub const PADDING: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
/// Type 4 without segments left.
pub const ROUTED: &[u8] = &[0, 4, 0, 0, 0, 0, 0];
