//! One lane with one contender.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::ValueEnum as _;
use pepsal_tests::{
    Cancel, Course, Datagram, Datagrams, Delays, Direction, Family, LinkCounters, Passage, Step, Transfer,
};

use super::{
    Extent, Lane,
    estimate::{Estimate, Watch},
    finding::{Figures, Found, Moment, Row, Timeline},
    scenario::{LOW_ORBIT_BPS, OUTAGE_END, RATE_BPS, Window, Work},
};
use crate::bench::{
    link::{
        bulk::Bulk,
        limits::Limits,
        observation::State,
        place::Place,
        plan::{BULK_BYTES, CUBIC},
        schedule::Task,
        site::{Equipment, Site},
    },
    statistic,
};

/// IP headers included.
const STREAM_PACKET_BYTES: usize = 1400;
const PROBE_PACKET_BYTES: usize = 100;
const PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// How often figures are taken.
const TICK: Duration = Duration::from_millis(100);
/// Ticks of an interval of a timeline.
const TICKS_SHOWN: usize = 5;
/// What was sent last arrives within this time.
const TAIL: Duration = Duration::from_secs(2);

/// A lane to be measured with a contender.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneJob {
    pub lane: Lane,
    pub place: Place,
    pub work: Work,
    pub extent: Extent,
    pub round: u32,
    pub seed: u64,
}

impl fmt::Display for LaneJob {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, round, .. } = self;
        let lane = self.lane.to_possible_value().expect("no lane is hidden");
        write!(formatter, "{}, {place}, round {round}", lane.get_name())
    }
}

impl Task for LaneJob {
    type Found = Found;

    fn load_bps(&self) -> u64 {
        match (self.lane, self.work) {
            // CUBIC with losses gets next to nothing over such a round trip.
            (Lane::Up, _) if self.place == CUBIC => RATE_BPS / 10,
            (_, Work::Transfers) => RATE_BPS,
            // Its rate is seldom the highest.
            (Lane::Leo, Work::Flows) => LOW_ORBIT_BPS * 3 / 4,
            // The probe and its neighbours are not to wait for a processor.
            (_, Work::Flows) => RATE_BPS + RATE_BPS / 2,
        }
    }

    fn run(&self, equipment: &Equipment, limits: &Limits<'_>) -> Result<Found> {
        let site = Site::new(&self.lane.ground(self.seed), self.place, equipment)?;
        match self.work {
            Work::Flows => self.flows(&site, limits),
            Work::Transfers => Ok(self.transfers(&site, limits)),
        }
    }
}

impl LaneJob {
    fn row(&self, what: &'static str, state: State, figures: Figures, emulator_late_ms: f64) -> Row {
        Row {
            lane: self.lane,
            what,
            place: self.place,
            round: self.round,
            seed: self.seed,
            state,
            figures,
            emulator_late_ms,
        }
    }

    /// One transfer after the other, a row for each; none when everything is to end.
    fn transfers(&self, site: &Site, limits: &Limits<'_>) -> Found {
        let delays = site.delays();
        let mut found = Found::default();
        for (what, number) in self.lane.transfers().iter().copied().zip(0..) {
            let cancel = Cancel::default();
            let transfer = Transfer::new(self.lane.direction(), BULK_BYTES)
                .seed(self.seed + number)
                .connector(site.connector(limits.timeout))
                .cancelled_by(cancel.clone());
            let work = || {
                let outcome = transfer.run(site.client(), site.server())?;
                Ok((outcome.elapsed, outcome.intact))
            };
            let (seconds, state) = limits.attend(&cancel, work, || {}).sample(limits.timeout);
            if limits.is_stopped() {
                return Found::default();
            }
            let figures = Figures {
                seconds,
                ..Figures::default()
            };
            found
                .rows
                .push(self.row(what, state, figures, site.late_ms(&delays)));
        }
        found
    }

    fn flows(&self, site: &Site, limits: &Limits<'_>) -> Result<Found> {
        let windows = self.lane.windows(self.extent);
        let end = windows.iter().map(|window| window.to).max().unwrap_or_default();
        let delays = site.delays();
        let course = self.lane.course(self.seed, self.extent);
        let mut watch = site.admin_socket().and_then(Watch::open);
        let bulk = Bulk::of(site, self.lane.ends(site, limits.timeout));
        let start = site.begin(course.clone());
        let probe = datagrams(site, PROBE_INTERVAL, PROBE_PACKET_BYTES)?;
        let stream = self.lane.stream_bps().map(|bps| {
            let interval = Duration::from_secs_f64(STREAM_PACKET_BYTES as f64 * 8.0 / bps);
            datagrams(site, interval, STREAM_PACKET_BYTES)
        });
        let stream = stream.transpose()?;

        let mut marks = vec![Mark::take(site, &bulk, start)];
        while start.elapsed() < end {
            let next = start + TICK * u32::try_from(marks.len()).expect("a lane takes minutes");
            if !limits.sleep(next.saturating_duration_since(Instant::now())) {
                return Ok(Found::default());
            }
            let mut mark = Mark::take(site, &bulk, start);
            if marks.len().is_multiple_of(TICKS_SHOWN) {
                mark.estimate = watch.as_mut().and_then(Watch::estimate);
            }
            marks.push(mark);
        }
        if !limits.sleep(TAIL) {
            return Ok(Found::default());
        }

        let state = bulk.state();
        let late_ms = site.late_ms(&delays);
        let record = Record {
            lane: self.lane,
            start,
            course,
            marks,
            probe,
            stream,
        };
        let row = |window: &Window| {
            let figures = record.figures(window);
            self.row(window.name, state.clone(), figures, late_ms)
        };
        Ok(Found {
            rows: windows.iter().map(row).collect(),
            timelines: vec![Timeline {
                lane: self.lane,
                place: self.place,
                round: self.round,
                seed: self.seed,
                moments: record.moments(),
            }],
        })
    }
}

