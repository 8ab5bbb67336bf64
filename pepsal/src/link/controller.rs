//! What a link carries at present, found and followed from what its legs see of it.
//!
//! What the operator says of a link's rate is a ceiling. Below it, capacity changes: rain makes a satellite's modem code
//! more robustly, a spot beam is handed over, others send as well. The legs of a link together see it: as long as it
//! carries what they send, their round trips stay at their least and as much arrives as was sent. When it carries less, a
//! queue stands in front of it, and what arrives is what it carries.
//!
//! So the [`Controller`] sends at what arrived, and below that until the queue is gone; then it tries for more, in steps
//! that grow for as long as no queue does. A round trip that stays long whatever is sent is a longer path, or a queue
//! that somebody else keeps full: it is taken for the least one then. Losses say little, since links lose packets by
//! themselves; only where a fifth is lost there is a queue too short to be seen.
//!
//! It is a function of what it has observed: it reads no clock and no socket.

use std::{collections::VecDeque, ops::RangeInclusive, time::Duration};

/// What the legs of a link have seen in one tick.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observation {
    /// Length of the tick.
    pub elapsed: Duration,
    /// Bytes of payload that have reached the peers.
    pub delivered: u64,
    /// Bytes of payload that had to be sent again.
    pub lost: u64,
    /// Whether bytes are in flight.
    pub in_flight: bool,
    /// Whether a leg has more to send than its share lets out.
    pub is_backlogged: bool,
    /// The least round trip.
    pub rtt: Duration,
    /// How much longer round trips are than the least one of each leg; none when none was measured.
    pub queueing: Option<Duration>,
}

/// What a controller does, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The link carries the ceiling, as far as anybody has tried.
    AtCeiling,
    /// It carries less: this much was found, and will be exceeded when the time has come.
    Holding,
    /// More was sent than before, and nothing speaks against it.
    Growing,
    /// A queue stood in front of the link, and less is sent until it is gone.
    Draining,
    /// Somebody else fills the queue, whatever is sent here: it keeps its part, and says little of the link.
    Competing,
    /// Nothing arrives.
    Outage,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 6] = [
        Self::AtCeiling,
        Self::Holding,
        Self::Growing,
        Self::Draining,
        Self::Competing,
        Self::Outage,
    ];

    /// Its name in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::AtCeiling => "at_ceiling",
            Self::Holding => "holding",
            Self::Growing => "growing",
            Self::Draining => "draining",
            Self::Competing => "competing",
            Self::Outage => "outage",
        }
    }
}

/// Finds what a link carries. All rates are bytes of payload per second.
#[derive(Debug)]
pub struct Controller {
    /// What the operator says: the link never gets less than the one and more than the other.
    range: RangeInclusive<u64>,
    rate: u64,
    state: State,
    /// Time since the start.
    now: Duration,
    /// When the effect of the last change can be seen.
    until: Duration,
    /// Consecutive steps up.
    steps: usize,
    /// Consecutive attempts to drain that have changed nothing.
    vain: u32,
    /// When the last attempt to drain began.
    drained_from: Duration,
    /// When something of it could be seen first, and the queueing at that time.
    drained_seen: Option<(Duration, Duration)>,
    /// Rate and queueing before the first attempt of those in vain.
    rate_at_first: u64,
    queueing_at_first: Duration,
    /// What has arrived while the queue stood.
    carried: u64,
    /// When something was last known that makes all legs lose.
    trouble: Option<Duration>,
    /// What happened in about the last round trip.
    recent: VecDeque<Observation>,
    /// Time in which queueing was seen: an outage is none.
    watched: Duration,
    /// That time and queueing, no older than [`MEMORY`].
    queueings: VecDeque<(Duration, Duration)>,
    queueing: Duration,
    conceded: Option<Concession>,
    /// Rates while it competes.
    trial: Option<Trial>,
    /// When it last changed the rate while it competes.
    changed: Duration,
    /// When legs last used the rate.
    used_at: Option<Duration>,
    /// Since when there is more queueing than the least.
    queued_since: Option<Duration>,
    /// Since when too much is lost.
    lossy_since: Option<Duration>,
    /// The lost part of what was sent, averaged over about [`MEMORY`].
    loss: f64,
}

/// Queues in succession, in each of which less arrived than in the one before: the link carries less, or another sender has
/// taken the rate that was left to it.
#[derive(Debug, Clone, Copy)]
struct Concession {
    at: Duration,
    /// Bytes per second that arrived in the last one.
    carried: u64,
    times: u32,
    /// Bytes per second that were sent before the first one.
    before: u64,
}

