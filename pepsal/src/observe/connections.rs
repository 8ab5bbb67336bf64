//! Accepts untrusted connections, of which it keeps a fixed number, without waiting for any of them.

use std::{fmt, io, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::{AbortHandle, JoinSet},
    time::sleep,
};
use tracing::debug;

use crate::observe::socket_file::SocketFile;

pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Listens at a path; dropping the second value removes the file.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn at(path: PathBuf) -> anyhow::Result<(Self, SocketFile)> {
        let (listener, file) = SocketFile::bind(&path)?;
        Ok((Self::Unix(UnixListener::from_std(listener)?, path), file))
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener, _) => Box::new(listener.accept().await?.0),
        })
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(error) => write!(f, "{error}"),
            },
            Self::Unix(_, path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Accepts connections, at most `most` at once; never returns. One more connection closes the oldest, so
/// that idle connections cannot block others.
pub async fn receive<F>(listener: Listener, most: usize, mut serve: impl FnMut(Box<dyn Stream>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut serving = JoinSet::new();
    let mut present: Vec<AbortHandle> = Vec::with_capacity(most);
    loop {
        match listener.accept().await {
            Ok(stream) => {
                while serving.try_join_next().is_some() {}
                present.retain(|connection| !connection.is_finished());
                if serving.len() >= most {
                    if let Some(oldest) = present.first() {
                        oldest.abort();
                    }
                    // Its descriptor is closed then, so that the number of descriptors has a limit too.
                    let _ = serving.join_next().await;
                }
                present.push(serving.spawn(serve(stream)));
            }
            Err(error) => {
                debug!(at = %listener, "cannot accept: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
