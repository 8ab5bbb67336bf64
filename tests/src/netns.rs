//! Network namespaces without names.

use std::env;
use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};

/// A network namespace, which exists while this value, its threads or its processes exist.
///
/// It has no entry in `/run/netns`, so that it ends even after SIGKILL.
pub struct Namespace {
    name: String,
    handle: Arc<File>,
    runtime: RuntimeDirectory,
}

/// Directory in which the daemons of a namespace claim interfaces; removed on drop.
struct RuntimeDirectory(PathBuf);

impl RuntimeDirectory {
    /// Returns a unique path.
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(env::temp_dir().join(format!("pepsal-run-{}-{number}", process::id())))
    }
}

impl Drop for RuntimeDirectory {
    fn drop(&mut self) {
        // Without a daemon the directory does not exist.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Namespace {
    /// Creates a namespace with loopback up; `name` is for errors and thread names.
    ///
    /// # Errors
    /// Without root.
    pub fn new(name: &str) -> Result<Self> {
        let handle = on_own_thread(name, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                Errno::EPERM => anyhow!("network namespaces need root: run this as root or with sudo"),
                other => anyhow!(other).context("unshare(CLONE_NEWNET)"),
            })?;
            File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")
        })?;
        let namespace = Self {
            name: name.to_owned(),
            handle: Arc::new(handle),
            runtime: RuntimeDirectory::new(),
        };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Returns the namespace of a thread.
    ///
    /// # Errors
    /// When the thread has ended.
    pub fn of_thread(process: u32, thread: u32, name: &str) -> Result<Self> {
        let path = format!("/proc/{process}/task/{thread}/ns/net");
        Ok(Self {
            name: name.to_owned(),
            handle: Arc::new(File::open(&path).context(path)?),
            runtime: RuntimeDirectory::new(),
        })
    }

    /// Returns the name given to [`Namespace::new`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the runtime directory of the namespace's daemons, which the first of them creates.
    pub fn runtime_directory(&self) -> &Path {
        &self.runtime.0
    }

    /// Returns the file by which a daemon claims an interface of this namespace.
    ///
    /// # Errors
    /// When the namespace cannot be read.
    pub fn claim(&self, interface: &str) -> Result<PathBuf> {
        let inode = self.handle.metadata().context("the namespace's file")?.ino();
        Ok(self.runtime.0.join(format!("claims/{inode}.{interface}")))
    }

    /// Returns a path of this namespace for other processes; iproute2 accepts it as a `netns` argument.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", process::id(), self.handle.as_raw_fd()))
    }

    /// Runs `work` on a new thread in the namespace and returns its value. Panics if `work` panics.
    ///
    /// Sockets belong to the namespace of their creation, so they can be used on any thread.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        on_own_thread(&self.name, || {
            enter(&self.handle).expect("a namespace that we hold lets root in");
            work()
        })
    }

    /// Starts a thread in the namespace.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let handle = Arc::clone(&self.handle);
        thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                enter(&handle).expect("a namespace that we hold lets root in");
                drop(handle);
                work()
            })
            .expect("threads are far from their limit")
    }

    /// Returns a command that runs in the namespace and is killed when the *thread* that starts it ends: do
    /// not start a longer-lived process from within [`Namespace::run`].
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let handle = Arc::clone(&self.handle);
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure only makes system calls; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                // The command must not inherit the caller's blocked signals.
                SigSet::empty().thread_set_mask().map_err(io::Error::from)?;
                prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)?;
                enter(&handle)
            });
        }
        command
    }

    /// Runs iproute2 in the namespace; each line of `commands` has the arguments of `ip`, without options.
    ///
    /// # Errors
    /// The namespace and iproute2's error of the first line that fails.
    pub fn ip(&self, commands: impl AsRef<str>) -> Result<()> {
        self.feed(&["ip", "-batch", "-"], "iproute2", commands.as_ref())
    }

    /// Runs `ip -6`, for rules and default routes of IPv6.
    ///
    /// # Errors
    /// As for [`Namespace::ip`].
    pub fn ip6(&self, commands: impl AsRef<str>) -> Result<()> {
        self.feed(&["ip", "-6", "-batch", "-"], "iproute2", commands.as_ref())
    }

    /// Adds `ruleset` to the namespace's nftables, atomically.
    ///
    /// # Errors
    /// The namespace and nft's error.
    pub fn nft(&self, ruleset: impl AsRef<str>) -> Result<()> {
        self.feed(&["nft", "-f", "-"], "nftables", ruleset.as_ref())
    }

    /// Runs a program of Debian's `package` that reads `input`.
    fn feed(&self, command: &[&str], package: &str, input: &str) -> Result<()> {
        let mut child = self
            .command(command[0])
            .args(&command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run `{}` (Debian's package {package})", command[0]))?;
        let mut stdin = child.stdin.take().expect("stdin was asked to be piped");
        stdin
            .write_all(input.as_bytes())
            .with_context(|| command.join(" "))?;
        drop(stdin);
        let output = child.wait_with_output().with_context(|| command.join(" "))?;
        ensure!(
            output.status.success(),
            "{}: {} {}: {}",
            self.name,
            command[0],
            input.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// Sets a `net.` sysctl of the namespace, written with dots or slashes.
    ///
    /// # Errors
    /// When the kernel has no such key or refuses the value.
    pub fn sysctl(&self, key: &str, value: impl Display) -> Result<()> {
        let path = PathBuf::from("/proc/sys").join(key.replace('.', "/"));
        let value = value.to_string();
        self.run(|| fs::write(&path, &value))
            .with_context(|| format!("{}: sysctl {key}={value}", self.name))
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Namespace({})", self.name)
    }
}

fn enter(handle: &impl AsFd) -> io::Result<()> {
    setns(handle, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

fn on_own_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, work)
            .expect("threads are far from their limit")
            .join()
            .unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}
