//! Metrics, and whether they are true.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Instant;

use anyhow::Result;
use pepsal_tests::{Connection, Connector, Direction, Family, PATIENCE, Transfer, eventually, reset};

use crate::scrape::Scrape;
use crate::{MIB, Watched};

#[test]
fn bytes_and_ends_are_counted_as_they_were() -> Result<()> {
    let bed = Watched::start(&[])?;
    for family in Family::BOTH {
        for direction in [Direction::Upload, Direction::Download] {
            let transfer = Transfer::new(direction, 4 * MIB);
            let outcome = transfer.run(&bed.topology.client, bed.server.address(family))?;
            assert!(outcome.intact);
        }
    }
    let closed =
        |scrape: &Scrape, reason: &str| scrape.of("pepsal_flows_closed_total", &[("reason", reason)]);
    bed.eventually_scraped(|scrape| closed(scrape, "finished") == 4.0)?;
    let refused = (Family::V4.server(), 9).into();
    let attempt = Connector::default().connect(&bed.topology.client, refused);
    assert!(attempt.and_then(|stream| send_and_read(&stream)).is_err());
    let used_flow = |family| -> Result<Connection> {
        let flow = bed.flow(family)?;
        flow.greet()?;
        Ok(flow)
    };
    reset(used_flow(Family::V4)?.client)?;
    reset(used_flow(Family::V6)?.server)?;
    bed.eventually_scraped(|scrape| {
        ["refused", "client_reset", "server_reset"]
            .iter()
            .all(|reason| closed(scrape, reason) == 1.0)
    })?;

    let scrape = bed.scrape()?;
    for (direction, on_sat0) in [("up", "sent"), ("down", "received")] {
        let bytes = scrape.of("pepsal_bytes_total", &[("direction", direction)]);
        // The transfers' own protocol adds a few to the payload.
        assert!(
            (8 * MIB..8 * MIB + 4096).contains(&(bytes as u64)),
            "{direction}: {bytes}"
        );
        for (interface, way) in [("sat0", on_sat0), ("lan0", opposite(on_sat0))] {
            let labels = [("interface", interface), ("direction", way)];
            assert_eq!(scrape.of("pepsal_link_bytes_total", &labels), bytes, "{labels:?}");
        }
    }
    assert_eq!(scrape.of("pepsal_flow_duration_seconds_count", &[]), 7.0);
    assert_eq!(scrape.of("pepsal_connect_duration_seconds_count", &[]), 6.0);
    assert_eq!(
        scrape.of("pepsal_packets_total", &[("verdict", "intercepted")]),
        7.0
    );
    assert_eq!(scrape.of("pepsal_packets_total", &[("verdict", "assigned")]), 7.0);
    assert_eq!(scrape.of("pepsal_events_total", &[("event", "accepted")]), 7.0);
    assert_eq!(scrape.of("pepsal_flows_open", &[]), 0.0);
    Ok(())
}

fn send_and_read(mut stream: &TcpStream) -> std::io::Result<usize> {
    stream.write_all(b"hello")?;
    stream.read(&mut [0])
}

fn opposite(way: &str) -> &str {
    if way == "sent" { "received" } else { "sent" }
}

#[test]
fn open_flows_are_in_the_totals_while_they_run() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let flow = bed.flow(Family::V4)?;
    (&flow.client).write_all(&[7; 100_000])?;
    (&flow.server).read_exact(&mut [0; 100_000])?;
    let scrape = bed
        .eventually_scraped(|scrape| scrape.of("pepsal_bytes_total", &[("direction", "up")]) == 100_000.0)?;
    assert_eq!(scrape.of("pepsal_flows_open", &[]), 1.0);
    for interface in ["lan0", "sat0"] {
        assert_eq!(
            scrape.of("pepsal_link_legs_open", &[("interface", interface)]),
            1.0
        );
    }
    let segments = scrape.of("pepsal_link_segments_sent_total", &[("interface", "sat0")]);
    assert!(segments >= 100_000.0 / 65_536.0, "{segments}");
    let rtt = scrape.of("pepsal_link_rtt_seconds", &[("interface", "sat0")]);
    assert!(rtt > 0.0 && rtt < 1.0, "{rtt}");
    let rate = scrape.of("pepsal_link_rate_bytes_per_second", &[("interface", "sat0")]);
    assert!((4e6..6.25e6).contains(&rate), "{rate}");
    let again = bed.scrape()?;
    assert_eq!(again.of("pepsal_bytes_total", &[("direction", "up")]), 100_000.0);
    Ok(())
}

