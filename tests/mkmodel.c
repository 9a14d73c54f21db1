/* SPDX-License-Identifier: MIT
 *
 * mkmodel: write a random GGUF model, for tests.
 *
 *   mkmodel ARCH FORMAT OUT.gguf [KEY=VALUE ...]
 *
 * The bytes depend on the arguments alone: the random numbers are this file's own, and every
 * number is made of integers, so that neither libm nor the CPU can change a bit.  Weights have
 * a spread of 1/sqrt(row length), so activations stay near 1 and the output is far from flat.
 *
 * Shape:      embd ff layers heads kv hd vocab ctx rope_base rope_scaling(linear factor)
 *             freq_factors(0|1) tied(0|1) seed
 * Tokenizer:  tokenizer(spm|bpe) pre(for bpe)
 * File:       version(2|3) vocab_only(0|1) alignment
 *
 * The remaining keys make files that differ from what a converter writes, malformed ones too.
 * They change what the file declares, and nothing that follows from it.
 *   arch=NAME                  general.architecture, while all other keys keep ARCH
 *   magic= version= n_tensors= n_kv=            header fields, any number
 *   kv:KEY=none                leave a metadata key out
 *   kv:KEY=TYPE:VALUE          set or add one (given twice, it stands in the file twice); TYPE is
 *                              u8 i8 u16 i16 u32 i32 f32 bool str u64 i64 f64, an array as
 *                              [u32]:1,2,3, or raw:TYPEID:HEXBYTES
 *   tensor:NAME:format=FORMAT  another number format for this tensor (a good file still)
 *   tensor:NAME:type= offset= n_dims= dims=A,B,..  name=  fields of the tensor's header
 *   tensor:NAME:skip=1         leave the tensor out
 *   truncate=N | truncate=infos  keep N bytes, or all up to the end of the tensor headers
 *   cut=N                      drop N bytes at the end of the file
 *
 * A program may include this file with MKMODEL_NO_MAIN defined and call mkmodel_write().
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ==== Random numbers and fixed point ========================================================= */

/* The generator is SplitMix64 (Steele, Lea and Flood, 2014): one addition, one mixing. */
static uint64_t mk_random(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* A tensor's numbers depend on its name and the seed only, so that changing the format of one
 * tensor leaves all others as they were. */
static uint64_t mk_seed(const char *name, uint64_t seed) {
    uint64_t h = 0xCBF29CE484222325u ^ seed;
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 0x100000001B3u;
    return h;
}

static uint64_t mk_isqrt(uint64_t v) {
    uint64_t root = 0;
    for (int bit = 31; bit >= 0; bit--) {
        uint64_t next = root | 1ull << bit;
        if (next * next <= v) root = next;
    }
    return root;
}

static void mk_put(uint8_t *p, uint64_t v, int n) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(v >> 8 * i);
}

static uint32_t mk_float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

/* Fixed-point numbers here have 22 fractional bits and less than 24 in all: exact as floats. */
static float mk_fixed22(int32_t v) { return (float)v * (1.0f / 4194304.0f); }

/* Half precision, to nearest even; the arguments stay far below its maximum. */
static uint16_t mk_half(float f) {
    uint32_t u = mk_float_bits(f), sign = u >> 16 & 0x8000, mag = u & 0x7FFFFFFF;
    if (mag < 0x33000000) return (uint16_t)sign;
    int shift = mag >= 0x38800000 ? 13 : 126 - (int)(mag >> 23);
    uint32_t frac = shift == 13 ? mag - 0x38000000 : (mag & 0x7FFFFF) | 0x800000;
    uint32_t half = frac >> shift, rest = frac & ((1u << shift) - 1), tie = 1u << (shift - 1);
    if (rest > tie || (rest == tie && (half & 1))) half++;
    return (uint16_t)(sign | half);
}

/* ==== Number formats ========================================================================= */

/* Each function fills one block whose weights spread by about std28 / 2^28. */
typedef void mk_fill(uint64_t *rng, uint8_t *p, int64_t std28);

/* A uniform weight reaches sqrt(3) = 1774/1024 times its spread. */
static float mk_weight(uint64_t *rng, int64_t std28) {
    int64_t r = (int64_t)(mk_random(rng) >> 47) - 65536;
    return mk_fixed22((int32_t)((std28 * 1774 / 1024 / 64) * r / 65536));
}

/* The scale of a block whose codes spread by `codes` units, give or take a quarter. */
static uint16_t mk_scale(uint64_t *rng, int64_t std28, int64_t codes, uint64_t *out_jitter) {
    uint64_t jitter = out_jitter && *out_jitter ? *out_jitter : 192 + mk_random(rng) % 128;
    if (out_jitter) *out_jitter = jitter;
    int64_t d = std28 * (int64_t)jitter / 256 / codes;
    return mk_half((float)(d > 16777215 ? 16777215 : d) * (1.0f / 268435456.0f));
}

static void mk_bytes(uint64_t *rng, uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t r = mk_random(rng);
        mk_put(p + i, r, n - i < 8 ? (int)(n - i) : 8);
    }
}

static void mk_fill_f32(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_float_bits(mk_weight(rng, std28)), 4);
}

static void mk_fill_f16(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_half(mk_weight(rng, std28)), 2);
}

static void mk_fill_bf16(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_float_bits(mk_weight(rng, std28)) >> 16, 2);
}

/* Q8_0: a half scale, 32 signed codes; uniform codes spread by 256/sqrt(12) = 74. */
static void mk_fill_q8_0(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_scale(rng, std28, 74, NULL), 2);
    mk_bytes(rng, p + 2, 32);
}

