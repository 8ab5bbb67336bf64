//! The compared transfers, and the positions of pepsal.

use std::fmt;

use pepsal_tests::{Direction, Family, Outcome};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Nowhere: plain forwarding.
    Nowhere,
    /// On the gateway between client and link.
    Gateway,
    /// On that gateway, and on the router between link and server.
    BothEnds,
}

impl Placement {
    pub const ALL: [Self; 3] = [Self::Nowhere, Self::Gateway, Self::BothEnds];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nowhere => "without pepsal",
            Self::Gateway => "pepsal at the gateway",
            Self::BothEnds => "pepsal at both ends",
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Contest {
    pub direction: Direction,
    pub family: Family,
    pub placement: Placement,
}

impl Contest {
    /// A transfer, independent of pepsal's position.
    pub fn transfer(&self) -> String {
        let direction = match self.direction {
            Direction::Upload => "upload",
            Direction::Download => "download",
        };
        format!("{direction} {}", self.family.name())
    }
}

impl fmt::Display for Contest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, {}", self.transfer(), self.placement.name())
    }
}

/// Result of a successful contest.
#[derive(Debug)]
pub struct Finish {
    pub contest: Contest,
    pub outcome: Outcome,
}
