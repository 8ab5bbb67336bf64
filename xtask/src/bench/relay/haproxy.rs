//! HAProxy as a contender: its configuration, and the netfilter rules that steer connections to it.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use pepsal_tests::{Family, Namespace, is_listening};

use super::{process, process::Process};
use crate::bench::machine;
use crate::{shell, signals::Signals};

/// Required programs, with their Debian packages.
pub const PROGRAMS: &[(&str, &str)] = &[("haproxy", "haproxy"), ("iptables", "iptables")];

const PORT: u16 = 5001;
/// Maximum number of concurrently spliced connections; pipes count against the descriptors.
const MOST_PIPES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(20);

/// A running HAProxy; dropping it ends the process. Its rules end with its namespace.
pub struct Haproxy {
    process: Process,
    configuration: PathBuf,
}

impl Haproxy {
    /// Starts HAProxy in a gateway and waits until it listens.
    pub fn start(gateway: &Namespace, most_flows: usize, signals: &Signals) -> Result<Self> {
        steer(gateway, signals)?;
        let configuration =
            std::env::temp_dir().join(format!("pepsal-bench-haproxy-{}.cfg", std::process::id()));
        fs::write(&configuration, self::configuration(machine::cpus(), most_flows))
            .with_context(|| format!("cannot write {}", configuration.display()))?;
        let program = shell::find("haproxy").context("no haproxy")?;
        let mut check = gateway.command(&program);
        process::output(check.arg("-c").arg("-f").arg(&configuration), PATIENCE, signals)?;
        let mut command = gateway.command(&program);
        command
            .arg("-db")
            .arg("-f")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut haproxy = Self {
            process: Process::start(&mut command)?,
            configuration,
        };
        process::wait_until("HAProxy listens", PATIENCE, signals, || {
            haproxy.process.has_ended()
                || Family::BOTH
                    .iter()
                    .all(|family| is_listening(gateway, *family, PORT))
        })?;
        ensure!(!haproxy.process.has_ended(), "HAProxy has ended");
        Ok(haproxy)
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        // A remaining temporary file is harmless.
        let _ = fs::remove_file(&self.configuration);
    }
}

/// Returns the first line of `haproxy -v`.
pub fn version() -> Result<String> {
    let text = shell::output(Command::new(shell::find("haproxy").context("no haproxy")?).arg("-v"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// The configuration: the client's address towards the server, the original destination of the connection.
fn configuration(threads: usize, most_flows: usize) -> String {
    format!(
        "\
global
    nbthread {threads}
    maxconn {most_flows}
    maxpipes {MOST_PIPES}

defaults
    mode tcp
    maxconn {most_flows}
    timeout connect 20s
    timeout client 1h
    timeout server 1h
    option splice-request
    option splice-response
    option transparent

listen v4
    bind 0.0.0.0:{PORT} transparent
    source 0.0.0.0 usesrc clientip

listen v6
    bind [::]:{PORT} transparent v6only
    source [::] usesrc clientip
"
    )
}

/// Sets the rules of HAProxy's documentation, in both address families: mark packets of its connections,
/// redirect new connections of the client to its listener, and deliver marked packets locally.
fn steer(gateway: &Namespace, signals: &Signals) -> Result<()> {
    gateway.ip("rule add fwmark 1 lookup 100
         route add local 0.0.0.0/0 dev lo table 100
         route add local ::/0 dev lo table 100")?;
    // A rule without addresses has the family of the command line, not of the batch.
    let mut rule = gateway.command("ip");
    let rule = rule.args("-6 rule add fwmark 1 lookup 100".split(' '));
    process::output(rule, PATIENCE, signals)?;
    let tproxy = format!("PREROUTING -i lan0 -p tcp -j TPROXY --on-port {PORT} --tproxy-mark 1");
    for program in ["iptables", "ip6tables"] {
        let program = shell::find(program).with_context(|| format!("no {program}"))?;
        for rule in [
            "-N DIVERT",
            "-A DIVERT -j MARK --set-mark 1",
            "-A DIVERT -j ACCEPT",
            "-A PREROUTING -p tcp -m socket --transparent -j DIVERT",
            &format!("-A {tproxy}"),
        ] {
            let mut command = gateway.command(&program);
            command.args(["-w", "10", "-t", "mangle"]).args(rule.split(' '));
            process::output(&mut command, PATIENCE, signals)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_fits_the_machine() {
        let text = configuration(4, 9800);
        assert!(text.contains("nbthread 4\n"));
        assert!(text.contains("maxconn 9800\n"));
        assert!(text.contains("bind [::]:5001 transparent v6only\n"));
    }
}
