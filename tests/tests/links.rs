//! What is known of a link is on every leg that leaves through it, and on no other.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pepsal_tests::{
    Bed, Capture, Connection, Connector, Daemon, Family, Footprint, LAN, Leg, Link, LinkProfile, Namespace,
    Network, PATIENCE, Segment, Side, Topology, Transfer, eventually,
};
use socket2::SockRef;

/// A daemon of the client's side.
fn start(arguments: &[&str]) -> Result<Bed> {
    on(Topology::new()?, arguments)
}

/// One that knows the link on a side.
fn with_link(side: Side, settings: &str, arguments: &[&str]) -> Result<Bed> {
    start(
        &[
            &["--link", &format!("{},{settings}", side.interface())],
            arguments,
        ]
        .concat(),
    )
}

fn on(topology: Topology, arguments: &[&str]) -> Result<Bed> {
    // Neither what links are told to use here nor what is derived for them, so that it shows who chose.
    on_default("reno", topology, arguments)
}

fn on_default(congestion: &str, topology: Topology, arguments: &[&str]) -> Result<Bed> {
    topology
        .gateway
        .sysctl("net.ipv4.tcp_congestion_control", congestion)?;
    Bed::on(topology, &[LAN, arguments].concat())
}

/// A flow that sends on one of its legs for as long as it is there, as fast as it can.
struct Bulk {
    flow: Connection,
    threads: [JoinHandle<()>; 2],
}

impl Bulk {
    fn start(flow: Connection, side: Side) -> Result<Self> {
        let (client, server) = (flow.client.try_clone()?, flow.server.try_clone()?);
        let (mut from, mut to) = match side {
            Side::Client => (server, client),
            Side::Server => (client, server),
        };
        let threads = [
            thread::spawn(move || while from.write_all(&[0; 16_384]).is_ok() {}),
            thread::spawn(move || _ = io::copy(&mut to, &mut io::sink())),
        ];
        Ok(Self { flow, threads })
    }

    /// Ends it by a reset from both its ends.
    fn end(self) -> Result<()> {
        for stream in [&self.flow.client, &self.flow.server] {
            SockRef::from(stream).set_linger(Some(Duration::ZERO))?;
            // One may have been reset by the other already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for thread in self.threads {
            thread.join().expect("moving bytes does not panic");
        }
        Ok(())
    }
}

#[test]
fn legs_through_the_link_start_with_its_initial_window() -> Result<()> {
    // One with a window of its own in its congestion control, one without.
    for (side, settings, arguments) in [
        (Side::Server, "cc=cubic", &[][..]),
        (Side::Server, "cc=bbr", &[]),
        (Side::Client, "cc=cubic", &[]),
        (Side::Client, "cc=bbr", &[]),
        (Side::Server, "cc=cubic", &["--source", "gateway"]),
    ] {
        let settings = format!("rate=20mbit,rtt=100ms,iw=64KiB,{settings}");
        let bed = with_link(side, &settings, arguments)?;
        for family in Family::BOTH {
            let flow = bed.flow(family)?;
            bed.expect(&flow, side, |leg| leg.window == 65_536 / leg.mss, true);
            bed.expect(&flow, side.other(), |leg| leg.window, 10);
        }
    }
    Ok(())
}

#[test]
fn initial_window_is_what_the_pacing_rate_sends_in_a_round_trip() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,pacing=16mbit,rtt=100ms,cc=cubic", &[])?;
    let flow = bed.flow(Family::V4)?;
    bed.expect(&flow, Side::Server, |leg| leg.window, 200_000 / 1448);
    Ok(())
}

