//! The client libraries' own tests, and unmodified clients through the shim, where Python and Node
//! are there for them.

use std::process::{Command, Stdio};

fn has(program: &str, code: &str, remedy: &str) -> bool {
    let option = if program == "node" { "-e" } else { "-c" };
    let has = Command::new(program).args([option, code]).output().is_ok_and(|output| output.status.success());
    if !has {
        println!("SKIPPED: {program} {option} {code:?} fails; {remedy}");
    }
    has
}

/// Runs tests in a folder of `clients`; they must pass, and must have been there.
fn run(command: &mut Command, folder: &str, count: impl Fn(&str) -> Option<u32>) {
    let folder = format!("{}/clients/{folder}", env!("CARGO_MANIFEST_DIR"));
    let output = command.current_dir(folder).stdin(Stdio::null()).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    let ran = count(&said);
    assert!(ran.is_some_and(|ran| ran > 0), "no test was found: {said}");
}

fn python(pattern: &str) -> bool {
    let libraries = "import importlib.util as u; assert any(map(u.find_spec, ('httpx', 'httpx2')))";
    if !has("python3", libraries, "pip install httpx httpx2 openai anthropic") {
        return false;
    }
    let mut command = Command::new("python3");
    command.args(["-W", "error", "-B", "-m", "unittest", "discover", "-s", "tests", "-p", pattern]);
    command.env("EVERLINE_BIN", env!("CARGO_BIN_EXE_everline"));
    run(&mut command, "python", |said| {
        let line = said.lines().find_map(|line| line.strip_prefix("Ran "))?;
        line.split(' ').next()?.parse().ok()
    });
    true
}

#[test]
fn python_cuts_bodies_into_events() {
    python("test_events.py");
}

#[test]
fn python_resumes_streams_under_httpx_and_the_sdks() {
    let _ = python("test_transport.py") && python("test_sdks.py") && python("test_cluster.py");
}

#[test]
fn unmodified_clients_resume_through_the_shim() {
    python("test_shim.py");
}

#[test]
fn javascript_resumes_streams() {
    let new_enough = "process.exit(process.versions.node.split('.')[0] >= 18 ? 0 : 1)";
    if !has("node", new_enough, "install Node 18 or later")
        || !has("python3", "import http.server", "install Python: the fake cluster is written in it")
    {
        return;
    }
    let mut command = Command::new("node");
    command.arg("--test");
    command.args(
        ["events", "fetch", "sdk", "event-source", "cluster"].map(|name| format!("test/{name}.test.js")),
    );
    run(&mut command, "js", |said| {
        let line =
            said.lines().find_map(|line| line.trim_start_matches(['#', ' ', 'ℹ']).strip_prefix("pass "))?;
        line.trim().parse().ok()
    });
}
