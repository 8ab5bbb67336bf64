//! `pepsal doctor`: what of this host would keep pepsal from working, or from working well. It needs no daemon, and changes
//! nothing.
//!
//! [`host`] is about the kernel and its limits, [`network`] about what happens to packets. The firewall, address translation
//! and routing of the host are not looked at: they see the flows as without pepsal.

mod host;
mod network;

use std::{fs, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::wire::interfaces;

/// What pepsal is going to be started with.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Look at this interface (repeatable) [default: all]
    #[arg(short = 'i', long = "interface", value_name = "INTERFACE")]
    interfaces: Vec<String>,

    /// Most connections at once
    #[arg(short = 'c', long = "conns", value_name = "MAXCONN", default_value_t = 2112)]
    max_connections: u32,

    /// TCP fast open is going to be used
    #[arg(short = 'f', long)]
    fastopen: bool,

    /// Print a list of {"check","severity","what","mend"}
    #[arg(long)]
    json: bool,
}

/// How bad a finding is, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// pepsal does not start, or intercepts nothing.
    Error,
    /// Some connections are not intercepted, or go slower than they could.
    Warning,
    /// Worth knowing; it includes what could not be looked at.
    Note,
    /// As it should be.
    Ok,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is so, and what that means.
    pub what: String,
    /// The command that mends it, or what else there is to do.
    pub mend: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Ok,
            what: what.into(),
            mend: None,
        }
    }

    fn new(
        check: &'static str,
        severity: Severity,
        what: impl Into<String>,
        mend: impl Into<Option<String>>,
    ) -> Self {
        Self {
            check,
            severity,
            what: what.into(),
            mend: mend.into(),
        }
    }

    fn unknown(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(check, Severity::Note, why, None)
    }
}

/// Looks at everything. The exit code is 1 when something would keep pepsal from working.
///
/// # Errors
/// When there is no way to ask the kernel at all.
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
                    let what = format!("there is no interface {name} that can be intercepted");
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
    println!("{severity:<8} {:<13} {}", finding.check, finding.what);
    if let Some(mend) = &finding.mend {
        println!("{:<22} mend: {mend}", "");
    }
}

/// A kernel setting; nothing where there is none of that name.
fn sysctl(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
    Some(text.trim().to_owned())
}

/// The numbers of a kernel setting.
fn numbers(name: &str) -> Option<Vec<u64>> {
    let text = sysctl(name)?;
    text.split_whitespace()
        .map(|number| number.parse().ok())
        .collect()
}

/// The command that changes a kernel setting. Names of interfaces may have dots, so it goes by the path.
fn set(name: &str, value: impl std::fmt::Display) -> Option<String> {
    Some(format!("sysctl -w {name}='{value}'"))
}
