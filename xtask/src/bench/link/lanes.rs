//! Links that change while flows fill them, beside a probe: what is left of the link, and what others on it suffer.

use std::{
    collections::BTreeMap,
    fmt, fs,
    net::SocketAddr,
    path::Path as FilePath,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use pepsal_tests::{
    Connector, Course, Datagram, Datagrams, Direction, Family, LinkCounters, LinkProfile, Passage,
};
use serde::Serialize;

use super::{
    bulk::Bulk,
    limits::Limits,
    observation::State,
    peer::LinkSeen,
    place::{Congestion, Place, Proxy, Side},
    schedule::{Findings, Task},
    site::{Equipment, Ground, Site},
};
use crate::{
    bench::{
        goal::{self, Goal, Verdict},
        statistic,
    },
    table::{self, Align},
};

/// A link that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lane {
    /// Nothing changes
    Steady,
    /// The rate falls to a fifth for 30 s and returns
    Fade,
    /// A UDP stream takes 40 % of the rate
    Udp,
    /// The profile says twice the rate
    Twice,
    /// A CUBIC flow that pepsal leaves alone, beside four legs
    Cubic,
    /// 1 % of all packets are lost
    Loss1,
    /// 3 % are lost
    Loss3,
    /// 1 % are lost in bursts of eight on average
    Bursts,
    /// A low orbit: another rate, round trip and silence every 15 s
    Leo,
    /// A subscriber with 50 legs beside one with one
    Subscriber,
    /// Nothing arrives for 15 s
    Outage,
}

const MBIT: u64 = 1_000_000;
const RATE_BPS: u64 = 50 * MBIT;
const RTT: Duration = Duration::from_millis(600);
const FLOWS: usize = 4;
const LOW_ORBIT: Duration = Duration::from_secs(120);
/// The largest UDP packet of the stream, IP header included.
const STREAM_BYTES: usize = 1400;
const PROBE_BYTES: usize = 100;
const PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// How often figures over time are taken.
const TICK: Duration = Duration::from_millis(200);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A span of a lane that is judged.
#[derive(Clone, Copy, PartialEq)]
struct Window {
    name: &'static str,
    from: Duration,
    to: Duration,
}

impl Lane {
    /// All, in the order in which they are shown.
    pub const ALL: &[Self] = &[
        Self::Steady,
        Self::Fade,
        Self::Udp,
        Self::Twice,
        Self::Cubic,
        Self::Loss1,
        Self::Loss3,
        Self::Bursts,
        Self::Leo,
        Self::Subscriber,
        Self::Outage,
    ];

    fn windows(self) -> Vec<Window> {
        let window = |name, from, to| Window {
            name,
            from: seconds(from),
            to: seconds(to),
        };
        match self {
            Self::Fade => vec![
                window("fade, from 8 s on", 28, 50),
                window("return, from 10 s on", 60, 80),
            ],
            Self::Leo => vec![window("leo", 10, LOW_ORBIT.as_secs())],
            Self::Outage => vec![window("after the outage", 37, 60)],
            Self::Steady => vec![window("steady", 10, 40)],
            Self::Udp => vec![window("udp", 10, 60)],
            Self::Twice => vec![window("twice", 10, 60)],
            Self::Cubic => vec![window("cubic", 20, 100)],
            Self::Loss1 => vec![window("1 % loss", 10, 40)],
            Self::Loss3 => vec![window("3 % loss", 10, 40)],
            Self::Bursts => vec![window("bursts", 10, 40)],
            Self::Subscriber => vec![window("subscriber", 15, 45)],
        }
    }

    fn end(self) -> Duration {
        self.windows()
            .iter()
            .map(|window| window.to)
            .max()
            .unwrap_or_default()
    }

    fn profile(self, seed: u64) -> LinkProfile {
        let loss = match self {
            Self::Loss1 | Self::Bursts => 0.01,
            Self::Loss3 => 0.03,
            _ => 0.0,
        };
        let (rate, rtt) = match self {
            Self::Leo => (200 * MBIT, Duration::from_millis(40)),
            _ => (RATE_BPS, RTT),
        };
        LinkProfile {
            seed,
            burst_packets: (self == Self::Bursts).then_some(8.0),
            ..LinkProfile::symmetric(rate, rtt, loss)
        }
    }

