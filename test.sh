#!/bin/sh
# test.sh: every test of lorch, as TAP.
#
#   ./test.sh [-v] [PATTERN]
#
# It needs sh, cc, make and curl, and less than five minutes on two cores. What more a test wants is taken if it is
# there, else the test is skipped by name; .ci/run installs all of it. -v shows what passing tests have to say.
#
# PATTERN chooses groups (build shape unit engine embed accuracy tokenizer badgguf contract execute wire guard faults load stress
# fuzz curl config asan tsan tools) by a part of their name; if it is no part of one, the tests of the test programs whose names contain it.
#
# Environment: LORCH_SHARED, a directory with more models and conformance files; LORCH_TEST_FULL=1 adds what takes longer
# (thread sanitizer, other machines, emulators); CC. Work files are in build/test; what is up to date is not built again.

case ${LORCH_SHARED:-} in ''|/*) ;; *) LORCH_SHARED=$PWD/$LORCH_SHARED; export LORCH_SHARED ;; esac
cd "$(dirname "$0")" || exit 1
verbose=0
[ "${1:-}" = -v ] && verbose=1 && shift
pattern=${1:-}
CC=${CC:-cc}
W=build/test
MODEL=tests/models/lorch-tiny-q8_0.gguf
n=0 passed=0 failed=0 skipped=0 pids=''

# What the shape tests hold lorch.c to; functions whose flatness is the point may be named here.
MAX_COLUMNS=170 MAX_FUNCTION=70 MAX_UNMARKED=500
LONG_FUNCTIONS=''
STRICT='-std=c99 -pedantic -Wall -Wextra -Wshadow -Wconversion -Wundef -Wmissing-prototypes -Wstrict-prototypes'
SANITIZE='-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all -fno-var-tracking -g1 -O1'
GROUPS_ALL='build shape unit engine embed accuracy tokenizer badgguf contract execute wire guard faults load stress fuzz curl config asan tsan tools same'
PROGRAMS='unit engine embed accuracy tokenizer badgguf contract execute wire guard faults load stress'

# ==== Results ====================================================================================

ok() { n=$((n + 1)) passed=$((passed + 1)); echo "ok $n - $1"; }
skip() { n=$((n + 1)) skipped=$((skipped + 1)); echo "ok $n - $1 # SKIP $2"; }
fail() { # NAME [DETAIL]: the detail may have several lines
    n=$((n + 1)) failed=$((failed + 1))
    echo "not ok $n - $1"
    [ -z "${2:-}" ] || printf '%s\n' "$2" | head -n 20 | sed 's/^/# /'
}
check() { if [ "$2" = 0 ]; then ok "$1"; else fail "$1" "${3:-}"; fi; } # NAME STATUS [DETAIL]
equal() { if [ "$2" = "$3" ]; then ok "$1"; else fail "$1" "is '$2', not '$3'"; fi; } # NAME GOT WANT
has() { command -v "$1" >/dev/null 2>&1; }

# ==== Choosing, building, running =================================================================

filter=$pattern
for g in $GROUPS_ALL; do
    case $g in *"$pattern"*) filter='' ;; esac
done

wanted() { # GROUP
    if [ -n "$filter" ]; then case " $PROGRAMS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; fi
    case $1 in *"$pattern"*) return 0 ;; *) return 1 ;; esac
}
wants() { for g in "$@"; do wanted "$g" && return 0; done; return 1; }

started() { # PID: ended with this script, however that ends
    pids="$pids $1"
}
give_up() {
    trap - EXIT
    for p in $pids; do kill "$p" 2>/dev/null; done
    rm -f $W/pid
    exit "$1"
}
trap 'give_up 1' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Compiles OUT by a command, unless it is newer than all sources; $W/NAME.log and .rc keep how it went.
compile() { # NAME OUT COMMAND...
    name=$1 out=$2
    shift 2
    if [ -e "$out" ] && [ "$(cat "$W/$name.rc" 2>/dev/null)" = 0 ] &&
        [ -z "$(find lorch.c lorch.h tests/*.[ch] test.sh -newer "$out")" ]; then return; fi
    rm -f "$out"
    "$@" >"$W/$name.log" 2>&1
    echo $? >"$W/$name.rc"
    if [ -e "$out" ]; then touch -r "$W/started" "$out"; fi # a source that changes meanwhile is newer
}
compiled() { # NAME WHAT: without a warning
    rc=$(cat "$W/$1.rc" 2>/dev/null || echo none)
    if [ "$rc" != 0 ] || [ -s "$W/$1.log" ]; then fail "build: $2" "exit status $rc
$(cat "$W/$1.log" 2>/dev/null)"; else ok "build: $2"; fi
}

# A test program's lines `ok - name`, `not ok - name`, `ok - name # SKIP why` and `# detail` join the one stream.
launch() { # GROUP COMMAND...
    group=$1
    shift
    "$@" ${filter:+"$filter"} >"$W/$group.out" 2>&1 &
    started $!
    eval "pid_$group=$!"
}
collect() { # GROUP
    eval "pid=\$pid_$1"
    wait "$pid"
    code=$? count=0 bad=0 show=0
    while IFS= read -r line; do
        case $line in
        "ok - "*"# SKIP "*) line=${line#ok - } show=$verbose; skip "$1: ${line%% # SKIP *}" "${line#* # SKIP }" ;;
        "ok - "*) show=$verbose; ok "$1: ${line#ok - }" ;;
        "not ok - "*) show=1 bad=1; fail "$1: ${line#not ok - }" ;;
        "#"*) [ "$show" = 0 ] || printf '%s\n' "$line"; continue ;;
        *) continue ;;
        esac
        count=$((count + 1))
    done <"$W/$1.out"
    if [ $count = 0 ] && [ -z "$filter" ]; then fail "$1: prints its tests" "exit status $code
$(tail -n 5 "$W/$1.out")"
    elif [ $code != 0 ] && [ $bad = 0 ] && [ $count != 0 ]; then fail "$1: ends well" "exit status $code
$(tail -n 5 "$W/$1.out")"; fi
}
run() { launch "$@"; collect "$1"; }

begin=$(date +%s)
took() { # WHAT: under -v, how long it took
    now=$(date +%s)
    [ $verbose = 0 ] || echo "# $1: $((now - begin)) s"
    begin=$now
}

# ==== build ======================================================================================

mkdir -p $W
if [ -s $W/pid ] && kill -0 "$(cat $W/pid)" 2>/dev/null; then
    echo "another test.sh works in $W (process $(cat $W/pid))" >&2
    trap - EXIT
    exit 1
fi
echo $$ >$W/pid
: >$W/started

build_plain() {
    compile lorch $W/lorch "$CC" lorch.c -o $W/lorch -lpthread -lm
    for p in accuracy tokenizer badgguf contract execute wire guard faults load stress mkmodel; do
        compile $p $W/$p "$CC" -std=c99 -O1 tests/$p.c -o $W/$p -lpthread -lm
    done
    # Jobs of this model last: the 14,000 tokens of a long prompt take seconds, and a token takes milliseconds.
    compile slow $W/slow.gguf $W/mkmodel llama q8_0 $W/slow.gguf embd=1024 ff=3072 layers=8 heads=16 kv=4 hd=64 vocab=512 ctx=16384
    wants unit && compile unit $W/unit "$CC" -std=gnu99 -O1 -w tests/unit.c -o $W/unit -lpthread -lm
    wants engine && compile engine $W/engine "$CC" -std=gnu99 -O1 -w tests/engine.c -o $W/engine -lpthread -lm
    if wants embed build; then
        # shellcheck disable=SC2086
        compile object $W/lorch.o "$CC" $STRICT -O1 -DLORCH_NO_MAIN -c lorch.c -o $W/lorch.o
        compile embed $W/embed "$CC" $STRICT -O1 tests/embed.c $W/lorch.o -o $W/embed -lpthread -lm
    fi
}
build_more() {
    wants fuzz && compile fuzz $W/fuzz "$CC" -std=gnu99 -O1 -w tests/fuzz.c -o $W/fuzz -lpthread -lm
    wants faults && compile lorch_faults $W/lorch-faults "$CC" -O1 -DLORCH_FAULTS='"tests/faults.h"' lorch.c -o $W/lorch-faults -lpthread -lm
    # shellcheck disable=SC2086
    wants asan && compile asan $W/lorch-asan "$CC" $SANITIZE lorch.c -o $W/lorch-asan -lpthread -lm
    wants curl && compile make lorch make -s lorch
    if wants build && has clang; then compile clang $W/lorch-clang clang -O2 lorch.c -o $W/lorch-clang -lpthread -lm; fi
}
build_plain &
plain=$!
started $plain
build_more &
started $!
wait $!
wait $plain

hash_of() { "$@" score $MODEL --ids 1,5,9,200,31,77 2>/dev/null | tail -n 1; } # the last line of score

test_build() {
    compiled lorch "cc lorch.c -o lorch -lpthread -lm says nothing"
    for compiler in gcc clang; do
        if ! has $compiler; then skip "build: $compiler, strict warnings" "no $compiler"; continue; fi
        # shellcheck disable=SC2086
        out=$($compiler $STRICT -Werror -fsyntax-only lorch.c 2>&1)
        check "build: $compiler, strict warnings" $? "$(printf '%s\n' "$out" | grep -E 'error|warning')"
        out=$($compiler -fsyntax-only lorch.c 2>&1)
        check "build: $compiler, no flags at all" "$([ -z "$out" ]; echo $?)" "$out"
    done
    compiled object "lorch.o with -DLORCH_NO_MAIN"
    if has nm; then
        names=$(nm -g --defined-only $W/lorch.o | awk '{print $3}' | grep -v '^lorch_')
        equal "build: the object exports lorch_* only" "$names" ""
        undefined=$(nm -g $W/lorch.o | awk '$1 == "U" {print $2}' | grep -E '^(abort|exit|_exit|__assert_fail)$')
        equal "build: the object cannot end its host" "$undefined" ""
    else skip "build: the object exports lorch_* only" "no nm"; fi
    compiled embed "a program that embeds it, as strict C99"
    if has c++; then
        out=$(c++ -x c++ -Wall -Wextra -pedantic -fsyntax-only lorch.h 2>&1 | grep -v 'pragma once')
        equal "build: lorch.h is C++ too" "$out" ""
    else skip "build: lorch.h is C++ too" "no c++"; fi
    out=$($W/lorch selftest 2>&1)
    check "build: selftest, every level that runs here" $? "$out"
    if has clang; then
        compiled clang "clang -O2"
        equal "build: clang's logits are gcc's" "$(hash_of $W/lorch-clang)" "$(hash_of $W/lorch)"
    else skip "build: clang's logits are gcc's" "no clang"; fi
}

# ==== shape ======================================================================================

test_shape() {
    # The table of contents: lines of two words or more, three spaces in, between "Contents" and the comment's end.
    awk '/^ \* Contents/ {on = 1; next} /^ \*\// {exit} on {sub(/^ \*   /, ""); sub(/   .*/, ""); print}' lorch.c >$W/contents
    sed -n 's/^\/\* ==== \(.*[^ =]\) =*$/\1/p' lorch.c >$W/banners
    out=$(diff $W/contents $W/banners)
    check "shape: the contents are the banners, in order" $? "$out"
    out=$(awk -v max=$MAX_UNMARKED '/^\/\* (====|----)/ {if (NR - last > max) print "line " last ": " NR - last " lines without a banner"; last = NR}
        END {if (NR - last > max) print "line " last ": " NR - last " lines without a banner"}' lorch.c)
    equal "shape: no $MAX_UNMARKED lines without a banner" "$out" ""
    out=$(awk -v max=$MAX_COLUMNS 'length($0) > max {print FILENAME ":" FNR ": " length($0) " columns"}' lorch.c lorch.h tests/*.[ch] tests/*.sh test.sh)
    equal "shape: no line over $MAX_COLUMNS columns" "$out" ""
    # A function begins at a line in column 0 with a parenthesis, and ends at a brace in column 0.
    out=$(awk -v max=$MAX_FUNCTION -v allowed=" $LONG_FUNCTIONS " '/^[A-Za-z_]/ {head = $0; from = NR}
        /^}/ && head ~ /\(/ && head !~ /= *{/ && head !~ /^(typedef|struct|enum|union)/ && NR - from + 1 > max {
            name = head; sub(/\(.*/, "", name); sub(/.*[ *]/, "", name)
            if (!index(allowed, " " name " ")) print "line " from ": " name " has " NR - from + 1 " lines"
        }' lorch.c)
    equal "shape: no function over $MAX_FUNCTION lines" "$out" ""
    out=$(grep -nP '\t| +$' lorch.c lorch.h tests/*.[ch] 2>/dev/null | head -n 5)
    equal "shape: no tabs, no spaces at the ends of lines" "$out" ""
    if [ -d .git ] && has git; then
        out=$(git ls-files | cut -d / -f 1 | sort -u | grep -vE '^(lorch\.[ch]|Makefile|test\.sh|tests|README\.md|\.ci|\.gitignore|\.clang-format)$')
        equal "shape: the top level holds what the design names" "$out" ""
    else skip "shape: the top level holds what the design names" "no git repository"; fi
    out=$(make help | awk '{print $2}' | tr '\n' ' ')
    equal "shape: make help names every target" "$out" "build run test coverage bench fuzz soak debug asan install clean "
    for word in $($W/lorch --help | grep -oE '^  --[a-z-]+' | sort -u); do
        grep -q -e "[\` ]$word[\` ]" README.md || echo "$word"
    done >$W/undocumented
    equal "shape: README.md knows every option" "$(cat $W/undocumented)" ""
}

# ==== fuzz: hostile bytes ========================================================================

test_fuzz() {
    compiled fuzz "tests/fuzz.c"
    [ -x $W/fuzz ] || return
    if [ -n "${LORCH_TEST_FULL:-}" ] && has clang; then # with sanitizers, and all edits
        # shellcheck disable=SC2086
        compile fuzz_asan $W/fuzz-asan clang -std=gnu99 -g1 -O1 -fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all -w \
            tests/fuzz.c -o $W/fuzz-asan -lpthread -lm
        for mode in "replay tests/corpus" "run 60 tests/corpus" mutate memory; do
            # shellcheck disable=SC2086
            run fuzz $W/fuzz-asan $mode
        done
        run fuzz $W/fuzz mutate full
    else
        for mode in "replay tests/corpus" "run 6 tests/corpus" mutate memory; do
            # shellcheck disable=SC2086
            run fuzz $W/fuzz $mode
        done
    fi
}

# ==== curl: what a stranger does ==================================================================

serve() { # LOG ARGUMENTS...: starts a worker; sets $worker and $url
    log=$1
    shift
    : >"$log.port" # of an earlier run
    "$@" >"$log.port" 2>"$log" &
    worker=$!
    started $worker
    for i in $(seq 100); do
        url=http://127.0.0.1:$(sed -n '1s/[^0-9]*\([0-9][0-9]*\).*/\1/p' "$log.port")
        curl -sf "$url/readyz" >/dev/null 2>&1 && return 0
        kill -0 $worker 2>/dev/null || return 1
        sleep 0.1
    done
    return 1
}
stop() { kill $worker 2>/dev/null; wait $worker; }
type_json='Content-Type: application/json'
job() { printf '{"job_id":"%s","prompt":"Once upon a time","max_tokens":20,"temperature":0}' "$1"; }
text_of() { sed -n 's/.*"type":"token","t":"\([^"]*\)".*/\1/p' | tr -d '\n'; }

