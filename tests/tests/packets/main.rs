//! Crafted packets through the programs as the kernel runs them: verdict, mark, counters and records.
//!
//! The programs pass every packet on, so what they decide shows in the mark, in the one counter that each packet moves
//! and in the map of flows.

use std::io::{self, Read};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, SockMap};
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::time::{ClockId, clock_gettime};
use pepsal_ebpf::{Counter, EXTENSION_MAX, NO_LINK, PORT_SET_BYTES, PortSet, listener_v4, listener_v6};
use pepsal_tests::packet::*;
use pepsal_tests::{Connector, Family, Listener, PATIENCE, eventually};

use gateway::{
    Gateway, LIMIT, MAC, MARK, MARK_MASK, OTHERS, Outcome, REPLIES, STEER, ethernet, program, test_run_marked,
};

mod differential;
mod gateway;
mod generator;
mod oracle;

const MSS_AND_MORE: [u8; 20] = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];

#[test]
fn syn_that_must_not_be_split_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    const ROUTE: [u8; 8] = [131, 7, 4, 10, 9, 9, 9, 0];
    let routed = Tcp {
        ip_options: ROUTE.into(),
        ..Tcp::syn(Family::V4)
    };
    assert_eq!(gateway.steer(&routed.packet())?, Counter::Waypoint);
    for family in Family::BOTH {
        for kind in [19, 29] {
            let signed = Tcp {
                tcp_options: [&[1, 1, kind, 18][..], &[7; 16]].concat(),
                ..Tcp::syn(family)
            };
            assert_eq!(gateway.steer(&signed.packet())?, Counter::Signed, "kind {kind}");
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
            (0, Counter::Expiring),
            (1, Counter::Expiring),
            (2, Counter::Intercepted),
        ] {
            let counted = gateway.steer(&Tcp { ttl, ..syn.clone() }.packet())?;
            assert_eq!(counted, expected, "{family:?} with {ttl} hops left");
        }
        gateway.forget_flows()?;
        // MP_CAPABLE is answered without, MP_JOIN is not for pepsal to answer.
        for (subtype, expected) in [(0, Counter::Intercepted), (1, Counter::Joining)] {
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
        let [(key, record)] = gateway.flows()?.try_into().ok().context("one flow")?;
        assert_eq!(key, gateway::key(&tcp));
        assert_eq!((key.client(), key.server()), (tcp.source, tcp.destination));
        assert_eq!((record.traffic_class, record.ttl), (tcp.traffic_class, tcp.ttl));
        assert_eq!(record.flow_label(), tcp.flow_label);
        assert_eq!(record.ip_options(), tcp.ip_options);
        let header = |protocol| {
            let (_, rest) = tcp.extensions.iter().find(|(found, _)| *found == protocol)?;
            Some([&[if protocol == HOP_BY_HOP { DESTINATION } else { 6 }], &rest[..]].concat())
        };
        assert_eq!(record.hop_by_hop(), header(HOP_BY_HOP).unwrap_or_default());
        assert_eq!(record.destination(), header(DESTINATION).unwrap_or_default());
        let options = record.tcp_options();
        assert_eq!((options.mss, options.window_scale), (Some(1460), Some(7)));
        assert!(options.sack && options.timestamps && !options.fast_open);
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
        (&[(ROUTING, &[0, 4, 1, 0, 0, 0, 0])], Counter::Waypoint, 0),
        (
            &[(HOP_BY_HOP, ROUTER_ALERT), (ROUTING, &[0, 4, 255, 0, 0, 0, 0])],
            Counter::Waypoint,
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
fn packets_cut_short_pass_at_every_length() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let v4 = Tcp {
        ip_options: vec![1; 8],
        tcp_options: MSS_AND_MORE.into(),
        ..Tcp::syn(Family::V4)
    };
    let v6 = Tcp {
        tcp_options: MSS_AND_MORE.into(),
        ..Tcp::with_extensions(&[
            (HOP_BY_HOP, ROUTER_ALERT),
            (ROUTING, ROUTED),
            (DESTINATION, PADDING),
        ])
    };
    for tcp in [v4, v6] {
        let packet = tcp.packet();
        // A test run refuses to do without an IP header.
        for len in ip_header_len(&tcp)..packet.len() {
            assert_eq!(
                gateway.steer(&packet[..len])?,
                Counter::Malformed,
                "{len} of {} bytes",
                packet.len()
            );
            assert!(gateway.flows()?.is_empty());
        }
        assert_eq!(gateway.steer(&packet)?, Counter::Intercepted);
        gateway.forget_flows()?;
    }
    Ok(())
}

#[test]
fn frames_that_end_within_the_ip_header_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway.attach()?;
    let mut sent = 0;
    for family in Family::BOTH {
        let syn = Tcp::syn(family);
        for len in 0..ip_header_len(&syn) {
            let frame = [&[0xff; 6], &ethernet(&syn.packet())[6..14 + len]].concat();
            gateway.topology.client.run(|| send_frame("eth0", &frame))?;
            sent += 1;
        }
    }
    eventually(PATIENCE, || {
        gateway.count(Counter::Malformed).is_ok_and(|count| count == sent)
    });
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn icmp_errors_cut_short_pass_at_every_length() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (incoming, _ends) = gateway.leg(family)?;
        let header_len = ip_header_len(&incoming);
        let error = incoming
            .swapped()
            .icmp_error(if family == Family::V4 { 3 } else { 2 }, header_len + 8);
        for len in header_len..error.len() {
            assert_eq!(
                gateway.steer(&error[..len])?,
                Counter::Malformed,
                "{len} of {} bytes",
                error.len()
            );
        }
        assert_eq!(gateway.steer(&error)?, Counter::IcmpError);
    }
    Ok(())
}

