//! The results, for people.

use pepsal_tests::LinkProfile;

use super::{
    contest::{Finish, Placement},
    lane::AF21,
};
use crate::table::{
    self,
    Align::{self, Left, Right},
};

const HEADINGS: [&str; 8] = [
    "transfer",
    "pepsal",
    "seconds",
    "Mbit/s",
    "of link",
    "speed-up",
    "the server saw",
    "DSCP",
];

const ALIGNMENT: [Align; 8] = [Left, Left, Right, Right, Right, Right, Left, Left];

/// A table with a line for each transfer.
pub fn render(finishes: &[Finish], profile: &LinkProfile) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(finishes.iter().map(|finish| row(finish, finishes, profile)));
    table::aligned(&rows, ALIGNMENT)
}

fn row(finish: &Finish, all: &[Finish], profile: &LinkProfile) -> [String; 8] {
    let Finish { contest, outcome } = finish;
    let seconds = outcome.elapsed.as_secs_f64();
    let bps = outcome.bytes as f64 * 8.0 / seconds;
    let without = all.iter().find(|other| {
        other.contest.placement == Placement::Nowhere
            && other.contest.direction == contest.direction
            && other.contest.family == contest.family
    });
    let speed_up = match (contest.placement, without) {
        (Placement::Nowhere, _) | (_, None) => String::new(),
        (_, Some(without)) => format!("{:.1} x", without.outcome.elapsed.as_secs_f64() / seconds),
    };
    [
        contest.transfer(),
        contest.placement.name().to_owned(),
        format!("{seconds:.1}"),
        format!("{:.2}", bps / 1e6),
        format!("{:.1} %", bps / profile.up_bps as f64 * 100.0),
        speed_up,
        format!(
            "{}{}",
            outcome.peer,
            if outcome.peer == outcome.local {
                ""
            } else {
                " (changed)"
            }
        ),
        dscp(outcome.syn.dscp()),
    ]
}

fn dscp(dscp: u8) -> String {
    match dscp {
        0 => "0, lost".to_owned(),
        _ if dscp == AF21 >> 2 => "AF21".to_owned(),
        _ => dscp.to_string(),
    }
}
