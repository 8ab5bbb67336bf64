//! Runs the end-to-end tests in virtual machines, on other kernels than the host's.
//!
//! Kernels are Debian packages, booted by virtme-ng with the host's file system as root, so that programs
//! built here run unchanged. The CPU is emulated, which needs no privilege and works on every host, and is
//! about ten times slower: the tests get longer timeouts.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;

mod kernel;
mod machine;
mod matrix;
mod tests;

use self::{kernel::Release, machine::Machine, matrix::Matrix};
use crate::{
    build,
    progress::Progress,
    setup::{self, Needs},
    shell,
    signals::Signals,
};

/// Options of the tests in virtual machines.
#[derive(Args)]
pub struct Options {
    /// Kernels: 5.10, 6.1, 6.12 or newest. By default all supported kernels: those except 5.10.
    #[arg(value_name = "KERNEL")]
    kernels: Vec<Release>,
    /// Run every test file. By default those that compare rates and times are left out, which emulation distorts.
    #[arg(long)]
    all: bool,
    /// Run these test files only.
    #[arg(long, value_name = "FILE", value_delimiter = ',', conflicts_with = "all")]
    files: Vec<String>,
    /// Run only those tests whose name contains FILTER; other arguments of libtest work too.
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

/// Default test files: those that depend most on the kernel.
const CHOSEN: [&str; 4] = ["packets", "steering", "relay", "lifecycle"];

/// Timeout of one test file in a machine.
const PATIENCE: Duration = Duration::from_secs(30 * 60);

/// Builds daemon and tests, boots one machine after the other, and prints the table.
pub fn run(options: &Options) -> Result<ExitCode> {
    let signals = Signals::block()?;
    let toolchain = setup::run(Needs::Vm)?;
    let object = build::ebpf(&toolchain)?;
    let daemon = build::daemon_with(&object, false)?;
    let programs = chosen(options, tests::build()?)?;
    let vng = machine::install()?;
    let releases = match options.kernels.as_slice() {
        [] => Release::PROMISED.to_vec(),
        chosen => chosen.to_vec(),
    };

    let mut matrix = Matrix::new(programs.iter().map(|(name, _)| name.clone()).collect());
    for release in releases {
        let kernel = kernel::fetch(release)?;
        shell::heading(&format!("tests on Linux {}", kernel.version));
        let machine = Machine {
            vng: &vng,
            kernel: &kernel,
            object: &object,
            daemon: &daemon,
            filter: &options.filter,
        };
        let mut progress = Progress::new();
        for (name, program) in &programs {
            let start = Instant::now();
            let mut run = machine.start(name, program)?;
            let ended = loop {
                if run.has_ended()? {
                    break true;
                }
                if start.elapsed() > PATIENCE {
                    break false;
                }
                progress.show(|| {
                    format!(
                        "Linux {}: {name}: {} tests done",
                        kernel.version,
                        run.tests_done()
                    )
                });
                if signals.come_within(Duration::from_millis(500))? {
                    drop(run);
                    return signals.interrupted();
                }
            };
            progress.clear();
            let result = run.result(ended);
            println!(
                "Linux {}: {name}: {} in {:.0} s",
                kernel.version,
                result.in_short(),
                start.elapsed().as_secs_f64()
            );
            matrix.add(&kernel.version, name, result);
        }
    }
    let chose = !options.all && options.files.is_empty();
    print!("{}", matrix.table());
    if chose {
        println!("Of the test files only {}; --all runs all.", CHOSEN.join(", "));
    }
    Ok(matrix.exit_code())
}

fn chosen(options: &Options, built: Vec<(String, PathBuf)>) -> Result<Vec<(String, PathBuf)>> {
    if options.all {
        return Ok(built);
    }
    let wanted: Vec<&str> = match options.files.as_slice() {
        [] => CHOSEN.to_vec(),
        files => files.iter().map(String::as_str).collect(),
    };
    let names: Vec<&str> = built.iter().map(|(name, _)| name.as_str()).collect();
    if let Some(unknown) = wanted.iter().find(|name| !names.contains(name)) {
        bail!("no test file {unknown}; there are {}", names.join(", "));
    }
    let program = |name: &&str| built.iter().find(|(built, _)| built == name).cloned();
    wanted
        .iter()
        .map(program)
        .collect::<Option<_>>()
        .context("every file was found")
}
