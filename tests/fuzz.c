/* SPDX-License-Identifier: MIT
 *
 * fuzz: hostile bytes for every parser of lorch, from inside.
 *
 *   cc -O1 tests/fuzz.c -o fuzz -lpthread -lm          (build/test/mkmodel makes its models)
 *   fuzz replay DIR             every file of DIR/TARGET/ through its target
 *   fuzz run SECONDS DIR        new inputs, made of the files of DIR by changing, cutting and joining them
 *   fuzz mutate [full]          damaged GGUF files of all architectures and formats: cuts, flips, edits
 *   fuzz memory                 the same models and texts, with every allocation failing in turn
 *
 * With -DFUZZ_LIBFUZZER it is a libFuzzer target (clang -fsanitize=fuzzer,address,undefined); LORCH_FUZZ names which.
 * The targets check more than that nothing crashes: HTTP must not depend on how bytes are split, JSON and token texts
 * must survive the way there and back, a GGUF file must not cost more than four times its size.
 * Prints `ok - name`, `not ok - name`, and `# ` lines with figures. */
#define _GNU_SOURCE
#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* ==== lorch, with its ways out closed =========================================================
 * A usage error prints one line and ends the process: here it comes back instead, and the line goes nowhere. */

static jmp_buf fuzz_out;
static int fuzz_exit_code;
__attribute__((noreturn)) static void fuzz_exit(int code) {
    fuzz_exit_code = code;
    longjmp(fuzz_out, 1);
}
static int fuzz_fputs(const char *s, FILE *f) { return (void)s, (void)f, 0; }
static int fuzz_fputc(int c, FILE *f) { return (void)f, c; }
static int fuzz_vfprintf(FILE *f, const char *fmt, va_list ap) {
    char text[4096];
    return (void)f, vsnprintf(text, sizeof text, fmt, ap);
}

#define FUZZING 1
#define LORCH_FAULTS "tests/faults.h"
#include "../lorch.h"
#define main lorch_main
#define exit fuzz_exit
#define fputs fuzz_fputs
#define fputc fuzz_fputc
#define vfprintf fuzz_vfprintf
#include "../lorch.c"
#undef main
#undef exit
#undef fputs
#undef fputc
#undef vfprintf

/* ==== What goes wrong ========================================================================== */

static char fuzz_what[400]; /* of the input at hand; "": nothing */

__attribute__((format(printf, 1, 2))) static void wrong(const char *fmt, ...) {
    va_list ap;
    if (*fuzz_what) return;
    va_start(ap, fmt);
    vsnprintf(fuzz_what, sizeof fuzz_what, fmt, ap);
    va_end(ap);
}

static uint64_t mk_random(uint64_t *state) { /* SplitMix64 */
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Makes a model of "ARCH FORMAT KEY=VALUE ..." with build/test/mkmodel. */
static void make_model(const char *make, const char *path) {
    char copy[300], *args[40] = {"build/test/mkmodel"};
    int n = 1, status = 0;
    snprintf(copy, sizeof copy, "%s", make);
    for (char *w = strtok(copy, " "); w && n < 38; w = strtok(NULL, " ")) {
        args[n++] = w;
        if (n == 3) args[n++] = (char *)(uintptr_t)path;
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) execv(args[0], args), _exit(127);
    if (child < 0 || waitpid(child, &status, 0) < 0 || status) fprintf(stderr, "%s: %s: status %d\n", args[0], make, status), abort();
}

/* ==== UTF-8 ==================================================================================== */

/* The same answer as utf8_decode, from the bit patterns of RFC 3629: the code point, or -1 at the first byte. */
static int plain_utf8(const unsigned char *p, size_t n, uint32_t *cp) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    int k = *p < 0x80 ? 1 : *p >> 5 == 6 ? 2 : *p >> 4 == 14 ? 3 : *p >> 3 == 30 ? 4 : 0;
    if (k == 0 || (size_t)k > n) return 0;
    uint32_t v = k == 1 ? *p : *p & (0xffu >> (k + 1));
    for (int i = 1; i < k; i++) {
        if (p[i] >> 6 != 2) return 0;
        v = v << 6 | (p[i] & 0x3f);
    }
    if (v < least[k] || v > 0x10ffff || (v >= 0xd800 && v <= 0xdfff)) return 0;
    return *cp = v, k;
}