/// BBR's pacing is for paths that are long.
#[test]
fn where_bbr_is_the_default_short_legs_go_without() -> Result<()> {
    let far = LinkProfile::symmetric(50_000_000, Duration::from_millis(100), 0.0);
    let topology = Topology::builder().link(Link::Emulated(far)).build()?;
    let bed = on_default("bbr", topology, &[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        bed.expect(&flow, Side::Client, |leg| leg.congestion.clone(), "cubic".into());
        bed.expect(&flow, Side::Server, |leg| leg.congestion.clone(), "bbr".into());
    }
    Ok(())
}

#[test]
fn congestion_control_is_the_links_the_sides_everyones_or_derived_in_this_order() -> Result<()> {
    let plain = "sat0,rate=20mbit,rtt=100ms";
    for (arguments, client, server) in [
        (&[][..], "reno", "reno"),
        (
            &["--link", "sat0,rate=20mbit,rtt=100ms,cc=cubic"],
            "reno",
            "cubic",
        ),
        (
            &["--link", "lan0,rate=20mbit,rtt=100ms,cc=cubic"],
            "cubic",
            "reno",
        ),
        (
            &[
                "--link",
                "sat0,rate=20mbit,rtt=100ms,cc=cubic",
                "--server-congestion",
                "bbr",
                "-C",
                "bbr",
            ],
            "bbr",
            "cubic",
        ),
        (
            &[
                "--link",
                "lan0,rate=20mbit,rtt=100ms,cc=cubic",
                "--client-congestion",
                "bbr",
                "-C",
                "bbr",
            ],
            "cubic",
            "bbr",
        ),
        (
            &["--link", plain, "--server-congestion", "cubic", "-C", "bbr"],
            "bbr",
            "cubic",
        ),
        (&["--link", plain, "-C", "cubic"], "cubic", "cubic"),
    ] {
        let bed = start(arguments).with_context(|| arguments.join(" "))?;
        let flow = bed.flow(Family::V4)?;
        for (side, congestion) in [(Side::Client, client), (Side::Server, server)] {
            bed.expect(&flow, side, |leg| leg.congestion.clone(), congestion.to_owned());
        }
    }
    // What is derived depends on the kernel; the daemon says at its start what it is.
    let bed = start(&["--link", plain])?;
    let log = bed.daemon.log();
    let (_, derived) = rows(&log)
        .find(|(name, _)| name == "congestion")
        .context(log.clone())?;
    let flow = bed.flow(Family::V4)?;
    bed.expect(&flow, Side::Server, |leg| leg.congestion.clone(), derived.value);
    bed.expect(&flow, Side::Client, |leg| leg.congestion.clone(), "reno".into());
    Ok(())
}

/// A link whose legs share 8 Mbit/s. It is a veth: nothing else slows them down.
const SHARED: &str = "rate=10mbit,pacing=8mbit,rtt=50ms,cc=cubic";

#[test]
fn pacing_rate_is_divided_anew_as_flows_come_and_go() -> Result<()> {
    for side in Side::BOTH {
        let bed = with_link(side, SHARED, &[])?;
        let first = Bulk::start(bed.flow(Family::V4)?, side)?;
        bed.expect(&first.flow, side, |leg| leg.pacing_bps, Some(8_000_000));
        let second = Bulk::start(bed.flow(Family::V6)?, side)?;
        for bulk in [&first, &second] {
            bed.expect(&bulk.flow, side, |leg| leg.pacing_bps, Some(4_000_000));
        }
        second.end()?;
        bed.expect(&first.flow, side, |leg| leg.pacing_bps, Some(8_000_000));
        first.end()?;
    }
    Ok(())
}

#[test]
fn idle_flow_costs_the_others_nothing() -> Result<()> {
    let bed = with_link(Side::Server, SHARED, &[])?;
    let bulk = Bulk::start(bed.flow(Family::V4)?, Side::Server)?;
    bed.expect(&bulk.flow, Side::Server, |leg| leg.pacing_bps, Some(8_000_000));
    let idle = bed.flow(Family::V4)?;
    bed.expect(&idle, Side::Server, |leg| leg.pacing_bps, Some(4_000_000));
    // Long enough for the rate to have been divided some times more.
    let sent = || -> Result<u64> { Ok(bed.leg(&bulk.flow, Side::Server)?.context("it is there")?.sent) };
    let before = sent()?;
    eventually(PATIENCE, || sent().is_ok_and(|now| now > before + 500_000));
    bed.expect(&bulk.flow, Side::Server, |leg| leg.pacing_bps, Some(8_000_000));
    bulk.end()
}

#[test]
fn pacing_rate_can_be_divided_by_dscp() -> Result<()> {
    /// Class selector 3 (RFC 2474), as a traffic class.
    const CS3: u8 = 3 << 5;
    let bed = with_link(Side::Server, &format!("{SHARED},weights=dscp"), &[])?;
    let urgent = Connector {
        traffic_class: CS3,
        ..Connector::default()
    };
    for family in Family::BOTH {
        let light = Bulk::start(bed.flow(family)?, Side::Server)?;
        let heavy = Bulk::start(bed.open_by(&urgent, family)?.split()?, Side::Server)?;
        bed.expect(&light.flow, Side::Server, |leg| leg.pacing_bps, Some(1_600_000));
        bed.expect(&heavy.flow, Side::Server, |leg| leg.pacing_bps, Some(6_400_000));
        light.end()?;
        heavy.end()?;
    }
    Ok(())
}

#[test]
fn legs_through_other_interfaces_are_as_without_a_link() -> Result<()> {
    let untouched = |leg: &Leg| {
        let Leg {
            congestion,
            window,
            pacing_bps,
            receive_buffer,
            send_buffer,
            mss,
            ..
        } = leg.clone();
        (congestion, window, pacing_bps, receive_buffer, send_buffer, mss)
    };
    let plain = start(&[])?;
    for side in Side::BOTH {
        let bed = with_link(side.other(), "rate=20mbit,rtt=100ms,mss=1200", &[])?;
        for family in Family::BOTH {
            let flow = plain.open(family)?;
            let leg = plain.leg(&flow, side)?.context("it is there")?;
            assert_eq!(leg.pacing_bps, None);
            let flow = bed.flow(family)?;
            bed.expect(&flow, side, untouched, untouched(&leg));
        }
    }
    Ok(())
}

/// What a leg announces as its receive window in the first segment that scales it, with the scale.
fn first_window(segments: &[Segment], leg: SocketAddr) -> Option<(u64, u8)> {
    let mut sent = segments.iter().filter(|segment| segment.source == leg);
    let scale = sent.find_map(|segment| segment.window_scale)?;
    let first = sent.find(|segment| segment.is_established())?;
    Some((u64::from(first.window) << scale, scale))
}

#[test]
fn receive_window_covers_the_links_product_from_the_first_segment_on() -> Result<()> {
    const WINDOW: u64 = 1 << 20;
    for side in Side::BOTH {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,rcvbuf=1MiB", &[])?;
        for family in Family::BOTH {
            let captures = [
                Capture::start(&bed.topology.client, "eth0")?,
                Capture::start(&bed.topology.server, "eth0")?,
            ];
            let mut flow = bed.flow(family)?;
            // The accepted leg acknowledges this; the connected one has acknowledged the handshake.
            flow.client.write_all(b"question")?;
            let mut question = [0; 8];
            flow.server.read_exact(&mut question)?;
            let legs = [flow.client.peer_addr()?, flow.peer];
            let windows = Side::BOTH.map(|at| {
                let (capture, leg) = (&captures[at as usize], legs[at as usize]);
                let mut window = None;
                eventually(PATIENCE, || {
                    window = first_window(&capture.segments().expect("it can be read"), leg);
                    window.is_some()
                });
                window.expect("it was waited for")
            });
            let (window, scale) = windows[side as usize];
            // The kernel rounds to whole segments and to the scale.
            assert!(window > WINDOW * 9 / 10, "{side:?} {family:?}: {windows:?}");
            assert!(
                window <= WINDOW + (1 << scale),
                "{side:?} {family:?}: {windows:?}"
            );
            let (other, _) = windows[side.other() as usize];
            assert!(other < 128 << 10, "{side:?} {family:?}: {windows:?}");
        }
    }
    Ok(())
}

#[test]
fn buffers_are_the_links() -> Result<()> {
    for side in Side::BOTH {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,rcvbuf=1MiB,sndbuf=2MiB", &[])?;
        for family in Family::BOTH {
            let flow = bed.flow(family)?;
            // The kernel doubles them, for its bookkeeping.
            let buffers = |leg: &Leg| (leg.receive_buffer, leg.send_buffer);
            bed.expect(&flow, side, buffers, (2 << 20, 4 << 20));
        }
    }
    Ok(())
}

#[test]
fn both_ends_of_a_leg_are_told_the_links_segment_size() -> Result<()> {
    for (side, arguments) in [
        (Side::Client, &[][..]),
        (Side::Server, &[]),
        (Side::Client, &["-m", "1300"]),
        (Side::Server, &["-m", "1300"]),
    ] {
        let bed = with_link(side, "rate=20mbit,rtt=100ms,mss=1200", arguments)?;
        for family in Family::BOTH {
            let capture = Capture::start(&bed.topology.client, "eth0")?;
            let flow = bed.flow(family)?;
            let segments = capture.segments()?;
            let answer = segments.iter().find(|segment| segment.is_syn_ack());
            let announced = match side {
                Side::Client => answer.context("the client was answered")?.mss,
                Side::Server => flow.syn.segment().mss,
            };
            assert_eq!(announced, Some(1200), "{side:?} {family:?} {arguments:?}");
            // Less 12 bytes for the timestamps.
            bed.expect(&flow, side, |leg| leg.mss, 1188);
        }
    }
    Ok(())
}

/// The daemon's control group, as its process has it.
fn own_group(daemon: &Daemon) -> Result<String> {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", daemon.pid()))?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(group.context("it is in a group of cgroup v2")?.to_owned())
}

/// Whether there is a control group of this name, on a mount of cgroup v2 that goes away again.
fn is_group(group: &str) -> Result<bool> {
    let look = "mount -t cgroup2 none /mnt && if [ -d \"/mnt$1\" ]; then echo there; else echo gone; fi";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", look, "sh", group])
        .output()
        .context("cannot run `unshare` (Debian's package util-linux)")?;
    match output.stdout.as_slice() {
        b"there\n" => Ok(true),
        b"gone\n" => Ok(false),
        _ => bail!("{}", String::from_utf8_lossy(&output.stderr)),
    }
}

#[test]
fn control_group_is_the_daemons_own_and_goes_with_it() -> Result<()> {
    let link = ["-i", "lan0", "--link", "sat0,rate=20mbit,rtt=100ms"];
    let network = Network::new()?;
    let daemon = network.start(&link)?;
    let group = own_group(&daemon)?;
    assert!(group.ends_with(&format!("/pepsal.{}", daemon.pid())), "{group}");
    assert!(is_group(&group)?);
    daemon.terminate()?;
    assert!(!is_group(&group)?, "after SIGTERM");

    let daemon = network.start(&link)?;
    let group = own_group(&daemon)?;
    daemon.kill()?;
    let daemon = network.start(&link)?;
    assert!(!is_group(&group)?, "after SIGKILL and a new start");
    assert!(is_group(&own_group(&daemon)?)?, "the new one's");
    Ok(())
}

#[test]
fn without_control_groups_one_line_says_so_and_the_rest_of_the_profile_holds() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let link = ["--link", "sat0,rate=20mbit,pacing=16mbit,rtt=100ms,cc=cubic"];
    let daemon = Daemon::command(gateway, &[LAN, &link].concat())?;
    // It may not make a group below the one that it is in.
    let mut hidden = gateway.command("setpriv");
    let capabilities = "+net_bind_service,+net_admin,+net_raw,+perfmon,+bpf,+sys_admin";
    hidden.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]);
    hidden.args([
        format!("--inh-caps=-all,{capabilities}"),
        format!("--ambient-caps=-all,{capabilities}"),
    ]);
    hidden.arg(daemon.get_program()).args(daemon.get_args());
    let bed = Bed {
        daemon: Daemon::start_command(hidden)?,
        network,
    };
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        bed.expect(&flow, Side::Server, |leg| leg.pacing_bps, Some(16_000_000));
        bed.expect(
            &flow,
            Side::Server,
            |leg| (leg.congestion.clone(), leg.window),
            ("cubic".into(), 10),
        );
    }
    bed.splits()?;
    let log = bed.daemon.terminate()?.log;
    assert_eq!(
        log.matches("the kernel's initial window: cannot make /").count(),
        1,
        "{log}"
    );
    Ok(())
}

