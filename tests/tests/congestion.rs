//! Congestion controls on one link. These are measurements and not tests: they are run when somebody asks for them, where
//! the kernel has the algorithms (`cargo xtask vm-test 6.12 --files congestion -- --ignored --nocapture`).

use std::{thread, time::Duration};

use anyhow::{Result, ensure};
use pepsal_tests::{Daemon, Family, Link, LinkProfile, PATIENCE, Server, Topology, Transfer, eventually};

/// So slow that an emulated processor keeps up.
const RATE: &str = "5mbit";
const RATE_BPS: u64 = 5_000_000;
const BYTES: u64 = 2 << 20;
const RTT: Duration = Duration::from_millis(600);
const ROUNDS: u64 = 3;
/// pepsal's own is the default of a link.
const ALGORITHMS: [&str; 4] = ["pepsal", "bbr", "hybla", "cubic"];

#[test]
#[ignore = "measures"]
fn uploads_without_loss() -> Result<()> {
    compare(0.0)
}

#[test]
#[ignore = "measures"]
fn uploads_with_loss() -> Result<()> {
    compare(0.01)
}

/// Prints a row for each algorithm: the median of the rounds, their least and greatest. In a round, which is the same seed,
/// the link loses the same packets by number, whatever the algorithm.
fn compare(loss: f64) -> Result<()> {
    let mut seconds = vec![Vec::new(); ALGORITHMS.len()];
    for seed in 1..=ROUNDS {
        for (algorithm, seconds) in ALGORITHMS.iter().zip(&mut seconds) {
            let elapsed = upload(algorithm, loss, seed)?.as_secs_f64();
            println!("round {seed}: {algorithm}: {elapsed:.2} s");
            seconds.push(elapsed);
        }
    }
    for (algorithm, mut seconds) in ALGORITHMS.iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        let (least, median, greatest) = (seconds[0], seconds[seconds.len() / 2], seconds[seconds.len() - 1]);
        println!(
            "| {algorithm} | {} % | {median:.1} s | {least:.1}–{greatest:.1} |",
            loss * 100.0
        );
    }
    Ok(())
}

/// What a client sends over the link to a server that nobody has tuned.
fn upload(algorithm: &str, loss: f64, seed: u64) -> Result<Duration> {
    let profile = LinkProfile {
        seed,
        ..LinkProfile::symmetric(RATE_BPS, RTT, loss)
    };
    let topology = Topology::builder().link(Link::Tun(profile)).build()?;
    let link = format!("sat0,rate={RATE},rtt={}ms", RTT.as_millis());
    let link = if algorithm == ALGORITHMS[0] {
        link
    } else {
        format!("{link},cc={algorithm}")
    };
    let daemon = Daemon::start(&topology.gateway, &["-i", "lan0", "--link", &link])?;
    let server = Server::start(&topology.server)?;
    let transfer = Transfer::upload(BYTES).seed(seed);
    let outcome = thread::scope(|scope| -> Result<_> {
        let outcome = scope.spawn(|| transfer.run(&topology.client, server.address(Family::V4)));
        // The kernel may have refused pepsal's own.
        let port = server.port();
        eventually(PATIENCE, || uses(&daemon, port, algorithm));
        outcome.join().expect("a transfer does not panic")
    })?;
    ensure!(outcome.intact, "damaged");
    Ok(outcome.elapsed)
}

/// Whether the server leg has that congestion control.
fn uses(daemon: &Daemon, port: u16, algorithm: &str) -> bool {
    let legs = daemon.legs().unwrap_or_default();
    legs.iter()
        .any(|leg| leg.peer.port() == port && leg.congestion.starts_with(algorithm))
}
