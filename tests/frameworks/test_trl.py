"""TRL's GRPOTrainer: it generates what it trains on, so the streams decide on the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.frameworks.training import AFTER, BATCH, BEFORE, RANKS, Plan, Run, Verdict, run_page
from tests.support.jobs import job
from tests.support.streams import draw

pytestmark = pytest.mark.frameworks

WORDS = "abcdefghijklmnop"


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="a"))
    tokens.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="b", pad_token="c")


def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                attention_dropout=0.2,
                eos_token_id=1,
                pad_token_id=2,
                bos_token_id=3,
            )
        )


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def train(
    plan: Plan,
    steps_per_generation: int = 1,
    prompts: int = 48,
    several_epochs: bool = False,
    page: str = "trl",
) -> Run:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    names: dict[str, Any] = {}
    base: Any = GRPOTrainer
    if several_epochs:
        run_page("trl", 1, names)
        base = names["ResumableGRPOTrainer"]
    arguments = GRPOConfig(
        output_dir=str(plan.folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=BATCH,
        steps_per_generation=steps_per_generation,
        gradient_accumulation_steps=1,
        num_generations=2,
        max_completion_length=4,
        generation_kwargs={"min_new_tokens": 4},  # as many draws on other ranks' prompts
        max_steps=BEFORE + AFTER,
        save_strategy="no" if plan.resume else "steps",
        save_steps=BEFORE,
        report_to=[],
        disable_tqdm=True,
        seed=42,
        lr_scheduler_type="constant",
        learning_rate=0.01,
        ignore_data_skip=several_epochs,
    )
    run = Run()

    class Notes(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            draw(plan.elsewhere)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > BEFORE:
                run.note(losses[-1])
                run.samples += tokens[-1]

    class Noting(base):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> torch.Tensor:
            both = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            tokens.append(both.flatten().tolist())
            loss: torch.Tensor = super().compute_loss(model, inputs, **kwargs)
            losses.append(float(loss))
            return loss

    losses: list[float] = []
    tokens: list[list[float]] = []
    names["trainer"] = Noting(
        model=model(),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [WORDS[4 + n % 9] for n in range(prompts)]}),
        processing_class=tokenizer(),
        callbacks=[Notes()],
    )
    if several_epochs:
        run_page("transformers", 1, names)
        run_page("transformers", 2, names)
    elif plan.ours:
        run_page(page, 0, names)
    saved = str(plan.folder / f"checkpoint-{BEFORE}")
    names["trainer"].train(resume_from_checkpoint=saved if plan.resume else None)
    return run


def is_exact(folder: Path, ours: bool, *options: Any) -> bool:
    """Return whether a resume on as many ranks trains on the same prompts and completions."""
    folder /= str(ours)
    expected = job(RANKS, train, Plan(folder, resume=False, ours=ours), *options)
    found = job(RANKS, train, Plan(folder, resume=True, ours=ours, elsewhere=1), *options)
    assert expected[0].samples != expected[1].samples
    return found == expected


def test_grpo(assert_adopted: Callable[..., Verdict]) -> None:
    own = assert_adopted("TRL, GRPO", train)
    assert own.same == "exact"


def test_the_trap_of_a_generation_that_lasts(tmp_path: Path) -> None:
    """The page says that a save in the middle of one is not exact, and where it is."""
    assert not is_exact(tmp_path / "within", True, BEFORE - 1)
    assert not is_exact(tmp_path / "within", False, BEFORE - 1)
    assert is_exact(tmp_path / "between", True, BEFORE)


def test_the_trap_of_a_rewind_at_the_first_forward(tmp_path: Path) -> None:
    """The page says that it comes too late; it is what Hugging Face Trainer's page does."""
    assert not is_exact(tmp_path, True, 1, 48, False, "transformers")


@pytest.mark.parametrize("prompts", [2 * BEFORE, 2 * BEFORE - 2])
def test_several_epochs(prompts: int, tmp_path: Path) -> None:
    """At the end of the first epoch, and in the middle of the second."""
    assert not is_exact(tmp_path, False, 1, prompts)
    assert is_exact(tmp_path, True, 1, prompts, True)
