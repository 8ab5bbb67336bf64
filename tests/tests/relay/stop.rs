//! Ends that the daemon makes.

use std::io::{self, ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::signal::Signal;
use pepsal_tests::{Bed, Family, Leg, PATIENCE, Side, eventually, receive_all, send_all};

use crate::{KIB, MIB, assert_reset_after, payload};

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
