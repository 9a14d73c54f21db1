#!/bin/sh
# bench.sh: how fast lorch is, beside llama.cpp where that is at hand.
#
#   tests/bench.sh [MODEL.gguf ...]
#
# Without arguments it measures models of the shape of Llama 3.2 1B with random weights, which the scripts below
# $LORCH_SHARED write into build/bench; without LORCH_SHARED, the largest model of the tests. The opponent is the library
# of the npm package node-llama-cpp, driven by $LORCH_SHARED/tools/peerbench.c. A machine's speed swings with its
# neighbours, so both run in turns, in ROUNDS (5) rounds, and what counts is the ratio of the medians.
#
# Environment: LORCH (./lorch), LORCH_SHARED, ROUNDS, THREADS (2), PROMPT (512), TOKENS (64),
# LORCH_BENCH_NPM (a directory for the npm package, outside the repository; default below TMPDIR).

case ${LORCH_SHARED:-} in ''|/*) ;; *) LORCH_SHARED=$PWD/$LORCH_SHARED ;; esac
cd "$(dirname "$0")/.." || exit 1
LORCH=${LORCH:-./lorch} ROUNDS=${ROUNDS:-5} THREADS=${THREADS:-2} PROMPT=${PROMPT:-512} TOKENS=${TOKENS:-64}
NPM=${LORCH_BENCH_NPM:-${TMPDIR:-/tmp}/lorch-bench-npm}
B=build/bench
mkdir -p $B
[ -x "$LORCH" ] || { echo "no $LORCH: run make first" >&2; exit 1; }

has() { command -v "$1" >/dev/null 2>&1; }
field() { sed -n "s/.*\"$1\":\"\{0,1\}\([^,\"}]*\).*/\1/p"; }
median() { sort -n | awk '{v[NR] = $1} END {if (NR) print v[int((NR + 1) / 2)]; else print 0}'; }

# ---- the opponent ----

peer='' bins=''
find_peer() {
    [ -n "${LORCH_SHARED:-}" ] || { echo "skipped: llama.cpp (LORCH_SHARED is not set)"; return; }
    case $(uname -sm) in "Linux x86_64") arch=linux-x64 ;; "Linux aarch64") arch=linux-arm64 ;; *) echo "skipped: llama.cpp (no package for $(uname -sm))"; return ;; esac
    bins=$NPM/node_modules/@node-llama-cpp/$arch/bins/$arch
    if [ ! -d "$bins" ]; then
        has npm || { echo "skipped: llama.cpp (no npm)"; return; }
        mkdir -p "$NPM" && (cd "$NPM" && npm install --no-save --no-audit --no-fund "@node-llama-cpp/$arch" >npm.log 2>&1)
        [ -d "$bins" ] || { echo "skipped: llama.cpp (npm install failed: $NPM/npm.log)"; return; }
    fi
    llama=$(cd "$bins" && ls libllama.so* libllama.v*.so 2>/dev/null | head -n 1)
    ggml=$(cd "$bins" && ls libggml.so* libggml.v*.so 2>/dev/null | head -n 1)
    if cc -O2 "$LORCH_SHARED/tools/peerbench.c" -o $B/peerbench "-L$bins" "-l:$llama" "-l:$ggml" -l:libggml-base.so \
        "-Wl,-rpath,$bins" 2>$B/peerbench.log; then peer=$B/peerbench
    else echo "skipped: llama.cpp (peerbench does not build: $B/peerbench.log)"; fi
}

# ---- the models ----

models=''
make_models() {
    if [ -z "${LORCH_SHARED:-}" ] || ! has python3; then
        echo "skipped: Llama 3.2 1B (it needs LORCH_SHARED and python3)"
        models=$(ls tests/models/*.gguf | head -n 1)
        [ -e build/test/slow.gguf ] && models=build/test/slow.gguf
        return
    fi
    for mix in q4_k_m q8_0 q4_0; do
        m=$B/llama-3.2-1b-$mix.gguf
        [ -s $m ] || { python3 "$LORCH_SHARED/tools/mkmodel.py" llama-3.2-1b $mix $m.part >/dev/null && mv $m.part $m; }
        models="$models $m"
    done
}

# ---- measuring ----

bar() { # NAME RATE LARGEST: a bar of up to 40 signs
    awk -v name="$1" -v rate="$2" -v most="$3" 'BEGIN {
        n = most > 0 ? int(rate / most * 40 + 0.5) : 0
        for (i = 0; i < n; i++) s = s "#"
        printf "  %-10s %9.1f t/s %s\n", name, rate, s
    }'
}
compare() { # WHAT OURS THEIRS
    most=$(awk -v a="$2" -v b="$3" 'BEGIN {print (a > b ? a : b)}')
    echo "$1"
    bar lorch "$2" "$most"
    [ -z "$peer" ] || { bar llama.cpp "$3" "$most"; awk -v a="$2" -v b="$3" 'BEGIN {if (b > 0) printf "  ratio      %9.2f\n", a / b}'; }
}

measure() { # MODEL
    rm -f $B/ours $B/theirs
    for round in $(seq "$ROUNDS"); do
        "$LORCH" bench "$1" -p "$PROMPT" -n "$TOKENS" -t "$THREADS" -r 1 --json >>$B/ours || return 1
        if [ -n "$peer" ] && ! "$peer" "$1" "$bins" "$PROMPT" "$TOKENS" "$THREADS" 1 >>$B/theirs 2>$B/peer.log; then
            echo "skipped: llama.cpp on $1 ($(tail -n 1 $B/peer.log))"
            peer=''
        fi
        printf '\r%s: round %s of %s' "$(basename "$1" .gguf)" "$round" "$ROUNDS" >&2
    done
    printf '\r%60s\r' '' >&2
    echo "== $(basename "$1" .gguf): $PROMPT prompt tokens, $TOKENS generated, $(field threads <$B/ours | head -n 1) threads, $(field simd <$B/ours | head -n 1)"
    touch $B/theirs
    compare "prefill" "$(field prefill_tok_s <$B/ours | median)" "$(field prefill_tok_s <$B/theirs | median)"
    compare "decode" "$(field decode_tok_s <$B/ours | median)" "$(field decode_tok_s <$B/theirs | median)"
    printf '  of what this machine reads (%s GB/s): %s; of its int8 peak (%s T op/s), over the prefill: %s\n' "$(field read_gb_s <$B/ours | median)" \
        "$(field decode_bandwidth_share <$B/ours | median)" "$(field int8_tops <$B/ours | median)" "$(field prefill_peak_share <$B/ours | median)"
}

busy=$(cut -d ' ' -f 1 /proc/loadavg 2>/dev/null || echo 0)
if awk -v load="$busy" 'BEGIN {exit !(load > 0.5)}'; then
    echo "warning: the load average is $busy: others use this machine, and neither the rates nor their ratios mean much"
fi
find_peer
if [ $# -gt 0 ]; then models=$*; else make_models; fi
for model in $models; do measure "$model" || exit 1; done
