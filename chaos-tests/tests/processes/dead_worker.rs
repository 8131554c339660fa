//! One of two workers dies: nobody notices, and it is left alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use chaos_tests::client::Http;
use chaos_tests::fleet::{Fleet, MODEL};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

/// How long one answer may take.
const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_of_two_workers_dead_the_next_100_requests_succeed_and_it_is_left_alone() {
    let mut fleet = Fleet::of(3).engines(2).engine_arg("--instant").start().await;
    let url = format!("http://{}/v1/completions", fleet.balancer);
    let ask = async |n: usize| {
        let body = json!({"model": MODEL, "prompt": format!("number {n}"), "max_tokens": 4, "stream": n.is_multiple_of(2)});
        let reply = Http::fresh().post(&url, &body, LIMIT).await;
        let reply = reply.unwrap_or_else(|why| panic!("request {n}: {why}"));
        assert_eq!(reply.status, 200, "request {n}: {}", reply.text());
        assert!(!reply.text().contains("upstream_failed"), "request {n}: {}", reply.text());
    };
    for n in 0..30 {
        ask(n).await;
    }
    let address = fleet.engines[0].address;
    fleet.engines[0].kill9();
    let killed = Instant::now();
    for n in 0..100 {
        ask(n).await;
    }
    println!("100 requests after the death took {} ms", killed.elapsed().as_millis());
    tokio::time::sleep(Duration::from_millis(250).saturating_sub(killed.elapsed())).await;
    // Somebody else sits there now, who is ill: whoever still sends a prompt there is found out.
    let ghost = RawGhost::haunt(address).await;
    for n in 0..100 {
        ask(n).await;
    }
    assert_eq!(ghost.prompts(), 0, "prompts to a worker that was dead for 250 ms");
}

/// Takes the place of a dead worker: accepts, counts what looks like a prompt, never answers.
struct RawGhost {
    prompts: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl RawGhost {
    async fn haunt(address: std::net::SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind(address).await.expect("the port of a dead worker");
        let prompts = Arc::new(AtomicU64::new(0));
        let count = prompts.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let count = count.clone();
                tokio::spawn(async move {
                    let mut verb = [0; 4];
                    if stream.read_exact(&mut verb).await.is_ok() && &verb == b"POST" {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { prompts, task }
    }

    fn prompts(&self) -> u64 {
        self.prompts.load(Ordering::Relaxed)
    }
}

impl Drop for RawGhost {
    fn drop(&mut self) {
        self.task.abort();
    }
}
