/* SPDX-License-Identifier: MIT
 *
 * embed: a program that uses lorch as a library, through lorch.h alone.
 *
 *   cc -c -O3 -DLORCH_NO_MAIN lorch.c -o lorch.o
 *   cc -std=c99 tests/embed.c lorch.o -o embed -lpthread -lm && ./embed [NAME-PART ...]
 *
 * It runs in the top directory. */
#define _POSIX_C_SOURCE 200809L
#include "../lorch.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MKMODEL_NO_MAIN
#include "mkmodel.c"

static const char model_path[] = "tests/models/lorch-tiny-q8_0.gguf", story[] = "Once upon a time";
static int bad, details;
static char notes[8192]; /* printed below the test's line */

static void note(const char *fmt, ...) {
    va_list ap;
    size_t len = strlen(notes);
    va_start(ap, fmt);
    vsnprintf(notes + len, sizeof notes - len, fmt, ap);
    va_end(ap);
}

#define CHECK(expr, ...) \
    do { \
        if (!(expr)) { \
            bad = 1; \
            if (details++ < 8) note("# embed.c:%d: %s: ", __LINE__, #expr), note(__VA_ARGS__), note("\n"); \
        } \
    } while (0)

static lorch *shared_model(void) { /* loaded once, freed by the last test */
    static lorch *l;
    char error[LORCH_ERROR_BYTES] = "";
    lorch_options o;
    lorch_defaults(&o);
    o.n_threads = 2;
    if (!l) l = lorch_load(model_path, &o, error);
    if (!l) printf("not ok - load\n# %s\n", error), exit(1);
    return l;
}

static void nap_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ==== A generation and what its callback saw ================================================== */

typedef struct {
    char text[32768];
    size_t len;
    int n, wrong, stop_at; /* stop_at: the callback ends it at that token; -1: never */
    pthread_t thread;      /* the one that must call back */
} seen;

static int on_token(const lorch_token *t, void *user) {
    seen *s = user;
    if (t->index != s->n || strlen(t->text) != t->len || t->text[t->len] || t->id < 0 || !pthread_equal(s->thread, pthread_self())) s->wrong = 1;
    if (s->len + t->len < sizeof s->text) memcpy(s->text + s->len, t->text, t->len + 1), s->len += t->len;
    return s->n++ == s->stop_at;
}

static lorch_params params(int max_tokens, float temperature, uint64_t seed) {
    lorch_params p;
    lorch_params_defaults(&p);
    p.max_tokens = max_tokens, p.temperature = temperature, p.seed = seed;
    return p;
}

static lorch_reason generate(const lorch_params *p, const char *key, const char *prompt, seen *s, lorch_stats *stats, char *error) {
    memset(s->text, 0, sizeof s->text);
    s->len = 0, s->n = s->wrong = 0, s->thread = pthread_self();
    return lorch_generate(shared_model(), key, prompt, strlen(prompt), p, on_token, s, stats, error);
}

/* ==== Tests ================================================================================== */

static void test_version(void) { CHECK(strlen(lorch_version()) >= 5 && strchr(lorch_version(), '.'), "%s", lorch_version()); }

static void test_load_errors(void) {
    static const char *const paths[] = {"", "/no/such/model.gguf", "/", "/dev/null", "tests/embed.c"};
    char error[LORCH_ERROR_BYTES];
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        error[0] = 0;
        lorch *l = lorch_load(paths[i], NULL, error);
        CHECK(!l, "%s was loaded", paths[i]);
        CHECK(*error && !strchr(error, '\n') && strlen(error) < LORCH_ERROR_BYTES, "%s: '%s'", paths[i], error);
        lorch_free(l);
    }
    lorch_free(NULL);
    lorch_options o;
    for (int i = 0; i < 5; i++) {
        lorch_defaults(&o);
        if (i == 0) o.n_parallel = 0;
        if (i == 1) o.n_parallel = 100000;
        if (i == 2) o.n_queue = -1;
        if (i == 3) o.n_ctx = 1 << 23; /* more than the model was made for */
        if (i == 4) o.kv_bytes = (uint64_t)1 << 50;
        error[0] = 0;
        CHECK(!lorch_load(model_path, &o, error) && *error, "option %d is accepted", i);
    }
}

