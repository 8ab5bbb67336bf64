//! Claims of interfaces: at most one instance intercepts an interface, and the next one takes over from it without a gap.
//!
//! A claim is a file below the runtime directory that its process has locked by flock(2). The lock ends with the process,
//! however the process ends. The files are named by network namespace and interface, since namespaces share file
//! systems; each contains its owner's process id, for messages and to find its socket for takeovers. The directory is open
//! to the daemon's user only, so that no other user can hold a lock there, or listen.
//!
//! With `--takeover` the next instance requests the claims by that socket once it is set up beside the running instance:
//! from then on both would intercept. The earlier instance stops intercepting, and passes its locked descriptors on
//! (`SCM_RIGHTS`). The lock belongs to the open file description, so that the claims are free at no moment.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown},
    },
    path::{Path, PathBuf},
    process, thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures_util::{StreamExt, stream::FuturesUnordered};
use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    sys::{
        signal::kill,
        socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg},
    },
    unistd::{Pid, User, geteuid},
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// Default of the runtime directory (`--runtime-dir`).
pub const RUNTIME_DIRECTORY: &str = "/run/pepsal";

/// The directory of the claims, below the runtime directory.
const NAME: &str = "claims";

/// Mode of the directory of the claims, and of its files.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// Mode of a runtime directory that is made: the admin socket in it has a mode of its own.
const RUNTIME_MODE: u32 = 0o755;

/// How often a lock is tried for, and the pause in between: [`Directory::is_alone`] of another instance holds it for a
/// moment, and an instance that stops is about to release it.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// A successor's request, and the first line of the answer. The names of the interfaces follow, a line each, with as many
/// descriptors in the same order.
const TAKE_OVER: &[u8] = b"takeover\n";
const RELEASED: &[u8] = b"released\n";

/// How long a request, and its answer, may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections that may be about to request a takeover at once; more wait until these are over, [`PATIENCE`] at most.
const ASKING_MAX: usize = 16;

/// Descriptors in one message, below the kernel's `SCM_MAX_FD` of 253.
const DESCRIPTORS_MAX: usize = 64;

/// The longest answer, in bytes: more interfaces than a host has.
const ANSWER_MAX: usize = 1 << 20;

/// The directory of the claims, and the network namespace whose interfaces are claimed.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
    /// The inode of the network namespace.
    namespace: u64,
}

impl Directory {
    /// Opens the directory below `runtime`, and makes both where they are missing.
    ///
    /// # Errors
    /// When they cannot be made, or when another user could write there.
    pub fn open(runtime: &Path) -> Result<Self> {
        make(runtime, RUNTIME_MODE)?;
        check(runtime, geteuid().as_raw())?;
        let path = runtime.join(NAME);
        make(&path, DIRECTORY_MODE)?;
        check(&path, geteuid().as_raw())?;
        Self::at(path)
    }

