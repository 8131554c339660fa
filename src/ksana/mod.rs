//! KsanaLLM's wire: bodies as the reference router reads and writes them, and the framing of its
//! streams. Bytes and values in, bytes and values out.
//!
//! Reading order: [`json`] (Python's, whose errors and numbers show on the wire) → [`fields`] (what
//! pydantic says of a body) → [`register`] and [`reply`] (the management routes) → [`merge`] (two
//! legs' bytes into one stream).

pub mod fields;
pub mod json;
pub mod merge;
pub mod register;
pub mod reply;
