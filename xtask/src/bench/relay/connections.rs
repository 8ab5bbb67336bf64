//! New connections, each for one small request.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use pepsal_tests::Family;

use super::{
    end::{Answer, Order},
    lane::Lane,
    machine_use,
    observation::Metric,
    rounds::Bench,
};

/// Additional time after the last connection is opened.
const PATIENCE: Duration = Duration::from_secs(40);

/// Measures connections of both address families.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let mut lanes = BTreeMap::new();
    for contender in bench.contenders {
        bench
            .progress
            .show(|| format!("warming up, {contender}: new connections"));
        let mut lane = Lane::new(*contender, bench.equipment)?;
        connect(&mut lane, Family::V4, bench.amounts.connections)?;
        lanes.insert(*contender, lane);
    }
    for family in Family::BOTH {
        let what = format!("new connections, {}", family.name());
        bench.rounds(&what, |bench, round, contender| {
            let lane = lanes.get_mut(&contender).expect("every contender has a lane");
            let before = machine_use::busy()?;
            let answer = connect(lane, family, bench.amounts.connections)?;
            let busy = machine_use::busy()?.saturating_sub(before);
            let per_second = answer.requests as f64 / answer.seconds;
            bench
                .found
                .add(round, contender, Metric::Connections(family), per_second);
            let metric = Metric::ConnectionProcessor(family);
            let microseconds = busy.as_secs_f64() * 1e6 / answer.requests as f64;
            bench.found.add(round, contender, metric, microseconds);
            let time = |percentile| Metric::ConnectionTime(family, percentile);
            bench.found.add(round, contender, time(50), answer.p50_ms);
            bench.found.add(round, contender, time(99), answer.p99_ms);
            Ok(())
        })?;
    }
    Ok(())
}

fn connect(lane: &mut Lane<'_>, family: Family, duration: Duration) -> Result<Answer> {
    let server = lane.server(family);
    lane.order(&Order::Connect { server, duration }, duration + PATIENCE)
}
