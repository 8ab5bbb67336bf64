//! Faults of the daemon and the gateway.

use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and a new daemon at once.
    Kill,
    /// SIGKILL, and a new daemon some seconds later.
    Absence,
    /// A takeover: the previous instance exits after its last flow.
    Takeover,
    /// SIGSTOP for longer than the heartbeat timeout, then SIGCONT.
    Hang,
    /// The clients' interface goes down and comes up.
    FlapLan,
    /// The satellite link's interface goes down and comes up.
    FlapSat,
    /// The device of the clients' side is removed.
    RemoveClients,
    /// The device of the servers' side is removed.
    RemoveServers,
    /// Both devices are set down.
    DevicesDown,
    /// The clsact qdisc of every interface is replaced and removed, with all filters.
    Qdiscs,
    /// The gateway's firewall is reloaded.
    Firewall,
    /// File descriptors are exhausted for a while.
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

    /// Faults that the daemon's process survives.
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

    /// Returns whether the fault may break open flows.
    pub fn breaks_open_flows(self) -> bool {
        matches!(self, Self::Kill | Self::Absence)
    }

    /// Returns whether the fault may break connections in their handshake.
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
