//! Requirements that are checked before any change: privileges and kernel.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Required capabilities, with their numbers in `uapi/linux/capability.h`.
const CAPABILITIES: [(&str, u32); 4] = [
    ("CAP_NET_BIND_SERVICE", 10),
    ("CAP_NET_ADMIN", 12),
    ("CAP_NET_RAW", 13),
    // For network namespaces, at the start only. It includes CAP_BPF and CAP_PERFMON.
    ("CAP_SYS_ADMIN", 21),
];

/// Checks privileges and kernel.
///
/// # Errors
/// The first missing requirement, with the action to take.
pub fn check() -> Result<()> {
    check_kernel(
        &fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's version")?,
    )?;
    check_capabilities(&fs::read_to_string("/proc/self/status").context("cannot read the capabilities")?)?;
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!(
            "this kernel has no BTF (/sys/kernel/btf/vmlinux is missing): use one built with CONFIG_DEBUG_INFO_BTF=y"
        );
    }
    Ok(())
}

/// Returns major and minor version of a kernel release.
pub(crate) fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .trim()
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|n| n.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Checks the release of a kernel.
///
/// # Errors
/// When it is too old.
pub(crate) fn check_kernel(release: &str) -> Result<()> {
    if version(release) < OLDEST_KERNEL {
        let (major, minor) = OLDEST_KERNEL;
        bail!(
            "kernel {} is too old: {major}.{minor} or newer is needed",
            release.trim()
        );
    }
    Ok(())
}

/// Checks the effective capabilities in `/proc/PID/status`.
///
/// # Errors
/// When some are missing; the message lists them.
pub(crate) fn check_capabilities(status: &str) -> Result<()> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("cannot read the capabilities from /proc/self/status")?;
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
