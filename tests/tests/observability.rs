//! What the daemon shows of itself, held against what is so: metrics, the admin socket, and the commands that ask it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{
    Bed, Connection, Connector, Daemon, Direction, Family, Listener, Namespace, PATIENCE, Topology, Transfer,
    eventually, reset,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const METRICS: &str = "127.0.0.1:9300";

#[test]
fn bytes_and_ends_are_counted_as_they_were() -> Result<()> {
    let bed = Watched::start(&[])?;
    for family in Family::BOTH {
        for direction in [Direction::Upload, Direction::Download] {
            let transfer = Transfer::new(direction, 4 * MIB);
            let outcome = transfer.run(&bed.topology.client, bed.server.address(family))?;
            assert!(outcome.intact);
        }
    }
    let closed =
        |scrape: &Scrape, reason: &str| scrape.of("pepsal_flows_closed_total", &[("reason", reason)]);
    bed.eventually_scraped(|scrape| closed(scrape, "finished") == 4.0)?;
    let refused = (Family::V4.server(), 9).into();
    let attempt = Connector::default().connect(&bed.topology.client, refused);
    assert!(attempt.and_then(|stream| send_and_read(&stream)).is_err());
    let used_flow = |family| -> Result<Connection> {
        let flow = bed.flow(family)?;
        flow.greet()?;
        Ok(flow)
    };
    reset(used_flow(Family::V4)?.client)?;
    reset(used_flow(Family::V6)?.server)?;
    bed.eventually_scraped(|scrape| {
        ["refused", "client_reset", "server_reset"]
            .iter()
            .all(|reason| closed(scrape, reason) == 1.0)
    })?;

    let scrape = bed.scrape()?;
    for (direction, on_sat0) in [("up", "sent"), ("down", "received")] {
        let bytes = scrape.of("pepsal_bytes_total", &[("direction", direction)]);
        // The transfers' own protocol adds a few to the payload.
        assert!(
            (8 * MIB..8 * MIB + 4096).contains(&(bytes as u64)),
            "{direction}: {bytes}"
        );
        for (interface, way) in [("sat0", on_sat0), ("lan0", opposite(on_sat0))] {
            let labels = [("interface", interface), ("direction", way)];
            assert_eq!(scrape.of("pepsal_link_bytes_total", &labels), bytes, "{labels:?}");
        }
    }
    assert_eq!(scrape.of("pepsal_flow_duration_seconds_count", &[]), 7.0);
    assert_eq!(scrape.of("pepsal_connect_seconds_count", &[]), 6.0);
    assert_eq!(
        scrape.of("pepsal_packets_total", &[("verdict", "intercepted")]),
        7.0
    );
    assert_eq!(scrape.of("pepsal_packets_total", &[("verdict", "assigned")]), 7.0);
    assert_eq!(scrape.of("pepsal_events_total", &[("event", "accepted")]), 7.0);
    assert_eq!(scrape.of("pepsal_flows_open", &[]), 0.0);
    Ok(())
}

fn opposite(way: &str) -> &str {
    if way == "sent" { "received" } else { "sent" }
}

#[test]
fn open_flows_are_in_the_totals_while_they_run() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let flow = bed.flow(Family::V4)?;
    (&flow.client).write_all(&[7; 100_000])?;
    (&flow.server).read_exact(&mut [0; 100_000])?;
    let scrape = bed
        .eventually_scraped(|scrape| scrape.of("pepsal_bytes_total", &[("direction", "up")]) == 100_000.0)?;
    assert_eq!(scrape.of("pepsal_flows_open", &[]), 1.0);
    for interface in ["lan0", "sat0"] {
        assert_eq!(
            scrape.of("pepsal_link_legs_open", &[("interface", interface)]),
            1.0
        );
    }
    let segments = scrape.of("pepsal_link_segments_sent_total", &[("interface", "sat0")]);
    assert!(segments >= 100_000.0 / 65_536.0, "{segments}");
    let rtt = scrape.of("pepsal_link_rtt_seconds", &[("interface", "sat0")]);
    assert!(rtt > 0.0 && rtt < 1.0, "{rtt}");
    let rate = scrape.of("pepsal_link_rate_bytes_per_second", &[("interface", "sat0")]);
    assert!((4e6..6.25e6).contains(&rate), "{rate}");
    let again = bed.scrape()?;
    assert_eq!(again.of("pepsal_bytes_total", &[("direction", "up")]), 100_000.0);
    Ok(())
}

