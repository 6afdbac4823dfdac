"""Which requests can ever run. One that cannot is told so at once, and waits for nothing."""

from math import inf

from kvtool.errors import RequestError
from kvtool.kv.format import KVFormat
from kvtool.request import Request, SamplingParams

MAX_LOGPROBS = 20


def check_request(request: Request, fmt: KVFormat, num_blocks: int, max_model_len: int) -> int:
    """Tokens of prompt and answer at which a request ends.

    Args:
        fmt, num_blocks: of the KV store.

    Raises:
        RequestError: it could never run: no prompt, more tokens than the context or the cache can hold, or parameters
            outside their ranges.
    """
    length, params = len(request.prompt), request.params
    check_sampling(params)
    if length == 0:
        raise RequestError("the prompt is empty; send at least one token", "prompt")
    if length >= max_model_len:
        raise RequestError(
            f"the prompt has {length} tokens; the context of {max_model_len} must hold it and an answer", "prompt"
        )
    if params.max_tokens is not None and params.max_tokens < 1:
        raise RequestError(f"max_tokens is {params.max_tokens}; it must be at least 1", "max_tokens")
    max_length = max_model_len if params.max_tokens is None else length + params.max_tokens
    if max_length > max_model_len:
        raise RequestError(
            f"{length} tokens of prompt and max_tokens {params.max_tokens} exceed the context of "
            f"{max_model_len}; ask for at most {max_model_len - length}",
            "max_tokens",
        )
    if fmt.num_blocks(max_length - 1) > num_blocks:  # the last token is never computed
        held = num_blocks * fmt.block_size + fmt.tail_tokens
        raise RequestError(f"{max_length} tokens exceed the KV cache, which holds {held}", "max_tokens")
    if params.min_tokens > max_length - length:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, but the answer has room for {max_length - length}", "min_tokens"
        )
    return max_length if request.push_to is None else length + 1


def check_sampling(params: SamplingParams) -> None:
    """Raises RequestError for parameters outside their ranges; NaN is in none."""
    if not 0 <= params.temperature < inf:
        raise RequestError(f"temperature is {params.temperature}; it must be 0 or more", "temperature")
    if not 0 < params.top_p <= 1:
        raise RequestError(f"top_p is {params.top_p}; it must be above 0 and at most 1", "top_p")
    if params.top_k < 0:
        raise RequestError(f"top_k is {params.top_k}; it must be 0, which keeps all, or more", "top_k")
    if not 0 <= params.min_p <= 1:
        raise RequestError(f"min_p is {params.min_p}; it must be from 0 to 1", "min_p")
    if not 0 < params.repetition_penalty < inf:
        raise RequestError(
            f"repetition_penalty is {params.repetition_penalty}; it must be above 0", "repetition_penalty"
        )
    for name in ("presence_penalty", "frequency_penalty"):
        if not abs(getattr(params, name)) < inf:
            raise RequestError(f"{name} is {getattr(params, name)}; it must be a number", name)
    if not all(abs(bias) < inf for bias in params.logit_bias.values()):
        raise RequestError("logit_bias must hold numbers", "logit_bias")
    if params.min_tokens < 0:
        raise RequestError(f"min_tokens is {params.min_tokens}; it must be 0 or more", "min_tokens")
    for name in ("logprobs", "prompt_logprobs"):
        if not 0 <= (getattr(params, name) or 0) <= MAX_LOGPROBS:
            raise RequestError(f"{name} is {getattr(params, name)}; it must be from 0 to {MAX_LOGPROBS}", name)
