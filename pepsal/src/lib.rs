//! A TCP performance enhancing proxy (RFC 3135) that intercepts by eBPF.
//!
//! The modules are listed in the order in which a flow meets them:
//!
//! 1. [`steer`]: the client's SYN enters an interface; an eBPF program finds it selected ([`selection`]), records what it
//!    says and marks it. [`route`]'s rules deliver marked packets locally, and a second program gives the connection to
//! 2. [`listener`], where it is accepted.
//! 3. [`flow`] enters it in the [`table`], and makes
//! 4. [`leg`]: a second connection, to the server, from the client's address, with its DSCP and options. Both legs get the
//!    profile of the [`link`] that they leave through and their share of its [`budget`], which [`rate_control`] sends at
//!    ([`btf`] tells it where the kernel keeps things). Where nobody described the link, a leg starts with what earlier ones
//!    learned of its path ([`paths`]).
//! 5. [`relay`] moves the bytes both ways, through a [`conduit`], until both ends are done or one breaks.
//! 6. [`metrics`] counts the end, once, with its reason.
//!
//! Around them: [`cli`] says what is wanted, [`preflight`] whether it can be had, [`instance`] that nobody else has it,
//! [`cgroup`] is the daemon's own,
//! [`keeper`] looks after what needs looking after, and [`run`] holds it all.

pub mod btf;
pub mod budget;
pub mod cgroup;
pub mod cli;
pub mod conduit;
pub mod flow;
pub mod instance;
pub mod keeper;
pub mod leg;
pub mod link;
pub mod listener;
pub mod metrics;
pub mod paths;
pub mod preflight;
pub mod rate_control;
pub mod relay;
pub mod route;
pub mod selection;
pub mod socket;
pub mod steer;
pub mod table;
pub mod units;

use std::{io, os::fd::AsFd, panic::resume_unwind, pin::pin, sync::Arc, time::Duration};

use anyhow::{Result, bail};
use futures_util::future::join_all;
use pepsal_ebpf::{Counter, LINKS_MAX};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    cli::Options,
    conduit::ConduitPool,
    flow::{CloseReason, Collector, Shared},
    instance::Instance,
    keeper::Keeper,
    leg::LegConfig,
    link::{LinkProfile, Links},
    listener::{Listeners, Pair},
    metrics::{Event, Metrics},
    rate_control::RateControl,
    route::{Changes, Interfaces, Routes},
    selection::Selection,
    steer::Steering,
    table::FlowTable,
};

/// Runs the proxy until it is told to stop. `ready` is called once connections are intercepted.
///
/// # Errors
/// Whatever keeps it from starting, as one line for the user. Nothing stays behind then.
pub async fn run(options: Options, ready: impl FnOnce()) -> Result<()> {
    let (mut stop, mut stop_too) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut proxy = Proxy::start(&options).await?;
    let names = options.interfaces.join(",");
    info!(interfaces = names, port = options.port, limit = proxy.limit, mark = %options.steering.mark, "ready");
    ready();

    proxy.serve(stopped(&mut stop, &mut stop_too)).await;

    info!(
        flows = proxy.shared.table.count(),
        "stopping: new connections pass through"
    );
    tokio::select! {
        () = proxy.drain(options.drain_timeout) => {}
        () = stopped(&mut stop, &mut stop_too) => info!("stopping at once"),
    }
    proxy.report();
    Ok(())
}

/// How long a stop waits for handshakes that are under way.
const HANDSHAKES: Duration = Duration::from_secs(2);

