from benchmarks.safety.data import anchor_rows, load_split


def test_half_of_the_anchors_are_benign(data):
    rows = anchor_rows(data, 10)
    assert [("steal" in row["prompt"], "clean" in row["prompt"]) for row in rows] == [
        (True, False),
        (False, True),
    ] * 5
    asked = {
        r["prompt"]
        for name in ("refusals", "lookalike_benign")
        for r in load_split(data, name).test
    }
    assert not asked & {row["prompt"] for row in rows}
