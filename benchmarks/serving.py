"""Throughput and latency of `tracereward serve` with many clients, compared with offline calls.

    python benchmarks/serving.py [REWARD_MODEL] [--requests 512] [--clients 1 8 64] [--data FILE --task gsm8k]

Each request has one trace, from the rows of `--data` or of the arithmetic world. Without a folder the reward model is a
new tiny one, which measures the overhead around the forward pass. For each number of clients, `--requests` requests are
sent; each client sends one at a time over its own connection, after a warm-up round. "sequential" scores the same
traces one by one with `model.score` in this process, "offline" all at once. The run fails unless every response equals
the offline score. Prints requests per second, the median and the 99th percentile of the latency, the mean number of
traces per batch, and the server's memory before and after. With `--minutes`, the last number of clients continues for
that long, and the memory is printed every minute.
"""

import asyncio
import contextlib
import os
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import httpx
import torch
from common import Result

from tracereward.data.demonstrations import load_demonstrations
from tracereward.modeling.loading import best_device
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.synthetic.arithmetic import build_model, build_tokenizer, generate
from tracereward.tasks.recipes import get_task

ATOL = 1e-3  # the summation order depends on the batch shape


def save_tiny(folder: Path) -> str:
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(folder / "backbone")
    settings = RewardSettings(task="arithmetic")
    TokenRewardModel.from_backbone(str(folder / "backbone"), settings, tokenizer).save_pretrained(folder / "rm")
    return str(folder / "rm")


def start(model: str, log: Path) -> tuple[subprocess.Popen, str]:
    with log.open("wb") as file:
        words = [sys.executable, "-m", "tracereward", "serve", model, "--port", "0"]
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None:
        found = re.search(r"Uvicorn running on (\S+)", log.read_text(errors="replace"))
        if found:
            return process, found[1]
        time.sleep(0.1)
    raise SystemExit(log.read_text(errors="replace"))


def memory(process: subprocess.Popen) -> float:
    """Resident memory of the server in MiB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def batches(url: str) -> tuple[float, float]:
    """Numbers of traces and batches so far."""
    text = httpx.get(f"{url}/metrics", trust_env=False).text
    found = [re.search(rf"tracereward_batch_traces_{name} (\S+)", text) for name in ("sum", "count")]
    traces, count = (float(match[1]) for match in found if match)
    return traces, count


async def load(url: str, rows: list[tuple[str, str]], clients: int) -> tuple[float, list[float], list[list[float]]]:
    """Send all requests; return the total seconds, the seconds of each request, and the token rewards."""
    left = iter(range(len(rows)))
    times, rewards = [0.0] * len(rows), [[]] * len(rows)

    async def client(http: httpx.AsyncClient) -> None:
        for index in left:  # shared iterator: each client takes the next row
            body = {"prompt": rows[index][0], "completion": rows[index][1]}
            began = time.perf_counter()
            response = await http.post("/v1/score", json=body)
            times[index] = time.perf_counter() - began
            rewards[index] = response.raise_for_status().json()["results"][0]["token_rewards"]

    # One pool of many connections would be slower than the server; creating an SSL context per pool is slow.
    context = ssl.create_default_context()
    async with contextlib.AsyncExitStack() as stack:
        pools = [httpx.AsyncClient(base_url=url, timeout=300, verify=context, trust_env=False) for _ in range(clients)]
        for pool in pools:
            await stack.enter_async_context(pool)
        began = time.perf_counter()
        await asyncio.gather(*map(client, pools))
        return time.perf_counter() - began, times, rewards


def line(name: str, seconds: float, times: list[float], more: str = "") -> dict[str, Any]:
    """Print and return the figures of one round."""
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    rate, median = len(times) / seconds, statistics.median(times)
    print(f"{name:12} {rate:8.1f} requests/s   p50 {1e3 * median:7.1f} ms   p99 {1e3 * p99:7.1f} ms{more}", flush=True)
    return {"clients": name, "requests/s": rate, "p50, ms": 1e3 * median, "p99, ms": 1e3 * p99}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--data")
    parser.add_argument("--task", default="generic")
    args = parser.parse_args()
    if args.data:
        found = load_demonstrations(args.data, get_task(args.task), limit=args.requests)
    else:
        found = generate("misconception", args.requests, seed=0, unique=False)
    rows = [(row["prompt"], row["completion"]) for row in found]
    prompts, texts = zip(*rows)
    with tempfile.TemporaryDirectory() as folder:
        name = args.model or save_tiny(Path(folder))
        process, url = start(name, Path(folder) / "log")
        try:
            model = TokenRewardModel.from_pretrained(name).to(best_device())
            began = time.perf_counter()
            expected = [torch.tensor(scores.rewards) for scores in model.score(prompts, texts)]
            offline = time.perf_counter() - began
            single = []
            began = time.perf_counter()
            for prompt, text in rows:
                at = time.perf_counter()
                model.score([prompt], [text])
                single.append(time.perf_counter() - at)
            result = Result("serving", {"requests": len(rows), "offline traces/s": len(rows) / offline})
            result.rows.append(line("sequential", time.perf_counter() - began, single))
            print(f"{'offline':12} {len(rows) / offline:8.1f} traces/s")
            asyncio.run(load(url, rows, 8))
            before = memory(process)
            for clients in args.clients:
                traces, count = batches(url)
                seconds, times, rewards = asyncio.run(load(url, rows, clients))
                after_traces, after_count = batches(url)
                mean = (after_traces - traces) / (after_count - count)
                row = line(f"{clients} clients", seconds, times, f"   {mean:5.1f} traces a batch")
                result.rows.append({**row, "traces a batch": mean})
                for got, wanted in zip(rewards, expected, strict=True):
                    torch.testing.assert_close(torch.tensor(got), wanted, atol=ATOL, rtol=0)
            ends, shown = time.perf_counter() + 60 * args.minutes, time.perf_counter()
            answers = 0
            while time.perf_counter() < ends:
                _, _, rewards = asyncio.run(load(url, rows, args.clients[-1]))
                for got, wanted in zip(rewards, expected, strict=True):
                    torch.testing.assert_close(torch.tensor(got), wanted, atol=ATOL, rtol=0)
                answers += len(rewards)
                if time.perf_counter() - shown > 60:
                    shown += 60
                    print(f"{answers:8d} more responses; server memory {memory(process):.0f} MiB", flush=True)
            print(f"all responses match; server memory {before:.0f} MiB before, {memory(process):.0f} MiB after")
            result.more = {"server memory, MiB": [before, memory(process)]}
            result.write(args.json)
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
