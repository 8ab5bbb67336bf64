//! What `--explain` shows of a profile, and what is refused.

use anyhow::{Context, Result, ensure};
use pepsal_tests::{Daemon, Footprint, Namespace, Topology};

#[test]
fn explanation_says_of_every_value_whether_it_was_given_or_what_it_follows_from() -> Result<()> {
    let least = explain(&["sat0,rate=50mbit,rtt=600ms"])?;
    let given: Vec<String> = rows(&least)
        .filter(|(_, row)| row.origin == "given")
        .map(|(name, _)| name)
        .collect();
    assert_eq!(given, ["link", "rtt", "receive rate"]);

    let all = "sat0,rate=50mbit,rtt=600ms,up=5mbit,cc=cubic,iw=64KiB,pacing=4mbit,rcvbuf=8MiB,sndbuf=1MiB,\
               unsent=64KiB,mss=1200,rto-min=200ms,rto-max=30s,user-timeout=2min,keepalive=5min,connect-timeout=45s";
    for (name, value) in [
        ("link", "sat0"),
        ("rtt", "600ms"),
        ("receive rate", "50 Mbit/s"),
        ("send rate", "5 Mbit/s"),
        ("pacing", "4 Mbit/s"),
        ("congestion", "cubic"),
        ("initial window", "64 KiB"),
        ("receive window", "8 MiB"),
        ("send buffer", "1 MiB"),
        ("unsent at most", "64 KiB"),
        ("rto at least", "200ms"),
        ("rto at most", "30s"),
        ("user timeout", "120s"),
        ("keepalive after", "300s"),
        ("connect timeout", "45s"),
        ("mss", "1200 B"),
    ] {
        let row = explained(&[all], name)?;
        assert_eq!(
            (row.value.as_str(), row.origin.as_str()),
            (value, "given"),
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn bad_links_are_one_line_and_leave_nothing_behind() -> Result<()> {
    const GOOD: &str = "sat0,rate=50mbit,rtt=600ms";
    let topology = Topology::new()?;
    let before = Footprint::of(&topology.gateway)?;
    for (links, complaint) in [
        (&["sat0"][..], "rate is missing"),
        (&["sat0,rtt=600ms"], "rate is missing"),
        (&["sat0,rate=50mbit"], "rtt is missing"),
        (&["rate=50mbit,rtt=600ms"], "the interface comes first"),
        (&[""], "the interface comes first"),
        (&["sat0,rate=50,rtt=600ms"], "rate: '50' is not a rate"),
        (&["sat0,rate=50mbyte,rtt=600ms"], "rate: '50mbyte' is not a rate"),
        (&["sat0,rate=0mbit,rtt=600ms"], "rate: '0mbit' is out of range"),
        (
            &["sat0,rate=101gbit,rtt=600ms"],
            "rate: '101gbit' is out of range",
        ),
        (&["sat0,rate=50mbit,rtt=600"], "rtt: '600' is not a time"),
        (&["sat0,rate=50mbit,rtt=11s"], "rtt: '11s' is out of range"),
        (&["sat0,rate=50mbit,rtt=10us"], "rtt: '10us' is out of range"),
        (&["sat0,rate=50mbit,rtt=600ms,iw=10"], "iw: '10' is not a size"),
        (
            &["sat0,rate=50mbit,rtt=600ms,rcvbuf=5GiB"],
            "rcvbuf: '5GiB' is out of range",
        ),
        (
            &["sat0,rate=50mbit,rtt=600ms,mss=9"],
            "mss: '9' is not a segment size",
        ),
        (
            &["sat0,rate=50mbit,rtt=600ms,rto-max=1h"],
            "rto-max: '1h' is out of range",
        ),
        (
            &["sat0,rate=50mbit,rtt=600ms,weights=size"],
            "weights: 'size' is neither",
        ),
        (&["sat0,rate=50mbit,rtt=600ms,speed=1"], "'speed' is not one of"),
        (&["sat0,rate=50mbit,rtt=600ms,fast"], "'fast' is not KEY=VALUE"),
        (&["sat0,rate=50mbit,rtt=600ms,rate=5mbit"], "rate is given twice"),
        (
            &["sat0,rate=50mbit,rtt=600ms,pacing=60mbit"],
            "pacing is more than the link's 50 Mbit/s",
        ),
        (
            &["sat0,rate=50mbit,up=5mbit,rtt=600ms,pacing=6mbit"],
            "pacing is more than the link's 5 Mbit/s",
        ),
        (
            &["nosuch0,rate=50mbit,rtt=600ms"],
            "--link nosuch0: there is no interface of that name",
        ),
        (&[GOOD, "sat0,rate=5mbit,rtt=60ms"], "--link sat0: given twice"),
        (
            &["sat0,rate=50mbit,rtt=600ms,cc=nosuch"],
            "congestion control 'nosuch' is unknown",
        ),
    ] {
        let mut arguments = vec!["-i", "lan0"];
        for link in links {
            arguments.extend(["--link", link]);
        }
        let exit = Daemon::expect_failure(&topology.gateway, &arguments)?;
        // clap's errors go on after an empty line with where to find help.
        let line = exit.log.split("\n\n").next().unwrap_or_default().trim_end();
        assert_eq!(line.lines().count(), 1, "{links:?}: not one line: {:?}", exit.log);
        assert!(line.contains(complaint), "{links:?}: {line}");
        assert_eq!(Footprint::of(&topology.gateway)?, before, "{links:?}");
    }
    Ok(())
}

/// A row of `--explain`.
pub struct Explained {
    pub value: String,
    pub origin: String,
}

/// What `--explain` says of links.
fn explain(links: &[&str]) -> Result<String> {
    let namespace = Namespace::new("explain")?;
    let mut command = Daemon::command(&namespace, &["--explain"])?;
    for link in links {
        command.args(["--link", link]);
    }
    let output = command.output()?;
    ensure!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn explained(links: &[&str], name: &str) -> Result<Explained> {
    let table = explain(links)?;
    let row = rows(&table).find(|(row, _)| row == name);
    Ok(row.with_context(|| format!("no {name} in\n{table}"))?.1)
}

/// The rows of a table among other lines: a name, a value and its origin, with two spaces or more between them.
pub fn rows(text: &str) -> impl Iterator<Item = (String, Explained)> {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty());
        cells.map(str::to_owned).collect()
    };
    text.lines().filter_map(move |line| {
        let [name, value, origin] = cells(line).try_into().ok()?;
        Some((name, Explained { value, origin }))
    })
}
