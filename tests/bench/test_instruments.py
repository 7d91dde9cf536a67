"""The measuring instruments themselves: each can tell a planted fault."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from str_kernels import linear_cross_entropy
from str_kernels.bench import clock, sensors
from str_kernels.bench.contenders import CONTENDERS, Contender, chosen_contenders
from str_kernels.bench.head import KEYS, compare, inputs_line, publish
from str_kernels.bench.inputs import from_model, synthetic
from str_kernels.bench.measure import live_share, measure
from str_kernels.bench.memory import peak_bytes
from str_kernels.bench.report import SCHEMA, Results, read_rows, write_rows
from str_kernels.bench.truth import constraint_gradient, errors, truth_of
from str_kernels.options import TILE

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def case():
    """A small trained model's rows."""
    return synthetic(96, 2048, 32)


@pytest.fixture(scope="module")
def truth(case):
    """Its truth."""
    return truth_of(case)


def test_peak_bytes_counts_what_was_alive():
    """Freed memory is not counted twice, older memory not at all, and the result is kept."""
    older = torch.ones(MEBIBYTE)

    def call():
        nonlocal older
        older = None
        first = torch.empty(4 * MEBIBYTE, dtype=torch.uint8)
        second = torch.empty(2 * MEBIBYTE, dtype=torch.uint8)
        del first, second
        return torch.empty(3 * MEBIBYTE, dtype=torch.uint8)

    assert peak_bytes(call, CPU) == (6 * MEBIBYTE, 3 * MEBIBYTE)


def test_peak_bytes_sees_backward_and_kernels(case):
    """The materialised head holds its logits, their log-softmax and the gradient of one."""
    logits = 96 * 2048 * 4
    peak = peak_bytes(lambda: CONTENDERS["transformers"].run(case), CPU)
    assert 2 * logits < peak.peak < 4 * logits
    assert peak.kept == pytest.approx(96 * 32 * 4, abs=64)


def test_one_gemm_is_the_whole_product():
    """The unit does ``2·N·V·D`` operations, ragged blocks and all, in little memory."""
    hidden, weight = torch.randn(2100, 3), torch.randn(8200, 3)
    run = clock.bare_product(hidden, weight)
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == 2 * 2100 * 8200 * 3
    assert peak_bytes(run, CPU).peak < MEBIBYTE


def test_ratios_are_paired(monkeypatch):
    """A call is compared with the units before and after it; the median is reported."""
    times = iter([1.0, 4.0, 3.0, 30.0, 7.0, 10.0, 3.0])  # unit, call, unit, call, …
    monkeypatch.setattr(clock, "elapsed", lambda call, device: next(times))
    timing = clock.paired(lambda: None, lambda: None, device=CPU, repeats=3)
    assert timing.ratios == [2.0, 6.0, 2.0]
    assert timing.ratio == 2.0


def test_queued_calls_are_paired_too(monkeypatch):
    """Queues of calls and of units take turns, and a queue's time is divided by its calls."""
    counts = []

    def timed(call, device, count=1, sensors=None):
        counts.append(count)
        return call() * count

    monkeypatch.setattr(clock, "elapsed", timed)
    timing = clock.paired(lambda: 0.01, lambda: 0.002, device=CPU, repeats=2, queued=True)
    assert counts == [1] * 5 + [5] * 5  # 50 ms of calls a queue
    row = timing.as_row()
    assert row["queued_seconds"] == pytest.approx([0.01, 0.01])
    assert (row["gemms"], row["queued_gemms"]) == pytest.approx((5.0, 5.0))
    assert row["unit_seconds"] == row["queued_unit_seconds"] == pytest.approx([0.002, 0.002])
    assert (
        "queued_gemms"
        not in clock.paired(lambda: 1.0, lambda: 1.0, device=CPU, queued=False).as_row()
    )


class FakeCuda:
    """Writes down what is asked of ``torch.cuda``; an event's time is its place in the log."""

    def __init__(self, log):
        self.log = log

    def install(self, monkeypatch):
        """Stand in for torch's."""
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream=None):
                self.at = len(outer.log)
                outer.log.append("event")

            def elapsed_time(self, end):
                assert outer.log[-1] == "wait"
                return 1000.0 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("wait"))


