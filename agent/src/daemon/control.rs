//! The control thread's loop: one thing after the other, so that nothing here needs a lock.
//!
//! *Invariant:* nothing in the loop waits for a connection, a disk or a peer. Attestation, which may read a large file, and
//! reading policy and trust for a reload run beside it and report back.

use super::listeners::{Listeners, Report};
use super::preexisting::Preexisting;
use super::reload::Prepared;
use super::status::{self, Known, Settled};
use super::troubles::Troubles;
use super::{Error, kernel_record, warn_of_second_authorities};
use crate::admin::{self, Query, Request};
use crate::credential::Provider;
use crate::intercept::{self, KernelEvent, Programs, Work};
use crate::pipeline::AgentState;
use crate::relay::Stop;
use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinError;
use tokio::time::{Interval, MissedTickBehavior};

/// How often the agent looks for changes that nothing announces.
const TICK: Duration = Duration::from_secs(10);
/// How often it is checked whether an enrolled process was given a listening socket that was left alone.
const LOOK: Duration = Duration::from_secs(2);
/// How long after a refusal the kernel is asked for others of its kind, which it has only counted.
const SOON: Duration = Duration::from_secs(2);
/// How long the agent delays reporting that it is ready while there are listeners that it has not judged. Less than systemd
/// waits (`TimeoutStartSec`), so that a process with very many descriptors cannot make systemd end the agent.
const FIRST_LOOK: Duration = Duration::from_secs(10);
/// How long shards may take to end after their last connections were told to end.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What is on disk, read and checked, and what its policy says to the kernel.
type Read = Result<(Prepared, intercept::Prepared), Error>;

/// Everything that only the control thread has.
pub(super) struct Control {
    shared: Arc<AgentState>,
    provider: Arc<dyn Provider>,
    /// Counts up whenever trust changes, also without a reload.
    changes: watch::Receiver<u64>,
    programs: Programs,
    settled: Settled,
    started: OffsetDateTime,
    policy_loaded: OffsetDateTime,
    /// Reloads that were taken or refused.
    reloads: u64,
    /// Why the last of them was refused.
    reload_refused: Option<String>,
    /// What is on disk is being read for a reload.
    reading: Option<tokio::task::JoinHandle<Read>>,
    /// Another reload was asked for meanwhile, so that what is being read may be older than that request.
    read_again: bool,
    draining: bool,
    /// What listens, and what it was found to be.
    listeners: Listeners,
    /// Connections from before.
    preexisting: Preexisting,
    /// How many flows there had been at the last tidying.
    tidied: u64,
    /// How many events the kernel had had no room for when that was last looked at.
    lost: u64,
    /// What does not work at the moment.
    troubles: Troubles,
    /// The listening sockets are to be looked at anew.
    listeners_due: bool,
    /// When the kernel is to be asked for refusals that it has only counted.
    refusals_due: Option<Instant>,
}

impl Control {
    pub(super) fn new(
        shared: Arc<AgentState>,
        provider: Arc<dyn Provider>,
        programs: Programs,
        settled: Settled,
    ) -> Result<Self, Error> {
        let now = OffsetDateTime::now_utc();
        let lost = programs.events_lost()?;
        let listeners = Listeners::new(programs.hierarchy());
        Ok(Self {
            shared,
            changes: provider.changes(),
            provider,
            programs,
            settled,
            started: now,
            policy_loaded: now,
            reloads: 0,
            reload_refused: None,
            reading: None,
            read_again: false,
            draining: false,
            listeners,
            preexisting: Preexisting::default(),
            tidied: 0,
            lost,
            troubles: Troubles::default(),
            listeners_due: false,
            refusals_due: None,
        })
    }

