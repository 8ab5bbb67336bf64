//! What the benchmarks have in common: the builds that they measure, and results that are printed and written.

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

/// Returns the daemon to measure: the given one, or one that is built, optimised, after installing what a benchmark needs.
///
/// Does not return but for an error unless this process is root and optimised: it becomes the same command that is. Links
/// and hosts are this program's work, and unoptimised it would be measured itself.
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

/// What a build says of itself.
pub fn version(daemon: &Path) -> Result<String> {
    let version = shell::output(Command::new(daemon).arg("--version"))?;
    Ok(version.trim().to_owned())
}

/// What a benchmark has found: its samples, and what follows from them.
pub trait Study: Serialize {
    type Run: Serialize;
    /// The samples of one thing that was measured.
    type Summary: Serialize;
    /// The two builds of pepsal in one of these.
    type Comparison: Serialize;

    /// What stands below the table of samples.
    const NOTES: &str;

    fn summaries(&self) -> Vec<Self::Summary>;
    fn comparisons(&self) -> Vec<Self::Comparison>;
    fn goals(&self) -> Vec<Goal>;
    /// Draws charts, and returns how many there are.
    fn draw(&self, folder: &Path) -> Result<usize>;

    fn heading(run: &Self::Run) -> String;
    fn cells(report: &Report<'_, Self>) -> String;
    fn round_by_round(report: &Report<'_, Self>) -> String;
    fn remarks(report: &Report<'_, Self>) -> String;
    /// Files besides `results.json` and `results.md`, with their names.
    fn files(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }
}

/// Everything that is written; as JSON, `results.json`.
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
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
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

/// The new build's figures over the old build's, round by round.
#[derive(Clone, Debug, Serialize)]
pub struct RoundRatios {
    /// In the order of rounds.
    pub rounds: Vec<f64>,
    pub median: f64,
    least: f64,
    most: f64,
}

impl RoundRatios {
    /// Of pairs of the old build's figure and the new build's. `None` where there is no pair with an old figure above zero.
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

    /// The median, and the least and the most in parentheses.
    pub fn spread(&self) -> String {
        format!("{:.2} ({:.2}–{:.2})", self.median, self.least, self.most)
    }

    /// Each round's ratio.
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
