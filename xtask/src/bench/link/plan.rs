//! Which jobs make a run.

use std::time::Duration;

use super::{
    job::{Job, Work},
    observation::Way,
    path::{Loss, Path},
    place::{Congestion, Place, PlaceName, Proxy, Side},
};

const KIB: u64 = 1 << 10;
/// The size that the goals are about.
pub const BULK_BYTES: u64 = 10 << 20;
/// The loss that the goals are about.
pub const ONE_PERCENT: Loss = Loss::hundredths(100);

/// What the goals compare with.
pub const CUBIC: Place = Place::NoProxy(Congestion::Cubic);
/// The same with the better congestion control.
pub const BBR: Place = Place::NoProxy(Congestion::Bbr);

/// Sizes on the clean path, largest first: what the first transfer finds cold is least of a large one.
pub const CLEAN_SIZES: [u64; 4] = [10_240 * KIB, 1024 * KIB, 100 * KIB, 10 * KIB];
const CLEAN_REPETITIONS: u32 = 2;

/// What a run repeats.
pub struct Rounds {
    pub count: u32,
    /// Of the first round; the next has the next.
    pub seed: u64,
}

impl Rounds {
    /// The number of each round and its seed.
    pub fn seeds(&self) -> impl Iterator<Item = (u32, u64)> {
        (1..=self.count).zip(self.seed..)
    }

    fn jobs(&self, cases: &[(Path, Loss, Place, Work)]) -> Vec<Job> {
        let round_jobs = |(round, seed)| {
            cases.iter().map(move |(path, loss, place, work)| Job {
                path: *path,
                loss: *loss,
                place: *place,
                round,
                seed,
                work: work.clone(),
            })
        };
        self.seeds().flat_map(round_jobs).collect()
    }
}

/// What the goals need, and the same for peers.
pub fn quick(rounds: &Rounds, proxies: &[Proxy]) -> Vec<Job> {
    use Path::{Clean, GeoSymmetric};

    let bulk = |way| Work::Transfers(vec![(way, BULK_BYTES)], 1);
    let both = || Work::Transfers(Way::BOTH.map(|way| (way, BULK_BYTES)).to_vec(), 1);
    // Takes by far the longest, and next to nothing of the machine: first, so that all else goes on beside it.
    let mut jobs = rounds.jobs(&[(GeoSymmetric, ONE_PERCENT, CUBIC, bulk(Way::Down))]);

    let seconds = Duration::from_secs;
    let loaded = || Work::Loaded {
        lead: seconds(10),
        window: seconds(6),
    };
    let clean = || {
        let transfers = CLEAN_SIZES
            .iter()
            .flat_map(|bytes| Way::BOTH.map(|way| (way, *bytes)));
        Work::Transfers(transfers.collect(), CLEAN_REPETITIONS)
    };
    let mut cases = vec![
        (Clean, Loss::NONE, CUBIC, clean()),
        (GeoSymmetric, Loss::NONE, BBR, bulk(Way::Down)),
        (GeoSymmetric, Loss::NONE, CUBIC, loaded()),
    ];
    let of_proxies = [
        (Clean, Loss::NONE, Side::Client, clean()),
        (GeoSymmetric, Loss::NONE, Side::Pair, both()),
        (GeoSymmetric, ONE_PERCENT, Side::Pair, both()),
        (Clean, Loss::NONE, Side::Server, clean()),
        (GeoSymmetric, Loss::NONE, Side::Server, bulk(Way::Down)),
        (GeoSymmetric, ONE_PERCENT, Side::Server, bulk(Way::Down)),
        (GeoSymmetric, ONE_PERCENT, Side::Client, bulk(Way::Up)),
        (Clean, Loss::NONE, Side::Pair, clean()),
        (GeoSymmetric, Loss::NONE, Side::Pair, loaded()),
        (
            GeoSymmetric,
            Loss::NONE,
            Side::Pair,
            Work::Flows {
                lead: seconds(5),
                window: seconds(6),
            },
        ),
    ];
    // Proxies take turns, so that they meet the machine in the same state.
    for (path, loss, side, work) in of_proxies {
        let place = |proxy: &Proxy| Place::Proxy(*proxy, side);
        cases.extend(
            proxies
                .iter()
                .map(|proxy| (path, loss, place(proxy), work.clone())),
        );
    }
    jobs.extend(rounds.jobs(&cases));
    jobs
}

