//! The legs of a link: what each may send.
//!
//! The proxy is the only one, or nearly so, that sends in bulk on its links, so its legs do not have to find out each for
//! itself what there is by filling queues and losing packets: the [`controller`](super::controller) follows what the link
//! carries, that is [divided](super::division), and each leg's pacing is capped at its share. What an active leg does not
//! need goes to the others; an idle one costs nothing, and is looked at again when it sends.

use std::{
    mem,
    net::IpAddr,
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{debug, trace};

use crate::{
    link::{
        backoff::{Backoff, FLOOR, Period, Silence},
        controller::{Controller, Observation, State},
        division::{Appetite, Subscriber, shares},
        profile::LinkProfile,
        spec::Sharing,
    },
    tcp::{congestion::Congestion, connection::Connection, options},
    units::Rate,
};

/// How often the rate is divided anew while legs send.
const INTERVAL: Duration = Duration::from_millis(100);

/// Segments that have to arrive in a tick for round trips to count.
const DENSE: u64 = 4;

/// The least that `TCP_RTO_MAX_MS` takes.
const RTO_MAX_LEAST: Duration = Duration::from_secs(1);

/// A share that grew by this factor makes a leg look for its rate anew: by itself BBR would take a minute.
const REGROWTH: (u64, u64) = (3, 2);

/// The legs of one link and its rate.
#[derive(Debug)]
pub struct Budget {
    settings: Mutex<Settings>,
    /// Legs that have begun to send since the last division. Held for as long as it takes to append one.
    begun: Mutex<Vec<Arc<Sender>>>,
    woken: Notify,
    /// The weight of all legs that send.
    weight: AtomicU64,
    /// As of the last division.
    found: Mutex<Found>,
}

/// What the profile says of a link.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Settings {
    /// Bytes of payload per second.
    ceiling: u64,
    rtt: Duration,
    rto_max: Duration,
    user_timeout: Duration,
    sharing: Sharing,
}

/// What was found out about a link by its legs.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// Bytes of payload per second that are divided.
    pub rate: u64,
    /// The most that the operator lets be divided.
    pub ceiling: u64,
    /// Bytes of payload per second that the legs use: what was acknowledged, averaged over about a round trip.
    pub used: f64,
    /// How long what is sent waits in front of the link.
    pub queueing: Duration,
    /// What the controller does at present.
    pub state: State,
}

/// A leg, as its flow and the division see it.
#[derive(Debug)]
struct Sender {
    /// The flow's, which closes it.
    stream: Weak<Connection>,
    subscriber: Subscriber,
    weight: u64,
    congestion: Congestion,
    is_idle: AtomicBool,
    /// The division's alone.
    member: Mutex<Member>,
}

/// What is known of a leg from one division to the next.
#[derive(Debug)]
struct Member {
    /// When it last began to send after having had nothing to send.
    active_since: Instant,
    share: u64,
    /// Bytes that have reached the peer, and segments that were sent again.
    arrived: u64,
    retransmitted: u32,
    /// Bytes per second that reach the peer, averaged over about a round trip.
    rate: f64,
    backoff: Backoff,
    silence: Silence,
    /// Whether its timeouts are those of an outage.
    bears_outage: bool,
}

/// A leg's part in its link's budget, given up when the stream is gone.
#[derive(Debug)]
pub struct Membership {
    budget: Arc<Budget>,
    sender: Arc<Sender>,
}

impl Budget {
    /// The budget of a link.
    pub fn new(profile: &LinkProfile) -> Self {
        let settings = Settings::of(profile);
        let found = Found {
            rate: settings.ceiling,
            ceiling: settings.ceiling,
            used: 0.0,
            queueing: Duration::ZERO,
            state: State::AtCeiling,
        };
        Self {
            settings: Mutex::new(settings),
            begun: Mutex::default(),
            woken: Notify::new(),
            weight: AtomicU64::new(0),
            found: Mutex::new(found),
        }
    }

    /// Goes by what this profile says from now on, for the legs that are there already too.
    pub fn change(&self, profile: &LinkProfile) {
        *lock(&self.settings) = Settings::of(profile);
        self.woken.notify_one();
    }

