//! One TCP socket: its options, its congestion control, and its registration with a runtime.

pub(crate) mod congestion;
pub mod connection;
pub mod options;
