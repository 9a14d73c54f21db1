// SPDX-License-Identifier: MIT
// Regenerates tests/expected/logprobs.jsonl: what llama.cpp thinks of 64 tokens in each model.
//
//   node tests/oracle.mjs NODE_DIR MKMODEL SHARED > tests/expected/logprobs.jsonl
//
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

const [nodeDir, mkmodel, shared] = process.argv.slice(2);
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
    const [arch, format, ...rest] = make.split(" ");
    const file = join(work, name);
    execFileSync(mkmodel, [arch, format, file, ...rest]);
    const vocab = +(/vocab=(\d+)/.exec(make) ?? [0, 391])[1];
    await line(file, {model: name, tier: "project", make, tolerance}, () => spreadIds(vocab));
}
rmSync(work, {recursive: true});
process.exit(0);
