//! Buffers, windows and segment sizes.

use std::io::{Read, Write};
use std::net::SocketAddr;

use anyhow::{Context, Result};
use pepsal_tests::{Capture, Family, Leg, PATIENCE, Segment, Side, eventually};

use crate::{start, with_link};

#[test]
fn legs_through_other_interfaces_are_as_without_a_link() -> Result<()> {
    let untouched = |leg: &Leg| {
        let Leg {
            congestion,
            window,
            pacing_bps,
            receive_buffer,
            send_buffer,
            mss,
            ..
        } = leg.clone();
        (congestion, window, pacing_bps, receive_buffer, send_buffer, mss)
    };
    let plain = start(&[])?;
    for side in Side::BOTH {
        let bed = with_link(side.other(), "rate=20mbit,rtt=100ms,mss=1200", &[])?;
        for family in Family::BOTH {
            let flow = plain.open(family)?;
            let leg = plain.leg(&flow, side)?.context("it is there")?;
            assert_eq!(leg.pacing_bps, None);
            let flow = bed.flow(family)?;
            bed.expect(&flow, side, untouched, untouched(&leg));
        }
    }
    Ok(())
}

#[test]
fn receive_window_covers_the_links_product_from_the_first_segment_on() -> Result<()> {
    const WINDOW: u64 = 1 << 20;
    for side in Side::BOTH {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,rcvbuf=1MiB", &[])?;
        for family in Family::BOTH {
            let captures = [
                Capture::start(&bed.topology.client, "eth0")?,
                Capture::start(&bed.topology.server, "eth0")?,
            ];
            let mut flow = bed.flow(family)?;
            // The accepted leg acknowledges this; the connected one has acknowledged the handshake.
            flow.client.write_all(b"question")?;
            let mut question = [0; 8];
            flow.server.read_exact(&mut question)?;
            let legs = [flow.client.peer_addr()?, flow.peer];
            let windows = Side::BOTH.map(|at| {
                let (capture, leg) = (&captures[at as usize], legs[at as usize]);
                let mut window = None;
                eventually(PATIENCE, || {
                    window = first_window(&capture.segments().expect("it can be read"), leg);
                    window.is_some()
                });
                window.expect("it was waited for")
            });
            let (window, scale) = windows[side as usize];
            // The kernel rounds to whole segments and to the scale.
            assert!(window > WINDOW * 9 / 10, "{side:?} {family:?}: {windows:?}");
            assert!(
                window <= WINDOW + (1 << scale),
                "{side:?} {family:?}: {windows:?}"
            );
            let (other, _) = windows[side.other() as usize];
            assert!(other < 128 << 10, "{side:?} {family:?}: {windows:?}");
        }
    }
    Ok(())
}

/// What a leg announces as its receive window in the first segment that scales it, with the scale.
fn first_window(segments: &[Segment], leg: SocketAddr) -> Option<(u64, u8)> {
    let mut sent = segments.iter().filter(|segment| segment.source == leg);
    let scale = sent.find_map(|segment| segment.window_scale)?;
    let first = sent.find(|segment| segment.is_established())?;
    Some((u64::from(first.window) << scale, scale))
}

#[test]
fn buffers_are_the_links() -> Result<()> {
    for side in Side::BOTH {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,rcvbuf=1MiB,sndbuf=2MiB", &[])?;
        for family in Family::BOTH {
            let flow = bed.flow(family)?;
            // The kernel doubles them, for its bookkeeping.
            let buffers = |leg: &Leg| (leg.receive_buffer, leg.send_buffer);
            bed.expect(&flow, side, buffers, (2 << 20, 4 << 20));
        }
    }
    Ok(())
}

#[test]
fn both_ends_of_a_leg_are_told_the_links_segment_size() -> Result<()> {
    for (side, arguments) in [
        (Side::Client, &[][..]),
        (Side::Server, &[]),
        (Side::Client, &["-m", "1300"]),
        (Side::Server, &["-m", "1300"]),
    ] {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,mss=1200", arguments)?;
        for family in Family::BOTH {
            let capture = Capture::start(&bed.topology.client, "eth0")?;
            let flow = bed.flow(family)?;
            let segments = capture.segments()?;
            let answer = segments.iter().find(|segment| segment.is_syn_ack());
            let announced = match side {
                Side::Client => answer.context("the client was answered")?.mss,
                Side::Server => flow.syn.segment().mss,
            };
            assert_eq!(announced, Some(1200), "{side:?} {family:?} {arguments:?}");
            // Less 12 bytes for the timestamps.
            bed.expect(&flow, side, |leg| leg.mss, 1188);
        }
    }
    Ok(())
}
