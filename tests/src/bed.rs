//! Client, gateway and server with a daemon on the gateway, and connections from end to end.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Deref;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::daemon::Daemon;
use crate::leg::Leg;
use crate::netns::Namespace;
use crate::socket::{Accepted, Connector, Listener};
use crate::syn::{Path, SavedSyn};
use crate::topology::{Family, Topology};
use crate::traffic::{Server, Transfer};
use crate::wait::{PATIENCE, holds_within};

/// Arguments of a daemon that intercepts on the client's side.
pub const LAN: &[&str] = &["-i", "lan0"];

/// Arguments of a daemon that intercepts on both sides.
pub const BOTH: &[&str] = &["-i", "lan0", "-i", "sat0"];

/// Payload of each transfer of [`Network::splits`].
const BULK_BYTES: u64 = 500_000;

/// A [`Topology`] whose server has a listener of each family and a [`Server`].
#[derive(Debug)]
pub struct Network {
    /// Client, gateway and server.
    pub topology: Topology,
    /// Server of transfers.
    pub server: Server,
    /// IPv4 and IPv6.
    listeners: [Listener; 2],
}

impl Network {
    /// Creates a network over two veth pairs.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Self> {
        Self::on(Topology::new()?)
    }

    /// Creates a network on a topology.
    ///
    /// # Errors
    /// When the server cannot listen.
    pub fn on(topology: Topology) -> Result<Self> {
        let listen = |family: Family| Listener::bind_any(&topology.server, family.server());
        Ok(Self {
            server: Server::start(&topology.server)?,
            listeners: [listen(Family::V4)?, listen(Family::V6)?],
            topology,
        })
    }

    /// Starts a daemon on the gateway, on both interfaces unless the arguments have interfaces or a file.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start(&self, arguments: &[&str]) -> Result<Daemon> {
        let names_interfaces = arguments.iter().any(|argument| ["-i", "-F"].contains(argument));
        let interfaces = if names_interfaces { &[] } else { BOTH };
        Daemon::start(&self.topology.gateway, &[interfaces, arguments].concat())
    }

    /// Returns the server's listener of an address family.
    pub fn listener(&self, family: Family) -> &Listener {
        match family {
            Family::V4 => &self.listeners[0],
            Family::V6 => &self.listeners[1],
        }
    }

    /// Returns the address of the server's listener of an address family.
    pub fn address(&self, family: Family) -> SocketAddr {
        self.listener(family).at(family.server())
    }

    /// Opens a connection from the client to the server.
    ///
    /// # Errors
    /// When the connection is refused, or does not arrive within [`PATIENCE`].
    pub fn open(&self, family: Family) -> Result<Connection> {
        self.open_by(&Connector::default(), family)
    }

    /// Opens a connection with the options of a connector.
    ///
    /// # Errors
    /// See [`Network::open`].
    pub fn open_by(&self, connector: &Connector, family: Family) -> Result<Connection> {
        self.open_to(connector, self.listener(family))
    }

    /// Opens a connection to another listener of the server.
    ///
    /// # Errors
    /// See [`Network::open`].
    pub fn open_to(&self, connector: &Connector, listener: &Listener) -> Result<Connection> {
        let server = Family::of(listener.address().ip()).server();
        Connection::open(connector, &self.topology.client, listener, listener.at(server))
    }

    /// Opens a connection from a port of the client, after the previous one with this port has ended.
    ///
    /// # Errors
    /// When the previous one does not end within [`PATIENCE`]; see also [`Network::open`].
    pub fn open_again(&self, family: Family, port: u16) -> Result<Connection> {
        let is_taken = |error: &anyhow::Error| {
            let error = error.downcast_ref::<io::Error>();
            error.is_some_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
        };
        let connector = Connector::from_port(family, port);
        let mut connection = self.open_by(&connector, family);
        holds_within(PATIENCE, || {
            let again = connection.as_ref().is_err_and(is_taken);
            if again {
                connection = self.open_by(&connector, family);
            }
            !again
        });
        connection
    }

    /// Opens a connection and checks that it is split.
    ///
    /// # Errors
    /// When it is forwarded; see also [`Network::open`].
    pub fn flow(&self, family: Family) -> Result<Connection> {
        self.open(family)?.split()
    }

    /// Returns another listener of the server, of an address family and with its own port.
    ///
    /// # Errors
    /// When the server cannot listen.
    pub fn another_listener(&self, family: Family) -> Result<Listener> {
        Ok(Listener::bind_any(&self.topology.server, family.server())?)
    }

    /// Opens a connection, exchanges some segments, and returns its path.
    ///
    /// # Errors
    /// When they do not arrive intact, or the server sees an address or port other than the client's.
    pub fn probe(&self, family: Family) -> Result<Path> {
        // Connections of earlier attempts are in the queues of other listeners.
        let listener = self.another_listener(family)?;
        let connection = self.open_to(&Connector::default(), &listener)?;
        connection.exchange()?;
        let (local, peer) = (connection.client.local_addr()?, connection.peer);
        ensure!(peer == local, "the server sees {peer} instead of {local}");
        Ok(connection.path())
    }

    /// Checks that connections of both address families are split, and carry payload in both directions.
    ///
    /// # Errors
    /// When they are forwarded, or payload is lost.
    pub fn splits(&self) -> Result<()> {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| splits(&self.topology.client, self.server.address(family), BULK_BYTES))
    }
}

