//! Transfers a file over an emulated satellite link, with and without pepsal.
//!
//! Every transfer has its own client, gateway, server and link, so all can run concurrently without influence
//! on each other, if the machine is fast enough for the links' rates.

use std::{
    env,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use pepsal_tests::{Direction, Family, LinkProfile};

mod contest;
mod lane;
mod progress;
mod race;
mod table;

use self::{
    contest::{Contest, Placement},
    race::Race,
};
use crate::{
    build, quantity,
    setup::{self, Needs},
    shell,
    signals::Signals,
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
    #[arg(long, default_value = "4MiB", value_parser = quantity::bytes)]
    size: u64,
    /// Run this daemon instead of building one.
    #[arg(long, value_name = "FILE")]
    daemon: Option<PathBuf>,
}

/// Rate of links that the machine can emulate concurrently, in bit/s, without being the bottleneck.
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
        profile,
        bytes: options.size,
    };
    introduce(&race);
    let signals = Signals::block()?;
    let mut finishes = Vec::new();
    let at_once = (EMULATED_BPS_AT_ONCE / options.rate).max(1) as usize;
    for contests in contests().chunks(at_once) {
        match race.run(contests, &signals) {
            Ok(Some(more)) => finishes.extend(more),
            Ok(None) => return signals.interrupted(),
            // The signal also ended the running child process.
            Err(_) if signals.is_pending() => return signals.interrupted(),
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
A gateway accelerates what it sends over the link itself. Beside the client it sends the uploads, as fast as the server's
own window lets it; downloads are sent by the server's stock TCP, beyond the link. With pepsal at that end too, both run at
the speed of the link from the first round trip.";

/// Returns all comparisons.
fn contests() -> Vec<Contest> {
    let placements = [
        (Direction::Upload, Placement::Nowhere),
        (Direction::Upload, Placement::Gateway),
        (Direction::Upload, Placement::BothEnds),
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
        "Client and server: stock TCP with {}, marked AF21. pepsal has the option --link {}.",
        lane::STOCK_CONGESTION,
        race.link_argument("sat0")
    );
    println!(
        "A file of {} each way; every transfer has a link of its own:",
        quantity::mebibytes(race.bytes)
    );
}

/// Executes the same command as root, with the daemon that the user has built.
fn again_as_root(daemon: &Path) -> Result<ExitCode> {
    let this = env::current_exe().context("cannot find this program's file")?;
    let mut command = shell::as_root(&this)?;
    command.args(env::args_os().skip(1)).arg("--daemon").arg(daemon);
    Err(command.exec()).with_context(|| format!("cannot run `{}`", shell::line(&command)))
}
