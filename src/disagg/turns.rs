//! Prefill and decode in turn: vLLM's NIXL (pull and push), MoRI-IO, P2pNccl, and stores that both know.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::Members;
use crate::state::worker::Connector;

/// A request whose prefill is to be done.
#[derive(Debug)]
pub struct Prefilling<'a> {
    connector: Connector,
    body: Members<'a>,
    /// Made for this attempt.
    id: String,
    request_id: Option<String>,
}

/// What came of a prefill.
#[derive(Debug)]
pub enum Prefilled<'a> {
    /// The answer ended with the first token: it is the client's.
    Complete,
    /// A decode worker has to go on.
    HandedOver(Handoff<'a>),
}

/// Why an answer is of no use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unusable {
    /// It is not what an engine answers.
    #[error("its answer to the prefill cannot be read")]
    Unreadable,
    /// The engine gave the request up.
    #[error("it gave the prefill up")]
    GaveUp,
    /// Nothing says where the blocks are.
    #[error("it answered the prefill without kv_transfer_params; is a KV connector configured there?")]
    NoParameters,
}

/// Parameters that waited for too long: the blocks may be somebody else's by now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("what it prefilled was not fetched within {} s", .0.as_secs_f32())]
pub struct Expired(pub Duration);

impl<'a> Prefilling<'a> {
    /// Of a request with this body. `id` is made for this attempt only; `addresses` are what the engines
    /// call themselves to each other, the prefill's first.
    pub fn new(connector: Connector, body: Members<'a>, id: String, addresses: Option<(&str, &str)>) -> Self {
        let request_id = addresses
            .filter(|_| connector.wants_side_channel())
            .map(|(prefill, decode)| format!("___prefill_addr_{prefill}___decode_addr_{decode}_{id}"));
        Self { connector, body, id, request_id }
    }

    /// What both are sent as the request's id, where that has a meaning for the engines.
    pub fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }

    /// What the prefill worker is sent: one token is wanted, in one piece.
    pub fn body(&self) -> Bytes {
        let mut body = one_token(&self.body);
        match self.connector {
            Connector::Nixl => body.set("kv_transfer_params", self.params().to_string()),
            Connector::Moriio => {
                let mut params = self.params();
                params["transfer_id"] = self.id.as_str().into();
                body.set("kv_transfer_params", params.to_string());
            }
            _ => body.remove("kv_transfer_params"),
        }
        body.to_bytes()
    }

    fn params(&self) -> serde_json::Value {
        json!({
            "do_remote_decode": true,
            "do_remote_prefill": false,
            "remote_engine_id": null,
            "remote_block_ids": null,
            "remote_host": null,
            "remote_port": null,
        })
    }

    /// What the prefill worker's answer means.
    pub fn answered(self, answer: &[u8]) -> Result<Prefilled<'a>, Unusable> {
        let answer = Answer::parse(answer)?;
        if answer.is_complete()? {
            return Ok(Prefilled::Complete);
        }
        let params = match self.connector {
            Connector::Nixl | Connector::Moriio => {
                let params =
                    answer.kv_transfer_params.map(RawValue::get).filter(|json| json.starts_with('{'));
                Some(params.ok_or(Unusable::NoParameters)?.to_owned())
            }
            _ => None,
        };
        Ok(Prefilled::HandedOver(Handoff { body: self.body, params }))
    }
}

/// What matters of a prefill worker's answer.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    #[serde(borrow, default)]
    kv_transfer_params: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

impl<'a> Answer<'a> {
    fn parse(answer: &'a [u8]) -> Result<Self, Unusable> {
        serde_json::from_slice(answer).map_err(|_| Unusable::Unreadable)
    }

    fn is_complete(&self) -> Result<bool, Unusable> {
        let [choice] = self.choices.as_slice() else { return Err(Unusable::Unreadable) };
        match choice.finish_reason.as_deref() {
            Some("length") => Ok(false),
            Some("abort" | "error") => Err(Unusable::GaveUp),
            Some(_) => Ok(true),
            None => Err(Unusable::Unreadable),
        }
    }
}

/// Whether a prefill worker's answer ended with its one token, so that it is the client's.
pub fn is_complete(answer: &[u8]) -> Result<bool, Unusable> {
    Answer::parse(answer)?.is_complete()
}

