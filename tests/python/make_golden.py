"""Makes tests/fixtures/golden2: reference outputs of transformers + PEFT TinyLoRA on tiny random models.

The conventions of tests/fixtures/golden (see its README.md), for what those two models leave out: llama3 RoPE, an
explicit head_dim, one key/value head, untied heads, Qwen3's head norms, biases everywhere, linear RoPE, sizes that are
no multiple of anything, weights in bf16 and f16, sharded files, config.json in the old layout, PEFT schemes with other
ranks, ties, seeds and targets. The reference is computed in float32 from the weights as they were saved.

Also spm.json: a small SentencePiece BPE model (pieces, scores, types) and what sentencepiece makes of some texts.

Needs: torch (CPU), transformers 5.x, peft 0.21.2, tokenizers, safetensors, sentencepiece.
Run:   python tests/python/make_golden.py tests/fixtures/golden2
"""
import json, os, shutil, sys, tempfile

import torch
from peft import TinyLoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

OUT = sys.argv[1]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = dict(bos_token_id=1, eos_token_id=0)
torch.set_num_threads(1)


def cases():
    """name -> (class, config, seed, saved dtype, shard size, old config layout)"""
    llama3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return {
        "llama3rope": (LlamaForCausalLM, LlamaConfig(
            vocab_size=289, hidden_size=50, intermediate_size=88, num_hidden_layers=2, num_attention_heads=5,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=512, rms_norm_eps=1e-5,
            tie_word_embeddings=False, rope_parameters=llama3, **COMMON), 41, torch.bfloat16, None, False),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(
            vocab_size=288, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=256, rope_theta=1000000.0, rms_norm_eps=1e-6,
            tie_word_embeddings=True, **COMMON), 42, torch.float16, None, False),
        "qwen2odd": (Qwen2ForCausalLM, Qwen2Config(
            vocab_size=287, hidden_size=54, intermediate_size=74, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=3, max_position_embeddings=128, rope_theta=10000.0, rms_norm_eps=1e-6,
            tie_word_embeddings=True, **COMMON), 43, torch.bfloat16, "40KB", True),
        "llamabias": (LlamaForCausalLM, LlamaConfig(
            vocab_size=288, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
            attention_bias=True, mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}, **COMMON),
            44, torch.float16, None, True),
        "mistral": (MistralForCausalLM, MistralConfig(
            vocab_size=288, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=128, rope_theta=10000.0, rms_norm_eps=1e-5,
            sliding_window=96, tie_word_embeddings=False, **COMMON), 45, torch.bfloat16, None, False),
    }


def adapters(name, sites):
    thirteen = dict(r=2, u=1, weight_tying=1.0 - 13 / sites, projection_seed=99)
    everything = {
        "llama3rope": {"u1-13groups": thirteen, "r1": dict(r=1, u=1, weight_tying=0.5)},
        "qwen3": {"u13-tied": dict(r=2, u=13, weight_tying=1.0), "r4-u16": dict(r=4, u=16, weight_tying=0.9)},
        "qwen2odd": {"u1-13groups": thirteen, "attention-only": dict(r=2, u=13, weight_tying=1.0, target_modules=MODULES[:4])},
        "llamabias": {"u13-tied": dict(r=2, u=13, weight_tying=1.0)},
        "mistral": {"down-only": dict(r=3, u=5, weight_tying=0.0, target_modules=["down_proj"])},
    }
    return everything[name]


