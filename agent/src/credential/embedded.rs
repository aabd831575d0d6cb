//! The embedded provider: an authority in a directory, SVIDs issued when a workload first needs one.
//!
//! A credential is replaced at half its life, a tenth more or less so that not all are due at once. Connections keep the
//! certificate that they were made with. What nobody used since it was made is dropped instead of replaced, so that no
//! key lies around for a workload that is gone.
//!
//! *Invariant:* one registration entry, one key; a credential is handed out only within its validity, also when the
//! clock was set back.

use super::{
    AnchorStatus, Credential, CredentialStatus, FailingStatus, ListStatus, NotReloaded, Pending, Provider,
    ProviderError, ProviderStatus, Reloaded,
};
use crate::{lock::lock, policy::Workload};
use arc_swap::{ArcSwap, ArcSwapOption};
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
use wimsey_identity::{
    authority::ca::{Authority, CERTIFICATE_FILE, CaError, LIST_FILE},
    refusal::{Culprit, Refusal},
    spiffe::{SpiffeId, TrustDomain},
    trust::{
        bundle::{Anchors, BundleError, Trust},
        crl::{CrlError, IssuerAndSerial},
        x509::display_time,
    },
};

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

/// Authority, bundles and revocation lists that were read and checked, and are not in force.
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
    /// Why there is no new one, and since when, as long as that lasts.
    error: Option<String>,
}

struct Held {
    credential: Arc<Credential>,
    rotates_at: SystemTime,
}

/// How long a failed replacement waits while the old credential is still good.
const RETRY: Duration = Duration::from_secs(5);
/// The longest sleep of the maintenance: so late is a clock that was set noticed.
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
        // What was read now may have mended it; what has not fails again, and says so.
        self.slots.load().values().for_each(|slot| lock(&slot.making).error = None);
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

    /// Signing takes about a tenth of a millisecond, so it is done where it is needed; whoever comes meanwhile waits for
    /// the same one.
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
                *making = Making {
                    retry: Some(Instant::now() + RETRY),
                    error: Some(format!("{}: {error}", display_time(now))),
                };
                tracing::warn!(%id, %error, still_valid = old.is_some(), "no new SVID");
                let (why, culprit) = (error.to_string().into(), error.culprit());
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
                over: list.is_over(now),
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
            failing: self.slots.load().iter().filter_map(|(key, slot)| fault_of(key, slot)).collect(),
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
        // One that is there and cannot be read is no reason to go without.
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

