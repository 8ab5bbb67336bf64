//! The configuration file: what it says is what the daemon does, what is wrong with it is said with its place, and what
//! changes in it applies to connections to come.

use std::fs;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use pepsal_tests::{Bed, Connection, Daemon, Family, Footprint, PATIENCE, Path, Side, Topology, eventually};
use tempfile::TempDir;

#[test]
fn daemon_does_what_the_file_says() -> Result<()> {
    let configuration = "interfaces = [\"lan0\"]\nproxy.port = 5321\n[steering]\nbypass = [\"fd00::/8\"]\n\
                         [link.sat0]\nrate = \"20mbit\"\nrtt = \"50ms\"\n[log]\nlevel = \"debug\"\n";
    let scene = Scene::new(configuration, &[])?;
    assert!(scene.is_split(Family::V4)?);
    assert!(!scene.is_split(Family::V6)?, "{}", Family::V6.server());
    let log = scene.daemon.log();
    assert!(
        log.contains("port=5321") && log.contains("20 Mbit/s") && log.contains("DEBUG"),
        "{log}"
    );
    Ok(())
}

#[test]
fn bad_files_are_refused_with_the_place_before_anything_is_touched() -> Result<()> {
    let topology = Topology::new()?;
    let before = Footprint::of(&topology.gateway)?;
    let scratch = Scratch::new("")?;
    let file = scratch.file();
    for (configuration, complaint) in [
        ("interfaces = [\"lan0\"\n", ":1:21: not TOML: "),
        (
            "interfases = [\"lan0\"]\n",
            ":1:1: unknown key 'interfases': did you mean 'interfaces'?",
        ),
        ("interfaces = \"lan0\"\n", ":1:14: interfaces: a list is expected"),
        (
            "\n[link.sat0]\nrate = \"50\"\nrtt = \"600ms\"\n",
            ":3:8: link.sat0.rate: '50' is not a rate: give",
        ),
        (
            "[tcp]\nnodelay = true\ncork = true\n",
            ":3:1: tcp.cork contradicts tcp.nodelay: leave one of them out",
        ),
        (
            "[link.sat0]\nrate = \"5mbit\"\nrtt = \"1s\"\n[link.sat0]\nrate = \"5mbit\"\nrtt = \"1s\"\n",
            ":4:7: 'sat0' is given twice",
        ),
        (
            "interfaces = [\"lan0\"]\nmetrics.listen = 9300\n",
            ":2:18: metrics.listen: '9300' is no place to listen: give ADDRESS:PORT like 127.0.0.1:9300",
        ),
        (
            "interfaces = [\"lan0\"]\nproxy.conns-per-client = -1\n",
            ":2:26: proxy.conns-per-client: '-1' is no number of connections: give 1 to 1000000, or 0 for no bound",
        ),
        (
            "interfaces = [\"lan0\"]\nproxy.connect-timeout = 0\n",
            ":2:25: proxy.connect-timeout: '0' is too short",
        ),
        ("", ": interfaces is missing: name the interfaces"),
        (
            "interfaces = [\"lan0\"]\n[steering]\nonly-from = [\"/nosuch\"]\n",
            "/nosuch: cannot be read: ",
        ),
    ] {
        scratch.write(configuration)?;
        let expected = match complaint.starts_with('/') {
            true => complaint.to_owned(),
            false => format!("{file}{complaint}"),
        };
        let check = Daemon::command(&topology.gateway, &["check", &file])?.output()?;
        let said = String::from_utf8(check.stderr)?;
        assert_eq!(check.status.code(), Some(1), "{configuration:?}");
        assert!(said.starts_with(&expected), "{configuration:?}: {said}");
        let started = Daemon::expect_failure(&topology.gateway, &["-F", &file])?;
        assert_eq!(
            (started.code(), &started.log),
            (Some(1), &said),
            "{configuration:?}"
        );
    }
    assert_eq!(Footprint::of(&topology.gateway)?, before);
    Ok(())
}

/// Every key that the package's file shows, with its table.
fn keys() -> Vec<(String, String)> {
    let shown = include_str!("../../packaging/pepsal.toml");
    let mut table = String::new();
    let mut keys = Vec::new();
    for line in shown.lines().filter_map(|line| line.strip_prefix('#')) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            table = name.to_owned();
        } else if let Some((key, _)) = line.split_once(" = ")
            && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-')
        {
            keys.push((table.clone(), key.to_owned()));
        }
    }
    keys
}

