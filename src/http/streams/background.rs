//! Responses in the background: `POST /v1/responses` with `"background": true` is answered at once,
//! and generated whether anybody listens or not. Engines are asked for an ordinary stream.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode};
use memchr::memmem;
use serde_json::json;
use tokio::time::Instant;

use super::answer::{Coming, refusal, resume};
use super::calls::{Query, json_of};
use super::create::{self, ATTACHED, After, Asking, Begun, STREAM};
use super::fields::Fields;
use super::owner::{not_found, owned, unavailable};
use super::response::{after_number, id_of, is_over, object, stream_of};
use crate::http::body::FrontBody;
use crate::http::call::Call;
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::routes::Route;
use crate::ids::StreamId;
use crate::relay::copy::Copy;
use crate::relay::find::Missing;
use crate::relay::hub::Relays;
use crate::relay::listener::Refused;

/// How long a copy that is being made is waited for.
const CATCH_UP: Duration = Duration::from_secs(1);
/// How long the end of a response that was cancelled is waited for.
const LAST_WORD: Duration = Duration::from_millis(500);
/// Pause before looking again.
const PAUSE: Duration = Duration::from_millis(5);

/// What an engine is to be asked in place of this body, if it is a response's in the background.
pub(in crate::http) fn wanted(route: Route, body: &[u8]) -> Result<Option<Bytes>, ApiError> {
    if route != Route::Responses || memmem::find(body, b"\"background\"").is_none() {
        return Ok(None);
    }
    let Some(mut fields) = Fields::read(body) else { return Ok(None) };
    match fields.get("background") {
        None | Some("false" | "null") => return Ok(None),
        Some("true") => {}
        Some(_) => {
            let text = "`background` must be true or false";
            return Err(ApiError::new(Code::InvalidValue, text).param("background").no_retry());
        }
    }
    fields.remove("background");
    fields.set("stream", "true".to_owned());
    Ok(Some(fields.write().into()))
}

/// Begins a response for a client that does not listen to it.
pub(in crate::http) async fn begin(
    shard: &Shard,
    relays: &Arc<Relays>,
    asking: Asking<'_>,
) -> Result<Response<FrontBody>, ApiError> {
    let (id, copy, attached) = match create::begin(shard, relays, asking).await? {
        Begun::New(entry) => (entry.copy.id, Arc::clone(&entry.copy), false),
        Begun::Attached(id) => (id, whole(relays, id).await?, true),
    };
    let mut response = json_of(StatusCode::OK, state_of(&copy));
    if let Ok(id) = HeaderValue::try_from(id.to_string()) {
        response.headers_mut().insert(STREAM, id);
    }
    if attached {
        response.headers_mut().insert(ATTACHED, HeaderValue::from_static("1"));
    }
    Ok(response)
}

/// Answers a request about one of them.
pub(super) async fn answer(call: &Call, relays: &Arc<Relays>) -> Result<Response<FrontBody>, ApiError> {
    let shard = &call.shard;
    // Said of every response, be it there or not.
    let after = Query(call.query()).number("starting_after")?;
    let id = call.parameter().and_then(|id| stream_of(&id)).ok_or_else(not_found)?;
    let record = owned(shard, relays, id, &call.caller).await?;
    let glance = relays.glance(id, record.as_ref()).await;
    if glance.is_some_and(|glance| !glance.order.background) {
        return Err(not_found());
    }
    match (call.route, call.method()) {
        (Route::ResponseCancel, &Method::POST) => {
            let copy = whole(relays, id).await?;
            if !relays.end(id, false).await {
                return Err(unavailable());
            }
            let until = Instant::now() + LAST_WORD;
            while !copy.ended() && Instant::now() < until {
                tokio::time::sleep(PAUSE).await;
            }
            Ok(json_of(StatusCode::OK, cancelled(&copy)))
        }
        (Route::Response, &Method::DELETE) => {
            if !relays.end(id, true).await {
                return Err(unavailable());
            }
            let deleted = json!({"id": id_of(id), "object": "response", "deleted": true});
            Ok(json_of(StatusCode::OK, deleted.to_string()))
        }
        _ => {
            let streams = Query(call.query()).get("stream") == Some("true");
            if streams && call.head.method != Method::HEAD {
                return stream(shard, relays, id, after).await;
            }
            let copy = whole(relays, id).await?;
            Ok(json_of(StatusCode::OK, state_of(&copy)))
        }
    }
}

