//! A gateway with rules of its own, and what becomes of connections through it.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{
    Builder, Cancel, Capture, Connector, Daemon, Family, LAN, Namespace, Outcome, Path, Server, Session,
    Topology, Transfer, patience,
};

/// Payload of a transfer that shows that a connection works.
pub const MEGABYTE: u64 = 1_000_000;

/// How long a client waits in vain before a packet filter is said to have dropped its SYN: longer than the first
/// retransmission takes.
const SILENCE: Duration = Duration::from_millis(1500);

/// Gives up on a silent server soon, so that the reset that the client then gets does not take a minute.
pub const HASTY: &[&str] = &["--connect-timeout", "1s"];

/// The chain `forward`, `input` or `output` of the table `inet filter`, at that hook.
pub fn filter(hook: &str, policy: &str, rules: &str) -> String {
    chain(
        "inet filter",
        hook,
        &format!("filter hook {hook} priority filter"),
        policy,
        rules,
    )
}

/// A chain of the same table which sees packets after conntrack, and before they are routed if its hook is `prerouting`.
pub fn mangle(hook: &str, rules: &str) -> String {
    chain(
        "inet filter",
        hook,
        &format!("filter hook {hook} priority mangle"),
        "accept",
        rules,
    )
}

/// A chain that translates addresses, in the table `nat` of a family.
pub fn nat(family: &str, hook: &str, rules: &str) -> String {
    let priority = match hook {
        "prerouting" => "dstnat",
        _ => "srcnat",
    };
    let place = format!("nat hook {hook} priority {priority}");
    chain(&format!("{family} nat"), hook, &place, "accept", rules)
}

fn chain(table: &str, name: &str, place: &str, policy: &str, rules: &str) -> String {
    format!(
        "table {table} {{
             chain {name} {{
                 type {place}; policy {policy};
                 {rules}
             }}
         }}\n"
    )
}

/// A gateway to be set up.
pub struct Scenario {
    builder: Builder,
    rules: String,
    prepare: Vec<fn(&Topology) -> Result<()>>,
    daemons: Vec<Vec<&'static str>>,
}

impl Scenario {
    /// A gateway with a ruleset in nft's language. It may use the ports `$open`, `$closed`, `$inside` and `$local` of
    /// [`Host`]'s servers, and the addresses `$client4`, `$other4`, `$server4` and `$gateway4`, likewise with 6.
    pub fn new(rules: impl Into<String>) -> Self {
        Self {
            builder: Topology::builder(),
            rules: rules.into(),
            prepare: Vec::new(),
            daemons: Vec::new(),
        }
    }

    /// Varies the topology.
    pub fn topology(self, vary: impl FnOnce(Builder) -> Builder) -> Self {
        Self {
            builder: vary(self.builder),
            ..self
        }
    }

    /// Sets up more than rules, before them.
    pub fn prepare(mut self, prepare: fn(&Topology) -> Result<()>) -> Self {
        self.prepare.push(prepare);
        self
    }

