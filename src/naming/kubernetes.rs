//! Following services of Kubernetes: a list of a service's EndpointSlices, then a watch from there on.
//!
//! The token is read from its file for each request, as it is replaced there before it expires, and the
//! authority's certificate for each list. A watch ends by itself every [`WATCH`]; what has happened by
//! then is known, so the next begins there. When the API server does not know any more what has happened
//! since (`410 Gone`), everything is listed again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION};
use http::{HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use tokio_util::sync::CancellationToken;

use super::NameService;
use super::answer::Answer;
use super::board::{Board, NameState};
use super::client::{Client, Trouble, shown};
use super::slices::{Lines, ServiceName, Slices, Status};

/// How long a watch lasts, by our own wish: a connection that died unnoticed is noticed after this time.
/// Must be well below the shortest `max_age`.
const WATCH: Duration = Duration::from_secs(60);
/// ... and by how much the API server may exceed that.
const WATCH_SLACK: Duration = Duration::from_secs(10);
/// Longest time for a list, and for the head of a watch.
const ANSWER: Duration = Duration::from_secs(10);
/// Largest list read.
const MAX_LIST: usize = 32 << 20;
/// Largest refusal read.
const MAX_REFUSAL: usize = 64 << 10;
/// First pause after a failure, doubled with each further one ...
const PAUSE: Duration = Duration::from_millis(200);
/// ... up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Where the API server is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct KubernetesOptions {
    /// `https://host:port`
    pub api: String,
    /// Namespace of names that have none of their own.
    pub namespace: String,
    /// The authority of its certificate; without, Mozilla's list.
    pub ca: Option<PathBuf>,
    /// File with the bearer token; without, none is shown.
    pub token_file: Option<PathBuf>,
    /// How long an answer counts.
    pub max_age: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Kubernetes {
    board: Board,
}

impl Kubernetes {
    /// Follows these names until `shutdown`, a task for each.
    pub fn start(
        options: KubernetesOptions,
        names: &[String],
        shutdown: &CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let parsed: Vec<(String, ServiceName)> = names
            .iter()
            .map(|name| Ok((name.clone(), ServiceName::parse(name)?)))
            .collect::<Result<_, String>>()?;
        let this = Arc::new(Self { board: Board::new(names.iter().cloned(), options.max_age) });
        let options = Arc::new(options);
        for (name, service) in parsed {
            let follower =
                Follower { service, options: Arc::clone(&options), names: Arc::clone(&this), name };
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = follower.run() => {}
                    () = shutdown.cancelled() => {}
                }
            });
        }
        Ok(this)
    }
}

impl NameService for Kubernetes {
    fn provider(&self) -> &'static str {
        "kubernetes"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        self.board.answer(name, Instant::now())
    }

    fn states(&self) -> Vec<NameState> {
        self.board.states(Instant::now())
    }
}

/// What follows one name.
struct Follower {
    name: String,
    service: ServiceName,
    options: Arc<KubernetesOptions>,
    names: Arc<Kubernetes>,
}

