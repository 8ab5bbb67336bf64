//! Measures the cost of steering per packet.
//!
//! The kernel runs the loaded programs of the daemon, with its maps, flows, listeners and namespaces,
//! repeatedly on one packet (`BPF_PROG_TEST_RUN`). A forwarded packet passes two of them, one on ingress and
//! one on egress.
//!
//! Netfilter's rules cannot be run in this way. So passing packets are also sent through the gateway, and
//! their total times compared: veth delivers a frame before the next one is sent. The packets arrive on the
//! server's side, where TPROXY's rules look for a socket; on the client's side they would match any TCP
//! segment.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType, TestRun as _, TestRunOptions};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::if_nametoindex,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, send, socket},
};
use pepsal_tests::Family;

use super::{
    contender::Contender,
    end::Order,
    firewall::{DISCARD_PORT, FOREIGN_PORT},
    frames::{Kind, Packet},
    lane::Lane,
    observation::{Metric, Programs},
    rounds::Bench,
};

const PATIENCE: Duration = Duration::from_secs(20);
/// `struct __sk_buff` of `uapi/linux/bpf.h`: mark at 8, ingress_ifindex at 36, ifindex at 40.
const SK_BUFF_LEN: usize = 192;
/// `TC_ACT_REDIRECT`: the packet is given to a leg's namespace.
const REDIRECT: u32 = 7;
/// Unused addresses behind client and server, which drop packets to them.
const BEHIND_CLIENT: [&str; 2] = ["10.8.0.1", "fd08::1"];
const BEHIND_SERVER: [&str; 2] = ["10.9.0.1", "fd09::1"];
/// Turns in which all contenders send packets; the result is the minimum, without the other load of the
/// machine.
const TURNS: u32 = 10;

/// Measures programs and gateways.
pub fn measure(bench: &mut Bench<'_>) -> Result<()> {
    let mut lanes = BTreeMap::new();
    let mut builds = Vec::new();
    for contender in bench.contenders {
        let lane = Lane::new(*contender, bench.equipment)?;
        if matches!(contender, Contender::OldBuild | Contender::Pepsal) {
            builds.push((*contender, Steering::of(&lane)?));
        }
        lanes.insert(*contender, lane);
    }
    for family in Family::BOTH {
        programs(bench, &builds, &mut lanes, family)?;
    }
    passing(bench, &lanes)
}

/// Runs the programs of all builds on all kinds of packets.
fn programs(
    bench: &mut Bench<'_>,
    builds: &[(Contender, Steering)],
    lanes: &mut BTreeMap<Contender, Lane<'_>>,
    family: Family,
) -> Result<()> {
    let mut flows = BTreeMap::new();
    for (contender, _) in builds {
        let lane = lanes.get_mut(contender).expect("every contender has a lane");
        let server = lane.server(family);
        lane.order(&Order::Release, PATIENCE)?;
        let held = lane.order(&Order::Hold { server, flows: 1 }, PATIENCE)?;
        let client = held.local.context("the client holds a flow")?;
        flows.insert(*contender, (client, server));
    }
    for round in 1..=bench.amounts.rounds {
        for packet in Packet::ALL.into_iter().filter(|packet| packet.family == family) {
            for (contender, steering) in builds {
                bench
                    .progress
                    .show(|| format!("steering programs, {packet}, round {round}: {contender}"));
                let (client, server) = flows[contender];
                let ends = match packet.kind {
                    Kind::Established => (client, server),
                    Kind::Syn => (
                        SocketAddr::new(family.client(), FOREIGN_PORT + round as u16),
                        server,
                    ),
                    Kind::ForeignAck | Kind::Udp => foreign_ends(family),
                };
                let gateway = &lanes[contender].topology().gateway;
                let times = gateway.run(|| steering.times(packet, ends, bench.amounts.packets))?;
                for (programs, nanoseconds) in times {
                    let metric = Metric::Steering(programs, packet);
                    bench.found.add(round, *contender, metric, nanoseconds);
                }
            }
        }
    }
    Ok(())
}

/// Returns client and server of a packet without a connection.
fn foreign_ends(family: Family) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(family.client(), FOREIGN_PORT),
        SocketAddr::new(family.server(), DISCARD_PORT),
    )
}

/// The loaded programs of a daemon, and the interfaces that packets pass.
struct Steering {
    ingress: SchedClassifier,
    /// Builds whose legs are in the host's namespace have none.
    egress: Option<SchedClassifier>,
    lan0: u32,
    sat0: u32,
    /// The link-layer address of `lan0`: a packet for another one is not steered.
    address: [u8; 6],
}