    /// Runs a daemon with these arguments; one with [`LAN`] if this is not called.
    pub fn daemon(mut self, arguments: &[&[&'static str]]) -> Self {
        self.daemons.push(arguments.concat());
        self
    }

    /// Sets the gateway up and runs `check`, first without pepsal, then anew with it.
    pub fn holds(mut self, check: impl Fn(&Host) -> Result<()>) -> Result<()> {
        eprintln!("== without pepsal");
        check(&self.host(Path::Forwarded)?).context("without pepsal, where the test itself has to pass")?;
        if self.daemons.is_empty() {
            self.daemons.push(LAN.to_vec());
        }
        eprintln!("== with pepsal");
        let host = self.host(Path::Split)?;
        let daemons = self.daemons.iter().map(|arguments| {
            Daemon::start(&host.topology.gateway, arguments).context("start with the host's rules in effect")
        });
        let daemons: Vec<_> = daemons.collect::<Result<_>>()?;
        check(&host).context("with pepsal")?;
        for daemon in daemons {
            let exit = daemon.terminate()?;
            // What is zero is not in the log.
            ensure!(
                exit.status.success() && exit.log.contains("flows: accepted="),
                "a daemon fails or has taken nothing:\n{}",
                exit.log
            );
        }
        Ok(())
    }

    /// The same, with a check of each family.
    pub fn holds_for_each_family(self, check: impl Fn(&Host, Family) -> Result<()>) -> Result<()> {
        self.holds(|host| {
            Family::BOTH
                .into_iter()
                .try_for_each(|family| check(host, family))
        })
    }

    fn host(&self, path: Path) -> Result<Host> {
        let topology = self.builder.extra_clients(1).build()?;
        let host = Host {
            open: Server::start(&topology.server)?,
            closed: Server::start(&topology.server)?,
            inside: Server::start(&topology.client)?,
            local: Server::start(&topology.gateway)?,
            path,
            topology,
        };
        for prepare in &self.prepare {
            prepare(&host.topology).context("prepare")?;
        }
        host.topology
            .gateway
            .nft([&host.definitions(), &*self.rules].concat())?;
        Ok(host)
    }
}

/// A gateway that is set up, with servers around it.
pub struct Host {
    /// Client, gateway and server.
    pub topology: Topology,
    /// At the server: a service that rules let clients use.
    pub open: Server,
    /// At the server: a service that rules keep them from.
    pub closed: Server,
    /// At the client.
    pub inside: Server,
    /// At the gateway.
    pub local: Server,
    /// Which path connections take: whether a daemon runs.
    pub path: Path,
}

impl Host {
    /// A connection from the client to the server.
    pub fn outwards(&self, family: Family, server: &Server) -> Attempt<'_> {
        Attempt {
            path: self.path,
            from: &self.topology.client,
            source: (family.client(), 0).into(),
            target: &self.topology.server,
            to: (family.server(), server.port()).into(),
        }
    }

    /// A connection from another client to the server.
    pub fn outwards_from_other(&self, family: Family, server: &Server) -> Attempt<'_> {
        Attempt {
            source: (family.extra_client(0), 0).into(),
            ..self.outwards(family, server)
        }
    }

    /// A connection from the server to the client.
    pub fn inwards(&self, family: Family) -> Attempt<'_> {
        Attempt {
            path: self.path,
            from: &self.topology.server,
            source: (family.server(), 0).into(),
            target: &self.topology.client,
            to: (family.client(), self.inside.port()).into(),
        }
    }

    /// Connections from both sides work.
    pub fn serves_both_sides(&self) -> Result<()> {
        for family in Family::BOTH {
            self.outwards(family, &self.open).is_served()?;
            self.inwards(family).is_served()?;
        }
        Ok(())
    }

    /// What a named counter of the table `inet filter` has counted.
    pub fn counter(&self, name: &str) -> Result<Count> {
        let list = self
            .topology
            .gateway
            .command("nft")
            .args(["list", "counter", "inet", "filter", name])
            .output()?;
        let text = String::from_utf8(list.stdout)?;
        let number = |name| -> Result<u64> {
            let mut words = text.split_whitespace().skip_while(|word| *word != name);
            let number = words.nth(1).with_context(|| format!("no {name} in {text:?}"))?;
            Ok(number.parse()?)
        };
        Ok(Count {
            packets: number("packets")?,
            bytes: number("bytes")?,
        })
    }

    fn definitions(&self) -> String {
        let ports = [
            ("open", &self.open),
            ("closed", &self.closed),
            ("inside", &self.inside),
            ("local", &self.local),
        ]
        .map(|(name, server)| format!("define {name} = {}\n", server.port()));
        let addresses = [(Family::V4, 4), (Family::V6, 6)].map(|(family, number)| {
            format!(
                "define client{number} = {}
                 define other{number} = {}
                 define server{number} = {}
                 define gateway{number} = {}\n",
                family.client(),
                family.extra_client(0),
                family.server(),
                family.gateway()
            )
        });
        [ports.concat(), addresses.concat()].concat()
    }
}

/// A counter of nftables.
#[derive(Clone, Copy, Debug)]
pub struct Count {
    /// What the host's stack took for one, which may be many segments (GRO).
    pub packets: u64,
    /// With IP headers.
    pub bytes: u64,
}

/// A connection to be attempted.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    path: Path,
    from: &'a Namespace,
    source: SocketAddr,
    target: &'a Namespace,
    to: SocketAddr,
}