    fn course(self, seed: u64) -> Course {
        let steady = Course::steady(&self.profile(seed));
        match self {
            Self::Fade => steady
                .then(seconds(20), |step| step.down_bps = RATE_BPS / 5)
                .then(seconds(50), |step| step.down_bps = RATE_BPS),
            Self::Leo => Course::low_orbit(seed, LOW_ORBIT),
            Self::Outage => steady
                .then(seconds(20), |step| step.passage = Passage::Lost)
                .then(seconds(35), |step| step.passage = Passage::Open),
            _ => steady,
        }
    }

    fn ground(self, seed: u64) -> Ground {
        let told = match self {
            Self::Twice => "100mbit",
            Self::Leo => "200mbit",
            _ => "50mbit",
        };
        let rtt = if self == Self::Leo { "40ms" } else { "600ms" };
        let seen = || LinkSeen {
            rate: told.to_owned(),
            up: told.to_owned(),
            rtt: rtt.to_owned(),
        };
        Ground {
            link: self.profile(seed),
            seen: [seen(), seen()],
            is_told: true,
            extra_clients: u8::from(self == Self::Subscriber),
            has_bypass: self == Self::Cubic,
        }
    }

    /// How each bulk flow connects, and whereto.
    fn ends(self, site: &Site, patience: Duration) -> Vec<(Connector, SocketAddr)> {
        let plain = || (site.connector(patience), site.server());
        match self {
            Self::Subscriber => {
                let alone = Connector {
                    source: Some((Family::V4.extra_client(0), 0).into()),
                    ..site.connector(patience)
                };
                let mut ends: Vec<_> = (0..50).map(|_| plain()).collect();
                ends.push((alone, site.server()));
                ends
            }
            Self::Cubic => {
                let mut ends: Vec<_> = (0..FLOWS).map(|_| plain()).collect();
                ends.extend(site.bypass().map(|server| (site.connector(patience), server)));
                ends
            }
            _ => (0..FLOWS).map(|_| plain()).collect(),
        }
    }
}

/// A lane with one contender.
#[derive(Clone, Debug, PartialEq)]
pub struct LaneJob {
    pub lane: Lane,
    pub place: Place,
    pub round: u32,
    pub seed: u64,
}

impl fmt::Display for LaneJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {}, seed {}", self.lane, self.place, self.seed)
    }
}

/// The jobs of some lanes: no proxy with either congestion control, and each build at the hub.
pub fn jobs(lanes: &[Lane], rounds: u32, seed: u64, proxies: &[Proxy]) -> Vec<LaneJob> {
    let places: Vec<Place> = [Congestion::Cubic, Congestion::Bbr]
        .map(Place::NoProxy)
        .into_iter()
        .chain(proxies.iter().map(|proxy| Place::Proxy(*proxy, Side::Server)))
        .collect();
    let mut jobs = Vec::new();
    for round in 1..=rounds {
        for lane in lanes {
            jobs.extend(places.iter().map(|place| LaneJob {
                lane: *lane,
                place: *place,
                round,
                seed: seed + u64::from(round) - 1,
            }));
        }
    }
    jobs
}

/// What was seen in a window.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    lane: Lane,
    window: &'static str,
    place: Place,
    seed: u64,
    state: State,
    /// Payload of the bulk flows over what the link carries, of which the stream's part is left out.
    used: f64,
    /// Milliseconds beyond the link's own delay.
    probe_p50_ms: Option<f64>,
    probe_p95_ms: Option<f64>,
    /// Parts of what was sent.
    probe_lost: f64,
    stream_lost: Option<f64>,
    /// Part of what came to the link that its queue dropped.
    dropped: f64,
    /// The last flow's rate over the mean of its own and the others' together: of the CUBIC flow that bypasses pepsal, or of the
    /// subscriber with one leg.
    last_flow: Option<f64>,
    emulator_late_ms: f64,
}

