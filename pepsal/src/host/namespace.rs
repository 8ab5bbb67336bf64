//! The daemon's network namespaces. They have no name, and end with the process.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::mpsc::{Sender, channel},
    thread,
};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};

/// A network namespace with a thread in it. Sockets, threads and interfaces that the thread creates belong to
/// the namespace.
#[derive(Debug)]
pub struct Namespace {
    file: File,
    work: Sender<Work<'static>>,
}

type Work<'a> = Box<dyn FnOnce() + Send + 'a>;

impl Namespace {
    /// Creates a namespace, in which no interface is up. Its thread has this name, and drops its privileges
    /// by `give_up`.
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN, or when the thread cannot be started.
    pub fn new(name: &str, give_up: fn() -> Result<()>) -> Result<Self> {
        Self::entered_by(name, move || {
            let file = enter_new()?;
            give_up()?;
            Ok(file)
        })
    }

    /// Returns the namespace of the calling thread, with a new thread in it.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn of_host() -> Result<Self> {
        Self::entered_by("pepsal-host", open)
    }

    fn entered_by(name: &str, enter: impl FnOnce() -> Result<File> + Send + 'static) -> Result<Self> {
        let (work, to_do) = channel::<Work<'static>>();
        let (made, result) = channel();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let file = enter();
            let is_made = file.is_ok();
            // The receiver is gone after `new` has returned.
            let _ = made.send(file);
            if is_made {
                to_do.into_iter().for_each(|work| work());
            }
        })?;
        let file = result
            .recv()
            .context("the thread of a network namespace has ended")??;
        Ok(Self { file, work })
    }

    /// Runs `work` on the namespace's thread, waits for it, and returns its value. Panics if `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let (done, result) = channel();
        let work: Work<'_> = Box::new(move || {
            let value = catch_unwind(AssertUnwindSafe(work));
            // The caller waits for the value.
            let _ = done.send(value);
        });
        // SAFETY: the borrows of the work outlive it, since this function returns only after the work is
        // done, or dropped with the channel.
        let work = unsafe { std::mem::transmute::<Work<'_>, Work<'static>>(work) };
        let sent = self.work.send(work);
        match (sent, result.recv()) {
            (Ok(()), Ok(Ok(value))) => value,
            (Ok(()), Ok(Err(panic))) => resume_unwind(panic),
            _ => unreachable!("a namespace's thread ends after the namespace"),
        }
    }

    /// Opens a netlink socket in the namespace, served by the calling task's runtime.
    ///
    /// # Errors
    /// When the kernel refuses a socket.
    pub fn netlink(&self) -> Result<rtnetlink::Handle> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = self.run(|| {
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        })?;
        tokio::spawn(connection);
        Ok(handle)
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn enter_new() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
        nix::errno::Errno::EPERM => anyhow::anyhow!(
            "cannot create a network namespace: missing CAP_SYS_ADMIN, which is needed at the start only: run as root, or \
             grant it to the service"
        ),
        other => anyhow::Error::new(io::Error::from(other)).context("cannot create a network namespace"),
    })?;
    open()
}

fn open() -> Result<File> {
    File::open("/proc/thread-self/ns/net").context("cannot open a network namespace")
}
