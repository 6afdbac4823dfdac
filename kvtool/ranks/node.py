"""The ranks of one machine: how they are started, and what ends them."""

import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from kvtool.config import EngineConfig
from kvtool.processes import command
from kvtool.ranks.link import BEAT_SECONDS
from kvtool.ranks.rendezvous import ENV, Seat, await_port
from kvtool.ranks.topology import check_copies, check_topology

END_SECONDS = 3.0  # for those that need not be killed


def start_followers(config: EngineConfig, address: str, ranks: Sequence[int]) -> list[subprocess.Popen[bytes]]:
    """Processes of `ranks`, on this machine. They end with this one."""
    processes = []
    for rank in ranks:
        local_rank = config.local_rank + rank - config.ranks_here.start
        seat = msgspec.json.encode(Seat(rank, config.num_ranks, local_rank, address, config.dist_timeout)).decode()
        argv = command("kvtool.follower", seat)
        processes.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
    return processes


def run_node(config: EngineConfig) -> int:
    """Be a machine that is not the first: run its ranks until rank 0 says that it is over.

    Returns:
        0, or the exit status of the first rank that ended otherwise; 1 of one that a signal has ended.

    Raises:
        ConfigError: ranks that do not fit the machine, or node 0 does not answer.
    """
    check_topology(config)
    check_copies(config)
    assert config.dist_init_addr
    ranks, address = config.ranks_here, config.dist_init_addr
    if address != ENV:  # torchrun knows itself whom it has started
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        print(f"node {config.node_rank}: {named} of {config.num_ranks}, for {address} ...", file=sys.stderr, flush=True)
    while True:
        if address != ENV:
            await_port(address, config.dist_timeout)  # here, so that one process says what all would say
        processes = start_followers(config, address, ranks)
        try:
            while all(process.poll() is None for process in processes):
                time.sleep(BEAT_SECONDS / 10)
            # Those that hang do not end by themselves, and those that end in order do so together.
            deadline = time.monotonic() + END_SECONDS
            while time.monotonic() < deadline and any(process.poll() is None for process in processes):
                time.sleep(BEAT_SECONDS / 10)
            codes = {rank: process.poll() or 0 for rank, process in zip(ranks, processes, strict=True)}
        finally:
            for process in processes:
                process.kill()
        for rank, code in codes.items():
            if code < 0:  # it could not say so itself
                print(f"error: signal {-code} has ended rank {rank}", file=sys.stderr, flush=True)
        status = next((max(code, 1) for code in codes.values() if code), 0)
        if status == 0 or status == 2 or not config.restart:
            return status
        print(f"node {config.node_rank}: starting again", file=sys.stderr, flush=True)
