//! How a link's rate is divided.

use std::io::{self, Write};
use std::net::Shutdown;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use pepsal_tests::{Connection, Connector, Family, PATIENCE, Side, eventually};
use socket2::SockRef;

use crate::with_link;

/// A link whose legs share 8 Mbit/s. It is a veth: nothing else slows them down.
const SHARED: &str = "rate=10mbit,pacing=8mbit,rtt=50ms,cc=cubic";

#[test]
fn pacing_rate_is_divided_anew_as_flows_come_and_go() -> Result<()> {
    for side in Side::BOTH {
        let bed = with_link(side, SHARED, &[])?;
        let first = Bulk::start(bed.flow(Family::V4)?, side)?;
        bed.expect(&first.flow, side, |leg| leg.pacing_bps, Some(8_000_000));
        let second = Bulk::start(bed.flow(Family::V6)?, side)?;
        for bulk in [&first, &second] {
            bed.expect(&bulk.flow, side, |leg| leg.pacing_bps, Some(4_000_000));
        }
        second.end()?;
        bed.expect(&first.flow, side, |leg| leg.pacing_bps, Some(8_000_000));
        first.end()?;
    }
    Ok(())
}

#[test]
fn idle_flow_costs_the_others_nothing() -> Result<()> {
    let bed = with_link(Side::Server, SHARED, &[])?;
    let bulk = Bulk::start(bed.flow(Family::V4)?, Side::Server)?;
    bed.expect(&bulk.flow, Side::Server, |leg| leg.pacing_bps, Some(8_000_000));
    let idle = bed.flow(Family::V4)?;
    bed.expect(&idle, Side::Server, |leg| leg.pacing_bps, Some(4_000_000));
    // Long enough for the rate to have been divided some times more.
    let sent = || -> Result<u64> { Ok(bed.leg(&bulk.flow, Side::Server)?.context("it is there")?.sent) };
    let before = sent()?;
    eventually(PATIENCE, || sent().is_ok_and(|now| now > before + 500_000));
    bed.expect(&bulk.flow, Side::Server, |leg| leg.pacing_bps, Some(8_000_000));
    bulk.end()
}

#[test]
fn pacing_rate_can_be_divided_by_dscp() -> Result<()> {
    /// Class selector 3 (RFC 2474), as a traffic class.
    const CS3: u8 = 3 << 5;
    let bed = with_link(Side::Server, &format!("{SHARED},weights=dscp"), &[])?;
    let urgent = Connector {
        traffic_class: CS3,
        ..Connector::default()
    };
    for family in Family::BOTH {
        let light = Bulk::start(bed.flow(family)?, Side::Server)?;
        let heavy = Bulk::start(bed.open_by(&urgent, family)?.split()?, Side::Server)?;
        bed.expect(&light.flow, Side::Server, |leg| leg.pacing_bps, Some(1_600_000));
        bed.expect(&heavy.flow, Side::Server, |leg| leg.pacing_bps, Some(6_400_000));
        light.end()?;
        heavy.end()?;
    }
    Ok(())
}

/// A flow that sends on one of its legs for as long as it is there, as fast as it can.
struct Bulk {
    flow: Connection,
    threads: [JoinHandle<()>; 2],
}

impl Bulk {
    fn start(flow: Connection, side: Side) -> Result<Self> {
        let (client, server) = (flow.client.try_clone()?, flow.server.try_clone()?);
        let (mut from, mut to) = match side {
            Side::Client => (server, client),
            Side::Server => (client, server),
        };
        let threads = [
            thread::spawn(move || while from.write_all(&[0; 16_384]).is_ok() {}),
            thread::spawn(move || _ = io::copy(&mut to, &mut io::sink())),
        ];
        Ok(Self { flow, threads })
    }

    /// Ends it by a reset from both its ends.
    fn end(self) -> Result<()> {
        for stream in [&self.flow.client, &self.flow.server] {
            SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
            // One may have been reset by the other already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads {
            thread.join().expect("moving bytes does not panic");
        }
        Ok(())
    }
}
