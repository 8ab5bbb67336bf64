//! The kernel side as the daemon sees it: loads the programs, fills their maps, attaches them.

use std::{
    cell::LazyCell,
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockMap},
    programs::{
        CgroupSockopt, LinkOrder, ProgramError, SchedClassifier, SkLookup, TcAttachType,
        cgroup_sockopt::CgroupSockoptLink,
        links::CgroupAttachMode,
        sk_lookup::SkLookupLink,
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program},
    },
    sys::SyscallError,
};
use nix::time::{ClockId, clock_gettime};
use pepsal_ebpf::{
    Counter, ExtensionHeaders, FlowKey, LINKS_MAX, NO_LINK, SynHead, SynRecord, listener_v4, listener_v6,
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, info, warn};

use crate::{
    cgroup::OwnCgroup,
    cli::Mark,
    instance,
    link::Links,
    listener::{Listeners, Pair},
    route::Interfaces,
    selection::Selection,
    selection_maps::SelectionMaps,
};

/// The eBPF object that the build embedded, empty when it had none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pepsal.bpf.o"));

/// Intercepts and recognises.
const STEER: &str = "pepsal_steer";
/// Recognises only.
const REPLIES: &str = "pepsal_replies";
const LISTENER: &str = "pepsal_listener";
const WINDOW: &str = "pepsal_window";

/// How long the daemon may show no sign of life before new connections pass it by.
const HEARTBEAT_BOUND: Duration = Duration::from_secs(3);

/// What the programs are loaded with.
pub struct Config<'a> {
    /// The mark of steered packets.
    pub mark: Mark,
    /// Most flows at once.
    pub limit: u32,
    /// Which connections are intercepted.
    pub selection: &'a Selection,
    /// Whether every intercepted SYN is logged.
    pub log_syns: bool,
    /// Whether another instance's programs are attached and have to stay.
    pub beside_another: bool,
}

/// The loaded programs. They are detached when this is dropped, and by the kernel when the process is gone.
pub struct Steering {
    ebpf: Ebpf,
    flows: Arc<FlowMap>,
    counters: Arc<Counters>,
    heartbeat: Array<MapData, u64>,
    listeners: SockMap<MapData>,
    links: HashMap<MapData, u32, u32>,
    selection: SelectionMaps,
    attached: BTreeMap<u32, Attachment>,
    lookup: Option<SkLookupLink>,
    windows: Option<(CgroupSockoptLink, OwnCgroup)>,
    tcx_refused: bool,
    beside_another: bool,
}

struct Attachment {
    name: String,
    intercepts: bool,
    _link: SchedClassifierLink,
}

impl Steering {
    /// Loads the programs and fills the maps; nothing is attached yet.
    ///
    /// # Errors
    /// When there is no eBPF object, or the kernel refuses it.
    pub fn load(config: &Config<'_>) -> Result<Self> {
        if OBJECT.is_empty() {
            bail!("this binary was built without its eBPF programs: build it with `cargo xtask build`");
        }
        let (mark, mask) = (config.mark.value, config.mark.mask);
        let bound_ns = HEARTBEAT_BOUND.as_nanos() as u64;
        let log_syns = u8::from(config.log_syns);
        let mut ebpf = EbpfLoader::new()
            .override_global("MARK", &mark, true)
            .override_global("MARK_MASK", &mask, true)
            .override_global("HEARTBEAT_BOUND_NS", &bound_ns, true)
            .override_global("LOG_SYNS", &log_syns, true)
            .map_max_entries("FLOWS", config.limit)
            .load(OBJECT)
            .context("the kernel refuses the eBPF maps")?;
        for name in [STEER, REPLIES] {
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
        Ok(Self {
            flows: Arc::new(FlowMap(Mutex::new(FlowMaps {
                heads: HashMap::try_from(take_map(&mut ebpf, "FLOWS")?)?,
                extensions: HashMap::try_from(take_map(&mut ebpf, "EXTENSIONS")?)?,
            }))),
            counters: Arc::new(Counters(PerCpuArray::try_from(take_map(&mut ebpf, "COUNTERS")?)?)),
            heartbeat: Array::try_from(take_map(&mut ebpf, "HEARTBEAT")?)?,
            listeners: SockMap::try_from(take_map(&mut ebpf, "LISTENERS")?)?,
            links: HashMap::try_from(take_map(&mut ebpf, "LINKS")?)?,
            selection,
            ebpf,
            attached: BTreeMap::new(),
            lookup: None,
            windows: None,
            tcx_refused: false,
            beside_another: config.beside_another,
        })
    }

    /// Gives new connections to these listeners.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(&mut self, listeners: &Listeners) -> Result<()> {
        self.register(0, &listeners.pairs)?;
        if self.lookup.is_none() {
            let netns = File::open("/proc/self/ns/net").context("cannot open the network namespace")?;
            let program: &mut SkLookup = program(&mut self.ebpf, LISTENER)?;
            let link = program
                .attach(netns)
                .context("cannot attach to the network namespace's socket lookup")?;
            self.lookup = Some(program.take_link(link)?);
        }
        Ok(())
    }

