//! What is counted: bytes, connections, their rate.

use anyhow::{Result, ensure};
use pepsal_tests::{Family, Session};

use crate::scenario::{MEGABYTE, Scenario, filter};

/// A set for the sources of each family.
const SOURCES: &str = "table inet filter {
    set sources4 { type ipv4_addr; flags dynamic; }
    set sources6 { type ipv6_addr; flags dynamic; }
}
";

/// Rejects new connections of sources of which `limit` holds.
fn reject_over(limit: &str) -> String {
    let rules = [("ip", 4), ("ip6", 6)].map(|(header, number)| {
        format!("ct state new add @sources{number} {{ {header} saddr {limit} }} reject with tcp reset\n")
    });
    [SOURCES, &filter("forward", "accept", &rules.concat())].concat()
}

#[test]
fn connections_of_a_client_are_limited() -> Result<()> {
    Scenario::new(reject_over("ct count over 3")).holds_for_each_family(|host, family| {
        let client = host.outwards(family, &host.open);
        let open: Vec<Session> = (0..3).map(|_| client.session()).collect::<Result<_>>()?;
        client.is_rejected()?;
        host.outwards_from_other(family, &host.open).is_accepted()?;
        drop(open);
        Ok(())
    })
}

#[test]
fn rate_of_new_connections_of_a_client_is_limited() -> Result<()> {
    Scenario::new(reject_over("limit rate over 3/hour burst 3 packets")).holds_for_each_family(
        |host, family| {
            for _ in 0..3 {
                host.outwards(family, &host.open).is_accepted()?;
            }
            host.outwards(family, &host.open).is_rejected()?;
            host.outwards_from_other(family, &host.open).is_accepted()
        },
    )
}

#[test]
fn bytes_of_a_client_are_counted_both_ways_once() -> Result<()> {
    let clients = [
        ("ip", "client4"),
        ("ip6", "client6"),
        ("ip", "other4"),
        ("ip6", "other6"),
    ];
    let counters =
        clients.map(|(_, client)| format!("counter {client}_up {{ }}\ncounter {client}_down {{ }}\n"));
    let rules = clients.map(|(header, client)| {
        format!(
            "{header} saddr ${client} counter name {client}_up
             {header} daddr ${client} counter name {client}_down\n"
        )
    });
    let counters = format!("table inet filter {{ {} }}\n", counters.concat());
    Scenario::new([&*counters, &filter("forward", "accept", &rules.concat())].concat()).holds(|host| {
        for (family, number) in [(Family::V4, 4), (Family::V6, 6)] {
            host.outwards(family, &host.open).is_served()?;
            for way in ["up", "down"] {
                let mine = host.counter(&format!("client{number}_{way}"))?;
                // Headers and acknowledgements come on top of the payload.
                ensure!(
                    (MEGABYTE..MEGABYTE * 5 / 4).contains(&mine.bytes) && mine.packets > 0,
                    "{family:?} {way}: {mine:?}"
                );
                let others = host.counter(&format!("other{number}_{way}"))?;
                ensure!(
                    others.packets == 0,
                    "{family:?} {way}: {others:?} for another client"
                );
            }
        }
        Ok(())
    })
}
