//! Accepts connections, and passes each to a worker.

use std::{io, sync::Arc, time::Duration};

use futures_util::future::join_all;
use nix::libc::{SOCK_CLOEXEC, SOCK_NONBLOCK};
use socket2::Socket;
use tokio::{io::Interest, time::sleep};
use tracing::warn;

use crate::{
    daemon::workers::Workers,
    flow::{
        self, Shared, fault_injection,
        listener::{Listener, Pair},
        metrics::Event,
    },
};

/// Accepts connections; never returns.
pub async fn accept(pair: Arc<Pair>, shared: Arc<Shared>, workers: Arc<Workers>) {
    join_all(
        pair.iter()
            .map(|listener| accept_from(listener, &shared, &workers)),
    )
    .await;
}

async fn accept_from(listener: &Listener, shared: &Arc<Shared>, workers: &Workers) {
    let accept = |listener: &Socket| {
        let (socket, client) = listener.accept4(SOCK_NONBLOCK | SOCK_CLOEXEC)?;
        Ok((socket.local_addr()?, socket, client))
    };
    let mut pause = Duration::from_millis(5);
    loop {
        match listener.async_io(Interest::READABLE, accept).await {
            Ok((server, socket, client)) => {
                // Always IP addresses on these listeners.
                let (Some(server), Some(client)) = (server.as_socket(), client.as_socket()) else {
                    continue;
                };
                fault_injection::at("accept", server);
                pause = Duration::from_millis(5);
                let shared = shared.clone();
                workers.spawn(move || flow::serve(socket, client, server, shared));
            }
            // The client has closed the connection already.
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

fn is_of_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}
