"""What Prometheus scrapes: vLLM's names, so that its dashboards work, and kvtool's own."""

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvtool.client import EngineClient
from kvtool.request import EngineInfo, EngineStats
from kvtool.server.generation import Ending, Observer, Times
from kvtool.speculation import REASONS

# vLLM's, so that quantiles of both can be compared.
TTFT_BUCKETS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40]
TTFT_BUCKETS += [80, 160, 640, 2560]
ITL_BUCKETS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
E2E_BUCKETS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]


def count_buckets(most: int) -> list[int]:
    """1, 2, 5, 10 and so on, up to `most`."""
    return [value for power in range(len(str(most))) for one in (1, 2, 5) if (value := one * 10**power) <= most]


class Metrics(Observer):
    """The metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(client, model_name))
        self._experts = CollectorRegistry()
        self._experts.register(ExpertCollector(client, model_name))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self._registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self._registry).labels(model_name)

        counts = count_buckets(client.info.max_model_len)
        self._first = histogram("vllm:time_to_first_token_seconds", "Request to first token.", TTFT_BUCKETS)
        self._gaps = [
            histogram("vllm:inter_token_latency_seconds", "From token to token.", ITL_BUCKETS),
            histogram("vllm:time_per_output_token_seconds", "The same, by its older name.", ITL_BUCKETS),
        ]
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Request to last token.", E2E_BUCKETS)
        self._queue = histogram("vllm:request_queue_time_seconds", "Request to its first step.", E2E_BUCKETS)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "First step to first token.", E2E_BUCKETS)
        self._decode = histogram("vllm:request_decode_time_seconds", "First to last token.", E2E_BUCKETS)
        self._inference = histogram("vllm:request_inference_time_seconds", "First step to last token.", E2E_BUCKETS)
        self._prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", counts)
        self._answers = [
            histogram("vllm:request_generation_tokens", "Tokens of an answer.", counts),
            histogram("vllm:request_max_num_generation_tokens", "The same: each answer is observed.", counts),
        ]
        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of the prompts that were answered.")
        self._answer_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        labels = ["model_name", "finished_reason"]
        endings = Counter("vllm:request_success", "Requests that ended.", labels, registry=self._registry)
        self._endings = {reason: endings.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics but those of single experts, and their media type, as an Accept header wants them."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type

    def expert_exposition(self, accept: str) -> tuple[bytes, str]:
        """Metrics of single experts."""
        encode, media_type = choose_encoder(accept)
        return encode(self._experts), media_type

    def first_tokens(self, seconds: float, count: int) -> None:
        self._first.observe(seconds)
        self._answer_tokens.inc(count)

    def next_tokens(self, seconds: float, count: int) -> None:
        self._answer_tokens.inc(count)
        for gaps in self._gaps:
            for _ in range(count):
                gaps.observe(seconds / count)

    def finished(self, times: Times, prompt_tokens: int, generation_tokens: int, reason: Ending) -> None:
        self._endings[reason].inc()
        if generation_tokens:
            self._whole.observe(times.whole)
            self._queue.observe(times.queue)
            self._prefill.observe(times.first - times.queue)
            self._decode.observe(times.whole - times.first)
            self._inference.observe(times.whole - times.queue)
            self._prompts.observe(prompt_tokens)
            for answers in self._answers:
                answers.observe(generation_tokens)
            self._prompt_tokens.inc(prompt_tokens)


class EngineCollector(Collector):
    """Asks the engine's last statistics when it is asked itself."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client, self._model_name = client, model_name

    def collect(self) -> Iterator[Metric]:
        info, stats = self._client.info, self._client.stats
        for name, value, text in gauges(info, stats):
            yield self._family(GaugeMetricFamily, name, value, text)
        for name, value, text in counters(stats):
            yield self._family(CounterMetricFamily, name, value, text)
        for name, value, text in kv_bytes(info, stats):
            yield self._family(GaugeMetricFamily, name, value, text, format=info.kv_format)
        text = "Why nothing is drafted: too few tokens are right, the batch is too large, or drafts take too long."
        off = GaugeMetricFamily("kvtool:speculation_off", text, labels=["model_name", "reason"])
        for reason in REASONS:
            off.add_metric([self._model_name, reason], float(stats.speculation_off == reason))
        yield off
        about = {
            "block_size": info.block_size,
            "cache_dtype": info.kv_format,
            "enable_prefix_caching": info.prefix_caching,
            "num_gpu_blocks": info.num_blocks,
            "num_cpu_blocks": info.num_swap_units,
        }
        text = "Configuration of the KV cache."
        yield self._family(GaugeMetricFamily, "vllm:cache_config_info", 1, text, **about)
        for name, by_layer, text in imbalances(info, self._client.expert_tokens):
            family = GaugeMetricFamily(name, text, labels=["model_name", "layer"])
            for layer, value in by_layer.items():
                family.add_metric([self._model_name, str(layer)], value)
            if by_layer:
                yield family

    def _family(self, kind: Any, name: str, value: float, text: str, **labels: object) -> Metric:
        family: Metric = kind(name, text, labels=["model_name", *labels])
        family.add_metric([self._model_name, *map(str, labels.values())], value)  # type: ignore[attr-defined]
        return family


