/* harness.h: what the black-box tests of lorch share. MIT licence.
 *
 * A test program includes this file first, writes one void function per test, lists them in a
 * table and ends with `return tests_main(...)`. The worker under test is a separate process that
 * is met only where a pool manager meets it: its flags, its environment, its sockets, its two
 * output pipes and its exit code. Nothing of lorch.c is included, and the HTTP client and the JSON
 * reader below are written from the standards, so that a mistake in lorch is not repeated here.
 *
 * Contents (each section has a banner):
 *   time and memory       clock, pauses, memory that is freed after each test, growing buffers
 *   results               CHECK, REQUIRE, SKIP, the table runner and its output
 *   JSON                  a strict reader with lookups by path: json_str(doc, "error.code")
 *   worker process        start, port line, log lines, signals, exit code
 *   HTTP client           raw requests, replies with Content-Length, chunked or closing bodies
 *   event streams         server-sent events with the time at which each arrived
 *   pool manager double   records ready callbacks and answers them from a script
 *   vocabulary            the few phrases most tests are written in: job(), get(), cancel()
 *
 * Environment: LORCH is the worker binary (./lorch), LORCH_MODELS the directory of the test models
 * (tests/models), LORCH_SLOW_MODEL a model whose jobs last for seconds, LORCH_TEST_SLOW=1 says that
 * the worker is instrumented and every bound on time is ten times as generous, LORCH_TEST_NO_SANDBOX
 * that workers run with --no-sandbox, since sanitizers open files at the end.
 *
 * Threads: tests run on the main thread. A worker's pipes and a manager double are served by one
 * thread each, which touch only their own structure, under its lock. */
#ifndef LORCH_HARNESS_H
#define LORCH_HARNESS_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ==== Time and memory ==========================================================================
 * Tests allocate freely with mem() and never free: the runner drops everything after each test. */

static inline double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static inline void nap_ms(int ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&t, &t) == -1 && errno == EINTR) {}
}

/* Every upper bound on a duration goes through here, so that instrumented builds get more time. */
static inline int bound_ms(int ms) {
    static int factor;
    if (!factor) {
        const char *slow = getenv("LORCH_TEST_SLOW");
        factor = slow && *slow && strcmp(slow, "0") ? 10 : 1;
    }
    return ms * factor;
}

typedef struct mem_block { struct mem_block *next; } mem_block;
static mem_block *mem_blocks; /* Main thread only. */

static inline void *mem_check(void *p) {
    if (p) return p;
    fputs("# out of memory\n", stderr);
    exit(1);
}

/* Zeroed memory that lives until the end of the running test. Main thread only. */
static inline void *mem(size_t n) {
    mem_block *b = mem_check(calloc(1, sizeof *b + 16 + n));
    b->next = mem_blocks;
    mem_blocks = b;
    return (char *)b + 16;
}

static inline void mem_drop(void) {
    while (mem_blocks) {
        mem_block *b = mem_blocks;
        mem_blocks = b->next;
        free(b);
    }
}

/* A growing string, always NUL-terminated. The ones that other threads fill, or that outlive a
 * test, set `heap` and own their memory; all others live in the test's memory. */
typedef struct { char *p; size_t n, cap; bool heap; } buf;

static inline void buf_room(buf *b, size_t more) {
    if (b->n + more + 1 <= b->cap) return;
    size_t cap = b->cap ? b->cap : 256;
    while (cap < b->n + more + 1) cap *= 2;
    if (b->heap) b->p = mem_check(realloc(b->p, cap));
    else {
        char *p = mem(cap);
        if (b->n) memcpy(p, b->p, b->n);
        b->p = p;
    }
    b->p[b->n] = 0;
    b->cap = cap;
}

static inline void buf_add(buf *b, const void *p, size_t n) {
    buf_room(b, n);
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
    b->p[b->n] = 0;
}

static inline void buf_str(buf *b, const char *s) { buf_add(b, s, strlen(s)); }

static inline void buf_vprint(buf *b, const char *format, va_list args) {
    va_list again;
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    if (n > 0) {
        buf_room(b, (size_t)n);
        vsnprintf(b->p + b->n, (size_t)n + 1, format, again);
        b->n += (size_t)n;
    }
    va_end(again);
}

static inline void buf_print(buf *b, const char *format, ...) {
    va_list args;
    va_start(args, format);
    buf_vprint(b, format, args);
    va_end(args);
}

static inline void buf_free(buf *b) {
    if (b->heap) free(b->p);
    b->p = NULL;
    b->n = b->cap = 0;
}

static inline char *text_n(const char *s, size_t n) {
    char *copy = mem(n + 1);
    if (n) memcpy(copy, s, n);
    return copy;
}

/* printf into the test's memory. */
static inline char *text(const char *format, ...) {
    buf b = {0};
    va_list args;
    va_start(args, format);
    buf_room(&b, 1);
    buf_vprint(&b, format, args);
    va_end(args);
    return b.p;
}

/* `s` written n times. */
static inline char *text_times(const char *s, size_t n) {
    buf b = {0};
    buf_room(&b, strlen(s) * n);
    while (n--) buf_str(&b, s);
    return b.p;
}

/* The whole of a file, or NULL. */
static inline char *text_file(const char *path, size_t *len) {
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    buf b = {0};
    char part[4096];
    size_t n;
    buf_room(&b, 1);
    while ((n = fread(part, 1, sizeof part, f)) > 0) buf_add(&b, part, n);
    fclose(f);
    if (len) *len = b.n;
    return b.p;
}

/* Writes a file into the directory for temporary files; gives its path. */
static inline char *temp_file(const char *name, const char *content, size_t n) {
    const char *dir = getenv("TMPDIR");
    char *path = text("%s/lorch-test-%ld-%s", dir && *dir ? dir : "/tmp", (long)getpid(), name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(content, 1, n, f) != n || fclose(f)) {
        fprintf(stderr, "# cannot write %s\n", path);
        exit(1);
    }
    return path;
}

/* ==== Results ==================================================================================
 * One line per test, `ok - name`, `not ok - name` or `ok - name # SKIP why`, the reasons for a
 * failure below it as `# ` lines. CHECK notes a failure and goes on, REQUIRE leaves the test. */

typedef struct { const char *name; void (*run)(void); } test;

static struct {
    const char *name, *skip;
    int run, failed, skipped, details;
    bool bad;
    buf detail;
} results = {.detail = {.heap = true}};

