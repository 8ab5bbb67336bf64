//! A satellite link between two TUN devices.
//!
//! Each direction has a thread that reads packets from one device, decides what becomes of each, and writes those that arrive
//! to the other device when their time has come. The deciding is done by a [`Shaper`] on virtual time: a late wake-up delays a
//! packet by its lateness, and never adds up to a lower rate.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fastrand::Rng;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::prctl;
use nix::sys::time::TimeSpec;

use crate::delays::{DelayCounters, Delays};
use crate::handover::{Handovers, Schedule};
use crate::netns::Namespace;

/// What a link does to packets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkProfile {
    /// Rate towards the server in bit/s, IP headers included.
    pub up_bps: u64,
    /// Rate towards the client in bit/s, IP headers included.
    pub down_bps: u64,
    /// Round-trip time of an idle link; each direction takes half of it.
    pub rtt: Duration,
    /// Probability from 0 to 1 that a packet is lost on its way, in each direction and independently of all others.
    pub loss: f64,
    /// Bytes that may wait for the transmitter in each direction; what comes on top is dropped.
    pub queue_bytes: u64,
    /// Bytes that may wait towards the server, where that is not `queue_bytes`.
    pub up_queue_bytes: Option<u64>,
    /// Seed of the losses: the nth packet of a direction meets the same fate in every run.
    pub seed: u64,
    /// Changes of satellite. Only a TUN link has them: netem knows none.
    pub handovers: Option<Handovers>,
}

impl LinkProfile {
    /// A geostationary satellite link: 600 ms, 50 Mbit/s, 1 % loss.
    pub const GEO: Self = Self::symmetric(50_000_000, Duration::from_millis(600), 0.01);

    /// A link without limits: all that is left of it is the TUN device.
    pub const UNIMPAIRED: Self = Self::symmetric(u64::MAX, Duration::ZERO, 0.0);

    /// A link with the same rate both ways and a queue of one bandwidth-delay product (the rule for modems that serve single
    /// bulk flows; RFC 2488 section 3 asks for windows of that size), though not less than 64 KiB.
    pub const fn symmetric(rate_bps: u64, rtt: Duration, loss: f64) -> Self {
        Self {
            up_bps: rate_bps,
            down_bps: rate_bps,
            rtt,
            loss,
            queue_bytes: queue_for(rate_bps, rtt),
            up_queue_bytes: None,
            seed: 1,
            handovers: None,
        }
    }

    /// A link with a rate of its own, and a queue to match, each way.
    pub const fn asymmetric(up_bps: u64, down_bps: u64, rtt: Duration, loss: f64) -> Self {
        let mut profile = Self::symmetric(down_bps, rtt, loss);
        profile.up_bps = up_bps;
        profile.up_queue_bytes = Some(queue_for(up_bps, rtt));
        profile
    }
}

const fn queue_for(rate_bps: u64, rtt: Duration) -> u64 {
    const LEAST_QUEUE_BYTES: u64 = 64 * 1024;
    let bdp_bytes = (rate_bps as u128 * rtt.as_micros() / 8_000_000) as u64;
    if bdp_bytes > LEAST_QUEUE_BYTES {
        bdp_bytes
    } else {
        LEAST_QUEUE_BYTES
    }
}

/// What has become of the packets so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Towards the server.
    pub up: DirectionCounters,
    /// Towards the client.
    pub down: DirectionCounters,
}

/// What has become of the packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    /// Packets that entered the link.
    pub packets: u64,
    /// Bytes of these, IP headers included.
    pub bytes: u64,
    /// Packets lost at random.
    pub lost: u64,
    /// Packets dropped because the queue was full.
    pub dropped: u64,
    /// The longest that a packet has waited for the transmitter.
    pub max_queue_delay: Duration,
}

/// How long packets have taken so far, where they should not have taken any time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkDelays {
    /// Towards the server.
    pub up: DirectionDelays,
    /// Towards the client.
    pub down: DirectionDelays,
}

/// How long the packets of one direction have taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectionDelays {
    /// Waiting for the transmitter: the link's queue.
    pub queue: Delays,
    /// Arriving later than the profile says: the emulator's own failing, on a machine that is too busy.
    pub lateness: Delays,
}

impl LinkDelays {
    /// Those that were counted after `earlier` had been taken.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            up: self.up.since(&earlier.up),
            down: self.down.since(&earlier.down),
        }
    }
}

impl DirectionDelays {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            queue: self.queue.since(&earlier.queue),
            lateness: self.lateness.since(&earlier.lateness),
        }
    }
}

