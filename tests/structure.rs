//! The written invariants, checked in the source text: who may name what, how files look, and
//! that the documents speak of what exists.
//!
//! Comments, strings and test code are not looked at. What is forbidden is said once, in the
//! tables of the tests below; `docs/ARCHITECTURE.md` says why.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest source file. Beyond this it has more than one reason to change.
const MAX_LINES: usize = 700;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()))
}

/// All files below `folder` that end in `ending`, as paths from the root, sorted.
fn files(folder: &str, ending: &str) -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    let mut names: Vec<String> = found
        .iter()
        .filter_map(|path| path.strip_prefix(root()).ok()?.to_str().map(str::to_owned))
        .filter(|name| name.ends_with(ending))
        .collect();
    names.sort();
    names
}

fn fail_if_any(what: &str, violations: &[String]) {
    assert!(violations.is_empty(), "{what}:\n  {}", violations.join("\n  "));
}

// ---- reading Rust ----

/// The code of a source text: comments, strings and characters blanked out, lines kept.
fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    while i < chars.len() {
        let next = chars.get(i + 1).copied();
        let before = i.checked_sub(1).map_or(' ', |b| chars[b]);
        let word_before = before.is_alphanumeric() || before == '_';
        match chars[i] {
            '/' if next == Some('/') => {
                while i < chars.len() && chars[i] != '\n' {
                    out.push(' ');
                    i += 1;
                }
            }
            '/' if next == Some('*') => {
                let mut depth = 0;
                while i < chars.len() {
                    let pair = (chars[i], chars.get(i + 1).copied().unwrap_or(' '));
                    let step = match pair {
                        ('/', '*') => {
                            depth += 1;
                            2
                        }
                        ('*', '/') => {
                            depth -= 1;
                            2
                        }
                        _ => 1,
                    };
                    for c in chars[i..(i + step).min(chars.len())].iter().copied() {
                        blank(&mut out, c);
                    }
                    i += step;
                    if depth == 0 {
                        break;
                    }
                }
            }
            'r' if !word_before || before == 'b' => {
                let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
                if chars.get(i + 1 + hashes) != Some(&'"') {
                    out.push('r');
                    i += 1;
                    continue;
                }
                let end: String = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                let body: String = chars[i + 2 + hashes..].iter().collect();
                let length = body.find(&end).map_or(body.chars().count(), |at| body[..at].chars().count());
                let stop = (i + 2 + hashes + length + end.len()).min(chars.len());
                for c in chars[i..stop].iter().copied() {
                    blank(&mut out, c);
                }
                i = stop;
            }
            '"' => {
                blank(&mut out, '"');
                i += 1;
                while i < chars.len() && chars[i] != '"' {
                    if chars[i] == '\\' {
                        blank(&mut out, chars[i]);
                        i += 1;
                    }
                    if let Some(c) = chars.get(i) {
                        blank(&mut out, *c);
                    }
                    i += 1;
                }
                out.push(' ');
                i += 1;
            }
            // A character, not a lifetime: 'x' or '\…'.
            '\'' if next == Some('\\') || chars.get(i + 2) == Some(&'\'') => {
                let mut j = i + if next == Some('\\') { 3 } else { 2 };
                while j < chars.len() && chars[j] != '\'' {
                    j += 1;
                }
                for c in chars[i..=j.min(chars.len() - 1)].iter().copied() {
                    blank(&mut out, c);
                }
                i = j + 1;
            }
            c => {
                out.push(c);
                i += 1;
            }
        }
    }
    out
}

/// Blanks out every item under `#[cfg(test)]`; `code` has no comments or strings any more.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        out.push_str(&rest[..at]);
        let item = &rest[at + MARK.len()..];
        // To the semicolon, or to the brace that closes the first one.
        let mut depth = 0_usize;
        let mut length = item.len();
        for (i, c) in item.char_indices() {
            match c {
                ';' if depth == 0 => length = i + 1,
                '{' => depth += 1,
                '}' => {
                    depth = depth.saturating_sub(1);
                    if depth == 0 {
                        length = i + 1;
                    }
                }
                _ => {}
            }
            if length != item.len() {
                break;
            }
        }
        out.extend(item[..length].chars().filter(|c| *c == '\n'));
        rest = &item[length..];
    }
    out.push_str(rest);
    out
}

/// Whether `text` has `path` standing for itself: not inside a longer word, and not as a member
/// or a module of something else.
fn names(text: &str, path: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(path).any(|(at, _)| {
        let before = text[..at].chars().next_back().unwrap_or(' ');
        let after = text[at + path.len()..].chars().next().unwrap_or(' ');
        !word(before) && before != '.' && !word(after)
    })
}

