"""The grammar of policies: what is written can be read again, and an error is one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vllm_kvcrush.codecs import CODECS
from vllm_kvcrush.spec import MAX_DEPTH, MAX_LENGTH, Spec, SpecError, parse, resolved, storage

WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
NAMES = WORDS | st.sampled_from(["kvcrush", "fair", "true", "null", "none", "int8", "e1"])
NUMBERS = (
    st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0, -0.0, 0.1, 1e22, 1e-7, 5e-324, 1.7976931348623157e308])
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["true", "null", "-1", "1e5", "a b", '"', "\\", "\n", "é", "\ud800", "a,b)@int8", "", "x" * 30]
)
VALUES = st.none() | st.booleans() | NUMBERS | WORDS | TEXTS
OPTIONS = st.dictionaries(WORDS.filter(lambda w: w not in ("base", "policy", "codecs")), VALUES,
                          max_size=3)  # fmt: skip
NAMED = [name for name in CODECS if name not in ("raw", "exact")]
STORED = st.none() | st.just(()) | st.lists(st.sampled_from(NAMED), min_size=1, unique=True)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    found: Spec | None = None
    depth = draw(st.integers(1, MAX_DEPTH))
    for _ in range(depth):
        options = tuple(sorted(draw(OPTIONS).items()))
        found = Spec(draw(NAMES), found, options)
    assert found is not None
    codecs = draw(STORED)
    found = Spec(found.name, found.base, found.options, None if codecs is None else tuple(codecs))
    assume(len(str(found)) <= MAX_LENGTH)
    return found


def as_json(spec: Spec) -> dict[str, Any]:
    """Returns the JSON form of a policy, by its definition."""
    found: dict[str, Any] = {"policy": spec.name, **dict(spec.options)}
    if spec.base is not None:
        found["base"] = as_json(spec.base)
    if spec.codecs is not None:
        found["codecs"] = list(spec.codecs) or ["raw"]
    return found


@settings(deadline=None, max_examples=400)
@given(specs())
@example(Spec("snapkv", codecs=()))
@example(Spec("a", Spec("b", None, (("x", "true"), ("y", True), ("z", None))), (("w", "\ud800"),)))
def test_what_is_written_is_read_again(spec: Spec) -> None:
    text = str(spec)
    assert parse(text) == spec == parse(spec)
    assert str(parse(text)) == text
    assert text.isprintable(), "fits into a line of a log"
    # The same as JSON, as its text, and with spaces wherever they may be.
    written = as_json(spec)
    assert parse(written) == parse(json.loads(json.dumps(written))) == spec
    if len(json.dumps(written)) <= MAX_LENGTH:
        assert parse(json.dumps(written)) == spec
    if '"' not in text and len(text) * 3 <= MAX_LENGTH:
        airy = text
        for mark in "(),=@+":
            # "+" is a sign of a number's exponent too.
            airy = airy if mark == "+" and "e+" in text.lower() else airy.replace(mark, f" {mark} ")
        assert parse(f" {airy} ") == spec
    # A base may be named, and be text inside JSON.
    if spec.base is not None:
        arguments = [f"base={spec.base}", *str(Spec("x", None, spec.options))[2:-1].split("\0")]
        named = f"{spec.name}({', '.join(a for a in arguments if a)})"
        own = Spec(spec.name, spec.base, spec.options)
        if len(named) <= MAX_LENGTH:
            assert parse(named) == own
        assert parse(as_json(own) | {"base": str(spec.base)}) == own


def test_the_order_of_options_does_not_matter() -> None:
    assert parse("kvcrush(snapkv, seed=1, anchor=mean)") == parse(
        "kvcrush(snapkv,anchor=mean,seed=1)"
    )
    assert str(parse("f(b=2, a=-1.50, d=null, c=true, e=x, g='x')".replace("'", '"'))) == (
        "f(a=-1.5, b=2, c=true, d=null, e=x, g=x)"
    )
    assert str(parse("kvcrush()")) == "kvcrush" and str(parse(" a_b.c-d ")) == "a_b.c-d"
    assert str(parse("snapkv@raw")) == "snapkv@raw" and parse("snapkv@raw").codecs == ()
    assert [own.name for own in parse("fair(kvcrush(snapkv))").chain] == [
        "fair",
        "kvcrush",
        "snapkv",
    ]
    # Numbers and words by the grammar.
    options = dict(parse('f(a=1, b=1.0, c=.5, d=2., e=-3e-2, g="1", h=true)').options)
    assert options == {"a": 1, "b": 1.0, "c": 0.5, "d": 2.0, "e": -0.03, "g": "1", "h": True}
    assert {name: type(v) for name, v in options.items()} == {
        "a": int, "b": float, "c": float, "d": float, "e": float, "g": str, "h": bool,
    }  # fmt: skip


DEEP: Any = "snapkv"
for _ in range(MAX_DEPTH):
    DEEP = {"policy": "fair", "base": DEEP}
KNOWN = "raw, int8, int4, tc4, tc6, tc8, tada, gear"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "is not a policy's name"),
        (3, "is not a policy's name"),
        (["kvcrush"], "is not a policy's name"),
        (b"kvcrush", "is not a policy's name"),
        ("x" * (MAX_LENGTH + 1), f"is longer than {MAX_LENGTH} characters"),
        ({"policy": "x" * (MAX_LENGTH + 1)}, f"is longer than {MAX_LENGTH} characters"),
        ({"policy": "x", "a": "y" * MAX_LENGTH}, f"is longer than {MAX_LENGTH} characters"),
        ({"policy": "x", "base": "y" * (MAX_LENGTH + 1)}, "is longer than 256 characters"),
        # Written out it is too long, and could not be read again.
        ("f(" + ",".join(f"a{i}=1" for i in range(50)) + ")", "is longer than 256 characters"),
        ('f(a="' + "é" * 100 + '")', "is longer than 256 characters"),
        ("", "lacks a policy's name"),
        (" ", "lacks a policy's name"),
        ("()", "lacks a policy's name"),
        ("3", "lacks a policy's name"),
        ('"kvcrush"', "lacks a policy's name"),
        ("f(", "lacks a policy's name"),
        ("f(3)", "lacks a policy's name"),
        ("f(,)", "lacks a policy's name"),
        ("f(g", "lacks ','"),
        ("f(g h)", "lacks ','"),
        ("f(a=1 b=2)", "lacks ','"),
        ("f(a=0.5x)", "lacks ','"),
        ("f(a=1", "lacks ','"),
        ("f(a=1,)", "lacks an argument"),
        ("f(a=1,", "lacks an argument"),
        ("f(g, 3)", "lacks an argument"),
        ("f(3=4)", "lacks an option"),
        ("f(a=)", "has the option a without a value"),
        ("f(a=", "has the option a without a value"),
        ("f(a=(1))", "has the option a without a value"),
        ("f(a==1)", "has the option a without a value"),
        ("f(g, h)", "wraps two policies, or has one after an option"),
        ("f(a=1, g)", "wraps two policies, or has one after an option"),
        ("f(g, base=h)", "wraps two policies"),
        ("f(base=g, base=h)", "wraps two policies"),
        ({"policy": "f(g)", "base": "h"}, "wraps two policies"),
        ("f(a=1, a=2)", "has the option a twice"),
        ({"policy": "f(a=1)", "a": 1}, "has the option a twice"),
        ("f g", "cannot be read from 'g' on"),
        ("f)", "cannot be read from ')' on"),
        ("f;g", "cannot be read from ';g' on"),
        ("f(a='x')", "cannot be read from \"'x')\" on"),
        ("f@int8 int4", "cannot be read from 'int4' on"),
        ("π", "cannot be read from 'π' on"),
        ("f" + "!" * 99, f"cannot be read from {'!' * 20!r} on"),
        (DEEP, "wraps policies more than 4 deep"),
        ("a(b(c(d(e))))", "wraps policies more than 4 deep"),
        ({"policy": "a(b)", "base": "c"}, "wraps two policies"),
        ({"policy": "a", "base": {"policy": "b", "base": "c(d(e))"}}, "wraps policies more than 4"),
        ({"policy": "a", "base": {"policy": "b(c(d(e)))"}}, "wraps policies more than 4 deep"),
        ("f@", "lacks a codec"),
        ("f@int8+", "lacks a codec"),
        ("f@8", "lacks a codec"),
        ("f@int9", f"names the codec 'int9', which is not one of {KNOWN}"),
        ("f@exact", f"names the codec 'exact', which is not one of {KNOWN}"),
        ("f@int8+int8", "names a codec twice"),
        ("f@raw+int8", "names raw pages beside another codec"),
        ({"policy": "f", "codecs": [["int8"]]}, f"names the codec, which is not one of {KNOWN}"),
        ({"policy": "f", "codecs": []}, 'has "codecs" that are not a list of names'),
        ({"policy": "f", "codecs": "int8"}, 'has "codecs" that are not a list of names'),
        ({"policy": "f@int8", "codecs": ["int8"]}, "names its codecs twice"),
        ({"policy": "f", "base": "g@int8"}, "names codecs of a policy inside another: only the"),
        ({"policy": "f", "base": {"policy": "g@int8"}}, "names codecs of a policy inside another"),
        ({"policy": "f", "base": {"policy": "g", "codecs": ["int8"]}}, "names codecs of a policy"),
        ("f(g@int8)", "lacks ','"),
        ({}, 'has no "policy" with a name'),
        ({"policy": 3}, 'has no "policy" with a name'),
        ({"policy": "f", "base": {}}, 'has no "policy" with a name'),
        ({"policy": "f", "base": 3}, "is not a policy's name"),
        ({"policy": "f", "base": ["g"]}, "is not a policy's name"),
        ({"policy": "f", "a": [1]}, "has a value of a that is neither a number nor a word"),
        ({"policy": "f", "a": {}}, "has a value of a that is neither a number nor a word"),
        ({"policy": "f", "a": (1,)}, "has a value of a that is neither a number nor a word"),
        ({"policy": "f", "a": float("nan")}, "has a value of a that is neither a number nor"),
        ({"policy": "f", "a": float("inf")}, "has a value of a that is neither a number nor"),
        pytest.param({"policy": "f", "a": 10**5000}, "has a value of a that is nei", id="digits"),
        ("f(a=1e999)", "has a value of a that is neither a number nor a word"),
        ("f(a=9223372036854775808)", "has a value of a that is neither a number nor a word"),
        (r'f(a="\x")', "has a value of a that is not a JSON string"),
        ('f(a="a\nb")', "has a value of a that is not a JSON string"),
        ({"policy": "f", "a b": 1}, "has an option that is not a word"),
        ({"policy": "f", "": 1}, "has an option that is not a word"),
        ({"policy": "f", 3: 1}, "has an option that is not a word"),
        ("{", "is not JSON (Expecting property name"),
        ('{"policy": "f"} x', "is not JSON (Extra data"),
        (' {"policy": "f", "a": NaN}', "has a value of a that is neither a number nor a word"),
    ],
)  # fmt: skip
def test_refusals(given: Any, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(given)
    assert str(caught.value).startswith(says)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 150


def test_limits_are_what_is_still_read() -> None:
    assert parse("x" * MAX_LENGTH).name == "x" * MAX_LENGTH
    deep = parse(DEEP["base"])
    assert [own.name for own in deep.chain] == ["fair"] * (MAX_DEPTH - 1) + ["snapkv"]
    assert len(list(parse("a(b(c(d)))").chain)) == MAX_DEPTH
    assert dict(parse("f(a=9223372036854775807)").options) == {"a": 2**63 - 1}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | NAMES
    | st.binary(max_size=3) | st.just(5000).map(lambda digits: 10**digits),
    lambda inner: st.lists(inner, max_size=3)
    | st.lists(inner, max_size=2).map(tuple)
    | st.dictionaries(
        st.sampled_from(["policy", "base", "codecs", "a", "b c", "", 3]) | st.text(max_size=3),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
SCRAPS = st.lists(
    st.sampled_from(
        ["a", "fair", "base", "policy", "(", ")", ",", "=", "@", "+", "-", ".", "1", "0.5", "1e9",
         '"', '"x"', "\\", "{", "}", ":", "[", "]", " ", "\n", "\t", "true", "null", "int8", "raw",
         "²", "١", "π", "\ud800", "\x00", "NaN", "e"]
    )
    | st.text(max_size=3),
    max_size=40,
).map("".join)  # fmt: skip


@settings(deadline=None, max_examples=600)
@given(SCRAPS | st.text() | ANYTHING | specs().map(as_json) | specs().map(str))
def test_nothing_but_a_sentence_comes_of_anything(given: Any) -> None:
    try:
        found = parse(given)
    except SpecError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 200
        return
    # Whatever was read can be written and read again, hashed, and turned into JSON.
    assert len(str(found)) <= MAX_LENGTH and str(found).isprintable()
    assert parse(str(found)) == found and str(parse(str(found))) == str(found)
    assert len(list(found.chain)) <= MAX_DEPTH
    hash(found)
    json.dumps(as_json(found))


def test_bases_that_the_server_names() -> None:
    defaults = {"kvcrush": {"base": "h2o(recent=0.75)", "ratio": 0.1}, "fair": {"base": "kvcrush"}}
    assert str(resolved(parse("kvcrush"), defaults)) == "kvcrush(h2o(recent=0.75))"
    assert str(resolved(parse("fair(fairness=1)@int8"), defaults)) == (
        "fair(kvcrush(h2o(recent=0.75)), fairness=1)@int8"
    )
    assert str(resolved(parse("fair(snapkv)"), defaults)) == "fair(snapkv)"
    assert resolved(parse("kvcrush"), None) == resolved(parse("kvcrush"), {}) == Spec("kvcrush")
    for base, says in (
        ("kvcrush", "wraps policies more than 4 deep"),
        ("snapkv@int8", "names codecs of a policy inside another"),
        (7, "is not a policy's name"),
        ("a(b", "lacks ','"),
    ):
        with pytest.raises(SpecError, match=says):
            resolved(parse("kvcrush"), {"kvcrush": {"base": base}})


def test_neither_torch_nor_vllm_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['vllm'] = None; "
    code += "from vllm_kvcrush.spec import parse, storage; "
    code += "print(storage(parse('fair(kvcrush(snapkv))@int8+tc4')).codecs)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "('int8', 'tc4')"
    with pytest.raises(ValueError, match="'nope' is not a policy"):
        storage(parse("fair(nope)"))
