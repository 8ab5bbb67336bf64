//! What steering costs a packet.
//!
//! What pepsal's program takes is measured on the program that the daemon has loaded, with its maps, flows and listeners,
//! as the kernel runs it over and over on one packet (`BPF_PROG_TEST_RUN`).
//!
//! Netfilter's rules cannot be run that way. So packets that pass are sent through the gateway as well, and the time that
//! each takes, all in all, is compared: veth hands a frame on to the end of its way before the next is sent. They come
//! from the server's side, where TPROXY's rules look for a socket; from the client's they would take any segment of TCP.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions, loaded_programs};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, send, socket},
};
use pepsal_tests::{Family, Namespace};

use super::{
    Bench,
    contender::Contender,
    end::Order,
    frames::{Kind, Packet},
    lane::Lane,
    observation::Metric,
};

const PROGRAM: &str = "pepsal_steer";
const PATIENCE: Duration = Duration::from_secs(20);
/// `struct __sk_buff` of `uapi/linux/bpf.h`: mark at 8, ifindex at 40.
const SK_BUFF_LEN: usize = 192;
/// Ports that nobody has.
const FOREIGN: (u16, u16) = (40_001, 9);
/// Unused subnets behind client and server, which both throw away what is for them.
const BEHIND_CLIENT: [&str; 2] = ["10.8.0.1", "fd08::1"];
const BEHIND_SERVER: [&str; 2] = ["10.9.0.1", "fd09::1"];
/// Packets are sent in as many turns, each contender in each, for the least of the turns: whatever else the machine does
/// adds to the others.
const TURNS: u32 = 10;

/// Measures both.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let mut lanes = BTreeMap::new();
    for contender in bench.contenders {
        lanes.insert(*contender, Lane::new(*contender, bench.equipment)?);
    }
    if let Some(lane) = lanes.get_mut(&Contender::Pepsal) {
        program(bench, lane)?;
    }
    passing(bench, &lanes)
}

/// Runs the program on all kinds of packets.
fn program(bench: &mut Bench<'_>, lane: &mut Lane<'_>) -> Result<()> {
    let daemon = lane.proxy_pid().context("the daemon runs")?;
    let program = steering_program(daemon)?;
    let lan0 = lane.topology().gateway.run(|| if_nametoindex("lan0"))?;
    for family in Family::BOTH {
        let server = lane.server(family);
        lane.order(&Order::Release, PATIENCE)?;
        let held = lane.order(&Order::Hold { server, flows: 1 }, PATIENCE)?;
        let local = held.local.context("the client holds a flow")?;
        for round in 1..=bench.amounts.rounds {
            for packet in Packet::ALL.into_iter().filter(|packet| packet.family == family) {
                bench.progress.show(|| format!("steering program, {packet}"));
                let (source, destination) = match packet.kind {
                    Kind::Established => (local, server),
                    Kind::Syn => (SocketAddr::new(family.client(), FOREIGN.0 + round as u16), server),
                    Kind::ForeignAck | Kind::Udp => (
                        SocketAddr::new(family.client(), FOREIGN.0),
                        SocketAddr::new(family.server(), FOREIGN.1),
                    ),
                };
                let frame = packet.frame(source, destination, [0; 6]);
                let gateway = &lane.topology().gateway;
                let nanoseconds = test_run(&program, gateway, lan0, packet, &frame, bench.amounts.packets)?;
                bench
                    .found
                    .add(round, Contender::Pepsal, Metric::Steering(packet), nanoseconds);
            }
        }
    }
    Ok(())
}

/// Nanoseconds for each run.
fn test_run(
    program: &SchedClassifier,
    gateway: &Namespace,
    lan0: u32,
    packet: Packet,
    frame: &[u8],
    repeat: u32,
) -> Result<f64> {
    let mut context = [0; SK_BUFF_LEN];
    context[40..44].copy_from_slice(&lan0.to_ne_bytes());
    let mut context_out = [0; SK_BUFF_LEN];
    let mut frame_out = vec![0; frame.len() + 64];
    // The first run is cold.
    for repeat in [1, repeat] {
        let result = gateway.run(|| {
            program.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut frame_out),
                ctx_in: Some(&context),
                ctx_out: Some(&mut context_out),
                repeat,
                ..TestRunOptions::default()
            })
        })?;
        let is_marked = context_out[8..12] != [0; 4];
        ensure!(
            is_marked != packet.is_foreign(),
            "{packet}: {}",
            if is_marked { "steered" } else { "not steered" }
        );
        if repeat > 1 {
            return Ok(result.duration.as_nanos() as f64);
        }
    }
    bail!("a program has to run more than once to be measured")
}

