/* SPDX-License-Identifier: MIT
 *
 * accuracy: the numbers and tokens of `lorch score` and `lorch generate` against llama.cpp's,
 * as tests/oracle.mjs recorded them in tests/expected/.
 *
 *   cc -std=c99 -O1 tests/accuracy.c -o accuracy && LORCH=./lorch ./accuracy [NAME-PART ...]
 *
 * It runs in the top directory.  Tests of the project's tier use tests/models and models that
 * tests/mkmodel.c makes; those of the shared tier need $LORCH_SHARED and are skipped without.
 */
#include "spawn.h"

#define MKMODEL_NO_MAIN
#include "mkmodel.c"

#include <math.h>

enum { N_IDS = 64, N_TOP = 8, ASK_TOP = 64, MAX_IDS = 4096 };

/* A quantised model's greedy text may leave the expected one where two tokens are this close:
 * activations are rounded differently, and either is right. */
static const double NEAR_TIE = 0.15;

/* ==== What score prints ====================================================================== */

typedef struct {
    int id;
    double logprob;
} top_entry;

typedef struct {
    int id, has_logprob, n_top;
    double logprob; /* of id, given what precedes */
    top_entry top[ASK_TOP];
} score_line;

typedef struct {
    score_line *at; /* [n], owned */
    int n;
    double perplexity;
    char hash[80];
} score;

/* Reads [[id,logprob],...]; gives the number of entries, or -1. */
static int read_top(const char *p, top_entry *out, int max) {
    int n = 0;
    if (!p || *p != '[') return -1;
    for (p++; n < max && *p == '['; n++) {
        char *end;
        out[n].id = (int)strtol(p + 1, &end, 10);
        if (*end != ',') return -1;
        out[n].logprob = strtod(end + 1, &end);
        if (*end != ']') return -1;
        p = end + 1 + strspn(end + 1, ", ");
    }
    return n;
}

/* Parses the output in place; gives what is wrong with it, or NULL. */
static const char *read_score(char *out, score *s) {
    s->at = calloc(MAX_IDS, sizeof *s->at);
    if (!s->at) return "out of memory";
    for (char *line = strtok(out, "\n"); line; line = strtok(NULL, "\n")) {
        const char *perplexity = json_find(line, "perplexity"), *id = json_find(line, "id");
        const char *index = json_find(line, "i"), *logprob = json_find(line, "logprob");
        if (perplexity) {
            s->perplexity = strtod(perplexity, NULL);
            json_string(json_find(line, "logits_hash"), s->hash, sizeof s->hash);
            return strtok(NULL, "\n") ? "lines after the summary" : NULL;
        }
        if (!index || !id || !logprob || s->n == MAX_IDS) return "a line lacks i, id or logprob";
        score_line *l = &s->at[s->n];
        if (atoi(index) != s->n++) return "positions are not in order";
        l->id = atoi(id);
        l->has_logprob = strncmp(logprob, "null", 4) != 0;
        l->logprob = strtod(logprob, NULL);
        l->n_top = read_top(json_find(line, "top"), l->top, ASK_TOP);
        if (l->n_top < 1) return "a line has no top list";
    }
    return "there is no summary line";
}

static void score_free(score *s) {
    free(s->at);
    memset(s, 0, sizeof *s);
}

static void print_ids(char *out, size_t size, const int *ids, int n) {
    size_t len = 0;
    out[0] = 0;
    for (int i = 0; i < n && len + 16 < size; i++)
        len += (size_t)snprintf(out + len, size - len, i ? ",%d" : "%d", ids[i]);
}

/* Runs `score` on ids; extra (up to NULL) are further arguments.  Gives an error or NULL. */
static const char *run_score(const char *model, const int *ids, int n, const char *const *extra,
                             score *s) {
    static char list[MAX_IDS * 8], why[400];
    const char *args[MAX_ARGS] = {"score", model, "--ids", list, "--top", "64"};
    for (int i = 0; extra && extra[i]; i++) args[6 + i] = extra[i];
    memset(s, 0, sizeof *s);
    print_ids(list, sizeof list, ids, n);
    run_result r = run_input("", 0, args);
    const char *failure = run_failure(&r);
    if (!failure) failure = read_score(r.out, s);
    if (!failure && s->n != n) failure = "the number of positions is wrong";
    if (failure && failure != why) snprintf(why, sizeof why, "score: %.350s", failure);
    run_free(&r);
    return failure ? why : NULL;
}

