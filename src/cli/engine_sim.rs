//! `everline engine-sim`

use std::net::SocketAddr;

use super::output::{Failure, Out};

/// Run a simulated engine that speaks like vLLM
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Model it pretends to serve
    #[arg(long, default_value = "everline-demo")]
    model: String,
}

impl Args {
    pub(crate) fn run(self, _out: &mut Out) -> Result<(), Failure> {
        let Self { listen, model } = self;
        Err(Failure::Failed(format!("the simulated engine ({model} at {listen}) is not wired yet")))
    }
}
