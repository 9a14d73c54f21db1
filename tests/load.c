/* load.c: many jobs at once, and workers that die. MIT licence.
 *
 * Whatever happens around it, a job's stream must be the one that it would have alone. The tests replay mixes
 * of short and long jobs, shared beginnings, cancellations, clients that leave and deadlines against one worker,
 * and compare every stream event for event with that of a second worker which runs one job at a time on one
 * thread without speculation. Then workers are killed in mid-stream and their jobs continued elsewhere. Last come
 * short forms of what tests/bench_engine.c measures, held to generous bounds; lines with # print the figures. */
#include "measure.h"

enum { MOST = 48 };

static worker *crowd_worker, *calm_worker;

static bool instrumented(void) { return bound_ms(1) > 1; } /* such workers take their time: less is asked of them */
static int rounds(void) { return instrumented() ? 1 : 3; }

static int crowd(void) {
    if (!crowd_worker)
        crowd_worker = ready_worker("--model", tiny_model(), "--parallel", "8", "--queue", "64",
                                    "--chunk", "48");
    return crowd_worker->port;
}

static int calm(void) {
    if (!calm_worker)
        calm_worker = ready_worker("--model", tiny_model(), "--parallel", "1",
                                   "--threads", "1", "--no-speculate", "--chunk", "7");
    return calm_worker->port;
}

/* The fields of a job but its id: prompts of all lengths, a third of them with a common beginning. */
static char *random_fields(void) {
    static const char *const words[] = {"a fox ", "the river ", "Omar ", "wanted ", "a kite ",
                                        "and said ", "more than anything. ", "One morning "};
    buf prompt = {0};
    if (dice(3) == 0)
        for (int i = 0; i < 100; i++) buf_str(&prompt, words[i * 7 % 8]);
    else buf_str(&prompt, "Once upon a time there was ");
    for (unsigned n = dice(4) ? dice(12) : 40 + dice(40); n > 0; n--)
        buf_str(&prompt, words[dice(8)]);
    static const char *const kinds[] = {
        "'temperature':0", "'temperature':1", "'temperature':0.7,'top_p':0.9",
        "'temperature':1.2,'top_k':40,'repetition_penalty':1.2", "'temperature':2,'min_p':0.05"};
    return q("'prompt':'%s','seed':%u,'max_tokens':%u,%s,'ignore_eos':%s", prompt.p, dice(1000000),
             1 + dice(90), q(kinds[dice(5)]), dice(3) ? "true" : "false");
}

/* All that a stream says, but for ids, times and what sharing saved. */
static char *essence(const stream *s) {
    buf b = {0};
    buf_room(&b, 1);
    for (size_t i = 0; i < s->n; i++) {
        const event *e = &s->events[i];
        if (!strcmp(e->type, "token")) buf_print(&b, "%s\n", e->data);
        if (!strcmp(e->type, "end"))
            buf_print(&b, "end %s %g %g\n", json_str(e->data, "stop_reason"),
                      json_num(e->data, "tokens_out"), json_num(e->data, "prompt_tokens"));
        if (!strcmp(e->type, "error")) buf_print(&b, "error %s\n", json_str(e->data, "code"));
    }
    return b.p;
}

static char *alone(const char *fields) {
    stream *s = execute(calm(), "/execute", "", job_body(fields));
    CHECK(stream_finish(s, bound_ms(20000)), "the job alone does not end");
    CHECK(strstr(essence(s), "end "), "the job alone fails: %s", s->r->body.p);
    conn_close(s->c);
    return essence(s);
}

static void pump_all(stream **s, int n, int ms) {
    for (int i = 0; i < n; i++)
        if (s[i]) stream_pump(s[i], ms);
}

/* Nothing is lost, doubled or out of place: started, tokens from 0 on with metrics between them, one last event. */
static void check_events(const stream *s, const char *what) {
    int next = 0, started = 0, last = 0;
    for (size_t i = 0; i < s->n; i++) {
        const char *type = s->events[i].type;
        CHECK(!last, "%s: %s after the end", what, type);
        if (!strcmp(type, "started")) started++;
        else CHECK(started == 1, "%s: %s before started", what, type);
        if (!strcmp(type, "token")) CHECK_NUM(json_num(s->events[i].data, "i"), next++, what);
        last = !strcmp(type, "end") || !strcmp(type, "error");
        if (!strcmp(type, "end")) CHECK_NUM(json_num(s->events[i].data, "tokens_out"), next, what);
    }
    CHECK(started == 1 && last, "%s: %d times started, last event %s", what, started, stream_last(s));
}

static void note_times(const stream *s, sample *first, sample *gaps) {
    if (stream_tokens(s)) sample_add(first, token_at(s, 0) - s->sent_at);
    token_gaps(s, 0, 1e300, gaps);
}

