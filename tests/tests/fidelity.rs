//! What of the client the server gets to see, and what each leg's socket is given.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pepsal_tests::{
    Accepted, Connector, Daemon, Family, Listener, Namespace, Outcome, SavedSyn, Server, Topology, Transfer,
};
use socket2::{Domain, Protocol, Socket, Type};

const INTERFACES: [&str; 4] = ["-i", "lan0", "-i", "sat0"];
/// How long a busy machine may take for what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn server_sees_the_clients_address_and_port() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let outcome = bed.exchange(family, &Connector::default())?;
        assert_eq!(
            (outcome.peer, outcome.syn.source()),
            (outcome.local, family.client())
        );
    }
    Ok(())
}

#[test]
fn server_sees_the_gateway_when_asked_to() -> Result<()> {
    let bed = Bed::start(&["--source", "gateway"])?;
    for family in Family::BOTH {
        let outcome = bed.exchange(family, &Connector::default())?;
        assert_eq!(outcome.peer.ip(), family.server_next_hop());
    }
    Ok(())
}

#[test]
fn ports_of_every_kind_are_kept() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        // Bound to every address, such a service claims the port for the client's address, too.
        let service = Listener::bind_any(&bed.topology.gateway, family.server())?;
        for (port, kind) in [
            (7, "privileged"),
            (5000, "pepsal's own"),
            (service.port(), "a service's"),
        ] {
            let outcome = bed.exchange(family, &from_port(family, port))?;
            assert_eq!(outcome.peer, SocketAddr::new(family.client(), port), "{kind}");
        }
    }
    Ok(())
}

#[test]
fn service_on_the_gateway_survives_a_client_that_has_its_port() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let service = Listener::bind_any(&bed.topology.gateway, family.server())?;
        bed.exchange(family, &from_port(family, service.port()))?;
        let address = SocketAddr::new(family.gateway(), service.port());
        let client = Connector::default().connect(&bed.topology.client, address)?;
        assert_eq!(service.accept(PATIENCE)?.peer, client.local_addr()?);
    }
    Ok(())
}

#[test]
fn one_port_serves_two_connections_at_once() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let listeners = [(); 2].map(|()| Listener::bind_any(&bed.topology.server, family.server()));
        let mut flows = Vec::new();
        for listener in listeners {
            flows.push(bed.connect(family, &listener?, &from_port(family, 4321))?);
        }
        for (mark, (client, server)) in (0..).zip(&mut flows) {
            assert_eq!(server.peer_addr()?, client.local_addr()?);
            client.write_all(&[mark])?;
        }
        for (mark, (_, server)) in (0..).zip(&mut flows) {
            let mut read = [0];
            server.read_exact(&mut read)?;
            assert_eq!(read, [mark], "{family:?}");
        }
    }
    Ok(())
}

#[test]
fn port_is_free_again_at_once_when_the_server_closes_first() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        // TIME_WAIT then is at the gateway for the client leg, and at the server.
        for round in 0..20 {
            let (mut client, server) = bed
                .reconnect(family, &listener)
                .with_context(|| format!("{family:?} round {round}"))?;
            drop(server);
            assert_eq!(client.read(&mut [0])?, 0, "{family:?} round {round}");
        }
    }
    Ok(())
}

#[test]
fn port_is_free_again_at_once_when_the_client_closes_first() -> Result<()> {
    let bed = Bed::start(&[])?;
    // Clients behind a translator use ports again long before the gateway's TIME_WAIT is over.
    bed.topology.client.sysctl("net.ipv4.tcp_tw_reuse", 1)?;
    bed.topology.client.sysctl("net.ipv4.tcp_tw_reuse_delay", 1)?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        for round in 0..20 {
            let (client, mut server) = bed
                .reconnect(family, &listener)
                .with_context(|| format!("{family:?} round {round}"))?;
            drop(client);
            assert_eq!(server.read(&mut [0])?, 0, "{family:?} round {round}");
        }
    }
    Ok(())
}

#[test]
fn syn_keeps_its_dscp() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        for dscp in [0, 1, 10, 34, 46, 63] {
            let syn = bed.exchange(family, &with_dscp(dscp))?.syn;
            assert_eq!(syn.traffic_class(), dscp << 2, "{family:?}");
        }
    }
    Ok(())
}

