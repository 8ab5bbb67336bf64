//! Checks of forwarding, TC programs and offloads.

use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};

use crate::ctl::doctor::{
    finding::{Finding, Severity},
    setting::{numbers, set},
};

/// Returns the findings for the interfaces.
pub fn look(interfaces: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for interface in interfaces {
        findings.push(forwarding(interface, "ipv4", Severity::Error));
        findings.push(forwarding(interface, "ipv6", Severity::Warning));
        findings.extend(programs(interface));
        findings.extend(filters(interface));
    }
    findings.extend(interfaces.iter().flat_map(|interface| offloads(interface)));
    findings
}

fn forwarding(interface: &str, family: &str, severity: Severity) -> Finding {
    const CHECK: &str = "forwarding";
    let name = format!("net/{family}/conf/{interface}/forwarding");
    match numbers(&name).as_deref() {
        Some([1, ..]) => Finding::ok(CHECK, format!("{family} is forwarded from {interface}")),
        Some(_) => Finding::new(
            CHECK,
            severity,
            format!(
                "{family} is not forwarded from {interface}; packets that are not forwarded are not intercepted"
            ),
            set(&format!("net/{family}/conf/all/forwarding"), 1),
        ),
        None => Finding::unknown(CHECK, format!("{interface} has no {family}")),
    }
}

/// Checks for other tcx programs, which may take packets before pepsal's.
fn programs(interface: &str) -> Vec<Finding> {
    const CHECK: &str = "TC programs";
    let attached = match SchedClassifier::query_tcx(interface, TcAttachType::Ingress) {
        Ok((_, programs)) => programs,
        Err(error) => {
            return vec![Finding::unknown(
                CHECK,
                format!("tcx programs of {interface} are unknown: {error}"),
            )];
        }
    };
    let names = attached
        .iter()
        .map(|program| program.name_as_str().unwrap_or("without a name").to_owned());
    let others: Vec<String> = names.filter(|name| !name.starts_with("pepsal")).collect();
    match others.is_empty() {
        true => vec![Finding::ok(
            CHECK,
            format!("no other tcx programs on {interface}"),
        )],
        false => vec![other_program(interface, "tcx", &others)],
    }
}

fn other_program(interface: &str, hook: &str, names: &[String]) -> Finding {
    Finding::new(
        "TC programs",
        Severity::Warning,
        format!(
            "{} by {hook} on {interface}: packets that it drops or redirects do not reach pepsal",
            names.join(", ")
        ),
        Some(format!("bpftool net show dev {interface}, to find its purpose")),
    )
}

/// Checks for other filters of the clsact or ingress qdisc, by `tc`.
fn filters(interface: &str) -> Option<Finding> {
    let output = Command::new("tc")
        .args(["-j", "filter", "show", "dev", interface, "ingress"])
        .output();
    let Ok(output) = output else {
        return Some(Finding::unknown(
            "TC programs",
            "TC filters are unknown: tc (iproute2) is not installed",
        ));
    };
    let filters: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let mut names: Vec<String> = filters
        .iter()
        .filter(|filter| filter.get("options").is_some())
        .map(|filter| {
            let kind = filter["kind"].as_str().unwrap_or("filter");
            filter["options"]["bpf_name"].as_str().unwrap_or(kind).to_owned()
        })
        .filter(|name| !name.starts_with("pepsal"))
        .collect();
    // u32 lists its hash tables, too.
    names.dedup();
    (!names.is_empty()).then(|| other_program(interface, "a filter", &names))
}

/// Checks the offloads of an interface, by `ethtool -k`.
fn offloads(interface: &str) -> Vec<Finding> {
    const CHECK: &str = "offloads";
    let Ok(output) = Command::new("ethtool").args(["-k", interface]).output() else {
        return vec![Finding::unknown(
            CHECK,
            format!("offloads of {interface} are unknown: ethtool is not installed"),
        )];
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let is = |feature: &str, state: &str| {
        let mut lines = text.lines().filter_map(|line| line.trim().split_once(": "));
        lines.any(|(name, value)| name == feature && value.starts_with(state))
    };
    let mut findings = Vec::new();
    if is("large-receive-offload", "on") {
        findings.push(Finding::new(
            CHECK,
            Severity::Warning,
            format!("LRO on {interface} merges segments that then cannot be forwarded"),
            Some(format!("ethtool -K {interface} lro off")),
        ));
    }
    for (feature, short) in [
        ("generic-receive-offload", "gro"),
        ("generic-segmentation-offload", "gso"),
    ] {
        if is(feature, "off") {
            findings.push(Finding::new(
                CHECK,
                Severity::Note,
                format!("{feature} is off on {interface}, which costs CPU time"),
                Some(format!("ethtool -K {interface} {short} on")),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            CHECK,
            format!("offloads of {interface} are suitable"),
        ));
    }
    findings
}
