use super::*;
use bunter_identity::refusal::{Culprit, Refusal};
use bunter_identity::trust::testing::id_of;
use std::path::PathBuf;
use std::process::{Child, Command};

/// A process that waits, killed at the end.
struct Waiting(Child);

impl Waiting {
    fn new() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }
    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boottime() -> u64 {
    let now = rustix::time::clock_gettime_dynamic(rustix::time::DynamicClockId::Boottime).unwrap();
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// What the kernel would record about a process now.
fn task(attestor: &Attestor, pid: u32) -> Task {
    let process = Process::pin(pid).unwrap().unwrap();
    let ids = process.ids().unwrap();
    Task {
        tgid: pid,
        uid: ids.real_uid,
        gid: ids.real_gid,
        workload: 0,
        cgroup: attestor.hierarchy.id_of(&process.cgroup().unwrap()).unwrap().unwrap(),
        at: boottime(),
        comm: *b"sleep\0\0\0\0\0\0\0\0\0\0\0",
    }
}

/// `None`, with a line that says so, where this machine or this user cannot do it.
fn attestor() -> Option<Attestor> {
    let attestor = Attestor::discover();
    let fault = match &attestor {
        Ok(attestor) => attestor.hierarchy.path_of(1).err().map(|error| error.to_string()),
        Err(error) => Some(error.to_string()),
    };
    match fault {
        None => attestor.ok(),
        Some(fault) => {
            eprintln!("skipped: {fault}");
            None
        }
    }
}

/// A cgroup of a test's own, removed at the end.
struct Cgroup {
    directory: PathBuf,
    path: String,
}

impl Cgroup {
    fn new(attestor: &Attestor, name: &str) -> Self {
        let path = format!("/bunter-test-{}-{name}", std::process::id());
        let directory = PathBuf::from(format!("{}{path}", attestor.hierarchy.mount().display()));
        std::fs::create_dir(&directory).unwrap();
        Self { directory, path }
    }
    fn take(&self, process: &Waiting) {
        std::fs::write(self.directory.join("cgroup.procs"), process.0.id().to_string()).unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was just killed may take a moment to leave.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn workload() -> Workload {
    Workload { number: 1, id: id_of("spiffe://example.org/sleep") }
}

/// Entries made of one question.
struct Ask<F>(F);

impl<F: Fn(&dyn Evidence) -> bool + Sync> EntrySource for Ask<F> {
    fn workload(&self, evidence: &dyn Evidence) -> Result<Option<Workload>, Ambiguous> {
        Ok((self.0)(evidence).then(workload))
    }
}

fn sleep_path() -> PathBuf {
    let found = ["/usr/bin/sleep", "/bin/sleep"].into_iter().find(|path| Path::new(path).exists());
    std::fs::canonicalize(found.unwrap()).unwrap()
}

#[tokio::test]
async fn a_process_is_attested_by_its_ids_cgroup_path_and_digest() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let task = task(&attestor, process.0.id());
    let (uid, gid, path) = (task.uid, task.gid, sleep_path());
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&path).unwrap());
    let cgroup = Process::pin(process.0.id()).unwrap().unwrap().cgroup().unwrap();
    // The executable may not yet be sleep just after the fork; the command has returned, so it is.
    let entries = Ask(|evidence: &dyn Evidence| {
        evidence.uid() == Some(uid)
            && evidence.gid() == Some(gid)
            && evidence.cgroup() == Some(&cgroup)
            && evidence.path() == Some(&path)
            && evidence.sha256().as_ref().map(<[u8; 32]>::as_slice) == Some(digest.as_ref())
    });
    let attested = attestor.dialler(&task, &entries).await.unwrap();
    assert_eq!(attested.workload.unwrap().id, workload().id);
    assert_eq!(attested.facts.executable, Some(path.clone()));
}

#[tokio::test]
async fn an_executable_that_nobody_asks_for_is_not_read() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let entries = Ask(|evidence: &dyn Evidence| evidence.uid().is_some());
    let attested = attestor.dialler(&task(&attestor, process.0.id()), &entries).await.unwrap();
    assert!(attested.workload.is_some() && attested.facts.executable.is_none());
}

#[tokio::test]
async fn a_process_that_no_entry_matches_is_described() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let task = task(&attestor, process.0.id());
    let attested = attestor.dialler(&task, &Ask(|_: &dyn Evidence| false)).await.unwrap();
    assert!(attested.workload.is_none());
    let text = attested.facts.to_string();
    assert!(text.contains(&format!("process {} (sleep), uid {}", task.tgid, task.uid)), "{text}");
    assert!(text.contains("sleep\"") && text.contains("cgroup"), "{text}");
}