/// Figures over time.
#[derive(Clone, Debug, Serialize)]
struct Moment {
    seconds: f64,
    link_mbit: f64,
    goodput_mbit: f64,
    dropped: u64,
}

#[derive(Clone, Debug, Serialize)]
struct Timeline {
    lane: Lane,
    place: Place,
    seed: u64,
    moments: Vec<Moment>,
}

/// Everything that was found.
#[derive(Debug, Default, Serialize)]
pub struct Found {
    rows: Vec<Row>,
    timelines: Vec<Timeline>,
}

impl Findings for Found {
    fn extend(&mut self, more: Self) {
        self.rows.extend(more.rows);
        self.timelines.extend(more.timelines);
    }
}

/// What stands at a time of a run.
struct Mark {
    at: Duration,
    received: Vec<u64>,
    counters: LinkCounters,
}

impl Task for LaneJob {
    type Found = Found;

    fn load_bps(&self) -> u64 {
        match self.lane {
            Lane::Leo => 200 * MBIT,
            _ => RATE_BPS + RATE_BPS / 2,
        }
    }

    fn run(&self, equipment: &Equipment, limits: &Limits<'_>) -> Result<Found> {
        let lane = self.lane;
        let site = Site::new(&lane.ground(self.seed), self.place, equipment)?;
        let delays = site.delays();
        let course = lane.course(self.seed);
        let bulk = Bulk::of(&site, lane.ends(&site, limits.timeout));
        let topology = site.topology();
        let stream = |interval, bytes| {
            let client = Family::V4.client();
            Datagrams::start(&topology.server, &topology.client, client, interval, bytes)
        };
        let start = site.begin(course.clone());
        let probe = stream(PROBE_INTERVAL, PROBE_BYTES)?;
        let load = (lane == Lane::Udp)
            .then(|| {
                let bits = STREAM_BYTES as f64 * 8.0;
                stream(
                    Duration::from_secs_f64(bits / (0.4 * RATE_BPS as f64)),
                    STREAM_BYTES,
                )
            })
            .transpose()?;
        let mut marks = Vec::new();
        let mut at = Duration::ZERO;
        while at < lane.end() {
            at += TICK;
            if !limits.sleep((start + at).saturating_duration_since(Instant::now())) {
                return Ok(Found::default());
            }
            marks.push(Mark {
                at: start.elapsed(),
                received: bulk.received(),
                counters: site.counters(),
            });
        }
        // What was sent last is still to arrive.
        limits.sleep(3 * RTT);
        let rows = lane.windows().into_iter().map(|window| {
            let mark = |time: Duration| {
                marks
                    .iter()
                    .find(|mark| mark.at >= time)
                    .unwrap_or(&marks[marks.len() - 1])
            };
            let (from, to) = (mark(window.from), mark(window.to));
            let sent = |stream: &Datagrams| stream.sent_within(start + from.at, start + to.at);
            let queueing = queueing(&sent(&probe), &course, start);
            let gained: Vec<f64> = from
                .received
                .iter()
                .zip(&to.received)
                .map(|(a, b)| (b - a) as f64)
                .collect();
            let capacity = course.capacity_bytes(Direction::Download, from.at, to.at);
            let rest = if lane == Lane::Udp { 0.6 } else { 1.0 };
            let (last, others) = gained
                .split_last()
                .map_or((0.0, &[][..]), |(last, others)| (*last, others));
            let counted: f64 = if lane == Lane::Cubic {
                others.iter().sum()
            } else {
                gained.iter().sum()
            };
            let link = to.counters.since(&from.counters).down;
            let percent = |share| statistic::quantile(&queueing, share);
            Row {
                lane,
                window: window.name,
                place: self.place,
                seed: self.seed,
                state: bulk.state(),
                used: counted / (capacity * rest),
                probe_p50_ms: percent(0.5),
                probe_p95_ms: percent(0.95),
                probe_lost: lost(&sent(&probe)),
                stream_lost: load.as_ref().map(|stream| lost(&sent(stream))),
                dropped: link.dropped as f64 / (link.packets as f64).max(1.0),
                last_flow: match lane {
                    Lane::Cubic => Some(last / capacity),
                    Lane::Subscriber => Some(last / others.iter().sum::<f64>().max(1.0)),
                    _ => None,
                },
                emulator_late_ms: site.late_ms(&delays),
            }
        });
        let moments = marks.windows(2).filter_map(|pair| {
            let [before, after] = pair else { return None };
            let time = (after.at - before.at).as_secs_f64();
            let sum = |mark: &Mark| mark.received.iter().sum::<u64>();
            Some(Moment {
                seconds: after.at.as_secs_f64(),
                link_mbit: course.at(after.at).down_bps as f64 / 1e6,
                goodput_mbit: (sum(after) - sum(before)) as f64 * 8e-6 / time,
                dropped: after.counters.since(&before.counters).down.dropped,
            })
        });
        Ok(Found {
            rows: rows.collect(),
            timelines: vec![Timeline {
                lane,
                place: self.place,
                seed: self.seed,
                moments: moments.collect(),
            }],
        })
    }
}

