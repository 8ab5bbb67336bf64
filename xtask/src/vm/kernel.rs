//! Downloads and unpacks Debian's kernels, without installing them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;

use crate::{cargo, shell};

/// A kernel by the Debian release that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Release {
    /// Debian 11.
    #[value(name = "5.10")]
    Bullseye,
    /// Debian 12.
    #[value(name = "6.1")]
    Bookworm,
    /// Debian 13.
    #[value(name = "6.12")]
    Trixie,
    /// The newest kernel of the backports of Debian 13.
    #[value(name = "newest")]
    Backports,
}

impl Release {
    /// Supported kernels, from old to new.
    pub const PROMISED: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Backports];

    fn suite(self) -> &'static str {
        match self {
            Self::Bullseye => "bullseye",
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Backports => "trixie-backports",
        }
    }
}

/// An unpacked kernel.
pub struct Kernel {
    /// Release as in `uname -r`, without the flavour.
    pub version: String,
    /// The compressed image. Its modules are where virtme-ng expects them.
    pub image: PathBuf,
}

/// The packages that make up a kernel: one up to 6.x, four from 7.x on.
const PARTS: [&str; 4] = ["linux-image-", "linux-binary-", "linux-modules-", "linux-base-"];

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Downloads and unpacks the newest kernel of a release, if necessary.
pub fn fetch(release: Release) -> Result<Kernel> {
    let suite = release.suite();
    let folder = cargo::target_dir().join("vm/kernels").join(suite);
    if let Some(kernel) = find(&folder)? {
        return Ok(kernel);
    }
    shell::heading(&format!("Downloading the kernel of Debian {suite}"));
    let apt = Apt::new(suite)?;
    let packages = apt.kernel_packages()?;
    // In a temporary folder first, so that an interrupted download leaves no kernel.
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    apt.download(&packages, &partial)?;
    for entry in fs::read_dir(&partial)? {
        let package = entry?.path();
        if package.extension().is_some_and(|extension| extension == "deb") {
            shell::run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&partial))?;
            fs::remove_file(&package)?;
        }
    }
    depmod(&partial)?;
    fs::rename(&partial, &folder).with_context(|| format!("cannot create {}", folder.display()))?;
    find(&folder)?.with_context(|| format!("no kernel image in the packages {}", packages.join(", ")))
}

/// Returns the kernel in a folder, if there is one.
fn find(folder: &Path) -> Result<Option<Kernel>> {
    let Some((release, modules)) = modules(folder) else {
        return Ok(None);
    };
    let images = [
        folder.join(format!("boot/vmlinuz-{release}")),
        modules.join("vmlinuz"),
    ];
    let image = images.into_iter().find(|image| image.is_file());
    Ok(image.map(|image| Kernel {
        version: release.trim_end_matches("-amd64").to_owned(),
        image,
    }))
}

/// The release of the kernel in a folder and where its modules are; from Debian 13 on `/lib` is `/usr/lib`.
fn modules(folder: &Path) -> Option<(String, PathBuf)> {
    ["lib/modules", "usr/lib/modules"].into_iter().find_map(|path| {
        let entry = fs::read_dir(folder.join(path)).ok()?.next()?.ok()?;
        Some((entry.file_name().into_string().ok()?, entry.path()))
    })
}

/// Generates the list of module dependencies, which Debian's packages do at installation.
fn depmod(folder: &Path) -> Result<()> {
    let (release, modules) = modules(folder).context("the kernel's packages have no modules")?;
    let base = modules
        .ancestors()
        .nth(3)
        .context("modules lie three folders deep")?;
    let depmod = shell::find("depmod").context("there is no depmod (Debian's package kmod)")?;
    shell::run(Command::new(depmod).arg("-b").arg(base).arg(release))
}

/// Runs apt with separate lists and cache, independent of the system's sources and packages.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(suite: &str) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install Debian's package debian-archive-keyring");
        }
        let folder = cargo::target_dir().join("vm/apt").join(suite);
        for path in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(path)).context("cannot create apt's folders")?;
        }
        let sources = folder.join("sources.list");
        fs::write(
            &sources,
            format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"),
        )
        .context("cannot write apt's sources")?;
        let folder = folder.display();
        let options = [
            format!("Dir::State={folder}/state"),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::Cache={folder}/cache"),
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // Downloads go to xtask's folder, which apt's user cannot access.
            "APT::Sandbox::User=root".to_owned(),
        ];
        Ok(Self {
            options: options
                .into_iter()
                .flat_map(|option| ["-o".to_owned(), option])
                .collect(),
        })
    }

    /// Returns the packages of the newest kernel of the release.
    fn kernel_packages(&self) -> Result<Vec<String>> {
        shell::run(self.command("apt-get").args(["-qq", "update"]))?;
        let depends = shell::output(self.command("apt-cache").args([
            "depends",
            "--recurse",
            "--important",
            "linux-image-amd64",
        ]))?;
        let packages = kernel_packages(&depends);
        if packages.is_empty() {
            bail!("linux-image-amd64 depends on no kernel");
        }
        Ok(packages)
    }

    fn download(&self, packages: &[String], folder: &Path) -> Result<()> {
        shell::run(
            self.command("apt-get")
                .args(["-qq", "download"])
                .args(packages)
                .current_dir(folder),
        )
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options).env("LC_ALL", "C");
        command
    }
}

/// The parts of a kernel in the output of `apt-cache depends --recurse`.
fn kernel_packages(depends: &str) -> Vec<String> {
    let is_part = |name: &str| {
        PARTS.iter().any(|part| {
            name.strip_prefix(part)
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    let mut packages: Vec<String> = depends
        .split_whitespace()
        .filter(|name| is_part(name) && !name.ends_with("-unsigned"))
        .map(str::to_owned)
        .collect();
    packages.sort();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_from_what_they_depend_on() {
        let depends = "linux-image-amd64\n  Depends: linux-image-7.3.4+deb13-amd64\nlinux-image-7.3.4+deb13-amd64\n  \
                       PreDepends: linux-base\n  Depends: linux-base-7.3.4+deb13-amd64\n  Depends: \
                       linux-binary-7.3.4+deb13-amd64\n  Depends: linux-modules-7.3.4+deb13-amd64\n  Conflicts: \
                       linux-image-7.3.4+deb13-amd64-unsigned\n  Depends: kmod\n";
        assert_eq!(
            kernel_packages(depends),
            ["base", "binary", "image", "modules"].map(|part| format!("linux-{part}-7.3.4+deb13-amd64"))
        );
        assert!(kernel_packages("linux-image-amd64\n  Depends: linux-base\n").is_empty());
    }
}
