"""The bodies that clients send, as OpenAI, vLLM and SGLang define them.

Strict: "1" is no number and NaN is none either. Fields that change nothing are ignored; those that would change the
answer, and that kvtool does not have, are refused.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeGuard

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from kvtool.request import Grammar

LIMIT = 2**31  # of ids and counts, so that all of them can be sent on; a model's own limits are far below
# One body must not keep the others waiting.
MAX_PROMPTS, MAX_MESSAGES, MAX_TOOLS = 1024, 16384, 1024
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_IDS, MAX_BIASES = 16, 1024, 256, 1024
MAX_CHOICES, MAX_LOGPROBS, MAX_NAME_LENGTH = 128, 20, 256

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
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LENGTH), AfterValidator(as_utf8)]


def as_plain(value: dict[str, Any]) -> dict[str, Any]:
    """An object of whatever JSON holds, all of which UTF-8 can carry."""
    as_utf8(json.dumps(value, ensure_ascii=False))
    return value


Object = Annotated[dict[str, Any], AfterValidator(as_plain)]


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


def as_stop_ids(value: object) -> list[int]:
    if value is None:
        return []
    if isinstance(value, list) and len(value) > MAX_STOP_IDS:
        raise PydanticCustomError("ids", f"has {len(value)} ids; send at most {MAX_STOP_IDS}")
    if is_ids(value):
        return value
    raise PydanticCustomError("ids", "should be a list of token ids (0 or more)")


def as_biases(value: object) -> dict[int, float]:
    """What to add to which tokens' logits; JSON spells the ids as strings."""
    if value is None:
        return {}
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError("logit_bias", f"has {len(value)} tokens; send at most {MAX_BIASES}")
    if not (isinstance(value, dict) and all(key.isascii() and key.isdigit() and len(key) < 11 for key in value)):
        raise PydanticCustomError("logit_bias", "should be an object whose names are token ids")
    if not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()):
        raise PydanticCustomError("logit_bias", "should hold numbers from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


def as_rid(value: object) -> str | list[str] | None:
    if value is None:
        return None
    ids = [value] if isinstance(value, str) else value
    if isinstance(ids, list) and all(is_text(rid) and 0 < len(rid) <= MAX_NAME_LENGTH for rid in ids):
        return value  # type: ignore[return-value]
    raise PydanticCustomError("rid", f"should be a text of 1 to {MAX_NAME_LENGTH} characters, or a list of such")


def as_tools(value: object) -> list[dict[str, Any]]:
    """Descriptions of functions, which go to the chat template as they are."""
    tools = [] if value is None else value
    if isinstance(tools, list) and len(tools) > MAX_TOOLS:
        raise PydanticCustomError("tools", f"has {len(tools)} tools; send at most {MAX_TOOLS}")
    if not (isinstance(tools, list) and all(map(is_tool, tools))):
        example = '{"type": "function", "function": {"name": ...}}'
        raise PydanticCustomError("tools", f"should be a list of objects like {example}")
    as_utf8(json.dumps(tools, ensure_ascii=False))
    return tools


def is_tool(value: object) -> bool:
    if not (isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("function"), dict)):
        return False
    return isinstance(value["function"].get("name"), str)


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

    @property
    def unknown(self) -> list[str]:
        """Fields that say something of which nothing is known here."""
        extra = self.model_extra or {}
        return [field for field, value in extra.items() if value is not None and field not in self.unsupported]


