//! Requests in SYNs (RFC 7413).

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{Bed, Connection, Connector, Family, Network, PATIENCE, Side, Topology, Transfer};

use crate::on;

#[test]
fn request_in_the_clients_syn_is_carried_in_the_servers() -> Result<()> {
    for arguments in [
        &["-f"][..],
        &["-f", "--source", "gateway"],
        &["-f", "--link", "sat0,rate=20mbit,rtt=100ms"],
    ] {
        let bed = on(fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?, arguments)?;
        for family in Family::BOTH {
            ask_in_syn(&bed, family).with_context(|| format!("{family:?} {arguments:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn requests_longer_than_a_syn_arrive_whole() -> Result<()> {
    let bed = Bed::on(
        fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?,
        &["-i", "lan0", "-f"],
    )?;
    for family in Family::BOTH {
        let mut was_in_syn = false;
        for bytes in [100, 1_000, 10_000, 100_000, 1_000_000] {
            let upload = Transfer::upload(bytes).connector(eager());
            let outcome = upload.run(&bed.topology.client, bed.server.address(family))?;
            assert!(outcome.intact, "{family:?}, {bytes} bytes");
            was_in_syn |= outcome.syn.segment().payload_len > 0;
        }
        assert!(was_in_syn, "{family:?}");
    }
    Ok(())
}

#[test]
fn server_without_fast_open_is_served_without() -> Result<()> {
    let bed = on(fast_open(Topology::new()?, NO_FAST_OPEN)?, &["-f"])?;
    for family in Family::BOTH {
        let mut asked_for_cookie = false;
        for _ in 0..4 {
            let syn = ask(&bed, family)?.syn.segment();
            assert_eq!(syn.payload_len, 0, "{family:?}");
            asked_for_cookie |= syn.fast_open;
        }
        assert!(asked_for_cookie, "{family:?}");
    }
    Ok(())
}

#[test]
fn fast_open_does_not_wait_for_clients_that_let_the_server_speak_first() -> Result<()> {
    let topology = fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?;
    let bed = on(topology, &["-f", "--link", "sat0,rate=20mbit,rtt=100ms"])?;
    for family in Family::BOTH {
        // With a cookie the gateway could put a SYN off until it has data.
        ask_in_syn(&bed, family)?;
        let mut flow = bed.flow(family)?;
        flow.server.write_all(ANSWER)?;
        let mut banner = [0; ANSWER.len()];
        flow.client.read_exact(&mut banner)?;
        assert_eq!(banner, ANSWER);
    }
    Ok(())
}

#[test]
fn leg_opened_with_data_starts_with_the_links_window() -> Result<()> {
    let topology = fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?;
    let link = "sat0,rate=20mbit,rtt=100ms,iw=64KiB,cc=cubic";
    let bed = on(topology, &["-f", "--link", link])?;
    for family in Family::BOTH {
        let flow = ask_in_syn(&bed, family)?;
        // What was acknowledged may have opened it further.
        bed.expect(&flow, Side::Server, |leg| leg.window >= 65_536 / leg.mss, true);
    }
    Ok(())
}

#[test]
fn refusal_of_a_request_in_a_syn_resets_the_client() -> Result<()> {
    let bed = on(fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?, &["-f"])?;
    for family in Family::BOTH {
        ask_in_syn(&bed, family)?;
        let nobody = SocketAddr::new(family.server(), 9);
        let mut client = eager().connect(&bed.topology.client, nobody)?;
        client.write_all(REQUEST)?;
        let error = client.read(&mut [0]).expect_err("nobody listens there");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
    }
    let exit = bed.daemon.terminate()?;
    assert_eq!(exit.counter("refused"), 2, "{}", exit.log);
    Ok(())
}

pub const REQUEST: &[u8] = &[b'q'; 300];
const ANSWER: &[u8] = b"answer";

/// `net.ipv4.tcp_fastopen`, which holds for both families: no fast open; as client and as server; as server for
/// listeners that do not ask for it, too.
const NO_FAST_OPEN: u32 = 0;
const FAST_OPEN: u32 = 0x3;
pub const FAST_OPEN_FOR_ALL: u32 = 0x403;

/// A topology whose client and gateways may use fast open, and whose server does or does not.
pub fn fast_open(topology: Topology, server: u32) -> Result<Topology> {
    let namespaces = [&topology.client, &topology.gateway];
    for namespace in namespaces.into_iter().chain(&topology.router) {
        namespace.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)?;
    }
    topology.server.sysctl("net.ipv4.tcp_fastopen", server)?;
    Ok(topology)
}

/// A client whose request goes with its SYN.
fn eager() -> Connector {
    Connector {
        fast_open: true,
        ..Connector::default()
    }
}

/// A request and its answer over a connection of their own, made by an eager client.
pub fn ask(network: &Network, family: Family) -> Result<Connection> {
    let mut client = eager().connect(&network.topology.client, network.address(family))?;
    client.write_all(REQUEST)?;
    let mut flow = Connection::new(client, network.listener(family).accept(PATIENCE)?);
    let mut request = [0; REQUEST.len()];
    flow.server.read_exact(&mut request)?;
    ensure!(request == REQUEST, "what arrives is not what was sent");
    flow.server.write_all(ANSWER)?;
    let mut answer = [0; ANSWER.len()];
    flow.client.read_exact(&mut answer)?;
    ensure!(answer == ANSWER, "what comes back is not what was sent");
    Ok(flow)
}

/// Asks until the request is in the server's SYN: first every hop has to be given its cookie.
pub fn ask_in_syn(network: &Network, family: Family) -> Result<Connection> {
    // Client, gateway and router get theirs one after the other.
    for _ in 0..4 {
        let flow = ask(network, family)?;
        if flow.syn.segment().payload_len == REQUEST.len() {
            return Ok(flow);
        }
    }
    bail!("no request in a SYN after as many connections as there are cookies")
}
