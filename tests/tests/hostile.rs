//! Packets and peers that mean no good, or that are merely unusual.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use nix::libc;
use nix::sys::signal::{self, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use pepsal_tests::{
    Connector, Daemon, Exit, Family, Link, LinkProfile, Listener, Namespace, Server, Topology, Transfer,
    eventually, patience,
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(20);

/// Arguments that make a daemon work in both directions.
const BOTH: [&str; 4] = ["-i", "lan0", "-i", "sat0"];

const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const RST_ACK: u8 = 0x14;

/// Sends raw IPv4 segments, whatever they say they come from.
struct Forger(Socket);

impl Forger {
    fn new(namespace: &Namespace) -> Result<Self> {
        let raw = Some(Protocol::from(libc::IPPROTO_RAW));
        Ok(Self(namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, raw))?))
    }

    fn send(
        &self,
        source: (Ipv4Addr, u16),
        destination: (Ipv4Addr, u16),
        flags: u8,
        sequence: u32,
    ) -> Result<()> {
        let segment = segment(source, destination, flags, sequence, &[]);
        self.send_fragment(source.0, destination.0, 0, 0, false, &segment)
    }

    /// Sends a part of a packet, which begins `at` bytes after its header.
    fn send_fragment(
        &self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        id: u16,
        at: u16,
        more: bool,
        bytes: &[u8],
    ) -> Result<()> {
        let mut ip = [0; 20];
        ip[0] = 0x45;
        ip[4..6].copy_from_slice(&id.to_be_bytes());
        ip[6..8].copy_from_slice(&((u16::from(more) << 13) | (at / 8)).to_be_bytes());
        ip[8] = 64;
        ip[9] = 6;
        ip[12..16].copy_from_slice(&source.octets());
        ip[16..20].copy_from_slice(&destination.octets());
        let packet = [&ip[..], bytes].concat();
        let to = SocketAddr::from((destination, 0));
        loop {
            match self.0.send_to(&packet, &to.into()) {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => thread::yield_now(),
                sent => return Ok(sent.map(drop)?),
            }
        }
    }
}

/// A TCP header without options, and data.
fn segment(
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    flags: u8,
    sequence: u32,
    data: &[u8],
) -> Vec<u8> {
    let mut tcp = [&[0; 20][..], data].concat();
    tcp[0..2].copy_from_slice(&source.1.to_be_bytes());
    tcp[2..4].copy_from_slice(&destination.1.to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = flags;
    tcp[14..16].copy_from_slice(&64_000_u16.to_be_bytes());
    let pseudo = [
        &source.0.octets()[..],
        &destination.0.octets(),
        &[0, 6, 0, tcp.len() as u8],
        &tcp,
    ]
    .concat();
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    tcp
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(v4) => v4,
        IpAddr::V6(v6) => panic!("{v6} is not IPv4"),
    }
}

/// A number from the two lines with which the daemon ends.
fn count(exit: &Exit, name: &str) -> u64 {
    let prefix = format!("{name}=");
    let words = exit.log.split_whitespace();
    words
        .filter_map(|word| word.strip_prefix(&prefix)?.parse().ok())
        .next()
        .unwrap_or(0)
}

#[test]
fn fragments_of_a_flow_reach_it() -> Result<()> {
    // The server's packets are larger than its way to the gateway takes, and may be fragmented on it.
    let topology = Topology::builder().path_mtu(1300).build()?;
    topology.server.sysctl("net.ipv4.ip_no_pmtu_disc", 1)?;
    let server = Server::start(&topology.server)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let outcome = Transfer::download(2_000_000).run(&topology.client, server.address(Family::V4))?;
    assert!(outcome.intact);
    assert!(outcome.is_split(), "not split");
    let exit = daemon.terminate()?;
    assert_eq!(count(&exit, "fragment"), 0, "{}", exit.log);
    Ok(())
}