    /// Runs until a signal says stop, and then until the connections are over or the time to drain is up.
    pub(super) async fn run(mut self, closing: watch::Sender<bool>, shards: &[JoinHandle<()>]) -> Result<(), Error> {
        let on = |kind| signal(kind).map_err(|source| Error::Host { what: "a signal cannot be awaited", source });
        let (mut hangup, mut terminate, mut interrupt) =
            (on(SignalKind::hangup())?, on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
        let (asked, mut questions) = mpsc::channel(16);
        let socket = self.shared.config.admin_socket();
        let admin = tokio::task::spawn_local(admin::serve(admin::bind(&socket)?, asked));
        let provider = self.provider.clone();
        let maintenance = tokio::task::spawn_local(async move { provider.maintain().await });
        let mut rounds = Rounds::new();
        self.look_at_listeners();
        self.look_for_old_connections();
        let mut getting_ready = Some((Instant::now() + FIRST_LOOK, None));
        match bunter_sys::forget_code() {
            Ok(bytes) => tracing::debug!(bytes, "what only the start needed is given back"),
            Err(error) => tracing::debug!(%error, "what only the start needed stays in memory"),
        }
        loop {
            tokio::select! {
                next = next(&mut self.programs, &mut self.listeners, &mut rounds, self.refusals_due) => self.act(next),
                Some(Query { request, answer }) = questions.recv() => {
                    // Whoever asked may have gone away.
                    let _ = answer.send(self.answer(request));
                }
                Ok(()) = self.changes.changed() => self.revoke("the trust bundles changed"),
                _ = hangup.recv() => self.reload(),
                read = finished(&mut self.reading) => self.put_in_force(read),
                _ = stop(&mut terminate, &mut interrupt) => break,
            }
            self.listeners.judge(self.shared.identities.attestor(), &self.shared.policy, &self.programs);
            if let Some((due, before)) = &mut getting_ready
                && self.is_ready(*due, before)
            {
                getting_ready = None;
            }
        }
        self.drain(closing, shards, &mut questions, &mut rounds, [&mut terminate, &mut interrupt]).await;
        self.tell_the_rest();
        admin.abort();
        maintenance.abort();
        // If it cannot be removed, it is somebody else's socket by now.
        let _ = std::fs::remove_file(&socket);
        Ok(())
    }

    /// Tells systemd that the agent is ready when every socket that listened before it has been judged: until then
    /// connections to it are refused. `before`: those sockets, once they could be listed. Says whether it was told.
    fn is_ready(&self, due: Instant, before: &mut Option<HashSet<u64>>) -> bool {
        let unjudged = self.listeners.unjudged();
        if before.is_none() && !self.listeners_due {
            *before = Some(unjudged.clone());
        }
        let left = before.as_ref().map(|before| unjudged.intersection(before).count());
        if left != Some(0) {
            if Instant::now() < due {
                return false;
            }
            tracing::warn!(
                listeners = left,
                "ready, although connections to listeners that were there before are refused \
                until they are judged; where no number is said, they could not be listed"
            );
        }
        ready();
        true
    }

    /// Does what is done as long as the agent runs, draining or not.
    fn act(&mut self, next: Next) {
        match next {
            Next::Event(event) => self.handle_event(event),
            Next::Report(report) => self.take(report),
            Next::Look => self.look_again(),
            Next::Refusals => self.collect_refusals(),
            Next::Tidy => self.tidy(),
        }
    }

    /// Acts on what the kernel programs tell.
    fn handle_event(&mut self, event: KernelEvent) {
        let policy = self.shared.policy.load();
        match event {
            KernelEvent::Refused(refused) => {
                self.refusals_due.get_or_insert_with(|| Instant::now() + SOON);
                let record = kernel_record::refused(&refused, &policy);
                self.shared.registry.count_refused(&record);
                self.shared.audit.send_refusal(record);
            }
            KernelEvent::Bypassed(event) => self.shared.audit.send(&kernel_record::bypassed(&event, &policy)),
            KernelEvent::Listening(listening) => self.listeners.note(listening),
            KernelEvent::Closed(cookie) => self.listeners.closed(cookie),
            KernelEvent::Trouble(work, error) => {
                self.listeners_due |= work == Work::Listeners;
                self.troubles.note(work, &error);
            }
        }
    }

    /// What is done every two seconds.
    fn look_again(&mut self) {
        self.listeners.look_again();
        self.shared.audit.collect();
    }

    /// Fetches the refusals that the kernel has counted and not reported one by one.
    fn collect_refusals(&mut self) {
        let collected = self.programs.collect_refusals(false);
        self.troubles.observe(Work::Refusals, collected);
        self.refusals_due = None;
    }

    /// Writes the refusals that the kernel has counted and not reported to the audit log, so that the next agent starts
    /// from zero.
    fn tell_the_rest(&mut self) {
        match self.programs.collect_refusals(true) {
            Ok(()) => {
                while let Some(event) = self.programs.waiting() {
                    self.handle_event(event);
                }
            }
            Err(error) => tracing::warn!(%error, "refusals that were counted are not in the audit log"),
        }
    }

    /// Takes what was found out about a listening socket.
    fn take(&mut self, report: Report) {
        if let Err(error) = self.listeners.take(report, &self.programs) {
            self.listeners_due = true;
            self.troubles.note(Work::Listeners, &error);
        }
        if self.listeners.are_stale() {
            self.look_at_listeners();
        }
    }

    fn look_at_listeners(&mut self) {
        let looked = self.programs.listeners();
        self.listeners_due = looked.is_err();
        let Some(listeners) = self.troubles.observe(Work::Listeners, looked) else { return };
        self.listeners.note_all(listeners);
    }

    fn look_for_old_connections(&mut self) {
        let policy = self.shared.policy.load();
        self.preexisting.look(&self.programs, &policy, &mut self.troubles);
    }

    /// Begins to read what is on disk, which is put in force when it has been read.
    fn reload(&mut self) {
        self.shared.audit.reopen();
        self.read_again = self.reading.is_some();
        if self.read_again {
            return;
        }
        let outlook = match self.programs.outlook() {
            Ok(outlook) => outlook,
            Err(error) => return self.reloaded(Err(error.into())),
        };
        let (shared, provider) = (self.shared.clone(), self.provider.clone());
        self.reading = Some(tokio::task::spawn_blocking(move || {
            let prepared = Prepared::read(&shared.config, &provider)?;
            let rows = outlook.prepare(prepared.policy());
            Ok((prepared, rows))
        }));
    }

    fn is_reading(&self) -> bool {
        self.reading.is_some()
    }

    /// Puts what was read in force. Connections that are still allowed do not notice.
    fn put_in_force(&mut self, read: Result<Read, JoinError>) {
        self.reading = None;
        let ended = |error| Error::Host { what: "what is on disk could not be read", source: io::Error::other(error) };
        let done = read.unwrap_or_else(|error| Err(ended(error))).and_then(|(prepared, rows)| {
            let programs = &mut self.programs;
            prepared.put_in_force(|_| programs.install_prepared(rows), &*self.provider, &self.shared.policy)?;
            Ok(())
        });
        self.reloaded(done);
        if self.read_again {
            self.reload();
        }
    }

    /// Logs what came of a reload, and after a successful one judges listeners and connections by the new policy.
    fn reloaded(&mut self, done: Result<(), Error>) {
        self.reloads += 1;
        self.reload_refused = done.err().map(|error| error.to_string());
        if let Some(why) = &self.reload_refused {
            tracing::error!("reload refused, what was in force stays in force:\n{why}");
            return;
        }
        self.policy_loaded = OffsetDateTime::now_utc();
        warn_of_second_authorities(&self.shared.config, &self.shared.policy.load());
        self.look_at_listeners();
        self.look_for_old_connections();
        tracing::info!(generation = self.programs.generation(), "policy reloaded");
        // Policy and trust have changed together, so that one look at the connections is enough for both.
        self.changes.mark_unchanged();
        self.revoke("what was reloaded does not allow them");
    }

    fn revoke(&self, why: &'static str) {
        // A shard that is gone need not be told.
        self.shared.changed.send_replace(());
        let ended = self.shared.registry.revoke(&self.shared.policy.load(), &self.provider.trust());
        if ended > 0 {
            tracing::info!(ended, why, "connections that are no longer allowed were closed");
        }
    }

    /// What is done every ten seconds. Each part is tried, whether or not the others succeeded.
    fn tidy(&mut self) {
        // Tidying looks at every socket of the host. Only new connections leave rows that nobody needs, so it is done when
        // there were more new flows than half of those that are open; connections that stay open cost nothing.
        let flows = self.shared.registry.total();
        if flows - self.tidied > self.shared.registry.open_count() as u64 / 2 {
            self.tidied = flows;
            let tidied = self.programs.tidy();
            self.troubles.observe(Work::Tidying, tidied);
        }
        self.collect_refusals();
        let retried = self.programs.retry();
        self.troubles.observe(Work::Cgroups, retried);
        let counted = self.programs.events_lost();
        if let Some(lost) = self.troubles.observe(Work::Counters, counted)
            && lost > self.lost
        {
            // A refusal whose event was lost is still in the kernel's counters. A listener whose event was lost would never
            // be attested.
            tracing::warn!(events = lost - self.lost, "the kernel had more to tell than its buffer holds");
            self.lost = lost;
            self.listeners_due = true;
        }
        if self.listeners_due {
            self.look_at_listeners();
        }
        match self.preexisting.is_due() {
            true => self.look_for_old_connections(),
            false => self.preexisting.close(&self.programs, &mut self.troubles),
        }
    }

    fn known(&self) -> Known<'_> {
        Known {
            shared: &self.shared,
            provider: &*self.provider,
            programs: &self.programs,
            settled: &self.settled,
            since: self.started,
            draining: self.draining,
            policy_loaded: self.policy_loaded,
            reloads: self.reloads,
            is_reading: self.is_reading(),
            reload_refused: self.reload_refused.as_deref(),
            listeners: &self.listeners,
            preexisting: &self.preexisting,
            troubles: &self.troubles,
        }
    }

