"""Text to ids and back, also piece by piece as an answer grows."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from kvtool.chat_template import render, render_apart, variables_of
from kvtool.errors import ModelError, RequestError

MAX_TEMPLATE_BYTES = 64 << 10  # of one that a client sends

# GPT-2's alphabet, in which byte-level tokens are spelt: a character for every byte, itself where it can be printed.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_CONTINUE = "CONTINUE_FROM_HERE "


def vocabulary(path: Path, vocab_size: int) -> dict[str, int] | None:
    """Ids of a model folder's tokens; None where no tokenizer is found that fits the model."""
    try:
        return Tokenizer.load(path, vocab_size).vocabulary
    except ModelError:
        return None


class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what serving needs.

    Attributes:
        backend: the `tokenizers` library's own, for grammars.
        vocabulary: ids of its tokens.
        longest: characters of its longest token.
        bos_token_id, eos_token_id: ids that begin and end a text, if there are such.
    """

    def __init__(self, hf: Any) -> None:
        self._hf = hf
        self.backend: tokenizers.Tokenizer = hf.backend_tokenizer
        self.vocabulary: dict[str, int] = hf.get_vocab()
        self.longest = max(map(len, self.vocabulary))
        self.bos_token_id: int | None = hf.bos_token_id
        self.eos_token_id: int | None = hf.eos_token_id
        self._special = {token_id for token_id, token in hf.added_tokens_decoder.items() if token.special}
        self._join = self.backend.decoder.decode if self.backend.decoder else " ".join
        self._byte_level = self._join(["Ġ"]) == " "
        self._byte_tokens = self._join(["<0x41>"]) == "A"

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
        if len(hf) <= len(hf.added_tokens_decoder) or not hasattr(hf, "backend_tokenizer"):
            raise ModelError(f"{path}: no tokenizer found; put the model's tokenizer.json there")
        largest = max(hf.get_vocab().values())
        if largest >= vocab_size:
            raise ModelError(
                f"{path}: the tokenizer does not fit the model: it has ids up to {largest}, "
                f"config.json has vocab_size {vocab_size}; use the tokenizer that came with the weights"
            )
        return cls(hf)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, by default with the special tokens that the model expects around one (BOS, for some)."""
        ids: list[int] = self._hf(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD.

        As transformers has it, but for byte-fallback tokenizers (Llama 2, Mistral): there a broken byte makes the whole
        run of byte tokens around it U+FFFD, which no stream could foresee; here it harms no other character.
        """
        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of ids; "" for those that are not in it."""
        return [self.backend.id_to_token(token_id) or "" for token_id in token_ids]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token, also a special one, adds to a text; it may end in half a character."""
        return self.spell(token_id, first=False, skip_special_tokens=False) or b""

    def spell(self, token_id: int, first: bool, skip_special_tokens: bool) -> bytes | None:
        """What a token adds to a text, None if it has no part in it.

        Args:
            token_id: any number.
            first: no other token comes before; some tokenizers strip the space of such a word.
            skip_special_tokens: those have no part.
        """
        token = self.backend.id_to_token(token_id)
        if token is None or (skip_special_tokens and token_id in self._special):
            return None
        if self._byte_level:
            try:
                return bytes(map(_ALPHABET.__getitem__, token))
            except KeyError:  # an added token, spelt as it is
                return token.encode()
        if self._byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return b"" if first and not self._join([token]) else bytes.fromhex(byte[1])
        return self._join([token]).encode() if first else self._join(["a", token])[1:].encode()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Ids of a conversation as `chat_text`, with the same arguments and errors, writes it."""
        text = self.chat_text(messages, tools, template, kwargs, add_generation_prompt, continue_final_message)
        return self.encode(text, add_special_tokens=False)  # the template has written them already

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """A conversation as a chat template writes it, up to where the answer begins. Blocks; call it from a thread.

        Args:
            messages: as OpenAI's clients send them; all that they hold reaches the template.
            tools: JSON objects that describe functions.
            template: a client's, in the place of the model's.
            kwargs: more variables for the template.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end inside the last message instead, for the model to go on with it.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        if template is not None and len(template.encode()) > MAX_TEMPLATE_BYTES:
            raise RequestError(f"chat_template has over {MAX_TEMPLATE_BYTES} bytes; send less", "chat_template")
        source = template or self._template(tools)
        if source is None:
            raise RequestError("the model has no chat template; send a plain prompt instead", "messages")
        try:
            chat = list(map(_for_template, messages))
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages: a tool call cannot be read: {error}; correct it", "messages") from error
        if continue_final_message:
            if not isinstance(chat[-1].get("content"), str):
                raise RequestError("messages: the last one has no text to continue; add its content", "messages")
            chat[-1]["content"] += _CONTINUE
        variables = {
            **self._hf.special_tokens_map,
            "documents": None,
            **(kwargs or {}),
            "messages": chat,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        try:
            text = (render_apart if template else render)(source, variables)
            text.encode()  # lone surrogates, which JSON can spell, have no tokens
        except Exception as error:  # a template can raise anything
            param = "chat_template" if template else "messages"
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise RequestError(f"the chat template refuses the messages: {reason}", param) from error
        return _before_mark(text) if continue_final_message else text

    @cached_property
    def template_takes_tools(self) -> bool:
        """The model's chat template can describe tools to the model."""
        try:
            return "tools" in variables_of(self._template(tools=[{}]) or "")
        except jinja2.TemplateSyntaxError:
            return False

    @property
    def info(self) -> dict[str, Any]:
        """What another program needs to know to write prompts for this model, named as in tokenizer_config.json."""
        longest = self._hf.model_max_length
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": len(self._hf),
            "model_max_length": longest if longest < 2**53 else None,  # transformers says 10**30 for "not known"
            **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")),
            **self._hf.special_tokens_map,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "special_tokens": self.tokens(sorted(self._special)),
            "chat_template": self._template(None),
        }

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        """The model's template; some models have one of its own for tools."""
        templates: str | dict[str, str] | None = self._hf.chat_template
        if not isinstance(templates, dict):
            return templates
        return templates.get("tool_use" if tools and "tool_use" in templates else "default")


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates want it: without nulls, reasoning under its common name, arguments as objects."""
    message = {name: value for name, value in message.items() if value is not None}
    if "reasoning" in message:
        message.setdefault("reasoning_content", message["reasoning"])
    if "tool_calls" in message:
        message["tool_calls"] = list(map(_with_parsed_arguments, message["tool_calls"]))
    return message


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, JSON text in OpenAI's protocol, are the object that the text stands for."""
    function = call.get("function", {})
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    return {**call, "function": {**function, "arguments": json.loads(arguments or "{}")}}


