//! bpf-linker, built against the LLVM of the distribution.

use std::{env, fs, ops::RangeInclusive, path::PathBuf};

use anyhow::{Context as _, Result};

use crate::{cargo, compiler::Compiler, shell};

/// The linker of a compiler.
pub struct Linker {
    llvm: u32,
}

impl Linker {
    const VERSION: &str = "0.13.0";

    /// The major versions of LLVM that this version of bpf-linker can be built against.
    pub const LLVM: RangeInclusive<u32> = 21..=23;

    /// Returns the linker for the LLVM of a compiler.
    pub fn of(compiler: &Compiler) -> Self {
        Self { llvm: compiler.llvm }
    }

    pub fn path(&self) -> PathBuf {
        self.root().join("bin/bpf-linker")
    }

    /// Builds the linker with the cargo that runs xtask.
    pub fn build(&self) -> Result<()> {
        shell::heading("Building bpf-linker, which takes a minute or two");
        let (root, scratch) = (self.root(), Self::folder().join("build"));
        let mut cargo = cargo::cargo("install bpf-linker --locked --force --no-default-features");
        cargo.args([
            "--version",
            Self::VERSION,
            "--features",
            &format!("llvm-{}", self.llvm),
        ]);
        cargo.arg("--root").arg(&root).env("CARGO_TARGET_DIR", &scratch);
        cargo.env("LLVM_PREFIX", format!("/usr/lib/llvm-{}", self.llvm));
        // With the folder on the PATH, cargo does not suggest to add it.
        let mut path = env::var_os("PATH").unwrap_or_default();
        path.push(":");
        path.push(root.join("bin"));
        let built = shell::run(cargo.env("PATH", path)).context("bpf-linker was not built");
        let removed = fs::remove_dir_all(scratch).context("cannot remove what bpf-linker's build left");
        built.and(removed)
    }

    /// Returns the folder of the built toolchain.
    pub fn folder() -> PathBuf {
        cargo::target_dir().join("bpf-toolchain")
    }

    /// Returns the folder of this linker; its name has both versions, so that a new version of either builds
    /// a new linker.
    fn root(&self) -> PathBuf {
        Self::folder().join(format!("bpf-linker-{}-llvm-{}", Self::VERSION, self.llvm))
    }
}
