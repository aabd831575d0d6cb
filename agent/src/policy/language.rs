//! The words of the policy language: one file in, its statements out, each with its place.
//!
//! What is wrong with a statement by itself is found here; what is wrong with statements together is found in `check`.
//!
//! *Invariant:* a statement with a problem is left out whole. It never stands in the policy with a part missing.

use super::{
    Matcher, Preexisting,
    selector::{Accounts, Selector},
    table::Region,
};
use crate::{
    document::{At, Document, Problems, SourceLocation, Table, TextOrTable, clip, nearest, parts},
    units,
};
use bunter_identity::spiffe::{Pattern, SpiffeId, TrustDomain};
use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

/// Everything that the files of a policy say, in their order.
#[derive(Default)]
pub(super) struct Statements {
    pub trust_domains: Vec<At<TrustDomain>>,
    pub preexisting: Vec<At<Preexisting>>,
    pub workloads: Vec<WorkloadEntry>,
    pub destinations: Vec<DestinationEntry>,
    /// `[[allow]]`, `[[inbound]]`, `[[bypass]]` and `[[udp]]` by the order of their files, then of their kind.
    pub allows: Vec<AllowRule>,
    pub inbounds: Vec<InboundRule>,
    pub bypasses: Vec<PlainRule>,
    pub udps: Vec<PlainRule>,
    pub expectations: Vec<Expectation>,
}

pub(super) struct WorkloadEntry {
    pub place: SourceLocation,
    pub id: SpiffeId,
    pub selectors: Vec<At<Selector>>,
}

pub(super) struct DestinationEntry {
    pub place: SourceLocation,
    pub region: Region,
    pub id: SpiffeId,
}

pub(super) struct AllowRule {
    pub place: SourceLocation,
    pub name: Arc<str>,
    pub from: Matcher,
    pub to: Matcher,
    pub ports: Ports,
    pub idle_timeout: Option<Duration>,
}

pub(super) struct InboundRule {
    pub place: SourceLocation,
    pub name: Arc<str>,
    pub id: SpiffeId,
    pub listen: Vec<At<SocketAddr>>,
    pub ports: Ports,
    pub permissive: bool,
}

/// A `[[bypass]]` or a `[[udp]]`.
pub(super) struct PlainRule {
    pub place: SourceLocation,
    pub name: Arc<str>,
    pub from: Matcher,
    pub region: Region,
}

/// An `[[expect]]` case.
#[derive(Debug)]
pub(super) struct Expectation {
    pub place: SourceLocation,
    pub from: Client,
    pub to: Server,
    pub udp: bool,
    pub decision: Decision,
    pub rule: Option<String>,
}

/// Who asks, in an expectation.
#[derive(Debug)]
pub(super) enum Client {
    Id(SpiffeId),
    /// Somebody without TLS.
    Plaintext,
}

/// What is asked for, in an expectation.
#[derive(Debug)]
pub(super) enum Server {
    /// Outbound view: what the client's host decides.
    Address(SocketAddr),
    /// Inbound view: what the server's host decides.
    Id(SpiffeId, u16),
}

/// What an expectation expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decision {
    Allow,
    Deny,
    Bypass,
}

/// The ports of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ports {
    All,
    /// Sorted, without repetition, never empty.
    Some(Vec<u16>),
}

impl Ports {
    pub fn contain(&self, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Some(ports) => ports.binary_search(&port).is_ok(),
        }
    }

    pub fn overlap(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Some(a), Self::Some(b)) => a.iter().any(|port| b.binary_search(port).is_ok()),
            _ => true,
        }
    }
}

const ROOT: [&str; 9] =
    ["trust_domain", "preexisting", "workload", "destination", "allow", "inbound", "bypass", "udp", "expect"];

