//! The admin socket: what `bunter status` and `bunter connections` ask a running agent.
//!
//! One request line of JSON in, one answer line of JSON out, over a Unix socket that only root can open (mode 0600 in a
//! directory of root's; the peer's user id is checked as well).
//!
//! *Invariant:* nothing that is asked here changes anything, and no answer holds a key.

use crate::intercept::TableUsage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};

/// Longest request line, in bytes.
const LONGEST_REQUEST: u64 = 4096;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// A [`Status`].
    Status,
    /// A list of [`Connection`]s.
    Connections,
}

/// What the agent is doing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The agent itself.
    pub agent: Agent,
    /// The policy in force.
    pub policy: PolicyStatus,
    /// The audit log.
    pub audit: AuditStatus,
    /// SVIDs that the agent holds.
    pub identities: Vec<IdentityStatus>,
    /// Trust bundles: trust domain, and when the last of its anchors expires.
    pub bundles: Vec<BundleStatus>,
    /// Protected listening sockets.
    pub listeners: Vec<ListenerStatus>,
    /// Connections from before their workload was enrolled, which Bunter does not carry.
    pub preexisting: Vec<PreexistingStatus>,
    /// Attempts that were refused since the start, by code.
    pub refused: BTreeMap<String, RefusedStatus>,
    /// Counters of the kernel programs since their maps were made.
    pub kernel: BTreeMap<String, u64>,
    /// Tables of the kernel programs; the answer of an older agent has none.
    #[serde(default)]
    pub tables: Vec<TableStatus>,
    /// What does not work at the moment, is tried again, and ends nothing.
    #[serde(default)]
    pub troubles: Vec<TroubleStatus>,
    /// Connections: open now, and carried since the start.
    pub connections: ConnectionCount,
}

/// The agent itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Agent {
    /// Version.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// RFC 3339.
    pub since: String,
    /// Inode number of the network namespace.
    pub netns: u64,
    /// Path of the covered cgroup subtree.
    pub cgroup: String,
    /// `kernel` or `user`.
    pub engine: String,
    /// Why this engine.
    pub engine_reason: String,
    /// Data shards.
    pub shards: usize,
    /// `on`, or `off` and why.
    pub sandbox: String,
    /// The agent is draining: it takes no new connections.
    pub draining: bool,
}

/// The policy in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// Directory it came from.
    pub directory: PathBuf,
    /// Generation in the kernel maps.
    pub generation: u32,
    /// RFC 3339.
    pub loaded: String,
    /// Reloads since the start that were taken or refused. Signals that come while the files on disk are being read lead to
    /// one more reload.
    pub reloads: u64,
    /// The files on disk are being read: it is not decided yet what the last signal leads to.
    pub reading: bool,
    /// Why the last of the reloads was refused; absent when what was on disk was taken.
    pub refused: Option<String>,
    /// Number of registration entries.
    pub workloads: usize,
    /// Number of destination entries.
    pub destinations: usize,
}

/// The audit log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AuditStatus {
    /// File.
    pub path: PathBuf,
    /// Lines written.
    pub written: u64,
    /// Lines dropped.
    pub lost: u64,
    /// The log cannot be written right now, or not be opened again after a rotation.
    pub failing: bool,
    /// What the last failure said.
    pub last_error: Option<String>,
}

/// An SVID that the agent holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct IdentityStatus {
    /// SPIFFE ID.
    pub id: String,
    /// RFC 3339; absent when none could be had.
    pub expires: Option<String>,
    /// Why the last attempt to get one failed.
    pub error: Option<String>,
}

/// A trust bundle.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BundleStatus {
    /// Trust domain.
    pub trust_domain: String,
    /// Number of anchors.
    pub anchors: usize,
    /// RFC 3339: when the last anchor expires.
    pub expires: Option<String>,
    /// Its revocation lists; absent where it has none.
    pub revocations: Option<RevocationStatus>,
}

