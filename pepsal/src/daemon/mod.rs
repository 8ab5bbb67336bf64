//! The daemon: start ([`start`]), periodic work and events while it runs ([`keeper`], [`network`],
//! [`reload`]), and stop ([`stop`]). [`accept`] accepts connections for the threads that relay flows
//! ([`workers`]). The daemon drops [`privileges`] before the first connection, and notifies the
//! [`service_manager`] of changes of its state.

pub mod privileges;
mod start;
mod settings;
pub mod profiles;
mod proxy;
mod accept;
mod workers;
mod keeper;
mod network;
mod reload;
mod stop;
mod service_manager;

use std::{future::pending, panic::resume_unwind, pin::pin, sync::Arc};

use anyhow::Result;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval},
};
use tracing::info;

use crate::{
    config::Configuration,
    daemon::{proxy::Proxy, reload::Reloader},
    host::cgroup::OwnCgroup,
    observe::log::Log,
    wire::{
        Namespaces,
        claims::{Requests, Successor},
    },
};

/// Runs the proxy until a signal stops it. `cgroup` is the control group of this process, for initial
/// windows, or the reason why there is none; `namespaces` are those of the legs. Calls `ready` once
/// connections are intercepted.
///
/// # Errors
/// The error of a failed start, as one line for the user. A failed start leaves nothing in the host.
pub async fn run(
    configuration: Configuration,
    log: &Log,
    cgroup: Result<OwnCgroup>,
    namespaces: Namespaces,
    ready: impl FnOnce(),
) -> Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let mut proxy = Proxy::start(&configuration.options, cgroup, namespaces).await?;
    let options = &configuration.options;
    let names = options.interfaces.join(",");
    info!(interfaces = names, port = options.port, limit = proxy.limit, mark = %options.steering.mark, "ready");
    ready();
    proxy.keeper.service_manager.ready();

    let mut reloader = Reloader::new(configuration, log);
    let stopping = stopped(&mut terminate, &mut interrupt);
    if let Some(successor) = proxy.serve(stopping, &mut hangup, &mut reloader).await {
        let process = successor.process();
        proxy.hand_over(successor).await;
        let process = process.map_or_else(|| "of unknown number".to_owned(), |process| process.to_string());
        info!(
            flows = proxy.shared.table.count(),
            "takeover by process {process}: draining"
        );
        tokio::select! {
            () = proxy.finish(stop::HANDSHAKES_LEFT) => {}
            () = proxy.keeper.service_manager.keep_alive(keeper::ROUND) => {}
            () = stopped(&mut terminate, &mut interrupt) => {}
        }
    }
    info!(
        flows = proxy.shared.table.count(),
        "stopping: new connections are not intercepted"
    );
    let drain = reloader.options().drain_timeout;
    proxy.keeper.service_manager.stopping(drain);
    tokio::select! {
        () = proxy.drain(drain) => {}
        () = stopped(&mut terminate, &mut interrupt) => {
            info!("second signal: resetting all flows");
            proxy.reset_flows().await;
        }
    }
    proxy.report();
    proxy.take_down().await;
    Ok(())
}

async fn stopped(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

impl Proxy {
    /// Accepts connections and handles events until `stop`, or until another instance requests a takeover,
    /// which is returned.
    async fn serve(
        &mut self,
        stop: impl Future<Output = ()>,
        hangup: &mut Signal,
        reloader: &mut Reloader<'_>,
    ) -> Option<Successor> {
        self.accept_from(&self.listeners.pairs.clone());
        self.keep_budgets(&self.shared.links.all());
        self.keep_filter();
        let mut stop = pin!(stop);
        let mut successor = pin!(requested(self.requests.clone()));
        let mut rounds = interval(keeper::ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut stop => return None,
                successor = &mut successor => return Some(successor),
                _ = rounds.tick() => {
                    self.keeper.round(&mut self.programs, &self.shared, &self.workers);
                    let devices = [&self.clients, &self.servers];
                    if !self.attachments.are_intact(&mut self.programs, devices) {
                        self.adapt().await;
                    }
                }
                () = self.changes.next() => self.adapt().await,
                _ = hangup.recv(), if reloader.is_idle() => {
                    self.keeper.service_manager.reloading();
                    reloader.read();
                    if reloader.is_idle() {
                        self.keeper.service_manager.ready();
                    }
                }
                Some(read) = reloader.next() => {
                    reloader.apply(read, self).await;
                    self.keeper.service_manager.ready();
                }
                Some(Err(error)) = self.attendants.join_next() => if let Ok(panic) = error.try_into_panic() {
                    resume_unwind(panic);
                },
            }
        }
    }
}

/// Resolves when another instance requests a takeover; never after the hand-over.
async fn requested(requests: Option<Arc<Requests>>) -> Successor {
    match requests {
        Some(requests) => requests.next().await,
        None => pending().await,
    }
}
