"""Tokens a second on a CPU, in ratio to public code on the same machine in the same run.

    python benchmarks/cpu.py --json benchmarks/results/cpu.json [--models 0.1B 0.5B] [--tokens 4096] [--repeats 2]
        [--gguf FILE]

The models are random, in the shapes of SmolLM2-135M and Qwen2.5-0.5B, stored in bfloat16 as those are; a folder may be
given instead of a name. Each part is measured next to its counterpart, alternating, and the medians are compared:

    scoring         `TokenRewardModel.score_ids`, head action     forward of the causal LM on as many tokens, no padding
    sampling        the transformers engine                       `generate` of the model as transformers loads it
    SFT step        `tracereward sft`'s trainer and precision     `trl.SFTTrainer` with its own defaults
    discriminator   `Discriminator.update`                        forward, backward and AdamW, on as many, no padding
    vLLM            the vLLM engine                               `vllm.LLM.generate`, if vLLM is installed
    llama.cpp       the server engine                             plain requests to the same server, as many at a time,
                                                                  if llama-cpp-python is installed, and --gguf given

Precision is what `modeling.precision` chooses. With --json, finished rows are stored, and a repeated command continues.
About five minutes on two idle cores with AVX512-BF16.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import httpx
import torch
from common import Result, median, now
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer

from tracereward.commands.sft import SupervisedTrainer
from tracereward.generation.engine import EngineOptions, TransformersEngine
from tracereward.generation.params import SamplingParams
from tracereward.modeling.loading import load_causal_lm
from tracereward.modeling.precision import reading_precision, training_precision
from tracereward.modeling.tokenization import load_tokenizer
from tracereward.rewards.model import TokenRewardModel
from tracereward.rewards.settings import RewardSettings
from tracereward.runs.finish import load_policy
from tracereward.synthetic.arithmetic import build_tokenizer
from tracereward.training.config import SupervisedConfig
from tracereward.training.discriminator import Discriminator
from tracereward.training.discriminator_batch import Expert, Rollout
from tracereward.training.options import DiscriminatorOptions

SHAPES = {
    "0.1B": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 64},
}
LENGTH = 128  # tokens of an average trace with its prompt
IDS = range(3, 51)  # of the tokenizer's words
Measured = tuple[float, float]
"""Tokens a second of ours and of the public code."""


def saved(name: str, folder: Path) -> str:
    """The folder of a random model, or the given one."""
    if name not in SHAPES:
        return name
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=4096))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.bfloat16().save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def traces(tokens: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and completions of `tokens` in all, traces of half to one and a half `LENGTH`."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(IDS.start, IDS.stop, (count,), generator=generator).tolist()

    count = max(2, tokens // LENGTH)
    lengths = [LENGTH // 2 + LENGTH * index // (count - 1) for index in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    return [(ids(24), ids(lengths[index] - 24)) for index in order]


def speed(ours: Callable[[], int], public: Callable[[], int], repeats: int) -> Measured:
    """Median tokens a second of two functions that return how many tokens they processed; alternating."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, speeds in zip((ours, public), found, strict=True):
            start = now()
            tokens = function()
            speeds.append(tokens / (now() - start))
    return median(found[0]), median(found[1])


