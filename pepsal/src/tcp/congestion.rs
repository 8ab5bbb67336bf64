//! Congestion controls: their kinds, those that this kernel has, and the default of sockets.

use std::{fmt, fs, io};

use anyhow::{Context, Result, bail};

use crate::tcp::options;

/// The name of pepsal's own; a second instance's has its process after it, like `pepsal_4711`.
pub const OWN: &str = "pepsal";

/// A congestion control by its name, which sockets choose it by (TCP_CONGESTION).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Congestion {
    /// pepsal's own, of this instance or another.
    Own(String),
    /// BBR's first version, as the kernel has it.
    Bbr,
    /// Another version of it, such as `bbr2`.
    BbrVersion(String),
    /// Any other.
    Other(String),
}

impl Congestion {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Bbr => "bbr",
            Self::Own(name) | Self::BbrVersion(name) | Self::Other(name) => name,
        }
    }

    /// Whether it is BBR, in any version.
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

/// The congestion control that keeps its rate best on a link that loses packets, of those that this kernel has.
pub fn best() -> Congestion {
    first_usable(["bbr", "hybla", "cubic"])
}

/// The first of these congestion controls that this kernel lets us use, or what every kernel has.
pub fn first_usable<const N: usize>(algorithms: [&str; N]) -> Congestion {
    let mut algorithms = algorithms.map(Congestion::from).into_iter();
    let usable = algorithms.find(|algorithm| check(algorithm).is_ok());
    usable.unwrap_or_else(|| "reno".into())
}

/// The congestion control that sockets get when nobody chooses one (net.ipv4.tcp_congestion_control).
///
/// # Errors
/// When no socket can be opened.
pub fn default() -> io::Result<Congestion> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    Ok(Congestion::from(&*options::congestion(&socket)?))
}

/// Makes sure that a congestion control can be used, which loads its module.
///
/// # Errors
/// For one that cannot, naming those that can.
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
