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
use nix::sys::signal::{self, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use pepsal_tests::packet::{ACK, Forger, RST, SYN, Tcp};
use pepsal_tests::{
    BOTH, Bed, Connection, Connector, Daemon, Family, LAN, Link, LinkProfile, Namespace, PATIENCE, Path,
    Topology, Transfer, eventually, receive_all, send_all,
};
use socket2::SockRef;

#[test]
fn fragments_of_a_flow_reach_it() -> Result<()> {
    // The server's packets are larger than its way to the gateway takes, and may be fragmented on it.
    let topology = Topology::builder().path_mtu(1300).build()?;
    topology.server.sysctl("net.ipv4.ip_no_pmtu_disc", 1)?;
    let bed = Bed::on(topology, LAN)?;
    let outcome = Transfer::download(2_000_000).run(&bed.topology.client, bed.server.address(Family::V4))?;
    assert!(outcome.intact);
    assert_eq!(outcome.path(), Path::Split);
    let exit = bed.daemon.terminate()?;
    assert_eq!(exit.counter("fragment"), 0, "{}", exit.log);
    Ok(())
}

#[test]
fn fragments_of_other_connections_pass() -> Result<()> {
    let topology = Topology::builder().path_mtu(1300).build()?;
    topology.server.sysctl("net.ipv4.ip_no_pmtu_disc", 1)?;
    let bed = Bed::on(topology, &["-i", "lan0", "--bypass", "0.0.0.0/0"])?;
    let outcome = Transfer::download(2_000_000).run(&bed.topology.client, bed.server.address(Family::V4))?;
    assert!(outcome.intact);
    let exit = bed.daemon.terminate()?;
    assert!(exit.counter("fragment") > 0, "{}", exit.log);
    Ok(())
}

#[test]
fn connections_go_on_being_made_in_a_flood_of_spoofed_syns() -> Result<()> {
    const SYNS: u32 = 100_000;
    let bed = Bed::start(&[])?;
    let topology = &bed.topology;
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
                forger.send(&Tcp {
                    source: (spoofed(i % 0xf_ffff), 1024 + (i % 60_000) as u16).into(),
                    destination: (Family::V4.server(), port).into(),
                    sequence: i,
                    ..Tcp::syn(Family::V4)
                })?;
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
    eventually(PATIENCE, || bed.flow(Family::V4).is_ok());
    let exit = bed.daemon.terminate()?;
    assert!(exit.counter("limit_reached") > 0, "{}", exit.log);
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
    let Bed { daemon, network } = Bed::start(&["-i", "lan0", "-c", "9800"])?;
    let gateway = &network.topology.gateway;
    let heartbeat = heartbeat(&daemon)?;
    let forger = Forger::new(&network.topology.client)?;
    for i in 0..SYNS {
        forger.send(&Tcp {
            source: (spoofed(i), 1024).into(),
            destination: (Family::V4.server(), 9).into(),
            sequence: i,
            ..Tcp::syn(Family::V4)
        })?;
    }
    let entries = || -> Option<f64> {
        let answer = scrape(gateway).ok()?;
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
            answered += usize::from(scrape(gateway)?.ends_with("# EOF\n"));
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

/// A segment from the client's end of a flow.
fn segment_of(flow: &Connection, flags: u8, sequence: u32) -> Result<Tcp> {
    Ok(Tcp {
        source: flow.client.local_addr()?,
        destination: flow.client.peer_addr()?,
        sequence,
        ..Tcp::with_flags(Family::V4, flags)
    })
}

#[test]
fn resets_out_of_window_do_not_end_a_flow() -> Result<()> {
    let bed = Bed::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    flow.greet()?;
    let (at_client, at_server) = (
        Forger::new(&bed.topology.client)?,
        Forger::new(&bed.topology.server)?,
    );
    for i in 0..1000_u32 {
        // Every four millions a guess: a window of 64 KiB is missed nearly always, and an exact hit would be chance.
        let sequence = i.wrapping_mul(4_294_967);
        for flags in [RST, RST | ACK] {
            let reset = segment_of(&flow, flags, sequence)?;
            at_client.send(&reset)?;
            at_server.send(&reset.swapped())?;
        }
    }
    flow.greet()
}

#[test]
fn syn_for_an_open_flow_does_not_disturb_it() -> Result<()> {
    let bed = Bed::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    let forger = Forger::new(&bed.topology.client)?;
    for i in 0..100 {
        forger.send(&segment_of(&flow, SYN, i * 1_000_003)?)?;
    }
    flow.greet()
}

#[test]
fn many_idle_connections_do_not_keep_others_out() -> Result<()> {
    let bed = Bed::start(&[])?;
    // They say a byte and then nothing.
    let mut idle = Vec::new();
    for _ in 0..500 {
        let stream = Connector::default().connect(&bed.topology.client, bed.server.address(Family::V4))?;
        (&stream).write_all(&[0])?;
        idle.push(stream);
    }
    bed.splits()
}

#[test]
fn tiny_window_gets_every_byte() -> Result<()> {
    const BYTES: usize = 100_000;
    let bed = Bed::start(&[])?;
    let Connection { client, server, .. } = bed.flow(Family::V4)?;
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

#[test]
fn client_port_used_again_at_once_gets_a_flow_every_time() -> Result<()> {
    let bed = Bed::start(&[])?;
    for round in 0..100 {
        let connection = bed
            .open_again(Family::V4, 40_000)
            .with_context(|| format!("round {round}"))?;
        connection.greet().with_context(|| format!("round {round}"))?;
        // Who ends first stays in TIME_WAIT: the server, so that the client's port is free again.
        drop(connection.server);
        ensure!((&connection.client).read(&mut [0])? == 0);
    }
    Ok(())
}

#[test]
fn one_client_port_serves_connections_to_many_servers() -> Result<()> {
    let bed = Bed::start(&[])?;
    let connector = Connector::from_port(Family::V4, 40_000);
    let flows = (0..50)
        .map(|_| {
            bed.open_to(&connector, &bed.another_listener(Family::V4)?)?
                .split()
        })
        .collect::<Result<Vec<_>>>()?;
    flows.iter().try_for_each(Connection::greet)
}

#[test]
fn clients_may_use_any_source_port() -> Result<()> {
    let bed = Bed::start(&[])?;
    // Privileged ones, the last, and that of pepsal's own listeners.
    for port in [1, 22, 80, 1023, 5000, 65_535] {
        for family in Family::BOTH {
            let flow = bed
                .open_by(&Connector::from_port(family, port), family)
                .with_context(|| format!("{family:?} port {port}"))?;
            assert_eq!(flow.path(), Path::Split, "{family:?} port {port}");
            assert_eq!(flow.peer, flow.client.local_addr()?);
            flow.greet()?;
        }
    }
    Ok(())
}

/// The receiver takes nothing for a while, until its window is closed and nothing can be sent.
fn window_stays_closed_for(time: Duration) -> Result<()> {
    const BYTES: usize = 20_000_000;
    let bed = Bed::start(&[])?;
    let Connection { client, server, .. } = bed.flow(Family::V4)?;
    client.set_write_timeout(Some(time + PATIENCE))?;
    let payload: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
    thread::scope(|scope| -> Result<()> {
        let writer = scope.spawn(|| send_all(&client, &payload));
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
        ensure!(
            receive_all(&server)? == payload,
            "what arrives is not what was sent"
        );
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
    let bed = Bed::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    let forger = Forger::new(&bed.topology.client)?;
    for id in 1..500 {
        let segment = Tcp {
            payload: vec![b'x'; 64],
            ..segment_of(&flow, ACK, u32::from(id) * 8_589_934)?
        };
        // The second says otherwise of what the first had, and so does the last of all that.
        for (range, at, more) in [
            (0..48, 0, true),
            (0..48, 24, true),
            (24..84, 24, false),
            (0..84, 0, true),
        ] {
            forger.send_fragment(&segment, id, range, at, more)?;
        }
    }
    flow.greet()?;
    bed.flow(Family::V4).map(drop)
}

#[test]
fn ports_in_time_wait_get_a_flow_every_time_they_are_used_again() -> Result<()> {
    let topology = Topology::new()?;
    // Who ends first stays in TIME_WAIT, here the client, and its leg towards the server.
    topology.client.sysctl("net.ipv4.tcp_tw_reuse", 1)?;
    topology.client.sysctl("net.ipv4.tcp_tw_reuse_delay", 1)?;
    let bed = Bed::on(topology, &[])?;
    for round in 0..300 {
        let flow = bed
            .open_again(Family::V4, 40_000 + round % 3)
            .and_then(Connection::split);
        let flow = flow.with_context(|| format!("round {round}"))?;
        flow.greet().with_context(|| format!("round {round}"))?;
        flow.client.shutdown(Shutdown::Write)?;
        ensure!((&flow.server).read(&mut [0])? == 0);
        drop(flow.server);
        ensure!((&flow.client).read(&mut [0])? == 0);
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
    let daemon = Daemon::start(&topology.gateway, BOTH)?;
    let (near, far) = (
        SocketAddr::new(Family::V4.client(), 40_000),
        SocketAddr::new(Family::V4.server(), 50_000),
    );
    let connect = |namespace, source, to| Connector::from(source).connect(namespace, to);
    let (at_client, at_server) = thread::scope(|scope| -> Result<_> {
        let at_server = scope.spawn(|| connect(&topology.server, far, near));
        // Between the far end's SYN and the end of its handshake with the gateway.
        thread::sleep(far_away.rtt * 3 / 4);
        let at_client = connect(&topology.client, near, far).context("the client")?;
        let at_server = at_server.join().expect("no panic").context("the server")?;
        Ok((at_client, at_server))
    })?;
    send_all(&at_client, b"hello")?;
    ensure!(receive_all(&at_server)? == b"hello");
    send_all(&at_server, b"hello")?;
    ensure!(receive_all(&at_client)? == b"hello");
    drop((at_client, at_server));
    let exit = daemon.terminate()?;
    assert!(exit.counter("simultaneous_open") > 0, "{}", exit.log);
    Ok(())
}

#[test]
fn log_has_so_many_lines_a_second_at_most() -> Result<()> {
    const FLOWS: usize = 400;
    let Bed { daemon, network } = Bed::start(&[])?;
    let flows = (0..FLOWS)
        .map(|_| network.flow(Family::V4))
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
    let metrics = scrape(&network.topology.gateway)?;
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
    let Bed { daemon, network } = Bed::start(&[])?;
    let topology = &network.topology;
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

/// A source address that nobody has.
fn spoofed(number: u32) -> IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + number).into()
}
