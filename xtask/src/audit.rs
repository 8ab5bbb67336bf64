//! Checks the dependencies of the workspace and the fuzzer: vulnerabilities, licences, sources (`deny.toml`).

use std::process::Command;

use anyhow::Result;

use crate::{cargo, shell, tool::Tool};

const CARGO_DENY: Tool = Tool {
    name: "cargo-deny",
    version: "^0.20",
};

/// Installs cargo-deny below the target folder if necessary, and runs it.
pub fn run() -> Result<()> {
    let program = CARGO_DENY.install()?;
    for workspace in ["Cargo.toml", "fuzz/Cargo.toml"] {
        shell::heading(&format!("Checking dependencies of {workspace}"));
        let mut deny = Command::new(&program);
        deny.args(["--manifest-path", workspace, "--config", "deny.toml"])
            .args("--workspace --locked check".split(' '))
            .current_dir(cargo::root());
        shell::run(&mut deny)?;
    }
    Ok(())
}
