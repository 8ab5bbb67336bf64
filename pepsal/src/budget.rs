//! A link's rate, shared among the legs that send on it.
//!
//! The proxy is the only bulk sender on its links, so it does not have to find out what there is by filling queues and
//! losing packets: it divides the rate, max-min fair by weight, and caps each leg's pacing at its share. What an
//! active leg does not need goes to the others; an idle one costs nothing.

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
        assert_eq!(divide(100, &[demand(u64::MAX), demand(10), demand(u64::MAX)]), [45, 10, 45]);
        assert_eq!(divide(100, &[demand(0), demand(u64::MAX)]), [0, 100]);
    }

    #[test]
    fn weights_scale_the_shares() {
        let heavy = Demand { weight: 3, want: u64::MAX };
        assert_eq!(divide(100, &[demand(u64::MAX), heavy]), [25, 75]);
    }

    #[test]
    fn nobody_gets_nothing_of_nothing() {
        assert_eq!(divide(100, &[]), Vec::<u64>::new());
        assert_eq!(divide(0, &[demand(5)]), [0]);
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
