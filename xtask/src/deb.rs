//! Builds the Debian package by cargo-deb: `pepsal/Cargo.toml` lists its files, and this module generates
//! manual pages and completions.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{build, cargo, shell};

mod life;
mod root;
mod system;

/// Options of the package.
#[derive(clap::Args)]
pub struct Options {
    /// Also boot a clean Debian in namespaces, and install, start, use, reload, upgrade and purge the package
    /// there; as root. The package has to be built on that release or an older one.
    #[arg(long)]
    check: bool,
    /// Debian release of that system.
    #[arg(long, value_name = "RELEASE", default_value = "trixie", requires = "check")]
    suite: String,
}

/// Builds the package, and checks it if requested.
pub fn run(options: &Options) -> Result<()> {
    build::daemon(true)?;
    let tool = tool()?;
    stage()?;
    let package = package(&tool)?;
    if options.check {
        life::run(&options.suite, &package)?;
    }
    println!("Made {}.", package.display());
    Ok(())
}

const CARGO_DEB: &str = "3.8.0";

/// Returns cargo-deb, built by the cargo that runs xtask if necessary.
fn tool() -> Result<PathBuf> {
    let root = cargo::target_dir().join(format!("tools/cargo-deb-{CARGO_DEB}"));
    let tool = root.join("bin/cargo-deb");
    if !tool.is_file() {
        shell::heading("Building cargo-deb, which takes some minutes");
        let mut cargo = cargo::cargo("install cargo-deb --locked --version");
        cargo.arg(CARGO_DEB).arg("--root").arg(root);
        shell::run(&mut cargo).context("cargo-deb was not built")?;
    }
    Ok(tool)
}

/// Writes manual pages, completions, examples and Debian's changelog below target/packaging.
fn stage() -> Result<()> {
    let staged = cargo::root().join("target/packaging");
    let _ = fs::remove_dir_all(&staged);
    let mut manual = cargo::cargo("run --quiet --package pepsal --example manual --");
    shell::run(manual.arg(&staged)).context("the manual pages were not made")?;
    let packaging = cargo::root().join("packaging");
    let examples = staged.join("examples");
    fs::create_dir_all(&examples)?;
    fs::copy(packaging.join("pepsal.toml"), examples.join("pepsal.toml"))?;
    for folder in ["grafana", "prometheus"] {
        let folder = packaging.join(folder);
        if folder.is_dir() {
            shell::run(Command::new("cp").arg("-r").arg(folder).arg(&examples))?;
        }
    }
    let date = shell::output(Command::new("date").args(["--rfc-email", "--utc"]))?;
    let changelog = format!(
        "pepsal ({}-1) unstable; urgency=medium\n\n  * What is new is in /usr/share/doc/pepsal/NEWS.md.\n\n \
         -- The pepsal authors <pepsal@localhost>  {date}",
        env!("CARGO_PKG_VERSION")
    );
    fs::write(staged.join("changelog"), changelog).context("the changelog was not made")
}

/// Builds the package, and returns its path.
fn package(tool: &Path) -> Result<PathBuf> {
    let mut command = Command::new(tool);
    command
        .args("--package pepsal --no-build --locked --strip --output".split(' '))
        .arg(cargo::target_dir().join("debian/"))
        .current_dir(cargo::root());
    let said = shell::output(&mut command).context("the package was not made")?;
    let path = said.lines().last().context("cargo-deb names no package")?;
    Ok(PathBuf::from(path))
}
