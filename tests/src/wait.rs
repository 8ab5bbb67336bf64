//! Waiting for a condition instead of sleeping for a guess.

use std::env;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

/// How long a busy machine may take for what takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A time that the machine, and not the daemon, may need: as many times as long as the environment's
/// `PEPSAL_TEST_SLOWNESS` says, which is 1 if it says nothing.
pub fn patience(timeout: Duration) -> Duration {
    static SLOWNESS: LazyLock<u32> = LazyLock::new(|| {
        let slowness = env::var("PEPSAL_TEST_SLOWNESS").ok();
        slowness.and_then(|times| times.parse().ok()).unwrap_or(1)
    });
    timeout * *SLOWNESS
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it still does not after `timeout`, or after its [`patience`]; the message shows the caller's line.
#[track_caller]
pub fn eventually(timeout: Duration, condition: impl FnMut() -> bool) {
    assert!(
        holds_within(timeout, condition),
        "condition does not hold after {timeout:?}"
    );
}

/// Whether `condition` comes to hold within `timeout`.
pub(crate) fn holds_within(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience(timeout);
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
}
