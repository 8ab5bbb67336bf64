//! The configuration file: TOML whose keys are the command line's options by another name.

mod problem;

use std::{fs, path::Path, process::ExitCode};

use toml::de::DeTable;

pub use problem::{Problem, Text};

/// `pepsal check`: says what is wrong with a file, a line for each problem.
pub fn check(file: &Path) -> ExitCode {
    let problems = match fs::read_to_string(file) {
        Ok(content) => {
            let text = Text::new(file, &content);
            let (_, errors) = DeTable::parse_recoverable(&content);
            let problem = |error: &toml::de::Error| {
                text.problem(error.span().unwrap_or_default().start, error.message())
            };
            errors.iter().map(problem).collect()
        }
        Err(error) => vec![Problem::of_file(file, &error.to_string())],
    };
    for problem in &problems {
        eprintln!("{problem}");
    }
    match problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
