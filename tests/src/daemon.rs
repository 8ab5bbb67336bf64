//! Runs the built `pepsal` in a namespace.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{self, Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::leg::Leg;
use crate::netns::Namespace;
use crate::wait::{PATIENCE, holds_within};

/// Loading eBPF takes about a second on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const EXIT_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon; dropping it kills the process. The process also ends with the thread that started it.
///
/// Its log is copied line by line to the test's standard error, which libtest shows for a failed test.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    admin_socket: Option<PathBuf>,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

/// The end of a daemon.
#[derive(Debug)]
pub struct Exit {
    /// Exit status.
    pub status: ExitStatus,
    /// All of its standard error.
    pub log: String,
}

impl Exit {
    /// Returns the exit code; none after a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Returns a counter of the lines `flows:` and `packets:` at the stop; 0 if it is missing.
    pub fn counter(&self, name: &str) -> u64 {
        let lines = self.log.lines();
        lines
            .filter(|line| line.contains("flows: ") || line.contains("packets: "))
            .flat_map(str::split_whitespace)
            .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='))
            .map(|figure| figure.parse().expect("figures are numbers"))
            .next()
            .unwrap_or(0)
    }

    /// Returns the signal that ended it, if any.
    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }
}

impl Daemon {
    /// Starts the daemon in `namespace` and waits until its log has `ready`.
    ///
    /// # Errors
    /// When it is not built, exits, or does not become ready; the message contains the log.
    pub fn start(namespace: &Namespace, arguments: &[&str]) -> Result<Self> {
        Self::spawn(&binary()?, namespace, arguments, Echo::On)?.ready()
    }

