//! Simulates one direction of a link on virtual time: queue, transmitter, delay and losses.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::course::{Passage, RunningCourse};
use crate::emulator::LinkProfile;
use crate::handover::Schedule;
use crate::traffic::Direction;

/// One direction. Packets wait until the transmitter has sent them; only then their arrival is known, because
/// the rate may change while they wait.
pub(crate) struct Shaper<P> {
    conditions: Conditions,
    loss: Loss,
    queue_bytes: u64,
    waiting: VecDeque<Waiting<P>>,
    waiting_bytes: u64,
    /// Unsent part of the first packet, in bits times nanoseconds per second.
    left: u128,
    /// Time up to which the transmitter has been simulated.
    clock: Option<Instant>,
    /// Keeps the order of packets when the delay decreases.
    last_arrival: Option<Instant>,
}

struct Waiting<P> {
    entered: Instant,
    bytes: u64,
    is_lost: bool,
    packet: P,
}

/// A packet that the transmitter has sent.
#[derive(Debug, PartialEq)]
pub(crate) struct Departure<P> {
    /// Arrival at the other end; none if lost.
    pub(crate) arrival: Option<Instant>,
    /// Queueing delay.
    pub(crate) waited: Duration,
    pub(crate) packet: P,
}

impl<P> Shaper<P> {
    pub(crate) fn new(
        direction: Direction,
        profile: &LinkProfile,
        rng: Rng,
        handovers: Option<Schedule>,
        course: Arc<OnceLock<RunningCourse>>,
    ) -> Self {
        let (rate_bps, queue_bytes) = match direction {
            Direction::Upload => (
                profile.up_bps,
                profile.up_queue_bytes.unwrap_or(profile.queue_bytes),
            ),
            Direction::Download => (profile.down_bps, profile.queue_bytes),
        };
        Self {
            conditions: Conditions {
                direction,
                rate_bps,
                delay: profile.rtt / 2,
                handovers,
                course,
            },
            loss: Loss {
                share: profile.loss,
                burst_packets: profile.burst_packets,
                is_in_burst: false,
                rng,
            },
            queue_bytes,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            left: 0,
            clock: None,
            last_arrival: None,
        }
    }

    /// Adds a packet to the queue; returns false when the queue is full. [`Shaper::depart`] has to have
    /// removed all packets that depart by `now`.
    pub(crate) fn enter(&mut self, now: Instant, bytes: usize, packet: P) -> bool {
        // Drawn for every packet, so that the result depends on the packet's number only.
        let is_lost = self.loss.next();
        let bytes = bytes as u64;
        if self.backlog_bytes() > self.queue_bytes {
            return false;
        }
        if self.waiting.is_empty() {
            self.clock = Some(now);
            self.left = work(bytes);
        }
        self.waiting_bytes += bytes;
        self.waiting.push_back(Waiting {
            entered: now,
            bytes,
            is_lost,
            packet,
        });
        true
    }

    /// Removes and returns the next packet that departs by `by`.
    pub(crate) fn depart(&mut self, by: Instant) -> Option<Departure<P>> {
        let bytes = self.waiting.front()?.bytes;
        let mut clock = self.clock?;
        while clock <= by {
            let now = self.conditions.at(clock);
            let pause = now.end.map_or(by, |end| end.min(by));
            if let Some(sent) = now.sent(clock, self.left)
                && sent <= pause
            {
                self.clock = Some(sent);
                return Some(self.take_first(sent, &now));
            }
            if now.passage != Passage::Held {
                self.left -= (pause - clock).as_nanos() * u128::from(now.rate_bps);
            }
            self.clock = Some(pause);
            if pause == by {
                break;
            }
            clock = pause;
        }
        debug_assert!(self.left <= work(bytes), "a transmitter only advances");
        None
    }

    /// Returns the earliest possible next departure.
    pub(crate) fn next_departure(&mut self) -> Option<Instant> {
        self.waiting.front()?;
        let clock = self.clock?;
        let now = self.conditions.at(clock);
        let ends = [now.sent(clock, self.left), now.end];
        ends.into_iter().flatten().min()
    }

