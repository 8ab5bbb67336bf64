//! A link that changes: rates, round-trip time and passage as functions of the time since a chosen moment.

use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::emulator::LinkProfile;
use crate::traffic::Direction;

/// State of the transmitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Packets are sent.
    Open,
    /// Packets wait: the transmitter is silent and its queue fills, as during a handover.
    Held,
    /// Packets are sent and lost, as in rain or behind an obstacle.
    Lost,
}

/// Parameters of a link from some time on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Time since the course began.
    pub at: Duration,
    /// Rate towards the server in bit/s, IP headers included.
    pub up_bps: u64,
    /// Rate towards the client in bit/s, IP headers included.
    pub down_bps: u64,
    /// Round-trip time of the idle link; each direction takes half of it.
    pub rtt: Duration,
    /// Of both directions.
    pub passage: Passage,
}

impl Step {
    /// Returns the rate of a direction in bit/s.
    pub fn rate_bps(&self, direction: Direction) -> u64 {
        match direction {
            Direction::Upload => self.up_bps,
            Direction::Download => self.down_bps,
        }
    }
}

/// The steps of a link in their order; the last one has no end.
#[derive(Clone, Debug, PartialEq)]
pub struct Course(Vec<Step>);

impl Course {
    /// Returns a course without changes.
    pub fn steady(profile: &LinkProfile) -> Self {
        Self(vec![Step {
            at: Duration::ZERO,
            up_bps: profile.up_bps,
            down_bps: profile.down_bps,
            rtt: profile.rtt,
            passage: Passage::Open,
        }])
    }

    /// Adds a change to the last step.
    ///
    /// # Panics
    /// When `at` is earlier than the change before.
    #[must_use]
    pub fn then(mut self, at: Duration, change: impl FnOnce(&mut Step)) -> Self {
        let last = *self.0.last().expect("a course has a first step");
        assert!(at >= last.at, "changes come in their order");
        let mut step = Step { at, ..last };
        change(&mut step);
        self.0.push(step);
        self
    }

    /// Returns a link to satellites in low orbits for `length`: every 15 s another satellite, after 100 to
    /// 300 ms of silence, with a round-trip time of 25 to 60 ms, 20 to 200 Mbit/s down and a fifth of that
    /// up. Equal seeds give equal courses.
    pub fn low_orbit(seed: u64, length: Duration) -> Self {
        const PERIOD: Duration = Duration::from_secs(15);
        let mut rng = Rng::with_seed(seed);
        let mut satellite = move |step: &mut Step| {
            step.down_bps = rng.u64(20_000_000..=200_000_000);
            step.up_bps = step.down_bps / 5;
            step.rtt = Duration::from_micros(rng.u64(25_000..=60_000));
            step.passage = Passage::Open;
            Duration::from_micros(rng.u64(100_000..=300_000))
        };
        let mut course = Self::steady(&LinkProfile::GEO);
        let mut silence = satellite(&mut course.0[0]);
        let mut handover = PERIOD;
        while handover < length {
            course = course
                .then(handover, |step| step.passage = Passage::Held)
                .then(handover + silence, |step| silence = satellite(step));
            handover += PERIOD;
        }
        course
    }

    /// Returns the parameters at a time.
    pub fn at(&self, time: Duration) -> &Step {
        let after = self.0.partition_point(|step| step.at <= time);
        &self.0[after.saturating_sub(1)]
    }

    /// Returns the steps.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// Returns the bytes, IP headers included, that a direction carries between two times.
    pub fn capacity_bytes(&self, direction: Direction, from: Duration, to: Duration) -> f64 {
        let ends = self.0.iter().skip(1).map(|step| step.at).chain([to]);
        let bits = self.0.iter().zip(ends).map(|(step, end)| {
            let time = end.min(to).saturating_sub(step.at.max(from));
            match step.passage {
                Passage::Open => step.rate_bps(direction) as f64 * time.as_secs_f64(),
                Passage::Held | Passage::Lost => 0.0,
            }
        });
        bits.sum::<f64>() / 8.0
    }

    fn next_change(&self, time: Duration) -> Option<Duration> {
        let after = self.0.partition_point(|step| step.at <= time);
        self.0.get(after).map(|step| step.at)
    }
}

/// A running course.
#[derive(Debug)]
pub(crate) struct RunningCourse {
    pub(crate) course: Course,
    pub(crate) start: Instant,
}

impl RunningCourse {
    /// Returns the step at a time, and its end if it has one.
    pub(crate) fn at(&self, time: Instant) -> (&Step, Option<Instant>) {
        let elapsed = time.saturating_duration_since(self.start);
        let end = self.course.next_change(elapsed).map(|at| self.start + at);
        (self.course.at(elapsed), end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn fade() -> Course {
        let profile = LinkProfile::symmetric(50_000_000, SECOND, 0.0);
        Course::steady(&profile)
            .then(20 * SECOND, |step| step.down_bps = 10_000_000)
            .then(50 * SECOND, |step| step.down_bps = 50_000_000)
    }

    #[test]
    fn a_step_lasts_until_the_next() {
        let rates = [0, 19, 20, 49, 50, 1000].map(|second| fade().at(second * SECOND).down_bps / 1_000_000);
        assert_eq!(rates, [50, 50, 10, 10, 50, 50]);
        assert_eq!(fade().next_change(20 * SECOND), Some(50 * SECOND));
        assert_eq!(fade().next_change(50 * SECOND), None);
    }

    #[test]
    fn the_capacity_is_that_of_each_step_while_it_passes_packets() {
        let mbit = |from, to, course: &Course| {
            course.capacity_bytes(Direction::Download, from * SECOND, to * SECOND) * 8.0 / 1e6
        };
        assert_eq!(mbit(10, 30, &fade()), 600.0);
        assert_eq!(mbit(60, 70, &fade()), 500.0);
        let outage = fade()
            .then(60 * SECOND, |step| step.passage = Passage::Lost)
            .then(70 * SECOND, |step| step.passage = Passage::Open);
        assert_eq!(mbit(55, 75, &outage), 500.0);
    }

    #[test]
    fn low_orbits_repeat_with_the_seed_and_keep_their_bounds() {
        let course = Course::low_orbit(1, 60 * SECOND);
        assert_eq!(course, Course::low_orbit(1, 60 * SECOND));
        assert_ne!(course, Course::low_orbit(2, 60 * SECOND));
        assert_eq!(course.steps().len(), 1 + 2 * 3);
        for step in course.steps() {
            assert!((20_000_000..=200_000_000).contains(&step.down_bps), "{step:?}");
            assert!(step.rtt >= Duration::from_millis(25) && step.rtt <= Duration::from_millis(60));
        }
        let silence = course.steps()[2].at - course.steps()[1].at;
        assert!(silence >= Duration::from_millis(100) && silence <= Duration::from_millis(300));
    }
}
