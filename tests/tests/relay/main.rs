//! What the relay owes to both ends: every byte, in order, and the truth about how the other end left.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use fastrand::Rng;
use pepsal_tests::{Bed, Family, Leg, PATIENCE, Side, eventually};

mod application;
mod bytes;
mod refusal;
mod reset;
mod stop;
mod urgent;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn cases() -> impl Iterator<Item = (Family, Side)> {
    Family::BOTH
        .into_iter()
        .flat_map(|family| Side::BOTH.map(|end| (family, end)))
}

fn payload(seed: u64, bytes: usize) -> Vec<u8> {
    println!("seed {seed}");
    let mut payload = vec![0; bytes];
    Rng::with_seed(seed).fill(&mut payload);
    payload
}

#[track_caller]
fn assert_reset_after(mut stream: &TcpStream, sent: &[u8], what: std::fmt::Arguments<'_>) {
    let mut received = Vec::new();
    let error = stream
        .read_to_end(&mut received)
        .expect_err("a reset is no end of stream");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}");
    assert_eq!(received.len(), sent.len(), "{what}");
    assert!(received == sent, "{what}");
}

/// Bounds what each kernel buffers for one socket: `ends` at client and server, `gateway` in between.
fn limit_buffers(bed: &Bed, ends: usize, gateway: usize) -> Result<()> {
    let [client_legs, server_legs] = bed.daemon.namespaces()?;
    for (namespace, most) in [
        (&bed.topology.client, ends),
        (&client_legs, gateway),
        (&server_legs, gateway),
        (&bed.topology.server, ends),
    ] {
        let first = most.min(128 * KIB);
        for key in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"] {
            namespace.sysctl(key, format_args!("4096 {first} {most}"))?;
        }
    }
    Ok(())
}

/// Waits until the end `from` has nothing left that its kernel would throw away with a reset.
fn until_gateway_has_all(bed: &Bed, from: Side, sender: &TcpStream) {
    let namespace = match from {
        Side::Client => &bed.topology.client,
        Side::Server => &bed.topology.server,
    };
    let local = sender.local_addr().expect("it is connected");
    eventually(PATIENCE, || {
        let sockets = Leg::all(namespace).expect("ss shows sockets");
        let mut same = sockets.iter().filter(|socket| socket.local == local);
        same.any(|socket| socket.unacknowledged == 0)
    });
}
