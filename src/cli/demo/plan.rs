//! Where everything of a demo is: ports, folders, command lines and the state file.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use serde_json::json;
use toml::{Table, Value};

use super::super::output::Failure;
use super::child::{Children, Recipe};
use super::profile::{Part, Profile};

/// The model that the engines pretend to serve.
pub(super) const MODEL: &str = "everline-demo";
/// The balancer's port where none is asked for.
pub(super) const DEFAULT_PORT: u16 = 8080;
/// Where commands look for a replica when they are not told.
const DEFAULT_ADMIN_PORT: u16 = 8081;
/// The balancer's name among the children.
pub(super) const BALANCER: &str = "balancer";

/// A replica's addresses and files.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) name: String,
    pub(super) http: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) peer: SocketAddr,
    pub(super) config: PathBuf,
    pub(super) data_dir: PathBuf,
}

impl Replica {
    pub(super) fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }
}

/// An edge's addresses and files.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) name: String,
    pub(super) http: SocketAddr,
    pub(super) admin: SocketAddr,
    pub(super) config: PathBuf,
}

impl Edge {
    pub(super) fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }
}

/// An engine's addresses.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    /// Where it tells of its KV cache, and where that can be heard again.
    pub(super) events: [SocketAddr; 2],
    /// Where engines that it shares requests with find it.
    pub(super) side: SocketAddr,
    /// What it is for.
    pub(super) part: Part,
}

/// Everything but the processes.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) profile: Profile,
    pub(super) exe: PathBuf,
    pub(super) folder: PathBuf,
    pub(super) balancer: SocketAddr,
    pub(super) replicas: Vec<Replica>,
    pub(super) edges: Vec<Edge>,
    pub(super) engines: Vec<Engine>,
}

/// A layout whose ports are still held, so that no two are the same.
pub(super) struct Plan {
    layout: Layout,
    held: Vec<TcpListener>,
}

impl std::ops::Deref for Plan {
    type Target = Layout;

    fn deref(&self) -> &Layout {
        &self.layout
    }
}

impl Plan {
    /// Chooses ports and makes the folder.
    pub(super) fn new(
        replicas: u8,
        edges: u8,
        engines: u8,
        port: u16,
        profile: Profile,
        folder: Option<&Path>,
    ) -> Result<Self, Failure> {
        let name = profile.name();
        if profile.splits() && engines < 2 {
            return Err(Failure::Usage(format!(
                "--profile {name} needs a prefill and a decode engine: --engines 2"
            )));
        }
        if profile.engines_register() && edges > 0 {
            return Err(Failure::Usage(format!(
                "--profile {name} has no edges: KsanaLLM's clients and nodes go to the replicas"
            )));
        }
        let exe = std::env::current_exe()?;
        let mut held = Vec::new();
        let mut hold = |port: u16| -> Result<SocketAddr, Failure> {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|e| {
                Failure::Usage(format!(
                    "cannot listen on 127.0.0.1:{port}: {e}; choose another port with --port, or a free one with --port 0"
                ))
            })?;
            let address = listener.local_addr()?;
            held.push(listener);
            Ok(address)
        };
        let balancer = hold(port)?;
        let mut layout = Layout {
            profile,
            exe,
            folder: PathBuf::new(),
            balancer,
            replicas: Vec::new(),
            edges: Vec::new(),
            engines: Vec::new(),
        };
        for n in 1..=engines {
            let (address, events, side) = (hold(0)?, [hold(0)?, hold(0)?], hold(0)?);
            let part = profile.part(n, engines);
            layout.engines.push(Engine { name: format!("e{n}"), address, events, side, part });
        }
        for n in 1..=replicas {
            // Where `everline status` looks by itself, if nobody else is there.
            let usual = if n == 1 && port == DEFAULT_PORT { hold(DEFAULT_ADMIN_PORT).ok() } else { None };
            layout.replicas.push(Replica {
                name: format!("r{n}"),
                http: hold(0)?,
                admin: match usual {
                    Some(admin) => admin,
                    None => hold(0)?,
                },
                peer: hold(0)?,
                config: PathBuf::new(),
                data_dir: PathBuf::new(),
            });
        }
        for n in 1..=edges {
            let (http, admin) = (hold(0)?, hold(0)?);
            layout.edges.push(Edge { name: format!("edge{n}"), http, admin, config: PathBuf::new() });
        }
        layout.folder = make_folder(folder)?;
        for edge in &mut layout.edges {
            edge.config = layout.folder.join(format!("{}.toml", edge.name));
        }
        for replica in &mut layout.replicas {
            replica.config = layout.folder.join(format!("{}.toml", replica.name));
            replica.data_dir = layout.folder.join(&replica.name);
        }
        Ok(Self { layout, held })
    }

    /// Writes the replicas' configuration and starts everything, engines only if nobody has to be there
    /// before them.
    pub(super) fn start(self, children: &mut Children) -> Result<Layout, Failure> {
        let Self { layout, held } = self;
        children.folder = Some(layout.folder.clone());
        for replica in &layout.replicas {
            fs::write(&replica.config, layout.config(replica))?;
        }
        for edge in &layout.edges {
            fs::write(&edge.config, layout.edge_config(edge))?;
        }
        drop(held);
        if !layout.profile.engines_register() {
            layout.start_engines(children)?;
        }
        for replica in &layout.replicas {
            let args = ["serve".to_owned(), "--config".to_owned(), replica.config.display().to_string()];
            children.start(&replica.name, layout.recipe(&replica.name, args.into()))?;
        }
        for edge in &layout.edges {
            let args = ["edge".to_owned(), "--config".to_owned(), edge.config.display().to_string()];
            children.start(&edge.name, layout.recipe(&edge.name, args.into()))?;
        }
        let mut args = vec![BALANCER.to_owned(), "--listen".to_owned(), layout.balancer.to_string()];
        for backend in layout.for_clients() {
            args.extend(["--backend".to_owned(), backend.to_string()]);
        }
        children.start(BALANCER, layout.recipe(BALANCER, args))?;
        Ok(layout)
    }
}

