//! What an operator knows of a link: the argument of `--link`, and the keys of `[link.INTERFACE]`.

use std::{collections::HashSet, str::FromStr, time::Duration};

use crate::{
    tcp::congestion::Congestion,
    units::{self, Rate},
};

/// The argument of `--link`: `IFACE,rate=50mbit,rtt=600ms[,up=5mbit][,…]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// The interface that the link is behind.
    pub interface: String,
    pub(super) rate: Rate,
    pub(super) rtt: Duration,
    pub(super) up: Option<Rate>,
    pub(super) congestion: Option<Congestion>,
    pub(super) initial_window: Option<u64>,
    pub(super) pacing: Option<Rate>,
    pub(super) receive_buffer: Option<u64>,
    pub(super) send_buffer: Option<u64>,
    pub(super) unsent: Option<u64>,
    pub(super) mss: Option<u16>,
    pub(super) rto_min: Option<Duration>,
    pub(super) rto_max: Option<Duration>,
    pub(super) user_timeout: Option<Duration>,
    pub(super) keepalive: Option<Duration>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) weights: Weights,
    pub(super) sharing: Sharing,
    pub(super) peer: Peer,
}

/// Who is at the other end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Anybody.
    Unknown,
    /// A pepsal that knows the link too, so that its receive window is known before it can say so: the window field of
    /// a SYN-ACK is not scaled (RFC 7323, 2.2).
    Pepsal,
}

/// Among whom a link's rate is divided first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Subscribers, then the legs of each: who opens many connections gets no more.
    Subscriber,
    /// Legs, whosever they are.
    Leg,
}

/// How the legs of a link share its rate, or those of a subscriber its part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// All alike.
    Equal,
    /// By the class selector bits of their DSCP (RFC 2474, 4.2.2): a leg of class 3 gets four times what one of class 0
    /// gets.
    Dscp,
}

impl Weights {
    /// A leg's weight.
    pub fn of(self, traffic_class: u8) -> u64 {
        match self {
            Self::Equal => 1,
            Self::Dscp => u64::from(traffic_class >> 5) + 1,
        }
    }
}

/// The keys of a link.
pub const KEYS: [&str; 18] = [
    "rate",
    "rtt",
    "up",
    "cc",
    "iw",
    "pacing",
    "rcvbuf",
    "sndbuf",
    "unsent",
    "mss",
    "rto-min",
    "rto-max",
    "user-timeout",
    "keepalive",
    "connect-timeout",
    "weights",
    "share",
    "peer",
];

impl FromStr for LinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let interface = parts.next().unwrap_or_default().trim();
        if interface.is_empty() || interface.contains('=') {
            return Err("the interface comes first, like sat0,rate=50mbit,rtt=600ms".into());
        }
        let mut draft = Draft::new(interface);
        let mut seen = HashSet::new();
        for part in parts {
            let Some((key, value)) = part.trim().split_once('=') else {
                return Err(format!("'{part}' is not KEY=VALUE; keys are {}", KEYS.join(", ")));
            };
            if !seen.insert(key) {
                return Err(format!("{key} is given twice"));
            }
            draft.set(key, value)?;
        }
        draft.finish().map_err(|fault| fault.what)
    }
}

/// A link while its keys are being read.
#[derive(Debug, Clone)]
pub struct Draft {
    spec: LinkSpec,
    rate: Option<Rate>,
    rtt: Option<Duration>,
}

/// What is wrong with a link as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key that is missing or contradicts another.
    pub key: &'static str,
    /// What is wrong, and what to do.
    pub what: String,
}

impl Draft {
    /// A link of which nothing is known yet.
    pub fn new(interface: &str) -> Self {
        Self {
            spec: LinkSpec {
                interface: interface.to_owned(),
                rate: Rate::from_bps(0),
                rtt: Duration::ZERO,
                up: None,
                congestion: None,
                initial_window: None,
                pacing: None,
                receive_buffer: None,
                send_buffer: None,
                unsent: None,
                mss: None,
                rto_min: None,
                rto_max: None,
                user_timeout: None,
                keepalive: None,
                connect_timeout: None,
                weights: Weights::Equal,
                sharing: Sharing::Subscriber,
                peer: Peer::Unknown,
            },
            rate: None,
            rtt: None,
        }
    }

