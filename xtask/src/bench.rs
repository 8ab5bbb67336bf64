//! Benchmarks.

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

mod link;

/// What to measure.
#[derive(Subcommand)]
pub enum Bench {
    /// Transfers, requests and flows over emulated links, with pepsal in each place and without it.
    Link(link::Options),
}

/// Measures, and prints and writes the results.
pub fn run(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Link(options) => link::run(options),
    }
}
