//! Precedence, origins, errors and the generated texts.

use std::path::Path;

use super::*;

fn load(file: &str, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, ConfigErrors> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("everline.toml");
    std::fs::write(&path, file).unwrap();
    let overrides: Vec<Override> = flags
        .iter()
        .map(|(key, value)| Override { key: (*key).into(), value: (*value).into(), flag: "--set".into() })
        .collect();
    let mut env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    Config::load(Some(&path), &mut env, &overrides)
}

fn errors(file: &str) -> Vec<ConfigError> {
    load(file, &[], &[]).unwrap_err().0
}

fn the_error(file: &str) -> String {
    let errors = errors(file);
    assert_eq!(errors.len(), 1, "{errors:#?}");
    let text = errors[0].to_string();
    text[text.find("everline.toml").expect("names the file")..].to_owned()
}

#[test]
fn flags_beat_the_environment_beats_the_file_beats_defaults() {
    let file = "[http]\nlisten = \"127.0.0.1:1001\"\nmax_headers = 100\nidle_timeout_ms = 5\n";
    let env = [("EVERLINE_HTTP__MAX_HEADERS", "101"), ("EVERLINE_HTTP__LISTEN", "127.0.0.1:1002")];
    let loaded = load(file, &env, &[("http.listen", "127.0.0.1:1003")]).unwrap();
    let http = &loaded.config.http;
    assert_eq!((http.listen.port(), http.max_headers, http.idle_timeout_ms), (1003, 101, 5));
    assert_eq!(loaded.origins["http.listen"], Origin::Flag { flag: "--set".into() });
    assert_eq!(loaded.origins["http.max_headers"], Origin::Env { var: "EVERLINE_HTTP__MAX_HEADERS".into() });
    assert!(matches!(loaded.origins["http.idle_timeout_ms"], Origin::File { line: 4, .. }));
    assert_eq!(loaded.origins["http.insecure"], Origin::Default);
}

#[test]
fn lists_come_from_the_environment_in_both_forms() {
    for text in ["r1=a:1,r2=b:2", r#"["r1=a:1", "r2=b:2"]"#] {
        let loaded = load("", &[("EVERLINE_CLUSTER__PEERS", text)], &[]).unwrap();
        assert_eq!(loaded.config.cluster.peers.len(), 2);
        assert_eq!(loaded.config.peer_address(), "a:1");
    }
}

#[test]
fn other_peoples_variables_are_left_alone_but_slips_are_not() {
    load("", &[("EVERLINE_PORT", "tcp://1"), ("EVERLINE_SERVER", "x")], &[]).unwrap();
    let errors = load("", &[("EVERLINE_HTTP__LISTENN", "x")], &[]).unwrap_err().0;
    assert!(errors[0].to_string().contains("did you mean \"listen\""), "{}", errors[0]);
}

#[test]
fn rust_log_sets_the_filter_unless_our_own_variable_does() {
    let loaded = load("", &[("EVERLINE_LOG__FILTER", "warn"), ("RUST_LOG", "debug")], &[]).unwrap();
    assert_eq!(loaded.config.log.filter, "warn");
    assert_eq!(load("", &[("RUST_LOG", "debug")], &[]).unwrap().config.log.filter, "debug");
}

#[test]
fn errors_name_file_line_column_key_and_remedy() {
    assert_eq!(
        the_error("[http]\n  lisetn = 1\n"),
        "everline.toml:2:3: http.lisetn: unknown key\n    did you mean \"listen\"?"
    );
    assert_eq!(the_error("[htpp]\n"), "everline.toml:1:2: htpp: unknown section\n    did you mean \"http\"?");
    assert_eq!(
        the_error("[http]\nmax_headers = \"many\"\n"),
        "everline.toml:2:15: http.max_headers: expected a whole number (8 to 1024 fields), this is \"many\" (string)"
    );
    assert_eq!(
        the_error("[http]\nmax_headers = 7\n"),
        "everline.toml:2:15: http.max_headers: 7 is out of range, allowed are 8 to 1024 fields"
    );
    assert_eq!(
        the_error("[[worker]]\nurl = \"http://a:1\"\nmodles = []\n"),
        "everline.toml:3:1: worker[0].modles: unknown key\n    did you mean \"models\"?"
    );
    assert!(the_error("[http\n").contains("everline.toml:1:"));
    assert!(the_error("[proxy]\npolicy = \"fastest\"\n").contains("least_loaded"));
    assert!(the_error("[workers]\nallow = [\"10.0.0.0/99\"]\n").contains("10.0.0.0/8"));
    assert!(the_error("insecure = true\n").contains("did you mean \"http.insecure\""));
    assert!(the_error("[[worker]]\nurl = \"127.0.0.1:1\"\n").contains("must start with http://"));
}

