//! Hash maps of the kernel, by the system calls that save others: reading some thousand entries at once
//! (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6), and taking one out (`BPF_MAP_LOOKUP_AND_DELETE_ELEM`, Linux 5.14).
//!
//! The kernel walks from bucket to bucket. Entries that are added or removed meanwhile neither end the walk nor restart it,
//! as they can with `BPF_MAP_GET_NEXT_KEY`; the result may contain them or not.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use aya::Pod;
use nix::errno::Errno;

use crate::host::bpf::{Command, bpf};

/// Entries that one call returns at most. More than this is needed only where a single bucket has more.
const ENTRIES: usize = 4096;

/// `union bpf_attr` for the batch commands.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr` for the commands on one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Removes an entry of a hash map and returns its value.
///
/// # Errors
/// `NotFound` when there is none.
pub fn take<K: Pod, V: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<V> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut element = Element {
        map_fd: map.as_raw_fd().cast_unsigned(),
        _pad: 0,
        key: &raw const *key as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads a key and writes a value of the sizes that the map was made with, which are those of the
    // types, and any bytes are a value.
    unsafe {
        bpf(Command::MapLookupAndDeleteElem, &mut element)?;
        Ok(value.assume_init())
    }
}

/// Returns every entry of a hash map whose keys and values have these types.
///
/// # Errors
/// When the kernel refuses the system call.
pub fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>) -> io::Result<Vec<(K, V)>> {
    let mut entries = Vec::new();
    let (mut keys, mut values) = (Vec::<K>::with_capacity(ENTRIES), Vec::<V>::with_capacity(ENTRIES));
    let mut place: Option<u32> = None;
    loop {
        let mut next = 0_u32;
        let room = keys.capacity().min(values.capacity());
        let mut batch = Batch {
            in_batch: place.as_ref().map_or(0, |place| &raw const *place as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel writes at most `count` keys and values of the sizes that the map was made with, which are
        // those of the types, and the four bytes of the next place.
        let result = unsafe { bpf(Command::MapLookupBatch, &mut batch) };
        let is_last = match result {
            Ok(_) => false,
            Err(Errno::ENOENT) => true,
            // A bucket has more than there was room for.
            Err(Errno::ENOSPC) => {
                keys.reserve_exact(2 * room);
                values.reserve_exact(2 * room);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let count = room.min(batch.count as usize);
        // SAFETY: the kernel has written so many of each, and any bytes are a value of such a type.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        entries.extend(keys.drain(..).zip(values.drain(..)));
        if is_last {
            return Ok(entries);
        }
        place = Some(next);
    }
}