#[test]
fn ecn_bits_of_the_syn_stay_behind() -> Result<()> {
    let bed = Bed::start(&[])?;
    let syn = bed.handmade(0x48 | 3, &[])?;
    assert_eq!(syn.traffic_class(), 0x48);
    Ok(())
}

#[test]
fn data_to_the_client_has_its_dscp() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let packets = capture(&bed.topology.client, family)?;
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        let (mut client, mut server) = bed.connect(family, &listener, &with_dscp(46))?;
        server.write_all(b"banner")?;
        client.read_exact(&mut [0; 6])?;
        let data = next_packet(&packets, |packet| packet.ends_with(b"banner"))?;
        assert_eq!(SavedSyn::parse(data)?.dscp(), 46, "{family:?}");
    }
    Ok(())
}

/// IPv4 options that no router changes on the way.
const STABLE_OPTIONS: [(&str, &[u8]); 5] = [
    ("no operation", &[1, 1, 1, 1]),
    ("router alert", &[148, 4, 0, 0]),
    ("security", &[130, 11, 0, 1, 0, 2, 0, 3, 0, 0, 4, 0]),
    ("stream identifier", &[136, 4, 0, 9]),
    ("several", &[1, 148, 4, 0, 0, 136, 4, 0, 9, 0, 0, 0]),
];

#[test]
fn ipv4_options_reach_the_server() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (name, options) in STABLE_OPTIONS {
        let connector = Connector {
            ip_options: options.into(),
            ..Connector::default()
        };
        let syn = bed.exchange(Family::V4, &connector)?.syn;
        assert_eq!(syn.ip_options(), options, "{name}");
    }
    Ok(())
}

#[test]
fn record_route_and_timestamp_reach_the_server() -> Result<()> {
    let bed = Bed::start(&[])?;
    let record_route = [&[7, 39, 4][..], &[0; 37]].concat();
    let timestamp = [&[68, 36, 5, 0][..], &[0; 32]].concat();
    for options in [record_route, timestamp] {
        let connector = Connector {
            ip_options: options.clone(),
            ..Connector::default()
        };
        let syn = bed.exchange(Family::V4, &connector)?.syn;
        assert_eq!(syn.ip_options()[..2], options[..2]);
        assert!(
            syn.ip_options()[2] > options[2],
            "the way so far is in it: {:?}",
            syn.ip_options()
        );
    }
    Ok(())
}

#[test]
fn record_route_begins_at_the_client() -> Result<()> {
    let bed = Bed::start(&[])?;
    let options = [&[7, 39, 4][..], &[0; 37]].concat();
    let syn = bed
        .exchange(
            Family::V4,
            &Connector {
                ip_options: options,
                ..Connector::default()
            },
        )?
        .syn;
    let first: [u8; 4] = syn.ip_options()[3..7].try_into()?;
    assert_eq!(IpAddr::from(first), Family::V4.client(), "{:?}", syn.ip_options());
    Ok(())
}

/// A loose source route at its end, as it arrives from its last hop but the server, and a router alert.
const ROUTED: [u8; 12] = [131, 7, 8, 10, 1, 0, 77, 1, 148, 4, 0, 0];

#[test]
fn source_route_is_left_out() -> Result<()> {
    let bed = Bed::on(accept_source_routes(Topology::new()?)?, &[])?;
    let syn = bed.handmade(0, &ROUTED)?;
    assert_eq!(syn.ip_options(), [1, 148, 4, 0, 0, 0, 0, 0]);
    Ok(())
}

#[test]
fn source_route_that_the_kernel_refuses_takes_no_other_option_with_it() -> Result<()> {
    let bed = Bed::on(
        accept_source_routes(Topology::new()?)?,
        &["--replicate", "source-route"],
    )?;
    let syn = bed.handmade(0, &ROUTED)?;
    assert_eq!(syn.ip_options(), [1, 148, 4, 0, 0, 0, 0, 0]);
    Ok(())
}

