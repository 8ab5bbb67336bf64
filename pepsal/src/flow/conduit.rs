//! The buffer between two sockets: a pipe for splice(2), or a byte buffer for small messages and for the case
//! without a free pipe. Both come from a pool that limits their number.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    libc,
    sys::socket::{MsgFlags, recv, send},
    unistd::{SysconfVar, pipe2, sysconf},
};

use crate::tcp::options;

/// Maximum bytes in a pipe: the size from which one flow over veth is as fast as plain forwarding.
const PIPE_BYTES: usize = 256 << 10;

/// Minimum slots of a pipe, the kernel's `PIPE_DEF_BUFFERS`. A slot takes one fragment of a packet, of any
/// size.
const PIPE_SLOTS: usize = 16;

/// Returns the size for F_SETPIPE_SZ, in bytes; the kernel makes one slot for each page. With pages of up to
/// 64 KiB it is within fs.pipe-max-size, 1 MiB by default.
fn pipe_size(page_bytes: usize) -> usize {
    PIPE_BYTES.max(PIPE_SLOTS * page_bytes)
}

/// Returns the size of a page, in bytes.
fn page_bytes() -> usize {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|bytes| bytes.try_into().ok()).unwrap_or(4096)
}

/// Size of a buffer, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// Bytes below which data are a message, which is copied.
pub(crate) const MESSAGE_BYTES: usize = 16 << 10;

/// `MSG_MORE` of send(2), which nix does not define.
const MSG_MORE: MsgFlags = MsgFlags::from_bits_retain(libc::MSG_MORE);

/// Maximum number of idle pipes, and of idle buffers, in the pool.
const KEPT: usize = 64;

/// The pool of conduits.
#[derive(Debug)]
pub struct ConduitPool {
    idle: Mutex<Vec<Pipe>>,
    idle_buffers: Mutex<Vec<Box<[u8]>>>,
    pipes: AtomicUsize,
    most_pipes: usize,
    /// In bytes.
    pipe_size: usize,
}

impl ConduitPool {
    /// Creates a pool of at most `most_pipes` pipes; further conduits are buffers.
    pub fn new(most_pipes: usize) -> Self {
        Self {
            idle: Mutex::default(),
            idle_buffers: Mutex::default(),
            pipes: AtomicUsize::new(0),
            most_pipes,
            pipe_size: pipe_size(page_bytes()),
        }
    }

    /// Returns an empty conduit, with a pipe if one is free.
    pub(crate) fn take(&self) -> Conduit<'_> {
        match lock(&self.idle).pop().or_else(|| self.new_pipe()) {
            Some(pipe) => self.lend(Way::Pipe(pipe)),
            None => self.take_buffer(),
        }
    }

    /// Returns an empty conduit with a buffer, for a message.
    pub(crate) fn take_buffer(&self) -> Conduit<'_> {
        let bytes = lock(&self.idle_buffers).pop();
        let bytes = bytes.unwrap_or_else(|| vec![0; BUFFER_BYTES].into());
        self.lend(Way::Buffer { bytes, start: 0 })
    }

    fn lend(&self, way: Way) -> Conduit<'_> {
        Conduit {
            pool: self,
            way: Some(way),
            held: 0,
        }
    }

    fn new_pipe(&self) -> Option<Pipe> {
        if self.pipes.fetch_add(1, Ordering::Relaxed) < self.most_pipes
            && let Ok(pipe) = Pipe::new(self.pipe_size)
        {
            return Some(pipe);
        }
        self.pipes.fetch_sub(1, Ordering::Relaxed);
        None
    }

    fn give_back(&self, pipe: Pipe) {
        if !keep(&self.idle, pipe) {
            self.pipes.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(idle: &Mutex<T>) -> MutexGuard<'_, T> {
    idle.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns whether the pool keeps the value; else it is dropped.
fn keep<T>(idle: &Mutex<Vec<T>>, returned: T) -> bool {
    let mut idle = lock(idle);
    let keeps = idle.len() < KEPT;
    if keeps {
        idle.push(returned);
    }
    keeps
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Maximum fill level in bytes: with large pages the pipe has room for more than [`PIPE_BYTES`].
    capacity: usize,
}

impl Pipe {
    fn new(size: usize) -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Fails above the user's quota of pipe pages (pipe-user-pages-soft); the pipe then has its default
        // size.
        let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(size as i32))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        Ok(Self {
            read,
            write,
            capacity: capacity.try_into().unwrap_or(4096).min(PIPE_BYTES),
        })
    }
}

