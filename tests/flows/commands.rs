//! What an operator sees of an agent and starts with it: `status`, `connections`, `doctor`, its privileges, and `bunter run`.

use crate::lifecycle::talker;
use lab::policy::{PORT, id};
use lab::world::events;
use lab::{Policy, Program, Settings, clock, lab, or_skip, skip};
use serde_json::Value;

#[test]
fn status_and_connections_say_what_is_going_on() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let open = talker(&lab, 2);
    lab.expect_no_echo(&lab.alpha, "nobody", lab.beta.at(PORT), &[]);
    for (agent, direction) in [(mesh.alpha(), "outbound"), (mesh.beta(), "inbound")] {
        let list: Vec<Value> =
            serde_json::from_str(&agent.command(&["connections", "--json"]).unwrap().good()).unwrap();
        assert_eq!(list.len(), 1, "{list:#?}");
        assert_eq!(list[0]["direction"], direction);
        assert_eq!(list[0]["source"]["id"], id("client"));
        assert_eq!(list[0]["destination"]["id"], id("server"));
        assert_eq!(list[0]["rule"], "client-to-server");
        assert_eq!(list[0]["method"], "mtls");
        let text = agent.command(&["connections"]).unwrap().good();
        assert!(text.contains(&id("client")) && text.contains(&id("server")), "{text}");
        let text = agent.command(&["status"]).unwrap().good();
        assert!(!text.trim().is_empty());
        let status: Value = serde_json::from_str(&agent.command(&["status", "--json"]).unwrap().good()).unwrap();
        assert_eq!(status["connections"]["open"], 1);
        assert_eq!(status["agent"]["pid"].as_u64(), Some(u64::from(agent.pid())));
        let log = agent.log();
        assert!(log.contains("agent is up") && !log.contains('\u{1b}'), "colour codes in what is no terminal: {log:?}");
    }
    let status = mesh.beta().status();
    let listeners = status["listeners"].as_array().cloned().unwrap_or_default();
    assert!(listeners.iter().any(|one| one["id"] == id("server") && one["mode"] == "protected"), "{status:#}");
    let status = mesh.alpha().status();
    let refused = status["refused"].as_object().cloned().unwrap_or_default();
    assert!(refused.values().any(|one| one["count"].as_u64() > Some(0)), "{status:#}");
    assert!(status["identities"].as_array().is_some_and(|all| all.iter().any(|one| one["id"] == id("client"))));
    drop(open);
    lab.expect_tls(PORT);
}

#[test]
fn every_thread_of_a_running_agent_is_in_the_sandbox_and_keeps_few_privileges() {
    let lab = lab!();
    let policy = Policy::standard(&lab);
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    lab.expect_echo(&lab.alpha, "client", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        assert_eq!(agent.status()["agent"]["sandbox"], "on");
        let text = agent.command(&["status"]).unwrap().good();
        assert!(text.contains("sandbox    on\n"), "{text}");
        // DAC_READ_SEARCH, NET_BIND_SERVICE, NET_ADMIN, SYS_PTRACE and BPF.
        let kept = [2, 10, 12, 19, 39].iter().fold(0_u64, |kept, bit| kept | 1 << bit);
        let expected = [
            "Seccomp:\t2".to_owned(),
            "NoNewPrivs:\t1".to_owned(),
            "CapInh:\t0000000000000000".to_owned(),
            "CapAmb:\t0000000000000000".to_owned(),
            format!("CapEff:\t{kept:016x}"),
            format!("CapPrm:\t{kept:016x}"),
            format!("CapBnd:\t{kept:016x}"),
        ];
        let threads = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap();
        let threads: Vec<String> =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap()).collect();
        // Control, audit and at least one shard.
        assert!(threads.len() >= 3, "{threads:?}");
        for thread in threads {
            for line in &expected {
                assert!(thread.lines().any(|one| one == line), "no {line:?} in:\n{thread}");
            }
        }
    }
    // What comes after the start: a policy to load, a listener to attest, a program to refuse.
    let other = policy.clone().workload("third").allow("third-to-server", "third", "server");
    for agent in [mesh.alpha(), mesh.beta()] {
        agent.reload(&other);
    }
    let _late = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT + 1)]);
    lab.stranger.within(|| lab::stranger::raw(lab.beta.at(PORT + 1), b"hello")).expect_refused();
    lab.expect_echo(&lab.alpha, "third", lab.beta.at(PORT), &[]);
    for agent in [mesh.alpha(), mesh.beta()] {
        let log = agent.log();
        assert!(!log.contains("not permitted"), "the agent was refused something that it needs:\n{log}");
    }
    lab.expect_tls(PORT);
}

