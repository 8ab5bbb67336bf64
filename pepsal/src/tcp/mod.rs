//! One TCP socket: its options, its congestion control, and its connection as a runtime watches it.

pub(crate) mod congestion;
pub mod connection;
pub mod options;
