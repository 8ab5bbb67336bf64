//! Creates server legs with the fields of the client's SYN.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{MsgFlags, recv, send},
};
use pepsal_ebpf::SynRecord;
use socket2::{Domain, Socket, Type};
use tokio::time::{Instant, sleep};

use crate::{
    flow::{leg_config::LegConfig, metrics::Metrics, replicate::Source, side::Side},
    host::namespace::Namespace,
    link::registry::Link,
    tcp::{
        connection::Connection,
        options::{self, tried},
    },
};

/// Interval between attempts to use addresses that another server leg still has.
const PORT_RETRY: Duration = Duration::from_millis(10);
/// Time limit of these attempts.
const PORT_PATIENCE: Duration = Duration::from_millis(250);

/// Parameters of a connection to a server.
#[derive(Clone, Copy)]
pub struct Attempt<'a> {
    /// Source address of the server leg.
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub record: &'a SynRecord,
    /// Link of the server leg, if it has a profile.
    pub link: Option<&'a Link>,
    /// Maximum segment size of the path in bytes, if the leg's route has a larger MTU.
    pub path_mss: Option<u16>,
    /// Whether the client has sent data, which fast open can carry in the SYN. Without data the SYN would
    /// wait for the client, and the client may wait for the server.
    pub has_data: bool,
}

impl LegConfig {
    /// Connects to the server with the header fields of the client's SYN.
    ///
    /// # Errors
    /// Errors of `connect`, and permanent errors of `socket` and `bind`.
    pub async fn connect(
        &self,
        attempt: &Attempt<'_>,
        host: &Namespace,
        metrics: &Metrics,
    ) -> io::Result<Connection> {
        let Attempt {
            client,
            server,
            record,
            link,
            path_mss,
            has_data,
        } = *attempt;
        let open = || {
            Socket::new(
                Domain::for_address(server),
                Type::STREAM.nonblocking().cloexec(),
                None,
            )
        };
        let socket = match self.options.source {
            Source::Client => open()?,
            Source::Gateway => host.run(open)?,
        };
        self.replication.apply(&socket, server.is_ipv6(), record, metrics);
        self.tune(socket.as_fd(), link);
        let given = self.mss_of(link);
        if let Some(mss) = path_mss.filter(|mss| given.is_none_or(|given| *mss < given)) {
            tried("maximum segment size", options::set_mss(&socket, mss));
        }
        if self.options.quickack || has_data {
            // The client's data complete the handshake as well as an ACK without data.
            tried("quick ack", options::set_quickack(&socket, self.options.quickack));
        }
        if let Some(congestion) = self.initial_congestion_of(Side::Server, link) {
            tried(
                "congestion control",
                options::set_congestion(&socket, congestion.name()),
            );
        }
        if let Some(link) = link {
            // Before the SYN, which announces its window scale; the first ACK then opens the whole window.
            tried(
                "receive buffer",
                options::set_receive_buffer(&socket, link.profile.receive_buffer.value),
            );
        }
        if has_data && self.options.fastopen {
            tried("fast open", options::set_fastopen_connect(&socket));
        }
        if self.options.source == Source::Client {
            // The leg's packets enter the host on the interface of the client's SYN.
            socket.set_mark(record.ingress_ifindex)?;
            options::set_transparent(&socket, client.is_ipv6())?;
            socket.set_reuse_address(true)?;
            socket.bind(&client.into())?;
        }
        begin_connect(&socket, server).await?;
        let stream = Connection::register(socket)?;
        stream.writable().await?;
        // The same readiness event has the error.
        match stream.has_error() {
            true => stream.socket().take_error()?.map_or(Ok(stream), Err),
            false => Ok(stream),
        }
    }
}

/// With fast open and a cookie the kernel delays the SYN until data are written. Sends the SYN with the
/// client's first data, and waits for the server's reply. Returns the number of the client's bytes in the
/// SYN.
///
/// Without this, a refusal is not detected, and the initial window that is set after the handshake has no
/// effect.
///
/// # Errors
/// Errors of `connect`.
pub async fn open(server: &Connection, client: &Connection) -> io::Result<usize> {
    if !is_connecting(server)? {
        return Ok(0);
    }
    let mut data = [0; SYN_DATA_MAX];
    // The relay handles an urgent byte.
    let peeked = match options::is_at_mark(client)? {
        true => 0,
        false => recv(
            client.as_fd().as_raw_fd(),
            &mut data,
            MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT,
        )?,
    };
    let sent = match send(
        server.as_fd().as_raw_fd(),
        &data[..peeked],
        MsgFlags::MSG_NOSIGNAL,
    ) {
        // Without a cookie the SYN leaves without data.
        Err(Errno::EINPROGRESS) => 0,
        sent => sent?,
    };
    if sent > 0 {
        recv(
            client.as_fd().as_raw_fd(),
            &mut data[..sent],
            MsgFlags::MSG_DONTWAIT,
        )?;
    }
    loop {
        server.writable().await?;
        let answered = server.try_write(|_| match is_connecting(server)? {
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        });
        match answered {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(()) => return server.socket().take_error()?.map_or(Ok(sent), Err),
        }
    }
}

/// Bytes of data that fit a SYN on every IPv6 path: 1280 bytes less the headers of IPv6, TCP and TCP options.
const SYN_DATA_MAX: usize = 1280 - 40 - 60;

/// `TCP_SYN_SENT` of the kernel's `net/tcp_states.h`.
const TCP_SYN_SENT: u8 = 2;

fn is_connecting(stream: &Connection) -> io::Result<bool> {
    Ok(options::tcp_info(stream)?.tcpi_state == TCP_SYN_SENT)
}

/// Sends the SYN. If the client reuses its port at once, the server leg of its previous flow may still have
/// the same two addresses: waits for its end.
///
/// # Errors
/// `AddrNotAvailable` when the other leg still has the addresses after [`PORT_PATIENCE`]: another port would
/// not be the client's.
async fn begin_connect(socket: &Socket, server: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        match socket.connect(&server.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && Instant::now() < deadline => {
                sleep(PORT_RETRY).await;
            }
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => return Ok(()),
            begun => return begun,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use tokio::time::timeout;

    use super::*;

    fn socket_at(address: &socket2::SockAddr) -> Socket {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(address).unwrap();
        socket
    }

    #[tokio::test]
    async fn a_leg_waits_for_its_addresses_but_not_for_ever() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let earlier = socket_at(&any.into());
        begin_connect(&earlier, server).await.unwrap();
        let later = socket_at(&earlier.local_addr().unwrap());

        let start = Instant::now();
        let waiting = timeout(40 * PORT_PATIENCE, begin_connect(&later, server));
        let error = waiting.await.expect("it gives up").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        assert!(start.elapsed() >= PORT_PATIENCE, "{:?}", start.elapsed());

        options::reset_on_close(earlier.as_fd(), true).unwrap();
        let release = async {
            sleep(PORT_PATIENCE / 5).await;
            drop(earlier);
        };
        let (connected, ()) = tokio::join!(begin_connect(&later, server), release);
        connected.unwrap();
    }
}
