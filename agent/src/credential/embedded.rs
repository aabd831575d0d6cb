//! The embedded provider: an authority in a directory, SVIDs issued when a workload first needs one.
//!
//! A credential is replaced at half its life, a tenth more or less so that not all are due at once. Connections keep the
//! certificate that they were made with. A credential that nobody has used since it was made is dropped instead of
//! replaced, so that no key lies around for a workload that is gone.
//!
//! *Invariant:* one registration entry, one key; a credential is handed out only within its validity, even if the clock was
//! set back.

use super::{
    AnchorStatus, Credential, CredentialStatus, FailingStatus, ListStatus, NotReloaded, Pending, Provider,
    ProviderError, ProviderStatus, Reloaded,
};
use crate::{lock::lock, policy::Workload};
use arc_swap::{ArcSwap, ArcSwapOption};
use bunter_identity::{
    authority::ca::{Authority, CERTIFICATE_FILE, CaError, LIST_FILE},
    refusal::{Culprit, Refusal},
    spiffe::{SpiffeId, TrustDomain},
    trust::{
        bundle::{Anchors, BundleError, Trust},
        crl::{CrlError, IssuerAndSerial},
        x509::display_time,
    },
};
use std::{
    collections::HashMap,
    io::ErrorKind,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::watch;

/// What the provider is made from.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Directory of the authority.
    pub ca_dir: PathBuf,
    /// Trust domain of the policy.
    pub trust_domain: TrustDomain,
    /// Life of an SVID.
    pub svid_ttl: Duration,
    /// Bundles of further trust domains, or further anchors of this one.
    pub bundles: Vec<Bundle>,
}

/// Files of a trust domain whose authority is elsewhere.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Its name.
    pub trust_domain: TrustDomain,
    /// Its anchors.
    pub path: PathBuf,
    /// What they revoked, where there are lists of it.
    pub crl: Option<PathBuf>,
}

