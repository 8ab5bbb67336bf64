//! What the proxy costs where there is no link to speak of.
//!
//! Every [`Contender`] has a [`Lane`]: client, gateway and server in namespaces of their own, over veth. What is measured
//! is measured with one contender after the other, round by round, so that a change of the machine's mood meets all of
//! them. Only one lane works at a time; the processor time and the memory that are counted are the machine's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

mod bulk;
mod chart;
mod connections;
mod contender;
mod end;
mod firewall;
mod flows;
mod frames;
mod goal;
mod haproxy;
mod lane;
mod machine_use;
mod observation;
mod process;
mod report;
mod steering;
mod syscalls;

pub use self::end::End;
use self::{
    contender::Contender,
    lane::{Equipment, MOST_FLOWS_WITH_FIREWALL},
    observation::Observations,
    report::{Report, Run},
};
use super::{RoundRatios, canvas, goal as goals, machine, machine::Machine, save, statistic};
use crate::{build, progress::Progress, setup, setup::Needs, shell, signals::Signals};

/// By default what pepsal's goals are about, in under two minutes.
#[derive(Args)]
pub struct Options {
    /// Measure briefly; this is the default
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Measure more bytes, connections and numbers of flows, in more rounds
    #[arg(long)]
    full: bool,
    /// What to measure
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "flows,bulk,connections,steering"
    )]
    rows: Vec<Rows>,
    /// Count the system calls that a connection takes, with strace, which slows everything down: a run of its own is best
    #[arg(long)]
    syscalls: bool,
    /// How often everything is measured; ten rounds tell two builds apart [default: 3, with --full 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Congestion control of the ends and of the gateway [default: the kernel's]
    #[arg(long, value_name = "ALGORITHM")]
    congestion: Option<String>,
    /// Give the daemon this argument too
    #[arg(long = "pepsal-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Measure this build of pepsal too, in the same rounds, and show the ratio of the new build to it in each
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
    /// Put a stateful firewall of some twenty rules on every gateway, also for plain forwarding
    #[arg(long)]
    firewall: bool,
    /// Run this build as pepsal instead of making one
    #[arg(long, value_name = "FILE")]
    built: Option<PathBuf>,
    /// Where results.json, results.md and the charts go [default: target/bench/relay]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Groups of rows of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rows {
    /// Rate and processor time of one flow and of sixteen.
    Bulk,
    /// New connections per second, and how long each takes.
    Connections,
    /// Memory, descriptors and processor time for each open flow.
    Flows,
    /// Nanoseconds for each packet.
    Steering,
}

/// How much is measured.
struct Amounts {
    rounds: u32,
    /// Payload of a bulk transfer.
    bulk_bytes: u64,
    /// How long connections are opened.
    connections: Duration,
    /// Numbers of open flows; the last is the most that descriptors allow.
    flows: Vec<usize>,
    /// Requests over the open flows.
    exchanges: usize,
    /// How often a program runs on a packet.
    packets: u32,
    /// How many frames are sent through a gateway.
    frames: u32,
}

/// What all measurements share.
struct Bench<'a> {
    contenders: &'a [Contender],
    amounts: &'a Amounts,
    equipment: &'a Equipment<'a>,
    progress: Progress,
    found: Observations,
}

/// Builds the daemon, measures as root, and prints and writes the results.
pub fn run(options: &Options) -> Result<ExitCode> {
    let daemon = super::daemon(options.built.as_deref(), Needs::BenchRelay)?;
    let old_build = options.daemon.as_deref().map(super::existing).transpose()?;
    let start = Instant::now();
    let absent = setup::offer(haproxy::PROGRAMS).err().map(|reason| {
        let line = format!("HAProxy is left out: {reason}");
        println!("{line}");
        line
    });
    let signals = Signals::block()?;
    let equipment = Equipment {
        daemon,
        old_build,
        firewall: options.firewall,
        arguments: options.arguments.clone(),
        congestion: match &options.congestion {
            Some(name) => name.clone(),
            None => own_congestion()?,
        },
        most_flows: most_flows(options.firewall)?,
        signals: &signals,
    };
    let contenders: Vec<_> = Contender::ALL
        .into_iter()
        .filter(|contender| match contender {
            Contender::Forwarding | Contender::Pepsal => true,
            Contender::OldBuild => equipment.old_build.is_some(),
            Contender::Haproxy => absent.is_none(),
        })
        .collect();
    let amounts = options.amounts(equipment.most_flows);
    let bench = Bench {
        contenders: &contenders,
        amounts: &amounts,
        equipment: &equipment,
        progress: Progress::new(),
        found: Observations::default(),
    };
    let found = match bench.run(options) {
        // Children meet the signal too, and fail.
        _ if signals.is_pending() => return signals.interrupted(),
        result => result?,
    };
    let run = Run {
        machine: Machine::here()?,
        versions: versions(&contenders, &equipment)?,
        absent,
        firewall: options.firewall,
        daemon_arguments: options.arguments.clone(),
        congestion: equipment.congestion.clone(),
        rounds: amounts.rounds,
        bulk_bytes: amounts.bulk_bytes,
        minutes: start.elapsed().as_secs_f64() / 60.0,
    };
    conclude(run, &found, &options.out_folder())
}

