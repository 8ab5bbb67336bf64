//! The host's firewall. What pepsal takes comes up locally, past the input hook, where a firewall that lets only its own
//! services in drops it.
//!
//! Rules are followed as the first segment of a client's connection would pass them: TCP, new, marked. What a rule asks for
//! besides is unknown here, so a rule that has more conditions counts for neither side.

use std::{fs, io::ErrorKind, process::Command};

use serde_json::Value;

use super::{Finding, Severity};
use crate::{
    cli::{Mark, Source},
    nat, preflight,
};

const CHECK: &str = "firewall";

pub fn look(mark: Mark) -> Vec<Finding> {
    let mut findings = match ruleset() {
        Ok(ruleset) => judge(&ruleset, mark),
        Err(why) => vec![Finding::unknown(CHECK, why)],
    };
    if legacy_has("filter") {
        findings.push(Finding::new(
            CHECK,
            Severity::Note,
            "iptables-legacy filters too, and was not looked at",
            Some("iptables-legacy -S INPUT, and accept marked packets where it drops".to_owned()),
        ));
    }
    findings
}

/// Translation of source addresses, which pepsal cannot look through when servers are to see the clients' own.
pub fn look_for_nat(source: Source) -> Vec<Finding> {
    const CHECK: &str = "NAT";
    let mut findings = match nat::source_nat() {
        Ok(chains) if chains.is_empty() || source == Source::Gateway => {
            vec![Finding::ok(
                CHECK,
                "nf_tables leaves clients' addresses to pepsal",
            )]
        }
        Ok(chains) => chains
            .iter()
            .map(|chain| {
                let what = format!("{chain} translates clients' addresses, so that connections hang");
                Finding::new(CHECK, Severity::Warning, what, preflight::NAT_REMEDY.to_owned())
            })
            .collect(),
        Err(error) => vec![Finding::unknown(CHECK, format!("rules are unknown: {error}"))],
    };
    if source == Source::Client && legacy_has("nat") {
        let what = "iptables-legacy translates addresses too, and was not looked at";
        let mend = "iptables-legacy -t nat -S POSTROUTING, and give --source gateway where it masquerades";
        findings.push(Finding::new(CHECK, Severity::Note, what, mend.to_owned()));
    }
    findings
}

fn legacy_has(table: &str) -> bool {
    let tables = fs::read_to_string("/proc/net/ip_tables_names");
    tables.is_ok_and(|names| names.lines().any(|name| name == table))
}

/// What `nft -j list ruleset` says, of the rules of `iptables-nft` too.
fn ruleset() -> Result<Vec<Value>, String> {
    let output = Command::new("nft").args(["-j", "list", "ruleset"]).output();
    let output = output.map_err(|error| match error.kind() {
        ErrorKind::NotFound => "rules are unknown, as there is no nft".to_owned(),
        _ => format!("rules are unknown, as nft does not run: {error}"),
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "rules are unknown: nft says {}",
            said.lines().next().unwrap_or("nothing")
        ));
    }
    let ruleset: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| format!("rules are unknown: {error}"))?;
    Ok(ruleset["nftables"].as_array().cloned().unwrap_or_default())
}

fn judge(ruleset: &[Value], mark: Mark) -> Vec<Finding> {
    let chains = ruleset.iter().filter_map(|object| object.get("chain"));
    let hooked = chains.filter(|chain| {
        chain["hook"] == "input" && matches!(chain["family"].as_str(), Some("ip" | "ip6" | "inet"))
    });
    let mut findings: Vec<Finding> = hooked
        .filter_map(|base| {
            let chain = Chain::of(base, ruleset);
            let fate = match chain.fate(mark, 0) {
                Some(fate) => fate,
                None if base["policy"] == "drop" => Fate::Dropped,
                None => Fate::Accepted,
            };
            (fate == Fate::Dropped).then(|| chain.drops(mark))
        })
        .collect();
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, "nftables lets marked packets in"));
    }
    findings
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Accepted,
    Dropped,
}

/// How many jumps are followed; the kernel allows 16.
const DEPTH: usize = 16;

struct Chain<'a> {
    ruleset: &'a [Value],
    family: &'a str,
    table: &'a str,
    name: &'a str,
}

impl<'a> Chain<'a> {
    fn of(chain: &'a Value, ruleset: &'a [Value]) -> Self {
        let text = |key: &str| chain[key].as_str().unwrap_or_default();
        Self {
            ruleset,
            family: text("family"),
            table: text("table"),
            name: text("name"),
        }
    }

