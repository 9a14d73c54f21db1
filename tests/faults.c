/* faults.c: a worker's whole life, with one call to the system after the other failing. MIT licence.
 *
 * $LORCH_FAULTS is a lorch built with tests/faults.h. A life is: start, callback, two jobs, a cancel, the probes,
 * shutdown. It is lived once undisturbed, to count the calls of each kind, then with the N-th failing, N = 1, 2, ...
 * (all of them if LORCH_TEST_FULL is set, else some). Whatever fails, the worker must come to its end in time, with an
 * exit code of its own, leak nothing (where it is built with a sanitizer), and never send a wrong token. */
#define _GNU_SOURCE
#include "harness.h"

static char *right_text; /* what an undisturbed job says */
static char reports[300];

typedef struct { bool ready, ended, refused; long count; } life_result;

static stream *try_job(int port, const char *fields, int ms) {
    stream *s = execute(port, "/execute", "", job_body(q(fields)));
    stream_finish(s, ms);
    return s;
}

static void live(const char *fault, const char *kind, life_result *r) {
    memset(r, 0, sizeof *r);
    alarm(bound_ms(60000) / 1000); /* for this life */
    manager *m = manager_start("200");
    worker *w = process_start(getenv("LORCH_FAULTS"), (const char *const[]){
        text("LORCH_FAULT=%s", fault), "LORCH_FAULT_COUNTS=1", text("ASAN_OPTIONS=log_path=%s", reports), "--model", tiny_model(), "--callback-url",
        text("http://127.0.0.1:%d/ready", m->port), "--threads", "2", "--parallel", "2", "--drain-timeout", "1", "--header-timeout-ms", "1000", NULL});
    int port = worker_port(w);
    double end = now_ms() + bound_ms(4000);
    while (port && !worker_gone(w) && now_ms() < end && !r->ready) {
        r->ready = health_status(port) == 200;
        if (!r->ready) nap_ms(2);
    }
    if (r->ready) {
        stream *s = try_job(port, "'max_tokens':6,'temperature':0,'ignore_eos':true", bound_ms(3000));
        r->ended = strstr(stream_last(s) ? stream_last(s) : "", "MAX_TOKENS") != NULL;
        char *got = stream_text(s);
        if (right_text) CHECK(!strncmp(got, right_text, strlen(got)), "%s: '%s' instead of '%s'", fault, got, right_text);
        else right_text = strdup(got);
        if (r->ended && *fault) CHECK_TEXT(got, right_text, fault);
        conn_close(s->c);
        stream *b = job(port, "'max_tokens':400,'ignore_eos':true");
        stream_wait(b, 1, bound_ms(300));
        conn *c = conn_open(port);
        conn_text(c, request(port, "POST", "/cancel", "", text("{\"job_id\":\"%s\"}", b->job_id)));
        reply_read_as(c, false, bound_ms(500));
        conn_close(c);
        stream_finish(b, bound_ms(2000));
        conn_close(b->c);
        static const char *const paths[] = {"/metrics", "/livez", "/nowhere"};
        for (size_t i = 0; i < COUNT(paths); i++) {
            conn *p = conn_open(port);
            conn_text(p, request(port, "GET", paths[i], "", NULL));
            reply_read_as(p, false, bound_ms(500));
            conn_close(p);
        }
    }
    if (!worker_gone(w)) kill(w->pid, SIGTERM);
    int code = worker_exit(w, bound_ms(7000));
    CHECK(code == 0 || code == 1 || code == 3, "%s: exit code %d: %s", fault, code, worker_tail(w));
    char *log = worker_log(w), *counts = strstr(log, "faults:"), *at = counts && *kind ? strstr(counts, text(" %s ", kind)) : NULL;
    if (at) r->count = strtol(at + strlen(kind) + 2, NULL, 10);
    CHECK(strchr(fault, '+') || code != 0 || r->ready || strstr(log, "\"shutdown\"") || !strncmp(fault, "write", 5),
          "%s: ended well without having been ready: %s", fault, worker_tail(w));
    worker_drop(w);
    manager_end(m);
}

