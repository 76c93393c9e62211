"""The attack on a model: what an attacker gets back of the topic, measured step by step.

    here                 what cannot work is refused, without importing torch, before anything is written
    finetuning.py        training on text of the topic
    without_training.py  noise, quantisation or pruning of the weights (`weights.py`), documents in the prompt

The attacker's documents come from the end of the forget text that unlearning does not use. They are the same for every model,
so that curves can be compared with those of controls that never knew the topic: `lab:filtered`, the source, `random:REF`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lethe.config import ATTACKED, TamperConfig, as_text_source, to_dict
from lethe.errors import LetheError
from lethe.evaluation.check import check_tasks
from lethe.evaluation.tasks.consent import trusts_task_code
from lethe.files import refuse_run_folder
from lethe.models import refs
from lethe.runs.run import Run
from lethe.runs.together import is_for_several, work_together
from lethe.text import corpora
from lethe.training.check import plan, planned_batch, refuse_rank, refuse_unavailable


def tamper(config: TamperConfig, run: Run | None = None) -> Run:
    """One attack: curve.jsonl has an evaluation at step 0, at every `eval.every` steps and at the end.

    An attack without training has one at each strength instead: step i is the i-th strength, 0 the model as it is.
    An adapter is merged into its model first, unless the attack is to train it. `evals` of the run are those of the last
    step. `run` is an interrupted attack of these settings, to be resumed.

    Raises:
        LetheError: the attack cannot work; raised before anything is written.
    """
    checked = check_tamper(config, planned_batch(run))
    from lethe.attacks.finetuning import finetune
    from lethe.attacks.without_training import disturb_or_prompt
    from lethe.evaluation.requests import load_tasks

    load_tasks(config.eval.tasks, config.eval.task_data, config.eval.num_fewshot, config.eval.limit)
    if is_for_several(config.devices, run is not None):
        run = run or Run.create("tamper", config.name, to_dict(config), config.out)
        return work_together(run, config.devices, trusts_task_code())  # type: ignore[arg-type]
    attack = finetune if config.attack == "finetune" else disturb_or_prompt
    return attack(config, checked, run)


@dataclass
class CheckedAttack:
    """An attack's resolved parts."""

    model: refs.ModelRef
    documents: list[corpora.Document]
    plan: dict[str, Any]
    used_in_unlearning: int | None

    def parents(self, config: TamperConfig) -> dict[str, Any]:
        """What the attack starts from, for the record: a model and, if the attacker uses any, text."""
        parents: dict[str, Any] = {"model": refs.record(self.model)}
        if config.reads_text:
            text = corpora.record(config.forget, self.documents)
            parents["forget"] = text | {"used_in_unlearning": self.used_in_unlearning}
        return parents


def check_tamper(config: TamperConfig, effective_batch: int | None = None) -> CheckedAttack:
    """Resolve an attack; `used_in_unlearning`: its documents that the attacked run was unlearned with (None: no such run).

    Raises:
        LetheError: a part of it cannot work, or it would train on documents that were used to unlearn.
    """
    refuse_run_folder(config.out)
    check_tasks(config.eval)
    ref = refs.resolve(config.model, config.out)
    if not config.reads_text:
        refs.verify(ref)
        return CheckedAttack(ref, [], {"steps": len(config.strengths)}, None)
    refs.refuse_length(config.max_length, ref)
    refuse_rank(config, ref)
    documents = corpora.take(corpora.read(config.forget), config.num_train_examples, "back", "forget text", ATTACKED)
    if config.attack == "prompt" and max(config.strengths) > len(documents):
        raise LetheError(f"strengths: {max(config.strengths):g} documents are needed, the text has {len(documents)}; lower it")
    if config.adapter == "train" and not ref.adapter:
        raise LetheError(f"adapter: '{config.model}' is not an adapter, so there is no adapter to train; leave it out")
    used = _documents_unlearned(config)
    shared = None if used is None else sum(d.id in used for d in documents)
    if shared and config.overlap == "refuse":
        left = len(documents) - shared
        lower = f"lower num_train_examples to {left}, give other text" if left else "no other document is left: give other text"
        raise LetheError(
            f"forget: {shared} of the attack's {len(documents)} documents were used to unlearn '{config.model}'; "
            f"{lower}, or set overlap to allow"
        )
    refuse_unavailable(config)
    refs.verify(ref)
    steps = {"steps": len(config.strengths), "unique_examples": len(documents)}
    return CheckedAttack(
        ref, documents, plan(config, len(documents), effective_batch) if config.attack == "finetune" else steps, shared
    )


def _documents_unlearned(config: TamperConfig) -> set[str] | None:
    """The documents of the attacker's text that the attacked run was unlearned with, as forget or as retain text.

    A model that an attack saved counts as unlearned with the documents of the attacked model. A folder inside a run's folder
    belongs to that run.
    """
    model, out = config.model, config.out
    run = refs.run_of(model, out)
    if run is None and (Path(model).parent / "run.json").exists():
        run = Run.open(Path(model).parent)
    while run is not None and run.record["kind"] == "tamper":
        run = refs.run_of(run.record["config"]["model"], run.path.parent)
    parents = (run.record.get("parents") or {}) if run else {}
    texts = [parents[role] for role in ("forget", "retain") if role in parents]
    source = as_text_source(config.forget)
    known = [corpora.read(source)]
    if source.first or source.part:  # unlearning had the whole text
        known.append(corpora.read(replace(source, first=None, part=None)))
    fronts = [(everything[: text["documents"]], text["sha256"]) for everything in known for text in texts]
    used = [front for front, sha256 in fronts if corpora.fingerprint(front) == sha256]
    return {document.id for front in used for document in front} if used else None