/// What of the whole matrix is wanted.
pub struct Matrix {
    pub paths: Vec<Path>,
    pub losses: Vec<Loss>,
    pub sizes: Vec<u64>,
    pub places: Vec<PlaceName>,
}

/// Everything.
pub fn full(rounds: &Rounds, matrix: &Matrix, proxies: &[Proxy]) -> Vec<Job> {
    let mut sizes = matrix.sizes.clone();
    sizes.sort_unstable();
    let mut cases = Vec::new();
    for path in &matrix.paths {
        for loss in &matrix.losses {
            for place in matrix.places.iter().flat_map(|name| name.places(proxies)) {
                cases.extend(works(&sizes).map(|work| (*path, *loss, place, work)));
            }
        }
    }
    rounds.jobs(&cases)
}

fn works(sizes: &[u64]) -> impl Iterator<Item = Work> {
    let transfers = |way| Work::Transfers(sizes.iter().map(|bytes| (way, *bytes)).collect(), 1);
    [
        transfers(Way::Down),
        transfers(Way::Up),
        Work::Requests(5),
        Work::Loaded {
            lead: Duration::from_secs(15),
            window: Duration::from_secs(15),
        },
        Work::Flows {
            lead: Duration::from_secs(10),
            window: Duration::from_secs(20),
        },
    ]
    .into_iter()
}

/// What a job takes of the machine, as the rate that has to be emulated.
pub fn load_bps(job: &Job) -> u64 {
    let rate = job
        .path
        .rate_bps(Way::Down.into())
        .max(job.path.rate_bps(Way::Up.into()));
    if job.path == Path::Clean {
        // Its round trip leaves no time for anything else.
        return rate * 2;
    }
    if job.place == CUBIC && job.loss > Loss::NONE {
        // What Reno is good for (RFC 5348, 3.1, without timeouts), and CUBIC up to four times that.
        const SEGMENT_BITS: f64 = 1448.0 * 8.0;
        let reno = SEGMENT_BITS * 1.22 / (job.path.rtt().as_secs_f64() * job.loss.probability().sqrt());
        return rate.min((reno * 4.0) as u64);
    }
    rate
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUNDS: Rounds = Rounds { count: 3, seed: 7 };

    #[test]
    fn rounds_are_interleaved_and_have_seeds_of_their_own() {
        let jobs = quick(&ROUNDS, &[Proxy::Pepsal]);
        let clean: Vec<_> = jobs
            .iter()
            .filter(|job| job.path == Path::Clean)
            .map(|job| (job.round, job.seed))
            .collect();
        assert_eq!(clean[..5], [(1, 7), (1, 7), (1, 7), (1, 7), (2, 8)]);
        assert_eq!(clean.len(), 12);
    }

    #[test]
    fn the_whole_matrix_has_every_combination_once() {
        let matrix = Matrix {
            paths: vec![Path::Geo, Path::Leo],
            losses: vec![Loss::NONE, ONE_PERCENT],
            sizes: vec![1, 2],
            places: vec![PlaceName::Cubic, PlaceName::Pair],
        };
        assert_eq!(full(&ROUNDS, &matrix, &[Proxy::Pepsal]).len(), 3 * 2 * 2 * 2 * 5);
    }

    #[test]
    fn losses_slow_cubic_down() {
        let [slow, ..] = &quick(&ROUNDS, &[])[..] else {
            panic!("there are jobs")
        };
        assert!(load_bps(slow) < 2_000_000, "{}", load_bps(slow));
    }
}
