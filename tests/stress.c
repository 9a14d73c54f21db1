/* stress.c: a crowd at the door, and a long day. MIT licence.
 *
 *   stress                      the crowd (500 streams, 500 idle connections, 200 that never finish their head), and a
 *                               mixed load of some seconds
 *   LORCH_SOAK_MINUTES=60 stress soak      the same mixed load for an hour
 *
 * No stream may lose an event, /health must answer at once, and under the mixed load resident memory and open
 * descriptors must stay where they are. One thread, one poll loop; jobs come by HTTP/1.0, so that a stream is its events. */
#define _GNU_SOURCE
#include "harness.h"

#include <dirent.h>
#include <sys/resource.h>

/* ==== Clients ================================================================================== */

enum kind { NONE, STREAM, LEAVER, CANCELLED, IDLE, SLOW, PLAIN, NONSENSE };

typedef struct {
    int fd;
    enum kind kind;
    char *in;          /* what came, on the heap */
    size_t n, cap;
    int tokens, id;    /* asked for */
    double began;
    bool done;
} client;

static int open_fd(int port) {
    int fd = tcp_connect(port);
    if (fd >= 0) fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void say(int fd, const char *s) { /* small enough for any socket buffer */
    if (fd >= 0 && send(fd, s, strlen(s), MSG_NOSIGNAL) < 0) return;
}

static void ask(client *c, int port, int id, int tokens, const char *prompt, enum kind kind) {
    char body[4096], text[5000];
    int n = snprintf(body, sizeof body,
                     "{\"job_id\":\"s-%ld-%d\",\"prompt\":\"%s\",\"max_tokens\":%d,\"ignore_eos\":true,\"seed\":%d}", (long)getpid(), id, prompt, tokens, id);
    snprintf(text, sizeof text, "POST /execute HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", n, body);
    memset(c, 0, sizeof *c);
    c->fd = open_fd(port), c->kind = kind, c->tokens = tokens, c->id = id, c->began = now_ms();
    say(c->fd, text);
}

static void drop(client *c) {
    if (c->fd >= 0) close(c->fd);
    free(c->in);
    memset(c, 0, sizeof *c);
    c->fd = -1;
}

/* Reads what there is; done at the end of the stream. */
static void hear(client *c) {
    for (;;) {
        if (c->cap - c->n < 8192) c->in = mem_check(realloc(c->in, c->cap = c->cap * 2 + 16384));
        ssize_t got = recv(c->fd, c->in + c->n, c->cap - c->n - 1, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (got <= 0) c->done = true;
        if (got <= 0) return;
        c->n += (size_t)got, c->in[c->n] = 0;
    }
}

/* What is wrong with a finished stream, or NULL: every token once and in order, then the end. */
static const char *lost(const client *c) {
    int next = 0;
    const char *p = c->in ? strstr(c->in, "\r\n\r\n") : NULL;
    if (!p || strncmp(c->in, "HTTP/1.1 200", 12)) return "no answer";
    if (!strstr(p, "data: {\"type\":\"started\"")) return "no started";
    for (p = strstr(p, "data: {\"type\":\"token\""); p; p = strstr(p + 1, "data: {\"type\":\"token\"")) {
        const char *i = strstr(p, "\"i\":");
        if (!i || atoi(i + 4) != next++) return "a token is missing";
    }
    const char *end = strstr(c->in, "data: {\"type\":\"end\""), *count = end ? strstr(end, "\"tokens_out\":") : NULL;
    if (c->kind == CANCELLED) return end || strstr(c->in, "\"code\":\"CANCELLED\"") ? NULL : "no end of a cancelled job";
    return !count ? "no end" : atoi(count + 13) != c->tokens || next != c->tokens ? "tokens are missing at the end" : NULL;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* ==== The crowd ================================================================================ */

enum { STREAMS = 500, IDLERS = 500, SLOWS = 200, CROWD = STREAMS + IDLERS + SLOWS, PROBES = 20000 };

static void test_crowd(void) {
    static client c[CROWD];
    static struct pollfd p[CROWD + 1];
    static double ms[PROBES];
    struct rlimit files;
    int port, n_ms = 0, streams = 0, bad = 0, tokens = bound_ms(1) > 1 ? 10 : 60;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max < 8192 ? files.rlim_max : 8192;
    setrlimit(RLIMIT_NOFILE, &files);
    if (files.rlim_cur < CROWD + 100) SKIP("too few descriptors are allowed");
    worker *w = ready_worker("--model", tiny_model(), "--parallel", "16", "--queue", "600", "--max-tokens-out", "100", "--header-timeout-ms", "3000",
                             "--log-level", "ERROR");
    port = w->port;
    for (int i = 0; i < CROWD; i++) {
        if (i < STREAMS) ask(&c[i], port, i, tokens, "Once upon a time", STREAM);
        else {
            c[i].fd = open_fd(port), c[i].kind = i < STREAMS + IDLERS ? IDLE : SLOW;
            if (c[i].kind == SLOW) say(c[i].fd, "GET /health HTTP/1.1\r\n");
        }
    }
    double begun = now_ms(), end = begun + bound_ms(60000), sent = 0, drip = begun;
    int probe = open_fd(port);
    bool asked = false;
    while (streams < STREAMS && now_ms() < end) {
        if (!asked && n_ms < PROBES && now_ms() - sent >= 2) say(probe, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"), sent = now_ms(), asked = true;
        if (now_ms() - drip > 100) { /* one byte more from each that is slow */
            drip = now_ms();
            for (int i = STREAMS + IDLERS; i < CROWD; i++) say(c[i].fd, "x");
        }
        for (int i = 0; i < CROWD; i++) p[i] = (struct pollfd){c[i].kind == STREAM && !c[i].done ? c[i].fd : -1, POLLIN, 0};
        p[CROWD] = (struct pollfd){probe, POLLIN, 0};
        poll(p, CROWD + 1, 1);
        if (p[CROWD].revents) {
            char answer[8192];
            ssize_t n = recv(probe, answer, sizeof answer - 1, 0);
            if (n > 0 && asked) ms[n_ms++] = now_ms() - sent, asked = false;
        }
        for (int i = 0; i < STREAMS; i++)
            if (p[i].revents) {
                hear(&c[i]);
                streams += c[i].done;
            }
    }
    double took = now_ms() - begun;
    for (int i = 0; i < STREAMS; i++) {
        const char *what = c[i].done ? lost(&c[i]) : "not over";
        if (what && bad++ < 3) CHECK(false, "stream %d: %s: %.200s", i, what, c[i].in ? c[i].in : "");
    }
    CHECK(bad == 0, "%d streams of %d", bad, STREAMS);
    CHECK(n_ms > 20, "only %d answers of /health", n_ms);
    qsort(ms, (size_t)n_ms, sizeof *ms, by_value);
    double p99 = n_ms ? ms[n_ms * 99 / 100] : 0;
    CHECK(p99 < bound_ms(100), "/health takes %.1f ms", p99); /* on a machine that has other things to do */
    printf("# %d streams of %d tokens in %.1f s; /health, %d times: p50 %.2f, p99 %.2f, most %.2f ms\n", STREAMS, tokens, took / 1000, n_ms, n_ms ? ms[n_ms / 2] : 0, p99,
           n_ms ? ms[n_ms - 1] : 0);
    for (int i = 0; i < CROWD; i++) drop(&c[i]);
    close(probe);
    CHECK_NUM(get(port, "/health")->status, 200, "/health afterwards");
    worker_end(w);
}

/* ==== Too much at once ========================================================================= */

static double resident_mb(const worker *w) {
    double pages = 0, resident = 0;
    char *s = text_file(text("/proc/%ld/statm", (long)w->pid), NULL);
    if (s) sscanf(s, "%lf %lf", &pages, &resident);
    return resident * (double)sysconf(_SC_PAGESIZE) / 1048576;
}

/* 200 bodies of nearly a MiB that do not end: most are refused with 503, small requests are still served, and the
 * process does not grow beyond what it has announced. */
static void test_flood(void) {
    enum { BODIES = 200 };
    int fd[BODIES], busy = 0;
    char *part = text_times("x", 65536);
    worker *w = ready_worker("--model", tiny_model());
    double before = resident_mb(w), announced = json_num(health(w->port), "memory.requests") / 1048576;
    CHECK(announced > 1, "memory.requests: %s", health(w->port));
    for (int i = 0; i < BODIES; i++) {
        fd[i] = open_fd(w->port);
        say(fd[i], "POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1048576\r\n\r\n");
    }
    for (int k = 0; k < 15; k++) {
        for (int i = 0; i < BODIES; i++)
            if (fd[i] >= 0 && send(fd[i], part, 65536, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN) close(fd[i]), fd[i] = -1, busy++;
        CHECK_NUM(get(w->port, "/health")->status, 200, "/health");
    }
    for (int i = 0; i < BODIES; i++) {
        char answer[13] = "";
        if (fd[i] >= 0 && recv(fd[i], answer, 12, MSG_DONTWAIT) == 12) busy += !strcmp(answer, "HTTP/1.1 503");
    }
    double after = resident_mb(w);
    CHECK(busy < BODIES, "all bodies were refused");
    CHECK(busy > BODIES / 2, "only %d of %d bodies were refused", busy, BODIES);
    if (bound_ms(1) == 1) CHECK(after - before < announced + 8, "%.1f MiB more, but %.1f were announced", after - before, announced);
    printf("# %d of %d large bodies at once are refused; %.1f MiB more, %.1f announced\n", busy, BODIES, after - before, announced);
    for (int i = 0; i < BODIES; i++)
        if (fd[i] >= 0) close(fd[i]);
    CHECK_NUM(stream_tokens(job_run(w->port, "'max_tokens':4,'ignore_eos':true")), 4, "tokens afterwards");
    worker_end(w);
}

/* ==== The long day ============================================================================= */

static unsigned long long dice_state = 1;
static unsigned dice(unsigned sides) {
    unsigned long long z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (unsigned)((z ^ z >> 31) % sides);
}

static int descriptors(const worker *w) {
    int n = 0;
    DIR *d = opendir(text("/proc/%ld/fd", (long)w->pid));
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) n += *e->d_name != '.';
    if (d) closedir(d);
    return n;
}

static void begin_client(client *c, int port, int id) {
    static const char *const prompts[] = {"Once upon a time", "A fox and a kite. A fox and a kite. A", "x", "One morning Omar wanted the river more than anything."};
    static const char *const nonsense[] = {
        "GET / HTTP/9.9\r\n\r\n", "\r\n\r\n\r\n", "POST /execute HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n{{{", "\x16\x03\x01",
                                           "GET /metrics HTTP/1.0\r\n\r\n", "GET /health HTTP/1.0\r\n\r\n", "POST /cancel HTTP/1.0\r\nContent-Length: 2\r\n\r\n[]"};
    unsigned fate = dice(10);
    if (fate < 2) {
        memset(c, 0, sizeof *c);
        c->fd = open_fd(port), c->kind = NONSENSE, c->began = now_ms();
        say(c->fd, nonsense[dice(COUNT(nonsense))]);
        shutdown(c->fd, SHUT_WR);
    } else ask(c, port, id, 1 + (int)dice(dice(8) ? 40 : 300), prompts[dice(COUNT(prompts))], fate == 2 ? LEAVER : fate == 3 ? CANCELLED : STREAM);
}

static void soak(double minutes) {
    enum { CLIENTS = 24, SAMPLES = 4000 };
    static client c[CLIENTS];
    static double mb[SAMPLES];
    static int fds[SAMPLES];
    long jobs = 0, streams = 0, tokens = 0, left = 0, cancelled = 0, other = 0, bad = 0;
    int n = 0, id = 1000;
    worker *w = ready_worker("--model", tiny_model(), "--parallel", "6", "--queue", "40", "--log-level", "ERROR");
    double begun = now_ms(), end = begun + minutes * 60000, step = minutes * 60000 / 200, next = begun + minutes * 60000 / 5;
    if (step < 50) step = 50;
    for (int i = 0; i < CLIENTS; i++) begin_client(&c[i], w->port, id++);
    alarm((unsigned)(minutes * 60) + 120);
    while (now_ms() < end && !worker_gone(w) && bad < 5) {
        struct pollfd p[CLIENTS];
        for (int i = 0; i < CLIENTS; i++) p[i] = (struct pollfd){c[i].fd, POLLIN, 0};
        poll(p, CLIENTS, 5);
        for (int i = 0; i < CLIENTS; i++) {
            if (c[i].fd >= 0 && p[i].revents) hear(&c[i]);
            bool waited = now_ms() - c[i].began > 20;
            if (c[i].kind == CANCELLED && waited && c[i].tokens > 0) {
                int fd = open_fd(w->port);
                say(fd, text("POST /cancel/s-%ld-%d HTTP/1.0\r\nHost: localhost\r\n\r\n", (long)getpid(), c[i].id));
                if (fd >= 0) close(fd);
                c[i].tokens = -1, cancelled++;
                mem_drop();
            }
            if (c[i].fd >= 0 && !c[i].done && !(c[i].kind == LEAVER && waited)) continue;
            const char *what = c[i].kind == STREAM || c[i].kind == CANCELLED ? lost(&c[i]) : NULL;
            if (what && !(c[i].in && strstr(c[i].in, "ALL_SLOTS_BUSY"))) bad++, CHECK(false, "job %d: %s: %.300s", c[i].id, what, c[i].in ? c[i].in : "");
            streams += c[i].kind == STREAM, left += c[i].kind == LEAVER, other += c[i].kind == NONSENSE;
            if (c[i].kind == STREAM) tokens += c[i].tokens;
            jobs++;
            drop(&c[i]);
            begin_client(&c[i], w->port, id++);
        }
        if (now_ms() > next && n < SAMPLES) mb[n] = resident_mb(w), fds[n++] = descriptors(w), next += step, mem_drop();
    }
    CHECK(!worker_gone(w), "the worker ended: %s", worker_tail(w));
    for (int i = 0; i < CLIENTS; i++) drop(&c[i]);
    double least = 1e9, most = 0, early = 0, late = 0;
    int few = 1 << 30, many = 0, part = n / 4 ? n / 4 : 1;
    for (int i = 0; i < n; i++) {
        if (mb[i] < least) least = mb[i];
        if (mb[i] > most) most = mb[i];
        if (fds[i] < few) few = fds[i];
        if (fds[i] > many) many = fds[i];
        early += i < part ? mb[i] / part : 0, late += i >= n - part ? mb[i] / part : 0;
    }
    CHECK(n >= 4, "only %d samples", n);
    if (bound_ms(1) == 1) CHECK(late - early < 3, "resident memory grew from %.2f to %.2f MiB", early, late);
    CHECK(many <= few + 2 * CLIENTS + 8, "descriptors: %d to %d", few, many);
    CHECK(health_wait(w->port, "jobs.running", 0, bound_ms(5000)), "a job is left over: %s", health(w->port));
    int base = descriptors(w);
    CHECK(base < 24, "%d descriptors are left open", base);
    CHECK_NUM(metric(w->port, "worker_kv_usage_ratio", ""), 0, "KV blocks that nobody gave back");
    printf("# %.1f minutes: %ld exchanges, %ld whole streams of %ld tokens, %ld clients that left, %ld cancels, %ld other requests; resident %.2f to %.2f MiB "
           "(first quarter %.2f, last %.2f), descriptors %d to %d, %d at rest\n", (now_ms() - begun) / 60000, jobs, streams,
           tokens, left, cancelled, other, least, most, early,
           late, few, many, base);
    worker_end(w);
}

static void test_soak(void) {
    const char *minutes = getenv("LORCH_SOAK_MINUTES");
    soak(minutes ? atof(minutes) : 0.12);
}

static const test tests[] = {
    {"500 streams, 500 idle connections, 200 slow ones: no event is lost", test_crowd},
    {"200 large bodies at once: the announced memory is kept", test_flood},
    {"soak: memory and descriptors stay flat under a mixed load", test_soak},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
