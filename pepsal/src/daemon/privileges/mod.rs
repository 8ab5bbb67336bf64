//! Drops privileges before the first connection, in two steps: capabilities, the means to regain them, and
//! unused system calls.
//!
//! [`drop`] keeps the privileges for loading eBPF programs, [`drop_loading`] those of the running daemon.

use std::{io, sync::Once};

use anyhow::{Context, Result, bail};
use caps::{CapSet, Capability, CapsHashSet};
use nix::{
    sys::{
        prctl,
        resource::{RLIM_INFINITY, Resource, setrlimit},
    },
    unistd::{User, initgroups, setgid, setuid},
};
use tracing::warn;

mod filter;

use crate::daemon::privileges::filter::Phase;

/// Capabilities of the running daemon; [`crate::host::requirements`] refuses to start without them. Linux
/// 5.19 and newer require no others for the maps and links of loaded programs, with any value of
/// `kernel.unprivileged_bpf_disabled`.
const KEPT: [Capability; 3] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_NET_BIND_SERVICE,
];

/// Additional capabilities for loading programs.
const LOADING: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_PERFMON];

/// Changes to `user` and its groups; all capabilities stay until [`drop`].
///
/// # Errors
/// When the user does not exist, or the kernel refuses.
pub fn become_user(user: &str) -> Result<()> {
    switch_to(user)?;
    let permitted = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    caps::set(None, CapSet::Effective, &permitted).context("cannot set the effective capabilities")
}

/// Drops all capabilities except the five for loading eBPF programs, permanently, and installs the first
/// system call filter.
///
/// Applies to the calling thread and to threads that it starts.
///
/// # Errors
/// When the kernel refuses a step, except the filter, which is logged as a warning.
pub fn drop() -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let loading = loading(&held);
    // Kernels before 5.11 count eBPF maps as locked memory. If the kernel refuses, the present limit may
    // suffice.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if held.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).context("cannot read the capabilities")?;
        for capability in bounding.difference(&KEPT.into()) {
            caps::drop(None, CapSet::Bounding, *capability)
                .with_context(|| format!("cannot drop {capability} from the bounding set"))?;
        }
    }
    let none = CapsHashSet::new();
    for (set, capabilities) in [
        (CapSet::Ambient, &none),
        (CapSet::Inheritable, &none),
        (CapSet::Effective, &loading),
        (CapSet::Permitted, &loading),
    ] {
        caps::set(None, set, capabilities).context("cannot drop capabilities")?;
    }
    prctl::set_no_new_privs().context("cannot set no_new_privs")?;
    filter(Phase::Loading);
    Ok(())
}

/// Drops the privileges for loading programs, permanently: all capabilities except three, and most commands
/// of bpf(2). From then on the daemon uses eBPF objects by its descriptors.
///
/// Applies to the calling thread and to threads that it starts.
///
/// # Errors
/// When the kernel refuses a step, except the filter, which is logged as a warning.
pub(crate) fn drop_loading() -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let kept = held.intersection(&KEPT.into()).copied().collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).context("cannot drop capabilities")?;
    }
    filter(Phase::Running);
    Ok(())
}

fn filter(phase: Phase) {
    static WARNED: Once = Once::new();
    if let Err(error) = filter::install(phase) {
        // One warning for all threads.
        WARNED.call_once(|| warn!("no system call filter: {error}"));
    }
}

/// Returns the capabilities for loading programs. `CAP_SYS_ADMIN` replaces those that were split from it if
/// they are missing.
fn loading(held: &CapsHashSet) -> CapsHashSet {
    let mut kept: CapsHashSet = KEPT
        .into_iter()
        .chain(LOADING)
        .filter(|capability| held.contains(capability))
        .collect();
    if held.contains(&Capability::CAP_SYS_ADMIN)
        && !LOADING.iter().all(|capability| kept.contains(capability))
    {
        kept.insert(Capability::CAP_SYS_ADMIN);
    }
    kept
}

/// Changes user and groups; the permitted capabilities stay.
fn switch_to(name: &str) -> Result<()> {
    let Some(user) = User::from_name(name).with_context(|| format!("cannot look up user {name}"))? else {
        bail!("user {name}: there is no such user: create it, or leave --user out");
    };
    let terminated = std::ffi::CString::new(name).map_err(io::Error::from)?;
    prctl::set_keepcaps(true)
        .and_then(|()| initgroups(&terminated, user.gid))
        .and_then(|()| setgid(user.gid))
        .and_then(|()| setuid(user.uid))
        .and_then(|()| prctl::set_keepcaps(false))
        .with_context(|| {
            format!("cannot become user {name}: start as root, or as {name} with the capabilities")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_capabilities_stay_of_all_until_programs_are_loaded() {
        let five = KEPT.into_iter().chain(LOADING).collect();
        assert_eq!(loading(&caps::all()), five);
        assert_eq!(loading(&CapsHashSet::new()), CapsHashSet::new());
    }

    #[test]
    fn the_old_capability_stays_where_the_new_ones_are_missing() {
        let old = [
            Capability::CAP_SYS_ADMIN,
            Capability::CAP_NET_ADMIN,
            Capability::CAP_KILL,
        ];
        let stay = [Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN];
        assert_eq!(loading(&old.into()), stay.into());
    }
}
