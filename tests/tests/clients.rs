//! The bound on the connections of one client (`--conns-per-client`): an IPv4 address, or the /64 of an IPv6 one.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, Map, MapData, MapInfo};
use nix::sys::signal::Signal;
use pepsal_ebpf::subscriber::Slot;
use pepsal_tests::packet::{Forger, Tcp};
use pepsal_tests::{
    Bed, Connection, Connector, Daemon, Family, Network, PATIENCE, Path, Topology, eventually, reset,
};

const BOUND: usize = 3;
const BOUNDED: [&str; 4] = ["-i", "lan0", "--conns-per-client", "3"];

/// Opens connections until as many as may be are split, which those are that it returns.
fn fill(bed: &Bed, family: Family) -> Vec<Connection> {
    let mut held = Vec::new();
    eventually(PATIENCE, || {
        held.extend(bed.flow(family));
        held.len() == BOUND
    });
    held
}

/// Opens a connection from another address of the client's.
fn open_from_another(bed: &Bed, family: Family) -> Result<Path> {
    let connector = Connector {
        source: Some(SocketAddr::new(family.extra_client(0), 0)),
        ..Connector::default()
    };
    let connection = bed.open_by(&connector, family)?;
    connection.greet()?;
    Ok(connection.path())
}

/// How many connections a daemon counts, in every slot of each client.
fn counted(daemon: &Daemon) -> Result<u64> {
    let mut sum = 0;
    for descriptor in fs::read_dir(format!("/proc/{}/fdinfo", daemon.pid()))? {
        // One that is closed meanwhile is none that is looked for.
        let information = fs::read_to_string(descriptor?.path()).unwrap_or_default();
        let id = information
            .lines()
            .find_map(|line| line.strip_prefix("map_id:")?.trim().parse().ok());
        let Some(id) = id else { continue };
        if MapInfo::from_id(id)?.name_as_str() == Some("CONNECTIONS") {
            let slots: Array<MapData, Slot> = Array::try_from(Map::Array(MapData::from_id(id)?))?;
            for slot in slots.iter() {
                sum += slot?.connections();
            }
            return Ok(sum);
        }
    }
    anyhow::bail!("the daemon has no such map")
}

#[test]
fn connections_above_the_bound_of_a_client_pass_through() -> Result<()> {
    let bed = Bed::on(Topology::builder().extra_clients(1).build()?, &BOUNDED)?;
    for (family, another) in [(Family::V4, Path::Split), (Family::V6, Path::Forwarded)] {
        let flows: Vec<Connection> = (0..BOUND).map(|_| bed.flow(family)).collect::<Result<_>>()?;
        let above = [bed.open(family)?, bed.open(family)?];
        for connection in &above {
            assert_eq!(connection.path(), Path::Forwarded, "{family:?}");
        }
        assert_eq!(open_from_another(&bed, family)?, another, "{family:?}");
        flows.iter().chain(&above).try_for_each(Connection::exchange)?;
        drop((flows, above));
        // Places become free again as flows end.
        let flows = fill(&bed, family);
        assert_eq!(bed.open(family)?.path(), Path::Forwarded, "{family:?}");
        drop(flows);
    }
    let exit = bed.daemon.terminate()?;
    assert!(exit.counter("client_limit_reached") >= 7, "{}", exit.log);
    assert_eq!(exit.counter("limit_reached"), 0, "{}", exit.log);
    Ok(())
}

#[test]
fn count_of_a_client_does_not_leak() -> Result<()> {
    let bed = Bed::start(&BOUNDED)?;
    let forger = Forger::new(&bed.topology.client)?;
    for family in Family::BOTH {
        for index in 0..30 {
            let mut flow = None;
            eventually(PATIENCE, || {
                flow = bed.flow(family).ok();
                flow.is_some()
            });
            let flow = flow.context("it was split")?;
            flow.greet()?;
            match index % 3 {
                0 => drop(flow),
                1 => reset(flow.client)?,
                _ => reset(flow.server)?,
            }
        }
        for _ in 0..10 {
            // Nobody listens there.
            let refused = (family.server(), 9).into();
            let attempt = Connector::default().connect(&bed.topology.client, refused);
            assert!(attempt.and_then(|stream| talk(&stream)).is_err());
        }
    }
    eventually(PATIENCE, || {
        counted(&bed.daemon).is_ok_and(|counted| counted == 0)
    });
    // SYNs that come again, and whose handshake is never completed: the client's kernel knows nothing of them.
    for port in 0..BOUND as u16 {
        for _ in 0..2 {
            forger.send(&Tcp {
                source: (Family::V4.client(), 50_000 + port).into(),
                destination: bed.address(Family::V4),
                ..Tcp::syn(Family::V4)
            })?;
        }
    }
    eventually(PATIENCE, || {
        bed.open(Family::V4)
            .is_ok_and(|passing| passing.path() == Path::Forwarded)
    });
    for family in Family::BOTH {
        let flows = fill(&bed, family);
        assert_eq!(bed.open(family)?.path(), Path::Forwarded, "{family:?}");
        flows.iter().try_for_each(Connection::exchange)?;
    }
    eventually(PATIENCE, || {
        counted(&bed.daemon).is_ok_and(|counted| counted == 0)
    });
    let exit = bed.daemon.terminate()?;
    assert!(exit.counter("refused") > 0, "{}", exit.log);
    // The last walk over the map may be counted no more.
    assert!(exit.counter("record_expired") > 0, "{}", exit.log);
    Ok(())
}

fn talk(mut stream: &TcpStream) -> std::io::Result<usize> {
    stream.write_all(b"hello")?;
    stream.read(&mut [0])
}

#[test]
fn bound_is_of_each_daemon() -> Result<()> {
    let Bed { daemon, network } = Bed::start(&BOUNDED)?;
    let open = |network: &Network| -> Result<Vec<Connection>> {
        let flows = (0..BOUND)
            .map(|_| network.flow(Family::V4))
            .collect::<Result<_>>()?;
        let path = network.open(Family::V4)?.path();
        ensure!(path == Path::Forwarded, "one above the bound is split");
        Ok(flows)
    };
    let first = open(&network)?;
    let successor = network.start(&[&BOUNDED[..], &["--takeover"]].concat())?;
    daemon.wait_for_log("takeover by process")?;
    let second = open(&network)?;
    first.iter().chain(&second).try_for_each(Connection::exchange)?;
    drop(first);
    assert!(daemon.wait()?.status.success());
    // One that is killed leaves no count behind.
    successor.signal(Signal::SIGKILL)?;
    successor.wait()?;
    let _daemon = network.start(&BOUNDED)?;
    open(&network)?.iter().try_for_each(Connection::exchange)
}
