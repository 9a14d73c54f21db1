/* SPDX-License-Identifier: MIT
 *
 * tokfuzz: token ids, pieces and end-of-generation tokens against llama.cpp's own library, on random texts.
 *
 *   cc -std=gnu99 -O2 tests/tokfuzz.c -o tokfuzz -ldl -lpthread -lm
 *   ./tokfuzz LIBRARY_DIRECTORY SCRATCH_DIRECTORY VOCABULARY.gguf ...
 *
 * The library comes with the npm package @node-llama-cpp/linux-x64 (or linux-arm64), in bins/. Each vocabulary is compared as it
 * is, and those of byte-level BPE also under the name of every other pre-tokenizer, in copies with another tokenizer.ggml.pre; then
 * vocabularies made at random, for the rules about special tokens. The seed is printed.
 *
 * Environment: LORCH_FUZZ_SEED (1), LORCH_FUZZ_TEXTS (10000 for each vocabulary as it is), LORCH_FUZZ_TEXTS_PRE (300 for each
 * vocabulary and pre-tokenizer), LORCH_FUZZ_MADE (300 made vocabularies). */
#define LORCH_NO_MAIN
#include "../lorch.c"

#include <dirent.h>
#include <dlfcn.h>

enum { TEXT_BYTES = 1 << 14, MOST_IDS = 1 << 15 };

/* ==== The library ============================================================================ */

typedef struct { uint8_t byte[1024]; } llama_params; /* larger than the real one, which is safe for handing it back by value */
enum { VOCAB_ONLY = 72, SET_BY_DEFAULT = 74 };       /* bytes of it, in version 0.5.0; the byte after next is 1 by default */

static struct {
    void (*log_set)(void (*)(int, const char *, void *), void *);
    llama_params (*default_params)(void);
    void *(*load)(const char *path, llama_params);
    void (*free)(void *model);
    const void *(*vocab)(const void *model);
    int32_t (*tokenize)(const void *vocab, const char *text, int32_t len, int32_t *ids, int32_t cap, _Bool add_special, _Bool parse_special);
    int32_t (*piece)(const void *vocab, int32_t id, char *out, int32_t cap, int32_t lstrip, _Bool special);
    _Bool (*is_eog)(const void *vocab, int32_t id);
    int32_t (*n_tokens)(const void *vocab);
} lib;

static void quiet(int level, const char *text, void *user) { (void)level, (void)text, (void)user; }

static void *symbol(void *library, const char *name) {
    void *p = dlsym(library, name);
    if (!p) printf("not ok - the library has %s\n", name), exit(1);
    return p;
}

/* Opens the first file in the directory whose name begins so: libllama.so, libllama.v0.5.0.so. */
static void *open_library(const char *dir, const char *prefix) {
    char path[1024] = "";
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;)
        if (strncmp(e->d_name, prefix, strlen(prefix)) == 0) snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
    if (d) closedir(d);
    void *library = *path ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : NULL;
    if (!library) printf("not ok - the library opens\n# %s in %s: %s\n", prefix, dir, *path ? dlerror() : "not there"), exit(1);
    return library;
}

static void open_llama(const char *dir) {
    open_library(dir, "libggml-base");
    void *ggml = open_library(dir, "libggml."), *llama = open_library(dir, "libllama.");
    void (*load_backends)(const char *) = (void (*)(const char *))symbol(ggml, "ggml_backend_load_all_from_path");
#define TAKE(field, name) *(void **)&lib.field = symbol(llama, name)
    TAKE(log_set, "llama_log_set"), TAKE(default_params, "llama_model_default_params"), TAKE(load, "llama_model_load_from_file");
    TAKE(free, "llama_model_free"), TAKE(vocab, "llama_model_get_vocab"), TAKE(tokenize, "llama_tokenize");
    TAKE(piece, "llama_token_to_piece"), TAKE(is_eog, "llama_vocab_is_eog"), TAKE(n_tokens, "llama_vocab_n_tokens");
    if (getenv("LORCH_FUZZ_LOUD") == NULL) lib.log_set(quiet, NULL);
    load_backends(dir);
    llama_params p = lib.default_params();
    if (p.byte[VOCAB_ONLY] != 0 || p.byte[SET_BY_DEFAULT] != 1) printf("not ok - the library's parameters are where they were\n"), exit(1);
}