static inline void test_fail(const char *file, int line, const char *format, ...) {
    enum { ENOUGH = 12, LONGEST = 600 }; /* A broken worker should not bury its first symptom. */
    results.bad = true;
    if (results.details++ >= ENOUGH) return;
    size_t start = results.detail.n;
    const char *slash = strrchr(file, '/');
    buf_print(&results.detail, "# %s:%d: ", slash ? slash + 1 : file, line);
    size_t words = results.detail.n;
    va_list args;
    va_start(args, format);
    buf_vprint(&results.detail, format, args);
    va_end(args);
    if (results.detail.n > start + LONGEST) results.detail.n = start + LONGEST;
    for (size_t i = words; i < results.detail.n; i++) {
        unsigned char c = (unsigned char)results.detail.p[i];
        if (c < 32 || c == 127) results.detail.p[i] = c == '\n' ? '|' : '.';
    }
    buf_str(&results.detail, "\n");
}

#define CHECK(ok, ...) ((ok) ? (void)0 : test_fail(__FILE__, __LINE__, __VA_ARGS__))
#define REQUIRE(ok, ...) \
    do { if (!(ok)) { test_fail(__FILE__, __LINE__, __VA_ARGS__); return; } } while (0)
#define SKIP(why) do { results.skip = (why); return; } while (0)

/* Two texts or two numbers that should be equal, shown when they are not. */
static inline void test_text(const char *file, int line, const char *got, const char *want,
                             const char *what) {
    if (strcmp(got, want)) test_fail(file, line, "%s: is '%s', not '%s'", what, got, want);
}

static inline void test_num(const char *file, int line, double got, double want,
                            const char *what) {
    if (!(got >= want && got <= want)) /* This way round, NaN fails. */
        test_fail(file, line, "%s: is %.10g, not %.10g", what, got, want);
}

#define CHECK_TEXT(got, want, what) test_text(__FILE__, __LINE__, (got), (want), (what))
#define CHECK_NUM(got, want, what) \
    test_num(__FILE__, __LINE__, (double)(got), (double)(want), (what))

enum { MAX_PIDS = 128 };
static volatile sig_atomic_t live_pids[MAX_PIDS]; /* Read by signal handlers and at exit. */

static inline void pid_note(pid_t from, pid_t to) {
    for (int i = 0; i < MAX_PIDS; i++)
        if (live_pids[i] == (sig_atomic_t)from) { live_pids[i] = (sig_atomic_t)to; return; }
}

/* No worker may outlive its test program, however that ends. */
static inline void pids_kill(void) {
    for (int i = 0; i < MAX_PIDS; i++)
        if (live_pids[i] > 0) kill((pid_t)live_pids[i], SIGKILL);
}

static inline void tests_give_up(int sig) {
    const char *why = sig == SIGALRM ? " (hangs; the rest was not run)\n" : " (killed)\n";
    pids_kill();
    if (write(1, "not ok - ", 9) < 0 || write(1, results.name, strlen(results.name)) < 0 ||
        write(1, why, strlen(why)) < 0)
        _exit(2);
    _exit(1);
}

static inline void conns_close(void);

static inline void test_one(const test *t) {
    results.name = t->name;
    results.skip = NULL;
    results.bad = false;
    results.details = 0;
    results.detail.n = 0;
    alarm((unsigned)bound_ms(60000) / 1000);
    double start = now_ms();
    t->run();
    alarm(0);
    conns_close();
    results.run++;
    results.failed += results.bad;
    results.skipped += results.skip && !results.bad;
    printf("%s - %s", results.bad ? "not ok" : "ok", t->name);
    if (results.skip) printf(" # SKIP %s", results.skip);
    else if (getenv("LORCH_TEST_TIMES")) printf(" # %.0f ms", now_ms() - start);
    printf("\n%.*s", (int)results.detail.n, results.detail.n ? results.detail.p : "");
    if (results.details > 12) printf("# and %d more\n", results.details - 12);
    fflush(stdout);
    mem_drop();
}

/* True if the test's name contains one of the arguments, or there are none. */
static inline bool tests_selected(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strstr(name, argv[i])) return true;
    return argc < 2;
}

static inline int tests_main(const test *tests, size_t n, int argc, char **argv) {
    struct sigaction die = {.sa_handler = tests_give_up};
    sigaction(SIGALRM, &die, NULL);
    sigaction(SIGINT, &die, NULL);
    sigaction(SIGTERM, &die, NULL);
    signal(SIGPIPE, SIG_IGN);
    results.name = "start";
    atexit(pids_kill);
    for (size_t i = 0; i < n; i++)
        if (tests_selected(tests[i].name, argc, argv)) test_one(&tests[i]);
    printf("# %d tests, %d failed, %d skipped\n", results.run, results.failed, results.skipped);
    buf_free(&results.detail);
    return results.failed ? 1 : 0;
}

/* ==== JSON =====================================================================================
 * A strict reader of RFC 8259 texts, UTF-8 included. The document is a tree in the test's memory.
 * Lookups of what is absent give values that no check takes for right: "(none)" and NaN. */

typedef struct json {
    char type;              /* 'o' object, 'a' array, 's' string, 'n' number, 't', 'f', 'z' null */
    const char *key;        /* within an object */
    const char *str;        /* the decoded string, or the literal of a number, true, false, null */
    struct json *child, *next;
} json;

typedef struct { const char *p, *end; int depth; } json_cursor;

/* Length of the UTF-8 sequence at p, 0 if it is malformed, overlong or a surrogate. */
static inline size_t utf8_len(const char *p, const char *end) {
    const unsigned char *s = (const unsigned char *)p;
    size_t n = s[0] < 0x80 ? 1 : s[0] >= 0xc2 && s[0] < 0xe0 ? 2
             : s[0] >= 0xe0 && s[0] < 0xf0 ? 3 : s[0] >= 0xf0 && s[0] < 0xf5 ? 4 : 0;
    if (n == 0 || (size_t)(end - p) < n) return 0;
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xe0 && s[1] < 0xa0) return 0;
    if (s[0] == 0xed && s[1] > 0x9f) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] > 0x8f) return 0;
    return n;
}

