//! The wire of the intercepted interfaces, in which the daemon's legs live: from a SYN to the listener, and from a leg to
//! the client or into the host.
//!
//! Client legs are in one namespace and server legs in another, each joined to the host by a [`device`] pair. The eBPF
//! [`programs`], [`attachment`] of which follows the host's [`interfaces`], take clients' segments off the wire before the
//! host sees them, and give the host what server legs send, by the interface of the client's SYN. So the host's routing,
//! firewall, address translation and accounting see the server leg's connection as the client's own.
//!
//! [`flow_map`] has a record of each flow's SYN, [`counters`] every verdict, [`selection`] the rules for new connections,
//! in the maps of [`selection_maps`]. [`claims`] are how one instance knows of another.

pub mod attachment;
pub mod batch;
pub mod claims;
pub mod counters;
pub mod device;
pub mod flow_map;
pub mod interfaces;
pub mod programs;
pub mod selection;
pub mod selection_maps;

use anyhow::Result;

use tracing::info;

use crate::host::{namespace::Namespace, sysctls};

/// The namespaces of the legs.
#[derive(Debug)]
pub struct Namespaces {
    /// That of the client legs.
    pub clients: Namespace,
    /// That of the server legs.
    pub servers: Namespace,
}

impl Namespaces {
    /// Makes both.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN.
    pub fn new() -> Result<Self> {
        Ok(Self {
            clients: Namespace::new("pepsal-clients")?,
            servers: Namespace::new("pepsal-servers")?,
        })
    }

    /// Gives both the host's settings of TCP, and what legs need beyond. Where some leg's congestion control ignores
    /// congestion marks (CE, RFC 3168), none negotiates them: there is no such setting for a single socket.
    pub fn settle(&self, ignore_marks: bool) {
        let mut host = sysctls::of_tcp();
        if ignore_marks {
            host.push(("net/ipv4/tcp_ecn".to_owned(), "0".to_owned()));
        }
        for namespace in [&self.clients, &self.servers] {
            namespace.run(|| settle(&host));
        }
    }
}

fn settle(host: &[(String, String)]) {
    for (name, value) in host {
        // Some are the initial namespace's only.
        sysctls::write(name, value);
    }
    for (name, value) in [
        // The mark of a connection is that of its SYN: the interface that it came in by.
        ("net/ipv4/tcp_fwmark_accept", "1"),
        // Every connection has a path of its own, which others' congestion windows say nothing about.
        ("net/ipv4/tcp_no_metrics_save", "1"),
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
}
