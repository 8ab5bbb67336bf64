//! bpf(2), for commands without a call in aya.

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

/// Calls bpf(2). Returns a descriptor, or zero. `attributes` is the part of `union bpf_attr` that the command
/// needs; the kernel writes results into it.
///
/// # Safety
/// `T` has the layout of the command's attributes. Pointers in it are valid, for as many bytes as the command
/// accesses.
///
/// # Errors
/// Errors of bpf(2).
pub unsafe fn bpf<T>(command: Command, attributes: &mut T) -> nix::Result<RawFd> {
    // SAFETY: the kernel gets the size of the attributes; the caller guarantees the rest.
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
