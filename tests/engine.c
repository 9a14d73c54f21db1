/* SPDX-License-Identifier: MIT
 *
 * engine: the life of a job, from inside. The file is included, so that the engine's own state is in reach.
 *
 *   cc -O1 tests/engine.c -o engine -lpthread -lm && ./engine [NAME-PART ...]
 *
 * It runs in the top directory. Jobs are submitted, cancelled, left, given deadlines and drained at random moments, from
 * two threads; whatever happens, each gets its events in the one order that is allowed, exactly one of them terminal,
 * and afterwards nothing is left: no job, no held block, no sum that does not add up. LORCH_TEST_ROUNDS says how
 * often (40, or 12 with LORCH_TEST_SLOW=1); each round has its own seed, so that a failure can be repeated. */
#define LORCH_NO_MAIN
#include "../lorch.c"

static int failed, details;
__attribute__((format(printf, 1, 2))) static void complain(const char *fmt, ...) {
    va_list ap;
    failed = 1;
    if (details++ >= 10) return;
    printf("# ");
    va_start(ap, fmt);
    vprintf(fmt, ap);
    va_end(ap);
    printf("\n");
}
#define CHECK(expr, ...) ((expr) ? (void)0 : complain(__VA_ARGS__))

typedef struct {
    uint64_t state;
} dice;

static uint32_t roll(dice *d, uint32_t sides) { /* SplitMix64 */
    uint64_t z = d->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ z >> 31) % sides);
}

static int slow(void) { /* instrumented: all that depends on time gets more of it, and less is asked */
    const char *v = getenv("LORCH_TEST_SLOW");
    return v && *v && strcmp(v, "0") != 0;
}

static void nap(double ms) {
    if (slow()) ms *= 10;
    struct timespec t = {(time_t)(ms / 1000), (long)(fmod(ms, 1000) * 1e6)};
    nanosleep(&t, NULL);
}

/* ==== One job as its sink sees it =============================================================== */

typedef struct {
    engine_job *job;          /* the submitter's reference */
    /* atomic: the sink runs on the intake and the engine thread */
    int started, ended, refused, tokens, done;
    int last_prefill, faults; /* faults: events out of order */
    enum engine_event_type last;
    const engine_error *error;
    int cached, drafted, accepted, out, prompt;
    double cpu;
} life;

static void watch(engine_job *j, const engine_event *ev) {
    life *l = j->user;
    if (l->done) __atomic_fetch_add(&l->faults, 1, __ATOMIC_RELAXED); /* nothing follows a terminal event */
    switch (ev->type) {
    case EVENT_REFUSED: l->faults += l->started, l->refused = 1, l->error = ev->error; break;
    case EVENT_STARTED: l->faults += l->started, l->started = 1; break;
    case EVENT_PREFILL: l->faults += !l->started || l->tokens || ev->index <= l->last_prefill, l->last_prefill = ev->index; break;
    case EVENT_TOKEN: l->faults += !l->started || ev->index != l->tokens++; break;
    case EVENT_METRICS: l->faults += !l->started; break;
    case EVENT_END: l->faults += !l->started || j->n_out != l->tokens; break;
    case EVENT_ERROR: l->faults += !l->started, l->error = ev->error; break;
    }
    if (ev->type != EVENT_END && ev->type != EVENT_ERROR && ev->type != EVENT_REFUSED) return;
    l->last = ev->type, l->ended++;
    l->cached = j->n_cached, l->drafted = j->n_drafted, l->accepted = j->n_accepted, l->out = j->n_out, l->prompt = j->n_prompt, l->cpu = j->cpu_seconds;
    __atomic_store_n(&l->done, 1, __ATOMIC_RELEASE);
}

static int is_done(const life *l) { return __atomic_load_n(&l->done, __ATOMIC_ACQUIRE); }

static const char *const words[] = {"a fox ", "the river ", "Omar ", "wanted ", "a kite ", "and said ", "One morning ", "more than anything. "};

