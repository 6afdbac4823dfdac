"""Text that is streamed equals text that is decoded whole, and stop strings cut it at one place only."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvtool.chat_template import MAX_CHARACTERS, render, variables_of
from kvtool.errors import ModelError, RequestError
from kvtool.tokenizer import MAX_TEMPLATE_BYTES, Detokenizer, StopChecker, Tokenizer

TINY = Path(__file__).parents[1] / "kvtool" / "assets" / "tiny"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
VOCAB = json.loads((TINY / "config.json").read_text())["vocab_size"]
BROKEN = "\N{REPLACEMENT CHARACTER}"
WORDS = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁the", "a", "b", "the", "▁▁", "."]


def sentencepiece(decoder: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    """A space is part of the word after it; characters that the vocabulary lacks are byte tokens."""
    vocab = {word: token_id for token_id, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if normalizer:
        inner.normalizer = normalizer
    if pre_tokenizer:
        inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


LLAMA = sentencepiece(
    decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
)
MISTRAL = sentencepiece(
    decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
    pre_tokenizer=pre_tokenizers.Metaspace(),
)
HF = {"byte-level": AutoTokenizer.from_pretrained(TINY), "llama": LLAMA, "mistral": MISTRAL}
TOKENIZERS = {name: Tokenizer(hf) for name, hf in HF.items()}
BYTE_LEVEL, BYTE_FALLBACK = Tokenizer.load(TINY, VOCAB), TOKENIZERS["llama"]

names = st.sampled_from(sorted(HF))
any_ids = st.lists(st.integers(0, 270) | st.integers(0, VOCAB + 10), max_size=40)
# Spelt in the ids of the last two: words, special tokens, characters in bytes, an id of no token.
words = st.sampled_from([[i] for i, word in enumerate(WORDS) if not word.startswith("<0x")] + [[len(WORDS)]])
spelt = st.characters(exclude_categories=["Cs"]).map(lambda char: [WORDS.index(f"<0x{b:02X}>") for b in char.encode()])
word_ids = st.lists(words | spelt | st.just([WORDS.index("<0x20>")]), max_size=20).map(lambda ids: list(chain(*ids)))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=BROKEN) | st.sampled_from(" ab.the▁"))
COMBINING, JOINER, TONE = "\N{COMBINING ACUTE ACCENT}", "\N{ZERO WIDTH JOINER}", "\N{EMOJI MODIFIER FITZPATRICK TYPE-4}"
HARD = f"naïve e{COMBINING} 👨{JOINER}👩{TONE} 你好 🇵🇹 ﷽"


def stream(tokenizer: Tokenizer, pieces: list[list[int]], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.finish()]


@st.composite
def in_pieces(draw: st.DrawFn, ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """A list of ids, cut anywhere, as an engine may send it."""
    whole = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole))))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(names, in_pieces(any_ids), st.booleans())
def test_any_ids_stream_to_the_text_of_the_whole(name: str, pieces: list[list[int]], skip: bool) -> None:
    shown = stream(TOKENIZERS[name], pieces, skip_special_tokens=skip)
    assert "".join(shown) == TOKENIZERS[name].decode(list(chain(*pieces)), skip)
    assert all(piece.encode().decode() == piece for piece in shown)


@given(names, any_ids | word_ids, st.booleans())
def test_text_is_what_transformers_makes_of_the_ids(name: str, ids: list[int], skip: bool) -> None:
    theirs = HF[name].decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    # For one byte that is no text, theirs gives up all byte tokens around it.
    if name == "byte-level" or BROKEN not in theirs:
        assert TOKENIZERS[name].decode(ids, skip) == theirs


@given(names, texts)
@example("byte-level", HARD)
@example("llama", HARD)
@example("mistral", HARD)
def test_no_half_character_is_ever_shown_and_no_whole_one_held_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    detokenizer, spelt, shown = Detokenizer(tokenizer), b"", ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        spelt += tokenizer.token_bytes(token_id)
        shown += detokenizer.push([token_id])
        assert shown.strip() == spelt.decode(errors="ignore").strip()
    assert BROKEN not in shown
    assert detokenizer.finish() == ""


def test_one_broken_byte_takes_no_character_with_it() -> None:
    broken = WORDS.index("<0xE4>")
    ids = [*BYTE_FALLBACK.encode("你"), broken, *BYTE_FALLBACK.encode("好", add_special_tokens=False), broken]
    assert BYTE_FALLBACK.decode(ids) == f"你{BROKEN} 好{BROKEN}"
    assert stream(BYTE_FALLBACK, [ids])[-1] == BROKEN


@given(names, any_ids)
def test_the_bytes_of_tokens_are_those_of_their_text(name: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    spelt = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
    assert spelt.lstrip(" ") == tokenizer.decode(ids, skip_special_tokens=False).lstrip(" ")


def test_bytes_of_a_token() -> None:
    the, newline = BYTE_LEVEL.encode(" the")[0], BYTE_LEVEL.encode("\n")[0]
    assert (BYTE_LEVEL.token_bytes(the), BYTE_LEVEL.tokens([the, newline])) == (b" the", ["Ġthe", "Ċ"])
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.encode("é")[-1]) in (b"\xc3\xa9", b"\xa9")
    assert BYTE_LEVEL.token_bytes(0) == b"<|endoftext|>"
    assert BYTE_FALLBACK.token_bytes(WORDS.index("<0xE2>")) == b"\xe2"
    assert BYTE_FALLBACK.token_bytes(WORDS.index("▁the")) == b" the"
    assert BYTE_FALLBACK.token_bytes(len(WORDS)) == b""


def test_special_tokens_are_shown_when_asked_for() -> None:
    ids = [1, *BYTE_FALLBACK.encode("the")]
    assert BYTE_FALLBACK.decode(ids) == "the"
    assert BYTE_FALLBACK.decode(ids, skip_special_tokens=False) == "<s> the"


def test_what_others_need_to_know_of_a_tokenizer() -> None:
    info = json.loads(json.dumps(BYTE_LEVEL.info))
    assert info["eos_token"] == BYTE_LEVEL.token_bytes(info["eos_token_id"]).decode() == "<|im_end|>"
    assert (info["vocab_size"], info["bos_token"], info["model_max_length"]) == (VOCAB, None, 2048)
    assert "<|im_start|>" in info["chat_template"]
    assert BYTE_FALLBACK.info["model_max_length"] is None
    assert BYTE_LEVEL.backend.get_vocab_size() == VOCAB


def cut(text: str, stop: list[str]) -> str:
    """The definition: read character by character, until a stop string has just ended."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=10),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=7), max_size=3),
)
@example(["aabaaa", "baaaa"], ["aabaaaa"])
def test_stop_strings_cut_at_one_place_however_the_text_is_split(pieces: list[str], stop: list[str]) -> None:
    checker, shown = StopChecker(stop), ""
    for piece in pieces:
        shown += checker.push(piece)
        if checker.stopped:
            break
    shown += checker.finish()
    assert shown == cut("".join(pieces), stop)
    assert (checker.stopped is not None) == any(s in "".join(pieces) for s in stop)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["\n\nUser:"])
    assert checker.push("one\n") == "one"
    assert checker.push("two\n\nUs") == "\ntwo"
    assert checker.push("ed") == "\n\nUsed"