/// Drops what the servers send to the clients, until it is ended.
struct Outage<'a>(&'a Topology);

impl<'a> Outage<'a> {
    fn begin(topology: &'a Topology) -> Result<Self> {
        for family in Family::BOTH {
            topology
                .server
                .ip(format!("route add blackhole {}", family.client()))?;
        }
        Ok(Self(topology))
    }

    fn end(self) -> Result<()> {
        for family in Family::BOTH {
            self.0
                .server
                .ip(format!("route del blackhole {}", family.client()))?;
        }
        Ok(())
    }
}

#[test]
fn leg_is_given_up_after_the_user_timeout() -> Result<()> {
    let settings = "rate=20mbit,rtt=20ms,rto-max=1s,user-timeout=3s";
    let bed = with_link(Side::Server, settings, &[])?;
    for family in Family::BOTH {
        let mut flow = bed.flow(family)?;
        let outage = Outage::begin(&bed.topology)?;
        let start = Instant::now();
        flow.client.write_all(b"lost")?;
        flow.client.set_read_timeout(Some(PATIENCE))?;
        let error = flow.client.read(&mut [0]).expect_err("nothing arrives");
        let elapsed = start.elapsed();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "after {elapsed:?}");
        // By the number of its tries the kernel would give it up after 14 s.
        let expected = Duration::from_secs(2)..Duration::from_secs(10);
        assert!(expected.contains(&elapsed), "{elapsed:?}");
        outage.end()?;
    }
    Ok(())
}

