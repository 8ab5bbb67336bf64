//! Faults on purpose, for the tests of what they lead to. Only debug builds have them.

use std::{env, net::SocketAddr};

/// Panics when the environment's `PEPSAL_PANIC` names this place and the server's port, like `flow:80`.
pub fn at(place: &str, server: SocketAddr) {
    if cfg!(debug_assertions)
        && let Ok(wanted) = env::var("PEPSAL_PANIC")
        && wanted == format!("{place}:{}", server.port())
    {
        panic!("as PEPSAL_PANIC={wanted} asks for");
    }
}
