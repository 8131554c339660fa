//! What a client may say about where its request goes: in headers, which no worker sees, or in
//! the body's member `everline`, which passes through. Where both speak, the header counts.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::errors::{ApiError, Code};
use super::headers;
use crate::ids::WorkerId;
use crate::routing::book::Reserve;
use crate::routing::policy::Overrides;

const OVERLAP_WEIGHT: HeaderName = HeaderName::from_static("everline-overlap-weight");
const TEMPERATURE: HeaderName = HeaderName::from_static("everline-temperature");
const POLICY: HeaderName = HeaderName::from_static("everline-policy");
const LABELS: HeaderName = HeaderName::from_static("everline-labels");
const RESERVE: HeaderName = HeaderName::from_static("everline-reserve");

/// Headers that name a session; the first that is there counts.
const SESSIONS: [HeaderName; 3] = [
    HeaderName::from_static("x-session-id"),
    HeaderName::from_static("x-conversation-id"),
    HeaderName::from_static("x-session-affinity"),
];

/// Most labels in a request.
const MOST_LABELS: usize = 16;

/// See the module.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Wishes {
    /// How to choose.
    pub(super) overrides: Overrides,
    /// The only worker, and rank, that will do: `Everline-Worker: id` or `id/rank`.
    pub(super) worker: Option<(WorkerId, Option<u32>)>,
    /// Labels that the worker must have: `Everline-Labels: zone=a,gpu=h100`.
    pub(super) labels: Vec<(String, String)>,
    /// The session it belongs to.
    pub(super) session: Option<u64>,
    /// `Everline-Reserve: linearizable`: book through the log before sending; `local`: do not;
    /// otherwise as configured.
    pub(super) reserve: Option<Reserve>,
    /// What the body calls its session; read together with the headers.
    named: Option<String>,
    /// `Everline-Trace: 1`: say in the answer what was known of each candidate.
    pub(super) trace: bool,
}

impl Wishes {
    /// No wish but where it goes.
    pub(super) fn pinned(worker: WorkerId, rank: Option<u32>) -> Self {
        Self { worker: Some((worker, rank)), ..Self::default() }
    }

    /// Reads the body's member `everline`.
    pub(super) fn of_body(text: &str) -> Result<Self, ApiError> {
        let mut wishes = Self::default();
        let members = match serde_json::from_str(text) {
            Ok(Value::Object(members)) => members,
            Ok(Value::Null) => return Ok(wishes),
            _ => return Err(Place::Member("").wrong("must be an object")),
        };
        for (name, value) in members.iter().filter(|(_, value)| !value.is_null()) {
            let place = Place::Member(name);
            let number = || value.as_f64().ok_or_else(|| place.wrong("must be a number"));
            let text = || value.as_str().ok_or_else(|| place.wrong("must be text"));
            match name.as_str() {
                "overlap_weight" => wishes.set_weight(number()?, &place)?,
                "temperature" => wishes.set_temperature(number()?, &place)?,
                "policy" => wishes.set_policy(text()?, &place)?,
                "worker" => wishes.worker = Some(pin(text()?, &place)?),
                "session_id" => wishes.named = Some(text()?.to_owned()),
                "trace" => {
                    wishes.trace = value.as_bool().ok_or_else(|| place.wrong("must be true or false"))?;
                }
                "labels" => wishes.set_labels(value, &place)?,
                "reserve" => wishes.reserve = Some(reserve(text()?, &place)?),
                // Not named: it is part of somebody's body.
                _ => {
                    let known =
                        "overlap_weight, temperature, policy, worker, labels, session_id, reserve and trace";
                    return Err(Place::Member("").wrong(&format!("has an unknown member; known are {known}")));
                }
            }
        }
        Ok(wishes)
    }

    /// Reads the headers over what the body said. `tenant` keeps equal session names of different
    /// keys apart.
    pub(super) fn read(&mut self, headers: &HeaderMap, tenant: Option<&str>) -> Result<(), ApiError> {
        let named = self.named.take();
        let sent = SESSIONS.iter().find_map(|name| headers.get(name)).map(HeaderValue::as_bytes);
        if let Some(session) = sent.or(named.as_deref().map(str::as_bytes)) {
            let seed = tenant.map_or(0, |tenant| xxh3_64_with_seed(tenant.as_bytes(), 0));
            self.session = Some(xxh3_64_with_seed(session, seed));
        }
        if !headers.keys().any(|name| name.as_str().starts_with("everline-")) {
            return Ok(());
        }
        let number =
            |text: &str, place: &Place<'_>| text.parse::<f64>().map_err(|_| place.wrong("must be a number"));
        if let Some((text, place)) = text_of(headers, &OVERLAP_WEIGHT)? {
            self.set_weight(number(text, &place)?, &place)?;
        }
        if let Some((text, place)) = text_of(headers, &TEMPERATURE)? {
            self.set_temperature(number(text, &place)?, &place)?;
        }
        if let Some((text, place)) = text_of(headers, &POLICY)? {
            self.set_policy(text, &place)?;
        }
        if let Some((text, place)) = text_of(headers, &headers::WORKER)? {
            self.worker = Some(pin(text, &place)?);
        }
        if let Some((text, place)) = text_of(headers, &LABELS)? {
            // All of them together, not these beside those of the body.
            self.labels.clear();
            for label in text.split(',').map(str::trim).filter(|label| !label.is_empty()) {
                let (key, value) =
                    label.split_once('=').ok_or_else(|| place.wrong("must be key=value,key=value"))?;
                self.add_label(key.trim(), value.trim(), &place)?;
            }
        }
        if let Some((text, place)) = text_of(headers, &RESERVE)? {
            self.reserve = Some(reserve(text, &place)?);
        }
        if let Some((text, _)) = text_of(headers, &headers::TRACE)? {
            self.trace = text != "0";
        }
        Ok(())
    }

