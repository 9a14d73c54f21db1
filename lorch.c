/* SPDX-License-Identifier: MIT
 *
 * lorch: one C file that turns a bare server into a CPU worker of an LLM orchestrator.
 * Build: cc lorch.c -o lorch -lpthread -lm
 *
 * The life of a request. The I/O thread (route_serve) owns every socket and runs one poll loop. It parses
 * POST /execute, makes a job and hands it to the intake thread, which tokenizes the prompt, checks lengths
 * and estimates, and then refuses the job or queues it. The engine thread (engine_main) takes queued jobs
 * into free slots, shares the KV blocks of prompts that begin alike, reserves all the others that a job may
 * need, and runs the model in batches: a row for each job that decodes, and a part of a prompt. It
 * samples, turns tokens into text, looks for stop sequences and gives each event to the job's sink, which
 * formats it into the job's own buffer and wakes the I/O thread to send it. POST /cancel sets a flag in the
 * job; the engine looks at it between layers. The engine and N-1 pool threads share each matrix product by
 * rows. A starter thread loads the model, tells the pool manager, and then hashes the file in idle moments.
 *
 * The arithmetic is defined by plain loops (quant_dot): one accumulator for each output, summed in index
 * order with fused multiply-adds. SIMD lanes, threads and batches hold different outputs, never parts of
 * one sum, so a job gives the same bytes on every machine, alone or in company.
 *
 * Errors: before the worker is ready, a bad option, file or model ends the process with one line (exit 1
 * or 2). After that, errors are values; nothing a client sends reaches exit or abort.
 *
 * Not here: GPU, training, TLS, several models in one process, changing the model file.
 *
 * Start reading at main(), at the end; each section uses only what stands above it.
 *
 * Contents
 *   Platform and memory       clocks, memory limits, threads to use, log lines
 *   Text                      views, growing buffers, UTF-8, Unicode categories, JSON
 *   Number formats            the blocks of quantised weights, and the specification of a dot product
 *   GGUF                      the model file: keys and tensors, checked against its bytes
 *   Kernels                   the arithmetic of the model, compiled once for each instruction set
 *   Thread pool               one function over many items, on all threads
 *   Tokenizers                text to ids and back: SentencePiece and byte-level BPE
 *   KV cache                  blocks of keys and values, and the sequences that hold them
 *   Model                     shapes, tensors, memory, and the forward pass
 *   Sampling                  logits to the next token, by seed and index
 *   Engine                    jobs: queue, prefill, decode, text, stop sequences, cancel, deadlines
 *   Embedding interface       the functions of lorch.h
 *   HTTP                      connections, requests and responses, strictly
 *   Routes                    what each path does; the job's events as SSE
 *   Pool-manager client       the ready callback
 *   Command line              options, subcommands, main
 */
#ifndef LORCH_LEVEL /* The kernel section includes this file again, once for each instruction set. */

/* ==== Platform and memory ==================================================================
 * What differs between machines: clocks, page cache, memory limits, CPU counts. Also the limits of the
 * program (each with its reason) and the log. Owns the process-wide log settings and nothing else. */

#if !defined __GNUC__ || defined __TINYC__ || (!defined __clang__ && (__GNUC__ < 9 || (__GNUC__ < 11 && defined __x86_64__))) /* 11: AVX-VNNI */
#error "lorch needs GCC's vector types and atomics: compile it with gcc 11 or later, or with clang"
#endif

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* sched_getaffinity, POLLRDHUP, accept4, getrandom-style calls */
#endif
#include "lorch.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <grp.h>
#include <limits.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <pwd.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#ifdef LORCH_FAULTS /* tests/faults.h, whose malloc, read, ... can be made to fail */
#include LORCH_FAULTS
#endif

/* The bare `cc lorch.c` has no -O: under GCC the file switches optimisation on itself. Contraction of
 * a*b+c into a fused operation is off: where one is meant it is written, so that every compiler agrees. */
#if defined __GNUC__ && !defined __clang__
#if !defined __OPTIMIZE__ && !defined LORCH_DEBUG
#pragma GCC optimize("O3")
#define LORCH_OPTIMISED 1
#endif
#pragma GCC optimize("fp-contract=off", "no-math-errno", "no-trapping-math")
#elif defined __clang__
#pragma STDC FP_CONTRACT OFF
#endif
#if !defined LORCH_OPTIMISED
#ifdef __OPTIMIZE__
#define LORCH_OPTIMISED 1
#else
#define LORCH_OPTIMISED 0
#endif
#endif

#if defined __FAST_MATH__
#error "lorch promises the same bits everywhere: do not compile it with -ffast-math"
#endif
#if defined __i386__ && !defined __SSE2_MATH__
#if defined __GNUC__ && !defined __clang__
#pragma GCC target("sse2,fpmath=sse")
#else
#error "32-bit x86 needs -msse2 -mfpmath=sse: x87 arithmetic rounds differently"
#endif
#endif
#if defined __BYTE_ORDER__ && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "lorch maps little-endian model files in place and so needs a little-endian machine"
#endif

/* A program that embeds the engine uses neither server nor command line, nor what only they call. */
#if defined LORCH_NO_MAIN && defined __GNUC__
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-const-variable"
#endif

#define LORCH_INLINE static inline __attribute__((always_inline, unused))

#define LORCH_VERSION "0.1.0"
#define LORCH_NUMERIC_VERSION 1 /* goes up whenever the same model, job and seed may give other tokens than before */

enum { /* Limits. Each has its reason; the tests stand on both sides. */
    MAX_THREADS = 256,        /* more compute threads than any socket has cores */
    MAX_PARALLEL = 64,        /* jobs that decode together: logits rows are reserved for them */
    MAX_QUEUE = 4096,         /* waiting jobs: each holds its prompt and an event buffer */
    MAX_HEAD_BYTES = 16384,   /* request line and headers together */
    MAX_HEADERS = 100,        /* header lines in one request */
    MAX_BODY_BYTES = 1 << 20, /* a 32768-character prompt in \u escapes is 384 KiB at most */
    MAX_JSON_DEPTH = 64,      /* one bit of a 64-bit word for each open bracket */
    MAX_PROMPT_CHARS = 32768, /* the contract's */
    MAX_JOB_ID_BYTES = 256,   /* the contract's */
    MAX_STOPS = 4,            /* the contract's */
    MAX_STOP_TOKENS = 32,     /* the contract's */
    MAX_FIELD_ERRORS = 32,    /* more than /execute has fields */
    MAX_LOG_LINE = 4096,      /* at most PIPE_BUF, so that a line is written whole or not at all */
    MAX_LAYERS = 1024,        /* the deepest known model has 126 */
    MAX_EXPERTS = 1024,       /* of a layer; the largest known model has 512 */
    MAX_EXPERTS_USED = 64,    /* for a token */
    MAX_HEAD_DIM = 1024,      /* attention scratch is sized by it */
    MAX_CONTEXT = 1 << 24,    /* positions; keeps products of shapes far from overflow */
    MAX_VOCAB = 1 << 24,      /* the largest known vocabulary has 262,144 entries */
    MODEL_CHUNK = 192,        /* prompt tokens in one step: a layer of a 1B model takes 20 ms, and more would not be faster */
    KV_BLOCK = 64,            /* positions in a KV block: also attention's fixed block of positions */
    ROW_TILE = 16             /* weight rows that one kernel call computes */
};

static double sys_clock(clockid_t clock) { /* seconds */
    struct timespec t = {0, 0};
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static double sys_now(void) { return sys_clock(CLOCK_MONOTONIC); }
static double sys_cpu_now(void) { return sys_clock(CLOCK_PROCESS_CPUTIME_ID); }       /* CPU seconds of all threads of this process */
static double sys_thread_cpu_now(void) { return sys_clock(CLOCK_THREAD_CPUTIME_ID); } /* of the calling thread */

static int64_t sys_unix_ms(void) { /* milliseconds since 1970, as X-Deadline counts them */
    struct timespec t = {0, 0};
    clock_gettime(CLOCK_REALTIME, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* "2025-10-03T20:00:00.123Z"; without the milliseconds if with_ms is 0. */
static void sys_timestamp(char out[32], int with_ms) {
    struct timespec t = {0, 0};
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    size_t n = strftime(out, 32, "%Y-%m-%dT%H:%M:%S", &tm);
    if (with_ms) snprintf(out + n, 32 - n, ".%03dZ", (int)(t.tv_nsec / 1000000));
    else snprintf(out + n, 32 - n, "Z");
}

/* Random bytes for ids and seeds; the clock helps out where the system gives none. */
static uint64_t sys_random(void) {
    uint64_t r = 0;
    struct timespec t = {0, 0};
    if (getentropy(&r, sizeof r) == 0) return r;
    clock_gettime(CLOCK_REALTIME, &t);
    return ((uint64_t)t.tv_nsec << 32 ^ (uint64_t)t.tv_sec ^ (uint64_t)getpid() << 20) * 0x9E3779B97F4A7C15u;
}

static void sys_uuid(char out[37]) { /* a random UUID, version 4 */
    uint64_t a = sys_random(), b = sys_random();
    snprintf(out, 37, "%08x-%04x-4%03x-%04x-%04x%08x", (unsigned)(a >> 32), (unsigned)(a >> 16 & 0xffff),
             (unsigned)(a & 0xfff), (unsigned)(b >> 48 & 0x3fff) | 0x8000, (unsigned)(b >> 32 & 0xffff),
             (unsigned)(b & 0xffffffff));
}

/* Reads a small file (of /proc or /sys) as text. Returns its length, or -1. */
static int sys_read_file(const char *path, char *buf, int cap) {
    int fd = open(path, O_RDONLY | O_CLOEXEC), n = 0;
    if (fd < 0) return -1;
    while (n < cap - 1) {
        ssize_t r = read(fd, buf + n, (size_t)(cap - 1 - n));
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) break;
        n += (int)r;
    }
    close(fd);
    buf[n] = 0;
    return n;
}

static void sys_wipe(void *p, size_t n) { /* a secret's bytes; no compiler may leave it out */
    for (volatile unsigned char *b = p; n; n--) *b++ = 0;
}

static void *sys_zalloc(size_t n, size_t size) { return calloc(n ? n : 1, size ? size : 1); }

/* Zeroed pages that are not in memory until they are touched. NULL when there is no room. */
static void *sys_pages(size_t bytes) {
    void *p = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void sys_pages_free(void *p, size_t bytes) {
    if (p) munmap(p, bytes ? bytes : 1);
}

/* A thread with an explicit stack: musl's default of 128 KiB is too small for comfort. */
static int sys_thread(pthread_t *id, void *(*fn)(void *), void *arg) {
    pthread_attr_t attr;
    sigset_t all, old;
    if (pthread_attr_init(&attr)) return -1;
    pthread_attr_setstacksize(&attr, 1 << 20);
    sigfillset(&all); /* signals are for the I/O thread alone, but for a fault's: a blocked one would end the process */
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int rc = pthread_create(id, &attr, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return rc;
}

/* Condition variables wait on the monotonic clock, so that a change of the date wakes nobody. */
static void sys_cond_init(pthread_cond_t *c) {
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(c, &attr);
    pthread_condattr_destroy(&attr);
}

static void sys_cond_wait(pthread_cond_t *c, pthread_mutex_t *m, double seconds) {
    struct timespec t = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &t);
    double until = (double)t.tv_nsec * 1e-9 + seconds;
    t.tv_sec += (time_t)until;
    t.tv_nsec = (long)((until - (double)(time_t)until) * 1e9);
    pthread_cond_timedwait(c, m, &t);
}

/* What is opened and read before the sandbox closes, for those who ask afterwards. Written by one thread (the
 * starter) while no other looks. */
static struct {
    int closed;              /* no file can be opened any more */
    int statm;               /* /proc/self/statm, or -1 */
    const char *path;        /* the model file: opened as `file`, or -1 with the errno in `why` */
    int file, why, writable;
    uint64_t available, total, most_memory; /* most_memory: --max-memory; 0: no limit of its own */
    int threads;
    const char *threads_because;
} sys_kept = {0, -1, NULL, -1, 0, 0, 0, 0, 0, 0, ""};

/* A descriptor of the file for reading, or -1 with errno; *writable: whether this process could write it. */
static int sys_open(const char *path, int *writable) {
    if (!sys_kept.path || strcmp(path, sys_kept.path)) {
        *writable = access(path, W_OK) == 0;
        return open(path, O_RDONLY | O_CLOEXEC);
    }
    int fd = sys_kept.file;
    *writable = sys_kept.writable, sys_kept.path = NULL, sys_kept.file = -1, errno = sys_kept.why;
    return fd;
}

/* ---- cgroups and limits: this process's group in /proc/self/cgroup, and all its ancestors ---- */

typedef void (*sys_cgroup_fn)(const char *dir, int version, void *user);

/* Calls fn for every directory from the process's own group up to the root of each hierarchy that
 * `controller` names (v1) or of the unified one (v2). Missing directories are skipped by fn. */
static void sys_cgroup_walk(const char *controller, sys_cgroup_fn fn, void *user) {
    char text[8192], dir[4608];
    if (sys_read_file("/proc/self/cgroup", text, sizeof text) <= 0) return;
    char *save = NULL;
    for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        names++;
        int version = *names ? 1 : 2, match = version == 2;
        for (char *s2 = NULL, *n = strtok_r(names, ",", &s2); n && !match; n = strtok_r(NULL, ",", &s2))
            match = strcmp(n, controller) == 0;
        if (!match) continue;
        for (;;) {
            int root = version == 2 ? snprintf(dir, sizeof dir, "/sys/fs/cgroup")
                                    : snprintf(dir, sizeof dir, "/sys/fs/cgroup/%s", controller);
            snprintf(dir + root, sizeof dir - (size_t)root, "%s", strcmp(path, "/") ? path : "");
            fn(dir, version, user);
            char *slash = strrchr(path, '/');
            if (!slash || !*path || strcmp(path, "/") == 0) break;
            *slash = 0;
        }
    }
}

static void sys_cpu_quota_in(const char *dir, int version, void *user) {
    char path[4700], text[128];
    double *least = user, quota = 0, period = 0;
    if (version == 2) {
        snprintf(path, sizeof path, "%s/cpu.max", dir);
        if (sys_read_file(path, text, sizeof text) <= 0 || strncmp(text, "max", 3) == 0) return;
        if (sscanf(text, "%lf %lf", &quota, &period) != 2) return;
    } else {
        snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", dir);
        if (sys_read_file(path, text, sizeof text) <= 0) return;
        quota = strtod(text, NULL);
        snprintf(path, sizeof path, "%s/cpu.cfs_period_us", dir);
        if (sys_read_file(path, text, sizeof text) <= 0) return;
        period = strtod(text, NULL);
    }
    if (quota > 0 && period > 0 && quota / period < *least) *least = quota / period;
}

static int sys_affinity_count(cpu_set_t *set) {
    CPU_ZERO(set);
    if (sched_getaffinity(0, sizeof *set, set) == 0 && CPU_COUNT(set) > 0) return CPU_COUNT(set);
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    for (long i = 0; i < n && i < CPU_SETSIZE; i++) CPU_SET((size_t)i, set);
    return n > 0 ? (int)n : 1;
}

/* Counts physical cores in the set: a CPU counts if it is the first of its siblings that the set holds. */
static int sys_physical_cores(const cpu_set_t *set) {
    int cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[96], text[256];
        if (!CPU_ISSET((size_t)cpu, set)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        int first = cpu;
        if (sys_read_file(path, text, sizeof text) > 0) {
            for (char *p = text; *p >= '0' && *p <= '9';) { /* "0-1,4" */
                long from = strtol(p, &p, 10), to = from;
                if (*p == '-') to = strtol(p + 1, &p, 10);
                for (long c = from; c <= to && c < CPU_SETSIZE; c++)
                    if (CPU_ISSET((size_t)c, set) && c < first) first = (int)c;
                if (*p == ',') p++;
            }
        }
        cores += first == cpu;
    }
    return cores > 0 ? cores : 1;
}

/* The threads to use by default: the least of affinity mask, CPU quota and physical cores. */
static int sys_default_threads(const char **reason) {
    cpu_set_t set;
    if (sys_kept.closed) return *reason = sys_kept.threads_because, sys_kept.threads;
    int n = sys_affinity_count(&set), cores = sys_physical_cores(&set);
    double quota = 1e9;
    *reason = "CPU affinity";
    if (cores < n) n = cores, *reason = "physical cores";
    sys_cgroup_walk("cpu", sys_cpu_quota_in, &quota);
    if (quota < n) n = quota < 1 ? 1 : (int)quota, *reason = "cgroup CPU quota";
    return n < MAX_THREADS ? n : MAX_THREADS;
}

static double sys_read_number(const char *dir, const char *file) { /* -1 where there is none, or "max" */
    char path[4700], text[64];
    snprintf(path, sizeof path, "%s/%s", dir, file);
    if (sys_read_file(path, text, sizeof text) <= 0 || text[0] < '0' || text[0] > '9') return -1;
    return strtod(text, NULL);
}

static void sys_memory_in(const char *dir, int version, void *user) {
    double *least = user;
    double limit = sys_read_number(dir, version == 2 ? "memory.max" : "memory.limit_in_bytes");
    double used = sys_read_number(dir, version == 2 ? "memory.current" : "memory.usage_in_bytes");
    if (limit < 0 || used < 0) return;
    char path[4700], text[8192]; /* file pages can be reclaimed: they do not count as used */
    snprintf(path, sizeof path, "%s/memory.stat", dir);
    if (sys_read_file(path, text, sizeof text) > 0) {
        const char *key = version == 2 ? "\ninactive_file " : "\ntotal_inactive_file ";
        const char *p = strstr(text, key);
        if (p) used -= strtod(p + strlen(key), NULL);
    }
    if (limit - used < *least) *least = limit - used > 0 ? limit - used : 0;
}

static void sys_memory_limit_in(const char *dir, int version, void *user) {
    double *least = user, limit = sys_read_number(dir, version == 2 ? "memory.max" : "memory.limit_in_bytes");
    if (limit >= 0 && limit < *least) *least = limit;
}

/* Bytes that the machine or the cgroups let this process have at most, mapped files included. */
static uint64_t sys_memory_total(void) {
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    double least = pages > 0 && size > 0 ? (double)pages * (double)size : 1e18;
    if (sys_kept.closed) return sys_kept.total;
    sys_cgroup_walk("memory", sys_memory_limit_in, &least);
    return (uint64_t)least;
}

/* Bytes that this process may still take: MemAvailable, the cgroups' limits, RLIMIT_AS. */
static uint64_t sys_memory_available(void) {
    char text[4096];
    double least = 1e18;
    if (sys_kept.closed) return sys_kept.available;
    if (sys_read_file("/proc/meminfo", text, sizeof text) > 0) {
        const char *p = strstr(text, "MemAvailable:");
        if (p) least = strtod(p + 13, NULL) * 1024;
    }
    sys_cgroup_walk("memory", sys_memory_in, &least);
    struct rlimit lim;
    if (getrlimit(RLIMIT_AS, &lim) == 0 && lim.rlim_cur != RLIM_INFINITY && (double)lim.rlim_cur < least)
        least = (double)lim.rlim_cur;
    if (sizeof(void *) == 4 && least > 2e9) least = 2e9;
    return (uint64_t)least;
}

typedef struct {
    uint64_t resident;   /* bytes of this process in memory */
    uint64_t file_pages; /* those of them that belong to mapped files: almost all of it the model */
} sys_memory;

static sys_memory sys_memory_used(void) {
    char text[128];
    unsigned long long total = 0, resident = 0, shared = 0;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    sys_memory m = {0, 0};
    ssize_t n = sys_kept.statm >= 0 ? pread(sys_kept.statm, text, sizeof text - 1, 0) : sys_read_file("/proc/self/statm", text, sizeof text);
    text[n > 0 ? n : 0] = 0;
    if (sscanf(text, "%llu %llu %llu", &total, &resident, &shared) == 3) m.resident = resident * page, m.file_pages = shared * page;
    return m;
}

static void sys_keep(void) { /* reads all that will be asked for, before the sandbox closes */
    char now[32];
    sys_kept.available = sys_memory_available(), sys_kept.total = sys_memory_total();
    sys_kept.threads = sys_default_threads(&sys_kept.threads_because);
    sys_timestamp(now, 0); /* the C library looks for a time zone once */
    sys_kept.closed = 1;
}

/* ---- the sandbox: what a worker that parses strangers' bytes gives up ----
 * In three steps, each of which may be missing from the kernel: at once, no new privileges, no core files and
 * no debugger; when the files are open, no file system and no network of its own (Landlock), and a list of
 * system calls (seccomp) that lets nothing be opened or executed; when the model is loaded and the pool manager
 * knows, no new threads and connections either. What is not on the list fails with EPERM; what only an
 * attacker would ask for ends the process. */

#ifdef __linux__
enum { SYS_LANDLOCK_CREATE = 444, SYS_LANDLOCK_RULE = 445, SYS_LANDLOCK_RESTRICT = 446 }; /* the same on all machines; musl lacks names */

static long sys_landlock_abi(void) { /* 0: the kernel has none */
    long abi = syscall(SYS_LANDLOCK_CREATE, NULL, (size_t)0, 1u);
    return abi > 0 ? abi : 0;
}

/* A set of rules that allows no file access at all, and TCP only to `port` (0: none). -1 where there is none. */
static int sys_landlock_open(int port) {
    struct { uint64_t files, net, scoped; } set = {0, 0, 0};
    struct { uint64_t allowed, port; } rule = {2, (uint64_t)port}; /* 2: connect */
    long abi = sys_landlock_abi();
    if (!abi) return -1;
    set.files = abi >= 5 ? 0xffff : abi >= 3 ? 0x7fff : abi >= 2 ? 0x3fff : 0x1fff;
    if (abi >= 4) set.net = 3;     /* bind and connect */
    if (abi >= 6) set.scoped = 3;  /* abstract sockets and signals */
    int fd = (int)syscall(SYS_LANDLOCK_CREATE, &set, (size_t)(abi >= 6 ? 24 : abi >= 4 ? 16 : 8), 0u);
    if (fd >= 0 && abi >= 4 && port) syscall(SYS_LANDLOCK_RULE, fd, 2, &rule, 0u);
    return fd;
}

static int sys_landlock_enter(int fd) { return syscall(SYS_LANDLOCK_RESTRICT, fd, 0u) == 0; } /* this thread and those it starts */

static int sys_harden(void) { /* at once, and for all threads to come */
    struct rlimit none = {0, 0};
    int ok = prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    setrlimit(RLIMIT_CORE, &none);
    return ok;
}
#else
static int sys_landlock_open(int port) { return (void)port, -1; }
static int sys_landlock_enter(int fd) { return (void)fd, 0; }
static long sys_landlock_abi(void) { return 0; }
static int sys_harden(void) { return 0; }
#endif

#if defined __linux__ && defined __x86_64__ && !defined __ILP32__
#define SYS_AUDIT_ARCH 0xc000003eu
#elif defined __linux__ && defined __aarch64__
#define SYS_AUDIT_ARCH 0xc00000b7u
#else
#define SYS_AUDIT_ARCH 0u
#endif

#if SYS_AUDIT_ARCH
typedef struct { /* a system call and what becomes of it; arg >= 0: only if (argument & mask) == value */
    long call;
    int arg;
    uint32_t mask, value, action;
} sys_rule;

enum { BPF_LD = 0x20, BPF_AND = 0x54, BPF_EQ = 0x15, BPF_GE = 0x35, BPF_RET = 6 };
static const uint32_t SECCOMP_ALLOW = 0x7fff0000u, SECCOMP_KILL = 0x80000000u, SECCOMP_ERRNO = 0x00050000u;

/* Puts a filter for all threads in force. */
static int sys_seccomp(const sys_rule *rule, size_t n, uint32_t otherwise) {
    struct { uint16_t code; uint8_t yes, no; uint32_t k; } p[512];
    struct { unsigned short len; void *p; } prog = {0, p};
    size_t len = 0;
#define OP(c, v, y, n) (p[len].code = (c), p[len].k = (uint32_t)(v), p[len].yes = (y), p[len].no = (n), len++)
    OP(BPF_LD, 4, 0, 0); /* struct seccomp_data: nr at 0, arch at 4, the low halves of the arguments at 16, 24, ... */
    OP(BPF_EQ, SYS_AUDIT_ARCH, 1, 0);
    OP(BPF_RET, SECCOMP_KILL, 0, 0);
    OP(BPF_LD, 0, 0, 0);
    OP(BPF_GE, 0x40000000, 0, 1); /* x32's calls */
    OP(BPF_RET, SECCOMP_KILL, 0, 0);
    for (; n && len < 500; rule++, n--) {
        OP(BPF_EQ, rule->call, 0, rule->arg < 0 ? 1 : 5);
        if (rule->arg >= 0) {
            OP(BPF_LD, 16 + 8 * rule->arg, 0, 0);
            OP(BPF_AND, rule->mask, 0, 0);
            OP(BPF_EQ, rule->value, 0, 1);
            OP(BPF_RET, rule->action, 0, 0);
            OP(BPF_LD, 0, 0, 0);
        } else OP(BPF_RET, rule->action, 0, 0);
    }
    OP(BPF_RET, otherwise, 0, 0);
#undef OP
    prog.len = (unsigned short)len;
    return n == 0 && syscall(SYS_seccomp, 1, 1, &prog) == 0; /* SET_MODE_FILTER, for all threads (TSYNC) */
}

/* First list: what serving, loading and the callback need. */
static int sys_seccomp_begin(void) {
#define YES(name) {SYS_##name, -1, 0, 0, SECCOMP_ALLOW}
#define WHEN(name, arg, mask, value) {SYS_##name, arg, mask, value, SECCOMP_ALLOW}
#define NEVER(name) {SYS_##name, -1, 0, 0, SECCOMP_KILL}
    const sys_rule rules[] = {
        YES(futex), YES(read), YES(write), YES(recvfrom), YES(sendto), YES(clock_gettime), YES(accept4), YES(close), YES(ppoll), YES(sched_yield),
#ifdef SYS_poll
        YES(poll),
#endif
        YES(readv), YES(writev), YES(pread64), YES(recvmsg), YES(sendmsg), YES(shutdown), YES(setsockopt), YES(getsockopt), YES(getsockname), YES(brk),
        YES(munmap), YES(mremap), YES(madvise), YES(mincore), YES(fstat), YES(lseek), YES(nanosleep), YES(clock_nanosleep), YES(clock_getres),
        YES(gettimeofday), YES(getrandom), YES(getpid), YES(gettid), YES(getppid), YES(getuid), YES(geteuid), YES(sched_getaffinity), YES(sysinfo),
        YES(rt_sigaction), YES(rt_sigprocmask), YES(rt_sigreturn), YES(sigaltstack), YES(restart_syscall), YES(set_robust_list), YES(membarrier),
        YES(exit), YES(exit_group), YES(connect),
#ifdef SYS_rseq
        YES(rseq),
#else
        {SYS_AUDIT_ARCH == 0xc000003eu ? 334 : 293, -1, 0, 0, SECCOMP_ALLOW},
#endif
#ifdef SYS_time
        YES(time),
#endif
        WHEN(mmap, 2, PROT_EXEC, 0), WHEN(mprotect, 2, PROT_EXEC, 0), WHEN(socket, 0, 0xffff, AF_INET), WHEN(socket, 0, 0xffff, AF_INET6),
        WHEN(newfstatat, 3, 0x1000, 0x1000), /* AT_EMPTY_PATH: glibc's fstat */
        WHEN(clone, 0, 0x00010000, 0x00010000), /* CLONE_THREAD: threads, not processes */
        {435, -1, 0, 0, SECCOMP_ERRNO | ENOSYS}, /* clone3, whose flags a filter cannot see: then libc takes clone */
        WHEN(tgkill, 0, 0xffffffffu, (uint32_t)getpid()), WHEN(ioctl, 1, 0xffffffffu, 0x5401), /* TCGETS: is it a terminal? */
        WHEN(seccomp, 0, 0xffffffffu, 1), WHEN(fcntl, 1, 0xffffffffu, F_GETFL), WHEN(fcntl, 1, 0xffffffffu, F_SETFL), WHEN(fcntl, 1, 0xffffffffu, F_SETFD),
        NEVER(execve), NEVER(execveat), NEVER(ptrace), NEVER(process_vm_readv), NEVER(process_vm_writev),
    };
    return sys_seccomp(rules, sizeof rules / sizeof *rules, SECCOMP_ERRNO | EPERM);
}

/* Second list, in addition: what is over once the worker is registered. */
static int sys_seccomp_end(void) {
#define OVER(name) {SYS_##name, -1, 0, 0, SECCOMP_ERRNO | EPERM}
    const sys_rule rules[] = {OVER(socket), OVER(connect), OVER(clone), OVER(seccomp), OVER(rt_sigaction), OVER(newfstatat)};
    return sys_seccomp(rules, sizeof rules / sizeof *rules, SECCOMP_ALLOW);
}
#undef YES
#undef WHEN
#undef NEVER
#undef OVER

#else /* other machines, where no list has been tested */
static int sys_seccomp_begin(void) { return 0; }
static int sys_seccomp_end(void) { return 0; }
#endif

/* ==== Text =================================================================================
 * Views (str), growing buffers (buf), UTF-8, Unicode categories, JSON in and out, and the log, which is
 * JSON. A str is never owned and never ends in NUL: whoever made it says how long it lives. A buf owns its
 * bytes; when memory runs out it sets `failed` and ignores further writes, so one check at the end does. */

typedef struct {
    const char *ptr;
    size_t len;
} str;

static str str_of(const char *s) {
    str r = {s, strlen(s)};
    return r;
}
static str str_make(const char *p, size_t n) {
    str r = {p, n};
    return r;
}
static int str_eq(str a, str b) { return a.len == b.len && memcmp(a.ptr, b.ptr, a.len) == 0; }
static int str_is(str a, const char *b) { return str_eq(a, str_of(b)); }
static char str_lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c; }
static int str_ieq(str a, const char *b) { /* ASCII letters without case: header names and tokens */
    if (a.len != strlen(b)) return 0;
    for (size_t i = 0; i < a.len; i++)
        if (str_lower(a.ptr[i]) != str_lower(b[i])) return 0;
    return 1;
}
static str str_trim(str a) { /* without spaces and tabs at both ends */
    while (a.len && (*a.ptr == ' ' || *a.ptr == '\t')) a.ptr++, a.len--;
    while (a.len && (a.ptr[a.len - 1] == ' ' || a.ptr[a.len - 1] == '\t')) a.len--;
    return a;
}
static uint64_t str_hash(str a) { /* FNV-1a: for tables whose keys come from a model file, compared in full */
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < a.len; i++) h = (h ^ (unsigned char)a.ptr[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}
static char *str_dup(str a) { /* a copy that ends in NUL; the caller frees it; NULL when out of memory */
    char *p = malloc(a.len + 1);
    if (p) memcpy(p, a.ptr, a.len), p[a.len] = 0;
    return p;
}

typedef struct {
    char *ptr;
    size_t len, cap;
    int failed;
} buf;

static int buf_reserve(buf *b, size_t more) {
    if (b->failed || more > SIZE_MAX / 4) return b->failed = 1, 0;
    if (b->cap - b->len >= more) return 1;
    size_t cap = b->cap ? b->cap * 2 : 256;
    while (cap < b->len + more) cap *= 2;
    char *p = realloc(b->ptr, cap);
    if (!p) return b->failed = 1, 0;
    b->ptr = p, b->cap = cap;
    return 1;
}
static void buf_add(buf *b, const void *p, size_t n) {
    if (n && buf_reserve(b, n)) memcpy(b->ptr + b->len, p, n), b->len += n;
}
static void buf_puts(buf *b, const char *s) { buf_add(b, s, strlen(s)); }
static void buf_putc(buf *b, char c) { buf_add(b, &c, 1); }
static void buf_free(buf *b) {
    free(b->ptr);
    memset(b, 0, sizeof *b);
}
static void buf_vprintf(buf *b, const char *fmt, va_list ap) {
    va_list again;
    va_copy(again, ap);
    int n = vsnprintf(NULL, 0, fmt, again);
    va_end(again);
    if (n < 0 || !buf_reserve(b, (size_t)n + 1)) return;
    vsnprintf(b->ptr + b->len, (size_t)n + 1, fmt, ap);
    b->len += (size_t)n;
}
__attribute__((format(printf, 2, 3))) static void buf_printf(buf *b, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    buf_vprintf(b, fmt, ap);
    va_end(ap);
}
static void buf_drop(buf *b, size_t n) { /* removes the first n bytes */
    if (n == 0) return;
    memmove(b->ptr, b->ptr + n, b->len - n);
    b->len -= n;
}
static str buf_str(const buf *b) { return str_make(b->ptr ? b->ptr : "", b->len); }
static const char *buf_cstr(buf *b) { /* ends in NUL; "" when memory ran out */
    buf_putc(b, 0);
    if (b->failed) return "";
    b->len--;
    return b->ptr;
}

/* SHA-256 (FIPS 180-4), so that a token can be compared without being kept. */
static uint32_t sha256_turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t h[8], const uint32_t k[64], const unsigned char *p) {
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 | (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + w[i - 7] + (sha256_turn(w[i - 15], 7) ^ sha256_turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (sha256_turn(w[i - 2], 17) ^ sha256_turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t e = v[4], a = v[0];
        uint32_t t1 = v[7] + (sha256_turn(e, 6) ^ sha256_turn(e, 11) ^ sha256_turn(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t t2 = (sha256_turn(a, 2) ^ sha256_turn(a, 13) ^ sha256_turn(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1, v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) h[i] += v[i];
    sys_wipe(w, sizeof w);
}

static uint32_t sha256_root(int prime, int cube) { /* the first 32 bits of the fraction of its square or cube root */
    uint64_t root = 0;
    for (int bit = 35; bit >= 0; bit--) { /* floor(root(prime) x 2^32), bit by bit */
        uint64_t r = root | (uint64_t)1 << bit;
        double x = (double)r / 4294967296.0; /* exact; the roots are far from 36-bit numbers */
        if ((cube ? x * x * x : x * x) <= prime) root = r;
    }
    return (uint32_t)root;
}

static void sha256(str text, unsigned char out[32]) {
    uint32_t h[8], k[64];
    unsigned char last[128] = {0};
    for (int n = 2, i = 0; i < 64; n++) {
        int prime = 1;
        for (int d = 2; d * d <= n; d++) prime &= n % d != 0;
        if (!prime) continue;
        if (i < 8) h[i] = sha256_root(n, 0);
        k[i++] = sha256_root(n, 1);
    }
    size_t whole = text.len / 64 * 64, rest = text.len - whole, end = rest < 56 ? 64 : 128;
    for (size_t at = 0; at < whole; at += 64) sha256_block(h, k, (const unsigned char *)text.ptr + at);
    memcpy(last, text.ptr + whole, rest), last[rest] = 0x80;
    for (int i = 0; i < 8; i++) last[end - 1 - (size_t)i] = (unsigned char)((uint64_t)text.len * 8 >> 8 * i);
    for (size_t at = 0; at < end; at += 64) sha256_block(h, k, last + at);
    for (int i = 0; i < 32; i++) out[i] = (unsigned char)(h[i / 4] >> (24 - i % 4 * 8));
    sys_wipe(last, sizeof last);
}

/* ---- UTF-8 ---- */

/* Looks at the first code point of p[0..n). Returns its length and sets *cp; or 0 when the bytes are the
 * beginning of a code point but end too soon; or -k when the first k bytes can be no part of any
 * code point (k as in Unicode's "maximal subpart", section 3.9, so that each run becomes one U+FFFD). */
static int utf8_decode(const char *s, size_t n, uint32_t *cp) {
    const unsigned char *p = (const unsigned char *)s;
    if (n == 0) return 0;
    unsigned c = p[0], need, lo = 0x80, hi = 0xbf, v;
    if (c < 0x80) return *cp = c, 1;
    if (c >= 0xc2 && c <= 0xdf) need = 1, v = c & 31;
    else if (c >= 0xe0 && c <= 0xef) need = 2, v = c & 15, lo = c == 0xe0 ? 0xa0 : 0x80, hi = c == 0xed ? 0x9f : 0xbf;
    else if (c >= 0xf0 && c <= 0xf4) need = 3, v = c & 7, lo = c == 0xf0 ? 0x90 : 0x80, hi = c == 0xf4 ? 0x8f : 0xbf;
    else return -1;
    for (unsigned i = 1; i <= need; i++) {
        if (i >= n) return 0;
        if (p[i] < lo || p[i] > hi) return -(int)i;
        v = v << 6 | (p[i] & 63u);
        lo = 0x80, hi = 0xbf;
    }
    *cp = v;
    return (int)need + 1;
}

static int utf8_encode(uint32_t c, char out[4]) {
    if (c < 0x80) return out[0] = (char)c, 1;
    if (c < 0x800) return out[0] = (char)(0xc0 | c >> 6), out[1] = (char)(0x80 | (c & 63)), 2;
    if (c < 0x10000)
        return out[0] = (char)(0xe0 | c >> 12), out[1] = (char)(0x80 | (c >> 6 & 63)), out[2] = (char)(0x80 | (c & 63)), 3;
    out[0] = (char)(0xf0 | c >> 18), out[1] = (char)(0x80 | (c >> 12 & 63));
    out[2] = (char)(0x80 | (c >> 6 & 63)), out[3] = (char)(0x80 | (c & 63));
    return 4;
}

/* The number of code points, or -1 if the text is not UTF-8. */
static int64_t utf8_count(str s) {
    int64_t n = 0;
    for (size_t i = 0; i < s.len; n++) {
        uint32_t cp;
        int k = utf8_decode(s.ptr + i, s.len - i, &cp);
        if (k <= 0) return -1;
        i += (size_t)k;
    }
    return n;
}

/* ---- Unicode general categories ---- */

enum unicode_category { /* in the order of the letters A-Z, a-d of unicode_runs */
    UC_LU, UC_LL, UC_LT, UC_LM, UC_LO, UC_MN, UC_MC, UC_ME, UC_ND, UC_NL, UC_NO, UC_PC, UC_PD, UC_PS, UC_PE,
    UC_PI, UC_PF, UC_PO, UC_SM, UC_SC, UC_SK, UC_SO, UC_ZS, UC_ZL, UC_ZP, UC_CC, UC_CF, UC_CS, UC_CO, UC_CN
};

/* The category of every code point from 0 on, as runs: a letter (the category) and the length of the run
 * if it is more than 1; z and a number stand for that many pairs of Lu, Ll. From Unicode 15.1's
 * UnicodeData.txt. */
static const char *const unicode_runs[] = {
    "Z32WR3TR3NORSRMR2I10R2S3R2A26NROULUB26NSOSZ33WRT4VRUVEPSaVUVSK2UBR2UKEQK3RA23SA7B24SB8z27AB2",
    "z7AB2z23A2BABAB3A2BABA2BA3B2A4BA2BA3B3A2BA2Bz2A2BAB2ABA2BA3BABA2B2EAB3E4ACBACBACBz7AB2z8AB2A",
    "CBABA3Bz28AB7A2BA2B2ABA4Bz3AB69EB27D18U4D12U14D5U7DUDU17F112z2DUABd2DB3RAd4U2ARA3dAdA2BA17d",
    "A9B35AB2A3B3z11AB5ABSABA2B2A51B48z17VF5H2z27A2Bz5AB2z48dA38d2DR6B41RMd2V2TdF45MFRF2RF2RFd8",
    "E27d4E4R2d11a6S3R2TR2V2F11RaR3E32DE10F21I10R4E2FE99REF7aVF6D2F2VF4E2I10E3V2ER14daEFE30F27d2",
    "E89F11Ed14I10E33F9D2VR3Dd2FT2E22F4DF9DF3DF5d2R15dE25F3d2RdE11d5E24UE6da2d6F8E41DF24aF32GE54F",
    "GFEG3F8G4FG2EF7E10F2R2I10RDE15FG2dE8d2E2d2E22dE7dEd3E4d2FEG3F4d2G2d2G2FEd8Gd4E2dE3F2d2I10E2",
    "T2K6VTERFd2F2GdE6d4E2d2E22dE7dE2dE2dE2d2FdG3F2d4F2d2F3d3Fd7E4dEd7I10F2E3FRd10F2GdE9dE3dE22d",
    "E7dE2dE5d2FEG3F5dF2GdG2Fd2Ed15E2F2d2I10RTd7EF6dFG2dE8d2E2d2E22dE7dE2dE5d2FEGFGF4d2G2d2G2Fd7",
    "F2Gd4E2dE3F2d2I10VEK6d10FEdE6d3E3dE4d3E2dEdE2d3E2d3E3d3E12d4G2FG2d3G3dG3Fd2Ed6Gd14I10K3V6TV",
    "d5FG3FE8dE3dE23dE16d2FEF3G4dF3dF4d7F2dE3d2Ed2E2F2d2I10d7RK7VEFG2RE8dE3dE23dE10dE5d2FEGFG5dF",
    "G2dG2F2d7G2d6E2dE2F2d2I10dE2Gd12F2G2E9dE3dE41F2EG3F4dG3dG3FEVd4E3GK7E3F2d2I10K9VE6dFG2dE18d3",
    "E24dE9dEd2E7d3Fd4G3F3dFdG8d6I10d2G2Rd12E48FE2F7d4TE6DF8RI10R2d37E2dEdE5dE24dEdE10FE2F9Ed2E5d",
    "DdF7dI10d2E4d32EV3R15VRV3F2V6I10K10VFVFVFNONOG2E8dE36d4F14GF5RF2E5F11dF36dV8FV6dV2R5V4R2d37",
    "E43G2F4GF6GF2G2F2EI10R6E6G2F2E4F3EG3E2G7E3F4E13FG2F2G6FEGI10G3FV2A38dAd5Ad2B43RDB3E329dE4d2",
    "E7dEdE4d2E41dE4d2E33dE4d2E7dEdE4d2E15dE57dE4d2E67d2F3R9K20d3E16V10d6A86d2B6d2ME620VRE17WE26N",
    "Od3E75R3J3E8d7E18F3Gd9E19F2GR2d9E18F2d12E13dE3dF2d12E52F2GF7G8FG2F11R3DR3TEFd2I10d6K10d6R6M",
    "R4F3aFI10d6E35DE53d7E5F2E34FEd5E70d10E31dF3G4F2G3d4G2FG6F3d4Vd3R2I10E30d2E5d11E44d4E26d6I10K",
    "d3V34E23F2G2Fd2R2E53GFGF7dFGFG2F8G6F10d2FI10d6I10d6R7DR6d2F14HF16d49F4GE47FGF5GFG5FG2E8d3I10",
    "R7V10F9V9R2dF2GE30GF4G2F2GF3E2I10E44FGF2G3FGF3G2d8R4E36G8F8G2F2d3R5I10d3E3I10E30D6R2B9d7A43",
    "d2A3R8d8F3RF13GF7E4FE6FE2GF2Ed5B44D63B13DB34D37F64z74AB9z48AB9A8B6d2A6d2B8A8B8A8B6d2A6d2B8dA",
    "dAdAdAB8A8B14d2B8C8B8C8B8C8B5dB2A4CUBU3B3dB2A4CU3B4d2B2A4dU3B8A5U3d2B3dB2A4CU2dW11a5M6R2PQN",
    "P2QNPR8XYa5WR9PQR4L2R3SNOR11SRLR10Wa5da10KDd2K6S3NODK10S3NOdD13d3T33d15F13H4FH3F12d15V2AV4A",
    "V2BA3B2A3BVAV2SA5V6AVAVAVA4VBA4BE4BV2B2A2S5AB4VSV2BVK16J35ABJ4KV2d4S5V5S2V4SV2SV2SV7SV31S2V2",
    "SVSV31S268V8NONOV20S2V7NOV81SV30S25V40S6V69d25V11d21K60V78K22V183SV9SV54S8V111SV248NONONONON",
    "ONONOK30V44S5NOS31NONONONONOS16V256S131NONONONONONONONONONONOS63NONOS32NOS258V48S21V2S6V39d2",
    "V32dV105A48B48ABA3B2z3A4BAB2AB6D2A3Bz48AB2V6z2F3ABd5R4KR2B38dBd5Bd2E56d7DRd14FE23d9E7dE7dE7d",
    "E7dE7dE7dE7dE7dF32R2PQPQR3PQRPQR9MR2MRPQR2PQNONONONOR5DR10M2R4MRNR13V2R3NONONONOMd34V26dV89",
    "d12V214d26V16WR3VDEJNONONONONOV2NONONONOMNO2VJ9F4G2MD5V2J3DERV2dE86d2F2U2D2EME90RD3Ed5E43d",
    "E94dV2K4V10E32V36d11VE16V31dK10V30K8VK15V32K10V39K15V320E6592V64E21013DE1143d3V55d9E40D6R2",
    "E268DR3E16I10E2d20z23EFH3RF10RDz14D2F2E70J10F2R6d8U23D9U2z6AB3z31DB8z2A2Bz4DU2z2EABAB3z10A5B",
    "A5Bz7A4BABd5ABdBdBz2d24D3ABED2BE7FE3FE4FE23G2F2GV4Fd3K6V2TVd6E52R4d8G2E50G16F2d8R2I10d6F18E6",
    "R3ERE2FI10E28F8R2E23F11G2d11RE29d3F3GE47FG2F4G2F2G3R13dDI10d4R2E5FDE9I10E5dE41F6G2F2G2F2d9E3",
    "FE8FGd2I10d2R4E16DE6V3EGFGE50FEF3E2F2E5F2EFEd24E2DR2E11GF2G2R2ED2GFd10E6d2E6d2E6d9E7dE7dB43U",
    "D4B9DU2d4B80E35G2FG2FG2RGFd2I10d6E11172d12E23d4E49d4b2048c6400E366d2E106d38B7d12B5d5EFE10S",
    "E13dE5dEdE2dE2dE108U17d16E363ONV16E64d2E54d7Vd32E12TV3F16R7NORd6F16RM2L2NONONONONONONONOR2NO",
    "R4L3R3dR4MNONONOR3SMS3dRTR2d4E5dE135d2adR3TR3NORSRMR2I10R2S3R2A26NROULUB26NSOSNORNOR2E10DE45",
    "D2E31d3E6d2E6d2E6d2E3d3T2SUVT2dVS4V2d10a3V2d2E12dE26dE19dE2dE15d2E14d34E123d5R3d4K45d3V9J53",
    "K4V17K2V3dV13d3Vd47V45Fd130E29d3E49d15FK27d4E32K4d9E20JE8Jd5E38F5d5E30dRE36d4E8RJ5d42A40B40",
    "E78d2I10d6A36d4B36d4E40d8E52d11RA11dA15dA7dA2dB11dB15dB7dB2d67E311d9E22d10E8d24D6dD42dD9d69",
    "E6d2EdE44dE2d3Ed2E23dRK8E23V2K7E31d8K9d48E19dE2d5K5E22K6d3RE26d5Rd64E56d4K2E2K16d2K46EF3dF2",
    "d5F4E4dE3dE29d2F3d4FK9d7R9d7E29K2RE29K3d32E8VE28F2d4K5R7d9E54d3R7E22d2K8E19d5K8E18d7R4d12K7",
    "d80E73d55A51d13B51d7K6E36F4d8I10d294K31dE42dF2Md2E2d75F3E29K10Ed8E22F11K4R5d22E18F4R4d38E21",
    "K7d20E23d9GFGE53F15R7d4K20I10FE2F2Ed9F3GE45G3F4G2F2R2aR4Fd10ad2E25d7I10d6F3E36F5GF8dI10R4EG2",
    "Ed8E35FR2Ed9F2GE48G3F9G2E4R4F4RGFI10ERER3dK20d11E18dE25G3F3G2FGF2R6FE2Fd62E7dEdE4dE15dE10Rd6",
    "E47FG3F8d5I10d6F2G2dE8d2E2d2E22dE7dE2dE5dF2EG2FG4d2G2d2G3d2Ed6Gd5E5G2d2F7d3F5d139E53G3F8G2F3",
    "GFE4R5I10R2dRFE3d30E48G3F6GFG4F2GF2E2REd8I10d166E47G3F4d2G4F2GF2R23E4F2d34E48G3F8G2FGF2R3E",
    "d11I10d6R13d19E43FGFG2F6GFERd6I10d54E27d2F3G2F4GF5d4I10K2R3VE7d185E44G3F9GF2Rd100A32B32I10K9",
    "d12E8d2Ed2E8dE2dE24G6dG2d2F2GFEGEGFR3d9I10d70E8d2E39G3F4d2F2G4FEREGd27EF10E40F6GEF4R8Fd8EF6",
    "G2F3E46F13GF2R3ER5d13E73d7R10d246E9dE37GF7dF6GFER5d10I10K19d3R2E30d2F22dGF7GF2GF2d73E7dE2d",
    "E38F6d3FdF2dF7EFd8I10d6E6dE2dE32G5dF2dG2FGFEd7I10d310E19F2G2R2d7F2EGE13dE34G2F5d3G2FGFR13I10",
    "d86Ed15K21V8T4V17d13RE922d102J111dR5d11E196d2636E97R2d13E1072a16FE6F15d4010E583d8633E569d7",
    "E31dI10d4R2E79dI10d6E30d2F5Rd10E48F7R5V4D4RVd10I10dK7dE21d5E19d688A32B32K23R4d101E75d4FEG55",
    "d7F4D13d64D2RDFd11G2d14E6136d8E1238d42E9d8935D4dD7dD2dE291d15Ed29E3d2Ed14E4d8E396d2308E107d5",
    "E13d3E9d7E10d2VF2Ra4d4700F46d2F23d9V116d60V246d10V39d2V60G2F3V3G6a8F8V2F7V30F4V61d21V66F3V",
    "d122K20d12K20d12V87d9K25d135A26B26A26B7dB18A26B26AdA2d2Ad2A2d2A4dA8B4dBdB7dB11A26B26A2dA4d2",
    "A8dA7dB26A2dA4dA5dAd3A7dB26A26B26A26B26A26B26A26B26A26B26A26B28d2A25SB25SB6A25SB25SB6A25SB25",
    "SB6A25SB25SB6A25SB25SB6ABd2I50V512F55V4F50V8FV14FV2R5d15F5dF15d1104B10EB20d6B6d213F7dF17d2F7",
    "dF2dF5d5D62d33Fd112E45d3F7D7d2I10d4EVd320E30Fd17E44F4I10d5Td464E27DF4I10d742E7dE4dE2dE15d",
    "E197d2K9F7d41A34B34F7Dd4I10d4R2d785K59VK3TK4d76K45VK15d194E4dE27dE2dEd2EdE10dE4dEdEd6Ed4EdEd",
    "EdE3dE2dEd2EdEdEdEdEdE2dEd2E4dE7dE4dE4dEdE10dE17d5E3dE5dE17d52S2d270V44d4V100d12V15d2V15dV15",
    "dV37d10K13V161d56V29d13V44d4V9d7V2d14V6d154V251U5V728d4V17d3V13d3V119d4V95d6V12d4Vd15V12d4",
    "V56d8V10d6V40d8V30d2V2d78V340d12V14d2V13d3V9d7V46dV7d8V14d4V9d7V9d7V147dV55d37I10d1030E42720",
    "d32E4154d6E222d2E5762d14E7473d15E622d2466E542d1506E4939d5E4192d711761ad30a96d128F240d65040",
    "c65534d2c65534d2",
};

static struct {
    pthread_once_t once;
    int n;
    uint32_t first[4096]; /* ascending starts of the runs */
    unsigned char category[4096];
} unicode_table = {PTHREAD_ONCE_INIT, 0, {0}, {0}};

static void unicode_expand(void) {
    uint32_t at = 0;
    int n = 0;
    for (size_t line = 0; line < sizeof unicode_runs / sizeof *unicode_runs; line++) {
        for (const char *p = unicode_runs[line]; *p;) {
            char c = *p++;
            uint32_t len = *p >= '0' && *p <= '9' ? (uint32_t)strtoul(p, (char **)&p, 10) : 1;
            uint32_t runs = c == 'z' ? 2 * len : 1;
            for (uint32_t i = 0; i < runs; i++) {
                unicode_table.first[n] = at;
                unicode_table.category[n++] = (unsigned char)(c == 'z' ? i & 1 : c <= 'Z' ? (uint32_t)(c - 'A') : (uint32_t)(c - 'a') + 26);
                at += c == 'z' ? 1 : len;
            }
        }
    }
    unicode_table.n = n;
}

static int unicode_category(uint32_t cp) {
    pthread_once(&unicode_table.once, unicode_expand);
    int lo = 0, hi = unicode_table.n - 1;
    while (lo < hi) { /* the last run that begins at or before cp */
        int mid = (lo + hi + 1) / 2;
        if (unicode_table.first[mid] <= cp) lo = mid;
        else hi = mid - 1;
    }
    return unicode_table.category[lo];
}

static int unicode_is_space(uint32_t c) { /* the White_Space property */
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/* ---- JSON, reading (RFC 8259) ----
 * A pull reader: json_next gives one event at a time and keeps no tree, so memory does not depend on the
 * document and nesting costs one bit. The first error sticks. Grammar, with the state that expects it:
 *   value  = object | array | string | number | "true" | "false" | "null"        (JSON_AT_VALUE)
 *   object = "{" [ string ":" value *( "," string ":" value ) ] "}"               (JSON_AT_FIRST, JSON_AT_KEY)
 *   array  = "[" [ value *( "," value ) ] "]"                                     (JSON_AT_FIRST)          */

enum json_type {
    JSON_ERROR, JSON_END, JSON_OBJECT, JSON_OBJECT_END, JSON_ARRAY, JSON_ARRAY_END,
    JSON_KEY, JSON_STRING, JSON_NUMBER, JSON_TRUE, JSON_FALSE, JSON_NULL
};
enum json_state { JSON_AT_VALUE, JSON_AT_FIRST, JSON_AT_KEY, JSON_AT_COMMA, JSON_AT_END };

typedef struct {
    str text;           /* the document, owned by the caller */
    size_t pos;
    uint64_t objects;   /* bit d is set when the bracket at depth d is an object's */
    int depth;
    enum json_state state;
    const char *error;  /* NULL, or what is wrong at pos */
    str token;          /* of KEY and STRING: the text between the quotes, still escaped; else the literal */
} json_reader;

static enum json_type json_fail(json_reader *r, const char *what) {
    if (!r->error) r->error = what;
    return JSON_ERROR;
}

static json_reader json_open(str text) {
    json_reader r;
    memset(&r, 0, sizeof r);
    r.text = text;
    return r;
}

static void json_skip_space(json_reader *r) {
    while (r->pos < r->text.len && strchr(" \t\r\n", r->text.ptr[r->pos]) && r->text.ptr[r->pos]) r->pos++;
}

/* Four hex digits at p, or -1. */
static int json_hex4(const char *p, const char *end) {
    int v = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        if (c >= '0' && c <= '9') v = v * 16 + c - '0';
        else if (str_lower(c) >= 'a' && str_lower(c) <= 'f') v = v * 16 + str_lower(c) - 'a' + 10;
        else return -1;
    }
    return v;
}

/* The escape that begins at p ("\\" included): sets *cp, returns its length, or 0 if it is malformed or
 * half a surrogate pair. */
static int json_escape(const char *p, const char *end, uint32_t *cp) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (end - p < 2) return 0;
    const char *at = p[1] ? strchr(from, p[1]) : NULL;
    if (at) return *cp = (unsigned char)to[at - from], 2;
    if (p[1] != 'u') return 0;
    int hi = json_hex4(p + 2, end);
    if (hi < 0 || (hi >= 0xdc00 && hi <= 0xdfff)) return 0;
    if (hi < 0xd800 || hi > 0xdbff) return *cp = (uint32_t)hi, 6;
    int lo = end - p >= 12 && p[6] == '\\' && p[7] == 'u' ? json_hex4(p + 8, end) : -1;
    if (lo < 0xdc00 || lo > 0xdfff) return 0;
    *cp = 0x10000 + ((uint32_t)hi - 0xd800) * 0x400 + ((uint32_t)lo - 0xdc00);
    return 12;
}

static int json_read_string(json_reader *r) {
    const char *p = r->text.ptr + r->pos + 1, *end = r->text.ptr + r->text.len, *from = p;
    uint32_t cp;
    while (p < end && *p != '"') {
        if ((unsigned char)*p < 0x20) return json_fail(r, "unescaped control character in a string"), 0;
        int k = *p == '\\' ? json_escape(p, end, &cp) : utf8_decode(p, (size_t)(end - p), &cp);
        if (k <= 0) {
            r->pos = (size_t)(p - r->text.ptr);
            return json_fail(r, *p == '\\' ? "bad escape in a string" : "not UTF-8"), 0;
        }
        p += k;
    }
    if (p >= end) return json_fail(r, "unterminated string"), 0;
    r->token = str_make(from, (size_t)(p - from));
    r->pos = (size_t)(p + 1 - r->text.ptr);
    return 1;
}

static int json_digits(const json_reader *r, size_t *p) { /* skips digits; 0 when there are none */
    size_t from = *p;
    while (*p < r->text.len && r->text.ptr[*p] >= '0' && r->text.ptr[*p] <= '9') ++*p;
    return *p > from;
}

/* number = [ "-" ] ( "0" | digit1-9 *digit ) [ "." 1*digit ] [ ( "e" | "E" ) [ "+" | "-" ] 1*digit ] */
static int json_read_number(json_reader *r) {
    const char *s = r->text.ptr;
    size_t p = r->pos, n = r->text.len;
    if (s[p] == '-') p++;
    if (p < n && s[p] == '0') p++;
    else if (!json_digits(r, &p)) return json_fail(r, "bad number"), 0;
    if (p < n && s[p] == '.' && (p++, !json_digits(r, &p))) return json_fail(r, "bad number"), 0;
    if (p < n && (s[p] == 'e' || s[p] == 'E')) {
        p++;
        if (p < n && (s[p] == '+' || s[p] == '-')) p++;
        if (!json_digits(r, &p)) return json_fail(r, "bad number"), 0;
    }
    r->token = str_make(s + r->pos, p - r->pos);
    r->pos = p;
    return 1;
}

static int json_read_word(json_reader *r, const char *word) {
    size_t n = strlen(word);
    if (r->text.len - r->pos < n || memcmp(r->text.ptr + r->pos, word, n)) return json_fail(r, "unexpected text"), 0;
    r->token = str_make(r->text.ptr + r->pos, n);
    r->pos += n;
    return 1;
}

static void json_after_value(json_reader *r) { r->state = r->depth ? JSON_AT_COMMA : JSON_AT_END; }

static enum json_type json_open_bracket(json_reader *r, int object) {
    if (r->depth == MAX_JSON_DEPTH) return json_fail(r, "nested too deeply");
    uint64_t bit = (uint64_t)1 << r->depth++;
    r->objects = object ? r->objects | bit : r->objects & ~bit;
    r->pos++;
    r->state = JSON_AT_FIRST;
    return object ? JSON_OBJECT : JSON_ARRAY;
}

static enum json_type json_close_bracket(json_reader *r, int object) {
    r->depth--;
    r->pos++;
    json_after_value(r);
    return object ? JSON_OBJECT_END : JSON_ARRAY_END;
}

static enum json_type json_value(json_reader *r) {
    enum json_type t = JSON_ERROR;
    switch (r->text.ptr[r->pos]) {
    case '{': return json_open_bracket(r, 1);
    case '[': return json_open_bracket(r, 0);
    case '"': t = json_read_string(r) ? JSON_STRING : JSON_ERROR; break;
    case 't': t = json_read_word(r, "true") ? JSON_TRUE : JSON_ERROR; break;
    case 'f': t = json_read_word(r, "false") ? JSON_FALSE : JSON_ERROR; break;
    case 'n': t = json_read_word(r, "null") ? JSON_NULL : JSON_ERROR; break;
    case '-': case '0': case '1': case '2': case '3': case '4': case '5': case '6': case '7': case '8': case '9':
        t = json_read_number(r) ? JSON_NUMBER : JSON_ERROR;
        break;
    default: return json_fail(r, "unexpected character");
    }
    json_after_value(r);
    return t;
}

static enum json_type json_next(json_reader *r) {
    if (r->error) return JSON_ERROR;
    json_skip_space(r);
    int ended = r->pos >= r->text.len;
    if (r->state == JSON_AT_END) return ended ? JSON_END : json_fail(r, "text after the document");
    if (ended) return json_fail(r, r->text.len ? "unexpected end" : "empty document");
    char c = r->text.ptr[r->pos];
    int object = r->depth && (r->objects >> (r->depth - 1) & 1);
    if (r->state == JSON_AT_COMMA || r->state == JSON_AT_FIRST) {
        if (c == (object ? '}' : ']')) return json_close_bracket(r, object);
        if (r->state == JSON_AT_COMMA) {
            if (c != ',') return json_fail(r, "expected a comma or the end of the object or array");
            r->pos++;
            json_skip_space(r);
            if (r->pos >= r->text.len) return json_fail(r, "unexpected end");
            c = r->text.ptr[r->pos];
        }
        r->state = object ? JSON_AT_KEY : JSON_AT_VALUE;
    }
    if (r->state == JSON_AT_VALUE) return json_value(r);
    if (c != '"') return json_fail(r, "expected a key in quotes");
    if (!json_read_string(r)) return JSON_ERROR;
    str key = r->token;
    json_skip_space(r);
    if (r->pos >= r->text.len || r->text.ptr[r->pos] != ':') return json_fail(r, "expected a colon after a key");
    r->pos++;
    r->state = JSON_AT_VALUE;
    r->token = key;
    return JSON_KEY;
}

/* After an event that began a value: skips to the value's end. */
static void json_skip(json_reader *r, enum json_type t) {
    if (t != JSON_OBJECT && t != JSON_ARRAY) return;
    for (int depth = r->depth; r->depth >= depth;)
        if (json_next(r) == JSON_ERROR) return;
}

/* Decodes the escapes of a KEY or STRING token into b. */
static void json_unescape(str token, buf *b) {
    for (size_t i = 0; i < token.len;) {
        const char *p = token.ptr + i, *back = memchr(p, '\\', token.len - i);
        size_t plain = back ? (size_t)(back - p) : token.len - i;
        buf_add(b, p, plain);
        i += plain;
        uint32_t cp;
        char out[4];
        int k = back ? json_escape(back, token.ptr + token.len, &cp) : 0;
        if (!k) continue;
        buf_add(b, out, (size_t)utf8_encode(cp, out));
        i += (size_t)k;
    }
}

static double json_double(str token) { /* of a NUMBER; beyond the range of double it is infinite */
    char tmp[64];
    if (token.len < sizeof tmp) return memcpy(tmp, token.ptr, token.len), tmp[token.len] = 0, strtod(tmp, NULL);
    char *copy = str_dup(token); /* hundreds of digits: legal */
    double v = copy ? strtod(copy, NULL) : (double)NAN; /* out of memory: no number's value */
    free(copy);
    return v;
}

/* The value of a NUMBER that is a whole number of 0..2^64-1, as "42" or "1e3"; 0 if it is none. */
static int json_u64(str token, uint64_t *v) {
    *v = 0;
    size_t i = 0;
    for (; i < token.len && token.ptr[i] >= '0' && token.ptr[i] <= '9'; i++) {
        unsigned d = (unsigned)(token.ptr[i] - '0');
        if (*v > (UINT64_MAX - d) / 10) return 0;
        *v = *v * 10 + d;
    }
    if (i == token.len) return 1;
    double f = json_double(token);
    if (!(f >= 0 && f < 9007199254740992.0) || f != (double)(uint64_t)f) return 0;
    *v = (uint64_t)f;
    return 1;
}

/* ---- JSON, writing ---- */

/* A string in quotes. Bytes that are not UTF-8 come out as U+FFFD, so the result is always valid. */
static void json_put_str(buf *b, str s) {
    buf_putc(b, '"');
    for (size_t i = 0; i < s.len;) {
        uint32_t cp = 0xfffd;
        int k = utf8_decode(s.ptr + i, s.len - i, &cp);
        if (k <= 0) {
            buf_puts(b, "\xef\xbf\xbd");
            i += k < 0 ? (size_t)-k : s.len - i;
            continue;
        }
        if (cp == '"' || cp == '\\') buf_putc(b, '\\'), buf_putc(b, (char)cp);
        else if (cp == '\n') buf_puts(b, "\\n");
        else if (cp == '\t') buf_puts(b, "\\t");
        else if (cp < 0x20 || (cp >= 0x7f && cp <= 0x9f)) buf_printf(b, "\\u%04x", (unsigned)cp);
        else buf_add(b, s.ptr + i, (size_t)k);
        i += (size_t)k;
    }
    buf_putc(b, '"');
}

static void json_put_key(buf *b, const char *key) { /* a comma where one is due, and "key": */
    if (b->len && b->ptr[b->len - 1] != '{' && b->ptr[b->len - 1] != '[') buf_putc(b, ',');
    buf_printf(b, "\"%s\":", key);
}
static void json_kv_str(buf *b, const char *key, str v) { json_put_key(b, key), json_put_str(b, v); }
static void json_kv_cstr(buf *b, const char *key, const char *v) { json_kv_str(b, key, str_of(v)); }
static void json_kv_int(buf *b, const char *key, int64_t v) { json_put_key(b, key), buf_printf(b, "%lld", (long long)v); }
static void json_kv_u64(buf *b, const char *key, uint64_t v) { json_put_key(b, key), buf_printf(b, "%llu", (unsigned long long)v); }
static void json_kv_bool(buf *b, const char *key, int v) { json_put_key(b, key), buf_puts(b, v ? "true" : "false"); }
static void json_put_num(buf *b, double v, int digits) { /* null where JSON has no number */
    if (v - v != 0) buf_puts(b, "null");
    else buf_printf(b, "%.*f", digits, v);
}
static void json_kv_num(buf *b, const char *key, double v, int digits) { json_put_key(b, key), json_put_num(b, v, digits); }

/* ---- the log: one JSON object a line, or a readable line on a terminal ---- */

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG, LOG_TRACE };
static const char *const log_level_names[] = {"ERROR", "WARN", "INFO", "DEBUG", "TRACE"};

static struct {
    pthread_mutex_t lock;
    enum log_level level;
    int json;   /* 0: text for a terminal */
    int quiet;  /* subcommands and embedders: no log at all */
    char worker_id[128];
    uint64_t dropped, told; /* lines that a full pipe did not take; how many of them a later line has told of */
} log_state = {PTHREAD_MUTEX_INITIALIZER, LOG_INFO, 1, 1, "", 0, 0};

static int log_put(const char *line, size_t len) { /* under lock; 0: stderr would block */
    struct pollfd p = {STDERR_FILENO, POLLOUT, 0};
    return poll(&p, 1, 0) == 1 && (p.revents & POLLOUT) && write(STDERR_FILENO, line, len) == (ssize_t)len;
}

/* Writes one line, or drops it when stderr would block: a pipe that polls as writable takes PIPE_BUF
 * bytes at once, and the lock keeps other writers away in between. The next line that gets through tells
 * how many were lost before it. */
static void log_write(const char *line, size_t len, const char *when) {
    char note[512];
    pthread_mutex_lock(&log_state.lock);
    if (log_state.dropped != log_state.told) {
        int n = snprintf(note, sizeof note,
                         log_state.json ? "{\"timestamp\":\"%s\",\"level\":\"WARN\",\"component\":\"lorch\",\"worker_id\":\"%s\",\"event\":\"error\","
                                          "\"message\":\"stderr was full: log lines were dropped\",\"dropped\":%llu}\n"
                                        : "%s WARN %s: stderr was full: %llu log lines were dropped\n",
                         when, log_state.worker_id, (unsigned long long)(log_state.dropped - log_state.told));
        if (n > 0 && n < (int)sizeof note && log_put(note, (size_t)n)) log_state.told = log_state.dropped;
    }
    if (log_state.dropped != log_state.told || !log_put(line, len)) log_state.dropped++;
    pthread_mutex_unlock(&log_state.lock);
}

/* Logs `event` with more members in `fields`: JSON members without braces, "\"a\":1,\"b\":2", or "".
 * Never pass prompts, output or tokens. Any thread. */
static void log_event(enum log_level level, const char *event, const char *correlation, str job_id, const char *fields) {
    if (log_state.quiet || level > log_state.level) return;
    char when[32];
    buf b = {0};
    sys_timestamp(when, 1);
    if (log_state.json) {
        buf_putc(&b, '{');
        json_kv_cstr(&b, "timestamp", when);
        json_kv_cstr(&b, "level", log_level_names[level]);
        json_kv_cstr(&b, "component", "lorch");
        json_kv_cstr(&b, "worker_id", log_state.worker_id);
        if (correlation && *correlation) json_kv_cstr(&b, "correlation_id", correlation);
        if (job_id.len) json_kv_str(&b, "job_id", job_id);
        json_kv_cstr(&b, "event", event);
        if (*fields) buf_printf(&b, ",%s", fields);
        buf_puts(&b, "}\n");
    } else {
        buf_printf(&b, "%.8s %-5s %s %s", when + 11, log_level_names[level], event, fields);
        if (job_id.len) json_kv_str(&b, "job_id", job_id);
        buf_putc(&b, '\n');
    }
    if (!b.failed && b.len <= MAX_LOG_LINE) log_write(b.ptr, b.len, when);
    else if (!b.failed) { /* cannot be written atomically: keep what identifies it */
        buf_free(&b);
        buf_printf(&b, "{\"timestamp\":\"%s\",\"level\":\"%s\",\"component\":\"lorch\",\"event\":\"%s\",\"truncated\":true}\n",
                   when, log_level_names[level], event);
        if (!b.failed) log_write(b.ptr, b.len, when);
    }
    buf_free(&b);
}

/* The same with printf-style fields; strings in them must be free of quotes and backslashes. */
__attribute__((format(printf, 3, 4))) static void log_note(enum log_level level, const char *event, const char *fmt, ...) {
    buf b = {0};
    va_list ap;
    va_start(ap, fmt);
    buf_vprintf(&b, fmt, ap);
    va_end(ap);
    log_event(level, event, NULL, str_of(""), buf_cstr(&b));
    buf_free(&b);
}

/* Formats an error message for a caller's buffer; returns 0, so that `return fail(...)` reads well. */
__attribute__((format(printf, 3, 4))) static int sys_fail(char *err, size_t cap, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err, cap, fmt, ap);
    va_end(ap);
    return 0;
}

/* ==== Number formats =======================================================================
 * How weights are stored and what a product with them means. A format is one row of quant_formats: its
 * block, and one function that unpacks a block into codes and scales. quant_dot is the specification of
 * the whole program: every kernel of every instruction set equals it bit for bit. Block layouts are those
 * of ggml (ggml-common.h); this section owns no memory. The first part is arithmetic that no C library
 * may differ in: half floats, the fused multiply-add, exp, log, sin and cos. */

LORCH_INLINE uint32_t num_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
LORCH_INLINE float num_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
LORCH_INLINE uint64_t num_bits64(double f) {
    uint64_t u;
    memcpy(&u, &f, 8);
    return u;
}
LORCH_INLINE double num_double(uint64_t u) {
    double f;
    memcpy(&f, &u, 8);
    return f;
}

/* A half float's value. Scaling by 2^112 moves the exponent and normalises denormals, both exactly. */
LORCH_INLINE float num_from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, em = (uint32_t)(h & 0x7fff);
    uint32_t v = em >= 0x7c00 ? em << 13 | 0x7f800000u : num_bits(num_float(em << 13) * 0x1p112f);
    return num_float(sign | v);
}

/* The nearest half float, ties to even, beyond the range infinite (what vcvtps2ph and fcvt do). */
LORCH_INLINE uint16_t num_to_f16(float f) {
    uint32_t u = num_bits(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a + 0xfff + (a >> 13 & 1) - 0x38000000u) >> 13; /* rebias and round */
    uint32_t tiny = num_bits(num_float(a) + 0.5f) - 0x3f000000u; /* the adder rounds to multiples of 2^-24 */
    uint32_t h = a < 0x38800000u ? tiny : a < 0x47800000u ? normal : 0x7c00;
    if (a > 0x7f800000u) h = 0x7e00;
    return (uint16_t)(sign | (h > 0x7c00 && a <= 0x7f800000u ? 0x7c00 : h));
}

LORCH_INLINE float num_from_bf16(uint16_t h) { return num_float((uint32_t)h << 16); }

/* a*b+c rounded once. The product of two floats is exact in double; the sum's rounding error (Knuth's
 * TwoSum) then says whether the double must be nudged to an odd last bit, after which rounding to float
 * cannot go wrong twice (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). */
LORCH_INLINE float num_fma(float a, float b, float c) {
    double p = (double)a * b, z = c, s = p + z, t = s - p;
    double e = (p - (s - t)) + (z - t);
    uint64_t u = num_bits64(s);
    if (e != 0 && !(u & 1) && s - s == 0) u += (e > 0) == (s > 0) ? (uint64_t)1 : ~(uint64_t)0;
    return (float)num_double(u);
}

static double num_exp(double x) { /* relative error below 1e-15 */
    if (!(x > -708)) return x != x ? x : 0;
    if (x > 709) return (double)INFINITY;
    double n = x * 1.4426950408889634 + 6755399441055744.0 - 6755399441055744.0;
    double r = x - n * 6.93147180369123816490e-01 - n * 1.90821492927058770002e-10;
    double term = 1, sum = 1;
    for (int i = 1; i < 15; i++) term = term * r / i, sum += term; /* |r| <= ln(2)/2 */
    return sum * num_double((uint64_t)((int64_t)n + 1023) << 52);
}

static double num_log(double x) { /* of a normal x > 0; log(m * 2^e) with m in [sqrt(1/2), sqrt(2)) */
    uint64_t u = num_bits64(x);
    int e = (int)(u >> 52) - 1023;
    double m = num_double((u & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m > 1.4142135623730951) m *= 0.5, e++;
    double s = (m - 1) / (m + 1), z = s * s, sum = 0;
    for (int k = 25; k >= 1; k -= 2) sum = sum * z + 1.0 / k; /* atanh's series */
    return e * 6.93147180369123816490e-01 + (2 * s * sum + e * 1.90821492927058770002e-10);
}

/* Sine and cosine of x (beyond 1e15, which only a broken file asks for, of 0): x minus a multiple of pi/2 in three parts (Cody and Waite), then Taylor. */
static void num_sincos(double x, double *sine, double *cosine) {
    if (!(x > -1e15 && x < 1e15)) x = 0;
    double k = x * 0.63661977236758134308 + 6755399441055744.0 - 6755399441055744.0;
    double r = x - k * 1.57079632673412561417e+00 - k * 6.07710050630396597660e-11 - k * 2.02226624871116645580e-21;
    double z = r * r, s = 0, c = 0;
    for (int i = 19; i >= 3; i -= 2) s = (s + 1) * -z / (i * (i - 1));
    for (int i = 20; i >= 2; i -= 2) c = (c + 1) * -z / (i * (i - 1));
    s = r + r * s, c = 1 + c;
    int quadrant = (int)((int64_t)k & 3);
    *sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
    *cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
}

/* ---- blocks as they lie in the file; d, dmin and m are half floats ---- */

typedef struct { uint16_t d; uint8_t q[16]; } quant_q4_0;  /* 32 weights (q - 8) * d; low nibbles come first */
typedef struct { uint16_t d, m; uint8_t q[16]; } quant_q4_1;             /* 32: d*q + m */
typedef struct { uint16_t d; uint8_t high[4], q[16]; } quant_q5_0;       /* 32: d*(q - 16), the fifth bits in high */
typedef struct { uint16_t d, m; uint8_t high[4], q[16]; } quant_q5_1;    /* 32: d*q + m */
typedef struct { uint16_t d; int8_t q[32]; } quant_q8_0;   /* 32 weights q * d */
typedef struct { uint8_t e, q[16]; } quant_mxfp4;          /* 32: 2^(e - 128) * quant_fp4[q] (OCP Microscaling, 2023) */
typedef struct { uint8_t scales[16], q[64]; uint16_t d, dmin; } quant_q2_k;            /* 256: d*s*q - dmin*m */
typedef struct { uint8_t high[32], q[64], scales[12]; uint16_t d; } quant_q3_k;        /* 256: d*s*(q - 4) */
typedef struct { uint16_t d, dmin; uint8_t scales[12], q[128]; } quant_q4_k;           /* 256: d*s*q - dmin*m */
typedef struct { uint16_t d, dmin; uint8_t scales[12], high[32], q[128]; } quant_q5_k; /* the same, a fifth bit in high */
typedef struct { uint8_t low[128], high[64]; int8_t scales[16]; uint16_t d; } quant_q6_k; /* 256: d*s*(q - 32) */
typedef struct { uint16_t d, scales_high; uint8_t scales_low[4], q[128]; } quant_iq4_xs;  /* 256: d*s*quant_curve[q] */

/* Sizes must be those of the file: a wrong one makes the array's size negative. */
typedef char quant_sizes_are_right[sizeof(quant_q4_0) == 18 && sizeof(quant_q4_1) == 20 && sizeof(quant_q5_0) == 22 &&
                                           sizeof(quant_q5_1) == 24 && sizeof(quant_q8_0) == 34 && sizeof(quant_mxfp4) == 17 &&
                                           sizeof(quant_q2_k) == 84 && sizeof(quant_q3_k) == 110 && sizeof(quant_q4_k) == 144 &&
                                           sizeof(quant_q5_k) == 176 && sizeof(quant_q6_k) == 210 && sizeof(quant_iq4_xs) == 136 ? 1 : -1];

/* What the codes of IQ4_NL and IQ4_XS, and of MXFP4, stand for. */
static const int8_t quant_curve[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t quant_fp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* twice the value */

/* What a product needs to know of a format. Activations are quantised to int8 with one scale for 32
 * (BLOCKS) or 256 (SUPERBLOCKS) values, to match the weights' blocks; or stay floats. */
enum quant_kind { QUANT_NONE, QUANT_FLOATS, QUANT_BLOCKS, QUANT_SUPERBLOCKS };

/* One block, unpacked. BLOCKS: weight i is d * q[i], or d * q[i] - dmin if the format has mins, 32 of them.
 * SUPERBLOCKS: weight i is d * scale[i/16] * q[i] - dmin * min[i/16], 256 of them. */
typedef struct {
    int8_t q[256];
    int8_t scale[16];
    uint8_t min[16];
    float d, dmin;
} quant_block;

typedef struct {
    const char *name;
    uint16_t block;      /* weights in a block */
    uint16_t bytes;      /* of a block in the file */
    enum quant_kind kind; /* QUANT_NONE: known by name only */
    int mins;            /* has a minimum beside the scale */
    void (*unpack)(const void *block, quant_block *out);
} quant_format;

LORCH_INLINE void quant_unpack_q4_0(const void *block, quant_block *out) {
    const quant_q4_0 *b = block;
    for (int i = 0; i < 16; i++) out->q[i] = (int8_t)((b->q[i] & 15) - 8), out->q[i + 16] = (int8_t)((b->q[i] >> 4) - 8);
    out->d = num_from_f16(b->d);
}

typedef uint8_t quant_bytes __attribute__((vector_size(16)));

/* The nibbles of 16 bytes, the low ones first, or what they stand for in a table of 16 codes. GCC's generic
 * shuffle is one instruction where there is one. */
LORCH_INLINE void quant_nibbles(const uint8_t *from, const int8_t *table, int8_t *to) {
    quant_bytes v, part[2];
    memcpy(&v, from, 16);
    part[0] = v & 15, part[1] = v >> 4;
#if defined __GNUC__ && !defined __clang__
    quant_bytes t;
    if (table) memcpy(&t, table, 16), part[0] = __builtin_shuffle(t, part[0]), part[1] = __builtin_shuffle(t, part[1]);
#else
    for (int i = 0; table && i < 32; i++) part[i / 16][i % 16] = (uint8_t)table[part[i / 16][i % 16]];
#endif
    memcpy(to, &part[0], 16), memcpy(to + 16, &part[1], 16);
}

LORCH_INLINE void quant_unpack_q4_1(const void *block, quant_block *out) {
    const quant_q4_1 *b = block;
    quant_nibbles(b->q, NULL, out->q);
    out->d = num_from_f16(b->d), out->dmin = -num_from_f16(b->m);
}

/* Bit i of `high` is the fifth bit of weight i. Eight weights at a time: their bits are spread over the bytes
 * of a word, each byte keeps its own, and any bit that is set carries into the byte's top. Less 16 (if offset) is
 * the low nibble where the fifth bit is set, and has ones above it where it is not. */
LORCH_INLINE void quant_unpack_fifth(const uint8_t *low, const uint8_t *high, int offset, int8_t *q) {
    const uint64_t each = 0x0101010101010101u;
    for (int i = 0; i < 4; i++) {
        uint64_t nibbles, fifth = ((high[i] * each & 0x8040201008040201u) + 0x7f * each) >> 7 & each;
        memcpy(&nibbles, low + i % 2 * 8, 8);
        nibbles = nibbles >> i / 2 * 4 & 15 * each;
        nibbles |= offset ? (fifth ^ each) * 0xf0 : fifth << 4;
        memcpy(q + 8 * i, &nibbles, 8);
    }
}

LORCH_INLINE void quant_unpack_q5_0(const void *block, quant_block *out) {
    const quant_q5_0 *b = block;
    quant_unpack_fifth(b->q, b->high, 16, out->q);
    out->d = num_from_f16(b->d);
}

LORCH_INLINE void quant_unpack_q5_1(const void *block, quant_block *out) {
    const quant_q5_1 *b = block;
    quant_unpack_fifth(b->q, b->high, 0, out->q);
    out->d = num_from_f16(b->d), out->dmin = -num_from_f16(b->m);
}

LORCH_INLINE void quant_unpack_iq4_nl(const void *block, quant_block *out) {
    const quant_q4_0 *b = block; /* the same layout */
    quant_nibbles(b->q, quant_curve, out->q);
    out->d = num_from_f16(b->d);
}

LORCH_INLINE void quant_unpack_mxfp4(const void *block, quant_block *out) {
    const quant_mxfp4 *b = block;
    quant_nibbles(b->q, quant_fp4, out->q);
    out->d = num_float(b->e < 2 ? 0x200000u << b->e : (uint32_t)(b->e - 1) << 23); /* denormal below 2^-126 */
}

LORCH_INLINE void quant_unpack_q8_0(const void *block, quant_block *out) {
    const quant_q8_0 *b = block;
    memcpy(out->q, b->q, 32);
    out->d = num_from_f16(b->d);
}

LORCH_INLINE void quant_unpack_q2_k(const void *block, quant_block *out) {
    const quant_q2_k *b = block;
    for (int c = 0; c < 8; c++) /* 32 weights: two bits of each of 32 bytes */
        for (int i = 0; i < 32; i++) out->q[32 * c + i] = (int8_t)(b->q[c / 4 * 32 + i] >> 2 * (c % 4) & 3);
    for (int j = 0; j < 16; j++) out->scale[j] = (int8_t)(b->scales[j] & 15), out->min[j] = b->scales[j] >> 4;
    out->d = num_from_f16(b->d), out->dmin = num_from_f16(b->dmin);
}

/* The sixteen 6-bit scales: low nibbles in bytes 0-7, first the lower ones; two more bits in bytes 8-11. */
LORCH_INLINE void quant_unpack_q3_k(const void *block, quant_block *out) {
    const quant_q3_k *b = block;
    for (int c = 0; c < 8; c++)
        for (int i = 0; i < 32; i++)
            out->q[32 * c + i] = (int8_t)((b->q[c / 4 * 32 + i] >> 2 * (c % 4) & 3) + (b->high[i] >> c & 1) * 4 - 4);
    for (int j = 0; j < 16; j++)
        out->scale[j] = (int8_t)(((b->scales[j % 8] >> j / 8 * 4 & 15) | (b->scales[8 + j % 4] >> j / 4 * 2 & 3) << 4) - 32);
    memset(out->min, 0, 16);
    out->d = num_from_f16(b->d), out->dmin = 0;
}

LORCH_INLINE void quant_unpack_iq4_xs(const void *block, quant_block *out) {
    const quant_iq4_xs *b = block;
    for (int c = 0; c < 8; c++) {
        int scale = (b->scales_low[c / 2] >> c % 2 * 4 & 15) | (b->scales_high >> 2 * c & 3) << 4;
        quant_nibbles(b->q + 16 * c, quant_curve, out->q + 32 * c);
        out->scale[2 * c] = out->scale[2 * c + 1] = (int8_t)(scale - 32);
    }
    memset(out->min, 0, 16);
    out->d = num_from_f16(b->d), out->dmin = 0;
}

/* Eight pairs of 6-bit scale and min in 12 bytes: the low six bits of bytes 0-3 and 4-7 are the first
 * four of each; the rest have four bits in bytes 8-11 and their top two in bytes 0-7. */
LORCH_INLINE void quant_unpack_scales_k4(const uint8_t *s, quant_block *out) {
    for (int j = 0; j < 8; j++) {
        int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
        int min = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
        out->scale[2 * j] = out->scale[2 * j + 1] = (int8_t)scale;
        out->min[2 * j] = out->min[2 * j + 1] = (uint8_t)min;
    }
}

LORCH_INLINE void quant_unpack_q4_k(const void *block, quant_block *out) {
    const quant_q4_k *b = block;
    quant_unpack_scales_k4(b->scales, out);
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < 32; i++)
            out->q[64 * c + i] = (int8_t)(b->q[32 * c + i] & 15), out->q[64 * c + 32 + i] = (int8_t)(b->q[32 * c + i] >> 4);
    out->d = num_from_f16(b->d), out->dmin = num_from_f16(b->dmin);
}

LORCH_INLINE void quant_unpack_q5_k(const void *block, quant_block *out) {
    const quant_q5_k *b = block;
    quant_unpack_scales_k4(b->scales, out);
    for (int c = 0; c < 4; c++)
        for (int i = 0; i < 32; i++) {
            int h = b->high[i] >> 2 * c;
            out->q[64 * c + i] = (int8_t)((b->q[32 * c + i] & 15) | (h & 1) << 4);
            out->q[64 * c + 32 + i] = (int8_t)(b->q[32 * c + i] >> 4 | (h & 2) << 3);
        }
    out->d = num_from_f16(b->d), out->dmin = num_from_f16(b->dmin);
}

LORCH_INLINE void quant_unpack_q6_k(const void *block, quant_block *out) {
    const quant_q6_k *b = block;
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = b->low + 64 * half, *high = b->high + 32 * half;
        int8_t *q = out->q + 128 * half;
        for (int i = 0; i < 32; i++) {
            q[i] = (int8_t)(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            q[i + 32] = (int8_t)(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            q[i + 64] = (int8_t)((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            q[i + 96] = (int8_t)((low[i + 32] >> 4 | high[i] >> 6 << 4) - 32);
        }
    }
    memcpy(out->scale, b->scales, 16);
    memset(out->min, 0, 16);
    out->d = num_from_f16(b->d), out->dmin = 0;
}

/* By ggml's type number. Rows without a kind are known only to be refused by name and checked for size. */
enum quant_type {
    QUANT_F32 = 0, QUANT_F16 = 1, QUANT_Q4_0 = 2, QUANT_Q4_1 = 3, QUANT_Q5_0 = 6, QUANT_Q5_1 = 7, QUANT_Q8_0 = 8,
    QUANT_Q2_K = 10, QUANT_Q3_K = 11, QUANT_Q4_K = 12, QUANT_Q5_K = 13, QUANT_Q6_K = 14, QUANT_IQ4_NL = 20,
    QUANT_IQ4_XS = 23, QUANT_BF16 = 30, QUANT_MXFP4 = 39, QUANT_TYPES = 41
};
static const quant_format quant_formats[QUANT_TYPES] = {
    [QUANT_F32] = {"F32", 1, 4, QUANT_FLOATS, 0, NULL},
    [QUANT_F16] = {"F16", 1, 2, QUANT_FLOATS, 0, NULL},
    [QUANT_BF16] = {"BF16", 1, 2, QUANT_FLOATS, 0, NULL},
    [QUANT_Q4_0] = {"Q4_0", 32, sizeof(quant_q4_0), QUANT_BLOCKS, 0, quant_unpack_q4_0},
    [QUANT_Q4_1] = {"Q4_1", 32, sizeof(quant_q4_1), QUANT_BLOCKS, 1, quant_unpack_q4_1},
    [QUANT_Q5_0] = {"Q5_0", 32, sizeof(quant_q5_0), QUANT_BLOCKS, 0, quant_unpack_q5_0},
    [QUANT_Q5_1] = {"Q5_1", 32, sizeof(quant_q5_1), QUANT_BLOCKS, 1, quant_unpack_q5_1},
    [QUANT_Q8_0] = {"Q8_0", 32, sizeof(quant_q8_0), QUANT_BLOCKS, 0, quant_unpack_q8_0},
    [QUANT_IQ4_NL] = {"IQ4_NL", 32, sizeof(quant_q4_0), QUANT_BLOCKS, 0, quant_unpack_iq4_nl},
    [QUANT_MXFP4] = {"MXFP4", 32, sizeof(quant_mxfp4), QUANT_BLOCKS, 0, quant_unpack_mxfp4},
    [QUANT_Q2_K] = {"Q2_K", 256, sizeof(quant_q2_k), QUANT_SUPERBLOCKS, 1, quant_unpack_q2_k},
    [QUANT_Q3_K] = {"Q3_K", 256, sizeof(quant_q3_k), QUANT_SUPERBLOCKS, 0, quant_unpack_q3_k},
    [QUANT_Q4_K] = {"Q4_K", 256, sizeof(quant_q4_k), QUANT_SUPERBLOCKS, 1, quant_unpack_q4_k},
    [QUANT_Q5_K] = {"Q5_K", 256, sizeof(quant_q5_k), QUANT_SUPERBLOCKS, 1, quant_unpack_q5_k},
    [QUANT_Q6_K] = {"Q6_K", 256, sizeof(quant_q6_k), QUANT_SUPERBLOCKS, 0, quant_unpack_q6_k},
    [QUANT_IQ4_XS] = {"IQ4_XS", 256, sizeof(quant_iq4_xs), QUANT_SUPERBLOCKS, 0, quant_unpack_iq4_xs},
    [9] = {"Q8_1", 32, 36, QUANT_NONE, 0, NULL}, [15] = {"Q8_K", 256, 292, QUANT_NONE, 0, NULL},
    [16] = {"IQ2_XXS", 256, 66, QUANT_NONE, 0, NULL}, [17] = {"IQ2_XS", 256, 74, QUANT_NONE, 0, NULL},
    [18] = {"IQ3_XXS", 256, 98, QUANT_NONE, 0, NULL}, [19] = {"IQ1_S", 256, 50, QUANT_NONE, 0, NULL},
    [21] = {"IQ3_S", 256, 110, QUANT_NONE, 0, NULL}, [22] = {"IQ2_S", 256, 82, QUANT_NONE, 0, NULL},
    [24] = {"I8", 1, 1, QUANT_NONE, 0, NULL}, [25] = {"I16", 1, 2, QUANT_NONE, 0, NULL},
    [26] = {"I32", 1, 4, QUANT_NONE, 0, NULL}, [27] = {"I64", 1, 8, QUANT_NONE, 0, NULL},
    [28] = {"F64", 1, 8, QUANT_NONE, 0, NULL}, [29] = {"IQ1_M", 256, 56, QUANT_NONE, 0, NULL},
    [34] = {"TQ1_0", 256, 54, QUANT_NONE, 0, NULL}, [35] = {"TQ2_0", 256, 66, QUANT_NONE, 0, NULL},
    [40] = {"NVFP4", 64, 36, QUANT_NONE, 0, NULL},
};

static const quant_format *quant_find(uint32_t type) { /* NULL for a number that names no format */
    return type < QUANT_TYPES && quant_formats[type].name ? &quant_formats[type] : NULL;
}

static size_t quant_row_bytes(const quant_format *f, int64_t n) { return (size_t)(n / f->block) * f->bytes; }

static const char *quant_supported(void) {
    static char list[256];
    if (*list) return list;
    for (int i = 0; i < QUANT_TYPES; i++)
        if (quant_formats[i].kind != QUANT_NONE)
            snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", *list ? ", " : "", quant_formats[i].name);
    return list;
}

LORCH_INLINE float quant_load_float(const quant_format *f, const void *row, int64_t i) {
    uint16_t h;
    float v;
    if (f->bytes == 4) return memcpy(&v, (const char *)row + 4 * i, 4), v;
    memcpy(&h, (const char *)row + 2 * i, 2);
    return f == &quant_formats[QUANT_F16] ? num_from_f16(h) : num_from_bf16(h);
}

/* The values of n weights of a row, in the order of operations of llama.cpp's dequantize_row_*. */
static void quant_dequantise(const quant_format *f, const void *row, float *out, int64_t n) {
    quant_block b;
    if (f->kind == QUANT_FLOATS) {
        for (int64_t i = 0; i < n; i++) out[i] = quant_load_float(f, row, i);
        return;
    }
    for (int64_t i = 0; i < n; i += f->block) {
        f->unpack((const char *)row + quant_row_bytes(f, i), &b);
        if (f->kind == QUANT_BLOCKS)
            for (int j = 0; j < 32; j++) out[i + j] = f->mins ? b.d * b.q[j] - b.dmin : b.d * b.q[j];
        else
            for (int j = 0; j < 256; j++) out[i + j] = b.d * b.scale[j / 16] * b.q[j] - b.dmin * b.min[j / 16];
    }
}

/* Quantises n (32 or 256) activations: q = x * (127 / largest) to the nearest integer, ties to even, and
 * d = largest / 127, for 32 of them rounded to 11 bits: llama.cpp keeps that scale as a half float, and doing the
 * same makes most logits equal to its own in four digits (without it they differ as much as either differs
 * from the truth). A block that holds no normal number is zero; one with an infinity or a NaN gets
 * d = NaN, so that the step's logits are not finite and the job says so. */
LORCH_INLINE void quant_activations(const float *x, int n, int8_t *q, float *d) {
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        uint32_t a = num_bits(x[i]) & 0x7fffffff; /* as integers, magnitudes order like floats, NaN on top */
        most = a > most ? a : most;
    }
    int usable = most >= 0x01800000u && most < 0x7f800000u; /* from 2^-124, so that 127 / largest is finite */
    float largest = num_float(most), by = usable ? 127.0f / largest : 0;
    *d = usable ? largest / 127.0f : most < 0x7f800000u ? 0 : NAN;
    if (usable && n == 32) *d = num_float((num_bits(*d) + 0xfff + (num_bits(*d) >> 13 & 1)) & ~0x1fffu);
    for (int i = 0; i < n; i++) {
        float y = usable ? x[i] * by : 0;
        q[i] = (int8_t)((int32_t)num_bits(y + 12582912.0f) - 0x4b400000); /* + 1.5 * 2^23 rounds to an integer */
    }
}

/* The specification: the product of a row of n weights with n activations, one accumulator, in order. */
static float quant_dot(const quant_format *f, const void *row, const float *x, int64_t n) {
    float acc = 0, d;
    int8_t q[256];
    quant_block b;
    if (f->kind == QUANT_FLOATS) {
        for (int64_t i = 0; i < n; i++) acc = num_fma(quant_load_float(f, row, i), x[i], acc);
        return acc;
    }
    for (int64_t i = 0; i < n; i += f->block) {
        int32_t dot = 0, mins = 0;
        f->unpack((const char *)row + quant_row_bytes(f, i), &b);
        quant_activations(x + i, f->block, q, &d);
        if (f->kind == QUANT_BLOCKS) {
            for (int j = 0; j < 32; j++) dot += b.q[j] * q[j], mins += q[j];
            acc = f->mins ? num_fma(d, num_fma(-b.dmin, (float)mins, b.d * (float)dot), acc) : num_fma((float)dot, b.d * d, acc);
        } else {
            for (int j = 0; j < 256; j++) dot += b.scale[j / 16] * b.q[j] * q[j], mins += b.min[j / 16] * q[j];
            acc = num_fma(d, num_fma(-b.dmin, (float)mins, b.d * (float)dot), acc);
        }
    }
    return acc;
}

/* ==== GGUF =================================================================================
 * The model file (ggml's docs/gguf.md, versions 2 and 3): a header, typed keys, tensor descriptions, and
 * the tensors' bytes, mapped and never copied. Every count, length and offset is compared with the bytes
 * that remain before it is used or anything is allocated: `n <= size - pos`, never `pos + n <= size`.
 * gguf_file owns the mapping; strings and tensors point into it and live as long as it does.
 *
 *   file   = "GGUF" version:u32 n_tensors:u64 n_kv:u64 *kv *tensor padding data
 *   kv     = key:string type:u32 value        string = length:u64 *byte
 *   array  = type:u32 count:u64 *value        tensor = name:string n_dims:u32 *dim:u64 type:u32 offset:u64 */

enum gguf_type {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL,
    GGUF_STRING, GGUF_ARRAY, GGUF_U64, GGUF_I64, GGUF_F64, GGUF_TYPES
};
static const unsigned char gguf_type_bytes[GGUF_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

enum {
    GGUF_MAX_ALIGNMENT = 1 << 16, /* files use 32; a huge one would only be an attack on the padding */
    GGUF_MAX_NAME = 64,           /* ggml's limit on tensor names */
    GGUF_MIN_KV = 8 + 1 + 4 + 1,  /* bytes of the smallest key and value */
    GGUF_MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
};

typedef struct {
    str key;
    const unsigned char *value; /* of an array: its first element */
    uint64_t count;             /* of an array; else 1 */
    unsigned char type;         /* of an array: its elements' */
    unsigned char is_array;
} gguf_kv;

typedef struct {
    str name;
    const void *data;
    uint64_t dim[4];  /* dim[0] is the length of a row; unused ones are 1 */
    uint64_t bytes;
    uint64_t offset;
    uint32_t type;    /* a number that quant_find knows */
    uint32_t n_dims;
} gguf_tensor;

typedef struct {
    char *path;
    const unsigned char *map;
    uint64_t size;
    uint32_t version;
    uint64_t n_kv, n_tensors, alignment, data_start;
    gguf_kv *kv;
    gguf_tensor *tensor;
    int writable;     /* this process could write the file */
    int lost;         /* atomic: a page of it could not be read; since then it reads as zeros */
    /* the cursor, while parsing */
    uint64_t pos;
    char *err;        /* the first error sticks: later reads give zeros */
    size_t err_cap;
    int failed;
} gguf_file;

__attribute__((format(printf, 2, 3))) static void gguf_fail(gguf_file *g, const char *fmt, ...) {
    char what[512];
    va_list ap;
    if (g->failed) return;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    g->failed = 1;
    snprintf(g->err, g->err_cap, "%s: %s (at byte %llu of %llu)", g->path, what, (unsigned long long)g->pos,
             (unsigned long long)g->size);
}

/* A name from the file, fit for an error message: short and printable. */
static const char *gguf_show(str s, char out[96]) {
    size_t n = 0;
    for (size_t i = 0; i < s.len && n < 80; i++)
        out[n++] = s.ptr[i] >= 0x20 && s.ptr[i] < 0x7f && s.ptr[i] != '"' && s.ptr[i] != '\\' ? s.ptr[i] : '?';
    snprintf(out + n, 96 - n, "%s", s.len > 80 ? "..." : "");
    return out;
}

static const unsigned char *gguf_take(gguf_file *g, uint64_t n, const char *what) {
    if (!g->failed && n > g->size - g->pos)
        gguf_fail(g, "%s of %llu bytes goes beyond the end of the file: is it cut short?", what, (unsigned long long)n);
    if (g->failed) return NULL;
    const unsigned char *p = g->map + g->pos;
    g->pos += n;
    return p;
}
static uint32_t gguf_u32(gguf_file *g, const char *what) {
    uint32_t v = 0;
    const unsigned char *p = gguf_take(g, 4, what);
    return p ? memcpy(&v, p, 4), v : 0;
}
static uint64_t gguf_u64(gguf_file *g, const char *what) {
    uint64_t v = 0;
    const unsigned char *p = gguf_take(g, 8, what);
    return p ? memcpy(&v, p, 8), v : 0;
}
static str gguf_string(gguf_file *g, const char *what) {
    uint64_t n = gguf_u64(g, what);
    const unsigned char *p = gguf_take(g, n, what);
    return str_make((const char *)p, p ? (size_t)n : 0);
}

/* Moves past n values of a type that is no array; strings one by one. */
static void gguf_skip_values(gguf_file *g, uint32_t type, uint64_t n, const char *what) {
    if (type == GGUF_STRING) {
        if (n > (g->size - g->pos) / 8) gguf_fail(g, "%s: %llu strings cannot fit in the file", what, (unsigned long long)n);
        for (uint64_t i = 0; i < n && !g->failed; i++) gguf_string(g, what);
        return;
    }
    uint64_t size = gguf_type_bytes[type];
    if (n > (g->size - g->pos) / size) gguf_fail(g, "%s: %llu values cannot fit in the file", what, (unsigned long long)n);
    else g->pos += n * size;
}

static void gguf_parse_kv(gguf_file *g, gguf_kv *kv) {
    char shown[96];
    kv->key = gguf_string(g, "a key");
    gguf_show(kv->key, shown);
    if (!g->failed && kv->key.len == 0) gguf_fail(g, "empty key");
    if (kv->key.len > 65535) gguf_fail(g, "key \"%s\" is longer than 65535 bytes", shown);
    uint32_t type = gguf_u32(g, "a value's type");
    kv->is_array = type == GGUF_ARRAY;
    if (kv->is_array) type = gguf_u32(g, "an array's type");
    kv->count = kv->is_array ? gguf_u64(g, "an array's count") : 1;
    if (type >= GGUF_TYPES || type == GGUF_ARRAY) {
        gguf_fail(g, "key \"%s\" has the unknown type %lu%s", shown, (unsigned long)type, kv->is_array ? " (array)" : "");
        return;
    }
    kv->type = (unsigned char)type;
    if (g->failed) return;
    kv->value = g->map + g->pos;
    gguf_skip_values(g, type, kv->count, shown);
}

static const gguf_kv *gguf_find(const gguf_file *g, const char *key) {
    for (uint64_t i = 0; i < g->n_kv; i++)
        if (str_is(g->kv[i].key, key)) return &g->kv[i];
    return NULL;
}

/* A whole number of any integer type. Returns its sign, -1 or 1, with the magnitude in *v; 0 if the value is no such number. */
static int gguf_whole(const gguf_kv *kv, uint64_t *v) {
    if (!kv || kv->is_array || kv->type == GGUF_F32 || kv->type == GGUF_F64 || kv->type == GGUF_STRING || kv->type == GGUF_BOOL) return 0;
    int size = gguf_type_bytes[kv->type], is_signed = kv->type == GGUF_I8 || kv->type == GGUF_I16 || kv->type == GGUF_I32 || kv->type == GGUF_I64;
    *v = 0;
    memcpy(v, kv->value, (size_t)size);
    if (!is_signed || !(*v >> (8 * size - 1) & 1)) return 1;
    *v = ~(*v - 1) & (size == 8 ? UINT64_MAX : ((uint64_t)1 << 8 * size) - 1);
    return -1;
}

/* A whole number, or `missing`. Negative and non-integer values count as missing. */
static uint64_t gguf_get_uint(const gguf_file *g, const char *key, uint64_t missing) {
    uint64_t v;
    return gguf_whole(gguf_find(g, key), &v) > 0 ? v : missing;
}

static double gguf_get_float(const gguf_file *g, const char *key, double missing) {
    const gguf_kv *kv = gguf_find(g, key);
    float f;
    double d;
    uint64_t v;
    if (kv && !kv->is_array && kv->type == GGUF_F32) return memcpy(&f, kv->value, 4), (double)f;
    if (kv && !kv->is_array && kv->type == GGUF_F64) return memcpy(&d, kv->value, 8), d;
    int sign = gguf_whole(kv, &v);
    return sign ? sign * (double)v : missing;
}

static int gguf_get_bool(const gguf_file *g, const char *key, int missing) {
    const gguf_kv *kv = gguf_find(g, key);
    return kv && !kv->is_array && kv->type == GGUF_BOOL ? *kv->value != 0 : missing;
}

static str gguf_get_str(const gguf_file *g, const char *key) { /* "" where there is none */
    const gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->is_array || kv->type != GGUF_STRING) return str_make("", 0);
    uint64_t n;
    memcpy(&n, kv->value, 8);
    return str_make((const char *)kv->value + 8, (size_t)n);
}

static const gguf_kv *gguf_get_array(const gguf_file *g, const char *key, enum gguf_type type) {
    const gguf_kv *kv = gguf_find(g, key);
    return kv && kv->is_array && kv->type == type ? kv : NULL;
}

/* The bytes of a tensor, or 0 after an error. Divides before it multiplies: nothing wraps. */
static uint64_t gguf_tensor_bytes(gguf_file *g, const gguf_tensor *t, const char *shown) {
    const quant_format *f = quant_find(t->type);
    uint64_t rows = 1;
    for (int i = 0; i < 4; i++)
        if (t->dim[i] == 0 || t->dim[i] > g->size * 32) /* no format packs more than 8 weights into a byte */
            return gguf_fail(g, "tensor \"%s\" has dimension %d of %llu, which cannot fit in the file", shown, i, (unsigned long long)t->dim[i]), (uint64_t)0;
    if (t->dim[0] % f->block)
        return gguf_fail(g, "tensor \"%s\" is %s, whose rows must be multiples of %d, but a row has %llu", shown, f->name, f->block,
                         (unsigned long long)t->dim[0]), (uint64_t)0;
    uint64_t row = t->dim[0] / f->block * f->bytes;
    for (int i = 1; i < 4; i++) {
        if (t->dim[i] > g->size / row / rows) return gguf_fail(g, "tensor \"%s\" is larger than the file", shown), (uint64_t)0;
        rows *= t->dim[i];
    }
    return row * rows;
}

static void gguf_parse_tensor(gguf_file *g, gguf_tensor *t) {
    char shown[96];
    t->name = gguf_string(g, "a tensor's name");
    gguf_show(t->name, shown);
    if (!g->failed && (t->name.len == 0 || t->name.len >= GGUF_MAX_NAME))
        gguf_fail(g, "tensor name \"%s\" has %llu bytes; 1 to 63 are allowed", shown, (unsigned long long)t->name.len);
    t->n_dims = gguf_u32(g, "a tensor's dimension count");
    if (!g->failed && (t->n_dims < 1 || t->n_dims > 4)) gguf_fail(g, "tensor \"%s\" has %lu dimensions; 1 to 4 are allowed", shown, (unsigned long)t->n_dims);
    for (uint32_t i = 0; i < 4; i++) t->dim[i] = !g->failed && i < t->n_dims ? gguf_u64(g, "a tensor's dimensions") : 1;
    t->type = gguf_u32(g, "a tensor's type");
    t->offset = gguf_u64(g, "a tensor's offset");
    if (!g->failed && !quant_find(t->type)) gguf_fail(g, "tensor \"%s\" has the unknown type %lu; supported: %s", shown, (unsigned long)t->type, quant_supported());
    if (!g->failed) t->bytes = gguf_tensor_bytes(g, t, shown);
}

static int gguf_compare_str(str a, str b) {
    int c = memcmp(a.ptr, b.ptr, a.len < b.len ? a.len : b.len);
    return c ? c : (a.len > b.len) - (a.len < b.len);
}
static int gguf_by_key(const void *a, const void *b) {
    return gguf_compare_str((*(const gguf_kv *const *)a)->key, (*(const gguf_kv *const *)b)->key);
}
static int gguf_by_name(const void *a, const void *b) {
    return gguf_compare_str((*(const gguf_tensor *const *)a)->name, (*(const gguf_tensor *const *)b)->name);
}

/* No key and no tensor may appear twice: which one would count? */
static void gguf_check_unique(gguf_file *g) {
    uint64_t most = g->n_kv > g->n_tensors ? g->n_kv : g->n_tensors;
    const void **p = sys_zalloc(most, sizeof *p);
    char shown[96];
    if (!p) {
        gguf_fail(g, "out of memory");
        return;
    }
    for (uint64_t i = 0; i < g->n_kv; i++) p[i] = &g->kv[i];
    qsort(p, g->n_kv, sizeof *p, gguf_by_key);
    for (uint64_t i = 1; i < g->n_kv; i++)
        if (gguf_by_key(&p[i - 1], &p[i]) == 0) gguf_fail(g, "key \"%s\" appears twice", gguf_show(((const gguf_kv *)p[i])->key, shown));
    for (uint64_t i = 0; i < g->n_tensors; i++) p[i] = &g->tensor[i];
    qsort(p, g->n_tensors, sizeof *p, gguf_by_name);
    for (uint64_t i = 1; i < g->n_tensors; i++)
        if (gguf_by_name(&p[i - 1], &p[i]) == 0) gguf_fail(g, "tensor \"%s\" appears twice", gguf_show(((const gguf_tensor *)p[i])->name, shown));
    free(p);
}

static void gguf_parse_header(gguf_file *g) {
    const unsigned char *magic = gguf_take(g, 4, "the magic number");
    if (magic && memcmp(magic, "GGUF", 4)) gguf_fail(g, "not a GGUF file: it does not begin with \"GGUF\"");
    g->version = gguf_u32(g, "the version");
    if (!g->failed && g->version && !(g->version & 0xffff)) gguf_fail(g, "big-endian GGUF files are not supported: convert it with gguf_convert_endian.py");
    if (!g->failed && g->version != 2 && g->version != 3) gguf_fail(g, "GGUF version %lu is not supported; supported: 2, 3", (unsigned long)g->version);
    g->n_tensors = gguf_u64(g, "the number of tensors");
    g->n_kv = gguf_u64(g, "the number of keys");
    if (g->failed) return;
    if (g->n_kv > (g->size - g->pos) / GGUF_MIN_KV) gguf_fail(g, "%llu keys cannot fit in the file", (unsigned long long)g->n_kv);
    if (g->n_tensors > (g->size - g->pos) / GGUF_MIN_TENSOR) gguf_fail(g, "%llu tensors cannot fit in the file", (unsigned long long)g->n_tensors);
}

static void gguf_parse_alignment(gguf_file *g) {
    const gguf_kv *kv = gguf_find(g, "general.alignment");
    g->alignment = kv ? gguf_get_uint(g, "general.alignment", 0) : 32;
    if (kv && (kv->is_array || kv->type != GGUF_U32)) gguf_fail(g, "general.alignment must be a u32");
    if (g->alignment < 8 || g->alignment > GGUF_MAX_ALIGNMENT || (g->alignment & (g->alignment - 1)))
        gguf_fail(g, "general.alignment is %llu; a power of two from 8 to %d is needed", (unsigned long long)g->alignment, GGUF_MAX_ALIGNMENT);
}

/* Tensors lie one after the other, each padded to the alignment, as every writer makes them: so none
 * overlaps, none is missing, and the sum cannot wrap because each size is below the file's. */
static void gguf_place_tensors(gguf_file *g) {
    char shown[96], before[96];
    uint64_t pad = -g->pos & (g->alignment - 1), expect = 0;
    if (g->n_tensors == 0) return;
    if (pad > g->size - g->pos) gguf_fail(g, "the file ends before its tensor data: is it cut short?");
    g->data_start = g->pos + pad;
    for (uint64_t i = 0; i < g->n_tensors && !g->failed; i++) {
        gguf_tensor *t = &g->tensor[i];
        uint64_t room = g->size - g->data_start;
        gguf_show(t->name, shown);
        if (t->offset != expect && i > 0 && quant_find(t[-1].type)->kind == QUANT_NONE)
            gguf_fail(g, "tensor %s is %s, which is not supported; supported: %s", gguf_show(t[-1].name, shown), quant_find(t[-1].type)->name, quant_supported());
        else if (t->offset != expect)
            gguf_fail(g, "tensor \"%s\" has offset %llu, but %s \"%s\" ends at %llu", shown, (unsigned long long)t->offset, i ? "the one before," : "the data",
                      i ? gguf_show(t[-1].name, before) : "", (unsigned long long)expect);
        else if (t->offset > room || t->bytes > room - t->offset)
            gguf_fail(g, "tensor \"%s\" (%llu bytes at offset %llu) goes beyond the end of the file: is it cut short?", shown,
                      (unsigned long long)t->bytes, (unsigned long long)(g->data_start + t->offset));
        if (g->failed) break;
        expect = t->offset + (t->bytes + g->alignment - 1) / g->alignment * g->alignment;
        t->data = g->map + g->data_start + t->offset;
    }
}

static void gguf_parse(gguf_file *g) {
    char shown[96];
    gguf_parse_header(g);
    uint64_t n_kv = g->failed ? 0 : g->n_kv, n_tensors = g->failed ? 0 : g->n_tensors;
    g->kv = sys_zalloc(n_kv, sizeof *g->kv), g->tensor = sys_zalloc(n_tensors, sizeof *g->tensor);
    g->n_kv = g->n_tensors = 0; /* counts what has been read, so that an error leaves nothing half made */
    if (!g->kv || !g->tensor) gguf_fail(g, "out of memory");
    for (uint64_t i = 0; i < n_kv && !g->failed; i++) gguf_parse_kv(g, &g->kv[i]), g->n_kv = i + 1;
    for (uint64_t i = 0; i < n_tensors && !g->failed; i++) gguf_parse_tensor(g, &g->tensor[i]), g->n_tensors = i + 1;
    if (g->failed) return;
    gguf_check_unique(g);
    gguf_parse_alignment(g);
    if (g->failed) return;
    uint64_t parts = gguf_get_uint(g, "split.count", 1);
    if (parts > 1)
        gguf_fail(g, "this is part %llu of %llu of a split model (%s): join the parts with llama-gguf-split --merge",
                  (unsigned long long)gguf_get_uint(g, "split.no", 0) + 1, (unsigned long long)parts, gguf_show(gguf_get_str(g, "general.name"), shown));
    gguf_place_tensors(g);
}

/* ---- files that shrink or cannot be read while they are mapped ---- */

static int gguf_watching;          /* gguf_watch has been called, before any file was opened */
static gguf_file *gguf_watched;    /* the one that was opened last: its faults are survived */
static const char *gguf_last_word; /* NULL: go on with zeros; else it goes to stderr, and the process ends with 1 */

/* A page of the mapping is not there: the file has been cut, or the disk has failed. Zeros take the place of the
 * whole mapping, so that no thread faults again, and whoever uses results looks at `lost` first. */
static void gguf_on_fault(int sig, siginfo_t *info, void *context) {
    gguf_file *g = gguf_watched;
    int saved = errno;
    (void)context;
    if (g && (uintptr_t)info->si_addr - (uintptr_t)g->map < g->size) {
        if (gguf_last_word) {
            ssize_t n = write(STDERR_FILENO, gguf_last_word, strlen(gguf_last_word));
            (void)n; /* if it fails, there is nobody to tell */
            _exit(1);
        }
        __atomic_store_n(&g->lost, 1, __ATOMIC_SEQ_CST);
        if (mmap((void *)(uintptr_t)g->map, (size_t)g->size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED) {
            errno = saved;
            return;
        }
    }
    if (signal(sig, SIG_DFL) == SIG_ERR) _exit(128 + sig); /* not ours: it comes again and ends the process, unless the sandbox refuses */
}

static void gguf_watch(void) { /* for programs with one model: an embedder's signals are its own */
    struct sigaction act;
    gguf_watching = 1;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = gguf_on_fault, act.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &act, NULL);
}

static int gguf_is_lost(const gguf_file *g) { return __atomic_load_n(&g->lost, __ATOMIC_SEQ_CST); }

static void gguf_close(gguf_file *g) {
    if (!g) return;
    if (gguf_watching && gguf_watched == g) gguf_watched = NULL;
    if (g->map) munmap((void *)(uintptr_t)g->map, (size_t)g->size);
    free(g->kv);
    free(g->tensor);
    free(g->path);
    free(g);
}

/* A fingerprint of bytes: four lanes of multiply and rotate over 32-byte stripes, for speed; it tells models
 * apart and proves nothing against an adversary. Bytes come in portions of any multiple of 32, the last
 * of any length. */
typedef struct {
    uint64_t lane[4], n;
} gguf_hash;

static void gguf_hash_add(gguf_hash *h, const unsigned char *p, size_t n) {
    uint64_t w[4];
    for (h->n += n; n; p += 32, n -= n < 32 ? n : 32) {
        memset(w, 0, sizeof w);
        memcpy(w, p, n < 32 ? n : 32);
        for (int i = 0; i < 4; i++) {
            uint64_t x = (h->lane[i] ^ w[i]) * 0x9e3779b97f4a7c15u;
            h->lane[i] = x << 29 | x >> 35;
        }
    }
}

static uint64_t gguf_hash_end(const gguf_hash *h) {
    uint64_t z = h->n;
    for (int i = 0; i < 4; i++) z = (z ^ h->lane[i]) * 0xbf58476d1ce4e5b9u, z ^= z >> 32;
    return z;
}

/* Are these pages of the file in the page cache? The kernel tells only whoever may write the file; others
 * are told yes, so for them the answer is no. */
static int gguf_is_cached(const gguf_file *g, uint64_t at, uint64_t n) {
    unsigned char in[8192];
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    if (!g->writable || (n + page - 1) / page > sizeof in || mincore((void *)(uintptr_t)(g->map + at), (size_t)n, in)) return 0;
    for (uint64_t i = 0; i < (n + page - 1) / page; i++)
        if (!(in[i] & 1)) return 0;
    return 1;
}

/* Brings the file's pages into the page cache, in steps; between them fn is told the share that is done, and
 * ends it by returning nonzero. */
static void gguf_read_ahead(const gguf_file *g, int (*fn)(void *user, double share), void *user) {
    const uint64_t step = (uint64_t)32 << 20, page = (uint64_t)sysconf(_SC_PAGESIZE);
    volatile unsigned char sink = 0;
    for (uint64_t at = 0; at < g->size; at += step) {
        uint64_t n = g->size - at < step ? g->size - at : step;
        if (!gguf_is_cached(g, at, n)) {
            madvise((void *)(uintptr_t)(g->map + at), (size_t)n, MADV_WILLNEED);
            for (uint64_t i = 0; i < n; i += page) sink ^= g->map[at + i];
        }
        if (fn(user, (double)(at + n) / (double)g->size)) return;
    }
    (void)sink;
}

/* Maps and checks a file. Returns NULL with one line in err. */
static gguf_file *gguf_open(const char *path, char *err, size_t err_cap) {
    struct stat st;
    gguf_file *g = sys_zalloc(1, sizeof *g);
    int writable = 0, fd = sys_open(path, &writable);
    if (!g || fd < 0 || fstat(fd, &st)) {
        sys_fail(err, err_cap, "%s: cannot open the model: %s", path, strerror(errno));
        if (fd >= 0) close(fd);
        free(g);
        return NULL;
    }
    g->path = str_dup(str_of(path)), g->err = err, g->err_cap = err_cap, g->writable = writable;
    g->size = (uint64_t)st.st_size;
    void *map = MAP_FAILED;
    if (!g->path) sys_fail(err, err_cap, "%s: out of memory", path);
    else if (!S_ISREG(st.st_mode)) sys_fail(err, err_cap, "%s: not a regular file", path);
    else if (g->size == 0) sys_fail(err, err_cap, "%s: not a GGUF file: it is empty", path);
    else if (g->size > SIZE_MAX / 2) sys_fail(err, err_cap, "%s: too large for this machine's address space", path);
    else if ((map = mmap(NULL, (size_t)g->size, PROT_READ, MAP_SHARED, fd, 0)) == MAP_FAILED)
        sys_fail(err, err_cap, "%s: cannot map the model: %s", path, strerror(errno));
    close(fd);
    if (map == MAP_FAILED) return gguf_close(g), NULL;
    g->map = map;
    if (gguf_watching) gguf_watched = g;
    gguf_parse(g);
    g->err = NULL;
    if (g->failed) return gguf_close(g), NULL;
    return g;
}

/* ==== Kernels ==============================================================================
 * The arithmetic of the model. It is written once, in plain C and vector types, and compiled once for each
 * instruction set: this file includes itself below with LORCH_LEVEL defined, and then only the part after
 * the #else that follows is seen, with FN() adding the level's name. The level is chosen at start. All
 * levels give the same bits: FMA() is fused everywhere (where the CPU cannot, num_fma emulates it), and
 * each output has one accumulator in index order, so vector lanes can only be different outputs. Sums over
 * a whole vector (RMSNorm, softmax) use 16 partial sums and a fixed tree. Nothing here allocates.
 *
 * A product takes up to MAT_ROWS rows at a time. A slice of 256 columns is unpacked into tiles of LANES rows,
 * side by side, 4 columns of a row in each lane; then all tokens of the batch pass over the tiles while
 * they are in cache. One token alone needs no tile: its sums stay in registers, and so do the codes.
 *
 * To add a format: its unpacker and row in "Number formats"; here a case in mat_shape_of, one in mat_take_block,
 * or in mat_head and mat_take_super, a FORMAT, and a ROW in mat_routines_of. To add an instruction set: a stanza
 * with its target, and the dozen primitives at the head of the included part. */

enum {
    MAT_ROWS = 64,     /* most rows of one call of multiply: their tiles fill half of a level-1 cache */
    MAT_SLICE = 128,   /* columns of float weights that are turned at a time */
    MAT_FEW = 16,      /* tokens that the weights' way from memory outlasts */
    ATTN_QUERIES = 32  /* queries (tokens x heads) that share each KV block that attention loads */
};

/* 256 activations of one token, quantised by 32 or by 256. Products of both kinds read the codes alike. */
typedef struct {
    int8_t q[256];
    int32_t start[16]; /* minus the sum of each 32 (BLOCKS) or 16 (SUPERBLOCKS) codes, as the level's sums start from it */
    union {
        struct { float d[8], sum[8]; } block;
        struct { int16_t sum16[16], sum32[8]; float d; } super;
    } u;
} mat_x;

/* The activations of a batch in the forms that weights may want; those not needed are not filled in. */
typedef struct {
    const float *x;  /* [n_tok][n] */
    mat_x *blocks;   /* [ceil(n / 256)][n_tok], quantised per 32 values */
    mat_x *super;    /* [n / 256][n_tok], quantised per 256 values */
    int64_t n;
    int n_tok;
} mat_act;

typedef struct { /* out[t][row] = weights[row] . act[t] */
    const quant_format *format;
    const char *weights;  /* [n_rows][n] in the file's format */
    const mat_act *act;
    float *out;           /* [n_tok][n_rows] */
    int64_t n_rows;
} mat_product;

/* Numbers of the KV cache. Q8_0: int8 codes, with a half-float scale for each 32 dimensions of a head. */
enum mat_kv { MAT_KV_F32, MAT_KV_F16, MAT_KV_Q8_0 };

/* Bytes of a block of one KV head: K as [head_dim][KV_BLOCK], then V as [KV_BLOCK][head_dim]; of Q8_0 the codes so,
 * then the scales of K as [groups][KV_BLOCK] and of V as [KV_BLOCK][groups]. */
static size_t mat_head_bytes(int head_dim, enum mat_kv kv) {
    size_t values = (size_t)head_dim * KV_BLOCK * 2, groups = (size_t)(head_dim + 31) / 32;
    return kv == MAT_KV_F32 ? values * 4 : kv == MAT_KV_F16 ? values * 2 : values + groups * KV_BLOCK * 2 * sizeof(uint16_t);
}

/* Bytes of scratch that multiply needs for a batch: 64 sums for each token, and the tiles. */
static size_t mat_scratch(int n_tok) { return (size_t)n_tok * MAT_ROWS * sizeof(float) + 40960; }

typedef struct {
    const float *q;                /* [n_tok][n_head * head_dim] */
    float *out;                    /* [n_tok][n_head * head_dim] */
    const int32_t *pos;            /* [n_tok] */
    const uint32_t *const *blocks; /* [n_tok] the KV block numbers of each token's sequence */
    const int32_t *group;          /* [n_groups + 1] first token of each run of at most ATTN_QUERIES / (n_head / n_head_kv) of one sequence */
    const char *layer;             /* this layer in block 0 of the pool */
    size_t block_bytes;            /* from one block to the next */
    size_t head_bytes;             /* from one KV head to the next: mat_head_bytes */
    enum mat_kv kv;
    int n_head, n_head_kv, head_dim;
    float scale;
    int window;                    /* a token sees itself and window - 1 positions before it; 0: all */
    float cap;                     /* scores s become cap * tanh(s / cap); 0: they stay */
    const float *sinks;            /* [n_head] a score for each head that takes weight and gives no value; or NULL */
} mat_attention;

/* What a feed-forward layer does with its gate g and, unless that is NULL, its other input u. */
enum mat_activation {
    MAT_SILU,   /* g * sigmoid(g) * u */
    MAT_GELU,   /* g * Phi(g) * u, Phi by the tanh formula (Hendrycks and Gimpel, 2016) */
    MAT_SWIGLU7 /* g * sigmoid(1.702 g) * (u + 1), g at most 7 and u within -7..7 (gpt-oss) */
};

static int mat_attention_tokens(int n_head, int n_head_kv) { /* tokens in a group */
    int heads = n_head / n_head_kv;
    return heads < ATTN_QUERIES ? ATTN_QUERIES / heads : 1;
}

static size_t mat_attention_scratch(int n_head, int n_head_kv, int head_dim) { /* bytes for one thread */
    size_t queries = (size_t)mat_attention_tokens(n_head, n_head_kv) * (size_t)(n_head / n_head_kv);
    return sizeof(float) * ((size_t)head_dim * KV_BLOCK * 2 + queries * (size_t)(2 * head_dim + KV_BLOCK + 2)) + 64;
}

typedef struct {
    const char *name;
    /* At most MAT_ROWS rows, from row on. `ahead`: the weights that this thread will want next, or NULL. */
    void (*multiply)(const mat_product *p, int64_t row, int rows, const char *ahead, void *scratch);
    void (*quantise)(mat_act *a, unsigned kinds, int t);           /* token t, for the kinds in the bit set */
    void (*rms_norm)(float *out, const float *x, const float *w, int n, float eps);
    void (*layer_norm)(float *out, const float *x, const float *w, int n, float eps);
    void (*rope)(float *x, const float *cos_sin, int n_rot, int pairs_apart);
    void (*store)(char *head, const float *k, const float *v, int at, int head_dim, enum mat_kv kv);
    void (*attend)(const mat_attention *a, int group, int head_kv, void *scratch);
    void (*activate)(enum mat_activation a, float *gate, const float *up, int64_t n);
    void (*cap)(float *x, int64_t n, float most);                  /* x = most * tanh(x / most) */
    void (*add)(float *x, const float *y, int64_t n);
    void (*exp_shifted)(float *out, const float *x, int64_t n, float shift); /* exp(x - shift) */
    double (*peak)(int64_t n);                                     /* runs n rounds of int8 dot products; returns the operations done */
    uint64_t (*read)(const void *p, size_t n);                     /* reads n bytes, as fast as memory gives them */
} mat_kernels;

#define LORCH_PASTE2(a, b) a##_##b
#define LORCH_PASTE(a, b) LORCH_PASTE2(a, b)
#define FN(name) LORCH_PASTE(name, LORCH_LEVEL)
#define LORCH_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define LORCH_TARGET(t) LORCH_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define LORCH_TARGET_END _Pragma("clang attribute pop")
#define LORCH_UNROLL
#else
#define LORCH_TARGET(t) _Pragma("GCC push_options") LORCH_PRAGMA(GCC target(t))
#define LORCH_TARGET_END _Pragma("GCC pop_options")
#define LORCH_UNROLL _Pragma("GCC unroll 8")
#endif
#ifdef __x86_64__
#include <immintrin.h>
#elif defined __aarch64__
#include <arm_neon.h>
#endif

/* How a level multiplies int8: with its own vector code, or by which instruction. */
#define MAT_PLAIN 0
#define MAT_MADD 1 /* vpmaddubsw: pairs of columns in int16 */
#define MAT_VNNI 2 /* vpdpbusd */
#define MAT_NEON 3
#define MAT_SDOT 4

#define LORCH_LEVEL scalar
#define LANES 4
#define MAT_DOT MAT_PLAIN
#include "lorch.c"
#undef LORCH_LEVEL

#ifdef __x86_64__
#define LORCH_LEVEL avx2
#define LANES 8
#define MAT_DOT MAT_MADD
LORCH_TARGET("avx2,fma,f16c")
#include "lorch.c"
LORCH_TARGET_END
#undef LORCH_LEVEL

#define LORCH_LEVEL avxvnni
#define LANES 8
#define MAT_DOT MAT_VNNI
LORCH_TARGET("avx2,fma,f16c,avxvnni")
#include "lorch.c"
LORCH_TARGET_END
#undef LORCH_LEVEL

#ifdef __clang__
#define LORCH_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"
#else
#define LORCH_AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"
#endif
#define LORCH_LEVEL avx512
#define LANES 16
#define MAT_DOT MAT_MADD
LORCH_TARGET(LORCH_AVX512)
#include "lorch.c"
LORCH_TARGET_END
#undef LORCH_LEVEL

#define LORCH_LEVEL avx512vnni
#define LANES 16
#define MAT_DOT MAT_VNNI
LORCH_TARGET(LORCH_AVX512 ",avx512vnni")
#include "lorch.c"
LORCH_TARGET_END
#undef LORCH_LEVEL
#endif

#ifdef __aarch64__
#define LORCH_LEVEL neon
#define LANES 4
#define MAT_DOT MAT_NEON
#include "lorch.c"
#undef LORCH_LEVEL

#define LORCH_LEVEL neondot
#define LANES 4
#define MAT_DOT MAT_SDOT
#ifdef __clang__
LORCH_TARGET("dotprod")
#else
LORCH_TARGET("arch=armv8.2-a+dotprod")
#endif
#include "lorch.c"
LORCH_TARGET_END
#undef LORCH_LEVEL
#endif

/* The levels that this build has, slowest first, and whether this CPU and its system can run them. */
static const mat_kernels *const mat_levels[] = {
    &mat_table_scalar,
#ifdef __x86_64__
    &mat_table_avx2, &mat_table_avxvnni, &mat_table_avx512, &mat_table_avx512vnni,
#endif
#ifdef __aarch64__
    &mat_table_neon, &mat_table_neondot,
#endif
};
enum { MAT_LEVELS = sizeof mat_levels / sizeof *mat_levels };

#ifdef __x86_64__
#include <cpuid.h>
static int mat_level_runs(int level) {
    unsigned a, b, c, d, e, f, low = 0, high, vnni256;
    if (level == 0) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    if (c >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* the registers that the system saves */
    int fma = c >> 12 & c >> 28 & c >> 29 & 1;
    if ((low & 6) != 6 || !fma || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1)) return 0;
    vnni256 = __get_cpuid_count(7, 1, &a, &d, &e, &f) ? a >> 4 & 1 : 0;
    int wide = (low & 0xe6) == 0xe6 && (b >> 16 & b >> 17 & b >> 30 & b >> 31 & 1);
    return level == 1 ? 1 : level == 2 ? (int)vnni256 : level == 3 ? wide : wide && (c >> 11 & 1);
}
#elif defined __aarch64__
#include <sys/auxv.h>
static int mat_level_runs(int level) { return level < 2 || (getauxval(AT_HWCAP) >> 20 & 1); } /* ASIMDDP */
#else
static int mat_level_runs(int level) { return level == 0; }
#endif

/* The best level that runs here, or the one that LORCH_SIMD names. NULL with a message if it cannot run. */
static const mat_kernels *mat_choose(char *err, size_t cap) {
    const char *want = getenv("LORCH_SIMD");
    char names[128] = "";
    int best = 0;
    for (int i = 0; i < MAT_LEVELS; i++) {
        if (want && *want && strcmp(want, mat_levels[i]->name) == 0) {
            if (mat_level_runs(i)) return mat_levels[i];
            return sys_fail(err, cap, "LORCH_SIMD=%s: this CPU cannot run that level", want), NULL;
        }
        if (mat_level_runs(i)) best = i;
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", mat_levels[i]->name);
    }
    if (want && *want) return sys_fail(err, cap, "LORCH_SIMD=%s: no such level; this build has %s", want, names), NULL;
    return mat_levels[best];
}

/* ---- selftest: a level's kernels against quant_dot, and its vectors against the scalar level's, bit by bit ---- */

typedef struct { uint64_t state; } mat_random;

static uint32_t mat_draw(mat_random *r) { /* xorshift64 (Marsaglia, 2003) */
    r->state ^= r->state << 13, r->state ^= r->state >> 7, r->state ^= r->state << 17;
    return (uint32_t)(r->state >> 24);
}

static void mat_draw_floats(mat_random *r, float *x, size_t n) { /* of all magnitudes from 2^-8 to 2^3, and some zeros */
    for (size_t i = 0; i < n; i++) x[i] = (float)((int)(mat_draw(r) % 4095) - 2047) / (float)(1 << mat_draw(r) % 12) * 0x1p-8f;
}

/* Random rows of a format: blocks of random bytes whose values are finite and not huge. */
static void mat_draw_rows(mat_random *r, const quant_format *f, char *rows, size_t blocks) {
    float value[256];
    for (size_t i = 0; i < blocks; i++) {
        int good = 0;
        while (!good) {
            for (int j = 0; j < f->bytes; j++) rows[i * f->bytes + (size_t)j] = (char)mat_draw(r);
            quant_dequantise(f, rows + i * f->bytes, value, f->block);
            good = 1;
            for (int j = 0; j < f->block; j++) good &= value[j] < 65536.0f && value[j] > -65536.0f;
        }
    }
}

/* Memory whose end is the end of a page that another follows that cannot be read: an overrun is a crash. */
static char *mat_guarded(size_t bytes, void **map, size_t *mapped) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    *mapped = room + page;
    *map = sys_pages(*mapped);
    if (!*map || mprotect((char *)*map + room, page, PROT_NONE)) return NULL;
    return (char *)*map + room - bytes;
}

/* One product of random weights, [rows] x [n] by n_tok tokens. Returns 0 with err set if a bit differs. */
static int mat_selftest_product(const mat_kernels *k, const quant_format *f, int64_t n, int64_t rows, int n_tok, char *err, size_t cap) {
    mat_random r = {(uint64_t)(n * 7919 + rows * 131 + n_tok) * 2654435761u + f->bytes};
    size_t row_bytes = quant_row_bytes(f, n), superblocks = (size_t)(n + 255) / 256, mapped = 0, wrong = 0;
    void *map = NULL, *scratch = sys_pages(mat_scratch(n_tok));
    char *w = mat_guarded(row_bytes * (size_t)rows, &map, &mapped);
    float *x = sys_zalloc((size_t)(n * n_tok), 4), *out = sys_zalloc((size_t)(rows * n_tok), 4);
    mat_x *act = sys_pages(superblocks * (size_t)n_tok * sizeof *act);
    mat_act a = {x, act, act, n, n_tok};
    mat_product p = {f, w, &a, out, rows};
    int ok = w && x && out && act && scratch;
    if (!ok) sys_fail(err, cap, "out of memory");
    else {
        mat_draw_rows(&r, f, w, (size_t)(rows * n / f->block));
        mat_draw_floats(&r, x, (size_t)(n * n_tok));
        for (int t = 0; t < n_tok; t++) k->quantise(&a, 1u << f->kind, t);
        for (int64_t row = 0; row < rows; row += MAT_ROWS) k->multiply(&p, row, rows - row < MAT_ROWS ? (int)(rows - row) : MAT_ROWS, NULL, scratch);
        for (int64_t i = 0; i < rows * n_tok; i++)
            wrong += num_bits(out[i]) != num_bits(quant_dot(f, w + (size_t)(i % rows) * row_bytes, x + i / rows * n, n));
        if (wrong) sys_fail(err, cap, "%s, %s: %d of %d products of length %d differ from the naive loop (%d rows, %d tokens)", k->name, f->name,
                            (int)wrong, (int)(rows * n_tok), (int)n, (int)rows, n_tok);
    }
    sys_pages_free(map, mapped), sys_pages_free(scratch, mat_scratch(n_tok)), sys_pages_free(act, superblocks * (size_t)n_tok * sizeof *act);
    free(x), free(out);
    return ok && !wrong;
}

/* A level and a format over shapes with every kind of tail. Returns 0 with err set on the first difference. */
static int mat_selftest(int level, const quant_format *f, char *err, size_t cap) {
    static const int64_t blocks[] = {1, 3, 8, 9, 18, 24}, rows[] = {1, 16, 23, 96, 130};
    static const int tokens[] = {1, 2, 3, 4, 7, 8, 13};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        for (size_t j = 0; j < sizeof rows / sizeof *rows; j++)
            for (size_t k = 0; k < sizeof tokens / sizeof *tokens; k++) {
                if (f->block == 256 && blocks[i] > 3) continue;
                int64_t n = f->block == 1 ? blocks[i] * 19 : blocks[i] * f->block;
                if (!mat_selftest_product(mat_levels[level], f, n, rows[j], tokens[k], err, cap)) return 0;
            }
    return 1;
}

/* Attention of n_tok tokens at the end of `length` positions, into out; 3 heads for each of 2 KV heads. A window
 * comes with a cap and sinks. */
static int mat_selftest_attend(const mat_kernels *k, int head_dim, int length, int n_tok, enum mat_kv kv, int window, float *out) {
    static const float sinks[6] = {0.5f, -1.0f, 0.25f, 2.0f, 0.0f, -0.125f};
    mat_random r = {(uint64_t)(head_dim * 7919 + length)};
    size_t head_bytes = mat_head_bytes(head_dim, kv), n_blocks = (size_t)(length + KV_BLOCK - 1) / KV_BLOCK;
    size_t row = (size_t)(6 * head_dim), scratch_bytes = mat_attention_scratch(6, 2, head_dim);
    char *cache = sys_zalloc(n_blocks * 2, head_bytes), *scratch = sys_pages(scratch_bytes);
    float *x = sys_zalloc(row, 4 * (size_t)length);
    int32_t *pos = sys_zalloc((size_t)length, 4), group[64] = {0}, groups = 0;
    uint32_t *block = sys_zalloc(n_blocks, 4);
    const uint32_t **blocks = sys_zalloc((size_t)n_tok, sizeof *blocks);
    int ok = cache && scratch && x && pos && block && blocks;
    for (size_t i = 0; ok && i < n_blocks; i++) block[i] = (uint32_t)(n_blocks - 1 - i);
    for (int t = 0; ok && t < length; t++) {
        mat_draw_floats(&r, x, row);
        for (size_t h = 0; h < 2; h++)
            k->store(cache + (block[t / KV_BLOCK] * 2 + h) * head_bytes, x + (size_t)head_dim * h, x + (size_t)head_dim * (2 + h),
                     t % KV_BLOCK, head_dim, kv);
    }
    for (int t = 0; ok && t < n_tok; t++) {
        pos[t] = length - n_tok + t, blocks[t] = block;
        if (t % mat_attention_tokens(6, 2) == 0) group[groups++] = t;
        mat_draw_floats(&r, x + (size_t)t * row, row);
    }
    if (ok) {
        group[groups] = n_tok;
        mat_attention a = {x, out, pos, blocks, group, cache, 2 * head_bytes, head_bytes, kv, 6, 2, head_dim, 0.125f,
                           window, window ? 30.0f : 0, window ? sinks : NULL};
        for (int g = 0; g < groups * 2; g++) k->attend(&a, g / 2, g % 2, scratch);
    }
    free(cache), free(x), free(pos), free(block), free(blocks), sys_pages_free(scratch, scratch_bytes);
    return ok;
}

/* The vector kernels of one level, for one length, into out[MAT_VECTOR_TESTS * n]: the same bits at every level. */
enum { MAT_VECTOR_TESTS = 13 };

static void mat_selftest_vectors_of(const mat_kernels *k, int n, float *out) {
    mat_random r = {(uint64_t)n};
    float *x = out, *y = out + n;
    mat_draw_floats(&r, out, (size_t)n * MAT_VECTOR_TESTS);
    k->rms_norm(out + 2 * n, x, y, n, 1e-5f);
    k->activate(MAT_SILU, out + 3 * n, x, n);
    k->add(out + 4 * n, x, n);
    k->exp_shifted(out + 5 * n, x, n, 0.7f);
    k->rope(out + 6 * n, y, n / 4 * 4, n & 1);
    k->layer_norm(out + 7 * n, x, y, n, 1e-5f);
    k->activate(MAT_GELU, out + 8 * n, x, n), k->activate(MAT_GELU, out + 9 * n, NULL, n);
    k->activate(MAT_SWIGLU7, out + 10 * n, x, n), k->activate(MAT_SILU, out + 11 * n, NULL, n);
    k->cap(out + 12 * n, n, 3.0f);
}

static int mat_selftest_vectors(int level, char *err, size_t cap) {
    static const int lengths[] = {4, 7, 16, 61, 64, 96, 333};
    static const int dims[][5] = { /* head, positions, tokens, KV type, window */
        {64, 1, 1, MAT_KV_F16, 0}, {64, 70, 70, MAT_KV_F16, 0}, {80, 200, 33, MAT_KV_F16, 0}, {128, 129, 5, MAT_KV_F32, 0},
        {33, 65, 40, MAT_KV_F16, 0}, {80, 130, 1, MAT_KV_Q8_0, 0}, {64, 140, 70, MAT_KV_Q8_0, 0},
        {64, 200, 90, MAT_KV_F32, 40}, {48, 300, 1, MAT_KV_F16, 130}, {64, 70, 70, MAT_KV_F16, 1}};
    float *want = sys_zalloc(2, 70000 * sizeof(float)), *got = want + 70000;
    if (!want) return sys_fail(err, cap, "out of memory");
    for (int i = 0; i < 7; i++) {
        mat_selftest_vectors_of(mat_levels[0], lengths[i], want), mat_selftest_vectors_of(mat_levels[level], lengths[i], got);
        if (memcmp(want, got, (size_t)lengths[i] * MAT_VECTOR_TESTS * sizeof(float)))
            return free(want), sys_fail(err, cap, "%s: the vectors of length %d differ from the scalar level's", mat_levels[level]->name, lengths[i]);
    }
    for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
        const int *d = dims[i];
        enum mat_kv kv = (enum mat_kv)d[3];
        if (!mat_selftest_attend(mat_levels[0], d[0], d[1], d[2], kv, d[4], want) || !mat_selftest_attend(mat_levels[level], d[0], d[1], d[2], kv, d[4], got))
            return free(want), sys_fail(err, cap, "out of memory");
        if (memcmp(want, got, (size_t)(6 * d[0] * d[2]) * sizeof(float)))
            return free(want), sys_fail(err, cap, "%s: attention (head %d, %d positions) differs from the scalar level's",
                                        mat_levels[level]->name, d[0], d[1]);
    }
    free(want);
    return 1;
}

#else /* LORCH_LEVEL is defined: the loops, for one instruction set, which has set LANES and MAT_DOT */

/* ---- primitives: all that a level must say; everything below is common ---- */

#define V FN(mat_ints)
#define F FN(mat_floats)
typedef int32_t V __attribute__((vector_size(4 * LANES)));
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int16_t FN(mat_words) __attribute__((vector_size(4 * LANES)));
typedef uint8_t FN(mat_bytes) __attribute__((vector_size(4 * LANES)));
typedef V FN(mat_ints_any) __attribute__((aligned(1), may_alias));
typedef F FN(mat_floats_any) __attribute__((aligned(1), may_alias));
typedef struct { V a, b, c, d; } FN(mat_four);

LORCH_INLINE V FN(v_all)(int32_t i) { return i - (V){0}; }
LORCH_INLINE F FN(f_all)(float f) { return f - (F){0}; }
LORCH_INLINE V FN(v_load)(const void *p) { return *(const FN(mat_ints_any) *)p; }
LORCH_INLINE F FN(f_load)(const void *p) { return *(const FN(mat_floats_any) *)p; }
LORCH_INLINE void FN(f_store)(void *p, F f) { *(FN(mat_floats_any) *)p = f; }
LORCH_INLINE V FN(v_at)(const void *p) { /* the 4 bytes at p, in every lane */
    int32_t i;
    memcpy(&i, p, 4);
    return FN(v_all)(i);
}
LORCH_INLINE F FN(f_int)(V v) { return __builtin_convertvector(v, F); }
#define MAT_PAIRED (MAT_DOT == MAT_MADD)                        /* sums of codes run in int16, two in a lane; scales too */
#define MAT_SIGNED (MAT_DOT == MAT_NEON || MAT_DOT == MAT_SDOT) /* codes are signed; others are unsigned, offset by a power of two */

#if LANES == 16
enum { FN(MAT_TOKENS) = 6 };
#define KEEP(x) __asm__("" : "+v"(x)) /* in a register: else gcc loads it twice */
LORCH_INLINE F FN(f_fma)(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
LORCH_INLINE F FN(f_max)(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); } /* a > b ? a : b */
LORCH_INLINE F FN(f_min)(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
LORCH_INLINE F FN(f_half)(const void *p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
LORCH_INLINE V FN(v_table)(const int8_t *table, uint8_t offset, V v) { /* table[byte] + offset, for each byte below 16 */
    __m128i t = _mm_add_epi8(_mm_loadu_si128((const void *)table), _mm_set1_epi8((char)offset));
    return (V)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), (__m512i)v);
}
LORCH_INLINE F FN(f_half_low)(V v) { return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)v)); }
LORCH_INLINE __m512i FN(v_gather)(const char *p, const char *q, const char *r, const char *t) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)q), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)r), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const void *)t), 3);
}
LORCH_INLINE FN(mat_four) FN(v_turn)(const char *p, size_t s) {
    const char *q = p + 4 * s, *u = p + 8 * s, *v = q + 8 * s;
    size_t s3 = 3 * s;
    __asm__("" : "+r"(p), "+r"(q), "+r"(u), "+r"(v), "+r"(s3)); /* else gcc keeps 16 pointers, on the stack */
    __m512i a = FN(v_gather)(p, q, u, v), b = FN(v_gather)(p + s, q + s, u + s, v + s);
    __m512i c = FN(v_gather)(p + 2 * s, q + 2 * s, u + 2 * s, v + 2 * s), d = FN(v_gather)(p + s3, q + s3, u + s3, v + s3);
    __m512i e = _mm512_unpacklo_epi32(a, b), f = _mm512_unpackhi_epi32(a, b), g = _mm512_unpacklo_epi32(c, d), h = _mm512_unpackhi_epi32(c, d);
    FN(mat_four) r = {(V)_mm512_unpacklo_epi64(e, g), (V)_mm512_unpackhi_epi64(e, g), (V)_mm512_unpacklo_epi64(f, h), (V)_mm512_unpackhi_epi64(f, h)};
    return r;
}
#if MAT_DOT == MAT_VNNI
LORCH_INLINE V FN(v_dot)(V sum, V w, V x) { return (V)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
LORCH_INLINE V FN(v_pairs)(V sum, V a, V b) { return (V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
#else
LORCH_INLINE V FN(v_pairs)(V sum, V a, V b) { return sum + (V)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
LORCH_INLINE V FN(v_madd)(V w, V x) { return (V)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
LORCH_INLINE V FN(v_madd_signed)(V w, V x) {
    __m512i sign = _mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), (__m512i)x);
    return (V)_mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)w), sign);
}
#endif

#elif LANES == 8
enum { FN(MAT_TOKENS) = 3 };
#define KEEP(x) __asm__("" : "+x"(x))
LORCH_INLINE F FN(f_fma)(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
LORCH_INLINE F FN(f_max)(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
LORCH_INLINE F FN(f_min)(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
LORCH_INLINE F FN(f_half)(const void *p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
LORCH_INLINE V FN(v_table)(const int8_t *table, uint8_t offset, V v) {
    __m128i t = _mm_add_epi8(_mm_loadu_si128((const void *)table), _mm_set1_epi8((char)offset));
    return (V)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), (__m256i)v);
}
LORCH_INLINE F FN(f_half_low)(V v) {
    __m256i low = (__m256i)(v & 0xffff);
    return (F)_mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 8)));
}
LORCH_INLINE __m256i FN(v_gather)(const char *p, size_t s) {
    __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const void *)p));
    return _mm256_inserti128_si256(v, _mm_loadu_si128((const void *)(p + 4 * s)), 1);
}
LORCH_INLINE FN(mat_four) FN(v_turn)(const char *p, size_t s) {
    __m256i a = FN(v_gather)(p, s), b = FN(v_gather)(p + s, s), c = FN(v_gather)(p + 2 * s, s), d = FN(v_gather)(p + 3 * s, s);
    __m256i e = _mm256_unpacklo_epi32(a, b), f = _mm256_unpackhi_epi32(a, b), g = _mm256_unpacklo_epi32(c, d), h = _mm256_unpackhi_epi32(c, d);
    FN(mat_four) r = {(V)_mm256_unpacklo_epi64(e, g), (V)_mm256_unpackhi_epi64(e, g), (V)_mm256_unpacklo_epi64(f, h), (V)_mm256_unpackhi_epi64(f, h)};
    return r;
}
LORCH_INLINE V FN(v_pairs)(V sum, V a, V b) { return sum + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#if MAT_DOT == MAT_VNNI
LORCH_INLINE V FN(v_dot)(V sum, V w, V x) { return (V)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x); }
#else
LORCH_INLINE V FN(v_madd)(V w, V x) { return (V)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
LORCH_INLINE V FN(v_madd_signed)(V w, V x) {
    return (V)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
}
#endif

#elif MAT_DOT != MAT_PLAIN /* NEON */
enum { FN(MAT_TOKENS) = 4 };
#define KEEP(x) (void)0
LORCH_INLINE F FN(f_fma)(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LORCH_INLINE F FN(f_max)(F a, F b) { return (F)vbslq_f32(vcgtq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b); }
LORCH_INLINE F FN(f_min)(F a, F b) { return (F)vbslq_f32(vcltq_f32((float32x4_t)a, (float32x4_t)b), (float32x4_t)a, (float32x4_t)b); }
LORCH_INLINE F FN(f_half)(const void *p) { return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
LORCH_INLINE V FN(v_table)(const int8_t *table, uint8_t offset, V v) {
    return (V)vqtbl1q_u8(vaddq_u8(vreinterpretq_u8_s8(vld1q_s8(table)), vdupq_n_u8(offset)), (uint8x16_t)v);
}
LORCH_INLINE F FN(f_half_low)(V v) { return (F)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)v))); }
LORCH_INLINE FN(mat_four) FN(v_turn)(const char *p, size_t s) {
    int32x4_t a = (int32x4_t)FN(v_load)(p), b = (int32x4_t)FN(v_load)(p + s);
    int32x4_t c = (int32x4_t)FN(v_load)(p + 2 * s), d = (int32x4_t)FN(v_load)(p + 3 * s);
    int32x4_t e = vzip1q_s32(a, c), f = vzip2q_s32(a, c), g = vzip1q_s32(b, d), h = vzip2q_s32(b, d);
    FN(mat_four) r = {(V)vzip1q_s32(e, g), (V)vzip2q_s32(e, g), (V)vzip1q_s32(f, h), (V)vzip2q_s32(f, h)};
    return r;
}
LORCH_INLINE V FN(v_pairs)(V sum, V a, V b) {
    int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return sum + (V)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
}
#if MAT_DOT == MAT_SDOT
LORCH_INLINE V FN(v_dot)(V sum, V w, V x) { /* clang 14 hides the intrinsic behind -march */
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}
#else
LORCH_INLINE V FN(v_dot)(V sum, V w, V x) {
    int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x)), high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
    return (V)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high)); /* 128 * 127 * 2 fits in 16 bits */
}
#endif

#else /* no instructions of its own */
enum { FN(MAT_TOKENS) = 2 };
#define KEEP(x) (void)0
#define APART static __attribute__((noinline)) /* long, and not made for speed */
#ifdef __FP_FAST_FMAF
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
LORCH_INLINE
#else
#define FMA(a, b, c) num_fma(a, b, c)
APART
#endif
F FN(f_fma)(F a, F b, F c) {
    for (int i = 0; i < LANES; i++) c[i] = FMA(a[i], b[i], c[i]);
    return c;
}
LORCH_INLINE F FN(f_max)(F a, F b) {
    for (int i = 0; i < LANES; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
LORCH_INLINE F FN(f_min)(F a, F b) {
    for (int i = 0; i < LANES; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
APART F FN(f_half_low)(V v) {
    F f = {0};
    for (int i = 0; i < LANES; i++) f[i] = num_from_f16((uint16_t)v[i]);
    return f;
}
LORCH_INLINE F FN(f_half)(const void *p) {
    V v = {0};
    for (int i = 0; i < LANES; i++) v[i] = ((const uint16_t *)p)[i];
    return FN(f_half_low)(v);
}
APART V FN(v_table)(const int8_t *table, uint8_t offset, V v) {
    FN(mat_bytes) b = (FN(mat_bytes))v;
    for (int i = 0; i < 4 * LANES; i++) b[i] = (uint8_t)(table[b[i] & 15] + offset);
    return (V)b;
}
LORCH_INLINE FN(mat_four) FN(v_turn)(const char *p, size_t s) {
    V a = FN(v_load)(p), b = FN(v_load)(p + s), c = FN(v_load)(p + 2 * s), d = FN(v_load)(p + 3 * s);
    FN(mat_four) r = {{a[0], b[0], c[0], d[0]}, {a[1], b[1], c[1], d[1]}, {a[2], b[2], c[2], d[2]}, {a[3], b[3], c[3], d[3]}};
    return r;
}
LORCH_INLINE V FN(v_pairs)(V sum, V a, V b) { return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16); }
LORCH_INLINE V FN(v_dot)(V sum, V w, V x) { /* bytes 0 and 2, then 1 and 3: a product fits in 16 bits */
    FN(mat_words) a = (FN(mat_words))w, b = (FN(mat_words))x;
    V even = (V)((a & 255) * (b << 8 >> 8)), odd = (V)((a >> 8 & 255) * (b >> 8));
    return sum + (even << 16 >> 16) + (even >> 16) + (odd << 16 >> 16) + (odd >> 16);
}
#undef APART
#endif

/* A chain of dots runs from v_start over v_dot; v_scaled and v_summed then take it up into int32 sums.
 * MADD's chains are int16 pairs; wide codes, over 6 bits, do not fit there and go one by one. */
#if MAT_PAIRED
LORCH_INLINE V FN(v_start)(int32_t start, int shift) { return (V)((FN(mat_words))FN(v_all)(start) << shift); }
LORCH_INLINE V FN(v_dot)(V chain, V w, V x) {
    chain = (V)((FN(mat_words))chain + (FN(mat_words))FN(v_madd)(w, x));
    KEEP(chain); /* else gcc turns the chain into a tree, which needs more registers than there are */
    return chain;
}
LORCH_INLINE V FN(v_dot_wide)(V chain, V w, V x) {
    chain = FN(v_pairs)(chain, FN(v_madd_signed)(w, x), FN(v_all)(0x10001));
    if (LANES == 16) KEEP(chain); /* with AVX2 the tree is the faster one */
    return chain;
}
LORCH_INLINE V FN(v_scaled)(V sum, V chain, V scale) { return FN(v_pairs)(sum, chain, scale); }
LORCH_INLINE V FN(v_summed)(V sum, V chain) { return FN(v_pairs)(sum, chain, FN(v_all)(0x10001)); }
LORCH_INLINE V FN(v_scale)(V s) { return (s & 0xffff) | s << 16; }
LORCH_INLINE V FN(v_scaled_wide)(V sum, V chain, V scale) { return sum + chain * (scale >> 16); }
LORCH_INLINE V FN(v_summed_wide)(V sum, V chain) { return sum + chain; }
#else
LORCH_INLINE V FN(v_start)(int32_t start, int shift) { return MAT_SIGNED ? (V){0} : FN(v_all)(start) << shift; }
LORCH_INLINE V FN(v_dot_wide)(V chain, V w, V x) { return FN(v_dot)(chain, w, x); }
LORCH_INLINE V FN(v_scaled)(V sum, V chain, V scale) { return sum + chain * scale; }
LORCH_INLINE V FN(v_summed)(V sum, V chain) { return sum + chain; }
LORCH_INLINE V FN(v_scale)(V s) { return s; }
LORCH_INLINE V FN(v_scaled_wide)(V sum, V chain, V scale) { return sum + chain * scale; }
LORCH_INLINE V FN(v_summed_wide)(V sum, V chain) { return sum + chain; }
#endif

/* Codes as the level wants them, from unsigned ones offset by 1 << shift, or from signed bytes. */
LORCH_INLINE V FN(v_codes)(V v, int shift) { return MAT_SIGNED ? (V)((FN(mat_bytes))v - (uint8_t)(1 << shift)) : v; }
LORCH_INLINE V FN(v_wide_codes)(V v) { return MAT_SIGNED || MAT_PAIRED ? v : v ^ (int32_t)0x80808080; }
LORCH_INLINE V FN(v_low)(V v) { return v & 0x0f0f0f0f; }
LORCH_INLINE V FN(v_high)(V v) { return v >> 4 & 0x0f0f0f0f; }

LORCH_INLINE F FN(f_halves)(const char *p, size_t stride) { /* one half float of each row */
#if LANES >= 8
    __m128i a = _mm_setzero_si128(), b = a;
#define TAKE(i) a = _mm_insert_epi16(a, *(const short *)(const void *)(p + i * stride), i);
    TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7)
#undef TAKE
#if LANES == 8
    (void)b;
    return (F)_mm256_cvtph_ps(a);
#else
#define TAKE(i) b = _mm_insert_epi16(b, *(const short *)(const void *)(p + (i + 8) * stride), i);
    TAKE(0) TAKE(1) TAKE(2) TAKE(3) TAKE(4) TAKE(5) TAKE(6) TAKE(7)
#undef TAKE
    return (F)_mm512_cvtph_ps(_mm256_set_m128i(b, a));
#endif
#else
    uint16_t h[LANES];
    for (int i = 0; i < LANES; i++) memcpy(h + i, p + (size_t)i * stride, 2);
    return FN(f_half)(h);
#endif
}

/* ---- tiles: 256 columns of LANES rows, unpacked ---- */

typedef struct {
    int32_t q[64][LANES];     /* codes, 4 columns of a row in a lane */
    int32_t scale[16][LANES]; /* SUPERBLOCKS: of 16 columns each, or of 32 (8 of them) */
    int32_t min[8][LANES];    /* mins in int16 pairs: of 16 columns each, or of 32 (4 pairs) */
    float d[8][LANES], dmin[8][LANES]; /* BLOCKS: of 32 columns each */
} __attribute__((aligned(64))) FN(mat_tile);

#define STORE(where, v) (*(V *)(void *)(where) = (v))
#define TILE(where) (*(const V *)(const void *)(where))
#define TILE_F(where) (*(const F *)(const void *)(where))

/* How a format's codes meet the activations: what the kernels below are specialised for. */
typedef struct {
    int chain;  /* dots between scales: 8 for 32 columns, 4 for 16 */
    int pairs;  /* of mins: 0, 4 or 8; with BLOCKS 0 or 1 */
    int wide;   /* codes over 6 bits */
    int shift;  /* codes are offset by 1 << shift, if there are no mins */
    int blocks; /* BLOCKS, not SUPERBLOCKS */
} FN(mat_shape);

/* A chain of 5-bit codes in int16 ends after 4 dots. */
enum { FN(MAT_CHAIN5) = MAT_PAIRED ? 4 : 8 };

LORCH_INLINE FN(mat_shape) FN(mat_shape_of)(int type) {
    switch (type) {
    case QUANT_Q4_0: return (FN(mat_shape)){8, 0, 0, 3, 1};
    case QUANT_Q5_0: case QUANT_MXFP4: return (FN(mat_shape)){8, 0, 0, 4, 1};
    case QUANT_Q8_0: case QUANT_IQ4_NL: return (FN(mat_shape)){8, 0, 1, 7, 1};
    case QUANT_Q4_1: case QUANT_Q5_1: return (FN(mat_shape)){FN(MAT_CHAIN5), 1, 0, 0, 1};
    case QUANT_Q4_K: return (FN(mat_shape)){8, 4, 0, 0, 0};
    case QUANT_Q5_K: return (FN(mat_shape)){FN(MAT_CHAIN5), 4, 0, 0, 0};
    case QUANT_Q2_K: return (FN(mat_shape)){4, 8, 0, 0, 0};
    case QUANT_Q3_K: return (FN(mat_shape)){4, 0, 0, 2, 0};
    case QUANT_Q6_K: return (FN(mat_shape)){4, 0, 0, 5, 0};
    default: return (FN(mat_shape)){4, 0, 1, 7, 0}; /* IQ4_XS */
    }
}

/* Rows at a matrix's end, which fill no tile: each is unpacked by itself, then they are turned; the last is repeated. */
static void FN(mat_fill_any)(FN(mat_tile) *o, const mat_product *p, int64_t row, int64_t slice, FN(mat_shape) s, int blocks) {
    int8_t codes[LANES][256];
    const quant_format *f = p->format;
    quant_block b;
    for (int r = 0; r < LANES; r++) {
        const char *w = p->weights + (size_t)(row + r < p->n_rows ? row + r : p->n_rows - 1) * quant_row_bytes(f, p->act->n) + quant_row_bytes(f, slice * 256);
        if (s.blocks)
            for (int i = 0; i < blocks; i++, w += f->bytes) {
                f->unpack(w, &b);
                memcpy(codes[r] + 32 * i, b.q, 32);
                o->d[i][r] = b.d, o->dmin[i][r] = s.pairs ? b.dmin : 0;
            }
        else {
            f->unpack(w, &b);
            memcpy(codes[r], b.q, 256);
            for (int j = 0; j < 64 / s.chain; j++)
                o->scale[j][r] = MAT_PAIRED ? (b.scale[j * s.chain / 4] & 0xffff) | b.scale[j * s.chain / 4] * 65536 : b.scale[j * s.chain / 4];
            for (int j = 0; j < s.pairs; j++) o->min[j][r] = b.min[j * 16 / s.pairs] | b.min[j * 16 / s.pairs + 8 / s.pairs] << 16;
            o->d[0][r] = b.d, o->dmin[0][r] = b.dmin;
        }
    }
    int offset = MAT_SIGNED || s.pairs || (s.wide && MAT_PAIRED) ? 0 : 1 << s.shift;
    for (int k = 0; k < 8 * blocks; k += 4) {
        FN(mat_four) t = FN(v_turn)((const char *)codes + 4 * k, 256);
        STORE(o->q[k], (V)((FN(mat_bytes))t.a + (uint8_t)offset)), STORE(o->q[k + 1], (V)((FN(mat_bytes))t.b + (uint8_t)offset));
        STORE(o->q[k + 2], (V)((FN(mat_bytes))t.c + (uint8_t)offset)), STORE(o->q[k + 3], (V)((FN(mat_bytes))t.d + (uint8_t)offset));
    }
}

LORCH_INLINE F FN(mat_super_value)(const FN(mat_tile) *w, V dot, const mat_x *x, int pairs) {
    F f = TILE_F(w->d[0]) * FN(f_int)(dot);
    if (!pairs) return f;
    const int16_t *sum = pairs == 8 ? x->u.super.sum16 : x->u.super.sum32;
    V m = {0};
    LORCH_UNROLL for (int i = 0; i < pairs; i++) m = FN(v_pairs)(m, TILE(w->min[i]), FN(v_at)(sum + 2 * i));
    return FN(f_fma)(-TILE_F(w->dmin[0]), FN(f_int)(m), f);
}

/* ---- unpacking LANES rows at once: they are turned first, and their codes then go where the sink says ---- */

/* Into a tile; or, of one token, straight into its sums: `sum` of a superblock, or of a block, which ends in `acc`. */
typedef struct {
    FN(mat_shape) shape;
    FN(mat_tile) *tile; /* with one token, of SUPERBLOCKS: their scales, mins, d and dmin */
    const mat_x *x;     /* NULL: fill the tile */
    const char *next;   /* what is fetched meanwhile: LANES times bytes for each block */
    V even, odd;        /* chains of 32 columns that 16 have gone into */
    V sum;
    F acc, d, dmin;
    int bytes;
} FN(mat_sink);

/* Part i of `parts` of LANES blocks. All fetches at once would hold up the loads, and so the compiler (gcc
 * moves them to the head of a loop) is told that each has to do with the sum that is passed through. */
LORCH_INLINE V FN(mat_fetch_part)(V sum, const char *p, int block, int i, int parts) {
    int lines = (LANES * block + 63) / 64, from = lines * i / parts, to = lines * (i + 1) / parts;
#if LANES >= 8
    LORCH_UNROLL for (int n = from; n < to; n++) __asm__("prefetcht1 %1" : "+v"(sum) : "m"(p[64 * n]));
#else
    for (int n = from; n < to; n++) __builtin_prefetch(p + 64 * n, 0, 2);
#endif
    return sum;
}

LORCH_INLINE F FN(mat_block_value)(F acc, V dot, F d, F dmin, const mat_x *x, int j, int mins) {
    F dx = FN(f_all)(x->u.block.d[j]);
    if (!mins) return FN(f_fma)(FN(f_int)(dot), d * dx, acc);
    return FN(f_fma)(dx, FN(f_fma)(-dmin, FN(f_all)(x->u.block.sum[j]), d * FN(f_int)(dot)), acc);
}

/* Takes the codes of columns 16 * j and on. */
LORCH_INLINE void FN(mat_take)(FN(mat_sink) *o, int j, V a, V b, V c, V d) {
    FN(mat_shape) s = o->shape;
    int each = s.blocks ? 2 : 16;
    if (!o->x) {
        a = FN(mat_fetch_part)(a, o->next, o->bytes, j % each, each);
        STORE(o->tile->q[4 * j], a), STORE(o->tile->q[4 * j + 1], b), STORE(o->tile->q[4 * j + 2], c), STORE(o->tile->q[4 * j + 3], d);
        return;
    }
    int wide = s.wide && MAT_PAIRED, offset = !s.pairs && !wide, odd = !s.blocks && j / 2 % 2;
    const int8_t *q = o->x->q + 16 * j;
    V chain = odd ? o->odd : o->even;
    if (s.chain == 4 || j % 2 == 0) chain = offset && !(s.blocks && j % 2) ? FN(v_start)(o->x->start[s.blocks ? j / 2 : j], s.shift) : (V){0};
    chain = FN(mat_fetch_part)(chain, o->next, o->bytes, j % each, each);
#define DOT(v, n) chain = wide ? FN(v_dot_wide)(chain, v, FN(v_at)(q + 4 * n)) : FN(v_dot)(chain, v, FN(v_at)(q + 4 * n))
    DOT(a, 0), DOT(b, 1), DOT(c, 2), DOT(d, 3);
#undef DOT
    if (s.chain == 8 && j % 2 == 0) {
        if (odd) o->odd = chain;
        else o->even = chain;
        return;
    }
    V scale = TILE(o->tile->scale[s.chain == 8 ? j / 2 : j]), sum = s.blocks && (s.chain == 8 || j % 2 == 0) ? (V){0} : o->sum;
    if (s.blocks) o->sum = wide ? FN(v_summed_wide)(sum, chain) : FN(v_summed)(sum, chain);
    else o->sum = wide ? FN(v_scaled_wide)(sum, chain, scale) : FN(v_scaled)(sum, chain, scale);
    if (s.blocks && j % 2) o->acc = FN(mat_block_value)(o->acc, o->sum, o->d, o->dmin, o->x, j / 2, s.pairs);
}

/* BLOCKS: the scale of block i, and its minimum (negated), before its codes. */
LORCH_INLINE void FN(mat_take_scale)(FN(mat_sink) *o, int i, F d, F dmin) {
    o->d = d, o->dmin = dmin;
    if (o->x) return;
    FN(f_store)(o->tile->d[i], d);
    if (o->shape.pairs) FN(f_store)(o->tile->dmin[i], dmin);
}

/* Codes as the level wants them: v unsigned ones less 1 << shift, or what v stands for in a table of 16 numbers. */
LORCH_INLINE V FN(v_stands_for)(V v, const int8_t *table, FN(mat_shape) s) {
    return FN(v_table)(table, MAT_SIGNED || (s.wide && MAT_PAIRED) ? 0 : (uint8_t)(1 << s.shift), v);
}

LORCH_INLINE void FN(mat_take_nibbles)(FN(mat_sink) *o, int low, int high, FN(mat_four) t, const int8_t *table) {
    FN(mat_shape) s = o->shape;
#define CODE(v) (table ? FN(v_stands_for)(v, table, s) : s.pairs ? (v) : FN(v_codes)(v, s.shift))
    FN(mat_take)(o, low, CODE(FN(v_low)(t.a)), CODE(FN(v_low)(t.b)), CODE(FN(v_low)(t.c)), CODE(FN(v_low)(t.d)));
    FN(mat_take)(o, high, CODE(FN(v_high)(t.a)), CODE(FN(v_high)(t.b)), CODE(FN(v_high)(t.c)), CODE(FN(v_high)(t.d)));
#undef CODE
}

/* The same with a bit above each nibble: bits 4k to 4k + 3 of `high` belong to the k-th four columns. */
LORCH_INLINE void FN(mat_take_fifth)(FN(mat_sink) *o, int j, FN(mat_four) t, V high) {
    FN(mat_shape) s = o->shape;
#define FIFTH(k) ((high >> 4 * (k) & 15) * 0x02040810 & 0x10101010)
#define CODE(v, k) (s.pairs ? (v) | FIFTH(k) : FN(v_codes)((v) | FIFTH(k), s.shift))
    FN(mat_take)(o, j, CODE(FN(v_low)(t.a), 0), CODE(FN(v_low)(t.b), 1), CODE(FN(v_low)(t.c), 2), CODE(FN(v_low)(t.d), 3));
    FN(mat_take)(o, j + 1, CODE(FN(v_high)(t.a), 4), CODE(FN(v_high)(t.b), 5), CODE(FN(v_high)(t.c), 6), CODE(FN(v_high)(t.d), 7));
#undef FIFTH
#undef CODE
}

/* Block i of a row of BLOCKS, at w in the first of the rows; `stride` leads from row to row. */
LORCH_INLINE void FN(mat_take_block)(FN(mat_sink) *o, int type, int i, const char *w, size_t stride) {
    FN(mat_four) h = {{0}, {0}, {0}, {0}}, t, u;
    if (type == QUANT_Q4_1 || type == QUANT_Q5_0 || type == QUANT_Q5_1 || type == QUANT_MXFP4) h = FN(v_turn)(w, stride);
    if (type == QUANT_Q4_1 || type == QUANT_Q5_1) FN(mat_take_scale)(o, i, FN(f_half_low)(h.a), -FN(f_half_low)(h.a >> 16));
    else if (type == QUANT_Q5_0) FN(mat_take_scale)(o, i, FN(f_half_low)(h.a), (F){0});
    else if (type == QUANT_MXFP4) { /* 2^(e - 128): a denormal below 2^-126 */
        V e = h.a & 255, tiny = e < 2;
        FN(mat_take_scale)(o, i, (F)((tiny & FN(v_all)(0x200000) << (e & 1)) | (~tiny & (e - 1) << 23)), (F){0});
    } else FN(mat_take_scale)(o, i, FN(f_halves)(w, stride), (F){0});
    t = FN(v_turn)(w + quant_formats[type].bytes - (type == QUANT_Q8_0 ? 32 : 16), stride);
    switch (type) {
    case QUANT_Q5_0: FN(mat_take_fifth)(o, 2 * i, t, (h.a >> 16 & 0xffff) | h.b << 16); break;
    case QUANT_Q5_1: FN(mat_take_fifth)(o, 2 * i, t, h.b); break;
    case QUANT_Q8_0:
        u = FN(v_turn)(w + 18, stride);
        FN(mat_take)(o, 2 * i, FN(v_wide_codes)(t.a), FN(v_wide_codes)(t.b), FN(v_wide_codes)(t.c), FN(v_wide_codes)(t.d));
        FN(mat_take)(o, 2 * i + 1, FN(v_wide_codes)(u.a), FN(v_wide_codes)(u.b), FN(v_wide_codes)(u.c), FN(v_wide_codes)(u.d));
        break;
    default: FN(mat_take_nibbles)(o, 2 * i, 2 * i + 1, t, type == QUANT_IQ4_NL ? quant_curve : type == QUANT_MXFP4 ? quant_fp4 : NULL);
    }
}

/* Four scales, the bytes of each lane of v, signed; each once or twice. */
LORCH_INLINE void FN(mat_put_scales)(FN(mat_tile) *o, int j, V v, int times) {
    V a = FN(v_scale)(v << 24 >> 24), b = FN(v_scale)(v << 16 >> 24), c = FN(v_scale)(v << 8 >> 24), d = FN(v_scale)(v >> 24);
    j *= times;
    STORE(o->scale[j], a), STORE(o->scale[j + times], b), STORE(o->scale[j + 2 * times], c), STORE(o->scale[j + 3 * times], d);
    if (times == 2) STORE(o->scale[j + 1], a), STORE(o->scale[j + 3], b), STORE(o->scale[j + 5], c), STORE(o->scale[j + 7], d);
}

LORCH_INLINE void FN(mat_put_mins)(FN(mat_tile) *o, int j, V v) { /* four mins, in two pairs */
    STORE(o->min[j], (v & 255) | (v & 0xff00) << 8), STORE(o->min[j + 1], (v >> 16 & 255) | (v >> 8 & 0xff0000));
}

/* The scales, mins, d and dmin of a superblock: see quant_unpack_*. */
LORCH_INLINE void FN(mat_head)(FN(mat_tile) *o, int type, const char *w, size_t stride) {
    FN(mat_four) h;
    int times = type == QUANT_Q5_K ? 8 / FN(MAT_CHAIN5) : 1;
    switch (type) {
    case QUANT_Q4_K: case QUANT_Q5_K:
        h = FN(v_turn)(w, stride);
        FN(mat_put_scales)(o, 0, h.b & 0x3f3f3f3f, times), FN(mat_put_scales)(o, 4, FN(v_low)(h.d) | (h.b >> 2 & 0x30303030), times);
        FN(mat_put_mins)(o, 0, h.c & 0x3f3f3f3f), FN(mat_put_mins)(o, 2, FN(v_high)(h.d) | (h.c >> 2 & 0x30303030));
        FN(f_store)(o->d[0], FN(f_half_low)(h.a)), FN(f_store)(o->dmin[0], FN(f_half_low)(h.a >> 16));
        return;
    case QUANT_Q2_K:
        h = FN(v_turn)(w, stride);
        FN(mat_put_scales)(o, 0, FN(v_low)(h.a), 1), FN(mat_put_scales)(o, 4, FN(v_low)(h.b), 1);
        FN(mat_put_scales)(o, 8, FN(v_low)(h.c), 1), FN(mat_put_scales)(o, 12, FN(v_low)(h.d), 1);
        FN(mat_put_mins)(o, 0, FN(v_high)(h.a)), FN(mat_put_mins)(o, 2, FN(v_high)(h.b));
        FN(mat_put_mins)(o, 4, FN(v_high)(h.c)), FN(mat_put_mins)(o, 6, FN(v_high)(h.d));
        h = FN(v_turn)(w + sizeof(quant_q2_k) - 16, stride);
        FN(f_store)(o->d[0], FN(f_half_low)(h.d)), FN(f_store)(o->dmin[0], FN(f_half_low)(h.d >> 16));
        return;
    case QUANT_Q3_K:
        h = FN(v_turn)(w + offsetof(quant_q3_k, scales) - 4, stride);
#define SIX(low, shift) (V)((FN(mat_bytes))((low) | (h.d >> (shift) & 0x03030303) << 4) - 32)
        FN(mat_put_scales)(o, 0, SIX(FN(v_low)(h.b), 0), 1), FN(mat_put_scales)(o, 4, SIX(FN(v_low)(h.c), 2), 1);
        FN(mat_put_scales)(o, 8, SIX(FN(v_high)(h.b), 4), 1), FN(mat_put_scales)(o, 12, SIX(FN(v_high)(h.c), 6), 1);
#undef SIX
        FN(f_store)(o->d[0], FN(f_halves)(w + offsetof(quant_q3_k, d), stride));
        return;
    case QUANT_IQ4_XS:
        h = FN(v_turn)(w, stride);
        LORCH_UNROLL for (int c = 0; c < 8; c++) {
            V scale = FN(v_scale)(((h.b >> 4 * c & 15) | (h.a >> (16 + 2 * c) & 3) << 4) - 32);
            STORE(o->scale[2 * c], scale), STORE(o->scale[2 * c + 1], scale);
        }
        FN(f_store)(o->d[0], FN(f_half_low)(h.a));
        return;
    default: /* Q6_K */
        h = FN(v_turn)(w + offsetof(quant_q6_k, scales), stride);
        FN(mat_put_scales)(o, 0, h.a, 1), FN(mat_put_scales)(o, 4, h.b, 1), FN(mat_put_scales)(o, 8, h.c, 1), FN(mat_put_scales)(o, 12, h.d, 1);
        FN(f_store)(o->d[0], FN(f_halves)(w + offsetof(quant_q6_k, d), stride));
    }
}

LORCH_INLINE void FN(mat_take_q5_k)(FN(mat_sink) *o, const char *w, size_t stride) { /* as Q4_K, and a fifth bit of h */
    const char *high = w + offsetof(quant_q5_k, high), *low = w + offsetof(quant_q5_k, q);
    const FN(mat_four) h0 = FN(v_turn)(high, stride), h1 = FN(v_turn)(high + 16, stride);
    LORCH_UNROLL for (int i = 0; i < 8; i++) {
        FN(mat_four) t = FN(v_turn)(low + 16 * i, stride), h = i % 2 ? h1 : h0;
#define LOW(f) (FN(v_low)(t.f) | (h.f >> i / 2 * 2 & 0x01010101) << 4)
#define HIGH(f) (FN(v_high)(t.f) | (h.f >> (i / 2 * 2 + 1) & 0x01010101) << 4)
        FN(mat_take)(o, i / 2 * 4 + i % 2, LOW(a), LOW(b), LOW(c), LOW(d));
        FN(mat_take)(o, i / 2 * 4 + i % 2 + 2, HIGH(a), HIGH(b), HIGH(c), HIGH(d));
#undef LOW
#undef HIGH
    }
}

/* Two bits of each weight; of Q3_K a third, in h, and then they are less 4. */
LORCH_INLINE void FN(mat_take_q2_k)(FN(mat_sink) *o, int third, const char *w, size_t stride) {
    LORCH_UNROLL for (int i = 0; i < 4; i++) {
        FN(mat_four) h = {{0}, {0}, {0}, {0}}, t;
        if (third) h = FN(v_turn)(w + i / 2 * 16, stride), t = FN(v_turn)(w + offsetof(quant_q3_k, q) + i % 2 * 32 + i / 2 * 16, stride);
        else t = FN(v_turn)(w + offsetof(quant_q2_k, q) + i % 2 * 32 + i / 2 * 16, stride);
        LORCH_UNROLL for (int c = 0; c < 4; c++) {
            int j = i % 2 * 8 + 2 * c + i / 2;
#define TWO(f) (t.f >> 2 * c & 0x03030303)
#define THREE(f) FN(v_codes)(TWO(f) | (h.f >> (4 * (i % 2) + c) & 0x01010101) << 2, 2)
            if (third) FN(mat_take)(o, j, THREE(a), THREE(b), THREE(c), THREE(d));
            else FN(mat_take)(o, j, TWO(a), TWO(b), TWO(c), TWO(d));
#undef TWO
#undef THREE
        }
    }
}

/* Q6_K: 16 columns in each quarter of half a superblock: the low nibbles of l and m, then the high ones,
 * with two bits each of h above them. */
LORCH_INLINE void FN(mat_take_q6_k)(FN(mat_sink) *o, int i, const char *w, size_t stride) {
    const char *low = w + i / 2 * 64 + i % 2 * 16;
    FN(mat_four) l = FN(v_turn)(low, stride), m = FN(v_turn)(low + 32, stride), h = FN(v_turn)(w + 128 + i * 16, stride);
    int j = i / 2 * 8 + i % 2;
#define TAKE(at, CODE) FN(mat_take)(o, j + at, FN(v_codes)(CODE(a), 5), FN(v_codes)(CODE(b), 5), FN(v_codes)(CODE(c), 5), FN(v_codes)(CODE(d), 5));
#define CODE0(f) FN(v_low)(l.f) | (h.f << 4 & 0x30303030)
#define CODE1(f) FN(v_low)(m.f) | (h.f << 2 & 0x30303030)
#define CODE2(f) FN(v_high)(l.f) | (h.f & 0x30303030)
#define CODE3(f) FN(v_high)(m.f) | (h.f >> 2 & 0x30303030)
    TAKE(0, CODE0) TAKE(2, CODE1) TAKE(4, CODE2) TAKE(6, CODE3)
#undef TAKE
#undef CODE0
#undef CODE1
#undef CODE2
#undef CODE3
}

LORCH_INLINE void FN(mat_take_super)(FN(mat_sink) *o, int type, const char *w, size_t stride) { /* after mat_head */
    switch (type) {
    case QUANT_Q2_K: FN(mat_take_q2_k)(o, 0, w, stride); break;
    case QUANT_Q3_K: FN(mat_take_q2_k)(o, 1, w, stride); break;
    case QUANT_Q5_K: FN(mat_take_q5_k)(o, w, stride); break;
    case QUANT_Q4_K: /* 16 bytes: 16 weights in low nibbles, and those 32 further on in high ones */
        LORCH_UNROLL for (int i = 0; i < 8; i++)
            FN(mat_take_nibbles)(o, i / 2 * 4 + i % 2, i / 2 * 4 + i % 2 + 2, FN(v_turn)(w + offsetof(quant_q4_k, q) + 16 * i, stride), NULL);
        break;
    case QUANT_IQ4_XS:
        LORCH_UNROLL for (int i = 0; i < 8; i++)
            FN(mat_take_nibbles)(o, 2 * i, 2 * i + 1, FN(v_turn)(w + offsetof(quant_iq4_xs, q) + 16 * i, stride), quant_curve);
        break;
    default:; /* Q6_K; gcc 11 takes no pragma right after a label */
        LORCH_UNROLL for (int i = 0; i < 4; i++) FN(mat_take_q6_k)(o, i, w, stride);
    }
}

/* Unpacks 256 columns, or the first `blocks` BLOCKS of them, and fetches as many bytes from `next` on. */
LORCH_INLINE void FN(mat_fill)(int type, FN(mat_tile) *to, const char *w, const char *next, size_t stride, int blocks) {
    int bytes = quant_formats[type].bytes;
    FN(mat_sink) o = {FN(mat_shape_of)(type), to, NULL, next, {0}, {0}, {0}, {0}, {0}, {0}, bytes};
    if (o.shape.blocks)
        for (int i = 0; i < blocks; i++, w += bytes, o.next += LANES * bytes) FN(mat_take_block)(&o, type, i, w, stride);
    else FN(mat_head)(to, type, w, stride), FN(mat_take_super)(&o, type, w, stride);
}

/* The products of LANES rows with one token, in registers. `next` is fetched meanwhile: in a straight line and as
 * many bytes, a block's share with each block, for memory is fastest so. */
LORCH_INLINE F FN(mat_one)(int type, const char *w, const char *next, size_t stride, const mat_x *x, int64_t n) {
    int bytes = quant_formats[type].bytes;
    FN(mat_tile) head;
    FN(mat_sink) o = {FN(mat_shape_of)(type), &head, x, next, {0}, {0}, {0}, {0}, {0}, {0}, bytes};
    if (o.shape.blocks)
        for (int64_t b = 0; b < n / 32; b++, w += bytes, o.next += LANES * bytes) {
            o.x = x + b / 8;
            FN(mat_take_block)(&o, type, (int)(b % 8), w, stride);
        }
    else
        for (int64_t b = 0; b < n / 256; b++, w += bytes, o.next += LANES * bytes, o.x++) {
            FN(mat_head)(&head, type, w, stride);
            o.sum = (V){0};
            FN(mat_take_super)(&o, type, w, stride);
            o.acc = FN(f_fma)(FN(f_all)(o.x->u.super.d), FN(mat_super_value)(&head, o.sum, o.x, o.shape.pairs), o.acc);
        }
    return o.acc;
}

/* ---- micro-kernels: two tiles against up to six tokens. gcc keeps named sums in registers, arrays not ---- */

#define EVERY(S) S(0) S(1) S(2) S(3) S(4) S(5)
#define EACH(S) \
    { S(0) } if (tokens > 1) { S(1) } if (tokens > 2) { S(2) } if (tokens > 3) { S(3) } if (tokens > 4) { S(4) } if (tokens > 5) { S(5) }

LORCH_INLINE void FN(mat_super)(int tokens, FN(mat_shape) s, const FN(mat_tile) *w, const mat_x *x, float *c) {
    const FN(mat_tile) *v = w + 1;
    int wide = s.wide && MAT_PAIRED, offset = !s.pairs && !wide;
#define S(t) V i##t = {0}, k##t = {0}, a##t = {0}, b##t = {0};
    EVERY(S)
#undef S
    for (int j = 0; j < 64 / s.chain; j++) {
#define S(t) a##t = b##t = offset ? FN(v_start)(x[t].start[j], s.shift) : (V){0};
        EACH(S)
#undef S
        LORCH_UNROLL for (int n = 0; n < s.chain; n++) {
            V p = TILE(w->q[j * s.chain + n]), q = TILE(v->q[j * s.chain + n]), y;
#define S(t) \
    y = FN(v_at)(x[t].q + 4 * (j * s.chain + n)); \
    KEEP(y); \
    a##t = wide ? FN(v_dot_wide)(a##t, p, y) : FN(v_dot)(a##t, p, y), b##t = wide ? FN(v_dot_wide)(b##t, q, y) : FN(v_dot)(b##t, q, y);
            EACH(S)
#undef S
        }
        V p = TILE(w->scale[j]), q = TILE(v->scale[j]);
#define S(t) \
    i##t = wide ? FN(v_scaled_wide)(i##t, a##t, p) : FN(v_scaled)(i##t, a##t, p); \
    k##t = wide ? FN(v_scaled_wide)(k##t, b##t, q) : FN(v_scaled)(k##t, b##t, q);
        EACH(S)
#undef S
    }
#define S(t) \
    float *e = c + t * MAT_ROWS; \
    F d = FN(f_all)(x[t].u.super.d); \
    FN(f_store)(e, FN(f_fma)(d, FN(mat_super_value)(w, i##t, x + t, s.pairs), FN(f_load)(e))); \
    FN(f_store)(e + LANES, FN(f_fma)(d, FN(mat_super_value)(v, k##t, x + t, s.pairs), FN(f_load)(e + LANES)));
    EACH(S)
#undef S
}

LORCH_INLINE void FN(mat_block)(int tokens, FN(mat_shape) s, int blocks, const FN(mat_tile) *w, const mat_x *x, float *c) {
    const FN(mat_tile) *v = w + 1;
    int wide = s.wide && MAT_PAIRED, offset = !s.pairs && !wide;
#define S(t) V i##t = {0}, k##t = {0}, a##t = {0}, b##t = {0}; F f##t = {0}, g##t = {0};
    EVERY(S)
#undef S
#define S(t) f##t = FN(f_load)(c + t * MAT_ROWS), g##t = FN(f_load)(c + t * MAT_ROWS + LANES);
    EACH(S)
#undef S
    for (int j = 0; j < blocks; j++) {
#define S(t) i##t = k##t = (V){0};
        EACH(S)
#undef S
        for (int h = 0; h < 8 / s.chain; h++) {
#define S(t) a##t = b##t = offset ? FN(v_start)(x[t].start[j], s.shift) : (V){0};
            EACH(S)
#undef S
            LORCH_UNROLL for (int n = 0; n < s.chain; n++) {
                int at = 8 * j + s.chain * h + n;
                V p = TILE(w->q[at]), q = TILE(v->q[at]), y;
#define S(t) \
    y = FN(v_at)(x[t].q + 4 * at); \
    KEEP(y); \
    a##t = wide ? FN(v_dot_wide)(a##t, p, y) : FN(v_dot)(a##t, p, y), b##t = wide ? FN(v_dot_wide)(b##t, q, y) : FN(v_dot)(b##t, q, y);
                EACH(S)
#undef S
            }
#define S(t) \
    i##t = wide ? FN(v_summed_wide)(i##t, a##t) : FN(v_summed)(i##t, a##t); \
    k##t = wide ? FN(v_summed_wide)(k##t, b##t) : FN(v_summed)(k##t, b##t);
            EACH(S)
#undef S
        }
        F d = TILE_F(w->d[j]), e = TILE_F(v->d[j]), dm = s.pairs ? TILE_F(w->dmin[j]) : d, em = s.pairs ? TILE_F(v->dmin[j]) : e;
#define S(t) f##t = FN(mat_block_value)(f##t, i##t, d, dm, x + t, j, s.pairs), g##t = FN(mat_block_value)(g##t, k##t, e, em, x + t, j, s.pairs);
        EACH(S)
#undef S
    }
#define S(t) FN(f_store)(c + t * MAT_ROWS, f##t), FN(f_store)(c + t * MAT_ROWS + LANES, g##t);
    EACH(S)
#undef S
}

typedef struct { /* one slice of columns: all tokens meet all tiles */
    FN(mat_tile) *tile; /* [tiles], an even number */
    float *c;           /* [n_tok][MAT_ROWS] */
    const mat_x *x;     /* [n_tok] */
    const char *line;   /* few tokens: memory sets the pace, and is fastest in a straight line, fetched while tiles are filled. Or NULL */
    const char *ahead;  /* many: the rows' next blocks, fetched while tokens pass: ahead_bytes of each, stride apart. Or NULL */
    size_t stride;
    int tiles, n_tok, blocks, shift, ahead_bytes;
} FN(mat_pass);

LORCH_INLINE void FN(mat_fetch)(const char *p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* While tokens from t on pass tiles i and i + 1: their share of the rows, for a burst would hold up the loads. */
LORCH_INLINE void FN(mat_fetch_rows)(const FN(mat_pass) *p, int t, int tokens, int i) {
    int rows = p->ahead ? p->tiles * LANES : 0, from = t * p->tiles + i * tokens, all = p->n_tok * p->tiles;
    for (int r = rows * from / all; r < rows * (from + 2 * tokens) / all; r++) FN(mat_fetch)(p->ahead + (size_t)r * p->stride, p->ahead_bytes);
}

LORCH_INLINE void FN(mat_sweep)(const FN(mat_pass) *p, FN(mat_shape) s) {
    s.shift = p->shift; /* formats that differ in it alone share a sweep */
#define SWEEP(tokens) \
    for (int i = 0; i < p->tiles; i += 2) { \
        FN(mat_fetch_rows)(p, t, tokens, i); \
        if (!s.blocks) FN(mat_super)(tokens, s, p->tile + i, p->x + t, p->c + t * MAT_ROWS + i * LANES); \
        else FN(mat_block)(tokens, s, p->blocks, p->tile + i, p->x + t, p->c + t * MAT_ROWS + i * LANES); \
    }
    int t = 0;
    for (; t + FN(MAT_TOKENS) <= p->n_tok && (LANES < 16 || p->n_tok - t != 8); t += FN(MAT_TOKENS)) SWEEP(FN(MAT_TOKENS))
    if (LANES == 16) for (; t + 4 <= p->n_tok; t += 4) SWEEP(4)
    for (; t + 2 <= p->n_tok; t += 2) SWEEP(2)
    for (; t < p->n_tok; t++) SWEEP(1)
#undef SWEEP
}

#define FORMATS \
    FORMAT(Q4_0) FORMAT(Q4_1) FORMAT(Q5_0) FORMAT(Q5_1) FORMAT(Q8_0) FORMAT(IQ4_NL) FORMAT(MXFP4) \
    FORMAT(Q2_K) FORMAT(Q3_K) FORMAT(Q4_K) FORMAT(Q5_K) FORMAT(Q6_K) FORMAT(IQ4_XS)
#define FORMAT(T) \
    static __attribute__((noinline)) void FN(mat_fill_##T)(FN(mat_tile) *to, const char *w, const char *next, size_t stride, int blocks) { \
        FN(mat_fill)(QUANT_##T, to, w, next, stride, blocks); \
    }
FORMATS
#undef FORMAT
#if MAT_DOT != MAT_PLAIN
#define FORMAT(T) \
    static __attribute__((noinline)) F FN(mat_one_##T)(const char *w, const char *next, size_t stride, const mat_x *x, int64_t n) { \
        return FN(mat_one)(QUANT_##T, w, next, stride, x, n); \
    }
FORMATS
#undef FORMAT
#endif
#undef FORMATS

/* A sweep for each shape: BLOCKS plain, with wide codes, with mins; SUPERBLOCKS of 32 with mins, of 16 plain, ... */
#define SWEEP(name, T) static __attribute__((noinline)) void FN(mat_sweep_##name)(const FN(mat_pass) *p) { FN(mat_sweep)(p, FN(mat_shape_of)(QUANT_##T)); }
SWEEP(b, Q4_0) SWEEP(b_mins, Q4_1) SWEEP(k4, Q4_K) SWEEP(k2, Q2_K) SWEEP(k6, Q6_K)
#if MAT_PAIRED /* elsewhere wide codes and those of 5 bits go like others */
SWEEP(b_wide, Q8_0) SWEEP(k5, Q5_K) SWEEP(k_wide, IQ4_XS)
#define IF_PAIRED(a, b) a
#else
#define IF_PAIRED(a, b) b
#endif
#undef SWEEP

typedef struct { /* what is specialised for a format, or for the shape of its blocks */
    void (*fill)(FN(mat_tile) *to, const char *w, const char *next, size_t stride, int blocks);
    F (*one)(const char *w, const char *next, size_t stride, const mat_x *x, int64_t n);
    void (*sweep)(const FN(mat_pass) *p);
} FN(mat_routines);

static const FN(mat_routines) FN(mat_routines_of)[QUANT_TYPES] = {
#if MAT_DOT == MAT_PLAIN /* one token goes over the tile there: its sums would be long code and hardly faster */
#define ROW(T, sweep) [QUANT_##T] = {FN(mat_fill_##T), NULL, FN(sweep)}
#else
#define ROW(T, sweep) [QUANT_##T] = {FN(mat_fill_##T), FN(mat_one_##T), FN(sweep)}
#endif
    ROW(Q4_0, mat_sweep_b), ROW(Q5_0, mat_sweep_b), ROW(MXFP4, mat_sweep_b), ROW(Q4_1, mat_sweep_b_mins), ROW(Q5_1, mat_sweep_b_mins),
    ROW(Q8_0, IF_PAIRED(mat_sweep_b_wide, mat_sweep_b)), ROW(IQ4_NL, IF_PAIRED(mat_sweep_b_wide, mat_sweep_b)),
    ROW(Q2_K, mat_sweep_k2), ROW(Q3_K, mat_sweep_k6), ROW(Q4_K, mat_sweep_k4), ROW(Q5_K, IF_PAIRED(mat_sweep_k5, mat_sweep_k4)),
    ROW(Q6_K, mat_sweep_k6), ROW(IQ4_XS, IF_PAIRED(mat_sweep_k_wide, mat_sweep_k6))
#undef ROW
#undef IF_PAIRED
};

/* Unpacks the slice for the rows from `row` on, and lets all tokens pass over it. Without a line, filling a tile fetches itself. */
static void FN(mat_slice)(FN(mat_pass) *o, const mat_product *p, int64_t row, int64_t slice) {
    int type = (int)(p->format - quant_formats);
    FN(mat_shape) s = FN(mat_shape_of)(type);
    size_t stride = quant_row_bytes(p->format, p->act->n);
    const char *w = p->weights + (size_t)row * stride + quant_row_bytes(p->format, slice * 256);
    for (int i = 0; i < o->tiles; i++, w += LANES * stride)
        if (row + (i + 1) * LANES <= p->n_rows) FN(mat_routines_of)[type].fill(o->tile + i, w, o->line ? o->line + i * LANES * o->ahead_bytes : w, stride, o->blocks);
        else FN(mat_fill_any)(o->tile + i, p, row + i * LANES, slice, s, o->blocks);
    o->shift = s.shift;
    FN(mat_routines_of)[type].sweep(o);
}

/* One token. Rows that fill no vector go over the tile. Returns 0 if it does not take them. */
static int FN(mat_single)(const mat_product *p, int64_t row, int tiles, const char *ahead, float *c) {
    int type = (int)(p->format - quant_formats);
    size_t stride = quant_row_bytes(p->format, p->act->n);
    const char *w = p->weights + (size_t)row * stride;
    if (!FN(mat_routines_of)[type].one || p->act->n_tok != 1 || row + tiles * LANES > p->n_rows) return 0;
    for (int i = 0; i < tiles; i++, w += LANES * stride) {
        const char *next = i + 1 < tiles || !ahead ? w + LANES * stride : ahead;
        FN(f_store)(c + i * LANES, FN(mat_routines_of)[type].one(w, next, stride, p->format->kind == QUANT_BLOCKS ? p->act->blocks : p->act->super, p->act->n));
    }
    return 1;
}

/* ---- products of floats, for weights and in attention ---- */

/* c[t][j] += a[t][k] * b[k][j] over k in order; j in `vectors` vectors, t < tokens; b in half floats if `half`. */
LORCH_INLINE void FN(mat_outer_tile)(int tokens, int vectors, int half, const float *a, int64_t lda,
                                      const char *b, int64_t ldb, int n_k, float *c, int64_t ldc) {
#define S(t) F c0##t = {0}, c1##t = {0}, c2##t = {0}, c3##t = {0};
    EVERY(S)
#undef S
#define S(t) \
    c0##t = FN(f_load)(c + t * ldc); \
    if (vectors > 1) c1##t = FN(f_load)(c + t * ldc + LANES); \
    if (vectors > 2) c2##t = FN(f_load)(c + t * ldc + 2 * LANES), c3##t = FN(f_load)(c + t * ldc + 3 * LANES);
    EACH(S)
#undef S
    for (int k = 0; k < n_k; k++, b += ldb * (half ? 2 : 4)) {
#define B(i) (half ? FN(f_half)(b + 2 * i * LANES) : FN(f_load)(b + 4 * i * LANES))
        F b0 = B(0), b1 = vectors > 1 ? B(1) : b0, b2 = vectors > 2 ? B(2) : b0, b3 = vectors > 2 ? B(3) : b0;
#undef B
#define S(t) \
    F y = FN(f_all)(a[t * lda + k]); \
    c0##t = FN(f_fma)(b0, y, c0##t); \
    if (vectors > 1) c1##t = FN(f_fma)(b1, y, c1##t); \
    if (vectors > 2) c2##t = FN(f_fma)(b2, y, c2##t), c3##t = FN(f_fma)(b3, y, c3##t);
        EACH(S)
#undef S
    }
#define S(t) \
    FN(f_store)(c + t * ldc, c0##t); \
    if (vectors > 1) FN(f_store)(c + t * ldc + LANES, c1##t); \
    if (vectors > 2) FN(f_store)(c + t * ldc + 2 * LANES, c2##t), FN(f_store)(c + t * ldc + 3 * LANES, c3##t);
    EACH(S)
#undef S
}

static float FN(mat_outer_one)(int half, const float *a, const char *b, int64_t ldb, int n_k, float c) { /* one column's sum */
    F sum = FN(f_all)(c);
    for (int k = 0; k < n_k; k++, b += ldb * (half ? 2 : 4)) {
        float f = half ? num_from_f16(*(const uint16_t *)(const void *)b) : *(const float *)(const void *)b;
        sum = FN(f_fma)(FN(f_all)(f), FN(f_all)(a[k]), sum);
    }
    return sum[0];
}

enum { FN(MAT_VECTORS) = LANES == 16 ? 4 : LANES == 8 ? 2 : MAT_DOT == MAT_PLAIN ? 1 : 4 };

/* The same for any number of tokens and of columns; those that fill no vector go one by one. */
LORCH_INLINE void FN(mat_outer)(int half, int n_tok, int columns, const float *a, int64_t lda,
                                 const char *b, int64_t ldb, int n_k, float *c, int64_t ldc) {
    enum { PANEL = FN(MAT_VECTORS) * LANES, TOKENS = LANES == 16 || LANES == 8 ? 6 : 4 };
    int size = half ? 2 : 4;
    for (int t = 0; t < n_tok;) {
        int left = n_tok - t, step = left >= TOKENS ? TOKENS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        int64_t j = 0;
        const float *at = a + t * lda;
        float *ct = c + t * ldc;
#define OUTER(tokens, vectors) FN(mat_outer_tile)(tokens, vectors, half, at, lda, b + j * size, ldb, n_k, ct + j, ldc)
        for (; j + PANEL <= columns; j += PANEL)
            if (step == TOKENS) OUTER(TOKENS, FN(MAT_VECTORS));
            else if (step == 4) OUTER(4, FN(MAT_VECTORS));
            else if (step == 2) OUTER(2, FN(MAT_VECTORS));
            else OUTER(1, FN(MAT_VECTORS));
        for (; j < columns / LANES * LANES; j += LANES)
            for (int i = 0; i < step; i++) FN(mat_outer_tile)(1, 1, half, at + i * lda, lda, b + j * size, ldb, n_k, ct + i * ldc + j, ldc);
#undef OUTER
        for (j = columns / LANES * LANES; j < columns; j++)
            for (int i = 0; i < step; i++) ct[i * ldc + j] = FN(mat_outer_one)(half, at + i * lda, b + j * size, ldb, n_k, ct[i * ldc + j]);
        t += step;
    }
}

static __attribute__((noinline)) void FN(mat_outer_floats)(int n_tok, int columns, const float *a, int64_t lda,
                                                            const float *b, int64_t ldb, int n_k, float *c, int64_t ldc) {
    FN(mat_outer)(0, n_tok, columns, a, lda, (const char *)b, ldb, n_k, c, ldc);
}
static __attribute__((noinline)) void FN(mat_outer_halves)(int n_tok, int columns, const float *a, int64_t lda,
                                                            const uint16_t *b, int64_t ldb, int n_k, float *c, int64_t ldc) {
    FN(mat_outer)(1, n_tok, columns, a, lda, (const char *)b, ldb, n_k, c, ldc);
}

/* Turns n columns of LANES rows: to[k][0..LANES), of a row of `to` with MAT_ROWS. Rows past the end repeat the last. */
LORCH_INLINE void FN(mat_turn_floats)(float *to, const mat_product *p, int64_t row, int64_t from, int n, const quant_format *f) {
    size_t stride = (size_t)p->act->n * f->bytes;
    const char *w = p->weights + (size_t)row * stride + (size_t)from * f->bytes;
    int k = 0, step = 16 / f->bytes;
    if (row + LANES <= p->n_rows)
        for (; k + step <= n; k += step) {
            FN(mat_four) t = FN(v_turn)(w + k * f->bytes, stride);
#define PUT(i, v) FN(f_store)(to + (k + i) * MAT_ROWS, v)
#define PUT2(i, v) \
    if (f == &quant_formats[QUANT_F16]) PUT(i, FN(f_half_low)(v)), PUT(i + 1, FN(f_half_low)((V)(v) >> 16)); \
    else PUT(i, (F)((v) << 16)), PUT(i + 1, (F)((v) & (int32_t)0xffff0000));
            if (step == 4) PUT(0, (F)t.a), PUT(1, (F)t.b), PUT(2, (F)t.c), PUT(3, (F)t.d);
            else {
                PUT2(0, t.a) PUT2(2, t.b) PUT2(4, t.c) PUT2(6, t.d)
            }
#undef PUT
#undef PUT2
        }
    for (; k < n; k++)
        for (int r = 0; r < LANES; r++) {
            int64_t beyond = row + r - p->n_rows + 1;
            to[k * MAT_ROWS + r] = quant_load_float(f, w + (beyond > 0 ? r - beyond : r) * (int64_t)stride, k);
        }
}

LORCH_INLINE void FN(mat_floats_slice)(const mat_product *p, int64_t row, int tiles, float *turned, float *c, int64_t from, const quant_format *f) {
    int n = p->act->n - from < MAT_SLICE ? (int)(p->act->n - from) : MAT_SLICE;
    for (int i = 0; i < tiles; i++) FN(mat_turn_floats)(turned + i * LANES, p, row + i * LANES, from, n, f);
    FN(mat_outer_floats)(p->act->n_tok, tiles * LANES, p->act->x + from, p->act->n, turned, MAT_ROWS, n, c, MAT_ROWS);
}

static void FN(mat_multiply_floats)(const mat_product *p, int64_t row, int tiles, float *turned, float *c) {
    for (int64_t from = 0; from < p->act->n; from += MAT_SLICE) switch ((int)(p->format - quant_formats)) {
        case QUANT_F32: FN(mat_floats_slice)(p, row, tiles, turned, c, from, &quant_formats[QUANT_F32]); break;
        case QUANT_F16: FN(mat_floats_slice)(p, row, tiles, turned, c, from, &quant_formats[QUANT_F16]); break;
        default: FN(mat_floats_slice)(p, row, tiles, turned, c, from, &quant_formats[QUANT_BF16]); break;
        }
}

/* Some columns of one token against two tiles: two sums, which hide each other's latency. */
LORCH_INLINE void FN(mat_one_columns)(F *a, F *b, FN(mat_four) t, FN(mat_four) u, const float *x, const quant_format *f) {
#define ONE(i, y, z) *a = FN(f_fma)(y, FN(f_all)(x[i]), *a), *b = FN(f_fma)(z, FN(f_all)(x[i]), *b)
#define TWO(i, g) \
    if (f == &quant_formats[QUANT_F32]) ONE(i / 2, (F)t.g, (F)u.g); \
    else if (f == &quant_formats[QUANT_F16]) ONE(i, FN(f_half_low)(t.g), FN(f_half_low)(u.g)), ONE(i + 1, FN(f_half_low)(t.g >> 16), FN(f_half_low)(u.g >> 16)); \
    else ONE(i, (F)(t.g << 16), (F)(u.g << 16)), ONE(i + 1, (F)(t.g & (int32_t)0xffff0000), (F)(u.g & (int32_t)0xffff0000));
    TWO(0, a) TWO(2, b) TWO(4, c) TWO(6, d)
#undef ONE
#undef TWO
}

/* One token against two tiles. Rows often lie a power of two apart, so that their lines push each other out of the
 * level-1 cache: each line is read once, into a copy, and turned from there. */
LORCH_INLINE void FN(mat_one_floats)(const mat_product *p, int64_t row, const char *next, float *c, const quant_format *f) {
    char line[2 * LANES][64] __attribute__((aligned(64)));
    size_t stride = (size_t)p->act->n * f->bytes;
    const char *w = p->weights + (size_t)row * stride;
    int step = 64 / f->bytes;
    F a = {0}, b = {0};
    int64_t k = 0;
    for (; k + step <= p->act->n; k += step, w += 64, next += sizeof line) {
        for (int r = 0; r < 2 * LANES; r++) memcpy(line[r], w + (size_t)r * stride, 64);
        LORCH_UNROLL for (int i = 0; i < 4; i++) {
            a = (F)FN(mat_fetch_part)((V)a, next, 2 * 64, i, 4);
            FN(mat_one_columns)(&a, &b, FN(v_turn)(line[0] + 16 * i, 64), FN(v_turn)(line[LANES] + 16 * i, 64), p->act->x + k + step / 4 * i, f);
        }
    }
    FN(f_store)(c, a), FN(f_store)(c + LANES, b);
    for (; k < p->act->n; k++)
        for (int r = 0; r < 2 * LANES; r++)
            c[r] = FN(f_fma)(FN(f_all)(quant_load_float(f, p->weights + (size_t)(row + r) * stride, k)), FN(f_all)(p->act->x[k]), FN(f_all)(c[r]))[0];
}

static int FN(mat_single_floats)(const mat_product *p, int64_t row, int tiles, const char *ahead, float *c) { /* 0: not taken */
    size_t stride = quant_row_bytes(p->format, p->act->n);
    if (p->act->n_tok != 1 || row + tiles * LANES > p->n_rows) return 0;
    for (int i = 0; i < tiles; i += 2, c += 2 * LANES) {
        const char *next = i + 2 < tiles || !ahead ? p->weights + (size_t)(row + (i + 2) * LANES) * stride : ahead;
        switch ((int)(p->format - quant_formats)) {
        case QUANT_F32: FN(mat_one_floats)(p, row + i * LANES, next, c, &quant_formats[QUANT_F32]); break;
        case QUANT_F16: FN(mat_one_floats)(p, row + i * LANES, next, c, &quant_formats[QUANT_F16]); break;
        default: FN(mat_one_floats)(p, row + i * LANES, next, c, &quant_formats[QUANT_BF16]); break;
        }
    }
    return 1;
}

/* Scratch: the sums, [n_tok][MAT_ROWS], then the tiles. Tiles go by pairs, so a last one may be idle. */
static void FN(mat_multiply)(const mat_product *p, int64_t row, int rows, const char *ahead, void *scratch) {
    const mat_act *a = p->act;
    float *c = scratch;
    FN(mat_tile) *tile = (FN(mat_tile) *)(void *)(c + (size_t)a->n_tok * MAT_ROWS);
    int tiles = (rows + 2 * LANES - 1) / (2 * LANES) * 2;
    memset(c, 0, (size_t)a->n_tok * MAT_ROWS * sizeof(float));
    if (p->format->kind == QUANT_FLOATS) {
        if (!FN(mat_single_floats)(p, row, tiles, ahead, c)) FN(mat_multiply_floats)(p, row, tiles, (float *)(void *)tile, c);
    } else {
        const mat_x *x = p->format->kind == QUANT_BLOCKS ? a->blocks : a->super;
        for (int64_t slice = FN(mat_single)(p, row, tiles, ahead, c) ? a->n : 0; slice * 256 < a->n; slice++) {
            int64_t left = (a->n - slice * 256) / 32;
            int bytes = 256 / p->format->block * p->format->bytes, few = a->n_tok <= MAT_FEW;
            size_t stride = quant_row_bytes(p->format, a->n);
            const char *line = (ahead ? ahead : p->weights + (size_t)(row + rows) * stride) + (size_t)(slice * tiles * LANES) * (size_t)bytes;
            const char *next = left > 8 ? p->weights + (size_t)row * stride + (size_t)(slice + 1) * (size_t)bytes : ahead;
            FN(mat_pass) pass = {tile, c, x + slice * a->n_tok, few ? line : NULL, few ? NULL : next, stride, tiles, a->n_tok, left < 8 ? (int)left : 8, 0, bytes};
            FN(mat_slice)(&pass, p, row, slice);
        }
    }
    for (int t = 0; t < a->n_tok; t++) memcpy(p->out + t * p->n_rows + row, c + t * MAT_ROWS, (size_t)rows * sizeof(float));
}

/* ---- activations ---- */

LORCH_INLINE void FN(mat_quantise_blocks)(mat_x *o, const float *x, int blocks) {
    for (int i = 0; i < blocks; i++) {
        const int8_t *q = o->q + 32 * i;
        quant_activations(x + 32 * i, 32, o->q + 32 * i, &o->u.block.d[i]);
        int even = 0, odd = 0;
        for (int j = 0; j < 32; j++) even += j & 2 ? 0 : q[j], odd += j & 2 ? q[j] : 0;
        o->u.block.sum[i] = (float)(even + odd);
        o->start[i] = MAT_PAIRED ? (-even & 0xffff) | -odd * 65536 : -(even + odd);
    }
}

LORCH_INLINE void FN(mat_quantise_super)(mat_x *o, const float *x) {
    quant_activations(x, 256, o->q, &o->u.super.d);
    for (int i = 0; i < 16; i++) {
        const int8_t *q = o->q + 16 * i;
        int even = 0, odd = 0;
        for (int j = 0; j < 16; j++) even += j & 2 ? 0 : q[j], odd += j & 2 ? q[j] : 0;
        o->u.super.sum16[i] = (int16_t)(even + odd);
        o->start[i] = MAT_PAIRED ? (-even & 0xffff) | -odd * 65536 : -(even + odd);
    }
    for (int i = 0; i < 8; i++) o->u.super.sum32[i] = (int16_t)(o->u.super.sum16[2 * i] + o->u.super.sum16[2 * i + 1]);
}

static void FN(mat_quantise)(mat_act *a, unsigned kinds, int t) {
    const float *x = a->x + t * a->n;
    if (kinds >> QUANT_BLOCKS & 1)
        for (int64_t i = 0; i < a->n / 32; i += 8)
            FN(mat_quantise_blocks)(a->blocks + i / 8 * a->n_tok + t, x + 32 * i, a->n / 32 - i < 8 ? (int)(a->n / 32 - i) : 8);
    if (kinds >> QUANT_SUPERBLOCKS & 1)
        for (int64_t i = 0; i < a->n / 256; i++) FN(mat_quantise_super)(a->super + i * a->n_tok + t, x + 256 * i);
}

/* ---- vectors ---- */

LORCH_INLINE float FN(mat_tree)(float part[16]) { /* the fixed tree of the 16 partial sums */
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) part[i] += part[i + w];
    return part[0];
}

/* exp(x) within 2 units in the last place (Cephes' expf, with fused steps), x clamped so that the result
 * is a normal number: n = round(x / ln 2), r = x - n ln 2, then a polynomial and the exponent n. */
LORCH_INLINE F FN(f_exp)(F x) {
    x = FN(f_min)(FN(f_all)(88.0f), FN(f_max)(FN(f_all)(-87.0f), x)); /* the bounds first: a NaN passes */
    F shifted = FN(f_fma)(x, FN(f_all)(1.44269504088896341f), FN(f_all)(12582912.0f)), n = shifted - 12582912.0f;
    F r = FN(f_fma)(n, FN(f_all)(-0.693359375f), x);
    r = FN(f_fma)(n, FN(f_all)(2.12194440e-4f), r);
    F p = FN(f_fma)(FN(f_all)(1.9875691500e-4f), r, FN(f_all)(1.3981999507e-3f));
    p = FN(f_fma)(p, r, FN(f_all)(8.3334519073e-3f));
    p = FN(f_fma)(p, r, FN(f_all)(4.1665795894e-2f));
    p = FN(f_fma)(p, r, FN(f_all)(1.6666665459e-1f));
    p = FN(f_fma)(p, r, FN(f_all)(5.0000001201e-1f));
    p = FN(f_fma)(p, r * r, r) + 1.0f;
    return p * (F)(((V)shifted - 0x4b400000 + 127) << 23);
}

LORCH_INLINE F FN(f_tanh)(F x) { return 1.0f - 2.0f / (FN(f_exp)(x + x) + 1.0f); }

static void FN(mat_rms_norm)(float *out, const float *x, const float *w, int n, float eps) {
    F sum[16 / LANES];
    float part[16];
    int i = 0;
    for (int j = 0; j < 16 / LANES; j++) sum[j] = (F){0};
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16 / LANES; j++) {
            F y = FN(f_load)(x + i + j * LANES);
            sum[j] = FN(f_fma)(y, y, sum[j]);
        }
    memcpy(part, sum, sizeof part);
    for (int j = 0; i + j < n; j++) part[j] = FN(f_fma)(FN(f_all)(x[i + j]), FN(f_all)(x[i + j]), FN(f_all)(part[j]))[0];
    float scale = 1.0f / sqrtf(FN(mat_tree)(part) / (float)n + eps);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * w[i];
}

static void FN(mat_layer_norm)(float *out, const float *x, const float *w, int n, float eps) {
    float part[16] = {0}, square[16] = {0}; /* as in rms_norm, in 16 parts */
    for (int i = 0; i < n; i++) part[i % 16] += x[i];
    float mean = FN(mat_tree)(part) / (float)n;
    for (int i = 0; i < n; i++) square[i % 16] += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / sqrtf(FN(mat_tree)(square) / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * w[i];
}

/* Rotates pairs of x by the token's angles: pair i is (2i, 2i+1), or (i, i + n_rot/2) if pairs_apart. */
static void FN(mat_rope)(float *x, const float *cos_sin, int n_rot, int pairs_apart) {
    int half = n_rot / 2, step = pairs_apart ? 1 : 2, other = pairs_apart ? half : 1;
    for (int i = 0; i < half; i++) {
        float *p = x + i * step, a = p[0], b = p[other], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        p[0] = a * c - b * s;
        p[other] = a * s + b * c;
    }
}

/* The last elements of an array, fewer than LANES, in a vector of zeros. */
LORCH_INLINE F FN(f_tail)(const float *p, int64_t n) {
    float f[LANES] = {0};
    memcpy(f, p, (size_t)n * sizeof(float));
    return FN(f_load)(f);
}

/* The next of n floats, as many as there are up to LANES; and back. */
LORCH_INLINE F FN(f_take)(const float *p, int64_t n) { return n >= LANES ? FN(f_load)(p) : FN(f_tail)(p, n); }
LORCH_INLINE void FN(f_put)(float *p, int64_t n, F f) { memcpy(p, &f, n >= LANES ? sizeof f : (size_t)n * sizeof(float)); }

LORCH_INLINE F FN(f_activate)(enum mat_activation a, F g) { /* the gate's part */
    if (a == MAT_SILU) return g / (1.0f + FN(f_exp)(-g));
    if (a == MAT_SWIGLU7) {
        g = FN(f_min)(FN(f_all)(7.0f), g);
        return g / (1.0f + FN(f_exp)(-1.702f * g));
    }
    F u = g * FN(f_fma)(g * g, FN(f_all)(0.0713548162726f), FN(f_all)(1.5957691216057f)); /* 2 sqrt(2/pi) (g + 0.044715 g^3) */
    return g / (1.0f + FN(f_exp)(-u));
}

static void FN(mat_activate)(enum mat_activation a, float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        F g = FN(f_activate)(a, FN(f_take)(gate + i, n - i));
        if (up) {
            F u = FN(f_take)(up + i, n - i);
            if (a == MAT_SWIGLU7) u = FN(f_max)(FN(f_all)(-7.0f), FN(f_min)(FN(f_all)(7.0f), u)) + 1.0f;
            g *= u;
        }
        FN(f_put)(gate + i, n - i, g);
    }
}

static void FN(mat_cap)(float *x, int64_t n, float most) {
    for (int64_t i = 0; i < n; i += LANES) FN(f_put)(x + i, n - i, FN(f_tanh)(FN(f_take)(x + i, n - i) / most) * most);
}

static void FN(mat_add)(float *x, const float *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

static void FN(mat_exp_shifted)(float *out, const float *x, int64_t n, float shift) {
    for (int64_t i = 0; i < n; i += LANES) FN(f_put)(out + i, n - i, FN(f_exp)(FN(f_take)(x + i, n - i) - shift));
}

/* ---- attention ---- */

/* Quantises a head's vector by groups of 32 dimensions, the last padded with zeros. */
LORCH_INLINE void FN(mat_quantise_head)(const float *x, int head_dim, int8_t *q, uint16_t *d) {
    for (int from = 0, g = 0; from < head_dim; from += 32, g++) {
        float group[32] = {0}, scale;
        int n = head_dim - from < 32 ? head_dim - from : 32;
        memcpy(group, x + from, (size_t)n * sizeof *group);
        quant_activations(group, 32, q + from, &scale);
        d[g] = num_to_f16(scale);
    }
}

LORCH_INLINE void FN(mat_store_q8)(char *head, const float *k, const float *v, int at, int head_dim) {
    int8_t q[MAX_HEAD_DIM + 32], *ks = (int8_t *)head, *vs = ks + head_dim * KV_BLOCK;
    int groups = (head_dim + 31) / 32;
    uint16_t d[MAX_HEAD_DIM / 32 + 1], *kd = (uint16_t *)(void *)(vs + head_dim * KV_BLOCK), *vd = kd + groups * KV_BLOCK;
    FN(mat_quantise_head)(k, head_dim, q, d);
    for (int i = 0; i < head_dim; i++) ks[i * KV_BLOCK + at] = q[i];
    for (int g = 0; g < groups; g++) kd[g * KV_BLOCK + at] = d[g];
    FN(mat_quantise_head)(v, head_dim, q, d);
    memcpy(vs + at * head_dim, q, (size_t)head_dim);
    memcpy(vd + at * groups, d, (size_t)groups * sizeof *d);
}

/* The floats of a Q8_0 block: each the exact product of its code and its scale. */
static void FN(mat_from_q8)(const char *head, float *k, float *v, int head_dim) {
    const int8_t *ks = (const int8_t *)head, *vs = ks + head_dim * KV_BLOCK;
    int groups = (head_dim + 31) / 32;
    const uint16_t *kd = (const uint16_t *)(const void *)(vs + head_dim * KV_BLOCK), *vd = kd + groups * KV_BLOCK;
    float scale[KV_BLOCK];
    for (int i = 0; i < head_dim; i++) {
        if (i % 32 == 0)
            for (int j = 0; j < KV_BLOCK; j++) scale[j] = num_from_f16(kd[i / 32 * KV_BLOCK + j]);
        for (int j = 0; j < KV_BLOCK; j++) k[i * KV_BLOCK + j] = ks[i * KV_BLOCK + j] * scale[j];
    }
    for (int j = 0; j < KV_BLOCK; j++)
        for (int g = 0; g < groups; g++) {
            float d = num_from_f16(vd[j * groups + g]);
            int to = g * 32 + 32 < head_dim ? g * 32 + 32 : head_dim;
            for (int i = g * 32; i < to; i++) v[j * head_dim + i] = vs[j * head_dim + i] * d;
        }
}

/* Stores one token's key and value of one KV head at position `at` of its block. */
static void FN(mat_store)(char *head, const float *k, const float *v, int at, int head_dim, enum mat_kv kv) {
    if (kv == MAT_KV_Q8_0) FN(mat_store_q8)(head, k, v, at, head_dim);
    else if (kv == MAT_KV_F16) {
        uint16_t *ks = (uint16_t *)(void *)head, *vs = ks + head_dim * KV_BLOCK, half[MAX_HEAD_DIM];
        for (int d = 0; d < head_dim; d++) half[d] = num_to_f16(k[d]), vs[at * head_dim + d] = num_to_f16(v[d]);
        for (int d = 0; d < head_dim; d++) ks[d * KV_BLOCK + at] = half[d];
    } else {
        float *ks = (float *)(void *)head, *vs = ks + head_dim * KV_BLOCK;
        for (int d = 0; d < head_dim; d++) ks[d * KV_BLOCK + at] = k[d], vs[at * head_dim + d] = v[d];
    }
}

/* Online softmax (Milakov and Gimelshein, 2018) of one query over scores from..n-1 of one block: s turns
 * into weights, 0 outside; the running maximum m[0], sum m[1] and weighted values acc are brought up to date. */
LORCH_INLINE void FN(mat_soften)(const mat_attention *a, float *s, int from, int n, float *m, float *acc) {
    int head_dim = a->head_dim;
    float part[16], lane[LANES], top = m[0];
    int32_t number[LANES];
    F sum[16 / LANES], most = FN(f_all)(m[0]);
    for (int i = 0; i < LANES; i++) number[i] = i;
    V index = FN(v_load)(number);
    for (int j = 0; j < KV_BLOCK; j += LANES) {
        V used = (index + j < n) & (index + j >= from);
        F y = FN(f_load)(s + j) * a->scale;
        if (a->cap > 0) y = FN(f_tanh)(y / a->cap) * a->cap;
        FN(f_store)(s + j, y);
        most = FN(f_max)((F)(((V)y & used) | ((V)most & ~used)), most); /* a NaN is passed over */
    }
    FN(f_store)(lane, most);
    for (int i = 0; i < LANES; i++) top = lane[i] > top ? lane[i] : top;
    for (int j = 0; j < 16 / LANES; j++) sum[j] = (F){0};
    for (int j = 0; j < KV_BLOCK; j += 16)
        for (int i = 0; i < 16 / LANES; i++) {
            F e = FN(f_exp)(FN(f_load)(s + j + i * LANES) - top);
            e = (F)((V)e & (index + (j + i * LANES) < n) & (index + (j + i * LANES) >= from));
            FN(f_store)(s + j + i * LANES, e);
            sum[i] += e;
        }
    memcpy(part, sum, sizeof part);
    float keep = FN(f_exp)(FN(f_all)(m[0] - top))[0];
    m[0] = top;
    m[1] = m[1] * keep + FN(mat_tree)(part);
    if (keep != 1.0f)
        for (int d = 0; d < head_dim; d++) acc[d] *= keep;
}

typedef struct { /* scratch of one call of attend */
    float *k, *v;   /* a block's [head_dim][KV_BLOCK] and [KV_BLOCK][head_dim] as floats */
    float *q, *acc; /* [queries][head_dim] */
    float *s;       /* [queries][KV_BLOCK] */
    float *m;       /* [queries][2] running maximum and sum */
    int heads, n_tok;
} FN(mat_attending);

LORCH_INLINE void FN(mat_to_floats)(float *to, const uint16_t *from, int n) {
    for (int i = 0; i < n; i += LANES) FN(f_store)(to + i, FN(f_half)(from + i)); /* n is a multiple of KV_BLOCK */
}

/* c += a * b with b as it lies in the cache, or as floats when enough queries repay the conversion. Meanwhile
 * `bytes` at `next` (or NULL) are fetched, piece by piece. */
LORCH_INLINE void FN(mat_attend_product)(int half, int queries, int columns, const float *a, int64_t lda,
                                          const char *b, int n_k, float *c, int64_t ldc, const char *next, size_t bytes) {
    int step = next ? 16 : n_k, size = half ? 2 : 4;
    for (int k = 0; k < n_k; k += step, b += step * columns * size) {
        int n = n_k - k < step ? n_k - k : step;
        if (next) FN(mat_fetch)(next + bytes * (size_t)k / (size_t)n_k / 64 * 64, (int)(bytes * (size_t)n / (size_t)n_k));
        if (half) FN(mat_outer_halves)(queries, columns, a + k, lda, (const uint16_t *)(const void *)b, columns, n, c, ldc);
        else FN(mat_outer_floats)(queries, columns, a + k, lda, (const float *)(const void *)b, columns, n, c, ldc);
    }
}

/* All queries against block b of their sequence; token i sees positions up to pos[i], as far back as the window.
 * `next`: the block that follows, to be fetched, or NULL. */
static void FN(mat_attend_block)(const mat_attention *a, const FN(mat_attending) *w, const int32_t *pos, int b, const char *head, const char *next) {
    int hd = a->head_dim, heads = w->heads, first = 0, half = a->kv == MAT_KV_F16;
    int end = w->n_tok, sees = a->window ? a->window : INT_MAX; /* tokens first..end-1 see something of this block */
    while (pos[first] < b * KV_BLOCK) first++;
    while (end > first && pos[end - 1] - b * KV_BLOCK - (KV_BLOCK - 1) >= sees) end--;
    if (first == end) return;
    int queries = (end - first) * heads, from = first * heads;
    const char *k = head, *v = head + (size_t)hd * KV_BLOCK * (half ? 2 : 4);
    if (half && queries > 6) {
        FN(mat_to_floats)(w->k, (const uint16_t *)(const void *)head, 2 * hd * KV_BLOCK); /* v follows k in both */
        k = (const char *)w->k, v = (const char *)w->v, half = 0;
    } else if (a->kv == MAT_KV_Q8_0) {
        FN(mat_from_q8)(head, w->k, w->v, hd);
        k = (const char *)w->k, v = (const char *)w->v;
    }
    memset(w->s + from * KV_BLOCK, 0, (size_t)queries * KV_BLOCK * sizeof(float));
    FN(mat_attend_product)(half, queries, KV_BLOCK, w->q + from * hd, hd, k, hd, w->s + from * KV_BLOCK, KV_BLOCK, next,
                           a->head_bytes / 2);
    int common = pos[first] + 1 - b * KV_BLOCK, size = half ? 2 : 4;
    if (common > KV_BLOCK) common = KV_BLOCK;
    for (int t = first; t < end; t++) {
        int n = pos[t] + 1 - b * KV_BLOCK;
        for (int i = t * heads; i < (t + 1) * heads; i++)
            FN(mat_soften)(a, w->s + i * KV_BLOCK, n > sees ? n - sees : 0, n < KV_BLOCK ? n : KV_BLOCK, w->m + 2 * i, w->acc + i * hd);
    }
    FN(mat_attend_product)(half, queries, hd, w->s + from * KV_BLOCK, KV_BLOCK, v, common, w->acc + from * hd, hd,
                           next ? next + a->head_bytes / 2 : NULL, a->head_bytes / 2);
    for (int t = first; t < end; t++) { /* what the later tokens see beyond the first */
        int n = pos[t] + 1 - b * KV_BLOCK;
        n = (n < KV_BLOCK ? n : KV_BLOCK) - common;
        if (n > 0)
            FN(mat_attend_product)(half, heads, hd, w->s + t * heads * KV_BLOCK + common, KV_BLOCK, v + (size_t)(common * hd * size), n,
                                   w->acc + t * heads * hd, hd, NULL, 0);
    }
}

/* All tokens of a group, all query heads that share one KV head; blocks in order from position 0. */
static void FN(mat_attend)(const mat_attention *a, int group, int head_kv, void *scratch) {
    int hd = a->head_dim, heads = a->n_head / a->n_head_kv, from = a->group[group], n_tok = a->group[group + 1] - from;
    size_t row = (size_t)(a->n_head * hd), column = (size_t)(head_kv * heads * hd);
    float *f = scratch;
    FN(mat_attending) w = {f, f + hd * KV_BLOCK, f + 2 * hd * KV_BLOCK, NULL, NULL, NULL, heads, n_tok};
    w.acc = w.q + n_tok * heads * hd, w.s = w.acc + n_tok * heads * hd, w.m = w.s + n_tok * heads * KV_BLOCK;
    for (int t = 0; t < n_tok; t++) memcpy(w.q + t * heads * hd, a->q + (size_t)(from + t) * row + column, (size_t)(heads * hd) * sizeof(float));
    memset(w.acc, 0, (size_t)(n_tok * heads * hd) * sizeof(float));
    for (int i = 0; i < n_tok * heads; i++) w.m[2 * i] = -1e30f, w.m[2 * i + 1] = 0;
    int first = a->window && a->pos[from] >= a->window ? (a->pos[from] - a->window + 1) / KV_BLOCK : 0;
    for (int b = first; b <= a->pos[from + n_tok - 1] / KV_BLOCK; b++) {
        const char *base = a->layer + (size_t)head_kv * a->head_bytes, *head = base + a->blocks[from][b] * a->block_bytes;
        int more = b < a->pos[from + n_tok - 1] / KV_BLOCK && n_tok == 1;
        FN(mat_attend_block)(a, &w, a->pos + from, b, head, more ? base + a->blocks[from][b + 1] * a->block_bytes : NULL);
    }
    for (int t = 0; t < n_tok; t++)
        for (int h = 0; h < heads; h++) {
            const float *acc = w.acc + (t * heads + h) * hd, *m = w.m + 2 * (t * heads + h);
            float *out = a->out + (size_t)(from + t) * row + column + (size_t)(h * hd), sum = m[1];
            if (a->sinks) { /* as one more score, whose value is zero */
                float sink = a->sinks[head_kv * heads + h], top = m[0] > sink ? m[0] : sink;
                float keep = FN(f_exp)(FN(f_all)(m[0] - top))[0];
                sum = (sum * keep + FN(f_exp)(FN(f_all)(sink - top))[0]) / keep;
            }
            for (int d = 0; d < hd; d++) out[d] = acc[d] / sum;
        }
}

/* ---- for lorch bench ---- */

#if MAT_DOT == MAT_PLAIN
#define OPAQUE(x) __asm__ volatile("" : "+m"(x))
#elif LANES >= 8
#define OPAQUE(x) __asm__ volatile("" : "+v"(x))
#else
#define OPAQUE(x) __asm__ volatile("" : "+w"(x))
#endif
static double FN(mat_peak)(int64_t n) { /* 12 chains hide the instruction's latency */
    V w = FN(v_all)(0x01020304), v = FN(v_all)(0x02020101);
#define S(t) V a##t = w + t, b##t = v - t, x##t = FN(v_all)(0x04030201 + t);
    EVERY(S)
#undef S
    for (int64_t i = 0; i < n; i++) {
        OPAQUE(w);
        OPAQUE(v);
#define S(t) a##t = FN(v_dot)(a##t, w, x##t), b##t = FN(v_dot)(b##t, v, x##t);
        EVERY(S)
#undef S
    }
#define S(t) w += a##t + b##t;
    EVERY(S)
#undef S
    OPAQUE(w);
    return (double)n * 12 * LANES * 4 * 2;
}

static uint64_t FN(mat_read)(const void *p, size_t n) {
    const char *c = p;
    V a = {0}, b = {0};
    size_t i = 0;
    for (; i + 256 <= n; i += 256) {
        FN(mat_fetch)(c + i + 4096, 256);
        for (size_t j = 0; j < 256; j += 2 * sizeof a) a += FN(v_load)(c + i + j), b += FN(v_load)(c + i + j + sizeof a);
    }
    a += b;
    uint64_t sum = (uint64_t)(uint32_t)a[0];
    for (; i < n; i++) sum += (unsigned char)c[i];
    return sum;
}
#undef OPAQUE

#define LORCH_STRING2(s) #s
#define LORCH_STRING(s) LORCH_STRING2(s)
static const mat_kernels FN(mat_table) = {
    LORCH_STRING(LORCH_LEVEL), FN(mat_multiply), FN(mat_quantise), FN(mat_rms_norm), FN(mat_layer_norm), FN(mat_rope), FN(mat_store),
    FN(mat_attend), FN(mat_activate), FN(mat_cap), FN(mat_add), FN(mat_exp_shifted), FN(mat_peak), FN(mat_read)};
#undef LORCH_STRING
#undef LORCH_STRING2
#undef V
#undef F
#undef KEEP
#undef FMA
#undef MAT_PAIRED
#undef MAT_SIGNED
#undef STORE
#undef TILE
#undef TILE_F
#undef EVERY
#undef EACH
#undef LANES
#undef MAT_DOT

#endif /* LORCH_LEVEL */
#ifndef LORCH_LEVEL

/* ==== Thread pool ==========================================================================
 * pool_run(fn, ctx, n) calls fn(ctx, item, thread) for every item of 0..n-1 on all threads, the caller's
 * included, and returns when all are done. Items are handed out one by one, and a worker that has not come
 * by the time when all are taken is not waited for, so a thread whose core is taken away costs only its share.
 * Workers spin for a few microseconds after work, then sleep: idle threads use no CPU. One pool_run at a time;
 * items must not depend on each other. */

typedef void (*pool_fn)(void *ctx, int64_t item, int thread);

enum { POOL_INSIDE = (1 << 10) - 1, POOL_OPEN = 1 << 10, POOL_ROUND = 1 << 11 }; /* the parts of a gate */

typedef struct {
    int n_threads;      /* the caller of pool_run is thread 0 */
    pthread_t thread[MAX_THREADS];
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int started, sleeping; /* under lock */
    unsigned gate;      /* atomic: the number of the round, times POOL_ROUND; POOL_OPEN while it may be entered; workers inside */
    int stop;           /* atomic */
    intptr_t next;      /* atomic: the first item that nobody has taken */
    intptr_t n_items;
    pool_fn fn;
    void *ctx;
} pool;

typedef struct { /* what a worker is given: valid until pool_start returns */
    pool *p;
    int thread;
} pool_seat;

LORCH_INLINE void pool_pause(void) {
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#elif defined __aarch64__
    __asm__ volatile("yield");
#endif
}

static void pool_work(pool *p, int thread) {
    for (;;) {
        intptr_t item = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
        if (item >= p->n_items) return;
        p->fn(p->ctx, item, thread);
    }
}

static unsigned pool_round(pool *p) { return __atomic_load_n(&p->gate, __ATOMIC_ACQUIRE) & ~(unsigned)(POOL_ROUND - 1); }

/* Waits for a round other than `seen`: spinning first, since the next product is a microsecond away. */
static unsigned pool_await(pool *p, unsigned seen) {
    unsigned round;
    for (int spin = 0; spin < 4000; spin++) {
        if ((round = pool_round(p)) != seen) return round;
        pool_pause();
    }
    pthread_mutex_lock(&p->lock);
    p->sleeping++;
    while ((round = pool_round(p)) == seen) pthread_cond_wait(&p->wake, &p->lock);
    p->sleeping--;
    pthread_mutex_unlock(&p->lock);
    return round;
}

static int pool_enter(pool *p, unsigned round) { /* 0: too late */
    unsigned gate = __atomic_load_n(&p->gate, __ATOMIC_RELAXED);
    while ((gate & ~(unsigned)POOL_INSIDE) == (round | POOL_OPEN))
        if (__atomic_compare_exchange_n(&p->gate, &gate, gate + 1, 1, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return 1;
    return 0;
}

static void *pool_worker(void *arg) {
    pool_seat seat = *(pool_seat *)arg;
    pthread_mutex_lock(&seat.p->lock);
    seat.p->started++;
    pthread_cond_broadcast(&seat.p->wake);
    pthread_mutex_unlock(&seat.p->lock);
    for (unsigned seen = 0;;) {
        seen = pool_await(seat.p, seen);
        if (__atomic_load_n(&seat.p->stop, __ATOMIC_ACQUIRE)) return NULL;
        if (!pool_enter(seat.p, seen)) continue;
        pool_work(seat.p, seat.thread);
        __atomic_fetch_sub(&seat.p->gate, 1, __ATOMIC_RELEASE);
    }
}

/* Begins a round: publishes the work, then wakes whoever sleeps. */
static void pool_announce(pool *p) {
    pthread_mutex_lock(&p->lock);
    __atomic_store_n(&p->gate, (pool_round(p) + POOL_ROUND) | POOL_OPEN, __ATOMIC_RELEASE);
    if (p->sleeping) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

static void pool_run(pool *p, pool_fn fn, void *ctx, int64_t n_items) {
    p->fn = fn, p->ctx = ctx, p->n_items = (intptr_t)n_items; /* nobody is inside who could look at them */
    __atomic_store_n(&p->next, 0, __ATOMIC_RELAXED);
    if (p->n_threads == 1 || n_items == 1) {
        pool_work(p, 0);
        return;
    }
    pool_announce(p);
    pool_work(p, 0);
    unsigned gate = __atomic_and_fetch(&p->gate, ~(unsigned)POOL_OPEN, __ATOMIC_ACQUIRE);
    for (int spin = 0; gate & POOL_INSIDE; spin++) {
        if (spin < 1000) pool_pause();
        else sched_yield(); /* a worker has lost its core in the midst of an item: leave it ours */
        gate = __atomic_load_n(&p->gate, __ATOMIC_ACQUIRE);
    }
}

static void pool_stop(pool *p) {
    __atomic_store_n(&p->stop, 1, __ATOMIC_RELEASE);
    pool_announce(p);
    for (int i = 1; i < p->n_threads; i++) pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
}

/* Starts n_threads - 1 workers; with fewer when the system refuses more. */
static void pool_start(pool *p, int n_threads) {
    pool_seat seat[MAX_THREADS];
    memset(p, 0, sizeof *p);
    pthread_mutex_init(&p->lock, NULL);
    sys_cond_init(&p->wake);
    p->n_threads = 1;
    for (int i = 1; i < n_threads && i < MAX_THREADS; i++) {
        seat[i].p = p, seat[i].thread = i;
        if (sys_thread(&p->thread[i], pool_worker, &seat[i])) break;
        p->n_threads++;
    }
    pthread_mutex_lock(&p->lock); /* the seats are on this stack: wait until each is taken */
    while (p->started < p->n_threads - 1) pthread_cond_wait(&p->wake, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

/* ==== Tokenizers ===========================================================================
 * Text to token ids and back, by the vocabulary in the model file: SentencePiece BPE (tokenizer.ggml.model
 * "llama") and byte-level BPE ("gpt2"). Both merge the best pair of neighbours until none is left, with a
 * heap, in O(n log n); they differ in what a pair costs. Byte-level BPE first cuts the text into words by
 * regular expressions, which are data (tok_pres) for the small matcher below. All is as llama.cpp does it,
 * where that differs from a model's own tokenizer too, since files are made and tested with it. A tok is
 * read-only after tok_load and may be used by any thread; its texts point into the model file. */

enum tok_kind { TOK_SPM, TOK_BPE };
enum tok_type { TOK_UNDEFINED, TOK_NORMAL, TOK_UNKNOWN, TOK_CONTROL, TOK_USER, TOK_UNUSED, TOK_BYTE };
enum tok_flag { TOK_BOS = 1, TOK_SPECIAL = 2 }; /* as a prompt: BOS before and EOS after, where the file says so; read control tokens in the text */

/* ---- word patterns: the tokenizers' own regular expressions, in this language ----
 *   pattern     = alternative *( "|" alternative )             the first that matches counts, not the longest
 *   alternative = *( item | "(?:" pattern ")" [ "?" | "*" ] )  a group keeps what it took first; groups hold no groups
 *   item        = set [ "?" | "*" | "+" | "{" min [ "," max ] "}" ]      as many as possible first
 *               | "(?=" set ")" | "(?!" set ")" | "(?%" set ")" | "$"    and these take nothing: such a code point
 *                 follows; none follows; the number of those that follow is a multiple of three; the piece ends
 *   set         = char | "[" [ "^" ] *range [ "--" *range ] "]"          after "--": but none of these
 *   range       = char [ "-" char ]                                   the ranges of a set do not overlap
 *   char        = "\p{" category "}" | "\s" | "\S" | "\r" | "\n" | "\t" | "\u" 4HEX | "\u{" *HEX "}" | "\" any | any */

enum { TOK_STAGES = 6, TOK_ALTS = 48, TOK_ITEMS = 96, TOK_RANGES = 192, TOK_DEPTH = 16, TOK_MANY = 1 << 30 };
enum tok_op { TOK_SET, TOK_AHEAD, TOK_NOT_AHEAD, TOK_THREES, TOK_END, TOK_GROUP };

typedef struct {          /* a set of code points */
    uint32_t ascii[4];    /* bit per ASCII character: the answer */
    uint32_t categories;  /* bit per unicode_category */
    int first, n, n_minus; /* ranges of tok_rules, ascending: n that are in, then n_minus that are not */
    char space, negated, minus_space;
} tok_set;

typedef struct {
    enum tok_op op;
    int min, max;         /* repetitions */
    int alt;              /* of a group: its first alternative */
    int next;             /* item of the same alternative; -1: the last */
    tok_set set;
} tok_item;

typedef struct { /* a pre-tokenizer ready for use: patterns applied one after the other, each cutting the pieces of the one before */
    int n_stages, n_alts, n_items, n_ranges;
    int stage[TOK_STAGES];                            /* first alternatives */
    struct { int item, next; } alt[TOK_ALTS];         /* first item; next alternative, or -1 */
    tok_item item[TOK_ITEMS];
    uint32_t lo[TOK_RANGES], hi[TOK_RANGES];
} tok_rules;

typedef struct {
    const char *names;              /* of tokenizer.ggml.pre, separated by spaces */
    const char *stage[TOK_STAGES];
    int ignore_merges;              /* a word that is a token as a whole is not merged up to */
    int add_bos;                    /* unless the file says otherwise */
} tok_pre;

#define TOK_CONTRACTION "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
#define TOK_SUFFIX "(?:" TOK_CONTRACTION ")?"
#define TOK_SPACES "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
#define TOK_PUNCTUATION " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
#define TOK_WORD "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
#define TOK_GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define TOK_LLAMA3 TOK_CONTRACTION "|" TOK_WORD "\\p{N}{1,3}|" TOK_PUNCTUATION TOK_SPACES
#define TOK_QWEN2 TOK_CONTRACTION "|" TOK_WORD "\\p{N}|" TOK_PUNCTUATION TOK_SPACES
#define TOK_UPPER "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}--a-z]*[\\p{L}--A-Z]+"  /* words in which lower-case letters come last... */
#define TOK_LOWER "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}--a-z]+[\\p{L}--A-Z]*"  /* ...or not at all */
#define TOK_DEEPSEEK3 "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
#define TOK_CJK "[\\u4e00-\\u9fa5\\u3040-\\u30ff]+"
#define TOK_ASIAN "[\\u0800-\\u9fa5\\uac00-\\ud7ff--\\s]+"
#define TOK_HAN "\\u4e00-\\u9fff\\u3400-\\u4dbf\\u{20000}-\\u{2a6df}\\u{2a700}-\\u{2ebef}\\uf900-\\ufaff\\u{2f800}-\\u{2fa1f}"
#define TOK_CASED /* letters of scripts with cases, as the tokenizers of DeepSeek list them */ \
    "A-Za-z\\u00b5\\u00c0-\\u00d6\\u00d8-\\u00f6\\u00f8-\\u01ba\\u01bc-\\u01bf\\u01c4-\\u0293\\u0295-\\u02af\\u0370-\\u0373\\u0376\\u0377" \
    "\\u037b-\\u037d\\u037f\\u0386\\u0388-\\u038a\\u038c\\u038e-\\u03a1\\u03a3-\\u03f5\\u03f7-\\u0481\\u048a-\\u052f\\u0531-\\u0556" \
    "\\u10a0-\\u10c5\\u13a0-\\u13f5\\u13f8-\\u13fd\\u1c90-\\u1cba\\u1cbd-\\u1cbf\\u1d00-\\u1d2b\\u1d6b-\\u1d77\\u1d79-\\u1d9a" \
    "\\u1e00-\\u1f15\\u1f18-\\u1f1d\\u1f20-\\u1f45\\u1f48-\\u1f4d\\u1f50-\\u1f57\\u1f59\\u1f5b\\u1f5d\\u1f5f-\\u1f7d\\u1f80-\\u1fb4" \
    "\\u1fb6-\\u1fbc\\u1fbe\\u1fc2-\\u1fc4\\u1fc6-\\u1fcc\\u1fd0-\\u1fd3\\u1fd6-\\u1fdb\\u1fe0-\\u1fec\\u1ff2-\\u1ff4\\u1ff6-\\u1ffc" \
    "\\u2102\\u2107\\u210a-\\u2113\\u2115\\u2119-\\u211d\\u2124\\u2126\\u2128\\u212a-\\u212d\\u212f-\\u2134\\u2139\\u213c-\\u213f" \
    "\\u2145-\\u2149\\u214e\\u2183\\u2184\\u2c00-\\u2c7b\\u2c7e-\\u2ce4\\u2ceb-\\u2cee\\u2cf2\\u2cf3\\ua640-\\ua66d\\ua680-\\ua69b" \
    "\\ua722-\\ua76f\\ua771-\\ua787\\ua78b-\\ua78e\\uab70-\\uabbf\\ufb00-\\ufb06\\ufb13-\\ufb17\\uff21-\\uff3a\\uff41-\\uff5a" \
    "\\u{10400}-\\u{1044f}\\u{104b0}-\\u{104d3}\\u{104d8}-\\u{104fb}\\u{10c80}-\\u{10cb2}\\u{10cc0}-\\u{10cf2}" \
    "\\u{118a0}-\\u{118df}\\u{1e900}-\\u{1e943}"
#define TOK_SENTENCE " ?[^(\\s|.,!?\\u2026\\u3002\\uff0c\\u3001\\u0964\\u06d4\\u060c)]+"
#define TOK_THREES_FROM_RIGHT "[^\\p{N}]*\\p{N}{1,3}(?%\\p{N})" /* what stands before the first digits goes with them */

static const tok_pre tok_pres[] = {
    {"default", {"[\\p{P}\\$\\+<=>\\^~\\|]+", TOK_GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}, 0, 0},
    {"gpt-2 phi-2 mpt olmo jais exaone4 trillion granite-docling gigachat a.x-4.0 mellum modern-bert jina-es jina-de", {TOK_GPT2}, 0, 0},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", {TOK_LLAMA3}, 1, 1},
    {"dbrx smaug-bpe glm4 chatglm-bpe", {TOK_LLAMA3}, 0, 0},
    {"qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open grok-2 kormo f2llmv2", {TOK_QWEN2}, 0, 0},
    {"qwen35", {TOK_CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|" TOK_SPACES}, 0, 0},
    {"ufakzeka", {TOK_WORD "\\p{N}|" TOK_PUNCTUATION TOK_SPACES}, 0, 0},
    {"laguna", {"[^\\n]+|\\n+", TOK_QWEN2}, 0, 0},
    {"minicpm5", {"\\p{N}{1,3}", TOK_CONTRACTION "|" TOK_WORD "\\p{N}+|" TOK_PUNCTUATION TOK_SPACES}, 1, 0},
    {"smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", {"\\p{N}", TOK_GPT2}, 0, 0},
    {"falcon", {"[\\p{P}\\$\\+<=>\\^~\\|`]+", TOK_GPT2, "[0-9][0-9][0-9]"}, 0, 0},
    {"gpt-4o llama4 kanana2 talkie minimax-m2",
     {TOK_UPPER TOK_SUFFIX "|" TOK_LOWER TOK_SUFFIX "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" TOK_SPACES}, 0, 0},
    {"tekken", {TOK_UPPER "|" TOK_LOWER "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" TOK_SPACES}, 1, 1},
    {"tiny_aya cohere2moe", {TOK_THREES_FROM_RIGHT,
     "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+" TOK_SUFFIX "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" TOK_SPACES}, 0, 0},
    {"deepseek-llm", {"[\\r\\n]", "\\s?[" TOK_CASED "]+", "\\s?[!-/:-~\\uff01-\\uff0f\\uff1a-\\uff5e\\u2018-\\u201f\\u3001-\\u3002]+", "\\s+$",
     TOK_ASIAN, "\\p{N}+"}, 0, 0},
    {"deepseek-coder", {"[\\r\\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", TOK_ASIAN, "\\p{N}"}, 0, 0},
    {"deepseek-v3 hunyuan-dense joyai-llm hy_v4", {"\\p{N}{1,3}", TOK_CJK, TOK_DEEPSEEK3 " ?[\\p{P}\\p{S}]+[\\r\\n]*|" TOK_SPACES}, 0, 0},
    {"spark2_5", {"\\p{N}{1,3}", TOK_CJK, TOK_DEEPSEEK3 " ?[\\p{P}\\p{S}]+|[\\r\\n]|\\s+(?!\\S)|\\s+", "\\p{N}"}, 0, 0},
    {"youtu", {"[\\uac00-\\ud7a3\\u3131-\\u318e]+|[\\uff01\\u2026\\u201c\\u201d\\u2018\\u2019\\u2014\\uff1a\\uff1b\\uff0c\\u3001-\\u303f\\ufe30-\\ufe4f]+|"
     "[\\u3105-\\u312f]+|" TOK_CJK,
     "[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+" TOK_SUFFIX "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" TOK_SPACES}, 1, 0},
    {"afmoe", {TOK_THREES_FROM_RIGHT, "[\\u0e40-\\u0eff\\u1000-\\u109f\\u1100-\\u11ff\\u1780-\\u17ff\\u2f00-\\u2fdf\\u3040-\\u30ff\\u3400-\\u4dbf"
     "\\u4e00-\\ufaff\\uff65-\\uff9f]+",
     TOK_DEEPSEEK3 " ?[\\p{P}\\p{S}]+[\\r\\n]*|" TOK_SPACES}, 0, 0},
    {"bailingmoe bailingmoe2 llada-moe",
     {"'[sSdDmMtT]|'[lL][lL]|'[vV][eE]|'[rR][eE]|" TOK_WORD "\\p{N}|" TOK_PUNCTUATION "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"}, 0, 0},
    {"seed-coder", {TOK_CONTRACTION "|" TOK_WORD "\\p{N}| ?[^\\s\\p{L}\\p{N}\\r\\n]+|" TOK_SPACES}, 0, 0},
    {"exaone-moe", {TOK_CONTRACTION "|[^\\r\\n\\p{L}\\p{N}]?\\p{L}\\p{M}*(?: ?\\p{L}\\p{M}*)*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]?|"
     "\\s*[\\r\\n]|\\s+(?!\\S)|\\s+"}, 0, 0},
    {"kimi-k2", {"[" TOK_HAN "]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}--" TOK_HAN "]+" TOK_SUFFIX "|\\p{N}{1,3}|" TOK_PUNCTUATION TOK_SPACES}, 0, 0},
    {"jais-2", {TOK_CONTRACTION "|" TOK_WORD "\\p{N}{1,3}|" TOK_PUNCTUATION "\\s*[\\r\\n]+|\\s{512}(?!\\S)|\\s{256}(?!\\S)|\\s{128}(?!\\S)|"
     "\\s{64}(?!\\S)|\\s{32}(?!\\S)|\\s{16}(?!\\S)|\\s{8}(?!\\S)|\\s{4}(?!\\S)|\\s{1,2}(?!\\S)|\\s{1}"}, 0, 0},
    {"poro-chat bloom gpt3-finnish", {TOK_SENTENCE}, 0, 0},
    {"viking", {TOK_SENTENCE, "\\p{N}"}, 0, 0},
    {"superbpe", {"\\p{N}+", "(?=[0-9])(?%[0-9])"}, 0, 0},
    {"chameleon", {"<sentinel:[0-9]+>", "IMGIMG[A-I]{1,4}Z", "[\\t\\n]|    |  ", "\\p{N}", "[\\p{P}!-/:-@\\[-`{-~]", TOK_GPT2}, 0, 1},
};

static int tok_set_search(const tok_rules *r, const tok_set *s, uint32_t cp, int category) { /* without the table */
    int in = (s->categories >> category & 1) || (s->space && unicode_is_space(cp));
    if (!in && s->n) {
        int lo = s->first, hi = s->first + s->n - 1;
        while (lo < hi) { /* the last range that begins at or before cp */
            int mid = (lo + hi + 1) / 2;
            if (r->lo[mid] <= cp) lo = mid;
            else hi = mid - 1;
        }
        in = cp >= r->lo[lo] && cp <= r->hi[lo];
    }
    for (int i = s->first + s->n; i < s->first + s->n + s->n_minus && in; i++) in = cp < r->lo[i] || cp > r->hi[i];
    if (s->minus_space && unicode_is_space(cp)) in = 0;
    return in != s->negated;
}

static int tok_set_has(const tok_rules *r, const tok_set *s, uint32_t cp, int category) {
    return cp < 128 ? (int)(s->ascii[cp >> 5] >> (cp & 31) & 1) : tok_set_search(r, s, cp, category);
}

/* ---- reading patterns: they are all in tok_pres, so nothing here doubts them; the tests see that they fit the limits ---- */

static uint32_t tok_category_bits(const char *name, size_t len) { /* "L", "Lu": all categories whose names begin so */
    static const char names[] = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn";
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 30; i++)
        if (names[2 * i] == name[0] && (len < 2 || names[2 * i + 1] == name[1])) bits |= 1u << i;
    return bits;
}

static uint32_t tok_parse_one(const char **p) { /* a code point */
    char c = *(*p)++;
    if (c != '\\') return (unsigned char)c;
    c = *(*p)++;
    if (c != 'u') return c == 'r' ? '\r' : c == 'n' ? '\n' : c == 't' ? '\t' : (unsigned char)c;
    int braces = **p == '{';
    uint32_t cp = 0;
    *p += braces;
    for (int n = 0; braces ? **p != '}' : n < 4; n++, ++*p) cp = cp << 4 | (uint32_t)(**p <= '9' ? **p - '0' : **p - 'a' + 10);
    *p += braces;
    return cp;
}

/* Adds a range of code points, or a class of them, to the set that ends the ranges. */
static const char *tok_parse_range(tok_rules *r, const char *p, tok_set *s, int minus) {
    if (p[0] == '\\' && p[1] == 'p') {
        const char *end = strchr(p, '}');
        s->categories |= tok_category_bits(p + 3, (size_t)(end - p - 3));
        return end + 1;
    }
    if (p[0] == '\\' && (p[1] == 's' || p[1] == 'S')) {
        if (minus) s->minus_space = 1;
        else s->space = 1;
        if (p[1] == 'S') s->negated = 1;
        return p + 2;
    }
    uint32_t lo = tok_parse_one(&p), hi = lo;
    if (p[0] == '-' && p[1] && p[1] != ']' && p[1] != '-') p++, hi = tok_parse_one(&p);
    if (r->n_ranges == TOK_RANGES) return p;
    int i = r->n_ranges++, first = minus ? s->first + s->n : s->first;
    for (; i > first && r->lo[i - 1] > lo; i--) r->lo[i] = r->lo[i - 1], r->hi[i] = r->hi[i - 1];
    r->lo[i] = lo, r->hi[i] = hi;
    if (minus) s->n_minus++;
    else s->n++;
    return p;
}

static const char *tok_parse_set(tok_rules *r, const char *p, tok_set *s) {
    s->first = r->n_ranges;
    if (*p == '[') {
        int minus = 0;
        if (*++p == '^') s->negated = 1, p++;
        while (*p != ']') {
            if (p[0] == '-' && p[1] == '-') minus = 1, p += 2;
            p = tok_parse_range(r, p, s, minus);
        }
        p++;
    } else p = tok_parse_range(r, p, s, 0);
    for (uint32_t c = 0; c < 128; c++)
        if (tok_set_search(r, s, c, unicode_category(c))) s->ascii[c >> 5] |= 1u << (c & 31);
    return p;
}

static const char *tok_parse_pattern(tok_rules *r, const char *p, int *first_alt);

static const char *tok_parse_item(tok_rules *r, const char *p, tok_item *it) {
    it->min = it->max = 1;
    if (*p == '$') return it->op = TOK_END, p + 1;
    if (p[0] == '(' && p[1] == '?') {
        if (p[2] == ':') it->op = TOK_GROUP, p = tok_parse_pattern(r, p + 3, &it->alt) + 1;
        else it->op = p[2] == '=' ? TOK_AHEAD : p[2] == '!' ? TOK_NOT_AHEAD : TOK_THREES, p = tok_parse_set(r, p + 3, &it->set) + 1;
    } else p = tok_parse_set(r, p, &it->set);
    if (*p == '?') return it->min = 0, p + 1;
    if (*p == '+') return it->max = TOK_MANY, p + 1;
    if (*p == '*') return it->min = 0, it->max = TOK_MANY, p + 1;
    if (*p != '{') return p;
    it->min = it->max = (int)strtol(p + 1, (char **)&p, 10);
    if (*p == ',') it->max = (int)strtol(p + 1, (char **)&p, 10);
    return p + 1;
}

/* Reads up to the end of the text or of the group. What exceeds the limits is left out. */
static const char *tok_parse_pattern(tok_rules *r, const char *p, int *first_alt) {
    for (int *link = first_alt;;) {
        int alt = r->n_alts < TOK_ALTS ? r->n_alts++ : TOK_ALTS - 1, *next = &r->alt[alt].item;
        *link = alt, link = &r->alt[alt].next, *link = *next = -1;
        while (*p && *p != '|' && *p != ')') {
            int i = r->n_items < TOK_ITEMS ? r->n_items++ : TOK_ITEMS - 1;
            p = tok_parse_item(r, p, &r->item[i]);
            *next = i, next = &r->item[i].next, *next = -1;
        }
        if (*p != '|') return p;
        p++;
    }
}

static void tok_parse_rules(const tok_pre *pre, tok_rules *r) {
    memset(r, 0, sizeof *r);
    while (r->n_stages < TOK_STAGES && pre->stage[r->n_stages]) {
        tok_parse_pattern(r, pre->stage[r->n_stages], &r->stage[r->n_stages]);
        r->n_stages++;
    }
}

/* ---- matching them ---- */

typedef struct { /* the text of one call, decoded */
    uint32_t *cp;
    unsigned char *category;
    uint32_t *at;   /* [n + 1] byte offsets */
    int n;
} tok_text;

typedef struct { /* one pattern at work on one piece of the text, code points up to `end` */
    const tok_rules *r;
    const tok_text *text;
    int end;
    int threes_from, threes_end; /* the last run that (?%S) counted */
    int dead[TOK_ALTS];          /* an alternative that begins with an unbounded run failed in it, and so will up to its end */
} tok_match_state;

static int tok_match_from(tok_match_state *m, int item, int from, int *run_end);

/* How many code points an item can take at `from`, at most; -1: it does not match. */
static int tok_match_item(tok_match_state *m, const tok_item *it, int from) {
    int n = 0, most = it->max < m->end - from ? it->max : m->end - from, more = 1;
    if (it->op == TOK_END) return from == m->end ? 0 : -1;
    if (it->op == TOK_GROUP) {
        for (int round = 0; round < it->max && more > 0; round++, n += more) {
            more = -1;
            for (int a = it->alt; a >= 0 && more < 0; a = m->r->alt[a].next) more = tok_match_from(m, m->r->alt[a].item, from + n, NULL) - from - n;
            more = more < 0 ? 0 : more;
        }
        return n >= it->min ? n : -1;
    }
    if (it->op == TOK_THREES) {
        if (from < m->threes_from || from >= m->threes_end) {
            m->threes_from = m->threes_end = from;
            for (int i = from; i < m->end && tok_set_has(m->r, &it->set, m->text->cp[i], m->text->category[i]); i++) m->threes_end++;
        }
        return (m->threes_end - from) % 3 ? -1 : 0;
    }
    while (n < most && tok_set_has(m->r, &it->set, m->text->cp[from + n], m->text->category[from + n])) n++;
    if (it->op == TOK_AHEAD) return n ? 0 : -1;
    if (it->op == TOK_NOT_AHEAD) return n ? -1 : 0;
    return n >= it->min ? n : -1;
}

/* Matches a chain of items at `from`; the end, or -1; and where the run of the first item ended. It steps back over single sets only,
 * and in no pattern are there more than two unbounded ones that could both give back, of which the second then fails at once; so the
 * work is in proportion to the text taken or to the run marked dead. */
static int tok_match_from(tok_match_state *m, int item, int from, int *run_end) {
    struct { int item, from, take; } at[TOK_DEPTH];
    for (int n = 0;;) {
        while (item >= 0 && n < TOK_DEPTH) {
            int take = tok_match_item(m, &m->r->item[item], from);
            if (take < 0) break;
            if (n == 0 && run_end) *run_end = from + take;
            at[n].item = item, at[n].from = from, at[n++].take = take;
            from += take, item = m->r->item[item].next;
        }
        if (item < 0) return from;
        while (n > 0 && (m->r->item[at[n - 1].item].op != TOK_SET || at[n - 1].take <= m->r->item[at[n - 1].item].min)) n--;
        if (n == 0) return -1;
        from = at[n - 1].from + --at[n - 1].take, item = m->r->item[at[n - 1].item].next;
    }
}

static int tok_match(tok_match_state *m, int first_alt, int from) { /* of the alternatives the first that matches: its end, or -1 */
    for (int a = first_alt; a >= 0; a = m->r->alt[a].next) {
        if (from < m->dead[a]) continue;
        int run_end = from, end = tok_match_from(m, m->r->alt[a].item, from, &run_end);
        if (end >= 0) return end;
        const tok_item *it = &m->r->item[m->r->alt[a].item];
        if (it->op == TOK_SET && it->max == TOK_MANY && it->min <= 1) m->dead[a] = run_end;
    }
    return -1;
}

/* ---- the vocabulary ---- */

typedef struct {
    str text;
    float score;
    unsigned char type;
    unsigned char ends;   /* an end-of-generation token */
    unsigned char shown;  /* a control token that is part of the output's text */
    unsigned char rstrip; /* swallows the white space that follows it in a text */
} tok_entry;

typedef struct {
    enum tok_kind kind;
    int n;
    tok_entry *entry;
    uint32_t *table;       /* hash of texts: id + 1, or 0 */
    uint64_t table_mask;
    int n_merges;
    str *merge;            /* "left right", most important first */
    uint32_t *merge_table; /* hash of merges: rank + 1, or 0 */
    uint64_t merge_mask;
    int n_end;
    int32_t *end;          /* the end-of-generation tokens */
    int n_special;
    int32_t *special;      /* tokens that may stand in text as such, the longest first */
    int32_t *spelled;      /* indices of `special` in the order of the texts' bytes... */
    int spelled_from[257]; /* ...where those that begin with each byte begin */
    int32_t bos, eos, unk; /* -1 where there is none */
    int32_t byte[256];     /* SPM: the token of each byte */
    int add_bos, add_eos, add_space_prefix;
    const tok_pre *pre;
    tok_rules rules;
    uint16_t from_unicode[0x144]; /* byte-level BPE: 1 + the byte that a code point below 0x144 stands for */
    uint16_t to_unicode[256];
    const char *name;      /* "gguf-bpe" or "gguf-spm", for /health */
} tok;

typedef struct { /* a growing list of ids; when memory runs out it sets failed */
    int32_t *id;
    int n, cap, failed;
} tok_ids;

static void tok_ids_add(tok_ids *ids, int32_t id) {
    if (ids->n == ids->cap) {
        int cap = ids->cap ? ids->cap * 2 : 64;
        int32_t *p = realloc(ids->id, (size_t)cap * sizeof *p);
        if (!p) {
            ids->failed = 1;
            return;
        }
        ids->id = p, ids->cap = cap;
    }
    ids->id[ids->n++] = id;
}

static int32_t tok_find(const tok *t, str text) { /* the id of a token's text, or -1 */
    for (uint64_t i = str_hash(text) & t->table_mask; t->table[i]; i = (i + 1) & t->table_mask)
        if (str_eq(t->entry[t->table[i] - 1].text, text)) return (int32_t)t->table[i] - 1;
    return -1;
}

static uint64_t tok_hash_pair(str a, str b) { /* str_hash of a, a space, and b */
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < a.len; i++) h = (h ^ (unsigned char)a.ptr[i]) * 0x100000001b3u;
    h = (h ^ ' ') * 0x100000001b3u;
    for (size_t i = 0; i < b.len; i++) h = (h ^ (unsigned char)b.ptr[i]) * 0x100000001b3u;
    return h ^ h >> 29;
}

static int tok_find_merge(const tok *t, str a, str b) { /* its rank, or -1 */
    for (uint64_t i = tok_hash_pair(a, b) & t->merge_mask; t->merge_table[i]; i = (i + 1) & t->merge_mask) {
        str m = t->merge[t->merge_table[i] - 1];
        if (m.len == a.len + 1 + b.len && memcmp(m.ptr, a.ptr, a.len) == 0 && m.ptr[a.len] == ' ' && memcmp(m.ptr + a.len + 1, b.ptr, b.len) == 0)
            return (int)t->merge_table[i] - 1;
    }
    return -1;
}

/* ---- merging ---- */

typedef struct {
    str text;       /* len 0: merged into its left neighbour */
    int prev, next; /* -1 at the ends */
} tok_symbol;

typedef struct {
    float cost;     /* the lowest goes first; ties go to the left */
    int left;
    uint32_t len;   /* of the pair when it was found: a stale entry has another */
} tok_pair;

typedef struct { /* scratch of one call, for texts of up to `cap` symbols */
    tok_symbol *symbol;
    tok_pair *heap;
    int n_symbols, n_heap;
} tok_work;

static int tok_pair_before(tok_pair a, tok_pair b) { return a.cost != b.cost ? a.cost < b.cost : a.left < b.left; }

static void tok_heap_push(tok_work *w, tok_pair x) {
    int i = w->n_heap++;
    for (; i > 0 && tok_pair_before(x, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = x;
}

static tok_pair tok_heap_pop(tok_work *w) {
    tok_pair top = w->heap[0], x = w->heap[--w->n_heap];
    int i = 0;
    for (int child; (child = 2 * i + 1) < w->n_heap; i = child) {
        if (child + 1 < w->n_heap && tok_pair_before(w->heap[child + 1], w->heap[child])) child++;
        if (!tok_pair_before(w->heap[child], x)) break;
        w->heap[i] = w->heap[child];
    }
    w->heap[i] = x;
    return top;
}

static void tok_consider(const tok *t, tok_work *w, int left) { /* puts the pair (left, next) on the heap if it can merge */
    if (left < 0 || w->symbol[left].next < 0) return;
    str a = w->symbol[left].text, b = w->symbol[w->symbol[left].next].text;
    tok_pair p = {0, left, (uint32_t)(a.len + b.len)};
    if (t->kind == TOK_BPE) {
        int rank = tok_find_merge(t, a, b);
        if (rank < 0) return;
        p.cost = (float)rank;
    } else { /* neighbours are contiguous in the text */
        int32_t id = tok_find(t, str_make(a.ptr, a.len + b.len));
        if (id < 0) return;
        p.cost = -t->entry[id].score;
    }
    tok_heap_push(w, p);
}

/* Merges one word, already escaped as the vocabulary is (spaces as U+2581, or bytes as code points).
 * Each merge removes a symbol and adds at most two pairs, so the heap never holds more than 3n. */
static void tok_merge(const tok *t, tok_work *w, str word) {
    w->n_symbols = w->n_heap = 0;
    for (size_t i = 0; i < word.len;) {
        uint32_t cp;
        int k = utf8_decode(word.ptr + i, word.len - i, &cp);
        int s = w->n_symbols++;
        w->symbol[s].text = str_make(word.ptr + i, (size_t)k);
        w->symbol[s].prev = s - 1;
        i += (size_t)k;
        w->symbol[s].next = i < word.len ? s + 1 : -1;
    }
    for (int i = 0; i + 1 < w->n_symbols; i++) tok_consider(t, w, i);
    while (w->n_heap) {
        tok_pair p = tok_heap_pop(w);
        tok_symbol *left = &w->symbol[p.left];
        if (left->text.len == 0 || left->next < 0) continue;
        tok_symbol *right = &w->symbol[left->next];
        if (left->text.len + right->text.len != p.len) continue;
        left->text.len = p.len;
        right->text.len = 0;
        left->next = right->next;
        if (left->next >= 0) w->symbol[left->next].prev = p.left;
        tok_consider(t, w, left->prev);
        tok_consider(t, w, p.left);
    }
}

/* Emits the merged symbols. What is no token falls back to the tokens of its bytes, which a vocabulary without gaps has. */
static void tok_emit(const tok *t, const tok_work *w, tok_ids *out) {
    for (int s = 0; s >= 0 && s < w->n_symbols; s = w->symbol[s].next) {
        str text = w->symbol[s].text;
        int32_t id = tok_find(t, text);
        if (id >= 0) tok_ids_add(out, id);
        for (size_t i = 0; i < text.len && id < 0; i++) {
            int32_t b = t->kind == TOK_SPM ? t->byte[(unsigned char)text.ptr[i]] : tok_find(t, str_make(text.ptr + i, 1));
            if (b < 0 && t->kind == TOK_SPM) b = t->unk;
            if (b >= 0) tok_ids_add(out, b);
        }
    }
}

/* ---- encoding ---- */

typedef struct {
    int from, to; /* code points */
} tok_span;

/* Cuts spans by the pattern of one stage into its matches and what lies between them; a match of nothing is a cut. `out` has room for a
 * span for each code point. */
static int tok_cut(const tok_rules *r, int stage, const tok_text *text, const tok_span *in, int n_in, tok_span *out) {
    tok_match_state m = {r, text, 0, 0, 0, {0}};
    int n = 0;
    for (int s = 0; s < n_in; s++) {
        int gap = in[s].from;
        m.end = in[s].to;
        for (int i = in[s].from; i < in[s].to;) {
            int end = tok_match(&m, r->stage[stage], i);
            if (end >= 0 && gap < i) out[n].from = gap, out[n++].to = gap = i;
            if (end > i) out[n].from = i, out[n++].to = gap = end;
            i = end > i ? end : i + 1;
        }
        if (gap < in[s].to) out[n].from = gap, out[n++].to = in[s].to;
    }
    return n;
}

static void tok_encode_words(const tok *t, str raw, const tok_text *text, tok_span *spans, int n, tok_ids *out) {
    tok_work w = {malloc((size_t)text->at[text->n] * sizeof *w.symbol + 1), malloc((size_t)text->at[text->n] * 3 * sizeof *w.heap + 1), 0, 0};
    buf word = {0};
    for (int i = 0; i < n && w.symbol && w.heap && !word.failed; i++) {
        word.len = 0;
        for (uint32_t k = text->at[spans[i].from]; k < text->at[spans[i].to]; k++) {
            char utf8[4];
            buf_add(&word, utf8, (size_t)utf8_encode(t->to_unicode[(unsigned char)raw.ptr[k]], utf8));
        }
        int32_t whole = t->pre->ignore_merges ? tok_find(t, buf_str(&word)) : -1;
        if (whole >= 0) {
            tok_ids_add(out, whole);
            continue;
        }
        tok_merge(t, &w, buf_str(&word));
        tok_emit(t, &w, out);
    }
    if (!w.symbol || !w.heap || word.failed) out->failed = 1;
    free(w.symbol);
    free(w.heap);
    buf_free(&word);
}

static void tok_encode_bpe(const tok *t, str raw, tok_ids *out) {
    size_t n = raw.len + 1;
    tok_text text = {malloc(n * 4), malloc(n), malloc(n * 4), 0};
    tok_span *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b);
    if (text.cp && text.category && text.at && a && b) {
        for (size_t i = 0; i < raw.len; text.n++) {
            text.at[text.n] = (uint32_t)i;
            i += (size_t)utf8_decode(raw.ptr + i, raw.len - i, &text.cp[text.n]);
            text.category[text.n] = (unsigned char)unicode_category(text.cp[text.n]);
        }
        text.at[text.n] = (uint32_t)raw.len;
        int spans = text.n > 0;
        a[0].from = 0, a[0].to = text.n;
        for (int s = 0; s < t->rules.n_stages; s++) {
            spans = tok_cut(&t->rules, s, &text, a, spans, b);
            tok_span *swap = a;
            a = b, b = swap;
        }
        tok_encode_words(t, raw, &text, a, spans, out);
    } else out->failed = 1;
    free(text.cp), free(text.category), free(text.at), free(a), free(b);
}

static void tok_encode_spm(const tok *t, str raw, int space_first, tok_ids *out) {
    buf b = {0};
    if (space_first) buf_puts(&b, "\xe2\x96\x81");
    for (size_t i = 0; i < raw.len; i++) {
        if (raw.ptr[i] == ' ') buf_puts(&b, "\xe2\x96\x81");
        else buf_putc(&b, raw.ptr[i]);
    }
    tok_work w = {malloc(b.len * sizeof *w.symbol + 1), malloc(b.len * 3 * sizeof *w.heap + 1), 0, 0};
    if (!b.failed && w.symbol && w.heap) {
        tok_merge(t, &w, buf_str(&b));
        tok_emit(t, &w, out);
    } else out->failed = 1;
    free(w.symbol), free(w.heap);
    buf_free(&b);
}

typedef struct {
    str text;
    int32_t id; /* a token found in the text, or -1: text to encode */
} tok_piece_of_text;

/* Cuts one piece wherever token `id` stands in it; appends the parts to out. */
static int tok_split_piece(const tok *t, tok_piece_of_text in, int32_t id, tok_piece_of_text **out, int *n, int *cap) {
    str mark = t->entry[id].text, rest = in.text;
    for (;;) {
        if (*cap - *n < 2) {
            int more = *cap * 2 + 8;
            tok_piece_of_text *p = realloc(*out, (size_t)more * sizeof *p);
            if (!p) return 0;
            *out = p, *cap = more;
        }
        const char *at = in.id < 0 && rest.len ? memmem(rest.ptr, rest.len, mark.ptr, mark.len) : NULL;
        size_t before = at ? (size_t)(at - rest.ptr) : rest.len;
        if (before || in.id >= 0) (*out)[*n].text = str_make(rest.ptr, before), (*out)[(*n)++].id = in.id;
        if (!at) return 1;
        (*out)[*n].text = mark, (*out)[(*n)++].id = id;
        rest = str_make(at + mark.len, rest.len - before - mark.len);
        for (; t->entry[id].rstrip && rest.len && (*rest.ptr == ' ' || (*rest.ptr >= 9 && *rest.ptr <= 13)); rest.len--) rest.ptr++;
    }
}

static int tok_counts(const tok *t, int s, int flags) { /* may special token s stand in this text? */
    return t->entry[t->special[s]].type == TOK_USER || (flags & TOK_SPECIAL);
}

/* Marks the special tokens that occur in the text, in one pass over it: at each position the tokens that begin so are a range of
 * `spelled`, narrowed byte by byte. Where all that begin with a byte have been seen, it is passed over. */
static void tok_find_special(const tok *t, str text, int flags, unsigned char *seen) {
    int unseen[256] = {0};
    for (int s = 0; s < t->n_special; s++) unseen[(unsigned char)t->entry[t->special[s]].text.ptr[0]] += tok_counts(t, s, flags);
    for (size_t i = 0; i < text.len; i++) {
        unsigned char head = (unsigned char)text.ptr[i];
        int lo = t->spelled_from[head], hi = t->spelled_from[head + 1];
        if (!unseen[head]) continue;
        for (size_t depth = 1; lo < hi; depth++) {
            for (; lo < hi && t->entry[t->special[t->spelled[lo]]].text.len == depth; lo++) {
                int s = t->spelled[lo];
                if (!seen[s] && tok_counts(t, s, flags)) seen[s] = 1, unseen[head]--;
            }
            if (i + depth >= text.len) break;
            int c = (unsigned char)text.ptr[i + depth], from[2], end = hi;
            for (int k = 0; k < 2; k++) { /* the first token whose byte is at least c, then more than c */
                int a = lo, b = end;
                while (a < b) {
                    int mid = (a + b) / 2;
                    if ((unsigned char)t->entry[t->special[t->spelled[mid]]].text.ptr[depth] < c + k) a = mid + 1;
                    else b = mid;
                }
                from[k] = a;
            }
            lo = from[0], hi = from[1];
        }
    }
}

/* Cuts the text at the tokens that may stand in it as such, the longest first. User-defined tokens always count; control tokens
 * only with TOK_SPECIAL. */
static tok_piece_of_text *tok_partition(const tok *t, str text, int flags, int *count) {
    int n = 1, cap = 8;
    tok_piece_of_text *pieces = malloc((size_t)cap * sizeof *pieces);
    unsigned char *seen = sys_zalloc((size_t)t->n_special + 1, 1);
    if (!pieces || !seen) return free(pieces), free(seen), NULL;
    pieces[0].text = text, pieces[0].id = -1;
    tok_find_special(t, text, flags, seen);
    for (int s = 0; s < t->n_special; s++) {
        if (!seen[s]) continue;
        tok_piece_of_text *out = NULL;
        int n_out = 0, out_cap = 0, ok = 1;
        for (int i = 0; i < n && ok; i++) ok = tok_split_piece(t, pieces[i], t->special[s], &out, &n_out, &out_cap);
        free(pieces);
        if (!ok) return free(out), free(seen), NULL;
        pieces = out, n = n_out;
    }
    free(seen);
    *count = n;
    return pieces;
}

/* Appends the ids of a text to out. Returns 0 if the text is not UTF-8 or memory ran out. Any thread. */
static int tok_encode(const tok *t, str text, int flags, tok_ids *out) {
    if (utf8_count(text) < 0 || text.len > (size_t)1 << 30) return 0;
    if ((flags & TOK_BOS) && t->add_bos && t->bos >= 0) tok_ids_add(out, t->bos);
    int n = 0, after_special = 1;
    tok_piece_of_text *piece = text.len ? tok_partition(t, text, flags, &n) : NULL;
    if (text.len && !piece) return 0;
    for (int i = 0; i < n; i++) {
        if (piece[i].id >= 0) tok_ids_add(out, piece[i].id);
        else if (t->kind == TOK_BPE) tok_encode_bpe(t, piece[i].text, out);
        else tok_encode_spm(t, piece[i].text, t->add_space_prefix && after_special, out);
        after_special = piece[i].id >= 0;
    }
    free(piece);
    if ((flags & TOK_BOS) && t->add_eos && t->eos >= 0) tok_ids_add(out, t->eos);
    return !out->failed;
}

/* ---- decoding ---- */

static int tok_hex_byte(str s) { /* the value of "<0x1F>", or -1 */
    if (s.len != 6 || memcmp(s.ptr, "<0x", 3) || s.ptr[5] != '>') return -1;
    char quad[4] = {'0', '0', s.ptr[3], s.ptr[4]};
    return json_hex4(quad, quad + 4);
}

/* Appends the bytes that a token stands for. Control tokens have none unless `special`, unused ones never. What a model's own
 * tokenizer may do to clean up spaces (" ." to ".") is not done: the text is what the model said. */
static void tok_piece(const tok *t, int32_t id, int special, buf *out) {
    if (id < 0 || id >= t->n) return;
    const tok_entry *e = &t->entry[id];
    if (e->type == TOK_CONTROL || e->type == TOK_UNKNOWN) {
        if (special || e->shown) buf_add(out, e->text.ptr, e->text.len);
        return;
    }
    if (e->type == TOK_UNUSED || e->type == TOK_UNDEFINED) return;
    if (e->type == TOK_BYTE && tok_hex_byte(e->text) >= 0) {
        buf_putc(out, (char)tok_hex_byte(e->text));
        return;
    }
    if (e->type == TOK_USER) {
        buf_add(out, e->text.ptr, e->text.len);
        return;
    }
    for (size_t i = 0; i < e->text.len;) {
        uint32_t cp = 0;
        int k = utf8_decode(e->text.ptr + i, e->text.len - i, &cp);
        if (k <= 0) k = 1, cp = 0x10ffff; /* a vocabulary may hold bytes that are no text */
        if (t->kind == TOK_SPM && cp == 0x2581) buf_putc(out, ' ');
        else if (t->kind == TOK_BPE && cp < 0x144 && t->from_unicode[cp]) buf_putc(out, (char)(t->from_unicode[cp] - 1));
        else buf_add(out, e->text.ptr + i, (size_t)k);
        i += (size_t)k;
    }
}

/* The text of a list of ids, without the spaces that encoding puts before text at the beginning and after each
 * token that stood in the text as such. */
static void tok_decode(const tok *t, const int32_t *id, int n, int special, buf *out) {
    int first = 1;
    for (int i = 0; i < n; i++) {
        size_t from = out->len;
        tok_piece(t, id[i], special, out);
        int type = id[i] >= 0 && id[i] < t->n ? t->entry[id[i]].type : TOK_NORMAL, mark = type == TOK_CONTROL || type == TOK_USER;
        if (first && !mark && t->kind == TOK_SPM && t->add_space_prefix && out->len > from && out->ptr[from] == ' ' &&
            type != TOK_BYTE) {
            memmove(out->ptr + from, out->ptr + from + 1, out->len - from - 1);
            out->len--;
        }
        first = mark;
    }
}

/* ---- loading ---- */

static int tok_load_texts(tok *t, const gguf_file *g, char *err, size_t cap) {
    const gguf_kv *tokens = gguf_get_array(g, "tokenizer.ggml.tokens", GGUF_STRING);
    const gguf_kv *scores = gguf_find(g, "tokenizer.ggml.scores"), *types = gguf_find(g, "tokenizer.ggml.token_type");
    if (!tokens || tokens->count == 0) return sys_fail(err, cap, "%s: no tokenizer.ggml.tokens: the file has no vocabulary", g->path);
    if (tokens->count > MAX_VOCAB) return sys_fail(err, cap, "%s: a vocabulary of %llu tokens is not supported", g->path, (unsigned long long)tokens->count);
    t->n = (int)tokens->count;
    if (scores && (!scores->is_array || scores->type != GGUF_F32 || scores->count != tokens->count))
        return sys_fail(err, cap, "%s: tokenizer.ggml.scores must be an array of %d f32", g->path, t->n);
    if (types && (!types->is_array || (types->type != GGUF_I32 && types->type != GGUF_U32) || types->count != tokens->count))
        return sys_fail(err, cap, "%s: tokenizer.ggml.token_type must be an array of %d i32", g->path, t->n);
    t->entry = sys_zalloc((size_t)t->n, sizeof *t->entry);
    for (t->table_mask = 1; t->table_mask < 2 * (uint64_t)t->n; t->table_mask *= 2) continue;
    t->table = sys_zalloc((size_t)t->table_mask, sizeof *t->table);
    t->table_mask--;
    if (!t->entry || !t->table) return sys_fail(err, cap, "%s: out of memory for the vocabulary", g->path);
    const unsigned char *p = tokens->value;
    for (int i = 0; i < t->n; i++) {
        tok_entry *e = &t->entry[i];
        uint64_t len;
        int32_t type = TOK_NORMAL;
        memcpy(&len, p, 8);
        e->text = str_make((const char *)p + 8, (size_t)len);
        p += 8 + len;
        if (scores) memcpy(&e->score, scores->value + 4 * (size_t)i, 4);
        if (e->score != e->score) return sys_fail(err, cap, "%s: tokenizer.ggml.scores[%d] is not a number", g->path, i);
        if (types) memcpy(&type, types->value + 4 * (size_t)i, 4);
        e->type = type >= TOK_NORMAL && type <= TOK_BYTE ? (unsigned char)type : TOK_UNDEFINED;
        uint64_t h = str_hash(e->text) & t->table_mask; /* of two tokens with one text the later counts */
        while (t->table[h] && !str_eq(t->entry[t->table[h] - 1].text, e->text)) h = (h + 1) & t->table_mask;
        t->table[h] = (uint32_t)i + 1;
    }
    return 1;
}

static int tok_load_merges(tok *t, const gguf_file *g, char *err, size_t cap) {
    const gguf_kv *kv = gguf_get_array(g, "tokenizer.ggml.merges", GGUF_STRING);
    if (!kv || kv->count > MAX_VOCAB) return sys_fail(err, cap, "%s: tokenizer.ggml.merges must be an array of strings", g->path);
    t->n_merges = (int)kv->count;
    t->merge = sys_zalloc((size_t)t->n_merges, sizeof *t->merge);
    for (t->merge_mask = 1; t->merge_mask < 2 * (uint64_t)t->n_merges; t->merge_mask *= 2) continue;
    t->merge_table = sys_zalloc((size_t)t->merge_mask, sizeof *t->merge_table);
    t->merge_mask--;
    if (!t->merge || !t->merge_table) return sys_fail(err, cap, "%s: out of memory for the merges", g->path);
    const unsigned char *p = kv->value;
    for (int i = 0; i < t->n_merges; i++) {
        uint64_t len;
        memcpy(&len, p, 8);
        t->merge[i] = str_make((const char *)p + 8, (size_t)len);
        p += 8 + len;
        uint64_t h = str_hash(t->merge[i]) & t->merge_mask;
        while (t->merge_table[h] && !str_eq(t->merge[t->merge_table[h] - 1], t->merge[i])) h = (h + 1) & t->merge_mask;
        if (!t->merge_table[h]) t->merge_table[h] = (uint32_t)i + 1;
    }
    return 1;
}

/* GPT-2's map of bytes to visible code points: printable Latin-1 stays, the rest becomes 256, 257, ... */
static void tok_init_bytes(tok *t) {
    uint16_t next = 256;
    for (int b = 0; b < 256; b++) {
        int stays = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        t->to_unicode[b] = stays ? (uint16_t)b : next++;
        t->from_unicode[t->to_unicode[b]] = (uint16_t)(b + 1);
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned)b);
        t->byte[b] = tok_find(t, str_of(name));
        char raw = (char)b;
        if (t->byte[b] < 0) t->byte[b] = tok_find(t, str_make(&raw, 1));
    }
}

static int tok_find_pre(tok *t, str want) {
    for (size_t i = 0; i < sizeof tok_pres / sizeof *tok_pres; i++)
        for (const char *p = tok_pres[i].names; *p;) {
            size_t n = strcspn(p, " ");
            if (str_eq(str_make(p, n), want)) t->pre = &tok_pres[i];
            p += n + (p[n] == ' ');
        }
    if (t->pre) tok_parse_rules(t->pre, &t->rules);
    return t->pre != NULL;
}

static int tok_load_pre(tok *t, const gguf_file *g, const char *override, char *err, size_t cap) {
    str want = override && *override ? str_of(override) : gguf_get_str(g, "tokenizer.ggml.pre");
    char shown[96];
    if (want.len == 0) {
        log_note(LOG_WARN, "model_load_progress", "\"warning\":\"the file names no pre-tokenizer: 'default' cuts words, perhaps not as the model learnt them\"");
        want = str_of("default");
    }
    if (tok_find_pre(t, want)) return 1;
    return sys_fail(err, cap, "%s: pre-tokenizer '%s' is not supported; README.md lists those that are, and --pre NAME chooses one", g->path,
                    gguf_show(want, shown));
}

static int32_t tok_special_id(const tok *t, const gguf_file *g, const char *key) {
    if (!gguf_find(g, key)) return -1;
    uint64_t id = gguf_get_uint(g, key, UINT64_MAX);
    if (id < (uint64_t)t->n) return (int32_t)id;
    log_note(LOG_WARN, "model_load_progress", "\"warning\":\"%s is outside the vocabulary and is ignored\"", key);
    return -1;
}

/* Tokens with a part to play: the file's keys say which, or else the first of the well-known texts that is in the vocabulary. */
#define TOK_FW "\xef\xbd\x9c" /* the wide bar of DeepSeek's tokens */
#define TOK_LOW "\xe2\x96\x81" /* SentencePiece's space */
static const struct {
    const char *keys, *texts; /* separated by spaces */
    int ends;
} tok_roles[] = {
    {"eot", "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT> [EOT] <" TOK_FW "end" TOK_LOW "of" TOK_LOW "sentence" TOK_FW "> "
     "<end_of_utterance>", 1},
    {"eom", "<|eom_id|>", 1},
    {"fim_pre prefix", "<|fim_prefix|> <fim-prefix> <fim_prefix> <" TOK_FW "fim" TOK_LOW "begin" TOK_FW "> <PRE> " TOK_LOW "<PRE> <|code_prefix|> <|prefix|>", 0},
    {"fim_suf suffix", "<|fim_suffix|> <fim-suffix> <fim_suffix> <" TOK_FW "fim" TOK_LOW "hole" TOK_FW "> <SUF> " TOK_LOW "<SUF> <|code_suffix|> <|suffix|>", 0},
    {"fim_mid middle", "<|fim_middle|> <fim-middle> <fim_middle> <" TOK_FW "fim" TOK_LOW "end" TOK_FW "> <MID> " TOK_LOW "<MID> <|code_middle|> <|middle|>", 0},
    {"fim_pad", "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]", 1},
    {"fim_rep", "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>", 1},
    {"fim_sep", "<|file_sep|>", 1},
};
/* Every token with one of these texts ends a generation. */
static const char tok_end_texts[] = "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> "
    "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <" TOK_FW "end" TOK_LOW "of" TOK_LOW "sentence" TOK_FW "> [e~[";
/* These control tokens shape the answers of gpt-oss: a client needs them to tell channels apart. */
static const char tok_shown_texts[] = "<|channel|> <|message|> <|start|> <|constrain|>";

static int32_t tok_next_of(const tok *t, const char **list, int *more) { /* the token of the next text of a list, or -1 */
    size_t n = strcspn(*list, " ");
    *more = n > 0;
    int32_t id = n ? tok_find(t, str_make(*list, n)) : -1;
    *list += n + ((*list)[n] == ' ');
    return id;
}

static void tok_mark_role(tok *t, const gguf_file *g, const char *keys, const char *texts, int ends) {
    int32_t id = -1;
    char key[64];
    for (size_t n; id < 0 && (n = strcspn(keys, " ")) > 0; keys += n + (keys[n] == ' ')) {
        snprintf(key, sizeof key, "tokenizer.ggml.%.*s_token_id", (int)n, keys);
        id = tok_special_id(t, g, key);
    }
    for (int more = id < 0; more && id < 0;)
        if ((id = tok_next_of(t, &texts, &more)) >= 0) t->entry[id].type = TOK_CONTROL;
    if (id >= 0 && ends) t->entry[id].ends = 1;
}

/* Finds what llama.cpp takes for end-of-generation tokens. Those that look like control tokens become some, whatever the file calls them. */
static void tok_mark_ends(tok *t, const gguf_file *g) {
    const char *list = tok_end_texts;
    for (size_t i = 0; i < sizeof tok_roles / sizeof *tok_roles; i++) tok_mark_role(t, g, tok_roles[i].keys, tok_roles[i].texts, tok_roles[i].ends);
    if (t->eos >= 0) t->entry[t->eos].ends = 1;
    for (int more = 1; more;) {
        int32_t id = tok_next_of(t, &list, &more);
        if (id >= 0) t->entry[id].ends = 1, t->entry[id].type = TOK_CONTROL;
    }
    list = tok_shown_texts;
    for (int more = 1; more;) {
        int32_t id = tok_next_of(t, &list, &more);
        if (id >= 0) t->entry[id].shown = 1, t->entry[id].type = TOK_CONTROL;
    }
    int32_t end = tok_find(t, str_of("<|end|>")), s = tok_find(t, str_of("</s>"));
    int call = tok_find(t, str_of("<|call|>")) >= 0, calls = call || tok_find(t, str_of("<|calls|>")) >= 0;
    if (end >= 0 && calls && (tok_find(t, str_of("<|return|>")) >= 0 || tok_find(t, str_of("<|flush|>")) >= 0))
        t->entry[end].ends = 0, t->entry[end].shown = 1; /* in harmony it ends a message, not the turn */
    if (s >= 0 && tok_find(t, str_of("<|tool_response>")) >= 0) t->entry[s].ends = 0, t->entry[s].type = TOK_NORMAL; /* gemma 4's </s> is HTML */
}

typedef struct { /* for sorting tokens by their texts */
    int32_t id;
    str text;
} tok_text_of;
static int tok_longer_first(const void *a, const void *b) {
    const tok_text_of *x = a, *y = b;
    if (x->text.len != y->text.len) return x->text.len > y->text.len ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}
static int tok_by_bytes(const void *a, const void *b) { /* a text before those that it begins */
    const tok_text_of *x = a, *y = b;
    int order = memcmp(x->text.ptr, y->text.ptr, x->text.len < y->text.len ? x->text.len : y->text.len);
    return order ? order : (x->text.len > y->text.len) - (x->text.len < y->text.len);
}

static int tok_is_special(const tok_entry *e) { return (e->type == TOK_CONTROL || e->type == TOK_USER || e->type == TOK_UNKNOWN) && e->text.len; }

static int tok_collect_special(tok *t) {
    for (int i = 0; i < t->n; i++) t->n_special += tok_is_special(&t->entry[i]);
    size_t n = (size_t)t->n_special;
    tok_text_of *sort = sys_zalloc(n, sizeof *sort);
    t->special = sys_zalloc(n, sizeof *t->special);
    t->spelled = sys_zalloc(n, sizeof *t->spelled);
    if (!sort || !t->special || !t->spelled) return free(sort), 0;
    for (int i = 0, k = 0; i < t->n; i++)
        if (tok_is_special(&t->entry[i])) sort[k].id = i, sort[k++].text = t->entry[i].text;
    qsort(sort, n, sizeof *sort, tok_longer_first);
    for (size_t i = 0; i < n; i++) t->special[i] = sort[i].id, sort[i].id = (int32_t)i;
    qsort(sort, n, sizeof *sort, tok_by_bytes);
    for (size_t i = 0; i < n; i++) t->spelled[i] = sort[i].id, t->spelled_from[(unsigned char)sort[i].text.ptr[0] + 1]++;
    for (int b = 0; b < 256; b++) t->spelled_from[b + 1] += t->spelled_from[b];
    free(sort);
    return 1;
}

/* Phi-3's tokens swallow white space after them; files do not say so, but for the model's name. */
static void tok_mark_rstrip(tok *t, str model_name) {
    int phi3 = 0;
    for (size_t i = 0; i + 4 <= model_name.len; i++)
        phi3 |= str_ieq(str_make(model_name.ptr + i, 4), "phi3") || (i + 5 <= model_name.len && str_ieq(str_make(model_name.ptr + i, 5), "phi-3"));
    for (int s = 0; s < t->n_special && phi3; s++) {
        tok_entry *e = &t->entry[t->special[s]];
        e->rstrip = !str_is(e->text, "<unk>") && !str_is(e->text, "<s>") && !str_is(e->text, "<|endoftext|>");
    }
}

static void tok_free(tok *t) {
    if (!t) return;
    free(t->entry), free(t->table), free(t->merge), free(t->merge_table), free(t->special), free(t->spelled), free(t->end);
    free(t);
}

/* What the other tokenizers are, for the message that refuses them. */
static const struct { const char *model, *what; } tok_other[] = {
    {"bert", "WordPiece"}, {"t5", "Unigram"}, {"rwkv", "a greedy trie"}, {"plamo2", "Unigram by suffixes"}, {"gemma4", "BPE without words or bytes"},
    {"whitespace", "BPE without bytes"}, {"hybriddna", "BPE with k-mers"}, {"none", "no vocabulary"}, {"no_vocab", "no vocabulary"},
};

static int tok_load_kind(tok *t, const gguf_file *g, char *err, size_t cap) {
    str model = gguf_get_str(g, "tokenizer.ggml.model");
    const char *what = "unknown";
    char shown[96];
    if (str_is(model, "llama")) return t->kind = TOK_SPM, t->name = "gguf-spm", 1;
    if (str_is(model, "gpt2")) return t->kind = TOK_BPE, t->name = "gguf-bpe", 1;
    for (size_t i = 0; i < sizeof tok_other / sizeof *tok_other; i++)
        if (str_is(model, tok_other[i].model)) what = tok_other[i].what;
    return sys_fail(err, cap, "%s: tokenizer '%s' (%s) is not supported; supported: llama (SentencePiece), gpt2 (byte-level BPE)", g->path,
                    gguf_show(model, shown), what);
}

/* BOS, EOS and the unknown token, with what a file without the keys means. */
static void tok_load_ids(tok *t, const gguf_file *g) {
    int spm = t->kind == TOK_SPM, fallback = t->n > 11 && t->entry[11].type == TOK_CONTROL ? 11 : -1; /* Falcon's <|endoftext|> */
    t->bos = tok_special_id(t, g, "tokenizer.ggml.bos_token_id");
    t->eos = tok_special_id(t, g, "tokenizer.ggml.eos_token_id");
    t->unk = tok_special_id(t, g, "tokenizer.ggml.unknown_token_id");
    if (t->bos < 0) t->bos = !spm ? fallback : t->n > 1 ? 1 : -1;
    if (t->eos < 0) t->eos = !spm ? fallback : t->n > 2 ? 2 : -1;
    if (spm && t->unk < 0) t->unk = 0;
    t->add_bos = gguf_get_bool(g, "tokenizer.ggml.add_bos_token", spm || t->pre->add_bos);
    t->add_eos = gguf_get_bool(g, "tokenizer.ggml.add_eos_token", 0);
    t->add_space_prefix = gguf_get_bool(g, "tokenizer.ggml.add_space_prefix", spm);
}

/* Reads the vocabulary. `pre` overrides tokenizer.ggml.pre ("" or NULL: does not). NULL with err set. */
static tok *tok_load(const gguf_file *g, const char *pre, char *err, size_t cap) {
    tok *t = sys_zalloc(1, sizeof *t);
    if (!t) return sys_fail(err, cap, "out of memory"), NULL;
    int ok = tok_load_kind(t, g, err, cap) && tok_load_texts(t, g, err, cap);
    if (ok && t->kind == TOK_BPE) ok = tok_load_merges(t, g, err, cap) && tok_load_pre(t, g, pre, err, cap);
    if (!ok) return tok_free(t), NULL;
    tok_init_bytes(t);
    tok_load_ids(t, g);
    tok_mark_ends(t, g);
    for (int i = 0; i < t->n; i++) t->n_end += t->entry[i].ends;
    t->end = sys_zalloc((size_t)t->n_end, sizeof *t->end);
    if (!t->end || !tok_collect_special(t)) return sys_fail(err, cap, "out of memory"), tok_free(t), NULL;
    tok_mark_rstrip(t, gguf_get_str(g, "general.name"));
    for (int i = 0, n = 0; i < t->n; i++)
        if (t->entry[i].ends) t->end[n++] = i;
    return t;
}

/* ==== KV cache =============================================================================
 * Keys and values of past tokens, in blocks of KV_BLOCK positions from one pool that is sized at start. A
 * block holds all layers; within a layer each KV head has K as [head_dim][KV_BLOCK], so that vector lanes
 * are positions, then V as [KV_BLOCK][head_dim], so that lanes are columns. A sequence holds references to the
 * blocks in its table, in the order of its positions.
 *
 * The same tokens give the same bits, so a full block may serve every sequence that begins alike. Such a
 * block is published under its 64 tokens, the block before it and the tenant's key; kv_find compares all of
 * these, never a hash alone, so by induction two sequences share a block only if all their tokens up to its
 * end are equal. A block that no sequence holds stays published, least recently used first to go, until its
 * room is needed. The pool has no lock: the engine calls it under its own. */

enum { KV_NONE = -1 };

typedef struct {
    int n_layer, n_head_kv, head_dim;
    enum mat_kv kv;
    size_t head_bytes, layer_bytes, conv_bytes, block_bytes; /* conv_bytes: of a layer with a convolution in its place */
} kv_layout;

typedef struct { /* what is known of a block */
    int refs;           /* sequences that hold it */
    int published;      /* in the table below */
    int parent;         /* the block before it, or KV_NONE for the first of a sequence */
    uint32_t life;      /* counts the times that the block was given new content: a stale parent does not match */
    uint32_t parent_life;
    uint64_t key;       /* the tenant's */
    int32_t token[KV_BLOCK];
    int next;           /* of the same bucket */
    int older, newer;   /* among the unreferenced published blocks */
} kv_block;

typedef struct {
    kv_layout layout;
    char *base;         /* [n_blocks][block_bytes] */
    uint32_t *free;     /* stack of blocks that hold nothing */
    kv_block *block;    /* [n_blocks] */
    int *bucket;        /* [n_buckets] first block of each, or KV_NONE */
    int n_blocks, n_free, n_idle; /* n_idle: published and unreferenced */
    int n_buckets;      /* a power of two */
    int oldest, newest; /* ends of the list of idle blocks */
} kv_pool;

typedef struct {
    uint32_t *block;    /* [n_blocks], from the pool */
    int n_blocks;
    int n_published;    /* of these, from the first on: shared or offered for sharing */
} kv_seq;

static kv_layout kv_layout_of(int n_layer, int n_head_kv, int head_dim, enum mat_kv kv) {
    kv_layout l = {n_layer, n_head_kv, head_dim, kv, mat_head_bytes(head_dim, kv), 0, 0, 0};
    l.layer_bytes = l.head_bytes * (size_t)n_head_kv;
    l.block_bytes = l.layer_bytes * (size_t)n_layer;
    return l;
}

static int kv_blocks_for(int64_t n_tokens) { return (int)((n_tokens + KV_BLOCK - 1) / KV_BLOCK); }

static void kv_pool_close(kv_pool *p) {
    sys_pages_free(p->base, p->layout.block_bytes * (size_t)p->n_blocks);
    free(p->free), free(p->block), free(p->bucket);
    memset(p, 0, sizeof *p);
}

static int kv_pool_open(kv_pool *p, kv_layout layout, int n_blocks) {
    memset(p, 0, sizeof *p);
    p->layout = layout, p->n_blocks = p->n_free = n_blocks;
    for (p->n_buckets = 1; p->n_buckets < n_blocks; p->n_buckets *= 2) continue;
    p->base = sys_pages(layout.block_bytes * (size_t)n_blocks);
    p->free = sys_zalloc((size_t)n_blocks, sizeof *p->free);
    p->block = sys_zalloc((size_t)n_blocks, sizeof *p->block);
    p->bucket = sys_zalloc((size_t)p->n_buckets, sizeof *p->bucket);
    if (!p->base || !p->free || !p->block || !p->bucket) return kv_pool_close(p), 0;
    for (int i = 0; i < n_blocks; i++) p->free[i] = (uint32_t)(n_blocks - 1 - i);
    for (int i = 0; i < p->n_buckets; i++) p->bucket[i] = KV_NONE;
    p->oldest = p->newest = KV_NONE;
    return 1;
}

static int kv_available(const kv_pool *p) { return p->n_free + p->n_idle; }

/* ---- the list of idle blocks, and the table of published ones ---- */

static void kv_idle_add(kv_pool *p, int b) { /* as the newest */
    p->block[b].older = p->newest, p->block[b].newer = KV_NONE;
    *(p->newest == KV_NONE ? &p->oldest : &p->block[p->newest].newer) = b;
    p->newest = b, p->n_idle++;
}

static void kv_idle_remove(kv_pool *p, int b) {
    kv_block *k = &p->block[b];
    *(k->older == KV_NONE ? &p->oldest : &p->block[k->older].newer) = k->newer;
    *(k->newer == KV_NONE ? &p->newest : &p->block[k->newer].older) = k->older;
    p->n_idle--;
}

static int *kv_bucket_of(const kv_pool *p, int parent, uint64_t key, const int32_t *token) {
    uint64_t h = key ^ (uint64_t)(parent + 1) * 0x9e3779b97f4a7c15u;
    for (int i = 0; i < KV_BLOCK; i++) h = (h ^ (uint32_t)token[i]) * 0x100000001b3u, h ^= h >> 29;
    return &p->bucket[h & (uint64_t)(p->n_buckets - 1)];
}

/* The published block with these KV_BLOCK tokens after `parent`, or KV_NONE. */
static int kv_find(const kv_pool *p, int parent, uint64_t key, const int32_t *token) {
    for (int b = *kv_bucket_of(p, parent, key, token); b != KV_NONE; b = p->block[b].next) {
        const kv_block *k = &p->block[b];
        if (k->parent == parent && k->key == key && (parent == KV_NONE || k->parent_life == p->block[parent].life) &&
            memcmp(k->token, token, sizeof k->token) == 0)
            return b;
    }
    return KV_NONE;
}

static void kv_unpublish(kv_pool *p, int b) {
    kv_block *k = &p->block[b];
    for (int *at = kv_bucket_of(p, k->parent, k->key, k->token); *at != KV_NONE; at = &p->block[*at].next)
        if (*at == b) {
            *at = k->next;
            break;
        }
    k->published = 0;
}

/* ---- taking and giving back ---- */

static uint32_t kv_take(kv_pool *p) { /* a block to write into; the caller has seen that there is one */
    int b;
    if (p->n_free) b = (int)p->free[--p->n_free];
    else {
        b = p->oldest;
        kv_idle_remove(p, b);
        kv_unpublish(p, b);
    }
    p->block[b].refs = 1, p->block[b].life++;
    return (uint32_t)b;
}

static void kv_hold(kv_pool *p, int b) {
    if (p->block[b].refs++ == 0) kv_idle_remove(p, b);
}

static void kv_drop(kv_pool *p, int b) {
    if (--p->block[b].refs > 0) return;
    if (p->block[b].published) kv_idle_add(p, b);
    else p->free[p->n_free++] = (uint32_t)b;
}

/* Gives a sequence blocks for n_tokens positions beyond those it has; all or nothing. Its table must have
 * room for kv_blocks_for(n_tokens). */
static int kv_reserve(kv_pool *p, kv_seq *s, int64_t n_tokens) {
    int need = kv_blocks_for(n_tokens);
    if (need - s->n_blocks > kv_available(p)) return 0;
    while (s->n_blocks < need) s->block[s->n_blocks++] = kv_take(p);
    return 1;
}

/* The last block goes first and so becomes the oldest: the beginnings of texts are what others share. */
static void kv_release(kv_pool *p, kv_seq *s) {
    while (s->n_blocks) kv_drop(p, (int)s->block[--s->n_blocks]);
    s->n_published = 0;
}

/* ---- sharing ---- */

/* The next block of the sequence's tokens that is published already, or KV_NONE. */
static int kv_next_shared(const kv_pool *p, const kv_seq *s, uint64_t key, const int32_t *token, int n_token) {
    int n = s->n_published;
    if ((n + 1) * KV_BLOCK > n_token) return KV_NONE;
    return kv_find(p, n ? (int)s->block[n - 1] : KV_NONE, key, token + n * KV_BLOCK);
}

/* Lets an empty sequence begin with published blocks, as far as they hold its first n_token tokens. Returns
 * the number of positions that they save. */
static int kv_share(kv_pool *p, kv_seq *s, uint64_t key, const int32_t *token, int n_token) {
    for (int b; (b = kv_next_shared(p, s, key, token, n_token)) != KV_NONE; s->n_published++) {
        kv_hold(p, b);
        s->block[s->n_blocks++] = (uint32_t)b;
    }
    return s->n_blocks * KV_BLOCK;
}

/* Exchanges the sequence's next block for a published one with the same tokens, if there is one: another
 * sequence has computed it meanwhile. Returns whether there was. */
static int kv_share_next(kv_pool *p, kv_seq *s, uint64_t key, const int32_t *token, int n_token) {
    int b = kv_next_shared(p, s, key, token, n_token);
    if (b == KV_NONE || s->n_published >= s->n_blocks) return 0;
    kv_hold(p, b);
    kv_drop(p, (int)s->block[s->n_published]);
    s->block[s->n_published++] = (uint32_t)b;
    return 1;
}

/* Publishes the blocks that n_computed tokens have filled. */
static void kv_publish(kv_pool *p, kv_seq *s, uint64_t key, const int32_t *token, int n_computed) {
    while ((s->n_published + 1) * KV_BLOCK <= n_computed) {
        if (kv_share_next(p, s, key, token, n_computed)) continue; /* the bits are the same: keep one of the two */
        int n = s->n_published, b = (int)s->block[n];
        kv_block *k = &p->block[b];
        k->parent = n ? (int)s->block[n - 1] : KV_NONE;
        k->parent_life = n ? p->block[k->parent].life : 0;
        k->key = key, k->published = 1;
        memcpy(k->token, token + n * KV_BLOCK, sizeof k->token);
        int *bucket = kv_bucket_of(p, k->parent, key, k->token);
        k->next = *bucket, *bucket = b;
        s->n_published++;
    }
}

/* ==== Model ================================================================================
 * The shapes and tensors of a model, bound once to fields by tables, and the forward pass over a batch of
 * tokens. A family is a row of model_archs: which tensors its layers have, and how it differs in style; the
 * forward pass asks the layer, never the family. A model is read-only once loaded; model_run owns the scratch
 * and the logits of one thread of use. Names: n_embd, n_head, n_head_kv, head_dim, n_ff, n_ctx as usual. */

typedef struct {
    const quant_format *format; /* NULL: absent */
    const char *data;           /* [rows][n], in the mapped file; of experts one after the other */
    int64_t n, rows;
} model_matrix;

typedef struct { /* what a file lacks is NULL or absent */
    int window;                              /* positions that a token sees, itself included; 0: all */
    int rope;                                /* table of angles: 0, 1 (of layers with a window), or -1: positions do not turn */
    int is_conv, has_experts;
    float *attn_norm, *attn_norm_bias, *ffn_norm, *ffn_norm_bias; /* [n_embd] before attention and feed-forward */
    float *attn_post_norm, *ffn_post_norm;   /* [n_embd] after them */
    float *q_norm, *k_norm;                  /* [head_dim], or of all heads */
    float *q_bias, *k_bias, *v_bias, *o_bias, *gate_bias, *up_bias, *down_bias;
    float *sinks;                            /* [n_head] */
    float *conv;                             /* [n_embd][n_conv] */
    float *route_bias, *choice_bias;         /* [n_expert] added to the router's logits; to its choice only */
    float *gates_bias, *ups_bias, *downs_bias; /* [n_expert][n_ff_exp] x2, [n_expert][n_embd] */
    model_matrix q, k, v, o;                 /* [n_head*head_dim][n_embd], [n_head_kv*head_dim][n_embd] x2, [n_embd][n_head*head_dim] */
    model_matrix conv_in;                    /* [3*n_embd][n_embd]; then o is [n_embd][n_embd] */
    float *q_a_norm, *kv_a_norm;             /* [n_q_rank], [n_latent] of latent attention */
    model_matrix q_a, q_b;                   /* [n_q_rank][n_embd], [n_head*k_len][n_q_rank]: or q alone, [n_head*k_len][n_embd] */
    model_matrix kv_a, kv_b;                 /* [n_latent+n_rot][n_embd], [n_head*(k_len-n_rot+v_len)][n_latent] */
    model_matrix k_heads, v_heads;           /* instead of kv_b: [n_head][n_latent][k_len-n_rot], [n_head][v_len][n_latent] */
    model_matrix gate, up, down;             /* [n_ff][n_embd] x2, [n_embd][n_ff]: the feed-forward layer, or the shared expert */
    model_matrix route, share;               /* [n_expert][n_embd]; [1][n_embd] the shared expert's gate */
    model_matrix gates, ups, downs;          /* [n_expert][n_ff_exp][n_embd] x2, [n_expert][n_embd][n_ff_exp] */
} model_layer;

/* Groups of tensors. A layer has the groups of its family; MAY lists those that any file may have. */
enum model_group {
    T_BASE = 1,             /* the embedding */
    T_ATTN = 1 << 1,        /* q, k, v, o */
    T_FUSED = 1 << 2,       /* q, k, v in one tensor */
    T_ATTN_NORM = 1 << 3,
    T_FFN_NORM = 1 << 4,
    T_POST_NORM = 1 << 5,   /* after attention and after feed-forward */
    T_LATE_NORM = 1 << 6,   /* the norm before feed-forward goes by the name of one after attention */
    T_NORM_BIAS = 1 << 7,
    T_QKV_BIAS = 1 << 8,
    T_OUT_BIAS = 1 << 9,    /* of o */
    T_HEAD_NORM = 1 << 10,  /* q and k: each head, one set of weights */
    T_HEADS_NORM = 1 << 11, /* each head, each its own weights */
    T_WIDE_NORM = 1 << 12,  /* all heads as one vector */
    T_GATED = 1 << 13,      /* gate, up, down */
    T_GATE_UP = 1 << 14,    /* gate and up in one tensor, down */
    T_UNGATED = 1 << 15,    /* up and down */
    T_EXPERTS = 1 << 16,
    T_EXPERT_BIAS = 1 << 17,
    T_CHOICE_BIAS = 1 << 18,
    T_SHARED = 1 << 19,     /* an expert for every token */
    T_SHARED_GATE = 1 << 20,
    T_SINKS = 1 << 21,
    T_POSITIONS = 1 << 22,  /* learned vectors of positions */
    T_CONV = 1 << 23,
    T_OUT_NORM = 1 << 24,
    T_EMBD_NORM = 1 << 25,  /* the final norm goes by the name of the embedding's */
    T_OUTPUT = 1 << 26,     /* absent: the embedding serves */
    T_FACTORS = 1 << 27,    /* of frequencies, llama3's or longrope's */
    T_GATE_BIAS = 1 << 28,
    T_LATENT = 1 << 29,     /* latent attention (MLA) */
    T_LATENT_MAY = 1 << 30  /* of it, one form or the other */
};
#define T_FFN_BIAS (1u << 31) /* of up and down */
#define T_LAYER (T_BASE | T_OUT_NORM | T_ATTN | T_ATTN_NORM | T_FFN_NORM)
#define T_POST_LAYER ((T_LAYER & ~(T_ATTN_NORM | T_FFN_NORM)) | T_POST_NORM) /* norms only after */
#define T_ONE_NORM (T_LAYER & ~T_FFN_NORM) /* attention and feed-forward side by side, or a late norm */
#define T_LFM_LAYER ((T_LAYER & ~T_OUT_NORM) | T_HEAD_NORM | T_EMBD_NORM)
#define T_MAY (T_FUSED | T_QKV_BIAS | T_OUT_BIAS | T_FFN_BIAS | T_GATE_BIAS | T_OUTPUT | T_FACTORS)
#define T_FFN (T_GATED | T_GATE_UP | T_UNGATED)

enum model_style {
    S_HALVES = 1,            /* RoPE turns (i, i + n_rot/2) instead of (2i, 2i+1) */
    S_NO_ROPE = 1 << 1,
    S_NO_ROPE_4TH = 1 << 2,  /* every fourth layer does without */
    S_ROPE_WINDOWS = 1 << 3, /* where some layers have windows, only these turn */
    S_PLAIN_WINDOWS = 1 << 4, /* layers with windows turn without scaling */
    S_LAYER_NORM = 1 << 5,   /* norms subtract the mean */
    S_SQRT_EMBD = 1 << 6,    /* the embedding is multiplied by sqrt(n_embd) */
    S_CAPS = 1 << 7,         /* attention scores and logits have caps, 50 and 30 unless the keys differ */
    S_LOGIT_CAP = 1 << 8,    /* logits have a cap if a key gives one */
    S_NORMED = 1 << 9,       /* the chosen experts' weights are made to sum to 1 */
    S_SIGMOID = 1 << 10,     /* experts' weights are sigmoids */
    S_CHOSEN_SOFTMAX = 1 << 11, /* softmax over the chosen experts only */
    S_LOGITS_OVER = 1 << 12, /* logits are divided by logit_scale, not multiplied */
    S_BIG_WINDOWS = 1 << 13  /* only the size with big_layers has windows */
};

typedef struct {
    const char *name;       /* general.architecture */
    unsigned has, style;
    enum mat_activation activation;
    unsigned experts;       /* what layers with experts have instead of T_FFN */
    unsigned may;           /* beyond T_MAY */
    int period, window;     /* the last of each `period` layers has no window; the window where the file gives none */
    double window_base;     /* rope base of layers with windows; 0: the model's */
    int big_layers;         /* the size with so many layers differs: it scales scores by n_embd / n_head, or see S_BIG_WINDOWS */
} model_arch;

static const model_arch model_archs[] = {
    {"llama", T_LAYER | T_GATED, S_NORMED, MAT_SILU, T_EXPERTS, 0, 0, 0, 0, 0},
    {"qwen2", T_LAYER | T_GATED, S_HALVES, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"qwen2moe", T_LAYER | T_GATED, S_HALVES, MAT_SILU, T_EXPERTS | T_SHARED | T_SHARED_GATE, 0, 0, 0, 0, 0},
    {"qwen3", T_LAYER | T_GATED | T_HEAD_NORM, S_HALVES, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"qwen3moe", T_LAYER | T_GATED | T_HEAD_NORM, S_HALVES | S_NORMED, MAT_SILU, T_EXPERTS, 0, 0, 0, 0, 0},
    {"gemma", T_LAYER | T_GATED, S_HALVES | S_SQRT_EMBD, MAT_GELU, 0, 0, 0, 0, 0, 0},
    {"gemma2", T_LAYER | T_GATED | T_POST_NORM, S_HALVES | S_SQRT_EMBD | S_CAPS, MAT_GELU, 0, 0, 2, 4096, 0, 46},
    {"gemma3", T_LAYER | T_GATED | T_POST_NORM | T_HEAD_NORM, S_HALVES | S_SQRT_EMBD | S_PLAIN_WINDOWS | S_LOGIT_CAP, MAT_GELU, 0, 0, 6, 0, 10000, 62},
    {"phi3", T_LAYER | T_GATE_UP, S_HALVES, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"gpt2", T_LAYER | T_UNGATED | T_NORM_BIAS | T_QKV_BIAS | T_OUT_BIAS | T_FFN_BIAS | T_POSITIONS, S_NO_ROPE | S_LAYER_NORM, MAT_GELU, 0, 0, 0, 0, 0, 0},
    {"gpt-oss", T_ONE_NORM | T_GATED | T_LATE_NORM | T_SINKS, S_HALVES | S_CHOSEN_SOFTMAX, MAT_SWIGLU7, T_EXPERTS | T_EXPERT_BIAS, 0, 2, 0, 0, 0},
    {"smollm3", T_LAYER | T_GATED, S_NO_ROPE_4TH, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"olmo2", T_POST_LAYER | T_GATED | T_WIDE_NORM, S_HALVES | S_PLAIN_WINDOWS, MAT_SILU, 0, 0, 4, 0, 0, 0},
    {"olmoe", T_LAYER | T_GATED | T_WIDE_NORM, S_HALVES, MAT_SILU, T_EXPERTS, 0, 0, 0, 0, 0},
    {"granite", T_LAYER | T_GATED, S_LOGITS_OVER | S_NORMED, MAT_SILU, T_EXPERTS, T_SHARED, 0, 0, 0, 0},
    {"granitemoe", T_LAYER | T_GATED, S_LOGITS_OVER | S_NORMED, MAT_SILU, T_EXPERTS, T_SHARED, 0, 0, 0, 0},
    {"starcoder2", T_LAYER | T_UNGATED | T_NORM_BIAS | T_QKV_BIAS | T_OUT_BIAS | T_FFN_BIAS, S_HALVES | S_LAYER_NORM, MAT_GELU, 0, 0, 0, 0, 0, 0},
    {"stablelm", T_ONE_NORM | T_GATED, S_HALVES | S_LAYER_NORM, MAT_SILU, 0, T_FFN_NORM | T_NORM_BIAS | T_HEADS_NORM, 0, 0, 0, 0},
    {"command-r", T_ONE_NORM | T_GATED, S_LAYER_NORM, MAT_SILU, 0, T_HEADS_NORM, 0, 0, 0, 0},
    {"cohere2", T_ONE_NORM | T_GATED, S_LAYER_NORM | S_ROPE_WINDOWS, MAT_SILU, 0, 0, 4, 0, 0, 0},
    {"exaone4", T_POST_LAYER | T_GATED | T_HEAD_NORM, S_HALVES | S_ROPE_WINDOWS | S_BIG_WINDOWS, MAT_SILU, 0, 0, 4, 4096, 0, 64},
    {"deepseek2", (T_LAYER & ~T_ATTN) | T_LATENT | T_GATED, 0, MAT_SILU, T_EXPERTS | T_SHARED, T_LATENT_MAY | T_CHOICE_BIAS, 0, 0, 0, 0},
    {"ernie4_5", T_LAYER | T_GATED, 0, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"glm4", T_LAYER | T_GATE_UP | T_POST_NORM, 0, MAT_SILU, 0, 0, 0, 0, 0, 0},
    {"lfm2", T_LFM_LAYER | T_GATED, S_HALVES, MAT_SILU, 0, T_CONV, MAX_LAYERS, 0, 0, 0},
    {"lfm2moe", T_LFM_LAYER | T_GATED, S_HALVES | S_NORMED | S_SIGMOID, MAT_SILU, T_EXPERTS, T_CHOICE_BIAS | T_CONV, 0, 0, 0, 0},
};

/* Families that people ask for, and what lorch lacks for them. */
static const struct { const char *name, *lacks; } model_refused[] = {
    {"deepseek", "a leading dense layer beside fine-grained experts"},
    {"llama4", "chunked attention and temperature scaling"}, {"gemma3n", "per-layer embeddings and alternating updates"},
    {"gemma4", "per-layer embeddings and shared keys and values"}, {"qwen3next", "gated delta-net layers"}, {"qwen35", "gated delta-net layers"},
    {"qwen35moe", "gated delta-net layers"}, {"qwen2vl", "rotation in sections"}, {"qwen3vl", "rotation in sections"},
    {"falcon-h1", "state-space layers"}, {"granitehybrid", "state-space layers"}, {"nemotron_h", "state-space layers"},
    {"jamba", "state-space layers"}, {"mamba", "state-space layers"}, {"mamba2", "state-space layers"},
    {"rwkv6", "recurrent time mixing"}, {"rwkv7", "recurrent time mixing"}, {"bert", "an encoder: it makes embeddings, not text"},
    {"nomic-bert", "an encoder: it makes embeddings, not text"}, {"t5", "an encoder"}, {"t5encoder", "an encoder"},
    {"bloom", "position biases (ALiBi)"}, {"mpt", "position biases (ALiBi)"}, {"bitnet", "ternary weights"}, {"clip", "images: it is a part of another model"},
};

typedef struct {
    gguf_file *file;        /* owned */
    tok *tok;               /* owned */
    const model_arch *arch;
    unsigned style;         /* the family's, and what the keys make of it */
    char name[128];         /* general.name, or the file's name without directory and ending */
    char quant[32];         /* "Q4_K_M", "F16", ... */
    int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, n_rot;
    int n_expert, n_used, n_ff_exp, n_ff_shared; /* n_used experts are chosen for a token */
    int n_conv_layers, n_conv; /* layers with a convolution over n_conv positions */
    int n_latent, n_q_rank, k_len, v_len; /* latent attention: ranks, and lengths of a head's query and value; else 0 */
    int has_choice_bias;    /* some layer's choice of experts has a bias */
    int by_head;            /* latents themselves are the keys and values, by head matrices (k_heads, v_heads) */
    int n_ctx_train;        /* the file's context length */
    int n_ctx_most;         /* positions that its scaling of RoPE reaches */
    float eps, attn_scale, attn_cap, logit_cap, embd_scale, residual_scale, logit_scale, expert_scale;
    double rope_base, rope_factor;
    const char *rope_kind;  /* "none", "linear", "yarn", "longrope", "llama3" */
    float *rope_freqs, *rope_long, *rope_short; /* [n_rot / 2] divisors of the frequencies, or NULL */
    double *inv_freq[2];    /* [n_rot / 2] radians per position; of layers with windows, if they differ: else NULL */
    double rope_scale[2];   /* a factor of rotated vectors */
    model_matrix token_embd, output; /* [n_vocab][n_embd]; the output may be the embedding itself */
    model_matrix positions; /* [n_ctx_train][n_embd] or absent */
    float *output_norm, *output_norm_bias; /* [n_embd] */
    model_layer *layer;
    uint64_t weight_bytes;  /* of all tensors */
    uint64_t token_bytes;   /* weights read for each token: all matrices, the embedding's row aside */
} model;

/* ---- binding tensors to fields ---- */

enum model_dim {
    DIM_NONE, DIM_EMBD, DIM_Q, DIM_KV, DIM_HEAD, DIM_HEADS, DIM_HEADS_KV, DIM_FF, DIM_FF_EXP, DIM_FF_SHARED, DIM_EXPERT, DIM_VOCAB, DIM_ROT_HALF,
    DIM_CTX, DIM_CONV, DIM_EMBD3, DIM_ONE, DIM_Q_RANK, DIM_LATENT, DIM_LATENT_ROT, DIM_QS, DIM_VS, DIM_KVS, DIM_NOPE, DIM_V
};

/* Matrices name the lengths of a row and then of rows; vectors of floats name theirs and have DIM_NONE for rows. */
typedef struct {
    const char *name;       /* of a layer: what follows "blk.N." */
    unsigned group;
    enum { MATRIX, VECTOR, EXPERTS, HEADS } kind; /* a vector is converted to floats; experts and heads have a third dimension */
    enum model_dim in;
    struct { size_t field; enum model_dim out; } part[3]; /* rows go to these fields, in order; offset in model_layer or model */
} model_tensor;

#define F(field) offsetof(model_layer, field)
#define M(in, field, out) MATRIX, in, {{F(field), out}}
#define W(field, in) VECTOR, in, {{F(field), DIM_ONE}}
static const model_tensor model_layer_tensors[] = {
    {"attn_norm.weight", T_ATTN_NORM, W(attn_norm, DIM_EMBD)},
    {"attn_norm.bias", T_NORM_BIAS, W(attn_norm_bias, DIM_EMBD)},
    {"attn_qkv.weight", T_FUSED, MATRIX, DIM_EMBD, {{F(q), DIM_Q}, {F(k), DIM_KV}, {F(v), DIM_KV}}},
    {"attn_q.weight", T_ATTN, M(DIM_EMBD, q, DIM_Q)},
    {"attn_k.weight", T_ATTN, M(DIM_EMBD, k, DIM_KV)},
    {"attn_v.weight", T_ATTN, M(DIM_EMBD, v, DIM_KV)},
    {"attn_output.weight", T_ATTN, M(DIM_Q, o, DIM_EMBD)},
    {"attn_qkv.bias", T_FUSED, VECTOR, DIM_ONE, {{F(q_bias), DIM_Q}, {F(k_bias), DIM_KV}, {F(v_bias), DIM_KV}}},
    {"attn_q.bias", T_QKV_BIAS, W(q_bias, DIM_Q)},
    {"attn_k.bias", T_QKV_BIAS, W(k_bias, DIM_KV)},
    {"attn_v.bias", T_QKV_BIAS, W(v_bias, DIM_KV)},
    {"attn_output.bias", T_OUT_BIAS, W(o_bias, DIM_EMBD)},
    {"attn_q_norm.weight", T_HEAD_NORM, W(q_norm, DIM_HEAD)},
    {"attn_k_norm.weight", T_HEAD_NORM, W(k_norm, DIM_HEAD)},
    {"attn_q_norm.weight", T_HEADS_NORM, VECTOR, DIM_HEAD, {{F(q_norm), DIM_HEADS}}},
    {"attn_k_norm.weight", T_HEADS_NORM, VECTOR, DIM_HEAD, {{F(k_norm), DIM_HEADS_KV}}},
    {"attn_q_norm.weight", T_WIDE_NORM, W(q_norm, DIM_Q)},
    {"attn_k_norm.weight", T_WIDE_NORM, W(k_norm, DIM_KV)},
    {"attn_sinks.weight", T_SINKS, W(sinks, DIM_HEADS)},
    {"shortconv.conv.weight", T_CONV, VECTOR, DIM_CONV, {{F(conv), DIM_EMBD}}},
    {"shortconv.in_proj.weight", T_CONV, M(DIM_EMBD, conv_in, DIM_EMBD3)},
    {"shortconv.out_proj.weight", T_CONV, M(DIM_EMBD, o, DIM_EMBD)},
    {"attn_q.weight", T_LATENT_MAY, M(DIM_EMBD, q, DIM_QS)},
    {"attn_q_a.weight", T_LATENT_MAY, M(DIM_EMBD, q_a, DIM_Q_RANK)},
    {"attn_q_a_norm.weight", T_LATENT_MAY, W(q_a_norm, DIM_Q_RANK)},
    {"attn_q_b.weight", T_LATENT_MAY, M(DIM_Q_RANK, q_b, DIM_QS)},
    {"attn_kv_a_mqa.weight", T_LATENT, M(DIM_EMBD, kv_a, DIM_LATENT_ROT)},
    {"attn_kv_a_norm.weight", T_LATENT, W(kv_a_norm, DIM_LATENT)},
    {"attn_kv_b.weight", T_LATENT_MAY, M(DIM_LATENT, kv_b, DIM_KVS)},
    {"attn_k_b.weight", T_LATENT_MAY, HEADS, DIM_NOPE, {{F(k_heads), DIM_LATENT}}},
    {"attn_v_b.weight", T_LATENT_MAY, HEADS, DIM_LATENT, {{F(v_heads), DIM_V}}},
    {"attn_output.weight", T_LATENT, M(DIM_VS, o, DIM_EMBD)},
    {"post_attention_norm.weight", T_POST_NORM, W(attn_post_norm, DIM_EMBD)},
    {"post_attention_norm.weight", T_LATE_NORM, W(ffn_norm, DIM_EMBD)},
    {"ffn_norm.weight", T_FFN_NORM, W(ffn_norm, DIM_EMBD)},
    {"ffn_norm.bias", T_NORM_BIAS, W(ffn_norm_bias, DIM_EMBD)},
    {"ffn_gate.weight", T_GATED, M(DIM_EMBD, gate, DIM_FF)},
    {"ffn_up.weight", T_GATED | T_UNGATED, M(DIM_EMBD, up, DIM_FF)},
    {"ffn_up.weight", T_GATE_UP, MATRIX, DIM_EMBD, {{F(gate), DIM_FF}, {F(up), DIM_FF}}},
    {"ffn_down.weight", T_FFN, M(DIM_FF, down, DIM_EMBD)},
    {"ffn_gate.bias", T_GATE_BIAS, W(gate_bias, DIM_FF)},
    {"ffn_up.bias", T_FFN_BIAS, W(up_bias, DIM_FF)},
    {"ffn_down.bias", T_FFN_BIAS, W(down_bias, DIM_EMBD)},
    {"post_ffw_norm.weight", T_POST_NORM, W(ffn_post_norm, DIM_EMBD)},
    {"ffn_gate_inp.weight", T_EXPERTS, M(DIM_EMBD, route, DIM_EXPERT)},
    {"ffn_gate_exps.weight", T_EXPERTS, EXPERTS, DIM_EMBD, {{F(gates), DIM_FF_EXP}}},
    {"ffn_up_exps.weight", T_EXPERTS, EXPERTS, DIM_EMBD, {{F(ups), DIM_FF_EXP}}},
    {"ffn_down_exps.weight", T_EXPERTS, EXPERTS, DIM_FF_EXP, {{F(downs), DIM_EMBD}}},
    {"ffn_gate_inp.bias", T_EXPERT_BIAS, W(route_bias, DIM_EXPERT)},
    {"ffn_gate_exps.bias", T_EXPERT_BIAS, VECTOR, DIM_FF_EXP, {{F(gates_bias), DIM_EXPERT}}},
    {"ffn_up_exps.bias", T_EXPERT_BIAS, VECTOR, DIM_FF_EXP, {{F(ups_bias), DIM_EXPERT}}},
    {"ffn_down_exps.bias", T_EXPERT_BIAS, VECTOR, DIM_EMBD, {{F(downs_bias), DIM_EXPERT}}},
    {"exp_probs_b.bias", T_CHOICE_BIAS, W(choice_bias, DIM_EXPERT)},
    {"ffn_gate_shexp.weight", T_SHARED, M(DIM_EMBD, gate, DIM_FF_SHARED)},
    {"ffn_up_shexp.weight", T_SHARED, M(DIM_EMBD, up, DIM_FF_SHARED)},
    {"ffn_down_shexp.weight", T_SHARED, M(DIM_FF_SHARED, down, DIM_EMBD)},
    {"ffn_gate_inp_shexp.weight", T_SHARED_GATE, M(DIM_EMBD, share, DIM_ONE)},
};
#undef F
#define F(field) offsetof(model, field)
static const model_tensor model_global_tensors[] = {
    {"token_embd.weight", T_BASE, M(DIM_EMBD, token_embd, DIM_VOCAB)},
    {"position_embd.weight", T_POSITIONS, M(DIM_EMBD, positions, DIM_CTX)},
    {"output_norm.weight", T_OUT_NORM, W(output_norm, DIM_EMBD)},
    {"token_embd_norm.weight", T_EMBD_NORM, W(output_norm, DIM_EMBD)},
    {"output_norm.bias", T_NORM_BIAS, W(output_norm_bias, DIM_EMBD)},
    {"output.weight", T_OUTPUT, M(DIM_EMBD, output, DIM_VOCAB)},
    {"rope_freqs.weight", T_FACTORS, W(rope_freqs, DIM_ROT_HALF)},
    {"rope_factors_long.weight", T_FACTORS, W(rope_long, DIM_ROT_HALF)},
    {"rope_factors_short.weight", T_FACTORS, W(rope_short, DIM_ROT_HALF)},
};
#undef F
#undef M
#undef W
enum {
    N_LAYER_TENSORS = sizeof model_layer_tensors / sizeof *model_layer_tensors,
    N_GLOBAL_TENSORS = sizeof model_global_tensors / sizeof *model_global_tensors
};

static int64_t model_dim_of(const model *m, enum model_dim d) {
    switch (d) {
    case DIM_NONE: return 0;
    case DIM_EMBD: return m->n_embd;
    case DIM_EMBD3: return 3 * (int64_t)m->n_embd;
    case DIM_Q: return (int64_t)m->n_head * m->head_dim;
    case DIM_KV: return (int64_t)m->n_head_kv * m->head_dim;
    case DIM_HEAD: return m->head_dim;
    case DIM_HEADS: return m->n_head;
    case DIM_HEADS_KV: return m->n_head_kv;
    case DIM_FF: return m->n_ff;
    case DIM_FF_EXP: return m->n_ff_exp;
    case DIM_FF_SHARED: return m->n_ff_shared;
    case DIM_EXPERT: return m->n_expert;
    case DIM_VOCAB: return m->n_vocab;
    case DIM_ROT_HALF: return m->n_rot / 2;
    case DIM_CTX: return m->n_ctx_train;
    case DIM_CONV: return m->n_conv;
    case DIM_ONE: return 1;
    case DIM_Q_RANK: return m->n_q_rank;
    case DIM_LATENT: return m->n_latent;
    case DIM_LATENT_ROT: return m->n_latent + m->n_rot;
    case DIM_NOPE: return m->k_len - m->n_rot;
    case DIM_V: return m->v_len;
    case DIM_QS: return (int64_t)m->n_head * m->k_len;
    case DIM_VS: return (int64_t)m->n_head * m->v_len;
    case DIM_KVS: return (int64_t)m->n_head * (m->k_len - m->n_rot + m->v_len);
    }
    return 0;
}

/* The groups of a layer's tensors: those that it must have, and in *may those that it may have besides. What the
 * layer would not use is not among them: leaving it out would go unnoticed. */
static unsigned model_layer_groups(const model *m, const model_layer *l, unsigned *may) {
    unsigned has = m->arch->has, not = l->has_experts ? T_FFN_BIAS | T_GATE_BIAS : 0;
    if (l->has_experts) has = (has & ~(unsigned)T_FFN) | m->arch->experts;
    if (l->is_conv) has = (has & ~(unsigned)(T_ATTN | T_HEAD_NORM)) | T_CONV;
    else not |= T_CONV;
    if (l->is_conv || (has & T_LATENT)) not |= T_QKV_BIAS | T_FUSED;
    *may = (has | m->arch->may | T_MAY) & ~not;
    return has;
}

/* The numbers of a vector of the file, as floats, on the heap. */
static float *model_vector(const quant_format *f, const char *data, int64_t rows, int64_t n) {
    float *v = sys_zalloc((size_t)rows, (size_t)n * sizeof *v);
    for (int64_t r = 0; v && r < rows; r++) quant_dequantise(f, data + (size_t)r * quant_row_bytes(f, n), v + r * n, n);
    return v;
}

/* Binds one tensor to its fields in `base`. Returns 0 with err set. */
static int model_bind(model *m, const gguf_tensor *t, const model_tensor *want, void *base, char *err, size_t cap) {
    const quant_format *f = quant_find(t->type);
    int64_t in = model_dim_of(m, want->in), rows = 0, experts = want->kind == EXPERTS ? m->n_expert : want->kind == HEADS ? m->n_head : 1;
    const char *data = t->data;
    for (int i = 0; i < 3; i++) rows += model_dim_of(m, want->part[i].out);
    int64_t fused = want->in == DIM_ONE ? 1 : rows; /* a vector of several parts lies in one row */
    if (want->in == DIM_ONE) in = rows;
    if (f->kind == QUANT_NONE)
        return sys_fail(err, cap, "%s: tensor %.*s is %s, which is not supported; supported: %s", m->file->path, (int)t->name.len, t->name.ptr, f->name,
                        quant_supported());
    if (t->dim[0] != (uint64_t)in || t->dim[1] != (uint64_t)fused || t->dim[2] != (uint64_t)experts || t->dim[3] != 1)
        return sys_fail(err, cap, "%s: tensor %.*s is %llu x %llu x %llu, but the model's shape asks for %lld x %lld x %lld", m->file->path, (int)t->name.len,
                        t->name.ptr, (unsigned long long)t->dim[0], (unsigned long long)t->dim[1], (unsigned long long)t->dim[2], (long long)in,
                        (long long)fused, (long long)experts);
    for (int i = 0; i < 3 && want->part[i].out != DIM_NONE; i++) {
        int64_t n = want->in == DIM_ONE ? model_dim_of(m, want->part[i].out) : in, part = want->in == DIM_ONE ? 1 : model_dim_of(m, want->part[i].out);
        void *field = (char *)base + want->part[i].field;
        if (want->kind == VECTOR) {
            if (n % f->block) return sys_fail(err, cap, "%s: tensor %.*s does not divide into blocks of %s", m->file->path, (int)t->name.len, t->name.ptr, f->name);
            float *v = model_vector(f, data, part, n);
            if (!v) return sys_fail(err, cap, "%s: out of memory", m->file->path);
            free(*(float **)field);
            *(float **)field = v;
        } else {
            model_matrix *x = field;
            x->format = f, x->data = data, x->n = in, x->rows = part * experts;
        }
        data += quant_row_bytes(f, n) * (size_t)part;
    }
    if (want->kind == EXPERTS) m->token_bytes += t->bytes / (uint64_t)experts * (uint64_t)m->n_used;
    else if (want->kind != VECTOR && !(want->group & (T_BASE | T_POSITIONS))) m->token_bytes += t->bytes;
    return 1;
}

/* "blk.12.attn_q.weight": sets the layer and returns what follows, or NULL if it is no such name. */
static const char *model_layer_name(str name, char tmp[GGUF_MAX_NAME], uint64_t *layer) {
    memcpy(tmp, name.ptr, name.len), tmp[name.len] = 0;
    if (strncmp(tmp, "blk.", 4) || tmp[4] < '0' || tmp[4] > '9' || memchr(tmp, 0, name.len)) return NULL;
    if (tmp[4] == '0' && tmp[5] != '.') return NULL; /* one name for one layer */
    char *end;
    *layer = strtoull(tmp + 4, &end, 10);
    return *end == '.' ? end + 1 : NULL;
}

static int model_bind_one(model *m, const gguf_tensor *t, char *err, size_t cap) {
    char tmp[GGUF_MAX_NAME], shown[96];
    uint64_t layer = 0;
    unsigned may = m->arch->has | m->arch->may | T_MAY;
    const char *rest = model_layer_name(t->name, tmp, &layer);
    if (rest && layer < (uint64_t)m->n_layer) {
        model_layer *l = &m->layer[layer];
        model_layer_groups(m, l, &may);
        for (int i = 0; i < N_LAYER_TENSORS; i++)
            if ((model_layer_tensors[i].group & may) && strcmp(rest, model_layer_tensors[i].name) == 0)
                return model_bind(m, t, &model_layer_tensors[i], l, err, cap);
        if (strcmp(rest, "attn_rot_embd.weight") == 0) return 1; /* a table that old converters left behind */
    } else if (!rest)
        for (int i = 0; i < N_GLOBAL_TENSORS; i++)
            if ((model_global_tensors[i].group & may) && str_is(t->name, model_global_tensors[i].name))
                return model_bind(m, t, &model_global_tensors[i], m, err, cap);
    return sys_fail(err, cap, "%s: tensor %s is not one that lorch knows for architecture '%s' with %d layers: leaving it out would change the output",
                    m->file->path, gguf_show(t->name, shown), m->arch->name, m->n_layer);
}

static int model_present(const model_tensor *want, const void *base) {
    const char *field = (const char *)base + want->part[0].field;
    return want->kind == VECTOR ? *(float *const *)(const void *)field != NULL : ((const model_matrix *)(const void *)field)->format != NULL;
}

/* The first tensor of these groups that is missing, or NULL. */
static const char *model_missing(const model_tensor *tensors, int n, unsigned has, const void *base) {
    for (int i = 0; i < n; i++)
        if ((tensors[i].group & has) && !model_present(&tensors[i], base)) return tensors[i].name;
    return NULL;
}

static int model_bind_all(model *m, char *err, size_t cap) {
    const char *missing;
    unsigned may;
    for (uint64_t i = 0; i < m->file->n_tensors; i++) {
        m->weight_bytes += m->file->tensor[i].bytes;
        if (!model_bind_one(m, &m->file->tensor[i], err, cap)) return 0;
    }
    if ((missing = model_missing(model_global_tensors, N_GLOBAL_TENSORS, m->arch->has, m)))
        return sys_fail(err, cap, "%s: tensor %s is missing", m->file->path, missing);
    for (int l = 0; l < m->n_layer; l++) {
        model_layer *y = &m->layer[l];
        unsigned has = model_layer_groups(m, y, &may);
        if (y->gate.format && y->has_experts) has |= T_SHARED & may;
        if ((missing = model_missing(model_layer_tensors, N_LAYER_TENSORS, has, y)))
            return sys_fail(err, cap, "%s: tensor blk.%d.%s is missing", m->file->path, l, missing);
        int ranks = (y->q_a.format != NULL) + (y->q_a_norm != NULL) + (y->q_b.format != NULL), heads = (y->k_heads.format != NULL) + (y->v_heads.format != NULL);
        if ((has & T_LATENT) && (ranks != (y->q.format ? 0 : 3) || heads != (y->kv_b.format ? 0 : 2) || (heads == 2) != m->by_head))
            return sys_fail(err, cap, "%s: layer %d does not have just one form of latent attention's tensors", m->file->path, l);
        if (!y->q_norm != !y->k_norm || (y->ffn_norm_bias && !y->ffn_norm))
            return sys_fail(err, cap, "%s: layer %d has one norm of a pair, but not the other", m->file->path, l);
    }
    if (!m->output.format) { /* tied */
        m->output = m->token_embd;
        m->token_bytes += quant_row_bytes(m->output.format, m->output.n) * (uint64_t)m->output.rows;
    }
    return 1;
}

/* ---- shapes ---- */

/* A key of the model's family, "llama.block_count" and the like. */
static const gguf_kv *model_key(const model *m, const char *key, char full[96]) {
    snprintf(full, 96, "%s.%s", m->arch->name, key);
    return gguf_find(m->file, full);
}

static int model_flag(const model *m, const char *key, int missing) {
    char full[96];
    model_key(m, key, full);
    return gguf_get_bool(m->file, full, missing);
}

/* A whole number of a layer, where the file may give one for all or an array; `missing` where it gives none. */
static uint64_t model_layer_uint(const model *m, const char *key, int layer, uint64_t missing) {
    char full[96];
    const gguf_kv *kv = model_key(m, key, full);
    if (!kv || !kv->is_array) return gguf_get_uint(m->file, full, missing);
    uint32_t v = 0;
    if (layer >= 0 && (uint64_t)layer < kv->count && (kv->type == GGUF_U32 || kv->type == GGUF_I32)) return memcpy(&v, kv->value + 4 * layer, 4), v;
    return layer >= 0 && (uint64_t)layer < kv->count && kv->type == GGUF_BOOL ? kv->value[layer] : missing;
}

/* A shape's key: the largest of all layers'. Refuses values outside 1..most. */
static int model_shape(const model *m, const char *key, int missing, int most, int *out, char *err, size_t cap) {
    char full[96];
    const gguf_kv *kv = model_key(m, key, full);
    if (!kv && missing == 0) return sys_fail(err, cap, "%s: key %s is missing", m->file->path, full);
    uint64_t v = 0;
    for (int l = 0; l < (kv && kv->is_array ? m->n_layer : 1); l++) {
        uint64_t one = model_layer_uint(m, key, l, missing > 0 ? (uint64_t)missing : 0);
        if (one > v) v = one;
    }
    if (v < 1 || v > (uint64_t)most) return sys_fail(err, cap, "%s: %s is %llu; 1 to %d is supported", m->file->path, full, (unsigned long long)v, most);
    *out = (int)v;
    return 1;
}

static double model_number(const model *m, const char *key, double missing) {
    char full[96];
    model_key(m, key, full);
    return gguf_get_float(m->file, full, missing);
}

/* The scaling of RoPE. Kinds as in llama.cpp's converters: none, linear, yarn, longrope; llama3 shows in its factors. */
static int model_read_rope(model *m, char *err, size_t cap) {
    static const char *const kinds[] = {"none", "linear", "yarn", "longrope"};
    char full[96], shown[96];
    model_key(m, "rope.scaling.type", full);
    str type = gguf_get_str(m->file, full);
    m->rope_kind = type.len ? NULL : "linear";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (str_is(type, kinds[i])) m->rope_kind = kinds[i];
    if (!m->rope_kind)
        return sys_fail(err, cap, "%s: rope scaling '%s' is not supported; supported: none, linear, yarn, longrope, and llama3 by rope_freqs", m->file->path,
                        gguf_show(type, shown));
    m->rope_base = model_number(m, "rope.freq_base", 10000);
    m->rope_factor = model_number(m, "rope.scaling.factor", model_number(m, "rope.scale_linear", 1));
    if (m->rope_factor == 0 || strcmp(m->rope_kind, "none") == 0) m->rope_factor = 1;
    if (!type.len && m->rope_factor == 1) m->rope_kind = "none";
    if (!(m->rope_base >= 1 && m->rope_base < 1e12) || !(m->rope_factor > 0 && m->rope_factor < 1e6))
        return sys_fail(err, cap, "%s: rope base %g or factor %g is out of range", m->file->path, m->rope_base, m->rope_factor);
    if (model_layer_uint(m, "rope.dimension_sections", 0, 0)) return sys_fail(err, cap, "%s: rotation in sections (M-RoPE) is not supported", m->file->path);
    if (m->n_rot % 2 || m->n_rot > m->head_dim) return sys_fail(err, cap, "%s: rope dimension count %d does not fit a head of %d", m->file->path, m->n_rot, m->head_dim);
    double original = model_number(m, "rope.scaling.original_context_length", 0), reach = original * m->rope_factor;
    int grows = !(m->arch->has & T_POSITIONS) && reach > m->n_ctx_train && reach <= MAX_CONTEXT;
    m->n_ctx_most = grows ? (int)reach : m->n_ctx_train;
    return 1;
}

/* The frequencies of RoPE: base^(-2i/n_rot), divided by the file's factors and scaled. YaRN (Peng et al., 2023)
 * scales the slow ones alone, with a ramp between. */
static void model_angles(const model *m, double base, double factor, const float *divisors, double yarn, double *inv_freq) {
    double original = model_number(m, "rope.scaling.original_context_length", m->n_ctx_train), ramp[2];
    double turns[2] = {model_number(m, "rope.scaling.yarn_beta_fast", 32), model_number(m, "rope.scaling.yarn_beta_slow", 1)};
    for (int i = 0; i < 2; i++) ramp[i] = m->n_rot * num_log(original / (turns[i] * 2 * 3.14159265358979323846)) / (2 * num_log(base));
    double from = floor(ramp[0]) > 0 ? floor(ramp[0]) : 0, to = ceil(ramp[1]) < m->n_rot - 1 ? ceil(ramp[1]) : m->n_rot - 1;
    for (int i = 0; i < m->n_rot / 2; i++) {
        double slow = (i - from) / (to - from > 0.001 ? to - from : 0.001);
        double kept = yarn * (1 - (slow < 0 ? 0 : slow > 1 ? 1 : slow)), scale = (1 - kept) / factor + kept;
        inv_freq[i] = num_exp(num_log(base) * (-2.0 * i / m->n_rot)) * scale / (divisors ? (double)divisors[i] : 1.0);
    }
}

/* Fills in the tables of angles for a context that was asked for (0: as long as the file's). Of longrope's two
 * sets of factors the short one serves contexts within the original length; the choice must not depend on memory,
 * for the same job must give the same tokens on every worker. */
static void model_use_context(model *m, int n_ctx) {
    double original = model_number(m, "rope.scaling.original_context_length", m->n_ctx_train), yarn = 0, scale = 1;
    const float *divisors = m->rope_freqs;
    if (strcmp(m->rope_kind, "longrope") == 0) divisors = (n_ctx ? n_ctx : m->n_ctx_train) > original ? m->rope_long : m->rope_short;
    if (strcmp(m->rope_kind, "yarn") == 0) {
        double grown = m->rope_factor > 1 ? 0.1 * num_log(m->rope_factor) : 0;
        yarn = model_number(m, "rope.scaling.yarn_ext_factor", 1);
        if (yarn < 0) yarn = 1;
        scale = m->n_latent ? 1 : (1 + grown) / (1 + grown * model_number(m, "rope.scaling.yarn_log_multiplier", 0));
    }
    model_angles(m, m->rope_base, m->rope_factor, divisors, yarn, m->inv_freq[0]);
    m->rope_scale[0] = scale * model_number(m, "rope.scaling.attn_factor", 1);
    m->rope_scale[1] = 1;
    double base = model_number(m, "rope.freq_base_swa", m->arch->window_base > 0 ? m->arch->window_base : m->rope_base);
    if (m->inv_freq[1]) model_angles(m, base, 1, m->rope_freqs, 0, m->inv_freq[1]);
}

/* Looks through the names for what the keys do not say: which layers have experts or convolutions, and their sizes. */
static int model_scan(model *m, char *err, size_t cap) {
    const struct { const char *name; int dim, *size; } sizes[] = {
        {"ffn_up_exps.weight", 1, &m->n_ff_exp}, {"ffn_up_shexp.weight", 1, &m->n_ff_shared}, {"shortconv.conv.weight", 0, &m->n_conv}};
    if ((uint64_t)m->n_layer * 4 > m->file->n_tensors) /* the leanest layer has six */
        return sys_fail(err, cap, "%s: block_count is %d, but the file has no more than %llu tensors", m->file->path, m->n_layer, (unsigned long long)m->file->n_tensors);
    m->layer = sys_zalloc((size_t)m->n_layer, sizeof *m->layer);
    if (!m->layer) return sys_fail(err, cap, "%s: out of memory", m->file->path);
    for (uint64_t i = 0; i < m->file->n_tensors; i++) {
        const gguf_tensor *t = &m->file->tensor[i];
        char tmp[GGUF_MAX_NAME];
        uint64_t layer = 0;
        const char *rest = model_layer_name(t->name, tmp, &layer);
        if (!rest || layer >= (uint64_t)m->n_layer) continue;
        m->by_head |= strcmp(rest, "attn_k_b.weight") == 0;
        m->has_choice_bias |= strcmp(rest, "exp_probs_b.bias") == 0;
        if (strcmp(rest, "ffn_gate_inp.weight") == 0) m->layer[layer].has_experts = 1;
        if (strcmp(rest, "shortconv.conv.weight") == 0 && (m->arch->may & T_CONV)) m->n_conv_layers += !m->layer[layer].is_conv, m->layer[layer].is_conv = 1;
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            if (strcmp(rest, sizes[k].name) != 0) continue;
            if (t->dim[sizes[k].dim] > 1 << 20) return sys_fail(err, cap, "%s: tensor %s is too large", m->file->path, tmp);
            *sizes[k].size = (int)t->dim[sizes[k].dim];
        }
    }
    if (m->n_conv_layers >= m->n_layer) return sys_fail(err, cap, "%s: a model without attention is not supported", m->file->path);
    return 1;
}

static int model_read_experts(model *m, char *err, size_t cap) {
    static const unsigned how[] = {0, 0, S_SIGMOID, S_CHOSEN_SOFTMAX}; /* by expert_gating_func */
    uint64_t gating = model_layer_uint(m, "expert_gating_func", -1, 0);
    m->style = m->arch->style;
    if (gating == 0 && m->has_choice_bias && (m->arch->has & T_LATENT)) gating = 2; /* DeepSeek's bias goes with sigmoids; some files lack the key */
    m->n_expert = (int)model_layer_uint(m, "expert_count", -1, 0), m->n_used = (int)model_layer_uint(m, "expert_used_count", -1, 0);
    if (m->n_expert < 0 || m->n_expert > MAX_EXPERTS || m->n_used > m->n_expert || m->n_used < (m->n_expert > 0) || m->n_used > MAX_EXPERTS_USED)
        return sys_fail(err, cap, "%s: %d of %d experts for a token; 1 to %d of at most %d is supported", m->file->path, m->n_used, m->n_expert,
                        MAX_EXPERTS_USED, MAX_EXPERTS);
    if (model_layer_uint(m, "expert_group_count", -1, 1) > 1) return sys_fail(err, cap, "%s: experts in groups are not supported", m->file->path);
    static const char *const lacking[] = {"attention.temperature_scale", "attention.clamp_kqv", "attention.max_alibi_bias"};
    for (size_t i = 0; i < sizeof lacking / sizeof *lacking; i++)
        if (model_number(m, lacking[i], 0) != 0) return sys_fail(err, cap, "%s: %s is not supported", m->file->path, lacking[i]);
    if (gating > 3) return sys_fail(err, cap, "%s: expert_gating_func %d is not supported", m->file->path, (int)gating);
    if (gating) m->style = (m->style & ~(unsigned)(S_SIGMOID | S_CHOSEN_SOFTMAX)) | how[gating];
    int normed = model_flag(m, "expert_weights_norm", -1);
    if (normed >= 0) m->style = (m->style & ~(unsigned)S_NORMED) | (normed ? S_NORMED : 0);
    m->expert_scale = (float)model_number(m, "expert_weights_scale", 1);
    if (m->expert_scale == 0) m->expert_scale = 1;
    for (int l = 0; l < m->n_layer; l++)
        if (m->layer[l].has_experts && m->n_expert == 0) return sys_fail(err, cap, "%s: layer %d has experts, but the keys give their number as 0", m->file->path, l);
    return 1;
}

/* Windows and rotation of each layer. */
static int model_read_layers(model *m, char *err, size_t cap) {
    const model_arch *a = m->arch;
    char full[96];
    const gguf_kv *pattern = model_key(m, "attention.sliding_window_pattern", full);
    int none = a->period == 0 || ((a->style & S_BIG_WINDOWS) && m->n_layer != a->big_layers);
    uint64_t window = none ? 0 : model_layer_uint(m, "attention.sliding_window", -1, (uint64_t)a->window);
    uint64_t period = pattern && !pattern->is_array ? gguf_get_uint(m->file, full, 0) : (uint64_t)a->period;
    if (window > MAX_CONTEXT || period > MAX_LAYERS) return sys_fail(err, cap, "%s: sliding window or its pattern is out of range", m->file->path);
    for (int l = 0; l < m->n_layer; l++) {
        model_layer *y = &m->layer[l];
        int in_window = pattern && pattern->is_array ? model_layer_uint(m, "attention.sliding_window_pattern", l, 0) != 0
                                                     : period == 0 || (uint64_t)l % period < period - 1;
        y->window = window && in_window ? (int)window : 0;
        y->rope = y->window && (a->style & S_PLAIN_WINDOWS) ? 1 : 0;
        if ((a->style & S_NO_ROPE) || ((a->style & S_NO_ROPE_4TH) && l % 4 == 3) || ((a->style & S_ROPE_WINDOWS) && window && !y->window)) y->rope = -1;
    }
    if (!model_flag(m, "rope.scaling.finetuned", 1) && (a->style & S_LOGITS_OVER)) /* granite says so that it has no RoPE */
        for (int l = 0; l < m->n_layer; l++) m->layer[l].rope = -1;
    m->inv_freq[0] = sys_zalloc((size_t)m->n_rot + 1, sizeof(double));
    if (window && (a->style & S_PLAIN_WINDOWS)) m->inv_freq[1] = sys_zalloc((size_t)m->n_rot + 1, sizeof(double));
    if (!m->inv_freq[0] || (window && (a->style & S_PLAIN_WINDOWS) && !m->inv_freq[1])) return sys_fail(err, cap, "%s: out of memory", m->file->path);
    return 1;
}

static int model_read_scales(model *m, char *err, size_t cap) {
    int ln = (m->arch->style & S_LAYER_NORM) != 0, caps = (m->arch->style & S_CAPS) != 0;
    const char *eps = ln ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon";
    m->eps = (float)model_number(m, eps, 1e-5);
    m->attn_scale = (float)model_number(m, "attention.scale", 0);
    int by_share = m->n_layer == m->arch->big_layers && !(m->arch->style & S_BIG_WINDOWS);
    if (m->n_latent) { /* the keys' logarithm of YaRN's growth is of the scores here, not of rotated vectors */
        double grown = strcmp(m->rope_kind, "yarn") ? 0 : model_number(m, "rope.scaling.yarn_log_multiplier", 0) * num_log(m->rope_factor);
        m->attn_scale = (float)((1 + grown) * (1 + grown) / sqrt(m->k_len));
    }
    if (m->attn_scale == 0) m->attn_scale = 1.0f / sqrtf((float)(by_share ? m->n_embd / m->n_head : m->head_dim));
    m->embd_scale = (float)model_number(m, "embedding_scale", m->arch->style & S_SQRT_EMBD ? sqrt(m->n_embd) : 1);
    m->residual_scale = (float)model_number(m, "residual_scale", 1);
    m->logit_scale = (float)model_number(m, "logit_scale", 1);
    if (m->embd_scale == 0) m->embd_scale = 1;
    if (m->residual_scale == 0) m->residual_scale = 1;
    if (m->logit_scale == 0) m->logit_scale = 1;
    if (m->arch->style & S_LOGITS_OVER) m->logit_scale = 1 / m->logit_scale;
    m->attn_cap = caps ? (float)model_number(m, "attn_logit_softcapping", 50) : 0;
    m->logit_cap = caps || (m->style & S_LOGIT_CAP) ? (float)model_number(m, "final_logit_softcapping", caps ? 30 : 0) : 0;
    if (!(m->eps >= 0 && m->eps < 1)) return sys_fail(err, cap, "%s: %s is out of range", m->file->path, eps);
    const float scales[] = {m->attn_scale, m->embd_scale, m->residual_scale, m->logit_scale, m->expert_scale, m->attn_cap + 1, m->logit_cap + 1};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        if (!(scales[i] > 0 && scales[i] < 1e9f)) return sys_fail(err, cap, "%s: a scale or cap in the keys is out of range", m->file->path);
    return 1;
}

/* Latent attention (DeepSeek-V2, 2024): one vector of n_latent numbers stands for all heads' keys and values. Files
 * hold either the matrix that makes these of it (kv_b), or head by head what takes queries to latents and sums of
 * latents to values; then the cache holds the latents alone. Values are padded to the length of keys. */
static int model_read_latent(model *m, char *err, size_t cap) {
    int v = m->head_dim;
    if (!(m->arch->has & T_LATENT)) return 1;
    if (!model_shape(m, "attention.kv_lora_rank", 0, MAX_HEAD_DIM, &m->n_latent, err, cap) ||
        !model_shape(m, "attention.value_length", m->head_dim, MAX_HEAD_DIM, &v, err, cap) ||
        !model_shape(m, "attention.key_length_mla", m->head_dim, MAX_HEAD_DIM, &m->k_len, err, cap) ||
        !model_shape(m, "attention.value_length_mla", v, MAX_HEAD_DIM, &m->v_len, err, cap) ||
        (model_layer_uint(m, "attention.q_lora_rank", -1, 0) && !model_shape(m, "attention.q_lora_rank", 0, 1 << 20, &m->n_q_rank, err, cap)))
        return 0;
    m->head_dim = m->by_head ? m->n_latent + m->n_rot : m->k_len;
    m->n_head_kv = m->by_head ? 1 : m->n_head;
    if (m->n_rot >= m->k_len || m->v_len > m->head_dim || m->head_dim > MAX_HEAD_DIM)
        return sys_fail(err, cap, "%s: latent attention with keys of %d, values of %d and %d rotated numbers is not supported", m->file->path, m->k_len,
                        m->v_len, m->n_rot);
    return 1;
}

static int model_read_shapes(model *m, char *err, size_t cap) {
    int v_dim = 0;
    const int limit = 1 << 20;
    int ok = model_shape(m, "block_count", 0, MAX_LAYERS, &m->n_layer, err, cap) &&
             model_shape(m, "embedding_length", 0, limit, &m->n_embd, err, cap) &&
             model_shape(m, "attention.head_count", 0, 65536, &m->n_head, err, cap) &&
             model_shape(m, "attention.head_count_kv", m->n_head, 65536, &m->n_head_kv, err, cap) &&
             model_shape(m, "context_length", 0, MAX_CONTEXT, &m->n_ctx_train, err, cap) &&
             model_shape(m, "attention.key_length", m->n_embd / m->n_head, MAX_HEAD_DIM, &m->head_dim, err, cap) &&
             model_shape(m, "attention.value_length", m->head_dim, MAX_HEAD_DIM, &v_dim, err, cap) &&
             model_shape(m, "rope.dimension_count", m->head_dim, MAX_HEAD_DIM, &m->n_rot, err, cap) && model_scan(m, err, cap);
    if (!ok) return 0;
    if (model_layer_uint(m, "expert_count", -1, 0) == 0 || model_layer_uint(m, "feed_forward_length", 0, 0))
        ok = model_shape(m, "feed_forward_length", 0, limit, &m->n_ff, err, cap);
    if (!ok) return 0;
    if (m->n_head % m->n_head_kv) return sys_fail(err, cap, "%s: %d heads cannot share %d KV heads evenly", m->file->path, m->n_head, m->n_head_kv);
    if (!model_read_latent(m, err, cap)) return 0;
    if (v_dim != m->head_dim && !m->n_latent)
        return sys_fail(err, cap, "%s: keys of %d and values of %d numbers: different sizes are not supported", m->file->path, m->head_dim, v_dim);
    m->n_vocab = m->tok->n;
    return model_read_experts(m, err, cap) && model_read_rope(m, err, cap) && model_read_layers(m, err, cap) && model_read_scales(m, err, cap);
}

static void model_name(model *m) {
    static const char *const kinds[] = {[0] = "F32", [1] = "F16", [2] = "Q4_0", [3] = "Q4_1", [7] = "Q8_0", [8] = "Q5_0", [9] = "Q5_1", [10] = "Q2_K",
        [11] = "Q3_K_S", [12] = "Q3_K_M", [13] = "Q3_K_L", [14] = "Q4_K_S", [15] = "Q4_K_M", [16] = "Q5_K_S", [17] = "Q5_K_M", [18] = "Q6_K",
        [25] = "IQ4_NL", [30] = "IQ4_XS", [32] = "BF16", [38] = "MXFP4"};
    uint64_t type = gguf_get_uint(m->file, "general.file_type", 999);
    const char *known = type < sizeof kinds / sizeof *kinds ? kinds[type] : NULL;
    const quant_format *first = m->layer && m->layer[0].q.format ? m->layer[0].q.format : m->token_embd.format; /* a layer of convolutions has no q */
    snprintf(m->quant, sizeof m->quant, "%s", known ? known : first ? first->name : "none");
    str name = gguf_get_str(m->file, "general.name");
    if (name.len == 0 || utf8_count(name) < 0) {
        const char *slash = strrchr(m->file->path, '/');
        name = str_of(slash ? slash + 1 : m->file->path);
        if (name.len > 5 && memcmp(name.ptr + name.len - 5, ".gguf", 5) == 0) name.len -= 5;
    }
    snprintf(m->name, sizeof m->name, "%.*s", (int)(name.len < 100 ? name.len : 100), name.ptr);
}

static void model_free(model *m) {
    if (!m) return;
    for (int l = 0; m->layer && l < m->n_layer; l++)
        for (int i = 0; i < N_LAYER_TENSORS; i++)
            for (int k = 0; k < 3 && model_layer_tensors[i].kind == VECTOR && model_layer_tensors[i].part[k].out != DIM_NONE; k++) {
                float **v = (float **)(void *)((char *)&m->layer[l] + model_layer_tensors[i].part[k].field);
                free(*v), *v = NULL;
            }
    free(m->layer), free(m->output_norm), free(m->output_norm_bias), free(m->rope_freqs), free(m->rope_long), free(m->rope_short);
    free(m->inv_freq[0]), free(m->inv_freq[1]);
    tok_free(m->tok);
    gguf_close(m->file);
    free(m);
}

static int model_find_arch(model *m, char *err, size_t cap) {
    char shown[96], names[512] = "";
    str arch = gguf_get_str(m->file, "general.architecture");
    for (size_t i = 0; i < sizeof model_archs / sizeof *model_archs; i++) {
        if (str_is(arch, model_archs[i].name)) m->arch = &model_archs[i];
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s%s", i ? ", " : "", model_archs[i].name);
    }
    if (m->arch) return 1;
    for (size_t i = 0; i < sizeof model_refused / sizeof *model_refused; i++)
        if (str_is(arch, model_refused[i].name))
            return sys_fail(err, cap, "%s: architecture '%s' is not supported: it needs %s; supported: %s", m->file->path, model_refused[i].name,
                            model_refused[i].lacks, names);
    return sys_fail(err, cap, "%s: architecture '%s' is not supported; supported: %s", m->file->path, gguf_show(arch, shown), names);
}

static int model_read(model *m, const char *path, const char *pre, char *err, size_t cap) {
    if (!(m->file = gguf_open(path, err, cap)) || !model_find_arch(m, err, cap)) return 0;
    if (m->file->n_tensors == 0) return sys_fail(err, cap, "%s: the file holds a vocabulary only, no tensors", path);
    if (!(m->tok = tok_load(m->file, pre, err, cap))) return 0;
    if (!model_read_shapes(m, err, cap) || !model_bind_all(m, err, cap)) return 0;
    if (m->rope_long && m->rope_short) m->rope_kind = "longrope"; /* some converters name it otherwise */
    if (strcmp(m->rope_kind, "longrope") == 0 && (!m->rope_long || !m->rope_short))
        return sys_fail(err, cap, "%s: rope scaling is longrope, but rope_factors_long.weight or rope_factors_short.weight is missing", path);
    if (m->rope_freqs && strcmp(m->rope_kind, "none") == 0) m->rope_kind = "llama3";
    model_use_context(m, 0);
    model_name(m);
    return 1;
}

/* Maps, checks and binds a model file. NULL with one line in err. */
static model *model_load(const char *path, const char *pre, char *err, size_t cap) {
    model *m = sys_zalloc(1, sizeof *m);
    if (!m) return sys_fail(err, cap, "out of memory"), NULL;
    if (model_read(m, path, pre, err, cap)) return m;
    model_free(m);
    return NULL;
}

/* How the model's layers lie in a KV block: those with attention have K and V, a convolution its inputs as
 * [KV_BLOCK][n_embd] floats. */
static kv_layout model_kv_layout(const model *m, enum mat_kv kv) {
    kv_layout l = kv_layout_of(m->n_layer - m->n_conv_layers, m->n_head_kv, m->head_dim, kv);
    l.conv_bytes = (size_t)m->n_embd * KV_BLOCK * sizeof(float);
    l.block_bytes += l.conv_bytes * (size_t)m->n_conv_layers;
    return l;
}

/* ---- the forward pass ---- */

typedef struct { /* tokens to compute; those of one sequence follow each other, positions ascending */
    int n;
    const int32_t *id;               /* [n] */
    const int32_t *pos;              /* [n] */
    const uint32_t *const *blocks;   /* [n] the KV blocks of each token's sequence */
    const unsigned char *want;       /* [n] nonzero: compute this token's logits */
    int (*stop)(void *);             /* asked between layers; nonzero abandons the batch. May be NULL */
    void *stop_arg;
} model_batch;

typedef struct {
    const model *m;
    const mat_kernels *k;
    pool *threads;
    kv_pool *kv;
    int max_tokens, max_logits; /* of a batch */
    float *x, *xn, *y;          /* [max_tokens][n_embd] the residual stream; its norm; what a half of a layer adds to it */
    float *q, *kv_new;          /* [max_tokens][n_head*head_dim] or [3*n_embd]; K then V as [2][max_tokens][n_head_kv*head_dim] */
    float *att, *gate, *up;     /* [max_tokens][n_head*head_dim]; [max_tokens][n_ff] x2, or [max_tokens * n_used][n_ff_exp] */
    float *cos_sin;             /* [2][max_tokens][n_rot] */
    float *logits;              /* [max_logits][n_vocab], in the order of the tokens that wanted them */
    float *route, *share;       /* [max_tokens][n_expert] the router's logits; [max_tokens] the shared expert's gate */
    float *weight;              /* [max_tokens][n_used] of the experts chosen */
    int32_t *chosen, *slot;     /* [max_tokens][n_used] them; the place of this token among all tokens, sorted by expert */
    int32_t *slot_token, *slot_expert; /* [max_tokens * n_used] */
    int32_t *first_slot;        /* [n_groups + 1] of experts, or of heads with matrices of their own */
    float *sorted;              /* [max_tokens * n_used][n_embd] the experts' inputs, then their outputs */
    float *latent;              /* [max_tokens][n_latent + n_rot] */
    float *heads, *heads_out;   /* of latent attention: see model_run_latent */
    char *scratch;              /* [threads][scratch_bytes] of the kernels */
    size_t scratch_bytes;
    int32_t *group;             /* [max_tokens + 1] */
    mat_act act, *group_act;    /* group_act [n_expert or n_head]: the part of act that lies in each one's slots */
    char *pages;                /* what all of the above lies in */
    size_t bytes;
    const model_batch *batch;   /* of the pass that runs */
    model_layer *layer;
    char *kv_layer;             /* the layer in KV block 0 */
    mat_product *product;       /* [MODEL_PRODUCTS + 2 * n_expert or n_head] */
    int64_t *first_item;        /* [the same + 1] of each product, and the number of all */
    int n_products, item_rows;  /* the products' rows are shared out by item_rows */
    intptr_t next_item;         /* atomic: the first that nobody has claimed */
} model_run;

enum { MODEL_PRODUCTS = 4 }; /* that share their input: q, k, v; or gate, up, router, share */

/* Lays out the scratch: with base NULL it only counts. */
static uint64_t model_run_layout(model_run *r, char *base) {
    const model *m = r->m;
    uint64_t at = 0, n = (uint64_t)r->max_tokens, embd = (uint64_t)m->n_embd, q = (uint64_t)m->n_head * (uint64_t)m->head_dim;
    uint64_t kv = (uint64_t)m->n_head_kv * (uint64_t)m->head_dim;
    uint64_t slots = n * (uint64_t)m->n_used, ff = n * (uint64_t)(m->n_ff > m->n_ff_shared ? m->n_ff : m->n_ff_shared), ff_exp = slots * (uint64_t)m->n_ff_exp;
    uint64_t widest = embd > q ? embd : q, qs = m->n_conv_layers && 3 * embd > q ? 3 * embd : q, atts = m->n_conv_layers && embd > q ? embd : q;
    if (ff / n > widest) widest = ff / n;
    uint64_t latent = m->n_latent ? (uint64_t)(m->n_latent + m->n_rot) : 0, heads = m->n_latent ? (uint64_t)m->n_head : 0;
    uint64_t head = heads * (latent > (uint64_t)(m->k_len + m->v_len) ? latent : (uint64_t)(m->k_len + m->v_len));
    if (latent > atts) atts = latent; /* kv_b's input lies there */
    if (head > widest) widest = head;
    if ((uint64_t)m->n_q_rank > widest) widest = (uint64_t)m->n_q_rank;
    uint64_t expert_widest = embd > (uint64_t)m->n_ff_exp ? embd : (uint64_t)m->n_ff_exp, experts = (uint64_t)m->n_expert;
    uint64_t groups = experts > heads ? experts : heads;
    uint64_t blocks = n * ((widest + 255) / 256 + heads), expert_blocks = slots * ((expert_widest + 255) / 256);
    if (expert_blocks > blocks) blocks = expert_blocks;
    if (ff_exp > ff) ff = ff_exp;
    size_t attention = mat_attention_scratch(m->n_head, m->n_head_kv, m->head_dim), product = mat_scratch(r->max_tokens);
    r->scratch_bytes = ((attention > product ? attention : product) + 63) / 64 * 64 + 64; /* not a power of two apart */
#define TAKE(field, type, count) r->field = (type *)(void *)(base + (size_t)at), at += ((uint64_t)(count) * sizeof(type) + 63) / 64 * 64
    TAKE(x, float, n * embd);
    TAKE(xn, float, n * embd);
    TAKE(y, float, n * embd);
    TAKE(q, float, n * qs);
    TAKE(kv_new, float, n * kv * 2);
    TAKE(att, float, n * atts);
    TAKE(gate, float, ff);
    TAKE(up, float, ff);
    TAKE(cos_sin, float, 2 * n * (size_t)m->n_rot);
    TAKE(logits, float, (size_t)r->max_logits * (size_t)m->n_vocab);
    TAKE(route, float, n * experts);
    TAKE(share, float, n);
    TAKE(weight, float, slots);
    TAKE(chosen, int32_t, slots);
    TAKE(slot, int32_t, slots);
    TAKE(slot_token, int32_t, slots);
    TAKE(slot_expert, int32_t, slots);
    TAKE(first_slot, int32_t, groups + 1);
    TAKE(sorted, float, slots * embd);
    TAKE(latent, float, n * latent);
    TAKE(heads, float, heads ? n * (head > (size_t)m->n_q_rank ? head : (size_t)m->n_q_rank) : 0);
    TAKE(heads_out, float, n * head);
    TAKE(scratch, char, (size_t)r->threads->n_threads * r->scratch_bytes);
    TAKE(group, int32_t, n + 1);
    TAKE(act.blocks, mat_x, blocks + n);
    TAKE(act.super, mat_x, blocks);
    TAKE(group_act, mat_act, groups);
    uint64_t products = MODEL_PRODUCTS + (2 * experts > heads ? 2 * experts : heads);
    TAKE(product, mat_product, products);
    TAKE(first_item, int64_t, products + 1);
#undef TAKE
    return at;
}

static uint64_t model_run_bytes(const model *m, int n_threads, int max_tokens, int max_logits) {
    pool threads;
    model_run r;
    memset(&r, 0, sizeof r);
    threads.n_threads = n_threads;
    r.m = m, r.threads = &threads, r.max_tokens = max_tokens, r.max_logits = max_logits;
    static char origin; /* only differences of addresses count */
    return model_run_layout(&r, &origin);
}

static int model_run_open(model_run *r, const model *m, const mat_kernels *k, pool *threads, kv_pool *kv, int max_tokens, int max_logits) {
    memset(r, 0, sizeof *r);
    r->m = m, r->k = k, r->threads = threads, r->kv = kv, r->max_tokens = max_tokens, r->max_logits = max_logits;
    uint64_t bytes = model_run_bytes(m, threads->n_threads, max_tokens, max_logits);
    if (bytes > SIZE_MAX / 2) return 0;
    r->bytes = (size_t)bytes;
    r->pages = sys_pages(r->bytes);
    if (!r->pages) return 0;
#ifdef MADV_HUGEPAGE
    madvise(r->pages, r->bytes, MADV_HUGEPAGE); /* fewer faults in the first prompt; refused, nothing is lost */
#endif
    model_run_layout(r, r->pages);
    return 1;
}

static void model_run_close(model_run *r) {
    sys_pages_free(r->pages, r->bytes);
    memset(r, 0, sizeof *r);
}

/* ---- products: the matrices of one step, their row tiles shared out together ---- */

/* Where item i begins, among the rows of all products; the product is stored in *p, NULL beyond the last. */
static int64_t model_item(const model_run *r, int64_t i, const mat_product **p) {
    int lo = 0, hi = r->n_products;
    while (lo < hi) { /* the last product that begins at or before i; none is empty */
        int mid = (lo + hi + 1) / 2;
        if (r->first_item[mid] <= i) lo = mid;
        else hi = mid - 1;
    }
    *p = lo < r->n_products ? &r->product[lo] : NULL;
    return *p ? (i - r->first_item[lo]) * r->item_rows : 0;
}

/* One thread's part. The first item goes by the seat, the others to whoever comes; each is claimed one ahead,
 * so that the end of an item can fetch the beginning of the next from memory. */
static void model_multiply_seat(void *ctx, int64_t seat, int thread) {
    model_run *r = ctx;
    const mat_product *p, *q;
    for (int64_t row = model_item(r, seat, &p), next_row; p; p = q, row = next_row) {
        next_row = model_item(r, __atomic_fetch_add(&r->next_item, 1, __ATOMIC_RELAXED), &q);
        const char *ahead = q ? q->weights + (size_t)next_row * quant_row_bytes(q->format, q->act->n) : NULL;
        int rows = p->n_rows - row < r->item_rows ? (int)(p->n_rows - row) : r->item_rows;
        r->k->multiply(p, row, rows, ahead, r->scratch + (size_t)thread * r->scratch_bytes);
    }
}

/* out = w . the input; nothing if the matrix is absent. */
static void model_product(model_run *r, const model_matrix *w, float *out) {
    mat_product p = {w->format, w->data, &r->act, out, w->rows};
    if (w->format) r->product[r->n_products++] = p;
}

/* Computes the products that model_product has collected. Where there are few rows they go out in short runs. */
static void model_multiply(model_run *r) {
    int64_t rows = 0;
    for (int i = 0; i < r->n_products; i++) rows += r->product[i].n_rows;
    r->first_item[0] = 0;
    r->item_rows = rows < r->threads->n_threads * 8 * MAT_ROWS || (r->act.n_tok > 1 && r->act.n_tok <= MAT_FEW) ? MAT_ROWS / 2 : MAT_ROWS;
    for (int i = 0; i < r->n_products; i++) r->first_item[i + 1] = r->first_item[i] + (r->product[i].n_rows + r->item_rows - 1) / r->item_rows;
    r->next_item = r->threads->n_threads;
    pool_run(r->threads, model_multiply_seat, r, r->threads->n_threads);
    r->n_products = 0;
}

/* The input of the next products: quantised token by token by the step that follows. */
static void model_input(model_run *r, const float *x, int64_t n, int n_tok) { r->act.x = x, r->act.n = n, r->act.n_tok = n_tok; }

/* ---- steps of a layer for one token t: each may run on any thread ---- */

/* Quantises token t for the products with these matrices, n of them; those absent do not count. */
static void model_quantise(model_run *r, int64_t t, const model_matrix *const *w, int n) {
    unsigned kinds = 0;
    for (int i = 0; i < n; i++)
        if (w[i]->format) kinds |= 1u << w[i]->format->kind;
    r->k->quantise(&r->act, kinds, (int)t);
}

static void model_norm(const model_run *r, float *out, const float *x, const float *w, const float *bias, int n) {
    if (r->m->style & S_LAYER_NORM) r->k->layer_norm(out, x, w, n, r->m->eps);
    else r->k->rms_norm(out, x, w, n, r->m->eps);
    if (bias) r->k->add(out, bias, n);
}

static void model_embed_token(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    (void)thread;
    const model_matrix *embd = &m->token_embd, *p = &m->positions;
    float *x = r->x + t * m->n_embd, *y = r->y + t * m->n_embd;
    int pos = r->batch->pos[t];
    quant_dequantise(embd->format, embd->data + (size_t)r->batch->id[t] * quant_row_bytes(embd->format, m->n_embd), x, m->n_embd);
    if (m->embd_scale != 1)
        for (int i = 0; i < m->n_embd; i++) x[i] *= m->embd_scale;
    if (p->format) {
        quant_dequantise(p->format, p->data + (size_t)pos * quant_row_bytes(p->format, m->n_embd), y, m->n_embd);
        r->k->add(x, y, m->n_embd);
    }
    for (int table = 0; table < 2 && m->inv_freq[table]; table++) {
        float *turn = r->cos_sin + ((int64_t)table * r->batch->n + t) * m->n_rot;
        for (int i = 0; i < m->n_rot / 2; i++) {
            double s, c;
            num_sincos(pos * m->inv_freq[table][i], &s, &c);
            turn[2 * i] = (float)(c * m->rope_scale[table]), turn[2 * i + 1] = (float)(s * m->rope_scale[table]);
        }
    }
}

static void model_attn_norm(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model_layer *l = r->layer;
    int n = r->m->n_embd;
    (void)thread;
    if (l->attn_norm) model_norm(r, r->xn + t * n, r->x + t * n, l->attn_norm, l->attn_norm_bias, n);
    else memcpy(r->xn + t * n, r->x + t * n, (size_t)n * sizeof(float));
    const model_matrix *const w[] = {&l->q, &l->k, &l->v, &l->conv_in, &l->q_a, &l->kv_a};
    model_quantise(r, t, w, 6);
}

/* Bias, norm and rotation of all heads of q or k. */
static void model_finish_heads(const model_run *r, int64_t t, float *x, int heads, const float *norm, const float *bias) {
    const model *m = r->m;
    const float *turn = r->layer->rope < 0 ? NULL : r->cos_sin + ((int64_t)r->layer->rope * r->batch->n + t) * m->n_rot;
    unsigned groups = m->arch->has | m->arch->may;
    if (bias) r->k->add(x, bias, (int64_t)heads * m->head_dim);
    if (norm && (groups & T_WIDE_NORM)) model_norm(r, x, x, norm, NULL, heads * m->head_dim);
    for (int h = 0; h < heads; h++, x += m->head_dim) {
        if (norm && !(groups & T_WIDE_NORM)) model_norm(r, x, x, norm + (groups & T_HEADS_NORM ? h * m->head_dim : 0), NULL, m->head_dim);
        if (turn) r->k->rope(x, turn, m->n_rot, (m->style & S_HALVES) != 0);
    }
}

static char *model_kv_at(const model_run *r, int64_t t, int pos) { /* the layer in the block of position pos of token t's sequence */
    return r->kv_layer + r->batch->blocks[t][pos / KV_BLOCK] * r->kv->layout.block_bytes;
}

/* Biases, norms and RoPE, then the new key and value go into the cache. */
static void model_store_token(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    const model_layer *l = r->layer;
    int64_t kv = (int64_t)m->n_head_kv * m->head_dim;
    float *k = r->kv_new + t * kv, *v = r->kv_new + r->batch->n * kv + t * kv;
    (void)thread;
    model_finish_heads(r, t, r->q + t * m->n_head * m->head_dim, m->n_head, l->q_norm, l->q_bias);
    model_finish_heads(r, t, k, m->n_head_kv, l->k_norm, l->k_bias);
    if (l->v_bias) r->k->add(v, l->v_bias, kv);
    int pos = r->batch->pos[t];
    char *block = model_kv_at(r, t, pos);
    for (int h = 0; h < m->n_head_kv; h++)
        r->k->store(block + (size_t)h * r->kv->layout.head_bytes, k + h * m->head_dim, v + h * m->head_dim, pos % KV_BLOCK, m->head_dim, r->kv->layout.kv);
}

static void model_attend_item(void *ctx, int64_t item, int thread) {
    const mat_attention *a = ((void **)ctx)[0];
    const model_run *r = ((void **)ctx)[1];
    r->k->attend(a, (int)(item / a->n_head_kv), (int)(item % a->n_head_kv), r->scratch + (size_t)thread * r->scratch_bytes);
}

/* Groups neighbours of one sequence, then runs all groups and KV heads. */
static void model_attend(model_run *r) {
    const model *m = r->m;
    const model_batch *b = r->batch;
    int groups = 0, most = mat_attention_tokens(m->n_head, m->n_head_kv);
    for (int t = 0; t < b->n; t++)
        if (t == 0 || b->blocks[t] != b->blocks[t - 1] || t - r->group[groups - 1] == most) r->group[groups++] = t;
    r->group[groups] = b->n;
    mat_attention a = {r->q, r->att, b->pos, b->blocks, r->group, r->kv_layer, r->kv->layout.block_bytes, r->kv->layout.head_bytes, r->kv->layout.kv,
                       m->n_head, m->n_head_kv, m->head_dim, m->attn_scale, r->layer->window, m->attn_cap, r->layer->sinks};
    void *ctx[2] = {&a, r};
    pool_run(r->threads, model_attend_item, ctx, (int64_t)groups * m->n_head_kv);
}

/* A short convolution's input b * x goes into the cache; q holds b, c and x of the token. */
static void model_store_conv(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    int64_t n = r->m->n_embd;
    const float *b = r->q + t * 3 * n, *x = b + 2 * n;
    int pos = r->batch->pos[t];
    float *to = (float *)(void *)model_kv_at(r, t, pos) + pos % KV_BLOCK * n;
    (void)thread;
    for (int64_t i = 0; i < n; i++) to[i] = b[i] * x[i];
}

/* att = c * (the sum of the last n_conv inputs, each times its weight, oldest first). */
static void model_convolve(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    int64_t n = r->m->n_embd, taps = r->m->n_conv;
    const float *c = r->q + t * 3 * n + n, *w = r->layer->conv;
    float *out = r->att + t * n;
    (void)thread;
    memset(out, 0, (size_t)n * sizeof *out);
    for (int64_t k = 0, pos = r->batch->pos[t] - taps + 1; k < taps; k++, pos++) {
        if (pos < 0) continue;
        const float *in = (const float *)(const void *)model_kv_at(r, t, (int)pos) + pos % KV_BLOCK * n;
        for (int64_t i = 0; i < n; i++) out[i] += in[i] * w[i * taps + k];
    }
    for (int64_t i = 0; i < n; i++) out[i] *= c[i];
}

static void model_quantise_att(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model_matrix *const w[] = {&r->layer->o};
    (void)thread;
    model_quantise(r, t, w, 1);
}

/* Adds to the residual stream what half a layer has left in y. */
static void model_add(model_run *r, int64_t t, const float *bias, const float *norm) {
    int n = r->m->n_embd;
    float *y = r->y + t * n;
    if (bias) r->k->add(y, bias, n);
    if (norm) model_norm(r, y, y, norm, NULL, n);
    if (r->m->residual_scale != 1)
        for (int i = 0; i < n; i++) y[i] *= r->m->residual_scale;
    r->k->add(r->x + t * n, y, n);
}

/* The input of the feed-forward layer: the norm of the stream; without such a norm attention's own input, which
 * runs beside it then, or the stream itself where that has no norm either. */
static void model_ffn_norm(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model_layer *l = r->layer;
    int n = r->m->n_embd;
    (void)thread;
    model_add(r, t, l->o_bias, l->attn_post_norm);
    if (l->ffn_norm) model_norm(r, r->xn + t * n, r->x + t * n, l->ffn_norm, l->ffn_norm_bias, n);
    else if (!l->attn_norm) memcpy(r->xn + t * n, r->x + t * n, (size_t)n * sizeof(float));
    const model_matrix *const w[] = {&l->gate, &l->up, &l->route, &l->share};
    model_quantise(r, t, w, 4);
}

static void model_activate(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model_layer *l = r->layer;
    int64_t n = l->down.n;
    float *gate = r->gate + t * n, *up = r->up + t * n;
    (void)thread;
    if (l->up_bias) r->k->add(up, l->up_bias, n);
    if (l->gate_bias) r->k->add(gate, l->gate_bias, n);
    if (l->gate.format) r->k->activate(r->m->arch->activation, gate, up, n);
    else r->k->activate(r->m->arch->activation, up, NULL, n);
    const model_matrix *const w[] = {&l->down};
    model_quantise(r, t, w, 1);
}

static void model_add_ffn(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    (void)thread;
    model_add(r, t, r->layer->has_experts ? NULL : r->layer->down_bias, r->layer->ffn_post_norm);
}

/* ---- experts: each token goes to n_used of them; tokens are sorted by expert, so that each is one product ---- */

/* Chooses token t's experts, the likeliest first and of equals the first, and weights them. */
static void model_route_token(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    const model_layer *l = r->layer;
    float *p = r->route + t * m->n_expert, *w = r->weight + t * m->n_used, sum = 0, top = -INFINITY;
    int32_t *chosen = r->chosen + t * m->n_used;
    (void)thread;
    if (l->route_bias) r->k->add(p, l->route_bias, m->n_expert);
    if (m->style & S_SIGMOID) {
        for (int e = 0; e < m->n_expert; e++) p[e] = -p[e];
        r->k->exp_shifted(p, p, m->n_expert, 0);
        for (int e = 0; e < m->n_expert; e++) p[e] = 1 / (1 + p[e]);
    } else if (!(m->style & S_CHOSEN_SOFTMAX)) {
        for (int e = 0; e < m->n_expert; e++) top = p[e] > top ? p[e] : top;
        r->k->exp_shifted(p, p, m->n_expert, top);
        for (int e = 0; e < m->n_expert; e++) sum += p[e];
        for (int e = 0; e < m->n_expert; e++) p[e] /= sum;
    }
    for (int i = 0; i < m->n_used; i++) {
        int best = -1;
        for (int e = 0; e < m->n_expert; e++) {
            int taken = 0;
            for (int j = 0; j < i; j++) taken |= chosen[j] == e;
            float bias_e = l->choice_bias ? l->choice_bias[e] : 0, bias_best = l->choice_bias && best >= 0 ? l->choice_bias[best] : 0;
            if (!taken && (best < 0 || p[e] + bias_e > p[best] + bias_best)) best = e;
        }
        chosen[i] = best, w[i] = p[best];
    }
    if (m->style & S_CHOSEN_SOFTMAX) r->k->exp_shifted(w, w, m->n_used, w[0]);
    sum = 0;
    for (int i = 0; i < m->n_used; i++) sum += w[i];
    if (m->style & (S_NORMED | S_CHOSEN_SOFTMAX))
        for (int i = 0; i < m->n_used; i++) w[i] /= sum > 6.103515625e-5f ? sum : 6.103515625e-5f; /* the least normal half float, as in llama.cpp */
    for (int i = 0; i < m->n_used; i++) w[i] *= m->expert_scale;
}

/* Sorts all (token, choice) pairs by expert, in the order of the tokens. */
static void model_sort_tokens(model_run *r) {
    const model *m = r->m;
    int n = r->batch->n * m->n_used;
    memset(r->first_slot, 0, (size_t)(m->n_expert + 1) * sizeof *r->first_slot);
    for (int i = 0; i < n; i++) r->first_slot[r->chosen[i] + 1]++;
    for (int e = 0; e < m->n_expert; e++) r->first_slot[e + 1] += r->first_slot[e];
    for (int i = 0; i < n; i++) {
        int s = r->slot[i] = r->first_slot[r->chosen[i]]++;
        r->slot_token[s] = i / m->n_used, r->slot_expert[s] = r->chosen[i];
    }
    for (int e = m->n_expert; e > 0; e--) r->first_slot[e] = r->first_slot[e - 1];
    r->first_slot[0] = 0;
}

/* Products of groups, experts or heads, each with a matrix of its own, [n_groups * rows][n] in all: the inputs x
 * [slots][n] are sorted by group, and those of group g begin at first_slot[g]. */
static void model_group_input(model_run *r, int n_groups, const float *x, int64_t n) {
    int64_t blocks = (n + 255) / 256;
    for (int g = 0; g < n_groups; g++) {
        int64_t from = r->first_slot[g];
        mat_act a = {x + from * n, r->act.blocks + from * blocks, r->act.super + from * blocks, n, (int)(r->first_slot[g + 1] - from)};
        r->group_act[g] = a;
    }
}

static void model_group_products(model_run *r, int n_groups, const model_matrix *w, float *out) {
    int64_t rows = w->rows / n_groups;
    for (int g = 0; g < n_groups; g++) {
        mat_product p = {w->format, w->data + (size_t)(g * rows) * quant_row_bytes(w->format, w->n), &r->group_act[g], out + r->first_slot[g] * rows, rows};
        if (r->group_act[g].n_tok) r->product[r->n_products++] = p;
    }
}

static void model_quantise_slot(model_run *r, int64_t s, const model_matrix *a, const model_matrix *b) {
    int e = r->slot_expert[s];
    r->k->quantise(&r->group_act[e], 1u << a->format->kind | 1u << b->format->kind, (int)(s - r->first_slot[e]));
}

static void model_gather_slot(void *ctx, int64_t s, int thread) {
    model_run *r = ctx;
    int64_t n = r->m->n_embd;
    (void)thread;
    memcpy(r->sorted + s * n, r->xn + r->slot_token[s] * n, (size_t)n * sizeof(float));
    model_quantise_slot(r, s, &r->layer->gates, &r->layer->ups);
}

static void model_activate_slot(void *ctx, int64_t s, int thread) {
    model_run *r = ctx;
    const model_layer *l = r->layer;
    int64_t n = r->m->n_ff_exp, e = r->slot_expert[s];
    (void)thread;
    if (l->gates_bias) r->k->add(r->gate + s * n, l->gates_bias + e * n, n), r->k->add(r->up + s * n, l->ups_bias + e * n, n);
    r->k->activate(r->m->arch->activation, r->gate + s * n, r->up + s * n, n);
    model_quantise_slot(r, s, &l->downs, &l->downs);
}

/* y = the shared expert's output, if there is one, by its gate, and the chosen ones' by their weights. */
static void model_mix_token(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model_layer *l = r->layer;
    int64_t n = r->m->n_embd;
    float *y = r->y + t * n, g = -r->share[t];
    (void)thread;
    if (!l->gate.format) memset(y, 0, (size_t)n * sizeof *y);
    if (l->share.format) {
        r->k->exp_shifted(&g, &g, 1, 0);
        for (int64_t i = 0; i < n; i++) y[i] *= 1 / (1 + g);
    }
    for (int j = 0; j < r->m->n_used; j++) {
        int64_t s = r->slot[t * r->m->n_used + j];
        float *out = r->sorted + s * n, w = r->weight[t * r->m->n_used + j];
        if (l->downs_bias) r->k->add(out, l->downs_bias + r->slot_expert[s] * n, n);
        for (int64_t i = 0; i < n; i++) y[i] += out[i] * w;
    }
}

static void model_run_experts(model_run *r) {
    const model_layer *l = r->layer;
    int64_t slots = (int64_t)r->batch->n * r->m->n_used;
    pool_run(r->threads, model_route_token, r, r->batch->n);
    model_sort_tokens(r);
    model_group_input(r, r->m->n_expert, r->sorted, r->m->n_embd);
    pool_run(r->threads, model_gather_slot, r, slots);
    model_group_products(r, r->m->n_expert, &l->gates, r->gate);   /* gate, up [slots][n_ff_exp] */
    model_group_products(r, r->m->n_expert, &l->ups, r->up);
    model_multiply(r);
    model_group_input(r, r->m->n_expert, r->gate, r->m->n_ff_exp);
    pool_run(r->threads, model_activate_slot, r, slots);
    model_group_products(r, r->m->n_expert, &l->downs, r->sorted); /* sorted [slots][n_embd] */
    model_multiply(r);
    pool_run(r->threads, model_mix_token, r, r->batch->n);         /* y [n][n_embd] */
}

/* ---- latent attention ---- */

/* The norm of the queries' latent vectors, in place, in `heads`. */
static void model_latent_query(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    int n = r->m->n_q_rank;
    const model_matrix *const w[] = {&r->layer->q_b};
    (void)thread;
    model_norm(r, r->heads + t * n, r->heads + t * n, r->layer->q_a_norm, NULL, n);
    model_quantise(r, t, w, 1);
}

/* Turns the last n_rot numbers of each query (in heads_out) and of the latent vector; norms the rest of that. Where
 * heads have matrices, what is left of the queries goes to `heads`, [n_head][n][k_len - n_rot], as these' input. */
static void model_latent_token(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    const float *turn = r->cos_sin + t * m->n_rot;
    float *q = r->heads_out + t * m->n_head * m->k_len, *c = r->latent + t * (m->n_latent + m->n_rot);
    int nope = m->k_len - m->n_rot, n = r->batch->n;
    (void)thread;
    model_norm(r, c, c, r->layer->kv_a_norm, NULL, m->n_latent);
    r->k->rope(c + m->n_latent, turn, m->n_rot, (m->style & S_HALVES) != 0);
    for (int h = 0; h < m->n_head; h++, q += m->k_len) {
        r->k->rope(q + nope, turn, m->n_rot, (m->style & S_HALVES) != 0);
        if (!m->by_head) continue;
        memcpy(r->heads + ((int64_t)h * n + t) * nope, q, (size_t)nope * sizeof *q);
        memcpy(r->q + (t * m->n_head + h) * m->head_dim + m->n_latent, q + nope, (size_t)m->n_rot * sizeof *q);
        r->k->quantise(&r->group_act[h], 1u << r->layer->k_heads.format->kind, (int)t);
    }
    if (m->by_head) return;
    memcpy(r->q + t * m->n_head * m->k_len, r->heads_out + t * m->n_head * m->k_len, (size_t)(m->n_head * m->k_len) * sizeof *q);
    memcpy(r->att + t * m->n_latent, c, (size_t)m->n_latent * sizeof *c); /* in rows of n_latent: the input of kv_b */
    const model_matrix *const w[] = {&r->layer->kv_b};
    model_quantise(r, t, w, 1);
}

/* Keys and values of the token into the cache. By head matrices (outputs in heads_out, [n_head][n][n_latent]) queries
 * become complete too. */
static void model_latent_store(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    const float *c = r->latent + t * (m->n_latent + m->n_rot);
    float k[MAX_HEAD_DIM], v[MAX_HEAD_DIM] = {0};
    int pos = r->batch->pos[t], nope = m->k_len - m->n_rot, n = r->batch->n;
    char *block = model_kv_at(r, t, pos);
    (void)thread;
    memcpy(k, c, (size_t)(m->by_head ? m->head_dim : m->n_latent) * sizeof *k), memcpy(v, c, (size_t)(m->by_head ? m->n_latent : 0) * sizeof *v);
    for (int h = 0; m->by_head && h < m->n_head; h++)
        memcpy(r->q + (t * m->n_head + h) * m->head_dim, r->heads_out + ((int64_t)h * n + t) * m->n_latent, (size_t)m->n_latent * sizeof *k);
    for (int h = 0; h < m->n_head_kv; h++) {
        const float *kv = r->heads + (t * m->n_head + h) * (nope + m->v_len);
        if (!m->by_head) {
            memcpy(k, kv, (size_t)nope * sizeof *k), memcpy(k + nope, c + m->n_latent, (size_t)m->n_rot * sizeof *k);
            memcpy(v, kv + nope, (size_t)m->v_len * sizeof *v);
        }
        r->k->store(block + (size_t)h * r->kv->layout.head_bytes, k, v, pos % KV_BLOCK, m->head_dim, r->kv->layout.kv);
    }
}

/* Takes attention's padded output to heads: [n_head][n][n_latent] as the input of the heads' matrices, or
 * [n][n_head * v_len]. */
static void model_latent_unpad(void *ctx, int64_t t, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    (void)thread;
    for (int h = 0; h < m->n_head; h++) {
        const float *from = r->att + (t * m->n_head + h) * m->head_dim;
        if (m->by_head) {
            memcpy(r->heads + ((int64_t)h * r->batch->n + t) * m->n_latent, from, (size_t)m->n_latent * sizeof *from);
            r->k->quantise(&r->group_act[h], 1u << r->layer->v_heads.format->kind, (int)t);
        } else memcpy(r->heads + (t * m->n_head + h) * m->v_len, from, (size_t)m->v_len * sizeof *from);
    }
}

static void model_latent_gather(void *ctx, int64_t t, int thread) { /* heads_out [n_head][n][v_len] to heads [n][n_head * v_len] */
    model_run *r = ctx;
    const model *m = r->m;
    (void)thread;
    for (int h = 0; h < m->n_head; h++)
        memcpy(r->heads + (t * m->n_head + h) * m->v_len, r->heads_out + ((int64_t)h * r->batch->n + t) * m->v_len, (size_t)m->v_len * sizeof(float));
}

static void model_run_latent(model_run *r, int n) {
    const model *m = r->m;
    const model_layer *l = r->layer;
    for (int h = 0; m->by_head && h <= m->n_head; h++) r->first_slot[h] = h * n;
    model_product(r, &l->q, r->heads_out);                         /* heads_out [n][n_head * k_len]: queries */
    model_product(r, &l->q_a, r->heads);                           /* or heads [n][n_q_rank] */
    model_product(r, &l->kv_a, r->latent);                         /* latent [n][n_latent + n_rot] */
    model_multiply(r);
    if (l->q_a.format) {
        model_input(r, r->heads, m->n_q_rank, n);
        pool_run(r->threads, model_latent_query, r, n);
        model_product(r, &l->q_b, r->heads_out);
        model_multiply(r);
    }
    if (m->by_head) model_group_input(r, m->n_head, r->heads, m->k_len - m->n_rot);
    else model_input(r, r->att, m->n_latent, n);
    pool_run(r->threads, model_latent_token, r, n);
    if (m->by_head) model_group_products(r, m->n_head, &l->k_heads, r->heads_out); /* heads_out [n_head][n][n_latent] */
    else model_product(r, &l->kv_b, r->heads);                     /* heads [n][n_head][k_len - n_rot + v_len] */
    model_multiply(r);
    pool_run(r->threads, model_latent_store, r, n);
    model_attend(r);                                               /* att [n][n_head * head_dim] */
    if (m->by_head) model_group_input(r, m->n_head, r->heads, m->n_latent);
    pool_run(r->threads, model_latent_unpad, r, n);
    if (!m->by_head) return;
    model_group_products(r, m->n_head, &l->v_heads, r->heads_out); /* heads_out [n_head][n][v_len] */
    model_multiply(r);
    pool_run(r->threads, model_latent_gather, r, n);
}

/* ---- the layers ---- */

static void model_run_attention(model_run *r, int n) {
    const model *m = r->m;
    model_product(r, &r->layer->q, r->q);                          /* q [n][n_head * head_dim] */
    model_product(r, &r->layer->k, r->kv_new);                     /* k, v [n][n_head_kv * head_dim] */
    model_product(r, &r->layer->v, r->kv_new + (size_t)n * (size_t)(m->n_head_kv * m->head_dim));
    model_multiply(r);
    pool_run(r->threads, model_store_token, r, n);                 /* q and k rotated; k, v in the cache */
    model_attend(r);                                               /* att [n][n_head * head_dim] */
}

static void model_run_conv(model_run *r, int n) {
    model_product(r, &r->layer->conv_in, r->q);                    /* q [n][3 * n_embd] */
    model_multiply(r);
    pool_run(r->threads, model_store_conv, r, n);
    pool_run(r->threads, model_convolve, r, n);                    /* att [n][n_embd] */
}

/* A dense layer, or a shared expert; the router's and its gate's products go along. */
static void model_run_ffn(model_run *r, int n) {
    const model_layer *l = r->layer;
    model_product(r, &l->route, r->route);
    model_product(r, &l->share, r->share);
    model_product(r, &l->gate, r->gate);                           /* gate, up [n][n_ff] */
    model_product(r, &l->up, r->up);
    model_multiply(r);
    if (!l->down.format) return;
    model_input(r, l->gate.format ? r->gate : r->up, l->down.n, n);
    pool_run(r->threads, model_activate, r, n);                    /* activation(gate) * up */
    model_product(r, &l->down, r->y);                              /* y [n][n_embd] */
    model_multiply(r);
}

static void model_output_token(void *ctx, int64_t i, int thread) { /* the i-th of those that are wanted, listed in group */
    model_run *r = ctx;
    const model *m = r->m;
    const model_matrix *const w[] = {&m->output};
    (void)thread;
    model_norm(r, r->xn + i * m->n_embd, r->x + (int64_t)r->group[i] * m->n_embd, m->output_norm, m->output_norm_bias, m->n_embd);
    model_quantise(r, i, w, 1);
}

static void model_finish_logits(void *ctx, int64_t i, int thread) {
    model_run *r = ctx;
    const model *m = r->m;
    float *x = r->logits + i * m->n_vocab;
    (void)thread;
    if (m->logit_scale != 1)
        for (int k = 0; k < m->n_vocab; k++) x[k] *= m->logit_scale;
    if (m->logit_cap > 0) r->k->cap(x, m->n_vocab, m->logit_cap);
}

/* Final norm and output head of the tokens whose logits are wanted. */
static void model_output(model_run *r) {
    const model *m = r->m;
    int n = 0;
    for (int t = 0; t < r->batch->n; t++)
        if (r->batch->want[t]) r->group[n++] = t;
    if (n == 0) return;
    model_input(r, r->xn, m->n_embd, n);
    pool_run(r->threads, model_output_token, r, n);
    model_product(r, &m->output, r->logits);
    model_multiply(r);
    if (m->logit_scale != 1 || m->logit_cap > 0) pool_run(r->threads, model_finish_logits, r, n);
}

/* Runs the model over a batch: fills in the KV cache at the tokens' positions and leaves the wanted logits
 * in r->logits. Returns 0 if b->stop abandoned it (its positions must then be computed again). A token's
 * arithmetic depends on its own sequence alone, never on the rest of the batch. */
static int model_forward(model_run *r, const model_batch *b) {
    const model *m = r->m;
    int n = b->n;
    r->batch = b;
    r->kv_layer = r->kv->base;
    pool_run(r->threads, model_embed_token, r, n);                 /* x [n][n_embd], cos_sin [2][n][n_rot] */
    for (int l = 0; l < m->n_layer; l++) {
        if (b->stop && b->stop(b->stop_arg)) return 0;
        r->layer = &m->layer[l];
        model_input(r, r->xn, m->n_embd, n);
        pool_run(r->threads, model_attn_norm, r, n);               /* xn [n][n_embd] */
        if (r->layer->is_conv) model_run_conv(r, n);
        else if (m->n_latent) model_run_latent(r, n);
        else model_run_attention(r, n);                            /* att (latent: heads) [n][o.n] */
        model_input(r, m->n_latent ? r->heads : r->att, r->layer->o.n, n);
        pool_run(r->threads, model_quantise_att, r, n);
        model_product(r, &r->layer->o, r->y);                      /* y [n][n_embd] */
        model_multiply(r);
        model_input(r, r->xn, m->n_embd, n);
        pool_run(r->threads, model_ffn_norm, r, n);                /* x += y; xn = norm(x) */
        model_run_ffn(r, n);
        if (r->layer->has_experts) model_run_experts(r);
        pool_run(r->threads, model_add_ffn, r, n);                 /* x += y */
        r->kv_layer += r->layer->is_conv ? r->kv->layout.conv_bytes : r->kv->layout.layer_bytes;
    }
    return model_output(r), 1;
}

/* ==== Sampling =============================================================================
 * From logits to a token. Order: penalties, temperature, top-k, top-p, min-p, draw. Ties go to the lower
 * id everywhere. The draw for output index i is a function of (seed, i) alone, so a job that is resumed
 * elsewhere draws the same. Sums are taken in a fixed order (by id), in double. */

typedef struct {
    float temperature, top_p, min_p, repetition_penalty;
    int top_k;
    uint64_t seed;
} sample_params;

static int sample_is_greedy(const sample_params *p) { return p->temperature < 1e-30f || p->top_k == 1; }

typedef struct { /* scratch for one vocabulary; each thread that samples has one */
    int n_vocab;
    float *weight;      /* [n_vocab] exp(logit - largest); 0 for what may not be drawn */
    int32_t *order;     /* [2][n_vocab] candidates, the best first, and room to sort them */
} sample_work;

static int sample_open(sample_work *s, int n_vocab) {
    s->n_vocab = n_vocab;
    s->weight = sys_zalloc((size_t)n_vocab, sizeof *s->weight);
    s->order = sys_zalloc((size_t)n_vocab * 2, sizeof *s->order);
    return s->weight && s->order;
}

static void sample_close(sample_work *s) { free(s->weight), free(s->order); }

/* A uniform number in [0, 1) for (seed, index): SplitMix64's finaliser over both, used as a counter-based
 * generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). */
static double sample_uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed;
    for (int round = 0; round < 2; round++) {
        z += 0x9e3779b97f4a7c15u * (round ? index + 1 : 1);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        z ^= z >> 31;
    }
    return (double)(z >> 11) * 0x1p-53;
}

/* Sorts n ids, which ascend, by falling logits; of equals the lower id comes first. Three passes of a radix
 * sort over the bits of the logits, which are ordered like the numbers once negative ones are turned around. */
static void sample_sort(const float *logits, int32_t *id, int32_t *room, int n) {
    enum { BITS = 11, CELLS = 1 << BITS };
    for (int pass = 0; pass < 3; pass++) {
        int start[CELLS + 1] = {0};
        for (int step = 0; step < 2; step++)
            for (int i = 0; i < n; i++) {
                uint32_t bits = num_bits(logits[id[i]] + 0.0f); /* -0 becomes 0 */
                uint32_t key = (bits >> 31 ? bits : 0x7fffffffu - bits) >> (pass * BITS) & (CELLS - 1);
                if (step == 0) start[key + 1]++;
                else room[start[key]++] = id[i];
                if (step == 0 && i == n - 1)
                    for (int c = 0; c < CELLS; c++) start[c + 1] += start[c];
            }
        int32_t *swap = id;
        id = room, room = swap;
    }
}

enum { SAMPLE_CELLS = 2048 };

static int sample_cell(float below) { return below < SAMPLE_CELLS / 64 ? (int)(below * 64) : SAMPLE_CELLS - 1; } /* grows with it */

/* Collects, best first, at least the candidates that top-k and top-p can keep. Only they are sorted: a rough count by
 * how far the logits lie below the largest says down to where they go. Returns their number. */
static int sample_candidates(sample_work *s, const float *logits, float best, int most, double mass) {
    int count[SAMPLE_CELLS] = {0}, cell = 0, n = 0;
    double sum[SAMPLE_CELLS] = {0}, sums = 0;
    for (int i = 0; i < s->n_vocab; i++) {
        int c = sample_cell(best - logits[i]);
        count[c]++, sum[c] += s->weight[i];
    }
    for (; cell < SAMPLE_CELLS - 1; cell++) {
        n += count[cell], sums += sum[cell];
        if (n >= most || sums > mass) break;
    }
    n = 0;
    for (int i = 0; i < s->n_vocab; i++)
        if (sample_cell(best - logits[i]) <= cell) s->order[n++] = i;
    sample_sort(logits, s->order, s->order + s->n_vocab, n);
    memcpy(s->order, s->order + s->n_vocab, (size_t)n * sizeof *s->order); /* an odd number of passes */
    return n;
}

/* Keeps the most likely tokens: at most top_k of them, and of those the fewest whose probabilities (among
 * the top_k) reach top_p; then drops what is below min_p of the largest. At least one stays; the weights of
 * all others become 0. */
static void sample_filter(sample_work *s, const float *logits, float best, const sample_params *p) {
    int n = s->n_vocab, most = p->top_k > 0 && p->top_k < n ? p->top_k : n, kept = 0;
    double total = 0, sum = 0;
    if (most == n && p->top_p >= 1) { /* min-p alone asks for no order */
        for (int i = 0; i < n; i++)
            if (s->weight[i] < p->min_p) s->weight[i] = 0; /* the largest weight is 1 */
        return;
    }
    for (int i = 0; most == n && i < n; i++) total += s->weight[i];
    int found = sample_candidates(s, logits, best, most, most == n ? (double)p->top_p * total * 1.000001 : DBL_MAX);
    for (int i = 0; most < n && i < most; i++) total += s->weight[s->order[i]];
    while (kept < most && kept < found) {
        int32_t top = s->order[kept];
        if (kept && s->weight[top] < p->min_p) break;
        kept++;
        sum += s->weight[top];
        if (p->top_p < 1 && sum >= (double)p->top_p * total) break;
    }
    int32_t last = s->order[kept - 1];
    float least = logits[last];
    for (int i = 0; i < n; i++)
        if (logits[i] < least || (i > last && logits[i] <= least)) s->weight[i] = 0;
}

static int32_t sample_argmax(const float *logits, int n) {
    int32_t best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

/* Draws a token by its weight, walking in the order of the ids. */
static int32_t sample_draw(const sample_work *s, double u) {
    double total = 0, sum = 0;
    int32_t last = 0;
    for (int i = 0; i < s->n_vocab; i++) total += s->weight[i];
    for (int i = 0; i < s->n_vocab; i++) {
        sum += s->weight[i];
        if (sum > u * total) return i;
        if (s->weight[i] > 0) last = i;
    }
    return last; /* rounding left a sliver at the end */
}

/* Penalises each distinct token of `seen` once. Extreme penalties stay finite. */
static void sample_penalise(float *logits, const int32_t *seen, int n_seen, float penalty) {
    if (penalty == 1) return;
    for (int i = 0; i < n_seen; i++) {
        float x = logits[seen[i]] > 0 ? logits[seen[i]] / penalty : logits[seen[i]] * penalty;
        logits[seen[i]] = x > 1e7f ? 1e7f : x;
    }
}

/* Chooses output token `index` from logits, which it changes. Tokens whose logit is -infinity (banned by
 * the caller) are never chosen. The logits must otherwise be finite. */
static int32_t sample_token(sample_work *s, const mat_kernels *k, float *logits, const sample_params *p, uint64_t index) {
    int32_t best = sample_argmax(logits, s->n_vocab);
    if (sample_is_greedy(p)) return best; /* what is below would only overflow */
    for (int i = 0; i < s->n_vocab; i++) logits[i] /= p->temperature;
    k->exp_shifted(s->weight, logits, s->n_vocab, logits[best]);
    for (int i = 0; i < s->n_vocab; i++)
        if (logits[i] == -INFINITY) s->weight[i] = 0;
    if (p->top_p < 1 || p->min_p > 0 || (p->top_k > 0 && p->top_k < s->n_vocab)) sample_filter(s, logits, logits[best], p);
    return sample_draw(s, sample_uniform(p->seed, index));
}

static int sample_finite(const float *logits, int n) { /* branch-free, so that it costs nothing */
    uint32_t bad = 0;
    for (int i = 0; i < n; i++) bad |= (num_bits(logits[i]) & 0x7f800000u) == 0x7f800000u;
    return !bad;
}

/* ==== Engine ===============================================================================
 * Jobs, from acceptance to their one terminal event. Three threads meet here under one lock: whoever
 * submits and cancels (the I/O thread, or an embedder's), the intake thread, which tokenizes, accepts or
 * refuses, and watches the queue, and the engine thread, which alone runs the model and touches the KV
 * pool. A job's life: INTAKE -> QUEUED -> PREFILL -> DECODE -> DONE, or from any of the first four straight
 * to DONE. All that a running job needs is allocated by intake and reserved on entering a slot, so nothing
 * can fail it for memory later. Events go to the job's sink, on the thread that makes them, in order. */

enum engine_state { JOB_INTAKE, JOB_QUEUED, JOB_PREFILL, JOB_DECODE, JOB_DONE };
enum engine_event_type { EVENT_REFUSED, EVENT_STARTED, EVENT_PREFILL, EVENT_TOKEN, EVENT_METRICS, EVENT_END, EVENT_ERROR };
static const char *const engine_outcome_names[] = {"success", "error", "cancelled", "timeout", "rejected"};
enum engine_cancel_cause { CANCEL_NONE, CANCEL_ASKED, CANCEL_DRAIN }; /* DRAIN: another worker may run the job */
enum engine_outcome { OUTCOME_SUCCESS, OUTCOME_ERROR, OUTCOME_CANCELLED, OUTCOME_TIMEOUT, OUTCOME_REJECTED, OUTCOMES };

/* Codes of the contract with their HTTP status. */
typedef struct {
    const char *code;
    int status;
} engine_error;
static const engine_error ERR_INVALID = {"INVALID_REQUEST", 400}, ERR_CONTEXT = {"CONTEXT_LENGTH_EXCEEDED", 400},
    ERR_UNAUTHORIZED = {"UNAUTHORIZED", 401}, ERR_NOT_FOUND = {"NOT_FOUND", 404}, ERR_METHOD = {"METHOD_NOT_ALLOWED", 405},
    ERR_REQUEST_TIMEOUT = {"REQUEST_TIMEOUT", 408}, ERR_JOB_EXISTS = {"JOB_EXISTS", 409}, ERR_TOO_LARGE = {"PAYLOAD_TOO_LARGE", 413},
    ERR_MEDIA_TYPE = {"UNSUPPORTED_MEDIA_TYPE", 415}, ERR_HEADERS = {"HEADERS_TOO_LARGE", 431}, ERR_INTERNAL = {"INTERNAL", 500},
    ERR_NOT_IMPLEMENTED = {"NOT_IMPLEMENTED", 501}, ERR_HTTP_VERSION = {"HTTP_VERSION", 505}, ERR_BUSY = {"ALL_SLOTS_BUSY", 503},
    ERR_NOT_READY = {"NOT_READY", 503}, ERR_TIMEOUT = {"INFERENCE_TIMEOUT", 504}, ERR_DEADLINE = {"DEADLINE_UNATTAINABLE", 504},
    ERR_CANCELLED = {"CANCELLED", 499};

typedef struct {
    enum engine_event_type type;
    int index;                 /* TOKEN: from 0. PREFILL: prompt tokens done */
    int32_t id;
    str text;                  /* TOKEN: valid during the call */
    lorch_reason reason;       /* END */
    const engine_error *error; /* REFUSED, ERROR */
    const char *message;
    const char *details;       /* REFUSED: JSON members, or "" */
} engine_event;

enum {
    ENGINE_WAITING_BYTES = 16 << 20, /* memory of jobs that wait */
    ENGINE_DRAFT = 8,       /* most tokens proposed for one job and step */
    ENGINE_DRAFT_ROWS = 16, /* of all jobs together: each needs a row of logits */
    ENGINE_MAX_ROWS = 1024, /* tokens in one batch: the most that --chunk allows */
    ENGINE_MIN_CHUNK = 4,   /* prompt tokens that a batch takes on however slow the machine is */
    GRAM = 3,               /* tokens that must match before what followed them is proposed */
    GRAM_RUNS = 3           /* chances of a proposal are kept apart by how many before it were right: 0, up to 3, more */
};

/* A slice is what one layer of a long prompt may take: the longest time in which nobody looks at cancels. A prompt that
 * shares its batches with decoding jobs delays their tokens by at most two of them. */
static const double ENGINE_SLICE_S = 0.020;
static const double ENGINE_BUSY_S = 2; /* over so many seconds the number of jobs is averaged */
enum { ENGINE_USUAL = 32 };            /* over so many jobs their size */

typedef struct { /* a token whose event waits until its text is decided */
    int index;
    int32_t id;
    size_t end; /* of its text in the window */
} engine_pending;

typedef struct engine_job engine_job;
typedef void (*engine_sink)(engine_job *job, const engine_event *ev);

struct engine_job {
    /* set before engine_submit */
    buf id, prompt, stop[MAX_STOPS], cache_name; /* cache_name: jobs share prefixes only with those of the same name */
    char correlation[65];
    sample_params sample;
    int max_tokens, n_stop, ignore_eos, special, resume_from, speculate;
    int64_t deadline_unix_ms;  /* 0: none */
    uint64_t deadline_ms;      /* as the request gave it, from its arrival */
    int failed;                /* memory ran out while the request was read: what is here is not what was asked for */
    int has_seed, has_deadline, resumes; /* resumes: resume_from was given */
    int earlier;               /* refused because a job of this id has ended as earlier_outcome, with n_out tokens */
    enum engine_outcome earlier_outcome;
    int n_field_errors;
    buf field_errors;          /* JSON objects, separated by commas: intake refuses the job with them */
    engine_sink sink;
    void *user;                /* the sink's */
    /* under the engine's lock */
    enum engine_state state;
    engine_job *next_live, *next_queued;
    int refs;                  /* the engine's and the submitter's */
    /* atomic */
    int cancel;                /* enum engine_cancel_cause */
    /* the engine's */
    int32_t *token;            /* [n_prompt + max_tokens] */
    int n_prompt, n_out, n_computed; /* n_computed: positions whose keys and values are in the cache */
    int n_cached;              /* of these, those that another job had computed */
    uint64_t cache_key;        /* of cache_name */
    uint64_t bytes;            /* of its own memory, as the engine has counted it */
    kv_seq kv;
    int32_t *gram;             /* [gram_mask + 1] by hash of GRAM tokens: the position after their latest occurrence */
    uint32_t gram_mask;
    int follow;                /* the position after the latest earlier occurrence of the last GRAM tokens; 0: none */
    int n_drafted, n_accepted; /* tokens proposed, and those that were right */
    int n_right;               /* tokens in a row that the text before them foresaw */
    int n_foreseen[GRAM_RUNS]; /* how often the next one was looked up so far */
    double chance[GRAM_RUNS];  /* that the next one is foreseen as well: moving averages, whether it was proposed or not */
    int n_steps;               /* batches that gave it tokens */
    int32_t *seen;             /* distinct tokens of prompt and output, for penalties */
    int n_seen;
    unsigned char *seen_bit;   /* [n_vocab / 8 + 1] */
    buf window;                /* decoded text that is not given out yet, in reserved room */
    char tail[4];              /* bytes of an unfinished code point */
    int n_tail;
    engine_pending *pending;   /* [max_tokens] */
    int n_pending, stop_matched;
    double cpu_seconds;        /* its share of the process's, by rows computed, and what intake spent on it */
    double estimate;           /* seconds from acceptance to its end, as foreseen then; -1: not known */
    double t_submit, t_run, t_decode, t_last_token, t_metrics, t_cancel, t_done, t_progress;
};

enum { HIST_BUCKETS = 12 };
typedef struct {
    uint64_t count[HIST_BUCKETS + 1]; /* the last: beyond all bounds */
    double sum;
} engine_hist;
static const double engine_hist_bounds[HIST_BUCKETS] = {0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 120};

typedef struct { /* what is remembered of an id that is not live */
    uint64_t id[2];  /* two salted hashes of it: 128 bits that nobody can aim at */
    double when;
    int ended;       /* 1: that job has ended; 0: cancelled before it came */
    enum engine_outcome outcome;
    int tokens_out;
    int next;        /* of the same bucket, or -1 */
} engine_memory;
enum { ENGINE_MEMORIES = 1 << 15, ENGINE_MEMORY_SECONDS = 60 }; /* more than 500 jobs a second for a minute */

/* What a batch costs, learned from those that ran: seconds by its number of rows, at a few numbers of them, and
 * beside that for each earlier position that a row attends to. */
enum { COST_KNOTS = 20 };
static const int engine_knots[COST_KNOTS] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024};
typedef struct {
    double seconds[COST_KNOTS]; /* 0: not measured */
    double attend[2];           /* of rows that decode, of rows of a prompt */
} engine_cost;

typedef struct { /* a copy of what /health and /metrics show */
    int running, queued, live;
    uint64_t outcome[OUTCOMES], tokens_in, tokens_out, deadline_refused, cached_tokens, drafted, accepted;
    engine_hist duration, first_token, token, cancel, queue_wait; /* seconds; duration's bounds are in ms / 10 */
    double prefill_rate, decode_rate; /* tokens per second, of one job; 0: not measured yet */
    engine_cost cost;
    double busy;              /* slots in use, over the last seconds */
    double tokens_per_step[2]; /* of one job that decodes, drafts that were right included: sampled, greedy; moving averages */
    double usual_prefill, usual_steps; /* of a job: prompt tokens that were computed, batches that decoded; moving averages */
    int n_left;               /* jobs that have left their slot; counted up to ENGINE_USUAL */
    double jobs_cpu, intake_cpu; /* CPU seconds that jobs were charged with; of these, by intake */
    double kv_used;           /* share of the pool that jobs have reserved */
    int kv_idle_tokens;       /* of finished prompts and outputs that are kept for new jobs */
} engine_stats;

typedef struct { /* a job's part of a batch */
    engine_job *job;
    int first, n;            /* its rows */
    int first_logits;        /* of the first of them that wants logits; the others follow */
    int n_draft;             /* in decode: rows beyond the first, whose tokens are proposed */
    int prefill, done;       /* rows of a prompt; and they are its last */
    int gone;                /* the job has ended meanwhile: its rows are computed for nothing */
    int broken;              /* its logits are not finite */
    int32_t chosen[ENGINE_DRAFT + 1];
    int n_chosen;
} engine_span;

typedef struct {
    lorch_options options;    /* as they came out: nothing is 0 any more */
    int inference_timeout_s, max_tokens_in; /* 0: no limit of its own */
    model *m;
    const mat_kernels *k;
    pool threads;
    kv_pool kv;
    model_run run;
    sample_work *sampler;     /* [n_samplers] as many as may sample at the same time */
    int n_samplers;
    int n_ctx;
    size_t max_piece;         /* bytes of the longest token */
    pthread_mutex_t lock;
    pthread_cond_t work, intake, idle;
    engine_job *live, *intake_first, *intake_last, *queue_first, *queue_last; /* under lock, as all below */
    engine_job *running[MAX_PARALLEL]; /* slots; the engine thread writes them under lock */
    int turn;                 /* the slot whose prompt goes next */
    int stop, draining;
    engine_stats stats;
    uint64_t salt;            /* of cache keys: random, so that nobody can make two names collide */
    engine_memory *memory;    /* [ENGINE_MEMORIES], a ring */
    int *memory_bucket;       /* [ENGINE_MEMORIES] first of each bucket, or -1 */
    unsigned memory_next;
    pthread_t engine_thread, intake_thread;
    int n_started;            /* threads to join */
    buf piece;                /* the engine thread's: bytes of one token */
    /* the engine thread's: the batch that runs */
    engine_span span[MAX_PARALLEL];
    int n_spans, n_rows, n_logits, layer; /* layer: how many have begun */
    int32_t id[ENGINE_MAX_ROWS], pos[ENGINE_MAX_ROWS];
    const uint32_t *blocks[ENGINE_MAX_ROWS];
    unsigned char want[ENGINE_MAX_ROWS];
    double cpu_mark, intake_mark; /* what of the process's and the intake's CPU time is charged already */
    int calibrating, calibrations; /* calibrations: how often it was tried; ENGINE_CALIBRATIONS: never again */
    const char *threads_because; /* what decided their number */
    uint64_t required;        /* private bytes that KV cache and scratch need */
    uint64_t job_bytes, job_bytes_most; /* of all live jobs' own memory, under lock; no job is taken beyond */
    char fingerprint[17];     /* of the model file: set before has_fingerprint */
    int has_fingerprint;      /* atomic */
    int64_t progress_ms;      /* atomic: when the engine last made progress, on the monotonic clock */
} engine;

/* ---- jobs ---- */

static engine_job *engine_job_new(void) {
    engine_job *j = sys_zalloc(1, sizeof *j);
    if (!j) return NULL;
    j->refs = 1;
    j->stop_matched = -1;
    return j;
}

static void engine_job_free(engine_job *j) {
    buf_free(&j->id), buf_free(&j->prompt), buf_free(&j->cache_name), buf_free(&j->field_errors), buf_free(&j->window);
    for (int i = 0; i < MAX_STOPS; i++) buf_free(&j->stop[i]);
    free(j->token), free(j->gram), free(j->kv.block), free(j->seen), free(j->seen_bit), free(j->pending);
    free(j);
}

/* Gives back one of the two references; the last frees the job. */
static void engine_job_drop(engine *e, engine_job *j) {
    pthread_mutex_lock(&e->lock);
    int left = --j->refs;
    if (left == 0) e->job_bytes -= j->bytes;
    pthread_mutex_unlock(&e->lock);
    if (left == 0) engine_job_free(j);
}

static void engine_hist_add(engine_hist *h, double seconds) {
    int i = 0;
    while (i < HIST_BUCKETS && seconds > engine_hist_bounds[i]) i++;
    h->count[i]++;
    h->sum += seconds;
}

static void engine_hash_id(const engine *e, str id, uint64_t out[2]) {
    uint64_t a = e->salt, b = ~e->salt;
    for (size_t i = 0; i < id.len; i++) {
        a = (a ^ (unsigned char)id.ptr[i]) * 0xbf58476d1ce4e5b9u, a ^= a >> 31;
        b = (b ^ (unsigned char)id.ptr[i]) * 0x94d049bb133111ebu, b ^= b >> 29;
    }
    out[0] = a, out[1] = b;
}

static engine_memory *engine_remembered(engine *e, str id, double now) { /* under lock; NULL: not known */
    uint64_t h[2];
    engine_hash_id(e, id, h);
    for (int i = e->memory_bucket[h[0] % ENGINE_MEMORIES]; i >= 0; i = e->memory[i].next)
        if (e->memory[i].id[0] == h[0] && e->memory[i].id[1] == h[1] && e->memory[i].when > now - ENGINE_MEMORY_SECONDS) return &e->memory[i];
    return NULL;
}

/* Under lock. A full memory forgets the oldest. */
static engine_memory *engine_remember(engine *e, str id) {
    double now = sys_now();
    engine_memory *r = engine_remembered(e, id, now);
    if (!r) {
        int n = e->memory_next++ % ENGINE_MEMORIES;
        r = &e->memory[n];
        for (int *at = &e->memory_bucket[r->id[0] % ENGINE_MEMORIES]; r->when > 0 && *at >= 0; at = &e->memory[*at].next)
            if (*at == n) {
                *at = r->next;
                break;
            }
        engine_hash_id(e, id, r->id);
        int *bucket = &e->memory_bucket[r->id[0] % ENGINE_MEMORIES];
        r->next = *bucket, *bucket = n;
    }
    r->when = now, r->ended = 0;
    return r;
}

static void engine_emit(engine_job *j, const engine_event *ev) { j->sink(j, ev); }

/* Takes the job out of the live list and counts it; the caller then emits the event and drops the
 * engine's reference. `refused`: it was never accepted. */
static void engine_retire(engine *e, engine_job *j, enum engine_outcome outcome) {
    double now = sys_now();
    pthread_mutex_lock(&e->lock);
    for (engine_job **p = &e->live; *p; p = &(*p)->next_live)
        if (*p == j) {
            *p = j->next_live;
            break;
        }
    j->state = JOB_DONE, j->t_done = now;
    e->stats.live--;
    e->stats.outcome[outcome]++;
    if (outcome != OUTCOME_REJECTED) {
        e->stats.tokens_out += (uint64_t)j->n_out;
        engine_hist_add(&e->stats.duration, (now - j->t_submit) / 10);
        if (j->id.len) {
            engine_memory *r = engine_remember(e, buf_str(&j->id));
            r->ended = 1, r->outcome = outcome, r->tokens_out = j->n_out;
        }
    }
    if (j->t_cancel > 0) engine_hist_add(&e->stats.cancel, now - j->t_cancel);
    pthread_mutex_unlock(&e->lock);
}

static void engine_end_error(engine *e, engine_job *j, const engine_error *error, const char *message) {
    engine_event ev = {EVENT_ERROR, 0, 0, {"", 0}, LORCH_FAILED, error, message, ""};
    engine_retire(e, j, error == &ERR_CANCELLED ? OUTCOME_CANCELLED : error == &ERR_TIMEOUT ? OUTCOME_TIMEOUT : OUTCOME_ERROR);
    engine_emit(j, &ev);
    engine_job_drop(e, j);
}

static void engine_refuse(engine *e, engine_job *j, const engine_error *error, const char *message, const char *details) {
    engine_event ev = {EVENT_REFUSED, 0, 0, {"", 0}, LORCH_FAILED, error, message, details};
    engine_retire(e, j, OUTCOME_REJECTED);
    engine_emit(j, &ev);
    engine_job_drop(e, j);
}

/* Why a job must end now, or NULL. t_cancel is written once, by the canceller, before `cancel`. */
static const engine_error *engine_must_end(const engine *e, engine_job *j, const char **message) {
    int cancel = __atomic_load_n(&j->cancel, __ATOMIC_ACQUIRE);
    if (gguf_is_lost(e->m->file)) return *message = "the model file cannot be read any more", &ERR_INTERNAL;
    if (cancel) return *message = cancel == CANCEL_DRAIN ? "the worker is shutting down" : "the job was cancelled", &ERR_CANCELLED;
    if (j->deadline_unix_ms && sys_unix_ms() > j->deadline_unix_ms) return *message = "the job's deadline has passed", &ERR_TIMEOUT;
    if (e->inference_timeout_s && j->t_run > 0 && sys_now() - j->t_run > e->inference_timeout_s)
        return *message = "the job ran longer than --inference-timeout-sec allows", &ERR_TIMEOUT;
    return NULL;
}

/* ---- what batches cost, and when a job will end ---- */

static double engine_knot_at(double n, int *below) { /* the place of n among the knots, and the knot below it */
    int k = 0;
    while (k + 1 < COST_KNOTS && engine_knots[k + 1] <= n) k++;
    *below = k;
    return k + 1 < COST_KNOTS ? k + (n - engine_knots[k]) / (engine_knots[k + 1] - engine_knots[k]) : k;
}

/* Seconds of a batch of n rows, short positions: between what was measured; 0: nothing was. */
static double engine_rows_cost(const engine_cost *c, double n) {
    int low = -1, lower = -1, high = -1;
    for (int k = 0; k < COST_KNOTS && high < 0; k++) {
        if (c->seconds[k] <= 0) continue;
        if (engine_knots[k] <= n) low = k;
        else high = k;
    }
    if (low < 0) return high < 0 ? 0 : c->seconds[high];
    for (int k = 0; high < 0 && engine_knots[k] <= engine_knots[low] / 4; k++) /* beyond them all: near ones would say too little of the slope */
        if (c->seconds[k] > 0) lower = k;
    int a = high < 0 ? lower : low, b = high < 0 ? low : high; /* the line through these two */
    if (a < 0) return c->seconds[b] * n / engine_knots[b];
    double slope = (c->seconds[b] - c->seconds[a]) / (engine_knots[b] - engine_knots[a]), t = c->seconds[a] + slope * (n - engine_knots[a]);
    return t > c->seconds[low] / 2 ? t : c->seconds[low] / 2;
}

/* The sum of n positions from pos on. */
static double engine_positions(double pos, double n) { return n * (pos + n / 2); }

static void engine_average(double *average, double value, double weight) { *average += weight * (value - *average); }

/* Learns from a batch of n rows that took so many seconds. One of them counts at most as twice or half of what was
 * foreseen: a process that was stopped for a second has not become slow. What a number of rows costs says something of
 * its neighbours too, since the same memory serves both. Under lock. */
static void engine_learn_cost(engine_cost *c, int n, double decode_positions, double prompt_positions, double seconds) {
    int knot, prompt = prompt_positions > decode_positions;
    double at = engine_knot_at(n, &knot), rows = engine_rows_cost(c, n), attending = c->attend[0] * decode_positions + c->attend[1] * prompt_positions;
    if (!(seconds > 0 && seconds < 1e6)) return; /* a clock that stood still */
    if (rows > 0 && (decode_positions + prompt_positions) / n > 512 && attending > 0) { /* far enough to learn what attention costs */
        double share = (seconds - rows) / attending;
        engine_average(&c->attend[prompt], c->attend[prompt] * (share > 2 ? 2 : share < 0.5 ? 0.5 : share), 0.1);
        return;
    }
    double ratio = rows > 0 ? (seconds - attending) / rows : 1;
    ratio = ratio > 2 ? 2 : ratio < 0.5 ? 0.5 : ratio;
    if (c->seconds[knot] <= 0 && (engine_knots[knot] == n || rows <= 0)) c->seconds[knot] = seconds;
    for (int k = 0; k < COST_KNOTS; k++) {
        double near = 1 - fabs(k - at) / 4;
        if (near > 0) c->seconds[k] *= 1 + 0.2 * near * (ratio - 1);
    }
}

/* How many tokens of a prompt, from position pos on, a batch takes on that has `rows` already which cost `seconds`:
 * so many that it stays within `limit`. */
static int engine_chunk(const engine *e, int rows, double seconds, double limit, int pos) {
    const engine_cost *c = &e->stats.cost;
    int low = 0, high = e->options.chunk;
    double base = engine_rows_cost(c, rows);
    if (e->stats.prefill_rate <= 0) return high < 32 ? high : 32; /* a guess */
    while (low < high) {
        int n = (low + high + 1) / 2;
        if (seconds + engine_rows_cost(c, rows + n) - base + c->attend[1] * engine_positions(pos, n) <= limit) low = n;
        else high = n - 1;
    }
    return low;
}

/* What a batch with prompts in it may take: no layer more than a slice, and where decoding jobs share it, no more
 * than two slices beyond what they would need alone. */
static double engine_limit(const engine *e, double decoding) { return decoding > 0 ? decoding + 2 * ENGINE_SLICE_S : ENGINE_SLICE_S * e->m->n_layer; }

typedef struct { /* what a job in a slot still needs: prompt tokens, then batches that decode */
    double prefill, decode, per_step, pos;
    const engine_job *job;    /* NULL: one that nobody knows yet */
    int after;                /* 1 + the slot whose prompt this one waits for, since it begins alike; or 0 */
} engine_load;

static int engine_load_left(const engine_load *l) { return l->prefill > 0 || l->decode > 0; }

/* The time that passes until one of the slots' jobs changes its state, given how the engine shares itself out: each
 * batch has a row for each job that decodes and some of the prompts, in equal shares. */
static double engine_advance(const engine *e, engine_load *load, int n) {
    const engine_cost *c = &e->stats.cost;
    int prefills = 0, decodes = 0, together = 0; /* together: all prompts end in the next batch */
    double rounds = 1e18, seconds = 0, decode_pos = 0, pos = 0, chunk = 0, left = 0;
    for (int i = 0; i < n; i++) {
        if (load[i].after) continue;
        if (load[i].prefill > 0) prefills++, pos += load[i].pos, left += load[i].prefill;
        else if (load[i].decode > 0) decodes++, decode_pos += load[i].pos;
    }
    double decoding = decodes ? engine_rows_cost(c, decodes) + c->attend[0] * decode_pos : 0;
    if (prefills) {
        chunk = engine_chunk(e, decodes, decoding, engine_limit(e, decoding), (int)(pos / prefills));
        chunk = chunk > ENGINE_MIN_CHUNK ? chunk : ENGINE_MIN_CHUNK;
        if (chunk >= left) chunk = left, together = 1;
    }
    for (int i = 0; i < n; i++) {
        if (load[i].after) continue;
        double need = load[i].prefill > 0 ? (together ? 1 : load[i].prefill * prefills / chunk) : load[i].decode > 0 ? load[i].decode : 1e18;
        if (need < rounds) rounds = need;
    }
    if (rounds > 1e17) return 0;
    for (int i = 0; i < n; i++) {
        if (load[i].after) continue;
        double moves = load[i].prefill > 0 ? (together ? load[i].prefill : rounds * chunk / prefills) : load[i].decode > 0 ? rounds * load[i].per_step : 0;
        if (load[i].prefill > 0) seconds += c->attend[1] * moves * (load[i].pos + moves / 2), load[i].prefill -= moves;
        else if (load[i].decode > 0) seconds += c->attend[0] * rounds * (load[i].pos + moves / 2), load[i].decode -= rounds;
        load[i].pos += moves;
        if (load[i].prefill < 1e-6) load[i].prefill = 0;
        if (load[i].decode < 1e-6) load[i].decode = 0;
    }
    for (int i = 0; i < n; i++)
        if (load[i].after && load[load[i].after - 1].prefill <= 0) load[i].after = 0;
    return seconds + (rounds > 1 ? rounds : 1) * engine_rows_cost(c, decodes + chunk);
}

/* A job as the estimate sees it. `cached`: positions that need no computing. */
static engine_load engine_load_of(const engine *e, const engine_job *j, int cached, int running) {
    engine_load l = {j->n_prompt - cached, 0, e->stats.tokens_per_step[sample_is_greedy(&j->sample)], cached, j, 0};
    if (running && j->state != JOB_PREFILL) l.prefill = 0;
    if (!j->speculate || e->options.no_speculate) l.per_step = 1;
    else if (running && j->n_steps >= 16) l.per_step = (double)j->n_out / j->n_steps;
    l.decode = (j->max_tokens - j->n_out - (j->n_out == 0)) / (l.per_step > 1 ? l.per_step : 1); /* the prompt's last batch gives a token as well */
    if (running && l.decode <= 0 && l.prefill <= 0) l.decode = 0.5; /* it is about to leave */
    return l;
}

/* Whether j can have o's blocks of the tokens up to `end`: they may share, and from `from` on are alike. j's last token it
 * computes itself. */
static int engine_alike(const engine_job *j, const engine_job *o, int from, int end) {
    return o->cache_key == j->cache_key && end < j->n_prompt && end <= o->n_prompt &&
           memcmp(o->token + from, j->token + from, (size_t)(end - from) * sizeof *j->token) == 0;
}

/* Of two jobs that are alike and run, the other leads that has computed more; of two at the same place the one in the first slot. */
static int engine_leads(const engine_job *o, int at, const engine_job *j, int slot) { return o->n_computed >= j->n_computed + (at > slot); }

/* The job of a slot computes nothing that the prompt of another holds as well: it waits for that one. running: both have
 * their slots now; otherwise it has just come, so that nobody waits for it. */
static void engine_share_load(engine_load *load, int n, int slot, int running) {
    const engine_job *j = load[slot].job, *o;
    int most = (int)load[slot].pos, leader = -1;
    if (load[slot].prefill <= 0 || most % KV_BLOCK) return;
    for (int i = 0; i < n; i++) {
        if (i == slot || (o = load[i].job) == NULL || (running && !engine_leads(o, i, j, slot))) continue;
        for (int from = 0; engine_alike(j, o, from, most + KV_BLOCK); from = most) most += KV_BLOCK, leader = i;
    }
    if (leader < 0) return;
    load[slot].prefill = j->n_prompt - most, load[slot].pos = most;
    load[slot].after = load[leader].prefill > 0 ? leader + 1 : 0;
}

/* What a job takes alone, about. */
static double engine_load_seconds(const engine *e, const engine_load *l) { return l->prefill / e->stats.prefill_rate + l->decode / e->stats.decode_rate; }

/* Whoever leaves is likely to be followed by another: fills slots with jobs of `size` until as many are taken as were of late. */
static void engine_follow(const engine *e, engine_load *load, int n, const engine_load *size) {
    int missing = (int)(e->stats.busy + 0.5);
    for (int i = 0; i < n; i++) missing -= engine_load_left(&load[i]);
    for (int i = 0; i < n && missing > 0; i++)
        if (!engine_load_left(&load[i])) load[i] = *size, missing--;
}

/* Seconds until job j, which comes now, will have ended, by playing the engine's schedule forward from what batches cost;
 * *wait: until it gets its slot. j NULL: the wait alone. -1 while nothing is measured. KV space is assumed to be there. */
static double engine_estimate(const engine *e, const engine_job *j, double *wait) { /* under lock */
    engine_load load[MAX_PARALLEL];
    const engine_job *queued = e->queue_first;
    int n = e->options.n_parallel, mine = -1;
    double now = 0;
    *wait = 0;
    if (e->stats.prefill_rate <= 0 || e->stats.decode_rate <= 0) return -1;
    memset(load, 0, sizeof load);
    for (int i = 0; i < n; i++)
        if (e->running[i]) load[i] = engine_load_of(e, e->running[i], e->running[i]->n_computed, 1);
    for (int i = 0; i < n; i++) engine_share_load(load, n, i, 1);
    for (;;) {
        for (int i = 0; i < n && mine < 0; i++) {
            if (engine_load_left(&load[i])) continue;
            if (!queued) {
                mine = i, *wait = now;
                continue;
            }
            load[i] = engine_load_of(e, queued, queued->n_cached, 0), queued = queued->next_queued;
            engine_share_load(load, n, i, 0);
        }
        if (mine >= 0 && !j) return now;
        if (mine >= 0) break;
        now += engine_advance(e, load, n);
    }
    load[mine] = engine_load_of(e, j, j->n_cached, 0);
    engine_share_load(load, n, mine, 0);
    engine_load others = {e->stats.usual_prefill, e->stats.usual_steps, 1, 0, NULL, 0};
    double alike = engine_load_seconds(e, &others) * 8 / engine_load_seconds(e, &load[mine]);
    if (alike > 0 && alike < 1) others.prefill /= alike, others.decode /= alike; /* a long job among many short ones: the same work in fewer pieces */
    while (engine_load_left(&load[mine])) {
        engine_follow(e, load, n, &others);
        now += engine_advance(e, load, n);
    }
    return now;
}

/* ---- intake: what happens before the engine sees a job (intake thread) ---- */

static void engine_field_error(engine_job *j, const char *field, const char *constraint, const char *message, str value) {
    buf *b = &j->field_errors;
    if (j->n_field_errors++ >= MAX_FIELD_ERRORS) return; /* the same field over and over */
    if (b->len) buf_putc(b, ',');
    buf_putc(b, '{');
    json_kv_cstr(b, "field", field), json_kv_cstr(b, "constraint", constraint), json_kv_cstr(b, "message", message), json_kv_str(b, "value", value);
    buf_putc(b, '}');
}

/* The most that one job's arrays take, for n tokens of prompt and output. */
static uint64_t engine_job_need(const engine *e, uint64_t n) {
    uint64_t grams = 64;
    while (grams < 2 * n) grams *= 2;
    return n * (sizeof(int32_t) * 2 + sizeof(engine_pending)) + grams * sizeof(int32_t) + n / KV_BLOCK * 4 + (uint64_t)e->m->n_vocab / 8 + 4096;
}

static int engine_take_bytes(engine *e, engine_job *j, uint64_t bytes) { /* under lock; 0: the budget is spent */
    if (e->job_bytes + bytes > e->job_bytes_most) return 0;
    e->job_bytes += bytes, j->bytes += bytes;
    return 1;
}

/* Tokenizes prompt and stop strings and allocates what the job will need. 0: out of memory. */
static int engine_prepare(engine *e, engine_job *j) {
    tok_ids ids = {0};
    size_t longest = 0;
    for (int i = 0; i < j->n_stop; i++) {
        int long_already = j->stop[i].len > MAX_STOP_TOKENS * e->max_piece; /* no token stands for more bytes */
        ids.n = 0;
        if (!long_already && !tok_encode(e->m->tok, buf_str(&j->stop[i]), 0, &ids)) return free(ids.id), 0;
        if (long_already || ids.n > MAX_STOP_TOKENS) engine_field_error(j, "stop", "tokens(1..=32)", "a stop string must be at most 32 tokens long", str_of(""));
        if (j->stop[i].len > longest) longest = j->stop[i].len;
    }
    ids.n = 0;
    if (j->field_errors.len) return free(ids.id), 1; /* refused all the same: it may be very long */
    if (!tok_encode(e->m->tok, buf_str(&j->prompt), TOK_BOS | (j->special ? TOK_SPECIAL : 0), &ids)) return free(ids.id), 0;
    j->n_prompt = ids.n;
    if (j->max_tokens > e->n_ctx - ids.n) j->max_tokens = e->n_ctx - ids.n;
    size_t most = (size_t)ids.n + (size_t)(j->max_tokens > 0 ? j->max_tokens : 0);
    pthread_mutex_lock(&e->lock);
    int fits = engine_take_bytes(e, j, engine_job_need(e, most));
    pthread_mutex_unlock(&e->lock);
    if (!fits) return free(ids.id), 0;
    j->token = realloc(ids.id, (most + 1) * sizeof *j->token);
    if (!j->token) return free(ids.id), 0;
    j->seen = sys_zalloc(most, sizeof *j->seen);
    j->seen_bit = sys_zalloc((size_t)e->m->n_vocab / 8 + 1, 1);
    j->pending = sys_zalloc(most, sizeof *j->pending);
    j->kv.block = sys_zalloc((size_t)kv_blocks_for((int64_t)most), sizeof *j->kv.block);
    for (j->gram_mask = 64; j->gram_mask < 2 * most; j->gram_mask *= 2) continue;
    j->gram = sys_zalloc(j->gram_mask--, sizeof *j->gram);
    buf_reserve(&j->window, longest + e->max_piece * 3 + 64); /* each byte can become a U+FFFD of three */
    return j->seen && j->seen_bit && j->pending && j->kv.block && j->gram && !j->window.failed;
}

static void engine_kv_stats(engine *e) { /* under lock */
    e->stats.kv_used = 1 - (double)kv_available(&e->kv) / e->kv.n_blocks;
    e->stats.kv_idle_tokens = e->kv.n_idle * KV_BLOCK;
}

/* How much of the prompt the cache holds now. It may be less or more when the job gets its slot. */
static void engine_peek_cache(engine *e, engine_job *j) {
    uint64_t h[2];
    engine_hash_id(e, buf_str(&j->cache_name), h);
    j->cache_key = j->cache_name.len ? h[0] : 0;
    pthread_mutex_lock(&e->lock);
    j->n_cached = kv_share(&e->kv, &j->kv, j->cache_key, j->token, j->n_prompt - 1);
    kv_release(&e->kv, &j->kv);
    pthread_mutex_unlock(&e->lock);
}

static void engine_mark_seen(engine_job *j, int32_t id) {
    if (j->seen_bit[id / 8] >> (id % 8) & 1) return;
    j->seen_bit[id / 8] |= (unsigned char)(1 << id % 8);
    j->seen[j->n_seen++] = id;
}

/* Looks up where the GRAM tokens that end at position n stood before, and notes that they stand here now. */
static void engine_note_gram(engine_job *j, int n) {
    uint32_t h = 0;
    j->follow = 0;
    if (n < GRAM) return;
    const int32_t *t = j->token + n - GRAM;
    for (int i = 0; i < GRAM; i++) h = (h ^ (uint32_t)t[i]) * 0x9e3779b1u, h ^= h >> 15;
    int before = j->gram[h & j->gram_mask];
    j->gram[h & j->gram_mask] = n;
    if (before && memcmp(j->token + before - GRAM, t, GRAM * sizeof *t) == 0) j->follow = before;
}

static int engine_check(engine *e, engine_job *j) { /* refuses what cannot be run; 1: go on */
    char details[160], message[200];
    if (!engine_prepare(e, j)) return engine_refuse(e, j, &ERR_BUSY, "not enough memory for this job", ""), 0;
    if (j->field_errors.len) return engine_refuse(e, j, &ERR_INVALID, "the request has invalid fields", ""), 0;
    int limit = e->max_tokens_in && e->max_tokens_in < e->n_ctx ? e->max_tokens_in : e->n_ctx - 1;
    if (j->n_prompt > limit) {
        snprintf(details, sizeof details, "\"prompt_tokens\":%d,\"context_length\":%d,\"max_tokens_in\":%d", j->n_prompt, e->n_ctx, limit);
        snprintf(message, sizeof message, "the prompt of %d tokens exceeds the available context size of %d tokens", j->n_prompt, e->n_ctx);
        if (limit < e->n_ctx - 1) snprintf(message, sizeof message, "the prompt of %d tokens exceeds --max-tokens-in %d", j->n_prompt, limit);
        return engine_refuse(e, j, &ERR_CONTEXT, message, details), 0;
    }
    if (j->n_prompt == 0) { /* a vocabulary without BOS and a prompt that no token covers */
        engine_field_error(j, "prompt", "tokens(1..)", "the prompt has no tokens", str_of(""));
        return engine_refuse(e, j, &ERR_INVALID, "the request has invalid fields", ""), 0;
    }
    static const double chance[GRAM_RUNS] = {0.2, 0.6, 0.85}; /* until the job's own text tells */
    for (int i = 0; i < j->n_prompt; i++) engine_mark_seen(j, j->token[i]), engine_note_gram(j, i + 1);
    memcpy(j->chance, chance, sizeof chance);
    engine_peek_cache(e, j);
    pthread_mutex_lock(&e->lock);
    double wait, estimate = j->estimate = engine_estimate(e, j, &wait);
    pthread_mutex_unlock(&e->lock);
    if (!j->deadline_unix_ms) return 1;
    int64_t left = j->deadline_unix_ms - sys_unix_ms();
    if (left > 0 && estimate * 1000 <= (double)left) return 1;
    pthread_mutex_lock(&e->lock);
    e->stats.deadline_refused++;
    pthread_mutex_unlock(&e->lock);
    details[0] = 0;
    if (estimate >= 0) snprintf(details, sizeof details, "\"estimated_ms\":%.0f", estimate * 1000);
    else snprintf(details, sizeof details, "\"estimated_ms\":null");
    return engine_refuse(e, j, &ERR_DEADLINE, "the job cannot finish before its deadline", details), 0;
}

/* Removes from the queue what was cancelled or is past its deadline. Under lock on entry and exit; lets go
 * of it while an event is given out. Returns whether any queued job has a deadline to watch. */
static int engine_sweep_queue(engine *e) {
    int deadlines = 0;
    for (engine_job **p = &e->queue_first, *j, *last = NULL; (j = *p) != NULL;) {
        const char *message;
        const engine_error *error = engine_must_end(e, j, &message);
        if (!error) {
            deadlines |= j->deadline_unix_ms != 0;
            last = j, p = &j->next_queued;
            continue;
        }
        *p = j->next_queued;
        if (e->queue_last == j) e->queue_last = last;
        e->stats.queued--;
        pthread_mutex_unlock(&e->lock);
        engine_end_error(e, j, error, message);
        pthread_mutex_lock(&e->lock);
        p = &e->queue_first, last = NULL, deadlines = 0; /* the queue may have changed meanwhile */
    }
    return deadlines;
}

static void engine_accept(engine *e, engine_job *j) {
    engine_event started = {EVENT_STARTED, 0, 0, {"", 0}, LORCH_FAILED, NULL, NULL, ""};
    double cpu = sys_thread_cpu_now();
    if (!engine_check(e, j)) return;
    engine_emit(j, &started);
    pthread_mutex_lock(&e->lock);
    j->cpu_seconds = sys_thread_cpu_now() - cpu;
    e->stats.intake_cpu += j->cpu_seconds, e->stats.jobs_cpu += j->cpu_seconds;
    e->stats.tokens_in += (uint64_t)j->n_prompt;
    j->state = JOB_QUEUED;
    j->next_queued = NULL;
    if (e->queue_last && e->queue_first) e->queue_last->next_queued = j;
    else e->queue_first = j;
    e->queue_last = j;
    e->stats.queued++;
    engine_sweep_queue(e); /* it may have been cancelled before it came */
    pthread_cond_signal(&e->work);
    pthread_mutex_unlock(&e->lock);
}

static void *engine_intake_main(void *arg) {
    engine *e = arg;
    pthread_mutex_lock(&e->lock);
    while (!e->stop || e->intake_first || e->queue_first) {
        int watch = engine_sweep_queue(e);
        engine_job *j = e->intake_first;
        if (!j) {
            if (e->stop) break;
            sys_cond_wait(&e->intake, &e->lock, watch ? 0.01 : 60);
            continue;
        }
        e->intake_first = j->next_queued;
        if (!e->intake_first) e->intake_last = NULL;
        pthread_mutex_unlock(&e->lock);
        engine_accept(e, j);
        pthread_mutex_lock(&e->lock);
    }
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

/* Hands a job over: afterwards its sink gets REFUSED, or STARTED and in the end END or ERROR. If it is
 * not taken at all, returns why, and no event comes. The caller keeps its reference. Any thread. */
static const engine_error *engine_submit(engine *e, engine_job *j) {
    const engine_error *why = NULL;
    j->t_submit = sys_now();
    pthread_mutex_lock(&e->lock);
    str id = buf_str(&j->id);
    for (const engine_job *o = e->live; o && id.len; o = o->next_live)
        if (str_eq(buf_str(&o->id), id)) why = &ERR_JOB_EXISTS;
    const engine_memory *known = id.len ? engine_remembered(e, id, j->t_submit) : NULL;
    if (known && known->ended && known->outcome == OUTCOME_SUCCESS && !j->resumes) {
        why = &ERR_JOB_EXISTS;
        j->earlier = 1, j->earlier_outcome = known->outcome, j->n_out = known->tokens_out;
    }
    if (e->draining || e->stop || gguf_is_lost(e->m->file)) why = &ERR_NOT_READY;
    else if (!why && (e->stats.live >= e->options.n_parallel + e->options.n_queue || !engine_take_bytes(e, j, sizeof *j + j->prompt.cap))) why = &ERR_BUSY;
    if (why) e->stats.outcome[OUTCOME_REJECTED]++;
    else {
        if (known && !known->ended) j->cancel = CANCEL_ASKED, j->t_cancel = j->t_submit;
        j->refs++, j->state = JOB_INTAKE;
        j->next_live = e->live, e->live = j;
        j->next_queued = NULL;
        if (e->intake_last) e->intake_last->next_queued = j;
        else e->intake_first = j;
        e->intake_last = j;
        e->stats.live++;
        pthread_cond_signal(&e->intake);
    }
    pthread_mutex_unlock(&e->lock);
    return why;
}

static void engine_count_rejected(engine *e) { /* a job that was refused before it was submitted */
    pthread_mutex_lock(&e->lock);
    e->stats.outcome[OUTCOME_REJECTED]++;
    pthread_mutex_unlock(&e->lock);
}

static void engine_cancel_job(engine *e, engine_job *j, enum engine_cancel_cause cause) { /* under lock */
    if (!j->cancel) j->t_cancel = sys_now();
    if (!j->cancel || cause == CANCEL_ASKED) __atomic_store_n(&j->cancel, (int)cause, __ATOMIC_RELEASE); /* who asked, wants no retry */
    pthread_cond_signal(&e->work);
    pthread_cond_signal(&e->intake);
}

/* Cancels by id: 1 if the job was live, 2 if it has ended, 0 if it is not known (then it
 * is remembered, if asked, in case the job is still on its way). */
static int engine_cancel(engine *e, str id, int remember) {
    int found = 0;
    pthread_mutex_lock(&e->lock);
    for (engine_job *j = e->live; j; j = j->next_live)
        if (str_eq(buf_str(&j->id), id)) engine_cancel_job(e, j, CANCEL_ASKED), found = 1;
    if (!found) {
        const engine_memory *r = engine_remembered(e, id, sys_now());
        if (r && r->ended) found = 2;
        else if (remember) engine_remember(e, id);
    }
    pthread_mutex_unlock(&e->lock);
    return found;
}

static void engine_cancel_one(engine *e, engine_job *j) { /* a job that the caller holds a reference to */
    pthread_mutex_lock(&e->lock);
    engine_cancel_job(e, j, CANCEL_ASKED);
    pthread_mutex_unlock(&e->lock);
}

/* Takes no more jobs, and cancels those that have not begun (all: those that run as well). */
static void engine_drain(engine *e, int all) {
    pthread_mutex_lock(&e->lock);
    e->draining = 1;
    for (engine_job *j = e->live; j; j = j->next_live)
        if (all || j->state < JOB_PREFILL) engine_cancel_job(e, j, CANCEL_DRAIN);
    pthread_mutex_unlock(&e->lock);
}

/* ---- text: from tokens to events ---- */

/* Gives out the pending tokens whose text ends at or before `safe`, all but the last `keep` of them. */
static void engine_flush(engine_job *j, size_t safe, int keep) {
    size_t from = 0;
    int n = 0;
    for (; n < j->n_pending - keep && j->pending[n].end <= safe; n++) {
        engine_pending *p = &j->pending[n];
        engine_event ev = {EVENT_TOKEN, p->index, p->id, {j->window.ptr + from, p->end - from}, LORCH_FAILED, NULL, NULL, ""};
        from = p->end;
        if (p->index >= j->resume_from) engine_emit(j, &ev);
    }
    buf_drop(&j->window, from);
    j->n_pending -= n;
    memmove(j->pending, j->pending + n, (size_t)j->n_pending * sizeof *j->pending);
    for (int i = 0; i < j->n_pending; i++) j->pending[i].end -= from;
}

/* The length of the longest end of the window that a stop string begins with. */
static size_t engine_held(const engine_job *j) {
    size_t held = 0;
    for (int i = 0; i < j->n_stop; i++)
        for (size_t n = j->stop[i].len - 1; n > held; n--)
            if (n <= j->window.len && memcmp(j->window.ptr + j->window.len - n, j->stop[i].ptr, n) == 0) held = n;
    return held;
}

/* Where the first stop string begins in the window (of two at one place, the first in the list), or -1. */
static int64_t engine_find_stop(engine_job *j) {
    int64_t first = -1;
    for (int i = 0; i < j->n_stop && j->window.len; i++) {
        const char *at = memmem(j->window.ptr, j->window.len, j->stop[i].ptr, j->stop[i].len);
        if (at && (first < 0 || at - j->window.ptr < first)) first = at - j->window.ptr, j->stop_matched = i;
    }
    return first;
}

static void engine_decode_bytes(engine_job *j, const char *p, size_t n) { /* bytes to whole code points */
    for (size_t i = 0; i < n; i++) {
        j->tail[j->n_tail++] = p[i];
        for (int k = 1; j->n_tail && k != 0;) {
            uint32_t cp;
            k = utf8_decode(j->tail, (size_t)j->n_tail, &cp);
            if (k > 0) buf_add(&j->window, j->tail, (size_t)k);
            if (k < 0) buf_puts(&j->window, "\xef\xbf\xbd"), k = -k;
            memmove(j->tail, j->tail + k, (size_t)(j->n_tail - k));
            j->n_tail -= k;
        }
    }
}

/* Takes in an output token: 1 if its text completes a stop string, which ends the job. */
static int engine_add_text(engine *e, engine_job *j, int32_t id) {
    engine_pending p = {j->n_out - 1, id, 0};
    e->piece.len = 0;
    tok_piece(e->m->tok, id, 0, &e->piece);
    if (gguf_is_lost(e->m->file)) return 0; /* the piece's bytes are in the file */
    engine_decode_bytes(j, e->piece.ptr, e->piece.len);
    p.end = j->window.len;
    j->pending[j->n_pending++] = p;
    int64_t stop = engine_find_stop(j);
    if (stop >= 0) {
        for (int i = 0; i < j->n_pending; i++)
            if (j->pending[i].end > (size_t)stop) j->pending[i].end = (size_t)stop;
        engine_flush(j, (size_t)stop, 0);
        return 1;
    }
    engine_flush(j, j->window.len - engine_held(j), j->n_tail > 0);
    return 0;
}

static void engine_flush_all(engine_job *j) { /* the end: what is held goes out, an unfinished code point as U+FFFD */
    if (j->n_tail && j->n_pending) {
        buf_puts(&j->window, "\xef\xbf\xbd");
        j->pending[j->n_pending - 1].end = j->window.len;
    }
    engine_flush(j, j->window.len, 0);
}

/* ---- the engine thread ---- */

static void engine_progress(engine *e) { __atomic_store_n(&e->progress_ms, (int64_t)(sys_now() * 1000), __ATOMIC_RELAXED); }

static void engine_leave_slot(engine *e, engine_job *j) {
    pthread_mutex_lock(&e->lock);
    kv_release(&e->kv, &j->kv);
    for (int i = 0; i < e->options.n_parallel; i++)
        if (e->running[i] == j) e->running[i] = NULL;
    e->stats.running--;
    e->stats.n_left += e->stats.n_left < ENGINE_USUAL;
    engine_average(&e->stats.usual_prefill, (j->n_computed < j->n_prompt ? j->n_computed : j->n_prompt) - j->n_cached, 1.0 / e->stats.n_left);
    engine_average(&e->stats.usual_steps, j->n_steps, 1.0 / e->stats.n_left);
    engine_kv_stats(e);
    pthread_mutex_unlock(&e->lock);
}

static void engine_fail(engine *e, engine_job *j, const engine_error *error, const char *message) {
    engine_leave_slot(e, j);
    engine_end_error(e, j, error, message);
}

static void engine_complete(engine *e, engine_job *j, lorch_reason reason) {
    engine_event ev = {EVENT_END, 0, 0, {"", 0}, reason, NULL, NULL, ""};
    if (reason != LORCH_STOP_SEQUENCE) engine_flush_all(j);
    engine_leave_slot(e, j);
    engine_retire(e, j, OUTCOME_SUCCESS);
    engine_emit(j, &ev);
    engine_job_drop(e, j);
}

/* Ends running jobs that must end, those of the batch that runs as well: their rows go on without them, into blocks that
 * nobody is given before the batch is over, and the batch holds a reference to them. Nonzero: a job has ended. */
static int engine_end_some(engine *e) {
    int ended = 0;
    for (int i = 0; i < e->options.n_parallel; i++) {
        engine_job *j = e->running[i];
        const char *message;
        const engine_error *error = j ? engine_must_end(e, j, &message) : NULL;
        if (!error) continue;
        for (int k = 0; k < e->n_spans; k++)
            if (e->span[k].job == j) e->span[k].gone = 1;
        engine_fail(e, j, error, message);
        ended = 1;
    }
    return ended;
}

/* Whether to give a batch up, some of whose rows have become useless, and to compute the others again: if that is
 * less than what is left of it. Few rows cost no less than MAT_FEW, since the weights must come from memory for them too. */
static int engine_give_up(const engine *e) {
    int useful = 0, left = e->m->n_layer - e->layer;
    for (int i = 0; i < e->n_spans; i++) useful += e->span[i].gone ? 0 : e->span[i].n;
    int64_t go_on = (int64_t)left * (e->n_rows > MAT_FEW ? e->n_rows : MAT_FEW), again = (int64_t)e->m->n_layer * (useful > MAT_FEW ? useful : MAT_FEW);
    return useful == 0 || go_on > again;
}

static int engine_between_layers(void *arg) {
    engine *e = arg;
    engine_progress(e);
    if (e->calibrating) {
        pthread_mutex_lock(&e->lock);
        int stop = e->queue_first != NULL || e->stop;
        pthread_mutex_unlock(&e->lock);
        return stop;
    }
    int ended = engine_end_some(e);
    e->layer++;
    return ended && engine_give_up(e);
}

/* Charges the CPU time that the process has spent since the last time to the jobs of the batch, by their rows. What
 * intake spent is charged to its jobs already. */
static void engine_charge(engine *e) {
    double now = sys_cpu_now();
    pthread_mutex_lock(&e->lock);
    double spent = now - e->cpu_mark - (e->stats.intake_cpu - e->intake_mark);
    e->cpu_mark = now, e->intake_mark = e->stats.intake_cpu;
    if (spent > 0 && e->n_rows) e->stats.jobs_cpu += spent;
    for (int i = 0; spent > 0 && i < e->n_spans; i++) e->span[i].job->cpu_seconds += spent * e->span[i].n / e->n_rows;
    pthread_mutex_unlock(&e->lock);
}

/* ---- building a batch ---- */

/* How many tokens to propose for a job: as many as make the most of a batch, given the chance that one is right and what
 * its row costs. */
static int engine_draft_length(const engine *e, const engine_job *j, int jobs, int room) {
    const engine_cost *c = &e->stats.cost;
    int most = j->max_tokens - j->n_out - 1, best = 0;
    double base = engine_rows_cost(c, e->n_rows + 1), tokens = jobs, chance = 1, gain = 1.08; /* less is lost in what the averages do not know */
    if (!j->speculate || e->options.no_speculate || !j->follow || base <= 0) return 0;
    most = most < room ? most : room;
    for (int k = 1; k <= ENGINE_DRAFT && k <= most; k++) {
        int run = j->n_right + k - 1;
        tokens += chance *= j->chance[run == 0 ? 0 : run < 4 ? 1 : 2];
        double now = tokens / jobs * base / engine_rows_cost(c, e->n_rows + 1 + k);
        if (now > gain) gain = now, best = k;
    }
    return best;
}

static engine_span *engine_add_rows(engine *e, engine_job *j, int n, int first_wanted) {
    engine_span *s = &e->span[e->n_spans++];
    memset(s, 0, sizeof *s);
    s->job = j, s->first = e->n_rows, s->n = n, s->first_logits = e->n_logits;
    for (int i = 0; i < n; i++, e->n_rows++) {
        int at = j->n_computed + i;
        e->pos[e->n_rows] = at, e->blocks[e->n_rows] = j->kv.block, e->want[e->n_rows] = i >= first_wanted;
        if (at < j->n_prompt + j->n_out) e->id[e->n_rows] = j->token[at];
        e->n_logits += i >= first_wanted;
    }
    return s;
}

/* The last token of each job that decodes, and after it what is proposed to follow: what followed the last tokens where
 * they stood before (prompt lookup decoding, Saxena 2023). */
static void engine_add_decoding(engine *e) {
    int jobs = 0, room = ENGINE_DRAFT_ROWS;
    for (int i = 0; i < e->options.n_parallel; i++) jobs += e->running[i] && e->running[i]->state == JOB_DECODE;
    for (int i = 0; i < e->options.n_parallel; i++) {
        engine_job *j = e->running[i];
        if (!j || j->state != JOB_DECODE) continue;
        int drafts = engine_draft_length(e, j, jobs, room), end = j->n_prompt + j->n_out;
        engine_span *s = engine_add_rows(e, j, 1 + drafts, 0);
        int32_t *draft = e->id + s->first + 1;
        for (int k = 0; k < drafts; k++) draft[k] = j->follow + k < end ? j->token[j->follow + k] : draft[k - (end - j->follow)];
        s->n_draft = drafts, room -= drafts;
    }
}

/* Skips what another job has computed since this one was admitted: jobs with the same beginning that come
 * together compute it once. */
static void engine_skip_shared(engine *e, engine_job *j) {
    pthread_mutex_lock(&e->lock);
    while (j->n_computed == j->kv.n_published * KV_BLOCK && kv_share_next(&e->kv, &j->kv, j->cache_key, j->token, j->n_prompt - 1)) {
        j->n_computed += KV_BLOCK, j->n_cached += KV_BLOCK;
        e->stats.cached_tokens += KV_BLOCK;
    }
    pthread_mutex_unlock(&e->lock);
}

/* Whether another job is about to compute the block that a slot's job needs next: then this one waits and shares it. */
static int engine_is_led(const engine *e, int slot) {
    const engine_job *j = e->running[slot], *o;
    int end = j->n_computed + KV_BLOCK;
    for (int i = 0; i < e->options.n_parallel && j->n_computed % KV_BLOCK == 0; i++) {
        if (i == slot || (o = e->running[i]) == NULL || o->state != JOB_PREFILL || o->n_computed >= end) continue;
        if (engine_leads(o, i, j, slot) && engine_alike(j, o, 0, end)) return 1;
    }
    return 0;
}

static int engine_prompt_left(const engine *e, int slot) { return e->running[slot]->n_prompt - e->running[slot]->n_computed; }

/* The slots whose jobs' prompts want computing, whoever's turn it is first; returns how many. */
static int engine_waiting_prompts(engine *e, int *slot) {
    int n = 0;
    for (int i = 0; i < e->options.n_parallel; i++)
        if (e->running[i] && e->running[i]->state == JOB_PREFILL) engine_skip_shared(e, e->running[i]);
    for (int i = 0; i < e->options.n_parallel; i++) {
        int at = (e->turn + i) % e->options.n_parallel;
        if (e->running[at] && e->running[at]->state == JOB_PREFILL && !engine_is_led(e, at)) slot[n++] = at;
    }
    return n;
}

static void engine_shortest_first(const engine *e, int *slot, int n) {
    for (int i = 1; i < n; i++)
        for (int k = i; k > 0 && engine_prompt_left(e, slot[k]) < engine_prompt_left(e, slot[k - 1]); k--) {
            int swap = slot[k];
            slot[k] = slot[k - 1], slot[k - 1] = swap;
        }
}

/* Tokens of prompts: as many as the batch may take without delaying anybody for too long, in equal shares, of which
 * the short prompts leave the long ones what they do not need. Where that is too little for all, they take turns. */
static void engine_add_prompts(engine *e, int decode_positions) {
    const engine_cost *c = &e->stats.cost;
    int waiting[MAX_PARALLEL], n_waiting = engine_waiting_prompts(e, waiting), decoding = e->n_rows;
    double seconds = engine_rows_cost(c, decoding) + c->attend[0] * decode_positions, limit = engine_limit(e, decoding ? seconds : 0);
    int most = decoding + e->options.chunk < e->run.max_tokens ? decoding + e->options.chunk : e->run.max_tokens;
    if (n_waiting > 1 && engine_chunk(e, decoding, seconds, limit, 0) >= n_waiting * ENGINE_MIN_CHUNK) engine_shortest_first(e, waiting, n_waiting);
    for (int i = 0; i < n_waiting && e->n_rows < most; i++) {
        engine_job *j = e->running[waiting[i]];
        int left = engine_prompt_left(e, waiting[i]), n = engine_chunk(e, e->n_rows, seconds, limit, j->n_computed), share;
        if (e->n_rows == decoding && n < ENGINE_MIN_CHUNK) n = ENGINE_MIN_CHUNK;
        if (n < left && n < ENGINE_MIN_CHUNK) return;
        share = n / (n_waiting - i) > ENGINE_MIN_CHUNK ? n / (n_waiting - i) : ENGINE_MIN_CHUNK;
        n = n < share ? n : share;
        n = n < left ? n : left;
        n = n < most - e->n_rows ? n : most - e->n_rows;
        seconds += engine_rows_cost(c, e->n_rows + n) - engine_rows_cost(c, e->n_rows) + c->attend[1] * engine_positions(j->n_computed, n);
        engine_span *s = engine_add_rows(e, j, n, n == left ? n - 1 : n);
        s->prefill = 1, s->done = n == left;
        e->turn = waiting[i] + 1;
    }
}

/* ---- taking in what a batch computed ---- */

/* A moving average for /health; like those of the costs it does not believe in sudden changes. Under lock. */
static void engine_set_rate(double *rate, double value) {
    if (!(value > 0 && value < 1e12)) return; /* a clock that stood still */
    double near = value > *rate * 2 ? *rate * 2 : value < *rate / 2 ? *rate / 2 : value;
    *rate = *rate > 0 ? *rate * 0.8 + near * 0.2 : value;
}

static void engine_learn(engine *e, double seconds) { /* from the batch that has just run */
    engine_stats *s = &e->stats;
    double decode_pos = 0, prompt_pos = 0;
    int prompts = 0;
    for (int i = 0; i < e->n_spans; i++) {
        double sum = engine_positions(e->pos[e->span[i].first], e->span[i].n);
        *(e->span[i].prefill ? &prompt_pos : &decode_pos) += sum;
        prompts += e->span[i].prefill ? e->span[i].n : 0;
    }
    pthread_mutex_lock(&e->lock);
    engine_average(&s->busy, s->running > e->n_spans ? s->running : e->n_spans, seconds / (seconds + ENGINE_BUSY_S)); /* some have just ended */
    engine_learn_cost(&s->cost, e->n_rows, decode_pos, prompt_pos, seconds);
    if (prompts == e->n_rows && prompts >= 8) engine_set_rate(&s->prefill_rate, prompts / seconds);
    if (prompts == 0 && s->decode_rate <= 0) s->decode_rate = 1 / (e->n_rows > 1 ? engine_rows_cost(&s->cost, 1) : seconds);
    if (prompts == 0) engine_set_rate(&s->decode_rate, 1 / engine_rows_cost(&s->cost, 1));
    pthread_mutex_unlock(&e->lock);
}

/* Chooses the tokens of a span, on any thread: one, and as many more as its draft foresaw. The draft only decides which
 * positions were computed; every token is drawn from logits that follow the true text, so the output is what it
 * would be without drafts. */
static void engine_choose(engine *e, engine_span *s, sample_work *sampler) {
    engine_job *j = s->job;
    const tok *t = e->m->tok;
    for (int i = 0; i <= s->n_draft && j->n_out + i < j->max_tokens; i++) {
        float *logits = e->run.logits + (size_t)(s->first_logits + i) * (size_t)e->m->n_vocab;
        s->broken = !sample_finite(logits, e->m->n_vocab);
        if (s->broken) return;
        sample_penalise(logits, j->seen, j->n_seen, j->sample.repetition_penalty);
        for (int k = 0; j->ignore_eos && k < t->n_end; k++) logits[t->end[k]] = -INFINITY;
        int32_t id = sample_token(sampler, e->k, logits, &j->sample, (uint64_t)(j->n_out + i));
        s->chosen[s->n_chosen++] = id;
        if (t->entry[id].ends && !j->ignore_eos) return;
        engine_mark_seen(j, id);
        if (i < s->n_draft && id != e->id[s->first + 1 + i]) return;
    }
}

static void engine_choose_item(void *arg, int64_t item, int thread) { /* every n_samplers-th span, with a scratch of its own */
    engine *e = arg;
    (void)thread;
    for (int i = (int)item; i < e->n_spans; i += e->n_samplers)
        if (!e->span[i].gone && (!e->span[i].prefill || e->span[i].done)) engine_choose(e, &e->span[i], &e->sampler[item]);
}

/* Learns whether the job's own text foresaw its next token, whether or not that was proposed; at first quickly. */
static void engine_learn_chance(engine_job *j, int32_t id) {
    int run = j->n_right == 0 ? 0 : j->n_right < 4 ? 1 : 2, right = j->follow && j->token[j->follow] == id;
    if (j->follow) engine_average(&j->chance[run], right, j->n_foreseen[run] < 7 ? 1.0 / (3 + j->n_foreseen[run]) : 0.1), j->n_foreseen[run]++;
    j->n_right = right ? j->n_right + 1 : 0;
}

/* Takes in one token of a job: 0 if that was its end. */
static int engine_take_token(engine *e, engine_job *j, int32_t id, double now) {
    pthread_mutex_lock(&e->lock);
    if (j->n_out == 0) engine_hist_add(&e->stats.first_token, now - j->t_submit);
    else engine_hist_add(&e->stats.token, now - j->t_last_token);
    if (j->n_out == 0) j->t_decode = now, j->t_metrics = now;
    j->t_last_token = now;
    int ends = e->m->tok->entry[id].ends && !j->ignore_eos;
    if (!ends) {
        engine_learn_chance(j, id);
        j->token[j->n_prompt + j->n_out++] = id;
    }
    pthread_mutex_unlock(&e->lock);
    if (ends) return engine_complete(e, j, LORCH_EOS), 0;
    engine_note_gram(j, j->n_prompt + j->n_out);
    if (engine_add_text(e, j, id)) return engine_complete(e, j, LORCH_STOP_SEQUENCE), 0;
    if (gguf_is_lost(e->m->file)) return engine_fail(e, j, &ERR_INTERNAL, "the model file cannot be read any more"), 0;
    if (j->n_out >= j->max_tokens) return engine_complete(e, j, LORCH_MAX_TOKENS), 0;
    if (now - j->t_metrics >= 0.5) {
        engine_event ev = {EVENT_METRICS, 0, 0, {"", 0}, LORCH_FAILED, NULL, NULL, ""};
        j->t_metrics = now;
        engine_emit(j, &ev);
    }
    return 1;
}

/* Notes that the job's cache has grown to n_computed positions, and offers its full blocks to others. */
static void engine_computed(engine *e, engine_job *j, int n_computed) { /* under lock */
    j->n_computed = n_computed;
    kv_publish(&e->kv, &j->kv, j->cache_key, j->token, j->n_computed);
}

static void engine_take_prompt(engine *e, engine_span *s) {
    engine_job *j = s->job;
    pthread_mutex_lock(&e->lock);
    engine_computed(e, j, j->n_computed + s->n);
    if (s->done) j->state = JOB_DECODE;
    pthread_mutex_unlock(&e->lock);
    if (!s->done) {
        engine_event ev = {EVENT_PREFILL, j->n_computed, 0, {"", 0}, LORCH_FAILED, NULL, NULL, ""};
        engine_emit(j, &ev);
    }
}

static void engine_take_span(engine *e, engine_span *s) {
    engine_job *j = s->job;
    double now = sys_now();
    int goes_on = 1, from = j->n_computed;
    if (s->prefill) engine_take_prompt(e, s);
    if (s->broken) engine_fail(e, j, &ERR_INTERNAL, "the model's output is not finite: is the file damaged?");
    if (s->broken || !s->n_chosen) return;
    pthread_mutex_lock(&e->lock);
    j->n_drafted += s->n_draft, e->stats.drafted += (uint64_t)s->n_draft;
    if (!s->prefill) j->n_steps++, engine_average(&e->stats.tokens_per_step[sample_is_greedy(&j->sample)], s->n_chosen, 0.005);
    pthread_mutex_unlock(&e->lock);
    for (int i = 0; i < s->n_chosen && goes_on; i++) {
        if (!s->prefill) {
            pthread_mutex_lock(&e->lock);
            engine_computed(e, j, from + i + 1); /* a draft's position holds once the token before it stands */
            j->n_accepted += i > 0, e->stats.accepted += i > 0;
            pthread_mutex_unlock(&e->lock);
        }
        goes_on = engine_take_token(e, j, s->chosen[i], now);
    }
}

/* One batch: a row for each job that decodes, what is proposed to follow, and parts of prompts. */
static void engine_step(engine *e) {
    double from = sys_now();
    int decode_positions = 0;
    e->n_spans = e->n_rows = e->n_logits = e->layer = 0;
    engine_end_some(e);
    engine_add_decoding(e);
    for (int i = 0; i < e->n_rows; i++) decode_positions += e->pos[i];
    engine_add_prompts(e, decode_positions);
    if (!e->n_rows) return;
    pthread_mutex_lock(&e->lock);
    for (int i = 0; i < e->n_spans; i++) e->span[i].job->refs++;
    pthread_mutex_unlock(&e->lock);
    model_batch b = {e->n_rows, e->id, e->pos, e->blocks, e->want, engine_between_layers, e};
    int done = model_forward(&e->run, &b) && !gguf_is_lost(e->m->file); /* no result of a file that is gone is used */
    if (done && e->n_logits) pool_run(&e->threads, engine_choose_item, e, e->n_spans < e->n_samplers ? e->n_spans : e->n_samplers);
    engine_charge(e);
    for (int i = 0; i < e->n_spans && done; i++)
        if (!e->span[i].gone) engine_take_span(e, &e->span[i]);
    if (done) engine_learn(e, sys_now() - from);
    for (int i = 0; i < e->n_spans; i++) engine_job_drop(e, e->span[i].job);
    e->n_spans = 0;
}

/* Puts queued jobs into free slots, in order, as far as their whole need of KV blocks can be reserved. */
static void engine_admit(engine *e) { /* under lock */
    for (int i = 0; i < e->options.n_parallel && e->queue_first; i++) {
        engine_job *j = e->queue_first;
        if (e->running[i]) continue;
        j->n_cached = j->n_computed = kv_share(&e->kv, &j->kv, j->cache_key, j->token, j->n_prompt - 1);
        if (!kv_reserve(&e->kv, &j->kv, j->n_prompt + j->max_tokens)) {
            kv_release(&e->kv, &j->kv);
            return;
        }
        e->stats.cached_tokens += (uint64_t)j->n_cached;
        e->queue_first = j->next_queued;
        if (!e->queue_first) e->queue_last = NULL;
        e->running[i] = j;
        j->state = JOB_PREFILL, j->t_run = sys_now();
        e->stats.queued--, e->stats.running++;
        engine_hist_add(&e->stats.queue_wait, j->t_run - j->t_submit);
        engine_kv_stats(e);
    }
}

enum { ENGINE_CALIBRATIONS = 8 };

/* Measures what batches of n rows cost, on nonsense tokens in blocks that it borrows: the best of so many times; 0: it
 * only warms up. Returns 0 if it was interrupted or there is no room. */
static int engine_calibrate_rows(engine *e, int n, int times) {
    uint32_t block[ENGINE_MAX_ROWS / KV_BLOCK + 1];
    kv_seq seq = {block, 0, 0};
    double best = 0;
    pthread_mutex_lock(&e->lock);
    int ok = kv_reserve(&e->kv, &seq, n);
    pthread_mutex_unlock(&e->lock);
    if (!ok) return 0;
    for (int i = 0; i < n; i++) e->id[i] = (i * 37 + 11) % e->m->n_vocab, e->pos[i] = i, e->blocks[i] = block, e->want[i] = i == n - 1;
    model_batch b = {n, e->id, e->pos, e->blocks, e->want, engine_between_layers, e};
    for (int i = 0; (i < times || i == 0) && ok; i++) {
        double from = sys_now();
        ok = model_forward(&e->run, &b);
        double took = sys_now() - from;
        if (i == 0 || took < best) best = took;
    }
    pthread_mutex_lock(&e->lock);
    kv_release(&e->kv, &seq);
    int knot;
    engine_knot_at(n, &knot);
    if (ok && times && engine_knots[knot] == n && e->stats.cost.seconds[knot] <= 0) e->stats.cost.seconds[knot] = best;
    if (ok && times && n == 1 && e->stats.decode_rate <= 0) e->stats.decode_rate = 1 / best;
    pthread_mutex_unlock(&e->lock);
    return ok;
}

/* Until it is measured: attention's share by its arithmetic, which is in floats and so four times as dear as that
 * of the weights; in decoding it waits for memory as well. Under lock. */
static void engine_guess_attention(engine *e, double per_row) {
    const model *m = e->m;
    double heads = (double)m->n_head * m->head_dim, weights = m->n_embd * (2 * heads + 2.0 * m->n_head_kv * m->head_dim + 3.0 * m->n_ff);
    e->stats.cost.attend[1] = per_row * 4 * 2 * heads / weights;
    e->stats.cost.attend[0] = 2 * e->stats.cost.attend[1];
}

/* Measures costs while nobody waits; a job that comes interrupts it. */
static void engine_calibrate(engine *e) {
    static const int knots[] = {8, 1, 4, 32};
    int most = e->options.chunk < e->n_ctx ? e->options.chunk : e->n_ctx, knot, ok;
    if (most > e->kv.n_blocks * KV_BLOCK) most = e->kv.n_blocks * KV_BLOCK;
    engine_knot_at(most, &knot);
    int largest = engine_knots[knot];
    ok = engine_calibrate_rows(e, 1, 0); /* the first pass also reads the weights from disk */
    for (size_t i = 0; ok && i < sizeof knots / sizeof *knots; i++)
        if (knots[i] < largest) ok = engine_calibrate_rows(e, knots[i], knots[i] < 32 ? 3 : 2);
    if (ok) ok = engine_calibrate_rows(e, largest, 1);
    pthread_mutex_lock(&e->lock);
    double per_row = engine_rows_cost(&e->stats.cost, largest) / largest;
    if (ok && e->stats.prefill_rate <= 0) e->stats.prefill_rate = 1 / per_row;
    if (ok) engine_guess_attention(e, per_row);
    e->calibrations = ok ? ENGINE_CALIBRATIONS : e->calibrations + 1;
    pthread_mutex_unlock(&e->lock);
}

/* Waits for work. Returns 0 when the engine is to stop and has nothing left. */
static int engine_await(engine *e) {
    int waited = 0;
    double from = sys_now();
    pthread_mutex_lock(&e->lock);
    for (;;) {
        engine_admit(e);
        engine_progress(e);
        if (waited && e->stats.running) { /* idle time is nobody's */
            double idle = sys_now() - from;
            e->cpu_mark = sys_cpu_now(), e->intake_mark = e->stats.intake_cpu;
            engine_average(&e->stats.busy, 0, idle / (idle + ENGINE_BUSY_S));
        }
        if (e->stats.running || (e->stop && !e->queue_first)) break;
        pthread_cond_broadcast(&e->idle);
        waited = 1;
        if (e->calibrations < ENGINE_CALIBRATIONS && !e->stop) {
            e->calibrating = 1;
            pthread_mutex_unlock(&e->lock);
            engine_calibrate(e);
            pthread_mutex_lock(&e->lock);
            e->calibrating = 0;
            continue; /* a job or the end may have come meanwhile */
        }
        pthread_cond_wait(&e->work, &e->lock);
    }
    int busy = e->stats.running > 0;
    pthread_mutex_unlock(&e->lock);
    return busy;
}

static void *engine_main(void *arg) {
    engine *e = arg;
    while (engine_await(e)) engine_step(e);
    return NULL;
}

/* ---- opening and closing ---- */

static uint64_t engine_kv_want(const engine *e, kv_layout layout, uint64_t available) {
    uint64_t all = (uint64_t)kv_blocks_for(e->n_ctx) * layout.block_bytes * (uint64_t)e->options.n_parallel;
    return all < available / 4 ? all : available / 4;
}

/* What jobs may take beside the KV cache: each slot its longest job, and something for those that wait. */
static uint64_t engine_job_most(const engine *e, uint64_t n_ctx) {
    return (uint64_t)e->options.n_parallel * (engine_job_need(e, n_ctx) + 4 * MAX_PROMPT_CHARS) + ENGINE_WAITING_BYTES;
}

static int engine_max_rows(const lorch_options *o) { /* tokens in one batch */
    int decode = o->n_parallel + ENGINE_DRAFT_ROWS;
    return o->chunk > decode ? o->chunk : decode;
}

static enum mat_kv engine_kv_of(const lorch_options *o) {
    return o->kv_type == LORCH_KV_F32 ? MAT_KV_F32 : o->kv_type == LORCH_KV_Q8_0 ? MAT_KV_Q8_0 : MAT_KV_F16;
}

/* Sizes the context and the KV pool, and refuses what memory cannot hold, with the numbers. */
static int engine_size(engine *e, kv_layout *layout, int *n_blocks, char *err, size_t cap) {
    const model *m = e->m;
    lorch_options *o = &e->options;
    uint64_t available = sys_memory_available(), total = sys_memory_total();
    if (sys_kept.most_memory) { /* --max-memory counts the weights too, since they are to stay in memory */
        uint64_t held = m->weight_bytes + engine_job_most(e, (uint64_t)(o->n_ctx ? o->n_ctx : m->n_ctx_train));
        uint64_t left = sys_kept.most_memory > held ? sys_kept.most_memory - held : 0;
        if (left < available) available = left;
    }
    *layout = model_kv_layout(m, engine_kv_of(o));
    if (o->n_ctx > m->n_ctx_most)
        return sys_fail(err, cap, "--context %d is more than the %d positions that the model was made for", o->n_ctx, m->n_ctx_most);
    model_use_context(e->m, o->n_ctx);
    e->n_ctx = o->n_ctx ? o->n_ctx : m->n_ctx_train;
    uint64_t kv = o->kv_bytes ? o->kv_bytes : engine_kv_want(e, *layout, available);
    uint64_t one = (uint64_t)kv_blocks_for(e->n_ctx) * layout->block_bytes;
    if (o->n_ctx && !o->kv_bytes && kv < one) kv = one; /* an explicit context is kept, or refused below */
    uint64_t blocks = kv / layout->block_bytes;
    if (blocks < 1) blocks = 1;
    if (blocks > INT_MAX / KV_BLOCK) blocks = INT_MAX / KV_BLOCK;
    if (blocks * KV_BLOCK < (uint64_t)e->n_ctx) {
        if (o->n_ctx) return sys_fail(err, cap, "INSUFFICIENT_MEMORY: --context %d needs %llu bytes of KV cache, but it has %llu", o->n_ctx,
                                      (unsigned long long)one, (unsigned long long)kv);
        e->n_ctx = (int)blocks * KV_BLOCK;
    }
    uint64_t need = e->required = blocks * layout->block_bytes + model_run_bytes(m, o->n_threads, engine_max_rows(o), o->n_parallel + ENGINE_DRAFT_ROWS);
    if (need > available)
        return sys_fail(err, cap, "INSUFFICIENT_MEMORY: KV cache and scratch need %llu bytes, but %llu are available (see --kv-cache-size-mb, --context, "
                                  "--parallel, --max-memory)", (unsigned long long)need, (unsigned long long)available);
    if (m->weight_bytes + need > total)
        return sys_fail(err, cap, "INSUFFICIENT_MEMORY: weights of %llu bytes, KV cache and scratch of %llu do not fit into the %llu bytes of this machine or group",
                        (unsigned long long)m->weight_bytes, (unsigned long long)need, (unsigned long long)total);
    e->job_bytes_most = engine_job_most(e, (uint64_t)e->n_ctx);
    *n_blocks = (int)blocks;
    return 1;
}

/* Cancels what is left and waits until both threads have ended: afterwards no sink is called any more. */
static void engine_join(engine *e) {
    pthread_mutex_lock(&e->lock);
    e->stop = 1;
    for (engine_job *j = e->live; j; j = j->next_live) engine_cancel_job(e, j, CANCEL_DRAIN);
    pthread_cond_broadcast(&e->work);
    pthread_cond_broadcast(&e->intake);
    pthread_mutex_unlock(&e->lock);
    if (e->n_started > 0) pthread_join(e->intake_thread, NULL);
    if (e->n_started > 1) pthread_join(e->engine_thread, NULL);
    e->n_started = 0;
}

static void engine_close(engine *e) {
    if (!e) return;
    engine_join(e);
    if (e->threads.n_threads) pool_stop(&e->threads);
    model_run_close(&e->run);
    kv_pool_close(&e->kv);
    for (int i = 0; i < e->n_samplers; i++) sample_close(&e->sampler[i]);
    free(e->sampler);
    buf_free(&e->piece);
    free(e->memory), free(e->memory_bucket);
    model_free(e->m);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

static int engine_open_samplers(engine *e) {
    int n = e->options.n_threads < e->options.n_parallel ? e->options.n_threads : e->options.n_parallel;
    e->sampler = sys_zalloc((size_t)n, sizeof *e->sampler);
    if (!e->sampler) return 0;
    for (; e->n_samplers < n; e->n_samplers++)
        if (!sample_open(&e->sampler[e->n_samplers], e->m->n_vocab)) return sample_close(&e->sampler[e->n_samplers]), 0;
    return 1;
}

static int engine_open_parts(engine *e, char *err, size_t cap) {
    kv_layout layout;
    int n_blocks = 0;
    lorch_options *o = &e->options;
    if (!(e->k = mat_choose(err, cap))) return 0;
    e->threads_because = "asked for";
    if (o->n_threads <= 0) o->n_threads = sys_default_threads(&e->threads_because);
    if (o->chunk <= 0) o->chunk = MODEL_CHUNK;
    if (!engine_size(e, &layout, &n_blocks, err, cap)) return 0;
    for (int i = 0; i < e->m->tok->n; i++)
        if (e->m->tok->entry[i].text.len > e->max_piece) e->max_piece = e->m->tok->entry[i].text.len;
    buf_reserve(&e->piece, e->max_piece + 16);
    pool_start(&e->threads, o->n_threads);
    o->n_threads = e->threads.n_threads;
    e->memory = sys_zalloc(ENGINE_MEMORIES, sizeof *e->memory);
    e->memory_bucket = sys_zalloc(ENGINE_MEMORIES, sizeof *e->memory_bucket);
    for (int i = 0; e->memory_bucket && i < ENGINE_MEMORIES; i++) e->memory_bucket[i] = -1;
    if (!e->memory || !e->memory_bucket || e->piece.failed || !kv_pool_open(&e->kv, layout, n_blocks) || !engine_open_samplers(e) ||
        !model_run_open(&e->run, e->m, e->k, &e->threads, &e->kv, engine_max_rows(o), o->n_parallel + ENGINE_DRAFT_ROWS))
        return sys_fail(err, cap, "INSUFFICIENT_MEMORY: cannot allocate the KV cache and scratch");
    return 1;
}

/* Makes an engine around a model, which it owns from then on, even on failure. start: begin its threads
 * (otherwise only e->run is for use, by the caller's thread). */
static engine *engine_open(model *m, const lorch_options *options, int start, uint64_t *required, char *err, size_t cap) {
    engine *e = sys_zalloc(1, sizeof *e);
    if (!e) return sys_fail(err, cap, "out of memory"), model_free(m), NULL;
    e->m = m, e->options = *options;
    pthread_mutex_init(&e->lock, NULL);
    sys_cond_init(&e->work), sys_cond_init(&e->intake), sys_cond_init(&e->idle);
    engine_progress(e);
    e->salt = sys_random();
    e->stats.tokens_per_step[0] = e->stats.tokens_per_step[1] = 1;
    int ok = engine_open_parts(e, err, cap);
    if (ok && start) {
        if (sys_thread(&e->intake_thread, engine_intake_main, e) == 0) e->n_started++;
        if (e->n_started && sys_thread(&e->engine_thread, engine_main, e) == 0) e->n_started++;
        if (e->n_started < 2) ok = sys_fail(err, cap, "cannot start threads");
    }
    if (required) *required = e->required;
    if (ok) return e;
    engine_close(e);
    return NULL;
}

static uint64_t engine_private_bytes(const engine *e) { /* beside the KV pool */
    return e->run.bytes + (uint64_t)e->m->n_vocab * ((uint64_t)e->n_samplers * 12 + sizeof(tok_entry) + 16) + (uint64_t)e->m->tok->n_merges * (sizeof(str) + 16);
}
static uint64_t engine_kv_bytes(const engine *e) { return e->kv.layout.block_bytes * (uint64_t)e->kv.n_blocks; }

/* Hashes the model file while no job runs (jobs need the memory's bandwidth). Any one thread; *stop ends it. */
static void engine_fingerprint(engine *e, const int *stop) {
    enum { PORTION = 1 << 20 };
    const gguf_file *g = e->m->file;
    gguf_hash h = {{1, 2, 3, 4}, 0};
    for (uint64_t at = 0; at < g->size; at += PORTION) {
        for (;;) {
            pthread_mutex_lock(&e->lock);
            int busy = e->stats.live > 0 || e->calibrating;
            pthread_mutex_unlock(&e->lock);
            if (__atomic_load_n(stop, __ATOMIC_ACQUIRE)) return;
            if (!busy) break;
            poll(NULL, 0, 20);
        }
        gguf_hash_add(&h, g->map + at, (size_t)(g->size - at < PORTION ? g->size - at : PORTION));
    }
    snprintf(e->fingerprint, sizeof e->fingerprint, "%016llx", (unsigned long long)gguf_hash_end(&h));
    __atomic_store_n(&e->has_fingerprint, 1, __ATOMIC_RELEASE);
}

static const char *engine_fingerprint_of(const engine *e) { /* NULL: not known yet */
    return __atomic_load_n(&e->has_fingerprint, __ATOMIC_ACQUIRE) ? e->fingerprint : NULL;
}

static engine_stats engine_snapshot(engine *e) {
    pthread_mutex_lock(&e->lock);
    engine_stats s = e->stats;
    pthread_mutex_unlock(&e->lock);
    return s;
}

/* ==== Embedding interface ==================================================================
 * The functions of lorch.h, over the engine: one job for each lorch_generate, whose events wait in a
 * queue until the calling thread has given them to the callback. */

struct lorch {
    engine *e;
};

typedef struct embed_item {
    struct embed_item *next;
    lorch_token token;
    char text[1]; /* token.len bytes and a NUL */
} embed_item;

typedef struct { /* one call of lorch_generate */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    embed_item *first, *last;
    int done, prefilled;  /* prefilled: prompt tokens computed so far */
    lorch_reason reason;
    char *error;
} embed_call;

static void embed_sink(engine_job *job, const engine_event *ev) {
    embed_call *c = job->user;
    pthread_mutex_lock(&c->lock);
    if (ev->type == EVENT_TOKEN) {
        embed_item *it = malloc(sizeof *it + ev->text.len);
        if (it) {
            it->next = NULL;
            memcpy(it->text, ev->text.ptr, ev->text.len);
            it->text[ev->text.len] = 0;
            it->token.id = ev->id, it->token.index = ev->index, it->token.text = it->text, it->token.len = ev->text.len;
            if (c->last) c->last->next = it;
            else c->first = it;
            c->last = it;
        } else __atomic_store_n(&job->cancel, CANCEL_ASKED, __ATOMIC_RELEASE);
    } else if (ev->type == EVENT_PREFILL) c->prefilled = ev->index;
    else if (ev->type == EVENT_END || ev->type == EVENT_ERROR || ev->type == EVENT_REFUSED) {
        c->done = 1;
        c->reason = ev->type == EVENT_END ? ev->reason : ev->error == &ERR_CANCELLED ? LORCH_CANCELLED : LORCH_FAILED;
        if (c->reason == LORCH_FAILED) {
            str errors = buf_str(&job->field_errors);
            snprintf(c->error, LORCH_ERROR_BYTES, "%s: %s%s%.*s", ev->error->code, ev->message, errors.len ? ": " : "", (int)errors.len, errors.ptr);
        }
    }
    pthread_cond_signal(&c->wake);
    pthread_mutex_unlock(&c->lock);
}

const char *lorch_version(void) { return LORCH_VERSION; }

void lorch_defaults(lorch_options *o) {
    memset(o, 0, sizeof *o);
    o->n_parallel = 4, o->n_queue = 32;
}

void lorch_params_defaults(lorch_params *p) {
    memset(p, 0, sizeof *p);
    p->max_tokens = 2048, p->temperature = 1, p->top_p = 1, p->repetition_penalty = 1;
}

lorch *lorch_load(const char *path, const lorch_options *options, char error[LORCH_ERROR_BYTES]) {
    lorch_options o;
    lorch_defaults(&o);
    if (options) o = *options;
    if (o.n_parallel < 1 || o.n_parallel > MAX_PARALLEL || o.n_queue < 0 || o.n_queue > MAX_QUEUE || o.chunk < 0 || o.chunk > 1024 ||
        (int)o.kv_type < 0 || o.kv_type > LORCH_KV_Q8_0 || o.n_ctx < 0)
        return sys_fail(error, LORCH_ERROR_BYTES, "an option is out of range"), NULL;
    lorch *l = sys_zalloc(1, sizeof *l);
    model *m = l ? model_load(path, o.pre, error, LORCH_ERROR_BYTES) : NULL;
    if (m) l->e = engine_open(m, &o, 1, NULL, error, LORCH_ERROR_BYTES);
    if (l && l->e) return l;
    if (!l) sys_fail(error, LORCH_ERROR_BYTES, "out of memory");
    free(l);
    return NULL;
}

void lorch_free(lorch *l) {
    if (!l) return;
    engine_close(l->e);
    free(l);
}

int lorch_tokenize(const lorch *l, const char *text, size_t len, int add_bos, int special, int32_t *ids, int cap) {
    tok_ids out = {0};
    int ok = tok_encode(l->e->m->tok, str_make(text, len), (add_bos ? TOK_BOS : 0) | (special ? TOK_SPECIAL : 0), &out);
    for (int i = 0; ok && i < out.n && i < cap; i++) ids[i] = out.id[i];
    free(out.id);
    return ok ? out.n : -1;
}

long lorch_detokenize(const lorch *l, const int32_t *ids, int n, int special, char *text, size_t cap) {
    buf b = {0};
    tok_decode(l->e->m->tok, ids, n, special, &b);
    long len = b.failed ? -1 : (long)b.len;
    if (!b.failed && b.len) memcpy(text, b.ptr, b.len < cap ? b.len : cap);
    if (len >= 0 && (size_t)len < cap) text[len] = 0;
    buf_free(&b);
    return len;
}

/* The arguments as a job, or NULL with an error. */
static engine_job *embed_job(const char *key, const char *prompt, size_t len, const lorch_params *p, embed_call *c) {
    if (p->n_stop < 0 || p->n_stop > MAX_STOPS || p->max_tokens < 1 || !(p->temperature >= 0 && p->temperature <= 2) || !(p->top_p >= 0 && p->top_p <= 1) ||
        !(p->min_p >= 0 && p->min_p <= 1) || p->top_k < 0 || !(p->repetition_penalty > 0 && p->repetition_penalty <= 2))
        return sys_fail(c->error, LORCH_ERROR_BYTES, "a parameter is out of range"), NULL;
    engine_job *j = engine_job_new();
    if (!j) return sys_fail(c->error, LORCH_ERROR_BYTES, "out of memory"), NULL;
    if (key) buf_puts(&j->id, key);
    buf_add(&j->prompt, prompt, len);
    for (int i = 0; i < p->n_stop; i++) buf_puts(&j->stop[i], p->stop[i]);
    sample_params s = {p->temperature, p->top_p, p->min_p, p->repetition_penalty, p->top_k, p->seed};
    j->sample = s;
    j->max_tokens = p->max_tokens, j->n_stop = p->n_stop, j->special = p->special, j->ignore_eos = p->ignore_eos, j->speculate = 1;
    j->resumes = 1; /* a name is free again when its generation has ended */
    j->sink = embed_sink, j->user = c;
    int bad = utf8_count(buf_str(&j->prompt)) < 0 || j->id.len > MAX_JOB_ID_BYTES;
    for (int i = 0; i < p->n_stop; i++) bad |= j->stop[i].len == 0;
    if (!bad) return j;
    engine_job_free(j);
    return sys_fail(c->error, LORCH_ERROR_BYTES, "the prompt is not UTF-8, the key is too long, or a stop string is empty"), NULL;
}

static void embed_deliver(lorch *l, engine_job *j, embed_call *c, const lorch_params *p, lorch_token_fn fn, void *user) {
    int stopped = 0, told = 0;
    pthread_mutex_lock(&c->lock);
    while (c->first || !c->done) {
        embed_item *it = c->first;
        if (p->progress && told < c->prefilled) {
            told = c->prefilled;
            pthread_mutex_unlock(&c->lock);
            p->progress(told, j->n_prompt, user);
            pthread_mutex_lock(&c->lock);
            continue;
        }
        if (!it) {
            pthread_cond_wait(&c->wake, &c->lock);
            continue;
        }
        c->first = it->next;
        if (!c->first) c->last = NULL;
        pthread_mutex_unlock(&c->lock);
        if (fn && !stopped && fn(&it->token, user)) {
            stopped = 1;
            engine_cancel_one(l->e, j);
        }
        free(it);
        pthread_mutex_lock(&c->lock);
    }
    if (stopped) c->reason = LORCH_CANCELLED;
    pthread_mutex_unlock(&c->lock);
}

lorch_reason lorch_generate(lorch *l, const char *key, const char *prompt, size_t len, const lorch_params *params, lorch_token_fn fn,
                            void *user, lorch_stats *stats, char error[LORCH_ERROR_BYTES]) {
    embed_call c = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, NULL, NULL, 0, 0, LORCH_FAILED, error};
    error[0] = 0;
    engine_job *j = embed_job(key, prompt, len, params, &c);
    if (!j) return LORCH_FAILED;
    const engine_error *why = engine_submit(l->e, j);
    if (why) sys_fail(error, LORCH_ERROR_BYTES, "%s", why->code);
    else embed_deliver(l, j, &c, params, fn, user);
    if (stats) {
        memset(stats, 0, sizeof *stats);
        stats->prompt_tokens = j->n_prompt, stats->tokens_out = j->n_out, stats->stop_matched = j->stop_matched;
        stats->cached_tokens = j->n_cached, stats->drafted_tokens = j->n_drafted, stats->accepted_tokens = j->n_accepted;
        if (j->t_decode > 0) stats->prefill_seconds = j->t_decode - j->t_run, stats->decode_seconds = j->t_done - j->t_decode;
    }
    engine_job_drop(l->e, j);
    return why ? LORCH_FAILED : c.reason;
}

int lorch_cancel(lorch *l, const char *key) { return engine_cancel(l->e, str_of(key), 0) == 1; }

lorch_memory lorch_memory_used(const lorch *l) {
    lorch_memory m = {l->e->m->weight_bytes, engine_kv_bytes(l->e), engine_private_bytes(l->e)};
    return m;
}
int lorch_context_length(const lorch *l) { return l->e->n_ctx; }
int lorch_vocab_size(const lorch *l) { return l->e->m->n_vocab; }

/* ==== HTTP =================================================================================
 * HTTP/1.0 and 1.1 over non-blocking sockets, strictly: what a proxy could read in two ways is refused
 * (RFC 9112, and the smuggling cases of the last years). A connection gathers the bytes of a head until it
 * is complete, byte by byte, so that the answer does not depend on how they were split; then the body; then
 * the routes answer, and the next request in the buffer gets its turn, so pipelined ones are answered in
 * order. All of it runs on the I/O thread. */

enum http_state { HTTP_HEAD, HTTP_BODY, HTTP_WAIT, HTTP_STREAM, HTTP_LINGER, HTTP_DEAD };
enum http_body { BODY_NONE, BODY_LENGTH, BODY_CHUNKED };
enum http_chunk { CHUNK_SIZE, CHUNK_EXT, CHUNK_SIZE_LF, CHUNK_DATA, CHUNK_DATA_CR, CHUNK_DATA_LF, CHUNK_TRAILER, CHUNK_TRAILER_LF, CHUNK_DONE };
enum {
    HTTP_MAX_EXT = 1024,         /* bytes of chunk extensions in one request: nobody uses them */
    HTTP_MAX_TRAILER = 8192,     /* bytes of trailers, which are discarded */
    HTTP_MAX_IN = 1 << 16,       /* bytes read ahead of what has been processed */
    HTTP_MAX_OUT = 1 << 18,      /* unsent bytes beyond which pipelined requests must wait */
    HTTP_LINGER_MS = 1000        /* how long unread bytes are drained after an early answer */
};

typedef struct {
    str name, value;
} http_header;

typedef struct { /* views into the connection's head buffer */
    str method, path, query, host;
    int minor; /* HTTP/1.minor */
    int n_headers;
    http_header header[MAX_HEADERS];
    enum http_body body_kind;
    uint64_t content_length;
    int keep_alive, expect_continue;
} http_request;

typedef struct {
    int fd;
    enum http_state state;
    buf in, head, body, out;
    size_t scanned;       /* bytes of `in` that the head scanner has seen */
    int skipped_line;     /* an empty line before the request was skipped */
    http_request req;
    enum http_chunk chunk;
    uint64_t chunk_left;
    int chunk_digits;
    size_t chunk_extra, trailer_bytes, trailer_line;
    int trailer_named;    /* the trailer line has had its colon */
    double t_input;       /* when the present state's wait for input began */
    double t_output;      /* when bytes last went out, or output was last empty */
    int body_done;        /* the request's body has been read, or it has none */
    int eof;              /* the peer has sent its FIN */
    int close_after;      /* close once `out` is sent */
    char correlation[65];
    size_t counted;       /* bytes of its buffers as the server has counted them */
    struct route_stream *stream;
} http_conn;

static int http_is_tchar(char c) {
    return (c >= '0' && c <= '9') || (str_lower(c) >= 'a' && str_lower(c) <= 'z') || (c && strchr("!#$%&'*+-.^_`|~", c));
}

static int http_is_token(str s) { /* RFC 9110's token, not empty */
    for (size_t i = 0; i < s.len; i++)
        if (!http_is_tchar(s.ptr[i])) return 0;
    return s.len > 0;
}

/* Looks for the end of the head in the bytes not yet seen. 1: complete, *end is its length; 0: more is
 * needed; else the error. The first offending byte decides, so splits do not matter. */
static int http_scan(const char *p, size_t n, size_t *scanned, size_t *end, const engine_error **error) {
    for (; *scanned < n; ++*scanned) {
        size_t i = *scanned;
        unsigned char c = (unsigned char)p[i];
        *error = &ERR_INVALID;
        if (i >= MAX_HEAD_BYTES) return *error = &ERR_HEADERS, -1;
        if (i > 0 && p[i - 1] == '\r' && c != '\n') return -1;
        if (c == '\n' && (i == 0 || p[i - 1] != '\r')) return -1;
        if ((c < 0x20 && c != '\t' && c != '\r' && c != '\n') || c == 0x7f) return -1;
        if (c == '\n' && i >= 3 && p[i - 2] == '\n') return *end = i + 1, ++*scanned, 1;
    }
    return 0;
}

static const http_header *http_find(const http_request *r, const char *name) {
    for (int i = 0; i < r->n_headers; i++)
        if (str_ieq(r->header[i].name, name)) return &r->header[i];
    return NULL;
}

static int http_count(const http_request *r, const char *name) {
    int n = 0;
    for (int i = 0; i < r->n_headers; i++) n += str_ieq(r->header[i].name, name);
    return n;
}

static int http_lists(str value, char separator, const char *word) { /* is word in a list? */
    while (value.len) {
        const char *comma = memchr(value.ptr, separator, value.len);
        size_t n = comma ? (size_t)(comma - value.ptr) : value.len;
        if (str_ieq(str_trim(str_make(value.ptr, n)), word)) return 1;
        n += comma != NULL;
        value.ptr += n, value.len -= n;
    }
    return 0;
}

static int http_valid_host(str h) { /* host [ ":" port ], characters only */
    if (h.len == 0) return 0;
    for (size_t i = 0; i < h.len; i++) {
        unsigned char c = (unsigned char)h.ptr[i];
        if (c <= ' ' || c >= 0x7f || strchr("/\\?#@,\"<>^`{|}", c)) return 0;
    }
    const char *colon = memrchr(h.ptr, ':', h.len), *bracket = memrchr(h.ptr, ']', h.len);
    if (colon && colon > bracket)
        for (const char *p = colon + 1; p < h.ptr + h.len; p++)
            if (*p < '0' || *p > '9') return 0;
    return colon != h.ptr;
}

/* request-line = method SP request-target SP HTTP-version */
static const engine_error *http_parse_line(http_request *r, str line) {
    const char *a = memchr(line.ptr, ' ', line.len);
    if (!a) return &ERR_INVALID;
    const char *rest = a + 1, *b = memchr(rest, ' ', line.len - (size_t)(rest - line.ptr));
    if (!b) return &ERR_INVALID;
    str version = str_make(b + 1, line.len - (size_t)(b + 1 - line.ptr)), target = str_make(rest, (size_t)(b - rest));
    r->method = str_make(line.ptr, (size_t)(a - line.ptr));
    if (!http_is_token(r->method)) return &ERR_INVALID;
    if (version.len != 8 || memcmp(version.ptr, "HTTP/", 5) || version.ptr[6] != '.' || version.ptr[5] < '0' || version.ptr[5] > '9' ||
        version.ptr[7] < '0' || version.ptr[7] > '9')
        return &ERR_INVALID;
    if (version.ptr[5] != '1' || version.ptr[7] > '1') return &ERR_HTTP_VERSION;
    r->minor = version.ptr[7] - '0';
    for (size_t i = 0; i < target.len; i++)
        if ((unsigned char)target.ptr[i] <= ' ' || (unsigned char)target.ptr[i] >= 0x7f) return &ERR_INVALID;
    if (target.len > 7 && str_ieq(str_make(target.ptr, 7), "http://")) { /* absolute-form: what a proxy gets */
        const char *slash = memchr(target.ptr + 7, '/', target.len - 7);
        target = slash ? str_make(slash, target.len - (size_t)(slash - target.ptr)) : str_make("/", 1);
    }
    if (target.len == 0 || (target.ptr[0] != '/' && !(str_is(target, "*") && str_is(r->method, "OPTIONS")))) return &ERR_INVALID;
    const char *q = memchr(target.ptr, '?', target.len);
    r->path = str_make(target.ptr, q ? (size_t)(q - target.ptr) : target.len);
    r->query = q ? str_make(q + 1, target.len - r->path.len - 1) : str_make("", 0);
    return NULL;
}

/* field-line = token ":" OWS value OWS; no folding, no space before the colon */
static const engine_error *http_parse_field(http_request *r, str line) {
    const char *colon = memchr(line.ptr, ':', line.len);
    if (!colon) return &ERR_INVALID;
    http_header h = {str_make(line.ptr, (size_t)(colon - line.ptr)), str_make(colon + 1, line.len - (size_t)(colon - line.ptr) - 1)};
    if (!http_is_token(h.name)) return &ERR_INVALID;
    if (r->n_headers == MAX_HEADERS) return &ERR_HEADERS;
    h.value = str_trim(h.value);
    r->header[r->n_headers++] = h;
    return NULL;
}

/* How the body is framed. Whatever two implementations could understand differently is an error. */
static const engine_error *http_parse_framing(http_request *r) {
    const http_header *length = http_find(r, "content-length"), *coding = http_find(r, "transfer-encoding");
    if (http_count(r, "content-length") > 1 || http_count(r, "transfer-encoding") > 1 || (length && coding)) return &ERR_INVALID;
    if (coding) {
        if (r->minor == 0 || !str_ieq(coding->value, "chunked")) return &ERR_INVALID;
        r->body_kind = BODY_CHUNKED;
        return NULL;
    }
    if (!length) return NULL;
    if (length->value.len == 0) return &ERR_INVALID;
    for (size_t i = 0; i < length->value.len; i++) {
        char c = length->value.ptr[i];
        if (c < '0' || c > '9') return &ERR_INVALID;
        if (r->content_length > (UINT64_MAX - (uint64_t)(c - '0')) / 10) return &ERR_INVALID;
        r->content_length = r->content_length * 10 + (uint64_t)(c - '0');
    }
    if (r->content_length > MAX_BODY_BYTES) return &ERR_TOO_LARGE;
    r->body_kind = r->content_length ? BODY_LENGTH : BODY_NONE;
    return NULL;
}

static const engine_error *http_parse_head(http_request *r, str head) {
    memset(r, 0, sizeof *r);
    for (int first = 1;; first = 0) {
        const char *eol = memmem(head.ptr, head.len, "\r\n", 2);
        str line = str_make(head.ptr, (size_t)(eol - head.ptr));
        if (line.len == 0) break;
        const engine_error *e = first ? http_parse_line(r, line) : http_parse_field(r, line);
        if (e) return e;
        head.ptr += line.len + 2, head.len -= line.len + 2;
    }
    if (r->path.len == 0) return &ERR_INVALID;
    int hosts = http_count(r, "host");
    if (hosts > 1 || (hosts == 0 && r->minor == 1)) return &ERR_INVALID;
    if (hosts) r->host = http_find(r, "host")->value;
    if (hosts && !http_valid_host(r->host)) return &ERR_INVALID;
    r->keep_alive = r->minor == 1;
    for (int i = 0; i < r->n_headers; i++) {
        if (!str_ieq(r->header[i].name, "connection")) continue;
        if (http_lists(r->header[i].value, ',', "close")) r->keep_alive = 0;
        else if (r->minor == 0 && http_lists(r->header[i].value, ',', "keep-alive")) r->keep_alive = 1;
    }
    const http_header *expect = http_find(r, "expect");
    r->expect_continue = r->minor == 1 && expect && str_ieq(expect->value, "100-continue");
    return http_parse_framing(r);
}

/* Takes a request's head from c->in. 1: c->req holds it; 0: more is needed; -1: *error. */
static int http_read_head(http_conn *c, const engine_error **error) {
    size_t end = 0;
    if (c->in.len && c->in.ptr[0] == '\r' && !c->skipped_line) { /* one empty line before a request is forgiven */
        if (c->in.len < 2) return 0;
        if (c->in.ptr[1] == '\n') buf_drop(&c->in, 2), c->skipped_line = 1;
    }
    int found = http_scan(c->in.ptr, c->in.len, &c->scanned, &end, error);
    if (found < 0) memset(&c->req, 0, sizeof c->req);
    if (found <= 0) return found;
    c->head.len = 0;
    buf_add(&c->head, c->in.ptr, end);
    buf_drop(&c->in, end);
    memset(c->in.ptr + c->in.len, 0, end < c->in.cap - c->in.len ? end : c->in.cap - c->in.len);
    c->scanned = 0, c->skipped_line = 0;
    *error = c->head.failed ? &ERR_BUSY : http_parse_head(&c->req, buf_str(&c->head));
    if (c->head.failed) memset(&c->req, 0, sizeof c->req), c->head.failed = 0;
    c->body.len = 0, c->body_done = c->req.body_kind == BODY_NONE;
    c->chunk = CHUNK_SIZE, c->chunk_left = 0, c->chunk_digits = 0;
    c->chunk_extra = c->trailer_bytes = 0;
    return *error ? -1 : 1;
}

/* Takes one byte of a chunked body outside the data itself.
 *   chunk = 1*16HEXDIG [ ";" extension ] CRLF data CRLF;  last = "0" [...] CRLF *( trailer CRLF ) CRLF */
static const engine_error *http_chunk_byte(http_conn *c, char ch) {
    int digit = ch >= '0' && ch <= '9' ? ch - '0' : str_lower(ch) >= 'a' && str_lower(ch) <= 'f' ? str_lower(ch) - 'a' + 10 : -1;
    unsigned char u = (unsigned char)ch;
    switch (c->chunk) {
    case CHUNK_SIZE:
        if (digit >= 0) {
            if (++c->chunk_digits > 16) return &ERR_INVALID;
            c->chunk_left = c->chunk_left > MAX_BODY_BYTES ? c->chunk_left : c->chunk_left * 16 + (uint64_t)digit;
            return NULL;
        }
        if (c->chunk_digits == 0) return &ERR_INVALID;
        if (ch == '\r') c->chunk = CHUNK_SIZE_LF;
        else if (ch == ';') c->chunk = CHUNK_EXT;
        else return &ERR_INVALID;
        return NULL;
    case CHUNK_EXT:
        if (ch == '\r') return c->chunk = CHUNK_SIZE_LF, NULL;
        return (u < 0x20 && ch != '\t') || u == 0x7f || ++c->chunk_extra > HTTP_MAX_EXT ? &ERR_INVALID : NULL;
    case CHUNK_SIZE_LF:
        if (ch != '\n') return &ERR_INVALID;
        if (c->chunk_left > MAX_BODY_BYTES - c->body.len) return &ERR_TOO_LARGE;
        c->chunk = c->chunk_left ? CHUNK_DATA : CHUNK_TRAILER;
        c->trailer_line = 0, c->trailer_named = 0;
        return NULL;
    case CHUNK_DATA_CR: c->chunk = CHUNK_DATA_LF; return ch == '\r' ? NULL : &ERR_INVALID;
    case CHUNK_DATA_LF: c->chunk = CHUNK_SIZE, c->chunk_left = 0, c->chunk_digits = 0; return ch == '\n' ? NULL : &ERR_INVALID;
    case CHUNK_TRAILER:
        if (ch == '\r') return c->chunk = CHUNK_TRAILER_LF, c->trailer_line && !c->trailer_named ? &ERR_INVALID : NULL;
        if (!c->trailer_named && !(ch == ':' ? c->trailer_line > 0 : http_is_tchar(ch))) return &ERR_INVALID;
        c->trailer_named |= ch == ':';
        c->trailer_line++;
        return (u < 0x20 && ch != '\t') || u == 0x7f || ++c->trailer_bytes > HTTP_MAX_TRAILER ? &ERR_INVALID : NULL;
    case CHUNK_TRAILER_LF:
        c->chunk = c->trailer_line ? CHUNK_TRAILER : CHUNK_DONE;
        c->trailer_line = 0, c->trailer_named = 0;
        return ch == '\n' ? NULL : &ERR_INVALID;
    default: return &ERR_INVALID;
    }
}

/* Moves body bytes from c->in to c->body. 1: the body is complete; 0: more is needed; -1: *error. */
static int http_read_body(http_conn *c, const engine_error **error) {
    size_t at = 0;
    int done = c->req.body_kind == BODY_NONE;
    if (c->req.body_kind == BODY_LENGTH) {
        size_t want = (size_t)c->req.content_length - c->body.len;
        at = want < c->in.len ? want : c->in.len;
        buf_add(&c->body, c->in.ptr, at);
        done = c->body.len == c->req.content_length;
    }
    *error = NULL;
    while (c->req.body_kind == BODY_CHUNKED && at < c->in.len && c->chunk != CHUNK_DONE && !*error) {
        if (c->chunk != CHUNK_DATA) {
            *error = http_chunk_byte(c, c->in.ptr[at++]);
            continue;
        }
        size_t n = c->in.len - at < c->chunk_left ? c->in.len - at : (size_t)c->chunk_left;
        buf_add(&c->body, c->in.ptr + at, n);
        at += n, c->chunk_left -= n;
        if (c->chunk_left == 0) c->chunk = CHUNK_DATA_CR;
    }
    if (c->req.body_kind == BODY_CHUNKED) done = c->chunk == CHUNK_DONE;
    buf_drop(&c->in, at);
    if (c->body.failed) *error = &ERR_BUSY, c->body.failed = 0;
    c->body_done = done && !*error;
    return *error ? -1 : done;
}

static const char *http_reason(int status) {
    static const struct { int status; const char *text; } reasons[] = {
        {200, "OK"}, {202, "Accepted"}, {204, "No Content"}, {400, "Bad Request"}, {401, "Unauthorized"}, {404, "Not Found"}, {405, "Method Not Allowed"},
        {408, "Request Timeout"}, {409, "Conflict"}, {413, "Content Too Large"}, {415, "Unsupported Media Type"}, {431, "Request Header Fields Too Large"},
        {500, "Internal Server Error"}, {501, "Not Implemented"}, {503, "Service Unavailable"}, {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"}};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status) return reasons[i].text;
    return "Unknown";
}

static void http_put_date(buf *b) { /* RFC 9110, section 5.6.7: in English whatever the locale */
    static const char days[] = "SunMonTueWedThuFriSat", months[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
    time_t now = time(NULL);
    struct tm t;
    gmtime_r(&now, &t);
    buf_printf(b, "Date: %.3s, %02d %.3s %d %02d:%02d:%02d GMT\r\n", days + 3 * t.tm_wday, t.tm_mday, months + 3 * t.tm_mon, t.tm_year + 1900,
               t.tm_hour, t.tm_min, t.tm_sec);
}

/* Appends a whole response. extra: header lines, each ending in CRLF, or "". */
static void http_respond(http_conn *c, int status, const char *type, const char *extra, str body) {
    int head_only = c->req.method.len && str_is(c->req.method, "HEAD");
    if (!c->req.keep_alive || !c->body_done) c->close_after = 1; /* what follows may be a body that nobody reads */
    buf_printf(&c->out, "HTTP/1.1 %d %s\r\n", status, http_reason(status));
    http_put_date(&c->out);
    if (status != 204) buf_printf(&c->out, "Content-Type: %s\r\nContent-Length: %llu\r\n", type, (unsigned long long)body.len);
    buf_printf(&c->out, "Cache-Control: no-store\r\nX-Correlation-Id: %s\r\n%sConnection: %s\r\n\r\n", c->correlation, extra, c->close_after ? "close" : "keep-alive");
    if (!head_only && status != 204) buf_add(&c->out, body.ptr, body.len);
}

static void http_respond_buf(http_conn *c, int status, const char *type, const buf *body) { /* a body that may have run out of memory */
    http_respond(c, status, type, "", buf_str(body));
    c->out.failed |= body->failed; /* half an answer is none: the connection ends */
}

/* An error body of the contract. details: JSON members or ""; errors: JSON objects or "". */
static void http_error(http_conn *c, const engine_error *e, const char *message, const char *details, str errors, const char *extra) {
    buf b = {0};
    buf_puts(&b, "{\"error\":{");
    json_kv_cstr(&b, "code", e->code);
    json_kv_cstr(&b, "message", message);
    if (*details) buf_printf(&b, ",\"details\":{%s}", details);
    json_kv_cstr(&b, "correlation_id", c->correlation);
    buf_putc(&b, '}');
    if (errors.len) buf_puts(&b, ",\"errors\":["), buf_add(&b, errors.ptr, errors.len), buf_putc(&b, ']');
    buf_puts(&b, "}");
    http_respond(c, e->status, "application/json", extra, buf_str(&b));
    c->out.failed |= b.failed;
    buf_free(&b);
}

/* ---- bytes in and out ---- */

static http_conn *http_conn_new(int fd, double now) {
    http_conn *c = sys_zalloc(1, sizeof *c);
    int on = 1;
    if (!c) return NULL;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->fd = fd, c->t_input = c->t_output = now;
    sys_uuid(c->correlation);
    return c;
}

static void http_conn_free(http_conn *c) {
    close(c->fd);
    buf_free(&c->in), buf_free(&c->head), buf_free(&c->body), buf_free(&c->out);
    free(c);
}

/* Reads what has come, up to HTTP_MAX_IN unused bytes. A connection that fails is DEAD afterwards. */
static void http_receive(http_conn *c, double now) { /* I/O thread only */
    enum { ROOM = 2048 };    /* most heads fit, so that growing leaves no copies of a token behind */
    static char part[16384]; /* so that a slow connection holds no more than what it has sent */
    if (c->in.len == 0 && c->state == HTTP_HEAD) c->t_input = now; /* a request begins */
    while (c->in.len < HTTP_MAX_IN && !c->eof) {
        size_t room = sizeof part;
        ssize_t n = recv(c->fd, part, room, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
        if (n < 0) c->state = HTTP_DEAD;
        if (n <= 0) c->eof = 1;
        else if (c->state == HTTP_LINGER) return; /* drained and forgotten, once for each turn of the loop */
        if (n > 0 && !c->in.cap) buf_reserve(&c->in, ROOM);
        if (n > 0) buf_add(&c->in, part, (size_t)n), memset(part, 0, (size_t)n); /* it may hold a token */
        if (n < (ssize_t)room || c->in.failed) break;
    }
    if (c->in.failed) c->state = HTTP_DEAD;
}

/* Sends what can be sent at once. A connection that fails is DEAD afterwards. */
static void http_send(http_conn *c, double now) {
    size_t sent = 0;
    while (sent < c->out.len) {
        ssize_t n = send(c->fd, c->out.ptr + sent, c->out.len - sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) c->state = HTTP_DEAD;
        if (n <= 0) break;
        sent += (size_t)n;
    }
    if (sent) buf_drop(&c->out, sent);
    if (sent || c->out.len == 0) c->t_output = now;
    if (c->out.failed) c->state = HTTP_DEAD;
}

/* After the last answer: a FIN, and what the client still sends is read for a while and thrown away, since
 * closing at once would reset the connection and could take the answer from the client's hands. */
static void http_finish(http_conn *c, double now) {
    shutdown(c->fd, SHUT_WR);
    c->state = c->eof ? HTTP_DEAD : HTTP_LINGER;
    c->t_input = now;
    c->in.len = 0;
}

/* ==== Routes ===============================================================================
 * What each path does, and the I/O thread's loop. A job's stream of events meets two threads: the job's sink
 * (route_sink, on the intake or engine thread) formats events into stream->out under server->lock and
 * puts the stream on the ready list; the I/O thread takes them from there into the connection. The I/O
 * thread owns everything else here, never waits for the engine, and frees a stream after its last event. */

enum {
    ROUTE_MAX_UNSENT = 1 << 20,  /* bytes of events that a slow reader may leave unread before its job is cancelled */
    ROUTE_KEEP_BUFFER = 1 << 16, /* larger bodies give their memory back */
    ROUTE_MAX_BUFFERS = 32 << 20, /* bytes that all connections together may hold; beyond, only small requests are taken */
    ROUTE_SMALL = 4096,
    ROUTE_MAX_CONNS = 8192,      /* open connections; more wait in the listen queue */
    ROUTE_SPARE_FDS = 32,        /* descriptors kept for files and the callback */
    ROUTE_STALL_S = 60           /* a busy engine without progress for so long is unhealthy */
};

typedef struct { /* what is in force; written by the starter thread, each field once */
    int off;        /* --no-sandbox */
    int hardened;   /* no new privileges, no core files, no debugger */
    int landlock;   /* atomic: the kernel's version of it, or 0 */
    int seccomp;    /* atomic: 0, 1 while loading, 2 for good */
} route_sandbox;

typedef struct { /* what the command line decides; strings live as long as the server */
    const char *worker_id, *model_ref;
    int has_token;                 /* requests need a bearer token */
    unsigned char token_hash[32];  /* its SHA-256 */
    int max_tokens_out, header_timeout_ms, body_timeout_ms, idle_timeout_ms, write_timeout_ms, sse_ping_ms;
    int drain_timeout_s, exit_with_parent, check_host;          /* check_host: listens on loopback without a token */
} route_settings;

enum route_status { ROUTE_LOADING, ROUTE_READY, ROUTE_DRAINING };

typedef struct route_stream route_stream;

typedef struct {
    route_settings set;
    int listen_fd, wake[2];      /* wake: a pipe that ends the poll */
    engine *loaded;              /* atomic: set once, when the model is usable */
    engine *e;                   /* the I/O thread's copy of it; NULL while the model loads */
    enum route_status status;
    int fatal;                   /* atomic; an exit code that ends the server, or -1 */
    int signals;                 /* atomic; SIGTERM and SIGINT so far */
    route_sandbox sandbox;
    int landlock_fd;             /* atomic: rules for the I/O thread to enter, or -1; afterwards */
    int landlock_entered;        /* atomic: 1 if it could, -1 if not */
    http_conn *conn[ROUTE_MAX_CONNS];
    int n_conns, max_conns, n_streams;
    size_t buffered;             /* bytes of all connections' buffers */
    double t_start, t_drain, t_memory, t_parent, t_accept; /* t_accept: no accept before, after EMFILE */
    pid_t parent;
    sys_memory memory;           /* refreshed once a second */
    uint64_t resident;           /* atomic copy of memory.resident, for the sinks */
    pthread_mutex_t lock;
    route_stream *ready;         /* under lock: streams with news for the I/O thread */
} route_server;

struct route_stream {
    route_server *server;
    engine_job *job;             /* a reference of its own */
    http_conn *conn;             /* I/O thread; NULL: the client has left */
    int begun;                   /* I/O thread: the response's head has been queued */
    double t_event;              /* I/O thread: when anything was last queued */
    /* under server->lock */
    route_stream *next_ready;
    buf out;                     /* events that the I/O thread has not taken */
    int is_ready, done, gone;    /* done: the last event is in out; gone: nobody reads any more */
    const engine_error *refused; /* instead of events */
    buf message, details;        /* of the refusal */
    int named, n_events;         /* ?sse=named, with event: and id: lines */
};

static void route_wake(route_server *s) {
    while (write(s->wake[1], "", 1) < 0 && errno == EINTR) continue; /* a full pipe wakes as well */
}

/* ---- events ---- */

static void route_put_event(route_stream *st, const char *type, const buf *body) { /* under lock; body: JSON without its braces */
    if (st->named) buf_printf(&st->out, "event: %s\nid: %d\n", type, st->n_events++);
    buf_printf(&st->out, "data: {\"type\":\"%s\"", type);
    if (body->len) buf_putc(&st->out, ','), buf_add(&st->out, body->ptr, body->len);
    buf_puts(&st->out, "}\n\n");
}

static void route_put_fingerprint(buf *b, const engine *e) { /* what a resumed job's next worker must have in common */
    const char *f = engine_fingerprint_of(e);
    if (f) json_kv_cstr(b, "fingerprint", f);
    else json_put_key(b, "fingerprint"), buf_puts(b, "null");
    json_kv_int(b, "numeric_version", LORCH_NUMERIC_VERSION);
}

static void route_format_started(const engine_job *j, const engine *e, buf *b) {
    char at[32];
    sys_timestamp(at, 0);
    json_kv_str(b, "job_id", buf_str(&j->id));
    json_kv_cstr(b, "model", e->m->name);
    json_kv_cstr(b, "started_at", at);
    json_kv_u64(b, "seed", j->sample.seed);
    json_kv_int(b, "prompt_tokens", j->n_prompt);
    json_kv_int(b, "cached_tokens", j->n_cached);
    json_kv_num(b, "estimated_ms", j->estimate >= 0 ? j->estimate * 1000 : (double)NAN, 0);
    route_put_fingerprint(b, e);
    json_kv_cstr(b, "correlation_id", j->correlation);
}

static void route_format_metrics(const engine_job *j, uint64_t resident, buf *b) {
    double decode = sys_now() - j->t_decode;
    json_kv_str(b, "job_id", buf_str(&j->id));
    json_kv_int(b, "tokens_out", j->n_out);
    json_kv_num(b, "decode_time_ms", decode * 1000, 0);
    json_kv_num(b, "tokens_per_sec", decode > 0 ? j->n_out / decode : 0, 1);
    json_kv_int(b, "vram_bytes", 0);
    json_kv_u64(b, "memory_bytes", resident);
}

static void route_format_end(const engine_job *j, lorch_reason reason, buf *b) {
    json_kv_int(b, "tokens_out", j->n_out);
    json_kv_num(b, "decode_time_ms", j->t_decode > 0 ? (j->t_done - j->t_decode) * 1000 : 0, 0);
    json_kv_cstr(b, "stop_reason", reason == LORCH_EOS ? "EOS" : reason == LORCH_STOP_SEQUENCE ? "STOP_SEQUENCE" : "MAX_TOKENS");
    if (reason == LORCH_STOP_SEQUENCE) json_kv_str(b, "stop_sequence_matched", buf_str(&j->stop[j->stop_matched]));
    json_kv_u64(b, "seed", j->sample.seed);
    json_kv_int(b, "prompt_tokens", j->n_prompt);
    json_kv_int(b, "cached_tokens", j->n_cached);
    json_kv_int(b, "drafted_tokens", j->n_drafted);
    json_kv_int(b, "accepted_tokens", j->n_accepted);
    json_kv_num(b, "queue_ms", (j->t_run - j->t_submit) * 1000, 1);
    json_kv_num(b, "prefill_ms", ((j->t_decode > 0 ? j->t_decode : j->t_done) - j->t_run) * 1000, 1);
    json_kv_num(b, "cpu_ms", j->cpu_seconds * 1000, 1);
}

static void route_format_error(const engine_job *j, const engine_event *ev, buf *b) {
    json_kv_cstr(b, "code", ev->error->code);
    json_kv_cstr(b, "message", ev->message);
    json_kv_bool(b, "retriable", ev->error == &ERR_CANCELLED && __atomic_load_n(&j->cancel, __ATOMIC_RELAXED) == CANCEL_DRAIN);
    json_kv_int(b, "tokens_out", j->n_out);
    json_kv_num(b, "cpu_ms", j->cpu_seconds * 1000, 1);
    json_kv_cstr(b, "correlation_id", j->correlation);
}

static void route_log_job(const engine_job *j, const engine_event *ev) {
    buf b = {0};
    enum log_level level = LOG_INFO;
    const char *event = "execute_end";
    if (ev->type == EVENT_STARTED) event = "execute_start", json_kv_int(&b, "prompt_tokens", j->n_prompt), json_kv_int(&b, "max_tokens", j->max_tokens);
    else if (ev->type == EVENT_PREFILL)
        event = "execute_progress", json_kv_int(&b, "prompt_tokens_done", ev->index), json_kv_int(&b, "prompt_tokens", j->n_prompt);
    else if (ev->type == EVENT_END) route_format_end(j, ev->reason, &b);
    else {
        level = ev->error == &ERR_INTERNAL ? LOG_ERROR : LOG_WARN;
        if (ev->error == &ERR_CANCELLED) level = LOG_INFO;
        json_kv_cstr(&b, "code", ev->error->code), json_kv_cstr(&b, "message", ev->message), json_kv_int(&b, "tokens_out", j->n_out);
    }
    if (ev->type == EVENT_END && ev->reason == LORCH_STOP_SEQUENCE) { /* the stop string is the client's text: not for the log */
        buf_free(&b);
        json_kv_int(&b, "tokens_out", j->n_out), json_kv_cstr(&b, "stop_reason", "STOP_SEQUENCE");
    }
    log_event(level, event, j->correlation, buf_str(&j->id), buf_cstr(&b));
    buf_free(&b);
}

/* The sink of every job that came by HTTP: on the intake or engine thread. After the last event the stream
 * belongs to the I/O thread and is not touched any more. */
static void route_sink(engine_job *j, const engine_event *ev) {
    route_stream *st = j->user;
    route_server *s = st->server;
    buf b = {0};
    int wake = 0, last = ev->type == EVENT_END || ev->type == EVENT_ERROR || ev->type == EVENT_REFUSED;
    if (ev->type == EVENT_PREFILL) { /* a long prompt tells how far it is, once a second */
        double now = sys_now();
        if (now - (j->t_progress > 0 ? j->t_progress : j->t_run) >= 1) j->t_progress = now, route_log_job(j, ev);
        return;
    }
    if (ev->type != EVENT_TOKEN && ev->type != EVENT_METRICS) route_log_job(j, ev);
    if (ev->type == EVENT_STARTED) route_format_started(j, s->e, &b);
    else if (ev->type == EVENT_TOKEN) json_kv_str(&b, "t", ev->text), json_kv_int(&b, "i", ev->index);
    else if (ev->type == EVENT_METRICS) route_format_metrics(j, __atomic_load_n(&s->resident, __ATOMIC_RELAXED), &b);
    else if (ev->type == EVENT_END) route_format_end(j, ev->reason, &b);
    else if (ev->type == EVENT_ERROR) route_format_error(j, ev, &b);
    static const char *const names[] = {"", "started", "", "token", "metrics", "end", "error"};
    pthread_mutex_lock(&s->lock);
    if (ev->type == EVENT_REFUSED) st->refused = ev->error, buf_puts(&st->message, ev->message), buf_puts(&st->details, ev->details);
    else if (!st->gone) route_put_event(st, names[ev->type], &b);
    if (b.failed) st->out.failed = 1;
    st->done = last;
    if (!st->is_ready) {
        wake = s->ready == NULL;
        st->is_ready = 1, st->next_ready = s->ready, s->ready = st;
    }
    pthread_mutex_unlock(&s->lock);
    if (wake) route_wake(s);
    buf_free(&b);
}

/* ---- streams, on the I/O thread ---- */

static void route_count_buffers(route_server *s, http_conn *c) {
    size_t now = c->in.cap + c->head.cap + c->body.cap + c->out.cap;
    if (c->state == HTTP_BODY && c->req.body_kind == BODY_LENGTH && c->req.content_length > c->body.cap) now += (size_t)c->req.content_length - c->body.cap;
    s->buffered = s->buffered - c->counted + now;
    c->counted = now;
}

static void route_put_chunk(http_conn *c, str text) {
    if (text.len == 0) return;
    if (c->req.minor == 0) buf_add(&c->out, text.ptr, text.len);
    else {
        buf_printf(&c->out, "%zx\r\n", text.len);
        buf_add(&c->out, text.ptr, text.len);
        buf_puts(&c->out, "\r\n");
    }
}

static void route_begin_stream(http_conn *c) {
    if (c->req.minor == 0 || !c->req.keep_alive) c->close_after = 1;
    buf_puts(&c->out, "HTTP/1.1 200 OK\r\n");
    http_put_date(&c->out);
    buf_printf(&c->out, "Content-Type: text/event-stream\r\nCache-Control: no-cache, no-transform\r\nX-Accel-Buffering: no\r\n"
                        "X-Correlation-Id: %s\r\n%sConnection: %s\r\n\r\n", c->correlation,
               c->req.minor ? "Transfer-Encoding: chunked\r\n" : "", c->close_after ? "close" : "keep-alive");
    c->state = HTTP_STREAM;
}

static void route_end_stream(route_stream *st) {
    if (st->conn) {
        st->conn->stream = NULL, st->conn->t_input = sys_now();
        if (st->conn->state != HTTP_DEAD) st->conn->state = HTTP_HEAD;
    }
    st->server->n_streams--;
    engine_job_drop(st->server->e, st->job);
    buf_free(&st->out), buf_free(&st->message), buf_free(&st->details);
    free(st);
}

/* The client has left: its job is cancelled, and the stream ends when the engine says so. */
static void route_abandon(route_stream *st) {
    if (st->conn) st->conn->stream = NULL;
    st->conn = NULL;
    pthread_mutex_lock(&st->server->lock);
    st->gone = 1;
    buf_free(&st->out);
    pthread_mutex_unlock(&st->server->lock);
    engine_cancel_one(st->server->e, st->job);
}

static void route_refuse(route_server *s, http_conn *c, const engine_error *why, const char *message, const char *details, str errors) {
    char extra[64] = "";
    if (why == &ERR_BUSY) {
        pthread_mutex_lock(&s->e->lock);
        double wait;
        engine_estimate(s->e, NULL, &wait);
        pthread_mutex_unlock(&s->e->lock);
        snprintf(extra, sizeof extra, "Retry-After: %d\r\n", wait < 1 ? 1 : wait > 3600 ? 3600 : (int)(wait + 0.999));
    } else if (why == &ERR_NOT_READY) snprintf(extra, sizeof extra, "Retry-After: 1\r\n");
    http_error(c, why, message, details, errors, extra);
}

/* Moves a stream's news into its connection. */
static void route_take_news(route_server *s, route_stream *st, double now) {
    http_conn *c = st->conn;
    pthread_mutex_lock(&s->lock);
    st->is_ready = 0;
    int done = st->done, failed = st->out.failed;
    if (c && !st->refused && !failed) {
        if (!st->begun) route_begin_stream(c), st->begun = 1;
        route_put_chunk(c, buf_str(&st->out));
        st->t_event = now;
        if (done && c->req.minor) buf_puts(&c->out, "0\r\n\r\n");
    }
    st->out.len = 0;
    pthread_mutex_unlock(&s->lock);
    if (c && st->refused) route_refuse(s, c, st->refused, buf_cstr(&st->message), buf_cstr(&st->details), buf_str(&st->job->field_errors));
    if (c) route_count_buffers(s, c);
    if (c && (failed || c->out.failed || c->out.len > ROUTE_MAX_UNSENT || (c->out.len > ROUTE_KEEP_BUFFER && s->buffered > ROUTE_MAX_BUFFERS))) {
        /* out of memory, or nobody reads */
        c->state = HTTP_DEAD;
        if (!done) route_abandon(st);
    }
    if (done) route_end_stream(st);
}

static void route_take_all_news(route_server *s, double now) {
    pthread_mutex_lock(&s->lock);
    route_stream *st = s->ready, *next;
    s->ready = NULL;
    pthread_mutex_unlock(&s->lock);
    for (; st; st = next) {
        next = st->next_ready; /* not written by a sink before is_ready is 0 */
        route_take_news(s, st, now);
    }
}

/* ---- POST /execute: the fields ---- */

enum route_field_kind { FIELD_INT, FIELD_U64, FIELD_FLOAT, FIELD_BOOL };

typedef struct {
    const char *name;
    enum route_field_kind kind;
    double lo, hi;        /* both allowed, but for above_lo; hi -1: decided when the server is up */
    size_t field;         /* in engine_job: int, uint64_t, float or int */
    int above_lo;         /* lo itself is not allowed */
} route_field;

#define F(field) offsetof(engine_job, field)
static const route_field route_fields[] = {
    {"max_tokens", FIELD_INT, 1, -1, F(max_tokens), 0},
    {"temperature", FIELD_FLOAT, 0, 2, F(sample.temperature), 0},
    {"top_p", FIELD_FLOAT, 0, 1, F(sample.top_p), 0},
    {"top_k", FIELD_INT, 0, -1, F(sample.top_k), 0},
    {"min_p", FIELD_FLOAT, 0, 1, F(sample.min_p), 0},
    {"repetition_penalty", FIELD_FLOAT, 0, 2, F(sample.repetition_penalty), 1},
    {"seed", FIELD_U64, 0, 18446744073709551615.0, F(sample.seed), 0},
    {"deadline_ms", FIELD_U64, 0, 1e15, F(deadline_ms), 0},
    {"resume_from", FIELD_INT, 0, MAX_CONTEXT, F(resume_from), 0},
    {"ignore_eos", FIELD_BOOL, 0, 1, F(ignore_eos), 0},
    {"speculate", FIELD_BOOL, 0, 1, F(speculate), 0},
};
#undef F

static double route_field_hi(const route_server *s, const route_field *f) {
    return f->hi >= 0 ? f->hi : strcmp(f->name, "top_k") == 0 ? s->e->m->n_vocab : s->set.max_tokens_out;
}

static void route_number_text(char out[32], const route_field *f, double v) { /* "2.0" for floats, "2048" for integers */
    if (f->kind == FIELD_FLOAT) snprintf(out, 32, "%.1f", v);
    else if (f->kind == FIELD_U64 && v > 1e18) snprintf(out, 32, "18446744073709551615");
    else snprintf(out, 32, "%.0f", v);
}

/* Notes that a number is no number of the right kind (what), or out of range (what NULL). */
static void route_bad_number(const route_server *s, engine_job *j, const route_field *f, str token, const char *what, double v) {
    char lo[32], hi[32], constraint[96], message[200];
    str shown = str_make(token.ptr, token.len < 40 ? token.len : 40);
    route_number_text(lo, f, f->lo), route_number_text(hi, f, route_field_hi(s, f));
    snprintf(constraint, sizeof constraint, f->kind == FIELD_BOOL ? "boolean" : "range(%s%s..=%s)", lo, f->above_lo ? "<" : "", hi);
    if (what) snprintf(message, sizeof message, "%s must be %s", f->name, what);
    else if (v > f->lo) snprintf(message, sizeof message, "%s must be at most %s (got %.*s)", f->name, hi, (int)shown.len, shown.ptr);
    else snprintf(message, sizeof message, "%s must be %s %s (got %.*s)", f->name, f->above_lo ? "above" : "at least", lo, (int)shown.len, shown.ptr);
    engine_field_error(j, f->name, constraint, message, what ? str_of("") : shown);
}

static void route_set_number(const route_server *s, engine_job *j, const route_field *f, enum json_type t, str token) {
    void *at = (char *)j + f->field;
    uint64_t whole = 0;
    if (t == JSON_NULL) return;
    if (f->kind == FIELD_BOOL) {
        if (t == JSON_TRUE || t == JSON_FALSE) *(int *)at = t == JSON_TRUE;
        else route_bad_number(s, j, f, token, "true or false", 0);
        return;
    }
    if (t != JSON_NUMBER) {
        route_bad_number(s, j, f, token, f->kind == FIELD_FLOAT ? "a number" : "a whole number", 0);
        return;
    }
    double v = json_double(token);
    int in_range = (f->above_lo ? v > f->lo : v >= f->lo) && v <= route_field_hi(s, f);
    if (in_range && f->kind != FIELD_FLOAT && !json_u64(token, &whole)) {
        int beyond = v > 1e19; /* 2^64 is no double's neighbour of 2^64 - 1 */
        route_bad_number(s, j, f, token, beyond ? NULL : "a whole number", v);
    } else if (!in_range) route_bad_number(s, j, f, token, NULL, v);
    else if (f->kind == FIELD_FLOAT) *(float *)at = (float)v;
    else if (f->kind == FIELD_U64) *(uint64_t *)at = whole, j->has_seed |= strcmp(f->name, "seed") == 0, j->has_deadline |= strcmp(f->name, "deadline_ms") == 0;
    else *(int *)at = (int)whole, j->resumes |= strcmp(f->name, "resume_from") == 0;
}

/* A string of 1 to `most` bytes or characters. */
static void route_set_string(engine_job *j, const char *name, enum json_type t, str token, buf *out, int64_t most, int bytes) {
    char constraint[64], message[160];
    int64_t n = 0;
    out->len = 0;
    if (t == JSON_STRING) {
        json_unescape(token, out);
        n = bytes ? (int64_t)out->len : utf8_count(buf_str(out));
    }
    const char *unit = bytes ? "bytes" : "characters";
    if (t == JSON_STRING && n >= 1 && n <= most) return;
    snprintf(constraint, sizeof constraint, "%s(1..=%lld)", unit, (long long)most);
    if (t == JSON_END) snprintf(message, sizeof message, "%s is required", name);
    else if (t != JSON_STRING) snprintf(message, sizeof message, "%s must be a string", name);
    else if (n == 0) snprintf(message, sizeof message, "%s must not be empty", name);
    else snprintf(message, sizeof message, "%s must be at most %lld %s (got %lld)", name, (long long)most, unit, (long long)n);
    engine_field_error(j, name, constraint, message, str_of(""));
}

/* stop: an array of up to MAX_STOPS non-empty strings (their length in tokens is intake's to check). */
static void route_set_stops(engine_job *j, json_reader *r, enum json_type t) {
    const char *wrong = t == JSON_ARRAY || t == JSON_NULL ? NULL : "stop must be an array of strings";
    int n = 0;
    j->n_stop = 0;
    if (t == JSON_OBJECT) json_skip(r, t);
    while (t == JSON_ARRAY && (t = json_next(r)) != JSON_ARRAY_END && t != JSON_ERROR) {
        if (t != JSON_STRING) wrong = "stop must be an array of strings";
        else if (r->token.len == 0) wrong = "stop strings must not be empty";
        else if (n == MAX_STOPS) wrong = "stop may hold at most 4 strings";
        else j->stop[n].len = 0, json_unescape(r->token, &j->stop[n++]);
        json_skip(r, t);
        t = JSON_ARRAY;
    }
    if (wrong) engine_field_error(j, "stop", "array(0..=4) of non-empty strings", wrong, str_of(""));
    else j->n_stop = n;
}

/* Reads the body into a job. Returns what is wrong with it as JSON, or NULL; wrong fields are noted in the job. */
static const char *route_parse_job(const route_server *s, engine_job *j, str body, size_t *at) {
    json_reader r = json_open(body);
    int has_id = 0, has_prompt = 0;
    enum json_type t = json_next(&r);
    if (t != JSON_OBJECT && t != JSON_ERROR) json_fail(&r, "the request must be an object");
    while (!r.error && (t = json_next(&r)) == JSON_KEY) {
        str key = r.token;
        buf name = {0};
        json_unescape(key, &name);
        str n = buf_str(&name);
        j->failed |= name.failed;
        if ((t = json_next(&r)) == JSON_ERROR) {
        } else if (str_is(n, "job_id")) has_id = 1, route_set_string(j, "job_id", t, r.token, &j->id, MAX_JOB_ID_BYTES, 1);
        else if (str_is(n, "prompt")) has_prompt = 1, route_set_string(j, "prompt", t, r.token, &j->prompt, MAX_PROMPT_CHARS, 0);
        else if (str_is(n, "cache_key") && t != JSON_NULL) route_set_string(j, "cache_key", t, r.token, &j->cache_name, MAX_JOB_ID_BYTES, 1);
        else if (str_is(n, "stop")) route_set_stops(j, &r, t), t = JSON_NULL;
        else
            for (size_t i = 0; i < sizeof route_fields / sizeof *route_fields; i++)
                if (str_is(n, route_fields[i].name)) route_set_number(s, j, &route_fields[i], t, r.token);
        json_skip(&r, t);
        buf_free(&name);
    }
    if (!r.error) json_next(&r); /* nothing may follow the object */
    *at = r.pos;
    j->failed |= j->id.failed | j->prompt.failed | j->cache_name.failed | j->field_errors.failed;
    for (int i = 0; i < MAX_STOPS; i++) j->failed |= j->stop[i].failed;
    if (r.error) return r.error;
    if (!has_id) route_set_string(j, "job_id", JSON_END, str_of(""), &j->id, MAX_JOB_ID_BYTES, 1);
    if (!has_prompt) route_set_string(j, "prompt", JSON_END, str_of(""), &j->prompt, MAX_PROMPT_CHARS, 0);
    return NULL;
}

/* X-Deadline (Unix time in ms) and deadline_ms (from now): the earlier counts. */
static void route_set_deadline(const http_request *req, engine_job *j) {
    const http_header *h = http_find(req, "x-deadline");
    uint64_t at = 0;
    int64_t now = sys_unix_ms();
    int digits = h && h->value.len >= 1 && h->value.len <= 18;
    for (size_t i = 0; digits && i < h->value.len; i++) digits = h->value.ptr[i] >= '0' && h->value.ptr[i] <= '9';
    if (digits) json_u64(h->value, &at);
    if (h && !digits)
        engine_field_error(j, "X-Deadline", "Unix time in ms", "X-Deadline must be a Unix time in milliseconds", str_of(""));
    else if (h) j->deadline_unix_ms = at ? (int64_t)at : 1;
    if (j->has_deadline && (!j->deadline_unix_ms || now + (int64_t)j->deadline_ms < j->deadline_unix_ms))
        j->deadline_unix_ms = now + (int64_t)j->deadline_ms;
}

static int route_is_json(const http_request *req) {
    const http_header *h = http_find(req, "content-type");
    if (!h) return 0;
    const char *semicolon = memchr(h->value.ptr, ';', h->value.len);
    return str_ieq(str_trim(str_make(h->value.ptr, semicolon ? (size_t)(semicolon - h->value.ptr) : h->value.len)), "application/json");
}

static route_stream *route_stream_new(route_server *s, http_conn *c, engine_job *j) {
    route_stream *st = sys_zalloc(1, sizeof *st);
    if (!st) return NULL;
    st->server = s, st->conn = c, st->job = j;
    st->named = http_lists(c->req.query, '&', "sse=named");
    st->t_event = sys_now();
    j->sink = route_sink, j->user = st;
    memcpy(j->correlation, c->correlation, sizeof j->correlation);
    buf_reserve(&st->out, 1024);
    return st;
}

static const char *route_submit_message(const engine_error *why) {
    if (why == &ERR_JOB_EXISTS) return "a job with this job_id is running or queued, or has succeeded within the last minute (give resume_from to run it again)";
    if (why == &ERR_BUSY) return "all slots are busy and the queue, or the memory for jobs, is full";
    return "the worker takes no more jobs";
}

static void route_execute(route_server *s, http_conn *c) {
    char message[200];
    size_t at = 0;
    engine_job *j = engine_job_new();
    route_stream *st = j ? route_stream_new(s, c, j) : NULL;
    if (!st) {
        if (j) engine_job_free(j);
        route_refuse(s, c, &ERR_BUSY, "not enough memory for this job", "", str_of(""));
        return;
    }
    j->max_tokens = s->set.max_tokens_out < 2048 ? s->set.max_tokens_out : 2048;
    j->sample.temperature = j->sample.top_p = j->sample.repetition_penalty = 1;
    j->speculate = 1;
    const char *wrong = route_parse_job(s, j, buf_str(&c->body), &at);
    route_set_deadline(&c->req, j);
    if (!j->has_seed) j->sample.seed = sys_random() >> 11; /* below 2^53, so that every JSON reader keeps it */
    if (wrong) snprintf(message, sizeof message, "the body is not a JSON object: %s (at byte %zu)", wrong, at);
    s->n_streams++;
    c->state = HTTP_WAIT, c->stream = st;
    const engine_error *why = j->failed ? &ERR_BUSY : wrong || (j->field_errors.len && (!j->id.len || !j->prompt.len)) ? &ERR_INVALID : engine_submit(s->e, j);
    if (!why) return;
    if (why == &ERR_INVALID) engine_count_rejected(s->e);
    char details[96] = "";
    if (why == &ERR_JOB_EXISTS && j->earlier)
        snprintf(details, sizeof details, "\"outcome\":\"%s\",\"tokens_out\":%d", engine_outcome_names[j->earlier_outcome], j->n_out);
    route_refuse(s, c, why, wrong ? message : why == &ERR_INVALID ? "the request has invalid fields" : route_submit_message(why), details,
                 wrong ? str_of("") : buf_str(&j->field_errors));
    route_end_stream(st);
}

/* ---- POST /cancel ---- */

static void route_do_cancel(route_server *s, http_conn *c, str id) {
    buf b = {0};
    int found = engine_cancel(s->e, id, 1);
    buf_putc(&b, '{');
    json_kv_str(&b, "job_id", id);
    json_kv_cstr(&b, "status", found == 2 ? "cancelled" : "cancelling");
    buf_putc(&b, '}');
    log_event(LOG_INFO, "cancel", c->correlation, id, found == 1 ? "\"known\":true" : found ? "\"ended\":true" : "\"known\":false");
    http_respond_buf(c, 202, "application/json", &b);
    buf_free(&b);
}

static void route_cancel(route_server *s, http_conn *c) { /* {"job_id":"..."} */
    json_reader r = json_open(buf_str(&c->body));
    buf id = {0};
    int is_object = json_next(&r) == JSON_OBJECT, has_id = 0;
    while (is_object && json_next(&r) == JSON_KEY) {
        int is_id = str_is(r.token, "job_id");
        enum json_type t = json_next(&r);
        if (is_id && t == JSON_STRING) id.len = 0, json_unescape(r.token, &id), has_id = 1;
        else if (is_id) has_id = 0;
        json_skip(&r, t);
    }
    if (!r.error) json_next(&r);
    if (id.failed) http_error(c, &ERR_BUSY, "not enough memory for this request", "", str_of(""), "");
    else if (!is_object || r.error) http_error(c, &ERR_INVALID, "the body must be a JSON object", "", str_of(""), "");
    else if (!has_id || id.len < 1 || id.len > MAX_JOB_ID_BYTES)
        http_error(c, &ERR_INVALID, "job_id must be a string of 1 to 256 bytes", "", str_of(""), "");
    else route_do_cancel(s, c, buf_str(&id));
    buf_free(&id);
}

static void route_cancel_path(route_server *s, http_conn *c) { /* /cancel/{job_id}, percent-decoded */
    str p = str_make(c->req.path.ptr + 8, c->req.path.len - 8);
    buf id = {0};
    int ok = 1;
    for (size_t i = 0; i < p.len && ok; i++) {
        char quad[4] = {'0', '0', 0, 0};
        if (p.ptr[i] != '%') {
            buf_putc(&id, p.ptr[i]);
            continue;
        }
        if (p.len - i >= 3) quad[2] = p.ptr[i + 1], quad[3] = p.ptr[i + 2];
        int byte = json_hex4(quad, quad + 4);
        ok = byte >= 0;
        if (ok) buf_putc(&id, (char)byte), i += 2;
    }
    if (id.failed) http_error(c, &ERR_BUSY, "not enough memory for this request", "", str_of(""), "");
    else if (!ok || id.len < 1 || id.len > MAX_JOB_ID_BYTES || utf8_count(buf_str(&id)) < 0)
        http_error(c, &ERR_INVALID, "the path must be /cancel/{job_id}, percent-encoded UTF-8 of 1 to 256 bytes", "", str_of(""), "");
    else route_do_cancel(s, c, buf_str(&id));
    buf_free(&id);
}

/* ---- health and metrics ---- */

static const char *route_why_unhealthy(const route_server *s, const engine_stats *stats) { /* NULL: healthy */
    int64_t idle_ms = (int64_t)(sys_now() * 1000) - __atomic_load_n(&s->e->progress_ms, __ATOMIC_RELAXED);
    if (gguf_is_lost(s->e->m->file)) return "the model file cannot be read any more";
    return stats->running && idle_ms > ROUTE_STALL_S * 1000 ? "the engine makes no progress" : NULL;
}

static void route_health_jobs(const route_server *s, const engine_stats *stats, buf *b) {
    double wait;
    pthread_mutex_lock(&s->e->lock);
    int known = engine_estimate(s->e, NULL, &wait) >= 0;
    pthread_mutex_unlock(&s->e->lock);
    json_put_key(b, "jobs"), buf_putc(b, '{');
    json_kv_int(b, "running", stats->running);
    json_kv_int(b, "queued", stats->live - stats->running);
    json_kv_int(b, "parallel", s->e->options.n_parallel);
    json_kv_int(b, "queue", s->e->options.n_queue);
    json_kv_num(b, "predicted_wait_ms", known ? wait * 1000 : (double)NAN, 0);
    buf_putc(b, '}');
    json_put_key(b, "cache"), buf_putc(b, '{');
    json_kv_int(b, "idle_tokens", stats->kv_idle_tokens);
    json_kv_u64(b, "cached_tokens", stats->cached_tokens);
    buf_putc(b, '}');
    json_put_key(b, "rates"), buf_putc(b, '{');
    json_kv_num(b, "prefill_tokens_per_sec", stats->prefill_rate > 0 ? stats->prefill_rate : (double)NAN, 1);
    json_kv_num(b, "decode_tokens_per_sec", stats->decode_rate > 0 ? stats->decode_rate : (double)NAN, 1);
    buf_putc(b, '}');
}

static void route_health_model(const route_server *s, buf *b) {
    const engine *e = s->e;
    json_kv_cstr(b, "quant_kind", e->m->quant);
    json_put_key(b, "memory"), buf_putc(b, '{');
    json_kv_u64(b, "weights_mapped", e->m->file->size);
    json_kv_u64(b, "weights_resident", s->memory.file_pages < e->m->file->size ? s->memory.file_pages : e->m->file->size);
    json_kv_u64(b, "kv", engine_kv_bytes(e));
    json_kv_u64(b, "scratch", engine_private_bytes(e));
    json_kv_u64(b, "requests", e->job_bytes_most + ROUTE_MAX_BUFFERS); /* what jobs and connections may take at most */
    buf_putc(b, '}');
    json_kv_cstr(b, "tokenizer_kind", e->m->tok->name);
    json_kv_int(b, "vocab_size", e->m->n_vocab);
    json_kv_int(b, "context_length", e->n_ctx);
    json_kv_cstr(b, "simd", e->k->name);
    json_kv_int(b, "threads", e->threads.n_threads);
    route_put_fingerprint(b, e);
}

static void route_health_sandbox(const route_server *s, buf *b) {
    json_put_key(b, "sandbox"), buf_putc(b, '{');
    json_kv_bool(b, "enabled", !s->sandbox.off);
    json_kv_bool(b, "no_new_privileges", s->sandbox.hardened);
    json_kv_int(b, "landlock", __atomic_load_n(&s->sandbox.landlock, __ATOMIC_RELAXED));
    json_kv_int(b, "seccomp", __atomic_load_n(&s->sandbox.seccomp, __ATOMIC_RELAXED));
    json_kv_int(b, "uid", (int64_t)geteuid());
    buf_putc(b, '}');
}

static void route_health(route_server *s, http_conn *c) {
    buf b = {0};
    engine_stats stats = {0};
    if (s->e) stats = engine_snapshot(s->e);
    const char *reason = s->e ? route_why_unhealthy(s, &stats) : NULL;
    const char *status = s->status == ROUTE_LOADING ? "loading" : s->status == ROUTE_DRAINING ? "draining" : reason ? "unhealthy" : "healthy";
    buf_putc(&b, '{');
    json_kv_cstr(&b, "status", status);
    if (reason) json_kv_cstr(&b, "reason", reason);
    json_kv_cstr(&b, "worker_id", s->set.worker_id);
    json_kv_cstr(&b, "model", s->e ? s->e->m->name : "");
    json_kv_cstr(&b, "model_ref", s->set.model_ref);
    json_kv_bool(&b, "resident", s->e != NULL);
    json_kv_cstr(&b, "memory_architecture", "cpu");
    json_kv_cstr(&b, "worker_type", "cpu");
    json_put_key(&b, "capabilities"), buf_puts(&b, "[\"text-gen\"]");
    json_kv_cstr(&b, "protocol", "sse");
    json_kv_u64(&b, "memory_bytes", s->memory.resident);
    json_kv_int(&b, "vram_bytes_used", 0);
    json_kv_num(&b, "uptime_seconds", sys_now() - s->t_start, 0);
    if (s->e) route_health_model(s, &b), route_health_jobs(s, &stats, &b);
    route_health_sandbox(s, &b);
    json_kv_cstr(&b, "version", LORCH_VERSION);
    buf_putc(&b, '}');
    http_respond_buf(c, strcmp(status, "healthy") == 0 ? 200 : 503, "application/json", &b);
    buf_free(&b);
}

static void route_livez(route_server *s, http_conn *c) {
    engine_stats stats = {0};
    if (s->e) stats = engine_snapshot(s->e);
    int ok = !s->e || !route_why_unhealthy(s, &stats);
    http_respond(c, ok ? 200 : 503, "application/json", "", str_of(ok ? "{\"status\":\"alive\"}" : "{\"status\":\"stalled\"}"));
}

static void route_readyz(route_server *s, http_conn *c) {
    int ok = s->status == ROUTE_READY && !gguf_is_lost(s->e->m->file);
    http_respond(c, ok ? 200 : 503, "application/json", ok ? "" : "Retry-After: 1\r\n", str_of(ok ? "{\"status\":\"ready\"}" : "{\"status\":\"not ready\"}"));
}

typedef struct { /* a page of metrics that is being written */
    buf b;
    char labels[192];
} route_page;

static void route_metric_head(route_page *p, const char *name, const char *type, const char *help) {
    buf_printf(&p->b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}
static void route_metric(route_page *p, const char *name, const char *type, const char *help, double v) {
    route_metric_head(p, name, type, help);
    buf_printf(&p->b, "%s{%s} %.15g\n", name, p->labels, v);
}
static void route_metric_hist(route_page *p, const char *name, const char *help, const engine_hist *h, double unit) { /* bounds and sum times unit */
    uint64_t sum = 0;
    route_metric_head(p, name, "histogram", help);
    for (int i = 0; i <= HIST_BUCKETS; i++) {
        char bound[32] = "+Inf";
        sum += h->count[i];
        if (i < HIST_BUCKETS) snprintf(bound, sizeof bound, "%g", engine_hist_bounds[i] * unit);
        buf_printf(&p->b, "%s_bucket{%s,le=\"%s\"} %llu\n", name, p->labels, bound, (unsigned long long)sum);
    }
    buf_printf(&p->b, "%s_sum{%s} %.9g\n%s_count{%s} %llu\n", name, p->labels, h->sum * unit, name, p->labels, (unsigned long long)sum);
}

static void route_metrics(route_server *s, http_conn *c) {
    route_page p = {{0}, ""};
    engine_stats t = {0};
    if (s->e) t = engine_snapshot(s->e);
    snprintf(p.labels, sizeof p.labels, "component=\"lorch\",worker_id=\"%s\"", s->set.worker_id);
    route_metric_head(&p, "worker_requests_total", "counter", "Jobs by how they ended.");
    for (int i = 0; i < OUTCOMES; i++)
        buf_printf(&p.b, "worker_requests_total{%s,outcome=\"%s\"} %llu\n", p.labels, engine_outcome_names[i], (unsigned long long)t.outcome[i]);
    route_metric(&p, "worker_tokens_in_total", "counter", "Prompt tokens of accepted jobs.", (double)t.tokens_in);
    route_metric(&p, "worker_tokens_generated_total", "counter", "Tokens generated by jobs that have ended.", (double)t.tokens_out);
    route_metric(&p, "worker_cached_tokens_total", "counter", "Prompt tokens that came from the prefix cache.", (double)t.cached_tokens);
    route_metric(&p, "worker_drafted_tokens_total", "counter", "Tokens proposed by looking them up in the job's own text.", (double)t.drafted);
    route_metric(&p, "worker_accepted_tokens_total", "counter", "Proposed tokens that were right.", (double)t.accepted);
    route_metric(&p, "worker_deadline_refused_total", "counter", "Jobs refused because they could not meet their deadline.", (double)t.deadline_refused);
    route_metric(&p, "worker_cpu_seconds_total", "counter", "CPU time of the process.", sys_cpu_now());
    route_metric(&p, "worker_jobs_cpu_seconds_total", "counter", "Of this, what jobs were charged with.", t.jobs_cpu);
    route_metric(&p, "worker_log_dropped_total", "counter", "Log lines that stderr did not take.", (double)log_state.dropped);
    route_metric(&p, "worker_jobs_running", "gauge", "Jobs in prefill or decode.", t.running);
    route_metric(&p, "worker_jobs_queued", "gauge", "Jobs that wait for a slot.", t.live - t.running);
    route_metric(&p, "worker_kv_usage_ratio", "gauge", "Share of the KV pool that is reserved.", t.kv_used);
    route_metric(&p, "worker_memory_bytes", "gauge", "Resident memory of the process.", (double)s->memory.resident);
    route_metric(&p, "worker_vram_bytes", "gauge", "Always 0: a CPU worker.", 0);
    route_metric(&p, "worker_uptime_seconds", "gauge", "Time since the process started.", sys_now() - s->t_start);
    route_metric_hist(&p, "worker_inference_duration_ms", "From a job's arrival to its last event, in milliseconds.", &t.duration, 10000);
    route_metric_hist(&p, "worker_first_token_seconds", "From a job's arrival to its first token.", &t.first_token, 1);
    route_metric_hist(&p, "worker_token_seconds", "From a token to the next.", &t.token, 1);
    route_metric_hist(&p, "worker_cancel_seconds", "From a cancel to the job's last event.", &t.cancel, 1);
    route_metric_hist(&p, "worker_queue_wait_seconds", "From a job's arrival to its slot.", &t.queue_wait, 1);
    route_metric_head(&p, "worker_build_info", "gauge", "Always 1; the labels say what runs.");
    buf_printf(&p.b, "worker_build_info{%s,version=\"%s\",simd=\"%s\"} 1\n", p.labels, LORCH_VERSION, s->e ? s->e->k->name : "");
    http_respond_buf(c, 200, "text/plain; version=0.0.4; charset=utf-8", &p.b);
    buf_free(&p.b);
}

/* ---- shutdown ---- */

static void route_begin_drain(route_server *s, const char *why) {
    if (s->status == ROUTE_DRAINING) return;
    s->status = ROUTE_DRAINING, s->t_drain = sys_now();
    if (s->e) engine_drain(s->e, 0);
    log_note(LOG_INFO, "shutdown", "\"reason\":\"%s\",\"drain_timeout_s\":%d", why, s->set.drain_timeout_s);
}

static void route_shutdown(route_server *s, http_conn *c) {
    http_respond(c, 202, "application/json", "", str_of("{\"status\":\"draining\"}"));
    route_begin_drain(s, "POST /shutdown");
}

/* ---- dispatch ---- */

typedef struct {
    const char *method, *path;  /* a path that ends in '/' stands for everything below it */
    void (*answer)(route_server *s, http_conn *c);
    int open;                   /* needs no token */
    int needs_engine;           /* 503 while the model loads */
    int json;                   /* 415 unless the body is application/json */
} route;

static const route route_table[] = {
    {"POST", "/execute", route_execute, 0, 1, 1},
    {"POST", "/cancel", route_cancel, 0, 1, 0},
    {"POST", "/cancel/", route_cancel_path, 0, 1, 0},
    {"POST", "/shutdown", route_shutdown, 0, 0, 0},
    {"GET", "/health", route_health, 1, 0, 0},
    {"GET", "/livez", route_livez, 1, 0, 0},
    {"GET", "/readyz", route_readyz, 1, 0, 0},
    {"GET", "/metrics", route_metrics, 0, 0, 0},
};

static const route *route_find(str path) {
    for (size_t i = 0; i < sizeof route_table / sizeof *route_table; i++) {
        size_t n = strlen(route_table[i].path);
        int below = route_table[i].path[n - 1] == '/' && path.len > n && memcmp(path.ptr, route_table[i].path, n) == 0;
        if (below || str_is(path, route_table[i].path)) return &route_table[i];
    }
    return NULL;
}

/* The token itself is not kept: its SHA-256 is compared with that of what is given, which also takes the same time
 * whatever differs. The given one is wiped where it stands. */
static int route_has_token(const route_server *s, const http_request *r) {
    const http_header *h = http_find(r, "authorization");
    unsigned char hash[32];
    int differ = !h || http_count(r, "authorization") != 1 || h->value.len < 7 || !str_ieq(str_make(h->value.ptr, 7), "bearer ");
    if (!s->set.has_token) return 1;
    if (!differ) {
        sha256(str_make(h->value.ptr + 7, h->value.len - 7), hash);
        for (int i = 0; i < 32; i++) differ |= hash[i] ^ s->set.token_hash[i];
    }
    for (int i = 0; i < r->n_headers; i++)
        if (str_ieq(r->header[i].name, "authorization")) sys_wipe((char *)(uintptr_t)r->header[i].value.ptr, r->header[i].value.len);
    return !differ;
}

/* "localhost", "127.x.y.z" or "[::1]", with or without a port: nothing that a name server could point elsewhere. */
static int route_is_loopback(str host) {
    char tmp[64];
    struct in_addr v4;
    const char *colon = memrchr(host.ptr, ':', host.len);
    if (colon && colon > host.ptr && host.ptr[host.len - 1] != ']') host.len = (size_t)(colon - host.ptr);
    if (str_ieq(host, "localhost") || str_is(host, "[::1]")) return 1;
    if (host.len >= sizeof tmp) return 0;
    memcpy(tmp, host.ptr, host.len), tmp[host.len] = 0;
    return inet_pton(AF_INET, tmp, &v4) == 1 && (ntohl(v4.s_addr) >> 24) == 127;
}

/* A web page elsewhere must not steer a worker on its reader's machine, not even through a name that it
 * makes point to 127.0.0.1 (DNS rebinding). */
static int route_is_foreign(const route_server *s, const http_request *r) {
    const http_header *origin = http_find(r, "origin");
    if (!s->set.check_host) return 0;
    if (r->host.len && !route_is_loopback(r->host)) return 1;
    if (!origin) return 0;
    const char *slashes = memmem(origin->value.ptr, origin->value.len, "://", 3);
    if (!slashes) return 1;
    slashes += 3;
    return !route_is_loopback(str_make(slashes, origin->value.len - (size_t)(slashes - origin->value.ptr)));
}

static void route_allow(char extra[64], const route *r) {
    snprintf(extra, 64, "Allow: %s\r\n", !r ? "GET, HEAD, POST, OPTIONS" : r->method[0] == 'G' ? "GET, HEAD, OPTIONS" : "POST, OPTIONS");
}

/* Answers what can be answered from the head alone: refusals and OPTIONS. NULL: it has been answered. */
static const route *route_check(route_server *s, http_conn *c) {
    static const char *const known[] = {"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"};
    const http_request *q = &c->req;
    const route *r = route_find(q->path);
    char extra[64];
    int is_known = 0;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) is_known |= str_is(q->method, known[i]);
    route_allow(extra, r);
    if (!is_known) http_error(c, &ERR_NOT_IMPLEMENTED, "unknown method", "", str_of(""), "");
    else if (!(r && r->open) && !route_has_token(s, q))
        http_error(c, &ERR_UNAUTHORIZED, "a valid bearer token is needed", "", str_of(""), "WWW-Authenticate: Bearer\r\n");
    else if (route_is_foreign(s, q)) http_error(c, &ERR_UNAUTHORIZED, "without a token only requests to and from loopback hosts are taken", "", str_of(""), "");
    else if (str_is(q->method, "OPTIONS") && (r || str_is(q->path, "*"))) http_respond(c, 204, "", extra, str_of(""));
    else if (!r) http_error(c, &ERR_NOT_FOUND, "no such path", "", str_of(""), "");
    else if (!str_is(q->method, r->method) && !(str_is(q->method, "HEAD") && r->method[0] == 'G'))
        http_error(c, &ERR_METHOD, "this path does not take that method", "", str_of(""), extra);
    else if (r->json && !route_is_json(q)) http_error(c, &ERR_MEDIA_TYPE, "the Content-Type must be application/json", "", str_of(""), "");
    else if (r->needs_engine && !s->e) route_refuse(s, c, &ERR_NOT_READY, "the model is loading", "", str_of(""));
    else return r;
    return NULL;
}

/* ---- connections ---- */

static void route_reject(http_conn *c, const engine_error *why, const char *message) { /* a request that cannot be framed */
    c->close_after = 1;
    c->in.len = 0, c->scanned = 0;
    buf_free(&c->body);
    http_error(c, why, message, "", str_of(""), "");
    c->state = HTTP_HEAD;
}

static void route_set_correlation(http_conn *c) { /* the request's, if it is harmless to logs; else a new one */
    const http_header *h = http_find(&c->req, "x-correlation-id");
    int ok = h && h->value.len >= 1 && h->value.len <= 64;
    for (size_t i = 0; ok && i < h->value.len; i++) {
        char ch = h->value.ptr[i];
        ok = (ch >= '0' && ch <= '9') || (str_lower(ch) >= 'a' && str_lower(ch) <= 'z') || ch == '-';
    }
    if (ok) memcpy(c->correlation, h->value.ptr, h->value.len), c->correlation[h->value.len] = 0;
    else sys_uuid(c->correlation);
}

static const char *route_framing_message(const engine_error *e) {
    if (e == &ERR_TOO_LARGE) return "the body is larger than 1 MiB";
    if (e == &ERR_HEADERS) return "the head is larger than 16 KiB or has more than 100 headers";
    if (e == &ERR_BUSY) return "not enough memory for this request";
    if (e == &ERR_HTTP_VERSION) return "only HTTP/1.0 and HTTP/1.1 are spoken here";
    return "malformed HTTP request";
}

/* Too much is being received and held for others: this connection is not to add to it. Small requests always may. */
static int route_is_crowded(const route_server *s, const http_conn *c, size_t more) {
    size_t mine = c->in.cap + c->body.cap + more;
    return s->buffered - c->counted + mine > ROUTE_MAX_BUFFERS && mine > ROUTE_SMALL;
}

/* Takes the next request as far as its bytes have come. 0: nothing more to do now. */
static int route_step(route_server *s, http_conn *c, double now) {
    const engine_error *error;
    int got;
    if (c->state == HTTP_HEAD) {
        if ((got = http_read_head(c, &error)) == 0) return 0;
        route_set_correlation(c);
        if (got < 0) return route_reject(c, error, route_framing_message(error)), 1;
        if (s->status == ROUTE_DRAINING) c->req.keep_alive = 0;
        if (!route_check(s, c)) return c->in.len = c->close_after ? 0 : c->in.len, 1;
        if (c->req.expect_continue && !c->body_done && c->in.len == 0) buf_puts(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
        c->state = HTTP_BODY, c->t_input = now;
    }
    if ((got = http_read_body(c, &error)) == 0) {
        if (!route_is_crowded(s, c, c->req.body_kind == BODY_LENGTH ? (size_t)c->req.content_length - c->body.len : 0)) return 0;
        got = -1, error = &ERR_BUSY;
    }
    if (got < 0) return route_reject(c, error, route_framing_message(error)), 1;
    c->state = HTTP_HEAD, c->t_input = now;
    const route *r = route_find(c->req.path);
    if (r->needs_engine && !s->e) route_refuse(s, c, &ERR_NOT_READY, "the model is loading", "", str_of(""));
    else r->answer(s, c);
    if (c->body.cap > ROUTE_KEEP_BUFFER) buf_free(&c->body);
    return 1;
}

static void route_advance(route_server *s, http_conn *c, double now) {
    while ((c->state == HTTP_HEAD || c->state == HTTP_BODY) && !c->close_after && c->out.len < HTTP_MAX_OUT)
        if (!route_step(s, c, now)) break;
    if (c->out.failed) c->state = HTTP_DEAD;
    if (c->out.len && c->state != HTTP_DEAD) http_send(c, now);
    if (c->out.len == 0) buf_free(&c->out);
    if (c->in.len == 0) buf_free(&c->in);
    route_count_buffers(s, c);
    if (c->close_after && c->out.len == 0 && c->state < HTTP_WAIT) http_finish(c, now);
    if (c->eof && c->out.len == 0 && c->state < HTTP_WAIT) c->state = HTTP_DEAD; /* nothing more can come, nothing is owed */
}

/* Time limits of a connection and the pings of its stream. */
static void route_tick(route_server *s, http_conn *c, double now) {
    const route_settings *set = &s->set;
    double waited = (now - c->t_input) * 1000;
    if (c->out.len && (now - c->t_output) * 1000 > set->write_timeout_ms) c->state = HTTP_DEAD;
    else if (c->state == HTTP_LINGER && waited > HTTP_LINGER_MS) c->state = HTTP_DEAD;
    else if (c->state == HTTP_HEAD && c->in.len == 0 && c->out.len == 0 && waited > set->idle_timeout_ms) c->state = HTTP_DEAD;
    else if (c->state == HTTP_HEAD && c->in.len && !c->close_after && waited > set->header_timeout_ms) {
        c->body_done = 1, c->req.keep_alive = 0, c->req.method.len = 0;
        route_reject(c, &ERR_REQUEST_TIMEOUT, "the request's head did not come in time");
        route_advance(s, c, now);
    } else if (c->state == HTTP_BODY && waited > set->body_timeout_ms) {
        route_reject(c, &ERR_REQUEST_TIMEOUT, "the request's body did not come in time");
        route_advance(s, c, now);
    } else if (c->stream && c->stream->begun && (now - c->stream->t_event) * 1000 >= set->sse_ping_ms) {
        route_put_chunk(c, str_of(": ping\n\n"));
        c->stream->t_event = now;
        http_send(c, now);
    }
}

/* The next moment, in ms from now, at which route_tick may have something to do. */
static double route_due_ms(const route_server *s, const http_conn *c, double now) {
    const route_settings *set = &s->set;
    double due = 60000, waited = (now - c->t_input) * 1000;
    if (c->state == HTTP_HEAD && !c->close_after && (c->in.len || !c->out.len)) due = (c->in.len ? set->header_timeout_ms : set->idle_timeout_ms) - waited;
    if (c->state == HTTP_BODY) due = set->body_timeout_ms - waited;
    if (c->state == HTTP_LINGER) due = HTTP_LINGER_MS - waited;
    if (c->stream && c->stream->begun) due = set->sse_ping_ms - (now - c->stream->t_event) * 1000;
    double stalled = set->write_timeout_ms - (now - c->t_output) * 1000;
    if (c->out.len && stalled < due) due = stalled;
    return due > 0 ? due + 1 : 0;
}

static void route_on_event(route_server *s, http_conn *c, short events, double now) {
    int had_eof = c->eof;
    if (events & (POLLIN | POLLRDHUP)) http_receive(c, now);
    if (events & (POLLERR | POLLHUP | POLLNVAL)) c->state = HTTP_DEAD;
    if (c->state != HTTP_DEAD && (events & POLLOUT)) http_send(c, now);
    if (c->stream && c->stream->begun && c->eof && !had_eof && c->state != HTTP_DEAD) {
        route_put_chunk(c, str_of(": ping\n\n")); /* a client that has left altogether answers it with a reset */
        http_send(c, now);
    }
    if (c->state == HTTP_LINGER && c->eof) c->state = HTTP_DEAD;
    route_advance(s, c, now);
}

static void route_accept(route_server *s, double now) {
    while (s->n_conns < s->max_conns) {
        int fd = accept4(s->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
        if (fd < 0) {
            if (errno != EAGAIN && errno != EWOULDBLOCK) s->t_accept = now + 0.1; /* out of descriptors or memory: let some go first */
            return;
        }
        http_conn *c = http_conn_new(fd, now);
        if (c) s->conn[s->n_conns++] = c;
        else close(fd);
    }
}

static void route_sweep(route_server *s) { /* frees dead connections */
    for (int i = 0; i < s->n_conns;) {
        http_conn *c = s->conn[i];
        if (c->state != HTTP_DEAD) {
            i++;
            continue;
        }
        if (c->stream) route_abandon(c->stream);
        s->buffered -= c->counted;
        http_conn_free(c);
        s->conn[i] = s->conn[--s->n_conns];
    }
}

/* ---- the loop ---- */

static void route_refresh_memory(route_server *s, double now) {
    if (now - s->t_memory < 1 && s->t_memory > 0) return;
    s->memory = sys_memory_used(), s->t_memory = now;
    __atomic_store_n(&s->resident, s->memory.resident, __ATOMIC_RELAXED);
}

/* What changed outside of connections: the model is loaded, a signal came, the parent is gone. 0: end. */
static int route_housekeeping(route_server *s, double now) {
    if (!s->e && (s->e = __atomic_load_n(&s->loaded, __ATOMIC_ACQUIRE)) != NULL && s->status == ROUTE_LOADING) s->status = ROUTE_READY;
    if (__atomic_load_n(&s->fatal, __ATOMIC_ACQUIRE) >= 0) return 0;
    int rules = __atomic_exchange_n(&s->landlock_fd, -1, __ATOMIC_ACQUIRE);
    if (rules >= 0) __atomic_store_n(&s->landlock_entered, sys_landlock_enter(rules) ? 1 : -1, __ATOMIC_RELEASE);
    if (__atomic_load_n(&s->signals, __ATOMIC_RELAXED)) route_begin_drain(s, "signal");
    if (s->set.exit_with_parent && getppid() != s->parent) route_begin_drain(s, "the parent process has ended");
    if (s->status != ROUTE_DRAINING) return 1;
    engine_stats stats = {0};
    if (s->e) stats = engine_snapshot(s->e);
    double waited = now - s->t_drain;
    if (s->e && stats.live && waited >= s->set.drain_timeout_s) engine_drain(s->e, 1);
    int unsent = 0;
    for (int i = 0; i < s->n_conns; i++) unsent += s->conn[i]->out.len > 0;
    if (stats.live == 0 && s->n_streams == 0 && (unsent == 0 || waited > s->set.drain_timeout_s + 0.5)) return 0;
    return waited < s->set.drain_timeout_s + 0.8; /* an engine that does not stop, or streams that nobody reads */
}

static int route_poll(route_server *s, struct pollfd *p, double now) {
    int listening = s->n_conns < s->max_conns && now >= s->t_accept;
    double due = s->status == ROUTE_DRAINING ? 20 : s->set.exit_with_parent ? 250 : s->t_accept > now ? 100 : 60000;
    p[0].fd = s->wake[0], p[0].events = POLLIN;
    p[1].fd = listening ? s->listen_fd : -1, p[1].events = POLLIN;
    for (int i = 0; i < s->n_conns; i++) {
        http_conn *c = s->conn[i];
        int reads = !c->eof && c->in.len < HTTP_MAX_IN && !(c->out.len >= HTTP_MAX_OUT && c->state < HTTP_WAIT);
        p[i + 2].fd = c->fd;
        p[i + 2].events = (short)((reads ? POLLIN : 0) | (c->eof ? 0 : POLLRDHUP) | (c->out.len ? POLLOUT : 0));
        if (c->in.len >= HTTP_MAX_IN) p[i + 2].events &= ~POLLRDHUP; /* level-triggered: it would spin */
        double d = route_due_ms(s, c, now);
        if (d < due) due = d;
    }
    return poll(p, (nfds_t)s->n_conns + 2, (int)due);
}

/* Serves until shutdown, a fatal error or the second signal. Returns the process's exit code. */
static int route_serve(route_server *s) {
    struct pollfd *p = sys_zalloc(ROUTE_MAX_CONNS + 2, sizeof *p);
    if (!p) return 1;
    for (double now = sys_now(); route_housekeeping(s, now);) {
        int n = s->n_conns, ready = route_poll(s, p, now);
        now = sys_now();
        route_refresh_memory(s, now);
        if (ready > 0 && p[0].revents) {
            char drop[512];
            while (read(s->wake[0], drop, sizeof drop) > 0) continue;
        }
        route_take_all_news(s, now);
        for (int i = 0; i < n; i++) {
            if (ready > 0 && p[i + 2].revents) route_on_event(s, s->conn[i], p[i + 2].revents, now);
            else if (s->conn[i]->out.len || s->conn[i]->in.len) route_advance(s, s->conn[i], now);
            if (s->conn[i]->state != HTTP_DEAD) route_tick(s, s->conn[i], now);
        }
        route_sweep(s);
        if (ready > 0 && p[1].revents) route_accept(s, now);
    }
    free(p);
    int fatal = __atomic_load_n(&s->fatal, __ATOMIC_ACQUIRE);
    return fatal >= 0 ? fatal : 0;
}

/* ==== Pool-manager client ==================================================================
 * The ready callback: one POST to the URL that the pool manager gave, from the thread that loaded the
 * model. Answers of 2xx register the worker; anything else is tried again after each of three pauses. The
 * host's name is resolved once, at the start: afterwards the sandbox takes files and name service away. */

typedef struct {
    char host[256], path[2048]; /* path with its query, as given */
    int port;
    const char *authority;      /* "host:port" in the URL, for the Host header */
    int authority_len;
} callback_url;

enum { CALLBACK_TIMEOUT_MS = 10000, CALLBACK_SLICE_MS = 50 };

/* http://host[:port][/path]. Returns what is wrong with it, or NULL. out points into url. */
static const char *callback_parse(const char *url, callback_url *out) {
    memset(out, 0, sizeof *out);
    for (const char *p = url; *p; p++)
        if ((unsigned char)*p <= ' ' || (unsigned char)*p >= 0x7f) return "the URL holds a space, a control character or a non-ASCII character";
    if (strncmp(url, "https://", 8) == 0) return "https is not spoken here: use http:// to a local TLS proxy";
    if (strncmp(url, "http://", 7)) return "the URL must begin with http://";
    const char *host = url + 7, *end = host + strcspn(host, "/?#"), *colon = NULL;
    if (memchr(host, '@', (size_t)(end - host))) return "a user name in the URL is not supported";
    out->authority = host, out->authority_len = (int)(end - host);
    const char *name = host, *name_end = end;
    if (*host == '[') {
        name = host + 1, name_end = memchr(host, ']', (size_t)(end - host));
        if (!name_end) return "the URL's host lacks a ']'";
        if (name_end + 1 < end) colon = name_end + 1;
        if (colon && *colon != ':') return "the URL's host is malformed";
    } else if ((colon = memchr(host, ':', (size_t)(end - host))) != NULL) name_end = colon;
    if (name_end == name || (size_t)(name_end - name) >= sizeof out->host) return "the URL names no host";
    snprintf(out->host, sizeof out->host, "%.*s", (int)(name_end - name), name);
    out->port = 80;
    if (colon) {
        char *stop;
        long port = strtol(colon + 1, &stop, 10);
        if (stop != end || colon + 1 == end || port < 1 || port > 65535 || colon[1] < '0' || colon[1] > '9') return "the URL's port must be 1 to 65535";
        out->port = (int)port;
    }
    if (strlen(end) + 2 > sizeof out->path) return "the URL is too long";
    snprintf(out->path, sizeof out->path, "%s%.*s", *end == '/' ? "" : "/", (int)strcspn(end, "#"), end);
    return NULL;
}

/* Waits for events on fd until `until`, in slices that notice *stop. */
static int callback_wait(int fd, short events, double until, const int *stop) {
    while (!__atomic_load_n(stop, __ATOMIC_ACQUIRE)) {
        struct pollfd p = {fd, events, 0};
        double left = (until - sys_now()) * 1000;
        if (left <= 0) return 0;
        int n = poll(&p, 1, left < CALLBACK_SLICE_MS ? (int)left + 1 : CALLBACK_SLICE_MS);
        if (n > 0) return 1;
        if (n < 0 && errno != EINTR) return 0;
    }
    return 0;
}

static const double callback_pauses[] = {0.25, 0.5, 1}; /* seconds before the retries, of the name as of the request */

/* The host's addresses, before the sandbox takes the name service away; tried again like a request. NULL: there
 * are none, which has been logged, or *stop. */
static struct addrinfo *callback_resolve(const callback_url *u, const int *stop) {
    struct addrinfo hints, *list = NULL;
    char port[16];
    int error = 0;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    snprintf(port, sizeof port, "%d", u->port);
    for (int attempt = 0; attempt < 4; attempt++) {
        if (attempt) callback_wait(-1, 0, sys_now() + callback_pauses[attempt - 1], stop);
        if (__atomic_load_n(stop, __ATOMIC_ACQUIRE)) return NULL;
        if ((error = getaddrinfo(u->host, port, &hints, &list)) == 0) return list;
    }
    log_note(LOG_ERROR, "error", "\"code\":\"CALLBACK_REFUSED\",\"message\":\"the pool manager's host has no address\",\"error\":%d", error);
    return NULL;
}

static int callback_connect(const struct addrinfo *list, double until, const int *stop) { /* a socket, or -1 */
    int fd = -1;
    for (const struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        int error = 0;
        socklen_t n = sizeof error;
        fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0) continue;
        if (connect(fd, a->ai_addr, a->ai_addrlen) && errno != EINPROGRESS) error = errno;
        else if (!callback_wait(fd, POLLOUT, until, stop) || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &n)) error = ETIMEDOUT;
        if (error) close(fd), fd = -1;
    }
    return fd;
}

/* The address that this end of the connection has, as it stands in a URL. */
static void callback_local_address(int fd, char out[64]) {
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    char text[INET6_ADDRSTRLEN] = "127.0.0.1";
    memset(&a, 0, sizeof a);
    getsockname(fd, (struct sockaddr *)&a, &n);
    if (a.ss_family == AF_INET) inet_ntop(AF_INET, &((struct sockaddr_in *)(void *)&a)->sin_addr, text, sizeof text);
    if (a.ss_family == AF_INET6) inet_ntop(AF_INET6, &((struct sockaddr_in6 *)(void *)&a)->sin6_addr, text, sizeof text);
    if (strncmp(text, "::ffff:", 7) == 0) memmove(text, text + 7, strlen(text + 7) + 1);
    snprintf(out, 64, strchr(text, ':') ? "[%s]" : "%s", text);
}

typedef struct { /* what the callback tells */
    const char *worker_id, *model_ref, *advertise_uri, *spawn_token, *host; /* host NULL: all interfaces */
    int port;
    uint64_t memory_bytes;
} callback_info;

static void callback_body(const callback_info *info, int fd, buf *b) {
    char local[64], uri[512];
    callback_local_address(fd, local);
    snprintf(uri, sizeof uri, "http://%s:%d", info->host ? info->host : local, info->port);
    buf_putc(b, '{');
    json_kv_cstr(b, "worker_id", info->worker_id);
    json_kv_cstr(b, "model_ref", info->model_ref);
    json_kv_u64(b, "memory_bytes", info->memory_bytes);
    json_kv_int(b, "vram_bytes", 0);
    json_kv_cstr(b, "memory_architecture", "cpu");
    json_kv_cstr(b, "uri", info->advertise_uri ? info->advertise_uri : uri);
    json_kv_cstr(b, "worker_type", "cpu");
    json_put_key(b, "capabilities"), buf_puts(b, "[\"text-gen\"]");
    json_kv_cstr(b, "protocol", "sse");
    buf_putc(b, '}');
}

/* One attempt: the status of the answer, or 0 when there is none. The request goes out in one write. */
static int callback_post(const callback_url *u, const struct addrinfo *to, const callback_info *info, const int *stop) {
    double until = sys_now() + CALLBACK_TIMEOUT_MS / 1000.0;
    buf body = {0}, request = {0};
    char answer[16] = "";
    int fd = callback_connect(to, until, stop), n = 0;
    if (fd < 0) return 0;
    callback_body(info, fd, &body);
    buf_reserve(&request, 8192); /* at once: growing would leave copies of the token */
    buf_printf(&request, "POST %s HTTP/1.1\r\nHost: %.*s\r\nUser-Agent: lorch/" LORCH_VERSION "\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n",
               u->path, u->authority_len, u->authority, body.len);
    if (info->spawn_token) buf_printf(&request, "Authorization: Bearer %s\r\n", info->spawn_token);
    buf_puts(&request, "Connection: close\r\n\r\n");
    buf_add(&request, body.ptr, body.len);
    int sent = !request.failed && !body.failed && send(fd, request.ptr, request.len, MSG_NOSIGNAL) == (ssize_t)request.len;
    while (sent && n < 12 && callback_wait(fd, POLLIN, until, stop)) {
        ssize_t got = recv(fd, answer + n, (size_t)(12 - n), 0);
        if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
        if (got <= 0) break;
        n += (int)got;
    }
    sys_wipe(request.ptr, request.len); /* it holds the spawn token */
    buf_free(&body), buf_free(&request);
    close(fd);
    int status = n == 12 && memcmp(answer, "HTTP/1.", 7) == 0 && answer[8] == ' ' ? atoi(answer + 9) : 0;
    return status >= 100 && status <= 599 ? status : 0;
}

/* Registers the worker, with three retries. 1: registered; 0: refused, which has been logged; -1: *stop. */
static int callback_run(const callback_url *u, const struct addrinfo *to, const callback_info *info, const int *stop) {
    int status = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        if (attempt) callback_wait(-1, 0, sys_now() + callback_pauses[attempt - 1], stop);
        if (__atomic_load_n(stop, __ATOMIC_ACQUIRE)) return -1;
        status = callback_post(u, to, info, stop);
        if (status >= 200 && status <= 299) {
            log_note(LOG_INFO, "registered", "\"status\":%d,\"attempts\":%d", status, attempt + 1);
            return 1;
        }
        if (__atomic_load_n(stop, __ATOMIC_ACQUIRE)) return -1;
        log_note(LOG_WARN, "error", "\"message\":\"the pool manager did not take the ready callback\",\"status\":%d,\"attempt\":%d", status, attempt + 1);
    }
    log_note(LOG_ERROR, "error", "\"code\":\"CALLBACK_REFUSED\",\"message\":\"the pool manager refused the ready callback four times\",\"status\":%d", status);
    return 0;
}

#ifndef LORCH_NO_MAIN
/* ==== Command line =========================================================================
 * Options are rows of cli_options, the same for every command that takes them: from the command line, then
 * LLORCH_* in the environment, then a config file, then the default. Values are checked after merging. A
 * usage error is one line and exit 2; a model or run-time failure exit 1. */

enum cli_command { CLI_SERVE = 1, CLI_GENERATE = 2, CLI_INSPECT = 4, CLI_TOKENIZE = 8, CLI_DETOKENIZE = 16, CLI_SCORE = 32, CLI_BENCH = 64, CLI_SELFTEST = 128 };
enum cli_kind { CLI_STRING, CLI_INT, CLI_FLOAT, CLI_SWITCH, CLI_CHOICE };

typedef struct {
    const char *worker_id, *model, *model_ref, *host, *callback_url, *advertise_uri, *spawn_token, *api_token_file, *config, *log_format, *log_level,
        *kv_type, *pre, *prompt, *ids, *gpu_device, *user;
    const char *stop[MAX_STOPS];
    int n_stop;
    int64_t port, max_tokens_in, max_tokens_out, inference_timeout_s, kv_cache_mb, max_memory_mb, parallel, queue, context, threads, chunk, drain_timeout_s, sse_ping_ms,
        header_timeout_ms, body_timeout_ms, idle_timeout_ms, write_timeout_ms, n, top, top_k, bench_prompt, bench_batch, bench_depth, bench_rounds;
    uint64_t seed;
    double temperature, top_p, min_p, repetition_penalty;
    int insecure, no_sandbox, exit_with_parent, lazy, no_speculate, json, special, no_bos, ignore_eos, has_seed;
    /* not options */
    enum cli_command command;
    const char *file;      /* the subcommands' MODEL */
    int has_token;
    unsigned char token_hash[32];
    const char *program;
} cli_settings;

typedef struct {
    const char *name, *short_name; /* without dashes */
    enum cli_kind kind;
    unsigned commands;             /* the commands that take it */
    size_t field;
    double lo, hi;                 /* of numbers */
    const char *standard;          /* default, or NULL; of a CHOICE: the default */
    const char *arg, *help;        /* arg of a CHOICE: the values, separated by | */
} cli_option;

enum {
    CLI_ENGINE = CLI_SERVE | CLI_GENERATE | CLI_SCORE | CLI_BENCH,
    CLI_TOKENS = CLI_ENGINE | CLI_TOKENIZE | CLI_DETOKENIZE | CLI_INSPECT,
    CLI_JSON = CLI_GENERATE | CLI_INSPECT | CLI_TOKENIZE | CLI_SCORE | CLI_BENCH | CLI_SELFTEST
};

#define F(field) offsetof(cli_settings, field)
static const cli_option cli_options[] = {
    {"model", 0, CLI_STRING, CLI_SERVE, F(model), 0, 0, 0, "PATH", "the GGUF file to serve (required)"},
    {"model-ref", 0, CLI_STRING, CLI_SERVE, F(model_ref), 0, 0, 0, "REF", "what the pool manager calls it; default file: and the absolute path"},
    {"worker-id", 0, CLI_STRING, CLI_SERVE, F(worker_id), 0, 0, 0, "ID", "unique in the pool; default a random UUID"},
    {"host", 0, CLI_STRING, CLI_SERVE, F(host), 0, 0, "127.0.0.1", "ADDR", "address to listen on; default 127.0.0.1"},
    {"port", 0, CLI_INT, CLI_SERVE, F(port), 0, 65535, "0", "N", "port to listen on; default a free one, printed on stdout"},
    {"callback-url", 0, CLI_STRING, CLI_SERVE, F(callback_url), 0, 0, 0, "URL", "POST the ready callback there; default: standalone"},
    {"advertise-uri", 0, CLI_STRING, CLI_SERVE, F(advertise_uri), 0, 0, 0, "URI", "what the callback reports as the worker's address"},
    {"spawn-token", 0, CLI_STRING, CLI_SERVE, F(spawn_token), 0, 0, 0, "TOKEN", "sent with the callback as a bearer token"},
    {"api-token-file", 0, CLI_STRING, CLI_SERVE, F(api_token_file), 0, 0, 0, "FILE", "requests need the bearer token in FILE (or $LLORCH_API_TOKEN)"},
    {"insecure", 0, CLI_SWITCH, CLI_SERVE, F(insecure), 0, 0, 0, 0, "allow listening beyond loopback without a token"},
    {"user", 0, CLI_STRING, CLI_SERVE, F(user), 0, 0, 0, "NAME", "started as root: become this user once the port and the file are open; NAME or UID[:GID]"},
    {"no-sandbox", 0, CLI_SWITCH, CLI_SERVE, F(no_sandbox), 0, 0, 0, 0, "keep files and system calls in reach: for debuggers and sanitizers"},
    {"parallel", 0, CLI_INT, CLI_SERVE, F(parallel), 1, MAX_PARALLEL, "4", "N", "jobs that run at the same time; default 4"},
    {"queue", 0, CLI_INT, CLI_SERVE, F(queue), 0, MAX_QUEUE, "32", "N", "jobs that may wait; default 32"},
    {"max-tokens-in", 0, CLI_INT, CLI_SERVE, F(max_tokens_in), 1, MAX_CONTEXT, 0, "N", "longest prompt in tokens; default the context"},
    {"max-tokens-out", 0, CLI_INT, CLI_SERVE, F(max_tokens_out), 1, MAX_CONTEXT, "2048", "N", "largest max_tokens of a job; default 2048"},
    {"inference-timeout-sec", 0, CLI_INT, CLI_SERVE, F(inference_timeout_s), 0, 1e9, "300", "N", "longest run of a job, 0 for none; default 300"},
    {"drain-timeout", 0, CLI_INT, CLI_SERVE, F(drain_timeout_s), 0, 3600, "4", "SEC", "how long running jobs may finish at shutdown; default 4"},
    {"exit-with-parent", 0, CLI_SWITCH, CLI_SERVE, F(exit_with_parent), 0, 0, 0, 0, "shut down when the process that started this one ends"},
    {"lazy", 0, CLI_SWITCH, CLI_SERVE, F(lazy), 0, 0, 0, 0, "do not read the file into memory before ready"},
    {"sse-ping-ms", 0, CLI_INT, CLI_SERVE, F(sse_ping_ms), 10, 3600000, "5000", "MS", "silence before a stream gets a ping; default 5000"},
    {"header-timeout-ms", 0, CLI_INT, CLI_SERVE, F(header_timeout_ms), 10, 3600000, "10000", "MS", "for a request's head to come; default 10000"},
    {"body-timeout-ms", 0, CLI_INT, CLI_SERVE, F(body_timeout_ms), 10, 3600000, "30000", "MS", "for a request's body to come; default 30000"},
    {"idle-timeout-ms", 0, CLI_INT, CLI_SERVE, F(idle_timeout_ms), 10, 86400000, "75000", "MS", "before an idle connection is closed; default 75000"},
    {"write-timeout-ms", 0, CLI_INT, CLI_SERVE, F(write_timeout_ms), 10, 3600000, "30000", "MS", "before a client that reads nothing is dropped; default 30000"},
    {"log-format", 0, CLI_CHOICE, CLI_SERVE, F(log_format), 0, 0, 0, "json|text", "default text on a terminal, else json"},
    {"log-level", 0, CLI_CHOICE, CLI_SERVE, F(log_level), 0, 0, "INFO", "ERROR|WARN|INFO|DEBUG|TRACE", "default INFO"},
    {"config", 0, CLI_STRING, CLI_SERVE, F(config), 0, 0, 0, "FILE", "lines of `flag: value`, flags without dashes"},
    {"gpu-device", 0, CLI_STRING, CLI_SERVE, F(gpu_device), 0, 0, 0, "N", "accepted and ignored: this is a CPU worker"},
    {"context", 0, CLI_INT, CLI_ENGINE, F(context), 1, MAX_CONTEXT, 0, "N", "positions of prompt and output together; default the model's, if they fit"},
    {"threads", "t", CLI_INT, CLI_ENGINE, F(threads), 1, MAX_THREADS, 0, "N", "compute threads; default by affinity, CPU quota and physical cores"},
    {"kv-type", 0, CLI_CHOICE, CLI_ENGINE, F(kv_type), 0, 0, "f16", "f16|f32|q8_0", "numbers in the KV cache; default f16"},
    {"kv-cache-size-mb", 0, CLI_INT, CLI_SERVE, F(kv_cache_mb), 1, 1e12, 0, "N", "MiB of KV cache; default parallel x context, at most a quarter of free memory"},
    {"max-memory", 0, CLI_INT, CLI_SERVE, F(max_memory_mb), 1, 1e12, 0, "MB", "MiB that weights, KV cache, scratch and requests may take together; default what is free"},
    {"chunk", 0, CLI_INT, CLI_ENGINE, F(chunk), 1, 1024, 0, "N", "most prompt tokens in one step; default 192"},
    {"no-speculate", 0, CLI_SWITCH, CLI_SERVE | CLI_GENERATE, F(no_speculate), 0, 0, 0, 0, "decode one token a step, without looking ahead in repeated text"},
    {"pre", 0, CLI_STRING, CLI_TOKENS, F(pre), 0, 0, 0, "NAME", "pre-tokenizer to use instead of the one that the file names"},
    {"prompt", "p", CLI_STRING, CLI_GENERATE, F(prompt), 0, 0, 0, "TEXT", "the prompt; default standard input"},
    {"max-tokens", "n", CLI_INT, CLI_GENERATE, F(n), 1, MAX_CONTEXT, "2048", "N", "most tokens to generate; default 2048"},
    {"temperature", 0, CLI_FLOAT, CLI_GENERATE, F(temperature), 0, 2, "1", "X", "0 is greedy; default 1"},
    {"top-k", 0, CLI_INT, CLI_GENERATE, F(top_k), 0, MAX_VOCAB, "0", "N", "most likely tokens to choose from, 0 for all; default 0"},
    {"top-p", 0, CLI_FLOAT, CLI_GENERATE, F(top_p), 0, 1, "1", "X", "least probability mass to choose from; default 1"},
    {"min-p", 0, CLI_FLOAT, CLI_GENERATE, F(min_p), 0, 1, "0", "X", "least probability relative to the best token's; default 0"},
    {"repetition-penalty", 0, CLI_FLOAT, CLI_GENERATE, F(repetition_penalty), 1e-6, 2, "1", "X", "above 0, up to 2; default 1"},
    {"seed", 0, CLI_STRING, CLI_GENERATE, F(seed), 0, 0, 0, "N", "decides every draw; default random, printed with --json"},
    {"stop", 0, CLI_STRING, CLI_GENERATE, F(stop), 0, 0, 0, "TEXT", "ends the text before TEXT; up to 4 times"},
    {"ignore-eos", 0, CLI_SWITCH, CLI_GENERATE, F(ignore_eos), 0, 0, 0, 0, "never choose an end-of-generation token"},
    {"special", 0, CLI_SWITCH, CLI_GENERATE | CLI_TOKENIZE | CLI_DETOKENIZE | CLI_SCORE, F(special), 0, 0, 0, 0, "read (or write) control tokens as such"},
    {"no-bos", 0, CLI_SWITCH, CLI_TOKENIZE, F(no_bos), 0, 0, 0, 0, "do not begin as a prompt does"},
    {"ids", 0, CLI_STRING, CLI_SCORE, F(ids), 0, 0, 0, "1,2,3", "token ids to score; default: text on standard input"},
    {"top", 0, CLI_INT, CLI_SCORE, F(top), 0, MAX_VOCAB, "8", "N", "most likely tokens to list; default 8"},
    {"bench-prompt", "p", CLI_INT, CLI_BENCH, F(bench_prompt), 0, MAX_CONTEXT, "512", "N", "prompt tokens; default 512"},
    {"bench-tokens", "n", CLI_INT, CLI_BENCH, F(n), 0, MAX_CONTEXT, "64", "N", "tokens to decode; default 64"},
    {"batch", "b", CLI_INT, CLI_BENCH, F(bench_batch), 1, MAX_PARALLEL, "1", "N", "sequences that decode together; default 1"},
    {"depth", "d", CLI_INT, CLI_BENCH, F(bench_depth), 0, MAX_CONTEXT / 2, "0", "N", "positions that each sequence has behind it as it begins to decode; default 0"},
    {"rounds", "r", CLI_INT, CLI_BENCH, F(bench_rounds), 1, 1000, "3", "N", "rounds, of which the median counts; default 3"},
    {"json", 0, CLI_SWITCH, CLI_JSON, F(json), 0, 0, 0, 0, "print JSON"},
};
#undef F
enum { N_CLI_OPTIONS = sizeof cli_options / sizeof *cli_options };

typedef struct { /* where a value came from, for messages */
    char *value;      /* owned */
    char source[160];
    int rank;         /* 0: none, 1: file, 2: environment, 3: command line */
} cli_value;

static cli_value cli_values[N_CLI_OPTIONS];

__attribute__((format(printf, 1, 2), noreturn)) static void cli_usage_error(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fputs("lorch: ", stderr);
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(2);
}

__attribute__((noreturn)) static void cli_out_of_memory(void) {
    fputs("lorch: out of memory\n", stderr);
    exit(1);
}

/* ---- collecting values ---- */

static const cli_option *cli_find(str name, enum cli_command command) {
    for (int i = 0; i < N_CLI_OPTIONS; i++)
        if ((cli_options[i].commands & (unsigned)command) && str_is(name, cli_options[i].name)) return &cli_options[i];
    return NULL;
}

static void cli_store(cli_settings *c, const cli_option *o, const char *value, int rank, const char *source) {
    cli_value *v = &cli_values[o - cli_options];
    if (o->field == offsetof(cli_settings, stop)) { /* the one that may come several times */
        if (c->n_stop == MAX_STOPS) cli_usage_error("%s: at most %d stop strings", source, MAX_STOPS);
        c->stop[c->n_stop++] = value;
        return;
    }
    if (rank < v->rank) return;
    if (v->value) sys_wipe(v->value, strlen(v->value));
    free(v->value);
    v->value = str_dup(str_of(value)), v->rank = rank;
    snprintf(v->source, sizeof v->source, "%s", source);
    if (!v->value) cli_out_of_memory();
}

static const cli_option *cli_match(const char *arg, enum cli_command command, const char **value) { /* --name, --name=value, -x */
    *value = NULL;
    if (arg[0] == '-' && arg[1] == '-') {
        const char *equals = strchr(arg, '=');
        if (equals) *value = equals + 1;
        return cli_find(str_make(arg + 2, equals ? (size_t)(equals - arg - 2) : strlen(arg + 2)), command);
    }
    for (int i = 0; i < N_CLI_OPTIONS; i++)
        if ((cli_options[i].commands & (unsigned)command) && cli_options[i].short_name && strcmp(arg + 1, cli_options[i].short_name) == 0) return &cli_options[i];
    return NULL;
}

static void cli_from_arguments(cli_settings *c, int argc, char **argv, int first) {
    for (int i = first; i < argc; i++) {
        char *arg = argv[i];
        if (arg[0] != '-' || arg[1] == 0) {
            if (c->command == CLI_SERVE || c->file) cli_usage_error("unexpected argument '%.60s'", arg);
            c->file = arg;
            continue;
        }
        const char *value;
        const cli_option *o = cli_match(arg, c->command, &value);
        char source[96];
        snprintf(source, sizeof source, "%.*s", (int)strcspn(arg, "="), arg);
        if (!o) cli_usage_error("unknown option %.60s (see %s --help)", source, c->program);
        if (o->kind == CLI_SWITCH && !value) value = "true";
        if (!value && ++i == argc) cli_usage_error("%s needs a value", source);
        if (!value) value = argv[i];
        cli_store(c, o, value, 3, source);
        if (o->field == offsetof(cli_settings, spawn_token)) sys_wipe((char *)(uintptr_t)value, strlen(value)); /* argv is for everyone to see */
    }
}

static void cli_env_name(const cli_option *o, char out[64]) {
    int n = snprintf(out, 64, "LLORCH_%s", o->name);
    for (int i = 7; i < n; i++) out[i] = out[i] == '-' ? '_' : (char)(out[i] >= 'a' && out[i] <= 'z' ? out[i] - 32 : out[i]);
}

static void cli_from_environment(cli_settings *c) {
    char name[64];
    for (int i = 0; i < N_CLI_OPTIONS; i++) {
        if (!(cli_options[i].commands & (unsigned)c->command)) continue;
        cli_env_name(&cli_options[i], name);
        char *value = getenv(name);
        if (!value) continue;
        cli_store(c, &cli_options[i], value, 2, name);
        if (cli_options[i].field == offsetof(cli_settings, spawn_token)) sys_wipe(value, strlen(value)), unsetenv(name);
    }
}

/* line = [ key ":" value ] [ "#" comment ]; a value may stand in quotes */
static void cli_from_line(cli_settings *c, const char *path, int number, str line) {
    char source[160];
    line = str_trim(line);
    if (line.len == 0 || line.ptr[0] == '#' || str_is(line, "---")) return;
    const char *colon = memchr(line.ptr, ':', line.len);
    size_t n = colon ? (size_t)(colon - line.ptr) : line.len;
    str key = str_trim(str_make(line.ptr, n)), value = str_make("", 0);
    if (!colon) cli_usage_error("%s:%d: '%.*s' is not `key: value`", path, number, (int)(n < 60 ? n : 60), line.ptr);
    value = str_trim(str_make(colon + 1, line.len - n - 1));
    char quote = value.len && (*value.ptr == '"' || *value.ptr == '\'') ? *value.ptr : 0;
    const char *close = quote ? memchr(value.ptr + 1, quote, value.len - 1) : NULL;
    if (close) value = str_make(value.ptr + 1, (size_t)(close - value.ptr - 1));
    else
        for (size_t i = 0; i < value.len; i++)
            if (value.ptr[i] == '#' && (i == 0 || value.ptr[i - 1] == ' ' || value.ptr[i - 1] == '\t')) value = str_trim(str_make(value.ptr, i));
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)(key.len < 63 ? key.len : 63), key.ptr);
    for (char *p = name; *p; p++) *p = *p == '_' ? '-' : *p;
    const cli_option *o = cli_find(str_of(name), CLI_SERVE);
    if (!o || o->field == offsetof(cli_settings, config)) cli_usage_error("%s:%d: unknown key '%s'", path, number, name);
    snprintf(source, sizeof source, "%.80s:%d: %s", path, number, name);
    char *copy = str_dup(value);
    if (!copy) cli_out_of_memory();
    cli_store(c, o, copy, 1, source);
    sys_wipe(copy, value.len);
    free(copy);
}

static void cli_from_file(cli_settings *c, const char *path, const char *source) {
    static char text[65536];
    int n = sys_read_file(path, text, sizeof text), number = 1;
    if (n < 0) cli_usage_error("%s: cannot read %s: %s", source, path, strerror(errno));
    if (n == (int)sizeof text - 1) cli_usage_error("%s: %s is larger than 64 KiB", source, path);
    for (char *p = text; *p; number++) {
        size_t len = strcspn(p, "\n"), used = len;
        if (used && p[used - 1] == '\r') used--;
        cli_from_line(c, path, number, str_make(p, used));
        p += len + (p[len] == '\n');
    }
    sys_wipe(text, sizeof text); /* it may hold a token */
}

/* ---- checking values ---- */

static void cli_set_number(cli_settings *c, const cli_option *o, const char *value, const char *source) {
    char *end, *at = (char *)c + o->field;
    errno = 0;
    if (o->kind == CLI_INT) {
        long long v = strtoll(value, &end, 10);
        int digits = value[0] && strspn(value + (value[0] == '-'), "0123456789") == strlen(value + (value[0] == '-'));
        if (!digits || *end || errno || (double)v < o->lo || (double)v > o->hi)
            cli_usage_error("%s: '%.40s' is not a whole number of %.0f to %.0f", source, value, o->lo, o->hi);
        *(int64_t *)(void *)at = v;
    } else {
        double v = strtod(value, &end);
        if (!*value || *end || !(v >= o->lo && v <= o->hi)) cli_usage_error("%s: '%.40s' is not a number of %g to %g", source, value, o->lo, o->hi);
        *(double *)(void *)at = v;
    }
}

static void cli_set_choice(cli_settings *c, const cli_option *o, const char *value, const char *source) {
    for (const char *p = o->arg; *p;) {
        size_t n = strcspn(p, "|");
        if (strlen(value) == n && memcmp(value, p, n) == 0) {
            *(const char **)(void *)((char *)c + o->field) = value;
            return;
        }
        p += n + (p[n] == '|');
    }
    cli_usage_error("%s: '%.40s' is not one of %s", source, value, o->arg);
}

static void cli_set(cli_settings *c, const cli_option *o, const char *value, const char *source) {
    void *at = (char *)c + o->field;
    if (o->kind == CLI_INT || o->kind == CLI_FLOAT) cli_set_number(c, o, value, source);
    else if (o->kind == CLI_CHOICE) cli_set_choice(c, o, value, source);
    else if (o->kind == CLI_SWITCH) {
        str v = str_of(value);
        int yes = str_ieq(v, "true") || str_is(v, "1") || str_ieq(v, "yes"), no = str_ieq(v, "false") || str_is(v, "0") || str_ieq(v, "no");
        if (!yes && !no) cli_usage_error("%s: '%.40s' is neither true nor false", source, value);
        *(int *)at = yes;
    } else if (o->field == offsetof(cli_settings, seed)) {
        if (!json_u64(str_of(value), &c->seed) || !*value) cli_usage_error("%s: '%.40s' is not a whole number of 0 to 2^64 - 1", source, value);
        c->has_seed = 1;
    } else *(const char **)at = value;
}

static void cli_merge(cli_settings *c) {
    const cli_value *config = &cli_values[cli_find(str_of("config"), CLI_SERVE) - cli_options];
    if (c->command == CLI_SERVE && config->value) cli_from_file(c, config->value, config->source);
    for (int i = 0; i < N_CLI_OPTIONS; i++) {
        const cli_option *o = &cli_options[i];
        if (!(o->commands & (unsigned)c->command) || o->field == offsetof(cli_settings, stop)) continue;
        if (cli_values[i].value) cli_set(c, o, cli_values[i].value, cli_values[i].source);
        else if (o->standard) cli_set(c, o, o->standard, o->name);
    }
}

static const char *cli_source(const char *name) { /* how the option was given, for messages */
    const cli_option *o = cli_find(str_of(name), CLI_SERVE);
    static char dashed[64];
    if (o && cli_values[o - cli_options].value) return cli_values[o - cli_options].source;
    snprintf(dashed, sizeof dashed, "--%s", name);
    return dashed;
}

/* ---- help ---- */

static void cli_help_options(unsigned commands, unsigned but) {
    for (int i = 0; i < N_CLI_OPTIONS; i++) {
        const cli_option *o = &cli_options[i];
        char left[96];
        if (!(o->commands & commands) || (o->commands & but)) continue;
        if (o->short_name && o->commands != CLI_ENGINE) snprintf(left, sizeof left, "-%s %s", o->short_name, o->arg);
        else snprintf(left, sizeof left, "--%s%s%s", o->name, o->arg ? " " : "", o->arg ? o->arg : "");
        printf(strlen(left) < 28 ? "  %-28s %s\n" : "  %s\n%31s%s\n", left, strlen(left) < 28 ? o->help : "", o->help);
    }
}

static void cli_help(void) {
    puts("lorch " LORCH_VERSION ": a CPU worker for LLM orchestrators, in one C file\n\n"
         "  lorch --model M.gguf [options]     serve M over HTTP\n"
         "  lorch generate M.gguf -p TEXT      print a continuation of TEXT\n"
         "  lorch inspect M.gguf               check the file and describe it\n"
         "  lorch tokenize M.gguf              text on standard input to ids\n"
         "  lorch detokenize M.gguf            ids on standard input to text\n"
         "  lorch score M.gguf --ids 1,2,3     log-probabilities, position by position\n"
         "  lorch bench M.gguf                 speed, beside what the machine could do\n"
         "  lorch selftest                     every kernel against the plain loop\n\n"
         "Each option of the worker is also an environment variable (--worker-id: LLORCH_WORKER_ID) and a line in the\n"
         "config file (worker-id: w1). The command line wins, then the environment, then the file.\n\nWorker:");
    cli_help_options(CLI_SERVE, 0);
    puts("  --version                    print the version\n  --help                       print this\n\n"
         "Subcommands (also --context, --threads or -t, --kv-type, --chunk and --pre, where they make sense):");
    static const struct { const char *name; unsigned command; } subs[] = {
        {"generate", CLI_GENERATE}, {"tokenize", CLI_TOKENIZE}, {"score", CLI_SCORE}, {"bench", CLI_BENCH}};
    for (size_t i = 0; i < sizeof subs / sizeof *subs; i++) {
        printf(" %s\n", subs[i].name);
        cli_help_options(subs[i].command, CLI_SERVE);
    }
    puts("\nLORCH_SIMD=scalar|avx2|... forces an instruction set. Exit codes: 0 well, 1 model or run-time failure, 2 usage,\n"
         "3 the pool manager refused the ready callback, 130 second signal.");
}

/* ---- engine options ---- */

static void cli_engine_options(const cli_settings *c, lorch_options *o) {
    lorch_defaults(o);
    o->n_threads = (int)c->threads, o->n_ctx = (int)c->context, o->chunk = (int)c->chunk;
    if (c->kv_type) o->kv_type = strcmp(c->kv_type, "f32") == 0 ? LORCH_KV_F32 : strcmp(c->kv_type, "q8_0") == 0 ? LORCH_KV_Q8_0 : LORCH_KV_F16;
    o->pre = c->pre, o->no_speculate = c->no_speculate;
    if (c->command == CLI_SERVE) o->n_parallel = (int)c->parallel, o->n_queue = (int)c->queue, o->kv_bytes = (uint64_t)c->kv_cache_mb << 20;
    else o->n_parallel = 1;
}

/* ---- the worker's life ---- */

typedef struct { /* what the starter thread needs: loads the model, then calls the pool manager back */
    const cli_settings *settings;
    route_server server;
    callback_url url;
    callback_info info;
    struct addrinfo *to;                  /* the URL's addresses */
    int has_callback, stop, starter_done; /* the last two are atomic; stop: the server has ended */
    int percent;
    uint64_t model_bytes;
} cli_worker;

static cli_worker cli_the_worker; /* static for the signal handler's sake */

static void cli_on_signal(int sig) {
    int saved = errno;
    (void)sig;
    if (__atomic_add_fetch(&cli_the_worker.server.signals, 1, __ATOMIC_RELAXED) > 1) _exit(130);
    route_wake(&cli_the_worker.server);
    errno = saved;
}

static void cli_bar(const char *what, double share) { /* on a terminal only */
    char bar[31];
    int n = (int)(share * 30);
    memset(bar, '-', 30), memset(bar, '#', (size_t)n), bar[30] = 0;
    fprintf(stderr, "\r%s [%s] %3.0f%%%s", what, bar, share * 100, share >= 1 ? "\n" : "");
    fflush(stderr);
}

static void cli_progress(cli_worker *w, int percent) { /* 0, 25, 50, 75, 100: once each */
    for (; w->percent <= percent; w->percent += 25) {
        if (!log_state.json && log_state.level >= LOG_INFO && isatty(STDERR_FILENO)) cli_bar("loading", w->percent / 100.0);
        else log_note(LOG_INFO, "model_load_progress", "\"percent\":%d", w->percent);
    }
}

static int cli_read_progress(void *user, double share) {
    cli_worker *w = user;
    cli_progress(w, share >= 1 ? 75 : share >= 0.5 ? 50 : 25);
    return __atomic_load_n(&w->stop, __ATOMIC_ACQUIRE);
}

static void cli_end_server(cli_worker *w, int code) {
    __atomic_store_n(&w->server.fatal, code, __ATOMIC_RELEASE);
    route_wake(&w->server);
}

/* A start-up failure: one log line with all that an operator asks for. */
static void cli_log_failure(const char *code, const char *message, const char *path, uint64_t required) {
    buf b = {0};
    json_kv_cstr(&b, "code", code);
    json_kv_cstr(&b, "message", message);
    json_kv_cstr(&b, "model_path", path);
    json_kv_u64(&b, "memory_available_bytes", sys_memory_available());
    json_kv_u64(&b, "memory_required_bytes", required);
    log_event(LOG_ERROR, "error", NULL, str_of(""), buf_cstr(&b));
    buf_free(&b);
}

static engine *cli_load(cli_worker *w) {
    char err[LORCH_ERROR_BYTES];
    const cli_settings *c = w->settings;
    lorch_options o;
    uint64_t size = w->model_bytes;
    buf b = {0};
    json_kv_cstr(&b, "model_path", c->model);
    log_event(LOG_INFO, "model_load_start", NULL, str_of(""), buf_cstr(&b));
    buf_free(&b);
    cli_progress(w, 0);
    model *m = model_load(c->model, c->pre, err, sizeof err);
    if (!m) return cli_log_failure("MODEL_LOAD_FAILED", err, c->model, size), NULL;
    cli_progress(w, 25);
    if (!c->lazy) gguf_read_ahead(m->file, cli_read_progress, w);
    cli_progress(w, 75);
    cli_engine_options(c, &o);
    uint64_t required = 0;
    engine *e = engine_open(m, &o, 1, &required, err, sizeof err);
    if (e && gguf_is_lost(e->m->file)) {
        snprintf(err, sizeof err, "%s: the file cannot be read: is the disk in order?", c->model);
        engine_close(e), e = NULL;
    }
    if (!e) {
        int memory = strncmp(err, "INSUFFICIENT_MEMORY: ", 21) == 0;
        cli_log_failure(memory ? "INSUFFICIENT_MEMORY" : "MODEL_LOAD_FAILED", memory ? err + 21 : err, c->model, required ? required : size);
        return NULL;
    }
    e->inference_timeout_s = (int)c->inference_timeout_s, e->max_tokens_in = (int)c->max_tokens_in;
    return e;
}

static void cli_log_loaded(const engine *e, double seconds) {
    buf b = {0};
    json_kv_cstr(&b, "model", e->m->name), json_kv_cstr(&b, "architecture", e->m->arch->name), json_kv_cstr(&b, "quant_kind", e->m->quant);
    json_kv_u64(&b, "weights_bytes", e->m->weight_bytes), json_kv_u64(&b, "kv_bytes", engine_kv_bytes(e)), json_kv_u64(&b, "scratch_bytes", engine_private_bytes(e));
    json_kv_int(&b, "context_length", e->n_ctx), json_kv_cstr(&b, "simd", e->k->name);
    json_kv_int(&b, "threads", e->threads.n_threads), json_kv_cstr(&b, "threads_because", e->threads_because);
    json_kv_num(&b, "load_ms", seconds * 1000, 1);
    log_event(LOG_INFO, "model_load_complete", NULL, str_of(""), buf_cstr(&b));
    if (!LORCH_OPTIMISED) log_note(LOG_WARN, "model_load_complete", "\"warning\":\"built without optimisation: rebuild with cc -O3 for full speed\"");
    buf_free(&b);
}

/* The second step of the sandbox, by the starter thread, before the first byte of the model file is looked at. */
static void cli_enter_sandbox(cli_worker *w) {
    route_server *s = &w->server;
    sys_keep();
    if (s->sandbox.off) return;
    int rules = sys_landlock_open(w->has_callback ? w->url.port : 0);
    if (rules >= 0) { /* it holds for one thread and those that it starts: the I/O thread has to enter by itself */
        __atomic_store_n(&s->landlock_fd, rules, __ATOMIC_RELEASE);
        route_wake(s);
        while (!__atomic_load_n(&s->landlock_entered, __ATOMIC_ACQUIRE) && !__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) poll(NULL, 0, 1);
        if (sys_landlock_enter(rules) && __atomic_load_n(&s->landlock_entered, __ATOMIC_ACQUIRE) > 0)
            __atomic_store_n(&s->sandbox.landlock, (int)sys_landlock_abi(), __ATOMIC_RELAXED);
        close(rules);
    }
    if (sys_seccomp_begin()) __atomic_store_n(&s->sandbox.seccomp, 1, __ATOMIC_RELAXED);
}

static void cli_leave_start(cli_worker *w) { /* the third step */
    if (w->server.sandbox.seccomp && sys_seccomp_end()) __atomic_store_n(&w->server.sandbox.seccomp, 2, __ATOMIC_RELAXED);
}

static void cli_start_worker(cli_worker *w) {
    double from = sys_now();
    if (w->has_callback && !(w->to = callback_resolve(&w->url, &w->stop))) {
        cli_end_server(w, 3);
        return;
    }
    sys_kept.most_memory = (uint64_t)w->settings->max_memory_mb << 20;
    if (sys_kept.most_memory) sys_kept.most_memory = sys_kept.most_memory > ROUTE_MAX_BUFFERS ? sys_kept.most_memory - ROUTE_MAX_BUFFERS : 1;
    cli_enter_sandbox(w);
    engine *e = cli_load(w);
    if (!e) {
        cli_end_server(w, 1);
        return;
    }
    cli_log_loaded(e, sys_now() - from);
    cli_progress(w, 100);
    __atomic_store_n(&w->server.loaded, e, __ATOMIC_RELEASE);
    route_wake(&w->server);
    log_note(LOG_INFO, "ready", "\"port\":%d,\"ready_ms\":%.0f", w->info.port, (sys_now() - w->server.t_start) * 1000);
    w->info.memory_bytes = e->m->weight_bytes + engine_kv_bytes(e) + engine_private_bytes(e) + e->job_bytes_most + ROUTE_MAX_BUFFERS;
    int refused = w->has_callback && callback_run(&w->url, w->to, &w->info, &w->stop) == 0;
    if (w->to) freeaddrinfo(w->to), w->to = NULL;
    if (w->info.spawn_token) sys_wipe((char *)(uintptr_t)w->info.spawn_token, strlen(w->info.spawn_token)); /* an option's value, of no more use */
    cli_leave_start(w);
    if (refused) cli_end_server(w, 3);
    else engine_fingerprint(e, &w->stop);
}

static void *cli_starter(void *arg) {
    cli_worker *w = arg;
    cli_start_worker(w);
    __atomic_store_n(&w->starter_done, 1, __ATOMIC_RELEASE);
    return NULL;
}

/* Listens; sets *port to the one chosen. Returns the socket, or -1 with errno. */
static int cli_listen(const struct addrinfo *a, int *port) {
    struct sockaddr_storage bound;
    socklen_t n = sizeof bound;
    int on = 1, fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, 1024) || getsockname(fd, (struct sockaddr *)&bound, &n)) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    *port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)(void *)&bound)->sin6_port : ((struct sockaddr_in *)(void *)&bound)->sin_port);
    return fd;
}

enum cli_reach { CLI_LOOPBACK, CLI_ONE_ADDRESS, CLI_ALL };

static enum cli_reach cli_reach_of(const struct sockaddr *a) {
    if (a->sa_family == AF_INET) {
        uint32_t v4 = ntohl(((const struct sockaddr_in *)(const void *)a)->sin_addr.s_addr);
        return v4 >> 24 == 127 ? CLI_LOOPBACK : v4 == 0 ? CLI_ALL : CLI_ONE_ADDRESS;
    }
    const struct in6_addr *v6 = &((const struct sockaddr_in6 *)(const void *)a)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(v6) ? CLI_LOOPBACK : IN6_IS_ADDR_UNSPECIFIED(v6) ? CLI_ALL : CLI_ONE_ADDRESS;
}

static void cli_read_token(cli_settings *c) { /* --api-token-file, else LLORCH_API_TOKEN, which is wiped */
    char text[4096], *env = getenv("LLORCH_API_TOKEN");
    str token = {"", 0};
    if (c->api_token_file) {
        int n = sys_read_file(c->api_token_file, text, sizeof text);
        if (n < 0) cli_usage_error("%s: cannot read %s: %s", cli_source("api-token-file"), c->api_token_file, strerror(errno));
        token = str_make(text, (size_t)n);
        while (token.len && (token.ptr[token.len - 1] == '\n' || token.ptr[token.len - 1] == '\r')) token.len--;
        token = str_trim(token);
        if (token.len == 0) cli_usage_error("%s: %s holds no token", cli_source("api-token-file"), c->api_token_file);
    } else if (env && *env) token = str_of(env);
    for (size_t i = 0; i < token.len; i++)
        if ((unsigned char)token.ptr[i] <= ' ' || (unsigned char)token.ptr[i] >= 0x7f)
            cli_usage_error("%s: the token must be printable ASCII without spaces", c->api_token_file ? cli_source("api-token-file") : "LLORCH_API_TOKEN");
    if (token.len) c->has_token = 1, sha256(token, c->token_hash);
    sys_wipe(text, sizeof text);
    if (env) sys_wipe(env, strlen(env)), unsetenv("LLORCH_API_TOKEN");
}

static struct addrinfo *cli_resolve(const cli_settings *c) {
    struct addrinfo hints, *a = NULL;
    char port[16];
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM, hints.ai_flags = AI_PASSIVE | AI_NUMERICHOST;
    snprintf(port, sizeof port, "%d", (int)c->port);
    if (getaddrinfo(c->host, port, &hints, &a) == 0) return a;
    hints.ai_flags = AI_PASSIVE;
    if (getaddrinfo(c->host, port, &hints, &a)) cli_usage_error("%s: '%.100s' is no address of this machine", cli_source("host"), c->host);
    return a;
}

/* Checks all that can be checked before anything is opened. Strings that it makes live as long as the process. */
static void cli_check_serve(cli_settings *c, cli_worker *w) {
    static char uuid[37], ref[PATH_MAX + 8];
    char full[PATH_MAX];
    if (!c->model || !*c->model) cli_usage_error("--model is required (see %s --help)", c->program);
    if (!c->worker_id) sys_uuid(uuid), c->worker_id = uuid;
    size_t n = strlen(c->worker_id);
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)c->worker_id[i] < ' ' || (unsigned char)c->worker_id[i] >= 0x7f || strchr("\"\\", c->worker_id[i])) n = 0;
    if (n < 1 || n >= sizeof log_state.worker_id) cli_usage_error("%s: a worker id is 1 to 127 printable ASCII characters but \" and \\", cli_source("worker-id"));
    if (!c->model_ref) {
        snprintf(ref, sizeof ref, "file:%s", realpath(c->model, full) ? full : c->model);
        c->model_ref = ref;
    }
    if (c->callback_url && *c->callback_url) {
        const char *wrong = callback_parse(c->callback_url, &w->url);
        if (wrong) cli_usage_error("%s: %s", cli_source("callback-url"), wrong);
        w->has_callback = strstr(c->callback_url, "localhost:9999") == NULL; /* the system's test mode */
    }
    if (c->spawn_token)
        for (const char *p = c->spawn_token; *p; p++)
            if ((unsigned char)*p <= ' ' || (unsigned char)*p >= 0x7f) cli_usage_error("%s: the token must be printable ASCII without spaces", cli_source("spawn-token"));
    cli_read_token(c);
}

static void cli_route_settings(const cli_settings *c, int loopback, route_settings *s) {
    s->worker_id = c->worker_id, s->model_ref = c->model_ref, s->has_token = c->has_token;
    memcpy(s->token_hash, c->token_hash, sizeof s->token_hash);
    s->max_tokens_out = (int)c->max_tokens_out, s->header_timeout_ms = (int)c->header_timeout_ms, s->body_timeout_ms = (int)c->body_timeout_ms;
    s->idle_timeout_ms = (int)c->idle_timeout_ms, s->write_timeout_ms = (int)c->write_timeout_ms, s->sse_ping_ms = (int)c->sse_ping_ms;
    s->drain_timeout_s = (int)c->drain_timeout_s, s->exit_with_parent = c->exit_with_parent;
    s->check_host = loopback && !c->has_token;
}

static int cli_open_server(cli_worker *w, const route_settings *set) {
    route_server *s = &w->server;
    struct rlimit files;
    struct sigaction act;
    s->set = *set, s->fatal = -1, s->t_start = sys_now(), s->parent = getppid(), s->landlock_fd = -1;
    s->sandbox.off = w->settings->no_sandbox;
    s->sandbox.hardened = !s->sandbox.off && sys_harden();
    pthread_mutex_init(&s->lock, NULL);
    if (pipe2(s->wake, O_NONBLOCK | O_CLOEXEC)) return 0;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max < 65536 ? files.rlim_max : 65536;
        setrlimit(RLIMIT_NOFILE, &files);
        getrlimit(RLIMIT_NOFILE, &files);
    } else files.rlim_cur = 1024;
    s->max_conns = files.rlim_cur < ROUTE_MAX_CONNS + ROUTE_SPARE_FDS ? (int)files.rlim_cur - ROUTE_SPARE_FDS : ROUTE_MAX_CONNS;
    if (s->max_conns < 1) s->max_conns = 1;
    memset(&act, 0, sizeof act);
    act.sa_handler = cli_on_signal;
    sigaction(SIGTERM, &act, NULL), sigaction(SIGINT, &act, NULL);
    signal(SIGPIPE, SIG_IGN);
    gguf_watch();
    return 1;
}

/* Opens what is read later, while this process may still be root. */
static void cli_open_files(cli_worker *w) {
    struct stat st;
    const char *path = w->settings->model;
    int writable = 0, fd = sys_open(path, &writable), why = errno;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) w->model_bytes = (uint64_t)st.st_size;
    sys_kept.path = path, sys_kept.file = fd, sys_kept.why = why, sys_kept.writable = writable;
    sys_kept.statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
}

static int cli_number(const char *text, long *v) { /* a user or group id */
    char *end;
    if (*text < '0' || *text > '9') return 0;
    *v = strtol(text, &end, 10);
    return *end == 0 && *v >= 0 && *v < 0xffffffffL;
}

static void cli_find_user(const cli_settings *c, long *uid, long *gid) { /* NAME, UID or UID:GID */
    char text[128];
    snprintf(text, sizeof text, "%s", c->user);
    char *colon = strchr(text, ':');
    if (colon) *colon = 0;
    int ok = cli_number(text, uid);
    const struct passwd *p = ok ? getpwuid((uid_t)*uid) : colon ? NULL : getpwnam(text);
    if (p) *uid = (long)p->pw_uid, *gid = (long)p->pw_gid;
    else *gid = *uid;
    if ((!ok && !p) || (colon && !cli_number(colon + 1, gid))) cli_usage_error("%s: there is no user '%.100s'", cli_source("user"), c->user);
    if (geteuid() != 0) cli_usage_error("%s: only root can become another user", cli_source("user"));
}

/* Gives root up, for good. 0: it could not be done. */
static int cli_become(long uid, long gid) {
    return setgroups(0, NULL) == 0 && setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) == 0 && setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) == 0 &&
           (uid == 0 || setuid(0) != 0);
}

/* Ends what still runs and gives everything back. A layer that takes longer than the drain's grace is not waited for. */
static void cli_close_server(cli_worker *w) {
    route_server *s = &w->server;
    for (int i = 0; i < s->n_conns; i++) s->conn[i]->state = HTTP_DEAD;
    route_sweep(s);
    engine *e = __atomic_load_n(&s->loaded, __ATOMIC_ACQUIRE);
    if (e) s->e = e, engine_drain(e, 1), engine_join(e);
    route_take_all_news(s, sys_now());
    engine_close(e);
    close(s->listen_fd), close(s->wake[0]), close(s->wake[1]);
    if (sys_kept.statm >= 0) close(sys_kept.statm);
    if (sys_kept.file >= 0) close(sys_kept.file);
    if (w->to) freeaddrinfo(w->to);
    for (int i = 0; i < N_CLI_OPTIONS; i++) free(cli_values[i].value);
}

static int cli_serve(cli_settings *c) {
    cli_worker *w = &cli_the_worker;
    route_settings set = {0};
    pthread_t starter;
    char message[256];
    int port = 0;
    long uid = 0, gid = 0;
    w->settings = c;
    cli_check_serve(c, w);
    if (c->user) cli_find_user(c, &uid, &gid);
    struct addrinfo *a = cli_resolve(c);
    enum cli_reach reach = cli_reach_of(a->ai_addr);
    if (reach != CLI_LOOPBACK && !c->has_token && !c->insecure)
        cli_usage_error("%s: %s is open to others: give --api-token-file (or LLORCH_API_TOKEN), or --insecure", cli_source("host"), c->host);
    log_state.quiet = 0, log_state.json = c->log_format ? strcmp(c->log_format, "json") == 0 : !isatty(STDERR_FILENO);
    for (int i = 0; i <= LOG_TRACE; i++)
        if (strcmp(log_level_names[i], c->log_level) == 0) log_state.level = (enum log_level)i;
    snprintf(log_state.worker_id, sizeof log_state.worker_id, "%s", c->worker_id);
    cli_route_settings(c, reach == CLI_LOOPBACK, &set);
    if (!cli_open_server(w, &set) || (w->server.listen_fd = cli_listen(a, &port)) < 0) {
        snprintf(message, sizeof message, "cannot listen on %s port %d: %s", c->host, (int)c->port, strerror(errno));
        cli_log_failure("MODEL_LOAD_FAILED", message, c->model, 0);
        freeaddrinfo(a);
        return 1;
    }
    log_note(LOG_INFO, "startup", "\"version\":\"%s\",\"port\":%d,\"pid\":%ld", LORCH_VERSION, port, (long)getpid());
    if (c->gpu_device) log_note(LOG_WARN, "startup", "\"warning\":\"--gpu-device is ignored: this is a CPU worker\"");
    printf("%d\n", port);
    fflush(stdout);
    callback_info info = {c->worker_id, c->model_ref, c->advertise_uri, c->spawn_token, reach == CLI_ALL ? NULL : strchr(c->host, ':') ? "[::1]" : c->host, port, 0};
    char host[128];
    if (reach == CLI_ONE_ADDRESS && strchr(c->host, ':')) snprintf(host, sizeof host, "[%.120s]", c->host), info.host = host;
    w->info = info;
    freeaddrinfo(a);
    cli_open_files(w);
    if (c->user && !cli_become(uid, gid)) return cli_log_failure("MODEL_LOAD_FAILED", "cannot become the user that --user names", c->model, 0), 1;
    if (sys_thread(&starter, cli_starter, w)) return cli_log_failure("MODEL_LOAD_FAILED", "cannot start a thread", c->model, 0), 1;
    int code = route_serve(&w->server);
    __atomic_store_n(&w->stop, 1, __ATOMIC_RELEASE);
    for (double until = sys_now() + 0.5; !__atomic_load_n(&w->starter_done, __ATOMIC_ACQUIRE) && sys_now() < until;) poll(NULL, 0, 2);
    int stuck = !__atomic_load_n(&w->starter_done, __ATOMIC_ACQUIRE); /* in a name server's or a disk's hands: not waited for */
    if (!stuck) pthread_join(starter, NULL), cli_close_server(w);
    log_note(LOG_INFO, "shutdown", "\"exit_code\":%d", code);
    if (stuck) fflush(stdout), _exit(code);
    return code;
}

/* ---- subcommands ---- */

static int cli_fail(const char *message) { /* exit 1: file, model, run time */
    fprintf(stderr, "lorch: %s\n", message);
    return 1;
}

static int cli_read_stdin(buf *b) {
    size_t n;
    do {
        if (!buf_reserve(b, 65536)) return 0;
        n = fread(b->ptr + b->len, 1, 65536, stdin);
        b->len += n;
    } while (n);
    return !ferror(stdin);
}

static void cli_print(const buf *b) {
    if (b->len) fwrite(b->ptr, 1, b->len, stdout);
}

static void cli_put_ids(buf *b, const int32_t *id, int n) { /* [1,2,3] */
    buf_putc(b, '[');
    for (int i = 0; i < n; i++) buf_printf(b, i ? ",%ld" : "%ld", (long)id[i]);
    buf_putc(b, ']');
}

typedef struct {
    tok_ids ids;
    buf text;
    int json, bar;  /* bar: a progress bar stands on stderr */
} cli_output;

static void cli_on_progress(int done, int total, void *user) {
    cli_output *out = user;
    if (!isatty(STDERR_FILENO)) return;
    out->bar = 1;
    cli_bar("reading the prompt", (double)done / total);
}

static int cli_on_token(const lorch_token *t, void *user) {
    cli_output *out = user;
    if (out->bar) fputs("\r\033[K", stderr), out->bar = 0;
    tok_ids_add(&out->ids, t->id);
    if (out->json) buf_add(&out->text, t->text, t->len);
    else if (fwrite(t->text, 1, t->len, stdout) != t->len || fflush(stdout)) return 1; /* nobody reads any more */
    return 0;
}

static void cli_print_generated(const cli_settings *c, const tok_ids *prompt, cli_output *out, const lorch_params *p, lorch_reason reason, const lorch_stats *st) {
    static const char *const reasons[] = {"FAILED", "MAX_TOKENS", "EOS", "STOP_SEQUENCE", "CANCELLED"};
    buf b = {0};
    buf_putc(&b, '{');
    json_kv_str(&b, "text", buf_str(&out->text));
    json_put_key(&b, "prompt_ids"), cli_put_ids(&b, prompt->id, prompt->n);
    json_put_key(&b, "ids"), cli_put_ids(&b, out->ids.id, out->ids.n);
    json_kv_cstr(&b, "stop_reason", reasons[reason]);
    if (st->stop_matched >= 0) json_kv_cstr(&b, "stop_sequence_matched", c->stop[st->stop_matched]);
    json_kv_u64(&b, "seed", p->seed);
    json_kv_int(&b, "drafted_tokens", st->drafted_tokens), json_kv_int(&b, "accepted_tokens", st->accepted_tokens);
    json_kv_num(&b, "prefill_ms", st->prefill_seconds * 1000, 1);
    json_kv_num(&b, "decode_ms", st->decode_seconds * 1000, 1);
    buf_puts(&b, "}\n");
    cli_print(&b);
    buf_free(&b);
}

/* Defaults for sampling that a file may bring (general.sampling.*), where the command line says nothing. */
static const struct { const char *key, *option; } cli_sampling[] = {
    {"general.sampling.temp", "temperature"}, {"general.sampling.top_k", "top-k"}, {"general.sampling.top_p", "top-p"},
    {"general.sampling.min_p", "min-p"}, {"general.sampling.penalty_repeat", "repetition-penalty"}};
enum { N_CLI_SAMPLING = sizeof cli_sampling / sizeof *cli_sampling };

static void cli_sampling_defaults(cli_settings *c, const gguf_file *g) {
    for (int i = 0; i < N_CLI_SAMPLING; i++) {
        const cli_option *o = cli_find(str_of(cli_sampling[i].option), CLI_GENERATE);
        double v = gguf_get_float(g, cli_sampling[i].key, NAN);
        void *field = (char *)c + o->field;
        if (!(v >= o->lo && v <= o->hi) || cli_values[o - cli_options].value) continue;
        if (o->kind == CLI_INT) *(int64_t *)field = (int64_t)v;
        else *(double *)field = v;
    }
}

static int cli_generate(cli_settings *c) {
    char err[LORCH_ERROR_BYTES];
    lorch_options o;
    lorch_params p;
    lorch_stats st;
    buf prompt = {0};
    cli_output out = {{0}, {0}, c->json, 0};
    tok_ids ids = {0};
    cli_engine_options(c, &o);
    lorch *l = lorch_load(c->file, &o, err);
    if (!l) return cli_fail(err);
    cli_sampling_defaults(c, l->e->m->file);
    lorch_params_defaults(&p);
    p.max_tokens = (int)c->n, p.temperature = (float)c->temperature, p.top_p = (float)c->top_p, p.min_p = (float)c->min_p, p.top_k = (int)c->top_k;
    p.repetition_penalty = (float)c->repetition_penalty, p.special = c->special, p.ignore_eos = c->ignore_eos, p.stop = c->stop, p.n_stop = c->n_stop;
    p.progress = cli_on_progress;
    p.seed = c->has_seed ? c->seed : sys_random() >> 11;
    if (c->prompt) buf_puts(&prompt, c->prompt);
    else cli_read_stdin(&prompt);
    if (!c->json && c->prompt) fwrite(prompt.ptr ? prompt.ptr : "", 1, prompt.len, stdout), fflush(stdout);
    lorch_reason reason = lorch_generate(l, NULL, prompt.ptr ? prompt.ptr : "", prompt.len, &p, cli_on_token, &out, &st, err);
    if (reason != LORCH_FAILED && c->json && tok_encode(l->e->m->tok, buf_str(&prompt), TOK_BOS | (c->special ? TOK_SPECIAL : 0), &ids))
        cli_print_generated(c, &ids, &out, &p, reason, &st);
    else if (!c->json) putchar('\n');
    free(ids.id), free(out.ids.id);
    buf_free(&out.text), buf_free(&prompt);
    lorch_free(l);
    return reason == LORCH_FAILED ? cli_fail(err) : 0;
}

static void cli_put_formats(buf *b, const gguf_file *g) { /* {"F32":9,"Q8_0":57}: tensors by format */
    buf_putc(b, '{');
    for (uint32_t type = 0; type < QUANT_TYPES; type++) {
        int n = 0;
        for (uint64_t i = 0; i < g->n_tensors; i++) n += g->tensor[i].type == type;
        if (n) json_kv_int(b, quant_formats[type].name, n);
    }
    buf_putc(b, '}');
}

static void cli_put_tokenizer(buf *b, const tok *t) {
    json_put_key(b, "tokenizer"), buf_putc(b, '{');
    json_kv_cstr(b, "kind", t->name), json_kv_int(b, "vocab_size", t->n), json_kv_int(b, "bos", t->bos), json_kv_int(b, "eos", t->eos);
    json_kv_bool(b, "add_bos", t->add_bos);
    if (t->pre) json_kv_str(b, "pre", str_make(t->pre->names, strcspn(t->pre->names, " ")));
    json_put_key(b, "end_of_generation");
    buf_putc(b, '[');
    for (int32_t i = 0, n = 0; i < t->n; i++)
        if (t->entry[i].ends) buf_printf(b, n++ ? ",%ld" : "%ld", (long)i);
    buf_puts(b, "]}");
}

static void cli_put_model(buf *b, const model *m, const kv_layout *kv, size_t scratch) {
    json_kv_cstr(b, "model", m->name), json_kv_cstr(b, "quant_kind", m->quant);
    json_kv_int(b, "context_length", m->n_ctx_train), json_kv_int(b, "n_layer", m->n_layer), json_kv_int(b, "n_embd", m->n_embd);
    json_kv_int(b, "n_head", m->n_head), json_kv_int(b, "n_head_kv", m->n_head_kv), json_kv_int(b, "head_dim", m->head_dim), json_kv_int(b, "n_ff", m->n_ff);
    json_kv_num(b, "rope_base", m->rope_base, 1), json_kv_num(b, "rope_factor", m->rope_factor, 3);
    json_kv_cstr(b, "rope_scaling", m->rope_kind), json_kv_int(b, "context_most", m->n_ctx_most);
    int windows = 0, window = 0;
    for (int l = 0; l < m->n_layer; l++) windows += m->layer[l].window > 0, window = m->layer[l].window > window ? m->layer[l].window : window;
    if (windows) json_kv_int(b, "window_layers", windows), json_kv_int(b, "window", window);
    if (m->n_expert) json_kv_int(b, "experts", m->n_expert), json_kv_int(b, "experts_used", m->n_used), json_kv_int(b, "n_ff_expert", m->n_ff_exp);
    if (m->n_conv_layers) json_kv_int(b, "convolution_layers", m->n_conv_layers);
    json_put_key(b, "memory"), buf_putc(b, '{');
    json_kv_u64(b, "weights", m->weight_bytes), json_kv_u64(b, "weights_per_token", m->token_bytes);
    json_kv_u64(b, "kv_per_token", kv->block_bytes / KV_BLOCK), json_kv_u64(b, "kv_whole_context", (uint64_t)kv_blocks_for(m->n_ctx_train) * kv->block_bytes);
    json_kv_u64(b, "scratch", scratch);
    buf_putc(b, '}');
}

static void cli_put_sampling(buf *b, const gguf_file *g) { /* the file's defaults, by the names of generate's options */
    buf_putc(b, '{');
    for (int i = 0; i < N_CLI_SAMPLING; i++) {
        const cli_option *o = cli_find(str_of(cli_sampling[i].option), CLI_GENERATE);
        double v = gguf_get_float(g, cli_sampling[i].key, NAN);
        if (v >= o->lo && v <= o->hi) json_put_key(b, cli_sampling[i].option), buf_printf(b, "%g", v);
    }
    buf_putc(b, '}');
}

/* Prints a JSON object a member a line, for people. */
static void cli_print_readable(str object) {
    int depth = 0, quoted = 0;
    for (size_t i = 1; i + 1 < object.len; i++) {
        char ch = object.ptr[i];
        if (ch == '"' && object.ptr[i - 1] != '\\') quoted = !quoted;
        if (!quoted) depth += (ch == '{' || ch == '[') - (ch == '}' || ch == ']');
        if (ch == ',' && !quoted && depth == 0) putchar('\n');
        else if (ch == '"' && depth == 0) continue;
        else if (ch == ':' && !quoted) fputs(depth ? ":" : ": ", stdout);
        else putchar(ch);
    }
    putchar('\n');
}

static int cli_inspect(cli_settings *c) {
    char err[LORCH_ERROR_BYTES];
    gguf_file *g = gguf_open(c->file, err, sizeof err);
    if (!g) return cli_fail(err);
    int vocab_only = g->n_tensors == 0;
    tok *t = vocab_only ? tok_load(g, c->pre, err, sizeof err) : NULL;
    model *m = vocab_only ? NULL : model_load(c->file, c->pre, err, sizeof err);
    int ok = t || m;
    if (ok) {
        buf b = {0};
        const char *reason;
        buf_putc(&b, '{');
        json_kv_str(&b, "architecture", gguf_get_str(g, "general.architecture"));
        if (m) {
            kv_layout kv = model_kv_layout(m, MAT_KV_F16);
            cli_put_model(&b, m, &kv, model_run_bytes(m, sys_default_threads(&reason), MODEL_CHUNK, 4));
        }
        json_kv_bool(&b, "vocabulary_only", vocab_only);
        json_kv_int(&b, "gguf_version", (int)g->version), json_kv_u64(&b, "file_bytes", g->size), json_kv_u64(&b, "tensors", g->n_tensors);
        json_put_key(&b, "sampling"), cli_put_sampling(&b, g);
        json_put_key(&b, "formats"), cli_put_formats(&b, g);
        cli_put_tokenizer(&b, m ? m->tok : t);
        json_kv_bool(&b, "chat_template", gguf_get_str(g, "tokenizer.chat_template").len > 0);
        buf_putc(&b, '}');
        if (c->json) cli_print(&b), putchar('\n');
        else cli_print_readable(buf_str(&b));
        buf_free(&b);
    }
    tok_free(t), model_free(m), gguf_close(g);
    return ok ? 0 : cli_fail(err);
}

static tok *cli_open_tokenizer(const cli_settings *c, gguf_file **g) {
    char err[LORCH_ERROR_BYTES];
    *g = gguf_open(c->file, err, sizeof err);
    tok *t = *g ? tok_load(*g, c->pre, err, sizeof err) : NULL;
    if (!t) gguf_close(*g), cli_fail(err);
    return t;
}

static int cli_tokenize(cli_settings *c) {
    gguf_file *g;
    tok *t = cli_open_tokenizer(c, &g);
    buf text = {0}, b = {0};
    tok_ids ids = {0};
    if (!t) return 1;
    int ok = cli_read_stdin(&text) && tok_encode(t, buf_str(&text), (c->no_bos ? 0 : TOK_BOS) | (c->special ? TOK_SPECIAL : 0), &ids);
    if (ok) cli_put_ids(&b, ids.id, ids.n), buf_putc(&b, '\n'), cli_print(&b);
    free(ids.id), buf_free(&text), buf_free(&b);
    tok_free(t), gguf_close(g);
    return ok ? 0 : cli_fail("standard input is not UTF-8, or memory ran out");
}

/* Reads ids separated by anything but digits and minus signs, within 0..n_vocab-1. */
static int cli_parse_ids(const char *p, int n_vocab, tok_ids *ids) {
    while (*p) {
        if (strchr("[], \t\r\n", *p)) {
            p++;
            continue;
        }
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 0 || v >= n_vocab) return 0;
        tok_ids_add(ids, (int32_t)v);
        p = end;
    }
    return !ids->failed;
}

static int cli_detokenize(cli_settings *c) {
    gguf_file *g;
    tok *t = cli_open_tokenizer(c, &g);
    buf text = {0}, b = {0};
    tok_ids ids = {0};
    if (!t) return 1;
    int ok = cli_read_stdin(&text) && cli_parse_ids(buf_cstr(&text), t->n, &ids);
    if (ok) tok_decode(t, ids.id, ids.n, c->special, &b), cli_print(&b);
    free(ids.id), buf_free(&text), buf_free(&b);
    tok_free(t), gguf_close(g);
    return ok ? 0 : cli_fail("standard input is not a list of token ids of this vocabulary");
}

/* ---- score and bench: the forward pass without the engine ---- */

typedef struct {
    model *m;
    pool threads;
    kv_pool kv;
    model_run run;
    int chunk;
} cli_run;

static void cli_run_close(cli_run *r) {
    if (r->threads.n_threads) pool_stop(&r->threads);
    model_run_close(&r->run);
    kv_pool_close(&r->kv);
    model_free(r->m);
}

/* n_ctx: positions that the KV pool must hold, at most `longest` of one text; max_logits: 0: as many as a chunk has tokens. */
static int cli_run_open(cli_run *r, const cli_settings *c, int n_ctx, int longest, int min_batch, int max_logits) {
    char err[LORCH_ERROR_BYTES];
    const char *reason;
    memset(r, 0, sizeof *r);
    const mat_kernels *k = mat_choose(err, sizeof err);
    r->m = k ? model_load(c->file, c->pre, err, sizeof err) : NULL;
    if (!r->m) return cli_fail(err), 0;
    int most = c->context && c->context < r->m->n_ctx_most ? (int)c->context : r->m->n_ctx_most;
    if (longest > most) {
        model_free(r->m);
        snprintf(err, sizeof err, "%d tokens are more than the context of %d", longest, most);
        return cli_fail(err), 0;
    }
    model_use_context(r->m, (int)c->context);
    r->chunk = c->chunk ? (int)c->chunk : MODEL_CHUNK;
    int batch = r->chunk > min_batch ? r->chunk : min_batch;
    pool_start(&r->threads, c->threads ? (int)c->threads : sys_default_threads(&reason));
    lorch_options o;
    cli_engine_options(c, &o);
    kv_layout layout = model_kv_layout(r->m, engine_kv_of(&o));
    if (kv_pool_open(&r->kv, layout, kv_blocks_for(n_ctx)) && model_run_open(&r->run, r->m, k, &r->threads, &r->kv, batch, max_logits ? max_logits : batch)) return 1;
    cli_run_close(r);
    return cli_fail("INSUFFICIENT_MEMORY: cannot allocate the KV cache and scratch"), 0;
}

/* Computes n tokens of one sequence from position `from` on, and the logits of the last n_logits of them. */
static void cli_forward(cli_run *r, const int32_t *id, int from, int n, const uint32_t *block, int n_logits) {
    int32_t pos[1024];
    const uint32_t *blocks[1024];
    unsigned char want[1024];
    for (int i = 0; i < n; i++) pos[i] = from + i, blocks[i] = block, want[i] = i >= n - n_logits;
    model_batch b = {n, id, pos, blocks, want, NULL, NULL};
    model_forward(&r->run, &b);
}

static void cli_hash(uint64_t *h, const float *logits, int n) { /* over the bits, with one NaN for all */
    for (int i = 0; i < n; i++) {
        uint32_t bits = num_bits(logits[i]);
        if ((bits & 0x7fffffff) > 0x7f800000u) bits = 0x7fc00000;
        *h = (*h ^ bits) * 0x100000001b3u;
    }
    *h ^= *h >> 32;
}

static double cli_log_sum(const float *logits, int n) { /* log of the sum of exp(logit) */
    double most = logits[sample_argmax(logits, n)], sum = 0;
    for (int i = 0; i < n; i++) sum += num_exp(logits[i] - most);
    return most + num_log(sum);
}

static void cli_print_position(int i, int32_t id, double logprob, const float *logits, int n_vocab, int top, double log_sum, unsigned char *used) {
    buf b = {0};
    buf_printf(&b, "{\"i\":%d,\"id\":%ld,\"logprob\":", i, (long)id);
    if (i) buf_printf(&b, "%.6f", logprob);
    else buf_puts(&b, "null");
    buf_puts(&b, ",\"top\":[");
    memset(used, 0, (size_t)n_vocab);
    for (int k = 0; k < top && k < n_vocab; k++) {
        int best = -1;
        for (int v = 0; v < n_vocab; v++)
            if (!used[v] && (best < 0 || logits[v] > logits[best])) best = v;
        used[best] = 1;
        buf_printf(&b, "%s[%d,%.6f]", k ? "," : "", best, logits[best] - log_sum);
    }
    buf_puts(&b, "]}\n");
    cli_print(&b);
    buf_free(&b);
}

static int cli_score_ids(cli_settings *c, cli_run *r, const tok_ids *ids) {
    uint64_t hash = 0xcbf29ce484222325u;
    double sum = 0, next = 0;
    int n_vocab = r->m->n_vocab, ok = 1;
    uint32_t *block = sys_zalloc((size_t)r->kv.n_blocks, sizeof *block);
    unsigned char *used = sys_zalloc((size_t)n_vocab, 1);
    kv_seq seq = {block, 0, 0};
    if (!block || !used || !kv_reserve(&r->kv, &seq, ids->n)) ok = 0;
    for (int from = 0; ok && from < ids->n; from += r->chunk) {
        int n = ids->n - from < r->chunk ? ids->n - from : r->chunk;
        cli_forward(r, ids->id + from, from, n, block, n);
        for (int i = from; i < from + n; i++) {
            const float *logits = r->run.logits + (size_t)(i - from) * (size_t)n_vocab;
            cli_hash(&hash, logits, n_vocab);
            ok &= sample_finite(logits, n_vocab);
            double log_sum = cli_log_sum(logits, n_vocab), logprob = next;
            if (i) sum += logprob;
            cli_print_position(i, ids->id[i], logprob, logits, n_vocab, (int)c->top, log_sum, used);
            if (i + 1 < ids->n) next = logits[ids->id[i + 1]] - log_sum;
        }
    }
    free(block), free(used);
    if (!ok) return cli_fail("the model's output is not finite, or memory ran out");
    buf b = {0};
    buf_puts(&b, "{\"perplexity\":");
    json_put_num(&b, ids->n > 1 ? num_exp(-sum / (ids->n - 1)) : (double)NAN, 6);
    buf_printf(&b, ",\"logits_hash\":\"%016llx\"}\n", (unsigned long long)hash);
    cli_print(&b);
    buf_free(&b);
    return 0;
}

static int cli_score(cli_settings *c) {
    gguf_file *g;
    tok *t = cli_open_tokenizer(c, &g);
    tok_ids ids = {0};
    buf text = {0};
    cli_run r;
    int ok, code = 1;
    if (!t) return 1;
    if (c->ids) ok = cli_parse_ids(c->ids, t->n, &ids) && ids.n > 0;
    else ok = cli_read_stdin(&text) && tok_encode(t, buf_str(&text), TOK_BOS | (c->special ? TOK_SPECIAL : 0), &ids) && ids.n > 0;
    tok_free(t), gguf_close(g);
    if (!ok) cli_fail(c->ids ? "--ids: not a list of token ids of this vocabulary" : "standard input is empty or not UTF-8");
    else if (cli_run_open(&r, c, ids.n, ids.n, 1, 0)) {
        code = cli_score_ids(c, &r, &ids);
        cli_run_close(&r);
    }
    free(ids.id), buf_free(&text);
    return code;
}

static int cli_by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double cli_median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, cli_by_value);
    return n ? (v[(n - 1) / 2] + v[n / 2]) / 2 : 0;
}

enum { BENCH_READ = 1 << 20, BENCH_PEAK_ROUNDS = 200000 };

static void cli_bench_read_item(void *ctx, int64_t item, int thread) {
    const cli_run *r = ctx;
    const unsigned char *from = r->m->file->map + r->m->file->data_start + (uint64_t)item * BENCH_READ;
    (void)thread;
    if (r->run.k->read(from, BENCH_READ) == 1) pool_pause(); /* the sum must be seen to be used */
}

typedef struct {
    const mat_kernels *k;
    double ops[MAX_THREADS];
} cli_peak;

static void cli_bench_peak_item(void *ctx, int64_t item, int thread) {
    cli_peak *p = ctx;
    (void)thread;
    p->ops[item] = p->k->peak(BENCH_PEAK_ROUNDS);
}

static double cli_bench_read(cli_run *r) { /* GB/s of plain reads over the weights, by all threads */
    int64_t n = (int64_t)((r->m->file->size - r->m->file->data_start) / BENCH_READ);
    double from = sys_now();
    if (n == 0) return 0;
    pool_run(&r->threads, cli_bench_read_item, r, n);
    return (double)n * BENCH_READ / (sys_now() - from) / 1e9;
}

static double cli_bench_peak(cli_run *r) { /* T op/s of the level's int8 products, all threads together */
    cli_peak p = {r->run.k, {0}};
    double sum = 0, from = sys_now();
    pool_run(&r->threads, cli_bench_peak_item, &p, r->threads.n_threads);
    double took = sys_now() - from;
    for (int i = 0; i < r->threads.n_threads; i++) sum += p.ops[i];
    return sum / took / 1e12;
}

typedef struct {
    double prefill[1000], decode[1000], read[1000], peak[1000], dispatch[1000]; /* by round */
    int n;
} cli_rounds;

/* Seconds for the prompt; only the last token's logits are computed, as in a job. */
static double cli_bench_prefill(cli_run *r, const int32_t *id, int n, const uint32_t *block) {
    double begun = sys_now();
    for (int from = 0; from < n; from += r->chunk) {
        int part = n - from < r->chunk ? n - from : r->chunk;
        cli_forward(r, id + from, from, part, block, from + part == n);
    }
    return sys_now() - begun;
}

/* Seconds for n steps of a batch of sequences at a depth: from an empty context on, the weights dominate. */
static double cli_bench_decode(cli_run *r, int batch, int depth, int n, uint32_t *const *blocks) {
    int32_t id[MAX_PARALLEL], pos[MAX_PARALLEL];
    const uint32_t *table[MAX_PARALLEL];
    unsigned char want[MAX_PARALLEL];
    double begun = sys_now();
    for (int step = 0; step < n; step++) {
        for (int i = 0; i < batch; i++) id[i] = (step * 31 + i * 7 + 5) % r->m->n_vocab, pos[i] = depth + step, table[i] = blocks[i], want[i] = 1;
        model_batch b = {batch, id, pos, table, want, NULL, NULL};
        model_forward(&r->run, &b);
    }
    return sys_now() - begun;
}

typedef struct {
    int met, threads; /* met: atomic */
} cli_meeting;

static void cli_bench_meet(void *ctx, int64_t item, int thread) { /* holds its thread until each has an item */
    cli_meeting *m = ctx;
    (void)item, (void)thread;
    __atomic_fetch_add(&m->met, 1, __ATOMIC_RELAXED);
    for (int spin = 0; __atomic_load_n(&m->met, __ATOMIC_RELAXED) < m->threads; spin++)
        if (spin < 1000) pool_pause();
        else sched_yield();
}

static double cli_bench_dispatch(cli_run *r) { /* microseconds in which all threads come to a piece of work, and are done */
    enum { TIMES = 5000 };
    double from = sys_now();
    for (int i = 0; i < TIMES; i++) {
        cli_meeting m = {0, r->threads.n_threads};
        pool_run(&r->threads, cli_bench_meet, &m, m.threads);
    }
    return (sys_now() - from) / TIMES * 1e6;
}

static double cli_weights_per_token(const model *m) { /* multiplied in the layers, the output head aside */
    double n = 0;
    for (int l = 0; l < m->n_layer; l++) {
        const model_layer *y = &m->layer[l];
        const model_matrix *x[] = {&y->q, &y->k, &y->v, &y->o, &y->conv_in, &y->q_a, &y->q_b, &y->kv_a, &y->kv_b, &y->k_heads, &y->v_heads,
                                   &y->gate, &y->up, &y->down, &y->route, &y->share}, *experts[] = {&y->gates, &y->ups, &y->downs};
        for (size_t i = 0; i < sizeof x / sizeof *x; i++) n += (double)x[i]->n * (double)x[i]->rows;
        for (int i = 0; i < 3 && y->has_experts; i++) n += (double)experts[i]->n * (double)experts[i]->rows * m->n_used / m->n_expert;
    }
    return n;
}

static void cli_bench_report(const cli_settings *c, const cli_run *r, cli_rounds *t) {
    const model *m = r->m;
    double p = (double)c->bench_prompt, prefill = cli_median(t->prefill, t->n), decode = cli_median(t->decode, t->n);
    double read = cli_median(t->read, t->n), peak = cli_median(t->peak, t->n), steps = decode / (double)c->bench_batch;
    double kv = ((double)c->bench_depth + (double)(c->n + 1) / 2) * (double)r->kv.layout.block_bytes / KV_BLOCK; /* of one sequence, on average */
    double bytes = (double)m->token_bytes + kv * (double)c->bench_batch;
    double ops = 2 * (cli_weights_per_token(m) + (p > 0 ? (double)m->output.n * (double)m->output.rows / p : 0));
    buf b = {0};
    buf_putc(&b, '{');
    json_kv_cstr(&b, "model", m->name), json_kv_cstr(&b, "quant_kind", m->quant);
    json_kv_cstr(&b, "simd", r->run.k->name), json_kv_int(&b, "threads", r->threads.n_threads);
    json_kv_int(&b, "prompt_tokens", c->bench_prompt), json_kv_int(&b, "decode_tokens", c->n);
    json_kv_int(&b, "batch", c->bench_batch), json_kv_int(&b, "chunk", r->chunk);
    json_kv_num(&b, "prefill_tok_s", prefill, 2), json_kv_num(&b, "decode_tok_s", decode, 2);
    json_kv_int(&b, "depth", c->bench_depth);
    json_kv_u64(&b, "weight_bytes_per_token", m->token_bytes), json_kv_u64(&b, "kv_bytes_per_token", (uint64_t)kv);
    json_kv_num(&b, "read_gb_s", read, 2), json_kv_num(&b, "int8_tops", peak, 3);
    json_kv_num(&b, "decode_bandwidth_share", read > 0 ? steps * bytes / (read * 1e9) : (double)NAN, 3);
    json_kv_num(&b, "prefill_peak_share", peak > 0 ? prefill * ops / (peak * 1e12) : (double)NAN, 3);
    json_kv_num(&b, "dispatch_us", cli_median(t->dispatch, t->n), 2);
    json_kv_u64(&b, "scratch_bytes", r->run.bytes);
    buf_putc(&b, '}');
    if (c->json) cli_print(&b), putchar('\n');
    else cli_print_readable(buf_str(&b));
    buf_free(&b);
}

static int cli_bench(cli_settings *c) {
    static cli_rounds t;
    cli_run r;
    uint32_t *block[MAX_PARALLEL] = {0}, *prompt_block;
    int batch = (int)c->bench_batch, n = (int)c->n, p = (int)c->bench_prompt, depth = (int)c->bench_depth, ok = 1;
    int each = n ? kv_blocks_for(depth + n) : 0, need = kv_blocks_for(p) + batch * each;
    if (!cli_run_open(&r, c, (need ? need : 1) * KV_BLOCK, p > depth + n ? p : depth + n, batch, batch)) return 1;
    uint32_t *table = sys_zalloc((size_t)need, sizeof *table);
    int32_t *id = sys_zalloc((size_t)p, sizeof *id);
    kv_seq all = {table, 0, 0};
    ok = table && id && kv_reserve(&r.kv, &all, (int64_t)need * KV_BLOCK);
    prompt_block = table;
    for (int i = 0; ok && i < batch; i++) block[i] = table + kv_blocks_for(p) + i * each;
    memset(r.kv.base, 0x2c, (size_t)(depth && need ? need : 0) * r.kv.layout.block_bytes); /* small numbers: pages never written are no memory to read */
    for (int i = 0; ok && i < p; i++) id[i] = (i * 37 + 11) % r.m->n_vocab;
    if (ok) cli_bench_read(&r), cli_bench_decode(&r, batch, depth, n < 2 ? n : 2, block); /* page tables and caches */
    for (t.n = 0; ok && t.n < (int)c->bench_rounds; t.n++) {
        t.peak[t.n] = cli_bench_peak(&r);
        t.prefill[t.n] = p ? p / cli_bench_prefill(&r, id, p, prompt_block) : 0;
        t.read[t.n] = cli_bench_read(&r);
        t.decode[t.n] = n ? (double)n * batch / cli_bench_decode(&r, batch, depth, n, block) : 0;
        t.dispatch[t.n] = cli_bench_dispatch(&r);
    }
    if (ok) cli_bench_report(c, &r, &t);
    free(table), free(id);
    cli_run_close(&r);
    return ok ? 0 : cli_fail("out of memory");
}

static int cli_selftest(cli_settings *c) {
    char err[256];
    int failed = 0;
    for (int level = 0; level < MAT_LEVELS; level++) {
        int runs = mat_level_runs(level), checked = 0, bad = 0;
        for (int type = 0; type < QUANT_TYPES && runs; type++) {
            if (quant_formats[type].kind == QUANT_NONE) continue;
            checked++;
            if (!mat_selftest(level, &quant_formats[type], err, sizeof err)) bad++, fprintf(stderr, "%s\n", err);
        }
        if (runs && !mat_selftest_vectors(level, err, sizeof err)) bad++, fprintf(stderr, "%s\n", err);
        if (c->json) printf("{\"simd\":\"%s\",\"runs\":%s,\"formats\":%d,\"failed\":%d}\n", mat_levels[level]->name, runs ? "true" : "false", checked, bad);
        else if (!runs) printf("%-12s this CPU cannot run it\n", mat_levels[level]->name);
        else printf("%-12s %d formats and the vector kernels: %s\n", mat_levels[level]->name, checked,
                    bad ? "DIFFERENT from the plain loop" : "equal to the plain loop, bit for bit");
        failed += bad;
    }
    return failed != 0;
}

int main(int argc, char **argv) {
    static const struct { const char *name; enum cli_command command; int (*run)(cli_settings *c); int needs_file; } commands[] = {
        {"generate", CLI_GENERATE, cli_generate, 1}, {"inspect", CLI_INSPECT, cli_inspect, 1}, {"tokenize", CLI_TOKENIZE, cli_tokenize, 1},
        {"detokenize", CLI_DETOKENIZE, cli_detokenize, 1}, {"score", CLI_SCORE, cli_score, 1}, {"bench", CLI_BENCH, cli_bench, 1},
        {"selftest", CLI_SELFTEST, cli_selftest, 0}};
    static cli_settings c;
    int (*run)(cli_settings *) = cli_serve;
    int first = 1, needs_file = 0;
    c.program = argc ? argv[0] : "lorch", c.command = CLI_SERVE;
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return cli_help(), 0;
    if (argc > 1 && strcmp(argv[1], "--version") == 0) return puts("lorch " LORCH_VERSION), 0;
    if (argc > 1 && argv[1][0] != '-') {
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
            if (strcmp(argv[1], commands[i].name) == 0) c.command = commands[i].command, run = commands[i].run, needs_file = commands[i].needs_file, first = 2;
        if (first == 1) cli_usage_error("unknown command '%.60s' (see %s --help)", argv[1], c.program);
    }
    cli_from_environment(&c);
    cli_from_arguments(&c, argc, argv, first);
    if (needs_file && !c.file) cli_usage_error("%s: which model file?", argv[1]);
    cli_merge(&c);
    if (c.command != CLI_SERVE) gguf_last_word = "lorch: the model file has shrunk, or cannot be read\n", gguf_watch();
    int code = run(&c);
    if (c.command != CLI_SERVE)
        for (int i = 0; i < N_CLI_OPTIONS; i++) free(cli_values[i].value);
    if (fflush(stdout) && code == 0) code = 1;
    return code;
}
#endif /* LORCH_NO_MAIN */
#endif /* LORCH_LEVEL */
