//! A link's rate, shared among the legs that send on it.
//!
//! The proxy is the only bulk sender on its links, so it does not have to find out what there is by filling queues and
//! losing packets: it divides the rate, max-min fair by weight, and caps each leg's pacing at its share. What an
//! active leg does not need goes to the others; an idle one costs nothing.

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::trace;

use crate::{
    link::profile::LinkProfile,
    tcp::{congestion::Congestion, options, stream::Stream},
    units::Rate,
};

/// What a leg asks of its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Its weight among the others, at least one.
    pub weight: u64,
    /// The most that it can use, in any unit of rate.
    pub want: u64,
}

/// Divides `rate`: nobody gets more than it wants, and who gets less than it wants gets, for its weight, at least as
/// much as anybody else. The shares never add up to more than the rate.
pub fn divide(rate: u64, demands: &[Demand]) -> Vec<u64> {
    let mut shares = vec![0; demands.len()];
    let mut open: Vec<usize> = (0..demands.len()).collect();
    // Who wants least for its weight is served first; what it leaves is the others'.
    open.sort_by_key(|&i| demands[i].want / demands[i].weight.max(1));
    let mut weights: u64 = demands.iter().map(|demand| demand.weight.max(1)).sum();
    let mut left = rate;
    for i in open {
        let weight = demands[i].weight.max(1);
        let fair = (u128::from(left) * u128::from(weight) / u128::from(weights)) as u64;
        shares[i] = demands[i].want.min(fair);
        left -= shares[i];
        weights -= weight;
    }
    shares
}

/// How often the rate is divided anew while legs send.
const INTERVAL: Duration = Duration::from_millis(100);

/// A share that grew by this factor makes a leg look for its rate anew: by itself BBR would take a minute.
const REGROWTH: (u64, u64) = (3, 2);

/// The legs of one link and its rate.
#[derive(Debug)]
pub struct Budget {
    ledger: Mutex<Ledger>,
    woken: Notify,
}

#[derive(Debug)]
struct Ledger {
    /// Bytes of payload per second.
    rate: u64,
    rtt: Duration,
    user_timeout: Duration,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    leg: Arc<Sender>,
    weight: u64,
    congestion: Congestion,
    /// When it last began to send after having had nothing to send.
    active_since: Instant,
    share: u64,
    written: u64,
    unacknowledged: u64,
    /// Acknowledged bytes per second, averaged over about a round trip.
    rate: f64,
    backoff: Backoff,
    silence: Silence,
    /// TCP_USER_TIMEOUT of the socket; zero for none.
    user_timeout: Duration,
}

#[derive(Debug)]
struct Sender {
    stream: Arc<Stream>,
    written: AtomicU64,
    idle: AtomicBool,
}

/// A leg's part in its link's budget, given up when this is dropped.
#[derive(Debug)]
pub struct Membership {
    budget: Arc<Budget>,
    leg: Arc<Sender>,
}

impl Budget {
    /// The budget of a link.
    pub fn new(profile: &LinkProfile) -> Self {
        let ledger = Ledger {
            rate: profile.pacing.value.bps() / 8,
            rtt: profile.rtt,
            user_timeout: profile.user_timeout.value,
            members: Vec::new(),
        };
        Self {
            ledger: Mutex::new(ledger),
            woken: Notify::new(),
        }
    }

    /// Divides what this profile says from now on, among the legs that are there already too.
    pub fn change(&self, profile: &LinkProfile) {
        let mut ledger = self.lock();
        ledger.rate = profile.pacing.value.bps() / 8;
        ledger.rtt = profile.rtt;
        ledger.user_timeout = profile.user_timeout.value;
        self.woken.notify_one();
    }

