//! A finding of `pepsal doctor`.

use serde::Serialize;

/// How bad a finding is, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// pepsal does not start, or intercepts nothing.
    Error,
    /// Some connections are not intercepted, or go slower than they could.
    Warning,
    /// Worth knowing; it includes what could not be looked at.
    Note,
    /// As it should be.
    Ok,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What is so, and what that means.
    pub message: String,
    /// The command that mends it, or what else there is to do.
    pub fix: Option<String>,
}

impl Finding {
    /// A check that passed.
    pub fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Ok,
            message: message.into(),
            fix: None,
        }
    }

    /// A check that did not pass, and the command that mends it.
    pub fn new(
        check: &'static str,
        severity: Severity,
        message: impl Into<String>,
        fix: impl Into<Option<String>>,
    ) -> Self {
        Self {
            check,
            severity,
            message: message.into(),
            fix: fix.into(),
        }
    }

    /// A check that could not be made.
    pub fn unknown(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(check, Severity::Note, why, None)
    }
}
