//! One TCP socket.

pub mod options;
pub mod stream;