static void fuzz_utf8(const unsigned char *p, size_t n) {
    int64_t count = 0;
    uint32_t none;
    if (utf8_decode((const char *)p, 0, &none) != 0) wrong("no bytes at all are a code point");
    for (size_t i = 0; i < n;) {
        uint32_t a = 0, b = 0;
        char out[4];
        int k = utf8_decode((const char *)p + i, n - i, &a), plain = plain_utf8(p + i, n - i, &b);
        if ((k > 0) != (plain > 0) || (k > 0 && (k != plain || a != b))) wrong("byte %d: length %d, not %d", (int)i, k, plain);
        if (k > 0 && ((int)utf8_encode(a, out) != k || memcmp(out, p + i, (size_t)k))) wrong("U+%04X is encoded otherwise", (unsigned)a);
        if (k > 0) unicode_category(a), unicode_is_space(a);
        if (k < -3 || (k < 0 && (size_t)-k > n - i)) wrong("byte %d: skips %d", (int)i, -k);
        if (count >= 0 && k > 0) count++;
        else count = -1;
        i += k > 0 ? (size_t)k : k < 0 ? (size_t)-k : n - i;
    }
    if (utf8_count(str_make((const char *)p, n)) != count) wrong("counted %lld", (long long)count);
    buf b = {0};
    json_put_str(&b, str_make((const char *)p, n)); /* whatever it is, JSON comes out */
    json_reader r = json_open(buf_str(&b));
    if (json_next(&r) != JSON_STRING || json_next(&r) != JSON_END) wrong("written JSON is none: %s", r.error ? r.error : "?");
    buf_free(&b);
}

/* ==== JSON ===================================================================================== */

/* Writes a document as it was read, without spaces, into b; texts are unescaped and escaped again. */
static void json_copy(str text, buf *b, const char **error) {
    json_reader r = json_open(text);
    uint64_t u;
    for (enum json_type t; (t = json_next(&r)) != JSON_END && t != JSON_ERROR;) {
        char last = b->len ? b->ptr[b->len - 1] : 0;
        if (t != JSON_OBJECT_END && t != JSON_ARRAY_END && last && !strchr("{[:", last)) buf_putc(b, ',');
        if (t == JSON_OBJECT || t == JSON_OBJECT_END) buf_putc(b, t == JSON_OBJECT ? '{' : '}');
        else if (t == JSON_ARRAY || t == JSON_ARRAY_END) buf_putc(b, t == JSON_ARRAY ? '[' : ']');
        else if (t == JSON_KEY || t == JSON_STRING) {
            buf plain = {0};
            json_unescape(r.token, &plain);
            json_put_str(b, buf_str(&plain));
            if (t == JSON_KEY) buf_putc(b, ':');
            buf_free(&plain);
        } else buf_add(b, r.token.ptr, r.token.len);
        if (t == JSON_NUMBER) {
            double d = json_double(r.token);
            if (d != d) wrong("a number is none: %.*s", (int)(r.token.len < 40 ? r.token.len : 40), r.token.ptr);
            if (json_u64(r.token, &u) && d < 9e15 && (double)u != d) wrong("%.0f is not %llu", d, (unsigned long long)u);
        }
    }
    *error = r.error;
}

static void fuzz_json(const unsigned char *p, size_t n) {
    buf a = {0}, b = {0};
    const char *first, *second;
    json_copy(str_make((const char *)p, n), &a, &first);
    if (!first) json_copy(buf_str(&a), &b, &second);
    if (!first && second) wrong("not read again: %s", second);
    if (!first && !str_eq(buf_str(&a), buf_str(&b))) wrong("changed when it was read again");
    json_reader r = json_open(str_make((const char *)p, n)); /* skipping sees what reading sees */
    json_skip(&r, json_next(&r));
    json_next(&r);
    if (!r.error != !first) wrong("skipped: %s, read: %s", r.error ? r.error : "well", first ? first : "well");
    buf_free(&a), buf_free(&b);
}

/* ==== GGUF ===================================================================================== */

static char fuzz_path[64]; /* a file in memory */
static int fuzz_fd = -1;

static unsigned char *fuzz_map; /* its bytes */

static void gguf_size(size_t n) {
    enum { MOST = 1 << 24 };
    static size_t size;
    if (fuzz_fd < 0) {
        fuzz_fd = memfd_create("fuzz", 0);
        snprintf(fuzz_path, sizeof fuzz_path, "/proc/self/fd/%d", fuzz_fd);
        if (fuzz_fd < 0 || ftruncate(fuzz_fd, (off_t)(size = MOST))) perror("memfd"), abort();
        fuzz_map = mmap(NULL, MOST, PROT_READ | PROT_WRITE, MAP_SHARED, fuzz_fd, 0);
        if (fuzz_map == MAP_FAILED) perror("mmap"), abort();
    }
    if (n > MOST) abort();
    if (n != size && ftruncate(fuzz_fd, (off_t)(size = n))) perror("memfd"), abort();
}
static void gguf_file_of(const void *p, size_t n) {
    gguf_size(n);
    if (n) memcpy(fuzz_map, p, n);
}

