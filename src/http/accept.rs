//! The accept loop: bounds on connections before anything is read, and a graceful end.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use ipnet::IpNet;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::abandon::Streams;
use super::conn::{ConnState, ConnTimeouts, GuardedIo};
use super::errors::{ApiError, Code};
use super::front::{Front, Shard};
use super::routes::Listener;
use super::service::FrontService;
use crate::relay::links::drive_links_here;
use crate::tls::listener::{ListenerTls, secure};

/// Bounds on connections of one listener.
#[derive(Clone, Debug)]
pub struct FrontOptions {
    /// Timeouts while reading heads and writing: first byte 10 s, head 10 s, idle 75 s, write
    /// stall 30 s.
    pub timeouts: ConnTimeouts,
    /// Most header fields of a request: 64.
    pub max_headers: usize,
    /// Longest request head, and the read buffer: 64 KiB.
    pub max_head_bytes: usize,
    /// Most open connections: 10,000.
    pub max_connections: usize,
    /// Most open connections from one address, or from one IPv6 network of 64 bits: 256.
    pub max_connections_per_ip: usize,
    /// Networks to which the per-address limit does not apply, such as that of a load balancer
    /// that works on layer 4: loopback.
    pub per_ip_exempt: Vec<IpNet>,
    /// Most concurrent h2 streams of a connection: 128.
    pub max_h2_streams: u32,
    /// Threads that serve connections, each with its own runtime and connections to workers; 0
    /// serves them on the runtime of the caller.
    pub threads: usize,
    /// How long a thread looks for the next event before it sleeps, where events follow each other
    /// that fast: 60 µs. Zero always sleeps.
    pub poll: Duration,
    /// How long requests in flight may take to finish at shutdown: 30 s.
    pub grace: Duration,
}

impl Default for FrontOptions {
    fn default() -> Self {
        Self {
            timeouts: ConnTimeouts {
                first_byte: Duration::from_secs(10),
                head: Duration::from_secs(10),
                idle: Duration::from_secs(75),
                write_stall: Duration::from_secs(30),
            },
            max_headers: 64,
            max_head_bytes: 64 * 1024,
            max_connections: 10_000,
            max_connections_per_ip: 256,
            per_ip_exempt: ["127.0.0.0/8", "::1/128"].iter().filter_map(|net| net.parse().ok()).collect(),
            max_h2_streams: 128,
            threads: 0,
            poll: Duration::from_micros(60),
            grace: Duration::from_secs(30),
        }
    }
}

/// Bytes of an answer that wait for a client that does not read, for each of its streams.
const H2_SEND_BUFFER: usize = 64 * 1024;

/// Bytes that the kernel takes of a connection and cannot send yet. Left to itself it takes up to 4 MiB of
/// a client that reads too slowly, which is memory that nobody counts, and events that are old when
/// they are read. What is on its way, and so the speed over long distances, is not bounded by this.
#[cfg(target_os = "linux")]
const UNSENT: u32 = 128 * 1024;

/// Pause after a failed accept (mostly: no file descriptors left), so that the loop does not
/// spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections the kernel holds before they are accepted.
const BACKLOG: i32 = 1024;

/// Binds a listener. With `reuse_port` several may share one address, one for each thread.
pub fn bind(address: SocketAddr, reuse_port: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Open connections, counted in all and by address.
#[derive(Debug, Default)]
struct Census {
    open: AtomicUsize,
    by_ip: Mutex<HashMap<IpAddr, usize>>,
}

/// A place in the census; given back when dropped.
struct Place {
    census: Arc<Census>,
    counted_ip: Option<IpAddr>,
    gauge: prometheus_client::metrics::gauge::Gauge,
}

impl Census {
    fn enter(
        self: &Arc<Self>,
        ip: IpAddr,
        options: &FrontOptions,
        gauge: &prometheus_client::metrics::gauge::Gauge,
    ) -> Option<Place> {
        let ip = ip.to_canonical();
        if self.open.fetch_add(1, Ordering::AcqRel) >= options.max_connections {
            self.open.fetch_sub(1, Ordering::AcqRel);
            return None;
        }
        gauge.inc();
        let mut place = Place { census: Arc::clone(self), counted_ip: None, gauge: gauge.clone() };
        if !options.per_ip_exempt.iter().any(|net| net.contains(&ip)) {
            let ip = household(ip);
            let mut by_ip = self.by_ip.lock();
            let open = by_ip.entry(ip).or_default();
            if *open >= options.max_connections_per_ip {
                drop(by_ip);
                return None;
            }
            *open += 1;
            place.counted_ip = Some(ip);
        }
        Some(place)
    }
}

/// What the limit by address counts as one: an IPv6 network of 64 bits, all of whose addresses
/// anybody has who has one of them.
fn household(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gauge.dec();
        self.census.open.fetch_sub(1, Ordering::AcqRel);
        let Some(ip) = self.counted_ip else { return };
        let mut by_ip = self.census.by_ip.lock();
        if let Some(open) = by_ip.get_mut(&ip) {
            *open -= 1;
            if *open == 0 {
                by_ip.remove(&ip);
            }
        }
    }
}

