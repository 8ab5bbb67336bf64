//! Client, gateway with a contender, and server.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ChildStdin, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use pepsal_tests::{Daemon, Family, Namespace, Topology, is_listening};

use super::{
    contender::Contender,
    end::{Answer, Order},
    firewall,
    haproxy::Haproxy,
    process::{self, Process},
};
use crate::{shell, signals::Signals};

/// Parameters of all lanes.
pub struct Equipment<'a> {
    pub daemon: PathBuf,
    /// Another build of the daemon, as a separate contender.
    pub old_build: Option<PathBuf>,
    /// Whether every gateway has a firewall.
    pub firewall: bool,
    /// Further arguments of the daemon.
    pub arguments: Vec<String>,
    /// Congestion control of ends and gateway.
    pub congestion: String,
    /// Connection limit of every proxy.
    pub most_flows: usize,
    pub signals: &'a Signals,
}

const ALL_PORTS: &str = "1024 65535";
/// With a firewall a transparent proxy must not use a port that the client uses at the same time: conntrack
/// has one entry for both connections and drops SYNs. Namespaces of one kernel choose the same ports more
/// often than two hosts.
const PORT_HALVES: [&str; 2] = ["1024 32767", "32768 65535"];
/// Number of flows with ports of one half of the range.
pub const MOST_FLOWS_WITH_FIREWALL: u64 = 30_000;
const SERVER_PORT: u16 = 8080;
const IPERF_PORT: u16 = 5201;
const PATIENCE: Duration = Duration::from_secs(20);

/// A running lane; dropping it removes everything.
///
/// The thread that created it has to drop it: the processes end with that thread.
pub struct Lane<'a> {
    // Fields drop in order: processes end before their namespaces.
    proxy: Proxy,
    client: Client<'a>,
    _servers: [Process; 2],
    topology: Topology,
    signals: &'a Signals,
}

enum Proxy {
    None,
    Pepsal(Option<Daemon>),
    Haproxy(Haproxy),
}

impl<'a> Lane<'a> {
    /// Creates the topology and starts the processes.
    pub fn new(contender: Contender, equipment: &Equipment<'a>) -> Result<Self> {
        let topology = Topology::new()?;
        for namespace in [&topology.client, &topology.gateway, &topology.server] {
            namespace.sysctl("net.ipv4.tcp_congestion_control", &equipment.congestion)?;
            namespace.sysctl("net.ipv4.ip_local_port_range", ALL_PORTS)?;
        }
        let signals = equipment.signals;
        if equipment.firewall {
            let [low, high] = PORT_HALVES;
            topology.client.sysctl("net.ipv4.ip_local_port_range", low)?;
            topology.gateway.sysctl("net.ipv4.ip_local_port_range", high)?;
            firewall::set_up(&topology.gateway, &[SERVER_PORT, IPERF_PORT], signals)?;
        }
        let servers = [
            request_server(&topology, signals)?,
            iperf_server(&topology, signals)?,
        ];
        let client = Client::start(&topology.client, signals)?;
        let proxy = match contender {
            Contender::Forwarding => Proxy::None,
            Contender::OldBuild => {
                let old_build = equipment.old_build.as_deref().context("an old build was given")?;
                Proxy::Pepsal(Some(pepsal(old_build, &topology.gateway, equipment)?))
            }
            Contender::Pepsal => {
                Proxy::Pepsal(Some(pepsal(&equipment.daemon, &topology.gateway, equipment)?))
            }
            Contender::Haproxy => {
                Proxy::Haproxy(Haproxy::start(&topology.gateway, equipment.most_flows, signals)?)
            }
        };
        Ok(Self {
            proxy,
            client,
            _servers: servers,
            topology,
            signals,
        })
    }

    /// Sends a command to the client, with a timeout of `limit`.
    pub fn order(&mut self, order: &Order, limit: Duration) -> Result<Answer> {
        self.client.order(order, limit)
    }

    pub fn server(&self, family: Family) -> SocketAddr {
        SocketAddr::new(family.server(), SERVER_PORT)
    }

    /// Runs a command in the client's namespace and returns its output.
    pub fn run_in_client(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<String> {
        let mut command = self.topology.client.command(program);
        process::output(command.args(arguments), limit, self.signals)
    }

    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// Returns the process of the proxy, if there is one.
    pub fn proxy_pid(&self) -> Option<u32> {
        match &self.proxy {
            Proxy::None => None,
            Proxy::Pepsal(daemon) => daemon.as_ref().map(Daemon::pid),
            Proxy::Haproxy(haproxy) => Some(haproxy.pid()),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if let Self::Pepsal(daemon) = self
            && let Some(daemon) = daemon.take()
        {
            // A signal first, so that the daemon removes its control group; a kill follows after a timeout.
            let _ = daemon.terminate();
        }
    }
}

fn pepsal(daemon: &Path, gateway: &Namespace, equipment: &Equipment<'_>) -> Result<Daemon> {
    let most_flows = equipment.most_flows.to_string();
    let mut arguments = vec![
        "-i",
        "lan0",
        "-i",
        "sat0",
        "-c",
        &most_flows,
        "--drain-timeout",
        "1s",
    ];
    arguments.extend(equipment.arguments.iter().map(String::as_str));
    Daemon::start_quiet(daemon, gateway, &arguments)
}

fn request_server(topology: &Topology, signals: &Signals) -> Result<Process> {
    let mut command = topology.server.command(std::env::current_exe()?);
    command
        .args(["bench", "relay-end", "server", &format!("[::]:{SERVER_PORT}")])
        .stdin(Stdio::piped());
    listening(&mut command, topology, SERVER_PORT, signals)
}

fn iperf_server(topology: &Topology, signals: &Signals) -> Result<Process> {
    let mut command = topology.server.command("iperf3");
    command.arg("-s").stdin(Stdio::null());
    listening(&mut command, topology, IPERF_PORT, signals)
}

/// Starts a server and waits until it listens.
fn listening(
    command: &mut std::process::Command,
    topology: &Topology,
    port: u16,
    signals: &Signals,
) -> Result<Process> {
    let line = shell::line(command);
    let mut server = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
    process::wait_until(&format!("`{line}` listens"), PATIENCE, signals, || {
        server.has_ended() || is_listening(&topology.server, Family::V6, port)
    })?;
    if server.has_ended() {
        bail!("`{line}` has ended");
    }
    Ok(server)
}

struct Client<'a> {
    process: Process,
    orders: ChildStdin,
    answers: Receiver<String>,
    signals: &'a Signals,
}

impl<'a> Client<'a> {
    fn start(namespace: &Namespace, signals: &'a Signals) -> Result<Self> {
        let mut command = namespace.command(std::env::current_exe()?);
        command
            .args(["bench", "relay-end", "client"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let orders = process
            .child()
            .stdin
            .take()
            .context("stdin was asked to be piped")?;
        let stdout = process
            .child()
            .stdout
            .take()
            .context("stdout was asked to be piped")?;
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stdout)
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Ok(Self {
            process,
            orders,
            answers,
            signals,
        })
    }

    fn order(&mut self, order: &Order, limit: Duration) -> Result<Answer> {
        let line = serde_json::to_string(order)?;
        writeln!(self.orders, "{line}").context("the client has ended")?;
        let answer = process::receive(&self.answers, limit, self.signals)
            .with_context(|| format!("client (process {}), {line}", self.process.id()))?;
        let answer: Answer = serde_json::from_str(&answer).context("the client's answer")?;
        match answer.error {
            Some(error) => bail!("client, {line}: {error}"),
            None => Ok(answer),
        }
    }
}
