/* contract.c: the worker as a process, as the pool manager sees it. MIT licence.
 *
 * Flags, environment and config file; start order and ready callback; exit codes; shutdown;
 * /health and /metrics; logs; authentication. The number in brackets in a test's name is the
 * system specification's requirement that it holds lorch to. Jobs are tested by execute.c, HTTP
 * and JSON syntax by wire.c. */
#include "harness.h"

static worker *shared_worker, *slow_worker;

/* The worker of all tests that need no special flags. */
static int shared(void) {
    if (!shared_worker)
        shared_worker = ready_worker("--model", tiny_model(), "--worker-id", "w-shared");
    return shared_worker->port;
}

/* A worker whose jobs last, for tests of what else it does meanwhile. */
static int busy(void) {
    if (!slow_worker)
        slow_worker = ready_worker("--model", slow_model(), "--max-tokens-out", "16000");
    return slow_worker->port;
}

#define LONG_JOB "'max_tokens':16000,'ignore_eos':true"

/* ==== Command line, environment, config file ================================================== */

/* Starts a worker that must end at once; gives its exit code. */
static int failing(worker *w) { return worker_exit(w, bound_ms(10000)); }

static int lines_in(const char *s) {
    int n = 0;
    for (; (s = strchr(s, '\n')); s++) n++;
    return n;
}

static char *lower(const char *s) {
    char *copy = text("%s", s);
    for (char *p = copy; *p; p++) *p = (char)tolower((unsigned char)*p);
    return copy;
}

/* One line on stderr that names the flag (or, in capitals, its variable), and exit code 2. */
static void check_usage_error(worker *w, const char *name, const char *what) {
    int code = failing(w);
    char *log = worker_log(w);
    CHECK(code == 2, "%s: exit code %d, not 2: %s", what, code, log);
    CHECK(lines_in(log) == 1, "%s: %d lines: %s", what, lines_in(log), log);
    CHECK(strstr(lower(log), lower(name)), "%s: '%s' is not named: %s", what, name, log);
    CHECK(!*worker_out(w), "%s: stdout has %s", what, worker_out(w));
    worker_drop(w);
}

static void test_bad_flags(void) {
    static const struct { const char *flag, *value; } rows[] = {
        {"--bogus", NULL}, {"--port", "70000"}, {"--port", "-1"}, {"--port", "http"},
        {"--port", "80x"}, {"--port", ""}, {"--port", NULL}, {"--parallel", "0"},
        {"--parallel", "-2"}, {"--queue", "-1"}, {"--queue", "many"}, {"--threads", "x"},
        {"--context", "-5"}, {"--context", "1e3"}, {"--max-tokens-out", "0"},
        {"--inference-timeout-sec", "soon"}, {"--inference-timeout-sec", "-1"},
        {"--kv-cache-size-mb", "-1"},
        {"--kv-cache-size-mb", "99999999999999999999"}, {"--drain-timeout", "x"},
        {"--sse-ping-ms", "x"}, {"--kv-type", "q9"}, {"--log-format", "xml"},
        {"--log-level", "LOUD"}, {"--host", "no.such.address.invalid"}, {"--worker-id", ""},
        {"--config", "/nonexistent/lorch.yaml"}, {"--api-token-file", "/nonexistent/token"},
        {"--callback-url", "https://127.0.0.1:1/ready"}, {"--callback-url", "ftp://h/"},
        {"--callback-url", "http://"}, {"--callback-url", "http:///path"},
        {"--callback-url", "http://h:99999/"}, {"--callback-url", "http://h:x/"},
        {"--callback-url", "nonsense"}, {"--callback-url", "http://a b/"},
        {"--callback-url", "http://h/\r\nX: y"},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        const char *args[] = {"--model", tiny_model(), rows[i].flag, rows[i].value, NULL};
        check_usage_error(worker_start(args), rows[i].flag,
                          text("%s %s", rows[i].flag, rows[i].value ? rows[i].value : ""));
    }
    check_usage_error(start("--port", "0"), "model", "no model");
    worker *w = start("--model", tiny_model(), "--callback-url", "https://127.0.0.1:1/ready");
    failing(w);
    CHECK(strstr(worker_log(w), "https"), "the message does not say why: %s", worker_log(w));
    worker_drop(w);
}

static void test_bad_environment(void) {
    check_usage_error(start("LLORCH_PORT=x", "--model", tiny_model()), "PORT", "LLORCH_PORT");
    check_usage_error(start("LLORCH_PARALLEL=0", "--model", tiny_model()), "PARALLEL",
                      "LLORCH_PARALLEL");
    const char *const files[] = {"colour: red\n", "port: x\n", "port 80\n", "  port: [80]\n"};
    const char *const names[] = {"colour", "port", "port", "port"};
    for (size_t i = 0; i < COUNT(files); i++) {
        char *path = temp_file("bad.yaml", files[i], strlen(files[i]));
        check_usage_error(start("--config", path, "--model", tiny_model()), names[i], files[i]);
        remove(path);
    }
    char *large = memset(mem(65536), '#', 65535), *path = temp_file("large.yaml", large, 65535);
    check_usage_error(start("--config", path, "--model", tiny_model()), "64 KiB", "a large file");
    remove(path);
}

static void test_help_and_version(void) {
    static const char *const flags[] = {
        "--worker-id", "--model", "--model-ref", "--port", "--host", "--callback-url",
        "--max-tokens-in", "--max-tokens-out", "--inference-timeout-sec", "--kv-cache-size-mb",
        "--parallel", "--queue", "--context", "--threads", "--config", "--gpu-device", "--version",
        "--help", "--drain-timeout", "--advertise-uri", "--exit-with-parent", "--lazy",
        "--spawn-token", "--sse-ping-ms", "--api-token-file", "--insecure", "--log-format",
        "--log-level", "--kv-type", "--header-timeout-ms", "--body-timeout-ms",
        "--idle-timeout-ms", "--pre",
    };
    worker *w = start("--help");
    CHECK_NUM(failing(w), 0, "exit code of --help");
    for (size_t i = 0; i < COUNT(flags); i++)
        CHECK(strstr(worker_out(w), flags[i]), "--help does not mention %s", flags[i]);
    worker_drop(w);
    w = start("--version");
    CHECK_NUM(failing(w), 0, "exit code of --version");
    CHECK(strstr(worker_out(w), "lorch") && lines_in(worker_out(w)) == 1, "--version prints %s",
          worker_out(w));
    worker_drop(w);
}