#[test]
fn share_of_a_links_rate_in_use_follows_the_flows() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=20mbit,rtt=20ms"])?;
    let flow = bed.flow(Family::V4)?;
    let used = |scrape: &Scrape| scrape.of("pepsal_link_rate_used_ratio", &[("interface", "sat0")]);
    assert_eq!(used(&bed.scrape()?), 0.0);
    thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| std::io::copy(&mut &flow.server, &mut std::io::sink()));
        let writer = scope.spawn(|| (&flow.client).write_all(&vec![0; 10 * MIB as usize]));
        let busy = bed.eventually_scraped(|scrape| used(scrape) > 0.6);
        writer.join().expect("no panic")?;
        flow.client.shutdown(std::net::Shutdown::Write)?;
        reader.join().expect("no panic")?;
        assert!(used(&busy?) < 1.2);
        Ok(())
    })?;
    bed.eventually_scraped(|scrape| used(scrape) == 0.0)?;
    Ok(())
}

#[test]
fn limit_shows_in_the_verdicts() -> Result<()> {
    let bed = Watched::start(&["-c", "1"])?;
    let _held = bed.flow(Family::V4)?;
    let _passing = bed.open(Family::V4)?;
    let scrape = bed.scrape()?;
    assert_eq!(
        scrape.of("pepsal_packets_total", &[("verdict", "limit_reached")]),
        1.0
    );
    assert_eq!(scrape.of("pepsal_flows_limit", &[]), 1.0);
    Ok(())
}

#[test]
fn readiness_names_what_is_missing() -> Result<()> {
    let bed = Watched::start(&[])?;
    assert_eq!(bed.get("/healthz")?, (200, "ok\n".into()));
    assert_eq!(bed.get("/readyz")?, (200, "ready\n".into()));
    assert_eq!(bed.get("/")?.0, 404);
    bed.topology.gateway.ip("link del lan0")?;
    eventually(PATIENCE, || {
        bed.get("/readyz")
            .is_ok_and(|(status, body)| status == 503 && body.contains("interface lan0 is not there"))
    });
    assert_eq!(
        bed.scrape()?
            .of("pepsal_interface_intercepted", &[("interface", "lan0")]),
        0.0
    );
    let status = bed.pepsal(&["status"])?;
    assert!(!status.status.success());
    let shown = String::from_utf8(status.stdout)?;
    assert!(
        shown.contains("NOT READY") && shown.contains("missing: interface lan0"),
        "{shown}"
    );
    Ok(())
}

#[test]
fn metrics_are_served_where_they_are_asked_for() -> Result<()> {
    let topology = Topology::new()?;
    let start = |place: &str| Daemon::start(&topology.gateway, &["-i", "lan0", "--metrics-listen", place]);
    let folder = TempDir::new()?;
    let path = folder.path().join("metrics.sock");
    let daemon = start(&format!("unix:{}", path.display()))?;
    assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o660);
    let mut stream = UnixStream::connect(&path)?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: pepsal\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    daemon.terminate()?;
    assert!(!path.exists());

    let daemon = start("none")?;
    assert!(connect(&topology.gateway, METRICS.parse()?).is_err());
    daemon.terminate()?;
    Ok(())
}

#[test]
fn occupied_places_are_refused_in_one_line() -> Result<()> {
    let topology = Topology::new()?;
    let _occupant = Listener::bind(&topology.gateway, METRICS.parse()?)?;
    let asked = Daemon::expect_failure(&topology.gateway, &["-i", "lan0", "--metrics-listen", METRICS])?;
    assert!(
        asked
            .log
            .ends_with("pepsal: metrics: cannot listen at 127.0.0.1:9300: it is in use: choose another with --metrics-listen\n"),
        "{}",
        asked.log
    );
    // Nobody asked for this one.
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    assert!(daemon.log().contains("no metrics are served"));
    let path = daemon.admin_socket().to_str().context("a path of ASCII")?;
    let arguments = ["-i", "sat0", "--admin-socket", path];
    let refused = Daemon::expect_failure(&topology.gateway, &arguments)?;
    assert!(
        refused.log.contains("is in use by another process"),
        "{}",
        refused.log
    );
    Ok(())
}

