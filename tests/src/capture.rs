//! Captures TCP segments of an interface.

use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::sync::Mutex;

use anyhow::{Context, Result};
use etherparse::{LaxIpSlice, TcpOptionElement, TcpOptionReadError};
use nix::libc;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::netns::Namespace;
use crate::syn::SavedSyn;

/// `ETH_P_ALL` in network order, for packet(7).
const EVERY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Receive buffer in bytes, for the segments between two reads.
const BUFFER_BYTES: usize = 16 << 20;

/// Headers with all their options; payload may be cut off.
const SNAP_BYTES: usize = 512;

/// A capture on an interface; dropping it ends the capture.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    seen: Mutex<Vec<Segment>>,
}

impl Capture {
    /// Starts a capture.
    ///
    /// # Errors
    /// Without root, or when the interface is missing.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = namespace.run(|| -> Result<Socket> {
            let ifindex = if_nametoindex(interface).with_context(|| interface.to_owned())?;
            // A datagram starts with the IP header, on every type of interface.
            let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(0)))?;
            socket.set_nonblocking(true)?;
            socket.set_recv_buffer_size(BUFFER_BYTES)?;
            socket.bind(&every_packet_of(ifindex))?;
            Ok(socket)
        });
        Ok(Self {
            socket: socket.context("packet socket")?,
            seen: Mutex::default(),
        })
    }

    /// Returns all TCP segments since the start, of both directions, in their order.
    ///
    /// # Errors
    /// When the socket cannot be read.
    pub fn segments(&self) -> io::Result<Vec<Segment>> {
        let mut seen = self.seen.lock().expect("nothing panics with the lock held");
        let mut packet = [0; SNAP_BYTES];
        loop {
            match (&self.socket).read(&mut packet) {
                Ok(len) => seen.extend(Segment::parse(&packet[..len])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(seen.clone()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Returns the packet(7) address of all packets of an interface.
fn every_packet_of(ifindex: u32) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: the storage has room for every kind of address, and all-zeroes is one of this kind.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = EVERY_PROTOCOL;
    address.sll_ifindex = ifindex as i32;
    // SAFETY: the storage holds an address of this size.
    unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t) }
}

/// Header fields of a TCP segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// The control bits of RFC 9293, section 3.1.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// IPv4 type of service or IPv6 traffic class.
    pub traffic_class: u8,
    /// The receive window, not scaled.
    pub window: u16,
    /// The window scale option of a SYN (RFC 7323).
    pub window_scale: Option<u8>,
    /// The maximum segment size option of a SYN.
    pub mss: Option<u16>,
    /// Whether it has the fast open option (RFC 7413), a cookie or a request for one.
    pub fast_open: bool,
    /// Bytes of payload.
    pub payload_len: usize,
}

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

const OPTION_FAST_OPEN: u8 = 34;

impl Segment {
    /// Parses a packet; `None` if it is not a TCP segment.
    fn parse(packet: &[u8]) -> Option<Self> {
        Some(Self::of_headers(&SavedSyn::parse(packet.to_vec()).ok()?))
    }

    /// Returns the header fields of a packet that starts with the IP header.
    pub(crate) fn of_headers(packet: &SavedSyn) -> Self {
        let (ip, tcp) = (packet.ip(), packet.tcp());
        let len = match &ip {
            LaxIpSlice::Ipv4(ip) => ip.header().total_len().into(),
            LaxIpSlice::Ipv6(ip) => ip.header().slice().len() + usize::from(ip.header().payload_length()),
        };
        let mut segment = Self {
            source: (ip.source_addr(), tcp.source_port()).into(),
            destination: (ip.destination_addr(), tcp.destination_port()).into(),
            flags: tcp.slice()[13],
            sequence: tcp.sequence_number(),
            traffic_class: packet.traffic_class(),
            window: tcp.window_size(),
            window_scale: None,
            mss: None,
            fast_open: false,
            // Including the bytes that were not captured.
            payload_len: tcp.payload().len() + len.saturating_sub(packet.bytes().len()),
        };
        for option in tcp.options_iterator() {
            match option {
                Ok(TcpOptionElement::MaximumSegmentSize(mss)) => segment.mss = Some(mss),
                Ok(TcpOptionElement::WindowScale(scale)) => segment.window_scale = Some(scale),
                // The kernel writes it last, and the parser stops at an unknown option.
                Err(TcpOptionReadError::UnknownId(OPTION_FAST_OPEN)) => segment.fast_open = true,
                _ => {}
            }
        }
        segment
    }

    /// Returns whether it is a SYN.
    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Returns whether it is a SYN-ACK.
    pub fn is_syn_ack(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }

    /// Returns whether it belongs to an established connection.
    pub fn is_established(&self) -> bool {
        self.flags & (SYN | RST | ACK) == ACK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYN_WITH_DATA: [u8; 52] = [
        0x45, 0, 0, 53, 0, 0, 0, 0, 64, 6, 0, 0, 10, 1, 0, 2, 10, 2, 0, 2, // IPv4, 53 bytes
        0x10, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 2, 0xff, 0xff, 0, 0, 0, 0, // TCP, 32 bytes
        2, 4, 5, 180, 1, 3, 3, 9, 34, 2, 1, 0, // MSS 1460, NOP, window scale 9, fast open, NOP, end
    ];

    #[test]
    fn options_and_payload_of_a_syn_are_read() {
        let syn = Segment::parse(&SYN_WITH_DATA).unwrap();
        assert!(syn.is_syn() && !syn.is_syn_ack() && !syn.is_established());
        assert_eq!(syn.source, "10.1.0.2:4096".parse().unwrap());
        assert_eq!(syn.destination, "10.2.0.2:80".parse().unwrap());
        assert_eq!((syn.mss, syn.window_scale), (Some(1460), Some(9)));
        assert_eq!((syn.window, syn.payload_len, syn.fast_open), (0xffff, 1, true));
    }

    #[test]
    fn what_is_no_whole_segment_is_left_out() {
        for len in 0..SYN_WITH_DATA.len() {
            assert_eq!(Segment::parse(&SYN_WITH_DATA[..len]), None, "{len} bytes");
        }
    }
}