/* Command line over environment over file over default, each shown by a setting of its own. */
static void test_precedence(void) {
    static const char file[] = "# a comment\nworker-id: from-file\nmodel-ref: \"from-file\"\n"
                               "queue: 9   # nine\r\n\nparallel: 3";
    char *path = temp_file("good.yaml", file, strlen(file));
    worker *w = ready_worker("LLORCH_WORKER_ID=from-env", "LLORCH_MODEL_REF=from-env",
                             "LLORCH_QUEUE=7", text("LLORCH_CONFIG=%s", path), "--worker-id",
                             "from-flag", "--model", tiny_model());
    const char *h = health(w->port);
    CHECK_TEXT(json_str(h, "worker_id"), "from-flag", "worker_id (all three)");
    CHECK_TEXT(json_str(h, "model_ref"), "from-env", "model_ref (environment and file)");
    CHECK_NUM(json_num(h, "jobs.queue"), 7, "queue (environment and file)");
    CHECK_NUM(json_num(h, "jobs.parallel"), 3, "parallel (file only)");
    worker_end(w);
    w = ready_worker(text("LLORCH_MODEL=%s", tiny_model()), "--config", path);
    h = health(w->port);
    CHECK_TEXT(json_str(h, "worker_id"), "from-file", "worker_id (file only)");
    CHECK_TEXT(json_str(h, "model_ref"), "from-file", "model_ref (file only)");
    worker_end(w);
    remove(path);
}

/* A value that a higher source overrides is not an error, because validation follows merging. */
static void test_validated_after_merging(void) {
    worker *w = ready_worker("LLORCH_PARALLEL=0", "--parallel", "2", "--model", tiny_model());
    CHECK_NUM(json_num(health(w->port), "jobs.parallel"), 2, "parallel");
    worker_end(w);
}

static void test_defaults(void) {
    worker *w = ready_worker("--model", tiny_model(), "--gpu-device", "0");
    const char *h = health(w->port), *id = json_str(h, "worker_id");
    CHECK(strlen(id) == 36 && id[8] == '-' && id[14] == '4', "worker_id '%s' is no UUID", id);
    CHECK(!strncmp(json_str(h, "model_ref"), "file:/", 6), "model_ref %s", h);
    CHECK(strstr(json_str(h, "model_ref"), "/lorch-tiny-q8_0.gguf"), "model_ref %s", h);
    CHECK_NUM(json_num(h, "jobs.parallel"), 4, "parallel");
    CHECK_NUM(json_num(h, "jobs.queue"), 32, "queue");
    CHECK_NUM(json_num(h, "context_length"), 512, "context_length");
    CHECK(strstr(worker_log(w), "gpu-device"), "no warning about --gpu-device");
    CHECK_TEXT(worker_out(w), text("%d\n", w->port), "stdout");
    worker_end(w);
}

static void test_port_flag(void) {
    int port = tcp_free_port();
    worker *w = ready_worker("--model", tiny_model(), "--port", text("%d", port), "--context",
                             "100", "--threads", "1", "--lazy", "--kv-cache-size-mb", "2");
    const char *h = health(port);
    CHECK_NUM(w->port, port, "the port on stdout");
    CHECK_NUM(json_num(h, "context_length"), 100, "context_length");
    CHECK_NUM(json_num(h, "threads"), 1, "threads");
    CHECK(json_num(h, "memory.kv") <= 2 << 20, "memory.kv in %s", h);
    worker *second = start("--model", tiny_model(), "--port", text("%d", port));
    CHECK_NUM(failing(second), 1, "exit code when the port is taken");
    CHECK(strstr(worker_log(second), text("%d", port)), "no port in %s", worker_log(second));
    worker_drop(second);
    worker_end(w);
}

/* ==== Start =================================================================================== */

static void check_load_failure(const char *path, const char *code, const char *flag,
                               const char *value) {
    const char *args[] = {"--model", path, flag, value, NULL};
    worker *w = worker_start(args);
    int exit_code = failing(w);
    CHECK(exit_code == 1, "%s: exit code %d", path, exit_code);
    char *line = log_match(w, "code", code, 0, 0);
    CHECK(line, "%s: no log line with code %s: %s", path, code, worker_tail(w));
    if (line) {
        CHECK_TEXT(json_str(line, "level"), "ERROR", "level");
        CHECK(json_type(line, "message") == 's', "no message: %s", line);
        CHECK(strstr(line, path), "no path: %s", line);
        CHECK(strstr(line, "available") && strstr(line, "required"), "no memory: %s", line);
    }
    worker_drop(w);
}

static void test_bad_models(void) {
    size_t n;
    char *whole = text_file(tiny_model(), &n);
    REQUIRE(whole, "no %s", tiny_model());
    char *empty = temp_file("empty.gguf", "", 0);
    char *noise = temp_file("noise.gguf", "not a model at all, just some bytes", 35);
    char *cut = temp_file("cut.gguf", whole, n / 2);
    check_load_failure("/nonexistent/model.gguf", "MODEL_LOAD_FAILED", NULL, NULL);
    check_load_failure("/tmp", "MODEL_LOAD_FAILED", NULL, NULL);
    check_load_failure(empty, "MODEL_LOAD_FAILED", NULL, NULL);
    check_load_failure(noise, "MODEL_LOAD_FAILED", NULL, NULL);
    check_load_failure(cut, "MODEL_LOAD_FAILED", NULL, NULL);
    remove(empty);
    remove(noise);
    remove(cut);
    check_load_failure(tiny_model(), "INSUFFICIENT_MEMORY", "--kv-cache-size-mb", "16777216");
}

static void test_missing_model_calls_nobody(void) {
    manager *m = manager_start("200");
    worker *w = start("--model", "/nonexistent/model.gguf", "--callback-url",
                      text("http://127.0.0.1:%d/ready", m->port));
    CHECK_NUM(failing(w), 1, "exit code");
    CHECK_NUM(manager_calls(m), 0, "callbacks");
    worker_drop(w);
    manager_end(m);
}

/* Polls a starting worker on a known port as fast as it can: first nobody listens, then the
 * server answers 503 `loading`, then 200; never anything else. True if `loading` was seen. */
static bool watch_start(worker *w, int port) {
    bool loading = false;
    double end = now_ms() + bound_ms(10000);
    while (now_ms() < end && !worker_gone(w)) {
        int fd = tcp_connect(port);
        if (fd < 0) continue;
        conn *c = conn_of(fd);
        conn_text(c, request(port, "GET", "/health", "", NULL));
        conn_text(c, request(port, "GET", "/readyz", "", NULL));
        conn_text(c, request(port, "POST", "/execute", "", job_body("\"max_tokens\":1")));
        reply *h = reply_read(c), *ready = reply_read(c), *job = reply_read(c);
        conn_close(c);
        if (h->status == 200) {
            CHECK_TEXT(json_str(h->body.p, "status"), "healthy", "status with 200");
            return loading;
        }
        CHECK_NUM(h->status, 503, "status of /health");
        CHECK_TEXT(json_str(h->body.p, "status"), "loading", "status with 503");
        if (ready->status != 200) CHECK_NUM(ready->status, 503, "status of /readyz");
        if (job->status == 503)
            CHECK_TEXT(json_str(job->body.p, "error.code"), "NOT_READY", "code of /execute");
        else CHECK_NUM(job->status, 200, "status of /execute");
        loading = true;
    }
    CHECK(false, "never ready: %s", worker_tail(w));
    return true;
}

/* The server listens before the model is mapped. How long loading takes depends on the machine,
 * so several starts may be needed to catch a worker in the act. */
static void test_listens_first(void) {
    bool seen = false;
    const char *model = slow_model() ? slow_model() : tiny_model();
    for (int i = 0; i < 10 && !seen && !results.bad; i++) {
        int port = tcp_free_port();
        worker *w = start("--model", model, "--port", text("%d", port));
        seen = watch_start(w, port);
        worker_drop(w);
    }
    if (!seen) SKIP("loading was always over before the first answer");
}

