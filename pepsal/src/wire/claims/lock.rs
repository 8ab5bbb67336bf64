//! The file of a claim, as its lock and its text: which process it is of.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    process,
};

use nix::{errno::Errno, libc};

pub(super) fn open_claim(path: &Path) -> io::Result<File> {
    // std sets O_CLOEXEC.
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

#[derive(Clone, Copy)]
pub(super) enum Lock {
    Exclusive,
    Shared,
}

/// Locks a file unless another open file description has a lock that excludes this one; returns whether it did.
pub(super) fn lock(file: &File, lock: Lock) -> io::Result<bool> {
    use nix::fcntl::FlockArg::{LockExclusiveNonblock, LockSharedNonblock};
    let kind = match lock {
        Lock::Exclusive => LockExclusiveNonblock,
        Lock::Shared => LockSharedNonblock,
    };
    #[expect(
        deprecated,
        reason = "its replacement unlocks when it is dropped, also what was handed over"
    )]
    match nix::fcntl::flock(file.as_raw_fd(), kind) {
        Ok(()) => Ok(true),
        Err(Errno::EWOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file is still the one of that path.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The process that the file of a claim names.
pub(super) fn owner(file: &File) -> Option<i32> {
    let mut text = [0; 16];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}

pub(super) fn own_process() -> i32 {
    process::id().cast_signed()
}

const FILE_MODE: u32 = 0o600;
