//! The goals, and whether pepsal meets them.

use serde::Serialize;

use crate::table::{
    self,
    Align::{self, Left},
};

/// A goal with its result.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    pub what: &'static str,
    pub measured: String,
    pub goal: &'static str,
    /// None if not measured.
    pub met: Option<bool>,
}

/// A value, and whether it meets the goal.
pub struct Verdict {
    pub measured: String,
    pub met: bool,
}

impl Goal {
    /// Returns a goal with its verdict, if it was measured.
    pub fn judged(what: &'static str, goal: &'static str, verdict: Option<Verdict>) -> Self {
        Self {
            what,
            goal,
            met: verdict.as_ref().map(|verdict| verdict.met),
            measured: verdict.map_or_else(|| "not measured".to_owned(), |verdict| verdict.measured),
        }
    }

    fn row(&self) -> [String; 4] {
        let met = match self.met {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        [self.what, &self.measured, self.goal, met].map(str::to_owned)
    }
}

const HEADINGS: [&str; 4] = ["what", "measured", "goal", ""];
const ALIGNMENT: [Align; 4] = [Left, Left, Left, Left];

/// Formats goals as a table for a terminal.
pub fn aligned(goals: &[Goal]) -> String {
    table::aligned(&rows(goals), ALIGNMENT)
}

/// Formats goals as a table in Markdown.
pub fn markdown(goals: &[Goal]) -> String {
    table::markdown(&rows(goals), ALIGNMENT)
}

fn rows(goals: &[Goal]) -> Vec<[String; 4]> {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(goals.iter().map(Goal::row));
    rows
}
