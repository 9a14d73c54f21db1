/* SPDX-License-Identifier: MIT
 *
 * lorch.h: run a GGUF language model on the CPU from a C program.
 *
 *   cc -c -DLORCH_NO_MAIN lorch.c -o lorch.o
 *   cc yours.c lorch.o -o yours -lpthread -lm
 *
 * Ownership: a lorch is made by lorch_load and ended by lorch_free; everything it returns a pointer to
 * lives until then, unless said otherwise. Nothing that you pass is kept after the call returns.
 *
 * Threads: any number of threads may call any function but lorch_free on one lorch at the same time.
 * Several lorch_generate calls run together, their tokens batched; each gives the same result as alone.
 *
 * Errors: functions return 0 (or NULL) on failure and write one line into the `error` they are given.
 * Nothing here prints, exits or aborts.
 *
 * Not promised: the layout of lorch_options and lorch_params between versions (use lorch_defaults and
 * lorch_params_defaults, then set fields), and the wording of messages. */
#ifndef LORCH_H
#define LORCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct lorch lorch;

enum { LORCH_ERROR_BYTES = 512 }; /* room enough for every message */

typedef enum { LORCH_KV_F16, LORCH_KV_F32, LORCH_KV_Q8_0 } lorch_kv_type;

typedef struct {
    int n_threads;        /* compute threads; 0: affinity, CPU quota and physical cores decide */
    int n_ctx;            /* positions in a sequence, prompt and output together; 0: the model's, if it fits */
    int n_parallel;       /* generations that run at the same time; more wait. Default 4 */
    int n_queue;          /* generations that may wait. Default 32 */
    int chunk;            /* prompt tokens that are computed in one step at most; 0: 192 */
    int no_speculate;     /* decode one token a step. The output is the same; where text repeats, it comes slower */
    lorch_kv_type kv_type; /* numbers in the KV cache */
    uint64_t kv_bytes;    /* size of the KV pool; 0: n_parallel x n_ctx, at most a quarter of available memory */
    const char *pre;      /* pre-tokenizer to use instead of the one that the file names; NULL: the file's */
} lorch_options;

/* Called while a long prompt is computed: done of its total tokens. On the thread that called lorch_generate. */
typedef void (*lorch_progress_fn)(int done, int total, void *user);

typedef struct {
    int max_tokens;           /* most tokens to generate, 1..n_ctx; cut to what the context leaves */
    float temperature;        /* 0 (greedy) .. 2 */
    float top_p;              /* 0..1; 1: off */
    float min_p;              /* 0..1; 0: off */
    float repetition_penalty; /* above 0, up to 2; 1: off */
    int top_k;                /* 0: off */
    uint64_t seed;            /* decides every draw */
    int special;              /* read control tokens in the prompt as such */
    int ignore_eos;           /* never choose an end-of-generation token */
    const char *const *stop;  /* n_stop strings that end the generation; their text is not given out */
    int n_stop;               /* 0..4 */
    lorch_progress_fn progress; /* may be NULL; gets the `user` of lorch_generate */
} lorch_params;

typedef enum { /* why a generation ended */
    LORCH_FAILED,         /* see `error` */
    LORCH_MAX_TOKENS,
    LORCH_EOS,
    LORCH_STOP_SEQUENCE,
    LORCH_CANCELLED       /* by lorch_cancel, or because the callback returned nonzero */
} lorch_reason;

typedef struct { /* one generated token */
    int32_t id;
    int index;        /* from 0 */
    const char *text; /* UTF-8, whole code points, ends in NUL; "" while text is held back. Valid during the call */
    size_t len;       /* bytes of text: it may contain NULs */
} lorch_token;

typedef struct {
    int prompt_tokens, tokens_out;
    int cached_tokens;       /* of the prompt, that an earlier generation had computed */
    int drafted_tokens, accepted_tokens; /* looked up in the text itself instead of computed one by one; those that were right */
    int stop_matched;        /* index of the stop string, or -1 */
    double prefill_seconds, decode_seconds;
} lorch_stats;

typedef struct { /* bytes */
    uint64_t weights;   /* of the model file, mapped and shared with other processes */
    uint64_t kv;        /* the KV pool */
    uint64_t scratch;   /* everything else that is private */
} lorch_memory;

/* Called on the thread that called lorch_generate, once for each token, in order. Return nonzero to stop. */
typedef int (*lorch_token_fn)(const lorch_token *token, void *user);

const char *lorch_version(void); /* "0.1.0" */
void lorch_defaults(lorch_options *options);
void lorch_params_defaults(lorch_params *params);

/* Maps and checks a model file and starts the threads. options may be NULL. NULL on error. */
lorch *lorch_load(const char *path, const lorch_options *options, char error[LORCH_ERROR_BYTES]);

/* Cancels what runs, waits for it and releases everything. No other call may be running or follow. */
void lorch_free(lorch *l);

/* Token ids of a text of len bytes: writes up to cap of them to ids and returns how many there are (which
 * may be more than cap), or -1 if the text is not UTF-8 or memory ran out. add_bos: begin (and end) as a prompt does.
 * special: read control tokens as such. */
int lorch_tokenize(const lorch *l, const char *text, size_t len, int add_bos, int special, int32_t *ids, int cap);

/* The text of n ids: writes up to cap bytes, with a NUL if there is room, and returns its length, or -1
 * when memory ran out. */
long lorch_detokenize(const lorch *l, const int32_t *ids, int n, int special, char *text, size_t cap);

/* Generates from a prompt of len bytes and calls fn (may be NULL) for each token. `key` (may be NULL) names
 * the generation for lorch_cancel; stats may be NULL. Blocks until the generation has ended. */
lorch_reason lorch_generate(lorch *l, const char *key, const char *prompt, size_t len, const lorch_params *params,
                            lorch_token_fn fn, void *user, lorch_stats *stats, char error[LORCH_ERROR_BYTES]);

/* Ends the generation of that name within a layer's time; its lorch_generate returns LORCH_CANCELLED.
 * Returns 1 if there was one. Any thread. */
int lorch_cancel(lorch *l, const char *key);

lorch_memory lorch_memory_used(const lorch *l);
int lorch_context_length(const lorch *l);
int lorch_vocab_size(const lorch *l);

#ifdef __cplusplus
}
#endif
#endif
