/* bench_engine.c: how a worker shares its time. MIT licence.
 *
 *   bench_engine MODEL.gguf [SECTION ...]     sections: jobs delays cancels prefix speculation predictions deadlines idle crowd
 *
 * It starts a worker of LORCH (./lorch) on the model and measures it from outside, by its streams. Environment: ROUNDS (3),
 * THREADS (the worker's default), TOKENS (64), LONG (7800: letters of the long prompts), JOBS (500), IDLE_S (60).
 * tests/bench_engine.sh runs it, and llama.cpp's batched decode beside it. */
#include "measure.h"

static const char *model;
static int number(const char *name, int otherwise) {
    const char *v = env_or(name, NULL);
    return v ? atoi(v) : otherwise;
}

static worker *open_worker(int parallel, int queue) {
    const char *threads = env_or("THREADS", NULL);
    worker *w = start("--model", model, "--parallel", text("%d", parallel), "--queue", text("%d", queue), "--max-tokens-out", "16000", "--log-level", "WARN",
                      threads ? "--threads" : "--lazy", threads ? threads : NULL);
    if (!worker_ready(w)) fprintf(stderr, "the worker did not become ready: %s\n", worker_tail(w)), exit(1);
    for (double end = now_ms() + 60000; json_type(health(w->port), "rates.decode_tokens_per_sec") != 'n' && now_ms() < end;) nap_ms(20);
    nap_ms(300);
    return w;
}

static void close_worker(worker *w) {
    worker_drop(w);
    conns_close();
    mem_drop();
}

/* ==== jobs: decode throughput of n jobs ======================================================= */

static double jobs_rate(int port, int n, int tokens) { /* while all of them decode */
    stream *s[64];
    int count = 0;
    double from = 0, to = 1e300;
    for (int i = 0; i < n; i++) s[i] = job(port, "'prompt':'%s','max_tokens':%d,'ignore_eos':true,'speculate':false,'seed':%d", random_letters(12), tokens, i);
    streams_finish(s, n, 600000);
    for (int i = 0; i < n; i++) {
        double a = token_at(s[i], 0), b = token_at(s[i], -1);
        from = a > from ? a : from, to = b < to ? b : to;
    }
    for (int i = 0; i < n; i++)
        for (size_t k = 0; k < s[i]->n; k++) count += !strcmp(s[i]->events[k].type, "token") && s[i]->events[k].at > from && s[i]->events[k].at <= to;
    for (int i = 0; i < n; i++) conn_close(s[i]->c);
    return count * 1e3 / (to - from);
}

static void bench_jobs(void) {
    static const int sizes[] = {1, 2, 4, 8, 16};
    sample rate[COUNT(sizes)] = {{0}};
    worker *w = open_worker(16, 32);
    for (int round = 0; round < number("ROUNDS", 3); round++)
        for (size_t i = 0; i < COUNT(sizes); i++) sample_add(&rate[i], jobs_rate(w->port, sizes[i], number("TOKENS", 64)));
    for (size_t i = 0; i < COUNT(sizes); i++)
        printf("jobs %2d: %7.1f t/s, %.2f x one\n", sizes[i], median(&rate[i]), median(&rate[i]) / median(&rate[0]));
    close_worker(w);
}

/* ==== delays: what a long prompt does to the tokens of others ================================= */

static stream *others[4];

static void begin_others(int port) {
    for (int i = 0; i < 4; i++) others[i] = job(port, "'prompt':'%s','max_tokens':15000,'ignore_eos':true,'speculate':false", random_letters(12));
    streams_wait(others, 4, 4, 60000);
}

static void end_others(int port) {
    for (int i = 0; i < 4; i++) cancel(port, others[i]->job_id);
    streams_finish(others, 4, 10000);
}

static void bench_delays(void) {
    worker *w = open_worker(5, 8);
    sample calm = {0}, busy = {0}, first = {0};
    int letters = number("LONG", 7800);
    begin_others(w->port);
    double from = now_ms(), until = from + 3000;
    while (now_ms() < until) streams_pump(others, 4, 100);
    for (int i = 0; i < 4; i++) token_gaps(others[i], from, until, &calm);
    stream *s[5] = {others[0], others[1], others[2], others[3], job(w->port, "'prompt':'%s','max_tokens':1", random_letters((unsigned)letters))};
    double begin = now_ms();
    while (!stream_over(s[4])) streams_pump(s, 5, 100);
    for (int i = 0; i < 4; i++) token_gaps(others[i], begin + 50, now_ms(), &busy);
    sample_add(&first, now_ms() - begin);
    end_others(w->port);
    double tokens = json_num(stream_started(s[4]), "prompt_tokens");
    stream *alone = job_run(w->port, "'prompt':'%s','max_tokens':1,'cache_key':'other'", random_letters((unsigned)letters));
    stream_finish(alone, 120000);
    printf("tokens of four jobs, ms between them: %s\n", percentiles(&calm));
    printf("the same during a prompt of %.0f tokens: %s; it adds %.1f in the median, %.1f at p99\n", tokens, percentiles(&busy), median(&busy) - median(&calm),
           percentile(&busy, 0.99) - percentile(&calm, 0.99));
    printf("first token of that prompt: after %.2f s, alone after %.2f s\n", median(&first) / 1e3, (token_at(alone, 0) - alone->sent_at) / 1e3);
    close_worker(w);
}

