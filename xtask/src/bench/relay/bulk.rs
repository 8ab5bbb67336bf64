//! Bulk transfers of one flow and of sixteen.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use pepsal_tests::Family;
use serde::Deserialize;

use super::{
    lane::Lane,
    machine_use,
    observation::{Bulk, Metric, Way},
    rounds::Bench,
};

/// Timeout of a transfer: a hundred times the slowest expected.
const PATIENCE: Duration = Duration::from_secs(60);
const SERVER_BUSY: &str = "server is busy";
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

impl Bulk {
    pub fn all() -> impl Iterator<Item = Self> {
        let bulks =
            |flows| [Way::Up, Way::Down].map(|way| Family::BOTH.map(|family| Self { flows, way, family }));
        [1, 16].into_iter().flat_map(bulks).flatten()
    }
}

/// Measures all bulk transfers. The lanes are kept for all rounds, because new lanes are slower.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let mut lanes = BTreeMap::new();
    for contender in bench.contenders {
        let lane = Lane::new(*contender, bench.equipment)?;
        for bulk in Bulk::all().filter(|bulk| bulk.family == Family::V4) {
            bench.progress.show(|| format!("warming up, {contender}: {bulk}"));
            transfer(&lane, bulk, bench.amounts.bulk_bytes)?;
        }
        lanes.insert(*contender, lane);
    }
    for bulk in Bulk::all() {
        bench.rounds(&bulk.to_string(), |bench, round, contender| {
            let transferred = transfer(&lanes[&contender], bulk, bench.amounts.bulk_bytes)?;
            bench
                .found
                .add(round, contender, Metric::Rate(bulk), transferred.gbps);
            let metric = Metric::Processor(bulk);
            bench
                .found
                .add(round, contender, metric, transferred.cpu_seconds_per_gb);
            Ok(())
        })?;
    }
    Ok(())
}

struct Transferred {
    gbps: f64,
    cpu_seconds_per_gb: f64,
}

fn transfer(lane: &Lane<'_>, bulk: Bulk, bytes: u64) -> Result<Transferred> {
    let (server, bytes, flows) = (
        bulk.family.server().to_string(),
        bytes.to_string(),
        bulk.flows.to_string(),
    );
    let mut arguments = vec!["-J", "-c", &server, "-n", &bytes, "-P", &flows];
    if bulk.way == Way::Down {
        arguments.push("-R");
    }
    let deadline = Instant::now() + PATIENCE;
    let (output, busy) = loop {
        let before = machine_use::busy()?;
        let output = lane.run_in_client("iperf3", &arguments, PATIENCE);
        let busy = machine_use::busy()?.saturating_sub(before);
        // The server needs a moment after the previous transfer.
        let said = output
            .as_ref()
            .map_or_else(|error| error.to_string(), Clone::clone);
        if !said.contains(SERVER_BUSY) || Instant::now() >= deadline {
            break (output?, busy);
        }
        thread::sleep(RETRY_INTERVAL);
    };
    let received = received(&output)?;
    Ok(Transferred {
        gbps: received.bits_per_second / 1e9,
        cpu_seconds_per_gb: busy.as_secs_f64() / (received.bytes / 1e9),
    })
}

/// Used members of iperf3's `-J` output.
#[derive(Deserialize)]
struct Iperf {
    #[serde(default)]
    end: End,
    error: Option<String>,
}

#[derive(Default, Deserialize)]
struct End {
    sum_received: Option<Received>,
}

#[derive(Deserialize)]
struct Received {
    bytes: f64,
    bits_per_second: f64,
}

fn received(output: &str) -> Result<Received> {
    let iperf: Iperf = serde_json::from_str(output).context("cannot parse the JSON of iperf3")?;
    if let Some(error) = iperf.error {
        bail!("iperf3: {error}");
    }
    iperf
        .end
        .sum_received
        .filter(|received| received.bytes > 0.0)
        .context("iperf3 received no data")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_and_families_are_measured_with_one_flow_and_sixteen() {
        assert_eq!(Bulk::all().count(), 8);
    }

    #[test]
    fn iperf3_is_understood() {
        let output = r#"{"start": {}, "intervals": [], "end": {"streams": [], "sum_sent": {"bytes": 9},
            "sum_received": {"start": 0, "end": 0.4, "seconds": 0.4, "bytes": 500000000, "bits_per_second": 1e10}}}"#;
        let received = received(output).unwrap();
        assert_eq!((received.bytes, received.bits_per_second), (5e8, 1e10));
    }

    #[test]
    fn what_iperf3_complains_of_is_passed_on() {
        let refused = received(r#"{"start": {}, "end": {}, "error": "unable to connect"}"#)
            .err()
            .unwrap();
        assert!(refused.to_string().contains("unable to connect"), "{refused}");
        assert!(received(r#"{"end": {}}"#).is_err());
        assert!(received("iperf3: no").is_err());
    }
}