    fn take_first(&mut self, sent: Instant, now: &Moment) -> Departure<P> {
        let first = self.waiting.pop_front().expect("the caller has seen it");
        self.waiting_bytes -= first.bytes;
        self.left = self.waiting.front().map_or(0, |next| work(next.bytes));
        let is_lost = first.is_lost || now.passage == Passage::Lost;
        let arrival = (!is_lost).then(|| {
            let arrival = sent + now.delay;
            self.last_arrival.map_or(arrival, |last| last.max(arrival))
        });
        self.last_arrival = arrival.or(self.last_arrival);
        let transmission = now.transmission(work(first.bytes));
        Departure {
            arrival,
            waited: (sent - first.entered).saturating_sub(transmission),
            packet: first.packet,
        }
    }

    /// Returns the queued bytes, including the unsent part of the first packet.
    fn backlog_bytes(&self) -> u64 {
        let Some(first) = self.waiting.front() else {
            return 0;
        };
        let rest = u64::try_from(self.left.div_ceil(work(1))).expect("a packet has less than 2^64 bytes");
        self.waiting_bytes - first.bytes + rest
    }
}

/// Returns the transmitter's work for `bytes`, in bits times nanoseconds per second.
fn work(bytes: u64) -> u128 {
    u128::from(bytes) * 8_000_000_000
}

/// Rate and delay of a direction over time.
struct Conditions {
    direction: Direction,
    rate_bps: u64,
    delay: Duration,
    handovers: Option<Schedule>,
    /// Replaces rate and delay after its start.
    course: Arc<OnceLock<RunningCourse>>,
}

/// Rate and delay at one time.
struct Moment {
    rate_bps: u64,
    delay: Duration,
    passage: Passage,
    /// End of these values.
    end: Option<Instant>,
}

impl Conditions {
    /// Times must not decrease.
    fn at(&mut self, time: Instant) -> Moment {
        let mut moment = Moment {
            rate_bps: self.rate_bps,
            delay: self.delay,
            passage: Passage::Open,
            end: None,
        };
        if let Some(course) = self.course.get() {
            let (step, end) = course.at(time);
            moment = Moment {
                rate_bps: step.rate_bps(self.direction),
                delay: step.rtt / 2,
                passage: step.passage,
                end,
            };
        }
        if let Some(handovers) = &mut self.handovers {
            let silence = handovers.at(time);
            let mut end = handovers.next_start();
            if time < silence.end {
                moment.passage = Passage::Held;
                end = silence.end;
            }
            moment.delay += silence.extra_delay;
            moment.end = Some(moment.end.map_or(end, |other| other.min(end)));
        }
        moment.rate_bps = moment.rate_bps.max(1);
        moment
    }
}

impl Moment {
    /// Returns the time at which the transmitter has finished, without a change before; none while it is
    /// silent.
    fn sent(&self, from: Instant, left: u128) -> Option<Instant> {
        (self.passage != Passage::Held).then(|| from + self.transmission(left))
    }

