//! How long a leg waits for its peer.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use pepsal_tests::{Family, PATIENCE, Side, Topology};

use crate::with_link;

#[test]
fn leg_is_given_up_after_the_user_timeout() -> Result<()> {
    let settings = "rate=20mbit,rtt=20ms,rto-max=1s,user-timeout=3s";
    let bed = with_link(Side::Server, settings, &[])?;
    for family in Family::BOTH {
        let mut flow = bed.flow(family)?;
        let outage = Outage::begin(&bed.topology)?;
        let start = Instant::now();
        flow.client.write_all(b"lost")?;
        flow.client.set_read_timeout(Some(PATIENCE))?;
        let error = flow.client.read(&mut [0]).expect_err("nothing arrives");
        let elapsed = start.elapsed();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "after {elapsed:?}");
        // By the number of its tries the kernel would give it up after 14 s.
        let expected = Duration::from_secs(2)..Duration::from_secs(10);
        assert!(expected.contains(&elapsed), "{elapsed:?}");
        outage.end()?;
    }
    Ok(())
}

#[test]
fn outage_shorter_than_the_user_timeout_breaks_no_flow() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,rtt=20ms,rto-max=1s", &[])?;
    // With these the number of tries comes to 4 s.
    bed.topology.gateway.sysctl("net.ipv4.tcp_retries2", 5)?;
    let flows = [bed.flow(Family::V4)?, bed.flow(Family::V6)?];
    let outage = Outage::begin(&bed.topology)?;
    for flow in &flows {
        (&flow.client).write_all(b"late")?;
    }
    thread::sleep(Duration::from_secs(8));
    outage.end()?;
    for flow in &flows {
        let mut received = [0; 4];
        flow.server.set_read_timeout(Some(PATIENCE))?;
        (&flow.server).read_exact(&mut received)?;
        assert_eq!(&received, b"late");
        (&flow.server).write_all(b"back")?;
        flow.client.set_read_timeout(Some(PATIENCE))?;
        (&flow.client).read_exact(&mut received)?;
        assert_eq!(&received, b"back");
    }
    Ok(())
}

#[test]
fn closed_window_is_no_outage() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,rtt=20ms,user-timeout=1s", &[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        flow.client.set_write_timeout(Some(Duration::from_secs(1)))?;
        let mut written = 0;
        while let Ok(bytes) = (&flow.client).write(&[1; 65_536]) {
            written += bytes as u64;
        }
        // The kernel would count from the first window probe that finds nothing in flight.
        thread::sleep(Duration::from_secs(5));
        flow.client.shutdown(Shutdown::Write)?;
        flow.server.set_read_timeout(Some(PATIENCE))?;
        let received = io::copy(&mut &flow.server, &mut io::sink())?;
        assert_eq!(received, written);
    }
    Ok(())
}

/// Drops what the servers send to the clients, until it is ended.
struct Outage<'a>(&'a Topology);

impl<'a> Outage<'a> {
    fn begin(topology: &'a Topology) -> Result<Self> {
        for family in Family::BOTH {
            topology
                .server
                .ip(format!("route add blackhole {}", family.client()))?;
        }
        Ok(Self(topology))
    }

    fn end(self) -> Result<()> {
        for family in Family::BOTH {
            self.0
                .server
                .ip(format!("route del blackhole {}", family.client()))?;
        }
        Ok(())
    }
}
