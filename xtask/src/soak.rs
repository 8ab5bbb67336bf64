//! Runs flows of every kind over a lossy link during fault injection.
//!
//! The receiver of every byte checks it. A flow may break only by a fault that explains it, and a broken flow
//! must not look complete: an end by FIN before the last byte counts as loss, under any fault.

use std::{
    env,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use pepsal_tests::{Link, LinkProfile, Topology};

mod bed;
mod faults;
mod flows;
mod totals;
mod vitals;

use self::{bed::Bed, faults::Fault, flows::Flows, totals::Totals, vitals::Vitals};
use crate::{
    build,
    progress::Progress,
    setup::{self, Needs},
    shell,
    signals::Signals,
    table::{Align, aligned},
};

/// Options of the soak.
#[derive(Args)]
pub struct Options {
    /// Duration in minutes.
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Seed of flows, faults and losses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this daemon instead of building one.
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
}

/// 40 Mbit/s, 60 ms, 0.5 % loss: short enough for many flows, with enough losses for many retransmissions.
const LINK: LinkProfile = LinkProfile::symmetric(40_000_000, Duration::from_millis(60), 0.005);

/// Flows that are open at once.
const WORKERS: usize = 24;

/// Mean time from the end of one fault to the next.
const FAULT_INTERVAL: Duration = Duration::from_secs(5);

/// Timeout of open flows at the end of the run.
const QUIET: Duration = Duration::from_secs(30);

/// Runs the soak and prints the results.
pub fn run(options: &Options) -> Result<ExitCode> {
    let daemon = match &options.daemon {
        Some(daemon) => daemon.clone(),
        None => build::daemon_with(&build::ebpf(&setup::run(Needs::Soak)?)?, false)?,
    };
    if !shell::is_root() {
        let mut command = again_as_root(&daemon)?;
        return Err(command.exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)));
    }
    let length = Duration::try_from_secs_f64(options.minutes * 60.0).context("--minutes is no time")?;
    if length < Duration::from_secs(30) {
        bail!("--minutes {}: half a minute is the least", options.minutes);
    }
    soak(length, options.seed, &daemon)
}

/// Returns the command that soaks a built daemon for some minutes, as root.
pub fn command(daemon: &Path, minutes: f64) -> Result<std::process::Command> {
    let mut command = shell::as_root(&env::current_exe().context("cannot find this program's file")?)?;
    command
        .args(["soak", "--minutes", &minutes.to_string(), "--daemon"])
        .arg(daemon);
    Ok(command)
}

fn again_as_root(daemon: &Path) -> Result<std::process::Command> {
    let mut command = shell::as_root(&env::current_exe().context("cannot find this program's file")?)?;
    command.args(env::args_os().skip(1)).arg("--daemon").arg(daemon);
    Ok(command)
}

fn soak(length: Duration, seed: u64, daemon: &Path) -> Result<ExitCode> {
    println!(
        "{WORKERS} flows at once for {length:.0?} over {} Mbit/s, {:?}, {} % loss; seed {seed}.",
        LINK.down_bps / 1_000_000,
        LINK.rtt,
        LINK.loss * 100.0
    );
    let signals = Signals::block()?;
    let totals = Arc::new(Totals::default());
    let topology = Topology::builder()
        .link(Link::Tun(LinkProfile { seed, ..LINK }))
        .build()?;
    let mut bed = Bed::start(&topology, daemon)?;
    let server = flows::Server::start(&topology.server, totals.clone())?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut progress = Progress::new();

    // Faults that kill the daemon come first, so that the measurements of the second half are of one process.
    let start = Instant::now();
    let halves = [
        (Fault::ALL, start + length / 2),
        (Fault::SURVIVED, start + length),
    ];
    let mut vitals = Vec::new();
    for (faults, until) in halves {
        let flows = Flows::start(&topology.client, &server, &totals, WORKERS, random.u64(..));
        let mut pending = Vec::new();
        while Instant::now() < until {
            // Each fault once, before any is repeated.
            if pending.is_empty() {
                pending.extend_from_slice(faults);
                random.shuffle(&mut pending);
            }
            let fault = pending.pop().context("there are faults")?;
            let pause = FAULT_INTERVAL.mul_f64(random.f64() + 0.5);
            let next = Instant::now() + pause;
            while Instant::now() < next {
                if signals.come_within(Duration::from_millis(200))? {
                    return signals.interrupted();
                }
                progress.show(|| totals.in_short());
            }
            if Instant::now() < until {
                bed.inflict(fault, &totals)
                    .with_context(|| format!("cannot inject: {fault}"))?;
            }
        }
        flows.stop();
        bed.wait_until_idle(QUIET)?;
        vitals.push(Vitals::of(bed.pid())?);
    }
    progress.clear();
    drop(server);
    let log = bed.stop()?;
    report(&totals, &vitals, start.elapsed(), &log)
}

/// Prints the tables and returns whether the run passed.
fn report(totals: &Totals, vitals: &[Vitals], time: Duration, log: &str) -> Result<ExitCode> {
    println!("{}", aligned(&totals.rows(time), [Align::Left, Align::Right]));
    println!("{}", aligned(&totals.fault_rows(), [Align::Left, Align::Right]));
    let [before, after] = vitals else {
        bail!("two measurements were to be made");
    };
    println!(
        "{}",
        aligned(&before.rows(after), [Align::Left, Align::Right, Align::Right])
    );
    let mut complaints = totals.complaints();
    complaints.extend(before.complaints(after));
    complaints.extend(
        log.lines()
            .filter(|line| line.contains("panicked"))
            .map(|line| format!("the daemon: {line}")),
    );
    for complaint in &complaints {
        println!("failed: {complaint}");
    }
    Ok(match complaints.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
