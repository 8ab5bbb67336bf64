//! Which proxy runs where.

use std::fmt;

use clap::ValueEnum;
use serde::{Serialize, Serializer};

use super::peer::Peer;

/// What a path is measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// Plain forwarding; the endpoints send with this.
    NoProxy(Congestion),
    /// A proxy, and endpoints that send with CUBIC, the default of Linux.
    Proxy(Proxy, Side),
}

/// Congestion control of the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Congestion {
    /// CUBIC (RFC 9438).
    Cubic,
    /// BBR as Linux has it.
    Bbr,
}

/// A proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proxy {
    /// Another build of the daemon, to be compared with the one under test.
    OldBuild,
    /// The daemon under test.
    Pepsal,
    /// Another one, put in its place.
    Peer(&'static Peer),
}

/// The side of the link that a proxy is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// The gateway between client and link.
    Client,
    /// The gateway between link and server.
    Server,
    /// Both.
    Pair,
}

/// One end of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client's.
    Client,
    /// The server's.
    Server,
}

/// What `--places` selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum PlaceName {
    /// No proxy, endpoints with CUBIC.
    Cubic,
    /// No proxy, endpoints with BBR.
    Bbr,
    /// A proxy at the client's side of the link.
    Client,
    /// A proxy at the server's side.
    Server,
    /// One at each side.
    Pair,
}

impl PlaceName {
    /// The places that are meant: one, or one for each proxy.
    pub fn places<'a>(self, proxies: &'a [Proxy]) -> Box<dyn Iterator<Item = Place> + 'a> {
        let side = match self {
            Self::Cubic => return Box::new([Place::NoProxy(Congestion::Cubic)].into_iter()),
            Self::Bbr => return Box::new([Place::NoProxy(Congestion::Bbr)].into_iter()),
            Self::Client => Side::Client,
            Self::Server => Side::Server,
            Self::Pair => Side::Pair,
        };
        Box::new(proxies.iter().map(move |proxy| Place::Proxy(*proxy, side)))
    }
}

impl Place {
    /// What the endpoints send with.
    pub fn congestion(self) -> &'static str {
        match self {
            Self::NoProxy(Congestion::Bbr) => "bbr",
            Self::NoProxy(Congestion::Cubic) | Self::Proxy(..) => "cubic",
        }
    }

    /// The ends of the link that a proxy runs at.
    pub fn ends(self) -> &'static [End] {
        match self {
            Self::NoProxy(_) => &[],
            Self::Proxy(_, Side::Client) => &[End::Client],
            Self::Proxy(_, Side::Server) => &[End::Server],
            Self::Proxy(_, Side::Pair) => &[End::Client, End::Server],
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (proxy, side) = match self {
            Self::NoProxy(Congestion::Cubic) => return formatter.write_str("no proxy, CUBIC"),
            Self::NoProxy(Congestion::Bbr) => return formatter.write_str("no proxy, BBR"),
            Self::Proxy(proxy, side) => (proxy, side),
        };
        let proxy = match proxy {
            Proxy::OldBuild => "old build",
            Proxy::Pepsal => "pepsal",
            Proxy::Peer(peer) => peer.name(),
        };
        match side {
            Side::Client => write!(formatter, "{proxy}, client's side"),
            Side::Server => write!(formatter, "{proxy}, server's side"),
            Side::Pair => write!(formatter, "{proxy}, pair"),
        }
    }
}

impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
