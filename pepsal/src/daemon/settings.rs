//! Derives the settings of legs and flows from the options, at the start and at each reload.

use anyhow::{Result, bail};
use tokio::time::Instant;

use crate::{
    config::options::Options,
    flow::{
        leg_config::LegConfig,
        settings::{Collector, Settings},
    },
    host::namespace::Namespace,
    tcp::congestion::{self, Congestion},
};

/// Returns the settings of new flows. `legs` is derived from the same options; `epoch` is the start of the
/// daemon.
pub fn settings(options: &Options, legs: LegConfig, epoch: Instant) -> Settings {
    Settings {
        legs,
        connect_timeout: options.connect_timeout,
        collector: Collector {
            epoch,
            interval: options.gc_interval,
            lifetime: options.pending_lifetime,
        },
        idle_timeout: (!options.idle_timeout.is_zero()).then_some(options.idle_timeout),
    }
}

/// Returns the settings of legs. `namespace` is one of the legs' namespaces.
///
/// # Errors
/// For a congestion control that the kernel does not have, or for pepsal's, which needs a link.
pub fn leg_config(options: &Options, namespace: &Namespace) -> Result<LegConfig> {
    let inside = namespace.run(congestion::default)?;
    let legs = LegConfig::new(options.legs(), &inside);
    for algorithm in legs.congestion() {
        if let Congestion::Own(_) = algorithm {
            bail!("congestion control '{algorithm}' needs a link's rate: use it with --link, not with -C");
        }
        congestion::check(algorithm)?;
    }
    Ok(legs)
}

/// Returns whether the congestion control of a leg ignores congestion marks (CE), as BBR's first version and
/// pepsal's own, the default of links, do.
pub fn ignores_marks(options: &Options) -> Result<bool> {
    let default = congestion::default()?;
    let tcp = &options.tcp;
    let named = [&tcp.congestion, &tcp.client_congestion, &tcp.server_congestion];
    let mut of_legs = named.into_iter().flatten().chain([&default]);
    Ok(!options.links.is_empty() || of_legs.any(|algorithm| algorithm.is_bbr()))
}