static inline void utf8_put(buf *b, unsigned long c) {
    char s[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (size_t i = n; i-- > 1; c >>= 6) s[i] = (char)(0x80 | (c & 0x3f));
    s[0] = (char)(lead[n] | c);
    buf_add(b, s, n);
}

static inline void json_space(json_cursor *c) {
    while (c->p < c->end && (*c->p == ' ' || *c->p == '\t' || *c->p == '\n' || *c->p == '\r'))
        c->p++;
}

static inline bool json_hex4(json_cursor *c, unsigned long *out) {
    *out = 0;
    for (int i = 0; i < 4; i++, c->p++) {
        if (c->p >= c->end || !isxdigit((unsigned char)*c->p)) return false;
        int d = tolower((unsigned char)*c->p);
        *out = *out * 16 + (unsigned long)(isdigit(d) ? d - '0' : d - 'a' + 10);
    }
    return true;
}

/* The escape after a backslash. Surrogates must come in pairs. */
static inline bool json_escape(json_cursor *c, buf *b) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    unsigned long high, low;
    if (c->p >= c->end) return false;
    char e = *c->p++;
    const char *known = e ? strchr(from, e) : NULL;
    if (known) { buf_add(b, &to[known - from], 1); return true; }
    if (e != 'u' || !json_hex4(c, &high)) return false;
    if (high >= 0xdc00 && high <= 0xdfff) return false;
    if (high >= 0xd800 && high <= 0xdbff) {
        if (c->end - c->p < 6 || *c->p++ != '\\' || *c->p++ != 'u') return false;
        if (!json_hex4(c, &low) || low < 0xdc00 || low > 0xdfff) return false;
        high = 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    }
    utf8_put(b, high);
    return true;
}

static inline const char *json_string(json_cursor *c) {
    buf b = {0};
    buf_room(&b, 1);
    if (c->p >= c->end || *c->p++ != '"') return NULL;
    while (c->p < c->end && *c->p != '"') {
        if ((unsigned char)*c->p < 0x20) return NULL;
        if (*c->p == '\\') {
            c->p++;
            if (!json_escape(c, &b)) return NULL;
            continue;
        }
        size_t n = utf8_len(c->p, c->end);
        if (!n) return NULL;
        buf_add(&b, c->p, n);
        c->p += n;
    }
    if (c->p++ >= c->end) return NULL;
    return b.p;
}

static inline bool json_digits(json_cursor *c) {
    const char *start = c->p;
    while (c->p < c->end && isdigit((unsigned char)*c->p)) c->p++;
    return c->p > start;
}

/* number = [ "-" ] int [ frac ] [ exp ] */
static inline bool json_number(json_cursor *c, json *v) {
    const char *start = c->p;
    if (*c->p == '-') c->p++;
    const char *first = c->p;
    if (!json_digits(c) || (*first == '0' && c->p - first > 1)) return false;
    if (c->p < c->end && *c->p == '.') {
        c->p++;
        if (!json_digits(c)) return false;
    }
    if (c->p < c->end && (*c->p == 'e' || *c->p == 'E')) {
        c->p++;
        if (c->p < c->end && (*c->p == '+' || *c->p == '-')) c->p++;
        if (!json_digits(c)) return false;
    }
    v->type = 'n';
    v->str = text_n(start, (size_t)(c->p - start));
    return true;
}

static inline json *json_value(json_cursor *c);

/* The members of an object or the elements of an array, after the opening bracket. */
static inline bool json_members(json_cursor *c, json *parent, char close) {
    json **tail = &parent->child;
    json_space(c);
    if (c->p < c->end && *c->p == close) { c->p++; return true; }
    for (;;) {
        const char *key = NULL;
        json_space(c);
        if (close == '}') {
            if (!(key = json_string(c))) return false;
            json_space(c);
            if (c->p >= c->end || *c->p++ != ':') return false;
        }
        json *v = json_value(c);
        if (!v) return false;
        v->key = key;
        *tail = v;
        tail = &v->next;
        json_space(c);
        if (c->p >= c->end) return false;
        if (*c->p == close) { c->p++; return true; }
        if (*c->p++ != ',') return false;
    }
}

static inline bool json_word(json_cursor *c, json *v, const char *word, char type) {
    size_t n = strlen(word);
    if ((size_t)(c->end - c->p) < n || memcmp(c->p, word, n)) return false;
    c->p += n;
    v->type = type;
    v->str = word;
    return true;
}

static inline json *json_value(json_cursor *c) {
    json *v = mem(sizeof *v);
    bool ok = false;
    json_space(c);
    if (c->p >= c->end || ++c->depth > 500) return NULL;
    switch (*c->p) {
    case '{': c->p++; v->type = 'o'; ok = json_members(c, v, '}'); break;
    case '[': c->p++; v->type = 'a'; ok = json_members(c, v, ']'); break;
    case '"': v->type = 's'; ok = (v->str = json_string(c)) != NULL; break;
    case 't': ok = json_word(c, v, "true", 't'); break;
    case 'f': ok = json_word(c, v, "false", 'f'); break;
    case 'n': ok = json_word(c, v, "null", 'z'); break;
    default: ok = json_number(c, v);
    }
    c->depth--;
    return ok ? v : NULL;
}

/* The document, or NULL if it is not exactly one JSON value. */
static inline json *json_parse(const char *doc, size_t n) {
    json_cursor c = {doc, doc + n, 0};
    json *v = doc ? json_value(&c) : NULL;
    json_space(&c);
    return v && c.p == c.end ? v : NULL;
}

/* The value at "a.b.0.c": names of members and, for arrays, indices. */
static inline const json *json_at(const json *v, const char *path) {
    while (v && *path) {
        size_t n = strcspn(path, ".");
        const json *child = v->child;
        if (v->type == 'a')
            for (int i = atoi(path); child && i > 0; i--) child = child->next;
        else
            while (child && (strlen(child->key) != n || memcmp(child->key, path, n)))
                child = child->next;
        v = child;
        path += n + (path[n] == '.');
    }
    return v;
}

static inline const json *json_get(const char *doc, const char *path) {
    const json *v = json_parse(doc, doc ? strlen(doc) : 0);
    return v ? json_at(v, path) : NULL;
}

static inline bool json_has(const char *doc, const char *path) { return json_get(doc, path); }

static inline const char *json_str(const char *doc, const char *path) {
    const json *v = json_get(doc, path);
    return v && v->type == 's' ? v->str : "(none)";
}

static inline double json_num(const char *doc, const char *path) {
    const json *v = json_get(doc, path);
    return v && v->type == 'n' ? strtod(v->str, NULL) : (double)NAN;
}

/* The literal of a number, true, false or null, for 64-bit integers and booleans. */
static inline const char *json_raw(const char *doc, const char *path) {
    const json *v = json_get(doc, path);
    return v && v->str && v->type != 's' ? v->str : "(none)";
}

static inline char json_type(const char *doc, const char *path) {
    const json *v = json_get(doc, path);
    return v ? v->type : '-';
}

static inline int json_count(const char *doc, const char *path) {
    const json *v = json_get(doc, path);
    int n = 0;
    for (v = v ? v->child : NULL; v; v = v->next) n++;
    return n;
}

/* A JSON string literal of `s`. */
static inline char *json_quote(const char *s) {
    buf b = {0};
    buf_str(&b, "\"");
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') buf_print(&b, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) buf_print(&b, "\\u%04x", *s);
        else buf_add(&b, s, 1);
    }
    buf_str(&b, "\"");
    return b.p;
}

