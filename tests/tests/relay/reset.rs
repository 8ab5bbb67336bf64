//! Resets by an end.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;

use anyhow::Result;
use pepsal_tests::{Bed, PATIENCE, eventually, receive_all, reset};

use crate::{KIB, MIB, assert_reset_after, cases, limit_buffers, payload, until_gateway_has_all};

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
