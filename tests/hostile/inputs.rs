//! Bad configuration, policy and authority files: one clear line, and nothing that ran before is touched.

use lab::agent::make_authority;
use lab::policy::{DOMAIN, PORT, id};
use lab::{Agent, Lab, Mint, Policy, Program, Settings, Skip, clock, lab, or_skip, skip};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use time::Duration;

fn agent<'a>(lab: &'a Lab, policy: &Policy, settings: &Settings) -> Result<Agent<'a>, Skip> {
    if skip::plain() {
        return Err(Skip::because("LAB_PLAIN=1 leaves the agent out, and this test is about the agent"));
    }
    Agent::prepare(lab, &lab.alpha, policy, settings)
}

/// Neither `bunter agent` nor `bunter check` takes this; both say why, in words that contain all of these.
#[track_caller]
fn refused(agent: &Agent, words: &[&str]) {
    let check = agent.command(&["check"]).unwrap().bad();
    for said in [agent.expect_refused(), check] {
        expect_words(&said, words);
    }
}

#[track_caller]
fn expect_words(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "want {word:?} in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn change(agent: &Agent, from: &str, to: &str) {
    let text = std::fs::read_to_string(agent.config()).unwrap();
    assert!(text.contains(from), "{text}");
    std::fs::write(agent.config(), text.replace(from, to)).unwrap();
}

#[test]
fn a_good_configuration_is_checked_without_starting_anything() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    agent.command(&["check"]).unwrap().good();
    let said = agent.command(&["status"]).unwrap().bad();
    assert!(said.contains("no agent"), "{said}");
}

#[test]
fn an_unknown_key_in_the_configuration_is_refused() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    change(&agent, "engine = ", "enjine = ");
    refused(&agent, &["agent.toml", "enjine"]);
}

#[test]
fn a_number_without_a_unit_is_refused() {
    let lab = lab!();
    let settings = Settings { identity: "svid_ttl = 3600".to_owned(), ..Settings::default() };
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &settings));
    refused(&agent, &["agent.toml", "svid_ttl"]);
}

#[test]
fn an_unknown_unit_is_refused() {
    let lab = lab!();
    let settings = Settings { tables: "[timeouts]\ndial = \"10 parsecs\"".to_owned(), ..Settings::default() };
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &settings));
    refused(&agent, &["agent.toml", "parsecs"]);
}

#[test]
fn an_unknown_engine_is_refused() {
    let lab = lab!();
    let settings = Settings { engine: "steam".to_owned(), ..Settings::default() };
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &settings));
    refused(&agent, &["agent.toml", "steam"]);
}

#[test]
fn a_configuration_that_is_not_there_is_refused() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    std::fs::remove_file(agent.config()).unwrap();
    refused(&agent, &["agent.toml"]);
}

#[test]
fn an_unknown_key_in_the_policy_is_refused_with_file_and_line() {
    let lab = lab!();
    let policy = Policy::standard(&lab).raw("[[allow]]\nname = \"typo\"\nfrm = \"spiffe://lab.test/client\"\n");
    let agent = or_skip!(agent(&lab, &policy, &Settings::default()));
    let line = policy.text().lines().position(|line| line.starts_with("frm")).unwrap() + 1;
    refused(&agent, &["lab.toml", "frm", &line.to_string()]);
}

#[test]
fn two_destinations_with_one_address_are_refused() {
    let lab = lab!();
    let policy = Policy::standard(&lab).destination(lab.beta.at(PORT), "client");
    let agent = or_skip!(agent(&lab, &policy, &Settings::default()));
    refused(&agent, &["lab.toml", &lab.beta.at(PORT).to_string()]);
}

#[test]
fn a_bypass_of_a_mesh_destination_is_refused() {
    let lab = lab!();
    let policy = Policy::standard(&lab).bypass("hole", "client", lab.beta.at(PORT));
    let agent = or_skip!(agent(&lab, &policy, &Settings::default()));
    let line = policy.text().lines().position(|line| line.starts_with("[[bypass]]")).unwrap() + 1;
    refused(&agent, &[&format!("lab.toml:{line}"), "hole"]);
}