/// A running link. Dropping it stops its threads and removes its devices.
#[derive(Debug)]
pub struct Emulator {
    up: Arc<Counters>,
    down: Arc<Counters>,
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Emulator {
    /// Makes the device `near_device` in `near` and `far_device` in `far`, both up, and joins them. Up is from near to far.
    ///
    /// # Errors
    /// When a device cannot be made, for want of root, of `/dev/net/tun` or of a free name.
    pub fn start(
        near: &Namespace,
        near_device: &str,
        far: &Namespace,
        far_device: &str,
        profile: LinkProfile,
    ) -> Result<Self> {
        ensure!(
            (0.0..=1.0).contains(&profile.loss),
            "loss {} is no probability",
            profile.loss
        );
        let near_tun = Arc::new(tun(near, near_device)?);
        let far_tun = Arc::new(tun(far, far_device)?);
        let mut emulator = Self {
            up: Arc::default(),
            down: Arc::default(),
            stop: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            threads: Vec::new(),
        };

        let mut rng = Rng::with_seed(profile.seed);
        let mut up = Shaper::new(profile.up_bps, &profile, rng.fork());
        let mut down = Shaper::new(profile.down_bps, &profile, rng.fork());
        let schedule_seed = rng.u64(..);
        if let Some(bytes) = profile.up_queue_bytes {
            up.longest_queue = transmission_time(bytes, profile.up_bps);
        }
        let origin = Instant::now();
        for shaper in [&mut up, &mut down] {
            shaper.schedule = profile
                .handovers
                .map(|handovers| Schedule::new(handovers, schedule_seed, origin));
        }
        emulator.carry("up", &near_tun, &far_tun, up, Arc::clone(&emulator.up));
        emulator.carry("down", &far_tun, &near_tun, down, Arc::clone(&emulator.down));
        Ok(emulator)
    }

    /// What has become of the packets so far.
    pub fn counters(&self) -> LinkCounters {
        LinkCounters {
            up: self.up.read(),
            down: self.down.read(),
        }
    }

    /// How long packets have taken so far.
    pub fn delays(&self) -> LinkDelays {
        LinkDelays {
            up: self.up.delays(),
            down: self.down.delays(),
        }
    }

    fn carry(
        &mut self,
        name: &str,
        from: &Arc<File>,
        to: &Arc<File>,
        shaper: Shaper,
        counters: Arc<Counters>,
    ) {
        let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&self.stop));
        let thread = thread::Builder::new()
            .name(format!("link {name}"))
            .spawn(move || carry(&from, &to, shaper, &counters, &stop))
            .expect("threads are far from their limit");
        self.threads.push(thread);
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.stop.write(1).expect("the counter of an eventfd takes 1");
        for thread in self.threads.drain(..) {
            // A panic there has been printed; panicking here as well would abort.
            let _ = thread.join();
        }
    }
}

/// Packets read from the device in a row before those that are due are looked at again.
const BATCH: usize = 32;
/// The kernel's queue before ours, in packets: large, so that the link's own queue is the one that overflows.
const TX_QUEUE_PACKETS: u32 = 20_000;
const MAX_PACKET_BYTES: usize = 65_536;

