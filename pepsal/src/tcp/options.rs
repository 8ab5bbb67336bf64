//! Socket options that neither tokio nor socket2 has; each names its kernel source if no manual page has it.

use std::{
    ffi::c_int,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use nix::libc;
use tracing::debug;

/// `TCP_REPAIR_OFF_NO_WP` of `uapi/linux/tcp.h`: leave repair mode without a window probe.
const TCP_REPAIR_OFF_NO_WP: c_int = -1;

/// Allows a socket of this family to bind, and accept for, addresses of other hosts (IP_TRANSPARENT).
pub(crate) fn set_transparent(socket: impl AsFd, ipv6: bool) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    } else {
        (libc::SOL_IP, libc::IP_TRANSPARENT)
    };
    set_int(socket, level, name, 1)
}

/// Sets the TOS byte or the traffic class; the kernel sets the ECN bits of a TCP socket itself.
pub(crate) fn set_traffic_class(socket: impl AsFd, ipv6: bool, value: u8) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_TCLASS)
    } else {
        (libc::SOL_IP, libc::IP_TOS)
    };
    set_int(socket, level, name, value.into())
}

/// Sets the TTL or the hop limit.
pub(crate) fn set_ttl(socket: impl AsFd, ipv6: bool, value: u8) -> io::Result<()> {
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS)
    } else {
        (libc::SOL_IP, libc::IP_TTL)
    };
    set_int(socket, level, name, value.into())
}

/// Sets the IPv4 options: a whole number of 32-bit words, at most 40 bytes.
pub(crate) fn set_ip_options(socket: impl AsFd, options: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IP, libc::IP_OPTIONS, options)
}

/// Sets the IPv6 hop-by-hop options header; its first byte, the next header, has to be zero.
pub(crate) fn set_hop_by_hop(socket: impl AsFd, header: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IPV6, libc::IPV6_HOPOPTS, header)
}

/// Sets the IPv6 destination options header; its first byte, the next header, has to be zero.
pub(crate) fn set_destination_options(socket: impl AsFd, header: &[u8]) -> io::Result<()> {
    set(socket, libc::SOL_IPV6, libc::IPV6_DSTOPTS, header)
}

/// Restricts an IPv6 socket to IPv6 (IPV6_V6ONLY).
pub(crate) fn set_v6_only(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_IPV6, libc::IPV6_V6ONLY, 1)
}

/// Sets or clears TCP_REPAIR; in repair mode a socket can bind an address that another socket has.
pub(crate) fn set_repair(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        libc::TCP_REPAIR,
        if on { 1 } else { TCP_REPAIR_OFF_NO_WP },
    )
}

/// Sets the maximum segment size for both directions, in bytes (TCP_MAXSEG).
pub(crate) fn set_mss(socket: impl AsFd, bytes: u16) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_MAXSEG, bytes.into())
}

/// Disables or enables delayed acknowledgements (TCP_QUICKACK); the kernel may change the mode later.
pub(crate) fn set_quickack(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_QUICKACK, on.into())
}

/// Sends only full segments, for up to 200 ms (TCP_CORK).
pub(crate) fn set_cork(socket: impl AsFd, on: bool) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_CORK, on.into())
}

/// Enables fast open (RFC 7413) on a listener, with at most this many pending requests.
pub(crate) fn set_fastopen_queue(socket: impl AsFd, requests: c_int) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_FASTOPEN, requests)
}

/// Enables fast open (RFC 7413) for a connection: with a cookie for the server, `connect` returns at once,
/// and the SYN leaves with the first write.
pub(crate) fn set_fastopen_connect(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// Sets the congestion control; the kernel loads its module if the caller has the capability.
///
/// # Errors
/// `NotFound` for an algorithm that the kernel does not have, `PermissionDenied` for one that this network
/// namespace does not allow.
pub(crate) fn set_congestion(socket: impl AsFd, algorithm: &str) -> io::Result<()> {
    set(socket, libc::SOL_TCP, libc::TCP_CONGESTION, algorithm.as_bytes())
}

/// Sets the initial window, in segments, of a connection that has not sent data. Requires the daemon's eBPF
/// program; the kernel itself has no such option.
pub(crate) fn set_initial_window(socket: impl AsFd, segments: u32) -> io::Result<()> {
    set(
        socket,
        libc::SOL_TCP,
        pepsal_ebpf::TCP_INITIAL_WINDOW,
        &segments.to_ne_bytes(),
    )
}

/// `TCP_REPAIR_WINDOW` and its `struct tcp_repair_window` of `uapi/linux/tcp.h`, in 32-bit words: `snd_wl1`,
/// `snd_wnd`, `max_window`, `rcv_wnd`, `rcv_wup`.
const TCP_REPAIR_WINDOW: c_int = 29;
type RepairWindow = [u32; 5];

/// Sets the receive window assumed for a new peer, in bytes (TCP_REPAIR_WINDOW); its next ACK replaces it.
pub(crate) fn set_send_window(socket: impl AsFd, bytes: u64) -> io::Result<()> {
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

/// Sets the maximum pacing rate, in payload bytes per second (SO_MAX_PACING_RATE).
pub(crate) fn set_pacing_rate(socket: impl AsFd, bytes_per_second: u64) -> io::Result<()> {
    set(
        socket,
        libc::SOL_SOCKET,
        libc::SO_MAX_PACING_RATE,
        &bytes_per_second.to_ne_bytes(),
    )
}

/// Sets the receive buffer so that the window is this many bytes from the first segment on, also above
/// net.core.rmem_max.
pub(crate) fn set_receive_buffer(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_SOCKET,
        libc::SO_RCVBUFFORCE,
        bytes.try_into().unwrap_or(c_int::MAX),
    )
}

/// Sets the send buffer for this many unacknowledged bytes, also above net.core.wmem_max.
pub(crate) fn set_send_buffer(socket: impl AsFd, bytes: u64) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_SOCKET,
        libc::SO_SNDBUFFORCE,
        bytes.try_into().unwrap_or(c_int::MAX),
    )
}

