"""The laws of how log-probabilities are written down."""

from itertools import accumulate, chain, pairwise

import hypothesis.strategies as st
import msgspec
from hypothesis import given
from test_tokenizer import TOKENIZERS, names

from kvtool.request import TokenLogprobs
from kvtool.server.logprobs import CompletionLogprobs, GenerateLogprobs, chat_logprobs, of_each, prompt_logprobs, spell
from kvtool.tokenizer import Tokenizer

ids = st.integers(0, 270)
numbers = st.floats(-50, 0) | st.just(float("-inf"))


@st.composite
def entries(draw: st.DrawFn) -> tuple[int, TokenLogprobs]:
    """A token that was taken, and the most likely ones, which it may be one of."""
    top_ids = draw(st.lists(ids, max_size=20, unique=True))
    top_logprobs = sorted(draw(st.lists(numbers, min_size=len(top_ids), max_size=len(top_ids))), reverse=True)
    taken = draw(st.sampled_from(top_ids) | ids if top_ids else ids)
    logprob = top_logprobs[top_ids.index(taken)] if taken in top_ids else draw(numbers)
    return taken, TokenLogprobs(logprob, top_ids, top_logprobs)


answers = st.lists(entries(), max_size=8)


@given(names, answers)
def test_no_alternative_is_lost_and_the_taken_token_has_its_name(
    name: str, answer: list[tuple[int, TokenLogprobs]]
) -> None:
    token_ids, logprobs = [token_id for token_id, _ in answer], [entry for _, entry in answer]
    told = CompletionLogprobs(TOKENIZERS[name]).write(token_ids, logprobs)
    for index, (token_id, entry) in enumerate(answer):
        top = told["top_logprobs"][index]
        assert len(top) == len({token_id, *entry.top_ids})
        assert top[told["tokens"][index]] == told["token_logprobs"][index] == max(entry.logprob, -9999)
        best = [max(number, -9999) for number in entry.top_logprobs]
        assert sorted(top.values(), reverse=True)[: len(best)] == best or entry.logprob > min(best)


@given(names, answers, st.data())
def test_offsets_do_not_depend_on_how_an_answer_was_split(
    name: str, answer: list[tuple[int, TokenLogprobs]], data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    token_ids, logprobs = [token_id for token_id, _ in answer], [entry for _, entry in answer]
    whole = CompletionLogprobs(tokenizer).write(token_ids, logprobs)
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=len(answer), max_size=len(answer)))
    cuts = [0, *(min(cut, len(answer)) for cut in accumulate(sizes)), len(answer)]
    writer = CompletionLogprobs(tokenizer)
    parts = [writer.write(token_ids[a:b], logprobs[a:b]) for a, b in pairwise(cuts)]
    assert {column: list(chain(*(part[column] for part in parts))) for column in whole} == whole
    assert whole["text_offset"] == sorted(whole["text_offset"])
    assert max(whole["text_offset"], default=0) <= len(tokenizer.decode(token_ids))


@given(names, ids)
def test_the_spelling_of_a_token_tells_its_bytes(name: str, token_id: int) -> None:
    tokenizer = TOKENIZERS[name]
    spelt = spell(tokenizer, token_id)
    bytes_ = tokenizer.token_bytes(token_id)
    assert spelt.encode() == bytes_ or spelt == "bytes:" + "".join(f"\\x{byte:02x}" for byte in bytes_)


@given(names, answers)
def test_all_of_it_is_json(name: str, answer: list[tuple[int, TokenLogprobs]]) -> None:
    """Which has no infinity."""
    tokenizer: Tokenizer = TOKENIZERS[name]
    token_ids, logprobs = [token_id for token_id, _ in answer], [entry for _, entry in answer]
    prompt = [1, *token_ids]
    for told in (
        CompletionLogprobs(tokenizer).write(prompt, of_each(prompt, logprobs)),
        chat_logprobs(tokenizer, token_ids, logprobs),
        prompt_logprobs(tokenizer, prompt, logprobs),
        GenerateLogprobs(tokenizer, with_text=True, with_top=True).write("input", prompt, of_each(prompt, logprobs)),
    ):
        assert msgspec.json.decode(msgspec.json.encode(told)) == told  # msgspec writes an infinity as null
