/* SPDX-License-Identifier: MIT
 *
 * tokenizer: `lorch tokenize` against known ids, and back through `lorch detokenize`.
 *
 *   cc -std=c99 -O1 tests/tokenizer.c -o tokenizer && LORCH=./lorch ./tokenizer [NAME-PART ...]
 *
 * The known ids are llama.cpp's: pairs of files of $LORCH_SHARED/testdata/vocab, X.gguf.inp with
 * texts between lines of __ggml_vocab_test__, X.gguf.out with a line of ids for each.
 */
#include "spawn.h"

#define MKMODEL_NO_MAIN
#include "mkmodel.c"

enum { MAX_IDS = 1 << 18, TEXT_BYTES = 20000, ROUNDS = 3 };

static run_result tokenize(const char *model, const char *text, size_t n, const char *flag) {
    const char *args[] = {"tokenize", model, "--no-bos", flag, NULL};
    return run_input(text, n, args);
}

/* ==== Known ids ============================================================================== */

/* One text; gives what is wrong, or NULL. */
static const char *check_known(const char *model, const char *text, size_t n, const char *ids) {
    static char why[400];
    static int want[MAX_IDS], got[MAX_IDS];
    int n_want = 0, k = 0;
    for (char *end; n_want < MAX_IDS; ids = end) {
        want[n_want] = (int)strtol(ids, &end, 10);
        if (end == ids) break;
        n_want++;
    }
    run_result r = tokenize(model, text, n, NULL);
    int n_got = json_ints(r.out, got, MAX_IDS);
    const char *failure = run_failure(&r);
    while (k < n_want && k < n_got && want[k] == got[k]) k++;
    if (failure) snprintf(why, sizeof why, "%s", failure);
    else if (n_got < 0) snprintf(why, sizeof why, "not a list of ids: %.40s", r.out);
    else if (k == n_want && k == n_got) failure = NULL;
    else
        snprintf(why, sizeof why, "ids differ from the %dth: expected %d (of %d), got %d (of %d)",
                 k, k < n_want ? want[k] : -1, n_want, k < n_got ? got[k] : -1, n_got);
    int ok = !failure && n_got >= 0 && k == n_want && k == n_got;
    run_free(&r);
    return ok ? NULL : why;
}

static void test_known(const char *vocab) {
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char name[200], model[600], path[700];
    const char *wrong = NULL;
    int n_texts = 0;
    snprintf(name, sizeof name, "known ids of the %s vocabulary", vocab);
    if (!wanted(name)) return;
    if (!T.shared) {
        skip(name, "LORCH_SHARED is unset");
        return;
    }
    snprintf(model, sizeof model, "%s/testdata/vocab/ggml-vocab-%s.gguf", T.shared, vocab);
    snprintf(path, sizeof path, "%s.inp", model);
    char *texts = read_whole(path, NULL);
    snprintf(path, sizeof path, "%s.out", model);
    char *ids = read_whole(path, NULL);
    char *text = texts, *line = ids, *end;
    if (!texts || !ids) wrong = "the files cannot be read";
    for (; !wrong && (end = strstr(text, separator)) != NULL; n_texts++) {
        char *next_line = strchr(line, '\n');
        if (!next_line) wrong = "there are fewer lines of ids than texts";
        else {
            *next_line = 0;
            wrong = check_known(model, text, (size_t)(end - text), line);
            line = next_line + 1;
            text = end + strlen(separator);
        }
    }
    report(!wrong && n_texts > 10, name, "text %d: %s", n_texts, wrong ? wrong : "the last");
    free(texts), free(ids);
}

/* ==== There and back ========================================================================= */

/* Ranges of code points, one for each kind that a tokenizer may treat in its own way. */
static const struct {
    uint32_t first, last;
} ranges[] = {
    {' ', ' '},         {'a', 'z'},         {'A', 'Z'},         {'0', '9'},
    {0x21, 0x7E},       {'\t', '\r'},       {0x01, 0x1F},       {0x7F, 0xFF},
    {0x100, 0x24F},     {0x300, 0x36F},     {0x370, 0x5FF},     {0x600, 0x6FF},
    {0x900, 0xDFF},     {0x1100, 0x11FF},   {0x2000, 0x206F},   {0x2500, 0x25FF},
    {0x3000, 0x30FF},   {0x4E00, 0x9FFF},   {0xAC00, 0xD7A3},   {0xE000, 0xF8FF},
    {0xFB00, 0xFFFF},   {0x1D400, 0x1D7FF}, {0x1F300, 0x1FAFF}, {0x20000, 0x2A6DF},
    {0xE0100, 0xE01EF}, {0x10FFF0, 0x10FFFF},
};
enum { N_RANGES = sizeof ranges / sizeof *ranges, SPACE_MARK = 0x2581 };

