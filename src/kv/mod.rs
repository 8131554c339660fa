//! KV-cache blocks: how they are hashed, and what is said about them.
//!
//! Pure: bytes in, values out. A block goes by its [`hash::LocalHash`] (its tokens alone) and its
//! [`hash::SequenceHash`] (its tokens and all before it), both reckoned by us from token ids, so
//! that the events of any engine and the prompts of any client meet on the same keys.
//!
//! What engines publish is read by [`event`], on top of [`msgpack`]; [`feed`] knows which of it
//! comes next, what is missing, and when an engine has begun anew.

pub mod event;
pub mod feed;
pub mod hash;
pub mod index;
pub mod msgpack;
#[cfg(test)]
mod reference;
pub mod types;
pub mod wire;
