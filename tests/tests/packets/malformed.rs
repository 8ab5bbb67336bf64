//! Packets that are cut short, contradict themselves, or are none of TCP.

use anyhow::Result;
use pepsal_ebpf::Counter;
use pepsal_tests::packet::{
    DESTINATION, HOP_BY_HOP, PADDING, ROUTED, ROUTER_ALERT, ROUTING, Tcp, ip_header_len,
};
use pepsal_tests::{Family, PATIENCE, eventually};

use crate::MSS_AND_MORE;
use crate::frame::send_frame;
use crate::gateway::{Gateway, STEER, ethernet};

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
