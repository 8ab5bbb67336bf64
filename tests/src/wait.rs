//! Waits for conditions, in place of sleeps.

use std::env;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

/// Timeout on a busy machine for operations that take milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Returns a timeout that depends on the machine and not on the daemon, multiplied by the environment
/// variable `PEPSAL_TEST_SLOWNESS`, 1 by default.
pub fn patience(timeout: Duration) -> Duration {
    static SLOWNESS: LazyLock<u32> = LazyLock::new(|| {
        let slowness = env::var("PEPSAL_TEST_SLOWNESS").ok();
        slowness.and_then(|times| times.parse().ok()).unwrap_or(1)
    });
    timeout * *SLOWNESS
}

/// Waits until `condition` is true.
///
/// # Panics
/// When it is false after `timeout`, or after its [`patience`]; the message has the caller's line.
#[track_caller]
pub fn eventually(timeout: Duration, condition: impl FnMut() -> bool) {
    assert!(
        holds_within(timeout, condition),
        "condition does not hold after {timeout:?}"
    );
}

/// Returns whether `condition` becomes true within `timeout`.
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
