/* measure.h: what load.c and bench_engine.c measure of a worker by its streams. MIT licence.
 *
 * The same functions serve both: the tests hold short forms to generous bounds, the benchmark prints long ones. */
#ifndef LORCH_MEASURE_H
#define LORCH_MEASURE_H
#include "harness.h"

/* ==== Numbers ================================================================================= */

typedef struct { double *v; size_t n, cap; } sample;

static inline void sample_add(sample *s, double x) {
    if (s->n == s->cap) {
        double *old = s->v;
        s->cap = s->cap ? s->cap * 2 : 256;
        s->v = mem(s->cap * sizeof *s->v);
        if (s->n) memcpy(s->v, old, s->n * sizeof *old);
    }
    s->v[s->n++] = x;
}

static inline int sample_order(const void *a, const void *b) {
    double d = *(const double *)a - *(const double *)b;
    return (d > 0) - (d < 0);
}

/* The smallest value that at least the share p of all do not exceed; NaN of none. */
static inline double percentile(const sample *s, double p) {
    if (!s->n) return (double)NAN;
    double *v = mem(s->n * sizeof *v);
    memcpy(v, s->v, s->n * sizeof *v);
    qsort(v, s->n, sizeof *v, sample_order);
    size_t i = (size_t)ceil(p * (double)s->n);
    return v[i ? i - 1 : 0];
}
static inline double median(const sample *s) { return percentile(s, 0.5); }

static inline char *percentiles(const sample *s) {
    return text("median %.1f, p90 %.1f, p99 %.1f, most %.1f (of %zu)", median(s), percentile(s, 0.9), percentile(s, 0.99), percentile(s, 1), s->n);
}

/* ==== Chance ==================================================================================
 * SplitMix64; each measurement has its own seed, so that it can be repeated. */

static unsigned long long dice_state;
static inline unsigned dice(unsigned sides) {
    unsigned long long z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (unsigned)((z ^ z >> 31) % sides);
}

static inline char *random_letters(unsigned n) {
    char *s = mem(n + 1);
    for (unsigned i = 0; i < n; i++) s[i] = dice(6) ? (char)('a' + dice(26)) : ' ';
    if (n) s[0] = 'a';
    return s;
}

/* ==== Streams together ======================================================================== */

/* Waits up to `ms` for news from any of n streams (NULL ones and ended ones aside) and takes it in. */
static inline void streams_pump(stream **s, int n, int ms) {
    struct pollfd *p = mem((size_t)n * sizeof *p);
    for (int i = 0; i < n; i++) p[i].fd = s[i] && !stream_over(s[i]) ? s[i]->c->fd : -1, p[i].events = POLLIN;
    if (poll(p, (nfds_t)n, ms) <= 0) return;
    for (int i = 0; i < n; i++)
        if (p[i].revents) stream_pump(s[i], 0);
}

static inline bool streams_finish(stream **s, int n, int ms) {
    double end = now_ms() + ms;
    for (;;) {
        int left = 0;
        for (int i = 0; i < n; i++) left += s[i] && !stream_over(s[i]);
        if (!left || now_ms() > end) return !left;
        streams_pump(s, n, 100);
    }
}

/* Pumps until each of n streams has `tokens` tokens or is over. */
static inline bool streams_wait(stream **s, int n, int tokens, int ms) {
    double end = now_ms() + ms;
    for (;;) {
        int left = 0;
        for (int i = 0; i < n; i++) left += !stream_over(s[i]) && stream_tokens(s[i]) < tokens;
        if (!left || now_ms() > end) return !left;
        streams_pump(s, n, 100);
    }
}

static inline double token_at(const stream *s, int n) { /* when token n came; from the end if negative */
    int total = stream_tokens(s);
    if (n < 0) n += total;
    for (size_t i = 0; i < s->n; i++)
        if (!strcmp(s->events[i].type, "token") && n-- == 0) return s->events[i].at;
    return (double)NAN;
}

/* The times between the tokens of a stream that came within [from, to]. */
static inline void token_gaps(const stream *s, double from, double to, sample *out) {
    double last = (double)NAN;
    for (size_t i = 0; i < s->n; i++) {
        if (strcmp(s->events[i].type, "token")) continue;
        double at = s->events[i].at;
        if (last >= from && at <= to) sample_add(out, at - last);
        last = at;
    }
}

/* ==== Predictions =============================================================================
 * How well `estimated_ms` of `started` foresees when a job ends, over n jobs of mixed sizes from `clients`
 * clients, each of which sends its next job when the last one has ended. */

typedef struct {
    sample error;     /* |actual / foreseen - 1| */
    sample bias;      /* actual / foreseen, in the order of their ends */
    sample paced;     /* the error relative to the median bias of the 10 jobs before and after: the machine's pace then */
    int n, failed;
} prediction;