test_curl() {
    if ! has curl; then skip "curl: a stranger's commands" "no curl"; return; fi
    compiled make "make"
    port=18080
    while curl -s "http://127.0.0.1:$port/" >/dev/null 2>&1; do port=$((port + 1)); done
    make -s run PORT=$port >$W/run.out 2>&1 &
    maker=$!
    started $maker
    for i in $(seq 100); do
        curl -sf "http://127.0.0.1:$port/readyz" >/dev/null 2>&1 && break
        sleep 0.1
    done
    line=$(sed -n '/curl -N/,/-d /p' $W/run.out)
    out=$(sh -c "$(printf '%s' "$line" | sed 's/curl -N/curl -sN/; s/"max_tokens":200/"max_tokens":20/')" 2>&1)
    words=$(printf '%s\n' "$out" | text_of)
    check "curl: make run prints a curl line that tells a story" "$([ ${#words} -gt 30 ]; echo $?)" "$line
$out"
    curl -sf -X POST "http://127.0.0.1:$port/shutdown" -H "$type_json" -d '{}' >/dev/null
    wait $maker
    equal "curl: POST /shutdown ends it well" $? 0

    if ! serve $W/curl.log $W/lorch --model $MODEL; then fail "curl: a worker starts" "$(cat $W/curl.log)"; return; fi
    story=$(job a | curl -sN "$url/execute" -H "$type_json" -d @- | text_of)
    check "curl: a stream" "$([ ${#story} -gt 30 ]; echo $?)" "$story"
    out=$(job b | curl -sN "$url/execute" -H "$type_json" -H 'Transfer-Encoding: chunked' --data-binary @- | text_of)
    equal "curl: the same in a chunked upload" "$out" "$story"
    out=$(job c | curl -sN --http1.0 "$url/execute" -H "$type_json" -d @- | text_of)
    equal "curl: the same over HTTP/1.0" "$out" "$story"
    out=$(job d | curl -sN -H 'Expect: 100-continue' "$url/execute" -H "$type_json" -d @- | text_of)
    equal "curl: the same with Expect: 100-continue" "$out" "$story"
    out=$(job e | curl -sN "$url/execute?sse=named" -H "$type_json" -d @- | grep -c '^event: token')
    equal "curl: named events for browsers" "$out" 20
    out=$(curl -sI "$url/health" | tr -d '\r' | head -n 1)
    equal "curl: -I /health" "$out" "HTTP/1.1 200 OK"
    out=$(curl -s "$url/health" "$url/livez" "$url/readyz" -o /dev/null -o /dev/null -o /dev/null -w '%{http_code} %{num_connects} ')
    equal "curl: three requests on one connection" "$out" "200 1 200 0 200 0 "
    out=$(curl -s -o /dev/null -w '%{http_code}' "$url/execute" -H "$type_json" -d '{')
    equal "curl: a broken body is 400" "$out" 400
    out=$(curl -s -o /dev/null -w '%{http_code}' "$url/execute" -d "$(job f)")
    equal "curl: a form's content type is 415" "$out" 415
    out=$(curl -s -o /dev/null -w '%{http_code}' "$url/cancel" -H "$type_json" -d '{"job_id":"z"}')
    equal "curl: cancel is 202" "$out" 202
    out=$(curl -s "$url/metrics" | grep -c '^worker_requests_total{.*outcome="success"} 5$')
    equal "curl: /metrics counts the five stories" "$out" 1
    stop
    equal "curl: SIGTERM ends it well" $? 0
}