static void test_tokenize(void) {
    lorch *l = shared_model();
    static const char *const texts[] = {"Once upon a time", " two  spaces ", "\xc3\xa9t\xc3\xa9 \xe4\xb8\xad \xf0\x9f\x98\x80", "a\nb\tc", "0123456789", "<s></s>"};
    int32_t ids[256], few[2] = {-7, -7};
    char text[256];
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        int n = lorch_tokenize(l, texts[i], strlen(texts[i]), 0, 0, ids, 256);
        CHECK(n > 0 && n <= 256, "'%s' has %d tokens", texts[i], n);
        long len = lorch_detokenize(l, ids, n, 0, text, sizeof text);
        CHECK(len == (long)strlen(texts[i]) && !strcmp(text, texts[i]), "'%s' comes back as '%s'", texts[i], text);
        int with_bos = lorch_tokenize(l, texts[i], strlen(texts[i]), 1, 0, NULL, 0);
        CHECK(with_bos == n + 1, "%d tokens, with BOS %d", n, with_bos);
    }
    int n = lorch_tokenize(l, story, strlen(story), 0, 0, few, 1);
    CHECK(n > 1 && few[0] >= 0 && few[1] == -7, "cap 1: %d, %d", (int)few[0], (int)few[1]);
    lorch_tokenize(l, story, strlen(story), 0, 0, ids, 256);
    memset(text, 'x', sizeof text);
    CHECK(lorch_detokenize(l, ids, n, 0, text, 4) == (long)strlen(story) && !memcmp(text, "Oncex", 5), "cap 4: %.8s", text);
    CHECK(lorch_tokenize(l, "\xff", 1, 0, 0, ids, 256) == -1, "text that is not UTF-8");
    CHECK(lorch_tokenize(l, "", 0, 0, 0, ids, 256) == 0, "the empty text");
    CHECK(lorch_vocab_size(l) > 256 && ids[0] < lorch_vocab_size(l), "a vocabulary of %d", lorch_vocab_size(l));
}

static void test_generate(void) {
    static seen a, b;
    char error[LORCH_ERROR_BYTES] = "";
    lorch_stats st;
    lorch_params p = params(40, 0, 0);
    a.stop_at = b.stop_at = -1;
    lorch_reason r = generate(&p, NULL, story, &a, &st, error);
    CHECK(r == LORCH_MAX_TOKENS || r == LORCH_EOS, "reason %d: %s", (int)r, error);
    CHECK(!a.wrong && a.n == st.tokens_out && (r == LORCH_EOS || a.n == 40), "%d tokens, %d counted", a.n, st.tokens_out);
    CHECK(st.prompt_tokens > 2 && st.stop_matched == -1 && st.prefill_seconds > 0 && st.decode_seconds > 0, "%d prompt tokens", st.prompt_tokens);
    CHECK(strlen(a.text) > 40, "the text: %s", a.text);
    note("# %s%s\n", story, a.text);
    generate(&p, NULL, story, &b, NULL, error);
    CHECK(!strcmp(a.text, b.text), "greedy text differs: %s", b.text);
    p = params(40, 1, 1);
    generate(&p, NULL, story, &a, NULL, error);
    generate(&p, NULL, story, &b, NULL, error);
    CHECK(!strcmp(a.text, b.text), "one seed, two texts: %s, %s", a.text, b.text);
    p.seed = 2;
    generate(&p, NULL, story, &b, NULL, error);
    CHECK(strcmp(a.text, b.text), "two seeds, one text: %s", b.text);
    CHECK(lorch_generate(shared_model(), NULL, story, strlen(story), &p, NULL, NULL, NULL, error) != LORCH_FAILED, "without a callback: %s", error);
}

static void test_stop(void) {
    static seen a, b;
    char error[LORCH_ERROR_BYTES] = "";
    lorch_stats st;
    lorch_params p = params(60, 0, 0);
    a.stop_at = b.stop_at = -1;
    p.ignore_eos = 1;
    generate(&p, NULL, story, &a, NULL, error);
    char stop[8];
    memcpy(stop, a.text + a.len / 2, 5), stop[5] = 0; /* five bytes of its middle (the text is ASCII) */
    const char *stops[] = {"\x01never", stop};
    p.stop = stops, p.n_stop = 2;
    lorch_reason r = generate(&p, NULL, story, &b, &st, error);
    const char *at = strstr(a.text, stop);
    CHECK(r == LORCH_STOP_SEQUENCE && st.stop_matched == 1, "reason %d, matched %d, %s", (int)r, st.stop_matched, error);
    CHECK(at && b.len == (size_t)(at - a.text) && !memcmp(a.text, b.text, b.len), "'%s' before '%s' in '%s'", b.text, stop, a.text);
    p = params(60, 0, 0);
    a.stop_at = 3;
    r = generate(&p, NULL, story, &a, NULL, error);
    CHECK(r == LORCH_CANCELLED && a.n == 4, "the callback's stop: reason %d after %d tokens", (int)r, a.n);
}

