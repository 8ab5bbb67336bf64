//! `pepsal status`: attachments, counters, links and problems of the daemon.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::{client::Socket, text},
    observe::protocol::{Answer, Question, Status},
};

/// Options of `pepsal status`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Print the daemon's reply as JSON, see docs/admin-protocol.md
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    socket: Socket,
}

/// Prints the status. The exit code is 1 when there is a problem.
///
/// # Errors
/// When no daemon replies.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Answer::Status(status) = arguments.socket.connect()?.ask(Question::Status)? else {
        bail!("unexpected reply of the daemon");
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string(&status)?),
        false => print!("{}", show(&status)),
    }
    Ok(match status.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn show(status: &Status) -> String {
    let mut lines = vec![
        format!(
            "pepsal {}, process {}, up {}, {}",
            status.version,
            status.pid,
            text::age(status.uptime_seconds),
            if status.problems.is_empty() {
                "ready"
            } else {
                "NOT READY"
            }
        ),
        format!(
            "steering   port {}, mark {}, devices {}",
            status.port,
            status.mark,
            or_none(&status.devices)
        ),
        format!(
            "flows      {} open, {} pending, at most {}{}; {} up, {} down",
            status.flows.open,
            status.flows.pending,
            status.flows.limit,
            match status.flows.limit_per_client {
                0 => String::new(),
                limit => format!(", {limit} of a client"),
            },
            text::bytes(status.bytes.up),
            text::bytes(status.bytes.down)
        ),
    ];
    lines.extend(counts("closed", &status.closed));
    lines.extend(counts("events", &status.events));
    lines.extend(counts("packets", &status.packets));
    lines.push(String::new());
    let rows: Vec<Vec<String>> = status
        .interfaces
        .iter()
        .map(|on| {
            let does = if on.intercepts {
                "intercepts"
            } else {
                "replies only"
            };
            vec![on.name.clone(), does.into(), on.attached_by.clone()]
        })
        .collect();
    let mut shown = lines.join("\n") + "\n";
    shown.push_str(&text::table(&["INTERFACE", "MODE", "ATTACHED BY"], &rows, 3));
    if !status.links.is_empty() {
        shown.push('\n');
        shown.push_str(&links(status));
    }
    for problem in &status.problems {
        shown.push_str(&format!("\nproblem: {problem}"));
    }
    if !status.problems.is_empty() {
        shown.push('\n');
    }
    shown
}

fn links(status: &Status) -> String {
    let rows: Vec<Vec<String>> = status
        .links
        .iter()
        .map(|link| {
            let rate = link.rate_bytes_per_second as f64;
            vec![
                link.interface.clone(),
                link.congestion.clone(),
                text::round_trip(Some(link.rtt_seconds)),
                text::rate(link.ceiling_bytes_per_second as f64),
                text::rate(rate),
                text::rate(link.throughput_bytes_per_second),
                format!(
                    "{:.0} %",
                    100.0 * link.throughput_bytes_per_second / rate.max(1.0)
                ),
                format!("{:.0} ms", 1e3 * link.queueing_delay_seconds),
                link.state.replace('_', " "),
            ]
        })
        .collect();
    text::table(
        &[
            "LINK",
            "CC",
            "RTT",
            "CEILING",
            "RATE",
            "THROUGHPUT",
            "UTILIZATION",
            "QUEUE",
            "STATE",
        ],
        &rows,
        2,
    )
}

fn or_none(names: &[String]) -> String {
    match names {
        [] => "none".into(),
        names => names.join(", "),
    }
}

/// Returns a line with the counters that are not zero.
fn counts(what: &str, counts: &BTreeMap<String, u64>) -> Option<String> {
    let seen = counts.iter().filter(|(_, n)| **n > 0);
    let seen: Vec<String> = seen.map(|(name, n)| format!("{name} {n}")).collect();
    (!seen.is_empty()).then(|| format!("{what:<10} {}", seen.join(", ")))
}