/// Milliseconds that packets took beyond what the link takes without a queue.
fn queueing(probe: &[Datagram], course: &Course, start: Instant) -> Vec<f64> {
    let of = |datagram: &Datagram| {
        let sent = datagram.sent.saturating_duration_since(start);
        let own = course.at(sent).rtt / 2;
        Some(statistic::milliseconds(datagram.delay()?.saturating_sub(own)))
    };
    probe.iter().filter_map(of).collect()
}

fn lost(stream: &[Datagram]) -> f64 {
    let lost = stream
        .iter()
        .filter(|datagram| datagram.arrived.is_none())
        .count();
    lost as f64 / (stream.len() as f64).max(1.0)
}

/// Medians over the seeds.
struct Summary {
    window: &'static str,
    place: Place,
    used: f64,
    p50: f64,
    p95: f64,
    dropped: f64,
    stream_lost: Option<f64>,
    last_flow: Option<f64>,
    seeds: usize,
}

impl Found {
    fn summaries(&self) -> Vec<Summary> {
        let mut groups: BTreeMap<(Lane, &str, Place), Vec<&Row>> = BTreeMap::new();
        for row in &self.rows {
            groups
                .entry((row.lane, row.window, row.place))
                .or_default()
                .push(row);
        }
        let summary = |((_, _, place), rows): ((Lane, &str, Place), Vec<&Row>)| {
            let median = |of: &dyn Fn(&Row) -> Option<f64>| {
                let values: Vec<f64> = rows.iter().filter_map(|row| of(row)).collect();
                statistic::median(&values)
            };
            Summary {
                window: rows[0].window,
                place,
                used: median(&|row| Some(row.used)).unwrap_or(0.0),
                p50: median(&|row| row.probe_p50_ms).unwrap_or(f64::NAN),
                p95: median(&|row| row.probe_p95_ms).unwrap_or(f64::NAN),
                dropped: median(&|row| Some(row.dropped)).unwrap_or(0.0),
                stream_lost: median(&|row| row.stream_lost),
                last_flow: median(&|row| row.last_flow),
                seeds: rows.len(),
            }
        };
        groups.into_iter().map(summary).collect()
    }

