//! `pepsal doctor`.

use anyhow::{Result, ensure};
use pepsal_tests::{Daemon, Namespace, Topology};
use serde_json::Value;

use crate::Watched;

#[test]
fn doctor_finds_what_keeps_pepsal_from_working() -> Result<()> {
    let topology = Topology::new()?;
    let gateway = &topology.gateway;
    let doctor = || -> Result<(bool, Vec<String>)> {
        let arguments = ["doctor", "--json", "-i", "lan0", "-i", "sat0", "-f"];
        let output = Daemon::command(gateway, &arguments)?.output()?;
        let findings: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        let bad = |finding: &&Value| finding["severity"] == "error" || finding["severity"] == "warning";
        let shown = |finding: &Value| {
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            format!("{}: {}: {}", text("severity"), text("check"), text("message"))
        };
        let bad = findings.iter().filter(bad).map(shown).collect();
        Ok((output.status.success(), bad))
    };
    let expect = |severity: &str, check: &str, part: &str| -> Result<()> {
        let (works, findings) = doctor()?;
        assert_eq!(works, severity != "error", "{findings:#?}");
        let start = format!("{severity}: {check}: ");
        let is_there = findings
            .iter()
            .any(|finding| finding.starts_with(&start) && finding.contains(part));
        assert!(is_there, "no {start}… {part} in {findings:#?}");
        Ok(())
    };
    gateway.sysctl("net.ipv4.tcp_fastopen", 1)?;
    expect("warning", "fast open", "not enabled for both legs")?;
    gateway.sysctl("net.ipv4.tcp_fastopen", 3)?;
    assert_eq!(doctor()?, (true, vec![]));

    gateway.sysctl("net.ipv4.conf.lan0.forwarding", 0)?;
    expect("error", "forwarding", "ipv4 is not forwarded from lan0")?;
    gateway.sysctl("net.ipv4.conf.lan0.forwarding", 1)?;

    run(gateway, "tc qdisc add dev lan0 clsact")?;
    run(gateway, "tc filter add dev lan0 ingress u32 match u32 0 0")?;
    expect("warning", "TC programs", "u32 by a filter on lan0")
}

pub fn run(namespace: &Namespace, command: &str) -> Result<()> {
    let words: Vec<&str> = command.split(' ').collect();
    let status = namespace.command(words[0]).args(&words[1..]).status()?;
    ensure!(status.success(), "{command}");
    Ok(())
}

#[test]
fn doctor_knows_pepsals_own_from_others() -> Result<()> {
    let bed = Watched::start(&[])?;
    let arguments = ["doctor", "-i", "lan0", "-i", "sat0"];
    let output = Daemon::command(&bed.topology.gateway, &arguments)?.output()?;
    let shown = String::from_utf8(output.stdout)?;
    assert!(output.status.success() && !shown.contains("WARNING"), "{shown}");
    Ok(())
}
