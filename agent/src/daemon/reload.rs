//! A reload as one step: everything is read and checked, the kernel's tables are installed, and what is left to do cannot
//! fail.
//!
//! Files of policy and trust come in; all of them are in force together, or none is.
//!
//! *Invariant:* a failure comes before anything has changed: trust, revocation lists and policy are what they were, and so
//! are the kernel's tables, which `install` has to guarantee.

use super::Error;
use crate::config::Config;
use crate::credential::{Provider, Reloaded};
use crate::document::Purpose;
use crate::policy::Policy;
use arc_swap::ArcSwap;
use std::sync::Arc;

/// What was read from disk and found sound, and is not in force yet.
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

    /// Puts it in force. `install` brings the policy into the kernel's tables, all of it or nothing, and goes first, since
    /// it alone can fail. What the kernel redirects by the new policy before that is in force in the agent, and the old one
    /// does not know, is refused.
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