static const top_entry *find_id(const top_entry *top, int n, int id) {
    for (int i = 0; i < n; i++)
        if (top[i].id == id) return &top[i];
    return NULL;
}

/* ==== Log-probabilities ====================================================================== */

typedef struct {
    char model[128], tier[16], make[512];
    int ids[N_IDS];
    double tolerance;
    top_entry top[N_IDS][N_TOP];
} expected;

static int read_expected(const char *line, expected *e) {
    const char *tolerance = json_find(line, "tolerance"), *p = json_find(line, "top");
    json_string(json_find(line, "model"), e->model, sizeof e->model);
    json_string(json_find(line, "tier"), e->tier, sizeof e->tier);
    json_string(json_find(line, "make"), e->make, sizeof e->make);
    if (!tolerance || !p || json_ints(json_find(line, "ids"), e->ids, N_IDS) != N_IDS) return -1;
    e->tolerance = strtod(tolerance, NULL);
    p++;
    for (int i = 0; i < N_IDS; i++) {
        if (read_top(p, e->top[i], N_TOP) != N_TOP) return -1;
        p = strstr(p, "]]");
        if (!p) return -1;
        p += 2 + strspn(p + 2, ", ");
    }
    return 0;
}

/* Where the model of a line lies; makes it if it is one of mkmodel's.  NULL: not to be had. */
static const char *find_model(const char *name, const char *tier, const char *make) {
    static char path[600];
    const char *dirs[] = {"models", "testdata/models"};
    if (*make) {
        char copy[512];
        const char *args[MAX_ARGS];
        int n = 0;
        snprintf(path, sizeof path, "%s", scratch("model.gguf"));
        snprintf(copy, sizeof copy, "%s", make);
        for (char *w = strtok(copy, " "); w && n < MAX_ARGS; w = strtok(NULL, " ")) {
            args[n++] = w;
            if (n == 2) args[n++] = path;
        }
        return mkmodel_write(n, args) == 0 ? path : NULL;
    }
    if (strcmp(tier, "project") == 0) {
        snprintf(path, sizeof path, "tests/models/%s", name);
        return access(path, R_OK) == 0 ? path : NULL;
    }
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s/%s", T.shared, dirs[i], name);
        if (access(path, R_OK) == 0) return path;
    }
    return NULL;
}

typedef struct {
    double error;
    int position, id;
    double expected, got;
} worst;

static void note_error(worst *w, int position, int id, double expect, double got) {
    double error = fabs(expect - got);
    if (error <= w->error) return; /* written so that a NaN falls through */
    *w = (worst){isnan(error) ? INFINITY : error, position, id, expect, got};
}

/* Each of the oracle's eight is looked for among lorch's 64.  One that is not there is at most
 * as likely as the last of those, which bounds its error from below. */
static void compare_tops(const expected *e, const score *s, worst *w) {
    for (int i = 0; i < N_IDS; i++) {
        const score_line *l = &s->at[i];
        for (int k = 0; k < N_TOP; k++) {
            const top_entry *want = &e->top[i][k], *got = find_id(l->top, l->n_top, want->id);
            double lowest = l->top[l->n_top - 1].logprob;
            if (got) note_error(w, i, want->id, want->logprob, got->logprob);
            else if (!(want->logprob <= lowest))
                note_error(w, i, want->id, want->logprob, lowest);
        }
    }
}

/* The logprob fields are checked where the oracle knows them, and against the perplexity. */
static const char *compare_logprobs(const expected *e, const score *s, worst *w) {
    double sum = 0;
    if (s->at[0].has_logprob) return "the first logprob is not null";
    for (int i = 0; i < N_IDS; i++) {
        if (s->at[i].id != e->ids[i]) return "an id differs from the one given";
        if (i == 0) continue;
        if (!s->at[i].has_logprob) return "a later logprob is null";
        const top_entry *want = find_id(e->top[i - 1], N_TOP, e->ids[i]);
        if (want) note_error(w, i, want->id, want->logprob, s->at[i].logprob);
        const top_entry *own = find_id(s->at[i - 1].top, s->at[i - 1].n_top, e->ids[i]);
        if (own && !(fabs(own->logprob - s->at[i].logprob) < 1e-4))
            return "logprob is not the one that the preceding top list gives";
        sum += s->at[i].logprob;
    }
    double perplexity = exp(-sum / (N_IDS - 1));
    if (!(fabs(s->perplexity / perplexity - 1) < 1e-3)) return "perplexity does not follow";
    if (strlen(s->hash) < 8) return "there is no logits_hash";
    return NULL;
}