def test_hostile_stop_strings_cost_little() -> None:
    checker = StopChecker(["a" * (512 + n) + "b" + "a" * (511 - n) for n in range(16)])
    start = time.process_time()
    shown = sum(len(checker.push("aaaa")) for _ in range(2000))
    assert shown + len(checker.finish()) == 8000
    assert time.process_time() - start < 2  # it takes a thirtieth of it; reading behind again and again, five times it


# Chat templates

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {% generation %}
        {{- message.content | trim + '<|im_end|>' }}
        {% endgeneration %}

    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
FEATURES = """\
{% set ns = namespace(seen=0, names=dict(a=1)) %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.seen = ns.seen + 1 %}
    {{ ns.seen }} {{ message | tojson }} {{ message.role | tojson(indent=2) }}
    {% generation %}{% set inner = 1 %}{{ inner }}{% endgeneration %}

    {% if ns.seen > 2 %}{% break %}{% endif %}
{% endfor %}
{{ inner is defined }} {{ bos_token is defined }} {{ eos_token }} {{ strftime_now('%Y') }} {{ ns.names }} {{ style }}
{% macro shout(text) %}{{ text | upper }}!{% endmacro %}
{{- shout('a<b') }} {{ tools is none }} {{ documents }}
"""
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Lisboa & é", "days": 2}'}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Hot?", "name": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "31", "tool_call_id": "1"},
    {"role": "tool", "content": "32"},
    {"role": "assistant", "content": "Yes. ", "reasoning_content": "31 is hot"},
]
PARSED = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lisboa & é", "days": 2}}}
CHAT_OF_OBJECTS = [message | ({"tool_calls": [PARSED, PARSED]} if "tool_calls" in message else {}) for message in CHAT]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": 'a "<forecast>"', "parameters": {}}}]


