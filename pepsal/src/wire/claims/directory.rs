//! The directory of the claims: whose it is, and which files of this network namespace are in it.

use std::{
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::signal::kill,
    unistd::{Pid, User, geteuid},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::debug;

use crate::wire::claims::lock::{Lock, lock, own_process, owner};

/// Default of the runtime directory (`--runtime-dir`).
pub const RUNTIME_DIRECTORY: &str = "/run/pepsal";

/// The directory of the claims, below the runtime directory.
pub(super) const NAME: &str = "claims";

/// The directory of the claims, and the network namespace whose interfaces are claimed.
#[derive(Debug, Clone)]
pub struct Directory {
    pub(super) path: PathBuf,
    /// The inode of the network namespace.
    pub(super) namespace: u64,
}

impl Directory {
    /// Opens the directory below `runtime`, and makes both where they are missing.
    ///
    /// # Errors
    /// When they cannot be made, or when another user could write there.
    pub fn open(runtime: &Path) -> Result<Self> {
        make(runtime, RUNTIME_MODE)?;
        check(runtime, geteuid().as_raw())?;
        let path = runtime.join(NAME);
        make(&path, DIRECTORY_MODE)?;
        check(&path, geteuid().as_raw())?;
        Self::at(path)
    }

    /// Makes the directories as root for a user that this process is about to become.
    ///
    /// # Errors
    /// When they cannot be made, or when another user could write there.
    pub fn make_for(runtime: &Path, user: &str) -> Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        // A user who does not exist is reported when it is to be become.
        let Ok(Some(user)) = User::from_name(user) else {
            return Ok(());
        };
        let give = |path: &Path| {
            lchown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .with_context(|| format!("cannot give {} to user {}", path.display(), user.name))
        };
        if make(runtime, RUNTIME_MODE)? {
            give(runtime)?;
        }
        check(runtime, user.uid.as_raw())?;
        let path = runtime.join(NAME);
        make(&path, DIRECTORY_MODE)?;
        check(&path, user.uid.as_raw())?;
        // What an instance of root's has made: its claims remain, and have to be seen.
        if fs::symlink_metadata(&path)?.uid() == 0 {
            for entry in fs::read_dir(&path)? {
                give(&entry?.path())?;
            }
            give(&path)?;
        }
        Ok(())
    }

    fn at(path: PathBuf) -> Result<Self> {
        let namespace = fs::metadata("/proc/self/ns/net").context("cannot identify the network namespace")?;
        Ok(Self {
            path,
            namespace: namespace.ino(),
        })
    }

    /// Returns whether no other process has a claim in this network namespace; false when that cannot be determined.
    pub fn is_alone(&self) -> bool {
        self.has_no_other().unwrap_or(false)
    }

    fn has_no_other(&self) -> io::Result<bool> {
        let prefix = format!("{}.", self.namespace);
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(&prefix) {
                continue;
            }
            let file = match File::open(entry.path()) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if owner(&file) != Some(own_process()) && !lock(&file, Lock::Shared)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// An interface's name contains neither `/` nor `:`.
    pub(super) fn claim_path(&self, interface: &str) -> PathBuf {
        self.path.join(format!("{}.{interface}", self.namespace))
    }

    pub(super) fn socket_path(&self, process: i32) -> PathBuf {
        self.path.join(format!("{}:{process}", self.namespace))
    }

    /// Removes the sockets of processes that are gone.
    pub(super) fn remove_stale_sockets(&self) {
        let prefix = format!("{}:", self.namespace);
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let Some(process) = name
                .to_str()
                .and_then(|name| name.strip_prefix(&prefix)?.parse().ok())
            else {
                continue;
            };
            // A process that exists may be about to listen.
            let exists = process != own_process() && kill(Pid::from_raw(process), None) != Err(Errno::ESRCH);
            if !exists && is_refused(&entry.path()) {
                debug!(process, "removing the socket of a process that is gone");
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Makes a directory unless it exists; returns whether it did.
fn make(path: &Path, mode: u32) -> Result<bool> {
    let shown = path.display();
    let made = DirBuilder::new().mode(mode).create(path);
    match made {
        // The umask may have taken bits away.
        Ok(()) => {
            let set = fs::set_permissions(path, Permissions::from_mode(mode));
            set.with_context(|| format!("cannot set the mode of {shown}"))?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| {
            format!(
                "cannot make {shown}: make it for this user, or choose another directory with --runtime-dir"
            )
        }),
    }
}

/// Fails unless only `user` and root can write to a directory.
fn check(path: &Path, user: u32) -> Result<()> {
    let shown = path.display();
    let there = fs::symlink_metadata(path).with_context(|| {
        format!("cannot look at {shown}: run as its user, or choose another directory with --runtime-dir")
    })?;
    let other = "choose another with --runtime-dir";
    ensure!(there.is_dir(), "{shown} is not a directory: {other}");
    let owner = there.uid();
    ensure!(
        owner == user || owner == 0,
        "{shown} belongs to another user (id {owner}): run as that user, or {other}"
    );
    ensure!(
        there.mode() & 0o022 == 0,
        "{shown} can be written to by other users: take that right away, or {other}"
    );
    Ok(())
}

/// Whether nobody listens at a socket; false when that cannot be determined without waiting.
fn is_refused(path: &Path) -> bool {
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    connect().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Mode of the directory of the claims.
pub(super) const DIRECTORY_MODE: u32 = 0o700;

/// Mode of a runtime directory that is made: the admin socket in it has a mode of its own.
const RUNTIME_MODE: u32 = 0o755;
