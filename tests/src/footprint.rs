//! The state of a namespace by iproute2 and nftables, to find the changes that a daemon makes.

use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::netns::Namespace;

/// Interfaces, addresses, policy rules, routes, packet filters and sysctls of a namespace at one moment, for
/// comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(Vec<String>);

impl Footprint {
    /// Reads the state, with the filters of `lan0` and `sat0` if they exist. tcx programs are included only
    /// if bpftool is installed; they end with their process.
    ///
    /// # Errors
    /// When a tool of iproute2 is missing.
    pub fn of(namespace: &Namespace) -> Result<Self> {
        let mut lines = Vec::new();
        for command in [
            "ip -br link",
            "ip -br address",
            "ip -4 rule",
            "ip -6 rule",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "tc filter show dev lan0 ingress",
            "tc filter show dev sat0 ingress",
            "tc filter show dev lan0 egress",
            "tc filter show dev sat0 egress",
            "tc qdisc show",
            "ss -Hltn",
            "nft list ruleset",
            "bpftool net show",
        ] {
            let mut words = command.split(' ');
            let program = words.next().expect("every command has a first word");
            let output = match namespace.command(program).args(words).output() {
                Err(error)
                    if error.kind() == ErrorKind::NotFound && ["bpftool", "nft"].contains(&program) =>
                {
                    continue;
                }
                output => output.with_context(|| command.to_owned())?,
            };
            let text = String::from_utf8_lossy(&output.stdout);
            let shown = text
                .lines()
                .map(str::trim_end)
                .filter(|line| !is_volatile(line) && !may_stay(line));
            lines.extend(shown.map(|line| format!("{command}: {}", without_peer(line))));
        }
        lines.extend(namespace.run(|| settings(Path::new("/proc/sys/net"))));
        lines.sort();
        Ok(Self(lines))
    }

    /// Returns the state without packet filters, which survive a killed daemon on kernels without tcx.
    pub fn without_filters(&self) -> Self {
        let is_filter = |line: &&String| line.starts_with("tc filter ") || line.starts_with("bpftool ");
        Self(self.0.iter().filter(|line| !is_filter(line)).cloned().collect())
    }

    /// Returns the lines that contain `text`.
    pub fn lines<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .map(String::as_str)
            .filter(move |line| line.contains(text))
    }
}

/// Sysctls that change by themselves, or belong to all namespaces.
const CHANGING: [&str; 2] = ["nf_conntrack_count", "tcp_available_congestion_control"];

/// Returns every sysctl below a folder, with its value.
fn settings(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut settings = Vec::new();
    for path in entries.map(|entry| entry.path()) {
        if path.is_dir() {
            settings.extend(self::settings(&path));
        } else if let Ok(value) = fs::read_to_string(&path)
            && !CHANGING.iter().any(|name| path.ends_with(name))
        {
            settings.push(format!("sysctl {} = {}", path.display(), value.trim()));
        }
    }
    settings
}

/// Returns a line without the index of a device's peer in another namespace.
fn without_peer(line: &str) -> String {
    match line.split_once("@if") {
        Some((name, rest)) => format!("{name}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit())),
        None => line.to_owned(),
    }
}

/// Returns whether a line is a link-local or multicast route, or a route to an own IPv6 address, which the
/// kernel adds with a delay.
fn is_volatile(line: &str) -> bool {
    line.contains("fe80::") || line.contains("ff00::") || line.contains("table local proto kernel")
}

/// Returns whether a line is the clsact qdisc, which remains on kernels without tcx, because other programs
/// may use it.
fn may_stay(line: &str) -> bool {
    line.starts_with("qdisc clsact ")
}

impl fmt::Display for Footprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join("\n"))
    }
}
