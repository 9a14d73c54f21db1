/* SPDX-License-Identifier: MIT
 *
 * badgguf: malformed and unsupported model files must be refused by `lorch inspect` with exit
 * status 1 and one line on stderr, quickly and in little memory; or, where a safe default
 * exists, be accepted.  Never may a file end the program by a signal.
 *
 *   cc -std=c99 -O1 tests/badgguf.c -o badgguf && LORCH=./lorch ./badgguf [NAME-PART ...]
 *
 * The cases are inputs that have broken other readers; CVE numbers and issues are in the names.
 */
#include "spawn.h"

#define MKMODEL_NO_MAIN
#include "mkmodel.c"

/* What is expected of a file. */
enum { REFUSE, SURVIVE, ACCEPT };

enum {
    MAX_SECONDS = 10,           /* under sanitizers on a busy machine; usually milliseconds */
    MAX_RSS_KB = 300 * 1024,    /* sanitizers need most of it; files here are below 200 KiB */
    SMALL_FILE = 8192
};

/* ==== Files written byte by byte ============================================================= */

/* A file is words: GGUF (the magic), u1:N u4:N u8:N (little-endian), s:TEXT (length, bytes),
 * x:HEX, z:N (zeros), arch (the key general.architecture = llama). */
static const struct raw_case {
    const char *name, *file, *phrase; /* phrase: what stderr must name, or NULL */
    int want;
} raw_cases[] = {
    {"empty file", "", NULL, REFUSE},
    {"one byte", "x:47", NULL, REFUSE},
    {"magic alone, CVE-2024-39720", "GGUF", NULL, REFUSE},
    {"wrong magic", "x:47474d4c u4:3 u8:0 u8:0", NULL, REFUSE},
    {"version 0", "GGUF u4:0 u8:0 u8:0", "version", REFUSE},
    {"version 1", "GGUF u4:1 u4:0 u4:0", "version", REFUSE},
    {"version 4", "GGUF u4:4 u8:0 u8:0", "version", REFUSE},
    {"big-endian file", "GGUF x:00000003 x:0000000000000000 x:0000000000000000", "endian", REFUSE},
    {"header without counts", "GGUF u4:3", NULL, REFUSE},
    {"no metadata, no tensors, CVE-2025-0312", "GGUF u4:3 u8:0 u8:0", NULL, REFUSE},
    {"array of 2^60 strings, CVE-2024-21825",
     "GGUF u4:3 u8:0 u8:1 s:a u4:9 u4:8 u8:0x1000000000000000", NULL, REFUSE},
    {"array of 2^62 u32, CVE-2024-21825",
     "GGUF u4:3 u8:0 u8:1 s:a u4:9 u4:4 u8:0x4000000000000000", NULL, REFUSE},
    {"array of 2^61 f64, CVE-2024-21825",
     "GGUF u4:3 u8:0 u8:1 s:a u4:9 u4:12 u8:0x2000000000000000", NULL, REFUSE},
    {"array of 2^30 bytes in a small file, ggml#1516",
     "GGUF u4:3 u8:0 u8:1 s:a u4:9 u4:0 u8:0x40000000 z:64", NULL, REFUSE},
    {"array longer than the file by one, CVE-2025-66959",
     "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:4 u8:5 z:16", NULL, REFUSE},
    {"string of 2^64-1 bytes, CVE-2024-23496",
     "GGUF u4:3 u8:0 u8:1 s:a u4:8 u8:0xFFFFFFFFFFFFFFFF z:32", NULL, REFUSE},
    {"string of 2^63 bytes, gguf-parser-go#20",
     "GGUF u4:3 u8:0 u8:1 s:a u4:8 u8:0x8000000000000000 z:32", NULL, REFUSE},
    {"string of 2^40 bytes, CVE-2025-0315",
     "GGUF u4:3 u8:0 u8:1 s:a u4:8 u8:0x10000000000 z:32", NULL, REFUSE},
    {"string of 1 GiB, ggml#1516", "GGUF u4:3 u8:0 u8:1 s:a u4:8 u8:0x40000000 z:99", NULL,
     REFUSE},
    {"string longer than the file by one", "GGUF u4:3 u8:0 u8:1 s:a u4:8 u8:9 z:8", NULL, REFUSE},
    {"key of 2^64-1 bytes", "GGUF u4:3 u8:0 u8:1 u8:0xFFFFFFFFFFFFFFFF z:32", NULL, REFUSE},
    {"key length 0x246554747, llama.cpp#19003", "GGUF u4:3 u8:0 u8:1 u8:0x246554747 z:32", NULL,
     REFUSE},
    {"key of length 0, llama.cpp#24263", "GGUF u4:3 u8:0 u8:2 arch u8:0 u4:4 u4:1", NULL, REFUSE},
    {"2^64-1 tensors, CVE-2024-21836", "GGUF u4:3 u8:0xFFFFFFFFFFFFFFFF u8:1 arch z:64", NULL,
     REFUSE},
    {"tensor count that wraps, CVE-2024-21836", "GGUF u4:3 u8:0x0666666666666667 u8:1 arch z:64",
     NULL, REFUSE},
    {"tensor count that wraps by overhead, llama.cpp#15711",
     "GGUF u4:3 u8:0x00B21642C8590B22 u8:1 arch z:64", NULL, REFUSE},
    {"2^64-1 keys, CVE-2024-23605", "GGUF u4:3 u8:0 u8:0xFFFFFFFFFFFFFFFF arch z:64", NULL, REFUSE},
    {"key count that wraps, CVE-2024-23605", "GGUF u4:3 u8:0 u8:0x0400000000000001 arch z:64",
     NULL, REFUSE},
    {"a later key is broken, CVE-2024-32878", "GGUF u4:3 u8:0 u8:9 arch s:b u4:9 u4:8 u8:4 s:x s:y",
     NULL, REFUSE},
    {"more keys than bytes", "GGUF u4:3 u8:0 u8:3 arch", NULL, REFUSE},
    {"value type 13, cdxgen#4119", "GGUF u4:3 u8:0 u8:2 arch s:a u4:13 z:32", NULL, REFUSE},
    {"value type 2^32-1", "GGUF u4:3 u8:0 u8:2 arch s:a u4:0xFFFFFFFF z:32", NULL, REFUSE},
    {"array of type 99, sparkinfer#5", "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:99 u8:4 z:32", NULL,
     REFUSE},
    {"array of 2^60 of type 99, imp#532",
     "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:99 u8:0x1000000000000000 z:32", NULL, REFUSE},
    {"arrays within arrays, huggingface.js#2028",
     "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:9 u8:1 u4:9 u8:1 u4:9 u8:1 u4:4 u8:1 u4:7", NULL,
     REFUSE},
    {"2^32 empty arrays within an array",
     "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:9 u8:0x100000000 z:64", NULL, REFUSE},
    {"2^32 empty strings in a small file",
     "GGUF u4:3 u8:0 u8:2 arch s:a u4:9 u4:8 u8:0x100000000 z:64", NULL, REFUSE},
    {"alignment 0, CVE-2025-0317, candle#3876",
     "GGUF u4:3 u8:0 u8:1 s:general.alignment u4:4 u4:0", NULL, REFUSE},
    {"architecture is a number", "GGUF u4:3 u8:0 u8:1 s:general.architecture u4:4 u4:7", NULL,
     REFUSE},
    {"architecture is empty", "GGUF u4:3 u8:0 u8:1 s:general.architecture u4:8 u8:0", NULL,
     REFUSE},
    {"architecture is not UTF-8", "GGUF u4:3 u8:0 u8:1 s:general.architecture u4:8 u8:2 x:fffe",
     NULL, REFUSE},
    {"architecture with a line feed",
     "GGUF u4:3 u8:0 u8:1 s:general.architecture u4:8 u8:3 x:610a62", NULL, REFUSE},
    {"n_dims 5, CVE-2024-21802",
     "GGUF u4:3 u8:1 u8:1 arch s:t u4:5 u8:1 u8:1 u8:1 u8:1 u8:1 u4:0 u8:0 z:64", NULL, REFUSE},
    {"n_dims 10^6, llama.cpp#25378", "GGUF u4:3 u8:1 u8:1 arch s:t u4:1000000 z:99", NULL, REFUSE},
    {"n_dims 2^32-1", "GGUF u4:3 u8:1 u8:1 arch s:t u4:0xFFFFFFFF z:99", NULL, REFUSE},
    {"tensor name past the end", "GGUF u4:3 u8:1 u8:1 arch u8:0xFFFFFFFFFFFFFFF0 z:99", NULL,
     REFUSE},
    {"two I8 tensors of 0x7FFFFFFFFFFFFFC0, CVE-2026-27940",
     "GGUF u4:3 u8:2 u8:1 arch s:t u4:1 u8:0x7FFFFFFFFFFFFFC0 u4:24 u8:0 "
     "s:u u4:1 u8:0x7FFFFFFFFFFFFFC0 u4:24 u8:0x7FFFFFFFFFFFFFC0 z:99",
     NULL, REFUSE},
    {"sum of tensor sizes wraps, CVE-2025-53630",
     "GGUF u4:3 u8:2 u8:1 arch s:t u4:1 u8:0x3FFFFFFFFFFFFFF0 u4:0 u8:0 "
     "s:u u4:1 u8:16 u4:0 u8:0xFFFFFFFFFFFFFFC0 z:99",
     NULL, REFUSE},
};