#[test]
fn killed_daemons_socket_is_replaced() -> Result<()> {
    let topology = Topology::new()?;
    let folder = TempDir::new()?;
    let path = folder.path().join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    let shown = path.to_str().context("a path of ASCII")?;
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0", "--admin-socket", shown])?;
    assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o660);
    assert!(ask(&path, &json!({"version": 1, "request": "status"}))?["status"]["ready"] == true);
    daemon.terminate()?;
    assert!(!path.exists(), "it is removed at a stop");
    Ok(())
}

#[test]
fn successor_takes_the_places_over() -> Result<()> {
    let topology = Topology::new()?;
    let first = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let path = first.admin_socket().to_owned();
    let shown = path.to_str().context("a path of ASCII")?;
    let arguments = [
        "-i",
        "lan0",
        "--takeover",
        "--admin-socket",
        shown,
        "--metrics-listen",
        METRICS,
    ];
    let second = Daemon::start(&topology.gateway, &arguments)?;
    let status = ask(&path, &json!({"version": 1, "request": "status"}))?;
    assert_eq!(status["status"]["pid"], json!(second.pid()));
    assert_eq!(
        get(&topology.gateway, METRICS.parse()?, "/readyz")?,
        (200, "ready\n".into())
    );
    drop(first);
    Ok(())
}

#[test]
fn listed_flows_are_those_that_the_kernel_has() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        (&flow.client).write_all(&[1; 5000])?;
        (&flow.server).read_exact(&mut [0; 5000])?;
        (&flow.server).write_all(&[2; 700])?;
        (&flow.client).read_exact(&mut [0; 700])?;
        let client = flow.client.local_addr()?;
        let port = client.port().to_string();
        let address = client.ip().to_string();
        let mut seen = Value::Null;
        eventually(PATIENCE, || {
            seen = bed.flows(&["--client", &address]).unwrap_or_default();
            seen["list"][0]["bytes"] == json!({"up": 5000, "down": 700})
        });
        let shown = &seen["list"][0];
        assert_eq!(
            seen["list"].as_array().map(Vec::len),
            Some(1),
            "{seen} port {port}"
        );
        assert_eq!(shown["client"], json!(client));
        assert_eq!(shown["server"], json!(flow.client.peer_addr()?));
        assert_eq!(shown["state"], "open");
        let kernel = bed.daemon.legs()?;
        for (side, interface, peer) in [
            ("client", "lan0", client),
            ("server", "sat0", flow.client.peer_addr()?),
        ] {
            let leg = &shown["legs"][side];
            let same = kernel.iter().find(|leg| leg.peer == peer);
            let same = same.with_context(|| format!("ss shows no {side} leg"))?;
            assert_eq!(leg["interface"], interface);
            assert_eq!(leg["state"], "established");
            assert_eq!(leg["local"], json!(same.local));
            assert_eq!(leg["peer"], json!(same.peer));
            assert_eq!(leg["congestion"], json!(same.congestion));
            assert_eq!(leg["cwnd_segments"], json!(same.window));
            assert_eq!(leg["mss_bytes"], json!(same.mss));
            assert!(
                leg["rtt_seconds"]
                    .as_f64()
                    .is_some_and(|rtt| rtt > 0.0 && rtt < 1.0)
            );
        }
        // The table shows the same.
        let table = String::from_utf8(bed.pepsal(&["flows", "--interval", "0"])?.stdout)?;
        assert!(
            table.contains(&client.to_string()) && table.ends_with("\n1 flow\n"),
            "{table}"
        );
        drop(flow);
        eventually(PATIENCE, || bed.flows(&[]).is_ok_and(|flows| flows["total"] == 0));
    }
    Ok(())
}