static void test_bad_params(void) {
    char error[LORCH_ERROR_BYTES];
    static seen s;
    s.stop_at = -1;
    for (int i = 0; i < 12; i++) {
        lorch_params p = params(5, 0, 0);
        const char *prompt = story, *stops[] = {"a", "b", "c", "d", ""};
        p.stop = stops;
        if (i == 0) p.max_tokens = 0;
        if (i == 1) p.temperature = -1;
        if (i == 2) p.temperature = 2.5f;
        if (i == 3) p.top_p = 1.5f;
        if (i == 4) p.min_p = -0.1f;
        if (i == 5) p.top_k = -1;
        if (i == 6) p.repetition_penalty = 0;
        if (i == 7) p.n_stop = 5;
        if (i == 8) p.stop = stops + 4, p.n_stop = 1;
        if (i == 9) prompt = "\xc3";
        if (i == 10) p.temperature = 0.0f / (p.temperature * 0.0f); /* NaN */
        if (i == 11) p.repetition_penalty = 2.5f;
        error[0] = 0;
        lorch_reason r = generate(&p, NULL, prompt, &s, NULL, error);
        CHECK(r == LORCH_FAILED && *error && s.n == 0, "case %d: reason %d, '%s'", i, (int)r, error);
    }
    size_t n = 200000;
    char *endless = malloc(n);
    lorch_params p = params(5, 0, 0);
    if (!endless) return;
    memset(endless, 'a', n);
    error[0] = 0;
    CHECK(lorch_generate(shared_model(), NULL, endless, n, &p, NULL, NULL, NULL, error) == LORCH_FAILED && strstr(error, "context"),
          "a prompt beyond the context: %s", error);
    free(endless);
}

typedef struct {
    lorch_params p;
    const char *key, *prompt;
    seen s;
    lorch_reason reason;
    char error[LORCH_ERROR_BYTES];
    double ended;
} call;

static void *call_main(void *arg) {
    call *c = arg;
    c->reason = generate(&c->p, c->key, c->prompt, &c->s, NULL, c->error);
    c->ended = seconds();
    return NULL;
}

static int start_slowly(const lorch_token *t, void *user) { /* a callback that takes its time: the job lasts */
    __atomic_store_n((int *)user, t->index + 1, __ATOMIC_RELAXED);
    nap_ms(2);
    return 0;
}

static void *slow_main(void *arg) {
    call *c = arg;
    c->reason = lorch_generate(shared_model(), c->key, story, strlen(story), &c->p, start_slowly, &c->s.n, NULL, c->error);
    c->ended = seconds();
    return NULL;
}

static void test_cancel(void) {
    static call c;
    pthread_t thread;
    memset(&c, 0, sizeof c);
    c.p = params(100000, 1, 5), c.key = "to be cancelled", c.p.ignore_eos = 1;
    CHECK(lorch_cancel(shared_model(), "nobody") == 0, "there is none of that name");
    if (pthread_create(&thread, NULL, slow_main, &c)) return;
    for (int i = 0; i < 5000 && !__atomic_load_n(&c.s.n, __ATOMIC_RELAXED); i++) nap_ms(1);
    CHECK(lorch_cancel(shared_model(), "to be cancelled") == 1, "it runs");
    pthread_join(thread, NULL);
    CHECK(c.reason == LORCH_CANCELLED, "reason %d: %s", (int)c.reason, c.error);
    CHECK(lorch_cancel(shared_model(), "to be cancelled") == 0, "it has ended");
}

static void test_together(void) {
    enum { N = 6 };
    static call alone[N], together[N];
    static const char *const prompts[N] = {"Once upon a time", "The dog", "Lily and Tom went to the", "One day, a big", "Once upon a time", "\"Hello\" said"};
    pthread_t thread[N];
    for (int i = 0; i < N; i++) {
        alone[i].p = params(50 + 5 * i, i % 2 ? 1.0f : 0.0f, (uint64_t)i), alone[i].prompt = prompts[i], alone[i].s.stop_at = -1;
        alone[i].p.ignore_eos = 1;
        together[i] = alone[i];
        call_main(&alone[i]);
    }
    for (int i = 0; i < N; i++) /* more than n_parallel: some wait */
        if (pthread_create(&thread[i], NULL, call_main, &together[i])) exit(1);
    for (int i = 0; i < N; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < N; i++) {
        CHECK(together[i].reason == LORCH_MAX_TOKENS && !together[i].s.wrong, "call %d: reason %d, %s", i, (int)together[i].reason, together[i].error);
        CHECK(together[i].s.n == alone[i].s.n && !strcmp(together[i].s.text, alone[i].s.text),
              "call %d differs: '%s', alone '%s'", i, together[i].s.text, alone[i].s.text);
    }
}

