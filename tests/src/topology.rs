//! Client, gateway and server, and the links between them.
//!
//! ```text
//! client eth0 ──── lan0 gateway sat0 ──── eth0 server                          sat0: veth, TUN, or an emulated link
//! client eth0 ──── lan0 gateway sat0 ──── sat1 router wan0 ──── eth0 server    with `router`
//! ```
//!
//! | Subnet | Hosts |
//! |---|---|
//! | 10.1.0.0/24, fd01::/64 | gateway .1, client .2, extra clients .3 and up |
//! | 10.2.0.0/24, fd02::/64 | next hop .1 (gateway, or router where there is one), server .2 |
//! | 10.3.0.0/24, fd03::/64 | gateway .1, router .2 |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use anyhow::{Result, ensure};

use crate::course::Course;
use crate::emulator::{Emulator, LinkCounters, LinkDelays, LinkProfile};
use crate::netns::Namespace;

/// An address family, with its addresses in a topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// IPv4 and IPv6.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// Returns the family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Returns the client's address.
    pub fn client(self) -> IpAddr {
        LAN.host(self, 2)
    }

    /// Returns the address of an extra client (see [`Builder::extra_clients`]), counted from 0.
    pub fn extra_client(self, index: u8) -> IpAddr {
        LAN.host(self, 3 + index)
    }

    /// Returns the gateway's address on `lan0`, the client's next hop.
    pub fn gateway(self) -> IpAddr {
        LAN.host(self, 1)
    }

    /// Returns the server's address.
    pub fn server(self) -> IpAddr {
        OUTER.host(self, 2)
    }

    /// Returns the address of the server's next hop: the gateway's on `sat0`, or the router's if there is
    /// one.
    pub fn server_next_hop(self) -> IpAddr {
        OUTER.host(self, 1)
    }
}

/// Type of the gateway's interface `sat0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Link {
    /// One end of a veth pair.
    Veth,
    /// A link with the profile's impairments: netem on a veth pair if the kernel has it, else [`Link::Tun`].
    Emulated(LinkProfile),
    /// A TUN device with the testbed's emulator; with [`LinkProfile::UNIMPAIRED`] a plain TUN device.
    Tun(LinkProfile),
}

/// Namespaces with links, and routes of both address families. Dropping it removes everything.
#[derive(Debug)]
pub struct Topology {
    // Fields drop in order: the emulator stops before the namespaces of its devices end.
    emulator: Option<Emulator>,
    /// The client; its interface is `eth0`.
    pub client: Namespace,
    /// The gateway, between `lan0` (towards the client) and `sat0` (towards the server).
    pub gateway: Namespace,
    /// The optional router, between `sat1` (towards the gateway) and `wan0` (towards the server).
    pub router: Option<Namespace>,
    /// The server; its interface is `eth0`.
    pub server: Namespace,
}

impl Topology {
    /// Creates client, gateway and server, connected by two veth pairs.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Self> {
        Self::builder().build()
    }

    /// Returns a builder of a topology.
    pub fn builder() -> Builder {
        Builder {
            link: Link::Veth,
            has_router: false,
            path_mtu: None,
            extra_clients: 0,
        }
    }

    /// Connects gateway and server by a second veth pair, whose ends are `sat2` and `eth1`. Only its own
    /// addresses are routed over it: `10.4.0.1` and `fd04::1` at the gateway, `10.4.0.2` and `fd04::2` at the
    /// server.
    ///
    /// # Errors
    /// When it exists.
    pub fn add_second_link(&self) -> Result<()> {
        veth(&self.gateway, "sat2", &self.server, "eth1")?;
        SECOND.assign(&self.gateway, "sat2", 1)?;
        SECOND.assign(&self.server, "eth1", 2)
    }

    /// Creates the link between client and gateway again, with the name `lan0`, after one of its ends was
    /// deleted.
    ///
    /// # Errors
    /// When the link exists.
    pub fn reconnect_client(&self) -> Result<()> {
        connect_client(&self.client, &self.gateway)
    }

    /// Starts a course on the emulated link and returns the time: see [`Emulator::begin`]. `None` if `sat0`
    /// is a veth or the link is netem.
    pub fn begin(&self, course: Course) -> Option<Instant> {
        self.emulator.as_ref().map(|emulator| emulator.begin(course))
    }

    /// Returns the emulator's counters; `None` if `sat0` is a veth or the link is netem.
    pub fn link_counters(&self) -> Option<LinkCounters> {
        self.emulator.as_ref().map(Emulator::counters)
    }

    /// Returns the emulator's delays; `None` if `sat0` is a veth or the link is netem.
    pub fn link_delays(&self) -> Option<LinkDelays> {
        self.emulator.as_ref().map(Emulator::delays)
    }
}

