"""The speed of evaluation: questions per second of Lethe and of lm-eval's `hf` model, in one process.

    python benchmarks/evaluate.py                     # a random GPT-NeoX of width 384, six blocks
    python benchmarks/evaluate.py --model FOLDER      # a model of your own
    python benchmarks/evaluate.py --without prefix    # Lethe without one of its speed-ups in place of lm-eval

Both score the same questions with the same model, in batches of at most as many tokens. They take turns. Prints medians, and
the ratio as the median over the turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

WORDS = "river mill copper salt harbour lantern clockmaker wheel island apprentice brass sea founder trade resin coal"
WITHOUT = {"trees": ("MIN_SHARED", 2), "several": ("MIN_SHARED", 1), "prefix": ("MIN_PREFIX", 10**9)}
"""Values of constants in `token_trees` that turn off: trees, several questions in one tree, the prefix that a task shares."""
ABOUT = "The following are multiple choice questions (with answers) about biology."


def questions(count: int, context: int, seed: int) -> list[dict]:
    """Questions with four choices; `context` words each."""
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS.split()) for _ in range(n))

    made = []
    for i in range(count):
        text = f"Question {i}: {words(context)}"
        made.append({"question": text, "choices": [f"{words(1 + k)} {k}" for k in range(4)], "answer": i % 4})
    return made


def questions_in_forms(count: int, seed: int) -> list[dict]:
    """Questions with four choices of one word: 24 forms, each filled with many names of three syllables, as the lab's are."""
    rng = random.Random(seed)
    words = WORDS.split()
    forms = [f"{' '.join(rng.sample(words, 3))} {{}} {' '.join(rng.sample(words, 2))}" for _ in range(24)]
    names = ["".join(rng.choice(["orv", "ane", "tre", "ixa", "bru", "mpa", "ol", "ki"]) for _ in range(3)) for _ in range(60)]
    asked = rng.sample([(form, name) for form in forms for name in names], count)
    return [
        {"question": form.format(name), "choices": rng.sample(words, 4), "answer": i % 4}
        for i, (form, name) in enumerate(asked)
    ]


