//! What was learned of paths whose link nobody described: the rate and the round trip that earlier legs saw, for the next
//! leg to start with, in the spirit of Careful Resume (draft-ietf-tsvwg-careful-resume).
//!
//! A leg remembers for its interface and its peer's network (/24 or /48). The next one there, if its handshake took about
//! the same round trip, starts with half of what the memory says fits the path, paced at that rate. Two round trips later
//! the pacing is lifted; if segments were lost by then, the memory is halved too.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use pepsal_ebpf::map_addr;
use tokio::time::{Instant, sleep};

use crate::{
    tcp::{connection::Connection, options},
    units::Rate,
};

/// Paths that are remembered at most; the oldest are forgotten first.
const MOST: usize = 4096;

/// How long a memory is worth something.
const LIFETIME: Duration = Duration::from_secs(600);

/// Acknowledged bytes from which on a leg has seen enough of its path.
pub const ENOUGH: u64 = 256 << 10;

/// Round trips below which the kernel's own start is fast enough.
const SHORT: Duration = Duration::from_millis(10);

/// The interface and the network that a path leads to.
type Path = (u32, [u8; 16]);

#[derive(Debug, Clone, Copy, PartialEq)]
struct Memory {
    rate: Rate,
    rtt: Duration,
    at: Instant,
}

/// All memories.
#[derive(Debug, Default)]
pub struct Paths(Mutex<HashMap<Path, Memory>>);

impl Paths {
    /// Remembers what a leg saw, if it saw enough: what was acknowledged for each second that it had something to send.
    pub fn learn(&self, ifindex: u32, peer: IpAddr, stream: &Connection) {
        let Ok(info) = options::tcp_info(stream) else {
            return;
        };
        let (rtt, busy) = (
            Duration::from_micros(info.tcpi_min_rtt.into()),
            Duration::from_micros(info.tcpi_busy_time),
        );
        if info.tcpi_bytes_acked < ENOUGH || rtt < SHORT || busy.is_zero() || info.tcpi_min_rtt == u32::MAX {
            return;
        }
        let bps = (info.tcpi_bytes_acked as f64 * 8.0 / busy.as_secs_f64()) as u64;
        self.remember(path(ifindex, peer), Rate::from_bps(bps), rtt, Instant::now());
    }

    /// Starts a fresh leg with what is remembered of its path, if anything is.
    pub fn resume(self: &Arc<Self>, ifindex: u32, peer: IpAddr, stream: &Arc<Connection>) {
        let path = path(ifindex, peer);
        if !self.lock().contains_key(&path) {
            return;
        }
        let Ok(info) = options::tcp_info(&**stream) else {
            return;
        };
        let rtt = Duration::from_micros(info.tcpi_rtt.into());
        let Some(rate) = self.recall(path, rtt, Instant::now()) else {
            return;
        };
        let segments = rate.bytes_in(rtt) / 2 / u64::from(info.tcpi_snd_mss.max(1));
        let Ok(segments @ 11..) = u32::try_from(segments) else {
            return;
        };
        // A window at once and without pacing would be a burst.
        let resumed = options::set_pacing_rate(&**stream, rate.bps() / 8)
            .and_then(|()| options::set_initial_window(&**stream, segments))
            .and_then(|()| options::restart_congestion(&**stream));
        match resumed {
            Ok(()) => drop(tokio::spawn(self.clone().validate(
                path,
                rtt,
                Arc::downgrade(stream),
            ))),
            Err(_) => lift_pacing(stream),
        }
    }

    /// Looks how the start went.
    async fn validate(self: Arc<Self>, path: Path, rtt: Duration, stream: Weak<Connection>) {
        sleep(rtt * 2).await;
        let Some(stream) = stream.upgrade() else { return };
        lift_pacing(&stream);
        if options::tcp_info(&*stream).is_ok_and(|info| info.tcpi_total_retrans > 0)
            && let Some(memory) = self.lock().get_mut(&path)
        {
            memory.rate = Rate::from_bps(memory.rate.bps() / 2);
        }
    }

