//! The client of the admin socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use crate::observe::{
    admin::DEFAULT_PATH,
    protocol::{Answer, Question, Reply, Request, VERSION},
};

/// Timeout of a reply, longer than the maximum interval of rates.
const PATIENCE: Duration = Duration::from_secs(20);

/// Option that selects the daemon.
#[derive(Debug, Clone, Args)]
pub struct Socket {
    /// The daemon's admin socket
    #[arg(long = "admin-socket", value_name = "PATH", default_value = DEFAULT_PATH)]
    path: PathBuf,
}

pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Socket {
    /// Connects to the daemon.
    ///
    /// # Errors
    /// When no daemon listens, or this user has no permission.
    pub fn connect(&self) -> Result<Client> {
        let shown = self.path.display();
        let stream = UnixStream::connect(&self.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                anyhow!("no daemon listens at {shown}: is it running, and with this --admin-socket?")
            }
            io::ErrorKind::PermissionDenied => {
                anyhow!("no permission for {shown}: run as root, or as a member of the socket's group")
            }
            _ => anyhow!("cannot connect to {shown}: {error}"),
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let stream = BufReader::new(stream);
        Ok(Client { stream })
    }
}

impl Client {
    /// Sends a request, and waits for the reply.
    ///
    /// # Errors
    /// The daemon's error, or the error of the connection.
    pub fn ask(&mut self, question: Question) -> Result<Answer> {
        let request = Request {
            version: VERSION,
            question,
        };
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&line)
            .context("cannot send the request to the daemon")?;
        let mut answer = String::new();
        self.stream
            .read_line(&mut answer)
            .context("cannot read the reply of the daemon")?;
        if answer.is_empty() {
            bail!("the daemon closed the connection without a reply");
        }
        let reply: Reply = serde_json::from_str(&answer).context(
            "cannot parse the reply of the daemon: is its version another than that of this command?",
        )?;
        match reply.answer {
            Answer::Error(error) => bail!(error),
            answer => Ok(answer),
        }
    }
}