#[test]
fn flows_are_filtered_sorted_and_limited() -> Result<()> {
    let bed = Watched::start(&[])?;
    let (v4, v6) = (bed.flow(Family::V4)?, bed.flow(Family::V6)?);
    (&v6.client).write_all(&[1; 5000])?;
    (&v6.server).read_exact(&mut [0; 5000])?;
    let clients = |arguments: &[&str]| -> Result<String> {
        let flows = bed.flows(arguments)?;
        let list = flows["list"].as_array().context("a list")?;
        let clients: Vec<_> = list.iter().filter_map(|flow| flow["client"].as_str()).collect();
        Ok(clients.join(" "))
    };
    let (first, second) = (
        v4.client.local_addr()?.to_string(),
        v6.client.local_addr()?.to_string(),
    );
    let both = format!("{first} {second}");
    eventually(PATIENCE, || {
        clients(&["--sort", "bytes"]).is_ok_and(|sorted| sorted == format!("{second} {first}"))
    });
    assert_eq!(clients(&[])?, both);
    assert_eq!(clients(&["--limit", "1"])?, first);
    assert_eq!(clients(&["--server", "fd02::/16"])?, second);
    let port = v4.client.peer_addr()?.port().to_string();
    assert_eq!(clients(&["--port", &port])?, first);
    assert_eq!(clients(&["--interface", "sat0"])?, both);
    assert_eq!(clients(&["--interface", "nosuch0"])?, "");
    assert_eq!(clients(&["--state", "pending"])?, "");
    let wrong = bed.pepsal(&["flows", "--client", "lan0"])?;
    assert_eq!(
        String::from_utf8(wrong.stderr)?,
        "pepsal: 'lan0' is neither an address nor a prefix\n"
    );
    Ok(())
}

#[test]
fn leg_that_limits_is_named() -> Result<()> {
    let bed = Watched::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    // The server reads nothing: its window, and then everything up to the client, fills.
    flow.client.set_nonblocking(true)?;
    let chunk = vec![0; 1 << 16];
    eventually(PATIENCE, || {
        while (&flow.client).write(&chunk).is_ok() {}
        let flows = bed.flows(&[]).unwrap_or_default();
        flows["list"][0]["limited"]["up"] == json!({"leg": "server", "by": "receiver"})
    });
    assert_eq!(bed.flows(&[])?["list"][0]["limited"]["down"], Value::Null);
    Ok(())
}

#[test]
fn rates_are_measured_over_the_interval() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=16mbit,rtt=20ms"])?;
    let flow = bed.flow(Family::V4)?;
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| std::io::copy(&mut &flow.server, &mut std::io::sink()));
        scope.spawn(|| {
            // Ended by the reset below.
            let _ = (&flow.client).write_all(&vec![0; 64 * MIB as usize]);
        });
        eventually(PATIENCE, || {
            let flows = bed.flows(&["--interval", "500ms"]).unwrap_or_default();
            let rate = flows["list"][0]["bytes_per_second"]["up"].as_f64().unwrap_or(0.0);
            let limited = &flows["list"][0]["limited"]["up"];
            (1.2e6..2.4e6).contains(&rate) && *limited == json!({"leg": "server", "by": "share"})
        });
        ensure!(bed.pepsal(&["close", "10.1.0.2"])?.status.success());
        Ok(())
    })
}

