//! How far the transfers are: one line that changes on a terminal, else a line now and then.

use std::{
    io::{IsTerminal as _, Write as _, stdout},
    sync::Arc,
    time::{Duration, Instant},
};

use pepsal_tests::Outcome;

use super::race::{Contest, Lane, Placement};

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
const CLEAR_LINE: &str = "\r\x1b[K";

pub struct Progress {
    start: Instant,
    shown: Instant,
    is_terminal: bool,
}

impl Progress {
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            shown: now,
            is_terminal: stdout().is_terminal(),
        }
    }

    /// Shows how much of the files has arrived, by pepsal's place.
    pub fn show(&mut self, lanes: &[Arc<Lane>], bytes: u64) {
        if !self.is_terminal && self.shown.elapsed() < LINE_INTERVAL {
            return;
        }
        self.shown = Instant::now();
        let mut line = format!("{:4.0} s", self.start.elapsed().as_secs_f64());
        for placement in Placement::ALL {
            let arrived: Vec<_> = lanes
                .iter()
                .filter(|lane| lane.contest.placement == placement)
                .map(|lane| lane.arrived())
                .collect();
            if !arrived.is_empty() {
                let share = arrived.iter().sum::<u64>() as f64 / (arrived.len() as u64 * bytes) as f64;
                line += &format!("   {} {:3.0} %", placement.name(), share * 100.0);
            }
        }
        if self.is_terminal {
            print!("{CLEAR_LINE}{line}");
            // A terminal that is gone shows no progress, and that is all.
            let _ = stdout().flush();
        } else {
            println!("{line}");
        }
    }

    pub fn finished(&self, contest: &Contest, outcome: &Outcome) {
        self.clear();
        println!("{:4.0} s   {contest} finished", outcome.elapsed.as_secs_f64());
    }

    pub fn clear(&self) {
        if self.is_terminal {
            print!("{CLEAR_LINE}");
        }
    }
}
