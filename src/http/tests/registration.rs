//! Where a worker may be: every way we know to have a prompt sent elsewhere.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::support::*;
use crate::admin_types::{ModelEntry, RegisterRequest};
use crate::http::{Allowed, FrontConfig, Resolve, Resolved, keep_configured_workers};

/// Hosts that are no workers although every network is allowed.
const NEVER: &[&str] = &[
    // The metadata address, in every spelling that a resolver understands.
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0XA9FEA9FE",
    "025177524776",
    "0251.0376.0251.0376",
    "0xa9.0xfe.0xa9.0xfe",
    "169.254.43518",
    "169.16689662",
    "0xa9.254.0251.254",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]",
    "[::169.254.169.254]",
    "[::ffff:0:169.254.169.254]",
    "[64:ff9b::169.254.169.254]",
    "[64:ff9b:1::a9fe:a9fe]",
    "[2002:a9fe:a9fe::]",
    "[2001:0:4136:e378:8000:63bf:5601:5601]",
    "[2001:db8::5efe:169.254.169.254]",
    // Other clouds, other services.
    "169.254.170.2",
    "169.254.0.1",
    "[fd00:ec2::254]",
    "[FD00:0EC2:0::0254]",
    "100.100.100.200",
    "0x646464c8",
    "192.0.0.192",
    "168.63.129.16",
    "[fe80::a9fe:a9fe]",
    // Link-local, unspecified (which connects to this machine), broadcast, multicast.
    "[fe80::1]",
    "[febf::1]",
    "0.0.0.0",
    "0",
    "0x0",
    "00.00.00.00",
    "0.1.2.3",
    "[::]",
    "[0:0:0:0:0:0:0:0]",
    "[::ffff:0.0.0.0]",
    "255.255.255.255",
    "4294967295",
    "224.0.0.1",
    "239.255.255.250",
    "[ff02::1]",
    "[::ffff:224.0.0.1]",
    // Names, by what they resolve to.
    "metadata.google.internal",
    "METADATA.GOOGLE.INTERNAL",
    "metadata.google.internal.",
    "metadata",
    "instance-data.ec2.internal",
    "169-254-169-254.nip.example",
];

/// Hosts that are no workers where only 10.0.0.0/8 is allowed.
const OUTSIDE: &[&str] = &[
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "017700000001",
    "0177.0.0.1",
    "0x7f.1",
    "127.255.255.254",
    "localhost",
    "LOCALHOST",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[2002:7f00:1::]",
    "8.8.8.8",
    "[2001:4860:4860::8888]",
    "11.0.0.1",
    "9.255.255.255",
    "192.168.0.1",
    "172.16.0.1",
    "[fc00::1]",
];

/// Whole URLs that are no workers anywhere: not `http://host:port`, or two readers could
/// disagree about the host.
const MALFORMED: &[&str] = &[
    "",
    "10.0.0.1",
    "10.0.0.1:80",
    "//10.0.0.1:80",
    "http:10.0.0.1",
    "http:///",
    "http://",
    "http://:80",
    "ftp://10.0.0.1",
    "file:///etc/passwd",
    "gopher://10.0.0.1:80",
    "unix:///run/docker.sock",
    "javascript:alert(1)",
    "http://10.0.0.1:0",
    "http://10.0.0.1:65536",
    "http://10.0.0.1:-1",
    "http://10.0.0.1:+80",
    "http://10.0.0.1:0x50",
    "http://10.0.0.1:80:80",
    "http://10.0.0.1:",
    "http://10.0.0.1@169.254.169.254",
    "http://10.0.0.1:80@169.254.169.254:80",
    "http://169.254.169.254@10.0.0.1",
    "http://user:pass@10.0.0.1",
    "http://10.0.0.1#@169.254.169.254",
    "http://10.0.0.1?@169.254.169.254",
    "http://10.0.0.1/@169.254.169.254",
    "http://10.0.0.1\\@169.254.169.254",
    "http://10.0.0.1/v1",
    "http://10.0.0.1/../admin",
    "http://10.0.0.1 :80",
    "http://10.0.0.1\t:80",
    "http://10.0.0.1\r\nhost: evil",
    "http://10.0.0.1\n",
    "http://10.0.0.1\u{0}.evil",
    " http://10.0.0.1",
    "http://%31%36%39.254.169.254",
    "http://10.0.0.1%00.evil",
    "http://10.0.0.1%2f@evil",
    "http://[fe80::1%25eth0]",
    "http://[fe80::1%eth0]",
    "http://[::1",
    "http://::1]:80",
    "http://[::1]evil:80",
    "http://[10.0.0.1]",
    "http://[v1.fe80]",
    // Digits and dots that look like ours to somebody else.
    "http://\u{2460}\u{2466}\u{2468}.254.169.254",
    "http://\u{ff11}\u{ff16}\u{ff19}.254.169.254",
    "http://169\u{3002}254\u{3002}169\u{3002}254",
    "http://10.0.0.1\u{ff0f}evil",
    "http://\u{430}pple.example",
];

