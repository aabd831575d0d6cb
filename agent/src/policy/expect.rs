//! `[[expect]]`: cases that a policy carries with it, and the table of what it decides.
//!
//! *Invariant:* a case is answered by the same functions that answer for connections.

use super::{
    Inbound, Kind, Outbound, Policy,
    language::{Client, Decision, Expectation, Server},
};
use crate::document::SourceLocation;
use std::{collections::BTreeSet, sync::Arc};

/// What became of one `[[expect]]` case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectResult {
    /// Where the case is written.
    pub place: SourceLocation,
    /// The question: `spiffe://example.org/curl to 10.0.0.2:80`.
    pub case: String,
    /// The answer that is written: `allow by curl-to-web`.
    pub expected: String,
    /// The answer that the policy gives.
    pub got: String,
    /// They agree.
    pub passed: bool,
}

impl Policy {
    /// Runs every `[[expect]]` case.
    pub fn run_expectations(&self) -> Vec<ExpectResult> {
        self.expectations.iter().map(|expectation| self.run(expectation)).collect()
    }

    /// What the policy decides, for people: who may reach which destination, and what each workload takes.
    /// Everything that is not in it is denied.
    pub fn decision_table(&self) -> String {
        let ids: BTreeSet<_> = self.workloads.iter().map(|workload| &workload.id).collect();
        let mut rows = vec![["FROM", "TO", "DECISION", "RULE"].map(String::from)];
        for id in &ids {
            rows.extend(self.outbound_rows(id));
        }
        for id in &ids {
            rows.extend(self.inbound_rows(id));
        }
        align(&rows) + "everything else of these workloads: deny\n"
    }

    fn run(&self, expectation: &Expectation) -> ExpectResult {
        let (decision, rule) = self.answer(expectation);
        let from = match &expectation.from {
            Client::Id(id) => id.to_string(),
            Client::Plaintext => "plaintext".into(),
        };
        let to = match &expectation.to {
            Server::Address(address) => address.to_string(),
            Server::Id(id, port) => format!("{id} port {port}"),
        };
        let protocol = if expectation.udp { " by UDP" } else { "" };
        let by = |decision: Decision, rule: Option<&str>| match rule {
            Some(rule) => format!("{decision} by {rule}"),
            None => decision.to_string(),
        };
        let passed = decision == expectation.decision
            && expectation.rule.as_deref().is_none_or(|wanted| rule.as_deref() == Some(wanted));
        ExpectResult {
            place: expectation.place.clone(),
            case: format!("{from} to {to}{protocol}"),
            expected: by(expectation.decision, expectation.rule.as_deref()),
            got: by(decision, rule.as_deref()),
            passed,
        }
    }

    fn answer(&self, expectation: &Expectation) -> (Decision, Option<Arc<str>>) {
        let rule = match (&expectation.from, &expectation.to) {
            (Client::Id(from), Server::Address(to)) if expectation.udp => self.udp(from, *to).cloned(),
            (Client::Id(from), Server::Address(to)) => match self.outbound(from, *to) {
                Outbound::Mesh { peers } => peers.0.into_iter().next().map(|(_, rule)| rule),
                Outbound::Bypass(rule) => return (Decision::Bypass, Some(rule.name.clone())),
                Outbound::Deny => None,
            },
            (Client::Id(from), Server::Id(to, port)) => self.inbound(to, *port).peers.admits(from).cloned(),
            (Client::Plaintext, Server::Id(to, port)) => self.inbound(to, *port).permissive,
            // `language` refuses such a case.
            (Client::Plaintext, Server::Address(_)) => None,
        };
        match rule {
            Some(rule) => (Decision::Allow, Some(rule.name.clone())),
            None => (Decision::Deny, None),
        }
    }

    fn outbound_rows(&self, source: &bunter_identity::spiffe::SpiffeId) -> Vec<[String; 4]> {
        let mut rows = Vec::new();
        let mut row = |to: String, decision: &str, rule: &Arc<super::Rule>| {
            rows.push([source.to_string(), to, decision.to_owned(), rule.name.to_string()]);
        };
        for (region, kind) in self.table.regions().iter().zip(&self.kinds) {
            match kind {
                Kind::Mesh(expected) => {
                    if let Some(allow) = self.first_allow(source, expected, region.port) {
                        row(format!("{region} ({expected})"), "allow", &allow.rule);
                    }
                    if let Some(udp) = self.first_udp(source, region) {
                        row(format!("{region} by UDP"), "allow", &udp.rule);
                    }
                }
                Kind::Plain(bypasses) => {
                    let mut bypasses = bypasses.iter().filter_map(|index| self.bypasses.get(*index));
                    if let Some(bypass) = bypasses.find(|bypass| bypass.from.matches(source)) {
                        row(region.to_string(), "bypass", &bypass.rule);
                    }
                }
            }
        }
        rows
    }

    fn inbound_rows(&self, workload: &bunter_identity::spiffe::SpiffeId) -> Vec<[String; 4]> {
        let allows = self.allows.iter().filter(|allow| allow.to.matches(workload)).map(|allow| {
            [allow.from.to_string(), format!("{workload} {}", allow.ports), "allow".into(), allow.rule.name.to_string()]
        });
        let permissive = self.inbounds.iter().filter(|inbound| inbound.id == *workload).filter_map(|inbound| {
            let rule = inbound.permissive.as_ref()?;
            Some(["plaintext".into(), format!("{workload} {}", inbound.ports), "allow".into(), rule.name.to_string()])
        });
        allows.chain(permissive).collect()
    }
}

impl Inbound {
    /// Nobody gets in, by mutual TLS or without.
    pub fn is_closed(&self) -> bool {
        self.peers.is_empty() && self.permissive.is_none()
    }
}

impl std::fmt::Display for ExpectResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.passed {
            write!(f, "{}: {}: {}", self.place, self.case, self.got)
        } else {
            write!(f, "{}: {}: expected {}, but the policy says {}", self.place, self.case, self.expected, self.got)
        }
    }
}

fn align(rows: &[[String; 4]]) -> String {
    let mut widths = [0; 4];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            line.push_str(&format!("{cell:width$}  ", width = *width));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