const HOP_BY_HOP: u8 = 0;
const DESTINATION: u8 = 60;
/// Router alert (RFC 2711) with its padding.
const ALERT: [u8; 8] = [0, 0, 5, 2, 0, 0, 1, 0];
/// An experimental option (RFC 4727) that is skipped where it is not known.
const EXPERIMENT: [u8; 16] = [0, 1, 0x1e, 12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

#[test]
fn ipv6_options_reach_the_server() -> Result<()> {
    let bed = Bed::start(&[])?;
    let none = Connector::default();
    for connector in [
        Connector {
            hop_by_hop: ALERT.into(),
            ..none.clone()
        },
        Connector {
            destination_options: EXPERIMENT.into(),
            ..none.clone()
        },
        Connector {
            hop_by_hop: ALERT.into(),
            destination_options: EXPERIMENT.into(),
            ..none.clone()
        },
        none,
    ] {
        let syn = bed.exchange(Family::V6, &connector)?.syn;
        for (kind, sent) in [
            (HOP_BY_HOP, &connector.hop_by_hop),
            (DESTINATION, &connector.destination_options),
        ] {
            let seen = syn.extension_header(kind).map(|header| &header[1..]);
            assert_eq!(seen, sent.get(1..), "header {kind}");
        }
    }
    Ok(())
}

#[test]
fn only_what_is_asked_for_is_replicated() -> Result<()> {
    for (what, has_dscp, has_options) in [
        ("none", false, false),
        ("dscp", true, false),
        ("options", false, true),
        ("dscp,options", true, true),
    ] {
        let bed = Bed::start(&["--replicate", what])?;
        let v4 = Connector {
            ip_options: vec![148, 4, 0, 0],
            ..with_dscp(46)
        };
        let v6 = Connector {
            hop_by_hop: ALERT.into(),
            ..with_dscp(46)
        };
        let (v4, v6) = (
            bed.exchange(Family::V4, &v4)?.syn,
            bed.exchange(Family::V6, &v6)?.syn,
        );
        assert_eq!([v4.dscp() == 46, v6.dscp() == 46], [has_dscp; 2], "{what}");
        let options = [
            !v4.ip_options().is_empty(),
            v6.extension_header(HOP_BY_HOP).is_some(),
        ];
        assert_eq!(options, [has_options; 2], "{what}");
    }
    Ok(())
}

#[test]
fn time_to_live_goes_on_when_asked_for() -> Result<()> {
    let topology = Topology::new()?;
    topology.client.sysctl("net.ipv4.ip_default_ttl", 37)?;
    topology.client.sysctl("net.ipv6.conf.eth0.hop_limit", 37)?;
    let daemon = Daemon::start(
        &topology.gateway,
        &[&INTERFACES[..], &["--replicate", "ttl"]].concat(),
    )?;
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        let outcome = Transfer::upload(1).run(&topology.client, server.address(family))?;
        assert_eq!(outcome.syn.ttl(), 36, "{family:?}");
    }
    // Forwarding alone would show the same.
    assert!(daemon.terminate()?.log.contains("accepted=2"));
    Ok(())
}

#[test]
fn segment_size_is_capped_on_both_legs() -> Result<()> {
    let bed = Bed::start(&["-m", "700"])?;
    for family in Family::BOTH {
        let packets = capture(&bed.topology.client, family)?;
        let syn = bed.exchange(family, &Connector::default())?.syn;
        assert_eq!(maximum_segment_size(&syn), Some(700), "{family:?} to the server");
        let answer = next_packet(&packets, |packet| {
            SavedSyn::parse(packet.into()).is_ok_and(|segment| segment.tcp_header()[13] & 0x12 == 0x12)
        })?;
        assert_eq!(
            maximum_segment_size(&SavedSyn::parse(answer)?),
            Some(700),
            "{family:?} to the client"
        );
    }
    Ok(())
}

#[test]
fn each_leg_has_the_congestion_control_it_is_given() -> Result<()> {
    for (arguments, client_leg, server_leg) in [
        (&["-C", "reno"][..], "reno", "reno"),
        (
            &["--client-congestion", "reno", "--server-congestion", "cubic"],
            "reno",
            "cubic",
        ),
        (&["-C", "reno", "--server-congestion", "cubic"], "reno", "cubic"),
        (&["-C", "cubic", "--client-congestion", "reno"], "reno", "cubic"),
    ] {
        let bed = Bed::start(arguments)?;
        for family in Family::BOTH {
            let listener = Listener::bind_any(&bed.topology.server, family.server())?;
            let _flow = bed.connect(family, &listener, &Connector::default())?;
            for (local, wanted) in [(family.server(), client_leg), (family.client(), server_leg)] {
                let shown = sockets(&bed.daemon, local)?;
                let words: Vec<&str> = shown.split_ascii_whitespace().collect();
                assert!(words.contains(&wanted), "{arguments:?} from {local}: {shown}");
            }
        }
    }
    Ok(())
}

