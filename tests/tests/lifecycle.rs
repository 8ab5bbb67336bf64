//! How the daemon starts, refuses to start, and stops.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use pepsal_tests::{
    BOTH, Bed, Daemon, Family, Footprint, LAN, Namespace, Network, PATIENCE, Path, Server, Topology,
    Transfer, eventually,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::NamedTempFile;

#[test]
fn bad_arguments_are_one_line_and_leave_nothing_behind() -> Result<()> {
    let topology = Topology::new()?;
    let cases: &[(&[&str], &str)] = &[
        (&["-i", "nosuch0"], "pepsal: interface nosuch0: no such interface"),
        (&["-i", "lan0", "-i", "nosuch0"], "present are lan0, sat0"),
        (&["-i", "lo"], "pepsal: interface lo: no such interface"),
        (&["-i", ""], "pepsal: interface : no such interface"),
        (
            &["-i", "lan0", "--only", "10.0.0.0/33"],
            "'10.0.0.0/33' is not an IPv4 or IPv6 prefix",
        ),
        (
            &["-i", "lan0", "--bypass", "fd00::/129"],
            "'fd00::/129' is not an IPv4 or IPv6 prefix",
        ),
        (
            &["-i", "lan0", "--bypass", "port=90-80"],
            "'90-80' is not a port or a range of ports",
        ),
        (
            &["-i", "lan0", "--bypass", "10.0.0.0/8:65536"],
            "'65536' is not a port",
        ),
        (
            &["-i", "lan0", "-c", "0"],
            "invalid value '0' for '--max-connections <N>'",
        ),
        (
            &["-i", "lan0", "--conns-per-client", "many"],
            "'many' is no number of connections: give 1 to 1000000, or 0 for no bound",
        ),
        (
            &["-i", "lan0", "-p", "0"],
            "invalid value '0' for '--port <PORT>'",
        ),
        (
            &["-i", "lan0", "-p", "65536"],
            "invalid value '65536' for '--port <PORT>'",
        ),
        (&["-i", "lan0", "--mark", "0"], "a mark of zero marks nothing"),
        (
            &["-i", "lan0", "--mark", "0x3/0x1"],
            "value 0x3 has bits outside mask 0x1",
        ),
        (&["-i", "lan0", "--mark", "0x1ffffffff"], "is not a 32-bit number"),
        (
            &["-i", "lan0", "--table", "254"],
            "flows stay in the forwarding path of the host and need no routing table: leave it out",
        ),
        (&["-i", "lan0", "-g", "soon"], "'soon' is not a time"),
        (
            &["-i", "lan0", "-l", "/nosuch/table"],
            "pepsal: cannot write the flow table to /nosuch/table: No such file",
        ),
        (
            &["-i", "lan0", "-m", "20"],
            "invalid value '20' for '--max-segment-size <MSS>'",
        ),
        (&["-i", "lan0", "-k", "-n"], "cannot be used with"),
        (
            &["-i", "lan0", "--connect-timeout", "0s"],
            "'0s' is too short: give a time above 0",
        ),
        (
            &["-i", "lan0", "--metrics-listen", "300.0.0.1:80"],
            "'300.0.0.1:80' is no place to listen: give ADDRESS:PORT",
        ),
        (
            &["-i", "lan0", "--metrics-listen", "192.0.2.9:80"],
            "pepsal: metrics: cannot listen at 192.0.2.9:80: Cannot assign requested address",
        ),
        (
            &["-i", "lan0", "--metrics-listen", "unix:/etc/passwd"],
            "pepsal: metrics: /etc/passwd exists and is not a socket",
        ),
        (
            &["-i", "lan0", "--admin-socket", "/nosuch/pepsal.sock"],
            "pepsal: admin socket (--admin-socket): cannot listen at /nosuch/pepsal.sock: No such file",
        ),
        (
            &["-i", "lan0", "--link", "nosuch0,rate=1mbit,rtt=1ms"],
            "pepsal: --link nosuch0: there is no interface of that name",
        ),
        (
            &["-i", "lan0", "--link", "sat0,rate=50,rtt=1ms"],
            "rate: '50' is not a rate: give a number with kbit, mbit or gbit",
        ),
        (
            &["-i", "lan0", "-F", "/nosuch.toml"],
            "/nosuch.toml: cannot be read: No such file",
        ),
        (
            &["-i", "lan0", "-F", "/etc"],
            "/etc: cannot be read: Is a directory",
        ),
        (
            &["-i", "lan0", "-M", "999999999"],
            "pepsal: monitoring-pid 999999999: there is no such process: start the monitor first",
        ),
        (
            &["reload", "999999999"],
            "pepsal: process 999999999: no such process, or no permission to read",
        ),
    ];
    for (arguments, complaint) in cases {
        let line = refusal(&topology.gateway, arguments)?;
        assert!(line.contains(complaint), "{arguments:?}: {line}");
    }
    Ok(())
}

