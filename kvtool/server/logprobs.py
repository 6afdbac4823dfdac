"""Log-probabilities as OpenAI's, vLLM's and SGLang's clients read them."""

from collections.abc import Iterator, Sequence
from typing import Any

from kvtool.request import TokenLogprobs
from kvtool.tokenizer import Detokenizer, Tokenizer

LOWEST = -9999.0  # OpenAI's word for minus infinity, which JSON has not


def spell(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a text; one that is no UTF-8 by itself as OpenAI does it: `bytes:\\xf0\\x9f`."""
    spelt = tokenizer.token_bytes(token_id)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def most_likely(entry: TokenLogprobs) -> Iterator[tuple[int, float]]:
    """Ids and log-probabilities, best first."""
    return ((other, max(logprob, LOWEST)) for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True))


def of_each(prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> list[TokenLogprobs | None]:
    """Of each token of a prompt; the first has none, and after an abort none may have any."""
    return [None] * (len(prompt) - len(logprobs)) + [*logprobs]


class CompletionLogprobs:
    """Writes the `logprobs` of one choice of a completion, piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._detokenizer, self._offset = tokenizer, Detokenizer(tokenizer), 0

    def write(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of tokens that follow those before; the first of a prompt has no log-probability."""
        return {
            "text_offset": list(map(self._advance, token_ids)),
            "token_logprobs": [entry and max(entry.logprob, LOWEST) for entry in logprobs],
            "tokens": [spell(self._tokenizer, token_id) for token_id in token_ids],
            "top_logprobs": [
                entry and self._top(token_id, entry) for token_id, entry in zip(token_ids, logprobs, strict=True)
            ],
        }

    def _advance(self, token_id: int) -> int:
        """Where the token begins in the text."""
        offset = self._offset
        self._offset += len(self._detokenizer.push([token_id]))
        return offset

    def _top(self, token_id: int, entry: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the one that was taken, which no other may take the name of."""
        taken = spell(self._tokenizer, token_id)
        top: dict[str, float] = {}
        for other, logprob in (dict(most_likely(entry)) | {token_id: max(entry.logprob, LOWEST)}).items():
            name = spell(self._tokenizer, other)
            alike = other != token_id and (name == taken or name in top)
            top[f"token_id:{other}" if alike else name] = logprob
        return top


def chat_logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        spelt = tokenizer.token_bytes(token_id)
        return {"token": spell(tokenizer, token_id), "logprob": max(logprob, LOWEST), "bytes": list(spelt)}

    return {
        "content": [
            one(token_id, entry.logprob) | {"top_logprobs": [one(*other) for other in most_likely(entry)]}
            for token_id, entry in zip(token_ids, logprobs, strict=True)
        ]
    }


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token but the first, ids to log-probabilities and ranks."""

    def one(token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": spell(tokenizer, token_id)}

    def entry_of(token_id: int, entry: TokenLogprobs) -> dict[str, Any]:
        ranks = {other: rank for rank, other in enumerate(entry.top_ids, start=1)}
        numbers = {token_id: entry.logprob} | dict(most_likely(entry))
        return {str(other): one(other, logprob, ranks.get(other)) for other, logprob in numbers.items()}

    return [None, *map(entry_of, prompt[1:], logprobs)]


class GenerateLogprobs:
    """What SGLang's `meta_info` says of log-probabilities: triples of number, id and, if asked for, text."""

    def __init__(self, tokenizer: Tokenizer, with_text: bool, with_top: bool) -> None:
        self._tokenizer, self._with_text, self._with_top = tokenizer, with_text, with_top

    def write(self, kind: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of tokens of this kind, `input` or `output`; the first of an input has no log-probability."""
        pairs = list(zip(token_ids, logprobs, strict=True))
        written: dict[str, Any] = {
            f"{kind}_token_logprobs": [
                self._one(token_id, None if entry is None else entry.logprob) for token_id, entry in pairs
            ]
        }
        if self._with_top:
            written[f"{kind}_top_logprobs"] = [
                entry and [self._one(*other) for other in most_likely(entry)] for _, entry in pairs
            ]
        return written

    def _one(self, token_id: int, logprob: float | None) -> list[Any]:
        number = None if logprob is None else max(logprob, LOWEST)
        return [number, token_id, spell(self._tokenizer, token_id) if self._with_text else None]