typedef struct {
    uint8_t data[SMALL_FILE];
    size_t len;
} small_file;

static void add_int(small_file *f, uint64_t v, size_t bytes) {
    for (size_t i = 0; i < bytes && f->len < sizeof f->data; i++)
        f->data[f->len++] = (uint8_t)(v >> 8 * i);
}

static void add_bytes(small_file *f, const char *p, size_t n) {
    while (n-- > 0) add_int(f, (uint8_t)*p++, 1);
}

static void add_string(small_file *f, const char *s) {
    add_int(f, strlen(s), 8);
    add_bytes(f, s, strlen(s));
}

static void add_word(small_file *f, const char *w) {
    uint64_t number = strtoull(w + strcspn(w, ":") + (strchr(w, ':') != NULL), NULL, 0);
    if (strcmp(w, "GGUF") == 0) {
        add_bytes(f, "GGUF", 4);
    } else if (strcmp(w, "arch") == 0) {
        add_string(f, "general.architecture");
        add_int(f, 8, 4);
        add_string(f, "llama");
    } else if (w[0] == 'u') {
        add_int(f, number, (size_t)(w[1] - '0'));
    } else if (w[0] == 's') {
        add_string(f, w + 2);
    } else if (w[0] == 'z') {
        while (number-- > 0) add_int(f, 0, 1);
    } else if (w[0] == 'x') {
        for (char hex[3] = {0}; w[2] && w[3]; w += 2) {
            memcpy(hex, w + 2, 2);
            add_int(f, strtoull(hex, NULL, 16), 1);
        }
    }
}