static void test_load_events(void) {
    static const char *const order[] = {"startup", "model_load_start", "model_load_progress",
                                        "model_load_complete", "ready"};
    shared();
    const char *last = "";
    for (size_t i = 0; i < COUNT(order); i++) {
        const char *line = log_event(shared_worker, order[i], bound_ms(1000));
        REQUIRE(line, "no %s in %s", order[i], worker_tail(shared_worker));
        CHECK(strcmp(json_str(line, "timestamp"), last) >= 0, "%s is too early", order[i]);
        last = json_str(line, "timestamp");
    }
    for (int i = 0; i < 5; i++) {
        const char *line = log_match(shared_worker, "event", "model_load_progress", i, 500);
        CHECK_NUM(json_num(line, "percent"), 25 * i, "percent");
    }
    CHECK(!log_match(shared_worker, "event", "model_load_progress", 5, 0), "a sixth progress");
}

/* ==== Ready callback ========================================================================== */

static void test_callback_fields(void) {
    manager *m = manager_start("200");
    worker *w = ready_worker("--model", tiny_model(), "--worker-id", "worker-abc", "--model-ref",
                             "hf:some/model", "--callback-url",
                             text("http://127.0.0.1:%d/v2/ready?x=1&y=%%20", m->port));
    REQUIRE(manager_wait(m, 1, bound_ms(5000)), "no callback: %s", worker_tail(w));
    callback call = manager_call(m, 0);
    const char *body = strstr(call.raw, "\r\n\r\n");
    REQUIRE(call.whole && body, "not a whole request: %s", call.raw);
    body += 4;
    CHECK(!strncmp(call.raw, "POST /v2/ready?x=1&y=%20 HTTP/1.", 32), "request %s", call.raw);
    CHECK(strstr(call.raw, "\r\nContent-Type: application/json\r\n"), "request %s", call.raw);
    CHECK(strstr(call.raw, text("\r\nHost: 127.0.0.1:%d\r\n", m->port)), "request %s", call.raw);
    CHECK(!strstr(call.raw, "Authorization"), "a token nobody gave: %s", call.raw);
    CHECK_NUM(call.first_read, strlen(call.raw), "bytes of the first write");
    CHECK_NUM(call.health, 200, "/health when the callback came");
    CHECK_TEXT(json_str(body, "worker_id"), "worker-abc", "worker_id");
    CHECK_TEXT(json_str(body, "model_ref"), "hf:some/model", "model_ref");
    CHECK(json_num(body, "memory_bytes") > 2.5e6, "memory_bytes in %s", body);
    CHECK_TEXT(json_raw(body, "vram_bytes"), "0", "vram_bytes");
    CHECK_TEXT(json_str(body, "memory_architecture"), "cpu", "memory_architecture");
    CHECK_TEXT(json_str(body, "uri"), text("http://127.0.0.1:%d", w->port), "uri");
    CHECK_TEXT(json_str(body, "worker_type"), "cpu", "worker_type");
    CHECK_TEXT(json_str(body, "capabilities.0"), "text-gen", "capabilities");
    CHECK_TEXT(json_str(body, "protocol"), "sse", "protocol");
    worker_end(w);
    CHECK_NUM(manager_calls(m), 1, "callbacks");
    manager_end(m);
}

/* What becomes of a worker whose callback is answered as `script` says. */
typedef struct {
    const char *script;         /* for the double, or a callback URL */
    int exit;                   /* -1 if the worker lives on */
    int calls;
    worker *w;
    manager *m;
} callback_row;

static void callback_begin(callback_row *row) {
    bool url = !strncmp(row->script, "http", 4);
    if (!url) row->m = manager_start(row->script);
    row->w = start("--model", tiny_model(), "--threads", "1", "--callback-url",
                   url ? row->script : text("http://127.0.0.1:%d/r", row->m->port));
}

/* The retries come 250, 500 and 1000 ms after the failures before them. */
static void check_pauses(const callback_row *row) {
    static const int pauses[] = {250, 500, 1000};
    for (int i = 0; i + 1 < row->calls; i++) {
        double gap = manager_call(row->m, i + 1).at - manager_call(row->m, i).at;
        CHECK(gap > pauses[i] - 20 && gap < pauses[i] + bound_ms(400),
              "%s: %.0f ms before retry %d", row->script, gap, i + 1);
    }
}

static void callback_end(callback_row *row) {
    if (row->exit >= 0) {
        int code = worker_exit(row->w, bound_ms(8000));
        CHECK(code == row->exit, "%s: exit code %d", row->script, code);
        CHECK(log_match(row->w, "level", "ERROR", 0, 0), "%s: no log line", row->script);
        worker_drop(row->w);
    } else {
        if (row->m) CHECK(manager_wait(row->m, row->calls, bound_ms(8000)), "%s", row->script);
        CHECK(worker_ready(row->w), "%s: not ready", row->script);
        worker_end(row->w);
    }
    if (row->m) {
        CHECK(manager_calls(row->m) == row->calls, "%s: %d callbacks, not %d", row->script,
              manager_calls(row->m), row->calls);
        if (manager_calls(row->m) == row->calls) check_pauses(row);
    }
    manager_end(row->m);
}

static void test_callback_answers(void) {
    char *nobody = text("http://127.0.0.1:%d/r", tcp_free_port());
    callback_row rows[] = {
        {nobody, 3, 0, NULL, NULL}, {"200", -1, 1, NULL, NULL}, {"204", -1, 1, NULL, NULL},
        {"500 200", -1, 2, NULL, NULL},
        {"500 close garbage 201", -1, 4, NULL, NULL}, {"500", 3, 4, NULL, NULL},
        {"404", 3, 4, NULL, NULL}, {"302", 3, 4, NULL, NULL}, {"close", 3, 4, NULL, NULL},
        {"garbage", 3, 4, NULL, NULL}, {"cut", 3, 4, NULL, NULL}, {"reset", 3, 4, NULL, NULL},
        {"cut reset 999 200", -1, 4, NULL, NULL},
        {"http://localhost:9999/callback", -1, 0, NULL, NULL},
    };
    double begun = now_ms();
    for (size_t i = 0; i < COUNT(rows); i++) callback_begin(&rows[i]);
    /* The refused ones end first; the one that calls nobody is looked at last, long after it
     * would have given up. */
    callback_end(&rows[0]);
    CHECK(now_ms() - begun > 1750, "nobody listens: gave up after %.0f ms", now_ms() - begun);
    for (size_t i = 1; i < COUNT(rows); i++)
        if (rows[i].exit >= 0) callback_end(&rows[i]);
    for (size_t i = 0; i < COUNT(rows); i++)
        if (rows[i].exit < 0) callback_end(&rows[i]);
}