static void test_logprobs(const expected *e) {
    static const char *const f32_cache[] = {"--kv-type", "f32", NULL};
    char name[200];
    worst w = {0, 0, 0, 0, 0};
    score s = {0};
    snprintf(name, sizeof name, "logprobs of %s", e->model);
    if (!wanted(name)) return;
    if (strcmp(e->tier, "shared") == 0 && !T.shared) {
        skip(name, "LORCH_SHARED is unset");
        return;
    }
    const char *model = find_model(e->model, e->tier, e->make);
    const char *wrong = model ? run_score(model, e->ids, N_IDS, f32_cache, &s) : "no such model";
    if (!wrong) {
        compare_tops(e, &s, &w);
        wrong = compare_logprobs(e, &s, &w);
    }
    if (wrong) report(0, name, "%s", wrong);
    else
        report(w.error <= e->tolerance, name,
               "largest error %.5f of %.3f, position %d, id %d: expected %.4f, got %.4f", w.error,
               e->tolerance, w.position, w.id, w.expected, w.got);
    score_free(&s);
}

/* Reads a file of lines and gives each to a function. */
static void each_line(const char *path, void (*use)(const char *line, void *), void *context) {
    char *text = read_whole(path, NULL), *next = text;
    if (!text) {
        report(0, path, "cannot be read");
        return;
    }
    while (next && *next) {
        char *line = next, *end = strchr(next, '\n');
        if (end) *end = 0;
        next = end ? end + 1 : NULL;
        use(line, context);
    }
    free(text);
}

static void use_logprobs_line(const char *line, void *context) {
    static expected e;
    (void)context;
    if (read_expected(line, &e)) report(0, "logprobs", "bad line: %.60s", line);
    else test_logprobs(&e);
}

/* ==== The same numbers whatever the threads and chunks ======================================= */

/* The hash covers the bits of all logits, so equal hashes are equal numbers. */
static void test_hashes(void) {
    static const char *const ways[][5] = {
        {"-t", "1", NULL}, {"-t", "3", NULL}, {"--chunk", "7", NULL}, {"--chunk", "1", NULL}};
    static const char *const makes[] = {"llama f32", "qwen3 q8_0", "qwen2 q4_0 hd=24", "llama q4_k",
                                        "qwen3 q5_k", "llama q6_k", "llama bf16", "llama f16",
                                        "deepseek2 f32 layers=2 heads=1 kv=1 hd=32 rot=16 vd=8 lora=1008"};
    for (size_t m = 0; m < sizeof makes / sizeof *makes; m++) {
        char name[200], first[80] = "";
        const char *model, *wrong = NULL;
        int ids[N_IDS];
        snprintf(name, sizeof name, "logits of %s do not depend on threads and chunks", makes[m]);
        if (!wanted(name)) continue;
        for (int i = 0; i < N_IDS; i++) ids[i] = 3 + i * 7919 % 388;
        model = find_model("", "project", makes[m]);
        if (!model) wrong = "no such model";
        for (size_t w = 0; w < sizeof ways / sizeof *ways && !wrong; w++) {
            score s;
            wrong = run_score(model, ids, N_IDS, ways[w], &s);
            if (!wrong && !*first) snprintf(first, sizeof first, "%s", s.hash);
            if (!wrong && strcmp(first, s.hash) != 0) wrong = ways[w][0];
            score_free(&s);
        }
        report(!wrong, name, "%s", wrong ? wrong : first);
    }
}

/* ==== What the file decides ============================================================== */