/// A stream of packets from the server to the client.
fn datagrams(site: &Site, interval: Duration, bytes: usize) -> Result<Datagrams> {
    let topology = site.topology();
    Datagrams::start(
        &topology.server,
        &topology.client,
        Family::V4.client(),
        interval,
        bytes,
    )
}

/// The state of a run at a time.
struct Mark {
    at: Duration,
    /// Payload bytes of each flow.
    received: Vec<u64>,
    counters: LinkCounters,
    queue: Delays,
    estimate: Option<Estimate>,
}

impl Mark {
    fn take(site: &Site, bulk: &Bulk, start: Instant) -> Self {
        Self {
            at: start.elapsed(),
            received: bulk.received(),
            counters: site.counters(),
            queue: site.delays().down.queue,
            estimate: None,
        }
    }
}

/// A run that has ended.
struct Record {
    lane: Lane,
    start: Instant,
    course: Course,
    marks: Vec<Mark>,
    probe: Datagrams,
    stream: Option<Datagrams>,
}

impl Record {
    fn figures(&self, window: &Window) -> Figures {
        let (from, to) = (self.mark(window.from), self.mark(window.to));
        let sent = |stream: &Datagrams| stream.sent_within(self.start + from.at, self.start + to.at);
        let probe = sent(&self.probe);
        let queueing = self.queueing_ms(&probe);
        let waited = to.queue.since(&from.queue).quantile(0.95);

        let capacity = self.course.capacity_bytes(Direction::Download, from.at, to.at);
        let gained: Vec<_> = from
            .received
            .iter()
            .zip(&to.received)
            .map(|(before, after)| (after - before) as f64)
            .collect();
        let (last, others) = gained.split_last().expect("every lane has flows");
        let (others, mut all) = (others.iter().sum::<f64>(), gained.iter().sum::<f64>());
        let mut other = None;
        if self.lane.has_other() {
            other = Some(last / others.max(1.0));
        }
        if self.lane == Lane::Cubic {
            // It is none of pepsal's.
            (all, other) = (others, Some(last / capacity));
        }
        let link = to.counters.since(&from.counters).down;
        Figures {
            used: Some(all / (capacity * self.lane.flows_share())),
            probe_p50_ms: statistic::median(&queueing),
            probe_p95_ms: statistic::quantile(&queueing, 0.95),
            probe_lost: lost(&probe),
            queue_p95_ms: waited.map(statistic::milliseconds),
            dropped: (link.packets > 0).then(|| link.dropped as f64 / link.packets as f64),
            stream_lost: self.stream.as_ref().and_then(|stream| lost(&sent(stream))),
            other,
            seconds: (self.lane == Lane::Outage).then(|| self.resumed_after(OUTAGE_END)),
        }
    }

    fn mark(&self, time: Duration) -> &Mark {
        let after = self.marks.partition_point(|mark| mark.at < time);
        &self.marks[after.min(self.marks.len() - 1)]
    }

    /// What packets took beyond the link's own delay, in milliseconds.
    fn queueing_ms(&self, packets: &[Datagram]) -> Vec<f64> {
        let queueing = |packet: &Datagram| {
            let sent = packet.sent.saturating_duration_since(self.start);
            let own = self.course.at(sent).rtt / 2;
            Some(statistic::milliseconds(packet.delay()?.saturating_sub(own)))
        };
        packets.iter().filter_map(queueing).collect()
    }

    /// Seconds from a time until every flow has received more; of one that never does, until the end of the run.
    fn resumed_after(&self, time: Duration) -> f64 {
        let before = self.mark(time);
        let has_resumed = |mark: &&Mark| {
            let mut flows = mark.received.iter().zip(&before.received);
            flows.all(|(after, before)| after > before)
        };
        let last = self.marks.last().expect("a run has a first mark");
        let resumed = self.marks.iter().find(has_resumed).unwrap_or(last);
        (resumed.at.saturating_sub(time)).as_secs_f64()
    }

    fn moments(&self) -> Vec<Moment> {
        let shown: Vec<_> = self.marks.iter().step_by(TICKS_SHOWN).collect();
        let moment = |pair: &[&Mark]| {
            let [before, after] = pair else {
                unreachable!("windows of two")
            };
            let sum = |mark: &Mark| mark.received.iter().sum::<u64>();
            let waited = after.queue.since(&before.queue).quantile(0.5);
            Moment {
                seconds: after.at.as_secs_f64(),
                link_mbit: carried_mbit(self.course.at(after.at)),
                goodput_mbit: (sum(after) - sum(before)) as f64 * 8e-6 / (after.at - before.at).as_secs_f64(),
                queue_ms: waited.map(statistic::milliseconds),
                dropped: after.counters.since(&before.counters).down.dropped,
                estimate: after.estimate.clone(),
            }
        };
        shown.windows(2).map(moment).collect()
    }
}

fn carried_mbit(step: &Step) -> f64 {
    match step.passage {
        Passage::Open => step.down_bps as f64 / 1e6,
        Passage::Held | Passage::Lost => 0.0,
    }
}

fn lost(packets: &[Datagram]) -> Option<f64> {
    let lost = packets.iter().filter(|packet| packet.arrived.is_none());
    (!packets.is_empty()).then(|| lost.count() as f64 / packets.len() as f64)
}
