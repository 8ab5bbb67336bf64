//! Cargo extensions of some commands: installed below the target folder, for this workspace only.

use std::path::PathBuf;

use anyhow::Result;

use crate::{cargo, shell};

/// An extension of crates.io.
pub struct Tool {
    pub name: &'static str,
    /// Version requirement, as in a manifest.
    pub version: &'static str,
}

impl Tool {
    /// Installs the extension if necessary, and returns its program.
    pub fn install(&self) -> Result<PathBuf> {
        let root = cargo::target_dir().join("tools");
        let program = root.join("bin").join(self.name);
        if !program.is_file() {
            shell::heading(&format!("Installing {}", self.name));
            // Without optimisation: compiling takes longer than all its runs.
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
