//! The eBPF programs and their maps: loads the programs, fills the maps, and reads them.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray, SockMap},
    programs::{
        CgroupSockopt, SchedClassifier, SkLookup, cgroup_sockopt::CgroupSockoptLink, links::CgroupAttachMode,
        sk_lookup::SkLookupLink,
    },
};
use pepsal_ebpf::{Counter, Interface, LINKS_MAX, NO_LINK, listener_v4, listener_v6};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    host::{cgroup::OwnCgroup, clock, namespace::Namespace},
    link::registry::Links,
    wire::{
        connection_counts::{ClientLimit, ConnectionCounts},
        counters::Counters,
        device::Device,
        filter::Filter,
        flow_map::FlowMap,
        interfaces::Interfaces,
        mark::Mark,
        object::{LISTENER, OBJECT, TC_PROGRAMS, WINDOW, program, refused, take_map},
        selection::Selection,
        selection_maps::SelectionMaps,
    },
};

/// How long the daemon may be without a heartbeat before new connections pass it by.
const HEARTBEAT_BOUND: Duration = Duration::from_secs(3);

/// Constants, maps' sizes and rules that the programs are loaded with.
pub struct Config<'a> {
    /// Packet mark of server legs' packets on their way into an interface's ingress.
    pub mark: Mark,
    /// The process that this one takes over from.
    pub predecessor: Option<u32>,
    /// The devices of the clients' and the servers' side.
    pub devices: [&'a Device; 2],
    /// Limit of flows: the size of the kernel's map of flows.
    pub limit: u32,
    /// Most flows of one subscriber; 0 for no bound.
    pub limit_per_client: u32,
    /// The rules for new connections.
    pub selection: &'a Selection,
    /// Whether every intercepted SYN is logged.
    pub log_syns: bool,
}

/// The listening sockets of a link, or of the interfaces without a profile.
#[derive(Debug, Clone, Copy)]
pub struct ListenerPair<'a> {
    /// IPv4.
    pub v4: BorrowedFd<'a>,
    /// IPv6, where the host has it.
    pub v6: Option<BorrowedFd<'a>>,
}

/// The loaded programs and their maps. The kernel frees them when it is dropped, and when the process ends.
pub struct Programs {
    pub(super) ebpf: Ebpf,
    flows: Arc<FlowMap>,
    filter: Arc<Filter>,
    counters: Arc<Counters>,
    heartbeat: Array<MapData, u64>,
    listeners: SockMap<MapData>,
    links: HashMap<MapData, u32, u32>,
    interfaces: HashMap<MapData, u32, Interface>,
    selection: SelectionMaps,
    lookup: Option<SkLookupLink>,
    windows: Option<(CgroupSockoptLink, OwnCgroup)>,
}

