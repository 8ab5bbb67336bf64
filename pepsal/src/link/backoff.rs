//! What bounds a single leg: losses that are too many for its path, and silence.

use std::{mem, time::Duration};

/// How long segments have been in flight of which none was acknowledged.
#[derive(Debug, Default)]
pub struct Silence(Duration);

impl Silence {
    /// Adds `elapsed`, at whose end `in_flight` bytes were sent and unacknowledged.
    pub fn observe(&mut self, acknowledged: u64, in_flight: u64, elapsed: Duration) {
        match acknowledged == 0 && in_flight > 0 {
            true => self.0 += elapsed,
            false => self.end(),
        }
    }

    pub fn end(&mut self) {
        self.0 = Duration::ZERO;
    }

    /// Whether it is longer than delayed acknowledgements and a lost segment account for.
    pub fn is_outage(&self, rtt: Duration) -> bool {
        self.0 >= (2 * rtt).max(Duration::from_secs(1))
    }
}

/// Bounds the rate of a leg that loses too much: its path beyond the link may carry less than its share.
#[derive(Debug)]
pub struct Backoff {
    /// Bytes per second that the leg may send; `u64::MAX` before the first excessive loss.
    pub ceiling: u64,
    /// The sum of the periods since the loss was last judged.
    sample: Period,
    period: Period,
}

/// A leg's figures over some time in which it had something to send.
#[derive(Debug, Clone, Copy, Default)]
pub struct Period {
    pub time: Duration,
    /// Bytes.
    pub acknowledged: u64,
    /// Segments.
    pub arrived: u64,
    /// Segments.
    pub lost: u64,
}

/// Bytes per second below which no leg is paced: about a segment a second.
pub const FLOOR: u64 = 1_448;

/// Lost segments in a hundred above which the rate is more than the path carries, and not merely the link's losses.
const EXCESS_LOSS: u64 = 20;

/// Segments in the smallest sample whose loss lowers the ceiling.
const SAMPLE: u64 = 100;

impl Period {
    fn add(&mut self, other: Self) {
        self.time += other.time;
        self.acknowledged += other.acknowledged;
        self.arrived += other.arrived;
        self.lost += other.lost;
    }

    fn segments(&self) -> u64 {
        self.arrived + self.lost
    }

    fn has_excess_loss(&self) -> bool {
        self.lost * 100 > self.segments() * EXCESS_LOSS
    }

    /// Returns the acknowledged bytes per second.
    fn rate(&self) -> u64 {
        (self.acknowledged as f64 / self.time.as_secs_f64().max(0.001)) as u64
    }
}

impl Backoff {
    /// Returns one that bounds nothing yet.
    pub fn new() -> Self {
        Self {
            ceiling: u64::MAX,
            sample: Period::default(),
            period: Period::default(),
        }
    }

    /// Adds a period, and judges the loss once in about two round trips.
    pub fn observe(&mut self, period: Period, rtt: Duration) {
        self.period.add(period);
        if self.period.time >= (2 * rtt).max(Duration::from_millis(200)) {
            let period = mem::take(&mut self.period);
            self.judge(period);
        }
    }

    /// Draws no conclusions from losses that are known to be the link's.
    pub fn excuse(&mut self) {
        (self.sample, self.period) = (Period::default(), Period::default());
    }

    /// Lowers the ceiling to the rate of a sample with excessive loss; raises it by a quarter after each period without.
    ///
    /// A slow leg needs many periods for a sample. Its ceiling rises nevertheless, or the leg of a link that was faded
    /// would stay as slow as the fade has made it.
    fn judge(&mut self, period: Period) {
        self.sample.add(period);
        if self.sample.segments() >= SAMPLE {
            let sample = mem::take(&mut self.sample);
            if sample.has_excess_loss() {
                self.ceiling = sample.rate().max(FLOOR);
                return;
            }
        }
        if !period.has_excess_loss() {
            // Where it ends up above the link's rate the division bounds it.
            self.ceiling = self.ceiling.saturating_add(self.ceiling / 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(100);

    /// A period of 1.2 s, two round trips of a satellite link, with segments of 1448 bytes.
    fn period(arrived: u64, lost: u64) -> Period {
        Period {
            time: Duration::from_millis(1200),
            acknowledged: arrived * FLOOR,
            arrived,
            lost,
        }
    }

    fn backoff_at(ceiling: u64) -> Backoff {
        Backoff {
            ceiling,
            ..Backoff::new()
        }
    }

    #[test]
    fn excessive_loss_lowers_the_ceiling_to_the_rate_that_arrived() {
        let mut backoff = Backoff::new();
        backoff.judge(period(600, 120));
        assert_eq!(
            backoff.ceiling,
            u64::MAX,
            "the loss of a lossy link is not excessive"
        );
        backoff.judge(period(600, 400));
        assert_eq!(backoff.ceiling, 600 * FLOOR * 10 / 12);
        backoff.judge(period(0, 400));
        assert_eq!(backoff.ceiling, FLOOR);
    }

    #[test]
    fn few_segments_add_up_to_a_sample() {
        let mut backoff = Backoff::new();
        for _ in 0..9 {
            backoff.judge(period(6, 5));
            assert_eq!(backoff.ceiling, u64::MAX);
        }
        backoff.judge(period(6, 5));
        assert_eq!(backoff.ceiling, 6 * FLOOR * 10 / 12);
    }

    #[test]
    fn a_leg_recovers_from_an_outage() {
        let mut backoff = backoff_at(FLOOR);
        // The last that were lost are repeated.
        backoff.judge(period(1, 40));
        assert_eq!(backoff.ceiling, FLOOR);
        // The leg sends at its ceiling; 50 Mbit/s are 6.25 MB/s.
        let mut periods = 0;
        while backoff.ceiling < 6_250_000 {
            let segments = backoff.ceiling * 12 / 10 / FLOOR;
            backoff.judge(period(segments - segments / 10, segments / 10));
            periods += 1;
            assert!(
                periods < 60,
                "ceiling {} after {periods} periods",
                backoff.ceiling
            );
        }
    }

    #[test]
    fn a_leg_with_too_little_to_send_for_a_sample_gets_its_ceiling_back() {
        let mut backoff = backoff_at(FLOOR);
        (0..60).for_each(|_| backoff.judge(period(1, 0)));
        assert!(backoff.ceiling > 100 * FLOOR, "{}", backoff.ceiling);
        (0..300).for_each(|_| backoff.judge(period(0, 0)));
        assert_eq!(backoff.ceiling, u64::MAX);
    }

    #[test]
    fn only_segments_in_flight_without_acknowledgement_are_an_outage() {
        let outage = |acknowledged, in_flight| {
            let mut silence = Silence::default();
            (0..11).for_each(|_| silence.observe(acknowledged, in_flight, TICK));
            silence.is_outage(Duration::from_millis(100))
        };
        assert!(outage(0, 1448));
        assert!(!outage(1, 1448));
        assert!(!outage(0, 0), "a closed window");
        let mut silence = Silence(Duration::from_secs(19));
        assert!(!silence.is_outage(Duration::from_secs(10)));
        silence.observe(0, 1, Duration::from_secs(1));
        assert!(silence.is_outage(Duration::from_secs(10)));
        silence.observe(1, 1, TICK);
        assert!(!silence.is_outage(Duration::from_millis(1)));
    }
}