impl Layout {
    /// Starts the engines.
    pub(super) fn start_engines(&self, children: &mut Children) -> Result<(), Failure> {
        let router = self.balancer.to_string();
        for engine in &self.engines {
            let args = self.profile.command(engine, &router);
            children.start(&engine.name, self.recipe(&engine.name, args))?;
        }
        Ok(())
    }

    fn recipe(&self, name: &str, args: Vec<String>) -> Recipe {
        Recipe { exe: self.exe.clone(), args, log: self.log(name) }
    }

    /// Where a child's output goes.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    /// Where the balancer sends clients: to the edges, if there are any.
    fn for_clients(&self) -> Vec<SocketAddr> {
        match self.edges.is_empty() {
            true => self.replicas.iter().map(|replica| replica.http).collect(),
            false => self.edges.iter().map(|edge| edge.http).collect(),
        }
    }

    /// The command that starts a replica or an edge by hand.
    pub(super) fn restart_command(&self, name: &str) -> Option<String> {
        let replica = self.replicas.iter().find(|replica| replica.name == name);
        let edge = self.edges.iter().find(|edge| edge.name == name);
        let (what, config) = match (replica, edge) {
            (Some(replica), _) => ("serve", &replica.config),
            (None, Some(edge)) => ("edge", &edge.config),
            (None, None) => return None,
        };
        Some(format!("{} {what} --config {}", shown(&self.exe), shown(config)))
    }

    fn edge_config(&self, me: &Edge) -> String {
        let text = |text: &str| Value::String(text.to_owned());
        let peers: Vec<Value> =
            self.replicas.iter().map(|r| text(&format!("{}={}", r.name, r.peer))).collect();
        let http = Table::from_iter([
            ("listen".to_owned(), text(&me.http.to_string())),
            ("shutdown_grace_ms".to_owned(), Value::Integer(2_000)),
            ("drain_settle_ms".to_owned(), Value::Integer(500)),
        ]);
        let table = |name: &str, value: Value| Value::Table(Table::from_iter([(name.to_owned(), value)]));
        Table::from_iter([
            ("replica".to_owned(), table("name", text(&me.name))),
            ("http".to_owned(), Value::Table(http)),
            ("admin".to_owned(), table("listen", text(&me.admin.to_string()))),
            ("cluster".to_owned(), table("peers", Value::Array(peers))),
            ("log".to_owned(), table("format", text("pretty"))),
        ])
        .to_string()
    }