/* printf for JSON texts: apostrophes of the format become quotation marks, so that a body reads
 * q("{'job_id':'%s','seed':%d}", id, 7). Arguments are left as they are. */
static inline char *q_list(const char *format, va_list args) {
    char *f = text_n(format, strlen(format));
    for (char *p = f; *p; p++)
        if (*p == '\'') *p = '"';
    buf b = {0};
    buf_room(&b, 1);
    buf_vprint(&b, f, args);
    return b.p;
}

static inline char *q(const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *s = q_list(format, args);
    va_end(args);
    return s;
}

/* ==== Worker process ===========================================================================
 * A worker owns its process, its two pipes and the thread that reads them. It may be shared by
 * several tests; whoever made it calls worker_end (a clean end is checked) or worker_drop. */

typedef struct worker {
    pid_t pid;
    int port, status;           /* `status` as worker_exit reports it */
    int out_fd, err_fd;
    bool reaped, joined;
    pthread_t thread;
    pthread_mutex_t lock;       /* guards what follows */
    buf out, log;               /* all of stdout, all of stderr */
    bool out_closed, mute, stop;
} worker;

extern char **environ;

static inline const char *env_or(const char *name, const char *otherwise) {
    const char *v = getenv(name);
    return v && *v ? v : otherwise;
}

static inline bool worker_read(worker *w, int *fd, buf *into) {
    char part[8192];
    ssize_t n = read(*fd, part, sizeof part);
    if (n > 0) {
        pthread_mutex_lock(&w->lock);
        buf_add(into, part, (size_t)n);
        pthread_mutex_unlock(&w->lock);
    } else if (n == 0 || errno != EINTR) {
        close(*fd);
        *fd = -1;
    }
    return *fd >= 0;
}

static inline void *worker_thread(void *arg) {
    worker *w = arg;
    bool stop = false;
    while (!stop && (w->out_fd >= 0 || w->err_fd >= 0)) {
        pthread_mutex_lock(&w->lock);
        bool mute = w->mute;
        pthread_mutex_unlock(&w->lock);
        struct pollfd p[2] = {{w->out_fd, POLLIN, 0}, {mute ? -1 : w->err_fd, POLLIN, 0}};
        poll(p, 2, 20);
        if (p[0].revents && !worker_read(w, &w->out_fd, &w->out)) {
            pthread_mutex_lock(&w->lock);
            w->out_closed = true;
            pthread_mutex_unlock(&w->lock);
        }
        if (p[1].revents) worker_read(w, &w->err_fd, &w->log);
        pthread_mutex_lock(&w->lock);
        stop = w->stop;
        pthread_mutex_unlock(&w->lock);
    }
    if (w->out_fd >= 0) close(w->out_fd);
    if (w->err_fd >= 0) close(w->err_fd);
    return NULL;
}

/* The child's environment: ours without LLORCH_*, and the leading NAME=value arguments. */
static inline char **worker_env(char **given, size_t n_given) {
    size_t n = 0, kept = 0;
    while (environ[n]) n++;
    char **env = mem((n + n_given + 2) * sizeof *env);
    for (size_t i = 0; i < n; i++)
        if (strncmp(environ[i], "LLORCH_", 7)) env[kept++] = environ[i];
    for (size_t i = 0; i < n_given; i++) env[kept++] = given[i];
    if (getenv("LORCH_TEST_NO_SANDBOX")) env[kept++] = text("LLORCH_NO_SANDBOX=1");
    return env;
}

static inline void worker_child(const int *out, const int *err, char **argv, char **env) {
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) dup2(null, 0);
    dup2(out[1], 1);
    dup2(err[1], 2);
    for (int fd = 3; fd < 1024; fd++) close(fd);
    signal(SIGPIPE, SIG_DFL);
    execve(argv[0], argv, env);
    _exit(127);
}

/* Starts argv[0] with a list of arguments ending in NULL, of which the leading NAME=value ones
 * are its environment, as with env(1). */
static inline worker *process_start(const char *program, const char *const *list) {
    size_t n_env = 0, n = 0;
    while (list[n_env] && isupper((unsigned char)list[n_env][0]) && strchr(list[n_env], '='))
        n_env++;
    while (list[n_env + n]) n++;
    char **argv = mem((n + 2) * sizeof *argv), **given = mem((n_env + 1) * sizeof *given);
    argv[0] = text("%s", program);
    for (size_t i = 0; i < n_env; i++) given[i] = text("%s", list[i]);
    for (size_t i = 0; i < n; i++) argv[i + 1] = text("%s", list[n_env + i]);
    char **env = worker_env(given, n_env);
    worker *w = mem_check(calloc(1, sizeof *w));
    int out[2], err[2];
    if (pipe(out) || pipe(err)) { perror("# pipe"); exit(1); }
    w->pid = fork();
    if (w->pid == 0) worker_child(out, err, argv, env);
    if (w->pid < 0) { perror("# fork"); exit(1); }
    close(out[1]);
    close(err[1]);
    w->out_fd = out[0];
    w->err_fd = err[0];
    w->out.heap = w->log.heap = true;
    pthread_mutex_init(&w->lock, NULL);
    if (pthread_create(&w->thread, NULL, worker_thread, w)) { perror("# thread"); exit(1); }
    pid_note(0, w->pid);
    return w;
}

static inline worker *worker_start(const char *const *list) {
    return process_start(env_or("LORCH", "./lorch"), list);
}

/* start("LLORCH_QUEUE=1", "--model", model, "--parallel", "2") */
#define start(...) worker_start((const char *const[]){__VA_ARGS__, NULL})

/* Copies of what the worker has written so far. */
static inline char *worker_text(worker *w, const buf *from) {
    pthread_mutex_lock(&w->lock);
    char *s = text_n(from->p, from->n);
    pthread_mutex_unlock(&w->lock);
    return s;
}

static inline char *worker_log(worker *w) { return worker_text(w, &w->log); }
static inline char *worker_out(worker *w) { return worker_text(w, &w->out); }

/* The end of the log, for messages about failures. */
static inline const char *worker_tail(worker *w) {
    char *log = worker_log(w);
    size_t n = strlen(log);
    return n > 300 ? log + n - 300 : log;
}

/* True if the process has ended; collects its status. */
static inline bool worker_gone(worker *w) {
    int status;
    if (!w->reaped && waitpid(w->pid, &status, WNOHANG) == w->pid) {
        w->reaped = true;
        w->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        pid_note(w->pid, 0);
    }
    return w->reaped;
}