static void write_raw(const char *path, const char *words) {
    small_file f = {{0}, 0};
    char copy[2000];
    snprintf(copy, sizeof copy, "%s", words);
    for (char *w = strtok(copy, " "); w; w = strtok(NULL, " ")) add_word(&f, w);
    write_whole(path, f.data, f.len);
}

/* ==== Files that mkmodel makes =============================================================== */

/* Small, and of 3 tokens where the vocabulary does not matter. */
#define SMALL "layers=2 embd=32 ff=64 heads=2 kv=1 hd=16 ctx=64 vocab=300 "
#define TINY "layers=1 embd=32 ff=64 heads=2 kv=1 hd=16 ctx=64 vocab=3 "
#define ALL_F32 "llama f32 " SMALL
#define UP "tensor:blk.0.ffn_up.weight:"

static const struct made_case {
    const char *name, *make, *phrase;
    int want;
} made_cases[] = {
    /* The good files first: were these refused, the refusals below would prove nothing. */
    {"a good file", ALL_F32, NULL, ACCEPT},
    {"a good file of version 2", ALL_F32 "version=2", NULL, ACCEPT},
    {"a good file of 3 tokens", "llama f32 " TINY, NULL, ACCEPT},
    {"a good file aligned to 64", ALL_F32 "alignment=64", NULL, ACCEPT},
    {"a good file of mixed formats", "llama q8_0 " SMALL UP "format=q4_0", NULL, ACCEPT},
    {"a good vocabulary without tensors", ALL_F32 "vocab_only=1", NULL, ACCEPT},
    {"an unknown key of every type", ALL_F32
     "kv:x.a=u8:1 kv:x.b=i8:-1 kv:x.c=u16:1 kv:x.d=i16:-1 kv:x.e=f64:1.5 kv:x.f=u64:1 "
     "kv:x.g=i64:-1 kv:x.h=[str]:a,b kv:x.i=[f64]:1,2 kv:x.j=[bool]:0,1 kv:x.k=[u16]:",
     NULL, ACCEPT},

    {"architecture mamba", ALL_F32 "arch=mamba",
     "architecture 'mamba' is not supported: it needs state-space layers; supported: ", REFUSE},
    {"no architecture", ALL_F32 "kv:general.architecture=none", NULL, REFUSE},
    {"tensor of type IQ1_S",
     "llama f32 layers=4 embd=256 ff=64 heads=2 kv=1 hd=16 vocab=300 "
     "tensor:blk.3.ffn_up.weight:type=19",
     "tensor blk.3.ffn_up.weight is IQ1_S, which is not supported; supported: ", REFUSE},
    {"tensor of type IQ2_XXS", "llama f32 embd=256 layers=1 " UP "type=16",
     "tensor blk.0.ffn_up.weight is IQ2_XXS, which is not supported; supported: ", REFUSE},
    {"tensor of removed type 4, llama.cpp#8816", ALL_F32 UP "type=4", "blk.0.ffn_up.weight",
     REFUSE},
    {"tensor of removed type 31", ALL_F32 UP "type=31", "blk.0.ffn_up.weight", REFUSE},
    {"tensor of removed type 37", ALL_F32 UP "type=37", "blk.0.ffn_up.weight", REFUSE},
    {"tensor of type 1000", ALL_F32 UP "type=1000", "blk.0.ffn_up.weight", REFUSE},
    {"tensor of type -1, llama.cpp#19856", ALL_F32 UP "type=0xFFFFFFFF", "blk.0.ffn_up.weight",
     REFUSE},
    {"tensor of type -2^31", ALL_F32 UP "type=0x80000000", "blk.0.ffn_up.weight", REFUSE},
    {"weights of type I32", ALL_F32 UP "type=26", "blk.0.ffn_up.weight", REFUSE},
    {"split file", ALL_F32 "kv:split.count=u16:2 kv:split.no=u16:0", "split", REFUSE},
    {"split file of one part", ALL_F32 "kv:split.count=u16:1 kv:split.no=u16:0", NULL, ACCEPT},
    {"unknown tokenizer", ALL_F32 "kv:tokenizer.ggml.model=str:t5", "t5", REFUSE},
    {"unknown pre-tokenizer", "llama f32 tokenizer=bpe pre=nonsense", "nonsense", REFUSE},

    {"dims [4, 0], llama.cpp#24263", ALL_F32 UP "dims=4,0", NULL, REFUSE},
    {"dims [0, 4]", ALL_F32 UP "dims=0,4", NULL, REFUSE},
    {"no dims", ALL_F32 UP "n_dims=0", NULL, REFUSE},
    {"dims transposed", ALL_F32 UP "dims=64,32", "blk.0.ffn_up.weight", REFUSE},
    {"one dim too few", ALL_F32 UP "dims=2048", "blk.0.ffn_up.weight", REFUSE},
    {"third dim of 2", ALL_F32 UP "dims=32,64,2", "blk.0.ffn_up.weight", REFUSE},
    {"dims of 2^64-1", ALL_F32 UP "dims=0xFFFFFFFFFFFFFFFF,0xFFFFFFFFFFFFFFFF", NULL, REFUSE},
    {"dims of 2^63-1", ALL_F32 UP "dims=0x7FFFFFFFFFFFFFFF,0x7FFFFFFFFFFFFFFF", NULL, REFUSE},
    {"dim 1 of 2^42+1, CVE-2026-33298", ALL_F32 UP "dims=1048576,4398046511105", NULL, REFUSE},
    {"F32 of SIZE_MAX/4, llama.cpp#24759", ALL_F32 UP "dims=0x3FFFFFFFFFFFFFFF", NULL, REFUSE},
    {"I8 of INT64_MAX x 2, llama.cpp#27203",
     ALL_F32 UP "dims=0x7FFFFFFFFFFFFFFF,2,1,1 " UP "type=24", NULL, REFUSE},
    {"Q4_0 of 5124095576030431008, llama.cpp#27200",
     ALL_F32 UP "dims=5124095576030431008 " UP "type=2", NULL, REFUSE},
    {"dims whose product wraps to 4, llama.cpp#25378",
     ALL_F32 UP "dims=4194305,4194305,211106198978564", NULL, REFUSE},
    {"rows that blocks do not divide", "llama q8_0 " SMALL "tensor:blk.0.attn_k.weight:dims=16,32",
     NULL, REFUSE},
    {"plausible dims past the end", ALL_F32 "tensor:token_embd.weight:dims=32,200000", NULL,
     REFUSE},
    {"norm of the wrong length", ALL_F32 "tensor:output_norm.weight:dims=16", "output_norm.weight",
     REFUSE},

    {"offset past the end, CVE-2026-7482", ALL_F32 UP "offset=0x100000", NULL, REFUSE},
    {"offset of 2^64-32", ALL_F32 UP "offset=0xFFFFFFFFFFFFFFE0", NULL, REFUSE},
    {"offset of 2^63", ALL_F32 UP "offset=0x8000000000000000", NULL, REFUSE},
    {"offset not aligned", ALL_F32 UP "offset=33", NULL, REFUSE},
    {"tensors overlap", ALL_F32 UP "offset=0", NULL, SURVIVE},
    {"file ends one byte early", ALL_F32 "cut=1", NULL, REFUSE},
    {"file ends 4096 bytes early", ALL_F32 "cut=4096", NULL, REFUSE},
    {"file ends after the headers, hrx-system#278", ALL_F32 "truncate=infos", NULL, REFUSE},
    {"file ends within the headers", ALL_F32 "truncate=infos cut=7", NULL, REFUSE},
    {"fewer tensors declared than there are", ALL_F32 "n_tensors=1", NULL, REFUSE},
    {"more keys declared than there are", ALL_F32 "n_kv=60", NULL, REFUSE},
    {"fewer keys declared than there are", ALL_F32 "n_kv=1", NULL, REFUSE},
    {"no tensors", ALL_F32 "n_tensors=0 truncate=infos", NULL, SURVIVE},

    {"two keys of one name", ALL_F32 "kv:llama.block_count=u32:2 kv:llama.block_count=u32:9", NULL,
     REFUSE},
    {"two tensors of one name", ALL_F32 "tensor:blk.1.ffn_up.weight:name=blk.0.ffn_up.weight", NULL,
     REFUSE},
    {"tensor without a name", ALL_F32 UP "name=", NULL, REFUSE},
    {"tensor missing", ALL_F32 UP "skip=1", "blk.0.ffn_up.weight", REFUSE},
    {"embeddings missing", ALL_F32 "tensor:token_embd.weight:skip=1", "token_embd.weight", REFUSE},
    {"last norm missing", ALL_F32 "tensor:output_norm.weight:skip=1", "output_norm.weight", REFUSE},

    {"alignment 2^30, ggml#1516", ALL_F32 "alignment=0x40000000", NULL, REFUSE},
    {"alignment 2^31, llama.cpp#24997", ALL_F32 "alignment=0x80000000", NULL, REFUSE},
    {"alignment 24", ALL_F32 "kv:general.alignment=u32:24", NULL, REFUSE},
    {"alignment 0 in a whole file", ALL_F32 "alignment=0", NULL, REFUSE},
    {"alignment of type INT32, llama.cpp#25596", ALL_F32 "kv:general.alignment=i32:32", NULL,
     SURVIVE},
    {"alignment of type STRING", ALL_F32 "kv:general.alignment=str:32", NULL, REFUSE},

    {"block_count 0", ALL_F32 "kv:llama.block_count=u32:0", "block_count", REFUSE},
    {"block_count 3 of 2", ALL_F32 "kv:llama.block_count=u32:3", "blk.2.", REFUSE},
    {"block_count 513, llama.cpp#25821", ALL_F32 "kv:llama.block_count=u32:513", NULL, REFUSE},
    {"block_count 2^32-1, 1bit-MONSTER#694", ALL_F32 "kv:llama.block_count=u32:0xFFFFFFFF", NULL,
     REFUSE},
    {"block_count missing", ALL_F32 "kv:llama.block_count=none", "block_count", REFUSE},
    {"block_count is a string", ALL_F32 "kv:llama.block_count=str:2", "block_count", REFUSE},
    {"block_count is negative", ALL_F32 "kv:llama.block_count=i32:-1", "block_count", REFUSE},
    {"head_count 0, 1bit-MONSTER#455", ALL_F32 "kv:llama.attention.head_count=u32:0", "head_count",
     REFUSE},
    {"head_count_kv 0", ALL_F32 "kv:llama.attention.head_count_kv=u32:0", "head_count_kv", REFUSE},
    {"head_count 2^31", ALL_F32 "kv:llama.attention.head_count=u32:0x80000000", NULL, REFUSE},
    {"head_count_kv does not divide head_count",
     "llama f32 layers=1 heads=4 kv=3 hd=16 embd=64 vocab=300", NULL, REFUSE},
    {"head_count is an array of strings", ALL_F32 "kv:llama.attention.head_count=[str]:a,b", NULL,
     REFUSE},
    {"head_count_kv is an array of bytes, llama.cpp#26690",
     ALL_F32 "kv:llama.attention.head_count_kv=[u8]:1", NULL, REFUSE},
    {"embedding_length 0", ALL_F32 "kv:llama.embedding_length=u32:0", "embedding_length", REFUSE},
    {"embedding_length 2^32-1", ALL_F32 "kv:llama.embedding_length=u32:0xFFFFFFFF", NULL, REFUSE},
    {"feed_forward_length 0", ALL_F32 "kv:llama.feed_forward_length=u32:0", NULL, REFUSE},
    {"context_length 0", ALL_F32 "kv:llama.context_length=u32:0", NULL, REFUSE},
    {"context_length 2^32-1", ALL_F32 "kv:llama.context_length=u32:0xFFFFFFFF", NULL, SURVIVE},
    {"key_length 0", ALL_F32 "kv:llama.attention.key_length=u32:0", NULL, REFUSE},
    {"key_length 2^32-1", ALL_F32 "kv:llama.attention.key_length=u32:0xFFFFFFFF", NULL, REFUSE},
    {"odd rope.dimension_count", ALL_F32 "kv:llama.rope.dimension_count=u32:15", NULL, REFUSE},
    {"rope.dimension_count above the head", ALL_F32 "kv:llama.rope.dimension_count=u32:18", NULL,
     REFUSE},
    {"epsilon is not a number", ALL_F32 "kv:llama.attention.layer_norm_rms_epsilon=f32:nan", NULL,
     REFUSE},
    {"rope.freq_base 0", ALL_F32 "kv:llama.rope.freq_base=f32:0", NULL, REFUSE},
    {"rope.scaling.factor 0",
     ALL_F32 "kv:llama.rope.scaling.type=str:linear kv:llama.rope.scaling.factor=f32:0", NULL,
     SURVIVE},
    {"rope_freqs of the wrong length",
     ALL_F32 "freq_factors=1 tensor:rope_freqs.weight:dims=4", "rope_freqs.weight", REFUSE},

    {"tokens missing", ALL_F32 "kv:tokenizer.ggml.tokens=none", "tokenizer.ggml.tokens", REFUSE},
    {"tokens is a string, llama.cpp#26690", ALL_F32 "kv:tokenizer.ggml.tokens=str:a",
     "tokenizer.ggml.tokens", REFUSE},
    {"tokens is an array of numbers", ALL_F32 "kv:tokenizer.ggml.tokens=[u32]:1,2,3",
     "tokenizer.ggml.tokens", REFUSE},
    {"no tokens", ALL_F32 "kv:tokenizer.ggml.tokens=[str]:", NULL, REFUSE},
    {"fewer tokens than embeddings", ALL_F32 "kv:tokenizer.ggml.tokens=[str]:a,b,c", NULL, REFUSE},
    {"scores of type UINT8, llama.cpp#26690",
     "llama f32 " TINY "kv:tokenizer.ggml.scores=[u8]:1,2,3", "tokenizer.ggml.scores", REFUSE},
    {"too few scores", "llama f32 " TINY "kv:tokenizer.ggml.scores=[f32]:1,2",
     "tokenizer.ggml.scores", REFUSE},
    {"token types of type UINT8", "llama f32 " TINY "kv:tokenizer.ggml.token_type=[u8]:2,3,3",
     "tokenizer.ggml.token_type", REFUSE},
    {"too few token types", "llama f32 " TINY "kv:tokenizer.ggml.token_type=[i32]:2,3",
     "tokenizer.ggml.token_type", REFUSE},
    {"token types out of range", "llama f32 " TINY "kv:tokenizer.ggml.token_type=[i32]:-1,99,7",
     NULL, SURVIVE},
    {"scores that are not numbers", "llama f32 " TINY "kv:tokenizer.ggml.scores=[f32]:nan,inf,-inf",
     NULL, SURVIVE},
    {"bos token past the vocabulary, llama.cpp#26506",
     ALL_F32 "kv:tokenizer.ggml.bos_token_id=u32:300", NULL, SURVIVE},
    {"eos token 2^32-1", ALL_F32 "kv:tokenizer.ggml.eos_token_id=u32:0xFFFFFFFF", NULL, ACCEPT},
    {"eos token is a string", ALL_F32 "kv:tokenizer.ggml.eos_token_id=str:x", NULL, SURVIVE},
    {"built-in token ids past a tiny vocabulary",
     "llama f32 " TINY "kv:tokenizer.ggml.bos_token_id=none kv:tokenizer.ggml.eos_token_id=none "
     "kv:tokenizer.ggml.unknown_token_id=none",
     NULL, SURVIVE},
    {"byte tokens <0x-1> and <0xZZ>, llama.cpp#25969",
     "llama f32 " TINY "kv:tokenizer.ggml.tokens=[str]:<unk>,<0x-1>,<0xZZ> "
     "kv:tokenizer.ggml.token_type=[i32]:2,6,6",
     NULL, SURVIVE},
    {"empty tokens", "llama f32 " TINY "kv:tokenizer.ggml.tokens=[str]:,,", NULL, SURVIVE},
    {"tokens that are all the same", "llama f32 " TINY "kv:tokenizer.ggml.tokens=[str]:a,a,a", NULL,
     SURVIVE},
    {"merges without a space", "llama f32 tokenizer=bpe kv:tokenizer.ggml.merges=[str]:ab,c", NULL,
     SURVIVE},
    {"merges of unknown tokens", "llama f32 tokenizer=bpe kv:tokenizer.ggml.merges=raw:9:08000000"
     "0100000000000000" "0300000000000000" "7a207a",
     NULL, SURVIVE},
    {"merges is an array of numbers", "llama f32 tokenizer=bpe kv:tokenizer.ggml.merges=[u32]:1",
     "tokenizer.ggml.merges", REFUSE},
    {"chat template is a number", ALL_F32 "kv:tokenizer.chat_template=u32:1", NULL, SURVIVE},
    {"chat template of open brackets, llama.cpp#26387",
     ALL_F32 "kv:tokenizer.chat_template=str:{{((((((((((((((((((((((((((((((((((((((((((((", NULL,
     SURVIVE},
};

