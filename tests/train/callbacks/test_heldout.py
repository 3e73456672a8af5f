"""When a run's held-out losses are measured; their values are test_evaluate.py's."""

from types import SimpleNamespace
from typing import Any

import torch

from model_helpers import small_llama
from slm.evaluate.command import corpus_loss
from slm.model.build import SelectiveLM
from slm.train.callbacks.heldout import HeldoutLoss
from slm.train.curves import read_window_losses


def test_heldout_loss_is_logged_from_step_0(text_corpus, tmp_path):
    lm = SelectiveLM(small_llama(vocab_size=300))
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((metrics, step)))
    data = SimpleNamespace(heldout={"text": text_corpus}, heldout_windows=4, tokens_per_step=100)
    precision = SimpleNamespace(forward_context=torch.no_grad)
    trainer: Any = SimpleNamespace(
        progress_bar_callback=None,
        is_global_zero=True,
        global_step=0,
        max_steps=4,
        global_rank=0,
        strategy=None,
        world_size=1,
        accumulate_grad_batches=1,
        datamodule=data,
        loggers=[logger],
        precision_plugin=precision,
    )
    module: Any = SimpleNamespace(lm=lm, heldout_losses={})
    callback = HeldoutLoss(str(tmp_path), every_tokens=200, batch_size=2)
    callback.on_train_start(trainer, module)
    for trainer.global_step in (1, 2, 3, 4):
        callback.on_train_batch_end(trainer, module, None, None, trainer.global_step - 1)
    expected = corpus_loss(lm, text_corpus, 2, 4)
    assert [(step, metrics["data/tokens_seen"]) for metrics, step in logged] == [
        (0, 0),
        (2, 200),
        (4, 400),
    ]
    for metrics, _ in logged:
        assert metrics["heldout/text/loss"] == expected.loss
        assert metrics["heldout/text/bits_per_byte"] == expected.bits_per_byte
    assert module.heldout_losses == {"text": expected.loss}
    windows = read_window_losses(tmp_path)
    assert list(windows) == [("text", 0), ("text", 400)]
    assert all(losses.total() == expected for losses in windows.values())
