//! Nodes and clients that say nothing for too long, or too much.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::nodes::{Script, Step, node};
use super::{config, detail_of, pair, start};
use crate::http::Metrics;
use crate::http::tests::support::{
    MemoryCluster, Running, eventually, exchange, post, read_message, start_with, status, worker,
};

const HEAD: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

fn ms(at: u64) -> Duration {
    Duration::from_millis(at)
}

fn send(at: u64, bytes: &str) -> (Duration, Step) {
    (ms(at), Step::Send(bytes.as_bytes().to_vec()))
}

fn chunk(at: u64, piece: &str) -> (Duration, Step) {
    send(at, &format!("{:x}\r\n{piece}\r\n", piece.len()))
}

/// Says nothing more, and looks how long that is waited for.
fn hangs(at: u64) -> (Duration, Step) {
    (ms(at), Step::Look(ms(4000)))
}

fn generate() -> String {
    post("/generate", r#"{"prompt":"hi"}"#)
}

fn impatient() -> Running {
    let mut config = config(false);
    config.proxy.first_byte_timeout = ms(150);
    config.proxy.idle_timeout = ms(250);
    start_with(config, MemoryCluster::new(), Metrics::default())
}

#[tokio::test]
async fn a_leg_that_says_nothing_is_given_up_in_time_and_the_other_one_with_it() {
    let good = || vec![send(0, HEAD), hangs(0)];
    let cases: [(Script, Script, &str); 3] = [
        (vec![hangs(0)], good(), "prefill group"),
        (good(), vec![hangs(0)], "decode group"),
        (good(), good(), "nothing came for 250 ms"),
    ];
    for (prefill, decode, why) in cases {
        let front = impatient();
        let ((prefill, prefill_seen), (decode, decode_seen)) =
            (node(vec![prefill]).await, node(vec![decode]).await);
        pair(&front, prefill, decode).await;
        let response = exchange(front.address, generate()).await;
        assert_eq!(status(&response), 502, "{response}");
        assert!(detail_of(&response).contains(why), "{why}: {response}");
        for seen in [&prefill_seen, &decode_seen] {
            eventually("the leg is closed", || seen.lock().closed == [true]).await;
        }
    }
    // Behind some output it is told.
    let front = impatient();
    let decode = vec![send(0, HEAD), chunk(0, "ab\0"), hangs(0)];
    let ((prefill, _), (decode, seen)) = (node(vec![good()]).await, node(vec![decode]).await);
    pair(&front, prefill, decode).await;
    let response = exchange(front.address, generate()).await;
    assert!(response.contains("{\"detail\":\"nothing came for 250 ms\"}\0"), "{response}");
    eventually("the leg is closed", || seen.lock().closed == [true]).await;
}

#[tokio::test]
async fn a_prefill_leg_that_goes_on_is_read_to_its_end_and_holds_nobody_up() {
    let front = start(false);
    let prefill = vec![
        send(0, HEAD),
        chunk(0, "a\0"),
        chunk(400, "late\0"),
        (ms(450), Step::Look(Duration::ZERO)),
        send(450, "0\r\n\r\n"),
        (ms(460), Step::Close),
    ];
    let decode = vec![send(0, HEAD), chunk(40, "ab\0"), send(60, "0\r\n\r\n"), (ms(60), Step::Close)];
    let ((prefill, seen), (decode, _)) = (node(vec![prefill]).await, node(vec![decode]).await);
    pair(&front, prefill, decode).await;
    let began = Instant::now();
    let response = exchange(front.address, generate()).await;
    let took = began.elapsed();
    assert!(response.contains("[DONE]\0") && !response.contains("late"), "{response}");
    assert!(took < ms(350), "{took:?}: the reference waits for the prefill leg");
    eventually("the node has looked", || !seen.lock().closed.is_empty()).await;
    assert_eq!(seen.lock().closed, [false], "it could say all it had to");
}

#[tokio::test]
async fn a_node_is_read_no_faster_than_its_client_reads() {
    let front = start(false);
    let written = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&written);
    let decode = worker(move |mut stream: TcpStream| {
        let counted = Arc::clone(&counted);
        async move {
            let Some(_) = read_message(&mut stream).await else { return };
            let _ = stream.write_all(HEAD.as_bytes()).await;
            let piece = format!("{:x}\r\n{}\0\r\n", (1 << 20) + 1, "x".repeat(1 << 20));
            while counted.load(Ordering::Relaxed) < 256 << 20 {
                if stream.write_all(piece.as_bytes()).await.is_err() {
                    return;
                }
                counted.fetch_add(piece.len(), Ordering::Relaxed);
            }
        }
    })
    .await;
    let (prefill, _) = node(vec![vec![send(0, HEAD), hangs(0)]]).await;
    pair(&front, prefill, decode).await;
    let mut client = TcpStream::connect(front.address).await.unwrap();
    client.write_all(generate().as_bytes()).await.unwrap();
    client.read_u8().await.unwrap();
    let mut before = usize::MAX;
    while written.load(Ordering::Relaxed) != before {
        before = written.load(Ordering::Relaxed);
        tokio::time::sleep(ms(300)).await;
    }
    // What fits into the buffers of four sockets.
    assert!(before < 64 << 20, "{} MiB wait for a client that reads nothing", before >> 20);
}
