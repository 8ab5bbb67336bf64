//! Results of test files on kernels.

use std::process::ExitCode;

use crate::{
    report::Tally,
    table::{Align, aligned},
};

/// Result of a test file on a kernel.
pub struct TestResult {
    tally: Tally,
    /// Whether the program completed.
    is_whole: bool,
}

impl TestResult {
    /// Parsed output of libtest.
    pub fn new(output: &str, is_whole: bool) -> Self {
        let tally = Tally::of(output);
        Self {
            is_whole: is_whole && tally.total() > 0,
            tally,
        }
    }

    /// Formats the numbers of passed and failed tests.
    pub fn in_short(&self) -> String {
        let Tally { passed, failed, .. } = self.tally;
        match (self.is_whole, failed) {
            (false, _) => "no result".to_owned(),
            (true, 0) => format!("{passed} passed"),
            (true, _) => format!("{passed} passed, {failed} failed"),
        }
    }

    fn is_good(&self) -> bool {
        self.is_whole && self.tally.failed == 0
    }
}

pub struct Matrix {
    files: Vec<String>,
    kernels: Vec<(String, Vec<(String, TestResult)>)>,
}

impl Matrix {
    /// Creates a matrix without results.
    pub fn new(files: Vec<String>) -> Self {
        Self {
            files,
            kernels: Vec::new(),
        }
    }

    /// Adds one.
    pub fn add(&mut self, kernel: &str, file: &str, result: TestResult) {
        match self.kernels.last_mut().filter(|(last, _)| last == kernel) {
            Some((_, results)) => results.push((file.to_owned(), result)),
            None => self
                .kernels
                .push((kernel.to_owned(), vec![(file.to_owned(), result)])),
        }
    }

    /// A line for every file on every kernel, and the names of the tests that failed.
    pub fn table(&self) -> String {
        let mut rows = vec![["kernel", "tests", "result"].map(str::to_owned)];
        let mut failures = String::new();
        for (kernel, results) in &self.kernels {
            for (file, result) in results.iter().filter(|(file, _)| self.files.contains(file)) {
                rows.push([kernel.clone(), file.clone(), result.in_short()]);
                for name in &result.tally.failures {
                    failures += &format!("failed: Linux {kernel}: {file}: {name}\n");
                }
            }
        }
        aligned(&rows, [Align::Left; 3]) + &failures
    }

    /// Returns failure if any result is not a success.
    pub fn exit_code(&self) -> ExitCode {
        let mut results = self.kernels.iter().flat_map(|(_, results)| results);
        if results.all(|(_, result)| result.is_good()) {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
    const BAD: &str = "failures:\n    one\n\ntest result: FAILED. 2 passed; 1 failed; 0 ignored\n";

    #[test]
    fn a_file_that_did_not_run_to_its_end_is_no_success() {
        for (output, is_whole, expected) in [
            (GOOD, true, "3 passed"),
            (BAD, true, "2 passed, 1 failed"),
            (GOOD, false, "no result"),
            ("", true, "no result"),
        ] {
            assert_eq!(TestResult::new(output, is_whole).in_short(), expected);
        }
    }

    #[test]
    fn failures_are_named_with_their_kernel() {
        let mut matrix = Matrix::new(vec!["relay".to_owned()]);
        matrix.add("5.10", "relay", TestResult::new(BAD, true));
        matrix.add("6.1", "relay", TestResult::new(GOOD, true));
        assert_eq!(
            matrix.table(),
            "kernel  tests  result\n5.10    relay  2 passed, 1 failed\n6.1     relay  3 passed\n\
             failed: Linux 5.10: relay: one\n"
        );
    }
}
