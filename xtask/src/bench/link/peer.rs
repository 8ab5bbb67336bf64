//! Another proxy in pepsal's place, run by a command that its user gives.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use pepsal_tests::Namespace;

/// A peer's name and how to run it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    name: String,
    template: String,
}

const PLACEHOLDERS: [&str; 5] = ["lan", "sat", "rate", "up", "rtt"];

impl Peer {
    /// Reads `NAME=COMMAND`. A peer is kept for as long as the program runs.
    pub fn parse(text: &str) -> Result<&'static Self, String> {
        let (name, template) = text
            .split_once('=')
            .ok_or("write NAME=COMMAND, like mine='mypep {lan} {sat}'")?;
        if name.is_empty() || template.trim().is_empty() {
            return Err("neither name nor command may be empty".into());
        }
        if let Some(unknown) = placeholders(template).find(|name| !PLACEHOLDERS.contains(name)) {
            return Err(format!(
                "{{{unknown}}} is none of {{{}}}",
                PLACEHOLDERS.join("}, {")
            ));
        }
        Ok(Box::leak(Box::new(Self {
            name: name.to_owned(),
            template: template.to_owned(),
        })))
    }

    /// What tables show.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The command for a gateway with these interfaces.
    pub fn command(&self, lan: &str, satellite: &str, link: &LinkSeen) -> String {
        let values = [lan, satellite, &link.rate, &link.up, &link.rtt];
        let mut command = self.template.clone();
        for (name, value) in PLACEHOLDERS.iter().zip(values) {
            command = command.replace(&format!("{{{name}}}"), value);
        }
        command
    }
}

/// A link as one end sees it, in `tc`'s units.
pub struct LinkSeen {
    /// What it receives.
    pub rate: String,
    /// What it sends.
    pub up: String,
    /// The round trip.
    pub rtt: String,
}

/// The names between braces that look like placeholders: the shell's own braces have other things in them.
fn placeholders(template: &str) -> impl Iterator<Item = &str> {
    template.split('{').skip(1).filter_map(|rest| {
        let (name, _) = rest.split_once('}')?;
        let is_word = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase());
        is_word.then_some(name)
    })
}

/// A peer has this long to get ready: there is no common way to tell when it is.
const GRACE: Duration = Duration::from_secs(2);

/// A running peer. Dropping it ends it, and what it has started.
pub struct RunningPeer(Child);

impl RunningPeer {
    /// Runs a command in a gateway with `sh -c`.
    pub fn start(gateway: &Namespace, command: &str) -> Result<Self> {
        let mut shell = gateway.command("sh");
        shell.args(["-c", command]).process_group(0);
        shell
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit());
        let mut peer = Self(shell.spawn().with_context(|| format!("cannot run `{command}`"))?);
        thread::sleep(GRACE);
        let ended = peer.0.try_wait().context("cannot wait for the peer")?;
        ensure!(
            ended.is_none_or(|status| status.success()),
            "`{command}` has ended"
        );
        Ok(peer)
    }
}

impl Drop for RunningPeer {
    fn drop(&mut self) {
        let group = Pid::from_raw(self.0.id().try_into().expect("a pid is positive and small"));
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            // Fails when all of the group has ended.
            if killpg(group, signal).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(200));
        }
        // Fails only for a child that has been waited for already.
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> LinkSeen {
        LinkSeen {
            rate: "50mbit".into(),
            up: "5mbit".into(),
            rtt: "600ms".into(),
        }
    }

    #[test]
    fn placeholders_are_filled_in() {
        let peer = Peer::parse("mine=pep -i {lan} -o {sat} --bdp '{rate} * {rtt}' --up={up}").unwrap();
        assert_eq!(peer.name(), "mine");
        assert_eq!(
            peer.command("lan0", "sat0", &link()),
            "pep -i lan0 -o sat0 --bdp '50mbit * 600ms' --up=5mbit"
        );
    }

    #[test]
    fn a_shells_own_braces_stay() {
        let peer = Peer::parse("mine=x() { pep ${HOME}; }; x").unwrap();
        assert_eq!(peer.command("lan0", "sat0", &link()), "x() { pep ${HOME}; }; x");
    }

    #[test]
    fn mistakes_are_named() {
        assert!(Peer::parse("pep").unwrap_err().contains("NAME=COMMAND"));
        assert!(Peer::parse("=pep").unwrap_err().contains("empty"));
        assert!(
            Peer::parse("a=pep {wan}")
                .unwrap_err()
                .contains("{wan} is none of")
        );
    }
}
