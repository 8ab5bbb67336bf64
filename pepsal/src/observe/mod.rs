//! What others may see of the running daemon, and how they ask.
//!
//! - [`http`]: `/metrics`, in the text format of OpenMetrics ([`exposition`]), `/healthz` and `/readyz`, for Prometheus.
//! - [`admin`]: lines of JSON ([`protocol`]) over a Unix socket, for the commands in [`crate::ctl`].
//!
//! Nothing is measured until somebody asks. Then every flow is looked at once, on a thread that may block. Metrics,
//! readiness and status come from the same [`snapshot`], which is taken once a second at most, however many ask.
//!
//! Neither listener can keep connections from being relayed: who connects to them gets one of a fixed number of places,
//! the longest there makes room for the next ([`connections`]), and nobody is waited for.

pub mod admin;
pub mod exposition;
pub mod http;
pub mod log;
mod process;
pub mod protocol;
mod snapshot;
mod socket_file;
mod status;
mod connections;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use anyhow::Result;
use tokio::task::JoinSet;
use tracing::info;

use crate::{
    flow::Shared,
    observe::{snapshot::Snapshot, socket_file::SocketFile},
    wire::{attachment::Attached, counters::Counters, mark::Mark},
};

/// What is seen: the running daemon.
pub struct View {
    /// The last look at all of it.
    pub latest: snapshot::Latest,
    /// The flows and what is counted of them.
    pub shared: Arc<Shared>,
    /// What the kernel side counts.
    pub counters: Arc<Counters>,
    /// The interfaces whose new connections are to be intercepted.
    pub intercepted: Vec<String>,
    /// Where the programs are attached at present.
    pub attached: AttachedNow,
    /// The mark of server legs' packets on their way into an interface's ingress.
    pub mark: Mark,
    /// The host ends of the devices.
    pub devices: Vec<String>,
    /// Port of the listeners.
    pub port: u16,
    /// Most flows at once.
    pub limit: u32,
    /// When the daemon was started.
    pub started: SystemTime,
    /// Whether new connections are taken: not yet at the start, and no more at the end.
    pub ready: AtomicBool,
}

impl View {
    /// Notes whether new connections are taken.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Whether new connections are taken.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Returns a snapshot that is at most a second old.
    ///
    /// # Errors
    /// None in practice.
    pub async fn snapshot(self: &Arc<Self>) -> Result<Arc<Snapshot>> {
        let (view, this) = (self.clone(), self.clone());
        let is_current = move |snapshot: &Snapshot| snapshot.is_current(&view);
        self.latest.get(is_current, Snapshot::take(this)).await
    }
}

/// Where the programs are attached, for who does not have them at hand.
#[derive(Debug, Default)]
pub struct AttachedNow(Mutex<Vec<Attached>>);

impl AttachedNow {
    /// Takes over what is so now.
    pub fn set(&self, attached: Vec<Attached>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = attached;
    }

    /// What was so last.
    pub fn get(&self) -> Vec<Attached> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What serves; it stops, and its sockets are removed, when this is dropped.
pub struct Observatory {
    /// What is seen.
    pub view: Arc<View>,
    tasks: JoinSet<()>,
    files: Vec<SocketFile>,
}

impl Observatory {
    /// One that is not open yet.
    pub fn new(view: View) -> Self {
        Self {
            view: Arc::new(view),
            tasks: JoinSet::new(),
            files: Vec::new(),
        }
    }

    /// Serves metrics and the admin socket from now on, at these places or else at the usual ones.
    ///
    /// # Errors
    /// When a place that was asked for cannot be had, or another daemon has the admin socket.
    pub fn open(&mut self, metrics: Option<&http::Place>, admin: Option<&Path>) -> Result<()> {
        let metrics = http::bind(metrics)?;
        if let Some((listener, file)) = admin::bind(admin)? {
            info!(at = %listener, "admin socket");
            self.files.push(file);
            self.tasks.spawn(admin::serve(listener, self.view.clone()));
        }
        if let Some((listener, file)) = metrics {
            info!(at = %listener, "metrics");
            self.files.extend(file);
            self.tasks.spawn(http::serve(listener, self.view.clone()));
        }
        Ok(())
    }

    /// Leaves its places to another instance.
    pub async fn close(&mut self) {
        self.tasks.shutdown().await;
        self.files.clear();
    }
}
