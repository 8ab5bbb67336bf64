//! The metrics in the text format of OpenMetrics. `docs/metrics.md` has every name, unit and meaning.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use pepsal_ebpf::Counter;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, histogram::Histogram},
    registry::Registry,
};

use crate::{
    flow::{
        close_reason::CloseReason,
        metrics::Event,
        table::{LegObservation, State},
    },
    link::{budget::Found, controller::State as LinkState},
    observe::{log, process::Process, subscribers::Totals, view::View},
};

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The figures of the daemon at one moment.
pub(super) struct Figures {
    started: SystemTime,
    limit: u32,
    limit_per_client: u32,
    pub(super) pending: usize,
    pub(super) open: usize,
    subscribers: Totals,
    map_entries: u64,
    process: Process,
    lines_suppressed: u64,
    pub(super) bytes: [u64; 2],
    pub(super) closed: Vec<(String, u64)>,
    pub(super) events: Vec<(&'static str, u64)>,
    pub(super) packets: Vec<(&'static str, u64)>,
    connect: Histogram,
    duration: Histogram,
    intercepted: Vec<(String, bool)>,
    interfaces: BTreeMap<String, InterfaceFigures>,
    links: Vec<LinkFigures>,
}

/// Figures of the legs of an interface.
#[derive(Default)]
struct InterfaceFigures {
    legs: u64,
    sent: u64,
    received: u64,
    segments: u64,
    retransmitted: u64,
    /// In seconds, of every leg with a measurement.
    round_trips: Vec<f64>,
    delivery_rate: u64,
}

struct LinkFigures {
    interface: String,
    found: Found,
}

impl Figures {
    /// Reads all figures, by many system calls.
    pub(super) fn take(view: &View) -> Self {
        let shared = &view.shared;
        let metrics = &shared.metrics;
        let (mut pending, mut open) = (0, 0);
        let mut interfaces = BTreeMap::<String, InterfaceFigures>::new();
        let mut carried = Vec::new();
        for flow in shared.table.snapshot() {
            match flow.state() {
                State::Pending => pending += 1,
                State::Open => open += 1,
            }
            let seen = flow.observe(metrics);
            carried.push((flow.id, flow.client.ip(), seen.up + seen.down));
            // One flow at a time, so that no leg is kept open until all are read.
            for leg in seen.legs.into_iter().flatten() {
                if let Some(traffic) = &leg.traffic {
                    interfaces.entry(traffic.interface.clone()).or_default().add(&leg);
                }
            }
        }
        for traffic in metrics.interfaces() {
            let figures = interfaces.entry(traffic.interface.clone()).or_default();
            figures.sent = traffic.sent.load(Ordering::Relaxed);
            figures.received = traffic.received.load(Ordering::Relaxed);
            figures.segments = traffic.segments.load(Ordering::Relaxed);
            figures.retransmitted = traffic.retransmitted.load(Ordering::Relaxed);
        }
        let (up, down) = metrics.bytes();
        let attached = view.attached.get();
        let is_intercepted = |name: &String| attached.iter().any(|on| on.intercepts && on.interface == *name);
        let link = |link: &Arc<crate::link::registry::Link>| LinkFigures {
            interface: link.profile.interface.clone(),
            found: link.budget.found(),
        };
        Self {
            started: view.started,
            limit: view.limit,
            limit_per_client: view.limit_per_client,
            pending,
            open,
            subscribers: view.census.take(&carried),
            map_entries: shared.table.entries() as u64,
            process: Process::now(),
            lines_suppressed: log::suppressed(),
            bytes: [up, down],
            closed: CloseReason::ALL
                .iter()
                .map(|reason| (reason.name(), metrics.closed(*reason)))
                .collect(),
            events: Event::ALL
                .iter()
                .map(|event| (event.name(), metrics.events(*event)))
                .collect(),
            packets: Counter::ALL
                .iter()
                .map(|counter| (counter.name(), view.counters.count(*counter)))
                .collect(),
            connect: metrics.connect.clone(),
            duration: metrics.duration.clone(),
            intercepted: view
                .intercepted
                .iter()
                .map(|name| (name.clone(), is_intercepted(name)))
                .collect(),
            interfaces,
            links: shared.links.current().iter().map(link).collect(),
        }
    }

    /// Formats the metrics.
    ///
    /// # Errors
    /// None in practice.
    pub(super) fn render(self) -> Result<String> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(ProcessFigures {
            started: self.started,
            process: self.process,
        }));
        registry
            .sub_registry_with_prefix("pepsal")
            .register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl InterfaceFigures {
    fn add(&mut self, leg: &LegObservation) {
        self.legs += 1;
        if leg.info.tcpi_rtt > 0 {
            self.round_trips.push(f64::from(leg.info.tcpi_rtt) / 1e6);
        }
        // The last delivery rate of an idle leg is out of date. The kernel measures within a round trip,
        // where a burst exceeds the leg's share.
        if leg.info.tcpi_unacked > 0 {
            self.delivery_rate += leg.info.tcpi_delivery_rate.min(leg.info.tcpi_max_pacing_rate);
        }
    }

    fn mean_round_trip(&self) -> Option<f64> {
        let legs = self.round_trips.len();
        (legs > 0).then(|| self.round_trips.iter().sum::<f64>() / legs as f64)
    }
}

impl fmt::Debug for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Figures").finish_non_exhaustive()
    }
}

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Families(encoder);
        out.gauge(
            "build_info",
            "Version of the daemon; the value is always 1",
            &["version"],
            [([env!("CARGO_PKG_VERSION")], 1.0)],
        )?;
        self.encode_flows(&mut out)?;
        self.encode_log(&mut out)?;
        self.encode_steering(&mut out)?;
        self.encode_interfaces(&mut out)?;
        self.encode_links(&mut out)
    }
}

