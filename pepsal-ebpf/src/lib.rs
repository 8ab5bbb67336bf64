//! What pepsal's kernel side and its user side share: the maps' keys and values, the counters, and the packet
//! parser, which is pure and tested on the host.
//!
//! Everything that crosses a map is `repr(C)` with its padding spelt out and its size asserted. Addresses are
//! 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2), so that both families share every map.

#![cfg_attr(not(test), no_std)]

pub mod packet;
pub mod subscriber;

use core::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Deref,
};

/// An IP address of either family as it lies in a map: network order, IPv4 as `::ffff:a.b.c.d`.
///
/// It is kept by the word, so that the programs move four words and not sixteen bytes.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MappedAddr([u32; 4]);

impl MappedAddr {
    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(octets)])
    }

    /// An IPv6 address.
    #[inline(always)]
    pub const fn v6(o: [u8; 16]) -> Self {
        Self::from_words([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    /// From four words in network order.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// Four words in network order; that of an IPv4 address is the last.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        self.0
    }

    /// Whether it stands for an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be()
    }

    /// Sixteen octets in network order.
    pub fn octets(self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (to, word) in octets.chunks_exact_mut(4).zip(self.0) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }
}

/// The longest IPv6 hop-by-hop or destination options header that a [`SynRecord`] holds, in bytes.
pub const EXTENSION_MAX: usize = 128;

/// The longest IPv4 options field (RFC 791), in bytes.
pub const IP_OPTIONS_MAX: usize = 40;

/// Bytes in one [`PORT_SETS`](PortSet) entry: a bit for each of 65,536 ports.
pub const PORT_SET_BYTES: usize = 8192;

/// A set of TCP ports, one bit each: port `p` is bit `p % 8` of byte `p / 8`.
pub type PortSet = [u8; PORT_SET_BYTES];

/// A prefix in the tries of the selection: that of a generation of rules, so that old and new rules can stand side by side
/// while one word says which of them hold.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefixKey {
    generation: [u8; 4],
    addr: MappedAddr,
}

const _: () = assert!(size_of::<PrefixKey>() == 20);

impl PrefixKey {
    /// Bits in front of those of the address, all of them significant.
    pub const GENERATION_BITS: u32 = 32;

    /// An address of a generation of rules.
    #[inline(always)]
    pub const fn new(generation: u32, addr: MappedAddr) -> Self {
        Self {
            generation: generation.to_be_bytes(),
            addr,
        }
    }
}

/// Most prefixes that the rules for destinations and those for sources may name, old and new ones together.
pub const PREFIXES_MAX: u32 = 1 << 20;

/// Most different sets of ports, old and new ones together.
pub const PORT_SETS_MAX: u32 = 1 << 16;

/// Most links that can have a profile of their own.
pub const LINKS_MAX: u32 = 64;

/// Most interfaces that the programs are attached to.
pub const INTERFACES_MAX: u32 = 65_536;

/// The link-layer address of either end of a device pair. Frames on it are for this address alone, so that both ends may
/// have the same.
pub const DEVICE_MAC: [u8; 6] = [0x02, b'p', b'e', b'p', 0, 1];

/// How a packet is given to an interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its link-layer address; zeroes where it has none.
    pub mac: [u8; 6],
    /// Non-zero when its packets start with an Ethernet header.
    pub has_header: u8,
    /// Non-zero when new connections that arrive on it are intercepted.
    pub intercepts: u8,
}

const _: () = assert!(size_of::<Interface>() == 8);

impl Interface {
    /// An interface with this Ethernet address, or one without link-layer header.
    pub fn new(mac: Option<[u8; 6]>, intercepts: bool) -> Self {
        Self {
            mac: mac.unwrap_or_default(),
            has_header: u8::from(mac.is_some()),
            intercepts: u8::from(intercepts),
        }
    }
}

/// The link that stands for all interfaces without a profile.
pub const NO_LINK: u32 = 0;

/// Slot of a link's IPv4 listener in the listeners' SockMap.
#[inline(always)]
pub const fn listener_v4(link: u32) -> u32 {
    link * 2
}

/// Slot of a link's IPv6 listener in the listeners' SockMap.
#[inline(always)]
pub const fn listener_v6(link: u32) -> u32 {
    link * 2 + 1
}

