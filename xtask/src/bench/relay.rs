//! Measures the cost of the proxy without a bottleneck link.
//!
//! Every [`Contender`] has a [`Lane`]: client, gateway and server in separate namespaces, over veth. Each
//! round measures one contender after the other, so that changes of the machine's speed affect all of them.
//! Only one lane works at a time; CPU time and memory are those of the machine.

use std::{
    fs,
    path::PathBuf,
    process::ExitCode,
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
mod rounds;
mod steering;
mod syscalls;

pub use self::end::End;
use self::{
    contender::Contender,
    lane::{Equipment, MOST_FLOWS_WITH_FIREWALL},
    observation::Observations,
    report::Run,
    rounds::{Amounts, Bench},
};
use super::{
    machine::Machine,
    study::{self, Report},
};
use crate::{cargo, progress::Progress, setup, setup::Needs, signals::Signals};

/// Options of the benchmark. The default covers pepsal's goals, in less than two minutes.
#[derive(Args)]
pub struct Options {
    /// Measure briefly; this is the default
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Measure more bytes, connections and numbers of flows, in more rounds
    #[arg(long)]
    full: bool,
    /// Groups of rows to measure
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "flows,bulk,connections,steering"
    )]
    rows: Vec<Rows>,
    /// Count the system calls per connection, with strace, which slows down the run
    #[arg(long)]
    syscalls: bool,
    /// Rounds of each measurement; a comparison of two builds needs ten [default: 3, with --full 5]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Congestion control of the ends and of the gateway [default: the kernel's]
    #[arg(long, value_name = "ALGORITHM")]
    congestion: Option<String>,
    /// Further argument of the daemon
    #[arg(long = "pepsal-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    arguments: Vec<String>,
    /// Measure this build of pepsal too, in the same rounds, and show the ratio of the builds for each
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
    /// Put a stateful firewall of some twenty rules on every gateway, also for plain forwarding
    #[arg(long)]
    firewall: bool,
    /// Measure this build as pepsal instead of building one
    #[arg(long, value_name = "FILE")]
    built: Option<PathBuf>,
    /// Output folder of results.json, results.md and the charts [default: target/bench/relay]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Groups of rows of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Rows {
    /// Rate and CPU time of one flow and of sixteen.
    Bulk,
    /// New connections per second, and the time of each.
    Connections,
    /// Memory, descriptors and CPU time of each open flow.
    Flows,
    /// Nanoseconds per packet.
    Steering,
}

/// Builds the daemon, measures as root, and prints and writes the results.
pub fn run(options: &Options) -> Result<ExitCode> {
    let daemon = study::daemon(options.built.as_deref(), Needs::BenchRelay)?;
    let old_build = options.daemon.as_deref().map(study::existing).transpose()?;
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
    let found = match measure(bench, options) {
        // The signal also ends child processes, which then fail.
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
    Report::new(run, &found).conclude(&options.out_folder())?;
    Ok(ExitCode::SUCCESS)
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
        let default = || cargo::target_dir().join("bench/relay");
        self.out.clone().unwrap_or_else(default)
    }
}

/// Measures the selected rows.
fn measure(mut bench: Bench<'_>, options: &Options) -> Result<Observations> {
    for rows in &options.rows {
        match rows {
            Rows::Bulk => bulk::measure(&mut bench)?,
            Rows::Connections => connections::measure(&mut bench)?,
            Rows::Flows => flows::measure(&mut bench)?,
            Rows::Steering => steering::measure(&mut bench)?,
        }
    }
    if options.syscalls {
        syscalls::measure(&mut bench)?;
    }
    bench.progress.clear();
    Ok(bench.found)
}

/// Returns the number of flows, of two descriptors each, within the limit of descriptors.
fn most_flows(firewall: bool) -> Result<usize> {
    const OTHERS: u64 = 400;
    // Above this number, addresses and ports are exhausted before descriptors.
    const MOST: u64 = 50_000;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .context("cannot read the limit of file descriptors")?;
    let most = if firewall { MOST_FLOWS_WITH_FIREWALL } else { MOST };
    Ok((hard.saturating_sub(OTHERS) / 2).clamp(100, most) as usize)
}

fn own_congestion() -> Result<String> {
    let name = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")
        .context("cannot read the kernel's congestion control")?;
    Ok(name.trim().to_owned())
}

fn versions(contenders: &[Contender], equipment: &Equipment<'_>) -> Result<Vec<String>> {
    let mut versions = vec![study::version(&equipment.daemon)?];
    if let Some(old_build) = &equipment.old_build {
        versions.push(format!("old build {}", study::version(old_build)?));
    }
    if contenders.contains(&Contender::Haproxy) {
        versions.push(haproxy::version()?);
    }
    Ok(versions)
}
