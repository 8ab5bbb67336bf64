//! Ways of packets: interfaces of every kind, packet sizes, errors from routers, clients and servers side by side.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use pepsal_tests::{
    Bed, Cancel, Connector, Daemon, Family, LAN, Namespace, PATIENCE, Server, Session, Topology, counters,
    eventually, splits,
};

/// Enough for many segments of every size.
const BYTES: u64 = 2_000_000;

const PACKET_SIZES: [u32; 3] = [1280, 1500, 9000];

#[test]
fn packets_of_every_size_pass_in_every_mixture() -> Result<()> {
    let bed = Bed::start(LAN)?;
    let topology = &bed.topology;
    for lan in PACKET_SIZES {
        for sat in PACKET_SIZES {
            // The daemon follows, while it runs.
            set_mtu(topology, lan, sat)?;
            for family in Family::BOTH {
                splits(&topology.client, bed.server.address(family), BYTES)
                    .with_context(|| format!("{lan} bytes towards the client, {sat} towards the server"))?;
            }
        }
    }
    for end in [&topology.client, &topology.server] {
        assert_eq!(
            fragments_and_errors(end)?,
            0,
            "no end sends what the way does not take"
        );
    }
    Ok(())
}

#[test]
fn packet_size_may_change_while_flows_are_open() -> Result<()> {
    let bed = Bed::start(LAN)?;
    for family in Family::BOTH {
        let (connector, address) = (Connector::default(), bed.server.address(family));
        let session = Session::open(&connector, &bed.topology.client, address, &Cancel::default())?;
        for (lan, sat) in [
            (1500, 1500),
            (1300, 1500),
            (1500, 1300),
            (9000, 9000),
            (1280, 1280),
            (1500, 1500),
        ] {
            set_mtu(&bed.topology, lan, sat)?;
            let (_, is_intact) = session
                .download(BYTES, 1)
                .with_context(|| format!("{family:?} {lan} {sat}"))?;
            assert!(is_intact, "{family:?} {lan} {sat}");
        }
    }
    Ok(())
}

#[test]
fn path_mtu_discovery_reaches_the_client_leg() -> Result<()> {
    // The clients are on the far side of the router, for once.
    let bed = Bed::on(Topology::builder().path_mtu(1400).build()?, &["-i", "sat0"])?;
    let inside = Server::start(&bed.topology.client)?;
    for family in Family::BOTH {
        let address = SocketAddr::new(family.client(), inside.port());
        splits(&bed.topology.server, address, BYTES)?;
    }
    Ok(())
}

/// A topology whose client and another host are on one switch with the gateway's `lan0`, in subnets of their own.
struct Hairpin {
    topology: Topology,
    _switch: Namespace,
    neighbour: Namespace,
}

impl Hairpin {
    fn new() -> Result<Self> {
        let topology = Topology::new()?;
        let switch = Namespace::new("switch")?;
        let neighbour = Namespace::new("neighbour")?;
        for setting in ["all", "default"] {
            neighbour.sysctl(&format!("net.ipv6.conf.{setting}.accept_dad"), 0)?;
        }
        switch.ip("link add br0 type bridge\nlink set br0 up")?;
        topology.gateway.ip("link delete lan0")?;
        for (port, host, device) in [
            ("gateway", &topology.gateway, "lan0"),
            ("client", &topology.client, "eth0"),
            ("neighbour", &neighbour, "eth0"),
        ] {
            switch.ip(format!(
                "link add {port} type veth peer name {device} netns {}
                 link set {port} master br0 up",
                host.path().display()
            ))?;
        }
        topology.gateway.ip("link set lan0 up
             address add 10.1.0.1/24 dev lan0
             address add 10.5.0.1/24 dev lan0
             address add fd01::1/64 dev lan0 nodad
             address add fd05::1/64 dev lan0 nodad")?;
        for (host, net) in [(&topology.client, 1), (&neighbour, 5)] {
            host.ip(format!(
                "link set eth0 up
                 address add 10.{net}.0.2/24 dev eth0
                 address add fd0{net}::2/64 dev eth0 nodad
                 route add default via 10.{net}.0.1
                 route add default via fd0{net}::1"
            ))?;
        }
        Ok(Self {
            topology,
            _switch: switch,
            neighbour,
        })
    }
}

#[test]
fn client_and_server_may_be_behind_one_interface() -> Result<()> {
    let hairpin = Hairpin::new()?;
    let server = Server::start(&hairpin.neighbour)?;
    let addresses: [IpAddr; 2] = ["10.5.0.2".parse()?, "fd05::2".parse()?];
    let _daemon = Daemon::start(&hairpin.topology.gateway, LAN)?;
    for address in addresses {
        splits(&hairpin.topology.client, (address, server.port()).into(), BYTES)?;
    }
    Ok(())
}

#[test]
fn clients_behind_a_bridge_of_the_gateway_are_served() -> Result<()> {
    let topology = Topology::new()?;
    topology.gateway.ip("link add br0 type bridge
         link set lan0 master br0
         address flush dev lan0
         link set br0 up
         address add 10.1.0.1/24 dev br0
         address add fd01::1/64 dev br0 nodad")?;
    let bed = Bed::on(topology, &["-i", "br0"])?;
    for family in Family::BOTH {
        eventually(PATIENCE, || bed.probe(family).is_ok());
        splits(&bed.topology.client, bed.server.address(family), BYTES)?;
    }
    Ok(())
}

fn set_mtu(topology: &Topology, lan: u32, sat: u32) -> Result<()> {
    topology.client.ip(format!("link set eth0 mtu {lan}"))?;
    topology
        .gateway
        .ip(format!("link set lan0 mtu {lan}\nlink set sat0 mtu {sat}"))?;
    topology.server.ip(format!("link set eth0 mtu {sat}"))
}

/// How often a host has reassembled a packet or was told of one that is too big, from its counters.
fn fragments_and_errors(namespace: &Namespace) -> Result<u64> {
    let counters = counters(namespace)?;
    let names = [
        "IpReasmReqds",
        "Ip6ReasmReqds",
        "IpFragCreates",
        "Ip6FragCreates",
        "IcmpInDestUnreachs",
        "Icmp6InPktTooBigs",
    ];
    Ok(names.iter().map(|name| counters[*name]).sum())
}