#[test]
fn headers_that_contradict_themselves_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let (v4, v6) = (Tcp::syn(Family::V4).packet(), Tcp::syn(Family::V6).packet());
    // What is wrong, the packet, and what is written where.
    let cases: &[(&str, &[u8], usize, &[u8])] = &[
        ("version 5", &v4, 0, &[0x55]),
        ("header of 16 bytes", &v4, 0, &[0x44]),
        ("header of no bytes", &v4, 0, &[0x40]),
        ("header longer than the packet", &v4, 0, &[0x4f]),
        ("total length within the header", &v4, 2, &[0, 19]),
        ("total length of no bytes", &v4, 2, &[0, 0]),
        ("total length within the TCP header", &v4, 2, &[0, 39]),
        ("TCP header of 16 bytes", &v4, 32, &[0x40]),
        ("TCP header of no bytes", &v4, 32, &[0x00]),
        ("TCP header longer than the packet", &v4, 32, &[0xf0]),
        ("source port 0", &v4, 20, &[0, 0]),
        ("destination port 0", &v4, 22, &[0, 0]),
        ("payload within the TCP header", &v6, 4, &[0, 19]),
        ("payload of no bytes", &v6, 4, &[0, 0]),
        ("TCP header of 16 bytes", &v6, 52, &[0x40]),
        ("TCP header longer than the packet", &v6, 52, &[0xf0]),
        ("source port 0", &v6, 40, &[0, 0]),
        ("destination port 0", &v6, 42, &[0, 0]),
    ];
    for (wrong, packet, offset, bytes) in cases {
        let mut packet = packet.to_vec();
        packet[*offset..offset + bytes.len()].copy_from_slice(bytes);
        assert_eq!(gateway.steer(&packet)?, Counter::Malformed, "{wrong}");
    }
    for (ethertype, packet) in [([0x08, 0x00], &v6), ([0x86, 0xdd], &v4)] {
        let frame = [&[0; 12][..], &ethertype, packet].concat();
        assert_eq!(gateway.run(STEER, &frame)?, Counter::Malformed, "{ethertype:x?}");
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn fragments_go_where_the_first_of_their_packet_went() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let (leg, _streams) = gateway.leg(Family::V4)?;
    let fragment = |of: &Tcp, flags_and_offset: [u8; 2], id: u8| {
        let mut packet = of.packet();
        packet[4..6].copy_from_slice(&[1, id]);
        packet[6..8].copy_from_slice(&flags_and_offset);
        packet
    };
    for (flags_and_offset, id, expected) in [
        // Before the first one, and without it.
        ([0x20, 0x01], 1, Counter::Fragment),
        ([0x00, 0x01], 1, Counter::Fragment),
        ([0x1f, 0x00], 1, Counter::Fragment),
        ([0x20, 0x00], 1, Counter::Steered),
        ([0x20, 0x01], 1, Counter::Steered),
        ([0x00, 0x02], 1, Counter::Steered),
        // Another packet's.
        ([0x00, 0x02], 2, Counter::Fragment),
    ] {
        let counted = gateway.steer(&fragment(&leg, flags_and_offset, id))?;
        assert_eq!(counted, expected, "{flags_and_offset:x?} of {id}");
    }
    // Of what is not a leg's all of them pass, a SYN's too.
    for flags_and_offset in [[0x20, 0x00], [0x20, 0x01], [0x00, 0x02]] {
        let packet = fragment(&Tcp::syn(Family::V4), flags_and_offset, 3);
        assert_eq!(gateway.steer(&packet)?, Counter::Fragment);
    }

    let (leg, _streams) = gateway.leg(Family::V6)?;
    let fragment = |offset: [u8; 2], id: u8| {
        let header = vec![0, offset[0], offset[1], 0, 0, 0, id];
        Tcp {
            extensions: vec![(FRAGMENT, header)],
            ..leg.clone()
        }
        .packet()
    };
    assert_eq!(gateway.steer(&fragment([0, 9], 7))?, Counter::Fragment);
    assert_eq!(gateway.steer(&fragment([0, 1], 7))?, Counter::Steered);
    assert_eq!(gateway.steer(&fragment([0, 9], 7))?, Counter::Steered);
    assert_eq!(gateway.steer(&fragment([0, 8], 8))?, Counter::Fragment);
    Ok(())
}