impl Statements {
    /// Reads one file.
    pub fn read(&mut self, file: &Arc<str>, text: &str, accounts: &Accounts, problems: &mut Problems) {
        let (mut statements, mut found) = (Self::default(), Problems::default());
        let whole = parts(text).all(|(before, part)| {
            let document = Document::parse_part(file, before, part, &mut found);
            document.map(|document| statements.take(&document, accounts, &mut found)).is_some()
        });
        if whole {
            self.append(statements);
            problems.0.extend(found.0);
        } else if let Some(document) = Document::parse(file, text, problems) {
            self.take(&document, accounts, problems);
        }
    }

    fn append(&mut self, other: Self) {
        self.trust_domains.extend(other.trust_domains);
        self.preexisting.extend(other.preexisting);
        self.workloads.extend(other.workloads);
        self.destinations.extend(other.destinations);
        self.allows.extend(other.allows);
        self.inbounds.extend(other.inbounds);
        self.bypasses.extend(other.bypasses);
        self.udps.extend(other.udps);
        self.expectations.extend(other.expectations);
    }

    fn take(&mut self, document: &Document<'_>, accounts: &Accounts, problems: &mut Problems) {
        let root = document.root(&ROOT, problems);
        if let Some(name) = root.text("trust_domain", problems) {
            match TrustDomain::parse(name.value) {
                Ok(value) => self.trust_domains.push(At { place: name.place, value }),
                Err(error) => {
                    let what = format!("trust domain `{}`: {error}", clip(name.value));
                    problems.add(&name.place, what, "write a name such as \"example.org\"");
                }
            }
        }
        self.preexisting.extend(preexisting(&root, problems));
        let tables = |key, known: &[&'static str], problems: &mut Problems| root.tables(key, known, problems);
        for table in tables("workload", &["id", "selectors"], problems) {
            self.workloads.extend(workload(&table, accounts, problems));
        }
        for table in tables("destination", &["address", "id"], problems) {
            self.destinations.extend(destination(&table, problems));
        }
        for table in tables("allow", &["name", "from", "to", "ports", "idle_timeout"], problems) {
            self.allows.extend(allow(&table, problems));
        }
        for table in tables("inbound", &["name", "id", "listen", "ports", "mode"], problems) {
            self.inbounds.extend(inbound(&table, problems));
        }
        for table in tables("bypass", &["name", "from", "address"], problems) {
            self.bypasses.extend(plain(&table, problems));
        }
        for table in tables("udp", &["name", "from", "address"], problems) {
            self.udps.extend(plain(&table, problems));
        }
        for table in tables("expect", &["from", "to", "port", "protocol", "decision", "rule"], problems) {
            self.expectations.extend(expectation(&table, problems));
        }
    }
}

fn preexisting(root: &Table<'_>, problems: &mut Problems) -> Option<At<Preexisting>> {
    let text = root.text("preexisting", problems)?;
    let value = match text.value.split_once(' ') {
        None if text.value == "keep" => Preexisting::Keep,
        None if text.value == "kill" => Preexisting::Kill,
        Some(("drain", time)) => match units::duration(time) {
            Ok(time) => Preexisting::Drain(time),
            Err(error) => {
                problems.add(&text.place, format!("`preexisting`: {error}"), "write preexisting = \"drain 10m\"");
                return None;
            }
        },
        _ => {
            let what = format!("`preexisting` cannot be `{}`", clip(text.value));
            problems.add(&text.place, what, "write \"keep\", \"kill\" or \"drain 10m\"");
            return None;
        }
    };
    Some(At { place: text.place, value })
}

fn workload(table: &Table<'_>, accounts: &Accounts, problems: &mut Problems) -> Option<WorkloadEntry> {
    let id = id(table, "id", problems);
    table.require("selectors", "selectors = [\"systemd:nginx.service\"]", problems);
    let texts = table.texts("selectors", problems)?;
    if texts.is_empty() {
        let what = "a workload without selectors would be every process";
        problems.add(&table.place_of("selectors"), what, "write selectors = [\"systemd:nginx.service\"]");
        return None;
    }
    let mut selectors = Vec::with_capacity(texts.len());
    let before = problems.0.len();
    for text in texts {
        match Selector::parse(text.value, accounts) {
            Ok(value) => selectors.push(At { place: text.place, value }),
            Err(wrong) => problems.add(&text.place, wrong.what, wrong.instead),
        }
    }
    (problems.0.len() == before).then_some(())?;
    Some(WorkloadEntry { place: table.place.clone(), id: id?, selectors })
}

fn destination(table: &Table<'_>, problems: &mut Problems) -> Option<DestinationEntry> {
    let region = region(table, problems);
    let id = id(table, "id", problems);
    Some(DestinationEntry { place: table.place.clone(), region: region?, id: id? })
}

fn allow(table: &Table<'_>, problems: &mut Problems) -> Option<AllowRule> {
    let name = name(table, false, problems);
    let from = matcher(table, "from", problems);
    let to = matcher(table, "to", problems);
    let ports = ports(table, problems);
    let idle_timeout = match table.text("idle_timeout", problems) {
        None if table.has("idle_timeout") => None,
        None => Some(None),
        Some(text) => match units::duration(text.value) {
            Ok(time) if !time.is_zero() => Some(Some(time)),
            Ok(_) => {
                let instead = "write the time that a connection may be silent, or remove it for no limit";
                problems.add(&text.place, "`idle_timeout` is zero", instead);
                None
            }
            Err(error) => {
                problems.add(&text.place, format!("`idle_timeout`: {error}"), "write idle_timeout = \"1h\"");
                None
            }
        },
    };
    let place = table.place.clone();
    Some(AllowRule { place, name: name?, from: from?, to: to?, ports: ports?, idle_timeout: idle_timeout? })
}

fn inbound(table: &Table<'_>, problems: &mut Problems) -> Option<InboundRule> {
    let name = name(table, false, problems);
    let id = id(table, "id", problems);
    let ports = ports(table, problems);
    let permissive = match table.text("mode", problems) {
        None if table.has("mode") => None,
        None => Some(false),
        Some(mode) => match mode.value {
            "strict" => Some(false),
            "permissive" => Some(true),
            other => {
                let what = format!("`mode` cannot be `{}`", clip(other));
                problems.add(&mode.place, what, "write \"strict\" or \"permissive\"");
                None
            }
        },
    };
    let mut listen = Vec::new();
    for text in table.texts("listen", problems).unwrap_or_default() {
        match text.value.parse::<SocketAddr>() {
            Ok(value) if value.port() > 0 && value.ip().to_canonical() == value.ip() && !zoned(&value) => {
                listen.push(At { place: text.place, value });
            }
            _ => {
                let what = format!("`listen` cannot be `{}`", clip(text.value));
                let instead = "write the address that the server binds, such as \"0.0.0.0:80\" or \"[::]:80\"";
                problems.add(&text.place, what, instead);
                return None;
            }
        }
    }
    let place = table.place.clone();
    Some(InboundRule { place, name: name?, id: id?, listen, ports: ports?, permissive: permissive? })
}

fn zoned(address: &SocketAddr) -> bool {
    matches!(address, SocketAddr::V6(address) if address.scope_id() != 0)
}

fn plain(table: &Table<'_>, problems: &mut Problems) -> Option<PlainRule> {
    let name = name(table, true, problems);
    let from = matcher(table, "from", problems);
    let region = region(table, problems);
    Some(PlainRule { place: table.place.clone(), name: name?, from: from?, region: region? })
}

fn expectation(table: &Table<'_>, problems: &mut Problems) -> Option<Expectation> {
    let before = problems.0.len();
    let from = table.required_text("from", "from = \"spiffe://example.org/web\"", problems);
    let to = table.required_text("to", "to = \"10.0.0.2:80\", or an ID with port = 80", problems);
    let decision = table.required_text("decision", "decision = \"allow\", \"deny\" or \"bypass\"", problems);
    let port = table.number("port", 1, 65535, problems).and_then(|port| u16::try_from(port.value).ok());
    let rule = table.text("rule", problems);
    let protocol = table.text("protocol", problems);
    let udp = match protocol.as_ref().map(|protocol| protocol.value) {
        None | Some("tcp") => false,
        Some("udp") => true,
        Some(other) => {
            let place = table.place_of("protocol");
            problems.add(&place, format!("`protocol` cannot be `{}`", clip(other)), "write \"tcp\" or \"udp\"");
            false
        }
    };
    let (from, to, decision) = (from?, to?, decision?);
    let client = match from.value {
        "plaintext" => Some(Client::Plaintext),
        text => SpiffeId::parse(text).map_err(|error| wrong_id(&from, &error, problems)).ok().map(Client::Id),
    };
    let server = server(table, &to, port, problems);
    let wanted = match decision.value {
        "allow" => Decision::Allow,
        "deny" => Decision::Deny,
        "bypass" => Decision::Bypass,
        other => {
            let what = format!("`decision` cannot be `{}`", clip(other));
            let instead = match nearest(other, ["allow", "deny", "bypass"]) {
                Some(near) => format!("write \"{near}\""),
                None => "write \"allow\", \"deny\" or \"bypass\"".into(),
            };
            problems.add(&decision.place, what, instead);
            return None;
        }
    };
    let (client, server) = (client?, server?);
    let refuse =
        |key, what: &str, instead: &str, problems: &mut Problems| problems.add(&table.place_of(key), what, instead);
    match (&client, &server, wanted) {
        (Client::Plaintext, Server::Address(_), _) => {
            refuse("from", "a workload always has an identity of its own", "write its ID, or an ID in `to`", problems);
        }
        (_, Server::Id(..), Decision::Bypass) => {
            refuse("decision", "a bypass is decided where the client runs", "write an address in `to`", problems);
        }
        (_, Server::Id(..), _) if udp => {
            refuse("protocol", "UDP is decided where the client runs", "write an address in `to`", problems);
        }
        (_, _, Decision::Bypass) if udp => {
            refuse("decision", "a bypass is for TCP", "write \"allow\" for a [[udp]] rule", problems);
        }
        _ => {}
    }
    if rule.is_some() && wanted == Decision::Deny {
        refuse("rule", "no rule denies: what no rule allows is denied", "remove `rule`", problems);
    }
    (problems.0.len() == before).then(|| Expectation {
        place: table.place.clone(),
        from: client,
        to: server,
        udp,
        decision: wanted,
        rule: rule.map(|rule| rule.value.to_owned()),
    })
}

fn server(table: &Table<'_>, to: &At<&str>, port: Option<u16>, problems: &mut Problems) -> Option<Server> {
    if to.value.starts_with("spiffe:") {
        let id = SpiffeId::parse(to.value).map_err(|error| wrong_id(to, &error, problems)).ok();
        table.require("port", "port = 80, the port that the client dials", problems);
        return Some(Server::Id(id?, port?));
    }
    if table.has("port") {
        problems.add(
            &table.place_of("port"),
            "`port` is for an ID in `to`",
            "write it in the address and remove it here",
        );
    }
    match to.value.parse::<SocketAddr>() {
        Ok(address) if address.port() > 0 => Some(Server::Address(address)),
        _ => {
            let what = format!("`to` cannot be `{}`", clip(to.value));
            problems.add(&to.place, what, "write one address and port, \"10.0.0.2:80\" or \"[fd00::2]:80\", or an ID");
            None
        }
    }
}

fn id(table: &Table<'_>, key: &'static str, problems: &mut Problems) -> Option<SpiffeId> {
    let text = table.required_text(key, &format!("{key} = \"spiffe://example.org/web\""), problems)?;
    SpiffeId::parse(text.value).map_err(|error| wrong_id(&text, &error, problems)).ok()
}

fn wrong_id(text: &At<&str>, error: &bunter_identity::spiffe::InvalidId, problems: &mut Problems) {
    let what = format!("SPIFFE ID `{}`: {error}", clip(text.value));
    let instead = if text.value.contains('*') {
        "write { pattern = \"...\" } where a rule may mean many IDs, or one ID"
    } else {
        "write it as the certificates carry it, such as \"spiffe://example.org/web\""
    };
    problems.add(&text.place, what, instead);
}

fn matcher(table: &Table<'_>, key: &'static str, problems: &mut Problems) -> Option<Matcher> {
    table.require(key, &format!("{key} = \"spiffe://example.org/web\""), problems);
    match table.text_or_table(key, &["pattern"], problems)? {
        TextOrTable::Text(text) => {
            let id = SpiffeId::parse(text.value).map_err(|error| wrong_id(&text, &error, problems));
            id.ok().map(Matcher::Exact)
        }
        TextOrTable::Table(inner) => {
            let text = inner.required_text("pattern", "{ pattern = \"spiffe://example.org/ns/*\" }", problems)?;
            match Pattern::parse(text.value) {
                Ok(pattern) => Some(Matcher::Pattern(pattern)),
                Err(error) => {
                    let what = format!("pattern `{}`: {error}", clip(text.value));
                    let instead = "write { pattern = \"spiffe://example.org/ns/*\" } for one segment, or `/**` at the end for more";
                    problems.add(&text.place, what, instead);
                    None
                }
            }
        }
    }
}

fn region(table: &Table<'_>, problems: &mut Problems) -> Option<Region> {
    let text = table.required_text("address", "address = \"10.0.0.2:80\"", problems)?;
    match Region::parse(text.value) {
        Ok(region) => Some(region),
        Err((what, instead)) => {
            problems.add(&text.place, what, instead);
            None
        }
    }
}

fn ports(table: &Table<'_>, problems: &mut Problems) -> Option<Ports> {
    if !table.has("ports") {
        return Some(Ports::All);
    }
    let before = problems.0.len();
    let mut seen = BTreeSet::new();
    for number in table.numbers("ports", 1, 65535, problems)? {
        let port = u16::try_from(number.value).unwrap_or_default();
        if !seen.insert(port) {
            problems.add(&number.place, format!("port {port} is there twice"), "write it once");
        }
    }
    if seen.is_empty() && problems.0.len() == before {
        problems.add(&table.place_of("ports"), "`ports` is empty", "write the ports, or remove it for all ports");
    }
    (problems.0.len() == before).then(|| Ports::Some(seen.into_iter().collect()))
}

/// The name of a rule; `file.toml:12` where none is written and none is needed.
fn name(table: &Table<'_>, required: bool, problems: &mut Problems) -> Option<Arc<str>> {
    let text = match table.text("name", problems) {
        Some(text) => text,
        None if table.has("name") => return None,
        None if required => {
            table.require("name", "name = \"...\", so that every plaintext packet has a named reason", problems);
            return None;
        }
        None => {
            let file = table.place.file.rsplit('/').next().unwrap_or_default();
            return Some(format!("{file}:{}", table.place.line).into());
        }
    };
    let fit = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&text.value.len()) && text.value.chars().all(fit) {
        return Some(text.value.into());
    }
    let what = format!("the name `{}` is not a word", clip(text.value));
    problems.add(&text.place, what, "write 1 to 64 letters, digits, `-`, `_` or `.`, such as \"curl-to-web\"");
    None
}

/// The words of a decision, for tables and messages.
impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Bypass => "bypass",
        })
    }
}

/// The ports of a rule, for tables and messages.
impl std::fmt::Display for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all ports"),
            Self::Some(ports) => {
                let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
                write!(f, "port {}", ports.join(", "))
            }
        }
    }
}
