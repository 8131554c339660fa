//! The route table: every route of every plane, once. Dispatch, metric labels, `Allow`, the
//! credentials a route needs, body limits and `/openapi.json` are read from it.
//!
//! **Invariant.** Credentials belong to the matched [`Route`], never to a path as text: what is
//! matched here is what is served, nobody parses the path a second time. A path that could mean
//! one thing here and another at a worker (dot segments, empty segments, needless escapes)
//! matches no template.

use http::Method;

use super::errors::{ApiError, Code};
use super::streams::response;

/// Which listener a request came in by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listener {
    /// For clients and nodes.
    Client,
    /// For operators.
    Admin,
    /// For clients and nodes of KsanaLLM: what the client listener is where that is configured.
    Ksana,
}

/// What a route is for; decides which listener has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plane {
    /// Clients, on the client listener.
    Client,
    /// Engines and their agents, on the client listener.
    Node,
    /// Operators, on the admin listener.
    Admin,
    /// Balancers and orchestrators, on both.
    Health,
    /// KsanaLLM's engines and their clients, where the client listener is theirs.
    Ksana,
    /// Scrapers: on the admin listener, and on the client listener if that is configured.
    Metrics,
}

/// What a request must show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing.
    Open,
    /// A client's API key, if any are configured.
    Key,
    /// The same; or, to read, a capability for the stream in the path.
    KeyOrCapability,
    /// A node token, if any are configured.
    NodeToken,
    /// An admin token, if any are configured.
    AdminToken,
    /// On the admin listener an admin token if any are configured, unless metrics are open there.
    Scrape,
}

/// Who answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Served {
    /// This replica.
    Here,
    /// A worker that serves the `model` of the JSON body.
    ByModel,
    /// A worker; the request need not name a model nor have a body.
    ByAnyWorker,
}

/// The largest body a route reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MaxBody {
    /// Bodies are not read.
    None,
    /// As `http.max_body_bytes` says.
    Configured,
    /// This many bytes.
    Bytes(usize),
}

/// A method of a route.
#[derive(Debug)]
pub struct Operation {
    /// The method.
    pub method: Method,
    /// What it does, in a sentence.
    pub summary: &'static str,
}

/// A row of the table.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub route: Route,
    /// Path template: literal, or with one parameter as its last or middle segment. `{*rest}`
    /// takes all that is left.
    pub path: &'static str,
    /// What it is for.
    pub plane: Plane,
    /// What a request must show.
    pub access: Access,
    /// Who answers.
    pub served: Served,
    /// Largest body.
    pub max_body: MaxBody,
    /// Its methods. Empty: any that a worker may be asked with (see [`Entry::allow`]).
    pub operations: &'static [Operation],
}

const NODE_BODY: MaxBody = MaxBody::Bytes(64 * 1024);
/// Largest body of a heartbeat: it may tell of 1,024 ranks.
pub(super) const HEARTBEAT_BYTES: usize = 128 * 1024;
const ADMIN_BODY: MaxBody = MaxBody::Bytes(1 << 20);
/// It lists the node's devices.
const KSANA_BODY: MaxBody = MaxBody::Bytes(256 * 1024);

macro_rules! routes {
    ($(
        $name:ident = $path:literal: $plane:ident, $access:ident, $served:ident, $max_body:expr,
        [$($method:ident $summary:literal),*];
    )*) => {
        /// A route template.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Route {
            $(
                #[doc = concat!("`", $path, "`")]
                $name,
            )*
            /// What matches nothing.
            Unknown,
        }

        impl Route {
            /// Each of them, in this order.
            pub const ALL: [Route; 1 + [$($path),*].len()] = [$(Route::$name,)* Route::Unknown];
        }

        /// The table.
        pub static TABLE: &[Entry] = &[$(
            Entry {
                route: Route::$name,
                path: $path,
                plane: Plane::$plane,
                access: Access::$access,
                served: Served::$served,
                max_body: $max_body,
                operations: &[$(Operation { method: Method::$method, summary: $summary }),*],
            },
        )*];

        /// The route whose path is exactly this, where it is not KsanaLLM's, whose rows are the later ones.
        #[allow(unreachable_patterns)]
        fn exact(path: &str) -> Option<Route> {
            match path {
                $($path => Some(Route::$name),)*
                _ => None,
            }
        }
    };
}

