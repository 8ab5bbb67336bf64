//! The package's life in a clean Debian, which debootstrap makes: installed, run on a gateway between a client and a
//! server, upgraded, removed.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use pepsal_tests::{Daemon, Family, Server, Topology, Transfer};

use crate::{build, shell};

/// What the administrator adds to the configuration.
const EDIT: &str = "\n# An administrator was here.\n";

/// Checks that the package installs and works, that a newer one replaces it, and that nothing is left of either.
pub fn run(suite: &str, package: &Path) -> Result<()> {
    let root = Root::new(suite)?;
    let clean = root.files()?;

    shell::heading("Install");
    root.install(package)?;
    root.run("dpkg --verify pepsal")?;
    root.run("pepsal --version")?;
    root.run("getent passwd pepsal")?;
    root.run("systemd-analyze verify --man=no /usr/lib/systemd/system/pepsal.service")?;
    shell::heading("Intercept a flow, as the service's user");
    root.intercept()?;

    shell::heading("Upgrade with an edited configuration");
    let configuration = root.path.join("etc/pepsal/pepsal.toml");
    let edited = fs::read_to_string(&configuration)? + EDIT;
    fs::write(&configuration, &edited)?;
    root.install(&successor(package)?)?;
    ensure!(
        fs::read_to_string(&configuration)? == edited,
        "the upgrade changed an edited /etc/pepsal/pepsal.toml"
    );
    root.intercept()?;

    shell::heading("Remove, then purge");
    root.run("apt-get remove --yes pepsal")?;
    ensure!(configuration.exists(), "removing took the configuration away");
    root.run("apt-get purge --yes pepsal")?;
    root.run("apt-get autoremove --purge --yes")?;
    let left: Vec<_> = root
        .files()?
        .into_iter()
        .filter(|path| !clean.contains(path))
        .collect();
    ensure!(left.is_empty(), "purging leaves {}", left.join(", "));
    ensure!(
        !fs::read_to_string(root.path.join("etc/passwd"))?.contains("pepsal"),
        "purging leaves the user"
    );
    println!("Installed, ran, upgraded and purged in a clean {suite}.");
    Ok(())
}

/// The same package with a higher version.
fn successor(package: &Path) -> Result<PathBuf> {
    let folder = build::target_dir().join("tmp/successor");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder)?;
    shell::run(
        Command::new("dpkg-deb")
            .arg("--raw-extract")
            .args([package, &folder]),
    )?;
    let control = folder.join("DEBIAN/control");
    let text = fs::read_to_string(&control)?;
    let version = text
        .lines()
        .find(|line| line.starts_with("Version: "))
        .context("the package has no version")?;
    fs::write(&control, text.replace(version, &format!("{version}+next")))?;
    let path = folder.with_extension("deb");
    let mut build = Command::new("dpkg-deb");
    build
        .args(["--root-owner-group", "-Znone", "--build"])
        .args([&folder, &path]);
    shell::run(&mut build)?;
    fs::remove_dir_all(folder)?;
    Ok(path)
}

/// A Debian in a folder of its own, which goes away with this.
struct Root {
    path: PathBuf,
}

impl Root {
    fn new(suite: &str) -> Result<Self> {
        let debootstrap =
            shell::find("debootstrap").context("debootstrap is missing: apt-get install debootstrap")?;
        ensure!(
            shell::is_root(),
            "a clean Debian is made by root: run this as root or with sudo"
        );
        shell::heading(&format!("Make a clean {suite}"));
        let root = Self {
            path: build::target_dir().join(format!("tmp/{suite}")),
        };
        root.remove();
        fs::create_dir_all(&root.path)?;
        // What the package itself needs is there already, so that what is left at the end is the package's.
        shell::run(
            // What it mounts goes with it, however it ends, so that removing the folder never reaches the host's.
            Command::new("unshare")
                .args(["--mount", "--propagation", "private"])
                .arg(debootstrap)
                .args(["--variant=minbase", "--include=systemd,libgcc-s1", suite])
                .arg(&root.path)
                .stdout(fs::File::create(root.path.with_extension("log"))?),
        )?;
        Ok(root)
    }

    fn remove(&self) {
        // What fails here shows when the folder is made again.
        let _ = fs::remove_dir_all(&self.path);
    }

    /// Runs a program inside, in a mount namespace that ends with it.
    fn run(&self, line: &str) -> Result<()> {
        println!("# {line}");
        shell::run(inside(Command::new("unshare"), &self.path).args(line.split(' ')))
    }

    fn install(&self, package: &Path) -> Result<()> {
        let name = package.file_name().context("a package has a name")?;
        let copy = self.path.join("tmp").join(name);
        fs::copy(package, &copy)?;
        let installed = self.run(&format!(
            "apt-get install --yes --no-install-recommends /tmp/{}",
            name.to_string_lossy()
        ));
        fs::remove_file(copy)?;
        installed
    }

    /// Runs the installed daemon on a gateway and sends a flow each way of each family through it.
    fn intercept(&self) -> Result<()> {
        let topology = Topology::new()?;
        let server = Server::start(&topology.server)?;
        let mut command = inside(topology.gateway.command("unshare"), &self.path);
        command.args("pepsal --user pepsal -i lan0 -i sat0".split(' '));
        let daemon = Daemon::start_command(command)?;
        for family in Family::BOTH {
            for transfer in [Transfer::upload(1_000_000), Transfer::download(1_000_000)] {
                let address: SocketAddr = server.address(family);
                let outcome = transfer.run(&topology.client, address)?;
                // The client's own SYN would have lost one hop on its way.
                ensure!(
                    outcome.intact && outcome.syn.ttl() == 64,
                    "a flow to {address} was not relayed"
                );
            }
        }
        let exit = daemon.terminate()?;
        if !exit.status.success() {
            bail!("the daemon ended with {}:\n{}", exit.status, exit.log);
        }
        Ok(())
    }

    /// Every path of the system's, without what package managers and logs keep, and what a boot clears.
    fn files(&self) -> Result<Vec<String>> {
        let mut find = Command::new("find");
        find.arg(".").current_dir(&self.path);
        for folder in [
            "./run",
            "./tmp",
            "./var/cache",
            "./var/lib/apt",
            "./var/lib/dpkg",
            "./var/log",
        ] {
            find.args(["-path", folder, "-prune", "-o"]);
        }
        let list = shell::output(find.arg("-print"))?;
        Ok(list.lines().map(str::to_owned).collect())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The rest of a command of unshare(1) that enters the system below `root`, with the kernel's file systems.
fn inside(mut unshare: Command, root: &Path) -> Command {
    const MOUNT: &str = "mount -t proc proc \"$1/proc\" && mount --rbind /sys \"$1/sys\" && mount --rbind /dev \"$1/dev\" && \
                         root=$1 && shift && exec chroot \"$root\" \"$@\"";
    unshare
        .args(["--mount", "--propagation", "private", "sh", "-c", MOUNT, "sh"])
        .arg(root)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        // The rest is about Debian's own programs, which a pager or a service manager would only hinder.
        .env("SYSTEMD_OFFLINE", "1");
    unshare
}