fn fault_of((number, id): &Key, slot: &Slot) -> Option<FailingStatus> {
    let error = lock(&slot.making).error.clone()?;
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
mod tests {
    use super::*;
    use wimsey_identity::{
        authority::{
            ca,
            revoke::{self, Order},
        },
        trust::{files, testing::*},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    impl Embedded {
        fn reloaded(&self, settings: Settings) -> Result<(), EmbeddedError> {
            self.prepare(settings).map(|prepared| self.commit(prepared))
        }
    }

    struct Bench {
        _scratch: tempfile::TempDir,
        settings: Settings,
        /// Seconds after `now()`.
        clock: Arc<std::sync::atomic::AtomicI64>,
        provider: Arc<Embedded>,
    }

    impl Bench {
        fn new() -> Self {
            let scratch = tempfile::tempdir().unwrap();
            let ca_dir = scratch.path().join("ca");
            ca::init(&ca_dir, &domain_of("example.org"), ca::DEFAULT_LIFE, now()).unwrap();
            let settings =
                Settings { ca_dir, trust_domain: domain_of("example.org"), svid_ttl: HOUR, bundles: Vec::new() };
            let clock = Arc::new(std::sync::atomic::AtomicI64::new(0));
            let reader = clock.clone();
            let time = move || {
                let seconds = reader.load(Ordering::SeqCst);
                let distance = Duration::from_secs(seconds.unsigned_abs());
                if seconds < 0 { now() - distance } else { now() + distance }
            };
            let provider = Arc::new(Embedded::with_clock(settings.clone(), Box::new(time)).unwrap());
            Self { _scratch: scratch, settings, clock, provider }
        }

        fn at(&self, seconds: i64) {
            self.clock.store(seconds, Ordering::SeqCst);
        }

        async fn obtain(&self) -> Arc<Credential> {
            self.provider.obtain(&workload(1)).await.unwrap()
        }
    }

    fn workload(number: u32) -> Workload {
        Workload { number, id: id_of("spiffe://example.org/web") }
    }

    #[tokio::test]
    async fn a_credential_is_issued_at_first_need_and_then_at_hand() {
        let bench = Bench::new();
        assert!(bench.provider.ready(&workload(1)).is_none());
        let first = bench.obtain().await;
        assert!(Arc::ptr_eq(&first, &bench.provider.ready(&workload(1)).unwrap()));
        assert!(Arc::ptr_eq(&first, &bench.obtain().await));
        assert_eq!(bench.provider.status().issued, 1);
    }

    #[tokio::test]
    async fn a_hundred_connections_at_once_cause_one_credential() {
        let bench = Bench::new();
        let threads: Vec<_> = (0..100)
            .map(|_| {
                let provider = bench.provider.clone();
                std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(provider.obtain(&workload(1))).unwrap().serial.clone()
                })
            })
            .collect();
        let serials: std::collections::HashSet<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!((serials.len(), bench.provider.status().issued), (1, 1));
    }

    #[tokio::test]
    async fn two_entries_of_one_identity_do_not_share_a_key() {
        // R40
        let bench = Bench::new();
        let one = bench.obtain().await;
        let two = bench.provider.obtain(&workload(2)).await.unwrap();
        assert_ne!(one.serial, two.serial);
    }

    #[tokio::test]
    async fn it_rotates_at_half_life_and_the_old_credential_stays_with_its_connections() {
        let bench = Bench::new();
        let old = bench.obtain().await;
        bench.at(1619); // 0.9 * 1800 s - 1 s
        assert!(Arc::ptr_eq(&old, &bench.provider.ready(&workload(1)).unwrap()));
        bench.at(1981); // 1.1 * 1800 s + 1 s
        assert!(bench.provider.ready(&workload(1)).is_none());
        let new = bench.obtain().await;
        assert_ne!(old.serial, new.serial);
        assert!(old.is_valid(now() + Duration::from_secs(1981)));
    }

    #[tokio::test]
    async fn maintenance_replaces_what_is_used_and_drops_what_is_not() {
        let bench = Bench::new();
        let old = bench.obtain().await;
        assert!(bench.provider.tend() <= TICK);
        bench.at(2000);
        bench.provider.tend();
        let new = bench.provider.slots.load().values().next().unwrap().held.load_full().unwrap();
        assert_ne!(old.serial, new.credential.serial);
        bench.at(4000);
        bench.provider.tend();
        assert!(bench.provider.status().credentials.is_empty());
    }

    #[tokio::test]
    async fn an_expired_credential_is_never_handed_out() {
        // R41
        let bench = Bench::new();
        let old = bench.obtain().await;
        bench.at(3601);
        assert!(bench.provider.ready(&workload(1)).is_none());
        let new = bench.obtain().await;
        assert_ne!(old.serial, new.serial);
        assert!(new.is_valid(now() + Duration::from_secs(3601)));
    }

    #[tokio::test]
    async fn with_an_expired_authority_there_is_no_credential_but_a_reason() {
        // R41
        let bench = Bench::new();
        bench.obtain().await;
        bench.at(i64::try_from(ca::DEFAULT_LIFE.as_secs()).unwrap() + 1);
        assert!(bench.provider.ready(&workload(1)).is_none());
        let error = bench.provider.obtain(&workload(1)).await.unwrap_err();
        assert_eq!((error.code(), error.culprit()), ("credential-unavailable", Culprit::Host));
        assert!(error.to_string().contains("expired"), "{error}");
        let status = bench.provider.status();
        assert_eq!(status.failed, 1);
        assert_eq!((status.failing.len(), status.failing[0].workload), (1, 1));
        assert!(status.failing[0].error.contains("expired"), "{status:?}");
        // It is said for as long as it lasts, and of whom it is true.
        bench.at(0);
        bench.provider.obtain(&workload(2)).await.unwrap();
        assert_eq!(bench.provider.status().failing.len(), 1);
        bench.obtain().await;
        assert!(bench.provider.status().failing.is_empty());
    }

    #[tokio::test]
    async fn a_clock_that_jumps_back_gets_a_credential_that_is_valid_then() {
        let bench = Bench::new();
        bench.at(7200);
        let old = bench.obtain().await;
        bench.at(0);
        assert!(bench.provider.ready(&workload(1)).is_none());
        let new = bench.obtain().await;
        assert_ne!(old.serial, new.serial);
        assert!(new.is_valid(now()));
        // Before the authority itself began there is nothing to give.
        bench.at(-3600);
        let error = bench.provider.obtain(&workload(1)).await.unwrap_err();
        assert!(error.to_string().contains("set the clock"), "{error}");
    }

    #[tokio::test]
    async fn an_identity_of_another_trust_domain_is_the_policys_fault() {
        let bench = Bench::new();
        let foreign = Workload { number: 7, id: id_of("spiffe://example.net/web") };
        let error = bench.provider.obtain(&foreign).await.unwrap_err();
        assert_eq!(error.culprit(), Culprit::Policy);
    }

    #[tokio::test]
    async fn entries_that_leave_the_policy_lose_their_credentials() {
        // R88
        let bench = Bench::new();
        bench.obtain().await;
        bench.provider.obtain(&workload(2)).await.unwrap();
        bench.provider.retain(&[workload(2)]);
        assert!(bench.provider.ready(&workload(1)).is_none());
        assert!(bench.provider.ready(&workload(2)).is_some());
    }

    #[tokio::test]
    async fn a_reload_that_fails_changes_nothing_and_one_with_a_new_authority_reissues() {
        let bench = Bench::new();
        let old = bench.obtain().await;
        let mut broken = bench.settings.clone();
        broken.bundles.push(Bundle {
            trust_domain: domain_of("example.net"),
            path: "/nonexistent/bundle.pem".into(),
            crl: None,
        });
        assert_eq!(bench.provider.reloaded(broken).unwrap_err().code(), "bundle-missing");
        let lifeless = Settings { svid_ttl: Duration::ZERO, ..bench.settings.clone() };
        assert_eq!(bench.provider.reloaded(lifeless).unwrap_err().code(), "ca-no-life");
        assert!(Arc::ptr_eq(&old, &bench.provider.ready(&workload(1)).unwrap()));
        assert!(bench.provider.status().failing.is_empty(), "a reload that fails is no fault of a credential");

        let changes = bench.provider.changes();
        bench.provider.reloaded(bench.settings.clone()).unwrap();
        assert!(bench.provider.ready(&workload(1)).is_some(), "the same authority: nothing to reissue");
        let mut other = bench.settings.clone();
        other.ca_dir = bench.settings.ca_dir.with_file_name("ca2");
        ca::init(&other.ca_dir, &domain_of("example.org"), ca::DEFAULT_LIFE, now()).unwrap();
        bench.provider.reloaded(other).unwrap();
        assert!(bench.provider.ready(&workload(1)).is_none());
        assert_eq!(*changes.borrow(), 2);
    }

    #[tokio::test]
    async fn what_is_prepared_is_not_in_force_before_it_is_committed() {
        let bench = Bench::new();
        let old = bench.obtain().await;
        let order = Order::Serial(old.serial.to_string());
        revoke::revoke(&bench.settings.ca_dir, &order, HOUR, now()).unwrap();
        let (changes, trust) = (bench.provider.changes(), bench.provider.trust());
        let prepared = bench.provider.prepare(bench.settings.clone()).unwrap();
        assert!(Arc::ptr_eq(&trust, &bench.provider.trust()));
        drop(bench.provider.prepare(bench.settings.clone()).unwrap());
        assert!(Arc::ptr_eq(&old, &bench.provider.ready(&workload(1)).unwrap()));
        assert_eq!((bench.provider.status().lists.len(), *changes.borrow()), (0, 0));
        bench.provider.commit(prepared);
        assert!(bench.provider.ready(&workload(1)).is_none());
        assert_eq!((bench.provider.status().lists.len(), *changes.borrow()), (1, 1));
    }

    #[tokio::test]
    async fn a_reload_takes_a_new_list_and_keeps_the_old_one_where_the_new_one_is_broken() {
        // R39
        let bench = Bench::new();
        let list = bench.settings.ca_dir.join(LIST_FILE);
        let revoke = |serial: &str| {
            let order = Order::Serial(serial.into());
            revoke::revoke(&bench.settings.ca_dir, &order, HOUR, now()).unwrap();
        };
        let revoked = || bench.provider.status().lists.first().map(|list| list.revoked);
        assert_eq!(revoked(), None);
        revoke("05");
        assert_eq!(revoked(), None, "only what was loaded is in force");
        bench.provider.reloaded(bench.settings.clone()).unwrap();
        assert_eq!(revoked(), Some(1));
        std::fs::write(&list, "rubbish").unwrap();
        let error = bench.provider.reloaded(bench.settings.clone()).unwrap_err();
        assert_eq!((error.code(), error.culprit()), ("crl-empty", Culprit::Host));
        assert_eq!(revoked(), Some(1));
        std::fs::remove_file(&list).unwrap();
        std::os::unix::fs::symlink("/nonexistent", &list).unwrap();
        assert_eq!(bench.provider.reloaded(bench.settings.clone()).unwrap_err().code(), "crl-missing");
        assert_eq!(revoked(), Some(1));
        bench.at(3600);
        assert!(bench.provider.status().lists.first().unwrap().over);
        std::fs::remove_file(&list).unwrap();
        bench.provider.reloaded(bench.settings.clone()).unwrap();
        assert_eq!(revoked(), None);
    }

    #[tokio::test]
    async fn a_workload_whose_own_credential_is_revoked_gets_another() {
        // R39
        let bench = Bench::new();
        let old = bench.obtain().await;
        let other = bench.provider.obtain(&workload(2)).await.unwrap();
        let order = Order::Serial(old.serial.to_string());
        revoke::revoke(&bench.settings.ca_dir, &order, HOUR, now()).unwrap();
        bench.provider.reloaded(bench.settings.clone()).unwrap();
        assert_ne!(bench.obtain().await.serial, old.serial);
        assert!(Arc::ptr_eq(&other, &bench.provider.ready(&workload(2)).unwrap()));
    }

    #[tokio::test]
    async fn a_further_trust_domain_has_lists_of_its_own() {
        // R39, R64
        let bench = Bench::new();
        let (ca, path) = (TestCa::new("example.net"), |name: &str| bench.settings.ca_dir.with_file_name(name));
        std::fs::write(path("net.pem"), ca.pem()).unwrap();
        let write = |list: &[u8]| std::fs::write(path("net.crl"), &*files::pem("X509 CRL", list)).unwrap();
        let mut settings = bench.settings.clone();
        settings.bundles.push(Bundle {
            trust_domain: domain_of("example.net"),
            path: path("net.pem"),
            crl: Some(path("net.crl")),
        });
        let reload = || bench.provider.reloaded(settings.clone()).map_err(|error| error.code());
        assert_eq!(reload(), Err("crl-missing"));
        write(&TestCa::new("example.net").list(list_params(&[])));
        assert_eq!(reload(), Err("crl-other-authority"));
        write(&ca.list(list_params(&[&[5]])));
        assert_eq!(reload(), Ok(()));
        let leaf = ca.leaf(numbered(leaf_params("spiffe://example.net/web"), &[5]));
        let name = [IssuerAndSerial::of(&leaf).unwrap()];
        let trust = bench.provider.trust();
        assert!(trust.revokes(&domain_of("example.net"), &name));
        assert!(!trust.revokes(&domain_of("example.org"), &name));
    }

    #[tokio::test]
    async fn further_trust_domains_stay_apart_from_the_own_one() {
        // R64
        let bench = Bench::new();
        let path = bench.settings.ca_dir.with_file_name("net.pem");
        std::fs::write(&path, TestCa::new("example.net").pem()).unwrap();
        let mut settings = bench.settings.clone();
        settings.bundles.push(Bundle { trust_domain: domain_of("example.net"), path, crl: None });
        bench.provider.reloaded(settings).unwrap();
        let trust = bench.provider.trust();
        for domain in ["example.org", "example.net"] {
            assert_eq!(trust.anchors(&domain_of(domain)).unwrap().validity().len(), 1, "{domain}");
        }
    }
}
