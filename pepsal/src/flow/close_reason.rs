//! The reasons for which flows end, as they are logged and counted.

use std::io;

use thiserror::Error;

/// Why a flow ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CloseReason {
    /// Both ends had said all.
    #[error("finished")]
    Finished,
    /// The client reset its connection.
    #[error("client reset")]
    ClientReset,
    /// The server reset its connection.
    #[error("server reset")]
    ServerReset,
    /// The client did not acknowledge any more.
    #[error("client timed out")]
    ClientTimedOut,
    /// The server did not acknowledge any more.
    #[error("server timed out")]
    ServerTimedOut,
    /// The server refused the connection.
    #[error("refused")]
    Refused,
    /// No route to the server, or a router said so.
    #[error("unreachable")]
    Unreachable,
    /// The server did not answer in time.
    #[error("connect timeout")]
    ConnectTimeout,
    /// The connection stayed pending past its lifetime.
    #[error("pending timeout")]
    PendingTimeout,
    /// The server leg could not be made here.
    #[error("local failure")]
    LocalFailure,
    /// Its task panicked, which is an error in pepsal.
    #[error("panicked")]
    Panicked,
    /// Nothing moved for too long.
    #[error("idle timeout")]
    IdleTimeout,
    /// pepsal was stopped.
    #[error("shutdown")]
    Shutdown,
    /// The operator closed it.
    #[error("administrative")]
    Administrative,
}

impl CloseReason {
    /// Every reason.
    pub const ALL: &[Self] = &[
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

    /// Its name in metrics.
    pub fn name(self) -> String {
        self.to_string().replace(' ', "_")
    }

    /// The reason why a connection to a server could not be made.
    pub fn of_connect(error: &io::Error) -> Self {
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
