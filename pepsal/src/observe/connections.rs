//! Connections that may be anybody's: a fixed number of places, and nobody is waited for.

use std::{fmt, io, path::PathBuf, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    task::{AbortHandle, JoinSet},
    time::sleep,
};
use tracing::debug;

use crate::observe::socket_file::SocketFile;

/// Where visitors come in.
pub enum Listener {
    /// At an address.
    Tcp(TcpListener),
    /// At a path.
    Unix(UnixListener, PathBuf),
}

/// A visitor's connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Listens at a path; the file is removed when the second value is dropped.
    ///
    /// # Errors
    /// Why it cannot.
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

/// Receives visitors for as long as it is polled, `places` of them at once. Where one more comes, who has been there
/// longest has to go: so those who only sit there keep nobody out.
pub async fn receive<F>(listener: Listener, places: usize, mut visit: impl FnMut(Box<dyn Stream>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut visits = JoinSet::new();
    let mut present: Vec<AbortHandle> = Vec::with_capacity(places);
    loop {
        match listener.accept().await {
            Ok(stream) => {
                while visits.try_join_next().is_some() {}
                present.retain(|visit| !visit.is_finished());
                if visits.len() >= places {
                    if let Some(oldest) = present.first() {
                        oldest.abort();
                    }
                    // Waits until its descriptor is closed: there are at most so many, and the new one's.
                    let _ = visits.join_next().await;
                }
                present.push(visits.spawn(visit(stream)));
            }
            Err(error) => {
                debug!(at = %listener, "cannot accept: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
