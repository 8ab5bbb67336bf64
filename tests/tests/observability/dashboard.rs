//! Dashboard, alerts and documents name what is exported.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pepsal_tests::Family;
use serde_json::Value;

use crate::Watched;

/// The beginnings of the names of metrics: pepsal's, and the standard ones of a process.
const PREFIXES: [&str; 2] = ["pepsal_", "process_"];

#[test]
fn dashboard_alerts_and_documents_name_what_is_exported() -> Result<()> {
    let bed = Watched::start(&["--link", "sat0,rate=50mbit,rtt=40ms"])?;
    let _flow = bed.flow(Family::V4)?;
    let scrape = bed.eventually_scraped(|scrape| scrape.names().contains("pepsal_link_rtt_seconds"))?;
    let exported = scrape.names();
    let [dashboard, rules, documented] = [
        "packaging/grafana/pepsal.json",
        "packaging/prometheus/pepsal.rules.yml",
        "docs/metrics.md",
    ]
    .map(|path| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)));
    for text in [&dashboard?, &rules?] {
        for name in metric_names(text) {
            assert!(exported.contains(&name), "{name} is not exported");
        }
        for (label, value) in label_values(text) {
            let is_exported = scrape
                .0
                .keys()
                .any(|sample| sample.contains(&format!("{label}=\"{value}\"")));
            assert!(is_exported, "nothing is exported with {label}=\"{value}\"");
        }
    }
    let family = |name: &str| {
        let suffixes = ["_bucket", "_sum", "_count"];
        let histogram = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        histogram.unwrap_or(name).to_owned()
    };
    let exported: BTreeSet<String> = exported.iter().map(|name| family(name)).collect();
    let table = documented?;
    let table: String = table
        .lines()
        .filter(|line| {
            PREFIXES
                .iter()
                .any(|prefix| line.starts_with(&format!("| `{prefix}")))
        })
        .collect();
    assert_eq!(metric_names(&table), exported);
    Ok(())
}

/// What Grafana's dashboard schema asks for.
#[test]
fn dashboard_has_what_grafana_needs() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/grafana/pepsal.json");
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(path)?)?;
    assert!(
        dashboard["schemaVersion"]
            .as_u64()
            .is_some_and(|version| version >= 36)
    );
    for text in ["uid", "title", "timezone"] {
        assert!(dashboard[text].is_string(), "{text}");
    }
    assert!(dashboard["time"]["from"].is_string() && dashboard["templating"]["list"].is_array());
    let panels = dashboard["panels"].as_array().context("panels")?;
    let mut ids = BTreeSet::new();
    let mut taken = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().context("a title")?;
        assert!(panel["type"].is_string(), "{title}");
        assert!(
            ids.insert(panel["id"].as_u64()),
            "{title}: its id is another's too"
        );
        let place = |key: &str| panel["gridPos"][key].as_u64().context("a place in the grid");
        let (x, y, w, h) = (place("x")?, place("y")?, place("w")?, place("h")?);
        assert!(x + w <= 24, "{title} is wider than the grid");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title} overlaps another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["datasource"]["type"] == "prometheus", "{title}");
        let targets = panel["targets"].as_array().context("targets")?;
        let mut names = BTreeSet::new();
        for target in targets {
            assert!(
                names.insert(target["refId"].as_str().context("a refId")?),
                "{title}"
            );
            assert!(
                target["expr"]
                    .as_str()
                    .is_some_and(|expr| PREFIXES.iter().any(|prefix| expr.contains(prefix))),
                "{title}"
            );
        }
        assert!(!targets.is_empty(), "{title}");
    }
    Ok(())
}

#[test]
fn every_alert_says_why() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus/pepsal.rules.yml");
    let rules = fs::read_to_string(path)?;
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(!alerts.is_empty());
    for alert in alerts {
        for part in ["expr:", "severity:", "summary:", "reason:", "action:"] {
            assert!(alert.contains(part), "no {part} in {alert}");
        }
    }
    Ok(())
}

/// Every name of a metric in a text.
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words
        .filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix)))
        .map(str::to_owned)
        .collect()
}

/// What a text asks of the labels that have a fixed set of values.
fn label_values(text: &str) -> Vec<(&'static str, String)> {
    let text = text.replace('\\', "");
    let mut values = Vec::new();
    for label in ["verdict", "reason", "event", "direction"] {
        for (at, _) in text.match_indices(label) {
            let rest = &text[at + label.len()..];
            let Some(rest) = ["=\"", "=~\"", "!=\""]
                .iter()
                .find_map(|op| rest.strip_prefix(op))
            else {
                continue;
            };
            let value = rest.split('"').next().unwrap_or_default();
            values.extend(value.split('|').map(|value| (label, value.to_owned())));
        }
    }
    values
}
