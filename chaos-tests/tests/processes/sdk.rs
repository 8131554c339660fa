//! Unmodified clients, through the balancer, with warnings as errors.

use std::process::Stdio;
use std::time::Duration;

use chaos_tests::fleet::{Fleet, MODEL};
use chaos_tests::programs::has;

/// How long a script may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a script; it must end well and have nothing to say on standard error.
async fn run(program: &str, args: &[&str]) {
    let output =
        tokio::process::Command::new(program).args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(LIMIT, output).await.expect("the script ends").expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    assert_eq!(err, "", "warnings of {program}");
    print!("{out}");
}

fn script(name: &str) -> String {
    format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_sdk_works_through_the_balancer() {
    if !has("python3", &["-c", "import openai"], "pip install openai") {
        return;
    }
    // One engine, so that what it is told to answer is what is answered.
    let fleet = Fleet::of(3).engines(1).start().await;
    let (base, engine) =
        (format!("http://{}/v1", fleet.balancer), format!("http://{}", fleet.engines[0].address));
    run("python3", &["-W", "error", &script("python/sdk.py"), &base, MODEL, &engine]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_sdk_for_javascript_works_through_the_balancer() {
    if !has("node", &["-e", "require('openai')"], "npm install openai, and set NODE_PATH to its node_modules")
    {
        return;
    }
    let fleet = Fleet::of(3).engines(2).start().await;
    let base = format!("http://{}/v1", fleet.balancer);
    run("node", &["--throw-deprecation", &script("node/sdk.mjs"), &base, MODEL]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn responses_and_messages_work_through_the_balancer() {
    if !has("python3", &["-c", "import openai, anthropic"], "pip install openai anthropic") {
        return;
    }
    let fleet = Fleet::of(3).engines(2).start().await;
    let base = format!("http://{}/v1", fleet.balancer);
    run("python3", &["-W", "error", &script("python/sdk_responses.py"), &base, MODEL]).await;
}
