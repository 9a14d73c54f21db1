/* SPDX-License-Identifier: MIT
 *
 * ggml: the values of all quantised formats against llama.cpp's own library, bit for bit.
 *
 *   cc -O1 tests/ggml.c -o ggml -ldl -lpthread -lm && ./ggml PATH/libggml-base.so
 *
 * The library comes with the npm package @node-llama-cpp/linux-x64 (or linux-arm64). Blocks are random, with
 * a share of extreme scales, denormal scales and constant bytes; NaNs need only be NaNs on both sides. */
#define LORCH_NO_MAIN
#include "../lorch.c"

#include <dlfcn.h>

typedef void (*ggml_dequantise)(const void *blocks, float *out, int64_t n);

static uint64_t dice_state = 88172645463325252u;
static uint64_t dice(void) { /* SplitMix64 */
    uint64_t z = dice_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* Fills a block: random; or with one byte repeated; or with the exponents of its half floats made small or large,
 * wherever they lie. */
static void draw_block(uint8_t *block, int bytes, int round) {
    for (int i = 0; i < bytes; i++) block[i] = (uint8_t)dice();
    if (round < 256) memset(block, round, (size_t)bytes);
    if (round % 4 == 1) block[1] &= 0x83, block[3] &= 0x83, block[bytes - 1] &= 0x83;
    if (round % 4 == 2) block[1] |= 0x78, block[3] |= 0x78, block[bytes - 1] |= 0x78;
}

int main(int argc, char **argv) {
    static const struct { const char *name, *symbol; } formats[] = {
        {"Q4_0", "q4_0"}, {"Q4_1", "q4_1"}, {"Q5_0", "q5_0"}, {"Q5_1", "q5_1"}, {"Q8_0", "q8_0"}, {"Q2_K", "q2_K"}, {"Q3_K", "q3_K"},
        {"Q4_K", "q4_K"}, {"Q5_K", "q5_K"}, {"Q6_K", "q6_K"}, {"IQ4_NL", "iq4_nl"}, {"IQ4_XS", "iq4_xs"}, {"MXFP4", "mxfp4"}};
    enum { ROUNDS = 200000 };
    int failed = 0;
    void *library = argc > 1 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!library) return printf("not ok - the library opens\n# %s\n", argc > 1 ? dlerror() : "which library?"), 1;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        char symbol[64];
        const quant_format *f = NULL;
        ggml_dequantise theirs;
        long differ = 0, tiny = 0;
        for (uint32_t type = 0; type < QUANT_TYPES; type++)
            if (quant_find(type) && strcmp(quant_find(type)->name, formats[i].name) == 0) f = quant_find(type);
        snprintf(symbol, sizeof symbol, "dequantize_row_%s", formats[i].symbol);
        void *found = dlsym(library, symbol);
        memcpy(&theirs, &found, sizeof theirs);
        for (int round = 0; round < ROUNDS && f && theirs; round++) {
            uint8_t block[256];
            float a[256], b[256];
            draw_block(block, f->bytes, round);
            theirs(block, a, f->block);
            quant_dequantise(f, block, b, f->block);
            for (int j = 0; j < f->block; j++) {
                if (a[j] != a[j] && b[j] != b[j]) continue;
                tiny += a[j] != 0 && fabsf(a[j]) < 1.2e-38f;
                differ += num_bits(a[j]) != num_bits(b[j]);
            }
        }
        int ok = f && theirs && differ == 0;
        printf("%s - %s: 200,000 blocks have llama.cpp's values, bit for bit\n# %ld differ, %ld are denormal\n", ok ? "ok" : "not ok", formats[i].name, differ, tiny);
        failed += !ok;
    }
    return failed != 0;
}