# ==== config: as operators do =====================================================================

test_config() {
    if ! has curl; then skip "config: a file, an environment, a token" "no curl"; return; fi
    cat >$W/lorch.yaml <<END
---
# written by hand
model: "$MODEL"     # quotes, and a comment after them
worker-id: from-file
parallel: 2
queue:    3

max_tokens_out: 64
log-level: WARN
END
    if serve $W/config.log env LLORCH_CONFIG=$W/lorch.yaml LLORCH_PARALLEL=5 LLORCH_QUEUE=7 $W/lorch --queue 9; then
        equal "config: log-level WARN: a quiet start" "$(cat $W/config.log)" ""
        out=$(curl -s "$url/health")
        out=$(printf '%s' "$out" | sed 's/.*"worker_id":"\([^"]*\)".*"parallel":\([0-9]*\),"queue":\([0-9]*\).*/\1 \2 \3/')
        equal "config: file, environment, command line" "$out" "from-file 5 9"
        out=$(curl -s "$url/execute" -H "$type_json" -d '{"job_id":"m","prompt":"x","max_tokens":65}')
        check "config: max_tokens_out of the file holds" "$(printf '%s' "$out" | grep -q '"field":"max_tokens"'; echo $?)" "$out"
    else fail "config: file, environment, command line" "$(cat $W/config.log)"; fi
    stop
    printf 'model: %s\nportt: 1\n' $MODEL >$W/bad.yaml
    out=$($W/lorch --config $W/bad.yaml 2>&1 >/dev/null)
    equal "config: an unknown key ends with 2" $? 2
    check "config: and names file, line and key" "$(printf '%s' "$out" | grep -q 'bad.yaml:2.*portt'; echo $?)" "$out"
    printf 's3cret\n' >$W/token
    if serve $W/token.log $W/lorch --model $MODEL --api-token-file $W/token --host 0.0.0.0; then
        out=$(curl -s -o /dev/null -w '%{http_code} ' "$url/metrics"; curl -s -o /dev/null -w '%{http_code} ' -H 'Authorization: Bearer wrong' "$url/metrics"
            curl -s -o /dev/null -w '%{http_code} ' -H 'Authorization: Bearer s3cret' "$url/metrics"; curl -s -o /dev/null -w '%{http_code}' "$url/health")
        equal "config: a token file guards all but the probes" "$out" "401 401 200 200"
    else fail "config: a token file guards all but the probes" "$(cat $W/token.log)"; fi
    stop
    $W/lorch --model $MODEL --host 0.0.0.0 >/dev/null 2>&1
    equal "config: an open host without a token ends with 2" $? 2
}