/* ==== cancels: amid long prompts, four other jobs running ===================================== */

static void bench_cancels(void) {
    worker *w = open_worker(5, 8);
    sample cancels = {0}, leaves = {0};
    begin_others(w->port);
    int n = number("CANCELS", 60);
    dice_state = 3;
    for (int i = 0; i < n; i++) {
        stream *s = job(w->port, "'prompt':'%s','max_tokens':10", random_letters((unsigned)number("LONG", 7800)));
        int wait = 200 + (int)dice(1500);
        for (double end = now_ms() + wait; now_ms() < end;) streams_pump(others, 4, (int)(end - now_ms()) + 1);
        if (i % 2 == 0) {
            double from = now_ms();
            cancel(w->port, s->job_id);
            while (!stream_over(s)) stream_pump(s, 100);
            sample_add(&cancels, now_ms() - from);
        } else {
            double before = json_num(health(w->port), "jobs.running"), from = now_ms();
            conn_close(s->c);
            while (json_num(health(w->port), "jobs.running") >= before && now_ms() < from + 5000) nap_ms(1);
            sample_add(&leaves, now_ms() - from);
        }
        conn_close(s->c);
    }
    end_others(w->port);
    printf("cancel, ms from the request to the last event: %s\n", percentiles(&cancels));
    printf("disconnect, ms from the close until the slot is free: %s\n", percentiles(&leaves));
    printf("worker_cancel_seconds: up to 10 ms %.0f, up to 50 ms %.0f, all %.0f\n", metric(w->port, "worker_cancel_seconds_bucket", "le=\"0.01\""),
           metric(w->port, "worker_cancel_seconds_bucket", "le=\"0.05\""), metric(w->port, "worker_cancel_seconds_count", ""));
    close_worker(w);
}

/* ==== prefix: ten jobs with one beginning ===================================================== */

/* Six jobs with one beginning that come at once, while two others decode. */
static void bench_together(void) {
    worker *w = open_worker(8, 8);
    stream *six[6], *two[2];
    char *beginning = random_letters(2040);
    for (int i = 0; i < 2; i++) two[i] = job(w->port, "'prompt':'%s','max_tokens':15000,'ignore_eos':true,'speculate':false", random_letters(12));
    streams_wait(two, 2, 4, 60000);
    double from = now_ms(), cached = 0;
    for (int i = 0; i < 6; i++) six[i] = job(w->port, "'prompt':'%s%s','max_tokens':2,'ignore_eos':true", beginning, random_letters(20));
    streams_finish(six, 6, 600000);
    double took = now_ms() - from;
    for (int i = 0; i < 6; i++) cached += json_num(stream_last(six[i]), "cached_tokens");
    printf("six with one beginning at once, two other jobs decoding: %.0f tokens cached, the last ends after %.1f ms\n", cached, took);
    close_worker(w);
}

static void bench_prefix(void) {
    worker *w = open_worker(4, 8);
    dice_state = 4;
    char *beginning = random_letters(2040);
    for (int i = 0; i < 10; i++) {
        stream *s = job_run(w->port, "'prompt':'%s%s','max_tokens':2,'ignore_eos':true", beginning, random_letters(20));
        stream_finish(s, 60000);
        if (i == 0 || i == 9)
            printf("job %d of a shared beginning: %.0f prompt tokens, %.0f cached, first token after %.1f ms\n", i + 1, json_num(stream_last(s), "prompt_tokens"),
                   json_num(stream_last(s), "cached_tokens"), token_at(s, 0) - s->sent_at);
    }
    stream *s = job_run(w->port, "'prompt':'%s','max_tokens':2,'ignore_eos':true", random_letters(60));
    printf("a prompt of %.0f tokens alone: first token after %.1f ms\n", json_num(stream_last(s), "prompt_tokens"), token_at(s, 0) - s->sent_at);
    close_worker(w);
    bench_together();
}

/* ==== speculation: on text that repeats, and on text that does not ============================ */

typedef struct { sample wall, cpu; double drafted, accepted; } decoding; /* milliseconds of a token */

static void decode_once(int port, const char *fields, bool speculate, decoding *d) {
    stream *s = job(port, "%s,'ignore_eos':true,'speculate':%s", fields, speculate ? "true" : "false");
    stream_finish(s, 600000);
    d->drafted = json_num(stream_last(s), "drafted_tokens"), d->accepted = json_num(stream_last(s), "accepted_tokens");
    sample_add(&d->wall, (token_at(s, -1) - token_at(s, 0)) / (json_num(stream_last(s), "tokens_out") - 1));
    sample_add(&d->cpu, json_num(stream_last(s), "cpu_ms") / json_num(stream_last(s), "tokens_out"));
    conn_close(s->c);
}

