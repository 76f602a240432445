"""Scores answers by LongBench's (v1) and RULER's own metrics, each from 0 to 1.

Where a published metric is odd, so is this one: the numbers must compare with published ones.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢"
    "｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def _optional(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"LongBench's scores need the package {package!r}: pip install vllm-kvcrush[bench]"
        ) from error


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Returns the F1 of two bags of words."""
    same = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def qa_f1(prediction: str, answer: str) -> float:
    """Returns the F1 over words, without case, punctuation and articles."""

    def words(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    return _f1(words(prediction), words(answer))


def _chinese_words(text: str) -> list[str]:
    jieba = _optional("jieba")
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text, cut_all=False))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """Returns the F1 over Chinese words, without punctuation."""
    dropped = set(string.punctuation + _CHINESE_PUNCTUATION)

    def words(text: str) -> list[str]:
        cut = (
            "".join(c for c in word.lower() if c not in dropped) for word in _chinese_words(text)
        )
        return [word for word in ("".join(part.split()) for part in cut) if word]

    return _f1(words(prediction), words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L's F1. As in LongBench, 0 where the package gives up: on an empty text, or on a
    sentence too long for its recursion."""
    rouge = _optional("rouge").Rouge(metrics=["rouge-l"])
    try:
        return float(rouge.get_scores([prediction], [answer])[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L's F1 over Chinese words."""
    return rouge_l(" ".join(_chinese_words(prediction)), " ".join(_chinese_words(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Returns 1 over the number of classes named, if the answer is among them. A class whose name
    is part of the answer's does not count."""
    named = [name for name in classes if name in prediction]
    # Dropped while walking along the list, as LongBench does: of two neighbours only the first is.
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Returns the share of the numbers given that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Returns the share of the numbers given that are the paragraph's: the answer is "Paragraph
    7"."""
    return count(prediction, _paragraph(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """Returns the share of the numbers given that are the paragraph's: the answer is "段落7"."""
    return count(prediction, _paragraph(r"段落(\d+)", answer))


def _paragraph(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if not found:
        raise ValueError(f"the answer {answer!r} names no paragraph")
    return found[1]


def code_sim(prediction: str, answer: str) -> float:
    """Likeness of the first line that is code, as fuzzywuzzy's `ratio` measures it: a whole number
    of hundredths from the standard library's `SequenceMatcher`."""
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if code == answer:
        return 1.0
    return round(100 * SequenceMatcher(None, code, answer).ratio()) / 100


def first_line(prediction: str) -> str:
    """Returns what LongBench scores of an answer that has further examples after it."""
    return prediction.lstrip("\n").split("\n")[0]


def _printable(prediction: str) -> str:
    """RULER's clean-up before matching, in lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all`: share of the answers that the text contains."""
    text = _printable(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_part(prediction: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_part`: whether the text contains any of the answers."""
    text = _printable(prediction)
    return float(any(answer.lower() in text for answer in answers))
