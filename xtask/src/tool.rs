//! Cargo's extensions that some commands need: installed below the target folder, for this workspace alone.

use std::path::PathBuf;

use anyhow::Result;

use crate::{cargo, shell};

/// An extension, as crates.io has it.
pub struct Tool {
    pub name: &'static str,
    /// A requirement, as in a manifest.
    pub version: &'static str,
}

impl Tool {
    /// Installs it unless it is there, and returns its program.
    pub fn install(&self) -> Result<PathBuf> {
        let root = cargo::target_dir().join("tools");
        let program = root.join("bin").join(self.name);
        if !program.is_file() {
            shell::heading(&format!("Installing {}", self.name));
            // Not optimised: it takes longer to compile than it ever runs.
            let mut install = cargo::cargo("install --quiet --locked --debug --root");
            install
                .arg(&root)
                .arg("--target-dir")
                .arg(root.join("build"))
                .arg(format!("{}@{}", self.name, self.version));
            shell::run(&mut install)?;
        }
        Ok(program)
    }
}