#[test]
fn an_interface_has_to_be_named() -> Result<()> {
    let exit = Daemon::expect_failure(&Namespace::new("gateway")?, &[])?;
    assert!(
        exit.log.contains("required arguments were not provided"),
        "{}",
        exit.log
    );
    assert!(exit.log.contains("--interface <INTERFACE>"), "{}", exit.log);
    Ok(())
}

#[test]
fn unknown_congestion_control_lists_those_available() -> Result<()> {
    let topology = Topology::new()?;
    for option in ["-C", "--client-congestion", "--server-congestion"] {
        let line = refusal(&topology.gateway, &["-i", "lan0", option, "nosuch"])?;
        assert!(
            line.starts_with("pepsal: congestion control 'nosuch' is unknown to this kernel"),
            "{line}"
        );
        let available = line.split("available are ").nth(1).context("a list")?;
        assert!(available.split(", ").any(|name| name == "reno"), "{line}");
    }
    Ok(())
}

const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"];

/// A daemon's command with only some capabilities.
fn with_capabilities(namespace: &Namespace, capabilities: &str) -> Result<Command> {
    let inherited = format!("--inh-caps=-all{capabilities}");
    let bounding = format!("--bounding-set=-all{capabilities}");
    Daemon::command_by(namespace, &["setpriv", &inherited, &bounding], BOTH)
}

#[test]
fn missing_capabilities_are_named() -> Result<()> {
    let topology = Topology::new()?;
    let before = Footprint::of(&topology.gateway)?;
    for (has, lacks) in [
        (
            "",
            "missing CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN: ",
        ),
        (
            ",+net_bind_service,+net_admin,+sys_admin",
            "missing CAP_NET_RAW: ",
        ),
        (
            ",+net_bind_service,+net_raw,+sys_admin",
            "missing CAP_NET_ADMIN: ",
        ),
        (
            ",+net_bind_service,+net_admin,+net_raw,+perfmon,+bpf",
            "missing CAP_SYS_ADMIN: ",
        ),
    ] {
        let output = with_capabilities(&topology.gateway, has)?.output()?;
        let line = one_line(&String::from_utf8(output.stderr)?)?;
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert!(line.starts_with(&format!("pepsal: {lacks}")), "{line}");
    }
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

#[test]
fn what_a_user_may_not_touch_is_named() -> Result<()> {
    let topology = Topology::new()?;
    let before = Footprint::of(&topology.gateway)?;
    let secret = NamedTempFile::new()?;
    fs::write(&secret, "interfaces = [\"lan0\"]\n")?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
    let path = secret.path().to_str().context("a path of ASCII")?;
    for (arguments, complaint) in [
        (
            vec!["--user", "nobody", "--admin-socket", "/etc/pepsal-test.sock"],
            "cannot listen at /etc/pepsal-test.sock: Permission denied",
        ),
        (
            vec![
                "--user",
                "nobody",
                "--metrics-listen",
                "unix:/etc/pepsal-test.sock",
            ],
            "metrics: cannot listen at /etc/pepsal-test.sock: Permission denied",
        ),
        (
            vec!["--user", "nobody", "-l", path],
            "cannot write the flow table to",
        ),
    ] {
        let line = refusal(
            &topology.gateway,
            &[vec!["-i", "lan0"], arguments.clone()].concat(),
        )?;
        assert!(
            line.contains(complaint) && !line.contains("interface"),
            "{arguments:?}: {line}"
        );
    }
    let output = Daemon::command_by(&topology.gateway, &AS_NOBODY, &["-F", path])?.output()?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(
        said,
        format!("{path}: cannot be read: Permission denied (os error 13)\n")
    );
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

#[test]
fn six_capabilities_are_enough() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let before = Footprint::of(gateway)?;
    let six = ",+net_bind_service,+net_admin,+net_raw,+perfmon,+bpf,+sys_admin";
    let daemon = Daemon::start_command(with_capabilities(gateway, six)?)?;
    network.splits()?;
    assert!(daemon.terminate()?.status.success());
    assert_eq!(Footprint::of(gateway)?, before);
    Ok(())
}

#[test]
fn second_instance_on_the_same_interface_is_refused_and_the_first_works_on() -> Result<()> {
    let bed = Bed::start(LAN)?;
    let pid = bed.daemon.pid();
    let complaint = format!(
        "pepsal: interface lan0: another pepsal (process {pid}) intercepts it already: stop that one first, or take over \
         from it with --takeover"
    );
    let line = refusal(&bed.topology.gateway, &["-i", "sat0", "-i", "lan0"])?;
    assert!(line.starts_with(&complaint), "{line}");
    assert_eq!(bed.probe(Family::V4)?, Path::Split);
    Ok(())
}

#[test]
fn claim_of_a_killed_instance_is_free_at_once() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    network.start(LAN)?.kill()?;
    assert!(gateway.claim("lan0")?.exists(), "only its lock is gone");
    let second = network.start(LAN)?;
    let owner = owner_of_lan0(gateway).map(Pid::as_raw);
    assert_eq!(owner, Some(second.pid().cast_signed()));
    assert_eq!(network.probe(Family::V4)?, Path::Split);
    second.terminate()?;
    assert!(!gateway.claim("lan0")?.exists());
    Ok(())
}

