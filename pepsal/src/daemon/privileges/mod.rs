//! What the daemon gives up before the first connection: capabilities, the way back to them, and the system calls that
//! it has no use for.

use std::io;

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

/// What is kept; [`crate::host::requirements`] refuses to start without.
const KEPT: [Capability; 5] = [
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_NET_BIND_SERVICE,
];

/// Becomes `user` with its groups; all capabilities stay until [`drop`].
///
/// # Errors
/// When there is no such user, or the kernel refuses.
pub fn become_user(user: &str) -> Result<()> {
    switch_to(user)?;
    let permitted = caps::read(None, CapSet::Permitted).context("cannot tell the capabilities")?;
    caps::set(None, CapSet::Effective, &permitted).context("cannot use capabilities")
}

/// Keeps five capabilities, if they are there, gives up all others, for good, and has the kernel refuse system calls that
/// the daemon does not make.
///
/// All of it belongs to the calling thread, and to those that it starts.
///
/// # Errors
/// When the kernel refuses something other than the filter, which is only warned about.
pub fn drop() -> Result<()> {
    let held = caps::read(None, CapSet::Permitted).context("cannot tell the capabilities")?;
    let kept = kept(&held);
    // Kernels before 5.11 count eBPF maps as locked memory. Where this is refused, what is allowed may still do.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if held.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).context("cannot tell the capabilities")?;
        for capability in bounding.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)
                .with_context(|| format!("cannot give up {capability}"))?;
        }
    }
    let none = CapsHashSet::new();
    for (set, capabilities) in [
        (CapSet::Ambient, &none),
        (CapSet::Inheritable, &none),
        (CapSet::Effective, &kept),
        (CapSet::Permitted, &kept),
    ] {
        caps::set(None, set, capabilities).context("cannot give up capabilities")?;
    }
    prctl::set_no_new_privs().context("cannot give up what execution grants")?;
    if let Err(error) = filter::install() {
        warn!("no filter of system calls: {error}");
    }
    Ok(())
}

/// `CAP_SYS_ADMIN` stays where it has to stand for what was split from it.
fn kept(held: &CapsHashSet) -> CapsHashSet {
    let mut kept: CapsHashSet = KEPT
        .into_iter()
        .filter(|capability| held.contains(capability))
        .collect();
    let split = [Capability::CAP_BPF, Capability::CAP_PERFMON];
    if held.contains(&Capability::CAP_SYS_ADMIN) && !split.iter().all(|capability| kept.contains(capability))
    {
        kept.insert(Capability::CAP_SYS_ADMIN);
    }
    kept
}

/// Becomes a user with its groups; what is permitted stays so.
fn switch_to(name: &str) -> Result<()> {
    let Some(user) = User::from_name(name).with_context(|| format!("cannot look user {name} up"))? else {
        bail!("user {name}: there is none of that name: make one, or leave --user out");
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
    fn five_capabilities_stay_of_all() {
        assert_eq!(kept(&caps::all()), KEPT.into_iter().collect());
        assert_eq!(kept(&CapsHashSet::new()), CapsHashSet::new());
    }

    #[test]
    fn the_old_capability_stays_where_the_new_ones_are_missing() {
        let old = [
            Capability::CAP_SYS_ADMIN,
            Capability::CAP_NET_ADMIN,
            Capability::CAP_KILL,
        ];
        let stay = [Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN];
        assert_eq!(kept(&old.into_iter().collect()), stay.into_iter().collect());
    }
}
