//! Who is compared.

use std::fmt;

use serde::{Serialize, Serializer};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    Forwarding,
    /// Another build of the daemon, to be compared with the one under test.
    OldBuild,
    Pepsal,
    /// HAProxy with splice and as transparent as pepsal, its connections steered by iptables TPROXY.
    Haproxy,
}

impl Contender {
    /// All of them, in the order of columns.
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