#[test]
fn an_entry_for_every_root_process_is_refused() {
    let lab = lab!();
    let policy = Policy::standard(&lab).workload_by("root", &["unix:uid:0"]);
    let agent = or_skip!(agent(&lab, &policy, &Settings::default()));
    refused(&agent, &["lab.toml"]);
}

#[test]
fn a_policy_directory_that_is_not_there_is_refused() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    std::fs::remove_dir_all(agent.directory().join("policies")).unwrap();
    refused(&agent, &["policies"]);
}

#[test]
fn a_policy_that_anybody_can_write_is_refused() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    let file = agent.directory().join("policies/lab.toml");
    mode(&file, 0o666);
    refused(&agent, &["lab.toml", "everybody can write"]);
    mode(&file, 0o644);
    mode(&agent.directory().join("policies"), 0o777);
    refused(&agent, &["policies", "everybody can write"]);
}

#[test]
fn a_policy_that_anybody_can_write_is_not_taken_on_reload() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    mode(&mesh.alpha().directory().join("policies/lab.toml"), 0o666);
    let told = mesh.alpha().read_again().unwrap_err();
    assert!(told.contains("lab.toml"), "{told}");
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

#[test]
fn status_answers_while_a_long_policy_is_read_and_the_last_word_is_in_force() {
    let lab = lab!();
    let short = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&short));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let (from, to) = (id("client"), id("server"));
    let rule = |number| format!("[[allow]]\nfrom = \"{from}\"\nto = \"{to}/{number}\"\n");
    let rules: String = (0..clock::count(50_000)).map(rule).collect();
    let long = Policy::standard(&lab).destination("10.99.0.1:80", "server").raw(&rules);
    let status = || mesh.alpha().status()["policy"].clone();
    let before = status();
    mesh.alpha().post(long.text());
    let mut answers = 0;
    let done = clock::until(clock::seconds(60), || {
        answers += 1;
        (status()["generation"] != before["generation"]).then_some(())
    });
    assert!(done.is_some(), "the long policy was not taken: {:#}", status());
    assert_ne!(status()["destinations"], before["destinations"]);
    assert!(answers > 5, "{answers} answers until the long policy was in force");
    // A reload that comes while another is under way is not forgotten.
    mesh.alpha().post(long.text());
    std::thread::sleep(clock::millis(20));
    mesh.alpha().post(short.text());
    let last = clock::until(clock::seconds(60), || {
        let now = status();
        (now["destinations"] == before["destinations"] && now["refused"].is_null()).then_some(())
    });
    assert!(last.is_some(), "{:#}", status());
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    lab.expect_tls(PORT);
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
}

/// An authority of its own for one test.
fn authority(lab: &Lab, domain: &str) -> Result<PathBuf, Skip> {
    let directory = lab.directory().join(format!("ca-{domain}"));
    make_authority(lab, &skip::bunter()?, domain, &directory);
    Ok(directory)
}

fn with_authority(directory: &Path) -> Settings {
    Settings { authority: Some(directory.to_owned()), ..Settings::default() }
}

#[test]
fn an_authority_whose_key_others_can_read_is_refused() {
    let lab = lab!();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &with_authority(&directory)));
    mode(&directory.join("ca.key"), 0o644);
    refused(&agent, &["ca.key", "644"]);
    mode(&directory.join("ca.key"), 0o600);
    mode(&directory.join("ca.pem"), 0o666);
    refused(&agent, &["ca.pem", "666"]);
}

#[test]
fn an_expired_authority_is_refused() {
    let lab = lab!();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let (_, certificate, key) = Mint::found(DOMAIN, Duration::days(-2), Duration::days(-1)).unwrap();
    std::fs::write(directory.join("ca.pem"), certificate).unwrap();
    std::fs::write(directory.join("ca.key"), key).unwrap();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &with_authority(&directory)));
    refused(&agent, &["ca.pem", "expired"]);
}