#[test]
fn flood_of_fragments_fills_its_map_and_no_more() -> Result<()> {
    const MOST: usize = 4096;
    let mut gateway = Gateway::new()?;
    let (leg, _streams) = gateway.leg(Family::V4)?;
    for id in 0..5000_u16 {
        let mut first = leg.packet();
        first[4..6].copy_from_slice(&id.to_be_bytes());
        first[6..8].copy_from_slice(&[0x20, 0x00]);
        assert_eq!(gateway.steer(&first)?, Counter::Steered, "{id}");
    }
    let fragments = gateway.ebpf.map("FRAGMENTS").context("FRAGMENTS")?;
    let fragments: HashMap<_, [u8; 40], u8> = fragments.try_into()?;
    let known = fragments.keys().count();
    assert!((MOST / 2..=MOST).contains(&known), "{known} packets");
    Ok(())
}

#[test]
fn what_is_not_tcp_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for (ethertype, expected) in [
        ([0x08, 0x06], Counter::NotIp),
        // Tagged twice: the outer tag has been taken off, or had a type that nobody knows.
        ([0x81, 0x00], Counter::NotIp),
        ([0x88, 0xa8], Counter::NotIp),
        ([0x88, 0x47], Counter::NotIp),
        ([0x88, 0x64], Counter::NotIp),
    ] {
        let frame = [&[0; 12][..], &ethertype, &Tcp::syn(Family::V4).packet()].concat();
        assert_eq!(gateway.run(STEER, &frame)?, expected, "{ethertype:x?}");
    }
    for family in Family::BOTH {
        let syn = Tcp::syn(family);
        let tcp = &syn.packet()[ip_header_len(&syn)..];
        for protocol in [2, 4, 17, 33, 41, 47, 50, 51, 89, 132, 255] {
            assert_eq!(
                gateway.steer(&syn.ip(protocol, tcp))?,
                Counter::NotTcp,
                "{family:?} protocol {protocol}"
            );
        }
        // Each family's ICMP means nothing in the other.
        let (own, other) = if family == Family::V4 { (1, 58) } else { (58, 1) };
        assert_eq!(gateway.steer(&syn.ip(other, &[3; 64]))?, Counter::NotTcp);
        let echo = if family == Family::V4 { 8 } else { 128 };
        assert_eq!(gateway.steer(&syn.ip(own, &[echo; 64]))?, Counter::NotTcp);
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn icmp_errors_about_legs_are_steered_and_all_other_messages_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (incoming, _ends) = gateway.leg(family)?;
        let leg = incoming.swapped();
        let stranger = Tcp::syn(family);
        let header_len = ip_header_len(&leg);
        for icmp_type in 0..=255 {
            let is_error = match family {
                Family::V4 => [3, 11, 12].contains(&icmp_type),
                Family::V6 => (1..=4).contains(&icmp_type),
            };
            // It would lead the client past the gateway.
            let is_redirect = (family, icmp_type) == (Family::V4, 5);
            for name in [STEER, REPLIES] {
                let about_leg = gateway.run(name, &ethernet(&leg.icmp_error(icmp_type, header_len + 8)))?;
                let about_stranger =
                    gateway.run(name, &ethernet(&stranger.icmp_error(icmp_type, header_len + 8)))?;
                let expected = match is_error {
                    true => (Counter::IcmpError, Counter::Foreign),
                    false if is_redirect && name == REPLIES => (Counter::Redirect, Counter::NotTcp),
                    false => (Counter::NotTcp, Counter::NotTcp),
                };
                assert_eq!(
                    (about_leg, about_stranger),
                    expected,
                    "{family:?} type {icmp_type}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn icmp_errors_are_understood_by_what_they_quote() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let (v4, _ends_v4) = gateway.leg(Family::V4)?;
    let (v6, _ends_v6) = gateway.leg(Family::V6)?;
    let (v4, v6) = (v4.swapped(), v6.swapped());
    let with_options = Tcp {
        ip_options: vec![1; 40],
        ..v4.clone()
    };
    assert_eq!(
        gateway.steer(&with_options.icmp_error(3, usize::MAX))?,
        Counter::IcmpError
    );
    let extended = Tcp {
        extensions: vec![(HOP_BY_HOP, ROUTER_ALERT.into()), (DESTINATION, PADDING.into())],
        ..v6.clone()
    };
    assert_eq!(
        gateway.steer(&extended.icmp_error(2, usize::MAX))?,
        Counter::IcmpError
    );
    let later_fragment = Tcp {
        extensions: vec![(FRAGMENT, vec![0, 0, 8, 0, 0, 0, 1])],
        ..v6.clone()
    };
    assert_eq!(
        gateway.steer(&later_fragment.icmp_error(2, usize::MAX))?,
        Counter::Fragment
    );
    // Quoting the wrong way round: sent by the peer, not by us.
    assert_eq!(
        gateway.steer(&v4.swapped().icmp_error(3, usize::MAX))?,
        Counter::Foreign
    );

    let udp_quoted = [&[3, 4, 0, 0, 0, 0, 5, 120][..], &v4.ip(17, &[0; 8])].concat();
    assert_eq!(gateway.steer(&v4.swapped().ip(1, &udp_quoted))?, Counter::NotTcp);
    let v6_in_v4 = [&[3, 4, 0, 0, 0, 0, 5, 120][..], &v6.packet()].concat();
    assert_eq!(gateway.steer(&v4.swapped().ip(1, &v6_in_v4))?, Counter::Malformed);
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
                assert_eq!(counted, Counter::Foreign, "{family:?} {name} {flags:#x}");
            }
        }
        for flags in [0, 0x08, 0x20, 0xc0] {
            assert_eq!(
                gateway.steer(&Tcp::with_flags(family, flags).packet())?,
                Counter::Foreign,
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
fn segments_of_a_flow_that_is_being_set_up_are_steered() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let syn = Tcp {
            ttl: 64,
            ..Tcp::syn(family)
        };
        assert_eq!(gateway.steer(&syn.packet())?, Counter::Intercepted);
        let again = Tcp {
            ttl: 63,
            ..syn.clone()
        };
        assert_eq!(gateway.steer(&again.packet())?, Counter::Retransmitted);
        let (_, record) = gateway
            .flows()?
            .into_iter()
            .find(|(key, _)| *key == gateway::key(&syn))
            .context("the flow")?;
        assert_eq!(record.ttl, 63, "the newest SYN counts");
        let ack = Tcp::with_flags(family, ACK).packet();
        assert_eq!(gateway.steer(&ack)?, Counter::Pending);
        assert_eq!(
            gateway.run(REPLIES, &ethernet(&ack))?,
            Counter::Foreign,
            "no server leg is recorded"
        );
        let answer = Tcp::with_flags(family, ACK).swapped();
        assert_eq!(
            gateway.steer(&answer.packet())?,
            Counter::Foreign,
            "the server is not to answer"
        );
    }
    Ok(())
}

#[test]
fn segments_of_legs_are_taken_on_ingress_and_on_egress() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (leg, _ends) = gateway.leg(family)?;
        for (name, counter) in [(STEER, Counter::Steered), (REPLIES, Counter::Returned)] {
            for flags in [ACK, 0x04, 0x11, SYN, SYN | ACK] {
                let segment = Tcp { flags, ..leg.clone() };
                assert_eq!(
                    gateway.run(name, &ethernet(&segment.packet()))?,
                    counter,
                    "{flags:#x}"
                );
            }
        }
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn flow_is_known_for_two_generations_and_by_its_syn_at_once() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let (leg, _ends) = gateway.leg(family)?;
        for (generation, slots, is_known) in [
            (1, 0, false),
            (1, 1, true),
            (2, 1, true),
            (3, 1, true),
            (9, 1, false),
            // The count leaves zero out.
            (1, 255, true),
            (2, 255, true),
            (1, 254, true),
            (9, 254, false),
        ] {
            gateway.filter(generation, slots)?;
            for (name, counter) in [(STEER, Counter::Steered), (REPLIES, Counter::Returned)] {
                let expected = if is_known { counter } else { Counter::Foreign };
                let counted = gateway.run(name, &ethernet(&leg.packet()))?;
                assert_eq!(counted, expected, "{family:?} {name} {generation} {slots}");
            }
        }
        gateway.filter(5, 0)?;
        assert_eq!(gateway.steer(&Tcp::syn(family).packet())?, Counter::Intercepted);
        let ack = Tcp::with_flags(family, ACK).packet();
        assert_eq!(gateway.steer(&ack)?, Counter::Pending);
    }
    Ok(())
}

