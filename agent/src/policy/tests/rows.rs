//! What the kernel is told: how much, and that it is no more than needed.

use super::*;

#[test]
fn the_kernel_is_told_a_workload_and_how_much_its_entry_asks_for() {
    let rows = |policy: &Policy, set: &[u32]| -> Vec<_> {
        let rows = policy.candidates(set);
        rows.iter().map(|row| (row.uid, row.gid, row.workload, row.certain, row.attested)).collect()
    };
    let policy = policy(ENTRIES);
    assert!(policy.kernel().cgroup_classes);
    // uid 1000: /curl could be meant. gid 5: only the digest tells.
    assert_eq!(rows(&policy, &[]), [(None, Some(5), 0, 0, 2), (Some(1000), None, 1, 1, 2)]);
    assert_eq!(rows(&policy, &policy.cgroup_set("/bunter/lab/x")), [(None, None, 4, 1, 0)]);
    assert_eq!(rows(&policy, &policy.cgroup_set("/system.slice/web.service")), [(Some(33), None, 3, 2, 0)]);
    assert_eq!(policy.kernel().unseen, [(None, None), (Some(33), None)]);
    assert_eq!(policy.cgroup_set("/bunter/lab"), policy.cgroup_set("/bunter/lab/deep/er"));
    assert_ne!(policy.cgroup_set("/bunter/lab"), policy.cgroup_set("/bunter/labs"));
    assert!(policy.cgroup_set("/").is_empty());
}

#[test]
fn a_cgroup_is_open_while_something_below_it_could_be_named() {
    let policy = policy(ENTRIES);
    for (cgroup, open) in [
        ("/", true),
        ("/bunter", true),
        ("/bunter/lab", false),
        ("/bunter/lab/x", false),
        ("/bunters", false),
        ("/system.slice", true),
        ("/a.slice/b.slice", true),
        ("/system.slice/web.service", false),
        ("/user.slice/user-1.slice/user@1.service/x", false),
    ] {
        assert_eq!(policy.cgroup_open(cgroup), open, "{cgroup}");
    }
}

#[test]
fn an_entry_with_more_selectors_wins_over_those_of_other_classes_and_keys() {
    let policy = policy(
        "[[workload]]\nid = \"spiffe://td/wide\"\nselectors = [\"unix:uid:9\"]\n\
         [[workload]]\nid = \"spiffe://td/narrow\"\nselectors = [\"unix:uid:9\", \"cgroup:/c\"]\n\
         [[workload]]\nid = \"spiffe://td/rival\"\nselectors = [\"unix:uid:9\", \"cgroup:/c/d\"]\n",
    );
    let workload = |cgroup: &str| policy.candidates(&policy.cgroup_set(cgroup))[0].workload;
    assert_eq!((workload("/"), workload("/c"), workload("/c/d")), (1, 2, 0));
}

#[test]
fn users_and_cgroups_do_not_multiply() {
    let entry = |number: u32, selector: &str| {
        format!("[[workload]]\nid = \"spiffe://td/w{number}\"\nselectors = [\"{selector}\"]\n")
    };
    let of_users = (0..5000).map(|number| entry(number, &format!("unix:uid:{}", 1000 + number)));
    let of_cgroups = (5000..10_000).map(|number| entry(number, &format!("cgroup:/c{number}")));
    let policy = policy(&of_users.chain(of_cgroups).collect::<String>());
    assert_eq!(policy.candidates(&[]).len(), 5000);
    assert_eq!(policy.kernel().unseen, [(None, None)]);
    for number in 5000..10_000 {
        assert_eq!(policy.candidates(&policy.cgroup_set(&format!("/c{number}"))).len(), 1);
    }
}

