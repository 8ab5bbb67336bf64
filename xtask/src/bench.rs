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

/// Benchmarks.
#[derive(Subcommand)]
pub enum Bench {
    /// Transfers, requests and flows over emulated links, with pepsal at each position and without it.
    Link(link::Options),
    /// Cost of the proxy without a bottleneck link: rate, CPU time, memory, compared with forwarding and
    /// HAProxy.
    Relay(relay::Options),
    /// One end of the connections that `relay` measures, controlled by its standard input.
    #[command(hide = true, subcommand)]
    RelayEnd(relay::End),
}

/// Runs the benchmark, and prints and writes the results.
pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Link(options) => link::run(options),
        Bench::Relay(options) => relay::run(options),
        Bench::RelayEnd(end) => end.run(),
    }
}