/* ==== Random texts =========================================================================== */

static uint64_t dice_state;
static uint32_t dice(uint32_t n) { /* SplitMix64, below n */
    uint64_t z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (uint32_t)((z ^ z >> 31) >> 32) % n;
}
#define PICK(list) (list[dice(sizeof list / sizeof *list)])

static const struct { uint32_t first, last; } scripts[] = {
    {'a', 'z'}, {'a', 'z'}, {'a', 'z'}, {'A', 'Z'}, {'A', 'z'}, {'0', '9'}, {'0', '9'}, {0x21, 0x2f}, {0x3a, 0x7e}, {0x20, 0x7e}, {0x09, 0x0d}, {0x00, 0x1f},
    {0x7f, 0xa0}, {0xa1, 0xff}, {0x100, 0x24f}, {0x250, 0x2ff}, {0x300, 0x36f}, {0x370, 0x3ff}, {0x400, 0x52f}, {0x530, 0x58f}, {0x590, 0x5ff},
    {0x600, 0x6ff}, {0x660, 0x669}, {0x700, 0x8ff}, {0x900, 0x97f}, {0x966, 0x96f}, {0x980, 0xdff}, {0xe00, 0xe7f}, {0xe80, 0xfff}, {0x1000, 0x10ff},
    {0x1100, 0x11ff}, {0x1200, 0x13ff}, {0x1400, 0x177f}, {0x1780, 0x17ff}, {0x1800, 0x1cff}, {0x1d00, 0x1dff}, {0x1e00, 0x1fff}, {0x2000, 0x206f},
    {0x2070, 0x209f}, {0x20a0, 0x20ff}, {0x2100, 0x218f}, {0x2190, 0x23ff}, {0x2460, 0x27bf}, {0x2c00, 0x2dff}, {0x2e80, 0x2fff}, {0x3000, 0x303f},
    {0x3040, 0x30ff}, {0x3100, 0x31ff}, {0x3200, 0x33ff}, {0x3400, 0x4dbf}, {0x4e00, 0x9fff}, {0x4e00, 0x4fff}, {0xa000, 0xabff}, {0xac00, 0xd7a3},
    {0xd7a4, 0xd7ff}, {0xe000, 0xf8ff}, {0xf900, 0xfaff}, {0xfb00, 0xfdff}, {0xfe00, 0xfe6f}, {0xff00, 0xffef}, {0xfff0, 0xffff}, {0x10000, 0x107ff},
    {0x10800, 0x11fff}, {0x12000, 0x1cfff}, {0x1d000, 0x1d7ff}, {0x1e000, 0x1efff}, {0x1f000, 0x1f2ff}, {0x1f300, 0x1f6ff}, {0x1f900, 0x1faff},
    {0x20000, 0x2ffff}, {0x30000, 0x3ffff}, {0xe0000, 0xe01ef}, {0xf0000, 0x10ffff}, {0, 0x10ffff},
};
static const char *const phrases[] = {
    "'s", "'S", "'t", "'re", "'RE", "'Re", "'ve", "'m", "'ll", "'LL", "'lL", "'d", "'D", "'x", "'", "\xe2\x80\x99s", " 's", "can't", "I'm",
    "WE'LL", "it's ", "'sd",
    "Hello", " world", "The", " iPhone", "HTTPServer", " McDonald's", " caf\xc3\xa9", "\xc3\x89" "COLE", "na\xc3\xafve", "e\xcc\x81",
    "\xe0\xa4\xa8\xe0\xa4\xae\xe0\xa4\xb8\xe0\xa5\x8d\xe0\xa4\xa4\xe0\xa5\x87",
    "\n", "\n\n", "\n\n\n", "\r\n", "\r", " \n", "\n ", "\t", "\t\t", " ", "  ", "   ", "    ", "     ", "        ", "\xc2\xa0", "\xe3\x80\x80",
    "\xe2\x80\x83", "\xc2\x85",
    "\xe2\x80\xa8", "\xe2\x80\x8b", "\xef\xbb\xbf", "\xe2\x96\x81", "\xe2\x96\x81\xe2\x96\x81", "\v", "\f",
    "1", "12", "123", "1234", "12345", "123456", "1234567890", "3.14", "1,000,000", "0x1F", "\xc2\xbd", "\xe2\x85\xa7", "\xe3\x80\x87",
    "\xd9\xa1\xd9\xa2\xd9\xa3\xd9\xa4",
    "\xef\xbc\x91\xef\xbc\x92\xef\xbc\x93\xef\xbc\x94", ".", ",", "!", "?", "...", " ...", "!!!", "/", "//", "/*", "(", ")", "()", "{}", "[]",
    "->", "==", "+=", "<", ">", "$", "$5", "%", "^", "~", "`", "|",
    "#", "@", "&", "*", "_", "-", "--", "\\", "\"", ";", ":", "\n/", "!\n/\n", "?\r\n/x", "=\n", "\xef\xbc\x8c", "\xe3\x80\x82", "\xe3\x80\x81",
    "\xef\xbc\x81", "\xe2\x80\xa6", "\xe2\x80\x94", "\xe2\x80\x9c",
    "\xf0\x9f\x98\x80", "\xf0\x9f\x91\xa9\xe2\x80\x8d\xf0\x9f\x92\xbb", "\xf0\x9f\x91\x8d\xf0\x9f\x8f\xbd", "\xe2\x9d\xa4\xef\xb8\x8f",
    "\xf0\x9f\x87\xa9\xf0\x9f\x87\xaa", "1\xef\xb8\x8f\xe2\x83\xa3",
    "<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<0x0A>", "<0x41>", "<sentinel:12>", "IMGIMGABCZ",
    "IMGIMGAZ", "IMGIMGZ", "<|", "|>", "<h1>", "[INST]",
    "def f(x):\n    return x\n", "int main(void) {\n\treturn 0;\n}\n", "SELECT * FROM t;", "{\"a\": [1, 2]}", "https://a.b/c?d=e",
    "\xe4\xbd\xa0\xe5\xa5\xbd", "\xe6\xbc\xa2\xe5\xad\x97\xe3\x81\x8b\xe3\x81\xaa",
    "\xed\x95\x9c\xea\xb5\xad\xec\x96\xb4", "\xd0\x9f\xd1\x80\xd0\xb8\xd0\xb2\xd0\xb5\xd1\x82", "\xce\xb1\xce\x92\xce\xb3",
    "\xe1\x83\x90\xe1\x83\x91", "\xe0\xb9\x84\xe0\xb8\x97\xe0\xb8\xa2",
};