static void test_mix(void) {
    sample first = {0}, gaps = {0};
    for (int round = 0; round < rounds(); round++) {
        stream *s[MOST];
        char *fields[MOST];
        dice_state = (unsigned)round + 1;
        for (int i = 0; i < MOST; i++) {
            fields[i] = random_fields();
            s[i] = execute(crowd(), "/execute", "", job_body(fields[i]));
            if (dice(4) == 0) nap_ms((int)dice(6));
            pump_all(s, i + 1, 0);
        }
        streams_finish(s, MOST, bound_ms(20000));
        for (int i = 0; i < MOST; i++) {
            CHECK(stream_finish(s[i], bound_ms(20000)), "job %d of round %d does not end", i, round);
            check_events(s[i], text("job %d of round %d", i, round));
            note_times(s[i], &first, &gaps);
            CHECK_TEXT(essence(s[i]), alone(fields[i]), text("job %d of round %d", i, round));
            conn_close(s[i]->c);
        }
    }
    printf("# ms until the first token: %s\n# ms between tokens: %s\n", percentiles(&first), percentiles(&gaps));
    CHECK(metric(crowd(), "worker_cached_tokens_total", "") > 0, "no prefix was shared");
    CHECK(metric(crowd(), "worker_accepted_tokens_total", "") > 0, "no draft was right");
}

/* Some jobs are cancelled, some lose their client, some cannot meet their deadline; the others must not notice. */
static void test_mix_with_trouble(void) {
    for (int round = 0; round < rounds(); round++) {
        stream *s[MOST];
        char *fields[MOST];
        int fate[MOST];
        dice_state = (unsigned)round + 100;
        for (int i = 0; i < MOST; i++) {
            fields[i] = random_fields();
            fate[i] = (int)dice(8); /* 0: cancelled, 1: left, 2: deadline, else undisturbed */
            char *body = job_body(fate[i] == 2 ? text("%s,\"deadline_ms\":%u", fields[i], 1 + dice(40))
                                               : fields[i]);
            s[i] = execute(crowd(), "/execute", "", body);
            if (dice(3) == 0) nap_ms((int)dice(8));
            if (i >= 3 && fate[i - 3] == 0) cancel(crowd(), s[i - 3]->job_id);
            if (i >= 3 && fate[i - 3] == 1) {
                conn_close(s[i - 3]->c);
                s[i - 3] = NULL;
            }
            pump_all(s, i + 1, 0);
        }
        for (int i = 0; i < MOST; i++) {
            if (!s[i]) continue;
            CHECK(stream_finish(s[i], bound_ms(20000)), "job %d of round %d does not end", i, round);
            if (s[i]->r->status == 200) check_events(s[i], text("job %d of round %d", i, round));
            char *got = essence(s[i]), *want = alone(fields[i]);
            if (fate[i] > 2) CHECK_TEXT(got, want, text("job %d of round %d", i, round));
            else {
                /* A prefix of the undisturbed stream, then the reason why it ends; or all of it. */
                char *reason = strstr(got, "error ");
                size_t n = reason ? (size_t)(reason - got) : strlen(got);
                CHECK(!strncmp(got, want, n), "job %d of round %d: %s", i, round, got);
            }
            conn_close(s[i]->c);
        }
    }
    CHECK(health_wait(crowd(), "jobs.running", 0, bound_ms(1000)), "a job is left over");
    CHECK_NUM(metric(crowd(), "worker_kv_usage_ratio", ""), 0, "KV blocks that nobody gave back");
}

static void append_tokens(buf *b, const stream *s) {
    for (size_t i = 0; i < s->n; i++)
        if (!strcmp(s->events[i].type, "token")) buf_print(b, "%s\n", s->events[i].data);
}

static worker *random_worker(const char *model) {
    /* The scalar level runs anywhere, but slowly. */
    return ready_worker(dice(8) ? "LORCH_SIMD=" : "LORCH_SIMD=scalar", "--model", model, "--threads", text("%u", 1 + dice(3)),
                        dice(2) ? "--no-speculate" : "--lazy");
}

