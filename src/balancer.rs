//! A TCP balancer for the demo: round robin over the backends that accept connections.
//!
//! It copies bytes, so that what the demo shows holds behind any balancer of this kind. A backend
//! is down while connecting to it fails, which a check each 250 ms and every attempt for a client
//! find out; a client's connection goes to the next backend at once. The check may ask for a page
//! as well, the only HTTP there is here: a backend that does not answer 200 gets connections only
//! when nobody else is left. A connection that was handed to a backend lives and dies with it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Bytes copied at a time, in each direction of each connection.
const BUFFER: usize = 16 * 1024;
/// After the backend has ended its direction, a client that sends nothing for this long is cut:
/// without it a client that never closes would hold a connection to a dead backend for ever.
const AFTER_BACKEND_END: Duration = Duration::from_secs(5);
/// Pause after an `accept` that failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a balancer is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where connections go.
    pub backends: Vec<SocketAddr>,
    /// Time between two health checks of a backend.
    pub check_interval: Duration,
    /// A backend that has not accepted within this time is down.
    pub connect_timeout: Duration,
    /// What a check asks for; none: that it accepts is enough.
    pub check_path: Option<String>,
    /// Most connections at once; further ones wait in the kernel's backlog.
    pub max_connections: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            backends: Vec::new(),
            check_interval: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(1),
            check_path: None,
            max_connections: 4096,
        }
    }
}

#[derive(Debug)]
struct Backend {
    address: SocketAddr,
    /// Cleared by a failed connect, set by a successful one. Starts set, so that the first
    /// client need not wait for the first check.
    up: AtomicBool,
    /// What the last check was told; set where nothing is asked.
    ready: AtomicBool,
}

#[derive(Debug)]
struct Shared {
    backends: Vec<Backend>,
    /// Counts connections; its remainder is whose turn it is.
    turn: AtomicUsize,
    connect_timeout: Duration,
    check_path: Option<String>,
}

/// The balancer.
#[derive(Debug)]
pub struct Balancer {
    shared: Arc<Shared>,
    settings: Settings,
}

impl Balancer {
    /// A balancer that is not running yet.
    pub fn new(settings: Settings) -> Self {
        let backends = settings.backends.iter().map(|&address| Backend {
            address,
            up: AtomicBool::new(true),
            ready: AtomicBool::new(true),
        });
        let shared = Shared {
            backends: backends.collect(),
            turn: AtomicUsize::new(0),
            connect_timeout: settings.connect_timeout,
            check_path: settings.check_path.clone(),
        };
        Self { shared: Arc::new(shared), settings }
    }

    /// Serves until `stop` is ready; then every connection is closed.
    pub async fn run(self, listener: TcpListener, stop: impl Future<Output = ()>) {
        // Both sets end their tasks when this function returns.
        let mut checks = JoinSet::new();
        for at in 0..self.shared.backends.len() {
            checks.spawn(check(self.shared.clone(), at, self.settings.check_interval));
        }
        let mut connections = JoinSet::new();
        let slots = Arc::new(Semaphore::new(self.settings.max_connections));
        tokio::pin!(stop);
        loop {
            let accepted = async {
                // The semaphore is never closed, so that this waits and does not fail.
                let slot = slots.clone().acquire_owned().await.ok()?;
                Some((listener.accept().await, slot))
            };
            tokio::select! {
                () = &mut stop => return,
                Some(_) = connections.join_next() => {}
                accepted = accepted => match accepted {
                    Some((Ok((client, _)), slot)) => {
                        let shared = self.shared.clone();
                        connections.spawn(async move {
                            shared.serve(client).await;
                            drop(slot);
                        });
                    }
                    Some((Err(error), _)) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        sleep(ACCEPT_PAUSE).await;
                    }
                    None => return,
                },
            }
        }
    }
}

