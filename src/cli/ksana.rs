//! `everline ksana`

use http::Method;

use super::client::{Listing, Server, block_on, segment};
use super::output::{Failure, Out};
use super::table::{Column, render_within};
use crate::admin_types::MessageReply;
use crate::admin_types::ksana::{KsanaGroup, KsanaNode, KsanaPair, KsanaReply};

const KSANA: &str = "/v1/admin/ksana";

/// Look at KsanaLLM's nodes, groups and pairs
///
/// Examples:
///   everline ksana nodes           who has registered, and when it was last heard
///   everline ksana groups          which groups have all of their devices
///   everline ksana pairs           which pairs requests go to, and why not to the others
///   everline ksana remove ID       take a node out that does not come back
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List the nodes
    Nodes(Listing),
    /// List the groups that have sent a heartbeat
    Groups(Listing),
    /// List the pairs of a prefill and a decode group
    Pairs(Listing),
    /// Take a node out; one that still sends heartbeats comes back
    Remove {
        /// Its id
        id: String,
        #[command(flatten)]
        server: Server,
    },
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            match self.command {
                Command::Nodes(listing) => {
                    let nodes = tables(&listing).await?.nodes;
                    let none = "no nodes yet; they register at POST /RegisterNode of a client listener";
                    show(out, &listing, &nodes, none, &NODES, node)
                }
                Command::Groups(listing) => {
                    let groups = tables(&listing).await?.groups;
                    show(out, &listing, &groups, "no group has sent a heartbeat yet", &GROUPS, group)
                }
                Command::Pairs(listing) => {
                    let pairs = tables(&listing).await?.pairs;
                    let none =
                        "no pairs yet; a prefill group's first node makes one by registering its comm id";
                    show(out, &listing, &pairs, none, &PAIRS, pair)
                }
                Command::Remove { id, server } => {
                    let path = format!("{KSANA}/nodes/{}", segment(&id));
                    let reply: MessageReply =
                        server.client()?.call(Method::DELETE, &path, None::<&()>).await?;
                    out.line(&reply.message)
                }
            }
        })
    }
}

async fn tables(listing: &Listing) -> Result<KsanaReply, Failure> {
    let reply: KsanaReply = listing.get(KSANA).await?;
    if reply.compat.is_empty() && reply.nodes.is_empty() {
        let text =
            "this replica does not serve KsanaLLM; start it with ksana.enabled = true or --ksana-config";
        return Err(Failure::Usage(text.to_owned()));
    }
    Ok(reply)
}

/// A column that is kept (rank 0), or goes where there is no room.
type Named = (u8, &'static str);

const NODES: [Named; 8] = [
    (0, "ID"),
    (0, "ROLE"),
    (0, "GROUP"),
    (0, ">RANK"),
    (2, ">DEVICES"),
    (3, "COORDINATOR"),
    (0, "STATE"),
    (1, ">HEARD"),
];
const GROUPS: [Named; 7] = [
    (0, "GROUP"),
    (0, "ROLE"),
    (0, ">DEVICES"),
    (2, ">NODES"),
    (0, ">REQUESTS"),
    (1, ">CACHED"),
    (0, "STATE"),
];
const PAIRS: [Named; 3] = [(0, "PAIR"), (0, "COMM ID"), (0, "STATE")];

fn show<T: serde::Serialize>(
    out: &mut Out,
    listing: &Listing,
    rows: &[T],
    none: &str,
    columns: &[Named],
    row: impl Fn(&T) -> Vec<String>,
) -> Result<(), Failure> {
    if listing.json {
        return out.json(&rows);
    }
    if rows.is_empty() {
        return out.line(none);
    }
    let column = |(rank, heading): &Named| match rank {
        0 => Column::kept(heading),
        rank => Column::dropped(*rank, heading),
    };
    let columns: Vec<Column> = columns.iter().map(column).collect();
    out.line(&render_within(&columns, rows.iter().map(row).collect(), out.paint(), out.width()))
}

fn node(node: &KsanaNode) -> Vec<String> {
    vec![
        node.node_id.clone(),
        node.role.clone(),
        node.inference_addr.clone(),
        node.node_rank.to_string(),
        format!("{}/{}", node.device_num, node.world_size),
        node.coordinator_addr.clone(),
        if node.is_online { "online" } else { "offline" }.to_owned(),
        format!("{:.1} s", node.heard_ms_ago as f64 / 1000.0),
    ]
}

fn group(group: &KsanaGroup) -> Vec<String> {
    vec![
        group.inference_addr.clone(),
        group.role.clone(),
        format!("{}/{}", group.online_device_sum, group.world_size_expected),
        group.online_node_count.to_string(),
        group.requests.to_string(),
        group.cached_blocks.to_string(),
        if group.is_ready { "ready" } else { "not ready" }.to_owned(),
    ]
}

fn pair(pair: &KsanaPair) -> Vec<String> {
    let state = match (&pair.blocked_by, pair.is_active) {
        (Some(why), _) => why.clone(),
        (None, true) => "ready".to_owned(),
        (None, false) => "not active".to_owned(),
    };
    let named = if pair.has_comm_id { "yes" } else { "no" };
    vec![pair.comm_key.clone(), named.to_owned(), state]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_has_a_cell_for_each_column() {
        assert_eq!(node(&KsanaNode::default()).len(), NODES.len());
        assert_eq!(group(&KsanaGroup::default()).len(), GROUPS.len());
        assert_eq!(pair(&KsanaPair::default()).len(), PAIRS.len());
        let blocked = KsanaPair { blocked_by: Some("decode not ready".into()), ..KsanaPair::default() };
        assert_eq!(pair(&blocked)[2], "decode not ready");
    }
}
