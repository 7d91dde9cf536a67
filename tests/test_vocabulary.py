"""The vocabulary index: a permutation, its tiles' means, and the refusal of another weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from str_kernels import VocabularyIndex, linear_cross_entropy, waits
from str_kernels.bench.launches import counted_launches
from str_kernels.options import TILE
from str_kernels.quantise import balance
from str_kernels.vocabulary import tile_means
from tests.backends.test_routed import clustered_case
from tests.oracle import relative_error


@pytest.mark.parametrize("vocab", [1, TILE, TILE + 1, 1000, 8 * TILE])
def test_order_is_a_permutation_and_means_are_the_tiles(vocab):
    """Any size, ragged last tile included."""
    weight = torch.randn(vocab, 16, generator=torch.Generator().manual_seed(vocab))
    index = VocabularyIndex.build(weight)
    assert torch.equal(index.order.sort().values, torch.arange(vocab))
    assert torch.equal(index.inverse[index.order], torch.arange(vocab))
    for tile, mean in enumerate(index.mean_rows):
        rows = weight[index.order[tile * TILE : (tile + 1) * TILE]]
        torch.testing.assert_close(mean, rows.mean(0))


def test_clusters_share_tiles():
    """On a clustered head an index keeps fewer pairs live than token order: less dead mass is left
    by the same ε, and the loss is closer to the truth.
    """
    case = clustered_case(vocab=4096, n=128)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    truth = case.truth()["hidden_states"]
    errors = [
        (case.run(filter_eps=2.0**-5, index=i, screen="exact")["hidden_states"] - truth).norm()
        for i in (index, None)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_distance_means_difference_of_logits():
    """Directions that no hidden state has part in do not decide who shares a tile."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 64, generator=g)
    weight[:, 2:] *= 10
    states = torch.zeros(200, 64)
    states[:, :2] = torch.randn(200, 2, generator=g)

    def spread(index: VocabularyIndex) -> float:
        """Share of the logits' variance that is left within tiles."""
        logits = weight[:, :2][index.order].view(-1, TILE, 2)
        return (logits.var(1).sum(-1).mean() / weight[:, :2].var(0).sum()).item()

    assert spread(VocabularyIndex.build(weight, states)) < 0.3
    assert spread(VocabularyIndex.build(weight)) > 0.8


@pytest.mark.parametrize("screen", [None, "int8", "fp8"])
def test_save_and_load(tmp_path, screen):
    """A file gives back the same index, quantised rows included."""
    case = clustered_case()
    index = VocabularyIndex.build(case.weight, case.hidden_states, screen=screen)
    index.save(tmp_path / "index.safetensors")
    loaded = VocabularyIndex.load(tmp_path / "index.safetensors")
    assert index._tensors().keys() == loaded._tensors().keys()
    for name, tensor in index._tensors().items():
        assert torch.equal(tensor.view(torch.uint8), getattr(loaded, name).view(torch.uint8))


@pytest.mark.parametrize(("screen", "bound"), [("int8", 0.01), ("fp8", 0.04)])
def test_quantised_rows_approximate(screen, bound):
    """int8 rounds to 1/254 of a row's largest value, e4m3 to 1/16 of each value (rms 2.7 %)."""
    case = clustered_case()
    index = VocabularyIndex.build(case.weight, screen=screen)
    rows = index.quantised.float() * index.row_scales[:, None]
    want = case.weight[index.order].float()
    assert (rows - want).norm() / want.norm() < bound


@pytest.mark.parametrize("screen", [None, "int8"])
def test_a_file_without_columns_is_read(tmp_path, screen):
    """Version 0.1 kept no factors of columns: its rows were not balanced, and are not now."""
    case, path = clustered_case(), tmp_path / "index.safetensors"
    index = replace(VocabularyIndex.build(case.weight, screen=screen), columns=None)
    assert "columns" not in index._tensors()
    index.save(path)
    got = VocabularyIndex.load(path)
    assert got.columns is None
    want = case.run(index=index, screen="int8")["loss"]
    assert torch.equal(case.run(index=got, screen="int8")["loss"], want)


def test_kept_rows_are_balanced():
    """What an index keeps in 8 bits has the columns' factors, which come from its states."""
    case = clustered_case()
    case.hidden_states[:, 3] *= 50
    index = VocabularyIndex.build(case.weight, case.hidden_states[None], screen="int8")
    assert torch.equal(index.columns, balance(case.hidden_states, case.weight))
    rows = index.quantised.float() * index.row_scales[:, None] / index.columns
    want = case.weight[index.order].float()
    assert relative_error(rows * index.columns, want * index.columns) < 0.01
    assert (rows - want)[:, 3].norm() < 0.01 * want[:, 3].norm()  # the column that counts


@pytest.mark.parametrize("ragged", [0, 5])
def test_hot_tiles_come_first(tmp_path, ragged):
    """Tiles that most states give enough of their probability to; at most one in 32, or none."""
    case = clustered_case(400, 64 * TILE + ragged, 24).to(torch.float32)
    case.hidden_states[:] = case.hidden_states[:1] + 0.1 * torch.randn(400, 24)
    index = VocabularyIndex.build(case.weight, case.hidden_states)
    assert torch.equal(index.hot, torch.arange(2))
    assert torch.equal(index.order.sort().values, torch.arange(len(case.weight)))
    means = index.mean_rows
    torch.testing.assert_close(means, tile_means(case.weight, index.order))
    logits = (case.hidden_states @ case.weight.T)[:, index.order]
    shares = torch.softmax(logits, 1)[:, : 64 * TILE].unflatten(1, (64, TILE)).sum(-1)
    live = (shares > 2.0**-11 * (1 - shares.amax(1, keepdim=True))).float().mean(0)
    assert live[:2].min() >= live[2:].max() - 0.1  # 256 of the states were looked at
    index.save(tmp_path / "index")
    assert torch.equal(VocabularyIndex.load(tmp_path / "index").hot, index.hot)
    replace(index, hot=torch.tensor([1, 3])).save(tmp_path / "index")
    with pytest.raises(ValueError, match="hot tiles are not the first"):
        VocabularyIndex.load(tmp_path / "index")
    assert VocabularyIndex.build(case.weight).hot is None