/// Lets a client listen from the event after the one of this `sequence_number`.
async fn stream(
    shard: &Shard,
    relays: &Arc<Relays>,
    id: StreamId,
    after: Option<u64>,
) -> Result<Response<FrontBody>, ApiError> {
    let Some(number) = after else { return resume(shard, relays, id, Coming::Back(None)).await };
    let (first, events) = whole(relays, id).await?.window();
    match after_number(first, &events, number) {
        // Which attempt said it the client does not know.
        Ok(seq) => {
            let after = seq.checked_sub(1).map(|seq| After { seq, of: None });
            resume(shard, relays, id, Coming::Back(after)).await
        }
        Err(next) => Err(refusal(Refused::Ahead { next })),
    }
}

/// A copy of a stream, with all that there was when it was asked for.
async fn whole(relays: &Arc<Relays>, id: StreamId) -> Result<Arc<Copy>, ApiError> {
    if let Some(entry) = relays.get(id).filter(|entry| !entry.copy.is_closed() && entry.copy.next() > 0) {
        return Ok(Arc::clone(&entry.copy));
    }
    let record = relays.directory.find(id).await;
    let events = relays.glance(id, record.as_ref()).await.map_or(0, |glance| glance.events);
    let found = match relays.get(id).filter(|entry| !entry.copy.is_closed()) {
        Some(entry) => Arc::clone(&entry.copy),
        None => match relays.find(id, 0).await {
            Ok(found) => found.entry.map_or(found.copy, |entry| Arc::clone(&entry.copy)),
            Err(missing) => return Err(refusal(Refused::Missing(missing))),
        },
    };
    let until = Instant::now() + CATCH_UP;
    while found.next() < events && !found.ended() {
        if found.is_closed() || Instant::now() >= until {
            return Err(refusal(Refused::Missing(Missing::Unavailable)));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(found)
}

fn state_of(copy: &Copy) -> String {
    let ended = copy.summary().ended;
    object(copy.id, &copy.order, copy.head().as_deref(), &copy.window().1, ended)
}

/// The same of one that was told to end: it is cancelled unless it was done before.
fn cancelled(copy: &Copy) -> String {
    let state = state_of(copy);
    if is_over(&state) {
        return state;
    }
    match Fields::read(state.as_bytes()) {
        Some(mut fields) => {
            fields.set("status", "\"cancelled\"".to_owned());
            fields.write()
        }
        None => state.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_asked_for_a_stream_and_for_nothing_in_the_background() {
        let of = |body: &str| {
            wanted(Route::Responses, body.as_bytes())
                .map(|body| body.map(|body| String::from_utf8(body.to_vec()).unwrap()))
                .map_err(|error| error.code)
        };
        let body = r#"{"model":"m","background":true,"input":"\"background\"","temperature": 0.70}"#;
        let expected = r#"{"model":"m","input":"\"background\"","temperature":0.70,"stream":true}"#;
        assert_eq!(of(body), Ok(Some(expected.to_owned())));
        assert_eq!(of(r#"{"stream":false,"background": true}"#), Ok(Some(r#"{"stream":true}"#.to_owned())));
        for not in [r#"{"background":false}"#, r#"{"input":"background"}"#, r#"{"x":{"background":true}}"#] {
            assert_eq!(of(not), Ok(None), "{not}");
        }
        assert_eq!(of(r#"{"background":1}"#), Err(Code::InvalidValue));
        assert!(wanted(Route::ChatCompletions, br#"{"background":true}"#).unwrap().is_none());
    }
}
