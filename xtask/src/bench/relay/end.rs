//! Client and server of the measured connections, each in a separate process with its own limit of
//! descriptors.
//!
//! A request is a few lines, its response a header and 1 KiB. The server closes first if the request asks for
//! it, which keeps the client's ports free of TIME_WAIT.

use std::{
    io::stdin,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinSet,
    time::timeout,
};

use crate::bench::statistic;

/// Role of this process.
#[derive(Subcommand)]
pub enum End {
    /// Serves requests until its standard input ends.
    Server {
        /// Listen address.
        address: SocketAddr,
    },
    /// Executes commands from standard input, one JSON document per line, and replies in the same way.
    Client,
}

/// Commands to a client.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Opens connections, [`CONCURRENCY`] at a time, with one request each.
    Connect {
        /// Server address.
        server: SocketAddr,
        /// Duration.
        duration: Duration,
    },
    /// Opens `count` connections with one request each.
    ConnectTimes {
        /// Server address.
        server: SocketAddr,
        count: usize,
    },
    /// Keeps `flows` connections open, each after one request.
    Hold {
        /// Server address.
        server: SocketAddr,
        flows: usize,
    },
    /// Sends `count` requests over the open connections, [`CONCURRENCY`] at a time, in turn.
    Exchange { count: usize },
    /// Closes all open connections.
    Release,
}

/// Reply of a client.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Completed requests.
    pub requests: usize,
    /// Time from the first to the last of them.
    pub seconds: f64,
    /// Median and 99th percentile of the time from connect to the server's end of stream.
    pub p50_ms: f64,
    /// 99th percentile of that time.
    pub p99_ms: f64,
    /// Open connections.
    pub held: usize,
    /// Client address of one of them.
    pub local: Option<SocketAddr>,
    pub error: Option<String>,
}

/// Concurrent connections.
pub const CONCURRENCY: usize = 64;

/// Timeout of a request.
const PATIENCE: Duration = Duration::from_secs(20);

const CLOSE: &[u8] = b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n";
const KEEP: &[u8] = b"GET / HTTP/1.1\r\nHost: server\r\n\r\n";
const HEADER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 1024\r\n\r\n";
const BODY_BYTES: usize = 1024;
const ANSWER_BYTES: usize = HEADER.len() + BODY_BYTES;

impl End {
    /// Runs this end.
    pub fn run(&self) -> Result<ExitCode> {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let runtime = Runtime::new().context("cannot start the runtime")?;
        match self {
            Self::Server { address } => serve(&runtime, *address)?,
            Self::Client => obey(&runtime)?,
        }
        runtime.shutdown_background();
        Ok(ExitCode::SUCCESS)
    }
}

fn serve(runtime: &Runtime, address: SocketAddr) -> Result<()> {
    let listener = runtime
        .block_on(TcpListener::bind(address))
        .with_context(|| format!("cannot listen on {address}"))?;
    runtime.spawn(async move {
        // Accept fails for closed connections, and without free descriptors, which the client detects.
        loop {
            if let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        }
    });
    for line in stdin().lines() {
        line.context("cannot read standard input")?;
    }
    Ok(())
}

/// Serves the requests of a connection until either end closes it.
async fn answer(mut stream: TcpStream) -> Result<()> {
    let mut answer = [b'x'; ANSWER_BYTES];
    answer[..HEADER.len()].copy_from_slice(HEADER);
    let mut request = Vec::with_capacity(CLOSE.len());
    while stream.read_buf(&mut request).await? > 0 {
        if request.ends_with(b"\r\n\r\n") {
            stream.write_all(&answer).await?;
            if request == CLOSE {
                break;
            }
            request.clear();
        }
    }
    Ok(())
}

