//! Moves bytes between the two legs of a flow, both ways, until both are done.
//!
//! Bytes go through a pipe that the kernel fills from one socket and empties into the other (splice); a message of a few
//! kB is copied, which costs less. Pipe and buffer are held only while bytes are in them: an idle flow has its two sockets
//! and nothing else. Nothing more is taken from a leg before the other has taken what there is, so a leg that does not read
//! stops the other by its own receive window.
//!
//! How a leg ends is passed on. A half-close becomes a half-close. A leg that breaks becomes a reset of the other, after
//! what the broken one had sent has been delivered. Until a direction has ended cleanly, closing its receiver resets it,
//! so that even a killed process never makes a truncated transfer look complete.

use std::{
    future::{Future, pending},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    pin::{Pin, pin},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use nix::sys::socket::{MsgFlags, recv, send};
use tokio::{
    task::yield_now,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    flow::{
        close_reason::CloseReason,
        conduit::{Conduit, ConduitPool, MESSAGE_BYTES},
        leg::{Broken, Leg},
        progress::Progress,
        side::Side,
    },
    tcp::{connection::Readable, options},
};

/// What bounds a relay.
pub struct Limits<'a> {
    /// How long nothing may move, in either direction.
    pub idle: Option<Duration>,
    /// Cancelled when open flows have to end.
    pub stop: &'a CancellationToken,
    /// Where pipes come from.
    pub conduits: &'a ConduitPool,
}

/// Relays until both directions are done or the flow has to end, and leaves the legs so that dropping them does the
/// right thing.
///
/// What only its end takes is on the heap, so that an open flow does not keep room for it.
#[expect(clippy::manual_async_fn, reason = "an async fn has its arguments twice")]
pub fn relay(
    client: &Leg,
    server: &Leg,
    progress: &Progress,
    limits: &Limits<'_>,
) -> impl Future<Output = CloseReason> {
    async move {
        let direction = |from, to| Direction {
            from,
            to,
            progress,
            pool: limits.conduits,
        };
        let (up, down) = (direction(client, server), direction(server, client));
        let (mut up, mut down) = (pin!(up.pump()), pin!(down.pump()));
        let (mut up_done, mut down_done) = (false, false);
        let broken = loop {
            let ended = tokio::select! {
                biased;
                () = limits.stop.cancelled() => return CloseReason::Shutdown,
                ended = &mut up, if !up_done => { up_done = true; ended }
                ended = &mut down, if !down_done => { down_done = true; ended }
                // A leg that is not read at present, because it has sent its end of stream or because the other leg takes
                // no more, would break unnoticed.
                broken = client.error() => Err(broken),
                broken = server.error() => Err(broken),
                () = idle(progress, limits.idle) => return CloseReason::IdleTimeout,
            };
            match ended {
                Ok(()) if up_done && down_done => {
                    // The flow holds its place until the data has arrived; the FIN itself the kernel sees to.
                    let both = Box::pin(async { tokio::join!(delivered(client, 1), delivered(server, 1)) });
                    tokio::select! {
                        _ = both => {}
                        () = limits.stop.cancelled() => {}
                    }
                    return CloseReason::Finished;
                }
                Ok(()) => {}
                Err(broken) => break broken,
            }
        };
        let reason = broken.reason();
        match broken.side {
            Side::Client => Box::pin(settle(server, (!up_done).then_some(up), progress, limits)).await,
            Side::Server => Box::pin(settle(client, (!down_done).then_some(down), progress, limits)).await,
        }
        reason
    }
}

/// How many conduits' worth a flow may move before the others on its worker have their turn.
const TURN: u32 = 4;

/// What there was to be had of a leg.
enum Read {
    /// Some bytes are in the conduit.
    Bytes(usize),
    /// A byte that is urgent (RFC 9293, 3.8.5).
    Urgent(u8),
    /// There will be no more.
    End,
}

/// One way through a flow.
struct Direction<'a> {
    from: &'a Leg,
    to: &'a Leg,
    progress: &'a Progress,
    pool: &'a ConduitPool,
}

/// What came of one look at a leg: how many bytes were moved, or nothing after the last.
type Passed = Result<Option<usize>, Broken>;

/// The same where it may have to wait. It is on the heap, so that an idle flow does not keep room for it.
enum Passing<'a> {
    Done(Passed),
    Waiting(BoxFuture<'a, Passed>),
}