static inline prediction predict(int port, int n, int clients, unsigned prompt_most, unsigned tokens_most) {
    prediction p = {{0}, {0}, {0}, 0, 0};
    stream **s = mem((size_t)clients * sizeof *s);
    for (int sent = 0, ended = 0; ended < n;) {
        for (int i = 0; i < clients; i++) {
            if (s[i] && !stream_over(s[i])) continue;
            if (s[i]) {
                double estimate = json_num(stream_started(s[i]), "estimated_ms"), took = s[i]->r->done_at - s[i]->events[0].at;
                ended++;
                if (strcmp(json_str(stream_last(s[i]), "type"), "end")) p.failed++;
                else if (estimate > 0) p.n++, sample_add(&p.error, fabs(took / estimate - 1)), sample_add(&p.bias, took / estimate);
                conn_close(s[i]->c);
                s[i] = NULL;
            }
            if (sent == n) continue;
            sent++;
            s[i] = job(port, "'prompt':'%s','max_tokens':%u,'ignore_eos':true,'temperature':%s", random_letters(1 + dice(dice(4) ? prompt_most / 8 : prompt_most)),
                       1 + dice(dice(3) ? tokens_most / 4 : tokens_most), dice(2) ? "0" : "1");
        }
        streams_pump(s, clients, 1000);
    }
    for (size_t i = 0; i < p.bias.n; i++) {
        size_t from = i < 10 ? 0 : i - 10, to = i + 11 < p.bias.n ? i + 11 : p.bias.n;
        sample near = {p.bias.v + from, to - from, to - from};
        sample_add(&p.paced, fabs(p.bias.v[i] / median(&near) - 1));
    }
    return p;
}

/* Jobs with deadlines between half of what they would take alone and ten times that: how far beyond its deadline an
 * accepted job's last event comes. */
typedef struct {
    int refused, late, in_time;
    sample over_ms; /* of those that ended by their deadline: from the deadline to the event */
} punctuality;

static inline punctuality deadlines(int port, int n, int clients, unsigned prompt_most, unsigned tokens_most) {
    punctuality p = {0, 0, 0, {0}};
    stream **s = mem((size_t)clients * sizeof *s);
    double *limit = mem((size_t)clients * sizeof *limit), each = 0;
    stream *first = job_run(port, "'max_tokens':%u,'ignore_eos':true", tokens_most / 2);
    each = (first->r->done_at - first->sent_at) / (tokens_most / 2);
    for (int sent = 0, ended = 0; ended < n;) {
        for (int i = 0; i < clients; i++) {
            if (s[i] && !stream_over(s[i])) continue;
            if (s[i]) {
                ended++;
                if (s[i]->r->status != 200) p.refused++;
                else if (!strcmp(stream_code(s[i]), "INFERENCE_TIMEOUT")) p.late++, sample_add(&p.over_ms, s[i]->events[s[i]->n - 1].at - limit[i]);
                else p.in_time++;
                conn_close(s[i]->c);
                s[i] = NULL;
            }
            if (sent == n) continue;
            sent++;
            unsigned tokens = 1 + dice(tokens_most);
            double ms = 1 + each * tokens * (0.5 + dice(1000) * 0.01);
            s[i] = job(port, "'prompt':'%s','max_tokens':%u,'ignore_eos':true,'deadline_ms':%.0f", random_letters(1 + dice(prompt_most)), tokens, ms);
            limit[i] = s[i]->sent_at + ms;
        }
        streams_pump(s, clients, 1000);
    }
    return p;
}

/* ==== Idleness ================================================================================ */

/* CPU milliseconds of the worker over `ms` of doing nothing. */
static inline double idle_cpu_ms(int port, int ms) {
    double before = metric(port, "worker_cpu_seconds_total", "");
    nap_ms(ms);
    return (metric(port, "worker_cpu_seconds_total", "") - before) * 1000;
}

/* The median time between tokens of a job that runs alone, while `queued` others wait and `idle` connections are open. */
static inline double gap_among(int port, int tokens, int queued, int idle) {
    sample gaps = {0};
    stream *s = job(port, "'max_tokens':%d,'ignore_eos':true,'speculate':false,'prompt':'%s'", tokens, random_letters(12));
    stream **waiting = mem((size_t)(queued + 1) * sizeof *waiting);
    int *fd = mem((size_t)(idle + 1) * sizeof *fd);
    stream_wait(s, 2, bound_ms(10000));
    for (int i = 0; i < idle; i++) fd[i] = tcp_connect(port);
    for (int i = 0; i < queued; i++) waiting[i] = job(port, "'max_tokens':%d,'ignore_eos':true", tokens);
    nap_ms(20);
    stream_pump(s, 0);
    double from = now_ms();
    stream_finish(s, bound_ms(60000));
    token_gaps(s, from, now_ms(), &gaps);
    for (int i = 0; i < queued; i++) cancel(port, waiting[i]->job_id);
    streams_finish(waiting, queued, bound_ms(10000));
    for (int i = 0; i < idle; i++)
        if (fd[i] >= 0) close(fd[i]);
    conn_close(s->c);
    for (int i = 0; i < queued; i++) conn_close(waiting[i]->c);
    return median(&gaps);
}

#endif