static void random_job(life *l, dice *d, int round, int i) {
    engine_job *j = engine_job_new();
    memset(l, 0, sizeof *l);
    if (!j) exit(1);
    buf_printf(&j->id, "%d-%d", round, i);
    if (roll(d, 3) == 0)
        for (int k = 0; k < 60; k++) buf_puts(&j->prompt, words[k * 7 % 8]);
    for (uint32_t n = roll(d, 4) ? 1 + roll(d, 12) : 40 + roll(d, 60); n > 0; n--) buf_puts(&j->prompt, words[roll(d, 8)]);
    sample_params s = {roll(d, 2) ? 0 : 1.1f, roll(d, 2) ? 1 : 0.9f, 0, roll(d, 4) ? 1 : 1.2f, 0, roll(d, 1000)};
    j->sample = s;
    j->max_tokens = 1 + (int)roll(d, slow() ? 12 : 120), j->ignore_eos = roll(d, 3) == 0, j->speculate = roll(d, 4) != 0;
    if (roll(d, 6) == 0) buf_puts(&j->cache_name, "tenant");
    if (roll(d, 8) == 0) buf_puts(&j->stop[j->n_stop++], "the");
    if (roll(d, 6) == 0) j->has_deadline = 1, j->deadline_unix_ms = sys_unix_ms() + (1 + roll(d, 60)) * (slow() ? 50 : 1);
    if (roll(d, 30) == 0) buf_puts(&j->stop[j->n_stop++], "x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x");
    j->sink = watch, j->user = l, l->job = j;
}

/* ==== A round =================================================================================== */

enum { MOST = 40 };

typedef struct {
    engine *e;
    life *l;
    dice d;
    int n; /* atomic: jobs submitted so far */
    int stop;
} meddler;

/* A second thread that cancels at random moments, by id and by reference, and looks at the engine as /health does. */
static void *meddle(void *arg) {
    meddler *m = arg;
    while (!__atomic_load_n(&m->stop, __ATOMIC_ACQUIRE)) {
        int n = __atomic_load_n(&m->n, __ATOMIC_ACQUIRE);
        double wait;
        nap(0.02 * roll(&m->d, 60));
        engine_stats s = engine_snapshot(m->e);
        CHECK(s.running <= m->e->options.n_parallel && s.live >= s.running + s.queued && s.queued >= 0, "%d live, %d running, %d queued", s.live, s.running, s.queued);
        CHECK(s.kv_used >= 0 && s.kv_used <= 1, "a share of %g", s.kv_used);
        pthread_mutex_lock(&m->e->lock);
        double estimate = engine_estimate(m->e, NULL, &wait);
        pthread_mutex_unlock(&m->e->lock);
        CHECK(estimate < 1e6 && wait < 1e6, "an estimate of %g", estimate);
        if (!n || roll(&m->d, 3)) continue;
        life *l = &m->l[roll(&m->d, (uint32_t)n)];
        if (!l->job || is_done(l)) continue;
        if (roll(&m->d, 2)) engine_cancel(m->e, buf_str(&l->job->id), 1);
        else engine_cancel_one(m->e, l->job);
    }
    return NULL;
}

/* After all jobs have ended, every block is free or kept for sharing, and no reference is left. */
static void check_blocks(engine *e, int round) {
    pthread_mutex_lock(&e->lock);
    CHECK(kv_available(&e->kv) == e->kv.n_blocks, "round %d: %d of %d blocks are available", round, kv_available(&e->kv), e->kv.n_blocks);
    int published = 0;
    for (int i = 0; i < e->kv.n_blocks; i++) {
        CHECK(e->kv.block[i].refs == 0, "round %d: block %d has %d references", round, i, e->kv.block[i].refs);
        published += e->kv.block[i].published;
    }
    CHECK(published == e->kv.n_idle, "round %d: %d published blocks, %d idle", round, published, e->kv.n_idle);
    CHECK(!e->live && !e->queue_first && !e->intake_first && !e->stats.live && !e->stats.running && !e->stats.queued, "round %d: jobs are left", round);
    for (int i = 0; i < MAX_PARALLEL; i++) CHECK(!e->running[i], "round %d: slot %d is taken", round, i);
    pthread_mutex_unlock(&e->lock);
}

typedef struct { /* what jobs have had, by their own account */
    uint64_t outcome[OUTCOMES], in, out, cached, drafted, accepted;
    double cpu;
} account;

