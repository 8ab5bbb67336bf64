//! Benchmarks.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::Subcommand;
use serde::Serialize;

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

/// Returns the daemon to measure: the given one, or one that is built, optimised, after installing what a benchmark needs.
///
/// Does not return but for an error unless this process is root and optimised: it becomes the same command that is. Links
/// and hosts are this program's work, and unoptimised it would be measured itself.
fn daemon(built: Option<&Path>, needs: Needs) -> Result<PathBuf> {
    let daemon = match built {
        Some(daemon) => daemon.to_owned(),
        None => build::daemon_with(&build::ebpf(&setup::run(needs)?)?, true)?,
    };
    if !cfg!(debug_assertions) && shell::is_root() {
        return existing(&daemon);
    }
    let mut command = shell::as_root(&build::optimised_xtask()?)?;
    command.args(env::args_os().skip(1));
    if built.is_none() {
        command.arg("--built").arg(daemon);
    }
    Err(command.exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)))
}

/// Returns the absolute path of a build.
fn existing(daemon: &Path) -> Result<PathBuf> {
    daemon
        .canonicalize()
        .with_context(|| format!("no daemon at {}", daemon.display()))
}

/// The new build's figures over the old build's, round by round.
#[derive(Clone, Debug, Serialize)]
struct RoundRatios {
    /// In the order of rounds.
    rounds: Vec<f64>,
    median: f64,
    least: f64,
    most: f64,
}

impl RoundRatios {
    /// Of pairs of the old build's figure and the new build's. `None` where there is no pair with an old figure above zero.
    fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let pairs = pairs.into_iter().filter(|(old, _)| *old > 0.0);
        let rounds: Vec<_> = pairs.map(|(old, new)| new / old).collect();
        Some(Self {
            median: statistic::median(&rounds)?,
            least: statistic::quantile(&rounds, 0.0)?,
            most: statistic::quantile(&rounds, 1.0)?,
            rounds,
        })
    }

    /// The median, and the least and the most in parentheses.
    fn spread(&self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }

    /// Each round's ratio.
    fn listed(&self) -> String {
        let rounds: Vec<_> = self.rounds.iter().map(|ratio| format!("{ratio:.2}")).collect();
        rounds.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_are_compared_round_by_round() {
        let ratios = RoundRatios::of([(10.0, 9.0), (5.0, 6.0), (0.0, 1.0), (20.0, 22.0)]).unwrap();
        assert_eq!(ratios.spread(), "1.10 (0.90–1.20)");
        assert_eq!(ratios.listed(), "0.90, 1.20, 1.10");
        assert!(RoundRatios::of([]).is_none());
    }
}
