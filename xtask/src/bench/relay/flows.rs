//! What open flows cost, from a hundred to as many as descriptors allow.
//!
//! Memory and descriptors are those of the flows that are added from one number to the next, so that what the first ones
//! bring about, once and for all, is not counted as theirs.

use std::{thread, time::Duration};

use anyhow::Result;
use pepsal_tests::Family;

use super::{contender::Contender, end::Order, lane::Lane, machine_use, observation::Metric, rounds::Bench};

/// Nothing is on its way any more after this, and what is freed in the background has been.
const SETTLED: Duration = Duration::from_millis(250);
/// For thousands of connections.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures every contender in a fresh lane each round: memory that was in use once is not all given back.
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
            // What the first requests have warmed up is none of the next flows'.
            before = Some(Held::now(count, &lane)?);
        }
        Ok(())
    })
}

/// What is in use while so many flows are open.
struct Held {
    count: usize,
    /// Bytes of the machine.
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

/// Microseconds of processor time for a request over the open flows.
fn exchange(lane: &mut Lane<'_>, count: usize) -> Result<f64> {
    let before = machine_use::busy()?;
    lane.order(&Order::Exchange { count }, PATIENCE)?;
    let busy = machine_use::busy()?.saturating_sub(before);
    Ok(busy.as_secs_f64() * 1e6 / count as f64)
}
