/* guard.c: what a worker gives up, what it survives, what it keeps to itself. MIT licence.
 *
 * The sandbox as the kernel reports it, a model file that shrinks under a running job, tokens that must not be
 * found in the process, limits of memory and descriptors. Linux only, since all of it is read from /proc. */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <sys/resource.h>

/* ==== /proc ==================================================================================== */

static char *proc_text(const worker *w, const char *name) {
    char *s = text_file(text("/proc/%ld/%s", (long)w->pid, name), NULL);
    return s ? s : text("");
}

/* The value of "Name:\tvalue" in a status file, or "". */
static char *status_value(const char *status, const char *name) {
    const char *p = strstr(status, text("\n%s:", name));
    if (!p) return text("");
    p += strlen(name) + 2;
    p += strspn(p, " \t");
    return text_n(p, strcspn(p, "\n"));
}

static int each_thread(const worker *w, void (*fn)(const char *status, const char *tid)) {
    int n = 0;
    DIR *d = opendir(text("/proc/%ld/task", (long)w->pid));
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        if (*e->d_name == '.') continue;
        fn(proc_text(w, text("task/%s/status", e->d_name)), e->d_name);
        n++;
    }
    if (d) closedir(d);
    CHECK(n > 0, "no /proc");
    return n;
}

static bool sandboxed(void) { return !getenv("LORCH_TEST_NO_SANDBOX"); }
static void need_sandbox(void) {
    if (!sandboxed()) SKIP("the worker is instrumented");
}

/* ==== The sandbox ============================================================================== */

static void check_confined(const char *status, const char *tid) {
    CHECK_TEXT(status_value(status, "Seccomp"), "2", text("Seccomp of thread %s", tid));
    CHECK_TEXT(status_value(status, "Seccomp_filters"), "2", text("filters of thread %s", tid));
    CHECK_TEXT(status_value(status, "NoNewPrivs"), "1", text("NoNewPrivs of thread %s", tid));
}

static void test_sandbox(void) {
    need_sandbox();
    worker *w = ready_worker("--model", tiny_model(), "--threads", "3");
    int port = w->port;
    if (json_num(health(port), "sandbox.seccomp") == 0) SKIP("no list of system calls for this machine");
    CHECK(health_wait(port, "sandbox.seccomp", 2, bound_ms(2000)), "seccomp: %s", health(port));
    CHECK_TEXT(json_raw(health(port), "sandbox.enabled"), "true", "enabled");
    CHECK_TEXT(json_raw(health(port), "sandbox.no_new_privileges"), "true", "no_new_privileges");
    int n = each_thread(w, check_confined);
    CHECK(n >= 5, "only %d threads", n); /* I/O, intake, engine, two of the pool */
    char *limits = proc_text(w, "limits"), *core = strstr(limits, "Max core file size");
    REQUIRE(core, "limits: %s", limits);
    core += strlen("Max core file size");
    CHECK(strspn(core, " ") && core[strspn(core, " ")] == '0', "core files: %.60s", core);
    /* All that a worker does still works: jobs, cancel, metrics, many connections, drain. */
    stream *s = job_run(port, "'max_tokens':20,'ignore_eos':true");
    CHECK_NUM(stream_tokens(s), 20, "tokens");
    CHECK(metric(port, "worker_memory_bytes", "") > 1e5, "no resident memory is known");
    CHECK_NUM(post(port, "/shutdown", "{}")->status, 202, "/shutdown");
    CHECK_NUM(worker_exit(w, bound_ms(5000)), 0, "exit code");
    worker_drop(w);
}

static void check_free(const char *status, const char *tid) {
    CHECK_TEXT(status_value(status, "Seccomp"), "0", text("Seccomp of thread %s", tid));
}

static void test_no_sandbox(void) {
    worker *w = ready_worker("--model", tiny_model(), "--no-sandbox");
    CHECK_TEXT(json_raw(health(w->port), "sandbox.enabled"), "false", "enabled");
    CHECK_NUM(json_num(health(w->port), "sandbox.seccomp"), 0, "seccomp");
    each_thread(w, check_free);
    worker_end(w);
}

/* The callback goes out from inside, by name and by number, also when it has to be tried again. */
static void test_sandbox_callback(void) {
    need_sandbox();
    static const char *const hosts[] = {"127.0.0.1", "localhost"};
    for (size_t i = 0; i < COUNT(hosts); i++) {
        manager *m = manager_start("500 close 200");
        worker *w = ready_worker("--model", tiny_model(), "--callback-url", text("http://%s:%d/ready", hosts[i], m->port));
        CHECK(manager_wait(m, 3, bound_ms(5000)), "%s: only %d calls", hosts[i], manager_calls(m));
        if (json_num(health(w->port), "sandbox.seccomp") > 0)
            CHECK(health_wait(w->port, "sandbox.seccomp", 2, bound_ms(2000)), "%s: not closed: %s", hosts[i], health(w->port));
        worker_end(w);
        manager_end(m);
    }
}

