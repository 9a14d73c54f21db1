/* SPDX-License-Identifier: MIT
 *
 * What the black-box tests of the command line share: results in TAP's manner, a filter, a
 * scratch directory, and running the program under test with its output caught.
 *
 * A test program calls begin() first, then for each test `if (wanted(name)) report(...)`, and
 * returns finish().  The program under test is $LORCH, or ./lorch.  The functions are inline so
 * that a test program may leave some of them unused without a warning.
 */
/* wait4 is a BSD call, everything else POSIX; -std=c99 hides both unless asked. */
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_ARGS = 32,
    TIME_LIMIT_S = 120, /* for one run; sanitizers make the slowest honest one take 20 */
};

static struct {
    const char *lorch, *shared;
    char dir[256]; /* scratch, removed by finish() */
    int n_filters, n_failed, n_run;
    char **filters;
} T;

/* ==== Results ================================================================================ */

/* A name is wanted if it holds one of the command line's substrings, or there are none. */
static inline int wanted(const char *name) {
    if (T.n_filters == 0) return 1;
    for (int i = 0; i < T.n_filters; i++)
        if (strstr(name, T.filters[i])) return 1;
    return 0;
}

/* The detail of a failure, or what a passing test measured, is printed below its line. */
static inline void report(int ok, const char *name, const char *detail_format, ...) {
    char detail[1000];
    va_list args;
    va_start(args, detail_format);
    vsnprintf(detail, sizeof detail, detail_format, args);
    va_end(args);
    detail[strcspn(detail, "\n")] = 0;
    T.n_run++;
    T.n_failed += !ok;
    printf("%s - %s\n", ok ? "ok" : "not ok", name);
    if (*detail) printf("# %s\n", detail);
    fflush(stdout);
}

static inline void skip(const char *name, const char *why) {
    printf("ok - %s # SKIP %s\n", name, why);
    T.n_run++;
}