static void test_spawn_token(void) {
    for (int by_env = 0; by_env < 2; by_env++) {
        manager *m = manager_start("200");
        char *url = text("http://127.0.0.1:%d/r", m->port);
        worker *w = by_env ? start("LLORCH_SPAWN_TOKEN=s3cr3t-token", "--model", tiny_model(),
                                   "--callback-url", url)
                           : start("--spawn-token", "s3cr3t-token", "--model", tiny_model(),
                                   "--callback-url", url);
        CHECK(manager_wait(m, 1, bound_ms(5000)), "no callback");
        CHECK(strstr(manager_call(m, 0).raw, "\r\nAuthorization: Bearer s3cr3t-token\r\n"),
              "request %s", manager_call(m, 0).raw);
        size_t n = 0;
        char *args = text_file(text("/proc/%ld/cmdline", (long)w->pid), &n);
        for (size_t i = 0; args && i + 1 < n; i++) if (!args[i]) args[i] = ' ';
        if (args) CHECK(!strstr(args, "s3cr3t"), "the token is visible: %s", args);
        if (args) CHECK(strstr(args, "--callback-url"), "other arguments are gone: %s", args);
        CHECK(!strstr(worker_log(w), "s3cr3t"), "the token is in the log");
        worker_end(w);
        manager_end(m);
    }
}

static void test_advertised_uri(void) {
    manager *m = manager_start("200");
    char *url = text("http://127.0.0.1:%d/r", m->port);
    worker *w = ready_worker("--model", tiny_model(), "--callback-url", url, "--advertise-uri",
                             "http://worker-7.example:81");
    CHECK(manager_wait(m, 1, bound_ms(5000)), "no callback");
    CHECK(strstr(manager_call(m, 0).raw, "\"uri\":\"http://worker-7.example:81\""), "request %s",
          manager_call(m, 0).raw);
    worker_end(w);
    w = ready_worker("--model", tiny_model(), "--callback-url", url, "--host", "0.0.0.0",
                     "--insecure");
    CHECK(manager_wait(m, 2, bound_ms(5000)), "no callback");
    CHECK(strstr(manager_call(m, 1).raw, text("\"uri\":\"http://127.0.0.1:%d\"", w->port)),
          "request %s", manager_call(m, 1).raw);
    worker_end(w);
    manager_end(m);
}

/* Ten seconds of silence count as a refusal, and so does half an answer. They pass while the
 * other tests run. */
enum { SILENT = 2 };
static worker *patient_worker[SILENT];
static manager *silent_manager[SILENT];

static worker *start_for(manager *m) {
    return start("--model", tiny_model(), "--threads", "1", "--callback-url",
                 text("http://127.0.0.1:%d/r", m->port));
}

static void test_silence_begin(void) {
    static const char *const scripts[SILENT] = {"hang 200", "half 200"};
    for (int i = 0; i < SILENT; i++) {
        silent_manager[i] = manager_start(scripts[i]);
        patient_worker[i] = start_for(silent_manager[i]);
        CHECK(manager_wait(silent_manager[i], 1, bound_ms(5000)), "no callback");
        CHECK(worker_ready(patient_worker[i]), "not usable while the callback is unanswered");
        CHECK(strstr(job_run(patient_worker[i]->port, "'max_tokens':1")->r->body.p, "\"end\""),
              "takes no job while the callback is unanswered");
    }
}

static void test_silence_end(void) {
    if (!silent_manager[0]) SKIP("needs the test that begins the silence");
    for (int i = 0; i < SILENT; i++) {
        CHECK(manager_wait(silent_manager[i], 2, bound_ms(14000)), "no second callback");
        double gap = manager_call(silent_manager[i], 1).at - manager_call(silent_manager[i], 0).at;
        CHECK(gap > 10000 && gap < bound_ms(11500), "retried after %.0f ms", gap);
        worker_end(patient_worker[i]);
        manager_end(silent_manager[i]);
    }
}

/* A pool manager that does not answer cannot keep the worker from ending. */
static void test_silence_shutdown(void) {
    manager *m = manager_start("hang");
    worker *w = start_for(m);
    CHECK(manager_wait(m, 1, bound_ms(5000)) && worker_ready(w), "not ready: %s", worker_tail(w));
    double asked = now_ms();
    kill(w->pid, SIGTERM);
    CHECK_NUM(worker_exit(w, bound_ms(2000)), 0, "exit code");
    CHECK(now_ms() - asked < bound_ms(1000), "it took %.0f ms", now_ms() - asked);
    worker_drop(w);
    manager_end(m);
}

/* ==== Health ================================================================================== */

static void test_health_fields(void) {
    static const char *const numbers[] = {
        "memory_bytes", "memory.weights_mapped", "memory.weights_resident", "memory.kv",
        "memory.scratch", "jobs.running", "jobs.queued", "threads", "uptime_seconds",
    };
    reply *r = get(shared(), "/health");
    const char *h = r->body.p;
    CHECK_NUM(r->status, 200, "status");
    CHECK(header_is(r, "Content-Type", "application/json"), "Content-Type in %s", r->head);
    for (size_t i = 0; i < COUNT(numbers); i++)
        CHECK(json_num(h, numbers[i]) >= 0, "%s in %s", numbers[i], h);
    CHECK_TEXT(json_str(h, "status"), "healthy", "status");
    CHECK_TEXT(json_str(h, "worker_id"), "w-shared", "worker_id");
    CHECK_TEXT(json_str(h, "model"), "lorch tiny", "model");
    CHECK_TEXT(json_raw(h, "resident"), "true", "resident");
    CHECK_TEXT(json_str(h, "quant_kind"), "Q8_0", "quant_kind");
    CHECK_TEXT(json_str(h, "memory_architecture"), "cpu", "memory_architecture");
    CHECK_TEXT(json_str(h, "worker_type"), "cpu", "worker_type");
    CHECK_TEXT(json_str(h, "capabilities.0"), "text-gen", "capabilities");
    CHECK_TEXT(json_str(h, "protocol"), "sse", "protocol");
    CHECK_NUM(json_num(h, "vram_bytes_used"), 0, "vram_bytes_used");
    CHECK_TEXT(json_str(h, "tokenizer_kind"), "gguf-bpe", "tokenizer_kind");
    CHECK_NUM(json_num(h, "vocab_size"), 1024, "vocab_size");
    CHECK_NUM(json_num(h, "context_length"), 512, "context_length");
    CHECK(json_num(h, "memory_bytes") > 1e6, "memory_bytes in %s", h);
    CHECK(json_num(h, "memory.weights_mapped") > 2.5e6, "weights_mapped in %s", h);
    CHECK(json_num(h, "memory.kv") > 0, "kv in %s", h);
    CHECK(json_has(h, "rates.prefill_tokens_per_sec"), "rates in %s", h);
    CHECK(json_has(h, "rates.decode_tokens_per_sec"), "rates in %s", h);
    CHECK(json_type(h, "simd") == 's' && json_type(h, "version") == 's', "simd, version: %s", h);
    CHECK_NUM(get(shared(), "/livez")->status, 200, "/livez");
    CHECK_NUM(get(shared(), "/readyz")->status, 200, "/readyz");
}

/* The specification wants 10 ms. The median is held to it, the worst only to a tenth of a second,
 * because this test competes with the worker for the machine. */
