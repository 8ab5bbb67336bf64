//! A finding of `pepsal doctor`.

use serde::Serialize;

/// Severity of a finding, the highest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// pepsal does not start, or intercepts no connection.
    Error,
    /// Some connections are not intercepted, or are slower than possible.
    Warning,
    /// Information, or a check that could not be made.
    Note,
    Ok,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub severity: Severity,
    pub message: String,
    /// The command that fixes it, or another action.
    pub fix: Option<String>,
}

impl Finding {
    /// Returns the finding of a check that passed.
    pub fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self {
            check,
            severity: Severity::Ok,
            message: message.into(),
            fix: None,
        }
    }

    /// Returns the finding of a check that did not pass, with the command that fixes it.
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

    /// Returns the finding of a check that could not be made.
    pub fn unknown(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(check, Severity::Note, why, None)
    }
}
