#!/bin/sh
# same.sh: the same bits everywhere. One model of each number format is scored in many ways; the hash over the bits
# of all logits must not change.
#
#   LORCH=build/test/lorch tests/same.sh [NAME-PART]
#
# Ways: instruction sets, threads, chunks of the prompt, other compilers, optimisation levels, C libraries and machines.
# By default each pair of instruction set, threads and chunk is tried for each format; with LORCH_TEST_FULL every
# combination, and the programs that tests/tools.sh has built (musl, 32-bit, arm64, riscv64), clang's, and gcc's without -O.

W=build/test
B=build/test/same
IDS=1,5,9,200,31,77,300,3,42,256,17,99,128,64,2,350,11,222,333,8,45,90,180,360,21,87,301,6,54,270,33,71,199
FORMATS='f32 f16 bf16 q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs mxfp4'
part=${1:-}
status=0
mkdir -p $B

wanted() { case $1 in *"$part"*) return 0 ;; *) return 1 ;; esac; }
report() { # NAME DIFFERENCES TRIED
    if [ -n "$2" ]; then
        echo "not ok - $1"
        printf '%s\n' "$2" | head -n 8 | sed 's/^/# /'
        status=1
    elif [ "$3" -lt 1 ]; then echo "not ok - $1: nothing was tried"; status=1
    else echo "ok - $1"; echo "# $3 ways"; fi
}
hash_of() { "$@" --ids $IDS --top 0 2>&1 | sed -n 's/.*"logits_hash":"\([^"]*\)".*/\1/p'; }

# The levels that this build has and this CPU runs: a level that does not run is refused with exit 1.
levels=''
for level in scalar avx2 avxvnni avx512 avx512vnni neon neondot; do
    LORCH_SIMD=$level "$LORCH" score tests/models/lorch-tiny-q8_0.gguf --ids 1 >/dev/null 2>&1 && levels="$levels $level"
done

# Threads and chunks so that, over the levels, each pair of values comes up: chunk number (level + thread) mod 4.
ways() { # prints "LEVEL THREADS CHUNK" lines
    l=0
    for level in $levels; do
        t=0
        for threads in 1 2 3 7; do
            c=0
            for chunk in 1 5 64 512; do
                if [ -n "${LORCH_TEST_FULL:-}" ] || [ $(((l + t) % 4)) = $c ]; then echo "$level $threads $chunk"; fi
                c=$((c + 1))
            done
            t=$((t + 1))
        done
        l=$((l + 1))
    done
}

try() { # FORMAT MODEL KV: LORCH in all ways
    want=$(hash_of "$LORCH" score "$2" --kv-type "$3")
    ways | while read -r level threads chunk; do
        got=$(LORCH_SIMD=$level hash_of "$LORCH" score "$2" -t "$threads" --chunk "$chunk" --kv-type "$3")
        [ -n "$want" ] && [ "$got" = "$want" ] || echo "$1, KV $3, $level, $threads threads, chunk $chunk: '$got', not '$want'"
    done
}

model() { # FORMAT: sets $path
    path=$B/$1.gguf
    [ -s "$path" ] || "$W/mkmodel" llama "$1" "$path" >/dev/null || status=1
}

for format in $FORMATS; do
    wanted "$format: every way" || continue
    model $format
    report "$format: every way gives the same bits" "$(try $format "$path" f16)" "$(ways | grep -c .)"
done
for kv in f32 q8_0; do
    wanted "KV in $kv" || continue
    model q4_k
    report "KV in $kv: every way gives the same bits" "$(try q4_k "$path" $kv)" "$(ways | grep -c .)"
done

# ---- the families of models ----