impl Figures {
    fn encode_flows(&self, out: &mut Families<'_>) -> fmt::Result {
        let single = |value: usize| [([], value as f64)];
        out.gauge(
            "flows_open",
            "Open flows: both legs are connected",
            &[],
            single(self.open),
        )?;
        out.gauge(
            "flows_pending",
            "Pending flows: the client leg is accepted, the server leg is not connected yet",
            &[],
            single(self.pending),
        )?;
        out.gauge(
            "flows_limit",
            "Maximum number of flows; further connections are not intercepted",
            &[],
            single(self.limit as usize),
        )?;
        out.gauge(
            "subscriber_flows_limit",
            "The most flows of one subscriber at once, 0 for no bound; further connections pass",
            &[],
            single(self.limit_per_client as usize),
        )?;
        out.gauge(
            "subscribers",
            "Subscribers (IPv4 addresses, IPv6 /64 prefixes) that have flows",
            &[],
            single(self.subscribers.subscribers),
        )?;
        out.gauge(
            "subscriber_flows_max",
            "Flows of the subscriber that has most",
            &[],
            single(self.subscribers.flows_max),
        )?;
        out.gauge(
            "subscriber_bytes_max_ratio",
            "Largest part of a subscriber in what was relayed since the look before, from 0 to 1",
            &[],
            [([], self.subscribers.bytes_max_ratio)],
        )?;
        let closed = self.closed.iter().map(|(reason, n)| ([reason.as_str()], *n));
        out.counter(
            "flows_closed",
            "Closed flows by close reason",
            &["reason"],
            closed,
        )?;
        let [up, down] = self.bytes;
        out.counter(
            "bytes",
            "Payload bytes relayed; up is from client to server",
            &["direction"],
            [(["up"], up), (["down"], down)],
        )?;
        out.histogram(
            "connect_duration_seconds",
            "Time from accept of the client leg until the server leg is connected, in seconds",
            &self.connect,
        )?;
        out.histogram(
            "flow_duration_seconds",
            "Time from accept of the client leg to the end of the flow, in seconds",
            &self.duration,
        )?;
        out.gauge(
            "flow_map_entries",
            "Entries of the kernel's flow map, including flows whose handshake is in progress",
            &[],
            single(self.map_entries as usize),
        )?;
        let events = self.events.iter().map(|(name, n)| ([*name], *n));
        out.counter(
            "events",
            "Events of connections, except their close",
            &["event"],
            events,
        )
    }

    fn encode_log(&self, out: &mut Families<'_>) -> fmt::Result {
        out.counter(
            "log_lines_suppressed",
            "Log lines dropped by the rate limit of the log",
            &[],
            [([], self.lines_suppressed)],
        )
    }

    fn encode_steering(&self, out: &mut Families<'_>) -> fmt::Result {
        let packets = self.packets.iter().map(|(name, n)| ([*name], *n));
        out.counter(
            "packets",
            "Packets by verdict of the eBPF programs",
            &["verdict"],
            packets,
        )?;
        let intercepted = self
            .intercepted
            .iter()
            .map(|(name, is)| ([name.as_str()], f64::from(u8::from(*is))));
        out.gauge(
            "interface_intercepted",
            "1 when new connections on an interface of -i are intercepted, else 0",
            &["interface"],
            intercepted,
        )
    }