#[derive(Debug)]
enum Way {
    Pipe(Pipe),
    Buffer { bytes: Box<[u8]>, start: usize },
}

/// A pipe or buffer, with the bytes in it.
#[derive(Debug)]
pub(crate) struct Conduit<'a> {
    pool: &'a ConduitPool,
    /// Present until the conduit is dropped.
    way: Option<Way>,
    held: usize,
}

impl Conduit<'_> {
    /// Returns the bytes in the conduit.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Reads from the socket as much as fits an empty conduit. Returns the number of bytes; 0 is the end of
    /// the stream.
    ///
    /// Stops before an urgent byte (RFC 9293, 3.8.5). Directly before one, it returns `WouldBlock` or 0.
    ///
    /// # Errors
    /// `WouldBlock` when the socket has no data; the conduit is empty, so the pipe is not the cause.
    pub(crate) fn fill(&mut self, from: BorrowedFd<'_>) -> io::Result<usize> {
        debug_assert_eq!(self.held, 0, "a full pipe and an empty socket look alike");
        let bytes = match &mut self.way {
            Some(Way::Pipe(pipe)) => move_bytes(from, pipe.write.as_fd(), pipe.capacity)?,
            Some(Way::Buffer { bytes, start }) => {
                *start = 0;
                // splice(2) behaves in the same way.
                if options::is_at_mark(from)? {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                recv(from.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT)?
            }
            None => 0,
        };
        self.held = bytes;
        Ok(bytes)
    }

    /// Reads up to [`MESSAGE_BYTES`] from the socket into a buffer. Fewer bytes mean that the socket is
    /// empty; 0 is the end of the stream.
    ///
    /// Only for streams without urgent data: an urgent byte would become an ordinary one.
    ///
    /// # Errors
    /// `WouldBlock` when the socket has no data.
    pub(crate) fn fill_with_message(&mut self, from: BorrowedFd<'_>) -> io::Result<usize> {
        let Some(Way::Buffer { bytes, start }) = &mut self.way else {
            return self.fill(from);
        };
        *start = 0;
        self.held = recv(
            from.as_raw_fd(),
            &mut bytes[..MESSAGE_BYTES],
            MsgFlags::MSG_DONTWAIT,
        )?;
        Ok(self.held)
    }

    /// Writes to the socket as much as it accepts. The end of `last` bytes may wait for the FIN.
    ///
    /// # Errors
    /// `WouldBlock` when the socket's buffer is full.
    pub(crate) fn drain(&mut self, to: BorrowedFd<'_>, last: bool) -> io::Result<usize> {
        let bytes = match &mut self.way {
            Some(Way::Pipe(pipe)) => move_bytes(pipe.read.as_fd(), to, self.held)?,
            Some(Way::Buffer { bytes, start }) => {
                let mut flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                flags.set(MSG_MORE, last);
                let sent = send(to.as_raw_fd(), &bytes[*start..*start + self.held], flags)?;
                *start += sent;
                sent
            }
            None => 0,
        };
        self.held -= bytes;
        Ok(bytes)
    }
}

impl Drop for Conduit<'_> {
    fn drop(&mut self) {
        match self.way.take() {
            Some(Way::Pipe(pipe)) if self.held == 0 => self.pool.give_back(pipe),
            // Remaining bytes belong to a closed flow.
            Some(Way::Pipe(pipe)) => {
                drop(pipe);
                self.pool.pipes.fetch_sub(1, Ordering::Relaxed);
            }
            Some(Way::Buffer { bytes, .. }) => {
                keep(&self.pool.idle_buffers, bytes);
            }
            None => {}
        }
    }
}

