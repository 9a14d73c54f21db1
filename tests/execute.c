/* execute.c: jobs, as the orchestrator sees them. MIT licence.
 *
 * POST /execute with its validation, events, sampling, stop sequences, deadlines and resumption,
 * POST /cancel, and what happens when a client goes away. The number in brackets in a test's name
 * is the system specification's requirement that it holds lorch to. Tests share three workers:
 * `tiny` on the story model, `slow` and `narrow` (one job at a time, one in the queue) on a model
 * whose jobs last long enough to be caught in the act. */
#include "harness.h"

static worker *tiny_worker, *slow_worker, *narrow_worker;

/* A shared worker is started when first needed, and again if a test has brought it down. */
static int shared(worker **w, const char *const *list) {
    if (*w && worker_gone(*w)) {
        CHECK(false, "the worker of an earlier test ended with %d", (*w)->status);
        worker_drop(*w);
        *w = NULL;
    }
    if (!*w) *w = worker_checked(worker_start(list));
    return (*w)->port;
}

#define SHARED(w, ...) shared(&(w), (const char *const[]){__VA_ARGS__, NULL})

static int tiny(void) { return SHARED(tiny_worker, "--model", tiny_model()); }

static int slow(void) {
    return SHARED(slow_worker, "--model", slow_model(), "--max-tokens-out", "16000",
                  "--parallel", "3");
}

static int narrow(void) {
    return SHARED(narrow_worker, "--model", slow_model(), "--max-tokens-out", "16000",
                  "--parallel", "1", "--queue", "1", "--sse-ping-ms", "50");
}

/* A job that outlasts any test. */
#define LONG_JOB "'max_tokens':16000,'ignore_eos':true"

/* A prompt that takes a while to process but leaves room in the slow model's context: even at one
 * token per character it is 14,000 of 16,384. */
static char *long_prompt(void) { return text_times("once upon a time it was ", 583); }

static bool is_uuid4(const char *s) {
    static const char form[] = "xxxxxxxx-xxxx-4xxx-yxxx-xxxxxxxxxxxx";
    if (strlen(s) != 36) return false;
    for (int i = 0; i < 36; i++) {
        if (form[i] == 'x' ? !isxdigit((unsigned char)s[i])
            : form[i] == 'y' ? !strchr("89abAB", s[i]) : s[i] != form[i]) return false;
    }
    return true;
}

/* What holds for every stream that ran to its end: order, one terminal event, counting, and as
 * many tokens as `end` says when nothing was suppressed before index `first`. */
static void check_stream(stream *s, int first) {
    int i = first;
    REQUIRE(s->r->status == 200, "status %d: %s", s->r->status, s->r->body.p);
    CHECK(s->r->done && !s->r->bad, "the stream did not end properly");
    REQUIRE(s->n >= 2, "only %zu events: %s", s->n, s->r->body.p);
    CHECK_TEXT(s->events[0].type, "started", "the first event");
    for (size_t e = 1; e + 1 < s->n; e++) {
        const char *type = s->events[e].type;
        if (strcmp(type, "token")) CHECK_TEXT(type, "metrics", "an event amid the tokens");
        else CHECK_NUM(json_num(s->events[e].data, "i"), i++, "i");
    }
    const char *last = s->events[s->n - 1].type;
    CHECK(!strcmp(last, "end") || !strcmp(last, "error"), "the last event is %s", last);
    if (!strcmp(last, "end") && i > first)
        CHECK_NUM(json_num(stream_last(s), "tokens_out"), i, "tokens_out");
}

/* The same for a stream that must end with `end`. */
static void check_end(stream *s, const char *stop_reason) {
    check_stream(s, 0);
    CHECK_TEXT(json_str(stream_last(s), "type"), "end", stream_last(s));
    CHECK_TEXT(json_str(stream_last(s), "stop_reason"), stop_reason, "stop_reason");
}

/* A refusal as the contract words it. */
static void check_refused(const reply *r, int status, const char *code, const char *what) {
    CHECK(r->status == status, "%s: status %d, not %d: %s", what, r->status, status, r->body.p);
    const char *got = json_str(r->body.p, "error.code");
    CHECK(!strcmp(got, code), "%s: code %s, not %s", what, got, code);
    CHECK(json_type(r->body.p, "error.message") == 's', "%s: no message", what);
    CHECK(header_is(r, "Content-Type", "application/json"), "%s: not JSON", what);
}

static reply *refused(int port, const char *body) { return post(port, "/execute", body); }

/* ==== Events ================================================================================== */

static void test_started(void) {
    stream *s = job_run(tiny(), "'max_tokens':8,'temperature':0,'seed':42");
    check_end(s, "MAX_TOKENS");
    const char *e = stream_started(s), *at = json_str(e, "started_at");
    CHECK_TEXT(json_str(e, "job_id"), s->job_id, "job_id");
    CHECK_TEXT(json_str(e, "model"), json_str(health(tiny()), "model"), "model");
    CHECK_TEXT(json_raw(e, "seed"), "42", "seed");
    /* The tokenizer of the file adds a BOS, and the four words are one token each. */
    CHECK_NUM(json_num(e, "prompt_tokens"), 5, "prompt_tokens");
    CHECK(json_has(e, "fingerprint"), "no fingerprint");
    CHECK(json_type(e, "correlation_id") == 's', "no correlation_id");
    int year, month, day, hour, minute, second, n = 0;
    CHECK(sscanf(at, "%4d-%2d-%2dT%2d:%2d:%2d%n", &year, &month, &day, &hour, &minute, &second,
                 &n) == 6 && n == 19 && at[strlen(at) - 1] == 'Z', "started_at is '%s'", at);
}

static void test_tokens_and_end(void) {
    stream *s = job_run(tiny(), "'max_tokens':12,'temperature':0,'seed':9");
    check_end(s, "MAX_TOKENS");
    CHECK_NUM(stream_tokens(s), 12, "token events");
    const char *end = stream_last(s);
    CHECK_NUM(json_num(end, "tokens_out"), 12, "tokens_out");
    CHECK_TEXT(json_raw(end, "seed"), "9", "seed");
    CHECK_NUM(json_num(end, "prompt_tokens"), 5, "prompt_tokens");
    CHECK(json_num(end, "decode_time_ms") >= 0, "decode_time_ms in %s", end);
    CHECK(json_num(end, "cached_tokens") >= 0, "cached_tokens in %s", end);
    CHECK(!json_has(end, "stop_sequence_matched"), "%s", end);
    CHECK(!strncmp(stream_text(s), " there was a ", 13), "the story is '%s'", stream_text(s));
}

static void test_blocks(void) {
    stream *s = job_run(tiny(), "'max_tokens':4");
    check_end(s, "MAX_TOKENS");
    for (size_t i = 0; i < s->n; i++) {
        const char *b = s->events[i].block;
        CHECK(!strncmp(b, "data: {", 7) && !strchr(b, '\n') && !strchr(b, '\r'),
              "a block is not one data line: %s", b);
    }
    CHECK(s->scanned == s->r->body.n, "text after the last blank line");
}

static void test_named_events(void) {
    stream *s = execute(tiny(), "/execute?v=1&sse=named", "", job_body(q("'max_tokens':3")));
    stream_finish(s, bound_ms(5000));
    check_end(s, "MAX_TOKENS");
    for (size_t i = 0; i < s->n; i++) {
        const char *name = text("event: %s", s->events[i].type);
        bool named = false, numbered = false;
        for (const char *line = s->events[i].block; line; line = strchr(line, '\n')) {
            line += *line == '\n';
            named |= !strncmp(line, name, strlen(name)) && line[strlen(name)] == '\n';
            numbered |= !strncmp(line, "id: ", 4);
        }
        CHECK(named && numbered, "no event: or id: line in %s", s->events[i].block);
    }
}

static void test_stream_headers(void) {
    stream *s = job_run(tiny(), "'max_tokens':1");
    const char *type = reply_header(s->r, "Content-Type");
    CHECK(s->r->status == 200, "status %d", s->r->status);
    CHECK(type && !strncmp(type, "text/event-stream", 17), "Content-Type: %s", type);
    CHECK(header_is(s->r, "Cache-Control", "no-cache, no-transform"), "Cache-Control in %s",
          s->r->head);
    CHECK(header_is(s->r, "X-Accel-Buffering", "no"), "X-Accel-Buffering in %s", s->r->head);
    CHECK(!reply_header(s->r, "Content-Length"), "a stream has no Content-Length");
    const char *id = reply_header(s->r, "X-Correlation-Id");
    CHECK(id && !strcmp(id, json_str(stream_started(s), "correlation_id")), "correlation id");
}