#[test]
fn syn_that_leaves_by_an_interface_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let syn = ethernet(&Tcp::syn(family).packet());
        assert_eq!(gateway.run(REPLIES, &syn)?, Counter::Foreign);
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
fn syn_that_is_not_selected_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        for trie in ["DESTINATIONS", "SOURCES"] {
            gateway.select(trie, family, false)?;
            assert_eq!(
                gateway.steer(&Tcp::syn(family).packet())?,
                Counter::Unselected,
                "{family:?} {trie}"
            );
            gateway.select(trie, family, true)?;
        }
    }
    assert!(gateway.flows()?.is_empty());
    // Set 1 takes all ports but those around the server's.
    let mut ports = [0xff; PORT_SET_BYTES];
    ports[usize::from(SERVER_PORT) / 8] = !0b0000_0001;
    let mut sets: HashMap<_, u32, PortSet> = gateway
        .ebpf
        .map_mut("PORT_SETS")
        .context("PORT_SETS")?
        .try_into()?;
    sets.insert(1, ports, 0)?;
    for (port, expected) in [
        (79, Counter::Intercepted),
        (80, Counter::Unselected),
        (81, Counter::Intercepted),
        (65_535, Counter::Intercepted),
        (1, Counter::Intercepted),
    ] {
        let syn = Tcp {
            destination: (Family::V4.server(), port).into(),
            ..Tcp::syn(Family::V4)
        };
        assert_eq!(gateway.steer(&syn.packet())?, expected, "port {port}");
    }
    Ok(())
}

