/* SPDX-License-Identifier: MIT
 *
 * unit: the parts of lorch.c from inside. The file is included, so that its static functions are in reach.
 *
 *   cc -O1 tests/unit.c -o unit -lpthread -lm && ./unit [NAME-PART ...]
 *
 * It runs in the top directory; LORCH_SHARED adds the JSON conformance files. Expected values are derived
 * here from the definition of each thing, never with the function under test. */
#define LORCH_NO_MAIN
#include "../lorch.c"

#include <dirent.h>
#include <sys/wait.h>

/* ==== Results ================================================================================ */

static struct {
    int bad, details, failed, run;
    const char *skip;
    char text[4096]; /* details: printed below the test's line */
    size_t len;
} unit;

__attribute__((format(printf, 1, 2))) static void unit_note(const char *fmt, ...) {
    va_list ap;
    size_t room = sizeof unit.text - unit.len;
    va_start(ap, fmt);
    int n = vsnprintf(unit.text + unit.len, room, fmt, ap);
    va_end(ap);
    if (n > 0) unit.len += (size_t)n < room ? (size_t)n : room - 1;
}

__attribute__((format(printf, 3, 4))) static void unit_fail(int line, const char *expr, const char *fmt, ...) {
    va_list ap;
    unit.bad = 1;
    if (unit.details++ >= 8) return; /* the first symptoms are enough */
    char what[400];
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    unit_note("# unit.c:%d: %s: ", line, expr);
    for (char *p = what; *p; p++) unit_note("%c", (unsigned char)*p < ' ' ? '.' : *p); /* one line, whatever it shows */
    unit_note("\n");
}

#define CHECK(expr, ...) ((expr) ? (void)0 : unit_fail(__LINE__, #expr, __VA_ARGS__))

typedef struct {
    uint64_t state;
} rng;

static uint64_t rng_next(rng *r) { /* SplitMix64 */
    uint64_t z = r->state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}
static uint32_t rng_below(rng *r, uint32_t n) { return (uint32_t)(rng_next(r) % n); }
static float rng_float(rng *r) { /* any bit pattern: denormals, infinities and NaNs too */
    return num_float((uint32_t)rng_next(r));
}
static float rng_small(rng *r) { return (float)((int32_t)rng_next(r)) * 0x1p-29f; } /* -4..4 */

/* ==== Text =================================================================================== */

