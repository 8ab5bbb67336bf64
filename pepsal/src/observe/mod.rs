//! What others may see of the running daemon ([`view`]), and how they ask.
//!
//! - [`http`]: `/metrics`, in the text format of OpenMetrics ([`exposition`]), `/healthz` and `/readyz`, for Prometheus.
//! - [`admin`]: lines of JSON ([`protocol`]) over a Unix socket, for the commands in [`crate::ctl`].
//!
//! Nothing is measured until somebody asks. Then every flow is looked at once, on a thread that may block. Metrics,
//! readiness and status come from the same [`snapshot`], which is taken once a second at most, however many ask.
//!
//! Neither listener can keep connections from being relayed: who connects to them gets one of a fixed number of places,
//! the longest there makes room for the next ([`connections`]), and nobody is waited for.

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

/// What serves; it stops, and its sockets are removed, when this is dropped.
pub struct Observatory {
    /// What is seen.
    pub view: Arc<View>,
    snapshots: Arc<Snapshots>,
    tasks: JoinSet<()>,
    files: Vec<SocketFile>,
}

impl Observatory {
    /// One that is not open yet.
    pub fn new(view: View) -> Self {
        let view = Arc::new(view);
        Self {
            snapshots: Arc::new(Snapshots::new(view.clone())),
            view,
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
            self.tasks.spawn(admin::serve(listener, self.snapshots.clone()));
        }
        if let Some((listener, file)) = metrics {
            info!(at = %listener, "metrics");
            self.files.extend(file);
            self.tasks.spawn(http::serve(listener, self.snapshots.clone()));
        }
        Ok(())
    }

    /// Leaves its places to another instance.
    pub async fn close(&mut self) {
        self.tasks.shutdown().await;
        self.files.clear();
    }
}
