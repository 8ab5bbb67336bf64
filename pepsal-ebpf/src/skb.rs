//! A packet in the kernel: its bytes from the network header on, its metadata, and the ways out of a program.

use core::{ffi::c_void, mem::MaybeUninit, ptr::read_volatile};

use aya_ebpf::{
    bindings::{__sk_buff, bpf_redir_neigh},
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head, bpf_skb_change_type,
        bpf_skb_load_bytes, bpf_skb_load_bytes_relative, bpf_skb_store_bytes,
    },
};
use pepsal_ebpf::packet::{Family, Packet};

/// `TCX_NEXT`, which is also `TC_ACT_UNSPEC`: programs after this one, and the rest of the stack, still see the packet.
pub const NEXT: i32 = -1;
/// `TCX_DROP`, `TC_ACT_SHOT`.
pub const DROP: i32 = 2;

const BPF_HDR_START_NET: u32 = 1;
const BPF_F_INGRESS: u64 = 1;
const PACKET_HOST: u32 = 0;

/// Octets of an Ethernet header.
pub const ETHERNET_LEN: u32 = 14;

/// A socket buffer, read from its network header on, whether the device has a link-layer header or not.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $field:ident,)*) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            pub fn $name(self) -> u32 {
                // SAFETY: a field of the context that programs of this type may read.
                unsafe { (*self.0).$field }
            }
        )*
    };
}

impl Skb {
    fields! {
        /// Index of the device that the program runs on.
        ifindex = ifindex,
        /// Index of the device that the packet came in by; zero for one that was made here.
        ingress_ifindex = ingress_ifindex,
        mark = mark,
        tc_index = tc_index,
        gso_size = gso_size,
        packet_type = pkt_type,
    }

    /// Whether a router may take the packet: it was sent to this host's link-layer address.
    #[inline(always)]
    pub fn is_for_this_host(self) -> bool {
        self.packet_type() == PACKET_HOST
    }

    #[inline(always)]
    pub fn set_mark(self, mark: u32) {
        // SAFETY: a field that programs of this type may write.
        unsafe { (*self.0).mark = mark }
    }

    #[inline(always)]
    pub fn set_tc_index(self, index: u16) {
        // SAFETY: a field that programs of this type may write.
        unsafe { (*self.0).tc_index = u32::from(index) }
    }

    #[inline(always)]
    pub fn family(self) -> Option<Family> {
        // SAFETY: a field of the context that programs of this type may read.
        match u16::from_be(unsafe { (*self.0).protocol } as u16) {
            0x0800 => Some(Family::V4),
            0x86dd => Some(Family::V6),
            _ => None,
        }
    }

    /// Whether the frame is another device's: tagged on a VLAN's parent, it comes again on the VLAN's own device. Priority
    /// tags (VID 0, IEEE 802.1Q) are the parent's own.
    #[inline(always)]
    pub fn is_of_vlan(self) -> bool {
        // SAFETY: fields of the context that programs of this type may read.
        unsafe { (*self.0).vlan_present != 0 && (*self.0).vlan_tci & 0x0fff != 0 }
    }

    /// The octets at an offset from the start of the frame.
    #[inline(always)]
    pub fn frame<const N: usize>(self, offset: u32) -> Option<[u8; N]> {
        let mut octets = [0; N];
        // SAFETY: the helper writes N bytes.
        let read = unsafe { bpf_skb_load_bytes(self.0.cast(), offset, octets.as_mut_ptr().cast(), N as u32) };
        (read == 0).then_some(octets)
    }

    /// Writes octets at an offset from the start of the frame. Link-layer addresses are in no checksum.
    #[inline(always)]
    pub fn write<const N: usize>(self, offset: u32, octets: &[u8; N]) -> bool {
        // SAFETY: the helper reads N bytes.
        unsafe { bpf_skb_store_bytes(self.0.cast(), offset, octets.as_ptr().cast(), N as u32, 0) == 0 }
    }