/* UTF-8 by its table of well-formed sequences (Unicode 15, table 3-7), written as ranges of bytes. */
static const unsigned char utf8_table[9][9] = { /* length, then the lowest and highest of each byte */
    {1, 0x00, 0x7f},
    {2, 0xc2, 0xdf, 0x80, 0xbf},
    {3, 0xe0, 0xe0, 0xa0, 0xbf, 0x80, 0xbf},
    {3, 0xe1, 0xec, 0x80, 0xbf, 0x80, 0xbf},
    {3, 0xed, 0xed, 0x80, 0x9f, 0x80, 0xbf},
    {3, 0xee, 0xef, 0x80, 0xbf, 0x80, 0xbf},
    {4, 0xf0, 0xf0, 0x90, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
    {4, 0xf1, 0xf3, 0x80, 0xbf, 0x80, 0xbf, 0x80, 0xbf},
    {4, 0xf4, 0xf4, 0x80, 0x8f, 0x80, 0xbf, 0x80, 0xbf},
};

/* What utf8_decode must answer: the length, 0 for a beginning, -k for a maximal subpart of k bytes. */
static int utf8_expected(const unsigned char *p, int n) {
    for (int row = 0; row < 9; row++) {
        const unsigned char *t = utf8_table[row];
        int k = 0;
        while (k < t[0] && k < n && p[k] >= t[1 + 2 * k] && p[k] <= t[2 + 2 * k]) k++;
        if (k == 0) continue; /* the rows' first bytes do not overlap */
        return k == t[0] ? k : k == n ? 0 : -k;
    }
    return -1;
}

static void test_utf8_decode(void) {
    static const unsigned char edges[] = {0x00, 0x01, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xe1,
                                          0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xf8, 0xfc, 0xff};
    enum { N = sizeof edges };
    for (int i = 0; i < N * N * N * N; i++) {
        unsigned char p[4] = {edges[i % N], edges[i / N % N], edges[i / N / N % N], edges[i / N / N / N]};
        for (int n = 1; n <= 4; n++) {
            uint32_t cp = 0;
            int got = utf8_decode((const char *)p, (size_t)n, &cp), want = utf8_expected(p, n);
            CHECK(got == want, "%02x %02x %02x %02x, %d bytes: %d, not %d", p[0], p[1], p[2], p[3], n, got, want);
        }
    }
    uint32_t cp;
    CHECK(utf8_decode("", 0, &cp) == 0, "nothing is a beginning");
}

static void test_utf8_round_trip(void) {
    for (uint32_t c = 0; c < 0x110000; c++) {
        char out[4];
        uint32_t back = 1;
        if (c >= 0xd800 && c < 0xe000) continue;
        int n = utf8_encode(c, out), k = utf8_decode(out, (size_t)n, &back);
        CHECK(k == n && back == c, "U+%04X: %d bytes, read as %d and U+%04X", c, n, k, back);
        CHECK(n == (c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4), "U+%04X has %d bytes", c, n);
    }
    static const struct { const char *text; int64_t n; } rows[] = {
        {"", 0}, {"abc", 3}, {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 3}, {"\xed\xa0\x80", -1}, {"\xf4\x90\x80\x80", -1}, {"a\xc3", -1}, {"\xc0\x80", -1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        CHECK(utf8_count(str_of(rows[i].text)) == rows[i].n, "row %d: %d", (int)i, (int)utf8_count(str_of(rows[i].text)));
}

static void test_unicode_categories(void) {
    static const struct { uint32_t cp; int category; } rows[] = {
        {0, UC_CC}, {0x1f, UC_CC}, {0x20, UC_ZS}, {'!', UC_PO}, {'$', UC_SC}, {'(', UC_PS}, {')', UC_PE}, {'+', UC_SM}, {'-', UC_PD},
        {'0', UC_ND}, {'9', UC_ND}, {':', UC_PO}, {'A', UC_LU}, {'Z', UC_LU}, {'[', UC_PS}, {'^', UC_SK}, {'_', UC_PC}, {'`', UC_SK},
        {'a', UC_LL}, {'z', UC_LL}, {'~', UC_SM}, {0x7f, UC_CC}, {0xa0, UC_ZS}, {0xa9, UC_SO}, {0xaa, UC_LO}, {0xab, UC_PI},
        {0xad, UC_CF}, {0xb2, UC_NO}, {0xbb, UC_PF}, {0xd7, UC_SM}, {0xdf, UC_LL}, {0x100, UC_LU}, {0x101, UC_LL}, {0x1c5, UC_LT},
        {0x2b0, UC_LM}, {0x300, UC_MN}, {0x378, UC_CN}, {0x391, UC_LU}, {0x3b1, UC_LL}, {0x410, UC_LU}, {0x430, UC_LL},
        {0x488, UC_ME}, {0x5d0, UC_LO}, {0x660, UC_ND}, {0x903, UC_MC}, {0x1680, UC_ZS}, {0x200b, UC_CF}, {0x2028, UC_ZL},
        {0x2029, UC_ZP}, {0x20ac, UC_SC}, {0x2160, UC_NL}, {0x3000, UC_ZS}, {0x3042, UC_LO}, {0x4dff, UC_SO}, {0x4e00, UC_LO},
        {0x9fff, UC_LO}, {0xa000, UC_LO}, {0xabff, UC_CN}, {0xac00, UC_LO}, {0xd7a3, UC_LO}, {0xd7a4, UC_CN}, {0xd800, UC_CS},
        {0xdfff, UC_CS}, {0xe000, UC_CO}, {0xf8ff, UC_CO}, {0xf900, UC_LO}, {0xfeff, UC_CF}, {0xff10, UC_ND}, {0xfffd, UC_SO},
        {0xffff, UC_CN}, {0x10400, UC_LU}, {0x10428, UC_LL}, {0x1d400, UC_LU}, {0x1d7ce, UC_ND}, {0x1f600, UC_SO}, {0x20000, UC_LO},
        {0x2a6df, UC_LO}, {0x2a6e0, UC_CN}, {0x2ebf0, UC_LO}, {0x2ee5d, UC_LO}, {0x2ee5e, UC_CN}, {0xe0100, UC_MN}, {0xf0000, UC_CO},
        {0xffffd, UC_CO}, {0xffffe, UC_CN}, {0x10fffd, UC_CO}, {0x10ffff, UC_CN}};
    static const uint32_t spaces[] = {9, 10, 13, 32, 0x85, 0xa0, 0x1680, 0x2000, 0x200a, 0x2028, 0x2029, 0x202f, 0x205f, 0x3000};
    static const uint32_t others[] = {8, 14, 33, 0x84, 0xa1, 0x180e, 0x1fff, 0x200b, 0x2060, 0x3001, 0xfeff};
    int count[30] = {0};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        CHECK(unicode_category(rows[i].cp) == rows[i].category, "U+%04X: %d, not %d", rows[i].cp, unicode_category(rows[i].cp), rows[i].category);
    for (size_t i = 0; i < sizeof spaces / 4; i++) CHECK(unicode_is_space(spaces[i]), "U+%04X", spaces[i]);
    for (size_t i = 0; i < sizeof others / 4; i++) CHECK(!unicode_is_space(others[i]), "U+%04X", others[i]);
    for (uint32_t c = 0; c < 0x110000; c++) count[unicode_category(c)]++;
    CHECK(count[UC_CS] == 2048 && count[UC_CC] == 65 && count[UC_LT] == 31 && count[UC_ZS] == 17, "%d %d %d %d", count[UC_CS], count[UC_CC],
          count[UC_LT], count[UC_ZS]);
    CHECK(count[UC_ND] == 680 && count[UC_CO] == 137468 && count[UC_ZL] == 1 && count[UC_ZP] == 1, "%d %d", count[UC_ND], count[UC_CO]);
}

/* ---- JSON ---- */

/* The events of a document as letters, "!" for an error. */
static const char *json_shape(str text) {
    static const char letters[] = "!.{}[]ks0tfn";
    static char out[300];
    json_reader r = json_open(text);
    size_t n = 0;
    enum json_type t;
    do {
        t = json_next(&r);
        if (n < sizeof out - 1) out[n++] = letters[t];
    } while (t != JSON_ERROR && t != JSON_END);
    out[n] = 0;
    if (t == JSON_ERROR && json_next(&r) != JSON_ERROR) return "the error does not stick";
    return out;
}

static void test_json_reader(void) {
    static const struct { const char *text, *shape; } rows[] = {
        {"{}", "{}."}, {"[]", "[]."}, {" null ", "n."}, {"true", "t."}, {"false", "f."}, {"-0.5e+3", "0."}, {"\"a\"", "s."},
        {"{\"a\":1,\"b\":[true,{}]}", "{k0k[t{}]}."}, {"[[],[[]]]", "[[][[]]]."}, {"\t\r\n[ 1 ,\n2 ]", "[00]."},
        {"", "!"}, {" ", "!"}, {"{", "{!"}, {"[1", "[0!"}, {"[1,]", "[0!"}, {"{,}", "{!"}, {"{\"a\"}", "{!"}, {"{\"a\":}", "{k!"},
        {"{\"a\":1,}", "{k0!"}, {"{1:2}", "{!"}, {"[1 2]", "[0!"}, {"1 2", "0!"}, {"]", "!"}, {"[}", "[!"}, {"{]", "{!"}, {"nul", "!"},
        {"nulL", "!"}, {"truE", "!"}, {"01", "0!"}, {"-", "!"}, {"+1", "!"}, {"1.", "!"}, {".5", "!"}, {"1e", "!"}, {"1e+", "!"}, {"-01", "0!"},
        {"0x1", "0!"}, {"NaN", "!"}, {"\"\x1f\"", "!"}, {"\"\\x\"", "!"}, {"\"\\u12g4\"", "!"}, {"\"\\ud800\"", "!"}, {"\"\\udc00\"", "!"},
        {"\"\\ud83d\\ude00\"", "s."}, {"\"\\ud83d\\ud83d\"", "!"}, {"\"\xff\"", "!"}, {"\"\xed\xa0\x80\"", "!"}, {"\"abc", "!"}, {"\"abc\\\"", "!"},
        {"\xef\xbb\xbf{}", "!"}, {"'a'", "!"}, {"[1]x", "[0]!"}, {"/**/1", "!"}, {"\"\\u0000\"", "s."}, {"\v1", "!"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *got = json_shape(str_of(rows[i].text));
        CHECK(!strcmp(got, rows[i].shape), "%s: %s, not %s", rows[i].text, got, rows[i].shape);
    }
    CHECK(!strcmp(json_shape(str_make("[\0]", 3)), "[!"), "a NUL is no space");
    for (int depth = MAX_JSON_DEPTH - 1; depth <= MAX_JSON_DEPTH + 1; depth++) {
        char text[256], want[300];
        memset(text, '[', 128), memset(text + depth, ']', 128);
        memset(want, '[', 128), memset(want + depth, ']', 128);
        strcpy(want + 2 * depth, ".");
        if (depth > MAX_JSON_DEPTH) strcpy(want + MAX_JSON_DEPTH, "!");
        CHECK(!strcmp(json_shape(str_make(text, (size_t)(2 * depth))), want), "depth %d: %s", depth, json_shape(str_make(text, (size_t)(2 * depth))));
    }
}

static void test_json_values(void) {
    static const struct { const char *token; int ok; uint64_t v; } whole[] = {
        {"0", 1, 0}, {"7", 1, 7}, {"18446744073709551615", 1, UINT64_MAX}, {"18446744073709551616", 0, 0}, {"99999999999999999999", 0, 0},
        {"1e3", 1, 1000}, {"1.0", 1, 1}, {"1.5", 0, 0}, {"-1", 0, 0}, {"-0", 1, 0}, {"1e400", 0, 0}, {"9007199254740992e0", 0, 0}, {"25e-1", 0, 0}, {"20e-1", 1, 2}};
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++) {
        uint64_t v = 0;
        int ok = json_u64(str_of(whole[i].token), &v);
        CHECK(ok == whole[i].ok && (!ok || v == whole[i].v), "%s: %d, %llu", whole[i].token, ok, (unsigned long long)v);
    }
    static const struct { const char *token; double v; } floats[] = {
        {"0", 0}, {"-1.5", -1.5}, {"1e-3", 0.001}, {"123456789.25", 123456789.25}, {"5e-324", 5e-324}, {"0.1", 0.1}};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) CHECK(json_double(str_of(floats[i].token)) == floats[i].v, "%s", floats[i].token);
    CHECK(json_double(str_of("1e999")) == INFINITY && json_double(str_of("-1e999")) == -INFINITY, "beyond the range");
    char digits[400];
    memset(digits, '9', 300), strcpy(digits + 300, "e-300");
    CHECK(fabs(json_double(str_of(digits)) - 1) < 1e-15, "300 digits: %g", json_double(str_of(digits)));
    static const struct { const char *token, *text; size_t n; } strings[] = {
        {"", "", 0}, {"abc", "abc", 3}, {"\\n\\t\\r\\b\\f\\/\\\\\\\"", "\n\t\r\b\f/\\\"", 8}, {"\\u0041\\u00e9\\u20AC", "A\xc3\xa9\xe2\x82\xac", 6},
        {"a\\u0000b", "a\0b", 3}, {"\\ud83d\\ude00!", "\xf0\x9f\x98\x80!", 5}, {"\\uffff", "\xef\xbf\xbf", 3}, {"x\\u007f", "x\x7f", 2}};
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        buf b = {0};
        json_unescape(str_of(strings[i].token), &b);
        CHECK(str_eq(buf_str(&b), str_make(strings[i].text, strings[i].n)), "%s: %.*s", strings[i].token, (int)b.len, b.ptr);
        buf_free(&b);
    }
}

static void test_json_skip(void) {
    json_reader r = json_open(str_of("{\"a\":[1,{\"x\":[[]]}],\"b\":\"s\",\"c\":7}"));
    CHECK(json_next(&r) == JSON_OBJECT, "no object");
    for (int i = 0; i < 2; i++) {
        CHECK(json_next(&r) == JSON_KEY, "no key");
        json_skip(&r, json_next(&r));
    }
    CHECK(json_next(&r) == JSON_KEY && str_is(r.token, "c"), "after the skipped values comes c");
    CHECK(json_next(&r) == JSON_NUMBER && str_is(r.token, "7"), "its value");
    CHECK(json_next(&r) == JSON_OBJECT_END && json_next(&r) == JSON_END, "the end");
}

static void test_json_writer(void) {
    static const struct { const char *text; size_t n; const char *json; } rows[] = {
        {"", 0, "\"\""}, {"a\"b\\c", 5, "\"a\\\"b\\\\c\""}, {"\n\t\r", 3, "\"\\n\\t\\u000d\""}, {"\0\x1f\x7f", 3, "\"\\u0000\\u001f\\u007f\""},
        {"\xc3\xa9\xf0\x9f\x98\x80", 6, "\"\xc3\xa9\xf0\x9f\x98\x80\""}, {"\xff", 1, "\"\xef\xbf\xbd\""}, {"a\xc3", 2, "\"a\xef\xbf\xbd\""},
        {"\xf0\x9f\x98x", 4, "\"\xef\xbf\xbdx\""}, {"\xed\xa0\x80", 3, "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""}};
    buf b = {0};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        b.len = 0;
        json_put_str(&b, str_make(rows[i].text, rows[i].n));
        CHECK(str_is(buf_str(&b), rows[i].json), "row %d: %.*s", (int)i, (int)b.len, b.ptr);
    }
    b.len = 0;
    buf_putc(&b, '{');
    json_kv_cstr(&b, "a", "x"), json_kv_int(&b, "b", INT64_MIN), json_kv_u64(&b, "c", UINT64_MAX), json_kv_bool(&b, "d", 0);
    json_kv_num(&b, "e", 1.25, 2), json_kv_num(&b, "f", (double)NAN, 2), json_kv_num(&b, "g", (double)INFINITY, 2);
    buf_putc(&b, '}');
    CHECK(str_is(buf_str(&b), "{\"a\":\"x\",\"b\":-9223372036854775808,\"c\":18446744073709551615,\"d\":false,\"e\":1.25,\"f\":null,\"g\":null}"), "%s", buf_cstr(&b));
    rng r = {5};
    for (int i = 0; i < 20000; i++) { /* any bytes: what is written reads back as their UTF-8 reading */
        char raw[24];
        size_t n = rng_below(&r, sizeof raw);
        for (size_t k = 0; k < n; k++) raw[k] = (char)rng_next(&r);
        b.len = 0;
        json_put_str(&b, str_make(raw, n));
        json_reader reader = json_open(buf_str(&b));
        CHECK(json_next(&reader) == JSON_STRING && json_next(&reader) == JSON_END, "not a string: %s", buf_cstr(&b));
        buf back = {0};
        json_unescape(reader.token, &back);
        if (utf8_count(str_make(raw, n)) >= 0) CHECK(str_eq(buf_str(&back), str_make(raw, n)), "not the same: %s", buf_cstr(&b));
        buf_free(&back);
    }
    buf_free(&b);
}

static void test_json_files(void) {
    const char *root = getenv("LORCH_SHARED");
    char dir[600], path[1200];
    static char text[1 << 20];
    int n = 0;
    if (!root || !*root) {
        unit.skip = "LORCH_SHARED is not set";
        return;
    }
    snprintf(dir, sizeof dir, "%s/testdata/json", root);
    DIR *d = opendir(dir);
    CHECK(d, "cannot open %s", dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        if (!strstr(e->d_name, ".json")) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        FILE *f = fopen(path, "rb");
        size_t len = f ? fread(text, 1, sizeof text, f) : 0;
        if (f) fclose(f);
        char *exact = malloc(len + !len); /* so that a sanitizer sees a read beyond the end */
        if (exact) memcpy(exact, text, len);
        json_reader r = json_open(str_make(exact, len));
        enum json_type t;
        do t = json_next(&r);
        while (t != JSON_ERROR && t != JSON_END);
        int want = e->d_name[0] == 'y' || !strncmp(e->d_name, "i_number_", 9); /* free to choose: all numbers, nothing that is not UTF-8, depth 64 */
        CHECK((t == JSON_END) == want, "%s is %s", e->d_name, t == JSON_END ? "accepted" : r.error);
        free(exact), n++;
    }
    if (d) closedir(d);
    CHECK(n > 300, "only %d files", n);
}

static void test_sha256(void) { /* the examples of FIPS 180-4, and lengths around the padding */
    static const struct { const char *text; int times; const char *hash; } rows[] = {
        {"", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", 1, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"a", 1000, "41edece42d63e8d9bf515a9ba6932e1c20cbc9f5a5d134645adb5db1b9737ea3"},
        {"a", 55, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318"},
        {"a", 64, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        buf b = {0};
        unsigned char hash[32];
        char hex[65];
        for (int k = 0; k < rows[i].times; k++) buf_puts(&b, rows[i].text);
        sha256(buf_str(&b), hash);
        for (int k = 0; k < 32; k++) sprintf(hex + 2 * k, "%02x", hash[k]);
        CHECK(strcmp(hex, rows[i].hash) == 0, "row %d: %s", (int)i, hex);
        buf_free(&b);
    }
}

static void test_buf_and_str(void) {
    buf b = {0};
    for (int i = 0; i < 1000; i++) buf_printf(&b, "%d,", i);
    CHECK(b.len == 10 * 2 + 90 * 3 + 900 * 4 && !b.failed, "%d bytes", (int)b.len);
    buf_drop(&b, b.len - 4);
    CHECK(str_is(buf_str(&b), "999,") && strlen(buf_cstr(&b)) == 4 && b.len == 4, "%.*s", (int)b.len, b.ptr);
    buf_free(&b);
    CHECK(str_is(buf_str(&b), "") && !strcmp(buf_cstr(&b), ""), "an empty buffer");
    buf_free(&b);
    CHECK(!buf_reserve(&b, SIZE_MAX) && b.failed, "the whole address space");
    buf_puts(&b, "x");
    CHECK(b.len == 0 && !strcmp(buf_cstr(&b), ""), "a failed buffer stays empty");
    buf_free(&b);
    CHECK(str_ieq(str_of("Content-LENGTH"), "content-length") && !str_ieq(str_of("a"), "ab") && !str_ieq(str_of("@"), "`"), "letters without case");
    CHECK(str_is(str_trim(str_of(" \t a b\t ")), "a b") && str_trim(str_of(" \t")).len == 0, "trimming");
}

/* ==== Numbers ================================================================================ */

static int same_float(float a, float b) { return num_bits(a) == num_bits(b) || (a != a && b != b); }

/* What a half float is worth, by its definition. */
static double half_value(unsigned h) {
    int e = (int)(h >> 10 & 31), m = (int)(h & 1023);
    double v = e == 31 ? (m ? (double)NAN : (double)INFINITY) : e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

static void test_half_floats(void) {
    for (unsigned h = 0; h < 65536; h++) {
        float f = num_from_f16((uint16_t)h);
        CHECK(same_float(f, (float)half_value(h)) && !signbit(f) == !(h & 0x8000), "%04x: %g, not %g", h, (double)f, half_value(h));
        uint16_t back = num_to_f16(f);
        CHECK(f != f ? (back & 0x7fff) > 0x7c00 : back == h, "%04x comes back as %04x", h, back);
        CHECK(same_float(num_from_bf16((uint16_t)h), num_float((uint32_t)h << 16)), "bfloat %04x", h);
        if (h >= 0x7bff) continue;
        /* around the middle between two neighbours: to the nearest, the middle to the even one */
        float mid = (float)((half_value(h) + half_value(h + 1)) / 2);
        CHECK(num_to_f16(mid) == (h & 1 ? h + 1 : h), "the middle above %04x gives %04x", h, num_to_f16(mid));
        CHECK(num_to_f16(nextafterf(mid, 0)) == h && num_to_f16(nextafterf(mid, 1e6f)) == h + 1, "beside the middle above %04x", h);
    }
    CHECK(num_to_f16(65519.996f) == 0x7bff && num_to_f16(65520) == 0x7c00 && num_to_f16(-1e30f) == 0xfc00 && num_to_f16(INFINITY) == 0x7c00, "the largest");
    rng r = {1};
    for (int i = 0; i < 2000000; i++) { /* any float: no half is nearer */
        float f = rng_float(&r);
        uint16_t h = num_to_f16(f);
        if (f != f) {
            CHECK((h & 0x7c00) == 0x7c00 && (h & 0x3ff), "NaN gives %04x", h);
            continue;
        }
        if (fabs((double)f) >= 65520) CHECK((h & 0x7fff) == 0x7c00, "%g gives %04x", (double)f, h);
        else {
            double error = fabs(half_value(h) - (double)f), ulp = fabs((double)f) < 0x1p-14 ? 0x1p-24 : ldexp(1, ilogb((double)f) - 10);
            CHECK(error <= ulp / 2, "%g gives %04x, off by %g", (double)f, h, error);
        }
        CHECK(!(h & 0x8000) == !signbit(f), "the sign of %g", (double)f);
    }
}

static void test_fma(void) {
    rng r = {2};
    volatile float exact[3]; /* volatile: libm must see them at run time */
    for (int i = 0; i < 3000000; i++) {
        float a = i % 3 ? rng_float(&r) : rng_small(&r), b = i % 3 ? rng_float(&r) : rng_small(&r), c;
        switch (i % 8) { /* c cancels the product, lies around a rounding boundary, or is anything */
        case 0: c = -(a * b); break;
        case 1: c = nextafterf(-(a * b), INFINITY); break;
        case 2: c = (a * b) * 0x1p24f; break;
        case 3: c = (a * b) * 0x1p25f; break;
        case 4: c = num_float(num_bits(a * b) ^ (rng_below(&r, 3) << 23)); break;
        case 5: c = (a * b) * 0x1p-24f; break;
        case 6: c = rng_small(&r) * 0x1p-126f; break;
        default: c = rng_float(&r);
        }
        if (i % 16 == 9)
            a = num_float(0x3f800001u + rng_below(&r, 8)), b = num_float(0x3f800001u + rng_below(&r, 8)), c = num_float(0x33800000u + rng_below(&r, 3) - 1);
        exact[0] = a, exact[1] = b, exact[2] = c;
        float want = fmaf(exact[0], exact[1], exact[2]), got = num_fma(a, b, c);
        CHECK(same_float(want, got), "fma(%a, %a, %a) = %a, not %a", (double)a, (double)b, (double)c, (double)got, (double)want);
    }
}

static void test_exp_log(void) {
    rng r = {3};
    double worst_exp = 0, worst_log = 0;
    for (int i = 0; i < 300000; i++) {
        double x = ldexp((double)(int64_t)rng_next(&r), -63) * (i % 2 ? 700 : 4);
        double e = fabs(num_exp(x) / exp(x) - 1);
        if (e > worst_exp) worst_exp = e;
        double y = num_double((rng_next(&r) >> 2) % 0x7fe0000000000000u + 0x0010000000000000u); /* every normal magnitude */
        if (i % 4 == 0) y = 1 + x / 1e6;
        if (!(y > 0)) continue;
        double want = log(y), d = fabs(num_log(y) - want) / (fabs(want) > 0.1 ? fabs(want) : 0.1);
        if (d > worst_log) worst_log = d;
    }
    CHECK(worst_exp < 1e-15, "exp is off by %g", worst_exp);
    CHECK(worst_log < 1e-15, "log is off by %g", worst_log);
    CHECK(num_exp(0) == 1 && num_exp(-1e9) == 0 && num_exp(-(double)INFINITY) == 0, "exp of 0 and far below");
    CHECK(num_exp(710) == (double)INFINITY && num_exp((double)NAN) != num_exp((double)NAN), "exp above, and of NaN");
    CHECK(num_log(1) == 0, "log of 1");
}

static void test_sincos(void) {
    rng r = {4};
    double worst = 0;
    for (int i = 0; i < 300000; i++) {
        double x = ldexp((double)(rng_next(&r) >> 11), -53) * (i % 2 ? 131072 : 10), s, c;
        if (i % 5 == 0) x = floor(x); /* positions */
        num_sincos(x, &s, &c);
        double e = fmax(fabs(s - sin(x)), fabs(c - cos(x)));
        if (e > worst) worst = e;
    }
    CHECK(worst < 1e-15, "off by %g", worst);
    double s, c;
    num_sincos(0, &s, &c);
    CHECK(s == 0 && c == 1, "at 0");
}

/* ==== Number formats ========================================================================= */

/* The value of weight i of a block, straight from the format's description in ggml-common.h: which bits of
 * which bytes. Scales are powers of two here, so every product is exact. */
static double half_at(const unsigned char *p) { return half_value(p[0] | (unsigned)p[1] << 8); }
static int nibble(const unsigned char *q, int i, int high) { return high ? q[i] >> 4 : q[i] & 15; }
static int k4_scale(const unsigned char *s, int j) { return j < 4 ? s[j] & 63 : (s[j + 4] & 15) + 16 * (s[j - 4] >> 6); }
static int k4_min(const unsigned char *s, int j) { return j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) + 16 * (s[j] >> 6); }
static const int iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const double fp4_values[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};

static double weight_32(int type, const unsigned char *b, int i) {
    int h = i >= 16, k = i % 16;
    double d = half_at(b);
    uint32_t bits;
    switch (type) {
    case QUANT_Q4_0: return d * (nibble(b + 2, k, h) - 8);
    case QUANT_Q4_1: return d * nibble(b + 4, k, h) + half_at(b + 2);
    case QUANT_Q5_0: return memcpy(&bits, b + 2, 4), d * (nibble(b + 6, k, h) + (int)(bits >> i & 1) * 16 - 16);
    case QUANT_Q5_1: return memcpy(&bits, b + 4, 4), d * (nibble(b + 8, k, h) + (int)(bits >> i & 1) * 16) + half_at(b + 2);
    case QUANT_Q8_0: return d * (signed char)b[2 + i];
    case QUANT_IQ4_NL: return d * iq4_values[nibble(b + 2, k, h)];
    default: /* MXFP4: E8M0 scale, E2M1 codes */
        h = nibble(b + 1, k, h);
        return (h & 8 ? -1 : 1) * fp4_values[h & 7] * ldexp(1, b[0] - 127);
    }
}

static double weight_256(int type, const unsigned char *b, int i) {
    int c = i / 64, h = i / 32 % 2, k = i % 32, g = i / 16, two = 2 * (i / 32 % 4), q, s;
    switch (type) {
    case QUANT_Q2_K: /* scales[16], qs[64], d, dmin */
        q = b[16 + i / 128 * 32 + k] >> two & 3;
        return half_at(b + 80) * (b[g] & 15) * q - half_at(b + 82) * (b[g] >> 4);
    case QUANT_Q3_K: /* hmask[32], qs[64], scales[12], d */
        q = (b[32 + i / 128 * 32 + k] >> two & 3) - (b[k] >> (i / 32) & 1 ? 0 : 4);
        s = (g < 8 ? b[96 + g] & 15 : b[96 + g - 8] >> 4) | (b[104 + g % 4] >> 2 * (g / 4) & 3) << 4;
        return half_at(b + 108) * (s - 32) * q;
    case QUANT_Q4_K: /* d, dmin, scales[12], qs[128] */
        return half_at(b) * k4_scale(b + 4, i / 32) * nibble(b + 16 + 32 * c, k, h) - half_at(b + 2) * k4_min(b + 4, i / 32);
    case QUANT_Q5_K: /* d, dmin, scales[12], qh[32], qs[128] */
        q = nibble(b + 48 + 32 * c, k, h) + 16 * (b[16 + k] >> (i / 32) & 1);
        return half_at(b) * k4_scale(b + 4, i / 32) * q - half_at(b + 2) * k4_min(b + 4, i / 32);
    case QUANT_Q6_K: { /* ql[128], qh[64], scales[16], d */
        int part = i % 128 / 32, low = b[64 * (i / 128) + k + 32 * (part % 2)];
        q = (part < 2 ? low & 15 : low >> 4) + 16 * (b[128 + 32 * (i / 128) + k] >> 2 * part & 3) - 32;
        return half_at(b + 208) * (signed char)b[192 + g] * q;
    }
    default: /* IQ4_XS: d, scales_h, scales_l[4], qs[128] */
        c = i / 32;
        s = (b[4 + c / 2] >> 4 * (c % 2) & 15) | ((b[2] | b[3] << 8) >> 2 * c & 3) << 4;
        return half_at(b) * (s - 32) * iq4_values[nibble(b + 8 + 16 * c, k % 16, k >= 16)];
    }
}

static const struct { int type, d, m; } quant_rows[] = { /* where the half floats of a block are, or -1 */
    {QUANT_Q4_0, 0, -1}, {QUANT_Q4_1, 0, 2}, {QUANT_Q5_0, 0, -1}, {QUANT_Q5_1, 0, 2}, {QUANT_Q8_0, 0, -1}, {QUANT_IQ4_NL, 0, -1}, {QUANT_MXFP4, -1, -1},
    {QUANT_Q2_K, 80, 82}, {QUANT_Q3_K, 108, -1}, {QUANT_Q4_K, 0, 2}, {QUANT_Q5_K, 0, 2}, {QUANT_Q6_K, 208, -1}, {QUANT_IQ4_XS, 0, -1}};

static void test_quant_unpack(void) {
    rng r = {6};
    unsigned char block[256];
    float got[256];
    int covered = 0;
    for (size_t row = 0; row < sizeof quant_rows / sizeof *quant_rows; row++) {
        const quant_format *f = quant_find((uint32_t)quant_rows[row].type);
        covered++;
        for (int round = 0; round < 300; round++) {
            for (int i = 0; i < f->bytes; i++) block[i] = (unsigned char)rng_next(&r);
            uint16_t d = (uint16_t)((10 + rng_below(&r, 8)) << 10 | (rng_next(&r) & 0x8000)), m = (uint16_t)((10 + rng_below(&r, 8)) << 10);
            if (quant_rows[row].d >= 0) memcpy(block + quant_rows[row].d, &d, 2);
            if (quant_rows[row].m >= 0) memcpy(block + quant_rows[row].m, &m, 2);
            if (quant_rows[row].type == QUANT_MXFP4) block[0] = (unsigned char)(round < 250 ? 2 + round : round % 2);
            quant_dequantise(f, block, got, f->block);
            for (int i = 0; i < f->block; i++) {
                double want = f->block == 32 ? weight_32(quant_rows[row].type, block, i) : weight_256(quant_rows[row].type, block, i);
                CHECK((double)got[i] == want, "%s, weight %d: %g, not %g", f->name, i, (double)got[i], want);
            }
        }
    }
    for (int type = 0; type < QUANT_TYPES; type++) covered -= quant_formats[type].kind == QUANT_BLOCKS || quant_formats[type].kind == QUANT_SUPERBLOCKS;
    CHECK(covered == 0, "%d formats are not in this test's table", -covered);
    uint16_t h[2] = {0x3c01, 0xc0a0};
    quant_dequantise(quant_find(QUANT_F16), h, got, 2);
    CHECK((double)got[0] == half_value(0x3c01) && (double)got[1] == half_value(0xc0a0), "F16");
    quant_dequantise(quant_find(QUANT_BF16), h, got, 2);
    CHECK(num_bits(got[0]) == 0x3c010000 && num_bits(got[1]) == 0xc0a00000, "BF16");
}

static void test_quant_table(void) {
    /* The sizes of ggml's blocks: bytes for so many weights. */
    static const struct { uint32_t type; int block, bytes; const char *name; } rows[] = {
        {0, 1, 4, "F32"}, {1, 1, 2, "F16"}, {2, 32, 18, "Q4_0"}, {3, 32, 20, "Q4_1"}, {6, 32, 22, "Q5_0"}, {7, 32, 24, "Q5_1"}, {8, 32, 34, "Q8_0"},
        {10, 256, 84, "Q2_K"}, {11, 256, 110, "Q3_K"}, {12, 256, 144, "Q4_K"}, {13, 256, 176, "Q5_K"}, {14, 256, 210, "Q6_K"}, {16, 256, 66, "IQ2_XXS"},
        {19, 256, 50, "IQ1_S"}, {20, 32, 18, "IQ4_NL"}, {23, 256, 136, "IQ4_XS"}, {30, 1, 2, "BF16"}, {39, 32, 17, "MXFP4"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const quant_format *f = quant_find(rows[i].type);
        CHECK(f && f->block == rows[i].block && f->bytes == rows[i].bytes && !strcmp(f->name, rows[i].name), "type %u", rows[i].type);
        if (f) CHECK(quant_row_bytes(f, 768) == (size_t)(768 / rows[i].block * rows[i].bytes), "a row of %s", f->name);
    }
    CHECK(!quant_find(4) && !quant_find(5) && !quant_find(QUANT_TYPES) && !quant_find(UINT32_MAX), "numbers that name no format");
}

static void test_quant_activations(void) {
    rng r = {7};
    float x[256], d;
    int8_t q[256];
    for (int round = 0; round < 3000; round++) {
        int n = round % 2 ? 32 : 256;
        float scale = num_float((uint32_t)(60 + rng_below(&r, 150)) << 23), most = 0;
        for (int i = 0; i < n; i++) x[i] = rng_small(&r) * scale, most = fmaxf(most, fabsf(x[i]));
        quant_activations(x, n, q, &d);
        float by = 127.0f / most;
        double want = (double)(most / 127.0f);
        int e = ilogb(want) - 10; /* of 32, the scale has the 11 bits of a half float, without a half's limits */
        if (n == 32) want = ldexp(nearbyint(ldexp(want, -e)), e);
        CHECK((double)d == want, "d is %g, not %g", (double)d, want);
        for (int i = 0; i < n; i++) CHECK(q[i] == (int)nearbyintf(x[i] * by), "%g over %g gives %d", (double)x[i], (double)most, q[i]);
    }
    for (int i = 0; i < 32; i++) x[i] = 0;
    quant_activations(x, 32, q, &d);
    CHECK(d == 0 && q[0] == 0 && q[31] == 0, "zeros");
    x[3] = 1e-39f; /* no normal number */
    quant_activations(x, 32, q, &d);
    CHECK(d == 0 && q[3] == 0, "denormals");
    x[3] = INFINITY;
    quant_activations(x, 32, q, &d);
    CHECK(d != d, "an infinity");
    x[3] = NAN;
    quant_activations(x, 32, q, &d);
    CHECK(d != d, "a NaN");
    x[3] = 3.4e38f, x[4] = -3.4e38f;
    quant_activations(x, 32, q, &d);
    CHECK(q[3] == 127 && q[4] == -127, "the largest floats give %d and %d", q[3], q[4]);
}

/* quant_dot is the program's specification; here it meets the definition in long arithmetic. */
static void test_quant_dot(void) {
    rng r = {8};
    unsigned char row[4 * 256];
    float x[512], w[512], d;
    int8_t q[256];
    for (int type = 0; type < QUANT_TYPES; type++) {
        const quant_format *f = &quant_formats[type];
        if (f->kind == QUANT_NONE) continue;
        for (int round = 0; round < 50; round++) {
            mat_random m = {rng_next(&r) | 1};
            int n = f->block == 1 ? 100 : 2 * f->block;
            mat_draw_rows(&m, f, (char *)row, (size_t)(n / f->block));
            for (int i = 0; i < n; i++) x[i] = rng_small(&r);
            quant_dequantise(f, row, w, n);
            double sum = 0, bound = 0;
            for (int from = 0; from < n; from += f->block) {
                if (f->block > 1) quant_activations(x + from, f->block, q, &d);
                for (int i = from; i < from + f->block; i++) {
                    double xi = f->block > 1 ? (double)d * q[i - from] : (double)x[i];
                    sum += (double)w[i] * xi, bound += fabs((double)w[i] * xi);
                }
            }
            double got = (double)quant_dot(f, row, x, n);
            CHECK(fabs(got - sum) <= bound * 2e-5 + 1e-30, "%s: %g, not %g", f->name, got, sum);
        }
    }
}

/* ==== Kernels: every level that runs here ==================================================== */

/* The comparison with quant_dot, over shapes with every kind of tail, is mat_selftest's. */
static void test_kernel_products(void) {
    char err[256] = "";
    for (int level = 0; level < MAT_LEVELS; level++)
        for (int type = 0; mat_level_runs(level) && type < QUANT_TYPES; type++)
            if (quant_formats[type].kind != QUANT_NONE) CHECK(mat_selftest(level, &quant_formats[type], err, sizeof err), "%s", err);
}

static void test_kernel_vectors(void) {
    char err[256] = "";
    int ran = 0;
    for (int level = 0; level < MAT_LEVELS; level++)
        if (mat_level_runs(level)) CHECK(mat_selftest_vectors(level, err, sizeof err), "%s", err), ran++;
    unit_note("# %d of %d levels run here\n", ran, MAT_LEVELS);
}

/* More shapes than the self-test has: 1..9 tokens and row counts around the tiles, at random. */
static void test_kernel_shapes(void) {
    rng r = {9};
    char err[256] = "";
    for (int level = 0; level < MAT_LEVELS; level++)
        for (int type = 0; mat_level_runs(level) && type < QUANT_TYPES; type++) {
            const quant_format *f = &quant_formats[type];
            if (f->kind == QUANT_NONE) continue;
            for (int tokens = 1; tokens <= 9; tokens++) {
                int64_t n = f->block == 1 ? 1 + rng_below(&r, 300) : f->block * (1 + (int64_t)rng_below(&r, f->block == 32 ? 20 : 3));
                CHECK(mat_selftest_product(mat_levels[level], f, n, 1 + rng_below(&r, 140), tokens, err, sizeof err), "%s", err);
            }
        }
}

/* The scalar level's vector kernels against their definitions. */
static void test_kernel_definitions(void) {
    const mat_kernels *k = mat_levels[0];
    rng r = {10};
    enum { N = 203 };
    float x[N], y[N], out[N];
    double sum = 0;
    for (int i = 0; i < N; i++) x[i] = rng_small(&r), y[i] = rng_small(&r), sum += (double)x[i] * (double)x[i];
    k->rms_norm(out, x, y, N, 1e-5f);
    for (int i = 0; i < N; i++) {
        double want = (double)x[i] / sqrt(sum / N + 1e-5) * (double)y[i];
        CHECK(fabs((double)out[i] - want) < 1e-5, "rms_norm %d: %g, not %g", i, (double)out[i], want);
    }
    memcpy(out, x, sizeof x);
    k->activate(MAT_SILU, out, y, N);
    for (int i = 0; i < N; i++) {
        double want = (double)x[i] / (1 + exp(-(double)x[i])) * (double)y[i];
        CHECK(fabs((double)out[i] - want) < 1e-5, "swiglu %d: %g, not %g", i, (double)out[i], want);
    }
    k->exp_shifted(out, x, N, 4.5f);
    for (int i = 0; i < N; i++) CHECK(fabs((double)out[i] / exp((double)x[i] - 4.5) - 1) < 1e-6, "exp %d", i);
    memcpy(out, x, sizeof x);
    k->add(out, y, N);
    for (int i = 0; i < N; i++) CHECK(out[i] == x[i] + y[i], "add %d", i);
    for (int apart = 0; apart < 2; apart++) {
        float angles[32]; /* a cosine and a sine for each pair: here those of arctan 4/3 and of pi/2 */
        for (int i = 0; i < 16; i++) angles[2 * i] = i % 2 ? 0 : 0.6f, angles[2 * i + 1] = i % 2 ? 1 : 0.8f;
        memcpy(out, x, sizeof x);
        k->rope(out, angles, 32, apart);
        for (int i = 0; i < 16; i++) {
            int a = apart ? i : 2 * i, b = apart ? i + 16 : 2 * i + 1;
            double c = (double)angles[2 * i], s = (double)angles[2 * i + 1], want_a = c * (double)x[a] - s * (double)x[b], want_b = s * (double)x[a] + c * (double)x[b];
            CHECK(fabs((double)out[a] - want_a) < 1e-5 && fabs((double)out[b] - want_b) < 1e-5, "rope, pair %d", i);
        }
        CHECK(memcmp(out + 32, x + 32, sizeof x - 32 * sizeof *x) == 0, "rope touches what is beyond n_rot");
    }
}

/* What a feed-forward layer does with its inputs, by the formulas of enum mat_activation. */
static double activated(enum mat_activation a, double g, double u, int gated) {
    if (a == MAT_SWIGLU7) g = g < 7 ? g : 7, u = (u < -7 ? -7 : u > 7 ? 7 : u) + 1;
    double sigmoid = 1 / (1 + exp(-(a == MAT_SWIGLU7 ? 1.702 * g : g))), phi = 0.5 * (1 + tanh(sqrt(2 / acos(-1.0)) * (g + 0.044715 * g * g * g)));
    return g * (a == MAT_GELU ? phi : sigmoid) * (gated ? u : 1);
}

static void test_kernel_formulas(void) {
    const mat_kernels *k = mat_levels[0];
    rng r = {11};
    enum { N = 203 };
    float x[N], y[N], out[N];
    double mean = 0, variance = 0;
    for (int i = 0; i < N; i++) x[i] = 3 * rng_small(&r), y[i] = 3 * rng_small(&r), mean += (double)x[i] / N;
    for (int i = 0; i < N; i++) variance += ((double)x[i] - mean) * ((double)x[i] - mean) / N;
    k->layer_norm(out, x, y, N, 1e-5f);
    for (int i = 0; i < N; i++) {
        double want = ((double)x[i] - mean) / sqrt(variance + 1e-5) * (double)y[i];
        CHECK(fabs((double)out[i] - want) < 1e-5, "layer_norm %d: %g, not %g", i, (double)out[i], want);
    }
    static const enum mat_activation kinds[] = {MAT_SILU, MAT_GELU, MAT_SWIGLU7};
    for (int kind = 0; kind < 3; kind++)
        for (int gated = kinds[kind] == MAT_SWIGLU7; gated < 2; gated++) {
            memcpy(out, x, sizeof x);
            k->activate(kinds[kind], out, gated ? y : NULL, N);
            for (int i = 0; i < N; i++) {
                double want = activated(kinds[kind], (double)x[i], (double)y[i], gated);
                CHECK(fabs((double)out[i] - want) < 2e-5 * (1 + fabs(want)), "activation %d, gated %d, of %g, %g: %g, not %g", kind, gated, (double)x[i],
                      (double)y[i], (double)out[i], want);
            }
        }
    memcpy(out, x, sizeof x);
    k->cap(out, N, 5);
    for (int i = 0; i < N; i++) CHECK(fabs((double)out[i] - 5 * tanh((double)x[i] / 5)) < 1e-5, "cap %d: %g", i, (double)out[i]);
}

enum { NAIVE_HEADS = 4, NAIVE_DIM = 24, NAIVE_LENGTH = 150 };

/* Attention of one head of the last token over `length` positions, one after the other, in double precision. */
static void naive_attention(const mat_attention *a, const float *q, const float *key, const float *value, int head, double *out) {
    double score[NAIVE_LENGTH], most = a->sinks ? (double)a->sinks[head] : -1e300, sum;
    int from = a->window && NAIVE_LENGTH > a->window ? NAIVE_LENGTH - a->window : 0;
    for (int t = from; t < NAIVE_LENGTH; t++) {
        score[t] = 0;
        for (int d = 0; d < NAIVE_DIM; d++) score[t] += (double)q[head * NAIVE_DIM + d] * (double)key[(t * 2 + head / 2) * NAIVE_DIM + d];
        score[t] *= (double)a->scale;
        if (a->cap > 0) score[t] = (double)a->cap * tanh(score[t] / (double)a->cap);
        if (score[t] > most) most = score[t];
    }
    sum = a->sinks ? exp((double)a->sinks[head] - most) : 0;
    for (int d = 0; d < NAIVE_DIM; d++) out[d] = 0;
    for (int t = from; t < NAIVE_LENGTH; t++) {
        double weight = exp(score[t] - most);
        sum += weight;
        for (int d = 0; d < NAIVE_DIM; d++) out[d] += weight * (double)value[(t * 2 + head / 2) * NAIVE_DIM + d];
    }
    for (int d = 0; d < NAIVE_DIM; d++) out[d] /= sum;
}

static void test_kernel_attention(void) {
    static const float sinks[NAIVE_HEADS] = {0.5f, -1, 2, 0};
    static float q[NAIVE_HEADS * NAIVE_DIM], key[NAIVE_LENGTH * 2 * NAIVE_DIM], value[NAIVE_LENGTH * 2 * NAIVE_DIM], out[NAIVE_HEADS * NAIVE_DIM];
    const mat_kernels *k = mat_levels[0];
    size_t head_bytes = mat_head_bytes(NAIVE_DIM, MAT_KV_F32), scratch_bytes = mat_attention_scratch(NAIVE_HEADS, 2, NAIVE_DIM);
    char *cache = calloc(3 * 2, head_bytes), *scratch = sys_pages(scratch_bytes);
    const uint32_t block[3] = {2, 0, 1}, *blocks = block;
    const int32_t pos = NAIVE_LENGTH - 1, group[2] = {0, 1};
    rng r = {12};
    for (size_t i = 0; i < sizeof q / sizeof *q; i++) q[i] = rng_small(&r);
    for (size_t i = 0; i < sizeof key / sizeof *key; i++) key[i] = rng_small(&r), value[i] = rng_small(&r);
    for (int t = 0; t < NAIVE_LENGTH; t++)
        for (int h = 0; h < 2; h++)
            k->store(cache + (block[t / KV_BLOCK] * 2 + (size_t)h) * head_bytes, key + (t * 2 + h) * NAIVE_DIM, value + (t * 2 + h) * NAIVE_DIM, t % KV_BLOCK,
                     NAIVE_DIM, MAT_KV_F32);
    for (int kind = 0; kind < 8; kind++) {
        mat_attention a = {q, out, &pos, &blocks, group, cache, 2 * head_bytes, head_bytes, MAT_KV_F32, NAIVE_HEADS, 2, NAIVE_DIM, 0.2f,
                           kind & 1 ? 70 : 0, kind & 2 ? 3.0f : 0, kind & 4 ? sinks : NULL};
        for (int h = 0; h < 2; h++) k->attend(&a, 0, h, scratch);
        for (int h = 0; h < NAIVE_HEADS; h++) {
            double want[NAIVE_DIM];
            naive_attention(&a, q, key, value, h, want);
            for (int d = 0; d < NAIVE_DIM; d++)
                CHECK(fabs((double)out[h * NAIVE_DIM + d] - want[d]) < 1e-5, "attention, kind %d, head %d, %d: %g, not %g", kind, h, d,
                      (double)out[h * NAIVE_DIM + d], want[d]);
        }
    }
    free(cache), sys_pages_free(scratch, scratch_bytes);
}

static void test_kernel_choice(void) {
    char err[256] = "";
    setenv("LORCH_SIMD", "scalar", 1);
    const mat_kernels *k = mat_choose(err, sizeof err);
    CHECK(k && !strcmp(k->name, "scalar"), "%s", err);
    setenv("LORCH_SIMD", "abacus", 1);
    CHECK(!mat_choose(err, sizeof err) && strstr(err, "abacus"), "%s", err);
    unsetenv("LORCH_SIMD");
    k = mat_choose(err, sizeof err);
    CHECK(k, "%s", err);
    unit_note("# the level in use here is %s\n", k ? k->name : "none");
}

/* ==== Thread pool ============================================================================ */

enum { POOL_ITEMS = 5000 };
static int pool_hits[POOL_ITEMS], pool_bad_thread;

static void pool_touch(void *ctx, int64_t item, int thread) {
    __atomic_fetch_add(&pool_hits[item], 1, __ATOMIC_RELAXED);
    if (thread < 0 || thread >= *(int *)ctx) __atomic_store_n(&pool_bad_thread, 1, __ATOMIC_RELAXED);
    for (volatile int i = 0; i < (int)(item % 50); i++) {}
}

static void test_pool(void) {
    rng r = {11};
    for (int threads = 1; threads <= 5; threads += 2) {
        pool p;
        pool_start(&p, threads);
        CHECK(p.n_threads == threads, "%d threads of %d", p.n_threads, threads);
        int n_threads = p.n_threads, rounds = threads == 1 ? 50 : 400;
        for (int round = 0; round < rounds; round++) {
            int64_t n = round % 10 == 0 ? rng_below(&r, 3) : rng_below(&r, round % 50 == 1 ? POOL_ITEMS : 60), wrong = 0;
            memset(pool_hits, 0, sizeof pool_hits);
            if (round % 40 == 7) usleep(3000); /* long enough for the workers to fall asleep */
            pool_run(&p, pool_touch, &n_threads, n);
            for (int64_t i = 0; i < POOL_ITEMS; i++) wrong += pool_hits[i] != (i < n);
            CHECK(wrong == 0, "%d threads, round %d of %d items: %d wrong", threads, round, (int)n, (int)wrong);
        }
        CHECK(!pool_bad_thread, "a thread's number is out of range");
        pool_stop(&p);
    }
}

/* ==== Tokenizers ============================================================================= */

/* Cuts a text by a pre-tokenizer; the pieces come with bars between them. */
static const char *cut(const char *pre, const char *text) {
    static char out[1000];
    static uint32_t cp[200], at[200];
    static unsigned char category[200];
    static tok_span spans[2][200];
    static tok t;
    tok_text w = {cp, category, at, 0};
    size_t len = strlen(text), n_out = 0;
    memset(&t, 0, sizeof t);
    if (!tok_find_pre(&t, str_of(pre))) return "no such pre-tokenizer";
    for (size_t i = 0; i < len; w.n++) {
        at[w.n] = (uint32_t)i;
        i += (size_t)utf8_decode(text + i, len - i, &cp[w.n]);
        category[w.n] = (unsigned char)unicode_category(cp[w.n]);
    }
    at[w.n] = (uint32_t)len;
    int n = w.n > 0, side = 0;
    spans[0][0].from = 0, spans[0][0].to = w.n;
    for (int s = 0; s < t.rules.n_stages; s++, side = !side) n = tok_cut(&t.rules, s, &w, spans[side], n, spans[!side]);
    for (int i = 0; i < n; i++) {
        if (i) out[n_out++] = '|';
        for (uint32_t k = at[spans[side][i].from]; k < at[spans[side][i].to]; k++) out[n_out++] = text[k];
    }
    out[n_out] = 0;
    return out;
}

static void test_pre_tokenizers(void) {
    static const struct { const char *pre, *text, *pieces; } rows[] = {
        /* as Python's regex module cuts them with the tokenizers' published patterns; where there are several, each cuts the pieces of the
         * one before, so that a later one may cut what an earlier one has matched */
        {"gpt-2", "Hello world's 123  x\n\ny", "Hello| world|'s| 123| | x|\n|\n|y"},
        {"gpt-2", "we'll I'M don't", "we|'ll| I|'|M| don|'t"},
        {"gpt-2", "a\xc3\xa9\xc3\xa9 \xe4\xb8\xad\xe6\x96\x87!?", "a\xc3\xa9\xc3\xa9| \xe4\xb8\xad\xe6\x96\x87|!?"},
        {"gpt-2", "   ", "   "},
        {"llama-bpe", "Hello WORLD'S 1234567", "Hello| WORLD|'S| |123|456|7"},
        {"llama-bpe", "x  y\n\n z", "x| | y|\n\n| z"},
        {"llama-bpe", "a.b c!\n\nd", "a|.b| c|!\n\n|d"},
        {"llama-bpe", "tab\there", "tab|\there"},
        {"qwen2", "1234 a", "1|2|3|4| a"},
        {"qwen2", "foo  \n bar", "foo|  \n| bar"},
        {"llama3", "12345", "123|45"},
        {"default", "a1234b, c", "a|123|4|b|,| c"},
        {"default", "$+<=>^~|", "$+<=>^~|"},
        {"gpt-4o", "iPhoneX's HTTPServer 12345", "i|Phone|X's| HTTPServer| |123|45"},
        {"gpt-4o", "\xd0\x9f\xd1\x80\xd0\x98 a/\n/b", "\xd0\x9f\xd1\x80\xd0\x98| a|/\n/|b"},
        {"tekken", "iPhoneX's 123", "i|Phone|X|'s| |1|2|3"},
        {"qwen35", "e\xcc\x81t 12", "e\xcc\x81t| |1|2"},
        {"qwen2", "e\xcc\x81t 12", "e|\xcc\x81t| |1|2"},
        {"laguna", "a \n\n b", "a| |\n\n| b"},
        {"ufakzeka", "it's", "it|'s"},
        {"minicpm5", "a 12345", "a| |123|45"},
        {"smollm", "a12 b", "a|1|2| b"},
        {"falcon", "a`b 1234", "a|`|b| |123|4"},
        {"seed-coder", "a.\n\nb", "a|.|\n\n|b"},
        {"bailingmoe", "a.\n\nb'LL", "a|.\n\n|b|'LL"},
        {"exaone-moe", "new york e\xcc\x81t  x", "new york e\xcc\x81t| | x"},
        {"deepseek-llm", "Hello w\xc3\xb6rld\xe4\xb8\xad\xe6\x96\x87" "123 !!\n  ", "Hello| w|\xc3\xb6|rld|\xe4\xb8\xad\xe6\x96\x87|123| !!|\n|  "},
        {"deepseek-llm", "\xe3\x80\x80,", "\xe3\x80\x80,"},
        {"deepseek-coder", "a b,\n12", "a| b|,|\n|1|2"},
        {"deepseek-v3", "x.y 1234\xe4\xb8\xad\xe3\x81\x8b" "b?!\n", "x|.y| |123|4|\xe4\xb8\xad\xe3\x81\x8b|b|?!\n"},
        {"spark2_5", "?!\n", "?!|\n"},
        {"youtu", "\xed\x95\x9c\xea\xb5\xad\xe4\xb8\xad" "a12", "\xed\x95\x9c\xea\xb5\xad|\xe4\xb8\xad|a|1|2"},
        {"kimi-k2", "\xe4\xb8\xad\xe6\x96\x87" "a's\xe4\xb8\xad 1234", "\xe4\xb8\xad\xe6\x96\x87|a's|\xe4\xb8\xad| |123|4"},
        {"superbpe", "ab 1234567.89 x", "ab |1|234|567|.|89| x"},
        {"superbpe", "\xc2\xbd" "12345", "\xc2\xbd" "12|345"},
        {"afmoe", "ab1234567", "ab|1|234|567"},
        {"tiny_aya", "a 12345", "a| |12|345"},
        {"viking", "Hei, maa 12!", "Hei|,| maa| |1|2|!"},
        {"poro-chat", "Hei, maa 12!", "Hei|,| maa| 12|!"},
        {"jais-2", "a       b", "a|    |  | b"},
        {"chameleon", "<sentinel:12>IMGIMGABZ  a.b", "<|sentinel|:|1|2|>|IMGIMGABZ|  |a|.|b"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const char *got = cut(rows[i].pre, rows[i].text);
        CHECK(!strcmp(got, rows[i].pieces), "%s, \"%s\": %s, not %s", rows[i].pre, rows[i].text, got, rows[i].pieces);
    }
}

static void test_pre_names(void) {
    static char readme[1 << 16];
    FILE *f = fopen("README.md", "rb");
    size_t len = f ? fread(readme, 1, sizeof readme - 1, f) : 0;
    CHECK(len > 0 && len < sizeof readme - 1, "README.md has %zu bytes", len);
    if (f) fclose(f);
    for (size_t i = 0; i < sizeof tok_pres / sizeof *tok_pres; i++)
        for (const char *p = tok_pres[i].names; *p;) {
            char name[64];
            size_t n = strcspn(p, " ");
            snprintf(name, sizeof name, "`%.*s`", (int)n, p);
            CHECK(strstr(readme, name), "README.md does not list the pre-tokenizer %s", name);
            p += n + (p[n] == ' ');
        }
}

/* The table of pre-tokenizers fits the limits of tok_rules; a set's ranges ascend and do not overlap, as its search expects. */
static void test_pattern_limits(void) {
    static tok_rules r;
    for (size_t i = 0; i < sizeof tok_pres / sizeof *tok_pres; i++) {
        const char *names = tok_pres[i].names;
        tok_parse_rules(&tok_pres[i], &r);
        CHECK(r.n_alts < TOK_ALTS && r.n_items < TOK_ITEMS && r.n_ranges < TOK_RANGES, "%s: %d, %d, %d", names, r.n_alts, r.n_items, r.n_ranges);
        CHECK(r.n_stages == TOK_STAGES || !tok_pres[i].stage[r.n_stages], "%s has more stages than fit", names);
        for (int k = 0; k < r.n_alts; k++) {
            int depth = 0;
            for (int item = r.alt[k].item; item >= 0; item = r.item[item].next) depth++;
            CHECK(depth >= 1 && depth <= TOK_DEPTH, "%s: alternative %d has %d items", names, k, depth);
        }
        for (int k = 0; k < r.n_items; k++) {
            const tok_set *set = &r.item[k].set;
            for (int j = set->first; j < set->first + set->n + set->n_minus; j++) {
                CHECK(r.lo[j] <= r.hi[j], "%s: a range from %x to %x", names, (unsigned)r.lo[j], (unsigned)r.hi[j]);
                if (j > set->first && j != set->first + set->n)
                    CHECK(r.lo[j] > r.hi[j - 1], "%s: %x follows %x", names, (unsigned)r.lo[j], (unsigned)r.hi[j - 1]);
            }
        }
        for (size_t k = 0; k < i; k++)
            for (const char *p = names; *p;) {
                char name[64];
                size_t n = strcspn(p, " ");
                snprintf(name, sizeof name, " %.*s ", (int)n, p);
                char other[512];
                snprintf(other, sizeof other, " %s ", tok_pres[k].names);
                CHECK(!strstr(other, name), "%s stands twice", name);
                p += n + (p[n] == ' ');
            }
    }
}

/* No pattern takes square time on any text: 65,536 characters take milliseconds, or else half a minute. */
static void test_pattern_time(void) {
    enum { LONG = 65536 };
    static const struct { const char *name; uint32_t unit[4], last; } texts[] = {
        {"capitals", {'A'}, '1'}, {"spaces before a digit", {' '}, '1'}, {"digits", {'7'}, 'x'}, {"CJK", {0x4e2d}, ' '}, {"apostrophes", {'\''}, 's'},
        {"letters and spaces", {'a', ' '}, ' '}, {"marks", {0x301}, 'a'}, {"lines", {' ', '\n'}, '.'}, {"emoji", {0x1f600}, ' '}};
    static uint32_t cp[LONG], at[LONG + 1];
    static unsigned char category[LONG];
    static tok_span spans[2][LONG];
    static tok_rules r;
    for (size_t k = 0; k < sizeof texts / sizeof *texts; k++) {
        tok_text w = {cp, category, at, LONG};
        for (int i = 0; i < LONG; i++) {
            int n = 1;
            while (texts[k].unit[n]) n++;
            cp[i] = i == LONG - 1 ? texts[k].last : texts[k].unit[i % n], category[i] = (unsigned char)unicode_category(cp[i]), at[i] = (uint32_t)i;
        }
        for (size_t i = 0; i < sizeof tok_pres / sizeof *tok_pres; i++) {
            int n = 1, side = 0;
            double start = sys_now();
            tok_parse_rules(&tok_pres[i], &r);
            spans[0][0].from = 0, spans[0][0].to = LONG;
            for (int s = 0; s < r.n_stages; s++, side = !side) n = tok_cut(&r, s, &w, spans[side], n, spans[!side]);
            CHECK(sys_now() - start < 2, "%s, %s: %.2f s", tok_pres[i].names, texts[k].name, sys_now() - start);
            CHECK(spans[side][0].from == 0 && spans[side][n - 1].to == LONG, "%s, %s: the pieces are not the whole", tok_pres[i].names, texts[k].name);
            for (int j = 1; j < n; j++)
                if (spans[side][j].from != spans[side][j - 1].to) CHECK(0, "%s, %s: a gap at %d", tok_pres[i].names, texts[k].name, spans[side][j].from);
        }
    }
}

/* Texts that are tokens of a vocabulary, "+" for those of type normal; the tokens that end a generation; those that are shown. */
static void test_end_tokens(void) {
    static const struct { const char *texts, *ends, *shown; int key; } rows[] = {
        {"a b", "", "", -1},
        {"a b", "b", "", 1},
        {"a </s> <s>", "</s>", "", -1},
        {"<|begin_of_text|> <|end_of_text|> <|eom_id|> <|eot_id|> <|start_header_id|>", "<|end_of_text|> <|eom_id|> <|eot_id|>", "", -1},
        {"<|endoftext|> <|im_start|> +<|im_end|>", "<|endoftext|> +<|im_end|>", "", 0},
        {"<|im_end|> <|fim_prefix|> <|fim_middle|> <|fim_pad|> <|repo_name|> <|file_sep|>", "<|im_end|> <|fim_pad|> <|repo_name|> <|file_sep|>", "", -1},
        {"<bos> <eos> <start_of_turn> <end_of_turn>", "<eos> <end_of_turn>", "", -1},
        {"<|user|> <|end|> <|assistant|> <|endoftext|>", "<|end|> <|endoftext|>", "", -1},
        {"<|start|> <|end|> <|message|> <|channel|> <|constrain|> <|return|> <|call|>", "<|return|> <|call|>",
         "<|start|> <|end|> <|message|> <|channel|> <|constrain|>", 5},
        {"<|end|> <|flush|> <|calls|>", "<|flush|> <|calls|>", "<|end|>", -1},
        {"<|end|> <|flush|>", "<|end|> <|flush|>", "", -1},
        {"</s> <|tool_response> <turn|>", "<|tool_response> <turn|>", "", -1},
        {"[EOT] [EOS] [PAD] [UNK]", "[EOT] [EOS] [PAD]", "", -1},
        {"<fim_prefix> <fim_suffix> <fim_pad> <reponame> < EOT > EOT", "<fim_pad> <reponame>", "", -1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        tok_entry entry[8];
        uint32_t table[32] = {0};
        tok t = {0};
        gguf_file none = {0};
        char ends[300] = "", shown[300] = "";
        memset(entry, 0, sizeof entry);
        t.entry = entry, t.table = table, t.table_mask = 31, t.eos = rows[i].key;
        for (const char *p = rows[i].texts; *p; t.n++) {
            size_t n = strcspn(p, " "), normal = *p == '+';
            entry[t.n].text = str_make(p + normal, n - normal), entry[t.n].type = normal ? TOK_NORMAL : TOK_CONTROL;
            uint64_t h = str_hash(entry[t.n].text) & t.table_mask;
            while (table[h]) h = (h + 1) & t.table_mask;
            table[h] = (uint32_t)t.n + 1;
            p += n + (p[n] == ' ');
        }
        tok_mark_ends(&t, &none);
        const char *p = rows[i].texts;
        for (int id = 0; id < t.n; id++) {
            size_t n = strcspn(p, " ");
            if (entry[id].ends) snprintf(ends + strlen(ends), sizeof ends - strlen(ends), "%s%.*s", *ends ? " " : "", (int)n, p);
            if (entry[id].shown) snprintf(shown + strlen(shown), sizeof shown - strlen(shown), "%s%.*s", *shown ? " " : "", (int)n, p);
            if (entry[id].ends && id != rows[i].key) CHECK(entry[id].type == TOK_CONTROL, "%.*s ends a generation and is no control token", (int)n, p);
            p += n + (p[n] == ' ');
        }
        CHECK(!strcmp(ends, rows[i].ends), "of %s end: %s", rows[i].texts, ends);
        CHECK(!strcmp(shown, rows[i].shown), "of %s are shown: %s", rows[i].texts, shown);
    }
}

static gguf_file *tiny_file(void) {
    char err[512] = "";
    gguf_file *g = gguf_open("tests/models/lorch-tiny-q8_0.gguf", err, sizeof err);
    CHECK(g, "%s", err);
    return g;
}

static void test_token_pieces(void) {
    char err[512] = "";
    gguf_file *g = tiny_file();
    tok *t = g ? tok_load(g, NULL, err, sizeof err) : NULL;
    CHECK(t, "%s", err);
    rng r = {12};
    for (int round = 0; t && round < 3000; round++) {
        buf text = {0}, back = {0};
        tok_ids ids = {0};
        for (int i = (int)rng_below(&r, 40); i > 0; i--) {
            char out[4];
            uint32_t c = round % 2 ? 32 + rng_below(&r, 95) : rng_below(&r, 0x110000);
            if (c >= 0xd800 && c < 0xe000) c = 0x2581 + 1;
            if (c == 0x2581) c++; /* SentencePiece's own space */
            buf_add(&text, out, (size_t)utf8_encode(c, out));
        }
        CHECK(tok_encode(t, buf_str(&text), 0, &ids), "round %d", round);
        tok_decode(t, ids.id, ids.n, 0, &back);
        CHECK(str_eq(buf_str(&text), buf_str(&back)), "round %d: %s comes back as %s", round, buf_cstr(&text), buf_cstr(&back));
        for (int i = 0; i < ids.n; i++) CHECK(ids.id[i] >= 0 && ids.id[i] < t->n && t->entry[ids.id[i]].type != TOK_CONTROL, "id %d in plain text", ids.id[i]);
        buf_free(&text), buf_free(&back), free(ids.id);
    }
    if (t) {
        tok_ids ids = {0};
        CHECK(!tok_encode(t, str_of("a\xff"), 0, &ids), "text that is not UTF-8");
        CHECK(tok_encode(t, str_of(""), TOK_BOS, &ids) && ids.n == t->add_bos, "the empty text has %d ids", ids.n);
        free(ids.id);
        memset(&ids, 0, sizeof ids);
        int32_t end = tok_find(t, str_of("<|im_end|>"));
        t->add_eos = 1, tok_mark_rstrip(t, str_of("my PHI3 mini"));
        CHECK(tok_encode(t, str_of("<|im_end|> \n<|im_end|>"), TOK_BOS | TOK_SPECIAL, &ids) && ids.n == t->add_bos + 3, "%d ids", ids.n);
        CHECK(end >= 0 && ids.n > 2 && ids.id[t->add_bos] == end && ids.id[t->add_bos + 1] == end, "two ends, and the space between them is swallowed");
        CHECK(ids.n > 0 && ids.id[ids.n - 1] == t->eos, "EOS where the file asks for it");
        free(ids.id);
        buf b = {0};
        tok_piece(t, -1, 1, &b), tok_piece(t, t->n, 1, &b);
        CHECK(b.len == 0, "ids outside the vocabulary have no text");
        buf_free(&b);
    }
    tok_free(t), gguf_close(g);
}

/* ==== KV cache =============================================================================== */

static void test_kv_pool(void) {
    kv_pool p;
    enum { BLOCKS = 37, SEQS = 6 };
    uint32_t table[SEQS][BLOCKS];
    kv_seq seq[SEQS];
    rng r = {13};
    CHECK(kv_blocks_for(1) == 1 && kv_blocks_for(KV_BLOCK) == 1 && kv_blocks_for(KV_BLOCK + 1) == 2 && kv_blocks_for(0) == 0, "blocks for positions");
    kv_layout l = kv_layout_of(3, 2, 40, 1);
    CHECK(l.head_bytes == 40 * KV_BLOCK * 2 * 2 && l.layer_bytes == 2 * l.head_bytes && l.block_bytes == 3 * l.layer_bytes, "sizes");
    CHECK(kv_layout_of(3, 2, 40, 0).block_bytes == 2 * l.block_bytes, "F32 is twice F16");
    CHECK(kv_pool_open(&p, l, BLOCKS) && p.n_free == BLOCKS, "the pool");
    for (int i = 0; i < SEQS; i++) seq[i].block = table[i], seq[i].n_blocks = 0;
    for (int round = 0; round < 5000; round++) {
        kv_seq *s = &seq[rng_below(&r, SEQS)];
        if (s->n_blocks) kv_release(&p, s);
        else {
            int64_t want = 1 + rng_below(&r, BLOCKS * KV_BLOCK);
            int before = p.n_free, ok = kv_reserve(&p, s, want);
            CHECK(ok == (kv_blocks_for(want) <= before), "%d positions with %d blocks free", (int)want, before);
            CHECK(p.n_free == before - (ok ? kv_blocks_for(want) : 0) && s->n_blocks == (ok ? kv_blocks_for(want) : 0), "all or nothing");
        }
        int owner[BLOCKS] = {0}, used = 0;
        for (int i = 0; i < SEQS; i++)
            for (int k = 0; k < seq[i].n_blocks; k++) owner[seq[i].block[k]]++, used++;
        for (int i = 0; i < p.n_free; i++) owner[p.free[i]]++;
        CHECK(used + p.n_free == BLOCKS, "%d used, %d free", used, p.n_free);
        for (int i = 0; i < BLOCKS; i++) CHECK(owner[i] == 1, "block %d is in %d places", i, owner[i]);
    }
    kv_pool_close(&p);
}

/* ==== Sampling =============================================================================== */

static const float *sort_logits;
static int sort_best_first(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, k = *(const int32_t *)b;
    if (sort_logits[i] != sort_logits[k]) return sort_logits[i] > sort_logits[k] ? -1 : 1;
    return i < k ? -1 : 1;
}

/* The tokens that may be drawn, by the definitions: sort, then cut. */
static void naive_filter(const float *logits, const float *weight, int n, const sample_params *p, unsigned char *kept) {
    int32_t order[512];
    double total = 0, sum = 0;
    int most = p->top_k > 0 && p->top_k < n ? p->top_k : n;
    for (int i = 0; i < n; i++) order[i] = i, kept[i] = 0;
    sort_logits = logits;
    qsort(order, (size_t)n, sizeof *order, sort_best_first);
    for (int i = 0; i < most; i++) total += (double)weight[order[i]];
    for (int i = 0; i < most; i++) {
        if (i > 0 && p->min_p > 0 && weight[order[i]] < p->min_p * weight[order[0]]) break;
        kept[order[i]] = 1;
        sum += (double)weight[order[i]];
        if (p->top_p < 1 && sum >= (double)p->top_p * total) break;
    }
}

static void test_sample_filter(void) {
    sample_work s;
    rng r = {14};
    float logits[300];
    unsigned char want[300], got[300];
    for (int round = 0; round < 4000; round++) {
        int n = 1 + (int)rng_below(&r, 300), grid = round % 3 == 0; /* a coarse grid makes ties */
        sample_params p = {1, 1, 0, 1, 0, 0};
        CHECK(sample_open(&s, n), "memory");
        float best = -1e9f;
        for (int i = 0; i < n; i++) logits[i] = grid ? (float)rng_below(&r, 5) : rng_small(&r) * (round % 5 ? 2 : 12), best = fmaxf(best, logits[i]);
        if (round % 2) p.top_k = (int)rng_below(&r, (uint32_t)n + 2);
        if (round / 2 % 2) p.top_p = round % 20 == 2 ? 0 : (float)(0.001 + rng_below(&r, 999) * 0.001);
        if (round / 4 % 2) p.min_p = (float)rng_below(&r, 1001) * 0.001f;
        for (int i = 0; i < n; i++) s.weight[i] = expf(logits[i] - best);
        if (grid && p.top_p < 1 && p.top_p > 0) p.top_p += 0.00037f; /* away from sums that hit it exactly */
        naive_filter(logits, s.weight, n, &p, want);
        sample_filter(&s, logits, best, &p);
        for (int i = 0; i < n; i++) got[i] = s.weight[i] > 0;
        CHECK(memcmp(got, want, (size_t)n) == 0, "round %d: n %d, top_k %d, top_p %g, min_p %g", round, n, p.top_k, (double)p.top_p, (double)p.min_p);
        int kept = 0;
        for (int i = 0; i < n; i++) kept += got[i];
        CHECK(kept > 0, "nothing is left");
        sample_close(&s);
    }
}

static void test_sample_greedy(void) {
    float logits[] = {1, 5, 3, 5, 5, -INFINITY}, penalised[] = {2, -2, 4, 0};
    static const int32_t seen[] = {0, 1, 3};
    sample_work s;
    sample_params greedy = {0, 1, 0, 1, 0, 7}, top1 = {1, 1, 0, 1, 1, 7};
    CHECK(sample_open(&s, 6), "memory");
    CHECK(sample_argmax(logits, 6) == 1, "a tie goes to the lower id");
    CHECK(sample_token(&s, mat_levels[0], logits, &greedy, 0) == 1 && sample_token(&s, mat_levels[0], logits, &top1, 3) == 1, "greedy, and top-k of 1");
    sample_penalise(penalised, seen, 3, 2);
    CHECK(penalised[0] == 1 && penalised[1] == -4 && penalised[2] == 4 && penalised[3] == 0, "the penalty");
    sample_params hot = {2, 1, 0, 1, 0, 0};
    for (uint64_t i = 0; i < 5000; i++) { /* a banned token is never drawn */
        float copy[6];
        memcpy(copy, logits, sizeof copy);
        hot.seed = i;
        CHECK(sample_token(&s, mat_levels[0], copy, &hot, i) != 5, "seed %d draws the banned token", (int)i);
    }
    CHECK(sample_finite(logits, 5) && !sample_finite(logits, 6), "finite");
    sample_close(&s);
}

/* Chi-square of 64 cells with 63 degrees of freedom: beyond 113 once in 10,000 times. */
static double chi_square(const int *count, const double *p, int cells, int n) {
    double sum = 0;
    for (int i = 0; i < cells; i++) sum += (count[i] - n * p[i]) * (count[i] - n * p[i]) / (n * p[i]);
    return sum;
}

static void test_sample_uniform(void) {
    enum { CELLS = 64, N = 200000 };
    int by_index[CELLS] = {0}, by_seed[CELLS] = {0}, pairs[CELLS] = {0};
    double even[CELLS];
    for (int i = 0; i < CELLS; i++) even[i] = 1.0 / CELLS;
    double last = sample_uniform(42, UINT64_MAX);
    for (uint64_t i = 0; i < N; i++) {
        double u = sample_uniform(42, i), v = sample_uniform(i, 5);
        CHECK(u >= 0 && u < 1 && v >= 0 && v < 1, "%g, %g", u, v);
        by_index[(int)(u * CELLS)]++, by_seed[(int)(v * CELLS)]++;
        pairs[(int)(u * 8) * 8 + (int)(last * 8)]++;
        last = u;
    }
    double a = chi_square(by_index, even, CELLS, N), b = chi_square(by_seed, even, CELLS, N), c = chi_square(pairs, even, CELLS, N);
    CHECK(a < 113 && b < 113 && c < 113, "chi-square %g by index, %g by seed, %g of neighbours", a, b, c);
    CHECK(a > 28 && b > 28 && c > 28, "too even to be random: %g, %g, %g", a, b, c);
    CHECK(sample_uniform(1, 2) == sample_uniform(1, 2) && sample_uniform(1, 2) != sample_uniform(2, 1) && sample_uniform(1, 2) != sample_uniform(1, 3),
          "a function of both");
}

static void test_sample_draw(void) {
    enum { V = 8, N = 100000 };
    static const float base[V] = {0, 1, 2, 0.5f, -1, 1.5f, -3, 0.25f};
    sample_work s;
    sample_params p = {1, 1, 0, 1, 0, 99};
    int count[V] = {0};
    double prob[V], sum = 0;
    CHECK(sample_open(&s, V), "memory");
    for (int i = 0; i < V; i++) prob[i] = exp((double)base[i]), sum += prob[i];
    for (int i = 0; i < V; i++) prob[i] /= sum;
    for (uint64_t i = 0; i < N; i++) {
        float logits[V];
        memcpy(logits, base, sizeof base);
        count[sample_token(&s, mat_levels[0], logits, &p, i)]++;
    }
    double chi = chi_square(count, prob, V, N);
    CHECK(chi < 30, "chi-square %g of 7 degrees of freedom", chi); /* beyond 29.9 once in 10,000 times */
    float cold[V];
    memcpy(cold, base, sizeof base);
    p.temperature = 0.01f;
    CHECK(sample_token(&s, mat_levels[0], cold, &p, 1) == 2, "a low temperature chooses the best");
    sample_close(&s);
}

/* ==== Engine: text and stop sequences ======================================================== */

typedef struct {
    char text[4096];
    size_t len;
    int n, wrong;
} sink_text;

static void sink_collect(engine_job *j, const engine_event *ev) {
    sink_text *s = j->user;
    if (ev->type != EVENT_TOKEN) return;
    if (ev->index != s->n++ || utf8_count(ev->text) < 0) s->wrong = 1;
    if (ev->text.len) memcpy(s->text + s->len, ev->text.ptr, ev->text.len);
    s->len += ev->text.len;
}

static size_t naive_held(const char *text, size_t len, const char *const *stops, int n_stop) {
    size_t held = 0;
    for (int i = 0; i < n_stop; i++)
        for (size_t k = 1; k < strlen(stops[i]); k++)
            if (k <= len && !memcmp(text + len - k, stops[i], k) && k > held) held = k;
    return held;
}

/* A job that gets these byte tokens. Compares what comes out, step by step, with the definition. */
static void stop_case(engine *e, const int32_t *id, int n, const char *const *stops, int n_stop) {
    static char text[4096]; /* all text of whole code points so far */
    engine_job *j = engine_job_new();
    sink_text out = {{0}, 0, 0, 0};
    size_t len = 0, want;
    CHECK(j, "memory");
    if (!j) return;
    j->sink = sink_collect, j->user = &out, j->n_stop = n_stop, j->pending = calloc((size_t)n + 1, sizeof *j->pending);
    for (int i = 0; i < n_stop; i++) buf_puts(&j->stop[i], stops[i]);
    buf raw = {0};
    int stopped = 0;
    for (int i = 0; i < n && !stopped && j->pending; i++) {
        j->n_out++;
        stopped = engine_add_text(e, j, id[i]);
        tok_piece(e->m->tok, id[i], 0, &raw);
        len = 0; /* decode everything again: the definition knows no state */
        for (size_t at = 0; at < raw.len;) {
            uint32_t cp;
            int k = utf8_decode(raw.ptr + at, raw.len - at, &cp);
            if (k == 0) break;
            if (k > 0) memcpy(text + len, raw.ptr + at, (size_t)k), len += (size_t)k;
            else memcpy(text + len, "\xef\xbf\xbd", 3), len += 3;
            at += (size_t)(k > 0 ? k : -k);
        }
        text[len] = 0;
        const char *first = NULL;
        for (int s = 0; s < n_stop; s++) {
            const char *at = strstr(text, stops[s]);
            if (at && (!first || at < first)) first = at;
        }
        CHECK(stopped == (first != NULL), "token %d: stopped %d, text '%s'", i, stopped, text);
        want = first ? (size_t)(first - text) : len - naive_held(text, len, stops, n_stop);
        CHECK(first ? out.len == want : out.len <= want, "token %d: %d bytes are out, %d may be, of '%s'", i, (int)out.len, (int)want, text);
        CHECK(memcmp(out.text, text, out.len) == 0, "token %d: '%.*s' is not the beginning of '%s'", i, (int)out.len, out.text, text);
    }
    if (!stopped) {
        size_t tail = (size_t)j->n_tail;
        engine_flush_all(j);
        CHECK(out.len == len + (tail && n ? 3 : 0), "at the end %d bytes of %d are out", (int)out.len, (int)len);
    }
    CHECK(out.n == j->n_out && !out.wrong, "%d events for %d tokens, or a split code point", out.n, j->n_out);
    buf_free(&raw);
    engine_job_free(j);
}

static void test_stop_sequences(void) {
    char err[512] = "";
    gguf_file *g = tiny_file();
    tok *t = g ? tok_load(g, NULL, err, sizeof err) : NULL;
    CHECK(t, "%s", err);
    if (!t) return;
    static model m;
    static engine e;
    m.file = g, m.tok = t, e.m = &m;
    static const char *const sets[][4] = {
        {"ab"}, {"aab", "b\xc3\xa9"}, {"aa", "aaa"}, {"abcabd"}, {"\xc3\xa9\xc3\xa9"}, {"\xef\xbf\xbd"}, {"a"}, {"ba", "ab", "aa", "bb"}};
    static const int counts[] = {1, 2, 2, 1, 1, 1, 1, 4};
    static const unsigned char bytes[] = {'a', 'b', 'c', 'd', 0xc3, 0xa9, 0xf0, 0xff};
    int32_t byte_id[8];
    for (int i = 0; i < 8; i++) { /* byte-level BPE writes each byte as a code point */
        char out[4];
        byte_id[i] = tok_find(t, str_make(out, (size_t)utf8_encode(t->to_unicode[bytes[i]], out)));
        CHECK(byte_id[i] >= 0, "byte %02x has no token", bytes[i]);
    }
    rng r = {15};
    for (int round = 0; round < 6000; round++) {
        int32_t id[40];
        int set = round % 9, n = 1 + (int)rng_below(&r, 40), letters = round % 2 ? 8 : 3;
        for (int i = 0; i < n; i++) id[i] = byte_id[rng_below(&r, (uint32_t)letters)];
        stop_case(&e, id, n, set < 8 ? sets[set] : NULL, set < 8 ? counts[set] : 0);
    }
    buf_free(&e.piece);
    tok_free(t), gguf_close(g);
}

/* ==== HTTP =================================================================================== */

typedef struct {
    const engine_error *error;
    int done;
    char method[16], path[64], query[64], body[256];
    int minor, keep_alive, expect, n_headers;
    size_t body_len, rest;
} http_result;

static http_result http_feed(const char *bytes, size_t n, size_t first, size_t step) {
    http_conn c;
    http_result r;
    memset(&c, 0, sizeof c), memset(&r, 0, sizeof r);
    c.fd = -1;
    int state = 0; /* 0: head, 1: body, 2: done */
    for (size_t at = 0; at < n && !r.error && state < 2;) {
        size_t k = at == 0 && first ? first : step;
        if (k > n - at) k = n - at;
        buf_add(&c.in, bytes + at, k), at += k;
        int got = 1;
        const engine_error *error = NULL;
        while (state < 2 && got > 0) {
            got = state == 0 ? http_read_head(&c, &error) : http_read_body(&c, &error);
            if (got > 0) state++;
            if (got < 0) r.error = error ? error : &ERR_INTERNAL;
        }
        if (state == 2) r.rest = c.in.len + (n - at);
    }
    r.done = state == 2;
    if (r.done) {
        snprintf(r.method, sizeof r.method, "%.*s", (int)c.req.method.len, c.req.method.ptr);
        snprintf(r.path, sizeof r.path, "%.*s", (int)c.req.path.len, c.req.path.ptr);
        snprintf(r.query, sizeof r.query, "%.*s", (int)c.req.query.len, c.req.query.ptr);
        r.minor = c.req.minor, r.keep_alive = c.req.keep_alive, r.expect = c.req.expect_continue, r.n_headers = c.req.n_headers;
        r.body_len = c.body.len;
        if (c.body.len) memcpy(r.body, c.body.ptr, c.body.len < sizeof r.body ? c.body.len : sizeof r.body);
    }
    buf_free(&c.in), buf_free(&c.head), buf_free(&c.body), buf_free(&c.out);
    return r;
}

#define H "Host: h\r\n"
static const struct { const char *bytes; int status; const char *body; } http_rows[] = { /* status 200: taken; 0: not complete */
    {"GET / HTTP/1.1\r\n" H "\r\n", 200, ""},
    {"GET /a?b=c HTTP/1.1\r\n" H "\r\n", 200, ""},
    {"GET / HTTP/1.0\r\n\r\n", 200, ""},
    {"\r\nGET / HTTP/1.1\r\n" H "\r\n", 200, ""},
    {"\r\n\r\nGET / HTTP/1.1\r\n" H "\r\n", 400, ""},
    {"GET / HTTP/1.1\r\n\r\n", 400, ""},
    {"GET / HTTP/1.1\r\n" H H "\r\n", 400, ""},
    {"GET / HTTP/2.0\r\n" H "\r\n", 505, ""},
    {"GET / HTTP/1.1\n" H "\r\n", 400, ""},
    {"GET  / HTTP/1.1\r\n" H "\r\n", 400, ""},
    {"GET / HTTP/1.1\r\n" H "A : b\r\n\r\n", 400, ""},
    {"GET / HTTP/1.1\r\n" H " folded\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 5\r\n\r\nhelloGET", 200, "hello"},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 0\r\n\r\n", 200, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 5\r\n\r\nhell", 0, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: +5\r\n\r\nhello", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 1048577\r\n\r\n", 413, ""},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 18446744073709551616\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n\r\nNEXT", 200, "hello world"},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n000a\r\n0123456789\r\n0\r\nA: b\r\nC:\r\n\r\n", 200, "0123456789"},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", 200, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n5\r\nhello0\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n \r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n100001\r\n", 413, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n", 413, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n", 400, ""},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\nbad\r\n\r\n", 400, ""},
    {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, ""},
    {"GET http://h/x?y HTTP/1.1\r\n" H "\r\n", 200, ""},
    {"GET x HTTP/1.1\r\n" H "\r\n", 400, ""},
    {"G\x01T / HTTP/1.1\r\n" H "\r\n", 400, ""},
};

static void test_http_splits(void) {
    for (size_t row = 0; row < sizeof http_rows / sizeof *http_rows; row++) {
        const char *bytes = http_rows[row].bytes;
        size_t n = strlen(bytes);
        http_result whole = http_feed(bytes, n, 0, n), part;
        int status = whole.error ? whole.error->status : whole.done ? 200 : 0;
        CHECK(status == http_rows[row].status, "row %d: %d, not %d: %s", (int)row, status, http_rows[row].status, bytes);
        if (status == 200) CHECK(!strcmp(whole.body, http_rows[row].body), "row %d: the body is %s", (int)row, whole.body);
        for (size_t first = 1; first < n; first++) { /* in two parts, at every place */
            part = http_feed(bytes, n, first, n);
            CHECK(memcmp(&part, &whole, sizeof part) == 0, "row %d, split at %d: another result: %s", (int)row, (int)first, bytes);
        }
        part = http_feed(bytes, n, 0, 1);
        CHECK(memcmp(&part, &whole, sizeof part) == 0, "row %d, byte by byte: another result: %s", (int)row, bytes);
    }
    http_result r = http_feed(http_rows[1].bytes, strlen(http_rows[1].bytes), 0, 1);
    CHECK(!strcmp(r.path, "/a") && !strcmp(r.query, "b=c") && r.keep_alive && r.minor == 1 && r.n_headers == 1, "the fields of a request");
    r = http_feed(http_rows[12].bytes, strlen(http_rows[12].bytes), 0, 1000);
    CHECK(r.rest == 3, "%d bytes of the next request are left", (int)r.rest);
}

static void test_http_limits(void) {
    static char text[MAX_HEAD_BYTES + 4096];
    for (int over = 0; over < 2; over++) { /* the head's bytes, on both sides */
        int at = sprintf(text, "GET / HTTP/1.1\r\n" H "X: ");
        size_t want = (size_t)MAX_HEAD_BYTES + (size_t)over;
        memset(text + at, 'x', want - (size_t)at - 4);
        memcpy(text + want - 4, "\r\n\r\n", 5);
        http_result r = http_feed(text, want, 0, 4096);
        CHECK(over ? r.error == &ERR_HEADERS : r.done, "a head of %d bytes: %s", (int)want, r.error ? r.error->code : "taken");
        at = sprintf(text, "GET / HTTP/1.1\r\n" H);
        for (int i = 1; i < MAX_HEADERS + over; i++) at += sprintf(text + at, "A: b\r\n");
        at += sprintf(text + at, "\r\n");
        r = http_feed(text, (size_t)at, 0, 4096);
        CHECK(over ? r.error == &ERR_HEADERS : r.done, "%d headers: %s", MAX_HEADERS + over, r.error ? r.error->code : "taken");
    }
    static const struct { const char *host; int ok; } hosts[] = {
        {"localhost", 1}, {"127.0.0.1:80", 1}, {"[::1]:8080", 1}, {"[::1]", 1}, {"h:", 1},
        {"", 0}, {"a b", 0}, {"h:8x", 0}, {"h/x", 0}, {":80", 0}, {"a@b", 0}, {"a,b", 0}};
    for (size_t i = 0; i < sizeof hosts / sizeof *hosts; i++) CHECK(http_valid_host(str_of(hosts[i].host)) == hosts[i].ok, "Host: %s", hosts[i].host);
    CHECK(http_lists(str_of("keep-alive, Close"), ',', "close") && !http_lists(str_of("closed"), ',', "close") && http_lists(str_of("a,,close"), ',', "close"), "lists");
}

/* ==== The sandbox ============================================================================
 * A child process enters it and tries everything; the n-th thing that goes wrong is its exit status. */

static int sandbox_go; /* atomic: the filter is in force */

static void *sandbox_earlier(void *arg) { /* a thread that was there before */
    while (!__atomic_load_n(&sandbox_go, __ATOMIC_ACQUIRE)) poll(NULL, 0, 1);
    *(int *)arg = open("/dev/null", O_RDONLY) < 0 && errno == EPERM;
    return NULL;
}
static void *sandbox_later(void *arg) { return *(int *)arg = 1, NULL; }

static int sandbox_try(int fd, int landlock, int port) {
    struct sockaddr_in a;
    struct stat st;
    pthread_t earlier, later;
    int held = 0, ran = 0, wrong = 0;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET, a.sin_addr.s_addr = htonl(INADDR_LOOPBACK), a.sin_port = htons((uint16_t)port);
#define TRY(ok) do { wrong++; if (!(ok)) return wrong; } while (0)
    TRY(pthread_create(&earlier, NULL, sandbox_earlier, &held) == 0);
    TRY(sys_harden());
    int rules = sys_landlock_open(port);
    if (landlock) {
        TRY(rules >= 0 && sys_landlock_enter(rules));
        TRY(open("/dev/null", O_RDONLY) < 0 && errno == EACCES);
        TRY(open("/tmp", O_RDONLY) < 0 && errno == EACCES);
        TRY(unlink("/tmp/no-such-file-here") < 0);
        if (landlock >= 4) {
            int s = socket(AF_INET, SOCK_STREAM, 0);
            TRY(bind(s, (struct sockaddr *)&a, sizeof a) < 0 && errno == EACCES);
            TRY(connect(s, (struct sockaddr *)&a, sizeof a) < 0 && errno != EACCES); /* nobody listens there */
            a.sin_port ^= htons(1);
            TRY(connect(s, (struct sockaddr *)&a, sizeof a) < 0 && errno == EACCES);
            close(s);
        }
    }
    TRY(sys_seccomp_begin());
    __atomic_store_n(&sandbox_go, 1, __ATOMIC_RELEASE);
    TRY(pthread_join(earlier, NULL) == 0 && held);
    TRY(open("/dev/null", O_RDONLY) < 0 && errno == EPERM);
    TRY(socket(AF_UNIX, SOCK_STREAM, 0) < 0 && errno == EPERM);
    TRY(socket(AF_INET, SOCK_STREAM, 0) >= 0);
    TRY(fork() < 0 && errno == EPERM);
    TRY(mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED && errno == EPERM);
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TRY(page != MAP_FAILED && mprotect(page, 4096, PROT_READ | PROT_EXEC) < 0);
    TRY(kill(getppid(), 0) < 0 && fchmod(fd, 0) < 0 && chdir("/") < 0 && setuid(0) < 0 && prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) < 0);
    TRY(fstat(fd, &st) == 0 && pthread_create(&later, NULL, sandbox_later, &ran) == 0 && pthread_join(later, NULL) == 0 && ran);
    TRY(sys_seccomp_end());
    TRY(pthread_create(&later, NULL, sandbox_later, &ran) != 0);
    TRY(socket(AF_INET, SOCK_STREAM, 0) < 0 && errno == EPERM);
    TRY(!sys_seccomp_begin());
    TRY(malloc(1 << 22) && getentropy(&a, 8) == 0 && sys_now() > 0);
#undef TRY
    execl("/bin/true", "true", (char *)NULL); /* the end: SIGSYS */
    return 99;
}

static void test_sandbox(void) {
    int status = 0, fd = open("/dev/zero", O_RDONLY), listener = socket(AF_INET, SOCK_STREAM, 0), landlock = (int)sys_landlock_abi();
    struct sockaddr_in a;
    socklen_t n = sizeof a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET, a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (!SYS_AUDIT_ARCH) {
        unit.skip = "no list of system calls for this machine";
        return;
    }
    CHECK(bind(listener, (struct sockaddr *)&a, sizeof a) == 0 && getsockname(listener, (struct sockaddr *)&a, &n) == 0, "no port");
    pid_t child = fork();
    if (child == 0) _exit(sandbox_try(fd, landlock, ntohs(a.sin_port)));
    waitpid(child, &status, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS, "Landlock %d: exit status %d, signal %d", landlock, WIFEXITED(status) ? WEXITSTATUS(status) : -1,
          WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    close(fd), close(listener);
}

/* ==== main =================================================================================== */

static const struct { const char *name; void (*run)(void); } tests[] = {
    {"text: UTF-8, both sides of every range", test_utf8_decode},
    {"text: UTF-8, every code point there and back", test_utf8_round_trip},
    {"text: Unicode categories", test_unicode_categories},
    {"text: buffers and views", test_buf_and_str},
    {"json: reading", test_json_reader},
    {"json: numbers and escapes", test_json_values},
    {"json: skipping values", test_json_skip},
    {"json: writing", test_json_writer},
    {"json: the conformance files", test_json_files},
    {"text: SHA-256", test_sha256},
    {"numbers: half floats", test_half_floats},
    {"numbers: fused multiply-add", test_fma},
    {"numbers: exp and log", test_exp_log},
    {"numbers: sine and cosine", test_sincos},
    {"formats: the table", test_quant_table},
    {"formats: unpacking against the description", test_quant_unpack},
    {"formats: activations", test_quant_activations},
    {"formats: the dot product", test_quant_dot},
    {"kernels: definitions", test_kernel_definitions},
    {"kernels: norms, activations and caps by their formulas", test_kernel_formulas},
    {"kernels: attention with windows, caps and sinks, by the naive loop", test_kernel_attention},
    {"kernels: choice of a level", test_kernel_choice},
    {"kernels: products equal the naive loop", test_kernel_products},
    {"kernels: products of random shapes", test_kernel_shapes},
    {"kernels: vectors equal the scalar level", test_kernel_vectors},
    {"threads: every item once", test_pool},
    {"tokenizers: pieces of words", test_pre_tokenizers},
    {"tokenizers: README.md lists the pre-tokenizers", test_pre_names},
    {"tokenizers: patterns fit", test_pattern_limits},
    {"tokenizers: patterns take no square time", test_pattern_time},
    {"tokenizers: ends of generations", test_end_tokens},
    {"tokenizers: there and back", test_token_pieces},
    {"kv: reserve and release", test_kv_pool},
    {"sampling: greedy, ties, penalties", test_sample_greedy},
    {"sampling: top-k, top-p, min-p", test_sample_filter},
    {"sampling: uniform numbers", test_sample_uniform},
    {"sampling: the draw", test_sample_draw},
    {"engine: text and stop sequences", test_stop_sequences},
    {"sandbox: what it takes away, and what it leaves", test_sandbox},
    {"http: every split gives the same", test_http_splits},
    {"http: limits", test_http_limits},
};

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= strstr(tests[i].name, argv[k]) != NULL;
        if (!wanted) continue;
        unit.bad = unit.details = 0, unit.skip = NULL, unit.len = 0, unit.text[0] = 0;
        alarm(300);
        double start = sys_now();
        tests[i].run();
        unit.run++, unit.failed += unit.bad;
        printf("%s - %s", unit.bad ? "not ok" : "ok", tests[i].name);
        if (unit.skip) printf(" # SKIP %s", unit.skip);
        else if (getenv("LORCH_TEST_TIMES")) printf(" # %.0f ms", (sys_now() - start) * 1000);
        printf("\n%s", unit.text);
        if (unit.details > 8) printf("# and %d more\n", unit.details - 8);
        fflush(stdout);
    }
    return unit.failed || !unit.run;
}