    fn goals(&self, summaries: &[Summary]) -> Vec<Goal> {
        let pepsal = Place::Proxy(Proxy::Pepsal, Side::Server);
        let of = |window: &str, place: Place| {
            summaries
                .iter()
                .find(|summary| summary.window == window && summary.place == place)
        };
        let judged = |window: &'static str, goal: &'static str, is_met: &dyn Fn(&Summary) -> bool| {
            let verdict = of(window, pepsal).map(|summary| Verdict {
                measured: summary.measured(),
                met: is_met(summary),
            });
            Goal::judged(window, goal, verdict)
        };
        let follows = |used, delay, dropped| {
            move |seen: &Summary| seen.used >= used && seen.p95 <= delay && seen.dropped <= dropped
        };
        let bbr = of("leo", Place::NoProxy(Congestion::Bbr)).map_or((0.0, 0.0), |bbr| (bbr.p50, bbr.p95));
        vec![
            judged(
                "steady",
                "0.92 of the link, probe p95 +30 ms",
                &follows(0.92, 30.0, 0.01),
            ),
            judged(
                "fade, from 8 s on",
                "0.85, p95 +150 ms, 1 % dropped",
                &follows(0.85, 150.0, 0.01),
            ),
            judged(
                "return, from 10 s on",
                "0.85 of the rate",
                &follows(0.85, f64::MAX, 1.0),
            ),
            judged(
                "udp",
                "0.9 of the rest, stream loses 0.2 %, p95 +150 ms",
                &|seen| {
                    seen.used >= 0.9
                        && seen.p95 <= 150.0
                        && seen.stream_lost.is_some_and(|lost| lost <= 0.002)
                },
            ),
            judged(
                "twice",
                "0.9, p95 +150 ms, 1 % dropped",
                &follows(0.9, 150.0, 0.01),
            ),
            judged(
                "cubic",
                "legs 0.4 or more, the flow beside them 0.1 or more",
                &|seen| seen.used >= 0.4 && seen.last_flow.is_some_and(|flow| flow >= 0.1),
            ),
            judged("1 % loss", "0.9", &follows(0.9, f64::MAX, 1.0)),
            judged("3 % loss", "0.88", &follows(0.88, f64::MAX, 1.0)),
            judged("bursts", "0.9", &follows(0.9, f64::MAX, 1.0)),
            judged("leo", "0.9, probe p50 and p95 at most half of BBR's", &|seen| {
                seen.used >= 0.9 && seen.p50 <= bbr.0 / 2.0 && seen.p95 <= bbr.1 / 2.0
            }),
            judged(
                "subscriber",
                "one leg gets what 50 of another get, within 10 %",
                &|seen| seen.last_flow.is_some_and(|ratio| (0.9..=1.1).contains(&ratio)),
            ),
            judged(
                "after the outage",
                "0.85 from two seconds after it",
                &follows(0.85, f64::MAX, 1.0),
            ),
        ]
        .into_iter()
        .filter(|goal| goal.met.is_some())
        .collect()
    }

    /// Prints the results, and writes them into a folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn conclude(&self, folder: &FilePath) -> Result<()> {
        let summaries = self.summaries();
        let goals = self.goals(&summaries);
        let mut rows = vec![
            [
                "link",
                "with",
                "of the link",
                "probe p50",
                "probe p95",
                "dropped",
                "stream lost",
                "other flow",
                "seeds",
            ]
            .map(str::to_owned),
        ];
        rows.extend(summaries.iter().map(Summary::row));
        use Align::{Left, Right};
        let markdown = table::markdown(
            &rows,
            [Left, Left, Right, Right, Right, Right, Right, Right, Right],
        );
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let write = |name: &str, text: String| {
            let file = folder.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
        };
        write("lanes.md", format!("{}\n{markdown}", goal::markdown(&goals)))?;
        write("lanes.json", serde_json::to_string_pretty(self)? + "\n")?;
        println!("\n{markdown}\n{}", goal::aligned(&goals));
        println!("Results are in {}.", folder.display());
        Ok(())
    }
}

impl Summary {
    fn measured(&self) -> String {
        let mut text = format!(
            "{:.2} of the link, +{:.0} ms, {:.1} % dropped",
            self.used,
            self.p95,
            100.0 * self.dropped
        );
        if let Some(lost) = self.stream_lost {
            text += &format!(", stream lost {:.2} %", 100.0 * lost);
        }
        if let Some(flow) = self.last_flow {
            text += &format!(", other flow {flow:.2}");
        }
        text
    }

    fn row(&self) -> [String; 9] {
        let percent = |part: f64| format!("{:.2} %", 100.0 * part);
        let optional = |value: Option<String>| value.unwrap_or_default();
        [
            self.window.to_owned(),
            self.place.to_string(),
            format!("{:.3}", self.used),
            format!("+{:.0} ms", self.p50),
            format!("+{:.0} ms", self.p95),
            percent(self.dropped),
            optional(self.stream_lost.map(percent)),
            optional(self.last_flow.map(|flow| format!("{flow:.3}"))),
            self.seeds.to_string(),
        ]
    }
}