def tokenizer(path):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(["what is 12 + 30 ? the answer is 42 ."] * 4, trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<eos>", "<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(os.path.join(path, "tokenizer.json"))


def logprobs(model, prompt, continuation):
    logits = model(torch.tensor([prompt + continuation])).logits[0, len(prompt) - 1:-1].float()
    return torch.log_softmax(logits, -1)[torch.arange(len(continuation)), torch.tensor(continuation)]


def greedy(model, prompt, n=12):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def rounded(values):
    return [float(f"{x:.6g}") for x in values.tolist()]


def outputs(model, prompts, continuation):
    with torch.no_grad():
        return {"last_logits": [rounded(model(torch.tensor([p])).logits[0, -1]) for p in prompts],
                "greedy": [greedy(model, p) for p in prompts],
                "continuation_logprobs": [rounded(logprobs(model, p, continuation)) for p in prompts]}


def old_layout(folder, config):
    """rope_theta and rope_scaling instead of rope_parameters, torch_dtype instead of dtype."""
    path = os.path.join(folder, "config.json")
    saved = json.load(open(path))
    rope = saved.pop("rope_parameters")
    saved["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    saved["rope_scaling"] = None if kind == "default" else {"type": kind} | rope
    saved["torch_dtype"] = saved.pop("dtype")
    json.dump(saved, open(path, "w"), indent=2, sort_keys=True)


def make(name, cls, config, seed, dtype, shard, old):
    root = os.path.join(OUT, name)
    folder = os.path.join(root, "model")
    os.makedirs(folder)
    torch.manual_seed(seed)
    config.initializer_range = 0.15  # sharp enough that greedy choices are not ties
    base = cls(config).float().eval()
    with torch.no_grad():
        for n, p in base.named_parameters():
            if n.endswith("norm.weight"):
                p.copy_(1 + 0.1 * torch.randn_like(p))
            if n.endswith("bias"):
                p.copy_(0.1 * torch.randn_like(p))
    base.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer(folder)
    fresh = lambda: cls.from_pretrained(folder, dtype=torch.float32).eval()
    base = fresh()
    if old:
        old_layout(folder, config)
    g = torch.Generator().manual_seed(seed)
    high = config.vocab_size - 1
    prompts = [torch.randint(2, high, (n,), generator=g).tolist() for n in (1, 7, 37)]
    continuation = torch.randint(2, high, (9,), generator=g).tolist()
    out = {"prompts": prompts, "continuation": continuation, "base": outputs(base, prompts, continuation), "adapters": {}}
    for k, (aname, kw) in enumerate(adapters(name, 7 * config.num_hidden_layers).items()):
        model = fresh()
        torch.manual_seed(100 * seed + k)
        cfg = TinyLoraConfig(**({"target_modules": MODULES, "task_type": "CAUSAL_LM", "init_weights": True} | kw))
        peft = get_peft_model(model, cfg).eval()
        vs = [(n, p) for n, p in peft.named_parameters() if "tinylora_v" in n]
        with torch.no_grad():
            for _, p in vs:
                p.copy_((0.4 * torch.randn_like(p)).bfloat16().float())
        target = os.path.join(root, "adapters", aname)
        peft.save_pretrained(target)
        path = os.path.join(target, "adapter_config.json")
        saved = json.load(open(path)) | {"base_model_name_or_path": "tiny-" + name}
        json.dump(saved, open(path, "w"), indent=2, sort_keys=True)
        os.remove(os.path.join(target, "README.md"))
        e = outputs(peft, prompts, continuation)
        e["v"] = {n.split(".")[-1]: p.detach().tolist() for n, p in vs}
        e["effect"] = max(abs(a - b) for x, y in zip(e["last_logits"], out["base"]["last_logits"]) for a, b in zip(x, y))
        out["adapters"][aname] = e
        print(name, aname, "effect on logits %.3f" % e["effect"], "groups", len(vs))
    json.dump(out, open(os.path.join(root, "expected.json"), "w"))


def make_spm():
    import sentencepiece
    corpus = ["what is 12 + 30 ? the answer is 42 .", "a small model that adds and subtracts numbers",
              "how many clips did she sell altogether in april and may ?", "the quick brown fox jumps over the lazy dog",
              "she sells sea shells by the sea shore", "0 1 2 3 4 5 6 7 8 9 10 11 12 13"] * 4
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "spm")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_prefix=prefix, model_type="bpe", vocab_size=420, byte_fallback=True,
            character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, minloglevel=2)
        spm = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    ids = range(spm.vocab_size())
    kind = lambda i: 6 if spm.is_byte(i) else 3 if spm.is_control(i) else 2 if spm.is_unknown(i) else 1
    texts = ["what is 12 + 31 ?", "The sea shells", " leading and  double  spaces ", "newline\nand tab\t", "naïve café 東京 😀",
             "altogether", "a", "shellsshore", "1234567890"]
    json.dump({"tokens": [spm.id_to_piece(i) for i in ids], "scores": [spm.get_score(i) for i in ids],
               "types": [kind(i) for i in ids], "texts": texts, "ids": [spm.encode(t) for t in texts]},
              open(os.path.join(OUT, "spm.json"), "w"), ensure_ascii=False)


for case, arguments in cases().items():
    shutil.rmtree(os.path.join(OUT, case), ignore_errors=True)
    make(case, *arguments)
make_spm()