# ==== Sanitizers: the same tests against an instrumented worker ====================================

# Reports go to files, since the tests read the worker's stderr; any report is a failure of its own.
sanitized() { # GROUP BINARY PROGRAM [NAME-PART...]
    reports=log_path=$PWD/$W/$1-report lorch=$2
    shift 2
    export LORCH_TEST_SLOW=1 LORCH_TEST_NO_SANDBOX=1
    exec env LORCH="$lorch" ASAN_OPTIONS="detect_leaks=1:$reports" UBSAN_OPTIONS="print_stacktrace=1:$reports" TSAN_OPTIONS="$reports" "$@"
}
no_reports() { # GROUP
    out=$(cat $W/"$1"-report* 2>/dev/null)
    check "$1: no report" "$([ -z "$out" ]; echo $?)" "$(printf '%s\n' "$out" | grep -E 'ERROR|WARNING|runtime error|#[0-5] ' | head -n 15)"
}
start_sanitized() { # GROUP BINARY PROGRAM [NAME-PART...]
    group=$1 lorch=$2 program=$3
    shift 3
    launch "${group}_$program" sanitized "$group" "$lorch" "$W/$program" "$@"
}

test_asan() {
    compiled asan "address and undefined-behaviour sanitizers"
    [ -x $W/lorch-asan ] || return
    rm -f $W/asan-report*
    start_sanitized asan $W/lorch-asan execute
    for p in contract wire guard load badgguf tokenizer; do
        start_sanitized asan $W/lorch-asan $p
        collect asan_$p
    done
    collect asan_execute
    if [ -z "${LORCH_TEST_FULL:-}" ]; then skip "asan: unit, engine, embed and faults" "LORCH_TEST_FULL is not set"
    else
        # shellcheck disable=SC2086
        compile unit_asan $W/unit_asan "$CC" $SANITIZE -w tests/unit.c -o $W/unit_asan -lpthread -lm
        # shellcheck disable=SC2086
        compile engine_asan $W/engine_asan "$CC" $SANITIZE -w tests/engine.c -o $W/engine_asan -lpthread -lm
        # shellcheck disable=SC2086
        compile embed_asan $W/embed_asan "$CC" $SANITIZE -w -DLORCH_NO_MAIN lorch.c tests/embed.c -o $W/embed_asan -lpthread -lm
        start_sanitized asan - unit_asan
        start_sanitized asan - engine_asan
        start_sanitized asan - embed_asan
        collect asan_unit_asan
        collect asan_engine_asan
        collect asan_embed_asan
        # Some hundred lives, each of which must leave nothing behind: all calls would take an hour.
        # shellcheck disable=SC2086
        compile faults_asan $W/lorch-faults-asan "$CC" $SANITIZE -DLORCH_FAULTS='"tests/faults.h"' lorch.c -o $W/lorch-faults-asan -lpthread -lm
        launch asan_faults sanitized asan - env -u LORCH_TEST_FULL LORCH_FAULTS=$W/lorch-faults-asan $W/faults
        collect asan_faults
    fi
    no_reports asan
}