/// The names by which earlier versions claimed interfaces and tables, with a listener that never accepts.
fn squat(namespace: &Namespace) -> Result<Vec<UnixStream>> {
    namespace.run(|| {
        let mut held = Vec::new();
        for name in ["pepsal/interface/lan0", "pepsal/table/5000"] {
            let name = SockAddr::unix(format!("\0{name}"))?;
            let listener = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            listener.bind(&name)?;
            listener.listen(0)?;
            let waiting = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            waiting.connect(&name)?;
            held.extend([UnixStream::from(listener), waiting.into()]);
        }
        Ok(held)
    })
}

/// Runs a line of shell as nobody; whether it succeeds.
fn as_nobody(namespace: &Namespace, line: &str) -> Result<bool> {
    let mut command = namespace.command(AS_NOBODY[0]);
    command
        .args(&AS_NOBODY[1..])
        .args(["sh", "-c", line])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok(command.status()?.success())
}

#[test]
fn another_user_can_neither_prevent_a_start_nor_delay_it() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let _squatter = squat(gateway)?;
    // A killed daemon leaves the files that somebody would have to get hold of.
    network.start(LAN)?.kill()?;
    let claim = gateway.claim("lan0")?;
    let claims = claim.parent().context("it lies in a directory")?;
    let (runtime, claims, claim) = (
        gateway.runtime_directory().display(),
        claims.display(),
        claim.display(),
    );
    assert!(
        as_nobody(gateway, &format!("ls {runtime}"))?,
        "the user can run a command"
    );
    for attempt in [
        format!("ls {claims}"),
        format!("flock -n {claim} true"),
        format!(": >> {claim}"),
        format!(": > {claims}/other"),
        format!("mv {claims} {runtime}/other"),
        format!(": > {runtime}/other"),
    ] {
        assert!(!as_nobody(gateway, &attempt)?, "{attempt}");
    }
    let start = Instant::now();
    let daemon = network.start(LAN)?;
    assert!(start.elapsed() < PATIENCE);
    for attempt in [
        format!("flock -n {claim} true"),
        format!(": > {claims}/{}:1", daemon.pid()),
    ] {
        assert!(!as_nobody(gateway, &attempt)?, "{attempt}");
    }
    assert_eq!(network.probe(Family::V4)?, Path::Split);
    Ok(())
}