static const struct {
    const char *what, *make, *args[10]; /* args: after the command's name, MODEL put second */
    int code;
    const char *want;                   /* in the output, or in the message */
} file_cases[] = {
    {"a context beyond the file's is refused", "llama f32 ctx=512", {"generate", "-p", "a", "-n", "1", "--context", "513"}, 1, "more than the 512 positions"},
    {"a context within YaRN's reach is taken", "qwen2 f32 hd=24 ctx=512 rope_type=yarn rope_scaling=4 rope_orig=512",
     {"generate", "-p", "a", "-n", "1", "--context", "2048"}, 0, ""},
    {"a context beyond YaRN's reach is refused", "qwen2 f32 hd=24 ctx=512 rope_type=yarn rope_scaling=4 rope_orig=512",
     {"generate", "-p", "a", "-n", "1", "--context", "2049"}, 1, "more than the 2048 positions"},
    {"learned positions cannot be stretched", "gpt2 f32 ctx=64 kv:gpt2.rope.scaling.original_context_length=u32:64 kv:gpt2.rope.scaling.factor=f32:4",
     {"generate", "-p", "a", "-n", "1", "--context", "65"}, 1, "more than the 64 positions"},
    {"more ids than positions are refused", "gpt2 f32 ctx=4", {"score", "--ids", "5,6,7,8,9"}, 1, "more than the context of 4"},
    {"inspect shows the file's sampling", "llama f32 kv:general.sampling.temp=f32:0.25 kv:general.sampling.top_k=i32:40", {"inspect", "--json"}, 0,
     "\"sampling\":{\"temperature\":0.25,\"top-k\":40}"},
    {"inspect shows experts", "qwen3moe f32", {"inspect", "--json"}, 0, "\"experts\":"},
    {"inspect shows windows", "gemma2 f32", {"inspect", "--json"}, 0, "\"window\":"},
    {"inspect shows convolutions", "lfm2 f32", {"inspect", "--json"}, 0, "\"convolution_layers\":"},
    {"inspect shows how rope is scaled", "phi3 f32 with=longrope rope_type=longrope rope_orig=32", {"inspect", "--json"}, 0, "\"rope_scaling\":\"longrope\""},
    {"rotation in sections is refused", "glm4 f32 kv:glm4.rope.dimension_sections=[i32]:2,3,3,0", {"inspect"}, 1, "rotation in sections"},
    {"an unknown rope scaling is refused", "llama f32 rope_type=dynamic rope_scaling=2", {"inspect"}, 1, "'dynamic' is not supported"},
    {"more experts a token than there are are refused", "qwen3moe f32 kv:qwen3moe.expert_used_count=u32:99", {"inspect"}, 1, "99 of"},
    {"experts in groups are refused", "deepseek2 f32 kv:deepseek2.expert_group_count=u32:4", {"inspect"}, 1, "groups"},
    {"an expert layer's missing tensor is named", "qwen2moe f32 tensor:blk.1.ffn_up_exps.weight:skip=1", {"inspect"}, 1, "blk.1.ffn_up_exps.weight is missing"},
    {"a quantised bias in parts is refused",
     "gpt2 f32 embd=64 heads=2 kv=1 hd=8 kv:gpt2.attention.key_length=u32:8 kv:gpt2.attention.value_length=u32:8 tensor:blk.0.attn_qkv.bias:format=q8_0",
     {"inspect"}, 1, "does not divide into blocks"},
    {"one layer has one name", "lfm2 f32 freq_factors=1 tensor:rope_freqs.weight:name=blk.00.ffn_norm.weight", {"inspect"}, 1, "blk.00.ffn_norm.weight is not one"},
    {"experts have no use for a dense bias",
     "qwen2moe f32 freq_factors=1 tensor:rope_freqs.weight:name=blk.0.ffn_up.bias", {"inspect"}, 1, "blk.0.ffn_up.bias is not one"},
    {"latent attention has one form of queries",
     "deepseek2 f32 freq_factors=1 kv:deepseek2.attention.q_lora_rank=u32:1 tensor:rope_freqs.weight:name=blk.0.attn_q_a.weight",
     {"inspect"}, 1, "blk.0.attn_q_a.weight"},
    {"an attention layer has no convolution's output", "lfm2 f32 freq_factors=1 conv=0 tensor:rope_freqs.weight:name=blk.0.shortconv.out_proj.weight",
     {"inspect"}, 1, "blk.0.shortconv.out_proj.weight is not one"},
    {"values that are no sampling defaults are not shown", "llama f32 kv:general.sampling.temp=f32:9 kv:general.sampling.top_k=i32:-1", {"inspect", "--json"}, 0,
     "\"sampling\":{}"},
    {"temperature by position is refused", "deepseek2 f32 kv:deepseek2.attention.temperature_scale=f32:0.1", {"inspect"}, 1, "temperature_scale is not supported"},
    {"latent attention's missing tensor is noticed", "deepseek2 f32 tensor:blk.0.attn_kv_b.weight:skip=1", {"inspect"}, 1, "just one form"},
};

