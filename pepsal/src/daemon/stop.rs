//! The stop: after a takeover, by a drain, or at once.

use std::time::Duration;

use pepsal_ebpf::Counter;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::{
    daemon::proxy::Proxy,
    flow::{close_reason::CloseReason, metrics::Event},
    wire::claims::Successor,
};

/// Time for which a stop waits for handshakes in progress.
const HANDSHAKES: Duration = Duration::from_secs(2);
/// The same after a takeover: long enough for retransmissions.
pub const HANDSHAKES_LEFT: Duration = Duration::from_secs(10);
/// Time limit of resetting all flows.
const RESETS: Duration = Duration::from_secs(2);
/// Time for which a stop waits for acknowledgements of the last FINs, which cannot be retransmitted after it.
const LAST_FINS: Duration = Duration::from_secs(5);

impl Proxy {
    /// Hands over to another instance, except the open flows.
    pub async fn hand_over(&mut self, successor: Successor) {
        if let Err(error) = self.programs.retire() {
            warn!("{error:#}");
            self.programs.close();
        }
        self.requests = None;
        self.observatory.view.set_ready(false);
        self.observatory.close().await;
        // Before the successor notifies the service manager itself.
        if let Some(process) = successor.process() {
            self.keeper.service_manager.succeeded_by(process);
        }
        if let Some(claims) = self.claims.take() {
            successor.hand_over(claims).await;
        }
    }

    /// Waits for the end of all flows, including those whose handshake completes within `handshakes`.
    pub async fn finish(&self, handshakes: Duration) {
        let _ = timeout(handshakes, async {
            while self.shared.table.pending() > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        self.workers.finished().await;
    }

    /// Stops interception, waits for the end of open flows, and resets the remaining ones after `deadline`.
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

    /// Resets both legs of all flows, before the programs and devices that their packets need are removed.
    pub async fn reset_flows(&mut self) {
        self.keeper.write_table(&self.shared);
        self.shared.stop.cancel();
        let _ = timeout(RESETS, self.workers.finished()).await;
    }

    /// Waits, with a limit, until the peers have acknowledged the last FINs, and then removes the devices.
    pub async fn take_down(self) {
        self.accepting.cancel();
        let _ = timeout(LAST_FINS, async {
            while self.clients.has_unacknowledged_fins() || self.servers.has_unacknowledged_fins() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// Logs all counters, in two lines.
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
