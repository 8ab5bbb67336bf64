//! `pepsal reload`: the reload command of a service manager, which also starts the takeover by a new version.
//!
//! The daemon cannot start its successor, because its system call filter refuses new processes. The service
//! manager can run this command, in the sandbox of the service.

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

/// Sends SIGHUP to a daemon that runs this program file. If the file was replaced since, executes the new one
/// with the daemon's arguments and `--takeover`; it exits after the takeover.
///
/// # Errors
/// When the process does not exist, or this user has no permission for it. A successor that fails prints its
/// own error, and the daemon continues.
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

/// Returns whether a process runs the same file as this process, also after a rename.
fn is_same(program: &Path) -> Result<bool> {
    let (other, own) = (fs::metadata(program)?, fs::metadata("/proc/self/exe")?);
    Ok((other.dev(), other.ino()) == (own.dev(), own.ino()))
}

/// Splits the arguments of proc_pid_cmdline(5), each of which ends with a zero byte.
fn words(line: &[u8]) -> impl Iterator<Item = OsString> {
    let line = line.strip_suffix(&[0]).unwrap_or(line);
    line.split(|byte| *byte == 0)
        .map(|word| OsString::from_vec(word.to_vec()))
}

/// Returns the arguments of the successor: those of the daemon with `--takeover` and `--daemon`, each once.
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
