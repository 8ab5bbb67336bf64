//! Congestion controls: which ones this kernel has, and which one sockets get.

use std::{fs, io};

use anyhow::{Context, Result, bail};

use crate::tcp::options;

/// The congestion control that keeps its rate best on a link that loses packets, of those that this kernel has.
pub fn best() -> &'static str {
    first_usable(["bbr", "hybla", "cubic"])
}

/// The first of these congestion controls that this kernel lets us use, or what every kernel has.
pub fn first_usable<const N: usize>(algorithms: [&'static str; N]) -> &'static str {
    let usable = |algorithm: &&str| check(algorithm).is_ok();
    algorithms.into_iter().find(usable).unwrap_or("reno")
}

/// The congestion control that sockets get when nobody chooses one (net.ipv4.tcp_congestion_control).
///
/// # Errors
/// When no socket can be opened.
pub fn default() -> io::Result<String> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    options::congestion(&socket)
}

/// Makes sure that a congestion control can be used, which loads its module.
///
/// # Errors
/// For one that cannot, naming those that can.
pub fn check(algorithm: &str) -> Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .context("cannot open a TCP socket")?;
    if let Err(error) = options::set_congestion(&socket, algorithm) {
        let available = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control")
            .unwrap_or_else(|_| "unknown".into());
        let why = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "not allowed in this network namespace (net.ipv4.tcp_allowed_congestion_control)".to_owned()
            }
            io::ErrorKind::NotFound => "unknown to this kernel, and no module of that name loads".to_owned(),
            _ => error.to_string(),
        };
        bail!(
            "congestion control '{algorithm}' is {why}: available are {}",
            available.trim().replace(' ', ", ")
        );
    }
    Ok(())
}
