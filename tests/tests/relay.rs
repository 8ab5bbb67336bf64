//! What the relay owes to both ends: every byte, in order, and the truth about how the other end left.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
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
    Capture, Connector, Daemon, Direction, Exit, Family, Listener, Namespace, Server, Topology, Transfer,
    eventually, reset,
};
use xxhash_rust::xxh3::xxh3_64;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);
/// How long a busy machine may take for what takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn every_size_arrives_intact_either_way() -> Result<()> {
    let bed = Bed::start(&[])?;
    let server = Server::start(&bed.topology.server)?;
    for family in Family::BOTH {
        for (seed, bytes) in (1..).zip([0, 1, KIB, MIB - 1, 64 * MIB]) {
            for direction in [Direction::Upload, Direction::Download] {
                let outcome = Transfer::new(direction, bytes as u64)
                    .seed(seed)
                    .run(&bed.topology.client, server.address(family))?;
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
    let server = Server::start(&bed.topology.server)?;
    let (client, server) = (&bed.topology.client, &server);
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
    assert_eq!(count(&bed.daemon.terminate()?, "finished"), 200);
    Ok(())
}

#[test]
fn end_that_finishes_first_still_receives() -> Result<()> {
    let bed = Bed::start(&[])?;
    let long = payload(3, 8 * MIB);
    for (family, first) in cases() {
        let (quick, slow) = bed.flow(family)?.ends(first);
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
        let (mut sender, mut receiver) = bed.flow(family)?.ends(from);
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
        let (sender, receiver) = bed.flow(family)?.ends(from);
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
        let (sender, receiver) = bed.flow(family)?.ends(from);
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
        let (sender, receiver) = bed.flow(family)?.ends(from);
        (&sender).write_all(&sent)?;
        bed.until_gateway_has_all(family, from, &sender);
        reset(sender)?;
        assert_reset_after(&receiver, &sent, format_args!("{family:?} {from:?}"));
    }
    Ok(())
}

#[test]
fn request_that_is_there_completes_the_handshake_with_the_server() -> Result<()> {
    let bed = Bed::start(&[])?;
    for family in Family::BOTH {
        let listener = Listener::bind_any(&bed.topology.server, family.server())?;
        let capture = Capture::start(&bed.topology.gateway, "sat0")?;
        // Its kernel does the client's handshake without it.
        bed.daemon.signal(Signal::SIGSTOP)?;
        let address = SocketAddr::new(family.server(), listener.port());
        let mut client = Connector::default().connect(&bed.topology.client, address)?;
        client.write_all(b"request")?;
        bed.until_gateway_has_all(family, End::Client, &client);
        bed.daemon.signal(Signal::SIGCONT)?;
        let mut request = [0; 7];
        listener.accept(PATIENCE)?.stream.read_exact(&mut request)?;
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
    bed.limit_buffers(32 * KIB, MIB)?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.ends(from);
        let leg = Leg::of(&sender)?;
        (&sender).write_all(&sent)?;
        bed.until_gateway_has_all(family, from, &sender);
        reset(sender)?;
        eventually(PATIENCE, || !bed.gateway_has(family, leg));
        assert_reset_after(&receiver, &sent, format_args!("{family:?} {from:?}"));
    }
    Ok(())
}

#[test]
fn reset_crosses_in_the_middle_of_a_transfer() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (sender, receiver) = bed.flow(family)?.ends(from);
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
        let (resetter, mut sender) = bed.flow(family)?.ends(from);
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
        let (resetter, receiver) = bed.flow(family)?.ends(from);
        receiver.shutdown(Shutdown::Write)?;
        assert_eq!(receive_all(&resetter)?, []);
        (&resetter).write_all(b"unfinished")?;
        bed.until_gateway_has_all(family, from, &resetter);
        reset(resetter)?;
        assert_reset_after(&receiver, b"unfinished", format_args!("{family:?} {from:?}"));
    }
    Ok(())
}

#[test]
fn reset_crosses_after_its_own_direction_has_ended() -> Result<()> {
    let bed = Bed::start(&[])?;
    for (family, from) in cases() {
        let (resetter, sender) = bed.flow(family)?.ends(from);
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
        let nobody = Listener::bind_any(&bed.topology.server, family.server())?.port();
        assert_refused(
            &bed,
            (family.server(), nobody).into(),
            ErrorKind::ConnectionRefused,
        );
    }
    assert_eq!(count(&bed.daemon.terminate()?, "refused"), 2);
    Ok(())
}