/* The step from one failing call to the next: a short run lives about `lives` lives. */
static void each_of(const char *kind, const char *how, int lives) {
    life_result calm, r;
    int ready = 0, n = 0;
    if (!getenv("LORCH_FAULTS")) SKIP("LORCH_FAULTS is not set");
    live("", kind, &calm);
    CHECK(calm.ready && calm.ended, "the undisturbed life");
    CHECK(calm.count > 0, "no calls of the kind %s", kind);
    long step = getenv("LORCH_TEST_FULL") || calm.count <= lives ? 1 : calm.count / lives;
    for (long at = 1; at <= calm.count + 3 && !results.bad; at += step, n++) {
        live(text("%s:%ld%s", kind, at, how), kind, &r);
        ready += r.ready;
    }
    printf("# %s%s: %d of %ld calls failed in turn, %d of these lives were ready\n", kind, how, n, calm.count, ready);
}

static void test_alloc(void) { each_of("alloc", "", 14); }
static void test_alloc_all(void) { each_of("alloc", "::+", 8); }
static void test_map(void) { each_of("map", "", 4); }
static void test_thread(void) { each_of("thread", "", 5); }
static void test_read(void) { each_of("read", "", 6); }
static void test_read_eintr(void) { each_of("read", text(":%d", EINTR), 4); }
static void test_write(void) { each_of("write", "", 6); }
static void test_write_eintr(void) { each_of("write", text(":%d", EINTR), 4); }
static void test_write_full(void) { each_of("write", text(":%d:+", ENOSPC), 4); }
static void test_accept(void) { each_of("accept", "", 4); }
static void test_accept_eintr(void) { each_of("accept", text(":%d", EINTR), 2); }
static void test_accept_aborted(void) { each_of("accept", text(":%d", ECONNABORTED), 2); }
static void test_open(void) { each_of("open", "", 6); }
static void test_socket(void) { each_of("socket", "", 6); }
static void test_poll(void) { each_of("poll", "", 6); }
static void test_poll_memory(void) { each_of("poll", text(":%d", ENOMEM), 4); }
static void test_clock(void) { each_of("clock", "", 8); }
static void test_random(void) { each_of("random", "", 3); }

/* ==== Limits of cgroups ======================================================================== */

/* Trees of files like the kernel's, with the limits of a group or of one above it. `want`: NULL, the worker starts;
 * else a part of the line with which it refuses. */
typedef struct { const char *path, *text; } cgroup_file;
typedef struct {
    const char *name;
    cgroup_file files[6];
    const char *want;
    int threads; /* to which the CPU quota leads; 0: not looked at */
} cgroup_row;

#define V2 "/sys/fs/cgroup/unit"
#define V1 "/sys/fs/cgroup/memory/unit"
static const cgroup_row cgroup_rows[] = {
    {"v2, no limit", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "max\n"}, {V2 "/memory.current", "9000000\n"}}, NULL, 0},
    {"v2, a large limit", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "999000000\n"}, {V2 "/memory.current", "9000000\n"}}, NULL, 0},
    {"v2, a small limit", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "2000000\n"}, {V2 "/memory.current", "0\n"}}, "but 2000000 are available", 0},
    {"v2, a group that is full", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "999000000\n"}, {V2 "/memory.current", "998000000\n"}},
     "but 1000000 are available", 0},
    {"v2, full of file pages", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "999000000\n"}, {V2 "/memory.current", "998000000\n"},
     {V2 "/memory.stat", "anon 1000000\ninactive_file 997000000\nactive_file 0\n"}}, NULL, 0},
    {"v2, a limit far above", {{"/proc/self/cgroup", "0::/unit/a/b\n"}, {V2 "/a/b/memory.max", "max\n"}, {V2 "/a/b/memory.current", "0\n"},
     {V2 "/memory.max", "3000000\n"}, {V2 "/memory.current", "1000000\n"}}, "but 2000000 are available", 0},
    {"v1, a small limit", {{"/proc/self/cgroup", "7:cpu,cpuacct:/x\n4:memory:/unit\n0::/y\n"}, {V1 "/memory.limit_in_bytes", "2000000\n"},
     {V1 "/memory.usage_in_bytes", "0\n"}}, "but 2000000 are available", 0},
    {"v1, full of file pages", {{"/proc/self/cgroup", "4:memory:/unit\n"}, {V1 "/memory.limit_in_bytes", "999000000\n"}, {V1 "/memory.usage_in_bytes", "999000000\n"},
     {V1 "/memory.stat", "cache 998000000\ntotal_inactive_file 998000000\n"}}, NULL, 0},
    {"v1, another controller's group", {{"/proc/self/cgroup", "4:cpuset:/unit\n"}, {V1 "/memory.limit_in_bytes", "2000000\n"}, {V1 "/memory.usage_in_bytes", "0\n"}},
     NULL, 0},
    {"less than weights and all, use unknown", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/memory.max", "3000000\n"}},
     "do not fit into the 3000000 bytes", 0},
    {"files that say nothing", {{"/proc/self/cgroup", "0::/unit\nnonsense\n:\n9:\n"}, {V2 "/memory.max", ""},
     {V2 "/memory.current", "x\n"}, {V2 "/cpu.max", "1\n"}}, NULL, 0},
    {"v2, half a CPU", {{"/proc/self/cgroup", "0::/unit\n"}, {V2 "/cpu.max", "50000 100000\n"}}, NULL, 1},
    {"v1, half a CPU", {{"/proc/self/cgroup", "7:cpu,cpuacct:/unit\n"}, {"/sys/fs/cgroup/cpu/unit/cpu.cfs_quota_us", "50000\n"},
     {"/sys/fs/cgroup/cpu/unit/cpu.cfs_period_us", "100000\n"}}, NULL, 1},
};

