//! Progress of the transfers.

use std::sync::Arc;

use pepsal_tests::Outcome;

use super::{
    contest::{Contest, Placement},
    lane::Lane,
};
use crate::progress;

pub struct Progress(progress::Progress);

impl Progress {
    pub fn new() -> Self {
        Self(progress::Progress::new())
    }

    /// Shows the received share of the files, by pepsal's position.
    pub fn show(&mut self, lanes: &[Arc<Lane>], bytes: u64) {
        self.0.show(|| {
            let shares = Placement::ALL.into_iter().filter_map(|placement| {
                let arrived: Vec<_> = lanes
                    .iter()
                    .filter(|lane| lane.contest.placement == placement)
                    .map(|lane| lane.arrived())
                    .collect();
                let share = arrived.iter().sum::<u64>() as f64 / (arrived.len() as u64 * bytes) as f64;
                (!arrived.is_empty()).then(|| format!("{} {:3.0} %", placement.name(), share * 100.0))
            });
            shares.collect::<Vec<_>>().join("   ")
        });
    }

    pub fn finished(&self, contest: &Contest, outcome: &Outcome) {
        let seconds = outcome.elapsed.as_secs_f64();
        self.0.report(&format!("{seconds:4.0} s   {contest} finished"));
    }

    pub fn clear(&self) {
        self.0.clear();
    }
}
