//! What of the client the server gets to see, and what each leg's socket is given.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use anyhow::{Context, Result};
use pepsal_tests::packet::{ACK, Forger, SYN, Tcp};
use pepsal_tests::{
    Bed, Capture, Connection, Connector, Family, Listener, PATIENCE, Path, SavedSyn, Segment, Side, Topology,
    Transfer, counters, eventually,
};
use socket2::{Domain, Socket, Type};

#[test]
fn server_sees_the_clients_address_and_port() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        assert_eq!(
            (flow.peer, flow.syn.source()),
            (flow.client.local_addr()?, family.client())
        );
    }
    Ok(())
}

#[test]
fn server_sees_the_gateway_when_asked_to() -> Result<()> {
    let bed = Bed::start(&["--source", "gateway"])?;
    for family in Family::BOTH {
        assert_eq!(bed.flow(family)?.peer.ip(), family.server_next_hop());
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
            let flow = bed
                .open_by(&Connector::from_port(family, port), family)?
                .split()?;
            flow.greet()?;
            assert_eq!(flow.peer, SocketAddr::new(family.client(), port), "{kind}");
        }
    }
    Ok(())
}

#[test]
fn service_on_the_gateway_survives_a_client_that_has_its_port() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let service = Listener::bind_any(&bed.topology.gateway, family.server())?;
        let connector = Connector::from_port(family, service.port());
        bed.open_by(&connector, family)?.split()?.greet()?;
        let address = service.at(family.gateway());
        let served = Connection::open(&Connector::default(), &bed.topology.client, &service, address)?;
        assert_eq!(served.peer, served.client.local_addr()?);
    }
    Ok(())
}

#[test]
fn one_port_serves_two_connections_at_once() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let connector = Connector::from_port(family, 4321);
        let flow = || bed.open_to(&connector, &bed.another_listener(family)?)?.split();
        let mut flows = [flow()?, flow()?];
        for (mark, flow) in (0..).zip(&mut flows) {
            assert_eq!(flow.peer, flow.client.local_addr()?);
            flow.client.write_all(&[mark])?;
        }
        for (mark, flow) in (0..).zip(&mut flows) {
            let mut read = [0];
            flow.server.read_exact(&mut read)?;
            assert_eq!(read, [mark], "{family:?}");
        }
    }
    Ok(())
}

#[test]
fn port_is_free_again_at_once_when_the_server_closes_first() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        // TIME_WAIT then is at the gateway for the client leg, and at the server.
        for round in 0..20 {
            let (server, mut client) = again(&bed, family, round)?.into_ends(Side::Server);
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
        for round in 0..20 {
            let (client, mut server) = again(&bed, family, round)?.into_ends(Side::Client);
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
            let syn = split_syn(&bed, family, &with_dscp(dscp))?;
            assert_eq!(syn.traffic_class(), dscp << 2, "{family:?}");
        }
    }
    Ok(())
}

#[test]
fn ecn_bits_of_the_syn_stay_behind() -> Result<()> {
    let bed = Bed::start(&[])?;
    let syn = handmade(&bed, 0x48 | 3, &[])?;
    assert_eq!(syn.traffic_class(), 0x48);
    Ok(())
}

#[test]
fn data_to_the_client_has_its_dscp() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let capture = Capture::start(&bed.topology.client, "eth0")?;
        let mut flow = bed.open_by(&with_dscp(46), family)?.split()?;
        flow.server.write_all(b"banner")?;
        flow.client.read_exact(&mut [0; 6])?;
        let banner = seen(&capture, |segment| segment.payload_len == b"banner".len())?;
        assert_eq!(banner.traffic_class >> 2, 46, "{family:?}");
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
        let syn = split_syn(&bed, Family::V4, &connector)?;
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
        let syn = split_syn(&bed, Family::V4, &connector)?;
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
    let connector = Connector {
        ip_options: options,
        ..Connector::default()
    };
    let syn = split_syn(&bed, Family::V4, &connector)?;
    let first: [u8; 4] = syn.ip_options()[3..7].try_into()?;
    assert_eq!(IpAddr::from(first), Family::V4.client(), "{:?}", syn.ip_options());
    Ok(())
}

/// A loose source route at its end, as it arrives from its last hop but the server, and a router alert.
const ROUTED: [u8; 12] = [131, 7, 8, 10, 1, 0, 77, 1, 148, 4, 0, 0];

#[test]
fn source_route_is_left_out() -> Result<()> {
    let bed = Bed::on(accept_source_routes(Topology::new()?)?, &[])?;
    let syn = handmade(&bed, 0, &ROUTED)?;
    assert_eq!(syn.ip_options(), [1, 148, 4, 0, 0, 0, 0, 0]);
    Ok(())
}

#[test]
fn source_route_that_the_kernel_refuses_takes_no_other_option_with_it() -> Result<()> {
    let bed = Bed::on(
        accept_source_routes(Topology::new()?)?,
        &["--replicate", "source-route"],
    )?;
    let syn = handmade(&bed, 0, &ROUTED)?;
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
        let syn = split_syn(&bed, Family::V6, &connector)?;
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
            split_syn(&bed, Family::V4, &v4)?,
            split_syn(&bed, Family::V6, &v6)?,
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
    let bed = Bed::on(topology, &["--replicate", "ttl"])?;
    for family in Family::BOTH {
        let connection = bed.open(family)?;
        connection.greet()?;
        assert_eq!(connection.syn.ttl(), 36, "{family:?}");
    }
    // Forwarding alone would show the same.
    assert_eq!(bed.daemon.terminate()?.counter("accepted"), 2);
    Ok(())
}

