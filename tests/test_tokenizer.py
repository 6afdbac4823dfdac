"""Text that is streamed equals text that is decoded whole, and stop strings cut it at one place only."""

import json
from itertools import chain
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from kvtool.errors import ModelError, RequestError
from kvtool.tokenizer import Detokenizer, StopChecker, Tokenizer

TINY = Path(__file__).parents[1] / "kvtool" / "assets" / "tiny"
VOCAB = json.loads((TINY / "config.json").read_text())["vocab_size"]
BYTE_LEVEL = Tokenizer.load(TINY, VOCAB)


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: a space is part of the word after it, unknown characters are byte tokens."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁the", "a", "b", "the", "."]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))


BYTE_FALLBACK = byte_fallback()
BROKEN = [i for i in range(VOCAB) if BYTE_LEVEL.decode([i]) == "\N{REPLACEMENT CHARACTER}"]


def stream(tokenizer: Tokenizer, pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.finish()]


@st.composite
def in_pieces(draw: st.DrawFn, ids: st.SearchStrategy[list[int]]) -> list[list[int]]:
    """A list of ids, cut anywhere, as an engine may send it."""
    whole = draw(ids)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=len(whole))))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(in_pieces(st.lists(st.integers(0, 260) | st.integers(0, VOCAB - 1), max_size=40)))
def test_any_ids_stream_to_the_text_of_the_whole(pieces: list[list[int]]) -> None:
    assert "".join(stream(BYTE_LEVEL, pieces)) == BYTE_LEVEL.decode(list(chain(*pieces)))


@given(in_pieces(st.text(st.sampled_from(" ab.the你😀é"), max_size=30).map(BYTE_FALLBACK.encode)))
def test_leading_spaces_and_byte_tokens_stream_too(pieces: list[list[int]]) -> None:
    assert "".join(stream(BYTE_FALLBACK, pieces)) == BYTE_FALLBACK.decode(list(chain(*pieces)))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=40))
def test_no_half_character_is_ever_shown(text: str) -> None:
    shown = stream(BYTE_LEVEL, [[token_id] for token_id in BYTE_LEVEL.encode(text)])
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


@given(in_pieces(st.lists(st.sampled_from(BROKEN) | st.sampled_from(BYTE_LEVEL.encode("你😀é")), max_size=60)))
def test_bytes_that_are_no_text_stream_too(pieces: list[list[int]]) -> None:
    assert "".join(stream(BYTE_LEVEL, pieces)) == BYTE_LEVEL.decode(list(chain(*pieces)))


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK])
def test_bytes_that_are_no_text_are_neither_held_back_nor_read_again(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = next(i for i in range(255, 0, -1) if tokenizer.decode([i]) == "\N{REPLACEMENT CHARACTER}")
    longest = 0
    decode = tokenizer.decode

    def watched(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.push([broken]) for _ in range(100)]
    assert all(shown[3:])
    assert longest < 20
    assert "".join(shown) + detokenizer.finish() == decode([broken] * 100)


def test_text_is_not_held_back_without_need() -> None:
    ids = BYTE_LEVEL.encode("plain words, one at a time")
    assert all(stream(BYTE_LEVEL, [[token_id] for token_id in ids])[:-1])


def cut(text: str, stop: list[str]) -> str:
    """The definition: read character by character, until a stop string has just ended."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(
    st.lists(st.text(alphabet="ab", max_size=4), max_size=10),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
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


def test_a_chat_ends_where_the_answer_begins() -> None:
    text = BYTE_LEVEL.decode(BYTE_LEVEL.chat([{"role": "user", "content": "Hello"}]))
    assert "Hello" in text
    assert text.rstrip().endswith("assistant")


def test_a_model_without_chat_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        BYTE_FALLBACK.chat([{"role": "user", "content": "Hello"}])


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
