#!/bin/sh
# coverage.sh: which lines and branches of the parsers the tests reach.
#
#   tests/coverage.sh          (make coverage)
#
# gcc counts them, in two programs: tests/fuzz.c with its corpus and its failing allocations, and a worker under
# tests/badgguf.c, tests/contract.c and some of tests/execute.c. Both hold the scalar level alone and are not optimised:
# then each branch that gcov counts is one of the source, and none comes from inlined or unrolled code. A branch is covered
# if either program has taken it. Each parser must reach 95% of both. What is not reached must be in the list at the end, with its reason, by function
# and source line; and what is in the list must not be reached. Prints `ok - name`, `not ok - name`, `# ` lines with figures.

W=build/test
C=build/coverage
cd "$(dirname "$0")/.." || exit 1
for tool in gcc gcov; do
    command -v $tool >/dev/null 2>&1 || { echo "ok - coverage of the parsers # SKIP no $tool"; exit 0; }
done

# ==== Building and running =======================================================================

failed() { # WHAT LOG
    echo "not ok - coverage: $1"
    tail -n 12 "$2" | sed 's/^/# /'
    exit 1
}
counted() { # SOURCE NAME FLAGS...
    source=$1 name=$2
    shift 2
    gcc -std=gnu99 -O0 -w --coverage -DLORCH_DEBUG -DFAULTS_SCALAR "$@" "$source" -o $C/"$name" -lpthread -lm >$C/log 2>&1 || failed "$source builds" $C/log
}
rm -rf $C
mkdir -p $C $W
[ -x $W/mkmodel ] || gcc -std=c99 -O1 tests/mkmodel.c -o $W/mkmodel -lm >$C/log 2>&1 || failed "tests/mkmodel.c builds" $C/log
for p in badgguf contract execute; do
    gcc -std=c99 -O1 tests/$p.c -o $C/$p -lpthread -lm >$C/log 2>&1 || failed "tests/$p.c builds" $C/log
done
counted tests/fuzz.c fuzz
counted lorch.c lorch -DLORCH_FAULTS='"tests/faults.h"'
for mode in "replay tests/corpus" memory; do
    # shellcheck disable=SC2086
    $C/fuzz $mode >$C/log 2>&1 || failed "fuzz $mode" $C/log
done
for p in badgguf contract "execute resumed shared"; do # the counters are files, which the sandbox forbids; what takes long has its own time
    # shellcheck disable=SC2086
    env -u LORCH_SLOW_MODEL LORCH=$C/lorch LORCH_TEST_SLOW=1 LORCH_TEST_NO_SANDBOX=1 $C/$p >$C/log 2>&1 || failed "$p" $C/log
