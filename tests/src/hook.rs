//! Detaches and counts programs on TC hooks, as an administrator would.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;

use crate::netns::Namespace;

const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_LINK_DETACH: libc::c_int = 34;
const MOST: usize = 64;

/// `union bpf_attr` for BPF_PROG_QUERY.
#[repr(C)]
#[derive(Default)]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    _pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// A hook of tcx.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Hook {
    /// BPF_TCX_INGRESS
    Ingress = 46,
    /// BPF_TCX_EGRESS
    Egress = 47,
}

/// Detaches every program from a hook, as `bpftool link detach` does, and returns their number.
///
/// # Errors
/// Without root, or on a kernel without tcx.
pub fn detach_programs(namespace: &Namespace, interface: &str, hook: Hook) -> Result<usize> {
    namespace.run(|| {
        let links = links(interface, hook)?;
        for id in &links {
            let descriptor =
                bpf(BPF_LINK_GET_FD_BY_ID, &mut [*id, 0, 0, 0]).context("BPF_LINK_GET_FD_BY_ID")?;
            // SAFETY: the kernel has just returned this descriptor.
            let link = unsafe { File::from_raw_fd(descriptor) };
            bpf(BPF_LINK_DETACH, &mut [link.as_raw_fd().cast_unsigned(), 0, 0, 0])
                .context("BPF_LINK_DETACH")?;
        }
        Ok(links.len())
    })
}

/// Returns the number of programs on a hook.
///
/// # Errors
/// As for [`detach_programs`].
pub fn count_programs(namespace: &Namespace, interface: &str, hook: Hook) -> Result<usize> {
    namespace.run(|| Ok(links(interface, hook)?.len()))
}

fn links(interface: &str, hook: Hook) -> Result<Vec<u32>> {
    let (mut programs, mut links) = ([0_u32; MOST], [0_u32; MOST]);
    let mut query = Query {
        target_ifindex: if_nametoindex(interface).context(interface.to_owned())?,
        attach_type: hook as u32,
        prog_ids: programs.as_mut_ptr() as u64,
        link_ids: links.as_mut_ptr() as u64,
        count: MOST as u32,
        ..Query::default()
    };
    bpf(BPF_PROG_QUERY, &mut query).context("BPF_PROG_QUERY")?;
    Ok(links[..query.count as usize].to_vec())
}

fn bpf<T>(command: libc::c_int, attributes: &mut T) -> Result<i32> {
    // SAFETY: the kernel gets the size of the attributes and of their arrays.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    Ok(i32::try_from(Errno::result(result)?)?)
}
