/* SPDX-License-Identifier: MIT
 *
 * faults.h: a lorch whose calls to the system can be made to fail.
 *
 *   cc -DLORCH_FAULTS='"tests/faults.h"' lorch.c -o lorch-faults -lpthread -lm
 *   LORCH_FAULT=KIND:N[:ERRNO[:+]] ./lorch-faults ...
 *
 * The N-th call of the kind fails with ERRNO (each kind has a default), with + all later ones as well. At the end
 * the numbers of calls go to stderr: `faults: alloc 812 map 5 ...`. The files of cgroups are read below $LORCH_FAULT_ROOT, if
 * it is set: /proc/self/cgroup and what is in /sys/fs/cgroup. lorch.c includes this after the system's headers,
 * so the names below stand for the functions here from then on. Counters are atomic: calls come from all threads. */
#ifndef LORCH_FAULTS_H
#define LORCH_FAULTS_H

#ifdef FAULTS_SCALAR /* of x86 and arm64 nothing but the scalar level: tests/coverage.sh looks at the parsers, and saves the time */
#undef __x86_64__
#undef __aarch64__
#endif

enum fault_kind { FAULT_ALLOC, FAULT_MAP, FAULT_READ, FAULT_WRITE, FAULT_ACCEPT, FAULT_THREAD, FAULT_CLOCK,
                  FAULT_OPEN, FAULT_SOCKET, FAULT_POLL, FAULT_RANDOM, FAULT_KINDS };

static struct {
    long count[FAULT_KINDS];
    long at;             /* 0: none */
    int kind, error, more, ready;
    size_t most, sum;    /* of allocations: the largest, and all together */
} faults;

static const struct { const char *name; int error; } fault_kinds[FAULT_KINDS] = {
    {"alloc", ENOMEM}, {"map", ENOMEM}, {"read", EIO}, {"write", EIO}, {"accept", EMFILE}, {"thread", EAGAIN}, {"clock", EINVAL}, {"open", EMFILE},
    {"socket", ENOBUFS}, {"poll", EINTR}, {"random", EIO}};

__attribute__((constructor)) static void fault_init(void) {
    const char *s = getenv("LORCH_FAULT");
    size_t n = s ? strcspn(s, ":") : 0;
    for (int k = 0; s && k < FAULT_KINDS; k++)
        if (strlen(fault_kinds[k].name) == n && memcmp(s, fault_kinds[k].name, n) == 0) {
            char *end;
            faults.kind = k, faults.error = fault_kinds[k].error;
            faults.at = strtol(s + n + 1, &end, 10);
            if (*end == ':' && end[1] != '+' && end[1] != ':') faults.error = (int)strtol(end + 1, &end, 10);
            faults.more = strchr(end, '+') != NULL;
        }
}

__attribute__((destructor)) static void fault_report(void) {
    char text[512];
    int n = snprintf(text, sizeof text, "faults:");
    for (int k = 0; k < FAULT_KINDS; k++) n += snprintf(text + n, sizeof text - (size_t)n, " %s %ld", fault_kinds[k].name, faults.count[k]);
    n += snprintf(text + n, sizeof text - (size_t)n, "\n");
    if (getenv("LORCH_FAULT_COUNTS") && write(STDERR_FILENO, text, (size_t)n) < 0) return;
}

static int fault(enum fault_kind kind) {
    long n = __atomic_add_fetch(&faults.count[kind], 1, __ATOMIC_RELAXED);
    long at = __atomic_load_n(&faults.at, __ATOMIC_RELAXED);
    if (!at || (int)kind != faults.kind || n < at || (n > at && !faults.more)) return 0;
    errno = faults.error;
    return 1;
}

