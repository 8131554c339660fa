//! Engines that do a part of requests each, and hand the KV cache on: how they are started and registered.

use everline::admin_types::RegisterRequest;
use everline::state::worker::{Connector, EngineKind, WorkerRole};

/// How engines hand over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// vLLM's NIXL connector, that pulls.
    Nixl,
    /// The one that pushes.
    NixlPush,
    /// vLLM's Mooncake connector.
    Mooncake,
    /// SGLang's.
    Sglang,
}

impl Handover {
    /// Flags of a simulated engine with this role; a prefill engine has its bootstrap server at this port.
    pub fn args(self, role: WorkerRole, bootstrap: u16) -> Vec<String> {
        let protocol = match self {
            Self::Nixl => "vllm-nixl",
            Self::NixlPush => "vllm-nixl-push",
            Self::Mooncake => "vllm-mooncake",
            Self::Sglang => "sglang",
        };
        let role = if role == WorkerRole::Prefill { "prefill" } else { "decode" };
        let bootstrap = bootstrap.to_string();
        let args = match self {
            Self::Nixl | Self::NixlPush => ["--side-channel-host", "127.0.0.1", "--side-channel-port", "0"],
            Self::Mooncake | Self::Sglang => ["--role", role, "--disaggregation-bootstrap-port", &bootstrap],
        };
        let metrics = (self == Self::Sglang).then_some("--enable-metrics");
        ["--pd", protocol].into_iter().chain(args).chain(metrics).map(str::to_owned).collect()
    }

    /// Says to a replica what such an engine is.
    pub fn describe(self, bootstrap: u16, request: &mut RegisterRequest) {
        match self {
            Self::Nixl | Self::NixlPush => {}
            Self::Mooncake => request.connector = Some(Connector::Mooncake),
            Self::Sglang => request.engine = Some(EngineKind::Sglang),
        }
        let has_bootstrap = matches!(self, Self::Mooncake | Self::Sglang);
        if has_bootstrap && request.role == Some(WorkerRole::Prefill) {
            request.bootstrap_port = Some(bootstrap);
        }
    }
}