static void test_same_key(void) {
    static call c;
    static seen s;
    char error[LORCH_ERROR_BYTES] = "";
    pthread_t thread;
    memset(&c, 0, sizeof c);
    lorch_params p = params(5, 0, 0);
    c.p = params(100000, 1, 5), c.key = "twice", c.p.ignore_eos = 1, s.stop_at = -1;
    if (pthread_create(&thread, NULL, slow_main, &c)) return;
    for (int i = 0; i < 5000 && !__atomic_load_n(&c.s.n, __ATOMIC_RELAXED); i++) nap_ms(1);
    CHECK(generate(&p, "twice", story, &s, NULL, error) == LORCH_FAILED && *error, "the second of one name: %s", error);
    lorch_cancel(shared_model(), "twice");
    pthread_join(thread, NULL);
    CHECK(generate(&p, "twice", story, &s, NULL, error) == LORCH_MAX_TOKENS, "afterwards the name is free: %s", error);
}

static void test_options(void) {
    char error[LORCH_ERROR_BYTES] = "";
    lorch_options o;
    lorch_params p = params(30, 0, 0);
    static seen a, b;
    a.stop_at = b.stop_at = -1;
    generate(&p, NULL, story, &a, NULL, error);
    for (int threads = 1; threads <= 3; threads += 2) {
        lorch_defaults(&o);
        o.n_threads = threads, o.n_ctx = 128, o.n_parallel = 1, o.n_queue = 0, o.chunk = threads;
        lorch *l = lorch_load(model_path, &o, error);
        CHECK(l, "%s", error);
        if (!l) continue;
        CHECK(lorch_context_length(l) == 128, "a context of %d", lorch_context_length(l));
        b.len = 0, b.n = b.wrong = 0, b.thread = pthread_self();
        CHECK(lorch_generate(l, NULL, story, strlen(story), &p, on_token, &b, NULL, error) != LORCH_FAILED, "%s", error);
        CHECK(!strcmp(a.text, b.text), "%d threads, chunks of %d: '%s', not '%s'", threads, threads, b.text, a.text);
        lorch_stats st;
        p.max_tokens = 100000, p.ignore_eos = 1;
        CHECK(lorch_generate(l, NULL, story, strlen(story), &p, NULL, NULL, &st, error) == LORCH_MAX_TOKENS && st.prompt_tokens + st.tokens_out == 128,
              "%d + %d tokens in a context of 128", st.prompt_tokens, st.tokens_out);
        p.max_tokens = 30, p.ignore_eos = 0;
        lorch_free(l);
    }
}

static void test_memory(void) {
    char error[LORCH_ERROR_BYTES] = "";
    lorch_options o;
    lorch_defaults(&o);
    o.kv_bytes = 8 << 20;
    lorch *l = lorch_load(model_path, &o, error);
    CHECK(l, "%s", error);
    if (!l) return;
    lorch_memory m = lorch_memory_used(l);
    FILE *f = fopen(model_path, "rb");
    long size = f && !fseek(f, 0, SEEK_END) ? ftell(f) : 0;
    if (f) fclose(f);
    CHECK(m.weights > 0 && m.weights <= (uint64_t)size, "weights %llu of a file of %ld", (unsigned long long)m.weights, size);
    CHECK(m.kv > 4 << 20 && m.kv <= 8 << 20, "kv %llu", (unsigned long long)m.kv);
    CHECK(m.scratch > 0 && m.scratch < 64 << 20, "scratch %llu", (unsigned long long)m.scratch);
    lorch_free(l);
}

typedef struct { int32_t id[64]; int n; } ids_seen;
static int see_id(const lorch_token *t, void *user) {
    ids_seen *s = user;
    if (s->n < 64) s->id[s->n++] = t->id;
    return 0;
}

typedef struct {
    lorch *l;
    const char *text;
    lorch_params p;
    ids_seen seen;
    lorch_reason reason;
} family_call;

static void *family_main(void *arg) {
    family_call *c = arg;
    char error[LORCH_ERROR_BYTES];
    c->reason = lorch_generate(c->l, NULL, c->text, strlen(c->text), &c->p, see_id, &c->seen, NULL, error);
    return NULL;
}