/* Loads a file as a worker does. 1: it is good. */
static int gguf_try(size_t n) {
    char err[LORCH_ERROR_BYTES] = "";
    faults.sum = faults.most = 0;
    model *m = model_load(fuzz_path, NULL, err, sizeof err);
    size_t sum = faults.sum, bound = n * 4 > 65536 ? n * 4 : 65536;
    if (sum > bound) wrong("%zu bytes of memory for a file of %zu", sum, n);
    if (!m && (!*err || strchr(err, '\n'))) wrong("the error is no line: %s", err);
    model_free(m);
    return m != NULL;
}

/* Each key, asked for as each type: a value is of one kind alone, but whole numbers are floats as well. */
static void gguf_ask(void) {
    char err[LORCH_ERROR_BYTES], key[256];
    gguf_file *g = gguf_open(fuzz_path, err, sizeof err);
    for (uint64_t i = 0; g && i < g->n_kv && i < 500; i++) {
        const gguf_kv *kv = &g->kv[i];
        if (kv->key.len >= sizeof key || memchr(kv->key.ptr, 0, kv->key.len)) continue;
        snprintf(key, sizeof key, "%.*s", (int)kv->key.len, kv->key.ptr);
        uint64_t whole = gguf_get_uint(g, key, 7777);
        double real = gguf_get_float(g, key, -0.125);
        int yes = gguf_get_bool(g, key, 2), of_type = 0, kinds = 0;
        for (int t = 0; t < GGUF_TYPES; t++) of_type += gguf_get_array(g, key, (enum gguf_type)t) != NULL;
        if (whole != 7777 && real != (double)whole) wrong("%s is %llu or %g", key, (unsigned long long)whole, real);
        kinds = (real != -0.125) + (yes != 2) + (gguf_get_str(g, key).len > 0) + of_type;
        if (kinds > 1 || of_type != kv->is_array) wrong("%s has %d kinds, %d of arrays", key, kinds, of_type);
    }
    if (g && (gguf_get_uint(g, "not there", 5) != 5 || gguf_get_float(g, "not there", 5) != 5 || gguf_get_bool(g, "not there", 5) != 5 ||
        gguf_get_str(g, "not there").len || gguf_get_array(g, "not there", GGUF_U8)))
        wrong("a key that is not there has a value");
    gguf_close(g);
}

static void fuzz_gguf(const unsigned char *p, size_t n) {
    gguf_file_of(p, n);
    gguf_try(n);
    gguf_ask();
}

/* ==== Tokenizer ================================================================================ */

enum { FUZZ_TOKS = 16 };
static struct { gguf_file *g; tok *t; } fuzz_tok[FUZZ_TOKS];
static int n_fuzz_tok;

static void tok_of(const char *path, const char *pre) {
    char err[LORCH_ERROR_BYTES];
    gguf_file *g = gguf_open(path, err, sizeof err);
    tok *t = g ? tok_load(g, pre, err, sizeof err) : NULL;
    if (!t) fprintf(stderr, "%s\n", err), abort();
    fuzz_tok[n_fuzz_tok].g = g, fuzz_tok[n_fuzz_tok++].t = t;
}

/* The first byte chooses the vocabulary and whether control tokens count, the rest is text. */
static void fuzz_tokenizer(const unsigned char *p, size_t n) {
    static const char *const pres[] = {"default", "gpt-2", "llama-bpe", "dbrx", "smaug-bpe", "qwen2", "smollm", "falcon"};
    if (!n_fuzz_tok) {
        for (size_t i = 0; i < sizeof pres / sizeof *pres; i++) tok_of("tests/models/lorch-tiny-q8_0.gguf", pres[i]);
        make_model("llama f32 embd=32 ff=32 layers=1 heads=2 kv=1 hd=16 vocab=400", "build/test/fuzz-spm.gguf");
        tok_of("build/test/fuzz-spm.gguf", NULL);
    }
    if (n == 0) return;
    const tok *t = fuzz_tok[*p % n_fuzz_tok].t;
    int flags = *p & 64 ? TOK_SPECIAL : 0;
    str text = str_make((const char *)p + 1, n - 1);
    tok_ids ids = {0};
    buf back = {0};
    if (utf8_count(text) < 0) return; /* prompts have been checked */
    if (!tok_encode(t, text, flags, &ids)) wrong("not encoded");
    for (int i = 0; i < ids.n; i++)
        if (ids.id[i] < 0 || ids.id[i] >= t->n) wrong("token %ld", (long)ids.id[i]);
    if (ids.n > (int)n + 1) wrong("%d tokens for %d bytes", ids.n, (int)n - 1);
    for (int i = 0; i < ids.n; i++) tok_piece(t, ids.id[i], 1, &back);
    if (t->kind == TOK_BPE && !str_eq(buf_str(&back), text)) wrong("comes back as '%.80s'", buf_cstr(&back));
    free(ids.id), buf_free(&back);
}