routes! {
    ChatCompletions = "/v1/chat/completions": Client, Key, ByModel, MaxBody::Configured,
        [POST "Answers a conversation, streaming or not."];
    Completions = "/v1/completions": Client, Key, ByModel, MaxBody::Configured,
        [POST "Continues a text, streaming or not."];
    Embeddings = "/v1/embeddings": Client, Key, ByModel, MaxBody::Configured,
        [POST "Embeds texts."];
    Responses = "/v1/responses": Client, Key, ByModel, MaxBody::Configured,
        [POST "Answers in the shape of OpenAI's Responses API, streaming or not."];
    Messages = "/v1/messages": Client, Key, ByModel, MaxBody::Configured,
        [POST "Answers in the shape of Anthropic's Messages API, streaming or not."];
    Rerank = "/v1/rerank": Client, Key, ByModel, MaxBody::Configured,
        [POST "Orders documents by relevance to a query."];
    Score = "/v1/score": Client, Key, ByModel, MaxBody::Configured,
        [POST "Scores pairs of texts."];
    Generate = "/generate": Client, Key, ByAnyWorker, MaxBody::Configured,
        [POST "Continues a text or token ids, streaming or not, by SGLang's own route."];
    Tokenize = "/tokenize": Client, Key, ByModel, MaxBody::Configured,
        [POST "Turns a prompt or a conversation into token ids."];
    Detokenize = "/detokenize": Client, Key, ByModel, MaxBody::Configured,
        [POST "Turns token ids into text."];
    Models = "/v1/models": Client, Key, Here, MaxBody::None,
        [GET "Lists the models that workers serve and the key may use."];
    Model = "/v1/models/{*model}": Client, Key, Here, MaxBody::None,
        [GET "Shows one model."];
    Streams = "/v1/streams": Client, Key, Here, MaxBody::None,
        [GET "Lists the caller's output streams."];
    Stream = "/v1/streams/{id}": Client, KeyOrCapability, Here, MaxBody::None,
        [GET "Reads a stream on from any event; as JSON, says how it stands.",
         DELETE "Ends a stream and forgets it."];
    StreamCancel = "/v1/streams/{id}/cancel": Client, Key, Here, MaxBody::None,
        [POST "Ends a stream, if it has not ended."];
    StreamToken = "/v1/streams/{id}/token": Client, Key, Here, MaxBody::Bytes(1024),
        [POST "Makes a capability to read a stream without a key, for a while."];
    Response = "/v1/responses/{response_id}": Client, Key, Here, MaxBody::None,
        [GET "Shows a response that was asked for in the background, or streams it.",
         DELETE "Ends such a response and forgets it."];
    ResponseCancel = "/v1/responses/{response_id}/cancel": Client, Key, Here, MaxBody::None,
        [POST "Ends such a response, if it has not ended."];
    Nodes = "/v1/nodes": Node, NodeToken, Here, NODE_BODY,
        [GET "Lists the workers.", POST "Registers a worker."];
    Node = "/v1/nodes/{id}": Node, NodeToken, Here, MaxBody::None,
        [GET "Shows a worker.", DELETE "Takes back a registration made by this plane."];
    Heartbeat = "/v1/nodes/{id}/heartbeat": Node, NodeToken, Here, MaxBody::Bytes(HEARTBEAT_BYTES),
        [POST "Says that a worker is alive."];
    AdminStatus = "/v1/admin/status": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows the cluster, its workers and the newest errors."];
    AdminWorkers = "/v1/admin/workers": Admin, AdminToken, Here, ADMIN_BODY,
        [GET "Lists the workers with their load.", POST "Registers a worker, or replaces it."];
    AdminWorker = "/v1/admin/workers/{id}": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows a worker.", DELETE "Removes a worker, whoever registered it."];
    AdminDrain = "/v1/admin/workers/{id}/drain": Admin, AdminToken, Here, ADMIN_BODY,
        [POST "Keeps new requests away from a worker, or ends that."];
    AdminStop = "/v1/admin/drain": Admin, AdminToken, Here, MaxBody::None,
        [POST "Stops this replica as planned: its streams and its clients go to others."];
    AdminMembers = "/v1/admin/members": Admin, AdminToken, Here, ADMIN_BODY,
        [GET "Lists the replicas.", POST "Adds, removes or promotes a replica, or hands leadership over."];
    AdminKeys = "/v1/admin/keys": Admin, AdminToken, Here, MaxBody::None,
        [GET "Lists the API keys in force at this replica, without secrets."];
    AdminExplain = "/v1/admin/explain": Admin, AdminToken, Here, MaxBody::Configured,
        [POST "Says where a request would go and why, and sends it nowhere."];
    AdminStreams = "/v1/admin/streams": Admin, AdminToken, Here, MaxBody::None,
        [GET "Lists output streams."];
    AdminStream = "/v1/admin/streams/{id}": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows an output stream, and what of it is at this replica."];
    AdminStreamCancel = "/v1/admin/streams/{id}/cancel": Admin, AdminToken, Here, MaxBody::None,
        [POST "Ends an output stream."];
    AdminIndex = "/v1/admin/index": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows what is in the prefix index and who listens to which engine."];
    Livez = "/livez": Health, Open, Here, MaxBody::None,
        [GET "200 while the process answers."];
    Readyz = "/readyz": Health, Open, Here, MaxBody::None,
        [GET "200 when this replica should get requests."];
    OpenApi = "/openapi.json": Health, Open, Here, MaxBody::None,
        [GET "This listener's routes, as OpenAPI 3.1."];
    Metrics = "/metrics": Metrics, Scrape, Here, MaxBody::None,
        [GET "Counters and gauges, as OpenMetrics text."];
    KsanaRegister = "/RegisterNode": Ksana, NodeToken, Here, KSANA_BODY,
        [POST "Registers a node of KsanaLLM."];
    KsanaHeartbeat = "/Heartbeat": Ksana, NodeToken, Here, NODE_BODY,
        [POST "Says that a node is alive, and tells it of its group's pairs."];
    KsanaCommId = "/RegisterCommId": Ksana, NodeToken, Here, NODE_BODY,
        [POST "Says what id the nodes of a pair form their communicator with."];
    KsanaGenerate = "/generate": Ksana, Key, Here, MaxBody::Configured,
        [POST "Generates by a pair of a prefill and a decode group."];
    KsanaV1 = "/v1/{*ksana_path}": Ksana, Key, Here, MaxBody::Configured,
        [POST "The same by any of the engine's routes below it."];
    KsanaV2 = "/v2/{*ksana_path}": Ksana, Key, Here, MaxBody::Configured,
        [POST "The same by any of the engine's routes below it."];
    KsanaDocs = "/docs": Ksana, Open, Here, MaxBody::None,
        [GET "A page about the routes of this listener."];
    KsanaRedoc = "/redoc": Ksana, Open, Here, MaxBody::None,
        [GET "The same page."];
    AdminKsana = "/v1/admin/ksana": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows KsanaLLM's nodes, groups and pairs."];
    AdminKsanaNode = "/v1/admin/ksana/nodes/{id}": Admin, AdminToken, Here, MaxBody::None,
        [DELETE "Takes a node out. One that still sends heartbeats comes back."];
    AdminNames = "/v1/admin/names": Admin, AdminToken, Here, MaxBody::None,
        [GET "Shows what the names that are followed stand for."];
    PassThrough = "/v1/{*path}": Client, Key, ByAnyWorker, MaxBody::Configured,
        [];
}

