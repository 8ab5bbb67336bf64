//! Which connections the daemon takes, by which way, and that all others go on as if it were not there.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pepsal_tests::{
    Accepted, Connector, Daemon, Exit, Family, Footprint, Link, LinkProfile, Listener, Server, Topology,
    Transfer, eventually,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// How soon nothing is left of a killed daemon.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// Arguments that make a daemon work in both directions.
const BOTH: [&str; 4] = ["-i", "lan0", "-i", "sat0"];

/// Whether a connection was split: its SYN then starts at the gateway, with all its hops before it.
fn is_split(accepted: &Accepted) -> bool {
    accepted.is_split()
}

/// A connection with both its ends.
struct Connection {
    client: TcpStream,
    server: Accepted,
}

impl Connection {
    fn open(topology: &Topology, listener: &Listener, family: Family) -> Result<Self> {
        let address = SocketAddr::new(family.server(), listener.port());
        let client = Connector::default().connect(&topology.client, address)?;
        Ok(Self {
            client,
            server: listener.accept(PATIENCE)?,
        })
    }

    fn is_split(&self) -> bool {
        is_split(&self.server)
    }

    /// Sends some segments each way.
    fn exchange(&mut self) -> Result<()> {
        let ends = [&mut self.client, &mut self.server.stream];
        let [client, server] = ends;
        send_across(client, server).context("up")?;
        send_across(server, client).context("down")
    }
}

/// 256 KiB, written on a thread of its own so that neither end waits for the other.
fn send_across(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    let payload: Vec<u8> = (0..256 * 1024_u32).map(|i| (i % 251) as u8).collect();
    let mut received = vec![0; payload.len()];
    thread::scope(|scope| {
        let writer = scope.spawn(|| from.write_all(&payload));
        to.read_exact(&mut received)?;
        writer.join().expect("writing does not panic")
    })?;
    ensure!(received == payload, "what arrives is not what was sent");
    Ok(())
}

fn listen(topology: &Topology, family: Family) -> Result<Listener> {
    Ok(Listener::bind_any(&topology.server, family.server())?)
}

/// Whether a connection made now, which carries some bytes each way, is split.
fn is_next_split(topology: &Topology, server: &Server, family: Family) -> Result<bool> {
    let outcome = Transfer::upload(10_000).run(&topology.client, server.address(family))?;
    ensure!(outcome.intact);
    ensure!(
        outcome.peer == outcome.local,
        "the server sees {} instead of {}",
        outcome.peer,
        outcome.local
    );
    Ok(outcome.is_split())
}

/// Both families' connections are split and carry payload both ways.
fn assert_splits(topology: &Topology) -> Result<()> {
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        for transfer in [Transfer::upload(500_000), Transfer::download(500_000)] {
            let outcome = transfer
                .run(&topology.client, server.address(family))
                .with_context(|| format!("{family:?} {transfer:?}"))?;
            assert!(outcome.intact, "{family:?}");
            assert!(outcome.is_split(), "{family:?} is not split");
            assert_eq!(outcome.peer, outcome.local, "{family:?}");
        }
    }
    Ok(())
}

/// A number from the two lines with which the daemon ends.
fn count(exit: &Exit, name: &str) -> u64 {
    let prefix = format!("{name}=");
    exit.log
        .lines()
        .filter(|line| line.contains("flows: ") || line.contains("packets: "))
        .flat_map(|line| line.split_whitespace())
        .find_map(|word| word.strip_prefix(&prefix)?.parse().ok())
        .unwrap_or(0)
}

#[test]
fn connections_from_before_survive_start_traffic_and_stop() -> Result<()> {
    let topology = Topology::new()?;
    let mut connections = Vec::new();
    for family in Family::BOTH {
        connections.push(Connection::open(&topology, &listen(&topology, family)?, family)?);
    }
    let mut exchange_all = || connections.iter_mut().try_for_each(Connection::exchange);
    exchange_all()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    exchange_all().context("with the daemon")?;
    assert_splits(&topology)?;
    exchange_all().context("beside others")?;
    assert_eq!(
        count(&daemon.terminate()?, "accepted"),
        4,
        "only those of after the start"
    );
    exchange_all().context("after the daemon")
}

