//! What the relay owes to both ends: every byte, in order, and the truth about how the other end left.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fastrand::Rng;
use nix::{
    errno::Errno,
    libc,
    sys::{
        signal::Signal,
        socket::{MsgFlags, recv, send, setsockopt, sockopt::OobInline},
    },
};
use pepsal_tests::{
    Bed, Capture, Connector, Daemon, Direction, Family, Leg, PATIENCE, Side, Transfer, eventually,
    receive_all, reset, send_all,
};
use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

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

/// Neither splice nor a read crosses an urgent byte; a receiver that has them in line finds it where it was sent.
#[test]
fn urgent_bytes_keep_their_place_and_their_mark() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        setsockopt(&receiver, OobInline, &true)?;
        let (before, after) = (payload(1, MIB), payload(2, MIB));
        let (received, marked) = thread::scope(|scope| -> Result<_> {
            let sending = scope.spawn(|| -> Result<()> {
                (&sender).write_all(&before)?;
                send(sender.as_raw_fd(), b"!", MsgFlags::MSG_OOB)?;
                send_all(&sender, &after)?;
                Ok(())
            });
            let (mut received, mut marked) = (Vec::<u8>::new(), None);
            let mut buffer = vec![0; 64 * KIB];
            loop {
                // Once it is there, it is known for what it is.
                receiver.peek(&mut [0])?;
                if is_at_mark(&receiver)? {
                    marked = Some(received.len());
                }
                match (&receiver).read(&mut buffer)? {
                    0 => break,
                    bytes => received.extend(&buffer[..bytes]),
                }
            }
            sending.join().expect("no panic")?;
            Ok((received, marked))
        })?;
        assert_eq!(marked, Some(MIB), "{family:?} {from:?}");
        let sent = [&before[..], b"!", &after].concat();
        assert!(received == sent, "{family:?} {from:?}: {} bytes", received.len());
    }
    Ok(())
}

#[test]
fn urgent_byte_alone_arrives_at_once_and_out_of_band() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        for byte in *b"XYZ" {
            send(sender.as_raw_fd(), &[byte], MsgFlags::MSG_OOB)?;
            let mut urgent = [0];
            eventually(PATIENCE, || {
                let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT;
                recv(receiver.as_raw_fd(), &mut urgent, flags) == Ok(1)
            });
            assert_eq!(urgent, [byte], "{family:?} {from:?}");
        }
        send_all(&sender, b"the end")?;
        assert_eq!(receive_all(&receiver)?, b"the end", "{family:?} {from:?}");
    }
    Ok(())
}

#[test]
fn reset_follows_the_data_sent_before_it() -> Result<()> {
    let bed = Bed::start(&[])?;
    let sent = payload(4, 100 * KIB);
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        (&sender).write_all(&sent)?;
        until_gateway_has_all(&bed, from, &sender);
        reset(sender)?;
        assert_reset_after(&receiver, &sent, format_args!("{family:?} {from:?}"));
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
fn reset_waits_for_a_peer_that_does_not_read() -> Result<()> {
    let bed = Bed::start(&[])?;
    // More than the peer's kernel takes unread, and less than pepsal's does.
    let sent = payload(5, 128 * KIB);
    limit_buffers(&bed, 32 * KIB, MIB)?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        let ends = (sender.peer_addr()?, sender.local_addr()?);
        (&sender).write_all(&sent)?;
        until_gateway_has_all(&bed, from, &sender);
        reset(sender)?;
        eventually(PATIENCE, || {
            let legs = bed.daemon.legs().expect("ss shows legs");
            !legs.iter().any(|leg| (leg.local, leg.peer) == ends)
        });
        assert_reset_after(&receiver, &sent, format_args!("{family:?} {from:?}"));
    }
    Ok(())
}