static void test_file_cases(void) {
    for (size_t i = 0; i < sizeof file_cases / sizeof *file_cases; i++) {
        if (!wanted(file_cases[i].what)) continue;
        const char *model = find_model("", "project", file_cases[i].make), *args[MAX_ARGS] = {file_cases[i].args[0], model};
        for (int k = 1; k < 10 && file_cases[i].args[k]; k++) args[k + 1] = file_cases[i].args[k];
        run_result r = run_input("", 0, args);
        int ok = model && r.status == file_cases[i].code && (strstr(r.out, file_cases[i].want) || strstr(r.err, file_cases[i].want));
        report(ok, file_cases[i].what, "exit status %d: %.300s %.300s", r.status, r.out, r.err);
        run_free(&r);
    }
}

/* Of longrope's two sets of factors the context that is asked for chooses one; nothing else does. */
static void test_longrope(void) {
    static const char *const ways[][5] = {{NULL}, {"--context", "64", NULL}, {"--context", "32", NULL}, {"--context", "24", NULL}};
    const char *name = "longrope: short factors for a context within the original length, else long ones";
    char hash[4][80] = {{0}};
    int ids[20];
    if (!wanted(name)) return;
    const char *model = find_model("", "project", "phi3 f32 with=longrope rope_type=longrope rope_orig=32 rope_attn=1.2"), *wrong = model ? NULL : "no model";
    for (int i = 0; i < 20; i++) ids[i] = 3 + i * 7919 % 388;
    for (int i = 0; i < 4 && !wrong; i++) {
        score s;
        wrong = run_score(model, ids, 20, ways[i], &s);
        snprintf(hash[i], sizeof hash[i], "%s", wrong ? "" : s.hash);
        score_free(&s);
    }
    if (!wrong && (strcmp(hash[0], hash[1]) || strcmp(hash[2], hash[3]) || !strcmp(hash[0], hash[2]))) wrong = "the factors chosen are wrong";
    report(!wrong, name, "%s %s %s %s %s", wrong ? wrong : "", hash[0], hash[1], hash[2], hash[3]);
}

/* A file that asks for temperature 0 is greedy whatever the seed, unless the command line says otherwise. */
static void test_file_sampling(void) {
    const char *name = "generate takes the file's temperature unless told otherwise";
    char text[4][600];
    if (!wanted(name)) return;
    const char *model = find_model("", "project", "llama f32 kv:general.sampling.temp=f32:0");
    for (int i = 0; i < 4; i++) {
        const char *args[MAX_ARGS] = {"generate", model, "-p", "the", "-n", "24", "--seed", i % 2 ? "1" : "2", i < 2 ? NULL : "--temperature", "1.5"};
        run_result r = run_input("", 0, args);
        snprintf(text[i], sizeof text[i], "%.590s", run_failure(&r) ? "failed" : r.out);
        run_free(&r);
    }
    report(strcmp(text[0], "failed") && !strcmp(text[0], text[1]) && strcmp(text[2], text[3]), name, "%.200s / %.200s / %.200s", text[0], text[1], text[2]);
}

/* ==== Greedy text ============================================================================ */

typedef struct {
    char model[128], prompt[2000], stop[32];
    int ids[2][MAX_IDS], n[2]; /* of the prompt, then of the answer */
} greedy;

enum { PROMPT, ANSWER };

typedef struct {
    const char *tier, *only; /* only: models whose names hold this */
} greedy_file;

static int read_greedy(const char *line, greedy *g) {
    json_string(json_find(line, "model"), g->model, sizeof g->model);
    json_string(json_find(line, "prompt"), g->prompt, sizeof g->prompt);
    json_string(json_find(line, "stop"), g->stop, sizeof g->stop);
    g->n[PROMPT] = json_ints(json_find(line, "prompt_ids"), g->ids[PROMPT], MAX_IDS);
    g->n[ANSWER] = json_ints(json_find(line, "greedy_ids"), g->ids[ANSWER], MAX_IDS);
    return g->n[PROMPT] < 1 || g->n[ANSWER] < 1 ? -1 : 0;
}

/* Is the difference at answer position k a near tie?  A text that should have ended there, or
 * did end there, has an end-of-text token as its candidate: lorch-tiny's are 1021 and 1023. */