#[test]
fn all_errors_are_collected() {
    let found = errors("[http]\na_key_of_nobody = 1\nmax_headers = 1\n[replica]\nname = 3\n");
    assert_eq!(found.len(), 3, "{found:#?}");
}

#[test]
fn rules_between_keys_are_kept() {
    assert!(the_error("[cluster]\nelection_max_ms = 299\n").contains("at least 300"));
    assert!(the_error("[cluster]\nheartbeat_ms = 150\n").contains("more than 150"));
    assert!(the_error("[cluster]\npeers = [\"r2=a:1\"]\n").contains("r1 is not among them"));
    assert!(the_error("[admin]\nlisten = \"127.0.0.1:8080\"\n").contains("also http.listen"));
    assert_eq!(errors("[cluster]\npeers = [\"r1=a:1\", \"r1=a:1\"]\n").len(), 2);
    let twice = "[[worker]]\nurl = \"http://a:1\"\n[[worker]]\nurl = \"http://a:1\"\n";
    assert!(the_error(twice).contains("id of its own"));
}

#[test]
fn listeners_open_to_the_network_want_a_written_word_and_node_tokens() {
    let open = "[http]\nlisten = \"10.0.0.1:80\"\n";
    let found = errors(open);
    assert!(found.iter().any(|e| e.to_string().contains("http.insecure = true")));
    assert!(found.iter().any(|e| e.key.as_deref() == Some("nodes.token_sha256")));
    let digest = TokenDigest::of("t");
    load(&format!("{open}insecure = true\n[nodes]\ntoken_sha256 = [\"{digest}\"]\n"), &[], &[]).unwrap();
    assert!(
        the_error("[http]\ninsecure = true\n[peer]\nlisten = \"0.0.0.0:82\"\n").contains("peer.advertise")
    );
}

/// Certificates of `r1`, and the three lines that name them.
fn certificates() -> (crate::tls::testing::Certs, String) {
    let certs = crate::tls::testing::Certs::new("prod");
    let files = certs.member("r1");
    let lines = format!("tls_ca = {:?}\ntls_cert = {:?}\ntls_key = {:?}\n", files.ca, files.cert, files.key);
    (certs, lines)
}