test_tsan() {
    if [ -z "${LORCH_TEST_FULL:-}" ]; then skip "tsan: execute, contract, wire, load, embed, engine" "LORCH_TEST_FULL is not set"; return; fi
    compile tsan $W/lorch-tsan "$CC" -fsanitize=thread -g1 -O1 lorch.c -o $W/lorch-tsan -lpthread -lm
    compile embed_tsan $W/embed_tsan "$CC" -fsanitize=thread -g1 -O1 -DLORCH_NO_MAIN lorch.c tests/embed.c -o $W/embed_tsan -lpthread -lm
    compile engine_tsan $W/engine_tsan "$CC" -fsanitize=thread -g1 -O1 -w tests/engine.c -o $W/engine_tsan -lpthread -lm
    compiled tsan "thread sanitizer"
    rm -f $W/tsan-report*
    start_sanitized tsan $W/lorch-tsan execute
    for p in contract wire; do
        start_sanitized tsan $W/lorch-tsan $p
        collect tsan_$p
    done
    start_sanitized tsan $W/lorch-tsan load 'at once' 'amid' # the hundred kills would take half an hour
    collect tsan_load
    collect tsan_execute
    start_sanitized tsan - embed_tsan
    collect tsan_embed_tsan
    start_sanitized tsan - engine_tsan
    collect tsan_engine_tsan
    no_reports tsan
}

