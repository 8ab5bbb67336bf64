//! Listeners, heartbeat and the limit of connections.

use std::io;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::SockMap;
use nix::time::{ClockId, clock_gettime};
use pepsal_ebpf::{Counter, NO_LINK, listener_v4, listener_v6};
use pepsal_tests::packet::{ACK, CLIENT_PORT, Tcp};
use pepsal_tests::{Family, PATIENCE, eventually};

use crate::gateway::{Gateway, LIMIT};

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
        Counter::HeartbeatExpired
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
