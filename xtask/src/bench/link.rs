//! What pepsal brings on emulated links, wherever it runs.
//!
//! A [`job`] has a site of its own: client, link, server and proxies in namespaces that are made for it. Jobs run at once,
//! as many as the machine can emulate, rounds interleaved, and a round's seed makes the link lose the same packets, by
//! number, with every proxy. What they find becomes cells with medians, each beside the [`floor`] that physics sets.

use std::{
    path::{Path as FilePath, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;

mod bulk;
mod chart;
mod floor;
mod goal;
mod job;
mod lanes;
mod limits;
mod observation;
mod path;
mod peer;
mod place;
mod plan;
mod report;
mod schedule;
mod site;

use self::{
    lanes::{Extent, Lane, LaneJob},
    observation::Observations,
    path::{Loss, Path},
    peer::Peer,
    place::{PlaceName, Proxy},
    plan::{Matrix, Rounds},
    report::Run,
    schedule::Schedule,
    site::Equipment,
};
use super::{
    machine::Machine,
    study::{self, Report},
};
use crate::{cargo, quantity, setup::Needs, signals::Signals};

/// By default what pepsal's goals are about, in under three minutes.
#[derive(Args)]
#[command(after_long_help = PEER_HELP)]
pub struct Options {
    /// Measure what the goals are about, which is the default; with --lanes some of them, once
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Measure the whole matrix, which takes hours; the options below narrow it
    #[arg(long)]
    full: bool,
    /// Measure links that change, with four downloads through pepsal at the hub, beside no proxy: all, or these
    #[arg(
        long,
        value_delimiter = ',',
        num_args = 0..,
        require_equals = true,
        conflicts_with = "full",
        value_name = "LANE"
    )]
    lanes: Option<Vec<Lane>>,
    /// Paths of the whole matrix
    #[arg(
        long,
        value_delimiter = ',',
        requires = "full",
        value_name = "PATH",
        default_value = "geo,geo-symmetric,meo,leo,clean"
    )]
    paths: Vec<Path>,
    /// Random losses of the whole matrix
    #[arg(
        long,
        value_delimiter = ',',
        requires = "full",
        default_value = "0%,0.1%,1%,2%"
    )]
    loss: Vec<Loss>,
    /// Transfers of the whole matrix
    #[arg(long, value_delimiter = ',', requires = "full", value_name = "SIZE", value_parser = quantity::bytes,
        default_value = "10KiB,100KiB,1MiB,10MiB,100MiB")]
    sizes: Vec<u64>,
    /// Places of the whole matrix: no proxy and endpoints with either congestion control, or where the proxy is
    #[arg(
        long,
        value_delimiter = ',',
        requires = "full",
        value_name = "PLACE",
        default_value = "cubic,bbr,client,server,pair"
    )]
    places: Vec<PlaceName>,
    /// How often everything is measured; ten rounds tell two builds apart [default: 3, with --lanes 5, or 1 if --quick]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Seed of the first round's losses, handovers and payload; the next round has the next
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long a transfer may take [default: 120s, with --full 600s]
    #[arg(long, value_parser = quantity::patience)]
    timeout: Option<Duration>,
    /// Emulate links of this rate in sum at once
    #[arg(long, value_name = "RATE", default_value = "250mbit", value_parser = quantity::rate_bps)]
    parallel: u64,
    /// Measure this proxy too, in each of pepsal's places
    #[arg(long = "peer", value_name = "NAME=COMMAND", value_parser = Peer::parse)]
    peers: Vec<&'static Peer>,
    /// Give the daemons this argument too
    #[arg(long = "pepsal-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Measure this build of pepsal too, in each of pepsal's places and in the same rounds, and show the ratio of the new build
    /// to it in each
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
    /// Run this build as pepsal instead of making one
    #[arg(long, value_name = "FILE")]
    built: Option<PathBuf>,
    /// Where results.json, results.csv, results.md and the charts go [default: target/bench/link, with --lanes
    /// target/bench/lanes]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

const PEER_HELP: &str = "\
A peer's command runs with `sh -c` as root in the network namespace of a gateway, in pepsal's place, and has two seconds \
to get ready; it is ended with SIGTERM, then SIGKILL, and so is all that it has started. In the command stand
  {lan}   the interface towards the hosts on this side
  {sat}   the interface towards the link
  {rate}  what the link carries towards this gateway, like 50mbit
  {up}    what it carries from this gateway
  {rtt}   its round trip, like 600ms
Routing and firewall are the namespace's own, and are gone with it:

  cargo xtask bench link --peer 'pepsal-c=iptables -t mangle -A PREROUTING -i {lan} -p tcp -j TPROXY --on-port 5000 \
--tproxy-mark 1 && ip rule add fwmark 1 lookup 100 && ip route add local 0/0 dev lo table 100 && exec pepsal-c -i {lan}'";

