//! Spans for an OpenTelemetry collector, and the W3C headers that connect them with those of
//! clients and engines.
//!
//! There is a [`Tracing`] only where the standard variables ask for one; everywhere else it is
//! an `Option` that is `None`. Spans wait in a queue of 2,048 (`OTEL_BSP_MAX_QUEUE_SIZE`); what
//! does not fit is dropped, requests never wait.

mod courier;
mod options;

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span as _, SpanKind, Status, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};

use self::courier::Courier;
pub use self::options::TraceOptions;

/// How long the end of the process waits for the last spans to be taken.
const SHUTDOWN: Duration = Duration::from_secs(2);

static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// Makes spans.
#[derive(Debug)]
pub struct Tracing {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
    context: TraceContextPropagator,
}

impl Tracing {
    /// Starts the thread that sends spans. `replica` is the instance of the service.
    pub fn start(options: TraceOptions, replica: &str) -> Result<Self, String> {
        let courier = Courier::new(options.timeout, options.ca.as_deref())
            .map_err(|error| format!("traces are not sent: OTEL_EXPORTER_OTLP_CERTIFICATE: {error}"))?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(courier)
            .with_endpoint(options.endpoint)
            .with_timeout(options.timeout)
            .build()
            .map_err(|error| format!("traces are not sent: {error}"))?;
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        let instance = KeyValue::new("service.instance.id", replica.to_owned());
        let said = options.resource.into_iter().map(|(key, value)| KeyValue::new(key, value));
        let resource = Resource::builder_empty().with_attributes([version, instance].into_iter().chain(said));
        let provider = SdkTracerProvider::builder()
            .with_sampler(options.sampler)
            .with_resource(resource.build())
            .with_batch_exporter(exporter)
            .build();
        let tracer = provider.tracer("everline");
        Ok(Self { tracer, provider, context: TraceContextPropagator::new() })
    }

    /// Begins the span of a request that came with these headers.
    pub fn request(&self, name: impl Into<Cow<'static, str>>, headers: &HeaderMap) -> RequestSpan {
        let parent = self.context.extract_with_context(&Context::new(), &Incoming::of(headers));
        let builder =
            self.tracer.span_builder(name).with_kind(SpanKind::Server).with_start_time(SystemTime::now());
        let span = builder.start_with_context(&self.tracer, &parent);
        RequestSpan { span, replaces_state: headers.contains_key(&TRACESTATE) }
    }

    /// Sends what waits, for two seconds at most. Blocks.
    pub fn shutdown(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SHUTDOWN) {
            tracing::warn!(%error, "the last spans were not taken by the trace collector");
        }
    }
}

/// The W3C headers of a request; several of `tracestate` are one, as its specification says.
struct Incoming<'a> {
    parent: Option<&'a str>,
    state: String,
}

impl<'a> Incoming<'a> {
    fn of(headers: &'a HeaderMap) -> Self {
        let parent = headers.get(&TRACEPARENT).and_then(|value| value.to_str().ok());
        let state = headers.get_all(&TRACESTATE).iter().filter_map(|value| value.to_str().ok());
        Self { parent, state: state.collect::<Vec<_>>().join(",") }
    }
}

impl Extractor for Incoming<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.parent,
            "tracestate" => Some(self.state.as_str()),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// The span of one request; ends when dropped.
#[derive(Debug)]
pub struct RequestSpan {
    span: Span,
    /// The client sent a `tracestate`.
    replaces_state: bool,
}

impl RequestSpan {
    /// This span's context, for a request to a worker, in place of its parent's headers.
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(2);
        let context = self.span.span_context();
        let (trace, span) = (context.trace_id(), context.span_id());
        let text = format!("00-{trace}-{span}-{:02x}", u8::from(context.is_sampled()));
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(TRACEPARENT.clone(), value);
        }
        // An empty one, which the specification allows, where the client's must not pass.
        let state = HeaderValue::try_from(context.trace_state().header());
        let state = state.unwrap_or(HeaderValue::from_static(""));
        if self.replaces_state || !state.is_empty() {
            headers.insert(TRACESTATE.clone(), state);
        }
        headers
    }

    /// Whether anybody will see what is set.
    pub fn is_recording(&self) -> bool {
        self.span.is_recording()
    }

    /// Sets an attribute.
    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        if self.span.is_recording() {
            self.span.set_attribute(KeyValue::new(key, value));
        }
    }

    /// Something happened now.
    pub fn event(&mut self, name: &'static str, key: &'static str, value: impl Into<Value>) {
        if self.span.is_recording() {
            self.span.add_event(name, vec![KeyValue::new(key, value)]);
        }
    }

    /// The request failed, through no fault of the client.
    pub fn failed(&mut self, why: &'static str) {
        self.set("error.type", why);
        self.span.set_status(Status::error(why));
    }
}
