"""The private and undocumented parts of transformers' Trainer that training/ relies on, in the installed version."""

import inspect

import pytest
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from layerskip_core.training.loop.trainer import RunTrainer
from layerskip_core.training.loop.transformers_internals import ResumingTrainer, use_one_gpu

WHERE = f"transformers {transformers.__version__} changed it: see layerskip_core/training/loop/transformers_internals.py"


def test_the_weights_of_a_checkpoint_are_loaded_by_one_method():
    names = list(inspect.signature(Trainer._load_from_checkpoint).parameters)
    assert names == ["self", "resume_from_checkpoint", "model"], WHERE
    assert "_load_from_checkpoint(resume_from_checkpoint)" in inspect.getsource(Trainer.train), WHERE


def test_no_other_private_method_is_overridden():
    own = {name for cls in (RunTrainer, ResumingTrainer) for name in vars(cls) if not name.startswith("__")}
    inherited = own & set(dir(Trainer))
    assert {name for name in inherited if name.startswith("_")} == {
        "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save_optimizer_and_scheduler",
    }  # fmt: skip


def test_the_number_of_gpus_is_an_attribute_that_can_be_set(tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    assert arguments.n_gpu <= 1, WHERE
    arguments._n_gpu = 2
    assert arguments.n_gpu == 2, WHERE
    use_one_gpu(arguments)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == arguments.per_device_train_batch_size, WHERE


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_optimizer_step", "on_step_begin", "on_save", "on_evaluate"])
def test_the_events_of_a_run_are_there(event):
    assert callable(getattr(TrainerCallback, event, None)), WHERE


def test_a_checkpoint_is_written_model_first_and_below_the_output_folder():
    """RunState.phase is "saving" from save_model to on_save; RunCallback points `output_dir` at a folder aside."""
    source = inspect.getsource(Trainer._save_checkpoint)
    first = source.index("self.save_model(output_dir, _internal_call=True)")
    assert "_get_output_dir(trial=trial)" in source[:first], WHERE
    assert all(source.index(later) > first for later in ("_save_optimizer_and_scheduler", "_save_rng_state", "save_to_json")), (
        WHERE
    )
    assert "self.args.output_dir" in inspect.getsource(Trainer._get_output_dir), WHERE
    calls = inspect.getsource(Trainer._maybe_log_save_evaluate)
    assert calls.index("_save_checkpoint(") < calls.index("on_save("), WHERE


def test_the_gradient_is_clipped_before_the_optimizer_steps():
    source = inspect.getsource(Trainer._run_epoch)
    assert source.index("on_pre_optimizer_step(") < source.index("self.optimizer.step()") < source.index("on_step_end("), WHERE
    assert "if self.args.max_grad_norm > 0" in source, WHERE