/// What a decode worker needs to go on where a prefill worker stopped. Good for one request: it cannot
/// be copied, and its use takes it.
#[derive(Debug)]
pub struct Handoff<'a> {
    body: Members<'a>,
    params: Option<String>,
}

impl Handoff<'_> {
    /// What the decode worker is sent. `waited` is how long ago the prefill worker began to answer: since
    /// then its blocks wait. Refused where that is `most` or longer.
    pub fn spend(mut self, waited: Duration, most: Duration) -> Result<Bytes, Expired> {
        match self.params {
            Some(_) if waited >= most => return Err(Expired(most)),
            Some(params) => self.body.set("kv_transfer_params", params),
            None => self.body.remove("kv_transfer_params"),
        }
        Ok(self.body.to_bytes())
    }
}

/// A request that one engine does, which could do a part: without what a client says of transfers, by
/// which it would read what belongs to others. `None` if it says nothing of them.
pub fn without_transfer(body: &[u8]) -> Option<Bytes> {
    const NAME: &str = "kv_transfer_params";
    // Seldom: names can be written in other ways only by who means to.
    let may_have =
        memchr::memmem::find(body, NAME.as_bytes()).is_some() || memchr::memmem::find(body, b"\\u").is_some();
    let mut members = may_have.then(|| Members::parse(body))??;
    members.get(NAME)?;
    members.remove(NAME);
    Some(members.to_bytes())
}