    /// Takes note of the listeners of links, from the number of the first on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn register(&mut self, first: u32, pairs: &[Arc<Pair>]) -> Result<()> {
        for (link, pair) in (first..).zip(pairs) {
            self.listeners
                .set(listener_v4(link), &pair.v4.as_raw_fd(), 0)
                .context("cannot register the IPv4 listener")?;
            if let Some(v6) = &pair.v6 {
                self.listeners
                    .set(listener_v6(link), &v6.as_raw_fd(), 0)
                    .context("cannot register the IPv6 listener")?;
            }
        }
        Ok(())
    }

    /// Lets other rules of selection hold from now on, for connections that are not there yet.
    ///
    /// # Errors
    /// When the kernel has no room for them; those that held before still do then.
    pub fn select(&mut self, selection: &Selection) -> Result<()> {
        let heartbeat = &mut self.heartbeat;
        // A beat that fails now is tried again, and told, with the next round.
        let beat = || drop(heartbeat.set(0, monotonic_ns(), 0));
        self.selection.install(selection, beat)
    }

    /// Lets new connections pass from now on. Those that are being set up are still accepted.
    pub fn close(&mut self) {
        for slot in 0..listener_v4(LINKS_MAX + 1) {
            // An empty slot is what is wanted.
            let _ = self.listeners.clear_index(&slot);
        }
    }

    /// Leaves new connections to another instance from now on, and still takes those that are being set up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn retire(&mut self) -> Result<()> {
        // Programs take no new connection for a daemon that shows no sign of life.
        self.heartbeat.set(0, 0, 0).context("cannot write the heartbeat")
    }

    /// Lets the daemon set the initial windows of the sockets that it has opened since it is in `cgroup`.
    ///
    /// # Errors
    /// Where the kernel is too old for the program. The daemon can do without.
    pub fn enable_initial_windows(&mut self, cgroup: OwnCgroup) -> Result<()> {
        let program: &mut CgroupSockopt = program(&mut self.ebpf, WINDOW)?;
        program.load().map_err(|error| refused(WINDOW, error))?;
        let link = program
            .attach(cgroup.open()?, CgroupAttachMode::Single)
            .context("cannot attach to the cgroup")?;
        self.windows = Some((program.take_link(link)?, cgroup));
        Ok(())
    }

    /// Attaches to the interfaces that are new and forgets those that are gone. `intercepts` says on which of them new
    /// connections are taken, `links` what is known of the link behind each.
    ///
    /// # Errors
    /// When an interface that intercepts cannot be attached to.
    pub fn attach(
        &mut self,
        interfaces: &Interfaces,
        intercepts: impl Fn(&str) -> bool,
        links: &Links,
    ) -> Result<()> {
        for (index, name) in interfaces {
            let link = links.bind(*index, name);
            match link {
                // It may never have had one.
                NO_LINK => drop(self.links.remove(index)),
                link => {
                    let inserted = self.links.insert(index, link, 0);
                    inserted.context("cannot register a link")?;
                }
            }
        }
        self.attached.retain(|index, attachment| {
            interfaces
                .get(index)
                .is_some_and(|name| intercepts(name) == attachment.intercepts)
        });
        let is_alone = LazyCell::new(instance::is_alone);
        for (index, name) in interfaces {
            let intercepts = intercepts(name);
            if let Some(attachment) = self.attached.get_mut(index) {
                attachment.name.clone_from(name);
                continue;
            }
            if !self.beside_another && *is_alone {
                purge(name);
            }
            match self.attach_one(name, if intercepts { STEER } else { REPLIES }) {
                Ok(link) => {
                    debug!(interface = name, intercepts, "attached");
                    let attachment = Attachment {
                        name: name.clone(),
                        intercepts,
                        _link: link,
                    };
                    self.attached.insert(*index, attachment);
                }
                Err(error) if intercepts => return Err(error),
                Err(error) => warn!(interface = name, "replies on it are not recognised: {error:#}"),
            }
        }
        Ok(())
    }

    /// The interfaces whose new connections are intercepted at present.
    pub fn intercepting(&self) -> impl Iterator<Item = &str> {
        self.attached
            .values()
            .filter(|attachment| attachment.intercepts)
            .map(|attachment| attachment.name.as_str())
    }

    fn attach_one(&mut self, interface: &str, name: &str) -> Result<SchedClassifierLink> {
        let program: &mut SchedClassifier = program(&mut self.ebpf, name)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let link = match program.attach_with_options(interface, TcAttachType::Ingress, options) {
            // Before Linux 6.6, or built without CONFIG_NET_XGRESS.
            Err(ProgramError::SyscallError(SyscallError { io_error, .. })) if is_unknown(&io_error) => {
                if !self.tcx_refused {
                    self.tcx_refused = true;
                    info!("this kernel has no tcx: attaching to the clsact qdisc");
                }
                // It may be there already, and is not ours to remove.
                let _ = qdisc_add_clsact(interface);
                program.attach_with_options(
                    interface,
                    TcAttachType::Ingress,
                    TcAttachOptions::Netlink(NlOptions::default()),
                )
            }
            other => other,
        };
        let link = link.with_context(|| format!("cannot attach to interface {interface}"))?;
        Ok(program.take_link(link)?)
    }

    /// The flows that the kernel knows.
    pub fn flows(&self) -> &Arc<FlowMap> {
        &self.flows
    }

    /// Shows the programs that the daemon is alive.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn beat(&mut self) -> Result<()> {
        self.heartbeat
            .set(0, monotonic_ns(), 0)
            .context("cannot write the heartbeat")
    }

    /// How often something was decided, on all processors together.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.count(counter)
    }

    /// What the programs count.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Where they are attached at present.
    pub fn attachments(&self) -> Vec<Attached> {
        let attached = self.attached.values().map(|attachment| Attached {
            interface: attachment.name.clone(),
            intercepts: attachment.intercepts,
            is_tcx: !self.tcx_refused,
        });
        attached.collect()
    }
}

