//! The daemon on its gateway, and how each fault is done to it.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{net::if_::if_nameindex, sys::signal::Signal};
use pepsal_tests::{Daemon, Topology};

use super::{faults::Fault, totals::Totals, vitals};
use crate::shell;

/// What the daemon is told: the flows that have nothing to say for a while must not end by it.
const ARGUMENTS: [&str; 8] = [
    "-i",
    "lan0",
    "-i",
    "sat0",
    "--link",
    "sat0,rate=40mbit,rtt=60ms",
    "--idle-timeout",
    "60s",
];

/// The daemon's limit of descriptors, but for while there are none.
const DESCRIPTORS: &str = "20000:20000";

/// A daemon on the gateway of a topology.
pub struct Bed<'a> {
    topology: &'a Topology,
    binary: PathBuf,
    daemon: Option<Daemon>,
    log: String,
    /// What the map of flows takes without flows.
    empty_map_bytes: u64,
}

impl<'a> Bed<'a> {
    /// Starts a daemon.
    pub fn start(topology: &'a Topology, binary: &Path) -> Result<Self> {
        // Addresses and what hangs on them come back with the interface, as they do where somebody manages it.
        topology
            .gateway
            .sysctl("net.ipv6.conf.all.keep_addr_on_down", 1)?;
        let mut bed = Self {
            topology,
            binary: binary.to_owned(),
            daemon: None,
            log: String::new(),
            empty_map_bytes: 0,
        };
        bed.start_daemon()?;
        bed.empty_map_bytes = vitals::flow_map_bytes(bed.pid())?;
        Ok(bed)
    }

    fn start_daemon(&mut self) -> Result<()> {
        let daemon = Daemon::start_quiet(&self.binary, &self.topology.gateway, &ARGUMENTS)?;
        self.daemon = Some(daemon);
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

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Daemon::pid)
    }

    /// Does it, and undoes it.
    pub fn inflict(&mut self, fault: Fault, totals: &Totals) -> Result<()> {
        totals.fault_begins(fault);
        let gateway = &self.topology.gateway;
        match fault {
            Fault::Kill => {
                self.kill()?;
                self.start_daemon()?;
            }
            Fault::Absence => {
                self.kill()?;
                thread::sleep(Duration::from_secs(3));
                self.start_daemon()?;
            }
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
            Fault::RemoveClientsDevice => self.remove_device("pepsal-c")?,
            Fault::RemoveServersDevice => self.remove_device("pepsal-s")?,
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

    /// Removes the devices whose names begin so. The namespaces of a daemon that was killed may still have theirs.
    fn remove_device(&self, prefix: &str) -> Result<()> {
        let gateway = &self.topology.gateway;
        let names = || -> Result<Vec<String>> {
            let interfaces = if_nameindex()?;
            let names = interfaces
                .iter()
                .map(|interface| interface.name().to_string_lossy());
            Ok(names
                .filter(|name| name.starts_with(prefix))
                .map(Into::into)
                .collect())
        };
        for name in gateway.run(names)? {
            let removed = gateway.ip(format!("link delete {name}"));
            // It may have gone with its namespace meanwhile.
            if gateway.run(names)?.contains(&name) {
                removed?;
            }
        }
        Ok(())
    }

    fn limit_descriptors(&self, limit: &str) -> Result<()> {
        let mut prlimit = std::process::Command::new("prlimit");
        prlimit.args(["--pid", &self.pid().to_string(), &format!("--nofile={limit}")]);
        shell::output(&mut prlimit).map(drop)
    }

    /// Waits until the kernel knows no flow any more.
    pub fn wait_until_idle(&self, patience: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            if vitals::flow_map_bytes(self.pid())? <= self.empty_map_bytes {
                return Ok(());
            }
            if start.elapsed() > patience {
                bail!("the map of flows still has entries after {patience:?} without flows");
            }
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Stops the daemon and returns all that daemons have logged.
    pub fn stop(mut self) -> Result<String> {
        let daemon = self.daemon.take().context("the daemon runs")?;
        let exit = daemon.terminate()?;
        ensure!(exit.code() == Some(0), "the daemon ended with {:?}", exit.status);
        Ok(self.log + &exit.log)
    }
}
