//! A TCP performance enhancing proxy (RFC 3135) that intercepts by eBPF.
//!
//! A flow, step by step:
//!
//! 1. The client's SYN enters an intercepted interface. There, in the [`wire`], an eBPF program finds it selected, records
//!    it, and gives it to the namespace of the client legs, before the host sees it. A second program gives the connection to
//! 2. the [`listener`], where it is accepted, and given to one of the [`workers`].
//! 3. [`flow`] enters it in the [`table`], and makes
//! 4. the server [`leg`] in the namespace of the server legs: a second connection, to the server, from the client's address,
//!    with its DSCP and options. What it sends enters the host by the interface that the SYN came in by, and is routed,
//!    filtered, counted and translated as the client's own; what is answered is taken off the wire again where it would leave
//!    for the client.
//! 5. Both legs get the profile of the [`link`] that they leave through and their share of its [`budget`], which
//!    [`rate_control`] sends at ([`btf`] tells it where the kernel keeps things). Where nobody described the link, a leg starts
//!    with what earlier ones learned of its path ([`paths`]).
//! 6. [`relay`] moves the bytes both ways, from [`stream`] to stream through a [`conduit`], until both ends are done or one
//!    breaks.
//! 7. [`metrics`] counts the end, once, with its reason.
//!
//! [`observe`] shows all of it to who asks, at the terminal by the commands in [`ctl`].
//!
//! Around them: [`host`] has the namespaces, [`cli`] and the file of [`config`] say what is wanted, at start and
//! at each reload, [`cgroup`] is the daemon's own, [`privileges`] gives up what is not needed, [`preflight`] says whether
//! it all can be had, [`wire::claims`] that no other instance has it, [`log`] tells, [`keeper`] looks after what needs looking after,
//! [`notify`] tells the service manager, and [`run`] holds it all.

pub mod btf;
pub mod budget;
pub mod cgroup;
pub mod cli;
pub mod conduit;
pub mod config;
pub mod ctl;
mod fault;
pub mod flow;
pub mod host;
pub mod keeper;
pub mod leg;
pub mod link;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod notify;
pub mod observe;
pub mod paths;
pub mod preflight;
pub mod privileges;
pub mod rate_control;
pub mod relay;
mod reload;
pub mod socket;
pub mod stream;
pub mod table;
pub mod units;
pub mod wire;
pub mod workers;

