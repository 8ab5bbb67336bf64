//! Messages of the admin socket: one JSON object per line, a [`Reply`] to every [`Request`].
//!
//! `docs/admin-protocol.md` is the reference. Objects may get new members, which clients ignore. Any other
//! change needs a new [`VERSION`].

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

pub const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    pub version: u32,
    #[serde(flatten)]
    pub question: Question,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Question {
    Status,
    Flows(FlowsQuestion),
    /// The subscribers that have flows at present.
    Clients(ClientsQuestion),
    Close {
        /// Flow number, client address, or client address and port.
        flow: String,
    },
}

/// Conditions and order of the listed flows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowsQuestion {
    /// Prefix of the client.
    pub client: Option<String>,
    /// Prefix of the server.
    pub server: Option<String>,
    pub port: Option<u16>,
    /// Interface of one of the legs.
    pub interface: Option<String>,
    pub state: Option<FlowState>,
    pub sort: Sort,
    /// Maximum number of flows; 0 is all.
    pub limit: usize,
    /// Time over which rates are measured, in milliseconds, which delays the reply; 0 is each flow's
    /// lifetime.
    pub interval_ms: u64,
}

/// Sort key of flows, in descending order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// Time since accept
    #[default]
    Age,
    /// Bytes of both directions
    Bytes,
    /// Rate of both directions
    Rate,
    /// Longer smoothed round-trip time of the two legs
    Rtt,
    /// Retransmitted segments of both legs
    Retransmits,
}

impl Sort {
    /// Returns the sort key of a flow.
    pub fn key(self, flow: &FlowStatus) -> f64 {
        let legs = || [&flow.legs.client, &flow.legs.server].into_iter().flatten();
        match self {
            Self::Age => flow.age_seconds,
            Self::Bytes => (flow.bytes.up + flow.bytes.down) as f64,
            Self::Rate => flow.bytes_per_second.up + flow.bytes_per_second.down,
            Self::Rtt => legs().filter_map(|leg| leg.rtt_seconds).fold(0.0, f64::max),
            Self::Retransmits => legs().map(|leg| f64::from(leg.retransmitted_segments)).sum(),
        }
    }
}

/// Which subscribers are asked for, and which of their flows count.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientsQuestion {
    /// Only flows whose client is in this prefix.
    pub client: Option<String>,
    /// Only flows whose server is in this prefix.
    pub server: Option<String>,
    /// Only flows to this port of the server.
    pub port: Option<u16>,
    /// Only flows that have a leg behind this interface.
    pub interface: Option<String>,
    /// Only flows in this state.
    pub state: Option<FlowState>,
    /// Order of the list.
    pub sort: ClientSort,
    /// Maximum number of subscribers in the list; 0 for all.
    pub limit: usize,
    /// Time over which rates are measured, and which the answer takes, in milliseconds; 0 is each flow's life so far.
    pub interval_ms: u64,
}

impl ClientsQuestion {
    /// Returns the question for the flows that count.
    pub fn flows(&self) -> FlowsQuestion {
        FlowsQuestion {
            client: self.client.clone(),
            server: self.server.clone(),
            port: self.port,
            interface: self.interface.clone(),
            state: self.state,
            sort: Sort::Age,
            limit: 0,
            interval_ms: self.interval_ms,
        }
    }
}

/// An order of subscribers: descending by this.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ClientSort {
    /// Rate both ways
    #[default]
    Rate,
    /// Flows, pending ones included
    Flows,
    /// Bytes both ways
    Bytes,
    /// Longer of the two sides' mean smoothed round trips
    Rtt,
    /// Segments that legs of either side sent again
    Retransmits,
}