/// Where accepted connections are served: an I/O thread with its own runtime, its own pool of
/// connections to workers, and nothing shared but counters. The first of them accepts, and keeps what
/// comes while it has no more connections than the others.
struct Lane {
    connections: mpsc::Sender<Accepted>,
    open: Arc<AtomicUsize>,
    /// Told when the last connection is closed.
    ended: oneshot::Receiver<()>,
}

/// A connection on its way to another lane.
struct Accepted {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    held: Held,
}

/// What a connection takes up until it is closed.
struct Held {
    _place: Place,
    _on_lane: OnLane,
}

/// Counts a connection on its lane until it is closed.
struct OnLane(Arc<AtomicUsize>);

impl OnLane {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(open))
    }
}

impl Drop for OnLane {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Connections handed to a lane and not yet taken up; more are turned away.
const HANDED_OVER: usize = 1024;

/// Accepts until `shutdown`, then lets requests in flight finish for the grace time, then
/// closes what is left. Returns when the last connection is closed. With `threads` 0 everything
/// runs on the runtime of the caller.
pub(super) async fn run(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    plane: Listener,
    threads: usize,
    shutdown: CancellationToken,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    for_connections(&SockRef::from(&listener))?;
    let mut lanes = Vec::new();
    for number in 1..threads {
        let (connections, incoming) = mpsc::channel(HANDED_OVER);
        let (tell, ended) = oneshot::channel();
        lanes.push(Lane { connections, open: Arc::default(), ended });
        let (front, shutdown) = (Arc::clone(&front), shutdown.clone());
        on_thread(number, async move {
            serve_lane(Handed(incoming), front, plane, true, shutdown).await;
            let _ = tell.send(());
        })?;
    }
    let accept = async move {
        let acceptor = Acceptor {
            listener: TcpListener::from_std(listener)?,
            front: Arc::clone(&front),
            plane,
            census: Arc::default(),
            open: Arc::default(),
            lanes,
            shutdown: shutdown.clone(),
        };
        // Who accepts no more tells all before it waits: the grace time is one for all.
        for ended in serve_lane(acceptor, front, plane, threads > 0, shutdown).await {
            let _ = ended.await;
        }
        Ok(())
    };
    if threads == 0 {
        return accept.await;
    }
    let (tell, ended) = oneshot::channel();
    on_thread(0, async move {
        let _ = tell.send(accept.await);
    })?;
    ended.await.unwrap_or_else(|_| Err(io::Error::other("the thread that accepts connections has ended")))
}

/// Sets what a connection is to have, on Linux of a listener, whose connections have it too: two calls
/// less for each.
fn for_connections(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    // Where that fails, the system's own bound holds.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_notsent_lowat(UNSENT);
    Ok(())
}

/// Runs `lane` on a thread of its own.
fn on_thread(number: usize, lane: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("http-{number}")).spawn(move || {
        drive_links_here();
        runtime.block_on(async {
            // As a task: what wakes the future that a runtime was begun with goes by way of the kernel. It
            // has panicked if it gives an error, and then this thread ends.
            let _ = tokio::spawn(lane).await;
        });
        // Handlers that outlive their connection (none should) end here.
        runtime.shutdown_background();
    })?;
    Ok(())
}

/// Where a lane's connections come from.
trait Arrivals {
    /// Of what the end is to be waited for when none comes any more.
    type Rest;

    /// The next one; `None` after the last. Cancel-safe.
    fn next(&mut self) -> impl Future<Output = Option<(TcpStream, SocketAddr, Held)>> + Send;

    /// None is to come any more.
    fn rest(self) -> Self::Rest;
}

/// From the lane that accepts.
struct Handed(mpsc::Receiver<Accepted>);

