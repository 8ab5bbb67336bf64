//! Child processes with timeouts.

use std::{
    io::Read as _,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{shell, signals::Signals};

/// Interval of checks.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A running process, killed when it is dropped.
pub struct Process(Child);

impl Process {
    pub fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("cannot run `{}`", shell::line(command)))?;
        Ok(Self(child))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a child that has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command and returns its standard output.
///
/// # Errors
/// When it fails, takes longer than `limit`, or a signal arrives.
pub fn output(command: &mut Command, limit: Duration, signals: &Signals) -> Result<String> {
    let line = shell::line(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut process = Process::start(command)?;
    let (mut stdout, mut stderr) = (
        process
            .child()
            .stdout
            .take()
            .context("stdout was asked to be piped")?,
        process
            .child()
            .stderr
            .take()
            .context("stderr was asked to be piped")?,
    );
    let (sender, read) = mpsc::channel();
    thread::spawn(move || {
        let (mut out, mut err) = (String::new(), String::new());
        let result = stdout
            .read_to_string(&mut out)
            .and_then(|_| stderr.read_to_string(&mut err));
        // The receiver is gone after the limit.
        let _ = sender.send(result.map(|_| (out, err)));
    });
    let (out, err) = receive(&read, limit, signals)
        .with_context(|| format!("`{line}`"))?
        .with_context(|| format!("cannot read the output of `{line}`"))?;
    let status = process
        .child()
        .wait()
        .with_context(|| format!("cannot wait for `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed: {status}: {}{}", err.trim(), out.trim());
    }
    Ok(out)
}

/// Waits for a message.
///
/// # Errors
/// When none arrives within `limit`, a signal arrives first, or all senders are gone.
pub fn receive<T>(channel: &mpsc::Receiver<T>, limit: Duration, signals: &Signals) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        match channel.recv_timeout(POLL_INTERVAL * 10) {
            Ok(message) => return Ok(message),
            Err(RecvTimeoutError::Disconnected) => bail!("ended without a reply"),
            Err(RecvTimeoutError::Timeout) if signals.is_pending() => bail!("interrupted"),
            Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                bail!("no reply after {limit:?}")
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Waits until a condition is true.
///
/// # Errors
/// When it is false after `limit`, or a signal arrives first.
pub fn wait_until(
    what: &str,
    limit: Duration,
    signals: &Signals,
    mut is_so: impl FnMut() -> bool,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !is_so() {
        if signals.is_pending() {
            bail!("interrupted");
        }
        if Instant::now() >= deadline {
            bail!("{what}: not after {limit:?}");
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}
