//! API keys and admin tokens with real processes: made by command, given by file, revoked.

use std::time::Duration;

use chaos_tests::binary::{run, run_ok};
use chaos_tests::client::{Http, Reply};
use chaos_tests::endpoint::{Endpoint, LIMIT};
use chaos_tests::fleet::{Fleet, MODEL, turn};
use chaos_tests::replica::Replica;
use chaos_tests::wait::{check, until};
use everline::admin_types::KeysReply;
use serde_json::json;

/// Within which a revoked key must be refused everywhere; twice that on a machine that is busy.
const REVOKED: Duration = Duration::from_secs(2);

fn split(made: &str) -> (String, String) {
    let secret = made.lines().find(|line| line.starts_with("ev_")).expect(made).to_owned();
    let entry = made.lines().skip_while(|line| *line != "[[key]]").collect::<Vec<_>>().join("\n");
    (secret, entry + "\n")
}

async fn chat(replica: &Endpoint, secret: Option<&str>) -> Result<Reply, String> {
    let body = json!({"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]});
    let url = replica.http_url("/v1/chat/completions");
    match secret {
        Some(secret) => Http::fresh().post_as(secret, &url, &body, LIMIT).await,
        None => Http::fresh().post(&url, &body, LIMIT).await,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_given_and_revoked_by_a_file_while_replicas_run() {
    let folder = tempfile::tempdir().unwrap();
    let (path, beside) = (folder.path().join("keys.toml"), folder.path().join("keys.toml.new"));
    let replace = |text: &str| {
        std::fs::write(&beside, text).unwrap();
        std::fs::rename(&beside, &path).unwrap();
    };
    let (one, one_entry) = split(&run_ok(&["keys", "new", "one"]).await);
    let (two, two_entry) = split(&run_ok(&["keys", "new", "two", "--rps", "1000"]).await);
    replace(&one_entry);
    let fleet = Fleet::of(3).engines(1).set(&format!("http.keys_file={}", path.display())).start().await;
    for replica in &fleet.replicas {
        assert_eq!(chat(replica, None).await.unwrap().status, 401);
        assert_eq!(chat(replica, Some(&two)).await.unwrap().status, 401);
        let reply = chat(replica, Some(&one)).await.unwrap();
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
    replace(&(one_entry.clone() + &two_entry));
    for replica in &fleet.replicas {
        until("the second key is good", LIMIT, async || {
            let status = chat(replica, Some(&two)).await?.status;
            check(status == 200, || status.to_string())
        })
        .await;
    }
    // A file that is broken changes nothing; then the first key goes.
    replace("[[key");
    tokio::time::sleep(REVOKED / 2).await;
    assert_eq!(chat(&fleet.replicas[0], Some(&one)).await.unwrap().status, 200);
    let revoked = std::time::Instant::now();
    replace(&two_entry);
    for replica in &fleet.replicas {
        until("the first key is refused", REVOKED, async || {
            let status = chat(replica, Some(&one)).await?.status;
            check(status == 401, || status.to_string())
        })
        .await;
    }
    println!("refused everywhere after {} ms", revoked.elapsed().as_millis());
    let server = fleet.replicas[0].admin_url("");
    let listed = run_ok(&["keys", "list", "--json", "--server", &server]).await;
    let keys: KeysReply = serde_json::from_str(&listed).unwrap();
    assert!(keys.required && keys.keys.len() == 1 && keys.keys[0].id == "two", "{listed}");
    assert!(run_ok(&["keys", "list", "--server", &server]).await.contains("two"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_show_their_token_and_are_told_when_they_do_not() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "# operators\nroot-token\n").unwrap();
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "another\n").unwrap();
    let more = ["--admin-token-file".to_owned(), token.display().to_string()];
    let mut replica = Replica::new(Endpoint::new("r1"), folder.path(), &more);
    replica.start();
    until("it is ready", Duration::from_secs(30), async || {
        let reply = replica.ready().await?;
        check(reply.status == 200, || reply.text())
    })
    .await;
    let server = replica.admin_url("");
    for file in [None, Some(&wrong)] {
        let mut args = vec!["status", "--server", &server];
        let file = file.map(|file| file.display().to_string());
        args.extend(file.iter().flat_map(|file| ["--token-file", file]));
        let output = run(&args).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && said.contains("--token-file"), "{said}");
    }
    let file = token.display().to_string();
    assert!(run_ok(&["status", "--server", &server, "--token-file", &file]).await.contains("r1"));
    // On loopback a scraper needs none.
    let metrics = Http::fresh().get(&replica.admin_url("/metrics"), LIMIT).await.unwrap();
    assert_eq!(metrics.status, 200);
}