    fn answer(&self, request: Request) -> serde_json::Value {
        let answer = match request {
            Request::Status => serde_json::to_value(self.known().status()),
            Request::Connections => serde_json::to_value(status::connections(&self.shared.registry)),
        };
        answer.unwrap_or_else(|error| serde_json::json!({ "error": error.to_string() }))
    }

    /// Takes no new connections, and waits until the last one is over or the time to drain is up. A second signal ends the
    /// wait.
    async fn drain(
        &mut self,
        closing: watch::Sender<bool>,
        shards: &[JoinHandle<()>],
        questions: &mut mpsc::Receiver<Query>,
        rounds: &mut Rounds,
        [terminate, interrupt]: [&mut Signal; 2],
    ) {
        self.draining = true;
        let patience = self.shared.config.timeouts.drain;
        tracing::info!(open = self.shared.registry.open_count(), ?patience, "draining");
        // If there is no receiver, the shards are gone already.
        let _ = closing.send(true);
        let over = all_over(shards);
        let time_is_up = tokio::time::sleep(patience);
        tokio::pin!(over, time_is_up);
        // Listeners are judged until the end, because a socket that the agent has left alone stays so when the agent is
        // gone.
        loop {
            tokio::select! {
                () = &mut over => return,
                () = &mut time_is_up => break,
                _ = stop(terminate, interrupt) => break,
                Some(Query { request, answer }) = questions.recv() => drop(answer.send(self.answer(request))),
                next = next(&mut self.programs, &mut self.listeners, rounds, self.refusals_due) => self.act(next),
            }
            self.listeners.judge(self.shared.identities.attestor(), &self.shared.policy, &self.programs);
        }
        tracing::info!(open = self.shared.registry.open_count(), "the time to drain is over");
        self.shared.registry.stop_all(Stop::Drained);
        let _ = tokio::time::timeout(LAST_WORDS, over).await;
    }
}