/* Words that look like control tokens: in a prompt they are plain text. */
static const char *const lures[] = {"<s>",           "</s>",         "<unk>",  "<0x41>",
                                    "<|endoftext|>", "<|im_start|>", "  \n\n", "'ll 'VE don't"};

/* Runs of one to eight characters of one range; now and then a lure. */
static size_t random_text(uint64_t *rng, char *out, size_t size) {
    size_t n = 0;
    while (n + 48 < size) {
        uint64_t r = mk_random(rng), kind = r % (N_RANGES + 12);
        if (r >> 60 == 0) {
            const char *lure = lures[r >> 32 & 7];
            memcpy(out + n, lure, strlen(lure));
            n += strlen(lure);
            continue;
        }
        if (kind >= N_RANGES) kind = kind % 4; /* ASCII is the most common, as in life */
        for (uint64_t run = 1 + (r >> 40) % 8; run > 0; run--) {
            uint32_t span = ranges[kind].last - ranges[kind].first + 1;
            uint32_t c = ranges[kind].first + (uint32_t)(mk_random(rng) % span);
            if (c != SPACE_MARK) n += utf8_put(out + n, c);
        }
    }
    return n;
}

/* Gives what is wrong with the way back of one text, or NULL.  A line feed that ends the output
 * of a command is allowed. */
static const char *check_back(const char *model, const char *text, size_t n) {
    static char why[400];
    const char *args[] = {"detokenize", model, NULL};
    run_result there = tokenize(model, text, n, NULL), back = {0};
    const char *failure = run_failure(&there);
    if (failure) {
        snprintf(why, sizeof why, "tokenize: %.350s", failure);
        run_free(&there);
        return why;
    }
    back = run_input(there.out, there.out_len, args);
    failure = run_failure(&back);
    size_t same = 0;
    while (same < n && same < back.out_len && text[same] == back.out[same]) same++;
    int newline = back.out_len == n + 1 && back.out[n] == '\n';
    int ok = !failure && same == n && (back.out_len == n || newline);
    if (failure) snprintf(why, sizeof why, "detokenize: %.350s", failure);
    else
        snprintf(why, sizeof why, "%zu bytes came back of %zu, different from byte %zu, %02x %02x",
                 back.out_len, n, same, same < n ? (uint8_t)text[same] : 0,
                 same + 1 < n ? (uint8_t)text[same + 1] : 0);
    run_free(&there), run_free(&back);
    return ok ? NULL : why;
}

/* Few long texts, many short ones: beginnings matter for the space prefix. */
static const char *check_random(const char *model) {
    static char text[TEXT_BYTES];
    static const char *const edges[] = {"",   " ",  "  ",  "\n", " a",   "a ",
                                        "a",  "\t", "a\n", ".",  " \n ", "\xC3\xA9"};
    uint64_t rng = 1;
    const char *wrong = NULL;
    for (size_t i = 0; i < sizeof edges / sizeof *edges && !wrong; i++)
        wrong = check_back(model, edges[i], strlen(edges[i]));
    for (int i = 0; i < ROUNDS && !wrong; i++)
        wrong = check_back(model, text, random_text(&rng, text, sizeof text));
    for (int i = 0; i < ROUNDS && !wrong; i++)
        wrong = check_back(model, text, random_text(&rng, text, 64));
    return wrong;
}

static const struct back_case {
    const char *name, *shared_path, *make[8];
} back_cases[] = {
    {"a SentencePiece vocabulary", NULL, {"vocab_only=1", "vocab=1500"}},
    {"a SentencePiece vocabulary without prefix", NULL,
     {"vocab_only=1", "kv:tokenizer.ggml.add_space_prefix=bool:0"}},
    {"a BPE vocabulary, gpt-2", NULL, {"vocab_only=1", "tokenizer=bpe", "vocab=2000"}},
    {"a BPE vocabulary, default", NULL, {"vocab_only=1", "tokenizer=bpe", "pre=default"}},
    {"a BPE vocabulary, llama-bpe", NULL,
     {"vocab_only=1", "tokenizer=bpe", "vocab=900", "pre=llama-bpe"}},
    {"a BPE vocabulary, qwen2", NULL, {"vocab_only=1", "tokenizer=bpe", "pre=qwen2"}},
    {"a vocabulary of an unknown architecture", NULL,
     {"vocab_only=1", "tokenizer=bpe", "arch=mamba"}},
    {"the gpt-2 vocabulary", "testdata/vocab/ggml-vocab-gpt-2.gguf", {NULL}},
    {"the qwen2 vocabulary", "testdata/vocab/ggml-vocab-qwen2.gguf", {NULL}},
    {"the mpt vocabulary", "testdata/vocab/ggml-vocab-mpt.gguf", {NULL}},
    {"the phi-3 vocabulary", "testdata/vocab/ggml-vocab-phi-3.gguf", {NULL}},
    {"the vocabulary of stories260K", "testdata/models/stories260K.gguf", {NULL}},
    {"the vocabulary of lorch-tiny", "models/lorch-tiny-q8_0.gguf", {NULL}},
};

