//! The client's SYN, as the server's kernel received it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail, ensure};

use crate::capture::Segment;

/// How a connection passes the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// As two legs: a daemon has opened the one to the server.
    Split,
    /// As it came from the client.
    Forwarded,
}

/// The IP and TCP headers of a SYN with all their options, as TCP_SAVED_SYN returns them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSyn {
    bytes: Vec<u8>,
    /// Where the TCP header starts; options and extension headers end there.
    tcp_offset: usize,
}

impl SavedSyn {
    /// Takes the bytes from the IP header on.
    ///
    /// # Errors
    /// When they are not a whole IP header followed by a whole TCP header.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let tcp_offset = match bytes.first().map(|first| first >> 4) {
            Some(4) => usize::from(bytes[0] & 0x0f) * 4,
            Some(6) => extension_headers(&bytes)
                .last()
                .map_or(IPV6_HEADER_LEN, |(end, ..)| end),
            version => bail!("saved SYN has IP version {version:?}"),
        };
        ensure!(
            tcp_offset >= IPV4_HEADER_LEN && bytes.len() >= tcp_offset + TCP_HEADER_LEN,
            "saved SYN of {} bytes is cut short",
            bytes.len()
        );
        Ok(Self { bytes, tcp_offset })
    }

    /// The whole of it, from the IP header on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// IPv4 type of service or IPv6 traffic class: DSCP and, in the lowest two bits, ECN.
    pub fn traffic_class(&self) -> u8 {
        if self.is_v4() {
            self.bytes[1]
        } else {
            self.bytes[0] << 4 | self.bytes[1] >> 4
        }
    }

    /// The differentiated services code point (RFC 2474), 0 to 63.
    pub fn dscp(&self) -> u8 {
        self.traffic_class() >> 2
    }

    /// Time to live, or hop limit.
    pub fn ttl(&self) -> u8 {
        self.bytes[if self.is_v4() { 8 } else { 7 }]
    }

    /// Who sent it: pepsal's legs start with the gateway's [`GATEWAY_HOPS`](crate::topology::GATEWAY_HOPS), hosts of the
    /// testbed with twice as many.
    pub fn path(&self) -> Path {
        match self.ttl() <= crate::topology::GATEWAY_HOPS {
            true => Path::Split,
            false => Path::Forwarded,
        }
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        if self.is_v4() {
            self.v4_address(12)
        } else {
            self.v6_address(8)
        }
    }

    /// Destination address.
    pub fn destination(&self) -> IpAddr {
        if self.is_v4() {
            self.v4_address(16)
        } else {
            self.v6_address(24)
        }
    }

    /// IPv4 options with their padding; empty for IPv6.
    pub fn ip_options(&self) -> &[u8] {
        if self.is_v4() {
            &self.bytes[IPV4_HEADER_LEN..self.tcp_offset]
        } else {
            &[]
        }
    }

    /// The IPv6 extension header of protocol number `protocol` (0 hop-by-hop, 60 destination options), from its
    /// next-header byte on.
    pub fn extension_header(&self, protocol: u8) -> Option<&[u8]> {
        if self.is_v4() {
            return None;
        }
        extension_headers(&self.bytes)
            .find(|(_, found, _)| *found == protocol)
            .map(|(_, _, header)| header)
    }

    /// The TCP header with its options.
    pub fn tcp_header(&self) -> &[u8] {
        &self.bytes[self.tcp_offset..]
    }

    /// What the TCP header says, and how much payload came with it.
    pub fn segment(&self) -> Segment {
        Segment::of_headers(self).expect("what the kernel has saved is whole")
    }

    fn is_v4(&self) -> bool {
        self.bytes[0] >> 4 == 4
    }

    fn v4_address(&self, offset: usize) -> IpAddr {
        let octets: [u8; 4] = self.bytes[offset..offset + 4]
            .try_into()
            .expect("the slice has 4 bytes");
        Ipv4Addr::from(octets).into()
    }

    fn v6_address(&self, offset: usize) -> IpAddr {
        let octets: [u8; 16] = self.bytes[offset..offset + 16]
            .try_into()
            .expect("the slice has 16 bytes");
        Ipv6Addr::from(octets).into()
    }
}

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const TCP_HEADER_LEN: usize = 20;
const TCP: u8 = 6;

/// The extension headers of an IPv6 packet that are wholly there: where each ends, its protocol number, its bytes.
fn extension_headers(packet: &[u8]) -> impl Iterator<Item = (usize, u8, &[u8])> {
    let mut protocol = packet.get(6).copied().unwrap_or(TCP);
    let mut offset = IPV6_HEADER_LEN;
    std::iter::from_fn(move || {
        if protocol == TCP {
            return None;
        }
        let len = 8 * (1 + usize::from(*packet.get(offset + 1)?));
        let header = packet.get(offset..offset + len)?;
        let found = protocol;
        protocol = header[0];
        offset += len;
        Some((offset, found, header))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP_HEADER: [u8; 20] = [0; 20];

    #[test]
    fn ipv4_options_end_where_tcp_begins() {
        let mut packet = vec![
            0x46, 0x4a, 0, 0, 0, 0, 0, 0, 63, 6, 0, 0, 10, 1, 0, 2, 10, 2, 0, 2,
        ];
        packet.extend([148, 4, 0, 0]);
        packet.extend(TCP_HEADER);
        let syn = SavedSyn::parse(packet).unwrap();
        assert_eq!((syn.dscp(), syn.traffic_class(), syn.ttl()), (0x12, 0x4a, 63));
        assert_eq!(syn.source(), IpAddr::from([10, 1, 0, 2]));
        assert_eq!(syn.destination(), IpAddr::from([10, 2, 0, 2]));
        assert_eq!(syn.ip_options(), [148, 4, 0, 0]);
        assert_eq!(syn.tcp_header(), TCP_HEADER);
    }

    #[test]
    fn ipv6_extension_headers_are_found_in_order() {
        let hop_by_hop = [60, 0, 5, 2, 0, 0, 1, 0];
        let destination_options = [6, 0, 1, 4, 0, 0, 0, 0];
        let mut packet = vec![0; 40];
        packet[0] = 0x64;
        packet[1] = 0x80;
        packet.extend(hop_by_hop);
        packet.extend(destination_options);
        packet.extend(TCP_HEADER);
        let syn = SavedSyn::parse(packet).unwrap();
        assert_eq!(syn.traffic_class(), 0x48);
        assert_eq!(syn.extension_header(0), Some(&hop_by_hop[..]));
        assert_eq!(syn.extension_header(60), Some(&destination_options[..]));
        assert_eq!(syn.tcp_header(), TCP_HEADER);
    }

    #[test]
    fn cut_short_is_an_error_at_every_length() {
        let mut packet = vec![0; 40];
        packet[0] = 0x60;
        packet.extend([6, 0, 1, 4, 0, 0, 0, 0]);
        packet.extend(TCP_HEADER);
        for len in 0..packet.len() {
            assert!(SavedSyn::parse(packet[..len].to_vec()).is_err(), "{len} bytes");
        }
        assert!(SavedSyn::parse(packet).is_ok());
    }
}