static int fault_alloc_of(size_t n, size_t size) {
    size_t bytes = size && n > SIZE_MAX / size ? SIZE_MAX : n * size, most = __atomic_load_n(&faults.most, __ATOMIC_RELAXED);
    while (bytes > most && !__atomic_compare_exchange_n(&faults.most, &most, bytes, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
    __atomic_add_fetch(&faults.sum, bytes, __ATOMIC_RELAXED);
    return fault(FAULT_ALLOC);
}

static inline void *fault_malloc(size_t n) { return fault_alloc_of(n, 1) ? NULL : malloc(n); }
static inline void *fault_calloc(size_t n, size_t size) { return fault_alloc_of(n, size) ? NULL : calloc(n, size); }
static inline void *fault_realloc(void *p, size_t n) { return fault_alloc_of(n, 1) ? NULL : realloc(p, n); }
static inline void *fault_mmap(void *p, size_t n, int prot, int flags, int fd, off_t at) { return fault(FAULT_MAP) ? MAP_FAILED : mmap(p, n, prot, flags, fd, at); }
static inline ssize_t fault_read(int fd, void *p, size_t n) { return fault(FAULT_READ) ? -1 : read(fd, p, n); }
static inline ssize_t fault_pread(int fd, void *p, size_t n, off_t at) { return fault(FAULT_READ) ? -1 : pread(fd, p, n, at); }
static inline ssize_t fault_recv(int fd, void *p, size_t n, int flags) { return fault(FAULT_READ) ? -1 : recv(fd, p, n, flags); }
static inline ssize_t fault_write(int fd, const void *p, size_t n) { return fault(FAULT_WRITE) ? -1 : write(fd, p, n); }
static inline ssize_t fault_send(int fd, const void *p, size_t n, int flags) { return fault(FAULT_WRITE) ? -1 : send(fd, p, n, flags); }
static inline int fault_accept4(int fd, struct sockaddr *a, socklen_t *n, int flags) { return fault(FAULT_ACCEPT) ? -1 : accept4(fd, a, n, flags); }
static inline int fault_pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*fn)(void *), void *arg) {
    return fault(FAULT_THREAD) ? faults.error : pthread_create(id, attr, fn, arg);
}
static inline int fault_clock_gettime(clockid_t clock, struct timespec *t) { return fault(FAULT_CLOCK) ? -1 : clock_gettime(clock, t); }
static inline int fault_open(const char *path, int flags) {
    const char *root = getenv("LORCH_FAULT_ROOT");
    char below[5000];
    if (fault(FAULT_OPEN)) return -1;
    if (!root || (strncmp(path, "/proc/self/cgroup", 17) && strncmp(path, "/sys/fs/cgroup/", 15))) return open(path, flags);
    snprintf(below, sizeof below, "%s%s", root, path);
    return open(below, flags);
}
static inline int fault_fstat(int fd, struct stat *st) { return fault(FAULT_OPEN) ? -1 : fstat(fd, st); }
static inline int fault_pipe2(int fd[2], int flags) { return fault(FAULT_OPEN) ? -1 : pipe2(fd, flags); }
static inline int fault_socket(int domain, int type, int protocol) { return fault(FAULT_SOCKET) ? -1 : socket(domain, type, protocol); }
static inline int fault_bind(int fd, const struct sockaddr *a, socklen_t n) { return fault(FAULT_SOCKET) ? -1 : bind(fd, a, n); }
static inline int fault_listen(int fd, int n) { return fault(FAULT_SOCKET) ? -1 : listen(fd, n); }
static inline int fault_connect(int fd, const struct sockaddr *a, socklen_t n) { return fault(FAULT_SOCKET) ? -1 : connect(fd, a, n); }
static inline int fault_getsockname(int fd, struct sockaddr *a, socklen_t *n) { return fault(FAULT_SOCKET) ? -1 : getsockname(fd, a, n); }
static inline int fault_getsockopt(int fd, int l, int o, void *p, socklen_t *n) { return fault(FAULT_SOCKET) ? -1 : getsockopt(fd, l, o, p, n); }
static inline int fault_setsockopt(int fd, int l, int o, const void *p, socklen_t n) { return fault(FAULT_SOCKET) ? -1 : setsockopt(fd, l, o, p, n); }
static inline int fault_poll(struct pollfd *p, nfds_t n, int ms) { return fault(FAULT_POLL) ? -1 : poll(p, n, ms); }
static inline int fault_getentropy(void *p, size_t n) {
#ifdef FUZZING /* what comes out must depend on what went in alone */
    return memset(p, 7, n), 0;
#else
    return fault(FAULT_RANDOM) ? -1 : getentropy(p, n);
#endif
}
#ifdef FUZZING
static inline time_t fault_time(time_t *t) { return (void)t, 1700000000; }
#define time fault_time
#endif

#define malloc fault_malloc
#define calloc fault_calloc
#define realloc fault_realloc
#define mmap fault_mmap
#define read fault_read
#define pread fault_pread
#define recv fault_recv
#define write fault_write
#define send fault_send
#define accept4 fault_accept4
#define pthread_create fault_pthread_create
#define clock_gettime fault_clock_gettime
#define open fault_open
#define fstat fault_fstat
#define pipe2 fault_pipe2
#define socket fault_socket
#define bind fault_bind
#define listen fault_listen
#define connect fault_connect
#define getsockname fault_getsockname
#define getsockopt fault_getsockopt
#define setsockopt fault_setsockopt
#define poll fault_poll
#define getentropy fault_getentropy

#endif
