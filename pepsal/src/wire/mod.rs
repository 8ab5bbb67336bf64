//! The wire of the intercepted interfaces, in which the daemon's legs live: from a SYN to the listener, and from a leg to
//! the client or into the host.
//!
//! Client legs are in one namespace and server legs in another, each joined to the host by a [`device`] pair. The eBPF
//! [`programs`], [`attachment`] of which follows the host's [`interfaces`], take clients' segments off the wire before the
//! host sees them, and give the host what server legs send, by the interface of the client's SYN. So the host's routing,
//! firewall, address translation and accounting see the server leg's connection as the client's own.
//!
//! [`flow_map`] contains a record of each flow's SYN, [`connection_counts`] those of each subscriber, [`counters`] a count of each verdict, [`selection`] the rules for new
//! connections, which [`selection_maps`] writes into the kernel's maps. [`batch`] reads a map by few system calls.
//! [`claims`] keep two instances from intercepting one interface.

pub(crate) mod programs;
mod object;
pub(crate) mod attachment;
mod hook;
pub(crate) mod device;
pub(crate) mod side;
pub(crate) mod mark;
pub(crate) mod flow_map;
pub(crate) mod connection_counts;
pub(crate) mod batch;
pub(crate) mod filter;
pub(crate) mod counters;
pub(crate) mod selection;
pub(crate) mod selection_maps;
pub(crate) mod interfaces;
pub mod claims;

use anyhow::{Result, bail};
use tracing::info;

use crate::host::{namespace::Namespace, sysctls};

/// The namespaces of the legs.
#[derive(Debug)]
pub struct Namespaces {
    /// Namespace of the client legs.
    pub clients: Namespace,
    /// Namespace of the server legs.
    pub servers: Namespace,
}

impl Namespaces {
    /// Makes both namespaces, whose threads then give up their privileges by `give_up`.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, and when no thread can be started.
    pub fn new(give_up: fn() -> Result<()>) -> Result<Self> {
        Ok(Self {
            clients: Namespace::new("pepsal-clients", give_up)?,
            servers: Namespace::new("pepsal-servers", give_up)?,
        })
    }

    /// Copies the host's TCP settings into both namespaces, and sets those that legs need beyond. With `ignore_marks` no leg
    /// negotiates ECN (RFC 3168): some leg's congestion control ignores congestion marks (CE), and there is no such option
    /// for a single socket.
    ///
    /// # Errors
    /// Where `/proc/sys` cannot be written to.
    pub fn settle(&self, ignore_marks: bool) -> Result<()> {
        let mut host = sysctls::of_tcp();
        if ignore_marks {
            host.push(("net/ipv4/tcp_ecn".to_owned(), "0".to_owned()));
        }
        for namespace in [&self.clients, &self.servers] {
            namespace.run(|| settle(&host))?;
        }
        Ok(())
    }
}

fn settle(host: &[(String, String)]) -> Result<()> {
    for (name, value) in host {
        // Some are the initial namespace's only.
        sysctls::write(name, value);
    }
    // The mark of a connection is that of its SYN: the interface that it came in by, and its packets leave by.
    const MARK: &str = "net/ipv4/tcp_fwmark_accept";
    if !sysctls::write(MARK, "1") {
        bail!("cannot set {MARK} in a network namespace of its own: /proc/sys has to be writable for pepsal");
    }
    for (name, value) in [
        // So is that of an answer to a segment without a connection.
        ("net/ipv4/fwmark_reflect", "1"),
        ("net/ipv6/fwmark_reflect", "1"),
        // Every connection has a path of its own, which others' congestion windows say nothing about.
        ("net/ipv4/tcp_no_metrics_save", "1"),
        // Every source is right, so that none is looked up.
        ("net/ipv4/conf/all/accept_local", "1"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        // All interfaces together decide, as the host has it for all.
        ("net/ipv4/conf/default/accept_source_route", "1"),
        ("net/core/somaxconn", "65535"),
        ("net/ipv6/conf/all/disable_ipv6", "0"),
        ("net/ipv6/conf/default/disable_ipv6", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        // 1: none.
        ("net/ipv6/conf/default/addr_gen_mode", "1"),
    ] {
        if !sysctls::write(name, value) && !name.starts_with("net/ipv6") {
            info!("cannot set {name} to {value} in the legs' namespace");
        }
    }
    Ok(())
}
