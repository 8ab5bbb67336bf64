//! What is said over the admin socket: one JSON object a line, a [`Reply`] to every [`Request`].
//!
//! `docs/admin-protocol.md` describes it for others. Members may be added to any object; who reads them ignores those that
//! he does not know. Anything else is a new [`VERSION`].

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// The version of this protocol.
pub const VERSION: u32 = 1;

/// A line to the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub question: Question,
}

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Question {
    /// How the daemon is.
    Status,
    /// The flows at present.
    Flows(FlowsQuestion),
    /// Ends flows.
    Close {
        /// Which: an id, a client's address, or its address and port.
        flow: String,
    },
}

/// Which flows are asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowsQuestion {
    /// Only those whose client is in this prefix.
    pub client: Option<String>,
    /// Only those whose server is in this prefix.
    pub server: Option<String>,
    /// Only those to this port of the server.
    pub port: Option<u16>,
    /// Only those that have a leg behind this interface.
    pub interface: Option<String>,
    /// Only those in this state.
    pub state: Option<FlowState>,
    /// What comes first.
    pub sort: Sort,
    /// At most so many of them; 0 is all.
    pub limit: usize,
    /// Time over which rates are measured, and which the answer takes, in milliseconds; 0 is the flow's life so far.
    pub interval_ms: u64,
}

/// An order of flows: those that have most of it come first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// Time since it was accepted
    #[default]
    Age,
    /// Bytes both ways
    Bytes,
    /// Rate both ways
    Rate,
    /// Longest smoothed round trip of the two legs
    Rtt,
    /// Segments that either leg sent again
    Retransmits,
}

impl Sort {
    /// How much of it a flow has.
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

/// A line from the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`].
    pub version: u32,
    /// What is answered.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Question::Status`].
    Status(Box<Status>),
    /// To [`Question::Flows`].
    Flows(Flows),
    /// To [`Question::Close`]: those that were told to end.
    Closed(Vec<Ends>),
    /// One line: what is wrong with the request.
    Error(String),
}

/// How the daemon is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it was started.
    pub uptime_seconds: f64,
    /// Whether it takes new connections; not when it is stopping.
    pub ready: bool,
    /// Reasons why connections are not intercepted, one line each.
    pub problems: Vec<String>,
    /// Port of the listeners.
    pub port: u16,
    /// The mark of server legs' packets on their way into an interface's ingress, as value/mask.
    pub mark: String,
    /// The host ends of the legs' device pairs.
    pub devices: Vec<String>,
    /// Where programs are attached.
    pub interfaces: Vec<Interface>,
    /// The links that are described.
    pub links: Vec<LinkStatus>,
    /// Flows at present.
    pub flows: FlowCounts,
    /// Bytes relayed since the start.
    pub bytes: Ways<u64>,
    /// How many flows ended, by why they did.
    pub closed: BTreeMap<String, u64>,
    /// What happened to connections besides their end.
    pub events: BTreeMap<String, u64>,
    /// What the eBPF programs decided of packets.
    pub packets: BTreeMap<String, u64>,
}

/// An interface that a program is attached to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether new connections are intercepted there, or only legs' segments recognised.
    pub intercepts: bool,
    /// How the program is attached: `tcx` or `clsact`.
    pub attached_by: String,
}

/// A link that is described, and how it is used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkStatus {
    /// The interface that it is behind.
    pub interface: String,
    /// Its round trip as described, in seconds.
    pub rtt_seconds: f64,
    /// What its legs share at present, in bytes of payload a second: what it was found to carry.
    pub rate_bytes_per_second: u64,
    /// What they share at most.
    pub ceiling_bytes_per_second: u64,
    /// How long what they send waits in front of it, in seconds.
    pub queueing_delay_seconds: f64,
    /// What was found last: `at_ceiling`, `holding`, `growing`, `draining`, `competing` or `outage`.
    pub state: String,
    /// What they use of that.
    pub throughput_bytes_per_second: f64,
    /// Their congestion control.
    pub congestion: String,
}