#[test]
fn outage_shorter_than_the_user_timeout_breaks_no_flow() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,rtt=20ms,rto-max=1s", &[])?;
    // With these the number of tries comes to 4 s.
    bed.topology.gateway.sysctl("net.ipv4.tcp_retries2", 5)?;
    let flows = [bed.flow(Family::V4)?, bed.flow(Family::V6)?];
    let outage = Outage::begin(&bed.topology)?;
    for flow in &flows {
        (&flow.client).write_all(b"late")?;
    }
    thread::sleep(Duration::from_secs(8));
    outage.end()?;
    for flow in &flows {
        let mut received = [0; 4];
        flow.server.set_read_timeout(Some(PATIENCE))?;
        (&flow.server).read_exact(&mut received)?;
        assert_eq!(&received, b"late");
        (&flow.server).write_all(b"back")?;
        flow.client.set_read_timeout(Some(PATIENCE))?;
        (&flow.client).read_exact(&mut received)?;
        assert_eq!(&received, b"back");
    }
    Ok(())
}

#[test]
fn closed_window_is_no_outage() -> Result<()> {
    let bed = with_link(Side::Server, "rate=20mbit,rtt=20ms,user-timeout=1s", &[])?;
    for family in Family::BOTH {
        let flow = bed.flow(family)?;
        flow.client.set_write_timeout(Some(Duration::from_secs(1)))?;
        let mut written = 0;
        while let Ok(bytes) = (&flow.client).write(&[1; 65_536]) {
            written += bytes as u64;
        }
        // The kernel would count from the first window probe that finds nothing in flight.
        thread::sleep(Duration::from_secs(5));
        flow.client.shutdown(Shutdown::Write)?;
        flow.server.set_read_timeout(Some(PATIENCE))?;
        let received = io::copy(&mut &flow.server, &mut io::sink())?;
        assert_eq!(received, written);
    }
    Ok(())
}

