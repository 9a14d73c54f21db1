/* load.c: many jobs at once, and workers that die. MIT licence.
 *
 * Whatever happens around it, a job's stream must be the one that it would have alone. The tests replay mixes
 * of short and long jobs, shared beginnings, cancellations, clients that leave and deadlines against one worker,
 * and compare every stream event for event with that of a second worker which runs one job at a time on one
 * thread without speculation. Then workers are killed in mid-stream and their jobs continued elsewhere. */
#include "harness.h"

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

/* The generator is SplitMix64; each test has its own seed, so that a failure can be repeated. */
static unsigned long long dice_state;
static unsigned dice(unsigned sides) {
    unsigned long long z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (unsigned)((z ^ z >> 31) % sides);
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

static void test_mix(void) {
    for (int round = 0; round < rounds(); round++) {
        stream *s[MOST];
        char *fields[MOST];
        dice_state = (unsigned)round + 1;
        for (int i = 0; i < MOST; i++) {
            fields[i] = random_fields();
            s[i] = execute(crowd(), "/execute", "", job_body(fields[i]));
            if (dice(4) == 0) nap_ms((int)dice(6));
        }
        for (int i = 0; i < MOST; i++) {
            CHECK(stream_finish(s[i], bound_ms(20000)), "job %d of round %d does not end", i, round);
            CHECK_TEXT(essence(s[i]), alone(fields[i]), text("job %d of round %d", i, round));
            conn_close(s[i]->c);
        }
    }
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

static void test_shared_end(void) {
    worker_end(crowd_worker);
    worker_end(calm_worker);
    crowd_worker = calm_worker = NULL;
}

static const test tests[] = {
    {"48 jobs at once give the streams that each gives alone [M0-W-1301] [SYS-7.5]", test_mix},
    {"the same amid cancels, lost clients and deadlines [SYS-6.3.5]", test_mix_with_trouble},
    {"100 workers killed in mid-stream leave no seam [SYS-7.3] [SYS-7.5]", test_failover},
    {"the shared workers end with 0 [SYS-7.2]", test_shared_end},
};

int main(int argc, char **argv) { return tests_main(tests, COUNT(tests), argc, argv); }
