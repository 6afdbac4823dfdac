"""Which ranks there can be: of a model, on so many machines, on the GPUs of this one."""

import os
import subprocess
from dataclasses import replace

import torch

from kvtool.config import EngineConfig
from kvtool.device import choose_device
from kvtool.errors import ConfigError
from kvtool.models import ModelConfig
from kvtool.p2p import all_on_nvlink
from kvtool.processes import command, cpu_threads
from kvtool.ranks.rendezvous import ENV, split_address

COPY_SECONDS = 60  # to start a process and copy a few megabytes between all GPUs


def check_topology(config: EngineConfig) -> None:
    """Raises ConfigError where ranks do not fit the nodes, or those here the machine's GPUs."""
    ranks, nodes = config.rank_options, config.nnodes
    if config.tp % config.ep:
        raise ConfigError(f"--ep {config.ep}: does not divide --tp {config.tp}, whose ranks share the experts out")
    if config.num_ranks % nodes:
        raise ConfigError(f"{ranks}: {config.num_ranks} ranks cannot be shared out among --nnodes {nodes}")
    if config.node_rank >= nodes:
        raise ConfigError(f"--node-rank {config.node_rank}: --nnodes {nodes} are counted from 0")
    if nodes > 1 and not config.dist_init_addr:
        raise ConfigError(f"--nnodes {nodes}: needs --dist-init-addr HOST:PORT of node 0, the same on all nodes")
    if config.dist_init_addr not in (None, ENV):
        _, port = split_address(config.dist_init_addr or "")
        if port == 0 and nodes > 1:
            raise ConfigError(f"--dist-init-addr {config.dist_init_addr}: other nodes must know the port; name one")
    device = asked_device(config)
    needed = (device.index or 0) + config.local_rank + len(config.ranks_here)
    if device.type == "cuda" and needed > torch.cuda.device_count():
        here = f" on each of {nodes} nodes" if nodes > 1 else ""
        raise ConfigError(
            f"{ranks} --device {config.device}: {len(config.ranks_here)} ranks need as many GPUs{here}; "
            f"there are {torch.cuda.device_count()}"
        )


def check_model(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError where a model cannot be shared out among so many ranks."""
    tp, ep, heads = config.tp, config.ep, model.num_kv_heads
    if ep > 1 and not any(model.experts):
        raise ConfigError(f"--ep {ep}: a {model.model_type} model has no experts to share out; use --tp")
    counts = {"query heads": model.num_heads}
    for experts in model.experts:
        if experts is None:
            counts["columns of its MLP"] = model.intermediate_size
            continue
        counts["columns of its shared experts"] = experts.shared_size
        if experts.routing.num_experts % ep:
            raise ConfigError(f"--ep {ep}: does not divide the model's {experts.routing.num_experts} experts")
        if experts.intermediate_size % (tp // ep):
            raise ConfigError(
                f"{config.rank_options}: {tp // ep} ranks cannot share the {experts.intermediate_size} columns of an "
                f"expert; with --ep {tp} they need not"
            )
    for name, count in counts.items():
        if count % tp:
            raise ConfigError(f"--tp {tp}: does not divide the model's {count} {name}")
    if heads % tp and tp % heads:
        raise ConfigError(f"--tp {tp}: neither divides the model's {heads} KV heads nor is a multiple of them")
    if config.pp > model.num_layers:
        raise ConfigError(f"--pp {config.pp}: the model has only {model.num_layers} layers")
    if config.quantization in ("gptq", "awq") and model.quantization is None:
        raise ConfigError(
            f"--quantization {config.quantization}: several ranks cannot look at a text together; "
            "save the weights with scripts/quantize_weights.py first"
        )


def check_copies(config: EngineConfig) -> None:
    """Try what NCCL will rely on, copies between this machine's GPUs, where they are on PCIe: behind an IOMMU, or where
    the driver claims what the cards have not, they arrive wrong or never. A process that can be killed tries it.

    Raises:
        ConfigError: they did; it says what to set.
    """
    device, count = asked_device(config), len(config.ranks_here)
    first = (device.index or 0) + config.local_rank
    gpus = range(first, first + count)
    if device.type != "cuda" or count == 1 or os.environ.get("NCCL_P2P_DISABLE", "0") != "0" or all_on_nvlink(gpus):
        return
    argv = command("kvtool.p2p", ",".join(map(str, gpus)))
    try:
        tried = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COPY_SECONDS, text=True)
        problem = tried.stdout.strip()
    except subprocess.TimeoutExpired:
        problem = f"copies between cuda:{gpus[0]} and cuda:{gpus[-1]} hang"
    if problem:
        raise ConfigError(
            f"{problem}; set NCCL_P2P_DISABLE=1, so that NCCL goes through host memory, or switch the IOMMU and ACS off"
        )


def placed(config: EngineConfig, local_rank: int) -> EngineConfig:
    """`config` on this rank's own device, or with its share of the cores."""
    device = asked_device(config)
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(len(config.ranks_here)))
        return replace(config, device="cpu")
    index = (device.index or 0) + local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(f"{config.rank_options}: this machine has no GPU {index}")
    return replace(config, device=str(choose_device(f"cuda:{index}")))


def asked_device(config: EngineConfig) -> torch.device:
    """Where the first rank of a machine without `local_rank` runs; nothing is allocated there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError:
        return choose_device(config.device)  # which says what is wrong with it