/// Every source file that is not only a test, with its code.
fn sources() -> BTreeMap<String, String> {
    let all = files("src", ".rs");
    let codes: BTreeMap<String, String> =
        all.iter().map(|file| (file.clone(), code_of(&read(&root().join(file))))).collect();
    // Files and folders that exist as `#[cfg(test)] mod name;` only.
    let mut test_only = BTreeSet::new();
    for (file, code) in &codes {
        let folder = match file.strip_suffix("/mod.rs").or_else(|| file.strip_suffix("/lib.rs")) {
            Some(folder) => folder.to_owned(),
            None => file.trim_end_matches(".rs").to_owned(),
        };
        for part in code.split("#[cfg(test)]").skip(1) {
            let declared = part.trim_start().strip_prefix("mod ").and_then(|m| m.split_once(';'));
            if let Some((name, _)) = declared.filter(|(name, _)| !name.contains('{')) {
                test_only.insert(format!("{folder}/{name}"));
            }
        }
    }
    let only_test = |file: &str| {
        test_only.iter().any(|t| file == format!("{t}.rs") || file.starts_with(&format!("{t}/")))
    };
    codes
        .into_iter()
        .filter(|(file, _)| !only_test(file))
        .map(|(file, code)| (file, without_tests(&code)))
        .collect()
}

/// `file:line` of everything in files for which `here` holds that names one of `forbidden`.
fn violations(here: impl Fn(&str) -> bool, forbidden: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (file, code) in sources().iter().filter(|(file, _)| here(file)) {
        for (number, line) in code.lines().enumerate() {
            for name in forbidden.iter().filter(|name| names(line, name)) {
                found.push(format!("{file}:{} names {name}", number + 1));
            }
        }
    }
    found
}

#[test]
fn the_reader_of_rust_sees_code_only() {
    let text = "use a; // tokio\n/* sled /* x */ */ let s = \"openraft\\\"\"; let r = r#\"rand\"#; let c = '\"'; b\n\
                fn f<'a>() {}\n#[cfg(test)]\nmod tests {\n fn g() { tokio } }\nlast";
    let code = without_tests(&code_of(text));
    for gone in ["tokio", "sled", "openraft", "rand"] {
        assert!(!names(&code, gone), "{gone} in {code}");
    }
    for kept in ["a", "b", "f", "last"] {
        assert!(names(&code, kept), "{kept} in {code}");
    }
    assert_eq!(code.lines().count(), text.lines().count());
    assert!(!names("raft.sled", "sled") && !names("sledge", "sled") && names("sled::Db", "sled"));
}

// ---- who may name what ----

#[test]
fn the_core_has_no_clock_no_io_no_randomness_and_no_consensus() {
    let core = |file: &str| {
        ["src/state/", "src/kv/", "src/disagg/", "src/ksana/", "src/routing/", "src/splice/"]
            .iter()
            .any(|f| file.starts_with(f))
    };
    let forbidden = [
        "tokio",
        "openraft",
        "sled",
        "tonic",
        "hyper",
        "axum",
        "std::fs",
        "std::net",
        "std::thread",
        "std::env",
        "Instant",
        "SystemTime",
        "async",
        "await",
        // A generator is handed in; none is made here.
        "rand::rng",
        "rand::random",
        "thread_rng",
        "StdRng",
        "SmallRng",
    ];
    fail_if_any("state, kv, disagg, ksana, routing and splice are pure", &violations(core, &forbidden));
    let replicated = |file: &str| file.starts_with("src/state/") || file.starts_with("src/kv/");
    let undetermined = ["rand", "HashMap", "HashSet"];
    fail_if_any(
        "what is replicated is the same everywhere: no randomness, no map without an order",
        &violations(replicated, &undetermined),
    );
}

#[test]
fn only_the_cluster_names_consensus_and_storage() {
    let elsewhere = |file: &str| !file.starts_with("src/cluster/");
    fail_if_any("openraft and sled live in src/cluster", &violations(elsewhere, &["openraft", "sled"]));
    let not_storage = |file: &str| !file.starts_with("src/cluster/storage/");
    fail_if_any("sled lives in src/cluster/storage", &violations(not_storage, &["sled"]));
}

#[test]
fn only_the_codec_names_bincode() {
    fail_if_any("bincode lives in src/codec.rs", &violations(|file| file != "src/codec.rs", &["bincode"]));
}

#[test]
fn only_telemetry_names_opentelemetry() {
    let elsewhere = |file: &str| !file.starts_with("src/telemetry/trace/");
    let names = ["opentelemetry", "opentelemetry_sdk", "opentelemetry_otlp", "opentelemetry_http"];
    fail_if_any("OpenTelemetry lives in src/telemetry/trace", &violations(elsewhere, &names));
}