#[test]
fn closed_flow_is_reset_at_both_ends() -> Result<()> {
    let bed = Watched::start(&[])?;
    for (family, by_id) in [(Family::V4, true), (Family::V6, false)] {
        let flow = bed.flow(family)?;
        let id = bed.flows(&[])?["list"][0]["id"].to_string();
        let (client, server) = (flow.client.local_addr()?.to_string(), flow.client.peer_addr()?);
        let which = if by_id { &id } else { &client };
        let closed = bed.pepsal(&["close", which])?;
        let said = String::from_utf8(closed.stdout)?;
        assert_eq!(said, format!("closed {id}: {client} to {server}\n"));
        for mut end in [flow.client, flow.server] {
            let error = end.read(&mut [0]).expect_err("an end of stream would be a lie");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    bed.eventually_scraped(|scrape| {
        scrape.of("pepsal_flows_closed_total", &[("reason", "administrative")]) == 2.0
    })?;
    let again = bed.pepsal(&["close", "1"])?;
    assert!(!again.status.success());
    assert_eq!(String::from_utf8(again.stderr)?, "pepsal: there is no flow 1\n");
    Ok(())
}

#[test]
fn commands_say_when_there_is_no_daemon() -> Result<()> {
    let nowhere = Namespace::new("nowhere")?;
    for command in [&["status"][..], &["flows"], &["close", "1"]] {
        let arguments = [command, &["--admin-socket", "/nonexistent/pepsal.sock"]].concat();
        let output = Daemon::command(&nowhere, &arguments)?.output()?;
        assert!(!output.status.success());
        assert_eq!(
            String::from_utf8(output.stderr)?,
            "pepsal: no daemon listens at /nonexistent/pepsal.sock: is it running, and with this --admin-socket?\n"
        );
    }
    Ok(())
}

#[test]
fn garbage_is_answered_and_hurts_nobody() -> Result<()> {
    let bed = Watched::start(&[])?;
    for (line, part) in [
        (&b"\x00\xff\xfe garbage\n"[..], "no request of this protocol"),
        (b"{}\n", "no request of this protocol"),
        (
            b"{\"version\":1,\"request\":\"fly\"}\n",
            "no request of this protocol",
        ),
        (
            b"{\"version\":2,\"request\":\"status\"}\n",
            "version 2 of the protocol is not spoken here: 1 is",
        ),
        (&[b'['; 4000], "no request of this protocol"),
        (&[b'x'; 100_000], "longer than 4096 bytes"),
    ] {
        let mut stream = UnixStream::connect(bed.daemon.admin_socket())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // The daemon may have hung up before all is written.
        let _ = stream.write_all(line);
        if !line.ends_with(b"\n") {
            let _ = stream.write_all(b"\n");
        }
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        let answer: Value = serde_json::from_str(&answer).with_context(|| answer.clone())?;
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(part), "{answer}");
    }
    for request in [
        &b"\x16\x03\x01\x00\xff garbage\r\n\r\n"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        &[b'a'; 200_000],
    ] {
        let mut stream = connect(&bed.topology.gateway, METRICS.parse()?)?;
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 200"));
    }
    let mut stream = connect(&bed.topology.gateway, METRICS.parse()?)?;
    stream.write_all(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    bed.still_works()
}

#[test]
fn thousand_idle_connections_keep_nobody_out() -> Result<()> {
    let bed = Watched::start(&[])?;
    let metrics: SocketAddr = METRICS.parse()?;
    let http = (0..1000).map(|_| connect(&bed.topology.gateway, metrics));
    let http: Vec<TcpStream> = http.collect::<Result<_>>()?;
    let admin = (0..1000).map(|_| UnixStream::connect(bed.daemon.admin_socket()));
    let admin: Vec<UnixStream> = admin.collect::<std::io::Result<_>>()?;
    let descriptors = fs::read_dir(format!("/proc/{}/fd", bed.daemon.pid()))?.count();
    assert!(descriptors < 200, "{descriptors} descriptors");
    bed.still_works()?;
    drop((http, admin));
    bed.still_works()
}

#[test]
fn slow_readers_and_writers_keep_nobody_waiting() -> Result<()> {
    let bed = Watched::start(&[])?;
    let _flows: Vec<Connection> = (0..20).map(|_| bed.flow(Family::V4)).collect::<Result<_>>()?;
    let mut asked = UnixStream::connect(bed.daemon.admin_socket())?;
    asked.set_nonblocking(true)?;
    // Asks on and on, and reads nothing, until the daemon takes no more of it.
    let question = b"{\"version\":1,\"request\":\"flows\"}\n".repeat(100);
    let mut stuck = None;
    let deadline = Instant::now() + PATIENCE;
    while stuck.is_none_or(|since: Instant| since.elapsed() < Duration::from_millis(300)) {
        ensure!(Instant::now() < deadline, "the daemon buffers without end");
        match asked.write(&question) {
            Ok(_) => stuck = None,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                stuck.get_or_insert_with(Instant::now);
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => bail!(error),
        }
    }
    let mut slow = connect(&bed.topology.gateway, METRICS.parse()?)?;
    slow.write_all(b"GET /metr")?;
    bed.still_works()?;
    // Ten seconds are all that it gets.
    let begun = Instant::now();
    assert_eq!(slow.read(&mut [0])?, 0);
    assert!(begun.elapsed() < Duration::from_secs(15));
    bed.still_works()
}

#[test]
fn scrape_of_many_flows_takes_little() -> Result<()> {
    const FLOWS: usize = 1000;
    let bed = Watched::start(&[])?;
    let flows: Vec<Connection> = (0..FLOWS).map(|_| bed.flow(Family::V4)).collect::<Result<_>>()?;
    let begun = Instant::now();
    let scrape = bed.scrape()?;
    println!("a scrape of {FLOWS} flows took {:?}", begun.elapsed());
    assert_eq!(scrape.of("pepsal_flows_open", &[]), FLOWS as f64);
    // No more lines than for none.
    assert!(scrape.0.len() < 150, "{} samples", scrape.0.len());
    assert_eq!(bed.flows(&[])?["list"].as_array().map(Vec::len), Some(FLOWS));
    drop(flows);
    Ok(())
}

#[test]
fn top_draws_what_is_there() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let flow = bed.flow(Family::V4)?;
    (&flow.client).write_all(&[1; 5000])?;
    (&flow.server).read_exact(&mut [0; 5000])?;
    let output = bed.pepsal(&["top", "--once", "--interval", "100ms", "--size", "160x24"])?;
    let shown = String::from_utf8(output.stdout)?;
    assert_eq!(shown.lines().count(), 24, "{shown}");
    for part in [
        "1 of 2112 flows",
        "sat0: ",
        &flow.client.local_addr()?.to_string(),
        &flow.client.peer_addr()?.to_string(),
    ] {
        assert!(shown.contains(part), "no {part}:\n{shown}");
    }
    Ok(())
}

#[test]
fn top_gives_the_terminal_back() -> Result<()> {
    let bed = Watched::start(&[])?;
    let top = format!(
        "{} top --interval 100ms --admin-socket {}",
        Daemon::command(&bed.topology.gateway, &[])?
            .get_program()
            .display(),
        bed.daemon.admin_socket().display()
    );
    // `script` gives it a terminal.
    let mut script = Command::new("script")
        .args(["-qec", &top, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut keys = script.stdin.take().context("a pipe")?;
    let mut output = script.stdout.take().context("a pipe")?;
    let reader = thread::spawn(move || {
        let mut shown = Vec::new();
        output.read_to_end(&mut shown).map(|_| shown)
    });
    // Any of these keys ends it once it reads them.
    eventually(PATIENCE, || {
        let _ = keys.write_all(b"q");
        script.try_wait().is_ok_and(|ended| ended.is_some())
    });
    assert!(script.wait()?.success());
    let shown = reader.join().expect("no panic")?;
    let shown = String::from_utf8_lossy(&shown);
    let (entered, left) = (shown.find("\x1b[?1049h"), shown.rfind("\x1b[?1049l"));
    assert!(entered.is_some() && left > entered, "{shown:?}");
    Ok(())
}

#[test]
fn doctor_finds_what_keeps_pepsal_from_working() -> Result<()> {
    let topology = Topology::new()?;
    let gateway = &topology.gateway;
    let doctor = || -> Result<(bool, Vec<String>)> {
        let arguments = ["doctor", "--json", "-i", "lan0", "-i", "sat0", "-f"];
        let output = Daemon::command(gateway, &arguments)?.output()?;
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let bad = |finding: &&Value| finding["severity"] == "error" || finding["severity"] == "warning";
        let shown = |finding: &Value| {
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}: {}", text("severity"), text("check"), text("what"))
        };
        let bad = findings.iter().filter(bad).map(shown).collect();
        Ok((output.status.success(), bad))
    };
    let expect = |severity: &str, check: &str, part: &str| -> Result<()> {
        let (works, findings) = doctor()?;
        assert_eq!(works, severity != "error", "{findings:#?}");
        let start = format!("{severity}: {check}: ");
        let is_there = findings
            .iter()
            .any(|finding| finding.starts_with(&start) && finding.contains(part));
        assert!(is_there, "no {start}… {part} in {findings:#?}");
        Ok(())
    };
    gateway.sysctl("net.ipv4.tcp_fastopen", 1)?;
    expect("warning", "fast open", "not allowed for both legs")?;
    gateway.sysctl("net.ipv4.tcp_fastopen", 3)?;
    assert_eq!(doctor()?, (true, vec![]));

    gateway.sysctl("net.ipv4.conf.lan0.forwarding", 0)?;
    expect("error", "forwarding", "ipv4 is not forwarded from lan0")?;
    gateway.sysctl("net.ipv4.conf.lan0.forwarding", 1)?;

    run(gateway, "tc qdisc add dev lan0 clsact")?;
    run(gateway, "tc filter add dev lan0 ingress u32 match u32 0 0")?;
    expect("warning", "TC programs", "u32 by a filter on lan0")
}

fn run(namespace: &Namespace, command: &str) -> Result<()> {
    let words: Vec<&str> = command.split(' ').collect();
    let status = namespace.command(words[0]).args(&words[1..]).status()?;
    ensure!(status.success(), "{command}");
    Ok(())
}

#[test]
fn doctor_knows_pepsals_own_from_others() -> Result<()> {
    let bed = Watched::start(&[])?;
    let arguments = ["doctor", "-i", "lan0", "-i", "sat0"];
    let output = Daemon::command(&bed.topology.gateway, &arguments)?.output()?;
    let shown = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && !shown.contains("WARNING"), "{shown}");
    Ok(())
}

#[test]
fn dashboard_alerts_and_documents_name_what_is_exported() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let _flow = bed.flow(Family::V4)?;
    let scrape = bed.eventually_scraped(|scrape| scrape.names().contains("pepsal_link_rtt_seconds"))?;
    let exported = scrape.names();
    let [dashboard, rules, documented] = [
        "packaging/grafana/pepsal.json",
        "packaging/prometheus/pepsal.rules.yml",
        "docs/metrics.md",
    ]
    .map(|path| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)));
    for text in [&dashboard?, &rules?] {
        for name in metric_names(text) {
            assert!(exported.contains(&name), "{name} is not exported");
        }
        for (label, value) in label_values(text) {
            let is_exported = scrape
                .0
                .keys()
                .any(|sample| sample.contains(&format!("{label}=\"{value}\"")));
            assert!(is_exported, "nothing is exported with {label}=\"{value}\"");
        }
    }
    let family = |name: &str| {
        let suffixes = ["_bucket", "_sum", "_count"];
        let histogram = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        histogram.unwrap_or(name).to_owned()
    };
    let exported: BTreeSet<String> = exported.iter().map(|name| family(name)).collect();
    let table = documented?;
    let table: String = table
        .lines()
        .filter(|line| line.starts_with("| `pepsal_"))
        .collect();
    assert_eq!(metric_names(&table), exported);
    Ok(())
}

