//! Benchmarks.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::Subcommand;

mod canvas;
mod goal;
mod link;
mod machine;
mod relay;
mod statistic;

use crate::{
    build,
    setup::{self, Needs},
    shell,
};

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

/// Writes a file of results.
fn save(folder: &Path, name: &str, text: String) -> Result<()> {
    let file = folder.join(name);
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The daemon to measure: the given one, or one that is built, optimised, after installing what a benchmark needs.
///
/// Does not return but for an error unless this process is root and optimised: it becomes the same command that is. Links
/// and hosts are this program's work, and unoptimised it would be measured itself.
fn daemon(given: Option<&Path>, needs: Needs) -> Result<PathBuf> {
    let daemon = match given {
        Some(daemon) => daemon.to_owned(),
        None => build::daemon_with(&build::ebpf(&setup::run(needs)?)?, true)?,
    };
    if !cfg!(debug_assertions) && shell::is_root() {
        return daemon
            .canonicalize()
            .with_context(|| format!("no daemon at {}", daemon.display()));
    }
    let mut command = shell::as_root(&build::optimised_xtask()?)?;
    command.args(env::args_os().skip(1));
    if given.is_none() {
        command.arg("--daemon").arg(daemon);
    }
    Err(command.exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)))
}
