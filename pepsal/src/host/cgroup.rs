//! The daemon's own control group, so that the eBPF program for initial windows runs for its sockets only.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::PermissionsExt as _,
    },
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result};
use nix::{errno::Errno, libc};

/// Prefix of the names of pepsal's groups, before the process id.
const PREFIX: &str = "pepsal.";

/// The control group of this process; dropping it leaves the group.
#[derive(Debug)]
pub struct OwnCgroup {
    path: PathBuf,
    before: PathBuf,
    /// The detached mount that the paths refer to, if cgroup v2 is not mounted.
    _mount: Option<OwnedFd>,
}

impl OwnCgroup {
    /// Moves this process into a new group below its present one. Sockets that exist stay in the former
    /// group.
    ///
    /// # Errors
    /// When cgroup v2 is missing or not writable.
    pub fn enter() -> Result<Self> {
        let (mount, own_mount) = hierarchy()?;
        let groups = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
        let group = own_group(&groups).context("this process has no cgroup v2")?;
        let before = mount.join(service_group(group).trim_start_matches('/'));
        remove_leftovers(&before);
        let path = before.join(format!("{PREFIX}{}", process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let entered = Self {
            path,
            before,
            _mount: own_mount,
        };
        enter(&entered.path).with_context(|| format!("cannot enter {}", entered.path.display()))?;
        Ok(entered)
    }

    /// Opens the group, to attach programs.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub(crate) fn open(&self) -> io::Result<File> {
        File::open(&self.path)
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let left = enter(&self.before).and_then(|()| remove(&self.path, &self.before));
        if let Err(error) = left {
            tracing::debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Returns whether another process is in the same service (or session) as this one.
pub(crate) fn is_of_same_service(process: i32) -> bool {
    let service = |process: &str| {
        let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
        Some(service_group(own_group(&groups)?).to_owned())
    };
    let own = service("self");
    own.is_some() && own == service(&process.to_string())
}

/// Returns the path of cgroup v2: its mount point, or a mount for this process only, as under `ip netns
/// exec`, which hides it.
fn hierarchy() -> Result<(PathBuf, Option<OwnedFd>)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if let Some(mount) = mount_point(&mounts) {
        return Ok((mount, None));
    }
    let mount = mount_detached().context("cgroup v2 is not mounted, and mounting it failed")?;
    Ok((format!("/proc/self/fd/{}", mount.as_raw_fd()).into(), Some(mount)))
}

/// Mounts cgroup v2 detached; closing the descriptor unmounts it (fsopen(2), fsmount(2)).
fn mount_detached() -> io::Result<OwnedFd> {
    // SAFETY: system calls on descriptors opened here and a terminated string; each returned descriptor has
    // one owner.
    unsafe {
        let context = libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), libc::FSOPEN_CLOEXEC);
        let context = OwnedFd::from_raw_fd(Errno::result(context)? as RawFd);
        let null = std::ptr::null::<libc::c_char>();
        let created = libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            libc::FSCONFIG_CMD_CREATE,
            null,
            null,
            0,
        );
        Errno::result(created)?;
        let mount = libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, 0);
        Ok(OwnedFd::from_raw_fd(Errno::result(mount)? as RawFd))
    }
}

fn enter(group: &Path) -> io::Result<()> {
    fs::write(group.join("cgroup.procs"), process::id().to_string())
}

/// Removes a group. The root of the hierarchy is read-only, also for its owner: sets the write permission for
/// the removal. Root needs this after it has dropped CAP_DAC_OVERRIDE.
fn remove(group: &Path, parent: &Path) -> io::Result<()> {
    match fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let before = fs::metadata(parent)?.permissions();
            fs::set_permissions(parent, Permissions::from_mode(before.mode() | 0o200))?;
            let removed = fs::remove_dir(group);
            fs::set_permissions(parent, before).and(removed)
        }
        removed => removed,
    }
}

/// Removes empty groups of killed daemons. A group whose process exists is kept, also while it is empty.
fn remove_leftovers(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Returns the mount point of cgroup v2 from `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn mount_point(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ")
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Returns the path in the unified hierarchy, whose line has the number zero and no controllers (cgroups(7)).
fn own_group(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Returns the group of a service: without the daemon's own group below it, and without the group in which
/// systemd starts reload commands of a service with delegation (`Delegate=` in systemd.resource-control(5)).
fn service_group(group: &str) -> &str {
    let service = match group.rsplit_once('/') {
        Some((service, own)) if own.starts_with(PREFIX) && own[PREFIX.len()..].parse::<u32>().is_ok() => {
            service
        }
        _ => group,
    };
    service
        .strip_suffix("/.control")
        .unwrap_or(service)
        .trim_end_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_s_processes_are_told_by_its_group() {
        let service = "/system.slice/pepsal.service";
        for below in ["", "/pepsal.17", "/.control", "/.control/pepsal.17"] {
            assert_eq!(service_group(&format!("{service}{below}")), service);
        }
        for root in ["/", "/pepsal.17"] {
            assert_eq!(service_group(root), "");
        }
    }

    #[test]
    fn the_unified_hierarchy_is_found_beside_the_old_one() {
        let mounts = "32 31 0:27 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n\
                      33 31 0:28 / /sys/fs/cgroup/unified rw,relatime shared:10 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("1 2 0:3 / / rw - ext4 /dev/vda rw\n"), None);
        assert_eq!(
            own_group("4:cpu:/\n0::/system.slice/pepsal.service\n"),
            Some("/system.slice/pepsal.service")
        );
    }
}
