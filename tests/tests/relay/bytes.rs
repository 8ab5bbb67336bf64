//! Every byte, in order, at the pace of the slower end.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use pepsal_tests::{
    Bed, Capture, Connector, Daemon, Direction, Family, PATIENCE, Side, Transfer, eventually, receive_all,
    send_all,
};

use crate::{KIB, MIB, SECOND, cases, limit_buffers, payload, until_gateway_has_all};

#[test]
fn every_size_arrives_intact_either_way() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        for (seed, bytes) in (1..).zip([0, 1, KIB, MIB - 1, 64 * MIB]) {
            for direction in [Direction::Upload, Direction::Download] {
                let outcome = Transfer::new(direction, bytes as u64)
                    .seed(seed)
                    .run(&bed.topology.client, bed.server.address(family))?;
                assert!(
                    outcome.intact,
                    "{family:?} {direction:?} {bytes} bytes, seed {seed}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn both_directions_carry_bulk_at_once() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        let (up, down) = (payload(1, 16 * MIB), payload(2, 16 * MIB));
        thread::scope(|scope| -> Result<()> {
            let senders = [
                scope.spawn(|| send_all(&flow.client, &up)),
                scope.spawn(|| send_all(&flow.server, &down)),
            ];
            let at_server = scope.spawn(|| receive_all(&flow.server));
            assert!(receive_all(&flow.client)? == down, "{family:?}");
            assert!(at_server.join().expect("no panic")? == up, "{family:?}");
            for sender in senders {
                sender.join().expect("no panic")?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn many_parallel_flows_arrive_intact() -> Result<()> {
    let bed = Bed::start(&[])?;
    let (client, server) = (&bed.topology.client, &bed.server);
    thread::scope(|scope| -> Result<()> {
        let transfers: Vec<_> = (0..200)
            .map(|seed| {
                scope.spawn(move || {
                    let direction = [Direction::Upload, Direction::Download][seed % 2];
                    Transfer::new(direction, 256 * KIB as u64)
                        .seed(seed as u64)
                        .run(client, server.address(Family::BOTH[seed / 2 % 2]))
                })
            })
            .collect();
        for (seed, transfer) in transfers.into_iter().enumerate() {
            let outcome = transfer
                .join()
                .expect("no panic")
                .with_context(|| format!("seed {seed}"))?;
            assert!(outcome.intact, "seed {seed}");
        }
        Ok(())
    })?;
    assert_eq!(bed.daemon.terminate()?.counter("finished"), 200);
    Ok(())
}

#[test]
fn end_that_finishes_first_still_receives() -> Result<()> {
    let bed = Bed::start(&[])?;
    let long = payload(3, 8 * MIB);
    for (family, first) in cases() {
        let (quick, slow) = bed.flow(family)?.into_ends(first);
        (&quick).write_all(b"that was all")?;
        quick.shutdown(Shutdown::Write)?;
        assert_eq!(receive_all(&slow)?, b"that was all", "{family:?} {first:?}");

        let sender = thread::spawn({
            let long = long.clone();
            move || send_all(&slow, &long)
        });
        assert!(receive_all(&quick)? == long, "{family:?} {first:?}");
        sender.join().expect("no panic")?;
    }
    Ok(())
}

#[test]
fn small_messages_are_not_held_back() -> Result<()> {
    const ROUNDS: u32 = 100;
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        flow.client.set_nodelay(true)?;
        flow.server.set_nodelay(true)?;
        let start = Instant::now();
        for _ in 0..ROUNDS {
            for (mut from, mut to) in [(&flow.client, &flow.server), (&flow.server, &flow.client)] {
                // With Nagle's algorithm in between, the second byte would wait for a delayed acknowledgement.
                from.write_all(b"a")?;
                from.write_all(b"b")?;
                let mut message = [0; 2];
                to.read_exact(&mut message)?;
                assert_eq!(&message, b"ab");
            }
        }
        // A delayed acknowledgement takes 40 ms at least.
        assert!(
            start.elapsed() < ROUNDS * Duration::from_millis(40),
            "{:?}",
            start.elapsed()
        );
    }
    Ok(())
}

#[test]
fn slow_sender_loses_nothing() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (mut sender, mut receiver) = bed.flow(family)?.into_ends(from);
        sender.set_nodelay(true)?;
        for byte in 0..=255 {
            sender.write_all(&[byte])?;
            let mut read = [0];
            receiver.read_exact(&mut read)?;
            assert_eq!(read, [byte], "{family:?} {from:?}");
        }
        drop(sender);
        assert_eq!(receive_all(&receiver)?, [], "{family:?} {from:?}");
    }
    Ok(())
}

#[test]
fn request_that_is_there_completes_the_handshake_with_the_server() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let capture = Capture::start(&bed.topology.gateway, "sat0")?;
        // Its kernel does the client's handshake without it.
        bed.daemon.signal(Signal::SIGSTOP)?;
        let mut client = Connector::default().connect(&bed.topology.client, bed.address(family))?;
        client.write_all(b"request")?;
        until_gateway_has_all(&bed, Side::Client, &client);
        bed.daemon.signal(Signal::SIGCONT)?;
        let mut request = [0; 7];
        let mut server = bed.listener(family).accept(PATIENCE)?.stream;
        server.read_exact(&mut request)?;
        assert_eq!(&request, b"request", "{family:?}");
        let local = client.local_addr()?;
        let segments = capture.segments()?;
        let sent = segments.iter().filter(|segment| segment.source == local);
        let lengths: Vec<usize> = sent.map(|segment| segment.payload_len).take(2).collect();
        assert_eq!(lengths, [0, 7], "{family:?}: the SYN, and what was written");
    }
    Ok(())
}

#[test]
fn peer_that_does_not_read_stops_the_sender() -> Result<()> {
    const BUFFER: usize = MIB;
    // Four sockets and a pipe are on the way, and the kernel is generous with the bounds it is given.
    const MOST: usize = 12 * BUFFER;
    let bed = Bed::start(&[])?;
    limit_buffers(&bed, BUFFER, BUFFER)?;
    let sent = payload(7, MOST + 4 * MIB);
    for (family, from) in cases() {
        let (mut sender, receiver) = bed.flow(family)?.into_ends(from);
        let resident = resident_bytes(&bed.daemon)?;
        sender.set_write_timeout(Some(SECOND))?;
        let mut written = 0;
        let stopped = loop {
            match sender.write(&sent[written..written + 64 * KIB]) {
                Ok(bytes) => written += bytes,
                Err(error) => break error,
            }
            assert!(written <= MOST, "{family:?} {from:?}: {written} bytes and no end");
        };
        assert_eq!(stopped.kind(), ErrorKind::WouldBlock, "{family:?} {from:?}");
        let grown = resident_bytes(&bed.daemon)?.saturating_sub(resident);
        assert!(grown < 2 * MIB, "{family:?} {from:?}: {grown} bytes more");

        sender.set_write_timeout(Some(PATIENCE))?;
        thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| send_all(&sender, &sent[written..]));
            assert!(receive_all(&receiver)? == sent, "{family:?} {from:?}");
            Ok(sender.join().expect("no panic")?)
        })?;
    }
    Ok(())
}