static size_t put_script(char *out) { /* one to eight characters of one script; rarely many of one character */
    size_t n = 0, s = dice(sizeof scripts / sizeof *scripts);
    uint32_t same = 0, many = dice(300) == 0, run = many ? 1 + dice(700) : 1 + dice(dice(4) ? 4 : 12);
    for (uint32_t i = 0; i < run; i++) {
        uint32_t c = many && i ? same : scripts[s].first + dice(scripts[s].last - scripts[s].first + 1);
        if (c >= 0xd800 && c < 0xe000) c = 0xd7ff;
        n += (size_t)utf8_encode(same = c, out + n);
    }
    return n;
}

/* Phrases, scripts, and what the vocabulary itself has to say: the pieces of its tokens, and texts of its special ones, whole or cut. */
static size_t random_text(const tok *t, char *out) {
    buf piece = {0};
    size_t n = 0;
    for (uint32_t left = 1 + dice(dice(3) ? 6 : 30); left > 0 && n + 4096 < TEXT_BYTES; left--) {
        uint32_t kind = dice(10);
        if (kind < 4) {
            const char *s = PICK(phrases);
            memcpy(out + n, s, strlen(s)), n += strlen(s);
        } else if (kind < 7) n += put_script(out + n);
        else if (kind < 9) {
            tok_piece(t, (int32_t)dice((uint32_t)t->n), 0, &piece);
            if (piece.len < 512 && utf8_count(buf_str(&piece)) >= 0) memcpy(out + n, piece.ptr ? piece.ptr : "", piece.len), n += piece.len;
            piece.len = 0;
        } else if (t->n_special) {
            str s = t->entry[t->special[dice((uint32_t)t->n_special)]].text;
            if (s.len > 512 || utf8_count(s) < 0) continue;
            if (dice(5) == 0) while (s.len && (s.ptr[--s.len] & 0xc0) == 0x80) continue;
            memcpy(out + n, s.ptr, s.len), n += s.len;
            if (dice(3) == 0) out[n++] = ' ';
        }
    }
    buf_free(&piece);
    return n;
}

