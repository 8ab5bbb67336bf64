//! The log, to standard error: its level can change while the daemon runs, and a rate limit keeps remote
//! peers from filling a disk.

use std::{
    fmt::{Display, Formatter},
    io::{IsTerminal, stderr},
    panic,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use tracing::{Event, Level, Metadata, error};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt,
    layer::{Context as LayerContext, Filter, SubscriberExt},
    reload,
    util::SubscriberInitExt,
};

/// Log level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// Errors that end the daemon
    Error,
    /// Problems for the operator
    Warn,
    /// Changes of state
    Info,
    /// Every flow
    Debug,
    /// Details, such as refused socket options
    Trace,
}

impl Display for LogLevel {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

/// The log of this process.
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    /// Whether `RUST_LOG` sets the level, which takes precedence.
    is_fixed: bool,
}

impl Log {
    /// Starts the log at `level`, or with the filter of `RUST_LOG`.
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
        let lines = lines.with_filter(Bounded::default());
        // Also receives the messages of libraries and eBPF programs through the `log` crate.
        tracing_subscriber::registry()
            .with(chosen)
            .with(lines)
            .try_init()
            .context("cannot set up the log")?;
        panic::set_hook(Box::new(|panic| {
            let panic = panic.to_string().replace('\n', " ");
            error!("internal error: {panic}");
        }));
        Ok(Self { filter, is_fixed })
    }

    /// Sets the log level.
    ///
    /// # Errors
    /// When `RUST_LOG` sets the filter.
    pub fn set(&self, level: LogLevel) -> Result<()> {
        anyhow::ensure!(!self.is_fixed, "RUST_LOG sets the log level");
        self.filter.reload(of_level(level)).context("the log is closed")
    }
}

const LINES_PER_SECOND: u64 = 100;

static SUPPRESSED: AtomicU64 = AtomicU64::new(0);

/// Returns the number of lines dropped by the rate limit.
pub(crate) fn suppressed() -> u64 {
    SUPPRESSED.load(Ordering::Relaxed)
}

/// The rate limit of lines up to level info; debug and trace have no limit.
#[derive(Default)]
struct Bounded(Mutex<Option<Window>>);

struct Window {
    since: Instant,
    lines: u64,
}

impl Bounded {
    /// Returns whether the limit admits one more line.
    fn admit(&self, now: Instant) -> bool {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *window {
            Some(window) if now.duration_since(window.since) < Duration::from_secs(1) => {
                window.lines += 1;
                window.lines <= LINES_PER_SECOND
            }
            window => {
                *window = Some(Window { since: now, lines: 1 });
                true
            }
        }
    }
}

impl<S> Filter<S> for Bounded {
    fn enabled(&self, _: &Metadata<'_>, _: &LayerContext<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &LayerContext<'_, S>) -> bool {
        if *event.metadata().level() > Level::INFO || self.admit(Instant::now()) {
            return true;
        }
        SUPPRESSED.fetch_add(1, Ordering::Relaxed);
        false
    }
}

/// Returns the filter of a level. It excludes debug messages of libraries, and netlink_proto's warning about
/// late replies at a stop.
fn of_level(level: LogLevel) -> EnvFilter {
    let others = level.min(LogLevel::Warn);
    let programs = level.min(LogLevel::Info);
    EnvFilter::new(format!(
        "{others},netlink_proto=error,pepsal={level},pepsal_ebpf={programs}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_so_many_lines_and_the_next_as_many_again() {
        let (log, start) = (Bounded::default(), Instant::now());
        let admitted = |now| (0..1000).filter(|_| log.admit(now)).count() as u64;
        assert_eq!(admitted(start), LINES_PER_SECOND);
        assert_eq!(admitted(start + Duration::from_millis(999)), 0);
        assert_eq!(admitted(start + Duration::from_secs(1)), LINES_PER_SECOND);
    }
}