/// An interface that a program is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Its name.
    pub interface: String,
    /// Whether new connections are intercepted there; legs' segments are recognised everywhere.
    pub intercepts: bool,
    /// Whether it is by tcx, which vanishes with the process, or by a filter of the clsact qdisc.
    pub is_tcx: bool,
}

/// The counters of the programs.
pub struct Counters(PerCpuArray<MapData, u64>);

impl Counters {
    /// How often something was decided, on all processors together.
    pub fn count(&self, counter: Counter) -> u64 {
        self.0
            .get(&(counter as u32), 0)
            .map_or(0, |values| values.iter().sum())
    }
}

/// Attached filters outlive a killed process on kernels without tcx; whose they are does not show. None found, or no qdisc,
/// is as good.
fn purge(interface: &str) {
    for name in [STEER, REPLIES] {
        while qdisc_detach_program(interface, TcAttachType::Ingress, name).is_ok() {
            info!(interface, "removed a filter that an earlier instance left behind");
        }
    }
}

fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EINVAL | nix::libc::EOPNOTSUPP)
    )
}

fn program<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<T>
where
    T: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| anyhow!("the eBPF object has no program {name}"))?;
    Ok(program.try_into()?)
}

/// Takes a map out of a loaded object.
pub(crate) fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<Map> {
    ebpf.take_map(name)
        .ok_or_else(|| anyhow!("the eBPF object has no map {name}"))
}

/// One line for the user; the verifier's many go to the log.
fn refused(name: &str, error: ProgramError) -> anyhow::Error {
    match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            debug!("{verifier_log}");
            anyhow!("the kernel refuses the eBPF program {name}: {io_error} (-v shows the verifier's log)")
        }
        other => anyhow!("the kernel refuses the eBPF program {name}: {other}"),
    }
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

/// CLOCK_MONOTONIC, as `bpf_ktime_get_ns` reads it.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// The kernel's map of flows: from a flow's SYN to its end, at most as many as the limit of connections.
pub struct FlowMap(Mutex<FlowMaps>);

struct FlowMaps {
    heads: HashMap<MapData, FlowKey, SynHead>,
    extensions: HashMap<MapData, FlowKey, ExtensionHeaders>,
}

impl FlowMap {
    /// When the flow's SYN came, in nanoseconds of CLOCK_MONOTONIC.
    pub fn time_ns(&self, flow: &FlowKey) -> Option<u64> {
        self.lock().heads.get(flow, 0).ok().map(|head| head.time_ns)
    }

    /// What the flow's SYN said. What is needed of it only once is not kept.
    pub fn record(&self, flow: &FlowKey) -> Option<SynRecord> {
        let mut maps = self.lock();
        let head = maps.heads.get(flow, 0).ok()?;
        let extensions = head.has_extensions().then(|| {
            let extensions = maps.extensions.get(flow, 0).ok();
            let _ = maps.extensions.remove(flow);
            extensions
        });
        Some(SynRecord::new(head, extensions.flatten()))
    }

    /// Gives a place to a flow that has none.
    ///
    /// # Errors
    /// When the map is full.
    pub fn insert(&self, flow: &FlowKey, head: &SynHead) -> Result<(), MapError> {
        self.lock().heads.insert(flow, head, 0)
    }

    /// Frees the flow's place.
    pub fn remove(&self, flow: &FlowKey) {
        // It may be gone already.
        let _ = self.lock().heads.remove(flow);
    }

    /// All flows at present.
    pub fn keys(&self) -> Vec<FlowKey> {
        self.lock().heads.keys().filter_map(Result::ok).collect()
    }

    fn lock(&self) -> MutexGuard<'_, FlowMaps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
