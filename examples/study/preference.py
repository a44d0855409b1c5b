"""DPO and SimPO by TRL, the rivals that learn from the model's own right and wrong answers.

    python preference.py --loss dpo|simpo --hf-model DIR --sft-data FILE --own FOLDER --output FOLDER --steps 5 10 20
        --lr 3e-5 --pairs 4 --seed 1

A pair is a right and a wrong answer of the base model to the same problem, of those that `realign --regenerate
--only-right` drew and verified in --own; a problem that lacks either gives none. Trains in transformers with TRL
(`pip install trl`), and writes for each of the steps FOLDER/STEP, a Hugging Face folder. beta and margin are those of
the papers' and trainers' examples: 0.1 for DPO; 2 and 1 for SimPO.
"""

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megatron_idft.corpus.records import read_records


def pairs(own: Path, questions: dict[str, str], seed: int) -> list[dict[str, Any]]:
    """As many of a problem as it has of both right and wrong answers, in random order."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"right": [], "wrong": []})
    for path in sorted((own / "parts").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "turns"]).to_pylist():
            for candidate in row["turns"][0]["candidates"]:
                if candidate["verdict"] in ("right", "wrong"):
                    found[row["id"].rpartition("#")[0]][candidate["verdict"]].append(candidate["text"])
    made = [
        {
            "prompt": [{"role": "user", "content": questions[name]}],
            "chosen": [{"role": "assistant", "content": right}],
            "rejected": [{"role": "assistant", "content": wrong}],
        }
        for name, answers in sorted(found.items())
        for right, wrong in zip(answers["right"], answers["wrong"], strict=False)
    ]
    random.Random(seed).shuffle(made)
    return made


def trainer(args: argparse.Namespace, examples: list[dict[str, Any]]) -> Any:
    """TRL's, for the loss. SimPO is its CPO trainer without the term of cross-entropy."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = AutoModelForCausalLM.from_pretrained(args.hf_model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.hf_model)
    common = {
        "output_dir": str(args.output / "trainer"),
        "per_device_train_batch_size": args.pairs,
        "max_steps": args.steps[-1],
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,  # as the other arms
        "max_length": 512,
        "seed": args.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": args.cpu,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
    }
    own = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(examples)}
    if args.loss == "dpo":
        return DPOTrainer(model, args=DPOConfig(**common, beta=0.1), **own)
    simpo = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
    return CPOTrainer(model, args=simpo, **own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["dpo", "simpo"], required=True)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="to begin with")
    parser.add_argument("--sft-data", type=Path, required=True, metavar="FILE", help="the problems")
    parser.add_argument("--own", type=Path, required=True, metavar="DIR", help="of `realign`, with the model's answers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="after which the model is saved")
    parser.add_argument("--pairs", type=int, required=True, help="in a step")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="products in bf16")
    args = parser.parse_args()
    questions = {record.id: record.messages[0]["content"] for record in read_records(args.sft_data)}
    examples = pairs(args.own, questions, args.seed)
    print(f"{len(examples)} pairs", flush=True)
    training = trainer(args, examples)
    from transformers import TrainerCallback

    class Saving(TrainerCallback):
        """Writes the model after some of the steps."""

        def on_step_end(self, settings: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step in args.steps:
                folder = args.output / str(state.global_step)
                training.model.save_pretrained(folder)
                training.processing_class.save_pretrained(folder)

    training.add_callback(Saving())
    training.train()


if __name__ == "__main__":
    main()