#[test]
fn fragments_of_other_connections_pass() -> Result<()> {
    let topology = Topology::builder().path_mtu(1300).build()?;
    topology.server.sysctl("net.ipv4.ip_no_pmtu_disc", 1)?;
    let server = Server::start(&topology.server)?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0", "--bypass", "0.0.0.0/0"])?;
    let outcome = Transfer::download(2_000_000).run(&topology.client, server.address(Family::V4))?;
    assert!(outcome.intact);
    let exit = daemon.terminate()?;
    assert!(count(&exit, "fragment") > 0, "{}", exit.log);
    Ok(())
}

#[test]
fn connections_go_on_being_made_in_a_flood_of_spoofed_syns() -> Result<()> {
    const SYNS: u32 = 100_000;
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let forger = Forger::new(&topology.client)?;
    // A plain one: the flood makes the server use SYN cookies, with which it cannot keep SYNs.
    let echo = topology.server.run(|| TcpListener::bind("[::]:0"))?;
    let port = echo.local_addr()?.port();
    thread::spawn(move || {
        for stream in echo.incoming().flatten() {
            thread::spawn(move || io::copy(&mut &stream, &mut &stream));
        }
    });
    thread::scope(|scope| -> Result<()> {
        let flood = scope.spawn(|| -> Result<()> {
            for i in 0..SYNS {
                let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + i % 0xf_ffff);
                let source = (source, 1024 + (i % 60_000) as u16);
                forger.send(source, (v4(Family::V4.server()), port), SYN, i)?;
            }
            Ok(())
        });
        let mut made = 0;
        while made < 50 || !flood.is_finished() {
            for family in Family::BOTH {
                let address = SocketAddr::new(family.server(), port);
                let mut stream = Connector::default().connect(&topology.client, address)?;
                let mut received = [0; 5];
                stream.write_all(b"hello")?;
                stream
                    .read_exact(&mut received)
                    .with_context(|| format!("{family:?}, after {made} connections"))?;
                ensure!(received == *b"hello");
                made += 1;
            }
        }
        println!("{made} connections were made during the flood");
        flood.join().expect("no panic")
    })?;
    // What the flood took is given back, and connections are split again.
    eventually(PATIENCE, || flow(&topology, &Connector::default()).is_ok());
    let exit = daemon.terminate()?;
    assert!(count(&exit, "limit_reached") > 0, "{}", exit.log);
    // The flood is not to fill the log as well.
    let lines = exit.log.matches("limit of connections").count();
    assert!(lines <= 4, "{lines} lines:\n{}", exit.log);
    Ok(())
}

/// The map by which a daemon shows its programs that it is alive.
fn heartbeat(daemon: &Daemon) -> Result<Array<MapData, u64>> {
    for descriptor in fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid()))? {
        // One that is closed meanwhile is none that is looked for.
        let information = fs::read_to_string(descriptor?.path()).unwrap_or_default();
        let id = information
            .lines()
            .find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
        if let Some(id) = id
            && MapInfo::from_id(id)?.name_as_str() == Some("HEARTBEAT")
        {
            return Ok(Array::try_from(Map::Array(MapData::from_id(id)?))?);
        }
    }
    bail!("the daemon has no such map")
}

/// How long ago the daemon has last shown that it is alive.
fn heartbeat_age(heartbeat: &Array<MapData, u64>) -> Result<Duration> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    let last = Duration::from_nanos(heartbeat.get(&0, 0)?);
    Ok(Duration::from(now).saturating_sub(last))
}

/// Whether a process is traced, with all of its threads.
fn is_traced(process: u32) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task"))
        .into_iter()
        .flatten();
    threads.flatten().all(|thread| {
        fs::read_to_string(thread.path().join("status"))
            .is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
    })
}

