#!/bin/sh
# tools.sh: lorch with other people's tools: proxies, Prometheus, valgrind, other C libraries and machines.
#
#   LORCH=build/test/lorch LORCH_SLOW_MODEL=... tests/tools.sh [NAME-PART]
#
# Prints `ok - name`, `not ok - name` or `ok - name # SKIP why`. It runs in the top directory; a tool that is missing is a
# skipped test, and what needs a build of its own is skipped unless LORCH_TEST_FULL is set. .ci/run installs everything.

W=build/test
MODEL=tests/models/lorch-tiny-q8_0.gguf
IDS=1,5,9,200,31,77,512,3
STORY='Once upon a time'
type_json='Content-Type: application/json'
part=${1:-}
pids='' status=0

ok() { echo "ok - $1"; }
skip() { echo "ok - $1 # SKIP $2"; }
fail() { # NAME DETAIL
    status=1
    echo "not ok - $1"
    printf '%s\n' "${2:-}" | head -n 12 | sed 's/^/# /'
}
equal() { if [ "$2" = "$3" ]; then ok "$1"; else fail "$1" "is '$2', not '$3'"; fi; } # NAME GOT WANT
has() { command -v "$1" >/dev/null 2>&1; }
wanted() { case $1 in *"$part"*) return 0 ;; *) return 1 ;; esac; }
need() { # NAME TOOL...: says what is missing
    name=$1
    shift
    for tool in "$@"; do
        if ! has "$tool"; then skip "$name" "no $tool"; return 1; fi
    done
}
full() { [ -n "${LORCH_TEST_FULL:-}" ] || { skip "$1" "LORCH_TEST_FULL is not set"; return 1; }; }

end() {
    for p in $pids; do kill "$p" 2>/dev/null; done
    wait
}
trap 'end; exit 1' INT TERM
trap end EXIT

free_port() { # one that nobody answers on
    port=$((20000 + $$ % 10000 + ${used:-0}))
    while curl -s "http://127.0.0.1:$port/" >/dev/null 2>&1; do port=$((port + 7)); done
    used=$((${used:-0} + 101))
    echo $port
}
await() { # URL: until it answers
    for i in $(seq 100); do
        curl -sf "$1" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}
serve() { # LOG ARGUMENTS...: a worker; sets $worker and $url
    log=$1
    shift
    : >"$log.port" # of an earlier run
    "$LORCH" "$@" >"$log.port" 2>"$log" &
    worker=$!
    pids="$pids $worker"
    for i in $(seq 100); do
        [ -s "$log.port" ] && break
        sleep 0.1
    done
    url=http://127.0.0.1:$(sed -n '1s/[^0-9]*\([0-9][0-9]*\).*/\1/p' "$log.port")
    await "$url/readyz"
}
score() { "$@" score $MODEL --ids $IDS 2>&1 | tail -n 1; }
story() { "$@" generate $MODEL -p "$STORY" -n 24 --temperature 0 2>&1; }

# ==== Proxies and Prometheus, in front of a live worker ===========================================

