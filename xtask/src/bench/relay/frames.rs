//! Frames of every kind for the steering programs.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use pepsal_tests::Family;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packet {
    pub kind: Kind,
    pub family: Family,
}

/// Kind of a packet, from the gateway's view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SYN of an intercepted connection.
    Syn,
    /// Segment of an intercepted connection.
    Established,
    /// Segment of another connection.
    ForeignAck,
    /// UDP.
    Udp,
}

impl Packet {
    pub const ALL: [Self; 8] = {
        const fn packet(kind: Kind, family: Family) -> Packet {
            Packet { kind, family }
        }
        [
            packet(Kind::Syn, Family::V4),
            packet(Kind::Syn, Family::V6),
            packet(Kind::Established, Family::V4),
            packet(Kind::Established, Family::V6),
            packet(Kind::ForeignAck, Family::V4),
            packet(Kind::ForeignAck, Family::V6),
            packet(Kind::Udp, Family::V4),
            packet(Kind::Udp, Family::V6),
        ]
    };

    /// Returns whether the packet passes, with the least possible delay.
    pub fn is_foreign(self) -> bool {
        matches!(self.kind, Kind::ForeignAck | Kind::Udp)
    }

    /// Returns the frame between these ends, to this link-layer address.
    pub fn frame(self, source: SocketAddr, destination: SocketAddr, to: [u8; 6]) -> Vec<u8> {
        const SYN: u8 = 0x02;
        const ACK: u8 = 0x10;
        let (protocol, payload) = match self.kind {
            Kind::Syn => (TCP, tcp(source, destination, SYN)),
            Kind::Established | Kind::ForeignAck => (TCP, tcp(source, destination, ACK)),
            Kind::Udp => (UDP, udp(source, destination)),
        };
        let ethertype: u16 = match self.family {
            Family::V4 => 0x0800,
            Family::V6 => 0x86dd,
        };
        let network = network_header(source.ip(), destination.ip(), protocol, payload.len() as u16);
        [
            &to[..],
            &[2, 0, 0, 0, 0, 1],
            &ethertype.to_be_bytes(),
            &network,
            &payload,
        ]
        .concat()
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Syn => "SYN",
            Kind::Established => "ACK of a flow",
            Kind::ForeignAck => "foreign ACK",
            Kind::Udp => "UDP",
        };
        write!(formatter, "{kind}, {}", self.family.name())
    }
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const HOP_LIMIT: u8 = 64;

/// Builds a TCP segment (RFC 9293, 3.1) without options. conntrack verifies its checksum.
fn tcp(source: SocketAddr, destination: SocketAddr, flags: u8) -> Vec<u8> {
    let mut header = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    header.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let checksum = transport_checksum(source.ip(), destination.ip(), TCP, &header).to_be_bytes();
    header[16..18].copy_from_slice(&checksum);
    header
}

/// Returns the checksum over the pseudo-header of RFC 9293, 3.1, or RFC 8200, 8.1, whose sums are equal, and
/// a segment of less than 64 KiB.
fn transport_checksum(source: IpAddr, destination: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo_header = [&octets(source)[..], &octets(destination), &[0, protocol], &length].concat();
    internet_checksum(&[&pseudo_header, segment].concat())
}

/// Builds a UDP datagram (RFC 768) of the length of the TCP segments, without checksum.
fn udp(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let mut datagram = [
        source.port().to_be_bytes(),
        destination.port().to_be_bytes(),
        [0, 20],
        [0, 0],
    ]
    .concat();
    datagram.resize(20, 0);
    datagram
}

/// Adds an IP header (RFC 791 or RFC 8200) without options.
///
/// # Panics
/// When the families differ.
fn network_header(source: IpAddr, destination: IpAddr, protocol: u8, payload: u16) -> Vec<u8> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let length = (20 + payload).to_be_bytes();
            let mut header = vec![
                0x45, 0, length[0], length[1], 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0,
            ];
            header.extend(source.octets());
            header.extend(destination.octets());
            let checksum = internet_checksum(&header).to_be_bytes();
            header[10..12].copy_from_slice(&checksum);
            header
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let length = payload.to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, HOP_LIMIT];
            header.extend(source.octets());
            header.extend(destination.octets());
            header
        }
        (source, destination) => panic!("{source} and {destination} are of two families"),
    }
}

/// Returns the Internet checksum (RFC 1071).
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_check() {
        // The example of Wikipedia's "Internet checksum".
        let header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7,
        ];
        assert_eq!(internet_checksum(&header), 0xb861);
    }

    #[test]
    fn frames_are_as_long_as_they_say() {
        for packet in Packet::ALL {
            let (source, destination) = (packet.family.client(), packet.family.server());
            let frame = packet.frame((source, 40_000).into(), (destination, 80).into(), [1; 6]);
            let length = match packet.family {
                Family::V4 => 14 + 20 + 20,
                Family::V6 => 14 + 40 + 20,
            };
            assert_eq!(frame.len(), length, "{packet}");
            if packet.family == Family::V4 {
                assert_eq!(internet_checksum(&frame[14..34]), 0, "{packet}");
            }
            if packet.kind != Kind::Udp {
                let segment = &frame[length - 20..];
                assert_eq!(
                    transport_checksum(source, destination, TCP, segment),
                    0,
                    "{packet}"
                );
            }
        }
    }
}
