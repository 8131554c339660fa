//! The command line: one subcommand a file, output through [`output`], the admin API through
//! [`client`].

mod agent;
mod balancer;
mod certs;
mod client;
mod completions;
mod config;
mod demo;
mod drain;
mod edge;
mod engine_sim;
mod explain;
mod index;
mod keys;
mod ksana;
mod member;
mod names;
mod output;
mod parent;
mod repair;
mod replay;
mod serve;
mod shim;
mod status;
mod stream;
mod table;
mod urls;
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::{Failure, Out};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  wrong usage or configuration
  3  cannot reach the cluster

Start here:
  everline demo                                  a whole cluster on this machine, to play with
  everline config default > everline.toml        a commented configuration to start from
  everline serve --config everline.toml          one replica
  everline status                                what the cluster is doing";

/// Everline routes LLM requests over a cluster of replicas that has no single point of failure.
#[derive(Parser, Debug)]
#[command(name = "everline", version, about, after_help = EXIT_CODES, propagate_version = true)]
#[command(disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    /// Stop when standard input ends: how the demo's children notice that it is gone
    #[arg(long, global = true, hide = true)]
    exit_with_parent: bool,

    #[command(subcommand)]
    command: Command,
}

// Each is described, with examples, where its arguments are.
#[derive(Subcommand, Debug)]
enum Command {
    Serve(Box<serve::Args>),
    Edge(Box<edge::Args>),
    Demo(demo::Args),
    Agent(Box<agent::Args>),
    EngineSim(Box<engine_sim::Args>),
    Balancer(balancer::Args),
    Shim(shim::Args),
    Replay(Box<replay::Args>),
    Status(status::Args),
    Explain(Box<explain::Args>),
    Index(index::Args),
    Ksana(ksana::Args),
    Names(names::Args),
    Worker(worker::Args),
    Member(member::Args),
    Drain(drain::Args),
    Keys(keys::Args),
    Stream(stream::Args),
    Config(config::Args),
    Certs(certs::Args),
    Completions(completions::Args),
}

/// Parses the command line, does what it says and returns the exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing is left to be done about a pipe that closed before the help text.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    if cli.exit_with_parent {
        parent::follow();
    }
    let mut out = Out::stdout();
    let ran = cli.command.run(&mut out);
    crate::telemetry::log::finish();
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report();
            failure.exit_code()
        }
    }
}

impl Command {
    fn run(self, out: &mut Out) -> Result<(), Failure> {
        match self {
            Command::Serve(args) => args.run(),
            Command::Edge(args) => args.run(),
            Command::Demo(args) => args.run(out),
            Command::Agent(args) => args.run(out),
            Command::EngineSim(args) => args.run(out),
            Command::Balancer(args) => args.run(out),
            Command::Shim(args) => args.run(out),
            Command::Replay(args) => args.run(out),
            Command::Status(args) => args.run(out),
            Command::Explain(args) => args.run(out),
            Command::Index(args) => args.run(out),
            Command::Ksana(args) => args.run(out),
            Command::Names(args) => args.run(out),
            Command::Worker(args) => args.run(out),
            Command::Member(args) => args.run(out),
            Command::Drain(args) => args.run(out),
            Command::Keys(args) => args.run(out),
            Command::Stream(args) => args.run(out),
            Command::Config(args) => args.run(out),
            Command::Certs(args) => args.run(out),
            Command::Completions(args) => args.run(out),
        }
    }
}

#[cfg(test)]
mod tests;