static void test_metrics_events(void) {
    NEED_SLOW_MODEL();
    stream *s = job(slow(), LONG_JOB);
    double last = 0, end = now_ms() + bound_ms(20000);
    int seen = 0;
    while (seen < 3 && now_ms() < end && !stream_over(s)) {
        size_t before = s->n;
        stream_pump(s, 100);
        for (size_t i = before; i < s->n; i++) {
            event *e = &s->events[i];
            if (strcmp(e->type, "metrics")) continue;
            double gap = e->at - last;
            if (seen++) CHECK(gap > 350 && gap < bound_ms(1000), "%.0f ms between metrics", gap);
            last = e->at;
            CHECK_TEXT(json_str(e->data, "job_id"), s->job_id, "job_id");
            CHECK(json_num(e->data, "tokens_out") > 0, "tokens_out in %s", e->data);
            CHECK(json_num(e->data, "decode_time_ms") > 0, "decode_time_ms in %s", e->data);
            CHECK(json_num(e->data, "tokens_per_sec") > 0, "tokens_per_sec in %s", e->data);
            CHECK_NUM(json_num(e->data, "vram_bytes"), 0, "vram_bytes");
            CHECK(json_num(e->data, "memory_bytes") > 0, "memory_bytes in %s", e->data);
        }
    }
    CHECK(seen == 3, "%d metrics events", seen);
    cancel(slow(), s->job_id);
    stream_finish(s, bound_ms(5000));
}

static void test_end_of_generation(void) {
    stream *s = job_run(tiny(), "'temperature':0");
    check_end(s, "EOS");
    CHECK(stream_tokens(s) > 10 && stream_tokens(s) < 400, "%d tokens", stream_tokens(s));
    CHECK(!strstr(stream_text(s), "<|"), "a control token was emitted: %s", stream_text(s));
    stream *on = job_run(tiny(), "'temperature':0,'ignore_eos':true,'max_tokens':%d",
                         stream_tokens(s) + 5);
    check_end(on, "MAX_TOKENS");
    CHECK_NUM(stream_tokens(on), stream_tokens(s) + 5, "tokens with ignore_eos");
}

/* max_tokens defaults to what --max-tokens-out allows, and may not exceed it. */
static void test_max_tokens_out(void) {
    worker *w = ready_worker("--model", tiny_model(), "--max-tokens-out", "7");
    stream *s = job_run(w->port, "'ignore_eos':true");
    check_end(s, "MAX_TOKENS");
    CHECK_NUM(stream_tokens(s), 7, "tokens by default");
    check_end(job_run(w->port, "'ignore_eos':true,'max_tokens':7"), "MAX_TOKENS");
    reply *r = refused(w->port, job_body(q("'max_tokens':8")));
    check_refused(r, 400, "INVALID_REQUEST", "max_tokens above --max-tokens-out");
    CHECK_TEXT(json_str(r->body.p, "errors.0.field"), "max_tokens", "field");
    worker_end(w);
}

static void test_max_tokens_in(void) {
    worker *w = ready_worker("--model", tiny_model(), "--max-tokens-in", "6");
    check_end(job_run(w->port, "'max_tokens':1,'prompt':'Once upon a time,'"), "MAX_TOKENS");
    check_refused(refused(w->port, job_body(q("'prompt':'Once upon a time, there'"))), 400,
                  "CONTEXT_LENGTH_EXCEEDED", "7 tokens where 6 are allowed");
    worker_end(w);
}

/* An emoji is four tokens for this tokenizer, a Cyrillic letter two and a tilde one, since no
 * merge concerns them: with the BOS, 127 emoji and one letter are 511 tokens of the 512. */
static void test_context_limit(void) {
    char *emoji = text_times("\xf0\x9f\x98\x80", 127);
    stream *s = job_run(tiny(), "'prompt':'Once','ignore_eos':true");
    check_end(s, "MAX_TOKENS");
    CHECK_NUM(stream_tokens(s) + json_num(stream_started(s), "prompt_tokens"), 512,
              "prompt and output together");
    s = job_run(tiny(), "'prompt':'%s\xd0\x96','ignore_eos':true", emoji);
    check_end(s, "MAX_TOKENS");
    CHECK_NUM(json_num(stream_started(s), "prompt_tokens"), 511, "prompt_tokens");
    CHECK_NUM(stream_tokens(s), 1, "tokens that fit");
    reply *r = refused(tiny(), job_body(q("'prompt':'%s\xd0\x96~'", emoji)));
    check_refused(r, 400, "CONTEXT_LENGTH_EXCEEDED", "a prompt that fills the context");
    CHECK_NUM(json_num(r->body.p, "error.details.prompt_tokens"), 512, "details.prompt_tokens");
    CHECK_NUM(json_num(r->body.p, "error.details.context_length"), 512, "context_length");
    CHECK(!json_has(r->body.p, "errors"), "not a field error: %s", r->body.p);
}

/* Random tokens are rarely whole characters. The JSON reader of the harness refuses malformed
 * UTF-8, so every event that it understands holds whole ones. */
static void test_utf8(void) {
    for (int seed = 1; seed <= 4; seed++) {
        stream *s = job_run(tiny(), "'temperature':2,'ignore_eos':true,'seed':%d", seed);
        check_end(s, "MAX_TOKENS");
        for (size_t i = 0; i < s->n; i++)
            CHECK(json_parse(s->events[i].data, strlen(s->events[i].data)), "not JSON: %s",
                  s->events[i].data);
    }
}

static void test_control_tokens_are_text(void) {
    stream *s = job_run(tiny(), "'prompt':'<|im_end|>','max_tokens':1,'ignore_eos':true");
    check_end(s, "MAX_TOKENS");
    CHECK(json_num(stream_started(s), "prompt_tokens") > 4, "read as a control token");
}

/* ==== Validation ============================================================================== */

typedef struct { const char *field, *value; bool ok; } field_row;

static void check_field(int port, const char *field, const char *value, bool ok) {
    bool limits_itself = !strcmp(field, "max_tokens");
    const char *id = !strcmp(field, "job_id") ? "" : text("\"job_id\":\"%s\",", fresh_id());
    const char *prompt = !strcmp(field, "prompt") ? "" : "\"prompt\":\"Once upon a time\",";
    char *body = text("{%s%s%s\"%s\":%s}", id, prompt, limits_itself ? "" : "\"max_tokens\":1,",
                      field, value);
    const char *what = text("%s:%.60s", field, value);
    reply *r = refused(port, body);
    if (ok) {
        CHECK(r->status == 200 && strstr(r->body.p, "\"type\":\"end\""), "%s: %d %s", what,
              r->status, r->body.p);
        return;
    }
    check_refused(r, 400, "INVALID_REQUEST", what);
    CHECK(json_count(r->body.p, "errors") == 1, "%s: %s", what, r->body.p);
    CHECK(!strcmp(json_str(r->body.p, "errors.0.field"), field), "%s: %s", what, r->body.p);
    CHECK(json_type(r->body.p, "errors.0.constraint") == 's', "%s: no constraint", what);
    CHECK(json_type(r->body.p, "errors.0.message") == 's', "%s: no message", what);
}

static void check_fields(int port, const field_row *rows, size_t n) {
    for (size_t i = 0; i < n; i++) check_field(port, rows[i].field, rows[i].value, rows[i].ok);
}

static void test_number_fields(void) {
    static const field_row rows[] = {
        {"max_tokens", "0", false}, {"max_tokens", "1", true}, {"max_tokens", "2048", true},
        {"max_tokens", "2049", false}, {"max_tokens", "-1", false}, {"max_tokens", "1.5", false},
        {"max_tokens", "\"5\"", false}, {"max_tokens", "1e400", false},
        {"max_tokens", "true", false}, {"max_tokens", "[1]", false},
        {"max_tokens", "18446744073709551617", false}, {"max_tokens", "null", true},
        {"temperature", "0", true}, {"temperature", "0.0", true}, {"temperature", "-0.001", false},
        {"temperature", "2", true}, {"temperature", "2.0", true}, {"temperature", "2e0", true},
        {"temperature", "2.001", false}, {"temperature", "1e999", false},
        {"temperature", "\"1\"", false}, {"temperature", "false", false},
        {"temperature", "null", true},
        {"top_p", "0", true}, {"top_p", "1", true}, {"top_p", "1.001", false},
        {"top_p", "-0.001", false}, {"top_p", "\"x\"", false}, {"top_p", "null", true},
        {"top_k", "0", true}, {"top_k", "1024", true}, {"top_k", "1025", false},
        {"top_k", "-1", false}, {"top_k", "1.5", false}, {"top_k", "{}", false},
        {"top_k", "null", true},
        {"min_p", "0", true}, {"min_p", "1", true}, {"min_p", "1.001", false},
        {"min_p", "-0.001", false}, {"min_p", "[]", false}, {"min_p", "null", true},
        {"repetition_penalty", "0", false}, {"repetition_penalty", "0.001", true},
        {"repetition_penalty", "2", true}, {"repetition_penalty", "2.001", false},
        {"repetition_penalty", "-1", false}, {"repetition_penalty", "\"1\"", false},
        {"repetition_penalty", "null", true},
        {"seed", "0", true}, {"seed", "18446744073709551615", true},
        {"seed", "18446744073709551616", false}, {"seed", "-1", false}, {"seed", "1.5", false},
        {"seed", "\"7\"", false}, {"seed", "null", true},
        {"deadline_ms", "60000", true}, {"deadline_ms", "-1", false},
        {"deadline_ms", "\"60000\"", false}, {"deadline_ms", "null", true},
        {"resume_from", "0", true}, {"resume_from", "-1", false}, {"resume_from", "0.5", false},
        {"resume_from", "\"0\"", false}, {"resume_from", "null", true},
        {"ignore_eos", "true", true}, {"ignore_eos", "false", true}, {"ignore_eos", "1", false},
        {"ignore_eos", "\"true\"", false}, {"ignore_eos", "null", true},
        {"speculate", "true", true}, {"speculate", "false", true}, {"speculate", "1", false},
        {"cache_key", "\"\"", false}, {"cache_key", "7", false}, {"cache_key", "\"k\"", true},
        {"cache_key", "null", true},
    };
    check_fields(tiny(), rows, COUNT(rows));
}