static void cgroup_write(const char *root, const cgroup_file *f) { /* with the directories above it */
    char *path = text("%s%s", root, f->path);
    for (char *p = path + 1; *p; p++)
        if (*p == '/') *p = 0, mkdir(path, 0777), *p = '/';
    FILE *out = fopen(path, "w");
    REQUIRE(out, "%s: %s", path, strerror(errno));
    fputs(f->text, out);
    fclose(out);
}

static void test_cgroups(void) {
    if (!getenv("LORCH_FAULTS")) SKIP("LORCH_FAULTS is not set");
    for (size_t i = 0; i < COUNT(cgroup_rows); i++) {
        const cgroup_row *row = &cgroup_rows[i];
        char *root = text("%s/cgroup-%ld-%zu", env_or("LORCH_REPORTS", "build/test"), (long)getpid(), i);
        for (int f = 0; f < 6 && row->files[f].path; f++) cgroup_write(root, &row->files[f]);
        worker *w = process_start(getenv("LORCH_FAULTS"), (const char *const[]){text("LORCH_FAULT_ROOT=%s", root), "--model", tiny_model(),
                                  "--parallel", "1", row->threads ? NULL : "--threads", "1", NULL});
        if (row->want) {
            CHECK_NUM(worker_exit(w, bound_ms(5000)), 1, row->name);
            CHECK(strstr(worker_log(w), "INSUFFICIENT_MEMORY") && strstr(worker_log(w), row->want), "%s: %s", row->name, worker_tail(w));
            worker_drop(w);
        } else {
            CHECK(worker_ready(w), "%s: not ready: %s", row->name, worker_tail(w));
            char *loaded = log_event(w, "model_load_complete", 500);
            REQUIRE(loaded, "%s: %s", row->name, worker_tail(w));
            if (row->threads) CHECK_NUM(json_num(loaded, "threads"), row->threads, row->name);
            if (row->threads) CHECK_TEXT(json_str(loaded, "threads_because"), "cgroup CPU quota", row->name);
            worker_end(w);
        }
        CHECK(system(text("rm -rf '%s'", root)) == 0, "%s stays", root);
    }
}

static const test tests[] = {
    {"allocations", test_alloc}, {"all allocations from one on", test_alloc_all}, {"mappings", test_map}, {"threads", test_thread},
    {"reads", test_read}, {"reads, interrupted", test_read_eintr}, {"writes", test_write}, {"writes, interrupted", test_write_eintr},
    {"writes, disk full from one on", test_write_full}, {"accept, no descriptors", test_accept}, {"accept, interrupted", test_accept_eintr},
    {"accept, aborted", test_accept_aborted}, {"files and pipes", test_open}, {"sockets", test_socket}, {"poll, interrupted", test_poll},
    {"poll, no memory", test_poll_memory}, {"clocks", test_clock}, {"random numbers", test_random},
    {"limits of cgroups, in made files", test_cgroups},
};

int main(int argc, char **argv) {
    snprintf(reports, sizeof reports, "%s/faults-report", env_or("LORCH_REPORTS", "build/test"));
    return tests_main(tests, COUNT(tests), argc, argv);
}
