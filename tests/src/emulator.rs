//! Emulates a satellite link between two TUN devices.
//!
//! Each direction has a thread, which reads packets from one device, and writes those that are not lost to
//! the other device at their arrival time. A [`Shaper`] decides on virtual time: a late wake-up delays one
//! packet, and does not reduce the rate. A [`Course`] changes the link while it runs.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
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

use crate::course::{Course, RunningCourse};
use crate::delays::{DelayCounters, Delays};
use crate::handover::{Handovers, Schedule};
use crate::netns::Namespace;
use crate::shaper::{Departure, Shaper};
use crate::traffic::Direction;

/// Parameters of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkProfile {
    /// Rate towards the server in bit/s, IP headers included.
    pub up_bps: u64,
    /// Rate towards the client in bit/s, IP headers included.
    pub down_bps: u64,
    /// Round-trip time of an idle link; each direction takes half of it.
    pub rtt: Duration,
    /// Loss probability from 0 to 1, in each direction.
    pub loss: f64,
    /// Mean length of loss bursts in packets (Gilbert's model); none for independent losses.
    pub burst_packets: Option<f64>,
    /// Queue of the transmitter in each direction, in bytes; further packets are dropped.
    pub queue_bytes: u64,
    /// Queue towards the server in bytes, if different from `queue_bytes`.
    pub up_queue_bytes: Option<u64>,
    /// Seed of the losses: packet n of a direction has the same result in every run.
    pub seed: u64,
    /// Handovers, for TUN links only: netem does not support them.
    pub handovers: Option<Handovers>,
}

impl LinkProfile {
    /// A geostationary satellite link: 600 ms, 50 Mbit/s, 1 % loss.
    pub const GEO: Self = Self::symmetric(50_000_000, Duration::from_millis(600), 0.01);

    /// A link without limits: only the TUN devices remain.
    pub const UNIMPAIRED: Self = Self::symmetric(u64::MAX, Duration::ZERO, 0.0);

    /// Returns a link with the same rate in both directions and a queue of one bandwidth-delay product (the
    /// rule for modems that serve single bulk flows; RFC 2488 section 3 recommends windows of that size), but
    /// at least 64 KiB.
    pub const fn symmetric(rate_bps: u64, rtt: Duration, loss: f64) -> Self {
        Self {
            up_bps: rate_bps,
            down_bps: rate_bps,
            rtt,
            loss,
            burst_packets: None,
            queue_bytes: queue_for(rate_bps, rtt),
            up_queue_bytes: None,
            seed: 1,
            handovers: None,
        }
    }

    /// Returns a link with a separate rate and queue for each direction.
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

/// Packet counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Towards the server.
    pub up: DirectionCounters,
    /// Towards the client.
    pub down: DirectionCounters,
}

/// Packet counters of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    /// Packets sent into the link.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
    /// Packets lost at random.
    pub lost: u64,
    /// Packets dropped because the queue was full.
    pub dropped: u64,
    /// Maximum queueing delay of a packet.
    pub max_queue_delay: Duration,
}

/// Additional delays of packets, beyond the link's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkDelays {
    /// Towards the server.
    pub up: DirectionDelays,
    /// Towards the client.
    pub down: DirectionDelays,
}

/// Additional delays of one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectionDelays {
    /// Queueing delay at the transmitter.
    pub queue: Delays,
    /// Lateness of the emulator, on a busy machine.
    pub lateness: Delays,
}

impl LinkCounters {
    /// Returns the counters since `earlier`. The maximum queueing delay stays that of all packets;
    /// [`LinkDelays::since`] has that of an interval.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            up: self.up.since(&earlier.up),
            down: self.down.since(&earlier.down),
        }
    }
}

impl DirectionCounters {
    fn since(&self, earlier: &Self) -> Self {
        Self {
            packets: self.packets - earlier.packets,
            bytes: self.bytes - earlier.bytes,
            lost: self.lost - earlier.lost,
            dropped: self.dropped - earlier.dropped,
            max_queue_delay: self.max_queue_delay,
        }
    }
}

impl LinkDelays {
    /// Returns the delays since `earlier`.
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

/// A running link; dropping it stops its threads and removes its devices.
#[derive(Debug)]
pub struct Emulator {
    up: Arc<Counters>,
    down: Arc<Counters>,
    course: Arc<OnceLock<RunningCourse>>,
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Emulator {
    /// Creates the device `near_device` in `near` and `far_device` in `far`, sets both up, and connects them.
    /// Up is from near to far.
    ///
    /// # Errors
    /// When a device cannot be created, without root, `/dev/net/tun` or a free name.
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
            course: Arc::default(),
            stop: Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?),
            threads: Vec::new(),
        };