/// Checks that connections from a client to a [`Server`] are split, and carry `bytes` in both directions.
///
/// # Errors
/// When they are forwarded, or payload is lost.
pub fn splits(client: &Namespace, server: SocketAddr, bytes: u64) -> Result<()> {
    for transfer in [Transfer::upload(bytes), Transfer::download(bytes)] {
        let outcome = transfer.run(client, server);
        let outcome = outcome.with_context(|| format!("{transfer:?} to {server}"))?;
        let (local, peer) = (outcome.local, outcome.peer);
        ensure!(outcome.intact, "{transfer:?} to {server} is damaged");
        ensure!(
            outcome.path() == Path::Split,
            "{transfer:?} to {server} is not split"
        );
        ensure!(peer == local, "the server sees {peer} instead of {local}");
    }
    Ok(())
}

/// A [`Network`] with a daemon on its gateway.
#[derive(Debug)]
pub struct Bed {
    /// The daemon on the gateway.
    pub daemon: Daemon,
    /// Network and server, which outlive the daemon.
    pub network: Network,
}

impl Bed {
    /// Starts a daemon on a new network: see [`Network::start`].
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start(arguments: &[&str]) -> Result<Self> {
        Self::on(Topology::new()?, arguments)
    }

    /// Starts a daemon on a topology's gateway.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn on(topology: Topology, arguments: &[&str]) -> Result<Self> {
        let network = Network::on(topology)?;
        Ok(Self {
            daemon: network.start(arguments)?,
            network,
        })
    }
}

impl Bed {
    /// Returns a leg of a flow with its present state, if it exists.
    ///
    /// # Errors
    /// See [`Leg::all`].
    pub fn leg(&self, flow: &Connection, side: Side) -> Result<Option<Leg>> {
        // Server legs with the gateway's address are sockets of the host.
        let legs = [self.daemon.legs()?, Leg::all(&self.topology.gateway)?].concat();
        let (client, server) = (flow.client.local_addr()?, flow.client.peer_addr()?);
        Ok(legs.into_iter().find(|leg| match side {
            Side::Client => (leg.local, leg.peer) == (server, client),
            Side::Server => (leg.local, leg.peer) == (flow.peer, server),
        }))
    }

