use super::*;
use proptest::prelude::*;

const LEAST: &str = "[identity]\nprovider = \"embedded\"\n";

fn refusal(text: &str) -> String {
    Config::parse("agent.toml", text).map_or_else(|error| error.to_string(), |_| "accepted".into())
}

#[test]
fn everything_but_the_provider_has_a_default() {
    let config = Config::parse("agent.toml", LEAST).unwrap();
    assert_eq!(config.admin_socket(), Path::new("/run/bunter/admin.sock"));
    insta::assert_snapshot!(config.print(), @r#"
    policy_dir = "/etc/bunter/policies"
    state_dir = "/var/lib/bunter"
    run_dir = "/run/bunter"
    cgroup = "/"
    engine = "auto"
    shards = "auto"
    busy_poll = false

    [identity]
    provider = "embedded"
    ca_dir = "/etc/bunter/ca"
    svid_ttl = "1h"

    [audit]
    path = "/var/log/bunter/audit.jsonl"
    when_full = "refuse"

    [timeouts]
    dial = "10s"
    handshake = "10s"
    drain = "30s"
    stall = "1m"

    [limits]
    connections = 65536
    handshakes = 256
    waiting = 16384

    [sessions]
    reuse = true
    idle = "30s"
    age = "10m"
    uses = 10000
    spares = 64
    "#);
}

#[test]
fn the_page_in_docs_names_every_key_and_its_default() {
    let page = include_str!("../../../docs/CONFIGURATION.md");
    let mut blocks = page.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let (keys, trust) = (blocks.next().unwrap(), blocks.next().unwrap());
    assert_eq!(Config::parse("agent.toml", keys), Config::parse("agent.toml", LEAST));
    let printed = Config::parse("agent.toml", LEAST).unwrap().print();
    for key in printed.lines().filter_map(|line| line.split(" = ").next().filter(|key| !key.is_empty())) {
        assert!(keys.lines().any(|line| line.starts_with(key)), "{key} is not on the page");
    }
    let trust = Config::parse("agent.toml", &format!("{keys}{trust}")).unwrap().trust;
    assert!(trust.len() == 1 && trust[0].crl.is_some());
}

#[test]
fn what_is_printed_reads_the_same() {
    let text = "policy_dir = \"/p \\\"q\\\"\\\\\"\ncgroup = \"/a.slice\"\nengine = \"user\"\nshards = 3\n\
        [identity]\nprovider = \"embedded\"\nsvid_ttl = \"1h30m\"\n\
        [[trust]]\ntrust_domain = \"example.net\"\nbundle = \"/b.pem\"\ncrl = \"/c.pem\"\n[audit]\nwhen_full = \"continue\"\n\
        [timeouts]\ndrain = \"0s\"\n[limits]\nconnections = 5\n";
    let config = Config::parse("agent.toml", text).unwrap();
    assert_eq!(config.shards, Shards::Exactly(NonZeroUsize::new(3).unwrap()));
    assert_eq!(config.limits, Limits { connections: 5, handshakes: 256, waiting: 16_384 });
    assert_eq!(Config::parse("agent.toml", &config.print()), Ok(config));
}

#[test]
fn each_mistake_gets_one_line_that_says_what_to_write() {
    for (text, expected) in [
        ("", "agent.toml: the file has no `identity`; write [identity] and provider = \"embedded\" below it"),
        ("[identity]\n", "agent.toml:1: [identity] has no `provider`; write provider = \"embedded\""),
        ("[identity]\nprovider = \"spire\"\n", "agent.toml:2: `provider` cannot be `spire`; write \"embedded\""),
        ("policy_dri = \"/x\"", "agent.toml:1: unknown key `policy_dri` in the file; write `policy_dir`"),
        (
            "policy_dir = \"x\"",
            "agent.toml:1: `policy_dir` cannot be `x`; write an absolute path, such as policy_dir = \"/etc/bunter/policies\"",
        ),
        ("engine = \"kernal\"", "agent.toml:1: `engine` cannot be `kernal`; write \"kernel\""),
        ("engine = \"fast\"", "agent.toml:1: `engine` cannot be `fast`; write \"auto\" or \"kernel\" or \"user\""),
        ("shards = 65", "agent.toml:1: `shards` cannot be `65`; write shards = \"auto\", or a number from 1 to 64"),
        ("shards = 0", "agent.toml:1: `shards` cannot be `0`; write shards = \"auto\", or a number from 1 to 64"),
        (
            "cgroup = \"system.slice\"",
            "agent.toml:1: `cgroup` cannot be `system.slice`; \
             write a path on the unified hierarchy, such as cgroup = \"/system.slice\", or \"/\" for all",
        ),
        (
            "[timeouts]\ndial = 5",
            "agent.toml:2: `dial` must be a text, and this is a whole number; \
             put it in double quotes, with its unit if it has one",
        ),
        (
            "[timeouts]\ndial = \"5\"",
            "agent.toml:2: `dial`: the number 5 has no unit: write \"5s\" for seconds (units are ms, s, m, h and d); \
             write dial = \"10s\"",
        ),
        (
            "[timeouts]\nhandshake = \"2h\"",
            "agent.toml:2: `handshake` cannot be 2h; write 10ms to 1h, such as handshake = \"10s\"",
        ),
        (
            "[limits]\nconnections = 0",
            "agent.toml:2: `connections` cannot be 0; write a whole number from 1 to 1048576, without quotes",
        ),
        (
            "[audit]\nwhen_full = \"drop\"",
            "agent.toml:2: `when_full` cannot be `drop`; write \"refuse\" or \"continue\"",
        ),
        (
            "[[trust]]\ntrust_domain = \"example.net\"",
            "agent.toml:1: [[trust]] has no `bundle`; write bundle = \"/etc/bunter/example.net.pem\"",
        ),
        (
            "[[trust]]\ntrust_domain = \"a\"\nbundle = \"/a\"\ncrl = \"a.crl\"",
            "agent.toml:4: `crl` cannot be `a.crl`; \
             write an absolute path, such as crl = \"/etc/bunter/example.net.crl.pem\"",
        ),
        (
            "[[trust]]\ntrust_domain = \"a\"\nbundle = \"/a\"\n[[trust]]\ntrust_domain = \"a\"\nbundle = \"/b\"",
            "agent.toml:5: trust domain a is there twice, first at agent.toml:2; \
             put all its authorities into one bundle file, and remove one",
        ),
        (
            "[trust]\ntrust_domain = \"a\"",
            "agent.toml:1: `trust` must be a list of tables, and this is a table; write [[trust]], with two brackets",
        ),
    ] {
        let whole =
            if text.contains("[identity]") || text.is_empty() { text.into() } else { format!("{text}\n{LEAST}") };
        assert_eq!(refusal(&whole), expected, "{text}");
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = "engine = 1\nshards = \"many\"\n[identity]\nprovider = \"embedded\"\nca_dir = \"x\"\n[timeouts]\ndail = \"5s\"\n";
    assert_eq!(refusal(text).lines().count(), 4);
}

#[test]
fn a_missing_or_world_writable_file_is_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.toml");
    let shown = path.display().to_string();
    assert_eq!(
        Config::load(&path).unwrap_err().to_string(),
        format!(
            "{shown}: the file cannot be read (No such file or directory (os error 2)); write it, or name another file"
        )
    );
    std::fs::write(&path, LEAST).unwrap();
    assert!(Config::load(&path).is_ok());
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    assert_eq!(
        Config::load(&path).unwrap_err().to_string(),
        format!("{shown}: everybody can write to this file; run: chmod o-w {shown}")
    );
}

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in any::<String>(), key in "[a-z_]{1,9}", value in "\\PC{0,12}") {
        let _ = (Config::parse("f", &text), Config::parse("f", &format!("{key} = {value}\n{LEAST}")));
    }
}