/// A row of `--explain`.
struct Explained {
    value: String,
    origin: String,
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

/// The rows of a table among other lines: a name, a value and its origin, with two spaces or more between them.
fn rows(text: &str) -> impl Iterator<Item = (String, Explained)> {
    let cells = |line: &str| -> Vec<String> {
        let cells = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty());
        cells.map(str::to_owned).collect()
    };
    text.lines().filter_map(move |line| {
        let [name, value, origin] = cells(line).try_into().ok()?;
        Some((name, Explained { value, origin }))
    })
}

fn explained(links: &[&str], name: &str) -> Result<Explained> {
    let table = explain(links)?;
    let row = rows(&table).find(|(row, _)| row == name);
    Ok(row.with_context(|| format!("no {name} in\n{table}"))?.1)
}

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

const REQUEST: &[u8] = &[b'q'; 300];
const ANSWER: &[u8] = b"answer";

/// `net.ipv4.tcp_fastopen`, which holds for both families: no fast open; as client and as server; as server for
/// listeners that do not ask for it, too.
const NO_FAST_OPEN: u32 = 0;
const FAST_OPEN: u32 = 0x3;
const FAST_OPEN_FOR_ALL: u32 = 0x403;

/// A topology whose client and gateways may use fast open, and whose server does or does not.
fn fast_open(topology: Topology, server: u32) -> Result<Topology> {
    let namespaces = [&topology.client, &topology.gateway];
    for namespace in namespaces.into_iter().chain(&topology.router) {
        namespace.sysctl("net.ipv4.tcp_fastopen", FAST_OPEN)?;
    }
    topology.server.sysctl("net.ipv4.tcp_fastopen", server)?;
    Ok(topology)
}

