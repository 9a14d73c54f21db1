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
 * ARCH is one of mk_archs below.  Its row says which tensors and keys it has, with lengths that
 * suit it; what a family has in some models only is switched by with= and without=.
 *
 * Shape:      embd ff layers heads kv hd vocab ctx rope_base freq_factors(0|1) tied(0|1) seed
 *             rot(rotated part of a head) vd(length of a value head)
 *             experts used(experts per token) ff_exp ff_shared dense(leading layers without)
 *             conv(a bit for each layer with a short convolution) taps lora(rank of MLA's keys)
 *             exps_format(of the experts' matrices, where it is not FORMAT)
 * Rope:       rope_scaling(factor) rope_type(linear|yarn|longrope) rope_orig(context before)
 *             rope_attn(attention factor)
 * Features:   with=NAME,NAME.. without=NAME,NAME..; the names stand in mk_features
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

/* What a tensor row may require, a bit each.  An architecture is a set of these, to which the
 * options add; the ON_ bits are those of a single layer. */
#define MK_BIT(n) (1ull << (n))
#define HAS_OUTPUT MK_BIT(0)
#define HAS_FREQS MK_BIT(1)       /* rope_freqs.weight */
#define HAS_LONGROPE MK_BIT(2)    /* rope_factors_long.weight and _short */
#define HAS_POSITIONS MK_BIT(3)   /* a learnt vector per position instead of rope */
#define HAS_SPLIT_QKV MK_BIT(4)   /* attn_q, attn_k, attn_v */
#define HAS_FUSED_QKV MK_BIT(5)   /* attn_qkv */
#define HAS_QKV_BIAS MK_BIT(6)    /* of either */
#define HAS_OUT_BIAS MK_BIT(7)    /* of attn_output */
#define HAS_QK_NORM MK_BIT(8)     /* one weight for all heads */
#define HAS_QK_NORM_ALL MK_BIT(9) /* one norm over all heads together */
#define HAS_QK_NORM_EACH MK_BIT(10) /* a weight for each head */
#define HAS_SINKS MK_BIT(11)
#define HAS_LATENT MK_BIT(12)      /* MLA: keys and values come from a short vector, by attn_kv_b */
#define HAS_LATENT_HEADS MK_BIT(13) /* ... by attn_k_b and attn_v_b */
#define HAS_ATTN_NORM MK_BIT(14)
#define HAS_FFN_NORM MK_BIT(15)
#define HAS_POST_ATTN MK_BIT(16)
#define HAS_POST_FFN MK_BIT(17)
#define HAS_NORM_BIAS MK_BIT(18) /* of all norms of the residual stream */
#define HAS_GATE MK_BIT(19)
#define HAS_UP MK_BIT(20)
#define HAS_FUSED_UP MK_BIT(21) /* gate and up in one */
#define HAS_FFN_BIAS MK_BIT(22)
#define HAS_EXPERT_BIAS MK_BIT(23)
#define HAS_CHOICE_BIAS MK_BIT(24) /* added to the scores for the choice of experts only */
#define HAS_SHARED_GATE MK_BIT(25)
#define HAS_OUT_NORM MK_BIT(26)
#define HAS_EMBD_NORM MK_BIT(27) /* the last norm, under another name */
#define HAS_EXPERTS MK_BIT(28)
#define HAS_SHARED MK_BIT(29)
#define IS_SQUARE MK_BIT(40)    /* heads * hd = embd */
#define IS_TIED MK_BIT(41)      /* there can be no output.weight */
#define IS_LAYERNORM MK_BIT(42) /* the key of the epsilon */
#define IS_FF_EXP MK_BIT(43)    /* experts have a length of their own */
#define ON_ATTENTION MK_BIT(50)
#define ON_CONV MK_BIT(51)
#define ON_DENSE MK_BIT(52)
#define ON_EXPERTS MK_BIT(53)

#define PLAIN_FFN (HAS_FFN_NORM | HAS_GATE | HAS_UP)
#define PLAIN (HAS_SPLIT_QKV | HAS_ATTN_NORM | PLAIN_FFN | HAS_OUT_NORM)
#define POST_NORMS (HAS_POST_ATTN | HAS_POST_FFN)
#define LAYERNORMS (IS_LAYERNORM | HAS_NORM_BIAS)

/* Keys are ARCH.KEY=TYPE:VALUE, as in kv:.  Windows and original contexts are so short that 64
 * positions cross them; soft caps and scales so strong that they cannot go unnoticed. */
static const struct mk_arch {
    const char *name;
    uint64_t has;
    const char *shape, *keys;
} mk_archs[] = {
    {"llama", PLAIN, "", ""},
    {"qwen2", PLAIN | HAS_QKV_BIAS, "", ""},
    {"qwen3", PLAIN | HAS_QK_NORM, "", ""},
    {"qwen2moe", PLAIN | HAS_QKV_BIAS | HAS_SHARED_GATE | IS_SQUARE | IS_FF_EXP,
     "experts=6 used=2 ff_shared=128", ""},
    {"qwen3moe", PLAIN | HAS_QK_NORM | IS_FF_EXP, "experts=7 used=3", ""},
    {"gemma2", PLAIN | POST_NORMS | IS_TIED, "layers=4",
     "attention.sliding_window=u32:20 attn_logit_softcapping=f32:1.5 "
     "final_logit_softcapping=f32:3"},
    {"gemma3", PLAIN | POST_NORMS | HAS_QK_NORM, "layers=7",
     "attention.sliding_window=u32:18 rope.freq_base_swa=f32:3000"},
    {"phi3", (PLAIN & ~(HAS_SPLIT_QKV | HAS_GATE | HAS_UP)) | HAS_FUSED_QKV | HAS_FUSED_UP | IS_SQUARE,
     "", ""},
    {"gpt2", HAS_POSITIONS | HAS_FUSED_QKV | HAS_QKV_BIAS | HAS_OUT_BIAS | HAS_ATTN_NORM | HAS_FFN_NORM |
         HAS_UP | HAS_FFN_BIAS | HAS_OUT_NORM | LAYERNORMS | IS_SQUARE, "kv=4 ctx=192", ""},
    {"gpt-oss", (PLAIN & ~HAS_FFN_NORM) | HAS_POST_ATTN | HAS_QKV_BIAS | HAS_OUT_BIAS | HAS_SINKS |
         HAS_EXPERT_BIAS | IS_FF_EXP, "layers=4 experts=6 used=3",
     "attention.sliding_window=u32:20"},
    {"smollm3", PLAIN, "layers=5", ""},
    {"olmo2", (PLAIN & ~(HAS_ATTN_NORM | HAS_FFN_NORM)) | POST_NORMS | HAS_QK_NORM_ALL | IS_SQUARE, "",
     ""},
    {"olmoe", PLAIN | HAS_QK_NORM_ALL | IS_SQUARE, "kv=4 ff=64 experts=7 used=3", ""},
    {"granite", PLAIN, "", "embedding_scale=f32:5 residual_scale=f32:0.6 attention.scale=f32:0.3 "
     "logit_scale=f32:0.7"},
    {"granitemoe", PLAIN, "ff=64 experts=7 used=3", "embedding_scale=f32:4 residual_scale=f32:0.7 "
     "attention.scale=f32:0.25 logit_scale=f32:0.8"},
    {"starcoder2", (PLAIN & ~HAS_GATE) | HAS_QKV_BIAS | HAS_OUT_BIAS | HAS_FFN_BIAS | LAYERNORMS |
         IS_SQUARE, "", ""},
    {"stablelm", PLAIN | LAYERNORMS | IS_SQUARE, "rot=8", ""},
    {"command-r", (PLAIN & ~HAS_FFN_NORM) | IS_LAYERNORM | IS_TIED | IS_SQUARE, "",
     "logit_scale=f32:1.3"},
    {"cohere2", (PLAIN & ~HAS_FFN_NORM) | IS_LAYERNORM | IS_TIED | IS_SQUARE, "layers=5",
     "attention.sliding_window=u32:20 logit_scale=f32:1.3"},
    {"exaone4", (PLAIN & ~(HAS_ATTN_NORM | HAS_FFN_NORM)) | POST_NORMS | HAS_QK_NORM | IS_SQUARE, "", ""},
    {"ernie4_5", PLAIN, "", ""},
    {"glm4", (PLAIN & ~(HAS_GATE | HAS_UP)) | HAS_FUSED_UP | POST_NORMS | HAS_QKV_BIAS, "rot=20", ""},
    {"lfm2", (PLAIN & ~HAS_OUT_NORM) | HAS_EMBD_NORM | HAS_QK_NORM | IS_SQUARE,
     "layers=5 conv=0b01101 taps=3", ""},
    {"lfm2moe", (PLAIN & ~HAS_OUT_NORM) | HAS_EMBD_NORM | HAS_QK_NORM | HAS_CHOICE_BIAS | IS_SQUARE |
         IS_FF_EXP, "layers=5 conv=0b01101 taps=3 experts=6 used=2 dense=2", "expert_gating_func=u32:2"},
    {"deepseek2", (PLAIN & ~HAS_SPLIT_QKV) | HAS_LATENT | IS_FF_EXP,
     "layers=27 kv=4 hd=48 rot=16 vd=40 lora=64 experts=6 used=2 ff_shared=128 dense=1",
     "expert_shared_count=u32:2 expert_weights_scale=f32:1.5"},
};

/* Names for with= and without=. */
static const struct {
    const char *name;
    uint64_t bit;
} mk_features[] = {
    {"qkv_bias", HAS_QKV_BIAS},       {"out_bias", HAS_OUT_BIAS},
    {"ffn_bias", HAS_FFN_BIAS},       {"norm_bias", HAS_NORM_BIAS},
    {"qk_norm", HAS_QK_NORM},         {"qk_norm_each", HAS_QK_NORM_EACH},
    {"ffn_norm", HAS_FFN_NORM},       {"longrope", HAS_LONGROPE},
    {"split_qkv", HAS_SPLIT_QKV},     {"fused_qkv", HAS_FUSED_QKV},
    {"sinks", HAS_SINKS},             {"choice_bias", HAS_CHOICE_BIAS},
    {"latent", HAS_LATENT},           {"latent_heads", HAS_LATENT_HEADS},
};

/* The lengths that tensor rows are written in. */
enum {
    DIM_NONE, DIM_EMBD, DIM_FF, DIM_Q, DIM_KV, DIM_HEAD, DIM_FREQS, DIM_VOCAB, DIM_CTX, DIM_QKV, DIM_FUSED_UP,
    DIM_HEADS, DIM_KV_HEADS, DIM_EXPERTS, DIM_FF_EXP, DIM_FF_SHARED, DIM_TAPS, DIM_CONV_IN, DIM_LATENT,
    DIM_LATENT_IN, DIM_LATENT_KV, DIM_NOPE, DIM_VALUE, DIM_ATTN_OUT, DIM_COUNT
};
/* A small matrix stays in F32 whatever the file's format, as quantisers leave it. */
enum { KIND_MATRIX, KIND_SMALL, KIND_NORM, KIND_BIAS, KIND_FREQS };

/* The gain (in quarters) is the spread of a product with a normalised vector.  At the output 2
 * gives distributions with a few likely tokens; much more, here or in queries and keys, would
 * amplify the rounding of activations until two right programs no longer agree.  Of biases and
 * frequency factors it is the range, 0 standing for the usual one. */
static const struct mk_row {
    const char *name;
    int kind, dim[3], gain4;
    uint64_t need;
} mk_rows[] = {
    {"token_embd.weight", KIND_MATRIX, {DIM_EMBD, DIM_VOCAB}, 8, 0},
    {"position_embd.weight", KIND_SMALL, {DIM_EMBD, DIM_CTX}, 8, HAS_POSITIONS},
    {"rope_freqs.weight", KIND_FREQS, {DIM_FREQS}, 28, HAS_FREQS},
    {"rope_factors_long.weight", KIND_FREQS, {DIM_FREQS}, 20, HAS_LONGROPE},
    {"rope_factors_short.weight", KIND_FREQS, {DIM_FREQS}, 3, HAS_LONGROPE},
    {"blk.%d.attn_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_ATTN_NORM},
    {"blk.%d.attn_norm.bias", KIND_BIAS, {DIM_EMBD}, 0, HAS_ATTN_NORM | HAS_NORM_BIAS},
    {"blk.%d.attn_q.weight", KIND_MATRIX, {DIM_EMBD, DIM_Q}, 4, HAS_SPLIT_QKV | ON_ATTENTION},
    {"blk.%d.attn_k.weight", KIND_MATRIX, {DIM_EMBD, DIM_KV}, 4, HAS_SPLIT_QKV | ON_ATTENTION},
    {"blk.%d.attn_v.weight", KIND_MATRIX, {DIM_EMBD, DIM_KV}, 4, HAS_SPLIT_QKV | ON_ATTENTION},
    {"blk.%d.attn_qkv.weight", KIND_MATRIX, {DIM_EMBD, DIM_QKV}, 4, HAS_FUSED_QKV},
    {"blk.%d.attn_qkv.bias", KIND_BIAS, {DIM_QKV}, 0, HAS_FUSED_QKV | HAS_QKV_BIAS},
    {"blk.%d.attn_q.weight", KIND_MATRIX, {DIM_EMBD, DIM_Q}, 4, HAS_LATENT},
    {"blk.%d.attn_kv_a_mqa.weight", KIND_MATRIX, {DIM_EMBD, DIM_LATENT_IN}, 4, HAS_LATENT},
    {"blk.%d.attn_kv_a_norm.weight", KIND_NORM, {DIM_LATENT}, 0, HAS_LATENT},
    {"blk.%d.attn_kv_b.weight", KIND_MATRIX, {DIM_LATENT, DIM_LATENT_KV}, 4, HAS_LATENT},
    {"blk.%d.attn_q.weight", KIND_MATRIX, {DIM_EMBD, DIM_Q}, 4, HAS_LATENT_HEADS},
    {"blk.%d.attn_kv_a_mqa.weight", KIND_MATRIX, {DIM_EMBD, DIM_LATENT_IN}, 4, HAS_LATENT_HEADS},
    {"blk.%d.attn_kv_a_norm.weight", KIND_NORM, {DIM_LATENT}, 0, HAS_LATENT_HEADS},
    {"blk.%d.attn_k_b.weight", KIND_MATRIX, {DIM_NOPE, DIM_LATENT, DIM_HEADS}, 4, HAS_LATENT_HEADS},
    {"blk.%d.attn_v_b.weight", KIND_MATRIX, {DIM_LATENT, DIM_VALUE, DIM_HEADS}, 4, HAS_LATENT_HEADS},
    {"blk.%d.attn_output.weight", KIND_MATRIX, {DIM_ATTN_OUT, DIM_EMBD}, 4, ON_ATTENTION},
    {"blk.%d.attn_output.bias", KIND_BIAS, {DIM_EMBD}, 0, HAS_OUT_BIAS},
    {"blk.%d.attn_q.bias", KIND_BIAS, {DIM_Q}, 0, HAS_SPLIT_QKV | HAS_QKV_BIAS},
    {"blk.%d.attn_k.bias", KIND_BIAS, {DIM_KV}, 0, HAS_SPLIT_QKV | HAS_QKV_BIAS},
    {"blk.%d.attn_v.bias", KIND_BIAS, {DIM_KV}, 0, HAS_SPLIT_QKV | HAS_QKV_BIAS},
    {"blk.%d.attn_q_norm.weight", KIND_NORM, {DIM_HEAD}, 0, HAS_QK_NORM | ON_ATTENTION},
    {"blk.%d.attn_k_norm.weight", KIND_NORM, {DIM_HEAD}, 0, HAS_QK_NORM | ON_ATTENTION},
    {"blk.%d.attn_q_norm.weight", KIND_NORM, {DIM_Q}, 0, HAS_QK_NORM_ALL},
    {"blk.%d.attn_k_norm.weight", KIND_NORM, {DIM_KV}, 0, HAS_QK_NORM_ALL},
    {"blk.%d.attn_q_norm.weight", KIND_NORM, {DIM_HEAD, DIM_HEADS}, 0, HAS_QK_NORM_EACH},
    {"blk.%d.attn_k_norm.weight", KIND_NORM, {DIM_HEAD, DIM_KV_HEADS}, 0, HAS_QK_NORM_EACH},
    {"blk.%d.attn_sinks.weight", KIND_BIAS, {DIM_HEADS}, 16, HAS_SINKS},
    {"blk.%d.post_attention_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_POST_ATTN},
    {"blk.%d.shortconv.conv.weight", KIND_SMALL, {DIM_TAPS, DIM_EMBD}, 4, ON_CONV},
    {"blk.%d.shortconv.in_proj.weight", KIND_MATRIX, {DIM_EMBD, DIM_CONV_IN}, 4, ON_CONV},
    {"blk.%d.shortconv.out_proj.weight", KIND_MATRIX, {DIM_EMBD, DIM_EMBD}, 4, ON_CONV},
    {"blk.%d.ffn_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_FFN_NORM},
    {"blk.%d.ffn_norm.bias", KIND_BIAS, {DIM_EMBD}, 0, HAS_FFN_NORM | HAS_NORM_BIAS},
    {"blk.%d.ffn_gate.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF}, 4, HAS_GATE | ON_DENSE},
    {"blk.%d.ffn_up.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF}, 4, HAS_UP | ON_DENSE},
    {"blk.%d.ffn_up.weight", KIND_MATRIX, {DIM_EMBD, DIM_FUSED_UP}, 4, HAS_FUSED_UP | ON_DENSE},
    {"blk.%d.ffn_down.weight", KIND_MATRIX, {DIM_FF, DIM_EMBD}, 4, ON_DENSE},
    {"blk.%d.ffn_gate.bias", KIND_BIAS, {DIM_FF}, 0, HAS_GATE | HAS_FFN_BIAS | ON_DENSE},
    {"blk.%d.ffn_up.bias", KIND_BIAS, {DIM_FF}, 0, HAS_UP | HAS_FFN_BIAS | ON_DENSE},
    {"blk.%d.ffn_down.bias", KIND_BIAS, {DIM_EMBD}, 0, HAS_FFN_BIAS | ON_DENSE},
    {"blk.%d.ffn_gate_inp.weight", KIND_SMALL, {DIM_EMBD, DIM_EXPERTS}, 6, ON_EXPERTS},
    {"blk.%d.ffn_gate_inp.bias", KIND_BIAS, {DIM_EXPERTS}, 0, HAS_EXPERT_BIAS | ON_EXPERTS},
    {"blk.%d.exp_probs_b.bias", KIND_BIAS, {DIM_EXPERTS}, 0, HAS_CHOICE_BIAS | ON_EXPERTS},
    {"blk.%d.ffn_gate_exps.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF_EXP, DIM_EXPERTS}, 4, ON_EXPERTS},
    {"blk.%d.ffn_up_exps.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF_EXP, DIM_EXPERTS}, 4, ON_EXPERTS},
    {"blk.%d.ffn_down_exps.weight", KIND_MATRIX, {DIM_FF_EXP, DIM_EMBD, DIM_EXPERTS}, 4, ON_EXPERTS},
    {"blk.%d.ffn_gate_exps.bias", KIND_BIAS, {DIM_FF_EXP, DIM_EXPERTS}, 0, HAS_EXPERT_BIAS | ON_EXPERTS},
    {"blk.%d.ffn_up_exps.bias", KIND_BIAS, {DIM_FF_EXP, DIM_EXPERTS}, 0, HAS_EXPERT_BIAS | ON_EXPERTS},
    {"blk.%d.ffn_down_exps.bias", KIND_BIAS, {DIM_EMBD, DIM_EXPERTS}, 0, HAS_EXPERT_BIAS | ON_EXPERTS},
    {"blk.%d.ffn_gate_inp_shexp.weight", KIND_SMALL, {DIM_EMBD}, 4, HAS_SHARED_GATE | ON_EXPERTS},
    {"blk.%d.ffn_gate_shexp.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF_SHARED}, 4, HAS_SHARED | ON_EXPERTS},
    {"blk.%d.ffn_up_shexp.weight", KIND_MATRIX, {DIM_EMBD, DIM_FF_SHARED}, 4, HAS_SHARED | ON_EXPERTS},
    {"blk.%d.ffn_down_shexp.weight", KIND_MATRIX, {DIM_FF_SHARED, DIM_EMBD}, 4, HAS_SHARED | ON_EXPERTS},
    {"blk.%d.post_ffw_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_POST_FFN},
    {"output_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_OUT_NORM},
    {"output_norm.bias", KIND_BIAS, {DIM_EMBD}, 0, HAS_NORM_BIAS},
    {"token_embd_norm.weight", KIND_NORM, {DIM_EMBD}, 0, HAS_EMBD_NORM},
    {"output.weight", KIND_MATRIX, {DIM_EMBD, DIM_VOCAB}, 8, HAS_OUTPUT},
};

/* ==== Options ================================================================================ */

typedef struct {
    uint64_t embd, ff, layers, heads, kv, hd, vocab, ctx, seed, tied, freq_factors, vocab_only;
    uint64_t rot, vd, experts, used, ff_exp, ff_shared, dense, conv, taps, lora, rope_orig;
    uint64_t version, magic, n_tensors, n_kv, alignment, cut;
    const char *rope_base, *rope_scaling, *rope_type, *rope_attn;
    const char *tokenizer, *pre, *arch_name, *truncate, *with, *without, *exps_format;
    const struct mk_arch *arch;
    uint64_t has; /* the architecture's bits and the options' */
    const mk_format *format;
    const char **overrides; /* the kv: and tensor: arguments, as given */
    uint8_t *taken;         /* [n_overrides], to add new keys and refuse misspelt tensors */
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
    {MK_FIELD(rot), OPT_NUMBER},          {MK_FIELD(vd), OPT_NUMBER},
    {MK_FIELD(experts), OPT_NUMBER},      {MK_FIELD(used), OPT_NUMBER},
    {MK_FIELD(ff_exp), OPT_NUMBER},       {MK_FIELD(ff_shared), OPT_NUMBER},
    {MK_FIELD(dense), OPT_NUMBER},        {MK_FIELD(conv), OPT_NUMBER},
    {MK_FIELD(taps), OPT_NUMBER},         {MK_FIELD(lora), OPT_NUMBER},
    {MK_FIELD(rope_orig), OPT_NUMBER},    {MK_FIELD(rope_type), OPT_TEXT},
    {MK_FIELD(rope_attn), OPT_TEXT},      {MK_FIELD(with), OPT_TEXT},
    {MK_FIELD(without), OPT_TEXT},        {MK_FIELD(exps_format), OPT_TEXT},
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
        int binary = equals[1] == '0' && equals[2] == 'b';
        uint64_t v = strtoull(equals + 1 + 2 * binary, &end, binary ? 2 : 0);
        if (*end || end == equals + 1) return mk_complain("not a number", arg);
        memcpy(field, &v, sizeof v);
        return 0;
    }
    return mk_complain("unknown key", arg);
}

/* Reads the numbers of an architecture's row, which are written like arguments. */
static int mk_shape(mk_options *o, const char *words) {
    char word[64];
    for (size_t n; *words; words += n + (words[n] != 0)) {
        n = strcspn(words, " ");
        snprintf(word, sizeof word, "%.*s", (int)n, words);
        if (mk_set(o, word)) return -1;
    }
    return 0;
}

/* Default shapes have all lengths distinct, so that a mistaken one cannot go unnoticed. */
static int mk_defaults(mk_options *o, const char *arch, const char *format) {
    o->format = mk_find_format(format);
    if (!o->format) return mk_complain("unknown format", format);
    for (size_t i = 0; i < sizeof mk_archs / sizeof *mk_archs; i++)
        if (strcmp(mk_archs[i].name, arch) == 0) o->arch = &mk_archs[i];
    if (!o->arch) return mk_complain("unknown architecture", arch);
    int k_format = o->format->elements == 256;
    o->embd = 96, o->ff = 224, o->heads = 4, o->kv = 2, o->layers = 3, o->vocab = 391, o->ctx = 512;
    o->version = 3, o->magic = 0x46554747;
    o->hd = o->rot = o->vd = o->ff_exp = o->n_tensors = o->n_kv = o->alignment = MK_AUTO;
    o->rope_base = "10000", o->rope_type = "linear", o->tokenizer = "spm", o->pre = "gpt-2";
    o->arch_name = arch;
    if (mk_shape(o, o->arch->shape)) return -1;
    if (!k_format) return 0;
    o->embd = 256, o->ff = 768, o->heads = 8;
    if (o->kv == 4) o->kv = 8;
    if (o->lora) o->lora = 256, o->vd = 32;
    if (o->ff_shared) o->ff_shared = 1024;
    return 0;
}

static int mk_feature(mk_options *o, const char *names, int on) {
    for (size_t n; names && *names; names += n + (names[n] != 0)) {
        uint64_t bit = 0;
        n = strcspn(names, ",");
        for (size_t i = 0; i < sizeof mk_features / sizeof *mk_features; i++)
            if (strlen(mk_features[i].name) == n && strncmp(mk_features[i].name, names, n) == 0)
                bit = mk_features[i].bit;
        if (!bit) return mk_complain("unknown feature", names);
        o->has = on ? o->has | bit : o->has & ~bit;
    }
    return 0;
}

/* What follows from the options, once all are known. */
static int mk_resolve(mk_options *o) {
    int k_format = o->format->elements == 256;
    o->has = o->arch->has;
    if (o->hd == MK_AUTO) o->hd = o->has & IS_SQUARE ? o->embd / o->heads : k_format ? 64 : 40;
    if (o->rot == MK_AUTO) o->rot = o->hd;
    if (o->vd == MK_AUTO) o->vd = o->hd;
    if (o->ff_exp == MK_AUTO) o->ff_exp = !(o->has & IS_FF_EXP) ? o->ff : k_format ? 512 : 64;
    if (!o->tied && !(o->has & IS_TIED)) o->has |= HAS_OUTPUT;
    if (o->freq_factors) o->has |= HAS_FREQS;
    if (o->experts) o->has |= HAS_EXPERTS;
    if (o->ff_shared) o->has |= HAS_SHARED;
    if (mk_feature(o, o->without, 0) || mk_feature(o, o->with, 1)) return -1;
    if (!o->heads || o->embd > 1 << 20 || o->layers > 1 << 12)
        return mk_complain("impossible shape", o->arch->name);
    return 0;
}

static uint64_t mk_dim(const mk_options *o, int dim) {
    const uint64_t len[DIM_COUNT] = {
        [DIM_EMBD] = o->embd,
        [DIM_FF] = o->ff,
        [DIM_Q] = o->heads * o->hd,
        [DIM_KV] = o->kv * o->hd,
        [DIM_HEAD] = o->hd,
        [DIM_FREQS] = o->rot / 2,
        [DIM_VOCAB] = o->vocab,
        [DIM_CTX] = o->ctx,
        [DIM_QKV] = (o->heads + 2 * o->kv) * o->hd,
        [DIM_FUSED_UP] = 2 * o->ff,
        [DIM_HEADS] = o->heads,
        [DIM_KV_HEADS] = o->kv,
        [DIM_EXPERTS] = o->experts,
        [DIM_FF_EXP] = o->ff_exp,
        [DIM_FF_SHARED] = o->ff_shared,
        [DIM_TAPS] = o->taps,
        [DIM_CONV_IN] = 3 * o->embd,
        [DIM_LATENT] = o->lora,
        [DIM_LATENT_IN] = o->lora + o->rot,
        [DIM_LATENT_KV] = o->heads * (o->hd - o->rot + o->vd),
        [DIM_NOPE] = o->hd - o->rot,
        [DIM_VALUE] = o->vd,
        [DIM_ATTN_OUT] = o->heads * o->vd,
    };
    return len[dim];
}

/* An override is PREFIX NAME SUFFIX = VALUE; gives VALUE, or NULL where there is none. */
static const char *mk_override(mk_options *o, const char *prefix, const char *name,
                               const char *suffix) {
    char want[512];
    int n = snprintf(want, sizeof want, "%s%s%s=", prefix, name, suffix);
    for (size_t i = 0; i < o->n_overrides; i++) {
        if (strncmp(o->overrides[i], want, (size_t)n) != 0) continue;
        o->taken[i] = 1;
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

/* Convolution layers have no key heads, so with them the key holds an array. */
static void mk_kv_heads(mk_meta *m) {
    mk_options *o = m->o;
    mk_buf list = {0};
    const char *key = mk_arch_key(o, "attention.head_count_kv");
    if (!o->conv) {
        mk_kv_u32(m, key, o->has & HAS_LATENT_HEADS ? 1 : o->kv);
        return;
    }
    for (uint64_t i = 0; i < o->layers; i++) mk_int(&list, i < 64 && o->conv >> i & 1 ? 0 : o->kv, 4);
    mk_kv_array(m, key, V_I32, o->layers, &list);
    free(list.data);
}

/* The keys of the architecture's row. */
static void mk_arch_keys(mk_meta *m) {
    char word[96];
    const char *words = m->o->arch->keys;
    for (size_t n; *words; words += n + (words[n] != 0)) {
        n = strcspn(words, " ");
        snprintf(word, sizeof word, "%.*s", (int)n, words);
        char *value = strchr(word, '=');
        *value = 0;
        mk_kv(m, mk_arch_key(m->o, word), value + 1);
    }
}

static void mk_rope_keys(mk_meta *m) {
    mk_options *o = m->o;
    if (o->has & HAS_POSITIONS) return;
    mk_kv_text(m, mk_arch_key(o, "rope.freq_base"), V_F32, o->rope_base);
    if (o->rope_scaling || strcmp(o->rope_type, "linear") != 0)
        mk_kv_text(m, mk_arch_key(o, "rope.scaling.type"), V_STR, o->rope_type);
    if (o->rope_scaling)
        mk_kv_text(m, mk_arch_key(o, "rope.scaling.factor"), V_F32, o->rope_scaling);
    if (o->rope_orig) mk_kv_u32(m, mk_arch_key(o, "rope.scaling.original_context_length"), o->rope_orig);
    if (o->rope_attn) mk_kv_text(m, mk_arch_key(o, "rope.scaling.attn_factor"), V_F32, o->rope_attn);
}

static void mk_numbers(mk_meta *m) {
    mk_options *o = m->o;
    int latent_heads = (o->has & HAS_LATENT_HEADS) != 0;
    const struct {
        const char *key;
        uint64_t value, need; /* bits of o->has */
    } numbers[] = {
        {"block_count", o->layers, 0},
        {"context_length", o->ctx, 0},
        {"embedding_length", o->embd, 0},
        {"feed_forward_length", o->ff, 0},
        {"attention.head_count", o->heads, 0},
        {NULL, 0, 0}, /* attention.head_count_kv */
        {"attention.key_length", latent_heads ? o->lora + o->rot : o->hd, 0},
        {"attention.value_length", latent_heads ? o->lora : o->vd, 0},
        {"rope.dimension_count", o->rot, 0},
        {"vocab_size", o->vocab, 0},
        {"attention.key_length_mla", o->hd, HAS_LATENT_HEADS},
        {"attention.value_length_mla", o->vd, HAS_LATENT_HEADS},
        {"attention.kv_lora_rank", o->lora, o->lora ? 0 : MK_BIT(63)},
        {"expert_count", o->experts, HAS_EXPERTS},
        {"expert_used_count", o->used, HAS_EXPERTS},
        {"expert_feed_forward_length", o->ff_exp, HAS_EXPERTS | IS_FF_EXP},
        {"expert_shared_feed_forward_length", o->ff_shared, HAS_SHARED},
        {"leading_dense_block_count", o->dense, o->dense ? 0 : MK_BIT(63)},
        {"shortconv.l_cache", o->taps, o->conv ? 0 : MK_BIT(63)},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if ((numbers[i].need & o->has) != numbers[i].need) continue;
        if (numbers[i].key) mk_kv_u32(m, mk_arch_key(o, numbers[i].key), numbers[i].value);
        else mk_kv_heads(m);
    }
}

static void mk_metadata(mk_meta *m) {
    mk_options *o = m->o;
    mk_kv_text(m, "general.architecture", V_STR, o->arch_name);
    mk_kv(m, "general.name", "str:random");
    mk_kv_u32(m, "general.file_type", o->format->ftype);
    mk_kv(m, "general.quantization_version", "u32:2");
    if (o->alignment != MK_AUTO) mk_kv_u32(m, "general.alignment", o->alignment);
    mk_numbers(m);
    mk_kv(m, mk_arch_key(o, o->has & IS_LAYERNORM ? "attention.layer_norm_epsilon" : "attention.layer_norm_rms_epsilon"),
          "f32:1e-5");
    mk_rope_keys(m);
    mk_arch_keys(m);
    if (strcmp(o->tokenizer, "bpe") == 0) mk_vocab_bpe(m);
    else mk_vocab_spm(m);
    for (size_t i = 0; i < o->n_overrides; i++) {
        const char *key = o->overrides[i] + 3;
        size_t n = strcspn(key, "=");
        if (o->taken[i] || strncmp(key - 3, "kv:", 3) != 0) continue;
        o->taken[i] = 1;
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
    uint64_t dim[3]; /* dim[1] and dim[2] are 1 where the row has none */
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
    if (!format && o->exps_format && strstr(t->name, "_exps.weight")) format = o->exps_format;
    if (format && !(t->format = mk_find_format(format)))
        return mk_complain("unknown format", format);
    for (int d = 0; d < 3; d++) t->dim[d] = row->dim[d] ? mk_dim(o, row->dim[d]) : 1;
    /* Rows too short for a K format become Q8_0; quantisers choose another format too. */
    if (!format && t->format->elements == 256 && t->dim[0] % 256) t->format = mk_find_format("q8_0");
    if (t->dim[0] % t->format->elements)
        return mk_complain("rows do not divide into blocks", t->name);
    t->bytes = t->dim[0] / t->format->elements * t->format->bytes * t->dim[1] * t->dim[2];
    t->offset = ts->data_bytes;
    ts->data_bytes += (t->bytes + ts->alignment - 1) / ts->alignment * ts->alignment;
    ts->n++;
    return 0;
}

/* The bits of one layer (or of what stands outside of layers, where all rows need none of them). */
static uint64_t mk_layer_has(const mk_options *o, uint64_t layer) {
    uint64_t ffn = o->experts && layer >= o->dense ? ON_EXPERTS : ON_DENSE;
    return o->has | ffn | (layer < 64 && o->conv >> layer & 1 ? ON_CONV : ON_ATTENTION);
}

/* Rows that share the "blk." prefix are written layer by layer. */
static int mk_list_tensors(mk_options *o, mk_tensors *ts) {
    size_t n_rows = sizeof mk_rows / sizeof *mk_rows;
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
                if (!(mk_rows[i].need & ~mk_layer_has(o, layer)) &&
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
    uint64_t n_dims = t->row->dim[2] ? 3 : t->row->dim[1] ? 2 : 1;
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

/* Norms lie within a quarter of 1, biases within half of 0 or their range, frequency factors go
 * up from 1. */
static float mk_vector_value(uint64_t *rng, const mk_tensor *t, uint64_t i) {
    int32_t r = (int32_t)(mk_random(rng) >> 43) - (1 << 20);
    if (t->row->kind == KIND_NORM) return mk_fixed22((1 << 22) + r);
    int gain4 = t->row->gain4;
    if (t->row->kind == KIND_BIAS) return mk_fixed22(gain4 ? gain4 / 2 * r : 2 * r);
    uint64_t last = t->dim[0] > 1 ? t->dim[0] - 1 : 1;
    return mk_fixed22((int32_t)(65536 + (uint64_t)gain4 * 16384 * i / last)) * 64.0f;
}

static void mk_tensor_row(uint64_t *rng, const mk_tensor *t, uint8_t *out) {
    const mk_format *f = t->format;
    int64_t std28 = (int64_t)mk_isqrt((1ull << 56) / t->dim[0]) * t->row->gain4 / 4;
    for (uint64_t i = 0; i < t->dim[0] / f->elements; i++, out += f->bytes) {
        if (t->row->kind <= KIND_SMALL) f->fill(rng, out, std28);
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
        uint64_t n_rows = t->dim[1] * t->dim[2], row_bytes = t->bytes / (n_rows ? n_rows : 1);
        uint8_t *row = malloc((size_t)row_bytes + 1);
        if (!row) {
            out->failed = 1;
            return;
        }
        for (uint64_t r = 0; r < n_rows && out->room; r++) {
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
            if (!o->taken[i]) failed = mk_complain("names nothing in this model", o->overrides[i]);
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
    o.taken = calloc((size_t)n_args, 1);
    if (!o.overrides || !o.taken) {
        mk_complain("out of memory", "arguments");
    } else if ((failed = mk_defaults(&o, args[0], args[1])) == 0) {
        for (int i = 3; i < n_args && !failed; i++) failed = mk_set(&o, args[i]);
        uint64_t least = strcmp(o.tokenizer, "bpe") == 0 ? N_BPE_FIXED + N_BPE_SPECIAL : 3;
        if (!failed) failed = mk_resolve(&o);
        if (!failed && o.vocab < least) failed = mk_complain("vocab is too small", args[2]);
        if (!failed) failed = mk_build(&o, args[2]);
    }
    free(o.overrides), free(o.taken);
    return failed;
}

#ifndef MKMODEL_NO_MAIN
int main(int argc, char **argv) {
    return mkmodel_write(argc - 1, (const char **)(argv + 1)) ? 1 : 0;
}
#endif
