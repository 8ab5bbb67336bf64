//! Reload at SIGHUP: reads the configuration file again, and applies the keys that can change while flows are
//! open.
//!
//! All steps that may fail come first, so that the new configuration applies completely, except keys that
//! need a restart, or not at all.

use anyhow::{Result, bail};
use pepsal_ebpf::LINKS_MAX;
use tokio::task::{JoinError, JoinSet};
use tracing::{info, warn};

use crate::{
    config::{Applies, Change, Configuration, Problem, options::Options},
    daemon::{
        profiles::{announce, link_profiles},
        proxy::Proxy,
        settings::{leg_config, settings},
    },
    flow::listener,
    observe::log::Log,
    wire::{interfaces, selection::Selection},
};

/// A parsed configuration with its compiled selection rules.
type Read = Result<(Configuration, Selection), Vec<Problem>>;

/// Reloads the configuration and compares it with the one in effect.
pub struct Reloader<'a> {
    log: &'a Log,
    /// The configuration of the start, for keys that need a restart.
    started: Configuration,
    running: Configuration,
    reading: JoinSet<Read>,
}

impl<'a> Reloader<'a> {
    /// Creates it for a daemon that was started with this configuration.
    pub fn new(configuration: Configuration, log: &'a Log) -> Self {
        Self {
            log,
            started: configuration.clone(),
            running: configuration,
            reading: JoinSet::new(),
        }
    }

    /// Returns the options in effect, except keys that need a restart.
    pub fn options(&self) -> &Options {
        &self.running.options
    }

    /// Returns whether no reload is in progress.
    pub fn is_idle(&self) -> bool {
        self.reading.is_empty()
    }

    /// Starts to read the file on a blocking thread, because long lists of rules would delay the heartbeat.
    pub fn read(&mut self) {
        if self.running.options.config.is_none() {
            return info!("nothing to reload: no --config was given");
        }
        let running = self.running.clone();
        self.reading.spawn_blocking(move || {
            let configuration = running.reload()?;
            let steering = &configuration.options.steering;
            let selection = Selection::new(&steering.only, &steering.bypass);
            Ok((configuration, selection))
        });
    }

    /// Returns the result of reading; never resolves without a reload in progress.
    pub async fn next(&mut self) -> Option<Result<Read, JoinError>> {
        self.reading.join_next().await
    }

    /// Applies a read configuration, unless it has an error.
    pub async fn apply(&mut self, read: Result<Read, JoinError>, proxy: &mut Proxy) {
        let (configuration, selection) = match read {
            Ok(Ok(read)) => read,
            Ok(Err(problems)) => {
                return warn!(
                    "not reloaded, the running configuration stays in effect: {}",
                    first(&problems)
                );
            }
            Err(error) => return warn!("not reloaded, the running configuration stays in effect: {error}"),
        };
        if let Err(error) = proxy.reconfigure(&configuration.options, &selection).await {
            return warn!("not reloaded, the running configuration stays in effect: {error:#}");
        }
        if let Err(error) = self.log.set(configuration.options.level())
            && configuration.options.level() != self.running.options.level()
        {
            warn!("log.level: {error}");
        }
        report(&self.running, &self.started, &configuration);
        self.running = configuration;
    }
}

fn first(problems: &[Problem]) -> String {
    match problems {
        [] => String::new(),
        [only] => only.to_string(),
        [first, others @ ..] => format!("{first} (pepsal check shows {} more)", others.len()),
    }
}

/// Logs one line with the changes, and one for each key that needs a restart.
fn report(running: &Configuration, started: &Configuration, now: &Configuration) {
    let of = |changes: Vec<Change>, applies| -> Vec<String> {
        let those = changes.iter().filter(|change| change.applies == applies);
        those.map(Change::to_string).collect()
    };
    let changed = of(running.changes_to(now), Applies::Live);
    match changed.is_empty() {
        true => info!("reloaded: no reloadable key changed"),
        false => info!("reloaded: {}", changed.join("; ")),
    }
    for waiting in of(started.changes_to(now), Applies::AtStart) {
        warn!("{waiting}");
    }
}

impl Proxy {
    /// Applies new options: all that can change while flows are open, or none.
    async fn reconfigure(&mut self, options: &Options, selection: &Selection) -> Result<()> {
        let legs = leg_config(options, self.clients.namespace())?;
        let interfaces = interfaces::list().await?;
        let profiles = link_profiles(options, &interfaces, &self.rate_control)?;
        let links = self.shared.links.clone();
        let (known, next) = (links.all(), links.prepare(profiles));
        if next.links.len() > LINKS_MAX as usize {
            bail!(
                "more than {LINKS_MAX} links had a profile since the start: restart to remove the former ones"
            );
        }
        let new = next.links[known.len()..].to_vec();
        let pairs = self.clients.namespace().run(|| {
            let _entered = self.workers.acceptor().enter();
            listener::bind_links(&legs, &new)
        })?;
        // A dropped pair leaves its slot empty.
        self.programs.register(
            self.listeners.pairs.len() as u32,
            pairs.iter().map(|pair| pair.descriptors()),
        )?;
        self.programs.select(selection)?;

        // No step fails from here on.
        for link in &next.links {
            if !known.iter().any(|known| known.profile == link.profile) {
                announce(&link.profile);
            }
        }
        links.replace(next);
        self.accept_from(&pairs);
        self.keep_budgets(&new);
        self.listeners.pairs.extend(pairs);
        self.listeners.tune(&legs, &links);
        let epoch = self.shared.settings.load().collector.epoch;
        let settings = settings(options, legs, epoch);
        self.shared.settings.store(settings.into());
        // Updates the link of each interface.
        self.adapt().await;
        Ok(())
    }
}