#[test]
fn rules_hold_whose_generation_does() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        gateway.select_in(1, "DESTINATIONS", family, false)?;
        gateway.select_in(1, "SOURCES", family, true)?;
    }
    for (generation, expected) in [
        (0, Counter::Intercepted),
        (1, Counter::Unselected),
        // Nothing was written for it.
        (2, Counter::Unselected),
        (0, Counter::Intercepted),
    ] {
        let map = gateway.ebpf.map_mut("GENERATION").context("GENERATION")?;
        Array::<_, u32>::try_from(map)?.set(0, generation, 0)?;
        for family in Family::BOTH {
            assert_eq!(
                gateway.steer(&Tcp::syn(family).packet())?,
                expected,
                "{family:?} {generation}"
            );
        }
        gateway.forget_flows()?;
    }
    Ok(())
}

#[test]
fn without_a_listener_of_its_family_a_syn_passes() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for (slot, family) in [
        (listener_v6(NO_LINK), Family::V6),
        (listener_v4(NO_LINK), Family::V4),
    ] {
        assert_eq!(gateway.steer(&Tcp::syn(family).packet())?, Counter::Intercepted);
        gateway.forget_flows()?;
        let mut slots: SockMap<_> = gateway
            .ebpf
            .map_mut("LISTENERS")
            .context("LISTENERS")?
            .try_into()?;
        slots.clear_index(&slot)?;
        assert_eq!(gateway.steer(&Tcp::syn(family).packet())?, Counter::NoListener);
    }
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