static void test_job_id_field(void) {
    static const field_row rows[] = {
        {"job_id", "\"\"", false}, {"job_id", "7", false}, {"job_id", "null", false},
        {"job_id", "[\"a\"]", false}, {"job_id", "\"x\"", true},
    };
    char *bytes = text_times("i", 256), *letters = text_times("\xc3\xa9", 128);
    check_fields(tiny(), rows, COUNT(rows));
    check_field(tiny(), "job_id", text("\"%s\"", bytes), true);
    check_field(tiny(), "job_id", text("\"%si\"", bytes), false);
    check_field(tiny(), "job_id", text("\"%s\"", letters), true); /* 256 bytes, 128 characters */
    check_field(tiny(), "job_id", text("\"%s\xc3\xa9\"", letters), false);
}

/* The limit on a prompt counts characters, not bytes. The longest prompt exceeds the context of
 * the test model, which is another complaint and so tells that validation let it pass. */
static void test_prompt_field(void) {
    static const field_row rows[] = {
        {"prompt", "\"\"", false}, {"prompt", "7", false}, {"prompt", "null", false},
        {"prompt", "[\"a\"]", false}, {"prompt", "\"x\"", true},
    };
    static const char *const units[] = {"x", "\xc3\xa9", "\xf0\x9f\x98\x80"};
    check_fields(tiny(), rows, COUNT(rows));
    for (size_t i = 0; i < COUNT(units); i++) {
        char *most = text_times(units[i], 32768);
        check_refused(refused(tiny(), job_body(q("'prompt':'%s'", most))), 400,
                      "CONTEXT_LENGTH_EXCEEDED", "32768 characters");
        check_field(tiny(), "prompt", text("\"%s%s\"", most, units[i]), false);
    }
}

static void test_stop_field(void) {
    static const field_row rows[] = {
        {"stop", "[]", true}, {"stop", "[\"a\",\"b\",\"c\",\"d\"]", true}, {"stop", "null", true},
        {"stop", "[\"a\",\"b\",\"c\",\"d\",\"e\"]", false}, {"stop", "[\"\"]", false},
        {"stop", "\"a\"", false}, {"stop", "[1]", false}, {"stop", "[null]", false},
        {"stop", "{}", false}, {"stop", "[[\"a\"]]", false},
    };
    char *most = text_times("\xf0\x9f\x98\x80", 8); /* 32 tokens, see test_context_limit */
    check_fields(tiny(), rows, COUNT(rows));
    check_field(tiny(), "stop", text("[\"%s\"]", most), true);
    check_field(tiny(), "stop", text("[\"%s~\"]", most), false);
}

/* One field a hundred thousand times is one complaint too many, and no answer of megabytes. */
static void test_error_flood(void) {
    char *body = text("{\"job_id\":\"f\",\"prompt\":\"x\"%s}", text_times(",\"top_k\":-1", 80000));
    reply *r = refused(tiny(), body);
    check_refused(r, 400, "INVALID_REQUEST", "80,000 wrong fields");
    CHECK(r->body.n < 20000 && json_count(r->body.p, "errors") >= 1, "%zu bytes", r->body.n);
}

/* Numbers at the very edge of their ranges make no nonsense: the most likely token stays the most likely. */
static void test_extreme_parameters(void) {
    char *greedy = stream_text(job_run(tiny(), "'temperature':0,'max_tokens':20,'ignore_eos':true"));
    stream *s = job_run(tiny(), "'temperature':1e-40,'max_tokens':20,'ignore_eos':true");
    CHECK_TEXT(stream_text(s), greedy, "temperature 1e-40");
    s = job_run(tiny(), "'temperature':1e-9,'max_tokens':20,'ignore_eos':true");
    CHECK_TEXT(stream_text(s), greedy, "temperature 1e-9");
    check_end(job_run(tiny(), "'repetition_penalty':1e-50,'temperature':1e-20,'max_tokens':20,"
                      "'ignore_eos':true"), "MAX_TOKENS");
}

/* A job that comes before the rates are known must leave them usable. */
static void test_early_job(void) {
    for (int i = 0; i < 5; i++) {
        worker *w = start("--model", slow_model() ? slow_model() : tiny_model());
        REQUIRE(worker_port(w), "no port");
        stream *s[2];
        for (int n = 0; n < 200; n++, nap_ms(1)) {
            s[0] = job(w->port, "'prompt':'Hi','max_tokens':6,'ignore_eos':true");
            s[1] = job(w->port, "'prompt':'Ho','max_tokens':6,'ignore_eos':true");
            stream_finish(s[0], bound_ms(10000));
            stream_finish(s[1], bound_ms(10000));
            if (s[0]->r->status == 200) break;
        }
        CHECK_TEXT(json_str(stream_last(s[0]), "type"), "end", "the early job");
        double end = now_ms() + bound_ms(10000);
        const char *h = "";
        while (now_ms() < end && json_type(h = health(w->port), "rates.decode_tokens_per_sec") != 'n') nap_ms(20);
        CHECK(json_num(h, "rates.decode_tokens_per_sec") > 0, "rates in %s", h);
        worker_end(w);
    }
}

static void test_errors_together(void) {
    static const char *const fields[] = {"prompt", "max_tokens", "temperature", "top_p", "top_k",
                                         "min_p", "repetition_penalty", "stop", "seed"};
    reply *r = refused(tiny(), q("{'job_id':'all','prompt':'','max_tokens':0,'temperature':3,"
                                 "'top_p':2,'top_k':-1,'min_p':2,'repetition_penalty':0,"
                                 "'stop':[''],'seed':-1}"));
    check_refused(r, 400, "INVALID_REQUEST", "nine bad fields");
    CHECK_NUM(json_count(r->body.p, "errors"), COUNT(fields), "errors");
    for (size_t f = 0; f < COUNT(fields); f++) {
        bool found = false;
        for (size_t i = 0; i < COUNT(fields); i++)
            found |= !strcmp(json_str(r->body.p, text("errors.%zu.field", i)), fields[f]);
        CHECK(found, "%s is missing in %s", fields[f], r->body.p);
    }
}

static void test_error_wording(void) {
    reply *r = refused(tiny(), q("{'job_id':'w','prompt':'x','temperature':3}"));
    CHECK_TEXT(json_str(r->body.p, "errors.0.field"), "temperature", "field");
    CHECK_TEXT(json_str(r->body.p, "errors.0.constraint"), "range(0.0..=2.0)", "constraint");
    CHECK_TEXT(json_str(r->body.p, "errors.0.message"),
               "temperature must be at most 2.0 (got 3)", "message");
    CHECK_TEXT(json_str(r->body.p, "errors.0.value"), "3", "value");
    const char *id = reply_header(r, "X-Correlation-Id");
    CHECK(id && !strcmp(json_str(r->body.p, "error.correlation_id"), id), "%s", r->body.p);
}

static void test_no_prompt_in_errors(void) {
    char *secret = text_times("plugh", 6554); /* two characters too many */
    reply *r = refused(tiny(), q("{'job_id':'s','prompt':'%s'}", secret));
    check_refused(r, 400, "INVALID_REQUEST", "a prompt too long");
    CHECK(!strstr(r->body.p, "plugh"), "the prompt is shown: %.100s", r->body.p);
    r = refused(tiny(), q("{'job_id':'s','prompt':['plugh']}"));
    CHECK(!strstr(r->body.p, "plugh"), "the prompt is shown: %s", r->body.p);
    r = refused(tiny(), "{\"job_id\":\"s\",\"prompt\":\"plugh\" nonsense}");
    CHECK(!strstr(r->body.p, "plugh"), "the prompt is shown: %s", r->body.p);
}

typedef struct { const char *name, *body; size_t n; } body_row;
#define BODY(name, literal) {name, literal, sizeof literal - 1}

