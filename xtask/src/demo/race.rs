//! Concurrent transfers, each with its own namespaces and link.

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

/// Parameters of all contests.
pub struct Race {
    pub daemon: PathBuf,
    pub profile: LinkProfile,
    /// Size of the file.
    pub bytes: u64,
}

impl Race {
    /// Runs contests concurrently and returns their results in order; `None` after a signal.
    pub fn run(&self, contests: &[Contest], signals: &Signals) -> Result<Option<Vec<Finish>>> {
        let mut lanes = Vec::new();
        // Started and owned by this thread, with which the daemon ends.
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

    /// Returns the `--link` option of an interface.
    pub fn link_argument(&self, interface: &str) -> String {
        let rate = quantity::exact_rate(self.profile.up_bps);
        // The minimum round-trip time that the daemon accepts, for a link without delay.
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
                // The receiver is gone after a signal.
                let _ = sender.send((number, lane.transfer(bytes)));
            });
        }
        finished
    }
}

const TICK: Duration = Duration::from_millis(200);
