//! Runs other programs: as root if necessary, and with errors that name the command.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

/// Prints the heading of a step that takes time or changes the system.
pub fn heading(text: &str) {
    println!("==> {text}");
}

/// Runs a command, with its output on the terminal.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", line(command));
    }
    Ok(())
}

/// Runs a command and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot run `{}`", line(command)))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}: {}", line(command), output.status, stderr.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns a command line as typed, without the folder of its program.
pub fn line(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let words = program.file_name().into_iter().chain(command.get_args());
    words
        .collect::<Vec<_>>()
        .join(OsStr::new(" "))
        .to_string_lossy()
        .into_owned()
}

/// Returns the path of a program, if it exists. Includes the folders of administrators, which a user's PATH
/// often lacks.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Returns whether this process runs as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Returns a command that runs a program as root: the program itself, or sudo with it.
pub fn as_root(program: &Path) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let sudo = find("sudo").context("this needs root, and there is no sudo")?;
    let mut command = Command::new(sudo);
    command.arg("-E").arg(program);
    Ok(command)
}
