//! Work that may be ended before its time.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use pepsal_tests::Cancel;

use super::observation::{SAMPLE_INTERVAL, State};

/// What may end a job before its time.
pub struct Limits<'a> {
    /// For each transfer.
    pub timeout: Duration,
    /// Set when everything is to end.
    pub stop: &'a AtomicBool,
}

/// How an attended transfer ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    Well(Duration),
    Damaged,
    TimedOut,
    Failed(String),
}

impl Ended {
    /// Its value and state as a sample.
    pub fn sample(self, timeout: Duration) -> (Option<f64>, State) {
        match self {
            Self::Well(elapsed) => (Some(elapsed.as_secs_f64()), State::Done),
            Self::Damaged => (None, State::Damaged),
            Self::TimedOut => (Some(timeout.as_secs_f64()), State::TimedOut),
            Self::Failed(reason) => (None, State::Failed(reason)),
        }
    }
}

impl Limits<'_> {
    /// Runs a transfer on another thread, calls `tick` at the end of each interval, and cancels it when its time is over.
    pub fn attend(
        &self,
        cancel: &Cancel,
        work: impl FnOnce() -> Result<(Duration, bool)> + Send,
        tick: impl FnMut(),
    ) -> Ended {
        match self.attend_value(cancel, work, tick) {
            Some(Ok((elapsed, true))) => Ended::Well(elapsed),
            Some(Ok((_, false))) => Ended::Damaged,
            Some(Err(error)) => Ended::Failed(format!("{error:#}")),
            None => Ended::TimedOut,
        }
    }

    /// The same for any work; nothing when it was cancelled.
    pub fn attend_value<T: Send>(
        &self,
        cancel: &Cancel,
        work: impl FnOnce() -> Result<T> + Send,
        mut tick: impl FnMut(),
    ) -> Option<Result<T>> {
        let start = Instant::now();
        let mut next = start + SAMPLE_INTERVAL;
        let (sender, ended) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                // Received below, whatever happens.
                let _ = sender.send(work());
            });
            loop {
                match ended.recv_timeout(next.saturating_duration_since(Instant::now())) {
                    Ok(result) => {
                        tick();
                        return (result.is_ok() || !cancel.is_cancelled()).then_some(result);
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    // It has panicked, which the scope passes on.
                    Err(RecvTimeoutError::Disconnected) => return None,
                }
                tick();
                next += SAMPLE_INTERVAL;
                if start.elapsed() > self.timeout || self.is_stopped() {
                    cancel.cancel();
                }
            }
        })
    }

    /// Whether everything is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits; says whether it was to the end.
    pub fn sleep(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while Instant::now() < end {
            if self.is_stopped() {
                return false;
            }
            thread::sleep(SAMPLE_INTERVAL.min(end.saturating_duration_since(Instant::now())));
        }
        true
    }
}