/* ==== Comparing ============================================================================== */

static char why[4096];

static void explain(const char *what, str text, const int32_t *theirs, int n_theirs, const int32_t *ours, int n_ours) {
    int k = 0, n = snprintf(why, sizeof why, "%s: \"", what);
    for (size_t i = 0; i < text.len && n < 1500; i++)
        n += snprintf(why + n, sizeof why - (size_t)n, text.ptr[i] >= 32 && text.ptr[i] < 127 ? "%c" : "\\x%02x", (unsigned char)text.ptr[i]);
    while (k < n_theirs && k < n_ours && theirs[k] == ours[k]) k++;
    n += snprintf(why + n, sizeof why - (size_t)n, "\"; from id %d on, llama.cpp:", k);
    for (int i = k; i < n_theirs && i < k + 8; i++) n += snprintf(why + n, sizeof why - (size_t)n, " %d", theirs[i]);
    n += snprintf(why + n, sizeof why - (size_t)n, ", lorch:");
    for (int i = k; i < n_ours && i < k + 8; i++) n += snprintf(why + n, sizeof why - (size_t)n, " %d", ours[i]);
}

static int same_ids(const tok *t, const void *vocab, str text, int flags) {
    static int32_t theirs[MOST_IDS];
    tok_ids ours = {0};
    int n = lib.tokenize(vocab, text.ptr, (int32_t)text.len, theirs, MOST_IDS, (flags & TOK_BOS) != 0, (flags & TOK_SPECIAL) != 0);
    int ok = tok_encode(t, text, flags, &ours) && n == ours.n && (n == 0 || memcmp(ours.id, theirs, (size_t)n * sizeof *theirs) == 0);
    if (!ok) explain(flags & TOK_SPECIAL ? "ids, control tokens read" : "ids", text, theirs, n, ours.id, ours.n);
    free(ours.id);
    return ok;
}

