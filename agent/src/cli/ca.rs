//! `wimsey ca`: the embedded authority, and SVIDs as files for peers that are not under an agent.

use super::Wrong;
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;
use wimsey::identify::ca;
use wimsey::spiffe::{SpiffeId, TrustDomain};
use wimsey::units;

/// Makes an authority.
pub fn init(trust_domain: &str, dir: &Path, life: &str) -> anyhow::Result<ExitCode> {
    let trust_domain =
        TrustDomain::parse(trust_domain).map_err(|error| Wrong(format!("--trust-domain {trust_domain}: {error}")))?;
    let life = units::duration(life).map_err(|error| Wrong(format!("--life {life}: {error}")))?;
    ca::init(dir, &trust_domain, life, SystemTime::now())?;
    println!("made a certificate authority for {trust_domain} in {}", dir.display());
    println!("  ca.pem  the trust bundle: give it to peers in other trust domains");
    println!("  ca.key  the key: whoever reads it can be anybody in {trust_domain}");
    Ok(ExitCode::SUCCESS)
}

/// Issues an SVID to files.
pub fn issue(dir: &Path, id: &str, out: &Path, ttl: &str) -> anyhow::Result<ExitCode> {
    let id = SpiffeId::parse(id).map_err(|error| Wrong(format!("--id {id}: {error}")))?;
    let ttl = units::duration(ttl).map_err(|error| Wrong(format!("--ttl {ttl}: {error}")))?;
    ca::issue_files(dir, &id, out, ttl, SystemTime::now())?;
    println!("issued {id} to {}: svid.pem, key.pem, bundle.pem", out.display());
    Ok(ExitCode::SUCCESS)
}