    /// What its rules decide; nothing when none of them does.
    fn fate(&self, mark: Mark, depth: usize) -> Option<Fate> {
        if depth > DEPTH {
            return None;
        }
        let rules = self.ruleset.iter().filter_map(|object| object.get("rule"));
        let own = rules.filter(|rule| {
            rule["family"] == self.family && rule["table"] == self.table && rule["chain"] == self.name
        });
        for rule in own {
            let statements = rule["expr"].as_array().map(Vec::as_slice).unwrap_or_default();
            if !statements.iter().all(|statement| applies(statement, mark)) {
                continue;
            }
            for statement in statements {
                let target = |key: &str| statement[key]["target"].as_str();
                if statement.get("accept").is_some() {
                    return Some(Fate::Accepted);
                } else if statement.get("drop").is_some() || statement.get("reject").is_some() {
                    return Some(Fate::Dropped);
                } else if statement.get("return").is_some() {
                    return None;
                } else if let Some(name) = target("jump").or_else(|| target("goto")) {
                    let fate = Chain { name, ..*self }.fate(mark, depth + 1);
                    if fate.is_some() || statement.get("goto").is_some() {
                        return fate;
                    }
                }
            }
        }
        None
    }

    fn drops(&self, mark: Mark) -> Finding {
        let Self {
            family, table, name, ..
        } = self;
        Finding::new(
            CHECK,
            Severity::Error,
            format!("chain {name} of {family} {table} drops what pepsal intercepts"),
            Some(format!(
                "nft insert rule {family} {table} {name} meta mark and {:#x} == {:#x} accept",
                mark.mask, mark.value
            )),
        )
    }
}

/// Whether a statement is no condition, or one that the first segment of an intercepted connection meets.
fn applies(statement: &Value, mark: Mark) -> bool {
    let Some(condition) = statement.get("match") else {
        // Sets, limits and extensions are conditions too, which cannot be judged here.
        return [
            "accept", "drop", "reject", "return", "jump", "goto", "counter", "log", "comment",
        ]
        .iter()
        .any(|harmless| statement.get(harmless).is_some());
    };
    let (left, right) = (&condition["left"], &condition["right"]);
    let holds = if left["meta"]["key"] == "mark" {
        right.as_u64().map(|wanted| wanted == u64::from(mark.value))
    } else if let Some([of, mask]) = left["&"].as_array().map(Vec::as_slice) {
        let masked = mask.as_u64().map(|mask| mask & u64::from(mark.value));
        (of["meta"]["key"] == "mark").then(|| masked.is_some() && masked == right.as_u64())
    } else if left["ct"]["key"] == "state" {
        let is_new = |state: &Value| state == "new";
        Some(is_new(right) || states(right).iter().any(is_new))
    } else if matches!(left["meta"]["key"].as_str(), Some("l4proto")) {
        Some(right == "tcp" || states(right).iter().any(|protocol| protocol == "tcp"))
    } else {
        None
    };
    match (holds, condition["op"].as_str()) {
        (Some(holds), Some("!=")) => !holds,
        (Some(holds), _) => holds,
        (None, _) => false,
    }
}

/// A list or a set of values.
fn states(value: &Value) -> &[Value] {
    let list = value.as_array().or_else(|| value["set"].as_array());
    list.map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MARK: Mark = Mark {
        value: 0x1000_0000,
        mask: 0x1000_0000,
    };

    fn chain(policy: &str) -> Value {
        json!({"chain": {"family": "inet", "table": "filter", "name": "input", "hook": "input", "policy": policy}})
    }

    fn rule(chain: &str, expr: Value) -> Value {
        json!({"rule": {"family": "inet", "table": "filter", "chain": chain, "expr": expr}})
    }

    fn verdict(ruleset: &[Value]) -> Severity {
        judge(ruleset, MARK)[0].severity
    }

    #[test]
    fn policy_that_drops_is_an_error_unless_the_mark_is_accepted() {
        assert_eq!(verdict(&[chain("accept")]), Severity::Ok);
        assert_eq!(verdict(&[chain("drop")]), Severity::Error);
        let established = rule(
            "input",
            json!([{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}},
                   {"accept": null}]),
        );
        assert_eq!(verdict(&[chain("drop"), established.clone()]), Severity::Error);
        let marked = rule(
            "input",
            json!([{"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, 0x1000_0000]},
                              "right": 0x1000_0000}}, {"accept": null}]),
        );
        assert_eq!(verdict(&[chain("drop"), established, marked]), Severity::Ok);
    }

    #[test]
    fn jumps_are_followed_and_unknown_conditions_are_not() {
        let jump = rule("input", json!([{"jump": {"target": "late"}}]));
        let reject = rule("late", json!([{"reject": null}]));
        assert_eq!(
            verdict(&[chain("accept"), jump.clone(), reject.clone()]),
            Severity::Error
        );
        let ssh = json!({"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}});
        let conditional = rule("input", json!([ssh, {"drop": null}]));
        assert_eq!(verdict(&[chain("accept"), conditional]), Severity::Ok);
    }
}