fn obey(runtime: &Runtime) -> Result<()> {
    let mut flows = Vec::new();
    for line in stdin().lines() {
        let order = serde_json::from_str(&line.context("cannot read standard input")?)?;
        let result = runtime.block_on(carry_out(order, &mut flows));
        let answer = result.unwrap_or_else(|error| Answer {
            error: Some(format!("{error:#}")),
            ..Answer::default()
        });
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

async fn carry_out(order: Order, flows: &mut Vec<TcpStream>) -> Result<Answer> {
    match order {
        Order::Connect { server, duration } => {
            connect(server, Amount::Until(Instant::now() + duration)).await
        }
        Order::ConnectTimes { server, count } => connect(server, Amount::Times(count)).await,
        Order::Hold {
            server,
            flows: wanted,
        } => hold(server, wanted, flows).await,
        Order::Exchange { count } => exchange(count, flows).await,
        Order::Release => {
            flows.clear();
            Ok(Answer::default())
        }
    }
}

#[derive(Clone, Copy)]
enum Amount {
    Until(Instant),
    Times(usize),
}

async fn connect(server: SocketAddr, amount: Amount) -> Result<Answer> {
    let start = Instant::now();
    let started = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..CONCURRENCY {
        let started = Arc::clone(&started);
        clients.spawn(async move {
            let mut times_ms = Vec::new();
            let mut buffer = Vec::with_capacity(2 * ANSWER_BYTES);
            while match amount {
                Amount::Until(end) => Instant::now() < end,
                Amount::Times(count) => started.fetch_add(1, Ordering::Relaxed) < count,
            } {
                let start = Instant::now();
                timeout(PATIENCE, request_once(server, &mut buffer)).await??;
                times_ms.push(statistic::milliseconds(start.elapsed()));
            }
            anyhow::Ok(times_ms)
        });
    }
    let mut times_ms = Vec::new();
    while let Some(client) = clients.join_next().await {
        times_ms.extend(client??);
    }
    Ok(Answer {
        requests: times_ms.len(),
        seconds: start.elapsed().as_secs_f64(),
        p50_ms: statistic::quantile(&times_ms, 0.5).context("no connection was opened")?,
        p99_ms: statistic::quantile(&times_ms, 0.99).context("no connection was opened")?,
        ..Answer::default()
    })
}

async fn request_once(server: SocketAddr, buffer: &mut Vec<u8>) -> Result<()> {
    buffer.clear();
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(CLOSE).await?;
    while stream.read_buf(buffer).await? > 0 {}
    ensure!(
        buffer.len() == ANSWER_BYTES,
        "{} of {ANSWER_BYTES} bytes came",
        buffer.len()
    );
    Ok(())
}

async fn hold(server: SocketAddr, wanted: usize, flows: &mut Vec<TcpStream>) -> Result<Answer> {
    while flows.len() < wanted {
        let mut opening = JoinSet::new();
        for _ in 0..CONCURRENCY.min(wanted - flows.len()) {
            opening.spawn(async move {
                let mut stream = timeout(PATIENCE, TcpStream::connect(server)).await??;
                request_again(&mut stream).await?;
                anyhow::Ok(stream)
            });
        }
        while let Some(opened) = opening.join_next().await {
            flows.push(opened?.with_context(|| format!("flow {}", flows.len() + 1))?);
        }
    }
    Ok(Answer {
        held: flows.len(),
        local: flows.first().and_then(|flow| flow.local_addr().ok()),
        ..Answer::default()
    })
}

async fn request_again(stream: &mut TcpStream) -> Result<()> {
    let exchange = async {
        stream.write_all(KEEP).await?;
        stream.read_exact(&mut [0; ANSWER_BYTES]).await
    };
    timeout(PATIENCE, exchange).await??;
    Ok(())
}

async fn exchange(count: usize, flows: &mut Vec<TcpStream>) -> Result<Answer> {
    if flows.is_empty() {
        bail!("no flow is open");
    }
    let start = Instant::now();
    let workers = CONCURRENCY.min(flows.len());
    let mut shares: Vec<Vec<TcpStream>> = (0..workers).map(|_| Vec::new()).collect();
    for (index, flow) in flows.drain(..).enumerate() {
        shares[index % workers].push(flow);
    }
    let mut clients = JoinSet::new();
    for (worker, mut share) in shares.into_iter().enumerate() {
        let turns = count / workers + usize::from(worker < count % workers);
        clients.spawn(async move {
            let flows = share.len();
            for turn in 0..turns {
                request_again(&mut share[turn % flows]).await?;
            }
            anyhow::Ok(share)
        });
    }
    while let Some(client) = clients.join_next().await {
        flows.extend(client??);
    }
    Ok(Answer {
        requests: count,
        seconds: start.elapsed().as_secs_f64(),
        held: flows.len(),
        ..Answer::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_agree_on_requests_and_keep_what_is_held() {
        let runtime = Runtime::new().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let server = listener.local_addr().unwrap();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(answer(stream));
                }
            });
            let mut flows = Vec::new();
            let connected = carry_out(Order::ConnectTimes { server, count: 100 }, &mut flows)
                .await
                .unwrap();
            assert_eq!(connected.requests, 100);
            assert!(connected.p50_ms <= connected.p99_ms);
            let held = carry_out(Order::Hold { server, flows: 70 }, &mut flows)
                .await
                .unwrap();
            assert_eq!(held.held, 70);
            let exchanged = carry_out(Order::Exchange { count: 1000 }, &mut flows)
                .await
                .unwrap();
            assert_eq!((exchanged.requests, exchanged.held), (1000, 70));
            carry_out(Order::Release, &mut flows).await.unwrap();
            assert!(carry_out(Order::Exchange { count: 1 }, &mut flows).await.is_err());
        });
    }
}
