//! What pepsal has to show on lanes, and whether it does.

use super::finding::{Figures, Found, Summary};
use crate::bench::{
    goal::{Goal, Verdict},
    link::{
        place::{Place, Proxy, Side},
        plan::BBR,
    },
};

const PEPSAL: Place = Place::Proxy(Proxy::Pepsal, Side::Server);

/// Goals of the lanes that were measured, judged by medians.
pub fn judge(found: &Found) -> Vec<Goal> {
    let summaries = found.summaries();
    let seen = Seen(&summaries);
    let goals = [
        as_before(found),
        seen.goal("steady", "0.92 of the link, p95 +30 ms", |found| {
            Some(found.used? >= 0.92 && found.probe_p95_ms? <= 30.0)
        }),
        seen.goal("fade, from 8 s on", "0.85, p95 +150 ms, 1 % dropped", |found| {
            Some(follows(found, 0.85)? && found.dropped? <= 0.01)
        }),
        seen.goal("return, from 10 s on", "0.85", at_least(0.85)),
        seen.goal(
            "udp",
            "0.9 of the rest, stream loses 0.2 %, p95 +150 ms",
            |found| Some(follows(found, 0.9)? && found.stream_lost? <= 0.002),
        ),
        seen.goal("twice", "0.9, p95 +150 ms, 1 % dropped", |found| {
            Some(follows(found, 0.9)? && found.dropped? <= 0.01)
        }),
        seen.goal("auto, from 10 s on", "0.85", at_least(0.85)),
        seen.transfer(
            "10 MiB down, auto",
            "at most 1.3 of what the right profile takes",
            1.3,
        ),
        seen.transfer(
            "10 MiB down, auto, again",
            "at most 1.1 of what the right profile takes",
            1.1,
        ),
        seen.goal("cubic", "legs 0.4, the flow beside them 0.1", |found| {
            Some(found.used? >= 0.4 && found.other? >= 0.1)
        }),
        // 0.95 of what is without a change: 0.95 of the link, less what is lost.
        seen.goal("1 % loss", "0.9", at_least(0.9)),
        seen.goal("2 % loss", "0.89", at_least(0.89)),
        seen.goal("3 % loss", "0.88", at_least(0.88)),
        seen.goal("bursts", "0.9", at_least(0.9)),
        seen.low_orbit(),
        seen.goal(
            "subscriber",
            "one leg gets what 50 of another get, within 10 %",
            |found| Some((0.9..=1.1).contains(&found.other?)),
        ),
        seen.upload(),
        seen.goal(
            "after the outage",
            "resumed within two round trips; 0.85 from 2 s on",
            |found| Some(found.seconds? <= 1.2 && found.used? >= 0.85),
        ),
    ];
    goals.into_iter().filter(|goal| goal.met.is_some()).collect()
}

/// Rows by name and place.
struct Seen<'a>(&'a [Summary]);

impl Seen<'_> {
    fn figures(&self, what: &str, place: Place) -> Option<&Figures> {
        let summary = |summary: &&Summary| summary.what == what && summary.place == place;
        self.0.iter().find(summary).map(|summary| &summary.figures)
    }

    fn goal(
        &self,
        what: &'static str,
        goal: &'static str,
        is_met: impl Fn(&Figures) -> Option<bool>,
    ) -> Goal {
        let verdict = self.figures(what, PEPSAL).map(|figures| Verdict {
            measured: measured(figures),
            // A figure that is missing shows nothing.
            met: is_met(figures).unwrap_or(false),
        });
        Goal::judged(what, goal, verdict)
    }

    fn transfer(&self, what: &'static str, goal: &'static str, most: f64) -> Goal {
        let seconds = |what| self.figures(what, PEPSAL)?.seconds;
        let verdict = seconds(what)
            .zip(seconds("10 MiB down"))
            .map(|(auto, told)| Verdict {
                measured: format!("{:.2} × ({auto:.2} s / {told:.2} s)", auto / told),
                met: auto <= most * told,
            });
        Goal::judged(what, goal, verdict)
    }

    fn low_orbit(&self) -> Goal {
        let bbr = self.figures("leo", BBR);
        let half = |figure: fn(&Figures) -> Option<f64>| Some(figure(bbr?)? / 2.0);
        let mut goal = self.goal("leo", "0.9; probe p50 and p95 at most half of BBR's", |found| {
            let is_fast = found.probe_p50_ms? <= half(|bbr| bbr.probe_p50_ms)?
                && found.probe_p95_ms? <= half(|bbr| bbr.probe_p95_ms)?;
            Some(found.used? >= 0.9 && is_fast)
        });
        if goal.met.is_some()
            && let Some(bbr) = bbr
        {
            goal.measured += &format!("; BBR {}", delays(bbr));
        }
        goal
    }

    fn upload(&self) -> Goal {
        let what = "10 MiB up";
        let pepsal = Place::Proxy(Proxy::Pepsal, Side::Client);
        let seconds = self.figures(what, pepsal).and_then(|figures| figures.seconds);
        let verdict = seconds.map(|seconds| Verdict {
            measured: format!("{seconds:.2} s"),
            met: seconds <= 6.0,
        });
        Goal::judged(what, "6 s", verdict)
    }
}

/// The steady lane beside the old build, the worst of its figures.
fn as_before(found: &Found) -> Goal {
    let comparisons = found.comparisons();
    let steady = comparisons.iter().filter_map(|comparison| match comparison.what {
        "steady" => Some((comparison.ratios.median, comparison)),
        // Of a time less is better.
        "10 MiB down" | "10 MiB down, again" => Some((1.0 / comparison.ratios.median, comparison)),
        _ => None,
    });
    let worst = steady.min_by(|(one, _), (other, _)| one.total_cmp(other));
    let verdict = worst.map(|(ratio, comparison)| Verdict {
        measured: format!("{ratio:.2} at worst ({})", comparison.what),
        met: ratio >= 0.97,
    });
    Goal::judged("steady, beside the old build", "0.97 as good", verdict)
}

fn measured(figures: &Figures) -> String {
    let mut parts = Vec::new();
    parts.extend(figures.used.map(|used| format!("{used:.2}")));
    parts.push(delays(figures));
    let percent = |part: Option<f64>, what: &str| part.map(|part| format!("{:.2} % {what}", part * 100.0));
    parts.extend(percent(figures.dropped, "dropped"));
    parts.extend(percent(figures.stream_lost, "of the stream lost"));
    parts.extend(figures.other.map(|other| format!("the other {other:.2}")));
    parts.extend(
        figures
            .seconds
            .map(|seconds| format!("resumed after {seconds:.1} s")),
    );
    parts.join(", ")
}

fn delays(figures: &Figures) -> String {
    let ms = |delay: Option<f64>| delay.map_or_else(|| "none".to_owned(), |delay| format!("+{delay:.0} ms"));
    format!(
        "p50 {}, p95 {}",
        ms(figures.probe_p50_ms),
        ms(figures.probe_p95_ms)
    )
}

fn at_least(used: f64) -> impl Fn(&Figures) -> Option<bool> {
    move |found| Some(found.used? >= used)
}

/// Uses the link without a queue that others would notice.
fn follows(found: &Figures, used: f64) -> Option<bool> {
    Some(found.used? >= used && found.probe_p95_ms? <= 150.0)
}
