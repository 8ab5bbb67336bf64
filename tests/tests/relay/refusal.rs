//! Servers that do not answer, or refuse.

use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::Result;
use pepsal_tests::{Bed, Connector, Family, PATIENCE, reset};

use crate::SECOND;

#[test]
fn refusal_is_never_a_clean_end() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let nobody = bed.another_listener(family)?.port();
        assert_refused(
            &bed,
            (family.server(), nobody).into(),
            ErrorKind::ConnectionRefused,
        );
    }
    assert_eq!(bed.daemon.terminate()?.counter("refused"), 2);
    Ok(())
}

#[test]
fn unreachable_server_is_a_reset_at_once() -> Result<()> {
    let bed = Bed::start(&[])?;
    let addresses = route_behind_server(&bed, "unreachable")?;
    for address in addresses {
        let start = Instant::now();
        assert_refused(&bed, address, ErrorKind::HostUnreachable);
        assert!(
            start.elapsed() < PATIENCE,
            "not the connect timeout, which is a minute"
        );
    }
    assert_eq!(bed.daemon.terminate()?.counter("unreachable"), 2);
    Ok(())
}

#[test]
fn silent_server_is_a_reset_after_the_connect_timeout() -> Result<()> {
    let bed = Bed::start(&["--connect-timeout", "2s"])?;
    for address in route_behind_server(&bed, "blackhole")? {
        let start = Instant::now();
        assert_refused(&bed, address, ErrorKind::TimedOut);
        assert!(start.elapsed() >= 2 * SECOND, "{:?}", start.elapsed());
    }
    assert_eq!(bed.daemon.terminate()?.counter("connect_timeout"), 2);
    Ok(())
}

#[test]
fn pending_connection_ends_with_its_lifetime() -> Result<()> {
    let bed = Bed::start(&["-t", "1", "-g", "1"])?;
    let [address, _] = route_behind_server(&bed, "blackhole")?;
    let start = Instant::now();
    assert_refused(&bed, address, ErrorKind::TimedOut);
    assert!(start.elapsed() >= SECOND, "{:?}", start.elapsed());
    assert_eq!(bed.daemon.terminate()?.counter("pending_timeout"), 1);
    Ok(())
}

#[test]
fn pending_connection_that_the_client_gives_up_is_given_up() -> Result<()> {
    let bed = Bed::start(&[])?;
    for address in route_behind_server(&bed, "blackhole")? {
        reset(Connector::default().connect(&bed.topology.client, address)?)?;
    }
    let exit = bed.daemon.terminate()?;
    assert_eq!(exit.counter("client_reset"), 2);
    Ok(())
}

/// An address in each family that the gateway forwards to the server, and the server has a `kind` of route for.
fn route_behind_server(bed: &Bed, kind: &str) -> Result<[SocketAddr; 2]> {
    let (gateway, server) = (&bed.topology.gateway, &bed.topology.server);
    gateway.ip(format!(
        "route add 10.9.0.0/24 via {}
         route add fd09::/64 via {}",
        Family::V4.server(),
        Family::V6.server()
    ))?;
    server.sysctl("net.ipv4.conf.all.forwarding", 1)?;
    server.sysctl("net.ipv6.conf.all.forwarding", 1)?;
    server.ip(format!(
        "route add {kind} 10.9.0.0/24
         route add {kind} fd09::/64"
    ))?;
    Ok(["10.9.0.1:9".parse()?, "[fd09::1]:9".parse()?])
}

/// The client learns of it when it connects, as `refusal`, or afterwards, by a reset.
#[track_caller]
fn assert_refused(bed: &Bed, address: SocketAddr, refusal: ErrorKind) {
    let error = match Connector::default().connect(&bed.topology.client, address) {
        Ok(mut client) => client
            .read(&mut [0])
            .expect_err("nothing was there to end cleanly")
            .kind(),
        Err(error) => error.kind(),
    };
    assert!(
        [ErrorKind::ConnectionReset, refusal].contains(&error),
        "{address}: {error}"
    );
}