#[test]
fn an_authority_that_is_not_there_is_refused() {
    let lab = lab!();
    let nowhere = lab.directory().join("nowhere");
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &with_authority(&nowhere)));
    refused(&agent, &["nowhere", "bunter ca init"]);
}

#[test]
fn an_authority_of_another_trust_domain_is_refused() {
    let lab = lab!();
    let directory = or_skip!(authority(&lab, "other.test"));
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &with_authority(&directory)));
    refused(&agent, &["other.test", DOMAIN]);
}

#[test]
fn an_authority_that_is_rubbish_is_refused() {
    let lab = lab!();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &with_authority(&directory)));
    std::fs::write(directory.join("ca.pem"), "rubbish").unwrap();
    refused(&agent, &["ca.pem"]);
}

#[test]
fn a_missing_or_foreign_bundle_is_refused() {
    let lab = lab!();
    let bundle = lab.directory().join("friends.pem");
    let tables = format!("[[trust]]\ntrust_domain = \"friends.test\"\nbundle = \"{}\"\n", bundle.display());
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings { tables, ..Settings::default() }));
    refused(&agent, &["friends.pem"]);
    let (_, other, _) = Mint::found("strangers.test", Duration::days(-1), Duration::days(1)).unwrap();
    std::fs::write(&bundle, other).unwrap();
    refused(&agent, &["friends.pem", "friends.test"]);
    let (_, expired, _) = Mint::found("friends.test", Duration::days(-2), Duration::days(-1)).unwrap();
    std::fs::write(&bundle, expired).unwrap();
    refused(&agent, &["friends.pem"]);
    std::fs::write(&bundle, "rubbish").unwrap();
    refused(&agent, &["friends.pem"]);
    let (_, good, _) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    std::fs::write(&bundle, good).unwrap();
    agent.command(&["check"]).unwrap().good();
    mode(&bundle, 0o666);
    refused(&agent, &["friends.pem", "666"]);
}

/// Trust in another trust domain as well, whose authorities are these: their file, that of their list, which is not there
/// yet, and the settings of an agent with an authority of its own.
fn trust_in_friends(lab: &Lab, authorities: &str, own: &Path) -> (PathBuf, PathBuf, Settings) {
    let (bundle, list) = (lab.file("friends.pem", authorities), lab.directory().join("friends.crl"));
    let tables = format!(
        "[[trust]]\ntrust_domain = \"friends.test\"\nbundle = \"{}\"\ncrl = \"{}\"\n",
        bundle.display(),
        list.display()
    );
    (bundle, list, Settings { tables, ..with_authority(own) })
}

#[test]
fn a_broken_foreign_or_expired_revocation_list_is_refused() {
    let lab = lab!();
    let (mint, bundle, _) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    let (stranger, ..) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let (_, list, settings) = trust_in_friends(&lab, &bundle, &directory);
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &settings));
    refused(&agent, &["friends.crl", "friends.test", "no such file"]);
    std::fs::write(&list, "rubbish").unwrap();
    refused(&agent, &["friends.crl", "friends.test", "holds no list"]);
    // Of the same name, and signed with another key.
    std::fs::write(&list, stranger.list(&[5], Duration::days(1)).unwrap()).unwrap();
    refused(&agent, &["friends.crl", "friends.test", "signature"]);
    std::fs::write(&list, mint.list(&[5], Duration::minutes(-1)).unwrap()).unwrap();
    refused(&agent, &["friends.crl", "friends.test", "was good until"]);
    std::fs::write(&list, mint.list(&[5], Duration::days(1)).unwrap()).unwrap();
    agent.command(&["check"]).unwrap().good();
    mode(&list, 0o666);
    refused(&agent, &["friends.crl", "666"]);
    mode(&list, 0o644);
    // The own authority's is beside it.
    std::fs::write(directory.join("crl.pem"), mint.list(&[5], Duration::days(1)).unwrap()).unwrap();
    refused(&agent, &["crl.pem", DOMAIN, "friends.test"]);
}