    /// Takes a leg in that has not sent anything yet: it starts with the share that it has if it sends at once, and with
    /// the window for it, but not more than `window` bytes.
    pub fn join(
        self: &Arc<Self>,
        stream: &Arc<Connection>,
        client: IpAddr,
        weight: u64,
        congestion: &Congestion,
        window: u64,
    ) -> Membership {
        let others = self.weight.load(Ordering::Relaxed);
        let share = (self.found().rate * weight / (others + weight)).max(FLOOR);
        let rtt = lock(&self.settings).rtt;
        pace(stream, share);
        set_initial_window(
            stream,
            Rate::from_bps(share * 8).bytes_in(rtt).min(window),
            congestion,
        );
        let sender = Sender {
            stream: Arc::downgrade(stream),
            subscriber: Subscriber::of(client),
            weight,
            congestion: congestion.clone(),
            is_idle: AtomicBool::new(true),
            member: Mutex::new(Member::new(share)),
        };
        Membership {
            budget: self.clone(),
            sender: Arc::new(sender),
        }
    }

    /// Divides the rate for as long as this is polled, while legs send. It sleeps otherwise.
    pub async fn keep(&self) {
        let mut division = Division::new(*lock(&self.settings));
        loop {
            self.woken.notified().await;
            let mut ticks = interval(INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut before = Instant::now();
            loop {
                ticks.tick().await;
                let now = Instant::now();
                division.set(*lock(&self.settings));
                let is_quiet = division.again(self, now, now - before);
                before = now;
                if is_quiet {
                    break;
                }
            }
        }
    }

    /// What was found out about the link.
    pub fn found(&self) -> Found {
        *lock(&self.found)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Settings {
    fn of(profile: &LinkProfile) -> Self {
        Self {
            ceiling: (profile.pacing.value.bps() / 8).max(FLOOR),
            rtt: profile.rtt,
            rto_max: profile.rto_max.value,
            user_timeout: profile.user_timeout.value,
            sharing: profile.sharing,
        }
    }

    fn range(&self) -> RangeInclusive<u64> {
        (self.ceiling / LEAST_PART).max(FLOOR)..=self.ceiling
    }
}

/// The part of the ceiling that a link is taken to carry at least: slower legs would take long to find out that it is more.
const LEAST_PART: u64 = 50;

/// The legs that send, and what is divided among them.
struct Division {
    settings: Settings,
    controller: Controller,
    senders: Vec<Arc<Sender>>,
}

/// What holds for all legs in one tick.
struct Tick {
    settings: Settings,
    now: Instant,
    elapsed: Duration,
    /// Whether losses are the link's.
    excused: bool,
    /// How long a leg waits in an outage before it tries again.
    retry: Duration,
}

/// What is seen of a leg in one tick.
struct Look {
    appetite: Appetite,
    is_idle: bool,
    delivered: u64,
    lost: u64,
    in_flight: bool,
    /// The least round trip and how much longer they are now, where there was an acknowledgement.
    round_trip: Option<(Duration, Duration)>,
}

impl Division {
    fn new(settings: Settings) -> Self {
        Self {
            settings,
            controller: Controller::new(settings.range(), settings.ceiling),
            senders: Vec::new(),
        }
    }

    fn set(&mut self, settings: Settings) {
        if self.settings != settings {
            self.controller.set_range(settings.range());
            self.settings = settings;
        }
    }

    /// A round trip, or as soon as the kernel lets it, or so late that all legs together take a tenth of the rate for it.
    fn retry(&self) -> Duration {
        let bytes = 10 * FLOOR * self.senders.len() as u64;
        let of_rate = Duration::from_secs_f64(bytes as f64 / self.controller.rate() as f64);
        self.settings.rtt.max(RTO_MAX_LEAST).max(of_rate)
    }

    /// Looks at all legs that send, and gives each its share; true when none sends any more.
    fn again(&mut self, budget: &Budget, now: Instant, elapsed: Duration) -> bool {
        for sender in mem::take(&mut *lock(&budget.begun)) {
            lock(&sender.member).active_since = now;
            self.senders.push(sender);
        }
        let settings = self.settings;
        let tick = Tick {
            settings,
            now,
            elapsed,
            excused: self.controller.accounts_for_losses(),
            retry: self.retry(),
        };
        let mut looks = Vec::with_capacity(self.senders.len());
        let mut used = 0.0;
        self.senders.retain(|sender| {
            let mut member = lock(&sender.member);
            let look = sender.look(&mut member, &tick);
            let stays = look.filter(|look| !look.is_idle || sender.has_begun_again());
            if let Some(look) = stays {
                used += member.rate;
                looks.push(look);
                return true;
            }
            budget.weight.fetch_sub(sender.weight, Ordering::Relaxed);
            member.rest();
            false
        });
        if !looks.is_empty() {
            let before = self.controller.state();
            let seen = observation(&looks, elapsed, settings.rtt);
            self.controller.observe(seen);
            let (rate, now) = (self.controller.rate(), self.controller.state());
            if now != before {
                debug!(?seen, rate, "link: {} after {}", now.name(), before.name());
            }
        }
        let appetites: Vec<Appetite> = looks.iter().map(|look| look.appetite).collect();
        let rate = self.controller.rate();
        for (sender, share) in self.senders.iter().zip(shares(rate, &appetites)) {
            sender.set_share(share, now);
        }
        *lock(&budget.found) = Found {
            rate,
            ceiling: settings.ceiling,
            used,
            queueing: self.controller.queueing(),
            state: self.controller.state(),
        };
        self.senders.is_empty()
    }
}

/// The sum of what the legs have seen. Of round trips the lower quartile counts: some legs' paths have queues of their own, and
/// those that have begun late take a queue for their path.
fn observation(looks: &[Look], elapsed: Duration, rtt: Duration) -> Observation {
    let sum = |of: fn(&Look) -> u64| looks.iter().map(of).sum();
    let (mut least, mut queueing): (Vec<Duration>, Vec<Duration>) =
        looks.iter().filter_map(|look| look.round_trip).unzip();
    let quartile = |values: &mut Vec<Duration>| {
        let position = values.len() / 4;
        (!values.is_empty()).then(|| *values.select_nth_unstable(position).1)
    };
    Observation {
        elapsed,
        delivered: sum(|look| look.delivered),
        lost: sum(|look| look.lost),
        in_flight: looks.iter().any(|look| look.in_flight),
        is_backlogged: looks.iter().any(|look| look.appetite.is_eager()),
        rtt: quartile(&mut least).unwrap_or(rtt),
        queueing: quartile(&mut queueing),
    }
}

impl Member {
    fn new(share: u64) -> Self {
        Self {
            active_since: Instant::now(),
            share,
            arrived: 0,
            retransmitted: 0,
            rate: 0.0,
            backoff: Backoff::new(),
            silence: Silence::default(),
            bears_outage: false,
        }
    }

    fn rest(&mut self) {
        self.rate = 0.0;
        self.silence.end();
    }

    /// Sets the socket's user timeout while its peer is silent, and has it try again after `retry` at most; undoes both at other
    /// times.
    ///
    /// A user timeout that is always set does more than to bound an outage (tcp_timer.c): the kernel gives a connection up
    /// whose peer keeps its window closed for that long, though it answers every probe (RFC 9293, 3.8.6.1); and an idle one
    /// at the first keepalive probe that is lost.
    fn bear_outage(&mut self, stream: &Connection, settings: &Settings, retry: Duration) {
        let is_outage = self.silence.is_outage(settings.rtt);
        if is_outage == self.bears_outage {
            return;
        }
        let (user_timeout, rto_max) = match is_outage {
            true => (settings.user_timeout, settings.rto_max.min(retry)),
            false => (Duration::ZERO, settings.rto_max),
        };
        for (what, result) in [
            ("user timeout", options::set_user_timeout(stream, user_timeout)),
            (
                "longest retransmission timeout",
                options::set_rto_max(stream, rto_max),
            ),
        ] {
            if let Err(error) = result {
                trace!("{what} refused: {error}");
            }
        }
        self.bears_outage = is_outage;
    }
}

impl Sender {
    /// Asks the kernel about the leg; none when it is gone.
    fn look(&self, member: &mut Member, tick: &Tick) -> Option<Look> {
        let Tick {
            settings,
            now,
            elapsed,
            excused,
            retry,
        } = *tick;
        let stream = self.stream.upgrade()?;
        let info = options::tcp_info(&*stream).ok()?;
        let rtt = settings.rtt;
        let mss = u64::from(info.tcpi_snd_mss);
        // What was acknowledged stands still behind a hole, and then leaps.
        let arrived = (info.tcpi_bytes_acked + u64::from(info.tcpi_sacked) * mss).max(member.arrived);
        let delivered = arrived - member.arrived;
        let lost = u64::from(info.tcpi_total_retrans.wrapping_sub(member.retransmitted));
        (member.arrived, member.retransmitted) = (arrived, info.tcpi_total_retrans);
        let in_flight = info.tcpi_unacked > 0;
        let is_backlogged = info.tcpi_notsent_bytes > 0;

        let seconds = elapsed.as_secs_f64().max(0.001);
        let weight = (seconds / rtt.as_secs_f64()).min(1.0);
        member.rate += weight * (delivered as f64 / seconds - member.rate);
        member.silence.observe(delivered, in_flight.into(), elapsed);
        if excused || member.silence.is_outage(rtt) {
            member.backoff.excuse();
        } else {
            let period = Period {
                time: elapsed,
                acknowledged: delivered,
                arrived: delivered / mss.max(1),
                lost,
            };
            member.backoff.observe(period, rtt);
        }
        member.bear_outage(&stream, &settings, retry);

        let is_new = now - member.active_since < 4 * rtt;
        let keeps_up = is_new || member.rate * 4.0 > member.share as f64;
        let need = match is_backlogged && keeps_up {
            true => u64::MAX,
            // Its peer or its source is slower than its share. It may double, but does not hold what others can use.
            false => (2.0 * member.rate) as u64 + FLOOR,
        };
        let appetite = Appetite {
            subscriber: (settings.sharing == Sharing::Subscriber).then_some(self.subscriber),
            weight: self.weight,
            need: need.min(member.backoff.ceiling),
            is_backlogged,
            keeps_up,
            ceiling: member.backoff.ceiling,
        };
        let micros = |micros: u32| Duration::from_micros(micros.into());
        // The least one is all ones before the first sample. A receiver acknowledges every second segment at once, and single ones
        // up to 40 ms later: only a leg that sends without pause shows the link's delay.
        let has_round_trip = delivered >= DENSE * mss && info.tcpi_rtt >= info.tcpi_min_rtt;
        let round_trip = has_round_trip.then(|| {
            (
                micros(info.tcpi_min_rtt),
                micros(info.tcpi_rtt - info.tcpi_min_rtt),
            )
        });
        Some(Look {
            appetite,
            is_idle: delivered == 0 && !in_flight && !is_backlogged,
            delivered,
            lost: lost * mss,
            in_flight,
            round_trip,
        })
    }

    /// Has the flow wake a leg that is idle, unless it has begun to send meanwhile: it may have written after it was looked
    /// at, and before it could know.
    fn has_begun_again(&self) -> bool {
        self.is_idle.store(true, Ordering::SeqCst);
        let is_empty = |info: nix::libc::tcp_info| info.tcpi_unacked == 0 && info.tcpi_notsent_bytes == 0;
        let stream = self.stream.upgrade();
        let info = stream.and_then(|stream| options::tcp_info(&*stream).ok());
        match info.is_none_or(is_empty) {
            true => false,
            // Where the flow was first, it has entered the leg anew.
            false => self.is_idle.swap(false, Ordering::SeqCst),
        }
    }

    fn set_share(&self, share: u64, now: Instant) {
        let mut member = lock(&self.member);
        let share = share.max(FLOOR);
        if share.abs_diff(member.share) * 50 < member.share {
            return;
        }
        if let Some(stream) = self.stream.upgrade() {
            pace(&stream, share);
            let has_grown = share * REGROWTH.1 > member.share * REGROWTH.0;
            if has_grown && member.active_since < now && self.congestion == Congestion::Bbr {
                restart(&stream);
            }
        }
        member.share = share;
    }
}

fn set_initial_window(stream: &Connection, bytes: u64, congestion: &Congestion) {
    if let Congestion::Own(_) = congestion {
        return restart(stream);
    }
    let mss = options::mss(stream).map_or(1448, |mss| u64::from(mss.max(1)));
    match u32::try_from(bytes / mss) {
        // That much the kernel takes by itself.
        Ok(0..=10) | Err(_) => {}
        Ok(segments) => match options::set_initial_window(stream, segments) {
            // It takes the congestion window that it finds for its first estimate of the rate.
            Ok(()) if *congestion == Congestion::Bbr => restart(stream),
            Ok(()) => {}
            Err(error) => trace!("initial window refused: {error}"),
        },
    }
}

fn restart(stream: &Connection) {
    if let Err(error) = options::restart_congestion(stream) {
        trace!("cannot restart the congestion control: {error}");
    }
}

fn pace(stream: &Connection, bytes_per_second: u64) {
    if let Err(error) = options::set_pacing_rate(stream, bytes_per_second) {
        trace!("pacing refused: {error}");
    }
}

impl Membership {
    /// Notes that the leg was given bytes to send.
    pub fn wrote(&self) {
        let sender = &self.sender;
        if sender.is_idle.load(Ordering::SeqCst) && sender.is_idle.swap(false, Ordering::SeqCst) {
            self.budget.weight.fetch_add(sender.weight, Ordering::Relaxed);
            lock(&self.budget.begun).push(sender.clone());
            self.budget.woken.notify_one();
        }
    }
}
