//! What a daemon adds to a namespace, as the tools of iproute2 show it.

use std::fmt;
use std::io::ErrorKind;

use anyhow::{Context, Result};

use crate::netns::Namespace;

/// The policy rules, routes and packet filters of a namespace at one moment, to be compared with those of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(Vec<String>);

impl Footprint {
    /// Takes it, on the interfaces `lan0` and `sat0` as far as they are there. Programs attached by tcx are shown by
    /// bpftool only, and only where it is installed; all of them vanish with their process.
    ///
    /// # Errors
    /// When a tool of iproute2 is missing.
    pub fn of(namespace: &Namespace) -> Result<Self> {
        let mut lines = Vec::new();
        for command in [
            "ip -4 rule",
            "ip -6 rule",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "tc filter show dev lan0 ingress",
            "tc filter show dev sat0 ingress",
            "tc qdisc show",
            "ss -Hltn",
            "bpftool net show",
        ] {
            let mut words = command.split(' ');
            let program = words.next().expect("every command has a first word");
            let output = match namespace.command(program).args(words).output() {
                Err(error) if error.kind() == ErrorKind::NotFound && program == "bpftool" => continue,
                output => output.with_context(|| command.to_owned())?,
            };
            let text = String::from_utf8_lossy(&output.stdout);
            let shown = text
                .lines()
                .map(str::trim_end)
                .filter(|line| !is_volatile(line) && !may_stay(line));
            lines.extend(shown.map(|line| format!("{command}: {line}")));
        }
        lines.sort();
        Ok(Self(lines))
    }

    /// The lines that contain `text`.
    pub fn lines<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .map(String::as_str)
            .filter(move |line| line.contains(text))
    }
}

/// Link-local and multicast routes, and those to IPv6 addresses of the host's own, come when the kernel finds the time.
fn is_volatile(line: &str) -> bool {
    line.contains("fe80::") || line.contains("ff00::") || line.contains("table local proto kernel")
}

/// Where there is no tcx, filters need this qdisc. Others may use it by the time the daemon ends, so that it is left.
fn may_stay(line: &str) -> bool {
    line.starts_with("qdisc clsact ")
}

impl fmt::Display for Footprint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.join("\n"))
    }
}
