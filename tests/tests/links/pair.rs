//! A daemon at each end of a link.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use pepsal_tests::{Bed, Capture, Daemon, Family, Link, LinkProfile, Segment, Topology, Transfer};

use crate::fast_open::{FAST_OPEN_FOR_ALL, REQUEST, ask, ask_in_syn, fast_open};
use crate::on;

#[test]
fn pair_with_fast_open_saves_the_links_handshake() -> Result<()> {
    let topology = fast_open(Topology::builder().router().build()?, FAST_OPEN_FOR_ALL)?;
    let pair = Pair::new(topology, "rate=20mbit,rtt=100ms", &["-f"])?;
    let router = pair
        .near
        .topology
        .router
        .as_ref()
        .context("a pair has a router")?;
    for family in Family::BOTH {
        ask_in_syn(&pair.near, family)?;
        let capture = Capture::start(router, "sat1")?;
        let flow = ask(&pair.near, family)?;
        let client = flow.client.local_addr()?;
        let segments = capture.segments()?;
        let first = segments
            .iter()
            .find(|segment| segment.source == client)
            .context("it crossed the link")?;
        assert!(first.is_syn(), "{first:?}");
        assert_eq!(first.payload_len, REQUEST.len(), "nothing had to come back first");
    }
    Ok(())
}

#[test]
fn only_a_pepsal_peer_is_sent_more_than_its_syn_ack_can_say() -> Result<()> {
    /// The window field of a SYN-ACK, which is not scaled.
    const SAID: usize = 65_535;
    let link = LinkProfile::symmetric(50_000_000, Duration::from_millis(200), 0.0);
    for (peer, is_more) in [("pepsal", true), ("unknown", false)] {
        let topology = Topology::builder().link(Link::Emulated(link)).router().build()?;
        let pair = Pair::new(topology, &format!("rate=50mbit,rtt=200ms,peer={peer}"), &[])?;
        let topology = &pair.near.topology;
        for family in Family::BOTH {
            let capture = Capture::start(&topology.gateway, "sat0")?;
            let upload = Transfer::upload(1 << 20);
            let outcome = upload.run(&topology.client, pair.near.server.address(family))?;
            assert!(outcome.intact);
            let flight = first_flight(&capture.segments()?, outcome.local);
            assert_eq!(flight > SAID, is_more, "{peer} {family:?}: {flight} bytes");
        }
    }
    Ok(())
}

/// Payload that `sender` had under way before anything came back for it.
fn first_flight(segments: &[Segment], sender: SocketAddr) -> usize {
    let handshake_and_request = 2;
    segments
        .iter()
        .skip_while(|segment| segment.source != sender)
        .scan(0, |answers, segment| {
            *answers += usize::from(segment.destination == sender);
            (*answers < handshake_and_request).then_some(segment)
        })
        .filter(|segment| segment.source == sender)
        .map(|segment| segment.payload_len)
        .sum()
}

#[test]
fn pair_carries_parallel_flows_intact_over_a_lossy_link() -> Result<()> {
    const FLOWS: u64 = 8;
    let link = LinkProfile::symmetric(20_000_000, Duration::from_millis(100), 0.01);
    println!("seed {}", link.seed);
    let topology = Topology::builder().link(Link::Emulated(link)).router().build()?;
    let pair = Pair::new(topology, "rate=20mbit,rtt=100ms,peer=pepsal", &[])?;
    let (topology, server) = (&pair.near.topology, &pair.near.server);
    thread::scope(|scope| -> Result<()> {
        let mut transfers = Vec::new();
        for number in 0..FLOWS {
            let family = Family::BOTH[(number % 2) as usize];
            let transfer = match number % 4 {
                0 | 1 => Transfer::upload(300_000),
                _ => Transfer::download(300_000),
            };
            let (transfer, address) = (transfer.seed(number), server.address(family));
            transfers.push(scope.spawn(move || transfer.run(&topology.client, address)));
        }
        for transfer in transfers {
            let outcome = transfer.join().expect("transfers do not panic")?;
            assert!(outcome.intact);
            assert_eq!(
                outcome.peer, outcome.local,
                "the server sees the client's address"
            );
        }
        Ok(())
    })?;
    for daemon in [pair.near.daemon, pair.far] {
        assert_eq!(daemon.terminate()?.counter("finished"), FLOWS);
    }
    Ok(())
}

/// A daemon at each end of a link.
struct Pair {
    near: Bed,
    far: Daemon,
}

impl Pair {
    /// Both know the link, by the names that their interfaces have.
    fn new(topology: Topology, settings: &str, arguments: &[&str]) -> Result<Self> {
        let router = topology.router.as_ref().context("a pair needs a router")?;
        let far = format!("sat1,{settings}");
        let far = Daemon::start(router, &[&["-i", "sat1", "--link", &far], arguments].concat())?;
        let near = format!("sat0,{settings}");
        let near = on(topology, &[&["--link", &near], arguments].concat())?;
        Ok(Self { near, far })
    }
}