static void add_life(account *a, const life *l, const char *what) {
    CHECK(l->ended == 1, "%s: %d terminal events", what, l->ended);
    CHECK(l->faults == 0, "%s: %d events out of order", what, l->faults);
    CHECK(l->accepted <= l->drafted && l->accepted <= l->out && l->cached <= l->prompt, "%s: %d of %d drafted, %d of %d cached, %d out", what, l->accepted,
          l->drafted, l->cached, l->prompt, l->out);
    enum engine_outcome o = l->last == EVENT_END ? OUTCOME_SUCCESS : l->refused ? OUTCOME_REJECTED : l->error == &ERR_CANCELLED ? OUTCOME_CANCELLED
                          : l->error == &ERR_TIMEOUT ? OUTCOME_TIMEOUT : OUTCOME_ERROR;
    CHECK(o != OUTCOME_ERROR, "%s: %s", what, l->error ? l->error->code : "no error code");
    a->outcome[o]++;
    if (o == OUTCOME_REJECTED) return;
    a->in += (uint64_t)l->prompt, a->out += (uint64_t)l->out, a->drafted += (uint64_t)l->drafted, a->accepted += (uint64_t)l->accepted, a->cpu += l->cpu;
    a->cached += l->last == EVENT_END || l->out ? (uint64_t)l->cached : 0;
}

static void play_round(engine *e, int round, account *a, int drain) {
    static life l[MOST];
    dice d = {(uint64_t)round * 1000 + 7};
    meddler m = {e, l, {(uint64_t)round * 77 + 5}, 0, 0};
    pthread_t thread;
    char what[64];
    int n = 5 + (int)roll(&d, MOST - 5), drain_at = drain ? (int)roll(&d, (uint32_t)n) : -1;
    memset(l, 0, sizeof l);
    if (pthread_create(&thread, NULL, meddle, &m)) exit(1);
    for (int i = 0; i < n; i++) {
        life *o = &l[i];
        random_job(o, &d, round, i);
        if (o->job->has_deadline && roll(&d, 2)) { /* as after the start, when no rate is known: such a job is not refused, and may be late */
            pthread_mutex_lock(&e->lock);
            e->stats.decode_rate = 0; /* nobody reads this one without the lock */
            pthread_mutex_unlock(&e->lock);
        }
        const engine_error *why = engine_submit(e, o->job);
        if (why) { /* no event comes */
            CHECK(drain_at >= 0 ? why == &ERR_NOT_READY || why == &ERR_BUSY : why == &ERR_BUSY, "round %d: not taken: %s", round, why->code);
            CHECK(!is_done(o) && !o->started, "round %d: an event of a job that was not taken", round);
            a->outcome[OUTCOME_REJECTED]++;
            engine_job_drop(e, o->job);
            o->job = NULL;
        }
        __atomic_store_n(&m.n, i + 1, __ATOMIC_RELEASE);
        if (roll(&d, 3) == 0) nap(0.05 * roll(&d, 60));
        if (i == drain_at) engine_drain(e, roll(&d, 2) != 0);
    }
    double end = sys_now() + 60;
    for (int i = 0; i < n; i++)
        while (l[i].job && !is_done(&l[i]) && sys_now() < end) nap(0.2);
    __atomic_store_n(&m.stop, 1, __ATOMIC_RELEASE);
    pthread_join(thread, NULL);
    pthread_mutex_lock(&e->lock); /* whoever emitted the last event has dropped its reference then */
    pthread_mutex_unlock(&e->lock);
    for (int i = 0; i < n; i++) {
        if (!l[i].job) continue;
        snprintf(what, sizeof what, "round %d, job %d", round, i);
        add_life(a, &l[i], what);
        engine_job_drop(e, l[i].job);
    }
    check_blocks(e, round);
}

static engine *open_engine(int parallel, int queue, size_t kv_bytes) {
    char err[512];
    lorch_options o;
    lorch_defaults(&o);
    o.n_parallel = parallel, o.n_queue = queue, o.n_threads = 2, o.kv_bytes = kv_bytes, o.chunk = 48;
    model *m = model_load("tests/models/lorch-tiny-q8_0.gguf", NULL, err, sizeof err);
    engine *e = m ? engine_open(m, &o, 1, NULL, err, sizeof err) : NULL;
    if (!e) printf("# %s\n", err), exit(1);
    return e;
}

/* Until the engine has measured what batches cost, it borrows blocks. */
static void await_costs(engine *e) {
    double limit = sys_now() + 20;
    for (int measured = 0; !measured && sys_now() < limit; nap(1)) {
        pthread_mutex_lock(&e->lock);
        measured = e->calibrations >= ENGINE_CALIBRATIONS && !e->calibrating;
        pthread_mutex_unlock(&e->lock);
    }
}

