//! The command line as clap sees it.

use clap::CommandFactory as _;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("everline").chain(line.split_whitespace()))
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn documented_lines_are_accepted() {
    for line in [
        "serve",
        "serve --config x.toml --name r1 --data-dir d --http 127.0.0.1:1 --admin 127.0.0.1:2 --peer 127.0.0.1:3",
        "serve --peers a=h:1,b=h:2 --node-token-file t --set a.b=c --set d.e=f --log-format json --log-filter debug",
        "serve --join h:1 --exit-with-parent",
        "demo --replicas 5 --engines 2 --port 0 --state-file s.json --run-for 10 --data-dir d --restart",
        "demo --edges 2",
        "edge --config x.toml --name e1 --http 127.0.0.1:1 --admin 127.0.0.1:2 --keys-file k --set a.b=c",
        "edge --replicas h:1,h:2 --log-format json --log-filter debug --exit-with-parent",
        "agent --engine http://h:1 --replica http://a:1,http://b:1 --listen 127.0.0.1:0 --kv-port 0",
        "agent --engine http://h:1 --replica a:1 --advertise h:2 --advertise-engine http://h:3 --id e --model m \
         --name n --peer-ca c --peer-cert d --peer-key k --node-token-file t --cluster x --label a=b --dp-ranks 2 \
         --kv-port 5557 --kv-events ipc:///x --kv-replay ipc:///y --kv-topic t --drain-timeout 5 --engine-kind sglang",
        "engine-sim --listen 127.0.0.1:0",
        "balancer --listen 127.0.0.1:0 --backend 127.0.0.1:1 --backend 127.0.0.1:2 --check-interval-ms 100",
        "serve --admin-token-file t --keys-file k",
        "replay --simulate --workers 8 --blocks 4000 --policy round_robin --policy kv_cost --json t.jsonl",
        "replay --simulate --policy kv_cost:weight=4,temperature=0.1 --routers 3 --lag-ms 5 --no-bound --plot p.svg t",
        "replay --url http://h:1 --model m --speed 10 --concurrency 64 --skip 5 --limit 9 --vocabulary 32000 t.jsonl",
        "replay --generate agents --requests 10 --block-size 64 --seed 7",
        "status --server http://h:1 --json --watch",
        "status -o json --local",
        "status --server http://h:1 --token-file t",
        "explain --model m --prompt hello --policy random --json",
        "explain --file - --route /v1/responses -H x-session-id:7 --server http://h:1 --token-file t",
        "explain --model m --tokens 1,2,3",
        "index stats --json",
        "index digest --wait 3 --json --server http://h:1",
        "ksana nodes --json",
        "ksana groups --server http://h:1",
        "ksana pairs --token-file t",
        "ksana remove n",
        "serve --ksana-config config.ini",
        "keys new team-a --models a,b* --rps 0.5 --burst 3 --max-concurrent 9 --expires 2099-12-31T00:00:00Z",
        "keys hash",
        "stream list --all --json",
        "stream list --state failed,cancelled --model m --after st_x --limit 9",
        "stream show st_x --server http://h:1 --json",
        "stream cancel st_x --token-file t",
        "keys list --server http://h:1 --token-file t --json",
        "worker add http://h:1 --id w --engine sglang --model a --model b --role prefill --dp-ranks 2",
        "worker add http://h:1 --block-size 16 --capacity-blocks 9 --label k=v --weight 5 --no-probe",
        "worker remove w",
        "worker drain w",
        "worker undrain w",
        "worker list --json",
        "worker show w",
        "member list",
        "member add h:1",
        "member remove r1",
        "member promote r1",
        "member transfer-leader",
        "member repair --data-dir d --yes",
        "config print --json --origins --set a.b=c",
        "config check --config x.toml",
        "config default",
        "certs init",
        "certs init --dir d --cluster c --replica r1 --replica r2=h,10.0.0.1 --days 9 --ca-days 90 --force",
        "certs issue r1 --dir d --san a,b --san c --days 9 --force --cluster c",
        "certs issue gw --server --san h",
        "status --server https://h:1 --ca f",
        "completions zsh",
    ] {
        parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    }
}