    /// Makes the directories as root for a user that this process is about to become.
    ///
    /// # Errors
    /// When they cannot be made, or when another user could write there.
    pub fn make_for(runtime: &Path, user: &str) -> Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        // A user who does not exist is reported when it is to be become.
        let Ok(Some(user)) = User::from_name(user) else {
            return Ok(());
        };
        let give = |path: &Path| {
            lchown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
                .with_context(|| format!("cannot give {} to user {}", path.display(), user.name))
        };
        if make(runtime, RUNTIME_MODE)? {
            give(runtime)?;
        }
        check(runtime, user.uid.as_raw())?;
        let path = runtime.join(NAME);
        make(&path, DIRECTORY_MODE)?;
        check(&path, user.uid.as_raw())?;
        // What an instance of root's has made: its claims remain, and have to be seen.
        if fs::symlink_metadata(&path)?.uid() == 0 {
            for entry in fs::read_dir(&path)? {
                give(&entry?.path())?;
            }
            give(&path)?;
        }
        Ok(())
    }

    fn at(path: PathBuf) -> Result<Self> {
        let namespace = fs::metadata("/proc/self/ns/net").context("cannot identify the network namespace")?;
        Ok(Self {
            path,
            namespace: namespace.ino(),
        })
    }

    /// Returns whether no other process has a claim in this network namespace; false when that cannot be determined.
    pub fn is_alone(&self) -> bool {
        self.has_no_other().unwrap_or(false)
    }

    fn has_no_other(&self) -> io::Result<bool> {
        let prefix = format!("{}.", self.namespace);
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().starts_with(&prefix) {
                continue;
            }
            let file = match File::open(entry.path()) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if owner(&file) != Some(own_process()) && !lock(&file, Lock::Shared)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// An interface's name contains neither `/` nor `:`.
    fn claim_path(&self, interface: &str) -> PathBuf {
        self.path.join(format!("{}.{interface}", self.namespace))
    }

    fn socket_path(&self, process: i32) -> PathBuf {
        self.path.join(format!("{}:{process}", self.namespace))
    }

    /// Claims an interface for this process.
    fn claim(&self, interface: &str) -> Result<Claim, Refusal> {
        let failed = |error| Refusal::Failed {
            interface: interface.to_owned(),
            error,
        };
        let path = self.claim_path(interface);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let file = open_claim(&path).map_err(failed)?;
            let is_locked = lock(&file, Lock::Exclusive).map_err(failed)?;
            // Its owner may have removed it since it was opened.
            if is_locked && is_at(&file, &path).map_err(failed)? {
                let claim = Claim {
                    interface: interface.to_owned(),
                    path,
                    file,
                };
                claim.sign().map_err(failed)?;
                return Ok(claim);
            }
            if attempt == ATTEMPTS {
                return Err(Refusal::Owned {
                    interface: interface.to_owned(),
                    owner: Owner(owner(&file)),
                });
            }
            thread::sleep(PAUSE);
        }
    }

    /// Removes the sockets of processes that are gone.
    fn remove_stale_sockets(&self) {
        let prefix = format!("{}:", self.namespace);
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let Some(process) = name
                .to_str()
                .and_then(|name| name.strip_prefix(&prefix)?.parse().ok())
            else {
                continue;
            };
            // A process that exists may be about to listen.
            let exists = process != own_process() && kill(Pid::from_raw(process), None) != Err(Errno::ESRCH);
            if !exists && is_refused(&entry.path()) {
                debug!(process, "removing the socket of a process that is gone");
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Makes a directory unless it exists; returns whether it did.
fn make(path: &Path, mode: u32) -> Result<bool> {
    let shown = path.display();
    let made = DirBuilder::new().mode(mode).create(path);
    match made {
        // The umask may have taken bits away.
        Ok(()) => {
            let set = fs::set_permissions(path, Permissions::from_mode(mode));
            set.with_context(|| format!("cannot set the mode of {shown}"))?;
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error).with_context(|| {
            format!(
                "cannot make {shown}: make it for this user, or choose another directory with --runtime-dir"
            )
        }),
    }
}

/// Fails unless only `user` and root can write to a directory.
fn check(path: &Path, user: u32) -> Result<()> {
    let shown = path.display();
    let there = fs::symlink_metadata(path).with_context(|| {
        format!("cannot look at {shown}: run as its user, or choose another directory with --runtime-dir")
    })?;
    let other = "choose another with --runtime-dir";
    ensure!(there.is_dir(), "{shown} is not a directory: {other}");
    let owner = there.uid();
    ensure!(
        owner == user || owner == 0,
        "{shown} belongs to another user (id {owner}): run as that user, or {other}"
    );
    ensure!(
        there.mode() & 0o022 == 0,
        "{shown} can be written to by other users: take that right away, or {other}"
    );
    Ok(())
}

fn own_process() -> i32 {
    process::id().cast_signed()
}

/// The process that the file of a claim names.
fn owner(file: &File) -> Option<i32> {
    let mut text = [0; 16];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}

fn open_claim(path: &Path) -> io::Result<File> {
    // std sets O_CLOEXEC.
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

#[derive(Clone, Copy)]
enum Lock {
    Exclusive,
    Shared,
}

/// Locks a file unless another open file description has a lock that excludes this one; returns whether it did.
fn lock(file: &File, lock: Lock) -> io::Result<bool> {
    use nix::fcntl::FlockArg::{LockExclusiveNonblock, LockSharedNonblock};
    let kind = match lock {
        Lock::Exclusive => LockExclusiveNonblock,
        Lock::Shared => LockSharedNonblock,
    };
    #[expect(
        deprecated,
        reason = "its replacement unlocks when it is dropped, also what was handed over"
    )]
    match nix::fcntl::flock(file.as_raw_fd(), kind) {
        Ok(()) => Ok(true),
        Err(Errno::EWOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the file is still the one of that path.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether nobody listens at a socket; false when that cannot be determined without waiting.
fn is_refused(path: &Path) -> bool {
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    connect().is_err_and(|error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Why an interface cannot be claimed.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "interface {interface}: another pepsal ({owner}) intercepts it already: stop that one first, or take over from \
         it with --takeover"
    )]
    Owned { interface: String, owner: Owner },
    #[error("interface {interface}: cannot lock its file: {error}")]
    Failed { interface: String, error: io::Error },
}

/// The process that has a claim, when its file names it.
#[derive(Debug)]
struct Owner(Option<i32>);

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(process) => write!(f, "process {process}"),
            None => f.write_str("of unknown process"),
        }
    }
}

