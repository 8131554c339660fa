//! Prefill and decode at once: SGLang, and vLLM's Mooncake connector.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use super::Members;
use super::shape::Shape;
use super::turns::one_token;

/// Room numbers are below this: they are read as signed numbers.
const ROOMS: u64 = 1 << 63;

/// What both are sent; made for one attempt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Legs {
    /// To the prefill worker.
    pub prefill: Bytes,
    /// To the decode worker.
    pub decode: Bytes,
}

/// For SGLang: the same to both, with where they meet. `room` makes numbers that nobody else has.
pub fn sglang(
    mut body: Members<'_>,
    shape: &Shape,
    (host, port): (&str, u16),
    prefill_rank: Option<u32>,
    mut room: impl FnMut() -> u64,
) -> Legs {
    let mut room = || room() % ROOMS;
    if shape.is_list {
        let each = |value: serde_json::Value| vec![value; shape.sequences];
        let rooms: Vec<u64> = (0..shape.sequences).map(|_| room()).collect();
        body.set("bootstrap_host", json!(each(host.into())).to_string());
        body.set("bootstrap_port", json!(each(port.into())).to_string());
        body.set("bootstrap_room", json!(rooms).to_string());
    } else {
        body.set("bootstrap_host", json!(host).to_string());
        body.set("bootstrap_port", port.to_string());
        body.set("bootstrap_room", room().to_string());
    }
    let prefill = body.to_bytes();
    let decode = match prefill_rank {
        Some(rank) => {
            body.set("disagg_prefill_dp_rank", rank.to_string());
            body.to_bytes()
        }
        None => prefill.clone(),
    };
    Legs { prefill, decode }
}

/// For vLLM's Mooncake connector: `id` is made for this attempt, the engine is the prefill worker's and
/// is found at `bootstrap`, a URL.
pub fn mooncake(body: &Members<'_>, id: &str, engine: &str, bootstrap: &str) -> Legs {
    let mut prefill = one_token(body);
    let params = json!({"do_remote_decode": true, "do_remote_prefill": false, "transfer_id": id});
    prefill.set("kv_transfer_params", params.to_string());
    let mut decode = body.clone();
    let params = json!({
        "do_remote_decode": false,
        "do_remote_prefill": true,
        "transfer_id": id,
        "remote_engine_id": engine,
        "remote_bootstrap_addr": bootstrap,
    });
    decode.set("kv_transfer_params", params.to_string());
    Legs { prefill: prefill.to_bytes(), decode: decode.to_bytes() }
}

/// The id of an engine's data-parallel rank, of what its Mooncake bootstrap server answers to `GET /query`.
pub fn engine_of(answer: &[u8], rank: u32) -> Option<String> {
    #[derive(Deserialize)]
    struct Entry {
        engine_id: String,
    }
    let mut ranks: std::collections::BTreeMap<String, Entry> = serde_json::from_slice(answer).ok()?;
    Some(ranks.remove(&rank.to_string())?.engine_id)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn json(bytes: &[u8]) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    fn rooms(body: &'static str, rank: Option<u32>) -> (Value, Value) {
        let members = Members::parse(body.as_bytes()).unwrap();
        let shape = Shape::of("/v1/completions", &members).unwrap();
        let mut next = u64::MAX - 5;
        let legs = sglang(members, &shape, ("10.0.0.1", 8998), rank, || {
            next += 1;
            next
        });
        (json(&legs.prefill), json(&legs.decode))
    }

    #[test]
    fn both_meet_in_one_room() {
        let (prefill, decode) = rooms(r#"{"prompt":"a","max_tokens":9,"stream":true}"#, None);
        assert_eq!(prefill, decode);
        assert_eq!(
            (&prefill["bootstrap_host"], &prefill["bootstrap_port"]),
            (&"10.0.0.1".into(), &8998.into())
        );
        assert!(prefill["bootstrap_room"].as_i64().is_some_and(|room| room > 0), "{prefill}");
        assert_eq!((&prefill["max_tokens"], &prefill["stream"]), (&9.into(), &true.into()));
    }

    #[test]
    fn several_sequences_have_a_room_each() {
        for (body, count) in [(r#"{"prompt":["a","b"],"n":2}"#, 4), (r#"{"prompt":["a"]}"#, 1)] {
            let (prefill, _) = rooms(body, None);
            let of = |name: &str| prefill[name].as_array().unwrap().clone();
            assert_eq!((of("bootstrap_host").len(), of("bootstrap_port").len()), (count, count));
            let rooms = of("bootstrap_room");
            let different: std::collections::BTreeSet<_> =
                rooms.iter().map(|r| r.as_i64().unwrap()).collect();
            assert_eq!(different.len(), count, "{rooms:?}");
        }
    }

    #[test]
    fn the_decode_worker_is_told_the_prefills_rank() {
        let (prefill, decode) = rooms(r#"{"prompt":"a"}"#, Some(3));
        assert_eq!(
            (prefill.get("disagg_prefill_dp_rank"), &decode["disagg_prefill_dp_rank"]),
            (None, &3.into())
        );
    }

    #[test]
    fn mooncake_is_told_an_id_and_where_the_other_one_is() {
        let body = Members::parse(br#"{"prompt":"a","stream":true,"max_tokens":5}"#).unwrap();
        let legs = mooncake(&body, "t1", "e1", "http://p:8998");
        let (prefill, decode) = (json(&legs.prefill), json(&legs.decode));
        assert_eq!((&prefill["max_tokens"], &prefill["stream"]), (&1.into(), &false.into()));
        assert_eq!(
            prefill["kv_transfer_params"],
            json!({"do_remote_decode": true, "do_remote_prefill": false, "transfer_id": "t1"})
        );
        assert_eq!((&decode["max_tokens"], &decode["stream"]), (&5.into(), &true.into()));
        assert_eq!(
            decode["kv_transfer_params"],
            json!({"do_remote_decode": false, "do_remote_prefill": true, "transfer_id": "t1",
                   "remote_engine_id": "e1", "remote_bootstrap_addr": "http://p:8998"})
        );
        let answer = br#"{"0":{"engine_id":"a","worker_addr":{}},"1":{"engine_id":"b","worker_addr":{"0":{"0":"x"}}}}"#;
        assert_eq!(engine_of(answer, 1).as_deref(), Some("b"));
        assert_eq!((engine_of(answer, 2), engine_of(b"[]", 0)), (None, None));
    }
}
