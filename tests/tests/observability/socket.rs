//! Where metrics and the admin socket are served, and who keeps them busy.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{Connection, Daemon, Family, Listener, PATIENCE, Topology};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{METRICS, Watched, ask, connect, get};

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
fn garbage_is_answered_and_hurts_nobody() -> Result<()> {
    let bed = Watched::start(&[])?;
    for (line, part) in [
        (&b"\x00\xff\xfe garbage\n"[..], "not a request of this protocol"),
        (b"{}\n", "not a request of this protocol"),
        (
            b"{\"version\":1,\"request\":\"fly\"}\n",
            "not a request of this protocol",
        ),
        (
            b"{\"version\":2,\"request\":\"status\"}\n",
            "protocol version 2 is not supported: use 1",
        ),
        (&[b'['; 4000], "not a request of this protocol"),
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
    /// Connections that each of the two sockets keeps at once.
    const PLACES: usize = 16;
    let descriptors = || -> Result<usize> {
        let open = fs::read_dir(format!("/proc/{}/fd", bed.daemon.pid()))?;
        Ok(open.count())
    };
    let before = descriptors()?;
    let metrics: SocketAddr = METRICS.parse()?;
    let http = (0..1000).map(|_| connect(&bed.topology.gateway, metrics));
    let http: Vec<TcpStream> = http.collect::<Result<_>>()?;
    let admin = (0..1000).map(|_| UnixStream::connect(bed.daemon.admin_socket()));
    let admin: Vec<UnixStream> = admin.collect::<std::io::Result<_>>()?;
    let most = before + 2 * (PLACES + 1) + 8;
    let now = descriptors()?;
    assert!(now <= most, "{now} descriptors, {before} before");
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
