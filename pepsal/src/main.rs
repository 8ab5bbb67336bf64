//! The daemon: command line, log, background, runtime; the rest is [`daemon::run`].

use std::{
    env,
    ffi::OsString,
    fs::File,
    io::{IsTerminal, Read, Write, stderr},
    process::{self, ExitCode},
};

use anyhow::{Context, Result};
use clap::Parser;
use nix::{
    fcntl::OFlag,
    unistd::{ForkResult, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid},
};
use pepsal::{
    cli::{Cli, Command},
    config::{self, Configuration},
    ctl,
    daemon::{self, privileges},
    host::{cgroup::OwnCgroup, requirements},
    observe::log::Log,
    wire::{Namespaces, claims},
};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    let ended = match Cli::parse_from(&arguments).command {
        None => match Configuration::load(arguments) {
            Ok(configuration) => start(configuration),
            Err(problems) => Ok(config::refuse(&problems)),
        },
        Some(Command::Check { file }) => Ok(config::check(&file)),
        Some(Command::Status(arguments)) => ctl::status::run(&arguments),
        Some(Command::Flows(arguments)) => ctl::flows::run(&arguments),
        Some(Command::Clients(arguments)) => ctl::clients::run(&arguments),
        Some(Command::Top(arguments)) => ctl::top::run(&arguments),
        Some(Command::Close(arguments)) => ctl::close::run(&arguments),
        Some(Command::Doctor(arguments)) => ctl::doctor::run(&arguments),
        Some(Command::Reload(arguments)) => ctl::reload::run(&arguments),
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("pepsal: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(configuration: Configuration) -> Result<ExitCode> {
    let options = &configuration.options;
    let background = match options.daemon {
        true => match background()? {
            Background::Parent(code) => return Ok(code),
            Background::Child(told) => Some(told),
        },
        false => None,
    };
    let log = Log::start(options.level())?;
    if options.explain {
        for profile in daemon::profiles::explain(options)? {
            println!("{profile}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    // First, because cgroup v2 may have to be mounted, and a socket belongs to the group of its process at
    // creation.
    let cgroup = OwnCgroup::enter();
    requirements::check()?;
    if let Some(user) = &options.user {
        claims::Directory::make_for(&options.runtime_dir, user)?;
        privileges::become_user(user)?;
    }
    let namespaces = Namespaces::new(privileges::drop)?;
    privileges::drop()?;
    // Flows run on other threads and runtimes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ran = runtime.block_on(daemon::run(configuration, &log, cgroup, namespaces, || {
        if let Some(told) = background {
            detach(told);
        }
    }));
    // After a second signal open flows do not delay the exit.
    runtime.shutdown_background();
    ran.map(|()| ExitCode::SUCCESS)
}

enum Background {
    /// The foreground process, with its exit code.
    Parent(ExitCode),
    /// The background process, with the pipe that reports readiness.
    Child(File),
}

/// Forks twice. The first process exits when the last one is ready or has failed with an error message. The
/// middle one exits at once, so that init is the parent of the last, which a service manager can then
/// supervise.
fn background() -> Result<Background> {
    let (ready, told) = pipe2(OFlag::O_CLOEXEC).context("cannot create a pipe")?;
    if fork_off()? {
        drop(told);
        let said = File::from(ready).read(&mut [0]).unwrap_or(0);
        return Ok(Background::Parent(match said {
            1 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        }));
    }
    setsid().context("cannot create a session")?;
    if fork_off()? {
        process::exit(0);
    }
    Ok(Background::Child(told.into()))
}

/// Forks; returns whether this is the parent.
fn fork_off() -> Result<bool> {
    // SAFETY: the process has one thread.
    let forked = unsafe { fork() }.context("cannot fork")?;
    Ok(matches!(forked, ForkResult::Parent { .. }))
}

/// Detaches from the terminal and the directory. A log to a file or a journal continues.
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