static void test_bad_bodies(void) {
    static const body_row rows[] = {
        BODY("empty", ""), BODY("a space", " "), BODY("half an object", "{"),
        BODY("an array", "[]"), BODY("null", "null"), BODY("a string", "\"x\""),
        BODY("a number", "1"), BODY("two values", "{}{}"), BODY("no JSON", "job_id=1"),
        BODY("invalid UTF-8", "{\"job_id\":\"\xff\",\"prompt\":\"x\"}"),
        BODY("a UTF-8 surrogate", "{\"job_id\":\"a\",\"prompt\":\"\xed\xa0\x80\"}"),
        BODY("a BOM", "\xef\xbb\xbf{\"job_id\":\"a\",\"prompt\":\"x\"}"),
        BODY("a lone high surrogate", "{\"job_id\":\"a\",\"prompt\":\"\\ud800\"}"),
        BODY("a lone low surrogate", "{\"job_id\":\"a\",\"prompt\":\"\\udc00\"}"),
        BODY("a lone surrogate in an unknown field",
             "{\"job_id\":\"a\",\"prompt\":\"x\",\"y\":\"\\ud800x\"}"),
        BODY("a NUL byte", "{\"job_id\":\"a\",\"prompt\":\"x\0y\"}"),
        BODY("a raw line feed", "{\"job_id\":\"a\",\"prompt\":\"x\ny\"}"),
        BODY("a comment", "{\"job_id\":\"a\",\"prompt\":\"x\"/**/}"),
        BODY("a comma too many", "{\"job_id\":\"a\",\"prompt\":\"x\",}"),
        BODY("NaN", "{\"job_id\":\"a\",\"prompt\":\"x\",\"y\":NaN}"),
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char *head = request(tiny(), "POST", "/execute", text("Content-Type: application/json\r\n"
                             "Content-Length: %zu\r\n", rows[i].n), NULL);
        buf b = {0};
        buf_str(&b, head);
        buf_add(&b, rows[i].body, rows[i].n);
        reply *r = http_bytes(tiny(), b.p, b.n);
        check_refused(r, 400, "INVALID_REQUEST", rows[i].name);
        CHECK(!json_has(r->body.p, "errors"), "%s is not a field error", rows[i].name);
    }
}

static void test_empty_object(void) {
    reply *r = refused(tiny(), "{}");
    check_refused(r, 400, "INVALID_REQUEST", "{}");
    CHECK_NUM(json_count(r->body.p, "errors"), 2, "errors");
    CHECK(strstr(r->body.p, "\"job_id\"") && strstr(r->body.p, "\"prompt\""), "%s", r->body.p);
}

static void test_depth(void) {
    for (int extra = 0; extra < 2; extra++) {
        size_t n = 63 + (size_t)extra;
        char *open = text_times("[", n), *shut = text_times("]", n);
        reply *r = refused(tiny(), job_body(q("'max_tokens':1,'deep':%s%s", open, shut)));
        if (extra) check_refused(r, 400, "INVALID_REQUEST", "65 levels");
        else CHECK(r->status == 200, "64 levels: %d %s", r->status, r->body.p);
    }
}

static void test_unknown_fields(void) {
    check_end(job_run(tiny(), "'max_tokens':1,'flavour':'sour','nested':{'a':[1,null,{}]},"
                      "'Temperature':99,'':0"), "MAX_TOKENS");
}

static void test_string_escapes(void) {
    stream *s = job_run(tiny(), "'prompt':'a\\u0000b','max_tokens':1");
    check_end(s, "MAX_TOKENS");
    stream *pair = job_run(tiny(), "'prompt':'\\ud83d\\ude00','max_tokens':1");
    stream *utf8 = job_run(tiny(), "'prompt':'\xf0\x9f\x98\x80','max_tokens':1");
    CHECK_NUM(json_num(stream_started(pair), "prompt_tokens"),
              json_num(stream_started(utf8), "prompt_tokens"), "tokens of an escaped emoji");
    s = job_run(tiny(), "'job_id':'\\u0061\\n\\\"\\\\%s','max_tokens':1", fresh_id());
    check_end(s, "MAX_TOKENS");
    CHECK_TEXT(json_str(stream_started(s), "job_id"), s->job_id, "an escaped job_id");
}

static void test_content_type(void) {
    static const struct { const char *line; int status; } rows[] = {
        {"Content-Type: application/json\r\n", 200},
        {"Content-Type: Application/JSON\r\n", 200},
        {"Content-Type: application/json; charset=utf-8\r\n", 200},
        {"Content-Type:application/json ;charset=UTF-8\r\n", 200},
        {"Content-Type: text/plain\r\n", 415},
        {"Content-Type: application/jsonl\r\n", 415},
        {"Content-Type: application/x-www-form-urlencoded\r\n", 415},
        {"Content-Type: \r\n", 415},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char *body = job_body(q("'max_tokens':1"));
        reply *r = http(tiny(), "POST", "/execute", rows[i].line, body);
        CHECK(r->status == rows[i].status, "%s: %d", rows[i].line, r->status);
        if (rows[i].status == 415)
            check_refused(r, 415, "UNSUPPORTED_MEDIA_TYPE", rows[i].line);
    }
    char *body = job_body("");
    char *bare = text("POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: %zu\r\n\r\n%s",
                      strlen(body), body);
    check_refused(http_bytes(tiny(), bare, strlen(bare)), 415, "UNSUPPORTED_MEDIA_TYPE", "none");
}

/* ==== Sampling ================================================================================ */

static char *sampled(const char *fields) {
    stream *s = job_run(tiny(), "'max_tokens':40,'ignore_eos':true,%s", q(fields));
    check_end(s, "MAX_TOKENS");
    return stream_text(s);
}

static void test_greedy(void) {
    char *first = sampled("'temperature':0,'seed':1");
    CHECK_TEXT(sampled("'temperature':0,'seed':1"), first, "the same job");
    CHECK_TEXT(sampled("'temperature':0,'seed':2"), first, "with another seed");
    CHECK_TEXT(sampled("'temperature':0.0,'top_k':5,'top_p':0.5"), first, "with filters");
    CHECK_TEXT(sampled("'top_k':1,'seed':3"), first, "with top_k 1");
    CHECK_TEXT(sampled("'top_p':0,'seed':4"), first, "with top_p 0");
    CHECK_TEXT(sampled("'min_p':1,'seed':5"), first, "with min_p 1");
}

static void test_seed(void) {
    char *one = sampled("'seed':1");
    CHECK_TEXT(sampled("'seed':1"), one, "the same seed");
    CHECK_TEXT(sampled("'seed':1,'temperature':1.0,'top_p':1,'top_k':0,'min_p':0,"
                       "'repetition_penalty':1,'stop':[]"), one, "with all defaults spelt out");
    CHECK(strcmp(sampled("'seed':2"), one), "another seed gives the same text");
    CHECK(strcmp(sampled("'seed':4294967297"), one), "only 32 bits of the seed count");
    CHECK(strcmp(sampled("'seed':1,'temperature':0.3"), one), "temperature has no effect");
    CHECK(strcmp(sampled("'seed':1,'top_k':2"), one), "top_k has no effect");
    CHECK(strcmp(sampled("'seed':1,'top_p':0.3"), one), "top_p has no effect");
    char *hot = sampled("'seed':1,'temperature':2");
    CHECK(strcmp(sampled("'seed':1,'temperature':2,'min_p':0.3"), hot), "min_p has no effect");
}

static void test_seed_reported(void) {
    stream *s = job_run(tiny(), "'max_tokens':30"), *again;
    const char *seed = json_raw(stream_started(s), "seed");
    CHECK(strtod(seed, NULL) < 9007199254740992.0, "seed %s", seed);
    CHECK_TEXT(json_raw(stream_last(s), "seed"), seed, "the seed in end");
    again = job_run(tiny(), "'max_tokens':30,'seed':%s", seed);
    CHECK_TEXT(stream_text(again), stream_text(s), "the text with the reported seed");
    stream *other = job_run(tiny(), "'max_tokens':1");
    CHECK(strcmp(json_raw(stream_started(other), "seed"), seed), "two jobs got the same seed");
    s = job_run(tiny(), "'max_tokens':1,'seed':18446744073709551615");
    CHECK_TEXT(json_raw(stream_started(s), "seed"), "18446744073709551615", "the largest seed");
}

static void test_repetition_penalty(void) {
    char *plain = sampled("'temperature':0");
    CHECK_TEXT(sampled("'temperature':0,'repetition_penalty':1.0"), plain, "penalty 1");
    CHECK(strcmp(sampled("'temperature':0,'repetition_penalty':2.0"), plain),
          "penalty 2 has no effect");
    CHECK(strcmp(sampled("'temperature':0,'repetition_penalty':0.05"), plain),
          "a reward for repetition has no effect");
}

/* ==== Stop sequences ========================================================================== */

static char *story(int max_tokens, const char *stop, const char *reason, const char *matched) {
    stream *s = job_run(tiny(), "'temperature':0,'max_tokens':%d,'stop':%s", max_tokens, stop);
    check_end(s, reason);
    if (matched) CHECK_TEXT(json_str(stream_last(s), "stop_sequence_matched"), matched, "matched");
    else CHECK(!json_has(stream_last(s), "stop_sequence_matched"), "%s", stream_last(s));
    return stream_text(s);
}

/* The beginning of `all` up to the first occurrence of `stop`. */
static char *until(const char *all, const char *stop) {
    const char *at = strstr(all, stop);
    return text_n(all, at ? (size_t)(at - all) : strlen(all));
}

