#!/usr/bin/env bash
# What hostile clients cost honest ones: p50, p99 and failures of the same load without and with
# slow heads, refused requests and HTTP/2 floods, three times in turn. The attackers share this
# machine's processors in a process of their own at the lowest priority.
#
# Usage: benches/hostile.sh [SECONDS]      (each phase; 10 where left out)
set -euo pipefail
cd "$(dirname "$0")/.."
exec cargo run --release --quiet --package chaos-tests --example hostile -- "${1:-10}"
