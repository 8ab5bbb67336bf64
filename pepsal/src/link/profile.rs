//! What an operator knows of a link, and what follows from it for the legs that leave through it.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    str::FromStr,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};

use crate::{
    link::{budget::Budget, rate_control::RateControl},
    units::{self, Rate, show_size},
};

/// The argument of `--link`: `IFACE,rate=50mbit,rtt=600ms[,up=5mbit][,…]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSpec {
    /// The interface that the link is behind.
    pub interface: String,
    rate: Rate,
    rtt: Duration,
    up: Option<Rate>,
    congestion: Option<String>,
    initial_window: Option<u64>,
    pacing: Option<Rate>,
    receive_buffer: Option<u64>,
    send_buffer: Option<u64>,
    unsent: Option<u64>,
    mss: Option<u16>,
    rto_min: Option<Duration>,
    rto_max: Option<Duration>,
    user_timeout: Option<Duration>,
    keepalive: Option<Duration>,
    connect_timeout: Option<Duration>,
    weights: Weights,
    peer: Peer,
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

/// How the legs of a link share its rate.
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
pub const KEYS: [&str; 17] = [
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
            "cc" => spec.congestion = Some(value.to_owned()),
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

/// Where a value of a profile comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The operator gave it.
    Given,
    /// It was worked out; how, in words.
    Derived(&'static str),
}

/// A value and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derived<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

impl<T> Derived<T> {
    fn new(given: Option<T>, derived: T, how: &'static str) -> Self {
        match given {
            Some(value) => Self {
                value,
                origin: Origin::Given,
            },
            None => Self {
                value: derived,
                origin: Origin::Derived(how),
            },
        }
    }
}

/// How the legs that leave through a link are tuned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkProfile {
    /// The interface that the link is behind.
    pub interface: String,
    /// Round trip of the link.
    pub rtt: Duration,
    /// What the link carries towards this gateway.
    pub receive_rate: Derived<Rate>,
    /// What the link carries from this gateway.
    pub send_rate: Derived<Rate>,
    /// What the legs together may send, in TCP payload.
    pub pacing: Derived<Rate>,
    /// Congestion control, where the kernel has it.
    pub congestion: Derived<String>,
    /// Most bytes that a leg sends before the first acknowledgement.
    pub initial_window: Derived<u64>,
    /// Bytes that a leg's receive window covers from the first segment on.
    pub receive_buffer: Derived<u64>,
    /// Bytes that a leg may have sent and unacknowledged.
    pub send_buffer: Derived<u64>,
    /// Bytes that may wait unsent in the kernel (TCP_NOTSENT_LOWAT).
    pub unsent: Derived<u64>,
    /// Maximum segment size; `None` is the path's.
    pub mss: Derived<Option<u16>>,
    /// Shortest retransmission timeout.
    pub rto_min: Derived<Duration>,
    /// Longest retransmission timeout.
    pub rto_max: Derived<Duration>,
    /// How long data may go unacknowledged before the leg is given up (RFC 9293, 3.9.1.1).
    pub user_timeout: Derived<Duration>,
    /// Idle time after which a peer is asked whether it is there.
    pub keepalive: Derived<Duration>,
    /// How long a server may take to answer.
    pub connect_timeout: Derived<Duration>,
    /// How the legs share the rate.
    pub weights: Weights,
    /// Bytes that the receiver at the other end takes from the first segment on, where they are known.
    pub peer_window: Derived<Option<u64>>,
}