static char *copy_model(const char *from, const char *name) {
    size_t n = 0;
    char *bytes = text_file(from, &n);
    CHECK(bytes, "cannot read %s", from);
    return temp_file(name, bytes, n);
}

static void test_user(void) {
    if (geteuid() != 0) SKIP("not root");
    char *model = copy_model(tiny_model(), "guard-user.gguf");
    CHECK(chmod(model, 0600) == 0, "chmod"); /* for root alone: it is opened before root is given up */
    static const struct { const char *user, *uid, *gid; } rows[] = {{"65534:1234", "65534", "1234"}, {"nobody", "65534", "65534"}, {"4321", "4321", "4321"}};
    for (size_t i = 0; i < COUNT(rows); i++) {
        worker *w = ready_worker("--model", model, "--user", rows[i].user);
        char *status = proc_text(w, "status");
        CHECK_TEXT(status_value(status, "Uid"), text("%s\t%s\t%s\t%s", rows[i].uid, rows[i].uid, rows[i].uid, rows[i].uid), rows[i].user);
        CHECK_TEXT(status_value(status, "Gid"), text("%s\t%s\t%s\t%s", rows[i].gid, rows[i].gid, rows[i].gid, rows[i].gid), rows[i].user);
        CHECK_TEXT(status_value(status, "Groups"), "", "further groups");
        CHECK_TEXT(status_value(status, "CapEff"), "0000000000000000", "capabilities");
        CHECK_NUM(json_num(health(w->port), "sandbox.uid"), atoi(rows[i].uid), "uid");
        struct stat st;
        if (sandboxed()) /* whom the kernel takes for undumpable, root owns in /proc */
            CHECK(stat(text("/proc/%ld/environ", (long)w->pid), &st) == 0 && st.st_uid == 0, "the process can be read by its user");
        CHECK_NUM(stream_tokens(job_run(w->port, "'max_tokens':4,'ignore_eos':true")), 4, "tokens");
        worker_end(w);
    }
    static const char *const wrong[] = {"", "no-such-user", "-1", "1:x", "1:", "4294967295", "root:0x"};
    for (size_t i = 0; i < COUNT(wrong); i++) {
        worker *w = start("--model", model, "--user", wrong[i]);
        CHECK_NUM(worker_exit(w, bound_ms(5000)), 2, text("--user '%s'", wrong[i]));
        worker_drop(w);
    }
    unlink(model);
}

/* ==== A file that shrinks ====================================================================== */

static void check_lost(int port, const char *what) {
    double end = now_ms() + bound_ms(3000);
    reply *r;
    do {
        nap_ms(5);
        r = get(port, "/health");
    } while (r->status == 200 && now_ms() < end);
    CHECK_NUM(r->status, 503, text("%s: /health", what));
    CHECK_TEXT(json_str(r->body.p, "status"), "unhealthy", what);
    CHECK(strstr(json_str(r->body.p, "reason"), "model file"), "%s: %s", what, r->body.p);
    CHECK_NUM(get(port, "/readyz")->status, 503, text("%s: /readyz", what));
    CHECK_NUM(get(port, "/livez")->status, 503, text("%s: /livez", what));
    stream *s = job_run(port, "'max_tokens':4");
    CHECK_NUM(s->r->status, 503, text("%s: a new job", what));
}

static void test_file_cut(void) {
    NEED_SLOW_MODEL();
    for (int round = 0; round < 2; round++) {
        char *model = copy_model(slow_model(), "guard-cut.gguf");
        worker *w = ready_worker("--model", model, "--parallel", "2");
        char *whole = stream_text(job_run(w->port, "'max_tokens':60,'ignore_eos':true,'seed':5"));
        stream *s[3]; /* one decodes, one is in prefill, one waits */
        s[0] = job(w->port, "'max_tokens':2000,'ignore_eos':true,'seed':5");
        CHECK(stream_wait(s[0], 3, bound_ms(10000)), "no tokens");
        s[1] = job(w->port, "'prompt':'%s','max_tokens':4", text_times("word ", 2000));
        s[2] = job(w->port, "'max_tokens':9");
        CHECK(stream_event(s[1], "started", bound_ms(3000)) && stream_event(s[2], "started", bound_ms(3000)), "not started");
        CHECK(truncate(model, round ? 0 : 1 << 20) == 0, "truncate");
        for (int i = 0; i < 3; i++) {
            CHECK(stream_finish(s[i], bound_ms(5000)), "stream %d does not end", i);
            CHECK_TEXT(stream_code(s[i]), "INTERNAL", text("stream %d: %s", i, stream_last(s[i])));
        }
        char *got = stream_text(s[0]); /* nothing of what was computed from a file that is gone */
        size_t common = strlen(got) < strlen(whole) ? strlen(got) : strlen(whole);
        CHECK(!strncmp(got, whole, common), "'%s' is no beginning of '%s'", got, whole);
        check_lost(w->port, round ? "an empty file" : "a short file");
        CHECK(!worker_gone(w), "the worker ended");
        kill(w->pid, SIGTERM);
        CHECK_NUM(worker_exit(w, bound_ms(5000)), 0, "exit code");
        worker_drop(w);
        unlink(model);
    }
}