/* ==== Judging ================================================================================ */

static int count_lines(const char *s) {
    int n = 0;
    for (; *s; s++) n += *s == '\n' || s[1] == 0;
    return n;
}

/* Gives what is wrong with lorch's answer to a file, or NULL. */
static const char *judge(const run_result *r, int want, const char *phrase) {
    static char text[400];
    int n = snprintf(text, sizeof text, "exit status %d, stderr: %s", r->status, r->err);
    for (int i = 0; i < n && i < (int)sizeof text; i++)
        if (text[i] == '\n') text[i] = '|';
    if (r->signal) {
        snprintf(text, sizeof text, "ended by signal %d", r->signal);
        return text;
    }
    if (strstr(r->err, "Sanitizer") || strstr(r->err, "runtime error:")) return text;
    if (r->seconds > MAX_SECONDS) return "it took too long";
    if (r->max_rss_kb > MAX_RSS_KB) return "it took too much memory";
    if (r->status == 0 && want != REFUSE) return NULL;
    if (r->status != 1 || want == ACCEPT) return text;
    if (count_lines(r->err) != 1) return text;
    return phrase && !strstr(r->err, phrase) ? text : NULL;
}

static const char *inspect(const char *path, int want, const char *phrase) {
    static char text[400];
    const char *args[] = {"inspect", path, NULL};
    run_result r = run_input("", 0, args);
    const char *wrong = judge(&r, want, phrase);
    if (wrong) snprintf(text, sizeof text, "%s", wrong);
    run_free(&r);
    return wrong ? text : NULL;
}

