//! The common part of the benchmarks: the measured builds, and the output of results.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{
    goal::{self, Goal},
    statistic,
};
use crate::{
    build,
    setup::{self, Needs},
    shell,
};

/// Returns the daemon to measure: the given one, or an optimised build, after installing the benchmark's
/// requirements.
///
/// Unless this process is root and optimised, executes the same command so, and returns only errors. This
/// program runs links and hosts, and without optimisation it would limit the results.
pub fn daemon(built: Option<&Path>, needs: Needs) -> Result<PathBuf> {
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
pub fn existing(daemon: &Path) -> Result<PathBuf> {
    daemon
        .canonicalize()
        .with_context(|| format!("no daemon at {}", daemon.display()))
}

/// Returns the version of a build.
pub fn version(daemon: &Path) -> Result<String> {
    let version = shell::output(Command::new(daemon).arg("--version"))?;
    Ok(version.trim().to_owned())
}

/// Results of a benchmark: its samples, and derived figures.
pub trait Study: Serialize {
    type Run: Serialize;
    /// Samples of one quantity.
    type Summary: Serialize;
    /// Comparison of two builds in one quantity.
    type Comparison: Serialize;

    /// Text below the table of samples.
    const NOTES: &str;

    fn summaries(&self) -> Vec<Self::Summary>;
    fn comparisons(&self) -> Vec<Self::Comparison>;
    fn goals(&self) -> Vec<Goal>;
    /// Draws charts, and returns their number.
    fn draw(&self, folder: &Path) -> Result<usize>;

    fn heading(run: &Self::Run) -> String;
    fn cells(report: &Report<'_, Self>) -> String;
    fn round_by_round(report: &Report<'_, Self>) -> String;
    fn remarks(report: &Report<'_, Self>) -> String;
    /// Further files besides `results.json` and `results.md`, with their names.
    fn files(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// The results that are written; as JSON, `results.json`.
#[derive(Serialize)]
pub struct Report<'a, S: Study + ?Sized> {
    pub run: S::Run,
    pub goals: Vec<Goal>,
    #[serde(rename = "cells")]
    pub summaries: Vec<S::Summary>,
    pub comparisons: Vec<S::Comparison>,
    #[serde(flatten)]
    pub found: &'a S,
}

impl<'a, S: Study> Report<'a, S> {
    pub fn new(run: S::Run, found: &'a S) -> Self {
        Self {
            run,
            goals: found.goals(),
            summaries: found.summaries(),
            comparisons: found.comparisons(),
            found,
        }
    }

    pub fn markdown(&self) -> String {
        let mut text = format!("{}\n\n", S::heading(&self.run));
        if self.goals.iter().any(|goal| goal.met.is_some()) {
            text += &goal::markdown(&self.goals);
            text += "\n";
        }
        text += &S::cells(self);
        text += &format!("\n{}\n", S::NOTES);
        if !self.comparisons.is_empty() {
            text += "\npepsal over the old build, round by round:\n\n";
            text += &S::round_by_round(self);
        }
        text + &S::remarks(self)
    }

    /// Prints the results, and writes them into a folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn conclude(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let markdown = self.markdown();
        print!("\n{markdown}");
        let json = serde_json::to_string_pretty(self)? + "\n";
        let files = [("results.json", json), ("results.md", markdown)];
        for (name, text) in files.into_iter().chain(self.found.files()) {
            let file = folder.join(name);
            fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        }
        let charts = self.found.draw(folder)?;
        println!("\n{}", goal::aligned(&self.goals));
        println!("Results and {charts} charts are in {}.", folder.display());
        Ok(())
    }
}

/// Ratios of the new build's figures to the old build's, for each round.
#[derive(Clone, Debug, Serialize)]
pub struct RoundRatios {
    /// In the order of rounds.
    pub rounds: Vec<f64>,
    pub median: f64,
    least: f64,
    most: f64,
}

impl RoundRatios {
    /// Computes ratios from pairs of old and new figures. `None` without a pair whose old figure is above
    /// zero.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let pairs = pairs.into_iter().filter(|(old, _)| *old > 0.0);
        let rounds: Vec<_> = pairs.map(|(old, new)| new / old).collect();
        Some(Self {
            median: statistic::median(&rounds)?,
            least: statistic::quantile(&rounds, 0.0)?,
            most: statistic::quantile(&rounds, 1.0)?,
            rounds,
        })
    }

    /// Formats the median, with minimum and maximum in parentheses.
    pub fn spread(&self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }

    /// Formats the ratio of each round.
    pub fn listed(&self) -> String {
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
