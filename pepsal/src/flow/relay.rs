//! Relays bytes between the two legs of a flow, in both directions, until both have ended.
//!
//! splice(2) moves bytes from one socket through a pipe to the other; messages of a few kB are copied, which
//! costs less. A direction has a pipe or buffer only while bytes are in it: an idle flow has its two sockets
//! and no other resources. The relay reads from a leg only after the other leg has taken all bytes, so a peer
//! that does not read stops the other peer by its receive window.
//!
//! The end of a leg is passed on: a half-close as a half-close, an error of a leg as a reset of the other,
//! after delivery of the data that the failed leg had sent. Until a direction has ended by FIN, closing its
//! receiving socket sends a reset, so that a transfer that a killed process truncates never looks complete.

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

/// Limits of a relay.
pub struct Limits<'a> {
    /// Idle timeout of both directions.
    pub idle: Option<Duration>,
    /// Cancelled to reset all open flows.
    pub stop: &'a CancellationToken,
    /// Pool of pipes and buffers.
    pub conduits: &'a ConduitPool,
}

/// Relays until both directions have ended or the flow is stopped, and sets the legs so that dropping them
/// sends a FIN or a reset as required.
///
/// The state of the end phase is on the heap, so that an open flow does not hold memory for it.
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
                // Without this branch, an error would be undetected on a leg that is not read: after its end
                // of stream, or while the other leg is full.
                broken = client.error() => Err(broken),
                broken = server.error() => Err(broken),
                () = idle(progress, limits.idle) => return CloseReason::IdleTimeout,
            };
            match ended {
                Ok(()) if up_done && down_done => {
                    // The flow keeps its table entry until the data are acknowledged; the kernel retransmits
                    // the FIN.
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

/// Full conduits that a flow relays before it yields to other flows of its worker.
const TURN: u32 = 4;

/// Result of a read from a leg.
enum Read {
    /// Number of bytes in the conduit.
    Bytes(usize),
    /// An urgent byte (RFC 9293, 3.8.5).
    Urgent(u8),
    End,
}

struct Direction<'a> {
    from: &'a Leg,
    to: &'a Leg,
    progress: &'a Progress,
    pool: &'a ConduitPool,
}

/// Result of one relay step: the number of relayed bytes, or none at the end of stream.
type Passed = Result<Option<usize>, Broken>;

/// A relay step that may wait. It is on the heap, so that an idle flow does not hold memory for it.
enum Passing<'a> {
    Done(Passed),
    Waiting(BoxFuture<'a, Passed>),
}

impl Direction<'_> {
    /// Relays the data of `from` to `to`, and its end of stream.
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

    /// Relays a message; for more data starts a stream with it.
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

    /// Relays all available data by splice.
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

    /// Returns the end of the direction. After an error, which the other direction reports, the kernel also
    /// returns end of stream.
    fn ended(&self) -> Passed {
        match self.from.is_broken() {
            true => Err(self.from.broke(io::ErrorKind::ConnectionReset.into())),
            false => Ok(None),
        }
    }

    /// Reads from `from` into the conduit.
    ///
    /// # Errors
    /// `WouldBlock` when `from` has no data.
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

    /// Sends an urgent byte as urgent data.
    async fn pass_urgent(&self, byte: u8) -> Result<(), Broken> {
        let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !self.write(|to| Ok(send(to.as_raw_fd(), &[byte], flags)?))? {
            self.writable().await?;
        }
        Ok(())
    }

    /// Writes the bytes of the conduit to `to`.
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

    /// Returns whether the socket had room.
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

/// Timeout of each further acknowledgement of delivered data.
const DELIVERY_STALL: Duration = Duration::from_secs(30);

/// After an error of one leg: delivers its remaining data to the other leg, `to`, and resets `to` after the
/// acknowledgement. A reset discards data in the kernel's send buffer.
async fn settle<F>(to: &Leg, rest: Option<Pin<&mut F>>, progress: &Progress, limits: &Limits<'_>)
where
    F: Future<Output = Result<(), Broken>>,
{
    let deliver = async {
        if let Some(rest) = rest {
            // The result is the error of the failed leg or of `to`; both lead to a reset.
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
    // The direction towards `to` may have ended by FIN; the later error of its peer takes precedence.
    let _ = options::reset_on_close(to.stream().as_fd(), true);
}

/// Waits until at most `most` bytes are unacknowledged, the connection fails, or [`DELIVERY_STALL`] passes
/// without progress.
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

/// Returns when no byte was relayed for `bound`. Sleeps until the earliest possible expiry, without a
/// periodic timer.
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