impl LinkProfile {
    /// Works out what the operator did not give. `congestion` is what the kernel offers best for links that lose
    /// packets, `connect_timeout` what holds elsewhere.
    pub fn derive(spec: &LinkSpec, congestion: &str, connect_timeout: Duration) -> Self {
        let rtt = spec.rtt;
        let send_rate = spec.up.unwrap_or(spec.rate);
        let pacing = spec.pacing.unwrap_or(Rate::from_bps(send_rate.bps() / 100 * 95));
        let sent = send_rate.bytes_in(rtt);
        let received = spec.rate.bytes_in(rtt);
        let seconds = Duration::from_secs;
        Self {
            interface: spec.interface.clone(),
            rtt,
            receive_rate: Derived {
                value: spec.rate,
                origin: Origin::Given,
            },
            send_rate: Derived::new(spec.up, send_rate, "the rate, as no up is given"),
            pacing: Derived::new(
                spec.pacing,
                pacing,
                "95 % of the send rate: headers take 3.5 %, the rest lets queues drain",
            ),
            congestion: Derived::new(
                spec.congestion.clone(),
                congestion.to_owned(),
                match RateControl::is_named(congestion) {
                    true => "pepsal's own: sends at the leg's share, whatever is lost",
                    false => "the best for lossy links that this kernel has",
                },
            ),
            initial_window: Derived::new(
                spec.initial_window,
                pacing.bytes_in(rtt).max(INITIAL_WINDOW_MIN),
                "what the pacing rate sends in a round trip; a leg gets its share",
            ),
            receive_buffer: Derived::new(
                spec.receive_buffer,
                (2 * received + SLACK).min(u64::from(u32::MAX / 4)),
                "two bandwidth-delay products: one in flight, one for a loss to be repaired",
            ),
            send_buffer: Derived::new(
                spec.send_buffer,
                (2 * sent + SLACK).min(u64::from(u32::MAX / 4)),
                "two bandwidth-delay products: one in flight, one for a loss to be repaired",
            ),
            unsent: Derived::new(
                spec.unsent,
                send_rate
                    .bytes_in(Duration::from_millis(50))
                    .clamp(32 << 10, 4 << 20),
                "50 ms at the send rate: enough to keep sending, too little to wait long behind",
            ),
            mss: Derived {
                value: spec.mss,
                origin: spec.mss.map_or(Origin::Derived("the path's"), |_| Origin::Given),
            },
            rto_min: Derived::new(
                spec.rto_min,
                Duration::from_millis(200),
                "the kernel's own, and the most that it allows: it is added to the round trip",
            ),
            rto_max: Derived::new(
                spec.rto_max,
                (rtt * 10)
                    .clamp(seconds(5), seconds(60))
                    .max(spec.rto_min.unwrap_or_default()),
                "ten round trips: an outage ends, and nobody waits two minutes after it",
            ),
            user_timeout: Derived::new(
                spec.user_timeout,
                USER_TIMEOUT,
                "what the kernel's fifteen retransmissions take without a longest timeout",
            ),
            keepalive: Derived::new(
                spec.keepalive,
                seconds(600).max(rtt * 100),
                "ten minutes, at least a hundred round trips",
            ),
            connect_timeout: Derived::new(
                spec.connect_timeout,
                connect_timeout.max(rtt * 20),
                "--connect-timeout, at least twenty round trips",
            ),
            weights: spec.weights,
            peer_window: match spec.peer {
                Peer::Unknown => Derived {
                    value: None,
                    origin: Origin::Derived("what the peer says"),
                },
                Peer::Pepsal => Derived {
                    value: Some(sent),
                    origin: Origin::Derived("a bandwidth-delay product, as the peer is a pepsal too"),
                },
            },
        }
    }
}

/// A link that has a profile, and the legs that share it.
#[derive(Debug)]
pub struct Link {
    /// How its legs are tuned.
    pub profile: LinkProfile,
    /// How they share its rate.
    pub budget: Arc<Budget>,
}

/// The links that have or had a profile, numbered from one as the kernel side knows them. A number stays its interface's.
#[derive(Debug, Default)]
pub struct Links(RwLock<Numbered>);

#[derive(Debug, Default)]
struct Numbered {
    links: Vec<Arc<Link>>,
    /// By position: whether the link has its profile still.
    described: Vec<bool>,
    /// Interface index to position.
    by_ifindex: HashMap<u32, usize>,
}

impl Links {
    /// Takes the profiles.
    pub fn new(profiles: Vec<LinkProfile>) -> Self {
        let links = Self::default();
        links.replace(links.prepare(profiles));
        links
    }

    /// What the links would be with these profiles. A number that was given is never taken back, and its budget stays.
    pub fn prepare(&self, profiles: Vec<LinkProfile>) -> Prepared {
        let (mut links, count) = (self.all(), self.read().links.len());
        let mut described = vec![false; count];
        for profile in profiles {
            match position(&links, &profile.interface) {
                Some(position) => {
                    let budget = links[position].budget.clone();
                    links[position] = Arc::new(Link { profile, budget });
                    described[position] = true;
                }
                None => {
                    let budget = Arc::new(Budget::new(&profile));
                    links.push(Arc::new(Link { profile, budget }));
                    described.push(true);
                }
            }
        }
        Prepared { links, described }
    }