static void test_health_under_load(void) {
    NEED_SLOW_MODEL();
    enum { JOBS = 6, ASKED = 100 };
    stream *s[JOBS];
    double worst = 0;
    int late = 0;
    for (int i = 0; i < JOBS; i++)
        s[i] = job(busy(), LONG_JOB ",'prompt':'%d %s'", i, text_times("of a long time ago ", 700));
    for (int i = 0; i < JOBS; i++)
        CHECK(stream_event(s[i], "started", bound_ms(5000)), "not started: %s", s[i]->r->body.p);
    for (int i = 0; i < ASKED; i++) {
        double asked = now_ms();
        reply *r = get(busy(), i % 2 ? "/health" : "/livez");
        double took = now_ms() - asked;
        CHECK_NUM(r->status, 200, "status");
        late += took > bound_ms(10);
        worst = took > worst ? took : worst;
    }
    CHECK(late < ASKED / 2, "%d of %d answers took more than 10 ms", late, ASKED);
    CHECK(worst < bound_ms(100), "an answer took %.0f ms", worst);
    for (int i = 0; i < JOBS; i++) cancel(busy(), s[i]->job_id);
    for (int i = 0; i < JOBS; i++) stream_finish(s[i], bound_ms(5000));
}

static void test_jobs_in_health(void) {
    NEED_SLOW_MODEL();
    stream *s = job(busy(), LONG_JOB);
    stream_wait(s, 1, bound_ms(10000));
    CHECK_NUM(json_num(health(busy()), "jobs.running"), 1, "jobs.running");
    CHECK_NUM(metric(busy(), "worker_jobs_running", ""), 1, "worker_jobs_running");
    CHECK(metric(busy(), "worker_kv_usage_ratio", "") > 0, "worker_kv_usage_ratio");
    cancel(busy(), s->job_id);
    stream_finish(s, bound_ms(5000));
    CHECK(health_wait(busy(), "jobs.running", 0, bound_ms(1000)), "jobs.running stays");
}

/* ==== Metrics ================================================================================= */

static const struct { const char *name, *type; } metric_names[] = {
    {"worker_requests_total", "counter"}, {"worker_tokens_in_total", "counter"},
    {"worker_tokens_generated_total", "counter"}, {"worker_inference_duration_ms", "histogram"},
    {"worker_memory_bytes", "gauge"}, {"worker_vram_bytes", "gauge"},
    {"worker_uptime_seconds", "gauge"}, {"worker_first_token_seconds", "histogram"},
    {"worker_token_seconds", "histogram"}, {"worker_cancel_seconds", "histogram"},
    {"worker_queue_wait_seconds", "histogram"}, {"worker_jobs_running", "gauge"},
    {"worker_jobs_queued", "gauge"}, {"worker_kv_usage_ratio", "gauge"},
    {"worker_deadline_refused_total", "counter"}, {"worker_cached_tokens_total", "counter"},
    {"worker_build_info", "gauge"},
};

static void test_metric_names(void) {
    job_run(shared(), "'max_tokens':2");
    reply *r = get(shared(), "/metrics");
    const char *type = reply_header(r, "Content-Type");
    CHECK_NUM(r->status, 200, "status");
    CHECK(type && !strncmp(type, "text/plain; version=0.0.4", 25), "Content-Type: %s", type);
    for (size_t i = 0; i < COUNT(metric_names); i++) {
        const char *name = metric_names[i].name;
        CHECK(strstr(r->body.p, text("# HELP %s ", name)), "no HELP for %s", name);
        CHECK(strstr(r->body.p, text("# TYPE %s %s\n", name, metric_names[i].type)),
              "no TYPE %s for %s", metric_names[i].type, name);
        if (!strcmp(metric_names[i].type, "histogram")) name = text("%s_count", name);
        CHECK(metric_in(r->body.p, name, "") >= 0, "no value for %s", name);
    }
    static const char *const outcomes[] = {"success", "error", "cancelled", "timeout", "rejected"};
    for (size_t i = 0; i < COUNT(outcomes); i++)
        CHECK(metric_in(r->body.p, "worker_requests_total",
                        text("outcome=\"%s\"", outcomes[i])) >= 0, "no %s", outcomes[i]);
}

/* Every line is a comment or a sample of a declared metric with the two labels of all series. */
static void test_metric_lines(void) {
    stream *s = job_run(shared(), "'max_tokens':2");
    char *page = get(shared(), "/metrics")->body.p, *line = page, *stop;
    CHECK(!strstr(page, s->job_id), "a job id is in the metrics");
    CHECK(*page && page[strlen(page) - 1] == '\n', "the last line is not ended");
    for (; (stop = strchr(line, '\n')); line = stop + 1) {
        *stop = 0;
        if (*line == '#') {
            CHECK(!strncmp(line, "# HELP ", 7) || !strncmp(line, "# TYPE ", 7), "%s", line);
            continue;
        }
        char *value = strrchr(line, ' '), *end;
        CHECK(strstr(line, "component=\"lorch\"") && strstr(line, "worker_id=\"w-shared\""),
              "labels are missing: %s", line);
        REQUIRE(value, "no value: %s", line);
        CHECK(strtod(value, &end) >= 0 && end > value && !*end, "no number: %s", line);
    }
}

/* Buckets ascend, are cumulative, and the last one is +Inf and equals the count. */
static void check_histogram(const char *page, const char *name) {
    double edge = -1, count = 0, buckets = 0;
    bool infinite = false;
    const char *prefix = text("%s_bucket{", name);
    for (const char *line = page; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, prefix, strlen(prefix))) continue;
        char *copy = text_n(line, strcspn(line, "\n")), *le = strstr(copy, "le=\"");
        REQUIRE(le, "no le: %s", copy);
        double bound = strncmp(le + 4, "+Inf", 4) ? strtod(le + 4, NULL) : 1e300;
        double value = strtod(strrchr(copy, ' '), NULL);
        CHECK(bound > edge && value >= count, "%s: out of order", copy);
        edge = bound;
        count = value;
        infinite = bound >= 1e300;
        buckets++;
    }
    CHECK(infinite && buckets >= 3, "%s has %.0f buckets", name, buckets);
    CHECK_NUM(metric_in(page, text("%s_count", name), ""), count, name);
    CHECK(metric_in(page, text("%s_sum", name), "") >= 0, "%s_sum", name);
}

static void test_histograms(void) {
    for (int i = 0; i < 3; i++) job_run(shared(), "'max_tokens':9");
    const char *page = get(shared(), "/metrics")->body.p;
    for (size_t i = 0; i < COUNT(metric_names); i++)
        if (!strcmp(metric_names[i].type, "histogram")) check_histogram(page, metric_names[i].name);
    CHECK(metric_in(page, "worker_inference_duration_ms_count", "") >= 3, "durations");
    CHECK(metric_in(page, "worker_first_token_seconds_count", "") >= 3, "first tokens");
    CHECK(metric_in(page, "worker_token_seconds_count", "") >= 20, "tokens");
}