static const char *judge_difference(const char *model, const greedy *want, const greedy *got,
                                    int k) {
    static char text[300];
    static int ids[2 * MAX_IDS];
    static const int ends[] = {1021, 1023};
    score s;
    int n = want->n[PROMPT], candidates[2][2], count[2];
    memcpy(ids, want->ids[PROMPT], (size_t)n * sizeof *ids);
    memcpy(ids + n, want->ids[ANSWER], (size_t)k * sizeof *ids);
    const greedy *side[2] = {want, got};
    for (int i = 0; i < 2; i++) {
        count[i] = k < side[i]->n[ANSWER] ? 1 : 2;
        if (count[i] == 1) candidates[i][0] = side[i]->ids[ANSWER][k];
        else memcpy(candidates[i], ends, sizeof ends);
    }
    const char *wrong = run_score(model, ids, n + k, NULL, &s);
    double best[2] = {-INFINITY, -INFINITY};
    for (int i = 0; i < 2 && !wrong; i++)
        for (int c = 0; c < count[i]; c++) {
            const score_line *last = &s.at[n + k - 1];
            const top_entry *t = find_id(last->top, last->n_top, candidates[i][c]);
            if (t && t->logprob > best[i]) best[i] = t->logprob;
        }
    score_free(&s);
    if (wrong) return wrong;
    if (fabs(best[0] - best[1]) < NEAR_TIE) return NULL;
    snprintf(text, sizeof text, "token %d: expected %d (logprob %.3f), got %d (%.3f)", k,
             candidates[0][0], best[0], candidates[1][0], best[1]);
    return text;
}

static const char *compare_greedy(const char *model, const greedy *want, greedy *got, int quantised,
                                  char *out) {
    const char *stop = *want->stop && strcmp(want->stop, "eos") == 0 ? "EOS" : "MAX_TOKENS";
    int k = 0;
    got->n[PROMPT] = json_ints(json_find(out, "prompt_ids"), got->ids[PROMPT], MAX_IDS);
    got->n[ANSWER] = json_ints(json_find(out, "ids"), got->ids[ANSWER], MAX_IDS);
    json_string(json_find(out, "stop_reason"), got->stop, sizeof got->stop);
    if (got->n[PROMPT] < 0 || got->n[ANSWER] < 0) return "prompt_ids or ids are missing";
    if (got->n[PROMPT] != want->n[PROMPT] ||
        memcmp(got->ids[PROMPT], want->ids[PROMPT], (size_t)want->n[PROMPT] * sizeof(int)) != 0)
        return "the prompt's ids differ";
    while (k < want->n[ANSWER] && k < got->n[ANSWER] &&
           want->ids[ANSWER][k] == got->ids[ANSWER][k])
        k++;
    if (k == want->n[ANSWER] && k == got->n[ANSWER])
        return strcmp(got->stop, stop) == 0 ? NULL : "stop_reason is wrong";
    if (!quantised) {
        static char text[100];
        snprintf(text, sizeof text, "ids differ from token %d", k);
        return text;
    }
    return judge_difference(model, want, got, k);
}

static void test_greedy(const greedy *want, const char *tier) {
    static greedy got;
    char name[200], count[16];
    const char *why = NULL;
    int quantised = strstr(want->model, "-q") != NULL;
    snprintf(name, sizeof name, "greedy text of %s: %.40s", want->model, want->prompt);
    for (char *c = name; *c; c++)
        if (*c == '\n' || *c == '#') *c = ' ';
    if (!wanted(name)) return;
    const char *model = find_model(want->model, tier, "");
    if (!model) {
        report(0, name, "no such model");
        return;
    }
    /* Where the expected text ended by itself, 96 tokens were asked for. */
    snprintf(count, sizeof count, "%d", *want->stop ? 96 : want->n[ANSWER]);
    const char *special = strstr(want->prompt, "<|") ? "--special" : NULL;
    const char *args[] = {"generate", model,           "-p", want->prompt, "-n",    count,
                          "--json",   "--temperature", "0",  special,      NULL};
    run_result r = run_input("", 0, args);
    why = run_failure(&r);
    if (!why) why = compare_greedy(model, want, &got, quantised, r.out);
    report(!why, name, "%s", why ? why : "");
    run_free(&r);
}

static void use_greedy_line(const char *line, void *context) {
    static greedy g;
    greedy_file *file = context;
    if (read_greedy(line, &g)) report(0, "greedy text", "bad line: %.60s", line);
    else if (!*file->only || strstr(g.model, file->only)) test_greedy(&g, file->tier);
}

/* ==== What lorch-tiny can do ================================================================= */

/* The formats in which it is kept, the most exact first; those that are not in tests/models lie in the shared directory.
 * From Q4 up they must do the tasks, and their perplexity stay within a hundredth of the first's. */
