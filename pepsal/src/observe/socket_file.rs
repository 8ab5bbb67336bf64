//! Unix sockets with a file, which the kernel does not remove at the end of the process.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use tracing::{debug, info};

/// Access for the daemon's user and group.
const MODE: u32 = 0o660;

/// The file of a listening socket. Dropping it removes the file, unless another process has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, and replaces a stale socket file.
    ///
    /// # Errors
    /// When another process listens there, when the file is not a socket, or when it cannot be created.
    pub fn bind(path: &Path) -> Result<(UnixListener, Self)> {
        let shown = path.display();
        remove_stale(path)?;
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {shown}"))?;
        let made = || {
            fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
            listener.set_nonblocking(true)?;
            identity(path)
        };
        let identity = made().with_context(|| format!("cannot listen at {shown}"))?;
        let path = path.to_owned();
        Ok((listener, Self { path, identity }))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|there| there == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn remove_stale(path: &Path) -> Result<()> {
    let shown = path.display();
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot stat {shown}")),
        Ok(there) if !there.file_type().is_socket() => {
            bail!("{shown} exists and is not a socket: remove it, or choose another path")
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            info!("replacing the stale socket {shown}");
            fs::remove_file(path).with_context(|| format!("cannot replace {shown}"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => bail!("{shown} is in use by another process: stop that, or choose another path"),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let there = fs::symlink_metadata(path)?;
    Ok((there.dev(), there.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("pepsal-{}-{name}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn a_stale_socket_is_replaced_and_an_occupied_one_is_not() {
        let path = scratch("stale");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, file) = SocketFile::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, MODE);
        let error = SocketFile::bind(&path).unwrap_err().to_string();
        assert!(error.contains("in use by another process"), "{error}");
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_successors_socket_is_left_alone() {
        let path = scratch("successor");
        let (_listener, file) = SocketFile::bind(&path).unwrap();
        fs::rename(&path, scratch("moved")).unwrap();
        let (_successor, successors) = SocketFile::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
        drop(successors);
        fs::remove_file(std::env::temp_dir().join(format!("pepsal-{}-moved", std::process::id()))).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_not_removed() {
        let path = scratch("file");
        fs::write(&path, "precious").unwrap();
        let error = SocketFile::bind(&path).unwrap_err().to_string();
        assert!(error.contains("is not a socket"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        fs::remove_file(&path).unwrap();
    }
}
