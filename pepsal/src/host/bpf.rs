//! bpf(2), for the commands that aya has no call for.

use std::os::fd::RawFd;

use nix::{
    errno::Errno,
    libc::{self, c_int},
};

/// Commands of bpf(2): `enum bpf_cmd` of `uapi/linux/bpf.h`, as far as the daemon and aya use them.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
pub enum Command {
    MapCreate = 0,
    MapLookupElem = 1,
    MapUpdateElem = 2,
    MapDeleteElem = 3,
    MapGetNextKey = 4,
    ProgLoad = 5,
    ObjGetInfoByFd = 15,
    ProgQuery = 16,
    BtfLoad = 18,
    MapLookupAndDeleteElem = 21,
    MapLookupBatch = 24,
    LinkCreate = 28,
}

/// Gives a command to the kernel, and returns its answer: a descriptor, or zero. `attributes` is as much of `union bpf_attr` as
/// the command needs; the kernel writes results into it.
///
/// # Safety
/// `T` is laid out as the command has it. What pointers in it lead to is there, and as large as the command wants it.
///
/// # Errors
/// The kernel's.
pub unsafe fn bpf<T>(command: Command, attributes: &mut T) -> nix::Result<RawFd> {
    // SAFETY: the kernel is told how large the attributes are; the rest is the caller's to see to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as c_int,
            &raw mut *attributes,
            size_of::<T>(),
        )
    };
    Ok(Errno::result(result)? as RawFd)
}
