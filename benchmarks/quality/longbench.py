"""LongBench v1 (Bai et al., 2023) from its published files, `<dataset>.jsonl` (LongBench-E:
`<dataset>_e.jsonl`): its prompts, generation lengths, truncation and metrics.

The files are in `data.zip` of the data set THUDM/LongBench on Hugging Face.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.quality import scores
from benchmarks.quality.generation import (
    Generation,
    broken,
    encode,
    encode_at,
    folder_of,
    records,
    text_field,
    texts_field,
)


@dataclass(frozen=True)
class Dataset:
    """How a dataset is asked and scored. `chat`: whether a chat model's template is put around the
    prompt; examples and code are better off without."""

    prompt: str
    max_new_tokens: int
    metric: Callable[..., float]
    first_line: bool = False
    chat: bool = True


# Prompts and lengths are those of LongBench/config/dataset2prompt.json and dataset2maxlen.json in
# THUDM/LongBench (GitHub), MIT License, Copyright (c) 2023 THU-KEG & Zhipu AI: to the letter, slips
# included, for published numbers hang on them.
_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n"
    "{context}\n\nAnswer the question based on the given passages. Only give me the answer and "
    "do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
DATASETS = {
    "narrativeqa": Dataset(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
        "provide any explanation.\n\n"
        "Story: {context}\n\nNow, answer the question based on the story asconcisely as you can, "
        "using a single phrase if possible. Do not provide any explanation.\n\n"
        "Question: {input}\n\n"
        "Answer:",
        128,
        scores.qa_f1,
    ),
    "qasper": Dataset(
        "You are given a scientific article and a question. Answer the question as concisely as "
        "you can, using a single phrase or sentence if possible. If the question cannot be "
        'answered based on the information in the article, write "unanswerable". If the '
        'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not '
        "provide any explanation.\n\n"
        "Article: {context}\n\n"
        " Answer the question based on the above article as concisely as you can, using a single "
        "phrase or sentence if possible. If the question cannot be answered based on the "
        'information in the article, write "unanswerable". If the question is a yes/no '
        'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.'
        "\n\nQuestion: {input}\n\n"
        "Answer:",
        128,
        scores.qa_f1,
    ),
    "multifieldqa_en": Dataset(
        "Read the following text and answer briefly.\n\n"
        "{context}\n\nNow, answer the following question based on the above text, only give me "
        "the answer and do not output any other words.\n\n"
        "Question: {input}\nAnswer:",
        64,
        scores.qa_f1,
    ),
    "multifieldqa_zh": Dataset(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n"
        "问题：{input}\n回答：",
        64,
        scores.qa_f1_zh,
    ),
    "hotpotqa": Dataset(_PASSAGES, 32, scores.qa_f1),
    "2wikimqa": Dataset(_PASSAGES, 32, scores.qa_f1),
    "musique": Dataset(_PASSAGES, 32, scores.qa_f1),
    "dureader": Dataset(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n"
        "请基于上述文章回答下面的问题。\n\n问题：{input}\n"
        "回答：",
        128,
        scores.rouge_l_zh,
    ),
    "gov_report": Dataset(
        "You are given a report by a government agency. Write a one-page summary of the report."
        "\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\n"
        "Summary:",
        512,
        scores.rouge_l,
    ),
    "qmsum": Dataset(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\n"
        "Transcript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences."
        "\n\nQuery: {input}\nAnswer:",
        512,
        scores.rouge_l,
    ),
    "multi_news": Dataset(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\n"
        "Summary:",
        512,
        scores.rouge_l,
    ),
    "vcsum": Dataset(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n"
        "会议记录：\n{context}\n\n会议总结：",
        512,
        scores.rouge_l_zh,
    ),
    "trec": Dataset(
        "Please determine the type of the question below. Here are some examples of questions."
        "\n\n{context}\n{input}",
        64,
        scores.classification,
        first_line=True,
        chat=False,
    ),
    "triviaqa": Dataset(
        "Answer the question based on the given passage. Only give me the answer and do not "
        "output any other words. The following are some examples.\n\n"
        "{context}\n\n{input}",
        32,
        scores.qa_f1,
        first_line=True,
        chat=False,
    ),
    "samsum": Dataset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        128,
        scores.rouge_l,
        first_line=True,
        chat=False,
    ),
    "lsht": Dataset(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        64,
        scores.classification,
        first_line=True,
        chat=False,
    ),
    "passage_count": Dataset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there "
        "are after removing duplicates. In other words, how many non-repeating paragraphs are "
        "there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output "
        "format should only contain the number, such as 1, 2, 3, and so on.\n\n"
        "The final answer is: ",
        32,
        scores.count,
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n"
        "{context}\n\nThe following is an abstract.\n\n"
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The "
        'answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        32,
        scores.retrieval,
    ),
    "passage_retrieval_zh": Dataset(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n"
        "{context}\n\n下面是一个摘要\n\n"
        '{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n'
        "答案是：",
        32,
        scores.retrieval_zh,
    ),
    "lcc": Dataset(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        scores.code_sim,
        chat=False,
    ),
    "repobench-p": Dataset(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        scores.code_sim,
        chat=False,
    ),
}


def load(
    folder: pathlib.Path,
    tokenizer: Any,
    max_tokens: int,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    chat: bool | None = None,
) -> list[Generation]:
    """Returns the first `limit` prompts of each dataset in `folder`, or of `tasks` among them.

    Prompts longer than `max_tokens` lose their middle, as LongBench does it. `chat`: whether they
    are put into the tokenizer's chat template; by default if it has one. Raises ValueError naming
    file and line.
    """
    paths = {path.stem: path for path in sorted(folder_of(folder, "LongBench").glob("*.jsonl"))}
    if not paths:
        raise ValueError(f"{folder} has no <dataset>.jsonl of LongBench")
    for task in paths if tasks is None else tasks:
        if task not in paths:
            raise ValueError(f"{folder} has no {task}.jsonl; it has {', '.join(paths)}")
        if task.removesuffix("_e") not in DATASETS:
            raise ValueError(
                f"{paths[task]} is not a dataset of LongBench v1, which are {', '.join(DATASETS)}"
            )
    if chat is None:
        chat = tokenizer.chat_template is not None
    return [
        _generation(paths[task], place, record, tokenizer, max_tokens, chat)
        for task in (paths if tasks is None else tasks)
        for place, record in records(paths[task], limit)
    ]


def _generation(
    path: pathlib.Path,
    place: int,
    record: dict[str, Any],
    tokenizer: Any,
    max_tokens: int,
    chat: bool,
) -> Generation:
    name = path.stem.removesuffix("_e")
    dataset = DATASETS[name]
    fields = {f: text_field(path, place, record, f) for f in ("context", "input")}
    answers = texts_field(path, place, record, "answers")
    if str(record.get("dataset", name)).removesuffix("_e") != name:
        raise broken(path, place, f"a record of the dataset {record['dataset']!r}")
    metric = dataset.metric
    if metric is scores.classification:
        metric = partial(metric, classes=texts_field(path, place, record, "all_classes"))

    def score(prediction: str) -> float:
        if dataset.first_line:
            prediction = scores.first_line(prediction)
        try:
            return max(metric(prediction, answer) for answer in answers)
        except ValueError as error:
            raise broken(path, place, str(error)) from None

    prompt, start = _prompt(tokenizer, dataset, fields, max_tokens, chat)
    return Generation(
        task=f"longbench/{path.stem}",
        index=place,
        context=max_tokens,
        prompt=prompt,
        question_start=start,
        max_new_tokens=dataset.max_new_tokens,
        answers=tuple(answers),
        score=score,
    )


def _prompt(
    tokenizer: Any, dataset: Dataset, fields: dict[str, str], room: int, chat: bool
) -> tuple[list[int], int]:
    """Returns the prompt in at most `room` tokens, and where its question begins."""
    whole = dataset.prompt.format(**fields)
    question = dataset.prompt.partition("{context}")[2].format(**fields).strip()
    tokens = encode(tokenizer, whole)["input_ids"]
    keep = room
    while keep >= 2:
        text, asked = whole, question
        if len(tokens) > keep:
            halves = tokens[: keep // 2], tokens[-(keep // 2) :]
            first, last = (tokenizer.decode(half, skip_special_tokens=True) for half in halves)
            text, asked = first + last, (question if question in last else last.strip())
        if chat and dataset.chat:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        prompt, start = encode_at(tokenizer, text, text.rindex(asked))
        if len(prompt) <= room:
            return prompt, start
        # The template takes its share, and the two halves may join to other tokens.
        keep = min(keep, len(tokens)) - (len(prompt) - room)
    raise ValueError(f"{room} tokens are too few for any prompt of LongBench")
