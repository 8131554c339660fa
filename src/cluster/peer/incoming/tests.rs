//! Callers with real sockets: peers, and those that say nothing, too little or something else.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{sleep, timeout};

use super::super::dial::Dialer;
use super::super::proto::Request;
use super::super::proto::peer_client::PeerClient;
use super::super::server::{Host, Served, Service};
use super::super::wire::{Call, Reply};
use super::*;
use crate::codec;
use crate::tls::testing::Certs;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const WITHIN: Duration = Duration::from_secs(10);

/// Answers every call with the name of the thread that it is served by.
struct Threads;

impl Host for Threads {
    fn served(&self) -> Option<Arc<Served>> {
        None
    }

    fn call(self: Arc<Self>, _: Call) -> Pin<Box<dyn Future<Output = Reply> + Send>> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        Box::pin(async move { Reply::Refused(name) })
    }
}

/// A listener with a server at each of its doors.
struct Both {
    address: SocketAddr,
    tls: Option<(Arc<PeerTls>, Certs)>,
    stop: CancellationToken,
    runtimes: [Option<Runtime>; 2],
}

impl Both {
    fn new(secure: bool) -> Self {
        let [raft, streams] = ["raft", "streams"].map(|name| {
            Builder::new_multi_thread().worker_threads(1).thread_name(name).enable_all().build().unwrap()
        });
        let tls = secure.then(|| {
            let certs = Certs::new("prod");
            (Arc::new(PeerTls::open("r1", &certs.member("r1")).unwrap()), certs)
        });
        let stop = CancellationToken::new();
        let entered = raft.enter();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let address = listener.local_addr().unwrap();
        let own = tls.as_ref().map(|(tls, _)| Arc::clone(tls));
        let (cluster, apart) = incoming_apart(listener, own, streams.handle().clone(), stop.clone());
        drop(entered);
        for (runtime, incoming) in [(&raft, cluster), (&streams, apart)] {
            let server = server().add_service(Service::serve(Arc::new(Threads)));
            runtime.spawn(server.serve_with_incoming(incoming));
        }
        Self { address, tls, stop, runtimes: [Some(raft), Some(streams)] }
    }

    /// By whom a peer's call on a new connection is served.
    async fn served_by(&self, purpose: Purpose) -> String {
        let tls = self.tls.as_ref().map(|(_, certs)| PeerTls::open("r2", &certs.member("r2")).unwrap());
        let dialer = Dialer::new(tls.map(Arc::new));
        served_by(&dialer, self.address, purpose).await.unwrap()
    }

    /// A stranger's connection.
    async fn stranger(&self, says: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(says).await.unwrap();
        stream
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        self.stop.cancel();
        self.runtimes.iter_mut().filter_map(Option::take).for_each(Runtime::shutdown_background);
    }
}

async fn served_by(dialer: &Dialer, address: SocketAddr, purpose: Purpose) -> Result<String, String> {
    let channel = dialer.channel(&address.to_string(), None, purpose)?;
    let body = codec::encode(&Call::Hello { name: "r2".to_owned() }).into();
    let asked = PeerClient::new(channel).call(Request { kind: 0, body }).await;
    match codec::decode(&asked.map_err(|status| status.to_string())?.into_inner().body) {
        Ok(Reply::Refused(thread)) => Ok(thread),
        other => Err(format!("{other:?}")),
    }
}

/// Waits until the other end has closed; what it says before is not of interest.
async fn closed(mut stream: TcpStream) {
    let mut said = [0; 1024];
    let end = async { while stream.read(&mut said).await.is_ok_and(|read| read > 0) {} };
    timeout(WITHIN, end).await.expect("the connection is closed");
}

/// Whether an HTTP/2 server answers on it: with SETTINGS, at once.
async fn is_answered(stream: &mut TcpStream) -> bool {
    stream.write_all(&frame(4, 0, 0, &[])).await.unwrap();
    let mut head = [0; 9];
    let read = timeout(WITHIN, stream.read_exact(&mut head)).await.expect("neither served nor refused");
    read.is_ok() && head[3] == 4
}

#[tokio::test]
async fn connections_for_streams_are_served_by_the_threads_of_streams() {
    for secure in [false, true] {
        let both = Both::new(secure);
        assert_eq!(both.served_by(Purpose::Streams).await, "streams");
        assert_eq!(both.served_by(Purpose::Cluster).await, "raft");
    }
}

#[tokio::test]
async fn where_there_is_one_server_it_serves_both() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = incoming(listener, None, CancellationToken::new());
    let serving = server().add_service(Service::serve(Arc::new(Threads))).serve_with_incoming(incoming);
    let served = tokio::spawn(serving);
    for purpose in [Purpose::Cluster, Purpose::Streams] {
        served_by(&Dialer::default(), address, purpose).await.unwrap();
    }
    served.abort();
}

#[tokio::test]
async fn what_is_said_one_byte_at_a_time_is_understood() {
    let both = Both::new(false);
    for purpose in [Purpose::Cluster, Purpose::Streams] {
        let mut stream = both.stranger(&[]).await;
        stream.set_nodelay(true).unwrap();
        for byte in [purpose.preamble(), PREFACE].concat() {
            stream.write_all(&[byte]).await.unwrap();
            sleep(Duration::from_millis(5)).await;
        }
        assert!(is_answered(&mut stream).await, "{purpose:?}");
    }
}

