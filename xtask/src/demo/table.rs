//! The results, for people.

use pepsal_tests::LinkProfile;

use super::race::{AF21, Finish, Placement};

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

/// Numbers stand to the right.
const RIGHT_ALIGNED: [bool; 8] = [false, false, true, true, true, true, false, false];

/// A table with a line for each transfer.
pub fn render(finishes: &[Finish], profile: &LinkProfile) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(finishes.iter().map(|finish| row(finish, finishes, profile)));
    let widths: [usize; 8] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut table = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            line += &if RIGHT_ALIGNED[column] {
                format!("{cell:>width$}  ")
            } else {
                format!("{cell:width$}  ")
            };
        }
        table += line.trim_end();
        table += "\n";
    }
    table
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
