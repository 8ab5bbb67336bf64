//! The testbed itself: what the other end-to-end tests rest on.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use pepsal_tests::{
    Connector, Family, Link, LinkProfile, Listener, Namespace, Path, Server, Topology, Transfer, counters,
    eventually,
};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn transfers_arrive_intact_both_ways_over_both_families() -> Result<()> {
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        for bytes in [0, 1, 65_537, 4 << 20] {
            for transfer in [Transfer::upload(bytes), Transfer::download(bytes)] {
                let outcome = transfer.run(&topology.client, server.address(family))?;
                assert!(outcome.intact, "{transfer:?}");
                assert_eq!(outcome.bytes, bytes);
                assert_eq!(outcome.peer, outcome.local, "nothing here translates addresses");
                assert_eq!(outcome.peer.ip(), family.client());
            }
        }
    }
    Ok(())
}

#[test]
fn server_sees_the_options_of_the_clients_syn() -> Result<()> {
    const ROUTER_ALERT_V4: [u8; 4] = [148, 4, 0, 0];
    const ROUTER_ALERT_V6: [u8; 8] = [0, 0, 5, 2, 0, 0, 1, 0];
    const PADDING_V6: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;

    let connector = Connector {
        traffic_class: 0x48,
        ip_options: ROUTER_ALERT_V4.into(),
        ..Connector::default()
    };
    let v4 = Transfer::upload(1)
        .connector(connector)
        .run(&topology.client, server.address(Family::V4))?;
    assert_eq!(v4.syn.dscp(), 0x12);
    assert_eq!(v4.syn.ip_options(), ROUTER_ALERT_V4);
    assert_eq!(v4.syn.source(), Family::V4.client());
    assert_eq!(v4.syn.destination(), Family::V4.server());
    assert_eq!(v4.syn.ttl(), 127, "one router on the way");
    assert_eq!(v4.path(), Path::Forwarded);

    let connector = Connector {
        traffic_class: 0x48,
        hop_by_hop: ROUTER_ALERT_V6.into(),
        destination_options: PADDING_V6.into(),
        ..Connector::default()
    };
    let v6 = Transfer::upload(1)
        .connector(connector)
        .run(&topology.client, server.address(Family::V6))?;
    assert_eq!(v6.syn.dscp(), 0x12);
    assert_eq!(
        v6.syn.extension_header(0).map(|header| &header[1..]),
        Some(&ROUTER_ALERT_V6[1..])
    );
    assert_eq!(
        v6.syn.extension_header(60).map(|header| &header[1..]),
        Some(&PADDING_V6[1..])
    );
    assert_eq!(v6.syn.source(), Family::V6.client());
    Ok(())
}

#[test]
fn client_connects_from_the_address_and_port_it_is_told() -> Result<()> {
    let topology = Topology::builder().extra_clients(2).build()?;
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        let source = SocketAddr::new(family.extra_client(1), 4321);
        let connector = Connector {
            source: Some(source),
            ..Connector::default()
        };
        let outcome = Transfer::upload(1)
            .connector(connector)
            .run(&topology.client, server.address(family))?;
        assert_eq!(outcome.peer, source);
    }
    Ok(())
}

#[test]
fn sockets_show_half_close_reset_refusal_and_silence() -> Result<()> {
    let topology = Topology::new()?;
    let listener = Listener::bind_any(&topology.server, Family::V4.server())?;
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    let silence = listener.accept(Duration::ZERO).expect_err("nobody has connected");
    assert_eq!(silence.kind(), ErrorKind::TimedOut);

    let mut client = Connector::default().connect(&topology.client, address)?;
    let mut server = listener.accept(SECOND)?.stream;
    client.write_all(b"question")?;
    client.shutdown(Shutdown::Write)?;
    let mut question = String::new();
    server.read_to_string(&mut question)?;
    assert_eq!(question, "question");
    server.write_all(b"answer")?;
    let mut answer = [0; 6];
    client.read_exact(&mut answer)?;
    assert_eq!(&answer, b"answer");

    pepsal_tests::reset(server)?;
    let error = client
        .read(&mut [0])
        .expect_err("the server has reset the connection");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    drop(listener);
    let error = Connector::default()
        .connect(&topology.client, address)
        .expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    Ok(())
}

