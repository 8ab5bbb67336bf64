//! A leg while its flow is relayed: its connection, its share of its link, and how it ends.

use std::{
    io,
    net::{IpAddr, Shutdown},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::FutureExt;
use tracing::trace;

use crate::{
    flow::{close_reason::CloseReason, side::Side},
    link::{budget::Membership, registry::Link},
    tcp::{congestion::Congestion, options, stream::Stream},
};

/// One end of a flow while it is relayed.
pub struct Leg {
    /// In the budget of the leg's link, where that is described.
    membership: Option<Membership>,
    stream: Arc<Stream>,
    side: Side,
    /// Set once the connection is known to be broken. The kernel reports an error only once, and then pretends an
    /// orderly end of stream.
    broken: AtomicBool,
}

impl Leg {
    /// Takes over a connected stream, which is reset when it is dropped ([`crate::flow::leg_config::LegConfig::tune`]).
    pub fn new(stream: Stream, side: Side) -> Self {
        Self {
            membership: None,
            stream: Arc::new(stream),
            side,
            broken: AtomicBool::new(false),
        }
    }

    /// Lets a leg that has not sent anything yet start at its share of its link's rate.
    pub fn join(&mut self, link: &Link, client: IpAddr, traffic_class: u8, congestion: &Congestion) {
        let profile = &link.profile;
        let (weight, window) = (profile.weights.of(traffic_class), profile.initial_window.value);
        if let (Some(bytes), Side::Server) = (profile.peer_window.value, self.side)
            && let Err(error) = options::set_send_window(&*self.stream, bytes)
        {
            trace!("cannot set the send window: {error}");
        }
        self.membership = Some(link.budget.join(&self.stream, client, weight, congestion, window));
    }

    /// Which end of the flow it is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// The leg's stream.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Notes that bytes were written to the leg.
    pub(super) fn wrote(&self) {
        if let Some(membership) = &self.membership {
            membership.wrote();
        }
    }

    /// Waits until the peer has given up, and says how that ends a flow.
    pub async fn abandoned(&self) -> CloseReason {
        self.error().await.reason()
    }

    pub(super) fn broke(&self, error: io::Error) -> Broken {
        self.broken.store(true, Ordering::Relaxed);
        Broken {
            side: self.side,
            error,
        }
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Waits until the connection is broken, whatever else happens on it.
    pub(super) fn error(&self) -> impl Future<Output = Broken> {
        self.stream.broken().map(|error| self.broke(error))
    }

    /// Passes an orderly end on: a FIN after all that was written, which nothing may cut short any more.
    pub(super) fn finish(&self) -> Result<(), Broken> {
        let end = || {
            options::reset_on_close(self.stream.as_fd(), false)?;
            self.stream.socket().shutdown(Shutdown::Write)
        };
        end().map_err(|error| self.broke(error))
    }
}

/// A leg broke, and how.
pub(super) struct Broken {
    pub(super) side: Side,
    error: io::Error,
}

impl Broken {
    pub(super) fn reason(&self) -> CloseReason {
        match (self.side, self.error.kind()) {
            (Side::Client, io::ErrorKind::TimedOut) => CloseReason::ClientTimedOut,
            (Side::Server, io::ErrorKind::TimedOut) => CloseReason::ServerTimedOut,
            (Side::Client, _) => CloseReason::ClientReset,
            (Side::Server, _) => CloseReason::ServerReset,
        }
    }
}
