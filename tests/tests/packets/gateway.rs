//! The loaded programs, and what they make of a frame.

use std::env;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, HashMap, LpmTrie, PerCpuArray, SockMap, lpm_trie};
use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{SchedClassifier, SkLookup, TcAttachType, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use nix::net::if_::if_nametoindex;
use nix::time::{ClockId, clock_gettime};
use pepsal_ebpf::{
    Counter, DEVICE_MAC, ExtensionHeaders, FILTER_HEADER, FILTER_SLOTS, FlowKey, Interface, NO_LINK,
    PORT_SET_BYTES, PortSet, PrefixKey, SynHead, SynRecord, listener_v4, listener_v6, map_addr,
    subscriber::{SLOTS, Slot, slots},
};
use pepsal_tests::packet::{ACK, Tcp};
use pepsal_tests::{Connection, Connector, Family, Listener, Topology};

/// Ingress: what is for client legs, and new connections.
pub const STEER: &str = "pepsal_steer";
/// Egress: what is for server legs.
pub const REPLIES: &str = "pepsal_replies";

/// Gives the listeners what is recorded.
const LISTENER: &str = "pepsal_listener";

/// `TCX_NEXT` and `TC_ACT_UNSPEC`: whatever comes next sees the packet.
pub const NEXT: u32 = u32::MAX;

pub const MARK: u32 = 0x40;
pub const MARK_MASK: u32 = 0xc0;
/// What others have set, with both bits of ours wrong.
pub const OTHERS: u32 = 0xdead_be80;
/// `TC_ACT_REDIRECT`: the packet goes to a device of pepsal's.
const REDIRECT: u32 = 7;

/// `TC_ACT_SHOT`.
const DROP: u32 = 2;

/// The namespace that the program runs in (`BPF_F_CURRENT_NETNS`), where the tests' legs are.
const CURRENT_NETNS: u32 = u32::MAX;
/// Every namespace has the loopback, which stands for both devices.
const DEVICE: u32 = 1;

/// The link-layer address of `lan0`.
pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub const LIMIT: u32 = 4;
/// So long that no test comes to it by itself.
const HEARTBEAT_BOUND: Duration = Duration::from_secs(60);

/// The loaded programs on a gateway with routes, listeners and a daemon that is alive.
pub struct Gateway {
    pub topology: Topology,
    pub ebpf: Ebpf,
    pub lan0: u32,
    pub listeners: [TcpListener; 2],
}

impl Gateway {
    pub fn new() -> Result<Self> {
        Self::with_heartbeat_bound(HEARTBEAT_BOUND)
    }

    pub fn with_heartbeat_bound(bound: Duration) -> Result<Self> {
        Self::load(bound, 0)
    }

    /// One that takes so many connections of a subscriber.
    pub fn with_conns_per_client(bound: u32) -> Result<Self> {
        Self::load(HEARTBEAT_BOUND, bound)
    }

    fn load(bound: Duration, conns_per_client: u32) -> Result<Self> {
        let topology = Topology::new()?;
        topology.gateway.ip("link set lan0 address 02:00:00:00:00:01")?;
        let bound_ns = bound.as_nanos() as u64;
        let mut ebpf = EbpfLoader::new()
            .override_global("MARK", &MARK, true)
            .override_global("MARK_MASK", &MARK_MASK, true)
            .override_global("INSTANCE", &1_u16, true)
            .override_global("CLIENTS_IFINDEX", &DEVICE, true)
            .override_global("SERVERS_IFINDEX", &DEVICE, true)
            .override_global("CLIENTS_NETNS", &CURRENT_NETNS, true)
            .override_global("SERVERS_NETNS", &CURRENT_NETNS, true)
            .override_global("HEARTBEAT_BOUND_NS", &bound_ns, true)
            .override_global("CONNS_PER_CLIENT", &conns_per_client, true)
            .override_global("CLIENT_SLOTS_MASK", &(slots(LIMIT) - 1), true)
            .map_max_entries("FLOWS", LIMIT)
            .map_max_entries("CONNECTIONS", slots(LIMIT))
            .load_file(object()?)?;
        for name in [STEER, REPLIES] {
            program(&mut ebpf, name)?.load()?;
        }
        let (lan0, listeners) = topology.gateway.run(|| -> Result<_> {
            let listeners = [
                TcpListener::bind("127.0.0.1:5000")?,
                TcpListener::bind("[::1]:5000")?,
            ];
            Ok((if_nametoindex("lan0")?, listeners))
        })?;
        let mut slots: SockMap<_> = ebpf.map_mut("LISTENERS").context("LISTENERS")?.try_into()?;
        for (slot, listener) in [listener_v4(NO_LINK), listener_v6(NO_LINK)]
            .into_iter()
            .zip(&listeners)
        {
            slots.set(slot, &listener.as_raw_fd(), 0)?;
        }
        let lookup: &mut SkLookup = ebpf
            .program_mut(LISTENER)
            .context("no such program")?
            .try_into()?;
        lookup.load()?;
        topology
            .gateway
            .run(|| -> Result<_> { Ok(lookup.attach(File::open("/proc/thread-self/ns/net")?)?) })?;
        let mut gateway = Self {
            topology,
            ebpf,
            lan0,
            listeners,
        };
        gateway.beat(Duration::ZERO)?;
        gateway.know_all_flows()?;
        let interfaces = gateway.ebpf.map_mut("INTERFACES").context("INTERFACES")?;
        let mut interfaces: HashMap<_, u32, Interface> = interfaces.try_into()?;
        interfaces.insert(lan0, Interface::new(Some(MAC), true), 0)?;
        let mut sets: HashMap<_, u32, PortSet> = gateway
            .ebpf
            .map_mut("PORT_SETS")
            .context("PORT_SETS")?
            .try_into()?;
        sets.insert(0, [0; PORT_SET_BYTES], 0)?;
        sets.insert(1, [0xff; PORT_SET_BYTES], 0)?;
        for family in Family::BOTH {
            gateway.select("DESTINATIONS", family, true)?;
            gateway.select("SOURCES", family, true)?;
        }
        Ok(gateway)
    }

    /// Has the filter of flows say "perhaps" of all of them: tests' legs have come without a SYN.
    fn know_all_flows(&mut self) -> Result<()> {
        self.filter(1, 1)
    }

    /// Sets the generation of the filter of flows, and that which all slots contain.
    pub fn filter(&mut self, generation: u8, slots: u8) -> Result<()> {
        let map = self.ebpf.map_mut("FILTER").context("FILTER")?;
        let mut filter: Array<_, Filter> = map.try_into()?;
        let mut bytes = vec![slots; FILTER_HEADER + FILTER_SLOTS];
        bytes[0] = generation;
        // SAFETY: as many bytes, and any bytes are a value. A test's stack has no room for them.
        let value = unsafe { &*bytes.as_ptr().cast::<Filter>() };
        Ok(filter.set(0, value, 0)?)
    }

    /// Lets the daemon's last sign of life be so old.
    pub fn beat(&mut self, age: Duration) -> Result<()> {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let beat = now.saturating_sub(age).as_nanos() as u64;
        let mut heartbeat: Array<_, u64> = self.ebpf.map_mut("HEARTBEAT").context("HEARTBEAT")?.try_into()?;
        Ok(heartbeat.set(0, beat, 0)?)
    }

    /// Selects all or nothing of a family.
    pub fn select(&mut self, trie: &str, family: Family, all: bool) -> Result<()> {
        self.select_in(0, trie, family, all)
    }

    /// The same in a generation of rules.
    pub fn select_in(&mut self, generation: u32, trie: &str, family: Family, all: bool) -> Result<()> {
        let (prefix, len) = match family {
            Family::V4 => (map_addr(Ipv4Addr::UNSPECIFIED.into()), 96),
            Family::V6 => (map_addr(Ipv6Addr::UNSPECIFIED.into()), 0),
        };
        let mut trie: LpmTrie<_, PrefixKey, u32> = self.ebpf.map_mut(trie).context("a trie")?.try_into()?;
        let prefix = PrefixKey::new(generation, prefix);
        let key = lpm_trie::Key::new(PrefixKey::GENERATION_BITS + len, prefix);
        Ok(trie.insert(&key, u32::from(all), 0)?)
    }

    pub fn count(&self, counter: Counter) -> Result<u64> {
        count(&self.ebpf, counter)
    }

    pub fn flows(&self) -> Result<Vec<(FlowKey, SynRecord)>> {
        let heads: HashMap<_, FlowKey, SynHead> = self.ebpf.map("FLOWS").context("FLOWS")?.try_into()?;
        heads
            .keys()
            .map(|key| {
                key.map_err(Into::into)
                    .and_then(|key| Ok((key, record(&self.ebpf, &key)?)))
            })
            .collect()
    }

    /// How many connections are counted of all subscribers.
    pub fn connections(&self) -> Result<u64> {
        let map = self.ebpf.map("CONNECTIONS").context("CONNECTIONS")?;
        let map: Array<_, Slot> = map.try_into()?;
        let mut sum = 0;
        for slot in map.iter() {
            sum += slot?.connections();
        }
        ensure!(sum % u64::from(SLOTS) == 0, "{sum} is not in every slot");
        Ok(sum / u64::from(SLOTS))
    }

    pub fn forget_flows(&mut self) -> Result<()> {
        let keys: Vec<FlowKey> = self.flows()?.into_iter().map(|(key, _)| key).collect();
        let mut flows: HashMap<_, FlowKey, SynHead> =
            self.ebpf.map_mut("FLOWS").context("FLOWS")?.try_into()?;
        Ok(keys.iter().try_for_each(|key| flows.remove(key))?)
    }

    /// Runs a program on a frame that has arrived on `lan0`, or leaves by it, and returns the verdict that it counted. Checks
    /// that it counted one, and that the packet is redirected or left as it was.
    pub fn run(&mut self, name: &str, frame: &[u8]) -> Result<Counter> {
        let counts = |gateway: &Self| {
            Counter::ALL
                .iter()
                .map(|counter| gateway.count(*counter))
                .collect::<Result<Vec<_>>>()
        };
        let before = counts(self)?;
        let lan0 = self.lan0;
        let program = program(&mut self.ebpf, name)?;
        let outcome = self.topology.gateway.run(|| test_run(program, frame, lan0))?;
        let counted: Vec<Counter> = Counter::ALL
            .iter()
            .zip(before.iter().zip(counts(self)?))
            .filter(|(_, (before, after))| after > before)
            .map(|(counter, _)| *counter)
            // The look-up of a socket, which is part of the decision, counts for itself.
            .filter(|counter| ![Counter::Assigned, Counter::AssignFailed].contains(counter))
            .collect();
        ensure!(counted.len() == 1, "counted as {counted:?}");
        ensure!(
            outcome == Outcome::of(counted[0], name, lan0),
            "{:?}: {outcome:x?}",
            counted[0]
        );
        Ok(counted[0])
    }

    /// What the intercepting program counts a packet as, from its IP header on.
    pub fn steer(&mut self, packet: &[u8]) -> Result<Counter> {
        self.run(STEER, &ethernet(packet))
    }

    /// Attaches the intercepting program to `lan0`, for frames that the client sends.
    pub fn attach(&mut self) -> Result<()> {
        let program = program(&mut self.ebpf, STEER)?;
        self.topology.gateway.run(|| -> Result<_> {
            // Where there is no tcx.
            qdisc_add_clsact("lan0")?;
            Ok(program.attach("lan0", TcAttachType::Ingress)?)
        })?;
        Ok(())
    }

    /// A connection of the gateway's own, as a segment that comes in for it names it.
    pub fn leg(&self, family: Family) -> Result<(Tcp, Connection)> {
        let listener = Listener::bind_any(&self.topology.client, family.client())?;
        let to = listener.at(family.client());
        let leg = Connection::open(&Connector::default(), &self.topology.gateway, &listener, to)?;
        let tcp = Tcp {
            source: to,
            destination: leg.client.local_addr()?,
            flags: ACK,
            ..Tcp::syn(family)
        };
        Ok((tcp, leg))
    }
}

/// The generation, and the slots.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Filter([u8; FILTER_HEADER + FILTER_SLOTS]);

// SAFETY: bytes.
unsafe impl aya::Pod for Filter {}

/// What becomes of a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on, as it was.
    Passed,
    /// It goes to the clients' side, marked with its interface.
    ToClients(u32),
    /// It goes to the servers' side.
    ToServers,
    /// It is dropped.
    Dropped,
}