class Sampling(Body):
    """How tokens are chosen; None is whatever the route and the model have as default."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_token_ids": (None,),
        "bad_words": (None, []),
        "ebnf": (None,),
        "json_schema": (None,),
        "length_penalty": (None, 1),
        "regex": (None,),
        "spaces_between_special_tokens": (None, True),
        "structural_tag": (None,),
    }

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=LIMIT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(as_biases)] = {}
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=LIMIT)] | None = None
    stop: Annotated[list[str], PlainValidator(as_stops)] = []
    stop_token_ids: Annotated[list[int], PlainValidator(as_stop_ids)] = []
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    speculate: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> tuple[str, int | None]:
        """How the body spells the most tokens of an answer, and how many these are."""
        return "max_tokens", self.max_tokens

    @property
    def floor(self) -> tuple[str, int]:
        """The same for the least tokens."""
        return "min_tokens", self.min_tokens or 0

    @property
    def grammars(self) -> dict[str, Grammar | None]:
        """What the answer must look like, by the fields that can say so."""
        return {}


def as_grammar(kind: Literal["json_schema", "regex", "choice"], value: object) -> Grammar | None:
    """What `value`, as the body has it, asks an answer to look like."""
    return None if value is None else Grammar(kind, value if isinstance(value, str) else json.dumps(value))


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class NamedSchema(Body):
    schema_: Object | None = Field(default=None, alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise PydanticCustomError("json_schema", "needs json_schema.schema for this type")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.type == "json_schema" and self.json_schema is not None:
            return as_grammar("json_schema", self.json_schema.schema_)
        return as_grammar("json_schema", {"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's newer spelling of the `guided_` fields."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "disable_additional_properties": (None, False),
        "disable_any_whitespace": (None, False),
        "grammar": (None,),
        "json_object": (None, False),
        "structural_tag": (None,),
        "whitespace_pattern": (None,),
    }

    json_: Object | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None


class OpenAIBody(Sampling):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.unsupported | {
        "guided_grammar": (None,),
        "guided_json_object": (None, False),
        "guided_whitespace_pattern": (None,),
        "kv_transfer_params": (None,),
        "logits_processors": (None, []),
        "return_tokens_as_token_ids": (None, False),
        "truncate_prompt_tokens": (None,),
        "use_beam_search": (None, False),
    }
    elsewhere: ClassVar[dict[str, str]] = {"json_schema": "guided_json", "regex": "guided_regex"}

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: Object | Text | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Name | None = None

    @model_validator(mode="after")
    def _streams_no_prompt_logprobs(self) -> "OpenAIBody":
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError("unsupported", "cannot be streamed", {"field": "prompt_logprobs"})
        return self

    @property
    def wants_usage(self) -> bool:
        """A last chunk that says it."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    @property
    def wants_usage_so_far(self) -> bool:
        """In each chunk."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats is True

    @property
    def num_logprobs(self) -> int | None:
        """As in SamplingParams."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As in SamplingParams."""
        return self.prompt_logprobs

    @property
    def grammars(self) -> dict[str, Grammar | None]:
        outputs = self.structured_outputs or StructuredOutputs()
        return {
            "response_format": self.response_format.grammar if self.response_format else None,
            "guided_json": as_grammar("json_schema", self.guided_json),
            "guided_regex": as_grammar("regex", self.guided_regex),
            "guided_choice": as_grammar("choice", self.guided_choice),
            "structured_outputs.json": as_grammar("json_schema", outputs.json_),
            "structured_outputs.regex": as_grammar("regex", outputs.regex),
            "structured_outputs.choice": as_grammar("choice", outputs.choice),
        }