#[tokio::test]
async fn a_dialler_that_died_is_refused_even_if_the_kernel_facts_match() {
    let Some(attestor) = attestor() else { return };
    let mut process = Waiting::new();
    let task = task(&attestor, process.0.id());
    process.end();
    let error = attestor.dialler(&task, &Ask(|_: &dyn Evidence| true)).await.unwrap_err();
    assert_eq!(error.code(), "process-died");
}

#[tokio::test]
async fn what_was_verified_a_moment_ago_does_not_outlive_the_process_nor_cover_other_facts() {
    let Some(attestor) = attestor() else { return };
    let mut process = Waiting::new();
    let task = task(&attestor, process.0.id());
    let entry = Ask(|evidence: &dyn Evidence| evidence.uid().is_some());
    for _ in 0..2 {
        assert!(attestor.dialler(&task, &entry).await.unwrap().workload.is_some());
    }
    assert_eq!(lock(&attestor.verified).len(), 1);
    let moved = Task { uid: task.uid + 1, ..task };
    assert_eq!(attestor.dialler(&moved, &entry).await.unwrap_err().code(), "ids-changed");
    let moved = Task { cgroup: task.cgroup + 1, ..task };
    assert_eq!(attestor.dialler(&moved, &entry).await.unwrap_err().code(), "cgroup-moved");
    // Recorded before this process began: it was another one of that number.
    let before = Task { at: 1, ..task };
    assert_eq!(attestor.dialler(&before, &entry).await.unwrap_err().code(), "pid-reused");
    process.end();
    assert_eq!(attestor.dialler(&task, &entry).await.unwrap_err().code(), "process-died");
    assert!(lock(&attestor.verified).is_empty());
}

#[tokio::test]
async fn a_dialler_that_dies_while_it_is_attested_is_refused() {
    let Some(attestor) = attestor() else { return };
    let process = Mutex::new(Waiting::new());
    let task = task(&attestor, process.lock().unwrap().0.id());
    let entries = Ask(|_: &dyn Evidence| {
        process.lock().unwrap().end();
        true
    });
    assert_eq!(attestor.dialler(&task, &entries).await.unwrap_err().code(), "process-died");
}

#[tokio::test]
async fn a_number_that_was_used_again_is_noticed() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let mut task = task(&attestor, process.0.id());
    // Recorded a second before the process began that has the number now.
    task.at = task.at.saturating_sub(1_000_000_000);
    let error = attestor.dialler(&task, &Ask(|_: &dyn Evidence| true)).await.unwrap_err();
    assert_eq!(error.code(), "pid-reused");
}

#[tokio::test]
async fn a_process_with_other_ids_than_recorded_is_refused() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let mut task = task(&attestor, process.0.id());
    task.gid = task.gid.wrapping_add(1);
    let error = attestor.dialler(&task, &Ask(|_: &dyn Evidence| true)).await.unwrap_err();
    assert_eq!(error.code(), "ids-changed");
}

#[tokio::test]
async fn a_process_that_is_in_another_cgroup_than_recorded_is_refused() {
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let mut task = task(&attestor, process.0.id());
    task.cgroup += 1_000_000;
    let error = attestor.dialler(&task, &Ask(|_: &dyn Evidence| true)).await.unwrap_err();
    assert_eq!(error.code(), "cgroup-moved");
}

#[tokio::test]
async fn a_process_that_moves_to_another_cgroup_is_refused_by_the_kernels_own_ids() {
    let Some(attestor) = attestor() else { return };
    let (first, second) = (Cgroup::new(&attestor, "first"), Cgroup::new(&attestor, "second"));
    let process = Waiting::new();
    first.take(&process);
    let task = task(&attestor, process.0.id());
    let inside = Ask(|evidence: &dyn Evidence| evidence.cgroup() == Some(&first.path));
    assert!(attestor.dialler(&task, &inside).await.unwrap().workload.is_some());
    second.take(&process);
    // A connect from there is recorded with that cgroup and refused at once; one recorded before, a moment later.
    let record = Task { cgroup: attestor.hierarchy.id_of(&second.path).unwrap().unwrap(), at: boottime(), ..task };
    assert!(attestor.dialler(&record, &inside).await.unwrap().workload.is_none());
    tokio::time::sleep(HOLDS).await;
    let error = attestor.dialler(&task, &inside).await.unwrap_err();
    assert_eq!(error.code(), "cgroup-moved");
    assert!(error.to_string().contains(&second.path), "{error}");
}

#[tokio::test]
async fn a_listener_whose_cgroup_is_gone_and_was_never_seen_has_no_owner() {
    let Some(attestor) = attestor() else { return };
    let cgroup = Cgroup::new(&attestor, "gone");
    let mut process = Waiting::new();
    cgroup.take(&process);
    let task = task(&attestor, process.0.id());
    process.end();
    drop(cgroup);
    let asks = Ask(|evidence: &dyn Evidence| evidence.cgroup().is_some());
    assert_eq!(attestor.owner(Some(&task), 1, &asks).await.unwrap_err().code(), "listener-without-owner");
    // An entry that does not look at the cgroup does not need it.
    let uid = Ask(|evidence: &dyn Evidence| evidence.uid().is_some());
    assert!(attestor.owner(Some(&task), 1, &uid).await.unwrap().workload.is_some());
}