/// A client whose request goes with its SYN.
fn eager() -> Connector {
    Connector {
        fast_open: true,
        ..Connector::default()
    }
}

/// A request and its answer over a connection of their own, made by an eager client.
fn ask(network: &Network, family: Family) -> Result<Connection> {
    let mut client = eager().connect(&network.topology.client, network.address(family))?;
    client.write_all(REQUEST)?;
    let mut flow = Connection::new(client, network.listener(family).accept(PATIENCE)?);
    let mut request = [0; REQUEST.len()];
    flow.server.read_exact(&mut request)?;
    ensure!(request == REQUEST, "what arrives is not what was sent");
    flow.server.write_all(ANSWER)?;
    let mut answer = [0; ANSWER.len()];
    flow.client.read_exact(&mut answer)?;
    ensure!(answer == ANSWER, "what comes back is not what was sent");
    Ok(flow)
}

/// Asks until the request is in the server's SYN: first every hop has to be given its cookie.
fn ask_in_syn(network: &Network, family: Family) -> Result<Connection> {
    // Client, gateway and router get theirs one after the other.
    for _ in 0..4 {
        let flow = ask(network, family)?;
        if flow.syn.segment().payload_len == REQUEST.len() {
            return Ok(flow);
        }
    }
    bail!("no request in a SYN after as many connections as there are cookies")
}