static void compare_accounts(engine *e, const account *a) {
    engine_stats s = engine_snapshot(e);
    for (int i = 0; i < OUTCOMES; i++)
        CHECK(s.outcome[i] == a->outcome[i], "outcome %s: %d counted, %d seen", engine_outcome_names[i], (int)s.outcome[i], (int)a->outcome[i]);
    CHECK(s.tokens_in == a->in && s.tokens_out == a->out, "tokens: %d in and %d out counted, %d and %d seen", (int)s.tokens_in, (int)s.tokens_out, (int)a->in,
          (int)a->out);
    CHECK(s.drafted == a->drafted && s.accepted == a->accepted, "drafts: %d and %d counted, %d and %d seen", (int)s.drafted, (int)s.accepted, (int)a->drafted,
          (int)a->accepted);
    CHECK(s.cached_tokens >= a->cached, "cached tokens: %d counted, %d seen", (int)s.cached_tokens, (int)a->cached);
    CHECK(a->cpu <= s.jobs_cpu * 1.0001, "CPU time: %g s charged, %g s seen", s.jobs_cpu, a->cpu);
}

static int rounds(void) {
    const char *v = getenv("LORCH_TEST_ROUNDS");
    return v ? atoi(v) : slow() ? 12 : 40;
}

/* ==== Tests ===================================================================================== */

static void test_interleavings(void) {
    engine *e = open_engine(4, 64, 0);
    account a;
    memset(&a, 0, sizeof a);
    await_costs(e);
    for (int round = 0; round < rounds() && !failed; round++) play_round(e, round, &a, 0);
    compare_accounts(e, &a);
    for (int i = 0; i < OUTCOMES; i++) CHECK(i == OUTCOME_ERROR || slow() || a.outcome[i] > 0, "no job ended as %s", engine_outcome_names[i]);
    printf("# success %d, cancelled %d, timeout %d, rejected %d; %d tokens, %d of them foreseen; %d of %d prompt tokens cached\n", (int)a.outcome[0],
           (int)a.outcome[OUTCOME_CANCELLED], (int)a.outcome[OUTCOME_TIMEOUT], (int)a.outcome[OUTCOME_REJECTED], (int)a.out, (int)a.accepted, (int)a.cached, (int)a.in);
    engine_close(e);
}

static void test_scarcity(void) { /* a pool of two contexts for eight slots, a queue of six: jobs wait for blocks and are refused */
    char err[512];
    model *m = model_load("tests/models/lorch-tiny-q8_0.gguf", NULL, err, sizeof err);
    if (!m) complain("%s", err), exit(1);
    size_t one = model_kv_layout(m, MAT_KV_F16).block_bytes * (size_t)kv_blocks_for(m->n_ctx_train);
    model_free(m);
    engine *e = open_engine(8, 6, 2 * one);
    account a;
    memset(&a, 0, sizeof a);
    await_costs(e);
    for (int round = 1000; round < 1000 + rounds() / 2 && !failed; round++) play_round(e, round, &a, 0);
    compare_accounts(e, &a);
    CHECK(slow() || (a.outcome[OUTCOME_REJECTED] > 0 && a.outcome[OUTCOME_SUCCESS] > 0), "no job was refused, or none succeeded");
    engine_close(e);
}

static void test_drain(void) { /* at a random moment; then the engine is closed, sometimes with jobs in it */
    for (int round = 2000; round < 2000 + rounds() / 4 && !failed; round++) {
        engine *e = open_engine(3, 64, 0);
        account a;
        memset(&a, 0, sizeof a);
        await_costs(e);
        play_round(e, round, &a, 1);
        compare_accounts(e, &a);
        engine_close(e);
    }
}

static void test_close(void) { /* engine_join ends all that is left, with a terminal event each */
    for (int round = 3000; round < 3000 + rounds() / 4 && !failed; round++) {
        engine *e = open_engine(3, 64, 0);
        static life l[MOST];
        dice d = {(uint64_t)round};
        int n = 1 + (int)roll(&d, 20);
        char what[64];
        account a;
        memset(&a, 0, sizeof a);
        for (int i = 0; i < n; i++) {
            random_job(&l[i], &d, round, i);
            if (engine_submit(e, l[i].job)) complain("round %d: job %d is not taken", round, i);
        }
        nap(0.1 * roll(&d, 100));
        engine_join(e);
        for (int i = 0; i < n; i++) {
            snprintf(what, sizeof what, "round %d, job %d", round, i);
            add_life(&a, &l[i], what);
            engine_job_drop(e, l[i].job);
        }
        check_blocks(e, round);
        engine_close(e);
    }
}