def block(tokens: int) -> torch.Tensor:
    """Rows of `LENGTH` random tokens: as many in all, without padding."""
    return torch.randint(IDS.start, IDS.stop, (max(1, tokens // LENGTH), LENGTH))


def scoring(folder: str, tokens: int, repeats: int) -> Measured:
    rows, dtype = traces(tokens), reading_precision(folder).dtype
    reward = TokenRewardModel.from_backbone(folder, RewardSettings(), load_tokenizer(folder), dtype=dtype).eval()
    model = load_causal_lm(folder, dtype)
    count = sum(len(prompt) + len(completion) for prompt, completion in rows)
    whole = block(count)

    def ours() -> int:
        reward.score_ids([prompt for prompt, _ in rows], [completion for _, completion in rows])
        return count

    @torch.inference_mode()
    def public() -> int:
        for part in whole.split(max(1, reward.token_budget // LENGTH)):
            model(input_ids=part, use_cache=False)
        return whole.numel()

    return speed(ours, public, repeats)


def sampling(folder: str, tokens: int, repeats: int) -> Measured:
    tokenizer, count, length = load_tokenizer(folder), 16, max(4, tokens // 128)
    prompts = [str(tokenizer.decode(prompt)) for prompt, _ in traces(LENGTH * count)][:count]
    params = SamplingParams(max_new_tokens=length, batch_size=count, settings={"min_new_tokens": length})
    engine = TransformersEngine(load_causal_lm(folder, reading_precision(folder).dtype), tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    def ours() -> int:
        return sum(len(one.ids) for chunk in engine.sample(prompts, params) for one in chunk)

    def public() -> int:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        made = model.generate(**inputs, do_sample=True, max_new_tokens=length, min_new_tokens=length)
        return (made.size(1) - inputs["input_ids"].size(1)) * count

    return speed(ours, public, repeats)


def sft_step(folder: str, tokens: int, repeats: int) -> Measured:
    size = max(2, tokens // 4 // LENGTH)
    rows = traces(size * LENGTH)
    data = Dataset.from_list([{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in rows])
    count = sum(len(prompt) + len(completion) for prompt, completion in rows)

    def trainer(ours: bool, output: Path) -> Any:
        given: Any = {"output_dir": str(output), "use_cpu": True, "per_device_train_batch_size": size}
        given |= {"gradient_accumulation_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        given |= {"max_steps": repeats + 1, "gradient_checkpointing": False, "learning_rate": 0.0}
        if not ours:
            config = SFTConfig(**given)
            return SFTTrainer(folder, config, train_dataset=data, processing_class=load_tokenizer(folder))
        config = SupervisedConfig(**given, bf16=training_precision(folder)[0])
        model = load_policy(ModelConfig(model_name_or_path=folder))
        return SupervisedTrainer(model, config, train_dataset=data, processing_class=load_tokenizer(folder))

    with common.scratch() as scratch:
        seconds = []
        for ours in (True, False):
            made = common.without_bars(trainer(ours, Path(scratch) / str(ours)))
            steps: list[float] = []
            step = made.training_step

            def timed(*args: Any, step: Any = step, steps: list[float] = steps, **kwargs: Any) -> Any:
                start = now()
                loss = step(*args, **kwargs)
                steps.append(now() - start)
                return loss

            made.training_step = timed
            made.train()
            seconds.append(median(steps[1:]))
    return count / seconds[0], count / seconds[1]


def discriminator(folder: str, tokens: int, repeats: int) -> Measured:
    size = max(2, tokens // 8 // LENGTH)
    rows = traces(size * LENGTH)
    half = training_precision(folder)[0]
    model = TokenRewardModel.from_backbone(folder, RewardSettings(), load_tokenizer(folder), dtype=torch.float32)
    options = DiscriminatorOptions(discriminator_prompts=size, discriminator_rollouts=1, perturbed_per_expert=0)
    learner = Discriminator(model, [Expert(p, c) for p, c in rows], options, seed=0)
    learner.remember([Rollout(index, c[::-1]) for index, (_, c) in enumerate(rows)])
    count = 2 * sum(len(prompt) + len(completion) for prompt, completion in rows)
    plain, whole = load_causal_lm(folder, torch.float32).train(), block(count)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.0)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    def ours() -> int:
        with autocast():
            learner.update([])
        return count

    def public() -> int:
        for part in whole.split(max(1, options.discriminator_token_budget // LENGTH)):
            with autocast():
                loss = plain(input_ids=part, labels=part, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return whole.numel()

    ours()
    public()
    return speed(ours, public, repeats)


PARTS = {"scoring": scoring, "sampling": sampling, "SFT step": sft_step, "discriminator": discriminator}


def vllm(folder: str, tokens: int, repeats: int) -> Measured:
    from vllm import SamplingParams as Request  # pyright: ignore[reportMissingImports]

    from tracereward.generation.vllm_engine import VllmEngine

    tokenizer, length = load_tokenizer(folder), max(4, tokens // 128)
    prompts = [str(tokenizer.decode(prompt)) for prompt, _ in traces(LENGTH * 16)][:16]
    engine = VllmEngine(folder, tokenizer, 256)
    params = SamplingParams(max_new_tokens=length)
    request = Request(max_tokens=length, logprobs=0)

    def ours() -> int:
        return sum(len(one.ids) for chunk in engine.sample(prompts, params) for one in chunk)

    def public() -> int:
        return sum(len(one.outputs[0].token_ids) for one in engine._llm.generate(prompts, request, use_tqdm=False))

    ours()
    return speed(ours, public, repeats)


@contextmanager
def llama_server(gguf: str) -> Iterator[str]:
    """Base URL of llama-cpp-python's server, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-m", "llama_cpp.server", "--model", gguf, "--port", str(port), "--n_ctx", "2048", "--verbose", "false"]
    process = subprocess.Popen([sys.executable, *words, "--n_threads", str(torch.get_num_threads())])
    try:
        for _ in range(240):
            try:
                httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=1)
                break
            except httpx.HTTPError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def llama_cpp(gguf: str, tokens: int, repeats: int) -> Measured:
    from tracereward.generation.server_engine import ServerEngine

    length, prompts = max(4, tokens // 128), [f"Question {n}: what is {n} + {n}?\nAnswer:" for n in range(8)]
    with llama_server(gguf) as url:
        name = httpx.get(f"{url}/models").json()["data"][0]["id"]
        engine = ServerEngine(EngineOptions(name=url, api="completions", concurrency=4), name)
        params = SamplingParams(max_new_tokens=length)

        def ours() -> int:
            return sum(one.length or 0 for chunk in engine.sample(prompts, params) for one in chunk)

        def ask(prompt: str) -> int:
            body = {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 1.0}
            return httpx.post(f"{url}/completions", json=body, timeout=600).json()["usage"]["completion_tokens"]

        def public() -> int:
            with ThreadPoolExecutor(4) as pool:
                return sum(pool.map(ask, prompts))

        ours()
        return speed(ours, public, repeats)


def main() -> None:
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--models", nargs="+", default=["0.1B", "0.5B"], help=f"{', '.join(SHAPES)}, or folders")
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "vLLM", "llama.cpp"])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a measurement; training has fewer")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--gguf", help="model of the row llama.cpp")
    args = parser.parse_args()
    common.quiet()
    settings = {"models": args.models, "tokens": args.tokens, "repeats": args.repeats}
    result = Result("cpu", settings)
    if args.json is not None and args.json.is_file():
        stored = json.loads(args.json.read_text(encoding="utf-8"))
        if stored["settings"] == settings:
            result = replace(result, rows=stored["rows"])
    done = {(row["model"], row["part"]) for row in result.rows}
    with common.scratch() as scratch:
        for name in args.models:
            folder = saved(name, Path(scratch))
            for part in args.parts:
                about = (name if part != "llama.cpp" else Path(str(args.gguf)).name, part)
                if about in done:
                    continue
                if why := missing(part, args.gguf):
                    print(f"{part} left out: {why}", file=sys.stderr)
                    continue
                done.add(about)
                if part == "llama.cpp":
                    ours, public = llama_cpp(args.gguf, args.tokens, args.repeats)
                else:
                    measure = {**PARTS, "vLLM": vllm}[part]
                    ours, public = measure(folder, args.tokens, args.repeats)
                row = {"model": about[0], "part": part, "tokens/s": ours, "public": public, "ratio": ours / public}
                row["precision"] = precision_of(part, folder)
                result.rows.append(row)
                result.write(args.json)
    print()
    result.write(args.json)


def precision_of(part: str, folder: str) -> str:
    """What was chosen."""
    if part in ("SFT step", "discriminator"):
        return "bfloat16 autocast" if training_precision(folder)[0] else "float32"
    return "" if part == "llama.cpp" else reading_precision(folder).name


def missing(part: str, gguf: str | None) -> str:
    """Why an optional part cannot be measured; empty if it can."""
    if part == "vLLM" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if part == "llama.cpp" and importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed (pip install 'llama-cpp-python[server]')"
    if part == "llama.cpp" and gguf is None:
        return "no model: give --gguf FILE"
    return ""


if __name__ == "__main__":
    main()