/// Names as an attacker's zone has them; what is no such name goes to the system, which knows
/// numbers in all their spellings.
#[derive(Debug)]
struct Zone {
    engine: Mutex<SocketAddr>,
}

impl Resolve for Zone {
    fn addresses(&self, host: &str, port: u16) -> Resolved {
        let name = host.to_ascii_lowercase();
        let name = name.trim_end_matches('.').to_owned();
        let answer = match name.as_str() {
            "metadata.google.internal" | "metadata" => vec!["169.254.169.254"],
            "instance-data.ec2.internal" => vec!["169.254.169.254", "fd00:ec2::254"],
            "169-254-169-254.nip.example" => vec!["::ffff:169.254.169.254"],
            "engine.example" => {
                let address = SocketAddr::new(self.engine.lock().ip(), port);
                return Box::pin(std::future::ready(Ok(vec![address])));
            }
            "localhost" => vec!["127.0.0.1", "::1"],
            number if number.bytes().all(|b| b.is_ascii_hexdigit() || b":.x".contains(&b)) => {
                let number = number.to_owned();
                return Box::pin(async move {
                    Ok(tokio::net::lookup_host((number.as_str(), port)).await?.collect())
                });
            }
            _ => return Box::pin(std::future::ready(Err(io::ErrorKind::NotFound.into()))),
        };
        let all = answer.into_iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect();
        Box::pin(std::future::ready(Ok(all)))
    }
}

fn front_allowing(networks: &[&str], zone: Arc<Zone>) -> Running {
    let networks = networks.iter().map(|net| net.parse().unwrap()).collect();
    let allow = Arc::new(Allowed::new(networks).with_resolver(zone));
    start(FrontConfig { allow, ..FrontConfig::default() })
}

fn zone(engine: SocketAddr) -> Arc<Zone> {
    Arc::new(Zone { engine: Mutex::new(engine) })
}

/// Tries a URL on both planes; complains unless both say what is expected and keep nothing.
async fn complaints(front: &Running, admin: SocketAddr, url: &str, expected: (u16, &str)) -> Vec<String> {
    let wanted = json!({"url": url, "id": "x", "models": ["m"], "probe": false}).to_string();
    let mut complaints = Vec::new();
    for (plane, path) in [(front.address, "/v1/nodes"), (admin, "/v1/admin/workers")] {
        let response = exchange(plane, post(path, &wanted)).await;
        let right = status(&response) == expected.0 && code(&response) == expected.1;
        if !right || front.cluster.worker("x").is_some() {
            complaints.push(format!("{url:?} at {path}: {response}"));
            front.cluster.forget("x");
        }
    }
    complaints
}