use std::{
    future::pending,
    io,
    panic::resume_unwind,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    thread,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;
use futures_util::future::join_all;
use nix::libc::{SOCK_CLOEXEC, SOCK_NONBLOCK};
use pepsal_ebpf::{Counter, LINKS_MAX};
use socket2::Socket;
use tokio::{
    io::Interest,
    runtime::Handle,
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinSet, spawn_blocking},
    time::{Instant, MissedTickBehavior, interval, interval_at, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    cgroup::OwnCgroup,
    cli::Options,
    conduit::ConduitPool,
    config::Configuration,
    flow::{CloseReason, Settings, Shared},
    host::namespace::Namespace,
    keeper::Keeper,
    leg::LegConfig,
    link::{Link, LinkProfile, Links},
    listener::{Listener, Listeners, Pair},
    log::Log,
    metrics::{Event, Metrics},
    observe::{AttachedNow, Observatory, View},
    rate_control::RateControl,
    reload::Reloader,
    table::FlowTable,
    wire::{
        Namespaces,
        attachment::Attachments,
        claims::{self, Claims, Predecessor, Requests, Successor},
        device::{Device, Mtus, Side},
        filter::GENERATION,
        interfaces::{self, Changes, Interfaces},
        programs::{self, Programs},
        selection::Selection,
    },
    workers::Workers,
};

/// Runs the proxy until it is told to stop. `cgroup` is the control group of this process, for initial windows, or why
/// there is none, `namespaces` are those of the legs. `ready` is called once connections are intercepted.
///
/// # Errors
/// Whatever keeps it from starting, as one line for the user. Nothing stays behind then.
pub async fn run(
    configuration: Configuration,
    log: &Log,
    cgroup: Result<OwnCgroup>,
    namespaces: Namespaces,
    ready: impl FnOnce(),
) -> Result<()> {
    let (mut stop, mut stop_too) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let mut proxy = Proxy::start(&configuration.options, cgroup, namespaces).await?;
    let options = &configuration.options;
    let names = options.interfaces.join(",");
    info!(interfaces = names, port = options.port, limit = proxy.limit, mark = %options.steering.mark, "ready");
    ready();
    proxy.keeper.service_manager.ready();

    let mut reloader = Reloader::new(configuration, log);
    let stopping = stopped(&mut stop, &mut stop_too);
    if let Some(successor) = proxy.serve(stopping, &mut hangup, &mut reloader).await {
        let process = successor.process();
        proxy.hand_over(successor).await;
        info!(
            process,
            flows = proxy.shared.table.count(),
            "relieved: new connections are another's"
        );
        tokio::select! {
            () = proxy.finish(HANDSHAKES_LEFT) => {}
            () = proxy.keeper.service_manager.keep_alive(keeper::ROUND) => {}
            () = stopped(&mut stop, &mut stop_too) => {}
        }
    }
    info!(
        flows = proxy.shared.table.count(),
        "stopping: new connections pass through"
    );
    let drain = reloader.options().drain_timeout;
    proxy.keeper.service_manager.stopping(drain);
    tokio::select! {
        () = proxy.drain(drain) => {}
        () = stopped(&mut stop, &mut stop_too) => {
            info!("stopping at once");
            proxy.reset_flows().await;
        }
    }
    proxy.report();
    proxy.take_down().await;
    Ok(())
}

/// How long a stop waits for handshakes that are under way.
const HANDSHAKES: Duration = Duration::from_secs(2);
/// The same when nobody waits for the stop: long enough for answers that had to be repeated.
const HANDSHAKES_LEFT: Duration = Duration::from_secs(10);
/// How long flows may take to end at once.
const RESETS: Duration = Duration::from_secs(2);
/// How long a stop waits until the peers have acknowledged the last FINs. After that nobody repeats them.
const LAST_FINS: Duration = Duration::from_secs(5);

async fn stopped(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Everything that is set up, in the order in which it is taken down again: the programs stop redirecting before the
/// devices go.
struct Proxy {
    observatory: Observatory,
    attachments: Attachments,
    programs: Programs,
    clients: Device,
    servers: Device,
    /// None once another has taken over, like `requests`.
    claims: Option<Claims>,
    requests: Option<Arc<Requests>>,
    rate_control: Result<RateControl>,
    listeners: Listeners,
    intercepted: Vec<String>,
    limit: u32,
    changes: Changes,
    keeper: Keeper,
    shared: Arc<Shared>,
    workers: Arc<Workers>,
    accepting: CancellationToken,
    attendants: JoinSet<()>,
}

impl Proxy {
    async fn start(options: &Options, cgroup: Result<OwnCgroup>, namespaces: Namespaces) -> Result<Self> {
        if options.sniff_interface.is_some() {
            warn!(
                "-s is ignored: SYN options are recorded by eBPF on every intercepted interface, without a sniffer"
            );
        }
        let interfaces = interfaces::list().await?;
        check_interfaces(&options.interfaces, &interfaces)?;
        let mark = options.steering.mark;
        let directory = claims::Directory::open(&options.runtime_dir)?;
        let predecessor = match options.takeover {
            true => Predecessor::find(&directory, &options.interfaces)?,
            false => None,
        };
        let claims = match predecessor {
            Some(_) => None,
            None => Some(Claims::acquire(&directory, &options.interfaces)?),
        };
        let requests = Requests::listen(&directory)?;
        namespaces.settle(ignores_marks(options)?)?;
        let legs = leg_config(options, &namespaces.clients)?;
        // For links that a reload adds too, when nothing can be loaded any more.
        let rate_control = RateControl::register();
        let profiles = link_profiles(options, &interfaces, &rate_control)?;
        profiles.iter().for_each(announce);
        let links = Arc::new(Links::new(profiles));
        let (limit, pipes) = preflight::fit_descriptors(options.max_connections)?;
        let keeper = Keeper::new(limit, options.monitoring_pid, options.logfile.as_deref())?;

        let mut clients = Device::new(Side::Clients, namespaces.clients).await?;
        let mut servers = Device::new(Side::Servers, namespaces.servers).await?;
        let selection = Selection::new(&options.steering.only, &options.steering.bypass);
        let config = programs::Config {
            mark,
            predecessor: predecessor
                .as_ref()
                .and_then(|other| other.process.try_into().ok()),
            devices: [&clients, &servers],
            limit,
            selection: &selection,
            log_syns: options.steering.log_syns,
        };
        let mut programs = Programs::load(&config)?;
        programs.beat()?;
        if let Err(error) = cgroup.and_then(|cgroup| programs.enable_initial_windows(cgroup)) {
            info!("legs start with the kernel's initial window: {error:#}");
        }
        // The programs are loaded. All other threads are started by these three, from here on.
        privileges::drop_loading()?;
        for device in [&clients, &servers] {
            device.namespace().run(privileges::drop_loading)?;
        }
        let threads = options.threads.map_or_else(
            || thread::available_parallelism().map_or(1, usize::from),
            usize::from,
        );
        // They make the server legs.
        let workers = servers.namespace().run(|| Workers::start(threads));
        let workers = workers.context("cannot start the worker threads")?;
        let mut attachments = Attachments::new(predecessor.is_some(), directory.clone());
        // Before any socket: the kernel closes a dead process's descriptors from the highest to the lowest, and the resets of
        // its sockets leave through these programs.
        attachments.attach_device(&mut programs, &clients)?;
        attachments.attach_device(&mut programs, &servers)?;
        let listeners = clients.namespace().run(|| {
            let _entered = workers.acceptor().enter();
            Listeners::bind(options.port.get(), &options.tcp, &legs, &links)
        })?;
        let changes = Changes::subscribe()?;
        let intercepted = options.interfaces.clone();
        let shared = Arc::new(Shared {
            settings: ArcSwap::from_pointee(Settings::new(options, legs, Instant::now())),
            links,
            host: Namespace::of_host()?,
            interfaces: ArcSwap::default(),
            paths: Arc::default(),
            table: Arc::new(FlowTable::new(programs.flows().clone())),
            metrics: Metrics::default(),
            conduits: ConduitPool::new(pipes),
            stop: CancellationToken::new(),
        });
        follow_mtus(&interfaces, &shared, &mut clients, &mut servers).await?;
        let view = View {
            latest: Default::default(),
            shared: shared.clone(),
            counters: programs.counters().clone(),
            intercepted: intercepted.clone(),
            attached: AttachedNow::default(),
            mark,
            devices: vec![clients.name.clone(), servers.name.clone()],
            port: options.port.get(),
            limit,
            started: SystemTime::now(),
            ready: AtomicBool::new(false),
        };
        let mut observatory = Observatory::new(view);
        let places = (options.metrics_listen.as_ref(), options.admin_socket.as_deref());
        if predecessor.is_none() {
            observatory.open(places.0, places.1)?;
        }
        programs.open(&listeners, clients.namespace())?;
        let wanted = |name: &str| intercepted.iter().any(|wanted| wanted == name);
        programs.describe(&interfaces, wanted, &shared.links)?;
        attachments.follow(&mut programs, &interfaces, wanted)?;
        let claims = match (claims, predecessor) {
            (None, Some(predecessor)) => {
                let process = predecessor.process;
                let claims = predecessor.take_over().await?;
                attachments.taken_over();
                info!(
                    process,
                    "taken over: the process before goes on with its open flows"
                );
                // Its places are free only now, when there is no way back.
                if let Err(error) = observatory.open(places.0, places.1) {
                    warn!("{error:#}");
                }
                Some(claims)
            }
            (claims, _) => claims,
        };
        observatory.view.attached.set(attachments.list());
        observatory.view.set_ready(true);
        // All that may have taken long, on a busy machine, and the first round is still to come.
        programs.beat()?;
        Ok(Self {
            observatory,
            attachments,
            programs,
            clients,
            servers,
            claims,
            requests: Some(Arc::new(requests)),
            rate_control,
            listeners,
            intercepted,
            limit,
            changes,
            keeper,
            shared,
            workers: Arc::new(workers),
            accepting: CancellationToken::new(),
            attendants: JoinSet::new(),
        })
    }

    /// Accepts and looks after things until `stop`, or until another instance wants to take over.
    async fn serve(
        &mut self,
        stop: impl Future<Output = ()>,
        hangup: &mut Signal,
        reloader: &mut Reloader<'_>,
    ) -> Option<Successor> {
        self.accept_from(&self.listeners.pairs.clone());
        self.keep_budgets(&self.shared.links.all());
        self.keep_filter();
        let mut stop = pin!(stop);
        let mut successor = pin!(requested(self.requests.clone()));
        let mut rounds = interval(keeper::ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut stop => return None,
                successor = &mut successor => return Some(successor),
                _ = rounds.tick() => {
                    self.keeper.round(&mut self.programs, &self.shared, &self.workers);
                    let devices = [&self.clients, &self.servers];
                    if !self.attachments.are_intact(&mut self.programs, devices) {
                        self.adapt().await;
                    }
                }
                () = self.changes.next() => self.adapt().await,
                _ = hangup.recv(), if reloader.is_idle() => {
                    self.keeper.service_manager.reloading();
                    reloader.read();
                    if reloader.is_idle() {
                        self.keeper.service_manager.ready();
                    }
                }
                Some(read) = reloader.next() => {
                    reloader.apply(read, self).await;
                    self.keeper.service_manager.ready();
                }
                Some(Err(error)) = self.attendants.join_next() => if let Ok(panic) = error.try_into_panic() {
                    resume_unwind(panic);
                },
            }
        }
    }

    fn accept_from(&mut self, pairs: &[Arc<Pair>]) {
        for pair in pairs {
            let accept = accept(pair.clone(), self.shared.clone(), self.workers.clone());
            self.attend(&self.workers.acceptor().clone(), accept);
        }
    }

    /// Has the filter of flows know those that are open, and forget those that are not, with every generation.
    fn keep_filter(&mut self) {
        let (filter, flows) = (self.programs.filter().clone(), self.programs.flows().clone());
        let mut generations = interval_at(Instant::now() + GENERATION, GENERATION);
        let keep = async move {
            loop {
                generations.tick().await;
                let (filter, flows) = (filter.clone(), flows.clone());
                // Without the list the generation stays, and with it all flows.
                let advance = move || {
                    flows
                        .try_all()
                        .map(|all| filter.advance(all.iter().map(|(key, _)| key)))
                };
                if let Ok(Err(error)) = spawn_blocking(advance).await {
                    warn!("cannot read the kernel's map of flows: {error}");
                }
            }
        };
        self.attend(&Handle::current(), keep);
    }

    fn keep_budgets(&mut self, links: &[Arc<Link>]) {
        for link in links {
            let budget = link.budget.clone();
            self.attend(&Handle::current(), async move { budget.keep().await });
        }
    }

    /// Runs what all flows need beside what this task does itself. A daemon that no longer accepts, but shows that it is
    /// alive, would swallow every new connection: so a panic there is the daemon's own, whose death lets them pass.
    fn attend(&mut self, runtime: &Handle, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.accepting.clone().run_until_cancelled_owned(task);
        self.attendants.spawn_on(
            async move {
                task.await;
            },
            runtime,
        );
    }

    /// Puts back what others removed, and follows interfaces that come, go and change.
    async fn adapt(&mut self) {
        // Changes come in bursts, and what is done here causes some.
        sleep(Duration::from_millis(20)).await;
        self.changes.skip_pending();
        let before: Vec<String> = self.attachments.intercepting().map(str::to_owned).collect();
        if let Err(error) = self.try_adapt().await {
            warn!("cannot follow a change of the network: {error:#}");
        }
        let after: Vec<String> = self.attachments.intercepting().map(str::to_owned).collect();
        if before != after {
            info!(
                before = before.join(","),
                now = after.join(","),
                "intercepted interfaces changed"
            );
        }
    }

    async fn try_adapt(&mut self) -> Result<()> {
        for device in [&mut self.clients, &mut self.servers] {
            let is_new = device.restore().await?;
            if is_new || !self.attachments.is_device_intact(&mut self.programs, device) {
                self.attachments.attach_device(&mut self.programs, device)?;
            }
        }
        let interfaces = interfaces::list().await?;
        follow_mtus(&interfaces, &self.shared, &mut self.clients, &mut self.servers).await?;
        let intercepted = &self.intercepted;
        let wanted = |name: &str| intercepted.iter().any(|wanted| wanted == name);
        self.programs.describe(&interfaces, wanted, &self.shared.links)?;
        let followed = self.attachments.follow(&mut self.programs, &interfaces, wanted);
        self.observatory.view.attached.set(self.attachments.list());
        followed
    }

    /// Leaves everything but the open flows to another instance.
    async fn hand_over(&mut self, successor: Successor) {
        if let Err(error) = self.programs.retire() {
            warn!("{error:#}");
            self.programs.close();
        }
        self.requests = None;
        self.observatory.view.set_ready(false);
        self.observatory.close().await;
        // Before it can speak for itself.
        if let Some(process) = successor.process() {
            self.keeper.service_manager.succeeded_by(process);
        }
        if let Some(claims) = self.claims.take() {
            successor.hand_over(claims).await;
        }
    }

    /// Lets open flows come to their end, those too whose handshake is completed within `handshakes`.
    async fn finish(&self, handshakes: Duration) {
        let _ = timeout(handshakes, async {
            while self.shared.table.pending() > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        self.workers.finished().await;
    }

    /// Has new connections pass, lets open flows come to their end, and ends at `deadline` those that have not.
    async fn drain(&mut self, deadline: Duration) {
        self.observatory.view.set_ready(false);
        self.programs.close();
        if timeout(deadline, self.finish(HANDSHAKES)).await.is_ok() {
            self.keeper.write_table(&self.shared);
        } else {
            info!(
                flows = self.shared.table.count(),
                "resetting the flows that are still open"
            );
            self.reset_flows().await;
        }
    }

    /// Ends all flows, by a reset of both legs, before what their packets pass is taken away.
    async fn reset_flows(&mut self) {
        self.keeper.write_table(&self.shared);
        self.shared.stop.cancel();
        let _ = timeout(RESETS, self.workers.finished()).await;
    }

    /// Waits until the peers have acknowledged the last FINs, bounded, before the devices go.
    async fn take_down(self) {
        self.accepting.cancel();
        let _ = timeout(LAST_FINS, async {
            while self.clients.has_unacknowledged_fins() || self.servers.has_unacknowledged_fins() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }

    /// What became of everything, in two lines.
    fn report(&mut self) {
        let metrics = &self.shared.metrics;
        let (up, down) = metrics.bytes();
        let counts = |counts: Vec<(String, u64)>| {
            let seen: Vec<String> = counts
                .into_iter()
                .filter(|(_, n)| *n > 0)
                .map(|(name, n)| format!("{name}={n}"))
                .collect();
            seen.join(" ")
        };
        let kernel = Counter::ALL
            .iter()
            .map(|counter| (counter.name().to_owned(), self.programs.count(*counter)));
        let events = Event::ALL
            .iter()
            .map(|event| (event.name().to_owned(), metrics.events(*event)));
        let closed = CloseReason::ALL
            .iter()
            .map(|reason| (reason.name(), metrics.closed(*reason)));
        info!(up, down, "flows: {}", counts(events.chain(closed).collect()));
        info!("packets: {}", counts(kernel.collect()));
    }
}

/// Resolves when another instance requests a takeover; never after the hand-over.
async fn requested(requests: Option<Arc<Requests>>) -> Successor {
    match requests {
        Some(requests) => requests.next().await,
        None => pending().await,
    }
}

fn check_interfaces(wanted: &[String], present: &Interfaces) -> Result<()> {
    for name in wanted {
        if !present.values().any(|interface| interface.name == *name) {
            let names: Vec<&str> = present
                .values()
                .map(|interface| interface.name.as_str())
                .collect();
            bail!(
                "interface {name}: there is none of that name that can be intercepted; there are {}",
                names.join(", ")
            );
        }
    }
    Ok(())
}

/// Lets legs, and both ends' segment sizes, go by the packet sizes of the interfaces.
async fn follow_mtus(
    interfaces: &Interfaces,
    shared: &Shared,
    clients: &mut Device,
    servers: &mut Device,
) -> Result<()> {
    let mtus = || {
        interfaces
            .iter()
            .map(|(index, interface)| (*index, interface.mtu))
    };
    shared.interfaces.store(Arc::new(interfaces.clone()));
    clients.follow(Mtus::of(mtus())).await?;
    servers.follow(Mtus::of(mtus())).await
}

/// Whether a leg's congestion control ignores congestion marks: BBR's first version does, and pepsal's own, which links have
/// unless they name another.
fn ignores_marks(options: &Options) -> Result<bool> {
    let default = preflight::default_congestion()?;
    let tcp = &options.tcp;
    let named = [&tcp.congestion, &tcp.client_congestion, &tcp.server_congestion];
    let mut of_legs = named.into_iter().flatten().chain([&default]);
    Ok(!options.links.is_empty() || of_legs.any(|algorithm| algorithm.starts_with("bbr")))
}

/// How the options want legs to be made, if the kernel can. `namespace` is one of the legs' own.
fn leg_config(options: &Options, namespace: &Namespace) -> Result<LegConfig> {
    let inside = namespace.run(preflight::default_congestion)?;
    let legs = LegConfig::new(options, &inside);
    for algorithm in legs.congestion() {
        if RateControl::is_named(algorithm) {
            bail!(
                "congestion control '{algorithm}' sends at a link's rate: it goes with --link, not with -C"
            );
        }
        preflight::check_congestion(algorithm)?;
    }
    Ok(legs)
}

/// Works out what follows from every `--link`, if its interface is there.
fn link_profiles(
    options: &Options,
    interfaces: &Interfaces,
    rate_control: &Result<RateControl>,
) -> Result<Vec<LinkProfile>> {
    for name in options.links.iter().map(|link| &link.interface) {
        if !interfaces.values().any(|interface| interface.name == *name) {
            bail!("--link {name}: there is no interface of that name");
        }
    }
    let profiles = explain(options, rate_control)?;
    for profile in &profiles {
        preflight::check_congestion(&profile.congestion.value)?;
    }
    Ok(profiles)
}

fn announce(profile: &LinkProfile) {
    info!("legs that leave through {}:\n{profile}", profile.interface);
}

/// Returns the profiles that follow from the options. `rate_control` has to be kept for as long as they are used.
///
/// # Errors
/// For two links behind one interface, and for more links than the kernel side has room for.
pub fn explain(options: &Options, rate_control: &Result<RateControl>) -> Result<Vec<LinkProfile>> {
    for (i, spec) in options.links.iter().enumerate() {
        if options.links[..i]
            .iter()
            .any(|other| other.interface == spec.interface)
        {
            bail!("--link {}: given twice", spec.interface);
        }
    }
    if options.links.len() > LINKS_MAX as usize {
        bail!(
            "{} links: at most {LINKS_MAX} can have a profile",
            options.links.len()
        );
    }
    if options.links.is_empty() {
        return Ok(Vec::new());
    }
    let congestion = match rate_control {
        Ok(registered) => registered.name.as_str(),
        Err(error) => {
            let best = preflight::best_congestion();
            warn!(
                "legs of links use {best}, since pepsal's own congestion control is not to be had: {error:#}"
            );
            best
        }
    };
    let profile = |spec| LinkProfile::derive(spec, congestion, options.connect_timeout);
    Ok(options.links.iter().map(profile).collect())
}

/// Accepts for as long as it is polled.
async fn accept(pair: Arc<Pair>, shared: Arc<Shared>, workers: Arc<Workers>) {
    join_all(
        pair.iter()
            .map(|listener| accept_from(listener, &shared, &workers)),
    )
    .await;
}

async fn accept_from(listener: &Listener, shared: &Arc<Shared>, workers: &Workers) {
    let accept = |listener: &Socket| {
        let (socket, client) = listener.accept4(SOCK_NONBLOCK | SOCK_CLOEXEC)?;
        Ok((socket.local_addr()?, socket, client))
    };
    let mut pause = Duration::from_millis(5);
    loop {
        match listener.async_io(Interest::READABLE, accept).await {
            Ok((server, socket, client)) => {
                // Others are not accepted from such listeners.
                let (Some(server), Some(client)) = (server.as_socket(), client.as_socket()) else {
                    continue;
                };
                fault::at("accept", server);
                pause = Duration::from_millis(5);
                let shared = shared.clone();
                workers.spawn(move || flow::serve(socket, client, server, shared));
            }
            // The client was faster to leave.
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                shared.metrics.count(Event::AcceptFailed);
                warn!("cannot accept, trying again in {pause:?}: {error}");
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        }
    }
}

fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
