# What a person can do here. `just` alone lists it.

_list:
    @just --list --unsorted

# A whole cluster on this machine, on port 8080
demo *args:
    cargo run --release -- demo {{args}}

# What is run in production, in target/production: a fifth less CPU for three times the build
production:
    cargo build --profile production --locked --bin everline

# All tests
test *args:
    cargo test {{args}}

# Clippy, warnings are errors
lint:
    cargo clippy --all-targets -- -D warnings

# Format everything
fmt:
    cargo fmt --all

# The structure test alone: the written invariants, links, metrics and commands in the docs
structure:
    cargo test --test structure

# Benchmarks of the replicated state
bench *args:
    cargo bench --bench cluster -- {{args}}

# Tests with real processes and faults
chaos *args:
    cargo test --package chaos-tests {{args}}

# Write docs/reference/{cli,configuration}.md again from the code
docs-regenerate:
    EVERLINE_REGENERATE_DOCS=1 cargo test docs_are_up_to_date

# The API documentation, in a browser
doc:
    cargo doc --no-deps --open

# A commented configuration with every key
config-default:
    cargo run -- config default

# Exactly what CI runs
ci:
    .ci/run
