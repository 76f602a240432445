"""Which tokens of a prompt are the system's, and which are those that a client names by text.

Both are looked for where vLLM renders prompts, since nobody else knows a prompt's text: the result
travels with the rendered prompt (`LOCATED`), and `params` reads it. A chat is rendered once more
only for what is not known yet: a system prompt's tokens are remembered, and looked for at the start
of the next prompt that has the same.
"""

from __future__ import annotations

import copy
import inspect
import logging
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_kvcrush.config import PROTECT_KEY, SPANS_KEY
from vllm_kvcrush.server import Method, wrap
from vllm_kvcrush.spans import (
    MOST_SPANS,
    SYSTEM_ROLES,
    SpanError,
    Spans,
    TextRange,
    disjoint,
    places,
    text_ranges,
    texts_of,
    tokens_of,
    with_texts,
)

logger = logging.getLogger("vllm.kvcrush")

# Key of a rendered prompt: its Located.
LOCATED = "_kvcrush_located"
# System prompts that are remembered, and how many prompts that begin otherwise of each.
_REMEMBERED, _VARIANTS = 64, 4
# Longer ones are looked for every time.
_LONGEST = 2**14
# Part of the words that stand for messages: no prompt has it.
_WORD = f"kvcrush{secrets.token_hex(8)}x"


@dataclass
class Located:
    """Token ranges of one rendered prompt.

    Attributes:
        named: those of kv_spans and kv_protect, by parameter, if the client named them by text.
        system: those of system messages; empty if they are not protected anyway.
    """

    named: dict[str, Spans] = field(default_factory=dict)
    system: Spans = ()


# What the prompts of a request were found to have, in their order, while `collect` is set.
collected: ContextVar[list[Located] | None] = ContextVar("kvcrush_located", default=None)
_system_prompts = False
_told = False
_known: OrderedDict[tuple[str, ...], list[tuple[array[int], Spans]]] = OrderedDict()


def protect_system_prompts() -> None:
    """Makes this process look for system prompts, which it does not do before."""
    global _system_prompts
    _system_prompts = True


def install(fields_of: Any, refusal: Any) -> None:
    """Wraps what renders the prompts of HTTP requests.

    Args:
        fields_of: returns the kv_* fields of a request, by name.
        refusal: makes the error of a refused request of a message, a parameter and a model's name.
    """
    from vllm.renderers.online_renderer import OnlineRenderer

    wrap(OnlineRenderer, "preprocess_chat", lambda method: _chat(method, fields_of, refusal))
    wrap(OnlineRenderer, "preprocess_cmpl", lambda method: _completion(method, fields_of, refusal))