# curl's trace has a line with the time for each piece that arrives: there must be about as many pieces as tokens, over
# most of the time that the job takes. A proxy that gathers the stream delivers few pieces, at the end.
streams_through() { # NAME URL
    curl -sN --trace-time --trace-ascii - -o /dev/null "$2/execute" -H "$type_json" \
        -d "{\"job_id\":\"$1-$$\",\"prompt\":\"$STORY\",\"max_tokens\":100,\"ignore_eos\":true,\"seed\":1}" >$W/"$1".trace 2>&1
    pieces=$(grep -c 'Recv data' $W/"$1".trace)
    spread=$(awk '/Recv data/ {split($1, t, ":"); last = t[1] * 3600 + t[2] * 60 + t[3]; if (!n++) first = last}
        END {printf "%d", (last - first) * 1000}' $W/"$1".trace)
    if [ "$pieces" -ge 60 ] && [ "$spread" -ge 60 ]; then ok "$1: events arrive one by one"
    else fail "$1: events arrive one by one" "$pieces pieces for 100 tokens, within $spread ms"; fi
    echo "# $pieces pieces over $spread ms"
}
whole_through() { # NAME URL: the same text as without the proxy, and a cancelled stream ends
    text() { curl -sN "$1/execute" -H "$type_json" -d "{\"job_id\":\"$2-$$\",\"prompt\":\"$STORY\",\"max_tokens\":30,\"seed\":3}" | grep -o '"t":"[^"]*"'; }
    equal "$1: the text is the worker's" "$(text "$2" "$1-a")" "$(text "$url" "$1-b")"
    out=$(curl -s -o /dev/null -w '%{http_code}' "$2/execute" -H "$type_json" -d '{')
    equal "$1: errors come through" "$out" 400
    (sleep 0.7; curl -s "$2/cancel" -H "$type_json" -d "{\"job_id\":\"$1-c-$$\"}" >/dev/null) &
    out=$(curl -sN "$2/execute" -H "$type_json" -d "{\"job_id\":\"$1-c-$$\",\"prompt\":\"$STORY\",\"max_tokens\":2000,\"ignore_eos\":true}" |
        tail -n 2 | grep -o '"code":"[A-Z]*"')
    equal "$1: cancel through it" "$out" '"code":"CANCELLED"'
}

test_haproxy() { # without http-no-delay it gathers pieces for up to 200 ms
    need haproxy haproxy curl || return
    port=$(free_port)
    cat >$W/haproxy.cfg <<END
defaults
    mode http
    option http-no-delay
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend orchestrator
    bind 127.0.0.1:$port
    default_backend workers
backend workers
    option httpchk GET /readyz
    server w1 ${url#http://} check inter 500ms
END
    haproxy -f $W/haproxy.cfg -db >$W/haproxy.log 2>&1 &
    pids="$pids $!"
    if ! await "http://127.0.0.1:$port/health"; then fail "haproxy: starts" "$(cat $W/haproxy.log)"; return; fi
    streams_through haproxy "http://127.0.0.1:$port"
    whole_through haproxy "http://127.0.0.1:$port"
}

test_nginx() { # with its defaults: HTTP/1.0 to the worker, and buffering, which X-Accel-Buffering turns off
    need nginx nginx curl || return
    port=$(free_port)
    mkdir -p $W/nginx
    cat >$W/nginx.conf <<END
daemon off;
worker_processes 1;
pid nginx/pid;
error_log nginx/error.log;
events {}
http {
    access_log off;
    client_body_temp_path nginx/body;
    proxy_temp_path nginx/proxy;
    fastcgi_temp_path nginx/fastcgi;
    uwsgi_temp_path nginx/uwsgi;
    scgi_temp_path nginx/scgi;
    server {
        listen 127.0.0.1:$port;
        location / { proxy_pass $url; }
    }
}
END
    nginx -p "$PWD/$W" -c nginx.conf -e nginx/error.log >$W/nginx.log 2>&1 &
    pids="$pids $!"
    if ! await "http://127.0.0.1:$port/health"; then fail "nginx: starts" "$(cat $W/nginx.log $W/nginx/error.log)"; return; fi
    streams_through nginx "http://127.0.0.1:$port"
    whole_through nginx "http://127.0.0.1:$port"
}

test_promtool() { # tolerates its remark on the unit in the one name that the specification fixes
    need "promtool: /metrics" promtool curl || return
    curl -s "$url/metrics" >$W/metrics.txt
    out=$(promtool check metrics <$W/metrics.txt 2>&1)
    code=$?
    rest=$(printf '%s\n' "$out" | grep -v '^worker_inference_duration_ms ' | grep .)
    if [ -z "$rest" ] && { [ $code = 0 ] || [ $code = 3 ]; } && [ -s $W/metrics.txt ]; then ok "promtool: /metrics"
    else fail "promtool: /metrics" "exit status $code
$out"; fi
}

test_live() {
    wanted haproxy || wanted nginx || wanted promtool || return
    if ! has curl; then skip "proxies" "no curl"; return; fi
    if ! serve $W/tools.log --model "$LORCH_SLOW_MODEL" --max-tokens-out 16000; then fail "a worker for the tools" "$(cat $W/tools.log)"; return; fi
    wanted haproxy && test_haproxy
    wanted nginx && test_nginx
    wanted promtool && test_promtool
    kill $worker
    wait $worker
    equal "the worker behind them ends well" $? 0
}

# ==== Other ways to build and run it ==============================================================

test_valgrind() {
    need "valgrind: a short text, no error and no leak" valgrind || return
    out=$(valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=all --show-leak-kinds=all "$LORCH" \
        generate $MODEL -p "$STORY" -n 5 --temperature 0 2>$W/valgrind.log)
    code=$?
    if [ $code = 0 ] && [ -n "$out" ]; then ok "valgrind: a short text, no error and no leak"
    else fail "valgrind: a short text, no error and no leak" "exit status $code
$(cat $W/valgrind.log)"; fi
    out=$(printf 'x,y' | valgrind -q --error-exitcode=9 --leak-check=full "$LORCH" detokenize $MODEL 2>&1)
    equal "valgrind: an error path, no leak" $? 1
}

test_musl() {
    need "musl: a static program" musl-gcc && full "musl: a static program" || return
    out=$(musl-gcc -static lorch.c -o $W/lorch-musl -lpthread -lm 2>&1)
    equal "musl: a static program, without a warning" "$?$out" 0
    equal "musl: the same logits" "$(score $W/lorch-musl)" "$(score "$LORCH")"
    musl-gcc -static -Os -s lorch.c -o $W/lorch-small -lpthread -lm
    equal "musl: with -Os and stripped less than 1 MB" "$(($(wc -c <$W/lorch-small) < 1000000)) $(score $W/lorch-small)" "1 $(score "$LORCH")"
    rm -rf $W/root
    mkdir -p $W/root
    cp $W/lorch-musl $W/root/lorch && cp $MODEL $W/root/m.gguf
    if [ "$(id -u)" != 0 ]; then skip "musl: in an empty chroot" "not root"; return; fi
    out=$(chroot $W/root /lorch generate /m.gguf -p "$STORY" -n 24 --temperature 0 2>&1)
    equal "musl: in an empty chroot" "$out" "$(story "$LORCH")"
}

test_i386() { # the headers below asm/ belong to gcc-multilib, which cross compilers exclude
    name='32-bit x86: a program'
    full "$name" || return
    printf '#include <stdio.h>\nint main(void) { return 0; }\n' >$W/m32.c
    if ! gcc -m32 $W/m32.c -o $W/m32 2>/dev/null; then skip "$name" "gcc -m32 does not work"; return; fi
    out=$(gcc -m32 -idirafter "/usr/include/$(gcc -print-multiarch)" lorch.c -o $W/lorch-i386 -lpthread -lm 2>&1)
    equal "$name, without a warning" "$?$(printf '%s' "$out" | head -n 5)" 0
    equal "32-bit x86: the same logits" "$(score $W/lorch-i386)" "$(score "$LORCH")"
    equal "32-bit x86: the same story" "$(story $W/lorch-i386)" "$(story "$LORCH")"
    out=$(gcc -m32 -msse2 -mfpmath=sse -idirafter "/usr/include/$(gcc -print-multiarch)" lorch.c -o $W/lorch-sse2 -lpthread -lm 2>&1)
    equal "32-bit x86 with -msse2, without a warning" "$?$(printf '%s' "$out" | head -n 5)" 0
    out=$($W/lorch-sse2 selftest 2>&1)
    equal "32-bit x86 with -msse2: selftest" "$?" 0
    equal "32-bit x86 with -msse2: the same logits" "$(score $W/lorch-sse2)" "$(score "$LORCH")"
}

# A program of another machine, run by qemu as if it were one of this: builds, agrees, serves.
test_machine() { # NAME MULTIARCH-TUPLE QEMU'S-NAME [COMPILER'S-FLAG]
    machine=$1 built=$W/lorch-$1
    need "$machine: a program" "$2-gcc" "qemu-$3" curl && full "$machine: a program" || return
    out=$("$2-gcc" ${4:+"$4"} lorch.c -o "$built" -lpthread -lm 2>&1)
    equal "$machine: a program, without a warning" "$?$out" 0
    printf '#!/bin/sh\nexec qemu-%s -L /usr/%s %s "$@"\n' "$3" "$2" "$built" >"$built.sh"
    chmod +x "$built.sh"
    out=$("$built.sh" selftest 2>&1)
    if [ $? = 0 ]; then ok "$machine: selftest"; else fail "$machine: selftest" "$out"; fi
    for m in tests/models/*.gguf; do
        MODEL=$m
        equal "$machine: the same logits of $(basename "$m" .gguf)" "$(score "$built.sh")" "$(score "$LORCH")"
    done
    MODEL=tests/models/lorch-tiny-q8_0.gguf
    equal "$machine: the same story" "$(story "$built.sh")" "$(story "$LORCH")"
    native=$LORCH LORCH=$built.sh
    if serve "$built.log" --model $MODEL; then
        out=$(curl -sN "$url/execute" -H "$type_json" -d "{\"job_id\":\"$machine\",\"prompt\":\"$STORY\",\"max_tokens\":24,\"temperature\":0}" |
            sed -n 's/.*"type":"token","t":"\([^"]*\)".*/\1/p' | tr -d '\n')
        equal "$machine: a worker serves it, too" "$STORY$out" "$(story "$native")"
        kill $worker
        wait $worker
        equal "$machine: the worker ends well" $? 0
    else fail "$machine: a worker starts" "$(cat "$built.log")"; fi
    LORCH=$native
}

# A compiler that lacks what lorch needs says so first, and names those that have it.
test_compilers() {
    wish='compile it with gcc 11 or later, or with clang'
    out=$(gcc -U__GNUC__ -fsyntax-only lorch.c 2>&1 | head -n 1)
    case $out in *"$wish"*) ok "an unknown compiler is refused, with advice" ;; *) fail "an unknown compiler is refused, with advice" "$out" ;; esac
    need "tcc is refused, with advice" tcc || return
    out=$(tcc lorch.c -o $W/lorch-tcc -lpthread -lm 2>&1)
    case "$? $out" in
    "0 "*) fail "tcc is refused, with advice" "it builds: $out" ;;
    *' error: #error '*"$wish"*) equal "tcc is refused, with advice alone" "$(printf '%s\n' "$out" | wc -l)" 1 ;;
    *) fail "tcc is refused, with advice" "$out" ;;
    esac
}

