//! What is done to the daemon and the gateway.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and a new daemon at once.
    Kill,
    /// SIGKILL, and a new daemon some seconds later.
    Absence,
    /// Another daemon takes over, and the first ends with its last flow.
    Takeover,
    /// SIGSTOP for longer than the programs take the daemon for alive, then SIGCONT.
    Hang,
    /// The clients' interface goes down and comes up.
    FlapLan,
    /// The satellite link's interface goes down and comes up.
    FlapSat,
    /// Somebody removes the device of the clients' side.
    RemoveClients,
    /// Somebody removes the device of the servers' side.
    RemoveServers,
    /// Somebody takes both devices down.
    DevicesDown,
    /// Somebody replaces the clsact qdisc of every interface, and removes it, with all filters there.
    Qdiscs,
    /// The gateway's firewall is loaded again.
    Firewall,
    /// There are no descriptors left for a while.
    Descriptors,
}

impl Fault {
    pub const ALL: &[Self] = &[
        Self::Kill,
        Self::Absence,
        Self::Takeover,
        Self::Hang,
        Self::FlapLan,
        Self::FlapSat,
        Self::RemoveClients,
        Self::RemoveServers,
        Self::DevicesDown,
        Self::Qdiscs,
        Self::Firewall,
        Self::Descriptors,
    ];

    /// Those after which the daemon is the same process.
    pub const SURVIVED: &[Self] = &[
        Self::Hang,
        Self::FlapLan,
        Self::FlapSat,
        Self::RemoveClients,
        Self::RemoveServers,
        Self::DevicesDown,
        Self::Qdiscs,
        Self::Firewall,
        Self::Descriptors,
    ];

    /// Whether flows that are open may break by it.
    pub fn breaks_open_flows(self) -> bool {
        matches!(self, Self::Kill | Self::Absence)
    }

    /// Whether connections that are being made may break by it.
    pub fn breaks_new_flows(self) -> bool {
        !matches!(self, Self::Takeover | Self::Qdiscs | Self::Firewall)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Kill => "SIGKILL, restart",
            Self::Absence => "SIGKILL, restart after 3 s",
            Self::Takeover => "takeover",
            Self::Hang => "SIGSTOP for 4 s",
            Self::FlapLan => "lan0 down for 1 s",
            Self::FlapSat => "sat0 down for 1 s",
            Self::RemoveClients => "clients' device removed",
            Self::RemoveServers => "servers' device removed",
            Self::DevicesDown => "devices down",
            Self::Qdiscs => "clsact replaced, removed",
            Self::Firewall => "firewall loaded again",
            Self::Descriptors => "no descriptors for 2 s",
        })
    }
}