/* A text made invalid somewhere is refused. */
static int refused(const tok *t, str text) {
    static const char *const bad[] = {"\xff", "\x80", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\xf0\x9f\x98"};
    tok_ids ids = {0};
    buf b = {0};
    size_t at = dice((uint32_t)text.len + 1);
    while (at < text.len && ((unsigned char)text.ptr[at] & 0xc0) == 0x80) at++;
    buf_add(&b, text.ptr, at), buf_puts(&b, PICK(bad)), buf_add(&b, text.ptr + at, text.len - at);
    int ok = !tok_encode(t, buf_str(&b), 0, &ids);
    if (!ok) explain("accepted, but no UTF-8", buf_str(&b), NULL, 0, ids.id, ids.n);
    buf_free(&b), free(ids.id);
    return ok;
}

static int same_tokens(const tok *t, const void *vocab) { /* end-of-generation and pieces, of every id */
    static char theirs[1 << 16];
    if (lib.n_tokens(vocab) != t->n) return snprintf(why, sizeof why, "%d tokens, not %d", t->n, lib.n_tokens(vocab)), 0;
    for (int32_t id = 0; id < t->n; id++) {
        str text = t->entry[id].text;
        if (lib.is_eog(vocab, id) != t->entry[id].ends)
            return snprintf(why, sizeof why, "token %d, %.*s, %s a generation", id, (int)text.len, text.ptr, t->entry[id].ends ? "does not end" : "ends"), 0;
        for (int special = 0; special < 2; special++) {
            buf ours = {0};
            int n = lib.piece(vocab, id, theirs, sizeof theirs, 0, special != 0);
            tok_piece(t, id, special, &ours);
            /* What no byte stands for, llama.cpp spells out; an empty text it names. */
            int ok = (n == (int)ours.len && memcmp(theirs, ours.ptr ? ours.ptr : "", ours.len) == 0) || text.len == 0 ||
                     (n > 14 && memmem(theirs, (size_t)n, "[UNK_BYTE_0x", 12));
            if (!ok)
                snprintf(why, sizeof why, "token %d, type %d: piece '%.*s', lorch '%.*s'", id, t->entry[id].type, n, theirs, (int)ours.len,
                         ours.ptr ? ours.ptr : "");
            buf_free(&ours);
            if (!ok) return 0;
        }
    }
    return 1;
}

static int n_failed;
static long n_texts;

/* `plain`: whether texts are compared without reading control tokens too. */
static int compare(const char *path, const char *name, int texts, int plain, int tokens) {
    static char text[TEXT_BYTES];
    char err[512] = "the library cannot load it";
    llama_params p = lib.default_params();
    p.byte[VOCAB_ONLY] = 1;
    gguf_file *g = gguf_open(path, err, sizeof err);
    tok *t = g ? tok_load(g, NULL, err, sizeof err) : NULL;
    void *model = t ? lib.load(path, p) : NULL;
    const void *vocab = model ? lib.vocab(model) : NULL;
    int ok = vocab != NULL;
    snprintf(why, sizeof why, "%s", err);
    if (ok && tokens) ok = same_tokens(t, vocab);
    for (int i = 0; i < texts && ok; i++, n_texts++) {
        str s = str_make(text, i ? random_text(t, text) : 0);
        int bos = i % 5 ? 0 : TOK_BOS;
        ok = (!plain || same_ids(t, vocab, s, bos)) && ((plain && i % 3) || same_ids(t, vocab, s, TOK_SPECIAL | bos));
        if (i % 50 == 0) ok = ok && refused(t, s);
    }
    if (!ok) n_failed++, printf("not ok - %s\n# %s\n", name, why);
    if (model) lib.free(model);
    tok_free(t), gguf_close(g);
    return ok;
}

/* ==== Vocabularies under other names ========================================================= */

static void put_u32(buf *b, uint32_t v) { buf_add(b, &v, 4); }
static void put_u64(buf *b, uint64_t v) { buf_add(b, &v, 8); }
static void put_str(buf *b, const char *s) { put_u64(b, strlen(s)), buf_puts(b, s); }

static int write_file(const char *path, buf *b) {
    FILE *f = fopen(path, "wb");
    int ok = f && fwrite(b->ptr, 1, b->len, f) == b->len;
    if (f && fclose(f)) ok = 0;
    buf_free(b);
    if (!ok) perror(path), exit(1);
    return ok;
}

/* A copy of a vocabulary-only file with another value of tokenizer.ggml.pre. 0 if it has none, or tensors. */
static int rename_pre(const char *path, const char *pre, const char *out) {
    static const char key[] = "tokenizer.ggml.pre";
    buf b = {0}, file = {0};
    char chunk[1 << 16];
    FILE *f = fopen(path, "rb");
    for (size_t n; f && (n = fread(chunk, 1, sizeof chunk, f)) > 0;) buf_add(&file, chunk, n);
    if (f) fclose(f);
    put_u64(&b, strlen(key)), buf_puts(&b, key), put_u32(&b, GGUF_STRING);
    char *at = file.ptr && file.len > 24 ? memmem(file.ptr, file.len, b.ptr, b.len) : NULL;
    uint64_t old_len, n_tensors = 1;
    if (file.len > 24) memcpy(&n_tensors, file.ptr + 8, 8);
    b.len = 0;
    if (at && n_tensors == 0) {
        memcpy(&old_len, at += 8 + strlen(key) + 4, 8);
        buf_add(&b, file.ptr, (size_t)(at - file.ptr)), put_str(&b, pre);
        at += 8 + old_len, buf_add(&b, at, (size_t)(file.ptr + file.len - at));
    }
    buf_free(&file);
    return b.len ? write_file(out, &b) : (buf_free(&b), 0);
}

/* Names that share a row of the table differ in nothing: the first gets all texts, the others a few, and only with the first vocabulary. */
static void compare_pres(const char *path, const char *scratch, int texts) {
    static int only_first;
    const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    char copy[1024], pre[64], label[1200];
    char err[512];
    int n = 0, good = 0;
    gguf_file *g = gguf_open(path, err, sizeof err);
    int bpe = g && str_is(gguf_get_str(g, "tokenizer.ggml.model"), "gpt2");
    gguf_close(g);
    snprintf(copy, sizeof copy, "%s/pre.gguf", scratch);
    if (!bpe || !rename_pre(path, "default", copy)) return;
    for (size_t i = 0; i < sizeof tok_pres / sizeof *tok_pres; i++)
        for (const char *p = tok_pres[i].names; *p; n++) {
            size_t len = strcspn(p, " ");
            snprintf(pre, sizeof pre, "%.*s", (int)len, p);
            snprintf(label, sizeof label, "tokens of %s under the name of %s", name, pre);
            rename_pre(path, pre, copy);
            good += compare(copy, label, p == tok_pres[i].names ? texts : texts / 20 + 1, 1, 0);
            p += only_first ? strlen(p) : len + (p[len] == ' ');
        }
    only_first = 1;
    remove(copy);
    if (good == n) printf("ok - tokens of %s under the names of %d pre-tokenizers\n", name, n);
}

/* ==== Made vocabularies ====================================================================== */

/* Texts that mean something. Of those of one length, llama.cpp looks for in no certain order, so white space has lengths of its own. */
static const char *const odd_texts[] = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>", "[e~[", "<|im_start|>", "<s>", "<unk>",
    "<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|file_sep|>", "< EOT >", "[UNK]", "<|user|>", "<|assistant|>", "<bos>", "<pad>",
    "  ", "\n", "<h1>", "<table>", "<|a", "a|>",
};
static const char *const odd_groups[][8] = { /* of each group one: of several it takes any */
    {"<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\xef\xbd\x9c" "fim\xe2\x96\x81" "begin\xef\xbd\x9c>", "<PRE>", "\xe2\x96\x81<PRE>",
    "<|code_prefix|>", "<|prefix|>"},
    {"<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\xef\xbd\x9c" "fim\xe2\x96\x81hole\xef\xbd\x9c>", "<SUF>", "\xe2\x96\x81<SUF>",
    "<|code_suffix|>", "<|suffix|>"},
    {"<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\xef\xbd\x9c" "fim\xe2\x96\x81" "end\xef\xbd\x9c>", "<MID>", "\xe2\x96\x81<MID>",
    "<|code_middle|>", "<|middle|>"},
    {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_pad|>", "<fim-pad>", "<PAD>"},
    {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|fim_repo|>", "<|repo_name|>", "<REPO>"},
};

typedef struct { /* a vocabulary in the making */
    buf tokens, types, scores, merges;
    uint32_t n, n_merges;
    int shown; /* it has tokens of which llama.cpp makes user-defined ones, lorch control tokens that are shown */
} made;

static void add_token(made *m, const char *text, int32_t type, float score) { /* but once: llama.cpp does not survive two of a text */
    buf one = {0};
    put_str(&one, text);
    int twice = m->tokens.len && memmem(m->tokens.ptr, m->tokens.len, one.ptr, one.len);
    buf_free(&one);
    if (twice) return;
    put_str(&m->tokens, text), put_u32(&m->types, (uint32_t)type), buf_add(&m->scores, &score, 4), m->n++;
}

static void add_odd(made *m) {
    static const int32_t types[] = {TOK_CONTROL, TOK_CONTROL, TOK_USER, TOK_NORMAL, TOK_UNUSED};
    static const char *const harmony[] = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>"};
    uint32_t often = 1 + dice(4);
    for (size_t i = 0; i < sizeof odd_texts / sizeof *odd_texts; i++) {
        if (dice(often + 1)) continue;
        for (int k = 0; k < 5; k++) m->shown |= !strcmp(odd_texts[i], harmony[k]);
        add_token(m, odd_texts[i], PICK(types), 0);
    }
    for (size_t i = 0; i < sizeof odd_groups / sizeof *odd_groups; i++)
        if (dice(3)) add_token(m, odd_groups[i][dice(8)], PICK(types), 0);
}

/* Bytes, then merges of random neighbours; a few merges lead to no token. */
static void make_bpe(made *m) {
    tok bytes = {0};
    char text[300][32], merge[80], utf8[5] = "";
    bytes.table = sys_zalloc(1, 4); /* an empty table: tok_init_bytes looks texts up */
    tok_init_bytes(&bytes);
    for (int b = 0; b < 256; b++) {
        utf8[utf8_encode(bytes.to_unicode[b], utf8)] = 0;
        snprintf(text[b], sizeof text[b], "%s", utf8), add_token(m, utf8, TOK_NORMAL, 0);
    }
    free(bytes.table);
    for (int n = 256; n < 300; n++) {
        const char *a = text[n > 270 ? 256 + dice((uint32_t)n - 256) : "eatn 12"[dice(7)] == ' ' ? 32 : (uint32_t)"eatnois1"[dice(8)]];
        const char *b = text[(uint32_t)"eatnois1"[dice(8)]];
        if (strlen(a) + strlen(b) > 30) a = text['e'];
        snprintf(text[n], sizeof text[n], "%s%s", a, b), snprintf(merge, sizeof merge, "%s %s", a, b);
        int twice = 0;
        for (int i = 0; i < n; i++) twice |= !strcmp(text[i], text[n]);
        if (twice) continue;
        put_str(&m->merges, merge), m->n_merges++;
        if (dice(12)) add_token(m, text[n], TOK_NORMAL, 0);
    }
}

static void make_spm(made *m) {
    char text[300][40], name[8];
    add_token(m, "<unk>", TOK_UNKNOWN, 0), add_token(m, "<s>", TOK_CONTROL, 0);
    for (int b = 0; b < 256; b++) snprintf(name, sizeof name, "<0x%02X>", (unsigned)b), add_token(m, name, TOK_BYTE, 0);
    int n = 0;
    for (const char *p = "\xe2\x96\x81"; n < 1; n++) snprintf(text[n], sizeof text[n], "%s", p), add_token(m, p, TOK_NORMAL, -1);
    for (const char *p = "etaoinshrdlu<>|_.1"; *p; p++, n++) snprintf(text[n], sizeof text[n], "%c", *p), add_token(m, text[n], TOK_NORMAL, -1);
    for (int i = 0; i < 60; i++) {
        const char *a = text[dice((uint32_t)n)], *b = text[dice((uint32_t)n)];
        if (strlen(a) + strlen(b) > 30) continue;
        snprintf(text[n], sizeof text[n], "%s%s", a, b);
        int twice = !strcmp(text[n], "<s>") || !strcmp(text[n], "</s>");
        for (int k = 0; k < n; k++) twice |= !strcmp(text[k], text[n]);
        if (!twice) add_token(m, text[n++], TOK_NORMAL, -(float)dice(40));
    }
}

static void put_array(buf *b, const char *key, uint32_t type, uint64_t n, const buf *values) {
    put_str(b, key), put_u32(b, GGUF_ARRAY), put_u32(b, type), put_u64(b, n), buf_add(b, values->ptr, values->len);
}

static void compare_made(int number, const char *scratch, int texts) {
    static const char *const keys[] = {"eot", "eom", "fim_pre", "prefix", "fim_suf", "suffix", "fim_mid", "middle", "fim_pad", "fim_rep", "fim_sep", "unknown"};
    static const char *const flags[] = {"add_bos_token", "add_eos_token", "add_space_prefix"};
    static const char *const pres[] = {"gpt-2", "llama-bpe", "qwen2", "gpt-4o", "deepseek-llm", "chatglm-bpe", "superbpe"};
    static const char *const needed[] = {"</s>", "<unk>", "<|endoftext|>", "<s>"};
    static const char *const names[] = {"Model", "Microsoft Phi-3 mini", "phi3", "Phi-4"};
    made m;
    buf b = {0}, kv = {0};
    uint64_t n_kv = 4;
    int spm = dice(2) == 0;
    char path[1024], key[64], label[100];
    memset(&m, 0, sizeof m);
    if (spm) make_spm(&m);
    else make_bpe(&m);
    uint32_t n_plain = spm ? 2 : m.n; /* the keys name any but these */
    add_odd(&m);
    int phi3 = dice(3) == 0; /* with such a name llama.cpp insists on these */
    for (int i = 0; i < 4 && phi3; i++) add_token(&m, needed[i], i % 2 ? TOK_USER : TOK_CONTROL, 0);
    put_str(&kv, "general.architecture"), put_u32(&kv, GGUF_STRING), put_str(&kv, "llama");
    put_str(&kv, "general.name"), put_u32(&kv, GGUF_STRING), put_str(&kv, names[phi3 * dice(4)]);
    put_str(&kv, "tokenizer.ggml.model"), put_u32(&kv, GGUF_STRING), put_str(&kv, spm ? "llama" : "gpt2");
    put_array(&kv, "tokenizer.ggml.tokens", GGUF_STRING, m.n, &m.tokens);
    put_array(&kv, "tokenizer.ggml.token_type", GGUF_I32, m.n, &m.types), n_kv++;
    if (spm) put_array(&kv, "tokenizer.ggml.scores", GGUF_F32, m.n, &m.scores), n_kv++;
    else {
        put_str(&kv, "tokenizer.ggml.pre"), put_u32(&kv, GGUF_STRING), put_str(&kv, PICK(pres)), n_kv++;
        put_array(&kv, "tokenizer.ggml.merges", GGUF_STRING, m.n_merges, &m.merges), n_kv++;
    }
    for (int i = -2; i < (int)(sizeof keys / sizeof *keys); i++) {
        if (i >= 0 ? dice(5) : spm && dice(2)) continue; /* BPE files always say what BOS and EOS are */
        snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id", i == -2 ? "bos" : i == -1 ? "eos" : keys[i]);
        put_str(&kv, key), put_u32(&kv, GGUF_U32), put_u32(&kv, i >= 0 && dice(6) == 0 ? m.n + dice(9) : n_plain + dice(m.n - n_plain)), n_kv++;
    }
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        if (dice(2) || (!spm && i == 2)) continue;
        snprintf(key, sizeof key, "tokenizer.ggml.%s", flags[i]);
        put_str(&kv, key), put_u32(&kv, GGUF_BOOL), buf_putc(&kv, (char)dice(2)), n_kv++;
    }
    buf_puts(&b, "GGUF"), put_u32(&b, 3), put_u64(&b, 0), put_u64(&b, n_kv), buf_add(&b, kv.ptr, kv.len);
    snprintf(path, sizeof path, "%s/made.gguf", scratch);
    write_file(path, &b);
    snprintf(label, sizeof label, "tokens of made vocabulary %d", number);
    compare(path, label, texts, !m.shown, 1);
    if (n_failed && getenv("LORCH_FUZZ_KEEP")) exit(1);
    remove(path);
    buf_free(&kv), buf_free(&m.tokens), buf_free(&m.types), buf_free(&m.scores), buf_free(&m.merges);
}

static int setting(const char *name, int value) { return getenv(name) && *getenv(name) ? atoi(getenv(name)) : value; }

int main(int argc, char **argv) {
    if (argc < 4) return fprintf(stderr, "usage: tokfuzz LIBRARY_DIRECTORY SCRATCH_DIRECTORY VOCABULARY.gguf ...\n"), 2;
    int seed = setting("LORCH_FUZZ_SEED", 1), texts = setting("LORCH_FUZZ_TEXTS", 10000), texts_pre = setting("LORCH_FUZZ_TEXTS_PRE", 300);
    int made_up = setting("LORCH_FUZZ_MADE", 300);
    log_state.quiet = 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_llama(argv[1]);
    for (int i = 3; i < argc; i++) {
        char label[600];
        dice_state = (uint64_t)seed << 32;
        snprintf(label, sizeof label, "tokens of %s", strrchr(argv[i], '/') ? strrchr(argv[i], '/') + 1 : argv[i]);
        if (texts > 0 && compare(argv[i], label, texts, 1, 1)) printf("ok - %s\n", label);
        if (texts_pre > 0) compare_pres(argv[i], argv[2], texts_pre);
    }
    int before = n_failed;
    for (int i = 0; i < made_up; i++) dice_state = ((uint64_t)seed << 32) + 0x10000u + (uint64_t)i, compare_made(i, argv[2], 300);
    if (made_up && before == n_failed) printf("ok - tokens of %d made vocabularies\n", made_up);
    printf("# %ld texts, LORCH_FUZZ_SEED=%d\n", n_texts, seed);
    return n_failed != 0;
}