impl ClientSort {
    /// Returns the figure that a subscriber is sorted by.
    pub fn key(self, client: &ClientStatus) -> f64 {
        let sides = [&client.legs.client, &client.legs.server];
        match self {
            Self::Rate => client.bytes_per_second.up + client.bytes_per_second.down,
            Self::Flows => (client.flows.open + client.flows.pending) as f64,
            Self::Bytes => (client.bytes.up + client.bytes.down) as f64,
            Self::Rtt => sides
                .iter()
                .filter_map(|side| side.rtt_seconds)
                .fold(0.0, f64::max),
            Self::Retransmits => sides.iter().map(|side| side.retransmitted_segments as f64).sum(),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    pub version: u32,
    #[serde(flatten)]
    pub answer: Answer,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Status(Box<Status>),
    Flows(Flows),
    /// To [`Question::Clients`].
    Clients(Clients),
    /// Reply to [`Question::Close`]: the flows that are reset.
    Closed(Vec<Ends>),
    /// One line with the error of the request.
    Error(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: f64,
    /// Whether new connections are intercepted; false while the daemon stops.
    pub ready: bool,
    /// Reasons why connections are not intercepted, one line each.
    pub problems: Vec<String>,
    pub port: u16,
    /// Packet mark of server legs' packets, as value/mask.
    pub mark: String,
    /// Host ends of the legs' device pairs.
    pub devices: Vec<String>,
    pub interfaces: Vec<Interface>,
    pub links: Vec<LinkStatus>,
    pub flows: FlowCounts,
    /// Since the start.
    pub bytes: Ways<u64>,
    pub closed: BTreeMap<String, u64>,
    /// Counters of [`crate::flow::metrics::Event`].
    pub events: BTreeMap<String, u64>,
    /// Packets by verdict of the eBPF programs.
    pub packets: BTreeMap<String, u64>,
}

/// An interface with an attached program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    /// Whether new connections are intercepted; else only segments of legs are redirected.
    pub intercepts: bool,
    /// `tcx` or `clsact`.
    pub attached_by: String,
}

/// A link with a profile, and its utilization.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkStatus {
    pub interface: String,
    pub rtt_seconds: f64,
    /// Estimated rate, in payload bytes per second.
    pub rate_bytes_per_second: u64,
    /// Configured maximum of that rate.
    pub ceiling_bytes_per_second: u64,
    /// Queueing delay in front of the link.
    pub queueing_delay_seconds: f64,
    /// State of the estimate: `at_ceiling`, `holding`, `growing`, `draining`, `competing` or `outage`.
    pub state: String,
    /// Acknowledged rate.
    pub throughput_bytes_per_second: f64,
    pub congestion: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowCounts {
    pub open: usize,
    pub pending: usize,
    pub limit: u32,
    /// The most at once of one subscriber; 0 for no bound.
    #[serde(default)]
    pub limit_per_client: u32,
}

/// A value for each direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Ways<T> {
    /// From the client to the server.
    pub up: T,
    /// From the server to the client.
    pub down: T,
}

/// Reply to a list of flows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Flows {
    pub total: usize,
    pub list: Vec<FlowStatus>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowStatus {
    pub id: u64,
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub state: FlowState,
    pub age_seconds: f64,
    /// Since the last byte.
    pub idle_seconds: f64,
    pub bytes: Ways<u64>,
    /// Over the requested interval.
    pub bytes_per_second: Ways<f64>,
    /// Limit of each direction; none without data.
    pub limited: Ways<Option<Limit>>,
    pub legs: Legs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FlowState {
    /// The server leg is not connected yet
    Pending,
    /// Both legs are connected
    Open,
}

/// The leg that limits a direction, and the cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub leg: LegName,
    pub by: LimitedBy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LegName {
    Client,
    Server,
}

/// Cause of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitedBy {
    /// The peer that sends, or the path from it: no data wait here.
    Sender,
    /// The receive window of the peer is full.
    Receiver,
    /// The send buffer of this host is full.
    SendBuffer,
    /// The leg uses its share of the link's rate.
    Share,
    /// The congestion window is full.
    Path,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Legs {
    pub client: Option<LegStatus>,
    pub server: Option<LegStatus>,
}

/// Figures of a leg, from the kernel's `TCP_INFO`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LegStatus {
    /// Local address, which is that of the flow's other end unless the source is the gateway.
    pub local: Option<SocketAddr>,
    pub peer: Option<SocketAddr>,
    /// Interface of the leg at the start of the flow.
    pub interface: Option<String>,
    /// TCP state, as `ss` names it.
    pub state: String,
    pub congestion: Option<String>,
    /// Smoothed; none before a measurement.
    pub rtt_seconds: Option<f64>,
    /// Minimum; none before a measurement.
    pub rtt_min_seconds: Option<f64>,
    pub mss_bytes: u32,
    pub cwnd_segments: u32,
    pub unacknowledged_segments: u32,
    pub unsent_bytes: u32,
    /// Data segments, including retransmissions.
    pub sent_segments: u32,
    pub retransmitted_segments: u32,
    pub delivery_rate_bytes_per_second: u64,
    /// Share of the link; none without a limit.
    pub pacing_limit_bytes_per_second: Option<u64>,
    /// Receive window of the peer.
    pub send_window_bytes: u32,
    /// Time with data to send or to be acknowledged.
    pub busy_seconds: f64,
    /// Part of `busy_seconds` that the peer's receive window limited.
    pub receiver_limited_seconds: f64,
    /// Part of `busy_seconds` that the send buffer limited.
    pub send_buffer_limited_seconds: f64,
}

/// Subscribers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Clients {
    /// How many have flows that count.
    pub total: usize,
    /// Those that were asked for.
    pub list: Vec<ClientStatus>,
}

/// A subscriber: the sums over its flows that are open or pending at present.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClientStatus {
    /// The client's IPv4 address, or the /64 of its IPv6 address.
    pub client: String,
    /// Its flows.
    pub flows: ClientFlows,
    /// Bytes that these have carried.
    pub bytes: Ways<u64>,
    /// Their rate, over the time that was asked for.
    pub bytes_per_second: Ways<f64>,
    /// Their legs.
    pub legs: ClientLegs,
}

/// A subscriber's flows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientFlows {
    /// Both legs are connected.
    pub open: usize,
    /// The server has not answered yet.
    pub pending: usize,
}

/// A subscriber's legs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ClientLegs {
    /// The accepted ones.
    pub client: SideStatus,
    /// The connected ones.
    pub server: SideStatus,
}

/// A subscriber's legs of one side.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SideStatus {
    /// How many there are.
    pub open: usize,
    /// Mean of their smoothed round trips; none before a measurement.
    pub rtt_seconds: Option<f64>,
    /// Shortest round trip of any of them; none before a measurement.
    pub rtt_min_seconds: Option<f64>,
    /// Segments with data that they sent, retransmissions included.
    pub sent_segments: u64,
    /// Segments that they sent again.
    pub retransmitted_segments: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ends {
    pub id: u64,
    pub client: SocketAddr,
    pub server: SocketAddr,
}
