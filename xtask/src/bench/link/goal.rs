//! What pepsal has to show on links, and whether it does.

use super::{
    floor::Connection,
    observation::{Cell, Metric, Observations, Summary, Way},
    path::{Loss, Path},
    place::{Place, Proxy, Side},
    plan::{BBR, BULK_BYTES, CLEAN_SIZES, CUBIC, ONE_PERCENT},
};
use crate::bench::goal::{Goal, Verdict};

/// All goals, judged by medians.
pub fn judge(found: &Observations) -> Vec<Goal> {
    vec![
        Goal::judged(
            "10 MiB, pair, GEO 50/50, no loss",
            "≤ 1.25 × floor",
            near_floor(found, Loss::NONE, 1.25),
        ),
        Goal::judged(
            "10 MiB, pair, GEO 50/50, 1 % loss",
            "≤ 1.6 × floor",
            near_floor(found, ONE_PERCENT, 1.6),
        ),
        Goal::judged(
            "10 MiB down, pepsal on the server's side, no loss",
            "≥ 1.4 × as fast as no proxy with BBR",
            faster(found, Loss::NONE, BBR, 1.4),
        ),
        Goal::judged(
            "10 MiB down, pepsal on the server's side, 1 % loss",
            "≥ 10 × as fast as no proxy with CUBIC",
            faster(found, ONE_PERCENT, CUBIC, 10.0),
        ),
        Goal::judged(
            "10 MiB up, pepsal on the client's side, 1 % loss",
            "< 5 s",
            upload(found),
        ),
        Goal::judged(
            "10 KiB request beside a bulk flow, pair",
            "queueing < 50 ms at p95",
            queueing(found),
        ),
        Goal::judged("eight flows, pair", "Jain's index ≥ 0.95", jain(found)),
        Goal::judged("eight flows, pair", "link use ≥ 90 %", link_use(found)),
        Goal::judged(
            "clean 20 ms path",
            "never slower than no proxy by more than 3 %",
            clean(found),
        ),
    ]
}

fn pepsal(side: Side) -> Place {
    Place::Proxy(Proxy::Pepsal, side)
}

fn geo(found: &Observations, loss: Loss, place: Place, metric: Metric) -> Option<Summary> {
    found.summary(Cell {
        path: Path::GeoSymmetric,
        loss,
        metric,
        place,
    })
}

/// The worse direction of those that were measured.
fn near_floor(found: &Observations, loss: Loss, most: f64) -> Option<Verdict> {
    let ratios = Way::BOTH.map(|way| {
        let summary = geo(found, loss, pepsal(Side::Pair), Metric::Transfer(way, BULK_BYTES))?;
        Some((way, summary.median / summary.floor?, summary))
    });
    let measured = ratios.iter().flatten().map(|(way, ratio, summary)| {
        let way = match way {
            Way::Down => "down",
            Way::Up => "up",
        };
        format!("{ratio:.2} × {way} ({:.2} s)", summary.median)
    });
    let worst = ratios
        .iter()
        .flatten()
        .map(|(_, ratio, _)| *ratio)
        .reduce(f64::max)?;
    Some(Verdict {
        measured: measured.collect::<Vec<_>>().join(", "),
        met: worst <= most,
    })
}

fn faster(found: &Observations, loss: Loss, than: Place, least: f64) -> Option<Verdict> {
    let metric = Metric::Transfer(Way::Down, BULK_BYTES);
    let slow = geo(found, loss, than, metric)?;
    let fast = geo(found, loss, pepsal(Side::Server), metric)?;
    let ratio = slow.median / fast.median;
    // At the time limit the slow one had not ended.
    let at_least = if slow.timed_out > 0 { "more than " } else { "" };
    Some(Verdict {
        measured: format!(
            "{at_least}{ratio:.2} × ({:.2} s / {:.2} s)",
            slow.median, fast.median
        ),
        met: ratio >= least,
    })
}

fn upload(found: &Observations) -> Option<Verdict> {
    let metric = Metric::Transfer(Way::Up, BULK_BYTES);
    let summary = geo(found, ONE_PERCENT, pepsal(Side::Client), metric)?;
    Some(Verdict {
        measured: format!(
            "{:.2} s ({:.2}–{:.2})",
            summary.median, summary.least, summary.most
        ),
        met: summary.median < 5.0,
    })
}

fn queueing(found: &Observations) -> Option<Verdict> {
    let with = geo(found, Loss::NONE, pepsal(Side::Pair), Metric::Queue(95))?;
    let request = Metric::LoadedRequest(Connection::Fresh);
    let fresh = geo(found, Loss::NONE, pepsal(Side::Pair), request)?;
    let mut measured = format!("{:.0} ms (request {:.2} s)", with.median, fresh.median);
    if let Some(without) = geo(found, Loss::NONE, CUBIC, Metric::Queue(95)) {
        measured += &format!("; no proxy, CUBIC: {:.0} ms", without.median);
    }
    Some(Verdict {
        measured,
        met: with.median < 50.0,
    })
}

fn jain(found: &Observations) -> Option<Verdict> {
    let summary = geo(found, Loss::NONE, pepsal(Side::Pair), Metric::Jain)?;
    Some(Verdict {
        measured: format!("{:.3} ({:.3}–{:.3})", summary.median, summary.least, summary.most),
        met: summary.median >= 0.95,
    })
}

fn link_use(found: &Observations) -> Option<Verdict> {
    let summary = geo(found, Loss::NONE, pepsal(Side::Pair), Metric::LinkUse)?;
    Some(Verdict {
        measured: format!(
            "{:.1} % ({:.1}–{:.1})",
            summary.median * 100.0,
            summary.least * 100.0,
            summary.most * 100.0
        ),
        met: summary.median >= 0.90,
    })
}

/// The worst of all sizes, directions and sides.
fn clean(found: &Observations) -> Option<Verdict> {
    let summary = |place, metric| {
        found.summary(Cell {
            path: Path::Clean,
            loss: Loss::NONE,
            metric,
            place,
        })
    };
    let mut worst: Option<(f64, Place, Metric)> = None;
    for (way, bytes) in CLEAN_SIZES
        .iter()
        .flat_map(|bytes| Way::BOTH.map(|way| (way, *bytes)))
    {
        let metric = Metric::Transfer(way, bytes);
        for side in [Side::Client, Side::Server, Side::Pair] {
            let (Some(with), Some(without)) = (summary(pepsal(side), metric), summary(CUBIC, metric)) else {
                continue;
            };
            let ratio = with.median / without.median;
            if worst.is_none_or(|(most, ..)| ratio > most) {
                worst = Some((ratio, pepsal(side), metric));
            }
        }
    }
    let (ratio, place, metric) = worst?;
    Some(Verdict {
        measured: format!("{:+.1} % at worst ({metric}, {place})", (ratio - 1.0) * 100.0),
        met: ratio <= 1.03,
    })
}