/// The request for its first token only. Where the client wants at least some tokens, no token and no
/// text may end it: engines have no least number of tokens above the most.
pub(super) fn one_token<'a>(body: &Members<'a>) -> Members<'a> {
    let mut body = body.clone();
    let least = ["min_tokens", "min_completion_tokens"].map(|name| body.number(name).unwrap_or(0));
    for name in ["stream_options", "min_tokens", "min_completion_tokens"] {
        body.remove(name);
    }
    if least.into_iter().any(|least| least > 0) {
        body.set("ignore_eos", "true");
        body.remove("stop");
        body.remove("stop_token_ids");
    }
    body.set("stream", "false");
    body.set("max_tokens", "1");
    body.replace("max_completion_tokens", "1");
    body
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const BODY: &[u8] = br#"{"model":"m","prompt":"a","stream":true,"stream_options":{"include_usage":true},
        "max_tokens":7,"max_completion_tokens":7,"min_tokens":0,"seed":12345678901234567890}"#;
    const PARAMS: &str = r#"{ "do_remote_prefill":true, "remote_block_ids":[[1,2]], "x":1.50 }"#;
    const LEASE: Duration = Duration::from_secs(25);

    fn prefilling(connector: Connector) -> Prefilling<'static> {
        Prefilling::new(connector, Members::parse(BODY).unwrap(), "id".into(), Some(("p:1", "d:2")))
    }

    fn answer(finish: &str, params: &str) -> String {
        format!(r#"{{"choices":[{{"text":"x","finish_reason":{finish}}}],"kv_transfer_params":{params}}}"#)
    }

    fn json(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn a_prefill_asks_for_one_token_in_one_piece() {
        let sent = json(&prefilling(Connector::Nixl).body());
        assert_eq!((&sent["stream"], &sent["max_tokens"]), (&Value::from(false), &Value::from(1)));
        assert_eq!(
            (&sent["max_completion_tokens"], &sent["seed"]),
            (&1.into(), &12345678901234567890_u64.into())
        );
        for gone in ["stream_options", "min_tokens", "ignore_eos"] {
            assert!(sent.get(gone).is_none(), "{gone}");
        }
        let params = &sent["kv_transfer_params"];
        assert_eq!(
            (&params["do_remote_decode"], &params["do_remote_prefill"]),
            (&true.into(), &false.into())
        );
        for name in ["remote_engine_id", "remote_block_ids", "remote_host", "remote_port"] {
            assert_eq!(params.get(name), Some(&Value::Null), "{name}");
        }
        assert!(params.get("transfer_id").is_none());
        assert_eq!(json(&prefilling(Connector::Moriio).body())["kv_transfer_params"]["transfer_id"], "id");
        assert!(json(&prefilling(Connector::Shared).body()).get("kv_transfer_params").is_none());
    }

    #[test]
    fn nothing_ends_the_prefill_of_a_request_that_wants_some_tokens() {
        let body = br#"{"prompt":"a","min_tokens":3,"stop":["x"],"stop_token_ids":[7]}"#;
        let sent = json(&one_token(&Members::parse(body).unwrap()).to_bytes());
        assert_eq!(sent["ignore_eos"], true);
        assert!(
            ["min_tokens", "stop", "stop_token_ids", "max_completion_tokens"]
                .iter()
                .all(|m| sent.get(m).is_none())
        );
    }

    #[test]
    fn parameters_pass_as_they_are_and_the_rest_is_the_clients() {
        let prefilled = prefilling(Connector::Nixl).answered(answer("\"length\"", PARAMS).as_bytes());
        let Ok(Prefilled::HandedOver(handoff)) = prefilled else { panic!("{prefilled:?}") };
        let sent = handoff.spend(Duration::from_secs(24), LEASE).unwrap();
        let text = String::from_utf8_lossy(&sent).into_owned();
        assert!(text.contains(&format!("\"kv_transfer_params\":{PARAMS}")), "{text}");
        let sent = json(&sent);
        assert_eq!(
            (&sent["stream"], &sent["max_tokens"], &sent["min_tokens"]),
            (&true.into(), &7.into(), &0.into())
        );
        assert_eq!(sent["stream_options"]["include_usage"], true);
    }

    #[test]
    fn parameters_that_waited_are_not_used() {
        for (waited, is_good) in [(24_999, true), (25_000, false), (60_000, false)] {
            let prefilled = prefilling(Connector::Nixl).answered(answer("\"length\"", PARAMS).as_bytes());
            let Ok(Prefilled::HandedOver(handoff)) = prefilled else { panic!("{prefilled:?}") };
            let spent = handoff.spend(Duration::from_millis(waited), LEASE);
            assert_eq!(spent.is_ok(), is_good, "{waited}");
        }
    }

    #[test]
    fn an_answer_that_ended_is_complete_and_one_without_parameters_is_of_no_use() {
        let come = |connector, answer: String| prefilling(connector).answered(answer.as_bytes());
        for finish in ["\"stop\"", "\"tool_calls\""] {
            for params in ["null", PARAMS] {
                let prefilled = come(Connector::Nixl, answer(finish, params));
                assert!(matches!(prefilled, Ok(Prefilled::Complete)), "{prefilled:?}");
            }
        }
        for (answer, why) in [
            (answer("\"length\"", "null"), Unusable::NoParameters),
            (answer("\"abort\"", PARAMS), Unusable::GaveUp),
            (answer("null", PARAMS), Unusable::Unreadable),
            (r#"{"choices":[],"kv_transfer_params":{}}"#.to_owned(), Unusable::Unreadable),
            ("oops".to_owned(), Unusable::Unreadable),
        ] {
            assert_eq!(come(Connector::Nixl, answer).unwrap_err(), why);
        }
        // A store needs no word.
        let prefilled = come(Connector::Shared, answer("\"length\"", "null"));
        let Ok(Prefilled::HandedOver(handoff)) = prefilled else { panic!("{prefilled:?}") };
        let sent = handoff.spend(LEASE * 2, LEASE).unwrap();
        assert!(json(&sent).get("kv_transfer_params").is_none());
    }

    #[test]
    fn a_client_cannot_name_the_blocks_of_others() {
        let without = |body: &str| {
            without_transfer(body.as_bytes()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        };
        let wanted = Some(r#"{"prompt":"a"}"#.to_owned());
        assert_eq!(without(r#"{"prompt":"a","kv_transfer_params":{"x":1}}"#), wanted);
        assert_eq!(without(r#"{"prompt":"a","kv_transfer_p\u0061rams":{"x":1}}"#), wanted);
        for other in [
            r#"{"prompt":"kv_transfer_params"}"#,
            r#"{"kv_transfer_params":null}"#,
            r#"{"a":"\u0061"}"#,
            "oops",
        ] {
            assert_eq!(without(other), None, "{other}");
        }
    }

    #[test]
    fn addresses_are_in_the_id_where_engines_read_them_there() {
        let wanted = "___prefill_addr_p:1___decode_addr_d:2_id";
        assert_eq!(prefilling(Connector::P2pNccl).request_id(), Some(wanted));
        assert_eq!(prefilling(Connector::Moriio).request_id(), Some(wanted));
        assert_eq!(prefilling(Connector::Nixl).request_id(), None);
    }
}
