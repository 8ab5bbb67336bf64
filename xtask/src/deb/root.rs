//! A clean Debian in a folder of its own, which debootstrap makes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{cargo, shell};

/// The folder, which goes away with this.
pub struct Root {
    pub path: PathBuf,
}

impl Root {
    /// Makes one of a release of Debian.
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
        // What the package itself and a gateway need is there already, so that what is left at the end is the package's.
        shell::run(
            // What it mounts goes with it, however it ends, so that removing the folder never reaches the host's.
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
        // debootstrap configures packages in an order in which this one's dependencies fail.
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

    /// Every path of the system's, without what managers of packages, networks and services keep, logs, and what a boot
    /// clears.
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

    /// A file, by its path inside.
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
        // What fails here shows when the folder is made again.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.remove();
    }
}