/* ==== HTTP ===================================================================================== */

static engine *fuzz_engine; /* without threads; takes no job: all are refused as busy */

static route_server *http_server(int variant) {
    static route_server s;
    if (!fuzz_engine) {
        static const char path[] = "build/test/fuzz-http.gguf";
        char err[LORCH_ERROR_BYTES];
        lorch_options o;
        lorch_defaults(&o);
        o.n_threads = 1, o.n_parallel = 1;
        make_model("llama f32 embd=32 ff=32 layers=1 heads=2 kv=1 hd=16 vocab=300 ctx=64", path);
        model *m = model_load(path, NULL, err, sizeof err);
        fuzz_engine = m ? engine_open(m, &o, 0, NULL, err, sizeof err) : NULL;
        if (!fuzz_engine) fprintf(stderr, "%s\n", err), abort();
        fuzz_engine->options.n_parallel = fuzz_engine->options.n_queue = 0;
        pthread_mutex_init(&s.lock, NULL);
    }
    s.set.worker_id = "w", s.set.model_ref = "file:m", s.set.max_tokens_out = 99;
    s.set.has_token = variant & 1, s.set.check_host = variant >> 1 & 1;
    sha256(str_of("secret"), s.set.token_hash);
    s.e = variant & 4 ? NULL : fuzz_engine, s.status = s.e ? ROUTE_READY : ROUTE_LOADING;
    return &s;
}

/* All answers to a connection's bytes, which come in a first piece and steps. What differs from time to time is left out. */
static void http_talk(const unsigned char *p, size_t n, size_t first, size_t step, int variant, buf *out) {
    route_server *s = http_server(variant);
    http_conn c;
    memset(&c, 0, sizeof c);
    c.fd = -1;
    sys_uuid(c.correlation);
    for (size_t at = 0; at < n && !c.close_after;) {
        size_t k = at == 0 && first ? first : step;
        if (k > n - at) k = n - at;
        buf_add(&c.in, p + at, k), at += k;
        while ((c.state == HTTP_HEAD || c.state == HTTP_BODY) && !c.close_after && route_step(s, &c, 0)) {
            static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
            if (c.out.len >= sizeof go_on - 1 && memcmp(c.out.ptr, go_on, sizeof go_on - 1) == 0) buf_drop(&c.out, sizeof go_on - 1);
            int status = c.out.len > 12 ? atoi(c.out.ptr + 9) : 0;
            if (status < 200 || status > 505) wrong("status %d", status);
            char *body = c.out.len ? memmem(c.out.ptr, c.out.len, "\r\n\r\n", 4) : NULL;
            if (!body) wrong("an answer without an end");
            else if (status >= 400) buf_add(out, body, c.out.len - (size_t)(body - c.out.ptr));
            buf_printf(out, "%d %.*s %d\n", status, (int)c.req.path.len, c.req.path.ptr ? c.req.path.ptr : "", c.close_after);
            c.out.len = 0;
        }
        if (c.state != HTTP_HEAD && c.state != HTTP_BODY) wrong("state %d", (int)c.state);
        if (c.body.len > MAX_BODY_BYTES || c.head.len > MAX_HEAD_BYTES) wrong("more than the limits");
    }
    buf_printf(out, "%d bytes left, %s", (int)c.in.len, c.state == HTTP_BODY ? "in a body" : "in a head");
    buf_free(&c.in), buf_free(&c.head), buf_free(&c.body), buf_free(&c.out);
}

/* The first byte chooses the server, the second where the bytes are split; the rest is what a client sends. */
static void fuzz_http(const unsigned char *p, size_t n) {
    buf whole = {0}, part = {0};
    if (n < 2) return;
    http_talk(p + 2, n - 2, 0, n, *p, &whole);
    size_t cut[][2] = {{0, 1}, {1 + p[1], n}, {0, 1 + p[1] % 7u}};
    for (size_t i = 0; i < 3; i++) {
        part.len = 0;
        http_talk(p + 2, n - 2, cut[i][0], cut[i][1], *p, &part);
        str a = buf_str(&whole), b = buf_str(&part);
        char *end_a = memrchr(a.ptr, '\n', a.len), *end_b = memrchr(b.ptr, '\n', b.len); /* what is left over after an error is not looked at */
        size_t na = end_a ? (size_t)(end_a - a.ptr) : 0, nb = end_b ? (size_t)(end_b - b.ptr) : 0;
        if (na != nb || (na && memcmp(a.ptr, b.ptr, na))) wrong("split %d: %.120s ... %.120s", (int)i, buf_cstr(&part), buf_cstr(&whole));
    }
    buf_free(&whole), buf_free(&part);
}