#[test]
fn socket_options_do_not_harm_transfers() -> Result<()> {
    for arguments in [
        &["-n"][..],
        &["-q"],
        &["-k"],
        &["-n", "-q"],
        &["-f"],
        &["-m", "88"],
    ] {
        let bed = Bed::start(arguments)?;
        for family in Family::BOTH {
            for transfer in [Transfer::upload(1 << 20), Transfer::download(1 << 20)] {
                let outcome = transfer.run(&bed.topology.client, bed.server.address(family))?;
                assert!(outcome.intact, "{arguments:?} {transfer:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn data_in_the_syn_reaches_the_server() -> Result<()> {
    let bed = Bed::start_fastopen()?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        let address = SocketAddr::new(family.server(), listener.port());
        // The first connection gets the client its cookie from the gateway, and the gateway its own from the server.
        for round in 0..3 {
            let (mut client, accepted) = fastopen(&bed, &listener, address)?;
            let mut server = accepted.stream;
            let mut request = [0; 7];
            server.read_exact(&mut request)?;
            assert_eq!(&request, b"request", "{family:?} round {round}");
            server.write_all(b"answer")?;
            client.read_exact(&mut [0; 6])?;
        }
    }
    let [_, server_legs] = bed.daemon.namespaces()?;
    for namespace in [&bed.topology.client, &server_legs] {
        // Of three connections in each family.
        assert_eq!(fastopens(namespace)?, 4, "{namespace:?}");
    }
    Ok(())
}

#[test]
fn server_may_speak_first_with_fast_open() -> Result<()> {
    let bed = Bed::start_fastopen()?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        let address = SocketAddr::new(family.server(), listener.port());
        // With the server's cookie at hand, a SYN could wait for data that the client does not send.
        for _ in 0..2 {
            let (_client, accepted) = fastopen(&bed, &listener, address)?;
            drop(accepted);
        }
        let (mut client, mut server) = bed.connect(family, &listener, &Connector::default())?;
        server.write_all(b"220 ready")?;
        let mut greeting = [0; 9];
        client.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"220 ready", "{family:?}");
    }
    Ok(())
}

#[test]
fn refusal_of_a_fast_open_is_a_reset() -> Result<()> {
    let bed = Bed::start_fastopen()?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        let address = SocketAddr::new(family.server(), listener.port());
        for _ in 0..2 {
            fastopen(&bed, &listener, address)?;
        }
        drop(listener);
        let mut client = fastopen_connect(&bed, address)?;
        let error = client.read(&mut [0]).expect_err("nobody listens any more");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
    }
    Ok(())
}

/// A gateway with a daemon on it, between client and server.
struct Bed {
    daemon: Daemon,
    server: Server,
    topology: Topology,
}

impl Bed {
    fn start(arguments: &[&str]) -> Result<Self> {
        Self::on(Topology::new()?, arguments)
    }

    /// With `-f`, and fast open on for both sides of every host.
    fn start_fastopen() -> Result<Self> {
        /// Client, server, and every listener without asking for it.
        const EVERYBODY: u32 = 0x1 | 0x2 | 0x400;
        let topology = Topology::new()?;
        for (namespace, value) in [
            (&topology.client, 3),
            (&topology.gateway, 3),
            (&topology.server, EVERYBODY),
        ] {
            namespace.sysctl("net.ipv4.tcp_fastopen", value)?;
        }
        Self::on(topology, &["-f"])
    }

    fn on(topology: Topology, arguments: &[&str]) -> Result<Self> {
        let server = Server::start(&topology.server)?;
        let daemon = Daemon::start(&topology.gateway, &[&INTERFACES, arguments].concat())?;
        Ok(Self {
            daemon,
            server,
            topology,
        })
    }

