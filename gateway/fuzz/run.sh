#!/usr/bin/env bash
# run.sh [SECONDS]: feeds hostile bytes to sessions, guided by the branches that they reach (libFuzzer), for a minute or so long. Fails
# on a crash, a hang or an answer out of proportion; the input that did it is then in gateway/fuzz/artifacts/.
#
# Runs on the stable compiler: coverage is a pass of LLVM, and no sanitizer is needed where no code is unsafe.
set -euo pipefail
cd "$(dirname "$0")"
seconds="${1:-60}"
mkdir -p corpus/input artifacts
# The same libraries as the gateway that runs.
cp ../../Cargo.lock Cargo.lock
# Not for build scripts and procedural macros: an explicit target keeps them as they are.
target="$(rustc -vV | sed -n 's/^host: //p')"
RUSTFLAGS="--cfg fuzzing -C debug-assertions -C codegen-units=1 -C passes=sancov-module \
-C llvm-args=-sanitizer-coverage-level=4 -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
-C llvm-args=-sanitizer-coverage-pc-table -C llvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --quiet --target "$target"
"target/$target/release/input" -max_total_time="$seconds" -max_len=4096 -timeout=10 -print_final_stats=1 \
    -artifact_prefix=artifacts/ corpus/input