/* ==== Command line, environment, config file ==================================================== */

/* Lines: `NAME=value` is the environment, `-...` an argument (with what follows in the line as the next), `url ...` a
 * callback URL, anything else a line of the config file. */
static void config_feed(cli_settings *c, char *text, int *argc, char **argv) {
    int number = 0;
    for (char *line = text, *end; *line; line = end) {
        size_t n = strcspn(line, "\n");
        end = line + n + (line[n] != 0), line[n] = 0, number++;
        char *space = strchr(line, ' ');
        if (strncmp(line, "LLORCH_", 7) == 0) {
            for (int i = 0; i < N_CLI_OPTIONS; i++) {
                char name[64];
                cli_env_name(&cli_options[i], name);
                size_t k = strlen(name);
                if (strncmp(line, name, k) == 0 && line[k] == '=') cli_store(c, &cli_options[i], line + k + 1, 2, name);
            }
        } else if (*line == '-' && *argc + 2 < 64) {
            argv[(*argc)++] = line;
            if (space) *space = 0, argv[(*argc)++] = space + 1;
        } else if (strncmp(line, "url ", 4) == 0) {
            callback_url u;
            const char *bad = callback_parse(line + 4, &u);
            if (!bad && (u.port < 1 || u.port > 65535 || !*u.host || *u.path != '/')) wrong("callback URL %s: %s %d %s", line + 4, u.host, u.port, u.path);
        } else cli_from_line(c, "file", number, str_make(line, n));
    }
}

/* The first byte chooses the command. */
static void fuzz_config(const unsigned char *p, size_t n) {
    static const enum cli_command commands[] = {CLI_SERVE, CLI_GENERATE, CLI_SCORE, CLI_BENCH, CLI_TOKENIZE};
    static cli_settings c;
    static char *argv[66];
    static char *text;
    int argc = 1;
    memset(&c, 0, sizeof c);
    c.program = "lorch", c.command = n ? commands[*p % 5] : CLI_SERVE;
    text = n ? malloc(n) : NULL;
    if (!text) return;
    memcpy(text, p + 1, n - 1), text[n - 1] = 0;
    memset(argv, 0, sizeof argv);
    argv[0] = text;
    if (setjmp(fuzz_out) == 0) {
        config_feed(&c, text, &argc, argv);
        cli_from_arguments(&c, argc, argv, 1);
        const cli_value *config = &cli_values[cli_find(str_of("config"), CLI_SERVE) - cli_options];
        if (!config->value) cli_merge(&c);
        if (c.command == CLI_SERVE && !config->value && (c.port < 0 || c.port > 65535 || c.parallel < 1 || c.parallel > MAX_PARALLEL ||
            c.queue > MAX_QUEUE || !c.log_level))
            wrong("out of range: port %lld parallel %lld", (long long)c.port, (long long)c.parallel);
        if (!(c.temperature >= 0 && c.temperature <= 2)) wrong("temperature %g", c.temperature);
    } else if (fuzz_exit_code != 2) wrong("exit %d", fuzz_exit_code);
    for (int i = 0; i < N_CLI_OPTIONS; i++) free(cli_values[i].value);
    memset(cli_values, 0, sizeof cli_values);
    free(text), text = NULL;
}

/* ==== Targets ================================================================================== */

typedef struct { const char *name; void (*run)(const unsigned char *p, size_t n); } fuzz_target;
static const fuzz_target targets[] = {
    {"http", fuzz_http}, {"json", fuzz_json}, {"gguf", fuzz_gguf}, {"tokenizer", fuzz_tokenizer}, {"utf8", fuzz_utf8}, {"config", fuzz_config}};
enum { N_TARGETS = sizeof targets / sizeof *targets };

#ifdef FUZZ_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *p, size_t n) {
    static const fuzz_target *t;
    const char *name = getenv("LORCH_FUZZ");
    for (int i = 0; !t && i < N_TARGETS; i++)
        if (name && strcmp(targets[i].name, name) == 0) t = &targets[i];
    if (!t) fprintf(stderr, "LORCH_FUZZ: http, json, gguf, tokenizer, utf8 or config\n"), abort();
    t->run(p, n);
    if (*fuzz_what) fprintf(stderr, "%s: %s\n", t->name, fuzz_what), abort();
    return 0;
}
#else