/// What is done as long as the agent runs, draining or not.
enum Next {
    Event(KernelEvent),
    Report(Report),
    Look,
    Refusals,
    Tidy,
}

/// The timers of what is done again and again.
struct Rounds {
    look: Interval,
    tick: Interval,
}

impl Rounds {
    fn new() -> Self {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { look, tick: tokio::time::interval(TICK) }
    }
}

/// Waits for the next thing to do. Cancel safe.
async fn next(
    programs: &mut Programs,
    listeners: &mut Listeners,
    rounds: &mut Rounds,
    refusals_due: Option<Instant>,
) -> Next {
    tokio::select! {
        event = programs.next_event() => Next::Event(event),
        Some(report) = listeners.report() => Next::Report(report),
        _ = rounds.look.tick() => Next::Look,
        () = come(refusals_due) => Next::Refusals,
        _ = rounds.tick.tick() => Next::Tidy,
    }
}

async fn come(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// What was read, once all of it is. Cancel safe.
async fn finished(reading: &mut Option<tokio::task::JoinHandle<Read>>) -> Result<Read, JoinError> {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

async fn stop(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

async fn all_over(shards: &[JoinHandle<()>]) {
    while !shards.iter().all(JoinHandle::is_finished) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Tells systemd, where it asked (sd_notify(3)).
fn ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = std::os::unix::net::UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", path));
    if let Err(error) = told {
        tracing::warn!(%error, "systemd cannot be told that the agent is ready");
    }
}