static int make_model(const char *make, const char *path) {
    char copy[1000];
    const char *args[MAX_ARGS];
    int n = 0;
    snprintf(copy, sizeof copy, "%s", make);
    for (char *w = strtok(copy, " "); w && n < MAX_ARGS; w = strtok(NULL, " ")) {
        args[n++] = w;
        if (n == 2) args[n++] = path;
    }
    return mkmodel_write(n, args);
}

static void test_cases(void) {
    char name[200], path[300];
    snprintf(path, sizeof path, "%s", scratch("model.gguf"));
    for (size_t i = 0; i < sizeof raw_cases / sizeof *raw_cases; i++) {
        const struct raw_case *c = &raw_cases[i];
        snprintf(name, sizeof name, "gguf: %s", c->name);
        if (!wanted(name)) continue;
        write_raw(path, c->file);
        const char *wrong = inspect(path, c->want, c->phrase);
        report(!wrong, name, "%s", wrong ? wrong : "");
    }
    for (size_t i = 0; i < sizeof made_cases / sizeof *made_cases; i++) {
        const struct made_case *c = &made_cases[i];
        snprintf(name, sizeof name, "gguf: %s", c->name);
        if (!wanted(name)) continue;
        const char *wrong = make_model(c->make, path) ? "mkmodel failed" : NULL;
        if (!wrong) wrong = inspect(path, c->want, c->phrase);
        report(!wrong, name, "%s", wrong ? wrong : "");
    }
}

