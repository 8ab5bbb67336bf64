//! Handovers of a link to satellites in low orbits: every few seconds the satellite changes, after a short
//! silence, with a different path delay.

use std::time::{Duration, Instant};

use fastrand::Rng;

/// Times and effects of handovers. Both directions change at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Handovers {
    /// Time between handovers. The seed sets the time of the first, within this period from the start.
    pub period: Duration,
    /// Minimum silence, during which the transmitters wait and their queues fill.
    pub shortest_silence: Duration,
    /// Maximum silence; the seed sets each.
    pub longest_silence: Duration,
    /// Maximum increase of the round-trip time over a new satellite, below the minimum silence; the seed sets
    /// each.
    pub rtt_step: Duration,
}

impl Handovers {
    /// Typical of low orbits: every 15 s, 100 to 200 ms of silence, up to 20 ms more of round-trip time.
    pub const LEO: Self = Self {
        period: Duration::from_secs(15),
        shortest_silence: Duration::from_millis(100),
        longest_silence: Duration::from_millis(200),
        rtt_step: Duration::from_millis(20),
    };
}

/// The handovers of one link in their order; equal seeds and origins give equal handovers.
#[derive(Debug)]
pub(crate) struct Schedule {
    handovers: Handovers,
    rng: Rng,
    current: Silence,
    next: Silence,
}

/// One handover.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Silence {
    pub(crate) start: Instant,
    pub(crate) end: Instant,
    /// Additional delay of one direction after it.
    pub(crate) extra_delay: Duration,
}

impl Schedule {
    pub(crate) fn new(handovers: Handovers, seed: u64, origin: Instant) -> Self {
        let mut rng = Rng::with_seed(seed);
        let first = origin + handovers.period.mul_f64(rng.f64());
        let none = Silence {
            start: origin,
            end: origin,
            extra_delay: Duration::ZERO,
        };
        let mut schedule = Self {
            handovers,
            rng,
            current: none,
            next: none,
        };
        schedule.next = schedule.silence(first);
        schedule
    }

    /// Returns the last handover that has started at `time`. Times must not decrease by more than a period.
    pub(crate) fn at(&mut self, time: Instant) -> Silence {
        while self.next.start <= time {
            self.current = self.next;
            self.next = self.silence(self.current.start + self.handovers.period);
        }
        self.current
    }

    /// Returns the start of the handover after the last one that [`Schedule::at`] returned.
    pub(crate) fn next_start(&self) -> Instant {
        self.next.start
    }

    fn silence(&mut self, start: Instant) -> Silence {
        let Handovers {
            shortest_silence,
            longest_silence,
            rtt_step,
            ..
        } = self.handovers;
        let spread = longest_silence.saturating_sub(shortest_silence);
        Silence {
            start,
            end: start + shortest_silence + spread.mul_f64(self.rng.f64()),
            extra_delay: (rtt_step / 2).mul_f64(self.rng.f64()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handovers_come_once_a_period_and_repeat_with_the_seed() {
        let origin = Instant::now();
        let starts = |seed| {
            let mut schedule = Schedule::new(Handovers::LEO, seed, origin);
            (1..=10)
                .map(|n| schedule.at(origin + n * Handovers::LEO.period))
                .collect::<Vec<_>>()
        };
        let silences = starts(1);
        assert_eq!(silences, starts(1));
        assert_ne!(silences, starts(2));
        for (number, silence) in (0..).zip(&silences) {
            let length = silence.end - silence.start;
            assert!(length >= Handovers::LEO.shortest_silence && length <= Handovers::LEO.longest_silence);
            assert!(silence.extra_delay <= Duration::from_millis(10));
            assert_eq!(silence.start - silences[0].start, number * Handovers::LEO.period);
        }
    }

    #[test]
    fn nothing_happens_before_the_first() {
        let origin = Instant::now();
        let silence = Schedule::new(Handovers::LEO, 1, origin).at(origin);
        assert_eq!(silence.start, silence.end);
        assert_eq!(silence.extra_delay, Duration::ZERO);
    }
}
