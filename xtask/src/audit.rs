//! Checks what the workspace depends on: known vulnerabilities, licences, sources (`deny.toml`).

use std::process::Command;

use anyhow::Result;

use crate::{build, shell};

/// The version of cargo-deny that is installed.
const CARGO_DENY: &str = "cargo-deny@^0.18";

/// Installs cargo-deny below the target folder, unless it is there, and runs it.
pub fn run() -> Result<()> {
    let root = build::target_dir().join("tools");
    let program = root.join("bin/cargo-deny");
    if !program.is_file() {
        shell::heading("Installing cargo-deny");
        let mut install = build::cargo("install --quiet --locked --root");
        shell::run(install.arg(&root).arg(CARGO_DENY))?;
    }
    shell::heading("Checking dependencies");
    let mut deny = Command::new(program);
    deny.args("--workspace --locked check".split(' '))
        .current_dir(build::root());
    shell::run(&mut deny)
}
