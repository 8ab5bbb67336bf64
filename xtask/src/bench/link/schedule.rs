//! Jobs at once, as many as the machine can emulate.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::Result;

use super::{limits::Limits, site::Equipment};
use crate::{progress::Progress, signals::Signals};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(200);

/// Something to be measured on a site of its own.
pub trait Task: Clone + PartialEq + fmt::Display + Send {
    /// What is found.
    type Found: Findings + Send;

    /// What it takes of the machine, as the rate that has to be emulated.
    fn load_bps(&self) -> u64;

    /// Measures.
    ///
    /// # Errors
    /// When the site cannot be made. Transfers that fail are samples, not errors.
    fn run(&self, equipment: &Equipment, limits: &Limits<'_>) -> Result<Self::Found>;
}

/// What several tasks have found.
pub trait Findings: Default {
    /// Adds what another has found.
    fn extend(&mut self, more: Self);
}

/// What runs the jobs.
pub struct Schedule<'a> {
    pub equipment: &'a Equipment,
    /// The sum of the rates that are emulated at once, unless a single one is more.
    pub capacity_bps: u64,
    /// For each transfer.
    pub timeout: Duration,
    pub signals: &'a Signals,
}

impl Schedule<'_> {
    /// Runs all jobs, each as soon as there is room for it; returns nothing when a signal came first.
    ///
    /// # Errors
    /// When a site cannot be made.
    fn run<T: Task>(&self, jobs: Vec<T>) -> Result<Option<T::Found>> {
        let (stop, count) = (AtomicBool::new(false), jobs.len());
        let (sender, ended) = mpsc::channel();
        let mut waiting = VecDeque::from(jobs);
        let mut running: Vec<T> = Vec::new();
        let mut found = T::Found::default();
        let mut failure = None;
        let mut is_signalled = false;
        let mut progress = Progress::new();
        thread::scope(|scope| -> Result<()> {
            while !running.is_empty() || !(waiting.is_empty() || stop.load(Ordering::Relaxed)) {
                while !stop.load(Ordering::Relaxed)
                    && let Some(job) = self.take(&mut waiting, &running)
                {
                    running.push(job.clone());
                    let (sender, stop) = (sender.clone(), &stop);
                    scope.spawn(move || {
                        let limits = Limits {
                            timeout: self.timeout,
                            stop,
                        };
                        let result = job.run(self.equipment, &limits);
                        // Received below, before the scope ends.
                        let _ = sender.send((job, result));
                    });
                }
                if !is_signalled && self.signals.come_within(TICK)? {
                    is_signalled = true;
                    stop.store(true, Ordering::Relaxed);
                } else if is_signalled {
                    thread::sleep(TICK);
                }
                for (job, result) in ended.try_iter() {
                    if let Some(position) = running.iter().position(|other| *other == job) {
                        running.remove(position);
                    }
                    match result {
                        Ok(more) => found.extend(more),
                        Err(error) => {
                            stop.store(true, Ordering::Relaxed);
                            failure.get_or_insert(error.context(job.to_string()));
                        }
                    }
                }
                progress.show(|| describe(count, waiting.len(), &running));
            }
            Ok(())
        })?;
        progress.clear();
        match failure {
            _ if is_signalled => Ok(None),
            Some(error) => Err(error),
            None => Ok(Some(found)),
        }
    }

    /// The same; nothing either where a job failed because the signal reached it, too.
    ///
    /// # Errors
    /// When a site cannot be made.
    pub fn all<T: Task>(&self, jobs: Vec<T>) -> Result<Option<T::Found>> {
        match self.run(jobs) {
            Err(_) if self.signals.is_pending() => Ok(None),
            ended => ended,
        }
    }

    /// The first waiting job that there is room for.
    fn take<T: Task>(&self, waiting: &mut VecDeque<T>, running: &[T]) -> Option<T> {
        let load: u64 = running.iter().map(T::load_bps).sum();
        let fits = |job: &T| running.is_empty() || load + job.load_bps() <= self.capacity_bps;
        let position = waiting.iter().position(fits)?;
        waiting.remove(position)
    }
}

fn describe(count: usize, waiting: usize, running: &[impl Task]) -> String {
    let done = count - waiting - running.len();
    let mut text = format!("{done} of {count} done");
    if let Some(first) = running.first() {
        text += &format!("   running: {first}");
    }
    if running.len() > 1 {
        text += &format!(", and {} more", running.len() - 1);
    }
    text
}
