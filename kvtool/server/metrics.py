"""What Prometheus scrapes: vLLM's names, so that its dashboards work, and kvtool's own."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvtool.client import EngineClient
from kvtool.request import EngineInfo, EngineStats


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(client, model_name))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and their media type, as an Accept header wants them."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


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
        about = {
            "block_size": info.block_size,
            "cache_dtype": info.kv_format,
            "enable_prefix_caching": info.prefix_caching,
            "num_gpu_blocks": info.num_blocks,
            "num_cpu_blocks": info.num_swap_units,
        }
        text = "Configuration of the KV cache."
        yield self._family(GaugeMetricFamily, "vllm:cache_config_info", 1, text, **about)

    def _family(self, kind: Any, name: str, value: float, text: str, **labels: object) -> Metric:
        family: Metric = kind(name, text, labels=["model_name", *labels])
        family.add_metric([self._model_name, *map(str, labels.values())], value)  # type: ignore[attr-defined]
        return family


def gauges(info: EngineInfo, stats: EngineStats) -> list[tuple[str, float, str]]:
    usage = stats.used_blocks / info.num_blocks
    return [
        ("vllm:num_requests_running", stats.running, "Requests that run."),
        ("vllm:num_requests_waiting", stats.waiting, "Requests that wait."),
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
        ("kvtool:recomputations", stats.recomputations_total, "Preempted requests that are computed again."),
    ]


def kv_bytes(info: EngineInfo, stats: EngineStats) -> list[tuple[str, float, str]]:
    return [
        ("kvtool:kv_packed_bytes", stats.used_blocks * info.block_bytes, "Bytes of the blocks that requests own."),
        ("kvtool:kv_tail_bytes", stats.used_tails * info.tail_bytes, "Bytes of the tails of running requests."),
        ("kvtool:kv_bytes", info.kv_bytes, "Bytes of blocks and tails, as allocated."),
    ]
