//! One site, and what is measured on it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use pepsal_tests::{Cancel, Direction, LinkDelays, Session, Transfer};

use super::{
    bulk::Bulk,
    floor::{Connection, PAYLOAD_SHARE},
    limits::{Ended, Limits},
    observation::{Cell, Metric, Observation, Observations, REQUEST_BYTES, Series, State, Way},
    path::{Loss, Path},
    place::Place,
    plan,
    schedule::Task,
    site::{Equipment, Ground, Site},
};
use crate::bench::statistic;

/// A site to be made and measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    pub path: Path,
    pub loss: Loss,
    pub place: Place,
    pub round: u32,
    pub seed: u64,
    pub work: Work,
}

/// What is measured on a site, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Each of these, so many times. Of a direction, the small ones come first: what is larger than one that took too
    /// long is not tried.
    Transfers(Vec<(Way, u64)>, u32),
    /// So many small requests over fresh connections, and over one that is kept.
    Requests(u32),
    /// The same for a time while a bulk flow fills the link, and what waits in its queue.
    Loaded {
        /// The bulk flow runs alone for this time first.
        lead: Duration,
        /// Then it is measured for this time.
        window: Duration,
    },
    /// Eight bulk flows at once.
    Flows {
        /// They run for this time first.
        lead: Duration,
        /// Then they are measured for this time.
        window: Duration,
    },
}

const FLOWS: usize = 8;

impl Task for Job {
    type Found = Observations;

    fn load_bps(&self) -> u64 {
        plan::load_bps(self)
    }

    fn run(&self, equipment: &Equipment, limits: &Limits<'_>) -> Result<Observations> {
        let site = Site::new(
            &Ground::of(self.path, self.loss, self.seed),
            self.place,
            equipment,
        )?;
        let mut run = Run {
            job: self,
            site: &site,
            limits,
            before: site.delays(),
            found: Observations::default(),
        };
        match &self.work {
            Work::Transfers(transfers, times) => {
                (0..*times).for_each(|repetition| run.transfers(transfers, repetition))
            }
            Work::Requests(times) => run.requests(*times),
            Work::Loaded { lead, window } => run.loaded(*lead, *window),
            Work::Flows { lead, window } => run.flows(*lead, *window),
        }
        Ok(run.found)
    }
}

impl Job {
    fn cell(&self, metric: Metric) -> Cell {
        Cell {
            path: self.path,
            loss: self.loss,
            metric,
            place: self.place,
        }
    }
}

impl fmt::Display for Job {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let work = match self.work {
            Work::Transfers(..) => "transfers",
            Work::Requests(_) => "requests",
            Work::Loaded { .. } => "requests beside bulk",
            Work::Flows { .. } => "eight flows",
        };
        let Self {
            path,
            loss,
            place,
            round,
            ..
        } = self;
        write!(formatter, "{work}, {path}, {loss} loss, {place}, round {round}")
    }
}

/// A job that runs.
struct Run<'a> {
    job: &'a Job,
    site: &'a Site,
    limits: &'a Limits<'a>,
    /// What the link had seen when the site was ready.
    before: LinkDelays,
    found: Observations,
}