static void test_stop(void) {
    stream *s = job_run(tiny(), "'temperature':0,'max_tokens':40");
    char *all = stream_text(s);
    size_t end = 0;
    REQUIRE(strlen(all) > 60, "the story is too short: %s", all);
    for (size_t i = 0; i < s->n && end + 4 < strlen(all); i++) {
        /* A sequence of the two characters on either side of where one event's text ends. */
        if (strcmp(s->events[i].type, "token")) continue;
        end += strlen(json_str(s->events[i].data, "t"));
        if (end < 2 || (unsigned char)all[end] >= 0x80) continue;
        char *stop = text_n(all + end - 2, 4);
        CHECK_TEXT(story(40, text("[%s]", json_quote(stop)), "STOP_SEQUENCE", stop),
                   until(all, stop), text("text before '%s'", stop));
    }
}

static void test_stop_long(void) {
    char *all = stream_text(job_run(tiny(), "'temperature':0,'max_tokens':40"));
    char *stop = text_n(all + 7, 30), *whole = text_n(all, 20);
    CHECK_TEXT(story(40, text("[%s]", json_quote(stop)), "STOP_SEQUENCE", stop),
               text_n(all, 7), "text before a sequence over many tokens");
    CHECK_TEXT(story(40, text("[%s]", json_quote(whole)), "STOP_SEQUENCE", whole), "",
               "text before a sequence at the very start");
}

static void test_stop_first_of_many(void) {
    char *all = stream_text(job_run(tiny(), "'temperature':0,'max_tokens':40"));
    char *early = text_n(all + 10, 5), *late = text_n(all + 30, 6);
    char *list = text("[\"@@@@\",%s,%s]", json_quote(late), json_quote(early));
    CHECK_TEXT(story(40, list, "STOP_SEQUENCE", early), until(all, early), "text");
}

/* Text that might become a stop sequence is held back, and comes when it does not. */
static void test_stop_held_back(void) {
    char *all = stream_text(job_run(tiny(), "'temperature':0,'max_tokens':40"));
    for (size_t at = 5; at < 35; at += 3) {
        char *stop = text("%.*s@@", 6, all + at);
        CHECK_TEXT(story(40, text("[%s]", json_quote(stop)), "MAX_TOKENS", NULL), all,
                   text("text with the stop '%s', which never comes", stop));
    }
    char *tail = text("%s@@", all + strlen(all) - 6);
    CHECK_TEXT(story(40, text("[%s]", json_quote(tail)), "MAX_TOKENS", NULL), all,
               "text that was still held back at the end");
}

/* ==== Resumption ============================================================================== */

/* The resumed stream holds exactly the events of the whole one from index n on. */
static void check_resumed(int port, const stream *whole, const char *fields, int n) {
    stream *s = job_run(port, "%s,'resume_from':%d", fields, n);
    int total = stream_tokens(whole), seen = 0;
    check_stream(s, n);
    CHECK_NUM(stream_tokens(s), total > n ? total - n : 0, text("tokens from %d on", n));
    for (size_t i = 0, j = 0; i < s->n; i++) {
        if (strcmp(s->events[i].type, "token")) continue;
        while (j < whole->n && (strcmp(whole->events[j].type, "token") ||
                                json_num(whole->events[j].data, "i") < n)) j++;
        REQUIRE(j < whole->n, "more tokens than before");
        CHECK_TEXT(s->events[i].data, whole->events[j].data, "a resumed token");
        j++;
        seen++;
    }
    CHECK_NUM(json_num(stream_last(s), "tokens_out"), total, "tokens_out");
    CHECK_TEXT(json_str(stream_last(s), "stop_reason"),
               json_str(stream_last(whole), "stop_reason"), "stop_reason");
}

static void test_resume(void) {
    static const char *const kinds[] = {
        "'temperature':0,'max_tokens':30", "'seed':7,'max_tokens':30,'ignore_eos':true",
        "'seed':8,'temperature':2,'max_tokens':30,'ignore_eos':true",
        "'seed':7,'temperature':0.8,'top_p':0.9,'repetition_penalty':1.3,'max_tokens':60",
        "'temperature':0,'max_tokens':40,'stop':['. ','@@']",
    };
    worker *other = ready_worker("--model", tiny_model(), "--threads", "1");
    for (size_t k = 0; k < COUNT(kinds); k++) {
        stream *whole = job_run(tiny(), "%s", q(kinds[k]));
        int n = stream_tokens(whole), from[] = {0, 1, n / 2, n - 1, n, n + 5};
        check_stream(whole, 0);
        for (size_t i = 0; i < COUNT(from); i++)
            check_resumed(i % 2 ? other->port : tiny(), whole, q(kinds[k]), from[i]);
    }
    worker_end(other);
}

/* A repeated beginning comes from the cache, but only within one cache_key; the text is the same. */
static void test_cache_key(void) {
    static const struct { const char *key; bool cached; } rows[] = {
        {"", false}, {"", true}, {",'cache_key':'a'", false}, {",'cache_key':'a'", true},
        {",'cache_key':'b'", false}, {"", true},
    };
    char *prompt = text("%s %s", fresh_id(), text_times("the fox and the kite ", 30)), *first = NULL;
    for (size_t i = 0; i < COUNT(rows); i++) {
        stream *s = job_run(tiny(), "'prompt':'%s','max_tokens':8,'temperature':0,'ignore_eos':true%s",
                            prompt, q(rows[i].key));
        check_end(s, "MAX_TOKENS");
        double cached = json_num(stream_last(s), "cached_tokens");
        double all = json_num(stream_last(s), "prompt_tokens");
        CHECK(rows[i].cached ? cached >= all - 65 && cached < all && cached > 0 : cached == 0,
              "row %zu: %g of %g tokens were cached", i, cached, all);
        if (!first) first = stream_text(s);
        CHECK_TEXT(stream_text(s), first, "the text");
    }
}

/* ==== Deadlines and time limits =============================================================== */

static char *in_ms(double ms) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return text("X-Deadline: %.0f\r\n", (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6 + ms);
}

/* Deadlines are judged by measured rates, which come in an idle moment after the start. */
static bool rates_known(int port) {
    double end = now_ms() + bound_ms(15000);
    while (now_ms() < end) {
        const char *h = health(port);
        if (json_type(h, "rates.prefill_tokens_per_sec") == 'n' &&
            json_type(h, "rates.decode_tokens_per_sec") == 'n') return true;
        nap_ms(20);
    }
    return false;
}

static double estimate_ms(int port, const char *fields) {
    reply *r = refused(port, job_body(q("%s,'deadline_ms':1", q(fields))));
    check_refused(r, 504, "DEADLINE_UNATTAINABLE", "one millisecond");
    return json_num(r->body.p, "error.details.estimated_ms");
}

static void test_deadline_refused(void) {
    REQUIRE(rates_known(tiny()), "no rates in %s", health(tiny()));
    double before = metric(tiny(), "worker_deadline_refused_total", "");
    CHECK(estimate_ms(tiny(), "'max_tokens':400") > 1, "no estimated_ms");
    reply *r = http(tiny(), "POST", "/execute", in_ms(-1000), job_body(q("'max_tokens':9")));
    check_refused(r, 504, "DEADLINE_UNATTAINABLE", "a deadline in the past");
    CHECK(json_num(r->body.p, "error.details.estimated_ms") >= 0, "%s", r->body.p);
    CHECK_NUM(metric(tiny(), "worker_deadline_refused_total", ""), before + 2, "refusals counted");
}

static void test_deadline_met(void) {
    REQUIRE(rates_known(tiny()), "no rates in %s", health(tiny()));
    stream *s = execute(tiny(), "/execute", in_ms(60000), job_body(q("'max_tokens':5")));
    stream_finish(s, bound_ms(5000));
    check_end(s, "MAX_TOKENS");
    check_end(job_run(tiny(), "'max_tokens':5,'deadline_ms':60000"), "MAX_TOKENS");
}

static void test_bad_deadline_header(void) {
    static const char *const values[] = {"soon", "-5", "1e99", "12x", ""};
    for (size_t i = 0; i < COUNT(values); i++) {
        reply *r = http(tiny(), "POST", "/execute", text("X-Deadline: %s\r\n", values[i]),
                        job_body(q("'max_tokens':1")));
        check_refused(r, 400, "INVALID_REQUEST", text("X-Deadline: %s", values[i]));
    }
}

/* Holds the worker still, from the moment when a job has started until its time is over: so the
 * job is late however fast the machine is. */
static void overrun(worker *w, const char *fields, const char *headers, double late_ms) {
    for (int attempt = 0; attempt < 3; attempt++) {
        stream *s = execute(w->port, "/execute", headers, job_body(q(fields)));
        REQUIRE(stream_event(s, "started", bound_ms(5000)), "not started: %s", s->r->body.p);
        kill(w->pid, SIGSTOP);
        nap_ms((int)late_ms);
        kill(w->pid, SIGCONT);
        stream_finish(s, bound_ms(5000));
        check_stream(s, 0);
        if (!strcmp(s->events[s->n - 1].type, "end") && attempt < 2) continue;
        CHECK_TEXT(stream_code(s), "INFERENCE_TIMEOUT", stream_last(s));
        CHECK_TEXT(json_raw(stream_last(s), "retriable"), "false", "retriable");
        return;
    }
}

