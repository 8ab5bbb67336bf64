//! Network address translation.

use std::net::IpAddr;

use anyhow::Result;
use pepsal_tests::{Family, Topology};

use crate::scenario::{Scenario, nat};

/// The gateway's second address on its outer side.
fn second_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 2, 0, 77]),
        Family::V6 => IpAddr::from([0xfd02, 0, 0, 0, 0, 0, 0, 0x77]),
    }
}

/// An address that nobody has.
fn foreign_address(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([198, 51, 100, 1]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    }
}

/// Both families' rules, once in tables of their own and once in one.
fn layouts(hook: &str, [v4, v6]: [&str; 2]) -> [String; 2] {
    [["ip", "ip6"], ["inet", "inet"]]
        .map(|[first, second]| [nat(first, hook, v4), nat(second, hook, v6)].concat())
}

/// Leaves the server no way back but to the gateway's own addresses.
fn no_way_back(topology: &Topology) -> Result<()> {
    topology.server.ip("route del default via 10.2.0.1
         route del default via fd02::1")
}

/// Sends what the gateway does not know towards the server, as to any provider.
fn default_route(topology: &Topology) -> Result<()> {
    topology.gateway.ip("route add default via 10.2.0.2
         route add default via fd02::2")
}

#[test]
fn masquerading_hides_clients() -> Result<()> {
    for rules in layouts("postrouting", ["oifname sat0 masquerade"; 2]) {
        Scenario::new(rules)
            .prepare(no_way_back)
            .holds_for_each_family(|host, family| {
                host.outwards(family, &host.open)
                    .is_served_as(family.server_next_hop())
            })?;
    }
    Ok(())
}

#[test]
fn source_nat_gives_the_address_it_names() -> Result<()> {
    let rules = [
        "ip saddr $client4 snat ip to 10.2.0.77",
        "ip6 saddr $client6 snat ip6 to fd02::77",
    ];
    for rules in layouts("postrouting", rules) {
        Scenario::new(rules)
            .prepare(no_way_back)
            .prepare(|topology| {
                topology.gateway.ip("address add 10.2.0.77/24 dev sat0
                     address add fd02::77/64 dev sat0 nodad")
            })
            .holds_for_each_family(|host, family| {
                host.outwards(family, &host.open)
                    .is_served_as(second_address(family))
            })?;
    }
    Ok(())
}

#[test]
fn destination_nat_leads_to_another_server() -> Result<()> {
    let rules = [
        "ip daddr 198.51.100.1 tcp dport $closed dnat ip to $server4:$open",
        "ip6 daddr 2001:db8::1 tcp dport $closed dnat ip6 to $server6:$open",
    ];
    for rules in layouts("prerouting", rules) {
        Scenario::new(rules)
            .prepare(default_route)
            .holds_for_each_family(|host, family| {
                host.outwards(family, &host.closed)
                    .destination(foreign_address(family))
                    .is_served()
            })?;
    }
    Ok(())
}

#[test]
fn destination_nat_leads_to_a_service_of_the_gateway() -> Result<()> {
    let rules = [
        "tcp dport $closed dnat ip to $gateway4:$local",
        "tcp dport $closed dnat ip6 to $gateway6:$local",
    ];
    leads_to_the_gateway(layouts("prerouting", rules))
}

#[test]
fn redirection_leads_to_a_service_of_the_gateway() -> Result<()> {
    leads_to_the_gateway(layouts(
        "prerouting",
        ["iifname lan0 tcp dport $closed redirect to :$local"; 2],
    ))
}

fn leads_to_the_gateway(rulesets: [String; 2]) -> Result<()> {
    for rules in rulesets {
        Scenario::new(rules).holds_for_each_family(|host, family| {
            host.outwards(family, &host.closed).is_served()?;
            host.outwards(family, &host.open).is_served()
        })?;
    }
    Ok(())
}
