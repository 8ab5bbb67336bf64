//! What is done to the daemon and the gateway.

use std::fmt;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and a new daemon at once.
    Kill,
    /// SIGKILL, and a new daemon some seconds later.
    Absence,
    /// SIGSTOP for longer than the programs take the daemon for alive, then SIGCONT.
    Hang,
    /// The clients' interface goes down and comes up.
    FlapLan,
    /// The satellite link's interface goes down and comes up.
    FlapSat,
    /// Somebody removes the device of the client legs' namespace.
    RemoveClientsDevice,
    /// Somebody removes the device of the server legs' namespace.
    RemoveServersDevice,
    /// There are no descriptors left for a while.
    Descriptors,
}

impl Fault {
    /// Every fault.
    pub const ALL: &[Self] = &[
        Self::Kill,
        Self::Absence,
        Self::Hang,
        Self::FlapLan,
        Self::FlapSat,
        Self::RemoveClientsDevice,
        Self::RemoveServersDevice,
        Self::Descriptors,
    ];

    /// Those that the daemon lives through.
    pub const SURVIVED: &[Self] = &[
        Self::Hang,
        Self::FlapLan,
        Self::FlapSat,
        Self::RemoveClientsDevice,
        Self::RemoveServersDevice,
        Self::Descriptors,
    ];

    /// Whether flows that are open may break by it.
    pub fn breaks_open_flows(self) -> bool {
        matches!(self, Self::Kill | Self::Absence)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Kill => "SIGKILL, restart",
            Self::Absence => "SIGKILL, restart after 3 s",
            Self::Hang => "SIGSTOP for 4 s",
            Self::FlapLan => "lan0 down for 1 s",
            Self::FlapSat => "sat0 down for 1 s",
            Self::RemoveClientsDevice => "clients' device removed",
            Self::RemoveServersDevice => "servers' device removed",
            Self::Descriptors => "no descriptors for 2 s",
        })
    }
}
