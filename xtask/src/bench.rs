//! Benchmarks.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

mod canvas;
mod goal;
mod link;
mod machine;
mod relay;
mod statistic;
mod study;

/// What to measure.
#[derive(Subcommand)]
pub enum Bench {
    /// Transfers, requests and flows over emulated links, with pepsal in each place and without it.
    Link(link::Options),
    /// What the proxy costs where there is no link to speak of: rate, processor, memory, beside no proxy and HAProxy.
    Relay(relay::Options),
    /// One end of the connections that `relay` measures, told by its standard input what to do.
    #[command(hide = true, subcommand)]
    RelayEnd(relay::End),
}

/// Measures, and prints and writes the results.
pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Link(options) => link::run(options),
        Bench::Relay(options) => relay::run(options),
        Bench::RelayEnd(end) => end.run(),
    }
}
