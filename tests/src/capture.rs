//! TCP segments as they pass through an interface.

use std::io::{self, ErrorKind, Read};
use std::net::SocketAddr;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, Socket, Type};

use crate::netns::Namespace;
use crate::syn::SavedSyn;

/// In network order, as packet(7) wants it.
const EVERY_PROTOCOL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Room for what arrives between two looks at it.
const BUFFER_BYTES: usize = 16 << 20;

/// Headers with all their options; payload may be cut off.
const SNAP_BYTES: usize = 512;

/// Listens in on an interface until it is dropped.
#[derive(Debug)]
pub struct Capture {
    socket: Socket,
    seen: Mutex<Vec<Segment>>,
}

impl Capture {
    /// Starts to listen in.
    ///
    /// # Errors
    /// Without root, or such an interface.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = namespace.run(|| -> Result<Socket> {
            let ifindex = if_nametoindex(interface).with_context(|| interface.to_owned())?;
            // A datagram starts with the IP header, whatever the interface is.
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

    /// All TCP segments since the start, both ways, in their order.
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

/// packet(7)'s address of all that an interface receives and sends.
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

/// What the headers of a TCP segment say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes to.
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
    /// Whether it has the fast open option (RFC 7413): a cookie, or the wish for one.
    pub fast_open: bool,
    /// Bytes of payload.
    pub payload_len: usize,
}

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

const IPV6_HEADER_LEN: usize = 40;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_FAST_OPEN: u8 = 34;

impl Segment {
    /// `None` for what is no TCP segment.
    fn parse(packet: &[u8]) -> Option<Self> {
        let protocol = match packet.first()? >> 4 {
            4 => *packet.get(9)?,
            6 => *packet.get(6)?,
            _ => return None,
        };
        // Nothing here sends extension headers but in SYNs, and those a server saves.
        if protocol != 6 {
            return None;
        }
        Self::of_headers(&SavedSyn::parse(packet.to_vec()).ok()?).ok()
    }

    /// What is said by a packet from its IP header on.
    pub(crate) fn of_headers(packet: &SavedSyn) -> Result<Self> {
        let (bytes, tcp) = (packet.bytes(), packet.tcp_header());
        let word = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let ip_len = match bytes[0] >> 4 {
            4 => usize::from(word(bytes, 2)),
            _ => IPV6_HEADER_LEN + usize::from(word(bytes, 4)),
        };
        let tcp_header_len = usize::from(tcp[12] >> 4) * 4;
        ensure!(tcp.len() >= tcp_header_len, "the TCP header is cut short");
        let mut segment = Self {
            source: (packet.source(), word(tcp, 0)).into(),
            destination: (packet.destination(), word(tcp, 2)).into(),
            flags: tcp[13],
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            traffic_class: packet.traffic_class(),
            window: word(tcp, 14),
            window_scale: None,
            mss: None,
            fast_open: false,
            payload_len: ip_len.saturating_sub(bytes.len() - tcp.len() + tcp_header_len),
        };
        segment.read_options(&tcp[20..tcp_header_len]);
        Ok(segment)
    }

    fn read_options(&mut self, mut options: &[u8]) {
        loop {
            options = match options {
                [OPTION_END, ..] | [] => return,
                [OPTION_NOP, rest @ ..] => rest,
                [OPTION_MSS, 4, high, low, rest @ ..] => {
                    self.mss = Some(u16::from_be_bytes([*high, *low]));
                    rest
                }
                [OPTION_WINDOW_SCALE, 3, scale, rest @ ..] => {
                    self.window_scale = Some(*scale);
                    rest
                }
                [kind, len, ..] => match options.get(usize::from(*len).max(2)..) {
                    Some(rest) => {
                        self.fast_open |= *kind == OPTION_FAST_OPEN;
                        rest
                    }
                    None => return,
                },
                [_] => return,
            };
        }
    }

    /// Whether it opens a connection.
    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Whether it answers one that does.
    pub fn is_syn_ack(&self) -> bool {
        self.flags & (SYN | ACK) == SYN | ACK
    }

    /// Whether it belongs to a connection that both ends know of.
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