#[test]
fn reset_crosses_in_the_middle_of_a_transfer() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.into_ends(from);
        let stream = payload(6, 4 * MIB);
        let sender = thread::spawn({
            let stream = stream.clone();
            move || {
                (&sender).write_all(&stream)?;
                reset(sender)
            }
        });
        let mut received = Vec::new();
        let error = (&receiver)
            .read_to_end(&mut received)
            .expect_err("the sender never ended its stream");
        sender.join().expect("no panic")?;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?} {from:?}");
        // The sender's own kernel throws away what it has not sent yet.
        assert!(stream.starts_with(&received), "{family:?} {from:?}");
    }
    Ok(())
}

#[test]
fn reset_stops_the_other_ends_sending() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (resetter, mut sender) = bed.flow(family)?.into_ends(from);
        let block = [7; 64 * KIB];
        sender.write_all(&block)?;
        (&resetter).read_exact(&mut [0; KIB])?;
        reset(resetter)?;
        let error = loop {
            if let Err(error) = sender.write_all(&block) {
                break error;
            }
        };
        assert!(
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
            "{family:?} {from:?}: {error}"
        );
    }
    Ok(())
}

#[test]
fn reset_crosses_after_the_other_direction_has_ended() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (resetter, receiver) = bed.flow(family)?.into_ends(from);
        receiver.shutdown(Shutdown::Write)?;
        assert_eq!(receive_all(&resetter)?, []);
        (&resetter).write_all(b"unfinished")?;
        until_gateway_has_all(&bed, from, &resetter);
        reset(resetter)?;
        assert_reset_after(&receiver, b"unfinished", format_args!("{family:?} {from:?}"));
    }
    Ok(())
}

#[test]
fn reset_crosses_after_its_own_direction_has_ended() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (resetter, sender) = bed.flow(family)?.into_ends(from);
        resetter.shutdown(Shutdown::Write)?;
        assert_eq!(receive_all(&sender)?, []);
        reset(resetter)?;
        let error = loop {
            if let Err(error) = (&sender).write_all(&[7; KIB]) {
                break error;
            }
        };
        assert!(
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
            "{family:?} {from:?}: {error}"
        );
    }
    Ok(())
}

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
    assert_eq!(bed.daemon.terminate()?.counter("pending_too_long"), 1);
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

#[test]
fn idle_flow_is_reset_and_a_busy_one_is_not() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(2);
    let bed = Bed::start(&["--idle-timeout", "2s"])?;
    let idle = bed.flow(Family::V4)?;
    let mut busy = bed.flow(Family::V6)?;
    let start = Instant::now();
    while start.elapsed() < 2 * IDLE {
        busy.client.write_all(&[1])?;
        busy.server.read_exact(&mut [0])?;
        thread::sleep(Duration::from_millis(20));
    }
    for end in [&idle.client, &idle.server] {
        assert_reset_after(end, &[], format_args!("idle"));
    }
    drop(busy);
    assert_eq!(bed.daemon.terminate()?.counter("idle_timeout"), 1);
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

#[test]
fn stop_lets_open_transfers_end() -> Result<()> {
    let sent = payload(8, 16 * MIB);
    for from in Side::BOTH {
        let bed = Bed::start(&[])?;
        let (sender, receiver) = bed.flow(Family::V4)?.into_ends(from);
        let sender = thread::spawn({
            let sent = sent.clone();
            move || send_all(&sender, &sent).map(|()| sender)
        });
        let mut received = vec![0; MIB];
        (&receiver).read_exact(&mut received)?;
        bed.daemon.signal(Signal::SIGTERM)?;
        bed.daemon.wait_for_log("stopping")?;
        received.extend(receive_all(&receiver)?);
        assert!(received == sent, "{from:?}");
        drop((receiver, sender.join().expect("no panic")?));
        let exit = bed.daemon.wait()?;
        assert_eq!((exit.code(), exit.counter("finished")), (Some(0), 1), "{from:?}");
    }
    Ok(())
}

