//! The running proxy, and its tasks for all flows.

use std::sync::Arc;

use anyhow::Result;
use tokio::{
    runtime::Handle,
    task::{JoinSet, spawn_blocking},
    time::{Instant, interval_at},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::{
    daemon::{accept::accept, keeper::Keeper, workers::Workers},
    flow::{
        Shared,
        listener::{Listeners, Pair},
    },
    link::{rate_control::RateControl, registry::Link},
    observe::Observatory,
    wire::{
        attachment::Attachments,
        claims::{Claims, Requests},
        device::Device,
        filter::GENERATION,
        interfaces::Changes,
        programs::Programs,
    },
};

/// The resources of the proxy, in the order of their removal: programs stop redirecting before the devices
/// are removed.
pub struct Proxy {
    pub observatory: Observatory,
    pub attachments: Attachments,
    pub programs: Programs,
    pub clients: Device,
    pub servers: Device,
    /// None after a takeover, like `requests`.
    pub claims: Option<Claims>,
    pub requests: Option<Arc<Requests>>,
    pub rate_control: Result<RateControl>,
    pub listeners: Listeners,
    pub intercepted: Vec<String>,
    pub limit: u32,
    pub changes: Changes,
    pub keeper: Keeper,
    pub shared: Arc<Shared>,
    pub workers: Arc<Workers>,
    pub accepting: CancellationToken,
    pub attendants: JoinSet<()>,
}

impl Proxy {
    /// Starts to accept from these listeners.
    pub fn accept_from(&mut self, pairs: &[Arc<Pair>]) {
        for pair in pairs {
            let accept = accept(pair.clone(), self.shared.clone(), self.workers.clone());
            self.attend(&self.workers.acceptor().clone(), accept);
        }
    }

    /// Writes the open flows to the filter of flows in every generation.
    pub fn keep_filter(&mut self) {
        let (filter, flows) = (self.programs.filter().clone(), self.programs.flows().clone());
        let mut generations = interval_at(Instant::now() + GENERATION, GENERATION);
        let keep = async move {
            loop {
                generations.tick().await;
                let (filter, flows) = (filter.clone(), flows.clone());
                // Without the list the generation does not change, so all flows stay in the filter.
                let advance = move || {
                    flows
                        .try_all()
                        .map(|all| filter.advance(all.iter().map(|(key, _)| key)))
                };
                if let Ok(Err(error)) = spawn_blocking(advance).await {
                    warn!("cannot read the kernel's flow map: {error}");
                }
            }
        };
        self.attend(&Handle::current(), keep);
    }

    /// Starts the budgets of these links.
    pub fn keep_budgets(&mut self, links: &[Arc<Link>]) {
        for link in links {
            let budget = link.budget.clone();
            self.attend(&Handle::current(), async move { budget.keep().await });
        }
    }

    /// Runs a task for all flows. A daemon that sends heartbeats without accepting would lose every new
    /// connection, so a panic in the task ends the daemon, and new connections pass.
    fn attend(&mut self, runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.accepting.clone().run_until_cancelled_owned(task);
        self.attendants.spawn_on(
            async move {
                task.await;
            },
            runtime,
        );
    }
}