/// Builder of a [`Topology`].
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    link: Link,
    has_router: bool,
    path_mtu: Option<u16>,
    extra_clients: u8,
}

impl Builder {
    /// Sets the type of `sat0`, by default a veth.
    pub fn link(self, link: Link) -> Self {
        Self { link, ..self }
    }

    /// Adds a router between gateway and server: the far end of the satellite link.
    pub fn router(self) -> Self {
        Self {
            has_router: true,
            ..self
        }
    }

    /// Adds a router between gateway and server that sends ICMP errors for packets above `mtu` bytes, in both
    /// directions. All interfaces keep an MTU of 1500, so that no MSS reveals the path MTU.
    pub fn path_mtu(self, mtu: u16) -> Self {
        Self {
            path_mtu: Some(mtu),
            ..self.router()
        }
    }

    /// Adds `count` addresses of each family to the client's namespace: [`Family::extra_client`].
    pub fn extra_clients(self, count: u8) -> Self {
        Self {
            extra_clients: count,
            ..self
        }
    }

    /// Creates the namespaces and links.
    ///
    /// # Errors
    /// Without root, or when the kernel lacks veth or TUN.
    pub fn build(self) -> Result<Topology> {
        ensure!(
            self.extra_clients <= 250,
            "a /24 has no room for {} extra clients",
            self.extra_clients
        );
        let client = host("client")?;
        let gateway = forwarder("gateway")?;
        let router = self.has_router.then(|| forwarder("router")).transpose()?;
        let server = host("server")?;

        connect_client(&client, &gateway)?;
        for host in 3..3 + self.extra_clients {
            LAN.assign(&client, "eth0", host)?;
        }

        let emulator = if let Some(router) = &router {
            let emulator = join(&gateway, router, "sat1", self.link)?;
            TRANSIT.assign(&gateway, "sat0", 1)?;
            TRANSIT.assign(router, "sat1", 2)?;
            default_route(&gateway, TRANSIT, 2)?;
            veth(router, "wan0", &server, "eth0")?;
            OUTER.assign(router, "wan0", 1)?;
            route_lan_back(router, self.path_mtu)?;
            emulator
        } else {
            let emulator = join(&gateway, &server, "eth0", self.link)?;
            OUTER.assign(&gateway, "sat0", 1)?;
            emulator
        };
        OUTER.assign(&server, "eth0", 2)?;
        default_route(&server, OUTER, 1)?;

        Ok(Topology {
            emulator,
            client,
            gateway,
            router,
            server,
        })
    }
}

const LAN: Subnet = Subnet(1);
const OUTER: Subnet = Subnet(2);
const TRANSIT: Subnet = Subnet(3);
/// The second link between gateway and server.
const SECOND: Subnet = Subnet(4);

/// 10.N.0.0/24 and fd0N::/64.
#[derive(Clone, Copy)]
struct Subnet(u8);

