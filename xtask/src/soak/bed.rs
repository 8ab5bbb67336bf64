//! The daemon on its gateway, and the injection of each fault.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use pepsal_tests::{Daemon, Topology};

use super::{faults::Fault, totals::Totals, vitals};
use crate::shell;

/// Arguments of the daemon. A client's reset that is lost on a down interface leaves a flow, which only the
/// idle timeout ends: it is longer than every pause, and shorter than the timeout at the end of the run.
const ARGUMENTS: [&str; 8] = [
    "-i",
    "lan0",
    "-i",
    "sat0",
    "--link",
    "sat0,rate=40mbit,rtt=60ms",
    "--idle-timeout",
    "20s",
];

/// The gateway's firewall: accepts connections of the clients only.
const FIREWALL: &str = "flush ruleset
table inet gateway {
    chain forward {
        type filter hook forward priority filter; policy drop
        ct state established,related accept
        iifname lan0 ct state new accept
    }
}
";

/// The daemon's limit of file descriptors, except during the fault that exhausts them.
const DESCRIPTORS: &str = "20000:20000";

/// A daemon on the gateway of a topology.
pub struct Bed<'a> {
    topology: &'a Topology,
    binary: PathBuf,
    daemon: Option<Daemon>,
    /// Previous instances after a takeover, which exit after their last flow.
    predecessors: Vec<Daemon>,
    log: String,
    /// Memory of the flow map without flows.
    empty_map_bytes: u64,
}

impl<'a> Bed<'a> {
    /// Starts a daemon.
    pub fn start(topology: &'a Topology, binary: &Path) -> Result<Self> {
        // Restores addresses and routes with the interface, as a network manager would.
        topology
            .gateway
            .sysctl("net.ipv6.conf.all.keep_addr_on_down", 1)?;
        let mut bed = Self {
            topology,
            binary: binary.to_owned(),
            daemon: None,
            predecessors: Vec::new(),
            log: String::new(),
            empty_map_bytes: 0,
        };
        bed.load_firewall()?;
        bed.start_daemon(&[])?;
        bed.empty_map_bytes = vitals::flow_map_bytes(bed.pid())?;
        Ok(bed)
    }

    fn start_daemon(&mut self, more: &[&str]) -> Result<()> {
        let arguments = [&ARGUMENTS, more].concat();
        let daemon = Daemon::start_quiet(&self.binary, &self.topology.gateway, &arguments)?;
        self.predecessors.extend(self.daemon.replace(daemon));
        self.limit_descriptors(DESCRIPTORS)
    }

    fn daemon(&self) -> Result<&Daemon> {
        self.daemon.as_ref().context("the daemon runs")
    }

    fn kill(&mut self) -> Result<()> {
        let daemon = self.daemon.take().context("the daemon runs")?;
        self.log += &daemon.kill()?.log;
        Ok(())
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Daemon::pid)
    }

    /// Injects a fault, and ends it.
    pub fn inflict(&mut self, fault: Fault, totals: &Totals) -> Result<()> {
        totals.fault_begins(fault);
        let gateway = &self.topology.gateway;
        match fault {
            Fault::Kill => {
                self.kill()?;
                self.start_daemon(&[])?;
            }
            Fault::Absence => {
                self.kill()?;
                thread::sleep(Duration::from_secs(3));
                self.start_daemon(&[])?;
            }
            Fault::Takeover => self.start_daemon(&["--takeover"])?,
            Fault::Hang => {
                self.daemon()?.signal(Signal::SIGSTOP)?;
                thread::sleep(Duration::from_secs(4));
                self.daemon()?.signal(Signal::SIGCONT)?;
            }
            Fault::FlapLan | Fault::FlapSat => {
                let name = if fault == Fault::FlapLan { "lan0" } else { "sat0" };
                gateway.ip(format!("link set {name} down"))?;
                thread::sleep(Duration::from_secs(1));
                gateway.ip(format!("link set {name} up"))?;
            }
            Fault::RemoveClients => {
                self.each_interface("pepsal-c", |name| gateway.ip(format!("link delete {name}")))?;
            }
            Fault::RemoveServers => {
                self.each_interface("pepsal-s", |name| gateway.ip(format!("link delete {name}")))?;
            }
            Fault::DevicesDown => {
                self.each_interface("pepsal-", |name| gateway.ip(format!("link set {name} down")))?;
            }
            Fault::Qdiscs => self.each_interface("", |name| {
                for action in ["replace", "delete"] {
                    let mut tc = gateway.command("tc");
                    shell::output(tc.args(["qdisc", action, "dev", name, "clsact"]))?;
                }
                Ok(())
            })?,
            Fault::Firewall => self.load_firewall()?,
            Fault::Descriptors => {
                let open = fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count();
                self.limit_descriptors(&format!("{open}:20000"))?;
                thread::sleep(Duration::from_secs(2));
                self.limit_descriptors(DESCRIPTORS)?;
            }
        }
        totals.fault_ends();
        ensure!(
            self.has_daemon()?,
            "the daemon has ended:\n{}",
            self.daemon()?.log()
        );
        Ok(())
    }

    fn has_daemon(&self) -> Result<bool> {
        Ok(Path::new(&format!("/proc/{}/fd/0", self.daemon()?.pid())).exists())
    }

    /// Runs a command for every interface of the gateway with this prefix, except loopback.
    fn each_interface(&self, prefix: &str, work: impl Fn(&str) -> Result<()>) -> Result<()> {
        for name in self.interfaces()? {
            if name.starts_with(prefix) && name != "lo" {
                let done = work(&name);
                // A previous instance may have exited just now, with its devices.
                if done.is_err() && self.interfaces()?.contains(&name) {
                    return done;
                }
            }
        }
        Ok(())
    }

    fn interfaces(&self) -> Result<Vec<String>> {
        let mut ip = self.topology.gateway.command("ip");
        let listed = shell::output(ip.args(["-brief", "link"]))?;
        let name = |line: &str| line.split([' ', '@']).next().unwrap_or_default().to_owned();
        Ok(listed.lines().map(name).collect())
    }

    /// Replaces the ruleset atomically.
    fn load_firewall(&self) -> Result<()> {
        shell::output(self.topology.gateway.command("nft").arg(FIREWALL)).map(drop)
    }

    fn limit_descriptors(&self, limit: &str) -> Result<()> {
        let mut prlimit = std::process::Command::new("prlimit");
        prlimit.args(["--pid", &self.pid().to_string(), &format!("--nofile={limit}")]);
        shell::output(&mut prlimit).map(drop)
    }

    /// Waits until the flow map is empty and previous instances have exited.
    pub fn wait_until_idle(&mut self, patience: Duration) -> Result<()> {
        for daemon in self.predecessors.drain(..) {
            let exit = daemon.wait_within(patience)?;
            ensure!(
                exit.code() == Some(0),
                "a daemon that was taken over from ended with {:?}",
                exit.status
            );
            self.log += &exit.log;
        }
        let start = Instant::now();
        loop {
            if vitals::flow_map_bytes(self.pid())? <= self.empty_map_bytes {
                return Ok(());
            }
            if start.elapsed() > patience {
                bail!("the flow map still has entries after {patience:?} without flows");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Stops the daemon and returns the logs of all instances.
    pub fn stop(mut self) -> Result<String> {
        let daemon = self.daemon.take().context("the daemon runs")?;
        let exit = daemon.terminate()?;
        ensure!(exit.code() == Some(0), "the daemon ended with {:?}", exit.status);
        Ok(self.log + &exit.log)
    }
}
