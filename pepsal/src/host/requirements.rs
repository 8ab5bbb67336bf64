//! What has to be there before anything is touched: privileges, a kernel that is new enough, descriptors.

use std::{fs, io, path::Path};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

use crate::tcp::options;

/// The oldest kernel whose features suffice.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Descriptors that are not a flow's: the runtime's, the maps', the listeners', netlink's, the log's.
const OTHER_DESCRIPTORS: u64 = 256;

/// Capabilities that are needed, with their numbers in `uapi/linux/capability.h`.
const CAPABILITIES: [(&str, u32); 4] = [
    ("CAP_NET_BIND_SERVICE", 10),
    ("CAP_NET_ADMIN", 12),
    ("CAP_NET_RAW", 13),
    // To make network namespaces, at the start only. It includes CAP_BPF and CAP_PERFMON.
    ("CAP_SYS_ADMIN", 21),
];

/// Checks privileges and kernel.
///
/// # Errors
/// The first thing that is missing, and what to do about it.
pub fn check() -> Result<()> {
    check_kernel(
        &fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot tell the kernel's version")?,
    )?;
    check_capabilities(&fs::read_to_string("/proc/self/status").context("cannot tell the capabilities")?)?;
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!(
            "this kernel has no BTF (/sys/kernel/btf/vmlinux is missing): use one built with CONFIG_DEBUG_INFO_BTF=y"
        );
    }
    Ok(())
}

/// The first two numbers of a kernel's release.
pub fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Checks a kernel by its release.
///
/// # Errors
/// When it is too old.
pub fn check_kernel(release: &str) -> Result<()> {
    if version(release) < OLDEST_KERNEL {
        let (major, minor) = OLDEST_KERNEL;
        bail!(
            "kernel {} is too old: {major}.{minor} or newer is needed",
            release.trim()
        );
    }
    Ok(())
}

/// Checks the capabilities that a process's `status` names.
///
/// # Errors
/// When some are missing, naming them.
pub fn check_capabilities(status: &str) -> Result<()> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("cannot tell the capabilities from /proc/self/status")?;
    let has = |bit: u32| effective & (1 << bit) != 0;
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(_, bit)| !has(*bit))
        .map(|(name, _)| *name)
        .collect();
    if !missing.is_empty() {
        bail!(
            "missing {}: run as root, or grant them to the service",
            missing.join(", ")
        );
    }
    Ok(())
}

/// How many descriptors so many flows need.
pub fn descriptors(flows: u32) -> u64 {
    u64::from(flows) * 2 + OTHER_DESCRIPTORS
}

/// Raises the limit of descriptors as far as it goes, and returns how many flows and how many pipes fit.
///
/// # Errors
/// When the limit cannot be read, or leaves no room for a single flow.
pub fn fit_descriptors(flows: u32) -> Result<(u32, usize)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot tell the limit of descriptors")?;
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    let available = limit.saturating_sub(OTHER_DESCRIPTORS);
    let fitting = u32::try_from(available / 2).unwrap_or(u32::MAX);
    if fitting == 0 {
        bail!("{limit} descriptors leave no room for a flow: raise the limit (LimitNOFILE=, ulimit -n)");
    }
    if fitting < flows {
        warn!(
            "{flows} connections need {} descriptors and {limit} are allowed: handling {fitting} at most; raise the \
             limit (LimitNOFILE=, ulimit -n) or lower -c",
            descriptors(flows)
        );
    }
    let flows = flows.min(fitting);
    let pipes = (available - u64::from(flows) * 2) / 2;
    Ok((flows, usize::try_from(pipes).unwrap_or(usize::MAX)))
}

/// The congestion control that keeps its rate best on a link that loses packets, of those that this kernel has.
pub fn best_congestion() -> &'static str {
    first_usable(["bbr", "hybla", "cubic"])
}

/// The first of these congestion controls that this kernel lets us use, or what every kernel has.
pub fn first_usable<const N: usize>(algorithms: [&'static str; N]) -> &'static str {
    let usable = |algorithm: &&str| check_congestion(algorithm).is_ok();
    algorithms.into_iter().find(usable).unwrap_or("reno")
}

/// The congestion control that sockets get when nobody chooses one (net.ipv4.tcp_congestion_control).
///
/// # Errors
/// When no socket can be opened.
pub fn default_congestion() -> io::Result<String> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    options::congestion(&socket)
}

/// Makes sure that a congestion control can be used, which loads its module.
///
/// # Errors
/// For one that cannot, naming those that can.
pub fn check_congestion(algorithm: &str) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert!(check_kernel("6.18.44-custom\n").is_ok());
        assert!(check_kernel("6.1.0-50-amd64").is_ok());
        assert_eq!(
            check_kernel("5.10.0-32-amd64").unwrap_err().to_string(),
            "kernel 5.10.0-32-amd64 is too old: 6.1 or newer is needed"
        );
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert!(check_capabilities("CapEff:\t000001ffffffffff\n").is_ok());
        assert!(check_capabilities("CapEff:\t0000000000203400\n").is_ok());
        let error = check_capabilities("CapEff:\t0000000000001400\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("missing CAP_NET_RAW, CAP_SYS_ADMIN:"),
            "{error}"
        );
    }
}