def test_a_gpu_is_timed_between_events(monkeypatch):
    """It is idle before, sensors are read before the host waits, and times are of the device."""
    log, found = [], {}
    FakeCuda(log).install(monkeypatch)
    monkeypatch.setattr(clock, "read_sensors", lambda device: log.append("sensors") or {"w": 1.0})
    seconds = clock.elapsed(lambda: log.append("call"), torch.device("cuda"), 2, found)
    assert log == ["wait", "event", "call", "call", "event", "sensors", "wait"]
    assert seconds == 3.0
    assert found == {"w": 1.0}
    timing = clock.paired(lambda: None, lambda: None, device=torch.device("cuda"), repeats=1)
    assert timing.as_row()["queued_gemms"] == 1.0  # a GPU is also timed in queues
    assert timing.sensors == {"w": 1.0}


def test_nvml_is_asked_for_what_it_has(monkeypatch):
    """What a driver refuses is left out; milliwatts are watts."""

    class NVMLError(Exception):
        pass

    def refuse(handle, what):
        raise NVMLError

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, what: 1000 * what,
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetPowerUsage=lambda handle: 650_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    about = types.SimpleNamespace(uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    found = sensors.read_sensors(torch.device("cuda"))
    assert found == {"sm_mhz": 1000.0, "memory_mhz": 2000.0, "watts": 650.5}


def test_sensors_that_are_hidden_are_left_out(monkeypatch):
    """nvidia-smi writes "[N/A]" for what a virtual machine hides; a CPU has none."""
    assert sensors.parsed("1980, 3201, [N/A], 700.25\n") == {
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "watts": 700.25,
    }
    assert sensors.parsed("") == {}
    assert sensors.read_sensors(CPU) == {}


def test_truth_is_the_oracle_s(case, truth):
    """Loss and sampled gradients agree with the materialised oracle in fp64."""
    hidden, weight = (x.double().requires_grad_() for x in (case.hidden_states, case.weight))
    loss = linear_cross_entropy(hidden, weight, case.labels, backend="dense")
    d_hidden, d_weight = torch.autograd.grad(loss, [hidden, weight])
    found = errors(truth, loss.detach(), d_hidden, d_weight)
    assert truth.confident.any()
    assert found.pop("lse_error") is None
    assert max(found.values()) < 1e-9


def test_errors_tell_a_planted_fault(case, truth):
    """A gradient 1 % too long is 1 % off, in the part that has the fault and in no other."""
    outcome = CONTENDERS["ours-exact"].run(case, trainable=True)
    wrong = outcome._replace(d_weight=1.01 * outcome.d_weight, lse=outcome.lse + 0.5)
    found = errors(truth, *wrong)
    assert found["weight_error"] == pytest.approx(0.01, abs=1e-5)
    assert found["lse_error"] == pytest.approx(0.5, abs=1e-5)
    assert found["hidden_error"] < 1e-5


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_constraint_gradient(case, kind):
    """The constraint's own gradient is that of the whole loss less the cross-entropy's."""
    safety, reference = case.constraint(8, kind)
    hidden = case.hidden_states.double().requires_grad_()
    arguments = (hidden, case.weight.double(), case.labels)
    both = linear_cross_entropy(
        *arguments, safety=safety, reference=reference.double(), backend="dense"
    )
    alone = linear_cross_entropy(*arguments, backend="dense")
    want = torch.autograd.grad(both - alone, hidden)[0]
    rows = torch.tensor([0, 5, 95])
    got = constraint_gradient(case, safety, reference, rows)
    torch.testing.assert_close(got, want[rows], rtol=1e-9, atol=1e-12)


def test_live_share_is_that_of_the_definition(case):
    """A pair counts if its tile holds more than ε of what lies outside the label's tile."""
    p = torch.softmax(case.hidden_states.double() @ case.weight.double().T, -1)
    mass = p.view(96, -1, TILE).sum(-1)
    own = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, case.labels[:, None] // TILE, True)
    open_mass = mass.masked_fill(own, 0.0).sum(-1, keepdim=True)
    live = own | (mass > 2.0**-7 * open_mass)
    share, dead_mass = live_share(case, None, filter_eps=2.0**-7, screen="exact")
    pairs = live.sum().item()
    assert share * live.numel() == pytest.approx(pairs, abs=2)  # a pair at the very threshold
    assert dead_mass == pytest.approx(mass[~live].sum().item() / 96, rel=1e-3)


def test_synthetic_rows_are_like_a_language_model_s():
    """Entropy 2 to 3 nats, some rows sure and some not, and labels from the model's own softmax."""
    case = synthetic(1024, 8192, 64)
    facts = truth_of(case).statistics()
    assert 2.0 < facts["entropy"] < 3.0
    # calibrated: the mean loss is the mean entropy, within four standard errors of some 2/√1024
    assert facts["loss"] == pytest.approx(facts["entropy"], abs=0.25)
    assert facts["p_label_q10"] < 0.02
    assert facts["p_label_q90"] > 0.75
    assert 0.0 < facts["confident"] < 0.2
    assert torch.equal(case.labels, synthetic(1024, 8192, 64).labels)


@pytest.mark.parametrize("positions", ["responses", "all"])
def test_states_of_a_model(tiny_model_dir, tmp_path, positions):
    """States times head are the model's logits, labels the tokens that come next."""
    from str_kernels.bench.reading import read_states
    from str_kernels.inputs.loading import load_model_and_tokenizer

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "how to clean a lamp ?", "response": "a ball ."}) + "\n")
    states, labels, weight = read_states(str(tiny_model_dir), data, 100, positions)
    model, tokenizer = load_model_and_tokenizer(tiny_model_dir, device="cpu")
    from str_kernels.inputs.data import encode_file, read_numbered

    whole = encode_file(data, read_numbered(data), tokenizer, max_length=512).sequences[0]
    targets = whole.labels if positions == "responses" else whole.input_ids
    wanted = [i for i in range(1, len(targets)) if targets[i] != -100]
    assert labels.tolist() == [targets[i] for i in wanted]
    with torch.no_grad():
        logits = model(torch.tensor([whole.input_ids])).logits[0]
    torch.testing.assert_close(states @ weight.T, logits[[i - 1 for i in wanted]].float())