    /// A byte up and a report down.
    fn exchange(&self, family: Family, connector: &Connector) -> Result<Outcome> {
        let transfer = Transfer::upload(1).connector(connector.clone());
        let outcome = transfer.run(&self.topology.client, self.server.address(family))?;
        ensure_intercepted(&outcome.syn)?;
        Ok(outcome)
    }

    /// The client's end, then the server's.
    fn connect(
        &self,
        family: Family,
        listener: &Listener,
        connector: &Connector,
    ) -> Result<(TcpStream, TcpStream)> {
        let address = SocketAddr::new(family.server(), listener.port());
        let client = connector.connect(&self.topology.client, address)?;
        let server = listener.accept(PATIENCE)?;
        ensure_intercepted(&server.syn)?;
        Ok((client, server.stream))
    }

    /// Connects from the same port time and again, as soon as the client's own kernel lets go of it.
    fn reconnect(&self, family: Family, listener: &Listener) -> Result<(TcpStream, TcpStream)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.connect(family, listener, &from_port(family, 4321)) {
                Err(error) if is_address_not_available(&error) && Instant::now() < deadline => {}
                connected => return connected,
            }
        }
    }

    /// Shakes hands as a client that no kernel keeps from what it wants, at an IPv4 address of its own, and returns the
    /// SYN that the server got.
    fn handmade(&self, traffic_class: u8, options: &[u8]) -> Result<SavedSyn> {
        const CLIENT: (Ipv4Addr, u16) = (Ipv4Addr::new(10, 1, 0, 77), 1234);
        const MAC: &str = "02:00:00:00:00:77";
        let IpAddr::V4(server_ip) = Family::V4.server() else {
            unreachable!("V4 is IPv4")
        };
        let topology = &self.topology;
        let listener = Listener::bind_any(&topology.server, server_ip.into())?;
        let server = (server_ip, listener.port());
        // Nobody answers ARP for the address, and nobody resets what comes for it.
        topology.client.ip(format!("link set eth0 address {MAC}"))?;
        topology
            .gateway
            .ip(format!("neighbour replace {} lladdr {MAC} dev lan0", CLIENT.0))?;
        let packets = capture(&topology.client, Family::V4)?;
        let raw = topology
            .client
            .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))))?;
        let send = |flags, sequence, acknowledged| {
            let packet = segment(
                CLIENT,
                server,
                (traffic_class, options),
                (flags, sequence, acknowledged),
            );
            raw.send_to(&packet, &SocketAddr::from((server.0, 0)).into())
        };
        send(SYN, 1000, 0)?;
        let answer = next_packet(&packets, |packet| packet[16..20] == CLIENT.0.octets())?;
        let answer = SavedSyn::parse(answer)?;
        let theirs = u32::from_be_bytes(answer.tcp_header()[4..8].try_into()?);
        send(ACK, 1001, theirs.wrapping_add(1))?;
        let accepted = listener.accept(PATIENCE)?;
        ensure_intercepted(&accepted.syn)?;
        Ok(accepted.syn)
    }
}

/// A forwarded SYN would have one less; without this the tests would be of the kernel alone.
fn ensure_intercepted(syn: &SavedSyn) -> Result<()> {
    ensure!(syn.is_split(), "the connection was not intercepted");
    Ok(())
}

fn from_port(family: Family, port: u16) -> Connector {
    Connector {
        source: Some(SocketAddr::new(family.client(), port)),
        ..Connector::default()
    }
}

fn is_address_not_available(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::AddrNotAvailable)
}

fn with_dscp(dscp: u8) -> Connector {
    Connector {
        traffic_class: dscp << 2,
        ..Connector::default()
    }
}

/// Connects with the request in the SYN where the client has a cookie.
fn fastopen_connect(bed: &Bed, address: SocketAddr) -> Result<TcpStream> {
    const MSG_FASTOPEN: i32 = 0x2000_0000;
    let domain = Domain::for_address(address);
    let socket = bed
        .topology
        .client
        .run(|| Socket::new(domain, Type::STREAM, None))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send_to_with_flags(b"request", &address.into(), MSG_FASTOPEN)?;
    Ok(socket.into())
}

