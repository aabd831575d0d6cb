//! Real programs, unmodified.

use lab::policy::PORT;
use lab::{Host, Lab, Policy, Program, clock, lab, or_skip, skip};

/// Starts nginx with one page that is the marker; requests are logged with the client's address.
pub fn nginx(lab: &Lab, host: &Host, cgroup: &str) -> Program {
    let directory = lab.directory().display();
    let marker = lab.marker();
    let config = lab.file(
        "nginx.conf",
        format!(
            "daemon off;\nmaster_process on;\nworker_processes 1;\nuser root;\npid {directory}/nginx.pid;\n\
             error_log stderr;\nevents {{ worker_connections 512; }}\nhttp {{\n\
             log_format who '$remote_addr $server_addr $status';\naccess_log {directory}/access.log who;\n\
             client_body_temp_path {directory}/body;\nproxy_temp_path {directory}/proxy;\n\
             fastcgi_temp_path {directory}/fastcgi;\nuwsgi_temp_path {directory}/uwsgi;\n\
             scgi_temp_path {directory}/scgi;\n\
             server {{ listen {PORT}; listen [::]:{PORT}; location / {{ return 200 '{marker}\\n'; }} }} }}\n"
        ),
    );
    let config = config.display().to_string();
    let program = lab.run(host, cgroup, &["nginx", "-c", &config]);
    wait_for_listener(host, &program);
    program
}

/// Waits until something listens on the port, without connecting to it.
fn wait_for_listener(host: &Host, program: &Program) {
    let port = format!(":{PORT:04X} ");
    let there = clock::until(clock::seconds(20), || {
        let tables =
            host.within(|| ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].map(std::fs::read_to_string));
        let listening = |line: &str| {
            let mut words = line.split_whitespace();
            words.nth(1).is_some_and(|local| format!("{local} ").ends_with(&port)) && words.nth(1) == Some("0A")
        };
        tables.iter().flatten().any(|table| table.lines().any(listening)).then_some(())
    });
    assert!(there.is_some(), "nobody listens: {}", program.stderr());
}

#[test]
fn curl_gets_a_page_from_nginx() {
    let lab = lab!();
    or_skip!(skip::need("nginx"));
    or_skip!(skip::need("curl"));
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let _nginx = nginx(&lab, &lab.beta, "server");
    for to in [lab.beta.at(PORT), lab.beta.at6(PORT)] {
        let url = format!("http://{to}/");
        let page = lab.run(&lab.alpha, "client", &["curl", "-sS", "--max-time", "20", &url]).outcome().good();
        assert_eq!(page.trim(), lab.marker());
    }
    let (alpha, beta) = (&lab.alpha, &lab.beta);
    let log = clock::until(clock::seconds(5), || {
        let log = std::fs::read_to_string(lab.directory().join("access.log")).unwrap_or_default();
        (log.lines().count() == 2).then_some(log)
    });
    let want = format!("{} {} 200\n{} {} 200\n", alpha.v4, beta.v4, alpha.v6, beta.v6);
    assert_eq!(log.unwrap_or_default(), want, "nginx has to see the true addresses");
    mesh.expect_allowed(PORT, 2);
    lab.expect_tls(PORT);
}

#[test]
fn redis_cli_stores_and_gets_from_a_redis_server() {
    let lab = lab!();
    or_skip!(skip::need("redis-server"));
    or_skip!(skip::need("redis-cli"));
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let (directory, address, port) = (lab.directory().display().to_string(), lab.beta.v4.to_string(), PORT.to_string());
    let words = ["redis-server", "--port", &port, "--bind", &address, "--save", "", "--dir", &directory];
    let words = [&words[..], &["--protected-mode", "no", "--daemonize", "no"]].concat();
    let mut server = lab.run(&lab.beta, "server", &words);
    server.line(clock::seconds(30), |line| line.contains("Ready to accept connections")).unwrap();
    let client = |words: &[&str]| {
        let words = [&["redis-cli", "-h", &address, "-p", &port][..], words].concat();
        lab.run(&lab.alpha, "client", &words).outcome().good()
    };
    assert_eq!(client(&["set", "key", lab.marker()]).trim(), "OK");
    assert_eq!(client(&["get", "key"]).trim(), lab.marker());
    let list = client(&["client", "list"]);
    assert!(list.contains(&format!("addr={}:", lab.alpha.v4)), "redis has to see the true client: {list}");
    mesh.expect_allowed(PORT, 3);
    lab.expect_tls(PORT);
}

#[test]
fn a_server_that_speaks_first_is_heard() {
    let lab = lab!();
    let mesh = or_skip!(lab.mesh(&Policy::standard(&lab)));
    let greeting = format!("send:220 {} at your service\\r\\n", lab.marker());
    let _server = lab.serve_script(&lab.beta, "server", &[&greeting, "line", "send:221 bye\\r\\n", "close"]);
    let client = lab.talk(&lab.alpha, "client", lab.beta.at(PORT), &[], &["line", "send:QUIT\\r\\n", "line", "to-end"]);
    let said = lab::world::events(&client.outcome().good());
    assert_eq!(said[1]["text"], format!("220 {} at your service", lab.marker()));
    assert_eq!(said[3]["text"], "221 bye");
    assert_eq!(said[4]["bytes"], 0);
    mesh.expect_allowed(PORT, 1);
    lab.expect_tls(PORT);
}
