//! Results of flows, and the faults during them.

use std::{
    io::{self, ErrorKind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::faults::Fault;

/// Time after a fault during which flows may break by it: that of retransmissions.
const AFTERMATH: Duration = Duration::from_secs(10);

/// Counted by all flows.
#[derive(Default)]
pub struct Totals {
    /// Complete flows.
    pub complete: Counter,
    /// Flows with a planned reset by the client.
    pub cancelled: Counter,
    /// Failed or broken connections that a fault explains.
    pub broken: Counter,
    /// Correct payload bytes.
    pub checked: Counter,
    /// Wrong payload bytes, or bytes missing before a FIN.
    pub lost: Counter,
    unexplained: Mutex<Vec<String>>,
    damage: Mutex<Vec<String>>,
    faults: Mutex<Vec<Inflicted>>,
}

#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to the counter.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

struct Inflicted {
    fault: Fault,
    end: Option<Instant>,
}

impl Totals {
    /// Records the start of a fault.
    pub fn fault_begins(&self, fault: Fault) {
        lock(&self.faults).push(Inflicted { fault, end: None });
    }

    /// Records the end of a fault.
    pub fn fault_ends(&self) {
        if let Some(last) = lock(&self.faults).last_mut() {
            last.end = Some(Instant::now());
        }
    }

    /// Records a broken or failed flow. A fault has to explain it, at any time since the flow began: one that
    /// breaks open flows or, during the handshake, one that breaks new flows. No fault explains a peer
    /// without notice: every end of a flow is visible at both ends.
    pub fn broke(&self, begin: Instant, is_open: bool, error: &io::Error, what: &str) {
        let accounts = |inflicted: &Inflicted| {
            let is_over = inflicted.end.is_some_and(|end| end + AFTERMATH < begin);
            !is_over
                && match is_open {
                    true => inflicted.fault.breaks_open_flows(),
                    false => inflicted.fault.breaks_new_flows(),
                }
        };
        let left_waiting = matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock);
        if !left_waiting && lock(&self.faults).iter().any(accounts) {
            self.broken.add(1);
        } else {
            lock(&self.unexplained).push(format!("{what}: {error}"));
        }
    }

    /// Records wrong bytes, or an early end by FIN.
    pub fn damaged(&self, bytes: u64, what: String) {
        self.lost.add(bytes.max(1));
        lock(&self.damage).push(what);
    }

    /// Formats the progress line.
    pub fn in_short(&self) -> String {
        format!(
            "{} flows, {:.1} MB checked, {} lost, {} broken by {} faults",
            self.complete.get(),
            self.checked.get() as f64 / 1e6,
            self.lost.get(),
            self.broken.get(),
            lock(&self.faults).len()
        )
    }

    /// The sums.
    pub fn rows(&self, time: Duration) -> Vec<[String; 2]> {
        let row = |name: &str, value: String| [name.to_owned(), value];
        let rate = self.checked.get() as f64 * 8.0 / time.as_secs_f64() / 1e6;
        vec![
            row("time", format!("{:.0} s", time.as_secs_f64())),
            row("flows complete", self.complete.get().to_string()),
            row(
                "flows cancelled by their client",
                self.cancelled.get().to_string(),
            ),
            row("flows broken by faults", self.broken.get().to_string()),
            row(
                "flows broken by nothing",
                lock(&self.unexplained).len().to_string(),
            ),
            row("bytes checked", self.checked.get().to_string()),
            row("load held", format!("{rate:.1} Mbit/s")),
            row("bytes lost", self.lost.get().to_string()),
        ]
    }

    /// Number of injections of each fault.
    pub fn fault_rows(&self) -> Vec<[String; 2]> {
        let faults = lock(&self.faults);
        let row = |fault: &Fault| {
            let count = faults
                .iter()
                .filter(|inflicted| inflicted.fault == *fault)
                .count();
            [fault.to_string(), count.to_string()]
        };
        Fault::ALL.iter().map(row).collect()
    }

    pub fn complaints(&self) -> Vec<String> {
        let mut complaints = lock(&self.damage).clone();
        complaints.extend(lock(&self.unexplained).iter().cloned());
        if self.complete.get() == 0 {
            complaints.push("no flow was completed".to_owned());
        }
        complaints
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_may_break_only_by_faults_that_break_flows() {
        let totals = Totals::default();
        let begin = Instant::now();
        let broke = |begin, is_open, kind: ErrorKind, what| {
            totals.broke(begin, is_open, &kind.into(), what);
        };
        let reset = ErrorKind::ConnectionReset;
        broke(begin, true, reset, "before any");
        totals.fault_begins(Fault::Firewall);
        totals.fault_ends();
        broke(begin, false, reset, "new when the firewall was loaded");
        totals.fault_begins(Fault::Hang);
        totals.fault_ends();
        broke(begin, true, reset, "open during a hang");
        broke(begin, false, reset, "new during a hang");
        totals.fault_begins(Fault::Kill);
        totals.fault_ends();
        broke(begin, true, reset, "open when killed");
        broke(begin, true, ErrorKind::TimedOut, "waiting when killed");
        broke(Instant::now() + AFTERMATH * 2, true, reset, "long after");
        let complaints = totals.complaints();
        let whats: Vec<_> = complaints
            .iter()
            .filter_map(|what| what.split(':').next())
            .collect();
        assert_eq!(
            whats[..5],
            [
                "before any",
                "new when the firewall was loaded",
                "open during a hang",
                "waiting when killed",
                "long after"
            ]
        );
        assert_eq!(totals.broken.get(), 2);
    }
}