#[test]
fn stop_resets_what_is_open_after_the_drain_timeout() -> Result<()> {
    let bed = Bed::start(&["--drain-timeout", "1s"])?;
    let flows = [bed.flow(Family::V4)?, bed.flow(Family::V6)?];
    let exit = bed.daemon.terminate()?;
    assert_eq!((exit.code(), exit.counter("shutdown")), (Some(0), 2));
    for end in flows.iter().flat_map(|flow| [&flow.client, &flow.server]) {
        assert_reset_after(end, &[], format_args!("drained"));
    }
    Ok(())
}

#[test]
fn second_signal_stops_at_once() -> Result<()> {
    let bed = Bed::start(&["--drain-timeout", "1h"])?;
    let flow = bed.flow(Family::V4)?;
    bed.daemon.signal(Signal::SIGTERM)?;
    bed.daemon.wait_for_log("stopping")?;
    bed.daemon.signal(Signal::SIGTERM)?;
    assert_eq!(bed.daemon.wait()?.code(), Some(0));
    for end in [&flow.client, &flow.server] {
        assert_reset_after(end, &[], format_args!("stopped"));
    }
    Ok(())
}

#[test]
fn killed_daemon_never_ends_a_transfer_cleanly() -> Result<()> {
    for (family, from) in [(Family::V4, Side::Client), (Family::V6, Side::Server)] {
        let bed = Bed::start(&[])?;
        let (mut sender, receiver) = bed.flow(family)?.into_ends(from);
        let sender = thread::spawn(move || while sender.write_all(&[7; 64 * KIB]).is_ok() {});
        (&receiver).read_exact(&mut vec![0; MIB])?;
        bed.daemon.kill()?;
        let error = io::copy(&mut &receiver, &mut io::sink()).expect_err("the sender goes on and on");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?} {from:?}");
        drop(receiver);
        sender.join().expect("no panic");
    }
    Ok(())
}

#[test]
fn killed_daemon_does_not_undo_a_clean_end() -> Result<()> {
    let bed = Bed::start(&[])?;
    let flow = bed.flow(Family::V4)?;
    send_all(&flow.client, b"all of it")?;
    let mut request = [0; 9];
    (&flow.server).read_exact(&mut request)?;
    // The end of stream is there, unread, before the daemon goes.
    let ends = (flow.server.local_addr()?, flow.server.peer_addr()?);
    eventually(PATIENCE, || {
        let legs = Leg::all(&bed.topology.server).expect("ss shows legs");
        let mut same = legs.iter().filter(|leg| (leg.local, leg.peer) == ends);
        same.any(|leg| leg.state == "CLOSE-WAIT")
    });
    bed.daemon.kill()?;
    assert_eq!(receive_all(&flow.server)?, []);
    assert_reset_after(&flow.client, &[], format_args!("the other direction was open"));
    Ok(())
}

#[test]
fn curl_and_nginx_exchange_files() -> Result<()> {
    let bed = Bed::start(&[])?;
    let nginx = Nginx::start(&bed)?;
    let file = payload(9, 8 * MIB);
    let [down, source, up] = ["down", "source", "up"].map(|name| nginx.directory.path().join(name));
    fs::write(&down, &file)?;
    fs::write(&source, &file)?;
    for family in Family::BOTH {
        let url = format!("http://{}", SocketAddr::new(family.server(), Nginx::PORT));
        let curl = |arguments: &[&str]| {
            let options = [
                "--globoff",
                "--silent",
                "--show-error",
                "--fail",
                "--max-time",
                "30",
            ];
            run(bed.topology.client.command("curl").args(options).args(arguments))
        };
        let received = curl(&[&format!("{url}/down")])?;
        assert_eq!(xxh3_64(&received), xxh3_64(&file), "{family:?}");
        curl(&["--upload-file", &source.to_string_lossy(), &format!("{url}/up")])?;
        assert_eq!(xxh3_64(&fs::read(&up)?), xxh3_64(&file), "{family:?}");
        fs::remove_file(&up)?;
    }
    assert_eq!(bed.daemon.terminate()?.counter("finished"), 4);
    Ok(())
}