def with_template(template: str | dict[str, str]) -> Tokenizer:
    """The embedded model's tokenizer, with another template."""
    hf = AutoTokenizer.from_pretrained(TINY)
    hf.chat_template = template
    return Tokenizer(hf)


def qwen2() -> str:
    file = SHARED / "qwen2" / "chat_template.jinja"
    if not file.exists():
        pytest.skip("the tokenizer is not here")
    return file.read_text()


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("template", [QWEN, FEATURES, qwen2])
def test_templates_write_what_they_write_in_transformers(template: Any, tools: Any) -> None:
    template = template() if callable(template) else template
    options = {"tools": tools, "style": "plain", "add_generation_prompt": True, "tokenize": False}
    theirs = HF["byte-level"].apply_chat_template(CHAT_OF_OBJECTS, chat_template=template, **options)
    kwargs = {"style": "plain"}
    assert with_template(template).chat_text(CHAT, tools, kwargs=kwargs) == theirs
    assert BYTE_LEVEL.chat_text(CHAT, tools, template=template, kwargs=kwargs) == theirs


@pytest.mark.parametrize("last", ["Well", "Well ", " ", "你"])
@pytest.mark.parametrize("template", [None, QWEN])
def test_a_message_is_continued_as_in_transformers(template: str | None, last: str) -> None:
    messages = [*CHAT[:2], {"role": "assistant", "content": last}]
    tokenizer = with_template(template) if template else BYTE_LEVEL
    theirs = HF["byte-level"].apply_chat_template(
        messages, chat_template=template, continue_final_message=True, tokenize=False
    )
    assert tokenizer.chat_text(messages, continue_final_message=True) == theirs
    assert tokenizer.decode(tokenizer.chat(messages, continue_final_message=True)).rstrip().endswith(last.strip())


def test_a_chat_ends_where_the_answer_begins() -> None:
    text = BYTE_LEVEL.decode(BYTE_LEVEL.chat([{"role": "user", "content": "Hello"}]))
    assert "Hello" in text
    assert text.rstrip().endswith("assistant")
    assert not BYTE_LEVEL.chat_text(CHAT[:2], add_generation_prompt=False).rstrip().endswith("assistant")


def test_reasoning_reaches_the_template_under_either_name() -> None:
    tokenizer = with_template("{{ messages[0].reasoning_content }}")
    assert tokenizer.chat_text([{"role": "assistant", "reasoning": "hm"}]) == "hm"
    assert tokenizer.chat_text([{"role": "assistant", "reasoning_content": "hm"}]) == "hm"