static double submit_and_wait(engine *e, life *l) {
    double from = sys_now();
    if (engine_submit(e, l->job)) complain("a job is not taken");
    else
        while (!is_done(l) && sys_now() < from + 60) nap(0.1);
    engine_job_drop(e, l->job);
    return sys_now() - from;
}

/* What the jobs were charged with is what the process spent while they ran. */
static void test_cpu(void) {
    engine *e = open_engine(4, 64, 0);
    account a;
    life l;
    dice d = {11};
    memset(&a, 0, sizeof a);
    await_costs(e);
    double before = sys_cpu_now();
    for (int i = 0; i < 12; i++) {
        random_job(&l, &d, 4000, i);
        l.job->max_tokens = slow() ? 12 : 300, l.job->ignore_eos = 1, l.job->deadline_unix_ms = 0, l.job->n_stop = 0;
        submit_and_wait(e, &l);
        add_life(&a, &l, "a job");
    }
    double spent = sys_cpu_now() - before;
    CHECK(a.cpu <= spent && a.cpu > 0.85 * spent, "charged %.1f ms of %.1f", a.cpu * 1e3, spent * 1e3);
    printf("# charged %.1f ms of %.1f\n", a.cpu * 1e3, spent * 1e3);
    engine_close(e);
}

/* The learned cost follows what is measured, and a single monster counts as at most twice. */
static void test_costs(void) {
    engine_cost c;
    memset(&c, 0, sizeof c);
    CHECK(engine_rows_cost(&c, 5) <= 0, "a cost that nobody measured");
    for (int i = 0; i < 400; i++) { /* 10 ms and 1 ms a row */
        int n = 1 + i * 7 % 200;
        engine_learn_cost(&c, n, 0, 0, 0.010 + 0.001 * n);
    }
    for (int n = 1; n <= 192; n += 13) CHECK(fabs(engine_rows_cost(&c, n) / (0.010 + 0.001 * n) - 1) < 0.1, "%d rows: %g", n, engine_rows_cost(&c, n));
    double before = engine_rows_cost(&c, 8);
    engine_learn_cost(&c, 8, 0, 0, 50);
    CHECK(engine_rows_cost(&c, 8) < before * 1.25, "after one monster: %g, before %g", engine_rows_cost(&c, 8), before);
    for (int i = 0; i < 100; i++) engine_learn_cost(&c, 4, 0, 0, 0.028);
    CHECK(fabs(engine_rows_cost(&c, 4) / 0.028 - 1) < 0.02, "4 rows have become slow: %g", engine_rows_cost(&c, 4));
    c.attend[0] = c.attend[1] = 1e-6;
    for (int i = 0; i < 200; i++) engine_learn_cost(&c, 64, 0, 64 * 2000.0, 0.074 + 64 * 2000.0 * 3e-7);
    CHECK(c.attend[1] < 4e-7, "attention: %g", c.attend[1]);
}

/* Jobs with one beginning of 2,048 tokens compute it once, and the estimate knows: beside one that has computed half of it, from
 * behind one that waits for the same slot's prompt, and with a queue of them. Other texts and other keys share nothing. */
static void check_shared_estimate(engine *e) {
    static int32_t text[4][2100];
    engine_job o[3], j;
    double wait;
    memset(o, 0, sizeof o), memset(&j, 0, sizeof j);
    for (int i = 0; i < 4; i++) text[i][2048] = 1 + i;
    for (int i = 0; i < 3; i++) o[i].token = text[i], o[i].n_prompt = 2060, o[i].max_tokens = 1, o[i].state = JOB_PREFILL;
    j.token = text[3], j.n_prompt = 2060, j.max_tokens = 1;
    double alone = engine_estimate(e, &j, &wait);
    e->running[2] = &o[0];
    o[0].n_computed = 1024; /* mid-way */
    double t = engine_estimate(e, &j, &wait);
    CHECK(wait <= 0 && t > 0.4 * alone && t < 0.75 * alone, "behind one that has half of it: %g s, alone %g", t, alone);
    j.cache_key = 1;
    double apart = engine_estimate(e, &j, &wait);
    CHECK(apart > 1.3 * alone, "beside one of another key: %g s, alone %g", apart, alone);
    j.cache_key = 0, text[3][5] = 1;
    apart = engine_estimate(e, &j, &wait);
    CHECK(apart > 1.3 * alone, "beside another text: %g s, alone %g", apart, alone);
    text[3][5] = 0;
    e->running[0] = &o[1]; /* at the beginning, so that it waits, too */
    t = engine_estimate(e, &j, &wait);
    CHECK(t > 0.4 * alone && t < 0.8 * alone, "three of them: %g s, alone %g", t, alone);
    e->queue_first = &o[2], e->options.n_parallel = 3;
    t = engine_estimate(e, &j, &wait);
    CHECK(wait > 0.4 * alone && t > 0.4 * alone && t < 0.85 * alone, "four of them in three slots: %g s, wait %g, alone %g", t, wait, alone);
    e->running[0] = e->running[2] = e->queue_first = NULL, e->options.n_parallel = 4;
}