static void test_counters(void) {
    const char *ok = "outcome=\"success\"";
    double jobs = metric(shared(), "worker_requests_total", ok);
    double in = metric(shared(), "worker_tokens_in_total", "");
    double out = metric(shared(), "worker_tokens_generated_total", "");
    for (int i = 0; i < 2; i++)
        job_run(shared(), "'max_tokens':10,'ignore_eos':true,'prompt':'Once upon a time'");
    nap_ms(20);
    CHECK_NUM(metric(shared(), "worker_requests_total", ok), jobs + 2, "jobs");
    CHECK_NUM(metric(shared(), "worker_tokens_in_total", ""), in + 10, "tokens in");
    CHECK_NUM(metric(shared(), "worker_tokens_generated_total", ""), out + 20, "tokens out");
    CHECK_NUM(metric(shared(), "worker_vram_bytes", ""), 0, "worker_vram_bytes");
    CHECK(metric(shared(), "worker_memory_bytes", "") > 1e6, "worker_memory_bytes");
}

/* ==== Shutdown ================================================================================ */

/* How a draining worker answers: on a connection that was open before, and on a new one, if that
 * is accepted at all. */
static void check_draining(worker *w, conn *c) {
    conn_text(c, request(w->port, "GET", "/health", "", NULL));
    reply *r = reply_read(c);
    CHECK_NUM(r->status, 503, "/health on an open connection");
    CHECK_TEXT(json_str(r->body.p, "status"), "draining", "status");
    for (int i = 0; i < 2; i++) {
        const char *target = i ? "/readyz" : "/execute";
        r = i ? get(w->port, target) : post(w->port, target, job_body(""));
        if (!r->status) continue;
        CHECK(r->status == 503, "%s: status %d while draining", target, r->status);
    }
}

/* A job that ends by itself within the drain time ends properly. */
static void drain_short(worker *w, bool by_request) {
    REQUIRE(worker_ready(w), "not ready");
    int n = tokens_in(w->port, 1000);
    stream *s = job(w->port, "'max_tokens':%d,'ignore_eos':true,'temperature':0", n);
    conn *open = conn_open(w->port);
    conn_text(open, request(w->port, "GET", "/livez", "", NULL));
    CHECK_NUM(reply_read(open)->status, 200, "/livez");
    REQUIRE(stream_wait(s, 1, bound_ms(10000)), "no token: %s", s->r->body.p);
    double asked = now_ms();
    if (by_request) CHECK_NUM(post(w->port, "/shutdown", "{}")->status, 202, "/shutdown");
    else kill(w->pid, SIGTERM);
    nap_ms(10);
    check_draining(w, open);
    stream_finish(s, bound_ms(5000));
    CHECK_TEXT(json_str(stream_last(s), "type"), "end", "the running job's last event");
    CHECK_NUM(stream_tokens(s), n, "tokens of the running job");
    CHECK_NUM(worker_exit(w, bound_ms(5000)), 0, "exit code");
    CHECK(now_ms() - asked < bound_ms(4000), "waited although no job was left");
    CHECK(log_event(w, "shutdown", 0), "no shutdown event in the log");
}

static void test_shutdown_request(void) {
    NEED_SLOW_MODEL();
    worker *w = start("--model", slow_model(), "--max-tokens-out", "16000", "--drain-timeout", "20");
    drain_short(w, true);
    worker_drop(w);
}

static void test_sigterm(void) {
    NEED_SLOW_MODEL();
    worker *w = start("--model", slow_model(), "--max-tokens-out", "16000", "--drain-timeout", "20");
    drain_short(w, false);
    worker_drop(w);
}

/* A job that does not end in time is cancelled: after --drain-timeout, in any case within 5 s. */
static void drain_long(const char *seconds, int signal_number, int least_ms, int most_ms) {
    worker *w = ready_worker("--model", slow_model(), "--max-tokens-out", "16000",
                             "--drain-timeout", seconds);
    stream *s = job(w->port, LONG_JOB);
    CHECK(stream_wait(s, 1, bound_ms(10000)), "no token: %s", s->r->body.p);
    double asked = now_ms();
    kill(w->pid, signal_number);
    stream_finish(s, bound_ms(6000));
    double took = now_ms() - asked;
    CHECK_TEXT(stream_code(s), "CANCELLED", stream_last(s));
    CHECK(took >= least_ms, "cancelled after %.0f ms", took);
    CHECK_NUM(worker_exit(w, bound_ms(2000)), 0, "exit code");
    CHECK(now_ms() - asked <= bound_ms(most_ms), "ended after %.0f ms", now_ms() - asked);
    worker_drop(w);
}

static void test_drain_timeout(void) {
    NEED_SLOW_MODEL();
    drain_long("1", SIGINT, 900, 2000);
    drain_long("4", SIGTERM, 3800, 5000);
}

static void test_second_signal(void) {
    NEED_SLOW_MODEL();
    static const int first[] = {SIGTERM, SIGINT}, second[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        worker *w = ready_worker("--model", slow_model(), "--max-tokens-out", "16000");
        stream *s = job(w->port, LONG_JOB);
        CHECK(stream_wait(s, 1, bound_ms(10000)), "no token: %s", s->r->body.p);
        kill(w->pid, first[i]);
        CHECK(log_event(w, "shutdown", bound_ms(1000)), "no shutdown event");
        CHECK_NUM(worker_exit(w, 50), -1, "exit code after one signal");
        kill(w->pid, second[i]);
        CHECK_NUM(worker_exit(w, bound_ms(500)), 130, "exit code after two");
        worker_drop(w);
    }
}

static void test_idle_shutdown(void) {
    for (int i = 0; i < 3; i++) {
        worker *w = ready_worker("--model", tiny_model());
        conn *idle = conn_open(w->port); /* An idle connection must not delay the end. */
        double asked = now_ms();
        if (i == 2) CHECK_NUM(http(w->port, "POST", "/shutdown", "", NULL)->status, 202, "status");
        else kill(w->pid, i ? SIGINT : SIGTERM);
        CHECK_NUM(worker_exit(w, bound_ms(1000)), 0, "exit code");
        CHECK(now_ms() - asked < bound_ms(1000), "took %.0f ms", now_ms() - asked);
        conn_close(idle);
        worker_drop(w);
    }
}

/* A shell starts the worker and is then killed; the pipe's end tells that the worker is gone. */
static void test_exit_with_parent(void) {
    char *note = temp_file("pid", "", 0);
    const char *args[] = {"-c", "\"$@\" & echo $! > \"$0\"; wait", note, env_or("LORCH", "./lorch"),
                          "--exit-with-parent", "--model", tiny_model(), NULL};
    worker *shell = process_start("/bin/sh", args);
    CHECK(worker_ready(shell), "not ready: %s", worker_tail(shell));
    pid_t child = (pid_t)atol(text_file(note, NULL));
    kill(shell->pid, SIGKILL);
    double end = now_ms() + bound_ms(6000);
    while (now_ms() < end && health_status(shell->port)) nap_ms(10);
    bool alive = health_status(shell->port);
    CHECK(!alive, "the worker outlives its parent");
    if (alive && child > 1) kill(child, SIGKILL);
    remove(note);
    worker_drop(shell);
}

