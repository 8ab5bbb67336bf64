//! A leg's connection as its worker's runtime watches it: what it is ready for, and what is known of it without asking
//! the kernel.

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

/// A connection, or one that is being made.
#[derive(Debug)]
pub struct Connection(AsyncFd<Socket>);

/// A look at what there is to be read.
pub struct Readable<'a>(AsyncFdReadyGuard<'a, Socket>);

impl Connection {
    /// Registers a socket that does not block with the runtime that this is called in.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub fn register(socket: Socket) -> io::Result<Self> {
        // tokio's own streams do not tell what is urgent.
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: a socket owns its descriptor, and nothing replaces it.
        Ok(Self(unsafe {
            AsyncFd::register_with_interest(socket, interest)
        }?))
    }

    /// The socket.
    pub fn socket(&self) -> &Socket {
        self.0.get_ref()
    }

    /// Waits until there is something to read, or the end of it.
    ///
    /// # Errors
    /// When the runtime is gone.
    pub async fn readable(&self) -> io::Result<Readable<'_>> {
        // By the place that the stream has for the waker of one reader: it takes no room in the flow's task.
        poll_fn(|context| self.0.poll_read_ready(context))
            .await
            .map(Readable)
    }

    /// Waits until there is room for more to write.
    ///
    /// # Errors
    /// When the runtime is gone.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| self.0.poll_write_ready(context))
            .await
            .map(drop)
    }

    /// Reads, unless it is known that there is nothing.
    ///
    /// # Errors
    /// What `read` says; `WouldBlock` is remembered.
    pub fn try_read<T>(&self, mut read: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        self.0.try_io(Interest::READABLE, |socket| read(socket.as_fd()))
    }

    /// Writes, unless it is known that there is no room.
    ///
    /// # Errors
    /// What `write` says; `WouldBlock` is remembered.
    pub fn try_write<T>(&self, mut write: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        self.0.try_io(Interest::WRITABLE, |socket| write(socket.as_fd()))
    }

    /// Waits until the connection is broken, whatever else happens on it, and tells how. The kernel tells it once.
    ///
    /// Every open flow has two of these: an `async fn` would be three times as large.
    pub fn broken(&self) -> impl Future<Output = io::Error> {
        self.0.ready(Interest::ERROR).map(|ready| match ready {
            Ok(_) => match self.socket().take_error() {
                Ok(Some(error)) | Err(error) => error,
                Ok(None) => io::ErrorKind::ConnectionReset.into(),
            },
            Err(error) => error,
        })
    }

    /// Whether an error had come when the kernel was last asked for news.
    pub fn has_error(&self) -> bool {
        self.known(Interest::ERROR).is_error()
    }

    /// Whether an urgent byte (RFC 9293, 3.8.5) had come by then, or before.
    pub fn has_been_urgent(&self) -> bool {
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
    /// Whether all that will ever come had come.
    pub fn is_all(&self) -> bool {
        self.0.ready().is_read_closed()
    }

    /// What there was has been taken: the next look waits for news that came after this one.
    pub fn taken(mut self) {
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
        // The end may be news of its own, on a busy machine.
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
