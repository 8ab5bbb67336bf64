//! Blocks the signals that end a command, until its clean-up is done.

use std::{os::fd::AsFd as _, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

/// Receives SIGINT, SIGTERM and SIGHUP, which then do not end the process.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and in threads that it starts.
    pub fn block() -> Result<Self> {
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        signals.thread_block().context("cannot block signals")?;
        SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK)
            .map(Self)
            .context("cannot wait for signals")
    }

    pub fn is_pending(&self) -> bool {
        self.come_within(Duration::ZERO).unwrap_or_default()
    }

    pub fn come_within(&self, timeout: Duration) -> Result<bool> {
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).context("the tick fits")?;
        Ok(poll(&mut ready, timeout)? > 0)
    }

    /// Returns the exit status of a shell for a program that the received signal ended.
    pub fn interrupted(&self) -> Result<ExitCode> {
        let signal = self.0.read_signal()?.context("a signal is pending")?;
        eprintln!("\nInterrupted; everything is taken down.");
        Ok(ExitCode::from(128 + signal.ssi_signo as u8))
    }
}
