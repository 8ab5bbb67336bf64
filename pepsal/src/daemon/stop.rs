//! The end: after a takeover, by a drain, or at once.

use std::time::Duration;

use pepsal_ebpf::Counter;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::{
    daemon::proxy::Proxy,
    flow::{close_reason::CloseReason, metrics::Event},
    wire::claims::Successor,
};

/// How long a stop waits for handshakes that are under way.
const HANDSHAKES: Duration = Duration::from_secs(2);
/// The same when nobody waits for the stop: long enough for answers that had to be repeated.
pub const HANDSHAKES_LEFT: Duration = Duration::from_secs(10);
/// How long flows may take to end at once.
const RESETS: Duration = Duration::from_secs(2);
/// How long a stop waits until the peers have acknowledged the last FINs. After that nobody repeats them.
const LAST_FINS: Duration = Duration::from_secs(5);

impl Proxy {
    /// Leaves everything but the open flows to another instance.
    pub async fn hand_over(&mut self, successor: Successor) {
        if let Err(error) = self.programs.retire() {
            warn!("{error:#}");
            self.programs.close();
        }
        self.requests = None;
        self.observatory.view.set_ready(false);
        self.observatory.close().await;
        // Before it can speak for itself.
        if let Some(process) = successor.process() {
            self.keeper.service_manager.succeeded_by(process);
        }
        if let Some(claims) = self.claims.take() {
            successor.hand_over(claims).await;
        }
    }

    /// Lets open flows come to their end, those too whose handshake is completed within `handshakes`.
    pub async fn finish(&self, handshakes: Duration) {
        let _ = timeout(handshakes, async {
            while self.shared.table.pending() > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        self.workers.finished().await;
    }

    /// Has new connections pass, lets open flows come to their end, and ends at `deadline` those that have not.
    pub async fn drain(&mut self, deadline: Duration) {
        self.observatory.view.set_ready(false);
        self.programs.close();
        if timeout(deadline, self.finish(HANDSHAKES)).await.is_ok() {
            self.keeper.write_table(&self.shared);
        } else {
            info!(
                flows = self.shared.table.count(),
                "resetting the flows that are still open"
            );
            self.reset_flows().await;
        }
    }

    /// Ends all flows, by a reset of both legs, before what their packets pass is taken away.
    pub async fn reset_flows(&mut self) {
        self.keeper.write_table(&self.shared);
        self.shared.stop.cancel();
        let _ = timeout(RESETS, self.workers.finished()).await;
    }

    /// Waits until the peers have acknowledged the last FINs, bounded, before the devices go.
    pub async fn take_down(self) {
        self.accepting.cancel();
        let _ = timeout(LAST_FINS, async {
            while self.clients.has_unacknowledged_fins() || self.servers.has_unacknowledged_fins() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// What became of everything, in two lines.
    pub fn report(&mut self) {
        let metrics = &self.shared.metrics;
        let (up, down) = metrics.bytes();
        let counts = |counts: Vec<(String, u64)>| {
            let seen: Vec<String> = counts
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(|(name, n)| format!("{name}={n}"))
                .collect();
            seen.join(" ")
        };
        let kernel = Counter::ALL
            .iter()
            .map(|counter| (counter.name().to_owned(), self.programs.count(*counter)));
        let events = Event::ALL
            .iter()
            .map(|event| (event.name().to_owned(), metrics.events(*event)));
        let closed = CloseReason::ALL
            .iter()
            .map(|reason| (reason.name(), metrics.closed(*reason)));
        info!(up, down, "flows: {}", counts(events.chain(closed).collect()));
        info!("packets: {}", counts(kernel.collect()));
    }
}
