/* SPDX-License-Identifier: MIT
 *
 * quality: what quantisation and its arithmetic cost, for lorch and for llama.cpp.
 *
 *   cc -O1 tests/quality.c -o quality -ldl -lm && LORCH=./lorch ./quality LIBRARY-DIRECTORY [NAME-PART]
 *
 * A model in full precision is quantised by llama.cpp's library and unpacked again to F32. The unpacked one, run by
 * llama.cpp with everything in F32, is the truth: the same weights without any rounding of activations. From it, over all
 * tokens at 64 positions, the mean KL divergence of lorch's distributions on the quantised file must be below 0.01, and
 * no more than 1.5 times that of llama.cpp's own (with an allowance of 0.0001, where both are next to nothing).
 * The library comes with the npm package @node-llama-cpp/linux-x64 (or linux-arm64), in bins/. */
#define MKMODEL_NO_MAIN
#include "mkmodel.c"

#include <dirent.h>
#include <dlfcn.h>
#include <math.h>
#include <unistd.h>

enum { N_IDS = 64, MAX_VOCAB = 2048 };
static const double MAX_KL = 0.01, MAX_RATIO = 1.5, ALLOWANCE = 0.0001;

typedef float distribution[MAX_VOCAB]; /* natural logarithms */
typedef struct {
    int ids[N_IDS], n_vocab;
    distribution at[N_IDS];
} scores;

/* ==== llama.cpp's library ==================================================================== */

/* Its structs of parameters are larger here than there, which is safe: they go by value through memory. Known by the
 * defaults that they hold: n_ctx at word 0, threads (4) at 7 and 8, flash attention the last of
 * the first four -1, the types of the KV cache (1 for F16) the first pair of ones after that. */
typedef struct {
    int32_t word[256];
} parameters;
typedef struct {
    int32_t n_tokens, *token;
    float *embd;
    int32_t *pos, *n_seq_id, **seq_id;
    int8_t *logits;
} batch;
typedef struct { /* of quantisation, as far as it is used */
    int32_t threads, file_type, output_type, embedding_type;
    uint8_t allow_requantise, rest[1000];
} quantisation;

static struct {
    void (*log_set)(void (*)(int, const char *, void *), void *);
    void (*load_backends)(const char *);
    parameters (*model_defaults)(void), (*context_defaults)(void);
    void *(*model_load)(const char *, parameters), *(*context_new)(void *, parameters);
    void (*model_free)(void *), (*context_free)(void *);
    batch (*batch_new)(int32_t, int32_t, int32_t);
    void (*batch_free)(batch);
    int32_t (*decode)(void *, batch);
    float *(*logits)(void *, int32_t);
    const void *(*vocab)(const void *);
    int32_t (*n_tokens)(const void *);
    quantisation (*quantise_defaults)(void);
    uint32_t (*quantise)(const char *, const char *, const quantisation *);
} peer;

static void quiet(int level, const char *text, void *user) { (void)level, (void)text, (void)user; }

static void *open_library(const char *dir, const char *prefix) {
    char path[1000] = "";
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));)
        if (strncmp(e->d_name, prefix, strlen(prefix)) == 0 && strstr(e->d_name, ".so")) snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    if (d) closedir(d);
    return *path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
}

