//! The relay between two ends that do whatever a script says, over loopback TCP.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use pepsal::{
    flow::{
        close_reason::CloseReason,
        conduit::ConduitPool,
        leg::Leg,
        progress::Progress,
        relay::{Limits, relay},
        side::Side,
    },
    tcp::{connection::Connection, options},
};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::{Builder, Runtime},
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Longer than any script takes, and shorter than the relay's own patience with a peer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The most operations of a script.
const OPERATIONS: usize = 100;

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("there are descriptors");
}

/// Two bytes are one operation of one end; the first two choose buffers and conduit. Afterwards the ends that are left
/// say that they have said all, and read until the other's end: every byte has to have come, in order, and an end that
/// was not orderly must not look so.
pub fn exercise(script: &[u8]) {
    let [options, _, operations @ ..] = script else {
        return;
    };
    RUNTIME.with(|runtime| {
        runtime.block_on(async { play(*options, operations).await.expect("loopback works") })
    });
}

async fn play(options: u8, operations: &[u8]) -> io::Result<()> {
    let (client, client_leg) = connection(options).await?;
    let (server, server_leg) = connection(options.rotate_left(4)).await?;
    let mut ends = [End::new(client, 0), End::new(server, 1)];
    let legs = (
        Leg::new(client_leg, Side::Client),
        Leg::new(server_leg, Side::Server),
    );
    let (progress, stop) = (Progress::default(), CancellationToken::new());
    let conduits = ConduitPool::new(usize::from(options & 1));
    let limits = Limits {
        idle: None,
        stop: &stop,
        conduits: &conduits,
    };
    let relayed = async {
        let reason = relay(&legs.0, &legs.1, &progress, &limits).await;
        // Closing them is what the ends see.
        drop(legs);
        reason
    };
    let played = async {
        for operation in operations.chunks_exact(2).take(OPERATIONS) {
            let [what, how_much] = [operation[0], operation[1]];
            let end = &mut ends[usize::from(what & 1)];
            match what >> 1 & 7 {
                0 | 1 => end.write(usize::from(how_much) * 257 + 1),
                2 | 3 => end.read(usize::from(how_much) * 257 + 1),
                4 => end.shutdown(),
                5 if how_much < 64 => end.reset(),
                7 if how_much < 128 => end.write_urgent(),
                6 if how_much > 240 => sleep(Duration::from_millis(1)).await,
                _ => {
                    for _ in 0..how_much % 8 {
                        yield_now().await;
                    }
                }
            }
        }
        let [client, server] = &mut ends;
        tokio::join!(client.finish(), server.finish());
    };
    let Ok((reason, ())) = timeout(PATIENCE, async { tokio::join!(relayed, played) }).await else {
        panic!("the relay does not come to an end");
    };
    check(&ends, reason, &progress);
    Ok(())
}

fn check([client, server]: &[End; 2], reason: CloseReason, progress: &Progress) {
    for (near, far) in [(client, server), (server, client)] {
        match near.saw {
            Some(Saw::End) => {
                assert!(
                    far.is_shut,
                    "an end that nobody has said to {}: {reason}",
                    near.salt
                );
                assert_eq!(
                    near.received, far.sent,
                    "bytes are missing to {}: {reason}",
                    near.salt
                );
            }
            Some(Saw::Reset) => assert!(
                far.is_reset,
                "a reset that nobody has sent to {}: {reason}",
                near.salt
            ),
            None => assert!(near.is_reset),
        }
        assert!(near.received <= far.sent);
    }
    let (up, down) = (
        progress.up.load(Ordering::Relaxed),
        progress.down.load(Ordering::Relaxed),
    );
    assert!((server.received..=client.sent).contains(&up) && (client.received..=server.sent).contains(&down));
    let may_finish = client.is_shut && server.is_shut;
    match reason {
        CloseReason::Finished => assert!(may_finish),
        CloseReason::ClientReset => assert!(client.is_reset),
        CloseReason::ServerReset => assert!(server.is_reset),
        other => panic!("{other}"),
    }
    if !client.is_reset && !server.is_reset {
        assert_eq!(reason, CloseReason::Finished);
    }
}

/// A peer of the relay.
struct End {
    /// None once it is reset.
    stream: Option<TcpStream>,
    /// Tells the two ways apart.
    salt: u8,
    sent: u64,
    received: u64,
    is_shut: bool,
    is_reset: bool,
    saw: Option<Saw>,
}

