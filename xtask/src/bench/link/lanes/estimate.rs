//! What a daemon has found of its link, asked over the admin socket (docs/admin-protocol.md).

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path as FilePath,
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// The daemon's view of its only link. Builds from before a member do not have it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Estimate {
    rate_bytes_per_second: f64,
    ceiling_bytes_per_second: Option<f64>,
    queueing_delay_seconds: Option<f64>,
    state: Option<String>,
}

impl Estimate {
    /// What the link was found to carry, in Mbit/s.
    pub fn rate_mbit(&self) -> f64 {
        self.rate_bytes_per_second * 8e-6
    }
}

/// A connection to an admin socket.
pub struct Watch(BufReader<UnixStream>);

#[derive(Deserialize)]
struct Reply {
    status: Status,
}

#[derive(Deserialize)]
struct Status {
    links: Vec<Estimate>,
}

impl Watch {
    /// Connects; nothing where no daemon listens.
    pub fn open(socket: &FilePath) -> Option<Self> {
        const PATIENCE: Duration = Duration::from_secs(1);
        let stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        Some(Self(BufReader::new(stream)))
    }

    /// The present estimate, which may be a second old; nothing where the daemon does not give one.
    pub fn estimate(&mut self) -> Option<Estimate> {
        self.0
            .get_mut()
            .write_all(b"{\"version\":1,\"request\":\"status\"}\n")
            .ok()?;
        let mut line = String::new();
        self.0.read_line(&mut line).ok()?;
        parse(&line)
    }
}

fn parse(reply: &str) -> Option<Estimate> {
    let reply: Reply = serde_json::from_str(reply).ok()?;
    reply.status.links.into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_of_before_have_a_rate_only() {
        let reply = |link: &str| format!(r#"{{"version":1,"status":{{"pid":1,"links":[{link}]}}}}"#);
        let old = parse(&reply(r#"{"interface":"sat1","rate_bytes_per_second":6250000}"#)).unwrap();
        assert_eq!((old.rate_mbit(), old.state), (50.0, None));
        let new = r#"{"rate_bytes_per_second":1,"ceiling_bytes_per_second":2,"queueing_delay_seconds":0.5,"state":"growing"}"#;
        let new = parse(&reply(new)).unwrap();
        assert_eq!(
            (new.ceiling_bytes_per_second, new.queueing_delay_seconds),
            (Some(2.0), Some(0.5))
        );
        assert_eq!(new.state.as_deref(), Some("growing"));
        assert!(parse(&reply("")).is_none());
    }
}
