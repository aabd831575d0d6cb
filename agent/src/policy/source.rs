//! The text of a policy, and what is wrong with it.

use crate::document::Problems;
use bunter_identity::refusal::{Culprit, Refusal};
use std::sync::Arc;

/// A file of a policy and its text.
#[derive(Clone, Debug)]
pub struct Source {
    /// Name, as shown to people.
    pub file: Arc<str>,
    /// Content.
    pub text: String,
}

/// A policy that is not taken, and everything that is wrong with it: one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problems}")]
pub struct Rejected {
    /// What is wrong, by file and line.
    pub problems: Problems,
}

impl Refusal for Rejected {
    fn culprit(&self) -> Culprit {
        Culprit::Policy
    }
    fn code(&self) -> &'static str {
        "policy-invalid"
    }
}