    fn config(&self, me: &Replica) -> String {
        let text = |text: &str| Value::String(text.to_owned());
        let listen = |address: SocketAddr| {
            Value::Table(Table::from_iter([("listen".to_owned(), text(&address.to_string()))]))
        };
        let peers: Vec<Value> =
            self.replicas.iter().map(|r| text(&format!("{}={}", r.name, r.peer))).collect();
        let workers = self.engines.iter().filter_map(|engine| self.profile.worker(engine)).map(Value::Table);
        let mut http = Table::from_iter([("listen".to_owned(), text(&me.http.to_string()))]);
        http.insert("shutdown_grace_ms".to_owned(), Value::Integer(2_000));
        http.insert("drain_settle_ms".to_owned(), Value::Integer(500));
        let replica = Table::from_iter([
            ("name".to_owned(), text(&me.name)),
            ("data_dir".to_owned(), text(&me.data_dir.to_string_lossy())),
        ]);
        let cluster = Table::from_iter([("peers".to_owned(), Value::Array(peers))]);
        let log = Table::from_iter([("format".to_owned(), text("pretty"))]);
        let mut config = Table::from_iter([
            ("replica".to_owned(), Value::Table(replica)),
            ("http".to_owned(), Value::Table(http)),
            ("admin".to_owned(), listen(me.admin)),
            ("peer".to_owned(), listen(me.peer)),
            ("cluster".to_owned(), Value::Table(cluster)),
            ("log".to_owned(), Value::Table(log)),
            ("worker".to_owned(), Value::Array(workers.collect())),
        ]);
        config.extend(self.profile.sections());
        config.to_string()
    }
}

