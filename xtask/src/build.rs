//! Builds the eBPF object, and the daemon with it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{
    cargo::{cargo, root, target_dir},
    setup::{self, Needs},
    shell,
    toolchain::Toolchain,
};

/// Environment variable with the path of the eBPF object, for `pepsal/build.rs`, which embeds it, and for
/// tests that load it.
pub const OBJECT_VARIABLE: &str = "PEPSAL_EBPF_OBJECT";

const EBPF_TARGET: &str = "bpfel-unknown-none";

/// Compiler arguments of the eBPF object: an instruction set whose code the verifier can follow, and debug
/// info, from which the linker generates BTF.
const EBPF_FLAGS: &str = "-C target-cpu=v3 -C debuginfo=2 -C link-arg=--btf";

/// Variables by which the eBPF build would use compiler, flags or libraries of the cargo that runs xtask.
const FOREIGN_VARIABLES: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "LD_LIBRARY_PATH",
    "RUSTC",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Installs missing packages, builds the daemon with its eBPF object, and returns its absolute path.
pub fn daemon(release: bool) -> Result<PathBuf> {
    let object = ebpf(&setup::run(Needs::Build)?)?;
    daemon_with(&object, release)
}

/// Builds the daemon around an eBPF object and returns its absolute path.
pub fn daemon_with(object: &Path, release: bool) -> Result<PathBuf> {
    let (flag, folder) = if release {
        (" --release", "release")
    } else {
        ("", "debug")
    };
    shell::run(cargo(&format!("build --package pepsal{flag}")).env(OBJECT_VARIABLE, object))?;
    Ok(target_dir().join(folder).join("pepsal"))
}

/// Builds this program optimised and returns its absolute path.
pub fn optimised_xtask() -> Result<PathBuf> {
    shell::run(&mut cargo("build --quiet --package xtask --release"))?;
    Ok(target_dir().join("release/xtask"))
}

/// Builds the eBPF object and returns its absolute path.
pub fn ebpf(toolchain: &Toolchain) -> Result<PathBuf> {
    shell::run(&mut ebpf_cargo(toolchain, "cargo", "build"))?;
    Ok(ebpf_target_dir().join(EBPF_TARGET).join("release/pepsal-ebpf"))
}

/// Returns the command that lints the eBPF programs; `None` without clippy in the toolchain.
pub fn ebpf_clippy(toolchain: &Toolchain) -> Option<Command> {
    // Not by `cargo clippy`, which would run rustup's clippy with another compiler.
    let mut clippy = ebpf_cargo(toolchain, "cargo-clippy", "clippy");
    clippy.args(["--", "-D", "warnings"]);
    toolchain.program("cargo-clippy").is_file().then_some(clippy)
}

fn ebpf_cargo(toolchain: &Toolchain, program: &str, subcommand: &str) -> Command {
    let mut cargo = Command::new(toolchain.program(program));
    for name in FOREIGN_VARIABLES {
        cargo.env_remove(name);
    }
    cargo
        .arg(subcommand)
        .args(
            "-Z build-std=core --release --target"
                .split(' ')
                .chain([EBPF_TARGET]),
        )
        .args("--package pepsal-ebpf --features bpf --bin pepsal-ebpf".split(' '))
        .current_dir(root())
        .env("CARGO", toolchain.program("cargo"))
        .env("RUSTC", toolchain.program("rustc"))
        // Unlocks `-Z` in a stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        // Two cargos with the same folder would delete each other's builds.
        .env("CARGO_TARGET_DIR", ebpf_target_dir())
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", toolchain.linker())
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", EBPF_FLAGS);
    cargo
}

fn ebpf_target_dir() -> PathBuf {
    target_dir().join("ebpf")
}