/* ==== Cut and damaged files ================================================================== */

/* Every beginning of a good file must be refused; the first bytes one by one, then in steps that
 * meet every kind of field. */
static void test_prefixes(void) {
    const char *name = "gguf: every beginning of a good file", *wrong = NULL;
    char path[300];
    size_t len = 0, step;
    if (!wanted(name)) return;
    snprintf(path, sizeof path, "%s", scratch("model.gguf"));
    char *whole = make_model("llama f32 " TINY, path) ? NULL : read_whole(path, &len);
    for (size_t n = 0; n < len && whole && !wrong; n += step) {
        write_whole(path, whole, n);
        wrong = inspect(path, REFUSE, NULL);
        if (wrong) report(0, name, "at %zu of %zu bytes: %s", n, len, wrong);
        step = n < 64 ? 1 : n < 4096 ? 11 : 997;
    }
    if (!wrong) report(whole != NULL, name, "");
    free(whole);
}

/* Damage one to four bytes of the headers, many times: any answer but a crash will do. */
static void test_damage(void) {
    const char *name = "gguf: damaged headers", *wrong = NULL;
    char path[300];
    uint64_t rng = 1;
    size_t len = 0;
    if (!wanted(name)) return;
    snprintf(path, sizeof path, "%s", scratch("model.gguf"));
    char *whole = make_model("llama q8_0 " TINY, path) ? NULL : read_whole(path, &len);
    for (int i = 0; i < 400 && whole && !wrong; i++) {
        char *copy = malloc(len);
        if (!copy) break;
        memcpy(copy, whole, len);
        for (uint64_t n = 1 + mk_random(&rng) % 4; n > 0; n--) {
            static const uint8_t telling[] = {0, 1, 0x7F, 0x80, 0xFF, 8, 9, 4};
            uint64_t r = mk_random(&rng), at = r % 2800;
            copy[at < len ? at : 8] = (char)(r >> 60 < 8 ? telling[r >> 56 & 7] : r >> 48 & 0xFF);
        }
        write_whole(path, copy, len);
        wrong = inspect(path, SURVIVE, NULL);
        if (wrong) report(0, name, "round %d: %s", i, wrong);
        free(copy);
    }
    if (!wrong) report(whole != NULL, name, "");
    free(whole);
}

/* ==== Things that are not files ============================================================== */

static void test_paths(void) {
    static const struct {
        const char *name, *path;
    } cases[] = {{"gguf: no such file", "/no/such/model.gguf"},
                 {"gguf: a directory", "/"},
                 {"gguf: an endless device", "/dev/zero"},
                 {"gguf: an empty device", "/dev/null"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!wanted(cases[i].name)) continue;
        const char *wrong = inspect(cases[i].path, REFUSE, cases[i].path);
        report(!wrong, cases[i].name, "%s", wrong ? wrong : "");
    }
}

int main(int argc, char **argv) {
    begin(argc, argv);
    test_paths();
    test_cases();
    test_prefixes();
    test_damage();
    return finish();
}