impl Steering {
    fn of(lane: &Lane<'_>) -> Result<Self> {
        lane.topology().gateway.run(|| {
            Ok(Self {
                ingress: program("lan0", TcAttachType::Ingress)?.context("nothing is attached to lan0")?,
                egress: program("sat0", TcAttachType::Egress)?,
                lan0: if_nametoindex("lan0")?,
                sat0: if_nametoindex("sat0")?,
                address: link_address("lan0")?,
            })
        })
    }

    /// Returns the time of each program for a packet between client and server, in nanoseconds. The caller
    /// has to be in the gateway's namespace.
    fn times(
        &self,
        packet: Packet,
        (client, server): (SocketAddr, SocketAddr),
        repeat: u32,
    ) -> Result<Vec<(Programs, f64)>> {
        let up = Passage {
            frame: packet.frame(client, server, self.address),
            from: self.lan0,
            at: self.lan0,
        };
        let ingress = up.time(&self.ingress, packet, repeat)?;
        let mut times = vec![(Programs::Ingress, ingress)];
        let on_egress = match packet.kind {
            // The client leg receives it on ingress, and the server leg sends another one.
            Kind::Syn => None,
            // The server leg receives the server's segments.
            Kind::Established => Some(Passage {
                frame: packet.frame(server, client, self.address),
                from: self.sat0,
                at: self.lan0,
            }),
            Kind::ForeignAck | Kind::Udp => Some(Passage { at: self.sat0, ..up }),
        };
        let mut egress = 0.0;
        if let (Some(passage), Some(program)) = (on_egress, &self.egress) {
            egress = passage.time(program, packet, repeat)?;
            times.push((Programs::Egress, egress));
        }
        if packet.is_foreign() {
            times.push((Programs::Both, ingress + egress));
        }
        Ok(times)
    }
}

struct Passage {
    frame: Vec<u8>,
    /// Index of the interface that it came in by.
    from: u32,
    /// Index of the interface whose program looks at it.
    at: u32,
}

impl Passage {
    /// Returns the mean time of a run of a program, in nanoseconds.
    ///
    /// # Errors
    /// When the program's verdict is not that of the packet's kind.
    fn time(&self, program: &SchedClassifier, packet: Packet, repeat: u32) -> Result<f64> {
        let mut context = [0; SK_BUFF_LEN];
        context[36..40].copy_from_slice(&self.from.to_ne_bytes());
        context[40..44].copy_from_slice(&self.at.to_ne_bytes());
        let mut context_out = [0; SK_BUFF_LEN];
        let mut frame_out = vec![0; self.frame.len() + 64];
        let mut run = |repeat| {
            program.test_run(TestRunOptions {
                data_in: Some(&self.frame),
                data_out: Some(&mut frame_out),
                ctx_in: Some(&context),
                ctx_out: Some(&mut context_out),
                repeat,
                ..TestRunOptions::default()
            })
        };
        // The first run is cold.
        run(1)?;
        let result = run(repeat)?;
        // Builds whose legs are in the host's namespace mark a packet instead of redirecting it.
        let is_steered = result.return_value == REDIRECT || context_out[8..12] != [0; 4];
        ensure!(
            is_steered != packet.is_foreign(),
            "{packet}: {}",
            if is_steered { "steered" } else { "not steered" }
        );
        Ok(result.duration.as_nanos() as f64)
    }
}

/// Returns pepsal's program on a hook of an interface of this namespace, if there is one.
fn program(interface: &str, hook: TcAttachType) -> Result<Option<SchedClassifier>> {
    let (_, attached) = SchedClassifier::query_tcx(interface, hook)
        .with_context(|| format!("cannot list the programs on {interface}, which needs Linux 6.6"))?;
    let is_ours = |info: &ProgramInfo| info.name_as_str().is_some_and(|name| name.starts_with("pepsal_"));
    let info = attached.into_iter().find(is_ours);
    Ok(info
        .map(|info| SchedClassifier::from_program_info(info, "pepsal".into()))
        .transpose()?)
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
        let (source, destination) = (
            end(BEHIND_SERVER, DISCARD_PORT)?,
            end(BEHIND_CLIENT, FOREIGN_PORT)?,
        );
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

/// Returns a socket that sends frames through a device of this namespace.
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

/// Returns the link-layer address of a device of this namespace.
fn link_address(device: &str) -> Result<[u8; 6]> {
    getifaddrs()?
        .filter(|interface| interface.interface_name == device)
        .find_map(|interface| interface.address?.as_link_addr()?.addr())
        .with_context(|| format!("no device {device}"))
}
