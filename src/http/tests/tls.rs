//! The client listener over TLS: both HTTP versions, handshakes that take too long, plain text,
//! old versions, and a certificate that changes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::support::*;
use crate::http::{Front, FrontConfig, Metrics, ProcessGauges, bind, serve_admin};
use crate::tls::listener::ListenerTls;
use crate::tls::reload::Look;
use crate::tls::testing::{Certs, client, connect, shown};

const HANDSHAKE: Duration = Duration::from_secs(5);
const SHORT: Duration = Duration::from_millis(300);

fn tls(certs: &Certs, handshake: Duration) -> Arc<ListenerTls> {
    Arc::new(ListenerTls::open("http", &certs.server("r1"), handshake).unwrap())
}

fn with_tls(tls: &Arc<ListenerTls>) -> FrontConfig {
    FrontConfig { client_tls: Some(Arc::clone(tls)), ..FrontConfig::default() }
}

/// Reads until the connection ends, in whatever way.
async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    let reading = async {
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            all.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reading).await.expect("the connection stayed open");
    all
}

#[tokio::test]
async fn both_http_versions_are_served_and_the_certificate_is_the_configured_one() {
    let certs = Certs::new("prod");
    let front = start(with_tls(&tls(&certs, HANDSHAKE)));
    front.cluster.add("w", answering(ok("application/json", r#"{"said":"hi"}"#)).await);

    for versions in [&[&rustls::version::TLS12][..], &[&rustls::version::TLS13][..]] {
        let mut stream = {
            let roots = crate::tls::files::roots(&certs.ca_file(), &std::fs::read(certs.ca_file()).unwrap());
            let config = rustls::ClientConfig::builder_with_provider(crate::tls::provider())
                .with_protocol_versions(versions)
                .unwrap()
                .with_root_certificates(roots.unwrap())
                .with_no_client_auth();
            connect(config, front.address).await.unwrap()
        };
        stream.write_all(chat().as_bytes()).await.unwrap();
        let answer = String::from_utf8(rest(&mut stream).await).unwrap();
        assert_eq!(status(&answer), 200, "{answer}");
        assert!(answer.ends_with(r#"{"said":"hi"}"#), "{answer}");
    }

    let stream = connect(client(&certs.ca_file(), None, &["h2", "http/1.1"]), front.address).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut h2, driver) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(driver);
    let request = http::Request::post(format!("https://{}/v1/chat/completions", front.address))
        .body(Full::new(Bytes::from(r#"{"model":"m","messages":[]}"#)))
        .unwrap();
    let answer = h2.send_request(request).await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.version()), (200, http::Version::HTTP_2));
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), r#"{"said":"hi"}"#);

    let elsewhere = Certs::new("prod");
    let untrusting = connect(client(&elsewhere.ca_file(), None, &[]), front.address).await;
    assert!(untrusting.is_err(), "a client that trusts another authority");
}

#[tokio::test]
async fn plain_text_and_old_versions_are_refused() {
    let certs = Certs::new("prod");
    let front = start(with_tls(&tls(&certs, HANDSHAKE)));
    front.cluster.add("w", answering(ok("application/json", "{}")).await);
    let mut stream = TcpStream::connect(front.address).await.unwrap();
    stream.write_all(chat().as_bytes()).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(!answer.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&answer));

    // The same ClientHello as of TLS 1.2 and of 1.1, written by hand because our own TLS cannot
    // say it.
    for (minor, expected) in [(3, 0x16), (2, 0x15)] {
        let extensions = [
            &[0x00, 0x0a, 0, 6, 0, 4, 0x00, 0x1d, 0x00, 0x17][..], // x25519, P-256
            &[0x00, 0x0b, 0, 2, 1, 0][..],                         // uncompressed points
            &[0x00, 0x0d, 0, 4, 0, 2, 0x04, 0x03][..],             // ECDSA with SHA-256
        ]
        .concat();
        let mut hello = vec![3, minor];
        hello.extend([7; 32]);
        // No session; ECDHE-ECDSA with AES-128-GCM, and an older suite of 1.1; no compression.
        hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x09, 1, 0, 0, extensions.len() as u8]);
        hello.extend(extensions);
        let length = hello.len() as u8;
        let mut record = vec![0x16, 3, 1, 0, length + 4, 1, 0, 0, length];
        record.extend(hello);
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(&record).await.unwrap();
        let mut first = [0; 7];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(first[0], expected, "a ServerHello for 1.2, an alert for 1.1: {first:?}");
    }
}

#[tokio::test]
async fn a_handshake_has_its_time_which_is_taken_from_that_of_the_first_byte() {
    let certs = Certs::new("prod");
    // A handshake that never comes, or stops half-way.
    for (handshake, first_byte) in [(SHORT, HANDSHAKE), (HANDSHAKE, SHORT)] {
        let mut config = with_tls(&tls(&certs, handshake));
        config.accept.timeouts.first_byte = first_byte;
        let front = start(config);
        for bytes in [&[][..], &[0x16, 3, 1][..]] {
            let since = Instant::now();
            let mut stream = TcpStream::connect(front.address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            rest(&mut stream).await;
            let open = since.elapsed();
            assert!(open >= SHORT && open < HANDSHAKE, "{open:?}");
        }
    }
    // A handshake that begins late leaves less time for the request.
    let mut config = with_tls(&tls(&certs, HANDSHAKE));
    config.accept.timeouts.first_byte = SHORT * 4;
    let front = start(config);
    let since = Instant::now();
    let stream = TcpStream::connect(front.address).await.unwrap();
    tokio::time::sleep(SHORT * 2).await;
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client(&certs.ca_file(), None, &[])));
    let name = rustls::pki_types::ServerName::IpAddress(front.address.ip().into());
    let mut stream = connector.connect(name, stream).await.unwrap();
    rest(&mut stream).await;
    let open = since.elapsed();
    assert!(open >= SHORT * 4 && open < SHORT * 6, "{open:?}");
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_although_tls_holds_the_rest() {
    let certs = Certs::new("prod");
    let mut config = with_tls(&tls(&certs, HANDSHAKE));
    config.accept.timeouts.write_stall = SHORT;
    let front = start(config);
    // A body that never ends, of which the engine says in the end that nobody wants it.
    let (gone, mut was_gone) = tokio::sync::mpsc::channel(1);
    let engine = worker(move |mut stream| {
        let gone = gone.clone();
        async move {
            read_message(&mut stream).await;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n";
            let _ = stream.write_all(head.as_bytes()).await;
            while stream.write_all(&[b'x'; 4096]).await.is_ok() {}
            let _ = gone.send(()).await;
        }
    })
    .await;
    front.cluster.add("w", engine);
    let mut stream = connect(client(&certs.ca_file(), None, &[]), front.address).await.unwrap();
    stream.write_all(chat().as_bytes()).await.unwrap();
    let cut = tokio::time::timeout(Duration::from_secs(20), was_gone.recv()).await;
    assert!(cut.is_ok(), "the engine is not told");
    drop(stream);
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections_and_requests_in_flight_go_on() {
    let certs = Certs::new("prod");
    let tls = tls(&certs, HANDSHAKE);
    let front = start(with_tls(&tls));
    let (go_on, waiting) = tokio::sync::watch::channel(false);
    let engine = worker(move |mut stream| {
        let mut waiting = waiting.clone();
        async move {
            read_message(&mut stream).await;
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 8\r\n\r\nfirs";
            stream.write_all(head.as_bytes()).await.unwrap();
            waiting.wait_for(|go| *go).await.unwrap();
            stream.write_all(b"tsec").await.unwrap();
        }
    })
    .await;
    front.cluster.add("w", engine);
    let config = || client(&certs.ca_file(), None, &[]);
    let mut stream = connect(config(), front.address).await.unwrap();
    let old = shown(&stream);
    stream.write_all(chat().as_bytes()).await.unwrap();
    let mut begun = Vec::new();
    while !begun.ends_with(b"firs") {
        begun.push(stream.read_u8().await.unwrap());
    }

    certs.server("r1");
    assert_eq!(tls.look(), Look::Replaced);
    let new = shown(&connect(config(), front.address).await.unwrap());
    assert_ne!(new, old);
    go_on.send(true).unwrap();
    assert!(rest(&mut stream).await.ends_with(b"tsec"), "the one that was there goes on");

    std::fs::write(certs.folder.path().join("r1.crt"), "nonsense").unwrap();
    assert_eq!(tls.look(), Look::Unfinished);
    assert!(matches!(tls.look(), Look::Refused(_)));
    assert_eq!(shown(&connect(config(), front.address).await.unwrap()), new, "the good one stays");
}

#[tokio::test]
async fn the_admin_listener_has_a_certificate_of_its_own() {
    let certs = Certs::new("prod");
    let config = FrontConfig { admin_tls: Some(tls(&certs, HANDSHAKE)), ..FrontConfig::default() };
    let admin_tls = config.admin_tls.clone().unwrap();
    let gauges = ProcessGauges::new(move || vec![("admin", admin_tls.expires())]);
    let metrics = Metrics::default().with_collector(gauges);
    let front = Front::new(config, MemoryCluster::new(), Arc::new(metrics));
    let listener = bind(loopback(), false).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let served = tokio::spawn(serve_admin(listener, front, stop.clone()));
    let mut stream = connect(client(&certs.ca_file(), None, &[]), address).await.unwrap();
    stream.write_all(request("GET", "/livez", "", "").as_bytes()).await.unwrap();
    let answer = String::from_utf8(rest(&mut stream).await).unwrap();
    assert_eq!(status(&answer), 200, "{answer}");
    let mut stream = connect(client(&certs.ca_file(), None, &[]), address).await.unwrap();
    stream.write_all(request("GET", "/metrics", "", "").as_bytes()).await.unwrap();
    let answer = String::from_utf8(rest(&mut stream).await).unwrap();
    let value = answer.split("certificate_expiry_seconds{listener=\"admin\"} ").nth(1).expect(&answer);
    let expires: u64 = value.lines().next().unwrap().parse().unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!((expires - now).abs_diff(5 * 86_400) < 600, "five days from now, as issued");
    // An idle handshake does not hold up the end.
    let _idle = TcpStream::connect(address).await.unwrap();
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(20), served).await.unwrap().unwrap().unwrap();
}
