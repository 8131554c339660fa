//! Clients' API keys: which secrets are good, for which models, how fast and until when.
//!
//! A request costs one SHA-256 of its secret, one look into a map and one or two atomic
//! operations; nothing is locked. The keys in force are replaced as a whole, so that a request
//! sees either the old ones or the new ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use http::HeaderMap;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use subtle::ConstantTimeEq;

use super::auth::{Shown, client_secret, digest_of};
use super::errors::{ApiError, Code, RateLimit};
use super::throttle::{Excess, Meter, Rate};
use crate::admin_types::KeyStatus;
use crate::relay::secret::principal;

/// A client's key, as configured.
#[derive(Clone, Debug)]
pub struct ClientKey {
    /// What it is called in logs, metrics and messages; says nothing about the secret.
    pub id: String,
    /// SHA-256 of the secret.
    pub digest: [u8; 32],
    /// Models it may use: names, or beginnings of names with a `*` behind. `None`: all.
    pub models: Option<Vec<String>>,
    /// How many requests, at this replica.
    pub rate: Option<Rate>,
    /// Most requests in flight, at this replica.
    pub max_concurrent: Option<u32>,
    /// From when on it is refused.
    pub expires: Option<SystemTime>,
}

/// What a key has used so far; survives a reload under the same id.
#[derive(Debug, Default)]
struct Usage {
    meter: Meter,
    /// Streams asked for that are none of its own.
    guesses: Meter,
    in_flight: AtomicU32,
    admitted: AtomicU64,
    limited: AtomicU64,
}

/// A key in force.
#[derive(Debug)]
pub(super) struct Key {
    spec: ClientKey,
    usage: Arc<Usage>,
}

/// The keys in force, found by the first eight bytes of their digests.
///
/// That look-up compares in a time that depends on the digests, and may: who has no key cannot
/// steer the digest of what he sends (that takes a preimage), so its timing tells about stored
/// digests what random guessing tells, and the secret behind a digest is 256 bits of chance. The
/// whole digest is then compared in constant time.
#[derive(Debug, Default)]
struct Ring {
    keys: HashMap<u64, Arc<Key>>,
    /// The same by whose streams are ([`principal`]).
    principals: HashMap<[u8; 16], Arc<Key>>,
    /// Keys are configured, be it none in the end: without one nobody gets in.
    closed: bool,
}