static void test_two_workers(void) {
    worker *w = ready_worker("--model", tiny_model());
    static const char fields[] = "'temperature':0,'max_tokens':40";
    stream *a = job(shared(), fields), *b = job(w->port, fields);
    stream_finish(a, bound_ms(10000));
    stream_finish(b, bound_ms(10000));
    CHECK(stream_tokens(a) == 40, "no text: %s", a->r->body.p);
    CHECK_TEXT(stream_text(b), stream_text(a), "the other worker's text");
    CHECK(strcmp(json_str(health(w->port), "worker_id"), "w-shared"), "the same worker_id");
    worker_end(w);
}

/* ==== Logs ==================================================================================== */

static void test_log_lines(void) {
    static const char *const keys[] = {"timestamp", "level", "component", "worker_id", "event"};
    stream *s = execute(shared(), "/execute", "X-Correlation-Id: corr-77\r\n",
                        job_body(q("'prompt':'xyzzy plugh','max_tokens':30,'seed':4,'ignore_eos':true")));
    stream_finish(s, bound_ms(10000));
    const char *text_out = stream_text(s);
    cancel(shared(), s->job_id);
    const char *begun = NULL, *ended = NULL;
    log_match(shared_worker, "event", "execute_end", 0, bound_ms(1000));
    nap_ms(20);
    char *log = worker_log(shared_worker), *line = log, *stop;
    CHECK(!strstr(log, "xyzzy") && !strstr(log, "plugh"), "the prompt is in the log");
    CHECK(strlen(text_out) > 20 && !strstr(log, text_out), "generated text is in the log");
    for (; (stop = strchr(line, '\n')); line = stop + 1) {
        *stop = 0;
        for (size_t i = 0; i < COUNT(keys); i++)
            CHECK(json_type(line, keys[i]) == 's', "no %s: %s", keys[i], line);
        CHECK_TEXT(json_str(line, "component"), "lorch", "component");
        CHECK_TEXT(json_str(line, "worker_id"), "w-shared", "worker_id");
        CHECK(strstr("ERROR WARN INFO DEBUG TRACE", json_str(line, "level")), "level: %s", line);
        if (strcmp(json_str(line, "job_id"), s->job_id)) continue;
        if (!strcmp(json_str(line, "event"), "execute_start")) begun = line;
        if (!strcmp(json_str(line, "event"), "execute_end")) ended = line;
        if (strcmp(json_str(line, "event"), "cancel"))
            CHECK_TEXT(json_str(line, "correlation_id"), "corr-77", line);
    }
    CHECK(begun && ended, "no execute_start or no execute_end");
}

static void test_log_cancel_and_error(void) {
    NEED_SLOW_MODEL();
    stream *s = job(busy(), LONG_JOB);
    stream_wait(s, 1, bound_ms(10000));
    cancel(busy(), s->job_id);
    stream_finish(s, bound_ms(5000));
    const char *line = log_match(slow_worker, "event", "cancel", 0, bound_ms(1000));
    CHECK(line && json_type(line, "job_id") == 's', "no cancel event: %s", line ? line : "");
}

static void test_log_level(void) {
    worker *w = ready_worker("--model", tiny_model(), "--log-level", "ERROR");
    job_run(w->port, "'max_tokens':1");
    CHECK_TEXT(worker_log(w), "", "the log");
    worker_end(w);
    w = ready_worker("--model", tiny_model(), "--log-format", "text");
    CHECK(lines_in(worker_log(w)) > 0, "no log");
    CHECK(worker_log(w)[0] != '{', "not in readable form: %s", worker_log(w));
    worker_end(w);
}

/* Nobody reads the worker's stderr for a while: it must go on, and say afterwards how many lines
 * were lost. Each cancelled job makes lines enough to fill a pipe of 64 KiB many times over. */
static void test_log_pipe_full(void) {
    worker *w = ready_worker("--model", tiny_model(), "--log-level", "TRACE");
    pthread_mutex_lock(&w->lock);
    w->mute = true;
    pthread_mutex_unlock(&w->lock);
    nap_ms(30);
    buf many = {0};
    for (int i = 0; i < 1500; i++)
        buf_str(&many, request(w->port, "POST", "/cancel", "",
                               text("{\"job_id\":\"%s%d\"}", text_times("l", 200), i)));
    conn *c = conn_open(w->port);
    /* Answers are read between batches, so that no pipe but the log's can fill up. */
    size_t one = many.n / 1500;
    for (size_t at = 0; at < many.n && !c->eof; at += one * 20) {
        size_t n = many.n - at < one * 20 ? many.n - at : one * 20;
        CHECK(conn_send(c, many.p + at, n), "the worker stopped reading");
        while (conn_fill(c, 0)) {}
    }
    double asked = now_ms();
    CHECK_NUM(get(w->port, "/health")->status, 200, "/health");
    CHECK(now_ms() - asked < bound_ms(1000), "the worker waits for its log");
    CHECK(strstr(job_run(w->port, "'max_tokens':2")->r->body.p, "\"end\""), "no job runs");
    pthread_mutex_lock(&w->lock);
    w->mute = false;
    pthread_mutex_unlock(&w->lock);
    nap_ms(50);
    job_run(w->port, "'max_tokens':1");
    nap_ms(50);
    CHECK(strstr(worker_log(w), "drop"), "nothing tells of dropped lines: %s", worker_tail(w));
    worker_end(w);
}

/* ==== Authentication ========================================================================== */

static int with_token(int port, const char *method, const char *target, const char *header) {
    return http(port, method, target, header, NULL)->status;
}

static void check_token(worker *w) {
    static const char *const wrong[] = {
        "", "Authorization: Bearer\r\n", "Authorization: Bearer \r\n",
        "Authorization: Bearer hunter\r\n", "Authorization: Bearer hunter22\r\n",
        "Authorization: Bearer Hunter2\r\n", "Authorization: Basic hunter2\r\n",
        "Authorization: hunter2\r\n", "X-Api-Key: hunter2\r\n",
        "Authorization: Bearer hunter2 hunter2\r\n",
    };
    static const struct { const char *method, *target; int status; } routes[] = {
        {"GET", "/metrics", 200}, {"POST", "/cancel/x", 202}, {"POST", "/execute", 415},
        {"GET", "/nowhere", 404},
    };
    static const char right[] = "Authorization: Bearer hunter2\r\n";
    for (size_t i = 0; i < COUNT(routes); i++) {
        const char *m = routes[i].method, *t = routes[i].target;
        for (size_t j = 0; j < COUNT(wrong); j++) {
            reply *r = http(w->port, m, t, wrong[j], NULL);
            CHECK(r->status == 401, "%s %s %s: %d", m, t, wrong[j], r->status);
            CHECK_TEXT(json_str(r->body.p, "error.code"), "UNAUTHORIZED", t);
            CHECK(!strstr(r->body.p, "hunter"), "the token is shown: %s", r->body.p);
        }
        int status = with_token(w->port, m, t, right);
        CHECK(status == routes[i].status || (status == 400 && routes[i].status == 415),
              "%s %s with the token: %d", m, t, status);
    }
    CHECK_NUM(with_token(w->port, "POST", "/shutdown", wrong[3]), 401, "/shutdown");
    CHECK_NUM(with_token(w->port, "GET", "/health", ""), 200, "/health without a token");
    CHECK_NUM(with_token(w->port, "GET", "/livez", ""), 200, "/livez without a token");
    CHECK_NUM(with_token(w->port, "GET", "/readyz", ""), 200, "/readyz without a token");
    /* With a token, the Host header need not name a loopback host. */
    CHECK_NUM(with_token(w->port, "GET", "/metrics", text("%sHost: worker.example\r\n", right)),
              200, "a foreign Host with the token");
    CHECK(!strstr(worker_log(w), "hunter2"), "the token is in the log");
}

