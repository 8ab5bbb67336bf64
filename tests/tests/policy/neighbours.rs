//! Others that handle the same traffic: the kernel's fast path, a second instance, a transparent proxy, the server.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use pepsal_tests::{Connector, Family, LAN, Listener, Namespace, PATIENCE, Topology, Transfer};
use socket2::SockRef;

use crate::scenario::{Host, MEGABYTE, Scenario, mangle};

/// `cargo xtask vm-test 6.12 --files policy -- --ignored` has a kernel for it.
#[test]
#[ignore = "not every kernel has CONFIG_NF_FLOW_TABLE and CONFIG_NFT_FLOW_OFFLOAD"]
fn flow_table_forwards_most_of_it() -> Result<()> {
    let rules = "table inet filter {
        counter slow { }
        flowtable fast { hook ingress priority 0; devices = { lan0, sat0 }; }
        chain forward {
            type filter hook forward priority filter;
            meta l4proto tcp flow add @fast
            meta l4proto tcp counter name slow
        }
    }";
    Scenario::new(rules).holds(|host| {
        for family in Family::BOTH {
            host.outwards(family, &host.open).is_served()?;
        }
        let slow = host.counter("slow")?;
        ensure!(
            slow.packets > 0 && slow.bytes < MEGABYTE,
            "{slow:?} beside the flow table, of four megabytes"
        );
        Ok(())
    })
}

#[test]
fn two_instances_split_a_direction_each() -> Result<()> {
    Scenario::new("")
        .daemon(&[LAN])
        .daemon(&[&["-i", "sat0"]])
        .holds(Host::serves_both_sides)
}

#[test]
fn transparent_proxy_of_the_host_gets_its_connections() -> Result<()> {
    const PORT: u16 = 8080;
    const PROXY: u16 = 50_080;
    let rules = mangle(
        "prerouting",
        &format!("iifname lan0 tcp dport {PORT} tproxy to :{PROXY} meta mark set 1 accept"),
    );
    Scenario::new(rules)
        .prepare(deliver_marked_locally)
        .holds_for_each_family(|host, family| {
            let proxy = transparent_listener(&host.topology.gateway, family, PROXY)?;
            let server = SocketAddr::new(family.server(), PORT);
            let client = Connector::default().connect(&host.topology.client, server)?;
            let accepted = proxy.accept(PATIENCE).context("the proxy's connection")?;
            ensure!(
                (accepted.peer, accepted.stream.local_addr()?) == (client.local_addr()?, server),
                "the proxy gets {} to {}",
                accepted.peer,
                accepted.stream.local_addr()?
            );
            for (mut from, mut to) in [(&client, &accepted.stream), (&accepted.stream, &client)] {
                from.write_all(&[7; 1000])?;
                to.read_exact(&mut [0; 1000])?;
            }
            host.outwards(family, &host.open).is_served()
        })
}

/// A listener that accepts connections to addresses of others.
fn transparent_listener(namespace: &Namespace, family: Family, port: u16) -> Result<Listener> {
    let address: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listener = Listener::bind(namespace, (address, port).into())?;
    match family {
        Family::V4 => SockRef::from(&listener).set_ip_transparent_v4(true)?,
        Family::V6 => SockRef::from(&listener).set_ip_transparent_v6(true)?,
    }
    Ok(listener)
}

/// What TPROXY wants: packets with its mark belong to this host.
fn deliver_marked_locally(topology: &Topology) -> Result<()> {
    const ROUTING: &str = "rule add fwmark 1 lookup 100
         route add local default dev lo table 100";
    topology.gateway.ip(ROUTING)?;
    topology.gateway.ip6(ROUTING)
}

#[test]
fn server_sees_what_it_would_have_seen() -> Result<()> {
    const ALERT_V4: [u8; 4] = [148, 4, 0, 0];
    const ALERT_V6: [u8; 8] = [0, 0, 5, 2, 0, 0, 1, 0];
    let seen = RefCell::new(Vec::new());
    // Legs with their clients' TTL cannot be told from clients: that the daemon has taken them is in its log.
    Scenario::new("")
        .daemon(&[LAN, &["--replicate", "dscp,options,ttl"]])
        .holds(|host| {
            for (family, port) in [(Family::V4, 4321), (Family::V6, 4322)] {
                let mut connector = Connector {
                    source: Some((family.client(), port).into()),
                    traffic_class: 0x48,
                    ..Connector::default()
                };
                match family {
                    Family::V4 => connector.ip_options = ALERT_V4.into(),
                    Family::V6 => connector.hop_by_hop = ALERT_V6.into(),
                }
                let outcome = Transfer::upload(1)
                    .connector(connector)
                    .run(&host.topology.client, host.open.address(family))?;
                let syn = outcome.syn;
                seen.borrow_mut().push((
                    outcome.peer,
                    (syn.source(), syn.traffic_class(), syn.ttl()),
                    syn.ip_options().to_vec(),
                    syn.extension_header(0).map(<[u8]>::to_vec),
                ));
            }
            Ok(())
        })?;
    let seen = seen.into_inner();
    let (without, with) = seen.split_at(2);
    ensure!(with == without, "the server sees {with:?} instead of {without:?}");
    Ok(())
}
