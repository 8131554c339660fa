//! `POST /RegisterNode`: the body's rules, in the order and the words of the reference router.

use core::net::IpAddr;

use super::fields::{Fields, Wrong, body, python_int};
use crate::state::ksana::{NodeSpec, Role};

/// A registration that makes sense.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// What the node says.
    pub spec: NodeSpec,
    /// The id that it wants.
    pub node_id: Option<String>,
}

/// Why there is none.
#[derive(Clone, PartialEq, Debug)]
pub enum Refused {
    /// 422: the body is not of the right form.
    Form(Wrong),
    /// 400: its content makes no sense.
    Content(String),
}

/// Reads a registration for a router of `cluster`.
pub fn registration(
    content_type: Option<&str>,
    bytes: &[u8],
    cluster: &str,
) -> Result<Registration, Refused> {
    let json = body(content_type, bytes).map_err(Refused::Form)?;
    let mut fields = Fields::of(&json).map_err(Refused::Form)?;
    let inference_addr =
        fields.checked_text("inference_addr", is_host_port, "inference_addr must be in 'host:port' format");
    let is_role = |text: &str| matches!(text, "prefill" | "decode");
    let role = fields.checked_text("group_role", is_role, "group_role must be 'prefill' or 'decode'");
    let rank = fields.natural("node_rank");
    let cluster_name = fields.optional_text("cluster_name");
    let coordinator_addr = fields.optional_text("coordinator_addr");
    let world_size = fields.optional_positive("world_size");
    let devices = fields.optional_objects("devices", |device| {
        device.int("device_id");
        device.text("device_ip");
        device.optional_text("device_type");
    });
    let node_id = fields.optional_text("node_id");
    for ignored in ["hostname", "job_id", "start_time", "comm_id"] {
        fields.optional_text(ignored);
    }
    if !fields.wrong.is_nothing() {
        return Err(Refused::Form(fields.wrong));
    }

    let refuse = |text: &str| Err(Refused::Content(text.to_owned()));
    if let Some(other) = cluster_name.filter(|name| !name.is_empty() && name != cluster) {
        return Err(Refused::Content(format!("Cluster '{other}' is not allowed; expecting '{cluster}'")));
    }
    let coordinator_addr = coordinator_addr.unwrap_or_default();
    if let Err(why) = check_coordinator(&coordinator_addr) {
        return refuse(why);
    }
    let (Some(world_size), 1..) = (world_size, devices) else {
        return refuse("world_size or devices must be provided");
    };
    if world_size < devices as i64 {
        return refuse("World size must match the number of devices");
    }
    let number = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
    let spec = NodeSpec {
        cluster: cluster.to_owned(),
        inference_addr,
        coordinator_addr,
        role: if role == "decode" { Role::Decode } else { Role::Prefill },
        rank: number(rank),
        world_size: number(world_size),
        devices: number(devices as i64),
    };
    spec.check().map_err(Refused::Content)?;
    Ok(Registration { spec, node_id: node_id.filter(|id| !id.is_empty()) })
}

fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && !port.is_empty())
}

fn check_coordinator(text: &str) -> Result<(), &'static str> {
    if text.is_empty() {
        return Err("coordinator_addr is required");
    }
    if text.trim() != text {
        return Err("coordinator_addr must not contain leading or trailing whitespace");
    }
    if text.contains("://") || text.contains(['/', '?', '#']) {
        return Err("coordinator_addr must be in 'ip:port' format without prefixes");
    }
    let (host, port) = text
        .rsplit_once(':')
        .filter(|(host, port)| !host.is_empty() && !port.is_empty())
        .ok_or("coordinator_addr must be in 'host:port' format")?;
    if !is_ip(host) {
        return Err("coordinator_addr host must be a valid IP address");
    }
    let port = python_int(port).ok_or("coordinator_addr port must be an integer")?;
    match (1..=65535).contains(&port) {
        true => Ok(()),
        false => Err("coordinator_addr port must be between 1 and 65535"),
    }
}

/// As Python's `ipaddress` has it: IPv6 may name its zone, and has no brackets.
fn is_ip(host: &str) -> bool {
    match host.split_once('%') {
        Some((address, zone)) => {
            !zone.is_empty() && !zone.contains('%') && matches!(address.parse(), Ok(IpAddr::V6(_)))
        }
        None => host.parse::<IpAddr>().is_ok(),
    }
}