ARCHS='qwen2 qwen2moe qwen3 qwen3moe gemma2 gemma3 phi3 gpt2 gpt-oss smollm3 olmo2 olmoe granite granitemoe starcoder2 stablelm command-r
cohere2 exaone4 ernie4_5 glm4 lfm2 lfm2moe deepseek2'
generated() { "$LORCH" generate "$@" -p 'the rest of the theme, the rest of the theme' -n 80 --temperature 0.6 --seed 7 --json 2>&1; }
drafted=0
for arch in $ARCHS; do
    path=$B/$arch.gguf
    wanted "$arch" || continue
    [ -s "$path" ] || "$W/mkmodel" "$arch" q8_0 "$path" >/dev/null || status=1
    report "$arch: every way gives the same bits" "$(try "$arch" "$path" f16)" "$(ways | grep -c .)"
    plain=$(generated "$path" --no-speculate) ahead=$(generated "$path")
    drafts=$(printf '%s' "$ahead" | sed -n 's/.*"drafted_tokens":\([0-9]*\).*/\1/p') drafted=$((drafted + ${drafts:-0}))
    plain=${plain%%\"seed\"*} ahead=${ahead%%\"seed\"*}
    case $plain in *'"ids":['[0-9]*) ;; *) plain="failed: $plain" ;; esac
    report "$arch: speculation gives the same tokens" "$([ "$plain" = "$ahead" ] || printf '%s\nnot %s' "$ahead" "$plain")" 2
done
[ -z "$part" ] && report 'speculation: some tokens were drafted' "$([ $drafted -gt 0 ] || echo 'no tokens were drafted')" 1

# ---- other builds: each format once ----

builds() { # NAME COMMAND...: a program that is there
    name=$1
    shift
    wanted "$name" || return
    out=$(for format in $FORMATS; do
        path=$B/$format.gguf
        [ -s "$path" ] || "$W/mkmodel" llama "$format" "$path" >/dev/null
        want=$(hash_of "$LORCH" score "$path")
        got=$(hash_of "$@" score "$path")
        [ -n "$want" ] && [ "$got" = "$want" ] || echo "$format: '$got', not '$want'"
    done)
    report "$name: the same bits in all formats" "$out" 16
}
build() { # NAME COMPILER FLAGS...
    name=$1
    shift
    wanted "$name" || return
    command -v "$1" >/dev/null || { echo "ok - $name: the same bits in all formats # SKIP no $1"; return; }
    "$@" lorch.c -o "$B/lorch-$name" -lpthread -lm >"$B/$name.log" 2>&1 || { report "$name: builds" "$(cat "$B/$name.log")" 1; return; }
    builds "$name" "$B/lorch-$name"
}

if [ -z "${LORCH_TEST_FULL:-}" ]; then echo "ok - other compilers and machines # SKIP LORCH_TEST_FULL is not set"; exit $status; fi
build gcc-O0 gcc -O0 -DLORCH_DEBUG
build clang-O0 clang -O0
build clang-O3 clang -O3
for p in musl i386; do
    if [ -x $W/lorch-$p ]; then builds $p $W/lorch-$p; else echo "ok - $p: the same bits in all formats # SKIP tests/tools.sh has not built it"; fi
done
if [ -x $W/lorch-arm64 ] && command -v qemu-aarch64 >/dev/null; then
    for level in neon neondot; do
        builds "arm64 $level" env LORCH_SIMD=$level qemu-aarch64 -L /usr/aarch64-linux-gnu $W/lorch-arm64
    done
else echo "ok - arm64: the same bits in all formats # SKIP tests/tools.sh has not built it"; fi
if [ -x $W/lorch-riscv64 ] && command -v qemu-riscv64 >/dev/null; then builds riscv64 qemu-riscv64 -L /usr/riscv64-linux-gnu $W/lorch-riscv64
else echo "ok - riscv64: the same bits in all formats # SKIP tests/tools.sh has not built it"; fi

# ---- x86 CPUs that have less ----

if [ "$(uname -m)" != x86_64 ]; then exit $status; fi
if ! command -v qemu-x86_64 >/dev/null; then echo "ok - older x86 CPUs # SKIP no qemu-x86_64"; exit $status; fi
builds "x86 of 2008" qemu-x86_64 -cpu Nehalem "$LORCH"
builds "x86 of 2013" qemu-x86_64 -cpu Haswell "$LORCH"
if wanted "a level that the CPU lacks is refused"; then
    out=$(LORCH_SIMD=avx2 qemu-x86_64 -cpu Nehalem "$LORCH" score tests/models/lorch-tiny-q8_0.gguf --ids 1 2>&1)
    code=$?
    case "$code $out" in
    "1 "*avx2*) echo "ok - a level that the CPU lacks is refused" ;;
    *) report "a level that the CPU lacks is refused" "exit status $code: $out" 1 ;;
    esac
fi
exit $status