/// What Grafana's dashboard schema asks for.
#[test]
fn dashboard_has_what_grafana_needs() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/grafana/pepsal.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(path)?)?;
    assert!(
        dashboard["schemaVersion"]
            .as_u64()
            .is_some_and(|version| version >= 36)
    );
    for text in ["uid", "title", "timezone"] {
        assert!(dashboard[text].is_string(), "{text}");
    }
    assert!(dashboard["time"]["from"].is_string() && dashboard["templating"]["list"].is_array());
    let panels = dashboard["panels"].as_array().context("panels")?;
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().context("a title")?;
        assert!(panel["type"].is_string(), "{title}");
        assert!(
            ids.insert(panel["id"].as_u64()),
            "{title}: its id is another's too"
        );
        let place = |key: &str| panel["gridPos"][key].as_u64().context("a place in the grid");
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        assert!(x + w <= 24, "{title} is wider than the grid");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title} overlaps another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["datasource"]["type"] == "prometheus", "{title}");
        let targets = panel["targets"].as_array().context("targets")?;
        let mut names = BTreeSet::new();
        for target in targets {
            assert!(
                names.insert(target["refId"].as_str().context("a refId")?),
                "{title}"
            );
            assert!(
                target["expr"]
                    .as_str()
                    .is_some_and(|expr| expr.contains("pepsal_")),
                "{title}"
            );
        }
        assert!(!targets.is_empty(), "{title}");
    }
    Ok(())
}

