//! The admin socket: a client with access can see and reset every flow.

use std::{
    collections::HashMap,
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use ipnet::IpNet;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, split},
    task::spawn_blocking,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info, warn};

use crate::{
    flow::table::{Flow, State},
    observe::{
        connections::{self, Listener, Stream},
        protocol::{
            Answer, Clients, ClientsQuestion, Ends, FlowState, FlowStatus, Flows, FlowsQuestion, Question,
            Reply, Request, Status, VERSION, Ways,
        },
        snapshot::Snapshots,
        socket_file::SocketFile,
        view::View,
    },
};

/// Default path of the admin socket.
pub(crate) const DEFAULT_PATH: &str = "/run/pepsal/pepsal.sock";

const CONNECTIONS_MAX: usize = 16;

/// Maximum length of a request, in bytes.
const REQUEST_MAX: u64 = 4096;

/// Timeout of a connection without a request.
const IDLE: Duration = Duration::from_secs(300);

/// Timeout of writing a reply.
const SLOWEST_READER: Duration = Duration::from_secs(10);

/// Maximum time over which rates are measured.
const INTERVAL_MAX: Duration = Duration::from_secs(10);

/// Listens at `path`, by default at [`DEFAULT_PATH`], whose directory it creates. `none` disables the socket.
///
/// # Errors
/// When another daemon listens there, or when `path` cannot be bound.
pub(crate) fn bind(path: Option<&Path>) -> Result<Option<(Listener, SocketFile)>> {
    let Some(asked) = path else {
        let usual = Path::new(DEFAULT_PATH);
        if let Err(error) = make_directory(usual) {
            warn!("no admin socket: cannot create {DEFAULT_PATH}: {error}");
            return Ok(None);
        }
        return Listener::at(usual.to_owned())
            .context("admin socket (--admin-socket)")
            .map(Some);
    };
    if asked == Path::new("none") {
        return Ok(None);
    }
    Listener::at(asked.to_owned())
        .context("admin socket (--admin-socket)")
        .map(Some)
}