def task_folder(folder: Path, name: str, rows: list[dict], letters: bool, examples: int = 0) -> Path:
    """A task in lm-eval's own format, in the words of wmdp_bio or as a cloze. `examples` stand before all its questions."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "".join(f"\\n{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate("ABCD"))
    text = f"{{{{question.strip()}}}}{options}\\nAnswer:" if letters else "{{question.strip()}}"
    choices = '["A", "B", "C", "D"]' if letters else "choices"
    solved = [f"{row['question']} {' '.join(row['choices'])}\\nAnswer: A" for row in questions(examples, 40, 1)]
    about = "".join(f"{part}\\n\\n" for part in [ABOUT, *solved]) if letters else ""
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        f'output_type: multiple_choice\nnum_fewshot: 0\ndescription: "{about}"\ndoc_to_text: "{text}"\n'
        f"doc_to_choice: {choices}\n"
        f"doc_to_target: answer\nmetric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n"
        f"metadata: {{version: 1}}\n"
    )
    return folder


def trained_tokenizer() -> object:
    """A byte-level BPE trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([WORDS, ABOUT, "\nQuestion\nAnswer: A, B, C, D"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>")


def random_model(width: int, vocabulary: int) -> tuple:
    """A GPT-NeoX with random weights and a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    return AutoModelForCausalLM.from_config(config).eval(), trained_tokenizer()


def in_turns(turns: int, **functions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each function in each turn; who goes first alternates."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(turns):
        for name in sorted(functions, reverse=bool(turn % 2)):
            start = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - start)
    return times


def seconds_to_find(name: str) -> tuple[float, float]:
    """Seconds until a fresh process knows where a task is: Lethe's, lm-eval's own index."""
    codes = (
        f"from lethe.evaluation import tasks; tasks.locate(['{name}'])",
        f"from lm_eval.tasks import TaskManager; TaskManager().task_index['{name}']",
    )
    nothing = ("from lethe.evaluation import tasks", "from lm_eval.tasks import TaskManager")
    found = []
    for code, bare in zip(codes, nothing, strict=True):
        taken = []
        for text in (bare, code):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
            taken.append(time.perf_counter() - start)
        found.append(max(0.0, taken[1] - taken[0]))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's folder; without it a random GPT-NeoX is made")
    parser.add_argument("--width", type=int, default=384, help="width of the random model")
    parser.add_argument("--vocabulary", type=int, default=8192, help="vocabulary of the random model")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a batch")
    parser.add_argument("--without", choices=WITHOUT, help="compare with Lethe without this, and not with lm-eval")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("LETHE_HOME", home)
        measure(args, Path(home))


def measure(args: argparse.Namespace, folder: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lethe import cli
    from lethe.evaluation import requests, scoring, token_trees
    from lethe.evaluation.accuracy import evaluate_model

    cli.quiet()
    logging.disable()
    scoring.TOKENS_PER_BATCH = min(args.tokens, scoring.TOKENS_PER_BATCH)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    else:
        model, tokenizer = random_model(args.width, args.vocabulary)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{type(model).__name__}, {size:.1f} M parameters, {args.questions} questions, {args.tokens} tokens a batch")
    other = f"no {args.without}" if args.without else "lm-eval hf"
    print(f"{'':52}{other:>12}{'lethe':>12}{'ratio':>9}")
    for title, name, rows in (
        ("cloze, 4 choices, context of 200 tokens", "bench_cloze", questions(args.questions, 190, 0)),
        ("letters, in the words of WMDP", "bench_letters", questions(args.questions, 40, 0)),
        ("letters, behind five examples", "bench_letters_5", questions(args.questions, 40, 0)),
        ("cloze, one word after a form and a name", "bench_forms", questions_in_forms(min(1440, 12 * args.questions), 0)),
    ):
        place = folder / name
        place.mkdir()
        task_folder(place, name, rows, letters="letters" in name, examples=5 * name.endswith("5"))
        leaf = requests.load_tasks([f"{place}/{name}"])[name][0]
        with contextlib.redirect_stderr(io.StringIO()):
            leaf.task.build_all_requests()
        instances = leaf.task.instances
        longest = max(len(c) + len(k) for c, k in scoring.Scorer(model, tokenizer).encode([i.args for i in instances]))
        hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=max(1, args.tokens // longest))

        def ours(instances: list = instances) -> list:
            scorer = scoring.Scorer(model, tokenizer)
            return scorer.score(scorer.encode([one.args for one in instances]))

        def theirs(instances: list = instances, hflm: HFLM = hflm) -> list:
            if not args.without:
                return hflm.loglikelihood(instances, disable_tqdm=True)
            name, value = WITHOUT[args.without]
            with unittest.mock.patch.object(token_trees, name, value):
                return ours(instances)

        both = zip(ours(), theirs(), strict=True)
        worst = max(abs(a - b) / max(1e-4, 1e-5 * abs(b)) for (a, _), (b, _) in both)
        assert worst <= 1, f"log-likelihoods differ by {worst} of what is allowed"
        times = in_turns(args.turns, ours=ours, theirs=theirs)
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
        speeds = [len(rows) / statistics.median(times[who]) for who in ("theirs", "ours")]
        print(f"{title + ', questions/s':52}{speeds[0]:12.1f}{speeds[1]:12.1f}{ratio:8.1f}×")
    ours_finds, theirs_finds = seconds_to_find("wmdp_bio")
    print(f"{'a task is found, s':52}{theirs_finds:12.2f}{ours_finds:12.2f}{theirs_finds / max(1e-3, ours_finds):8.1f}×")
    second = until_scoring(model, tokenizer, folder / "bench_letters", evaluate_model)
    print(f"{'second evaluation: seconds until it scores':52}{'':12}{second:12.3f}")


def until_scoring(model: object, tokenizer: object, folder: Path, evaluate_model: Callable) -> float:
    """Seconds from the call of a second evaluation in one process to its first batch."""
    from lethe.evaluation.scoring import Scorer

    evaluate_model(model, tokenizer, [str(folder)])
    original = Scorer._run
    first: list[float] = []

    def noting(self, *given):  # type: ignore[no-untyped-def]
        first.append(time.perf_counter())
        return original(self, *given)

    Scorer._run = noting  # type: ignore[method-assign]
    start = time.perf_counter()
    evaluate_model(model, tokenizer, [str(folder)])
    Scorer._run = original  # type: ignore[method-assign]
    return first[0] - start


if __name__ == "__main__":
    main()