#[tokio::test]
async fn an_exec_during_the_attestation_is_refused() {
    let Some(attestor) = attestor() else { return };
    let dir = tempfile::tempdir().unwrap();
    let go = dir.path().join("go");
    let script = format!("while ! test -e {}; do :; done; exec sleep 60", go.display());
    let process = Waiting(Command::new("sh").args(["-c", &script]).spawn().unwrap());
    let task = task(&attestor, process.0.id());
    let entries = Ask(|evidence: &dyn Evidence| {
        let Some(path) = evidence.path() else { return false };
        std::fs::write(&go, "").unwrap();
        while Process::pin(task.tgid).unwrap().unwrap().executable().unwrap().unwrap().path == path {
            std::thread::yield_now();
        }
        true
    });
    assert_eq!(attestor.dialler(&task, &entries).await.unwrap_err().code(), "process-exec");
}

#[tokio::test]
async fn the_recorded_facts_of_a_listener_suffice_when_its_binder_is_gone_and_no_more_is_asked() {
    let Some(attestor) = attestor() else { return };
    let mut process = Waiting::new();
    let task = task(&attestor, process.0.id());
    process.end();
    let uid = task.uid;
    let entries = Ask(|evidence: &dyn Evidence| evidence.uid() == Some(uid) && evidence.cgroup().is_some());
    let attested = attestor.owner(Some(&task), 1, &entries).await.unwrap();
    assert!(attested.workload.is_some());
}

#[tokio::test]
async fn where_more_is_asked_the_holder_of_the_socket_in_the_same_cgroup_is_looked_at() {
    let Some(attestor) = attestor() else { return };
    let mut binder = Waiting::new();
    let mut task = task(&attestor, binder.0.id());
    binder.end();
    task.at = boottime();
    // This process holds the socket; so it must be in the cgroup that was recorded, which it is.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cookie = rustix::net::sockopt::socket_cookie(&listener).unwrap();
    let entries = Ask(|evidence: &dyn Evidence| evidence.path().is_some());
    let attested = attestor.owner(Some(&task), cookie, &entries).await.unwrap();
    assert_eq!(attested.facts.pid, std::process::id());
    assert_eq!(attested.facts.executable, Some(std::env::current_exe().unwrap()));
    drop(listener);
    let error = attestor.owner(Some(&task), cookie, &entries).await.unwrap_err();
    assert_eq!(error.code(), "listener-without-owner");
}

#[tokio::test]
async fn a_listener_that_nobody_recorded_belongs_to_the_process_that_holds_it() {
    let Some(attestor) = attestor() else { return };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let cookie = rustix::net::sockopt::socket_cookie(&listener).unwrap();
    let entries = Ask(|evidence: &dyn Evidence| evidence.cgroup().is_some());
    for _ in 0..2 {
        let attested = attestor.owner(None, cookie, &entries).await.unwrap();
        assert_eq!((attested.facts.pid, attested.workload.is_some()), (std::process::id(), true));
    }
    for (nobody, code) in [(0, "no-listener"), (u64::MAX, "listener-without-owner")] {
        assert_eq!(attestor.owner(None, nobody, &entries).await.unwrap_err().code(), code);
    }
}

#[tokio::test]
async fn ambiguous_entries_are_an_error_only_when_everything_is_known() {
    struct Two;
    impl EntrySource for Two {
        fn workload(&self, evidence: &dyn Evidence) -> Result<Option<Workload>, Ambiguous> {
            // A third entry with more selectors would win.
            if evidence.path() == Some(Path::new("/nonexistent")) {
                return Ok(Some(workload()));
            }
            Err(Ambiguous { first: workload().id, second: id_of("spiffe://example.org/other") })
        }
    }
    let Some(attestor) = attestor() else { return };
    let process = Waiting::new();
    let error = attestor.dialler(&task(&attestor, process.0.id()), &Two).await.unwrap_err();
    assert_eq!((error.code(), error.culprit()), ("ambiguous-entries", Culprit::Policy));
    assert!(error.to_string().contains("process"), "{error}");
}

#[test]
fn a_hostile_name_cannot_forge_a_line() {
    let facts = Facts {
        pid: 1,
        uid: 2,
        gid: 3,
        comm: Comm::from("a\nb\u{1b}[31m"),
        executable: Some("/tmp/x\ny".into()),
        cgroup: Some("/a".into()),
        note: None,
    };
    assert_eq!(facts.to_string(), r#"process 1 (a\nb\u{1b}[31m), uid 2, gid 3, executable "/tmp/x\ny", cgroup "/a""#);
}
