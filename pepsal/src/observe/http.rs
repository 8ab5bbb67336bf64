//! Endpoints for Prometheus and load balancers: `/metrics`, `/healthz` and `/readyz`, by HTTP/1.1 at an
//! address or a Unix socket.
//!
//! A connection has one request, and ends after ten seconds, so that slow clients cannot block others.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::libc;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::observe::{
    connections::{self, Listener, Stream},
    exposition,
    snapshot::Snapshots,
    socket_file::SocketFile,
};

/// Default address of the endpoint.
pub const DEFAULT_PLACE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9300);

const CONNECTIONS_MAX: usize = 16;

/// Timeout of a request with its response.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum size of a request in bytes; a scrape needs a tenth.
const REQUEST_MAX: usize = 16 << 10;

/// Listen address of the endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Disabled.
    None,
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("unix:")) {
            ("none", _) => Ok(Self::None),
            (_, Some(path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            _ => text.parse().map(Self::Tcp).map_err(|_| {
                format!("'{text}' is no place to listen: give ADDRESS:PORT like {DEFAULT_PLACE}, unix:/PATH, or none")
            }),
        }
    }
}

/// Listens at `place`, by default at [`DEFAULT_PLACE`], which another instance may use.
///
/// # Errors
/// When `place` cannot be bound.
pub fn bind(place: Option<&Place>) -> Result<Option<(Listener, Option<SocketFile>)>> {
    match place.unwrap_or(&Place::Tcp(DEFAULT_PLACE)) {
        Place::None => Ok(None),
        Place::Unix(path) => {
            let (listener, file) = Listener::at(path.clone()).context("metrics")?;
            Ok(Some((listener, Some(file))))
        }
        Place::Tcp(address) => match listen(*address) {
            Ok(listener) => Ok(Some((Listener::Tcp(listener), None))),
            Err(error) => {
                let why = match error.raw_os_error() {
                    Some(libc::EADDRINUSE) => "it is in use".to_owned(),
                    _ => error.to_string(),
                };
                if place.is_some() {
                    bail!("metrics: cannot listen at {address}: {why}: choose another with --metrics-listen");
                }
                warn!("no metrics are served at {address}: {why}: choose another with --metrics-listen");
                Ok(None)
            }
        },
    }
}

fn listen(address: SocketAddr) -> io::Result<tokio::net::TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

/// Serves requests; never returns.
pub async fn serve(listener: Listener, snapshots: Arc<Snapshots>) {
    connections::receive(listener, CONNECTIONS_MAX, |stream| {
        visit(stream, snapshots.clone())
    })
    .await;
}

async fn visit(stream: Box<dyn Stream>, snapshots: Arc<Snapshots>) {
    let service = service_fn(|request| answer(request, snapshots.clone()));
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(REQUEST_MAX)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("metrics request failed: {error}"),
        Err(_) => debug!("metrics request took longer than {PATIENCE:?}"),
    }
}

async fn answer(
    request: Request<Incoming>,
    snapshots: Arc<Snapshots>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n".into());
        refusal
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refusal);
    }
    Ok(match request.uri().path() {
        "/metrics" => metrics(snapshots).await,
        "/healthz" => text(StatusCode::OK, "ok\n".into()),
        "/readyz" => readiness(&snapshots).await,
        _ => text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n".into(),
        ),
    })
}

async fn metrics(snapshots: Arc<Snapshots>) -> Response<Full<Bytes>> {
    match snapshots.current().await {
        Ok(snapshot) => {
            let mut response = text(StatusCode::OK, snapshot.metrics.clone());
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(exposition::CONTENT_TYPE));
            response
        }
        Err(error) => failure(&error),
    }
}

fn failure(error: &anyhow::Error) -> Response<Full<Bytes>> {
    text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n"))
}

/// Responds to `/readyz`: 200 when new connections are intercepted on every interface of `-i`.
async fn readiness(snapshots: &Snapshots) -> Response<Full<Bytes>> {
    let snapshot = match snapshots.current().await {
        Ok(snapshot) => snapshot,
        Err(error) => return failure(&error),
    };
    let problems = &snapshot.status.problems;
    match problems.is_empty() {
        true => text(StatusCode::OK, "ready\n".into()),
        false => text(
            StatusCode::SERVICE_UNAVAILABLE,
            problems.iter().map(|problem| format!("{problem}\n")).collect(),
        ),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_addresses_paths_or_nowhere() {
        assert_eq!(Place::from_str("none"), Ok(Place::None));
        assert_eq!(
            Place::from_str("unix:/run/m.sock"),
            Ok(Place::Unix("/run/m.sock".into()))
        );
        assert!(matches!(Place::from_str("[::1]:9300"), Ok(Place::Tcp(_))));
        for wrong in ["9300", "unix:m.sock", "localhost:9300", ""] {
            let error = Place::from_str(wrong).unwrap_err();
            assert!(error.contains(&format!("'{wrong}'")), "{error}");
        }
    }
}