# llama.cpp's libraries come with an npm package, which goes into a directory of its own outside the repository. Sets $bins.
npm_library() { # NAME: says what is missing
    case $(uname -sm) in "Linux x86_64") arch=linux-x64 ;; "Linux aarch64") arch=linux-arm64 ;; *) skip "$1" "no package for $(uname -sm)"; return 1 ;; esac
    npm=${LORCH_BENCH_NPM:-${TMPDIR:-/tmp}/lorch-bench-npm}
    bins=$npm/node_modules/@node-llama-cpp/$arch/bins/$arch
    [ -d "$bins" ] && return
    need "$1" npm && full "$1" || return 1
    mkdir -p "$npm" && (cd "$npm" && npm install --no-save --no-audit --no-fund "@node-llama-cpp/$arch" >npm.log 2>&1)
    [ -d "$bins" ] || { fail "$1" "npm install: $(tail -n 3 "$npm/npm.log")"; return 1; }
}

test_ggml() {
    name='the values of all formats are llama.cpp'"'"'s'
    full "$name" && npm_library "$name" || return
    out=$(cc -std=gnu99 -O1 -w tests/ggml.c -o $W/ggml -ldl -lpthread -lm 2>&1) || { fail "$name" "$out"; return; }
    $W/ggml "$bins/libggml-base.so" || status=1
}