#[test]
fn a_long_file_is_read_in_parts_and_means_the_same() {
    let rule = |number: usize| format!("[[allow]]\nfrom = \"spiffe://td/a\"\nto = \"spiffe://td/s/{number}\"\n");
    let rules: String = (0..20_000).map(rule).collect();
    let whole = policy(&rules);
    assert_eq!(whole.allows.len(), 20_000);
    assert_eq!(&*whole.rule(20_000).unwrap().name, "p.toml:59999");
    // A line inside of a string looks like the beginning of a statement, wherever the file is cut.
    let odd: String = (0..4000).map(|number| format!("{}name = \"\"\"\\\n[[x{number}\"\"\"\n", rule(number))).collect();
    let refused = refusal(&odd);
    assert_eq!(refused.lines().count(), 4000);
    assert!(refused.starts_with("p.toml:5: the name `[[x0` is not a word;"), "{}", &refused[..200]);
    let broken = refusal(&format!("{rules}[[allow]]\nfrom = \n{rules}"));
    assert!(broken.starts_with("p.toml:60003: not valid TOML:"), "{broken}");
}

#[test]
fn there_is_a_row_for_each_rule_and_destination_and_none_for_pairs() {
    let mut text = String::new();
    for number in 0..300 {
        text += &format!("[[workload]]\nid = \"spiffe://td/w/{number}\"\nselectors = [\"unix:uid:{}\"]\n", number + 1);
    }
    for number in 0..3000 {
        let (high, low) = (number / 250, number % 250 + 1);
        text += &format!("[[destination]]\naddress = \"10.1.{high}.{low}:*\"\nid = \"spiffe://td/s/{number}\"\n");
    }
    text += "[[allow]]\nfrom = { pattern = \"spiffe://td/w/*\" }\nto = { pattern = \"spiffe://td/s/*\" }\nports = [80, 443]\n\
             [[allow]]\nfrom = \"spiffe://td/w/7\"\nto = { pattern = \"spiffe://td/**\" }\n\
             [[allow]]\nfrom = { pattern = \"spiffe://td/**\" }\nto = \"spiffe://td/s/9\"\n";
    let policy = policy(&text);
    assert_eq!(policy.kernel().destinations.len(), 3000);
    assert_eq!(policy.kernel().verdicts.len(), 4);
    assert_eq!(outbound(&policy, "w/9", "10.1.1.9:443"), "mesh spiffe://td/s/258 by p.toml:9902");
}

#[test]
fn numbers_of_ids_and_patterns_do_not_depend_on_what_else_a_policy_says() {
    let one = policy(&format!("{ENTRIES}{MESH}"));
    let other = policy(&format!(
        "[[workload]]\nid = \"spiffe://td/first\"\nselectors = [\"unix:uid:4\"]\n{MESH}\n[[allow]]\n\
         from = \"spiffe://td/first\"\nto = \"spiffe://td/web\"\n{ENTRIES}"
    ));
    let rows = |policy: &Policy| -> Vec<_> {
        let mut rows: Vec<_> =
            policy.kernel().verdicts.iter().map(|row| (row.source, row.target, row.port, row.action)).collect();
        rows.sort_unstable();
        rows
    };
    let (one, other) = (rows(&one), rows(&other));
    assert_eq!(other.len(), one.len() + 1);
    assert!(one.iter().all(|row| other.contains(row)));
}

#[test]
fn a_policy_that_would_not_fit_into_the_kernel_maps_is_refused() {
    let mut text = String::from("[[destination]]\naddress = \"10.0.0.1:*\"\nid = \"spiffe://td/w\"\n");
    let ports: Vec<String> = (1..=1000).map(|port: u32| port.to_string()).collect();
    for number in 1..=263 {
        text += &format!(
            "[[workload]]\nid = \"spiffe://td/w{number}\"\nselectors = [\"unix:uid:{number}\"]\n\
             [[allow]]\nfrom = \"spiffe://td/w{number}\"\nto = \"spiffe://td/w\"\nports = [{}]\n",
            ports.join(", ")
        );
    }
    assert_eq!(
        refusal(&text),
        "policies: the rules make more than 262144 rows of verdicts for the kernel; \
         write fewer workloads, destinations or ports on this host, or wider networks"
    );
}
