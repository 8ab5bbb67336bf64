//! A leg's socket, registered with the runtime of its worker, with its cached readiness.

use std::{
    future::poll_fn,
    io,
    os::fd::{AsFd, BorrowedFd},
};

use futures_util::FutureExt;
use socket2::Socket;
use tokio::io::{
    Interest, Ready,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

/// A connection, connected or connecting.
#[derive(Debug)]
pub struct Connection(AsyncFd<Socket>);

/// A readiness guard for reads.
pub(crate) struct Readable<'a>(AsyncFdReadyGuard<'a, Socket>);

impl Connection {
    /// Registers a non-blocking socket with the current runtime.
    ///
    /// # Errors
    /// When the registration with epoll fails.
    pub fn register(socket: Socket) -> io::Result<Self> {
        // tokio's own streams do not report urgent data.
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: a socket owns its descriptor, and nothing replaces it.
        Ok(Self(unsafe {
            AsyncFd::register_with_interest(socket, interest)
        }?))
    }

    pub(crate) fn socket(&self) -> &Socket {
        self.0.get_ref()
    }

    /// Waits until the socket is readable, or at the end of the stream.
    ///
    /// # Errors
    /// When the runtime has been shut down.
    pub(crate) async fn readable(&self) -> io::Result<Readable<'_>> {
        // Uses the registration's waker slot for one reader, which takes no memory in the flow's task.
        poll_fn(|context| self.0.poll_read_ready(context))
            .await
            .map(Readable)
    }

    /// Waits until the socket is writable.
    ///
    /// # Errors
    /// When the runtime has been shut down.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| self.0.poll_write_ready(context))
            .await
            .map(drop)
    }

    /// Reads, unless the socket is known to be empty.
    ///
    /// # Errors
    /// Errors of `read`; `WouldBlock` clears the readiness.
    pub(crate) fn try_read<T>(&self, mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        self.0.try_io(Interest::READABLE, |socket| read(socket.as_fd()))
    }

    /// Writes, unless the socket is known to be full.
    ///
    /// # Errors
    /// Errors of `write`; `WouldBlock` clears the readiness.
    pub(crate) fn try_write<T>(
        &self,
        mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        self.0.try_io(Interest::WRITABLE, |socket| write(socket.as_fd()))
    }

    /// Waits for an error of the connection, and returns it. The kernel reports it once.
    ///
    /// Not an `async fn`, which would be three times as large: every open flow has two of these futures.
    pub(crate) fn broken(&self) -> impl Future<Output = io::Error> {
        self.0.ready(Interest::ERROR).map(|ready| match ready {
            Ok(_) => match self.socket().take_error() {
                Ok(Some(error)) | Err(error) => error,
                Ok(None) => io::ErrorKind::ConnectionReset.into(),
            },
            Err(error) => error,
        })
    }

    /// Returns whether the last readiness event had an error.
    pub(crate) fn has_error(&self) -> bool {
        self.known(Interest::ERROR).is_error()
    }

    /// Returns whether an urgent byte (RFC 9293, 3.8.5) has been received.
    pub(crate) fn has_been_urgent(&self) -> bool {
        self.known(Interest::PRIORITY).is_priority()
    }

    fn known(&self, interest: Interest) -> Ready {
        let ready = self.0.ready(interest).now_or_never();
        ready
            .and_then(Result::ok)
            .map_or(Ready::EMPTY, |known| known.ready())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Readable<'_> {
    /// Returns whether the end of the stream was received at the readiness event.
    pub(crate) fn is_all(&self) -> bool {
        self.0.ready().is_read_closed()
    }

    /// Clears the readiness: the next guard waits for an event after this one.
    pub(crate) fn taken(mut self) {
        self.0.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{Shutdown, TcpListener, TcpStream},
        os::fd::AsRawFd,
        time::Duration,
    };

    use nix::sys::socket::{MsgFlags, recv, send};
    use socket2::SockRef;
    use tokio::task::yield_now;

    use super::*;

    fn connection() -> (TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = Socket::from(listener.accept().unwrap().0);
        socket.set_nonblocking(true).unwrap();
        socket.set_out_of_band_inline(true).unwrap();
        (peer, Connection::register(socket).unwrap())
    }

    fn receive(stream: &Connection) -> usize {
        recv(stream.as_fd().as_raw_fd(), &mut [0; 9], MsgFlags::MSG_DONTWAIT).unwrap()
    }

    #[tokio::test]
    async fn what_came_after_the_look_is_news() {
        let (mut peer, stream) = connection();
        peer.write_all(b"ab").unwrap();
        let look = stream.readable().await.unwrap();
        assert!(!look.is_all());
        assert_eq!(receive(&stream), 2);
        look.taken();
        peer.write_all(b"c").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let look = stream.readable().await.unwrap();
        assert_eq!(receive(&stream), 1);
        // On a busy machine the end of the stream may be a separate event.
        look.taken();
        while !stream.readable().await.unwrap().is_all() {
            yield_now().await;
        }
        assert!(!stream.has_error() && !stream.has_been_urgent());
    }

    #[tokio::test]
    async fn urgent_bytes_and_errors_are_known_of() {
        let (peer, stream) = connection();
        send(peer.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
        let _ = stream.readable().await.unwrap();
        assert!(stream.has_been_urgent() && !stream.has_error());
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        assert_eq!(stream.broken().await.kind(), io::ErrorKind::ConnectionReset);
        assert!(stream.has_error());
    }
}
