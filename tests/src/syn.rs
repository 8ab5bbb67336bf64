//! The client's SYN that the server's kernel received.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use etherparse::{
    Ipv4HeaderSlice, Ipv6ExtensionSlice, Ipv6ExtensionsSlice, Ipv6HeaderSlice, LaxIpSlice, TcpSlice,
    ip_number,
};

use crate::capture::Segment;

/// Path of a connection through the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// As two legs: a daemon has opened the connection to the server.
    Split,
    /// Forwarded, unchanged.
    Forwarded,
}

/// The IP and TCP headers of a SYN with all their options, as TCP_SAVED_SYN returns them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedSyn(Vec<u8>);

impl SavedSyn {
    /// Parses the bytes from the IP header on.
    ///
    /// # Errors
    /// When they are not a complete IP header and a complete TCP header.
    pub fn parse(bytes: Vec<u8>) -> Result<Self> {
        let (ip, _) = LaxIpSlice::from_slice(&bytes)?;
        ensure!(ip.payload_ip_number() == ip_number::TCP, "it has no TCP header");
        TcpSlice::from_slice(ip.payload().payload)?;
        Ok(Self(bytes))
    }

    /// Returns all bytes, from the IP header on.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the IPv4 type of service or IPv6 traffic class: DSCP and, in the lowest two bits, ECN.
    pub fn traffic_class(&self) -> u8 {
        match self.ip() {
            LaxIpSlice::Ipv4(ip) => ip.header().dcp().value() << 2 | ip.header().ecn().value(),
            LaxIpSlice::Ipv6(ip) => ip.header().traffic_class(),
        }
    }

    /// Returns the DSCP (RFC 2474), 0 to 63.
    pub fn dscp(&self) -> u8 {
        self.traffic_class() >> 2
    }

    /// Returns the TTL or hop limit.
    pub fn ttl(&self) -> u8 {
        match self.ip() {
            LaxIpSlice::Ipv4(ip) => ip.header().ttl(),
            LaxIpSlice::Ipv6(ip) => ip.header().hop_limit(),
        }
    }

    /// Returns the path, by the TTL: pepsal's legs start with the gateway's
    /// [`GATEWAY_HOPS`](crate::topology::GATEWAY_HOPS), hosts of the testbed with twice as many.
    pub fn path(&self) -> Path {
        match self.ttl() <= crate::topology::GATEWAY_HOPS {
            true => Path::Split,
            false => Path::Forwarded,
        }
    }

    /// Returns the source address.
    pub fn source(&self) -> IpAddr {
        self.ip().source_addr()
    }

    /// Returns the destination address.
    pub fn destination(&self) -> IpAddr {
        self.ip().destination_addr()
    }

    /// Returns the IPv4 options with their padding; empty for IPv6.
    pub fn ip_options(&self) -> &[u8] {
        Ipv4HeaderSlice::from_slice(&self.0).map_or(&[], |header| header.options())
    }

    /// Returns the IPv6 extension header of protocol number `protocol` (0 hop-by-hop, 60 destination
    /// options), from its next-header byte on.
    pub fn extension_header(&self, protocol: u8) -> Option<&[u8]> {
        let header = Ipv6HeaderSlice::from_slice(&self.0).ok()?;
        let chain = &self.0[header.slice().len()..];
        let (extensions, ..) = Ipv6ExtensionsSlice::from_slice_lax(header.next_header(), chain);
        extensions.into_iter().find_map(|extension| match extension {
            Ipv6ExtensionSlice::HopByHop(header) if protocol == 0 => Some(header.slice()),
            Ipv6ExtensionSlice::DestinationOptions(header) if protocol == 60 => Some(header.slice()),
            _ => None,
        })
    }

    /// Returns the header fields, and the number of payload bytes.
    pub fn segment(&self) -> Segment {
        Segment::of_headers(self)
    }

    pub(crate) fn ip(&self) -> LaxIpSlice<'_> {
        let parsed = LaxIpSlice::from_slice(&self.0);
        parsed.expect("it was parsed before").0
    }

    pub(crate) fn tcp(&self) -> TcpSlice<'_> {
        TcpSlice::from_slice(self.ip().payload().payload).expect("it was parsed before")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP_HEADER: [u8; 20] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0];

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
        assert_eq!(syn.tcp().slice(), TCP_HEADER);
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
        assert_eq!(syn.tcp().slice(), TCP_HEADER);
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