    /// Starts `binary` in the same way, without copying its log to standard error.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start_quiet(binary: &Path, namespace: &Namespace, arguments: &[&str]) -> Result<Self> {
        Self::spawn(binary, namespace, arguments, Echo::Off)?.ready()
    }

    /// Runs the daemon with arguments or an environment that it has to refuse, and returns its end.
    ///
    /// # Errors
    /// When it succeeds, or does not exit.
    pub fn expect_failure(namespace: &Namespace, arguments: &[&str]) -> Result<Exit> {
        let exit = Self::spawn(&binary()?, namespace, arguments, Echo::On)?.wait()?;
        ensure!(
            !exit.status.success(),
            "pepsal {} succeeded:\n{}",
            arguments.join(" "),
            exit.log
        );
        Ok(exit)
    }

    /// Returns the command that runs the daemon, for changes of its environment; see
    /// [`Daemon::start_command`].
    ///
    /// # Errors
    /// When it is not built.
    pub fn command(namespace: &Namespace, arguments: &[&str]) -> Result<Command> {
        Ok(command(&binary()?, namespace, arguments))
    }

    /// Returns the command that runs the daemon by a program that executes its remaining arguments.
    ///
    /// # Errors
    /// When it is not built.
    pub fn command_by<S: AsRef<OsStr>>(
        namespace: &Namespace,
        by: &[S],
        arguments: &[&str],
    ) -> Result<Command> {
        let daemon = Self::command(namespace, arguments)?;
        let mut command = namespace.command(&by[0]);
        command
            .args(&by[1..])
            .arg(daemon.get_program())
            .args(daemon.get_args());
        Ok(command)
    }

    /// Runs a command of [`Daemon::command`] and waits until its log has `ready`.
    ///
    /// # Errors
    /// See [`Daemon::start`].
    pub fn start_command(command: Command) -> Result<Self> {
        Self::spawn_command(command, Echo::On)?.ready()
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the namespaces of its client legs and its server legs.
    ///
    /// # Errors
    /// When the daemon has ended.
    pub fn namespaces(&self) -> Result<[Namespace; 2]> {
        let process = self.pid();
        let of_thread = |name: &str| {
            for task in fs::read_dir(format!("/proc/{process}/task"))? {
                let task = task?;
                if fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name) {
                    let thread = task.file_name().to_string_lossy().parse()?;
                    return Namespace::of_thread(process, thread, name);
                }
            }
            bail!("process {process} has no thread {name}")
        };
        Ok([of_thread("pepsal-clients")?, of_thread("pepsal-servers")?])
    }

    /// Returns its client legs and server legs.
    ///
    /// # Errors
    /// When the daemon has ended, or `ss` fails.
    pub fn legs(&self) -> Result<Vec<Leg>> {
        let [clients, servers] = self.namespaces()?;
        Ok([Leg::all(&clients)?, Leg::all(&servers)?].concat())
    }

    /// Returns the path of its admin socket.
    pub fn admin_socket(&self) -> &Path {
        let path = self.admin_socket.as_deref();
        path.expect("the daemon was started with an admin socket")
    }

    /// Returns its standard error so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the log contains `text`.
    ///
    /// # Errors
    /// When it does not within [`PATIENCE`].
    pub fn wait_for_log(&self, text: &str) -> Result<()> {
        ensure!(
            holds_within(PATIENCE, || self.log().contains(text)),
            "no {text:?} in the daemon's log after {PATIENCE:?}:\n{}",
            self.log()
        );
        Ok(())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the daemon has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid().try_into().expect("a pid is positive and small"));
        signal::kill(pid, signal).with_context(|| format!("{signal} to the daemon"))
    }

    /// Stops it by SIGTERM, and waits for its exit.
    ///
    /// # Errors
    /// When it does not within 30 s.
    pub fn terminate(self) -> Result<Exit> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }

    /// Kills it (SIGKILL).
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(mut self) -> Result<Exit> {
        self.child.kill()?;
        self.wait()
    }

    /// Waits for its exit.
    ///
    /// # Errors
    /// When it does not within 30 s.
    pub fn wait(self) -> Result<Exit> {
        self.wait_within(EXIT_TIMEOUT)
    }

    /// Waits for its exit.
    ///
    /// # Errors
    /// When it does not within the timeout.
    pub fn wait_within(mut self, timeout: Duration) -> Result<Exit> {
        let Some(status) = self.status_within(timeout)? else {
            bail!("the daemon still runs after {timeout:?}:\n{}", self.log());
        };
        self.join_reader();
        Ok(Exit {
            status,
            log: self.log(),
        })
    }

    fn ready(mut self) -> Result<Self> {
        let is_ready = |daemon: &Self| {
            daemon
                .log()
                .lines()
                .any(|line| line.contains("ready interfaces="))
        };
        holds_within(READY_TIMEOUT, || {
            is_ready(&self) || !matches!(self.child.try_wait(), Ok(None))
        });
        if is_ready(&self) {
            return Ok(self);
        }
        let ended = match self.status_within(Duration::ZERO)? {
            Some(status) => {
                self.join_reader();
                status.to_string()
            }
            None => format!("not ready after {READY_TIMEOUT:?}"),
        };
        bail!("pepsal: {ended}:\n{}", self.log());
    }

    fn spawn(binary: &Path, namespace: &Namespace, arguments: &[&str], echo: Echo) -> Result<Self> {
        Self::spawn_command(command(binary, namespace, arguments), echo)
    }

    fn spawn_command(mut command: Command, echo: Echo) -> Result<Self> {
        let mut child = command
            // Ctrl-C is not for the daemon.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| command.get_program().display().to_string())?;
        let admin_socket = admin_socket(command.get_args());
        let stderr = child.stderr.take().expect("stderr was asked to be piped");
        let log = Arc::<Mutex<String>>::default();
        let reader = thread::spawn({
            let log = Arc::clone(&log);
            move || collect(stderr, &log, echo)
        });
        Ok(Self {
            child,
            admin_socket,
            log,
            reader: Some(reader),
        })
    }

    fn status_within(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        let mut result = Ok(None);
        holds_within(timeout, || {
            result = self.child.try_wait();
            !matches!(result, Ok(None))
        });
        result.context("wait for the daemon")
    }

    fn join_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("collecting lines does not panic");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let group = own_group(self.child.id());
        // Both fail only for a child that has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(group) = group {
            // A later daemon may have removed it already.
            let _ = fs::remove_dir(group);
        }
        if let Some(socket) = &self.admin_socket {
            // Only a killed daemon leaves the file.
            let _ = fs::remove_file(socket);
        }
    }
}

/// Returns the daemon's own control group, which remains after a kill.
fn own_group(pid: u32) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts
        .lines()
        .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [_, mount, "cgroup2", ..] => Some(mount),
            _ => None,
        })?;
    group
        .ends_with(&format!("pepsal.{pid}"))
        .then(|| Path::new(mount).join(group))
}