impl Programs {
    /// Loads the programs and fills the maps; nothing is attached yet.
    ///
    /// # Errors
    /// When there is no eBPF object, or the kernel refuses it.
    pub fn load(config: &Config<'_>) -> Result<Self> {
        if OBJECT.is_empty() {
            bail!("this binary was built without its eBPF programs: build it with `cargo xtask build`");
        }
        let (mark, mask) = (config.mark.value, config.mark.mask);
        let [clients, servers] = config.devices;
        let instance = instance_number(std::process::id());
        let predecessor = config.predecessor.map_or(0, instance_number);
        let bound_ns = HEARTBEAT_BOUND.as_nanos() as u64;
        let log_syns = u8::from(config.log_syns);
        let client_limit = ClientLimit::new(config.limit_per_client, config.limit);
        let mut ebpf = EbpfLoader::new()
            .override_global("MARK", &mark, true)
            .override_global("MARK_MASK", &mask, true)
            .override_global("INSTANCE", &instance, true)
            .override_global("PREDECESSOR", &predecessor, true)
            .override_global("CLIENTS_IFINDEX", &clients.ifindex, true)
            .override_global("SERVERS_IFINDEX", &servers.ifindex, true)
            .override_global("CLIENTS_NETNS", &clients.netns_id, true)
            .override_global("SERVERS_NETNS", &servers.netns_id, true)
            .override_global("HEARTBEAT_BOUND_NS", &bound_ns, true)
            .override_global("LOG_SYNS", &log_syns, true)
            .override_global("CONNS_PER_CLIENT", &client_limit.connections, true)
            .override_global("CLIENT_SLOTS_MASK", &client_limit.mask(), true)
            .override_global("CLIENT_SEED", &client_limit.seed, true)
            .map_max_entries("FLOWS", config.limit)
            .map_max_entries("CONNECTIONS", client_limit.slots)
            .load(OBJECT)
            .context("the kernel refuses the eBPF maps")?;
        for name in TC_PROGRAMS {
            let program: &mut SchedClassifier = program(&mut ebpf, name)?;
            program.load().map_err(|error| refused(name, error))?;
        }
        let lookup: &mut SkLookup = program(&mut ebpf, LISTENER)?;
        lookup.load().map_err(|error| refused(LISTENER, error))?;
        // From here on the programs hold the maps, which are taken out of the object one by one.
        let mut selection = SelectionMaps::take(&mut ebpf)?;
        selection.install(config.selection, || ())?;
        if config.log_syns {
            forward_log(&mut ebpf)?;
        }
        let connections = take_map(&mut ebpf, "CONNECTIONS")?;
        let counts = match client_limit.connections {
            0 => None,
            _ => Some(ConnectionCounts::new(connections, client_limit)?),
        };
        Ok(Self {
            flows: Arc::new(FlowMap::new(
                take_map(&mut ebpf, "FLOWS")?,
                take_map(&mut ebpf, "EXTENSIONS")?,
                counts,
            )?),
            filter: Arc::new(Filter::new(take_map(&mut ebpf, "FILTER")?)?),
            counters: Arc::new(Counters(PerCpuArray::try_from(take_map(&mut ebpf, "COUNTERS")?)?)),
            heartbeat: Array::try_from(take_map(&mut ebpf, "HEARTBEAT")?)?,
            listeners: SockMap::try_from(take_map(&mut ebpf, "LISTENERS")?)?,
            links: HashMap::try_from(take_map(&mut ebpf, "LINKS")?)?,
            interfaces: HashMap::try_from(take_map(&mut ebpf, "INTERFACES")?)?,
            selection,
            ebpf,
            lookup: None,
            windows: None,
        })
    }

