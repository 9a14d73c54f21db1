// SPDX-License-Identifier: MIT
// Regenerates tests/expected/logprobs.jsonl: what llama.cpp thinks of 64 tokens in each model.
//
//   node tests/oracle.mjs NODE_DIR MKMODEL SHARED [NAME-PART] > tests/expected/logprobs.jsonl
//
// With NAME-PART only the lines of models whose names hold it are written.
// NODE_DIR is a directory where `npm install node-llama-cpp` was run (the package brings a built
// llama.cpp), MKMODEL the compiled tests/mkmodel.c, SHARED the directory with models/ and
// testdata/models/.  The KV cache is F32, to compare with `lorch score --kv-type f32`.
//
// Tolerances.  With F32 weights only the order of sums differs.  With F16, BF16 and quantised
// weights llama.cpp rounds the activations to the weights' kind of number, and its CPU kernels
// do not round all alike, so that two right answers differ by about the size of that rounding.
// tests/expected/README.md has the measured sizes from which these numbers were chosen.
import {execFileSync} from "node:child_process";
import {mkdtempSync, rmSync} from "node:fs";
import {tmpdir} from "node:os";
import {join, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const N_IDS = 64, TOP = 8;

const CHAT = "<|im_start|>user\nTell me a story about a fox.<|im_end|>\n<|im_start|>assistant\n" +
    "Once upon a time there was a quiet fox named Omar who lived near the river. Omar wanted a " +
    "green kite more than anything. One morning he found 4 red boats near the river. \"These are " +
    "not mine,\" he said. He asked Nora, a brave owl, who had lost them.";
const STORY = "Once upon a time, there was a little girl named Lily. She had a small cat. One " +
    "day, the cat ran into the garden and hid behind a tall tree. Lily was sad and looked for " +
    "it all day. Then her mom said, \"Look up, Lily!\" The cat was on the roof with a bird.";
const WORDS = "Hello world, the theory of the thing: they gather there, then breathe the air. " +
    "The end of the other theme, 12 + 34 = 46; the rest is the author's.";

const MADE = {
    "mk-llama-f32.gguf": ["llama f32", 2e-3],
    "mk-llama-v2-tied.gguf": ["llama f32 version=2 tied=1 seed=2 heads=6 kv=3 hd=32", 2e-3],
    "mk-llama-freqs.gguf": ["llama f32 freq_factors=1 hd=24 heads=6 rope_base=500000 seed=3", 2e-3],
    "mk-llama-linear.gguf": ["llama f32 rope_scaling=4 heads=5 kv=1 hd=20 seed=4", 2e-3],
    "mk-llama-hd34.gguf": ["llama f32 hd=34 heads=3 kv=3 ff=130 embd=70 seed=5", 2e-3],
    "mk-qwen2-f32.gguf": ["qwen2 f32 heads=6 hd=16 tied=1 rope_base=1000000 seed=6", 2e-3],
    "mk-qwen2-bpe.gguf": ["qwen2 f32 tokenizer=bpe pre=qwen2 vocab=701 embd=88 hd=22 seed=7", 2e-3],
    "mk-qwen3-f32.gguf": ["qwen3 f32 layers=4 hd=48 rope_base=1000000 seed=8", 2e-3],
    "mk-qwen3-tied.gguf": ["qwen3 f32 heads=8 kv=4 hd=14 tied=1 seed=9", 2e-3],
    "mk-llama-f16.gguf": ["llama f16 seed=10", 1e-2],
    "mk-qwen3-bf16.gguf": ["qwen3 bf16 seed=11", 5e-2],
    "mk-llama-q8_0.gguf": ["llama q8_0 seed=12", 0.15],
    "mk-qwen2-q4_0.gguf": ["qwen2 q4_0 hd=24 seed=13", 0.15],
    "mk-llama-q4_k.gguf": ["llama q4_k seed=14", 0.3],
    "mk-qwen3-q5_k.gguf": ["qwen3 q5_k seed=15", 0.3],
    "mk-llama-q6_k.gguf": ["llama q6_k tied=1 seed=16", 0.3],
    "mk-llama-mixed.gguf": ["llama f32 seed=17 tensor:blk.0.ffn_up.weight:format=q8_0 " +
        "tensor:blk.1.attn_v.weight:format=q4_0 tensor:blk.2.ffn_down.weight:format=bf16 " +
        "tensor:output.weight:format=f16", 0.1],
    "mk-llama-q4_1.gguf": ["llama q4_1 seed=18", 0.3],
    "mk-qwen2-q5_0.gguf": ["qwen2 q5_0 hd=24 seed=19", 0.15],
    "mk-llama-q5_1.gguf": ["llama q5_1 seed=20", 0.3],
    "mk-llama-q2_k.gguf": ["llama q2_k seed=21", 0.3],
    "mk-qwen3-q3_k.gguf": ["qwen3 q3_k seed=22", 0.3],
    "mk-llama-iq4_nl.gguf": ["llama iq4_nl seed=23", 0.15],
    "mk-llama-iq4_xs.gguf": ["llama iq4_xs seed=24", 0.3],
    "mk-llama-mxfp4.gguf": ["llama mxfp4 seed=25", 0.15],
    // Each other family in F32: its own tensors and keys, and the forms in which it comes.
    "mk-llama-experts.gguf": ["llama f32 experts=6 used=2 ff=72 seed=30", 2e-3],
    "mk-llama-biases.gguf": ["llama f32 with=qkv_bias,out_bias,ffn_bias seed=31", 2e-3],
    "mk-llama-yarn.gguf": ["llama f32 rope_type=yarn rope_scaling=4 rope_orig=32 rope_attn=1.1 seed=32", 2e-3],
    "mk-llama-longrope.gguf": ["llama f32 with=longrope rope_type=longrope rope_orig=32 seed=33", 2e-3],
    "mk-qwen2-yarn.gguf": ["qwen2 f32 hd=24 rope_type=yarn rope_scaling=4 rope_orig=32 seed=34", 2e-3],
    "mk-qwen3-yarn.gguf": ["qwen3 f32 rope_type=yarn rope_scaling=8 rope_orig=24 seed=35", 2e-3],
    "mk-qwen2moe-f32.gguf": ["qwen2moe f32 seed=36", 2e-3],
    "mk-qwen3moe-f32.gguf": ["qwen3moe f32 seed=37", 2e-3],
    "mk-gemma2-f32.gguf": ["gemma2 f32 heads=5 kv=1 seed=38", 2e-3],
    "mk-gemma3-f32.gguf": ["gemma3 f32 rope_base=1000000 rope_scaling=8 tied=1 seed=39", 6e-3],
    "mk-gemma3-full.gguf": ["gemma3 f32 layers=3 kv:gemma3.attention.sliding_window=none " +
        "kv:gemma3.final_logit_softcapping=f32:4 seed=40", 6e-3],
    "mk-phi3-f32.gguf": ["phi3 f32 rot=18 kv=4 seed=41", 2e-3],
    "mk-phi3-long.gguf": ["phi3 f32 with=longrope rope_type=longrope rope_orig=32 rope_attn=1.2 seed=42", 2e-3],
    "mk-phi3-short.gguf": ["phi3 f32 with=longrope rope_type=longrope rope_orig=512 rope_attn=1.2 seed=43", 2e-3],
    "mk-gpt2-f32.gguf": ["gpt2 f32 seed=44", 4e-3],
    "mk-gpt2-tied.gguf": ["gpt2 f32 tied=1 heads=6 kv=6 seed=45", 4e-3],
    "mk-gpt-oss-f32.gguf": ["gpt-oss f32 rope_type=yarn rope_scaling=8 rope_orig=32 rope_base=150000 seed=46", 2e-3],
    "mk-smollm3-f32.gguf": ["smollm3 f32 seed=47", 2e-3],
    "mk-olmo2-f32.gguf": ["olmo2 f32 kv=4 seed=48", 2e-3],
    "mk-olmo3-f32.gguf": ["olmo2 f32 layers=5 kv:olmo2.attention.sliding_window=u32:20 rope_type=yarn " +
        "rope_scaling=4 rope_orig=32 seed=49", 2e-3],
    "mk-olmoe-f32.gguf": ["olmoe f32 seed=50", 2e-3],
    "mk-granite-f32.gguf": ["granite f32 seed=51", 2e-3],
    "mk-granitemoe-f32.gguf": ["granitemoe f32 tied=1 seed=52", 2e-3],
    "mk-granitemoe-shared.gguf": ["granitemoe f32 ff_shared=104 seed=53", 2e-3],
    "mk-starcoder2-f32.gguf": ["starcoder2 f32 seed=54", 4e-3],
    "mk-stablelm-f32.gguf": ["stablelm f32 with=qkv_bias seed=55", 2e-3],
    "mk-stablelm-parallel.gguf": ["stablelm f32 without=ffn_norm with=qk_norm_each rot=6 seed=56", 2e-3],
    "mk-command-r-f32.gguf": ["command-r f32 seed=57", 2e-3],
    "mk-command-r-norms.gguf": ["command-r f32 layers=64 embd=48 ff=64 with=qk_norm_each seed=58", 2e-3],
    "mk-cohere2-f32.gguf": ["cohere2 f32 seed=59", 2e-3],
    "mk-exaone4-f32.gguf": ["exaone4 f32 freq_factors=1 seed=60", 2e-3],
    "mk-exaone4-window.gguf": ["exaone4 f32 layers=64 embd=48 ff=64 " +
        "kv:exaone4.attention.sliding_window=u32:20 seed=61", 2e-3],
    "mk-ernie4_5-f32.gguf": ["ernie4_5 f32 tied=1 heads=6 hd=32 seed=62", 2e-3],
    "mk-glm4-f32.gguf": ["glm4 f32 seed=63", 2e-3],
    "mk-lfm2-f32.gguf": ["lfm2 f32 tied=1 seed=64", 2e-3],
    "mk-lfm2moe-f32.gguf": ["lfm2moe f32 seed=65", 2e-3],
    "mk-deepseek2-f32.gguf": ["deepseek2 f32 rope_type=yarn rope_scaling=4 rope_orig=32 " +
        "kv:deepseek2.rope.scaling.yarn_log_multiplier=f32:0.0707 seed=66", 2e-3],
    "mk-deepseek2-heads.gguf": ["deepseek2 f32 layers=26 without=latent with=latent_heads,choice_bias " +
        "kv:deepseek2.expert_weights_norm=bool:1 kv:deepseek2.expert_gating_func=u32:2 seed=67", 2e-3],
    // Quantised, with experts too.
    "mk-gpt-oss-mxfp4.gguf": ["gpt-oss q8_0 exps_format=mxfp4 seed=70", 0.3],
    "mk-qwen3moe-q4_k.gguf": ["qwen3moe q4_k seed=71", 0.3],
    "mk-gemma3-q8_0.gguf": ["gemma3 q8_0 seed=72", 0.15],
    "mk-phi3-q4_k.gguf": ["phi3 q4_k seed=73", 0.3],
    "mk-lfm2-q4_0.gguf": ["lfm2 q4_0 seed=74", 0.3],
};

// tier, directory below SHARED, text, does the text hold control tokens, files with tolerances
const KEPT = [
    ["project", "models", CHAT, true, {
        "lorch-tiny-f16.gguf": 1e-2, "lorch-tiny-q8_0.gguf": 5e-2, "lorch-tiny-q4_0.gguf": 0.3,
        "lorch-tiny-q4_k_m.gguf": 0.3, "lorch-tiny-q5_k_m.gguf": 0.3, "lorch-tiny-q6_k.gguf": 0.3}],
    ["shared", "models", CHAT, true, {"lorch-tiny-bf16.gguf": 5e-2}],
    ["shared", "testdata/models", STORY, false, {
        "stories260K.gguf": 2e-3, "llama-2-tiny-random.gguf": 1e-3}],
    ["shared", "testdata/models", WORDS, false, {
        "tiny-mixed-quants-llama.gguf": 2e-3, "tiny-mixed-quants-llama-qkvbias.gguf": 2e-3}],
];

const [nodeDir, mkmodel, shared, part = ""] = process.argv.slice(2);
const packageDir = resolve(nodeDir, "node_modules/node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(join(packageDir, "dist/index.js")));
const llama = await getLlama({gpu: false, logLevel: LlamaLogLevel.error, build: "never",
    maxThreads: 2});

// Any fixed sequence does for a random model; multiples of a prime visit distinct tokens.
function spreadIds(nVocab) {
    return Array.from({length: N_IDS}, (_, i) => i == 0 ? 1 : 3 + (i * 7919) % (nVocab - 3));
}

function textIds(model, text, special) {
    const ids = [...model.tokenize(text, special)];
    const bos = model.tokens.shouldPrependBosToken ? [model.tokens.bos] : [];
    const all = [...bos, ...ids];
    if (all.length < N_IDS) throw new Error(`the text gives ${all.length} tokens only`);
    return all.slice(0, N_IDS);
}

async function topOfEach(model, ids) {
    const context = await model.createContext({contextSize: 512, threads: 2, batchSize: 512,
        sequences: 1, flashAttention: false, experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32"});
    const ask = {generateNext: {probabilities: true, options: {temperature: 0}}};
    const answers = await context.getSequence().controlledEvaluate(ids.map(id => [id, ask]));
    await context.dispose();
    return answers.map(a => [...a.next.probabilities.entries()].slice(0, TOP)
        .map(([id, p]) => [id, +Math.log(p).toFixed(4)]));
}

async function line(file, head, chooseIds) {
    if (!head.model.includes(part)) return;
    const model = await llama.loadModel({modelPath: file});
    const ids = chooseIds(model);
    const top = await topOfEach(model, ids);
    await model.dispose();
    console.log(JSON.stringify({...head, ids, top}));
}

for (const [tier, dir, text, special, files] of KEPT)
    for (const [name, tolerance] of Object.entries(files))
        await line(join(shared, dir, name), {model: name, tier, tolerance},
            model => textIds(model, text, special));

const work = mkdtempSync(join(tmpdir(), "lorch-oracle-"));
for (const [name, [make, tolerance]] of Object.entries(MADE)) {
    if (!name.includes(part)) continue;
    const [arch, format, ...rest] = make.split(" ");
    const file = join(work, name);
    execFileSync(mkmodel, [arch, format, file, ...rest]);
    const vocab = +(/vocab=(\d+)/.exec(make) ?? [0, 391])[1];
    await line(file, {model: name, tier: "project", make, tolerance}, () => spreadIds(vocab));
}
rmSync(work, {recursive: true});
process.exit(0);