impl Direction<'_> {
    /// Moves what `from` sends to `to`, and its end of stream.
    async fn pump(&self) -> Result<(), Broken> {
        let from = self.from;
        let mut is_bulk = false;
        loop {
            let readable = from
                .stream()
                .readable()
                .await
                .map_err(|error| from.broke(error))?;
            let passing = if is_bulk || from.stream().has_error() || from.stream().has_been_urgent() {
                Passing::Waiting(self.pass_stream().boxed())
            } else {
                self.pass_message(readable)
            };
            let passed = match passing {
                Passing::Done(passed) => passed,
                Passing::Waiting(passing) => passing.await,
            };
            match passed? {
                Some(bytes) => is_bulk = bytes >= MESSAGE_BYTES,
                None => return self.to.finish(),
            }
        }
    }

    /// Moves what there is if it is little, and begins with it if it is much.
    fn pass_message(&self, readable: Readable<'_>) -> Passing<'_> {
        let from = self.from;
        let mut conduit = self.pool.take_buffer();
        let bytes = match conduit.fill_with_message(from.stream().as_fd()) {
            Ok(0) => return Passing::Done(self.ended()),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                readable.taken();
                return Passing::Done(Ok(Some(0)));
            }
            Err(error) => return Passing::Done(Err(from.broke(error))),
        };
        let was_last = bytes < MESSAGE_BYTES && readable.is_all() && !from.is_broken();
        if bytes < MESSAGE_BYTES {
            readable.taken();
        }
        let passed = (!was_last).then_some(bytes);
        match self.write(|to| conduit.drain(to, was_last)) {
            Ok(_) if conduit.held() == 0 => Passing::Done(Ok(passed)),
            Err(broken) => Passing::Done(Err(broken)),
            Ok(_) => {
                let rest = async move { self.deliver(&mut conduit, was_last).await.map(|()| passed) };
                Passing::Waiting(rest.boxed())
            }
        }
    }

    /// Moves all there is.
    async fn pass_stream(&self) -> Passed {
        let mut conduit = self.pool.take();
        let (mut turn, mut passed) = (0, 0);
        loop {
            match self.read(&mut conduit) {
                Ok(Read::End) => return self.ended(),
                Ok(Read::Urgent(byte)) => self.pass_urgent(byte).await?,
                Ok(Read::Bytes(bytes)) => passed += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Some(passed)),
                Err(error) => return Err(self.from.broke(error)),
            }
            self.deliver(&mut conduit, false).await?;
            turn += 1;
            if turn == TURN {
                turn = 0;
                yield_now().await;
            }
        }
    }

    /// After an error that the other direction took, the kernel says end of stream too.
    fn ended(&self) -> Passed {
        match self.from.is_broken() {
            true => Err(self.from.broke(io::ErrorKind::ConnectionReset.into())),
            false => Ok(None),
        }
    }

    /// Takes what `from` has.
    ///
    /// # Errors
    /// `WouldBlock` when it has nothing.
    fn read(&self, conduit: &mut Conduit<'_>) -> io::Result<Read> {
        self.from.stream().try_read(|from| match conduit.fill(from) {
            Ok(bytes @ 1..) => Ok(Read::Bytes(bytes)),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            nothing if !options::is_at_mark(from)? => nothing.map(|_| Read::End),
            _ => {
                let mut byte = [0];
                Ok(match recv(from.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT)? {
                    0 => Read::End,
                    _ => Read::Urgent(byte[0]),
                })
            }
        })
    }

    /// Passes an urgent byte on as what it is.
    async fn pass_urgent(&self, byte: u8) -> Result<(), Broken> {
        let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !self.write(|to| Ok(send(to.as_raw_fd(), &[byte], flags)?))? {
            self.writable().await?;
        }
        Ok(())
    }

    /// Gives `to` what is in the conduit.
    async fn deliver(&self, conduit: &mut Conduit<'_>, last: bool) -> Result<(), Broken> {
        while conduit.held() > 0 {
            if !self.write(|to| conduit.drain(to, last))? {
                self.writable().await?;
            }
        }
        Ok(())
    }

    async fn writable(&self) -> Result<(), Broken> {
        let writable = self.to.stream().writable().await;
        writable.map_err(|error| self.to.broke(error))
    }

    /// Whether there was room.
    fn write(&self, write: impl FnMut(BorrowedFd<'_>) -> io::Result<usize>) -> Result<bool, Broken> {
        match self.to.stream().try_write(write) {
            Ok(bytes) => {
                self.progress.add(self.to.side(), bytes);
                self.to.wrote();
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(self.to.broke(error)),
        }
    }
}

/// How long a leg may take to acknowledge more of what was delivered to it.
const DELIVERY_STALL: Duration = Duration::from_secs(30);

/// After one leg broke: delivers what it had sent to the other leg, `to`, and resets that once it has acknowledged it. A
/// reset overtakes whatever is still in the kernel's send buffer.
async fn settle<F>(to: &Leg, rest: Option<Pin<&mut F>>, progress: &Progress, limits: &Limits<'_>)
where
    F: Future<Output = Result<(), Broken>>,
{
    let deliver = async {
        if let Some(rest) = rest {
            // It ends with the error of the broken leg, or with one of `to`; there is nothing left to decide.
            let _ = rest.await;
        }
        delivered(to, 0).await;
    };
    let stall = limits
        .idle
        .map_or(DELIVERY_STALL, |idle| idle.min(DELIVERY_STALL));
    tokio::select! {
        () = deliver => {}
        () = idle(progress, Some(stall)) => {}
        () = limits.stop.cancelled() => {}
    }
    // The direction towards `to` may have ended cleanly long ago; that its peer broke is the newer truth.
    let _ = options::reset_on_close(to.stream().as_fd(), true);
}

/// Waits until the peer has acknowledged all but `most` of what it was sent, is gone, or makes no progress.
async fn delivered(leg: &Leg, most: u64) {
    let mut left = u64::MAX;
    let mut deadline = Instant::now() + DELIVERY_STALL;
    let mut pause = Duration::from_millis(1);
    while !leg.is_broken() && Instant::now() < deadline {
        match options::unacknowledged(&**leg.stream()) {
            Err(_) => return,
            Ok(bytes) if bytes <= most => return,
            Ok(bytes) if bytes < left => {
                left = bytes;
                deadline = Instant::now() + DELIVERY_STALL;
            }
            Ok(_) => {}
        }
        let _ = timeout(pause, leg.error()).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Returns once nothing has moved for `bound`. It sleeps through; it does not tick.
async fn idle(progress: &Progress, bound: Option<Duration>) {
    let Some(bound) = bound else {
        return pending().await;
    };
    loop {
        let deadline = progress.last() + bound;
        if deadline <= Instant::now() {
            return;
        }
        sleep_until(deadline).await;
    }
}
