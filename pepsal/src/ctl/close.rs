//! `pepsal close`: resets flows.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    ctl::client::Socket,
    observe::protocol::{Answer, Question},
};

/// Which flows.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// The flow's number, its client's address and port, or the address of a client whose flows are all meant
    flow: String,

    #[command(flatten)]
    socket: Socket,
}

/// Resets them, and names each.
///
/// # Errors
/// When there is none, or no daemon.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let flow = arguments.flow.clone();
    let Answer::Closed(closed) = arguments.socket.connect()?.ask(Question::Close { flow })? else {
        bail!("the daemon answers something else");
    };
    for flow in closed {
        println!("closed {}: {} to {}", flow.id, flow.client, flow.server);
    }
    Ok(ExitCode::SUCCESS)
}