#[test]
fn unreachable_server_is_a_reset_at_once() -> Result<()> {
    let bed = Bed::start(&[])?;
    let addresses = bed.route_behind_server("unreachable")?;
    for address in addresses {
        let start = Instant::now();
        assert_refused(&bed, address, ErrorKind::HostUnreachable);
        assert!(
            start.elapsed() < PATIENCE,
            "not the connect timeout, which is a minute"
        );
    }
    assert_eq!(count(&bed.daemon.terminate()?, "unreachable"), 2);
    Ok(())
}

#[test]
fn silent_server_is_a_reset_after_the_connect_timeout() -> Result<()> {
    let bed = Bed::start(&["--connect-timeout", "2s"])?;
    for address in bed.route_behind_server("blackhole")? {
        let start = Instant::now();
        assert_refused(&bed, address, ErrorKind::TimedOut);
        assert!(start.elapsed() >= 2 * SECOND, "{:?}", start.elapsed());
    }
    assert_eq!(count(&bed.daemon.terminate()?, "connect_timeout"), 2);
    Ok(())
}

#[test]
fn pending_connection_ends_with_its_lifetime() -> Result<()> {
    let bed = Bed::start(&["-t", "1", "-g", "1"])?;
    let [address, _] = bed.route_behind_server("blackhole")?;
    let start = Instant::now();
    assert_refused(&bed, address, ErrorKind::TimedOut);
    assert!(start.elapsed() >= SECOND, "{:?}", start.elapsed());
    assert_eq!(count(&bed.daemon.terminate()?, "pending_too_long"), 1);
    Ok(())
}

#[test]
fn pending_connection_that_the_client_gives_up_is_given_up() -> Result<()> {
    let bed = Bed::start(&[])?;
    for address in bed.route_behind_server("blackhole")? {
        reset(Connector::default().connect(&bed.topology.client, address)?)?;
    }
    let exit = bed.daemon.terminate()?;
    assert_eq!(count(&exit, "client_reset"), 2);
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
    assert_eq!(count(&bed.daemon.terminate()?, "idle_timeout"), 1);
    Ok(())
}

