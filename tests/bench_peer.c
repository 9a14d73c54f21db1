/* bench_peer.c: llama.cpp's prebuilt library (npm package node-llama-cpp), decoding several sequences in one batch. MIT licence.
 *
 *   bench_peer MODEL.gguf LIBRARY-DIRECTORY [THREADS] [TOKENS] [ROUNDS]
 *
 * Prints one line for 1, 2, 4, 8 and 16 sequences: tokens per second of all together, the median of the rounds. Built and
 * run by tests/bench_engine.sh. Declared here is only what is called; parameter structs go by value, larger than the
 * real ones, which is safe for reading them back. Of the context's the front is set: [0] n_ctx [1] n_batch [2] n_ubatch
 * [3] n_seq_max [7] n_threads [8] n_threads_batch, 32 bits each. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef struct { int32_t word[256]; } params;
typedef struct { int32_t n_tokens; int32_t *token; float *embd; int32_t *pos, *n_seq_id, **seq_id; int8_t *logits; } batch;

params llama_model_default_params(void);
params llama_context_default_params(void);
void *llama_model_load_from_file(const char *path, params);
void *llama_init_from_model(void *model, params);
int llama_decode(void *ctx, batch);
void *llama_get_memory(void *ctx);
void llama_memory_clear(void *memory, _Bool data);
void llama_log_set(void (*fn)(int, const char *, void *), void *);
void ggml_backend_load_all_from_path(const char *dir);

static void quiet(int level, const char *text, void *user) { (void)level, (void)text, (void)user; }

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static int ascending(const void *a, const void *b) {
    double d = *(const double *)a - *(const double *)b;
    return (d > 0) - (d < 0);
}

enum { MOST = 16 };

static double decode(void *ctx, int n, int tokens) { /* milliseconds of so many steps of n sequences */
    int32_t token[MOST], pos[MOST], one[MOST], seq[MOST], *seqs[MOST];
    int8_t logits[MOST];
    batch b = {n, token, NULL, pos, one, seqs, logits};
    double from = 0;
    llama_memory_clear(llama_get_memory(ctx), 1);
    for (int step = 0; step <= tokens; step++) {
        for (int i = 0; i < n; i++) token[i] = 3 + (1000 + step * 7919 + i * 131) % 30000, pos[i] = step, one[i] = 1, seq[i] = i, seqs[i] = &seq[i], logits[i] = 1;
        if (llama_decode(ctx, b)) return -1;
        if (step == 0) from = now_ms(); /* the first one warms up */
    }
    return now_ms() - from;
}

int main(int argc, char **argv) {
    static const int sizes[] = {1, 2, 4, 8, 16};
    if (argc < 3) return fprintf(stderr, "usage: bench_peer MODEL.gguf LIBRARY-DIRECTORY [THREADS] [TOKENS] [ROUNDS]\n"), 2;
    int threads = argc > 3 ? atoi(argv[3]) : 2, tokens = argc > 4 ? atoi(argv[4]) : 64, rounds = argc > 5 ? atoi(argv[5]) : 3;
    double rate[32], one = 0;
    rounds = rounds < 1 ? 1 : rounds > 32 ? 32 : rounds;
    llama_log_set(quiet, NULL);
    ggml_backend_load_all_from_path(argv[2]);
    void *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    params p = llama_context_default_params();
    p.word[0] = MOST * 256, p.word[1] = p.word[2] = 512, p.word[3] = MOST, p.word[7] = p.word[8] = threads;
    void *ctx = model ? llama_init_from_model(model, p) : NULL;
    if (!ctx) return fprintf(stderr, "bench_peer: cannot load %s\n", argv[1]), 1;
    for (int i = 0; i < 5; i++) {
        for (int r = 0; r < rounds; r++) rate[r] = sizes[i] * tokens * 1e3 / decode(ctx, sizes[i], tokens);
        qsort(rate, (size_t)rounds, sizeof *rate, ascending);
        if (i == 0) one = rate[rounds / 2];
        printf("jobs %2d: %7.1f t/s, %.2f x one\n", sizes[i], rate[rounds / 2], rate[rounds / 2] / one);
    }
    return 0;
}
