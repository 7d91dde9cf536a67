"""`str-kernels doctor` says who owns the head's weight, here and under an accelerate config."""

from __future__ import annotations

import json

import pytest

from str_kernels.cli.owner import OWNERS, PLAIN, owner_here, owner_of
from tests.cli.calling import call

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "owner"),
    [
        ({}, "plain"),
        ({"WORLD_SIZE": "4"}, "plain"),  # nobody launched it
        (LAUNCHED, "DDP"),
        (LAUNCHED | {"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        (LAUNCHED | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        (LAUNCHED | {"ACCELERATE_USE_DEEPSPEED": "true",
                     "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO"),
        (LAUNCHED | {"ACCELERATE_USE_DEEPSPEED": "true",
                     "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        (LAUNCHED | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "TP"),
    ],
)  # fmt: skip
def test_a_launched_process(environment, owner):
    found = owner_here(environment)
    assert found["owner"] == owner
    assert found["head"] == OWNERS.get(owner, PLAIN)
    assert found["processes"] == (4 if "RANK" in environment else 1)


@pytest.mark.parametrize(
    ("text", "owner", "sequences"),
    [
        ("distributed_type: 'NO'", "plain", "whole"),
        ("distributed_type: MULTI_GPU\nnum_processes: 2", "DDP", "whole"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\nparallelism_config:\n"
         "  parallelism_config_cp_size: 2", "FSDP2", "split over processes, cp_size=2"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 3", "ZeRO-3", "whole"),
    ],
)  # fmt: skip
def test_a_file_of_accelerate(tmp_path, text, owner, sequences):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    found = owner_of(path)
    assert (found["owner"], found["sequences"]) == (owner, sequences)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "model: x"])
def test_another_file_is_refused(capsys, tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    code, _, err = call(capsys, "doctor", "--accelerate", path)
    assert code == 2
    assert f"accelerate={str(path)!r}" in err


def test_doctor_shows_it(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_version: 2}")
    code, out, _ = call(capsys, "doctor", "--json", "--accelerate", path)
    assert code == 0
    found = json.loads(out)["head"]
    assert (found["owner"], found["processes"]) == ("FSDP2", 8)
    assert found["head"] == OWNERS["FSDP2"]