class _Recorder:
    """Stands in for a renderer while one request is rendered, and remembers how it was."""

    def __init__(self, renderer: Any):
        self._renderer = renderer
        self.chat_params: Any = None
        self.tok_params: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    async def render_chat_async(
        self, conversations: Any, chat_params: Any, tok_params: Any, **kwargs: Any
    ) -> Any:
        self.chat_params, self.tok_params = chat_params, tok_params
        return await self._renderer.render_chat_async(
            conversations, chat_params, tok_params, **kwargs
        )

    async def render_cmpl_async(self, prompts: Any, tok_params: Any, **kwargs: Any) -> Any:
        self.tok_params = tok_params
        return await self._renderer.render_cmpl_async(prompts, tok_params, **kwargs)

    async def offsets(self, prompt: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """Returns the characters of each token of a rendered prompt, or None if they cannot be
        had: its text or its tokens were given, or the tokenizer does not tell. A request that vLLM
        has tokenized already does not fail because of this."""
        if "prompt" not in prompt or self.tok_params is None:
            return None
        params = replace(self.tok_params, return_token_offsets=True)
        text = {"prompt": prompt["prompt"]}
        try:
            (again,) = await self._renderer.tokenize_prompts_async([text], params)
        except Exception as error:  # whatever a tokenizer may raise
            logger.debug("A prompt could not be tokenized with offsets: %r", error)
            return None
        if list(again["prompt_token_ids"]) != list(prompt["prompt_token_ids"]):
            return None
        return again.get("prompt_token_offsets")


def _wanted(request: Any, fields_of: Any, refusal: Any) -> dict[str, tuple[TextRange, ...]]:
    """Returns the ranges of text that a request names, by parameter."""
    given, found = fields_of(request), {}
    for key in (SPANS_KEY, PROTECT_KEY):
        try:
            ranges = text_ranges(given.get(key))
        except SpanError as error:
            raise refusal(f"{key} {error}.", key, request.model) from None
        if ranges is not None:
            found[key] = ranges
    return found


def _keep(prompt: Any, located: Located) -> None:
    prompt[LOCATED] = located
    if (kept := collected.get()) is not None:
        kept.append(located)


def _completion(original: Method, fields_of: Any, refusal: Any) -> Method:
    async def preprocess_cmpl(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = _wanted(request, fields_of, refusal) if _generates(request) else {}
        if not wanted:
            return await original(self, request, *args, **kwargs)
        own, recorder = _recording(self)
        prompts = await original(own, request, *args, **kwargs)
        for prompt in prompts:
            offsets = await recorder.offsets(prompt)
            whole = prompt.get("prompt") or ""

            def place(asked: TextRange, whole: str = whole) -> tuple[int, int]:
                if asked.message is not None:
                    raise SpanError(f"names {asked}, but there are no messages here")
                assert asked.chars is not None
                return _within(asked, asked.chars, len(whole))

            _keep(prompt, _located(wanted, offsets, place, refusal, request.model))
        return prompts

    return preprocess_cmpl


def _chat(original: Method, fields_of: Any, refusal: Any) -> Method:
    signature = inspect.signature(original)

    async def preprocess_chat(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        request, messages = given["request"], list(given["messages"])
        if not _generates(request):
            return await original(*args, **kwargs)
        wanted = _wanted(request, fields_of, refusal)
        system = _system_prompts and PROTECT_KEY not in fields_of(request)
        instructions = [i for i, m in enumerate(messages) if system and _is_system(m)]
        if not wanted and not instructions:
            return await original(*args, **kwargs)
        given["self"], recorder = _recording(given["self"])
        conversation, prompts = await original(*bound.args, **bound.kwargs)
        for prompt in prompts:
            chat = _Chat(recorder, messages, prompt)
            located = Located(system=await chat.system(instructions))
            if wanted:
                await chat.look({r.message for ranges in wanted.values() for r in ranges} - {None})
                named = _located(wanted, chat.offsets, chat.place, refusal, request.model)
                located = replace(located, named=named.named)
            _keep(prompt, located)
        return conversation, prompts

    return preprocess_chat


def _generates(request: Any) -> bool:
    # Others are those of /tokenize.
    return hasattr(request, "to_sampling_params")


def _is_system(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") in SYSTEM_ROLES


def _recording(renderer: Any) -> tuple[Any, _Recorder]:
    """Returns a copy of an `OnlineRenderer` that renders one request, and what records it."""
    own = copy.copy(renderer)
    own.renderer = recorder = _Recorder(renderer.renderer)
    return own, recorder


def _located(
    wanted: Mapping[str, Sequence[TextRange]],
    offsets: Sequence[tuple[int, int]] | None,
    place: Any,
    refusal: Any,
    model: str | None,
) -> Located:
    found = Located()
    for key, ranges in wanted.items():
        try:
            if offsets is None:
                raise SpanError(
                    "names text, but this prompt's tokens cannot be told by their text: give "
                    "token ranges such as [[0, 64]]"
                )
            spans = []
            for asked in ranges:
                span = tokens_of(offsets, *place(asked))
                if span is None:
                    raise SpanError(f"names {asked}, of which the prompt has no token")
                spans.append(span)
        except SpanError as error:
            raise refusal(f"{key} {error}.", key, model) from None
        found.named[key] = disjoint(spans)
    return found


def _within(asked: TextRange, chars: tuple[int, int], length: int) -> tuple[int, int]:
    if chars[1] > length:
        raise SpanError(f"names {asked}, which has {length} characters")
    return chars


class _Chat:
    """Finds the messages of one rendered chat in its prompt."""

    def __init__(self, recorder: _Recorder, messages: Sequence[Any], prompt: Mapping[str, Any]):
        self._recorder, self._messages, self._prompt = recorder, messages, prompt
        # Of each message that was looked for, its texts and their places.
        self._places: dict[int, list[tuple[str, Any]]] = {}
        self.offsets: list[tuple[int, int]] | None = None

    async def look(self, wanted: Any) -> None:
        """Looks for messages, by index: for all of them at once."""
        wanted = sorted(i for i in wanted if i < len(self._messages) and i not in self._places)
        if self.offsets is None:
            self.offsets = await self._recorder.offsets(self._prompt)
        if not wanted or self.offsets is None:
            return
        words: dict[str, str] = {}
        messages = list(self._messages)
        for i in wanted:
            texts = texts_of(messages[i])
            own = [f"{_WORD}{i}x{j}x" for j in range(len(texts))]
            if texts:
                messages[i] = with_texts(messages[i], own)
            words.update(zip(own, texts, strict=True))
            self._places[i] = [(text, word) for text, word in zip(texts, own, strict=True)]
        found = places(self._prompt["prompt"], await self._rendered(messages), words)
        for i in wanted:
            self._places[i] = [(text, found.get(word)) for text, word in self._places[i]]

    async def _rendered(self, messages: list[Any]) -> str:
        """Returns the prompt of other messages, or "" if there is none: a request that vLLM has
        rendered already does not fail because of this."""
        try:
            _, prompt = await self._recorder.render_messages_async(
                messages, self._recorder.chat_params
            )
        except Exception as error:  # whatever a template may raise
            logger.debug("A chat with other words could not be rendered: %r", error)
            return ""
        return str(prompt.get("prompt") or "")

    def place(self, asked: TextRange) -> tuple[int, int]:
        """Returns the characters of the prompt that a range of a message is. Raises SpanError."""
        if asked.message is None:
            raise SpanError(
                f'names {asked}: in a chat, say of which message, {{"message": 0, "chars": '
                "[0, 200]}"
            )
        if asked.message >= len(self._messages):
            raise SpanError(f"names {asked}, but there are {len(self._messages)} messages")
        parts = self._places[asked.message]
        length = sum(len(text) for text, _ in parts)
        first, end = _within(asked, asked.chars or (0, length), length)
        if not parts or any(place is None for _, place in parts):
            raise SpanError(
                f"names {asked}, but the chat template does not show where it writes that: give "
                "token ranges such as [[0, 64]]"
            )
        ends = []
        for text, place in parts:
            if 0 < end <= len(text) or 0 <= first < len(text):
                ends += [place.at(max(0, first)), place.at(min(end, len(text)))]
            first, end = first - len(text), end - len(text)
        return min(ends, default=0), max(ends, default=0)

    async def system(self, instructions: Sequence[int]) -> Spans:
        """Returns the tokens of system messages, given their indices; none, and says so once, where
        the chat template does not show where they are."""
        texts = tuple(text for i in instructions for text in texts_of(self._messages[i]))
        if not any(text.strip() for text in texts) or "prompt_token_ids" not in self._prompt:
            return ()
        ids = self._prompt["prompt_token_ids"]
        variants = _known.get(texts, [])
        for start, spans in variants:
            if len(start) <= len(ids) and array("i", ids[: len(start)]) == start:
                _known.move_to_end(texts)
                return spans
        await self.look(instructions)
        spans = self._found(instructions)
        if not spans:
            _tell()
        elif spans[-1][1] <= _LONGEST:
            _known[texts] = [(array("i", ids[: spans[-1][1]]), spans), *variants][:_VARIANTS]
            _known.move_to_end(texts)
            while len(_known) > _REMEMBERED:
                _known.popitem(last=False)
        return spans

    def _found(self, instructions: Sequence[int]) -> Spans:
        found = []
        for i in instructions:
            for text, place in self._places.get(i, ()):
                if place is None or self.offsets is None:
                    continue
                span = tokens_of(self.offsets, place.at(0), place.at(len(text)))
                found += [span] if span else []
        return disjoint(found)[:MOST_SPANS]


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        logger.warning(
            "The chat template does not show where it writes a system prompt, so that "
            "--kv-protect-system protects none there; requests can name token ranges in %s.",
            PROTECT_KEY,
        )
