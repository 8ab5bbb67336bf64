//! A TCP performance enhancing proxy (RFC 3135) that intercepts by eBPF.
//!
//! The modules are listed in the order in which a flow meets them:
//!
//! 1. [`steer`]: the client's SYN enters an interface; an eBPF program finds it selected ([`selection`], in the tables of
//!    [`selection_maps`]), records what it says and marks it. [`route`]'s rules deliver marked packets locally, and a second
//!    program gives the connection to
//! 2. [`listener`], where it is accepted, and given to one of the [`workers`].
//! 3. [`flow`] enters it in the [`table`], and makes
//! 4. [`leg`]: a second connection, to the server, from the client's address, with its DSCP and options. Both legs get the
//!    profile of the [`link`] that they leave through and their share of its [`budget`], which [`rate_control`] sends at
//!    ([`btf`] tells it where the kernel keeps things). Where nobody described the link, a leg starts with what earlier ones
//!    learned of its path ([`paths`]).
//! 5. [`relay`] moves the bytes both ways, from [`stream`] to stream through a [`conduit`], until both ends are done or one
//!    breaks.
//! 6. [`metrics`] counts the end, once, with its reason.
//!
//! [`observe`] shows all of it to who asks, at the terminal by the commands in [`ctl`].
//!
//! Around them: [`nat`] knows who translates addresses, [`cli`] and the file of [`config`] say what is wanted, at start and
//! at each reload, [`cgroup`] is the daemon's own, [`privileges`] gives up what is not needed, [`preflight`] says whether
//! it all can be had, [`instance`] that nobody else has it, [`log`] tells, [`keeper`] looks after what needs looking after,
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
pub mod instance;
pub mod keeper;
pub mod leg;
pub mod link;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod nat;
pub mod notify;
pub mod observe;
pub mod paths;
pub mod preflight;
pub mod privileges;
pub mod rate_control;
pub mod relay;
mod reload;
pub mod route;
pub mod selection;
pub mod selection_maps;
pub mod socket;
pub mod steer;
pub mod stream;
pub mod table;
pub mod units;
pub mod workers;

use std::{
    future::pending,
    io,
    os::fd::AsFd,
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
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    cgroup::OwnCgroup,
    cli::Options,
    conduit::ConduitPool,
    config::Configuration,
    flow::{CloseReason, Settings, Shared},
    instance::{Instance, Predecessor, Successor},
    keeper::Keeper,
    leg::LegConfig,
    link::{Link, LinkProfile, Links},
    listener::{Listener, Listeners, Pair, Place},
    log::Log,
    metrics::{Event, Metrics},
    observe::{AttachedNow, Observatory, View},
    rate_control::RateControl,
    reload::Reloader,
    route::{Changes, Interfaces, Routes},
    selection::Selection,
    steer::Steering,
    table::FlowTable,
    workers::Workers,
};

/// Runs the proxy until it is told to stop. `cgroup` is the control group of this process, for initial windows, or why
/// there is none. `ready` is called once connections are intercepted.
///
/// # Errors
/// Whatever keeps it from starting, as one line for the user. Nothing stays behind then.
pub async fn run(
    configuration: Configuration,
    log: &Log,
    cgroup: Result<OwnCgroup>,
    ready: impl FnOnce(),
) -> Result<()> {
    let (mut stop, mut stop_too) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    let mut proxy = Proxy::start(&configuration.options, cgroup).await?;
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
        () = stopped(&mut stop, &mut stop_too) => info!("stopping at once"),
    }
    proxy.report();
    Ok(())
}

/// How long a stop waits for handshakes that are under way.
const HANDSHAKES: Duration = Duration::from_secs(2);
/// The same when nobody waits for the stop: long enough for answers that had to be repeated.
const HANDSHAKES_LEFT: Duration = Duration::from_secs(10);

