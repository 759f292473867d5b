"""PEFT loads what Mote exports, and computes the logits that it computed with its own checkpoint.

Skipped where torch, transformers and peft are not installed. To run it once:

    python3 -m venv torch && torch/bin/pip install pytest torch transformers peft --extra-index-url CPU_WHEELS   # or plain
    cargo build && MOTE_BIN=target/debug/mote torch/bin/python -m pytest -q tests/python/test_peft.py
"""

import io
import json
import urllib.request
import zipfile

import pytest
from conftest import GOLDEN, serve

torch = pytest.importorskip("torch", reason="torch is not installed: PEFT cannot load the export here")
peft = pytest.importorskip("peft", reason="peft is not installed: it cannot load the export here")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ADAPTERS = ["u1-13groups", "u13-tied", "u13-tied-alice", "r4-u3-untied", "v-only"]
TOLERANCE = 2e-4


def multipart(fields):
    """(name, file name or None, bytes) to a body and its content type."""
    boundary = "mote-tests-boundary"
    out = b""
    for name, file, value in fields:
        disposition = f'form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
        out += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + value + b"\r\n"
    return out + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def served(request):
    for server in serve("--no-auth", "--model", str(GOLDEN / request.param / "model"), "--model-id", "tiny", "--dtype", "f32", "--rank", "4"):
        yield request.param, server


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_loads_the_export(served, adapter, tmp_path):
    model, server = served
    folder = GOLDEN / model / "adapters" / adapter
    body, content_type = multipart([
        ("name", None, adapter.encode()),
        ("adapter_config", "adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        ("adapter_model", "adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    ])
    upload = urllib.request.Request(server.url + "/adapters", data=body, method="POST", headers={"content-type": content_type})
    assert urllib.request.urlopen(upload).status == 201
    exported = urllib.request.urlopen(f"{server.url}/adapters/{adapter}/weights?format=peft").read()
    zipfile.ZipFile(io.BytesIO(exported)).extractall(tmp_path)

    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / model / "model", dtype=torch.float32).eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    expected = json.loads((GOLDEN / model / "expected.json").read_text())
    for prompt, want in zip(expected["prompts"], expected["adapters"][adapter]["last_logits"]):
        with torch.no_grad():
            got = loaded(torch.tensor([prompt])).logits[0, -1]
        worst = (got - torch.tensor(want)).abs().max().item()
        print(f"{model} {adapter}: {len(prompt)} tokens, largest difference {worst:.2e}")
        assert worst <= TOLERANCE
