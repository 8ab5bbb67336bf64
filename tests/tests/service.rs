//! The daemon as a service: what it gives up, what it tells the service manager, and the unit that starts it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pepsal_tests::{
    BOTH, Bed, Cancel, Connector, Daemon, Family, Footprint, Namespace, Network, PATIENCE, Session, Topology,
    eventually,
};
use tempfile::TempDir;

/// `CAP_NET_BIND_SERVICE`, `CAP_NET_ADMIN`, `CAP_NET_RAW`, as `/proc` shows them.
const THREE: &str = "0000000000003400";
const NONE: &str = "0000000000000000";

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pepsal.service");

#[test]
fn root_keeps_three_capabilities_and_no_way_back() -> Result<()> {
    let bed = Bed::start(&["--link", "sat0,rate=50mbit,rtt=100ms"])?;
    assert_confined(&bed.daemon)?;
    bed.splits()?;
    // Threads for work that blocks are started when there is some.
    assert_confined(&bed.daemon)?;
    let log = bed.daemon.terminate()?.log;
    assert!(!log.contains("WARN"), "{log}");
    Ok(())
}

#[test]
fn another_user_is_become_and_works() -> Result<()> {
    let network = Network::new()?;
    let before = Footprint::of(&network.topology.gateway)?;
    let daemon = network.start(&["--user", "nobody"])?;
    assert_confined(&daemon)?;
    for field in ["Uid", "Gid"] {
        let values = of_all_threads(&daemon, field)?;
        assert!(
            values.iter().all(|value| value == "65534\t65534\t65534\t65534"),
            "{field}: {values:?}"
        );
    }
    network.splits()?;
    assert!(daemon.terminate()?.status.success());
    assert_eq!(Footprint::of(&network.topology.gateway)?, before);
    Ok(())
}

#[test]
fn unknown_user_is_named() -> Result<()> {
    let topology = Topology::new()?;
    let exit = Daemon::expect_failure(&topology.gateway, &["-i", "lan0", "--user", "nosuch"])?;
    assert_eq!(
        exit.log.trim_end(),
        "pepsal: user nosuch: there is no such user: create it, or leave --user out"
    );
    Ok(())
}

/// A service manager's end of sd_notify(3).
struct NotifySocket {
    socket: UnixDatagram,
    folder: TempDir,
}

impl NotifySocket {
    fn new() -> Result<Self> {
        let folder = TempDir::new()?;
        let socket = UnixDatagram::bind(folder.path().join("notify"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, folder })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("notify")
    }

    fn daemon(&self, topology: &Topology, arguments: &[&str]) -> Result<Daemon> {
        let mut command = Daemon::command(&topology.gateway, arguments)?;
        command.env("NOTIFY_SOCKET", self.path());
        Daemon::start_command(command)
    }

    /// The next message, one assignment to a line.
    fn message(&self) -> Result<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).context("no word from the daemon")?;
        Ok(String::from_utf8(buffer[..length].to_vec())?)
    }

    /// Whether a message comes that has this line; those before it are forgotten.
    fn says(&self, line: &str) -> bool {
        while let Ok(message) = self.message() {
            if message.lines().any(|said| said == line) {
                return true;
            }
        }
        false
    }
}

#[test]
fn service_manager_hears_of_start_flows_life_and_stop() -> Result<()> {
    let network = Network::new()?;
    let manager = NotifySocket::new()?;
    let daemon = manager.daemon(&network.topology, &[BOTH, &["--drain-timeout", "3s"]].concat())?;
    assert_eq!(manager.message()?.trim_end(), "READY=1", "is said first");
    assert!(manager.says("STATUS=0 open flows"));
    let flow = network.open(Family::V4)?;
    assert!(manager.says("STATUS=1 open flow"));
    drop(flow);
    assert!(manager.says("STATUS=0 open flows"));
    for _ in 0..3 {
        assert_eq!(manager.message()?.trim_end(), "WATCHDOG=1");
    }
    assert!(daemon.terminate()?.status.success());
    let mut message = manager.message()?;
    while message.starts_with("WATCHDOG=1") {
        message = manager.message()?;
    }
    assert_eq!(message.trim_end(), "STOPPING=1\nEXTEND_TIMEOUT_USEC=13000000");
    Ok(())
}

#[test]
fn hung_daemon_gives_the_watchdog_no_sign_of_life() -> Result<()> {
    let topology = Topology::new()?;
    let manager = NotifySocket::new()?;
    let daemon = manager.daemon(&topology, BOTH)?;
    assert!(manager.says("WATCHDOG=1"));
    daemon.signal(Signal::SIGSTOP)?;
    manager
        .socket
        .set_read_timeout(Some(Duration::from_millis(1500)))?;
    eventually(PATIENCE, || manager.message().is_err());
    daemon.signal(Signal::SIGCONT)?;
    assert!(manager.says("WATCHDOG=1"));
    Ok(())
}