def test_the_template_says_whether_it_takes_tools() -> None:
    assert with_template(QWEN).template_takes_tools
    assert with_template("{% if not tools is defined %}{% set tools = none %}{% endif %}").template_takes_tools
    assert with_template({"default": "{{ messages }}", "tool_use": QWEN}).template_takes_tools
    assert not BYTE_LEVEL.template_takes_tools
    assert not BYTE_FALLBACK.template_takes_tools
    assert not with_template("{% broken").template_takes_tools
    assert variables_of("{% for m in messages %}{{ m }}{{ style }}{% endfor %}") == {"messages", "style"}


def test_a_template_of_its_own_for_tools_is_used_for_them() -> None:
    tokenizer = with_template({"default": "plain", "tool_use": "with tools"})
    assert (tokenizer.chat_text(CHAT), tokenizer.chat_text(CHAT, TOOLS)) == ("plain", "with tools")


def test_a_model_without_chat_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        BYTE_FALLBACK.chat([{"role": "user", "content": "Hello"}])


LOOP = "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% broken", "broken"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__html__=1) }}", "namespace"),
        ("{{ '\\ud800' }}", "surrogates"),
        (LOOP, "takes over"),
    ],
)
def test_a_template_that_fails_is_a_bad_request(template: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as error:
        with_template(template).chat(CHAT)
    assert error.value.param == "messages"
    assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match=reason) as error:
        BYTE_LEVEL.chat(CHAT, template=template)
    assert error.value.param == "chat_template"
    assert BYTE_LEVEL.chat(CHAT[:1])  # this thread has nothing left to fear


@pytest.mark.parametrize(
    "template",
    [DOUBLING, "{{ 'a' * 10**10 }}", "{{ 2 ** (10**9) }}", "{{ [[]] * 10**9 }}", "{{ '%1000000000d' % 1 }}"],
)
def test_a_client_s_template_cannot_take_the_machine(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match="takes over") as error:
        BYTE_LEVEL.chat(CHAT, template=template)
    assert error.value.param == "chat_template"
    assert time.monotonic() - start < 15


def test_a_client_s_template_and_its_text_have_limits_of_length() -> None:
    for template in ("é" * (MAX_TEMPLATE_BYTES // 2) + "a", f"{{{{ 'a' * {MAX_CHARACTERS + 1} }}}}"):
        with pytest.raises(RequestError, match=r"has over|writes over") as error:
            BYTE_LEVEL.chat_text(CHAT, template=template)
        assert error.value.param == "chat_template"
    assert len(BYTE_LEVEL.chat_text(CHAT, template=f"{{{{ 'a' * {MAX_CHARACTERS} }}}}")) == MAX_CHARACTERS


def test_many_chats_at_once_do_not_end_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose time is up end; others, begun in the same threads right after, do not."""
    monkeypatch.setattr("kvtool.chat_template.SECONDS", 0.5)

    def chat(n: int) -> str:
        try:
            return render("{{ n }}" if n % 4 else LOOP, {"n": n})
        except TimeoutError:
            return "late"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(chat, range(20))) == [str(n) if n % 4 else "late" for n in range(20)]


def test_a_chat_whose_time_is_up_at_once_is_late_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time can run out while its clock is being started."""
    monkeypatch.setattr("kvtool.chat_template.SECONDS", 0)
    for _ in range(200):
        with pytest.raises(TimeoutError):
            render(LOOP, {})


@pytest.mark.parametrize("arguments", ["{", "[" * 100_000])
def test_arguments_of_a_tool_call_that_are_no_json_are_refused(arguments: str) -> None:
    for call in ({"function": {"name": "weather", "arguments": arguments}}, {"function": arguments}, arguments):
        with pytest.raises(RequestError, match="a tool call cannot be read"):
            with_template(QWEN).chat([{"role": "assistant", "tool_calls": [call]}])


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="does not fit the model"):
        Tokenizer.load(TINY, VOCAB - 1)


@pytest.mark.parametrize("content", [None, "{ broken", "{}"])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer"):
        Tokenizer.load(tmp_path, VOCAB)
