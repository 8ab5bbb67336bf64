//! A Debian that is booted: systemd is the first process of namespaces of its own, on a gateway.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pepsal_tests::{Namespace, eventually};

use super::root::Root;
use crate::shell;

/// How long systemd may take to start what a minimal system has.
const PATIENCE: Duration = Duration::from_secs(90);

/// Gives systemd what it expects of a container's manager (<https://systemd.io/CONTAINER_INTERFACE>). The kernel's
/// parameters are read-only, as they are the host's, but for those of network namespaces; and so is its clock.
const BOOT: &str = r#"
set -e
echo $$ >"$2/cgroup.procs"
exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --cgroup sh -ec '
    mount --bind "$1" "$1"
    cd "$1"
    mount -t proc proc proc
    mount --bind proc/sys proc/sys
    mount --bind proc/sys/net proc/sys/net
    mount -o remount,bind,ro proc/sys
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755 tmpfs run
    mount -t tmpfs -o mode=755 tmpfs dev
    for device in null zero full random urandom tty; do
        touch dev/$device
        mount --bind /dev/$device dev/$device
    done
    mkdir dev/shm dev/pts
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    pivot_root . tmp
    exec chroot . sh -c "umount -l /tmp && exec env -i container=xtask PATH=/usr/sbin:/usr/bin \\
        setpriv --bounding-set=-sys_module,-sys_time,-sys_rawio,-sys_boot /usr/lib/systemd/systemd"
' sh "$1"
"#;

/// The system. Dropping it ends all that is in it.
pub struct System {
    manager: Child,
    group: PathBuf,
    /// Its first process, as the host numbers it.
    init: String,
}

impl System {
    /// Boots a system whose network is the namespace.
    pub fn boot(root: &Root, network: &Namespace) -> Result<Self> {
        let group = group()?;
        fs::create_dir(&group).with_context(|| format!("cannot make {}", group.display()))?;
        let manager = network
            .command("sh")
            .args(["-c", BOOT, "sh"])
            .args([&root.path, &group])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot run `unshare` (Debian's package util-linux)")?;
        let mut system = Self {
            manager,
            group,
            init: String::new(),
        };
        let process = system.manager.id();
        let children = format!("/proc/{process}/task/{process}/children");
        eventually(PATIENCE, || {
            system.init = fs::read_to_string(&children)
                .unwrap_or_default()
                .trim()
                .to_owned();
            // `degraded`: a unit of Debian's own failed, which wants what a container does not have. Before the manager
            // answers, its client complains.
            let state = || system.output("systemctl is-system-running 2>/dev/null");
            !system.init.is_empty()
                && state().is_ok_and(|state| ["running", "degraded"].contains(&state.as_str()))
        });
        Ok(system)
    }

    /// Runs a command inside, shown as at a root's prompt, its output going to the terminal.
    pub fn show(&self, line: &str) -> Result<()> {
        println!("# {line}");
        shell::run(&mut self.command(line)).with_context(|| format!("`{line}` failed inside"))
    }

    /// Runs a command inside and returns what it wrote to standard output, however it ended.
    pub fn output(&self, line: &str) -> Result<String> {
        let output = self.command(line).stderr(Stdio::inherit()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// The unit's property, as systemctl(1) shows it.
    pub fn property(&self, unit: &str, name: &str) -> Result<String> {
        let value = self.output(&format!("systemctl show --value --property {name} {unit}"))?;
        ensure!(!value.is_empty(), "{unit} has no {name}");
        Ok(value)
    }

    fn command(&self, line: &str) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .args(["--target", &self.init])
            .args("--mount --pid --net --uts --ipc --cgroup -- env -i".split(' '))
            .args([
                "PATH=/usr/sbin:/usr/bin",
                "LC_ALL=C.UTF-8",
                "DEBIAN_FRONTEND=noninteractive",
            ])
            .args(["SYSTEMD_PAGER=", "SYSTEMD_COLORS=0", "sh", "-c", line])
            .stdin(Stdio::null());
        nsenter
    }
}

impl Drop for System {
    fn drop(&mut self) {
        // systemd dies with `unshare`, and everything with systemd.
        let _ = self.manager.kill();
        let _ = self.manager.wait();
        // Processes leave their groups a little after they have died. What is left of groups in the end harms nobody.
        for _ in 0..100 {
            if remove(&self.group).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A control group for the whole system, so that its own begin there.
fn group() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("no list of mounts")?;
    let mount = mounts
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, mount, "cgroup2", ..] => Some(mount),
            _ => None,
        })
        .context("cgroup v2 is not mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")?;
    Ok(Path::new(mount).join(format!("pepsal-check.{}", process::id())))
}

/// Removes a group with those below it.
fn remove(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