#[test]
fn every_alert_says_why() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus/pepsal.rules.yml");
    let rules = fs::read_to_string(path)?;
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(!alerts.is_empty());
    for alert in alerts {
        for part in ["expr:", "severity:", "summary:", "reason:", "action:"] {
            assert!(alert.contains(part), "no {part} in {alert}");
        }
    }
    Ok(())
}

/// Every name of a metric in a text.
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words
        .filter(|word| word.starts_with("pepsal_"))
        .map(str::to_owned)
        .collect()
}

/// What a text asks of the labels that have a fixed set of values.
fn label_values(text: &str) -> Vec<(&'static str, String)> {
    let text = text.replace('\\', "");
    let mut values = Vec::new();
    for label in ["verdict", "reason", "event", "direction"] {
        for (at, _) in text.match_indices(label) {
            let rest = &text[at + label.len()..];
            let Some(rest) = ["=\"", "=~\"", "!=\""]
                .iter()
                .find_map(|op| rest.strip_prefix(op))
            else {
                continue;
            };
            let value = rest.split('"').next().unwrap_or_default();
            values.extend(value.split('|').map(|value| (label, value.to_owned())));
        }
    }
    values
}

/// A bed whose daemon is asked about itself.
struct Watched(Bed);

impl Deref for Watched {
    type Target = Bed;