static void compare_speculation(int port, const char *name, const char *fields) {
    decoding with = {{0}, {0}, 0, 0}, without = with;
    for (int round = 0; round < number("ROUNDS", 3); round++) {
        decode_once(port, fields, false, &without);
        decode_once(port, fields, true, &with);
    }
    printf("%s: %.2f ms a token, %.2f without speculation: %.2f x; in CPU time %.2f x; %.0f drafted, %.0f accepted\n", name, median(&with.wall), median(&without.wall),
           median(&without.wall) / median(&with.wall), median(&without.cpu) / median(&with.cpu), with.drafted, with.accepted);
}

static void bench_speculation(void) {
    worker *w = open_worker(1, 4);
    int n = number("TOKENS", 64) * 4;
    dice_state = 5;
    compare_speculation(w->port, "greedy, which soon repeats itself", q("'prompt':'%s','temperature':0,'max_tokens':%d", random_letters(12), n));
    compare_speculation(w->port, "sampled among two, repeats by chance", q("'prompt':'%s','temperature':2,'top_k':2,'seed':1,'max_tokens':%d", random_letters(12), n));
    compare_speculation(w->port, "sampled among five", q("'prompt':'%s','temperature':1.5,'top_k':5,'seed':2,'max_tokens':%d", random_letters(12), n));
    compare_speculation(w->port, "sampled at 1.0, does not repeat", q("'prompt':'%s','temperature':1,'seed':3,'max_tokens':%d", random_letters(12), n));
    close_worker(w);
}

/* ==== predictions, deadlines, idle, crowd ===================================================== */

static void print_prediction(const char *what, const sample *error, const sample *bias, const sample *paced) {
    printf("%d jobs %s: completion is %.1f%% off what was foreseen in the median, %.1f%% at p95; it took %.2f of that. Where the machine's pace then is known: "
           "%.1f%%, %.1f%%\n", (int)error->n, what, 100 * median(error), 100 * percentile(error, 0.95), median(bias), 100 * median(paced), 100 * percentile(paced, 0.95));
}

static void bench_predictions(void) {
    sample error = {0}, bias = {0}, paced = {0};
    for (int clients = 1; clients <= 12; clients = clients == 1 ? 4 : clients * 3) {
        worker *w = open_worker(4, 32);
        dice_state = 6;
        prediction p = predict(w->port, number("JOBS", 500) / 3 + 1, clients, 600, (unsigned)number("TOKENS", 64));
        print_prediction(text("from %d clients", clients), &p.error, &p.bias, &p.paced);
        for (size_t i = 0; i < p.error.n; i++) sample_add(&error, p.error.v[i]), sample_add(&bias, p.bias.v[i]), sample_add(&paced, p.paced.v[i]);
        worker_drop(w);
        conns_close();
    }
    print_prediction("in all", &error, &bias, &paced);
    mem_drop(); /* the samples lived there */
}

static void bench_deadlines(void) {
    worker *w = open_worker(4, 32);
    dice_state = 7;
    punctuality p = deadlines(w->port, number("JOBS", 500) / 5, 6, 300, (unsigned)number("TOKENS", 64));
    printf("deadlines: %d jobs refused, %d in time, %d ended by their deadline", p.refused, p.in_time, p.late);
    if (p.late) printf(", ms beyond it: %s", percentiles(&p.over_ms));
    printf("\n");
    close_worker(w);
}

static void bench_idle(void) {
    worker *w = open_worker(4, 32);
    int seconds = number("IDLE_S", 60);
    while (json_type(health(w->port), "fingerprint") != 's') nap_ms(100);
    double ms = idle_cpu_ms(w->port, seconds * 1000);
    printf("idle: %.1f ms of CPU time in %d s, %.4f%% of a core\n", ms, seconds, ms / seconds / 10);
    close_worker(w);
}

static void bench_crowd(void) {
    worker *w = open_worker(1, 64);
    sample calm = {0}, crowded = {0};
    for (int round = 0; round < number("ROUNDS", 3) * 2 + 1; round++) {
        sample_add(&calm, gap_among(w->port, number("TOKENS", 64), 0, 0));
        sample_add(&crowded, gap_among(w->port, number("TOKENS", 64), 64, 500));
    }
    printf("ms between tokens: %.3f alone, %.3f with 64 jobs in the queue and 500 open connections: %+.1f%%\n", median(&calm), median(&crowded),
           100 * (median(&crowded) / median(&calm) - 1));
    close_worker(w);
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } sections[] = {
        {"jobs", bench_jobs}, {"delays", bench_delays}, {"cancels", bench_cancels}, {"prefix", bench_prefix}, {"speculation", bench_speculation},
        {"predictions", bench_predictions}, {"deadlines", bench_deadlines}, {"idle", bench_idle}, {"crowd", bench_crowd}};
    if (argc < 2) return fprintf(stderr, "usage: bench_engine MODEL.gguf [SECTION ...]\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    atexit(pids_kill);
    model = argv[1];
    for (size_t i = 0; i < COUNT(sections); i++)
        if (tests_selected(sections[i].name, argc - 1, argv + 1)) sections[i].run(), fflush(stdout);
    return 0;
}
