//! What flows came to, and which faults there were when they did.

use std::{
    io::{self, ErrorKind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::faults::Fault;

/// How long after a fault flows may still break by it: as long as retransmissions take to find out.
const AFTERMATH: Duration = Duration::from_secs(10);

/// Counted by all flows.
#[derive(Default)]
pub struct Totals {
    /// Flows whose every byte arrived.
    pub complete: Counter,
    /// Flows that their client broke off on purpose.
    pub cancelled: Counter,
    /// Connections that could not be made, or broke, while a fault accounts for it.
    pub broken: Counter,
    /// Payload bytes that were compared and found right.
    pub checked: Counter,
    /// Payload bytes that were wrong, or missing before an orderly end.
    pub lost: Counter,
    unexplained: Mutex<Vec<String>>,
    damage: Mutex<Vec<String>>,
    faults: Mutex<Vec<Inflicted>>,
}

#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Makes it more.
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
    /// A fault is about to be inflicted.
    pub fn fault_begins(&self, fault: Fault) {
        lock(&self.faults).push(Inflicted { fault, end: None });
    }

    /// It is over.
    pub fn fault_ends(&self) {
        if let Some(last) = lock(&self.faults).last_mut() {
            last.end = Some(Instant::now());
        }
    }

    /// A flow broke, or was never made. Only a fault may account for that, at any time since the flow began: one that breaks
    /// open flows, or, while it was being made, one that breaks new flows. No fault accounts for a peer that was left waiting:
    /// whatever ends a flow tells both ends.
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

    /// Bytes are wrong, or an end came before its time.
    pub fn damaged(&self, bytes: u64, what: String) {
        self.lost.add(bytes.max(1));
        lock(&self.damage).push(what);
    }

    /// For the line that shows how far things are.
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

    /// How often each fault was inflicted.
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
