//! Finds and installs packages of Debian and its derivatives.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::{
    compiler::{self, Version},
    linker::Linker,
    shell,
};

pub fn is_here() -> bool {
    shell::find("apt-get").is_some() && shell::find("dpkg-query").is_some()
}

/// Returns the packages of the eBPF toolchain from apt's lists: compiler, cargo and library source of one
/// version, clippy, and the build dependencies of bpf-linker for the compiler's LLVM.
pub fn toolchain_packages() -> Result<Vec<String>> {
    let minimum = compiler::minimum();
    let policy = apt_cache("policy rustc rustc-web")?;
    let rustc = choose_compiler(&policy, minimum).with_context(|| {
        format!("apt's lists have no rustc {minimum} or newer (`apt-get update` renews them)")
    })?;
    let depends = apt_cache(&format!("depends --recurse --important {rustc}"))?;
    let llvm = llvm_of(&depends).with_context(|| format!("{rustc} does not depend on any libllvm"))?;
    if !Linker::LLVM.contains(&llvm) {
        bail!("package {rustc} uses LLVM {llvm}, which bpf-linker does not support");
    }
    let suffix = rustc.strip_prefix("rustc").unwrap_or_default();
    // g++ for its library, to which LLVM is linked.
    let packages = format!("{rustc} cargo{suffix} rust{suffix}-src rust{suffix}-clippy llvm-{llvm}-dev g++");
    Ok(packages.split(' ').map(str::to_owned).collect())
}

/// Returns whether a package is completely installed.
pub fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Status}", package]);
    shell::output(&mut query).is_ok_and(|status| status == "installed")
}

/// Updates the lists of packages. A failure matters only if the old lists are insufficient.
pub fn update() {
    shell::heading("Fetching the lists of Debian packages");
    if let Err(error) = shell::run(&mut apt_get("update")) {
        eprintln!("warning: {error:#}");
    }
}

/// Installs packages, as root.
pub fn install(packages: &[String]) -> Result<()> {
    shell::heading(&format!("Installing Debian packages: {}", packages.join(" ")));
    shell::run(apt_get(INSTALL).args(packages))
}

/// Returns the commands that do the work of [`update`] and [`install`] by hand.
pub fn by_hand(packages: &[String]) -> String {
    format!(
        "\n    sudo apt-get update\n    sudo apt-get {INSTALL} {}",
        packages.join(" ")
    )
}

/// `--no-remove`: Debian's rustc and rustup exclude each other, and the user decides which to keep.
const INSTALL: &str = "install --yes --no-remove --no-install-recommends";

/// Waits for other package managers, and keeps percentages out of logs.
const APT_OPTIONS: &str = "-o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 -o Dpkg::Use-Pty=0";

fn apt_get(action: &str) -> Command {
    let mut apt = Command::new("apt-get");
    apt.args(action.split(' ').chain(APT_OPTIONS.split(' ')))
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Keeps systemd from starting the servers, of which tests need only the programs.
        .env("SYSTEMD_OFFLINE", "1")
        .stdin(Stdio::null());
    apt
}

fn apt_cache(args: &str) -> Result<String> {
    shell::output(Command::new("apt-cache").args(args.split(' ')).env("LC_ALL", "C"))
}

/// Returns the compiler's package from the output of `apt-cache policy`: the installed one if it is new
/// enough, since two exclude each other, or else the newest.
fn choose_compiler(policy: &str, minimum: Version) -> Option<&str> {
    let mut best = None;
    let mut package = "";
    let mut installed = false;
    for line in policy.lines() {
        let version = |field| line.trim().strip_prefix(field)?.parse::<Version>().ok();
        if let Some(name) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
            package = name;
            installed = false;
        } else if let Some(version) = version("Installed: ") {
            installed = version >= minimum;
        } else if let Some(version) = version("Candidate: ")
            && version >= minimum
        {
            best = best.max(Some((installed, version, package)));
        }
    }
    best.map(|(_, _, package)| package)
}

/// Returns the major version of LLVM from the output of `apt-cache depends --recurse`.
fn llvm_of(depends: &str) -> Option<u32> {
    let mut names = depends
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("libllvm"));
    // Some releases add a suffix, as in libllvm19t64.
    names.find_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOKWORM: &str = "\
rustc:
  Installed: (none)
  Candidate: 1.63.0+dfsg1-2
  Version table:
     1.63.0+dfsg1-2 500
rustc-web:
  Installed: (none)
  Candidate: 1.96.0+dfsg1-1~deb12u2
  Version table:
     1.85.0+dfsg3-1~deb12u3 500
";

    #[test]
    fn the_newest_compiler_is_chosen() {
        assert_eq!(choose_compiler(BOOKWORM, Version(1, 87)), Some("rustc-web"));
        let sid = BOOKWORM.replace("1.63.0", "1.97.0");
        assert_eq!(choose_compiler(&sid, Version(1, 87)), Some("rustc"));
    }

    #[test]
    fn the_installed_compiler_is_kept_while_it_is_new_enough() {
        let both = BOOKWORM
            .replace("1.63.0", "1.90.0")
            .replacen("(none)", "1.90.0+dfsg1-2", 1);
        assert_eq!(choose_compiler(&both, Version(1, 87)), Some("rustc"));
        assert_eq!(choose_compiler(&both, Version(1, 91)), Some("rustc-web"));
    }

    #[test]
    fn a_compiler_that_is_too_old_is_not_chosen() {
        assert_eq!(choose_compiler(BOOKWORM, Version(1, 97)), None);
        assert_eq!(choose_compiler("", Version(1, 87)), None);
    }

    #[test]
    fn llvm_is_read_from_the_dependencies() {
        assert_eq!(
            llvm_of("rustc-web\n  Depends: libc6\nlibstd-rust-web-1.96\n  Depends: libllvm22\n"),
            Some(22)
        );
        assert_eq!(llvm_of("  Depends: libllvm19t64\n"), Some(19));
        assert_eq!(llvm_of("  Depends: libc6\n"), None);
    }
}
