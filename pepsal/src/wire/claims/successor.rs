//! The instance that takes over from this one: its request, and the hand-over of the claims.

use std::{
    fs,
    io::{self, IoSlice},
    os::fd::{AsRawFd, RawFd},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result};
use futures_util::{StreamExt, stream::FuturesUnordered};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, recv, sendmsg},
    unistd::geteuid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::wire::claims::{
    claim::Claims,
    directory::Directory,
    lock::own_process,
    protocol::{DESCRIPTORS_MAX, PATIENCE, RELEASED, TAKE_OVER},
};

/// The socket by which the next instance requests a takeover. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Requests {
    listener: UnixListener,
    path: PathBuf,
}

impl Requests {
    /// Listens, and removes the sockets of processes that are gone.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(directory: &Directory) -> Result<Self> {
        directory.remove_stale_sockets();
        let path = directory.socket_path(own_process());
        let shown = path.display();
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {shown}"))?;
        Ok(Self { listener, path })
    }

    /// Resolves when another instance that may do so requests a takeover.
    pub async fn next(&self) -> Successor {
        let mut asking = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if asking.len() < ASKING_MAX => match accepted {
                    Ok((stream, _)) => asking.push(admit(stream)),
                    Err(error) => {
                        debug!("cannot accept a request for a takeover: {error}");
                        sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(admitted) = asking.next() => if let Some(successor) = admitted {
                    return successor;
                },
            }
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads a request, of root or the daemon's own user.
async fn admit(mut stream: UnixStream) -> Option<Successor> {
    let uid = stream.peer_cred().ok()?.uid();
    let is_allowed = uid == 0 || uid == geteuid().as_raw();
    let mut said = [0; TAKE_OVER.len()];
    let read = timeout(PATIENCE, stream.read_exact(&mut said));
    let is_request = is_allowed && matches!(read.await, Ok(Ok(_))) && said == TAKE_OVER;
    (is_request && still_waits(&stream)).then_some(Successor(stream))
}

/// Whether the other end is open: an instance that was kept waiting for too long has ended.
fn still_waits(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}

/// The instance that has requested the claims of this one.
#[derive(Debug)]
pub struct Successor(UnixStream);

impl Successor {
    /// Returns the process of the successor; none when the kernel cannot name it, as from another PID namespace.
    pub fn process(&self) -> Option<i32> {
        self.0.peer_cred().ok()?.pid()
    }

    /// Passes the locked descriptors to the successor. Without a successor the claims end.
    pub async fn hand_over(mut self, claims: Claims) {
        match timeout(PATIENCE, self.send(&claims)).await {
            Ok(Ok(())) => claims.forget(),
            Ok(Err(error)) => warn!("the successor does not take the claims: {error}"),
            Err(_) => warn!("the successor does not take the claims within {PATIENCE:?}"),
        }
    }

    async fn send(&mut self, claims: &Claims) -> io::Result<()> {
        self.0.write_all(RELEASED).await?;
        for part in claims.0.chunks(DESCRIPTORS_MAX) {
            let names: String = part
                .iter()
                .map(|claim| format!("{}\n", claim.interface))
                .collect();
            let descriptors: Vec<RawFd> = part.iter().map(|claim| claim.file.as_raw_fd()).collect();
            let send = || {
                let rights = [ControlMessage::ScmRights(&descriptors)];
                let data = [IoSlice::new(names.as_bytes())];
                Ok(sendmsg::<()>(
                    self.0.as_raw_fd(),
                    &data,
                    &rights,
                    MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                    None,
                )?)
            };
            let sent = self.0.async_io(Interest::WRITABLE, send).await?;
            self.0.write_all(&names.as_bytes()[sent..]).await?;
        }
        self.0.shutdown().await
    }
}

/// Connections that may be about to request a takeover at once; more wait until these are over, [`PATIENCE`] at most.
pub(super) const ASKING_MAX: usize = 16;
