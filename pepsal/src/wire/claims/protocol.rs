//! The request for a takeover and its answer, as both instances know them.

use std::time::Duration;

/// A successor's request, and the first line of the answer. The names of the interfaces follow, a line each, with as many
/// descriptors in the same order.
pub(super) const TAKE_OVER: &[u8] = b"takeover\n";
pub(super) const RELEASED: &[u8] = b"released\n";

/// How long a request, and its answer, may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Descriptors in one message, below the kernel's `SCM_MAX_FD` of 253.
pub(super) const DESCRIPTORS_MAX: usize = 64;
