//! Finds toolchains for the eBPF object: a compiler with its library's source, and a linker that reads its
//! output.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{compiler::Compiler, linker::Linker, shell};

/// A compiler and a linker that work together.
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

impl Toolchain {
    /// Returns the first working toolchain: rustup's nightly with a bpf-linker on the PATH, or the
    /// distribution's compiler with the linker built by setup.
    pub fn find() -> Option<Self> {
        let nightly = || Self::pair(Compiler::nightly()?, shell::find("bpf-linker")?);
        let system = || {
            let compiler = Compiler::system()?;
            let linker = Linker::of(&compiler).path();
            Self::pair(compiler, linker)
        };
        nightly().or_else(system)
    }

    /// Returns a compiler with a linker, if they can build an empty program.
    fn pair(compiler: Compiler, linker: PathBuf) -> Option<Self> {
        let toolchain = Self { compiler, linker };
        (toolchain.linker.is_file() && toolchain.links()).then_some(toolchain)
    }

    /// Returns the path of a program of the toolchain, which may not exist.
    pub fn program(&self, name: &str) -> PathBuf {
        self.compiler.program(name)
    }

    pub fn linker(&self) -> &Path {
        &self.linker
    }

    /// Returns whether the linker starts and can read the compiler's output.
    fn links(&self) -> bool {
        let folder = env::temp_dir().join(format!("pepsal-probe-{}", std::process::id()));
        let result = self.link_empty_program(&folder);
        // A remaining folder is harmless.
        let _ = fs::remove_dir_all(&folder);
        result.is_ok()
    }

    fn link_empty_program(&self, folder: &Path) -> Result<()> {
        let source = folder.join("probe.rs");
        fs::create_dir_all(folder)?;
        fs::write(&source, "#![feature(no_core)] #![no_core] #![no_main]")?;
        let mut rustc = Command::new(self.program("rustc"));
        rustc
            .args(["--target", "bpfel-unknown-none", "--out-dir"])
            .args([folder, &source]);
        rustc.arg("-C").arg(format!("linker={}", self.linker.display()));
        rustc.env("RUSTC_BOOTSTRAP", "1").env_remove("LD_LIBRARY_PATH");
        shell::output(&mut rustc).map(drop)
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, bpf-linker for LLVM {}", self.compiler, self.compiler.llvm)
    }
}