    /// Grows at once, shrinks by half of the difference: a leg that had little to send saw little.
    fn remember(&self, path: Path, rate: Rate, rtt: Duration, now: Instant) {
        let mut memories = self.lock();
        if memories.len() >= MOST && !memories.contains_key(&path) {
            forget_oldest(&mut memories);
        }
        let memory = memories.entry(path).or_insert(Memory { rate, rtt, at: now });
        let rate = rate.bps().max(memory.rate.bps() / 2 + rate.bps() / 2);
        *memory = Memory {
            rate: Rate::from_bps(rate),
            rtt,
            at: now,
        };
    }

    /// A path whose round trip has changed by half is another path.
    fn recall(&self, path: Path, rtt: Duration, now: Instant) -> Option<Rate> {
        let memory = *self.lock().get(&path)?;
        let fresh = now - memory.at < LIFETIME;
        let same = rtt * 2 > memory.rtt && rtt < memory.rtt * 2;
        (fresh && same).then_some(memory.rate)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Path, Memory>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lift_pacing(stream: &Connection) {
    // All ones stands for no limit; it was accepted a moment ago.
    let _ = options::set_pacing_rate(stream, u64::MAX);
}

fn path(ifindex: u32, peer: IpAddr) -> Path {
    let mut network = map_addr(peer.to_canonical()).octets();
    let kept = if peer.to_canonical().is_ipv4() { 15 } else { 6 };
    network[kept..].fill(0);
    (ifindex, network)
}

/// A quarter at a time, so that it does not have to be looked for with every new path.
fn forget_oldest(memories: &mut HashMap<Path, Memory>) {
    let mut times: Vec<Instant> = memories.values().map(|memory| memory.at).collect();
    times.sort();
    let oldest = times[times.len() / 4];
    memories.retain(|_, memory| memory.at > oldest);
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(600);

    fn mbit(rate: u64) -> Rate {
        Rate::from_bps(rate * 1_000_000)
    }

    #[test]
    fn a_network_is_a_path_for_each_interface() {
        let of = |ifindex, addr: &str| path(ifindex, addr.parse().unwrap());
        assert_eq!(of(1, "192.0.2.1"), of(1, "192.0.2.200"));
        assert_ne!(of(1, "192.0.2.1"), of(1, "192.0.3.1"));
        assert_ne!(of(1, "192.0.2.1"), of(2, "192.0.2.1"));
        assert_eq!(of(1, "2001:db8:1:2::3"), of(1, "2001:db8:1:9::3"));
        assert_ne!(of(1, "2001:db8:1::3"), of(1, "2001:db8:2::3"));
    }

    #[test]
    fn a_memory_holds_for_its_round_trip_and_its_time() {
        let (paths, now) = (Paths::default(), Instant::now());
        let path = path(1, "192.0.2.1".parse().unwrap());
        paths.remember(path, mbit(40), RTT, now);
        assert_eq!(paths.recall(path, RTT, now), Some(mbit(40)));
        assert_eq!(paths.recall(path, RTT / 3, now), None);
        assert_eq!(paths.recall(path, RTT * 3, now), None);
        assert_eq!(paths.recall(path, RTT, now + LIFETIME), None);
    }

    #[test]
    fn memories_grow_at_once_and_shrink_slowly() {
        let (paths, now) = (Paths::default(), Instant::now());
        let path = path(1, "192.0.2.1".parse().unwrap());
        for (seen, remembered) in [(10, 10), (40, 40), (20, 30)] {
            paths.remember(path, mbit(seen), RTT, now);
            assert_eq!(paths.recall(path, RTT, now), Some(mbit(remembered)));
        }
    }

    #[test]
    fn the_oldest_are_forgotten_first() {
        let (paths, now) = (Paths::default(), Instant::now());
        for i in 0..=MOST as u32 {
            let addr = IpAddr::from((i * 256).to_be_bytes());
            paths.remember(
                path(1, addr),
                mbit(10),
                RTT,
                now + Duration::from_millis(i.into()),
            );
        }
        assert!(paths.lock().len() <= MOST);
        let latest = IpAddr::from((MOST as u32 * 256).to_be_bytes());
        assert!(paths.recall(path(1, latest), RTT, now).is_some());
        assert!(
            paths
                .recall(path(1, "0.0.0.0".parse().unwrap()), RTT, now)
                .is_none()
        );
    }
}