def test_another_weight_is_refused():
    """Another shape, other values: named errors; the same weight in bf16, or trained: fine."""
    case = clustered_case()
    index = VocabularyIndex.build(case.weight)
    index.check(case.weight.bfloat16())
    index.check((case.weight * 2).requires_grad_())
    with pytest.raises(ValueError, match="sampled rows differ by 100%"):
        index.check(case.weight * 2)
    with pytest.raises(ValueError, match=r"\[1100, 24\], this one is \[1099, 24\]"):
        index.check(case.weight[:-1])


def test_a_weight_changed_in_place_is_compared_again():
    """The comparison is remembered for one version of the weight, not for the tensor."""
    case = clustered_case()
    index = VocabularyIndex.build(case.weight)
    arguments = {"index": index, "filter_eps": 2.0**-11}
    linear_cross_entropy(case.hidden_states, case.weight, case.labels, **arguments)
    case.weight.mul_(3)
    with pytest.raises(ValueError, match="another weight"):
        linear_cross_entropy(case.hidden_states, case.weight, case.labels, **arguments)


def test_another_weight_at_the_same_address_is_compared():
    """Memory is used again: a new weight where the old one lay is no less another weight."""
    memory = torch.randn(300, 8)
    index = VocabularyIndex.build(memory)
    index.check(torch.from_numpy(memory.numpy()))
    memory.numpy()[:] = torch.randn(300, 8).numpy()  # as a new tensor would be: version 0 again
    with pytest.raises(ValueError, match="another weight"):
        index.check(torch.from_numpy(memory.numpy()))


def test_moved_index_is_the_same():
    """`to` keeps every tensor."""
    index = VocabularyIndex.build(torch.randn(300, 8), screen="int8")
    moved = index.to("cpu")
    assert all(torch.equal(moved._tensors()[name], x) for name, x in index._tensors().items())


def test_broken_files_are_refused(tmp_path):
    """Missing, not safetensors, another schema, a tensor missing, no permutation: each named."""
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        VocabularyIndex.load(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file"):
        VocabularyIndex.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="schema is None"):
        VocabularyIndex.load(path)
    schema = {"schema": "str_kernels.vocabulary_index/1"}
    save_file({"order": torch.arange(3)}, path, metadata=schema)
    with pytest.raises(ValueError, match="holds order, must hold mean_rows, order, sample"):
        VocabularyIndex.load(path)
    tensors = {"order": torch.tensor([0, 0]), "mean_rows": torch.zeros(1, 2)}
    save_file({**tensors, "sample": torch.zeros(2, 2)}, path, metadata=schema)
    with pytest.raises(ValueError, match="not a permutation"):
        VocabularyIndex.load(path)


def test_bad_arguments():
    """Hidden states of another size or with NaN, a weight with NaN, an unknown screen."""
    weight = torch.randn(300, 8)
    with pytest.raises(ValueError, match="weight holds NaN or inf"):
        VocabularyIndex.build(torch.full((300, 8), float("nan")))
    with pytest.raises(ValueError, match="D=8"):
        VocabularyIndex.build(weight, torch.randn(4, 9))
    with pytest.raises(ValueError, match="NaN or inf"):
        VocabularyIndex.build(weight, torch.full((4, 8), float("nan")))
    with pytest.raises(ValueError, match="screen='bf16'"):
        VocabularyIndex.build(weight, screen="bf16")


def test_means_of_a_bf16_weight_are_fp32():
    """Means are summed in fp32: a bf16 sum of 128 rows would lose 5 bits."""
    weight = torch.randn(2 * TILE + 3, 8).bfloat16()
    want = weight[: 2 * TILE].double().view(2, TILE, 8).mean(1)
    torch.testing.assert_close(tile_means(weight, None)[:2].double(), want, rtol=1e-6, atol=1e-6)


def test_another_weight_is_found_late_where_the_host_must_not_wait(no_waits):
    """At first at once; a change that torch counts, in the next call; ``.data`` within 100."""
    weight, good = torch.randn(300, 8), torch.randn(300, 8)
    index = VocabularyIndex.build(weight)
    with pytest.raises(ValueError, match="another weight"):
        VocabularyIndex.build(good).check(weight)
    index.check(weight)
    with counted_launches() as found:
        for _ in range(99):
            index.check(weight)
    assert not found.torch
    assert not found.waits
    weight.mul_(2.0)
    with counted_launches() as found:
        index.check(weight)
    assert not found.waits
    with pytest.raises(ValueError, match=r"another weight of this shape .*100%"):
        waits.judge_arrived()
    weight.mul_(0.5)
    index.check(weight)
    weight.data.mul_(2.0)
    for _ in range(100):
        index.check(weight)
    with pytest.raises(ValueError, match="another weight"):
        waits.judge_arrived()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_built_under_autocast(dtype):
    """Few states with one massive column have a root: autocast rounds none of its products."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(600, 320, generator=source).to(dtype)
    states = torch.randn(40, 320, generator=source).to(dtype)
    states[:, 7] *= 300
    want = VocabularyIndex.build(weight, states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = VocabularyIndex.build(weight, states)
    assert torch.equal(got.order, want.order)
    assert torch.equal(got.mean_rows, want.mean_rows)