static inline void worker_join(worker *w) {
    if (w->joined) return;
    for (int i = 0; i < 50; i++) {      /* Let the thread drain the pipes to their end first. */
        pthread_mutex_lock(&w->lock);
        bool closed = w->out_closed;
        w->mute = false;
        pthread_mutex_unlock(&w->lock);
        if (closed) break;
        nap_ms(2);
    }
    nap_ms(2);
    pthread_mutex_lock(&w->lock);
    w->stop = !w->reaped || !w->out_closed;
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    w->joined = true;
}

/* Exit code (128 + signal number if it was killed), -1 if it still runs after `ms`. */
static inline int worker_exit(worker *w, int ms) {
    double end = now_ms() + ms;
    while (!worker_gone(w)) {
        if (now_ms() > end) return -1;
        nap_ms(1);
    }
    worker_join(w);
    return w->status;
}

/* Ends it without ceremony and frees everything. */
static inline void worker_drop(worker *w) {
    if (!w) return;
    if (!worker_gone(w)) {
        kill(w->pid, SIGCONT);
        kill(w->pid, SIGKILL);
        worker_exit(w, 10000);
    }
    worker_join(w);
    pthread_mutex_destroy(&w->lock);
    buf_free(&w->out);
    buf_free(&w->log);
    free(w);
}

/* Ends it as a pool manager would. A worker that then does not exit with 0 fails the test: this
 * is also how the reports of sanitizers come to light. */
static inline void worker_end(worker *w) {
    if (!w) return;
    int code = worker_exit(w, 0);
    if (code == -1) {
        kill(w->pid, SIGTERM);
        code = worker_exit(w, bound_ms(6000));
    }
    CHECK(code == 0, "the worker ended with %d (-1: not at all): %s", code, worker_tail(w));
    worker_drop(w);
}

/* The port from the line on stdout, 0 if none comes. */
static inline int worker_port(worker *w) {
    double end = now_ms() + bound_ms(10000);
    while (!w->port && now_ms() < end) {
        char *out = worker_out(w);
        if (strchr(out, '\n')) w->port = atoi(out);
        else if (worker_gone(w)) break;
        else nap_ms(1);
        if (w->port) break;
    }
    return w->port;
}

/* The log line number `skip` (from 0) whose member `key` is `value`; NULL after `ms`. */
static inline char *log_match(worker *w, const char *key, const char *value, int skip, int ms) {
    double end = now_ms() + ms;
    do {
        int left = skip;
        char *log = worker_log(w), *line = log, *stop;
        for (; (stop = strchr(line, '\n')); line = stop + 1) {
            *stop = 0;
            if (!strcmp(json_str(line, key), value) && left-- == 0) return line;
        }
        nap_ms(2);
    } while (now_ms() < end);
    return NULL;
}

static inline char *log_event(worker *w, const char *event, int ms) {
    return log_match(w, "event", event, 0, ms);
}

/* ==== HTTP client ==============================================================================
 * A connection and the reply that is being read from it, incrementally: reply_pump consumes what
 * has arrived, conn_fill waits for more. Everything lives until the end of the test. */

typedef struct conn {
    int fd;
    buf in;
    size_t used;                /* bytes of `in` that replies have consumed */
    bool eof, reset;
    struct conn *next;
} conn;

static conn *conns;             /* The open ones, closed after each test. */

static inline void conn_close(conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static inline void conns_close(void) {
    for (; conns; conns = conns->next) conn_close(conns);
}

static inline int tcp_connect(int port) {
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct timeval limit = {5, 0};
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) {
        if (fd >= 0) close(fd);
        return -1;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return fd;
}

/* A listening socket on loopback, and its port. */
static inline int tcp_listen(int *port) {
    struct sockaddr_in a = {.sin_family = AF_INET};
    socklen_t n = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, n) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)&a, &n)) {
        perror("# listen");
        exit(1);
    }
    *port = ntohs(a.sin_port);
    return fd;
}

/* A port on which nobody listens, at least for the moment. */
static inline int tcp_free_port(void) {
    int port, fd = tcp_listen(&port);
    close(fd);
    return port;
}

static inline conn *conn_of(int fd) {
    conn *c = mem(sizeof *c);
    c->fd = fd;
    c->eof = fd < 0;
    buf_room(&c->in, 1);
    c->next = conns;
    conns = c;
    return c;
}

/* Never NULL; a refused connection has fd -1 and looks like one that was closed at once. */
static inline conn *conn_open(int port) { return conn_of(tcp_connect(port)); }

static inline bool conn_send(conn *c, const void *data, size_t n) {
    const char *p = data;
    while (n > 0 && c->fd >= 0) {
        ssize_t sent = send(c->fd, p, n, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        p += sent;
        n -= (size_t)sent;
    }
    return n == 0;
}

static inline bool conn_text(conn *c, const char *s) { return conn_send(c, s, strlen(s)); }

/* Waits up to `ms` for bytes: true if some arrived; false at the end, on a reset or in vain. */
static inline bool conn_fill(conn *c, int ms) {
    char part[16384];
    if (c->eof || c->fd < 0) return false;
    struct pollfd p = {c->fd, POLLIN, 0};
    if (poll(&p, 1, ms < 0 ? 0 : ms) <= 0) return false;
    ssize_t n = recv(c->fd, part, sizeof part, 0);
    if (n > 0) buf_add(&c->in, part, (size_t)n);
    else c->eof = true;
    c->reset = n < 0;
    return n > 0;
}

/* True if the peer closes within `ms` without sending anything more. */
static inline bool conn_closed(conn *c, int ms) {
    double end = now_ms() + ms;
    while (!c->eof && now_ms() < end) conn_fill(c, (int)(end - now_ms()) + 1);
    return c->eof && c->used == c->in.n;
}

/* Closes with a reset instead of an orderly end. */
static inline void conn_abort(conn *c) {
    struct linger now = {1, 0};
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    conn_close(c);
}

enum body_kind { BODY_NONE, BODY_LENGTH, BODY_CHUNKED, BODY_CLOSE };

typedef struct reply {
    int status;                 /* 0 until the head has arrived */
    int interim;                /* how many 1xx replies came first */
    char *head;                 /* status line and header lines as received */
    buf body;
    enum body_kind kind;
    size_t left;                /* of a body with Content-Length */
    bool done, bad, head_only;  /* complete; not HTTP; the answer to HEAD */
    double head_at, done_at;
} reply;

/* The value of a header, NULL if it is absent. */
static inline char *reply_header(const reply *r, const char *name) {
    size_t n = strlen(name);
    const char *line = r->head ? strstr(r->head, "\r\n") : NULL;
    for (; line && line[2]; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, n) || line[2 + n] != ':') continue;
        const char *v = line + 3 + n + strspn(line + 3 + n, " \t");
        size_t len = strcspn(v, "\r");
        while (len && (v[len - 1] == ' ' || v[len - 1] == '\t')) len--;
        return text_n(v, len);
    }
    return NULL;
}