static int open_peer(const char *dir) {
    void *ggml = open_library(dir, "libggml.v"), *llama = open_library(dir, "libllama.v");
    const struct {
        void *library, *function;
        const char *name;
    } symbols[] = {
        {ggml, &peer.load_backends, "ggml_backend_load_all_from_path"},
        {llama, &peer.log_set, "llama_log_set"},
        {llama, &peer.model_defaults, "llama_model_default_params"},
        {llama, &peer.context_defaults, "llama_context_default_params"},
        {llama, &peer.model_load, "llama_model_load_from_file"},
        {llama, &peer.context_new, "llama_init_from_model"},
        {llama, &peer.model_free, "llama_model_free"},
        {llama, &peer.context_free, "llama_free"},
        {llama, &peer.batch_new, "llama_batch_init"},
        {llama, &peer.batch_free, "llama_batch_free"},
        {llama, &peer.decode, "llama_decode"},
        {llama, &peer.logits, "llama_get_logits_ith"},
        {llama, &peer.vocab, "llama_model_get_vocab"},
        {llama, &peer.n_tokens, "llama_vocab_n_tokens"},
        {llama, &peer.quantise_defaults, "llama_model_quantize_default_params"},
        {llama, &peer.quantise, "llama_model_quantize"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = symbols[i].library ? dlsym(symbols[i].library, symbols[i].name) : NULL;
        if (!found) return printf("not ok - llama.cpp's library opens\n# no %s in %s\n", symbols[i].name, dir), -1;
        memcpy(symbols[i].function, &found, sizeof found);
    }
    peer.log_set(quiet, NULL);
    peer.load_backends(dir);
    return 0;
}

/* A context of 512 tokens, one thread, a KV cache in F32, no flash attention; -1 where the words are not as known. */
static int context_parameters(parameters *p) {
    int w = 1;
    *p = peer.context_defaults();
    p->word[0] = 512;
    if (p->word[7] == 4 && p->word[8] == 4) p->word[7] = p->word[8] = 1;
    while (w < 60 && !(p->word[w] == -1 && p->word[w + 1] == -1 && p->word[w + 2] == -1 && p->word[w + 3] == -1)) w++;
    p->word[w + 3] = 0;
    while (w < 60 && !(p->word[w] == 1 && p->word[w + 1] == 1)) w++;
    p->word[w] = p->word[w + 1] = 0;
    return w < 60 ? 0 : -1;
}

static void log_softmax(const float *logits, int n, float *out) {
    double most = logits[0], sum = 0;
    for (int i = 1; i < n; i++) most = logits[i] > most ? logits[i] : most;
    for (int i = 0; i < n; i++) sum += exp(logits[i] - most);
    for (int i = 0; i < n; i++) out[i] = (float)(logits[i] - most - log(sum));
}

static const char *peer_score(const char *path, scores *s) {
    void *model = peer.model_load(path, peer.model_defaults());
    parameters p;
    void *context = model && context_parameters(&p) == 0 ? peer.context_new(model, p) : NULL;
    const char *wrong = context ? NULL : "llama.cpp does not load it";
    if (!wrong && (s->n_vocab = peer.n_tokens(peer.vocab(model))) > MAX_VOCAB) wrong = "too many tokens";
    if (!wrong) {
        batch b = peer.batch_new(N_IDS, 0, 1);
        b.n_tokens = N_IDS;
        for (int i = 0; i < N_IDS; i++) b.token[i] = s->ids[i], b.pos[i] = i, b.n_seq_id[i] = 1, b.seq_id[i][0] = 0, b.logits[i] = 1;
        if (peer.decode(context, b)) wrong = "llama_decode failed";
        for (int i = 0; i < N_IDS && !wrong; i++) log_softmax(peer.logits(context, i), s->n_vocab, s->at[i]);
        peer.batch_free(b);
    }
    if (context) peer.context_free(context);
    if (model) peer.model_free(model);
    return wrong;
}

static const char *peer_quantise(const char *from, const char *to, int file_type) {
    quantisation q = peer.quantise_defaults();
    q.threads = 2, q.file_type = file_type, q.allow_requantise = 1;
    return peer.quantise(from, to, &q) ? "llama_model_quantize failed" : NULL;
}

/* ==== lorch ================================================================================== */

static const char *lorch_score(const char *path, scores *s) {
    static char line[MAX_VOCAB * 40], command[2000];
    int n = snprintf(command, sizeof command, "'%s' score '%s' --kv-type f32 --top %d --ids ", getenv("LORCH"), path, s->n_vocab), row = 0;
    for (int i = 0; i < N_IDS; i++) n += snprintf(command + n, sizeof command - (size_t)n, i ? ",%d" : "%d", s->ids[i]);
    FILE *out = popen(command, "r");
    while (out && row < N_IDS && fgets(line, sizeof line, out)) {
        char *p = strstr(line, "\"top\":[");
        int found = 0;
        for (p = p ? p + 7 : line; *p == '['; found++) {
            long id = strtol(p + 1, &p, 10);
            if (id < 0 || id >= s->n_vocab || *p != ',') break;
            s->at[row][id] = strtof(p + 1, &p);
            p += p[1] == ',' ? 2 : 1;
        }
        if (found != s->n_vocab) break;
        row++;
    }
    if (out) while (fgets(line, sizeof line, out)) continue;
    return out && pclose(out) == 0 && row == N_IDS ? NULL : "lorch score failed";
}

static int lorch_tokenize(const char *path, const char *text, int *ids) {
    char command[2000], out[4000] = "";
    snprintf(command, sizeof command, "printf '%%s' '%s' | '%s' tokenize '%s'", text, getenv("LORCH"), path);
    FILE *f = popen(command, "r");
    char *p = f ? fgets(out, sizeof out, f) : NULL;
    int n = 0;
    for (p = p && *p == '[' ? p + 1 : out; n < N_IDS && *p >= '0' && *p <= '9'; p += *p == ',') ids[n++] = (int)strtol(p, &p, 10);
    if (f) pclose(f);
    return n;
}

/* ==== The comparison ========================================================================= */

static double divergence(const scores *from, const scores *of) {
    double sum = 0;
    for (int i = 0; i < N_IDS; i++)
        for (int t = 0; t < from->n_vocab; t++) sum += exp(from->at[i][t]) * ((double)from->at[i][t] - of->at[i][t]);
    return sum / N_IDS;
}

static double largest(const scores *a, const scores *b) { /* among the eight most likely, as in tests/expected */
    double worst = 0;
    for (int i = 0; i < N_IDS; i++) {
        float least = INFINITY;
        for (int n = 0; n < 8; n++) {
            float next = -INFINITY;
            for (int t = 0; t < a->n_vocab; t++)
                if (a->at[i][t] < least && a->at[i][t] > next) next = a->at[i][t];
            least = next;
        }
        for (int t = 0; t < a->n_vocab; t++)
            if (a->at[i][t] >= least) worst = fmax(worst, fabs((double)a->at[i][t] - b->at[i][t]));
    }
    return worst;
}

static int compare(const char *name, const char *quantised, const char *unpacked, scores *truth) {
    static scores ours, theirs;
    const char *wrong = peer_quantise(quantised, unpacked, 0);
    if (!wrong) wrong = peer_score(unpacked, truth);
    ours = theirs = *truth;
    if (!wrong) wrong = peer_score(quantised, &theirs);
    if (!wrong) wrong = lorch_score(quantised, &ours);
    double a = wrong ? NAN : divergence(truth, &ours), b = wrong ? NAN : divergence(truth, &theirs);
    int ok = !wrong && a <= MAX_KL && a <= MAX_RATIO * b + ALLOWANCE;
    printf("%s - %s\n", ok ? "ok" : "not ok", name);
    if (wrong) printf("# %s\n", wrong);
    else
        printf("# KL divergence %.6f, llama.cpp's %.6f; largest difference %.4f, llama.cpp's %.4f, of each other %.4f\n", a, b,
               largest(truth, &ours), largest(truth, &theirs), largest(&theirs, &ours));
    return ok ? 0 : 1;
}

static const struct {
    const char *name;
    int file_type;
} file_types[] = {{"F16", 1},     {"Q8_0", 7},    {"Q6_K", 18},  {"Q5_K_M", 17}, {"Q5_1", 9},    {"Q5_0", 8},   {"Q4_K_M", 15},
                  {"Q4_1", 3},    {"Q4_0", 2},    {"IQ4_NL", 25}, {"IQ4_XS", 30}, {"Q3_K_M", 12}, {"Q2_K", 10},  {"MXFP4_MOE", 38}};

/* Sources: a file, or what mkmodel makes; and the file types to try. Rows of 256 are needed for the K formats. */
static const struct {
    const char *name, *make, *types;
} sources[] = {
    {"lorch-tiny", NULL, "F16 Q8_0 Q6_K Q5_K_M Q5_1 Q5_0 Q4_K_M Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_M Q2_K"},
    {"llama", "llama f32 embd=256 ff=768 seed=80", "F16 Q8_0 Q6_K Q5_K_M Q5_1 Q5_0 Q4_K_M Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_M Q2_K"},
    {"llama with experts", "llama f32 embd=256 ff=512 experts=6 used=4 layers=2 seed=81", "Q8_0 Q4_K_M Q4_0"},
    {"qwen2", "qwen2 f32 embd=256 ff=768 heads=8 seed=82 hd=32", "Q8_0 Q4_K_M"},
    {"qwen3", "qwen3 f32 embd=256 ff=768 heads=8 seed=83", "Q8_0 Q4_K_M"},
    {"qwen3moe", "qwen3moe f32 embd=256 ff_exp=256 seed=84", "Q8_0 Q4_K_M Q5_K_M"},
    {"gemma2", "gemma2 f32 embd=256 ff=512 seed=85", "Q8_0 Q4_K_M"},
    {"gemma3", "gemma3 f32 embd=256 ff=512 seed=86", "Q8_0 Q4_K_M Q4_0"},
    {"phi3", "phi3 f32 embd=256 ff=512 seed=87", "Q8_0 Q4_K_M Q6_K"},
    {"gpt2", "gpt2 f32 embd=256 ff=1024 seed=88", "Q8_0 Q4_K_M"},
    {"gpt-oss", "gpt-oss f32 embd=256 ff_exp=256 rope_type=yarn rope_scaling=8 rope_orig=32 seed=89", "MXFP4_MOE Q8_0 Q4_K_M"},
    {"olmo2", "olmo2 f32 embd=256 ff=512 seed=90", "Q8_0 Q4_K_M"},
    {"granitemoe", "granitemoe f32 embd=256 ff=256 layers=2 seed=91", "Q8_0 Q4_K_M"},
    {"cohere2", "cohere2 f32 embd=256 ff=512 seed=92", "Q8_0 Q4_K_M"},
    {"glm4", "glm4 f32 embd=256 ff=512 seed=93", "Q8_0 Q4_K_M"},
    {"lfm2", "lfm2 f32 embd=256 ff=512 seed=94", "Q8_0 Q4_K_M Q4_0"},
    {"gpt-oss with random MXFP4", "gpt-oss q8_0 exps_format=mxfp4 seed=70", "as-made"},
    {"qwen3moe with random Q4_K", "qwen3moe q4_k seed=71", "as-made"},
    {"gemma3 with random Q8_0", "gemma3 q8_0 seed=72", "as-made"},
    {"phi3 with random Q4_K", "phi3 q4_k seed=73", "as-made"},
    {"lfm2 with random Q4_0", "lfm2 q4_0 seed=74", "as-made"},
};

static int find_type(const char *name) { /* -1: as it was made */
    size_t n = strcspn(name, " ");
    for (size_t t = 0; t < sizeof file_types / sizeof *file_types; t++)
        if (strlen(file_types[t].name) == n && strncmp(file_types[t].name, name, n) == 0) return file_types[t].file_type;
    return -1;
}

static const char STORY[] = "Once upon a time there was a quiet fox named Omar who lived near the river. Omar wanted a green kite more than "
                            "anything. One morning he found 4 red boats near the river. \"These are not mine,\" he said. He asked Nora, a brave owl, "
                            "who had lost them. Nora counted them and smiled. Omar learned that a kind word warms a cold day. The end.";

/* Writes the source and chooses its ids; gives its path, or NULL. */
static const char *make_source(size_t i, const char *path, scores *s) {
    static char copy[300];
    const char *args[24];
    int n = 0;
    if (!sources[i].make) {
        const char *kept = "tests/models/lorch-tiny-f16.gguf";
        return lorch_tokenize(kept, STORY, s->ids) == N_IDS ? kept : NULL;
    }
    snprintf(copy, sizeof copy, "%s", sources[i].make);
    for (char *w = strtok(copy, " "); w && n < 23; w = strtok(NULL, " ")) {
        args[n++] = w;
        if (n == 2) args[n++] = path;
    }
    for (int k = 0; k < N_IDS; k++) s->ids[k] = k ? 3 + k * 7919 % 388 : 1;
    return mkmodel_write(n, args) ? NULL : path;
}

int main(int argc, char **argv) {
    static scores truth;
    char source[600], quantised[640], unpacked[640];
    const char *work = getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    int failed = 0;
    if (argc < 2 || !getenv("LORCH")) return fprintf(stderr, "usage: LORCH=lorch quality LIBRARY-DIRECTORY [NAME-PART]\n"), 2;
    if (open_peer(argv[1])) return 1;
    snprintf(source, sizeof source, "%s/lorch-quality-%ld.gguf", work, (long)getpid());
    snprintf(quantised, sizeof quantised, "%s.q", source), snprintf(unpacked, sizeof unpacked, "%s.f32", source);
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++)
        for (const char *type = sources[i].types; *type; type += strcspn(type, " "), type += *type == ' ') {
            char name[300];
            int file_type = find_type(type);
            snprintf(name, sizeof name, "quantised: %s, %.*s", sources[i].name, (int)strcspn(type, " "), type);
            if (argc > 2 && !strstr(name, argv[2])) continue;
            const char *from = make_source(i, source, &truth);
            const char *wrong = from ? NULL : "the source cannot be made";
            if (!wrong && file_type >= 0) wrong = peer_quantise(from, quantised, file_type);
            if (wrong) failed++, printf("not ok - %s\n# %s\n", name, wrong);
            else failed += compare(name, file_type >= 0 ? quantised : from, unpacked, &truth);
        }
    remove(source), remove(quantised), remove(unpacked);
    return failed != 0;
}