/// How an error is told to the clients of a route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dialect {
    /// `{"error": {…}}`
    OpenAi,
    /// `{"type": "error", "error": {…}}`
    Anthropic,
}

impl Route {
    /// Its row; `None` for [`Route::Unknown`].
    pub fn entry(self) -> Option<&'static Entry> {
        TABLE.get(self as usize)
    }

    /// Its template, the label in metrics and logs.
    pub fn path(self) -> &'static str {
        self.entry().map_or("unknown", |entry| entry.path)
    }

    /// The route at this path whose answers may be streams that are kept.
    pub(super) fn of_stream(path: &str) -> Option<Route> {
        const STREAMS: [Route; 4] =
            [Route::ChatCompletions, Route::Completions, Route::Messages, Route::Responses];
        STREAMS.into_iter().find(|route| route.path() == path)
    }

    /// Whether it is about streams that were begun before.
    pub(super) fn is_about_streams(self) -> bool {
        matches!(
            self,
            Route::Streams
                | Route::Stream
                | Route::StreamCancel
                | Route::StreamToken
                | Route::Response
                | Route::ResponseCancel
        )
    }

    /// Whether what a path has in place of the parameter is this route's business. A response whose
    /// id an engine made is that engine's.
    fn takes(self, parameter: &str) -> bool {
        !matches!(self, Route::Response | Route::ResponseCancel) || response::stream_of(parameter).is_some()
    }

    /// Whether requests to it go to a worker.
    pub fn is_proxied(self) -> bool {
        self.entry().is_some_and(|entry| entry.served != Served::Here)
    }

    /// Whether its body must be JSON that names a model.
    pub fn needs_model(self) -> bool {
        self.entry().is_some_and(|entry| entry.served == Served::ByModel)
    }

    /// The dialect of its clients.
    pub fn dialect(self) -> Dialect {
        if self == Route::Messages { Dialect::Anthropic } else { Dialect::OpenAi }
    }
}

