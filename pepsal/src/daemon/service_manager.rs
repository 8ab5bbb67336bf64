//! Notifications to the service manager (sd_notify(3)); none without `NOTIFY_SOCKET`.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;
use tracing::debug;

use crate::host::cgroup;

/// Time of a stop beyond the drain timeout.
const STOP_ALLOWANCE: Duration = Duration::from_secs(10);

/// The service manager, and the last notified state.
#[derive(Debug, Default)]
pub struct ServiceManager {
    flows: Option<usize>,
    /// Whether another process is the main process of the service.
    has_another: bool,
}

impl ServiceManager {
    /// Notifies that connections are intercepted.
    pub fn ready(&mut self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// Sends a watchdog notification, with the number of open flows if it has changed.
    pub fn alive(&mut self, flows: usize) {
        if self.flows.replace(flows) == Some(flows) {
            self.tell(&[NotifyState::Watchdog]);
        } else {
            let status = match flows {
                1 => "1 open flow".to_owned(),
                _ => format!("{flows} open flows"),
            };
            self.tell(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
        }
    }

    /// Notifies of a reload; [`ServiceManager::ready`] ends it, after success or failure.
    pub fn reloading(&mut self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => debug!("cannot read the time of a reload: {error}"),
        }
    }

    /// Notifies of the new main process, if it belongs to the same service.
    pub fn succeeded_by(&mut self, process: i32) {
        if cgroup::is_of_same_service(process) {
            self.tell(&[NotifyState::MainPid(process.unsigned_abs())]);
            self.has_another = true;
        }
    }

    /// Sends watchdog notifications after the keeper has stopped; never returns.
    pub async fn keep_alive(&self, interval: Duration) {
        loop {
            self.tell(&[NotifyState::Watchdog]);
            sleep(interval).await;
        }
    }

    /// Notifies of a stop, with the drain timeout, before which the service manager must not kill the
    /// process.
    pub fn stopping(&mut self, drain: Duration) {
        let extension = u32::try_from((drain + STOP_ALLOWANCE).as_micros()).unwrap_or(u32::MAX);
        self.tell(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(extension)]);
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        if self.has_another {
            return;
        }
        if let Err(error) = sd_notify::notify(states) {
            debug!("cannot notify the service manager: {error}");
        }
    }
}
