//! `everline member`

use http::Method;

use super::client::{Listing, Server, block_on};
use super::output::{Failure, Out};
use super::repair;
use super::status::members_table;
use crate::admin_types::{MembersReply, MessageReply};
use crate::cluster::api::MemberOp;

const MEMBERS: &str = "/v1/admin/members";

/// Add, remove, promote and list members (replicas)
///
/// Examples:
///   everline member list
///   everline member add 10.0.0.4:8082          started there: everline serve --join 10.0.0.1:8082
///   everline member transfer-leader r2
///   everline member repair --data-dir /var/lib/everline
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List all members
    List(Listing),
    /// Tell the replica that waits at a peer address to join
    Add {
        /// Address of its peer listener
        #[arg(value_name = "HOST:PORT", value_parser = super::urls::host_port)]
        peer: String,
        #[command(flatten)]
        server: Server,
    },
    /// Remove a member for good; its id is never used again
    Remove(Named),
    /// Make a learner a voter
    Promote(Named),
    /// Hand leadership to another voter
    TransferLeader {
        /// Name or id [default: the voter that is furthest along]
        member: Option<String>,
        #[command(flatten)]
        server: Server,
    },
    Repair(repair::Args),
}

#[derive(clap::Args, Debug)]
struct Named {
    /// Name or id
    member: String,
    #[command(flatten)]
    server: Server,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        let (server, op) = match self.command {
            Command::Repair(args) => return args.run(out),
            Command::List(listing) => return list(&listing, out),
            Command::Add { peer, server } => {
                crate::config::check_host_port(&peer).map_err(Failure::Usage)?;
                (server, MemberOp::Add { peer })
            }
            Command::Remove(named) => (named.server, MemberOp::Remove { member: named.member }),
            Command::Promote(named) => (named.server, MemberOp::Promote { member: named.member }),
            Command::TransferLeader { member, server } => (server, MemberOp::TransferLeader { member }),
        };
        block_on(async {
            let reply: MessageReply = server.client()?.call(Method::POST, MEMBERS, Some(&op)).await?;
            out.line(&reply.message)
        })
    }
}

fn list(listing: &Listing, out: &mut Out) -> Result<(), Failure> {
    block_on(async {
        let reply: MembersReply = listing.get(MEMBERS).await?;
        if listing.json { out.json(&reply) } else { out.line(&members_table(&reply.members, out.paint())) }
    })
}
