//! The cluster: Raft, its storage and its peer links. The only module that names openraft or
//! sled.

pub mod api;
pub mod storage;
