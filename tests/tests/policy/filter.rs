//! Packet filters: what they accept, drop and reject.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use pepsal_tests::{BOTH, Connector, Direction, Family, LAN, Link, LinkProfile, Transfer};

use crate::scenario::{HASTY, Host, Scenario, filter, mangle};

/// What a host cannot do without.
const NEIGHBOUR_DISCOVERY: &str = "meta l4proto { icmp, ipv6-icmp } accept";

#[test]
fn forward_drops_by_port() -> Result<()> {
    let rules = filter("forward", "accept", "tcp dport $closed drop");
    Scenario::new(rules)
        .daemon(&[LAN, HASTY])
        .holds_for_each_family(|host, family| {
            host.outwards(family, &host.closed).is_dropped()?;
            host.outwards(family, &host.open).is_served()
        })
}

#[test]
fn forward_drops_by_address() -> Result<()> {
    let rules = filter(
        "forward",
        "accept",
        "ip saddr $other4 drop; ip6 saddr $other6 drop",
    );
    Scenario::new(rules)
        .daemon(&[LAN, HASTY])
        .holds_for_each_family(|host, family| {
            host.outwards_from_other(family, &host.open).is_dropped()?;
            host.outwards(family, &host.open).is_served()
        })
}

#[test]
fn forward_accepts_by_interface_and_port_only() -> Result<()> {
    let rules = filter(
        "forward",
        "drop",
        "iifname lan0 oifname sat0 tcp dport $open accept
         iifname sat0 oifname lan0 tcp sport $open accept",
    );
    Scenario::new(rules)
        .daemon(&[LAN, HASTY])
        .holds_for_each_family(|host, family| {
            host.outwards(family, &host.closed).is_dropped()?;
            host.outwards(family, &host.open).is_served()
        })
}

#[test]
fn forward_rejects_at_once() -> Result<()> {
    for how in ["tcp reset", "icmpx admin-prohibited", "icmpx port-unreachable"] {
        let rules = filter(
            "forward",
            "accept",
            &format!("tcp dport $closed reject with {how}"),
        );
        Scenario::new(rules).holds_for_each_family(|host, family| {
            host.outwards(family, &host.closed).is_rejected()?;
            host.outwards(family, &host.open).is_served()
        })?;
    }
    Ok(())
}

#[test]
fn nothing_new_comes_from_outside() -> Result<()> {
    let rules = filter(
        "forward",
        "drop",
        "ct state established,related accept
         iifname lan0 ct state new accept",
    );
    Scenario::new(rules)
        .daemon(&[BOTH, HASTY])
        .holds_for_each_family(|host, family| {
            host.inwards(family).is_dropped()?;
            host.outwards(family, &host.open).is_served()
        })
}

#[test]
fn input_may_be_closed() -> Result<()> {
    Scenario::new(filter("input", "drop", NEIGHBOUR_DISCOVERY))
        .daemon(&[BOTH])
        .holds(Host::serves_both_sides)
}

#[test]
fn output_may_be_closed() -> Result<()> {
    Scenario::new(filter("output", "drop", NEIGHBOUR_DISCOVERY))
        .daemon(&[BOTH])
        .holds(Host::serves_both_sides)
}

#[test]
fn nothing_is_invalid_behind_a_long_lossy_link() -> Result<()> {
    const FLOWS: u64 = 100;
    const LINK: LinkProfile = LinkProfile::symmetric(100_000_000, Duration::from_millis(200), 0.01);
    let rules = ["prerouting", "input", "forward", "output", "postrouting"]
        .map(|hook| mangle(hook, "ct state invalid drop"))
        .concat();
    Scenario::new(rules)
        .topology(|topology| topology.link(Link::Emulated(LINK)))
        .daemon(&[BOTH])
        .holds(|host| {
            thread::scope(|scope| {
                let flows: Vec<_> = (0..FLOWS)
                    .map(|number| {
                        scope.spawn(move || {
                            let family = Family::BOTH[number as usize % 2];
                            let direction = [Direction::Upload, Direction::Download][number as usize / 2 % 2];
                            let transfer = Transfer::new(direction, 100_000).seed(number);
                            host.outwards(family, &host.open)
                                .run(&transfer, Connector::default())
                        })
                    })
                    .collect();
                flows
                    .into_iter()
                    .try_for_each(|flow| flow.join().expect("a transfer does not panic").map(drop))
            })
        })
}