impl Shared {
    async fn connect(&self, backend: &Backend) -> io::Result<TcpStream> {
        let connected = match timeout(self.connect_timeout, TcpStream::connect(backend.address)).await {
            Ok(connected) => connected,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        let was_up = backend.up.swap(connected.is_ok(), Ordering::Relaxed);
        match &connected {
            Ok(_) if !was_up => tracing::info!(backend = %backend.address, "backend is up"),
            Err(error) if was_up => tracing::warn!(backend = %backend.address, %error, "backend is down"),
            _ => {}
        }
        connected
    }

    /// Connects to the next backend that accepts: those that are up and ready first, then, since a
    /// check may be late, the others.
    async fn pick(&self) -> Option<TcpStream> {
        let count = self.backends.len();
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = || (0..count).map(|step| &self.backends[(first.wrapping_add(step)) % count]);
        let is_good = |b: &&Backend| b.up.load(Ordering::Relaxed) && b.ready.load(Ordering::Relaxed);
        let (good, others): (Vec<_>, Vec<_>) = in_turn().partition(is_good);
        for backend in good.into_iter().chain(others) {
            if let Ok(stream) = self.connect(backend).await {
                return Some(stream);
            }
        }
        None
    }

    async fn serve(&self, mut client: TcpStream) {
        let Some(mut backend) = self.pick().await else {
            reset(&client);
            return;
        };
        let _ = client.set_nodelay(true);
        let _ = backend.set_nodelay(true);
        if copy_both(&mut client, &mut backend).await.is_err() {
            reset(&client);
            reset(&backend);
        }
    }
}

/// Lets the coming close be a reset: the other side learns that something went wrong instead of
/// taking half an answer for a whole one.
fn reset(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

async fn check(shared: Arc<Shared>, at: usize, interval: Duration) {
    let backend = &shared.backends[at];
    loop {
        sleep(interval).await;
        // Without a path, dropping the connection closes it; what counts is that it was accepted.
        let (Ok(stream), Some(path)) = (shared.connect(backend).await, &shared.check_path) else { continue };
        let asked = timeout(shared.connect_timeout, says_200(stream, path)).await;
        let is_ready = matches!(asked, Ok(Ok(true)));
        if backend.ready.swap(is_ready, Ordering::Relaxed) != is_ready {
            tracing::info!(backend = %backend.address, is_ready, path, "backend has changed");
        }
    }
}

/// Asks for a page and reads as much of the answer as has its status.
async fn says_200(mut stream: TcpStream, path: &str) -> io::Result<bool> {
    let ask = format!("GET {path} HTTP/1.1\r\nhost: balancer\r\nconnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await?;
    let mut status = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status).await?;
    Ok(status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
}

/// Copies until both directions have ended; the end of one is passed on as the end of that one
/// direction only. An error in either ends both.
async fn copy_both(client: &mut TcpStream, backend: &mut TcpStream) -> io::Result<()> {
    let (from_client, to_client) = client.split();
    let (from_backend, to_backend) = backend.split();
    let down = copy(from_backend, to_client);
    let up = copy(from_client, to_backend);
    tokio::pin!(up, down);
    tokio::select! {
        result = &mut up => {
            result?;
            down.await
        }
        result = &mut down => {
            result?;
            // The backend is done or dead. A client that still sends gets its answer from the
            // backend's kernel; one that waits has nothing to wait for.
            timeout(AFTER_BACKEND_END, up).await.unwrap_or(Ok(()))
        }
    }
}

async fn copy(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            read => to.write_all(&buffer[..read]).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::sync::oneshot;

    use super::*;

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Greets each connection with its name, then sends back what it reads until the end.
    async fn echo(name: &'static str) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let (listener, address) = listener().await;
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections.spawn(async move {
                    let _ = stream.write_all(name.as_bytes()).await;
                    let mut all = Vec::new();
                    if stream.read_to_end(&mut all).await.is_ok() {
                        let _ = stream.write_all(&all).await;
                    }
                });
            }
        });
        (address, task)
    }

    async fn balance(backends: Vec<SocketAddr>, max_connections: usize) -> (SocketAddr, oneshot::Sender<()>) {
        let (listener, address) = listener().await;
        let (stop, stopped) = oneshot::channel::<()>();
        let settings = Settings {
            backends,
            check_interval: Duration::from_millis(20),
            max_connections,
            ..Settings::default()
        };
        tokio::spawn(Balancer::new(settings).run(listener, async {
            let _ = stopped.await;
        }));
        (address, stop)
    }

    async fn greeting(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut name = [0; 1];
        stream.read_exact(&mut name).await.unwrap();
        String::from_utf8(name.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn connections_go_round() {
        let ((a, _a), (b, _b)) = (echo("a").await, echo("b").await);
        let (front, _stop) = balance(vec![a, b], 64).await;
        let mut seen = Vec::new();
        for _ in 0..4 {
            seen.push(greeting(front).await);
        }
        assert_eq!(seen.concat().matches('a').count(), 2, "{seen:?}");
    }

    #[tokio::test]
    async fn a_dead_backend_costs_no_client_a_connection_and_comes_back() {
        let (alive, _task) = echo("a").await;
        let (gone, address) = listener().await;
        drop(gone);
        let (front, _stop) = balance(vec![address, alive], 64).await;
        for _ in 0..4 {
            assert_eq!(greeting(front).await, "a");
        }
        let back = TcpListener::bind(address).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = back.accept().await.unwrap();
                let _ = stream.write_all(b"b").await;
            }
        });
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            seen.insert(greeting(front).await);
            if seen.len() == 2 {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(seen.len(), 2, "the backend that came back gets its share again");
    }