#[test]
fn peer_that_does_not_read_stops_the_sender() -> Result<()> {
    const BUFFER: usize = MIB;
    // Four sockets and a pipe are on the way, and the kernel is generous with the bounds it is given.
    const MOST: usize = 12 * BUFFER;
    let bed = Bed::start(&[])?;
    bed.limit_buffers(BUFFER, BUFFER)?;
    let sent = payload(7, MOST + 4 * MIB);
    for (family, from) in cases() {
        let (mut sender, receiver) = bed.flow(family)?.ends(from);
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
    let listeners = Family::BOTH.map(|family| Listener::bind_any(&bed.topology.server, family.server()));
    let listeners = [listeners[0].as_ref().unwrap(), listeners[1].as_ref().unwrap()];
    let descriptors = |kind: &str| -> usize {
        let entries = fs::read_dir(format!("/proc/{}/fd", bed.daemon.pid())).expect("the daemon runs");
        let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links
            .filter(|link| link.to_string_lossy().starts_with(kind))
            .count()
    };
    let sockets = descriptors("socket:");
    for round in 0..CONNECTIONS {
        let index = round as usize % 2;
        let flow = connected(&bed, Family::BOTH[index], listeners[index])?;
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
    for from in End::BOTH {
        let bed = Bed::start(&[])?;
        let (sender, receiver) = bed.flow(Family::V4)?.ends(from);
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
        assert_eq!((exit.code(), count(&exit, "finished")), (Some(0), 1), "{from:?}");
    }
    Ok(())
}

#[test]
fn stop_resets_what_is_open_after_the_drain_timeout() -> Result<()> {
    let bed = Bed::start(&["--drain-timeout", "1s"])?;
    let flows = [bed.flow(Family::V4)?, bed.flow(Family::V6)?];
    let exit = bed.daemon.terminate()?;
    assert_eq!((exit.code(), count(&exit, "shutdown")), (Some(0), 2));
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
    for (family, from) in [(Family::V4, End::Client), (Family::V6, End::Server)] {
        let bed = Bed::start(&[])?;
        let (mut sender, receiver) = bed.flow(family)?.ends(from);
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
    let leg = Leg::of(&flow.server)?;
    eventually(PATIENCE, || {
        let sockets = tcp_sockets(&bed.topology.server, Family::V4);
        sockets
            .iter()
            .any(|socket| socket.leg == leg && socket.state == CLOSE_WAIT)
    });
    bed.daemon.kill()?;
    assert_eq!(receive_all(&flow.server)?, []);
    assert_reset_after(&flow.client, &[], format_args!("the other direction was open"));
    Ok(())
}

#[test]
fn curl_and_nginx_exchange_files() -> Result<()> {
    let bed = Bed::start(&[])?;
    let nginx = Nginx::start(&bed.topology.server)?;
    let file = payload(9, 8 * MIB);
    fs::write(nginx.directory.join("down"), &file)?;
    fs::write(nginx.directory.join("source"), &file)?;
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
        let down = curl(&[&format!("{url}/down")])?;
        assert_eq!(xxh3_64(&down), xxh3_64(&file), "{family:?}");
        let source = nginx.directory.join("source");
        curl(&["--upload-file", &source.to_string_lossy(), &format!("{url}/up")])?;
        assert_eq!(
            xxh3_64(&fs::read(nginx.directory.join("up"))?),
            xxh3_64(&file),
            "{family:?}"
        );
        fs::remove_file(nginx.directory.join("up"))?;
    }
    assert_eq!(count(&bed.daemon.terminate()?, "finished"), 4);
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
            eventually(PATIENCE, || is_listening(&bed.topology.server, PORT));
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
    assert_eq!(count(&bed.daemon.terminate()?, "accepted"), 8);
    Ok(())
}

/// A gateway with a daemon on it, between client and server.
struct Bed {
    daemon: Daemon,
    topology: Topology,
}

impl Bed {
    fn start(arguments: &[&str]) -> Result<Self> {
        let topology = Topology::new()?;
        let arguments = [&["-i", "lan0", "-i", "sat0"], arguments].concat();
        let daemon = Daemon::start(&topology.gateway, &arguments)?;
        Ok(Self { daemon, topology })
    }

    fn flow(&self, family: Family) -> Result<Flow> {
        connected(
            self,
            family,
            &Listener::bind_any(&self.topology.server, family.server())?,
        )
    }

    /// Bounds what each kernel buffers for one socket: `ends` at client and server, `gateway` in between.
    fn limit_buffers(&self, ends: usize, gateway: usize) -> Result<()> {
        let [client_legs, server_legs] = self.daemon.namespaces()?;
        for (namespace, most) in [
            (&self.topology.client, ends),
            (&client_legs, gateway),
            (&server_legs, gateway),
            (&self.topology.server, ends),
        ] {
            let first = most.min(128 * KIB);
            for key in ["net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"] {
                namespace.sysctl(key, format_args!("4096 {first} {most}"))?;
            }
        }
        Ok(())
    }

    /// An address in each family that the gateway forwards to the server, and the server has a `kind` of route for.
    fn route_behind_server(&self, kind: &str) -> Result<[SocketAddr; 2]> {
        self.topology.gateway.ip(format!(
            "route add 10.9.0.0/24 via {}
             route add fd09::/64 via {}",
            Family::V4.server(),
            Family::V6.server()
        ))?;
        self.topology.server.sysctl("net.ipv4.conf.all.forwarding", 1)?;
        self.topology.server.sysctl("net.ipv6.conf.all.forwarding", 1)?;
        self.topology.server.ip(format!(
            "route add {kind} 10.9.0.0/24
             route add {kind} fd09::/64"
        ))?;
        Ok(["10.9.0.1:9".parse()?, "[fd09::1]:9".parse()?])
    }

    /// Waits until the end `from` has nothing left that its kernel would throw away with a reset.
    fn until_gateway_has_all(&self, family: Family, from: End, sender: &TcpStream) {
        let namespace = match from {
            End::Client => &self.topology.client,
            End::Server => &self.topology.server,
        };
        let leg = Leg::of(sender).expect("it is connected");
        eventually(PATIENCE, || {
            let sockets = tcp_sockets(namespace, family);
            sockets
                .iter()
                .any(|socket| socket.leg == leg && socket.unacknowledged == 0)
        });
    }

    /// Whether the gateway's kernel still has the connection with the end that calls it `leg`.
    fn gateway_has(&self, family: Family, leg: Leg) -> bool {
        let namespaces = self.daemon.namespaces().into_iter().flatten();
        let mut sockets = namespaces.flat_map(|namespace| tcp_sockets(&namespace, family));
        sockets.any(|socket| socket.leg == leg.seen_from_the_gateway())
    }
}

/// The two ends of a flow.
struct Flow {
    client: TcpStream,
    server: TcpStream,
}

impl Flow {
    /// The end in question, then the other one.
    fn ends(self, first: End) -> (TcpStream, TcpStream) {
        match first {
            End::Client => (self.client, self.server),
            End::Server => (self.server, self.client),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum End {
    Client,
    Server,
}

impl End {
    const BOTH: [Self; 2] = [Self::Client, Self::Server];
}

fn cases() -> impl Iterator<Item = (Family, End)> {
    Family::BOTH
        .into_iter()
        .flat_map(|family| End::BOTH.map(|end| (family, end)))
}

fn connected(bed: &Bed, family: Family, listener: &Listener) -> Result<Flow> {
    let address = SocketAddr::new(family.server(), listener.port());
    let client = Connector::default().connect(&bed.topology.client, address)?;
    let server = listener.accept(PATIENCE)?;
    // A forwarded SYN would have one less; without this the tests would be of the kernel alone.
    ensure!(server.is_split(), "the connection was not intercepted");
    Ok(Flow {
        client,
        server: server.stream,
    })
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

fn send_all(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)
}

fn receive_all(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    Ok(received)
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

/// A figure from the two lines that the daemon logs at its end.
fn count(exit: &Exit, name: &str) -> u64 {
    let words = exit.log.split_ascii_whitespace();
    let figure = words
        .filter_map(|word| word.split_once('='))
        .find(|(key, _)| *key == name);
    figure.map_or(0, |(_, value)| value.parse().expect("figures are numbers"))
}

fn resident_bytes(daemon: &Daemon) -> Result<usize> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid()))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    Ok(line.trim_end_matches("kB").trim().parse::<usize>()? * KIB)
}

/// A connection by its ports, as one end's kernel has it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Leg {
    local: u16,
    remote: u16,
}

impl Leg {
    fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self {
            local: stream.local_addr()?.port(),
            remote: stream.peer_addr()?.port(),
        })
    }

    fn seen_from_the_gateway(self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
        }
    }
}

