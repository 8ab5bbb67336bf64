//! The running proxy, and the tasks that all flows need.

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

/// Everything that is set up, in the order in which it is taken down again: the programs stop redirecting before the
/// devices go.
pub struct Proxy {
    pub observatory: Observatory,
    pub attachments: Attachments,
    pub programs: Programs,
    pub clients: Device,
    pub servers: Device,
    /// None once another has taken over, like `requests`.
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
    /// Accepts from these listeners.
    pub fn accept_from(&mut self, pairs: &[Arc<Pair>]) {
        for pair in pairs {
            let accept = accept(pair.clone(), self.shared.clone(), self.workers.clone());
            self.attend(&self.workers.acceptor().clone(), accept);
        }
    }

    /// Has the filter of flows know those that are open, and forget those that are not, with every generation.
    pub fn keep_filter(&mut self) {
        let (filter, flows) = (self.programs.filter().clone(), self.programs.flows().clone());
        let mut generations = interval_at(Instant::now() + GENERATION, GENERATION);
        let keep = async move {
            loop {
                generations.tick().await;
                let (filter, flows) = (filter.clone(), flows.clone());
                // Without the list the generation stays, and with it all flows.
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

    /// Divides the rates of these links.
    pub fn keep_budgets(&mut self, links: &[Arc<Link>]) {
        for link in links {
            let budget = link.budget.clone();
            self.attend(&Handle::current(), async move { budget.keep().await });
        }
    }

    /// Runs what all flows need beside what this task does itself. A daemon that no longer accepts, but shows that it is
    /// alive, would swallow every new connection: so a panic there is the daemon's own, whose death lets them pass.
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
