//! The emulated paths.

use std::{fmt, str::FromStr, time::Duration};

use clap::ValueEnum;
use pepsal_tests::{Direction, Handovers, LinkProfile};
use serde::{Serialize, Serializer};

use super::{peer::LinkSeen, place::End};
use crate::quantity;

/// A path between client and server; the terrestrial networks at both ends cost nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Path {
    /// A geostationary satellite: 600 ms, 50 Mbit/s down, 5 Mbit/s up.
    Geo,
    /// The same with 50 Mbit/s either way.
    GeoSymmetric,
    /// A medium orbit: 150 ms, 100 Mbit/s down, 20 Mbit/s up.
    Meo,
    /// A low orbit: 40 ms, 100 Mbit/s down, 20 Mbit/s up, and another satellite every 15 s.
    Leo,
    /// No satellite: 20 ms, 100 Mbit/s either way. pepsal is told nothing of it.
    Clean,
}

impl Path {
    /// What tables show.
    pub fn name(self) -> &'static str {
        match self {
            Self::Geo => "GEO 50/5",
            Self::GeoSymmetric => "GEO 50/50",
            Self::Meo => "MEO 100/20",
            Self::Leo => "LEO 100/20",
            Self::Clean => "clean 20 ms",
        }
    }

    /// Its part of a file's name.
    pub fn file_name(self) -> &'static str {
        match self {
            Self::Geo => "geo",
            Self::GeoSymmetric => "geo-symmetric",
            Self::Meo => "meo",
            Self::Leo => "leo",
            Self::Clean => "clean",
        }
    }

    /// The emulator's view, with a queue of one bandwidth-delay product each way.
    pub fn profile(self, loss: Loss, seed: u64) -> LinkProfile {
        const MBIT: u64 = 1_000_000;
        let (up, down, rtt_ms) = match self {
            Self::Geo => (5, 50, 600),
            Self::GeoSymmetric => (50, 50, 600),
            Self::Meo => (20, 100, 150),
            Self::Leo => (20, 100, 40),
            Self::Clean => (100, 100, 20),
        };
        let rtt = Duration::from_millis(rtt_ms);
        LinkProfile {
            seed,
            handovers: (self == Self::Leo).then_some(Handovers::LEO),
            ..LinkProfile::asymmetric(up * MBIT, down * MBIT, rtt, loss.probability())
        }
    }

    /// Its round trip, when nothing is in the way.
    pub fn rtt(self) -> Duration {
        self.profile(Loss::NONE, 0).rtt
    }

    /// What it carries in a direction, in bit/s.
    pub fn rate_bps(self, direction: Direction) -> u64 {
        let profile = self.profile(Loss::NONE, 0);
        match direction {
            Direction::Upload => profile.up_bps,
            Direction::Download => profile.down_bps,
        }
    }

    /// Whether a proxy is told what the link is.
    pub fn is_told(self) -> bool {
        self != Self::Clean
    }

    /// What a proxy at one end may be told.
    pub fn link_at(self, end: End) -> LinkSeen {
        let (up, down) = (
            self.rate_bps(Direction::Upload),
            self.rate_bps(Direction::Download),
        );
        let (receives, sends) = match end {
            End::Client => (down, up),
            End::Server => (up, down),
        };
        LinkSeen {
            rate: quantity::exact_rate(receives),
            up: quantity::exact_rate(sends),
            rtt: quantity::exact_time(self.rtt()),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Serialize for Path {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A random loss, in hundredths of a percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loss(u32);

impl Loss {
    /// No loss at all.
    pub const NONE: Self = Self(0);

    /// So many hundredths of a percent.
    pub const fn hundredths(hundredths: u32) -> Self {
        Self(hundredths)
    }

    /// From 0 to 1.
    pub fn probability(self) -> f64 {
        f64::from(self.0) / 10_000.0
    }

    /// From 0 to 100.
    pub fn percent(self) -> f64 {
        f64::from(self.0) / 100.0
    }
}

impl FromStr for Loss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        quantity::loss(text).map(|share| Self((share * 10_000.0).round() as u32))
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} %", self.percent())
    }
}

impl Serialize for Loss {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.percent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_is_told_what_it_receives_and_what_it_sends() {
        let client = Path::Geo.link_at(End::Client);
        assert_eq!((client.rate.as_str(), client.up.as_str()), ("50mbit", "5mbit"));
        let server = Path::Geo.link_at(End::Server);
        assert_eq!((server.rate.as_str(), server.up.as_str()), ("5mbit", "50mbit"));
        assert_eq!(server.rtt, "600ms");
    }

    #[test]
    fn losses_are_exact() {
        let loss: Loss = "0.1%".parse().unwrap();
        assert_eq!(loss, Loss::hundredths(10));
        assert_eq!(loss.to_string(), "0.1 %");
        assert!((loss.probability() - 0.001).abs() < 1e-12);
    }
}