/// A scrape's answer; empty when others had to make room.
fn scrape(gateway: &Namespace) -> Result<String> {
    let mut stream = gateway.run(|| TcpStream::connect("127.0.0.1:9300"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    let asked = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: pepsal\r\n\r\n");
    let _ = asked.and_then(|()| stream.read_to_string(&mut answer));
    Ok(answer)
}

#[test]
fn hundred_who_scrape_a_full_map_share_a_walk_a_second_and_the_daemon_stays_alive() -> Result<()> {
    /// As many as 20,000 descriptors allow for.
    const SYNS: u32 = 9500;
    const SCRAPERS: usize = 100;
    const TIME: Duration = Duration::from_secs(3);
    /// The programs' bound.
    const ALIVE: Duration = Duration::from_secs(3);
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0", "-c", "9800"])?;
    let heartbeat = heartbeat(&daemon)?;
    let forger = Forger::new(&topology.client)?;
    for i in 0..SYNS {
        let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + i);
        forger.send((source, 1024), (v4(Family::V4.server()), 9), SYN, i)?;
    }
    let entries = || -> Option<f64> {
        let answer = scrape(&topology.gateway).ok()?;
        let line = answer
            .lines()
            .find_map(|line| line.strip_prefix("pepsal_flow_map_entries "))?;
        line.parse().ok()
    };
    eventually(PATIENCE, || entries() == Some(f64::from(SYNS)));

    let trace = std::env::temp_dir().join(format!("pepsal-trace-{}", std::process::id()));
    let mut strace = Command::new("strace")
        .args([
            "-f",
            "-qq",
            "-e",
            "trace=bpf",
            "-p",
            &daemon.pid().to_string(),
            "-o",
        ])
        .arg(&trace)
        .spawn()
        .context("strace")?;
    eventually(PATIENCE, || is_traced(daemon.pid()));
    let start = Instant::now();
    let scrapes = || -> Result<usize> {
        let mut answered = 0;
        while start.elapsed() < TIME {
            answered += usize::from(scrape(&topology.gateway)?.ends_with("# EOF\n"));
        }
        Ok(answered)
    };
    let (answered, oldest) = thread::scope(|scope| -> Result<(usize, Duration)> {
        let scrapers: Vec<_> = (0..SCRAPERS).map(|_| scope.spawn(scrapes)).collect();
        let mut oldest = Duration::ZERO;
        while !scrapers.iter().all(thread::ScopedJoinHandle::is_finished) {
            oldest = oldest.max(heartbeat_age(&heartbeat)?);
            thread::sleep(Duration::from_millis(5));
        }
        let mut answered = 0;
        for scraper in scrapers {
            answered += scraper.join().expect("scraping does not panic")?;
        }
        Ok((answered, oldest))
    })?;
    let seconds = start.elapsed().as_secs();
    signal::kill(Pid::from_raw(strace.id().cast_signed()), Signal::SIGINT)?;
    strace.wait()?;
    let calls = fs::read_to_string(&trace)?
        .matches("bpf(BPF_MAP_LOOKUP_BATCH")
        .count();
    fs::remove_file(&trace)?;
    println!("{answered} answers in {seconds} s, {calls} system calls, heartbeat {oldest:?}");
    assert!(answered > 0);
    assert!(oldest < ALIVE, "no heartbeat for {oldest:?}");
    // Some thousand entries to a call; one walk a second for those who scrape, and one every other for what expires.
    let walks = seconds + 2 + seconds / 2 + 1;
    assert!(calls as u64 <= 6 * walks, "{calls} calls in {seconds} s");
    assert!(calls >= 6, "{calls} calls are less than two walks");
    Ok(())
}

/// Both ends of a flow.
fn flow(topology: &Topology, connector: &Connector) -> Result<(TcpStream, TcpStream)> {
    let listener = Listener::bind_any(&topology.server, Family::V4.server())?;
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    let client = connector.connect(&topology.client, address)?;
    let accepted = listener.accept(patience(PATIENCE))?;
    ensure!(accepted.is_split(), "not split");
    Ok((client, accepted.stream))
}

fn exchange(mut client: &TcpStream, mut server: &TcpStream) -> Result<()> {
    let mut received = [0; 5];
    client.write_all(b"hello")?;
    server.read_exact(&mut received)?;
    server.write_all(&received)?;
    client.read_exact(&mut received)?;
    ensure!(received == *b"hello");
    Ok(())
}

#[test]
fn resets_out_of_window_do_not_end_a_flow() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (client, server) = flow(&topology, &Connector::default())?;
    let (near, far) = (client.local_addr()?, client.peer_addr()?);
    let (near, far) = ((v4(near.ip()), near.port()), (v4(far.ip()), far.port()));
    exchange(&client, &server)?;
    let (at_client, at_server) = (Forger::new(&topology.client)?, Forger::new(&topology.server)?);
    for i in 0..1000_u32 {
        // Every four millions a guess: a window of 64 KiB is missed nearly always, and an exact hit would be chance.
        let sequence = i.wrapping_mul(4_294_967);
        for flags in [RST, RST_ACK] {
            at_client.send(near, far, flags, sequence)?;
            at_server.send(far, near, flags, sequence)?;
        }
    }
    exchange(&client, &server)
}

