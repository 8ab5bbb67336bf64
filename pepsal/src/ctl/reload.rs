//! `pepsal reload`: what a service manager runs to have the daemon reload, and to have the next version follow it.
//!
//! The daemon cannot start its successor itself, since it has given up starting processes. The service manager can, in
//! the service's own sandbox: this is what it starts.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::{ffi::OsStringExt as _, fs::MetadataExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result};
use clap::Args;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Options of `pepsal reload`.
#[derive(Debug, Clone, Args)]
pub struct Arguments {
    /// Process id of the daemon
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    process: i32,
}

/// Sends SIGHUP to a daemon that runs this very program. Where the program was replaced since, starts this one with the
/// daemon's arguments, and ends when it has taken over.
///
/// # Errors
/// When there is no such process, or it is not to be signalled or looked at. What a successor fails for, it says itself,
/// and the daemon goes on.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let process = arguments.process;
    let folder = format!("/proc/{process}");
    let folder = Path::new(&folder);
    let unknown = || format!("process {process}: no such process, or no permission to read /proc/{process}");
    if is_same(&folder.join("exe")).with_context(unknown)? {
        kill(Pid::from_raw(process), Signal::SIGHUP)
            .with_context(|| format!("cannot signal process {process}"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let line = fs::read(folder.join("cmdline")).with_context(unknown)?;
    let mut line = words(&line);
    let name = line.next().unwrap_or_else(|| "pepsal".into());
    let mut successor =
        Command::new(env::current_exe().context("cannot find the executable of this program")?);
    successor.arg0(name).args(successor_arguments(line));
    Err(successor.exec()).context("cannot start the successor")
}

/// Whether a process's program is the file that this process runs, also after its name went to another.
fn is_same(program: &Path) -> Result<bool> {
    let (other, own) = (fs::metadata(program)?, fs::metadata("/proc/self/exe")?);
    Ok((other.dev(), other.ino()) == (own.dev(), own.ino()))
}

/// The arguments in proc_pid_cmdline(5), each of which a zero byte ends.
fn words(line: &[u8]) -> impl Iterator<Item = OsString> {
    let line = line.strip_suffix(&[0]).unwrap_or(line);
    line.split(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
}

/// Those of a daemon, and what makes its successor of one: which may be a successor itself.
fn successor_arguments(line: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = line.collect();
    for (long, short) in [("--takeover", None), ("--daemon", Some("-d"))] {
        let is_given =
            |argument: &OsString| argument == long || Some(argument.as_os_str()) == short.map(AsRef::as_ref);
        if !arguments.iter().any(is_given) {
            arguments.push(long.into());
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_s_successor_has_the_same_arguments() {
        let first = words(b"/usr/bin/pepsal\0--config\0/etc/pepsal/pepsal.toml\0").skip(1);
        let second = successor_arguments(first);
        assert_eq!(
            second,
            ["--config", "/etc/pepsal/pepsal.toml", "--takeover", "--daemon"]
        );
        assert_eq!(successor_arguments(second.clone().into_iter()), second);
    }
}