/// Rates sent and rates that arrived, in bytes per second, by which another sender is told from a slower link.
#[derive(Debug, Clone, Copy)]
struct Trial {
    /// The time from which what arrives was sent in it.
    from: Duration,
    sent: Span,
    arrived: Span,
}

/// The least and the most of a value.
#[derive(Debug, Clone, Copy)]
struct Span(u64, u64);

impl Span {
    fn of(value: u64) -> Self {
        Self(value, value)
    }

    fn with(self, value: u64) -> Self {
        Self(self.0.min(value), self.1.max(value))
    }

    fn ratio(self) -> f64 {
        self.1 as f64 / self.0.max(1) as f64
    }
}

/// How long the least queueing delay counts.
const MEMORY: Duration = Duration::from_secs(10);

/// Factors by which the rate grows in consecutive steps.
const STEPS: [f64; 6] = [1.05, 1.1, 1.2, 1.4, 1.5, 1.6];

/// The part of what arrives that is sent while a queue drains. The window of a leg is a quarter more than it sends in a
/// round trip, so that this makes the window what the link holds without a queue.
const DRAIN: f64 = 0.8;

/// The part of what was found to be carried that is sent then.
const SETTLE: f64 = 0.97;

/// The part that is left when it gives way to others.
const YIELD: f64 = 0.85;
/// The factor by which it grows otherwise, in a round trip.
const INSIST: f64 = 1.02;

/// How long a queue stands that cannot be that of bursts.
const STANDING: Duration = Duration::from_secs(2);

/// How long a queue stands that a burst makes.
const BURST: Duration = Duration::from_millis(300);

/// The part of the rate that arrives where legs use it, losses aside.
const USED: f64 = 0.7;
/// The part of the rate that arrives where the link carries all of it.
const ARRIVES: f64 = 0.95;

/// Attempts to drain after which the queue is not ours.
const VAIN: u32 = 3;

/// Concessions in succession before more is sent instead of less.
const CONCESSIONS: u32 = 2;
/// The most that is sent then, as a factor of the rate that arrives.
const PUSH: f64 = 1.5;
/// The ratio of rates sent after which the rates that arrived are compared.
const VARIED: f64 = 1.15;
/// The ratio of rates that arrived from which on another sender shares the queue.
const MORE: f64 = 1.04;

/// Lost part of what was sent above which there is a queue, though nothing is seen of it.
const EXCESS_LOSS: f64 = 0.2;
/// Loss beyond the usual with which a link does not grow.
const MORE_LOSS: f64 = 0.02;
/// Bytes in the smallest sample of loss: a hundred segments.
const SAMPLE: u64 = 144_800;

/// Time, and round trips, after which more is tried again.
const PAUSE: Duration = Duration::from_millis(300);
const PATIENCE: u32 = 3;

impl Controller {
    /// Returns a controller of a link that carries a rate within `range`, and takes `rate` for the first guess.
    pub fn new(range: RangeInclusive<u64>, rate: u64) -> Self {
        let mut controller = Self {
            range,
            rate,
            state: State::AtCeiling,
            now: Duration::ZERO,
            until: Duration::ZERO,
            steps: 0,
            vain: 0,
            drained_from: Duration::ZERO,
            drained_seen: None,
            rate_at_first: 0,
            queueing_at_first: Duration::ZERO,
            carried: 0,
            trouble: None,
            recent: VecDeque::new(),
            watched: Duration::ZERO,
            queueings: VecDeque::new(),
            queueing: Duration::ZERO,
            conceded: None,
            trial: None,
            changed: Duration::ZERO,
            used_at: None,
            queued_since: None,
            lossy_since: None,
            loss: 0.0,
        };
        controller.set(rate as f64);
        controller
    }

    /// Changes what the operator says.
    pub fn set_range(&mut self, range: RangeInclusive<u64>) {
        let was_at_ceiling = self.rate == *self.range.end();
        self.range = range;
        match was_at_ceiling {
            true => self.set(*self.range.end() as f64),
            false => self.set(self.rate as f64),
        }
    }

    /// Returns the rate that is to be divided among the legs.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// Returns how long what is sent now waits before it is on the link.
    pub fn queueing(&self) -> Duration {
        self.queueing
    }

    /// Returns what it does at present.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether losses of late may be the link's, of which no leg is to draw conclusions.
    pub fn accounts_for_losses(&self) -> bool {
        self.trouble.is_some_and(|trouble| self.now - trouble < MEMORY)
    }

