//! Kernel settings (sysctl). `/proc/sys/net` has those of the network namespace of the thread that opens it.

use std::{fs, path::Path};

/// Returns names and values of the TCP settings of the calling thread's namespace: `net.ipv4.tcp_*` except
/// the fast open key, and the IP settings that TCP depends on.
pub fn of_tcp() -> Vec<(String, String)> {
    let tcp = fs::read_dir("/proc/sys/net/ipv4").into_iter().flatten().flatten();
    let names = tcp.filter_map(|entry| entry.file_name().into_string().ok());
    let names = names.filter(|name| name.starts_with("tcp_"));
    let mut settings: Vec<(String, String)> = names
        .map(|name| format!("net/ipv4/{name}"))
        .chain(OTHERS.map(str::to_owned))
        .filter_map(|name| Some((read(&name)?, name)))
        // A fast open key that is not set.
        .filter(|(value, _)| {
            value.bytes().any(|byte| !matches!(byte, b'0' | b'-' | b',')) || !value.contains('-')
        })
        .map(|(value, name)| (name, value))
        .collect();
    settings.sort();
    settings
}

const OTHERS: [&str; 4] = [
    "net/ipv4/conf/all/accept_source_route",
    "net/ipv4/ip_default_ttl",
    "net/ipv4/ip_no_pmtu_disc",
    "net/ipv6/auto_flowlabels",
];

/// Returns a setting's value; none when it cannot be read. `name` is a path below `/proc/sys`.
pub fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// Writes a setting; returns false when the setting is missing or the kernel refuses the value.
pub fn write(name: &str, value: &str) -> bool {
    fs::write(Path::new("/proc/sys").join(name), value).is_ok()
}
