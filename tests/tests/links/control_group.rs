//! The control group by which initial windows are set.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};
use pepsal_tests::{Bed, Daemon, Family, LAN, Network, Side};

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
fn without_control_groups_one_line_says_so_and_the_rest_of_the_profile_holds() -> Result<()> {
    let network = Network::new()?;
    let gateway = &network.topology.gateway;
    let link = ["--link", "sat0,rate=20mbit,pacing=16mbit,rtt=100ms,cc=cubic"];
    // It may not make a group below the one that it is in.
    let capabilities = "+net_bind_service,+net_admin,+net_raw,+perfmon,+bpf,+sys_admin";
    let by = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        &format!("--inh-caps=-all,{capabilities}"),
        &format!("--ambient-caps=-all,{capabilities}"),
    ];
    let hidden = Daemon::command_by(gateway, &by, &[LAN, &link].concat())?;
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
        log.matches("the kernel's initial window: cannot create /")
            .count(),
        1,
        "{log}"
    );
    Ok(())
}