    /// Puts an Ethernet header in front of a packet that has none.
    #[inline(always)]
    pub fn push_ethernet(self) -> bool {
        // SAFETY: a helper call on the context.
        unsafe { bpf_skb_change_head(self.0, ETHERNET_LEN, 0) == 0 }
    }

    /// Declares the packet to be for this host, where no link-layer address says so.
    #[inline(always)]
    pub fn address_to_this_host(self) {
        // SAFETY: a helper call on the context; it fails for types that are none.
        unsafe { bpf_skb_change_type(self.0, PACKET_HOST) };
    }

    /// The verdict that receives the packet from the other end of a device pair, in that end's namespace.
    #[inline(always)]
    pub fn redirect_to_peer(self, ifindex: u32) -> i32 {
        // SAFETY: a helper that takes numbers.
        unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
    }

    /// The verdict that sends the packet out through a device.
    #[inline(always)]
    pub fn redirect(self, ifindex: u32) -> i32 {
        // SAFETY: a helper that takes numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }

    /// The verdict that receives the packet from a device, ingress programs included.
    #[inline(always)]
    pub fn redirect_to_ingress(self, ifindex: u32) -> i32 {
        // SAFETY: a helper that takes numbers.
        unsafe { bpf_redirect(ifindex, BPF_F_INGRESS) as i32 }
    }

    /// The verdict that sends the packet to a neighbour behind a device, whose link-layer address the kernel finds.
    #[inline(always)]
    pub fn redirect_to_neighbour(self, ifindex: u32, neighbour: &mut bpf_redir_neigh) -> i32 {
        // SAFETY: the helper reads the structure, whose size it is told.
        unsafe { bpf_redirect_neigh(ifindex, neighbour, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
    }

    /// Whether the packet has these bytes; where it has not, zeroes are written.
    ///
    /// # Safety
    /// `len` bytes fit.
    #[inline(always)]
    unsafe fn load(&self, offset: u32, to: *mut c_void, len: u32) -> bool {
        // SAFETY: the caller's.
        unsafe { bpf_skb_load_bytes_relative(self.0.cast(), offset, to, len, BPF_HDR_START_NET) == 0 }
    }
}

/// Aligned, bytes are looked at by the word and not one by one.
#[repr(align(8))]
struct Words<const N: usize>([u8; N]);

impl Packet for Skb {
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut words = MaybeUninit::<Words<N>>::uninit();
        // SAFETY: N bytes fit, and have been written if it says so.
        unsafe {
            self.load(offset, words.as_mut_ptr().cast(), N as u32)
                .then(|| words.assume_init().0)
        }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        // SAFETY: N words fit, and have been written if it says so.
        unsafe {
            self.load(offset, words.as_mut_ptr().cast(), N as u32 * 4)
                .then(|| words.assume_init())
        }
    }

    #[inline(always)]
    fn start<const N: usize, const M: usize>(&self) -> Option<[u32; N]> {
        const { assert!(M <= N) };
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        let to = words.as_mut_ptr().cast();
        // SAFETY: N words fit, and so do M. Where the packet has no N, the helper has written as many zeroes.
        unsafe {
            let read = self.load(0, to, N as u32 * 4) || self.load(0, to, M as u32 * 4);
            read.then(|| words.assume_init())
        }
    }

    #[inline(always)]
    fn copy<const N: usize>(&self, offset: u32, len: u32, to: &mut [u8; N]) -> bool {
        if len == 0 || len > N as u32 {
            return false;
        }
        // Older verifiers (seen up to Linux 6.1) forget that comparison once the length is spilled. What follows repeats
        // it in one register; volatile, as the compiler would leave out what changes nothing.
        // SAFETY: a local variable.
        let len = unsafe { (read_volatile(&len) - 1) & (N.next_power_of_two() as u32 - 1) } + 1;
        // SAFETY: `len` bytes fit.
        unsafe { self.load(offset, to.as_mut_ptr().cast(), len) }
    }

    #[inline(always)]
    fn is_aggregated(&self) -> bool {
        self.gso_size() != 0
    }
}
