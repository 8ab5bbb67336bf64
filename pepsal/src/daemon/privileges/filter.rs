//! The system call filter (seccomp(2)): listed calls are allowed, all others fail with ENOSYS. A second
//! filter, installed after the programs are loaded, refuses the calls for loading.
//!
//! `ENOSYS`, and neither `EPERM` nor a kill: libraries handle a call that an older kernel lacks, so a C
//! library with other habits causes no outage. The calls of an intruder (execution, other processes, mounts,
//! modules, namespaces) are refused in the same way.

use std::{collections::BTreeMap, env::consts::ARCH};

use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use crate::host::bpf::Command;

/// Phase of the daemon that a filter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Before the programs are loaded.
    Loading,
    /// After the programs are loaded.
    Running,
}

/// System calls of the daemon and its libraries, measured over all end-to-end tests, and their alternatives
/// in other versions of the C library.
const ALLOWED: &[libc::c_long] = &[
    // Sockets
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_socketpair,
    // Descriptors
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_splice,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_restart_syscall,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    // Files: the log, the flow table, /proc and /sys, the control group, Unix sockets
    libc::SYS_chdir,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    // Memory
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, signals to itself and to the process of -M
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_uname,
    // Time, without vDSO
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
];

/// Older forms of these calls, which newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_FORMS: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_setrlimit,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_FORMS: &[libc::c_long] = &[];

/// Additional calls before the programs are loaded: bpf(2) with every command, and the calls that install the
/// second filter.
const LOADING: &[libc::c_long] = &[
    libc::SYS_bpf,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_seccomp,
];

/// Commands of bpf(2) for loaded programs: use of their maps, attachment to interfaces, and queries of
/// attachments. All except the list of an interface's programs need a descriptor, and none returns a
/// descriptor of a program or map that the daemon has not loaded.
const RUNNING: &[Command] = &[
    Command::MapLookupElem,
    Command::MapUpdateElem,
    Command::MapDeleteElem,
    Command::MapGetNextKey,
    Command::MapLookupAndDeleteElem,
    Command::MapLookupBatch,
    Command::LinkCreate,
    Command::ProgQuery,
    Command::ObjGetInfoByFd,
];

/// Installs the filter for this thread and the threads that it starts.
pub fn install(phase: Phase) -> Result<(), seccompiler::Error> {
    apply_filter(&program(phase)?)
}

fn program(phase: Phase) -> Result<BpfProgram, seccompiler::Error> {
    let mut rules: BTreeMap<libc::c_long, Vec<SeccompRule>> = ALLOWED
        .iter()
        .chain(ALLOWED_FORMS)
        .map(|number| (*number, Vec::new()))
        .collect();
    // Threads, but no processes. The C library calls clone3 first, whose flags are in memory and cannot be
    // filtered, and falls back to clone.
    let threads = libc::CLONE_THREAD as u64;
    let is_thread = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::MaskedEq(threads),
        threads,
    )?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![is_thread])?]);
    match phase {
        Phase::Loading => rules.extend(LOADING.iter().map(|number| (*number, Vec::new()))),
        Phase::Running => {
            let commands: Result<_, _> = RUNNING.iter().map(|command| is_command(*command)).collect();
            rules.insert(libc::SYS_bpf, commands?);
        }
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::ENOSYS as u32),
        SeccompAction::Allow,
        ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

fn is_command(command: Command) -> Result<SeccompRule, seccompiler::Error> {
    // The kernel reads an int.
    let (length, command) = (SeccompCmpArgLen::Dword, command as u64);
    let is_command = SeccompCondition::new(0, length, SeccompCmpOp::Eq, command)?;
    Ok(SeccompRule::new(vec![is_command])?)
}

#[cfg(test)]
mod tests {
    use std::{io, net::TcpListener, process, thread};

    use caps::CapSet;
    use nix::{
        errno::Errno,
        mount::umount,
        sched::{CloneFlags, unshare},
        sys::signal::kill,
        unistd::Pid,
    };
    use rustix::process::{PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

    use super::*;
    use crate::host::bpf::bpf;

    /// Runs `work` with both filters, on a thread that ends after it.
    fn filtered<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        filtered_in(&[Phase::Loading, Phase::Running], work)
    }

    fn filtered_in<T: Send>(phases: &[Phase], work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    for phase in phases {
                        install(*phase).expect("this kernel has seccomp");
                    }
                    work()
                })
                .join()
                .expect("what works behind the filter does not panic")
        })
    }

    #[test]
    fn processes_mounts_and_namespaces_are_refused_from_the_first_filter_on() {
        let (spawned, unmounted, unshared) = filtered_in(&[Phase::Loading], || {
            (
                process::Command::new("/bin/true")
                    .status()
                    .map_err(|error| error.raw_os_error()),
                umount("/nosuch"),
                unshare(CloneFlags::CLONE_NEWNS),
            )
        });
        assert_eq!(spawned.unwrap_err(), Some(Errno::ENOSYS as i32));
        assert_eq!(unmounted, Err(Errno::ENOSYS));
        assert_eq!(unshared, Err(Errno::ENOSYS));
    }

    /// Returns the kernel's error for a command with invalid attributes.
    fn answer(command: Command) -> Errno {
        // SAFETY: no pointer is valid, and no descriptor has this number.
        unsafe { bpf(command, &mut [u32::MAX; 32]) }.unwrap_err()
    }

    #[test]
    fn nothing_is_loaded_behind_the_second_filter() {
        const LOADING: [Command; 3] = [Command::MapCreate, Command::ProgLoad, Command::BtfLoad];
        let before = filtered_in(&[Phase::Loading], || LOADING.map(answer));
        assert!(!before.contains(&Errno::ENOSYS), "{before:?}");
        assert_eq!(filtered(|| LOADING.map(answer)), [Errno::ENOSYS; 3]);
    }

    #[test]
    fn maps_and_links_are_used_behind_the_second_filter() {
        for command in RUNNING {
            assert_ne!(filtered(|| answer(*command)), Errno::ENOSYS, "{command:?}");
        }
    }

    #[test]
    fn capabilities_and_filters_are_as_they_are_behind_the_second_filter() {
        let (capabilities, third) = filtered(|| {
            let capabilities = caps::read(None, CapSet::Permitted);
            (capabilities.is_ok(), install(Phase::Running).is_ok())
        });
        assert!(!capabilities && !third);
    }

    #[test]
    fn signals_go_by_descriptor_and_not_by_number() {
        let (by_number, by_descriptor) = filtered(|| {
            let process = pidfd_open(getpid(), PidfdFlags::empty());
            (
                kill(Pid::this(), None),
                process.and_then(|process| {
                    // This signal has no effect.
                    pidfd_send_signal(process, Signal::CONT)
                }),
            )
        });
        assert_eq!(by_number, Err(Errno::ENOSYS));
        assert_eq!(by_descriptor, Ok(()));
    }

    #[test]
    fn threads_and_sockets_work() -> io::Result<()> {
        filtered(|| {
            let listener = thread::spawn(|| TcpListener::bind("127.0.0.1:0"));
            listener.join().expect("binding does not panic").map(|_| ())
        })
    }
}
