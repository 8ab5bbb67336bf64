//! Kernel settings of a network namespace. `/proc/sys/net` is that of the thread that opens it.

use std::{fs, path::Path};

/// The settings of the calling thread's namespace that decide how its TCP connections behave.
pub fn of_tcp() -> Vec<(String, String)> {
    let tcp = fs::read_dir("/proc/sys/net/ipv4").into_iter().flatten().flatten();
    let names = tcp.filter_map(|entry| entry.file_name().into_string().ok());
    let names = names.filter(|name| name.starts_with("tcp_") && name != "tcp_fastopen_key");
    let mut settings: Vec<(String, String)> = names
        .map(|name| format!("net/ipv4/{name}"))
        .chain(OTHERS.map(str::to_owned))
        .filter_map(|name| Some((read(&name)?, name)))
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

/// A setting's value; nothing where there is none of that name.
pub fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// Writes a setting; false where there is none of that name, or it is not to be changed here.
pub fn write(name: &str, value: &str) -> bool {
    fs::write(Path::new("/proc/sys").join(name), value).is_ok()
}