/// The option by which the daemon sets the congestion window of a connection that has not sent data yet, at the level
/// of TCP: a `u32` of segments. A program on the daemon's cgroup answers it, with the window that only eBPF can set.
pub const TCP_INITIAL_WINDOW: i32 = 0x5045;

/// The mapped form of an address of either family.
pub fn map_addr(addr: IpAddr) -> MappedAddr {
    match addr {
        IpAddr::V4(v4) => MappedAddr::v4(v4.octets()),
        IpAddr::V6(v6) => MappedAddr::v6(v6.octets()),
    }
}

/// The address that a mapped form stands for.
pub fn unmap_addr(addr: MappedAddr) -> IpAddr {
    let v6 = Ipv6Addr::from(addr.octets());
    match v6.to_ipv4_mapped() {
        Some(v4) => IpAddr::V4(Ipv4Addr::from(v4.octets())),
        None => IpAddr::V6(v6),
    }
}

/// A flow as the client's segments name it: source is the client, destination is the server.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    client: MappedAddr,
    server: MappedAddr,
    client_port: [u8; 2],
    server_port: [u8; 2],
}

const _: () = assert!(size_of::<FlowKey>() == 36);

impl FlowKey {
    /// A key from addresses and ports in network order.
    #[inline(always)]
    pub const fn new(
        client: MappedAddr,
        server: MappedAddr,
        client_port: [u8; 2],
        server_port: [u8; 2],
    ) -> Self {
        Self {
            client,
            server,
            client_port,
            server_port,
        }
    }

    /// The key of the flow between two socket addresses.
    pub fn between(client: SocketAddr, server: SocketAddr) -> Self {
        Self::new(
            map_addr(client.ip()),
            map_addr(server.ip()),
            client.port().to_be_bytes(),
            server.port().to_be_bytes(),
        )
    }

    /// The client's address and port.
    pub fn client(&self) -> SocketAddr {
        SocketAddr::new(unmap_addr(self.client), u16::from_be_bytes(self.client_port))
    }

    /// The server's address and port: the original destination.
    pub fn server(&self) -> SocketAddr {
        SocketAddr::new(unmap_addr(self.server), u16::from_be_bytes(self.server_port))
    }
}

/// Slots of the [filter of flows](FlowKey::filter_slot), a byte each. At 100,000 flows a tenth of them is taken.
pub const FILTER_SLOTS: usize = 1 << FILTER_BITS;
const FILTER_BITS: u32 = 20;
/// Bytes before the slots: the generation, and padding.
pub const FILTER_HEADER: usize = 8;
/// How many generations a slot is valid for after its own. One more than is needed: the count from 255 to 1 leaves zero out.
pub const FILTER_GENERATIONS: u8 = 3;

impl FlowKey {
    /// The slot of a flow in the filter by which the programs tell packets of no flow without looking for a socket: it contains
    /// the generation in which a flow with this hash was last known. Flows share slots; a slot that says "perhaps" costs a
    /// look-up.
    #[inline(always)]
    pub fn filter_slot(&self) -> usize {
        let fold = |addr: MappedAddr| {
            let [a, b, c, d] = addr.words();
            a ^ b.rotate_left(9) ^ c.rotate_left(18) ^ d
        };
        let [a, b] = self.client_port;
        let [c, d] = self.server_port;
        let ports = u32::from_ne_bytes([a, b, c, d]);
        let mut hash = fold(self.client).wrapping_mul(0x9e37_79b1)
            ^ fold(self.server).wrapping_mul(0x85eb_ca77)
            ^ ports.wrapping_mul(0xc2b2_ae3d);
        hash ^= hash >> 15;
        // The uppermost bits: older verifiers (seen on Linux 6.1) know how large a number is that was shifted.
        (hash.wrapping_mul(0x2c1b_3c6d) >> (u32::BITS - FILTER_BITS)) as usize
    }
}

/// What the fragments of one packet have in common (RFC 791, 3.2; RFC 8200, 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    source: MappedAddr,
    destination: MappedAddr,
    identification: [u8; 4],
    protocol: u8,
    _pad: [u8; 3],
}

const _: () = assert!(size_of::<FragmentKey>() == 40);

