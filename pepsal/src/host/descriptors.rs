//! The limit of file descriptors, and the flows and pipes that fit.

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::warn;

/// Descriptors of runtimes, maps, listeners, netlink and log.
const OTHER_DESCRIPTORS: u64 = 256;

/// Returns the descriptors that `flows` flows need.
pub fn needed(flows: u32) -> u64 {
    u64::from(flows) * 2 + OTHER_DESCRIPTORS
}

/// Raises the limit of descriptors to its hard limit. Returns the numbers of flows and pipes that fit.
///
/// # Errors
/// When the limit cannot be read, or is too low for one flow.
pub fn fit(flows: u32) -> Result<(u32, usize)> {
    let (soft, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of file descriptors")?;
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    let available = limit.saturating_sub(OTHER_DESCRIPTORS);
    let fitting = u32::try_from(available / 2).unwrap_or(u32::MAX);
    if fitting == 0 {
        bail!("{limit} file descriptors are too few for a flow: raise the limit (LimitNOFILE=, ulimit -n)");
    }
    if fitting < flows {
        warn!(
            "{flows} connections need {} file descriptors, the limit is {limit}: handling {fitting} at most; raise the \
             limit (LimitNOFILE=, ulimit -n) or lower -c",
            needed(flows)
        );
    }
    let flows = flows.min(fitting);
    let pipes = (available - u64::from(flows) * 2) / 2;
    Ok((flows, usize::try_from(pipes).unwrap_or(usize::MAX)))
}