/// The claim of an interface.
#[derive(Debug)]
struct Claim {
    interface: String,
    path: PathBuf,
    file: File,
}

impl Claim {
    /// Names this process as the owner.
    fn sign(&self) -> io::Result<()> {
        let text = format!("{}\n", own_process());
        self.file.write_all_at(text.as_bytes(), 0)?;
        self.file.set_len(text.len() as u64)
    }

    /// Removes the file; the lock ends with the last of its descriptors.
    fn release(self) {
        // While it is locked no other instance takes it for its own.
        if is_at(&self.file, &self.path).unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The claims of an instance. Dropping it releases them.
#[derive(Debug)]
pub struct Claims(Vec<Claim>);

impl Claims {
    /// Claims the interfaces.
    ///
    /// # Errors
    /// When another instance has one of the interfaces: the error names the interface and the instance's process.
    pub fn acquire(directory: &Directory, interfaces: &[String]) -> Result<Self> {
        let mut claims = Self(Vec::new());
        for interface in interfaces {
            claims.add(directory, interface)?;
        }
        Ok(claims)
    }

    fn add(&mut self, directory: &Directory, interface: &str) -> Result<(), Refusal> {
        // It may be named twice.
        if !self.has(interface) {
            self.0.push(directory.claim(interface)?);
        }
        Ok(())
    }

    fn has(&self, interface: &str) -> bool {
        self.0.iter().any(|claim| claim.interface == interface)
    }

    /// Leaves the files, which are another instance's.
    fn forget(mut self) {
        self.0.clear();
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Claim::release);
    }
}

/// The socket by which the next instance requests a takeover. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Requests {
    listener: UnixListener,
    path: PathBuf,
}

