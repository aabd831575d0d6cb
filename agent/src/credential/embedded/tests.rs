use super::*;
use bunter_identity::{
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
        let settings = Settings { ca_dir, trust_domain: domain_of("example.org"), svid_ttl: HOUR, bundles: Vec::new() };
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
    // The status shows it for as long as it lasts, and only for the workload that it is about.
    bench.provider.obtain(&workload(2)).await.unwrap_err();
    assert_eq!(bench.provider.status().failing.len(), 2);
    // The first one's last credential is good again, the second has had none.
    bench.at(0);
    let failing = bench.provider.status().failing;
    assert_eq!((failing.len(), failing[0].workload), (1, 2));
    bench.provider.obtain(&workload(2)).await.unwrap();
    assert!(bench.provider.status().failing.is_empty());
}

#[tokio::test]
async fn a_reload_that_may_have_mended_a_fault_takes_it_from_the_status() {
    let bench = Bench::new();
    bench.at(i64::try_from(ca::DEFAULT_LIFE.as_secs()).unwrap() + 1);
    let prepared = {
        bench.at(0);
        bench.provider.prepare(bench.settings.clone()).unwrap()
    };
    bench.at(i64::try_from(ca::DEFAULT_LIFE.as_secs()).unwrap() + 1);
    bench.provider.obtain(&workload(1)).await.unwrap_err();
    assert_eq!(bench.provider.status().failing.len(), 1);
    bench.provider.commit(prepared);
    assert!(bench.provider.status().failing.is_empty(), "it is not known to fail any more");
    // What the reload has not mended fails again, and says so.
    bench.provider.obtain(&workload(1)).await.unwrap_err();
    assert_eq!(bench.provider.status().failing.len(), 1);
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
    assert!(bench.provider.status().lists.first().unwrap().expired);
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