/// The revocation lists of a trust domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevocationStatus {
    /// How many certificates they revoke.
    pub revoked: usize,
    /// RFC 3339: by when the first of them has to be replaced.
    pub next_update: String,
    /// One of them was not replaced in time: peers of its authority are refused.
    pub expired: bool,
}

/// A protected listening socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Address as bound.
    pub address: SocketAddr,
    /// Identity of its owner, once attested.
    pub id: Option<String>,
    /// The process that it listens for: one that bound it, began to listen, or holds it.
    pub pid: u32,
    /// `protected` or `undecided`: in both cases no plaintext comes in.
    pub mode: String,
    /// Why connections to it are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A connection from before its workload was enrolled.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PreexistingStatus {
    /// This host's end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// `keep`, or `closed in N s`, which is 0 while closing it fails and is tried again.
    pub action: String,
}

/// Attempts that were refused with one code.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RefusedStatus {
    /// How many.
    pub count: u64,
    /// RFC 3339.
    pub last: String,
    /// Both ends and the reason of the last one.
    pub last_reason: String,
}

/// A table of the kernel programs, and how full it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TableStatus {
    /// Name of the map.
    pub name: String,
    /// Rows that it has; at least so many where `counted` is false.
    pub used: u32,
    /// Rows that it has room for.
    pub size: u32,
    /// There was time to count all of them.
    pub counted: bool,
}

impl From<TableUsage> for TableStatus {
    fn from(TableUsage { name, used, size, counted }: TableUsage) -> Self {
        Self { name, used, size, counted }
    }
}

impl fmt::Display for TableStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = if self.counted { "" } else { "at least " };
        write!(f, "{} {least}{} of {} rows used", self.name, self.used, self.size)
    }
}

/// Something that does not work at the moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TroubleStatus {
    /// Stable name of what fails.
    pub code: String,
    /// RFC 3339: since when.
    pub since: String,
    /// RFC 3339: when it failed last.
    pub last: String,
    /// How often it failed.
    pub count: u64,
    /// What the last failure said.
    pub error: String,
    /// What follows for the host.
    pub means: String,
}

/// Numbers of connections.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct ConnectionCount {
    /// Open now.
    pub open: usize,
    /// Accepted since the start, refused ones included.
    pub total: u64,
    /// Places each way.
    #[serde(default)]
    pub limit: usize,
    /// Places that local programs have taken.
    #[serde(default)]
    pub outbound: usize,
    /// Places that peers have taken.
    #[serde(default)]
    pub inbound: usize,
    /// Places that peers have taken which have not proved who they are. There are as many of these as of `inbound`, and
    /// beside those.
    #[serde(default)]
    pub unproven: usize,
}

/// An open connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connection {
    /// Number of the flow, as in the audit log.
    pub flow: u64,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// Dialling end.
    pub source: ConnectionEnd,
    /// Dialled end.
    pub destination: ConnectionEnd,
    /// `mtls` or `plaintext`.
    pub method: String,
    /// Key exchange group and cipher suite.
    pub tls: Option<String>,
    /// `kernel` or `user`.
    pub engine: Option<String>,
    /// The rule that let it pass.
    pub rule: Option<String>,
    /// Process id of the local workload.
    pub pid: Option<u32>,
    /// RFC 3339.
    pub since: String,
    /// From the local workload to the peer, in bytes.
    pub sent: u64,
    /// From the peer to the local workload, in bytes.
    pub received: u64,
}

/// One end of an open connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionEnd {
    /// SPIFFE ID, if authenticated.
    pub id: Option<String>,
    /// Address and port.
    pub address: SocketAddr,
}