    #[tokio::test]
    async fn half_a_close_is_passed_on_and_the_answer_still_arrives() {
        let (a, _task) = echo("a").await;
        let (front, _stop) = balance(vec![a], 64).await;
        let mut stream = TcpStream::connect(front).await.unwrap();
        let sent = vec![7; 1 << 20];
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!((answer[0], answer.len()), (b'a', sent.len() + 1));
    }

    #[tokio::test]
    async fn a_reset_is_passed_on_as_a_reset() {
        let (backend, address) = listener().await;
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = backend.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut byte = [0; 1];
                    // Health checks send nothing and are left alone.
                    if stream.read_exact(&mut byte).await.is_ok() {
                        reset(&stream);
                    }
                });
            }
        });
        let (front, _stop) = balance(vec![address], 64).await;
        let mut stream = TcpStream::connect(front).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        let error = stream.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn without_any_backend_the_client_is_cut_at_once() {
        let (gone, address) = listener().await;
        drop(gone);
        let (front, _stop) = balance(vec![address], 64).await;
        let mut stream = TcpStream::connect(front).await.unwrap();
        let read = timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.unwrap();
        assert!(read.is_err() || read.is_ok_and(|n| n == 0));
    }

    #[tokio::test]
    async fn connections_beyond_the_bound_wait_for_a_slot() {
        let (a, _task) = echo("a").await;
        let (front, _stop) = balance(vec![a], 1).await;
        let mut first = TcpStream::connect(front).await.unwrap();
        first.read_exact(&mut [0; 1]).await.unwrap();
        let second = tokio::spawn(greeting(front));
        sleep(Duration::from_millis(50)).await;
        assert!(!second.is_finished());
        drop(first);
        assert_eq!(timeout(Duration::from_secs(5), second).await.unwrap().unwrap(), "a");
    }

    #[tokio::test]
    async fn stopping_closes_every_connection() {
        let (a, _task) = echo("a").await;
        let (front, stop) = balance(vec![a], 64).await;
        let mut stream = TcpStream::connect(front).await.unwrap();
        stream.read_exact(&mut [0; 1]).await.unwrap();
        stop.send(()).unwrap();
        let read = timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.unwrap();
        assert!(read.is_err() || read.is_ok_and(|n| n == 0));
    }

    /// Answers every check with this status, and everything else with its name.
    async fn page(name: &'static str, status: &'static str) -> (SocketAddr, tokio::task::JoinHandle<()>) {
        let (listener, address) = listener().await;
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut first = [0; 1];
                let said = match stream.read_exact(&mut first).await {
                    Ok(_) if first == *b"G" => format!("HTTP/1.1 {status}\r\n\r\n"),
                    _ => name.to_owned(),
                };
                let _ = stream.write_all(said.as_bytes()).await;
            }
        });
        (address, task)
    }

    #[tokio::test]
    async fn who_is_not_ready_gets_connections_only_when_nobody_else_is_left() {
        let (ready, ready_task) = page("ready", "200 OK").await;
        let (draining, _task) = page("draining", "503 Service Unavailable").await;
        let settings = Settings {
            backends: vec![draining, ready],
            check_interval: Duration::from_millis(10),
            check_path: Some("/readyz".to_owned()),
            ..Settings::default()
        };
        let balancer = Balancer::new(settings);
        let shared = balancer.shared.clone();
        let (listener, front) = listener().await;
        tokio::spawn(balancer.run(listener, std::future::pending()));
        let asked = async || {
            let mut stream = TcpStream::connect(front).await.unwrap();
            stream.write_all(b"x").await.unwrap();
            let mut name = String::new();
            stream.read_to_string(&mut name).await.unwrap();
            name
        };
        while shared.backends[0].ready.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(2)).await;
        }
        for _ in 0..6 {
            assert_eq!(asked().await, "ready");
        }
        // The ready one is gone: better one that drains than nobody.
        ready_task.abort();
        let _ = ready_task.await;
        assert_eq!(asked().await, "draining");
    }
}