#[test]
fn syn_for_an_open_flow_does_not_disturb_it() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (client, server) = flow(&topology, &Connector::default())?;
    let (near, far) = (client.local_addr()?, client.peer_addr()?);
    let forger = Forger::new(&topology.client)?;
    for i in 0..100 {
        let (near, far) = ((v4(near.ip()), near.port()), (v4(far.ip()), far.port()));
        forger.send(near, far, SYN, i * 1_000_003)?;
    }
    exchange(&client, &server)
}

#[test]
fn many_idle_connections_do_not_keep_others_out() -> Result<()> {
    let topology = Topology::new()?;
    let server = Server::start(&topology.server)?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    // They say a byte and then nothing.
    let mut idle = Vec::new();
    for _ in 0..500 {
        let stream = Connector::default().connect(&topology.client, server.address(Family::V4))?;
        (&stream).write_all(&[0])?;
        idle.push(stream);
    }
    for family in Family::BOTH {
        let outcome = Transfer::download(500_000).run(&topology.client, server.address(family))?;
        assert!(outcome.intact);
        assert!(outcome.is_split());
    }
    Ok(())
}

#[test]
fn tiny_window_gets_every_byte() -> Result<()> {
    const BYTES: usize = 100_000;
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (client, server) = flow(&topology, &Connector::default())?;
    SockRef::from(&client).set_recv_buffer_size(1)?;
    let payload: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
    thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| (&server).write_all(&payload));
        let mut received = vec![0; BYTES];
        for part in received.chunks_mut(997) {
            (&client).read_exact(part)?;
        }
        ensure!(received == payload, "what arrives is not what was sent");
        Ok(writer.join().expect("no panic")?)
    })
}

/// Connects as soon as the client's own kernel has done with the connection before.
fn connect_again(connector: &Connector, topology: &Topology, address: SocketAddr) -> io::Result<TcpStream> {
    let mut connected = connector.connect(&topology.client, address);
    eventually(PATIENCE, || match &connected {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            connected = connector.connect(&topology.client, address);
            false
        }
        _ => true,
    });
    connected
}

#[test]
fn client_port_used_again_at_once_gets_a_flow_every_time() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let listener = Listener::bind_any(&topology.server, Family::V4.server())?;
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    let connector = Connector {
        source: Some((Family::V4.client(), 40_000).into()),
        ..Connector::default()
    };
    for round in 0..100 {
        let client =
            connect_again(&connector, &topology, address).with_context(|| format!("round {round}"))?;
        let accepted = listener.accept(patience(PATIENCE))?;
        exchange(&client, &accepted.stream).with_context(|| format!("round {round}"))?;
        // Who ends first stays in TIME_WAIT: the server, so that the client's port is free again.
        drop(accepted);
        ensure!((&client).read(&mut [0])? == 0);
    }
    Ok(())
}

#[test]
fn one_client_port_serves_connections_to_many_servers() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let connector = Connector {
        source: Some((Family::V4.client(), 40_000).into()),
        ..Connector::default()
    };
    let flows = (0..50)
        .map(|_| flow(&topology, &connector))
        .collect::<Result<Vec<_>>>()?;
    flows
        .iter()
        .try_for_each(|(client, server)| exchange(client, server))
}

