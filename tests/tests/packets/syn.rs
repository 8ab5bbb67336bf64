//! Which SYNs open a flow, and what is recorded of them.

use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use nix::time::{ClockId, clock_gettime};
use pepsal_ebpf::{Counter, EXTENSION_MAX};
use pepsal_tests::packet::{
    ACK, AUTHENTICATION, CLIENT_PORT, DESTINATION, ESP, FRAGMENT, HOP_BY_HOP, MOBILITY, PADDING, ROUTED,
    ROUTER_ALERT, ROUTING, SERVER_PORT, SYN, Tcp,
};
use pepsal_tests::{Connector, Family, Listener, PATIENCE, eventually};

use crate::MSS_AND_MORE;
use crate::gateway::{Gateway, REPLIES, ethernet, key};

#[test]
fn syn_that_must_not_be_split_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    const ROUTE: [u8; 8] = [131, 7, 4, 10, 9, 9, 9, 0];
    let routed = Tcp {
        ip_options: ROUTE.into(),
        ..Tcp::syn(Family::V4)
    };
    assert_eq!(gateway.steer(&routed.packet())?, Counter::SourceRoute);
    for family in Family::BOTH {
        for kind in [19, 29] {
            let signed = Tcp {
                tcp_options: [&[1, 1, kind, 18][..], &[7; 16]].concat(),
                ..Tcp::syn(family)
            };
            assert_eq!(gateway.steer(&signed.packet())?, Counter::TcpAuth, "kind {kind}");
        }
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn syn_that_no_router_or_no_proxy_may_take_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for (family, link_local) in [(Family::V4, "169.254.1.1"), (Family::V6, "fe80::1")] {
        let syn = Tcp::syn(family);
        let local = Tcp {
            source: (link_local.parse::<IpAddr>()?, CLIENT_PORT).into(),
            ..syn.clone()
        };
        // The kernel has no route for those of IPv6.
        assert!([Counter::LinkLocal, Counter::NotForwarded].contains(&gateway.steer(&local.packet())?));
        for (ttl, expected) in [
            (0, Counter::TtlExceeded),
            (1, Counter::TtlExceeded),
            (2, Counter::Intercepted),
        ] {
            let counted = gateway.steer(&Tcp { ttl, ..syn.clone() }.packet())?;
            assert_eq!(counted, expected, "{family:?} with {ttl} hops left");
        }
        gateway.forget_flows()?;
        // MP_CAPABLE is answered without, MP_JOIN is not for pepsal to answer.
        for (subtype, expected) in [(0, Counter::Intercepted), (1, Counter::MpJoin)] {
            let multipath = Tcp {
                tcp_options: [&[30, 12, subtype << 4][..], &[7; 9]].concat(),
                ..syn.clone()
            };
            assert_eq!(
                gateway.steer(&multipath.packet())?,
                expected,
                "{family:?} {subtype}"
            );
        }
        gateway.forget_flows()?;
    }
    Ok(())
}

#[test]
fn syn_is_recorded_as_it_came() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let v4 = Tcp {
        traffic_class: 0xb9,
        ttl: 61,
        ip_options: vec![148, 4, 0, 0, 7, 7, 4, 0, 0, 0, 0, 0],
        tcp_options: MSS_AND_MORE.into(),
        ..Tcp::syn(Family::V4)
    };
    let v6 = Tcp {
        traffic_class: 0x48,
        ttl: 60,
        flow_label: 0xabcde,
        extensions: vec![(HOP_BY_HOP, ROUTER_ALERT.into()), (DESTINATION, PADDING.into())],
        tcp_options: MSS_AND_MORE.into(),
        ..Tcp::syn(Family::V6)
    };
    for tcp in [v4, v6] {
        assert_eq!(gateway.steer(&tcp.packet())?, Counter::Intercepted);
        let [(flow, record)] = gateway.flows()?.try_into().ok().context("one flow")?;
        assert_eq!(flow, key(&tcp));
        assert_eq!((flow.client(), flow.server()), (tcp.source, tcp.destination));
        assert_eq!((record.traffic_class, record.ttl), (tcp.traffic_class, tcp.ttl));
        assert_eq!(record.ip_options(), tcp.ip_options);
        let header = |protocol| {
            let (_, rest) = tcp.extensions.iter().find(|(found, _)| *found == protocol)?;
            Some([&[if protocol == HOP_BY_HOP { DESTINATION } else { 6 }], &rest[..]].concat())
        };
        assert_eq!(record.hop_by_hop(), header(HOP_BY_HOP).unwrap_or_default());
        assert_eq!(record.destination(), header(DESTINATION).unwrap_or_default());
        assert_eq!(record.ingress_ifindex, gateway.lan0);
        assert_eq!(
            record.egress_ifindex,
            gateway.topology.gateway.run(|| if_nametoindex("sat0"))?
        );
        assert_eq!(record.truncated, 0);
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64;
        assert!(record.time_ns <= now && now - record.time_ns < 10_000_000_000);
        gateway.forget_flows()?;
    }
    Ok(())
}

