//! Close reasons of flows, as they are logged and counted.

use std::io;

use thiserror::Error;

/// Close reason of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// Both directions ended by FIN.
    #[error("finished")]
    Finished,
    /// The client reset its connection.
    #[error("client reset")]
    ClientReset,
    /// The server reset its connection.
    #[error("server reset")]
    ServerReset,
    /// The user timeout of the client leg expired.
    #[error("client timed out")]
    ClientTimedOut,
    /// The user timeout of the server leg expired.
    #[error("server timed out")]
    ServerTimedOut,
    /// The server refused the connection.
    #[error("refused")]
    Refused,
    /// No route to the server, or an ICMP destination unreachable message.
    #[error("unreachable")]
    Unreachable,
    /// The server leg was not connected within the connect timeout.
    #[error("connect timeout")]
    ConnectTimeout,
    /// The flow was pending longer than its lifetime.
    #[error("pending timeout")]
    PendingTimeout,
    /// The server leg could not be created on this host.
    #[error("local failure")]
    LocalFailure,
    /// The task of the flow panicked, which is an error in pepsal.
    #[error("panicked")]
    Panicked,
    /// No byte was relayed within the idle timeout.
    #[error("idle timeout")]
    IdleTimeout,
    /// The daemon stopped.
    #[error("shutdown")]
    Shutdown,
    /// The operator closed the flow (`pepsal close`).
    #[error("administrative")]
    Administrative,
}

impl CloseReason {
    pub(crate) const ALL: &[Self] = &[
        Self::Finished,
        Self::ClientReset,
        Self::ServerReset,
        Self::ClientTimedOut,
        Self::ServerTimedOut,
        Self::Refused,
        Self::Unreachable,
        Self::ConnectTimeout,
        Self::PendingTimeout,
        Self::LocalFailure,
        Self::Panicked,
        Self::IdleTimeout,
        Self::Shutdown,
        Self::Administrative,
    ];

    /// Returns the label value in metrics.
    pub(crate) fn name(self) -> String {
        self.to_string().replace(' ', "_")
    }

    /// Returns the close reason for an error of `connect`.
    pub(crate) fn of_connect(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Self::Unreachable,
            // An administrative prohibition, by a router or by a route.
            io::ErrorKind::PermissionDenied => Self::Unreachable,
            io::ErrorKind::TimedOut => Self::ConnectTimeout,
            io::ErrorKind::ConnectionReset => Self::ServerReset,
            _ => Self::LocalFailure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_another_leg_keeps_are_a_local_failure() {
        let kept = io::Error::from(io::ErrorKind::AddrNotAvailable);
        assert_eq!(CloseReason::of_connect(&kept), CloseReason::LocalFailure);
    }

    #[test]
    fn every_reason_is_listed_in_its_place() {
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }
}