fn resident_bytes(daemon: &Daemon) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse::<usize>()? * KIB)
}

#[test]
fn many_short_connections_leave_no_descriptors() -> Result<()> {
    const CONNECTIONS: u32 = 500;
    let bed = Bed::start(&[])?;
    let descriptors = |kind: &str| -> usize {
        let entries = fs::read_dir(format!("/proc/{}/fd", bed.daemon.pid())).expect("the daemon runs");
        let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links
            .filter(|link| link.to_string_lossy().starts_with(kind))
            .count()
    };
    let sockets = descriptors("socket:");
    for round in 0..CONNECTIONS {
        let flow = bed.flow(Family::BOTH[round as usize % 2])?;
        (&flow.client).write_all(&round.to_be_bytes())?;
        let mut request = [0; 4];
        (&flow.server).read_exact(&mut request)?;
        (&flow.server).write_all(&request)?;
        drop(flow.server);
        assert_eq!(receive_all(&flow.client)?, round.to_be_bytes());
    }
    // The daemon may have been asking the kernel for its interfaces when they were counted.
    eventually(PATIENCE, || descriptors("socket:") <= sockets);
    // Pipes are kept for the next flow: one way each, two ends each, never more than there were at once.
    assert!(
        descriptors("pipe:") < 32,
        "{} ends of pipes",
        descriptors("pipe:")
    );
    Ok(())
}