done
for p in fuzz lorch; do
    mkdir $C/$p.gcov
    gcov -b -c -o $C/ $C/$p.gcda >$C/log 2>&1 || failed "gcov" $C/log
    mv ./*.gcov $C/$p.gcov
done

# ==== Counting ===================================================================================

# Reads gcov's texts: COUNT:LINE:SOURCE for each line, `function NAME ...` before its first, `branch N taken COUNT` after.
# A parser is the part of lorch.c below a banner, or those of its functions that a pattern names.
awk '
function parser(banner, name, functions) { banners[banner] = name; only[banner] = functions; if (!(name in lines)) names[++n_names] = name; lines[name] = 0 }
function share(part, whole) { return whole ? 100 * part / whole : 0 }
BEGIN {
    parser("UTF-8", "UTF-8", ".")
    parser("JSON, reading (RFC 8259)", "JSON", ".")
    parser("GGUF", "GGUF", ".")
    parser("HTTP", "HTTP requests", ".")
    parser("POST /execute: the fields", "fields of a job", "^route_(field|number|bad|set|parse|is)_")
    parser("Pool-manager client", "callback URL", "^callback_parse$")
    parser("collecting values", "options", ".")
    parser("checking values", "options", ".")
}
FILENAME != list && !/^(function|branch|call|unconditional)/ {
    split($0, part, ":")
    line = part[2] + 0
    text = $0
    sub(/^ *[^:]*: *[0-9]+:/, "", text)
    if (text ~ /^\/\* (====|----) /) {
        title = substr(text, 9)
        sub(/ *(=+|----.*)$/, "", title)
        at = title in banners ? title : ""
        found[title] = 1
    }
    k = 0
    current = at != "" && part[1] !~ /-$/ && name ~ only[at] ? line : 0
    if (!current) next
    sub(/ *\/\*[^"]*$/, "", text)
    gsub(/^ +| +$/, "", text)
    if (!(line in source)) {
        source[line] = text; place[line] = name; of[line] = banners[at]
        lines[of[line]]++
        order[++n] = line
    }
    if (part[1] !~ /[#=]/) hit[line] = 1
}
FILENAME != list && /^function/ { name = $2 }
FILENAME != list && /^branch/ && current {
    if (++k > most[current]) most[current] = k
    if (/taken [1-9]/) taken[current, k] = 1
}
FILENAME == list && /^[a-z]/ { known[$0] = 1; entry[++n_known] = $0 }
FILENAME == list && /^ / { reasons[n_known] = 1 }
END {
    for (i = 1; i <= n; i++) {
        l = order[i]
        missed = 0
        for (k = 1; k <= most[l]; k++) if ((l, k) in taken) took[of[l]]++; else missed++
        branches[of[l]] += most[l]
        if (l in hit) reached[of[l]]++
        if (!(l in hit)) what = "line"; else if (missed) what = missed " " (missed == 1 ? "branch" : "branches"); else continue
        what = place[l] ": " what ": " source[l]
        if (what in known) seen[what] = 1; else new = new "\n# line " l ": " what
    }
    for (i = 1; i <= n_names; i++) {
        p = names[i]
        a = share(reached[p], lines[p])
        b = share(took[p], branches[p])
        printf "%s - coverage: %s, 95%% of lines and branches\n# %.1f%% of %d lines, %.1f%% of %d branches\n",
            (a >= 95 && b >= 95 ? "ok" : "not ok"), p, a, lines[p], b, branches[p]
        bad += (a < 95 || b < 95)
    }
    for (b in banners) if (!(b in found)) gone = gone "\n# no banner: " b
    for (i = 1; i <= n_known; i++) {
        if (!(entry[i] in seen)) gone = gone "\n# reached, or not there any more: " entry[i]
        if (!(i in reasons)) gone = gone "\n# no reason: " entry[i]
    }
    print((new == "" ? "ok" : "not ok") " - coverage: what is not reached has its reason" new)
    print((gone == "" ? "ok" : "not ok") " - coverage: the reasons are up to date" gone)
    exit (bad || new != "" || gone != "")
}' list=- $C/fuzz.gcov/lorch.c.gcov $C/lorch.gcov/lorch.c.gcov - <<'END'
json_fail: 1 branch: if (!r->error) r->error = what;
    The first error sticks and ends the reading: nothing comes here twice.
http_chunk_byte: 1 branch: switch (c->chunk) {
    The two states left over are http_read_body's: data, and the end.
http_chunk_byte: line: default: return &ERR_INVALID;
    The same.
http_reason: 1 branch: for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
    Each status that is sent has its row.
http_reason: line: return "Unknown";
    The same.
callback_parse: 1 branch: if (stop != end || colon + 1 == end || port < 1 || port > 65535 || colon[1] < '0' || colon[1] > '9') return "the URL's port must be 1 to 65535";
    strtol has read a number: what it begins with is a digit, or a sign or a space, which come before the digits.
cli_store: 1 branch: if (!v->value) cli_out_of_memory();
    Ends the process; tests/faults.c lets this allocation fail.
cli_match: 1 branch: if (arg[0] == '-' && arg[1] == '-') {
    Only arguments that begin with '-' come here.
cli_env_name: 2 branches: for (int i = 7; i < n; i++) out[i] = out[i] == '-' ? '_' : (char)(out[i] >= 'a' && out[i] <= 'z' ? out[i] - 32 : out[i]);
    Options have small letters and '-' in their names, nothing else yet.
cli_from_line: 1 branch: if (!copy) cli_out_of_memory();
    Ends the process. The life of tests/faults.c has no config file.
cli_source: 2 branches: if (o && cli_values[o - cli_options].value) return cli_values[o - cli_options].source;
    No default is refused: what is complained about has been given.
cli_source: line: snprintf(dashed, sizeof dashed, "--%s", name);
    The same.
cli_source: line: return dashed;
    The same.
END