/* The text among three others, which take their turns in the same batches. */
static ids_seen in_company(lorch *l, const char *text, const lorch_params *p) {
    static const char *const others[3] = {"Another tale of the sea", "then there was the shore", "12 + 34 is the rest of it, or so they said in the theatre"};
    family_call c[4];
    pthread_t thread[4];
    for (int i = 0; i < 4; i++) {
        family_call one = {l, i ? others[i - 1] : text, *p, {{0}, 0}, LORCH_FAILED};
        c[i] = one, c[i].p.seed += (uint64_t)i;
        if (pthread_create(&thread[i], NULL, family_main, &c[i])) exit(1);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(thread[i], NULL);
        CHECK(c[i].reason == LORCH_MAX_TOKENS, "call %d: reason %d", i, (int)c[i].reason);
    }
    return c[0].seen;
}

/* Each family: a prompt whose beginning lies in the cache, looking ahead or not, in company, goes on as in a model just loaded. */
static void test_families(void) {
    static const char *const archs[] = {"llama", "qwen2moe", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt-oss", "smollm3", "olmo2", "granitemoe",
                                        "stablelm", "cohere2", "lfm2", "lfm2moe", "deepseek2"};
    static const char text[] = "The rest of the theme, then the other theme; the rest of the theme, then the other theme: a tale of the sea and the stars, "
                               "the tide and the shore, told there and then, the rest of the theme";
    char path[64], error[LORCH_ERROR_BYTES] = "";
    snprintf(path, sizeof path, "/tmp/lorch-embed-%ld.gguf", (long)getpid());
    for (size_t i = 0; i < sizeof archs / sizeof *archs; i++) {
        const char *args[] = {archs[i], "q8_0", path};
        ids_seen first = {{0}, 0}, again = {{0}, 0}, plain = {{0}, 0};
        lorch_stats st;
        lorch_params p = params(40, 0.8f, 11);
        lorch_options o;
        lorch_defaults(&o);
        o.n_threads = 2, p.ignore_eos = 1;
        CHECK(mkmodel_write(3, args) == 0, "%s", archs[i]);
        lorch *l = lorch_load(path, &o, error);
        o.no_speculate = 1, o.chunk = 7;
        lorch *m = lorch_load(path, &o, error);
        CHECK(l && m, "%s", error);
        if (l && m) {
            lorch_reason r = lorch_generate(l, NULL, text, sizeof text - 1, &p, see_id, &first, &st, error);
            CHECK(r == LORCH_MAX_TOKENS && first.n == 40 && st.cached_tokens == 0 && st.prompt_tokens > 64, "%s: %d tokens, %s", archs[i], first.n, error);
            lorch_generate(l, NULL, text, sizeof text - 1, &p, see_id, &again, &st, error);
            CHECK(st.cached_tokens >= 64, "%s: %d of %d tokens cached", archs[i], st.cached_tokens, st.prompt_tokens);
            ids_seen among = in_company(m, text, &p);
            lorch_generate(m, NULL, text, sizeof text - 1, &p, see_id, &plain, &st, error);
            CHECK(!memcmp(&first, &again, sizeof first) && !memcmp(&first, &plain, sizeof first), "%s: other tokens", archs[i]);
            CHECK(!memcmp(&first, &among, sizeof first), "%s: other tokens in company", archs[i]);
        }
        lorch_free(l), lorch_free(m);
    }
    unlink(path);
}

static void test_free_running(void) {
    char error[LORCH_ERROR_BYTES] = "";
    for (int i = 0; i < 10; i++) { /* loading and freeing leaves nothing behind: the leak checker watches */
        lorch *l = lorch_load(model_path, NULL, error);
        CHECK(l, "%s", error);
        lorch_free(l);
    }
    lorch_free(shared_model());
}

static const struct { const char *name; void (*run)(void); } tests[] = {
    {"version", test_version},
    {"load errors", test_load_errors},
    {"tokenize and back", test_tokenize},
    {"generate with a callback", test_generate},
    {"stop strings, and stop by the callback", test_stop},
    {"bad parameters", test_bad_params},
    {"cancel from another thread", test_cancel},
    {"together as alone", test_together},
    {"one name twice", test_same_key},
    {"threads, chunks and context change no bit", test_options},
    {"memory figures", test_memory},
    {"families: a cached prefix, speculation and company change no token", test_families},
    {"free", test_free_running},
};

int main(int argc, char **argv) {
    int failed = 0, run = 0;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= strstr(tests[i].name, argv[k]) != NULL;
        if (!wanted) continue;
        bad = details = 0, notes[0] = 0;
        tests[i].run();
        run++, failed += bad;
        printf("%s - %s\n%s", bad ? "not ok" : "ok", tests[i].name, notes);
        fflush(stdout);
    }
    return failed || !run;
}