    /// Takes a key's value.
    ///
    /// # Errors
    /// What is wrong with the key or the value, and what would be right.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let spec = &mut self.spec;
        let naming = |error: String| format!("{key}: {error}");
        let bounded = |least: Duration, most: Duration| {
            let time = units::time(value).map_err(naming)?;
            match time {
                time if time >= least && time <= most => Ok(time),
                _ => Err(format!(
                    "{key}: '{value}' is out of range: from {least:?} to {most:?}"
                )),
            }
        };
        let (millis, seconds) = (Duration::from_millis, Duration::from_secs);
        match key {
            "rate" => self.rate = Some(units::rate(value).map_err(naming)?),
            "rtt" => self.rtt = Some(bounded(millis(1), seconds(10))?),
            "up" => spec.up = Some(units::rate(value).map_err(naming)?),
            "cc" if value.is_empty() || value.contains(',') => {
                return Err(format!("cc: '{value}' is not the name of a congestion control"));
            }
            "cc" => spec.congestion = Some(value.into()),
            "iw" => spec.initial_window = Some(units::size(value).map_err(naming)?),
            "pacing" => spec.pacing = Some(units::rate(value).map_err(naming)?),
            "rcvbuf" => spec.receive_buffer = Some(units::size(value).map_err(naming)?),
            "sndbuf" => spec.send_buffer = Some(units::size(value).map_err(naming)?),
            "unsent" => spec.unsent = Some(units::size(value).map_err(naming)?),
            "mss" => match value.parse() {
                Ok(mss @ 88..=32_767) => spec.mss = Some(mss),
                _ => {
                    return Err(format!(
                        "mss: '{value}' is not a segment size, from 88 to 32767 bytes"
                    ));
                }
            },
            "rto-min" => spec.rto_min = Some(bounded(millis(5), millis(200))?),
            "rto-max" => spec.rto_max = Some(bounded(seconds(1), seconds(120))?),
            "user-timeout" => spec.user_timeout = Some(bounded(seconds(1), seconds(86_400))?),
            "keepalive" => spec.keepalive = Some(bounded(seconds(1), seconds(32_767))?),
            "connect-timeout" => spec.connect_timeout = Some(bounded(seconds(1), seconds(3600))?),
            "weights" => {
                spec.weights = match value {
                    "equal" => Weights::Equal,
                    "dscp" => Weights::Dscp,
                    _ => return Err(format!("weights: '{value}' is neither equal nor dscp")),
                }
            }
            "share" => {
                spec.sharing = match value {
                    "subscriber" => Sharing::Subscriber,
                    "leg" => Sharing::Leg,
                    _ => return Err(format!("share: '{value}' is neither subscriber nor leg")),
                }
            }
            "peer" => {
                spec.peer = match value {
                    "pepsal" => Peer::Pepsal,
                    "unknown" => Peer::Unknown,
                    _ => return Err(format!("peer: '{value}' is neither pepsal nor unknown")),
                }
            }
            _ => return Err(format!("'{key}' is not one of {}", KEYS.join(", "))),
        }
        Ok(())
    }

    /// The link, once all of its keys are read.
    ///
    /// # Errors
    /// When a key is missing, or two contradict each other.
    pub fn finish(self) -> Result<LinkSpec, Fault> {
        let missing = |key, what: &str| Fault {
            key,
            what: what.to_owned(),
        };
        let mut spec = self.spec;
        spec.rate = self
            .rate
            .ok_or_else(|| missing("rate", "rate is missing: how fast the link is, like rate=50mbit"))?;
        spec.rtt = self
            .rtt
            .ok_or_else(|| missing("rtt", "rtt is missing: the link's round trip, like rtt=600ms"))?;
        let send_rate = spec.up.unwrap_or(spec.rate);
        if spec.pacing.is_some_and(|pacing| pacing > send_rate) {
            return Err(Fault {
                key: "pacing",
                what: format!("pacing is more than the link's {send_rate}"),
            });
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_links_say_what_is_wrong() {
        for (text, complaint) in [
            ("sat0", "rate is missing"),
            ("sat0,rate=50mbit", "rtt is missing"),
            ("rate=50mbit,rtt=600ms", "the interface comes first"),
            ("sat0,rate=50,rtt=600ms", "rate: '50' is not a rate"),
            ("sat0,rate=50mbit,rtt=600", "rtt: '600' is not a time"),
            ("sat0,rate=50mbit,rtt=11s", "rtt: '11s' is out of range"),
            ("sat0,rate=50mbit,rtt=600ms,iw=10", "iw: '10' is not a size"),
            ("sat0,rate=50mbit,rtt=600ms,rate=5mbit", "rate is given twice"),
            ("sat0,rate=50mbit,rtt=600ms,speed=5mbit", "'speed' is not one of"),
            ("sat0,rate=50mbit,rtt=600ms,fast", "'fast' is not KEY=VALUE"),
            (
                "sat0,rate=50mbit,rtt=600ms,rto-min=5s",
                "rto-min: '5s' is out of range",
            ),
            (
                "sat0,rate=50mbit,rtt=600ms,user-timeout=500ms",
                "user-timeout: '500ms' is out of range",
            ),
            (
                "sat0,rate=50mbit,rtt=600ms,pacing=60mbit",
                "pacing is more than the link's 50 Mbit/s",
            ),
            (
                "sat0,rate=50mbit,rtt=600ms,peer=proxy",
                "peer: 'proxy' is neither pepsal nor unknown",
            ),
            (
                "sat0,rate=50mbit,rtt=600ms,share=flow",
                "share: 'flow' is neither subscriber nor leg",
            ),
            (
                "sat0,rate=50mbit,rtt=600ms,weights=size",
                "weights: 'size' is neither",
            ),
            ("sat0,rate=50mbit,rtt=600ms,mss=9", "mss: '9'"),
        ] {
            let error = text.parse::<LinkSpec>().unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }
}
