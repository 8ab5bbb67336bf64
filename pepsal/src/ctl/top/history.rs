//! Rates of the last minutes.

use std::collections::{HashMap, VecDeque};

use crate::observe::protocol::Flows;

/// Samples of the sum of all flows.
const LONG: usize = 512;
/// Samples of each flow.
const SHORT: usize = 8;

/// Samples in bytes per second, the newest last.
#[derive(Debug, Default)]
pub struct History {
    /// Of all flows, from clients to servers.
    pub up: VecDeque<u64>,
    /// Of all flows, from servers to clients.
    pub down: VecDeque<u64>,
    flows: HashMap<u64, VecDeque<u64>>,
}

impl History {
    pub fn add(&mut self, flows: &Flows) {
        let (mut up, mut down) = (0.0, 0.0);
        let mut present = HashMap::with_capacity(flows.list.len());
        for flow in &flows.list {
            let rates = flow.bytes_per_second;
            (up, down) = (up + rates.up, down + rates.down);
            let mut history = self.flows.remove(&flow.id).unwrap_or_default();
            push(&mut history, rates.up + rates.down, SHORT);
            present.insert(flow.id, history);
        }
        self.flows = present;
        push(&mut self.up, up, LONG);
        push(&mut self.down, down, LONG);
    }

    /// Returns the sum of a flow's rates as bars, relative to its maximum.
    pub fn bars(&self, flow: u64) -> String {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let Some(history) = self.flows.get(&flow) else {
            return String::new();
        };
        let highest = history.iter().copied().max().unwrap_or(0).max(1);
        let bar = |rate: &u64| BARS[(rate * 7).div_ceil(highest).min(7) as usize];
        history.iter().map(bar).collect()
    }
}

fn push(history: &mut VecDeque<u64>, rate: f64, most: usize) {
    if history.len() == most {
        history.pop_front();
    }
    history.push_back(rate as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_relative_to_the_highest() {
        let mut history = History::default();
        history.flows.insert(1, VecDeque::from([0, 50, 100]));
        assert_eq!(history.bars(1), "▁▅█");
        assert_eq!(history.bars(2), "");
    }
}
