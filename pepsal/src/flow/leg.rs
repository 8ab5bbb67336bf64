//! A leg of an open flow: its connection, its share of its link, and its end.

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
    tcp::{congestion::Congestion, connection::Connection, options},
};

/// One leg of an open flow.
pub struct Leg {
    /// Membership in the budget of the leg's link, if it has a profile.
    membership: Option<Membership>,
    stream: Arc<Connection>,
    side: Side,
    /// Set after a connection error. The kernel reports an error once, and then returns end of stream.
    broken: AtomicBool,
}

impl Leg {
    /// Creates a leg from a connected stream, which is reset on drop
    /// ([`crate::flow::leg_config::LegConfig::tune`]).
    pub fn new(stream: Connection, side: Side) -> Self {
        Self {
            membership: None,
            stream: Arc::new(stream),
            side,
            broken: AtomicBool::new(false),
        }
    }

    /// Joins the budget of its link, before the leg has sent data, and starts at its share of the rate.
    pub(crate) fn join(&mut self, link: &Link, client: IpAddr, traffic_class: u8, congestion: &Congestion) {
        let profile = &link.profile;
        let (weight, window) = (profile.weights.of(traffic_class), profile.initial_window.value);
        if let (Some(bytes), Side::Server) = (profile.peer_window.value, self.side)
            && let Err(error) = options::set_send_window(&*self.stream, bytes)
        {
            trace!("cannot set the send window: {error}");
        }
        self.membership = Some(link.budget.join(&self.stream, client, weight, congestion, window));
    }

    /// Returns the side of the flow.
    pub(crate) fn side(&self) -> Side {
        self.side
    }

    /// Returns the stream of the leg.
    pub fn stream(&self) -> &Arc<Connection> {
        &self.stream
    }

    /// Notifies the budget that bytes were written.
    pub(super) fn wrote(&self) {
        if let Some(membership) = &self.membership {
            membership.wrote();
        }
    }

    /// Waits until the peer resets the connection or its user timeout expires. Returns the close reason.
    pub(crate) async fn abandoned(&self) -> CloseReason {
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

    /// Waits for a connection error.
    pub(super) fn error(&self) -> impl Future<Output = Broken> {
        self.stream.broken().map(|error| self.broke(error))
    }

    /// Sends a FIN after all written data, and then disables the reset on close.
    pub(super) fn finish(&self) -> Result<(), Broken> {
        let end = || {
            options::reset_on_close(self.stream.as_fd(), false)?;
            self.stream.socket().shutdown(Shutdown::Write)
        };
        end().map_err(|error| self.broke(error))
    }
}

/// A connection error of a leg.
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