#[test]
fn only_the_configuration_reads_the_environment() {
    let mut found = Vec::new();
    for (file, code) in sources().iter().filter(|(file, _)| *file != "src/config/environment.rs") {
        for (number, line) in code.lines().enumerate() {
            // Which program this is and how it was called is not the environment.
            let line = ["current_exe", "args", "args_os"]
                .iter()
                .fold(line.to_owned(), |line, harmless| line.replace(&format!("std::env::{harmless}("), "("));
            if names(&line, "std::env") || names(&line, "env::var") || names(&line, "env::vars") {
                found.push(format!("{file}:{} names std::env", number + 1));
            }
        }
    }
    fail_if_any("the environment is read in src/config/environment.rs", &found);
}

#[test]
fn layers_name_only_what_lies_below_them() {
    // Folder or file, and what of this crate it may name besides itself.
    let layers: &[(&str, &[&str])] = &[
        ("ids", &[]),
        ("codec", &[]),
        ("balancer", &[]),
        ("tls", &[]),
        ("telemetry", &["tls"]),
        ("kv", &["codec", "ids"]),
        ("tokens", &["ids", "kv", "telemetry"]),
        ("state", &["codec", "ids", "kv"]),
        ("splice", &["state"]),
        ("ksana", &["state"]),
        ("disagg", &["kv", "routing", "state"]),
        ("routing", &["ids", "kv", "state"]),
        ("cluster", &["codec", "ids", "kv", "routing", "state", "telemetry", "tls"]),
        ("admin_types", &["cluster", "ids", "state"]),
        ("naming", &["tls"]),
        ("config", &["admin_types", "ids", "naming", "routing", "state", "tls"]),
        ("engines", &["ids", "kv", "state", "zmtp"]),
        ("zmtp", &[]),
        ("ingest", &["engines", "ids", "kv", "state", "telemetry", "zmtp"]),
        (
            "http",
            &[
                "admin_types",
                "cluster",
                "disagg",
                "engines",
                "ids",
                "ingest",
                "ksana",
                "kv",
                "naming",
                "relay",
                "routing",
                "splice",
                "state",
                "telemetry",
                "tls",
                "tokens",
                "zmtp",
            ],
        ),
        ("relay", &["cluster", "codec", "ids", "state", "telemetry"]),
        ("replay", &["ids", "kv", "routing", "splice", "state"]),
        ("shim", &["tls"]),
    ];
    let mut found = Vec::new();
    for (file, code) in &sources() {
        let name = file.trim_start_matches("src/").split(['/', '.']).next().unwrap_or_default();
        let Some((_, allowed)) = layers.iter().find(|(layer, _)| *layer == name) else { continue };
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            let named: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let module = !named.is_empty() && named.chars().all(|c| c.is_lowercase() || c == '_');
            if module && named != name && !allowed.contains(&named.as_str()) {
                let line = code[..at].matches('\n').count() + 1;
                found.push(format!("{file}:{line} names crate::{named}"));
            }
        }
    }
    fail_if_any("nothing names what lies above it", &found);
}

// ---- how files look ----

#[test]
fn source_files_are_short_and_say_what_they_are() {
    let mut found = Vec::new();
    for file in files("src", ".rs") {
        let text = read(&root().join(&file));
        let lines = text.lines().count();
        if lines > MAX_LINES {
            found.push(format!("{file} has {lines} lines, more than {MAX_LINES}"));
        }
        if !text.lines().next().is_some_and(|first| first.starts_with("//! ")) {
            found.push(format!("{file} does not begin with a `//!` sentence"));
        }
    }
    fail_if_any("source files", &found);
}

#[test]
fn the_map_in_lib_rs_has_every_module() {
    let text = read(&root().join("src/lib.rs"));
    let missing: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .filter(|module| !text.lines().any(|l| l.starts_with("//!") && l.contains(&format!("[`{module}`]"))))
        .map(|module| format!("src/lib.rs does not speak of {module}"))
        .collect();
    fail_if_any("lib.rs is the map", &missing);
}

// ---- what the documents say ----

fn documents() -> Vec<String> {
    let mut all = files("docs", ".md");
    all.extend(["README.md", "SECURITY.md"].map(str::to_owned));
    all
}

/// A document without its fenced blocks.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let mut out = String::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

