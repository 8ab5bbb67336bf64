//! What a Prometheus reads of a daemon.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};

/// Samples by name and labels, as they are written.
#[derive(Debug)]
pub struct Scrape(pub BTreeMap<String, f64>);

impl Scrape {
    pub fn parse(text: &str) -> Result<Self> {
        ensure!(text.ends_with("# EOF\n"), "cut short:\n{text}");
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let sample = |line: &str| -> Result<(String, f64)> {
            let (name, value) = line.rsplit_once(' ').context("no value")?;
            Ok((name.to_owned(), value.parse()?))
        };
        samples
            .map(|line| sample(line).with_context(|| line.to_owned()))
            .collect::<Result<_>>()
            .map(Self)
    }

    pub fn names(&self) -> BTreeSet<String> {
        let name = |sample: &String| sample.split('{').next().unwrap_or_default().to_owned();
        self.0.keys().map(name).collect()
    }

    pub fn of(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let labels: Vec<String> = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{value}\""))
            .collect();
        let sample = match labels.is_empty() {
            true => name.to_owned(),
            false => format!("{name}{{{}}}", labels.join(",")),
        };
        let value = self.0.get(&sample);
        *value.unwrap_or_else(|| panic!("no {sample} in {:#?}", self.0))
    }
}
