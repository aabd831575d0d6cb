//! `bunter ca`: the embedded authority, SVIDs as files for peers that are not under an agent, and what is revoked.

use super::Wrong;
use bunter::units;
use bunter_identity::authority::ca;
use bunter_identity::authority::revoke::{self, Order, RevokeError};
use bunter_identity::spiffe::{SpiffeId, TrustDomain};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

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
    let issued = ca::issue_files(dir, &id, out, ttl, SystemTime::now())?;
    println!("issued {id} to {}: svid.pem, key.pem, bundle.pem", out.display());
    println!("  serial number {}", issued.serial);
    Ok(ExitCode::SUCCESS)
}

/// Revokes a certificate, or signs the list anew where neither is given.
pub fn revoke(
    dir: &Path,
    serial: Option<String>,
    certificate: Option<PathBuf>,
    next_update: &str,
) -> anyhow::Result<ExitCode> {
    let life = units::duration(next_update).map_err(|error| Wrong(format!("--next-update {next_update}: {error}")))?;
    let order = match (serial, certificate) {
        (Some(serial), _) => Order::Serial(serial),
        (None, Some(certificate)) => Order::Certificate(certificate),
        (None, None) => Order::Refresh,
    };
    let done = revoke::revoke(dir, &order, life, SystemTime::now()).map_err(|error| match error {
        RevokeError::Serial(_) => Wrong(format!("--serial: {error}")).into(),
        error => anyhow::Error::from(error),
    })?;
    println!("{done}");
    Ok(ExitCode::SUCCESS)
}