#[test]
fn request_in_the_clients_syn_is_carried_in_the_servers() -> Result<()> {
    for arguments in [
        &["-f"][..],
        &["-f", "--source", "gateway"],
        &["-f", "--link", "sat0,rate=20mbit,rtt=100ms"],
    ] {
        let bed = on(fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?, arguments)?;
        for family in Family::BOTH {
            ask_in_syn(&bed, family).with_context(|| format!("{family:?} {arguments:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn requests_longer_than_a_syn_arrive_whole() -> Result<()> {
    let bed = Bed::on(
        fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?,
        &["-i", "lan0", "-f"],
    )?;
    for family in Family::BOTH {
        let mut was_in_syn = false;
        for bytes in [100, 1_000, 10_000, 100_000, 1_000_000] {
            let upload = Transfer::upload(bytes).connector(eager());
            let outcome = upload.run(&bed.topology.client, bed.server.address(family))?;
            assert!(outcome.intact, "{family:?}, {bytes} bytes");
            was_in_syn |= outcome.syn.segment().payload_len > 0;
        }
        assert!(was_in_syn, "{family:?}");
    }
    Ok(())
}

#[test]
fn server_without_fast_open_is_served_without() -> Result<()> {
    let bed = on(fast_open(Topology::new()?, NO_FAST_OPEN)?, &["-f"])?;
    for family in Family::BOTH {
        let mut asked_for_cookie = false;
        for _ in 0..4 {
            let syn = ask(&bed, family)?.syn.segment();
            assert_eq!(syn.payload_len, 0, "{family:?}");
            asked_for_cookie |= syn.fast_open;
        }
        assert!(asked_for_cookie, "{family:?}");
    }
    Ok(())
}

#[test]
fn fast_open_does_not_wait_for_clients_that_let_the_server_speak_first() -> Result<()> {
    let topology = fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?;
    let bed = on(topology, &["-f", "--link", "sat0,rate=20mbit,rtt=100ms"])?;
    for family in Family::BOTH {
        // With a cookie the gateway could put a SYN off until it has data.
        ask_in_syn(&bed, family)?;
        let mut flow = bed.flow(family)?;
        flow.server.write_all(ANSWER)?;
        let mut banner = [0; ANSWER.len()];
        flow.client.read_exact(&mut banner)?;
        assert_eq!(banner, ANSWER);
    }
    Ok(())
}

#[test]
fn leg_opened_with_data_starts_with_the_links_window() -> Result<()> {
    let topology = fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?;
    let link = "sat0,rate=20mbit,rtt=100ms,iw=64KiB,cc=cubic";
    let bed = on(topology, &["-f", "--link", link])?;
    for family in Family::BOTH {
        let flow = ask_in_syn(&bed, family)?;
        // What was acknowledged may have opened it further.
        bed.expect(&flow, Side::Server, |leg| leg.window >= 65_536 / leg.mss, true);
    }
    Ok(())
}

#[test]
fn refusal_of_a_request_in_a_syn_resets_the_client() -> Result<()> {
    let bed = on(fast_open(Topology::new()?, FAST_OPEN_FOR_ALL)?, &["-f"])?;
    for family in Family::BOTH {
        ask_in_syn(&bed, family)?;
        let nobody = SocketAddr::new(family.server(), 9);
        let mut client = eager().connect(&bed.topology.client, nobody)?;
        client.write_all(REQUEST)?;
        let error = client.read(&mut [0]).expect_err("nobody listens there");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{family:?}");
    }
    let exit = bed.daemon.terminate()?;
    assert_eq!(exit.counter("refused"), 2, "{}", exit.log);
    Ok(())
}

/// A daemon at each end of a link.
struct Pair {
    near: Bed,
    far: Daemon,
}

impl Pair {
    /// Both know the link, by the names that their interfaces have.
    fn new(topology: Topology, settings: &str, arguments: &[&str]) -> Result<Self> {
        let router = topology.router.as_ref().context("a pair needs a router")?;
        let far = format!("sat1,{settings}");
        let far = Daemon::start(router, &[&["-i", "sat1", "--link", &far], arguments].concat())?;
        let near = format!("sat0,{settings}");
        let near = on(topology, &[&["--link", &near], arguments].concat())?;
        Ok(Self { near, far })
    }
}

#[test]
fn pair_with_fast_open_saves_the_links_handshake() -> Result<()> {
    let topology = fast_open(Topology::builder().router().build()?, FAST_OPEN_FOR_ALL)?;
    let pair = Pair::new(topology, "rate=20mbit,rtt=100ms", &["-f"])?;
    let router = pair
        .near
        .topology
        .router
        .as_ref()
        .context("a pair has a router")?;
    for family in Family::BOTH {
        ask_in_syn(&pair.near, family)?;
        let capture = Capture::start(router, "sat1")?;
        let flow = ask(&pair.near, family)?;
        let client = flow.client.local_addr()?;
        let segments = capture.segments()?;
        let first = segments
            .iter()
            .find(|segment| segment.source == client)
            .context("it crossed the link")?;
        assert!(first.is_syn(), "{first:?}");
        assert_eq!(first.payload_len, REQUEST.len(), "nothing had to come back first");
    }
    Ok(())
}

/// Payload that `sender` had under way before anything came back for it.
fn first_flight(segments: &[Segment], sender: SocketAddr) -> usize {
    let handshake_and_request = 2;
    segments
        .iter()
        .skip_while(|segment| segment.source != sender)
        .scan(0, |answers, segment| {
            *answers += usize::from(segment.destination == sender);
            (*answers < handshake_and_request).then_some(segment)
        })
        .filter(|segment| segment.source == sender)
        .map(|segment| segment.payload_len)
        .sum()
}

#[test]
fn only_a_pepsal_peer_is_sent_more_than_its_syn_ack_can_say() -> Result<()> {
    /// The window field of a SYN-ACK, which is not scaled.
    const SAID: usize = 65_535;
    let link = LinkProfile::symmetric(50_000_000, Duration::from_millis(200), 0.0);
    for (peer, is_more) in [("pepsal", true), ("unknown", false)] {
        let topology = Topology::builder().link(Link::Emulated(link)).router().build()?;
        let pair = Pair::new(topology, &format!("rate=50mbit,rtt=200ms,peer={peer}"), &[])?;
        let topology = &pair.near.topology;
        for family in Family::BOTH {
            let capture = Capture::start(&topology.gateway, "sat0")?;
            let upload = Transfer::upload(1 << 20);
            let outcome = upload.run(&topology.client, pair.near.server.address(family))?;
            assert!(outcome.intact);
            let flight = first_flight(&capture.segments()?, outcome.local);
            assert_eq!(flight > SAID, is_more, "{peer} {family:?}: {flight} bytes");
        }
    }
    Ok(())
}

#[test]
fn pair_carries_parallel_flows_intact_over_a_lossy_link() -> Result<()> {
    const FLOWS: u64 = 8;
    let link = LinkProfile::symmetric(20_000_000, Duration::from_millis(100), 0.01);
    println!("seed {}", link.seed);
    let topology = Topology::builder().link(Link::Emulated(link)).router().build()?;
    let pair = Pair::new(topology, "rate=20mbit,rtt=100ms,peer=pepsal", &[])?;
    let (topology, server) = (&pair.near.topology, &pair.near.server);
    thread::scope(|scope| -> Result<()> {
        let mut transfers = Vec::new();
        for number in 0..FLOWS {
            let family = Family::BOTH[(number % 2) as usize];
            let transfer = match number % 4 {
                0 | 1 => Transfer::upload(300_000),
                _ => Transfer::download(300_000),
            };
            let (transfer, address) = (transfer.seed(number), server.address(family));
            transfers.push(scope.spawn(move || transfer.run(&topology.client, address)));
        }
        for transfer in transfers {
            let outcome = transfer.join().expect("transfers do not panic")?;
            assert!(outcome.intact);
            assert_eq!(
                outcome.peer, outcome.local,
                "the server sees the client's address"
            );
        }
        Ok(())
    })?;
    for daemon in [pair.near.daemon, pair.far] {
        assert_eq!(daemon.terminate()?.counter("finished"), FLOWS);
    }
    Ok(())
}