#[test]
fn runtime_directory_that_another_user_has_is_refused() -> Result<()> {
    let topology = Topology::new()?;
    let runtime = topology.gateway.runtime_directory();
    fs::create_dir(runtime)?;
    std::os::unix::fs::chown(runtime, Some(65534), None)?;
    let line = refusal(&topology.gateway, &["-i", "lan0"])?;
    let complaint = format!(
        "pepsal: {} belongs to another user (id 65534): ",
        runtime.display()
    );
    assert!(line.starts_with(&complaint), "{line}");
    Daemon::start(&topology.gateway, &["-i", "lan0", "--user", "nobody"])?;
    Ok(())
}

#[test]
fn two_instances_on_different_interfaces_coexist_and_stop_apart() -> Result<()> {
    let network = Network::new()?;
    let inside = Server::start(&network.topology.client)?;
    let paths = || -> Result<[Path; 2]> {
        let address = SocketAddr::new(Family::V4.client(), inside.port());
        let inwards = Transfer::upload(100_000).run(&network.topology.server, address)?;
        assert!(inwards.intact);
        Ok([network.probe(Family::V4)?, inwards.path()])
    };
    let first = network.start(LAN)?;
    let second = network.start(&["-i", "sat0"])?;
    assert_eq!(paths()?, [Path::Split, Path::Split]);
    first.terminate()?;
    assert_eq!(paths()?, [Path::Forwarded, Path::Split]);
    let first = network.start(LAN)?;
    assert_eq!(paths()?, [Path::Split, Path::Split]);
    second.kill()?;
    assert_eq!(paths()?, [Path::Split, Path::Forwarded]);
    drop(first);
    Ok(())
}

#[test]
fn help_and_version_are_printed_and_succeed() -> Result<()> {
    let namespace = Namespace::new("gateway")?;
    for (option, expected) in [
        ("-V", format!("pepsal {}\n", env!("CARGO_PKG_VERSION"))),
        ("--version", format!("pepsal {}\n", env!("CARGO_PKG_VERSION"))),
        ("-h", "Usage: pepsal [OPTIONS]".into()),
        ("--help", "Usage: pepsal [OPTIONS]".into()),
    ] {
        let output = Daemon::command(&namespace, &[option])?.output()?;
        assert!(output.status.success(), "{option}");
        let text = String::from_utf8(output.stdout)?;
        assert!(text.contains(&expected), "{option}: {text}");
        assert!(output.stderr.is_empty(), "{option}");
    }
    let output = Daemon::command(&namespace, &["-h"])?.output()?;
    let help = String::from_utf8(output.stdout)?;
    for option in "dvhVpclgtTfnqkCmMsi".chars() {
        assert!(
            help.contains(&format!("  -{option}, --")),
            "-{option} is not in the help"
        );
    }
    Ok(())
}

#[test]
fn sniffer_option_is_accepted_with_a_warning() -> Result<()> {
    let bed = Bed::start(&["-i", "lan0", "-s", "whatever0"])?;
    let log = bed.daemon.log();
    let warning = log
        .lines()
        .find(|line| line.contains("-s is ignored"))
        .context("a warning")?;
    assert!(warning.contains("WARN"), "{warning}");
    assert_eq!(bed.probe(Family::V4)?, Path::Split);
    Ok(())
}

#[test]
fn verbosity_follows_v_unless_rust_log_says_otherwise() -> Result<()> {
    let topology = Topology::new()?;
    for (arguments, variable, has_debug) in [
        (&["-i", "lan0"][..], None, false),
        (&["-i", "lan0", "-v"], None, true),
        (&["-i", "lan0", "-v"], Some(""), true),
        (&["-i", "lan0", "-v"], Some("pepsal=info"), false),
        (&["-i", "lan0"], Some("pepsal::wire=debug,pepsal=info"), true),
    ] {
        let mut command = Daemon::command(&topology.gateway, arguments)?;
        command.envs(variable.map(|directives| ("RUST_LOG", directives)));
        let exit = Daemon::start_command(command)?.terminate()?;
        assert_eq!(
            exit.log.contains("DEBUG"),
            has_debug,
            "{arguments:?} {variable:?}: {}",
            exit.log
        );
    }
    Ok(())
}

