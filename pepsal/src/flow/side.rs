//! The two ends of a flow.

/// Side of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The client leg, accepted.
    Client,
    /// The server leg, connected.
    Server,
}
