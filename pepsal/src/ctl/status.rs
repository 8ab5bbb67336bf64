//! `pepsal status`: what the daemon is attached to, how it is used, and what is missing.

use std::{collections::BTreeMap, process::ExitCode};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::{client::Socket, text},
    observe::protocol::{Answer, Question, Status},
};

/// How it is shown.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Print what the daemon answers, see docs/admin-protocol.md
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    socket: Socket,
}

/// Shows it. The exit code is 1 when something is missing.
///
/// # Errors
/// When there is no daemon.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let Answer::Status(status) = arguments.socket.connect()?.ask(Question::Status)? else {
        bail!("the daemon answers something else");
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
            "flows      {} open, {} pending, at most {}; {} up, {} down",
            status.flows.open,
            status.flows.pending,
            status.flows.limit,
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
                "recognises legs"
            };
            vec![on.name.clone(), does.into(), on.attached_by.clone()]
        })
        .collect();
    let mut shown = lines.join("\n") + "\n";
    shown.push_str(&text::table(&["INTERFACE", "DOES", "BY"], &rows, 3));
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
            "LINK", "CC", "RTT", "CEILING", "RATE", "USED", "SHARE", "QUEUE", "STATE",
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

/// A line with those that are not zero.
fn counts(what: &str, counts: &BTreeMap<String, u64>) -> Option<String> {
    let seen = counts.iter().filter(|(_, n)| **n > 0);
    let seen: Vec<String> = seen.map(|(name, n)| format!("{name} {n}")).collect();
    (!seen.is_empty()).then(|| format!("{what:<10} {}", seen.join(", ")))
}
