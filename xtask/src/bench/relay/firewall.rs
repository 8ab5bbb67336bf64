//! A typical stateful firewall of a gateway: some twenty rules with sets and counters, and policy drop.
//!
//! The firewall is the same for all contenders. Flows of a proxy in the host's namespace pass INPUT and
//! OUTPUT, all others FORWARD.

use std::time::Duration;

use anyhow::{Context as _, Result};
use pepsal_tests::Namespace;

use super::process;
use crate::{shell, signals::Signals};

const PATIENCE: Duration = Duration::from_secs(20);

pub const FOREIGN_PORT: u16 = 40_001;
/// The discard port (RFC 863).
pub const DISCARD_PORT: u16 = 9;

/// Loads the rules into a gateway. They accept connections to `ports`, and packets without a connection
/// between [`FOREIGN_PORT`] and [`DISCARD_PORT`].
pub fn set_up(gateway: &Namespace, ports: &[u16], signals: &Signals) -> Result<()> {
    let program = shell::find("nft").context("no nft (Debian's package nftables)")?;
    let mut command = gateway.command(program);
    process::output(command.arg(ruleset(ports)), PATIENCE, signals).map(drop)
}

fn ruleset(ports: &[u16]) -> String {
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    let (sets, ports) = (SETS, ports.join(", "));
    let forward = chain(
        "forward",
        "ct state invalid counter drop",
        "tcp dport @services ct state new counter accept",
    );
    // The two connections of a transparent proxy may have the same addresses and ports, and share a conntrack
    // entry, whose state is wrong for one of them.
    let [input, output] = ["input", "output"].map(|hook| {
        let accepted = "tcp dport @services counter accept; tcp sport @services counter accept";
        chain(hook, "ct state invalid counter", accepted)
    });
    format!(
        "table inet bench {{
    set services {{ type inet_service; elements = {{ {ports} }}; }}
    set unconnected {{ type inet_service; elements = {{ {FOREIGN_PORT}, {DISCARD_PORT} }}; }}
{sets}{forward}{input}{output}}}
"
    )
}

/// Documentation prefixes (RFC 5737, RFC 3849), in place of networks that operators block.
const SETS: &str = "    set blocked4 { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.0/24, 203.0.113.0/24 }; }
    set blocked6 { type ipv6_addr; flags interval; elements = { 2001:db8::/32, 3fff::/20 }; }
    set blocked_ports { type inet_service; flags interval; elements = { 135-139, 445, 1900, 5353 }; }
    set management { type ipv4_addr; flags interval; elements = { 10.100.0.0/16, 10.101.0.0/24 }; }
";

/// Returns the base chain of a hook, with rules for invalid packets of conntrack and for the benchmark's
/// connections.
fn chain(hook: &str, invalid: &str, services: &str) -> String {
    format!(
        "    chain {hook} {{
        type filter hook {hook} priority filter; policy drop;
        ip saddr @blocked4 counter drop
        ip6 saddr @blocked6 counter drop
        ip daddr @blocked4 counter drop
        ip6 daddr @blocked6 counter drop
        tcp flags & (syn | fin) == syn | fin counter drop
        {invalid}
        ct state established,related counter accept
        iifname \"lo\" accept
        tcp dport @blocked_ports counter drop
        udp dport @blocked_ports counter drop
        icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert }} counter accept
        icmpv6 type {{ destination-unreachable, packet-too-big, time-exceeded, echo-request }} counter accept
        icmp type {{ destination-unreachable, time-exceeded, echo-request }} counter accept
        udp dport {{ 53, 67, 123, 547 }} ct state new counter accept
        tcp dport 53 ct state new counter accept
        ip saddr @management tcp dport 22 ct state new counter accept
        udp dport {{ 500, 4500 }} ct state new counter accept
        meta l4proto esp counter accept
        {services}
        meta l4proto {{ tcp, udp }} th dport @unconnected counter accept
        counter
    }}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_hook_has_a_chain_that_accepts_the_benchmarks_ports() {
        let text = ruleset(&[8080, 5201]);
        assert!(text.contains("elements = { 8080, 5201 }"));
        for hook in ["forward", "input", "output"] {
            assert!(text.contains(&format!("type filter hook {hook} priority filter; policy drop;")));
        }
        assert_eq!(text.matches("tcp dport @services").count(), 3);
        assert_eq!(text.matches("ct state invalid counter drop").count(), 1);
    }
}