#[tokio::test]
async fn who_says_nothing_or_too_little_or_something_else_keeps_nobody_waiting_and_is_let_go() {
    for secure in [false, true] {
        let both = Both::new(secure);
        let silent = both.stranger(&[]).await;
        // The beginning of a preamble, and that of a TLS handshake.
        let slow = both.stranger(if secure { &[22, 3, 1] } else { b"EVERLINE" }).await;
        let (read, mut write) = slow.into_split();
        let drips = tokio::spawn(async move {
            for byte in if secure { [1, 0, 1, 0, 0, 0, 3] } else { *b" STREAM" } {
                sleep(Duration::from_millis(700)).await;
                // It is let go in between.
                let _ = write.write_all(&[byte]).await;
            }
            write
        });
        let others = [&b"EVERLINE WHAT IS IT?"[..], b"GET / HTTP/1.1\r\n\r\n", &[0; 64], &[255; 64]];
        for other in others {
            let began = Instant::now();
            closed(both.stranger(other).await).await;
            assert!(began.elapsed() < HANDSHAKE_TIMEOUT, "at once: {other:?}");
        }
        let began = Instant::now();
        for purpose in [Purpose::Streams, Purpose::Cluster] {
            both.served_by(purpose).await;
        }
        assert!(began.elapsed() < HANDSHAKE_TIMEOUT, "peers were served meanwhile");
        closed(silent).await;
        let write = drips.await.unwrap();
        closed(read.reunite(write).unwrap()).await;
    }
}

#[tokio::test]
async fn streams_that_nobody_takes_up_keep_no_peer_from_consensus() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // Its threads are stuck: nothing on it is ever run.
    let stuck = Builder::new_current_thread().enable_all().build().unwrap();
    let stop = CancellationToken::new();
    let (cluster, streams) = incoming_apart(listener, None, stuck.handle().clone(), stop.clone());
    let served = server().add_service(Service::serve(Arc::new(Threads))).serve_with_incoming(cluster);
    let served = tokio::spawn(served);
    let mut waiting = Vec::new();
    for _ in 0..HANDSHAKES_PER_IP {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(Purpose::Streams.preamble()).await.unwrap();
        waiting.push(stream);
    }
    let mut more = TcpStream::connect(address).await.unwrap();
    more.write_all(Purpose::Streams.preamble()).await.unwrap();
    // One of them is one too many, and which is not said.
    waiting.push(more);
    let ends = waiting.into_iter().map(|stream| Box::pin(closed(stream)));
    let (_, _, still_waiting) = futures_util::future::select_all(ends).await;
    served_by(&Dialer::default(), address, Purpose::Cluster).await.unwrap();
    assert_eq!(still_waiting.len(), HANDSHAKES_PER_IP);
    drop(streams);
    served.abort();
    stuck.shutdown_background();
}

#[test]
fn handshakes_are_bounded_in_all_and_by_address() {
    let going_on = Arc::new(GoingOn::default());
    let enter = |last: u8| GoingOn::enter(&going_on, IpAddr::from([10, 0, 0, last]));
    let mut held: Vec<_> = (0..HANDSHAKES_PER_IP).map(|_| enter(1).unwrap()).collect();
    assert!(enter(1).is_none(), "one address has its share");
    for last in 2.. {
        let before = held.len();
        held.extend(std::iter::from_fn(|| enter(last)));
        if held.len() == before {
            break;
        }
    }
    assert_eq!(held.len(), HANDSHAKES);
    held.clear();
    assert!(enter(1).is_some() && going_on.by_ip.lock().is_empty());
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

#[tokio::test]
async fn requests_given_up_while_a_process_was_frozen_do_not_cost_it_the_connection() {
    let [headers, reset, settings, ping] = [1, 3, 4, 6];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    // All of it is there before the server looks, as after a freeze.
    let mut sent = PREFACE.to_vec();
    sent.extend(frame(settings, 0, 0, &[]));
    // POST http://a/x/y, and CANCEL.
    let head = [&[0x83, 0x86, 0x04, 4][..], b"/x/y", &[0x01, 1, b'a']].concat();
    for stream in (1..2000).step_by(2) {
        sent.extend(frame(headers, 4, stream, &head));
        sent.extend(frame(reset, 0, stream, &8u32.to_be_bytes()));
    }
    sent.extend(frame(ping, 0, 0, b"are you?"));
    peer.write_all(&sent).await.unwrap();
    let incoming = incoming(listener, None, CancellationToken::new());
    let server = server().add_routes(tonic::service::Routes::default()).serve_with_incoming(incoming);
    let answered = async {
        loop {
            let mut head = [0; 9];
            peer.read_exact(&mut head).await.expect("the connection stays");
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            peer.read_exact(&mut payload).await.expect("the connection stays");
            if head[3] == ping && head[4] == 1 && payload == b"are you?" {
                return;
            }
        }
    };
    tokio::select! {
        ended = server => panic!("{ended:?}"),
        answered = tokio::time::timeout(Duration::from_secs(10), answered) => answered.expect("an answer"),
    }
}