/* A SIGBUS that is not the model file's ends the worker, though the sandbox keeps it from giving the signal back. */
static void test_foreign_fault(void) {
    need_sandbox();
    worker *w = ready_worker("--model", tiny_model());
    if (json_num(health(w->port), "sandbox.seccomp") == 0) SKIP("no list of system calls for this machine");
    CHECK(health_wait(w->port, "sandbox.seccomp", 2, bound_ms(2000)), "seccomp: %s", health(w->port));
    kill(w->pid, SIGBUS);
    CHECK_NUM(worker_exit(w, bound_ms(5000)), 128 + SIGBUS, "exit code");
    worker_drop(w);
}

/* A file that is replaced the usual way, by rename or unlink, stays whole for those who have it. */
static void test_file_removed(void) {
    char *model = copy_model(tiny_model(), "guard-gone.gguf");
    worker *w = ready_worker("--model", model);
    unlink(model);
    CHECK_NUM(stream_tokens(job_run(w->port, "'max_tokens':8,'ignore_eos':true")), 8, "tokens");
    CHECK_NUM(get(w->port, "/health")->status, 200, "/health");
    worker_end(w);
}

/* ==== Secrets ================================================================================== */

/* How often a text stands in the memory of a process, environment and arguments included. */
static int found_in_memory(const worker *w, const char *secret) {
    char *maps = proc_text(w, "maps"), line[512];
    int fd = open(text("/proc/%ld/mem", (long)w->pid), O_RDONLY), n = 0;
    if (fd < 0) return -1;
    for (char *p = maps; *p; p += strcspn(p, "\n"), p += *p == '\n') {
        unsigned long from, to;
        snprintf(line, sizeof line, "%.*s", (int)strcspn(p, "\n"), p);
        if (sscanf(line, "%lx-%lx rw", &from, &to) != 2 || !strstr(line, " rw") || to - from > 1ul << 28) continue;
        char *bytes = malloc(to - from);
        ssize_t got = bytes ? pread(fd, bytes, to - from, (off_t)from) : 0;
        for (char *q = bytes; got > 0 && (q = memmem(q, (size_t)(bytes + got - q), secret, strlen(secret))) != NULL; q++) n++;
        free(bytes);
    }
    close(fd);
    return n;
}

static void test_secrets(void) {
    char *token = text("api-%ld-0123456789abcdef", (long)getpid()), *spawn = text("spawn-%ld-fedcba9876543210", (long)getpid());
    for (int way = 0; way < 3; way++) { /* from the environment, a file, the command line and a config file */
        manager *m = manager_start("200");
        char *url = text("http://127.0.0.1:%d/ready", m->port), *file = temp_file("token", token, strlen(token)), *config = text("spawn-token: %s\n", spawn);
        config = temp_file("config", config, strlen(config));
        worker *w = way == 0 ? ready_worker(text("LLORCH_API_TOKEN=%s", token), text("LLORCH_SPAWN_TOKEN=%s", spawn), "--model", tiny_model(), "--callback-url", url)
                  : way == 1 ? ready_worker("--api-token-file", file, "--spawn-token", spawn, "--model", tiny_model(), "--callback-url", url, "--log-level", "TRACE")
                             : ready_worker("--api-token-file", file, "--config", config, "--model", tiny_model(), "--callback-url", url);
        CHECK(manager_wait(m, 1, bound_ms(5000)), "no callback");
        CHECK(strstr(manager_call(m, 0).raw, text("Bearer %s", spawn)), "the spawn token is not in the callback");
        char *auth = text("Authorization: Bearer %s\r\n", token), *bad = text("Authorization: Bearer %sx\r\n", token);
        for (int i = 0; i < 3; i++) {
            CHECK_NUM(http(w->port, "GET", "/metrics", auth, NULL)->status, 200, "/metrics with the token");
            CHECK_NUM(http(w->port, "GET", "/metrics", bad, NULL)->status, 401, "/metrics with another");
            CHECK_NUM(http(w->port, "POST", "/execute", text("%sContent-Type: application/json\r\n", auth), "{}")->status, 400, "/execute");
        }
        CHECK(!strstr(worker_log(w), token) && !strstr(worker_log(w), spawn), "a token is in the log");
        static const char *const files[] = {"cmdline", "environ"};
        for (size_t i = 0; i < COUNT(files); i++) {
            size_t n = 0;
            char *s = text_file(text("/proc/%ld/%s", (long)w->pid, files[i]), &n);
            if (s) CHECK(!memmem(s, n, token, strlen(token)) && !memmem(s, n, spawn, strlen(spawn)), "way %d: a token is in %s", way, files[i]);
        }
        nap_ms(50);
        if (bound_ms(1) == 1) { /* a sanitizer keeps what was freed */
            int api = found_in_memory(w, token), other = found_in_memory(w, spawn);
            CHECK(found_in_memory(w, m->port ? url : "") != 0, "the search finds nothing at all"); /* -1: not allowed to look */
            CHECK(api <= 0 && other <= 0, "way %d: in memory: %d times the token, %d times the spawn token", way, api, other);
        }
        size_t n = 0;
        CHECK_TEXT(text_file(file, &n), token, "the token file is not changed");
        worker_end(w);
        manager_end(m);
        unlink(file), unlink(config);
    }
}