/* Q4_0: a half scale, 32 codes of 0..15 less 8, spread 4.6. */
static void mk_fill_q4_0(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_scale(rng, std28, 5, NULL), 2);
    mk_bytes(rng, p + 2, 16);
}

/* Q4_K and Q5_K: d, dmin, 12 bytes with eight 6-bit scales and mins, then the codes.  A weight
 * is d*scale*code - dmin*min; with dmin = d * (largest code)/2 the weights centre on zero.
 * Scales (mean 31.5, spread 18.5) times codes, and the random mins, give the two spreads. */
static void mk_fill_k45(uint64_t *rng, uint8_t *p, int64_t std28, int max_code, size_t bytes) {
    uint64_t jitter = 0;
    int64_t spread = 17 * max_code;
    mk_put(p, mk_scale(rng, std28, spread, &jitter), 2);
    mk_put(p + 2, mk_scale(rng, std28 * max_code / 2, spread, &jitter), 2);
    mk_bytes(rng, p + 4, bytes - 4);
}

static void mk_fill_q4_k(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_fill_k45(rng, p, std28, 15, 144);
}

static void mk_fill_q5_k(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_fill_k45(rng, p, std28, 31, 176);
}

/* Q6_K: 256 codes of 0..63 less 32 (spread 18.5), 16 signed byte scales (spread 74), d. */
static void mk_fill_q6_k(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_bytes(rng, p, 208);
    mk_put(p + 208, mk_scale(rng, std28, 74 * 37 / 2, NULL), 2);
}

/* Q4_1 and Q5_1: d, m, codes of 4 bits or 4 + 1; a weight is d*code + m, and m = -d * (largest code)/2. */
static void mk_fill_with_min(uint64_t *rng, uint8_t *p, int64_t std28, int max_code, size_t bytes) {
    uint64_t jitter = 0;
    int64_t spread = max_code == 15 ? 5 : 9;
    mk_put(p, mk_scale(rng, std28, spread, &jitter), 2);
    mk_put(p + 2, (uint64_t)mk_scale(rng, std28 * max_code / 2, spread, &jitter) | 0x8000, 2);
    mk_bytes(rng, p + 4, bytes - 4);
}

static void mk_fill_q4_1(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_fill_with_min(rng, p, std28, 15, 20);
}

static void mk_fill_q5_1(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_fill_with_min(rng, p, std28, 31, 24);
}

/* Q5_0: d, 32 codes of 0..31 less 16, spread 9.2. */
static void mk_fill_q5_0(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_scale(rng, std28, 9, NULL), 2);
    mk_bytes(rng, p + 2, 20);
}

/* Q2_K: 16 bytes of 4-bit scale and min, 64 of codes 0..3, d, dmin = 1.5 d to centre the weights. */
static void mk_fill_q2_k(uint64_t *rng, uint8_t *p, int64_t std28) {
    uint64_t jitter = 0;
    mk_bytes(rng, p, 80);
    mk_put(p + 80, mk_scale(rng, std28, 14, &jitter), 2);
    mk_put(p + 82, mk_scale(rng, std28 * 3 / 2, 14, &jitter), 2);
}

/* Q3_K: codes of -4..3 (spread 2.3) in 32 + 64 bytes, 16 scales of 6 bits less 32 (spread 18.5), d. */
static void mk_fill_q3_k(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_bytes(rng, p, 108);
    mk_put(p + 108, mk_scale(rng, std28, 43, NULL), 2);
}

/* IQ4_NL and IQ4_XS: indices into a curve of 16 values from -127 to 113, spread 75; XS has 8 scales of
 * 6 bits less 32 besides. */
static void mk_fill_iq4_nl(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_scale(rng, std28, 75, NULL), 2);
    mk_bytes(rng, p + 2, 16);
}

static void mk_fill_iq4_xs(uint64_t *rng, uint8_t *p, int64_t std28) {
    mk_put(p, mk_scale(rng, std28, 75 * 37 / 2, NULL), 2);
    mk_bytes(rng, p + 2, 134);
}

/* MXFP4: a power of two, and values of 0 to 6 with a sign, spread 2.9. */
static void mk_fill_mxfp4(uint64_t *rng, uint8_t *p, int64_t std28) {
    int exponent = -1;
    for (int64_t s = std28; s > 1; s /= 2) exponent++;
    p[0] = (uint8_t)(127 - 28 + exponent - (int)(mk_random(rng) & 1));
    mk_bytes(rng, p + 1, 16);
}

typedef struct {
    const char *name;
    uint32_t id;       /* in the tensor header */
    uint32_t ftype;    /* general.file_type of a file mostly of this format */
    uint32_t elements; /* per block */
    uint32_t bytes;    /* per block */
    mk_fill *fill;
} mk_format;

static const mk_format mk_formats[] = {
    {"f32", 0, 0, 1, 4, mk_fill_f32},
    {"f16", 1, 1, 1, 2, mk_fill_f16},
    {"q4_0", 2, 2, 32, 18, mk_fill_q4_0},
    {"q8_0", 8, 7, 32, 34, mk_fill_q8_0},
    {"q4_k", 12, 15, 256, 144, mk_fill_q4_k},
    {"q5_k", 13, 17, 256, 176, mk_fill_q5_k},
    {"q6_k", 14, 18, 256, 210, mk_fill_q6_k},
    {"bf16", 30, 32, 1, 2, mk_fill_bf16},
    {"q4_1", 3, 3, 32, 20, mk_fill_q4_1},
    {"q5_0", 6, 8, 32, 22, mk_fill_q5_0},
    {"q5_1", 7, 9, 32, 24, mk_fill_q5_1},
    {"q2_k", 10, 10, 256, 84, mk_fill_q2_k},
    {"q3_k", 11, 12, 256, 110, mk_fill_q3_k},
    {"iq4_nl", 20, 25, 32, 18, mk_fill_iq4_nl},
    {"iq4_xs", 23, 30, 256, 136, mk_fill_iq4_xs},
    {"mxfp4", 39, 38, 32, 17, mk_fill_mxfp4},
};