/// A path as it can be pasted into a shell.
pub(super) fn shown(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    if plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

fn make_folder(wanted: Option<&Path>) -> Result<PathBuf, Failure> {
    let folder = match wanted {
        Some(folder) => folder.to_owned(),
        None => {
            let name = format!("everline-demo-{}-{:08x}", std::process::id(), rand::random::<u32>());
            crate::config::temporary_folder().join(name)
        }
    };
    let shown = folder.display();
    fs::create_dir_all(&folder).map_err(|e| Failure::Failed(format!("cannot make {shown}: {e}")))?;
    if fs::read_dir(&folder)?.next().is_some() {
        return Err(Failure::Usage(format!(
            "{shown} is not empty; a demo starts from nothing, so name a new folder with --data-dir"
        )));
    }
    Ok(fs::canonicalize(&folder)?)
}

/// Writes addresses and process ids as JSON, whole or not at all.
pub(super) fn write_state(path: &Path, layout: &Layout, children: &Children) -> Result<(), Failure> {
    let replicas = layout.replicas.iter().map(|replica| {
        json!({
            "id": replica.name, "http": format!("http://{}", replica.http), "admin": replica.admin_url(),
            "peer": replica.peer, "pid": children.pid(&replica.name), "data_dir": replica.data_dir,
            "config": replica.config, "log": layout.log(&replica.name),
        })
    });
    let edges = layout.edges.iter().map(|edge| {
        json!({
            "id": edge.name, "http": format!("http://{}", edge.http), "admin": edge.admin_url(),
            "pid": children.pid(&edge.name), "config": edge.config, "log": layout.log(&edge.name),
        })
    });
    let engines = layout.engines.iter().map(|engine| {
        json!({
            "id": engine.name, "url": format!("http://{}", engine.address), "pid": children.pid(&engine.name),
            "role": engine.part.name(),
            "log": layout.log(&engine.name),
        })
    });
    let state = json!({
        "balancer": {
            "address": layout.balancer, "url": format!("http://{}", layout.balancer),
            "pid": children.pid(BALANCER), "log": layout.log(BALANCER),
        },
        "replicas": replicas.collect::<Vec<_>>(),
        "edges": edges.collect::<Vec<_>>(),
        "engines": engines.collect::<Vec<_>>(),
        "profile": layout.profile.name(),
        "model": MODEL,
        "data_dir": layout.folder,
    });
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let written = fs::write(&temporary, format!("{state:#}\n")).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| Failure::Failed(format!("cannot write {}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::{Config, Role};
    use crate::engines::sim::events::KvEventsConfig;

    #[test]
    fn every_replica_and_edge_gets_a_valid_configuration_and_ports_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan::new(3, 2, 2, 0, Profile::Plain, Some(folder.path())).unwrap();
        let mut ports = BTreeSet::from([plan.balancer]);
        for replica in &plan.replicas {
            fs::write(&replica.config, plan.config(replica)).unwrap();
            let config = Config::load(Some(&replica.config), &mut std::iter::empty(), &[]).unwrap().config;
            assert_eq!((config.cluster.peers.len(), config.worker.len()), (3, 2));
            assert_eq!(config.peer_address(), replica.peer.to_string());
            ports.extend([replica.http, replica.admin, replica.peer]);
        }
        assert_eq!(ports.len(), 10);
        for edge in &plan.edges {
            fs::write(&edge.config, plan.edge_config(edge)).unwrap();
            let loaded = Config::load_as(Role::Edge, Some(&edge.config), &mut std::iter::empty(), &[]);
            let config = loaded.unwrap().config;
            assert_eq!((config.cluster.peers.len(), config.http.listen), (3, edge.http));
            ports.extend([edge.http, edge.admin]);
        }
        assert_eq!(ports.len(), 14);
        assert_eq!(plan.for_clients(), [plan.edges[0].http, plan.edges[1].http]);
        for engine in &plan.engines {
            ports.extend(engine.events.into_iter().chain([engine.address, engine.side]));
            let command = plan.profile.command(engine, "");
            let events = KvEventsConfig::parse(command.last().unwrap()).unwrap();
            assert!(
                events.publishes() && events.endpoint.ends_with(&format!("*:{}", engine.events[0].port()))
            );
        }
        assert_eq!(ports.len(), 22);
    }

    #[test]
    fn profiles_have_engines_of_both_kinds_and_configurations_that_replicas_take() {
        for (profile, workers) in [(Profile::Ksana, 0), (Profile::VllmPd, 5), (Profile::SglangPd, 5)] {
            let folder = tempfile::tempdir().unwrap();
            let plan = Plan::new(1, 0, 5, 0, profile, Some(folder.path())).unwrap();
            let parts: Vec<Part> = plan.engines.iter().map(|engine| engine.part).collect();
            assert_eq!(parts, [[Part::Prefill; 2].as_slice(), &[Part::Decode; 3]].concat());
            let replica = &plan.replicas[0];
            fs::write(&replica.config, plan.config(replica)).unwrap();
            let config = Config::load(Some(&replica.config), &mut std::iter::empty(), &[]).unwrap().config;
            assert_eq!((config.worker.len(), config.ksana.enabled), (workers, profile == Profile::Ksana));
            let roles: Vec<&str> =
                config.worker.iter().filter_map(|worker| Some(worker.role?.name())).collect();
            assert!(roles.iter().zip(&parts).all(|(role, part)| *role == part.name()), "{roles:?}");
            for engine in &plan.engines {
                let mut command = vec!["everline".to_owned()];
                command.extend(profile.command(engine, "127.0.0.1:1"));
                let parsed = <crate::cli::Cli as clap::Parser>::try_parse_from(&command);
                assert!(parsed.is_ok(), "{command:?}");
            }
        }
        let usage = |edges, engines| match Plan::new(1, edges, engines, 0, Profile::Ksana, None).err() {
            Some(Failure::Usage(text)) => text,
            _ => panic!("it is taken"),
        };
        assert!(usage(0, 1).contains("--engines 2") && usage(1, 2).contains("no edges"));
    }

    #[test]
    fn a_port_in_use_is_explained() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let failure = Plan::new(1, 0, 1, port, Profile::Plain, None).err();
        assert!(matches!(failure, Some(Failure::Usage(text)) if text.contains("--port 0")));
    }

    #[test]
    fn a_folder_with_something_in_it_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("x"), "").unwrap();
        assert!(matches!(Plan::new(1, 0, 1, 0, Profile::Plain, Some(folder.path())), Err(Failure::Usage(_))));
    }

    #[test]
    fn paths_survive_a_shell() {
        assert_eq!(shown(Path::new("/a/b.toml")), "/a/b.toml");
        assert_eq!(shown(Path::new("/a b/c'd")), r"'/a b/c'\''d'");
    }
}