#[test]
fn wrong_lines_are_refused() {
    for line in [
        "",
        "serv",
        "certs issue",
        "certs issue a/b",
        "certs init --days 0",
        "certs init --replica =h",
        "worker add",
        "explain",
        "explain --model m --prompt x --tokens 1",
        "explain --file x --model m",
        "index",
        "worker add http://h:1 --engine tgi",
        "balancer",
        "completions cmd",
        "replay",
        "replay --simulate",
        "replay --simulate --url http://h:1 --model m t.jsonl",
        "replay --url http://h:1 t.jsonl",
        "replay --generate agents t.jsonl",
        "replay --simulate --block-size 0 t.jsonl",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn every_subcommand_and_flag_has_a_help_text() {
    fn check(command: &clap::Command) {
        assert!(command.get_about().is_some(), "{}", command.get_name());
        for arg in command.get_arguments() {
            assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
        }
        command.get_subcommands().for_each(check);
    }
    let mut command = Cli::command();
    command.build();
    check(&command);
}

/// The reference page: every command's help, as it is printed.
fn reference_markdown() -> String {
    fn section(command: &mut clap::Command, depth: usize, out: &mut String) {
        let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
        let help = command.render_long_help().to_string();
        let help: Vec<&str> = help.trim().lines().map(str::trim_end).collect();
        let help = help.join("\n");
        out.push_str(&format!("\n{} `{name}`\n\n```text\n{help}\n```\n", "#".repeat(depth)));
        for inner in command.get_subcommands_mut() {
            section(inner, (depth + 1).min(4), out);
        }
    }
    let mut out = String::from(
        "# Command line\n\n\
         <!-- Generated from src/cli: EVERLINE_REGENERATE_DOCS=1 cargo test docs_are_up_to_date -->\n\n\
         One program is server and client. Commands that ask a cluster take `--server URL` (or `EVERLINE_SERVER`), the \
         admin address of any replica. Output has no colour when it is not a terminal or `NO_COLOR` is set, and a \
         reader that closes the pipe ends the command quietly.\n",
    );
    let mut command = Cli::command().term_width(100);
    command.build();
    section(&mut command, 2, &mut out);
    out
}

#[test]
fn docs_are_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/cli.md");
    if crate::config::variables().any(|(name, _)| name == "EVERLINE_REGENERATE_DOCS") {
        std::fs::write(&path, reference_markdown()).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == reference_markdown(),
        "run: EVERLINE_REGENERATE_DOCS=1 cargo test docs_are_up_to_date"
    );
}

/// What a command line comes to that must fail.
fn failure(line: &str) -> Failure {
    parse(line).unwrap().command.run(&mut Out::stdout()).unwrap_err()
}

#[test]
fn replay_says_what_is_wrong_and_what_would_be_right() {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("t.jsonl");
    let good = r#"{"timestamp":0,"input_length":600,"output_length":1,"hash_ids":[1,2]}"#;
    std::fs::write(&trace, format!("{good}\n{good}\n{{\"timestamp\":1}}\n")).unwrap();
    let trace = trace.display();
    for (line, words) in [
        ("replay --simulate /nowhere/t.jsonl".to_owned(), ["cannot read /nowhere/t.jsonl", "No such file"]),
        (format!("replay --simulate {trace}"), ["line 3", "missing field `input_length`"]),
        (format!("replay --simulate --limit 2 --block-size 16 {trace}"), ["line 1", "--block-size"]),
        (
            format!("replay --simulate --policy fastest {trace}"),
            ["unknown policy \"fastest\"", "kv_cost, cache_aware"],
        ),
        (format!("replay --simulate --policy kv_cost:x=1 {trace}"), ["no parameter \"x\"", "temperature"]),
        (format!("replay --simulate --policy random --policy random {trace}"), ["random", "given twice"]),
        (format!("replay --simulate --workers 0 {trace}"), ["workers", "1 to 256"]),
        (format!("replay --simulate --speed 0 {trace}"), ["--speed", "0.001"]),
        (
            format!("replay --url http://h:1 --model m --blocks 7 {trace}"),
            ["--blocks is for the simulation", "--simulate"],
        ),
        (format!("replay --url http://h:1 --model m --no-bound {trace}"), ["--no-bound", "leave it out"]),
        (
            format!("replay --url http://h:1 --model m --policy kv_cost:weight=4 {trace}"),
            ["by name", "--policy kv_cost,"],
        ),
        (
            format!("replay --url http://h:1 --model m --policy fastest {trace}"),
            ["--policy", "kv_cost, cache_aware"],
        ),
        (format!("replay {trace}"), ["--simulate", "--url"]),
        (format!("replay --url nonsense --model m {trace}"), ["--url nonsense", "http://"]),
        ("replay --generate x".to_owned(), ["unknown kind", "agents, rag, chat"]),
    ] {
        let Failure::Usage(text) = failure(&line) else { panic!("{line}: not a fault of usage") };
        assert!(words.iter().all(|word| text.contains(word)), "{line}: {text}");
    }
}

#[test]
fn a_shim_is_not_exposed_by_accident_and_knows_what_an_address_is() {
    let Failure::Usage(text) = failure("shim --listen 0.0.0.0:9099 --upstream http://r1:8080") else {
        panic!("not a fault of usage")
    };
    assert!(text.contains("0.0.0.0:9099") && text.contains("--expose"), "{text}");
    let Failure::Usage(text) = failure("shim --upstream http://r1:8080 --ca /nowhere/ca.pem") else {
        panic!("not a fault of usage")
    };
    assert!(text.contains("--ca") && text.contains("/nowhere/ca.pem"), "{text}");
    let refused = parse("shim --upstream http://r1:8080/v1").unwrap_err().to_string();
    assert!(refused.contains("without a path"), "{refused}");
    assert!(parse("shim").unwrap_err().to_string().contains("--upstream"));
}
