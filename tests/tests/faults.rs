//! What becomes of connections when something around the daemon breaks. The table is in docs/reliability.md.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::path::PathBuf;
use std::process::{self, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pepsal_tests::{
    BOTH, Bed, Connection, Connector, Daemon, Family, Footprint, Hook, Listener, Network, PATIENCE, Path,
    Server, Topology, Transfer, count_programs, detach_programs, eventually, patience,
};

#[test]
fn device_that_somebody_removes_is_back_within_a_second() -> Result<()> {
    let bed = Bed::start(&[])?;
    let gateway = &bed.topology.gateway;
    let intact = Footprint::of(gateway)?;
    for what in [
        "delete pepsal-c0",
        "delete pepsal-s0",
        "set pepsal-c0 down",
        "set pepsal-s0 down",
    ] {
        let connections = [bed.open(Family::V4)?, bed.open(Family::V6)?];
        gateway.ip(format!("link {what}"))?;
        let start = Instant::now();
        eventually(PATIENCE, || Footprint::of(gateway).is_ok_and(|now| now == intact));
        let time = start.elapsed();
        assert!(time < patience(Duration::from_secs(1)), "{what}: {time:?}");
        for connection in &connections {
            connection.exchange().with_context(|| what.to_owned())?;
        }
        bed.splits().with_context(|| what.to_owned())?;
    }
    Ok(())
}

/// Where there is no tcx, filters go with their qdisc, and the daemon is not notified of single ones.
#[test]
fn program_that_somebody_detaches_is_back_within_a_second() -> Result<()> {
    let bed = Bed::start(&[])?;
    let gateway = &bed.topology.gateway;
    let [clients, servers] = bed.daemon.namespaces()?;
    for (namespace, interface, hook) in [
        (gateway, "lan0", Hook::Ingress),
        (gateway, "lan0", Hook::Egress),
        (gateway, "pepsal-c0", Hook::Ingress),
        (gateway, "pepsal-s0", Hook::Ingress),
        (&clients, "wire0", Hook::Egress),
        (&servers, "wire0", Hook::Egress),
    ] {
        let connection = bed.open(Family::V4)?;
        assert_eq!(
            detach_programs(namespace, interface, hook)?,
            1,
            "{interface} {hook:?}"
        );
        let start = Instant::now();
        eventually(PATIENCE, || {
            count_programs(namespace, interface, hook).is_ok_and(|count| count == 1)
        });
        let time = start.elapsed();
        assert!(
            time < patience(Duration::from_secs(1)),
            "{interface} {hook:?}: {time:?}"
        );
        connection
            .exchange()
            .with_context(|| format!("{interface} {hook:?}"))?;
        assert_eq!(bed.probe(Family::V6)?, Path::Split, "{interface} {hook:?}");
    }
    Ok(())
}

#[test]
fn interface_that_is_made_anew_a_hundred_times_is_intercepted_each_time() -> Result<()> {
    let bed = Bed::start(&["--link", "lan0,rate=50mbit,rtt=20ms"])?;
    let topology = &bed.topology;
    let is_split = || bed.probe(Family::V4).is_ok_and(|path| path == Path::Split);
    for round in 0..100 {
        topology.gateway.ip("link delete lan0")?;
        topology.reconnect_client()?;
        if round % 33 == 0 {
            eventually(PATIENCE, is_split);
        }
    }
    eventually(PATIENCE, is_split);
    assert!(bed.daemon.terminate()?.status.success());
    Ok(())
}

#[test]
fn without_descriptors_new_flows_wait_and_open_ones_go_on() -> Result<()> {
    let bed = Bed::start(&[])?;
    let daemon = &bed.daemon;
    let open = bed.open(Family::V4)?;

    // Only descriptors below the limit are given out, and those are standard input, output and error.
    limit_descriptors(daemon, "3:20000")?;
    // The kernel completes the handshake; the daemon cannot accept.
    let client = Connector::default().connect(&bed.topology.client, bed.address(Family::V4))?;
    daemon.wait_for_log("cannot accept")?;
    open.exchange()?;

    limit_descriptors(daemon, "20000:20000")?;
    let late = Connection::new(client, bed.listener(Family::V4).accept(PATIENCE)?);
    late.split()?.exchange()
}

/// Has debug builds panic or hang at a place when a connection to another listener comes by.
fn with_fault(fault: &str, place: &str) -> Result<(Bed, Listener)> {
    let network = Network::new()?;
    let listener = network.another_listener(Family::V4)?;
    let mut command = Daemon::command(&network.topology.gateway, BOTH)?;
    command.env(fault, format!("{place}:{}", listener.port()));
    let daemon = Daemon::start_command(command)?;
    Ok((Bed { daemon, network }, listener))
}

#[test]
fn hung_worker_lets_new_connections_pass() -> Result<()> {
    let (bed, listener) = with_fault("PEPSAL_HANG", "flow")?;
    assert_eq!(bed.probe(Family::V4)?, Path::Split);
    // Every connection to this port hangs the worker that gets it, until they pass.
    let address = listener.at(Family::V4.server());
    let _stuck = listener.wait_until_forwarded(&bed.topology.client, address);
    bed.daemon.signal(Signal::SIGKILL)?;
    bed.daemon.wait()?;
    Ok(())
}

#[test]
fn panic_of_a_flow_resets_that_one_and_is_counted() -> Result<()> {
    let (bed, listener) = with_fault("PEPSAL_PANIC", "flow")?;
    let other = bed.open(Family::V4)?;
    for _ in 0..3 {
        let connection = bed.open_to(&Connector::default(), &listener)?;
        for mut end in [&connection.client, &connection.server] {
            let read = end.read(&mut [0]);
            let error = read.expect_err("neither an end nor data");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    other.exchange()?;
    assert_eq!(bed.probe(Family::V6)?, Path::Split);
    drop(other);
    let exit = bed.daemon.terminate()?;
    assert_eq!(exit.code(), Some(0), "{}", exit.log);
    assert_eq!(exit.counter("panicked"), 3, "{}", exit.log);
    assert_eq!(exit.log.matches("internal error").count(), 3, "{}", exit.log);
    Ok(())
}

#[test]
fn panic_of_the_daemon_ends_it_and_new_connections_pass() -> Result<()> {
    let (bed, listener) = with_fault("PEPSAL_PANIC", "accept")?;
    let open = bed.open(Family::V4)?;
    let address = listener.at(Family::V4.server());
    let client = Connector::default().connect(&bed.topology.client, address)?;
    let exit = bed.daemon.wait()?;
    assert_eq!(exit.code(), Some(101), "{}", exit.log);
    for mut end in [&client, &open.client, &open.server] {
        let error = end.read(&mut [0]).expect_err("neither an end nor data");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(bed.network.probe(Family::V4)?, Path::Forwarded);
    Ok(())
}

/// A control group whose memory can be limited, of either version; empty again, it is removed.
struct MemoryGroup {
    path: PathBuf,
    is_v2: bool,
}

impl MemoryGroup {
    fn new() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = |is_wanted: fn(&str, &str) -> bool| {
            mounts
                .lines()
                .find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
                    [_, mount, kind, options, ..] if is_wanted(kind, options) => Some(PathBuf::from(mount)),
                    _ => None,
                })
        };
        let v1 = mount(|kind, options| kind == "cgroup" && options.split(',').any(|one| one == "memory"));
        let is_v2 = v1.is_none();
        let root = v1.or_else(|| mount(|kind, _| kind == "cgroup2"));
        let root = root.context("no control groups are mounted")?;
        if is_v2 {
            fs::write(root.join("cgroup.subtree_control"), "+memory").context("memory control")?;
        }
        let path = root.join(format!("pepsal-test-{}", process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self { path, is_v2 })
    }

    /// Starts a daemon in it.
    fn start(&self, topology: &Topology, arguments: &[&str]) -> Result<Daemon> {
        let group = self.path.join("cgroup.procs");
        let enter = ["-c", "echo 0 >\"$0\" && exec \"$@\""].map(OsStr::new);
        let by = [&[OsStr::new("sh")], &enter[..], &[group.as_os_str()]].concat();
        let command = Daemon::command_by(&topology.gateway, &by, arguments)?;
        Daemon::start_command(command)
    }

    /// Allows so many bytes more than are used now.
    fn limit_to_now_and(&self, more: u64) -> Result<()> {
        let (used, limit) = match self.is_v2 {
            true => ("memory.current", "memory.max"),
            false => ("memory.usage_in_bytes", "memory.limit_in_bytes"),
        };
        let used: u64 = fs::read_to_string(self.path.join(used))?.trim().parse()?;
        fs::write(self.path.join(limit), (used + more).to_string()).context("limit of memory")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // What has just been killed may still be leaving.
        eventually(PATIENCE, || fs::remove_dir(&self.path).is_ok());
    }
}

#[test]
fn without_memory_the_daemon_is_killed_and_new_connections_pass() -> Result<()> {
    let network = Network::new()?;
    let group = MemoryGroup::new()?;
    let daemon = group.start(&network.topology, BOTH)?;
    let downloading = network.open(Family::V4)?;
    let server = downloading.server.try_clone()?;
    let sender = thread::spawn(move || while (&server).write_all(&[7; 65_536]).is_ok() {});
    group.limit_to_now_and(1 << 20)?;
    let listener = network.another_listener(Family::V4)?;
    let address = listener.at(Family::V4.server());
    let mut open = vec![downloading.client];
    loop {
        // The kernel answers, and then the daemon has to have memory for it.
        open.push(Connector::default().connect(&network.topology.client, address)?);
        match listener.accept(Duration::from_secs(1)) {
            Ok(accepted) if accepted.path() == Path::Split => {}
            _ => break,
        }
        ensure!(open.len() < 2000, "a MiB holds more than {} flows", open.len());
    }
    let exit = daemon.wait()?;
    assert_eq!(exit.signal(), Some(Signal::SIGKILL as i32), "{}", exit.log);
    assert_eq!(network.probe(Family::V4)?, Path::Forwarded);
    // All that has come, and then no end.
    let end = io::copy(&mut open[0], &mut io::sink());
    assert_eq!(end.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    sender.join().expect("no panic");
    Ok(())
}

#[test]
fn flows_outlive_an_interface_that_goes_down_and_up() -> Result<()> {
    let bed = Bed::start(&[])?;
    let gateway = &bed.topology.gateway;
    gateway.sysctl("net.ipv6.conf.all.keep_addr_on_down", 1)?;
    for name in ["lan0", "sat0"] {
        for family in Family::BOTH {
            let connection = bed.open(family)?;
            gateway.ip(format!("link set {name} down"))?;
            gateway.ip(format!("link set {name} up"))?;
            connection
                .exchange()
                .with_context(|| format!("{name} {family:?}"))?;
            assert_eq!(bed.probe(family)?, Path::Split, "{name} {family:?}");
        }
    }
    Ok(())
}

#[test]
fn renamed_interface_is_not_intercepted_and_its_flows_go_on() -> Result<()> {
    let bed = Bed::start(&[])?;
    let gateway = &bed.topology.gateway;
    gateway.sysctl("net.ipv6.conf.all.keep_addr_on_down", 1)?;
    let rename = |from: &str, to: &str| {
        gateway.ip(format!(
            "link set {from} down\nlink set {from} name {to}\nlink set {to} up"
        ))
    };
    let connection = bed.flow(Family::V4)?;
    rename("lan0", "lan1")?;
    bed.daemon.wait_for_log("now=\"sat0\"")?;
    connection.exchange().context("under another name")?;
    assert_eq!(bed.probe(Family::V4)?, Path::Forwarded);
    rename("lan1", "lan0")?;
    eventually(PATIENCE, || {
        bed.probe(Family::V4).is_ok_and(|path| path == Path::Split)
    });
    connection.exchange().context("under its name again")
}

#[test]
fn a_clients_network_may_go_and_the_daemon_works_on() -> Result<()> {
    let Topology {
        client,
        gateway,
        server,
        ..
    } = Topology::new()?;
    let daemon = Daemon::start(&gateway, &["-i", "lan0", "-i", "sat0", "--drain-timeout", "1s"])?;
    let listener = Server::start(&server)?;
    assert!(
        Transfer::upload(100_000)
            .run(&client, listener.address(Family::V4))?
            .intact
    );
    drop(listener);
    // Its end of the link goes with it, and the gateway's.
    drop(client);
    eventually(PATIENCE, || gateway.ip("link show lan0").is_err());
    eventually(PATIENCE, || daemon.log().contains("now=\"sat0\""));
    let exit = daemon.terminate()?;
    assert_eq!(exit.code(), Some(0), "{}", exit.log);
    Ok(())
}

fn limit_descriptors(daemon: &Daemon, limit: &str) -> Result<()> {
    let mut prlimit = Command::new("prlimit");
    prlimit.args(["--pid", &daemon.pid().to_string(), &format!("--nofile={limit}")]);
    ensure!(prlimit.status()?.success(), "prlimit --nofile={limit}");
    Ok(())
}
