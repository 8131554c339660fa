//! `everline engine-sim`

use std::path::PathBuf;

use tokio::signal::unix::{SignalKind, signal};

use super::output::{Failure, Out};
use crate::config::LogConfig;
use crate::engines::sim::{EngineSimArgs, model_files, run};

/// Run a simulated engine that speaks like vLLM
///
/// It answers vLLM's routes with vLLM's bytes; its text is a pure function of the prompt, so that
/// every stream can be checked. It says on standard output where it listens.
///
/// Examples:
///   everline engine-sim --listen 127.0.0.1:8000 --model my-model
///   everline engine-sim --instant                    no delays at all
///   everline worker add http://127.0.0.1:8000        let a replica route to it
///   everline engine-sim --write-model ./sim-model    for a replica's [[model]] directory
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineSimArgs,
    /// Write the model's tokenizer and chat template into this folder, in the files that real models
    /// have, and end.
    #[arg(long, value_name = "FOLDER")]
    write_model: Option<PathBuf>,
    /// What to log, in the syntax of RUST_LOG: `debug`, `info,everline::zmtp=debug`.
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log_filter: String,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        if let Some(folder) = &self.write_model {
            model_files::write(folder)?;
            return out.line(&format!("the simulated model's files are in {}", folder.display()));
        }
        let log = LogConfig { filter: self.log_filter.clone(), ..LogConfig::default() };
        crate::serve::start_logging(&log);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.block_on(async {
            let (mut terminate, mut interrupt) =
                (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
            let stop = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            let mut said = Ok(());
            let announce = |address| said = out.line(&format!("engine-sim listening on http://{address}"));
            run(self.engine, stop, announce).await?;
            said
        })
    }
}