static const mk_format *mk_find_format(const char *name) {
    for (size_t i = 0; i < sizeof mk_formats / sizeof *mk_formats; i++)
        if (strcmp(mk_formats[i].name, name) == 0) return &mk_formats[i];
    return NULL;
}

/* ==== Architectures and tensors ============================================================== */

/* What a tensor row may require.  An architecture is a set of these; the rest are options. */
enum { HAS_QKV_BIAS = 1, HAS_QK_NORM = 2, HAS_OUTPUT = 4, HAS_FREQS = 8 };

static const struct mk_arch {
    const char *name;
    unsigned has;
} mk_archs[] = {
    {"llama", 0},
    {"qwen2", HAS_QKV_BIAS},
    {"qwen3", HAS_QK_NORM},
};

/* The lengths that tensor rows are written in. */
enum { DIM_NONE, DIM_EMBD, DIM_FF, DIM_Q, DIM_KV, DIM_HEAD, DIM_FREQS, DIM_VOCAB, DIM_COUNT };
enum { KIND_MATRIX, KIND_NORM, KIND_BIAS, KIND_FREQS };

/* The gain (in quarters) is the spread of a product with a normalised vector.  At the output 2
 * gives distributions with a few likely tokens; much more, here or in queries and keys, would
 * amplify the rounding of activations until two right programs no longer agree. */