#[test]
fn each_key_is_named_with_its_place_when_it_is_misspelt_or_has_a_value_of_another_kind() -> Result<()> {
    let topology = Topology::new()?;
    let scratch = Scratch::new("")?;
    let file = scratch.file();
    let keys = keys();
    assert!(keys.len() > 40, "{keys:?}");
    for (table, key) in keys {
        // What the file would lack otherwise, before the line in question.
        let (line, start) = match table.as_str() {
            "" => (1, String::new()),
            _ => (3, format!("interfaces = [\"lan0\"]\n[{table}]\n")),
        };
        let name = match table.as_str() {
            "" => key.clone(),
            _ => format!("{table}.{key}"),
        };
        for (wrong, place, complaint) in [
            (format!("{key} = {{ a = 1 }}"), key.len() + 4, name.clone()),
            (
                format!("{key} = 1979-05-27T07:32:00Z"),
                key.len() + 4,
                name.clone(),
            ),
            (
                format!("{key}x = 1"),
                1,
                format!("unknown key '{name}x': did you mean '{name}'?"),
            ),
        ] {
            scratch.write(&format!("{start}{wrong}\n"))?;
            let check = Daemon::command(&topology.gateway, &["check", &file])?.output()?;
            let said = String::from_utf8(check.stderr)?;
            let expected = format!("{file}:{line}:{place}: {complaint}");
            assert_eq!(check.status.code(), Some(1), "{wrong}");
            assert!(
                said.lines().any(|line| line.starts_with(&expected)),
                "{wrong}: no {expected} in {said}"
            );
        }
    }
    Ok(())
}

#[test]
fn check_says_what_a_good_file_asks_for() -> Result<()> {
    let topology = Topology::new()?;
    let scratch = Scratch::new("interfaces = [\"lan0\", \"sat0\"]\nsteering.only = [\"port=80\"]\n")?;
    let file = scratch.file();
    let check = Daemon::command(&topology.gateway, &["check", &file])?.output()?;
    assert!(check.status.success());
    assert_eq!(
        String::from_utf8(check.stdout)?,
        format!("{file}: valid; intercepts on lan0, sat0; selects by one rule\n")
    );
    Ok(())
}

#[test]
fn reload_changes_selection_link_and_log_level_and_leaves_open_flows_alone() -> Result<()> {
    let base = "interfaces = [\"lan0\"]\n";
    let slow = "[link.sat0]\nrate = \"8mbit\"\nrtt = \"20ms\"\n";
    let scene = Scene::new(&format!("{base}{slow}"), &[])?;
    let flow = scene.flow(Family::V4)?;
    flow.exchange()?;
    let pacing = |flow: &Connection, side| -> Result<Option<u64>> {
        Ok(scene.leg(flow, side)?.context("it is there")?.pacing_bps)
    };
    assert_eq!(pacing(&flow, Side::Server)?, Some(7_600_000));

    let fast = "[link.sat0]\nrate = \"80mbit\"\nrtt = \"20ms\"\n";
    let rules = "[log]\nlevel = \"debug\"\n[steering]\nbypass = [\"10.0.0.0/8\"]\n";
    let said = scene.reload(&format!("{base}{fast}{rules}"), "reloaded: ")?;
    for change in [
        "log.level info -> debug",
        "steering.bypass none -> 10.0.0.0/8",
        "link.sat0 rate=8mbit,rtt=20ms -> rate=80mbit,rtt=20ms",
    ] {
        assert!(said.contains(change), "{change}: {said}");
    }
    assert!(!scene.is_split(Family::V4)?);
    assert!(scene.is_split(Family::V6)?);
    scene.daemon.wait_for_log("DEBUG")?;
    flow.exchange()?;
    // The division notices with the next bytes.
    eventually(PATIENCE, || {
        flow.exchange().is_ok() && pacing(&flow, Side::Server).is_ok_and(|pacing| pacing == Some(76_000_000))
    });

    // A link that comes is one for connections to come, and one that goes is none any more.
    let said = scene.reload(
        &format!("{base}[link.lan0]\nrate = \"9mbit\"\nrtt = \"5ms\"\n"),
        "reloaded: ",
    )?;
    assert!(said.contains("link.sat0 rate=80mbit,rtt=20ms -> none"), "{said}");
    assert!(said.contains("link.lan0 none -> rate=9mbit,rtt=5ms"), "{said}");
    let next = scene.flow(Family::V4)?;
    assert_eq!(pacing(&next, Side::Server)?, None);
    assert_eq!(pacing(&next, Side::Client)?, Some(8_550_000));
    next.exchange()?;
    flow.exchange()?;
    drop((flow, next));
    assert_eq!(scene.bed.daemon.terminate()?.code(), Some(0));
    Ok(())
}

