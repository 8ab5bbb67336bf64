//! Snapshots, at most one per second, for metrics, readiness and status.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::{sync::Mutex, task::spawn_blocking};

use crate::{
    observe::{exposition::Figures, protocol::Status, view::View},
    wire::attachment::Attached,
};

const CURRENT: Duration = Duration::from_secs(1);

/// Status and metrics at one moment.
pub struct Snapshot {
    pub status: Status,
    /// In the text format of OpenMetrics.
    pub metrics: String,
    taken: Instant,
    attached: Vec<Attached>,
}

impl Snapshot {
    /// Takes a snapshot, on a thread that may block.
    ///
    /// # Errors
    /// None in practice.
    async fn take(view: Arc<View>) -> Result<Self> {
        let taken = Instant::now();
        let (is_ready, attached) = (view.is_ready(), view.attached.get());
        // Many system calls: not on the relay threads, nor on the thread of the heartbeat.
        let look = move || {
            let figures = Figures::take(&view);
            let status = Status::of(&view, is_ready, &attached, &figures);
            Ok(Self {
                status,
                metrics: figures.render()?,
                taken,
                attached,
            })
        };
        spawn_blocking(look).await.context("cannot take a snapshot")?
    }

    /// Returns whether it is at most a second old, with the present readiness and attachments.
    fn is_current(&self, view: &View) -> bool {
        self.taken.elapsed() < CURRENT
            && self.status.ready == view.is_ready()
            && self.attached == view.attached.get()
    }
}

pub struct Snapshots {
    pub view: Arc<View>,
    latest: Latest<Snapshot>,
}

impl Snapshots {
    pub fn new(view: Arc<View>) -> Self {
        Self {
            view,
            latest: Latest::default(),
        }
    }

    /// Returns a snapshot that is at most a second old.
    ///
    /// # Errors
    /// None in practice.
    pub async fn current(&self) -> Result<Arc<Snapshot>> {
        let view = self.view.clone();
        let is_current = move |snapshot: &Snapshot| snapshot.is_current(&view);
        self.latest
            .get(is_current, Snapshot::take(self.view.clone()))
            .await
    }
}

/// The latest value, which all requests share while it is current.
struct Latest<T>(Arc<Mutex<Option<Arc<T>>>>);

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Send + Sync + 'static> Latest<T> {
    /// Returns the value if it is current, else a new one. Concurrent requests wait for the same new value.
    ///
    /// # Errors
    /// Those of `make`.
    async fn get(
        &self,
        is_current: impl FnOnce(&T) -> bool + Send + 'static,
        make: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<Arc<T>> {
        let latest = self.0.clone();
        // A separate task, so that a cancelled request does not cancel `make` for the others.
        let get = async move {
            let mut latest = latest.lock().await;
            if let Some(value) = latest.as_ref().filter(|value| is_current(value)) {
                return Ok(value.clone());
            }
            let value = Arc::new(make.await?);
            *latest = Some(value.clone());
            Ok(value)
        };
        tokio::spawn(get)
            .await
            .context("the task that takes a snapshot failed")?
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{task::JoinSet, time::sleep};

    use super::*;

    /// Requests a value that takes 20 ms to make, and counts the values made.
    async fn ask(latest: Arc<Latest<usize>>, made: Arc<AtomicUsize>, is_current: bool) -> usize {
        let make = async move {
            sleep(Duration::from_millis(20)).await;
            Ok(made.fetch_add(1, Ordering::Relaxed) + 1)
        };
        *latest.get(move |_| is_current, make).await.unwrap()
    }

    #[tokio::test]
    async fn a_hundred_who_ask_at_once_share_one_value() {
        let (latest, made) = (Arc::new(Latest::default()), Arc::new(AtomicUsize::new(0)));
        let mut asking = JoinSet::new();
        for _ in 0..100 {
            asking.spawn(ask(latest.clone(), made.clone(), true));
        }
        assert_eq!(asking.join_all().await, [1; 100]);
        assert_eq!(ask(latest.clone(), made.clone(), true).await, 1);
        assert_eq!(ask(latest, made, false).await, 2, "an old one is made anew");
    }

    #[tokio::test]
    async fn those_who_leave_do_not_have_it_made_again() {
        let (latest, made) = (Arc::new(Latest::default()), Arc::new(AtomicUsize::new(0)));
        for _ in 0..100 {
            let asking = tokio::spawn(ask(latest.clone(), made.clone(), true));
            tokio::task::yield_now().await;
            asking.abort();
            let _ = asking.await;
        }
        assert_eq!(ask(latest, made, true).await, 1);
    }
}
