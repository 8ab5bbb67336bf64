//! What the daemon gives up before the first connection, in two steps: capabilities, the way back to them, and the system
//! calls that it has no use for.
//!
//! [`drop`] leaves what loading eBPF programs takes, [`drop_loading`] what the daemon does from then on.

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

/// What is kept for as long as the daemon runs; [`crate::host::requirements`] refuses to start without. Linux 5.19 and newer
/// want no more for the maps and links of programs that are loaded, whatever `kernel.unprivileged_bpf_disabled` is.
const KEPT: [Capability; 3] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_NET_BIND_SERVICE,
];

/// What loading programs takes besides.
const LOADING: [Capability; 2] = [Capability::CAP_BPF, Capability::CAP_PERFMON];

/// Becomes `user` with its groups; all capabilities stay until [`drop`].
///
/// # Errors
/// When there is no such user, or the kernel refuses.
pub fn become_user(user: &str) -> Result<()> {
    switch_to(user)?;
    let permitted = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    caps::set(None, CapSet::Effective, &permitted).context("cannot set the effective capabilities")
}

/// Keeps the five capabilities with which eBPF programs are loaded, if they are there, gives up all others, for good, and
/// has the kernel refuse system calls that the daemon does not make.
///
/// All of it belongs to the calling thread, and to those that it starts.
///
/// # Errors
/// When the kernel refuses something other than the filter, which is only warned about.
pub fn drop() -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("cannot read the capabilities")?;
    let loading = loading(&held);
    // Kernels before 5.11 count eBPF maps as locked memory. Where this is refused, what is allowed may still do.
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

/// Gives up what only loading programs takes, for good: all but three capabilities, and most commands of bpf(2). What the
/// daemon needs of eBPF from then on goes by the descriptors that it has.
///
/// All of it belongs to the calling thread, and to those that it starts.
///
/// # Errors
/// When the kernel refuses something other than the filter, which is only warned about.
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
        // Every thread would say the same.
        WARNED.call_once(|| warn!("no system call filter: {error}"));
    }
}

/// `CAP_SYS_ADMIN` stays where it has to stand for what was split from it.
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

/// Becomes a user with its groups; what is permitted stays so.
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
