//! Which protocol an engine hands requests over by, and as what.

use clap::{Args, ValueEnum};

use crate::engines::sim::ksana::KsanaArgs;

/// How two engines split a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    /// vLLM's `NixlConnector`: the decode engine fetches what the prefill engine keeps.
    VllmNixl,
    /// vLLM's `NixlPushConnector`: the prefill engine writes to the decode engine.
    VllmNixlPush,
    /// vLLM's `MooncakeConnector`: both engines get the request at once, with an id for the transfer.
    VllmMooncake,
    /// SGLang: both engines get the request at once, and meet in a room.
    Sglang,
    /// KsanaLLM: both engines get the request at once, with headers of the router they register with.
    Ksana,
}

impl Protocol {
    /// Whether it is one of vLLM's connectors.
    pub fn is_vllm(self) -> bool {
        matches!(self, Self::VllmNixl | Self::VllmNixlPush | Self::VllmMooncake)
    }
}

/// What an engine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Generates from prompts that another engine has computed.
    Decode,
}

/// Flags of engines that split requests with others.
#[derive(Args, Clone, Debug)]
pub struct PdArgs {
    /// Split requests with other engines, by this protocol.
    #[arg(long = "pd", value_name = "PROTOCOL", value_enum)]
    pub protocol: Option<Protocol>,
    /// What this engine is for. vLLM's connector asks the request, and does either.
    #[arg(long, value_enum, requires = "protocol")]
    pub role: Option<Role>,
    /// Host of vLLM's side channel, told to decode engines.
    #[arg(long, value_name = "HOST", env = "VLLM_NIXL_SIDE_CHANNEL_HOST", default_value = "localhost")]
    pub side_channel_host: String,
    /// Its port, to which the rank is added; 0 takes a free one.
    #[arg(long, value_name = "PORT", env = "VLLM_NIXL_SIDE_CHANNEL_PORT", default_value_t = 5600)]
    pub side_channel_port: u16,
    /// Port of the bootstrap server that SGLang's prefill engine has at the host of --listen, and every
    /// engine with Mooncake but those for decode; 0 for a free one. SGLang's decode engine asks there where a
    /// request names none.
    #[arg(long, value_name = "PORT", default_value_t = 8998)]
    pub disaggregation_bootstrap_port: u16,
    /// Seconds that SGLang's prefill engine waits for the decode engine of a request.
    #[arg(long, value_name = "SECONDS", env = "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", default_value_t = 300.0,
        value_parser = seconds)]
    pub bootstrap_timeout: f64,
    /// Seconds that SGLang's decode engine waits for the KV of a prompt.
    #[arg(long, value_name = "SECONDS", env = "SGLANG_DISAGGREGATION_WAITING_TIMEOUT", default_value_t = 300.0,
        value_parser = seconds)]
    pub waiting_timeout: f64,
    /// Seconds that vLLM's prefill engine keeps blocks which nobody fetches; `kv_lease_duration`.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    pub kv_lease_seconds: f64,
    /// Seconds that engines with vLLM's Mooncake connector wait for each other.
    #[arg(long, value_name = "SECONDS", env = "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT", default_value_t = 480.0,
        value_parser = seconds)]
    pub mooncake_abort_timeout: f64,
    /// How a KsanaLLM node registers.
    #[command(flatten)]
    pub ksana: KsanaArgs,
}

impl PdArgs {
    /// Whether it is one of vLLM's connectors, which ask each request what it is.
    pub fn is_vllm(&self) -> bool {
        self.protocol.is_some_and(Protocol::is_vllm)
    }

    /// Whether it has a bootstrap server beside it.
    pub fn has_bootstrap(&self) -> bool {
        match self.protocol {
            Some(Protocol::Sglang) => self.is_prefill(),
            Some(Protocol::VllmMooncake) => self.role != Some(Role::Decode),
            _ => false,
        }
    }

    /// Whether prompts are computed here for an engine that meets this one.
    pub fn is_prefill(&self) -> bool {
        self.role == Some(Role::Prefill) && !self.is_vllm()
    }

    /// Whether this one meets the engines that compute its prompts.
    pub fn is_decode(&self) -> bool {
        self.role == Some(Role::Decode) && !self.is_vllm()
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.001..=86_400.0).contains(&number) => Ok(number),
        _ => Err("must be a number of seconds from 0.001 to 86400".into()),
    }
}