fn place(digest: &[u8; 32]) -> u64 {
    digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The API keys of one replica.
#[derive(Debug)]
pub struct KeyRing {
    ring: ArcSwap<Ring>,
    epoch: Instant,
}

impl KeyRing {
    /// A ring with these keys; `None` lets everybody in, while an empty list lets in nobody.
    pub fn new(keys: Option<Vec<ClientKey>>) -> Self {
        let ring = Self { ring: ArcSwap::default(), epoch: Instant::now() };
        if let Some(keys) = keys {
            ring.replace(keys);
        }
        ring
    }

    /// Puts other keys into force, for every request from now on. A key that keeps its id keeps
    /// its place under its limits.
    pub fn replace(&self, keys: Vec<ClientKey>) {
        let before = self.ring.load();
        let usages: BTreeMap<&str, &Arc<Usage>> =
            before.keys.values().map(|key| (key.spec.id.as_str(), &key.usage)).collect();
        let keys = keys.into_iter().map(|spec| {
            let usage = usages.get(spec.id.as_str()).map(|usage| Arc::clone(usage)).unwrap_or_default();
            Arc::new(Key { spec, usage })
        });
        let mut ring = Ring { closed: true, ..Ring::default() };
        for key in keys {
            ring.principals.insert(principal(Some(&key.spec.id)), Arc::clone(&key));
            ring.keys.insert(place(&key.spec.digest), key);
        }
        self.ring.store(Arc::new(ring));
    }

    /// Lets a request in, or says why not.
    pub(super) fn admit(&self, headers: &HeaderMap) -> Result<Pass, ApiError> {
        let ring = self.ring.load();
        if !ring.closed {
            return Ok(Pass::default());
        }
        let secret = match client_secret(headers) {
            Shown::Secret(secret) => secret,
            Shown::Nothing => {
                let text = "no API key was sent; send `Authorization: Bearer <key>` or `x-api-key: <key>`";
                return Err(ApiError::new(Code::MissingApiKey, text));
            }
            Shown::Unclear => {
                let text = "the API key cannot be read; send one header `Authorization: Bearer <key>` or \
                            `x-api-key: <key>`";
                return Err(ApiError::new(Code::InvalidApiKey, text));
            }
        };
        let digest = digest_of(secret);
        let found = ring.keys.get(&place(&digest)).filter(|key| key.spec.digest.ct_eq(&digest).into());
        let Some(key) = found else {
            return Err(ApiError::new(Code::InvalidApiKey, "this API key is not known here"));
        };
        key.admit(self.epoch.elapsed())
    }

    /// Whether a key is in force whose streams are this principal's.
    pub(super) fn has(&self, principal: &[u8; 16]) -> bool {
        let ring = self.ring.load();
        !ring.closed || ring.principals.get(principal).is_some_and(|key| !key.is_expired())
    }

    /// All keys, by id, for operators.
    pub fn list(&self) -> Vec<KeyStatus> {
        let ring = self.ring.load();
        let mut keys: Vec<KeyStatus> = ring.keys.values().map(|key| key.status()).collect();
        keys.sort_by(|a, b| a.id.cmp(&b.id));
        keys
    }

    /// Whether requests need a key.
    pub fn is_closed(&self) -> bool {
        self.ring.load().closed
    }
}

impl Key {
    fn is_expired(&self) -> bool {
        self.spec.expires.is_some_and(|end| SystemTime::now() >= end)
    }

    fn admit(self: &Arc<Self>, now: Duration) -> Result<Pass, ApiError> {
        let id = &self.spec.id;
        if self.is_expired() {
            let text = format!("the API key {id} has expired; ask whoever runs this service for a new one");
            return Err(ApiError::new(Code::ExpiredApiKey, text));
        }
        // The place in flight first: a request that finds none must not cost a token of the rate.
        let usage = &self.usage;
        let most = self.spec.max_concurrent.unwrap_or(u32::MAX);
        let pass = if usage.in_flight.fetch_add(1, Ordering::AcqRel) >= most {
            usage.in_flight.fetch_sub(1, Ordering::AcqRel);
            usage.limited.fetch_add(1, Ordering::Relaxed);
            let text = format!(
                "the API key {id} has {most} requests in flight, as many as it may; wait for one to end"
            );
            return Err(ApiError::new(Code::TooManyInFlight, text).retry_after(1));
        } else {
            Pass(Some(Place { key: Arc::clone(self) }))
        };
        if let Some(rate) = &self.spec.rate
            && let Err(excess) = rate.take(&usage.meter, now.as_nanos() as u64)
        {
            usage.limited.fetch_add(1, Ordering::Relaxed);
            return Err(self.too_fast(*rate, excess));
        }
        usage.admitted.fetch_add(1, Ordering::Relaxed);
        Ok(pass)
    }

    fn too_fast(&self, rate: Rate, excess: Excess) -> ApiError {
        let wait = excess.wait.as_secs_f64().ceil().max(1.0);
        let text = format!(
            "the API key {} sends more requests than it may; try again in {}",
            self.spec.id,
            readable(excess.wait)
        );
        let limit = RateLimit { requests: rate.burst(), reset: readable(excess.reset) };
        ApiError { rate_limit: Some(Box::new(limit)), ..ApiError::new(Code::RateLimitExceeded, text) }
            .retry_after(wait as u32)
    }

    fn may_use(&self, model: &str) -> bool {
        let Some(models) = &self.spec.models else { return true };
        models.iter().any(|allowed| match allowed.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => model == allowed,
        })
    }

    fn status(&self) -> KeyStatus {
        let usage = &self.usage;
        let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs());
        KeyStatus {
            id: self.spec.id.clone(),
            models: self.spec.models.clone(),
            expires_unix_s: self.spec.expires.map(seconds),
            expired: self.is_expired(),
            in_flight: usage.in_flight.load(Ordering::Relaxed),
            admitted: usage.admitted.load(Ordering::Relaxed),
            limited: usage.limited.load(Ordering::Relaxed),
        }
    }
}

/// Milliseconds below a second, seconds above, as OpenAI writes them.
fn readable(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{}ms", time.as_micros().div_ceil(1000))
    } else {
        format!("{:.2}s", time.as_secs_f64())
    }
}

