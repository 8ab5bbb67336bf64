//! A file moved over an emulated satellite link, with and without pepsal.
//!
//! Every transfer has client, gateway, server and link of its own, so all of them can run at once without disturbing each
//! other, as long as the machine keeps up with the links' rates.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use pepsal_tests::{Direction, Family, LinkProfile};

mod progress;
mod quantity;
mod race;
mod table;

use self::race::{Contest, Placement, Race};
use crate::{
    build,
    setup::{self, Needs},
    shell,
};

/// The emulated link and the file. By default a geostationary satellite's link.
#[derive(Args)]
pub struct Options {
    /// Rate of the link in each direction: bit, kbit, mbit or gbit per second.
    #[arg(long, default_value = "50mbit", value_parser = quantity::rate_bps)]
    rate: u64,
    /// Round-trip time of the link: us, ms or s.
    #[arg(long, default_value = "600ms", value_parser = quantity::duration)]
    rtt: Duration,
    /// Random loss of the link in each direction, in percent.
    #[arg(long, default_value = "1%", value_parser = quantity::loss)]
    loss: f64,
    /// Size of the file: B, kB, MB, GB, KiB, MiB or GiB.
    #[arg(long, default_value = "3MiB", value_parser = quantity::bytes)]
    size: u64,
    /// Run this daemon instead of building one.
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
}

/// What the machine can emulate at once without becoming the bottleneck itself.
const EMULATED_BPS_AT_ONCE: u64 = 600_000_000;

/// Builds the daemon, runs the transfers as root and prints the table.
pub fn run(options: &Options) -> Result<ExitCode> {
    let daemon = match &options.daemon {
        Some(daemon) => daemon.clone(),
        None => build::daemon_with(&build::ebpf(&setup::run(Needs::Demo)?)?, false)?,
    };
    if !shell::is_root() {
        return again_as_root(&daemon);
    }

    let profile = LinkProfile::symmetric(options.rate, options.rtt, options.loss);
    let race = Race {
        daemon,
        congestion: has_bbr().then_some("bbr"),
        profile,
        bytes: options.size,
    };
    introduce(&race);
    let signals = block_signals()?;
    let mut finishes = Vec::new();
    let at_once = (EMULATED_BPS_AT_ONCE / options.rate).max(1) as usize;
    for contests in contests().chunks(at_once) {
        match race.run(contests, &signals) {
            Ok(Some(more)) => finishes.extend(more),
            Ok(None) => return interrupted(&signals),
            // The signal reached what ran just then, too.
            Err(_) if is_pending(&signals) => return interrupted(&signals),
            Err(error) => return Err(error),
        }
    }
    println!("\n{}", table::render(&finishes, &profile));
    println!("{EXPLANATION}");
    let damaged = finishes.iter().filter(|finish| !finish.outcome.intact).count();
    ensure!(
        damaged == 0,
        "the digests of {damaged} of {} transfers differ",
        finishes.len()
    );
    println!("The digests of all {} transfers match.", finishes.len());
    Ok(ExitCode::SUCCESS)
}

const EXPLANATION: &str = "\
A gateway accelerates what it sends over the link itself. Beside the client it sends the uploads; downloads are sent by
the server's stock TCP, beyond the link, until the gateway at that end runs pepsal too.";

/// Everything that is compared.
fn contests() -> Vec<Contest> {
    let placements = [
        (Direction::Upload, Placement::Nowhere),
        (Direction::Upload, Placement::Gateway),
        (Direction::Download, Placement::Nowhere),
        (Direction::Download, Placement::Gateway),
        (Direction::Download, Placement::BothEnds),
    ];
    Family::BOTH
        .into_iter()
        .flat_map(|family| {
            placements.map(|(direction, placement)| Contest {
                direction,
                family,
                placement,
            })
        })
        .collect()
}

fn introduce(race: &Race) {
    let LinkProfile {
        up_bps,
        rtt,
        loss,
        queue_bytes,
        ..
    } = race.profile;
    println!(
        "Link: {} Mbit/s each way, {rtt:?} round trip, {} % loss, queue of {} KiB.",
        up_bps as f64 / 1e6,
        loss * 100.0,
        queue_bytes / 1024
    );
    println!(
        "Client and server: stock TCP with {}, marked AF21. pepsal: {}.",
        race::STOCK_CONGESTION,
        race.congestion
            .map_or("its defaults".to_owned(), |congestion| format!("-C {congestion}"))
    );
    println!(
        "A file of {} each way; every transfer has a link of its own:",
        quantity::mebibytes(race.bytes)
    );
}

/// BBR paces at the rate that it measures and takes random losses for what they are.
fn has_bbr() -> bool {
    let available = fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
    let is_module = || {
        let mut modprobe = Command::new("modprobe");
        modprobe
            .args(["--dry-run", "--quiet", "tcp_bbr"])
            .stderr(Stdio::null());
        modprobe.status().is_ok_and(|status| status.success())
    };
    available.is_ok_and(|available| available.split_whitespace().any(|name| name == "bbr")) || is_module()
}

/// Becomes the same command as root, with the daemon that the user has built.
fn again_as_root(daemon: &Path) -> Result<ExitCode> {
    let this = env::current_exe().context("cannot find this program's file")?;
    let mut command = shell::as_root(&this)?;
    command.args(env::args_os().skip(1)).arg("--daemon").arg(daemon);
    Err(command.exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)))
}

/// From here on the signals that end a program arrive at the returned file, so that what has been made is taken down first.
fn block_signals() -> Result<SignalFd> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK).context("cannot wait for signals")
}

fn is_pending(signals: &SignalFd) -> bool {
    race::is_signalled_within(Duration::ZERO, signals).unwrap_or_default()
}

/// The exit status that a shell gives to a program which a signal has ended.
fn interrupted(signals: &SignalFd) -> Result<ExitCode> {
    let signal = signals.read_signal()?.context("a signal is pending")?;
    eprintln!("\nInterrupted; everything is taken down.");
    Ok(ExitCode::from(128 + signal.ssi_signo as u8))
}