#[test]
fn a_listener_open_to_the_network_needs_tls_and_authentication() {
    let (_certs, lines) = certificates();
    let listener = lines.lines().skip(1).collect::<Vec<_>>().join("\n");
    // Replicas: one set of certificates is both.
    load(&format!("[peer]\nlisten = \"10.0.0.1:82\"\n{lines}"), &[], &[]).unwrap();
    let error = the_error("[peer]\nlisten = \"10.0.0.1:82\"\n");
    assert!(
        error.contains("without TLS and without authentication: anybody could speak as a replica"),
        "{error}"
    );
    assert_eq!(error.matches("peer.tls_ca").count(), 1, "{error}");
    // Operators: TLS alone is not enough.
    let error = the_error("[admin]\nlisten = \"10.0.0.1:81\"\n");
    assert!(error.contains("without TLS and without authentication"), "{error}");
    let error = the_error(&format!("[admin]\nlisten = \"10.0.0.1:81\"\n{listener}\n"));
    assert!(error.contains("without authentication") && !error.contains("without TLS"), "{error}");
    assert!(!error.contains("tls_cert"), "what is there is not asked for: {error}");
    // Clients, likewise.
    let tokens = format!("[nodes]\ntoken_sha256 = [\"{}\"]\n", TokenDigest::of("t"));
    let error = the_error(&format!("[http]\nlisten = \"[2001:db8::1]:80\"\n{listener}\n{tokens}"));
    assert!(error.contains("without authentication") && error.contains("http.insecure = true"), "{error}");
    // With all of it, no further word is needed.
    let digest = TokenDigest::of("t");
    let secured = format!(
        "[http]\nlisten = \"10.0.0.1:80\"\n{listener}\n{tokens}[[key]]\nid = \"a\"\nsha256 = \"{digest}\"\n\
         [admin]\nlisten = \"10.0.0.1:81\"\ntoken_sha256 = [\"{digest}\"]\n{listener}\n\
         [peer]\nlisten = \"10.0.0.1:82\"\n{lines}"
    );
    load(&secured, &[], &[]).unwrap();
    let error = the_error(&secured.replace(&format!("token_sha256 = [\"{digest}\"]\n{listener}"), &listener));
    assert!(error.contains("admin.token_file"), "{error}");
    // The written word is for all three.
    let all = format!(
        "[http]\nlisten = \"10.0.0.1:80\"\ninsecure = true\n{tokens}[admin]\nlisten = \"10.0.0.1:81\"\n[peer]\nlisten = \"10.0.0.1:82\"\n"
    );
    load(&all, &[], &[]).unwrap();
}

#[test]
fn addresses_say_https_where_there_is_a_certificate() {
    let (_certs, lines) = certificates();
    let listener = lines.lines().skip(1).collect::<Vec<_>>().join("\n");
    let loaded = load(&format!("[http]\nadvertise = \"r1:80\"\n{listener}\n"), &[], &[]).unwrap();
    assert_eq!(loaded.config.http_url(), "https://r1:80");
    assert_eq!(loaded.config.admin_url(), "http://127.0.0.1:8081");
}

#[test]
fn certificates_that_cannot_work_are_named_with_their_key() {
    let (certs, lines) = certificates();
    let folder = certs.folder.path();
    let cut =
        |from: &str| lines.lines().filter(|line| !line.starts_with(from)).collect::<Vec<_>>().join("\n");
    let error = the_error(&format!("[peer]\n{}\n", cut("tls_key")));
    assert!(error.contains("peer.tls_ca: is given without peer.tls_key"), "{error}");
    let error = the_error(&format!("[http]\n{}\n", lines.lines().next_back().unwrap()));
    assert!(error.contains("http.tls_key: is given without http.tls_cert"), "{error}");

    let error = the_error(&format!("[replica]\nname = \"r2\"\n[peer]\n{lines}"));
    assert!(error.contains("peer.tls_cert") && error.contains("of r1, but this process is r2"), "{error}");

    let exposed = folder.join("r1.key");
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o640)).unwrap();
    let error = the_error(&format!("[peer]\n{lines}"));
    assert!(error.contains("peer.tls_key") && error.contains("chmod 600"), "{error}");
    certs.member("r1");

    let issued = crate::tls::testing::expired(&certs, "r1");
    let files = crate::tls::peer::files_in(folder, "r1");
    crate::tls::testing::put(&files, &issued);
    let error = the_error(&format!("[peer]\n{lines}"));
    assert!(error.contains("peer.tls_cert") && error.contains("expired"), "{error}");

    certs.member("r1");
    std::fs::write(&files.cert, certs.of("r1", None).cert).unwrap();
    let error = the_error(&format!("[peer]\n{lines}"));
    assert!(error.contains("peer.tls_key") && error.contains("is not the key of"), "{error}");

    std::fs::write(&files.ca, "").unwrap();
    assert!(the_error(&format!("[peer]\n{lines}")).contains("peer.tls_ca"));
    std::fs::remove_file(&files.cert).unwrap();
    let error = the_error(&format!("[admin]\n{}\n", cut("tls_ca")));
    assert!(error.contains("admin.tls_cert") && error.contains("cannot read"), "{error}");
    assert!(error.contains("everline certs init"), "{error}");
}

