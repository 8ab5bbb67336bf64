//! pepsal's own commands: `cargo xtask setup`, `build`, `build-and-load`, `demo`, `deb`, `bench`, `test`.

use std::{ffi::OsString, os::unix::process::CommandExt as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser;

mod audit;
mod bench;
mod build;
mod cargo;
mod compiler;
mod dashboard;
mod deb;
mod debian;
mod demo;
mod fuzz;
mod linker;
mod progress;
mod quantity;
mod report;
mod screenshot;
mod setup;
mod shell;
mod signals;
mod soak;
mod table;
mod test;
mod tool;
mod toolchain;
mod vm;

use setup::Needs;

/// Build, run and test pepsal. Every command first installs missing requirements, or prints how to install
/// them.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Xtask {
    /// Find or install the requirements of the other commands, such as the eBPF toolchain.
    Setup {
        /// The command to prepare for.
        #[arg(long = "for", value_name = "COMMAND", default_value = "build")]
        needs: Needs,
    },
    /// Build the daemon with its eBPF object inside, as target/<PROFILE>/pepsal.
    Build {
        /// Optimise; the default is a debug build. The eBPF object is optimised either way.
        #[arg(long)]
        release: bool,
    },
    /// Build the daemon, then run it as root.
    BuildAndLoad {
        /// Optimise; the default is a debug build.
        #[arg(long)]
        release: bool,
        /// Arguments of the daemon.
        #[arg(last = true)]
        args: Vec<OsString>,
    },
    /// Transfer a file over an emulated satellite link, with and without pepsal, and compare.
    Demo(demo::Options),
    /// Build a Debian package, in target/debian.
    Deb(deb::Options),
    /// Check the dashboard against Grafana's types, and its queries and the alerts in a Prometheus; as root.
    Dashboard,
    /// Render `pepsal top` as docs/images/top.svg; as root.
    Screenshot,
    /// Measure gain or cost of pepsal, and compare with the goals.
    #[command(subcommand)]
    Bench(Box<bench::Bench>),
    /// Check format and lints, run the unit tests and, as root, the end-to-end tests.
    Test(test::Options),
    /// Check dependencies for known vulnerabilities, licences and sources.
    Audit,
    /// Fuzz the parsers of untrusted bytes: packets, the relay's ends, configuration files, requests.
    Fuzz(fuzz::Options),
    /// Run flows of every kind over a lossy link during fault injection, and check every byte.
    Soak(soak::Options),
    /// Run the end-to-end tests on other kernels, in virtual machines without hardware support.
    VmTest(vm::Options),
}

fn main() -> ExitCode {
    Xtask::parse().run().unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

impl Xtask {
    fn run(self) -> Result<ExitCode> {
        match self {
            Self::Setup { needs } => println!("Everything is in place: {}.", setup::run(needs)?),
            Self::Build { release } => println!("Built {}.", build::daemon(release)?.display()),
            Self::BuildAndLoad { release, args } => return load(release, &args),
            Self::Demo(options) => return demo::run(&options),
            Self::Deb(options) => deb::run(&options)?,
            Self::Dashboard => dashboard::run()?,
            Self::Screenshot => screenshot::run()?,
            Self::Bench(bench) => return bench::run(&bench),
            Self::Test(options) => return Ok(test::run(&options)),
            Self::Audit => audit::run()?,
            Self::Fuzz(options) => fuzz::run(&options)?,
            Self::Soak(options) => return soak::run(&options),
            Self::VmTest(options) => return vm::run(&options),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Executes the daemon in this process, which so has its signals and exit status.
fn load(release: bool, args: &[OsString]) -> Result<ExitCode> {
    let daemon = build::daemon(release)?;
    let mut command = shell::as_root(&daemon)?;
    Err(command.args(args).exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)))
}
