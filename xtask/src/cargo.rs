//! The cargo that runs xtask, with its workspace and target folder.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// Returns a command of the cargo that runs xtask, for the host's crates, with space-separated arguments.
pub fn cargo(args: &str) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(args.split(' ')).current_dir(root());
    cargo.env("CARGO_TARGET_DIR", target_dir());
    cargo
}

/// Returns the target folder, an absolute path.
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => std::path::absolute(&dir).unwrap_or(dir.into()),
        None => root().join("target"),
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies inside the workspace")
}