# ==== main =======================================================================================

LORCH=$W/lorch LORCH_SLOW_MODEL=$W/slow.gguf LORCH_FAULTS=$W/lorch-faults
export LORCH LORCH_SLOW_MODEL LORCH_FAULTS
echo "TAP version 13"
took compiling
wanted build && test_build
wanted shape && test_shape
took "build and shape"
# Two at a time where only the result counts; those that look at the clock run alone.
wanted unit && launch unit $W/unit
for p in accuracy tokenizer badgguf; do wanted $p && run $p $W/$p; done
wanted unit && collect unit
took "unit, accuracy, tokenizer, badgguf"
for p in engine embed contract execute wire guard faults load stress; do
    wanted $p && run $p $W/$p && took $p
done
wanted fuzz && test_fuzz && took fuzz
wanted curl && test_curl
wanted config && test_config
took "curl and config"
wanted asan && test_asan && took asan
wanted tsan && test_tsan && took tsan
wanted tools && run tools tests/tools.sh && took tools
wanted same && run same tests/same.sh && took same
echo "1..$n"
if [ -n "$pattern" ] && [ $n = 0 ]; then echo "# no test is called that"; fi
echo "$passed passed, $failed failed, $skipped skipped"
trap - EXIT
rm -f $W/pid
[ $failed = 0 ] && [ $n != 0 ]
