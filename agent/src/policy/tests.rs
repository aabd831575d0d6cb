use super::*;

const ACCOUNTS: (&str, &str) = ("root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n", "root:x:0:\nwww-data:x:33:\n");

fn load(text: &str) -> Result<Policy, Rejected> {
    let source = Source { file: "p.toml".into(), text: text.into() };
    Policy::parse("policies", &[source], &Accounts::from_text(ACCOUNTS.0, ACCOUNTS.1))
}

fn policy(text: &str) -> Policy {
    load(&format!("trust_domain = \"td\"\n{text}")).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn smoke() {
    let policy = policy(
        r#"
        [[workload]]
        id = "spiffe://td/curl"
        selectors = ["unix:uid:1000", "cgroup:/a"]
        [[destination]]
        address = "10.0.0.2:80"
        id = "spiffe://td/web"
        [[allow]]
        name = "curl-to-web"
        from = "spiffe://td/curl"
        to = "spiffe://td/web"
        ports = [80]
        "#,
    );
    println!("{}", policy.decision_table());
    println!("{:?}", policy.kernel());
    println!("{:?}", policy.candidates(&policy.cgroup_set("/a/b")));
}