    /// Lets what was prepared hold from now on: for legs that start later, and its rates for those that are there too.
    pub fn replace(&self, prepared: Prepared) {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for link in &prepared.links {
            link.budget.change(&link.profile);
        }
        numbered.links = prepared.links;
        numbered.described = prepared.described;
    }

    /// All of them, in the order of their numbers, those that have no profile any more too.
    pub fn all(&self) -> Vec<Arc<Link>> {
        self.read().links.clone()
    }

    /// Those that have a profile at present.
    pub fn current(&self) -> Vec<Arc<Link>> {
        let numbered = self.read();
        let links = numbered.links.iter().zip(&numbered.described);
        links
            .filter(|(_, is)| **is)
            .map(|(link, _)| link.clone())
            .collect()
    }

    /// The number of the link behind an interface, [`pepsal_ebpf::NO_LINK`] when it has no profile. From now on legs
    /// find it by the interface's index.
    pub fn bind(&self, ifindex: u32, interface: &str) -> u32 {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let Some(position) = position(&numbered.links, interface) else {
            return pepsal_ebpf::NO_LINK;
        };
        numbered.by_ifindex.insert(ifindex, position);
        match numbered.described[position] {
            true => position as u32 + 1,
            false => pepsal_ebpf::NO_LINK,
        }
    }

    /// Forgets an interface that is gone.
    pub fn unbind(&self, ifindex: u32) {
        let mut numbered = self.0.write().unwrap_or_else(PoisonError::into_inner);
        numbered.by_ifindex.remove(&ifindex);
    }

    /// The link behind the interface of an index.
    pub fn of(&self, ifindex: u32) -> Option<Arc<Link>> {
        let numbered = self.read();
        let position = *numbered.by_ifindex.get(&ifindex)?;
        numbered.described[position].then(|| numbered.links[position].clone())
    }