impl FragmentKey {
    /// A key from what fragments say, in network order; IPv4's identification is two bytes and two zeroes.
    #[inline(always)]
    pub const fn new(
        source: MappedAddr,
        destination: MappedAddr,
        identification: [u8; 4],
        protocol: u8,
    ) -> Self {
        Self {
            source,
            destination,
            identification,
            protocol,
            _pad: [0; 3],
        }
    }
}

/// What the client's SYN said, recorded before the kernel answers it and taken by the daemon when it accepts. In the maps
/// it is in two parts: few SYNs have the second, which is the larger.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynRecord {
    /// What every SYN has.
    pub head: SynHead,
    /// What those have that say so in their head.
    pub extensions: ExtensionHeaders,
}

/// The part of a [`SynRecord`] that lasts as long as the flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynHead {
    /// When the SYN arrived, in nanoseconds of CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// Index of the interface that it arrived on, which the client leg leaves through.
    pub ingress_ifindex: u32,
    /// Index of the interface that it would have been forwarded to, which the server leg leaves through.
    pub egress_ifindex: u32,
    /// IPv4 TOS or IPv6 traffic class, whole: DSCP (RFC 2474) and ECN bits.
    pub traffic_class: u8,
    /// IPv4 TTL or IPv6 hop limit as it arrived.
    pub ttl: u8,
    /// Bytes used of `ip_options`.
    pub ip_options_len: u8,
    /// Bytes of the hop-by-hop options header.
    pub hop_by_hop_len: u8,
    /// Bytes of the destination options header.
    pub destination_len: u8,
    /// Non-zero when an extension header is not there: it was longer than [`EXTENSION_MAX`], or has made room for newer ones.
    pub truncated: u8,
    _pad: [u8; 2],
    /// IPv4 options as they arrived (RFC 791).
    pub ip_options: [u8; IP_OPTIONS_MAX],
}

/// The part of a [`SynRecord`] that few have, and that is needed until the server leg is made.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionHeaders {
    /// IPv6 hop-by-hop options header (RFC 8200) as it arrived, next-header byte included.
    pub hop_by_hop: [u8; EXTENSION_MAX],
    /// IPv6 destination options header (RFC 8200) as it arrived, next-header byte included.
    pub destination: [u8; EXTENSION_MAX],
}

// With its key and what the kernel adds, an element fits 192 bytes.
const _: () = assert!(size_of::<SynHead>() == 64 && align_of::<SynHead>() == 8);
const _: () = assert!(size_of::<SynRecord>() == 64 + 2 * EXTENSION_MAX);

impl SynRecord {
    /// A record of nothing: what a flow has whose SYN was not seen.
    pub const EMPTY: Self = Self {
        head: SynHead {
            time_ns: 0,
            ingress_ifindex: 0,
            egress_ifindex: 0,
            traffic_class: 0,
            ttl: 0,
            ip_options_len: 0,
            hop_by_hop_len: 0,
            destination_len: 0,
            truncated: 0,
            _pad: [0; 2],
            ip_options: [0; IP_OPTIONS_MAX],
        },
        extensions: ExtensionHeaders {
            hop_by_hop: [0; EXTENSION_MAX],
            destination: [0; EXTENSION_MAX],
        },
    };

    /// Of its two parts. Where the second should be there and is not, it says that it is truncated.
    pub fn new(head: SynHead, extensions: Option<ExtensionHeaders>) -> Self {
        let mut record = Self { head, ..Self::EMPTY };
        match extensions {
            Some(extensions) => record.extensions = extensions,
            None if head.has_extensions() => {
                record.head.truncated = 1;
                (record.head.hop_by_hop_len, record.head.destination_len) = (0, 0);
            }
            None => {}
        }
        record
    }

    /// The IPv6 hop-by-hop options header that the SYN carried, empty when there was none.
    pub fn hop_by_hop(&self) -> &[u8] {
        &self.extensions.hop_by_hop[..usize::from(self.head.hop_by_hop_len).min(EXTENSION_MAX)]
    }

    /// The IPv6 destination options header that the SYN carried, empty when there was none.
    pub fn destination(&self) -> &[u8] {
        &self.extensions.destination[..usize::from(self.head.destination_len).min(EXTENSION_MAX)]
    }
}

impl Deref for SynRecord {
    type Target = SynHead;

    fn deref(&self) -> &SynHead {
        &self.head
    }
}

