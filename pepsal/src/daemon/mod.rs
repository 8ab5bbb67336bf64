//! The daemon: its start ([`start`]), what it looks after while flows come and go ([`keeper`], [`network`], [`reload`]), and its
//! end ([`stop`]). Connections are accepted ([`accept`]) for threads that carry flows ([`workers`]). [`privileges`] are given up
//! before, and the [`service_manager`] is notified of all of it.

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

/// Runs the proxy until it is told to stop. `cgroup` is the control group of this process, for initial windows, or why
/// there is none, `namespaces` are those of the legs. `ready` is called once connections are intercepted.
///
/// # Errors
/// Whatever keeps it from starting, as one line for the user. Nothing stays behind then.
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
    /// Accepts and looks after things until `stop`, or until another instance wants to take over.
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