#[test]
fn slot_of_a_listener_that_is_closed_is_empty() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway.listeners = gateway.topology.gateway.run(|| -> io::Result<_> {
        Ok([
            TcpListener::bind("127.0.0.1:5001")?,
            TcpListener::bind("[::1]:5001")?,
        ])
    })?;
    for family in Family::BOTH {
        // What another test forks holds a closed listener until it executes its program.
        eventually(PATIENCE, || {
            let counted = gateway.steer(&Tcp::syn(family).packet()).expect("a test run");
            counted == Counter::NoListener
        });
    }
    Ok(())
}

#[test]
fn hung_daemon_is_passed_by() -> Result<()> {
    let bound = Duration::from_secs(10);
    let too_long = bound + Duration::from_secs(1);
    // The clock starts with the machine, which may have booted a moment ago.
    eventually(2 * bound, || {
        clock_gettime(ClockId::CLOCK_MONOTONIC).is_ok_and(|now| Duration::from(now) > too_long)
    });
    let mut gateway = Gateway::with_heartbeat_bound(bound)?;
    gateway.beat(too_long)?;
    assert_eq!(
        gateway.steer(&Tcp::syn(Family::V4).packet())?,
        Counter::Unresponsive
    );
    assert!(gateway.flows()?.is_empty());
    gateway.beat(bound / 2)?;
    assert_eq!(
        gateway.steer(&Tcp::syn(Family::V4).packet())?,
        Counter::Intercepted
    );
    // What has begun goes on.
    gateway.beat(too_long)?;
    assert_eq!(
        gateway.steer(&Tcp::with_flags(Family::V4, ACK).packet())?,
        Counter::Pending
    );
    Ok(())
}

