//! `bunter status`, `bunter connections` and `bunter doctor`: what is going on, for people and as JSON.

use super::Wrong;
use bunter::admin::{self, Connection, Request, Status, TableStatus};
use bunter::config::{Config, EngineChoice};
use bunter::intercept::{self, Finding};
use bunter::offload::Choice;
use bunter_identity::refusal::Refusal as _;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Where configuration and socket are if nothing else is said.
const DEFAULT_CONFIG: &str = "/etc/bunter/agent.toml";
const DEFAULT_SOCKET: &str = "/run/bunter/admin.sock";

/// Prints what the agent says of itself.
pub fn status(config: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let socket = socket(config)?;
    if json {
        println!("{:#}", admin::ask::<serde_json::Value>(&socket, Request::Status)?);
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", status_text(&admin::ask(&socket, Request::Status)?));
    Ok(ExitCode::SUCCESS)
}

/// Prints the open connections.
pub fn connections(config: Option<&Path>, json: bool) -> anyhow::Result<ExitCode> {
    let socket = socket(config)?;
    if json {
        println!("{:#}", admin::ask::<serde_json::Value>(&socket, Request::Connections)?);
        return Ok(ExitCode::SUCCESS);
    }
    let connections: Vec<Connection> = admin::ask(&socket, Request::Connections)?;
    print!("{}", connections_text(&connections));
    Ok(ExitCode::SUCCESS)
}

/// Prints what this kernel can do, whether the agent sees the whole host and not a container, and how full the kernel's
/// tables are. Fails where an agent would not start.
pub fn doctor(json: bool) -> anyhow::Result<ExitCode> {
    let host = intercept::findings();
    let tables = intercept::PinnedTables::here()
        .and_then(|tables| tables.map_or_else(|| Ok(Vec::new()), |tables| tables.count()));
    let tables: Result<Vec<TableStatus>, _> = tables.map(|tables| tables.into_iter().map(Into::into).collect());
    let report = bunter::offload::selftest::run();
    let sandbox = bunter::privilege::probe();
    if json {
        let mut value = serde_json::to_value(&report)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("possible".into(), serde_json::to_value(report.verdict())?);
            fields.insert("auto".into(), Choice::from(EngineChoice::Auto, &report)?.engine().name().into());
            fields.insert("sandbox".into(), sandbox.to_string().into());
            fields.insert("host".into(), host.iter().map(finding_json).collect());
            // If there are none, the findings say why.
            fields.insert("tables".into(), serde_json::to_value(tables.unwrap_or_default())?);
        }
        println!("{value:#}");
    } else {
        println!("{report}\nsandbox: {sandbox}");
        print!("{}", host_text(&host, &tables));
    }
    Ok(if host.iter().all(|finding| finding.outcome.is_ok()) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn finding_json(finding: &Finding) -> serde_json::Value {
    match &finding.outcome {
        Ok(says) => serde_json::json!({ "item": finding.item, "ok": true, "says": says }),
        Err(error) => {
            serde_json::json!({ "item": finding.item, "ok": false, "code": error.code(), "says": error.to_string() })
        }
    }
}

fn host_text(host: &[Finding], tables: &Result<Vec<TableStatus>, intercept::Error>) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = section(&mut text, "host", host, |finding| match &finding.outcome {
        Ok(says) => format!("ok   {}: {says}", finding.item),
        Err(error) => format!("NOT  {}: {error}", finding.item),
    });
    let _ = match tables {
        Ok(tables) if tables.is_empty() => writeln!(text, "tables: none, no agent is or was in this network namespace"),
        Ok(tables) => section(&mut text, "tables", tables, ToString::to_string),
        Err(error) => writeln!(text, "tables: cannot be counted: {error}"),
    };
    text
}

fn socket(config: Option<&Path>) -> anyhow::Result<PathBuf> {
    let path = match config {
        Some(path) => path,
        None if Path::new(DEFAULT_CONFIG).exists() => Path::new(DEFAULT_CONFIG),
        None => return Ok(DEFAULT_SOCKET.into()),
    };
    let config = Config::load(path).map_err(|error| Wrong(error.to_string()))?;
    Ok(config.admin_socket())
}

fn status_text(status: &Status) -> String {
    let mut text = String::new();
    // Writing into a String cannot fail.
    let _ = write_status(&mut text, status);
    text
}

fn write_status(out: &mut String, status: &Status) -> std::fmt::Result {
    let agent = &status.agent;
    writeln!(
        out,
        "agent      {} pid {} since {}{}",
        agent.version,
        agent.pid,
        agent.since,
        if agent.draining { ", draining" } else { "" }
    )?;
    writeln!(
        out,
        "covers     network namespace {}, cgroup {} and below, {} shards",
        agent.netns, agent.cgroup, agent.shards
    )?;
    writeln!(out, "engine     {} ({})", agent.engine, agent.engine_reason)?;
    writeln!(out, "sandbox    {}", agent.sandbox)?;
    let policy = &status.policy;
    writeln!(
        out,
        "policy     generation {} from {}, loaded {}: {} workloads, {} destinations{}",
        policy.generation,
        policy.directory.display(),
        policy.loaded,
        policy.workloads,
        policy.destinations,
        if policy.reading { "; what is on disk now is being read" } else { "" }
    )?;
    if let Some(refused) = &policy.refused {
        writeln!(out, "           the last reload was REFUSED, the policy above stays in force:")?;
        for line in refused.lines() {
            writeln!(out, "             {line}")?;
        }
    }
    let audit = &status.audit;
    writeln!(out, "audit      {}: {} lines written, {} lost", audit.path.display(), audit.written, audit.lost)?;
    if audit.failing {
        writeln!(out, "           FAILING: {}", audit.last_error.as_deref().unwrap_or("unknown error"))?;
    }
    let connections = &status.connections;
    writeln!(out, "open       {} connections of {} accepted", connections.open, connections.total)?;
    writeln!(
        out,
        "places     {} outbound and {} inbound of {} each are taken, {} peers have not proved who they are",
        connections.outbound, connections.inbound, connections.limit, connections.unproven
    )?;
    section(out, "troubles", &status.troubles, |trouble| {
        format!(
            "{} FAILED {} times since {}, last {}: {} ({})",
            trouble.code, trouble.count, trouble.since, trouble.last, trouble.error, trouble.means
        )
    })?;
    section(out, "identities", &status.identities, |identity| match (&identity.expires, &identity.error) {
        (Some(expires), None) => format!("{} until {expires}", identity.id),
        (Some(expires), Some(error)) => format!("{} until {expires}; renewal FAILS: {error}", identity.id),
        (None, error) => format!("{} NONE: {}", identity.id, error.as_deref().unwrap_or("not asked for yet")),
    })?;
    section(out, "trust bundles", &status.bundles, |bundle| {
        let until = bundle.expires.as_deref().unwrap_or("unknown");
        let revocations = bundle.revocations.as_ref().map(|lists| {
            let expired = if lists.expired { ", which has EXPIRED: its peers are refused" } else { "" };
            format!("; {} revoked, list good until {}{expired}", lists.revoked, lists.next_update)
        });
        format!("{}: {} anchors until {until}{}", bundle.trust_domain, bundle.anchors, revocations.unwrap_or_default())
    })?;
    section(out, "listeners", &status.listeners, |listener| {
        let id = listener.id.as_deref().unwrap_or("-");
        let refused = listener.refused.as_deref().map(|why| format!("; refused: {why}")).unwrap_or_default();
        format!("{} {} {id} pid {}{refused}", listener.address, listener.mode, listener.pid)
    })?;
    section(out, "connections from before", &status.preexisting, |connection| {
        format!("{} - {} ({})", connection.local, connection.remote, connection.action)
    })?;
    section(out, "refused", &status.refused, |(code, refused)| {
        format!("{code} {} times, last {}: {}", refused.count, refused.last, refused.last_reason)
    })?;
    let counted = status.kernel.iter().filter(|(_, count)| **count > 0);
    section(out, "kernel counters", counted, |(name, count)| format!("{name} {count}"))?;
    section(out, "tables", &status.tables, ToString::to_string)
}

fn section<T>(
    out: &mut String,
    title: &str,
    items: impl IntoIterator<Item = T>,
    line: impl Fn(T) -> String,
) -> std::fmt::Result {
    let mut items = items.into_iter().peekable();
    if items.peek().is_some() {
        writeln!(out, "{title}")?;
    }
    items.try_for_each(|item| writeln!(out, "  {}", line(item)))
}

fn connections_text(connections: &[Connection]) -> String {
    if connections.is_empty() {
        return "no open connections\n".into();
    }
    let mut text = String::new();
    for connection in connections {
        let end = |end: &admin::ConnectionEnd| match &end.id {
            Some(id) => format!("{id} ({})", end.address),
            None => end.address.to_string(),
        };
        let _ = writeln!(
            text,
            "{} {} {} -> {}\n    {} {} engine {} rule {} since {}: {} bytes sent, {} received",
            connection.flow,
            connection.direction,
            end(&connection.source),
            end(&connection.destination),
            connection.method,
            connection.tls.as_deref().unwrap_or("-"),
            connection.engine.as_deref().unwrap_or("-"),
            connection.rule.as_deref().unwrap_or("-"),
            connection.since,
            connection.sent,
            connection.received,
        );
    }
    text
}
