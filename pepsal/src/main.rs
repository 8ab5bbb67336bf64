//! The daemon: command line, log, background, runtime; the rest is [`pepsal::run`].

use std::{
    fs::File,
    io::{IsTerminal, Read, Write, stderr},
    process::ExitCode,
    thread,
};

use anyhow::{Context, Result};
use clap::Parser;
use nix::{
    fcntl::OFlag,
    unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid},
};
use pepsal::{cgroup::OwnCgroup, cli::Options, privileges};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let options = Options::parse();
    match start(options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pepsal: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(options: Options) -> Result<ExitCode> {
    let background = match options.daemon {
        true => match background()? {
            Background::Parent(code) => return Ok(code),
            Background::Child(told) => Some(told),
        },
        false => None,
    };
    log(options.verbose)?;
    if options.explain {
        let (profiles, _rate_control) = pepsal::explain(&options)?;
        for profile in profiles {
            println!("{profile}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    // Where cgroup v2 is hidden, it has to be mounted; and sockets belong to the group that their process was in.
    let cgroup = OwnCgroup::enter();
    privileges::drop(options.user.as_deref())?;
    let threads = options.threads.map_or_else(
        || thread::available_parallelism().map_or(1, usize::from),
        usize::from,
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("pepsal")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ran = runtime.block_on(pepsal::run(options, cgroup, || {
        if let Some(told) = background {
            detach(told);
        }
    }));
    // A second signal ends it at once, whatever is still open.
    runtime.shutdown_background();
    ran.map(|()| ExitCode::SUCCESS)
}

fn log(verbose: u8) -> Result<()> {
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    // The libraries' own debug is of no use to who looks for a flow.
    let default = format!("warn,pepsal={level},pepsal_ebpf=info");
    let filter = match std::env::var("RUST_LOG") {
        Ok(directives) if !directives.is_empty() => EnvFilter::try_new(&directives)
            .with_context(|| format!("RUST_LOG={directives} is not a log filter"))?,
        _ => EnvFilter::new(default),
    };
    // What eBPF programs log comes through the `log` crate.
    tracing_log::LogTracer::init().context("cannot set the log up")?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .finish();
    tracing::subscriber::set_global_default(subscriber).context("cannot set the log up")
}

enum Background {
    /// The process that the user started, and how it has to end.
    Parent(ExitCode),
    /// The one that stays, and where it says that it is ready.
    Child(File),
}

/// Forks. The parent ends when the child is ready, or has failed and has said why.
fn background() -> Result<Background> {
    let (ready, told) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    // SAFETY: there is only one thread yet.
    match unsafe { fork() }.context("cannot go to the background")? {
        ForkResult::Parent { .. } => {
            drop(told);
            let said = File::from(ready).read(&mut [0]).unwrap_or(0);
            Ok(Background::Parent(if said == 1 {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }))
        }
        ForkResult::Child => {
            setsid().context("cannot leave the terminal's session")?;
            Ok(Background::Child(told.into()))
        }
    }
}

/// Leaves the terminal and the directory. A log that goes to a file or to a journal goes on.
fn detach(mut told: File) {
    let _ = chdir("/");
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = dup2_stdin(&null);
        let _ = dup2_stdout(&null);
        if stderr().is_terminal() {
            let _ = dup2_stderr(&null);
        }
    }
    let _ = told.write_all(b"1");
}