static const struct mk_row {
    const char *name;
    int kind, dim[2], gain4;
    unsigned need;
} mk_rows[] = {
    {"token_embd.weight", KIND_MATRIX, {DIM_EMBD, DIM_VOCAB}, 8, 0},
    {"rope_freqs.weight", KIND_FREQS, {DIM_FREQS, 0}, 0, HAS_FREQS},
    {"blk.%d.attn_norm.weight", KIND_NORM, {DIM_EMBD, 0}, 0, 0},
    {"blk.%d.attn_q.weight", KIND_MATRIX, {DIM_EMBD, DIM_Q}, 4, 0},
    {"blk.%d.attn_k.weight", KIND_MATRIX, {DIM_EMBD, DIM_KV}, 4, 0},
    {"blk.%d.attn_v.weight", KIND_MATRIX, {DIM_EMBD, DIM_KV}, 4, 0},
    {"blk.%d.attn_output.weight", KIND_MATRIX, {DIM_Q, DIM_EMBD}, 4, 0},
    {"blk.%d.attn_q.bias", KIND_BIAS, {DIM_Q, 0}, 0, HAS_QKV_BIAS},
    {"blk.%d.attn_k.bias", KIND_BIAS, {DIM_KV, 0}, 0, HAS_QKV_BIAS},
    {"blk.%d.attn_v.bias", KIND_BIAS, {DIM_KV, 0}, 0, HAS_QKV_BIAS},
    {"blk.%d.attn_q_norm.weight", KIND_NORM, {DIM_HEAD, 0}, 0, HAS_QK_NORM},
    {"blk.%d.attn_k_norm.weight", KIND_NORM, {DIM_HEAD, 0}, 0, HAS_QK_NORM},
    {"blk.%d.ffn_norm.weight", KIND_NORM, {DIM_EMBD, 0}, 0, 0},
    {"blk.%d.ffn_gate.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF}, 4, 0},
    {"blk.%d.ffn_up.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF}, 4, 0},
    {"blk.%d.ffn_down.weight", KIND_MATRIX, {DIM_FF, DIM_EMBD}, 4, 0},
    {"output_norm.weight", KIND_NORM, {DIM_EMBD, 0}, 0, 0},
    {"output.weight", KIND_MATRIX, {DIM_EMBD, DIM_VOCAB}, 8, HAS_OUTPUT},
};

/* ==== Options ================================================================================ */

typedef struct {
    uint64_t embd, ff, layers, heads, kv, hd, vocab, ctx, seed, tied, freq_factors, vocab_only;
    uint64_t version, magic, n_tensors, n_kv, alignment, cut;
    const char *rope_base, *rope_scaling, *tokenizer, *pre, *arch_name, *truncate;
    const struct mk_arch *arch;
    const mk_format *format;
    const char **overrides; /* the kv: and tensor: arguments, as given */
    uint8_t *used;          /* [n_overrides], to add new keys and refuse misspelt tensors */
    size_t n_overrides;
} mk_options;

/* Fields that stay at this value are computed. */
#define MK_AUTO UINT64_MAX
#define MK_FIELD(f) #f, offsetof(mk_options, f)
enum { OPT_NUMBER, OPT_TEXT };

static const struct mk_key {
    const char *name;
    size_t field;
    int type;
} mk_keys[] = {
    {MK_FIELD(embd), OPT_NUMBER},         {MK_FIELD(ff), OPT_NUMBER},
    {MK_FIELD(layers), OPT_NUMBER},       {MK_FIELD(heads), OPT_NUMBER},
    {MK_FIELD(kv), OPT_NUMBER},           {MK_FIELD(hd), OPT_NUMBER},
    {MK_FIELD(vocab), OPT_NUMBER},        {MK_FIELD(ctx), OPT_NUMBER},
    {MK_FIELD(seed), OPT_NUMBER},         {MK_FIELD(tied), OPT_NUMBER},
    {MK_FIELD(freq_factors), OPT_NUMBER}, {MK_FIELD(vocab_only), OPT_NUMBER},
    {MK_FIELD(version), OPT_NUMBER},      {MK_FIELD(magic), OPT_NUMBER},
    {MK_FIELD(n_tensors), OPT_NUMBER},    {MK_FIELD(n_kv), OPT_NUMBER},
    {MK_FIELD(alignment), OPT_NUMBER},    {MK_FIELD(cut), OPT_NUMBER},
    {MK_FIELD(rope_base), OPT_TEXT},      {MK_FIELD(rope_scaling), OPT_TEXT},
    {MK_FIELD(tokenizer), OPT_TEXT},      {MK_FIELD(pre), OPT_TEXT},
    {MK_FIELD(truncate), OPT_TEXT},       {"arch", offsetof(mk_options, arch_name), OPT_TEXT},
};

static int mk_complain(const char *what, const char *arg) {
    fprintf(stderr, "mkmodel: %s: %s\n", what, arg);
    return -1;
}

static int mk_set(mk_options *o, const char *arg) {
    const char *equals = strchr(arg, '=');
    if (!equals) return mk_complain("KEY=VALUE expected", arg);
    if (strncmp(arg, "kv:", 3) == 0 || strncmp(arg, "tensor:", 7) == 0) {
        o->overrides[o->n_overrides++] = arg;
        return 0;
    }
    for (size_t i = 0; i < sizeof mk_keys / sizeof *mk_keys; i++) {
        size_t n = strlen(mk_keys[i].name);
        if ((size_t)(equals - arg) != n || strncmp(mk_keys[i].name, arg, n) != 0) continue;
        char *field = (char *)o + mk_keys[i].field, *end;
        if (mk_keys[i].type == OPT_TEXT) {
            memcpy(field, &(const char *){equals + 1}, sizeof(const char *));
            return 0;
        }
        uint64_t v = strtoull(equals + 1, &end, 0);
        if (*end || end == equals + 1) return mk_complain("not a number", arg);
        memcpy(field, &v, sizeof v);
        return 0;
    }
    return mk_complain("unknown key", arg);
}

/* Default shapes have all lengths distinct, so that a mistaken one cannot go unnoticed. */
static int mk_defaults(mk_options *o, const char *arch, const char *format) {
    o->format = mk_find_format(format);
    if (!o->format) return mk_complain("unknown format", format);
    for (size_t i = 0; i < sizeof mk_archs / sizeof *mk_archs; i++)
        if (strcmp(mk_archs[i].name, arch) == 0) o->arch = &mk_archs[i];
    if (!o->arch) return mk_complain("unknown architecture", arch);
    int k_format = o->format->elements == 256;
    o->embd = k_format ? 256 : 96, o->ff = k_format ? 768 : 224;
    o->heads = k_format ? 8 : 4, o->hd = k_format ? 64 : 40;
    o->kv = 2, o->layers = 3, o->vocab = 391, o->ctx = 512, o->version = 3, o->tied = 0;
    o->magic = 0x46554747, o->n_tensors = o->n_kv = o->alignment = MK_AUTO;
    o->rope_base = "10000", o->tokenizer = "spm", o->pre = "gpt-2", o->arch_name = arch;
    return 0;
}

static uint64_t mk_dim(const mk_options *o, int dim) {
    uint64_t len[DIM_COUNT] = {0,
                               o->embd,
                               o->ff,
                               o->heads * o->hd,
                               o->kv * o->hd,
                               o->hd,
                               o->hd / 2,
                               o->vocab};
    return len[dim];
}

/* An override is PREFIX NAME SUFFIX = VALUE; gives VALUE, or NULL where there is none. */
static const char *mk_override(mk_options *o, const char *prefix, const char *name,
                               const char *suffix) {
    char want[512];
    int n = snprintf(want, sizeof want, "%s%s%s=", prefix, name, suffix);
    for (size_t i = 0; i < o->n_overrides; i++) {
        if (strncmp(o->overrides[i], want, (size_t)n) != 0) continue;
        o->used[i] = 1;
        return o->overrides[i] + n;
    }
    return NULL;
}

/* ==== Bytes ================================================================================== */

typedef struct {
    uint8_t *data;
    size_t len, cap;
} mk_buf;

static uint8_t *mk_grow(mk_buf *b, size_t n) {
    if (b->cap - b->len < n) {
        b->cap = (b->len + n) * 2;
        b->data = realloc(b->data, b->cap);
        if (!b->data) {
            mk_complain("out of memory", "header");
            exit(1);
        }
    }
    b->len += n;
    return b->data + b->len - n;
}

static void mk_int(mk_buf *b, uint64_t v, int bytes) {
    mk_put(mk_grow(b, (size_t)bytes), v, bytes);
}

static void mk_str(mk_buf *b, const char *s, size_t n) {
    mk_int(b, n, 8);
    memcpy(mk_grow(b, n), s, n);
}

static void mk_cstr(mk_buf *b, const char *s) { mk_str(b, s, strlen(s)); }

/* ==== Metadata =============================================================================== */

/* The value types of GGUF; the index is the type id. */
enum { V_U32 = 4, V_I32 = 5, V_F32 = 6, V_BOOL = 7, V_STR = 8, V_ARRAY = 9 };
static const struct {
    const char *name;
    int bytes;
} mk_types[] = {{"u8", 1},   {"i8", 1},  {"u16", 2}, {"i16", 2}, {"u32", 4}, {"i32", 4}, {"f32", 4},
                {"bool", 1}, {"str", 0}, {"[", 0},   {"u64", 8}, {"i64", 8}, {"f64", 8}};

static uint32_t mk_type_id(const char *name, size_t n) {
    for (uint32_t i = 0; i < sizeof mk_types / sizeof *mk_types; i++)
        if (strlen(mk_types[i].name) == n && strncmp(mk_types[i].name, name, n) == 0) return i;
    fprintf(stderr, "mkmodel: unknown value type in %s\n", name);
    exit(1);
}

static void mk_scalar(mk_buf *b, uint32_t type, const char *text, size_t n) {
    char copy[64];
    double d;
    uint64_t bits;
    if (type == V_STR) {
        mk_str(b, text, n);
        return;
    }
    snprintf(copy, sizeof copy, "%.*s", (int)(n < 63 ? n : 63), text);
    if (type == V_F32) {
        mk_int(b, mk_float_bits((float)strtod(copy, NULL)), 4);
    } else if (strcmp(mk_types[type].name, "f64") == 0) {
        d = strtod(copy, NULL);
        memcpy(&bits, &d, 8);
        mk_int(b, bits, 8);
    } else {
        bits = copy[0] == '-' ? (uint64_t)strtoll(copy, NULL, 0) : strtoull(copy, NULL, 0);
        mk_int(b, bits, mk_types[type].bytes);
    }
}

static void mk_list(mk_buf *b, uint32_t type, const char *text) {
    uint64_t count = *text != 0;
    for (const char *c = text; *c; c++) count += *c == ',';
    mk_int(b, type, 4);
    mk_int(b, count, 8);
    while (count--) {
        size_t n = strcspn(text, ",");
        mk_scalar(b, type, text, n);
        text += n + 1;
    }
}

static void mk_hex(mk_buf *b, const char *text) {
    for (char digits[3] = {0}; text[0] && text[1]; text += 2) {
        memcpy(digits, text, 2);
        mk_int(b, strtoull(digits, NULL, 16), 1);
    }
}

/* Writes what follows a key, given as TYPE:VALUE, [TYPE]:LIST or raw:ID:HEX. */
static void mk_value(mk_buf *b, const char *spec) {
    size_t n = strcspn(spec, ":");
    const char *value = spec[n] ? spec + n + 1 : spec + n;
    if (strncmp(spec, "raw:", 4) == 0) {
        char *end;
        mk_int(b, strtoull(value, &end, 0), 4);
        mk_hex(b, *end ? end + 1 : end);
    } else if (spec[0] == '[') {
        mk_int(b, V_ARRAY, 4);
        mk_list(b, mk_type_id(spec + 1, n - 2), value);
    } else {
        uint32_t type = mk_type_id(spec, n);
        mk_int(b, type, 4);
        mk_scalar(b, type, value, strlen(value));
    }
}

typedef struct {
    mk_buf out;
    uint64_t count;
    mk_options *o;
} mk_meta;

/* Begins a key.  Gives 0 where an override has settled its value already. */
static int mk_key_begin(mk_meta *m, const char *key) {
    const char *over = mk_override(m->o, "kv:", key, "");
    if (over && strcmp(over, "none") == 0) return 0;
    mk_cstr(&m->out, key);
    m->count++;
    if (over) mk_value(&m->out, over);
    return !over;
}

static void mk_kv(mk_meta *m, const char *key, const char *spec) {
    if (mk_key_begin(m, key)) mk_value(&m->out, spec);
}

static void mk_kv_u32(mk_meta *m, const char *key, uint64_t v) {
    if (!mk_key_begin(m, key)) return;
    mk_int(&m->out, V_U32, 4);
    mk_int(&m->out, v, 4);
}

static void mk_kv_text(mk_meta *m, const char *key, uint32_t type, const char *text) {
    if (!mk_key_begin(m, key)) return;
    mk_int(&m->out, type, 4);
    mk_scalar(&m->out, type, text, strlen(text));
}

static void mk_kv_array(mk_meta *m, const char *key, uint32_t type, uint64_t n, const mk_buf *b) {
    if (!mk_key_begin(m, key)) return;
    mk_int(&m->out, V_ARRAY, 4);
    mk_int(&m->out, type, 4);
    mk_int(&m->out, n, 8);
    memcpy(mk_grow(&m->out, b->len), b->data, b->len);
}

/* ==== Vocabularies =========================================================================== */

/* The words of both vocabularies: first the letters one by one, then a letter or the space mark
 * followed by one letter, two, three.  Each word is an earlier word plus a letter, so every
 * merge has its parts before it. */
static const char mk_letters[] = "etaoinshrdlucmfwypvbgkjqxz";

static void mk_word(char *out, const char *space, uint64_t n) {
    uint64_t span = 1;
    size_t tail = 1, len;
    for (n -= 26; n >= 27 * span * 26; tail++) n -= 27 * (span *= 26);
    for (uint64_t rest = n, i = tail; i > 0; i--, rest /= 26) out[4 + i] = mk_letters[rest % 26];
    uint64_t first = n / (span * 26);
    if (first == 0) {
        len = strlen(space);
        memcpy(out, space, len);
    } else {
        len = 1;
        out[0] = mk_letters[first - 1];
    }
    memmove(out + len, out + 5, tail);
    out[len + tail] = 0;
}

/* SentencePiece: <unk> <s> </s>, 256 byte tokens, the space mark and the letters, some
 * capitals, digits and signs, then the words.  Scores fall with the id, as merges do. */
static void mk_vocab_spm(mk_meta *m) {
    static const char singles[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"-:;()";
    mk_buf tokens = {0}, scores = {0}, types = {0};
    for (uint64_t i = 0, n; i < m->o->vocab; i++) {
        char text[32];
        if (i < 3) snprintf(text, sizeof text, "%s", i == 0 ? "<unk>" : i == 1 ? "<s>" : "</s>");
        else if (i < 259) snprintf(text, sizeof text, "<0x%02X>", (unsigned)i - 3);
        else if ((n = i - 259) == 0) snprintf(text, sizeof text, "\xE2\x96\x81");
        else if (n < 27) snprintf(text, sizeof text, "%c", mk_letters[n - 1]);
        else if (n < 26 + sizeof singles) snprintf(text, sizeof text, "%c", singles[n - 27]);
        else mk_word(text, "\xE2\x96\x81", n - sizeof singles);
        mk_cstr(&tokens, text);
        mk_int(&scores, mk_float_bits(i < 259 ? 0.0f : -(float)(i - 259)), 4);
        mk_int(&types, i == 0 ? 2 : i < 3 ? 3 : i < 259 ? 6 : 1, 4);
    }
    mk_kv(m, "tokenizer.ggml.model", "str:llama");
    mk_kv_array(m, "tokenizer.ggml.tokens", V_STR, m->o->vocab, &tokens);
    mk_kv_array(m, "tokenizer.ggml.scores", V_F32, m->o->vocab, &scores);
    mk_kv_array(m, "tokenizer.ggml.token_type", V_I32, m->o->vocab, &types);
    mk_kv(m, "tokenizer.ggml.bos_token_id", "u32:1");
    mk_kv(m, "tokenizer.ggml.eos_token_id", "u32:2");
    mk_kv(m, "tokenizer.ggml.unknown_token_id", "u32:0");
    mk_kv(m, "tokenizer.ggml.add_bos_token", "bool:1");
    free(tokens.data), free(scores.data), free(types.data);
}

/* Byte-level BPE writes each byte as a printable character: itself where Latin-1 prints it, else
 * the next free one from U+0100. */
static int mk_byte_char(char *out, int byte) {
    int code = byte, free_code = 256;
    for (int b = 0; b <= byte; b++) {
        int prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        if (!prints) code = free_code++;
        else code = b;
    }
    if (code < 128) return out[0] = (char)code, out[1] = 0, 1;
    out[0] = (char)(0xC0 | code >> 6), out[1] = (char)(0x80 | (code & 63)), out[2] = 0;
    return 2;
}

/* BPE: 256 bytes, numbers that show how a pre-tokenizer splits digits, the words with their
 * merges, and three control tokens at the end. */
enum { N_BPE_FIXED = 256 + 3, N_BPE_SPECIAL = 3 };
static void mk_vocab_bpe(mk_meta *m) {
    static const char *const special[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    static const char *const numbers[] = {"12", "123", "1234"};
    mk_buf tokens = {0}, merges = {0}, types = {0};
    uint64_t n_vocab = m->o->vocab, first_special = n_vocab - N_BPE_SPECIAL;
    for (uint64_t i = 0; i < n_vocab; i++) {
        char text[32], merge[32];
        if (i < 256) mk_byte_char(text, (int)i);
        else if (i >= first_special) snprintf(text, sizeof text, "%s", special[i - first_special]);
        else {
            if (i < N_BPE_FIXED) snprintf(text, sizeof text, "%s", numbers[i - 256]);
            else mk_word(text, "\xC4\xA0", i - N_BPE_FIXED + 26);
            size_t n = strlen(text);
            int merge_len = snprintf(merge, sizeof merge, "%.*s %c", (int)n - 1, text, text[n - 1]);
            mk_str(&merges, merge, (size_t)merge_len);
        }
        mk_cstr(&tokens, text);
        mk_int(&types, i >= first_special ? 3 : 1, 4);
    }
    mk_kv(m, "tokenizer.ggml.model", "str:gpt2");
    mk_kv_text(m, "tokenizer.ggml.pre", V_STR, m->o->pre);
    mk_kv_array(m, "tokenizer.ggml.tokens", V_STR, n_vocab, &tokens);
    mk_kv_array(m, "tokenizer.ggml.token_type", V_I32, n_vocab, &types);
    mk_kv_array(m, "tokenizer.ggml.merges", V_STR, first_special - 256, &merges);
    mk_kv_u32(m, "tokenizer.ggml.bos_token_id", first_special);
    mk_kv_u32(m, "tokenizer.ggml.eos_token_id", first_special);
    mk_kv(m, "tokenizer.ggml.add_bos_token", "bool:0");
    free(tokens.data), free(merges.data), free(types.data);
}

/* ==== Metadata of a model ==================================================================== */

static const char *mk_arch_key(const mk_options *o, const char *suffix) {
    static char key[128];
    snprintf(key, sizeof key, "%s.%s", o->arch->name, suffix);
    return key;
}

static void mk_metadata(mk_meta *m) {
    mk_options *o = m->o;
    const struct {
        const char *key;
        uint64_t value;
    } numbers[] = {
        {"block_count", o->layers},           {"context_length", o->ctx},
        {"embedding_length", o->embd},        {"feed_forward_length", o->ff},
        {"attention.head_count", o->heads},   {"attention.head_count_kv", o->kv},
        {"attention.key_length", o->hd},      {"attention.value_length", o->hd},
        {"rope.dimension_count", o->hd},      {"vocab_size", o->vocab},
    };
    mk_kv_text(m, "general.architecture", V_STR, o->arch_name);
    mk_kv(m, "general.name", "str:random");
    mk_kv_u32(m, "general.file_type", o->format->ftype);
    mk_kv(m, "general.quantization_version", "u32:2");
    if (o->alignment != MK_AUTO) mk_kv_u32(m, "general.alignment", o->alignment);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        mk_kv_u32(m, mk_arch_key(o, numbers[i].key), numbers[i].value);
    mk_kv(m, mk_arch_key(o, "attention.layer_norm_rms_epsilon"), "f32:1e-5");
    mk_kv_text(m, mk_arch_key(o, "rope.freq_base"), V_F32, o->rope_base);
    if (o->rope_scaling) {
        mk_kv(m, mk_arch_key(o, "rope.scaling.type"), "str:linear");
        mk_kv_text(m, mk_arch_key(o, "rope.scaling.factor"), V_F32, o->rope_scaling);
    }
    if (strcmp(o->tokenizer, "bpe") == 0) mk_vocab_bpe(m);
    else mk_vocab_spm(m);
    for (size_t i = 0; i < o->n_overrides; i++) {
        const char *key = o->overrides[i] + 3;
        size_t n = strcspn(key, "=");
        if (o->used[i] || strncmp(key - 3, "kv:", 3) != 0) continue;
        o->used[i] = 1;
        mk_str(&m->out, key, n);
        mk_value(&m->out, key + n + 1);
        m->count++;
    }
}

/* ==== Tensors ================================================================================ */

typedef struct {
    char name[128];
    const struct mk_row *row;
    const mk_format *format;
    uint64_t dim[2]; /* dim[1] is 1 for a vector */
    uint64_t offset, bytes;
} mk_tensor;

typedef struct {
    mk_tensor *list;
    size_t n;
    uint64_t data_bytes, alignment;
} mk_tensors;

static int mk_add_tensor(mk_options *o, mk_tensors *ts, const struct mk_row *row, int layer) {
    mk_tensor *t = &ts->list[ts->n];
    memset(t, 0, sizeof *t);
    const char *number = strstr(row->name, "%d");
    if (!number) snprintf(t->name, sizeof t->name, "%s", row->name);
    else
        snprintf(t->name, sizeof t->name, "%.*s%d%s", (int)(number - row->name), row->name, layer,
                 number + 2);
    if (mk_override(o, "tensor:", t->name, ":skip")) return 0;
    const char *format = mk_override(o, "tensor:", t->name, ":format");
    t->row = row;
    t->format = row->kind == KIND_MATRIX ? o->format : &mk_formats[0];
    if (format && !(t->format = mk_find_format(format)))
        return mk_complain("unknown format", format);
    t->dim[0] = mk_dim(o, row->dim[0]);
    t->dim[1] = row->dim[1] ? mk_dim(o, row->dim[1]) : 1;
    if (t->dim[0] % t->format->elements)
        return mk_complain("rows do not divide into blocks", t->name);
    t->bytes = t->dim[0] / t->format->elements * t->format->bytes * t->dim[1];
    t->offset = ts->data_bytes;
    ts->data_bytes += (t->bytes + ts->alignment - 1) / ts->alignment * ts->alignment;
    ts->n++;
    return 0;
}

/* Rows that share the "blk." prefix are written layer by layer. */
static int mk_list_tensors(mk_options *o, mk_tensors *ts) {
    size_t n_rows = sizeof mk_rows / sizeof *mk_rows;
    unsigned has = o->arch->has | (o->tied ? 0 : HAS_OUTPUT) | (o->freq_factors ? HAS_FREQS : 0);
    ts->list = calloc(n_rows * (o->layers + 1), sizeof *ts->list);
    if (!ts->list) return mk_complain("out of memory", "tensors");
    if (o->vocab_only) return 0;
    for (size_t r = 0; r < n_rows; r++) {
        size_t end = r;
        while (end < n_rows && strncmp(mk_rows[end].name, "blk.", 4) == 0) end++;
        uint64_t repeat = end > r ? o->layers : 1;
        if (end == r) end = r + 1;
        for (uint64_t layer = 0; layer < repeat; layer++)
            for (size_t i = r; i < end; i++)
                if ((mk_rows[i].need & has) == mk_rows[i].need &&
                    mk_add_tensor(o, ts, &mk_rows[i], (int)layer))
                    return -1;
        r = end - 1;
    }
    return 0;
}

static uint64_t mk_field(mk_options *o, const mk_tensor *t, const char *field, uint64_t normal) {
    const char *v = mk_override(o, "tensor:", t->name, field);
    return v ? strtoull(v, NULL, 0) : normal;
}

static void mk_tensor_header(mk_options *o, mk_buf *b, const mk_tensor *t) {
    const char *name = mk_override(o, "tensor:", t->name, ":name");
    const char *dims = mk_override(o, "tensor:", t->name, ":dims");
    uint64_t n_dims = t->row->dim[1] ? 2 : 1;
    mk_buf list = {0};
    if (!dims) {
        for (uint64_t i = 0; i < n_dims; i++) mk_int(&list, t->dim[i], 8);
    } else {
        for (n_dims = 0; *dims; n_dims++) {
            char *end;
            mk_int(&list, strtoull(dims, &end, 0), 8);
            dims = *end ? end + 1 : end;
        }
    }
    mk_cstr(b, name ? name : t->name);
    mk_int(b, mk_field(o, t, ":n_dims", n_dims), 4);
    memcpy(mk_grow(b, list.len), list.data, list.len);
    mk_int(b, mk_field(o, t, ":type", t->format->id), 4);
    mk_int(b, mk_field(o, t, ":offset", t->offset), 8);
    free(list.data);
}

/* Norms lie within a quarter of 1, biases within half of 0, frequency factors go from 1 to 8. */
static float mk_vector_value(uint64_t *rng, const mk_tensor *t, uint64_t i) {
    int32_t r = (int32_t)(mk_random(rng) >> 43) - (1 << 20);
    if (t->row->kind == KIND_NORM) return mk_fixed22((1 << 22) + r);
    if (t->row->kind == KIND_BIAS) return mk_fixed22(2 * r);
    uint64_t last = t->dim[0] > 1 ? t->dim[0] - 1 : 1;
    return mk_fixed22((int32_t)(65536 + 7 * 65536 * i / last)) * 64.0f;
}

static void mk_tensor_row(uint64_t *rng, const mk_tensor *t, uint8_t *out) {
    const mk_format *f = t->format;
    int64_t std28 = (int64_t)mk_isqrt((1ull << 56) / t->dim[0]) * t->row->gain4 / 4;
    for (uint64_t i = 0; i < t->dim[0] / f->elements; i++, out += f->bytes) {
        if (t->row->kind == KIND_MATRIX) f->fill(rng, out, std28);
        else mk_put(out, mk_float_bits(mk_vector_value(rng, t, i)), 4);
    }
}

/* ==== The file =============================================================================== */

typedef struct {
    FILE *file;
    uint64_t room; /* bytes that may still be written: a truncated file ends early */
    int failed;
} mk_out;

static void mk_emit(mk_out *out, const void *p, uint64_t n) {
    if (n > out->room) n = out->room;
    out->room -= n;
    if (n && fwrite(p, 1, (size_t)n, out->file) != n) out->failed = 1;
}

static void mk_emit_zeros(mk_out *out, uint64_t n) {
    static const uint8_t zeros[4096];
    for (uint64_t step; n && out->room; n -= step)
        mk_emit(out, zeros, step = n < sizeof zeros ? n : sizeof zeros);
}

static void mk_emit_data(mk_out *out, const mk_options *o, const mk_tensors *ts) {
    for (size_t i = 0; i < ts->n; i++) {
        const mk_tensor *t = &ts->list[i];
        uint64_t rng = mk_seed(t->name, o->seed);
        uint64_t row_bytes = t->bytes / (t->dim[1] ? t->dim[1] : 1);
        uint8_t *row = malloc((size_t)row_bytes + 1);
        if (!row) {
            out->failed = 1;
            return;
        }
        for (uint64_t r = 0; r < t->dim[1] && out->room; r++) {
            mk_tensor_row(&rng, t, row);
            mk_emit(out, row, row_bytes);
        }
        mk_emit_zeros(out, (ts->alignment - t->bytes % ts->alignment) % ts->alignment);
        free(row);
    }
}

static int mk_emit_file(mk_options *o, const char *path, const mk_buf *head, const mk_tensors *ts) {
    uint64_t pad = (ts->alignment - head->len % ts->alignment) % ts->alignment;
    uint64_t total = head->len + pad + ts->data_bytes;
    mk_out out = {fopen(path, "wb"), total, 0};
    if (!out.file) return mk_complain("cannot write", path);
    if (o->truncate) {
        int infos = strcmp(o->truncate, "infos") == 0;
        out.room = infos ? head->len : strtoull(o->truncate, NULL, 0);
    }
    out.room = out.room > o->cut ? out.room - o->cut : 0;
    mk_emit(&out, head->data, head->len);
    mk_emit_zeros(&out, pad);
    mk_emit_data(&out, o, ts);
    if (fclose(out.file) != 0 || out.failed) return mk_complain("cannot write", path);
    return 0;
}

static int mk_build(mk_options *o, const char *path) {
    uint64_t a = o->alignment;
    mk_tensors ts = {NULL, 0, 0, a != MK_AUTO && a && a <= 1 << 20 ? a : 32};
    mk_meta meta = {{0}, 0, o};
    mk_buf head = {0};
    int failed = mk_list_tensors(o, &ts);
    if (!failed) {
        mk_metadata(&meta);
        mk_int(&head, o->magic, 4);
        mk_int(&head, o->version, 4);
        mk_int(&head, o->n_tensors == MK_AUTO ? ts.n : o->n_tensors, 8);
        mk_int(&head, o->n_kv == MK_AUTO ? meta.count : o->n_kv, 8);
        memcpy(mk_grow(&head, meta.out.len), meta.out.data, meta.out.len);
        for (size_t i = 0; i < ts.n; i++) mk_tensor_header(o, &head, &ts.list[i]);
        failed = mk_emit_file(o, path, &head, &ts);
        for (size_t i = 0; i < o->n_overrides && !failed; i++)
            if (!o->used[i]) failed = mk_complain("names nothing in this model", o->overrides[i]);
    }
    free(ts.list), free(meta.out.data), free(head.data);
    return failed;
}

/* args are ARCH FORMAT OUT KEY=VALUE...; gives 0, or -1 after a message on stderr. */
static int mkmodel_write(int n_args, const char **args) {
    mk_options o = {0};
    int failed = -1;
    if (n_args < 3) return mk_complain("usage", "mkmodel ARCH FORMAT OUT.gguf [KEY=VALUE ...]");
    o.overrides = calloc((size_t)n_args, sizeof *o.overrides);
    o.used = calloc((size_t)n_args, 1);
    if (!o.overrides || !o.used) {
        mk_complain("out of memory", "arguments");
    } else if ((failed = mk_defaults(&o, args[0], args[1])) == 0) {
        for (int i = 3; i < n_args && !failed; i++) failed = mk_set(&o, args[i]);
        uint64_t least = strcmp(o.tokenizer, "bpe") == 0 ? N_BPE_FIXED + N_BPE_SPECIAL : 3;
        if (!failed && o.vocab < least) failed = mk_complain("vocab is too small", args[2]);
        if (!failed) failed = mk_build(&o, args[2]);
    }
    free(o.overrides), free(o.used);
    return failed;
}

#ifndef MKMODEL_NO_MAIN
int main(int argc, char **argv) {
    return mkmodel_write(argc - 1, (const char **)(argv + 1)) ? 1 : 0;
}
#endif