#[test]
fn bad_rust_log_is_one_line() -> Result<()> {
    let topology = Topology::new()?;
    let output = Daemon::command(&topology.gateway, BOTH)?
        .env("RUST_LOG", "pepsal=loud")
        .output()?;
    let line = one_line(&String::from_utf8(output.stderr)?)?;
    assert!(
        line.starts_with("pepsal: RUST_LOG=pepsal=loud is not a log filter"),
        "{line}"
    );
    assert_eq!(output.status.code(), Some(1));
    Ok(())
}

#[test]
fn syns_are_logged_from_the_kernel_when_asked_for() -> Result<()> {
    let bed = Bed::start(&["-i", "lan0", "--log-syns"])?;
    for family in Family::BOTH {
        let client = bed.open(family)?.client.local_addr()?;
        // aya-log writes IPv6 addresses in their canonical form and IPv4 ones as mapped.
        let shown = format!(":{} -> ", client.port());
        bed.daemon.wait_for_log(&shown)?;
        let log = bed.daemon.log();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(&shown)).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains(&family.client().to_string()), "{}", lines[0]);
    }
    Ok(())
}

/// The process that has the claim on `lan0` in a namespace, which removes it when it stops.
fn owner_of_lan0(namespace: &Namespace) -> Option<Pid> {
    let claim = namespace.claim("lan0").ok()?;
    Some(Pid::from_raw(
        fs::read_to_string(claim).ok()?.trim().parse().ok()?,
    ))
}

/// Ends a daemon in the background that the test has not ended itself.
struct Background<'a>(&'a Namespace);

impl Drop for Background<'_> {
    fn drop(&mut self) {
        if let Some(pid) = owner_of_lan0(self.0) {
            // It may have gone just now.
            let _ = signal::kill(pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn background_daemon_is_ready_when_the_command_returns_and_stops_on_sigterm() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let before = Footprint::of(gateway)?;
    let log = NamedTempFile::new()?;
    let _background = Background(gateway);
    let status = Daemon::command(gateway, &["-d", "-i", "lan0"])?
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log.reopen()?)
        .status()?;
    assert!(status.success(), "{}", fs::read_to_string(&log)?);
    assert_eq!(network.probe(Family::V4)?, Path::Split, "ready");
    let pid = owner_of_lan0(gateway).context("the daemon holds its interface")?;
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd"))?, PathBuf::from("/"));
    let session = nix::unistd::getsid(Some(pid))?;
    assert_ne!(session, nix::unistd::getsid(None)?, "a session of its own");
    assert_ne!(
        session, pid,
        "no terminal becomes a daemon's that does not lead its session"
    );

    signal::kill(pid, Signal::SIGTERM)?;
    eventually(PATIENCE, || owner_of_lan0(gateway).is_none());
    eventually(PATIENCE, || Footprint::of(gateway).is_ok_and(|now| now == before));
    assert_eq!(network.probe(Family::V4)?, Path::Forwarded);
    let log = fs::read_to_string(&log)?;
    assert!(
        log.contains("packets: "),
        "the log goes on where it was sent: {log}"
    );
    Ok(())
}

#[test]
fn background_daemon_that_cannot_start_says_why_before_the_command_returns() -> Result<()> {
    let topology = Topology::new()?;
    let output = Daemon::command(&topology.gateway, &["-d", "-i", "nosuch0"])?.output()?;
    assert_eq!(output.status.code(), Some(1));
    let line = one_line(&String::from_utf8(output.stderr)?)?;
    assert!(line.starts_with("pepsal: interface nosuch0: "), "{line}");
    Ok(())
}

#[test]
fn flow_table_lists_the_flows_that_are_open() -> Result<()> {
    let table = NamedTempFile::new()?;
    fs::write(&table, "what was there before\n")?;
    let path = table.path().to_str().context("a path of ASCII")?;
    let Bed { daemon, network } = Bed::start(&["-i", "lan0", "-v", "-l", path])?;
    let mut flow = network.flow(Family::V6)?;
    flow.client.write_all(b"up")?;
    flow.server.read_exact(&mut [0; 2])?;

    let ends = [flow.client.local_addr()?, flow.client.peer_addr()?].map(|end| end.to_string());
    // The first asks it to wait for the flow, the second not to.
    daemon.signal(Signal::SIGTERM)?;
    daemon.wait_for_log("stopping: ")?;
    assert!(daemon.terminate()?.status.success());
    let text = fs::read_to_string(&table)?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "what was there before", "{text}");
    assert!(
        lines[1].starts_with("=== ") && lines[1].ends_with(" 1 flows ==="),
        "{text}"
    );
    let columns: Vec<&str> = lines[3].split_whitespace().collect();
    assert_eq!(columns[..3], [&ends[0], &ends[1], "open"], "{text}");
    assert_eq!(columns[7..], ["2", "0"], "bytes up and down: {text}");
    Ok(())
}