static void test_token(void) {
    worker *w = ready_worker("LLORCH_API_TOKEN=hunter2", "--model", tiny_model());
    check_token(w);
    worker_end(w);
    char *path = temp_file("token", "hunter2\n", 8);
    w = ready_worker("--api-token-file", path, "--model", tiny_model());
    check_token(w);
    worker_end(w);
    CHECK_TEXT(text_file(path, NULL), "hunter2\n", "the token file");
    char *empty = temp_file("no-token", "\n", 1);
    check_usage_error(start("--api-token-file", empty, "--model", tiny_model()),
                      "api-token-file", "an empty token file");
    remove(path);
    remove(empty);
}

static void test_open_host(void) {
    static const char *const open[] = {"0.0.0.0", "::"};
    for (size_t i = 0; i < COUNT(open); i++)
        check_usage_error(start("--model", tiny_model(), "--host", open[i]), "host", open[i]);
    worker *w = ready_worker("LLORCH_API_TOKEN=t", "--model", tiny_model(), "--host", "0.0.0.0");
    worker_end(w);
    w = ready_worker("--model", tiny_model(), "--host", "0.0.0.0", "--insecure");
    worker_end(w);
}

static void test_host_and_origin(void) {
    static const struct { const char *headers; bool ok; } rows[] = {
        {"Host: localhost\r\n", true}, {"Host: localhost:1234\r\n", true},
        {"Host: LocalHost:1\r\n", true}, {"Host: 127.0.0.1\r\n", true},
        {"Host: 127.9.9.9:80\r\n", true}, {"Host: [::1]\r\n", true}, {"Host: [::1]:80\r\n", true},
        {"Host: evil.example\r\n", false}, {"Host: localhost.evil.example\r\n", false},
        {"Host: 127.0.0.1.evil.example\r\n", false}, {"Host: 10.0.0.1\r\n", false},
        {"Host: 0.0.0.0\r\n", false}, {"Host: 127.0.0.1evil\r\n", false},
        {"Origin: http://localhost:3000\r\n", true}, {"Origin: http://127.0.0.1\r\n", true},
        {"Origin: http://[::1]:5\r\n", true}, {"Origin: https://evil.example\r\n", false},
        {"Origin: http://localhost.evil.example\r\n", false},
        {"Origin: http://evil.example:80\r\n", false}, {"Origin: null\r\n", false},
        {"Origin: http://127.0.0.1@evil.example\r\n", false},
    };
    for (size_t i = 0; i < COUNT(rows); i++) {
        reply *r = http(shared(), "POST", "/cancel/nothing", rows[i].headers, NULL);
        bool taken = r->status == 202, refused = r->status >= 400 && r->status < 500;
        CHECK(rows[i].ok ? taken : refused, "%s: status %d", rows[i].headers, r->status);
    }
}

static void test_shared_end(void) {
    worker_end(shared_worker);
    worker_end(slow_worker);
    shared_worker = slow_worker = NULL;
}

static const test tests[] = {
    {"ten seconds of silence, begun [SYS-5.3.1] [SYS-6.3.4]", test_silence_begin},
    {"bad flags are named and end with 2 [SYS-6.3.1]", test_bad_flags},
    {"bad environment and config file end with 2 [SYS-6.3.1]", test_bad_environment},
    {"--help and --version [SYS-6.3.1]", test_help_and_version},
    {"flag over environment over file over default [SYS-6.3.1] [SYS-11.3]", test_precedence},
    {"settings are validated after merging [SYS-11.4]", test_validated_after_merging},
    {"defaults; foreign flags are harmless; stdout is one line [SYS-6.3.1]", test_defaults},
    {"--port and sizing flags; a port in use ends with 1 [SYS-6.3.1]", test_port_flag},
    {"an unusable model ends with 1 and a full log line [SYS-6.3.2] [SYS-7.2]", test_bad_models},
    {"no callback for a model that does not load [SYS-6.3.4]", test_missing_model_calls_nobody},
    {"listens before it loads: 503 loading, then 200 [SYS-6.3.2] [SYS-6.3.6]", test_listens_first},
    {"load events in order, progress by quarters [SYS-10.2] [SYS-6.3.2]", test_load_events},
    {"the ready callback has all its fields [SYS-5.3.1] [SYS-6.3.4]", test_callback_fields},
    {"retries after 250, 500, 1000 ms, then exit 3 [SYS-5.3.1]", test_callback_answers},
    {"the spawn token is sent and wiped [SYS-5.3.1] [SYS-9.1]", test_spawn_token},
    {"--advertise-uri and the address behind 0.0.0.0 [SYS-5.3.1]", test_advertised_uri},
    {"/health has all its fields; /livez, /readyz [SYS-6.3.7] [M0-W-1320]", test_health_fields},
    {"/health answers within 10 ms under load [SYS-6.3.8] [M0-W-1320]", test_health_under_load},
    {"running jobs show in /health and /metrics [SYS-6.3.6]", test_jobs_in_health},
    {"metrics have their names, HELP and TYPE [SYS-10.1] [M0-W-1350]", test_metric_names},
    {"every series has component and worker_id, none a job id [SYS-10.1]", test_metric_lines},
    {"histograms are consistent [M0-W-1350]", test_histograms},
    {"counters count [M0-W-1350]", test_counters},
    {"POST /shutdown lets running jobs finish [SYS-7.2]", test_shutdown_request},
    {"SIGTERM lets running jobs finish [SYS-7.2]", test_sigterm},
    {"jobs that outlast the drain time are cancelled, exit 0 [SYS-7.2]", test_drain_timeout},
    {"a second signal ends the worker at once with 130 [SYS-7.2]", test_second_signal},
    {"an idle worker ends at once [SYS-7.2]", test_idle_shutdown},
    {"--exit-with-parent [SYS-7.2]", test_exit_with_parent},
    {"two workers on one model file [SYS-6.3.2]", test_two_workers},
    {"log lines are JSON, have their keys and show no text [SYS-10.2]", test_log_lines},
    {"cancellations are logged [SYS-10.2]", test_log_cancel_and_error},
    {"--log-level and --log-format [SYS-10.2]", test_log_level},
    {"a full log pipe does not stop the worker [SYS-10.2]", test_log_pipe_full},
    {"bearer tokens [SYS-9.1] [SYS-5.5.1]", test_token},
    {"an open host needs a token or --insecure [SYS-9.1]", test_open_host},
    {"Host and Origin on loopback [SYS-9.1]", test_host_and_origin},
    {"ten seconds of silence count as a refusal [SYS-5.3.1]", test_silence_end},
    {"an unanswered callback does not delay the end [SYS-7.2]", test_silence_shutdown},
    {"the shared workers end with 0 [SYS-7.2]", test_shared_end},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
