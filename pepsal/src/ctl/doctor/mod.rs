//! `pepsal doctor`: checks this host for the requirements of pepsal. It needs no daemon, and changes nothing.
//!
//! [`host`] checks the kernel and its limits, [`network`] forwarding, TC programs and offloads. Firewall, NAT
//! and routing of the host are not checked: they apply to flows as without pepsal.

mod finding;
mod host;
mod network;
mod setting;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    ctl::doctor::finding::{Finding, Severity},
    wire::interfaces,
};

/// Options of `pepsal doctor`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Check this interface (repeatable) [default: all]
    #[arg(short = 'i', long = "interface", value_name = "INTERFACE")]
    interfaces: Vec<String>,

    /// Maximum number of connections
    #[arg(
        short = 'c',
        long = "max-connections",
        alias = "conns",
        value_name = "N",
        default_value_t = 2112
    )]
    max_connections: u32,

    /// Check for TCP fast open
    #[arg(short = 'f', long)]
    fastopen: bool,

    /// Print a list of {"check","severity","message","fix"}
    #[arg(long)]
    json: bool,
}

/// Runs all checks. The exit code is 1 when a finding is an error.
///
/// # Errors
/// When the kernel cannot be queried by netlink.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let mut findings = host::look(arguments.max_connections, arguments.fastopen);
    runtime.block_on(async {
        let present = interfaces::list().await?.into_values();
        let mut interfaces: Vec<String> = present.map(|interface| interface.name).collect();
        if !arguments.interfaces.is_empty() {
            for name in &arguments.interfaces {
                if !interfaces.contains(name) {
                    let what = format!("no interface {name} that can be intercepted");
                    findings.push(Finding::new("interface", Severity::Error, what, None));
                }
            }
            interfaces.retain(|name| arguments.interfaces.contains(name));
        }
        findings.extend(network::look(&interfaces));
        anyhow::Ok(())
    })?;
    findings.sort_by_key(|finding| finding.severity);
    match arguments.json {
        true => println!("{}", serde_json::to_string(&findings)?),
        false => findings.iter().for_each(show),
    }
    let works = findings.iter().all(|finding| finding.severity != Severity::Error);
    Ok(if works {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn show(finding: &Finding) {
    let severity = match finding.severity {
        Severity::Error => "ERROR",
        Severity::Warning => "WARNING",
        Severity::Note => "note",
        Severity::Ok => "ok",
    };
    println!("{severity:<8} {:<13} {}", finding.check, finding.message);
    if let Some(fix) = &finding.fix {
        println!("{:<22} fix: {fix}", "");
    }
}
