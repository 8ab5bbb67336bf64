//! Checks what the workspace depends on: known vulnerabilities, licences, sources (`deny.toml`).

use std::process::Command;

use anyhow::Result;

use crate::{build, shell, tool::Tool};

const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    version: "^0.20",
};

/// Installs cargo-deny below the target folder, unless it is there, and runs it.
pub fn run() -> Result<()> {
    let program = CARGO_DENY.install()?;
    shell::heading("Checking dependencies");
    let mut deny = Command::new(program);
    deny.args("--workspace --locked check".split(' '))
        .current_dir(build::root());
    shell::run(&mut deny)
}
