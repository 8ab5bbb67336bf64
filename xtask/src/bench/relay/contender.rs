//! Who is compared.

use std::fmt;

use serde::{Serialize, Serializer};

/// What is at the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// No proxy.
    Forwarding,
    /// The daemon under test.
    Pepsal,
    /// HAProxy with splice and as transparent as pepsal, its connections steered by iptables TPROXY.
    Haproxy,
}

impl Contender {
    /// All of them, in the order of columns.
    pub const ALL: [Self; 3] = [Self::Forwarding, Self::Pepsal, Self::Haproxy];
}

impl fmt::Display for Contender {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Forwarding => "forwarding",
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