/// How many flows there are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowCounts {
    /// Both legs are connected.
    pub open: usize,
    /// The server has not answered yet.
    pub pending: usize,
    /// The most at once.
    pub limit: u32,
}

/// Something for each way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Ways<T> {
    /// From the client to the server.
    pub up: T,
    /// From the server to the client.
    pub down: T,
}

/// Flows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Flows {
    /// How many there are, whether they were asked for or not.
    pub total: usize,
    /// Those that were asked for.
    pub list: Vec<FlowStatus>,
}

/// A flow.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowStatus {
    /// Its number.
    pub id: u64,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The original destination.
    pub server: SocketAddr,
    /// How far it has come.
    pub state: FlowState,
    /// Seconds since it was accepted.
    pub age_seconds: f64,
    /// Seconds since it carried a byte.
    pub idle_seconds: f64,
    /// What it has carried.
    pub bytes: Ways<u64>,
    /// What it carries, over the time that was asked for.
    pub bytes_per_second: Ways<f64>,
    /// What keeps it from carrying more; nothing when there is nothing to carry.
    pub limited: Ways<Option<Limit>>,
    /// Its connections.
    pub legs: Legs,
}

/// How far a flow has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum FlowState {
    /// The server has not answered yet
    Pending,
    /// Both legs are connected
    Open,
}

/// Which leg keeps a way from carrying more, and by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// `client` or `server`.
    pub leg: LegName,
    /// What about it.
    pub by: LimitedBy,
}

/// A leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LegName {
    /// The accepted connection.
    Client,
    /// The connected one.
    Server,
}

/// What limits a leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitedBy {
    /// The sender at its other end, or the path from there: nothing waits here.
    Sender,
    /// The receiver at its other end: its window is full.
    Receiver,
    /// This host's send buffer.
    SendBuffer,
    /// Its share of its link's rate, which it uses.
    Share,
    /// The path to its other end: the congestion window.
    Path,
}

/// A flow's connections.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Legs {
    /// The accepted one.
    pub client: Option<LegStatus>,
    /// The connected one.
    pub server: Option<LegStatus>,
}

/// A leg, by the kernel's `TCP_INFO`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LegStatus {
    /// This host's address of it, which may be the other end's.
    pub local: Option<SocketAddr>,
    /// The other end's address.
    pub peer: Option<SocketAddr>,
    /// The interface that it leaves through, as found when the flow began.
    pub interface: Option<String>,
    /// The connection's state, as `ss` names it.
    pub state: String,
    /// The congestion control.
    pub congestion: Option<String>,
    /// Smoothed round trip; nothing before a measurement.
    pub rtt_seconds: Option<f64>,
    /// Shortest round trip; nothing before a measurement.
    pub rtt_min_seconds: Option<f64>,
    /// Size of a full segment's payload.
    pub mss_bytes: u32,
    /// Congestion window.
    pub cwnd_segments: u32,
    /// Segments sent and not acknowledged.
    pub unacknowledged_segments: u32,
    /// Bytes that wait for being sent.
    pub unsent_bytes: u32,
    /// Segments with data that were sent, retransmissions included.
    pub sent_segments: u32,
    /// Segments that were sent again.
    pub retransmitted_segments: u32,
    /// What was last delivered.
    pub delivery_rate_bytes_per_second: u64,
    /// What it is allowed to send; nothing for no bound.
    pub pacing_limit_bytes_per_second: Option<u64>,
    /// The other end's receive window.
    pub send_window_bytes: u32,
    /// Time with data to send or to be acknowledged.
    pub busy_seconds: f64,
    /// Of that, time limited by the other end's receive window.
    pub receiver_limited_seconds: f64,
    /// Of that, time limited by this host's send buffer.
    pub send_buffer_limited_seconds: f64,
}

/// The two ends of a flow.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ends {
    /// Its number.
    pub id: u64,
    /// The client's address and port.
    pub client: SocketAddr,
    /// The original destination.
    pub server: SocketAddr,
}