static const struct {
    const char *name;
    int q4_up;
} tiny_formats[] = {{"f16", 1},    {"bf16", 1}, {"q8_0", 1}, {"q6_k", 1},   {"q5_k_m", 1}, {"q5_1", 1},   {"q5_0", 1},
                    {"q4_k_m", 1}, {"q4_1", 1}, {"q4_0", 1}, {"iq4_nl", 1}, {"iq4_xs", 1}, {"q3_k_m", 0}, {"q2_k", 0}};

static const char *tiny_model(const char *format) {
    char name[64];
    snprintf(name, sizeof name, "lorch-tiny-%s.gguf", format);
    const char *path = find_model(name, "project", "");
    return path || !T.shared ? path : find_model(name, "shared", "");
}

/* Its answer to a question, greedily; gives an error or NULL. */
static const char *tiny_answer(const char *model, const char *question, char *text, size_t size) {
    static char why[300];
    char prompt[300], stop[32] = "";
    snprintf(prompt, sizeof prompt, "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n", question);
    const char *args[] = {"generate", model, "-p", prompt, "--special", "--temperature", "0", "-n", "200", "--json", NULL};
    run_result r = run_input("", 0, args);
    const char *wrong = run_failure(&r);
    if (wrong) snprintf(why, sizeof why, "%.250s", wrong);
    else {
        json_string(json_find(r.out, "text"), text, size);
        json_string(json_find(r.out, "stop_reason"), stop, sizeof stop);
        if (strcmp(stop, "EOS") != 0) wrong = why, snprintf(why, sizeof why, "'%s' is not ended: %.200s", question, text);
    }
    run_free(&r);
    return wrong ? why : NULL;
}

/* A story has a hero, whose name comes back, and a last sentence. */
static const char *check_story(const char *text) {
    static const char opening[] = "Once upon a time there was a ", named[] = " named ";
    const char *hero = strstr(text, named);
    size_t n = strlen(text), length, times = 0;
    if (strncmp(text, opening, strlen(opening)) != 0 || !hero) return "the story has no beginning";
    hero += strlen(named);
    length = strcspn(hero, " ,.");
    for (const char *p = hero; *p; p++) times += length && strncmp(p, hero, length) == 0;
    if (times < 3) return "the story forgets its hero";
    if (n < 250) return "the story is short";
    return text[n - 1] == '.' ? NULL : "the story has no end";
}

/* One flat object: quotes in pairs, a colon in each member, braces at both ends only, and the age asked for. (The name is
 * often another, whatever the format.) */
static const char *check_object(const char *text, int age) {
    char member[64];
    size_t quotes = 0, colons = 0, commas = 0, n = strlen(text);
    for (size_t i = 0; i < n; i++) {
        quotes += text[i] == '"', colons += text[i] == ':', commas += text[i] == ',';
        if ((text[i] == '{') != (i == 0) || (text[i] == '}') != (i == n - 1)) return "braces";
    }
    if (quotes % 2 || colons != commas + 1) return "quotes, colons or commas";
    if (strncmp(text, "{\"name\": \"", 10) != 0) return "the name";
    snprintf(member, sizeof member, "\"age\": %d", age);
    return strstr(text, member) ? NULL : "the age";
}

static const char *tiny_tasks(const char *model) {
    static const int sums[][2] = {{1, 1}, {2, 3}, {7, 5}, {9, 9}, {12, 7}, {3, 14}, {15, 5}, {6, 11}, {0, 4}, {10, 10}};
    static const int ages[] = {7, 4, 9};
    static char text[2000], why[2600];
    char question[100], sum[100];
    const char *wrong = tiny_answer(model, "Tell me a story about a fox.", text, sizeof text);
    if (!wrong) wrong = check_story(text);
    for (size_t i = 0; i < sizeof sums / sizeof *sums && !wrong; i++) {
        snprintf(question, sizeof question, "What is %d + %d?", sums[i][0], sums[i][1]);
        snprintf(sum, sizeof sum, "%d + %d = %d.", sums[i][0], sums[i][1], sums[i][0] + sums[i][1]);
        wrong = tiny_answer(model, question, text, sizeof text);
        if (!wrong && strcmp(text, sum) != 0) wrong = "the sum is wrong";
    }
    for (size_t i = 0; i < sizeof ages / sizeof *ages && !wrong; i++) {
        snprintf(question, sizeof question, "Write JSON for a person named Omar, age %d.", ages[i]);
        wrong = tiny_answer(model, question, text, sizeof text);
        if (!wrong) wrong = check_object(text, ages[i]);
    }
    if (wrong) snprintf(why, sizeof why, "%.250s: %.2000s", wrong, text);
    return wrong ? why : NULL;
}

