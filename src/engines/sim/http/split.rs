//! What a request says of another engine, in the members that routers put in for prefill and decode.

use std::sync::Arc;

use serde_json::Value;

use super::error::ApiError;
use crate::engines::sim::options::EngineSimArgs;
use crate::engines::sim::pd::nixl::{Asked, Pusher};
use crate::engines::sim::pd::{Mode, Protocol, Source, mooncake};
use crate::engines::sim::scheduler::{Leg, Loan, Meeting};

/// What a request has to do with another engine.
#[derive(Clone, Debug)]
pub(super) enum Split {
    /// Nothing.
    None,
    /// vLLM's `kv_transfer_params` for NIXL.
    Nixl(Asked, Mode),
    /// The same for Mooncake.
    Mooncake(mooncake::Asked),
    /// SGLang's rooms, one for each choice.
    Rooms {
        /// Whether the prompts are computed here.
        prefill: bool,
        /// Bootstrap server and room.
        rooms: Vec<(String, u64)>,
        /// What the client calls the request.
        rid: Option<String>,
    },
    /// KsanaLLM's prefill.
    CommPrefill {
        /// The request's number.
        id: i32,
    },
    /// KsanaLLM's decode.
    CommDecode {
        /// The request's number.
        id: i32,
        /// The group that both engines are in, by its key.
        group: String,
    },
    /// Something that will never come is waited for.
    Stranded,
}

impl Split {
    /// Reads a body that asks for so many choices.
    pub(super) fn read(body: &Value, choices: usize, args: &EngineSimArgs) -> Result<Self, ApiError> {
        let given = |name: &str| body.get(name).filter(|value| !value.is_null());
        match (args.pd.protocol, given("kv_transfer_params")) {
            (Some(Protocol::Sglang), _) => rooms(body, choices, args),
            (Some(Protocol::VllmNixl), Some(params)) if params.is_object() => {
                Ok(Self::Nixl(Asked::read(params, Mode::Pull), Mode::Pull))
            }
            (Some(Protocol::VllmNixlPush), Some(params)) if params.is_object() => {
                Ok(Self::Nixl(Asked::read(params, Mode::Push), Mode::Push))
            }
            (Some(Protocol::VllmMooncake), Some(params)) if params.is_object() => {
                Ok(Self::Mooncake(mooncake::Asked::read(params)))
            }
            (Some(protocol), Some(other)) if protocol.is_vllm() => {
                let message = "Input should be a valid dictionary";
                Err(ApiError::field("dict_type", "kv_transfer_params", message, other))
            }
            // KsanaLLM's is in the headers.
            _ => Ok(Self::None),
        }
    }

    /// Whether prompts are computed for an engine that is met.
    pub(super) fn is_prefill(&self) -> bool {
        matches!(self, Self::Rooms { prefill: true, .. } | Self::CommPrefill { .. })
    }

    /// The room of its first choice, if there are any.
    pub(super) fn first_room(&self) -> Option<u64> {
        match self {
            Self::Rooms { rooms, .. } => rooms.first().map(|(_, room)| *room),
            _ => None,
        }
    }

    /// Whether its blocks are nobody else's.
    pub(super) fn keeps_to_itself(&self) -> bool {
        matches!(self, Self::Rooms { prefill: false, .. })
    }

    /// What the sequence of this choice and id has to do with it.
    pub(super) fn leg(&self, choice: usize, rid: &str) -> Option<Leg> {
        match self {
            Self::None | Self::Nixl(Asked::Nothing, _) | Self::Mooncake(mooncake::Asked::Nothing) => None,
            Self::Nixl(Asked::Lend, mode) => {
                // vLLM adds this to ids, so that the same one can be there twice.
                let id: Arc<str> = format!("{rid}-{:08x}", rand::random::<u32>()).into();
                let given = *mode == Mode::Push;
                let key = if given { rid.into() } else { Arc::clone(&id) };
                Some(Leg::Lend(Arc::new(Loan { id, key, told: Some(*mode), given })))
            }
            Self::Nixl(Asked::Fetch(remote), _) => Some(Leg::Fetch(Arc::new(Source::Nixl(remote.clone())))),
            Self::Nixl(Asked::Await(pusher), _) => {
                let pusher = Pusher { key: rid.to_owned(), ..pusher.clone() };
                Some(Leg::Fetch(Arc::new(Source::Pushed(pusher))))
            }
            Self::Nixl(Asked::Fatal, _) => Some(Leg::Fatal),
            Self::Mooncake(mooncake::Asked::Give(id)) => {
                let (id, key) = (rid.into(), id.as_str().into());
                Some(Leg::Lend(Arc::new(Loan { id, key, told: None, given: true })))
            }
            Self::Mooncake(mooncake::Asked::Take(transfer)) => {
                Some(Leg::Fetch(Arc::new(Source::Mooncake(transfer.clone()))))
            }
            Self::Nixl(Asked::Stranded, _) | Self::Mooncake(mooncake::Asked::Stranded) | Self::Stranded => {
                Some(Leg::Stranded)
            }
            // One of several choices is the one that both engines know.
            Self::CommPrefill { .. } | Self::CommDecode { .. } if choice > 0 => None,
            Self::CommPrefill { id } => {
                let meeting = Meeting { key: id.to_string().into(), rid: rid.to_owned(), eager: true };
                Some(Leg::Meet(Arc::new(meeting)))
            }
            Self::CommDecode { id, group } => {
                Some(Leg::Fetch(Arc::new(Source::Comm { group: group.clone(), id: *id })))
            }
            Self::Rooms { prefill, rooms, rid: named } => {
                let (bootstrap, room) = rooms.get(choice)?.clone();
                let rid = named.clone().unwrap_or_else(|| rid.to_owned());
                Some(match prefill {
                    true => {
                        let key = room.to_string().into();
                        Leg::Meet(Arc::new(Meeting { key, rid, eager: false }))
                    }
                    false => Leg::Fetch(Arc::new(Source::Room { bootstrap, room, rid })),
                })
            }
        }
    }
}

