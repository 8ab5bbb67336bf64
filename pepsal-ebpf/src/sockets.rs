//! The legs' sockets, found by the packets that are for them.

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::{
    bindings::bpf_sock_tuple,
    helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp},
};
use pepsal_ebpf::{
    Counter,
    packet::{Family, Segment, first_fragment, fragment_key},
};

use crate::{
    maps::{FRAGMENTS, clients_netns, may_be_flow, servers_netns},
    skb::Skb,
};

pub const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
pub const TCP_NEW_SYN_RECV: u32 = 12;

/// Which legs a program looks for, each in their own namespace: a server leg sends the addresses and ports that a client
/// leg receives.
#[derive(Clone, Copy, PartialEq)]
#[repr(u8)]
pub enum Side {
    Clients,
    Servers,
}

/// The socket that a segment would be delivered to.
pub enum Found {
    Nothing,
    /// The daemon's, for a flow that is recorded.
    Listener,
    /// A connection, with its state.
    Leg(u32),
}

impl Side {
    #[inline(always)]
    fn netns(self) -> u64 {
        u64::from(match self {
            Self::Clients => clients_netns(),
            Self::Servers => servers_netns(),
        })
    }

    #[inline(always)]
    pub fn find(self, skb: Skb, segment: &Segment) -> Found {
        #[repr(C)]
        struct TupleV4 {
            source: u32,
            destination: u32,
            source_port: [u8; 2],
            destination_port: [u8; 2],
        }
        #[repr(C)]
        struct TupleV6 {
            source: [u32; 4],
            destination: [u32; 4],
            source_port: [u8; 2],
            destination_port: [u8; 2],
        }

        let flow = match self {
            Self::Clients => segment.flow(),
            Self::Servers => segment.answered_flow(),
        };
        if !may_be_flow(&flow) {
            return Found::Nothing;
        }
        let (source_port, destination_port) = (segment.source_port, segment.destination_port);
        let netns = self.netns();
        let skb = skb.0.cast();
        // SAFETY: the helper reads a tuple of the size it is told and returns a socket with a reference, which is given
        // back after its state was read.
        unsafe {
            let socket = match segment.family {
                Family::V4 => {
                    let ([.., source], [.., destination]) =
                        (segment.source.words(), segment.destination.words());
                    let mut tuple = TupleV4 {
                        source,
                        destination,
                        source_port,
                        destination_port,
                    };
                    let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
                    bpf_skc_lookup_tcp(skb, tuple, size_of::<TupleV4>() as u32, netns, 0)
                }
                Family::V6 => {
                    let mut tuple = TupleV6 {
                        source: segment.source.words(),
                        destination: segment.destination.words(),
                        source_port,
                        destination_port,
                    };
                    let tuple = (&raw mut tuple).cast::<bpf_sock_tuple>();
                    bpf_skc_lookup_tcp(skb, tuple, size_of::<TupleV6>() as u32, netns, 0)
                }
            };
            if socket.is_null() {
                return Found::Nothing;
            }
            let state = read_volatile(addr_of!((*socket).state));
            bpf_sk_release(socket.cast());
            match state {
                TCP_LISTEN => Found::Listener,
                state => Found::Leg(state),
            }
        }
    }

    /// The first fragment of a leg's segment has the ports; the others go where it has gone. A SYN in fragments is left
    /// alone.
    #[inline(always)]
    pub fn find_fragment(self, skb: Skb) -> Result<(), Counter> {
        let family = skb.family().ok_or(Counter::NotIp)?;
        match first_fragment(&skb, family) {
            Ok(segment) if !segment.is_syn() && matches!(self.find(skb, &segment), Found::Leg(_)) => {
                let key = fragment_key(&skb, family).ok_or(Counter::Fragment)?;
                // Without a place for it the others pass, and the peer has to send the segment again.
                FRAGMENTS
                    .insert(key, self as u8, 0)
                    .map_err(|_| Counter::Fragment)
            }
            Ok(_) => Err(Counter::Fragment),
            Err(_) => {
                let key = fragment_key(&skb, family).ok_or(Counter::Fragment)?;
                // SAFETY: one byte, which is written whole.
                match unsafe { FRAGMENTS.get(key) } {
                    Some(side) if *side == self as u8 => Ok(()),
                    _ => Err(Counter::Fragment),
                }
            }
        }
    }
}
