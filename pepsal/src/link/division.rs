//! How a link's rate is divided among those who want to send: max-min fair by weight, first among subscribers.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv6Addr},
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

/// Who a leg sends for, as the rate is divided: a client's address, or the /64 of an IPv6 one, since each host of a subnet has
/// many there (RFC 8504, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subscriber(IpAddr);

impl Subscriber {
    /// Returns the subscriber that a client's address is of.
    pub fn of(client: IpAddr) -> Self {
        Self(match client.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
            address => address,
        })
    }
}

impl fmt::Display for Subscriber {
    /// Writes the address, or the prefix of an IPv6 one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => address.fmt(f),
            IpAddr::V6(prefix) => write!(f, "{prefix}/64"),
        }
    }
}

/// What a leg asks of a division.
#[derive(Debug, Clone, Copy)]
pub struct Appetite {
    /// Whose legs it shares with before the others; none where all legs are alike.
    pub subscriber: Option<Subscriber>,
    /// Its weight among these.
    pub weight: u64,
    /// Bytes per second that it can use.
    pub need: u64,
    /// Whether it has more to send than was let out.
    pub is_backlogged: bool,
    /// Whether it sends about as fast as its share allows, or has only begun.
    pub keeps_up: bool,
    /// Bytes per second that it is not to exceed, whatever there is.
    pub ceiling: u64,
}

impl Appetite {
    /// Whether it has more to send than its share lets out, and nothing else holds it back.
    pub fn is_eager(&self) -> bool {
        self.is_backlogged && self.keeps_up
    }

    /// What the legs of one subscriber ask for together, among the other subscribers.
    fn of_all(legs: &[Self]) -> Self {
        let has = |what: fn(&Self) -> bool| legs.iter().any(what);
        Self {
            subscriber: None,
            weight: 1,
            need: legs.iter().fold(0, |need, leg| need.saturating_add(leg.need)),
            is_backlogged: has(|leg| leg.is_backlogged),
            keeps_up: has(Self::is_eager),
            ceiling: u64::MAX,
        }
    }
}

/// The bytes per second that each leg may send of a link's `rate`: first each subscriber has a share, then each of its legs.
pub fn shares(rate: u64, appetites: &[Appetite]) -> Vec<u64> {
    let mut of_subscriber: HashMap<Subscriber, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (leg, appetite) in appetites.iter().enumerate() {
        let new = groups.len();
        let group = match appetite.subscriber {
            Some(subscriber) => *of_subscriber.entry(subscriber).or_insert(new),
            None => new,
        };
        match groups.get_mut(group) {
            Some(legs) => legs.push(leg),
            None => groups.push(vec![leg]),
        }
    }
    let legs_of = |group: &Vec<usize>| -> Vec<Appetite> { group.iter().map(|leg| appetites[*leg]).collect() };
    let together: Vec<Appetite> = groups
        .iter()
        .map(|group| match group[..] {
            [leg] if appetites[leg].subscriber.is_none() => appetites[leg],
            _ => Appetite::of_all(&legs_of(group)),
        })
        .collect();
    let mut shares = vec![0; appetites.len()];
    for (group, share) in groups.iter().zip(among_equals(rate, &together)) {
        for (leg, share) in group.iter().zip(among_equals(share, &legs_of(group))) {
            shares[*leg] = share.min(appetites[*leg].ceiling);
        }
    }
    shares
}

/// Divides `rate` on one level.
///
/// It is reserved for those who use it. One that sends less, because its peer or its source is slow or because its segments
/// were lost, has only the double of that reserved, but may send at what it would get if it used it: the kernel spaces two
/// segments out by the rate of the moment, and at a few kB/s that is seconds in which no division helps.
fn among_equals(rate: u64, appetites: &[Appetite]) -> Vec<u64> {
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
    let backlogged = appetites.iter().filter(|appetite| appetite.is_backlogged);
    let backlogged: u64 = backlogged.map(|appetite| appetite.weight).sum();
    let share = |((appetite, reserved), extra): ((&Appetite, u64), u64)| {
        let others = backlogged - u64::from(appetite.is_backlogged) * appetite.weight;
        match appetite.is_eager() {
            true => reserved + extra,
            false => (reserved + extra).max(rate * appetite.weight / (others + appetite.weight)),
        }
    };
    appetites.iter().zip(reserved).zip(extra).map(share).collect()
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
            subscriber: None,
            weight: 1,
            need,
            is_backlogged: true,
            keeps_up,
            ceiling: u64::MAX,
        }
    }

    #[test]
    fn a_leg_that_lost_its_segments_is_not_held_at_what_it_sends() {
        let (eager, stalled) = (appetite(u64::MAX, true), appetite(1448, false));
        assert_eq!(shares(1_000_000, &[eager, stalled]), [1_000_000 - 1448, 500_000]);
        assert_eq!(shares(1_000_000, &[stalled]), [1_000_000]);
        // After an outage all are.
        assert_eq!(shares(1_000_000, &[stalled; 4]), [250_000; 4]);
        let faded = Appetite {
            ceiling: 30_000,
            ..stalled
        };
        assert_eq!(shares(1_000_000, &[eager, faded])[1], 30_000);
    }

    #[test]
    fn a_subscriber_gets_no_more_for_many_legs() {
        let of = |client: &str, leg: Appetite| Appetite {
            subscriber: Some(Subscriber::of(client.parse().unwrap())),
            ..leg
        };
        let eager = appetite(u64::MAX, true);
        let mut legs = vec![of("2001:db8::1", eager); 49];
        legs.push(of("2001:db8::2", eager));
        legs.push(of("192.0.2.1", eager));
        let given = shares(1_000_000, &legs);
        assert_eq!(given[..50], [10_000; 50]);
        assert_eq!(given[50], 500_000);
        // What one cannot use is the other's.
        *legs.last_mut().unwrap() = of("192.0.2.1", appetite(100_000, false));
        let given = shares(1_000_000, &legs);
        assert_eq!(given[..50], [18_000; 50]);
        // Within, the weight counts.
        let heavy = Appetite { weight: 3, ..eager };
        let legs = [
            of("192.0.2.1", eager),
            of("192.0.2.1", heavy),
            of("192.0.2.2", heavy),
        ];
        assert_eq!(shares(800, &legs), [100, 300, 400]);
        assert_eq!(shares(800, &[eager, heavy]), [200, 600]);
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