static inline bool header_is(const reply *r, const char *name, const char *value) {
    char *v = reply_header(r, name);
    return v && !strcasecmp(v, value);
}

static inline bool reply_head(conn *c, reply *r) {
    char *start = c->in.p + c->used, *stop = strstr(start, "\r\n\r\n");
    if (!stop) return false;
    r->head = text_n(start, (size_t)(stop + 2 - start));
    c->used += (size_t)(stop + 4 - start);
    if (strncmp(r->head, "HTTP/1.1 ", 9) && strncmp(r->head, "HTTP/1.0 ", 9)) {
        r->bad = r->done = true;
        return false;
    }
    int status = atoi(r->head + 9);
    if (status / 100 == 1) { r->interim++; return true; }
    r->status = status;
    r->head_at = now_ms();
    const char *length = reply_header(r, "Content-Length");
    r->kind = BODY_CLOSE;
    if (status == 204 || status == 304 || r->head_only) r->kind = BODY_NONE;
    else if (header_is(r, "Transfer-Encoding", "chunked")) r->kind = BODY_CHUNKED;
    else if (length) r->kind = BODY_LENGTH;
    r->left = length ? (size_t)strtoul(length, NULL, 10) : 0;
    return true;
}

/* Takes one whole chunk; false if it is not there yet. Trailers are not expected. */
static inline bool reply_chunk(conn *c, reply *r) {
    char *start = c->in.p + c->used, *line = strstr(start, "\r\n"), *end;
    if (!line) return false;
    size_t n = (size_t)strtoul(start, &end, 16), head = (size_t)(line + 2 - start);
    if (end == start || end != line) { r->bad = r->done = true; return false; }
    if (c->in.n - c->used < head + n + 2) return false;
    if (memcmp(line + 2 + n, "\r\n", 2)) { r->bad = r->done = true; return false; }
    buf_add(&r->body, line + 2, n);
    c->used += head + n + 2;
    r->done = n == 0;
    return !r->done;
}

/* Consumes what has arrived. */
static inline void reply_pump(conn *c, reply *r) {
    while (!r->status && !r->bad && reply_head(c, r)) {}
    if (!r->status || r->done) return;
    size_t n = c->in.n - c->used;
    if (r->kind == BODY_CHUNKED) while (reply_chunk(c, r)) {}
    else if (r->kind != BODY_NONE) {
        if (r->kind == BODY_LENGTH && n > r->left) n = r->left;
        buf_add(&r->body, c->in.p + c->used, n);
        c->used += n;
        r->left -= r->kind == BODY_LENGTH ? n : 0;
    }
    if (r->kind == BODY_NONE || (r->kind == BODY_LENGTH && !r->left)) r->done = true;
    if (r->kind == BODY_CLOSE && c->eof) r->done = true;
    if (r->done) r->done_at = now_ms();
}

static inline reply *reply_new(void) {
    reply *r = mem(sizeof *r);
    buf_room(&r->body, 1);
    r->head = text("%s", "");
    return r;
}

/* Reads the next reply; on time-out or a lost connection, `done` stays false. */
static inline reply *reply_read_as(conn *c, bool head_only, int ms) {
    reply *r = reply_new();
    double end = now_ms() + ms;
    r->head_only = head_only;
    for (;;) {
        reply_pump(c, r);
        if (r->done || r->bad || now_ms() >= end) return r;
        if (!conn_fill(c, (int)(end - now_ms()) + 1) && c->eof) {
            reply_pump(c, r);
            return r;
        }
    }
}

static inline reply *reply_read(conn *c) { return reply_read_as(c, false, bound_ms(5000)); }

/* The bytes of a request. `headers` are whole lines ending in CRLF, or ""; the usual ones are
 * added where they are not among them. `body` NULL means none. */
static inline char *request(int port, const char *method, const char *target,
                            const char *headers, const char *body) {
    buf b = {0};
    buf_print(&b, "%s %s HTTP/1.1\r\n", method, target);
    if (!strstr(headers, "Host:")) buf_print(&b, "Host: 127.0.0.1:%d\r\n", port);
    if (body && !strstr(headers, "Content-Type:"))
        buf_str(&b, "Content-Type: application/json\r\n");
    if (body && !strstr(headers, "Content-Length:"))
        buf_print(&b, "Content-Length: %zu\r\n", strlen(body));
    buf_print(&b, "%s\r\n%s", headers, body ? body : "");
    return b.p;
}

/* One request with arbitrary bytes on its own connection. */
static inline reply *http_bytes(int port, const void *bytes, size_t n) {
    conn *c = conn_open(port);
    conn_send(c, bytes, n);
    reply *r = reply_read(c);
    conn_close(c);
    return r;
}

static inline reply *http(int port, const char *method, const char *target,
                          const char *headers, const char *body) {
    char *bytes = request(port, method, target, headers, body);
    return http_bytes(port, bytes, strlen(bytes));
}

static inline reply *get(int port, const char *target) {
    return http(port, "GET", target, "", NULL);
}

static inline reply *post(int port, const char *target, const char *body) {
    return http(port, "POST", target, "", body);
}

/* ==== Event streams ============================================================================
 * The reply to POST /execute, split into its blocks as they arrive. */

typedef struct event {
    double at;                  /* when it arrived */
    const char *block;          /* the block as received, without its blank line */
    const char *data;           /* what follows "data: ", a JSON text */
    const char *type;           /* its member `type` */
} event;

typedef struct stream {
    conn *c;
    reply *r;
    size_t scanned;             /* bytes of the body that are split already */
    event *events;
    size_t n, cap;
    int pings;                  /* comment blocks */
    double ping_at;             /* arrival of the latest one */
    double sent_at;
    const char *job_id;
} stream;

static inline void stream_block(stream *s, const char *block) {
    if (block[0] == ':') {
        s->pings++;
        s->ping_at = now_ms();
        return;
    }
    if (s->n == s->cap) {
        event *old = s->events;
        s->cap = s->cap ? s->cap * 2 : 64;
        s->events = mem(s->cap * sizeof *s->events);
        if (s->n) memcpy(s->events, old, s->n * sizeof *old);
    }
    const char *data = strncmp(block, "data: ", 6) ? strstr(block, "\ndata: ") : block;
    event e = {now_ms(), block, "", "(none)"};
    if (data) {
        data += data == block ? 6 : 7;
        e.data = text_n(data, strcspn(data, "\n"));
        e.type = json_str(e.data, "type");
    }
    s->events[s->n++] = e;
}

