//! A reload as one step: everything is read and checked, the kernel's tables are installed, and what is left to do cannot
//! fail.
//!
//! Files of policy and trust come in; both are in force together, or neither is.
//!
//! *Invariant:* whatever fails, it fails before anything has changed: trust, revocation lists, policy and, by the word of
//! who installs them, the kernel's tables are what they were.

use super::Error;
use crate::config::Config;
use crate::credential::{Provider, Reloaded};
use crate::document::Purpose;
use crate::policy::Policy;
use arc_swap::ArcSwap;
use std::sync::Arc;

/// What was read from disk and found sound, and is not in force.
#[derive(Debug)]
pub struct Prepared {
    policy: Arc<Policy>,
    identity: Reloaded,
}

impl Prepared {
    /// Reads policy, authority, trust bundles and revocation lists.
    pub fn read(config: &Config, provider: &Arc<dyn Provider>) -> Result<Self, Error> {
        let policy = Arc::new(Policy::load(&config.policy_dir, Purpose::InForce)?);
        let identity = provider.clone().reload(policy.trust_domain())?;
        Ok(Self { policy, identity })
    }

    /// The policy that was read.
    pub fn policy(&self) -> Arc<Policy> {
        self.policy.clone()
    }

    /// Puts it in force. `install` brings the policy into the kernel's tables, all of it or nothing; it goes first, since it
    /// alone can fail, and what the kernel redirects to the agent meanwhile, and the policy before does not know, is refused.
    pub fn put_in_force<E>(
        self,
        install: impl FnOnce(Arc<Policy>) -> Result<u32, E>,
        provider: &dyn Provider,
        policy: &ArcSwap<Policy>,
    ) -> Result<(), E> {
        install(self.policy.clone())?;
        self.identity.commit();
        policy.store(self.policy.clone());
        provider.retain(self.policy.workloads());
        Ok(())
    }
}