#[derive(Clone, Copy, PartialEq)]
enum Echo {
    On,
    Off,
}

fn collect(stderr: ChildStderr, log: &Mutex<String>, echo: Echo) {
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    // End of stream and an error both end the log.
    while stderr.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line);
        if echo == Echo::On {
            eprint!("pepsal: {text}");
        }
        log.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
        line.clear();
    }
}

fn command(binary: &Path, namespace: &Namespace, arguments: &[&str]) -> Command {
    let mut command = namespace.command(binary);
    command.args(arguments).env_remove("RUST_LOG");
    // Network namespaces share one file system, in which an installed daemon may use the default socket.
    let is_daemon = arguments.first().is_none_or(|first| first.starts_with('-'));
    if is_daemon && admin_socket(arguments.iter().map(OsStr::new)).is_none() {
        command.arg(ADMIN_SOCKET).arg(own_admin_socket());
    }
    // An installed pepsal uses the default directory.
    if is_daemon && !arguments.contains(&RUNTIME_DIR) && knows(binary, RUNTIME_DIR) {
        command.arg(RUNTIME_DIR).arg(namespace.runtime_directory());
    }
    command
}

/// Returns whether a build has an option: benchmarks compare with older builds. For a program that cannot
/// run, returns true, so that its start fails with the reason.
fn knows(binary: &Path, option: &str) -> bool {
    static HELP: Mutex<BTreeMap<PathBuf, Option<String>>> = Mutex::new(BTreeMap::new());
    let mut help = HELP.lock().unwrap_or_else(PoisonError::into_inner);
    let help = help.entry(binary.to_owned()).or_insert_with(|| {
        let output = Command::new(binary).arg("--help").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    });
    help.as_ref().is_none_or(|text| text.contains(option))
}

/// Returns the path that the arguments give to the admin socket, in either form of an option with a value.
fn admin_socket<'a>(mut arguments: impl Iterator<Item = &'a OsStr>) -> Option<PathBuf> {
    while let Some(argument) = arguments.next() {
        match argument.to_str().and_then(|text| text.strip_prefix(ADMIN_SOCKET)) {
            Some("") => return arguments.next().map(PathBuf::from),
            Some(value) if value.starts_with('=') => return Some(PathBuf::from(&value[1..])),
            _ => {}
        }
    }
    None
}

const ADMIN_SOCKET: &str = "--admin-socket";
const RUNTIME_DIR: &str = "--runtime-dir";

/// Returns a unique path.
fn own_admin_socket() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    env::temp_dir().join(format!("pepsal-test-{}-{number}.sock", process::id()))
}

/// Returns the binary under test: `PEPSAL_BIN`, or the workspace's debug build.
fn binary() -> Result<PathBuf> {
    let path = env::var_os("PEPSAL_BIN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug/pepsal"),
        PathBuf::from,
    );
    path.canonicalize()
        .with_context(|| format!("no daemon at {}: run `cargo xtask build` first", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_daemon_has_an_admin_socket_of_its_own() -> Result<()> {
        let namespace = Namespace::new("own-socket")?;
        let socket = |arguments: &[&str]| {
            let command = command(Path::new("pepsal"), &namespace, arguments);
            admin_socket(command.get_args())
        };
        let sockets = [&[][..], &["-i", "lan0"], &["--config", "pepsal.toml"]].map(socket);
        for (i, path) in sockets.iter().enumerate() {
            let path = path.as_deref().context("a path")?;
            assert!(path.starts_with(env::temp_dir()), "{}", path.display());
            assert!(!sockets[..i].contains(&sockets[i]), "{}", path.display());
        }
        let given = Some(PathBuf::from("/tmp/given.sock"));
        assert_eq!(socket(&["-i", "lan0", ADMIN_SOCKET, "/tmp/given.sock"]), given);
        assert_eq!(socket(&["-i", "lan0", "--admin-socket=/tmp/given.sock"]), given);
        assert_eq!(socket(&["check", "pepsal.toml"]), None);
        Ok(())
    }

    #[test]
    fn builds_are_given_options_that_they_know() {
        let echo = Path::new("/bin/echo");
        assert!(knows(echo, "--help") && !knows(echo, RUNTIME_DIR));
        assert!(knows(Path::new("/no/such/program"), RUNTIME_DIR));
    }
}