    fn set_labels(&mut self, labels: &Value, place: &Place<'_>) -> Result<(), ApiError> {
        let wrong = || place.wrong("must be an object of texts, {\"zone\": \"a\"}");
        for (key, value) in labels.as_object().ok_or_else(wrong)? {
            self.add_label(key, value.as_str().ok_or_else(wrong)?, place)?;
        }
        Ok(())
    }

    fn add_label(&mut self, key: &str, value: &str, place: &Place<'_>) -> Result<(), ApiError> {
        if self.labels.len() == MOST_LABELS {
            return Err(place.wrong(&format!("may hold {MOST_LABELS} labels at most")));
        }
        self.labels.push((key.to_owned(), value.to_owned()));
        Ok(())
    }

    fn set_weight(&mut self, weight: f64, place: &Place<'_>) -> Result<(), ApiError> {
        let o = self.overrides;
        self.overrides =
            Overrides::new(Some(weight), o.temperature(), o.policy()).map_err(|why| place.wrong(&why))?;
        Ok(())
    }

    fn set_temperature(&mut self, temperature: f64, place: &Place<'_>) -> Result<(), ApiError> {
        let o = self.overrides;
        self.overrides = Overrides::new(o.overlap_weight(), Some(temperature), o.policy())
            .map_err(|why| place.wrong(&why))?;
        Ok(())
    }

    fn set_policy(&mut self, policy: &str, place: &Place<'_>) -> Result<(), ApiError> {
        let o = self.overrides;
        self.overrides = Overrides::new(o.overlap_weight(), o.temperature(), Some(policy))
            .map_err(|why| place.wrong(&why))?;
        Ok(())
    }
}

/// Where a wish was written, for errors.
enum Place<'a> {
    Header(&'a HeaderName),
    /// A member of `everline`; empty for the whole.
    Member(&'a str),
}

impl Place<'_> {
    fn wrong(&self, why: &str) -> ApiError {
        let (kind, name): (_, Cow<'_, str>) = match self {
            Place::Header(name) => ("header", name.as_str().into()),
            Place::Member("") => ("member", "everline".into()),
            Place::Member(name) => ("member", format!("everline.{name}").into()),
        };
        ApiError::new(Code::InvalidValue, format!("the {kind} {name} cannot be used: {why}"))
            .param(name.into_owned())
    }
}

fn reserve(text: &str, place: &Place<'_>) -> Result<Reserve, ApiError> {
    match text {
        "local" => Ok(Reserve::Local),
        "linearizable" => Ok(Reserve::Linearizable),
        _ => Err(place.wrong("must be `local` or `linearizable`")),
    }
}

fn pin(text: &str, place: &Place<'_>) -> Result<(WorkerId, Option<u32>), ApiError> {
    let (id, rank) = match text.split_once('/') {
        None => (text, None),
        Some((id, rank)) => {
            let rank = rank.parse().map_err(|_| place.wrong("must end in the number of a rank"))?;
            (id, Some(rank))
        }
    };
    let id = WorkerId::parse(id).map_err(|why| place.wrong(&why.to_string()))?;
    Ok((id, rank))
}

