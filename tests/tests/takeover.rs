//! How one daemon follows another while traffic goes on.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pepsal_tests::{
    Bed, Cancel, Connector, Daemon, Direction, Family, Footprint, Network, PATIENCE, Path, Session, Topology,
    Transfer, eventually,
};

const TAKEOVER: [&str; 5] = ["-i", "lan0", "-i", "sat0", "--takeover"];

/// How often a daemon is followed by the next.
const UPGRADES: usize = 10;

#[test]
fn ten_upgrades_under_load_refuse_no_connection_and_reset_no_flow() -> Result<()> {
    let network = Network::new()?;
    let Network { topology, server, .. } = &network;
    let before = Footprint::of(&topology.gateway)?;
    let mut daemons = vec![network.start(&[])?];
    // Opened through the first daemon, and used until the end.
    let lasting: Vec<Session> = Family::BOTH
        .into_iter()
        .map(|family| {
            Session::open(
                &Connector::default(),
                &topology.client,
                server.address(family),
                &Cancel::default(),
            )
        })
        .collect::<Result<_>>()?;
    let stop = AtomicBool::new(false);
    let flows = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        let loads: Vec<_> = [(Family::V4, 0), (Family::V6, 1_000_000), (Family::V4, 2_000_000)]
            .into_iter()
            .map(|(family, seed)| {
                let (server, stop) = (server.address(family), &stop);
                scope.spawn(move || load(topology, server, seed, stop))
            })
            .collect();
        let upgraded = (0..UPGRADES).try_for_each(|upgrade| {
            let next = network.start(&TAKEOVER)?;
            daemons[upgrade].wait_for_log("takeover by process")?;
            daemons.push(next);
            for session in &lasting {
                let (_, intact) = session.download(100_000, upgrade as u64)?;
                ensure!(intact, "a lasting flow is damaged after upgrade {upgrade}");
            }
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        for load in loads {
            let done = load.join().expect("the load does not panic")?;
            flows.fetch_add(done, Ordering::Relaxed);
        }
        upgraded
    })?;
    assert!(flows.load(Ordering::Relaxed) > UPGRADES as u64, "there was load");
    drop(lasting);
    let last = daemons.pop().expect("the last is there");
    for daemon in daemons {
        let exit = daemon.wait()?;
        assert_eq!(
            exit.code(),
            Some(0),
            "a drained instance ends by itself: {}",
            exit.log
        );
    }
    assert_eq!(
        network.probe(Family::V4)?,
        Path::Split,
        "the devices are still there"
    );
    last.terminate()?;
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

#[test]
fn without_another_a_takeover_is_an_ordinary_start() -> Result<()> {
    let topology = Topology::new()?;
    let daemon = Daemon::start(&topology.gateway, &TAKEOVER)?;
    assert_eq!(daemon.terminate()?.code(), Some(0));
    Ok(())
}

/// Connections to a daemon's socket for takeovers.
fn silent_connections(topology: &Topology, daemon: &Daemon) -> Result<Vec<UnixStream>> {
    let claim = topology.gateway.claim("lan0")?;
    let suffix = format!(":{}", daemon.pid());
    let socket = fs::read_dir(claim.parent().context("it lies in a directory")?)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.to_string_lossy().ends_with(&suffix))
        .context("a socket that is named for the process")?;
    let connections = (0..8).map(|_| UnixStream::connect(&socket));
    Ok(connections.collect::<std::io::Result<_>>()?)
}

#[test]
fn connections_that_request_nothing_do_not_delay_a_takeover() -> Result<()> {
    let Bed {
        daemon: first,
        network,
    } = Bed::start(&[])?;
    let _silent = silent_connections(&network.topology, &first)?;
    let second = network.start(&TAKEOVER)?;
    first.wait_for_log("takeover by process")?;
    assert_eq!(network.probe(Family::V4)?, Path::Split);
    assert_eq!(first.wait()?.code(), Some(0));
    drop(second);
    Ok(())
}

#[test]
fn successor_claims_what_it_wants_and_releases_the_rest() -> Result<()> {
    let topology = Topology::new()?;
    let owner = |interface| -> Result<Option<u32>> {
        let owner = fs::read_to_string(topology.gateway.claim(interface)?).ok();
        Ok(owner.and_then(|owner| owner.trim().parse().ok()))
    };
    let first = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let second = Daemon::start(&topology.gateway, &TAKEOVER)?;
    let pid = Some(second.pid());
    assert_eq!((owner("lan0")?, owner("sat0")?), (pid, pid));
    first.wait()?;
    let third = Daemon::start(&topology.gateway, &["-i", "sat0", "--takeover"])?;
    second.wait()?;
    assert_eq!((owner("lan0")?, owner("sat0")?), (None, Some(third.pid())));
    third.terminate()?;
    assert_eq!(owner("sat0")?, None);
    Ok(())
}

#[test]
fn takeover_from_two_at_once_is_refused() -> Result<()> {
    let topology = Topology::new()?;
    let first = Daemon::start(&topology.gateway, &["-i", "lan0"])?;
    let second = Daemon::start(&topology.gateway, &["-i", "sat0"])?;
    let exit = Daemon::expect_failure(&topology.gateway, &TAKEOVER)?;
    let expected = format!(
        "cannot take over from both process {} (interface lan0) and process {} (interface sat0): stop one of them",
        first.pid(),
        second.pid()
    );
    assert!(exit.log.contains(&expected), "{}", exit.log);
    Ok(())
}

#[test]
fn one_that_does_not_let_go_stays() -> Result<()> {
    let Bed { daemon, network } = Bed::start(&[])?;
    daemon.signal(Signal::SIGSTOP)?;
    let exit = Daemon::expect_failure(&network.topology.gateway, &TAKEOVER)?;
    daemon.signal(Signal::SIGCONT)?;
    let expected = format!(
        "process {} does not let go: stop it, or start without --takeover",
        daemon.pid()
    );
    assert!(exit.log.contains(&expected), "{}", exit.log);
    eventually(PATIENCE, || {
        network.probe(Family::V4).is_ok_and(|path| path == Path::Split)
    });
    Ok(())
}

/// Connects, transfers and closes, again and again.
fn load(topology: &Topology, server: SocketAddr, seed: u64, stop: &AtomicBool) -> Result<u64> {
    let mut flows = 0;
    while !stop.load(Ordering::Relaxed) {
        let number = seed + flows;
        let direction = [Direction::Upload, Direction::Download][number as usize % 2];
        let transfer = Transfer::new(direction, 1 << (10 + number % 11)).seed(number);
        let outcome = transfer
            .run(&topology.client, server)
            .with_context(|| format!("flow {flows} of seed {seed}"))?;
        ensure!(outcome.intact, "flow {flows} of seed {seed} is damaged");
        ensure!(
            outcome.path() == Path::Split,
            "flow {flows} of seed {seed} passed by"
        );
        flows += 1;
    }
    Ok(flows)
}
