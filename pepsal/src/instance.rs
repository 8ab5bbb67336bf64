//! One pepsal for each interface and each routing table, and how one follows another without a gap.
//!
//! What is taken is shown by abstract Unix sockets, which belong to the network namespace, like what they guard, and
//! vanish with their process, however it ends. On the one of the routing table the next instance asks for its turn
//! (`--takeover`) once it is set up beside the one that runs: from then on both would intercept. The earlier one stops
//! doing so, gives its claims up, answers, and goes on with the flows that it has.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials},
    unistd::geteuid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net,
    time::{sleep, timeout},
};

/// What the next instance says, and what it is answered.
const TAKE_OVER: &[u8] = b"takeover\n";
const RELEASED: &[u8] = b"released\n";

/// How long the one that is asked may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Holds an instance's claims for as long as it lives.
#[derive(Debug)]
pub struct Instance {
    _interfaces: Vec<UnixListener>,
    table: net::UnixListener,
}

impl Instance {
    /// Claims the interfaces and the routing table.
    ///
    /// # Errors
    /// When another instance has one of them, saying which and its process.
    pub fn claim(interfaces: &[String], table: u32) -> Result<Self> {
        let mut claims = Vec::new();
        for interface in interfaces {
            match claim(&interface_name(interface)) {
                Ok(listener) => claims.push(listener),
                Err(owner) => bail!(
                    "interface {interface}: another pepsal ({owner}) intercepts it already: stop that one first, or \
                     take over from it with --takeover"
                ),
            }
        }
        let table = match claim(&table_name(table)) {
            Ok(listener) => listener,
            Err(owner) => bail!(
                "table {table}: another pepsal ({owner}) uses it: give this one its own with --table, --mark and --port"
            ),
        };
        table.set_nonblocking(true)?;
        Ok(Self {
            _interfaces: claims,
            table: net::UnixListener::from_std(table)?,
        })
    }

    /// Waits until another instance that may do so wants to take over.
    pub async fn successor(&self) -> Successor {
        loop {
            let Ok((mut stream, _)) = self.table.accept().await else {
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            // Whoever is in the network namespace can connect. Others only look who has the claim.
            let allowed = stream
                .peer_cred()
                .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw());
            let mut said = [0; TAKE_OVER.len()];
            let asked = timeout(PATIENCE, stream.read_exact(&mut said));
            if allowed && matches!(asked.await, Ok(Ok(_))) && said == TAKE_OVER && still_waits(&stream) {
                return Successor(stream);
            }
        }
    }
}

/// One that was kept waiting for too long is gone, and nobody would follow.
fn still_waits(stream: &net::UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}

/// The instance that waits for this one to let go.
#[derive(Debug)]
pub struct Successor(net::UnixStream);

impl Successor {
    /// Its process, if the kernel says so.
    pub fn process(&self) -> Option<i32> {
        self.0.peer_cred().ok()?.pid()
    }

    /// Tells it that everything is its own now.
    pub async fn tell(mut self) {
        // Should it be gone, there is nobody left to tell.
        let _ = self.0.write_all(RELEASED).await;
    }
}

/// The instance that runs, and is to be followed.
#[derive(Debug)]
pub struct Predecessor {
    /// Its process.
    pub process: i32,
}

impl Predecessor {
    /// The one that has the routing table, if there is one.
    ///
    /// # Errors
    /// When an interface belongs to yet another.
    pub fn find(interfaces: &[String], table: u32) -> Result<Option<Self>> {
        let Ok((_, process)) = owner(&table_name(table)) else {
            return Ok(None);
        };
        let owners = interfaces
            .iter()
            .filter_map(|interface| owner(&interface_name(interface)).ok());
        let others: BTreeSet<i32> = owners
            .map(|(_, owner)| owner)
            .filter(|owner| *owner != process)
            .collect();
        if let Some(other) = others.first() {
            bail!(
                "cannot take over from both process {process} (table {table}) and process {other}: stop one of them"
            );
        }
        Ok(Some(Self { process }))
    }

    /// Has it let go, and claims what it had.
    ///
    /// # Errors
    /// When it does not answer; it goes on as before then.
    pub async fn relieve(self, interfaces: &[String], table: u32) -> Result<Instance> {
        let process = self.process;
        let refused = || format!("process {process} does not let go: stop it, or start without --takeover");
        let (stream, _) = owner(&table_name(table)).with_context(refused)?;
        stream.set_nonblocking(true)?;
        let mut stream = net::UnixStream::from_std(stream)?;
        let ask = async {
            stream.write_all(TAKE_OVER).await?;
            let mut said = Vec::new();
            stream.read_to_end(&mut said).await?;
            io::Result::Ok(said)
        };
        let said = timeout(PATIENCE, ask)
            .await
            .with_context(refused)?
            .with_context(refused)?;
        ensure!(said == RELEASED, refused());
        Instance::claim(interfaces, table)
    }
}

/// Whether an instance that is alive uses a routing table.
pub fn runs_table(table: u32) -> bool {
    owner(&table_name(table)).is_ok()
}

/// Whether this process is the only instance in its network namespace; false where that cannot be told.
pub fn is_alone() -> bool {
    let Ok(sockets) = fs::read_to_string("/proc/net/unix") else {
        return false;
    };
    let mut tables = sockets.lines().filter_map(|line| {
        let (_, table) = line.split_once(" @pepsal/table/")?;
        table.parse().ok()
    });
    let own = process::id().cast_signed();
    !tables.any(|table| owner(&table_name(table)).is_ok_and(|(_, process)| process != own))
}

fn interface_name(interface: &str) -> String {
    format!("pepsal/interface/{interface}")
}

fn table_name(table: u32) -> String {
    format!("pepsal/table/{table}")
}

/// A connection to the process that has the claim, and that process.
fn owner(name: &str) -> io::Result<(UnixStream, i32)> {
    let stream = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
    let process = getsockopt(&stream, PeerCredentials)?.pid();
    Ok((stream, process))
}

/// `Err` names the process that has the claim.
fn claim(name: &str) -> Result<UnixListener, String> {
    let bound = SocketAddr::from_abstract_name(name).and_then(|addr| UnixListener::bind_addr(&addr));
    bound.map_err(|_| match owner(name) {
        Ok((_, process)) => format!("process {process}"),
        Err(_) => "of unknown process".to_owned(),
    })
}