impl Requests {
    /// Listens, and removes the sockets of processes that are gone.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn listen(directory: &Directory) -> Result<Self> {
        directory.remove_stale_sockets();
        let path = directory.socket_path(own_process());
        let shown = path.display();
        let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen at {shown}"))?;
        Ok(Self { listener, path })
    }

    /// Resolves when another instance that may do so requests a takeover.
    pub async fn next(&self) -> Successor {
        let mut asking = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if asking.len() < ASKING_MAX => match accepted {
                    Ok((stream, _)) => asking.push(admit(stream)),
                    Err(error) => {
                        debug!("cannot accept a request for a takeover: {error}");
                        sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(admitted) = asking.next() => if let Some(successor) = admitted {
                    return successor;
                },
            }
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Reads a request, of root or the daemon's own user.
async fn admit(mut stream: UnixStream) -> Option<Successor> {
    let uid = stream.peer_cred().ok()?.uid();
    let is_allowed = uid == 0 || uid == geteuid().as_raw();
    let mut said = [0; TAKE_OVER.len()];
    let read = timeout(PATIENCE, stream.read_exact(&mut said));
    let is_request = is_allowed && matches!(read.await, Ok(Ok(_))) && said == TAKE_OVER;
    (is_request && still_waits(&stream)).then_some(Successor(stream))
}

/// Whether the other end is open: an instance that was kept waiting for too long has ended.
fn still_waits(stream: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
}

/// The instance that has requested the claims of this one.
#[derive(Debug)]
pub struct Successor(UnixStream);

impl Successor {
    /// Returns the process of the successor; none when the kernel cannot name it, as from another PID namespace.
    pub fn process(&self) -> Option<i32> {
        self.0.peer_cred().ok()?.pid()
    }

    /// Passes the locked descriptors to the successor. Without a successor the claims end.
    pub async fn hand_over(mut self, claims: Claims) {
        match timeout(PATIENCE, self.send(&claims)).await {
            Ok(Ok(())) => claims.forget(),
            Ok(Err(error)) => warn!("the successor does not take the claims: {error}"),
            Err(_) => warn!("the successor does not take the claims within {PATIENCE:?}"),
        }
    }

    async fn send(&mut self, claims: &Claims) -> io::Result<()> {
        self.0.write_all(RELEASED).await?;
        for part in claims.0.chunks(DESCRIPTORS_MAX) {
            let names: String = part
                .iter()
                .map(|claim| format!("{}\n", claim.interface))
                .collect();
            let descriptors: Vec<RawFd> = part.iter().map(|claim| claim.file.as_raw_fd()).collect();
            let send = || {
                let rights = [ControlMessage::ScmRights(&descriptors)];
                let data = [IoSlice::new(names.as_bytes())];
                Ok(sendmsg::<()>(
                    self.0.as_raw_fd(),
                    &data,
                    &rights,
                    MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                    None,
                )?)
            };
            let sent = self.0.async_io(Interest::WRITABLE, send).await?;
            self.0.write_all(&names.as_bytes()[sent..]).await?;
        }
        self.0.shutdown().await
    }
}

/// The running instance that is taken over from.
#[derive(Debug)]
pub struct Predecessor {
    /// Process of the running instance.
    pub process: i32,
    directory: Directory,
    interfaces: Vec<String>,
    /// Claims of the interfaces that the running instance does not have.
    claims: Claims,
}

impl Predecessor {
    /// Returns the instance that has any of the interfaces, and claims the others.
    ///
    /// # Errors
    /// When they belong to more than one instance, or cannot be claimed.
    pub fn find(directory: &Directory, interfaces: &[String]) -> Result<Option<Self>> {
        let mut claims = Claims(Vec::new());
        let mut first: Option<(i32, &str)> = None;
        for name in interfaces {
            match (claims.add(directory, name), first) {
                (Ok(()), _) => {}
                (
                    Err(Refusal::Owned {
                        owner: Owner(Some(process)),
                        ..
                    }),
                    None,
                ) => first = Some((process, name)),
                (
                    Err(Refusal::Owned {
                        owner: Owner(Some(process)),
                        ..
                    }),
                    Some((other, its)),
                ) => ensure!(
                    process == other,
                    "cannot take over from both process {other} (interface {its}) and process {process} (interface \
                     {name}): stop one of them"
                ),
                (Err(error), _) => return Err(error.into()),
            }
        }
        Ok(first.map(|(process, _)| Self {
            process,
            directory: directory.clone(),
            interfaces: interfaces.to_vec(),
            claims,
        }))
    }

    /// Requests the running instance's claims, and releases those of interfaces that this instance does not intercept.
    ///
    /// # Errors
    /// When there is no answer in time; the running instance then goes on as before.
    pub async fn take_over(self) -> Result<Claims> {
        let process = self.process;
        let refused = || format!("process {process} does not let go: stop it, or start without --takeover");
        let path = self.directory.socket_path(process);
        let handed = timeout(PATIENCE, request(&path))
            .await
            .with_context(refused)?
            .with_context(refused)?;
        let mut claims = self.claims;
        for (interface, descriptor) in handed {
            let claim = Claim {
                path: self.directory.claim_path(&interface),
                file: descriptor.into(),
                interface,
            };
            match self.interfaces.contains(&claim.interface) {
                true => {
                    let signed = claim.sign();
                    signed.with_context(|| format!("cannot write to {}", claim.path.display()))?;
                    claims.0.push(claim);
                }
                false => claim.release(),
            }
        }
        // One that it had at the start may be released by now.
        for interface in &self.interfaces {
            claims.add(&self.directory, interface)?;
        }
        Ok(claims)
    }
}

/// Requests a takeover, and returns the interfaces that are handed over with their locked files.
async fn request(path: &Path) -> Result<Vec<(String, OwnedFd)>> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(TAKE_OVER).await?;
    let (mut said, mut descriptors) = (Vec::new(), Vec::new());
    while stream
        .async_io(Interest::READABLE, || {
            receive(&stream, &mut said, &mut descriptors)
        })
        .await?
        > 0
    {
        ensure!(said.len() < ANSWER_MAX, "the answer is too long");
    }
    let text = String::from_utf8(said)?;
    let names = text
        .strip_prefix(std::str::from_utf8(RELEASED)?)
        .ok_or_else(|| anyhow!("the answer is not that of a pepsal"))?;
    let names: Vec<String> = names.lines().map(str::to_owned).collect();
    if names.len() != descriptors.len() {
        bail!("{} interfaces with {} claims", names.len(), descriptors.len());
    }
    Ok(names.into_iter().zip(descriptors).collect())
}

/// Reads what there is, and returns its length in bytes; 0 at the end.
fn receive(stream: &UnixStream, said: &mut Vec<u8>, descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut buffer = [0; 4096];
    let mut space = cmsg_space!([RawFd; DESCRIPTORS_MAX]);
    let mut data = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel has just made these descriptors for this process, and nothing else knows them.
            descriptors.extend(
                received
                    .into_iter()
                    .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
            );
        }
    }
    let length = message.bytes;
    said.extend_from_slice(&buffer[..length]);
    Ok(length)
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::symlink,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };

    use super::*;

    /// A runtime directory, removed in the end.
    struct Runtime(PathBuf);

    impl Runtime {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pepsal-claims-{}-{name}", process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }

        fn open(&self) -> Directory {
            Directory::open(&self.0).unwrap()
        }

        fn files(&self) -> Vec<String> {
            let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
            fs::read_dir(self.0.join(NAME)).unwrap().map(name).collect()
        }
    }

    impl Drop for Runtime {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_claim_excludes_others_and_names_its_process_until_it_is_dropped() {
        let runtime = Runtime::new("exclusive");
        let directory = runtime.open();
        let claims = Claims::acquire(&directory, &names(&["a", "b", "a"])).unwrap();
        let error = Claims::acquire(&directory, &names(&["c", "b"]))
            .unwrap_err()
            .to_string();
        let own = process::id();
        let expected =
            format!("interface b: another pepsal (process {own}) intercepts it already: stop that");
        assert!(error.starts_with(&expected), "{error}");
        assert_eq!(runtime.files().len(), 2, "the claim of c is released again");
        drop(claims);
        assert_eq!(runtime.files(), [""; 0]);
        drop(Claims::acquire(&directory, &names(&["a", "b"])).unwrap());
    }

    #[test]
    fn a_file_that_nobody_has_locked_is_no_claim() {
        let runtime = Runtime::new("stale");
        let directory = runtime.open();
        fs::write(directory.claim_path("a"), "1\n").unwrap();
        assert!(directory.is_alone());
        let claims = Claims::acquire(&directory, &names(&["a"])).unwrap();
        let text = fs::read_to_string(directory.claim_path("a")).unwrap();
        assert_eq!(text, format!("{}\n", process::id()));
        drop(claims);
    }

    #[test]
    fn claims_of_other_namespaces_do_not_count() {
        let runtime = Runtime::new("namespaces");
        let directory = runtime.open();
        let other = Directory {
            namespace: directory.namespace + 1,
            ..directory.clone()
        };
        let claims = Claims::acquire(&other, &names(&["a"])).unwrap();
        // Another process's, as far as its file shows.
        claims.0[0].file.write_all_at(b"1\n\0\0\0\0\0", 0).unwrap();
        claims.0[0].file.set_len(2).unwrap();
        assert!(directory.is_alone());
        assert!(!other.is_alone());
        drop(Claims::acquire(&directory, &names(&["a"])).unwrap());
    }

    #[test]
    fn directories_that_others_could_write_to_are_refused() {
        let runtime = Runtime::new("trust");
        let refusal = |path: &Path| Directory::open(path).unwrap_err().to_string();
        drop(runtime.open());
        let claims = runtime.0.join(NAME);
        assert_eq!(fs::metadata(&claims).unwrap().mode() & 0o777, DIRECTORY_MODE);
        for path in [&runtime.0, &claims] {
            let before = fs::metadata(path).unwrap().permissions();
            for mode in [0o770, 0o707] {
                fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
                let error = refusal(&runtime.0);
                assert!(error.contains("can be written to by other users"), "{error}");
            }
            fs::set_permissions(path, before).unwrap();
        }
        let link = Runtime::new("link");
        symlink(&runtime.0, &link.0).unwrap();
        assert!(refusal(&link.0).contains("is not a directory"));
        fs::remove_file(&link.0).unwrap();
        fs::remove_dir(&claims).unwrap();
        symlink("/", &claims).unwrap();
        assert!(refusal(&runtime.0).contains("is not a directory"));
        fs::remove_file(&claims).unwrap();
        let error = refusal(&runtime.0.join("a/b"));
        assert!(error.starts_with("cannot make "), "{error}");
    }

    #[test]
    fn a_link_in_the_place_of_a_claim_is_not_followed() {
        let runtime = Runtime::new("nofollow");
        let directory = runtime.open();
        let precious = runtime.0.join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, directory.claim_path("a")).unwrap();
        let error = Claims::acquire(&directory, &names(&["a"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("interface a: cannot lock its file"), "{error}");
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_successor_gets_what_it_wants_and_the_claims_are_free_at_no_moment() {
        let runtime = Runtime::new("successor");
        let directory = runtime.open();
        let requests = Requests::listen(&directory).unwrap();
        let many: Vec<String> = (0..3 * DESCRIPTORS_MAX).map(|i| format!("if{i}")).collect();
        let claims = Claims::acquire(&directory, &[names(&["left"]), many.clone()].concat()).unwrap();
        let wanted = [names(&["new"]), many].concat();
        let predecessor = Predecessor::find(&directory, &wanted).unwrap().unwrap();
        assert_eq!(predecessor.process, own_process());

        // Somebody else tries for a claim all the time.
        let done = Arc::new(AtomicBool::new(false));
        let file = open_claim(&directory.claim_path("if7")).unwrap();
        let rival = thread::spawn({
            let done = done.clone();
            move || {
                while !done.load(Ordering::Relaxed) {
                    assert!(!lock(&file, Lock::Exclusive).unwrap());
                }
            }
        });
        let hand_over = async { requests.next().await.hand_over(claims).await };
        let (taken, ()) = tokio::join!(predecessor.take_over(), hand_over);
        done.store(true, Ordering::Relaxed);
        rival.join().expect("the claim is free at no moment");

        let taken = taken.unwrap();
        assert_eq!(taken.0.len(), wanted.len());
        assert!(wanted.iter().all(|name| taken.has(name)));
        assert!(!directory.claim_path("left").exists());
        let third = Claims::acquire(&directory, &names(&["left"])).unwrap();
        assert!(Claims::acquire(&directory, &names(&["if7"])).is_err());
        drop((taken, third, requests));
        assert_eq!(runtime.files(), [""; 0]);
    }

    #[tokio::test]
    async fn those_who_connect_and_stay_silent_do_not_keep_a_successor_waiting() {
        let runtime = Runtime::new("silent");
        let directory = runtime.open();
        let requests = Requests::listen(&directory).unwrap();
        let claims = Claims::acquire(&directory, &names(&["a"])).unwrap();
        let path = directory.socket_path(own_process());
        let mut silent = Vec::new();
        for _ in 0..ASKING_MAX - 1 {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        let predecessor = Predecessor::find(&directory, &names(&["a"])).unwrap().unwrap();
        let hand_over = async { requests.next().await.hand_over(claims).await };
        let both = async { tokio::join!(predecessor.take_over(), hand_over).0 };
        let taken = timeout(PATIENCE / 2, both).await.expect("nobody is waited for");
        assert_eq!(taken.unwrap().0.len(), 1);
    }

    #[tokio::test]
    async fn sockets_of_processes_that_are_gone_are_removed() {
        let runtime = Runtime::new("sockets");
        let directory = runtime.open();
        // Above the largest process id that there can be.
        let gone = directory.socket_path(1 << 23);
        drop(UnixListener::bind(&gone).unwrap());
        let lives = directory.socket_path(1);
        drop(UnixListener::bind(&lives).unwrap());
        // Left by a process that had this one's number.
        drop(UnixListener::bind(directory.socket_path(own_process())).unwrap());
        let requests = Requests::listen(&directory).unwrap();
        assert!(!gone.exists());
        assert!(lives.exists(), "a process that exists may be about to listen");
        drop(requests);
        assert_eq!(runtime.files().len(), 1);
    }
}
