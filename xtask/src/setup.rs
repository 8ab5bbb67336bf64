//! Finds or installs the requirements of the other commands, or prints how to install them.

use std::fs::{self, File};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::ValueEnum;
use nix::fcntl::{Flock, FlockArg};

use crate::{compiler::Compiler, debian, linker::Linker, shell, toolchain::Toolchain};

/// Command to prepare for; each includes the requirements of those before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Needs {
    /// Building the daemon: the eBPF toolchain.
    Build,
    /// The demonstration.
    Demo,
    /// The soak.
    Soak,
    /// The benchmark of links.
    Bench,
    /// The benchmark of the relay; HAProxy is optional.
    BenchRelay,
    /// All tests.
    Test,
    /// The tests in virtual machines.
    Vm,
}

/// Programs of a command, each with its Debian package.
const PROGRAMS: &[(Needs, &str, &str)] = &[
    (Needs::Demo, "ip", "iproute2"),
    (Needs::Soak, "nft", "nftables"),
    (Needs::Soak, "prlimit", "util-linux"),
    (Needs::BenchRelay, "iperf3", "iperf3"),
    (Needs::BenchRelay, "nft", "nftables"),
    (Needs::Test, "curl", "curl"),
    (Needs::Test, "haproxy", "haproxy"),
    (Needs::Test, "nft", "nftables"),
    (Needs::Test, "nginx", "nginx-light"),
    (Needs::Test, "strace", "strace"),
    (Needs::Test, "systemd-analyze", "systemd"),
    (Needs::Test, "tcpdump", "tcpdump"),
    (Needs::Vm, "busybox", "busybox-static"),
    (Needs::Vm, "depmod", "kmod"),
    (Needs::Vm, "python3", "python3-venv"),
    (Needs::Vm, "qemu-system-x86_64", "qemu-system-x86"),
];

const WITH_RUSTUP: &str = "
    rustup toolchain install nightly --component rust-src
    cargo install cargo-binstall && cargo binstall bpf-linker";

/// Returns the toolchain for the eBPF object, after installing missing packages. Prints nothing if none is
/// missing.
pub fn run(needs: Needs) -> Result<Toolchain> {
    let ready = || Toolchain::find().filter(|_| missing_programs(needs).next().is_none());
    if let Some(toolchain) = ready() {
        return Ok(toolchain);
    }
    // Another xtask may be installing at the same time.
    fs::create_dir_all(Linker::folder()).context("cannot create the folder of the eBPF toolchain")?;
    let lock = File::create(Linker::folder().join("lock")).context("cannot create the lock of setup")?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock setup")?;
    if let Some(toolchain) = ready() {
        return Ok(toolchain);
    }

    install_packages(needs)?;
    if let Some(toolchain) = Toolchain::find() {
        return Ok(toolchain);
    }
    let compiler = Compiler::system().context("the packages are installed, but have no usable compiler")?;
    Linker::of(&compiler).build()?;
    Toolchain::find().context("the eBPF toolchain is installed, but cannot link an empty program")
}

/// Installs optional programs, each with its Debian package, if possible: as root on Debian and its
/// derivatives.
///
/// # Errors
/// One line with the missing programs and the command to install them.
pub fn offer(programs: &[(&str, &str)]) -> Result<()> {
    let missing = || {
        programs
            .iter()
            .filter(|(program, _)| shell::find(program).is_none())
    };
    let packages: Vec<_> = missing().map(|(_, package)| (*package).to_owned()).collect();
    if packages.is_empty() {
        return Ok(());
    }
    if debian::is_here() && shell::is_root() {
        debian::update();
        if let Err(error) = debian::install(&packages) {
            eprintln!("warning: {error:#}");
        }
    }
    let names: Vec<_> = missing().map(|(program, _)| *program).collect();
    if names.is_empty() {
        return Ok(());
    }
    bail!(
        "no {} here; `apt-get install {}` as root",
        names.join(", "),
        packages.join(" ")
    )
}

/// Returns the missing programs with their Debian packages.
fn missing_programs(needs: Needs) -> impl Iterator<Item = (&'static str, &'static str)> {
    PROGRAMS.iter().filter_map(move |&(command, program, package)| {
        (command <= needs && shell::find(program).is_none()).then_some((program, package))
    })
}

/// Installs missing packages, or fails with the commands to type.
fn install_packages(needs: Needs) -> Result<()> {
    if !debian::is_here() {
        bail!("{}", without_packages(needs));
    }
    let mut packages = missing_packages(needs);
    if packages.as_ref().is_ok_and(Vec::is_empty) {
        return Ok(());
    }
    if shell::is_root() {
        // Old lists have removed packages, and compilers that are too old.
        debian::update();
        packages = missing_packages(needs);
    }
    let packages = packages?;
    if !shell::is_root() {
        bail!(
            "packages are missing, install them and try again:{}",
            debian::by_hand(&packages)
        );
    }
    debian::install(&packages)
}

fn missing_packages(needs: Needs) -> Result<Vec<String>> {
    let mut packages: Vec<_> = missing_programs(needs)
        .map(|(_, package)| package.to_owned())
        .collect();
    if Toolchain::find().is_none() {
        let toolchain = debian::toolchain_packages();
        packages.extend(toolchain.map_err(|error| anyhow!("{error:#}, but rustup can do:{WITH_RUSTUP}"))?);
    }
    packages.retain(|package| !debian::is_installed(package));
    Ok(packages)
}

/// Returns the instructions for systems without apt.
fn without_packages(needs: Needs) -> String {
    let mut text = "something is missing, install it and try again:".to_owned();
    if Toolchain::find().is_none() {
        text += WITH_RUSTUP;
    }
    let programs: Vec<_> = missing_programs(needs).map(|(program, _)| program).collect();
    if !programs.is_empty() {
        text += &format!("\n    the programs {}", programs.join(", "));
    }
    text
}
