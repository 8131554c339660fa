//! `POST /v1/admin/explain`: where a request would go and why, without sending it anywhere.

use axum::Json;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use super::attempts::plan::parts;
use super::attempts::refusal;
use super::call::Call;
use super::errors::{ApiError, Code};
use super::front::Front;
use super::keys::Caller;
use super::placing::Placing;
use super::proxy::{look_at, tokenised};
use super::routes::{self, Listener, Route};
use crate::admin_types::{CandidateReply, ExplainReply, ExplainRequest, MOST_EXPLAINED, PrefillReply};
use crate::routing::rehearse::Rehearsal;
use crate::routing::select::Explained;

/// Answers an operator. Nothing of the request is kept or logged.
pub(super) async fn answer(call: Call) -> Result<Response, ApiError> {
    let shard = std::sync::Arc::clone(&call.shard);
    let request: ExplainRequest = call.json().await?;
    Ok(Json(explain(&shard.front, request).await?).into_response())
}

async fn explain(front: &Front, request: ExplainRequest) -> Result<ExplainReply, ApiError> {
    let route = proxied(&request.route)?;
    let headers = headers(&request)?;
    let body = Bytes::from(String::from(Box::<str>::from(request.body)));
    let mut asked = look_at(route, &headers, &body, &Caller::default()).await?;
    // Whoever asks wants to know of prefixes even where the policy does not care.
    asked.placing.wishes.trace = true;
    tokenised(front, route, &mut asked, &body).await;
    let model = asked.model.as_deref();
    let placing = &asked.placing;
    let parts = parts(front, placing, model, route.path(), &body);
    let first = parts.first().copied().unwrap_or_default();
    let rehearsal = placing.rehearse(front, model, first).map_err(|why| refusal(model, &why))?;
    let (waits, last_resort) = (rehearsal.waits, rehearsal.last_resort);
    let (candidates, more) = listed(front, placing, rehearsal);
    let prefill = match parts.as_slice() {
        [_, part] => {
            let rehearsal = placing.rehearse(front, model, *part).map_err(|why| refusal(model, &why))?;
            let (candidates, more) = listed(front, placing, rehearsal);
            Some(PrefillReply { policy: placing.policy_name(front, *part).to_owned(), candidates, more })
        }
        _ => None,
    };
    Ok(ExplainReply {
        replica: front.config.replica.clone(),
        model: model.map(str::to_owned),
        policy: placing.policy_name(front, first).to_owned(),
        prompt_tokens: placing.prompt_tokens,
        source: placing.source().to_owned(),
        view_age_ms: front.control.view_age_ms(),
        waits,
        last_resort,
        candidates,
        more,
        prefill,
    })
}

/// A rehearsal's candidates, the likeliest first, and how many are left out.
fn listed(front: &Front, placing: &Placing, mut rehearsal: Rehearsal) -> (Vec<CandidateReply>, usize) {
    rehearsal.ranks.sort_by(|(a, share_a), (b, share_b)| {
        let cost = |explained: &Explained| explained.terms.map_or(f64::INFINITY, |terms| terms.total());
        share_b
            .total_cmp(share_a)
            .then_with(|| a.filtered.is_some().cmp(&b.filtered.is_some()))
            .then_with(|| cost(a).total_cmp(&cost(b)))
    });
    let candidates = rehearsal.ranks.iter().map(|(explained, share)| {
        let mut candidate = placing.candidate(front, explained);
        candidate.share = Some(*share);
        candidate
    });
    let mut candidates: Vec<CandidateReply> = candidates.collect();
    let more = candidates.len().saturating_sub(MOST_EXPLAINED);
    candidates.truncate(MOST_EXPLAINED);
    (candidates, more)
}

/// The route of a path, which must be one that goes to workers.
fn proxied(path: &str) -> Result<Route, ApiError> {
    match routes::find(Listener::Client, false, &Method::POST, path) {
        Ok(route) if route.is_proxied() => Ok(route),
        Ok(_) | Err(_) => {
            let text =
                "`route` must be the path of a route that goes to workers, such as /v1/chat/completions";
            Err(ApiError::new(Code::InvalidValue, text).param("route"))
        }
    }
}

fn headers(request: &ExplainRequest) -> Result<HeaderMap, ApiError> {
    let wrong = |text: &'static str| ApiError::new(Code::InvalidValue, text).param("headers");
    let mut headers = HeaderMap::new();
    for (name, value) in &request.headers {
        let name = HeaderName::try_from(name).map_err(|_| wrong("`headers` has a name that is none"))?;
        let value = HeaderValue::try_from(value).map_err(|_| wrong("`headers` has a value that is none"))?;
        if headers.insert(name, value).is_some() {
            return Err(wrong("`headers` has a name twice"));
        }
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(headers)
}