/* Stories in the manner of those that it learnt, of names and things that it knows. */
static const char *const stories[] = {
    "Once upon a time there was a brave owl named Lily who lived near the river. Lily loved the forest and knew every path "
    "there. One morning she found 5 green boats near the river. \"These are not mine,\" she said. She asked Ben, a quiet fox, who "
    "had lost them. Ben counted them and smiled. \"Please keep one,\" he said, so Lily kept one and Ben had 4. The end.",
    "Once upon a time there was a curious child named Tom who lived near the market. Tom wanted a red lamp more than anything. "
    "At noon he heard a small voice near the cave. It was a quiet cat named Ella, and she was afraid. \"Why are you here?\" asked "
    "Tom. \"I lost my way home,\" said Ella. Tom carried her back to the market. From then on they were good friends. The end.",
    "Once upon a time there was a quiet fox named Omar who lived near the cave. Omar wanted a green kite more than anything. One "
    "evening he found 9 red bells in the market. \"These are not mine,\" he said. He asked Nora, a brave owl, who had lost them. "
    "Nora counted them and smiled. \"Please keep one,\" she said, so Omar kept one and Nora had 8. The end.",
    "Once upon a time there was a cheerful child named Ida who lived near the forest. Ida loved the river and knew every path "
    "there. At noon she heard a small voice in the forest. It was a brave owl named Sam, and he was lonely. \"Why are you here?\" "
    "asked Ida. \"I lost my way home,\" said Sam. Ida carried him back to the river. Ida learned that a kind word warms a cold day.",
};

/* The geometric mean of the stories' perplexities, or NAN. */
static double tiny_perplexity(const char *model) {
    double sum = 0;
    size_t n = sizeof stories / sizeof *stories;
    for (size_t i = 0; i < n; i++) {
        const char *args[] = {"score", model, "--top", "1", NULL};
        score s = {0};
        run_result r = run_input(stories[i], strlen(stories[i]), args);
        sum += run_failure(&r) || read_score(r.out, &s) ? NAN : log(s.perplexity);
        score_free(&s);
        run_free(&r);
    }
    return exp(sum / (double)n);
}

static void test_tiny(void) {
    double first = NAN;
    for (size_t i = 0; i < sizeof tiny_formats / sizeof *tiny_formats; i++) {
        char name[200];
        const char *model = tiny_model(tiny_formats[i].name);
        snprintf(name, sizeof name, "lorch-tiny-%s tells a story, adds and closes its JSON", tiny_formats[i].name);
        if (model && tiny_formats[i].q4_up && wanted(name)) {
            const char *wrong = tiny_tasks(model);
            report(!wrong, name, "%s", wrong ? wrong : "");
        }
        snprintf(name, sizeof name, "lorch-tiny-%s is not surprised by fresh stories", tiny_formats[i].name);
        if (!wanted(name) && i) continue;
        if (!model) {
            skip(name, "no such model");
            continue;
        }
        double perplexity = tiny_perplexity(model), most = tiny_formats[i].q4_up ? 0.01 : 0.05;
        if (i == 0) first = perplexity;
        if (!wanted(name)) continue;
        report(perplexity < 2 && fabs(perplexity / first - 1) < most, name, "perplexity %.4f, that of F16 %+.2f %%", perplexity,
               100 * (perplexity / first - 1));
    }
}

/* ==== main =================================================================================== */

int main(int argc, char **argv) {
    greedy_file project = {"project", ""}, tiny = {"shared", "-bf16"}, shared = {"shared", ""};
    char path[600];
    begin(argc, argv);
    each_line("tests/expected/logprobs.jsonl", use_logprobs_line, NULL);
    test_hashes();
    test_file_cases();
    test_longrope();
    test_file_sampling();
    test_tiny();
    each_line("tests/expected/greedy.jsonl", use_greedy_line, &project);
    if (!T.shared) {
        skip("greedy text of the shared models", "LORCH_SHARED is unset");
        return finish();
    }
    snprintf(path, sizeof path, "%s/models/expected.jsonl", T.shared);
    each_line(path, use_greedy_line, &tiny);
    snprintf(path, sizeof path, "%s/testdata/models/greedy.jsonl", T.shared);
    each_line(path, use_greedy_line, &shared);
    return finish();
}
