//! The `bunter` command: arguments in, exit code out. What the verbs do is in [`cli`] and in the library.
//!
//! Exit codes: 0 done; 1 the thing asked for failed or was refused; 2 the command line, the configuration or the policy
//! is wrong. `bunter run` ends with the program's own.

#![forbid(unsafe_code)]

mod cli;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Transparent mutual TLS between attested workload identities.
#[derive(Parser)]
#[command(name = "bunter", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the node agent in the foreground: SIGHUP reloads policy, bundles and revocation lists, SIGTERM drains and ends
    Agent(Config),
    /// Check configuration, certificate authority and policy, and print what would be in force
    Check(Config),
    /// Work with policy files
    #[command(subcommand)]
    Policy(PolicyVerb),
    /// Work with the embedded certificate authority
    #[command(subcommand)]
    Ca(CaVerb),
    /// Start a program in a cgroup of its own (/bunter/NAME on the unified hierarchy) that a registration entry can name
    Run {
        /// Name of the cgroup; the name of the program if not given
        #[arg(long)]
        name: Option<String>,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// What is covered, who is attested as what, what was refused and why
    Status(Show),
    /// The open connections: both ends, rule, engine, key exchange
    Connections(Show),
    /// What this kernel can do, tried with real bytes, whether the agent sees the whole host, and the room in the kernel's
    /// tables
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Detach the kernel programs and forget their maps: this network namespace is left alone again
    Release(Config),
}

#[derive(Subcommand)]
enum PolicyVerb {
    /// Check policy directories and run their [[expect]] cases
    Test {
        /// Policy directories
        #[arg(required = true)]
        directories: Vec<PathBuf>,
    },
}

#[derive(Subcommand)]
enum CaVerb {
    /// Make a certificate authority for a trust domain
    Init {
        /// Name of the trust domain, such as example.org
        #[arg(long)]
        trust_domain: String,
        /// Directory for ca.key and ca.pem; must not hold one already
        #[arg(long)]
        dir: PathBuf,
        /// How long the authority is valid
        #[arg(long, default_value = "3650d")]
        life: String,
    },
    /// Issue an X.509-SVID to files, for a peer that is not under an agent
    Issue {
        /// Directory of the authority
        #[arg(long)]
        dir: PathBuf,
        /// SPIFFE ID
        #[arg(long)]
        id: String,
        /// Directory for svid.pem, key.pem and bundle.pem
        #[arg(long)]
        out: PathBuf,
        /// How long the SVID is valid
        #[arg(long, default_value = "1h")]
        ttl: String,
    },
    /// Revoke a certificate: extend and sign crl.pem in the directory of the authority
    #[command(group = clap::ArgGroup::new("order").required(true))]
    Revoke {
        /// Directory of the authority
        #[arg(long)]
        dir: PathBuf,
        /// Serial number in hexadecimal, as `openssl x509 -serial` prints it
        #[arg(long, group = "order", value_name = "HEX")]
        serial: Option<String>,
        /// PEM file of the certificate
        #[arg(long, group = "order", value_name = "FILE")]
        certificate: Option<PathBuf>,
        /// Revoke nothing more, but sign the list anew so that it is good for longer
        #[arg(long, group = "order")]
        refresh: bool,
        /// How long the list is good; when it has expired, peers are refused until it is signed anew
        #[arg(long, default_value = "30d")]
        next_update: String,
    },
}

#[derive(clap::Args)]
struct Config {
    /// Configuration file
    #[arg(long, default_value = "/etc/bunter/agent.toml")]
    config: PathBuf,
}

#[derive(clap::Args)]
struct Show {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Configuration of the agent to ask; if it is not there, the agent at /run/bunter is asked
    #[arg(long)]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.verb {
        Verb::Agent(Config { config }) => cli::agent::run(&config),
        Verb::Check(Config { config }) => cli::check::run(&config),
        Verb::Policy(PolicyVerb::Test { directories }) => cli::check::test_policies(&directories),
        Verb::Ca(CaVerb::Init { trust_domain, dir, life }) => cli::ca::init(&trust_domain, &dir, &life),
        Verb::Ca(CaVerb::Issue { dir, id, out, ttl }) => cli::ca::issue(&dir, &id, &out, &ttl),
        Verb::Ca(CaVerb::Revoke { dir, serial, certificate, refresh: _, next_update }) => {
            cli::ca::revoke(&dir, serial, certificate, &next_update)
        }
        Verb::Run { name, command } => cli::run::run(name.as_deref(), &command),
        Verb::Status(Show { json, config }) => cli::show::status(config.as_deref(), json),
        Verb::Connections(Show { json, config }) => cli::show::connections(config.as_deref(), json),
        Verb::Doctor { json } => cli::show::doctor(json),
        Verb::Release(Config { config }) => cli::agent::release(&config),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bunter: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}