fn fastopen(bed: &Bed, listener: &Listener, address: SocketAddr) -> Result<(TcpStream, Accepted)> {
    let client = fastopen_connect(bed, address)?;
    let accepted = listener.accept(PATIENCE)?;
    ensure_intercepted(&accepted.syn)?;
    Ok((client, accepted))
}

/// How many connections from the namespace had data in a SYN that was acknowledged.
fn fastopens(namespace: &Namespace) -> Result<u64> {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/netstat"))?;
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("TcpExt: "));
    let (names, values) = lines.next().zip(lines.next()).context("two lines")?;
    let mut columns = names.split(' ').zip(values.split(' '));
    let (_, value) = columns
        .find(|(name, _)| *name == "TCPFastOpenActive")
        .context("the counter")?;
    Ok(value.parse()?)
}

/// What `ss` has to say of the connections from `local`.
fn sockets(daemon: &Daemon, local: IpAddr) -> Result<String> {
    let local = match local {
        IpAddr::V4(local) => local.to_string(),
        IpAddr::V6(local) => format!("[{local}]"),
    };
    let mut shown = String::new();
    for namespace in daemon.namespaces()? {
        let mut ss = namespace.command("ss");
        let output = ss
            .args(["-tin", "state", "established", "src", &local])
            .output()?;
        ensure!(
            output.status.success(),
            "ss: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        shown.push_str(&String::from_utf8(output.stdout)?);
    }
    Ok(shown)
}

/// The IP packets that arrive in the namespace from now on.
fn capture(namespace: &Namespace, family: Family) -> Result<Socket> {
    let ethertype: u16 = match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    };
    let protocol = Protocol::from(i32::from(ethertype.to_be()));
    let packets = namespace.run(|| Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)))?;
    packets.set_read_timeout(Some(PATIENCE))?;
    Ok(packets)
}

fn next_packet(mut packets: &Socket, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
    let mut packet = vec![0; 1 << 16];
    loop {
        let len = packets.read(&mut packet).context("no such packet")?;
        if wanted(&packet[..len]) {
            packet.truncate(len);
            return Ok(packet);
        }
    }
}

const MAXIMUM_SEGMENT_SIZE: u8 = 2;

/// The value of a TCP option.
fn tcp_option(segment: &SavedSyn, wanted: u8) -> Option<&[u8]> {
    let header = segment.tcp_header();
    let mut options = header.get(20..usize::from(header[12] >> 4) * 4)?;
    loop {
        match options {
            [] | [0, ..] => return None,
            [1, rest @ ..] => options = rest,
            [kind, len, ..] => {
                let (option, rest) = options.split_at_checked((*len).into())?;
                if *kind == wanted {
                    return option.get(2..);
                }
                options = rest;
            }
            [_] => return None,
        }
    }
}

fn maximum_segment_size(syn: &SavedSyn) -> Option<u16> {
    Some(u16::from_be_bytes(
        tcp_option(syn, MAXIMUM_SEGMENT_SIZE)?.try_into().ok()?,
    ))
}

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// A TCP segment without data in an IPv4 packet, whose own checksum the kernel fills in.
fn segment(
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    ip: (u8, &[u8]),
    (flags, sequence, acknowledged): (u8, u32, u32),
) -> Vec<u8> {
    let (traffic_class, options) = ip;
    let mut tcp = Vec::new();
    tcp.extend(source.1.to_be_bytes());
    tcp.extend(destination.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [
        &source.0.octets()[..],
        &destination.0.octets(),
        &[0, 6, 0, 20],
        &tcp,
    ]
    .concat();
    let sum: u32 = pseudo
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());

    let words = 5 + options.len() as u8 / 4;
    let mut packet = vec![4 << 4 | words, traffic_class, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(source.0.octets());
    packet.extend(destination.0.octets());
    packet.extend(options);
    packet.extend(tcp);
    packet
}

/// A host drops what is source-routed, and so does a gateway, unless told otherwise.
fn accept_source_routes(topology: Topology) -> Result<Topology> {
    for (namespace, devices) in [
        (&topology.gateway, &["all", "lan0"][..]),
        (&topology.server, &["all", "eth0"]),
    ] {
        for device in devices {
            namespace.sysctl(&format!("net.ipv4.conf.{device}.accept_source_route"), 1)?;
        }
    }
    Ok(topology)
}
