//! ICMP errors.

use anyhow::Result;
use pepsal_ebpf::Counter;
use pepsal_tests::Family;
use pepsal_tests::packet::{DESTINATION, FRAGMENT, HOP_BY_HOP, PADDING, ROUTER_ALERT, Tcp, ip_header_len};

use crate::gateway::{Gateway, REPLIES, STEER, ethernet};

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
                    true => (Counter::IcmpError, Counter::NoFlow),
                    false if is_redirect && name == REPLIES => (Counter::IcmpRedirect, Counter::NotTcp),
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
        Counter::NoFlow
    );

    let udp_quoted = [&[3, 4, 0, 0, 0, 0, 5, 120][..], &v4.ip(17, &[0; 8])].concat();
    assert_eq!(gateway.steer(&v4.swapped().ip(1, &udp_quoted))?, Counter::NotTcp);
    let v6_in_v4 = [&[3, 4, 0, 0, 0, 0, 5, 120][..], &v6.packet()].concat();
    assert_eq!(gateway.steer(&v4.swapped().ip(1, &v6_in_v4))?, Counter::Malformed);
    Ok(())
}