    fn encode_interfaces(&self, out: &mut Families<'_>) -> fmt::Result {
        let interfaces = || {
            self.interfaces
                .iter()
                .map(|(name, figures)| (name.as_str(), figures))
        };
        let counter = |value: fn(&InterfaceFigures) -> u64| {
            interfaces().map(move |(name, figures)| ([name], value(figures)))
        };
        let gauge = |value: fn(&InterfaceFigures) -> f64| {
            interfaces().map(move |(name, figures)| ([name], value(figures)))
        };
        out.gauge(
            "link_legs_open",
            "Open legs that leave through the interface",
            &["interface"],
            gauge(|figures| figures.legs as f64),
        )?;
        let bytes = interfaces().flat_map(|(name, figures)| {
            [
                ([name, "sent"], figures.sent),
                ([name, "received"], figures.received),
            ]
        });
        out.counter(
            "link_bytes",
            "Payload bytes sent through the interface and received from it",
            &["interface", "direction"],
            bytes,
        )?;
        out.counter(
            "link_segments_sent",
            "Data segments sent through the interface, including retransmissions",
            &["interface"],
            counter(|figures| figures.segments),
        )?;
        out.counter(
            "link_segments_retransmitted",
            "Segments retransmitted through the interface",
            &["interface"],
            counter(|figures| figures.retransmitted),
        )?;
        let round_trips =
            interfaces().filter_map(|(name, figures)| Some(([name], figures.mean_round_trip()?)));
        out.gauge(
            "link_rtt_seconds",
            "Mean smoothed round-trip time of the open legs, in seconds",
            &["interface"],
            round_trips,
        )?;
        out.gauge(
            "link_delivery_rate_bytes_per_second",
            "Sum of the delivery rates of the legs that are sending, in bytes per second",
            &["interface"],
            gauge(|figures| figures.delivery_rate as f64),
        )
    }

    fn encode_links(&self, out: &mut Families<'_>) -> fmt::Result {
        let links = |value: fn(&LinkFigures) -> f64| {
            let figures = self.links.iter();
            figures.map(move |link| ([link.interface.as_str()], value(link)))
        };
        out.gauge(
            "link_rate_bytes_per_second",
            "Estimated rate of a link with a profile, which its legs share, in payload bytes per second",
            &["interface"],
            links(|link| link.found.rate as f64),
        )?;
        out.gauge(
            "link_rate_ceiling_bytes_per_second",
            "Configured maximum of the link's rate, in payload bytes per second",
            &["interface"],
            links(|link| link.found.ceiling as f64),
        )?;
        out.gauge(
            "link_utilization_ratio",
            "Acknowledged rate divided by the link's estimated rate, from 0 to 1",
            &["interface"],
            links(|link| link.found.used / link.found.rate.max(1) as f64),
        )?;
        out.gauge(
            "link_queueing_delay_seconds",
            "Queueing delay of the legs' segments in front of the link, in seconds",
            &["interface"],
            links(|link| link.found.queueing.as_secs_f64()),
        )?;
        let states = self.links.iter().flat_map(|link| {
            let value = |state: LinkState| f64::from(u8::from(state == link.found.state));
            LinkState::ALL.map(|state| ([link.interface.as_str(), state.name()], value(state)))
        });
        out.gauge(
            "link_state",
            "1 for the current state of the link's rate estimate, 0 for the others",
            &["interface", "state"],
            states,
        )
    }
}

/// The metrics of a process under their standard names, which Prometheus' client libraries share.
#[derive(Debug)]
struct ProcessFigures {
    started: SystemTime,
    process: Process,
}

impl Collector for ProcessFigures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Families(encoder);
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let count = |value: Option<u64>| value.map(|value| ([], value as f64));
        out.gauge(
            "process_start_time_seconds",
            "Start time of the process since the Unix epoch, in seconds",
            &[],
            [([], started.as_secs_f64())],
        )?;
        out.gauge(
            "process_resident_memory_bytes",
            "Resident memory of the process, without socket buffers, in bytes",
            &[],
            count(self.process.memory_bytes),
        )?;
        out.gauge(
            "process_open_fds",
            "Number of open file descriptors",
            &[],
            count(self.process.descriptors),
        )?;
        out.gauge(
            "process_max_fds",
            "Maximum number of open file descriptors",
            &[],
            count(self.process.descriptors_limit),
        )
    }
}

/// Writes metric families, each with all of its samples.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn gauge<'v, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str; N],
        samples: impl IntoIterator<Item = ([&'v str; N], f64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (values, value) in samples {
            if N == 0 {
                return ConstGauge::new(value).encode(family);
            }
            let labels: Vec<(&str, &str)> = labels.iter().copied().zip(values).collect();
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn counter<'v, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        labels: &[&str; N],
        samples: impl IntoIterator<Item = ([&'v str; N], u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (values, value) in samples {
            if N == 0 {
                return ConstCounter::new(value).encode(family);
            }
            let labels: Vec<(&str, &str)> = labels.iter().copied().zip(values).collect();
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        let family = self
            .0
            .encode_descriptor(name, help, None, MetricType::Histogram)?;
        histogram.encode(family)
    }
}
