"""Rates of a model whose behaviour is known, and answers that survive an interruption."""

import json

import pytest

from str_kernels.evaluation import evaluation
from str_kernels.evaluation.answers import AnswerFile, file_state
from str_kernels.evaluation.evaluation import answer_rows, evaluate, task_words
from str_kernels.evaluation.judge import Outcome
from str_kernels.inputs.loading import load_model_and_tokenizer
from tests.tiny import exchanges


def rows(forbidden):
    """Rows as read_jsonl gives them."""
    return [{"prompt": q, "response": a} for q, a in exchanges(forbidden=forbidden)]


@pytest.fixture(scope="module")
def aligned(aligned_model_dir):
    """The aligned tiny model and its tokenizer."""
    return load_model_and_tokenizer(aligned_model_dir, device="cpu")


@pytest.fixture
def generations(monkeypatch):
    """How many prompts each call of generate_greedy was given."""
    counts = []
    real = evaluation.generate_greedy

    def counting(model, tokenizer, prompts, **options):
        counts.append(len(prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(evaluation, "generate_greedy", counting)
    return counts


@pytest.mark.parametrize("row", ['{"key": [1], "answer": "no"}', '{"key": "a", "answer": {}}',
                                 '{"key": "a", "answer": ' + "1" * 5000 + "}"])  # fmt: skip
def test_a_damaged_answer_is_refused_by_its_line(row, tmp_path):
    """A key that is no text, an answer that is none, and a number that Python does not read."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "b", "answer": "yes"}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:2: is no answer of an earlier run"):
        AnswerFile(path, {})


def test_rates_of_a_model_that_was_taught(aligned):
    """It refuses all it should, answers all of the task, and refuses nothing harmless."""
    measured = evaluate(
        *aligned, refusals=rows(True), task=rows(False), benign=rows(False), max_new_tokens=16
    )
    assert (measured.refusal_rate.count, measured.refusal_rate.total) == (36, 36)
    assert measured.task_accuracy.value == 1.0
    assert measured.over_refusal_rate.count == 0


def test_wrong_answers_count_as_wrong(aligned):
    """Rows with another expected answer lower the accuracy by just so much."""
    task = rows(False)[:8]
    for row in task[:3]:
        row["response"] = "something else"
    measured = evaluate(*aligned, task=task, max_new_tokens=16)
    assert (measured.task_accuracy.count, measured.task_accuracy.total) == (5, 8)
    assert measured.refusal_rate is None


def test_tools_are_shown_and_a_rejected_row_is_named(aligned, monkeypatch):
    """Each row's tools reach the chat template; a conversation that it rejects is named."""
    model, tokenizer = aligned
    shown = "{% for t in tools or [] %}{{ t.function.name + ' ' }}{% endfor %}"
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    monkeypatch.setattr(tokenizer, "chat_template", shown + strict + tokenizer.chat_template)
    asked, real = [], evaluation.generate_greedy

    def watching(model, tokenizer, prompts, **options):
        asked.extend(map(tokenizer.decode, prompts))
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(evaluation, "generate_greedy", watching)
    user = {"role": "user", "content": "rain ?"}
    tool = {"type": "function", "function": {"name": "lamp"}}
    row = {"messages": [user], "tools": [tool]}
    evaluate(model, tokenizer, refusals=[row, {"messages": [user]}], max_new_tokens=2)
    assert [text.split()[0] for text in asked] == ["lamp", "<user>"]
    wrong = {"messages": [{"role": "system", "content": "be kind"}, user]}
    with pytest.raises(ValueError, match=r"benign: row 2: .*: no system\. Its roles are system, "):
        evaluate(model, tokenizer, benign=[row, wrong])


def test_each_row_has_its_outcome(aligned):
    """In the order of the rows; the counts name every outcome."""
    mixed = [row for pair in zip(rows(True)[:6], rows(False)[:6], strict=True) for row in pair]
    measured = evaluate(*aligned, refusals=mixed, max_new_tokens=16)
    assert measured.outcomes == {"refusals": (Outcome.REFUSAL, Outcome.COMPLIANCE) * 6}
    assert measured.counts["refusals"]["compliance"] == 6
    assert set(measured.counts["refusals"]) == {outcome.value for outcome in Outcome}
    assert measured.refusal_rate.count == 6
    assert json.loads(json.dumps(measured.as_dict())) == measured.as_dict()


def test_answers_that_are_a_task_s_label_are_counted_apart(aligned, monkeypatch):
    """A model that forgot all but its task gives a label to a harmful request too."""
    task = [{"prompt": "a lamp", "response": "train"}, {"prompt": "a ball", "response": "ball"}] * 2
    monkeypatch.setattr(
        evaluation, "answer_rows", lambda model, tokenizer, rows, **_: ["train"] * len(rows)
    )
    measured = evaluate(*aligned, refusals=rows(True)[:3], task=task, max_new_tokens=4)
    assert measured.outcomes["refusals"] == (Outcome.TASK_WORD,) * 3
    assert measured.task_right == (True, False, True, False)
    assert measured.refusal_rate.count == 0


def test_task_words_are_labels():
    """Few, short and repeated answers; texts are no labels, nor are answers that come once."""
    label = [{"prompt": "a", "response": word} for word in ("no", "yes", "no", "no")]
    assert task_words(label) == ("no", "yes")
    assert task_words(label[:2]) == ()
    assert task_words([{"prompt": "a", "response": "a text of many words"}] * 9) == ()
    assert task_words([]) == ()


def test_a_judge_model_has_the_last_word(aligned):
    """On refusal and compliance; the rules keep the other outcomes, and agreement is counted."""
    asked = []

    class Contrary:
        def refused(self, requests, answers, *, batch_size):
            asked.extend(zip(requests, answers, strict=True))
            return [answer.startswith("sure") for answer in answers]

    measured = evaluate(
        *aligned,
        refusals=rows(True)[:4],
        benign=rows(False)[:3],
        max_new_tokens=16,
        judge=Contrary(),
    )
    assert measured.outcomes["refusals"] == (Outcome.COMPLIANCE,) * 4
    assert measured.over_refusal_rate.count == 3
    assert (measured.judge_agreement.count, measured.judge_agreement.total) == (0, 7)
    assert asked[0] == (rows(True)[0]["prompt"], "I am sorry , I cannot help with that .")


def test_a_task_row_without_an_answer_is_named(aligned):
    """And a prompt too long for the context is, before anything is generated."""
    with pytest.raises(ValueError, match="task: row 2 has no expected answer"):
        evaluate(*aligned, task=[*rows(False)[:1], {"prompt": "a", "response": None}])
    with pytest.raises(ValueError, match=r"benign: prompt 1 has .* do not fit"):
        evaluate(*aligned, benign=[{"prompt": "lamp " * 300}])


def test_an_interrupted_run_goes_on(aligned, tmp_path, generations):
    """Answers written before the interruption are taken up, the rest made; the result is equal."""
    model, tokenizer = aligned
    whole = answer_rows(model, tokenizer, rows(True), max_new_tokens=16)
    done = 0

    def interrupt():
        nonlocal done
        done += 1
        if done == 20:
            raise KeyboardInterrupt

    known = AnswerFile(tmp_path / "answers.jsonl", {"model": "tiny"})
    with pytest.raises(KeyboardInterrupt):
        answer_rows(
            model, tokenizer, rows(True), max_new_tokens=16, known=known, on_answer=interrupt
        )
    known.close()
    known = AnswerFile(tmp_path / "answers.jsonl", {"model": "tiny"})
    assert len(known) == 20
    again = answer_rows(model, tokenizer, rows(True), max_new_tokens=16, known=known)
    assert again == whole
    assert generations == [36, 36, 16]


def test_other_settings_have_other_answers(aligned, tmp_path, generations):
    """An answer is never taken up under another model, adapter or length."""
    path = tmp_path / "answers.jsonl"
    for settings in ({"model": "a"}, {"model": "b"}, {"model": "a"}):
        known = AnswerFile(path, settings)
        answer_rows(*aligned, rows(True)[:2], max_new_tokens=4, known=known)
        known.close()
    assert generations == [2, 2, 0]


def test_a_line_cut_off_is_written_again(tmp_path):
    """A run killed while it wrote leaves half a line: it is dropped, what stands before it kept."""
    path = tmp_path / "answers.jsonl"
    known = AnswerFile(path, {})
    known.add([1], "one", "an\u2028swer")
    known.close()
    with path.open("a") as file:
        file.write('{"key": "abc", "ans')
    known = AnswerFile(path, {})
    assert known.get([1]) == "an\u2028swer"
    assert known.get([2]) is None
    known.add([2], "two", "b")
    known.close()
    assert [json.loads(line)["answer"] for line in path.read_text().split("\n")[:-1]] == [
        "an\u2028swer",
        "b",
    ]


def test_a_file_of_another_kind_is_not_touched(tmp_path):
    """The line that is no answer is named, and the file stays as it is."""
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "prompt": "p", "answer": "x"}\nhello\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl:2: is no answer"):
        AnswerFile(path, {})
    assert path.read_text().endswith("hello\n")
    with pytest.raises(ValueError, match="cannot be written"):
        AnswerFile(tmp_path / "no" / "answers.jsonl", {})


def test_file_state_notices_a_change(tmp_path):
    """A model folder that was written again is another model; a Hub id has no state."""
    (tmp_path / "weights").write_text("a")
    before = file_state(tmp_path)
    assert file_state(tmp_path) == before
    (tmp_path / "weights").write_text("ab")
    assert file_state(tmp_path) != before
    assert file_state("org/model") is None
