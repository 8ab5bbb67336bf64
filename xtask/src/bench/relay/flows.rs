//! Measures the cost of open flows, from a hundred to the limit of descriptors.
//!
//! Memory and descriptors are those of the additional flows between two numbers, so that one-time costs do
//! not count.

use std::{thread, time::Duration};

use anyhow::Result;
use pepsal_tests::Family;

use super::{contender::Contender, end::Order, lane::Lane, machine_use, observation::Metric, rounds::Bench};

/// Time after which no packets are in flight, and deferred frees are done.
const SETTLED: Duration = Duration::from_millis(250);
/// Timeout for thousands of connections.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures every contender in a new lane each round: the kernel does not return all memory that was in use.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    bench.rounds("open flows", |bench, round, contender| {
        let mut lane = Lane::new(contender, bench.equipment)?;
        let mut before: Option<Held> = None;
        for count in bench.amounts.flows.clone() {
            let server = lane.server(Family::V4);
            lane.order(&Order::Hold { server, flows: count }, PATIENCE)?;
            thread::sleep(SETTLED);
            let held = Held::now(count, &lane)?;
            if let Some(before) = before {
                let (from, more) = (before.count, (count - before.count) as f64);
                let kilobytes = (held.memory as f64 - before.memory as f64) / 1e3;
                bench
                    .found
                    .add(round, contender, Metric::Memory(from, count), kilobytes / more);
                if contender != Contender::Forwarding {
                    let descriptors = held.descriptors as f64 - before.descriptors as f64;
                    let metric = Metric::Descriptors(from, count);
                    bench.found.add(round, contender, metric, descriptors / more);
                }
            }
            let metric = Metric::Exchange(count);
            let microseconds = exchange(&mut lane, bench.amounts.exchanges)?;
            bench.found.add(round, contender, metric, microseconds);
            thread::sleep(SETTLED);
            // Later requests must not benefit from the first ones.
            before = Some(Held::now(count, &lane)?);
        }
        Ok(())
    })
}

/// Resources in use with a number of open flows.
struct Held {
    count: usize,
    /// Of the machine, in bytes.
    memory: u64,
    descriptors: usize,
}

impl Held {
    fn now(count: usize, lane: &Lane<'_>) -> Result<Self> {
        Ok(Self {
            count,
            memory: machine_use::memory()?,
            descriptors: lane
                .proxy_pid()
                .map(machine_use::descriptors)
                .transpose()?
                .unwrap_or(0),
        })
    }
}

/// CPU time of a request over the open flows, in microseconds.
fn exchange(lane: &mut Lane<'_>, count: usize) -> Result<f64> {
    let before = machine_use::busy()?;
    lane.order(&Order::Exchange { count }, PATIENCE)?;
    let busy = machine_use::busy()?.saturating_sub(before);
    Ok(busy.as_secs_f64() * 1e6 / count as f64)
}