    fn deref(&self) -> &Bed {
        &self.0
    }
}

impl Watched {
    fn start(arguments: &[&str]) -> Result<Self> {
        Bed::start(arguments).map(Self)
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        get(&self.topology.gateway, METRICS.parse()?, path)
    }

    fn scrape(&self) -> Result<Scrape> {
        let (status, text) = self.get("/metrics")?;
        ensure!(status == 200, "{status}: {text}");
        Scrape::parse(&text)
    }

    fn eventually_scraped(&self, holds: impl Fn(&Scrape) -> bool) -> Result<Scrape> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let scrape = self.scrape()?;
            if holds(&scrape) {
                return Ok(scrape);
            }
            ensure!(
                Instant::now() < deadline,
                "it does not come to hold:\n{scrape:#?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a command that asks this daemon.
    fn pepsal(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Daemon::command(&self.topology.gateway, arguments)?;
        command.arg("--admin-socket").arg(self.daemon.admin_socket());
        Ok(command.stdin(Stdio::null()).output()?)
    }

    fn flows(&self, arguments: &[&str]) -> Result<Value> {
        let interval: &[&str] = if arguments.contains(&"--interval") {
            &[]
        } else {
            &["--interval", "0"]
        };
        let output = self.pepsal(&[&["flows", "--json"], interval, arguments].concat())?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Both sockets answer, and connections are relayed.
    fn still_works(&self) -> Result<()> {
        assert_eq!(self.get("/healthz")?.0, 200);
        self.scrape()?;
        assert!(self.flows(&[])?["total"].is_u64());
        self.flow(Family::V4)?.greet()
    }
}

fn send_and_read(mut stream: &TcpStream) -> std::io::Result<usize> {
    stream.write_all(b"hello")?;
    stream.read(&mut [0])
}

fn connect(namespace: &Namespace, address: SocketAddr) -> Result<TcpStream> {
    let stream = namespace.run(|| TcpStream::connect_timeout(&address, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Status and body.
fn get(namespace: &Namespace, address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = connect(namespace, address)?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: pepsal\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of the head")?;
    let status = head.split(' ').nth(1).context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// One line there, one line back.
fn ask(path: &Path, question: &Value) -> Result<Value> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "{question}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// Samples by name and labels, as they are written.
#[derive(Debug)]
struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with("# EOF\n"), "cut short:\n{text}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| -> Result<(String, f64)> {
            let (name, value) = line.rsplit_once(' ').context("no value")?;
            Ok((name.to_owned(), value.parse()?))
        };
        samples
            .map(|line| sample(line).with_context(|| line.to_owned()))
            .collect::<Result<_>>()
            .map(Self)
    }

    fn names(&self) -> BTreeSet<String> {
        let name = |sample: &String| sample.split('{').next().unwrap_or_default().to_owned();
        self.0.keys().map(name).collect()
    }

    fn of(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let sample = match labels.is_empty() {
            true => name.to_owned(),
            false => format!("{name}{{{}}}", labels.join(",")),
        };
        let value = self.0.get(&sample);
        *value.unwrap_or_else(|| panic!("no {sample} in {:#?}", self.0))
    }
}
