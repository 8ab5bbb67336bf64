//! Which connections the daemon takes, by which way, and that all others go on as if it were not there.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use pepsal_tests::{
    Bed, Connection, Connector, Family, Footprint, LAN, Link, LinkProfile, Listener, Network, PATIENCE, Path,
    Server, Topology, Transfer, eventually, splits,
};

/// How soon nothing is left of a killed daemon.
const GONE_WITHIN: Duration = Duration::from_secs(2);

#[test]
fn connections_from_before_survive_start_traffic_and_stop() -> Result<()> {
    let network = Network::new()?;
    let connections = [network.open(Family::V4)?, network.open(Family::V6)?];
    let exchange_all = || connections.iter().try_for_each(Connection::exchange);
    exchange_all()?;
    let daemon = network.start(&[])?;
    exchange_all().context("with the daemon")?;
    network.splits()?;
    exchange_all().context("beside others")?;
    assert_eq!(
        daemon.terminate()?.counter("accepted"),
        4,
        "only those of after the start"
    );
    exchange_all().context("after the daemon")
}

#[test]
fn kill_resets_flows_at_both_ends_and_leaves_nothing() -> Result<()> {
    let network = Network::new()?;
    let before = Footprint::of(&network.topology.gateway)?;
    let daemon = network.start(&[])?;
    let flows = [network.flow(Family::V4)?, network.flow(Family::V6)?];
    flows.iter().try_for_each(Connection::exchange)?;

    daemon.kill()?;
    for flow in &flows {
        for mut stream in [&flow.client, &flow.server] {
            let error = stream.read(&mut [0]).expect_err("the flow is gone");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    // Where there is no tcx, filters that pass everything stay.
    eventually(GONE_WITHIN, || {
        Footprint::of(&network.topology.gateway)
            .is_ok_and(|now| now.without_filters() == before.without_filters())
    });
    for family in Family::BOTH {
        assert_eq!(network.probe(family)?, Path::Forwarded, "{family:?}");
    }

    let daemon = network.start(&[])?;
    network.splits()?;
    daemon.terminate()?;
    assert_eq!(Footprint::of(&network.topology.gateway)?, before);
    Ok(())
}

#[test]
fn connections_above_the_limit_pass_through() -> Result<()> {
    const LIMIT: usize = 4;
    const CONNECTIONS: usize = 10;
    let bed = Bed::start(&["-i", "lan0", "-c", "4"])?;
    let clients = thread::scope(|scope| -> Result<Vec<TcpStream>> {
        let connect = || Connector::default().connect(&bed.topology.client, bed.address(Family::V4));
        let threads: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(connect)).collect();
        threads
            .into_iter()
            .map(|thread| Ok(thread.join().expect("connecting does not panic")?))
            .collect()
    })?;
    let mut connections = Vec::new();
    let mut clients: Vec<(SocketAddr, TcpStream)> = clients
        .into_iter()
        .map(|client| Ok((client.local_addr()?, client)))
        .collect::<Result<_>>()?;
    for _ in 0..CONNECTIONS {
        let accepted = bed.listener(Family::V4).accept(PATIENCE)?;
        let index = clients
            .iter()
            .position(|(local, _)| *local == accepted.peer)
            .context("a client of ours")?;
        connections.push(Connection::new(clients.swap_remove(index).1, accepted));
    }
    let split = |connections: &[Connection]| {
        let split = connections.iter().filter(|one| one.path() == Path::Split);
        split.count()
    };
    assert_eq!(split(&connections), LIMIT);
    connections.iter().try_for_each(Connection::exchange)?;
    bed.daemon.wait_for_log("at the limit of connections")?;

    // Places become free again as flows end, and are given to those that come.
    connections.retain(|connection| connection.path() == Path::Forwarded);
    let mut later = Vec::new();
    eventually(PATIENCE, || {
        later.push(bed.open(Family::V4).expect("nothing is refused"));
        split(&later) == LIMIT
    });
    drop((later, connections));
    let exit = bed.daemon.terminate()?;
    assert_eq!(
        exit.log.matches("at the limit of connections").count(),
        1,
        "logged once"
    );
    assert!(exit.counter("limit_reached") >= (CONNECTIONS - LIMIT) as u64);
    assert_eq!(exit.counter("accepted"), 2 * LIMIT as u64);
    Ok(())
}

#[test]
fn hung_daemon_lets_new_connections_pass_and_resumes() -> Result<()> {
    let bed = Bed::start(LAN)?;
    let flow = bed.flow(Family::V4)?;

    bed.daemon.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let (listener, address) = (bed.listener(Family::V4), bed.address(Family::V4));
    let stuck = listener.wait_until_forwarded(&bed.topology.client, address);
    assert!(
        stopped.elapsed() < Duration::from_secs(10),
        "{:?}",
        stopped.elapsed()
    );

    bed.daemon.signal(Signal::SIGCONT)?;
    flow.exchange().context("the flow from before")?;
    drop((flow, stuck));
    // Those that were stuck are served late: they are split, and their clients are gone.
    let mut was_split = false;
    eventually(PATIENCE, || {
        let client = Connector::default()
            .connect(&bed.topology.client, address)
            .expect("nothing is refused");
        let local = client.local_addr().expect("it is connected");
        while let Ok(accepted) = listener.accept(Duration::from_millis(250)) {
            was_split |= accepted.peer == local && accepted.path() == Path::Split;
        }
        was_split
    });
    assert!(bed.daemon.terminate()?.counter("heartbeat_expired") > 0);
    Ok(())
}

#[test]
fn stopping_daemon_serves_its_flows_and_lets_new_connections_pass() -> Result<()> {
    let bed = Bed::start(LAN)?;
    let flow = bed.flow(Family::V6)?;
    bed.daemon.signal(Signal::SIGTERM)?;
    bed.daemon.wait_for_log("stopping: ")?;
    let mut passing = None;
    eventually(PATIENCE, || {
        let next = bed.open(Family::V6).expect("nothing is refused");
        let passes = next.path() == Path::Forwarded;
        passing = Some(next);
        passes
    });
    flow.exchange()?;
    drop(flow);
    assert!(bed.daemon.wait()?.status.success());
    passing.context("it passed")?.exchange()
}

#[test]
fn rules_choose_by_destination_source_and_port() -> Result<()> {
    let network = Network::on(Topology::builder().extra_clients(2).build()?)?;
    let topology = &network.topology;
    topology
        .server
        .ip("address add 10.2.0.9/24 dev eth0\naddress add fd02::9/64 dev eth0 nodad")?;
    let ports = [8000, 8050, 9000];
    let mut listeners = Vec::new();
    for port in ports {
        listeners.push(Listener::bind(
            &topology.server,
            (Ipv4Addr::UNSPECIFIED, port).into(),
        )?);
        listeners.push(Listener::bind(
            &topology.server,
            (Ipv6Addr::UNSPECIFIED, port).into(),
        )?);
    }
    // The last digits of client and server addresses, and the port, of those that are split.
    let taken = |family: Family| -> Result<BTreeSet<(u8, u8, u16)>> {
        let host = |subnet: u16, host: u8| -> IpAddr {
            match family {
                Family::V4 => Ipv4Addr::new(10, subnet as u8, 0, host).into(),
                Family::V6 => Ipv6Addr::new(0xfd00 | subnet, 0, 0, 0, 0, 0, 0, host.into()).into(),
            }
        };
        let mut taken = BTreeSet::new();
        for client in [2, 4] {
            for server in [2, 9] {
                for listener in listeners
                    .iter()
                    .filter(|listener| listener.address().ip().is_ipv4() == (family == Family::V4))
                {
                    let address = SocketAddr::new(host(2, server), listener.port());
                    let source = Some(SocketAddr::new(host(1, client), 0));
                    let connector = Connector {
                        source,
                        ..Connector::default()
                    };
                    let _stream = connector.connect(&topology.client, address)?;
                    if listener.accept(PATIENCE)?.path() == Path::Split {
                        taken.insert((client, server, listener.port()));
                    }
                }
            }
        }
        Ok(taken)
    };
    let all: Vec<(u8, u8, u16)> = [2, 4]
        .iter()
        .flat_map(|c| [2, 9].iter().flat_map(move |s| ports.map(|p| (*c, *s, p))))
        .collect();
    type Expected = fn(u8, u8, u16) -> bool;
    let cases: &[(&[&str], Expected, Expected)] = &[
        (
            &["--only", "10.2.0.9"],
            |_, server, _| server == 9,
            |_, _, _| false,
        ),
        (
            &["--bypass", "dst=fd02::/64", "--only", "fd02::9"],
            |_, _, _| false,
            |_, server, _| server == 9,
        ),
        (
            &[
                "--bypass",
                "10.2.0.0/16",
                "--only",
                "10.2.0.0/24",
                "--bypass",
                "10.2.0.9/32:8000-8099",
            ],
            |_, server, port| server != 9 || port == 9000,
            |_, _, _| false,
        ),
        (
            &[
                "--bypass",
                "src=10.1.0.4",
                "--bypass",
                "src=fd01::2",
                "--bypass",
                "port=8000-8099",
                "--only",
                "port=8050",
            ],
            |client, _, port| client == 2 && port == 8050,
            |client, _, port| client == 4 && port == 8050,
        ),
        (
            &["--bypass", "[fd02::9]:9000"],
            |_, _, _| true,
            |_, server, port| (server, port) != (9, 9000),
        ),
    ];
    for (rules, v4, v6) in cases {
        let daemon = network.start(&[LAN, rules].concat())?;
        for (family, expected) in [(Family::V4, v4), (Family::V6, v6)] {
            let expected: BTreeSet<_> = all
                .iter()
                .copied()
                .filter(|(c, s, p)| expected(*c, *s, *p))
                .collect();
            assert_eq!(taken(family)?, expected, "{family:?} {rules:?}");
        }
        drop(daemon);
    }
    Ok(())
}

#[test]
fn connections_on_interfaces_not_named_pass_through() -> Result<()> {
    let bed = Bed::start(&["-i", "sat0"])?;
    for family in Family::BOTH {
        assert_eq!(bed.probe(family)?, Path::Forwarded, "{family:?}");
    }
    assert_eq!(bed.daemon.terminate()?.counter("accepted"), 0);
    Ok(())
}

#[test]
fn syn_cookies_are_followed() -> Result<()> {
    let topology = Topology::new()?;
    topology.gateway.sysctl("net.ipv4.tcp_syncookies", 2)?;
    let bed = Bed::on(topology, LAN)?;
    bed.splits()?;
    assert!(
        bed.daemon.terminate()?.counter("handshake") >= 4,
        "the last segment of each handshake has no socket"
    );
    Ok(())
}

#[test]
fn satellite_interface_may_be_a_tun_device() -> Result<()> {
    let topology = Topology::builder()
        .link(Link::Tun(LinkProfile::UNIMPAIRED))
        .build()?;
    Bed::on(topology, &[])?.splits()
}

#[test]
fn connections_that_arrive_on_a_tun_device_are_taken() -> Result<()> {
    let topology = Topology::builder()
        .link(Link::Tun(LinkProfile::UNIMPAIRED))
        .build()?;
    let bed = Bed::on(topology, &["-i", "sat0"])?;
    let inside = Server::start(&bed.topology.client)?;
    for family in Family::BOTH {
        let address = SocketAddr::new(family.client(), inside.port());
        splits(&bed.topology.server, address, 500_000)?;
    }
    Ok(())
}

#[test]
fn path_mtu_discovery_reaches_the_server_leg() -> Result<()> {
    let network = Network::on(Topology::builder().path_mtu(1400).build()?)?;
    for family in Family::BOTH {
        let daemon = network.start(LAN)?;
        let upload = Transfer::upload(4 << 20);
        let outcome = upload.run(&network.topology.client, network.server.address(family))?;
        assert!(outcome.intact);
        assert_eq!(outcome.path(), Path::Split, "{family:?}");
        assert!(daemon.terminate()?.counter("icmp_error") > 0, "{family:?}");
    }
    Ok(())
}

#[test]
fn nobody_connects_to_the_proxy_itself() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        for address in [family.gateway(), family.server_next_hop()] {
            let refused = Connector::default().connect(&bed.topology.client, (address, 5000).into());
            assert_eq!(
                refused.expect_err("nothing listens there").kind(),
                ErrorKind::ConnectionRefused
            );
        }
    }
    for loopback in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let refused = Connector::default().connect(&bed.topology.gateway, (loopback, 5000).into());
        assert_eq!(
            refused.expect_err("it listens in a namespace of its own").kind(),
            ErrorKind::ConnectionRefused
        );
    }
    assert_eq!(bed.daemon.terminate()?.counter("accepted"), 0);
    Ok(())
}

