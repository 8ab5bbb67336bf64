//! Congestion controls: their kinds, the available ones, and the default of sockets.

use std::{fmt, fs, io};

use anyhow::{Context, Result, bail};

use crate::tcp::options;

/// Name of pepsal's congestion control; a second instance appends its process id, like `pepsal_4711`.
pub const OWN: &str = "pepsal";

/// A congestion control, by its name for TCP_CONGESTION.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Congestion {
    /// pepsal's, of this or another instance.
    Own(String),
    /// BBR's first version, the kernel's.
    Bbr,
    /// Another version of BBR, such as `bbr2`.
    BbrVersion(String),
    Other(String),
}

impl Congestion {
    pub fn name(&self) -> &str {
        match self {
            Self::Bbr => "bbr",
            Self::Own(name) | Self::BbrVersion(name) | Self::Other(name) => name,
        }
    }

    /// Returns whether this is BBR, in any version.
    pub fn is_bbr(&self) -> bool {
        matches!(self, Self::Bbr | Self::BbrVersion(_))
    }
}

impl From<&str> for Congestion {
    fn from(name: &str) -> Self {
        match name.strip_prefix(OWN) {
            Some(rest) if rest.is_empty() || rest.starts_with('_') => Self::Own(name.to_owned()),
            _ if name == "bbr" => Self::Bbr,
            _ if name.starts_with("bbr") => Self::BbrVersion(name.to_owned()),
            _ => Self::Other(name.to_owned()),
        }
    }
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Returns the available congestion control that keeps its rate best under packet loss.
pub fn best() -> Congestion {
    first_usable(["bbr", "hybla", "cubic"])
}

/// Returns the first available congestion control of the list, else Reno, which every kernel has.
pub fn first_usable<const N: usize>(algorithms: [&str; N]) -> Congestion {
    let mut algorithms = algorithms.map(Congestion::from).into_iter();
    let usable = algorithms.find(|algorithm| check(algorithm).is_ok());
    usable.unwrap_or_else(|| "reno".into())
}

/// Returns the default congestion control (net.ipv4.tcp_congestion_control).
///
/// # Errors
/// When no socket can be created.
pub fn default() -> io::Result<Congestion> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    Ok(Congestion::from(&*options::congestion(&socket)?))
}

/// Checks that a congestion control is available, which loads its module.
///
/// # Errors
/// When it is unavailable; the message lists the available ones.
pub fn check(algorithm: &Congestion) -> Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .context("cannot open a TCP socket")?;
    if let Err(error) = options::set_congestion(&socket, algorithm.name()) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_kept() {
        for (name, parsed) in [
            ("pepsal", Congestion::Own("pepsal".into())),
            ("pepsal_7", Congestion::Own("pepsal_7".into())),
            ("pepsalx", Congestion::Other("pepsalx".into())),
            ("bbr", Congestion::Bbr),
            ("bbr2", Congestion::BbrVersion("bbr2".into())),
            ("cubic", Congestion::Other("cubic".into())),
        ] {
            assert_eq!(Congestion::from(name), parsed);
            assert_eq!(parsed.name(), name);
        }
    }
}