class CompletionBody(OpenAIBody):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIBody.unsupported | {
        "add_special_tokens": (None, True),
        "prompt_embeds": (None,),
        "suffix": (None, ""),
    }

    prompt: Annotated[Prompts, PlainValidator(as_prompts)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _gives_all_that_are_drawn(self) -> "CompletionBody":
        if self.best_of not in (None, self.num_choices):
            raise PydanticCustomError("unsupported", "is not supported unless it equals n", {"field": "best_of"})
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.logprobs if self.echo else None
        return max((asked for asked in (echoed, self.prompt_logprobs) if asked is not None), default=None)


class Message(Body):
    """One of a conversation; whatever else it holds (a name, the id of a tool call) is for the chat template."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (None,), "function_call": (None,)}

    role: Text
    content: Annotated[Text, BeforeValidator(as_text)] = ""
    tool_calls: list[Object] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise PydanticCustomError("unsupported", "is missing; send a text", {"field": "content"})
        as_plain(self.model_extra or {})
        return self


class ChatBody(OpenAIBody):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = OpenAIBody.unsupported | {
        "add_special_tokens": (None, False),
        "audio": (None,),
        "documents": (None, []),
        "echo": (None, False),
        "function_call": (None, "none", "auto"),
        "functions": (None, []),
        "mm_processor_kwargs": (None,),
        "modalities": (None, ["text"]),
        "parallel_tool_calls": (None, True),
        "web_search_options": (None,),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], PlainValidator(as_tools)] = []
    tool_choice: Any = None
    chat_template: Text | None = None
    chat_template_kwargs: Object | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> "ChatBody":
        if self.tool_choice not in (None, "none", "auto"):
            message = 'is supported as "none" and "auto" only; send one of these'
            raise PydanticCustomError("unsupported", message, {"field": "tool_choice"})
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("unsupported", "needs logprobs to be true", {"field": "top_logprobs"})
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Those that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def limit(self) -> tuple[str, int | None]:
        """`max_completion_tokens` is the new name of `max_tokens`, and goes before it."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().limit

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class GenerateSampling(Sampling):
    """SGLang's `sampling_params`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        **{name: values for name, values in Sampling.unsupported.items() if name not in ("json_schema", "regex")},
        "custom_params": (None, {}),
        "include_stop_str_in_output": (None, False),
        "max_tokens": (None,),
        "min_tokens": (None,),
        "sampling_seed": (None,),
        "stop_regex": (None, []),
    }

    elsewhere: ClassVar[dict[str, str]] = {
        "include_stop_str_in_output": "sampling_params.no_stop_trim",
        "max_tokens": "sampling_params.max_new_tokens",
        "min_tokens": "sampling_params.min_new_tokens",
        "sampling_seed": "sampling_params.seed",
    }

    max_tokens: Annotated[int, Field(ge=1, lt=LIMIT)] | None = Field(default=None, alias="max_new_tokens")
    min_tokens: Annotated[int, Field(ge=0, lt=LIMIT)] | None = Field(default=None, alias="min_new_tokens")
    include_stop_str_in_output: bool | None = Field(default=None, alias="no_stop_trim")
    json_schema: Text | None = None
    regex: Text | None = None

    @property
    def limit(self) -> tuple[str, int | None]:
        return "sampling_params.max_new_tokens", self.max_tokens

    @property
    def floor(self) -> tuple[str, int]:
        return "sampling_params.min_new_tokens", self.min_tokens or 0

    @property
    def grammars(self) -> dict[str, Grammar | None]:
        return {
            "sampling_params.json_schema": as_grammar("json_schema", self.json_schema),
            "sampling_params.regex": as_grammar("regex", self.regex),
        }


SAMPLING_FIELDS = [field.alias or name for name, field in GenerateSampling.model_fields.items()]


class GenerateBody(Body):
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = GenerateSampling.unsupported | {
        **dict.fromkeys(SAMPLING_FIELDS, (None,)),
        "audio_data": (None, []),
        "image_data": (None, []),
        "input_embeds": (None,),
        "lora_path": (None,),
        "return_hidden_states": (None, False),
        "session_params": (None,),
        "token_ids_logprob": (None,),
        "video_data": (None, []),
    }
    elsewhere: ClassVar[dict[str, str]] = GenerateSampling.elsewhere | {
        name: f"sampling_params.{name}" for name in SAMPLING_FIELDS
    }

    text: Annotated[Prompts, PlainValidator(as_prompts)] | None = None
    input_ids: Annotated[Prompts, PlainValidator(as_prompts)] | None = None
    sampling_params: GenerateSampling | None = None
    stream: bool | None = None
    rid: Annotated[str | list[str] | None, PlainValidator(as_rid)] = None
    return_logprob: bool | None = None
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_start_len: Annotated[int, Field(ge=-1, lt=LIMIT)] | None = None
    return_text_in_logprobs: bool | None = None
    cache_salt: Name | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As in SamplingParams."""
        return (self.top_logprobs_num or 0) if self.return_logprob else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As in SamplingParams: those of the answer alone unless a place to start is given."""
        return None if self.logprob_start_len in (None, -1) else self.num_logprobs