#[test]
fn services_of_the_gateway_itself_are_left_alone() -> Result<()> {
    let bed = Bed::start(&[])?;
    let connector = Connector::default();
    for family in Family::BOTH {
        let service = Listener::bind_any(&bed.topology.gateway, family.gateway())?;
        let [near, far] = [family.gateway(), family.server_next_hop()].map(|address| service.at(address));
        for address in [near, far] {
            let connection = Connection::open(&connector, &bed.topology.client, &service, address)?;
            assert_eq!(connection.peer, connection.client.local_addr()?);
            connection.exchange()?;
        }
        Connection::open(&connector, &bed.topology.server, &service, far)?.exchange()?;
    }
    assert_eq!(bed.daemon.terminate()?.counter("intercepted"), 0);
    Ok(())
}

#[test]
fn service_of_the_gateway_does_not_shadow_a_servers_port() -> Result<()> {
    let bed = Bed::start(LAN)?;
    for family in Family::BOTH {
        let _service = Listener::bind(&bed.topology.gateway, bed.listener(family).address())?;
        bed.flow(family)?.exchange()?;
    }
    Ok(())
}

#[test]
fn replies_may_come_back_another_way() -> Result<()> {
    let topology = Topology::new()?;
    for interface in ["all", "default", "lan0", "sat0"] {
        topology
            .gateway
            .sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), 0)?;
    }
    topology.add_second_link()?;
    topology.server.ip("route replace default via 10.4.0.1
         route replace default via fd04::1")?;
    let bed = Bed::on(topology, LAN)?;
    bed.splits()?;
    let received = bed
        .topology
        .gateway
        .command("ip")
        .args(["-s", "link", "show", "sat2"])
        .output()?;
    let received = String::from_utf8(received.stdout)?;
    let bytes: u64 = received
        .lines()
        .skip_while(|line| !line.trim_start().starts_with("RX:"))
        .nth(1)
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .context("a count of bytes")?;
    assert!(bytes > 1_000_000, "both downloads came this way: {received}");
    Ok(())
}

