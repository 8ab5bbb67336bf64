//! A look at everything, once a second at most, from which metrics, readiness and status are served.

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

/// How long a snapshot is current.
const CURRENT: Duration = Duration::from_secs(1);

/// The daemon at one moment.
pub struct Snapshot {
    /// As the commands show it.
    pub status: Status,
    /// As Prometheus reads it.
    pub metrics: String,
    taken: Instant,
    attached: Vec<Attached>,
}

impl Snapshot {
    /// Looks at everything, on a thread that may block.
    ///
    /// # Errors
    /// None in practice.
    async fn take(view: Arc<View>) -> Result<Self> {
        let taken = Instant::now();
        let (is_ready, attached) = (view.is_ready(), view.attached.get());
        // Many system calls: not on the threads that relay, nor on the one that beats.
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

    /// Whether it is no older than a second, and shows whether and where new connections are taken.
    fn is_current(&self, view: &View) -> bool {
        self.taken.elapsed() < CURRENT
            && self.status.ready == view.is_ready()
            && self.attached == view.attached.get()
    }
}

/// The snapshots of a daemon.
pub struct Snapshots {
    /// The daemon that they are taken of.
    pub view: Arc<View>,
    latest: Latest<Snapshot>,
}

impl Snapshots {
    /// Snapshots of a daemon; none is taken yet.
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

/// The value that was made last, shared by all who ask for one while it is current.
struct Latest<T>(Arc<Mutex<Option<Arc<T>>>>);

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Send + Sync + 'static> Latest<T> {
    /// Returns the value if it is current, and else a new one. Who asks while it is made waits for it.
    ///
    /// # Errors
    /// When it cannot be made.
    async fn get(
        &self,
        is_current: impl FnOnce(&T) -> bool + Send + 'static,
        make: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<Arc<T>> {
        let latest = self.0.clone();
        // A task of its own: where those who ask leave again, what is being made is not begun anew for each of them.
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

    /// Asks for a value that takes a moment to be made, and counts how many are.
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