/// Builds the daemon, measures as root, and prints and writes the results.
pub fn run(options: &Options) -> Result<ExitCode> {
    let daemon = study::daemon(options.built.as_deref(), Needs::Bench)?;
    let old_build = options.daemon.as_deref().map(study::existing).transpose()?;
    let start = Instant::now();
    let signals = Signals::block()?;
    let equipment = Equipment {
        daemon,
        old_build,
        arguments: options.arguments.clone(),
    };
    let schedule = Schedule {
        equipment: &equipment,
        capacity_bps: options.parallel,
        timeout: options.timeout(),
        signals: &signals,
    };
    let describe = || options.describe(&equipment, start.elapsed());
    if let Some(lanes) = &options.lanes {
        let Some(found) = schedule.all(options.lane_jobs(lanes, &equipment)?)? else {
            return signals.interrupted();
        };
        return conclude_lanes(describe()?, &found, &options.out_folder());
    }
    let Some(found) = schedule.all(options.jobs())? else {
        return signals.interrupted();
    };
    conclude(describe()?, &found, &options.out_folder())
}

impl Options {
    fn jobs(&self) -> Vec<job::Job> {
        let (rounds, proxies) = (self.seeds(), self.proxies());
        if !self.full {
            return plan::quick(&rounds, &proxies);
        }
        let matrix = Matrix {
            paths: self.paths.clone(),
            losses: self.loss.clone(),
            sizes: self.sizes.clone(),
            places: self.places.clone(),
        };
        plan::full(&rounds, &matrix, &proxies)
    }

    fn lane_jobs(&self, lanes: &[Lane], equipment: &Equipment) -> Result<Vec<LaneJob>> {
        let extent = self.extent();
        let lanes = if lanes.is_empty() { extent.lanes() } else { lanes };
        lanes::jobs(lanes, extent, &self.seeds(), &self.proxies(), equipment)
    }

    fn extent(&self) -> Extent {
        if self.quick { Extent::Quick } else { Extent::Whole }
    }

    fn seeds(&self) -> Rounds {
        let default = match self.lanes {
            Some(_) => self.extent().rounds(),
            None => 3,
        };
        Rounds {
            count: self.rounds.unwrap_or(default),
            seed: self.seed,
        }
    }

    fn proxies(&self) -> Vec<Proxy> {
        let peers = self.peers.iter().map(|peer| Proxy::Peer(peer));
        let old_build = self.daemon.is_some().then_some(Proxy::OldBuild);
        old_build
            .into_iter()
            .chain([Proxy::Pepsal])
            .chain(peers)
            .collect()
    }

    fn timeout(&self) -> Duration {
        let default = Duration::from_secs(if self.full { 600 } else { 120 });
        self.timeout.unwrap_or(default)
    }

    fn out_folder(&self) -> PathBuf {
        let name = if self.lanes.is_some() {
            "bench/lanes"
        } else {
            "bench/link"
        };
        let default = || cargo::target_dir().join(name);
        self.out.clone().unwrap_or_else(default)
    }

    fn describe(&self, equipment: &Equipment, took: Duration) -> Result<Run> {
        let old_build = equipment.old_build.as_deref();
        Ok(Run {
            machine: Machine::here()?,
            daemon: study::version(&equipment.daemon)?,
            old_build: old_build.map(study::version).transpose()?,
            daemon_arguments: equipment.arguments.clone(),
            rounds: self.seeds().count,
            seed: self.seed,
            timeout_seconds: self.timeout().as_secs_f64(),
            minutes: took.as_secs_f64() / 60.0,
        })
    }
}

/// Prints and writes the results; fails when data did not arrive as it was sent.
fn conclude(run: Run, found: &Observations, folder: &FilePath) -> Result<ExitCode> {
    Report::new(run, found).conclude(folder)?;
    let mut code = ExitCode::SUCCESS;
    for sample in found.failures() {
        let observation::Cell {
            path,
            loss,
            metric,
            place,
        } = sample.cell;
        eprintln!(
            "error: {metric}, {path}, {loss} loss, {place}, round {}: {}",
            sample.round, sample.state
        );
        code = ExitCode::FAILURE;
    }
    Ok(code)
}

/// Prints and writes the results of lanes; fails when a flow has ended or data did not arrive as it was sent.
fn conclude_lanes(run: Run, found: &lanes::Found, folder: &FilePath) -> Result<ExitCode> {
    Report::new(run, found).conclude(folder)?;
    let mut code = ExitCode::SUCCESS;
    for row in found.failures() {
        eprintln!(
            "error: {}, {}, round {}: {}",
            row.what, row.place, row.round, row.state
        );
        code = ExitCode::FAILURE;
    }
    Ok(code)
}