/* What a batch takes on of prompts, from made-up costs of 20 ms and 1.5 ms a row: no layer over a slice; beside jobs that decode,
 * no more than two slices, and even less at far positions. */
static void test_chunks(void) {
    static engine e;
    model m;
    memset(&e, 0, sizeof e), memset(&m, 0, sizeof m);
    m.n_layer = 16, e.m = &m, e.options.chunk = 1000, e.options.n_parallel = 4;
    CHECK(engine_chunk(&e, 0, 0, 1, 0) == 32, "a guess while nothing is known");
    for (int k = 0; k < COST_KNOTS; k++) e.stats.cost.seconds[k] = 0.020 + 0.0015 * engine_knots[k];
    e.stats.prefill_rate = 600, e.stats.decode_rate = 45, e.stats.tokens_per_step[0] = 1, e.stats.cost.attend[1] = 1e-6;
    int alone = engine_chunk(&e, 0, 0, engine_limit(&e, 0), 0), far = engine_chunk(&e, 0, 0, engine_limit(&e, 0), 8000);
    CHECK(engine_rows_cost(&e.stats.cost, alone) <= 16 * ENGINE_SLICE_S + 1e-9 && alone > 150, "%d tokens alone", alone);
    CHECK(far < alone / 4 && far > alone / 16, "%d tokens at position 8000, %d at the beginning", far, alone);
    double decoding = engine_rows_cost(&e.stats.cost, 4);
    int beside = engine_chunk(&e, 4, decoding, engine_limit(&e, decoding), 0);
    CHECK(beside >= 24 && beside <= 26, "%d tokens beside four jobs that decode: 40 ms hold 26", beside);
    double wait;
    engine_job j;
    memset(&j, 0, sizeof j);
    j.n_prompt = 300, j.max_tokens = 101, j.sample.temperature = 1;
    double t = engine_estimate(&e, &j, &wait), want = 2 * 0.020 + 300 * 0.0015 + 1e-6 * 300 * 150 + 100 * 0.0215;
    CHECK(fabs(t / want - 1) < 0.03 && wait <= 0, "a job alone is foreseen to take %g s, not %g", t, want);
    /* Where four slots are always taken, by jobs of 60 tokens and 20 steps, three of them are beside it all the time: of four
     * rows that decode, each costs a quarter; for its 100 steps some 15 others come, whose prompts take 1.5 ms a token. */
    e.stats.busy = 4, e.stats.usual_prefill = 60, e.stats.usual_steps = 20;
    double among = engine_estimate(&e, &j, &wait), least = 2 * 0.020 + 300 * 0.0015 + 100 * 0.026;
    CHECK(among > least + 12 * 60 * 0.0015 && among < 1.5 * (least + 18 * 60 * 0.0015), "among others it is foreseen to take %g s", among);
    double longer = (j.max_tokens = 5001, engine_estimate(&e, &j, &wait));
    CHECK(fabs(longer / 50 / among - 1) < 0.15, "50 times as long among others: %g s, the short one %g", longer, among);
    e.stats.busy = 1;
    CHECK(fabs(engine_estimate(&e, &j, &wait) / (5000 * 0.0215 + want - 100 * 0.0215) - 1) < 0.03, "busy with itself alone");
    check_shared_estimate(&e);
    /* Measured up to 32 rows only, as when the first job interrupts that: a slip there does not make long prompts free. */
    for (int k = 0; k < COST_KNOTS; k++)
        if (engine_knots[k] > 32 || engine_knots[k] == 2 || engine_knots[k] == 3) e.stats.cost.seconds[k] = 0;
    for (int k = 0; k < COST_KNOTS; k++)
        if (engine_knots[k] == 32) e.stats.cost.seconds[k] = 0.9 * e.stats.cost.seconds[k - 1];
    CHECK(engine_rows_cost(&e.stats.cost, 512) > 0.5 * (0.020 + 512 * 0.0015), "512 rows, of which 32 are known: %g s", engine_rows_cost(&e.stats.cost, 512));
}

