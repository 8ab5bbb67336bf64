//! Bytes to headers: what steering has to know of a packet, parsed without touching a map or a helper.
//!
//! The parser reads through [`Packet`], which is a socket buffer in the kernel and a slice in the tests. Every read
//! is of a fixed size at a computed offset and is refused past the packet's end, which is all that the verifier asks.
//! The packet starts at its network header.

use crate::{
    Counter,
    packet::{
        icmp::parse_icmp_error,
        ip::{PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, parse_v4, parse_v6},
        tcp::parse_tcp,
    },
};

pub use crate::packet::{
    fragment::{first_fragment, fragment_key},
    icmp::redirected,
    syn::{TcpOptions, record_syn},
    tcp::Segment,
};

mod fragment;
mod icmp;
mod ip;
#[cfg(test)]
mod sample;
mod syn;
mod tcp;

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

/// What a packet is to pepsal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A TCP segment.
    Tcp(Segment),
    /// An ICMP error; the segment is the quoted one turned round, so that it is addressed as an answer to it would be.
    IcmpError(Segment),
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

#[cfg(test)]
fn parse_bytes(packet: &[u8], family: Family) -> Result<Parsed, Counter> {
    parse(&packet, family)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{SynRecord, packet::sample::any_family};

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
    }
}
