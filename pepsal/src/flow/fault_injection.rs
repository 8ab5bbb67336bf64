//! Faults on purpose, for the tests of what they lead to. Only debug builds have them.

use std::{env, net::SocketAddr, thread};

/// Panics when the environment's `PEPSAL_PANIC` names this place and the server's port, like `flow:80`. With
/// `PEPSAL_HANG` the thread never comes back.
pub fn at(place: &str, server: SocketAddr) {
    if cfg!(debug_assertions) {
        let here = format!("{place}:{}", server.port());
        let is_wanted = |variable: &str| env::var(variable).is_ok_and(|wanted| wanted == here);
        if is_wanted("PEPSAL_PANIC") {
            panic!("as PEPSAL_PANIC={here} asks for");
        }
        while is_wanted("PEPSAL_HANG") {
            thread::park();
        }
    }
}
