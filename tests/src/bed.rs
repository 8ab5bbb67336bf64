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

/// Arguments of a daemon that splits connections from the client's side.
pub const LAN: &[&str] = &["-i", "lan0"];

/// Arguments of a daemon that splits connections from both sides.
pub const BOTH: &[&str] = &["-i", "lan0", "-i", "sat0"];

/// Payload of each transfer of [`Network::splits`].
const BULK_BYTES: u64 = 500_000;

/// A [`Topology`] whose server has a listener of each family and a [`Server`].
#[derive(Debug)]
pub struct Network {
    /// The namespaces.
    pub topology: Topology,
    /// Serves transfers.
    pub server: Server,
    /// IPv4, IPv6.
    listeners: [Listener; 2],
}

impl Network {
    /// A network over two veth pairs.
    ///
    /// # Errors
    /// Without root.
    pub fn new() -> Result<Self> {
        Self::on(Topology::new()?)
    }

    /// A network on a topology.
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

    /// Starts a daemon on the gateway, on both interfaces unless the arguments name some or a file.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start(&self, arguments: &[&str]) -> Result<Daemon> {
        let names_interfaces = arguments.iter().any(|argument| ["-i", "-F"].contains(argument));
        let interfaces = if names_interfaces { &[] } else { BOTH };
        Daemon::start(&self.topology.gateway, &[interfaces, arguments].concat())
    }

    /// The server's listener of a family.
    pub fn listener(&self, family: Family) -> &Listener {
        match family {
            Family::V4 => &self.listeners[0],
            Family::V6 => &self.listeners[1],
        }
    }

    /// Where clients reach the server's listener of a family.
    pub fn address(&self, family: Family) -> SocketAddr {
        self.listener(family).at(family.server())
    }

    /// Opens a connection from the client to the server.
    ///
    /// # Errors
    /// When it is refused, or does not arrive within [`PATIENCE`].
    pub fn open(&self, family: Family) -> Result<Connection> {
        self.open_by(&Connector::default(), family)
    }

    /// The same with options of the client's.
    ///
    /// # Errors
    /// See [`Network::open`].
    pub fn open_by(&self, connector: &Connector, family: Family) -> Result<Connection> {
        self.open_to(connector, self.listener(family))
    }

    /// The same to another listener of the server's.
    ///
    /// # Errors
    /// See [`Network::open`].
    pub fn open_to(&self, connector: &Connector, listener: &Listener) -> Result<Connection> {
        let server = Family::of(listener.address().ip()).server();
        Connection::open(connector, &self.topology.client, listener, listener.at(server))
    }

    /// Opens a connection from a port of the client's, as soon as the client's own kernel has done with the one before.
    ///
    /// # Errors
    /// When it has not within [`PATIENCE`], and see [`Network::open`].
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

    /// Opens a connection that has to be split.
    ///
    /// # Errors
    /// When it is not, and see [`Network::open`].
    pub fn flow(&self, family: Family) -> Result<Connection> {
        self.open(family)?.split()
    }

    /// Another listener at the server, of a family and with a port of its own.
    ///
    /// # Errors
    /// When the server cannot listen.
    pub fn another_listener(&self, family: Family) -> Result<Listener> {
        Ok(Listener::bind_any(&self.topology.server, family.server())?)
    }

    /// Opens a connection, has it carry some segments each way, and returns its path.
    ///
    /// # Errors
    /// When they do not arrive intact, or the server sees another than the client's address and port.
    pub fn probe(&self, family: Family) -> Result<Path> {
        // What earlier attempts have left is in other listeners' queues.
        let listener = self.another_listener(family)?;
        let connection = self.open_to(&Connector::default(), &listener)?;
        connection.exchange()?;
        let (local, peer) = (connection.client.local_addr()?, connection.peer);
        ensure!(peer == local, "the server sees {peer} instead of {local}");
        Ok(connection.path())
    }

    /// Checks that connections of both families are split, and carry payload both ways.
    ///
    /// # Errors
    /// When they are not, or do not.
    pub fn splits(&self) -> Result<()> {
        Family::BOTH
            .into_iter()
            .try_for_each(|family| splits(&self.topology.client, self.server.address(family), BULK_BYTES))
    }
}

/// Checks that connections from a client to a [`Server`] are split, and carry so many bytes both ways.
///
/// # Errors
/// When they are not, or do not.
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
    /// The daemon.
    pub daemon: Daemon,
    /// What outlives the daemon.
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
    /// A leg of a flow as it is now, if it is there.
    ///
    /// # Errors
    /// See [`Leg::all`].
    pub fn leg(&self, flow: &Connection, side: Side) -> Result<Option<Leg>> {
        // Server legs with the gateway's address are the host's.
        let legs = [self.daemon.legs()?, Leg::all(&self.topology.gateway)?].concat();
        let (client, server) = (flow.client.local_addr()?, flow.client.peer_addr()?);
        Ok(legs.into_iter().find(|leg| match side {
            Side::Client => (leg.local, leg.peer) == (server, client),
            Side::Server => (leg.local, leg.peer) == (flow.peer, server),
        }))
    }

    /// Waits until a leg has the property that it should have.
    ///
    /// # Panics
    /// When it has another after [`PATIENCE`], which is in the message.
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

/// The side of an end of a connection, and of the leg to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client's; its leg is the accepted one.
    Client,
    /// The server's; its leg is the connected one.
    Server,
}

impl Side {
    /// Both sides.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// The gateway's interface that its legs leave through.
    pub fn interface(self) -> &'static str {
        match self {
            Self::Client => "lan0",
            Self::Server => "sat0",
        }
    }

    /// The other side.
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
    /// Where it comes from, as the server sees it.
    pub peer: SocketAddr,
    /// Its SYN, as the server got it.
    pub syn: SavedSyn,
}

impl Connection {
    /// Connects from a namespace to a listener, which is reached there by `address`.
    ///
    /// # Errors
    /// When it is refused, or does not arrive within [`PATIENCE`].
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

    /// A connection whose ends are there.
    pub fn new(client: TcpStream, server: Accepted) -> Self {
        Self {
            client,
            server: server.stream,
            peer: server.peer,
            syn: server.syn,
        }
    }

    /// Its path.
    pub fn path(&self) -> Path {
        self.syn.path()
    }

    /// Returns it if it is split: without that a test would be of the kernel alone.
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

    /// The end of a side, then the other one.
    pub fn into_ends(self, first: Side) -> (TcpStream, TcpStream) {
        match first {
            Side::Client => (self.client, self.server),
            Side::Server => (self.server, self.client),
        }
    }

    /// Sends a word to the server, and has it come back.
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

    /// Sends some segments each way.
    ///
    /// # Errors
    /// When other bytes arrive.
    pub fn exchange(&self) -> Result<()> {
        send_across(&self.client, &self.server).context("up")?;
        send_across(&self.server, &self.client).context("down")
    }
}

/// 256 KiB, written on a thread of its own so that neither end waits for the other.
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

/// Sends bytes, and the end of the stream.
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