#[test]
fn segment_size_is_capped_on_both_legs() -> Result<()> {
    let bed = Bed::start(&["-m", "700"])?;
    for family in Family::BOTH {
        let capture = Capture::start(&bed.topology.client, "eth0")?;
        let syn = bed.flow(family)?.syn.segment();
        assert_eq!(syn.mss, Some(700), "{family:?} to the server");
        let answer = seen(&capture, Segment::is_syn_ack)?;
        assert_eq!(answer.mss, Some(700), "{family:?} to the client");
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
            let flow = bed.flow(family)?;
            for (side, wanted) in [(Side::Client, client_leg), (Side::Server, server_leg)] {
                let leg = bed.leg(&flow, side)?.context("it is there")?;
                assert_eq!(leg.congestion, wanted, "{arguments:?} {side:?}");
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
    let bed = start_fastopen()?;
    for family in Family::BOTH {
        let listener = bed.another_listener(family)?;
        // The first connection gets the client its cookie from the gateway, and the gateway its own from the server.
        for round in 0..3 {
            let mut flow = fastopen(&bed, &listener)?;
            let mut request = [0; 7];
            flow.server.read_exact(&mut request)?;
            assert_eq!(&request, b"request", "{family:?} round {round}");
            flow.server.write_all(b"answer")?;
            flow.client.read_exact(&mut [0; 6])?;
        }
    }
    let [_, server_legs] = bed.daemon.namespaces()?;
    for namespace in [&bed.topology.client, &server_legs] {
        // Those with data in a SYN that was acknowledged, of three in each family.
        assert_eq!(
            counters(namespace)?["TcpExtTCPFastOpenActive"],
            4,
            "{namespace:?}"
        );
    }
    Ok(())
}

#[test]
fn server_may_speak_first_with_fast_open() -> Result<()> {
    let bed = start_fastopen()?;
    for family in Family::BOTH {
        let listener = bed.another_listener(family)?;
        // With the server's cookie at hand, a SYN could wait for data that the client does not send.
        for _ in 0..2 {
            drop(fastopen(&bed, &listener)?.server);
        }
        let mut flow = bed.open_to(&Connector::default(), &listener)?.split()?;
        flow.server.write_all(b"220 ready")?;
        let mut greeting = [0; 9];
        flow.client.read_exact(&mut greeting)?;
        assert_eq!(&greeting, b"220 ready", "{family:?}");
    }
    Ok(())
}

#[test]
fn refusal_of_a_fast_open_is_a_reset() -> Result<()> {
    let bed = start_fastopen()?;
    for family in Family::BOTH {
        let listener = bed.another_listener(family)?;
        let address = listener.at(family.server());
        for _ in 0..2 {
            fastopen(&bed, &listener)?;
        }
        drop(listener);
        let mut client = fastopen_connect(&bed, address)?;
        let error = client.read(&mut [0]).expect_err("nobody listens any more");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
    }
    Ok(())
}

/// With `-f`, and fast open on for both sides of every host.
fn start_fastopen() -> Result<Bed> {
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
    Bed::on(topology, &["-f"])
}

/// The SYN of a flow that works, as the server got it.
fn split_syn(bed: &Bed, family: Family, connector: &Connector) -> Result<SavedSyn> {
    let flow = bed.open_by(connector, family)?.split()?;
    flow.greet()?;
    Ok(flow.syn)
}

/// A flow from the same port time and again.
fn again(bed: &Bed, family: Family, round: u32) -> Result<Connection> {
    let flow = bed.open_again(family, 4321).and_then(Connection::split);
    flow.with_context(|| format!("{family:?} round {round}"))
}

/// The first segment of that kind, once it is there.
fn seen(capture: &Capture, is_wanted: impl Fn(&Segment) -> bool) -> Result<Segment> {
    let mut seen = None;
    eventually(PATIENCE, || {
        let segments = capture.segments().expect("it can be read");
        seen = segments.into_iter().find(&is_wanted);
        seen.is_some()
    });
    seen.context("it was waited for")
}

/// Shakes hands as a client that no kernel keeps from what it wants, at an IPv4 address of its own, and returns the SYN that
/// the server got.
fn handmade(bed: &Bed, traffic_class: u8, options: &[u8]) -> Result<SavedSyn> {
    const MAC: &str = "02:00:00:00:00:77";
    let syn = Tcp {
        source: "10.1.0.77:1234".parse()?,
        destination: bed.address(Family::V4),
        traffic_class,
        ip_options: options.into(),
        sequence: 1000,
        ..Tcp::with_flags(Family::V4, SYN)
    };
    // Nobody answers ARP for the address, and nobody resets what comes for it.
    let (client, gateway) = (&bed.topology.client, &bed.topology.gateway);
    client.ip(format!("link set eth0 address {MAC}"))?;
    gateway.ip(format!(
        "neighbour replace {} lladdr {MAC} dev lan0",
        syn.source.ip()
    ))?;
    let capture = Capture::start(client, "eth0")?;
    let forger = Forger::new(client)?;
    forger.send(&syn)?;
    let answer = seen(&capture, |segment| segment.destination == syn.source)?;
    forger.send(&Tcp {
        flags: ACK,
        sequence: 1001,
        acknowledged: answer.sequence.wrapping_add(1),
        ..syn
    })?;
    let accepted = bed.listener(Family::V4).accept(PATIENCE)?;
    assert_eq!(accepted.path(), Path::Split);
    Ok(accepted.syn)
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

fn fastopen(bed: &Bed, listener: &Listener) -> Result<Connection> {
    let address = listener.at(Family::of(listener.address().ip()).server());
    Connection::new(fastopen_connect(bed, address)?, listener.accept(PATIENCE)?).split()
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