#[test]
fn first_link_that_a_reload_adds_has_pepsals_own_congestion_control() -> Result<()> {
    let base = "interfaces = [\"lan0\"]\n";
    let scene = Scene::new(base, &[])?;
    let link = "[link.sat0]\nrate = \"8mbit\"\nrtt = \"20ms\"\n";
    let said = scene.reload(&format!("{base}{link}"), "reloaded: ")?;
    assert!(!said.contains("WARN"), "{said}");
    let flow = scene.flow(Family::V4)?;
    flow.exchange()?;
    let leg = scene.bed.leg(&flow, Side::Server)?.context("the server leg")?;
    let congestion = &leg.congestion;
    assert!(congestion.starts_with("pepsal"), "{congestion}");
    Ok(())
}

#[test]
fn reload_of_a_bad_file_keeps_the_running_configuration() -> Result<()> {
    let good = "interfaces = [\"lan0\"]\nsteering.bypass = [\"10.0.0.0/8\"]\n";
    let scene = Scene::new(good, &[])?;
    let file = scene.scratch.file();
    for (configuration, complaint) in [
        (
            "interfaces = [\"lan0\"]\nproxy.idle-timeout = \"soon\"\n",
            format!("{file}:2:22: proxy.idle-timeout: "),
        ),
        (
            "interfaces = [\"lan0\"]\nx = 1\ny = 1\n",
            format!("{file}:2:1: unknown key 'x' (pepsal check shows 1 more)"),
        ),
        (
            "interfaces = [\"lan0\"]\n[link.nosuch0]\nrate = \"5mbit\"\nrtt = \"5ms\"\n",
            "--link nosuch0: there is no interface of that name".to_owned(),
        ),
        (
            "interfaces = [\"lan0\"]\ntcp.congestion = \"nosuch\"\n",
            "congestion control 'nosuch' is unknown".to_owned(),
        ),
    ] {
        let said = scene.reload(
            configuration,
            "not reloaded, the running configuration stays in effect: ",
        )?;
        assert!(said.contains(&complaint), "{configuration:?}: {said}");
        assert!(!scene.is_split(Family::V4)?, "{configuration:?}");
        assert!(scene.is_split(Family::V6)?, "{configuration:?}");
    }
    fs::remove_file(&file)?;
    let said = scene.hangup("not reloaded")?;
    assert!(said.contains(&format!("{file}: cannot be read: ")), "{said}");
    let said = scene.reload(good, "reloaded: ")?;
    assert!(said.contains("no reloadable key changed"), "{said}");
    Ok(())
}

#[test]
fn reload_names_what_needs_a_restart_each_time() -> Result<()> {
    let scene = Scene::new("interfaces = [\"lan0\"]\n", &["--drain-timeout", "7s"])?;
    let other = "interfaces = [\"lan0\", \"sat0\"]\n[proxy]\nport = 5001\nmax-connections = 9\ndrain-timeout = \"9s\"\n";
    for _ in 0..2 {
        let said = scene.reload(other, "proxy.max-connections: needs a restart, still 2112")?;
        assert!(said.contains("interfaces: needs a restart, still lan0"), "{said}");
        assert!(said.contains("proxy.port: needs a restart, still 5000"), "{said}");
        assert!(
            said.contains("no reloadable key changed"),
            "the command line wins: {said}"
        );
    }
    let said = scene.reload("interfaces = [\"lan0\"]\n", "reloaded: ")?;
    assert!(!said.contains("restart"), "{said}");
    assert!(scene.is_split(Family::V4)?);
    Ok(())
}

