"""Mixed load on a real server for minutes, with aborts and far too small a KV cache, and a look at what is left.

    .venv/bin/python scripts/soak.py --minutes 10

At the end blocks, tails, swap space, file descriptors and memory must be where they were, and the answers that were
kept must be those of the same requests alone. Exit code 1 if anything is not.
"""

import argparse
import asyncio
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[1]
# float64: without a hit or with one, alone or in company, not one bit of rounding may choose another token.
SERVE = {
    "dtype": "float64",
    "nbits": "4",
    "max-model-len": "1024",
    "max-num-seqs": "12",
    "kv-cache-memory": "6.6MiB",  # 17 blocks beside the tails
    "swap-space": "2MiB",  # three or four sequences
}
ABORTED = 0.1  # of all requests
MEMORY_GROWTH = 1.10  # beyond what the first minute of load needs
WORDS = ["the", "night", "was", "dark", "and", "a", "letter", "came", "from", "her", "brother", "in", "London"]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}


def request(rng: random.Random) -> dict[str, Any]:
    """A body for /v1/completions; what it asks for depends on nothing but the generator."""
    beginning = WORDS * rng.choice([0, 0, 1, 4, 9])  # prompts share these
    body: dict[str, Any] = {
        "prompt": " ".join(beginning + rng.choices(WORDS, k=rng.randint(3, 60))),
        "max_tokens": rng.randint(1, 400),
        "ignore_eos": rng.random() < 0.8,
        "temperature": rng.choice([0, 0.7, 1.3]),
        "seed": rng.randrange(2**32),
        "n": rng.choice([1, 1, 1, 3]),
    }
    for chance, extra in (
        (0.2, {"top_p": 0.8, "min_p": 0.02}),
        (0.2, {"frequency_penalty": 0.5, "repetition_penalty": 1.1}),
        (0.1, {"stop": [" and", "e h"]}),
        (0.1, {"logprobs": 3}),
        (0.1, {"guided_json": SCHEMA, "n": 1}),
        (0.1, {"cache_salt": "a tenant"}),
    ):
        if rng.random() < chance:
            body |= extra
    return body


async def texts(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return [choice["text"] for choice in answer.json()["choices"]]


async def streamed(client: httpx.AsyncClient, body: dict[str, Any], events: int | None = None) -> list[str]:
    """The same from a stream, which is left after so many events."""
    found = [""] * body["n"]
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = httpx.Response(200, content=line.removeprefix("data: ")).json()
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    found[choice["index"]] += choice["text"]
                if events is not None and (events := events - 1) <= 0:
                    break
    return found


async def load(
    url: str, until: float, seed: int, kept: list[tuple[dict[str, Any], list[str]]], counts: Counter[str]
) -> None:
    """One client: request after request, of which it breaks some off and keeps a few."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.monotonic() < until:
            body, leave = request(rng), rng.random() < ABORTED
            try:
                if leave and rng.random() < 0.5:
                    await asyncio.wait_for(texts(client, body), rng.uniform(0, 2))
                elif leave:
                    await streamed(client, body, rng.randint(1, 40))
                else:
                    answer = await (streamed if rng.random() < 0.5 else texts)(client, body)
                    if rng.random() < 0.2 and len(kept) < 60:
                        kept.append((body, answer))
            except asyncio.TimeoutError:
                pass
            counts["left" if leave else "answered"] += 1


def resources(pids: list[int]) -> dict[str, int]:
    """File descriptors and resident MiB of server and engine together."""
    descriptors = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    rss = [int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) for pid in pids]  # type: ignore[index]
    return {"descriptors": descriptors, "server_mib": rss[0] >> 10, "engine_mib": rss[1] >> 10}


async def stats(url: str) -> dict[str, int]:
    async with httpx.AsyncClient(base_url=url) as client:
        found: dict[str, int] = (await client.get("/server_info")).json()["stats"]
        return found


async def soak(url: str, pids: list[int], minutes: float, clients: int, seed: int) -> list[str]:
    """Faults found, after a report on stdout."""
    kept: list[tuple[dict[str, Any], list[str]]] = []
    counts: Counter[str] = Counter()

    async def run(seconds: float, seeds: range) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(load(url, until, s, kept, counts) for s in seeds))
        await asyncio.sleep(2)  # what was left behind is noticed within one

    await run(min(60, minutes * 6), range(seed, seed + clients))  # caches fill, libraries load
    before = resources(pids)
    await run(minutes * 60, range(seed + clients, seed + 2 * clients))
    after, end = resources(pids), await stats(url)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        wrong = [body for body, answer in kept if await texts(client, body) != answer]
    print(f"{counts['answered']} answered, {counts['left']} left early; {len(wrong)} of {len(kept)} differ alone")
    print(f"before {before}\nafter  {after}\nstats  {end}")
    held = ("running", "waiting", "swapped", "used_blocks", "used_tails", "used_swap_units")
    worked = ("preemptions_total", "swap_ins_total", "recomputations_total", "full_hits_total", "partial_hits_total")
    return [
        *(f"{name} is {end[name]} with nothing to do" for name in held if end[name]),
        *(f"{name} is 0: the load did not reach it" for name in worked if not end[name]),
        *(f"{name} grew to {after[name]}" for name in before if after[name] > before[name] * MEMORY_GROWTH + 2),
        *(f"another answer alone to {body}" for body in wrong),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "commands",
        "serve",
        "--port",
        "0",
        *(f"--{name}={value}" for name, value in SERVE.items()),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        assert server.stdout is not None
        card = ""
        while "curl" not in card:
            line = server.stdout.readline()
            if not line:
                return 2
            card += line
        url = re.search(r"http://\S+", card)
        assert url is not None
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        faults = asyncio.run(
            soak(url[0], [server.pid, *map(int, children)], options.minutes, options.clients, options.seed)
        )
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    faults += [f"the server ended with {status}"] * (status != 0)
    print("\n".join(faults) or "all is where it was")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
