"""Does PEFT itself load exported adapters, and give the logits that the original checkpoint gave?

    python peft_roundtrip.py MODEL_DIR EXPECTED_JSON EXPORTS_DIR [--tolerance 2e-4]

MODEL_DIR is a Hugging Face folder, EXPECTED_JSON its golden `expected.json`, EXPORTS_DIR one folder an adapter, named as in
`expected.json`. Every expected adapter must be there. Needs torch, transformers and peft; exits 77 (skipped) without them.
"""

import argparse
import json
import pathlib
import sys

try:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def largest_difference(model, case, prompts, continuation):
    """Of the last logits and of the continuation's log-probs; and whether the greedy tokens are equal."""
    logits_off = logprobs_off = 0.0
    greedy_equal = True
    for i, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            last = model(tokens).logits[0, -1]
            scores = model(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
        logits_off = max(logits_off, (last - torch.tensor(case["last_logits"][i])).abs().max().item())
        for j, token in enumerate(continuation):
            expected = case["continuation_logprobs"][i][j]
            logprobs_off = max(logprobs_off, abs(scores[len(prompt) - 1 + j, token].item() - expected))
        sequence = list(prompt)
        for expected in case["greedy"][i]:
            with torch.no_grad():
                sequence.append(model(torch.tensor([sequence])).logits[0, -1].argmax().item())
            greedy_equal &= sequence[-1] == expected
    return logits_off, logprobs_off, greedy_equal


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("expected", type=pathlib.Path)
    parser.add_argument("exports", type=pathlib.Path)
    parser.add_argument("--tolerance", type=float, default=2e-4)
    arguments = parser.parse_args()
    expected = json.loads(arguments.expected.read_text())
    failures = 0
    for name, case in expected["adapters"].items():
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        model = PeftModel.from_pretrained(base, arguments.exports / name).eval()
        logits, logprobs, greedy = largest_difference(model, case, expected["prompts"], expected["continuation"])
        good = max(logits, logprobs) <= arguments.tolerance and greedy
        failures += not good
        verdict = "ok" if good else "FAILED"
        print(f"{verdict:6} {name:16} logits {logits:.2e} logprobs {logprobs:.2e} greedy {greedy} effect {case['effect']:.2f}")
    print(f"{len(expected['adapters']) - failures} of {len(expected['adapters'])} adapters agree")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
