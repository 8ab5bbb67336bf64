//! SYNs for the tests, built by the byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;

use crate::{
    EXTENSION_MAX, FlowKey,
    packet::{
        Family,
        ip::{EXT_DESTINATION, EXT_HOP_BY_HOP, EXT_ROUTING, EXTENSIONS_WALKED, PROTO_TCP},
        tcp::SYN,
    },
};

/// A SYN to be built, and what it is to be parsed to.
#[derive(Clone, Debug)]
pub(super) struct Syn {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) traffic_class: u8,
    pub(super) ttl: u8,
    pub(super) flow_label: u32,
    pub(super) ip_options: Vec<u8>,
    /// Protocol number, and all of the header but its next-header byte.
    pub(super) extensions: Vec<(u8, Vec<u8>)>,
    pub(super) tcp_options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

impl Syn {
    pub(super) fn family(&self) -> Family {
        if self.source.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    pub(super) fn flow(&self) -> FlowKey {
        FlowKey::between(self.source, self.destination)
    }

    pub(super) fn segment(&self) -> Vec<u8> {
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

    pub(super) fn packet(&self) -> Vec<u8> {
        self.ip(PROTO_TCP, &self.segment())
    }

    /// Without the payload.
    pub(super) fn headers_len(&self) -> usize {
        self.packet().len() - self.payload.len()
    }

    pub(super) fn ip(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
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
                let mut protocols: Vec<u8> = self.extensions.iter().map(|(protocol, _)| *protocol).collect();
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
    pub(super) fn extension(&self, protocol: u8) -> Vec<u8> {
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

pub(super) fn any_family() -> impl Strategy<Value = Family> {
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

pub(super) fn syn_of(family: Family) -> impl Strategy<Value = Syn> {
    let is_v4 = family == Family::V4;
    let extensions = prop::collection::vec(extension(), if is_v4 { 0..1 } else { 0..EXTENSIONS_WALKED + 1 });
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

pub(super) fn any_syn() -> impl Strategy<Value = Syn> {
    any_family().prop_flat_map(syn_of)
}