    fn read(&self) -> RwLockReadGuard<'_, Numbered> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Links that do not hold yet.
pub struct Prepared {
    /// All of them, in the order of their numbers.
    pub links: Vec<Arc<Link>>,
    described: Vec<bool>,
}

fn position(links: &[Arc<Link>], interface: &str) -> Option<usize> {
    links.iter().position(|link| link.profile.interface == interface)
}

/// `TCP_INIT_CWND` of RFC 6928 in bytes: no link is so slow that less would be right.
const INITIAL_WINDOW_MIN: u64 = 10 * 1448;

/// tcp_retries2 in ip-sysctl: 15 retransmissions, 924.6 s at timeouts from 200 ms to 120 s. A shorter longest timeout
/// (TCP_RTO_MAX_MS) shortens that to as little as a minute.
const USER_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Room for segments' bookkeeping on links with a small product.
const SLACK: u64 = 256 << 10;

impl fmt::Display for LinkProfile {
    /// A table: what, how much, and why.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String, origin: Origin| {
            let origin = match origin {
                Origin::Given => "given",
                Origin::Derived(how) => how,
            };
            writeln!(f, "  {name:<18} {value:>14}  {origin}")
        };
        let size = |derived: &Derived<u64>| (show_size(derived.value), derived.origin);
        let time = |derived: &Derived<Duration>| (format!("{:?}", derived.value), derived.origin);
        row("link", self.interface.clone(), Origin::Given)?;
        row("rtt", format!("{:?}", self.rtt), Origin::Given)?;
        row(
            "receive rate",
            self.receive_rate.value.to_string(),
            self.receive_rate.origin,
        )?;
        row(
            "send rate",
            self.send_rate.value.to_string(),
            self.send_rate.origin,
        )?;
        row("pacing", self.pacing.value.to_string(), self.pacing.origin)?;
        row(
            "congestion",
            self.congestion.value.clone(),
            self.congestion.origin,
        )?;
        for (name, (value, origin)) in [
            ("initial window", size(&self.initial_window)),
            ("receive window", size(&self.receive_buffer)),
            ("send buffer", size(&self.send_buffer)),
            ("unsent at most", size(&self.unsent)),
            ("rto at least", time(&self.rto_min)),
            ("rto at most", time(&self.rto_max)),
            ("user timeout", time(&self.user_timeout)),
            ("keepalive after", time(&self.keepalive)),
            ("connect timeout", time(&self.connect_timeout)),
        ] {
            row(name, value, origin)?;
        }
        row(
            "peer's window",
            self.peer_window.value.map_or("advertised".into(), show_size),
            self.peer_window.origin,
        )?;
        row(
            "mss",
            self.mss.value.map_or("path".into(), |mss| format!("{mss} B")),
            self.mss.origin,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(text: &str) -> LinkProfile {
        LinkProfile::derive(&text.parse().unwrap(), "bbr", Duration::from_secs(60))
    }

    #[test]
    fn sizes_follow_from_rate_and_round_trip() {
        let geo = profile("sat0,rate=50mbit,rtt=600ms");
        assert_eq!(geo.pacing.value.bps(), 47_500_000);
        assert_eq!(geo.initial_window.value, 3_562_500);
        assert_eq!(geo.receive_buffer.value, 2 * 3_750_000 + SLACK);
        assert_eq!(geo.rto_max.value, Duration::from_secs(6));
        assert_eq!(geo.user_timeout.value, Duration::from_secs(900));
        assert_eq!(geo.congestion.value, "bbr");
    }

    #[test]
    fn each_direction_has_its_own_product() {
        let terminal = profile("sat0,rate=50mbit,rtt=600ms,up=5mbit");
        assert_eq!(terminal.initial_window.value, 356_250);
        assert_eq!(terminal.send_buffer.value, 2 * 375_000 + SLACK);
        assert_eq!(terminal.receive_buffer.value, 2 * 3_750_000 + SLACK);
    }

    #[test]
    fn what_is_given_stays_as_it_is() {
        let link = profile(
            "sat0,rate=50mbit,rtt=600ms,iw=64KiB,cc=hybla,rcvbuf=1MiB,rto-max=30s,mss=1200,user-timeout=1h",
        );
        assert_eq!(
            link.initial_window,
            Derived {
                value: 65_536,
                origin: Origin::Given
            }
        );
        assert_eq!(
            link.congestion,
            Derived {
                value: "hybla".into(),
                origin: Origin::Given
            }
        );
        assert_eq!(link.receive_buffer.value, 1 << 20);
        assert_eq!(link.rto_max.value, Duration::from_secs(30));
        assert_eq!(
            link.user_timeout,
            Derived {
                value: Duration::from_secs(3600),
                origin: Origin::Given
            }
        );
        assert_eq!(link.mss.value, Some(1200));
    }

    #[test]
    fn a_profile_that_changes_keeps_its_number_and_its_budget() {
        let (a, b) = (profile("a,rate=5mbit,rtt=1s"), profile("b,rate=5mbit,rtt=1s"));
        let (other_b, c) = (profile("b,rate=9mbit,rtt=1s"), profile("c,rate=1mbit,rtt=1s"));
        let links = Links::new(vec![a, b]);
        let none = pepsal_ebpf::NO_LINK;
        assert_eq!((links.bind(7, "b"), links.bind(8, "c")), (2, none));
        let before = links.of(7).unwrap();
        links.replace(links.prepare(vec![c, other_b]));
        let now = links.of(7).unwrap();
        assert_eq!(now.profile.receive_rate.value, Rate::from_bps(9_000_000));
        assert!(Arc::ptr_eq(&before.budget, &now.budget));
        assert_eq!(
            (links.bind(9, "a"), links.bind(7, "b"), links.bind(8, "c")),
            (none, 2, 3)
        );
        assert!(links.of(9).is_none(), "it has no profile any more");
    }

    #[test]
    fn a_slow_link_still_gets_the_standard_initial_window() {
        assert_eq!(
            profile("sat0,rate=64kbit,rtt=600ms").initial_window.value,
            INITIAL_WINDOW_MIN
        );
    }

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
                "sat0,rate=50mbit,rtt=600ms,weights=size",
                "weights: 'size' is neither",
            ),
            ("sat0,rate=50mbit,rtt=600ms,mss=9", "mss: '9'"),
        ] {
            let error = text.parse::<LinkSpec>().unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    #[test]
    fn the_table_says_where_values_come_from() {
        let table = profile("sat0,rate=50mbit,rtt=600ms,iw=64KiB").to_string();
        let row = |name: &str| {
            table
                .lines()
                .find(|line| line.trim_start().starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(row("initial window").ends_with("64 KiB  given"));
        assert!(row("send rate").contains("the rate, as no up is given"));
    }
}
