//! The bound on the connections of one subscriber.

use std::net::IpAddr;

use anyhow::Result;
use pepsal_ebpf::Counter;
use pepsal_tests::Family;
use pepsal_tests::packet::{CLIENT_PORT, Tcp};

use crate::gateway::{Gateway, LIMIT};

/// A SYN from a port of an address.
fn syn(client: &str, port: u16) -> Vec<u8> {
    let client: IpAddr = client.parse().expect("an address");
    Tcp {
        source: (client, CLIENT_PORT + port).into(),
        ..Tcp::syn(Family::of(client))
    }
    .packet()
}

#[test]
fn above_its_bound_a_subscribers_connections_pass_and_others_do_not() -> Result<()> {
    for (client, same, other) in [
        ("10.1.0.2", "10.1.0.2", "10.1.0.3"),
        ("fd01::2", "fd01::ffff:0:0:9", "fd01:0:0:1::2"),
    ] {
        let mut gateway = Gateway::with_conns_per_client(2)?;
        assert_eq!(gateway.steer(&syn(client, 1))?, Counter::Intercepted);
        assert_eq!(gateway.steer(&syn(same, 2))?, Counter::Intercepted);
        assert_eq!(gateway.steer(&syn(client, 3))?, Counter::ClientLimitReached);
        assert_eq!(gateway.steer(&syn(same, 3))?, Counter::ClientLimitReached);
        assert_eq!(gateway.steer(&syn(other, 1))?, Counter::Intercepted);
        assert_eq!(gateway.flows()?.len(), 3);
        assert_eq!(gateway.connections()?, 3);
    }
    Ok(())
}

#[test]
fn syn_that_comes_again_counts_once() -> Result<()> {
    let mut gateway = Gateway::with_conns_per_client(2)?;
    for client in ["10.1.0.2", "fd01::2"] {
        assert_eq!(gateway.steer(&syn(client, 1))?, Counter::Intercepted);
        assert_eq!(gateway.steer(&syn(client, 1))?, Counter::Retransmitted);
        assert_eq!(gateway.steer(&syn(client, 2))?, Counter::Intercepted);
        // At the bound, too.
        assert_eq!(gateway.steer(&syn(client, 1))?, Counter::Retransmitted);
        assert_eq!(gateway.steer(&syn(client, 3))?, Counter::ClientLimitReached);
    }
    assert_eq!(gateway.connections()?, 4);
    Ok(())
}

#[test]
fn connection_that_finds_the_map_of_flows_full_is_not_counted() -> Result<()> {
    let mut gateway = Gateway::with_conns_per_client(2)?;
    for host in 0..LIMIT {
        assert_eq!(
            gateway.steer(&syn(&format!("10.1.0.{}", 10 + host), 1))?,
            Counter::Intercepted
        );
    }
    for _ in 0..3 {
        assert_eq!(gateway.steer(&syn("10.1.0.2", 1))?, Counter::LimitReached);
    }
    assert_eq!(gateway.connections()?, u64::from(LIMIT));
    Ok(())
}

#[test]
fn without_a_bound_nothing_is_counted() -> Result<()> {
    let mut gateway = Gateway::new()?;
    for port in 0..LIMIT as u16 {
        assert_eq!(gateway.steer(&syn("10.1.0.2", port))?, Counter::Intercepted);
    }
    assert_eq!(gateway.connections()?, 0);
    Ok(())
}