/// A place among the requests in flight of a key; given back when dropped.
#[derive(Debug)]
struct Place {
    key: Arc<Key>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.key.usage.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request that was let in; to be kept until its answer has been handed over.
#[derive(Debug, Default)]
pub(super) struct Pass(Option<Place>);

impl Pass {
    /// Who sent the request.
    pub(super) fn caller(&self) -> Caller {
        Caller(self.0.as_ref().map(|place| Arc::clone(&place.key)))
    }
}

/// Who sent a request, as far as the client plane knows; an extension of proxied requests.
#[derive(Clone, Debug, Default)]
pub(super) struct Caller(Option<Arc<Key>>);

impl Caller {
    /// Who sent this request: nobody in particular if it needed no key.
    pub(super) fn of(extensions: &http::Extensions) -> Caller {
        extensions.get::<Caller>().cloned().unwrap_or_default()
    }

    /// The key's name, for logs.
    pub(super) fn key_id(&self) -> Option<&str> {
        self.0.as_ref().map(|key| key.spec.id.as_str())
    }

    /// Where the streams are counted that it asked for and that are not its own; `None` where no key
    /// was needed.
    pub(super) fn guesses(&self) -> Option<&Meter> {
        self.0.as_ref().map(|key| &key.usage.guesses)
    }

    /// Whether it may use, and see, a model.
    pub(super) fn may_use(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|key| key.may_use(model))
    }

    /// Refuses a model that the key is not for. `None`, a request that names no model, is for
    /// keys without such limits only: nobody knows which model it would reach.
    pub(super) fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        let Some(key) = &self.0 else { return Ok(()) };
        let Some(models) = &key.spec.models else { return Ok(()) };
        if model.is_some_and(|model| key.may_use(model)) {
            return Ok(());
        }
        let text = format!(
            "the API key {} may use these models only: {}{}",
            key.spec.id,
            models.join(", "),
            if model.is_none() { "; this request names none" } else { "" }
        );
        Err(ApiError::new(Code::ModelNotAllowed, text).param("model"))
    }
}

/// What each key did, read at the moment of a scrape. There are as many label values as keys are
/// configured.
#[derive(Debug)]
pub struct KeyGauges {
    ring: Arc<KeyRing>,
}

impl KeyGauges {
    /// Reads from `ring`.
    pub fn new(ring: Arc<KeyRing>) -> Self {
        Self { ring }
    }
}

