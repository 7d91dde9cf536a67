"""The page of two evaluations: answers in their places, none of them markup, filtered."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from str_kernels.evaluation.answers import AnswerFile, answers_beside
from str_kernels.evaluation.comparison import Evaluated, page, pairs
from str_kernels.evaluation.evaluation import SCHEMA
from str_kernels.evaluation.rates import Rate

NASTY = "</td><script>document.title='owned'</script> \"quoted\" & $rows\nnext 'line' <b class=x>"
REQUESTS = ["first", "second", NASTY]


def evaluated(folder, name, texts, verdicts, requests=REQUESTS, **changes) -> Evaluated:
    """A result and its answers, as ``evaluate --out`` writes them."""
    path = folder / f"{name}.json"
    known = AnswerFile(answers_beside(path), {"model": name})
    prompts = [[i] for i in range(len(requests))]
    for prompt, request, answer in zip(prompts, requests, texts, strict=True):
        known.add(prompt, request, answer)
    known.close()
    rate = Rate.of(verdict == "refusal" for verdict in verdicts).as_dict()
    result = {
        "schema": SCHEMA,
        "model": name,
        "adapter": "<adapter>",
        "refusal_rate": rate,
        "outcomes": {"refusals": verdicts},
        "task_right": [],
        "answers": {"refusals": list(map(known.key, prompts))},
        **changes,
    }
    path.write_text(json.dumps(result))
    return Evaluated(path)


@pytest.fixture
def two(tmp_path):
    first = evaluated(tmp_path, "a", ["no", "no", NASTY], ["refusal", "refusal", "refusal"])
    second = evaluated(
        tmp_path, "b", ["yes", "", "no"], ["compliance", "empty", "refusal"], REQUESTS[::-1]
    )
    return first, second


class Read(HTMLParser):
    """What a browser would show: tags in their order, and the text of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.rows, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append((dict(attrs), []))
        self._inside = tag == "div"

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "div"

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][1].append(data)


def test_requests_meet_their_answers(two):
    """By request, whatever the order of the files was."""
    assert [(p.request, p.first.text, p.second.text) for p in pairs(*two)] == [
        ("first", "no", "no"),
        ("second", "no", ""),
        (NASTY, NASTY, "yes"),
    ]
    assert [p.second.verdict for p in pairs(*two)] == ["refusal", "empty", "compliance"]


def test_texts_are_texts(two):
    """Nothing of a request, an answer or a name becomes markup, and nothing is lost."""
    text = page(*two)
    read = Read(text)
    shown = [cells for data, cells in read.rows if "data-set" in data]
    assert shown == [["first", "no", "no"], ["second", "no"], [NASTY, NASTY, "yes"]]
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert "a with &lt;adapter&gt;" in text
    assert str(Rate(3, 3)) in text


def test_the_page_needs_nothing_else(two):
    """No address, no other file, and a policy that forbids both."""
    text = page(*two)
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    assert "default-src 'none'" in text


def test_equal_requests_are_matched_in_their_order(tmp_path):
    """As often as both have them."""
    first = evaluated(tmp_path, "a", ["1", "2", "3"], ["refusal"] * 3, ["same"] * 3)
    second = evaluated(tmp_path, "b", ["4", "5"], ["refusal"] * 2, ["same"] * 2)
    assert [(p.first.text, p.second.text) for p in pairs(first, second)] == [("1", "4"), ("2", "5")]


def test_what_cannot_be_compared_is_named(tmp_path, two):
    """No result, one of an earlier version, lost answers, other requests."""
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: is no result of str-kernels evaluate"):
        Evaluated(tmp_path / "other.json")
    with pytest.raises(ValueError, match="has no answers with verdicts; run evaluate --out again"):
        evaluated(tmp_path, "old", ["x"] * 3, ["refusal"] * 3, answers={})
    other = evaluated(tmp_path, "c", ["x"], ["refusal"], ["elsewhere"])
    with pytest.raises(ValueError, match="have no request in common"):
        pairs(two[0], other)
    answers_beside(other.path).unlink()
    with pytest.raises(ValueError, match=r"c\.json\.answers\.jsonl: no such file"):
        Evaluated(other.path)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
CHOOSE = """<script>
document.forms.filters.{name}.{property} = {value};
document.forms.filters.dispatchEvent(new Event("input"));
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    ("name", "property", "value", "shown"),
    [
        ("text", "value", "''", 3),
        ("second", "value", "'compliance'", 1),
        ("set", "value", "'requests to refuse'", 3),
        ("differs", "checked", "true", 2),
        ("text", "value", "'QUOTED'", 1),
    ],
)
def test_a_browser_filters(two, tmp_path, name, property, value, shown):
    """Chromium runs the page's own script under its policy; no answer's script runs."""
    chosen = CHOOSE.format(name=name, property=property, value=value)
    file = tmp_path / "page.html"
    file.write_text(page(*two).replace("</body>", chosen))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'u'}")
    command = [CHROMIUM, *options, "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    rows = re.findall(r"<tr data-set=[^>]*>", dom)
    assert len(rows) == 3
    assert sum("hidden" not in row for row in rows) == shown
    assert "owned</title>" not in dom
