import shutil
from dataclasses import replace

import pytest
import torch

from benchmarks.safety.align import Recipe, align
from benchmarks.safety.experiment import Places, experiment
from benchmarks.safety.finetune import finetune
from benchmarks.safety.measure import Amounts, measure
from benchmarks.safety.methods import HARSH, MSE, Chain, Method, Plan, Run
from str_kernels.evaluation.answers import AnswerFile
from str_kernels.inputs.loading import load_model_and_tokenizer
from tests.safety_benchmark.conftest import NUMBERS, write_rows

SETTING = replace(HARSH, name="tiny", steps=2, batch=4, pool=8, learning_rate=1e-2)
AMOUNTS = Amounts(harmful=4, benign=3, task=5, neutral=2, new_tokens=4, max_length=32)
METHODS = {
    method.name: method
    for method in (
        Method("plain", loss="plain", strength=0.0),
        replace(MSE, top_k=4),
        Method("kl", kind="kl", strength=1.0, top_k=4, positions=1),
        Method("random", tokens="random", top_k=4, positions="labels"),
        Method("pact", loss="pact", top_k=4),
        Method("anchors", top_k=4, anchors=1),
        Method("full-kl", loss="full_kl"),
        Method("kl-mass-share", kind="kl_mass", strength=1.0, top_k=4, share=0.5),
        Method("constrained-sft", loss="constrained_sft"),
        Method("safeinstr", loss="plain", mixed=2),
    )
}


def silent(text):
    pass


def test_every_run_of_the_plan_has_a_name_of_its_own():
    names = [run.name for run in Plan().runs]
    assert len(names) == len(set(names))
    assert len({run.seed for run in Plan().runs}) >= 3


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_is_recorded(name, tiny_folder, data, tmp_path):
    model, tokenizer = load_model_and_tokenizer(str(tiny_folder), dtype="float32")
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = Run(METHODS[name], SETTING, seed=1)
    tuned, history = finetune(model, tokenizer, run, data=data, work=tmp_path, say=silent)
    for values in (history.cross_entropy, history.penalty, history.gradient_norm, history.seconds):
        assert len(values) == SETTING.steps
    of_one = ("plain", "safeinstr", "constrained-sft")  # whose objective has one term
    assert (max(history.penalty) > 1e-6) == (name not in of_one)  # after the first step it is moved
    moved = [p for n, p in tuned.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    assert moved
    for n, p in model.named_parameters():
        if "lora_" not in n:
            assert torch.equal(p, before[n.replace("base_layer.", "")])


def test_seeds_differ_and_repeat(tiny_folder, data, tmp_path):
    def losses(seed):
        model, tokenizer = load_model_and_tokenizer(str(tiny_folder), dtype="float32")
        run = Run(METHODS["mse"], SETTING, seed)
        places = {"data": data, "work": tmp_path, "say": silent}
        return finetune(model, tokenizer, run, **places)[1].cross_entropy

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_measure_asks_every_row(tiny_folder, data, tmp_path):
    model, tokenizer = load_model_and_tokenizer(str(tiny_folder), dtype="float32")

    def ask(task, file):
        known = AnswerFile(tmp_path / file, {})
        return measure(model, tokenizer, data, task, amounts=AMOUNTS, known=known)

    measured = ask("sst2", "a")
    assert (len(measured.harmful), len(measured.benign), len(measured.task)) == (4, 3, 5)
    assert 0 < measured.neutral < 20
    assert ask("sst2", "a") == ask("sst2", "b") == measured  # answers that are known, and anew
    free_text = ask("instructions", "c")
    assert free_text.summary()["outcomes"] == measured.summary()["outcomes"]


@pytest.mark.slow
def test_an_experiment_goes_on_where_it_was_interrupted(tiny_folder, data, tmp_path, monkeypatch):
    places = Places(str(tiny_folder), data, tmp_path / "work", tmp_path / "results")
    recipe = Recipe(epochs=0.02, max_length=48, task_rows=4)
    runs = [Run(METHODS["plain"], SETTING, 0), Run(METHODS["mse"], SETTING, 0)]
    experiment(places, runs[:1], recipe, AMOUNTS, workers=2)
    first = places.rows()
    experiment(places, runs, recipe, AMOUNTS, workers=2)
    *before, result = places.rows()
    assert before == first
    assert (result["name"], result["run"]) == (runs[1].name, runs[1].as_dict())
    assert set(result["measured"]["summary"]) >= {"refused", "over_refused", "accuracy"}
    assert len(before) == 3  # a run, the aligned model, its tokens
    chain = Chain(METHODS["mse"], (SETTING, replace(SETTING, task="agnews")), 0)
    experiment(places, [chain], recipe, AMOUNTS, workers=1)
    stages = places.rows()[-1]["stages"]
    assert [stage["run"] for stage in stages] == [run.as_dict() for run in chain.runs]
    # the second stage starts from where the first ended, away from the aligned model
    assert stages[0]["history"]["drift"][0] < 1e-4 < stages[1]["history"]["drift"][0]


def test_the_aligned_model_is_made_anew_of_other_rows(tiny_folder, data, tmp_path):
    recipe, out = Recipe(epochs=0.02, balance_steps=1, max_length=48, task_rows=4), tmp_path / "a"
    align(str(tiny_folder), data, out, recipe, silent)
    (out / "derived").mkdir()
    made = (out / "aligned.json").read_text()
    align(str(tiny_folder), data, out, recipe, silent)
    assert (out / "derived").is_dir()  # found again
    other = tmp_path / "data"
    shutil.copytree(data, other)
    write_rows(other / "instructions.jsonl", [f"paint {n}" for n in NUMBERS[:90]], ["sure"])
    align(str(tiny_folder), other, out, recipe, silent)
    assert (out / "aligned.json").read_text() != made
    assert not (out / "derived").exists()
