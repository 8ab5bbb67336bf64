//! `pepsal close`: resets flows.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::client::Socket,
    observe::protocol::{Answer, Question},
};

/// Options of `pepsal close`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Flow number, client address and port, or client address for all flows of the client
    flow: String,

    #[command(flatten)]
    socket: Socket,
}

/// Resets the flows, and prints each.
///
/// # Errors
/// When no flow matches, or no daemon replies.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let flow = arguments.flow.clone();
    let Answer::Closed(closed) = arguments.socket.connect()?.ask(Question::Close { flow })? else {
        bail!("unexpected reply of the daemon");
    };
    for flow in closed {
        println!("closed {}: {} to {}", flow.id, flow.client, flow.server);
    }
    Ok(ExitCode::SUCCESS)
}
