//! Fault injection for tests, in debug builds only.

use std::{env, net::SocketAddr, thread};

/// Panics when the environment variable `PEPSAL_PANIC` has this place and the server's port, like `flow:80`. With
/// `PEPSAL_HANG` the thread parks forever.
pub fn at(place: &str, server: SocketAddr) {
    if cfg!(debug_assertions) {
        let here = format!("{place}:{}", server.port());
        let is_wanted = |variable: &str| env::var(variable).is_ok_and(|wanted| wanted == here);
        if is_wanted("PEPSAL_PANIC") {
            panic!("requested by PEPSAL_PANIC={here}");
        }
        while is_wanted("PEPSAL_HANG") {
            thread::park();
        }
    }
}