static inline void begin(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    T.n_filters = argc - 1, T.filters = argv + 1;
    T.lorch = getenv("LORCH") ? getenv("LORCH") : "./lorch";
    T.shared = getenv("LORCH_SHARED");
    snprintf(T.dir, sizeof T.dir, "%s/lorch-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(T.dir)) perror(T.dir), exit(1);
}

static inline int finish(void) {
    static const char *const files[] = {"stdin", "stdout", "stderr", "model.gguf"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[300];
        snprintf(path, sizeof path, "%s/%s", T.dir, files[i]);
        unlink(path);
    }
    rmdir(T.dir);
    if (T.n_run == 0) printf("# no test has such a name\n");
    printf("1..%d\n", T.n_run);
    return T.n_failed > 0 || T.n_run == 0;
}

/* ==== Files ================================================================================== */

/* Paths in the scratch directory; two may be in use at once. */
static inline const char *scratch(const char *name) {
    static char paths[2][300];
    static int turn;
    turn = !turn;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", T.dir, name);
    return paths[turn];
}

/* The whole file with a zero byte after it, or NULL; the caller frees it. */
static inline char *read_whole(const char *path, size_t *out_len) {
    FILE *f = fopen(path, "rb");
    char *data = NULL;
    size_t len = 0, cap = 0, got;
    if (!f) return NULL;
    do {
        if (cap - len < 65536) data = realloc(data, cap = 2 * cap + 65537);
        if (!data) perror(path), exit(1);
        got = fread(data + len, 1, cap - len - 1, f);
        len += got;
    } while (got > 0);
    fclose(f);
    data[len] = 0;
    if (out_len) *out_len = len;
    return data;
}

static inline void write_whole(const char *path, const void *data, size_t len) {
    FILE *f = fopen(path, "wb");
    if (!f || (len && fwrite(data, 1, len, f) != len) || fclose(f)) perror(path), exit(1);
}

/* ==== Running ================================================================================ */

typedef struct {
    char *out, *err; /* owned; free with run_free() */
    size_t out_len;
    int status;      /* exit status, or -1 when a signal ended it */
    int signal;      /* that signal; SIGALRM is the time limit */
    long max_rss_kb; /* the most memory it ever held */
    double seconds;
} run_result;

static inline void run_free(run_result *r) {
    free(r->out), free(r->err);
    memset(r, 0, sizeof *r);
}

static inline void redirect(const char *name, int flags, int to) {
    int fd = open(scratch(name), flags, 0600);
    if (fd < 0 || dup2(fd, to) < 0) _exit(126);
    close(fd);
}

/* In the child.  The alarm outlives exec, so a program that hangs ends by SIGALRM. */
static inline void run_child(char *const *args) {
    struct rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    redirect("stdin", O_RDONLY, 0);
    redirect("stdout", O_WRONLY | O_CREAT | O_TRUNC, 1);
    redirect("stderr", O_WRONLY | O_CREAT | O_TRUNC, 2);
    alarm(TIME_LIMIT_S);
    execv(args[0], args);
    _exit(127);
}

/* Runs the program under test with the arguments (up to NULL) and these bytes as its input. */
static inline run_result run_input(const void *input, size_t n, const char *const *args) {
    run_result r = {0};
    struct rusage usage;
    struct timespec t0, t1;
    char *argv[MAX_ARGS + 2] = {(char *)(uintptr_t)T.lorch};
    int status = 0;
    for (int i = 0; args[i] && i < MAX_ARGS; i++) argv[i + 1] = (char *)(uintptr_t)args[i];
    write_whole(scratch("stdin"), input, n);
    fflush(stdout);
    clock_gettime(CLOCK_MONOTONIC, &t0);
    pid_t child = fork();
    if (child == 0) run_child(argv);
    if (child < 0 || wait4(child, &status, 0, &usage) != child) perror("wait4"), exit(1);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    r.seconds = (double)(t1.tv_sec - t0.tv_sec) + (double)(t1.tv_nsec - t0.tv_nsec) / 1e9;
    r.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    r.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    r.max_rss_kb = usage.ru_maxrss;
    r.out = read_whole(scratch("stdout"), &r.out_len);
    r.err = read_whole(scratch("stderr"), NULL);
    if (!r.out || !r.err) perror(T.dir), exit(1);
    if (r.status == 127) fprintf(stderr, "cannot run %s\n", T.lorch), exit(1);
    return r;
}

/* A run that ended well, else what to say of it. */
static inline const char *run_failure(const run_result *r) {
    static char text[400];
    if (r->status == 0) return NULL;
    if (r->signal) snprintf(text, sizeof text, "ended by signal %d", r->signal);
    else snprintf(text, sizeof text, "exit status %d: %.300s", r->status, r->err);
    text[strcspn(text, "\n")] = 0;
    return text;
}

/* ==== Reading JSON =========================================================================== */

/* The outputs read here are lines with known keys, so a key is found by its text: inside a
 * string its quotes would carry backslashes.  Gives what follows the colon, or NULL. */
static inline const char *json_find(const char *line, const char *key) {
    size_t n = strlen(key);
    for (const char *p = line; (p = strchr(p, '"')); p++) {
        if (strncmp(p + 1, key, n) != 0 || p[1 + n] != '"') continue;
        const char *q = p + n + 2;
        q += strspn(q, " \t\n");
        if (*q != ':' || (p > line && p[-1] == '\\')) continue;
        return q + 1 + strspn(q + 1, " \t\n");
    }
    return NULL;
}

static inline size_t utf8_put(char *out, uint32_t c) {
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)(0xF00 >> n | c);
    return n;
}

/* Decodes the string at p into out, cut to its size. */
static inline void json_string(const char *p, char *out, size_t size) {
    size_t n = 0;
    if (!p || *p != '"') p = "\"\"";
    for (p++; *p && *p != '"' && n + 5 < size; p++) {
        static const char from[] = "nrtbf", to[] = "\n\r\t\b\f";
        if (*p != '\\') {
            out[n++] = *p;
        } else if (*++p == 'u') {
            unsigned c = 0, low = 0;
            sscanf(p + 1, "%4x", &c);
            p += 4;
            if (c >> 10 == 0x36 && sscanf(p + 1, "\\u%4x", &low) == 1) {
                c = 0x10000 + ((c & 0x3FF) << 10) + (low & 0x3FF);
                p += 6;
            }
            n += utf8_put(out + n, c);
        } else {
            const char *hit = strchr(from, *p);
            out[n++] = hit ? to[hit - from] : *p;
        }
    }
    out[n] = 0;
}

/* Reads the array of integers at p; gives how many there are, or -1 if p is not one. */
static inline int json_ints(const char *p, int *out, int max) {
    int n = 0;
    if (!p || *p != '[') return -1;
    for (p++; *p && *p != ']' && n < max; p += strspn(p, ", \t\n")) {
        char *end;
        out[n++] = (int)strtol(p, &end, 10);
        if (end == p) return -1;
        p = end;
    }
    return n;
}
