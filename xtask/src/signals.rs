//! Signals that end a command, kept until what it has made is taken down.

use std::{os::fd::AsFd as _, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

/// Where SIGINT, SIGTERM and SIGHUP arrive instead of ending the process.
pub struct Signals(SignalFd);

impl Signals {
    /// Blocks them in this thread and in those that it starts from now on.
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

    /// The exit status that a shell gives to a program which the signal that has come has ended.
    pub fn interrupted(&self) -> Result<ExitCode> {
        let signal = self.0.read_signal()?.context("a signal is pending")?;
        eprintln!("\nInterrupted; everything is taken down.");
        Ok(ExitCode::from(128 + signal.ssi_signo as u8))
    }
}
