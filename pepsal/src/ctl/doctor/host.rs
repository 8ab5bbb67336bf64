//! Checks of the kernel and its limits.

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

/// TCP memory in bytes of a busy leg on a short path.
const LEG_MEMORY: u64 = 32 << 10;

/// Window in bytes that fills a long path: 50 Mbit/s over 600 ms.
const WINDOW: u64 = 4 << 20;

/// Optional kernel features, with the version that introduced them.
const FEATURES: [((u32, u32), &str); 4] = [
    (
        (6, 4),
        "pepsal's own congestion control for --link; BBR is used instead",
    ),
    (
        (6, 6),
        "tcx, whose attachments end with the process; clsact is used instead",
    ),
    (
        (6, 15),
        "TCP_RTO_MAX_MS, the maximum retransmission timeout of a leg",
    ),
    (
        (6, 18),
        "TCP_RTO_MIN_US, the minimum retransmission timeout of a leg",
    ),
];

/// Returns the findings for `flows` flows.
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
            format!("not supported: {what}"),
            Some(format!("Linux {major}.{minor} or newer")),
        )
    })
}

fn btf() -> Finding {
    match Path::new("/sys/kernel/btf/vmlinux").exists() {
        true => Finding::ok("BTF", "/sys/kernel/btf/vmlinux is present"),
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
        Ok(()) => Finding::ok("capabilities", "all required capabilities are held"),
        Err(error) => Finding::new(
            "capabilities",
            Severity::Error,
            error.to_string(),
            Some("sudo pepsal doctor, which checks those of root".into()),
        ),
    }
}

fn cgroup() -> Finding {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let is_mounted = mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some("cgroup2"));
    match is_mounted {
        true => Finding::ok("cgroup", "cgroup v2 is mounted, for initial windows"),
        false => Finding::new(
            "cgroup",
            Severity::Note,
            "cgroup v2 is not mounted: legs get the kernel's initial window, unless pepsal has permission to mount it",
            Some("mount -t cgroup2 none /sys/fs/cgroup".to_owned()),
        ),
    }
}

fn descriptors(flows: u32) -> Finding {
    const CHECK: &str = "descriptors";
    let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return Finding::unknown(CHECK, "the limit of file descriptors is unknown");
    };
    let needed = descriptors::needed(flows);
    if most >= needed {
        return Finding::ok(CHECK, format!("the limit is {most}, {flows} flows need {needed}"));
    }
    Finding::new(
        CHECK,
        Severity::Warning,
        format!("{flows} flows need {needed}, the limit is {most}: fewer connections are intercepted"),
        Some(format!(
            "LimitNOFILE={needed} in the unit, or ulimit -n {needed} before the start"
        )),
    )
}

fn backlog() -> Option<Finding> {
    const NAME: &str = "net/core/somaxconn";
    let most = *numbers(NAME)?.first()?;
    Some(match most {
        1024.. => Finding::ok(
            "backlog",
            format!("the accept queue has room for {most} connections"),
        ),
        _ => Finding::new(
            "backlog",
            Severity::Warning,
            format!(
                "the accept queue has room for {most} connections only: bursts of new connections are delayed"
            ),
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
        let what = format!("TCP memory pressure starts at {} MiB", mib(pressure));
        return Some(Finding::ok("memory", what));
    }
    let pages = wanted.div_ceil(page);
    Some(Finding::new(
        "memory",
        Severity::Warning,
        format!(
            "TCP memory pressure starts at {} MiB, where buffers shrink; {flows} busy flows use {} MiB",
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
            true => Finding::ok("windows", format!("{name}: maximum {} MiB for a leg", most >> 20)),
            false => Finding::new(
                "windows",
                Severity::Warning,
                format!(
                    "{name}: maximum {} KiB for a leg without --link, too little for a long path",
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
        3 => Finding::ok("fast open", "enabled for both legs"),
        _ => Finding::new(
            "fast open",
            Severity::Warning,
            format!("{NAME} is {value}: not enabled for both legs, so -f has no effect on one of them"),
            set(NAME, value | 3),
        ),
    })
}
