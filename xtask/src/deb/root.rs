//! A clean Debian in a folder, created by debootstrap.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, shell};

/// Dropping it removes the folder.
pub struct Root {
    pub path: PathBuf,
}

impl Root {
    /// Creates a system of a Debian release.
    pub fn new(suite: &str) -> Result<Self> {
        let debootstrap =
            shell::find("debootstrap").context("debootstrap is missing: apt-get install debootstrap")?;
        ensure!(
            shell::is_root(),
            "a clean Debian is made by root: run this as root or with sudo"
        );
        shell::heading(&format!("Make a clean {suite}"));
        let root = Self {
            path: cargo::target_dir().join(format!("tmp/{suite}")),
        };
        root.remove();
        fs::create_dir_all(&root.path)?;
        // Includes all dependencies of the package and of a gateway, so that files that remain after the
        // purge are the package's.
        shell::run(
            // In a mount namespace, so that its mounts end with it, and removing the folder never reaches the
            // host's files.
            Command::new("unshare")
                .args(["--mount", "--propagation", "private"])
                .arg(debootstrap)
                .args([
                    "--variant=minbase",
                    "--include=systemd-sysv,dbus,udev,iproute2,nftables,libgcc-s1",
                    suite,
                ])
                .arg(&root.path)
                .stdout(fs::File::create(root.path.with_extension("log"))?),
        )?;
        // debootstrap configures packages in an order in which the dependencies of this one fail.
        shell::run(
            Command::new("unshare")
                .args(["--mount", "--propagation", "private"])
                .arg("chroot")
                .arg(&root.path)
                .args("apt-get install -qq --yes --no-install-recommends network-manager".split(' '))
                .env("DEBIAN_FRONTEND", "noninteractive")
                .env("LC_ALL", "C.UTF-8")
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .stdout(fs::File::create(root.path.with_extension("apt.log"))?),
        )?;
        let quiet = root.file("/etc/apt/apt.conf.d/90quiet");
        fs::write(quiet, "quiet \"1\";\nDpkg::Use-Pty \"0\";\n")?;
        Ok(root)
    }

    /// Returns every path of the system, except the files of package, network and service managers, logs, and
    /// files that a boot removes.
    pub fn files(&self) -> Result<Vec<String>> {
        const OTHERS: [&str; 9] = [
            "./run",
            "./tmp",
            "./var/cache",
            "./var/lib/NetworkManager",
            "./var/lib/apt",
            "./var/lib/dpkg",
            "./var/lib/systemd/timers",
            "./var/log",
            "./var/tmp",
        ];
        let mut find = Command::new("find");
        find.arg(".").current_dir(&self.path);
        for folder in OTHERS {
            find.args(["-path", folder, "-prune", "-o"]);
        }
        let list = shell::output(find.arg("-print"))?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    /// Returns the host's path of a file.
    pub fn file(&self, path: &str) -> PathBuf {
        self.path.join(path.trim_start_matches('/'))
    }

    /// Copies a file in, and returns its path inside.
    pub fn take(&self, file: &Path) -> Result<String> {
        let name = file.file_name().context("a file has a name")?.to_string_lossy();
        let inside = format!("/var/tmp/{name}");
        fs::copy(file, self.file(&inside)).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(inside)
    }

    fn remove(&self) {
        // An error here causes an error when the folder is created again.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.remove();
    }
}