#[test]
fn tokens_are_read_from_a_file_and_kept_as_digests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens");
    std::fs::write(&path, "# for gpu nodes\nsecret\n\n").unwrap();
    let loaded = load("", &[("EVERLINE_NODES__TOKEN_FILE", path.to_str().unwrap())], &[]).unwrap();
    assert_eq!(loaded.config.nodes.token_sha256, [TokenDigest::of("secret")]);
    let loaded = load("", &[("EVERLINE_ADMIN__TOKEN_FILE", path.to_str().unwrap())], &[]).unwrap();
    assert_eq!(loaded.config.admin.token_sha256, [TokenDigest::of("secret")]);
    assert!(loaded.config.wants_admin_tokens() && !loaded.config.wants_node_tokens());
}

#[test]
fn the_default_file_is_the_default() {
    let loaded = load(&default_toml(), &[], &[]).unwrap();
    assert_eq!(loaded.config, Config::default());
}

/// The example of a list in the default file, without its comment signs.
fn example(list: &str) -> String {
    let text = default_toml();
    let lines = text.lines().skip_while(|line| *line != format!("# [[{list}]]"));
    let lines = lines.take_while(|line| line.starts_with("# "));
    lines.map(|line| line.trim_start_matches("# ")).collect::<Vec<_>>().join("\n") + "\n"
}

#[test]
fn the_examples_are_accepted() {
    let text = ["worker", "key", "node_token", "model"].map(example).concat();
    let loaded = load(&text, &[], &[]).unwrap();
    let config = &loaded.config;
    assert_eq!(config.worker[0].id.as_deref(), Some("gpu-1"));
    assert_eq!((config.key[0].id.as_str(), config.key[0].rate()), ("team-a", Some((10.0, 20))));
    assert_eq!(config.node_token[0].networks.len(), 1);
    assert!(config.wants_client_keys() && config.wants_node_tokens() && !config.wants_admin_tokens());
    assert!(matches!(loaded.origins["key[0]"], Origin::File { .. }));
    let printed = to_toml_with_origins(&loaded, false);
    assert_eq!(load(&printed, &[], &[]).unwrap().config, loaded.config, "{printed}");
}

#[test]
fn the_file_of_keys_is_checked_with_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    let file = format!("[http]\nkeys_file = {:?}\n", path.to_str().unwrap());
    assert!(errors(&file)[0].to_string().contains("everline keys new"), "it is not there");
    std::fs::write(&path, "").unwrap();
    let loaded = load(&file, &[], &[]).unwrap();
    assert!(loaded.config.wants_client_keys(), "a file without keys lets nobody in");
    std::fs::write(&path, example("key")).unwrap();
    assert!(load(&file, &[], &[]).is_ok());
    let twice = errors(&(file.clone() + &example("key")));
    assert!(twice[0].to_string().contains("keys.toml:1"), "{}", twice[0]);
    std::fs::write(&path, "[[key]]\nid = 1\n").unwrap();
    assert_eq!(errors(&file).len(), 1);
}

#[test]
fn what_is_printed_can_be_read_back() {
    let file = "[http]\nadvertise = \"x:1\"\n[[worker]]\nurl = \"http://a:1\"\nlabels = { zone = \"a\" }\n";
    let loaded = load(file, &[], &[]).unwrap();
    let printed = to_toml_with_origins(&loaded, true);
    assert_eq!(load(&printed, &[], &[]).unwrap().config, loaded.config, "{printed}");
    assert!(printed.contains("everline.toml:2"));
}

#[test]
fn docs_are_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/configuration.md");
    if variables().any(|(name, _)| name == "EVERLINE_REGENERATE_DOCS") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, reference_markdown()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == reference_markdown(),
        "run: EVERLINE_REGENERATE_DOCS=1 cargo test docs_are_up_to_date"
    );
}

#[test]
fn every_policy_of_the_file_is_one_that_routing_knows() {
    for name in Policy::NAMES {
        let policy: Policy = serde_json::from_value((*name).into()).unwrap();
        assert_eq!(policy.name(), *name);
        assert_eq!(crate::routing::policy::by_name(name).unwrap().name(), *name);
    }
    assert_eq!(Policy::default().name(), "kv_cost");
}
