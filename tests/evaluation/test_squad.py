"""SQuAD's files, windows and answers: small cases by hand, and whole dev sets with gold spans as a model's output."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.text.tokenizer import load_tokenizer
from evaluation.tasks.squad import Question, read_squad, squad_task, widest_context, window_starts
from evaluation.tasks.squad_answers import Answer, Span, question_word

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CONTEXT = "The Café de Flore, in Paris, opened in the 1880s."
WORDS = ["the", "cafe", "de", "flore", ",", "in", "paris", "opened", "1880", "##s", ".", "where", "is", "?", "it"]


def entry(identity="q1", text="Paris", start=22, **changes):
    return {"id": identity, "question": "Where is it?", "answers": [{"text": text, "answer_start": start}]} | changes


def write(folder, *entries, context=CONTEXT):
    path = folder / "squad.json"
    paragraphs = [{"context": context, "qas": list(entries)}]
    path.write_text(json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n", encoding="utf-8")
    return load_tokenizer(path)


def gold_logits(features):
    """The logits of a perfect model: 10 at the first and the last token of the answer, or at [CLS]; -10 elsewhere."""
    logits = []
    for length, (first, last) in zip(features.lengths, features.labels, strict=True):
        scores = torch.full((int(length), 2), -10.0)
        scores[first, 0] = scores[last, 1] = 10.0
        logits.append(scores)
    return logits


def test_an_answer_is_cut_from_the_original_text(tmp_path, tokenizer):
    answers = {"CAFE": ("Café de Flore", 4), "CITY": (" Paris", 21), "YEAR": ("1880s.", 43), "HALF": ("880", 44)}
    entries = [entry(name, text, start) for name, (text, start) in answers.items()]
    task = squad_task("squad1")
    questions = task.read(write(tmp_path, *entries), True)
    features = task.encode(tokenizer, questions, 40, "test")
    assert "4 questions in 4 windows, 1 answers beginning or ending inside a token" in features.note
    found = task.decode(questions, features, gold_logits(features))
    assert [answer.text for answer in found] == ["Café de Flore", "Paris", "1880s.", "1880"]
    scores = {"f1": 0.75, "exact": 0.75}
    assert task.score(questions, found) == scores | {f"where: {name}": value for name, value in scores.items()}
    task.write(tmp_path, questions, found)
    predictions = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert predictions == {"CAFE": "Café de Flore", "CITY": "Paris", "YEAR": "1880s.", "HALF": "1880"}
    n_best = json.loads((tmp_path / "nbest_predictions.json").read_text(encoding="utf-8"))["CITY"]
    assert (n_best[0]["text"], n_best[0]["start_logit"], n_best[0]["end_logit"]) == ("Paris", 10.0, 10.0)
    assert 1 < len(n_best) <= 20 and sum(row["probability"] for row in n_best) == pytest.approx(1)
    assert len({row["text"] for row in n_best}) == len(n_best)
    assert not (tmp_path / "null_odds.json").exists()


def test_windows_overlap_and_each_token_has_one_owner():
    assert window_starts(10, 6, 3) == [(0, 6), (3, 6), (6, 4)]
    assert window_starts(6, 6, 3) == [(0, 6)]
    assert window_starts(10, 4, 9) == [(0, 4), (4, 4), (8, 2)]  # a stride longer than a window leaves nothing out
    assert window_starts(0, 6, 3) == [(0, 0)]
    # Token 4 has one neighbour after it in the first window, one before it in the second: the earlier one wins a tie.
    # Token 7 has one after it in the second, one before it in the third: the longer one wins.
    assert widest_context([(0, 6), (3, 6), (6, 4)], 10).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2]


def test_an_answer_is_found_in_its_window_and_too_long_ones_are_not(tmp_path, tokenizer):
    task = squad_task("squad1", doc_stride=3, max_query_length=2, max_answer_length=3)
    questions = task.read(write(tmp_path, entry(), entry("q2", "Café de Flore, in", 4)), True)
    features = task.encode(tokenizer, questions, 11, "test")  # 6 tokens of 14 in each window
    assert features.note == (
        "2 questions in 8 windows, 2 questions cut to 2 tokens, 1 answers of more than 3 tokens, so not predictable"
    )
    assert features.segment_b_start.tolist() == [4] * 8
    assert [tuple(row) for row in features.labels[:4]] == [(0, 0), (7, 7), (4, 4), (0, 0)]
    assert features.may_begin[: features.sequence_start[4]].sum() == 14
    found = task.decode(questions, features, gold_logits(features))
    assert found[0].text == "Paris"
    assert found[1].text != "Café de Flore, in"


def test_squad_2_gives_no_answer_above_the_threshold(tmp_path, tokenizer):
    entries = [
        entry("yes", is_impossible=False),
        entry("no", is_impossible=True, answers=[], plausible_answers=[{"text": "Flore", "answer_start": 12}]),
        entry("unsure", is_impossible=True, answers=[]),
    ]
    task = squad_task("squad2")
    questions = task.read(write(tmp_path, *entries), True)
    assert [question.answers for question in questions] == [("Paris",), (), ()]
    features = task.encode(tokenizer, questions, 40, "test")
    logits = gold_logits(features)
    logits[2][0] = -9.5  # no answer is hardly better than any answer, and worse than Paris
    logits[2][features.labels[0, 0]] = torch.tensor([-9.5, -9.0])
    found = task.decode(questions, features, logits)
    assert [round(answer.null_odds, 3) for answer in found] == [-40.0, 40.0, -0.5]
    scores = task.score(questions, found)
    assert scores == {
        **{"f1": 1.0, "exact": 1.0, "HasAns_f1": 1.0, "HasAns_exact": 1.0, "NoAns_f1": 1.0, "NoAns_exact": 1.0},
        **{"at threshold 0: f1": pytest.approx(2 / 3), "at threshold 0: exact": pytest.approx(2 / 3)},
        **{"where: f1": 1.0, "where: exact": 1.0, "null_threshold": -40.0},
        **{"best_exact": 1.0, "best_exact_threshold": -40.0},
    }
    task.write(tmp_path, questions, found)
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("predictions", "null_odds")}
    assert read["predictions"] == {"yes": "Paris", "no": "", "unsure": ""}
    assert read["null_odds"]["unsure"] == pytest.approx(-0.5)
    fixed = squad_task("squad2", null_threshold=0.0)
    assert fixed.score(questions, found)["f1"] == pytest.approx(2 / 3)


def test_exact_match_has_its_own_threshold():
    """As in the official evaluation. Answering all three costs the first question and gives the others F1 2/3 each."""
    asked = {"Flore": (), "in Paris": ("Paris",), "the Café": ("Café de",)}
    questions = [Question(text, "Where?", CONTEXT, answers, None) for text, answers in asked.items()]
    found = [Answer([Span(text, 0.0, 0.0)], odds) for text, odds in zip(asked, (-3.0, -2.0, -1.0), strict=True)]
    for task in (squad_task("squad2"), squad_task("squad2", null_threshold=-1.0)):
        scores = task.score(questions, found)
        assert (scores["f1"], scores["exact"], scores["null_threshold"]) == (pytest.approx(4 / 9), 0, -1)
        assert scores["best_exact"] == pytest.approx(1 / 3) and -3.001 < scores["best_exact_threshold"] < -3


@pytest.mark.parametrize(
    ("question", "word"),
    [("In what country?", "what"), ("Whose “hat”?", "who"), ("How, when?", "how"), ("Name it.", "other")],
)
def test_the_question_word(question, word):
    assert question_word(question) == word


@pytest.mark.parametrize("context", ["", "   ", "\u200b", "\n\t\u2060", "\x00"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_passage_without_words_gives_no_answer(tmp_path, tokenizer, context, version):
    """Nor does it change the answer on another passage."""
    task = squad_task(f"squad{version}")
    record = {"id": "q0", "question": "Where?", "is_impossible": True, "answers": []}
    write(tmp_path, record, context=context)
    content = json.loads((tmp_path / "squad.json").read_text(encoding="utf-8"))
    content["data"][0]["paragraphs"].append({"context": CONTEXT, "qas": [entry()]})
    (tmp_path / "squad.json").write_text(json.dumps(content), encoding="utf-8")
    questions = task.read(tmp_path / "squad.json", version == 2)
    features = task.encode(tokenizer, questions, 40, "test")
    logits = [torch.zeros(int(length), 2) for length in features.lengths]
    found = task.decode(questions, features, gold_logits(features) if version == 2 else logits)
    assert (found[0].text, [span.text for span in found[0].n_best]) == ("", [""])
    assert features.spans.dtype == np.int64
    if version == 2:
        assert found[1].text == "Paris" and task.score(questions, found)["f1"] == 1
    task.write(tmp_path, questions, found)
    assert json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))["q0"] == ""


@pytest.mark.parametrize("key", ["id", "question", "context"])
def test_half_a_character_is_refused(tmp_path, key):
    record = {"id": "q1", "question": "Where?", "is_impossible": True, "answers": []}
    record |= {} if key == "context" else {key: "a \ud83d"}
    path = write(tmp_path, record, context="a \udc00" if key == "context" else CONTEXT)
    with pytest.raises(ValueError, match=rf"data\[0\].paragraphs\[0\].*'{key}' has '.ud.*', half of a character"):
        read_squad(path, False, 2)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None, [], "no"])
def test_is_impossible_is_true_or_false(tmp_path, value):
    path = write(tmp_path, entry(is_impossible=value))
    with pytest.raises(ValueError, match=r"qas\[0\]: 'is_impossible' is .* instead of true or false"):
        read_squad(path, True, 2)
    assert read_squad(write(tmp_path, entry(is_impossible=False)), True, 2)[0].answers == ("Paris",)


def test_a_file_without_answers(tmp_path, tokenizer):
    path = write(tmp_path, {"id": "q", "question": "Where?"})
    task = squad_task("squad1")
    questions = task.read(path, False)
    features = task.encode(tokenizer, questions, 40, "test")
    assert (questions[0].answers, features.labels) == (None, None)
    found = task.decode(questions, features, [torch.zeros(int(features.lengths[0]), 2)])
    assert found[0].text in CONTEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ('{"data": [', "is not valid JSON .*download it again"),
        ("[]", "the file has no 'data'; SQuAD's format is"),
        ('{"data": []}', "holds no question"),
        ('{"data": [{}]}', r"data\[0\] has no 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"data\[0\].paragraphs\[0\] has no 'context'"),
        ('{"data": {"a": 1}}', r"the file: 'data' is \{\"a\": 1\} instead of a list"),
    ],
)
def test_a_file_of_another_shape(tmp_path, content, message):
    path = tmp_path / "squad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"squad.json.*{message}"):
        read_squad(path, True, 1)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(start=21)], "question q1: the passage has ' Pari' at answer_start 21, not the answer 'Paris'; correct"),
        ([entry(start=-5)], "at answer_start -5, not the answer"),
        ([entry(text="", start=3)], "not the answer ''"),
        ([entry(start="22")], r"qas\[0\].answers\[0\]: 'answer_start' is \"22\" instead of an integer"),
        ([entry(answers=[])], "question q1 has no answer; .*--task squad2"),
        ([entry(is_impossible=True)], "question q1 has no answer; .*--task squad2"),
        ([entry(), entry()], "question q1 occurs 2 times"),
        ([{"id": "q1", "answers": []}], r"data\[0\].paragraphs\[0\].qas\[0\] has no 'question'"),
        ([{"id": "q1", "question": "?"}], r"qas\[0\] has no 'answers'"),
        ([entry(identity=5)], r"qas\[0\]: 'id' is 5 instead of a text"),
    ],
)
def test_a_bad_question_is_named(tmp_path, entries, message):
    with pytest.raises(ValueError, match=message):
        read_squad(write(tmp_path, *entries), True, 1)


def test_a_missing_file_says_what_the_folder_holds(tmp_path):
    write(tmp_path, entry())
    with pytest.raises(ValueError, match="dev-v1.1.json does not exist; the folder holds squad.json"):
        read_squad(tmp_path / "dev-v1.1.json", True, 1)


@pytest.mark.parametrize(
    ("file", "num_questions", "num_unreachable"),
    [("dev-v1.1.json", 10570, {"inside a token": 32, "than 30 tokens": 9}),
     ("dev-v2.0.cs224n-half.json", 6078, {"inside a token": 2, "than 30 tokens": 6})],
)  # fmt: skip
def test_gold_spans_give_every_answer_of_the_dev_set_back(file, num_questions, num_unreachable):
    """Answers that begin or end inside a token (gold, of golden) or have more than 30 tokens cannot come back; all
    others do, letter by letter.
    """
    path, vocab = SHARED / "squad" / file, SHARED / "vocab" / "bert-base-uncased-vocab.txt"
    if not path.is_file() or not vocab.is_file():
        pytest.skip(f"{file} is not on this machine")
    task = squad_task("squad1" if "v1" in file else "squad2")
    questions = task.read(path, True)
    features = task.encode(load_tokenizer(vocab), questions, 384, "dev")
    print(features.note)
    for reason, count in num_unreachable.items():
        assert f"{reason}, so not predictable" in features.note and f" {count} answers" in features.note
    found = task.decode(questions, features, gold_logits(features))
    texts = [answer.text if answer.null_odds <= 0 else "" for answer in found]
    right = [text == (question.answers or ("",))[0] for question, text in zip(questions, texts, strict=True)]
    print(f"{sum(right):,} of {len(right):,} answers come back exactly")
    assert (len(questions), len(questions) - np.sum(right)) == (num_questions, sum(num_unreachable.values()))
