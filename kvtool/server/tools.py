"""Tool calls in a growing answer, as Hermes and Qwen models write them.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Lisbon"}}
</tool_call>
"""

from dataclasses import dataclass

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; `arguments` is a JSON object, in the model's own words."""

    name: str
    arguments: str


class ToolParser:
    """Tells tool calls from text as both grow; the result does not depend on how the answer was split.

    What turns out to be no call, unfinished or malformed, is text like any other. White space around a call is lost,
    as chat templates put it there.
    """

    def __init__(self) -> None:
        self._space: list[str] = []  # since the last text or call
        self._tag = ""  # the beginning of OPEN that follows
        self._block: list[str] = []  # what follows OPEN
        self._quoted = self._escaped = self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is safe to show, and the calls that are complete now."""
        shown: list[str] = []
        calls: list[ToolCall] = []
        for character in text:
            if self._tag == OPEN:
                self._push_inside(character, shown, calls)
            else:
                self._push_outside(character, shown)
        return "".join(shown), calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back; white space after the last call is nothing."""
        only_space = self._called and not self._tag
        rest = "".join(self._as_text())
        return "" if only_space else rest, []

    def _push_outside(self, character: str, shown: list[str]) -> None:
        if self._tag and not OPEN.startswith(self._tag + character):
            shown += self._as_text()
        if OPEN.startswith(self._tag + character):
            self._tag += character
        elif character.isspace():
            self._space.append(character)
        else:
            shown += [*self._as_text(), character]

    def _push_inside(self, character: str, shown: list[str], calls: list[ToolCall]) -> None:
        self._block.append(character)
        if self._escaped:
            self._escaped = False
        elif self._quoted:  # CLOSE may be part of an argument; a line break cannot, so a stray quote ends there
            self._escaped = character == "\\"
            self._quoted = character not in '"\n'
        elif character == '"':
            self._quoted = True
        elif character == ">" and "".join(self._block[-len(CLOSE) :]) == CLOSE:
            call = parse("".join(self._block[: -len(CLOSE)]))
            if call is None:
                shown += self._as_text()
            else:
                calls.append(call)
                self._space, self._tag, self._block, self._called = [], "", [], True

    def _as_text(self) -> list[str]:
        """All that was held back, now that it is known to be no part of a call."""
        held = [*self._space, self._tag, *self._block]
        self._space, self._tag, self._block, self._called = [], "", [], False
        return held


class _Block(msgspec.Struct):
    name: str
    arguments: msgspec.Raw


def parse(block: str) -> ToolCall | None:
    """The call that stands between the two tags; None if it is none."""
    try:
        call = msgspec.json.decode(block, type=_Block)
    except (msgspec.MsgspecError, RecursionError):
        return None
    arguments = bytes(call.arguments).decode()
    return ToolCall(call.name, arguments) if call.name and arguments.startswith("{") else None
