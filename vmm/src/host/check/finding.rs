//! The answer to one question of a check.

use serde::Serialize;

/// What a check has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// An update could go ahead, and would be slower, or nobody knows.
    Warning,
    /// An update must not go ahead: guests would be lost, or it would fail on the way.
    Failure,
}

/// The answer to one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The question's name.
    pub check: &'static str,
    /// The answer in short.
    pub verdict: Verdict,
    /// The answer.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), help: None }
    }

    /// Not as well as it could be.
    pub fn warning(check: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warning, found: found.into(), help: Some(help.into()) }
    }

    /// Not well.
    pub fn failure(check: &'static str, found: impl Into<String>, help: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Failure, found: found.into(), help: Some(help.into()) }
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { check, verdict, found, help } = self;
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failure => "NOT OK",
        };
        write!(formatter, "{verdict:<8} {check:<16} {found}")?;
        help.iter().try_for_each(|help| write!(formatter, "\n{:25}→ {help}", ""))
    }
}