impl Entry {
    /// Whether `listener` has it.
    pub fn is_on(&self, listener: Listener, metrics_on_client: bool) -> bool {
        match self.plane {
            Plane::Client | Plane::Node => listener == Listener::Client,
            Plane::Admin => listener == Listener::Admin,
            Plane::Ksana => listener == Listener::Ksana,
            Plane::Health => true,
            Plane::Metrics => listener == Listener::Admin || metrics_on_client,
        }
    }

    /// Whether it serves `method`. Who serves GET serves HEAD.
    fn serves(&self, method: &Method) -> bool {
        let asked = if method == Method::HEAD { &Method::GET } else { method };
        if self.operations.is_empty() {
            // A worker that mirrors a request (TRACE) shows the client what was added to it, its own
            // credentials among that; what a tunnel (CONNECT) carries is nobody's request.
            return !matches!(*method, Method::TRACE | Method::CONNECT);
        }
        self.operations.iter().any(|operation| operation.method == *asked)
    }

    /// The value of `Allow`.
    pub fn allow(&self) -> String {
        if self.operations.is_empty() {
            // The registered ones; others pass, too.
            return "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS".to_owned();
        }
        let names = self.operations.iter().map(|operation| operation.method.as_str());
        let head = self.operations.iter().any(|operation| operation.method == Method::GET).then_some("HEAD");
        names.chain(head).collect::<Vec<_>>().join(", ")
    }
}

/// Why no route serves a request.
#[derive(Debug)]
pub(super) struct Miss {
    /// For the metrics: the route whose method is wrong, or [`Route::Unknown`].
    pub(super) route: Route,
    /// For the client.
    pub(super) error: ApiError,
}

/// Finds the route that serves `method` at `path` on a listener.
pub(super) fn find(
    listener: Listener,
    metrics_on_client: bool,
    method: &Method,
    path: &str,
) -> Result<Route, Miss> {
    let is_here = |entry: &&Entry| entry.is_on(listener, metrics_on_client);
    let entry = match listener {
        // What is one of our paths elsewhere may be an engine's here.
        Listener::Ksana => {
            TABLE.iter().find(|entry| entry.path == path && is_here(entry)).or_else(|| ksana_template(path))
        }
        _ => exact(path)
            .and_then(Route::entry)
            .filter(is_here)
            .or_else(|| by_template(path).and_then(Route::entry).filter(is_here)),
    };
    match entry {
        None => Err(Miss { route: Route::Unknown, error: unknown(listener, path) }),
        Some(entry) if entry.serves(method) => Ok(entry.route),
        Some(entry) => {
            let method = if method.as_str().len() > 16 { "that method" } else { method.as_str() };
            let text = format!("{} does not serve {method}, but {}", entry.path, entry.allow());
            let error =
                ApiError { allow: Some(entry.allow().into()), ..ApiError::new(Code::MethodNotAllowed, text) };
            Err(Miss { route: entry.route, error })
        }
    }
}

/// The engine's routes on a listener of KsanaLLM, which may have nothing behind their slash.
fn ksana_template(path: &str) -> Option<&'static Entry> {
    let below = |prefix: &str| path.strip_prefix(prefix).filter(|rest| rest.is_empty() || is_canonical(rest));
    let route = match (below("/v1/"), below("/v2/")) {
        (Some(_), _) => Route::KsanaV1,
        (_, Some(_)) => Route::KsanaV2,
        _ => return None,
    };
    route.entry()
}

