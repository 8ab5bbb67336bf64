//! The results of a series of steps, and of their tests.

use std::{
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::shell;

#[derive(Default)]
pub struct Report {
    steps: Vec<Step>,
    tally: Tally,
    /// Failed steps without a failed test: each counts as one failure.
    broken: usize,
}

struct Step {
    name: &'static str,
    time: Duration,
    outcome: String,
}

impl Report {
    /// Runs a step with a heading; prints and records its error.
    pub fn step<T>(&mut self, name: &'static str, work: impl FnOnce(&mut Tally) -> Result<T>) -> Option<T> {
        shell::heading(name);
        let (passed, failed, start) = (self.tally.passed, self.tally.failed, Instant::now());
        let result = work(&mut self.tally);
        let (passed, failed) = (self.tally.passed - passed, self.tally.failed - failed);
        if let Err(error) = &result {
            eprintln!("error: {error:#}");
            self.broken += usize::from(failed == 0);
        }
        let mut outcome = if result.is_ok() { "ok" } else { "FAILED" }.to_owned();
        if passed + failed > 0 {
            outcome += &format!(", {passed} passed, {failed} failed");
        }
        self.steps.push(Step {
            name,
            time: start.elapsed(),
            outcome,
        });
        result.ok()
    }

    /// Records a step that cannot run.
    pub fn skip(&mut self, name: &'static str, reason: &str) {
        shell::heading(name);
        println!("skipped: {reason}");
        self.steps.push(Step {
            name,
            time: Duration::ZERO,
            outcome: format!("skipped: {reason}"),
        });
    }

    /// Prints the table, the failed tests and, in the last line, the sums.
    pub fn finish(&self) -> ExitCode {
        shell::heading("summary");
        for Step { name, time, outcome } in &self.steps {
            println!("{name:<20} {:>7.1} s  {outcome}", time.as_secs_f64());
        }
        for name in &self.tally.failures {
            println!("failed: {name}");
        }
        if self.tally.ignored > 0 {
            println!("ignored: {} tests", self.tally.ignored);
        }
        let failed = self.tally.failed + self.broken;
        println!("{} passed, {failed} failed", self.tally.passed);
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
pub struct Tally {
    /// Tests that passed.
    pub passed: usize,
    ignored: usize,
    /// Tests that failed.
    pub failed: usize,
    pub failures: Vec<String>,
    /// Names in the list of failures that is being read.
    list: Option<Vec<String>>,
}

impl Tally {
    /// Runs a `cargo test`, and parses its output while copying it to the terminal.
    pub fn run(&mut self, command: &mut Command) -> Result<()> {
        let line = shell::line(command);
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `{line}`"))?;
        let mut output = child.stdout.take().context("standard output is a pipe")?;
        let mut pending = Vec::new();
        let mut chunk = [0; 4096];
        // By chunk and not by line: libtest writes the name of a test before it runs.
        loop {
            let n = output.read(&mut chunk).context("cannot read the tests' output")?;
            if n == 0 {
                break;
            }
            let mut stdout = io::stdout().lock();
            stdout
                .write_all(&chunk[..n])
                .and_then(|()| stdout.flush())
                .context("cannot write")?;
            pending.extend_from_slice(&chunk[..n]);
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                self.line(String::from_utf8_lossy(&line).trim_end());
            }
        }
        let status = child
            .wait()
            .with_context(|| format!("cannot wait for `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed: {status}");
        }
        Ok(())
    }

    pub fn of(output: &str) -> Self {
        let mut tally = Self::default();
        output.lines().for_each(|line| tally.line(line));
        tally
    }

    /// Returns the number of completed tests.
    pub fn total(&self) -> usize {
        self.passed + self.failed
    }

    fn line(&mut self, line: &str) {
        if line == "failures:" {
            // This line occurs twice: before the output of the failed tests, and before the list of their
            // names.
            self.list = Some(Vec::new());
        } else if let Some(result) = line.strip_prefix("test result: ") {
            let words: Vec<_> = result.split_whitespace().collect();
            for pair in words.windows(2) {
                match (pair[0].parse::<usize>(), pair[1]) {
                    (Ok(n), "passed;") => self.passed += n,
                    (Ok(n), "failed;") => self.failed += n,
                    (Ok(n), "ignored;") => self.ignored += n,
                    _ => {}
                }
            }
            self.failures.extend(self.list.take().unwrap_or_default());
        } else if let (Some(list), Some(name)) = (&mut self.list, line.strip_prefix("    ")) {
            list.push(name.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_several_programs_add_up() {
        let sums = Tally::of(
            "running 3 tests\ntest a ... ok\n\
             test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.20s\n",
        );
        assert_eq!((sums.passed, sums.failed, sums.ignored), (42, 0, 1));
        assert!(sums.failures.is_empty());
    }

    #[test]
    fn failed_tests_are_named_once_and_their_output_is_not() {
        let sums = Tally::of(
            "failures:\n\n---- tests::one stdout ----\n    an indented line of output\n\n\
             failures:\n    tests::one\n    tests::two\n\n\
             test result: FAILED. 5 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
             \x20   not a test\n",
        );
        assert_eq!((sums.passed, sums.failed), (5, 2));
        assert_eq!(sums.failures, ["tests::one", "tests::two"]);
    }
}
