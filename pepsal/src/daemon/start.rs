//! The start: check, load, go live, settle.
//!
//! No connection is intercepted before it goes live, and a failed start leaves nothing in the host. During a
//! takeover the previous instance continues until this one settles, when it hands over its claims.

use std::{
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::SystemTime,
};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::options::Options,
    daemon::{
        keeper::Keeper,
        network::check_interfaces,
        privileges,
        profiles::{announce, link_profiles},
        proxy::Proxy,
        settings::{ignores_marks, leg_config, settings},
        workers::Workers,
    },
    flow::{
        Shared, conduit::ConduitPool, leg_config::LegConfig, listener::Listeners, metrics::Metrics,
        table::FlowTable,
    },
    host::{cgroup::OwnCgroup, descriptors, namespace::Namespace},
    link::{rate_control::RateControl, registry::Links},
    observe::{
        Observatory,
        subscribers::Census,
        view::{AttachedNow, View},
    },
    wire::{
        Namespaces,
        attachment::Attachments,
        claims::{Claims, Directory, Predecessor, Requests},
        device::Device,
        interfaces::{self, Changes, Interfaces},
        programs::{self, Programs},
        selection::Selection,
        side::Side,
    },
};

impl Proxy {
    /// Starts the proxy. `cgroup` is the control group of this process, or the reason why there is none.
    ///
    /// # Errors
    /// The first error of the start, as one line for the user.
    pub async fn start(options: &Options, cgroup: Result<OwnCgroup>, namespaces: Namespaces) -> Result<Self> {
        let checked = Checked::new(options, &namespaces).await?;
        let loaded = checked.load(options, cgroup, namespaces).await?;
        let live = loaded.go_live(options).await?;
        live.settle(options).await
    }
}

/// Whether another instance has the interfaces.
enum Standing {
    /// No other instance has the interfaces: this one has claimed them.
    Own(Claims),
    /// Another instance has the interfaces until the takeover.
    After(Predecessor),
}

impl Standing {
    fn find(options: &Options, directory: &Directory) -> Result<Self> {
        let predecessor = match options.takeover {
            true => Predecessor::find(directory, &options.interfaces)?,
            false => None,
        };
        match predecessor {
            Some(predecessor) => Ok(Self::After(predecessor)),
            None => Claims::acquire(directory, &options.interfaces).map(Self::Own),
        }
    }

    fn is_after(&self) -> bool {
        matches!(self, Self::After(_))
    }

    /// Returns the process id of the previous instance, for the programs.
    fn predecessor(&self) -> Option<u32> {
        match self {
            Self::Own(_) => None,
            Self::After(predecessor) => predecessor.process.try_into().ok(),
        }
    }
}

/// The options, checked against this host.
struct Checked {
    interfaces: Interfaces,
    directory: Directory,
    standing: Standing,
    requests: Requests,
    legs: LegConfig,
    rate_control: Result<RateControl>,
    links: Arc<Links>,
    /// Maximum number of flows; `pipes` is that of their relays' pipes.
    limit: u32,
    pipes: usize,
    keeper: Keeper,
}

impl Checked {
    /// Checks the options against this host, and claims the interfaces unless another instance has them.
    async fn new(options: &Options, namespaces: &Namespaces) -> Result<Self> {
        if options.sniff_interface.is_some() {
            warn!(
                "-s is ignored: SYN options are recorded by eBPF on every intercepted interface, without a sniffer"
            );
        }
        let interfaces = interfaces::list().await?;
        check_interfaces(&options.interfaces, &interfaces)?;
        let directory = Directory::open(&options.runtime_dir)?;
        let standing = Standing::find(options, &directory)?;
        let requests = Requests::listen(&directory)?;
        namespaces.settle(ignores_marks(options)?)?;
        let legs = leg_config(options, &namespaces.clients)?;
        // At every start, because a reload may add links when the privilege for it is dropped.
        let rate_control = RateControl::register();
        let profiles = link_profiles(options, &interfaces, &rate_control)?;
        profiles.iter().for_each(announce);
        let (limit, pipes) = descriptors::fit(options.max_connections)?;
        let keeper = Keeper::new(limit, options.monitoring_pid, options.logfile.as_deref())?;
        Ok(Self {
            interfaces,
            directory,
            standing,
            requests,
            legs,
            rate_control,
            links: Arc::new(Links::new(profiles)),
            limit,
            pipes,
            keeper,
        })
    }

    /// Creates the devices, loads the programs, drops the privileges for that, and binds the listeners.
    async fn load(
        self,
        options: &Options,
        cgroup: Result<OwnCgroup>,
        namespaces: Namespaces,
    ) -> Result<Loaded> {
        let clients = Device::new(Side::Clients, namespaces.clients).await?;
        let servers = Device::new(Side::Servers, namespaces.servers).await?;
        let mut programs = self.load_programs(options, [&clients, &servers])?;
        programs.beat()?;
        if let Err(error) = cgroup.and_then(|cgroup| programs.enable_initial_windows(cgroup)) {
            info!("legs start with the kernel's initial window: {error:#}");
        }
        // The programs are loaded. These three threads start all later ones.
        privileges::drop_loading()?;
        for device in [&clients, &servers] {
            device.namespace().run(privileges::drop_loading)?;
        }
        // The workers create server legs.
        let workers = servers.namespace().run(|| start_workers(options))?;
        let mut attachments = Attachments::new(self.standing.is_after(), self.directory.clone());
        // Before any socket: the kernel closes the descriptors of a killed process from the highest to the
        // lowest, and the resets of its sockets leave through these programs.
        attachments.attach_device(&mut programs, &clients)?;
        attachments.attach_device(&mut programs, &servers)?;
        let listeners = clients.namespace().run(|| {
            let _entered = workers.acceptor().enter();
            Listeners::bind(options.port.get(), &self.legs, &self.links)
        })?;
        Ok(Loaded {
            listeners,
            attachments,
            programs,
            clients,
            servers,
            workers,
            checked: self,
        })
    }

