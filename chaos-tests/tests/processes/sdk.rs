//! Unmodified clients.

use chaos_tests::fleet::{Fleet, MODEL};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_openai_sdk_works_through_the_balancer() {
    let has_sdk = std::process::Command::new("python3").args(["-c", "import openai"]).output();
    if !has_sdk.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: python3 -c 'import openai' fails; pip install openai");
        return;
    }
    let fleet = Fleet::of(3).engines(4).start().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python/sdk.py");
    let output = tokio::process::Command::new("python3")
        .args([script, &format!("http://{}/v1", fleet.balancer), MODEL])
        .kill_on_drop(true)
        .output()
        .await
        .expect("python3 starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    print!("{}", text(&output.stdout));
}