impl Collector for KeyGauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let keys = self.ring.list();
        let mut counter = |name: &str, help: &str, value: fn(&KeyStatus) -> u64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for key in &keys {
                let labels = [("key", key.id.as_str())];
                ConstCounter::new(value(key)).encode(family.encode_family(&labels)?)?;
            }
            Ok(())
        };
        counter("key_requests", "Requests let in, by API key", |key| key.admitted)?;
        counter("key_limited", "Requests refused for a limit, by API key", |key| key.limited)?;
        let mut family = encoder.encode_descriptor(
            "key_requests_in_flight",
            "Requests in flight, by API key",
            None,
            MetricType::Gauge,
        )?;
        for key in &keys {
            let labels = [("key", key.id.as_str())];
            ConstGauge::new(i64::from(key.in_flight)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http::header::AUTHORIZATION;

    use super::*;

    fn key(id: &str, secret: &str) -> ClientKey {
        ClientKey {
            id: id.into(),
            digest: digest_of(secret.as_bytes()),
            models: None,
            rate: None,
            max_concurrent: None,
            expires: None,
        }
    }

    fn admit(ring: &KeyRing, secret: &str) -> Result<Pass, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {secret}")).unwrap());
        ring.admit(&headers)
    }

    fn code(result: Result<Pass, ApiError>) -> Option<Code> {
        result.err().map(|error| error.code)
    }

    #[test]
    fn a_ring_without_keys_is_open_only_if_none_were_configured() {
        assert!(admit(&KeyRing::new(None), "x").is_ok());
        let ring = KeyRing::new(Some(Vec::new()));
        assert_eq!(code(admit(&ring, "x")), Some(Code::InvalidApiKey));
        assert_eq!(code(ring.admit(&HeaderMap::new())), Some(Code::MissingApiKey));
    }

    #[test]
    fn keys_are_found_by_their_secret_and_gone_after_a_replacement() {
        let ring = KeyRing::new(Some(vec![key("a", "sa"), key("b", "sb")]));
        assert_eq!(admit(&ring, "sb").unwrap().caller().key_id(), Some("b"));
        ring.replace(vec![key("a", "sa")]);
        assert!(admit(&ring, "sa").is_ok());
        assert_eq!(code(admit(&ring, "sb")), Some(Code::InvalidApiKey));
    }

    #[test]
    fn a_digest_that_only_begins_alike_does_not_fit() {
        let mut other = key("a", "sa");
        other.digest[31] ^= 1;
        assert_eq!(code(admit(&KeyRing::new(Some(vec![other])), "sa")), Some(Code::InvalidApiKey));
    }

    #[test]
    fn models_are_names_or_beginnings() {
        let limited = ClientKey { models: Some(vec!["m".into(), "llama-*".into()]), ..key("a", "sa") };
        let ring = KeyRing::new(Some(vec![limited, key("b", "sb")]));
        let caller = admit(&ring, "sa").unwrap().caller();
        for (model, fits) in
            [("m", true), ("m2", false), ("llama-3", true), ("llama-", true), ("llama", false), ("", false)]
        {
            assert_eq!(caller.check_model(Some(model)).is_ok(), fits, "{model}");
            assert_eq!(caller.may_use(model), fits, "{model}");
        }
        let error = caller.check_model(None).unwrap_err();
        assert_eq!(error.code, Code::ModelNotAllowed);
        assert!(error.message.contains("m, llama-*"), "{error}");
        assert!(admit(&ring, "sb").unwrap().caller().check_model(None).is_ok());
        assert!(Caller::default().check_model(None).is_ok());
    }

    #[test]
    fn an_expired_key_is_refused() {
        let at = |time| ClientKey { expires: Some(time), ..key("a", "sa") };
        let past = KeyRing::new(Some(vec![at(SystemTime::now() - Duration::from_secs(1))]));
        assert_eq!(code(admit(&past, "sa")), Some(Code::ExpiredApiKey));
        let future = KeyRing::new(Some(vec![at(SystemTime::now() + Duration::from_secs(60))]));
        assert!(admit(&future, "sa").is_ok());
    }

    #[test]
    fn limits_hold_over_a_reload_and_places_are_given_back() {
        let limited = ClientKey { max_concurrent: Some(2), ..key("a", "sa") };
        let ring = KeyRing::new(Some(vec![limited.clone()]));
        let (one, _two) = (admit(&ring, "sa").unwrap(), admit(&ring, "sa").unwrap());
        assert_eq!(code(admit(&ring, "sa")), Some(Code::TooManyInFlight));
        ring.replace(vec![limited]);
        assert_eq!(code(admit(&ring, "sa")), Some(Code::TooManyInFlight));
        drop(one);
        let _three = admit(&ring, "sa").unwrap();
        let shown = ring.list();
        assert_eq!((shown[0].in_flight, shown[0].admitted, shown[0].limited), (2, 3, 2));
    }

    #[test]
    fn too_fast_is_told_when_to_come_back() {
        let slow = ClientKey { rate: Some(Rate::new(0.4, 2)), ..key("a", "sa") };
        let ring = KeyRing::new(Some(vec![slow]));
        assert!(admit(&ring, "sa").is_ok() && admit(&ring, "sa").is_ok());
        let error = admit(&ring, "sa").unwrap_err();
        assert_eq!((error.code, error.retry_after), (Code::RateLimitExceeded, Some(3)));
        let limit = error.rate_limit.unwrap();
        assert_eq!(limit.requests, 2);
        assert!(
            limit.reset.ends_with('s') && limit.reset.starts_with('4') || limit.reset == "5.00s",
            "{}",
            limit.reset
        );
        assert_eq!(ring.list()[0].in_flight, 0, "a refused request holds no place");
    }

    #[test]
    fn times_are_written_as_openai_writes_them() {
        assert_eq!(readable(Duration::from_micros(119_001)), "120ms");
        assert_eq!(readable(Duration::from_millis(8_640)), "8.64s");
    }
}
