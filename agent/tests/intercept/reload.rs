//! A reload with real files and the real tables of the kernel: trust and policy change together, or neither does.

use crate::world::{World, world};
use arc_swap::ArcSwap;
use bunter::{
    config::Config,
    credential::{
        Provider,
        embedded::{Embedded, Settings},
    },
    daemon::{self, reload::Prepared},
    intercept::Error,
    policy::Policy,
};
use bunter_common::map;
use bunter_identity::authority::{
    ca,
    revoke::{self, Order},
};
use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

/// What an agent has on disk, and what it has in force.
struct Agent {
    scratch: tempfile::TempDir,
    config: Config,
    provider: Arc<dyn Provider>,
    policy: ArcSwap<Policy>,
}

impl Agent {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name).display().to_string();
        let text = format!(
            "policy_dir = \"{}\"\n[identity]\nprovider = \"embedded\"\nca_dir = \"{}\"\n",
            at("policies"),
            at("ca")
        );
        let config = Config::parse("agent.toml", &text).unwrap();
        fs::create_dir(scratch.path().join("policies")).unwrap();
        write_policy(scratch.path(), 1);
        let policy = Policy::load(&config.policy_dir, bunter::document::Purpose::InForce).unwrap();
        let ca_dir = scratch.path().join("ca");
        ca::init(&ca_dir, policy.trust_domain(), ca::DEFAULT_LIFE, SystemTime::now()).unwrap();
        let provider = Embedded::open(Settings {
            ca_dir,
            trust_domain: policy.trust_domain().clone(),
            svid_ttl: Duration::from_secs(3600),
            bundles: Vec::new(),
        });
        Self { scratch, config, provider: Arc::new(provider.unwrap()), policy: ArcSwap::from_pointee(policy) }
    }

    fn list(&self) -> PathBuf {
        self.scratch.path().join("ca").join(ca::LIST_FILE)
    }

    fn revoke(&self, serial: &str) {
        let order = Order::Serial(serial.into());
        revoke::revoke(&self.scratch.path().join("ca"), &order, revoke::DEFAULT_LIFE, SystemTime::now()).unwrap();
    }

    fn read(&self) -> Result<Prepared, daemon::Error> {
        Prepared::read(&self.config, &self.provider)
    }

    fn reload(&self, world: &mut World) -> Result<(), Error> {
        let prepared = self.read().unwrap();
        prepared.put_in_force(|policy| world.programs().install(policy), &*self.provider, &self.policy)
    }

    /// How many certificates are revoked, and how many destinations there are, by what is in force.
    fn in_force(&self) -> (Option<usize>, usize) {
        (self.provider.status().lists.first().map(|list| list.revoked), self.policy.load().destinations())
    }
}

/// A policy of so many destinations.
fn write_policy(scratch: &Path, destinations: usize) {
    let mut text = String::from("trust_domain = \"example.org\"\n");
    for number in 1..=destinations {
        let id = format!("id = \"spiffe://example.org/server-{number}\"");
        writeln!(text, "[[destination]]\naddress = \"10.77.1.{number}:80\"\n{id}").unwrap();
    }
    fs::write(scratch.join("policies/p.toml"), text).unwrap();
}

#[test]
fn a_reload_that_the_kernel_has_no_room_for_changes_neither_trust_nor_policy() {
    let mut world = world!();
    world.kill_agent();
    world.release();
    world.options.sizes = vec![(map::DESTINATIONS, 8)];
    world.try_start().unwrap();
    let agent = Agent::new();
    agent.reload(&mut world).unwrap();
    assert_eq!(agent.in_force(), (None, 1));
    let generation = world.programs().generation();
    let (trust, changes) = (agent.provider.trust(), agent.provider.changes());
    let before = *changes.borrow();

    agent.revoke("05");
    write_policy(agent.scratch.path(), 40);
    let refused = agent.reload(&mut world).unwrap_err();
    assert!(matches!(refused, Error::MapFull { map: map::DESTINATIONS }), "{refused}");
    assert_eq!((agent.in_force(), world.programs().generation()), ((None, 1), generation));
    assert!(Arc::ptr_eq(&trust, &agent.provider.trust()));
    assert_eq!(*changes.borrow(), before, "connections were looked at again for nothing");

    write_policy(agent.scratch.path(), 2);
    agent.reload(&mut world).unwrap();
    assert_eq!(agent.in_force(), (Some(1), 2));
    assert_eq!(*changes.borrow(), before + 1);
}

#[test]
fn a_reload_with_a_file_that_is_not_understood_does_not_come_to_the_kernel() {
    let mut world = world!();
    let agent = Agent::new();
    agent.revoke("05");
    agent.reload(&mut world).unwrap();
    assert_eq!(agent.in_force(), (Some(1), 1));
    agent.revoke("06");
    write_policy(agent.scratch.path(), 2);
    let list = fs::read_to_string(agent.list()).unwrap();
    for broken in [format!("\u{feff}{list}"), list.replace("X509 CRL", "CRL"), format!(" {list}"), String::new()] {
        fs::write(agent.list(), broken).unwrap();
        let refused = agent.read().unwrap_err().to_string();
        assert!(refused.contains("crl.pem"), "{refused}");
        assert_eq!(agent.in_force(), (Some(1), 1));
    }
    // The other way round: sound trust does not come in beside a broken policy.
    fs::write(agent.list(), &list).unwrap();
    fs::write(agent.scratch.path().join("policies/p.toml"), "this is no policy").unwrap();
    assert!(agent.read().is_err());
    assert_eq!(agent.in_force(), (Some(1), 1));
    write_policy(agent.scratch.path(), 2);
    agent.reload(&mut world).unwrap();
    assert_eq!(agent.in_force(), (Some(2), 2));
}
