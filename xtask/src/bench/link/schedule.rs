//! Jobs at once, as many as the machine can emulate.

use std::{
    collections::VecDeque,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::Result;

use super::{job::Job, lane::Equipment, limits::Limits, observation::Observations};
use crate::{progress::Progress, signals::Signals};

/// How often progress is shown.
const TICK: Duration = Duration::from_millis(200);

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
    /// When a lane cannot be made.
    pub fn run(&self, jobs: Vec<Job>) -> Result<Option<Observations>> {
        let (stop, count) = (AtomicBool::new(false), jobs.len());
        let (sender, ended) = mpsc::channel();
        let mut waiting = VecDeque::from(jobs);
        let mut running: Vec<Job> = Vec::new();
        let mut found = Observations::default();
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

    /// The first waiting job that there is room for.
    fn take(&self, waiting: &mut VecDeque<Job>, running: &[Job]) -> Option<Job> {
        let load: u64 = running.iter().map(Job::load_bps).sum();
        let fits = |job: &Job| running.is_empty() || load + job.load_bps() <= self.capacity_bps;
        let position = waiting.iter().position(fits)?;
        waiting.remove(position)
    }
}

fn describe(count: usize, waiting: usize, running: &[Job]) -> String {
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