#[test]
fn syn_is_found_behind_extension_headers_that_a_router_may_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let long = [&[EXTENSION_MAX as u8 / 8][..], &[0; EXTENSION_MAX + 6]].concat();
    type Extensions<'a> = &'a [(u8, &'a [u8])];
    let cases: &[(Extensions<'_>, Counter, u8)] = &[
        (&[(HOP_BY_HOP, ROUTER_ALERT)], Counter::Intercepted, 0),
        (
            &[(DESTINATION, PADDING), (ROUTING, ROUTED), (DESTINATION, PADDING)],
            Counter::Intercepted,
            0,
        ),
        (&[(DESTINATION, PADDING); 8], Counter::Intercepted, 0),
        (&[(DESTINATION, &long)], Counter::Intercepted, 1),
        (&[(HOP_BY_HOP, &long)], Counter::Intercepted, 1),
        (&[(DESTINATION, PADDING); 9], Counter::NotTcp, 0),
        (&[(ROUTING, &[0, 4, 1, 0, 0, 0, 0])], Counter::SourceRoute, 0),
        (
            &[(HOP_BY_HOP, ROUTER_ALERT), (ROUTING, &[0, 4, 255, 0, 0, 0, 0])],
            Counter::SourceRoute,
            0,
        ),
        (&[(AUTHENTICATION, &[4; 23])], Counter::NotTcp, 0),
        (&[(ESP, &[0; 7])], Counter::NotTcp, 0),
        (&[(MOBILITY, PADDING)], Counter::NotTcp, 0),
        (&[(253, PADDING)], Counter::NotTcp, 0),
        (&[(59, PADDING)], Counter::NotTcp, 0),
        (&[(FRAGMENT, &[0, 0, 1, 0, 0, 0, 1])], Counter::Fragment, 0),
        (&[(FRAGMENT, &[0, 0, 8, 0, 0, 0, 1])], Counter::Fragment, 0),
        // An atomic fragment (RFC 6946).
        (&[(FRAGMENT, &[0, 0, 0, 0, 0, 0, 1])], Counter::Fragment, 0),
        (
            &[(HOP_BY_HOP, ROUTER_ALERT), (FRAGMENT, &[0, 0, 1, 0, 0, 0, 1])],
            Counter::Fragment,
            0,
        ),
        (&[(DESTINATION, &[255, 0, 0, 0, 0, 0, 0])], Counter::Malformed, 0),
    ];
    for (extensions, expected, truncated) in cases {
        let counted = gateway.steer(&Tcp::with_extensions(extensions).packet())?;
        assert_eq!(counted, *expected, "{extensions:?}");
        let records: Vec<u8> = gateway
            .flows()?
            .iter()
            .map(|(_, record)| record.truncated)
            .collect();
        let expected: &[u8] = if counted == Counter::Intercepted {
            &[*truncated]
        } else {
            &[]
        };
        assert_eq!(records, expected, "{extensions:?}");
        gateway.forget_flows()?;
    }
    Ok(())
}

#[test]
fn only_a_plain_syn_opens_a_flow() -> Result<()> {
    const FLAGS: [(u8, &str); 4] = [
        (0x01, "FIN"),
        (0x04, "RST"),
        (ACK, "ACK"),
        (0x15, "FIN, RST, ACK"),
    ];
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        for (flags, name) in FLAGS {
            for flags in [flags, flags | SYN] {
                let counted = gateway.steer(&Tcp::with_flags(family, flags).packet())?;
                assert_eq!(counted, Counter::NoFlow, "{family:?} {name} {flags:#x}");
            }
        }
        for flags in [0, 0x08, 0x20, 0xc0] {
            assert_eq!(
                gateway.steer(&Tcp::with_flags(family, flags).packet())?,
                Counter::NoFlow,
                "{flags:#x}"
            );
        }
        assert!(gateway.flows()?.is_empty());
        // ECN setup, push, urgent: odd, but a SYN.
        for flags in [0xc0, 0x08, 0x20] {
            assert_eq!(
                gateway.steer(&Tcp::with_flags(family, SYN | flags).packet())?,
                Counter::Intercepted
            );
            gateway.forget_flows()?;
        }
    }
    Ok(())
}

#[test]
fn syn_that_leaves_by_an_interface_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let syn = ethernet(&Tcp::syn(family).packet());
        assert_eq!(gateway.run(REPLIES, &syn)?, Counter::NoFlow);
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn syn_that_would_not_be_forwarded_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway.topology.gateway.ip("route add unreachable 10.66.0.0/16
         route add prohibit 10.67.0.0/16
         route add blackhole 10.68.0.0/16
         route add unreachable fd66::/16")?;
    for (wrong, address) in [
        ("the gateway's own", "10.1.0.1"),
        ("the gateway's own, on the other side", "10.2.0.1"),
        ("loopback", "127.0.0.1"),
        ("no route", "192.0.2.1"),
        ("unreachable", "10.66.0.1"),
        ("prohibited", "10.67.0.1"),
        ("black hole", "10.68.0.1"),
        ("subnet's broadcast", "10.2.0.255"),
        ("broadcast", "255.255.255.255"),
        ("multicast", "224.0.0.1"),
        ("the gateway's own", "fd01::1"),
        ("the gateway's own, on the other side", "fd02::1"),
        ("loopback", "::1"),
        ("no route", "2001:db8::1"),
        ("unreachable", "fd66::1"),
        ("multicast", "ff02::1"),
        ("link-local", "fe80::1"),
    ] {
        let address: IpAddr = address.parse()?;
        let family = if address.is_ipv4() { Family::V4 } else { Family::V6 };
        let syn = Tcp {
            destination: (address, SERVER_PORT).into(),
            ..Tcp::syn(family)
        };
        assert_eq!(
            gateway.steer(&syn.packet())?,
            Counter::NotForwarded,
            "{wrong}: {address}"
        );
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn syn_passes_when_forwarding_is_off() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway
        .topology
        .gateway
        .sysctl("net.ipv4.conf.all.forwarding", 0)?;
    gateway
        .topology
        .gateway
        .sysctl("net.ipv6.conf.all.forwarding", 0)?;
    for family in Family::BOTH {
        assert_eq!(
            gateway.steer(&Tcp::syn(family).packet())?,
            Counter::NotForwarded,
            "{family:?}"
        );
    }
    Ok(())
}

#[test]
fn syn_takes_over_ports_of_a_connection_in_time_wait() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for (family, address, net) in [
        (Family::V4, "10.9.0.9", "10.9.0.0/24"),
        (Family::V6, "fd09::9", "fd09::/64"),
    ] {
        let host = &gateway.topology.gateway;
        let next_hop = family.server();
        // A leg whose near end has an address that is not the gateway's, once it is taken away again.
        let (prefix, nodad) = if family == Family::V4 {
            (32, "")
        } else {
            (128, "nodad")
        };
        host.ip(format!(
            "address add {address}/{prefix} dev lo {nodad}\nroute add {net} via {next_hop}"
        ))?;
        let listener = Listener::bind_any(&gateway.topology.client, family.client())?;
        let source = Some(SocketAddr::new(address.parse()?, 0));
        let to = SocketAddr::new(family.client(), listener.port());
        let near = Connector {
            source,
            ..Connector::default()
        }
        .connect(host, to)?;
        let syn = Tcp {
            source: to,
            destination: near.local_addr()?,
            ..Tcp::syn(family)
        };
        let mut far = listener.accept(PATIENCE)?.stream;
        let near_end = near.local_addr()?;
        // Dropping it would leave the order to the processes that tests start meanwhile, which have it for a moment, too.
        near.shutdown(Shutdown::Write)?;
        assert_eq!(far.read(&mut [0])?, 0);
        far.shutdown(Shutdown::Write)?;
        // Its last acknowledgements need the address.
        eventually(PATIENCE, || {
            let ss = host.command("ss").args(["-tnH", "state", "time-wait"]).output();
            ss.is_ok_and(|ss| String::from_utf8_lossy(&ss.stdout).contains(&near_end.to_string()))
        });
        host.ip(format!("address del {address}/{prefix} dev lo"))?;
        eventually(PATIENCE, || {
            gateway
                .steer(&syn.packet())
                .is_ok_and(|counted| counted == Counter::Intercepted)
        });
        let ack = Tcp { flags: ACK, ..syn };
        assert_eq!(
            gateway.steer(&ack.packet())?,
            Counter::Steered,
            "the old one is still there"
        );
    }
    Ok(())
}
