//! SPIFFE IDs and trust domains: parsed once, compared cheaply.

use std::sync::Arc;

/// A trust domain name: `example.org`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID with a path: `spiffe://example.org/web`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    path_at: u16,
}

/// What is wrong with an identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidId(&'static str);

/// An explicit pattern over SPIFFE IDs (R17): `spiffe://example.org/ns/*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern(Arc<str>);

impl TrustDomain {
    /// Parses a trust domain name.
    pub fn parse(_name: &str) -> Result<Self, InvalidId> {
        todo!()
    }
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// Parses a complete SPIFFE ID with a non-root path.
    pub fn parse(_uri: &str) -> Result<Self, InvalidId> {
        todo!()
    }
    /// The complete URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
    /// The trust domain part.
    pub fn trust_domain(&self) -> TrustDomain {
        todo!()
    }
}

impl Pattern {
    /// Parses a pattern.
    pub fn parse(_text: &str) -> Result<Self, InvalidId> {
        todo!()
    }
    /// Does the complete URI match?
    pub fn matches(&self, _id: &SpiffeId) -> bool {
        todo!()
    }
}

impl std::fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
impl std::fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