#[test]
fn without_a_service_manager_that_listens_nothing_is_amiss() -> Result<()> {
    let network = Network::new()?;
    let mut command = Daemon::command(&network.topology.gateway, BOTH)?;
    command.env("NOTIFY_SOCKET", "/nosuch/socket");
    let daemon = Daemon::start_command(command)?;
    network.splits()?;
    assert!(daemon.terminate()?.status.success());
    Ok(())
}

/// A copy of the daemon's program in a folder of its own, which can be replaced as a package manager does it.
struct Program {
    original: PathBuf,
    path: PathBuf,
    _folder: TempDir,
}

impl Program {
    fn new(command: &Command) -> Result<Self> {
        let folder = TempDir::new()?;
        let program = Self {
            original: command.get_program().into(),
            path: folder.path().join("pepsal"),
            _folder: folder,
        };
        program.replace()?;
        Ok(program)
    }

    fn replace(&self) -> Result<()> {
        let new = self.path.with_extension("new");
        fs::copy(&self.original, &new)?;
        Ok(fs::rename(new, &self.path)?)
    }

    /// `pepsal reload`, as the service manager would run it.
    fn reload(&self, topology: &Topology, manager: &NotifySocket, daemon: &Daemon) -> Result<()> {
        let mut reload = topology.gateway.command(&self.path);
        reload
            .args(["reload", &daemon.pid().to_string()])
            .env("NOTIFY_SOCKET", manager.path());
        ensure!(reload.status()?.success(), "the reload failed");
        Ok(())
    }
}

/// A process that is ended with the test.
struct Process(Pid);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGTERM);
        eventually(PATIENCE, || kill(self.0, None).is_err());
    }
}

#[test]
fn reload_has_the_same_program_read_again_and_another_one_take_over() -> Result<()> {
    let network = Network::new()?;
    let Network { topology, server, .. } = &network;
    let before = Footprint::of(&topology.gateway)?;
    let manager = NotifySocket::new()?;
    let template = Daemon::command(&topology.gateway, BOTH)?;
    let program = Program::new(&template)?;
    let mut command = topology.gateway.command(&program.path);
    command
        .args(template.get_args())
        .env("NOTIFY_SOCKET", manager.path());
    let daemon = Daemon::start_command(command)?;

    program.reload(topology, &manager, &daemon)?;
    daemon.wait_for_log("nothing to reload")?;

    program.replace()?;
    let open = Session::open(
        &Connector::default(),
        &topology.client,
        server.address(Family::V4),
        &Cancel::default(),
    )?;
    program.reload(topology, &manager, &daemon)?;
    daemon.wait_for_log("takeover by process")?;
    let named = loop {
        let message = manager.message()?;
        if let Some(process) = message.lines().find_map(|line| line.strip_prefix("MAINPID=")) {
            break Process(Pid::from_raw(process.parse()?));
        }
    };
    assert!(manager.says("READY=1"), "the successor speaks for itself");
    let (_, intact) = open.download(100_000, 1)?;
    assert!(intact, "the flow that was open goes on");
    network.splits()?;
    drop(open);
    assert!(
        daemon.wait()?.status.success(),
        "the first ends with its last flow"
    );
    network.splits()?;
    drop(named);
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

/// The values of a key of the unit, of all its lines.
fn unit(key: &str) -> Result<Vec<String>> {
    let unit = fs::read_to_string(UNIT).context(UNIT)?;
    let values: Vec<String> = unit
        .lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .flat_map(|value| value.split(' ').map(str::to_owned))
        .collect();
    ensure!(!values.is_empty(), "{UNIT} has no {key}=");
    Ok(values)
}

#[test]
fn unit_restarts_a_daemon_however_often_it_crashes() -> Result<()> {
    assert_eq!(unit("Restart")?, ["on-failure"]);
    assert_eq!(unit("StartLimitIntervalSec")?, ["0"]);
    Ok(())
}

/// A daemon's command as the unit's user would have it: no root, the unit's capabilities and not one more.
fn as_service(namespace: &Namespace, arguments: &[&str]) -> Result<Command> {
    let added: String = unit("AmbientCapabilities")?
        .iter()
        .map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let user = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "--no-new-privs",
    ];
    let sets = ["inh-caps", "ambient-caps", "bounding-set"].map(|set| format!("--{set}=-all{added}"));
    Daemon::command_by(
        namespace,
        &[&user.map(str::to_owned)[..], &sets].concat(),
        arguments,
    )
}

#[test]
fn unit_s_capabilities_are_enough_for_a_user_other_than_root() -> Result<()> {
    assert_eq!(unit("AmbientCapabilities")?, unit("CapabilityBoundingSet")?);
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let before = Footprint::of(gateway)?;
    let link = ["--link", "sat0,rate=50mbit,rtt=100ms"];
    let daemon = Daemon::start_command(as_service(gateway, &[BOTH, &link].concat())?)?;
    assert_confined(&daemon)?;
    network.splits()?;
    assert!(daemon.terminate()?.status.success());
    assert_eq!(Footprint::of(gateway)?, before);
    Ok(())
}