/* kill -9 in mid-stream; another worker continues from the next index; the joined stream has no seam. */
static void test_failover(void) {
    int kills = instrumented() ? 10 : 100, seams = 0;
    worker *next = NULL;
    dice_state = 7;
    for (int k = 0; k < kills && !results.bad; k++) {
        worker *w = next ? next : random_worker(tiny_model());
        char *fields = q("'prompt':'%s','seed':%u,'max_tokens':%u,'ignore_eos':true,'temperature':%s",
                         dice(2) ? "Once upon a time" : "A fox and a kite. A fox and a kite. A", dice(99999),
                         50 + dice(80), dice(2) ? "0" : "1.1");
        stream *s = execute(w->port, "/execute", "", job_body(fields));
        int until = (int)dice(45);
        stream_wait(s, until, bound_ms(5000));
        if (dice(2)) nap_ms((int)dice(3));
        kill(w->pid, SIGKILL);
        stream_pump(s, 0);
        while (!stream_over(s)) stream_pump(s, 50);
        worker_drop(w);
        int have = stream_tokens(s);
        /* Killed before its answer began, a worker leaves nothing to continue. */
        REQUIRE(s->r->status == 200 || (!s->r->status && !have), "status %d", s->r->status);
        bool ended = s->n && !strcmp(s->events[s->n - 1].type, "end");
        next = random_worker(tiny_model());
        stream *other = dice(2) ? execute(next->port, "/execute", "", job_body(random_fields())) : NULL;
        stream *rest = job_run(next->port, "%s,'resume_from':%d", fields, have);
        if (other) stream_finish(other, bound_ms(10000));
        buf joined = {0}, whole = {0};
        append_tokens(&joined, s);
        append_tokens(&joined, rest);
        stream *undisturbed = execute(calm(), "/execute", "", job_body(fields));
        stream_finish(undisturbed, bound_ms(20000));
        append_tokens(&whole, undisturbed);
        CHECK_TEXT(joined.p ? joined.p : "", whole.p ? whole.p : "none", text("kill %d after %d tokens", k, have));
        seams += !ended;
        conns_close();
    }
    worker_drop(next);
    CHECK(seams > kills / 2, "only %d of the kills came in mid-stream", seams);
}

/* ==== Short forms of the measurements ========================================================= */

static worker *slow_worker;

static int slow(void) { /* a token takes milliseconds there */
    if (!slow_worker)
        slow_worker = ready_worker("--model", slow_model(), "--parallel", "4", "--queue", "64", "--max-tokens-out", "16000");
    double end = now_ms() + bound_ms(10000);
    while (json_type(health(slow_worker->port), "rates.decode_tokens_per_sec") != 'n' && now_ms() < end) nap_ms(5);
    return slow_worker->port;
}

static void test_predictions(void) {
    NEED_SLOW_MODEL();
    dice_state = 11;
    prediction p = predict(slow(), instrumented() ? 8 : 60, 6, 200, 40);
    printf("# %d jobs: completion is %.0f%% off what was foreseen in the median, %.0f%% at p95\n", p.n, 100 * median(&p.error), 100 * percentile(&p.error, 0.95));
    CHECK(p.failed == 0 && p.n > 0, "%d jobs failed, %d have an estimate", p.failed, p.n);
    CHECK(instrumented() || (median(&p.bias) > 0.5 && median(&p.bias) < 2), "jobs take %.2f of what was foreseen", median(&p.bias));
}

static void test_deadlines(void) {
    NEED_SLOW_MODEL();
    dice_state = 12;
    punctuality p = deadlines(slow(), instrumented() ? 8 : 60, 6, 100, 40);
    printf("# %d refused, %d in time, %d ended by their deadline, ms beyond it: %s\n", p.refused, p.in_time, p.late, percentiles(&p.over_ms));
    CHECK(p.refused + p.in_time > 0, "no job was refused, and none ended in time");
    CHECK(!p.late || percentile(&p.over_ms, 1) < bound_ms(250), "a job ran %.0f ms beyond its deadline", percentile(&p.over_ms, 1));
}

/* A long prompt may delay the tokens of others by two slices of 20 ms. */
static void test_long_prompt(void) {
    NEED_SLOW_MODEL();
    stream *s[4];
    sample calm = {0}, busy = {0};
    dice_state = 13;
    for (int i = 0; i < 3; i++) s[i] = job(slow(), "'prompt':'%s','max_tokens':9000,'ignore_eos':true,'speculate':false", random_letters(20));
    CHECK(streams_wait(s, 3, 40, bound_ms(20000)), "no tokens");
    double from = now_ms();
    for (int i = 0; i < 3; i++) token_gaps(s[i], 0, from, &calm);
    s[3] = job(slow(), "'prompt':'%s','max_tokens':1", random_letters(6000));
    for (double end = from + 1500; now_ms() < end && !stream_over(s[3]);) streams_pump(s, 4, 50);
    for (int i = 0; i < 3; i++) token_gaps(s[i], from + 20, now_ms(), &busy);
    for (int i = 0; i < 4; i++) cancel(slow(), s[i]->job_id);
    CHECK(streams_finish(s, 4, bound_ms(5000)), "a job does not end");
    printf("# ms between tokens: %s\n# during a long prompt: %s\n", percentiles(&calm), percentiles(&busy));
    CHECK(busy.n > 10 && median(&busy) < median(&calm) + bound_ms(100), "tokens wait %.0f ms instead of %.0f", median(&busy), median(&calm));
}