#[test]
fn no_connection_is_judged_by_anything_but_the_old_or_the_new_rules() -> Result<()> {
    // What is intercepted, and what is not, by either set of rules; each has many prefixes that the other has not.
    let rules = |net: u8| -> String {
        let others = (0..200).map(|i| format!("\"{net}.{i}.0.0/16:{}\"", 1000 + i));
        let list: Vec<String> = others.collect();
        format!(
            "interfaces = [\"lan0\"]\n[steering]\nonly = [\"{}/32\", {}]\n",
            Family::V4.server(),
            list.join(", ")
        )
    };
    let scene = Scene::new(&rules(20), &[])?;
    let done = AtomicBool::new(false);
    let connections = thread::scope(|scope| -> Result<u32> {
        let connecting = scope.spawn(|| -> Result<u32> {
            let mut connections = 0;
            while !done.load(Ordering::Relaxed) {
                ensure!(
                    scene.open(Family::V4)?.path() == Path::Split,
                    "one that both rules take passed"
                );
                ensure!(
                    scene.open(Family::V6)?.path() == Path::Forwarded,
                    "one that both rules leave alone was split"
                );
                connections += 2;
            }
            Ok(connections)
        });
        // However this ends, the connecting does too.
        let stop = SetOnDrop(&done);
        for round in 0..30_u8 {
            scene.scratch.write(&rules(20 + (round + 1) % 2))?;
            let before = scene.daemon.log().len();
            scene.daemon.signal(Signal::SIGHUP)?;
            eventually(PATIENCE, || {
                scene.daemon.log()[before..].contains("reloaded: steering.only")
            });
        }
        drop(stop);
        connecting.join().expect("connecting does not panic")
    })?;
    assert!(connections > 60, "{connections} connections in 30 reloads");
    Ok(())
}

/// Sets a flag, after a panic too.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn lists_of_rules_are_read_again() -> Result<()> {
    let scene = Scene::new("interfaces = [\"lan0\"]\n", &[])?;
    let list = scene.scratch.path("bypass.list");
    let configuration = format!("interfaces = [\"lan0\"]\nsteering.bypass-from = [\"{list}\"]\n");
    fs::write(&list, "# the servers\n10.0.0.0/8\n")?;
    scene.reload(&configuration, "reloaded: steering.bypass-from")?;
    assert!(!scene.is_split(Family::V4)?);
    fs::write(&list, "fd00::/8\n")?;
    scene.hangup("reloaded: steering.bypass-from")?;
    assert!(scene.is_split(Family::V4)?);
    assert!(!scene.is_split(Family::V6)?);
    // Many at once, with ports of their own.
    let many: Vec<String> = (0..2000)
        .map(|i| format!("11.{}.{}.0/24:{i}\n", i / 250, i % 250))
        .collect();
    fs::write(&list, many.concat())?;
    scene.hangup("reloaded: steering.bypass-from")?;
    assert!(scene.is_split(Family::V6)?);
    fs::write(&list, "fd00::/8\n11.0.0/8\n")?;
    let said = scene.hangup("not reloaded")?;
    assert!(
        said.contains(&format!("{list}:2:1: '11.0.0/8' is not an IPv4")),
        "{said}"
    );
    assert!(scene.is_split(Family::V6)?);
    Ok(())
}

/// A directory of this test's own with a configuration.
struct Scratch(TempDir);

impl Scratch {
    fn new(configuration: &str) -> Result<Self> {
        let scratch = Self(TempDir::new()?);
        scratch.write(configuration)?;
        Ok(scratch)
    }

    /// Replaced whole: whoever reads it meanwhile gets the old or the new one.
    fn write(&self, configuration: &str) -> Result<()> {
        fs::write(self.path("new"), configuration)?;
        Ok(fs::rename(self.path("new"), self.path("pepsal.toml"))?)
    }

    fn path(&self, name: &str) -> String {
        let path = self.0.path().join(name);
        path.to_str().expect("the name is made of ASCII").to_owned()
    }

    fn file(&self) -> String {
        self.path("pepsal.toml")
    }
}

/// A bed whose daemon was started from a file.
struct Scene {
    bed: Bed,
    scratch: Scratch,
}

impl Deref for Scene {
    type Target = Bed;

    fn deref(&self) -> &Bed {
        &self.bed
    }
}

impl Scene {
    fn new(configuration: &str, arguments: &[&str]) -> Result<Self> {
        let scratch = Scratch::new(configuration)?;
        let bed = Bed::start(&[&["-F", &scratch.file()], arguments].concat())?;
        Ok(Self { bed, scratch })
    }

    /// Whether a connection made now, which carries some bytes, is split.
    fn is_split(&self, family: Family) -> Result<bool> {
        Ok(self.probe(family)? == Path::Split)
    }

    /// Lets the daemon read another configuration, and returns what it says to that, from the line with `answer` on.
    fn reload(&self, configuration: &str, answer: &str) -> Result<String> {
        self.scratch.write(configuration)?;
        self.hangup(answer)
    }

    fn hangup(&self, answer: &str) -> Result<String> {
        let before = self.daemon.log().len();
        self.daemon.signal(Signal::SIGHUP)?;
        let said = || self.daemon.log()[before..].to_owned();
        eventually(PATIENCE, || said().contains("reloaded"));
        // The lines that need a restart follow at once.
        eventually(PATIENCE, || said().contains(answer));
        Ok(said())
    }
}