/// System calls of a set of systemd's, with those of the sets in it.
fn system_calls(set: &str) -> Result<BTreeSet<String>> {
    let mut calls = BTreeSet::new();
    let listed = analyze(&["syscall-filter".as_ref(), "--no-pager".as_ref(), set.as_ref()])?;
    // The first line repeats the name.
    for line in listed.lines().skip(1).map(str::trim) {
        match line.split_whitespace().next() {
            Some(inner) if inner.starts_with('@') => calls.extend(system_calls(inner)?),
            Some(call) if call != "#" => {
                calls.insert(call.to_owned());
            }
            _ => {}
        }
    }
    Ok(calls)
}

/// What the daemon's own filter allows, by its source.
const FILTER: &str = include_str!("../../pepsal/src/daemon/privileges/filter.rs");

#[test]
fn unit_allows_every_system_call_that_the_daemon_s_own_filter_does() -> Result<()> {
    let unit = fs::read_to_string(UNIT).context(UNIT)?;
    let mut allowed = BTreeSet::new();
    for line in unit
        .lines()
        .filter_map(|line| line.strip_prefix("SystemCallFilter="))
    {
        let (refused, words) = match line.strip_prefix('~') {
            Some(words) => (true, words),
            None => (false, line),
        };
        for word in words.split(' ') {
            let calls = match word.starts_with('@') {
                true => system_calls(word)?,
                false => BTreeSet::from([word.to_owned()]),
            };
            match refused {
                true => allowed.retain(|call| !calls.contains(call)),
                false => allowed.extend(calls),
            }
        }
    }
    let missing: Vec<&str> = FILTER
        .split("libc::SYS_")
        .skip(1)
        .filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
        })
        .filter(|call| !allowed.contains(*call))
        .collect();
    assert_eq!(missing, [] as [&str; 0], "the unit refuses what the daemon uses");
    Ok(())
}

/// Exposure as systemd-analyze(1) counts it, from 0 to 10: what is above is called "medium".
const EXPOSURE_LIMIT_TENTHS: &str = "30";

#[test]
fn unit_is_valid_and_little_exposed() -> Result<()> {
    let folder = TempDir::new()?;
    let copy = folder.path().join("pepsal.service");
    // The daemon and the manual pages are not installed here.
    let here: String = fs::read_to_string(UNIT)?
        .lines()
        .filter(|line| !line.starts_with("Documentation="))
        .map(|line| line.replace("/usr/bin/pepsal ", "/bin/true ") + "\n")
        .collect();
    fs::write(&copy, here)?;
    assert_eq!(analyze(&["verify".as_ref(), &copy])?, "");
    let security = [
        "security".as_ref(),
        "--offline=true".as_ref(),
        "--no-pager".as_ref(),
        "--threshold".as_ref(),
        EXPOSURE_LIMIT_TENTHS.as_ref(),
        copy.as_path(),
    ];
    println!("{}", analyze(&security)?);
    Ok(())
}

/// What systemd-analyze says; an error when it fails.
fn analyze(arguments: &[&Path]) -> Result<String> {
    let output = Command::new("systemd-analyze")
        .args(arguments)
        .output()
        .context("cannot run systemd-analyze")?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(
        output.status.success(),
        "systemd-analyze: {}\n{said}",
        output.status
    );
    Ok(said)
}

/// A field of a file like proc_pid_status(5).
fn field_of(status: &Path, field: &str) -> Result<String> {
    let status = fs::read_to_string(status)?;
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .with_context(|| format!("{field} in {status}"))?;
    Ok(value.trim().to_owned())
}

/// A field of proc_pid_status(5), for each of a daemon's threads.
fn of_all_threads(daemon: &Daemon, field: &str) -> Result<Vec<String>> {
    let mut values = Vec::new();
    for thread in fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        values.push(field_of(&thread?.path().join("status"), field)?);
    }
    ensure!(values.len() > 1, "a daemon has more than one thread");
    Ok(values)
}

fn assert_confined(daemon: &Daemon) -> Result<()> {
    let own: u32 = field_of(Path::new("/proc/self/status"), "Seccomp_filters")?.parse()?;
    // That until the programs are loaded, and that from then on.
    let filters = (own + 2).to_string();
    for (field, expected) in [
        ("CapEff", THREE),
        ("CapPrm", THREE),
        ("CapBnd", THREE),
        ("CapInh", NONE),
        ("CapAmb", NONE),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Seccomp_filters", &filters),
    ] {
        let values = of_all_threads(daemon, field)?;
        assert!(
            values.iter().all(|value| value == expected),
            "{field}: {values:?}"
        );
    }
    Ok(())
}