    /// Takes a leg in that has not sent anything yet: it starts with the share that it has if it sends at once, and with
    /// the window for it, but not more than `window` bytes.
    pub fn join(
        self: &Arc<Self>,
        stream: Arc<Stream>,
        weight: u64,
        congestion: &Congestion,
        window: u64,
    ) -> Membership {
        let leg = Arc::new(Sender {
            stream,
            written: AtomicU64::new(0),
            idle: AtomicBool::new(true),
        });
        let mut ledger = self.lock();
        let others: u64 = ledger
            .members
            .iter()
            .filter(|member| !member.leg.is_idle())
            .map(|member| member.weight)
            .sum();
        let share = (ledger.rate * weight / (others + weight)).max(FLOOR);
        pace(&leg.stream, share);
        set_initial_window(
            &leg.stream,
            Rate::from_bps(share * 8).bytes_in(ledger.rtt).min(window),
            congestion,
        );
        ledger.members.push(Member {
            leg: leg.clone(),
            weight,
            congestion: congestion.clone(),
            active_since: Instant::now(),
            share,
            written: 0,
            unacknowledged: 0,
            rate: 0.0,
            backoff: Backoff::new(),
            silence: Silence::default(),
            user_timeout: Duration::ZERO,
        });
        Membership {
            budget: self.clone(),
            leg,
        }
    }