    fn transmission(&self, work: u128) -> Duration {
        let nanoseconds = work / u128::from(self.rate_bps);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// The loss model.
struct Loss {
    /// Loss probability, from 0 to 1.
    share: f64,
    /// Mean length of a burst in packets; none for independent losses.
    burst_packets: Option<f64>,
    is_in_burst: bool,
    rng: Rng,
}

impl Loss {
    /// Returns whether the next packet is lost.
    fn next(&mut self) -> bool {
        let draw = self.rng.f64();
        let Some(length) = self.burst_packets else {
            return draw < self.share;
        };
        // Gilbert's model: in the bad state every packet is lost. The probability to leave it is 1 / length;
        // the probability to enter it gives the configured loss.
        self.is_in_burst = if self.is_in_burst {
            draw >= 1.0 / length
        } else {
            draw < self.share / ((1.0 - self.share) * length)
        };
        self.is_in_burst
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::course::Course;
    use crate::handover::Handovers;

    const PACKET_LEN: usize = 1250;
    const MS: Duration = Duration::from_millis(1);

    fn shaper(profile: &LinkProfile) -> Shaper<()> {
        let rng = Rng::with_seed(profile.seed);
        Shaper::new(Direction::Upload, profile, rng, None, Arc::default())
    }

    /// Creates a shaper whose course starts at `start`.
    fn changing(profile: &LinkProfile, start: Instant, course: Course) -> Shaper<()> {
        let shaper = shaper(profile);
        let running = RunningCourse { course, start };
        shaper
            .conditions
            .course
            .set(running)
            .expect("no course has begun");
        shaper
    }

    fn enter(shaper: &mut Shaper<()>, now: Instant) -> bool {
        assert_eq!(shaper.depart(now), None, "it has been taken out before");
        shaper.enter(now, PACKET_LEN, ())
    }

    /// Returns the arrivals of all packets that depart by `by`, in microseconds since `start`.
    fn arrivals(shaper: &mut Shaper<()>, start: Instant, by: Duration) -> Vec<u128> {
        let departures = std::iter::from_fn(|| shaper.depart(start + by));
        departures
            .filter_map(|departure| Some((departure.arrival? - start).as_micros()))
            .collect()
    }

    #[test]
    fn packets_are_sent_one_after_the_other_and_then_delayed() {
        let mut shaper = shaper(&LinkProfile::symmetric(10_000_000, 100 * MS, 0.0));
        let start = Instant::now();
        (0..10).for_each(|_| assert!(enter(&mut shaper, start)));
        assert_eq!(shaper.next_departure(), Some(start + MS));
        for number in 1..=10 {
            let departure = shaper.depart(start + number * MS).expect("it is sent");
            assert_eq!(departure.arrival, Some(start + (number + 50) * MS));
            assert_eq!(departure.waited, (number - 1) * MS);
            assert_eq!(shaper.depart(start + number * MS), None);
        }
        let later = start + Duration::from_secs(1);
        assert!(enter(&mut shaper, later));
        assert_eq!(arrivals(&mut shaper, later, MS), [51_000]);
        assert_eq!(shaper.next_departure(), None);
    }

    #[test]
    fn a_full_queue_drops_and_drains_at_the_rate() {
        let mut shaper = shaper(&LinkProfile {
            queue_bytes: 2 * PACKET_LEN as u64,
            ..LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0)
        });
        let start = Instant::now();
        let fates = [(); 5].map(|()| enter(&mut shaper, start));
        assert_eq!(fates, [true, true, true, false, false]);
        assert_eq!(arrivals(&mut shaper, start, MS), [1000]);
        assert!(enter(&mut shaper, start + MS));
        assert!(!enter(&mut shaper, start + MS));
    }

    #[test]
    fn packets_that_wait_leave_at_the_new_rate() {
        let profile = LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0);
        let course = Course::steady(&profile)
            .then(MS * 3 / 2, |step| step.up_bps = 1_000_000)
            .then(20 * MS, |step| step.up_bps = 10_000_000);
        let start = Instant::now();
        let mut shaper = changing(&profile, start, course);
        (0..5).for_each(|_| assert!(enter(&mut shaper, start)));
        // The second is half sent when the rate falls, and the rest takes 5 ms. Of the fourth 3.5 of 10 ms are over when the
        // rate returns.
        assert_eq!(
            arrivals(&mut shaper, start, 100 * MS),
            [1000, 6500, 16_500, 20_650, 21_650]
        );
    }

    #[test]
    fn a_queue_holds_as_many_bytes_at_any_rate() {
        let profile = LinkProfile {
            queue_bytes: 2 * PACKET_LEN as u64,
            ..LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0)
        };
        let course = Course::steady(&profile).then(Duration::ZERO, |step| step.up_bps = 1_000_000);
        let start = Instant::now();
        let mut shaper = changing(&profile, start, course);
        let fates = [(); 4].map(|()| enter(&mut shaper, start));
        assert_eq!(fates, [true, true, true, false]);
    }

