//! Sockets: listening, one task for each connection, and the end of all of them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::engine::Engine;
use super::events::{EventFormat, KvPublisher, LoadPublisher};
use super::http::serve;
use super::http::stream::ResetFlag;
use super::ksana::Node;
use super::options::{EngineSimArgs, ShutdownMode};
use super::pd::bootstrap::Bootstrap;
use super::pd::{Desk, Protocol};
use super::ranks::Ranks;

/// Pause after a failed accept, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Serves a simulated engine until `shutdown` resolves; `on_ready` gets the address it listens on.
pub async fn run(
    args: EngineSimArgs,
    shutdown: impl Future<Output = ()>,
    on_ready: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    let simulator = Simulator::start(args).await?;
    on_ready(simulator.address());
    shutdown.await;
    simulator.stop().await;
    Ok(())
}

/// A running engine with its listener; dropping it cuts everything off.
pub struct Simulator {
    address: SocketAddr,
    ranks: Arc<Ranks>,
    /// Ends the accept loop.
    closing: CancellationToken,
    /// Ends connections and the engine.
    cut: CancellationToken,
    connections: TaskTracker,
    accept_task: JoinHandle<()>,
    /// Of the ranks, if they publish their load.
    loads: Vec<LoadPublisher>,
}

impl Simulator {
    /// Binds and starts.
    pub async fn start(mut args: EngineSimArgs) -> anyhow::Result<Self> {
        if args.pd.protocol == Some(Protocol::Sglang) {
            args.kv_events_format = EventFormat::Sglang;
        }
        anyhow::ensure!(!args.models.is_empty(), "engine-sim needs at least one --model");
        let listen = args.listen;
        let listener = TcpListener::bind(listen).await.with_context(|| {
            format!("engine-sim cannot listen on {listen}; choose another --listen address")
        })?;
        let address = listener.local_addr().context("engine-sim cannot tell its own address")?;
        let ranks = Ranks::new(&args);
        let mut loads = Vec::new();
        for engine in ranks.iter() {
            let load = LoadPublisher::start(engine, address.ip()).await?;
            let load_endpoint = load.as_ref().map(|load| load.endpoint().clone());
            loads.extend(load);
            if let Some(publisher) = KvPublisher::start(engine, address.ip(), load_endpoint).await? {
                engine.publish_through(publisher);
            }
            if let Some(desk) = Desk::start(engine, address.ip()).await? {
                engine.hand_over_by(desk);
            }
        }
        if args.pd.has_bootstrap() {
            let desks = ranks.iter().filter_map(|engine| engine.desk().cloned());
            ranks.have_bootstrap(Bootstrap::start(&args, address, desks.collect()).await?);
        }
        if args.pd.protocol == Some(Protocol::Ksana)
            && let Some(desk) = ranks.first().desk()
        {
            anyhow::ensure!(args.dp == 1, "a KsanaLLM node has one rank; leave --dp out");
            desk.be(Node::new(&args, address, desk.side_channel())?);
        }
        let closing = CancellationToken::new();
        let cut = CancellationToken::new();
        let connections = TaskTracker::new();
        for engine in ranks.iter() {
            tokio::spawn(engine.clone().drive(cut.clone()));
        }
        let accept_task =
            tokio::spawn(accept(listener, ranks.clone(), closing.clone(), cut.clone(), connections.clone()));
        Ok(Self { address, ranks, closing, cut, connections, accept_task, loads })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the load of each rank is published, by rank; nowhere if it is not.
    pub fn load_endpoints(&self) -> impl Iterator<Item = &crate::zmtp::Endpoint> {
        self.loads.iter().map(LoadPublisher::endpoint)
    }

    /// The engine behind it; rank 0, if it has several.
    pub fn engine(&self) -> &Arc<Engine> {
        self.ranks.first()
    }

    /// All of its ranks.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Stops listening, ends running requests as `--shutdown` says, waits for connections to close.
    pub async fn stop(self) {
        self.closing.cancel();
        let args = &self.ranks.first().args;
        match args.shutdown {
            ShutdownMode::Abort => self.ranks.close(),
            ShutdownMode::Drain => {}
            ShutdownMode::Drop => self.cut.cancel(),
        }
        self.connections.close();
        let grace = Duration::from_millis(args.shutdown_grace_ms);
        // Past the grace period, whoever is left is cut off.
        let _ = tokio::time::timeout(grace, self.connections.wait()).await;
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.closing.cancel();
        self.cut.cancel();
        self.accept_task.abort();
        self.ranks.iter().filter_map(|engine| engine.kv_publisher()).for_each(KvPublisher::close);
    }
}

async fn accept(
    listener: TcpListener,
    ranks: Arc<Ranks>,
    closing: CancellationToken,
    cut: CancellationToken,
    connections: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = closing.cancelled() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (ranks, closing, cut) = (ranks.clone(), closing.clone(), cut.clone());
                connections.spawn(Box::pin(connection(stream, ranks, closing, cut)));
            }
            Err(error) => {
                tracing::warn!(%error, "engine-sim could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    ranks: Arc<Ranks>,
    closing: CancellationToken,
    cut: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "engine-sim could not switch Nagle's algorithm off");
    }
    let reset = ResetFlag::default();
    let io = TokioIo::new(Socket { stream, reset: reset.clone() });
    let service = service_fn(move |request| serve(ranks.clone(), reset.clone(), request));
    // Half-closing counts as leaving, as it does for the real engine; that is hyper's default.
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let mut draining = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(error = %error, "engine-sim connection ended");
                }
                return;
            }
            () = closing.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            () = cut.cancelled() => return,
        }
    }
}

/// A socket that closes with a reset if its flag says so.
struct Socket {
    stream: TcpStream,
    reset: ResetFlag,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.reset.load(Ordering::Acquire) {
            // If it fails, the peer sees an ordinary close instead.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