/// Asking, or opening the socket, went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error("no agent answers on {path}: {error}; start one with 'bunter agent', or name its configuration by --config",
        path = path.display())]
    NoAgent {
        /// The socket.
        path: PathBuf,
        /// What connect said.
        error: std::io::Error,
    },
    /// This user may not ask.
    #[error("the agent's socket {path} is for root alone: ask as root", path = path.display())]
    NotRoot {
        /// The socket.
        path: PathBuf,
    },
    /// The answer is not valid.
    #[error("the agent on {path} gave no valid answer: {reason}", path = path.display())]
    BadAnswer {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The socket cannot be made.
    #[error("admin socket {path}: {source}; [run_dir] must be a directory that root can write", path = path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What bind said.
        source: std::io::Error,
    },
}

/// Asks a running agent.
pub fn ask<T: serde::de::DeserializeOwned>(path: &Path, request: Request) -> Result<T, Error> {
    let no_agent = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => Error::NotRoot { path: path.to_owned() },
        _ => Error::NoAgent { path: path.to_owned(), error },
    };
    let bad = |reason: String| Error::BadAnswer { path: path.to_owned(), reason };
    let mut stream = UnixStream::connect(path).map_err(no_agent)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(no_agent)?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(no_agent)?;
    let mut line = serde_json::to_vec(&request).map_err(|error| bad(error.to_string()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(|error| bad(error.to_string()))?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).map_err(|error| bad(error.to_string()))?;
    serde_json::from_str(&answer).map_err(|error| bad(error.to_string()))
}

/// Makes the socket; an old one that nobody answers on is replaced.
pub fn bind(path: &Path) -> Result<tokio::net::UnixListener, Error> {
    let attempt = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = tokio::net::UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    };
    attempt().map_err(|source| Error::Bind { path: path.to_owned(), source })
}

/// A question on its way to whoever can answer it.
#[derive(Debug)]
pub struct Query {
    /// What is asked.
    pub request: Request,
    /// Where the answer goes.
    pub answer: oneshot::Sender<serde_json::Value>,
}

/// Passes questions on until it is dropped. Must run on a [`tokio::task::LocalSet`].
pub async fn serve(listener: tokio::net::UnixListener, questions: mpsc::Sender<Query>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
                if root {
                    tokio::task::spawn_local(tokio::time::timeout(PATIENCE, converse(stream, questions.clone())));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "admin socket: accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One question, one answer. Whoever goes away meanwhile gets none.
async fn converse(stream: tokio::net::UnixStream, questions: mpsc::Sender<Query>) -> Option<()> {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(reader.take(LONGEST_REQUEST)).read_line(&mut line).await.ok()?;
    let value = match serde_json::from_str(&line) {
        Ok(request) => {
            let (answer, answered) = oneshot::channel();
            questions.send(Query { request, answer }).await.ok()?;
            answered.await.ok()?
        }
        Err(error) => serde_json::json!({ "error": format!("not a request: {error}") }),
    };
    writer.write_all(format!("{value}\n").as_bytes()).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn an_answer_comes_back_and_garbage_gets_an_error_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/admin.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = tokio::task::LocalSet::new();
        let client_path = path.clone();
        runtime.block_on(local.run_until(async move {
            let listener = bind(&path).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            let (asked, mut questions) = mpsc::channel::<Query>(1);
            tokio::task::spawn_local(serve(listener, asked));
            tokio::task::spawn_local(async move {
                while let Some(Query { request, answer }) = questions.recv().await {
                    answer.send(serde_json::json!({ "asked": request })).unwrap();
                }
            });
            tokio::task::spawn_blocking(move || {
                let value: serde_json::Value = ask(&client_path, Request::Status).unwrap();
                assert_eq!(value["asked"], "status");
                let mut stream = UnixStream::connect(&client_path).unwrap();
                stream.write_all(b"{{{\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                assert!(answer.contains("not a request"), "{answer}");
            })
            .await
            .unwrap();
        }));
    }

    #[test]
    fn nobody_listening_is_said_with_what_to_do() {
        let error = ask::<serde_json::Value>(Path::new("/nonexistent/admin.sock"), Request::Status).unwrap_err();
        assert!(error.to_string().contains("bunter agent"), "{error}");
    }
}