    #[test]
    fn an_outage_holds_or_loses() {
        let profile = LinkProfile::symmetric(10_000_000, 10 * MS, 0.0);
        let outage = |passage| {
            Course::steady(&profile)
                .then(MS, |step| step.passage = passage)
                .then(5 * MS, |step| step.passage = Passage::Open)
        };
        let start = Instant::now();
        let arrive = |passage| {
            let mut shaper = changing(&profile, start, outage(passage));
            (0..6).for_each(|_| assert!(enter(&mut shaper, start)));
            arrivals(&mut shaper, start, 100 * MS)
        };
        assert_eq!(
            arrive(Passage::Held),
            [6000, 11_000, 12_000, 13_000, 14_000, 15_000]
        );
        assert_eq!(arrive(Passage::Lost), [6000, 11_000]);
    }

    #[test]
    fn packets_do_not_overtake_each_other_on_a_path_that_becomes_shorter() {
        let profile = LinkProfile::symmetric(10_000_000, 100 * MS, 0.0);
        let course = Course::steady(&profile).then(MS, |step| step.rtt = 20 * MS);
        let start = Instant::now();
        let mut shaper = changing(&profile, start, course);
        (0..2).for_each(|_| assert!(enter(&mut shaper, start)));
        assert_eq!(arrivals(&mut shaper, start, 50 * MS), [51_000, 51_000]);
        assert!(enter(&mut shaper, start + 50 * MS));
        assert_eq!(arrivals(&mut shaper, start, 100 * MS), [61_000]);
    }

    #[test]
    fn a_handover_holds_packets_back_and_is_no_part_of_the_queue() {
        let handovers = Handovers {
            period: Duration::from_secs(1),
            shortest_silence: 100 * MS,
            longest_silence: 100 * MS,
            rtt_step: Duration::ZERO,
        };
        let mut shaper = shaper(&LinkProfile {
            queue_bytes: 2 * PACKET_LEN as u64,
            ..LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0)
        });
        let origin = Instant::now();
        let silence = Schedule::new(handovers, 1, origin).at(origin + handovers.period);
        shaper.conditions.handovers = Some(Schedule::new(handovers, 1, origin));
        // Before it, in it, and after it.
        let before = silence.start - 5 * MS;
        assert!(enter(&mut shaper, before));
        assert_eq!(arrivals(&mut shaper, before, 2 * MS), [1000]);
        let within = silence.start + 50 * MS;
        let fates = [(); 4].map(|()| enter(&mut shaper, within));
        assert_eq!(fates, [true, true, true, false]);
        assert_eq!(shaper.next_departure(), Some(silence.end));
        assert_eq!(arrivals(&mut shaper, silence.end, MS), [1000]);
        assert!(enter(&mut shaper, silence.end + MS));
        assert_eq!(arrivals(&mut shaper, silence.end, 10 * MS), [2000, 3000, 4000]);
    }

    #[test]
    fn losses_repeat_with_the_seed_whatever_the_times() {
        let losses = |seed, interval| {
            let mut shaper = shaper(&LinkProfile {
                seed,
                ..LinkProfile::symmetric(u64::MAX, Duration::ZERO, 0.5)
            });
            let start = Instant::now();
            let arrives = |n| {
                let now = start + n * interval;
                assert!(shaper.enter(now, PACKET_LEN, ()));
                shaper.depart(now).expect("it is sent at once").arrival
            };
            (0..100).map(arrives).map(|at| at.is_none()).collect::<Vec<_>>()
        };
        assert_eq!(losses(1, Duration::ZERO), losses(1, 3 * MS));
        assert_ne!(losses(1, Duration::ZERO), losses(2, Duration::ZERO));
    }

    #[test]
    fn bursts_lose_the_same_share() {
        let mut loss = Loss {
            share: 0.02,
            burst_packets: Some(8.0),
            is_in_burst: false,
            rng: Rng::with_seed(1),
        };
        let fates: Vec<_> = (0..1_000_000).map(|_| loss.next()).collect();
        let lost = fates.iter().filter(|is_lost| **is_lost).count() as f64;
        let bursts = fates.windows(2).filter(|pair| !pair[0] && pair[1]).count() as f64;
        // Of 2,500 bursts, whose lengths are geometric, the mean has a standard deviation of 2 %.
        assert!((0.0185..0.0215).contains(&(lost / 1e6)), "{lost}");
        assert!((7.4..8.6).contains(&(lost / bursts)), "{lost} in {bursts}");
    }
}
