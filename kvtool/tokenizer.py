"""Text to ids and back, also piece by piece as an answer grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtool.errors import ModelError, RequestError, UnsupportedError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
PARTIAL = 3  # bytes of an incomplete character at most, and so tokens and U+FFFD


class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what serving needs.

    Attributes:
        longest: characters of its longest token.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self.longest = max(map(len, hf.get_vocab()))
        self._special = {token_id for token_id, token in hf.added_tokens_decoder.items() if token.special}

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> "Tokenizer":
        """The tokenizer of a model folder; code that lies in the folder is never run.

        Args:
            path: the model folder.
            vocab_size: of the model; every id of the tokenizer must be below it.

        Raises:
            ModelError: there is no usable tokenizer, or it belongs to another model.
        """
        from transformers import AutoTokenizer

        try:
            hf = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises whatever its parsers do
            reason = str(error).strip().partition("\n")[0]
            raise ModelError(f"{path}: the tokenizer cannot be read: {reason}; replace tokenizer.json") from error
        if len(hf) <= len(hf.added_tokens_decoder):
            raise ModelError(f"{path}: no tokenizer found; put the model's tokenizer.json there")
        largest = max(hf.get_vocab().values())
        if largest >= vocab_size:
            raise ModelError(
                f"{path}: the tokenizer does not fit the model: it has ids up to {largest}, "
                f"config.json has vocab_size {vocab_size}; use the tokenizer that came with the weights"
            )
        return cls(hf)

    @property
    def definition(self) -> str:
        """All of it as one JSON text, as in a tokenizer.json.

        Raises:
            UnsupportedError: it is Python code, which has no such form.
        """
        if not self._hf.is_fast:
            raise UnsupportedError("the tokenizer has no tokenizer.json")
        text: str = self._hf.backend_tokenizer.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the special tokens that the model expects around one (BOS, for some)."""
        ids: list[int] = self._hf(text, verbose=False)["input_ids"]
        return ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation as the model's chat template writes it, up to where the answer begins.

        The template comes with the model and is rendered in transformers' immutable sandbox.

        Raises:
            RequestError: the model has no template, or the template refuses the messages.
        """
        if self._hf.chat_template is None:
            raise RequestError("the model has no chat template; send a plain prompt instead", "messages")
        try:
            text = self._hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            raise RequestError(f"the chat template refuses the messages: {error}", "messages") from error
        # The template has written the special tokens already.
        ids: list[int] = self._hf(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        ordinary = [token_id for token_id in token_ids if token_id not in self._special]
        text: str = self._hf.decode(ordinary, clean_up_tokenization_spaces=False)
        return text


class Detokenizer:
    """The text of one growing list of ids: what `push` and `finish` return adds up to `decode` of them all.

    A character's bytes may be spread over several tokens, so a trailing U+FFFD is held back until what follows says
    whether it is half a character or really broken. What ends in U+FFFD for longer than a character can take is broken.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the newest ids, from a point that no later token reaches behind
        self._text = ""  # decode(_window)
        self._shown = 0  # characters of _text already returned
        self._unsettled = 0  # how many of the newest ids left _text ending in U+FFFD

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete."""
        return "".join(map(self._push, token_ids))

    def _push(self, token_id: int) -> str:
        window = [*self._window, token_id]
        text = self._tokenizer.decode(window)
        settled = len(text.rstrip(REPLACEMENT))
        self._unsettled = self._unsettled + 1 if settled < len(text) else 0
        broken = self._unsettled > PARTIAL
        if broken:
            settled = max(settled, len(text) - PARTIAL)
        fresh = text[self._shown : settled]
        self._shown = max(self._shown, settled)
        # Some tokenizers strip the space of a first word, so a new window may begin only where that changes nothing.
        before, newest = self._text, [token_id]
        if broken:
            newest = window[-2 * PARTIAL :]  # more than an incomplete character
            before = self._tokenizer.decode(window[: -len(newest)])
        alone = self._tokenizer.decode(newest)
        if (len(alone) > PARTIAL if broken else alone and settled == len(text)) and text == before + alone:
            window, text, self._shown = newest, alone, self._shown - len(before)
        self._window, self._text = window, text
        return fresh

    def finish(self) -> str:
        """What was held back."""
        rest = self._text[self._shown :]
        self._shown = len(self._text)
        return rest


class StopChecker:
    """Ends a growing text before the first stop string, and holds back what may be the beginning of one.

    The first is the one that is complete first; of those complete at once, the longest. So the cut does not depend on
    how the text was split.

    Attributes:
        stopped: the stop string that was found; nothing may be pushed after it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show."""
        assert self.stopped is None
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.stopped = min(found)
            self._held = ""
            return text[: end - len(self.stopped)]
        safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