impl Outcome {
    /// That of a packet that arrived on, or leaves by, an interface and is counted so by a program.
    pub fn of(counter: Counter, program: &str, ifindex: u32) -> Self {
        use Counter::{IcmpError, IcmpRedirect, Intercepted, Pending, Retransmitted, Returned, Steered};
        match counter {
            IcmpError if program == REPLIES => Self::ToServers,
            Intercepted | Retransmitted | Steered | Pending | IcmpError => Self::ToClients(ifindex),
            Returned => Self::ToServers,
            IcmpRedirect => Self::Dropped,
            _ => Self::Passed,
        }
    }
}

/// The flow that a segment of the client's belongs to.
pub fn key(tcp: &Tcp) -> FlowKey {
    FlowKey::between(tcp.source, tcp.destination)
}

/// What is recorded of a flow's SYN.
pub fn record(ebpf: &Ebpf, flow: &FlowKey) -> Result<SynRecord> {
    let heads: HashMap<_, FlowKey, SynHead> = ebpf.map("FLOWS").context("FLOWS")?.try_into()?;
    let extensions: HashMap<_, FlowKey, ExtensionHeaders> =
        ebpf.map("EXTENSIONS").context("EXTENSIONS")?.try_into()?;
    let head = heads.get(flow, 0)?;
    let extensions = head.has_extensions().then(|| extensions.get(flow, 0));
    Ok(SynRecord::new(head, extensions.transpose()?))
}