#[test]
fn clients_may_use_any_source_port() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    // Privileged ones, the last, and that of pepsal's own listeners.
    for port in [1, 22, 80, 1023, 5000, 65_535] {
        for family in Family::BOTH {
            let listener = Listener::bind_any(&topology.server, family.server())?;
            let connector = Connector {
                source: Some((family.client(), port).into()),
                ..Connector::default()
            };
            let address = SocketAddr::new(family.server(), listener.port());
            let client = connector
                .connect(&topology.client, address)
                .with_context(|| format!("{family:?} port {port}"))?;
            let accepted = listener.accept(patience(PATIENCE))?;
            assert!(accepted.is_split(), "{family:?} port {port} is not split");
            assert_eq!(accepted.peer, client.local_addr()?);
            exchange(&client, &accepted.stream)?;
        }
    }
    Ok(())
}

/// The receiver takes nothing for a while, until its window is closed and nothing can be sent.
fn window_stays_closed_for(time: Duration) -> Result<()> {
    const BYTES: usize = 20_000_000;
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (client, server) = flow(&topology, &Connector::default())?;
    client.set_write_timeout(Some(time + PATIENCE))?;
    let payload: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
    thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| {
            (&client).write_all(&payload)?;
            client.shutdown(Shutdown::Write)
        });
        // It is closed when no more comes.
        let (mut before, mut unread) = (0, vec![0; BYTES]);
        eventually(PATIENCE, || {
            let now = server.peek(&mut unread).unwrap_or_default();
            let is_closed = now == before;
            before = now;
            thread::sleep(Duration::from_millis(100));
            is_closed
        });
        thread::sleep(time);
        ensure!(!writer.is_finished(), "{BYTES} bytes fit without being read");
        let mut received = Vec::new();
        (&server).read_to_end(&mut received)?;
        ensure!(received == payload, "what arrives is not what was sent");
        Ok(writer.join().expect("no panic")?)
    })
}

#[test]
fn zero_window_gets_every_byte_when_it_opens() -> Result<()> {
    window_stays_closed_for(Duration::from_secs(3))
}

#[test]
#[ignore = "takes five minutes"]
fn zero_window_of_minutes_gets_every_byte_when_it_opens() -> Result<()> {
    window_stays_closed_for(Duration::from_secs(300))
}

#[test]
fn overlapping_fragments_disturb_nothing() -> Result<()> {
    let topology = Topology::new()?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (client, server) = flow(&topology, &Connector::default())?;
    let forger = Forger::new(&topology.client)?;
    let (near, far) = (client.local_addr()?, client.peer_addr()?);
    let (near, far) = ((v4(near.ip()), near.port()), (v4(far.ip()), far.port()));
    for id in 1..500 {
        let segment = segment(near, far, ACK, u32::from(id) * 8_589_934, &[b'x'; 64]);
        // The second says otherwise of what the first had, and so does the last of all that.
        for (range, at, more) in [
            (0..48, 0, true),
            (0..48, 24, true),
            (24..84, 24, false),
            (0..84, 0, true),
        ] {
            forger.send_fragment(near.0, far.0, id, at, more, &segment[range])?;
        }
    }
    exchange(&client, &server)?;
    assert!(flow(&topology, &Connector::default()).is_ok());
    Ok(())
}

