//! The kernel's counters of a namespace.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::netns::Namespace;

/// The counters of a namespace since it was made, by the names that nstat(8) has for them.
///
/// # Errors
/// When nstat cannot be run.
pub fn counters(namespace: &Namespace) -> Result<BTreeMap<String, u64>> {
    let nstat = namespace.command("nstat").args(["-asz"]).output();
    let nstat = nstat.context("cannot run `nstat` (Debian's package iproute2)")?;
    ensure!(nstat.status.success(), "nstat: {}", nstat.status);
    let text = String::from_utf8(nstat.stdout)?;
    let counter = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    Ok(text.lines().filter_map(counter).collect())
}