static void test_deadline_missed(void) {
    REQUIRE(rates_known(tiny()), "no rates in %s", health(tiny()));
    double timeouts = metric(tiny(), "worker_requests_total", "outcome=\"timeout\"");
    double ms = 3 * estimate_ms(tiny(), "'ignore_eos':true,'max_tokens':500") + 300;
    REQUIRE(ms < 60000, "the estimate is %.0f ms", ms);
    overrun(tiny_worker, text("'ignore_eos':true,'max_tokens':500,'deadline_ms':%.0f", ms), "",
            ms + 100);
    overrun(tiny_worker, "'ignore_eos':true,'max_tokens':500", in_ms(ms), ms + 100);
    CHECK(metric(tiny(), "worker_requests_total", "outcome=\"timeout\"") >= timeouts + 2,
          "timeouts are not counted");
}

static void test_inference_timeout(void) {
    NEED_SLOW_MODEL();
    int seconds = bound_ms(1000) / 1000;
    worker *w = ready_worker("--model", slow_model(), "--inference-timeout-sec",
                             text("%d", seconds), "--max-tokens-out", "16000");
    check_end(job_run(w->port, "'max_tokens':1,'ignore_eos':true"), "MAX_TOKENS");
    stream *s = job(w->port, "%s", q(LONG_JOB));
    stream_finish(s, bound_ms(5000));
    double took = s->r->done_at - s->sent_at;
    check_stream(s, 0);
    CHECK_TEXT(stream_code(s), "INFERENCE_TIMEOUT", stream_last(s));
    CHECK_TEXT(json_raw(stream_last(s), "retriable"), "false", "retriable");
    CHECK(took > seconds * 950 && took < bound_ms(2000), "after %.0f ms", took);
    worker_end(w);
}

/* ==== Several jobs ============================================================================ */

static void test_turns(void) {
    NEED_SLOW_MODEL();
    stream *s[3];
    for (int i = 0; i < 3; i++) s[i] = job(slow(), LONG_JOB);
    for (int i = 0; i < 3; i++)
        CHECK(stream_wait(s[i], 5, bound_ms(20000)), "job %d makes no progress", i);
    for (int i = 0; i < 3; i++)
        CHECK(!stream_over(s[i]), "job %d ended too early: %s", i, stream_last(s[i]));
    CHECK_NUM(json_num(health(slow()), "jobs.running"), 3, "jobs.running");
    for (int i = 0; i < 3; i++) cancel(slow(), s[i]->job_id);
    for (int i = 0; i < 3; i++) stream_finish(s[i], bound_ms(5000));
}

static void test_busy(void) {
    NEED_SLOW_MODEL();
    int port = narrow();
    double rejected = metric(port, "worker_requests_total", "outcome=\"rejected\"");
    stream *running = job(port, LONG_JOB), *queued;
    CHECK(stream_wait(running, 1, bound_ms(10000)), "no token: %s", running->r->body.p);
    queued = job(port, LONG_JOB);
    CHECK(stream_event(queued, "started", bound_ms(1000)), "a queued job is not told so at once");
    CHECK_NUM(json_num(health(port), "jobs.running"), 1, "jobs.running");
    CHECK_NUM(json_num(health(port), "jobs.queued"), 1, "jobs.queued");
    CHECK_NUM(metric(port, "worker_jobs_queued", ""), 1, "worker_jobs_queued");
    reply *r = refused(port, job_body(q(LONG_JOB)));
    check_refused(r, 503, "ALL_SLOTS_BUSY", "a third job");
    const char *after = reply_header(r, "Retry-After");
    CHECK(after && atoi(after) > 0 && !after[strspn(after, "0123456789")], "Retry-After %s", after);
    CHECK_NUM(metric(port, "worker_requests_total", "outcome=\"rejected\""), rejected + 1,
              "rejections");
    CHECK(stream_tokens(queued) == 0, "the queued job runs");
    cancel(port, running->job_id);
    CHECK(stream_wait(queued, 1, bound_ms(5000)), "the queued job does not follow");
    cancel(port, queued->job_id);
    CHECK(stream_finish(queued, bound_ms(5000)), "the queued job does not end");
}

static void test_job_exists(void) {
    NEED_SLOW_MODEL();
    stream *running = job(narrow(), LONG_JOB), *queued;
    stream_event(running, "started", bound_ms(5000));
    queued = job(narrow(), LONG_JOB);
    stream_event(queued, "started", bound_ms(5000));
    const char *ids[] = {running->job_id, queued->job_id};
    for (int i = 0; i < 2; i++)
        check_refused(refused(narrow(), q("{'job_id':'%s','prompt':'x'}", ids[i])), 409,
                      "JOB_EXISTS", i ? "a queued job" : "a running job");
    cancel(narrow(), queued->job_id);
    cancel(narrow(), running->job_id);
    stream_finish(queued, bound_ms(5000));
    stream_finish(running, bound_ms(5000));
}

/* A job runs at most once, unless it is resumed: whoever repeats a request learns how it ended. */
static void test_job_id_again(void) {
    const char *id = fresh_id();
    check_end(job_run(tiny(), "'job_id':'%s','max_tokens':2,'seed':1,'ignore_eos':true", id),
              "MAX_TOKENS");
    reply *r = refused(tiny(), q("{'job_id':'%s','prompt':'x'}", id));
    check_refused(r, 409, "JOB_EXISTS", "a finished job");
    CHECK_TEXT(json_str(r->body.p, "error.details.outcome"), "success", "outcome");
    CHECK_NUM(json_num(r->body.p, "error.details.tokens_out"), 2, "tokens_out");
    check_end(job_run(tiny(), "'job_id':'%s','max_tokens':2,'seed':1,'ignore_eos':true,"
                      "'resume_from':0", id), "MAX_TOKENS");
}

static void test_pings(void) {
    NEED_SLOW_MODEL();
    stream *s = job(narrow(), LONG_JOB ",'prompt':'%s'", long_prompt());
    double end = now_ms() + bound_ms(3000);
    while (s->pings < 3 && now_ms() < end && !stream_over(s)) stream_pump(s, 50);
    CHECK(s->pings >= 3, "%d pings and %d tokens", s->pings, stream_tokens(s));
    CHECK(strstr(s->r->body.p, "\n\n: ping\n\n"), "a ping is not a comment block: %s",
          s->r->body.p);
    stream *queued = job(narrow(), LONG_JOB);
    end = now_ms() + bound_ms(3000);
    while (queued->pings < 2 && now_ms() < end && !stream_over(queued)) stream_pump(queued, 50);
    CHECK(queued->pings >= 2, "%d pings in the queue", queued->pings);
    cancel(narrow(), queued->job_id);
    cancel(narrow(), s->job_id);
    stream_finish(queued, bound_ms(5000));
    stream_finish(s, bound_ms(5000));
}

/* ==== Cancelling ============================================================================== */

static void check_cancelled(stream *s, const char *when) {
    CHECK(stream_finish(s, bound_ms(5000)), "%s: the stream does not end", when);
    check_stream(s, 0);
    CHECK(!strcmp(stream_code(s), "CANCELLED"), "%s: %s", when, stream_last(s));
    CHECK(!strcmp(json_raw(stream_last(s), "retriable"), "false"), "%s: retriable", when);
    CHECK(json_type(stream_last(s), "message") == 's', "%s: no message", when);
    CHECK(!strcmp(json_str(stream_last(s), "correlation_id"),
                  json_str(stream_started(s), "correlation_id")), "%s: correlation_id", when);
}

static void check_cancel_reply(const reply *r, const char *id, const char *status) {
    CHECK(r->status == 202, "status %d: %s", r->status, r->body.p);
    CHECK_TEXT(json_str(r->body.p, "job_id"), id, "job_id");
    if (status) CHECK_TEXT(json_str(r->body.p, "status"), status, "status");
}

static void test_cancel_before_execute(void) {
    const char *id = fresh_id();
    check_cancel_reply(cancel(tiny(), id), id, NULL);
    stream *s = job_run(tiny(), "'job_id':'%s','max_tokens':5", id);
    check_cancelled(s, "before it arrived");
    CHECK_NUM(stream_tokens(s), 0, "tokens");
}

/* Cancels one job and gives the time from sending the request to the end of the job's stream. */
static double cancel_latency(stream *s, int port) {
    double sent = now_ms();
    check_cancel_reply(cancel(port, s->job_id), s->job_id, "cancelling");
    check_cancelled(s, "running");
    return s->r->done_at - sent;
}

/* The contract allows 100 ms. The median of three is taken, as the machine may have other work. */
static void check_latency(const double *ms, const char *when) {
    double low = ms[0], high = ms[0];
    for (int i = 1; i < 3; i++) {
        low = ms[i] < low ? ms[i] : low;
        high = ms[i] > high ? ms[i] : high;
    }
    double median = ms[0] + ms[1] + ms[2] - low - high;
    CHECK(median <= bound_ms(100), "%s: %.0f, %.0f and %.0f ms", when, ms[0], ms[1], ms[2]);
    CHECK(high <= bound_ms(1000), "%s: %.0f ms", when, high);
}