static int failed, quiet_ok;
static void report(const char *name, long inputs) {
    failed |= *fuzz_what != 0;
    printf("%s - %s\n", *fuzz_what ? "not ok" : "ok", name);
    if (*fuzz_what) printf("# %s\n", fuzz_what);
    if (inputs && !quiet_ok) printf("# %ld inputs\n", inputs);
    *fuzz_what = 0;
    fflush(stdout);
}

typedef struct { unsigned char *p; size_t n; char name[256]; } corpus_file;

static corpus_file *corpus_read(const char *dir, const char *target, int *n) {
    char path[600];
    corpus_file *files = NULL;
    snprintf(path, sizeof path, "%s/%s", dir, target);
    DIR *d = opendir(path);
    *n = 0;
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        if (*e->d_name == '.') continue;
        snprintf(path, sizeof path, "%s/%s/%s", dir, target, e->d_name);
        FILE *f = fopen(path, "rb");
        files = realloc(files, (size_t)(*n + 1) * sizeof *files);
        if (!f || !files) perror(path), abort();
        corpus_file *c = &files[(*n)++];
        c->p = malloc(1 << 20);
        c->n = c->p ? fread(c->p, 1, 1 << 20, f) : 0;
        c->p = realloc(c->p, c->n + 1);
        snprintf(c->name, sizeof c->name, "%.255s", e->d_name);
        fclose(f);
    }
    if (d) closedir(d);
    return files;
}
static void corpus_free(corpus_file *f, int n) {
    for (int i = 0; i < n; i++) free(f[i].p);
    free(f);
}

/* An input of its own size on the heap, so that a sanitizer sees every byte beyond it. */
static void run_one(const fuzz_target *t, const unsigned char *p, size_t n) {
    unsigned char *copy = malloc(n ? n : 1);
    if (!copy) abort();
    memcpy(copy, p, n);
    alarm(60);
    t->run(copy, n);
    free(copy);
}

static void replay(const char *dir) {
    for (int i = 0; i < N_TARGETS; i++) {
        char name[300];
        int n;
        corpus_file *f = corpus_read(dir, targets[i].name, &n);
        snprintf(name, sizeof name, "replay of the corpus: %s", targets[i].name);
        for (int k = 0; k < n && !*fuzz_what; k++) {
            run_one(&targets[i], f[k].p, f[k].n);
            if (*fuzz_what) snprintf(name, sizeof name, "replay of the corpus: %s, %s", targets[i].name, f[k].name);
        }
        if (n == 0) wrong("no files in %s/%s", dir, targets[i].name);
        report(name, n);
        corpus_free(f, n);
    }
}

/* Makes a new input out of two: changes bits, bytes, numbers and digits; deletes, doubles and exchanges pieces. */
static size_t change(unsigned char *out, size_t cap, const corpus_file *a, const corpus_file *b, uint64_t *rng) {
    static const unsigned char telling[] = {0, 1, 0x7f, 0x80, 0xff, '\r', '\n', ' ', ':', '"', '{', '[', ',', '%', '0', '9', '-', ';', '\t', 0xc3, 0xed, 0xf4};
    size_t n = a->n < cap ? a->n : cap;
    memcpy(out, a->p, n);
    for (uint64_t edits = 1 + mk_random(rng) % 6; edits; edits--) {
        uint64_t r = mk_random(rng);
        size_t at = n ? (size_t)(r >> 8) % n : 0, len = n - at ? 1 + (size_t)(r >> 40) % (n - at < 24 ? n - at : 24) : 0;
        switch (r % 8) {
        case 0: if (n) out[at] ^= (unsigned char)(1 << (r >> 60 & 7)); break;
        case 1: if (n) out[at] = telling[(r >> 50) % sizeof telling]; break;
        case 2: if (n) out[at] = (unsigned char)(r >> 50); break;
        case 3: if (n) memmove(out + at, out + at + len, n - at - len), n -= len; break;
        case 4: if (n + len <= cap) memmove(out + at + len, out + at, n - at), n += len; break;
        case 5: if (n < cap) memmove(out + at + 1, out + at, n - at), out[at] = telling[(r >> 50) % sizeof telling], n++; break;
        case 6:
            if (b->n) {
                size_t from = (size_t)(r >> 20) % b->n, take = 1 + (size_t)(r >> 50) % 32;
                if (take > b->n - from) take = b->n - from;
                if (n + take > cap) break;
                memmove(out + at + take, out + at, n - at), memcpy(out + at, b->p + from, take), n += take;
            }
            break;
        default: n -= n ? (size_t)(r >> 40) % (n < 8 ? n : 8) : 0;
        }
    }
    return n;
}

