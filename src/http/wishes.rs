//! What a client may say about where its request goes, in headers that no worker sees.

use http::{HeaderMap, HeaderName};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::errors::{ApiError, Code};
use super::headers;
use crate::config::Reserve;
use crate::ids::WorkerId;
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
    /// `Everline-Trace: 1`: say in the answer what was known of each candidate.
    pub(super) trace: bool,
}

impl Wishes {
    /// Reads the headers. `tenant` keeps equal session names of different keys apart.
    pub(super) fn read(headers: &HeaderMap, tenant: Option<&str>) -> Result<Self, ApiError> {
        let mut wishes = Self::default();
        let text = |name: &HeaderName| text_of(headers, name);
        for name in &SESSIONS {
            if let Some(session) = headers.get(name) {
                let seed = tenant.map_or(0, |tenant| xxh3_64_with_seed(tenant.as_bytes(), 0));
                wishes.session = Some(xxh3_64_with_seed(session.as_bytes(), seed));
                break;
            }
        }
        if !headers.keys().any(|name| name.as_str().starts_with("everline-")) {
            return Ok(wishes);
        }
        let number = |name: &HeaderName| match text(name)? {
            None => Ok(None),
            Some(text) => text.parse::<f64>().map(Some).map_err(|_| wrong(name, "must be a number")),
        };
        let (weight, temperature) = (number(&OVERLAP_WEIGHT)?, number(&TEMPERATURE)?);
        Overrides::new(weight, None, None).map_err(|why| wrong(&OVERLAP_WEIGHT, &why))?;
        Overrides::new(None, temperature, None).map_err(|why| wrong(&TEMPERATURE, &why))?;
        wishes.overrides =
            Overrides::new(weight, temperature, text(&POLICY)?).map_err(|why| wrong(&POLICY, &why))?;
        wishes.worker = match text(&headers::WORKER)? {
            None => None,
            Some(text) => Some(pin(text)?),
        };
        if let Some(text) = text(&LABELS)? {
            for label in text.split(',').map(str::trim).filter(|label| !label.is_empty()) {
                let (key, value) =
                    label.split_once('=').ok_or_else(|| wrong(&LABELS, "must be key=value,key=value"))?;
                if wishes.labels.len() == MOST_LABELS {
                    return Err(wrong(&LABELS, &format!("may hold {MOST_LABELS} labels at most")));
                }
                wishes.labels.push((key.trim().to_owned(), value.trim().to_owned()));
            }
        }
        wishes.reserve = match text(&RESERVE)? {
            None => None,
            Some("local") => Some(Reserve::Local),
            Some("linearizable") => Some(Reserve::Linearizable),
            Some(_) => return Err(wrong(&RESERVE, "must be `local` or `linearizable`")),
        };
        wishes.trace = text(&headers::TRACE)?.is_some_and(|text| text != "0");
        Ok(wishes)
    }
}

fn pin(text: &str) -> Result<(WorkerId, Option<u32>), ApiError> {
    let (id, rank) = match text.split_once('/') {
        None => (text, None),
        Some((id, rank)) => {
            let rank =
                rank.parse().map_err(|_| wrong(&headers::WORKER, "must end in the number of a rank"))?;
            (id, Some(rank))
        }
    };
    let id = WorkerId::parse(id).map_err(|why| wrong(&headers::WORKER, &why.to_string()))?;
    Ok((id, rank))
}

fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, ApiError> {
    let mut all = headers.get_all(name).iter();
    let (Some(value), None) = (all.next(), all.next()) else {
        return if headers.contains_key(name) {
            Err(wrong(name, "was sent more than once"))
        } else {
            Ok(None)
        };
    };
    value.to_str().map(|text| Some(text.trim())).map_err(|_| wrong(name, "is not visible ASCII"))
}

fn wrong(name: &HeaderName, why: &str) -> ApiError {
    ApiError::new(Code::InvalidValue, format!("the header {name} cannot be used: {why}"))
        .param(name.to_string())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn read(fields: &[(&'static str, &'static str)]) -> Result<Wishes, ApiError> {
        let headers = fields
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value);
        }
        Wishes::read(&map, Some("tenant"))
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
        let of = |tenant| Wishes::read(&headers, tenant).unwrap().session;
        assert_ne!(of(Some("a")), of(Some("b")));
        assert_eq!(of(Some("a")), of(Some("a")));
    }
}
