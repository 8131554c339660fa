//! Output streams over HTTP: creating one, generating one, and handing it to a client.
//!
//! A request with `"stream": true` is read and admitted here, at the client's replica, and given to
//! [`crate::relay`], which has it generated at another one ([`generate`]; how it ends otherwise is in
//! [`failing`]) and lets the client listen ([`answer`] has the head, [`body`] what follows). Where the
//! chosen worker has a node agent, that generates it ([`at_agent`]). What else a client may do with its
//! streams is in [`calls`], responses that are generated in the background are in [`background`].

mod answer;
pub(super) mod at_agent;
pub(super) mod background;
pub(super) mod body;
pub(super) mod calls;
pub(super) mod create;
pub(super) mod event_source;
pub(super) mod failing;
mod fields;
pub(super) mod gauges;
pub(super) mod generate;
pub(super) mod legs;
pub(super) mod operators;
mod options;
mod owner;
mod places;
pub(super) mod response;

pub use at_agent::takes;
pub use failing::NoEngines;
pub use generate::Generator;
pub use options::StreamOptions;
pub use places::Places;
