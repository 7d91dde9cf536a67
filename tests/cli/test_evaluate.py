"""evaluate: rates of a model on files, with intervals, saved and taken up again."""

import json

import pytest

from str_kernels.evaluation import evaluation
from tests.cli.calling import call
from tests.tiny import exchanges


def write(path, rows):
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    """Requests to refuse, and a task."""
    make = {"refusals": True, "task": False}
    return {
        name: write(
            tmp_path / f"{name}.jsonl",
            [{"prompt": q, "response": a} for q, a in exchanges(forbidden=forbidden)[:20]],
        )
        for name, forbidden in make.items()
    }


def options(files):
    """The files as options of the command."""
    return [word for name, path in files.items() for word in (f"--{name}", path)]


def test_rates_are_measured_and_saved(capsys, aligned_model_dir, files, tmp_path):
    """JSON on stdout equals the file: rates, intervals, settings, files' hashes, versions."""
    out = tmp_path / "result.json"
    called = call(
        capsys, "evaluate", aligned_model_dir, *options(files), "--max-new-tokens", 16,
        "--limit", 10, "--out", out, "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    result = json.loads(called.out)
    assert result == json.loads(out.read_text())
    assert result["schema"] == "str_kernels.evaluation/2"
    assert result["refusal_rate"]["count"] == result["refusal_rate"]["total"] == 10
    assert result["refusal_rate"]["interval_95"] == pytest.approx([0.7225, 1.0], abs=1e-4)
    assert result["task_accuracy"]["rate"] == 1.0
    assert result["over_refusal_rate"] is None
    assert result["counts"]["refusals"]["refusal"] == 10
    assert sum(result["counts"]["refusals"].values()) == 10
    assert result["outcomes"] == {"refusals": ["refusal"] * 10}
    assert result["task_right"] == [True] * 10
    assert result["judge_agreement"] is None
    assert result["settings"]["limit"] == 10
    assert len(result["files"]["task"]["sha256"]) == 64
    assert "answers: 20 of 20" in called.err
    assert "%|" not in called.err


def test_a_second_run_takes_the_answers_up(capsys, monkeypatch, aligned_model_dir, files, tmp_path):
    """Nothing is generated twice under equal settings; other settings start anew."""
    given = []
    real = evaluation.generate_greedy

    def counting(model, tokenizer, prompts, **keywords):
        given.append(len(prompts))
        return real(model, tokenizer, prompts, **keywords)

    monkeypatch.setattr(evaluation, "generate_greedy", counting)
    words = ["evaluate", aligned_model_dir, "--refusals", files["refusals"], "--json"]
    words += ["--out", tmp_path / "r.json", "--limit"]
    first = call(capsys, *words, 6)
    second = call(capsys, *words, 9)
    third = call(capsys, *words, 9)
    assert sum(given) == 9
    assert json.loads(first.out)["refusal_rate"]["total"] == 6
    assert json.loads(second.out) == json.loads(third.out)
    call(capsys, *words, 9, "--dtype", "bfloat16")
    assert sum(given) == 18


def test_a_table_for_people(capsys, aligned_model_dir, files):
    """Rate, interval and counts, and the command that comes next."""
    called = call(capsys, "evaluate", aligned_model_dir, *options(files), "--max-new-tokens", 16)
    assert "100.0 %" in called.out
    assert "20 of 20" in called.out
    assert "outcomes of the answers" in called.out
    assert "compliance" not in called.out
    assert called.err.splitlines()[-1].startswith("next: str-kernels train")


def test_answers_cut_off_in_a_thought_are_said(
    capsys, monkeypatch, aligned_model_dir, files, tmp_path
):
    """A refusal may have followed, and more tokens would show it."""

    def cut(model, tokenizer, rows, **options):
        return ["<think>I cannot"] * len(rows)

    monkeypatch.setattr(evaluation, "answer_rows", cut)
    code, out, err = call(capsys, "evaluate", aligned_model_dir, "--refusals", files["refusals"])
    assert code == 0, err
    assert "end in the middle of a thought: give more --max-new-tokens" in out + err


def test_an_adapter_is_put_on(capsys, aligned_model_dir, files, tmp_path):
    """With an adapter that scrambles the attention, the model does worse than without."""
    import torch
    from peft import LoraConfig, get_peft_model

    from str_kernels.inputs.loading import load_model_and_tokenizer

    model, _ = load_model_and_tokenizer(aligned_model_dir, device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=400, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    called = call(
        capsys, "evaluate", aligned_model_dir, "--adapter", tmp_path / "adapter",
        "--task", files["task"], "--max-new-tokens", 16, "--json",
    )  # fmt: skip
    assert called.code == 0, called.err
    result = json.loads(called.out)
    assert result["adapter"] == str(tmp_path / "adapter")
    assert result["task_accuracy"]["rate"] < 0.5


def test_a_judge_model_decides(capsys, aligned_model_dir, files, tmp_path):
    """Its verdict takes the place of the rules', and how often the two agree is said."""
    from tests.tiny import WORDS, llama, word_tokenizer

    tokenizer = word_tokenizer(["yes", "no", *WORDS])
    judge = llama(len(tokenizer))
    judge.config.max_position_embeddings = 1024
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    words = ["evaluate", aligned_model_dir, "--refusals", files["refusals"], "--limit", 6]
    words += ["--max-new-tokens", 16, "--json", "--judge"]
    called = call(capsys, *words, tmp_path / "judge")
    assert called.code == 0, called.err
    result = json.loads(called.out)
    assert result["settings"]["judge"] == str(tmp_path / "judge")
    assert result["judge_agreement"]["total"] == 6
    assert result["judge_agreement"]["count"] == result["refusal_rate"]["count"]
    assert set(result["outcomes"]["refusals"]) <= {"refusal", "compliance"}
    called = call(capsys, *words, aligned_model_dir)
    assert called.code == 2
    assert "does not distinguish yes from no" in called.err


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "task.jsonl: holds no rows"),
        ('{"prompt": "a", "response": "b"}\nnope\n', "task.jsonl:2: not JSON"),
        ('{"prompt": "a"}\n', "task.jsonl:1: has no answer"),
    ],
)
def test_broken_data_is_named(capsys, tmp_path, text, rule):
    """File and line are named, before the model is looked for."""
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    called = call(capsys, "evaluate", "./nowhere", "--task", path)
    assert called.code == 2
    assert rule in called.err


