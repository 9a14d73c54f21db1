#!/bin/sh
# bench_engine.sh: how a worker shares its time among jobs, beside llama.cpp's batched decode where that is at hand.
#
#   tests/bench_engine.sh [MODEL.gguf [SECTION ...]]
#
# It builds tests/bench_engine.c and runs it: decode throughput of 1 to 16 jobs, what a long prompt does to the tokens of
# others, cancels and disconnects amid such a prompt, the prefix cache, speculation on text that repeats and on text
# that does not, predictions, deadlines, idleness, a full queue. Without arguments the model is the one of the shape of
# Llama 3.2 1B that $LORCH_SHARED/tools/mkmodel.py writes into build/bench, or the largest of the tests.
#
# Environment: as in tests/bench_engine.c; LORCH_SHARED, and LORCH_BENCH_NPM, the directory of the npm package
# node-llama-cpp as tests/bench.sh installs it: both share it.

case ${LORCH_SHARED:-} in ''|/*) ;; *) LORCH_SHARED=$PWD/$LORCH_SHARED ;; esac
cd "$(dirname "$0")/.." || exit 1
LORCH=${LORCH:-./lorch} THREADS=${THREADS:-2} TOKENS=${TOKENS:-64} ROUNDS=${ROUNDS:-3}
NPM=${LORCH_BENCH_NPM:-${TMPDIR:-/tmp}/lorch-bench-npm}
B=build/bench
export LORCH THREADS TOKENS ROUNDS
mkdir -p $B
[ -x "$LORCH" ] || { echo "no $LORCH: run make first" >&2; exit 1; }
cc -std=c99 -O1 tests/bench_engine.c -o $B/bench_engine -lpthread -lm || exit 1

model=${1:-}
[ $# = 0 ] || shift
if [ -z "$model" ]; then
    model=tests/models/lorch-tiny-q8_0.gguf
    [ -e build/test/slow.gguf ] && model=build/test/slow.gguf
    if [ -n "${LORCH_SHARED:-}" ] && command -v python3 >/dev/null 2>&1; then
        model=$B/llama-3.2-1b-q4_k_m.gguf
        [ -s $model ] || { python3 "$LORCH_SHARED/tools/mkmodel.py" llama-3.2-1b q4_k_m $model.part >/dev/null && mv $model.part $model; } || exit 1
    else echo "skipped: Llama 3.2 1B (it needs LORCH_SHARED and python3)"; fi
fi

echo "== lorch, $(basename "$model" .gguf), $THREADS threads"
$B/bench_engine "$model" "$@" || exit 1

case "${1:-jobs}" in jobs) ;; *) exit 0 ;; esac
case $(uname -sm) in "Linux x86_64") arch=linux-x64 ;; "Linux aarch64") arch=linux-arm64 ;; *) arch=none ;; esac
bins=$NPM/node_modules/@node-llama-cpp/$arch/bins/$arch
[ -d "$bins" ] || { echo "skipped: llama.cpp (no package in $NPM: tests/bench.sh installs it)"; exit 0; }
llama=$(cd "$bins" && ls libllama.so* libllama.v*.so 2>/dev/null | head -n 1)
ggml=$(cd "$bins" && ls libggml.so* libggml.v*.so 2>/dev/null | head -n 1)
if cc -O2 tests/bench_peer.c -o $B/bench_peer "-L$bins" "-l:$llama" "-l:$ggml" -l:libggml-base.so "-Wl,-rpath,$bins" 2>$B/bench_peer.log; then
    echo "== llama.cpp, batched decode"
    $B/bench_peer "$model" "$bins" "$THREADS" "$TOKENS" "$ROUNDS" 2>$B/peer.log || { echo "skipped: llama.cpp ($(tail -n 1 $B/peer.log))"; exit 0; }
else echo "skipped: llama.cpp (bench_peer does not build: $B/bench_peer.log)"; fi