        let mut rng = Rng::with_seed(profile.seed);
        let (up_rng, down_rng, schedule_seed) = (rng.fork(), rng.fork(), rng.u64(..));
        let origin = Instant::now();
        let shaper = |direction, rng| {
            let handovers = profile.handovers;
            let schedule = handovers.map(|handovers| Schedule::new(handovers, schedule_seed, origin));
            Shaper::new(direction, &profile, rng, schedule, Arc::clone(&emulator.course))
        };
        let up = shaper(Direction::Upload, up_rng);
        let down = shaper(Direction::Download, down_rng);
        emulator.carry("up", &near_tun, &far_tun, up, Arc::clone(&emulator.up));
        emulator.carry("down", &far_tun, &near_tun, down, Arc::clone(&emulator.down));
        Ok(emulator)
    }

    /// Starts a course and returns its start. It replaces rates and round-trip time of the profile.
    ///
    /// # Panics
    /// When a course is running.
    pub fn begin(&self, course: Course) -> Instant {
        let start = Instant::now();
        let running = RunningCourse { course, start };
        self.course.set(running).expect("a link has one course");
        start
    }

    /// Packet counters.
    pub fn counters(&self) -> LinkCounters {
        LinkCounters {
            up: self.up.read(),
            down: self.down.read(),
        }
    }

    /// Returns the delays so far.
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
        shaper: Shaper<Box<[u8]>>,
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
            // The panic has been printed; a second panic here would abort.
            let _ = thread.join();
        }
    }
}

/// Maximum packets read from the device before due packets are written.
const BATCH: usize = 32;
/// The kernel's queue in packets: large, so that the link's own queue overflows first.
const TX_QUEUE_PACKETS: u32 = 20_000;
const MAX_PACKET_BYTES: usize = 65_536;

/// Runs one direction, until `stop` is written to or the device is removed.
fn carry(mut from: &File, mut to: &File, mut shaper: Shaper<Box<[u8]>>, counters: &Counters, stop: &EventFd) {
    // The default slack of 50 us is the time of four packets at 1 Gbit/s. The call cannot fail for the own
    // thread.
    let _ = prctl::set_timerslack(1);
    come_before_programs();
    let mut in_flight = VecDeque::<(Instant, Box<[u8]>)>::new();
    let send_by = |shaper: &mut Shaper<_>, in_flight: &mut VecDeque<_>, time: Instant| {
        while let Some(departure) = shaper.depart(time) {
            counters.count_departure(&departure);
            let Departure { arrival, packet, .. } = departure;
            in_flight.extend(arrival.map(|arrival| (arrival, packet)));
        }
    };
    let mut buffer = vec![0; MAX_PACKET_BYTES];
    loop {
        let now = Instant::now();
        send_by(&mut shaper, &mut in_flight, now);
        while in_flight.front().is_some_and(|(arrival, _)| *arrival <= now) {
            let (arrival, packet) = in_flight.pop_front().expect("there is a front");
            counters.lateness.count(now - arrival);
            // Fails while the device is down: the packet is lost, as on a real link.
            let _ = to.write(&packet);
        }

        // Queued packets arrive after all packets in flight.
        let first_arrival = in_flight.front().map(|(arrival, _)| *arrival);
        let wait = first_arrival
            .or_else(|| shaper.next_departure())
            .map(|time| TimeSpec::from(time.saturating_duration_since(now)));
        let mut ready = [
            PollFd::new(from.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        // An interruption only shortens the wait.
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
            // No packet, or the device is down.
            let Ok(len) = from.read(&mut buffer) else { break };
            let now = Instant::now();
            send_by(&mut shaper, &mut in_flight, now);
            let is_queued = shaper.enter(now, len, buffer[..len].into());
            counters.count_entry(len, is_queued);
        }
    }
}

/// Sets real-time priority for this thread: the link must not wait for a CPU.
pub(crate) fn come_before_programs() {
    // SAFETY: `sched_param` is plain data, for which all zeroes are a value.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = 1;
    // SAFETY: the call reads `parameters` and changes this thread only. Where it is refused, packets may be late, which the
    // counters of lateness show.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
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
    fn count_entry(&self, len: usize, is_queued: bool) {
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(len as u64, Ordering::Relaxed);
        if !is_queued {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count_departure<P>(&self, departure: &Departure<P>) {
        if departure.arrival.is_none() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.queue.count(departure.waited);
        self.max_queue_delay_ns
            .fetch_max(departure.waited.as_nanos() as u64, Ordering::Relaxed);
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

/// Creates a TUN device in `namespace`, up, with an MTU of 1500. It exists until the file is closed.
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

    #[test]
    fn each_direction_may_have_a_queue_of_its_own() {
        let profile = LinkProfile::asymmetric(5_000_000, 50_000_000, Duration::from_millis(600), 0.0);
        assert_eq!(profile.queue_bytes, 3_750_000);
        assert_eq!(profile.up_queue_bytes, Some(375_000));
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