static void test_back(const struct back_case *c) {
    char name[200], path[700];
    const char *args[16] = {"llama", "f32", path}, *wrong = NULL;
    int n = 3;
    snprintf(name, sizeof name, "random text there and back: %s", c->name);
    if (!wanted(name)) return;
    if (c->shared_path && !T.shared) {
        skip(name, "LORCH_SHARED is unset");
        return;
    }
    if (c->shared_path) {
        snprintf(path, sizeof path, "%s/%s", T.shared, c->shared_path);
    } else {
        snprintf(path, sizeof path, "%s", scratch("model.gguf"));
        for (int i = 0; c->make[i]; i++) args[n++] = c->make[i];
        if (mkmodel_write(n, args)) wrong = "mkmodel failed";
    }
    if (!wrong) wrong = check_random(path);
    report(!wrong, name, "%s", wrong ? wrong : "");
}

/* ==== Known answers of made vocabularies ===================================================== */

/* In mkmodel's vocabularies the ids can be worked out by hand: see mk_vocab_spm, mk_vocab_bpe.
 * In the first, letter k of "etaoinshrdlu..." is token 260 + k and <0xNN> is 3 + 0xNN. */
static const struct made_case {
    const char *name, *make[6], *flag, *text, *ids;
} made_cases[] = {
    {"nothing", {"vocab=333"}, NULL, "", ""},
    {"bytes that no token covers", {"vocab=333"}, NULL, "\xC3\xA9", "259 198 172"},
    {"space prefix", {"vocab=333"}, NULL, "e", "259 260"},
    {"space prefix off", {"vocab=333", "kv:tokenizer.ggml.add_space_prefix=bool:0"}, NULL, "e",
     "260"},
    {"control tokens as text", {"vocab=333"}, NULL, "</s>", "259 63 50 266 65"},
    {"control tokens where asked", {"vocab=333"}, "--special", "</s>", "2"},
    {"a merge", {"tokenizer=bpe", "vocab=300"}, NULL, " e", "259"},
    {"the last of two spaces joins the word", {"tokenizer=bpe"}, NULL, "  e", "32 259"},
    {"earlier merges first", {"tokenizer=bpe"}, NULL, "eten", "286 290"},
    {"control tokens as text in BPE", {"tokenizer=bpe", "vocab=300"}, NULL, "<|im_end|>",
     "60 124 105 109 95 290 100 124 62"},
    {"control tokens where asked in BPE", {"tokenizer=bpe", "vocab=300"}, "--special",
     "e<|im_end|>", "101 299"},
    {"any number of digits in gpt-2", {"tokenizer=bpe"}, NULL, "1234", "258"},
    {"three digits in default", {"tokenizer=bpe", "pre=default"}, NULL, "1234", "257 52"},
    {"three digits in llama-bpe", {"tokenizer=bpe", "pre=llama-bpe"}, NULL, "1234", "257 52"},
    {"digits one by one in qwen2", {"tokenizer=bpe", "pre=qwen2"}, NULL, "1234", "49 50 51 52"},
    {"digits from the right in superbpe", {"tokenizer=bpe", "pre=superbpe"}, NULL, "1234", "49 50 51 52"},
    {"a file that names no pre-tokenizer has the default", {"tokenizer=bpe", "kv:tokenizer.ggml.pre=none"}, NULL, "1234", "257 52"},
    {"EOS where the file says so, but not where BOS is unwanted", {"vocab=333", "kv:tokenizer.ggml.add_eos_token=bool:1"}, NULL, "e", "259 260"},
};

static void test_made(const struct made_case *c) {
    char name[200], path[300], want[200], got[200] = "";
    const char *args[16] = {"llama", "f32", path, "vocab_only=1"};
    int n = 4, ids[64], n_ids;
    snprintf(name, sizeof name, "tokens of a made vocabulary: %s", c->name);
    if (!wanted(name)) return;
    snprintf(path, sizeof path, "%s", scratch("model.gguf"));
    for (int i = 0; c->make[i]; i++) args[n++] = c->make[i];
    int failed = mkmodel_write(n, args);
    run_result r = tokenize(path, c->text, strlen(c->text), c->flag);
    n_ids = json_ints(r.out, ids, 64);
    for (int i = 0; i < n_ids; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), i ? " %d" : "%d", ids[i]);
    snprintf(want, sizeof want, "%s", c->ids);
    int ok = !failed && r.status == 0 && n_ids >= 0 && strcmp(want, got) == 0;
    report(ok, name, ok ? "" : "expected [%s], got [%s] %s", want, got, r.err);
    run_free(&r);
}