/// Sets the maximum of unsent bytes (TCP_NOTSENT_LOWAT).
pub(crate) fn set_unsent(socket: impl AsFd, bytes: u64) -> io::Result<()> {
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

/// Sets the minimum retransmission timeout.
pub(crate) fn set_rto_min(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        TCP_RTO_MIN_US,
        timeout.as_micros().try_into().unwrap_or(c_int::MAX),
    )
}

/// Sets the maximum retransmission timeout, after any number of doublings.
pub(crate) fn set_rto_max(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        TCP_RTO_MAX_MS,
        timeout.as_millis().try_into().unwrap_or(c_int::MAX),
    )
}

/// Sets the user timeout (TCP_USER_TIMEOUT), after which unacknowledged data end the connection; zero uses
/// net.ipv4.tcp_retries2.
pub(crate) fn set_user_timeout(socket: impl AsFd, timeout: Duration) -> io::Result<()> {
    set_int(
        socket,
        libc::SOL_TCP,
        libc::TCP_USER_TIMEOUT,
        timeout.as_millis().try_into().unwrap_or(c_int::MAX),
    )
}

/// Returns the segment size for sending, in payload bytes.
pub(crate) fn mss(socket: impl AsFd) -> io::Result<u32> {
    let bytes: c_int = get(socket, libc::SOL_TCP, libc::TCP_MAXSEG)?;
    Ok(bytes.try_into().unwrap_or(0))
}

/// Maximum length of a congestion control's name, `TCP_CA_NAME_MAX` of the kernel's `net/tcp.h`.
const CONGESTION_NAME_MAX: usize = 16;

/// Restarts the congestion control with the present window and pacing rate, by setting it again. BBR takes
/// its first rate estimate from the window.
pub(crate) fn restart_congestion(socket: impl AsFd) -> io::Result<()> {
    let fd = socket.as_fd();
    let name = congestion(fd)?;
    set_congestion(fd, "reno")?;
    set_congestion(fd, &name)
}

/// Returns the name of the congestion control.
pub(crate) fn congestion(socket: impl AsFd) -> io::Result<String> {
    let name: [u8; CONGESTION_NAME_MAX] = get(socket, libc::SOL_TCP, libc::TCP_CONGESTION)?;
    let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).into_owned())
}

/// Returns the unacknowledged bytes, including unsent ones.
pub(crate) fn unacknowledged(socket: impl AsFd) -> io::Result<u64> {
    queued(socket, libc::TIOCOUTQ)
}

/// `SIOCATMARK` of the kernel's `asm-generic/sockios.h`.
const AT_MARK: libc::c_ulong = 0x8905;

/// Returns whether the next byte is urgent (RFC 9293, 3.8.5), received or not.
pub(crate) fn is_at_mark(socket: impl AsFd) -> io::Result<bool> {
    queued(socket, AT_MARK).map(|at_mark| at_mark > 0)
}

fn queued(socket: impl AsFd, request: libc::c_ulong) -> io::Result<u64> {
    let mut bytes: c_int = 0;
    // SAFETY: these requests write one int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), request, &raw mut bytes) };
    nix::errno::Errno::result(result)?;
    Ok(bytes.try_into().unwrap_or(0))
}

/// Enables keepalive probes after this idle time, for dead-peer detection.
pub(crate) fn set_keepalive(socket: BorrowedFd<'_>, idle: Duration) -> io::Result<()> {
    let keepalive = socket2::TcpKeepalive::new().with_time(idle);
    socket2::SockRef::from(&socket).set_tcp_keepalive(&keepalive)
}

/// Sets whether `close` sends a reset, or a FIN in the background (SO_LINGER).
pub fn reset_on_close(socket: BorrowedFd<'_>, reset: bool) -> io::Result<()> {
    socket2::SockRef::from(&socket).set_linger(reset.then_some(Duration::ZERO))
}

/// Returns `struct tcp_info` of `uapi/linux/tcp.h`; members that the running kernel does not have are zero.
pub(crate) fn tcp_info(socket: impl AsFd) -> io::Result<libc::tcp_info> {
    get(socket, libc::SOL_TCP, libc::TCP_INFO)
}

/// Returns whether an option was set; logs the error.
pub(crate) fn tried(what: &str, result: io::Result<()>) -> bool {
    if let Err(error) = &result {
        debug!("cannot set {what}: {error}");
    }
    result.is_ok()
}

/// A type that `getsockopt` can fill: every bit pattern is a value.
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

/// Returns the value of an option; bytes that the kernel does not fill are zero.
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
