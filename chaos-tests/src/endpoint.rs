//! Where a replica is and what can be asked there, whether or not it lives.

use std::net::SocketAddr;
use std::time::Duration;

use everline::admin_types::{
    ModelEntry, RegisterRequest, StatusReply, StreamCopy, StreamReply, WorkerStatus, WorkersReply,
};
use everline::cluster::api::MemberStatus;

use crate::client::{Http, Reply};
use crate::fleet::MODEL;
use crate::ports::free_address;

/// How long ordinary questions may take.
pub const LIMIT: Duration = Duration::from_secs(5);

/// A replica's name and addresses.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its name.
    pub name: String,
    /// Client listener.
    pub http: SocketAddr,
    /// Admin listener.
    pub admin: SocketAddr,
    /// Peer listener.
    pub peer: SocketAddr,
}

impl Endpoint {
    /// A name with free addresses.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), http: free_address(), admin: free_address(), peer: free_address() }
    }

    /// URL of a route of the client listener.
    pub fn http_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http)
    }

    /// URL of a route of the admin listener.
    pub fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// `GET /v1/admin/status`
    pub async fn status(&self) -> Result<StatusReply, String> {
        Http::fresh().get(&self.admin_url("/v1/admin/status"), LIMIT).await?.json()
    }

    /// The status code of `/readyz` and what it says in full.
    pub async fn ready(&self) -> Result<Reply, String> {
        Http::fresh().get(&self.admin_url("/readyz?verbose"), LIMIT).await
    }

    /// The registry as of now, cluster-wide.
    pub async fn workers(&self) -> Result<Vec<WorkerStatus>, String> {
        let url = self.admin_url("/v1/admin/workers?consistency=linearizable");
        Ok(Http::fresh().get(&url, LIMIT).await?.json::<WorkersReply>()?.workers)
    }

    /// The registry as this replica has it.
    pub async fn local_workers(&self) -> Result<Vec<WorkerStatus>, String> {
        Ok(self.status().await?.workers)
    }

    /// What this replica has of a stream.
    pub async fn stream_copy(&self, id: &str) -> Result<StreamCopy, String> {
        let url = self.admin_url(&format!("/v1/admin/streams/{id}"));
        let reply = Http::fresh().get(&url, LIMIT).await?.json::<StreamReply>()?;
        reply.copy.ok_or_else(|| format!("{} has no copy", self.name))
    }

    /// A worker as this replica has it.
    pub async fn worker(&self, id: &str) -> Result<WorkerStatus, String> {
        let mut workers = self.local_workers().await?.into_iter();
        workers.find(|w| w.id.as_str() == id).ok_or_else(|| format!("{} does not know {id}", self.name))
    }

    /// The members as this replica has them.
    pub async fn members(&self) -> Result<Vec<MemberStatus>, String> {
        Ok(self.status().await?.cluster.members)
    }

    /// Registers a worker by the admin API; the plain answer.
    pub async fn add_worker(&self, request: &RegisterRequest, limit: Duration) -> Result<Reply, String> {
        Http::fresh().post(&self.admin_url("/v1/admin/workers"), request, limit).await
    }

    /// Registers a worker by the node API; the plain answer.
    pub async fn add_node(&self, request: &RegisterRequest, limit: Duration) -> Result<Reply, String> {
        Http::fresh().post(&self.http_url("/v1/nodes"), request, limit).await
    }
}

/// A worker that is not asked anything when it is registered and serves a model nobody wants.
pub fn paper_worker(id: &str) -> RegisterRequest {
    let mut request = RegisterRequest::new("http://127.0.0.1:9");
    request.id = Some(id.to_owned());
    request.models = vec![ModelEntry::Name("on-paper".to_owned())];
    request.probe = Some(false);
    request
}

/// A simulated engine as a worker.
pub fn engine_worker(id: &str, address: SocketAddr) -> RegisterRequest {
    let mut request = RegisterRequest::new(format!("http://{address}"));
    request.id = Some(id.to_owned());
    request.models = vec![ModelEntry::Name(MODEL.to_owned())];
    request
}
