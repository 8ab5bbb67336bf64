//! The log: to standard error, at a level that can be changed while the daemon runs.

use std::io::{IsTerminal, stderr};

use anyhow::{Context, Result};
use tracing_subscriber::{EnvFilter, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

use crate::cli::LogLevel;

/// The running log.
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    /// The environment said what to log, which nothing overrides.
    is_fixed: bool,
}

impl Log {
    /// Starts to log what is as severe as `level`, or what `RUST_LOG` says.
    ///
    /// # Errors
    /// When `RUST_LOG` is not a log filter.
    pub fn start(level: LogLevel) -> Result<Self> {
        let directives = std::env::var("RUST_LOG").unwrap_or_default();
        let is_fixed = !directives.is_empty();
        let chosen = match is_fixed {
            true => EnvFilter::try_new(&directives)
                .with_context(|| format!("RUST_LOG={directives} is not a log filter"))?,
            false => of_level(level),
        };
        let (chosen, filter) = reload::Layer::new(chosen);
        let lines = fmt::layer().with_writer(stderr).with_ansi(stderr().is_terminal());
        // With it comes what libraries and eBPF programs log through the `log` crate.
        tracing_subscriber::registry()
            .with(chosen)
            .with(lines)
            .try_init()
            .context("cannot set the log up")?;
        Ok(Self { filter, is_fixed })
    }

    /// Logs what is as severe as `level` from now on.
    ///
    /// # Errors
    /// When `RUST_LOG` says what to log.
    pub fn set(&self, level: LogLevel) -> Result<()> {
        anyhow::ensure!(!self.is_fixed, "RUST_LOG says what to log");
        self.filter.reload(of_level(level)).context("the log is gone")
    }
}

/// The libraries' own debug is of no use to who looks for a flow.
fn of_level(level: LogLevel) -> EnvFilter {
    let others = level.min(LogLevel::Warn);
    let programs = level.min(LogLevel::Info);
    EnvFilter::new(format!("{others},pepsal={level},pepsal_ebpf={programs}"))
}