    /// Takes in what was observed in a tick, and decides anew.
    pub fn observe(&mut self, seen: Observation) {
        self.now += seen.elapsed;
        if matches!(self.state, State::Draining | State::Competing | State::Outage) {
            self.trouble = Some(self.now);
        }
        if seen.in_flight && seen.delivered == 0 {
            return self.silent(&seen);
        }
        if self.state == State::Outage {
            // What was lost in it says nothing.
            self.recent.clear();
            self.hold(seen.rtt);
        }
        self.remember(&seen);
        // Without a leg that shows it there is no queue to speak of.
        let queueing = seen.queueing.unwrap_or_default();
        let excess = match seen.queueing {
            Some(queueing) => self.excess(queueing, seen.elapsed),
            None => Duration::ZERO,
        };
        let (delivered, lost) = self.recently();
        let is_lossy = self.has_excess_loss(&seen, lost);
        let is_queued = self.has_queue(&seen, excess, delivered);
        let is_alone = self.state == State::Competing && self.is_alone(delivered);
        match self.state {
            State::Draining if excess <= tolerance(seen.rtt) => self.settle(&seen),
            State::Draining => self.go_on_draining(&seen, queueing, delivered),
            State::Competing if is_alone => self.drain(delivered),
            State::Competing if self.is_contested(&seen, queueing) => self.compete(&seen, lost),
            _ if is_queued || is_lossy => {
                (self.rate_at_first, self.queueing_at_first, self.vain) = (self.rate, queueing, 0);
                match self.concede(seen.rtt, delivered) {
                    Some(rate) => self.insist(seen.rtt, rate, delivered, queueing),
                    None => self.drain(delivered),
                }
            }
            _ if self.now >= self.until => self.grow(&seen, delivered, lost),
            _ => {}
        }
    }

    /// Nothing has arrived in a tick.
    fn silent(&mut self, seen: &Observation) {
        let silence: Duration = self
            .recent
            .iter()
            .rev()
            .take_while(|seen| seen.delivered == 0)
            .map(|seen| seen.elapsed)
            .sum();
        if silence > seen.rtt + self.queueing {
            self.state = State::Outage;
        }
        self.remember(seen);
    }

    fn remember(&mut self, seen: &Observation) {
        self.recent.push_back(*seen);
        let mut kept: Duration = self.recent.iter().map(|seen| seen.elapsed).sum();
        // A whole round trip: others send a window at a time, and what is sent here arrives between their bursts.
        let wanted = seen.rtt.max(Duration::from_millis(200));
        while let Some(oldest) = self
            .recent
            .front()
            .filter(|oldest| kept - oldest.elapsed >= wanted)
        {
            kept -= oldest.elapsed;
            self.recent.pop_front();
        }
        let sent = (seen.delivered + seen.lost) as f64;
        if sent > 0.0 {
            let weight = (seen.elapsed.as_secs_f64() / MEMORY.as_secs_f64()).min(1.0);
            self.loss += weight * (seen.lost as f64 / sent - self.loss);
        }
    }

    /// Bytes per second that arrived of late, and bytes that were lost meanwhile.
    fn recently(&self) -> (u64, f64) {
        let sum = |of: fn(&Observation) -> u64| self.recent.iter().map(of).sum::<u64>();
        let time: Duration = self.recent.iter().map(|seen| seen.elapsed).sum();
        let (delivered, lost) = (sum(|seen| seen.delivered), sum(|seen| seen.lost));
        let rate = delivered as f64 / time.as_secs_f64().max(0.001);
        let part = match delivered + lost >= SAMPLE {
            true => lost as f64 / (delivered + lost) as f64,
            false => 0.0,
        };
        (rate as u64, part)
    }

    /// Whether a fifth is lost for longer than one flight: one that was lost as a whole, in an outage or when an interface was
    /// down, is sent again within a round trip.
    fn has_excess_loss(&mut self, seen: &Observation, lost: f64) -> bool {
        let lasted = lasted(&mut self.lossy_since, self.now, lost > EXCESS_LOSS);
        lasted.is_some_and(|time| time > 2 * (seen.rtt + self.queueing))
    }

    /// What of a queueing delay is more than the least of late.
    fn excess(&mut self, queueing: Duration, elapsed: Duration) -> Duration {
        self.queueing = queueing;
        self.watched += elapsed;
        self.queueings.push_back((self.watched, queueing));
        while self
            .queueings
            .front()
            .is_some_and(|(at, _)| self.watched - *at > MEMORY)
        {
            self.queueings.pop_front();
        }
        let least = self.queueings.iter().map(|(_, queueing)| *queueing).min();
        queueing - least.unwrap_or(queueing)
    }