#[test]
fn kill_resets_flows_at_both_ends_and_leaves_nothing() -> Result<()> {
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;
    let before = Footprint::of(&topology.gateway)?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let mut flows = Vec::new();
    for family in Family::BOTH {
        let mut flow = Connection::open(&topology, &listen(&topology, family)?, family)?;
        flow.exchange()?;
        assert!(flow.is_split());
        flows.push(flow);
    }

    daemon.kill()?;
    for flow in &mut flows {
        for stream in [&mut flow.client, &mut flow.server.stream] {
            let error = stream.read(&mut [0]).expect_err("the flow is gone");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    // Where there is no tcx, filters that pass everything stay.
    eventually(GONE_WITHIN, || {
        Footprint::of(&topology.gateway).is_ok_and(|now| now.without_filters() == before.without_filters())
    });
    for family in Family::BOTH {
        assert!(
            !is_next_split(&topology, &server, family)?,
            "{family:?} passes straight through"
        );
    }

    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    assert_splits(&topology)?;
    daemon.terminate()?;
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

#[test]
fn connections_above_the_limit_pass_through() -> Result<()> {
    const LIMIT: usize = 4;
    const CONNECTIONS: usize = 10;
    let topology = Topology::new()?;
    let listener = listen(&topology, Family::V4)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0", "-c", "4"])?;
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    let clients = thread::scope(|scope| -> Result<Vec<TcpStream>> {
        let connect = || Connector::default().connect(&topology.client, address);
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
        let server = listener.accept(PATIENCE)?;
        let index = clients
            .iter()
            .position(|(local, _)| *local == server.peer)
            .context("a client of ours")?;
        connections.push(Connection {
            client: clients.swap_remove(index).1,
            server,
        });
    }
    assert_eq!(
        connections
            .iter()
            .filter(|connection| connection.is_split())
            .count(),
        LIMIT
    );
    for connection in &mut connections {
        connection.exchange()?;
    }
    daemon.wait_for_log("at the limit of connections")?;

    // Places become free again as flows end, and are given to those that come.
    connections.retain(|connection| !connection.is_split());
    let mut later = Vec::new();
    eventually(PATIENCE, || {
        later.push(Connection::open(&topology, &listener, Family::V4).expect("nothing is refused"));
        later.iter().filter(|connection| connection.is_split()).count() == LIMIT
    });
    drop((later, connections));
    let exit = daemon.terminate()?;
    assert_eq!(
        exit.log.matches("at the limit of connections").count(),
        1,
        "logged once"
    );
    assert!(count(&exit, "limit_reached") >= (CONNECTIONS - LIMIT) as u64);
    assert_eq!(count(&exit, "accepted"), 2 * LIMIT as u64);
    Ok(())
}

#[test]
fn hung_daemon_lets_new_connections_pass_and_resumes() -> Result<()> {
    let topology = Topology::new()?;
    let listener = listen(&topology, Family::V4)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let mut flow = Connection::open(&topology, &listener, Family::V4)?;
    assert!(flow.is_split());

    daemon.signal(Signal::SIGSTOP)?;
    let stopped = Instant::now();
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    let stuck = listener.wait_until_passed(&topology.client, address, PATIENCE, |accepted| {
        !is_split(accepted)
    });
    assert!(
        stopped.elapsed() < Duration::from_secs(10),
        "{:?}",
        stopped.elapsed()
    );

    daemon.signal(Signal::SIGCONT)?;
    flow.exchange().context("the flow from before")?;
    drop((flow, stuck));
    // Those that were stuck are served late: they are split, and their clients are gone.
    let mut was_split = false;
    eventually(PATIENCE, || {
        let client = Connector::default()
            .connect(&topology.client, address)
            .expect("nothing is refused");
        let local = client.local_addr().expect("it is connected");
        while let Ok(accepted) = listener.accept(Duration::from_millis(250)) {
            was_split |= accepted.peer == local && is_split(&accepted);
        }
        was_split
    });
    assert!(count(&daemon.terminate()?, "unresponsive") > 0);
    Ok(())
}

#[test]
fn stopping_daemon_serves_its_flows_and_lets_new_connections_pass() -> Result<()> {
    let topology = Topology::new()?;
    let listener = listen(&topology, Family::V6)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let mut flow = Connection::open(&topology, &listener, Family::V6)?;
    assert!(flow.is_split());
    daemon.signal(Signal::SIGTERM)?;
    daemon.wait_for_log("stopping: ")?;
    let mut passing = None;
    eventually(PATIENCE, || {
        let next = Connection::open(&topology, &listener, Family::V6).expect("nothing is refused");
        let passes = !next.is_split();
        passing = Some(next);
        passes
    });
    flow.exchange()?;
    drop(flow);
    assert!(daemon.wait()?.status.success());
    passing.context("it passed")?.exchange()
}

#[test]
fn rules_choose_by_destination_source_and_port() -> Result<()> {
    let topology = Topology::builder().extra_clients(2).build()?;
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
                    if is_split(&listener.accept(PATIENCE)?) {
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
        let arguments: Vec<&str> = ["-i", "lan0"].into_iter().chain(rules.iter().copied()).collect();
        let daemon = Daemon::start(&topology.gateway, &arguments)?;
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
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "sat0"])?;
    for family in Family::BOTH {
        assert!(!is_next_split(&topology, &server, family)?, "{family:?}");
    }
    assert_eq!(count(&daemon.terminate()?, "accepted"), 0);
    Ok(())
}

#[test]
fn syn_cookies_are_followed() -> Result<()> {
    let topology = Topology::new()?;
    topology.gateway.sysctl("net.ipv4.tcp_syncookies", 2)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    assert_splits(&topology)?;
    assert!(
        count(&daemon.terminate()?, "pending") >= 4,
        "the last segment of each handshake has no socket"
    );
    Ok(())
}

#[test]
fn satellite_interface_may_be_a_tun_device() -> Result<()> {
    let topology = Topology::builder()
        .link(Link::Tun(LinkProfile::UNIMPAIRED))
        .build()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    assert_splits(&topology)
}

#[test]
fn connections_that_arrive_on_a_tun_device_are_taken() -> Result<()> {
    let topology = Topology::builder()
        .link(Link::Tun(LinkProfile::UNIMPAIRED))
        .build()?;
    let inside = Server::start(&topology.client)?;
    let _daemon = Daemon::start(&topology.gateway, &["-i", "sat0"])?;
    for family in Family::BOTH {
        let address = SocketAddr::new(family.client(), inside.port());
        let outcome = Transfer::upload(500_000).run(&topology.server, address)?;
        assert!(outcome.intact);
        assert!(outcome.is_split(), "{family:?} is not split");
    }
    Ok(())
}

#[test]
fn path_mtu_discovery_reaches_the_server_leg() -> Result<()> {
    let topology = Topology::builder().path_mtu(1400).build()?;
    let server = Server::start(&topology.server)?;
    for family in Family::BOTH {
        let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
        let outcome = Transfer::upload(4 << 20).run(&topology.client, server.address(family))?;
        assert!(outcome.intact);
        assert!(outcome.is_split(), "{family:?} is not split");
        assert!(count(&daemon.terminate()?, "icmp_error") > 0, "{family:?}");
    }
    Ok(())
}

#[test]
fn nobody_connects_to_the_proxy_itself() -> Result<()> {
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    for family in Family::BOTH {
        for address in [family.gateway(), family.server_next_hop()] {
            let refused = Connector::default().connect(&topology.client, (address, 5000).into());
            assert_eq!(
                refused.expect_err("nothing listens there").kind(),
                ErrorKind::ConnectionRefused
            );
        }
    }
    for loopback in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let refused = Connector::default().connect(&topology.gateway, (loopback, 5000).into());
        assert_eq!(
            refused.expect_err("it listens in a namespace of its own").kind(),
            ErrorKind::ConnectionRefused
        );
    }
    let exit = daemon.terminate()?;
    assert_eq!(count(&exit, "accepted"), 0);
    Ok(())
}

#[test]
fn services_of_the_gateway_itself_are_left_alone() -> Result<()> {
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    for family in Family::BOTH {
        let service = Listener::bind_any(&topology.gateway, family.gateway())?;
        for address in [family.gateway(), family.server_next_hop()] {
            let to = SocketAddr::new(address, service.port());
            let client = Connector::default().connect(&topology.client, to)?;
            let server = service.accept(PATIENCE)?;
            assert_eq!(server.peer, client.local_addr()?);
            Connection { client, server }.exchange()?;
        }
        let to = SocketAddr::new(family.server_next_hop(), service.port());
        let client = Connector::default().connect(&topology.server, to)?;
        let server = service.accept(PATIENCE)?;
        Connection { client, server }.exchange()?;
    }
    assert_eq!(count(&daemon.terminate()?, "intercepted"), 0);
    Ok(())
}

#[test]
fn service_of_the_gateway_does_not_shadow_a_servers_port() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    for family in Family::BOTH {
        let listener = listen(&topology, family)?;
        let any = SocketAddr::new(listener.address().ip(), listener.port());
        let _service = Listener::bind(&topology.gateway, any)?;
        let mut flow = Connection::open(&topology, &listener, family)?;
        assert!(flow.is_split(), "{family:?}");
        flow.exchange()?;
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
    let _daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    assert_splits(&topology)?;
    let received = topology
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
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
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
            topology.gateway.sysctl(key, 1)?;
        }
        assert_splits(&topology).with_context(|| settings.join(" "))?;
    }
    for key in [
        "net.ipv4.ip_early_demux",
        "net.ipv4.tcp_early_demux",
        "net.ipv4.tcp_timestamps",
        "net.ipv4.tcp_sack",
    ] {
        topology.gateway.sysctl(key, 0)?;
    }
    assert_splits(&topology)
}

#[test]
fn interface_that_comes_back_under_its_name_is_intercepted_again() -> Result<()> {
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    assert_splits(&topology)?;
    topology.gateway.ip("link delete lan0")?;
    daemon.wait_for_log("intercepted interfaces changed")?;
    topology.gateway.ip(format!(
        "link add lan0 type veth peer name eth0 netns {}
         link set lan0 up
         address add 10.1.0.1/24 dev lan0
         address add fd01::1/64 dev lan0 nodad",
        topology.client.path().display()
    ))?;
    topology.client.ip("link set eth0 up
         address add 10.1.0.2/24 dev eth0
         address add fd01::2/64 dev eth0 nodad
         route add default via 10.1.0.1
         route add default via fd01::1")?;
    for family in Family::BOTH {
        eventually(PATIENCE, || {
            is_next_split(&topology, &server, family).unwrap_or(false)
        });
    }
    assert_splits(&topology)?;
    assert!(daemon.terminate()?.status.success());
    Ok(())
}