    /// Divides the rate for as long as this is polled: while legs send, and whenever one begins to. It sleeps otherwise.
    pub async fn keep(&self) {
        loop {
            self.woken.notified().await;
            let mut ticks = interval(INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut before = Instant::now();
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = self.woken.notified() => {}
                }
                let now = Instant::now();
                if !self.redivide(now, now - before) {
                    break;
                }
                before = now;
            }
        }
    }

    /// One division; false when no leg sends any more.
    fn redivide(&self, now: Instant, elapsed: Duration) -> bool {
        let mut ledger = self.lock();
        let Ledger {
            rate,
            rtt,
            user_timeout,
            members,
        } = &mut *ledger;
        let (rate, rtt, user_timeout) = (*rate, *rtt, *user_timeout);
        let appetites: Vec<Appetite> = members
            .iter_mut()
            .map(|member| {
                let appetite = member.appetite(now, elapsed, rtt);
                member.apply_user_timeout(user_timeout, rtt);
                appetite
            })
            .collect();
        for ((member, appetite), share) in members.iter_mut().zip(&appetites).zip(shares(rate, &appetites)) {
            member.leg.idle.store(appetite.need == 0, Ordering::Relaxed);
            member.set_share(share, now);
        }
        appetites.iter().any(|appetite| appetite.need > 0)
    }

    /// What is divided, in bytes of payload per second, and how much of it the legs use at present: what was acknowledged,
    /// averaged over about a round trip.
    pub fn rate(&self) -> (u64, f64) {
        let ledger = self.lock();
        let used = ledger.members.iter().filter(|member| !member.leg.is_idle());
        // Not sum(), which is minus zero for none.
        let used = used.fold(0.0, |rate, member| rate + member.rate);
        (ledger.rate, used)
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a leg asks of a division.
#[derive(Debug, Clone, Copy)]
struct Appetite {
    weight: u64,
    /// Bytes per second that it can use; zero when it is idle.
    need: u64,
    /// Whether it has more to send than was let out.
    is_backlogged: bool,
    /// Whether it sends about as fast as its share allows, or has only begun.
    keeps_up: bool,
    /// Bytes per second that it is not to exceed, whatever there is.
    ceiling: u64,
}

/// The bytes per second that each leg may send of a link's `rate`.
///
/// The rate is reserved for legs that use it. One that sends less, because its peer or its source is slow or because its
/// segments were lost, has only the double of that reserved, but may send at what it would get if it used it: the kernel
/// spaces two segments out by the rate of the moment, and at a few kB/s that is seconds in which no division helps.
fn shares(rate: u64, appetites: &[Appetite]) -> Vec<u64> {
    let demands = |want: fn(&Appetite) -> u64| -> Vec<Demand> {
        let demand = |appetite: &Appetite| Demand {
            weight: appetite.weight,
            want: want(appetite),
        };
        appetites.iter().map(demand).collect()
    };
    let reserved = divide(rate, &demands(|appetite| appetite.need));
    let spare = rate - reserved.iter().sum::<u64>();
    // What nobody needs is for those who have something to send, in case that they can after all.
    let extra = divide(
        spare,
        &demands(|appetite| if appetite.is_backlogged { u64::MAX } else { 0 }),
    );
    let eager = appetites.iter().filter(|appetite| appetite.is_eager());
    let eager: u64 = eager.map(|appetite| appetite.weight).sum();
    let share = |((appetite, reserved), extra): ((&Appetite, u64), u64)| {
        let share = match appetite.is_eager() {
            true => reserved + extra,
            false => (reserved + extra).max(rate * appetite.weight / (eager + appetite.weight)),
        };
        share.min(appetite.ceiling)
    };
    appetites.iter().zip(reserved).zip(extra).map(share).collect()
}

impl Appetite {
    /// Whether it has more to send than its share lets out, and nothing else holds it back.
    fn is_eager(&self) -> bool {
        self.is_backlogged && self.keeps_up
    }
}

impl Member {
    fn appetite(&mut self, now: Instant, elapsed: Duration, rtt: Duration) -> Appetite {
        let stream = &*self.leg.stream;
        let written = self.leg.written.load(Ordering::Relaxed);
        let unacknowledged = options::unacknowledged(stream).unwrap_or(0);
        let acknowledged = (written - self.written + self.unacknowledged).saturating_sub(unacknowledged);
        if written == self.written && unacknowledged == 0 {
            (self.unacknowledged, self.rate, self.active_since) = (0, 0.0, now);
            self.silence.end();
            return Appetite {
                weight: self.weight,
                need: 0,
                is_backlogged: false,
                keeps_up: false,
                ceiling: u64::MAX,
            };
        }
        let unsent = options::unsent(stream).unwrap_or(0);
        let is_backlogged = unsent > 0;
        self.silence
            .observe(acknowledged, unacknowledged.saturating_sub(unsent), elapsed);
        (self.written, self.unacknowledged) = (written, unacknowledged);
        let seconds = elapsed.as_secs_f64().max(0.001);
        let weight = (seconds / rtt.as_secs_f64()).min(1.0);
        self.rate += weight * (acknowledged as f64 / seconds - self.rate);
        self.backoff.observe(stream, acknowledged, elapsed, rtt);

        let is_new = now - self.active_since < 4 * rtt;
        let keeps_up = is_new || self.rate * 4.0 > self.share as f64;
        let need = match is_backlogged && keeps_up {
            true => u64::MAX,
            // Its peer or its source is slower than its share. It may double, but does not hold what others can use.
            false => (2.0 * self.rate) as u64 + FLOOR,
        };
        Appetite {
            weight: self.weight,
            need: need.min(self.backoff.ceiling),
            is_backlogged,
            keeps_up,
            ceiling: self.backoff.ceiling,
        }
    }

    /// Sets the socket's user timeout while its peer is silent, and clears it at other times.
    ///
    /// A user timeout that is always set does more than to bound an outage (tcp_timer.c): the kernel gives a connection up
    /// whose peer keeps its window closed for that long, though it answers every probe (RFC 9293, 3.8.6.1); and an idle one
    /// at the first keepalive probe that is lost.
    fn apply_user_timeout(&mut self, timeout: Duration, rtt: Duration) {
        let wanted = match self.silence.is_outage(rtt) {
            true => timeout,
            false => Duration::ZERO,
        };
        if wanted != self.user_timeout {
            if let Err(error) = options::set_user_timeout(&*self.leg.stream, wanted) {
                trace!("user timeout refused: {error}");
            }
            self.user_timeout = wanted;
        }
    }

    fn set_share(&mut self, share: u64, now: Instant) {
        let share = share.max(FLOOR);
        if share.abs_diff(self.share) * 50 < self.share {
            return;
        }
        pace(&self.leg.stream, share);
        let grown = share * REGROWTH.1 > self.share * REGROWTH.0;
        if grown && self.active_since < now && self.congestion == Congestion::Bbr {
            restart(&self.leg.stream);
        }
        self.share = share;
    }
}

/// How long segments have been in flight of which none was acknowledged.
#[derive(Debug, Default)]
struct Silence(Duration);

impl Silence {
    /// Adds `elapsed`, at whose end `in_flight` bytes were sent and unacknowledged.
    fn observe(&mut self, acknowledged: u64, in_flight: u64, elapsed: Duration) {
        match acknowledged == 0 && in_flight > 0 {
            true => self.0 += elapsed,
            false => self.end(),
        }
    }

    fn end(&mut self) {
        self.0 = Duration::ZERO;
    }

    /// Whether it is longer than delayed acknowledgements and a lost segment account for.
    fn is_outage(&self, rtt: Duration) -> bool {
        self.0 >= (2 * rtt).max(Duration::from_secs(1))
    }
}

/// Bounds the rate of a leg that loses too much: the operator's rate may be wrong, or the link fades.
#[derive(Debug)]
struct Backoff {
    /// Bytes per second that the leg may send; `u64::MAX` before the first excessive loss.
    ceiling: u64,
    /// The sum of the periods since the loss was last judged.
    sample: Period,
    period: Period,
    /// The kernel's count of retransmissions when `period` began.
    retransmitted: u32,
}

/// A leg's figures over some time in which it had something to send.
#[derive(Debug, Clone, Copy, Default)]
struct Period {
    time: Duration,
    /// Bytes.
    acknowledged: u64,
    /// Segments.
    arrived: u64,
    /// Segments.
    lost: u64,
}

/// Lost segments in a hundred above which the rate is more than the path carries, and not merely the link's losses.
const EXCESS_LOSS: u64 = 20;

/// Segments in the smallest sample whose loss lowers the ceiling.
const SAMPLE: u64 = 100;

impl Period {
    fn add(&mut self, other: Self) {
        self.time += other.time;
        self.acknowledged += other.acknowledged;
        self.arrived += other.arrived;
        self.lost += other.lost;
    }

    fn segments(&self) -> u64 {
        self.arrived + self.lost
    }

    fn has_excess_loss(&self) -> bool {
        self.lost * 100 > self.segments() * EXCESS_LOSS
    }

    /// Returns the acknowledged bytes per second.
    fn rate(&self) -> u64 {
        (self.acknowledged as f64 / self.time.as_secs_f64().max(0.001)) as u64
    }
}

impl Backoff {
    fn new() -> Self {
        Self {
            ceiling: u64::MAX,
            sample: Period::default(),
            period: Period::default(),
            retransmitted: 0,
        }
    }

    /// Adds what was acknowledged in `elapsed`, and judges the loss once in about two round trips.
    fn observe(&mut self, stream: &Stream, acknowledged: u64, elapsed: Duration, rtt: Duration) {
        self.period.time += elapsed;
        self.period.acknowledged += acknowledged;
        if self.period.time < (2 * rtt).max(Duration::from_millis(200)) {
            return;
        }
        let Ok(info) = options::tcp_info(stream) else {
            return;
        };
        let mut period = mem::take(&mut self.period);
        period.lost = u64::from(info.tcpi_total_retrans.wrapping_sub(self.retransmitted));
        period.arrived = period.acknowledged / u64::from(info.tcpi_snd_mss.max(1));
        self.retransmitted = info.tcpi_total_retrans;
        self.judge(period);
    }

    /// Lowers the ceiling to the rate of a sample with excessive loss; raises it by a quarter after each period without.
    ///
    /// A slow leg needs many periods for a sample. Its ceiling rises nevertheless, or the leg of a link that was faded
    /// would stay as slow as the fade has made it.
    fn judge(&mut self, period: Period) {
        self.sample.add(period);
        if self.sample.segments() >= SAMPLE {
            let sample = mem::take(&mut self.sample);
            if sample.has_excess_loss() {
                self.ceiling = sample.rate().max(FLOOR);
                return;
            }
        }
        if !period.has_excess_loss() {
            // Where it ends up above the link's rate the division bounds it.
            self.ceiling = self.ceiling.saturating_add(self.ceiling / 4);
        }
    }
}

fn set_initial_window(stream: &Stream, bytes: u64, congestion: &Congestion) {
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

fn restart(stream: &Stream) {
    if let Err(error) = options::restart_congestion(stream) {
        trace!("cannot restart the congestion control: {error}");
    }
}

/// Bytes per second below which no leg is paced: about a segment a second.
const FLOOR: u64 = 1_448;

fn pace(stream: &Stream, bytes_per_second: u64) {
    if let Err(error) = options::set_pacing_rate(stream, bytes_per_second) {
        trace!("pacing refused: {error}");
    }
}

impl Sender {
    fn is_idle(&self) -> bool {
        self.idle.load(Ordering::Relaxed)
    }
}

impl Membership {
    /// Notes that the leg was given bytes to send.
    pub fn wrote(&self, bytes: usize) {
        self.leg.written.fetch_add(bytes as u64, Ordering::Relaxed);
        if self.leg.is_idle() && self.leg.idle.swap(false, Ordering::Relaxed) {
            self.budget.woken.notify_one();
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.budget
            .lock()
            .members
            .retain(|member| !Arc::ptr_eq(&member.leg, &self.leg));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn demand(want: u64) -> Demand {
        Demand { weight: 1, want }
    }

    #[test]
    fn all_who_want_all_get_the_same() {
        assert_eq!(divide(100, &[demand(u64::MAX); 4]), [25; 4]);
    }

    #[test]
    fn what_one_does_not_need_goes_to_the_others() {
        assert_eq!(
            divide(100, &[demand(u64::MAX), demand(10), demand(u64::MAX)]),
            [45, 10, 45]
        );
        assert_eq!(divide(100, &[demand(0), demand(u64::MAX)]), [0, 100]);
    }

    #[test]
    fn weights_scale_the_shares() {
        let heavy = Demand {
            weight: 3,
            want: u64::MAX,
        };
        assert_eq!(divide(100, &[demand(u64::MAX), heavy]), [25, 75]);
    }

    #[test]
    fn nobody_gets_nothing_of_nothing() {
        assert_eq!(divide(100, &[]), Vec::<u64>::new());
        assert_eq!(divide(0, &[demand(5)]), [0]);
    }

    fn appetite(need: u64, keeps_up: bool) -> Appetite {
        Appetite {
            weight: 1,
            need,
            is_backlogged: true,
            keeps_up,
            ceiling: u64::MAX,
        }
    }

    #[test]
    fn a_leg_that_lost_its_segments_is_not_held_at_what_it_sends() {
        let (eager, stalled) = (appetite(u64::MAX, true), appetite(FLOOR, false));
        assert_eq!(shares(1_000_000, &[eager, stalled]), [1_000_000 - FLOOR, 500_000]);
        assert_eq!(shares(1_000_000, &[stalled]), [1_000_000]);
        let faded = Appetite {
            ceiling: 30_000,
            ..stalled
        };
        assert_eq!(shares(1_000_000, &[eager, faded])[1], 30_000);
    }

    /// A period of 1.2 s, two round trips of a satellite link, with segments of 1448 bytes.
    fn period(arrived: u64, lost: u64) -> Period {
        Period {
            time: Duration::from_millis(1200),
            acknowledged: arrived * FLOOR,
            arrived,
            lost,
        }
    }

    fn backoff_at(ceiling: u64) -> Backoff {
        Backoff {
            ceiling,
            ..Backoff::new()
        }
    }

    #[test]
    fn excessive_loss_lowers_the_ceiling_to_the_rate_that_arrived() {
        let mut backoff = Backoff::new();
        backoff.judge(period(600, 120));
        assert_eq!(
            backoff.ceiling,
            u64::MAX,
            "the loss of a lossy link is not excessive"
        );
        backoff.judge(period(600, 400));
        assert_eq!(backoff.ceiling, 600 * FLOOR * 10 / 12);
        backoff.judge(period(0, 400));
        assert_eq!(backoff.ceiling, FLOOR);
    }

    #[test]
    fn few_segments_add_up_to_a_sample() {
        let mut backoff = Backoff::new();
        for _ in 0..9 {
            backoff.judge(period(6, 5));
            assert_eq!(backoff.ceiling, u64::MAX);
        }
        backoff.judge(period(6, 5));
        assert_eq!(backoff.ceiling, 6 * FLOOR * 10 / 12);
    }

    #[test]
    fn a_leg_recovers_from_an_outage() {
        let mut backoff = backoff_at(FLOOR);
        // The last that were lost are repeated.
        backoff.judge(period(1, 40));
        assert_eq!(backoff.ceiling, FLOOR);
        // The leg sends at its ceiling; 50 Mbit/s are 6.25 MB/s.
        let mut periods = 0;
        while backoff.ceiling < 6_250_000 {
            let segments = backoff.ceiling * 12 / 10 / FLOOR;
            backoff.judge(period(segments - segments / 10, segments / 10));
            periods += 1;
            assert!(
                periods < 60,
                "ceiling {} after {periods} periods",
                backoff.ceiling
            );
        }
    }

    #[test]
    fn a_leg_with_too_little_to_send_for_a_sample_gets_its_ceiling_back() {
        let mut backoff = backoff_at(FLOOR);
        (0..60).for_each(|_| backoff.judge(period(1, 0)));
        assert!(backoff.ceiling > 100 * FLOOR, "{}", backoff.ceiling);
        (0..300).for_each(|_| backoff.judge(period(0, 0)));
        assert_eq!(backoff.ceiling, u64::MAX);
    }

    #[test]
    fn only_segments_in_flight_without_acknowledgement_are_an_outage() {
        let outage = |acknowledged, in_flight| {
            let mut silence = Silence::default();
            (0..11).for_each(|_| silence.observe(acknowledged, in_flight, INTERVAL));
            silence.is_outage(Duration::from_millis(100))
        };
        assert!(outage(0, 1448));
        assert!(!outage(1, 1448));
        assert!(!outage(0, 0), "a closed window");
        let mut silence = Silence(Duration::from_secs(19));
        assert!(!silence.is_outage(Duration::from_secs(10)));
        silence.observe(0, 1, Duration::from_secs(1));
        assert!(silence.is_outage(Duration::from_secs(10)));
        silence.observe(1, 1, INTERVAL);
        assert!(!silence.is_outage(Duration::from_millis(1)));
    }

    proptest! {
        #[test]
        fn the_shares_keep_their_promises(
            rate in 0u64..1_000_000_000_000,
            demands in prop::collection::vec(
                (1u64..9, prop_oneof![Just(0), Just(u64::MAX), 0u64..1_000_000_000_000])
                    .prop_map(|(weight, want)| Demand { weight, want }),
                0..64,
            ),
        ) {
            let shares = divide(rate, &demands);
            prop_assert!(shares.iter().sum::<u64>() <= rate);
            let weights: u64 = demands.iter().map(|demand| demand.weight).sum();
            // Integer division may withhold one unit from each.
            let rounding = demands.len() as u64 + 1;
            for (share, demand) in shares.iter().zip(&demands) {
                prop_assert!(*share <= demand.want);
                let fair = (u128::from(rate) * u128::from(demand.weight) / u128::from(weights.max(1))) as u64;
                prop_assert!(share + rounding >= fair.min(demand.want), "nobody starves");
            }
            if demands.iter().any(|demand| demand.want == u64::MAX) {
                prop_assert!(shares.iter().sum::<u64>() + rounding >= rate, "nothing is left over");
            }
        }
    }
}