/* One batch of prompts with these lengths (0: no job; negative: one that decodes), of a machine that takes 20 ms and 1.5 ms a
 * row: what each slot gets. key: the jobs' cache keys, or NULL: they share nothing. The first job has computed `ahead` tokens more. */
static void share_out(engine *e, const int *left, const uint64_t *key, int ahead, int *got) {
    static engine_job j[4];
    static uint32_t block[1];
    e->n_spans = e->n_rows = e->n_logits = 0;
    for (int i = 0; i < 4; i++) {
        memset(&j[i], 0, sizeof j[i]);
        e->running[i] = left[i] ? &j[i] : NULL;
        j[i].n_prompt = left[i] > 0 ? left[i] : 1, j[i].n_computed = left[i] < 0, j[i].n_out = left[i] < 0, j[i].max_tokens = 100;
        j[i].state = left[i] < 0 ? JOB_DECODE : JOB_PREFILL;
        j[i].kv.block = block, j[i].kv.n_published = INT_MAX / KV_BLOCK, j[i].cache_key = key ? key[i] : (uint64_t)i;
        if (i == 0) j[i].n_prompt += ahead, j[i].n_computed += ahead;
        j[i].token = sys_zalloc((size_t)j[i].n_prompt + 1, sizeof *j[i].token);
        if (key && left[i] == 4999) j[i].token[0] = 1; /* unlike the others */
        got[i] = 0;
    }
    engine_add_decoding(e);
    engine_add_prompts(e, 0);
    for (int s = 0; s < e->n_spans; s++)
        for (int i = 0; i < 4; i++)
            if (e->span[s].job == &j[i] && e->span[s].prefill) got[i] = e->span[s].n;
    for (int i = 0; i < 4; i++) free(j[i].token);
}

/* Prompts share a batch evenly, short ones leave the rest of their share to long ones; where there is hardly anything
 * to share, everybody gets a turn. */
static void test_shares(void) {
    static engine e;
    model m;
    int got[4], served[4] = {0};
    memset(&e, 0, sizeof e), memset(&m, 0, sizeof m);
    m.n_layer = 16, e.m = &m, e.options.chunk = 1000, e.options.n_parallel = 4, e.run.max_tokens = ENGINE_MAX_ROWS;
    pthread_mutex_init(&e.lock, NULL);
    for (int k = 0; k < COST_KNOTS; k++) e.stats.cost.seconds[k] = 0.020 + 0.0015 * engine_knots[k];
    e.stats.prefill_rate = 600, e.stats.decode_rate = 45; /* 320 ms hold 200 tokens */
    share_out(&e, (int[4]){5000, 10, 5000, 30}, NULL, 0, got);
    CHECK(got[1] == 10 && got[3] == 30 && abs(got[0] - got[2]) <= 1 && e.n_rows >= 195 && e.n_rows <= 200, "shares: %d %d %d %d", got[0], got[1], got[2], got[3]);
    share_out(&e, (int[4]){0, 5000, 0, 0}, NULL, 0, got);
    CHECK(got[1] >= 195 && got[1] <= 200, "a prompt alone: %d", got[1]);
    share_out(&e, (int[4]){-1, 5000, 4, -1}, NULL, 0, got); /* 40 ms hold 26 */
    CHECK(got[2] == 4 && got[1] >= 20 && got[1] <= 22 && e.n_rows == got[1] + 6, "beside two that decode: %d and %d of %d rows", got[1], got[2], e.n_rows);
    share_out(&e, (int[4]){5000, 300, 5000, 4999}, (uint64_t[4]){8, 8, 9, 8}, 0, got); /* slot 1 waits for what 0 computes; key and text set 2 and 3 apart */
    CHECK(got[1] == 0 && got[0] >= 65 && got[0] <= 67 && abs(got[0] - got[2]) <= 1 && abs(got[0] - got[3]) <= 1, "one beginning: %d %d %d %d", got[0], got[1],
          got[2], got[3]);
    share_out(&e, (int[4]){5000, 5000, 64, 65}, (uint64_t[4]){8, 8, 8, 8}, KV_BLOCK - 1, got); /* its last token is computed by each job itself */
    CHECK(got[0] > 100 && got[1] == 0 && got[2] == 64 && got[3] == 0, "one beginning, one ahead: %d %d %d %d", got[0], got[1], got[2], got[3]);
    share_out(&e, (int[4]){5000, 5000, 0, 0}, (uint64_t[4]){8, 8, 8, 8}, KV_BLOCK, got); /* that block is done, and not shared for some reason */
    CHECK(got[0] >= 95 && got[1] >= 95, "one beginning, a block ahead: %d %d", got[0], got[1]);
    e.options.chunk = 7; /* of 200 */
    share_out(&e, (int[4]){5000, 5000, 5000, 5000}, NULL, 0, got);
    CHECK(e.n_rows == 7, "--chunk 7: %d rows", e.n_rows);
    e.options.chunk = 1000;
    for (int k = 0; k < COST_KNOTS; k++) e.stats.cost.seconds[k] = 0.040 * engine_knots[k]; /* 8 tokens, and two prompts get theirs */
    for (int i = 0; i < 8; i++) {
        share_out(&e, (int[4]){5000, 6, 5000, 5000}, NULL, 0, got);
        CHECK(e.n_rows >= 4 && e.n_rows <= 8, "a slow machine: %d rows", e.n_rows);
        for (int k = 0; k < 4; k++) served[k] += got[k];
    }
    for (int k = 0; k < 4; k++) CHECK(served[k] == 16, "a slow machine: slot %d got %d tokens of 64", k, served[k]);
}