/// SGLang's members: one value for all choices, or a list with one for each. A single room is counted up.
fn rooms(body: &Value, choices: usize, args: &EngineSimArgs) -> Result<Split, ApiError> {
    let wrong =
        |name: &str| ApiError::bad_request(format!("{name} does not fit the {choices} prompts"), Some(name));
    let of_choice = |name: &'static str, choice: usize| match &body[name] {
        Value::Array(list) if list.len() == choices => Ok(list[choice].clone()),
        Value::Array(_) => Err(wrong(name)),
        one => Ok(one.clone()),
    };
    let mut rooms = Vec::with_capacity(choices);
    for choice in 0..choices {
        let room = match of_choice("bootstrap_room", choice)? {
            Value::Null => {
                let rid = body["rid"].as_str().unwrap_or_default();
                let message = format!(
                    "Invalid request: Disaggregated request received without bootstrap room id. req.rid='{rid}'"
                );
                return Err(ApiError::bad_request(message, None));
            }
            room => room.as_u64().ok_or_else(|| wrong("bootstrap_room"))?,
        };
        let counted = if body["bootstrap_room"].is_array() { 0 } else { choice as u64 };
        // As Python writes what is missing.
        let host = match of_choice("bootstrap_host", choice)? {
            Value::Null => "None".to_owned(),
            host => host.as_str().ok_or_else(|| wrong("bootstrap_host"))?.to_owned(),
        };
        let port = match of_choice("bootstrap_port", choice)? {
            Value::Null => u64::from(args.pd.disaggregation_bootstrap_port),
            port => port.as_u64().ok_or_else(|| wrong("bootstrap_port"))?,
        };
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
        rooms.push((format!("{host}:{port}"), room.wrapping_add(counted)));
    }
    let rid = body["rid"].as_str().map(str::to_owned);
    Ok(Split::Rooms { prefill: args.pd.is_prefill(), rooms, rid })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::engines::sim::pd::Role;

    fn read(body: &Value, choices: usize) -> Result<Vec<(String, u64)>, String> {
        let mut args = EngineSimArgs::defaults();
        (args.pd.protocol, args.pd.role) = (Some(Protocol::Sglang), Some(Role::Decode));
        match Split::read(body, choices, &args) {
            Ok(Split::Rooms { prefill: false, rooms, .. }) => Ok(rooms),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error.message),
        }
    }

    #[test]
    fn rooms_are_one_for_each_choice() {
        let one = json!({"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7});
        assert_eq!(read(&one, 1).unwrap(), [("h:1".to_owned(), 7)]);
        assert_eq!(read(&one, 2).unwrap(), [("h:1".to_owned(), 7), ("h:1".to_owned(), 8)]);
        let list =
            json!({"bootstrap_host": ["h", "::1"], "bootstrap_port": [1, null], "bootstrap_room": [7, 3]});
        assert_eq!(read(&list, 2).unwrap(), [("h:1".to_owned(), 7), ("[::1]:8998".to_owned(), 3)]);
        assert!(read(&list, 3).unwrap_err().contains("bootstrap_room"));
        let none = read(&json!({"rid": "r", "bootstrap_host": "h"}), 1).unwrap_err();
        assert_eq!(
            none,
            "Invalid request: Disaggregated request received without bootstrap room id. req.rid='r'"
        );
        assert!(read(&json!({"bootstrap_room": "x"}), 1).is_err());
    }
}