    fn load_programs(&self, options: &Options, devices: [&Device; 2]) -> Result<Programs> {
        let steering = &options.steering;
        Programs::load(&programs::Config {
            mark: steering.mark,
            predecessor: self.standing.predecessor(),
            devices,
            limit: self.limit,
            limit_per_client: options.max_connections_per_client,
            selection: &Selection::new(&steering.only, &steering.bypass),
            log_syns: steering.log_syns,
        })
    }
}

fn start_workers(options: &Options) -> Result<Workers> {
    let threads = options.threads.map_or_else(
        || thread::available_parallelism().map_or(1, usize::from),
        usize::from,
    );
    Workers::start(threads).context("cannot start the worker threads")
}

/// Devices, programs, threads and listeners before the first connection, in the order of their removal.
struct Loaded {
    listeners: Listeners,
    attachments: Attachments,
    programs: Programs,
    clients: Device,
    servers: Device,
    workers: Workers,
    checked: Checked,
}

impl Loaded {
    /// Attaches to the interfaces: from here on new connections are intercepted, during a takeover behind the
    /// previous instance.
    async fn go_live(mut self, options: &Options) -> Result<Live> {
        let changes = Changes::subscribe()?;
        let shared = Arc::new(self.shared(options)?);
        let mut observatory = Observatory::new(self.view(options, &shared));
        if let Standing::Own(_) = self.checked.standing {
            observatory.open(options.metrics_listen.as_ref(), options.admin_socket.as_deref())?;
        }
        let listeners = self.listeners.pairs.iter().map(|pair| pair.descriptors());
        self.programs.open(listeners, self.clients.namespace())?;
        let Checked {
            interfaces,
            standing,
            requests,
            rate_control,
            limit,
            keeper,
            ..
        } = self.checked;
        let mut proxy = Proxy {
            observatory,
            attachments: self.attachments,
            programs: self.programs,
            clients: self.clients,
            servers: self.servers,
            claims: None,
            requests: Some(Arc::new(requests)),
            rate_control,
            listeners: self.listeners,
            intercepted: options.interfaces.clone(),
            limit,
            changes,
            keeper,
            shared,
            workers: Arc::new(self.workers),
            accepting: CancellationToken::new(),
            attendants: JoinSet::new(),
        };
        proxy.follow(&interfaces).await?;
        Ok(Live { proxy, standing })
    }

    fn shared(&self, options: &Options) -> Result<Shared> {
        let settings = settings(options, self.checked.legs.clone(), Instant::now());
        Ok(Shared {
            settings: ArcSwap::from_pointee(settings),
            links: self.checked.links.clone(),
            host: Namespace::of_host()?,
            interfaces: ArcSwap::default(),
            paths: Arc::default(),
            table: Arc::new(FlowTable::new(self.programs.flows().clone())),
            metrics: Metrics::default(),
            conduits: ConduitPool::new(self.checked.pipes),
            stop: CancellationToken::new(),
        })
    }

    fn view(&self, options: &Options, shared: &Arc<Shared>) -> View {
        View {
            shared: shared.clone(),
            counters: self.programs.counters().clone(),
            intercepted: options.interfaces.clone(),
            attached: AttachedNow::default(),
            mark: options.steering.mark,
            devices: vec![self.clients.name.clone(), self.servers.name.clone()],
            port: options.port.get(),
            limit: self.checked.limit,
            limit_per_client: options.max_connections_per_client,
            census: Census::default(),
            started: SystemTime::now(),
            ready: AtomicBool::new(false),
        }
    }
}

/// A proxy that intercepts. During a takeover the previous instance intercepts too, until it hands over its
/// claims.
struct Live {
    proxy: Proxy,
    standing: Standing,
}

impl Live {
    /// Takes the claims over from the previous instance, if there is one, and reports readiness.
    async fn settle(self, options: &Options) -> Result<Proxy> {
        let Self { mut proxy, standing } = self;
        let claims = match standing {
            Standing::Own(claims) => claims,
            Standing::After(predecessor) => take_over(predecessor, &mut proxy, options).await?,
        };
        proxy.claims = Some(claims);
        proxy.observatory.view.set_ready(true);
        // Sends a heartbeat: on a busy machine the start may take long, and the keeper has not run yet.
        proxy.programs.beat()?;
        Ok(proxy)
    }
}

/// Takes over the claims. Open flows stay with the previous instance.
async fn take_over(predecessor: Predecessor, proxy: &mut Proxy, options: &Options) -> Result<Claims> {
    let process = predecessor.process;
    let claims = predecessor.take_over().await?;
    proxy.attachments.taken_over();
    info!(
        process,
        "takeover done: the previous process drains its open flows"
    );
    // The previous instance has just released its metrics address and admin socket, so an error here cannot
    // undo the takeover.
    let metrics = options.metrics_listen.as_ref();
    if let Err(error) = proxy.observatory.open(metrics, options.admin_socket.as_deref()) {
        warn!("{error:#}");
    }
    Ok(claims)
}
