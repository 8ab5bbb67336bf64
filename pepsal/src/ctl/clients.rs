//! `pepsal clients`: the subscribers that have flows, as a table or as JSON.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::{client::Socket, text},
    observe::protocol::{
        Answer, ClientSort, ClientStatus, Clients, ClientsQuestion, FlowState, Question, SideStatus,
    },
};

/// Which flows are summed up, and how the sums are shown.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Print what the daemon answers: {"total":N,"list":[…]}, see docs/admin-protocol.md
    #[arg(long)]
    json: bool,

    /// Only flows whose client is in this prefix
    #[arg(long, value_name = "PREFIX")]
    client: Option<String>,

    /// Only flows whose server is in this prefix
    #[arg(long, value_name = "PREFIX")]
    server: Option<String>,

    /// Only flows to this port of the server
    #[arg(long)]
    port: Option<u16>,

    /// Only flows with a leg behind this interface
    #[arg(long)]
    interface: Option<String>,

    /// Only flows in this state
    #[arg(long)]
    state: Option<FlowState>,

    /// What comes first: the client that has most of this
    #[arg(long, value_name = "BY", default_value = "rate")]
    sort: ClientSort,

    /// At most so many clients; 0 is all
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,

    /// Time over which rates are measured; 0 for the whole life of each flow
    #[arg(long, value_name = "DURATION", default_value = "500ms", value_parser = crate::units::time)]
    interval: Duration,

    #[command(flatten)]
    socket: Socket,
}

/// Shows them.
///
/// # Errors
/// When there is no daemon, or it does not take the question.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let question = ClientsQuestion {
        client: arguments.client.clone(),
        server: arguments.server.clone(),
        port: arguments.port,
        interface: arguments.interface.clone(),
        state: arguments.state,
        sort: arguments.sort,
        limit: arguments.limit,
        interval_ms: arguments.interval.as_millis().try_into().unwrap_or(u64::MAX),
    };
    let Answer::Clients(clients) = arguments.socket.connect()?.ask(Question::Clients(question))? else {
        bail!("the daemon answers something else");
    };
    match arguments.json {
        true => println!("{}", serde_json::to_string(&clients)?),
        false => print!("{}", show(&clients)),
    }
    Ok(ExitCode::SUCCESS)
}

/// Returns two lines for each client: its flows and client legs above its server legs.
fn show(clients: &Clients) -> String {
    let headings = [
        "CLIENT",
        "OPEN",
        "PENDING",
        "LEG",
        "SENT",
        "RATE",
        "RTT",
        "LEAST RTT",
        "RETRANS",
    ];
    let rows: Vec<Vec<String>> = clients.list.iter().flat_map(rows).collect();
    let shown = clients.list.len();
    let mut text = match rows.is_empty() {
        true => String::new(),
        false => text::table(&headings, &rows, 4),
    };
    text.push_str(&match clients.total {
        1 if shown == 1 => "1 client\n".to_owned(),
        total if total == shown => format!("{total} clients\n"),
        total => format!("{shown} of {total} clients\n"),
    });
    text
}

fn rows(client: &ClientStatus) -> [Vec<String>; 2] {
    let row = |of_client: [String; 3], leg: &str, side: &SideStatus, sent, rate| {
        let mut row = of_client.to_vec();
        row.extend([
            leg.to_owned(),
            text::bytes(sent),
            text::rate(rate),
            text::round_trip(side.rtt_seconds),
            text::round_trip(side.rtt_min_seconds),
            side.retransmitted_segments.to_string(),
        ]);
        row
    };
    let (bytes, rates, legs) = (client.bytes, client.bytes_per_second, &client.legs);
    let of_client = [
        client.client.clone(),
        client.flows.open.to_string(),
        client.flows.pending.to_string(),
    ];
    [
        row(of_client, "client", &legs.client, bytes.down, rates.down),
        row(Default::default(), "server", &legs.server, bytes.up, rates.up),
    ]
}

#[cfg(test)]
mod tests {
    use crate::observe::protocol::{ClientFlows, ClientLegs, Ways};

    use super::*;

    #[test]
    fn client_has_a_line_for_either_side() {
        let client = ClientStatus {
            client: "10.1.0.2".into(),
            flows: ClientFlows { open: 2, pending: 1 },
            bytes: Ways { up: 1024, down: 2048 },
            bytes_per_second: Ways {
                up: 0.0,
                down: 125_000.0,
            },
            legs: ClientLegs {
                client: SideStatus {
                    open: 3,
                    rtt_seconds: Some(0.002),
                    rtt_min_seconds: Some(0.001),
                    ..Default::default()
                },
                server: SideStatus {
                    open: 2,
                    retransmitted_segments: 7,
                    ..Default::default()
                },
            },
        };
        let shown = show(&Clients {
            total: 2,
            list: vec![client],
        });
        assert_eq!(
            shown,
            "CLIENT    OPEN  PENDING  LEG        SENT        RATE      RTT  LEAST RTT  RETRANS\n\
             10.1.0.2  2     1        client  2.0 KiB  1.0 Mbit/s  2.00 ms    1.00 ms        0\n                         \
             server  1.0 KiB     0 bit/s        -          -        7\n\
             1 of 2 clients\n"
        );
        assert_eq!(show(&Clients::default()), "0 clients\n");
    }
}
