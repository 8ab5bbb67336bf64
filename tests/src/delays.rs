//! A histogram of delays, which is updated concurrently.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Steps per power of two of microseconds: a quantile is at most 1/16 too high.
const STEPS: usize = 16;
/// Up to 2^32 us, more than an hour.
const BUCKETS: usize = (32 - 3) * STEPS;

/// Delays by bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delays(Box<[u64]>);

impl Delays {
    /// Returns the delays after `earlier` was taken.
    pub fn since(&self, earlier: &Self) -> Self {
        let differences = self.0.iter().zip(&earlier.0).map(|(now, then)| now - then);
        Self(differences.collect())
    }

    /// Returns the number of delays.
    pub fn count(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Returns a quantile, `0.95` for the 95th percentile; none without delays.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = ((self.count() as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = self.0.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_micros(most_of(bucket)))
    }
}

/// Counters of a running link.
#[derive(Debug)]
pub(crate) struct DelayCounters(Box<[AtomicU64]>);

impl Default for DelayCounters {
    fn default() -> Self {
        Self((0..BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }
}

impl DelayCounters {
    pub(crate) fn count(&self, delay: Duration) {
        let microseconds = u64::try_from(delay.as_micros()).unwrap_or(u64::MAX);
        self.0[bucket_of(microseconds)].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Delays {
        Delays(self.0.iter().map(|count| count.load(Ordering::Relaxed)).collect())
    }
}

fn bucket_of(microseconds: u64) -> usize {
    let power = microseconds.max(1).ilog2() as usize;
    let bucket = match power {
        0..=3 => microseconds as usize,
        _ => (power - 3) * STEPS + (microseconds >> (power - 4)) as usize - STEPS,
    };
    bucket.min(BUCKETS - 1)
}

/// Returns the upper bound of a bucket.
fn most_of(bucket: usize) -> u64 {
    match bucket / STEPS {
        0 => bucket as u64,
        group => (((bucket % STEPS + STEPS + 1) as u64) << (group - 1)) - 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_delay_is_in_a_bucket_that_reaches_it_closely() {
        for microseconds in (0..5000).chain([65_535, 65_536, 600_000, 1 << 31, (1 << 32) - 1]) {
            let most = most_of(bucket_of(microseconds));
            assert!(most >= microseconds, "{microseconds} us up to {most}");
            assert!(
                most <= microseconds + microseconds / 16,
                "{microseconds} us up to {most}"
            );
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_of_what_came_since() {
        let counters = DelayCounters::default();
        assert_eq!(counters.read().quantile(0.5), None);
        (0..1000).for_each(|_| counters.count(Duration::from_secs(1)));
        let earlier = counters.read();
        (1..=15).for_each(|n| counters.count(Duration::from_micros(n)));
        let since = counters.read().since(&earlier);
        assert_eq!(since.count(), 15);
        assert_eq!(since.quantile(0.0), Some(Duration::from_micros(1)));
        assert_eq!(since.quantile(0.5), Some(Duration::from_micros(8)));
        assert_eq!(since.quantile(1.0), Some(Duration::from_micros(15)));
    }
}