/* Waits up to `ms` for bytes and splits what is there; false if nothing came. */
static inline bool stream_pump(stream *s, int ms) {
    bool came = conn_fill(s->c, ms);
    reply_pump(s->c, s->r);
    if (s->r->status == 200)
        for (char *stop; (stop = strstr(s->r->body.p + s->scanned, "\n\n"));) {
            char *start = s->r->body.p + s->scanned;
            s->scanned += (size_t)(stop + 2 - start);
            stream_block(s, text_n(start, (size_t)(stop - start)));
        }
    return came;
}

static inline bool stream_over(const stream *s) {
    return s->r->done || s->r->bad || s->c->eof;
}

static inline int stream_tokens(const stream *s) {
    int n = 0;
    for (size_t i = 0; i < s->n; i++) n += !strcmp(s->events[i].type, "token");
    return n;
}

/* The first event of a type, waiting for it; NULL if the stream ends or `ms` pass without it. */
static inline event *stream_event(stream *s, const char *type, int ms) {
    double end = now_ms() + ms;
    size_t i = 0;
    for (;;) {
        for (; i < s->n; i++)
            if (!strcmp(s->events[i].type, type)) return &s->events[i];
        if (stream_over(s) || now_ms() >= end) return NULL;
        stream_pump(s, (int)(end - now_ms()) + 1);
    }
}

/* Waits until `n` token events have come. */
static inline bool stream_wait(stream *s, int n, int ms) {
    double end = now_ms() + ms;
    while (stream_tokens(s) < n && !stream_over(s) && now_ms() < end)
        stream_pump(s, (int)(end - now_ms()) + 1);
    return stream_tokens(s) >= n;
}

/* Waits until the server has ended the stream. */
static inline bool stream_finish(stream *s, int ms) {
    double end = now_ms() + ms;
    while (!stream_over(s) && now_ms() < end) stream_pump(s, (int)(end - now_ms()) + 1);
    stream_pump(s, 0);
    return s->r->done;
}

/* The JSON of the last event, "" if there is none. */
static inline const char *stream_last(const stream *s) {
    return s->n ? s->events[s->n - 1].data : "";
}

/* The JSON of `started`, "" if it has not come. */
static inline const char *stream_started(const stream *s) {
    return s->n && !strcmp(s->events[0].type, "started") ? s->events[0].data : "";
}

/* All `t` in a row. */
static inline char *stream_text(const stream *s) {
    buf b = {0};
    buf_room(&b, 1);
    for (size_t i = 0; i < s->n; i++)
        if (!strcmp(s->events[i].type, "token")) buf_str(&b, json_str(s->events[i].data, "t"));
    return b.p;
}

/* The error code: of the reply, if the request was refused, or of the stream's last event. */
static inline const char *stream_code(const stream *s) {
    if (s->r->status != 200) return json_str(s->r->body.p, "error.code");
    return json_str(stream_last(s), "code");
}

/* ==== Pool manager double ======================================================================
 * Listens for ready callbacks. Its script is a list of words, one per request, the last one for
 * all that follow: a status number; `hang` (never answer), `half` (a part of a status line, and no
 * more), `cut` (the same, then close), `reset` (a reset instead of an answer), `close` (without an
 * answer), `garbage` (an answer that is not HTTP). At each callback it asks the worker for /health before it answers,
 * to see whether the server was there first. */

enum { MAX_CALLS = 16 };

typedef struct {
    double at;                  /* when the connection was accepted */
    char raw[4096];             /* the request as received */
    size_t first_read;          /* bytes that the first read returned */
    int health;                 /* status of the worker's /health at that moment */
    bool whole;                 /* head and body arrived completely */
} callback;

typedef struct manager {
    int port, fd;
    char script[128];
    pthread_t thread;
    pthread_mutex_t lock;       /* guards what follows */
    callback calls[MAX_CALLS];
    int n;
    bool stop;
} manager;

static inline bool callback_whole(const char *raw) {
    const char *head = strstr(raw, "\r\n\r\n"), *length = strstr(raw, "Content-Length: ");
    return head && length && strlen(head + 4) >= (size_t)atoi(length + 16);
}

static inline void callback_read(int fd, callback *call) {
    size_t n = 0;
    struct pollfd p = {fd, POLLIN, 0};
    while (n + 1 < sizeof call->raw && !call->whole && poll(&p, 1, 2000) > 0) {
        ssize_t got = recv(fd, call->raw + n, sizeof call->raw - 1 - n, 0);
        if (got <= 0) break;
        if (!n) call->first_read = (size_t)got;
        n += (size_t)got;
        call->raw[n] = 0;
        call->whole = callback_whole(call->raw);
    }
}

/* The status with which the worker at `port` answers GET /health, 0 if it does not. */
static inline int health_status(int port) {
    char bytes[128], answer[13] = "";
    int fd = tcp_connect(port), n = 0;
    if (fd < 0) return 0;
    struct pollfd p = {fd, POLLIN, 0};
    snprintf(bytes, sizeof bytes, "GET /health HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n", port);
    if (send(fd, bytes, strlen(bytes), MSG_NOSIGNAL) > 0)
        while (n < 12 && poll(&p, 1, bound_ms(2000)) > 0) {
            ssize_t got = recv(fd, answer + n, (size_t)(12 - n), 0);
            if (got <= 0) break;
            n += (int)got;
        }
    close(fd);
    return n == 12 ? atoi(answer + 9) : 0;
}

static inline void manager_answer(int fd, const char *word) {
    struct linger at_once = {1, 0};
    char bytes[256];
    if (!strcmp(word, "reset")) setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    if (!strcmp(word, "garbage"))
        snprintf(bytes, sizeof bytes, "SSH-2.0-OpenSSH_9.9\r\n\r\n");
    else if (!strcmp(word, "half") || !strcmp(word, "cut"))
        snprintf(bytes, sizeof bytes, "HTTP/1.1 20");
    else if (isdigit((unsigned char)*word))
        snprintf(bytes, sizeof bytes, "HTTP/1.1 %s X\r\nContent-Length: 2\r\n"
                 "Location: http://127.0.0.1:9/\r\nConnection: close\r\n\r\n{}", word);
    else return;
    if (send(fd, bytes, strlen(bytes), MSG_NOSIGNAL) < 0) return;
}