class ExpertCollector(Collector):
    """What the engine last said of its experts."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client, self._model_name = client, model_name

    def collect(self) -> Iterator[Metric]:
        text = "Tokens that have chosen an expert."
        family = CounterMetricFamily("kvtool:expert_tokens", text, labels=["model_name", "layer", "expert"])
        for layer, tokens in self._client.expert_tokens.items():
            for expert, count in enumerate(tokens):
                family.add_metric([self._model_name, str(layer), str(expert)], count)
        yield family


def imbalances(info: EngineInfo, expert_tokens: dict[int, list[int]]) -> list[tuple[str, dict[int, float], str]]:
    """How far from alike experts are chosen, by layer, and with several parts how far from alike these are."""
    size = info.num_experts // info.ep
    found = [("kvtool:expert_imbalance", 1, "Tokens of the expert chosen most over the mean of all, since the start.")]
    if info.ep > 1:
        found.append(("kvtool:expert_rank_imbalance", size, "The same of the experts that ranks have, taken together."))
    return [
        (name, {layer: most_over_mean(tokens, of) for layer, tokens in expert_tokens.items() if any(tokens)}, text)
        for name, of, text in found
    ]


def most_over_mean(counts: Sequence[int], size: int) -> float:
    """Of sums of `size` counts that follow each other."""
    sums = [sum(counts[first : first + size]) for first in range(0, len(counts), size)]
    return max(sums) * len(sums) / sum(sums)


def gauges(info: EngineInfo, stats: EngineStats) -> list[tuple[str, float, str]]:
    usage = stats.used_blocks / info.num_blocks
    return [
        ("vllm:num_requests_running", stats.running, "Requests that run."),
        ("vllm:num_requests_waiting", stats.waiting, "Requests that wait."),
        ("kvtool:awaited_requests", stats.awaited, "Waiting requests whose KV is to come from another engine."),
        ("vllm:num_requests_swapped", stats.swapped, "Waiting requests whose memory is in the swap space."),
        ("vllm:kv_cache_usage_perc", usage, "Share of the KV cache's blocks that requests own, 0 to 1."),
        ("vllm:gpu_cache_usage_perc", usage, "The same, by its older name."),
        ("kvtool:kv_blocks", info.num_blocks, "Blocks of the KV cache."),
        ("kvtool:used_blocks", stats.used_blocks, "Blocks that requests own."),
        ("kvtool:sealed_blocks", stats.sealed_blocks, "Blocks known by their content, owned or cached."),
        ("kvtool:cached_blocks", stats.cached_blocks, "Blocks that no request owns, kept for prefix hits."),
        ("kvtool:used_tails", stats.used_tails, "Tail slots of running requests."),
        ("kvtool:used_swap_units", stats.used_swap_units, "Blocks' worth of swap space in use."),
        ("kvtool:swap_units", info.num_swap_units, "Blocks' worth of swap space."),
        ("kvtool:speculative_tokens", stats.speculative_tokens, "Tokens drafted for a sequence in a step, at most."),
    ]


def counters(stats: EngineStats) -> list[tuple[str, float, str]]:
    """Without the `_total` that their names end in."""
    queries, hits = stats.prefix_queries_total, stats.prefix_hits_total
    return [
        ("vllm:prefix_cache_queries", queries, "Tokens looked for in the prefix cache."),
        ("vllm:prefix_cache_hits", hits, "Tokens found in the prefix cache."),
        ("vllm:gpu_prefix_cache_queries", queries, "Tokens looked for, by its older name."),
        ("vllm:gpu_prefix_cache_hits", hits, "Tokens found, by its older name."),
        ("vllm:num_preemptions", stats.preemptions_total, "Requests that gave up their memory for others."),
        ("kvtool:prefix_full_hits", stats.full_hits_total, "Requests that found all that they could have."),
        ("kvtool:prefix_partial_hits", stats.partial_hits_total, "Requests that found some of it."),
        ("kvtool:swap_out_blocks", stats.swap_outs_total, "Blocks moved to the swap space."),
        ("kvtool:swap_in_blocks", stats.swap_ins_total, "Blocks moved back."),
        ("kvtool:kv_arrivals", stats.arrivals_total, "Requests whose KV came from another engine."),
        ("kvtool:kv_losses", stats.losses_total, "Requests whose KV should have, and was computed here."),
        ("vllm:spec_decode_num_drafts", stats.verifications_total, "Drafts that were verified."),
        ("vllm:spec_decode_num_draft_tokens", stats.drafted_total, "Tokens that were drafted."),
        ("vllm:spec_decode_num_accepted_tokens", stats.accepted_total, "Of these, how many were right."),
        ("kvtool:recomputations", stats.recomputations_total, "Preempted requests that are computed again."),
    ]


def kv_bytes(info: EngineInfo, stats: EngineStats) -> list[tuple[str, float, str]]:
    return [
        ("kvtool:kv_packed_bytes", stats.used_blocks * info.block_bytes, "Bytes of the blocks that requests own."),
        ("kvtool:kv_tail_bytes", stats.used_tails * info.tail_bytes, "Bytes of the tails of running requests."),
        ("kvtool:kv_bytes", info.kv_bytes, "Bytes of blocks and tails, as allocated."),
        ("kvtool:draft_kv_bytes", info.draft_kv_bytes, "The same of the draft model's cache."),
    ]
