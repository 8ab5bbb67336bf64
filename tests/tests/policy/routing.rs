//! Policy routing: by interface, by packet mark, by connection mark, by port.

use anyhow::{Result, ensure};
use pepsal_tests::{BOTH, Family, Topology};

use crate::scenario::{Host, MEGABYTE, Scenario, mangle};

/// Counts what leaves by each of two links.
const COUNTERS: &str = "table inet filter {
    counter first { }
    counter second { }
    chain leaving {
        type filter hook postrouting priority 200;
        oifname sat0 counter name first
        oifname sat2 counter name second
    }
}
";

/// A rule for both families whose routing table has another way to the server.
fn other_way_for(topology: &Topology, selector: &str) -> Result<()> {
    let rule = format!("rule add {selector} lookup 100");
    topology.gateway.ip(&rule)?;
    topology.gateway.ip6(&rule)
}

/// A second link between gateway and server, and table 100, which prefers it. The server answers over the first.
fn second_link(topology: &Topology) -> Result<()> {
    topology.add_second_link()?;
    for interface in ["all", "eth0", "eth1"] {
        topology
            .server
            .sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), 0)?;
    }
    topology.gateway.ip("route add 10.2.0.0/24 via 10.4.0.2 table 100
         route add fd02::/64 via fd04::2 table 100")
}

/// An upload takes the second link, and nothing the first.
fn takes_the_second_link(host: &Host, upload: impl Fn(Family) -> Result<()>) -> Result<()> {
    for family in Family::BOTH {
        let before = [host.counter("first")?, host.counter("second")?];
        upload(family)?;
        let after = [host.counter("first")?, host.counter("second")?];
        let [first, second] = [0, 1].map(|link| after[link].bytes - before[link].bytes);
        ensure!(
            second >= MEGABYTE && first < MEGABYTE / 100,
            "{family:?}: {first} bytes by the first link, {second} by the second"
        );
    }
    Ok(())
}

#[test]
fn rule_for_the_interface_is_followed() -> Result<()> {
    Scenario::new("")
        .topology(pepsal_tests::Builder::router)
        .prepare(|topology| {
            topology.gateway.ip("route del default via 10.3.0.2
                 route del default via fd03::2
                 route add default via 10.3.0.2 table 100
                 route add default via fd03::2 table 100")?;
            other_way_for(topology, "iif lan0")
        })
        .holds_for_each_family(|host, family| host.outwards(family, &host.open).is_served())
}

#[test]
fn rule_for_a_packet_mark_is_followed() -> Result<()> {
    let mark = mangle("prerouting", "iifname lan0 tcp dport $open meta mark set 0x66");
    Scenario::new([COUNTERS, &mark].concat())
        .prepare(second_link)
        .prepare(|topology| other_way_for(topology, "fwmark 0x66"))
        .holds(|host| takes_the_second_link(host, |family| host.outwards(family, &host.open).is_served()))
}

#[test]
fn rule_for_a_restored_connection_mark_is_followed() -> Result<()> {
    let mark = mangle(
        "prerouting",
        "iifname lan0 ct state new ct mark set 0x55
         meta mark set ct mark",
    );
    Scenario::new([COUNTERS, &mark].concat())
        .prepare(second_link)
        .prepare(|topology| other_way_for(topology, "fwmark 0x55"))
        .daemon(&[BOTH])
        .holds(|host| takes_the_second_link(host, |family| host.outwards(family, &host.open).is_served()))
}

#[test]
fn rule_for_a_source_port_is_followed() -> Result<()> {
    Scenario::new(COUNTERS)
        .prepare(second_link)
        .prepare(|topology| other_way_for(topology, "ipproto tcp sport 40000-40999"))
        .holds(|host| {
            takes_the_second_link(host, |family| {
                host.outwards(family, &host.open).source_port(40_100).is_served()
            })
        })
}

#[test]
fn strict_reverse_path_filter_lets_flows_through() -> Result<()> {
    Scenario::new("")
        .prepare(|topology| {
            ["all", "default", "lan0", "sat0"]
                .into_iter()
                .try_for_each(|interface| {
                    topology
                        .gateway
                        .sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), 1)
                })
        })
        .daemon(&[BOTH])
        .holds(Host::serves_both_sides)
}