static void run(double seconds, const char *dir) {
    enum { CAP = 1 << 17 };
    unsigned char *out = malloc(CAP);
    if (!out) abort();
    for (int i = 0; i < N_TARGETS; i++) {
        int n;
        corpus_file *f = corpus_read(dir, targets[i].name, &n);
        char name[100];
        uint64_t rng = 1;
        long count = 0;
        double from = sys_now();
        for (; n && !*fuzz_what && sys_now() - from < seconds / N_TARGETS; count++) {
            size_t len = change(out, CAP, &f[mk_random(&rng) % (uint64_t)n], &f[mk_random(&rng) % (uint64_t)n], &rng);
            run_one(&targets[i], out, len);
            if (*fuzz_what) {
                FILE *bad = fopen("build/test/fuzz-failed", "wb");
                if (bad) fwrite(out, 1, len, bad), fclose(bad);
            }
        }
        snprintf(name, sizeof name, "changed inputs: %s", targets[i].name);
        report(name, count);
        corpus_free(f, n);
    }
    free(out);
}

/* ==== Damaged models =========================================================================== */

#define SMALL " vocab=300 ctx=64"
#define TINY SMALL " embd=32 ff=32 layers=1 heads=2 kv=1 hd=16"
#define WIDE SMALL " embd=256 ff=256 layers=1 heads=1 kv=1 hd=256"
static const char *const makes[] = { /* all formats, then all families */
    "llama f32 tokenizer=spm" TINY, "llama q8_0 tokenizer=bpe" TINY, "qwen2 q4_0" TINY, "qwen3 q4_k" WIDE, "llama f16 version=2" TINY, "llama bf16 tied=1" TINY,
    "llama q4_1" TINY, "llama q5_0 freq_factors=1" TINY, "llama q5_1" TINY, "llama q2_k" WIDE, "llama q3_k" WIDE, "qwen2 q5_k" WIDE, "llama q6_k" WIDE,
    "llama iq4_nl" TINY, "qwen3 iq4_xs" WIDE, "llama mxfp4" TINY, "qwen2moe f16" SMALL, "qwen3moe f16" SMALL, "gemma2 f16" SMALL, "gemma3 f16" SMALL, "phi3 f16" SMALL,
    "gpt2 f16" SMALL, "gpt-oss f16" SMALL, "smollm3 f16" SMALL, "olmo2 f16" SMALL, "olmoe f16" SMALL, "granite f16" SMALL, "granitemoe f16" SMALL,
    "starcoder2 f16" SMALL, "stablelm f16" SMALL, "command-r f16" SMALL, "cohere2 f16" SMALL, "exaone4 f16" SMALL, "ernie4_5 f16" SMALL, "glm4 f16" SMALL,
    "lfm2 f16" SMALL, "lfm2moe f16" SMALL, "deepseek2 f16" SMALL};
enum { N_MAKES = sizeof makes / sizeof *makes };

static void made(const char *make, size_t *n, size_t *header) { /* into fuzz_map */
    static const char path[] = "build/test/fuzz.gguf";
    char err[LORCH_ERROR_BYTES];
    make_model(make, path);
    gguf_file *g = gguf_open(path, err, sizeof err);
    if (!g) printf("not ok - %s: %s\n", make, err), abort();
    *n = (size_t)g->size, *header = (size_t)g->data_start;
    gguf_file_of(g->map, *n);
    gguf_close(g);
}