fn make_directory(socket: &Path) -> io::Result<()> {
    match socket.parent() {
        Some(directory) if !directory.exists() => {
            fs::create_dir(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
        }
        _ => Ok(()),
    }
}

/// Serves requests; never returns.
pub(crate) async fn serve(listener: Listener, snapshots: Arc<Snapshots>) {
    connections::receive(listener, CONNECTIONS_MAX, |stream| {
        let snapshots = snapshots.clone();
        async move {
            if let Err(error) = serve_connection(stream, &snapshots).await {
                debug!("admin socket: {error}");
            }
        }
    })
    .await;
}

/// Replies to each line by a line, until the end of stream, a line that is too long, or a timeout.
async fn serve_connection(stream: Box<dyn Stream>, snapshots: &Snapshots) -> io::Result<()> {
    let (read, mut write) = split(stream);
    let mut read = BufReader::new(read);
    loop {
        let line = match timeout(IDLE, read_line(&mut read)).await?? {
            Line::End => return Ok(()),
            Line::TooLong => None,
            Line::Complete(line) => Some(line),
        };
        let is_last = line.is_none();
        let answer = match line {
            Some(line) => answer(&line, snapshots).await,
            None => Answer::Error(format!("the request is longer than {REQUEST_MAX} bytes")),
        };
        let reply = Reply {
            version: VERSION,
            answer,
        };
        let mut bytes = serde_json::to_vec(&reply)?;
        bytes.push(b'\n');
        timeout(SLOWEST_READER, write.write_all(&bytes)).await??;
        if is_last {
            return Ok(());
        }
    }
}

enum Line {
    Complete(Vec<u8>),
    TooLong,
    End,
}

async fn read_line(read: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Line> {
    let mut line = Vec::new();
    read.take(REQUEST_MAX + 1).read_until(b'\n', &mut line).await?;
    Ok(match line.last() {
        None => Line::End,
        Some(b'\n') => Line::Complete(line),
        Some(_) if line.len() as u64 > REQUEST_MAX => Line::TooLong,
        // The client closed the connection within a line.
        Some(_) => Line::End,
    })
}

async fn answer(line: &[u8], snapshots: &Snapshots) -> Answer {
    let view = &snapshots.view;
    let answered = match Asked::parse(line) {
        Err(refusal) => Err(refusal),
        Ok(Asked::Status) => status(snapshots).await.map(Answer::Status),
        Ok(Asked::Flows(question, filter)) => flows(question, filter, view).await.map(Answer::Flows),
        Ok(Asked::Clients(question, filter)) => clients(question, filter, view).await.map(Answer::Clients),
        Ok(Asked::Close(target)) => close(&target, view).map(Answer::Closed),
    };
    answered.unwrap_or_else(Answer::Error)
}

/// A valid request.
#[derive(Debug)]
pub enum Asked {
    /// Status of the daemon.
    Status,
    /// The flows that match a filter.
    Flows(FlowsQuestion, Filter),
    /// The subscribers with flows that match a filter.
    Clients(ClientsQuestion, Filter),
    /// Reset of the flows that match a target.
    Close(Target),
}

impl Asked {
    /// Parses a line.
    ///
    /// # Errors
    /// One line with the error.
    pub fn parse(line: &[u8]) -> Result<Self, String> {
        // The message repeats input, which may have control characters.
        Self::understand(line).map_err(|refusal| refusal.replace(char::is_control, " "))
    }

    fn understand(line: &[u8]) -> Result<Self, String> {
        let request: Request = serde_json::from_slice(line)
            .map_err(|error| format!("not a request of this protocol: {error}"))?;
        if request.version != VERSION {
            let version = request.version;
            return Err(format!(
                "protocol version {version} is not supported: use {VERSION}"
            ));
        }
        Ok(match request.question {
            Question::Status => Self::Status,
            Question::Flows(question) => {
                let filter = Filter::parse(&question)?;
                Self::Flows(question, filter)
            }
            Question::Clients(question) => {
                let filter = Filter::parse(&question.flows())?;
                Self::Clients(question, filter)
            }
            Question::Close { flow } => Self::Close(Target::parse(&flow)?),
        })
    }
}

async fn status(snapshots: &Snapshots) -> Result<Box<Status>, String> {
    let snapshot = snapshots.current().await.map_err(|error| format!("{error:#}"))?;
    Ok(Box::new(snapshot.status.clone()))
}

async fn flows(question: FlowsQuestion, filter: Filter, view: &Arc<View>) -> Result<Flows, String> {
    let before = match question.interval_ms {
        0 => None,
        ms => {
            let since = Instant::now();
            let carried = view.shared.table.snapshot().iter().map(carried).collect();
            sleep(Duration::from_millis(ms)).await;
            Some((since, carried))
        }
    };
    let view = view.clone();
    // Not on the relay threads: thousands of system calls.
    let look = move || look(&question, &filter, before.as_ref(), &view);
    spawn_blocking(look)
        .await
        .map_err(|_| "cannot list the flows".to_owned())
}

async fn clients(question: ClientsQuestion, filter: Filter, view: &Arc<View>) -> Result<Clients, String> {
    let flows = flows(question.flows(), filter, view).await?;
    Ok(Clients::of(&flows.list, question.sort, question.limit))
}

/// Bytes of flows at the start of a rate measurement, by flow number.
type Carried = HashMap<u64, Ways<u64>>;

fn carried(flow: &Arc<Flow>) -> (u64, Ways<u64>) {
    use std::sync::atomic::Ordering::Relaxed;
    let (up, down) = (flow.progress.up.load(Relaxed), flow.progress.down.load(Relaxed));
    (flow.id, Ways { up, down })
}

fn look(
    question: &FlowsQuestion,
    filter: &Filter,
    before: Option<&(Instant, Carried)>,
    view: &View,
) -> Flows {
    let table = view.shared.table.snapshot();
    let status = |flow: &Arc<Flow>| {
        let mut status = FlowStatus::of(flow, &view.shared.metrics);
        if let Some((since, carried)) = before {
            let since = (*since).max(flow.progress.started());
            let before = carried.get(&flow.id).copied().unwrap_or_default();
            status.bytes_per_second = status.bytes.over(before, since.elapsed());
        }
        status
    };
    let wanted = table.iter().filter(|flow| filter.takes(flow));
    let mut list: Vec<FlowStatus> = wanted
        .map(status)
        .filter(|status| filter.takes_legs(status))
        .collect();
    list.sort_by(|a, b| question.sort.key(b).total_cmp(&question.sort.key(a)));
    if question.limit > 0 {
        list.truncate(question.limit);
    }
    Flows {
        total: table.len(),
        list,
    }
}

/// Conditions that a shown flow meets.
#[derive(Debug)]
pub struct Filter {
    client: Option<IpNet>,
    server: Option<IpNet>,
    port: Option<u16>,
    state: Option<State>,
    interface: Option<String>,
}

impl Filter {
    /// Returns the filter of a question whose interval is one that may be asked for.
    fn parse(question: &FlowsQuestion) -> Result<Self, String> {
        let (ms, most) = (question.interval_ms, INTERVAL_MAX.as_millis());
        if u128::from(ms) > most {
            return Err(format!("interval_ms {ms} is more than {most}"));
        }
        Ok(Self {
            client: question.client.as_deref().map(prefix).transpose()?,
            server: question.server.as_deref().map(prefix).transpose()?,
            port: question.port,
            state: question.state.map(|state| match state {
                FlowState::Pending => State::Pending,
                FlowState::Open => State::Open,
            }),
            interface: question.interface.clone(),
        })
    }

    fn takes(&self, flow: &Flow) -> bool {
        self.client.is_none_or(|net| net.contains(&flow.client.ip()))
            && self.server.is_none_or(|net| net.contains(&flow.server.ip()))
            && self.port.is_none_or(|port| port == flow.server.port())
            && self.state.is_none_or(|state| state == flow.state())
    }

    fn takes_legs(&self, flow: &FlowStatus) -> bool {
        let Some(wanted) = &self.interface else {
            return true;
        };
        let mut legs = [&flow.legs.client, &flow.legs.server].into_iter().flatten();
        legs.any(|leg| leg.interface.as_ref() == Some(wanted))
    }
}

fn prefix(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| format!("'{text}' is neither an address nor a prefix"))
}

/// The flows to reset.
#[derive(Debug, PartialEq, Eq)]
pub enum Target {
    /// The flow of this number.
    Id(u64),
    /// All flows of a client.
    Client(IpAddr),
    /// The flows of a client's address and port.
    ClientPort(SocketAddr),
}

impl Target {
    fn parse(text: &str) -> Result<Self, String> {
        let id = text.parse().map(Self::Id).ok();
        id.or_else(|| text.parse().map(Self::ClientPort).ok())
            .or_else(|| text.parse().map(Self::Client).ok())
            .ok_or_else(|| {
                format!(
                    "'{text}' is no flow: give a flow number, a client address, or a client address and port"
                )
            })
    }

    fn is(&self, flow: &Flow) -> bool {
        match self {
            Self::Id(id) => flow.id == *id,
            Self::Client(address) => flow.client.ip() == *address,
            Self::ClientPort(address) => flow.client == *address,
        }
    }
}

fn close(target: &Target, view: &View) -> Result<Vec<Ends>, String> {
    let flows = view.shared.table.snapshot();
    let closed: Vec<Ends> = flows
        .iter()
        .filter(|flow| target.is(flow))
        .map(|flow| {
            flow.close();
            info!(client = %flow.client, server = %flow.server, "closed by the operator");
            Ends {
                id: flow.id,
                client: flow.client,
                server: flow.server,
            }
        })
        .collect();
    match closed.is_empty() {
        true => Err(format!("there is no flow {target}")),
        false => Ok(closed),
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Client(address) => address.fmt(f),
            Self::ClientPort(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_is_named_by_number_or_client() {
        assert_eq!(Target::parse("17"), Ok(Target::Id(17)));
        assert_eq!(
            Target::parse("[fd01::2]:80"),
            Ok(Target::ClientPort("[fd01::2]:80".parse().unwrap()))
        );
        assert_eq!(
            Target::parse("10.1.0.2"),
            Ok(Target::Client("10.1.0.2".parse().unwrap()))
        );
        assert!(Target::parse("lan0").unwrap_err().contains("'lan0' is no flow"));
    }

    #[tokio::test]
    async fn a_line_is_complete_or_too_long_or_not_there() {
        let long = vec![b'x'; 5000];
        assert!(matches!(
            read_line(&mut &b"{}\n"[..]).await.unwrap(),
            Line::Complete(_)
        ));
        assert!(matches!(read_line(&mut &b"{}"[..]).await.unwrap(), Line::End));
        assert!(matches!(read_line(&mut &b""[..]).await.unwrap(), Line::End));
        assert!(matches!(read_line(&mut &long[..]).await.unwrap(), Line::TooLong));
    }
}