/// One direction, until `stop` is written to or the device is gone.
fn carry(mut from: &File, mut to: &File, mut shaper: Shaper, counters: &Counters, stop: &EventFd) {
    // The default slack of 50 us would be four packets' time at 1 Gbit/s. It cannot fail for one's own thread.
    let _ = prctl::set_timerslack(1);
    come_before_programs();
    let mut in_flight = VecDeque::<(Instant, Box<[u8]>)>::new();
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    loop {
        let now = Instant::now();
        while in_flight.front().is_some_and(|(arrival, _)| *arrival <= now) {
            let (arrival, packet) = in_flight.pop_front().expect("there is a front");
            counters.lateness.count(now - arrival);
            // Refused while the device is down: lost, like on any such link.
            let _ = to.write(&packet);
        }

        let wait = in_flight
            .front()
            .map(|(arrival, _)| TimeSpec::from(arrival.saturating_duration_since(now)));
        let mut ready = [
            PollFd::new(from.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        // An interrupted wait is as good as a short one.
        let _ = ppoll(&mut ready, wait, None);
        let is_stopped = ready[1].any().unwrap_or_default();
        let is_gone = ready[0]
            .revents()
            .unwrap_or(PollFlags::empty())
            .contains(PollFlags::POLLERR);
        if is_stopped || is_gone {
            return;
        }

        for _ in 0..BATCH {
            // Nothing there, or the device is down.
            let Ok(len) = from.read(&mut buffer) else { break };
            let fate = shaper.fate(Instant::now(), len);
            counters.count(len, fate, &shaper);
            if let Fate::Arrives(at) = fate {
                in_flight.push_back((at, buffer[..len].into()));
            }
        }
    }
}

/// A link does not wait for a processor, whatever runs on this machine.
fn come_before_programs() {
    // SAFETY: `sched_param` is plain data, for which all zeroes are a value.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the call reads `parameters` and changes this thread only. Where it is refused, packets may be late, which the
    // counters of lateness show.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// Reaches the other end at this time.
    Arrives(Instant),
    /// Takes its time on the link like any other, but does not arrive.
    Lost,
    /// Finds the queue full.
    Dropped,
}

/// One direction on virtual time: a queue, a transmitter, a delay and losses behind it.
struct Shaper {
    rate_bps: u64,
    delay: Duration,
    loss: f64,
    /// The queue's size as the time that the transmitter needs for it.
    longest_queue: Duration,
    rng: Rng,
    /// When the transmitter has sent all that it has accepted.
    free_at: Option<Instant>,
    longest_wait: Duration,
    /// What the packet before has waited.
    last_wait: Duration,
    schedule: Option<Schedule>,
}

impl Shaper {
    fn new(rate_bps: u64, profile: &LinkProfile, rng: Rng) -> Self {
        Self {
            rate_bps,
            delay: profile.rtt / 2,
            loss: profile.loss,
            longest_queue: transmission_time(profile.queue_bytes, rate_bps),
            rng,
            free_at: None,
            longest_wait: Duration::ZERO,
            last_wait: Duration::ZERO,
            schedule: None,
        }
    }

    fn fate(&mut self, now: Instant, len: usize) -> Fate {
        // Drawn for every packet, so that its number alone decides.
        let is_lost = self.rng.f64() < self.loss;
        let transmission = transmission_time(len as u64, self.rate_bps);
        let mut start = self.free_at.map_or(now, |free_at| free_at.max(now));
        let mut backlog = start - now;
        let mut delay = self.delay;
        if let Some(schedule) = &mut self.schedule {
            let silence = schedule.at(start);
            start = start.max(silence.end);
            // The transmitter has nothing to do for what it is silent: that time is no part of the queue.
            backlog =
                (start - now).saturating_sub(silence.end.saturating_duration_since(now.max(silence.start)));
            delay += silence.extra_delay;
        }
        if backlog > self.longest_queue {
            return Fate::Dropped;
        }
        self.last_wait = start - now;
        self.longest_wait = self.longest_wait.max(self.last_wait);
        let sent = start + transmission;
        self.free_at = Some(sent);
        if is_lost {
            Fate::Lost
        } else {
            Fate::Arrives(sent + delay)
        }
    }
}

fn transmission_time(bytes: u64, rate_bps: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 8_000_000_000 / u128::from(rate_bps.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[derive(Debug, Default)]
struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    lost: AtomicU64,
    dropped: AtomicU64,
    max_queue_delay_ns: AtomicU64,
    queue: DelayCounters,
    lateness: DelayCounters,
}

impl Counters {
    fn count(&self, len: usize, fate: Fate, shaper: &Shaper) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        match fate {
            Fate::Arrives(_) => {}
            Fate::Lost => _ = self.lost.fetch_add(1, Ordering::Relaxed),
            Fate::Dropped => _ = self.dropped.fetch_add(1, Ordering::Relaxed),
        }
        if fate != Fate::Dropped {
            self.queue.count(shaper.last_wait);
        }
        self.max_queue_delay_ns
            .store(shaper.longest_wait.as_nanos() as u64, Ordering::Relaxed);
    }

    fn delays(&self) -> DirectionDelays {
        DirectionDelays {
            queue: self.queue.read(),
            lateness: self.lateness.read(),
        }
    }

    fn read(&self) -> DirectionCounters {
        DirectionCounters {
            packets: self.packets.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
            max_queue_delay: Duration::from_nanos(self.max_queue_delay_ns.load(Ordering::Relaxed)),
        }
    }
}

/// Makes a TUN device in `namespace`, up, with an MTU of 1500. It lives as long as the file.
fn tun(namespace: &Namespace, device: &str) -> Result<File> {
    let file = namespace
        .run(|| open_tun(device))
        .with_context(|| format!("TUN device {device}"))?;
    namespace.ip(format!(
        "link set {device} mtu 1500 txqueuelen {TX_QUEUE_PACKETS} up"
    ))?;
    Ok(file)
}

fn open_tun(device: &str) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("/dev/net/tun")?;
    ensure!(device.len() < libc::IFNAMSIZ, "the name is too long");
    // SAFETY: `ifreq` is plain data, for which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    Errno::result(result).context("TUNSETIFF")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET_LEN: usize = 1250;

    fn shaper(profile: LinkProfile) -> Shaper {
        Shaper::new(profile.up_bps, &profile, Rng::with_seed(profile.seed))
    }

    #[test]
    fn packets_are_sent_one_after_the_other_and_then_delayed() {
        let mut shaper = shaper(LinkProfile::symmetric(
            10_000_000,
            Duration::from_millis(100),
            0.0,
        ));
        let start = Instant::now();
        for number in 1..=10 {
            let arrival = start + Duration::from_millis(number) + Duration::from_millis(50);
            assert_eq!(shaper.fate(start, PACKET_LEN), Fate::Arrives(arrival));
        }
        assert_eq!(shaper.longest_wait, Duration::from_millis(9));
        let later = start + Duration::from_secs(1);
        assert_eq!(
            shaper.fate(later, PACKET_LEN),
            Fate::Arrives(later + Duration::from_millis(51))
        );
    }

    #[test]
    fn a_full_queue_drops_and_drains_at_the_rate() {
        let profile = LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0);
        let mut shaper = shaper(LinkProfile {
            queue_bytes: 2 * PACKET_LEN as u64,
            ..profile
        });
        let start = Instant::now();
        let fates = [(); 5].map(|()| shaper.fate(start, PACKET_LEN));
        assert!(matches!(
            fates,
            [
                Fate::Arrives(_),
                Fate::Arrives(_),
                Fate::Arrives(_),
                Fate::Dropped,
                Fate::Dropped
            ]
        ));
        let one_sent = start + Duration::from_millis(1);
        assert!(matches!(shaper.fate(one_sent, PACKET_LEN), Fate::Arrives(_)));
        assert_eq!(shaper.fate(one_sent, PACKET_LEN), Fate::Dropped);
    }

    #[test]
    fn a_handover_holds_packets_back_and_is_no_part_of_the_queue() {
        let handovers = Handovers {
            period: Duration::from_secs(1),
            shortest_silence: Duration::from_millis(100),
            longest_silence: Duration::from_millis(100),
            rtt_step: Duration::ZERO,
        };
        let mut shaper = shaper(LinkProfile {
            queue_bytes: 2 * PACKET_LEN as u64,
            ..LinkProfile::symmetric(10_000_000, Duration::ZERO, 0.0)
        });
        let origin = Instant::now();
        let silence = Schedule::new(handovers, 1, origin).at(origin + handovers.period);
        shaper.schedule = Some(Schedule::new(handovers, 1, origin));
        let sent_at = |n: u64| Fate::Arrives(silence.end + Duration::from_millis(n));
        // Before it, in it, and after it.
        let before = silence.start - Duration::from_millis(5);
        assert_eq!(
            shaper.fate(before, PACKET_LEN),
            Fate::Arrives(before + Duration::from_millis(1))
        );
        let within = silence.start + Duration::from_millis(50);
        assert_eq!(shaper.fate(within, PACKET_LEN), sent_at(1));
        assert_eq!(shaper.fate(within, PACKET_LEN), sent_at(2));
        assert_eq!(shaper.fate(within, PACKET_LEN), sent_at(3));
        assert_eq!(shaper.fate(within, PACKET_LEN), Fate::Dropped);
        assert_eq!(
            shaper.fate(silence.end + Duration::from_millis(1), PACKET_LEN),
            sent_at(4)
        );
    }

    #[test]
    fn each_direction_may_have_a_queue_of_its_own() {
        let profile = LinkProfile::asymmetric(5_000_000, 50_000_000, Duration::from_millis(600), 0.0);
        assert_eq!(profile.queue_bytes, 3_750_000);
        assert_eq!(profile.up_queue_bytes, Some(375_000));
    }

    #[test]
    fn losses_repeat_with_the_seed_whatever_the_times() {
        let profile = LinkProfile::symmetric(u64::MAX, Duration::ZERO, 0.5);
        let losses = |seed, interval| {
            let mut shaper = shaper(LinkProfile { seed, ..profile });
            let start = Instant::now();
            (0..100)
                .map(|n| shaper.fate(start + n * interval, PACKET_LEN) == Fate::Lost)
                .collect::<Vec<_>>()
        };
        assert_eq!(losses(1, Duration::ZERO), losses(1, Duration::from_millis(3)));
        assert_ne!(losses(1, Duration::ZERO), losses(2, Duration::ZERO));
    }

    #[test]
    fn the_default_queue_is_one_bandwidth_delay_product() {
        assert_eq!(LinkProfile::GEO.queue_bytes, 3_750_000);
        assert_eq!(
            LinkProfile::symmetric(1_000_000, Duration::ZERO, 0.0).queue_bytes,
            65_536
        );
    }
}
