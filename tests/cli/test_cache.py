"""cache: from a data file to references that training takes."""

import json
import shlex

import pytest
import torch

from str_kernels import SafetyTokens
from str_kernels.huggingface.constraint.references import ReferenceCache
from tests.cli.calling import call
from tests.huggingface.dense import safety_values
from tests.tiny import exchanges

TRAIN = ("--steps", 2, "--batch", 2, "--rank", 4, "--logging-steps", 1)


@pytest.fixture
def rows():
    """Conversations of several lengths; the last one stands twice."""
    pairs = exchanges(forbidden=False)[:5]
    listed = [{"prompt": q, "response": a} for q, a in pairs]
    return [*listed, listed[-1]]


@pytest.fixture
def files(rows, aligned_model_dir, tmp_path):
    """Data and safety tokens."""
    from str_kernels.inputs.loading import load_tokenizer

    data, tokens = tmp_path / "data.jsonl", tmp_path / "tokens.json"
    write(data, rows)
    SafetyTokens.from_strings(load_tokenizer(aligned_model_dir), ["sorry", "cannot"]).save(tokens)
    return data, tokens


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def encoded(data, tokenizer):
    """Every row's token ids ``[1, T]``."""
    from str_kernels.inputs.data import encode_file, read_numbered

    found = encode_file(data, read_numbered(data), tokenizer, max_length=64)
    return [torch.tensor([sequence.input_ids]) for sequence in found.sequences]


def cache(capsys, model, files, out, *more):
    data, tokens = files
    given = ("--tokens", tokens, "--out", out, "--max-length", 64, "--batch", 2)
    return call(capsys, "cache", model, data, *given, *more)


def test_computed_once_and_trained_with(capsys, aligned_model_dir, files, rows, tmp_path):
    """The command that it names next trains as it stands, on shuffled data too; a row that is not
    there is named before the training.
    """
    out, data = tmp_path / "refs.safetensors", files[0]
    done = cache(capsys, aligned_model_dir, files, out, "--kind", "mse", "--dtype", "float32")
    assert done.code == 0, done.err
    assert "batches of references: 3 of 3" in done.err
    assert "Traceback" not in done.err
    following = done.err.splitlines()[-1].removeprefix("next: str-kernels ")
    words = shlex.split(following.replace("ADAPTER", str(tmp_path / "adapter")))
    write(data, rows[::-1])
    trained = call(capsys, *words, *TRAIN)
    assert trained.code == 0, trained.err
    assert "computing the references" not in trained.err
    assert "safety_drift" in trained.err
    write(data, [*rows[:2], {"prompt": "tell me the topic of rain", "response": "weather"}])
    words[-1] = str(tmp_path / "other")
    refused = call(capsys, *words, *TRAIN)
    assert refused.code == 2
    assert "has no entry for 1 of 3 rows of" in refused.err
    assert "The first is line 3, of" in refused.err
    assert "loading the model" not in refused.err


def test_anchors_are_cached_and_trained_with(capsys, aligned_model_dir, files, tmp_path):
    """They count as rows, and the command that it names next has them."""
    pairs, anchors = exchanges(forbidden=True)[:3], tmp_path / "refused.jsonl"
    write(anchors, [{"prompt": q, "response": a} for q, a in pairs])
    out, more = tmp_path / "refs.safetensors", ("--anchors", anchors)
    done = cache(capsys, aligned_model_dir, files, out, *more, "--json")
    assert done.code == 0, done.err
    assert (json.loads(done.out)["rows"], json.loads(done.out)["sequences"]) == (9, 8)
    following = done.err.splitlines()[-1].removeprefix("next: str-kernels ")
    words = shlex.split(following.replace("ADAPTER", str(tmp_path / "adapter")))
    assert words[words.index("--anchors") + 1] == str(anchors)
    trained = call(capsys, *words, *TRAIN)
    assert trained.code == 0, trained.err
    assert "safety_drift" in trained.err


@pytest.mark.parametrize("kind", ["mse", "logprob", "kl_mass"])
def test_the_values_are_the_models(capsys, aligned_model_dir, files, tmp_path, kind):
    """Logits of the safety tokens, or log-probabilities, of every position; JSON tells the rest."""
    from str_kernels.inputs.loading import load_model_and_tokenizer

    out = tmp_path / "refs.safetensors"
    done = cache(capsys, aligned_model_dir, files, out, "--kind", kind, "--json")
    said = json.loads(done.out)
    assert said["schema"] == "str_kernels.cache/1"
    assert (said["rows"], said["sequences"], said["safety_tokens"]) == (6, 5, 2)
    assert said["bytes"] == out.stat().st_size
    model, tokenizer = load_model_and_tokenizer(aligned_model_dir, device="cpu")
    safety = SafetyTokens.load(files[1], tokenizer).constraint(1.0, kind=kind)
    saved = ReferenceCache(out, safety)
    for ids in encoded(files[0], tokenizer):
        with torch.no_grad():
            logits = model(ids).logits
        values = safety_values(logits, safety)
        # fp16 on disk: off by 2^-11 of the value; 1e-3 of fp32's own and of denormals
        torch.testing.assert_close(saved.lookup(ids), values, rtol=2**-11, atol=1e-3)


def test_an_adapter_of_the_aligned_model_counts(capsys, aligned_model_dir, files, tmp_path):
    """With ``--adapter`` the reference is the model that has it, not the one below."""
    from peft import LoraConfig, get_peft_model

    from str_kernels.inputs.loading import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(aligned_model_dir, device="cpu")
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "aligned")
    out = tmp_path / "refs.safetensors"
    more = ("--adapter", tmp_path / "aligned")
    done = cache(capsys, aligned_model_dir, files, out, *more)
    assert done.code == 0, done.err
    assert "next: patch_model(" in done.err
    safety = SafetyTokens.load(files[1], tokenizer).constraint(1.0)
    ids = encoded(files[0], tokenizer)[0]
    got = ReferenceCache(out, safety).lookup(ids)
    with torch.no_grad():
        want = adapted.eval()(ids).logits[..., safety.token_ids]
        with adapted.disable_adapter():
            below = adapted(ids).logits[..., safety.token_ids]
    torch.testing.assert_close(got, want, rtol=2**-11, atol=1e-3)
    assert (want - below).abs().max() > 0.1


def test_mistakes_are_found_together_and_before_the_work(
    capsys, aligned_model_dir, files, tmp_path
):
    """Output, data, tokens, length and adapter: named, and no weight is read."""
    out = tmp_path / "no" / "refs.safetensors"
    done = cache(capsys, aligned_model_dir, files, out)
    assert done.code == 2
    assert "error: out=" in done.err
    assert "checking" not in done.err
    files[0].write_text('{"prompt": "a"}\n{oops\n')
    files[1].write_text("{}")
    out = tmp_path / "refs.safetensors"
    more = ("--max-length", 4096, "--adapter", tmp_path)
    done = cache(capsys, aligned_model_dir, files, out, *more)
    assert done.code == 2
    for text in ("data.jsonl:1", "data.jsonl:2", "tokens.json", "max_length=4096", "adapter="):
        assert text in done.err
    assert "loading the model" not in done.err
    assert not out.exists()
    done = cache(capsys, aligned_model_dir, files, out, "--kind", "some", "--batch", 0)
    assert "kind='some'" in done.err
    assert "batch=0" in done.err