    /// Opens the listeners' slots, and attaches the socket lookup to the listeners' namespace: new connections are accepted
    /// from now on.
    ///
    /// # Errors
    /// When the kernel refuses a listener or the attachment.
    pub fn open<'a>(
        &mut self,
        listeners: impl IntoIterator<Item = ListenerPair<'a>>,
        namespace: &Namespace,
    ) -> Result<()> {
        self.register(0, listeners)?;
        if self.lookup.is_none() {
            let program: &mut SkLookup = program(&mut self.ebpf, LISTENER)?;
            let link = program
                .attach(namespace)
                .context("cannot attach to the socket lookup of the legs' namespace")?;
            self.lookup = Some(program.take_link(link)?);
        }
        Ok(())
    }

    /// Sets the listeners' slots of links, from the link with the number `first` on.
    ///
    /// # Errors
    /// When the kernel refuses a listener.
    pub fn register<'a>(
        &mut self,
        first: u32,
        listeners: impl IntoIterator<Item = ListenerPair<'a>>,
    ) -> Result<()> {
        for (link, pair) in (first..).zip(listeners) {
            self.listeners
                .set(listener_v4(link), &pair.v4.as_raw_fd(), 0)
                .context("cannot register the IPv4 listener")?;
            if let Some(v6) = pair.v6 {
                self.listeners
                    .set(listener_v6(link), &v6.as_raw_fd(), 0)
                    .context("cannot register the IPv6 listener")?;
            }
        }
        Ok(())
    }

    /// Replaces the rules of selection, for new connections.
    ///
    /// # Errors
    /// When the kernel has no room for the new rules; the old ones stay in effect.
    pub fn select(&mut self, selection: &Selection) -> Result<()> {
        let heartbeat = &mut self.heartbeat;
        // A beat that fails now is tried again, and told, with the next round.
        let beat = || drop(heartbeat.set(0, clock::monotonic_ns(), 0));
        self.selection.install(selection, beat)
    }

    /// Empties the listeners' slots: new connections pass from now on. Handshakes under way are still accepted.
    pub fn close(&mut self) {
        for slot in 0..listener_v4(LINKS_MAX + 1) {
            // An empty slot is what is wanted.
            let _ = self.listeners.clear_index(&slot);
        }
    }

    /// Resets the heartbeat: new connections are left to another instance from now on. Handshakes under way are still
    /// accepted.
    ///
    /// # Errors
    /// When the kernel refuses to write the heartbeat.
    pub fn retire(&mut self) -> Result<()> {
        // Programs take no new connection for a daemon that shows no sign of life.
        self.heartbeat.set(0, 0, 0).context("cannot write the heartbeat")
    }

    /// Attaches the program for initial windows to `cgroup`. It serves the sockets that the daemon has opened in that group.
    ///
    /// # Errors
    /// When the kernel refuses the program or the attachment. Legs then start with the kernel's initial window.
    pub fn enable_initial_windows(&mut self, cgroup: OwnCgroup) -> Result<()> {
        let program: &mut CgroupSockopt = program(&mut self.ebpf, WINDOW)?;
        program.load().map_err(|error| refused(WINDOW, error))?;
        let link = program
            .attach(cgroup.open()?, CgroupAttachMode::Single)
            .context("cannot attach to the cgroup")?;
        self.windows = Some((program.take_link(link)?, cgroup));
        Ok(())
    }

    /// Writes the interfaces and their links into the programs' maps, before programs are attached to the interfaces.
    /// `intercepts` returns whether new connections are intercepted on the interface of a name.
    ///
    /// # Errors
    /// When the kernel refuses an entry.
    pub fn describe(
        &mut self,
        interfaces: &Interfaces,
        intercepts: impl Fn(&str) -> bool,
        links: &Links,
    ) -> Result<()> {
        for index in stale(self.interfaces.keys(), interfaces) {
            let _ = self.interfaces.remove(&index);
        }
        for index in stale(self.links.keys(), interfaces) {
            let _ = self.links.remove(&index);
            links.unbind(index);
        }
        for (index, interface) in interfaces {
            let described = Interface::new(interface.mac, intercepts(&interface.name));
            let inserted = self.interfaces.insert(index, described, 0);
            inserted.context("cannot register an interface")?;
            match links.bind(*index, &interface.name) {
                // It may never have had one.
                NO_LINK => drop(self.links.remove(index)),
                link => self
                    .links
                    .insert(index, link, 0)
                    .context("cannot register a link")?,
            }
        }
        Ok(())
    }

    /// Returns the filter of flows.
    pub fn filter(&self) -> &Arc<Filter> {
        &self.filter
    }

    /// Returns the kernel's map of flows.
    pub fn flows(&self) -> &Arc<FlowMap> {
        &self.flows
    }

    /// Writes the heartbeat: the current time of CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// When the kernel refuses to write the heartbeat.
    pub fn beat(&mut self) -> Result<()> {
        self.heartbeat
            .set(0, clock::monotonic_ns(), 0)
            .context("cannot write the heartbeat")
    }

    /// Returns the number of packets with this verdict, on all processors together.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.count(counter)
    }

    /// Returns the programs' counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

/// A process's number as an instance: never zero, which is what other packets have.
fn instance_number(process: u32) -> u16 {
    (process % u32::from(u16::MAX)) as u16 + 1
}

/// The keys of a map whose interfaces are gone.
fn stale(keys: aya::maps::MapKeys<'_, u32>, interfaces: &Interfaces) -> Vec<u32> {
    keys.filter_map(Result::ok)
        .filter(|index| !interfaces.contains_key(index))
        .collect()
}

/// Passes what the programs log on to `tracing`.
fn forward_log(ebpf: &mut Ebpf) -> Result<()> {
    let logger = aya_log::EbpfLogger::init(ebpf).context("cannot read the log of the eBPF programs")?;
    // SAFETY: the logger keeps one descriptor, its own, for as long as it lives.
    let mut logger =
        unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }.map_err(io::Error::from)?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}
