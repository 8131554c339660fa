//! A replica's part in the cluster: takes the folder, serves the links, finds a place, and stops
//! in order. The way in for everybody outside.

use std::net::TcpListener;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::RngExt;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::api::ControlPlane;
use super::handle::Handle;
use super::hooks::Board;
use super::identity::Identity;
use super::inner::{Inner, NodeConfig, StartError};
use super::membership;
use super::peer::dial::Dialer;
use super::peer::incoming::{Incoming, incoming, incoming_apart, server};
use super::peer::server::Service;
use super::place::LinkHost;
use super::proposer::Proposer;
use crate::routing::book::Bookings;
use crate::state::cache::CacheState;

/// Bytes that may be on their way on one stream of a link, and on all of them. Windows of our own,
/// for each output stream, are within these.
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
pub(super) const CONNECTION_WINDOW: u32 = 16 << 20;

/// How long the groups may take to stop.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);

/// A replica's part in the cluster. Dropping it without [`Cluster::shutdown`] is like a crash.
pub struct Cluster {
    inner: Arc<Inner>,
    runtime: Option<Runtime>,
}

impl Cluster {
    /// Takes the folder, starts the links on `listener`, and begins to form, join or resume.
    /// Returns at once; whether the replica has a place yet is in [`ControlPlane::status`].
    pub fn start(config: NodeConfig, listener: TcpListener) -> Result<Self, StartError> {
        let lock = lock_folder(&config.data_dir)?;
        let identity = Identity::open(&config.data_dir, &config.info.name, rand::rng().random())
            .map_err(|e| StartError::Damaged(e.to_string()))?;
        if let Some(why) = &identity.quarantined {
            return Err(StartError::Damaged(format!("this folder is quarantined: {why}")));
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("raft")
            .enable_all()
            .build()?;
        let control = Proposer::new(config.batching);
        let cache: Proposer<CacheState> = Proposer::new(config.batching);
        let waker = cache.clone();
        let down = Arc::new(Mutex::new(None));
        let (data_dir, quarantine) = (config.data_dir.clone(), down.clone());
        let board = Arc::new(Board::new(move |why| {
            // Served from here on would be whatever this state says: better nothing at all.
            tracing::error!(%why, "this replica's state has diverged; stopping");
            *quarantine.lock() = Some(why.clone());
            if let Ok(mut identity) = Identity::open(&data_dir, "", 0) {
                identity.quarantined = Some(why);
                if let Err(error) = identity.write(&data_dir) {
                    tracing::error!(%error, "cannot write the quarantine down");
                }
            }
            crate::telemetry::log::finish();
            std::process::exit(70);
        }));
        let inner = Arc::new(Inner {
            dialer: Dialer::new(config.tls.clone()),
            board,
            bookings: Bookings::new(move || waker.wake()),
            control,
            cache,
            pulse: Arc::default(),
            identity: Mutex::new(identity),
            member: OnceLock::new(),
            down,
            nudge: tokio::sync::Notify::new(),
            invited: Mutex::default(),
            stop: CancellationToken::new(),
            raft_runtime: runtime.handle().clone(),
            caught_up: AtomicBool::new(false),
            started: Instant::now(),
            _lock: lock,
            config,
        });
        // A member's log is opened here, so that a damaged one is told to the caller.
        let known = inner.identity.lock().member();
        if let Some((cluster, id)) = known {
            runtime.block_on(inner.become_member(cluster, id))?;
        }
        listener.set_nonblocking(true)?;
        runtime.spawn(serve_links(inner.clone(), listener));
        runtime.spawn(inner.clone().find_a_place());
        if let Some(tls) = inner.config.tls.clone() {
            let stop = inner.stop.clone();
            runtime.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = tls.watch() => {}
                }
            });
        }
        Ok(Self { inner, runtime: Some(runtime) })
    }

    /// The interface for everybody else.
    pub fn control_plane(&self) -> Arc<dyn ControlPlane> {
        Arc::new(Handle { inner: self.inner.clone() })
    }

    /// The cache group's proposer, for measuring.
    pub fn cache_proposer(&self) -> Proposer<CacheState> {
        self.inner.cache.clone()
    }

    /// Waits until the consensus has stopped for good and says why; pending while all is well.
    pub async fn failed(&self) -> String {
        self.inner.watch_for_failure().await
    }

    /// Hands the leadership of both groups to others, if there is any to hand over and somebody
    /// to take it. Within about two seconds.
    pub async fn hand_over_leadership(&self) {
        let inner = self.inner.clone();
        let done = self.inner.raft_runtime.spawn(async move {
            let Some(member) = inner.member.get() else { return };
            for raft in &member.rafts {
                let reply = membership::transfer(raft, member.id, None).await;
                tracing::debug!(?reply, "leadership handed over");
            }
        });
        let _ = done.await;
    }

    /// Stops the groups and closes the log.
    pub async fn shutdown(mut self) {
        self.inner.stop.cancel();
        let inner = self.inner.clone();
        let stopped = self.inner.raft_runtime.spawn(async move {
            let Some(member) = inner.member.get() else { return };
            for raft in &member.rafts {
                if let Err(error) = raft.shutdown().await {
                    tracing::warn!(%error, "consensus did not stop cleanly");
                }
            }
        });
        // One that has failed may not stop at all; the log takes that as it takes a crash.
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, stopped).await;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.inner.stop.cancel();
        if let Some(runtime) = self.runtime.take() {
            // The ordinary drop would block, which an async caller must not.
            runtime.shutdown_background();
        }
    }
}

/// One process a folder: `LOCK` is held (flock) as long as the file is open.
fn lock_folder(dir: &std::path::Path) -> Result<std::fs::File, StartError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let lock = std::fs::File::create(dir.join("LOCK"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        // Nothing is wrong with the folder, so it must not be called damaged: it would be set aside.
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let text = "it is in use by another process; give each replica a data folder of its own";
            Err(StartError::Io(std::io::Error::new(std::io::ErrorKind::WouldBlock, text)))
        }
        Err(error) => Err(StartError::Io(error.into())),
    }
}

async fn serve_links(inner: Arc<Inner>, listener: TcpListener) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the peer listener does not work");
            return;
        }
    };
    let (tls, stop) = (inner.config.tls.clone(), inner.stop.clone());
    let (incoming, more) = match inner.config.services.clone() {
        None => (incoming(listener, tls, stop.clone()), Routes::default()),
        Some((more, runtime)) => {
            let (incoming, streams) = incoming_apart(listener, tls, runtime.clone(), stop.clone());
            // Ends with `stop`, or the runtime.
            runtime.spawn(serve_what_comes(streams, more.clone(), stop.clone()));
            (incoming, more)
        }
    };
    let routes = more.add_service(Service::serve(Arc::new(LinkHost { inner })));
    serve_what_comes(incoming, routes, stop).await;
}

async fn serve_what_comes(incoming: Incoming, routes: Routes, stop: CancellationToken) {
    let stopped = async move { stop.cancelled().await };
    let served = server().add_routes(routes).serve_with_incoming_shutdown(incoming, stopped);
    if let Err(error) = served.await {
        tracing::error!(%error, "the peer links have stopped");
    }
}