impl SynHead {
    /// Whether there is a second part.
    #[inline(always)]
    pub fn has_extensions(&self) -> bool {
        self.hop_by_hop_len > 0 || self.destination_len > 0
    }

    /// The IPv4 options that the SYN carried.
    pub fn ip_options(&self) -> &[u8] {
        &self.ip_options[..usize::from(self.ip_options_len).min(IP_OPTIONS_MAX)]
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Verdicts of packets and lookups, each counted where it is decided.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// Every counter, in the order of the map.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Returns the name in logs and metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

counters! {
    /// A SYN was recorded and given to the clients' side: a new flow.
    Intercepted = "intercepted",
    /// A retransmitted SYN of a flow in its handshake.
    Retransmitted = "retransmitted",
    /// A segment from a client was given to its client leg.
    Steered = "steered",
    /// A segment without a socket was given to the clients' side: its flow is in the handshake (SYN cookies).
    Pending = "handshake",
    /// An ICMP error was given to the leg that it is about.
    IcmpError = "icmp_error",
    /// `sk_lookup` gave a new connection to the listener.
    Assigned = "assigned",
    /// A server leg's packet entered the host by the interface of its client.
    Injected = "injected",
    /// A segment that the host sends to the client was given to the server leg.
    Returned = "returned",
    /// A client leg's segment left for the client.
    Sent = "sent",
    /// Dropped: the host's ICMP redirect about a flow, by which client or server would go past the gateway.
    IcmpRedirect = "icmp_redirect",
    /// Dropped: a leg's packet that names no interface, or that there is no route for.
    Undeliverable = "undeliverable",

    /// Passed: neither IPv4 nor IPv6.
    NotIp = "not_ip",
    /// Passed: a tagged frame on a VLAN's parent; it comes again on the VLAN's own device.
    Vlan = "vlan",
    /// Passed: neither TCP nor an ICMP error about TCP.
    NotTcp = "not_tcp",
    /// Passed: a fragment without ports whose packet's first fragment was not a leg's, or has not come before it.
    Fragment = "fragment",
    /// Passed: a source route with segments left, so the destination is not the server.
    SourceRoute = "source_route",
    /// Passed: signed with a key that only the two ends have (TCP-MD5, TCP-AO).
    TcpAuth = "tcp_auth",
    /// Passed: joins a connection of several paths (MP_JOIN of RFC 8684) that is the two ends' own.
    MpJoin = "mp_join",
    /// Passed: truncated or inconsistent headers.
    Malformed = "malformed",
    /// Passed: a segment of a connection that is not pepsal's.
    NoFlow = "no_flow",
    /// Passed: a SYN on an interface that is not intercepted.
    NotIntercepted = "not_intercepted",
    /// Passed: a SYN that was sent to another host's link-layer address.
    OtherHost = "other_host",
    /// Passed: a SYN from a link-local address, which no router forwards.
    LinkLocal = "link_local",
    /// Passed: a SYN with a TTL or hop limit of 1.
    TtlExceeded = "ttl_exceeded",
    /// Passed: a SYN whose server is about to open the same connection from its side.
    SimultaneousOpen = "simultaneous_open",
    /// Passed: a SYN that the selection rules exclude.
    NotSelected = "not_selected",
    /// Passed: a SYN that the gateway would not forward: to one of its own addresses, or to where it has no route.
    NotForwarded = "not_forwarded",
    /// Passed: no listener, so no daemon.
    NoListener = "no_listener",
    /// Passed: one of pepsal's devices is missing.
    NoDevice = "no_device",
    /// Passed: the daemon's heartbeat is too old.
    HeartbeatExpired = "heartbeat_expired",
    /// Passed: as many flows as allowed are open.
    LimitReached = "limit_reached",
    /// Passed: as many flows of this subscriber as allowed are open.
    ClientLimitReached = "client_limit_reached",
    /// Passed: the record could not be stored.
    RecordFailed = "record_failed",
    /// Passed: `sk_lookup` found a flow but could not give it to the listener.
    AssignFailed = "assign_failed",
}

#[cfg(feature = "user")]
mod pod {
    // SAFETY: `repr(C)`, no references, every padding byte is a field, every bit pattern is valid.
    unsafe impl aya::Pod for super::FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::SynHead {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::ExtensionHeaders {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PrefixKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::Interface {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::subscriber::Slot {}
}