/// Ways in which one section of a file is written so that other readers pass over it.
fn unusual(pem: &str, label: &str, misspelt: &str) -> Vec<String> {
    vec![
        format!("\u{feff}{pem}"),
        pem.replace(label, misspelt),
        pem.lines().map(|line| format!("  {line}\n")).collect(),
        pem.replace("-----BEGIN", "----BEGIN"),
        pem.replace("-----BEGIN", "—BEGIN"),
        pem.replace('\n', "\r"),
        pem.lines().skip(1).collect::<Vec<_>>().join("\n"),
        pem.lines().filter(|line| !line.starts_with('-')).collect::<Vec<_>>().join("\n"),
    ]
}

#[test]
fn a_file_in_which_one_section_is_written_unusually_is_refused_with_its_line() {
    let lab = lab!();
    let (old, old_pem, _) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    let (_, new_pem, key) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let (bundle, list, settings) = trust_in_friends(&lab, &old_pem, &directory);
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &settings));
    let good = old.list(&[5], Duration::days(1)).unwrap();
    std::fs::write(&list, &good).unwrap();
    agent.command(&["check"]).unwrap().good();
    let check = |words: &[&str]| expect_words(&agent.command(&["check"]).unwrap().bad(), words);
    // The one after the good one, so that what is read before it is not nothing.
    let line = |before: &str| before.lines().count() + 1;
    for odd in unusual(&new_pem, "CERTIFICATE", "CERTIFICAT").into_iter().chain([key]) {
        std::fs::write(&bundle, format!("{old_pem}{odd}")).unwrap();
        check(&[&format!("friends.pem:{}: ", line(&old_pem))]);
    }
    std::fs::write(&bundle, format!("{old_pem}{good}")).unwrap();
    check(&[&format!("friends.pem:{}: ", line(&old_pem)), "X509 CRL"]);
    std::fs::write(&bundle, &old_pem).unwrap();
    for odd in unusual(&good, "X509 CRL", "CRL") {
        std::fs::write(&list, format!("# of friends.test\n\n{odd}")).unwrap();
        check(&["friends.crl:3: "]);
    }
    std::fs::write(&list, format!("# of friends.test\r\n\r\n{}", good.replace('\n', "\r\n"))).unwrap();
    agent.command(&["check"]).unwrap().good();
    let key = directory.join("ca.key");
    let pem = std::fs::read_to_string(&key).unwrap();
    std::fs::write(&key, pem.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY")).unwrap();
    check(&["ca.key:1: ", "openssl pkey"]);
}

#[test]
fn what_openssl_writes_around_a_certificate_is_no_reason_to_refuse_it() {
    let lab = lab!();
    or_skip!(skip::need("openssl"));
    let (_, pem, _) = Mint::found("friends.test", Duration::days(-1), Duration::days(1)).unwrap();
    let plain = lab.file("plain.pem", pem).display().to_string();
    let words = ["openssl", "x509", "-in", &plain, "-text", "-fingerprint", "-purpose", "-serial", "-dates"];
    let told = lab.run(&lab.stranger, "foreign", &words).outcome().good();
    assert!(told.starts_with("Certificate:"), "{told}");
    let bundle = lab.file("friends.pem", told);
    let tables = format!("[[trust]]\ntrust_domain = \"friends.test\"\nbundle = \"{}\"\n", bundle.display());
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings { tables, ..Settings::default() }));
    agent.command(&["check"]).unwrap().good();
}