fn by_template(path: &str) -> Option<Route> {
    let ours = |entry: &&Entry| entry.path.contains('{') && entry.plane != Plane::Ksana;
    let mut templates = TABLE.iter().filter(ours);
    let fits = |entry: &&Entry| parameter_of(entry.path, path).is_some_and(|is| entry.route.takes(is));
    let found = templates.find(fits)?.route;
    // What is ours alone is not handed to workers in another spelling or with something behind.
    if found == Route::PassThrough && !may_pass(path) {
        return None;
    }
    Some(found)
}

/// The text that stands where `template` has its parameter, still encoded.
pub(super) fn parameter_of<'a>(template: &str, path: &'a str) -> Option<&'a str> {
    let (before, rest) = template.split_once('{')?;
    let (name, after) = rest.split_once('}')?;
    let inner = path.strip_prefix(before)?.strip_suffix(after)?;
    let fits = !inner.is_empty() && (name.starts_with('*') || !inner.contains('/'));
    fits.then_some(inner)
}

/// First segments below `/v1` that belong to this program, on whatever listener.
const OURS: &[&str] = &["models", "nodes", "admin", "streams"];

/// Routes of engines that change an engine behind the back of all replicas. They are for whoever
/// runs the engine, and are asked of it directly.
const ENGINE_MANAGEMENT: &[&str] = &["/v1/load_lora_adapter", "/v1/unload_lora_adapter"];

/// Whether a path may be handed to a worker as it stands: below `/v1`, none of ours, and the
/// same to everybody who reads it.
fn may_pass(path: &str) -> bool {
    let Some(rest) = path.strip_prefix("/v1/") else { return false };
    let first = rest.split('/').next().unwrap_or_default();
    let ours = OURS.iter().any(|name| first.eq_ignore_ascii_case(name));
    let management =
        ENGINE_MANAGEMENT.iter().any(|name| path.trim_end_matches('/').eq_ignore_ascii_case(name));
    !ours && !management && is_canonical(rest)
}

/// Whether a path reads the same with and without decoding, as far as its structure goes: no
/// empty, `.` or `..` segment (one slash at the end is allowed), no backslash, and no escape of
/// a character that needs none or that is a separator, a percent sign or a control character.
fn is_canonical(path: &str) -> bool {
    let body = path.strip_suffix('/').unwrap_or(path);
    let segments_fit = body.split('/').all(|segment| !matches!(segment, "" | "." | ".."));
    segments_fit && !path.contains('\\') && escapes_are_needed(path.as_bytes())
}

fn escapes_are_needed(path: &[u8]) -> bool {
    let mut rest = path;
    while let Some(at) = rest.iter().position(|byte| *byte == b'%') {
        let digits = rest.get(at + 1..at + 3).and_then(|two| std::str::from_utf8(two).ok());
        let Some(byte) = digits.and_then(hex_byte) else { return false };
        let needless = byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        if needless || byte.is_ascii_control() || b"/\\%".contains(&byte) {
            return false;
        }
        rest = &rest[at + 3..];
    }
    true
}

fn hex_byte(two: &str) -> Option<u8> {
    two.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| u8::from_str_radix(two, 16).ok())?
}

/// Decodes percent escapes; `None` for broken ones and for what is not UTF-8 then.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend_from_slice(pieces.next().unwrap_or_default().as_bytes());
    for piece in pieces {
        bytes.push(hex_byte(piece.get(..2)?)?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

fn unknown(listener: Listener, path: &str) -> ApiError {
    let text = match listener {
        Listener::Client if path.starts_with("/v1/admin") => {
            "operators' routes are on the admin listener, not on this one"
        }
        Listener::Client => {
            "there is no such route on this listener, or its path is written in a way that could be \
             misunderstood; GET /openapi.json lists the routes"
        }
        Listener::Ksana => "Not Found",
        Listener::Admin => {
            "there is no such route on the admin listener; GET /openapi.json lists its routes, clients and \
             nodes use the client listener"
        }
    };
    ApiError::new(Code::UnknownRoute, text)
}

#[cfg(test)]
mod tests;
