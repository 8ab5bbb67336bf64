//! Totals of subscribers. Metrics have no label that depends on one, so that the number of series does not grow with theirs.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use crate::link::division::Subscriber;

/// A flow's number, its client's address, and the bytes that it has carried both ways.
pub type Carried = (u64, IpAddr, u64);

/// Counts subscribers, and remembers the bytes of flows from one count to the next.
#[derive(Debug, Default)]
pub struct Census(Mutex<HashMap<u64, u64>>);

/// Totals at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Subscribers that have flows.
    pub subscribers: usize,
    /// Flows of the subscriber that has most.
    pub flows_max: usize,
    /// Largest part that a subscriber has in the bytes that the flows have carried since the count before, from 0 to 1.
    pub bytes_max_ratio: f64,
}

#[derive(Default)]
struct Sum {
    flows: usize,
    bytes: u64,
}

impl Census {
    /// Counts the subscribers of these flows, which are all that are open or pending.
    pub fn take(&self, flows: &[Carried]) -> Totals {
        let mut before = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sums = HashMap::<Subscriber, Sum>::new();
        for (id, client, bytes) in flows {
            let sum = sums.entry(Subscriber::of(*client)).or_default();
            sum.flows += 1;
            sum.bytes += bytes - before.get(id).copied().unwrap_or_default().min(*bytes);
        }
        *before = flows.iter().map(|(id, _, bytes)| (*id, *bytes)).collect();
        let bytes: u64 = sums.values().map(|sum| sum.bytes).sum();
        let bytes_max = sums.values().map(|sum| sum.bytes).max().unwrap_or_default();
        Totals {
            subscribers: sums.len(),
            flows_max: sums.values().map(|sum| sum.flows).max().unwrap_or_default(),
            bytes_max_ratio: bytes_max as f64 / bytes.max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_part_is_of_the_bytes_since_the_count_before() {
        let address = |text: &str| text.parse().unwrap();
        let [a, b, same] = ["10.1.0.2", "fd01::2", "fd01::3"].map(address);
        let census = Census::default();
        assert_eq!(census.take(&[]), Totals::default());
        let totals = census.take(&[(1, a, 100), (2, b, 200), (3, same, 100)]);
        assert_eq!((totals.subscribers, totals.flows_max), (2, 2));
        assert_eq!(totals.bytes_max_ratio, 0.75);
        let totals = census.take(&[(1, a, 200), (2, b, 200)]);
        assert_eq!((totals.subscribers, totals.flows_max), (2, 1));
        assert_eq!(totals.bytes_max_ratio, 1.0);
        assert_eq!(census.take(&[(1, a, 200)]).bytes_max_ratio, 0.0);
    }
}
