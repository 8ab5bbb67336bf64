//! The socket calls that neither tokio nor socket2 has, each with its kernel source where it is not in a manual page.

use std::{
    ffi::c_int,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::libc;
use tracing::debug;

/// `TCP_REPAIR_OFF_NO_WP` of `uapi/linux/tcp.h`: leave repair mode without probing the peer's window.
const TCP_REPAIR_OFF_NO_WP: c_int = -1;

/// Lets a socket of this family be bound to, and accept for, addresses that are not the host's.
pub fn set_transparent(socket: impl AsFd, ipv6: bool) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    } else {
        (libc::SOL_IP, libc::IP_TRANSPARENT)
    };
    set_int(socket, level, name, 1)
}

/// Sets the TOS byte or the traffic class; the kernel keeps the ECN bits of a TCP socket to itself.
pub fn set_traffic_class(socket: impl AsFd, ipv6: bool, value: u8) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_TCLASS)
    } else {
        (libc::SOL_IP, libc::IP_TOS)
    };
    set_int(socket, level, name, value.into())
}

/// Sets the TTL or the hop limit of what is sent.
pub fn set_ttl(socket: impl AsFd, ipv6: bool, value: u8) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS)
    } else {
        (libc::SOL_IP, libc::IP_TTL)
    };
    set_int(socket, level, name, value.into())
}

/// Sets the IPv4 options of what is sent: a whole number of 32-bit words, at most forty bytes.
pub fn set_ip_options(socket: impl AsFd, options: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IP, libc::IP_OPTIONS, options)
}

/// Sets the IPv6 hop-by-hop options header of what is sent; its first byte, the next header, has to be zero.
pub fn set_hop_by_hop(socket: impl AsFd, header: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IPV6, libc::IPV6_HOPOPTS, header)
}

/// Sets the IPv6 destination options header of what is sent; its first byte, the next header, has to be zero.
pub fn set_destination_options(socket: impl AsFd, header: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IPV6, libc::IPV6_DSTOPTS, header)
}

/// Lets an IPv6 socket take IPv6 only.
pub fn set_v6_only(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_IPV6, libc::IPV6_V6ONLY, 1)
}

/// Puts a socket into TCP_REPAIR, in which it binds where others are bound already, or takes it out again.
pub fn set_repair(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        libc::TCP_REPAIR,
        if on { 1 } else { TCP_REPAIR_OFF_NO_WP },
    )
}

/// Caps the size of the segments that are sent and announced, in bytes.
pub fn set_mss(socket: impl AsFd, bytes: u16) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_MAXSEG, bytes.into())
}

/// Sends acknowledgements at once, or lets them wait for data to go with; the kernel changes that when it sees fit.
pub fn set_quickack(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_QUICKACK, on.into())
}

/// Sends full segments only, for up to 200 ms.
pub fn set_cork(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_CORK, on.into())
}

/// Lets a listener take data from SYNs (RFC 7413), with this many requests waiting.
pub fn set_fastopen_queue(socket: impl AsFd, requests: c_int) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_FASTOPEN, requests)
}

/// Lets a connection carry its first data in the SYN (RFC 7413): `connect` returns at once and the SYN leaves with the
/// first write, when a cookie for the server is known.
pub fn set_fastopen_connect(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// Chooses the congestion control; the kernel loads its module when the caller may.
///
/// # Errors
/// `NotFound` for an algorithm that the kernel does not have, `PermissionDenied` for one that this network namespace
/// is not allowed.
pub fn set_congestion(socket: impl AsFd, algorithm: &str) -> io::Result<()> {
    set(socket, libc::SOL_TCP, libc::TCP_CONGESTION, algorithm.as_bytes())
}

/// Sets the congestion window of a connection that has not sent data, in segments. Only where the daemon's eBPF program
/// answers it; elsewhere the kernel knows no such option.
pub fn set_initial_window(socket: impl AsFd, segments: u32) -> io::Result<()> {
    set(
        socket,
        libc::SOL_TCP,
        pepsal_ebpf::TCP_INITIAL_WINDOW,
        &segments.to_ne_bytes(),
    )
}

/// `TCP_REPAIR_WINDOW` and its `struct tcp_repair_window` of `uapi/linux/tcp.h`, in 32-bit words: where the send window was
/// last updated from, the send window, the largest one seen, the receive window, where that was last updated.
const TCP_REPAIR_WINDOW: c_int = 29;
type RepairWindow = [u32; 5];

/// Takes it as said that the peer of a fresh connection receives this many bytes. Its next acknowledgement says what is so.
pub fn set_send_window(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    let fd = socket.as_fd();
    set_repair(fd, true)?;
    let widen = || {
        let mut window: RepairWindow = get(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW)?;
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        window[1] = window[1].max(bytes);
        window[2] = window[2].max(bytes);
        let window: Vec<u8> = window.iter().flat_map(|word| word.to_ne_bytes()).collect();
        set(fd, libc::SOL_TCP, TCP_REPAIR_WINDOW, &window)
    };
    let done = widen();
    set_repair(fd, false).and(done)
}

/// Caps what is sent at a rate, in bytes of payload per second.
pub fn set_pacing_rate(socket: impl AsFd, bytes_per_second: u64) -> io::Result<()> {
    set(
        socket,
        libc::SOL_SOCKET,
        libc::SO_MAX_PACING_RATE,
        &bytes_per_second.to_ne_bytes(),
    )
}

/// Makes the receive window cover this many bytes from the first segment on, past net.core.rmem_max.
pub fn set_receive_buffer(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        bytes.try_into().unwrap_or(c_int::MAX),
    )
}

