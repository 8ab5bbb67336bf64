//! The legs of split connections, as `ss` shows them at the gateway.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};

use crate::netns::Namespace;
use crate::topology::Family;

/// One TCP socket of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    /// State of the connection, as `ss` names it.
    pub state: String,
    /// Bytes that the peer has not acknowledged.
    pub unacknowledged: u64,
    /// Local address, which is that of the other end on a gateway.
    pub local: SocketAddr,
    /// Address of the peer.
    pub peer: SocketAddr,
    /// Name of the congestion control.
    pub congestion: String,
    /// Congestion window in segments.
    pub window: u64,
    /// Bytes of payload in a full segment.
    pub mss: u64,
    /// Maximum pacing rate in bit/s of payload; `None` is unlimited.
    pub pacing_bps: Option<u64>,
    /// Receive buffer in bytes, with overhead: twice the value of SO_RCVBUF.
    pub receive_buffer: u64,
    /// Send buffer in bytes, with overhead.
    pub send_buffer: u64,
    /// Sent bytes.
    pub sent: u64,
}

impl Leg {
    /// Returns all connected sockets of a namespace.
    ///
    /// # Errors
    /// When `ss` fails or its output cannot be parsed.
    pub fn all(namespace: &Namespace) -> Result<Vec<Self>> {
        let output = namespace
            .command("ss")
            .args(["-HtinmO", "state", "connected", "exclude", "time-wait"])
            .output()
            .context("cannot run `ss` (Debian's package iproute2)")?;
        ensure!(
            output.status.success(),
            "ss: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8(output.stdout)?;
        // A connection that ends meanwhile has no details.
        let shown = text.lines().filter(|line| line.contains(" cwnd:"));
        shown
            .map(|line| Self::parse(line).with_context(|| format!("ss shows {line:?}")))
            .collect()
    }

    fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [state, _received, queued, local, peer, ..] = words[..] else {
            bail!("too few words");
        };
        let value = |prefix: &str| words.iter().find_map(|word| word.strip_prefix(prefix));
        let number = |prefix: &str| -> Result<u64> {
            let value = value(prefix).with_context(|| format!("no {prefix}"))?;
            Ok(value.parse()?)
        };
        let memory = value("skmem:(").context("no skmem:")?;
        let buffer = |prefix: &str| -> Result<u64> {
            let value = memory.split(',').find_map(|field| field.strip_prefix(prefix));
            Ok(value.with_context(|| format!("no {prefix}"))?.parse()?)
        };
        let scale = words
            .iter()
            .position(|word| word.starts_with("wscale:"))
            .context("no wscale:")?;
        let pacing = words.iter().position(|word| *word == "pacing_rate");
        let pacing_cap = pacing
            .and_then(|at| words.get(at + 1)?.split_once('/'))
            .map(|(_, cap)| cap.trim_end_matches("bps").parse())
            .transpose()?;
        Ok(Self {
            state: state.to_owned(),
            unacknowledged: queued.parse()?,
            local: local.parse()?,
            peer: peer.parse()?,
            // The name follows the negotiated options and precedes the window scales, which are always
            // present here.
            congestion: words[scale - 1].to_owned(),
            window: number("cwnd:")?,
            mss: number("mss:")?,
            pacing_bps: pacing_cap,
            receive_buffer: buffer("rb")?,
            send_buffer: buffer("tb")?,
            sent: number("bytes_sent:").unwrap_or(0),
        })
    }
}

/// Returns whether a socket of an address family listens on a port of a namespace.
pub fn is_listening(namespace: &Namespace, family: Family, port: u16) -> bool {
    let file = match family {
        Family::V4 => "/proc/thread-self/net/tcp",
        Family::V6 => "/proc/thread-self/net/tcp6",
    };
    let sockets = namespace.run(|| fs::read_to_string(file)).unwrap_or_default();
    listens(&sockets, port)
}

/// Parses the local address and the state of a line; 0A is listening.
fn listens(sockets: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    sockets.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace();
        words.nth(1).is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_told_from_connections() {
        let sockets = "  sl  local_address rem_address   st tx_queue\n   \
                       0: 0100007F:1389 00000000:0000 0A 00000000:00000000\n   \
                       1: 0100007F:1F90 0200007F:9C40 01 00000000:00000000\n";
        assert!(listens(sockets, 5001));
        assert!(!listens(sockets, 8080));
        assert!(!listens(sockets, 9));
    }
}
