//! `pepsal flows`: the flows, as a table or as JSON.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::{client::Socket, text},
    observe::protocol::{
        Answer, FlowState, FlowStatus, Flows, FlowsQuestion, LegName, LegStatus, Limit, LimitedBy, Question,
        Sort,
    },
};

/// Options of `pepsal flows`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Print the daemon's reply as JSON: {"total":N,"list":[…]}, see docs/admin-protocol.md
    #[arg(long)]
    json: bool,

    /// Only flows whose client is in this prefix
    #[arg(long, value_name = "PREFIX")]
    client: Option<String>,

    /// Only flows whose server is in this prefix
    #[arg(long, value_name = "PREFIX")]
    server: Option<String>,

    /// Only flows to this server port
    #[arg(long)]
    port: Option<u16>,

    /// Only flows with a leg on this interface
    #[arg(long)]
    interface: Option<String>,

    /// Only flows in this state
    #[arg(long)]
    state: Option<FlowState>,

    /// Sort key, in descending order
    #[arg(long, value_name = "BY", default_value = "age")]
    sort: Sort,

    /// Maximum number of flows; 0 is all
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,

    /// Time over which rates are measured; 0 is the lifetime of each flow
    #[arg(long, value_name = "DURATION", default_value = "500ms", value_parser = crate::units::time)]
    interval: Duration,

    #[command(flatten)]
    socket: Socket,
}

/// Prints the flows.
///
/// # Errors
/// When no daemon replies, or it rejects the request.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let question = FlowsQuestion {
        client: arguments.client.clone(),
        server: arguments.server.clone(),
        port: arguments.port,
        interface: arguments.interface.clone(),
        state: arguments.state,
        sort: arguments.sort,
        limit: arguments.limit,
        interval_ms: arguments.interval.as_millis().try_into().unwrap_or(u64::MAX),
    };
    let Answer::Flows(flows) = arguments.socket.connect()?.ask(Question::Flows(question))? else {
        bail!("unexpected reply of the daemon");
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string(&flows)?),
        false => print!("{}", show(&flows)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns two lines for each flow, the client leg above the server leg.
fn show(flows: &Flows) -> String {
    let headings = [
        "ID",
        "STATE",
        "AGE",
        "LEG",
        "INTERFACE",
        "PEER",
        "CC",
        "SENT",
        "RATE",
        "RTT",
        "CWND",
        "RETRANS",
        "DELIVERY",
        "LIMITED BY",
    ];
    let rows: Vec<Vec<String>> = flows.list.iter().flat_map(rows).collect();
    let shown = flows.list.len();
    let mut text = if rows.is_empty() {
        String::new()
    } else {
        text::table(&headings, &rows, 7)
    };
    text.push_str(&match flows.total {
        1 if shown == 1 => "1 flow\n".to_owned(),
        total if total == shown => format!("{total} flows\n"),
        total => format!("{shown} of {total} flows\n"),
    });
    text
}

fn rows(flow: &FlowStatus) -> [Vec<String>; 2] {
    let state = match flow.state {
        FlowState::Pending => "pending",
        FlowState::Open => "open",
    };
    let row = |of_flow: [String; 3], name: &str, peer: String, leg: &Option<LegStatus>, sent, rate, limit| {
        let leg = leg.as_ref();
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        let mut row = of_flow.to_vec();
        row.extend([
            name.to_owned(),
            or_dash(leg.and_then(|leg| leg.interface.clone())),
            peer,
            or_dash(leg.and_then(|leg| leg.congestion.clone())),
            text::bytes(sent),
            text::rate(rate),
            text::round_trip(leg.and_then(|leg| leg.rtt_seconds)),
            or_dash(leg.map(|leg| leg.cwnd_segments.to_string())),
            or_dash(leg.map(|leg| leg.retransmitted_segments.to_string())),
            or_dash(leg.map(|leg| text::rate(leg.delivery_rate_bytes_per_second as f64))),
            limited(limit),
        ]);
        row
    };
    let of_flow = [flow.id.to_string(), state.to_owned(), text::age(flow.age_seconds)];
    let (bytes, rates) = (flow.bytes, flow.bytes_per_second);
    [
        row(
            of_flow,
            "client",
            flow.client.to_string(),
            &flow.legs.client,
            bytes.down,
            rates.down,
            flow.limited.down,
        ),
        row(
            Default::default(),
            "server",
            flow.server.to_string(),
            &flow.legs.server,
            bytes.up,
            rates.up,
            flow.limited.up,
        ),
    ]
}

/// Returns the leg that limits a direction, and the cause.
pub fn limited(limit: Option<Limit>) -> String {
    let Some(Limit { leg, by }) = limit else {
        return "-".into();
    };
    let leg = match leg {
        LegName::Client => "client",
        LegName::Server => "server",
    };
    let by = match by {
        LimitedBy::Sender => "sender",
        LimitedBy::Receiver => "receiver",
        LimitedBy::SendBuffer => "send buffer",
        LimitedBy::Share => "share",
        LimitedBy::Path => "path",
    };
    format!("{leg}: {by}")
}
