//! What is known of a link is on every leg that leaves through it, and on no other.

use anyhow::Result;
use pepsal_tests::{Bed, LAN, Side, Topology};

mod congestion;
mod control_group;
mod explanation;
mod fast_open;
mod outage;
mod pair;
mod sharing;
mod socket;

/// A daemon of the client's side.
fn start(arguments: &[&str]) -> Result<Bed> {
    on(Topology::new()?, arguments)
}

/// One that knows the link on a side.
fn with_link(side: Side, settings: &str, arguments: &[&str]) -> Result<Bed> {
    start(
        &[
            &["--link", &format!("{},{settings}", side.interface())],
            arguments,
        ]
        .concat(),
    )
}

fn on(topology: Topology, arguments: &[&str]) -> Result<Bed> {
    // Neither what links are told to use here nor what is derived for them, so that it shows who chose.
    on_default("reno", topology, arguments)
}

fn on_default(congestion: &str, topology: Topology, arguments: &[&str]) -> Result<Bed> {
    topology
        .gateway
        .sysctl("net.ipv4.tcp_congestion_control", congestion)?;
    Bed::on(topology, &[LAN, arguments].concat())
}