test_quality() {
    name='quantised models are as true to their weights as llama.cpp'"'"'s'
    full "$name" && npm_library "$name" || return
    out=$(cc -std=gnu99 -O1 -w tests/quality.c -o $W/quality -ldl -lm 2>&1) || { fail "$name" "$out"; return; }
    $W/quality "$bins" || status=1
}

# With LORCH_TEST_FULL two or three minutes, else seconds. See tests/tokfuzz.c for what the settings mean.
test_tokens() {
    name='tokens are llama.cpp'"'"'s'
    npm_library "$name" || return
    out=$(cc -std=gnu99 -O2 -w tests/tokfuzz.c -o $W/tokfuzz -ldl -lpthread -lm 2>&1) || { fail "$name" "$out"; return; }
    if [ -z "${LORCH_TEST_FULL:-}" ]; then
        LORCH_FUZZ_TEXTS=${LORCH_FUZZ_TEXTS:-300} LORCH_FUZZ_TEXTS_PRE=${LORCH_FUZZ_TEXTS_PRE:-0} LORCH_FUZZ_MADE=${LORCH_FUZZ_MADE:-40}
        export LORCH_FUZZ_TEXTS LORCH_FUZZ_TEXTS_PRE LORCH_FUZZ_MADE
    fi
    set -- $MODEL
    if [ -n "${LORCH_SHARED:-}" ]; then set -- "$@" "$LORCH_SHARED"/testdata/vocab/*.gguf "$LORCH_SHARED"/testdata/models/*.gguf; fi
    $W/tokfuzz "$bins" $W "$@" || status=1
}

# The kernel's own cgroups, where this user may make one: version 1, or 2 where the memory controller is passed on.
test_cgroup() {
    name='cgroup: a model that is larger than the limit is refused'
    group='' size=$(wc -c <"$LORCH_SLOW_MODEL")
    for top in /sys/fs/cgroup/memory /sys/fs/cgroup; do
        [ -z "$group" ] && mkdir "$top/lorch-test-$$" 2>/dev/null || continue
        group=$top/lorch-test-$$
        for limit in memory.limit_in_bytes memory.max; do [ -w "$group/$limit" ] && break; done
        [ -w "$group/$limit" ] && break
        rmdir "$group"
        group=''
    done
    if [ -z "$group" ]; then skip "$name" "no cgroup can be made here"; return; fi
    inside() { sh -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$group" "$@"; }
    echo $((size / 2)) >"$group/$limit"
    out=$(inside "$LORCH" --model "$LORCH_SLOW_MODEL" --parallel 1 --threads 1 2>&1)
    code=$?
    case "$code $out" in
    "1 "*INSUFFICIENT_MEMORY*'bytes of this machine or group'*) ok "$name" ;;
    *) fail "$name" "exit status $code
$out" ;;
    esac
    echo $((size * 2 + 200000000)) >"$group/$limit"
    out=$(inside "$LORCH" score "$LORCH_SLOW_MODEL" --ids 1,2,3 2>&1 | tail -n 1)
    equal "cgroup: below a limit that it fits, the same logits" "$out" "$("$LORCH" score "$LORCH_SLOW_MODEL" --ids 1,2,3 2>&1 | tail -n 1)"
    rmdir "$group"
}

test_coverage() {
    full "coverage of the parsers" || return
    tests/coverage.sh || status=1
}

test_install() {
    full "make install" || return
    out=$(make -s install DESTDIR="$PWD/$W/dest" PREFIX=/usr 2>&1)
    equal "make install, below DESTDIR" "$?$out$(ls $W/dest/usr/bin)" 0lorch
    equal "make install: the same logits" "$(score $W/dest/usr/bin/lorch)" "$(score "$LORCH")"
    out=$(make -s debug 2>&1)
    equal "make debug, without a warning" "$?$out" 0
    equal "make debug: the same logits" "$(score build/lorch-debug)" "$(score "$LORCH")"
}

test_live
wanted valgrind && test_valgrind
wanted musl && test_musl
wanted i386 && test_i386
wanted arm64 && test_machine arm64 aarch64-linux-gnu aarch64
wanted riscv64 && test_machine riscv64 riscv64-linux-gnu riscv64 -O1 # without vector instructions -O3 takes five minutes
wanted compilers && test_compilers
wanted ggml && test_ggml
wanted quality && test_quality
wanted tokens && test_tokens
wanted install && test_install
wanted cgroup && test_cgroup
wanted coverage && test_coverage
exit $status
