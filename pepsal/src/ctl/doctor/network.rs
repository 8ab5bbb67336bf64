//! What happens to packets on their way through: forwarding, policy rules, other programs, offloads.

use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::{Finding, Severity, numbers, set};
use crate::{cli::Mark, route};

pub async fn look(interfaces: &[String], mark: Mark) -> Vec<Finding> {
    let mut findings = Vec::new();
    for interface in interfaces {
        findings.push(forwarding(interface, "ipv4", Severity::Error));
        findings.push(forwarding(interface, "ipv6", Severity::Warning));
        findings.extend(reverse_path(interface));
        findings.extend(programs(interface));
        findings.extend(filters(interface));
    }
    findings.extend(interfaces.iter().flat_map(|interface| offloads(interface)));
    match route::all_rules().await {
        Ok(rules) => findings.extend(policy(&rules, interfaces, mark)),
        Err(error) => findings.push(Finding::unknown("rules", format!("{error:#}"))),
    }
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
                "{family} is not forwarded from {interface}, and what is not forwarded is not intercepted"
            ),
            set(&format!("net/{family}/conf/all/forwarding"), 1),
        ),
        None => Finding::unknown(CHECK, format!("{interface} has no {family}")),
    }
}

/// The stricter of the interface's own setting and that of all.
fn reverse_path(interface: &str) -> Option<Finding> {
    const CHECK: &str = "rp_filter";
    let own = format!("net/ipv4/conf/{interface}/rp_filter");
    let value = |name: &str| numbers(name)?.first().copied();
    let strictest = value(&own)?.max(value("net/ipv4/conf/all/rp_filter")?);
    Some(match strictest {
        1 => Finding::new(
            CHECK,
            Severity::Note,
            format!(
                "strict on {interface}: what arrives there from addresses that are routed elsewhere is dropped"
            ),
            set(&own, 2),
        ),
        _ => Finding::ok(CHECK, format!("not strict on {interface}")),
    })
}

/// Other programs on the hook see packets too, and may keep them from pepsal.
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
    let foreign: Vec<String> = names.filter(|name| !name.starts_with("pepsal")).collect();
    match foreign.is_empty() {
        true => vec![Finding::ok(
            CHECK,
            format!("none of others by tcx on {interface}"),
        )],
        false => vec![foreign_program(interface, "tcx", &foreign)],
    }
}

fn foreign_program(interface: &str, hook: &str, names: &[String]) -> Finding {
    Finding::new(
        "TC programs",
        Severity::Warning,
        format!(
            "{} by {hook} on {interface}: what it takes, drops or redirects does not reach pepsal",
            names.join(", ")
        ),
        Some(format!(
            "bpftool net show dev {interface}, and see what it is for"
        )),
    )
}

/// Filters of the clsact or ingress qdisc, as `tc` shows them.
fn filters(interface: &str) -> Option<Finding> {
    let output = Command::new("tc")
        .args(["-j", "filter", "show", "dev", interface, "ingress"])
        .output();
    let Ok(output) = output else {
        return Some(Finding::unknown(
            "TC programs",
            "filters are unknown, as there is no tc (iproute2)",
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
    (!names.is_empty()).then(|| foreign_program(interface, "a filter", &names))
}

/// What `ethtool -k` says of an interface.
fn offloads(interface: &str) -> Vec<Finding> {
    const CHECK: &str = "offloads";
    let Ok(output) = Command::new("ethtool").args(["-k", interface]).output() else {
        return vec![Finding::unknown(
            CHECK,
            format!("those of {interface} are unknown, as there is no ethtool"),
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
            format!("LRO on {interface} merges segments so that they cannot be forwarded any more"),
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
                format!("{feature} is off on {interface}, which costs processor time"),
                Some(format!("ethtool -K {interface} {short} on")),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("as they should be on {interface}")));
    }
    findings
}

/// Rules that are asked before pepsal's, and rules that go by bits of pepsal's mark.
fn policy(rules: &[(&'static str, RuleMessage)], interfaces: &[String], mark: Mark) -> Vec<Finding> {
    const CHECK: &str = "rules";
    let mut findings = Vec::new();
    for (family, rule) in rules.iter().filter(|(_, rule)| !route::is_ours(rule)) {
        let seen = Selector::of(rule);
        // Every host asks its own addresses first, and pepsal takes no packet that is for one.
        if seen.priority == 0 && route::rule_table(rule) == Some(255) {
            continue;
        }
        let applies = seen
            .interface
            .as_ref()
            .is_none_or(|name| interfaces.contains(name));
        let shown = format!("{family} rule {}", seen.priority);
        let flag = if *family == "ipv6" { "-6 " } else { "" };
        let mend = Some(format!(
            "ip {flag}rule show, and give it a priority above {}",
            route::PRIORITY
        ));
        if seen.priority < route::PRIORITY && applies && seen.takes(mark.value) && routes(rule) {
            let (severity, what) = match seen.is_narrow {
                false => (Severity::Error, "is asked first and takes pepsal's packets"),
                true => (
                    Severity::Warning,
                    "is asked first and takes some of pepsal's packets",
                ),
            };
            findings.push(Finding::new(CHECK, severity, format!("{shown} {what}"), mend));
        } else if seen
            .mask
            .is_some_and(|mask| mask & mark.mask != 0 && mask != u32::MAX)
        {
            findings.push(Finding::new(
                CHECK,
                Severity::Warning,
                format!("{shown} goes by bits of pepsal's mark {mark}"),
                Some("--mark with a bit that nobody else uses".to_owned()),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "no rule of others is in the way"));
    }
    findings
}

fn routes(rule: &RuleMessage) -> bool {
    !matches!(rule.header.action, RuleAction::Nop | RuleAction::Goto)
}

/// What a rule goes by.
struct Selector {
    priority: u32,
    interface: Option<String>,
    value: Option<u32>,
    mask: Option<u32>,
    /// Whether it goes by more than mark and interface.
    is_narrow: bool,
}

impl Selector {
    fn of(rule: &RuleMessage) -> Self {
        let mut seen = Self {
            priority: 0,
            interface: None,
            value: None,
            mask: None,
            is_narrow: rule.header.src_len > 0 || rule.header.dst_len > 0,
        };
        for attribute in &rule.attributes {
            match attribute {
                RuleAttribute::Priority(priority) => seen.priority = *priority,
                RuleAttribute::Iifname(name) => seen.interface = Some(name.clone()),
                RuleAttribute::FwMark(value) => seen.value = Some(*value),
                RuleAttribute::FwMask(mask) => seen.mask = Some(*mask),
                RuleAttribute::IpProtocol(_)
                | RuleAttribute::DestinationPortRange(_)
                | RuleAttribute::SourcePortRange(_)
                | RuleAttribute::UidRange(_)
                | RuleAttribute::Oifname(_) => seen.is_narrow = true,
                _ => {}
            }
        }
        seen
    }

    /// Whether it takes packets whose mark is this and nothing else.
    fn takes(&self, mark: u32) -> bool {
        let mask = self.mask.unwrap_or(u32::MAX);
        self.value.is_none_or(|value| mark & mask == value & mask)
    }
}