    /// Whether a queue stands for longer than a burst of one leg makes it, where legs use what the link is taken to carry: what
    /// they do not use says nothing of it.
    fn has_queue(&mut self, seen: &Observation, excess: Duration, delivered: u64) -> bool {
        if self.is_used(seen, delivered) {
            self.used_at = Some(self.now);
        }
        let is_longer = excess > tolerance(seen.rtt);
        let Some(lasted) = lasted(&mut self.queued_since, self.now, is_longer) else {
            return false;
        };
        // After a step up it need not last to be the link's.
        let lasts = self.state == State::Growing || lasted >= BURST;
        let was_used = self
            .used_at
            .is_some_and(|at| self.now - at <= (4 * (seen.rtt + self.queueing)).max(PAUSE * 5));
        // Where it is taken to carry far too much, legs never use all of that.
        let stands = seen.is_backlogged && lasted >= (4 * seen.rtt).max(STANDING);
        lasts && was_used || stands
    }

    fn is_used(&self, seen: &Observation, delivered: u64) -> bool {
        seen.is_backlogged && delivered as f64 >= USED * self.rate as f64 * (1.0 - self.loss)
    }

    /// Whether somebody still fills the queue: it comes and goes, and does not end.
    fn is_contested(&self, seen: &Observation, queueing: Duration) -> bool {
        let of_late = || self.queueings.iter().map(|(_, queueing)| *queueing);
        let (least, most) = (of_late().min(), of_late().max());
        let range = most.unwrap_or_default() - least.unwrap_or_default();
        let is_new = self.now < self.until;
        let is_old = self.now > self.until + 6 * MEMORY;
        queueing > tolerance(seen.rtt) && (is_new || range > rival(seen.rtt) && !is_old)
    }

    fn set(&mut self, rate: f64) {
        self.rate = (rate as u64).clamp(*self.range.start(), *self.range.end());
        if matches!(self.state, State::AtCeiling | State::Holding | State::Growing) {
            self.state = match self.rate == *self.range.end() {
                true => State::AtCeiling,
                false => State::Holding,
            };
        }
    }

    /// Shares a full queue: takes little more from time to time, and gives way for the losses that all have in it.
    fn compete(&mut self, seen: &Observation, lost: f64) {
        if self.now < self.changed + seen.rtt + self.queueing {
            return;
        }
        self.changed = self.now;
        let factor = match lost > self.loss + MORE_LOSS {
            true => YIELD,
            false => INSIST,
        };
        self.set(factor * self.rate as f64);
    }

    /// Counts a concession. Returns the rate before the first one when there are too many.
    fn concede(&mut self, rtt: Duration, delivered: u64) -> Option<u64> {
        let is_less = |conceded: &Concession| {
            self.now - conceded.at < (20 * rtt).max(MEMORY / 2)
                && (delivered as f64) < ARRIVES * conceded.carried as f64
        };
        let conceded = match self.conceded.filter(is_less) {
            // Within a round trip it is the same change of the link.
            Some(conceded) if self.now - conceded.at < rtt.max(BURST) => Concession {
                carried: delivered,
                ..conceded
            },
            Some(conceded) => Concession {
                at: self.now,
                carried: delivered,
                times: conceded.times + 1,
                ..conceded
            },
            None => Concession {
                at: self.now,
                carried: delivered,
                times: 0,
                before: self.rate,
            },
        };
        self.conceded = Some(conceded).filter(|conceded| conceded.times < CONCESSIONS);
        (conceded.times >= CONCESSIONS).then_some(conceded.before)
    }

    /// Sends more into a queue that another sender may have filled: where one has, more arrives.
    fn insist(&mut self, rtt: Duration, rate: u64, delivered: u64, queueing: Duration) {
        let more = (PUSH * delivered as f64).max(self.rate as f64);
        self.set(more.min(rate as f64));
        self.state = State::Competing;
        (self.until, self.changed) = (self.now + (8 * rtt).max(STANDING), self.now);
        self.trial = Some(Trial {
            from: self.now + queueing + 2 * rtt,
            sent: Span::of(delivered),
            arrived: Span::of(delivered),
        });
    }