pub fn count(ebpf: &Ebpf, counter: Counter) -> Result<u64> {
    let counters: PerCpuArray<_, u64> = ebpf.map("COUNTERS").context("COUNTERS")?.try_into()?;
    Ok(counters.get(&(counter as u32), 0)?.iter().sum())
}

/// Runs a program, in the namespace of the calling thread, on a frame that has arrived on an interface. Checks that the
/// frame is as it was, but for the link-layer address that the servers' device wants.
pub fn test_run(program: &SchedClassifier, frame: &[u8], ifindex: u32) -> Result<Outcome> {
    test_run_marked(program, frame, ifindex, OTHERS)
}

/// The same for a packet with this mark.
pub fn test_run_marked(
    program: &SchedClassifier,
    frame: &[u8],
    ifindex: u32,
    mark_in: u32,
) -> Result<Outcome> {
    let mut context = [0; SK_BUFF_LEN];
    context[8..12].copy_from_slice(&mark_in.to_ne_bytes());
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    let mut context_out = [0; SK_BUFF_LEN];
    let mut frame_out = vec![0; frame.len() + 64];
    let result = program.test_run(TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut frame_out),
        ctx_in: Some(&context),
        ctx_out: Some(&mut context_out),
        ..TestRunOptions::default()
    })?;
    let [.., a, b, c, d] = context_out[..12] else {
        unreachable!("it is longer")
    };
    let mark = u32::from_ne_bytes([a, b, c, d]);
    let frame_out = &frame_out[..result.data_size_out as usize];
    let is_as_it_was = frame_out == frame;
    match (result.return_value, mark) {
        (NEXT, mark) if is_as_it_was && mark == mark_in => Ok(Outcome::Passed),
        (DROP, _) if is_as_it_was => Ok(Outcome::Dropped),
        (REDIRECT, mark) if mark == mark_in && frame_out == [&DEVICE_MAC[..], &frame[6..]].concat() => {
            Ok(Outcome::ToServers)
        }
        (REDIRECT, mark) if is_as_it_was => Ok(Outcome::ToClients(mark)),
        (verdict, mark) => bail!(
            "verdict {} with mark {mark:#x}, frame {frame_out:02x?}",
            verdict as i32
        ),
    }
}

/// `struct __sk_buff` of `uapi/linux/bpf.h`: mark at 8, ifindex at 40.
pub const SK_BUFF_LEN: usize = 192;

pub fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    Ok(ebpf.program_mut(name).context("no such program")?.try_into()?)
}

/// The eBPF object: `PEPSAL_EBPF_OBJECT`, or the workspace's.
pub fn object() -> Result<PathBuf> {
    let built = "../target/ebpf/bpfel-unknown-none/release/pepsal-ebpf";
    let path = env::var_os("PEPSAL_EBPF_OBJECT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join(built),
        PathBuf::from,
    );
    ensure!(
        path.is_file(),
        "no eBPF object at {}: run `cargo xtask build` first",
        path.display()
    );
    Ok(path)
}

/// Puts an Ethernet header before a packet, with the type that its version asks for.
pub fn ethernet(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 6 {
        [0x86, 0xdd]
    } else {
        [0x08, 0x00]
    };
    [&MAC[..], &[0; 6], &ethertype, packet].concat()
}