/// Why the provider cannot be made or reloaded.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The authority.
    #[error(transparent)]
    Authority(#[from] CaError),
    /// A trust bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A revocation list.
    #[error(transparent)]
    Revocations(#[from] CrlError),
}

impl Refusal for EmbeddedError {
    fn culprit(&self) -> Culprit {
        match self {
            EmbeddedError::Authority(error) => error.culprit(),
            EmbeddedError::Bundle(error) => error.culprit(),
            EmbeddedError::Revocations(error) => error.culprit(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            EmbeddedError::Authority(error) => error.code(),
            EmbeddedError::Bundle(error) => error.code(),
            EmbeddedError::Revocations(error) => error.code(),
        }
    }
}

/// Issues SVIDs from the authority in a directory.
pub struct Embedded {
    clock: Box<dyn Fn() -> SystemTime + Send + Sync>,
    source: ArcSwap<Source>,
    /// Read by every connection, replaced when an entry comes or goes.
    slots: ArcSwap<HashMap<Key, Arc<Slot>>>,
    /// Held while `slots` is replaced.
    registering: Mutex<()>,
    changes: watch::Sender<u64>,
    issued: AtomicU64,
    failed: AtomicU64,
}

/// The number keeps two entries of one SPIFFE ID apart (R40). Numbers move when the policy is edited; the ID beside it
/// makes sure that a moved number never finds another identity's key.
type Key = (u32, SpiffeId);

/// What is replaced as a whole on reload.
struct Source {
    settings: Settings,
    authority: Authority,
    trust: Arc<Trust>,
}

/// Authority, bundles and revocation lists that were read and checked, and are not in force yet.
pub struct Prepared {
    source: Source,
}

/// The place of one registration entry.
#[derive(Default)]
struct Slot {
    held: ArcSwapOption<Held>,
    /// Somebody asked for it since it was made.
    used: AtomicBool,
    /// Held while one is made, so that it is made once.
    making: Mutex<Making>,
}

/// What came of making it.
#[derive(Default)]
struct Making {
    /// When to try again after a failure.
    retry: Option<Instant>,
    /// When the last attempt failed, and why, as long as there is no new credential.
    failed: Option<(SystemTime, Arc<str>)>,
}

struct Held {
    credential: Arc<Credential>,
    rotates_at: SystemTime,
}

/// How long a failed replacement waits while the old credential is still good.
const RETRY: Duration = Duration::from_secs(5);
/// The longest sleep of the maintenance, and so the longest time until a clock that was set is noticed.
const TICK: Duration = Duration::from_secs(30);

impl Embedded {
    /// Loads the authority and the bundles.
    pub fn open(settings: Settings) -> Result<Self, EmbeddedError> {
        Self::with_clock(settings, Box::new(SystemTime::now))
    }

    /// The same with a clock of the caller's.
    pub fn with_clock(
        settings: Settings,
        clock: Box<dyn Fn() -> SystemTime + Send + Sync>,
    ) -> Result<Self, EmbeddedError> {
        let source = Source::load(settings, clock())?;
        Ok(Self {
            clock,
            source: ArcSwap::from_pointee(source),
            slots: ArcSwap::default(),
            registering: Mutex::default(),
            changes: watch::Sender::new(0),
            issued: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    /// Reads authority, bundles and revocation lists again and checks all of them. Nothing changes before
    /// [`Embedded::commit`].
    pub fn prepare(&self, settings: Settings) -> Result<Prepared, EmbeddedError> {
        Ok(Prepared { source: Source::load(settings, (self.clock)())? })
    }

    /// Puts in force what was prepared. Where the authority is another one, every workload gets a new credential at its next
    /// connection; and so does one whose credential is revoked.
    pub fn commit(&self, Prepared { source }: Prepared) {
        let same_authority = self.source.load().authority.validity() == source.authority.validity();
        self.source.store(Arc::new(source));
        if !same_authority {
            let _registering = lock(&self.registering);
            self.slots.store(Arc::default());
        }
        // What was read now may have ended earlier failures; one that goes on fails again, and is recorded again.
        self.slots.load().values().for_each(|slot| *lock(&slot.making) = Making::default());
        self.drop_revoked();
        self.changes.send_modify(|generation| *generation += 1);
    }

    fn drop_revoked(&self) {
        let trust = self.trust();
        for ((_, id), slot) in self.slots.load().iter() {
            let _making = lock(&slot.making);
            let held = slot.held.load_full();
            let leaf = held.as_ref().and_then(|held| held.credential.certified.cert.first());
            let Some(name) = leaf.and_then(IssuerAndSerial::of) else { continue };
            if trust.revokes(&id.trust_domain(), &[name]) {
                tracing::info!(%id, "its SVID is revoked, the next connection gets another");
                slot.held.store(None);
            }
        }
    }

    fn slot(&self, workload: &Workload) -> Arc<Slot> {
        let key = (workload.number, workload.id.clone());
        if let Some(slot) = self.slots.load().get(&key) {
            return slot.clone();
        }
        let _registering = lock(&self.registering);
        let current = self.slots.load();
        if let Some(slot) = current.get(&key) {
            return slot.clone();
        }
        let slot = Arc::new(Slot::default());
        let mut next = HashMap::clone(&current);
        next.insert(key, slot.clone());
        self.slots.store(Arc::new(next));
        slot
    }

    /// Signing takes about a tenth of a millisecond, so it is done where it is needed; callers that come meanwhile wait for
    /// the same credential.
    fn make(&self, id: &SpiffeId, slot: &Slot) -> Result<Arc<Credential>, ProviderError> {
        let mut making = lock(&slot.making);
        let now = (self.clock)();
        let held = slot.held.load_full();
        if let Some(held) = held.as_ref().filter(|held| held.is_fresh(now)) {
            return Ok(held.credential.clone());
        }
        // Good enough while a new one cannot be had.
        let old = held.filter(|held| held.credential.is_valid(now)).map(|held| held.credential.clone());
        if let Some(old) = old.as_ref().filter(|_| making.retry.is_some_and(|until| Instant::now() < until)) {
            return Ok(old.clone());
        }
        match self.issue(id, now) {
            Ok(held) => {
                *making = Making::default();
                self.issued.fetch_add(1, Ordering::Relaxed);
                let credential = held.credential.clone();
                tracing::info!(%id, serial = %credential.serial, not_after = display_time(credential.not_after), "issued an SVID");
                slot.held.store(Some(Arc::new(held)));
                Ok(credential)
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                let why: Arc<str> = error.to_string().into();
                // Whoever dials a workload without an SVID may do so as often as they like: it is said once.
                if making.failed.as_ref().is_none_or(|(_, before)| *before != why) {
                    tracing::warn!(%id, %error, still_valid = old.is_some(), "no new SVID");
                }
                *making = Making { retry: Some(Instant::now() + RETRY), failed: Some((now, why.clone())) };
                let culprit = error.culprit();
                old.ok_or_else(|| ProviderError::Unavailable { id: id.clone(), why, culprit })
            }
        }
    }

    fn issue(&self, id: &SpiffeId, now: SystemTime) -> Result<Held, CaError> {
        let source = self.source.load();
        source.check_authority_at(now)?;
        let issued = source.authority.issue(id, source.settings.svid_ttl, now)?;
        let credential = Credential {
            id: id.clone(),
            certified: Arc::new(issued.certified()?),
            not_before: issued.not_before,
            not_after: issued.not_after,
            serial: issued.serial.as_str().into(),
        };
        let life = issued.not_after.duration_since(now).unwrap_or_default();
        Ok(Held { credential: Arc::new(credential), rotates_at: now + life.mul_f64(rotation_share()) })
    }

    /// One round of maintenance; says how long until the next.
    fn tend(&self) -> Duration {
        let now = (self.clock)();
        let mut pause = TICK;
        for ((_, id), slot) in self.slots.load().iter() {
            let Some(held) = slot.held.load_full() else { continue };
            if held.is_fresh(now) {
                pause = pause.min(held.rotates_at.duration_since(now).unwrap_or_default());
            } else if slot.used.swap(false, Ordering::Relaxed) {
                // A failure is counted, logged and tried again in the next round.
                let _ = self.make(id, slot);
            } else {
                let _making = lock(&slot.making);
                slot.held.store(None);
            }
        }
        pause.max(Duration::from_secs(1))
    }
}

impl Provider for Embedded {
    fn ready(&self, workload: &Workload) -> Option<Arc<Credential>> {
        let slots = self.slots.load();
        let slot = slots.get(&(workload.number, workload.id.clone()))?;
        let held = slot.held.load();
        let held = held.as_ref().filter(|held| held.is_fresh((self.clock)()))?;
        slot.used.store(true, Ordering::Relaxed);
        Some(held.credential.clone())
    }

    fn obtain<'a>(&'a self, workload: &'a Workload) -> Pending<'a, Result<Arc<Credential>, ProviderError>> {
        Box::pin(async move {
            let slot = self.slot(workload);
            slot.used.store(true, Ordering::Relaxed);
            let credential = self.make(&workload.id, &slot)?;
            let now = (self.clock)();
            if credential.is_valid(now) {
                return Ok(credential);
            }
            Err(ProviderError::NotValidNow {
                id: workload.id.clone(),
                not_before: display_time(credential.not_before),
                not_after: display_time(credential.not_after),
                now: display_time(now),
            })
        })
    }

    fn trust(&self) -> Arc<Trust> {
        self.source.load().trust.clone()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn reload(self: Arc<Self>, trust_domain: &TrustDomain) -> Result<Reloaded, NotReloaded> {
        let settings = Settings { trust_domain: trust_domain.clone(), ..self.source.load().settings.clone() };
        let prepared = self.prepare(settings).map_err(NotReloaded::new)?;
        Ok(Reloaded::new(move || self.commit(prepared)))
    }

    fn retain(&self, workloads: &[Workload]) {
        let _registering = lock(&self.registering);
        let mut next = HashMap::clone(&self.slots.load());
        next.retain(|(number, id), _| {
            workloads.iter().any(|workload| workload.number == *number && workload.id == *id)
        });
        self.slots.store(Arc::new(next));
    }

    fn maintain<'a>(&'a self) -> Pending<'a, ()> {
        Box::pin(async move {
            loop {
                let pause = self.tend();
                tokio::time::sleep(pause).await;
            }
        })
    }

    fn status(&self) -> ProviderStatus {
        let source = self.source.load();
        let mut credentials: Vec<_> = self.slots.load().iter().filter_map(|(key, slot)| status_of(key, slot)).collect();
        credentials.sort_by_key(|credential| credential.workload);
        let bundles = source.trust.domains().flat_map(|(domain, anchors)| {
            anchors.validity().iter().map(|validity| AnchorStatus {
                trust_domain: domain.to_string(),
                subject: validity.subject.clone(),
                serial: validity.serial.clone(),
                not_after: display_time(validity.not_after),
            })
        });
        let now = (self.clock)();
        let lists = source.trust.domains().flat_map(|(domain, anchors)| {
            anchors.lists().iter().map(|list| ListStatus {
                trust_domain: domain.to_string(),
                issuer: list.about().issuer.clone(),
                number: list.about().number.clone(),
                revoked: list.about().revoked,
                next_update: display_time(list.about().next_update),
                expired: list.is_expired(now),
            })
        });
        ProviderStatus {
            provider: "embedded",
            trust_domain: source.settings.trust_domain.to_string(),
            authority_not_after: Some(display_time(source.authority.validity().not_after)),
            credentials,
            bundles: bundles.collect(),
            lists: lists.collect(),
            issued: self.issued.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            failing: self.slots.load().iter().filter_map(|(key, slot)| fault_of(key, slot, now)).collect(),
        }
    }
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("authority", &self.source.load().authority).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("authority", &self.source.authority).finish_non_exhaustive()
    }
}

impl Source {
    fn load(settings: Settings, now: SystemTime) -> Result<Self, EmbeddedError> {
        if settings.svid_ttl < Duration::from_secs(1) {
            return Err(CaError::NoLife(settings.svid_ttl).into());
        }
        let authority = Authority::load(&settings.ca_dir, Some(&settings.trust_domain), now)?;
        let mut trust = Trust::new().with(settings.trust_domain.clone(), authority.anchors().clone());
        for Bundle { trust_domain, path, .. } in &settings.bundles {
            trust = trust.with(trust_domain.clone(), Anchors::load(trust_domain, path, now)?);
        }
        let own = settings.ca_dir.join(LIST_FILE);
        // Only a list that does not exist is left out; one that cannot be read is an error.
        if !std::fs::symlink_metadata(&own).is_err_and(|error| error.kind() == ErrorKind::NotFound) {
            trust = trust.with_lists(&settings.trust_domain, &own, now)?;
        }
        for Bundle { trust_domain, crl, .. } in &settings.bundles {
            if let Some(path) = crl {
                trust = trust.with_lists(trust_domain, path, now)?;
            }
        }
        Ok(Self { settings, authority, trust: Arc::new(trust) })
    }

    /// The authority was valid when it was loaded; that may be long ago, or the clock may have been set.
    fn check_authority_at(&self, now: SystemTime) -> Result<(), CaError> {
        let (path, validity) = (self.settings.ca_dir.join(CERTIFICATE_FILE), self.authority.validity());
        if now < validity.not_before {
            let not_before = display_time(validity.not_before);
            return Err(CaError::NotYetValid { path, not_before, now: display_time(now) });
        }
        if now >= validity.not_after {
            return Err(CaError::Expired { path, not_after: display_time(validity.not_after) });
        }
        Ok(())
    }
}

impl Held {
    fn is_fresh(&self, now: SystemTime) -> bool {
        self.credential.is_valid(now) && now < self.rotates_at
    }
}

fn status_of((number, id): &Key, slot: &Slot) -> Option<CredentialStatus> {
    let held = slot.held.load_full()?;
    Some(CredentialStatus {
        workload: *number,
        id: id.to_string(),
        serial: held.credential.serial.to_string(),
        not_before: display_time(held.credential.not_before),
        not_after: display_time(held.credential.not_after),
        rotates_at: display_time(held.rotates_at),
    })
}

/// Where the clock has been set back, there may be a credential again that is good without having been replaced.
fn fault_of((number, id): &Key, slot: &Slot, now: SystemTime) -> Option<FailingStatus> {
    if slot.held.load().as_ref().is_some_and(|held| held.is_fresh(now)) {
        return None;
    }
    let (when, why) = lock(&slot.making).failed.clone()?;
    let error = format!("{}: {why}", display_time(when));
    Some(FailingStatus { workload: *number, id: id.to_string(), error })
}

/// Half of the life, a tenth of that more or less.
fn rotation_share() -> f64 {
    let mut bytes = [0u8; 4];
    // Without randomness the middle is as good.
    let random = aws_lc_rs::rand::fill(&mut bytes).map_or(u32::MAX / 2, |()| u32::from_le_bytes(bytes));
    0.5 * (0.9 + 0.2 * f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
