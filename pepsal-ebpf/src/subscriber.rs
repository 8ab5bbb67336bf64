//! Where the connections of a subscriber are counted: an IPv4 address, or the /64 of an IPv6 one.
//!
//! A connection is added to [`SLOTS`] slots, which hashes of its subscriber choose and which subscribers share by chance: a
//! count-min sketch (Cormode and Muthukrishnan, 2005). So the least of a subscriber's slots is never below the number of its
//! connections, and above only when each is shared. Adding and subtracting are single atomic instructions on both sides of the
//! map, nothing is allocated for a subscriber, and nothing has to be removed: what was added is subtracted exactly once.

use crate::FlowKey;

/// Slots of a subscriber, which are different ones.
pub const SLOTS: u32 = 4;

/// Slots of the map for each connection that the daemon takes at most. With as many subscribers, each with one connection, one in
/// forty finds one too many in all of its slots; with a quarter as many, one in four thousand.
const SLOTS_FOR_A_CONNECTION: u32 = 8;

/// Fewest slots of the map.
const SLOTS_MIN: u32 = 1 << 16;

/// A slot: the connections of all subscribers that have it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot(u64);

const _: () = assert!(size_of::<Slot>() == 8 && align_of::<Slot>() == 8);

impl Slot {
    /// Returns the number of connections.
    #[inline(always)]
    pub const fn connections(self) -> u64 {
        self.0
    }
}

/// Returns how many slots the map has where the daemon takes `limit` connections: a power of two.
pub const fn slots(limit: u32) -> u32 {
    let slots = limit.saturating_mul(SLOTS_FOR_A_CONNECTION).next_power_of_two();
    if slots < SLOTS_MIN { SLOTS_MIN } else { slots }
}

/// The slots of one subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    first: u32,
    /// Distance from one to the next: odd, so that few steps do not come back to where they began.
    step: u32,
    mask: u32,
}

impl Slots {
    /// Returns the slots of the subscriber that a flow's client is, in a map that has one more than `mask`. Nobody who does not
    /// know the seed can choose addresses that share slots.
    #[inline(always)]
    pub const fn of(flow: &FlowKey, seed: u64, mask: u32) -> Self {
        let [a, b, c, d] = flow.client.words();
        let upper = a as u64 | (b as u64) << 32;
        let lower = if flow.client.is_v4() {
            c as u64 | (d as u64) << 32
        } else {
            0
        };
        let hash = mix(mix(upper ^ seed) ^ lower);
        Self {
            first: hash as u32,
            step: (hash >> 32) as u32 | 1,
            mask,
        }
    }

    /// Returns the index of a slot, of which there are [`SLOTS`].
    #[inline(always)]
    pub const fn index(self, slot: u32) -> u32 {
        self.first.wrapping_add(slot.wrapping_mul(self.step)) & self.mask
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit of the input changes half of those of the output.
#[inline(always)]
const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const SEED: u64 = 0x0123_4567_89ab_cdef;

    fn slots_of(client: &str) -> Vec<u32> {
        let server = "192.0.2.1:80".parse().unwrap();
        let flow = FlowKey::between(client.parse().unwrap(), server);
        let slots = Slots::of(&flow, SEED, slots(1) - 1);
        (0..SLOTS).map(|slot| slots.index(slot)).collect()
    }

    #[test]
    fn addresses_of_a_prefix_share_all_slots_and_others_none_in_practice() {
        assert_eq!(slots_of("10.1.0.2:1"), slots_of("10.1.0.2:2"));
        assert_eq!(slots_of("[fd01::2]:1"), slots_of("[fd01::ffff:1:2:3]:2"));
        let others = [
            "10.1.0.2:1",
            "10.1.0.3:1",
            "[fd01::2]:1",
            "[fd01:0:0:1::2]:1",
            "[::1]:1",
        ];
        let all: HashSet<u32> = others.iter().flat_map(|client| slots_of(client)).collect();
        assert_eq!(all.len(), others.len() * SLOTS as usize);
    }

    #[test]
    fn slots_are_of_the_map_and_different() {
        assert_eq!(
            (slots(1), slots(2112), slots(10_000)),
            (1 << 16, 1 << 16, 1 << 17)
        );
        assert_eq!(slots(1_000_000), 1 << 23);
        for host in 0..1000_u32 {
            let client = format!("10.1.{}.{}:1", host >> 8, host & 0xff);
            let slots: HashSet<u32> = slots_of(&client).into_iter().collect();
            assert_eq!(slots.len(), SLOTS as usize);
            assert!(slots.iter().all(|slot| *slot < 1 << 16));
        }
    }

    /// What the documentation of the map says of subscribers that share slots.
    #[test]
    fn few_subscribers_share_all_of_their_slots() {
        let limit = 8192;
        let mut map = vec![0; slots(limit) as usize];
        let slots = |host: u32| {
            let client = std::net::Ipv4Addr::from_bits(0x0a00_0000 + host);
            let flow = FlowKey::between((client, 1).into(), "192.0.2.1:80".parse().unwrap());
            Slots::of(&flow, SEED, slots(limit) - 1)
        };
        let too_many = |map: &[u32], hosts: u32| {
            let shares = |host: &u32| (0..SLOTS).all(|slot| map[slots(*host).index(slot) as usize] > 1);
            (0..hosts).filter(shares).count() as f64 / f64::from(hosts)
        };
        for host in 0..limit {
            (0..SLOTS).for_each(|slot| map[slots(host).index(slot) as usize] += 1);
            if host + 1 == limit / 4 {
                assert!(too_many(&map, host + 1) < 1.0 / 1000.0);
            }
        }
        assert!(too_many(&map, limit) < 1.0 / 30.0);
    }
}