/// How the other side ended.
#[derive(Clone, Copy)]
enum Saw {
    End,
    Reset,
}

impl End {
    fn new(stream: TcpStream, salt: u8) -> Self {
        Self {
            stream: Some(stream),
            salt,
            sent: 0,
            received: 0,
            is_shut: false,
            is_reset: false,
            saw: None,
        }
    }

    /// As much of it as the kernel takes.
    fn write(&mut self, bytes: usize) {
        self.send(bytes, |stream, data| stream.try_write(data));
    }

    /// A byte that neither splice nor a read crosses.
    fn write_urgent(&mut self) {
        self.send(1, |stream, data| {
            stream.try_io(Interest::WRITABLE, || {
                SockRef::from(stream).send_out_of_band(data)
            })
        });
    }

    fn send(&mut self, bytes: usize, send: impl FnOnce(&TcpStream, &[u8]) -> io::Result<usize>) {
        let (Some(stream), false, None | Some(Saw::End)) = (&self.stream, self.is_shut, self.saw) else {
            return;
        };
        let data: Vec<u8> = (self.sent..self.sent + bytes as u64)
            .map(|at| byte(self.salt, at))
            .collect();
        match send(stream, &data) {
            Ok(written) => self.sent += written as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.broke(&error),
        }
    }

    /// As much as there is.
    fn read(&mut self, bytes: usize) {
        let (Some(stream), None) = (&self.stream, self.saw) else {
            return;
        };
        let mut data = vec![0; bytes];
        match stream.try_read(&mut data) {
            Ok(0) => self.saw = Some(Saw::End),
            Ok(read) => {
                for (at, found) in (self.received..).zip(&data[..read]) {
                    assert_eq!(*found, byte(1 - self.salt, at), "byte {at} is another");
                }
                self.received += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => self.broke(&error),
        }
    }

    fn broke(&mut self, error: &io::Error) {
        assert!(
            matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            ),
            "{error}"
        );
        self.saw = Some(Saw::Reset);
    }

    fn shutdown(&mut self) {
        if let (Some(stream), false) = (&self.stream, self.is_shut) {
            // It fails for a connection that has been reset.
            let done = SockRef::from(stream).shutdown(std::net::Shutdown::Write);
            self.is_shut = done.is_ok();
        }
    }

    fn reset(&mut self) {
        if let Some(stream) = self.stream.take() {
            self.is_reset = true;
            SockRef::from(&stream)
                .set_linger(Some(Duration::ZERO))
                .expect("any socket has that option");
        }
    }

    /// Says its end, and reads until the other's.
    async fn finish(&mut self) {
        self.shutdown();
        while let (Some(stream), None) = (&self.stream, self.saw) {
            // What is wrong with it, reading says.
            let _ = stream.readable().await;
            self.read(65_536);
        }
    }
}

fn byte(salt: u8, at: u64) -> u8 {
    (at % 251) as u8 ^ salt
}

/// A peer's end and a leg. Some options are for small buffers.
async fn connection(options: u8) -> io::Result<(TcpStream, Connection)> {
    let listener = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    let peer = TcpSocket::new_v4()?;
    if options & 2 > 0 {
        listener.set_recv_buffer_size(2304)?;
        listener.set_send_buffer_size(4608)?;
    }
    if options & 4 > 0 {
        peer.set_recv_buffer_size(2304)?;
        peer.set_send_buffer_size(4608)?;
    }
    // Another address each time: ports of connections that have just ended are in TIME_WAIT.
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let address = Ipv4Addr::from(0x7f00_0001 + NEXT.fetch_add(1, Ordering::Relaxed) % 0xff_0000);
    listener.bind(&SocketAddr::from((address, 0)).into())?;
    listener.listen(1)?;
    let listener = TcpListener::from_std(listener.into())?;
    let peer = peer.connect(listener.local_addr()?).await?;
    let leg = Socket::from(listener.accept().await?.0.into_std()?);
    leg.set_tcp_nodelay(true)?;
    for end in [SockRef::from(&peer), SockRef::from(&leg)] {
        end.set_out_of_band_inline(true)?;
    }
    // As legs have it until they have ended cleanly.
    options::reset_on_close(leg.as_fd(), true)?;
    Ok((peer, Connection::register(leg)?))
}
