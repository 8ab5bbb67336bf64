//! The compared setups of the gateway.

use std::fmt;

use serde::{Serialize, Serializer};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    Forwarding,
    /// Another build of the daemon, for comparison.
    OldBuild,
    Pepsal,
    /// HAProxy with splice and with the client's address, steered by iptables TPROXY.
    Haproxy,
}

impl Contender {
    /// All contenders, in the order of columns.
    pub const ALL: [Self; 4] = [Self::Forwarding, Self::OldBuild, Self::Pepsal, Self::Haproxy];
}

impl fmt::Display for Contender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Forwarding => "forwarding",
            Self::OldBuild => "old build",
            Self::Pepsal => "pepsal",
            Self::Haproxy => "HAProxy",
        })
    }
}

impl Serialize for Contender {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