#[test]
fn a_reload_with_a_list_that_is_not_understood_leaves_trust_and_policy_as_they_were() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let svid = mesh.issue("somebody").join("svid.pem");
    let list = lab.directory().join("ca/crl.pem");
    mesh.revoke(&svid);
    mesh.alpha().reload(&Policy::standard(&lab));
    let in_force = || {
        let status = mesh.alpha().status();
        let policy = &status["policy"];
        (policy["generation"].clone(), policy["workloads"].clone(), status["bundles"][0]["revocations"].clone())
    };
    let before = in_force();
    assert_eq!(before.2["revoked"], 1, "{before:?}");
    let good = std::fs::read_to_string(&list).unwrap();
    for odd in unusual(&good, "X509 CRL", "CRL") {
        std::fs::write(&list, format!("# of the lab\n{odd}")).unwrap();
        // A policy that would be taken, but for the list.
        let told = mesh.alpha().reload_text(Policy::without_rules(&lab).workload("third").text()).expect_err(&odd);
        assert!(told.contains("crl.pem:2: "), "{told}");
        assert_eq!(in_force(), before);
        std::fs::write(&list, &good).unwrap();
    }
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    mesh.alpha().reload(&Policy::standard(&lab));
    lab.expect_tls(PORT);
}

#[test]
fn an_authority_is_not_made_over_another() {
    let lab = lab!();
    let directory = or_skip!(authority(&lab, DOMAIN));
    let before = std::fs::read(directory.join("ca.key")).unwrap();
    let mut command = lab.command_in(Default::default(), or_skip!(skip::bunter()));
    command.args(["ca", "init", "--trust-domain", DOMAIN, "--dir"]).arg(&directory);
    let said = Program::start(command, "bunter ca init").unwrap().outcome().bad();
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(std::fs::read(directory.join("ca.key")).unwrap(), before);
}

#[test]
fn policy_cases_are_run_and_a_wrong_one_is_told() {
    let lab = lab!();
    let test = |name: &str, decision: &str| -> Result<lab::Outcome, Skip> {
        let case = format!(
            "[[expect]]\nfrom = \"spiffe://{DOMAIN}/client\"\nto = \"{}\"\ndecision = \"{decision}\"\n",
            lab.beta.at(PORT)
        );
        let directory = lab.directory().join(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("p.toml"), Policy::standard(&lab).raw(&case).text()).unwrap();
        let mut command = lab.command_in(Default::default(), skip::bunter()?);
        command.args(["policy", "test"]).arg(directory);
        Ok(Program::start(command, "bunter policy test").unwrap().outcome())
    };
    or_skip!(test("right", "allow")).good();
    let said = or_skip!(test("wrong", "deny")).bad();
    assert!(said.contains("p.toml"), "{said}");
}

#[test]
fn a_verb_or_option_that_does_not_exist_is_told_with_the_usage() {
    let lab = lab!();
    for words in [&["dance"][..], &["agent", "--confg", "x"], &["run"], &["ca", "issue"]] {
        let mut command = lab.command_in(Default::default(), or_skip!(skip::bunter()));
        command.args(words);
        let said = Program::start(command, "bunter").unwrap().outcome().bad();
        assert!(said.contains("sage"), "{words:?}: {said}");
    }
}

#[test]
fn commands_without_an_agent_say_what_to_do() {
    let lab = lab!();
    let agent = or_skip!(agent(&lab, &Policy::standard(&lab), &Settings::default()));
    for words in [&["status"][..], &["status", "--json"], &["connections"], &["connections", "--json"]] {
        let said = agent.command(words).unwrap().bad();
        assert!(said.contains("no agent answers") && said.contains("admin.sock"), "{words:?}: {said}");
    }
    // Nothing to release is no failure.
    agent.command(&["release"]).unwrap().good();
}

#[test]
fn the_admin_socket_is_for_root_alone() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let socket = mesh.alpha().directory().join("run/admin.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut place = lab.place(&lab.alpha, "user");
    place.user = Some((12345, 12345));
    let mut command = lab.command_in(place, or_skip!(skip::bunter()));
    command.current_dir("/").args(["status", "--config"]).arg(mesh.alpha().config());
    Program::start(command, "bunter status").unwrap().outcome().bad();
}
