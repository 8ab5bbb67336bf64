//! Whether a build of pepsal finds out by itself what a link carries.

use std::{
    io::Write as _,
    path::Path as FilePath,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::bench::link::{
    place::{Place, Proxy},
    site::Equipment,
};

/// Whether the daemon of a place accepts a link with `rate=auto`; another proxy is not asked.
///
/// # Errors
/// When the daemon cannot be run.
pub fn is_accepted(place: Place, equipment: &Equipment) -> Result<bool> {
    let daemon = match place {
        Place::Proxy(Proxy::Pepsal, _) => Some(&equipment.daemon),
        Place::Proxy(Proxy::OldBuild, _) => equipment.old_build.as_ref(),
        Place::Proxy(Proxy::Peer(_), _) | Place::NoProxy(_) => None,
    };
    daemon.map_or(Ok(false), |daemon| accepts(daemon))
}

/// Has a daemon check a configuration file with such a link.
fn accepts(daemon: &FilePath) -> Result<bool> {
    const CONFIGURATION: &[u8] = b"interfaces = [\"lan0\"]\n[link.sat0]\nrate = \"auto\"\nup = \"auto\"\n";
    let mut check = Command::new(daemon)
        .args(["check", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| daemon.display().to_string())?;
    let mut stdin = check.stdin.take().expect("stdin was asked to be piped");
    // Fails where the daemon has ended without reading, which its status tells.
    let _ = stdin.write_all(CONFIGURATION);
    drop(stdin);
    Ok(check.wait()?.success())
}