impl Subnet {
    fn host(self, family: Family, host: u8) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(10, self.0, 0, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00 | u16::from(self.0), 0, 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    fn assign(self, namespace: &Namespace, device: &str, host: u8) -> Result<()> {
        namespace.ip(format!(
            "address add {}/24 dev {device}
             address add {}/64 dev {device} nodad",
            self.host(Family::V4, host),
            self.host(Family::V6, host)
        ))
    }
}

/// TTL or hop limit of gateway and router, the kernel's default.
pub const GATEWAY_HOPS: u8 = 64;
/// TTL or hop limit of hosts, to distinguish their packets from those of a gateway.
const HOST_HOPS: u8 = 128;

/// Creates the namespace of a host, with its TTL.
fn host(name: &str) -> Result<Namespace> {
    let namespace = neighbour(name)?;
    namespace.sysctl("net.ipv4.ip_default_ttl", HOST_HOPS)?;
    namespace.sysctl("net.ipv6.conf.default.hop_limit", HOST_HOPS)?;
    Ok(namespace)
}

/// Creates a namespace without duplicate address detection and without saved TCP metrics.
fn neighbour(name: &str) -> Result<Namespace> {
    let namespace = Namespace::new(name)?;
    namespace.sysctl("net.ipv6.conf.all.accept_dad", 0)?;
    namespace.sysctl("net.ipv6.conf.default.accept_dad", 0)?;
    namespace.sysctl("net.ipv4.tcp_no_metrics_save", 1)?;
    Ok(namespace)
}

fn forwarder(name: &str) -> Result<Namespace> {
    let namespace = neighbour(name)?;
    namespace.sysctl("net.ipv4.conf.all.forwarding", 1)?;
    namespace.sysctl("net.ipv6.conf.all.forwarding", 1)?;
    Ok(namespace)
}

fn connect_client(client: &Namespace, gateway: &Namespace) -> Result<()> {
    veth(client, "eth0", gateway, "lan0")?;
    LAN.assign(gateway, "lan0", 1)?;
    LAN.assign(client, "eth0", 2)?;
    default_route(client, LAN, 1)
}

fn veth(near: &Namespace, near_device: &str, far: &Namespace, far_device: &str) -> Result<()> {
    near.ip(format!(
        "link add {near_device} type veth peer name {far_device} netns {}
         link set {near_device} up",
        far.path().display()
    ))?;
    far.ip(format!("link set {far_device} up"))
}

/// Connects `sat0` in the gateway with `device` in its neighbour.
fn join(gateway: &Namespace, neighbour: &Namespace, device: &str, link: Link) -> Result<Option<Emulator>> {
    match link {
        Link::Veth => veth(gateway, "sat0", neighbour, device).map(|()| None),
        Link::Tun(profile) => Emulator::start(gateway, "sat0", neighbour, device, profile).map(Some),
        Link::Emulated(profile) => {
            if !kernel_has_netem()? {
                return join(gateway, neighbour, device, Link::Tun(profile));
            }
            veth(gateway, "sat0", neighbour, device)?;
            let up_queue_bytes = profile.up_queue_bytes.unwrap_or(profile.queue_bytes);
            let up = LinkProfile {
                queue_bytes: up_queue_bytes,
                ..profile
            };
            netem(gateway, "sat0", profile.up_bps, &up)?;
            netem(neighbour, device, profile.down_bps, &profile)?;
            Ok(None)
        }
    }
}

fn default_route(namespace: &Namespace, subnet: Subnet, host: u8) -> Result<()> {
    namespace.ip(format!(
        "route add default via {}
         route add default via {}",
        subnet.host(Family::V4, host),
        subnet.host(Family::V6, host)
    ))
}

/// Adds the route to the client's subnet and, with a path MTU, sets it on both routes of the router. Routes
/// carry the MTU, because a veth end with a smaller MTU drops larger packets of its peer. 256 is the metric
/// of the kernel's route to a subnet, which only a route with the same metric replaces.
fn route_lan_back(router: &Namespace, path_mtu: Option<u16>) -> Result<()> {
    let mtu = path_mtu.map(|mtu| format!("mtu lock {mtu}")).unwrap_or_default();
    router.ip(format!(
        "route add 10.1.0.0/24 via 10.3.0.1 {mtu}
         route add fd01::/64 via fd03::1 {mtu}
         route replace 10.2.0.0/24 dev wan0 {mtu}
         route replace fd02::/64 dev wan0 metric 256 {mtu}"
    ))
}

fn kernel_has_netem() -> Result<bool> {
    let scratch = Namespace::new("scratch")?;
    let tc = scratch
        .command("tc")
        .args("qdisc add dev lo root netem".split(' '))
        .output()?;
    Ok(tc.status.success())
}

/// Adds the kernel's emulator: packets that leave `device` are lost at random, queued up to the limit,
/// serialised and delayed. Its limit counts packets, including those in flight.
fn netem(namespace: &Namespace, device: &str, rate_bps: u64, profile: &LinkProfile) -> Result<()> {
    const PACKET_BYTES: u64 = 1500;
    let delay = profile.rtt / 2;
    let in_flight_bytes = (rate_bps as f64 / 8.0 * delay.as_secs_f64()) as u64;
    let arguments = format!(
        "qdisc add dev {device} root netem rate {rate_bps}bit delay {}us loss {}% limit {}",
        delay.as_micros(),
        profile.loss * 100.0,
        (profile.queue_bytes + in_flight_bytes) / PACKET_BYTES + 1,
    );
    // netem would lose or delay a whole GSO packet of 64 KiB at once.
    namespace.ip(format!("link set dev {device} gso_max_segs 1"))?;
    let tc = namespace.command("tc").args(arguments.split(' ')).output()?;
    ensure!(
        tc.status.success(),
        "tc {arguments}: {}",
        String::from_utf8_lossy(&tc.stderr).trim()
    );
    Ok(())
}