    /// Waits until a property of a leg has the expected value.
    ///
    /// # Panics
    /// When it has another value after [`PATIENCE`], which the message contains.
    #[track_caller]
    pub fn expect<T: PartialEq + Debug>(
        &self,
        flow: &Connection,
        side: Side,
        property: impl Fn(&Leg) -> T,
        expected: T,
    ) {
        let (mut leg, mut seen) = (None, None);
        let holds = holds_within(PATIENCE, || {
            leg = self.leg(flow, side).expect("ss shows legs");
            seen = leg.as_ref().map(&property);
            seen.as_ref() == Some(&expected)
        });
        assert!(holds, "{side:?} leg: {seen:?} instead of {expected:?}: {leg:?}");
    }
}

impl Deref for Bed {
    type Target = Network;

    fn deref(&self) -> &Network {
        &self.network
    }
}

/// The side of an end of a connection, and of its leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client, with the client leg.
    Client,
    /// The server, with the server leg.
    Server,
}

impl Side {
    /// Client and server.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// Returns the gateway's interface of this side's legs.
    pub fn interface(self) -> &'static str {
        match self {
            Self::Client => "lan0",
            Self::Server => "sat0",
        }
    }

    /// Returns the other side.
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// A connection with both its ends.
#[derive(Debug)]
pub struct Connection {
    /// The client's end.
    pub client: TcpStream,
    /// The server's end.
    pub server: TcpStream,
    /// The client's address and port that the server sees.
    pub peer: SocketAddr,
    /// The SYN that the server received.
    pub syn: SavedSyn,
}

impl Connection {
    /// Connects from a namespace to a listener with this address.
    ///
    /// # Errors
    /// When the connection is refused, or does not arrive within [`PATIENCE`].
    pub fn open(
        connector: &Connector,
        client: &Namespace,
        listener: &Listener,
        address: SocketAddr,
    ) -> Result<Self> {
        let client = connector.connect(client, address)?;
        let server = listener.accept(PATIENCE).context("the server's end")?;
        Ok(Self::new(client, server))
    }

    /// Creates a connection from its two ends.
    pub fn new(client: TcpStream, server: Accepted) -> Self {
        Self {
            client,
            server: server.stream,
            peer: server.peer,
            syn: server.syn,
        }
    }

    /// Returns its path.
    pub fn path(&self) -> Path {
        self.syn.path()
    }

    /// Returns the connection if it is split; a forwarded one would test the kernel only.
    ///
    /// # Errors
    /// When it is forwarded.
    pub fn split(self) -> Result<Self> {
        ensure!(
            self.path() == Path::Split,
            "the connection from {} is not split",
            self.peer
        );
        Ok(self)
    }

    /// Returns the end of a side, and the other end.
    pub fn into_ends(self, first: Side) -> (TcpStream, TcpStream) {
        match first {
            Side::Client => (self.client, self.server),
            Side::Server => (self.server, self.client),
        }
    }

    /// Sends a word to the server, which sends it back.
    ///
    /// # Errors
    /// When another word arrives.
    pub fn greet(&self) -> Result<()> {
        for (mut from, mut to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            let mut received = [0; 5];
            from.write_all(b"hello")?;
            to.read_exact(&mut received)?;
            ensure!(received == *b"hello", "{received:?} arrives instead of a word");
        }
        Ok(())
    }

    /// Sends some segments in each direction.
    ///
    /// # Errors
    /// When other bytes arrive.
    pub fn exchange(&self) -> Result<()> {
        send_across(&self.client, &self.server).context("up")?;
        send_across(&self.server, &self.client).context("down")
    }
}

/// Sends 256 KiB; a separate thread writes, so that neither end waits for the other.
fn send_across(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
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

/// Sends bytes, and then a FIN.
///
/// # Errors
/// When the connection ends before.
pub fn send_all(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)
}

/// Receives bytes up to the end of the stream.
///
/// # Errors
/// When the connection ends otherwise.
pub fn receive_all(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    Ok(received)
}