/// Lets this many bytes be sent and unacknowledged, past net.core.wmem_max.
pub fn set_send_buffer(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        bytes.try_into().unwrap_or(c_int::MAX),
    )
}

/// Takes no more for sending while this many bytes wait unsent.
pub fn set_unsent(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        libc::TCP_NOTSENT_LOWAT,
        bytes.try_into().unwrap_or(c_int::MAX),
    )
}

/// `TCP_RTO_MAX_MS` and `TCP_RTO_MIN_US` of `uapi/linux/tcp.h`, since Linux 6.15 and 6.18.
const TCP_RTO_MAX_MS: c_int = 44;
const TCP_RTO_MIN_US: c_int = 45;

/// Bounds the retransmission timeout from below.
pub fn set_rto_min(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        TCP_RTO_MIN_US,
        timeout.as_micros().try_into().unwrap_or(c_int::MAX),
    )
}

/// Bounds the retransmission timeout from above, however often it was doubled.
pub fn set_rto_max(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        TCP_RTO_MAX_MS,
        timeout.as_millis().try_into().unwrap_or(c_int::MAX),
    )
}

/// Sets how long data may go unacknowledged before the kernel gives the connection up, whatever number of
/// retransmissions that takes; zero leaves it to the number, net.ipv4.tcp_retries2.
pub fn set_user_timeout(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        libc::TCP_USER_TIMEOUT,
        timeout.as_millis().try_into().unwrap_or(c_int::MAX),
    )
}

/// The size of the segments that are sent, in bytes of payload.
pub fn mss(socket: impl AsFd) -> io::Result<u32> {
    let bytes: c_int = get(socket, libc::SOL_TCP, libc::TCP_MAXSEG)?;
    Ok(bytes.try_into().unwrap_or(0))
}

/// `SIOCOUTQNSD` of `uapi/linux/sockios.h`.
const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// The longest name of a congestion control, `TCP_CA_NAME_MAX` of the kernel's `net/tcp.h`.
const CONGESTION_NAME_MAX: usize = 16;

/// Has the congestion control begin anew with the window and the pacing that there are now: it does when it is chosen
/// anew. BBR takes its first estimate of the rate from the window that it finds.
pub fn restart_congestion(socket: impl AsFd) -> io::Result<()> {
    let fd = socket.as_fd();
    let name = congestion(fd)?;
    set_congestion(fd, "reno")?;
    set_congestion(fd, &name)
}

/// The congestion control's name.
pub fn congestion(socket: impl AsFd) -> io::Result<String> {
    let name: [u8; CONGESTION_NAME_MAX] = get(socket, libc::SOL_TCP, libc::TCP_CONGESTION)?;
    let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).into_owned())
}

/// Bytes that were taken for sending and not sent yet.
pub fn unsent(socket: impl AsFd) -> io::Result<u64> {
    queued(socket, SIOCOUTQNSD)
}

/// Bytes that the peer has not acknowledged, those that were not sent yet included.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<u64> {
    queued(socket, libc::TIOCOUTQ)
}

/// `SIOCATMARK` of the kernel's `asm-generic/sockios.h`.
const AT_MARK: libc::c_ulong = 0x8905;

/// Whether the next byte is an urgent one (RFC 9293, 3.8.5), or will be once it is there.
pub fn is_at_mark(socket: impl AsFd) -> io::Result<bool> {
    queued(socket, AT_MARK).map(|at_mark| at_mark > 0)
}

fn queued(socket: impl AsFd, request: libc::c_ulong) -> io::Result<u64> {
    let mut bytes: c_int = 0;
    // SAFETY: these requests write one int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut bytes) };
    nix::errno::Errno::result(result)?;
    Ok(bytes.try_into().unwrap_or(0))
}

/// Has the kernel probe a peer after this idle time, so that one that is gone does not keep its flow for ever.
pub fn set_keepalive(socket: BorrowedFd<'_>, idle: Duration) -> io::Result<()> {
    let keepalive = socket2::TcpKeepalive::new().with_time(idle);
    socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive)
}

/// What `close` does: a reset, or the orderly end that the kernel completes by itself.
pub fn reset_on_close(socket: BorrowedFd<'_>, reset: bool) -> io::Result<()> {
    socket2::SockRef::from(&socket).set_linger(reset.then_some(Duration::ZERO))
}

/// `struct tcp_info` of `uapi/linux/tcp.h`, as much of it as the running kernel fills.
pub fn tcp_info(socket: impl AsFd) -> io::Result<libc::tcp_info> {
    get(socket, libc::SOL_TCP, libc::TCP_INFO)
}

/// Returns whether an option was set; the reason of a refusal is logged.
pub fn tried(what: &str, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        debug!("cannot set {what}: {error}");
    }
    result.is_ok()
}

/// What `getsockopt` can fill in: every pattern of bits is a value.
///
/// # Safety
/// Plain data without references, valid whatever its bytes are.
unsafe trait Plain {}
// SAFETY: an integer.
unsafe impl Plain for c_int {}
// SAFETY: integers.
unsafe impl Plain for RepairWindow {}
// SAFETY: bytes.
unsafe impl Plain for [u8; CONGESTION_NAME_MAX] {}
// SAFETY: a structure of integers.
unsafe impl Plain for libc::tcp_info {}

/// An option's value; what the kernel does not fill in is zero.
fn get<T: Plain>(socket: impl AsFd, level: c_int, name: c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, and any bytes are a value.
    unsafe {
        let result = libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        );
        nix::errno::Errno::result(result)?;
        Ok(value.assume_init())
    }
}

fn set_int(socket: impl AsFd, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

fn set(socket: impl AsFd, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes and keeps nothing.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result)?;
    Ok(())
}