impl Follower {
    async fn run(self) {
        let mut pause = PAUSE;
        loop {
            let began = Instant::now();
            let why = match self.follow().await {
                // Not a fault, unless it happens again and again.
                Trouble::Gone if began.elapsed() > LONGEST_PAUSE => {
                    pause = PAUSE;
                    continue;
                }
                Trouble::Gone => None,
                why => Some(why.to_string()),
            };
            if let Some(why) = why
                && self.names.board.failed(&self.name, &why)
            {
                tracing::warn!(name = self.name, %why, "the name service is away; what it said last holds");
            }
            if began.elapsed() > LONGEST_PAUSE {
                pause = PAUSE;
            }
            // Not all replicas at once.
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Lists and watches until something is wrong.
    async fn follow(&self) -> Trouble {
        let mut slices = Slices::default();
        let client = match self.list(&mut slices).await {
            Ok(client) => client,
            Err(why) => return why,
        };
        loop {
            if let Err(why) = self.watch(&client, &mut slices).await {
                return why;
            }
        }
    }

    async fn list(&self, slices: &mut Slices) -> Result<Client, Trouble> {
        self.names.board.listed(&self.name);
        let ca = self.options.ca.clone();
        // Reads a file.
        let made = tokio::task::spawn_blocking(move || Client::new(ca.as_deref())).await;
        let client = made
            .map_err(|why| Trouble::Away(why.to_string()))?
            .map_err(|why| Trouble::Refused(format!("the API server's authority: {why}")))?;
        let (status, body) = client.whole(self.request("").await?, MAX_LIST, ANSWER).await?;
        if !status.is_success() {
            return Err(self.refused(status, &body));
        }
        slices.relist(&body)?;
        self.publish(slices)?;
        Ok(client)
    }

    /// One watch, to its end.
    async fn watch(&self, client: &Client, slices: &mut Slices) -> Result<(), Trouble> {
        let query = format!(
            "&watch=true&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={}",
            slices.version(),
            WATCH.as_secs()
        );
        let response = client.begin(self.request(&query).await?, ANSWER).await?;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let refusal = tokio::time::timeout(ANSWER, Limited::new(body, MAX_REFUSAL).collect()).await;
            let refusal = refusal.ok().and_then(Result::ok).map(|all| all.to_bytes()).unwrap_or_default();
            return Err(self.refused(status, &refusal));
        }
        // That it lets us watch from there says that nothing else has happened.
        self.names.board.confirm(&self.name, Instant::now());
        let mut lines = Lines::default();
        let end = tokio::time::Instant::now() + WATCH + WATCH_SLACK;
        loop {
            let frame = match tokio::time::timeout_at(end, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(why))) => return Err(Trouble::Away(format!("the watch broke off: {why}"))),
                Ok(None) => return Ok(()),
                Err(_) => {
                    let text = "the watch did not end when it should; the connection may be dead";
                    return Err(Trouble::Away(text.to_owned()));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            let mut changed = false;
            lines.feed(&data, |line| {
                if !line.is_empty() {
                    changed |= slices.event(line)?;
                }
                Ok(())
            })?;
            match changed {
                true => self.publish(slices)?,
                false => self.names.board.confirm(&self.name, Instant::now()),
            }
        }
    }

    fn publish(&self, slices: &Slices) -> Result<(), Trouble> {
        let answer = slices.answer(&self.service)?;
        let (ready, left_out) = (answer.usable().count(), answer.left_out);
        if self.names.board.put(&self.name, answer, Instant::now()) {
            tracing::info!(name = self.name, ready, left_out, "a name stands for other endpoints now");
        }
        Ok(())
    }

    fn namespace(&self) -> &str {
        self.service.namespace.as_deref().unwrap_or(&self.options.namespace)
    }

    async fn request(&self, query: &str) -> Result<Request<Full<Bytes>>, Trouble> {
        let uri = format!(
            "{}/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3D{}{query}",
            self.options.api.trim_end_matches('/'),
            self.namespace(),
            self.service.service
        );
        let mut request = Request::get(uri).header(ACCEPT, "application/json");
        if let Some(path) = &self.options.token_file {
            let read = tokio::fs::read_to_string(path).await;
            let token =
                read.map_err(|why| Trouble::Refused(format!("cannot read {}: {why}", path.display())))?;
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
                .map_err(|_| Trouble::Refused(format!("{} is not a token", path.display())))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        request.body(Full::default()).map_err(|why| Trouble::Refused(format!("{}: {why}", self.options.api)))
    }

    /// What a refusal means, and what helps.
    fn refused(&self, status: StatusCode, body: &[u8]) -> Trouble {
        if status == StatusCode::GONE {
            return Trouble::Gone;
        }
        let said: Status = serde_json::from_slice(body).unwrap_or_default();
        let namespace = self.namespace();
        let help = match status.as_u16() {
            401 => match &self.options.token_file {
                Some(path) => format!("; is the token in {} of this cluster?", path.display()),
                None => "; name a token's file: name_service.kubernetes_token_file".to_owned(),
            },
            403 => format!(
                "; let this service account get, list and watch endpointslices.discovery.k8s.io in namespace {namespace}"
            ),
            404 => "; discovery.k8s.io/v1 is there from Kubernetes 1.21 on".to_owned(),
            _ => String::new(),
        };
        Trouble::Refused(format!("the API server answered {status}: {}{help}", shown(&said.message)))
    }
}