static inline void *manager_thread(void *arg) {
    manager *m = arg;
    int open[MAX_CALLS], n_open = 0;
    char words[sizeof m->script], *next = words;
    memcpy(words, m->script, sizeof words);
    for (bool stop = false; !stop;) {
        struct pollfd p = {m->fd, POLLIN, 0};
        if (poll(&p, 1, 20) > 0 && n_open < MAX_CALLS) {
            callback call = {.at = now_ms()};
            int fd = accept(m->fd, NULL, NULL);
            callback_read(fd, &call);
            const char *uri = strstr(call.raw, "\"uri\":\"http://127.0.0.1:");
            call.health = uri ? health_status(atoi(uri + 24)) : 0;
            char word[16] = "";
            sscanf(next, "%15s", word);
            if (strchr(next, ' ')) next = strchr(next, ' ') + 1;
            pthread_mutex_lock(&m->lock);
            m->calls[m->n++] = call;
            pthread_mutex_unlock(&m->lock);
            manager_answer(fd, word);
            if (!strcmp(word, "hang") || !strcmp(word, "half")) open[n_open++] = fd;
            else close(fd);
        }
        pthread_mutex_lock(&m->lock);
        stop = m->stop || m->n == MAX_CALLS;
        pthread_mutex_unlock(&m->lock);
    }
    while (n_open) close(open[--n_open]);
    return NULL;
}

static inline manager *manager_start(const char *script) {
    manager *m = mem_check(calloc(1, sizeof *m));
    snprintf(m->script, sizeof m->script, "%s", script);
    m->fd = tcp_listen(&m->port);
    pthread_mutex_init(&m->lock, NULL);
    if (pthread_create(&m->thread, NULL, manager_thread, m)) { perror("# thread"); exit(1); }
    return m;
}

static inline int manager_calls(manager *m) {
    pthread_mutex_lock(&m->lock);
    int n = m->n;
    pthread_mutex_unlock(&m->lock);
    return n;
}

static inline bool manager_wait(manager *m, int n, int ms) {
    double end = now_ms() + ms;
    while (manager_calls(m) < n && now_ms() < end) nap_ms(2);
    return manager_calls(m) >= n;
}

static inline callback manager_call(manager *m, int i) {
    pthread_mutex_lock(&m->lock);
    callback c = m->calls[i];
    pthread_mutex_unlock(&m->lock);
    return c;
}

static inline void manager_end(manager *m) {
    if (!m) return;
    pthread_mutex_lock(&m->lock);
    m->stop = true;
    pthread_mutex_unlock(&m->lock);
    pthread_join(m->thread, NULL);
    pthread_mutex_destroy(&m->lock);
    close(m->fd);
    free(m);
}

/* ==== Vocabulary ===============================================================================
 * The phrases in which most tests are written. */

/* The main test model: 1024 tokens of byte-level BPE, a context of 512. It writes stories. */
static inline char *tiny_model(void) {
    return text("%s/lorch-tiny-q8_0.gguf", env_or("LORCH_MODELS", "tests/models"));
}

/* A model of random weights whose jobs last for seconds, NULL if there is none. */
static inline const char *slow_model(void) { return env_or("LORCH_SLOW_MODEL", NULL); }

#define NEED_SLOW_MODEL() \
    do { if (!slow_model()) SKIP("LORCH_SLOW_MODEL is not set"); } while (0)

/* Waits until /health is 200; false if the worker ends or never gets there. */
static inline bool worker_ready(worker *w) {
    double end = now_ms() + bound_ms(20000);
    int port = worker_port(w);
    while (port && now_ms() < end && !worker_gone(w)) {
        if (health_status(port) == 200) return true;
        nap_ms(2);
    }
    return false;
}

/* A ready worker on the test model with further arguments, or a failed check. */
#define ready_worker(...) worker_checked(start(__VA_ARGS__))

static inline worker *worker_checked(worker *w) {
    CHECK(worker_ready(w), "the worker did not become ready: %s", worker_tail(w));
    return w;
}

/* Job ids are never used twice, because a worker remembers cancelled ones. */
static inline char *fresh_id(void) {
    static int n;
    return text("job-%ld-%d", (long)getpid(), ++n);
}

/* The body of an execute request: `fields` in q() notation; a fresh job_id and the usual prompt
 * are added where it does not name them. */
static inline char *job_body(const char *fields) {
    buf b = {0};
    buf_str(&b, "{");
    if (!strstr(fields, "\"job_id\":")) buf_print(&b, "\"job_id\":\"%s\",", fresh_id());
    if (!strstr(fields, "\"prompt\":")) buf_str(&b, "\"prompt\":\"Once upon a time\",");
    if (*fields) buf_str(&b, fields);
    else b.n--;
    buf_str(&b, "}");
    return b.p;
}

/* Sends a body to /execute with further header lines; does not wait for anything. */
static inline stream *execute(int port, const char *target, const char *headers,
                              const char *body) {
    stream *s = mem(sizeof *s);
    s->r = reply_new();
    s->c = conn_open(port);
    s->sent_at = now_ms();
    s->job_id = json_str(body, "job_id");
    conn_text(s->c, request(port, "POST", target, headers, body));
    return s;
}

/* job(port, "'max_tokens':%d", 8): begins a job. */
static inline stream *job(int port, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *fields = q_list(format, args);
    va_end(args);
    return execute(port, "/execute", "", job_body(fields));
}

/* The same, and waits for its end. */
static inline stream *job_run(int port, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *fields = q_list(format, args);
    va_end(args);
    stream *s = execute(port, "/execute", "", job_body(fields));
    stream_finish(s, bound_ms(20000));
    return s;
}

/* How many tokens the worker makes in about `ms`, by the time that a short job takes. */
static inline int tokens_in(int port, double ms) {
    stream *s = job_run(port, "'max_tokens':9,'ignore_eos':true");
    double each = (s->r->done_at - s->sent_at) / 9;
    int n = each > 0 ? (int)(ms / each) : 4;
    return n < 4 ? 4 : n > 15000 ? 15000 : n;
}

static inline reply *cancel(int port, const char *job_id) {
    return post(port, "/cancel", text("{\"job_id\":%s}", json_quote(job_id)));
}

static inline const char *health(int port) { return get(port, "/health")->body.p; }

/* Waits until /health shows `n` at `path`, for instance 0 at "jobs.running". */
static inline bool health_wait(int port, const char *path, int n, int ms) {
    double end = now_ms() + ms;
    do {
        if (json_num(health(port), path) == n) return true;
        nap_ms(1);
    } while (now_ms() < end);
    return false;
}

/* The value of a metric, given its name with any labels of interest: lines are matched by name
 * and by the presence of `label`, "" for none. NaN if it is absent. */
static inline double metric_in(const char *page, const char *name, const char *label) {
    size_t n = strlen(name);
    for (const char *line = page; line && *line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, n) || (line[n] != '{' && line[n] != ' ')) continue;
        char *copy = text_n(line, strcspn(line, "\n")), *space = strrchr(copy, ' ');
        if (strstr(copy, label) && space) return strtod(space, NULL);
    }
    return (double)NAN;
}

static inline double metric(int port, const char *name, const char *label) {
    return metric_in(get(port, "/metrics")->body.p, name, label);
}

#endif