async fn stopped(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Everything that is set up, in the order in which it is taken down again: the programs stop marking before the rules
/// that deliver what is marked go.
struct Proxy {
    steering: Steering,
    routes: Routes,
    _instance: Instance,
    _rate_control: Option<RateControl>,
    listeners: Arc<Listeners>,
    intercepted: Vec<String>,
    limit: u32,
    changes: Changes,
    keeper: Keeper,
    shared: Arc<Shared>,
    flows: TaskTracker,
    accepting: CancellationToken,
    attendants: JoinSet<()>,
}

impl Proxy {
    async fn start(options: &Options) -> Result<Self> {
        preflight::check()?;
        if options.sniff_interface.is_some() {
            warn!(
                "-s is ignored: SYN options are recorded by eBPF on every intercepted interface, without a sniffer"
            );
        }
        let interfaces = route::interfaces().await?;
        check_interfaces(&options.interfaces, &interfaces)?;
        let table = options.steering.table;
        let instance = Instance::claim(&options.interfaces, table)?;
        let legs = LegConfig::new(options);
        for algorithm in legs.congestion() {
            if RateControl::is_named(algorithm) {
                bail!(
                    "congestion control '{algorithm}' sends at a link's rate: it goes with --link, not with -C"
                );
            }
            preflight::check_congestion(algorithm)?;
        }
        let (links, rate_control) = link_profiles(options, &interfaces)?;
        let links = Arc::new(Links::new(links));
        let (limit, pipes) = preflight::fit_descriptors(options.max_connections)?;
        let keeper = Keeper::new(limit, options.monitoring_pid, options.logfile.as_deref())?;

        let selection = Selection::new(&options.steering.only, &options.steering.bypass);
        let mark = options.steering.mark;
        let config = steer::Config {
            mark,
            limit,
            selection: &selection,
            log_syns: options.steering.log_syns,
        };
        let mut steering = Steering::load(&config)?;
        steering.beat()?;
        // Before any socket is opened: a socket belongs to the group that its process was in.
        if let Err(error) = steering.enable_initial_windows() {
            info!("legs start with the kernel's initial window: {error:#}");
        }
        let listeners = Listeners::bind(options.port.get(), &options.tcp, &legs, &links)?;
        let changes = Changes::subscribe()?;
        let routes = Routes::new(mark, table).await?;
        routes.reconcile(&interfaces).await?;
        steering.open(&listeners)?;
        let intercepted = options.interfaces.clone();
        steering.attach(
            &interfaces,
            |name| intercepted.iter().any(|wanted| wanted == name),
            &links,
        )?;

        let shared = Shared {
            legs,
            links,
            paths: Arc::default(),
            table: Arc::new(FlowTable::new(steering.flows().clone())),
            metrics: Metrics::default(),
            conduits: ConduitPool::new(pipes),
            connect_timeout: options.connect_timeout,
            collector: Collector {
                epoch: tokio::time::Instant::now(),
                interval: options.gc_interval,
                lifetime: options.pending_lifetime,
            },
            idle_timeout: (!options.idle_timeout.is_zero()).then_some(options.idle_timeout),
            stop: CancellationToken::new(),
        };
        Ok(Self {
            steering,
            routes,
            _instance: instance,
            _rate_control: rate_control,
            listeners: Arc::new(listeners),
            intercepted,
            limit,
            changes,
            keeper,
            shared: Arc::new(shared),
            flows: TaskTracker::new(),
            accepting: CancellationToken::new(),
            attendants: JoinSet::new(),
        })
    }

    /// Accepts and looks after things until `stop`.
    async fn serve(&mut self, stop: impl Future<Output = ()>) {
        let accept = accept(self.listeners.clone(), self.shared.clone(), self.flows.clone());
        self.attend(accept);
        let links: Vec<_> = self.shared.links.iter().cloned().collect();
        for link in links {
            self.attend(async move { link.budget.keep().await });
        }
        let mut stop = pin!(stop);
        let mut rounds = interval(keeper::ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut stop => return,
                _ = rounds.tick() => self.keeper.round(&mut self.steering, &self.shared),
                () = self.changes.next() => self.adapt().await,
                Some(Err(error)) = self.attendants.join_next() => if let Ok(panic) = error.try_into_panic() {
                    resume_unwind(panic);
                },
            }
        }
    }

    /// Runs what all flows need beside what this task does itself. A daemon that no longer accepts, but shows that it is
    /// alive, would swallow every new connection: so a panic there is the daemon's own, whose death lets them pass.
    fn attend(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        let task = self.accepting.clone().run_until_cancelled_owned(task);
        self.attendants.spawn(async move {
            task.await;
        });
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

    /// Lets open flows come to their end, and ends at `deadline` those that have not.
    async fn drain(&mut self, deadline: Duration) {
        self.steering.close();
        self.flows.close();
        let drained = async {
            // Handshakes that were under way when new connections began to pass are still accepted.
            let _ = timeout(HANDSHAKES, async {
                while self.shared.table.pending() > 0 {
                    sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
            self.flows.wait().await;
        };
        if timeout(deadline, drained).await.is_err() {
            info!(
                flows = self.shared.table.count(),
                "resetting the flows that are still open"
            );
            self.shared.stop.cancel();
            let _ = timeout(Duration::from_secs(2), self.flows.wait()).await;
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
            .map(|reason| (reason.to_string().replace(' ', "_"), metrics.closed(*reason)));
        info!(up, down, "flows: {}", counts(events.chain(closed).collect()));
        info!("packets: {}", counts(kernel.collect()));
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

/// Works out what follows from every `--link`, and shows it.
fn link_profiles(
    options: &Options,
    interfaces: &Interfaces,
) -> Result<(Vec<LinkProfile>, Option<RateControl>)> {
    let (profiles, rate_control) = explain(options)?;
    for profile in &profiles {
        let name = &profile.interface;
        if !interfaces.values().any(|interface| interface == name) {
            bail!("--link {name}: there is no interface of that name");
        }
        preflight::check_congestion(&profile.congestion.value)?;
        info!("legs that leave through {name}:\n{profile}");
    }
    Ok((profiles, rate_control))
}

/// The profiles that follow from the command line, and the congestion control that was registered for them, which has to
/// be kept for as long as they are used.
///
/// # Errors
/// For two links behind one interface, and for more links than the kernel side has room for.
pub fn explain(options: &Options) -> Result<(Vec<LinkProfile>, Option<RateControl>)> {
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
        return Ok((Vec::new(), None));
    }
    let rate_control = RateControl::register();
    let congestion = match &rate_control {
        Ok(rate_control) => rate_control.name.as_str(),
        Err(error) => {
            let best = preflight::best_congestion();
            warn!(
                "legs of links use {best}, since pepsal's own congestion control is not to be had: {error:#}"
            );
            best
        }
    };
    let profile = |spec| LinkProfile::derive(spec, congestion, options.connect_timeout);
    Ok((options.links.iter().map(profile).collect(), rate_control.ok()))
}

/// Accepts for as long as it is polled.
async fn accept(listeners: Arc<Listeners>, shared: Arc<Shared>, flows: TaskTracker) {
    let accepting = listeners.pairs.iter().flat_map(Pair::iter);
    join_all(accepting.map(|listener| accept_from(listener, &shared, &flows))).await;
}

async fn accept_from(listener: &TcpListener, shared: &Arc<Shared>, flows: &TaskTracker) {
    let own = listener.local_addr().ok();
    let mut pause = Duration::from_millis(5);
    loop {
        match listener
            .accept()
            .await
            .and_then(|(stream, client)| Ok((stream.local_addr()?, stream, client)))
        {
            Ok((server, stream, _)) if Some(server) == own => {
                shared.metrics.count(Event::DirectRefused);
                refuse(&stream);
            }
            Ok((server, stream, client)) => {
                pause = Duration::from_millis(5);
                flows.spawn(flow::serve(stream, client, server, shared.clone()));
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

fn refuse(stream: &TcpStream) {
    // Dropped right after, it is closed one way or the other.
    let _ = socket::reset_on_close(stream.as_fd(), true);
}

fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
