//! What follows from an operator's figures of a link for the legs that leave through it.

use std::{fmt, time::Duration};

use crate::{
    link::spec::{LinkSpec, Peer, Sharing, Weights},
    tcp::congestion::Congestion,
    units::{Rate, show_size},
};

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
    pub congestion: Derived<Congestion>,
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
    /// Among whom the rate is divided first.
    pub sharing: Sharing,
    /// Bytes that the receiver at the other end takes from the first segment on, where they are known.
    pub peer_window: Derived<Option<u64>>,
}

impl LinkProfile {
    /// Works out what the operator did not give. `congestion` is what the kernel offers best for links that lose
    /// packets, `connect_timeout` what holds elsewhere.
    pub fn derive(spec: &LinkSpec, congestion: &Congestion, connect_timeout: Duration) -> Self {
        let send_rate = send_rate(spec);
        let pacing = pacing(spec, send_rate.value);
        Self {
            interface: spec.interface.clone(),
            rtt: spec.rtt,
            receive_rate: Derived {
                value: spec.rate,
                origin: Origin::Given,
            },
            congestion: chosen_congestion(spec, congestion),
            initial_window: initial_window(spec, pacing.value),
            receive_buffer: buffer(spec.receive_buffer, spec.rate, spec.rtt),
            send_buffer: buffer(spec.send_buffer, send_rate.value, spec.rtt),
            unsent: unsent(spec, send_rate.value),
            mss: mss(spec),
            rto_min: rto_min(spec),
            rto_max: rto_max(spec),
            user_timeout: user_timeout(spec),
            keepalive: keepalive(spec),
            connect_timeout: leg_connect_timeout(spec, connect_timeout),
            weights: spec.weights,
            sharing: spec.sharing,
            peer_window: peer_window(spec, send_rate.value),
            send_rate,
            pacing,
        }
    }
}

fn send_rate(spec: &LinkSpec) -> Derived<Rate> {
    Derived::new(spec.up, spec.rate, "the rate, as no up is given")
}

fn pacing(spec: &LinkSpec, send_rate: Rate) -> Derived<Rate> {
    Derived::new(
        spec.pacing,
        Rate::from_bps(send_rate.bps() / 100 * 95),
        "95 % of the send rate: headers take 3.5 %, the rest lets queues drain",
    )
}

fn chosen_congestion(spec: &LinkSpec, best: &Congestion) -> Derived<Congestion> {
    Derived::new(
        spec.congestion.clone(),
        best.clone(),
        match best {
            Congestion::Own(_) => "pepsal's own: sends at the leg's share, whatever is lost",
            _ => "the best for lossy links that this kernel has",
        },
    )
}

fn initial_window(spec: &LinkSpec, pacing: Rate) -> Derived<u64> {
    Derived::new(
        spec.initial_window,
        pacing.bytes_in(spec.rtt).max(INITIAL_WINDOW_MIN),
        "what the pacing rate sends in a round trip; a leg gets its share",
    )
}

fn buffer(given: Option<u64>, rate: Rate, rtt: Duration) -> Derived<u64> {
    Derived::new(
        given,
        (2 * rate.bytes_in(rtt) + SLACK).min(u64::from(u32::MAX / 4)),
        "two bandwidth-delay products: one in flight, one for a loss to be repaired",
    )
}

fn unsent(spec: &LinkSpec, send_rate: Rate) -> Derived<u64> {
    Derived::new(
        spec.unsent,
        send_rate
            .bytes_in(Duration::from_millis(50))
            .clamp(32 << 10, 4 << 20),
        "50 ms at the send rate: enough to keep sending, too little to wait long behind",
    )
}

fn mss(spec: &LinkSpec) -> Derived<Option<u16>> {
    Derived {
        value: spec.mss,
        origin: spec.mss.map_or(Origin::Derived("the path's"), |_| Origin::Given),
    }
}

fn rto_min(spec: &LinkSpec) -> Derived<Duration> {
    Derived::new(
        spec.rto_min,
        Duration::from_millis(200),
        "the kernel's own, and the most that it allows: it is added to the round trip",
    )
}

fn rto_max(spec: &LinkSpec) -> Derived<Duration> {
    Derived::new(
        spec.rto_max,
        (spec.rtt * 10)
            .clamp(Duration::from_secs(5), Duration::from_secs(60))
            .max(spec.rto_min.unwrap_or_default()),
        "ten round trips: an outage ends, and nobody waits two minutes after it",
    )
}

fn user_timeout(spec: &LinkSpec) -> Derived<Duration> {
    Derived::new(
        spec.user_timeout,
        USER_TIMEOUT,
        "what the kernel's fifteen retransmissions take without a longest timeout",
    )
}

fn keepalive(spec: &LinkSpec) -> Derived<Duration> {
    Derived::new(
        spec.keepalive,
        Duration::from_secs(600).max(spec.rtt * 100),
        "ten minutes, at least a hundred round trips",
    )
}

fn leg_connect_timeout(spec: &LinkSpec, elsewhere: Duration) -> Derived<Duration> {
    Derived::new(
        spec.connect_timeout,
        elsewhere.max(spec.rtt * 20),
        "--connect-timeout, at least twenty round trips",
    )
}

fn peer_window(spec: &LinkSpec, send_rate: Rate) -> Derived<Option<u64>> {
    match spec.peer {
        Peer::Unknown => Derived {
            value: None,
            origin: Origin::Derived("what the peer says"),
        },
        Peer::Pepsal => Derived {
            value: Some(send_rate.bytes_in(spec.rtt)),
            origin: Origin::Derived("a bandwidth-delay product, as the peer is a pepsal too"),
        },
    }
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
            self.congestion.value.to_string(),
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
        LinkProfile::derive(&text.parse().unwrap(), &Congestion::Bbr, Duration::from_secs(60))
    }

    #[test]
    fn sizes_follow_from_rate_and_round_trip() {
        let geo = profile("sat0,rate=50mbit,rtt=600ms");
        assert_eq!(geo.pacing.value.bps(), 47_500_000);
        assert_eq!(geo.initial_window.value, 3_562_500);
        assert_eq!(geo.receive_buffer.value, 2 * 3_750_000 + SLACK);
        assert_eq!(geo.rto_max.value, Duration::from_secs(6));
        assert_eq!(geo.user_timeout.value, Duration::from_secs(900));
        assert_eq!(geo.congestion.value, Congestion::Bbr);
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
    fn a_slow_link_still_gets_the_standard_initial_window() {
        assert_eq!(
            profile("sat0,rate=64kbit,rtt=600ms").initial_window.value,
            INITIAL_WINDOW_MIN
        );
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