/// Without `SPLICE_F_MORE`, which would delay the last bytes of a transfer.
fn move_bytes(from: BorrowedFd<'_>, to: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    loop {
        match splice(from, None, to, None, most, flags) {
            // splice(2) checks for signals even when it does not wait; an interruption is no end of the flow.
            Err(Errno::EINTR) => {}
            moved => return Ok(moved?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{Shutdown, TcpListener, TcpStream},
        os::unix::thread::JoinHandleExt,
        thread,
    };

    use nix::sys::{
        pthread::pthread_kill,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    };

    use super::*;

    extern "C" fn ignore(_: nix::libc::c_int) {}

    #[test]
    fn signals_do_not_break_what_is_on_its_way() {
        // Without SA_RESTART.
        let handler = SigAction::new(SigHandler::Handler(ignore), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGUSR1, &handler) }.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (to, _) = listener.accept().unwrap();
        let moving = thread::spawn(move || {
            let pool = ConduitPool::new(1);
            for _ in 0..20_000 {
                from.write_all(b"byte").unwrap();
                let mut conduit = pool.take();
                while !matches!(conduit.fill(to.as_fd()), Ok(4)) {}
                conduit.drain(to.as_fd(), false).unwrap();
                // A returned pipe makes room for the next.
                from.read_exact(&mut [0; 4]).unwrap();
            }
        });
        while !moving.is_finished() {
            pthread_kill(moving.as_pthread_t(), Signal::SIGUSR1).unwrap();
        }
        moving.join().unwrap();
    }

    #[test]
    fn neither_way_crosses_an_urgent_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for most_pipes in [1, 0] {
            let mut from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut to, _) = listener.accept().unwrap();
            socket2::SockRef::from(&to).set_out_of_band_inline(true).unwrap();
            to.set_nonblocking(true).unwrap();
            from.write_all(b"ab").unwrap();
            send(from.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
            from.write_all(b"cde").unwrap();
            while !matches!(to.peek(&mut [0; 9]), Ok(2..)) {}
            let pool = ConduitPool::new(most_pipes);
            assert_eq!(pool.take().fill(to.as_fd()).unwrap(), 2, "{most_pipes} pipes");
            let refused = pool.take().fill(to.as_fd()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::WouldBlock, "{most_pipes} pipes");
            assert!(options::is_at_mark(&to).unwrap());
            let mut urgent = [0];
            to.read_exact(&mut urgent).unwrap();
            assert_eq!(&urgent, b"!");
            assert_eq!(pool.take().fill(to.as_fd()).unwrap(), 3, "{most_pipes} pipes");
        }
    }

    #[test]
    fn last_bytes_wait_for_the_end_of_the_stream() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            near.set_nodelay(true).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let pool = ConduitPool::new(0);
        let waited = || {
            let ((mut from, leg), (to, mut receiver)) = (pair(), pair());
            from.write_all(b"bytes").unwrap();
            leg.peek(&mut [0]).unwrap();
            let mut conduit = pool.take_buffer();
            assert_eq!(conduit.fill_with_message(leg.as_fd()).unwrap(), 5);
            assert_eq!(conduit.drain(to.as_fd(), true).unwrap(), 5);
            let segments = options::tcp_info(&to).unwrap().tcpi_data_segs_out;
            to.shutdown(Shutdown::Write).unwrap();
            let mut received = Vec::new();
            receiver.read_to_end(&mut received).unwrap();
            assert_eq!(received, b"bytes");
            segments == 0
        };
        // On a busy machine the kernel's timer expires first, after 200 ms.
        assert!((0..10).any(|_| waited()));
    }

    #[test]
    fn pipes_have_enough_slots_whatever_the_size_of_a_page() {
        for (page, slots) in [(4 << 10, 64), (16 << 10, 16), (64 << 10, 16)] {
            let size = pipe_size(page);
            assert_eq!(size / page, slots, "pages of {page} bytes");
            // The kernel rounds up to a power of two.
            assert!(size.is_power_of_two() && size <= 1 << 20, "{size}");
        }
    }

    #[test]
    fn pipe_is_as_large_as_asked_for_and_filled_with_no_more_than_the_bound() {
        let pages = page_bytes();
        for size in [PIPE_BYTES, 4 * PIPE_BYTES] {
            let pipe = Pipe::new(size.max(pipe_size(pages))).unwrap();
            let made = fcntl(&pipe.write, FcntlArg::F_GETPIPE_SZ).unwrap();
            assert!(usize::try_from(made).unwrap() >= size, "{made}");
            assert_eq!(pipe.capacity, PIPE_BYTES);
        }
    }

    #[test]
    fn past_the_most_pipes_there_are_buffers() {
        let pool = ConduitPool::new(2);
        let is_pipe = |conduit: &Conduit<'_>| matches!(conduit.way, Some(Way::Pipe(_)));
        let mut taken: Vec<_> = (0..4).map(|_| pool.take()).collect();
        let pipes: Vec<bool> = taken.iter().map(is_pipe).collect();
        assert_eq!(pipes, [true, true, false, false]);
        // A returned pipe is used again.
        drop(taken.remove(0));
        assert!(is_pipe(&pool.take()));
    }
}