    /// Returns whether there is no other sender: the same arrives, whatever is sent.
    fn is_alone(&mut self, delivered: u64) -> bool {
        let Some(mut trial) = self.trial.filter(|trial| self.now >= trial.from) else {
            return false;
        };
        trial.sent = trial.sent.with(self.rate);
        trial.arrived = trial.arrived.with(delivered);
        let has_varied = trial.sent.ratio() >= VARIED;
        let is_alone = has_varied && trial.arrived.ratio() < MORE;
        if has_varied {
            trial.sent = Span::of(self.rate);
            trial.arrived = Span::of(delivered);
        }
        self.trial = Some(trial).filter(|_| !is_alone);
        is_alone
    }

    fn drain(&mut self, delivered: u64) {
        self.state = State::Draining;
        self.steps = 0;
        (self.drained_from, self.drained_seen) = (self.now, None);
        self.send_less(delivered);
    }

    /// What arrives while a queue stands is what the link carries.
    fn send_less(&mut self, delivered: u64) {
        self.carried = delivered;
        self.set((DRAIN * delivered as f64).min(self.rate as f64));
    }

    /// Judges an attempt to drain after a round trip in which it can be seen. What is acknowledged now was sent a round trip
    /// and the queue ago.
    fn go_on_draining(&mut self, seen: &Observation, queueing: Duration, delivered: u64) {
        let Some((since, before)) = self.drained_seen else {
            match self.now > self.drained_from + seen.rtt + queueing {
                true => self.drained_seen = Some((self.now, queueing)),
                // Not yet what is sent now.
                false => self.send_less(delivered),
            }
            return;
        };
        if self.now < since + seen.rtt {
            return;
        }
        match queueing + tolerance(seen.rtt) <= before {
            true => (self.drained_seen, self.vain) = (Some((self.now, queueing)), 0),
            false => self.drained_in_vain(seen, queueing, delivered),
        }
    }

    fn settle(&mut self, seen: &Observation) {
        self.hold(seen.rtt);
        // As much arrived as was sent: the link carries it.
        let carried = match self.carried as f64 >= ARRIVES * self.rate_at_first as f64 * (1.0 - self.loss) {
            true => self.rate_at_first,
            false => self.carried,
        };
        self.set(SETTLE * carried as f64);
    }

    fn hold(&mut self, rtt: Duration) {
        self.state = State::Holding;
        self.until = self.now + (PATIENCE * rtt).max(PAUSE);
        self.set(self.rate as f64);
    }

    /// A queue that stands whatever is sent is not made here.
    fn drained_in_vain(&mut self, seen: &Observation, queueing: Duration, delivered: u64) {
        self.vain += 1;
        if self.vain < VAIN {
            return self.drain(delivered);
        }
        self.queueings.clear();
        self.hold(seen.rtt);
        self.set(self.rate_at_first as f64);
        if queueing > self.queueing_at_first + rival(seen.rtt) {
            self.state = State::Competing;
            self.trial = Some(Trial {
                from: self.now + queueing + 2 * seen.rtt,
                sent: Span::of(self.rate),
                arrived: Span::of(delivered),
            });
            self.until = self.now + MEMORY;
            self.changed = self.now;
        }
    }

    fn grow(&mut self, seen: &Observation, delivered: u64, lost: f64) {
        if self.rate == *self.range.end() || !self.is_used(seen, delivered) || lost > self.loss + MORE_LOSS {
            self.steps = 0;
            return;
        }
        let factor = STEPS[self.steps.min(STEPS.len() - 1)];
        self.steps += 1;
        self.set(self.rate as f64 * factor);
        if self.state == State::Holding {
            self.state = State::Growing;
        }
        // The first of what is sent now is acknowledged after a round trip, and then a tick has to pass.
        self.until = self.now + seen.rtt + self.queueing + seen.elapsed;
    }
}

/// How long something has held, where it holds `now`; `since` is kept from one tick to the next.
fn lasted(since: &mut Option<Duration>, now: Duration, holds: bool) -> Option<Duration> {
    *since = holds.then(|| since.unwrap_or(now));
    since.map(|since| now - since)
}

/// The queueing delay that is no queue: round trips differ by it for other reasons.
fn tolerance(rtt: Duration) -> Duration {
    (rtt / 16).max(Duration::from_millis(10))
}