fn text_of<'a>(
    headers: &'a HeaderMap,
    name: &'a HeaderName,
) -> Result<Option<(&'a str, Place<'a>)>, ApiError> {
    let place = Place::Header(name);
    let mut all = headers.get_all(name).iter();
    let Some(value) = all.next() else { return Ok(None) };
    if all.next().is_some() {
        return Err(place.wrong("was sent more than once"));
    }
    let text = value.to_str().map_err(|_| place.wrong("is not visible ASCII"))?;
    Ok(Some((text.trim(), place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(fields: &[(&'static str, &'static str)]) -> Result<Wishes, ApiError> {
        let headers = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value);
        }
        let mut wishes = Wishes::default();
        wishes.read(&map, Some("tenant")).map(|()| wishes)
    }

    #[test]
    fn every_wish_is_read() {
        let wishes = read(&[
            ("everline-overlap-weight", "2.5"),
            ("everline-temperature", "0.1"),
            ("everline-policy", "cache_aware"),
            ("everline-worker", "w1/3"),
            ("everline-labels", "zone=a, gpu=h100"),
            ("everline-reserve", "linearizable"),
            ("everline-trace", "1"),
            ("x-session-id", "s"),
        ])
        .unwrap();
        assert_eq!(wishes.overrides.overlap_weight(), Some(2.5));
        assert_eq!(wishes.overrides.policy(), Some("cache_aware"));
        assert_eq!(wishes.worker, Some((WorkerId::parse("w1").unwrap(), Some(3))));
        assert_eq!(wishes.labels, [("zone".into(), "a".into()), ("gpu".into(), "h100".into())]);
        assert!(wishes.reserve == Some(Reserve::Linearizable) && wishes.trace && wishes.session.is_some());
        assert_eq!(read(&[]).unwrap(), Wishes::default());
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_headers_name() {
        for (name, value) in [
            ("everline-overlap-weight", "much"),
            ("everline-overlap-weight", "-1"),
            ("everline-temperature", "NaN"),
            ("everline-policy", "best"),
            ("everline-worker", "w1/first"),
            ("everline-worker", "a b"),
            ("everline-labels", "zone"),
            ("everline-reserve", "perhaps"),
        ] {
            let error = read(&[(name, value)]).expect_err(name);
            assert_eq!((error.code, error.param.as_deref()), (Code::InvalidValue, Some(name)), "{value}");
        }
        assert!(read(&[("everline-trace", "1"), ("everline-trace", "0")]).is_err());
    }

    #[test]
    fn equal_sessions_of_different_tenants_are_different() {
        let mut headers = HeaderMap::new();
        headers.insert("x-conversation-id", HeaderValue::from_static("same"));
        let of = |tenant| {
            let mut wishes = Wishes::default();
            wishes.read(&headers, tenant).unwrap();
            wishes.session
        };
        assert_ne!(of(Some("a")), of(Some("b")));
        assert_eq!(of(Some("a")), of(Some("a")));
    }
    #[test]
    fn the_body_may_say_it_too_and_a_header_counts_more() {
        let text = r#"{"overlap_weight": 2.5, "temperature": 0, "policy": "random", "worker": "w1/3",
            "session_id": "s", "trace": true, "labels": {"zone": "a", "gpu": "h100"}, "reserve": "linearizable"}"#;
        let of_body = Wishes::of_body(text).unwrap();
        let mut wishes = of_body.clone();
        wishes.read(&HeaderMap::new(), Some("tenant")).unwrap();
        assert_eq!(wishes.overrides.overlap_weight(), Some(2.5));
        assert_eq!((wishes.overrides.temperature(), wishes.overrides.policy()), (Some(0.0), Some("random")));
        assert_eq!(wishes.worker, Some((WorkerId::parse("w1").unwrap(), Some(3))));
        assert!(wishes.trace && wishes.reserve == Some(Reserve::Linearizable));
        assert_eq!(wishes.labels, [("gpu".into(), "h100".into()), ("zone".into(), "a".into())]);
        assert_eq!(wishes.session, read(&[("x-session-id", "s")]).unwrap().session);

        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("everline-policy", "kv_cost"),
            ("everline-trace", "0"),
            ("x-session-id", "t"),
            ("everline-labels", "zone=b"),
            ("everline-reserve", "local"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let mut wishes = of_body;
        wishes.read(&headers, Some("tenant")).unwrap();
        assert_eq!(wishes.overrides.policy(), Some("kv_cost"));
        assert_eq!(wishes.overrides.overlap_weight(), Some(2.5), "of the body");
        assert!(!wishes.trace && wishes.reserve == Some(Reserve::Local));
        assert_eq!(wishes.labels, [("zone".into(), "b".into())]);
        assert_eq!(wishes.session, read(&[("x-session-id", "t")]).unwrap().session);
        assert_eq!(Wishes::of_body("null").unwrap(), Wishes::default());
    }

    #[test]
    fn what_cannot_be_in_the_body_is_refused_with_the_members_name_and_without_its_value() {
        for (text, param) in [
            (r#""secret""#, "everline"),
            (r#"{"secret": 1}"#, "everline"),
            (r#"{"overlap_weight": "secret"}"#, "everline.overlap_weight"),
            (r#"{"overlap_weight": -1}"#, "everline.overlap_weight"),
            (r#"{"temperature": 1e9}"#, "everline.temperature"),
            (r#"{"policy": 7}"#, "everline.policy"),
            (r#"{"worker": "a b"}"#, "everline.worker"),
            (r#"{"session_id": 7}"#, "everline.session_id"),
            (r#"{"trace": "yes"}"#, "everline.trace"),
            (r#"{"labels": ["secret"]}"#, "everline.labels"),
            (r#"{"labels": {"zone": 7}}"#, "everline.labels"),
            (r#"{"reserve": "secret"}"#, "everline.reserve"),
        ] {
            let error = Wishes::of_body(text).expect_err(text);
            assert_eq!((error.code, error.param.as_deref()), (Code::InvalidValue, Some(param)), "{text}");
            assert!(!error.message.contains("secret"), "{}", error.message);
        }
    }
}
