//! One pepsal for each interface and each routing table. What is taken is shown by abstract Unix sockets, which belong
//! to the network namespace, like what they guard, and vanish with their process, however it ends.

use std::os::{
    linux::net::SocketAddrExt,
    unix::net::{SocketAddr, UnixListener, UnixStream},
};

use anyhow::{Result, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Holds an instance's claims for as long as it lives.
#[derive(Debug)]
pub struct Instance {
    _claims: Vec<UnixListener>,
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
                Err(owner) => {
                    bail!(
                        "interface {interface}: another pepsal ({owner}) intercepts it already: stop that one first"
                    )
                }
            }
        }
        match claim(&table_name(table)) {
            Ok(listener) => claims.push(listener),
            Err(owner) => bail!(
                "table {table}: another pepsal ({owner}) uses it: give this one its own with --table, --mark and --port"
            ),
        }
        Ok(Self { _claims: claims })
    }
}

/// Whether an instance that is alive uses a routing table.
pub fn runs_table(table: u32) -> bool {
    SocketAddr::from_abstract_name(table_name(table))
        .and_then(|addr| UnixStream::connect_addr(&addr))
        .is_ok()
}

fn interface_name(interface: &str) -> String {
    format!("pepsal/interface/{interface}")
}

fn table_name(table: u32) -> String {
    format!("pepsal/table/{table}")
}

/// `Err` names the process that has the claim.
fn claim(name: &str) -> Result<UnixListener, String> {
    let unknown = "of unknown process";
    let addr = SocketAddr::from_abstract_name(name).map_err(|_| unknown.to_owned())?;
    UnixListener::bind_addr(&addr).map_err(|_| {
        UnixStream::connect_addr(&addr)
            .ok()
            .and_then(|stream| getsockopt(&stream, PeerCredentials).ok())
            .map_or(unknown.to_owned(), |owner| format!("process {}", owner.pid()))
    })
}