/// The change of a queueing delay that somebody else makes.
fn rival(rtt: Duration) -> Duration {
    tolerance(rtt).max(Duration::from_millis(20))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: f64 = 0.005;
    const TICK: Duration = Duration::from_millis(100);
    /// 50 Mbit/s in bytes per second, and the round trip of a geostationary satellite.
    const RATE: f64 = 6_250_000.0;
    const GEO: f64 = 0.6;

    /// A link in front of which what is too much waits, and is dropped when it is more than `buffer`. Legs send at the
    /// controller's rate, with a window for a quarter and 50 ms more than the least round trip.
    struct Simulation {
        /// Bytes per second at a time in seconds.
        capacity: Box<dyn Fn(f64) -> f64>,
        /// The round trip without a queue, in seconds.
        rtt: Box<dyn Fn(f64) -> f64>,
        /// What others send, in bytes per second.
        others: Box<dyn Fn(f64) -> f64>,
        /// Whether one of them is a CUBIC sender (RFC 9438) that passes pepsal by.
        cubic: bool,
        /// Whether it leaves slow start when round trips grow.
        hystart: bool,
        /// Whether it sends a window at a time instead of segment by segment.
        bursts: bool,
        /// Bytes.
        buffer: f64,
        /// Part of what is sent that is lost.
        loss: f64,
    }

    /// What went on in a time of a simulation.
    struct Outcome {
        /// Part of the link's capacity that payload of legs took.
        used: f64,
        /// Seconds in the queue that 95 % of the time were not exceeded.
        delay: f64,
        /// Part of what was offered to the link that its queue dropped.
        dropped: f64,
    }

    struct Moment {
        at: f64,
        capacity: f64,
        served: f64,
        offered: f64,
        dropped: f64,
        delay: f64,
    }

    struct Run(Vec<Moment>);

    impl Run {
        fn during(&self, from: f64, to: f64) -> Outcome {
            let moments: Vec<&Moment> = self
                .0
                .iter()
                .filter(|moment| (from..to).contains(&moment.at))
                .collect();
            let sum = |of: fn(&Moment) -> f64| moments.iter().map(|moment| of(moment)).sum::<f64>();
            let mut delays: Vec<f64> = moments.iter().map(|moment| moment.delay).collect();
            delays.sort_by(f64::total_cmp);
            Outcome {
                used: sum(|moment| moment.served) / sum(|moment| moment.capacity).max(1.0),
                delay: delays[delays.len() * 95 / 100],
                dropped: sum(|moment| moment.dropped) / sum(|moment| moment.offered).max(1.0),
            }
        }
    }

    impl Default for Simulation {
        fn default() -> Self {
            Self {
                capacity: Box::new(|_| RATE),
                rtt: Box::new(|_| GEO),
                others: Box::new(|_| 0.0),
                cubic: false,
                hystart: false,
                bursts: false,
                buffer: RATE * GEO,
                loss: 0.0,
            }
        }
    }

    impl Simulation {
        fn run(&self, controller: &mut Controller, seconds: f64) -> Run {
            // When what was sent is known to have arrived, how much of it, how much was lost, and the round trip.
            let mut acknowledgements: VecDeque<(f64, f64, f64, f64)> = VecDeque::new();
            let (mut queue, mut others, mut in_flight) = (0.0, 0.0, 0.0);
            let mut least = f64::MAX;
            // Segments: the window, what it was at the last loss, and when that was.
            let (mut cubic_window, mut cubic_before, mut cubic_lost_at) = (10.0_f64, 1e9_f64, f64::MIN);
            let (mut round_ends, mut quota) = (0.0, 0.0);
            let mut moments = Vec::new();
            let (mut delivered, mut lost, mut round_trip, mut ticked) = (0.0, 0.0, None, 0.0);
            for step in 0..(seconds / STEP) as usize {
                let at = step as f64 * STEP;
                let (capacity, rtt) = ((self.capacity)(at), (self.rtt)(at));
                while acknowledgements.front().is_some_and(|(when, ..)| *when <= at) {
                    let (_, bytes, missing, took) = acknowledgements.pop_front().unwrap();
                    in_flight -= bytes + missing;
                    delivered += bytes;
                    lost += missing;
                    if bytes > 0.0 {
                        round_trip = Some(took);
                        least = least.min(took);
                    }
                }
                let window = controller.rate() as f64 * (1.25 * least.min(5.0) + 0.05) + 14_480.0;
                let sent = (controller.rate() as f64 * STEP).min((window - in_flight).max(0.0));
                in_flight += sent;
                let mut theirs = (self.others)(at) * STEP;
                if self.cubic && self.bursts {
                    // What is acknowledged in a burst is sent in a burst.
                    if at >= round_ends {
                        (round_ends, quota) = (at + rtt + (queue + others) / capacity, cubic_window * 1448.0);
                    }
                    let burst = quota.min(3.0 * capacity * STEP);
                    quota -= burst;
                    theirs += burst;
                } else if self.cubic {
                    theirs += cubic_window * 1448.0 / (rtt + (queue + others) / capacity) * STEP;
                }
                queue += sent;
                others += theirs;
                let excess = (queue + others - self.buffer).max(0.0);
                let part = if queue + others > 0.0 {
                    queue / (queue + others)
                } else {
                    0.0
                };
                let since = at - cubic_lost_at;
                if excess * (1.0 - part) > 0.0 && since > rtt + self.buffer / capacity {
                    (cubic_before, cubic_window, cubic_lost_at) = (cubic_window, 0.7 * cubic_window, at);
                } else if cubic_before > 1e8 && self.hystart && (queue + others) / capacity > 0.016 {
                    // It ends its slow start without loss (RFC 9406), and goes on from the middle of its curve.
                    let k = (cubic_window * 0.3 / 0.4).cbrt();
                    (cubic_before, cubic_lost_at) = (cubic_window, at - k);
                } else if cubic_before > 1e8 {
                    cubic_window *= 2_f64.powf(STEP / (rtt + (queue + others) / capacity));
                } else {
                    let k = (cubic_before * 0.3 / 0.4).cbrt();
                    cubic_window = cubic_window.max(0.4 * (since - k).powi(3) + cubic_before);
                }
                queue -= excess * part;
                others -= excess * (1.0 - part);
                let delay = if capacity > 0.0 {
                    (queue + others) / capacity
                } else {
                    0.0
                };
                let served = (capacity * STEP).min(queue + others);
                let (ours, not_ours) = (served * part, served * (1.0 - part));
                queue -= ours;
                others -= not_ours;
                let known = at + rtt;
                // A round trip that has become shorter overtakes nothing here.
                let known = acknowledgements
                    .back()
                    .map_or(known, |(before, ..)| known.max(*before));
                acknowledgements.push_back((
                    known,
                    ours * (1.0 - self.loss),
                    ours * self.loss + excess * part,
                    rtt + delay,
                ));
                moments.push(Moment {
                    at,
                    capacity: capacity * STEP,
                    served: ours,
                    offered: sent + theirs,
                    dropped: excess,
                    delay,
                });
                if at - ticked >= TICK.as_secs_f64() {
                    controller.observe(Observation {
                        elapsed: Duration::from_secs_f64(at - ticked),
                        delivered: delivered as u64,
                        lost: lost as u64,
                        in_flight: in_flight > 0.0,
                        is_backlogged: true,
                        rtt: Duration::from_secs_f64(least.min(5.0)),
                        queueing: round_trip.map(|took| Duration::from_secs_f64(took - least)),
                    });
                    (delivered, lost, round_trip, ticked) = (0.0, 0.0, None, at);
                }
            }
            Run(moments)
        }
    }

    fn controller(ceiling: f64) -> Controller {
        Controller::new(14_480..=ceiling as u64, ceiling as u64)
    }

    fn during(run: &Run, from: f64, to: f64, used: f64, delay: f64, dropped: f64) {
        let outcome = run.during(from, to);
        assert!(
            outcome.used >= used && outcome.delay <= delay && outcome.dropped <= dropped,
            "{from} to {to} s: {:.3} of the link, {:.3} s in its queue, {:.4} dropped",
            outcome.used,
            outcome.delay,
            outcome.dropped
        );
    }

    #[test]
    fn what_the_link_carries_is_not_touched() {
        for loss in [0.0, 0.01, 0.03] {
            let simulation = Simulation {
                loss,
                ..Default::default()
            };
            let mut controller = controller(RATE);
            let run = simulation.run(&mut controller, 60.0);
            during(&run, 5.0, 60.0, 0.99, 0.01, 0.0);
            assert_eq!(controller.rate(), RATE as u64);
            assert_eq!(controller.state(), State::AtCeiling);
        }
    }

    #[test]
    fn a_fade_is_followed_down_and_up() {
        for loss in [0.0, 0.01, 0.03] {
            let capacity = |at| {
                if (20.0..50.0).contains(&at) {
                    RATE / 5.0
                } else {
                    RATE
                }
            };
            let simulation = Simulation {
                capacity: Box::new(capacity),
                loss,
                ..Default::default()
            };
            let run = simulation.run(&mut controller(RATE), 80.0);
            during(&run, 28.0, 50.0, 0.88, 0.15, 0.01);
            during(&run, 60.0, 80.0, 0.88, 0.15, 0.01);
        }
    }

    #[test]
    fn others_keep_what_they_send() {
        let simulation = Simulation {
            others: Box::new(|_| 0.4 * RATE),
            ..Default::default()
        };
        let run = simulation.run(&mut controller(RATE), 80.0);
        during(&run, 10.0, 80.0, 0.6 * 0.92, 0.15, 0.002);
    }

    #[test]
    fn neither_side_starves_beside_a_sender_that_fills_the_queue() {
        for (ceiling, hystart, bursts) in [
            (1.0, false, false),
            (1.0, true, false),
            (1.0, false, true),
            (1.0, true, true),
            (2.0, false, false),
            (2.0, true, true),
        ] {
            let simulation = Simulation {
                cubic: true,
                hystart,
                bursts,
                ..Default::default()
            };
            let run = simulation.run(&mut controller(ceiling * RATE), 200.0);
            let outcome = run.during(20.0, 200.0);
            assert!(
                (0.4..0.9).contains(&outcome.used),
                "{:.3} of the link",
                outcome.used
            );
        }
    }

    #[test]
    fn a_ceiling_that_is_too_high_is_none() {
        for factor in [1.2, 2.0, 5.0, 20.0] {
            let run = Simulation::default().run(&mut controller(factor * RATE), 80.0);
            during(&run, 20.0, 80.0, 0.9, 0.15, 0.01);
        }
    }

    #[test]
    fn a_rate_is_found_from_little() {
        for rtt in [0.03, 0.6] {
            let simulation = Simulation {
                rtt: Box::new(move |_| rtt),
                buffer: RATE * rtt,
                ..Default::default()
            };
            let mut controller = Controller::new(14_480..=RATE as u64 * 100, 125_000);
            let run = simulation.run(&mut controller, 60.0);
            during(&run, 20.0, 60.0, 0.85, 0.15, 0.01);
        }
    }

    #[test]
    fn a_longer_path_is_no_queue() {
        let rtt = |at: f64| {
            if ((at / 15.0) as u64).is_multiple_of(2) {
                0.025
            } else {
                0.06
            }
        };
        let simulation = Simulation {
            rtt: Box::new(rtt),
            buffer: RATE * 0.06,
            ..Default::default()
        };
        let run = simulation.run(&mut controller(RATE), 120.0);
        during(&run, 5.0, 120.0, 0.93, 0.03, 0.001);
    }

    #[test]
    fn an_outage_says_nothing_of_the_rate() {
        let capacity = |at| if (20.0..40.0).contains(&at) { 0.0 } else { RATE };
        let simulation = Simulation {
            capacity: Box::new(capacity),
            ..Default::default()
        };
        let mut controller = controller(RATE);
        let run = simulation.run(&mut controller, 60.0);
        during(&run, 42.0, 60.0, 0.85, 0.1, 0.01);
        assert_eq!(controller.rate(), RATE as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10))]

        /// Rate, round trip and an outage of 100 to 300 ms, all anew every 15 s.
        #[test]
        fn a_low_orbit_is_followed(
            slots in prop::collection::vec((2.5e6..25e6, 0.025..0.06, 0.1..0.3), 20)
        ) {
            let slot = move |at: f64| slots[(at / 15.0) as usize];
            let slots = slot.clone();
            let capacity = move |at: f64| {
                let (rate, _, outage) = slots(at);
                if at % 15.0 < outage { 0.0 } else { rate }
            };
            let simulation = Simulation {
                capacity: Box::new(capacity),
                rtt: Box::new(move |at| slot(at).1),
                buffer: 25e6 * 0.04,
                ..Default::default()
            };
            let run = simulation.run(&mut controller(25e6), 300.0);
            during(&run, 5.0, 300.0, 0.8, 0.1, 0.08);
        }

        #[test]
        fn nothing_leads_out_of_the_range_or_to_a_panic(
            seen in prop::collection::vec(
                (0u64..10_000_000, 0u64..10_000_000, any::<bool>(), any::<bool>(), 0u64..2_000_000, 0u64..5_000_000),
                0..400,
            ),
        ) {
            let mut controller = controller(RATE);
            for (delivered, lost, in_flight, is_backlogged, rtt, queueing) in seen {
                controller.observe(Observation {
                    elapsed: TICK,
                    delivered,
                    lost,
                    in_flight,
                    is_backlogged,
                    rtt: Duration::from_micros(rtt),
                    queueing: (queueing % 3 > 0).then(|| Duration::from_micros(queueing)),
                });
                prop_assert!((14_480..=RATE as u64).contains(&controller.rate()));
            }
        }
    }
}
