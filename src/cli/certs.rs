//! `everline certs`

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use super::output::{Failure, Out};
use crate::config::check_name;
use crate::tls::files::{self, Readers, write};
use crate::tls::issue::{Authority, CA_CERT, CA_KEY, Issued, Subject};
use crate::tls::name::MemberName;

/// Names under which whoever is on the same machine reaches a listener.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Make certificates for a cluster
///
/// Replicas prove to each other who they are with certificates of one authority, which is made
/// for the cluster. The same certificates serve for https on the client and admin listeners.
///
/// Examples:
///   everline certs init --cluster prod --replica r1=10.0.0.1 --replica r2=10.0.0.2 --replica r3=10.0.0.3
///   everline certs issue r4 --san 10.0.0.4             one more replica
///   everline certs issue r1 --san 10.0.0.1 --force     a new one before the old one expires
///   everline certs issue gateway --server --san llm.example.com
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make an authority, and certificates for the first replicas
    Init(Init),
    /// Issue a certificate with the authority that is there
    Issue(Issue),
}

#[derive(clap::Args, Debug)]
struct Folder {
    /// Folder for certificates and keys
    #[arg(long, value_name = "DIR", default_value = "everline-certs")]
    dir: PathBuf,
    /// Days that certificates are valid
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
    /// Overwrite what is there
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args, Debug)]
struct Init {
    /// Name of the cluster: a certificate of another cluster is not accepted even if it is of the same authority
    #[arg(long, value_name = "NAME", default_value = "everline", value_parser = parse_name)]
    cluster: String,
    /// A replica (replica.name), and where it is reached; may be given more than once
    #[arg(long, value_name = "NAME[=HOST,...]", value_parser = parse_replica)]
    replica: Vec<Replica>,
    /// Days that the authority is valid
    #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    ca_days: u32,
    #[command(flatten)]
    folder: Folder,
}

#[derive(clap::Args, Debug)]
struct Issue {
    /// Name of the replica (replica.name), or of the server
    #[arg(value_parser = parse_owner)]
    name: String,
    /// Host name or address under which it is reached; may be given more than once
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    san: Vec<String>,
    /// For a server that is no replica, such as a gateway: it cannot speak as one
    #[arg(long)]
    server: bool,
    /// Name of the cluster, where the authority was made by something else
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    cluster: Option<String>,
    #[command(flatten)]
    folder: Folder,
}

#[derive(Clone, Debug)]
struct Replica {
    name: String,
    hosts: Vec<String>,
}

fn parse_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned())
}

/// Of whoever gets files of its own beside the authority's.
fn parse_owner(text: &str) -> Result<String, String> {
    if text.eq_ignore_ascii_case("ca") {
        return Err("that is the authority's own name here".to_owned());
    }
    parse_name(text)
}

fn parse_replica(text: &str) -> Result<Replica, String> {
    let (name, hosts) = text.split_once('=').unwrap_or((text, ""));
    let hosts = hosts.split(',').map(str::trim).filter(|host| !host.is_empty()).map(str::to_owned);
    Ok(Replica { name: parse_owner(name)?, hosts: hosts.collect() })
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        match self.command {
            Command::Init(init) => init.run(out),
            Command::Issue(issue) => issue.run(out),
        }
    }
}

impl Init {
    fn run(self, out: &mut Out) -> Result<(), Failure> {
        let mut names: Vec<&str> = self.replica.iter().map(|replica| replica.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Failure::Usage(format!("--replica {}: is given twice", twice[0])));
        }
        if self.folder.days > self.ca_days {
            return Err(Failure::Usage(format!(
                "--days {} is more than --ca-days {}: a certificate does not outlive its authority",
                self.folder.days, self.ca_days
            )));
        }
        // Everything is made before anything is written.
        let (authority, ca) = Authority::new(&self.cluster, self.ca_days).map_err(Failure::Failed)?;
        let mut made = Vec::new();
        for replica in &self.replica {
            let member = MemberName { cluster: self.cluster.clone(), member: replica.name.clone() };
            made.push(Made {
                name: replica.name.clone(),
                issued: issue(&authority, &Subject::Member(member), &replica.hosts, self.folder.days)?,
            });
        }
        self.folder.create()?;
        let all = made.iter().flat_map(|made| [format!("{}.crt", made.name), format!("{}.key", made.name)]);
        self.folder.check_free(all.chain([CA_CERT.to_owned(), CA_KEY.to_owned()]))?;
        self.folder.put(CA_CERT, &ca.cert, Readers::Everybody)?;
        self.folder.put(CA_KEY, &ca.key, Readers::Owner)?;
        let dir = self.folder.absolute()?;
        out.line(&format!(
            "authority of cluster {}: {}\nIts key, {}, is needed to issue certificates only: keep it off the replicas' machines.",
            self.cluster,
            dir.join(CA_CERT).display(),
            dir.join(CA_KEY).display()
        ))?;
        for made in &made {
            self.folder.put_issued(made)?;
            out.line(&format!("\n{}", member_advice(&dir, &made.name)))?;
        }
        if made.is_empty() {
            out.line("\nnow a certificate for each replica: everline certs issue NAME --san HOST")?;
        }
        Ok(())
    }
}

