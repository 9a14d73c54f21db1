#!/bin/sh
# coverage.sh: how much of the parsers the corpora and the unit tests reach.
#
#   tests/coverage.sh [list]        needs gcc and gcov; list also prints what is not reached
#
# Builds tests/fuzz.c and tests/unit.c for gcov, replays, changes and damages inputs, and sums up lines and branches (those of a
# line that runs) for the parts of lorch.c that read strangers' bytes.

cd "$(dirname "$0")/.." || exit 1
W=build/coverage
rm -rf $W && mkdir -p $W build/test
[ -x build/test/mkmodel ] || gcc -std=c99 -O1 -w tests/mkmodel.c -o build/test/mkmodel -lm
for p in fuzz unit; do gcc -O0 -DLORCH_DEBUG -std=gnu99 -w --coverage tests/$p.c -o $W/$p -lpthread -lm & done
wait
$W/fuzz replay tests/corpus >$W/log && $W/fuzz run 12 tests/corpus >>$W/log && $W/fuzz mutate >>$W/log && $W/fuzz memory >>$W/log
$W/unit text json tokenizers http >>$W/log
cd $W || exit 1
for p in fuzz unit; do
    mkdir -p $p.d && (cd $p.d && gcov -b -c -o .. ../"$p"*.gcda >/dev/null 2>&1 && cat ./*lorch.c.gcov >../$p.gcov)
done
# A line counts as reached if either program reached it, a branch (by its line and number) likewise.
awk -v list="${1:-}" '
function part(title) { section = title }
FILENAME != last {last = FILENAME; line = 0}
/^(function|call)/ {next}
/^branch/ {
    if (!on[line] || !seen_here) next
    key = line SUBSEP $2
    if (!(key in branch)) branch[key] = 0
    if ($0 !~ /never|taken 0/) branch[key] = 1
    next
}
{
    split($0, f, ":")
    count = f[1]; line = f[2] + 0; text = substr($0, index($0, f[2]) + length(f[2]) + 1)
    gsub(/ /, "", count)
    if (text ~ /^\/\* (====|----) /) {
        title = text; gsub(/^\/\* [=-]+ | [=-]+.*$|:.*$/, "", title); sub(/ \*\/$/, "", title)
        part(title)
    }
    want = section ~ /^(UTF-8|JSON, reading|JSON, writing|GGUF|encoding|merging|word patterns|the vocabulary|HTTP|POST \/execute|POST \/cancel|dispatch|collecting values|checking values)/
    want = want && section !~ /files that shrink/
    on[line] = want; where[line] = section; source[line] = text
    seen_here = count != "-" && count !~ /^[#=]/
    if (!want || count == "-") next
    if (!(line in reached)) reached[line] = 0
    if (seen_here) reached[line] = 1
}
END {
    for (l in reached) {n[where[l]]++; got[where[l]] += reached[l]; lines++; all += reached[l]; if (!reached[l] && list != "") printf "line %d (%s): %s\n", l, where[l], source[l]}
    for (b in branch) {split(b, k, SUBSEP); bn[where[k[1]]]++; bgot[where[k[1]]] += branch[b]; branches++; ball += branch[b]}
    for (s in n) printf "%-60s lines %5.1f%% of %d, branches %5.1f%% of %d\n", s, 100 * got[s] / n[s], n[s], bn[s] ? 100 * bgot[s] / bn[s] : 100, bn[s]
    printf "%-60s lines %5.1f%% of %d, branches %5.1f%% of %d\n", "all of them", 100 * all / lines, lines, 100 * ball / branches, branches
}' fuzz.gcov unit.gcov | sort