impl Run<'_> {
    fn add(&mut self, metric: Metric, value: Option<f64>, state: State) {
        if self.limits.is_stopped() {
            return;
        }
        self.found.samples.push(Observation {
            cell: self.job.cell(metric),
            round: self.job.round,
            seed: self.job.seed,
            value,
            state,
            emulator_late_ms: self.site.late_ms(&self.before),
        });
    }

    fn transfers(&mut self, transfers: &[(Way, u64)], repetition: u32) {
        let mut too_slow = None;
        for (number, (way, bytes)) in transfers.iter().copied().enumerate() {
            if self.limits.is_stopped() {
                return;
            }
            let metric = Metric::Transfer(way, bytes);
            if too_slow.is_some_and(|(slow_way, slow_bytes)| slow_way == way && slow_bytes < bytes) {
                self.add(metric, Some(self.limits.timeout.as_secs_f64()), State::TimedOut);
                continue;
            }
            let seed = self.job.seed + number as u64;
            let (ended, arrived) = self.transfer(way.into(), bytes, seed);
            if repetition == 0 {
                self.found.series.push(Series {
                    cell: self.job.cell(metric),
                    round: self.job.round,
                    arrived,
                });
            }
            if ended == Ended::TimedOut {
                too_slow = Some((way, bytes));
            }
            let (value, state) = ended.sample(self.limits.timeout);
            self.add(metric, value, state);
        }
    }

    /// One transfer, and how much had arrived at the end of each interval.
    fn transfer(&self, direction: Direction, bytes: u64, seed: u64) -> (Ended, Vec<u64>) {
        let cancel = Cancel::default();
        let downloaded = Arc::<AtomicU64>::default();
        let transfer = Transfer::new(direction, bytes)
            .seed(seed)
            .connector(self.site.connector(self.limits.timeout))
            .progress(Arc::clone(&downloaded))
            .cancelled_by(cancel.clone());
        let received_before = self.site.received();
        let mut arrived = Vec::new();
        let sample = || {
            arrived.push(match direction {
                Direction::Upload => self.site.received() - received_before,
                Direction::Download => downloaded.load(Ordering::Relaxed),
            });
        };
        let work = || {
            let outcome = transfer.run(self.site.client(), self.site.server())?;
            Ok((outcome.elapsed, outcome.intact))
        };
        (self.limits.attend(&cancel, work, sample), arrived)
    }

    fn requests(&mut self, times: u32) {
        let deadline = Instant::now() + self.limits.timeout;
        self.ask_while(
            |asked| asked < times && Instant::now() < deadline,
            Metric::Request,
        );
    }

    /// Small requests over fresh connections and over a kept one by turns, while `goes_on` says so.
    fn ask_while(&mut self, goes_on: impl Fn(u32) -> bool, metric: fn(Connection) -> Metric) {
        let cancel = Cancel::default();
        let connector = self.site.connector(self.limits.timeout);
        let session = self.limits.attend_value(
            &cancel,
            || Session::open(&connector, self.site.client(), self.site.server(), &cancel),
            || {},
        );
        let session = match session {
            Some(Ok(session)) => session,
            Some(Err(error)) => return self.add(metric(Connection::Kept), None, failed(&error)),
            None => return,
        };
        for asked in (0..).take_while(|asked| goes_on(*asked)) {
            if self.limits.is_stopped() {
                return;
            }
            let seed = self.job.seed + u64::from(asked);
            let kept = self
                .limits
                .attend(&cancel, || session.download(REQUEST_BYTES, seed), || {});
            let (value, state) = kept.sample(self.limits.timeout);
            self.add(metric(Connection::Kept), value, state);
            let (fresh, _) = self.transfer(Direction::Download, REQUEST_BYTES, seed);
            let (value, state) = fresh.sample(self.limits.timeout);
            self.add(metric(Connection::Fresh), value, state);
        }
    }

    fn loaded(&mut self, lead: Duration, window: Duration) {
        let bulk = Bulk::start(self.site, 1, self.limits.timeout);
        if !self.limits.sleep(lead) {
            return;
        }
        let before = self.site.delays();
        let end = Instant::now() + window;
        self.ask_while(|_| Instant::now() < end, Metric::LoadedRequest);
        let waited = self.site.delays().since(&before).down.queue;
        for percentile in [50, 95, 99] {
            let wait = waited.quantile(f64::from(percentile) / 100.0);
            self.add(
                Metric::Queue(percentile),
                wait.map(statistic::milliseconds),
                bulk.state(),
            );
        }
    }

    fn flows(&mut self, lead: Duration, window: Duration) {
        let bulk = Bulk::start(self.site, FLOWS, self.limits.timeout);
        if !self.limits.sleep(lead) {
            return;
        }
        let (before, start) = (bulk.received(), Instant::now());
        if !self.limits.sleep(window) {
            return;
        }
        let (after, took) = (bulk.received(), start.elapsed());
        let shares: Vec<_> = after
            .iter()
            .zip(before)
            .map(|(after, before)| (after - before) as f64)
            .collect();
        let capacity = self.job.path.rate_bps(Direction::Download) as f64 * took.as_secs_f64() / 8.0;
        let state = bulk.state();
        self.add(Metric::Jain, statistic::jain(&shares), state.clone());
        let payload = shares.iter().sum::<f64>() / capacity;
        self.add(Metric::LinkUse, Some(payload / PAYLOAD_SHARE), state);
    }
}

fn failed(error: &anyhow::Error) -> State {
    State::Failed(format!("{error:#}"))
}
