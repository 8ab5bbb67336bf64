//! The kernel and its limits.

use std::{fs, path::Path};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};

use crate::{
    ctl::doctor::{
        finding::{Finding, Severity},
        setting::{numbers, set},
    },
    host::{descriptors, requirements},
};

/// Bytes of TCP memory that a leg holds while it is busy on a short path.
const LEG_MEMORY: u64 = 32 << 10;

/// A window below which a long path is not filled: 50 Mbit/s over 600 ms.
const WINDOW: u64 = 4 << 20;

/// Features that a kernel may lack, with the version that brought them.
const FEATURES: [((u32, u32), &str); 4] = [
    (
        (6, 4),
        "pepsal's own congestion control, for --link; BBR takes its place",
    ),
    (
        (6, 6),
        "attachment by tcx, which vanishes with the process; clsact takes its place",
    ),
    ((6, 15), "an upper bound of the retransmission timeout"),
    ((6, 18), "a lower bound of the retransmission timeout"),
];

pub fn look(flows: u32, fastopen: bool) -> Vec<Finding> {
    let mut findings = vec![kernel(), btf(), capabilities(), cgroup(), descriptors(flows)];
    findings.extend(features());
    findings.extend(backlog());
    findings.extend(memory(flows));
    findings.extend(windows());
    if fastopen {
        findings.extend(fast_open());
    }
    findings
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn kernel() -> Finding {
    let release = release();
    match requirements::check_kernel(&release) {
        Ok(()) => Finding::ok("kernel", format!("Linux {}", release.trim())),
        Err(error) => Finding::new(
            "kernel",
            Severity::Error,
            error.to_string(),
            Some("install a newer kernel".into()),
        ),
    }
}

fn features() -> impl Iterator<Item = Finding> {
    let version = requirements::version(&release());
    let lacking = FEATURES.iter().filter(move |(since, _)| version < *since);
    lacking.map(|((major, minor), what)| {
        Finding::new(
            "kernel",
            Severity::Note,
            format!("without {what}"),
            Some(format!("Linux {major}.{minor} or newer")),
        )
    })
}

fn btf() -> Finding {
    match Path::new("/sys/kernel/btf/vmlinux").exists() {
        true => Finding::ok("BTF", "the kernel describes its types"),
        false => Finding::new(
            "BTF",
            Severity::Error,
            "/sys/kernel/btf/vmlinux is missing",
            Some("use a kernel built with CONFIG_DEBUG_INFO_BTF=y".into()),
        ),
    }
}

fn capabilities() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    match requirements::check_capabilities(&status) {
        Ok(()) => Finding::ok("capabilities", "this user has all that are needed"),
        Err(error) => Finding::new(
            "capabilities",
            Severity::Error,
            error.to_string(),
            Some("sudo pepsal doctor, to see what root has".into()),
        ),
    }
}

fn cgroup() -> Finding {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let is_mounted = mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    match is_mounted {
        true => Finding::ok("cgroup", "version 2 is mounted, for initial windows"),
        false => Finding::new(
            "cgroup",
            Severity::Note,
            "version 2 is not mounted: legs get the kernel's initial window unless pepsal may mount it",
            Some("mount -t cgroup2 none /sys/fs/cgroup".to_owned()),
        ),
    }
}

fn descriptors(flows: u32) -> Finding {
    const CHECK: &str = "descriptors";
    let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Finding::unknown(CHECK, "the limit of descriptors is unknown");
    };
    let needed = descriptors::needed(flows);
    if most >= needed {
        return Finding::ok(CHECK, format!("{most} are allowed, {flows} flows need {needed}"));
    }
    Finding::new(
        CHECK,
        Severity::Warning,
        format!("{flows} flows need {needed}, {most} are allowed: fewer are handled, the others pass"),
        Some(format!(
            "LimitNOFILE={needed} in the unit, or ulimit -n {needed} before the start"
        )),
    )
}

fn backlog() -> Option<Finding> {
    const NAME: &str = "net/core/somaxconn";
    let most = *numbers(NAME)?.first()?;
    Some(match most {
        1024.. => Finding::ok("backlog", format!("{most} connections may wait to be accepted")),
        _ => Finding::new(
            "backlog",
            Severity::Warning,
            format!("only {most} connections may wait to be accepted: bursts of new ones are slowed down"),
            set(NAME, 4096),
        ),
    })
}

/// `tcp_mem` is in pages: low, pressure, high.
fn memory(flows: u32) -> Option<Finding> {
    const NAME: &str = "net/ipv4/tcp_mem";
    let pages = numbers(NAME)?;
    let page = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    let (pressure, wanted) = (pages.get(1)? * page, u64::from(flows) * 2 * LEG_MEMORY);
    let mib = |bytes: u64| bytes >> 20;
    if pressure >= wanted {
        let what = format!("TCP may use {} MiB before buffers shrink", mib(pressure));
        return Some(Finding::ok("memory", what));
    }
    let pages = wanted.div_ceil(page);
    Some(Finding::new(
        "memory",
        Severity::Warning,
        format!(
            "buffers shrink when TCP uses {} MiB; {flows} busy flows use {} MiB",
            mib(pressure),
            mib(wanted)
        ),
        set(NAME, format_args!("{} {pages} {}", pages * 3 / 4, pages * 3 / 2)),
    ))
}

fn windows() -> impl Iterator<Item = Finding> {
    let window = |name: &'static str| {
        let sizes = numbers(name)?;
        let most = *sizes.get(2)?;
        Some(match most >= WINDOW {
            true => Finding::ok("windows", format!("{name}: up to {} MiB for a leg", most >> 20)),
            false => Finding::new(
                "windows",
                Severity::Warning,
                format!(
                    "{name}: at most {} KiB for a leg without --link: too little for a long path",
                    most >> 10
                ),
                set(name, format_args!("{} {} {}", sizes[0], sizes[1], 4 * WINDOW)),
            ),
        })
    };
    ["net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"]
        .into_iter()
        .filter_map(window)
}

/// Bit 1 is for clients, bit 2 for servers.
fn fast_open() -> Option<Finding> {
    const NAME: &str = "net/ipv4/tcp_fastopen";
    let value = *numbers(NAME)?.first()?;
    Some(match value & 3 {
        3 => Finding::ok("fast open", "allowed for both legs"),
        _ => Finding::new(
            "fast open",
            Severity::Warning,
            format!("{NAME} is {value}: not allowed for both legs, so -f has no effect on one"),
            set(NAME, value | 3),
        ),
    })
}
