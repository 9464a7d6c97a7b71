"""Throughput of generation engines: same model, prompts, lengths and sampling, alternating in one process.

    python benchmarks/rollouts.py [MODEL_FOLDER] [--engines eager static continuous vllm] [--json FILE]

Without a folder: a random Llama of 3.4 M parameters, 218 M with CUDA. 24 prompts x 8 completions of exactly 64 tokens
on a CPU, 64 x 8 of 512 with CUDA, all in one call, temperature 1, no top-k or top-p. Engines (vllm only if installed):

- eager: transformers' `generate` with a dynamic cache, as TRL calls it;
- static: `generate` with `cache_implementation="static"`, whose decoding is compiled with CUDA (the default of
  `tracereward train` there);
- continuous: transformers' continuous batching (`generate_batch`); on a CPU with a cache of the required size;
- vllm: `vllm.LLM` in the same process.

"start" is the time of building an engine and its first call, minus a later call: building, compiling, warming up.
Prints the median of the other calls, the interquartile range, and the throughput relative to eager.
"""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from common import Result, iqr, median
from training_step import SIZES
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from tracereward.modeling.batching import pack
from tracereward.modeling.tokenization import encode_prompt, load_tokenizer, pad_id

ENGINES = ("eager", "static", "continuous", "vllm")


class Work:
    """The generation workload, and a function for each engine that runs it and returns the number of tokens."""

    def __init__(self, folder: str, prompts: int, group: int, tokens: int):
        self.folder, self.group, self.tokens = folder, group, tokens
        self.tokenizer = load_tokenizer(folder)
        rows = common.expert_rows(prompts)
        self.ids = [encode_prompt(self.tokenizer, row["prompt"]) for row in rows for _ in range(group)]
        self.sampling: dict[str, Any] = {
            "max_new_tokens": tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "pad_token_id": pad_id(self.tokenizer),
        }

    def model(self) -> Any:
        dtype = torch.bfloat16 if common.GPU else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype).eval()
        return model.to("cuda") if common.GPU else model

    def generate(self, cache: str | None) -> Callable[[], int]:
        model = self.model()
        batch = pack(self.ids, [[]] * len(self.ids), pad_id(self.tokenizer)).to(model.device)
        config = GenerationConfig(
            **self.sampling,
            min_new_tokens=self.tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            cache_implementation=cache,
        )

        @torch.no_grad()
        def call() -> int:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            output = model.generate(**inputs, generation_config=config)
            return output[:, batch.input_ids.size(1) :].numel()

        return call

    def continuous(self) -> Callable[[], int]:
        model = self.model()
        config = GenerationConfig(**self.sampling, eos_token_id=-1)  # no early end; min_new_tokens is not supported
        limits: dict[str, Any] = {}
        if not common.GPU:  # the default cache would fill the memory at each call
            pages = len(self.ids) * -(-(max(map(len, self.ids)) + self.tokens) // 32)
            limits = {"page_size": 32, "num_blocks": pages, "max_batch_tokens": 256}
        batching = ContinuousBatchingConfig(**limits)

        @torch.no_grad()
        def call() -> int:
            outputs = model.generate_batch(
                self.ids, generation_config=config, continuous_batching_config=batching, progress_bar=False
            )
            return sum(len(output.generated_tokens) for output in outputs.values())

        return call

    def vllm(self) -> Callable[[], int]:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # otherwise another process uses the CPU time
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

        dtype = "bfloat16" if common.GPU else "float32"
        length = max(map(len, self.ids)) + self.tokens
        options: dict[str, Any] = {"gpu_memory_utilization": 0.5} if common.GPU else {"enforce_eager": True}
        engine = LLM(self.folder, dtype=dtype, max_model_len=length, enable_prefix_caching=True, **options)
        sampling = SamplingParams(temperature=1.0, max_tokens=self.tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in self.ids]

        def call() -> int:
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        return call

    def engine(self, name: str) -> Callable[[], int]:
        made = {"eager": lambda: self.generate(None), "static": lambda: self.generate("static")}
        return (made | {"continuous": self.continuous, "vllm": self.vllm})[name]()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpu" if common.GPU else "small")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512 if common.GPU else 64)
    args = parser.parse_args()
    prompts, group = (64, 8) if common.GPU else (24, 8)
    with common.scratch() as name:
        folder = args.model or common.save_model(Path(name), SIZES[args.size])
        work = Work(folder, prompts, group, args.tokens)
        settings = {"policy, M": common.millions(folder), "prompts": prompts, "group": group, "tokens": args.tokens}
        result = Result("rollouts", settings)
        calls, starts = {}, {}
        for engine in args.engines:
            if engine == "vllm" and importlib.util.find_spec("vllm") is None:
                print("vllm: not installed")
                continue
            start = common.now()
            calls[engine] = work.engine(engine)
            generated = calls[engine]()
            starts[engine] = common.now() - start
            expected = prompts * group * args.tokens
            assert generated == expected, f"{engine}: {generated} tokens, not {expected}"
        times: dict[str, list[float]] = {engine: [] for engine in calls}
        for _ in range(args.repeat):
            for engine, call in calls.items():
                start = common.now()
                call()
                times[engine].append(common.now() - start)
        tokens = prompts * group * args.tokens
        rates = {engine: tokens / median(seconds) for engine, seconds in times.items()}
        for engine, seconds in times.items():
            result.rows.append(
                {
                    "engine": engine,
                    "tokens/s": rates[engine],
                    "s a call": median(seconds),
                    "IQR": iqr(seconds),
                    "against eager": rates[engine] / rates["eager"] if "eager" in rates else None,
                    "start, s": starts[engine] - median(seconds),
                }
            )
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
