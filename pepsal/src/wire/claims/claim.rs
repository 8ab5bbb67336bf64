//! The claims of this instance, each a file that it has locked.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    thread,
    time::Duration,
};

use anyhow::Result;
use tracing::debug;

use crate::wire::claims::{
    directory::Directory,
    lock::{Lock, is_at, lock, open_claim, own_process, owner},
};

/// The claims of an instance. Dropping it releases them.
#[derive(Debug)]
pub struct Claims(pub(super) Vec<Claim>);

impl Claims {
    /// Claims the interfaces.
    ///
    /// # Errors
    /// When another instance has one of the interfaces: the error names the interface and the instance's process.
    pub fn acquire(directory: &Directory, interfaces: &[String]) -> Result<Self> {
        let mut claims = Self(Vec::new());
        for interface in interfaces {
            claims.add(directory, interface)?;
        }
        Ok(claims)
    }

    pub(super) fn add(&mut self, directory: &Directory, interface: &str) -> Result<(), Refusal> {
        // It may be named twice.
        if !self.has(interface) {
            self.0.push(Claim::acquire(directory, interface)?);
        }
        Ok(())
    }

    pub(super) fn has(&self, interface: &str) -> bool {
        self.0.iter().any(|claim| claim.interface == interface)
    }

    /// Leaves the files, which are another instance's.
    pub(super) fn forget(mut self) {
        self.0.clear();
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Claim::release);
    }
}

/// The claim of an interface.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) interface: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
}

impl Claim {
    /// Claims an interface for this process.
    fn acquire(directory: &Directory, interface: &str) -> Result<Self, Refusal> {
        let failed = |error| Refusal::Failed {
            interface: interface.to_owned(),
            error,
        };
        let path = directory.claim_path(interface);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let file = open_claim(&path).map_err(failed)?;
            let is_locked = lock(&file, Lock::Exclusive).map_err(failed)?;
            // Its owner may have removed it since it was opened.
            if is_locked && is_at(&file, &path).map_err(failed)? {
                let claim = Self {
                    interface: interface.to_owned(),
                    path,
                    file,
                };
                claim.sign().map_err(failed)?;
                return Ok(claim);
            }
            if attempt == ATTEMPTS {
                return Err(Refusal::Owned {
                    interface: interface.to_owned(),
                    owner: Owner(owner(&file)),
                });
            }
            thread::sleep(PAUSE);
        }
    }

    /// Names this process as the owner.
    pub(super) fn sign(&self) -> io::Result<()> {
        let text = format!("{}\n", own_process());
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// Removes the file; the lock ends with the last of its descriptors.
    pub(super) fn release(self) {
        // While it is locked no other instance takes it for its own.
        if is_at(&self.file, &self.path).unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Why an interface cannot be claimed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(
        "interface {interface}: another pepsal ({owner}) intercepts it already: stop that one first, or take over from \
         it with --takeover"
    )]
    Owned { interface: String, owner: Owner },
    #[error("interface {interface}: cannot lock its file: {error}")]
    Failed { interface: String, error: io::Error },
}

/// The process that has a claim, when its file names it.
#[derive(Debug)]
pub(super) struct Owner(pub(super) Option<i32>);

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(process) => write!(f, "process {process}"),
            None => f.write_str("of unknown process"),
        }
    }
}

/// How often a lock is tried for, and the pause in between: [`Directory::is_alone`] of another instance holds it for a
/// moment, and an instance that stops is about to release it.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);