#[test]
fn share_of_a_links_rate_in_use_follows_the_flows() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=20mbit,rtt=20ms"])?;
    let flow = bed.flow(Family::V4)?;
    let used = |scrape: &Scrape| scrape.of("pepsal_link_utilization_ratio", &[("interface", "sat0")]);
    assert_eq!(used(&bed.scrape()?), 0.0);
    thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| std::io::copy(&mut &flow.server, &mut std::io::sink()));
        let writer = scope.spawn(|| (&flow.client).write_all(&vec![0; 10 * MIB as usize]));
        let busy = bed.eventually_scraped(|scrape| used(scrape) > 0.6);
        writer.join().expect("no panic")?;
        flow.client.shutdown(std::net::Shutdown::Write)?;
        reader.join().expect("no panic")?;
        assert!(used(&busy?) < 1.2);
        Ok(())
    })?;
    bed.eventually_scraped(|scrape| used(scrape) == 0.0)?;
    Ok(())
}

#[test]
fn limit_shows_in_the_verdicts() -> Result<()> {
    let bed = Watched::start(&["-c", "1"])?;
    let _held = bed.flow(Family::V4)?;
    let _passing = bed.open(Family::V4)?;
    let scrape = bed.scrape()?;
    assert_eq!(
        scrape.of("pepsal_packets_total", &[("verdict", "limit_reached")]),
        1.0
    );
    assert_eq!(scrape.of("pepsal_flows_limit", &[]), 1.0);
    Ok(())
}

#[test]
fn readiness_names_what_is_missing() -> Result<()> {
    let bed = Watched::start(&[])?;
    assert_eq!(bed.get("/healthz")?, (200, "ok\n".into()));
    assert_eq!(bed.get("/readyz")?, (200, "ready\n".into()));
    assert_eq!(bed.get("/")?.0, 404);
    bed.topology.gateway.ip("link del lan0")?;
    eventually(PATIENCE, || {
        bed.get("/readyz")
            .is_ok_and(|(status, body)| status == 503 && body.contains("interface lan0 is missing"))
    });
    assert_eq!(
        bed.scrape()?
            .of("pepsal_interface_intercepted", &[("interface", "lan0")]),
        0.0
    );
    let status = bed.pepsal(&["status"])?;
    assert!(!status.status.success());
    let shown = String::from_utf8(status.stdout)?;
    assert!(
        shown.contains("NOT READY") && shown.contains("problem: interface lan0"),
        "{shown}"
    );
    Ok(())
}

#[test]
fn scrape_of_many_flows_takes_little() -> Result<()> {
    const FLOWS: usize = 1000;
    let bed = Watched::start(&[])?;
    let flows: Vec<Connection> = (0..FLOWS).map(|_| bed.flow(Family::V4)).collect::<Result<_>>()?;
    let begun = Instant::now();
    let scrape = bed.scrape()?;
    println!("a scrape of {FLOWS} flows took {:?}", begun.elapsed());
    assert_eq!(scrape.of("pepsal_flows_open", &[]), FLOWS as f64);
    // No more lines than for none.
    assert!(scrape.0.len() < 150, "{} samples", scrape.0.len());
    assert_eq!(bed.flows(&[])?["list"].as_array().map(Vec::len), Some(FLOWS));
    drop(flows);
    Ok(())
}