#[test]
fn router_reports_the_path_mtu_both_ways() -> Result<()> {
    for transfer in [Transfer::upload(1 << 20), Transfer::download(1 << 20)] {
        // What an end has learned is in the MSS that it announces, and spares the other end its lesson.
        let topology = Topology::builder().path_mtu(1400).build()?;
        let server = Server::start(&topology.server)?;
        let router = topology.router.as_ref().context("path_mtu makes a router")?;
        for family in Family::BOTH {
            assert!(transfer.run(&topology.client, server.address(family))?.intact);
            let reports = match family {
                Family::V4 => "IcmpOutDestUnreachs",
                Family::V6 => "Icmp6OutPktTooBigs",
            };
            assert!(
                counters(router)?[reports] > 0,
                "{family:?} {transfer:?}: no ICMP error"
            );
        }
    }
    Ok(())
}

#[test]
fn emulator_loses_the_share_it_is_told() -> Result<()> {
    let profile = LinkProfile {
        loss: 0.05,
        ..LinkProfile::UNIMPAIRED
    };
    println!("seed {}", profile.seed);
    let topology = Topology::builder().link(Link::Tun(profile)).build()?;
    let server = Server::start(&topology.server)?;
    for transfer in [Transfer::upload(8 << 20), Transfer::download(8 << 20)] {
        assert!(transfer.run(&topology.client, server.address(Family::V4))?.intact);
    }
    let counters = topology.link_counters().context("a TUN link counts")?;
    for direction in [counters.up, counters.down] {
        let lost = direction.lost as f64 / direction.packets as f64;
        // Of some 6,000 packets with p = 0.05 the standard deviation is 0.003.
        assert!((0.04..0.06).contains(&lost), "{direction:?}");
        assert_eq!(direction.dropped, 0);
    }
    Ok(())
}

#[test]
fn emulator_drops_what_its_queue_cannot_hold() -> Result<()> {
    let profile = LinkProfile {
        queue_bytes: 20_000,
        ..LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0)
    };
    let topology = Topology::builder().link(Link::Tun(profile)).build()?;
    let server = Server::start(&topology.server)?;
    let cubic = Connector {
        congestion: Some("cubic".to_owned()),
        ..Connector::default()
    };
    let upload = Transfer::upload(1 << 20).connector(cubic);
    assert!(upload.run(&topology.client, server.address(Family::V4))?.intact);
    let up = topology.link_counters().context("a TUN link counts")?.up;
    assert!(up.dropped > 0, "CUBIC fills any queue: {up:?}");
    // 20,000 bytes and the packet in transmission take 17.2 ms at 10 Mbit/s.
    assert!(
        up.max_queue_delay > Duration::from_millis(10) && up.max_queue_delay < Duration::from_millis(18),
        "{up:?}"
    );
    Ok(())
}

#[test]
fn satellite_link_delays_by_its_round_trip_time() -> Result<()> {
    let profile = LinkProfile {
        loss: 0.0,
        ..LinkProfile::GEO
    };
    let topology = Topology::builder().link(Link::Emulated(profile)).build()?;
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        let outcome = Transfer::download(0).run(&topology.client, server.address(family))?;
        // Handshake, then request and report: two round trips.
        assert!(outcome.elapsed >= 2 * profile.rtt, "{:?}", outcome.elapsed);
    }
    Ok(())
}

#[test]
fn commands_run_in_the_namespace_and_die_with_their_thread() -> Result<()> {
    let topology = Topology::new()?;
    let addresses = topology
        .gateway
        .command("ip")
        .args(["-oneline", "address"])
        .output()?;
    let addresses = String::from_utf8(addresses.stdout)?;
    for address in ["10.1.0.1/24", "fd01::1/64", "10.2.0.1/24", "fd02::1/64"] {
        assert!(addresses.contains(address), "{addresses}");
    }

    let client = topology.client;
    let sleeper = std::thread::spawn(move || client.command("sleep").arg("600").spawn());
    let mut sleeper = sleeper.join().expect("spawning does not panic")?;
    eventually(5 * SECOND, || matches!(sleeper.try_wait(), Ok(Some(_))));
    Ok(())
}

#[test]
fn errors_of_iproute2_name_namespace_and_command() -> Result<()> {
    let namespace = Namespace::new("alone")?;
    let error = namespace
        .ip("link set nosuch0 up")
        .expect_err("there is no such device")
        .to_string();
    assert!(error.starts_with("alone: ip link set nosuch0 up: "), "{error}");
    assert!(error.contains("nosuch0"), "{error}");
    let error = namespace
        .sysctl("net.ipv4.nosuch", 1)
        .expect_err("there is no such key")
        .to_string();
    assert_eq!(error, "alone: sysctl net.ipv4.nosuch=1");
    Ok(())
}