async fn stopped(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Everything that is set up, in the order in which it is taken down again: the programs stop marking before the rules
/// that deliver what is marked go.
struct Proxy {
    observatory: Observatory,
    steering: Steering,
    routes: Routes,
    /// None once another has taken over.
    instance: Option<Arc<Instance>>,
    rate_control: Option<RateControl>,
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
    async fn start(options: &Options, cgroup: Result<OwnCgroup>) -> Result<Self> {
        preflight::check()?;
        if options.sniff_interface.is_some() {
            warn!(
                "-s is ignored: SYN options are recorded by eBPF on every intercepted interface, without a sniffer"
            );
        }
        let interfaces = route::interfaces().await?;
        check_interfaces(&options.interfaces, &interfaces)?;
        preflight::warn_of_source_nat(options.steering.source);
        let table = options.steering.table;
        let predecessor = match options.takeover {
            true => Predecessor::find(&options.interfaces, table)?,
            false => None,
        };
        let instance = match predecessor {
            Some(_) => None,
            None => Some(Instance::claim(&options.interfaces, table)?),
        };
        let legs = leg_config(options)?;
        let mut rate_control = None;
        let profiles = link_profiles(options, &interfaces, &mut rate_control)?;
        profiles.iter().for_each(announce);
        let links = Arc::new(Links::new(profiles));
        let threads = options.threads.map_or_else(
            || thread::available_parallelism().map_or(1, usize::from),
            usize::from,
        );
        let workers = Workers::start(threads).context("cannot start the worker threads")?;
        let (limit, pipes) = preflight::fit_descriptors(options.max_connections)?;
        let keeper = Keeper::new(limit, options.monitoring_pid, options.logfile.as_deref())?;

        let selection = Selection::new(&options.steering.only, &options.steering.bypass);
        let mark = options.steering.mark;
        let config = steer::Config {
            mark,
            limit,
            selection: &selection,
            log_syns: options.steering.log_syns,
            beside_another: predecessor.is_some(),
        };
        let mut steering = Steering::load(&config)?;
        steering.beat()?;
        if let Err(error) = cgroup.and_then(|cgroup| steering.enable_initial_windows(cgroup)) {
            info!("legs start with the kernel's initial window: {error:#}");
        }
        let place = Place {
            port: options.port.get(),
            shared: predecessor.is_some(),
        };
        let listeners = {
            let _entered = workers.acceptor().enter();
            Listeners::bind(place, &options.tcp, &legs, &links)?
        };
        let changes = Changes::subscribe()?;
        let mut routes = match predecessor {
            Some(_) => Routes::beside(mark, table),
            None => Routes::new(mark, table).await?,
        };
        routes.reconcile(&interfaces).await?;
        let intercepted = options.interfaces.clone();
        let shared = Arc::new(Shared {
            settings: ArcSwap::from_pointee(Settings::new(options, legs, Instant::now())),
            links,
            paths: Arc::default(),
            table: Arc::new(FlowTable::new(steering.flows().clone())),
            metrics: Metrics::default(),
            conduits: ConduitPool::new(pipes),
            stop: CancellationToken::new(),
        });
        let view = View {
            shared: shared.clone(),
            counters: steering.counters().clone(),
            intercepted: intercepted.clone(),
            attached: AttachedNow::default(),
            policy: routes.policy(),
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
        steering.open(&listeners)?;
        steering.attach(
            &interfaces,
            |name| intercepted.iter().any(|wanted| wanted == name),
            &shared.links,
        )?;
        let instance = match (instance, predecessor) {
            (None, Some(predecessor)) => {
                let process = predecessor.process;
                let relieved = predecessor.relieve(&options.interfaces, table).await;
                // They stay the other's if it has not let go.
                let instance = relieved.inspect_err(|_| routes.hand_over())?;
                info!(
                    process,
                    "taken over: the process before goes on with its open flows"
                );
                // Its places are free only now, when there is no way back.
                if let Err(error) = observatory.open(places.0, places.1) {
                    warn!("{error:#}");
                }
                Some(instance)
            }
            (instance, _) => instance,
        };
        observatory.view.attached.set(steering.attachments());
        observatory.view.set_ready(true);
        // All that may have taken long, on a busy machine, and the first round is still to come.
        steering.beat()?;
        Ok(Self {
            observatory,
            steering,
            routes,
            instance: instance.map(Arc::new),
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
        let mut stop = pin!(stop);
        let mut successor = pin!(asked(self.instance.clone()));
        let mut rounds = interval(keeper::ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut stop => return None,
                successor = &mut successor => return Some(successor),
                _ = rounds.tick() => self.keeper.round(&mut self.steering, &self.shared, &self.workers),
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

    /// Puts back what others removed, and follows interfaces that come and go.
    async fn adapt(&mut self) {
        // Changes come in bursts, and what is done here causes some.
        sleep(Duration::from_millis(20)).await;
        self.changes.skip_pending();
        let adapt = async {
            let interfaces = route::interfaces().await?;
            let before: Vec<String> = self.steering.intercepting().map(str::to_owned).collect();
            let added = self.routes.reconcile(&interfaces).await?;
            let intercepted = &self.intercepted;
            self.steering.attach(
                &interfaces,
                |name| intercepted.iter().any(|wanted| wanted == name),
                &self.shared.links,
            )?;
            self.observatory.view.attached.set(self.steering.attachments());
            let after: Vec<String> = self.steering.intercepting().map(str::to_owned).collect();
            if before != after {
                info!(
                    before = before.join(","),
                    now = after.join(","),
                    "intercepted interfaces changed"
                );
            }
            anyhow::Ok(added)
        };
        match adapt.await {
            Ok(0) => {}
            Ok(added) => info!(added, "policy rules and routes put in place"),
            Err(error) => warn!("cannot follow a change of the network: {error:#}"),
        }
    }

    /// Leaves everything but the open flows to another instance.
    async fn hand_over(&mut self, successor: Successor) {
        if let Err(error) = self.steering.retire() {
            warn!("{error:#}");
            self.steering.close();
        }
        self.routes.hand_over();
        self.instance = None;
        self.observatory.view.set_ready(false);
        self.observatory.close().await;
        // Before it can speak for itself.
        if let Some(process) = successor.process() {
            self.keeper.service_manager.succeeded_by(process);
        }
        successor.tell().await;
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
        self.steering.close();
        if timeout(deadline, self.finish(HANDSHAKES)).await.is_err() {
            info!(
                flows = self.shared.table.count(),
                "resetting the flows that are still open"
            );
            self.shared.stop.cancel();
            let _ = timeout(Duration::from_secs(2), self.workers.finished()).await;
        }
        self.accepting.cancel();
    }

    /// What became of everything, in two lines.
    fn report(&mut self) {
        self.keeper.write_table(&self.shared);
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
            .map(|counter| (counter.name().to_owned(), self.steering.count(*counter)));
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

/// Never, once the claims are given up.
async fn asked(instance: Option<Arc<Instance>>) -> Successor {
    match instance {
        Some(instance) => instance.successor().await,
        None => pending().await,
    }
}

fn check_interfaces(wanted: &[String], present: &Interfaces) -> Result<()> {
    for name in wanted {
        if !present.values().any(|interface| interface == name) {
            let names: Vec<&str> = present.values().map(String::as_str).collect();
            bail!(
                "interface {name}: there is none of that name that can be intercepted; there are {}",
                names.join(", ")
            );
        }
    }
    Ok(())
}

/// How the options want legs to be made, if the kernel can.
fn leg_config(options: &Options) -> Result<LegConfig> {
    let legs = LegConfig::new(options);
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
    rate_control: &mut Option<RateControl>,
) -> Result<Vec<LinkProfile>> {
    for name in options.links.iter().map(|link| &link.interface) {
        if !interfaces.values().any(|interface| interface == name) {
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

/// The profiles that follow from the options. The congestion control that is registered for them, unless it has been, has
/// to be kept for as long as they are used.
///
/// # Errors
/// For two links behind one interface, and for more links than the kernel side has room for.
pub fn explain(options: &Options, rate_control: &mut Option<RateControl>) -> Result<Vec<LinkProfile>> {
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
    let registered = match rate_control.take() {
        Some(registered) => Ok(registered),
        None => RateControl::register(),
    };
    let congestion = match registered {
        Ok(registered) => rate_control.insert(registered).name.as_str(),
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
    let own = listener.get_ref().local_addr().ok();
    let accept = |listener: &Socket| {
        let (socket, client) = listener.accept4(SOCK_NONBLOCK | SOCK_CLOEXEC)?;
        Ok((socket.local_addr()?, socket, client))
    };
    let mut pause = Duration::from_millis(5);
    loop {
        match listener.async_io(Interest::READABLE, accept).await {
            Ok((server, socket, _)) if Some(&server) == own.as_ref() => {
                shared.metrics.count(Event::DirectRefused);
                refuse(&socket);
            }
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

fn refuse(accepted: &Socket) {
    // Dropped right after, it is closed one way or the other.
    let _ = socket::reset_on_close(accepted.as_fd(), true);
}

fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
