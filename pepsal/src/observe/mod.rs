//! Monitoring of the running daemon ([`view`]).
//!
//! - [`http`]: `/metrics`, in the text format of OpenMetrics ([`exposition`]), `/healthz` and `/readyz`, for Prometheus.
//! - [`admin`]: lines of JSON ([`protocol`]) over a Unix socket, for the commands in [`crate::ctl`].
//!
//! The daemon measures only on request, and then reads every flow once, on a thread that may block. Metrics,
//! readiness and status use the same [`snapshot`], which is taken at most once a second for any number of
//! requests.
//!
//! Requests cannot stop the relay: each listener has a fixed number of connections, the oldest of which is
//! closed for the next ([`connections`]), and waits for none of them.

pub(crate) mod view;
pub(crate) mod protocol;
mod status;
mod clients;
pub(crate) mod subscribers;
mod exposition;
mod snapshot;
pub mod admin;
pub(crate) mod http;
mod connections;
mod socket_file;
pub mod log;
mod process;

use std::{path::Path, sync::Arc};

use anyhow::Result;
use tokio::task::JoinSet;
use tracing::info;

use crate::observe::{snapshot::Snapshots, socket_file::SocketFile, view::View};

/// The listeners of metrics and admin socket. Dropping it stops them and removes their socket files.
pub(crate) struct Observatory {
    pub view: Arc<View>,
    snapshots: Arc<Snapshots>,
    tasks: JoinSet<()>,
    files: Vec<SocketFile>,
}

impl Observatory {
    pub fn new(view: View) -> Self {
        let view = Arc::new(view);
        Self {
            snapshots: Arc::new(Snapshots::new(view.clone())),
            view,
            tasks: JoinSet::new(),
            files: Vec::new(),
        }
    }

    /// Starts to serve metrics and the admin socket, at these addresses or at the default ones.
    ///
    /// # Errors
    /// When a given address cannot be bound, or another daemon has the admin socket.
    pub fn open(&mut self, metrics: Option<&http::Place>, admin: Option<&Path>) -> Result<()> {
        let metrics = http::bind(metrics)?;
        if let Some((listener, file)) = admin::bind(admin)? {
            info!(at = %listener, "admin socket");
            self.files.push(file);
            self.tasks.spawn(admin::serve(listener, self.snapshots.clone()));
        }
        if let Some((listener, file)) = metrics {
            info!(at = %listener, "metrics");
            self.files.extend(file);
            self.tasks.spawn(http::serve(listener, self.snapshots.clone()));
        }
        Ok(())
    }

    /// Closes the listeners, for another instance.
    pub async fn close(&mut self) {
        self.tasks.shutdown().await;
        self.files.clear();
    }
}
