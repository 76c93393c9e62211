"""One unlearning run from its settings to its result: `unlearn`.

check.py     what cannot work is refused, without importing torch
prepare.py   models, teachers, texts, the trainer and the plan
trainer.py   training: each batch goes through the method's loss
here         maps are fitted, teachers cached, the result is saved, described and evaluated
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from typing import TYPE_CHECKING, Any, NoReturn

from lethe import distributed
from lethe.config import CheckpointsConfig, to_dict
from lethe.errors import LetheError
from lethe.evaluation.checkpoint_sweep import checkpoints
from lethe.evaluation.tasks.consent import trusts_task_code
from lethe.methods import user_file
from lethe.methods.method import Method
from lethe.results import regimes
from lethe.runs.machine import refuse_several_processes
from lethe.runs.run import Run
from lethe.runs.together import is_for_several, work_together
from lethe.training.check import planned_batch
from lethe.unlearning.check import Checked, check, check_source

if TYPE_CHECKING:
    from lethe.unlearning.prepare import Prepared

logger = logging.getLogger(__name__)


def unlearn(config: Method, run: Run | None = None) -> Run:
    """One unlearning run: check, maps, training, artifacts (`adapter` or `model`; `base`, `affine`), evaluation.

    Args:
        config: the settings of a method, such as `lethe.Transfer(source="lab:global_step600")`.
        run: an interrupted run of these settings, to be resumed.

    Raises:
        LetheError: the recipe cannot work; nothing is left behind.
    """
    config, checked = _checked(config, run)
    resumed = run is not None
    several = is_for_several(config.devices, resumed)
    if run is None:
        run = Run.create("unlearn", config.name, to_dict(config), config.out)
        user_file.keep(run, user_file.sha256_of(type(config)))
    if several:
        return work_together(run, config.devices, trusts_task_code())  # type: ignore[arg-type]
    from lethe.training.trainer import keep_threads
    from lethe.unlearning.beginning import begin
    from lethe.unlearning.prepare import cache_teachers, prepare

    made = prepare(run, config, checked, resumed)
    with run.running():
        keep_threads(run)
        for warning in run.record["plan"]["warnings"]:
            logger.warning(warning)
        made.fit_maps(run)
        made.measure_variance(run)
        cache_teachers(run, made)
        if made.checks:
            made.checks.limit()
        begin(run, config, made.trainer)
        made.free_teachers()
        made.trainer.train_with_bar(f"Unlearning {config.name}")
        _finish(run, made)
    made.trainer.clear_saves()
    return run


def inspect(config: Method) -> dict[str, Any]:
    """The plan of a run as it would be recorded, from the loaded models, without training; nothing is left behind."""
    config, checked = _checked(config)
    refuse_several_processes("check")
    from lethe.unlearning.prepare import prepare

    with tempfile.TemporaryDirectory() as folder:
        run = Run.create("check", config.name, to_dict(config), folder)
        prepare(run, config, checked)
        return run.record["plan"]


def _checked(config: Method, run: Run | None = None) -> tuple[Method, Checked]:
    """The recipe with its source found, and its resolved parts.

    Raises:
        LetheError: the recipe cannot work, or no checkpoint can be its source.
    """
    if not isinstance(config, Method):
        raise LetheError(f"unlearn: expected the settings of a method, such as lethe.Transfer(…), got {type(config).__name__}")
    checked = check(config, planned_batch(run))
    from lethe.evaluation.requests import load_tasks

    load_tasks(config.eval.tasks, config.eval.task_data, config.eval.num_fewshot, config.eval.limit)
    if config.finds_source:
        config = dataclasses.replace(config, source=_latest_ignorant(config))
        check_source(config, checked)
    return config, checked


def _latest_ignorant(config: Method) -> str:
    """The latest checkpoint that is at chance on the forget task, among those evaluated.

    Raises:
        LetheError: there are no checkpoints, none is ignorant, or no task tells.
    """
    task = regimes.forget_task(config.eval.tasks) or config.eval.tasks[0]
    data = {name: file for name, file in config.eval.task_data.items() if name == task}
    where = config.source.partition(":")[2] or None
    sweep = checkpoints(
        CheckpointsConfig(
            config.model, where, [task], task_data=data, num_fewshot=config.eval.num_fewshot, dtype=config.dtype, out=config.out
        )
    )
    if sweep.record["latest_ignorant"] is None:
        raise LetheError(f"source: no checkpoint is at chance on {task}; see {sweep.path}, or name a source")
    return sweep.record["latest_ignorant"]


def _no_losses() -> NoReturn:
    raise LetheError("the result is the weights from before the first update")


def _finish(run: Run, made: Prepared) -> None:
    """Save, describe and evaluate a trained run. The artifact is saved first, so that no later failure loses it."""
    from lethe.models.adapters import merged
    from lethe.training import cost
    from lethe.training.saves import save_artifact
    from lethe.training.trainer import weighted_means
    from lethe.unlearning import changes
    from lethe.unlearning.frozen import Frozen

    config, trainer = made.config, made.trainer
    student: Any = trainer.model
    if config.lora and config.merge:
        student = merged(student)
        made.reference = Frozen(made.checked.model, config.teacher_dtype or config.dtype)  # merging overwrote it
    save_artifact(run, "adapter" if config.lora and not config.merge else "model", student, made.tokenizer)
    lines = distributed.from_first(lambda: run.rows("metrics.jsonl"))
    kept = [line for line in lines if made.checks is None or line["step"] <= trainer.state.global_step]
    names = [name for name in lines[-1] if name.endswith("_loss")]
    units = {name: f"{'retain' if name.startswith('retain_') else 'forget'}_{made.unit(name)}" for name in names}
    run.try_to_record(
        losses=lambda: weighted_means(kept, units) if kept else _no_losses(),
        plan=lambda: {"tokens": sum(line.get(f"{text}_tokens", 0) for line in lines for text in ("forget", "retain"))},
        agreement=lambda: changes.agreement(student, made.compared(), made.pad_id),
        update_by_layer=lambda: changes.update_by_layer(student, made.reference),
    )
    run.update(evals=trainer.evaluation.at(trainer.state.global_step, student, f"Evaluating {config.name}"))
    if made.checks:
        made.checks.book()
        if reason := run.record["budget"]["reason"]:
            logger.warning("budget: %s", reason)
    run.try_to_record(cost=lambda: cost.summary(run, lines, made.checked.model, config.out))