/* Jobs with one beginning that come together compute it once, also while another job decodes and batches hold little of prompts. */
static void test_shared_beginning(void) {
    NEED_SLOW_MODEL();
    stream *s[4];
    dice_state = 14;
    s[3] = job(slow(), "'prompt':'%s','max_tokens':9000,'ignore_eos':true,'speculate':false", random_letters(20));
    CHECK(streams_wait(s + 3, 1, 2, bound_ms(20000)), "no tokens");
    char *beginning = random_letters(1200);
    for (int i = 0; i < 3; i++) s[i] = job(slow(), "'prompt':'%s%s','max_tokens':2,'ignore_eos':true", beginning, random_letters(20));
    CHECK(streams_finish(s, 3, bound_ms(60000)), "a job does not end");
    int first = 0, whole = 0;
    for (int i = 0; i < 3; i++) {
        double prompt = json_num(stream_last(s[i]), "prompt_tokens"), cached = json_num(stream_last(s[i]), "cached_tokens");
        printf("# %.0f of %.0f tokens cached\n", cached, prompt);
        first += cached <= 0, whole += cached >= prompt - 22 - 64;
    }
    CHECK(first == 1 && whole == 2, "%d jobs computed the beginning, %d shared it", first, whole);
    cancel(slow(), s[3]->job_id);
    CHECK(streams_finish(s + 3, 1, bound_ms(5000)), "the other job does not end");
}

static void test_idle(void) {
    double end = now_ms() + bound_ms(20000), ms = 0;
    while (json_type(health(crowd()), "fingerprint") != 's' && now_ms() < end) nap_ms(20);
    health_wait(crowd(), "jobs.running", 0, bound_ms(1000));
    ms = idle_cpu_ms(crowd(), 1500);
    printf("# %.2f ms of CPU time in 1500 ms\n", ms);
    CHECK(ms < bound_ms(15), "an idle worker takes %.1f ms of CPU time in 1500 ms", ms);
}

static void test_crowd(void) {
    NEED_SLOW_MODEL();
    worker *w = ready_worker("--model", slow_model(), "--parallel", "1", "--queue", "64", "--max-tokens-out", "16000");
    sample calm = {0}, crowded = {0};
    for (int i = 0; i < (instrumented() ? 1 : 5); i++) {
        sample_add(&calm, gap_among(w->port, 40, 0, 0));
        sample_add(&crowded, gap_among(w->port, 40, 64, 300));
    }
    printf("# ms between tokens: %.2f alone, %.2f with 64 jobs in the queue and 300 open connections\n", median(&calm), median(&crowded));
    CHECK(median(&crowded) < median(&calm) * 1.5 + bound_ms(1), "tokens wait %.2f ms instead of %.2f", median(&crowded), median(&calm));
    worker_end(w);
}

/* The CPU time of all jobs is that of the process. */
static void test_cpu_account(void) {
    NEED_SLOW_MODEL();
    slow();
    double before = metric(slow(), "worker_cpu_seconds_total", ""), sum = 0;
    stream *s[6];
    for (int i = 0; i < 6; i++) s[i] = job(slow(), "'prompt':'%s','max_tokens':%d,'ignore_eos':true", random_letters(100), instrumented() ? 3 : 30);
    CHECK(streams_finish(s, 6, bound_ms(30000)), "a job does not end");
    double spent = (metric(slow(), "worker_cpu_seconds_total", "") - before) * 1e3;
    for (int i = 0; i < 6; i++) sum += json_num(stream_last(s[i]), "cpu_ms");
    printf("# the process spent %.1f ms of CPU time, the jobs were charged with %.1f\n", spent, sum);
    CHECK(sum <= spent && sum > 0.9 * spent, "the process spent %.1f ms of CPU time, the jobs were charged with %.1f", spent, sum);
}

static void test_shared_end(void) {
    worker_end(slow_worker);
    slow_worker = NULL;

    worker_end(crowd_worker);
    worker_end(calm_worker);
    crowd_worker = calm_worker = NULL;
}

static const test tests[] = {
    {"48 jobs at once give the streams that each gives alone [M0-W-1301] [SYS-7.5]", test_mix},
    {"the same amid cancels, lost clients and deadlines [SYS-6.3.5]", test_mix_with_trouble},
    {"100 workers killed in mid-stream leave no seam [SYS-7.3] [SYS-7.5]", test_failover},
    {"completion is foreseen", test_predictions},
    {"no accepted job overruns its deadline [SYS-7.3]", test_deadlines},
    {"a long prompt delays the tokens of others by little", test_long_prompt},
    {"jobs with one beginning compute it once", test_shared_beginning},
    {"an idle worker uses no CPU time", test_idle},
    {"a full queue and open connections delay no token", test_crowd},
    {"jobs are charged what the process spends", test_cpu_account},
    {"the shared workers end with 0 [SYS-7.2]", test_shared_end},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
