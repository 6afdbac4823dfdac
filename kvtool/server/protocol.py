"""The bodies that clients send, as OpenAI and SGLang define them.

Strict: "1" is no number and NaN is none either. Fields that change nothing are ignored; those that would change the
answer, and that kvtool does not have, are refused.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeGuard

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

LIMIT = 2**31  # of ids and counts, so that all of them can be sent on; a model's own limits are far below
# One body must not keep the others waiting.
MAX_PROMPTS, MAX_MESSAGES, MAX_STOPS, MAX_STOP_LENGTH = 1024, 16384, 16, 1024

Prompt = str | list[int]


@dataclass(frozen=True)
class Prompts:
    """One prompt, or `many` in a list, if only a list of one."""

    items: list[Prompt]
    many: bool


def is_text(value: object) -> TypeGuard[str]:
    """A string that UTF-8 can carry; JSON can spell lone surrogates, which it cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_ids(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return min(value, default=0) >= 0 and max(value, default=0) < LIMIT


def as_utf8(value: str) -> str:
    if is_text(value):
        return value
    raise PydanticCustomError("unicode", "should be a text without lone surrogates")


Text = Annotated[str, AfterValidator(as_utf8)]


def as_prompts(value: object) -> Prompts:
    """Text, token ids, or a list of either."""
    if is_text(value) or is_ids(value):
        return Prompts([value], many=False)
    if isinstance(value, list) and len(value) > MAX_PROMPTS and isinstance(value[0], str | list):
        raise PydanticCustomError("prompt", f"has {len(value)} prompts; send at most {MAX_PROMPTS}")
    if isinstance(value, list) and all(is_text(item) or is_ids(item) for item in value):
        return Prompts(value, many=True)
    raise PydanticCustomError("prompt", "should be a text, a list of token ids (0 or more), or a list of either")


def as_stops(value: object) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"has {len(stops)} texts; send at most {MAX_STOPS}")
    if not isinstance(stops, list) or not all(is_text(stop) and stop for stop in stops):
        raise PydanticCustomError("stop", "should be a text or a list of texts, none of them empty")
    if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise PydanticCustomError("stop", f"has a text of over {MAX_STOP_LENGTH} characters; send shorter ones")
    return stops


def as_text(value: object) -> object:
    """A message's content: text as it is, a list of text parts joined, null as nothing."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return value
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise PydanticCustomError(
                "content", "should be a text or a list of text parts; other parts are unsupported"
            )
    return "\n".join(part["text"] for part in value)


class Body(BaseModel):
    """An object in a request.

    Attributes:
        unsupported: fields that would change the answer, each with the values that would not.
        elsewhere: what to send instead of some of them.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}
    elsewhere: ClassVar[dict[str, str]] = {}

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "Body":
        for field, value in (self.model_extra or {}).items():
            if value not in self.unsupported.get(field, (value,)):
                remedy = f"send {self.elsewhere[field]}" if field in self.elsewhere else "leave it out"
                raise PydanticCustomError("unsupported", f"is not supported; {remedy}", {"field": field})
        return self


class Sampling(Body):
    """How tokens are chosen; None is whatever the route and the model have as default."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bad_words": (None, []),
        "frequency_penalty": (None, 0),
        "include_stop_str_in_output": (None, False),
        "json_schema": (None,),
        "logit_bias": (None, {}),
        "min_p": (None, 0),
        "min_tokens": (None, 0),
        "n": (None, 1),
        "presence_penalty": (None, 0),
        "regex": (None,),
        "repetition_penalty": (None, 1),
        "skip_special_tokens": (None, True),
        "stop_token_ids": (None, []),
    }

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=LIMIT)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = None
    stop: Annotated[list[str], PlainValidator(as_stops)] = []
    ignore_eos: bool = False

    @property
    def limit(self) -> tuple[str, int | None]:
        """How the body spells the most tokens of an answer, and how many these are."""
        return "max_tokens", self.max_tokens


class StreamOptions(Body):
    include_usage: bool = False


class OpenAIBody(Sampling):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.unsupported | {
        "best_of": (None, 1),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "prompt_logprobs": (None,),
        "response_format": (None, {"type": "text"}),
        "return_token_ids": (None, False),
        "structured_outputs": (None,),
        "truncate_prompt_tokens": (None,),
        "use_beam_search": (None, False),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(OpenAIBody):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIBody.unsupported | {
        "echo": (None, False),
        "logprobs": (None,),
        "suffix": (None, ""),
    }

    prompt: Annotated[Prompts, PlainValidator(as_prompts)]


class Message(Body):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"function_call": (None,), "tool_calls": (None, [])}

    role: Text
    content: Annotated[Text, BeforeValidator(as_text)]


class ChatBody(OpenAIBody):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIBody.unsupported | {
        "add_generation_prompt": (None, True),
        "audio": (None,),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "continue_final_message": (None, False),
        "documents": (None, []),
        "functions": (None, []),
        "logprobs": (None, False),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "top_logprobs": (None, 0),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        """`max_completion_tokens` is the new name of `max_tokens`, and goes before it."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit


class GenerateSampling(Sampling):
    """SGLang's `sampling_params`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.unsupported | {
        "ebnf": (None,),
        "max_tokens": (None,),
        "min_new_tokens": (None, 0),
        "no_stop_trim": (None, False),
        "structural_tag": (None,),
    }

    elsewhere: ClassVar[dict[str, str]] = {"max_tokens": "sampling_params.max_new_tokens"}

    max_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = Field(default=None, alias="max_new_tokens")

    @property
    def limit(self) -> tuple[str, int | None]:
        return "sampling_params.max_new_tokens", self.max_tokens


SAMPLING_FIELDS = [field.alias or name for name, field in GenerateSampling.model_fields.items()]


class GenerateBody(Body):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerateSampling.unsupported | {
        **dict.fromkeys(SAMPLING_FIELDS, (None,)),
        "image_data": (None, []),
        "input_embeds": (None,),
        "lora_path": (None,),
        "return_logprob": (None, False),
    }
    elsewhere: ClassVar[dict[str, str]] = GenerateSampling.elsewhere | {
        name: f"sampling_params.{name}" for name in SAMPLING_FIELDS
    }

    text: Annotated[Prompts, PlainValidator(as_prompts)] | None = None
    input_ids: Annotated[Prompts, PlainValidator(as_prompts)] | None = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None
