//! Shows the progress of a long command: one changing line on a terminal, else a line now and then.

use std::{
    io::{IsTerminal as _, Write as _, stdout},
    time::{Duration, Instant},
};

/// Interval of lines without a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
const CLEAR_LINE: &str = "\r\x1b[K";

pub struct Progress {
    start: Instant,
    shown: Instant,
    is_terminal: bool,
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            shown: now,
            is_terminal: stdout().is_terminal(),
        }
    }

    /// Shows the elapsed time and the progress, if the interval has passed.
    pub fn show(&mut self, how_far: impl FnOnce() -> String) {
        if !self.is_terminal && self.shown.elapsed() < LINE_INTERVAL {
            return;
        }
        self.shown = Instant::now();
        let line = format!("{:4.0} s   {}", self.start.elapsed().as_secs_f64(), how_far());
        if self.is_terminal {
            print!("{CLEAR_LINE}{line}");
            // An error of the terminal is no error of the command.
            let _ = stdout().flush();
        } else {
            println!("{line}");
        }
    }

    /// Prints a line that stays.
    pub fn report(&self, line: &str) {
        self.clear();
        println!("{line}");
    }

    /// Removes the changing line.
    pub fn clear(&self) {
        if self.is_terminal {
            print!("{CLEAR_LINE}");
        }
    }
}
