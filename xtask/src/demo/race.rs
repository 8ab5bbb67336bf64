//! Transfers at once, each with namespaces and a link of its own.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use pepsal_tests::{Daemon, LinkProfile, Outcome};

use super::{
    contest::{Contest, Finish, Placement},
    lane::{Gateway, Lane},
    progress::Progress,
};
use crate::{quantity, signals::Signals};

/// What all contests have in common.
pub struct Race {
    pub daemon: PathBuf,
    pub profile: LinkProfile,
    /// Size of the file.
    pub bytes: u64,
}

impl Race {
    /// Runs contests at once and returns how they went, in their order; nothing when a signal came first.
    pub fn run(&self, contests: &[Contest], signals: &Signals) -> Result<Option<Vec<Finish>>> {
        let mut lanes = Vec::new();
        // Started by this thread and owned by it: a daemon dies with the thread that started it, at the latest.
        let mut daemons = Vec::new();
        for contest in contests {
            if signals.is_pending() {
                return Ok(None);
            }
            let lane = Lane::new(*contest, &self.profile)?;
            for gateway in lane.gateways() {
                daemons.push(self.start_daemon(&gateway, contest.placement)?);
            }
            lanes.push(Arc::new(lane));
        }

        let mut progress = Progress::new();
        let finished = self.start_transfers(&lanes);
        let mut finishes = Vec::new();
        while finishes.len() < lanes.len() {
            if signals.come_within(TICK)? {
                lanes.iter().for_each(|lane| lane.server.stop());
                return Ok(None);
            }
            for (number, outcome) in finished.try_iter() {
                let contest = contests[number];
                let outcome = outcome.with_context(|| contest.to_string())?;
                progress.finished(&contest, &outcome);
                finishes.push((number, Finish { contest, outcome }));
            }
            progress.show(&lanes, self.bytes);
        }
        progress.clear();
        for daemon in daemons {
            daemon.terminate()?;
        }
        finishes.sort_by_key(|(number, _)| *number);
        Ok(Some(finishes.into_iter().map(|(_, finish)| finish).collect()))
    }

    /// What a daemon is told of the link behind an interface of its own.
    pub fn link_argument(&self, interface: &str) -> String {
        let rate = quantity::exact_rate(self.profile.up_bps);
        // A link without a round trip is nothing to tune for; this is the least that the daemon takes.
        let rtt = quantity::exact_time(self.profile.rtt.max(Duration::from_millis(1)));
        format!("{interface},rate={rate},rtt={rtt}")
    }

    fn start_daemon(&self, gateway: &Gateway<'_>, placement: Placement) -> Result<Daemon> {
        let mut link = self.link_argument(gateway.satellite);
        if placement == Placement::BothEnds {
            link.push_str(",peer=pepsal");
        }
        let arguments = [
            "-i",
            gateway.terrestrial,
            "-i",
            gateway.satellite,
            "--link",
            &link,
        ];
        Daemon::start_quiet(&self.daemon, gateway.namespace, &arguments)
    }

    fn start_transfers(&self, lanes: &[Arc<Lane>]) -> Receiver<(usize, Result<Outcome>)> {
        let (sender, finished) = mpsc::channel();
        for (number, lane) in lanes.iter().enumerate() {
            let (lane, sender, bytes) = (Arc::clone(lane), sender.clone(), self.bytes);
            thread::spawn(move || {
                // Nobody is there to hear it after a signal.
                let _ = sender.send((number, lane.transfer(bytes)));
            });
        }
        finished
    }
}

const TICK: Duration = Duration::from_millis(200);