/// The program of that name which a process holds open.
fn steering_program(process: u32) -> Result<SchedClassifier> {
    let ids = held_programs(process)?;
    let is_meant = |info: &ProgramInfo| ids.contains(&info.id()) && info.name_as_str() == Some(PROGRAM);
    let info = loaded_programs()
        .filter_map(Result::ok)
        .find(is_meant)
        .with_context(|| format!("process {process} has no program {PROGRAM}"))?;
    Ok(SchedClassifier::from_program_info(info, PROGRAM.into())?)
}

/// Ids of the eBPF programs that a process has descriptors of.
fn held_programs(process: u32) -> Result<Vec<u32>> {
    let folder = format!("/proc/{process}/fdinfo");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let infos = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    Ok(infos.filter_map(|info| program_id(&info)).collect())
}

fn program_id(descriptor: &str) -> Option<u32> {
    let id = descriptor
        .lines()
        .find_map(|line| line.strip_prefix("prog_id:"))?;
    id.trim().parse().ok()
}

/// Sends packets through every gateway.
fn passing(bench: &mut Bench<'_>, lanes: &BTreeMap<Contender, Lane<'_>>) -> Result<()> {
    let mut sources = BTreeMap::new();
    for (contender, lane) in lanes {
        let topology = lane.topology();
        topology.gateway.ip("route add 10.8.0.0/24 via 10.1.0.2
             route add 10.9.0.0/24 via 10.2.0.2
             route add fd08::/64 via fd01::2
             route add fd09::/64 via fd02::2")?;
        let to = topology.gateway.run(|| link_address("sat0"))?;
        sources.insert(*contender, (topology.server.run(|| packet_socket("eth0"))?, to));
    }
    let count = bench.amounts.frames / TURNS;
    for packet in Packet::ALL.into_iter().filter(|packet| packet.is_foreign()) {
        let index = usize::from(packet.family == Family::V6);
        let end = |addresses: [&str; 2], port| -> Result<_> {
            Ok(SocketAddr::new(addresses[index].parse::<IpAddr>()?, port))
        };
        let (source, destination) = (end(BEHIND_SERVER, FOREIGN.1)?, end(BEHIND_CLIENT, FOREIGN.0)?);
        for round in 1..=bench.amounts.rounds {
            let mut least = BTreeMap::<Contender, f64>::new();
            for turn in 0..TURNS {
                bench.progress.show(|| format!("forwarded, {packet}"));
                for place in 0..lanes.len() {
                    let contender = bench.contenders[(place + turn as usize) % lanes.len()];
                    let (socket, to) = &sources[&contender];
                    let frame = packet.frame(source, destination, *to);
                    let nanoseconds = send_all(socket, &frame, count)?;
                    let least = least.entry(contender).or_insert(f64::MAX);
                    *least = least.min(nanoseconds);
                }
                ensure!(!bench.equipment.signals.is_pending(), "interrupted");
            }
            for (contender, nanoseconds) in least {
                bench
                    .found
                    .add(round, contender, Metric::Passing(packet), nanoseconds);
            }
        }
    }
    Ok(())
}

fn send_all(socket: &OwnedFd, frame: &[u8], count: u32) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..count {
        send(socket.as_raw_fd(), frame, MsgFlags::empty()).context("cannot send a frame")?;
    }
    Ok(start.elapsed().as_nanos() as f64 / f64::from(count))
}

/// A socket that sends frames through a device of this namespace.
fn packet_socket(device: &str) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None::<SockProtocol>)?;
    let address = getifaddrs()?
        .filter(|interface| interface.interface_name == device)
        .find_map(|interface| interface.address?.as_link_addr().copied())
        .with_context(|| format!("no device {device}"))?;
    bind(socket.as_raw_fd(), &address)?;
    Ok(socket)
}

/// The link-layer address of a device of this namespace.
fn link_address(device: &str) -> Result<[u8; 6]> {
    getifaddrs()?
        .filter(|interface| interface.interface_name == device)
        .find_map(|interface| interface.address?.as_link_addr()?.addr())
        .with_context(|| format!("no device {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_programs_name_them() {
        let program = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nprog_type:\t3\nprog_jited:\t1\nprog_id:\t42\n";
        assert_eq!(program_id(program), Some(42));
        assert_eq!(program_id("pos:\t0\nflags:\t02\nmap_id:\t7\n"), None);
    }
}