/* A tokenizer or pre-tokenizer that lorch does not know is refused by name; --pre chooses another pre-tokenizer. */
static void test_refused(void) {
    static const struct { const char *name, *make[3], *pre, *says; } rows[] = {
        {"an unknown pre-tokenizer", {"tokenizer=bpe", "pre=of-tomorrow"}, NULL, "'of-tomorrow' is not supported"},
        {"one that is not byte-level", {"tokenizer=bpe", "pre=gemma4"}, NULL, "'gemma4' is not supported"},
        {"an unknown pre-tokenizer in --pre", {"tokenizer=bpe"}, "of-today", "'of-today' is not supported"},
        {"another by --pre", {"tokenizer=bpe", "pre=of-tomorrow"}, "qwen2", NULL},
        {"WordPiece", {"kv:tokenizer.ggml.model=str:bert"}, NULL, "'bert' (WordPiece)"},
        {"Unigram", {"kv:tokenizer.ggml.model=str:t5"}, NULL, "'t5' (Unigram)"},
        {"an unknown tokenizer", {"kv:tokenizer.ggml.model=str:abacus"}, NULL, "'abacus' (unknown)"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char name[200], path[300];
        snprintf(name, sizeof name, "what is unknown is refused by name: %s", rows[i].name);
        if (!wanted(name)) continue;
        snprintf(path, sizeof path, "%s", scratch("model.gguf"));
        const char *make[8] = {"llama", "f32", path, "vocab_only=1"}, *args[] = {"tokenize", path, rows[i].pre ? "--pre" : NULL, rows[i].pre, NULL};
        int n = 4;
        for (int k = 0; rows[i].make[k]; k++) make[n++] = rows[i].make[k];
        int failed = mkmodel_write(n, make);
        run_result r = run_input("e", 1, args);
        int ok = !failed && (rows[i].says ? r.status == 1 && strstr(r.err, rows[i].says) && strchr(r.err, '\n') == r.err + strlen(r.err) - 1 : r.status == 0);
        report(ok, name, "exit status %d: %s", r.status, r.err);
        run_free(&r);
    }
}

/* ==== Time =================================================================================== */

/* A run of one letter is the worst case of a merge that looks for the best pair each time; in
 * O(n log n) a megabyte takes about a second even under sanitizers. */
static void test_time(const char *tokenizer, const char *what, const char *unit) {
    enum { LONG = 1 << 20, LIMIT_S = 20 };
    char name[200], path[300], option[40];
    snprintf(name, sizeof name, "a megabyte of %s takes no square time: %s", what, tokenizer);
    if (!wanted(name)) return;
    snprintf(path, sizeof path, "%s", scratch("model.gguf"));
    snprintf(option, sizeof option, "tokenizer=%s", tokenizer);
    const char *args[] = {"llama", "f32", path, "vocab_only=1", "vocab=2000", option};
    int failed = mkmodel_write(6, args);
    char *text = malloc(LONG);
    if (!text) perror("malloc"), exit(1);
    size_t n = 0;
    for (; n + strlen(unit) <= LONG; n += strlen(unit)) memcpy(text + n, unit, strlen(unit));
    run_result r = tokenize(path, text, n, NULL);
    report(!failed && r.status == 0 && r.out_len > 1000 && r.seconds < LIMIT_S, name,
           "%.2f seconds, exit status %d", r.seconds, r.status);
    run_free(&r);
    free(text);
}

int main(int argc, char **argv) {
    static const char *const vocabs[] = {"gpt-2", "qwen2", "phi-3", "falcon", "mpt"};
    begin(argc, argv);
    for (size_t i = 0; i < sizeof made_cases / sizeof *made_cases; i++) test_made(&made_cases[i]);
    for (size_t i = 0; i < sizeof vocabs / sizeof *vocabs; i++) test_known(vocabs[i]);
    for (size_t i = 0; i < sizeof back_cases / sizeof *back_cases; i++) test_back(&back_cases[i]);
    test_refused();
    test_time("spm", "one letter", "e");
    test_time("bpe", "one letter", "e");
    test_time("spm", "spaces", " ");
    test_time("bpe", "emoji", "\xF0\x9F\x98\x80");
    return finish();
}