def test_calibration_rows_are_not_measured(tiny_model_dir):
    """The index is made from rows of the same text, but other ones; prose by default."""
    case = from_model(str(tiny_model_dir), None, 64)
    assert len(case.labels) == 64
    assert len(case.calibration) > 64
    assert not (case.hidden_states[:, None] == case.calibration).all(-1).all()


def test_a_peer_that_fails_is_a_row_with_its_reason(case):
    """A peer's error is one line; a failure of our own is raised."""

    def broken(case, hidden, weight):
        raise RuntimeError("no active driver\nand more")

    row = measure(Contender("peer", "", broken, package="torch"), case)
    assert row["reason"] == "failed: RuntimeError: no active driver"
    with pytest.raises(RuntimeError, match="no active driver"):
        measure(Contender("ours", "", broken), case)


def test_what_cannot_run_says_why(case):
    """Not installed, and too large for the memory."""
    absent = Contender("peer", "", None, package="no-such-package")
    assert measure(absent, case)["reason"] == "not installed (pip install no-such-package)"
    large = Contender("peer", "", lambda *_: torch.empty(1 << 50), package="torch")
    assert measure(large, case)["reason"] == "does not fit into memory"
    with pytest.raises(ValueError, match="contenders='nobody'"):
        chosen_contenders("ours,nobody")


def test_an_interrupted_comparison_goes_on(case, tmp_path):
    """What the file holds is not measured again, unless it is asked for."""
    path = tmp_path / "bench.jsonl"
    chosen = chosen_contenders("ours,transformers")
    compare(Results(path, KEYS), case, chosen[:1], repeats=1)
    _, first = read_rows(path, SCHEMA)
    rows = compare(Results(path, KEYS), case, chosen, repeats=1)
    assert [row["contender"] for row in rows] == ["ours", "inputs", "transformers"]
    assert rows[0] == first[1]
    assert rows[0]["hidden_error"] < 0.01
    assert "live pairs" in inputs_line(rows)
    again = compare(Results(path, KEYS, again=True), case, chosen[:1], repeats=1)
    assert next(row for row in again if row["contender"] == "ours")["ratios"] != rows[0]["ratios"]


def test_every_shape_has_a_plot(case, tmp_path):
    """Inputs of one name in two shapes: two plots, and one file with both tables."""
    results, chosen = Results(tmp_path / "bench.jsonl", KEYS), chosen_contenders("transformers")
    for shape in (case, synthetic(64, 2048, 32)):
        compare(results, shape, chosen, repeats=1)
    table, *plots = publish(results)
    assert [plot.name for plot in plots] == [
        "bench-synthetic-float32.png",
        "bench-synthetic-float32-N64-V2048-D32.png",
    ]
    assert table.read_text().count("| transformers |") == 2


def test_results_of_another_machine_are_not_mixed(tmp_path):
    """A file from other circumstances, or no result at all, is refused by name."""
    path = tmp_path / "bench.jsonl"
    Results(path, KEYS).write()
    head, rows = read_rows(path, SCHEMA)
    head["circumstances"]["threads"] = 999
    write_rows(path, head, rows)
    with pytest.raises(ValueError, match="was measured with threads 999"):
        Results(path, KEYS)
    for text in ("[]", "", '{"schema": "other/1"}', json.dumps(head) + "\n{"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no result of a benchmark"):
            Results(path, KEYS)
