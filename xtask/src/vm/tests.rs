//! Builds the end-to-end tests.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{cargo, shell};

/// Builds the tests, and returns the name of each file with its program.
pub fn build() -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = cargo::cargo("test --quiet --package pepsal-tests --no-run --message-format=json");
    let messages = shell::output(&mut cargo)?;
    let mut programs = Vec::new();
    for line in messages.lines() {
        let message: Message = serde_json::from_str(line).context("cannot parse the message of cargo")?;
        if let (Some(target), Some(program)) = (message.target, message.executable)
            && target.kind.iter().any(|kind| kind == "test")
        {
            programs.push((target.name, program));
        }
    }
    programs.sort();
    Ok(programs)
}

/// Members of cargo's messages (cargo reference, "External tools").
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}
