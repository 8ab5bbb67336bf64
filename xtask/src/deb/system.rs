//! A booted Debian: systemd is the first process of separate namespaces, on a gateway.

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

/// Timeout of systemd's start of a minimal system.
const PATIENCE: Duration = Duration::from_secs(90);

/// Prepares the environment that systemd expects from a container manager
/// (<https://systemd.io/CONTAINER_INTERFACE>). Kernel parameters are read-only, as they are the host's,
/// except those of network namespaces; so is the clock.
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

/// The running system; dropping it ends all its processes.
pub struct System {
    manager: Child,
    group: PathBuf,
    /// The host's process id of its first process.
    init: String,
}

impl System {
    /// Boots a system in a network namespace.
    pub fn boot(root: &Root, network: &Namespace) -> Result<Self> {
        let group = group()?;
        fs::create_dir(&group).with_context(|| format!("cannot create {}", group.display()))?;
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
            // `degraded`: a unit of Debian failed, which does not support containers. Before the manager
            // replies, its client returns errors.
            let state = || system.output("systemctl is-system-running 2>/dev/null");
            !system.init.is_empty()
                && state().is_ok_and(|state| ["running", "degraded"].contains(&state.as_str()))
        });
        Ok(system)
    }

    /// Runs a command in the system, printed with a root prompt and its output.
    pub fn show(&self, line: &str) -> Result<()> {
        println!("# {line}");
        shell::run(&mut self.command(line)).with_context(|| format!("`{line}` failed inside"))
    }

    /// Runs a command in the system and returns its standard output, for any exit status.
    pub fn output(&self, line: &str) -> Result<String> {
        let output = self.command(line).stderr(Stdio::inherit()).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Returns a property of the unit, by systemctl(1).
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
        // systemd ends with `unshare`, and all processes with systemd.
        let _ = self.manager.kill();
        let _ = self.manager.wait();
        // Processes leave their groups shortly after their end. Remaining groups are harmless.
        for _ in 0..100 {
            if remove(&self.group).is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Creates a control group of the system, as the root of its own groups.
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

/// Removes a group with its subgroups.
fn remove(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}