#[test]
fn doctor_tells_what_this_host_can_do() {
    let lab = lab!();
    let mesh = or_skip!(lab.only_mesh(&Policy::standard(&lab)));
    let doctor = |words: &[&str]| {
        let mut command = lab.command(&lab.alpha, "admin", skip::bunter().unwrap_or_else(|skip| panic!("{}", skip.0)));
        command.arg("doctor").args(words);
        Program::start(command, "bunter doctor").unwrap().outcome().good()
    };
    assert!(!doctor(&[]).trim().is_empty());
    let report = doctor(&["--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).unwrap_or_else(|error| panic!("{error}: {report}"));
    assert!(report.is_object(), "{report}");
    assert_eq!(report["sandbox"], mesh.alpha().status()["agent"]["sandbox"], "{report:#}");
    assert!(report["host"].as_array().is_some_and(|items| items.len() == 6), "{report:#}");
    assert!(report["host"].as_array().unwrap().iter().all(|item| item["ok"] == true), "{report:#}");
    // Both count the same tables.
    let names = |tables: &Value| -> Vec<String> {
        let tables = tables.as_array().unwrap_or_else(|| panic!("{tables}"));
        assert!(tables.iter().all(|table| table["used"].as_u64() <= table["size"].as_u64()), "{tables:?}");
        tables.iter().map(|table| table["name"].to_string()).collect()
    };
    assert!(names(&report["tables"]).len() > 5, "{report:#}");
    assert_eq!(names(&report["tables"]), names(&mesh.alpha().status()["tables"]));
    // What it would choose is what a running agent has chosen.
    if Settings::default().engine == "auto" {
        assert_eq!(report["auto"], mesh.alpha().status()["agent"]["engine"], "{report:#}");
    }
}

#[test]
fn bunter_run_gives_a_program_a_cgroup_that_policy_can_name() {
    let lab = lab!();
    let name = format!("lab-{}", lab.test().len() + std::process::id() as usize);
    let policy = Policy::empty(&lab)
        .workload_by("client", &[&format!("cgroup:/bunter/{name}")])
        .workload("server")
        .serve(&lab, PORT)
        .allow("client-to-server", "client", "server");
    let mesh = or_skip!(lab.only_mesh(&policy));
    let _server = lab.serve_echo(&lab.beta, "server", &[lab.beta.at(PORT)]);
    let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
    let mut command = lab.command_in(place, or_skip!(skip::bunter()));
    command.args(["run", "--name", &name, "--"]).arg(or_skip!(skip::lab_app()));
    command.args(["talk", "--to", &lab.beta.at(PORT).to_string(), &format!("send:{}\\n", lab.marker()), "line"]);
    command.args(["half-close", "to-end"]);
    let outcome = Program::start(command, "bunter run").unwrap().outcome();
    let said = events(&outcome.stdout);
    assert!(outcome.status.success(), "{outcome:#?}");
    assert!(said.iter().any(|event| event["text"] == lab.marker()), "{outcome:#?}");
    mesh.expect_allowed(PORT, 1);
    let cgroup = lab::world::cgroup2().unwrap().join("bunter").join(&name);
    // The program was the last process of its own; what it leaves is swept by the next one, or by `release`.
    assert!(cgroup.exists());
    mesh.alpha().terminate().unwrap();
    mesh.alpha().command(&["release"]).unwrap().good();
    assert!(!cgroup.exists(), "an empty cgroup stays behind");
    // The one above it goes as well, unless a program of another test is in there.
    let above = cgroup.parent().unwrap();
    let gone = clock::until(clock::seconds(5), || match std::fs::read_dir(above) {
        Ok(entries) => entries.flatten().any(|entry| entry.path().is_dir()).then_some(()),
        Err(error) => (error.kind() == std::io::ErrorKind::NotFound).then_some(()),
    });
    assert!(gone.is_some(), "{} stays behind", above.display());
    lab.expect_tls(PORT);
}

#[test]
fn bunter_run_gives_the_exit_code_of_the_program() {
    let lab = lab!();
    if skip::plain() {
        return lab::Skip::because("LAB_PLAIN=1 leaves the agent out").announce(lab.test());
    }
    for (script, code) in [("exit 0", Some(0)), ("exit 7", Some(7))] {
        let place = lab::enter::Place { netns: Some(lab.alpha.netns.clone()), ..Default::default() };
        let mut command = lab.command_in(place, or_skip!(skip::bunter()));
        command.args(["run", "--", "sh", "-c", script]);
        let outcome = Program::start(command, "bunter run").unwrap().outcome();
        assert_eq!(outcome.status.code(), code, "{outcome:#?}");
    }
}
