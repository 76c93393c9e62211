"""What evaluating an attack costs beside its training: seconds of one evaluation and of ten updates, by task.

    python benchmarks/tamper.py

On the lab, with the settings of the recipe tamper/lab, and with batch 1 × 4 as in tamper/short-adamw. Both kinds of
seconds are those that any attack writes to its run.json, under `environment`.
"""

from __future__ import annotations

import tempfile

from lethe import EvalSettings, TamperConfig, tamper

UPDATES = 40
TASKS = (["lab_forget_robust"], ["lab_forget_robust", "lab_retain"])
TASKS += (["lab_forget_robust", "lab_forget_cloze", "lab_retain", "lab_retain_stem"],)
BATCHES = {"lab": (16, 1), "short": (1, 4)}


def main() -> None:
    for name, (batch, accumulation) in BATCHES.items():
        for tasks in TASKS:
            with tempfile.TemporaryDirectory() as out:
                config = TamperConfig(
                    model="lab:final",
                    per_device_train_batch_size=batch,
                    gradient_accumulation_steps=accumulation,
                    max_steps=UPDATES,
                    eval=EvalSettings(tasks, every=10),
                    out=out,
                )
                run = tamper(config)
                took, points = run.record["environment"], len(run.rows("curve.jsonl"))
                questions = sum(result["n"] for result in run.record["evals"].values())
            print(
                f"{name}: {len(tasks)} tasks, {questions} questions: {took['evaluation_seconds'] / points:.2f} s each, "
                f"{10 * took['training_seconds'] / UPDATES:.2f} s ten updates"
            )


if __name__ == "__main__":
    main()
