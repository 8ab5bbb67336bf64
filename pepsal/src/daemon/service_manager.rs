//! What the service manager is told (sd_notify(3)): nothing where there is none, which is known by `NOTIFY_SOCKET`.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::sleep;
use tracing::debug;

use crate::host::cgroup;

/// What the service manager gets on top of the time to drain, for what else a stop takes.
const STOP_ALLOWANCE: Duration = Duration::from_secs(10);

/// The service manager, and what it knows of us.
#[derive(Debug, Default)]
pub struct ServiceManager {
    flows: Option<usize>,
    /// It watches over another process now, and would only wonder.
    has_another: bool,
}

impl ServiceManager {
    /// Connections are intercepted.
    pub fn ready(&mut self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// A sign of life, for the watchdog, and the number of open flows when it has changed.
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

    /// The configuration is being read again; [`ServiceManager::ready`] ends it, whatever became of it.
    pub fn reloading(&mut self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(error) => debug!("cannot read the time of a reload: {error}"),
        }
    }

    /// Another process is the service's main one from now on, if it is one of the service's at all.
    pub fn succeeded_by(&mut self, process: i32) {
        if cgroup::is_of_same_service(process) {
            self.tell(&[NotifyState::MainPid(process.unsigned_abs())]);
            self.has_another = true;
        }
    }

    /// Gives signs of life for as long as it is polled, for when the keeper makes no rounds any more.
    pub async fn keep_alive(&self, interval: Duration) {
        loop {
            self.tell(&[NotifyState::Watchdog]);
            sleep(interval).await;
        }
    }

    /// New connections pass, and open flows have `drain` to end: the service manager must not kill before that.
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