#[test]
fn second_signal_stops_at_once_and_resets_what_is_open() -> Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let network = Network::new()?;
        let before = Footprint::of(&network.topology.gateway)?;
        let daemon = network.start(&["-i", "lan0", "--drain-timeout", "1h"])?;
        let mut flow = network.flow(Family::V4)?;
        daemon.signal(signal)?;
        daemon.wait_for_log("stopping: ")?;
        flow.client.write_all(b"still")?;
        flow.server.read_exact(&mut [0; 5])?;

        let start = Instant::now();
        daemon.signal(signal)?;
        assert!(daemon.wait()?.status.success());
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "the drain timeout is an hour"
        );
        for stream in [&mut flow.client, &mut flow.server] {
            assert_eq!(
                stream.read(&mut [0]).expect_err("a reset").kind(),
                ErrorKind::ConnectionReset
            );
        }
        eventually(PATIENCE, || {
            Footprint::of(&network.topology.gateway).is_ok_and(|now| now == before)
        });
    }
    Ok(())
}

#[test]
fn monitor_is_told_when_the_limit_is_near_and_when_it_is_not_any_more() -> Result<()> {
    let network = Network::new()?;
    let script =
        "trap 'echo crowded' USR1; trap 'echo relieved' USR2; echo watching; while :; do sleep 0.05; done";
    let mut monitor = network
        .topology
        .gateway
        .command("sh")
        .args(["-c", script])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut told = BufReader::new(monitor.stdout.take().context("stdout was asked for")?).lines();
    assert_eq!(told.next().context("a line")??, "watching");
    let pid = monitor.id().to_string();
    let daemon = network.start(&["-i", "lan0", "-c", "4", "-M", &pid])?;
    let mut flows = Vec::new();
    for _ in 0..4 {
        flows.push(network.flow(Family::V4)?);
    }
    assert_eq!(told.next().context("a line")??, "crowded");
    flows.pop();
    assert_eq!(told.next().context("a line")??, "relieved");
    drop(daemon);
    monitor.kill()?;
    monitor.wait()?;
    assert!(told.next().is_none(), "each is told once");
    Ok(())
}

#[test]
fn gateway_without_ipv6_serves_ipv4() -> Result<()> {
    let topology = Topology::new()?;
    for scope in ["all", "default"] {
        topology
            .gateway
            .sysctl(&format!("net.ipv6.conf.{scope}.disable_ipv6"), 1)?;
    }
    let before = Footprint::of(&topology.gateway)?;
    let Bed { daemon, network } = Bed::on(topology, &[])?;
    assert_eq!(network.probe(Family::V4)?, Path::Split);
    assert_eq!(daemon.terminate()?.code(), Some(0));
    assert_eq!(Footprint::of(&network.topology.gateway)?, before);
    Ok(())
}

/// Runs the daemon with what it has to refuse, and returns its one line of error.
fn refusal(namespace: &Namespace, arguments: &[&str]) -> Result<String> {
    let before = Footprint::of(namespace)?;
    let exit = Daemon::expect_failure(namespace, arguments)?;
    assert!(exit.code().is_some_and(|code| code != 0), "{:?}", exit.status);
    assert_eq!(
        Footprint::of(namespace)?,
        before,
        "{arguments:?} leaves something behind"
    );
    one_line(&exit.log)
}

/// The one line of an error; clap's errors go on after an empty line with where to find help.
fn one_line(log: &str) -> Result<String> {
    let log = log.split("\n\n").next().unwrap_or_default().trim_end();
    assert!(log.lines().all(|line| !line.contains("panicked")), "{log}");
    assert_eq!(log.lines().count(), 1, "not one line: {log:?}");
    Ok(log.to_owned())
}