static void test_cancel_in_prefill(void) {
    NEED_SLOW_MODEL();
    double ms[3];
    for (int i = 0; i < 3; i++) {
        stream *s = job(slow(), LONG_JOB ",'prompt':'%d %s'", i, long_prompt());
        REQUIRE(stream_event(s, "started", bound_ms(5000)), "not started: %s", s->r->body.p);
        nap_ms(60 + 50 * i);
        ms[i] = cancel_latency(s, slow());
        CHECK_NUM(stream_tokens(s), 0, "tokens");
        CHECK(health_wait(slow(), "jobs.running", 0, bound_ms(100)), "still running");
    }
    check_latency(ms, "in prefill");
}

static void test_cancel_in_decode(void) {
    NEED_SLOW_MODEL();
    double ms[3];
    for (int i = 0; i < 3; i++) {
        stream *s = job(slow(), LONG_JOB);
        REQUIRE(stream_wait(s, 3, bound_ms(10000)), "no tokens: %s", s->r->body.p);
        ms[i] = cancel_latency(s, slow());
        CHECK(health_wait(slow(), "jobs.running", 0, bound_ms(100)), "still running");
    }
    check_latency(ms, "in decode");
}

static void test_cancel_in_queue(void) {
    NEED_SLOW_MODEL();
    double ms[3];
    stream *running = job(narrow(), LONG_JOB);
    REQUIRE(stream_wait(running, 1, bound_ms(10000)), "no token: %s", running->r->body.p);
    for (int i = 0; i < 3; i++) {
        stream *s = job(narrow(), LONG_JOB);
        REQUIRE(stream_event(s, "started", bound_ms(5000)), "not started: %s", s->r->body.p);
        ms[i] = cancel_latency(s, narrow());
        CHECK_NUM(stream_tokens(s), 0, "tokens");
        CHECK(health_wait(narrow(), "jobs.queued", 0, bound_ms(100)), "still queued");
    }
    check_latency(ms, "in the queue");
    int before = stream_tokens(running);
    CHECK(stream_wait(running, before + 2, bound_ms(5000)), "the running job stopped as well");
    cancel(narrow(), running->job_id);
    check_cancelled(running, "at the end");
}

static void test_cancel_twice(void) {
    NEED_SLOW_MODEL();
    stream *s = job(slow(), LONG_JOB);
    REQUIRE(stream_wait(s, 1, bound_ms(10000)), "no token: %s", s->r->body.p);
    char *one = request(slow(), "POST", "/cancel", "", text("{\"job_id\":\"%s\"}", s->job_id));
    conn *c = conn_open(slow());
    conn_text(c, text("%s%s", one, one));
    check_cancel_reply(reply_read(c), s->job_id, "cancelling");
    check_cancel_reply(reply_read(c), s->job_id, NULL);
    check_cancelled(s, "cancelled twice");
    check_cancel_reply(cancel(slow(), s->job_id), s->job_id, "cancelled");
}

static void test_cancel_after_end(void) {
    stream *s = job_run(tiny(), "'max_tokens':3");
    check_end(s, "MAX_TOKENS");
    check_cancel_reply(cancel(tiny(), s->job_id), s->job_id, "cancelled");
}

static void test_cancel_unknown(void) {
    const char *id = fresh_id();
    for (int i = 0; i < 3; i++) check_cancel_reply(cancel(tiny(), id), id, NULL);
}

