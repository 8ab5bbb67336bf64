//! Lists the programs on a TC hook of an interface (`BPF_PROG_QUERY`, tcx, Linux 6.6). By their identifiers alone: their
//! names take CAP_SYS_ADMIN, which the daemon has given up.

use std::io;

use aya::programs::TcAttachType;
use nix::net::if_::if_nametoindex;

use crate::host::bpf::{Command, bpf};

/// `enum bpf_attach_type` of `uapi/linux/bpf.h`.
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// Programs that a hook may have: the kernel allows 64 (`BPF_MPROG_MAX` of `linux/bpf_mprog.h`).
const PROGRAMS: usize = 64;

/// `union bpf_attr` for `BPF_PROG_QUERY`.
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

/// Returns the identifiers of the programs on a hook, in the order in which they run.
///
/// # Errors
/// When there is no such interface, or the kernel has no tcx.
pub fn programs(interface: &str, direction: TcAttachType) -> io::Result<Vec<u32>> {
    let mut ids = [0_u32; PROGRAMS];
    let mut query = Query {
        target_ifindex: if_nametoindex(interface)?,
        attach_type: match direction {
            TcAttachType::Egress => BPF_TCX_EGRESS,
            _ => BPF_TCX_INGRESS,
        },
        prog_ids: ids.as_mut_ptr() as u64,
        count: PROGRAMS as u32,
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `count` identifiers.
    unsafe { bpf(Command::ProgQuery, &mut query) }?;
    Ok(ids[..PROGRAMS.min(query.count as usize)].to_vec())
}