/* ==== Memory and descriptors =================================================================== */

static void test_max_memory(void) {
    worker *w = start("--model", tiny_model(), "--max-memory", "8");
    CHECK_NUM(worker_exit(w, bound_ms(5000)), 1, "--max-memory 8");
    CHECK(strstr(worker_log(w), "INSUFFICIENT_MEMORY") && strstr(worker_log(w), "memory_required_bytes"), "%s", worker_tail(w));
    worker_drop(w);
    w = start("--model", tiny_model(), "--kv-cache-size-mb", "4096", "--max-memory", "256");
    CHECK_NUM(worker_exit(w, bound_ms(5000)), 1, "a KV cache of 4 GiB");
    worker_drop(w);
    manager *m = manager_start("200");
    w = ready_worker("--model", tiny_model(), "--max-memory", "200", "--callback-url", text("http://127.0.0.1:%d/", m->port));
    CHECK(manager_wait(m, 1, bound_ms(5000)), "no callback");
    const char *body = strstr(manager_call(m, 0).raw, "\r\n\r\n");
    CHECK(body && json_num(body + 4, "memory_bytes") <= 200 * 1048576.0, "announced: %s", body ? body : "");
    worker_end(w);
    manager_end(m);
}

/* With few descriptors: connections wait in the queue, are taken when others go, and /health comes back. */
static void test_few_descriptors(void) {
    struct rlimit old, few = {48, 48};
    conn *c[80];
    getrlimit(RLIMIT_NOFILE, &old);
    few.rlim_max = old.rlim_max;
    setrlimit(RLIMIT_NOFILE, &few);
    worker *w = ready_worker("--model", tiny_model());
    setrlimit(RLIMIT_NOFILE, &old);
    /* The worker raises its soft limit; what is left is lowered from outside. */
    few.rlim_max = 48;
    if (prlimit(w->pid, RLIMIT_NOFILE, &few, NULL)) SKIP("prlimit is not allowed");
    for (size_t i = 0; i < COUNT(c); i++) c[i] = conn_open(w->port);
    nap_ms(300); /* accept fails meanwhile, and is tried again */
    CHECK(!worker_gone(w), "the worker ended: %s", worker_tail(w));
    for (size_t i = 0; i < COUNT(c); i++) conn_close(c[i]);
    CHECK_NUM(get(w->port, "/health")->status, 200, "/health afterwards");
    CHECK_NUM(stream_tokens(job_run(w->port, "'max_tokens':4,'ignore_eos':true")), 4, "tokens");
    worker_end(w);
}

static const test tests[] = {
    {"sandbox: every thread, as the kernel says [SYS-9.1]", test_sandbox},
    {"sandbox: --no-sandbox", test_no_sandbox},
    {"sandbox: the callback goes out of it, with retries [SYS-5.3.1]", test_sandbox_callback},
    {"sandbox: --user", test_user},
    {"sandbox: a SIGBUS from elsewhere ends the worker", test_foreign_fault},
    {"a model file that is cut ends the jobs, not the worker", test_file_cut},
    {"a model file that is removed changes nothing", test_file_removed},
    {"secrets: not in memory, environment, arguments or logs [SYS-9.1]", test_secrets},
    {"memory: --max-memory is kept, or refused with the numbers", test_max_memory},
    {"descriptors: accept waits until some are free", test_few_descriptors},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