#[test]
fn common_settings_of_gateways_do_no_harm() -> Result<()> {
    let bed = Bed::start(&[])?;
    for settings in [
        &["net.ipv4.conf.all.rp_filter"][..],
        &["net.ipv4.conf.all.src_valid_mark"],
        &[
            "net.ipv4.tcp_fwmark_accept",
            "net.ipv4.fwmark_reflect",
            "net.ipv6.fwmark_reflect",
        ],
        &["net.ipv4.tcp_l3mdev_accept"],
    ] {
        for key in settings {
            bed.topology.gateway.sysctl(key, 1)?;
        }
        bed.splits().with_context(|| settings.join(" "))?;
    }
    for key in [
        "net.ipv4.ip_early_demux",
        "net.ipv4.tcp_early_demux",
        "net.ipv4.tcp_timestamps",
        "net.ipv4.tcp_sack",
    ] {
        bed.topology.gateway.sysctl(key, 0)?;
    }
    bed.splits()
}

#[test]
fn interface_that_comes_back_under_its_name_is_intercepted_again() -> Result<()> {
    let bed = Bed::start(LAN)?;
    bed.splits()?;
    let topology = &bed.topology;
    topology.gateway.ip("link delete lan0")?;
    bed.daemon.wait_for_log("intercepted interfaces changed")?;
    topology.reconnect_client()?;
    for family in Family::BOTH {
        eventually(PATIENCE, || {
            bed.probe(family).is_ok_and(|path| path == Path::Split)
        });
    }
    bed.splits()?;
    assert!(bed.daemon.terminate()?.status.success());
    Ok(())
}
