//! One TCP socket: its options, its congestion control, and its connection as a runtime watches it.

pub mod congestion;
pub mod options;
pub mod stream;