/// The anchors of a document's headings, as code hosts make them.
fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn links_in_the_documents_lead_somewhere() {
    let mut found = Vec::new();
    for document in documents() {
        let text = read(&root().join(&document));
        for (at, _) in prose(&text).match_indices("](") {
            let target = &prose(&text)[at + 2..];
            let Some((target, _)) = target.split_once(')') else { continue };
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, anchor) = target.split_once('#').map_or((target, None), |(p, a)| (p, Some(a)));
            let here = root().join(&document);
            let file = if path.is_empty() {
                here
            } else {
                here.parent().map(|folder| folder.join(path)).unwrap_or_default()
            };
            if !file.exists() {
                found.push(format!("{document}: {target} does not exist"));
            } else if let Some(anchor) = anchor.filter(|_| file.extension().is_some_and(|e| e == "md"))
                && !anchors(&read(&file)).contains(anchor)
            {
                found.push(format!("{document}: {target} has no such heading"));
            }
        }
    }
    fail_if_any("links", &found);
}

/// Words of `text` that begin with `everline_` and could be metrics.
fn metric_words(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.match_indices("everline_")
        .filter(|(at, _)| !text[..*at].chars().next_back().is_some_and(|c| word(c) || c == '/'))
        .map(|(at, _)| text[at..].chars().take_while(|c| word(*c)).collect())
        .filter(|name: &String| name != "everline_")
        .collect()
}

#[test]
fn metrics_in_the_documents_exist() {
    // All texts in the code that could be a family's name.
    let mut families = BTreeSet::new();
    for file in files("src", ".rs") {
        for text in read(&root().join(&file)).split('"').skip(1) {
            if !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
                families.insert(text.to_owned());
            }
        }
    }
    let exists = |name: &str| {
        let family = name.trim_start_matches("everline_");
        let endings = ["", "_total", "_info", "_bucket", "_sum", "_count"];
        endings.iter().any(|ending| family.strip_suffix(ending).is_some_and(|f| families.contains(f)))
    };
    let mut found = Vec::new();
    let deployed = files("deploy", ".yaml").into_iter().chain(files("deploy", ".json"));
    for document in documents().into_iter().chain(deployed) {
        let words = metric_words(&read(&root().join(&document)));
        found.extend(words.iter().filter(|name| !exists(name)).map(|name| format!("{document}: {name}")));
    }
    fail_if_any("no such metric", &found);
}

/// The subcommands that `--help` of `path` lists.
fn subcommands(path: &[&str]) -> Vec<String> {
    let program = env!("CARGO_BIN_EXE_everline");
    let output = Command::new(program).args(path).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return Vec::new() };
    list.lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().map(str::to_owned))
        .filter(|name| name != "help")
        .collect()
}

#[test]
fn commands_and_documents_agree() {
    let reference = read(&root().join("docs/reference/cli.md"));
    let mut commands = BTreeSet::new();
    let mut found = Vec::new();
    for command in subcommands(&[]) {
        for inner in subcommands(&[&command]) {
            commands.insert(format!("{command} {inner}"));
        }
        commands.insert(command);
    }
    assert!(!commands.is_empty());
    for command in &commands {
        if !reference.contains(&format!("# `everline {command}`")) {
            found.push(format!("docs/reference/cli.md has no chapter for everline {command}"));
        }
    }
    // What documents call, in code, must exist.
    for document in documents() {
        let text = read(&root().join(&document));
        let mut fenced = false;
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
                continue;
            }
            let calls: Vec<&str> = if fenced {
                line.split("everline ").skip(1).collect()
            } else {
                line.split("`everline ").skip(1).collect()
            };
            for call in calls {
                let name: String = call.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
                let is_word = name.starts_with(|c: char| c.is_ascii_lowercase());
                let described = fenced && !line.trim_start().starts_with("everline ");
                if is_word && !described && !commands.contains(&name) {
                    found.push(format!("{document}: everline {name}"));
                }
            }
        }
    }
    fail_if_any("commands", &found);
}

#[test]
fn every_dependency_is_accounted_for() {
    let manifest: toml::Table = read(&root().join("Cargo.toml")).parse().unwrap();
    let text = read(&root().join("docs/dependencies.md"));
    let mut found = Vec::new();
    for section in ["dependencies", "build-dependencies", "dev-dependencies"] {
        for (name, value) in manifest[section].as_table().into_iter().flatten() {
            let version = value.as_str().or_else(|| value.get("version")?.as_str()).unwrap_or_default();
            let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
            match row {
                None => found.push(format!("docs/dependencies.md has no line for {name}")),
                Some(row) if !row.contains(&format!("| {version} |")) => {
                    found.push(format!("docs/dependencies.md does not say {version} for {name}"));
                }
                Some(_) => {}
            }
        }
    }
    fail_if_any("dependencies", &found);
}