impl Options {
    fn amounts(&self, most_flows: usize) -> Amounts {
        let mut flows = if self.full {
            vec![100, 500, 2000, 5000]
        } else {
            vec![100, 2000]
        };
        flows.retain(|count| *count < most_flows);
        flows.push(most_flows);
        let (rounds, bulk_bytes, seconds, exchanges, packets, frames) = if self.full {
            (5, 4_000_000_000, 5, 50_000, 5_000_000, 500_000)
        } else {
            (3, 800_000_000, 1, 15_000, 500_000, 50_000)
        };
        Amounts {
            rounds: self.rounds.unwrap_or(rounds),
            bulk_bytes,
            connections: Duration::from_secs(seconds),
            flows,
            exchanges,
            packets,
            frames,
        }
    }

    fn out_folder(&self) -> PathBuf {
        let default = || build::target_dir().join("bench/relay");
        self.out.clone().unwrap_or_else(default)
    }
}

impl Bench<'_> {
    fn run(mut self, options: &Options) -> Result<Observations> {
        for rows in &options.rows {
            match rows {
                Rows::Bulk => bulk::measure(&mut self)?,
                Rows::Connections => connections::measure(&mut self)?,
                Rows::Flows => flows::measure(&mut self)?,
                Rows::Steering => steering::measure(&mut self)?,
            }
        }
        if options.syscalls {
            syscalls::measure(&mut self)?;
        }
        self.progress.clear();
        Ok(self.found)
    }

    /// Measures all contenders in every round, each time beginning with another one.
    fn rounds(
        &mut self,
        what: &str,
        mut measure: impl FnMut(&mut Self, u32, Contender) -> Result<()>,
    ) -> Result<()> {
        for round in 1..=self.amounts.rounds {
            for turn in 0..self.contenders.len() {
                let contender = self.contenders[(turn + round as usize) % self.contenders.len()];
                let of = self.amounts.rounds;
                self.progress
                    .show(|| format!("{what}, round {round} of {of}: {contender}"));
                measure(self, round, contender).with_context(|| format!("{what}, {contender}"))?;
            }
        }
        Ok(())
    }
}

/// What a process may have open leaves room for so many flows of two descriptors, and for the process itself.
fn most_flows(firewall: bool) -> Result<usize> {
    const OTHERS: u64 = 400;
    // Past this, addresses and ports run out, not descriptors.
    const MOST: u64 = 50_000;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .context("cannot tell the limit of descriptors")?;
    let most = if firewall { MOST_FLOWS_WITH_FIREWALL } else { MOST };
    Ok((hard.saturating_sub(OTHERS) / 2).clamp(100, most) as usize)
}

fn own_congestion() -> Result<String> {
    let name = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")
        .context("cannot tell the kernel's congestion control")?;
    Ok(name.trim().to_owned())
}

fn versions(contenders: &[Contender], equipment: &Equipment<'_>) -> Result<Vec<String>> {
    let version = |daemon: &Path| shell::output(Command::new(daemon).arg("--version"));
    let mut versions = vec![version(&equipment.daemon)?];
    if let Some(old_build) = &equipment.old_build {
        versions.push(format!("old build {}", version(old_build)?));
    }
    if contenders.contains(&Contender::Haproxy) {
        versions.push(haproxy::version()?);
    }
    Ok(versions.iter().map(|version| version.trim().to_owned()).collect())
}

/// Prints and writes the results.
fn conclude(run: Run, found: &Observations, folder: &Path) -> Result<ExitCode> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let report = Report {
        run,
        found,
        summaries: found.summaries(),
        comparisons: found.comparisons(),
        goals: goal::judge(found),
    };
    print!("\n{}", report.markdown());
    report.write(folder)?;
    let charts = chart::draw(found, folder)?;
    println!("\n{}", goals::aligned(&report.goals));
    println!("Results and {charts} charts are in {}.", folder.display());
    Ok(ExitCode::SUCCESS)
}
