//! KsanaLLM's fleets on three replicas: what was recorded from the reference router, each step at another
//! replica than the last one; where requests go; and heartbeats, registrations, requests and streams
//! while replicas die.

mod deaths;
#[allow(dead_code, reason = "shared with the unit tests, which play more scripts")]
#[path = "../../../../src/http/tests/ksana/nodes.rs"]
mod nodes;
mod pairs;
#[path = "../../../../src/http/tests/ksana/played.rs"]
mod played;
mod proxied;
mod resume;
mod steps;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chaos_tests::client::Http;
use chaos_tests::endpoint::{Endpoint, LIMIT};
use chaos_tests::fleet::Fleet;
use chaos_tests::raw;
use chaos_tests::wait::{check, until};
use everline::admin_types::ksana::KsanaReply;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What was recorded.
fn golden() -> Value {
    let golden = include_str!("../../../../tests/golden/ksana/vectors.json");
    serde_json::from_str(golden).expect("the vectors")
}

/// What a node answers with.
#[derive(Clone)]
enum Answer {
    /// An empty object.
    Empty,
    /// These pieces, with so much time between them.
    Pieces(&'static str, Arc<Vec<String>>, Duration),
}

/// Numbers of requests whose prompt a node has computed.
type Computed = watch::Sender<Vec<u32>>;

/// A node that answers every request alike, and keeps their numbers.
struct Engine {
    address: SocketAddr,
    numbers: Arc<Mutex<Vec<u32>>>,
    hold: watch::Sender<bool>,
    computed: Computed,
}

impl Engine {
    /// One that has nothing to say.
    async fn start() -> Self {
        Self::answering(Answer::Empty, None).await
    }

    /// One that says these pieces, with so much time between them; to each request after the node that
    /// computes its prompt has said something, if there is one.
    async fn streaming(
        content_type: &'static str,
        pieces: Vec<String>,
        every: Duration,
        prefill: Option<&Engine>,
    ) -> Self {
        let computed = prefill.map(|prefill| prefill.computed.subscribe());
        Self::answering(Answer::Pieces(content_type, Arc::new(pieces), every), computed).await
    }

    async fn answering(answer: Answer, prefill: Option<watch::Receiver<Vec<u32>>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let numbers = Arc::new(Mutex::new(Vec::new()));
        let (hold, held) = watch::channel(false);
        let computed = Computed::default();
        let node = Node { numbers: Arc::clone(&numbers), held, answer, prefill, computed: computed.clone() };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, node.clone()));
            }
        });
        Self { address, numbers, hold, computed }
    }

    /// The numbers of the requests that came so far.
    fn numbers(&self) -> Vec<u32> {
        self.numbers.lock().expect("nobody panics with it").clone()
    }

    /// Whether requests that come get no answer, until that is taken back.
    fn hold(&self, hold: bool) {
        self.hold.send_replace(hold);
    }
}

/// What a node's connections share.
#[derive(Clone)]
struct Node {
    numbers: Arc<Mutex<Vec<u32>>>,
    held: watch::Receiver<bool>,
    answer: Answer,
    prefill: Option<watch::Receiver<Vec<u32>>>,
    computed: Computed,
}

async fn serve(mut stream: TcpStream, mut node: Node) {
    let mut request = Vec::new();
    loop {
        let mut chunk = [0; 8192];
        match stream.read(&mut chunk).await {
            Ok(count @ 1..) => request.extend_from_slice(&chunk[..count]),
            _ => return,
        }
        // The body comes with the head, or right behind it.
        if !request.ends_with(b"}") {
            continue;
        }
        let text = String::from_utf8_lossy(&request).into_owned();
        let number = raw::header(&text, "kv-comm-request-id").and_then(|id| id.parse::<u32>().ok());
        node.numbers.lock().expect("nobody panics with it").extend(number);
        request.clear();
        if node.held.wait_for(|held| !held).await.is_err() {
            return;
        }
        if let (Some(prefill), Some(number)) = (&mut node.prefill, number)
            && prefill.wait_for(|computed| computed.contains(&number)).await.is_err()
        {
            return;
        }
        if say(&mut stream, &node, number).await.is_err() {
            return;
        }
    }
}

async fn say(stream: &mut TcpStream, node: &Node, number: Option<u32>) -> std::io::Result<()> {
    let Answer::Pieces(content_type, pieces, every) = &node.answer else {
        return stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    };
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    for piece in pieces.iter() {
        stream.write_all(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes()).await?;
        node.computed.send_modify(|computed| computed.extend(number.filter(|it| !computed.contains(it))));
        tokio::time::sleep(*every).await;
    }
    stream.write_all(b"0\r\n\r\n").await
}

/// A registration of one of the nodes of a group that has a device each.
fn registration(role: &str, inference: SocketAddr, coordinator: &str, rank: u32, world: u32) -> Value {
    json!({
        "cluster_name": "", "coordinator_addr": coordinator, "group_role": role, "job_id": "1",
        "devices": [{"device_id": 0, "device_ip": "127.0.0.1", "device_type": "T"}],
        "inference_addr": inference.to_string(), "node_rank": rank, "start_time": "x", "world_size": world,
    })
}

async fn register(at: SocketAddr, registration: &Value) -> String {
    let reply = Http::fresh().post(&format!("http://{at}/RegisterNode"), registration, LIMIT).await;
    let reply = reply.expect("an answer");
    assert_eq!(reply.status, 201, "{}", reply.text());
    reply.json::<Value>().expect("json")["node_id"].as_str().expect("an id").to_owned()
}

async fn beat(at: SocketAddr, id: &str) -> Value {
    let reply = Http::fresh().post(&format!("http://{at}/Heartbeat"), &json!({ "node_id": id }), LIMIT).await;
    let reply = reply.expect("an answer");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json().expect("json")
}

/// Has a prefill node name a pair; as an engine does, again with its next heartbeat where that was not
/// decided in time.
async fn name(at: SocketAddr, id: &str, key: &str) {
    let named = json!({"node_id": id, "comm_key": key, "comm_id": format!("id of {key}")});
    let url = format!("http://{at}/RegisterCommId");
    until("the pair has its comm id", Duration::from_secs(60), async || {
        let reply = Http::fresh().post(&url, &named, LIMIT).await?;
        assert!(matches!(reply.status.as_u16(), 200 | 503), "{}", reply.text());
        check(reply.status == 200, || reply.text())
    })
    .await;
}

async fn tables(replica: &Endpoint) -> Result<KsanaReply, String> {
    Http::fresh().get(&replica.admin_url("/v1/admin/ksana"), LIMIT).await?.json()
}

/// Waits until these replicas see what is wanted.
async fn until_seen(fleet: &Fleet, replicas: &[usize], what: &str, wanted: impl Fn(&KsanaReply) -> bool) {
    for at in replicas {
        let replica = &fleet.replicas[*at];
        until(&format!("{}: {what}", replica.name), LIMIT, async || {
            let seen = tables(replica).await?;
            check(wanted(&seen), || format!("{seen:?}"))
        })
        .await;
    }
}
