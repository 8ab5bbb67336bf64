//! Runs all checks and tests, and prints a summary.

use std::{ffi::OsStr, path::Path, process::ExitCode};

use anyhow::{Result, bail};

use crate::{
    build::{self, OBJECT_VARIABLE},
    cargo,
    report::{Report, Tally},
    setup::{self, Needs},
    shell, soak,
};

/// Environment variable with the path of the daemon, for the end-to-end tests.
const DAEMON_VARIABLE: &str = "PEPSAL_BIN";

/// Duration of the soak, in minutes.
const SOAK_MINUTES: f64 = 1.0;

/// Options of the tests. By default all run: format, lints, unit tests, end-to-end tests and soak.
#[derive(clap::Args)]
pub struct Options {
    /// Run the unit tests only.
    #[arg(long)]
    unit: bool,
    /// Run the end-to-end tests only; with --unit, both.
    #[arg(long)]
    e2e: bool,
    /// Run only those end-to-end tests whose name contains FILTER; other arguments of libtest work too.
    #[arg(last = true, value_name = "FILTER", conflicts_with = "unit")]
    filter: Vec<String>,
}

impl Options {
    fn checks(&self) -> bool {
        !self.unit && !self.e2e && self.filter.is_empty()
    }

    fn unit(&self) -> bool {
        self.unit || self.checks()
    }

    fn e2e(&self) -> bool {
        self.e2e || !self.unit
    }
}

/// Runs the chosen steps. After a failure, later steps run unless they depend on it.
pub fn run(options: &Options) -> ExitCode {
    let mut report = Report::default();
    let toolchain = report.step("setup", |_| setup::run(Needs::Test));
    if options.checks() {
        report.step("format", |_| {
            shell::run(&mut cargo::cargo("fmt --all -- --check"))
        });
        report.step("clippy", |_| {
            shell::run(&mut cargo::cargo(
                "clippy --workspace --all-targets --locked -- -D warnings",
            ))
        });
        match toolchain.as_ref().map(build::ebpf_clippy) {
            Some(Some(mut clippy)) => {
                report.step("clippy of eBPF", |_| shell::run(&mut clippy));
            }
            Some(None) => report.skip("clippy of eBPF", "the eBPF toolchain has no clippy"),
            None => report.skip("clippy of eBPF", "no eBPF toolchain"),
        }
    }

    let object = toolchain.and_then(|toolchain| report.step("build of eBPF", |_| build::ebpf(&toolchain)));
    let daemon = object
        .as_ref()
        .filter(|_| options.e2e())
        .and_then(|object| report.step("build of the daemon", |_| build::daemon_with(object, false)));
    if options.unit() {
        report.step("unit tests", |tally| {
            let mut cargo = cargo::cargo("test --workspace --exclude pepsal-tests --no-fail-fast");
            tally.run(cargo.envs(object.as_ref().map(|object| (OBJECT_VARIABLE, object))))
        });
    }
    if options.e2e() {
        if let (Some(object), Some(daemon)) = (&object, &daemon) {
            let variables = [(OBJECT_VARIABLE, object.as_path()), (DAEMON_VARIABLE, daemon)];
            report.step("end-to-end tests", |tally| {
                end_to_end(tally, variables, &options.filter)
            });
        } else {
            report.skip("end-to-end tests", "no daemon to test");
        }
        if let (Some(daemon), true) = (&daemon, options.filter.is_empty()) {
            report.step("soak", |_| shell::run(&mut soak::command(daemon, SOAK_MINUTES)?));
        }
    }
    report.finish()
}

fn end_to_end(tally: &mut Tally, variables: [(&str, &Path); 2], filter: &[String]) -> Result<()> {
    let mut cargo = cargo::cargo("test --package pepsal-tests --no-fail-fast");
    cargo.envs(variables);
    if !shell::is_root() {
        // Cargo compiles as the user and runs the tests as root. sudo drops variables, so `env` sets them again.
        let mut runner = shell::as_root(Path::new("env"))?;
        runner.args(variables.map(|(name, value)| format!("{name}={}", value.display())));
        let words: Vec<&OsStr> = [runner.get_program()]
            .into_iter()
            .chain(runner.get_args())
            .collect();
        cargo
            .arg("--config")
            .arg(format!("target.'cfg(all())'.runner={words:?}"));
    }
    let before = tally.total();
    tally.run(cargo.arg("--").args(filter))?;
    if !filter.is_empty() && tally.total() == before {
        bail!("no test matches");
    }
    Ok(())
}