static long mutate_one(const char *make, int full) {
    static const unsigned char others[] = {0, 0xff, 0x7f, 0x80};
    size_t n, header;
    long count = 0;
    uint64_t rng = 7;
    made(make, &n, &header);
    unsigned char *p = malloc(header), *q = fuzz_map;
    if (!p) abort();
    memcpy(p, q, header);
    alarm(60);
    if (!gguf_try(n)) wrong("%s: the whole file is refused", make);
    for (size_t cut = n; cut > 0 && !*fuzz_what; count++) { /* every beginning, the longest first: what is cut off is not needed any more */
        cut -= cut > header ? cut - header < n / 64 ? cut - header : n / 64 : full ? 1 : 1 + cut / 64;
        gguf_size(cut);
        if (alarm(60), gguf_try(cut)) wrong("%s: cut at %zu of %zu, and taken", make, cut, n);
    }
    gguf_size(n);
    memcpy(q, p, header);
    for (size_t at = 0; at < header && !*fuzz_what; at++) /* every byte of the header */
        for (int k = 0; k < 12; k++) {
            if (!full && (mk_random(&rng) & 31)) continue;
            q[at] = k < 8 ? (unsigned char)(p[at] ^ 1 << k) : others[k - 8], count++;
            alarm(60);
            gguf_try(n);
            if (*fuzz_what) printf("# %s: byte %zu as %02x\n", make, at, q[at]);
            q[at] = p[at];
        }
    for (int round = 0; round < (full ? 20000 : 200) && !*fuzz_what; round++, count++) { /* several places, several bytes each */
        memcpy(q, p, header);
        for (uint64_t edits = 1 + mk_random(&rng) % 4; edits; edits--) {
            uint64_t r = mk_random(&rng), v = mk_random(&rng) >> (r >> 60 & 63);
            size_t at = (size_t)(r >> 8) % header, width = (size_t)1 << (r & 3);
            if (r >> 56 & 1) v = (uint64_t)1 << (r >> 50 & 63);
            if (at + width <= header) memcpy(q + at, &v, width);
        }
        alarm(60);
        gguf_try(n);
        if (*fuzz_what) printf("# %s: round %d\n", make, round);
    }
    free(p);
    return count;
}

static void mutate(int full) {
    for (int i = 0; i < N_MAKES; i++) {
        char name[200];
        long count = mutate_one(makes[i], full);
        snprintf(name, sizeof name, "damaged files: %.*s", (int)(strstr(makes[i], " vocab=") - makes[i]), makes[i]);
        report(name, count);
    }
}

/* ==== No memory ================================================================================ */

static void no_memory(void) {
    long total = 0;
    for (int i = 0; i < N_MAKES; i++) {
        size_t n, header;
        char err[LORCH_ERROR_BYTES];
        made(makes[i], &n, &header);
        for (long at = 1;; at++, total++) { /* each allocation, and each mapping */
            faults.kind = at & 1 ? FAULT_ALLOC : FAULT_MAP, faults.error = ENOMEM;
            faults.at = (at + 1) / 2 + faults.count[faults.kind];
            long before = faults.count[FAULT_ALLOC];
            *err = 0;
            model *m = model_load(fuzz_path, NULL, err, sizeof err);
            int hit = faults.count[faults.kind] >= faults.at;
            faults.at = 0;
            if (hit && m) wrong("%s: allocation %ld failed, and nobody noticed", makes[i], (at + 1) / 2);
            if (!m && !*err) wrong("%s: allocation %ld: no message", makes[i], (at + 1) / 2);
            model_free(m);
            if (!hit && (at & 1) && faults.count[FAULT_ALLOC] - before < (at + 1) / 2) break;
        }
    }
    report("every allocation of loading a model fails in turn", total);
    static const char *const jobs[] = {
        "\1\1POST /execute HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\nContent-Length: 147\r\n\r\n"
        "{\"job_id\":\"a\",\"prompt\":\"x\\u00e9\",\"stop\":[\"a\",\"b\"],\"seed\":-1,"
        "\"top_p\":7.0000000000000000000000000000000000000000000000000000000000000000000001,\"q\":1}",
        "\2\1POST /cancel/a%41 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\nPOST /cancel HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n{\"job_id\":1}"};
    total = 0;
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) {
        buf out = {0};
        http_server(0);
        for (long at = 1;; at++, total++) {
            faults.kind = FAULT_ALLOC, faults.error = ENOMEM, faults.at = at + faults.count[FAULT_ALLOC];
            out.len = 0, out.failed = 0;
            http_talk((const unsigned char *)jobs[i] + 2, strlen(jobs[i]) - 2, 0, 4096, jobs[i][0], &out);
            int hit = faults.count[FAULT_ALLOC] >= faults.at;
            faults.at = 0, *fuzz_what = 0; /* an answer may be missing: the connection is closed then */
            if (!hit) break;
        }
        buf_free(&out);
    }
    report("every allocation of answering requests fails in turn", total);
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "";
    signal(SIGPIPE, SIG_IGN);
    if (strcmp(mode, "replay") == 0 && argc == 3) replay(argv[2]);
    else if (strcmp(mode, "run") == 0 && argc == 4) run(atof(argv[2]), argv[3]);
    else if (strcmp(mode, "mutate") == 0) mutate(argc > 2);
    else if (strcmp(mode, "memory") == 0) no_memory();
    else return puts("fuzz replay DIR | run SECONDS DIR | mutate [full] | memory"), 2;
    for (int i = 0; i < n_fuzz_tok; i++) tok_free(fuzz_tok[i].t), gguf_close(fuzz_tok[i].g);
    engine_close(fuzz_engine);
    return failed;
}
#endif