impl Arrivals for Handed {
    type Rest = ();

    async fn next(&mut self) -> Option<(TcpStream, SocketAddr, Held)> {
        loop {
            let Accepted { stream, peer, held } = self.0.recv().await?;
            if let Ok(stream) = TcpStream::from_std(stream) {
                return Some((stream, peer, held));
            }
        }
    }

    fn rest(self) {}
}

/// From the listener: what this lane keeps of it. The rest is handed to others.
struct Acceptor {
    listener: TcpListener,
    front: Arc<Front>,
    plane: Listener,
    census: Arc<Census>,
    /// Connections of this lane.
    open: Arc<AtomicUsize>,
    /// The others.
    lanes: Vec<Lane>,
    shutdown: CancellationToken,
}

impl Arrivals for Acceptor {
    type Rest = Vec<oneshot::Receiver<()>>;

    async fn next(&mut self) -> Option<(TcpStream, SocketAddr, Held)> {
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return None,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let options = &self.front.config.accept;
            let Some(place) = self.census.enter(peer.ip(), options, &self.front.metrics.connections) else {
                self.turn_away(stream.into_std());
                continue;
            };
            let Some(lane) = quieter(&self.lanes, &self.open) else {
                return Some((stream, peer, Held { _place: place, _on_lane: OnLane::new(&self.open) }));
            };
            // Taken off this runtime; its lane's will drive it.
            let Ok(stream) = stream.into_std() else { continue };
            let held = Held { _place: place, _on_lane: OnLane::new(&lane.open) };
            if let Err(TrySendError::Full(accepted) | TrySendError::Closed(accepted)) =
                lane.connections.try_send(Accepted { stream, peer, held })
            {
                self.turn_away(Ok(accepted.stream));
            }
        }
    }

    fn rest(self) -> Self::Rest {
        self.lanes.into_iter().map(|lane| lane.ended).collect()
    }
}

impl Acceptor {
    fn turn_away(&self, stream: io::Result<std::net::TcpStream>) {
        self.front.metrics.reject(Code::TooManyConnections.as_str());
        if let Ok(stream) = stream {
            turn_away(stream, self.front.tls(self.plane).is_some());
        }
    }
}

/// The lane with the fewest connections, if it has fewer than this one. One whose thread has ended has
/// the fewest of all, and serves nobody.
fn quieter<'a>(others: &'a [Lane], here: &AtomicUsize) -> Option<&'a Lane> {
    let open = |lane: &&Lane| lane.open.load(Ordering::Relaxed);
    let quietest = others.iter().filter(|lane| !lane.connections.is_closed()).min_by_key(open)?;
    (open(&quietest) < here.load(Ordering::Relaxed)).then_some(quietest)
}

/// How often a lane looks after its idle connections to workers.
const SWEEP: Duration = Duration::from_secs(1);

/// Serves the connections that arrive, to the end of the last one.
async fn serve_lane<A: Arrivals>(
    mut arrivals: A,
    front: Arc<Front>,
    plane: Listener,
    own_thread: bool,
    shutdown: CancellationToken,
) -> A::Rest {
    let shard = Shard::new(front);
    let options = Arc::new(shard.front.config.accept.clone());
    let tls = shard.front.tls(plane).cloned();
    let connections = TaskTracker::new();
    let force = CancellationToken::new();
    let mut sweep = tokio::time::interval(SWEEP);
    sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let watching = Arc::clone(&shard);
    // Where the thread is shared, others are busy on it.
    let awake = own_thread.then(|| tokio::spawn(async move { watching.awake.keep().await }));
    loop {
        let arrival = tokio::select! {
            arrival = arrivals.next() => arrival,
            _ = sweep.tick() => {
                shard.pool.sweep();
                continue;
            }
        };
        let Some((stream, peer, held)) = arrival else { break };
        let service = FrontService::new(Arc::clone(&shard), plane, peer);
        let (options, shutdown, force) = (Arc::clone(&options), shutdown.clone(), force.clone());
        let tls = tls.clone();
        connections.spawn(async move {
            serve(stream, tls.as_deref(), service, &options, shutdown, force).await;
            drop(held);
        });
    }
    let rest = arrivals.rest();
    connections.close();
    if tokio::time::timeout(options.grace, connections.wait()).await.is_err() {
        force.cancel();
        connections.wait().await;
    }
    if let Some(awake) = awake {
        awake.abort();
    }
    rest
}