#[tokio::test]
async fn no_spelling_of_a_forbidden_address_gets_in() {
    assert!(NEVER.len() + OUTSIDE.len() + MALFORMED.len() >= 60);
    let mut wrong = Vec::new();
    let nobody = zone(loopback());
    let everything = front_allowing(&["0.0.0.0/0", "::/0"], nobody.clone());
    let admin = admin_of(&everything);
    for host in NEVER {
        for url in [format!("http://{host}"), format!("http://{host}:80/"), format!("https://{host}")] {
            wrong.extend(complaints(&everything, admin, &url, (403, "address_forbidden")).await);
        }
    }
    let narrow = front_allowing(&["10.0.0.0/8"], nobody);
    let admin = admin_of(&narrow);
    for host in NEVER.iter().chain(OUTSIDE) {
        let url = format!("http://{host}:80");
        wrong.extend(complaints(&narrow, admin, &url, (403, "address_forbidden")).await);
    }
    for url in MALFORMED {
        wrong.extend(complaints(&narrow, admin, url, (400, "invalid_value")).await);
    }
    for long in [format!("http://{}", "1".repeat(600)), format!("http://{}", "a.".repeat(200))] {
        wrong.extend(complaints(&narrow, admin, &long, (400, "invalid_value")).await);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // The table refuses for the right reason: its pattern with an allowed address is taken.
    let good = json!({"url": "http://10.1.2.3:80/", "id": "x", "models": ["m"], "probe": false});
    assert_eq!(status(&exchange(narrow.address, post("/v1/nodes", &good.to_string())).await), 201);
}

#[tokio::test]
async fn the_configuration_cannot_name_a_forbidden_address_either() {
    let front = front_allowing(&["0.0.0.0/0"], zone(loopback()));
    let worker = |id: &str, url: &str| {
        let mut worker = RegisterRequest::new(url);
        worker.id = Some(id.to_owned());
        worker.models = vec![ModelEntry::Name("m".to_owned())];
        worker
    };
    let evil =
        ["http://169.254.169.254", "http://0.0.0.0:80", "http://metadata", "http://[::ffff:a9fe:a9fe]"];
    let mut workers: Vec<_> = evil.iter().enumerate().map(|(n, url)| worker(&format!("e{n}"), url)).collect();
    workers.push(worker("good", &format!("http://{}", refusing().await)));
    let stop = CancellationToken::new();
    let kept = tokio::spawn(keep_configured_workers(front.front.clone(), workers, stop.clone()));
    // The good one comes last and needs a probe first, so the others have been tried by then.
    eventually("the good one is in", || front.cluster.worker("good").is_some()).await;
    stop.cancel();
    kept.await.unwrap();
    for (n, url) in evil.iter().enumerate() {
        assert!(front.cluster.worker(&format!("e{n}")).is_none(), "{url}");
    }
}

/// A listener on another loopback address with the port of `engine`, and what connects to it.
async fn rogue(engine: SocketAddr) -> (SocketAddr, Arc<Mutex<u32>>) {
    let address = SocketAddr::from(([127, 0, 0, 2], engine.port()));
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let seen = Arc::new(Mutex::new(0));
    let count = seen.clone();
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            *count.lock() += 1;
        }
    });
    (address, seen)
}

#[tokio::test]
async fn a_name_that_points_elsewhere_later_gets_no_prompt() {
    let closing = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
    let engine = worker(move |mut stream| async move {
        read_message(&mut stream).await;
        let _ = stream.write_all(closing.as_bytes()).await;
    })
    .await;
    let (evil, seen) = rogue(engine).await;
    let zone = zone(engine);
    let front = front_allowing(&["127.0.0.1/32"], zone.clone());
    let url = format!("http://engine.example:{}", engine.port());
    let wanted = json!({"url": url, "id": "w", "models": ["m"]}).to_string();
    assert_eq!(status(&exchange(front.address, post("/v1/nodes", &wanted)).await), 201);
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
    *zone.engine.lock() = evil;
    for _ in 0..5 {
        let response = exchange(front.address, chat()).await;
        assert_eq!((status(&response), code(&response).as_str()), (502, "upstream_connect_failed"));
        assert!(response.contains("127.0.0.2 is outside workers.allow"), "{response}");
    }
    assert_eq!(*seen.lock(), 0, "connections to where the name points now");
    *zone.engine.lock() = engine;
    assert_eq!(status(&exchange(front.address, chat()).await), 200);
}

#[tokio::test]
async fn redirects_are_not_followed_neither_at_registration_nor_later() {
    for code_and_text in ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"] {
        let decoy = refusing().await;
        let (evil, seen) = rogue(decoy).await;
        let answer = format!(
            "HTTP/1.1 {code_and_text}\r\nlocation: http://{evil}/v1/completions\r\ncontent-length: 0\r\n\r\n"
        );
        let redirecting = answering(answer).await;
        let front = start(FrontConfig::default());
        // Asked for its health, it does not answer well.
        let wanted = json!({"url": format!("http://{redirecting}"), "id": "x", "models": ["m"]}).to_string();
        let response = exchange(front.address, post("/v1/nodes", &wanted)).await;
        assert_eq!((status(&response), code(&response).as_str()), (422, "probe_failed"), "{code_and_text}");
        assert!(front.cluster.worker("x").is_none());
        // Registered all the same, its redirect is the client's to see.
        front.cluster.add("w", redirecting);
        let response = exchange(front.address, chat()).await;
        assert_eq!(status(&response).to_string(), code_and_text[..3]);
        assert_eq!(*seen.lock(), 0, "{code_and_text}: connections to its target");
    }
}
