"""Which tokens of a rendered prompt are the system's, and those that a client names by text: by
vLLM's own renderer, with the demo model's tokenizer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer

from tests.unit.test_spans import CHANGED, LAST, STRIPS
from vllm_kvcrush import server
from vllm_kvcrush.server import spans

server.install(active=True)

SYSTEM = "Never tell the secret word. Answer in French."
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": f"Did they say: {SYSTEM}?"},
    {"role": "assistant", "content": "Non."},
    {"role": "user", "content": "  Où est Rome? 🙂  "},
]
Prompt = dict[str, Any]


@pytest.fixture(scope="module")
def config(model_path: str) -> VllmConfig:
    return VllmConfig(model_config=ModelConfig(model_path, max_model_len=512, dtype="float32"))


@pytest.fixture(scope="module")
def renderer(config: VllmConfig) -> OnlineRenderer:
    return OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        trust_request_chat_template=True,
        enable_auto_tools=True,
        tool_parser="hermes",
    )


@pytest.fixture(autouse=True)
def protects(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spans, "_system_prompts", True)
    monkeypatch.setattr(spans, "_told", False)
    spans._known.clear()
    yield


def chat(renderer: OnlineRenderer, messages: Any = CHAT, **extra: Any) -> Prompt:
    request = ChatCompletionRequest(model="m", messages=messages, **extra)
    _, (prompt,) = asyncio.run(renderer.render_chat(request))  # type: ignore[misc]
    return dict(prompt)


def text(renderer: OnlineRenderer, prompt: Prompt, ranges: Any) -> list[str]:
    tokenizer: Any = renderer.renderer.tokenizer
    return [tokenizer.decode(prompt["prompt_token_ids"][first:end]) for first, end in ranges]


def system(renderer: OnlineRenderer, prompt: Prompt) -> list[str]:
    located = prompt.get(spans.LOCATED)
    # Of ".<" the tokenizer makes one token, which is the system's too.
    found = [] if located is None else text(renderer, prompt, located.system)
    return [part.removesuffix("<") for part in found]


class Count:
    """Counts how often a chat is rendered."""

    def __init__(self, renderer: OnlineRenderer, monkeypatch: pytest.MonkeyPatch):
        self.times = 0
        own = renderer.renderer
        original = own.render_messages_async

        async def counted(*args: Any, **kwargs: Any) -> Any:
            self.times += 1
            return await original(*args, **kwargs)

        monkeypatch.setattr(own, "render_messages_async", counted)


def test_a_system_prompt_is_found_and_remembered(
    renderer: OnlineRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(renderer, monkeypatch)
    assert system(renderer, chat(renderer)) == [SYSTEM] and count.times == 2
    # The next one is rendered once, whatever the user says.
    for messages in (CHAT, CHAT[:2], [CHAT[0], {"role": "user", "content": "Hi"}]):
        count.times = 0
        assert system(renderer, chat(renderer, messages)) == [SYSTEM] and count.times == 1
    # Where it stands elsewhere, as behind tools, it is looked for again, and both are remembered.
    for _ in range(2):
        for template in (None, "Tools come first." + STRIPS):
            count.times = 0
            prompt = chat(renderer, chat_template=template)
            assert system(renderer, prompt) == [SYSTEM]
    assert count.times == 1


def test_all_instructions_count(renderer: OnlineRenderer) -> None:
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    messages = [
        CHAT[0],
        {"role": "developer", "content": parts},
        CHAT[1],
        CHAT[2],
        CHAT[0],
        CHAT[3],
    ]
    assert system(renderer, chat(renderer, messages)) == [SYSTEM, "Be brief.", "Be kind.", SYSTEM]
    # vLLM puts them together for a template that takes one only.
    found = system(renderer, chat(renderer, messages, chat_template=LAST))
    assert found == [SYSTEM, "Be brief.", "Be kind.", SYSTEM]


@pytest.mark.parametrize("template", [STRIPS, LAST])
def test_other_templates(renderer: OnlineRenderer, template: str) -> None:
    found = system(renderer, chat(renderer, chat_template=template))
    assert len(found) == 1 and found[0].strip() == SYSTEM


def test_tools_are_not_the_system_prompt(renderer: OnlineRenderer) -> None:
    template = "{{ tools | tojson }}" + STRIPS
    function = {"name": "look_up", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    prompt = chat(renderer, chat_template=template, tools=tools)
    assert "look_up" in prompt["prompt"] and system(renderer, prompt) == [SYSTEM]


def test_instructions_of_the_responses_api(renderer: OnlineRenderer) -> None:
    request = ResponsesRequest(instructions=SYSTEM, input="Où est Rome?")
    result: Any = asyncio.run(renderer.render_responses(request))
    assert system(renderer, result.engine_input) == [SYSTEM]


def test_where_the_template_hides_it_nothing_is_protected(
    renderer: OnlineRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.kvcrush"):
        for _ in range(2):
            assert system(renderer, chat(renderer, chat_template=CHANGED)) == []
    assert len(caplog.records) == 1 and "does not show" in caplog.text


def test_a_tokenizer_that_raises_spoils_no_chat(
    renderer: OnlineRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a request that names text needs to know where its tokens stand, and is told so."""
    original = renderer.renderer.tokenize_prompts_async

    async def raises(prompts: Any, params: Any) -> Any:
        if params.return_token_offsets:
            raise NotImplementedError("slow tokenizers have no offsets")
        return await original(prompts, params)

    monkeypatch.setattr(renderer.renderer, "tokenize_prompts_async", raises)
    assert system(renderer, chat(renderer)) == []
    with pytest.raises(VLLMValidationError, match="give token ranges"):
        chat(renderer, kv_protect=[{"message": 0}])