/// Says why before closing; a courtesy, so nothing waits for it.
fn turn_away(mut stream: std::net::TcpStream, encrypts: bool) {
    if encrypts {
        // In plain text it would only look like a broken handshake.
        return;
    }
    let error = ApiError::new(Code::TooManyConnections, "too many open connections; try again").json();
    let text = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{error}",
        error.len()
    );
    let _ = stream.write(text.as_bytes());
}

async fn serve(
    stream: TcpStream,
    tls: Option<&ListenerTls>,
    service: FrontService,
    options: &FrontOptions,
    shutdown: CancellationToken,
    force: CancellationToken,
) {
    #[cfg(not(target_os = "linux"))]
    if for_connections(&SockRef::from(&stream)).is_err() {
        return;
    }
    let accepted = Instant::now();
    let secured = tokio::select! {
        secured = secure(tls, stream, options.timeouts.first_byte) => secured,
        () = force.cancelled() => return,
    };
    let stream = match secured {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%error, "no handshake");
            return;
        }
    };
    // What the handshake took is gone from the time for the first byte.
    let first_byte = options.timeouts.first_byte.saturating_sub(accepted.elapsed());
    let state: Arc<ConnState> = Arc::clone(service.state());
    let io = TokioIo::new(GuardedIo::new(stream, state, ConnTimeouts { first_byte, ..options.timeouts }));
    let mut builder = Builder::new(Streams);
    // hyper's own head timer is the second line: it cannot tell an idle connection from a slow
    // head, which the guarded socket does.
    let backstop = options.timeouts.idle.max(options.timeouts.first_byte) + options.timeouts.head;
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(backstop)
        .max_headers(options.max_headers)
        .max_buf_size(options.max_head_bytes)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(options.max_h2_streams)
        .max_send_buf_size(H2_SEND_BUFFER)
        .max_header_list_size(options.max_head_bytes as u32)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let connection = builder.serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => Some(ended),
        () = shutdown.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = force.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::trace!(%error, "connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        let options =
            FrontOptions { max_connections_per_ip: 2, per_ip_exempt: Vec::new(), ..FrontOptions::default() };
        let (census, gauge) = (Arc::<Census>::default(), Default::default());
        let enter = |ip: &str| census.enter(ip.parse().unwrap(), &options, &gauge);
        let places = [enter("2001:db8::1"), enter("2001:db8::2")];
        assert!(places.iter().all(Option::is_some));
        assert!(enter("2001:db8::3").is_none() && enter("2001:db8::ffff:0:0:1").is_none());
        assert!(enter("2001:db8:0:1::1").is_some() && enter("192.0.2.1").is_some());
        // IPv4 in IPv6 clothing is IPv4.
        let _one = [enter("::ffff:192.0.2.1"), enter("::ffff:192.0.2.1")];
        assert!(enter("::ffff:192.0.2.1").is_none() && enter("::ffff:192.0.2.2").is_some());
        drop(places);
        assert!(enter("2001:db8::3").is_some());
    }

    #[test]
    fn connections_go_to_the_quietest_lane_that_lives() {
        let (mut lanes, mut ends) = (Vec::new(), Vec::new());
        for open in [3, 2, 2] {
            let (connections, incoming) = mpsc::channel(1);
            let (_, ended) = oneshot::channel();
            lanes.push(Lane { connections, open: Arc::new(AtomicUsize::new(open)), ended });
            ends.push(incoming);
        }
        let found = |lanes: &[Lane], here| {
            quieter(lanes, &AtomicUsize::new(here))
                .and_then(|lane| lanes.iter().position(|l| std::ptr::eq(l, lane)))
        };
        // Where it was accepted there is no thread to wake.
        assert_eq!([1, 2, 3].map(|here| found(&lanes, here)), [None, None, Some(1)]);
        // The thread of one has panicked: its connections are gone, and so is its end of the channel.
        ends.remove(1);
        lanes[1].open.store(0, Ordering::Relaxed);
        assert_eq!([1, 2, 3].map(|here| found(&lanes, here)), [None, None, Some(2)]);
        drop(ends);
        assert_eq!(found(&lanes, 100), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_set_of_a_listener_holds_of_its_connections() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for_connections(&SockRef::from(&listener)).unwrap();
        let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.tcp_nodelay().unwrap());
        assert_eq!(accepted.tcp_notsent_lowat().unwrap(), UNSENT);
    }
}
