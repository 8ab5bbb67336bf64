//! Derives the profiles of links from the options, at the start and at each reload.

use anyhow::{Result, bail};
use pepsal_ebpf::LINKS_MAX;
use tracing::{info, warn};

use crate::{
    config::options::Options,
    link::{profile::LinkProfile, rate_control::RateControl},
    tcp::congestion,
    wire::interfaces::Interfaces,
};

/// Returns the profile of every `--link`.
///
/// # Errors
/// For a link without an interface, or a congestion control that the kernel does not have.
pub(crate) fn link_profiles(
    options: &Options,
    interfaces: &Interfaces,
    rate_control: &Result<RateControl>,
) -> Result<Vec<LinkProfile>> {
    for name in options.links.iter().map(|link| &link.interface) {
        if !interfaces.values().any(|interface| interface.name == *name) {
            bail!("--link {name}: there is no interface of that name");
        }
    }
    let profiles = derive(options, rate_control)?;
    for profile in &profiles {
        congestion::check(&profile.congestion.value)?;
    }
    Ok(profiles)
}

/// Returns the profiles for `--explain`, which needs no interfaces.
///
/// # Errors
/// For two links on one interface, or more links than [`LINKS_MAX`].
pub fn explain(options: &Options) -> Result<Vec<LinkProfile>> {
    derive(options, &RateControl::register())
}

/// Derives the profiles. They refer to `rate_control`, which has to outlive them.
fn derive(options: &Options, rate_control: &Result<RateControl>) -> Result<Vec<LinkProfile>> {
    for (i, spec) in options.links.iter().enumerate() {
        if options.links[..i]
            .iter()
            .any(|other| other.interface == spec.interface)
        {
            bail!("--link {}: given twice", spec.interface);
        }
    }
    if options.links.len() > LINKS_MAX as usize {
        bail!(
            "{} links: at most {LINKS_MAX} can have a profile",
            options.links.len()
        );
    }
    if options.links.is_empty() {
        return Ok(Vec::new());
    }
    let congestion = match rate_control {
        Ok(registered) => registered.congestion.clone(),
        Err(error) => {
            let best = congestion::best();
            warn!("legs of links use {best}: pepsal's own congestion control is unavailable: {error:#}");
            best
        }
    };
    let profile = |spec| LinkProfile::derive(spec, &congestion, options.connect_timeout);
    Ok(options.links.iter().map(profile).collect())
}

pub(crate) fn announce(profile: &LinkProfile) {
    info!("legs that leave through {}:\n{profile}", profile.interface);
}