#[test]
fn ports_in_time_wait_get_a_flow_every_time_they_are_used_again() -> Result<()> {
    let topology = Topology::new()?;
    // Who ends first stays in TIME_WAIT, here the client, and its leg towards the server.
    topology.client.sysctl("net.ipv4.tcp_tw_reuse", 1)?;
    topology.client.sysctl("net.ipv4.tcp_tw_reuse_delay", 1)?;
    let _daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let listener = Listener::bind_any(&topology.server, Family::V4.server())?;
    let address = SocketAddr::new(Family::V4.server(), listener.port());
    for round in 0..300 {
        let connector = Connector {
            source: Some((Family::V4.client(), 40_000 + round % 3).into()),
            ..Connector::default()
        };
        let client =
            connect_again(&connector, &topology, address).with_context(|| format!("round {round}"))?;
        let accepted = listener.accept(patience(PATIENCE))?;
        ensure!(accepted.is_split(), "round {round} is not split");
        exchange(&client, &accepted.stream).with_context(|| format!("round {round}"))?;
        client.shutdown(Shutdown::Write)?;
        ensure!((&accepted.stream).read(&mut [0])? == 0);
        drop(accepted);
        ensure!((&client).read(&mut [0])? == 0);
    }
    Ok(())
}

#[test]
fn two_ends_that_open_the_same_connection_at_once_get_one() -> Result<()> {
    let far_away = LinkProfile {
        rtt: Duration::from_millis(400),
        ..LinkProfile::UNIMPAIRED
    };
    let topology = Topology::builder().link(Link::Tun(far_away)).build()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let (near, far) = (
        SocketAddr::new(Family::V4.client(), 40_000),
        SocketAddr::new(Family::V4.server(), 50_000),
    );
    let connect = |namespace, source, to| {
        let connector = Connector {
            source: Some(source),
            ..Connector::default()
        };
        connector.connect(namespace, to)
    };
    let (at_client, at_server) = thread::scope(|scope| -> Result<_> {
        let at_server = scope.spawn(|| connect(&topology.server, far, near));
        // Between the far end's SYN and the end of its handshake with the gateway.
        thread::sleep(far_away.rtt * 3 / 4);
        let at_client = connect(&topology.client, near, far).context("the client")?;
        let at_server = at_server.join().expect("no panic").context("the server")?;
        Ok((at_client, at_server))
    })?;
    exchange(&at_client, &at_server)?;
    drop((at_client, at_server));
    let exit = daemon.terminate()?;
    assert!(count(&exit, "simultaneous") > 0, "{}", exit.log);
    Ok(())
}

#[test]
fn log_has_so_many_lines_a_second_at_most() -> Result<()> {
    const FLOWS: usize = 400;
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    let flows = (0..FLOWS)
        .map(|_| flow(&topology, &Connector::default()))
        .collect::<Result<Vec<_>>>()?;
    // Each of them is worth a line.
    let mut admin = UnixStream::connect(daemon.admin_socket())?;
    writeln!(
        admin,
        r#"{{"version":1,"request":"close","flow":"{}"}}"#,
        Family::V4.client()
    )?;
    let mut reply = [0];
    admin.read_exact(&mut reply)?;
    drop(flows);
    let metrics = topology
        .gateway
        .command("curl")
        .args(["-s", "http://127.0.0.1:9300/metrics"])
        .output()?;
    let metrics = String::from_utf8(metrics.stdout)?;
    let suppressed = metrics
        .lines()
        .find_map(|line| line.strip_prefix("pepsal_log_lines_suppressed_total "))
        .context("the metric")?;
    let lines = daemon.log().matches("closed by the operator").count();
    assert!(lines <= 200, "{lines} lines");
    assert!(
        suppressed.parse::<usize>()? >= FLOWS - 200,
        "{suppressed} of {FLOWS} left out, {lines} written"
    );
    Ok(())
}

#[test]
fn nobody_outside_reaches_what_the_daemon_serves() -> Result<()> {
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &BOTH)?;
    daemon.wait_for_log("metrics at=127.0.0.1:9300")?;
    for (namespace, near) in [
        (&topology.client, Family::gateway as fn(Family) -> IpAddr),
        (&topology.server, Family::server_next_hop),
    ] {
        for family in Family::BOTH {
            for port in [5000, 9300] {
                let address = SocketAddr::new(near(family), port);
                let refusal = Connector::default().connect(namespace, address);
                let refusal = refusal.expect_err("nothing listens there").kind();
                assert_eq!(refusal, io::ErrorKind::ConnectionRefused, "{address}");
            }
        }
    }
    Ok(())
}