impl Attempt<'_> {
    /// Connects from a port, and from the next one if it connects again.
    pub fn source_port(mut self, port: u16) -> Self {
        self.source.set_port(port);
        self
    }

    /// Connects to another address.
    pub fn destination(mut self, address: IpAddr) -> Self {
        self.to.set_ip(address);
        self
    }

    /// The connection works, is split where there is a daemon, and the server sees the client's address and port.
    pub fn is_served(&self) -> Result<()> {
        for outcome in self.megabytes()? {
            ensure!(
                outcome.peer == outcome.local,
                "{self}: the server sees {} instead of {}",
                outcome.peer,
                outcome.local
            );
        }
        Ok(())
    }

    /// The same, but the server sees `address` instead of the client's.
    pub fn is_served_as(&self, address: IpAddr) -> Result<()> {
        for outcome in self.megabytes()? {
            ensure!(
                outcome.peer.ip() == address,
                "{self}: the server sees {} instead of {address}",
                outcome.peer.ip()
            );
        }
        Ok(())
    }

    /// A connection that has carried a byte from the server, and stays open.
    pub fn session(&self) -> Result<Session> {
        let session = Session::open(
            &self.connector(Connector::default()),
            self.from,
            self.to,
            &Cancel::default(),
        )?;
        session.download(1, 1)?;
        Ok(session)
    }

    /// A byte comes from the server, over one connection, which is split where there is a daemon.
    pub fn is_accepted(&self) -> Result<()> {
        self.run(&Transfer::download(1), Connector::default()).map(drop)
    }

    /// Nothing reaches the server. The client gets no answer; with a daemon it gets one, and a reset once that has given
    /// up.
    pub fn is_dropped(&self) -> Result<()> {
        let seen = Capture::start(self.target, "eth0")?;
        let (timeout, expected) = if self.path == Path::Split {
            (Connector::default().timeout, ErrorKind::ConnectionReset)
        } else {
            (patience(SILENCE), ErrorKind::TimedOut)
        };
        let kind = self.failure(timeout)?;
        ensure!(kind == expected, "{self}: {kind:?} instead of {expected:?}");
        self.ensure_unseen(&seen)
    }

    /// Nothing reaches the server, and the client is told so before a daemon would have given up on a silent server.
    pub fn is_rejected(&self) -> Result<()> {
        let seen = Capture::start(self.target, "eth0")?;
        let kind = self.failure(Connector::default().timeout)?;
        let is_reset = matches!(kind, ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused);
        // Without a daemon an ICMP error has a kind of its own.
        let is_unreachable = matches!(
            kind,
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::PermissionDenied
        );
        ensure!(
            is_reset || (is_unreachable && self.path == Path::Forwarded),
            "{self}: {kind:?} instead of a reset"
        );
        self.ensure_unseen(&seen)
    }

    /// A transfer that arrives intact over a connection that is split where there is a daemon.
    pub fn run(&self, transfer: &Transfer, connector: Connector) -> Result<Outcome> {
        let outcome = transfer
            .clone()
            .connector(self.connector(connector))
            .run(self.from, self.to)
            .with_context(|| self.to_string())?;
        ensure!(outcome.intact, "{self}: damaged");
        ensure!(
            outcome.path() == self.path,
            "{self}: {:?} instead of {:?}",
            outcome.path(),
            self.path
        );
        Ok(outcome)
    }

    fn megabytes(&self) -> Result<[Outcome; 2]> {
        let next_port = self.source.port().checked_add(1).filter(|port| *port > 1);
        Ok([
            self.run(&Transfer::upload(MEGABYTE), Connector::default())?,
            self.source_port(next_port.unwrap_or(0))
                .run(&Transfer::download(MEGABYTE), Connector::default())?,
        ])
    }

    fn connector(&self, connector: Connector) -> Connector {
        Connector {
            source: Some(self.source),
            ..connector
        }
    }

    /// How a connection fails that the host does not let through.
    fn failure(&self, timeout: Duration) -> Result<ErrorKind> {
        let connector = Connector {
            timeout,
            ..Connector::default()
        };
        let transfer = Transfer::download(1).connector(self.connector(connector));
        let Err(error) = transfer.run(self.from, self.to) else {
            bail!("{self} gets through");
        };
        let error = error.downcast::<io::Error>()?;
        Ok(error.kind())
    }

    fn ensure_unseen(&self, seen: &Capture) -> Result<()> {
        let mut segments = seen.segments()?.into_iter();
        let is_ours = |ends: (SocketAddr, SocketAddr)| ends.0.ip() == self.source.ip() && ends.1 == self.to;
        let segment = segments.find(|segment| is_ours((segment.source, segment.destination)));
        ensure!(segment.is_none(), "{self}: the server gets {segment:?}");
        Ok(())
    }
}

impl std::fmt::Display for Attempt<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} to {}", self.source, self.to)
    }
}