impl Issue {
    fn run(self, out: &mut Out) -> Result<(), Failure> {
        let authority = self.folder.authority()?;
        let subject = match (self.server, self.cluster.as_deref().or(authority.cluster())) {
            (true, _) => Subject::Server(self.name.clone()),
            (false, Some(cluster)) => {
                Subject::Member(MemberName { cluster: cluster.to_owned(), member: self.name.clone() })
            }
            (false, None) => {
                return Err(Failure::Usage(
                    "the authority does not say of which cluster it is; name it with --cluster".to_owned(),
                ));
            }
        };
        if let (Some(asked), Some(known)) = (self.cluster.as_deref(), authority.cluster())
            && asked != known
        {
            return Err(Failure::Usage(format!("--cluster {asked}: the authority is of cluster {known}")));
        }
        if self.server && self.san.is_empty() {
            return Err(Failure::Usage("--server needs at least one --san HOST".to_owned()));
        }
        let issued = issue(&authority, &subject, &self.san, self.folder.days)?;
        self.folder.check_free([format!("{}.crt", self.name), format!("{}.key", self.name)].into_iter())?;
        let made = Made { name: self.name, issued };
        self.folder.put_issued(&made)?;
        let dir = self.folder.absolute()?;
        out.line(&match subject {
            Subject::Member(_) => member_advice(&dir, &made.name),
            Subject::Server(_) => server_advice(&dir, &made.name),
        })
    }
}

/// A certificate that is not written yet.
struct Made {
    name: String,
    issued: Issued,
}

fn issue(authority: &Authority, subject: &Subject, hosts: &[String], days: u32) -> Result<Issued, Failure> {
    let mut names = hosts.to_vec();
    if let Subject::Member(member) = subject {
        // For whoever is on the same machine, or calls it by its name where that is a host's.
        let own = Some(member.member.as_str()).filter(|name| !name.contains('_'));
        names.extend(LOCAL.into_iter().chain(own).map(str::to_owned));
    }
    let mut seen = std::collections::BTreeSet::new();
    names.retain(|name| seen.insert(name.to_ascii_lowercase()));
    authority.issue(subject, &names, days).map_err(Failure::Usage)
}

fn member_advice(dir: &Path, name: &str) -> String {
    let dir = dir.display();
    format!(
        "{name}: into its configuration (copy the three files to its machine, readable by its user only)\n\n\
         [peer]\n\
         tls_ca = \"{dir}/{CA_CERT}\"\n\
         tls_cert = \"{dir}/{name}.crt\"\n\
         tls_key = \"{dir}/{name}.key\"\n\n\
         # https for clients; the same two in [admin]\n\
         [http]\n\
         tls_cert = \"{dir}/{name}.crt\"\n\
         tls_key = \"{dir}/{name}.key\""
    )
}

fn server_advice(dir: &Path, name: &str) -> String {
    let dir = dir.display();
    format!(
        "{name}: certificate {dir}/{name}.crt, key {dir}/{name}.key\nIts clients trust {dir}/{CA_CERT}; it cannot speak as a replica."
    )
}

impl Folder {
    fn absolute(&self) -> Result<PathBuf, Failure> {
        Ok(std::fs::canonicalize(&self.dir)?)
    }

    /// Makes the folder, for its owner only.
    fn create(&self) -> Result<(), Failure> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(|e| Failure::Failed(format!("cannot make {}: {e}", self.dir.display())))
    }

    fn check_free(&self, files: impl Iterator<Item = String>) -> Result<(), Failure> {
        let there: Vec<String> = files
            .map(|file| self.dir.join(file))
            .filter(|path| path.exists())
            .map(|path| path.display().to_string())
            .collect();
        if there.is_empty() || self.force {
            return Ok(());
        }
        let authority =
            [CA_CERT, CA_KEY].iter().any(|file| there.contains(&self.dir.join(file).display().to_string()));
        let warning =
            if authority { " (all certificates of the old authority are worth nothing then)" } else { "" };
        Err(Failure::Failed(format!(
            "{} {} there already; overwrite with --force{warning}, or choose another folder with --dir",
            there.join(", "),
            if there.len() == 1 { "is" } else { "are" }
        )))
    }

    fn put(&self, file: &str, text: &str, readers: Readers) -> Result<(), Failure> {
        let path = self.dir.join(file);
        write(&path, text, readers)
            .map_err(|e| Failure::Failed(format!("cannot write {}: {e}", path.display())))
    }

    fn put_issued(&self, made: &Made) -> Result<(), Failure> {
        self.put(&format!("{}.key", made.name), &made.issued.key, Readers::Owner)?;
        self.put(&format!("{}.crt", made.name), &made.issued.cert, Readers::Everybody)
    }

    fn authority(&self) -> Result<Authority, Failure> {
        let (cert_path, key_path) = (self.dir.join(CA_CERT), self.dir.join(CA_KEY));
        if !cert_path.exists() {
            return Err(Failure::Failed(format!(
                "there is no authority in {}; make one with `everline certs init`, or say where it is with --dir",
                self.dir.display()
            )));
        }
        let failed = |error: crate::tls::TlsError| Failure::Failed(error.to_string());
        let cert = files::read(&cert_path).map_err(failed)?;
        let key = files::read_secret(&key_path).map_err(failed)?;
        files::certified_key((&cert_path, &cert), (&key_path, &key)).map_err(failed)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Authority::from_pem(&text(cert), &text(key)).map_err(Failure::Failed)
    }
}
