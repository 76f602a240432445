"""LongBench and RULER: hand-worked scores, and small files of their formats read end to end."""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from typing import Any

import pytest

from benchmarks.quality import longbench, ruler, scores
from benchmarks.quality.generation import Generation


@pytest.fixture(scope="module")
def tokenizer(model_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


def write(path: pathlib.Path, *records: dict[str, Any]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return path


# -- scores ------------------------------------------------------------------------------------


def test_f1_of_words() -> None:
    assert scores.qa_f1("The cat sat.", "a cat") == pytest.approx(2 / 3)
    assert scores.qa_f1("It is Paris, France!", "paris") == pytest.approx(2 / 5)
    assert scores.qa_f1("a a the", "the") == 0


def test_f1_of_chinese_words() -> None:
    pytest.importorskip("jieba")
    assert scores.qa_f1_zh("北京。", "北京") == 1
    assert scores.qa_f1_zh("我爱北京", "北京") == pytest.approx(2 * 1 / (3 + 1))


def test_rouge_l() -> None:
    pytest.importorskip("rouge")
    # The longest common subsequence of "the cat sat" and "the cat ran" has 2 of 3 words.
    assert scores.rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    assert scores.rouge_l("the cat sat down here", "the cat ran") == pytest.approx(2 * 2 / 8)
    assert scores.rouge_l("", "the cat") == 0
    assert scores.rouge_l("...", "the cat") == 0


def test_rouge_l_of_chinese_words() -> None:
    pytest.importorskip("rouge")
    pytest.importorskip("jieba")
    assert scores.rouge_l_zh("我爱北京", "他爱北京") == pytest.approx(2 / 3)


def test_classification() -> None:
    classes = ["other number", "number", "person"]
    assert scores.classification("It is other number", "other number", classes) == 1
    assert scores.classification("other number", "number", classes) == 1 / 2
    assert scores.classification("person", "number", classes) == 0
    # Of two neighbours that are parts of the answer, LongBench drops only the first.
    assert scores.classification("abc", "abc", ["a", "ab", "abc"]) == 1 / 2


def test_numbers() -> None:
    assert scores.count("1, 2 and 2", "2") == pytest.approx(2 / 3)
    assert scores.count("none", "2") == 0
    assert scores.retrieval("Paragraph 3 or 13", "Paragraph 3") == 1 / 2
    assert scores.retrieval_zh("段落12", "段落12") == 1
    with pytest.raises(ValueError, match="'Absatz 3' names no paragraph"):
        scores.retrieval("3", "Absatz 3")


def test_code_similarity() -> None:
    assert scores.code_sim("\n# note\nx = 1\nrest", "x = 1") == 1
    assert scores.code_sim("x = 2", "x = 1") == pytest.approx(0.8)
    assert scores.code_sim("abc", "ab") == pytest.approx(0.8), "2 * 2 / 5"
    assert scores.code_sim("aab", "b") == 0.5, "2 * 1 / 4"
    assert scores.code_sim("a" * 7, "a" * 3) == pytest.approx(0.6), "2 * 3 / 10"
    assert scores.code_sim("ab", "a") == pytest.approx(0.67), "to whole hundredths"
    assert scores.code_sim("`x`", "x") == 0


def test_ruler_matches() -> None:
    assert scores.match_all("It is 12,\x0034 ", ["12", "34", "56"]) == pytest.approx(2 / 3)
    assert scores.match_all("HAMLET", ["Hamlet"]) == 1
    assert scores.match_part("It is 12", ["12", "34"]) == 1
    assert scores.match_part("It is 1", ["12", "34"]) == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(ImportError, match=r"'rouge': pip install vllm-kvcrush\[bench\]"):
        scores.rouge_l("a", "a")


# -- LongBench ---------------------------------------------------------------------------------


def record(dataset: str, **fields: Any) -> dict[str, Any]:
    """Returns a record with LongBench's fields."""
    common = {"length": 9, "dataset": dataset, "language": "en", "all_classes": None, "_id": "0"}
    return {**common, "input": "", "context": "", "answers": ["yes"], **fields}


def test_prompts_and_lengths_are_the_published_ones() -> None:
    prompts = {name: d.prompt for name, d in longbench.DATASETS.items()}
    lengths = {name: d.max_new_tokens for name, d in longbench.DATASETS.items()}
    digest = hashlib.sha256(json.dumps([prompts, lengths], sort_keys=True).encode()).hexdigest()
    # Of dataset2prompt.json and dataset2maxlen.json.
    assert digest == "0ea27b582687d50b5f685a70f57d43930743b17e8ad60852bd0d5680b237df8c"


def test_longbench_is_read(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    asked = {"input": "Who {sat}?", "context": "A cat sat on the mat. {x}", "answers": ["The cat"]}
    write(tmp_path / "hotpotqa.jsonl", record("hotpotqa", **asked), record("hotpotqa"))
    classes = {"answers": ["number"], "all_classes": ["number", "person"], "input": "Type:"}
    write(tmp_path / "trec_e.jsonl", record("trec", **classes))
    first, second, trec = longbench.load(tmp_path, tokenizer, 500, chat=False)
    assert (first.task, first.index, second.index) == ("longbench/hotpotqa", 0, 1)
    assert trec.task == "longbench/trec_e"
    assert (first.max_new_tokens, trec.max_new_tokens, first.context) == (32, 64, 500)
    text = tokenizer.decode(first.prompt)
    assert text == longbench.DATASETS["hotpotqa"].prompt.format(**asked)
    context, question = first.split("question_after")
    assert context + question == first.prompt
    assert tokenizer.decode(question).startswith("Answer the question based on the given passages")
    assert tokenizer.decode(context).strip().endswith("A cat sat on the mat. {x}")
    assert first.split("question_before") == (first.prompt[:-1], first.prompt[-1:])
    assert first.score("a cat") == 1 and first.score("It was\na cat") == pytest.approx(1 / 2)
    assert trec.score("\nnumber\nperson") == 1, "the first line only"
    assert [g.task for g in longbench.load(tmp_path, tokenizer, 500, ["trec_e"])] == [
        "longbench/trec_e"
    ]
    assert [g.index for g in longbench.load(tmp_path, tokenizer, 500, limit=1)] == [0, 0]


def test_longbench_takes_the_best_of_the_answers(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    write(tmp_path / "qasper.jsonl", record("qasper", answers=["no", "red cat"]))
    (qasper,) = longbench.load(tmp_path, tokenizer, 500)
    assert qasper.score("cat") == pytest.approx(2 / 3)


def test_long_prompts_lose_their_middle(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    context = " ".join(f"word{i}" for i in range(900))
    asked = {"context": context, "input": "Which word comes first?"}
    write(tmp_path / "musique.jsonl", record("musique", **asked))
    for chat in (False, True):
        (item,) = longbench.load(tmp_path, tokenizer, 400, chat=chat)
        text = tokenizer.decode(item.prompt)
        assert 390 <= len(item.prompt) <= 400
        assert "word0 word1 word2" in text and "word898 word899" in text
        assert "word450" not in text
        assert "Which word comes first?\nAnswer:" in tokenizer.decode(
            item.split("question_after")[1]
        )
        assert ("<|im_start|>assistant" in text) == chat
    with pytest.raises(ValueError, match="1 tokens are too few"):
        longbench.load(tmp_path, tokenizer, 1)


def test_a_question_cut_by_truncation_keeps_its_end(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    code = "\n".join(f"x{i} = {i}" for i in range(400))
    asked = {"context": "import os\n" * 200, "input": code, "answers": ["x400 = 400"]}
    write(tmp_path / "repobench-p.jsonl", record("repobench-p", **asked))
    (item,) = longbench.load(tmp_path, tokenizer, 200)
    assert "<|im_start|>" not in tokenizer.decode(item.prompt), "code goes without a template"
    context, question = item.split("question_after")
    assert tokenizer.decode(context).startswith("Please complete the code")
    assert "x0" not in tokenizer.decode(question)
    assert tokenizer.decode(question).endswith("x399 = 399Next line of code:\n")
    assert abs(len(context) - len(question)) <= 4
    assert item.score("x400 = 400") == 1


@pytest.mark.parametrize("name", longbench.DATASETS)
def test_every_dataset_is_asked(tmp_path: pathlib.Path, tokenizer: Any, name: str) -> None:
    asked = {"context": "Some context.", "input": "Some input.", "all_classes": ["yes"]}
    answers = {"passage_retrieval_en": ["Paragraph 1"], "passage_retrieval_zh": ["段落1"]}
    write(tmp_path / f"{name}.jsonl", record(name, **asked, answers=answers.get(name, ["yes"])))
    (item,) = longbench.load(tmp_path, tokenizer, 1000)
    assert isinstance(item, Generation)
    context, question = (tokenizer.decode(part) for part in item.split("question_after"))
    assert "Some context." in context
    assert "Some input." not in context
    asks = "{input}" in longbench.DATASETS[name].prompt
    assert ("Some input." in question) == asks


def test_broken_longbench_files_are_named(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            longbench.load(tmp_path, tokenizer, 500, **options)

    refused("has no <dataset>.jsonl of LongBench")
    path = write(tmp_path / "trec.jsonl", record("trec"))
    refused(r"trec\.jsonl, line 1: the field 'all_classes' must be a list of texts")
    write(path, record("trec", all_classes=["x"]), {"input": "x"})
    refused(r"trec\.jsonl, line 2: the field 'context' must be text")
    write(path, record("trec", answers=[]))
    refused(r"line 1: the field 'answers' must be a list of texts, and not empty")
    write(path, record("lsht", all_classes=["x"]))
    refused(r"line 1: a record of the dataset 'lsht'")
    path.write_text('\n{"input": "x"\n')
    refused(r"trec\.jsonl, line 2: is not JSON")
    path.write_text("[]\n")
    refused(r"line 1: is not a JSON object")
    path.write_text("\n")
    refused(r"trec\.jsonl has no records")
    refused("has no qasper.jsonl; it has trec", tasks=["qasper"])
    write(tmp_path / "mine.jsonl", record("mine"))
    refused(r"mine\.jsonl is not a dataset of LongBench v1, which are narrativeqa")
    with pytest.raises(ValueError, match="there is no folder"):
        longbench.load(tmp_path / "nowhere", tokenizer, 500)


# -- RULER -------------------------------------------------------------------------------------

NEEDLE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the number afterwards.\nOne of the special magic numbers for owl is: 7412853."
    "\nWhat is the special magic number for owl mentioned in the provided text?"
)
PREFIX = " The special magic number for owl mentioned in the provided text is"


def test_ruler_is_read(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    needle = {"index": 0, "input": NEEDLE, "outputs": ["7412853"], "length": 200}
    write(
        tmp_path / "niah_single_2" / "validation.jsonl",
        {**needle, "answer_prefix": PREFIX},
        {**needle, "index": 1, "input": NEEDLE + PREFIX},
    )
    reading = (
        "Answer the question based on the given documents. Only give me the answer.\n\nDocument 1:"
        " Oslo.\n\nAnswer the question based on the given documents.\n\nQuestion: Where? Answer:"
    )
    write(
        tmp_path / "qa_1" / "validation.jsonl",
        {"index": 0, "input": reading, "outputs": ["Oslo", "in Oslo"], "length": 90},
    )
    new, old, qa = ruler.load(tmp_path, tokenizer, 300)
    assert new.prompt == old.prompt, "newer files keep the answer's beginning apart"
    assert tokenizer.decode(new.prompt) == NEEDLE + PREFIX
    assert (new.task, old.index, qa.task) == ("ruler/niah_single_2", 1, "ruler/qa_1")
    assert (new.max_new_tokens, qa.max_new_tokens, new.context) == (128, 32, 300)
    context, question = (tokenizer.decode(part) for part in new.split("question_after"))
    assert context.endswith("is: 7412853.\n")
    assert question.startswith("What is the special magic number") and question.endswith(PREFIX)
    assert tokenizer.decode(qa.split("question_after")[0]).endswith("Oslo.\n\n"), "the last one"
    assert new.score(" 7412853. And so on") == 1 and new.score("741285") == 0
    assert qa.score("It is in Oslo.") == 1
    assert len(ruler.load(tmp_path, tokenizer, 300, ["niah_single_2"], limit=1)) == 1


@pytest.mark.parametrize(
    ("task", "asked"),
    [
        ("vt", "\nQuestion: Find all variables that are assigned the value 12 in the text above."),
        ("cwe", "\nQuestion: What are the 10 most common words in the above list?"),
        ("fwe", "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."),
    ],
)
def test_ruler_questions_are_found(
    tmp_path: pathlib.Path, tokenizer: Any, task: str, asked: str
) -> None:
    shot = f"An example.{asked} Answer: one"
    line = {"index": 0, "input": f"{shot}\nThe context.{asked}", "outputs": ["one", "two"]}
    write(tmp_path / task / "validation.jsonl", {**line, "length": 50})
    (item,) = ruler.load(tmp_path, tokenizer, 300)
    assert tokenizer.decode(item.split("question_after")[1]) == asked.strip()
    assert item.score("one, three") == 1 / 2


def test_broken_ruler_files_are_named(tmp_path: pathlib.Path, tokenizer: Any) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ruler.load(tmp_path, tokenizer, 60, **options)

    refused("has no <task>/validation.jsonl of RULER")
    path = write(tmp_path / "vt" / "validation.jsonl", {"input": "x", "outputs": ["y"]})
    refused(r"validation\.jsonl, line 1: no question that begins with 'Question: Find all")
    write(path, {"input": "x"})
    refused(r"line 1: the field 'outputs' must be a list of texts")
    question = "Question: Find all variables that are assigned the value 1"
    write(path, {"input": "word " * 80 + question, "outputs": ["y"]})
    refused(r"line 1: a prompt of \d+ tokens, of which there may be 60; name a folder of shorter")
    refused("has no cwe/validation.jsonl; it has vt", tasks=["cwe"])
    write(tmp_path / "mine" / "validation.jsonl", {"input": "x", "outputs": ["y"]})
    refused(r"mine/validation\.jsonl is not a task of RULER")