static void test_cancel_by_path(void) {
    static const struct { const char *path, *id; } rows[] = {
        {"plain", "plain"}, {"a%2Fb%20c%25", "a/b c%"}, {"%C3%A9", "\xc3\xa9"},
        {"a%2fb", "a/b"}, {"a+b", "a+b"}, {"%22q%22%0A", "\"q\"\n"}, {"a%3Fb", "a?b"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char *path = text("/cancel/%s%s", fresh_id(), rows[i].path);
        char *id = text("%.*s%s", (int)(strlen(path) - 8 - strlen(rows[i].path)), path + 8,
                        rows[i].id);
        check_cancel_reply(http(tiny(), "POST", path, "", NULL), id, NULL);
        stream *s = job_run(tiny(), "'job_id':%s,'max_tokens':5", json_quote(id));
        check_cancelled(s, rows[i].path);
    }
    static const char *const bad[] = {"/cancel/%", "/cancel/%4", "/cancel/%zz", "/cancel/%ff"};
    for (size_t i = 0; i < COUNT(bad); i++)
        check_refused(http(tiny(), "POST", bad[i], "", NULL), 400, "INVALID_REQUEST", bad[i]);
}

static void test_cancel_bad_body(void) {
    static const char *const bodies[] = {"", "{", "[]", "{}", "{\"job_id\":7}", "\"x\"",
                                         "{\"job_id\":\"\"}", "{\"job_id\":null}"};
    for (size_t i = 0; i < COUNT(bodies); i++)
        check_refused(post(tiny(), "/cancel", bodies[i]), 400, "INVALID_REQUEST", bodies[i]);
    char *most = text_times("c", 256);
    check_cancel_reply(cancel(tiny(), most), most, NULL);
    check_refused(cancel(tiny(), text("%sc", most)), 400, "INVALID_REQUEST", "257 bytes");
}

static void test_cancel_spares_others(void) {
    NEED_SLOW_MODEL();
    char *fields = text("'temperature':0,'max_tokens':%d,'ignore_eos':true",
                        tokens_in(slow(), 500));
    stream *alone = job_run(slow(), "%s", q(fields));
    check_end(alone, "MAX_TOKENS");
    stream *kept = job(slow(), "%s", q(fields)), *dropped = job(slow(), LONG_JOB),
           *prefill = job(slow(), LONG_JOB ",'prompt':'%s'", long_prompt());
    CHECK(stream_wait(kept, 1, bound_ms(10000)), "no token: %s", kept->r->body.p);
    cancel(slow(), prefill->job_id);
    CHECK(stream_wait(kept, 3, bound_ms(10000)), "no token: %s", kept->r->body.p);
    cancel(slow(), dropped->job_id);
    check_cancelled(prefill, "the one in prefill");
    check_cancelled(dropped, "the one in decode");
    stream_finish(kept, bound_ms(20000));
    check_end(kept, "MAX_TOKENS");
    CHECK_TEXT(stream_text(kept), stream_text(alone), "the text of the other job");
}

static void test_cancelled_is_counted(void) {
    NEED_SLOW_MODEL();
    const char *label = "outcome=\"cancelled\"";
    double before = metric(slow(), "worker_requests_total", label);
    double observed = metric(slow(), "worker_cancel_seconds_count", "");
    stream *s = job(slow(), LONG_JOB);
    stream_wait(s, 1, bound_ms(10000));
    cancel(slow(), s->job_id);
    check_cancelled(s, "running");
    nap_ms(20);
    CHECK_NUM(metric(slow(), "worker_requests_total", label), before + 1, "cancelled jobs");
    CHECK_NUM(metric(slow(), "worker_cancel_seconds_count", ""), observed + 1, "latencies");
}

/* ==== Clients that go away ==================================================================== */

typedef void (*leave)(conn *c);

/* Leaves a job in some state and measures how long it still occupies the worker. */
static void check_disconnect(int port, const char *where, const char *count, stream *s, leave go) {
    double ms, left = now_ms();
    go(s->c);
    bool freed = health_wait(port, count, 0, bound_ms(2000));
    ms = now_ms() - left;
    CHECK(freed, "%s: the job goes on without its client", where);
    CHECK(!freed || ms <= bound_ms(100) + 50, "%s: freed after %.0f ms", where, ms);
}

static void test_disconnect(void) {
    NEED_SLOW_MODEL();
    static const struct { const char *name; leave go; } ways[] = {
        {"closed", conn_close}, {"reset", conn_abort},
    };
    for (size_t i = 0; i < COUNT(ways); i++) {
        stream *s = job(slow(), LONG_JOB);
        REQUIRE(stream_wait(s, 2, bound_ms(10000)), "no token: %s", s->r->body.p);
        check_disconnect(slow(), text("%s in decode", ways[i].name), "jobs.running", s,
                         ways[i].go);
        s = job(slow(), LONG_JOB ",'prompt':'%zu %s'", i, long_prompt());
        REQUIRE(stream_event(s, "started", bound_ms(5000)), "not started: %s", s->r->body.p);
        nap_ms(50);
        check_disconnect(slow(), text("%s in prefill", ways[i].name), "jobs.running", s,
                         ways[i].go);
    }
}

static void test_disconnect_in_queue(void) {
    NEED_SLOW_MODEL();
    stream *running = job(narrow(), LONG_JOB);
    REQUIRE(stream_wait(running, 1, bound_ms(10000)), "no token: %s", running->r->body.p);
    stream *s = job(narrow(), LONG_JOB);
    REQUIRE(stream_event(s, "started", bound_ms(5000)), "not started: %s", s->r->body.p);
    check_disconnect(narrow(), "closed in the queue", "jobs.queued", s, conn_close);
    int before = stream_tokens(running);
    CHECK(stream_wait(running, before + 2, bound_ms(5000)), "the running job stopped as well");
    check_disconnect(narrow(), "closed at last", "jobs.running", running, conn_close);
}

static void test_half_close(void) {
    NEED_SLOW_MODEL();
    int n = tokens_in(slow(), 500);
    stream *s = job(slow(), "'max_tokens':%d,'ignore_eos':true,'temperature':0", n);
    REQUIRE(stream_wait(s, 2, bound_ms(10000)), "no token: %s", s->r->body.p);
    int before = s->pings;
    shutdown(s->c->fd, SHUT_WR);
    stream_finish(s, bound_ms(20000));
    check_end(s, "MAX_TOKENS");
    CHECK_NUM(stream_tokens(s), n, "tokens after a half-close");
    CHECK(s->pings > before, "no ping was sent to tell a half-close from a close");
    s = job(tiny(), "'max_tokens':6,'ignore_eos':true");
    shutdown(s->c->fd, SHUT_WR);
    stream_finish(s, bound_ms(5000));
    check_end(s, "MAX_TOKENS");
}

/* ==== Correlation ============================================================================= */

static void check_correlation(const char *sent, const char *got, bool kept) {
    REQUIRE(got, "no X-Correlation-Id");
    if (kept) CHECK_TEXT(got, sent, "the correlation id");
    else CHECK(is_uuid4(got), "'%s' was replaced by '%s', which is no UUIDv4", sent, got);
}

static void test_correlation(void) {
    const char *most = text_times("c", 64);
    const struct { const char *sent; bool kept; } rows[] = {
        {"abc-123-XYZ", true}, {"-", true}, {most, true}, {text("%sc", most), false},
        {"a b", false}, {"a_b", false}, {"\xc3\xa9", false}, {"a;b", false}, {"", false},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        char *header = text("X-Correlation-Id: %s\r\n", rows[i].sent);
        stream *s = execute(tiny(), "/execute", header, job_body(q("'max_tokens':1")));
        stream_finish(s, bound_ms(5000));
        char *got = reply_header(s->r, "X-Correlation-Id");
        check_correlation(rows[i].sent, got, rows[i].kept);
        CHECK_TEXT(json_str(stream_started(s), "correlation_id"), got ? got : "", "in started");
        reply *r = http(tiny(), "POST", "/execute", header, "{}");
        got = reply_header(r, "X-Correlation-Id");
        check_correlation(rows[i].sent, got, rows[i].kept);
        CHECK_TEXT(json_str(r->body.p, "error.correlation_id"), got ? got : "", "in the error");
    }
    char *a = reply_header(get(tiny(), "/health"), "X-Correlation-Id");
    char *b = reply_header(get(tiny(), "/nowhere"), "X-Correlation-Id");
    REQUIRE(a && b, "no X-Correlation-Id");
    CHECK(is_uuid4(a) && is_uuid4(b) && strcmp(a, b), "fresh ids are '%s' and '%s'", a, b);
}

static void test_shared_end(void) {
    worker_end(tiny_worker);
    worker_end(slow_worker);
    worker_end(narrow_worker);
    tiny_worker = slow_worker = narrow_worker = NULL;
}

static const test tests[] = {
    {"started has all its fields [SYS-5.4.1] [M0-W-1300] [M0-W-1312]", test_started},
    {"token and end have all their fields [M0-W-1310] [M0-W-1312]", test_tokens_and_end},
    {"each event is one data line and a blank line [M0-W-1310]", test_blocks},
    {"?sse=named adds event: and id: lines [M0-W-1310]", test_named_events},
    {"stream headers [SYS-5.4.1]", test_stream_headers},
    {"metrics events come every 500 ms [M0-W-1310] [M0-W-1311]", test_metrics_events},
    {"an end-of-generation token ends a job; ignore_eos [M0-W-1311]", test_end_of_generation},
    {"--max-tokens-out is limit and default of max_tokens [M0-W-1300]", test_max_tokens_out},
    {"--max-tokens-in limits prompts [M0-W-1302]", test_max_tokens_in},
    {"the context limits prompt and output [M0-W-1302] [SYS-5.5.1]", test_context_limit},
    {"no code point is split across events [M0-W-1312]", test_utf8},
    {"control tokens in a prompt are plain text [M0-W-1300]", test_control_tokens_are_text},
    {"number and boolean fields, both sides of each limit [M0-W-1302]", test_number_fields},
    {"job_id, both sides of each limit [M0-W-1302]", test_job_id_field},
    {"prompt, both sides of each limit [M0-W-1302]", test_prompt_field},
    {"stop, both sides of each limit [M0-W-1302]", test_stop_field},
    {"a flood of wrong fields gets a short answer [M0-W-1302]", test_error_flood},
    {"extreme parameters make no nonsense [M0-W-1300]", test_extreme_parameters},
    {"a job before the rates are known leaves them usable [SYS-7.3]", test_early_job},
    {"all field errors are answered together [M0-W-1302] [SYS-5.5.1]", test_errors_together},
    {"a field error is worded as the contract has it [SYS-5.5.1]", test_error_wording},
    {"no error shows a prompt [SYS-5.5.1]", test_no_prompt_in_errors},
    {"bodies that are no JSON object are refused [M0-W-1302]", test_bad_bodies},
    {"{} is refused with its field errors [M0-W-1302]", test_empty_object},
    {"JSON may be 64 levels deep [M0-W-1302]", test_depth},
    {"unknown fields are ignored [M0-W-1300]", test_unknown_fields},
    {"escapes in strings [M0-W-1300]", test_string_escapes},
    {"only application/json is taken, else 415 [SYS-5.5.1]", test_content_type},
    {"temperature 0 is greedy, as are top_k 1, top_p 0, min_p 1 [M0-W-1300]", test_greedy},
    {"the seed decides; every parameter has an effect [SYS-5.4.1]", test_seed},
    {"a generated seed is reported and reproduces the text [SYS-5.4.1]", test_seed_reported},
    {"repetition_penalty [M0-W-1300]", test_repetition_penalty},
    {"stop sequences across tokens are matched and not emitted [M0-W-1422]", test_stop},
    {"a stop sequence over many tokens [M0-W-1422]", test_stop_long},
    {"of several stop sequences the first in the text wins [M0-W-1422]", test_stop_first_of_many},
    {"text held back for a stop sequence comes when it fails [M0-W-1422]", test_stop_held_back},
    {"resume_from continues a stream on any worker [SYS-7.3] [SYS-7.5]", test_resume},
    {"beginnings are cached within one cache_key [SYS-7.5]", test_cache_key},
    {"an unattainable deadline is refused at once [SYS-7.3]", test_deadline_refused},
    {"an attainable deadline is met [SYS-7.3]", test_deadline_met},
    {"a malformed X-Deadline is refused [SYS-5.5.1]", test_bad_deadline_header},
    {"a job past its deadline ends with INFERENCE_TIMEOUT [SYS-7.3]", test_deadline_missed},
    {"--inference-timeout-sec ends a job [SYS-7.3]", test_inference_timeout},
    {"several jobs make progress in turns [M0-W-1301]", test_turns},
    {"a full queue answers 503 with Retry-After [M0-W-1301] [SYS-5.5.1]", test_busy},
    {"a job_id that is in use is refused with 409 [SYS-5.4.1]", test_job_exists},
    {"a finished job is not run again unless resumed [SYS-5.4.1]", test_job_id_again},
    {"pings in prefill and queue [M0-W-1310]", test_pings},
    {"cancel may overtake execute [SYS-5.4.2] [M0-W-1330]", test_cancel_before_execute},
    {"cancel in prefill takes effect within 100 ms [SYS-6.3.5]", test_cancel_in_prefill},
    {"cancel in decode takes effect within 100 ms [SYS-6.3.5]", test_cancel_in_decode},
    {"cancel in the queue takes effect within 100 ms [SYS-6.3.5]", test_cancel_in_queue},
    {"cancel twice [SYS-5.4.2] [M0-W-1330]", test_cancel_twice},
    {"cancel after the end [SYS-5.4.2] [M0-W-1330]", test_cancel_after_end},
    {"cancel of an unknown job [SYS-5.4.2] [M0-W-1330]", test_cancel_unknown},
    {"cancel by path, percent-decoded [SYS-5.4.2]", test_cancel_by_path},
    {"cancel with a bad body [M0-W-1330]", test_cancel_bad_body},
    {"cancelling one job does not disturb another [SYS-6.3.5]", test_cancel_spares_others},
    {"cancelled jobs are counted [M0-W-1350]", test_cancelled_is_counted},
    {"a client that leaves frees its job [SYS-5.4.1]", test_disconnect},
    {"a client that leaves the queue frees its place [SYS-5.4.1]", test_disconnect_in_queue},
    {"a half-close does not cancel [SYS-5.4.1]", test_half_close},
    {"correlation ids are kept or replaced, and echoed [SYS-5.6.1]", test_correlation},
    {"the shared workers end with 0 [SYS-7.2]", test_shared_end},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