/// A line of /proc/net/tcp.
struct TcpSocket {
    leg: Leg,
    state: u8,
    unacknowledged: u32,
}

/// States of the kernel's `net/tcp_states.h`.
const CLOSE_WAIT: u8 = 8;
const LISTEN: u8 = 10;

fn tcp_sockets(namespace: &Namespace, family: Family) -> Vec<TcpSocket> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/tcp",
        Family::V6 => "/proc/thread-self/net/tcp6",
    };
    let table = namespace
        .run(|| fs::read_to_string(path))
        .expect("every namespace has the table");
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let mut port = || u16::from_str_radix(words.next()?.rsplit(':').next()?, 16).ok();
        let leg = Leg {
            local: port()?,
            remote: port()?,
        };
        let state = u8::from_str_radix(words.next()?, 16).ok()?;
        let unacknowledged = u32::from_str_radix(words.next()?.split(':').next()?, 16).ok()?;
        Some(TcpSocket {
            leg,
            state,
            unacknowledged,
        })
    };
    table.lines().skip(1).filter_map(parse).collect()
}

fn is_listening(namespace: &Namespace, port: u16) -> bool {
    let sockets = Family::BOTH
        .into_iter()
        .flat_map(|family| tcp_sockets(namespace, family));
    sockets
        .filter(|socket| socket.state == LISTEN)
        .any(|socket| socket.leg.local == port)
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
    directory: PathBuf,
}

impl Nginx {
    const PORT: u16 = 8080;

    fn start(namespace: &Namespace) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("pepsal-nginx-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let path = directory.display();
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
        let file = directory.join("nginx.conf");
        fs::write(&file, config)?;
        let process = namespace
            .command("nginx")
            .arg("-p")
            .arg(&directory)
            .arg("-c")
            .arg(&file)
            .spawn();
        let nginx = Self {
            _process: Reaped(process.context("nginx")?),
            directory,
        };
        eventually(PATIENCE, || is_listening(namespace, Self::PORT));
        Ok(nginx)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // What cannot be removed is in the folder for temporary files.
        let _ = fs::remove_dir_all(Path::new(&self.directory));
    }
}