def _before_mark(text: str) -> str:
    """The text up to the mark that the last message ended in."""
    before, mark, after = text.rpartition(_CONTINUE.strip())
    if not mark:
        raise RequestError("the chat template leaves the last message out, so it cannot be continued", "messages")
    return before if after.startswith(" ") else before.rstrip()  # the template trims messages


class Detokenizer:
    """The text of one growing list of ids: what `push` and `finish` return adds up to `decode` of them all.

    A character's bytes may be spread over several tokens; it is shown once they are complete.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that `token_ids` complete."""
        spelt = []
        for token_id in token_ids:
            piece = self._tokenizer.spell(token_id, self._first, self._skip_special_tokens)
            if piece is not None:
                spelt.append(piece)
                self._first = False
        return self._characters.decode(b"".join(spelt))

    def finish(self) -> str:
        """What was held back: U+FFFD for half a character."""
        return self._characters.decode(b"", final=True)


class StopChecker:
    """Ends a growing text before the first stop string, and holds back what may be the beginning of one.

    The first is the one that is complete first; of those complete at once, the longest. So the cut does not depend on
    how the text was split. A character costs the same whatever the stop strings are (Knuth, Morris and Pratt, 1977).

    Attributes:
        stopped: the stop string that was found; nothing may be pushed after it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [(text, _borders(text)) for text in sorted(stop, key=len, reverse=True)]
        self._matched = [0] * len(stop)  # characters of each that the text ends with
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show."""
        assert self.stopped is None
        if not self._stop:
            return text
        for end, character in enumerate(text, start=1):
            for index, (stop, borders) in enumerate(self._stop):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                self._matched[index] = matched
                if matched == len(stop):
                    shown = self._held + text[:end]
                    self._held, self.stopped = "", stop
                    return shown[: -len(stop)]
        text = self._held + text
        safe = len(text) - max(self._matched)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return rest


@lru_cache(maxsize=256)
def _borders(text: str) -> list[int]:
    """For each beginning of `text`, the length of the longest shorter one that it also ends with."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return borders
