//! The kernel's counters of a namespace.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::netns::Namespace;

/// Returns the counters of a namespace since its creation, by their names in nstat(8).
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
