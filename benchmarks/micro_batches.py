"""Time saved by length-sorted micro-batches: the policy's passes over one generation, as TRL splits it and by length.

    python benchmarks/micro_batches.py [MODEL_FOLDER] [--data FILE --task gsm8k] [--repeat 5] [--json FILE]

Without a folder: a random Llama of 3.4 M parameters, 218 M with CUDA. The generation batch has the first `--rollouts`
traces of `--data`, or generated ones of 1 to 20 lines, in four optimiser steps of four micro-batches. Measures forward
and backward passes of TRL's loss, without the optimiser, alternating between the two. Prints the median of the repeats,
the interquartile range, the padded tokens, and the ratio.
"""

import random
from pathlib import Path

import common
import torch
from common import Result, iqr, median
from training_step import SIZES
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from tracereward.data.demonstrations import load_demonstrations
from tracereward.modeling.batching import pack
from tracereward.modeling.tokenization import encode_completion, encode_prompt, load_tokenizer, pad_id
from tracereward.tasks.recipes import get_task
from tracereward.training.micro_batches import by_length

STEPS = ACCUMULATION = 4


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--data")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--rollouts", type=int, default=1024 if common.GPU else 256)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with common.scratch() as name:
        folder = args.model or common.save_model(Path(name) / "policy", SIZES["gpu" if common.GPU else "small"])
        if args.data:
            rows = load_demonstrations(args.data, get_task(args.task), limit=args.rollouts)
        else:
            rng = random.Random(0)
            lines = [rng.randint(1, 20) for _ in range(args.rollouts)]
            rows = [common.expert_rows(args.rollouts, lines=count)[place] for place, count in enumerate(lines)]
        tokenizer = load_tokenizer(folder)
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
        completions = [encode_completion(tokenizer, row["completion"]) for row in rows]
        rows_at_once = args.rollouts // STEPS // ACCUMULATION
        options = common.trainer_options(rows_at_once, rows_at_once, max(map(len, completions)), Path(name) / "run")
        options |= {"gradient_accumulation_steps": ACCUMULATION, "steps_per_generation": STEPS * ACCUMULATION}
        trainer = common.plain_trainer(folder, common.expert_rows(8), options)
        batch = pack(prompts, completions, pad_id(tokenizer)).to(trainer.accelerator.device)
        width = batch.completion_mask.size(1)
        generation = {
            "prompt_ids": batch.input_ids[:, :-width],
            "prompt_mask": batch.attention_mask[:, :-width],
            "completion_ids": batch.input_ids[:, -width:],
            "completion_mask": batch.completion_mask.long(),
            "advantages": torch.randn(len(rows), device=batch.input_ids.device),
            "num_items_in_batch": batch.completion_mask.sum(),
        }
        torch.manual_seed(0)
        trl_batches = split_tensor_dict(shuffle_sequence_dict(generation), STEPS * ACCUMULATION)
        trainer.current_gradient_accumulation_steps = ACCUMULATION
        trainer.model.train()
        ways = {"as TRL splits it": lambda: trl_batches, "by length": lambda: by_length(trl_batches, ACCUMULATION)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.repeat + 1):
            for name, made in ways.items():
                start = common.now()
                for micro_batch in made():
                    trainer._compute_loss(trainer.model, micro_batch).backward()
                if turn:  # the first is a warm-up
                    seconds[name].append(common.now() - start)
                trainer.model.zero_grad()
        result = Result("micro_batches", {"policy, M": common.millions(folder), "rollouts": len(rows)})
        for name, times in seconds.items():
            tokens = sum(
                (b["prompt_ids"].size(1) + b["completion_ids"].size(1)) * len(b["prompt_ids"]) for b in ways[name]()
            )
            ratio = median(times) / median(seconds["as TRL splits it"])
            row = {"micro-batches": name, "padded tokens": tokens, "s": median(times), "IQR": iqr(times)}
            result.rows.append({**row, "ratio": ratio})
        result.write(args.json)


if __name__ == "__main__":
    common.quiet()
    main()