#[test]
fn at_the_limit_new_flows_pass_and_those_that_are_known_do_not() -> Result<()> {
    let mut gateway = Gateway::new()?;
    let syn = |index: u32| {
        let port = CLIENT_PORT + index as u16;
        Tcp {
            source: (Family::V4.client(), port).into(),
            ..Tcp::syn(Family::V4)
        }
    };
    for index in 0..LIMIT {
        assert_eq!(gateway.steer(&syn(index).packet())?, Counter::Intercepted);
    }
    for index in LIMIT..LIMIT + 3 {
        assert_eq!(gateway.steer(&syn(index).packet())?, Counter::LimitReached);
    }
    assert_eq!(gateway.steer(&syn(0).packet())?, Counter::Retransmitted);
    assert_eq!(
        gateway.steer(&Tcp { flags: ACK, ..syn(1) }.packet())?,
        Counter::Pending
    );
    assert_eq!(gateway.flows()?.len(), LIMIT as usize);
    gateway.forget_flows()?;
    assert_eq!(gateway.steer(&syn(LIMIT).packet())?, Counter::Intercepted);
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

#[test]
fn frames_of_other_devices_and_hosts_pass() -> Result<()> {
    let mut gateway = Gateway::new()?;
    gateway.attach()?;
    gateway.topology.gateway.ip("link set lan0 promisc on")?;
    let syn = |port: u16| {
        let source = SocketAddr::new(Family::V4.client(), port);
        ethernet(
            &Tcp {
                source,
                ..Tcp::syn(Family::V4)
            }
            .packet(),
        )
    };
    let tagged = |port, vlan: u8| {
        let syn = syn(port);
        [&syn[..12], &[0x81, 0x00, 0x00, vlan], &syn[12..]].concat()
    };
    // A VLAN's comes again on the VLAN's own device; a priority tag (VID 0) makes none of its own.
    for (to, frame) in [
        (MAC, tagged(1001, 100)),
        ([2, 0, 0, 0, 0, 9], syn(1002)),
        ([0xff; 6], syn(1003)),
        (MAC, tagged(1004, 0)),
        (MAC, syn(1005)),
    ] {
        let frame = [&to[..], &frame[6..]].concat();
        gateway.topology.client.run(|| send_frame("eth0", &frame))?;
    }
    eventually(PATIENCE, || {
        gateway.count(Counter::Intercepted).is_ok_and(|count| count == 2)
    });
    assert_eq!(gateway.count(Counter::Vlan)?, 1);
    assert_eq!(gateway.count(Counter::OtherHost)?, 2);
    let mut ports: Vec<u16> = gateway
        .flows()?
        .iter()
        .map(|(key, _)| key.client().port())
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [1004, 1005]);
    Ok(())
}

#[test]
fn packet_of_another_instances_server_leg_is_left_to_that() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for family in Family::BOTH {
        let frame = ethernet(&Tcp::syn(family).packet());
        let marked = OTHERS & !MARK_MASK | MARK;
        let lan0 = gateway.lan0;
        let program = program(&mut gateway.ebpf, STEER)?;
        let outcome = gateway
            .topology
            .gateway
            .run(|| test_run_marked(program, &frame, lan0, marked))?;
        assert_eq!(outcome, Outcome::Passed, "with its mark");
    }
    assert_eq!(gateway.count(Counter::Foreign)?, 2);
    assert!(gateway.flows()?.is_empty());
    Ok(())
}

/// Sends a frame from an interface of the thread's namespace.
fn send_frame(interface: &str, frame: &[u8]) -> Result<()> {
    // SAFETY: a system call without pointers.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) };
    nix::errno::Errno::result(socket)?;
    // SAFETY: the descriptor is open and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeroes is a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = if_nametoindex(interface)? as i32;
    // SAFETY: `frame` and `address` are as long as is said and outlive the call.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    ensure!(nix::errno::Errno::result(sent)? as usize == frame.len());
    Ok(())
}