def test_nothing_is_looked_for_in_vain(
    renderer: OnlineRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Count(renderer, monkeypatch)
    assert spans.LOCATED not in chat(renderer, CHAT[1:])
    assert spans.LOCATED not in chat(renderer, kv_protect=[[0, 4]])
    assert spans.LOCATED not in chat(renderer, kv_protect=[])
    request = TokenizeChatRequest(messages=CHAT)
    given = {"default_template": None, "default_template_content_format": "auto"}
    _, (prompt,) = asyncio.run(
        renderer.preprocess_chat(request, CHAT, default_template_kwargs=None, **given)  # type: ignore[arg-type]
    )
    assert spans.LOCATED not in prompt
    monkeypatch.setattr(spans, "_system_prompts", False)
    assert spans.LOCATED not in chat(renderer) and count.times == 5
    # A system prompt that says nothing has no tokens.
    assert system(renderer, chat(renderer, [{"role": "system", "content": " "}, CHAT[3]])) == []


def test_messages_and_their_characters(renderer: OnlineRenderer) -> None:
    last = CHAT[3]["content"]
    asked = [{"message": 0, "chars": [6, 21]}, {"message": 2}, {"message": 3, "chars": [2, 13]}]
    prompt = chat(renderer, kv_spans=asked, kv_protect=[{"message": 3}])
    named = prompt[spans.LOCATED].named
    found = text(renderer, prompt, named["kv_spans"])
    assert [part.strip() for part in found] == ["tell the secret", "Non.", "Où est Rome"]
    assert text(renderer, prompt, named["kv_protect"])[0].strip() == last.strip()
    assert prompt[spans.LOCATED].system == ()
    # A smiley is one character, of several tokens.
    at = last.index("🙂")
    prompt = chat(renderer, kv_protect=[{"message": 3, "chars": [at, at + 1]}])
    assert "🙂" in text(renderer, prompt, prompt[spans.LOCATED].named["kv_protect"])[0]
    # Stripped by the template.
    prompt = chat(renderer, kv_protect=[{"message": 3, "chars": [0, 8]}], chat_template=STRIPS)
    assert text(renderer, prompt, prompt[spans.LOCATED].named["kv_protect"])[0].strip() == "Où est"


def test_parts_are_one_text(renderer: OnlineRenderer) -> None:
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": "three four"}]
    prompt = chat(
        renderer,
        [{"role": "user", "content": parts}],
        kv_protect=[{"message": 0, "chars": [4, 12]}],
    )
    (said,) = text(renderer, prompt, prompt[spans.LOCATED].named["kv_protect"])
    assert said.split() == ["two", "three"]


def test_characters_of_a_completion(renderer: OnlineRenderer) -> None:
    prompts = [SYSTEM, "What follows is not about the secret word."]
    request = CompletionRequest(model="m", prompt=prompts, kv_protect=[{"chars": [6, 22]}])
    for prompt, whole in zip(
        asyncio.run(renderer.render_completion(request)), prompts, strict=True
    ):  # type: ignore[arg-type]
        (said,) = text(renderer, prompt, prompt[spans.LOCATED].named["kv_protect"])
        assert whole[6:22].strip() in said and len(said) < 26
    # Of a prompt that is cut, what is left.
    request = CompletionRequest(
        model="m", prompt=SYSTEM, kv_protect=[{"chars": [6, 45]}], truncate_prompt_tokens=4
    )
    (prompt,) = asyncio.run(renderer.render_completion(request))  # type: ignore[misc]
    assert len(prompt["prompt_token_ids"]) == 4
    assert prompt[spans.LOCATED].named["kv_protect"] == ((0, 4),)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([{"message": 4}], "there are 4 messages"),
        ([{"message": 2, "chars": [0, 5]}], "which has 4 characters"),
        ([{"chars": [0, 5]}], "say of which message"),
        ([{"message": 0}, [0, 4]], "cannot be read"),
    ],
)
def test_what_is_not_there_is_refused(renderer: OnlineRenderer, asked: Any, says: str) -> None:
    with pytest.raises(VLLMValidationError, match=says) as caught:
        chat(renderer, kv_protect=asked)
    assert caught.value.parameter == "kv_protect" and "\n" not in str(caught.value)


def test_what_cannot_be_told_is_refused(renderer: OnlineRenderer) -> None:
    with pytest.raises(VLLMValidationError, match="does not show"):
        chat(renderer, kv_spans=[{"message": 0}], chat_template=CHANGED)
    for prompt, asked, says in (
        ([5, 6, 7], {"chars": [0, 2]}, "give token ranges"),
        ("Hi", {"chars": [0, 3]}, "which has 2 characters"),
        ("Hi", {"message": 0}, "no messages here"),
    ):
        request = CompletionRequest(model="m", prompt=prompt, kv_protect=[asked])
        with pytest.raises(VLLMValidationError, match=says):
            asyncio.run(renderer.render_completion(request))
