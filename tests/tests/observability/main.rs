//! What the daemon shows of itself, held against what is so: metrics, the admin socket, and the commands that ask it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pepsal_tests::{Bed, Daemon, Family, Namespace, PATIENCE};
use serde_json::Value;

use scrape::Scrape;

mod clients;
mod dashboard;
mod doctor;
mod flows;
mod metrics;
mod scrape;
mod socket;
mod top;

const MIB: u64 = 1 << 20;
const METRICS: &str = "127.0.0.1:9300";

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