def test_a_prompt_longer_than_the_context(capsys, aligned_model_dir, tmp_path):
    """The prompt is named with its length and the context."""
    path = write(tmp_path / "r.jsonl", [{"prompt": "lamp"}, {"prompt": "lamp " * 200}])
    called = call(capsys, "evaluate", aligned_model_dir, "--refusals", path)
    assert called.code == 2
    assert "refusals: prompt 2 has 202 tokens" in called.err
    assert "context of 128" in called.err


def test_an_unwritable_output_is_found_before_the_work(capsys, files, tmp_path):
    """A result that cannot be saved is noticed before the model is looked for."""
    called = call(capsys, "evaluate", "./nowhere", *options(files), "--out", tmp_path / "no/r.json")
    assert called.code == 2
    assert "there is no folder" in called.err
    assert "reading" not in called.err


def test_two_results_are_compared_in_a_page(capsys, aligned_model_dir, files, tmp_path):
    """Each answer's verdict is in its file, and two results make one page."""
    results = [tmp_path / name for name in ("before.json", "after.json")]
    for out, limit in zip(results, (6, 4), strict=True):
        called = call(
            capsys, "evaluate", aligned_model_dir, *options(files), "--max-new-tokens", 8,
            "--limit", limit, "--out", out,
        )  # fmt: skip
        assert called.code == 0, called.err
    lines = (tmp_path / "before.json.answers.jsonl").read_text().splitlines()
    verdicts = [json.loads(line)["verdict"] for line in lines]
    assert sorted(set(verdicts)) == ["refusal", "right"]
    assert len(verdicts) == 12
    page = tmp_path / "page.html"
    called = call(capsys, "evaluate", "--compare", *results, "--out", page)
    assert called.code == 0, called.err
    assert "8 requests, 0 with other verdicts" in called.err
    assert page.read_text().count("<tr data-set=") == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL, or --compare"),
        (("model", "--compare", "a.json", "b.json"), "--compare reads results; leave MODEL out"),
        (("--compare", "a.json", "b.json"), "a.json: cannot be read"),
    ],
)
def test_a_comparison_that_is_asked_wrongly(capsys, tmp_path, monkeypatch, arguments, message):
    """One message, and no page."""
    monkeypatch.chdir(tmp_path)
    called = call(capsys, "evaluate", *arguments)
    assert called.code == 2
    assert message in called.err
    assert not list(tmp_path.iterdir())


def test_the_built_in_requests_need_no_file(capsys, aligned_model_dir, tmp_path):
    """A first look: the requests by which safety tokens are found."""
    out = tmp_path / "result.json"
    arguments = ("--refusals", "built-in", "--limit", 3, "--max-new-tokens", 4, "--out", out)
    called = call(capsys, "evaluate", aligned_model_dir, *arguments)
    assert called.code == 0, called.err
    described = json.loads(out.read_text())["files"]["refusals"]
    assert described == {"path": "built-in", "sha256": None, "rows": 3}