#[test]
fn iperf3_measures_both_directions() -> Result<()> {
    const PORT: u16 = 5201;
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        for direction in [None, Some("-R")] {
            let mut server = bed.topology.server.command("iperf3");
            let mut server = server
                .args(["-s", "-1"])
                .stdout(Stdio::null())
                .spawn()
                .map(Reaped)?;
            eventually(PATIENCE, || is_listening(&bed, PORT));
            let mut client = bed.topology.client.command("iperf3");
            let client = client
                .args(["-J", "-n", "16M", "-c", &family.server().to_string()])
                .args(direction);
            let report = String::from_utf8(run(client)?)?;
            let received = report
                .split("\"sum_received\"")
                .nth(1)
                .context("a sum in the report")?;
            let bytes = received.split("\"bytes\":").nth(1).context("bytes in the sum")?;
            let bytes: usize = bytes.split(',').next().unwrap_or_default().trim().parse()?;
            // iperf3 stops reading when the control connection says so, which is not held up by what is under way.
            assert!(bytes >= MIB, "{family:?} {direction:?}: {bytes} bytes");
            ensure!(server.0.wait()?.success(), "iperf3 -s");
        }
    }
    // A control connection and a data connection each.
    assert_eq!(bed.daemon.terminate()?.counter("accepted"), 8);
    Ok(())
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

fn cases() -> impl Iterator<Item = (Family, Side)> {
    Family::BOTH
        .into_iter()
        .flat_map(|family| Side::BOTH.map(|end| (family, end)))
}

/// `sockatmark` of POSIX.
fn is_at_mark(stream: &TcpStream) -> io::Result<bool> {
    const SIOCATMARK: libc::c_ulong = 0x8905;
    let mut at_mark: libc::c_int = 0;
    // SAFETY: the request writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCATMARK, &raw mut at_mark) };
    Errno::result(result)?;
    Ok(at_mark != 0)
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

fn resident_bytes(daemon: &Daemon) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse::<usize>()? * KIB)
}

fn is_listening(bed: &Bed, port: u16) -> bool {
    let mut ss = bed.topology.server.command("ss");
    let listening = ss.args(["-Hltn", &format!("sport = :{port}")]).output();
    listening.is_ok_and(|listening| !listening.stdout.is_empty())
}

fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output.stdout)
}

/// A child that does not outlive the test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // Both fail only for a child that has been waited for already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nginx with a directory of its own, which it serves and lets be written.
struct Nginx {
    _process: Reaped,
    directory: TempDir,
}

impl Nginx {
    const PORT: u16 = 8080;

    fn start(bed: &Bed) -> Result<Self> {
        let directory = TempDir::new()?;
        let path = directory.path().display();
        let config = format!(
            "daemon off; master_process off; user root; pid {path}/pid; error_log stderr;
             events {{}}
             http {{
                 access_log off; client_max_body_size 0;
                 client_body_temp_path {path}/body; proxy_temp_path {path}/proxy; fastcgi_temp_path {path}/fastcgi;
                 uwsgi_temp_path {path}/uwsgi; scgi_temp_path {path}/scgi;
                 server {{ listen {port}; listen [::]:{port}; root {path}; dav_methods PUT; }}
             }}",
            port = Self::PORT
        );
        let file = directory.path().join("nginx.conf");
        fs::write(&file, config)?;
        let process = bed
            .topology
            .server
            .command("nginx")
            .arg("-p")
            .arg(directory.path())
            .arg("-c")
            .arg(&file)
            .spawn();
        let nginx = Self {
            _process: Reaped(process.context("nginx")?),
            directory,
        };
        eventually(PATIENCE, || is_listening(bed, Self::PORT));
        Ok(nginx)
    }
}