/* 64 jobs of one size: from when the last has begun until the first ends, all get the same number of tokens. */
static void test_fairness(void) {
    enum { N = 64 };
    const int tokens = slow() ? 120 : 300;
    engine *e = open_engine(N, 64, 0);
    static life l[N];
    dice d = {21};
    int base[N], began = 0, first = 0, least = INT_MAX, most = 0;
    await_costs(e);
    for (int i = 0; i < N; i++) {
        random_job(&l[i], &d, 5000, i);
        engine_job *j = l[i].job;
        j->prompt.len = 0, buf_printf(&j->prompt, "%d is the number of this job", i);
        j->max_tokens = tokens, j->ignore_eos = 1, j->speculate = 0, j->deadline_unix_ms = 0, j->n_stop = 0;
        if (engine_submit(e, j)) complain("job %d is not taken", i);
    }
    for (double end = sys_now() + 60; !first && sys_now() < end; nap(0.05)) {
        pthread_mutex_lock(&e->lock); /* tokens are counted under it */
        int begun = 0;
        for (int i = 0; i < N; i++) begun += l[i].job->n_out > 0, first |= l[i].job->state == JOB_DONE;
        for (int i = 0; i < N && begun == N && !began; i++) base[i] = l[i].job->n_out;
        if (begun == N && !first) began = 1;
        for (int i = 0; i < N && first && began; i++) {
            int got = l[i].job->n_out - base[i];
            least = got < least ? got : least, most = got > most ? got : most;
        }
        pthread_mutex_unlock(&e->lock);
    }
    CHECK(first && began && most >= 10 && most - least <= 2, "64 jobs together: began %d, ended %d, from %d to %d tokens each", began, first, least, most);
    for (int i = 0; i < N; i++) {
        while (!is_done(&l[i])) nap(0.2);
        CHECK(l[i].last == EVENT_END && l[i].out == tokens && !l[i].faults, "job %d", i);
        engine_job_drop(e, l[i].job);
    }
    check_blocks(e, 5000);
    engine_close(e);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {
        {"costs of batches are learned", test_costs},
        {"prompts take no more than their slices", test_chunks},
        {"prompts share a batch evenly", test_shares},
        {"64 jobs at once are served alike", test_fairness},
        {"jobs at random: one terminal event each, nothing left, sums add up [SYS-6.3.5]", test_interleavings},
        {"the same where KV blocks and queue are scarce", test_scarcity},
        {"the same with a drain at a random moment [SYS-7.2]", test_drain},
        {"an engine that is closed ends its jobs", test_close},
        {"jobs are charged what the process spends", test_cpu},
    };
    int bad = 0;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= strstr(tests[i].name, argv[k]) != NULL;
        if (!wanted) continue;
        failed = details = 0;
        tests[i].run();
        printf("%s - %s\n", failed ? "not ok" : "ok", tests[i].name);
        fflush(stdout);
        bad |= failed;
    }
    return bad;
}
