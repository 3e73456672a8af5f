"""Keys and values of a prompt, computed once for several continuations, change nothing."""

import pytest
import torch

from model_helpers import ARCHITECTURES, VOCAB
from slm.evaluate.generation import Sampling, continued, ended, generation_config
from slm.model.architecture import new_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [4, 5], [20] * 6, [3]]


def sharp(kind: str):
    """Random weights, large enough for logits that differ."""
    torch.manual_seed(0)
    model = new_model(ARCHITECTURES[kind], VOCAB, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt_neox", "phi", "mamba"])
def test_copies_are_what_each_prompt_alone_is_followed_by(kind, monkeypatch):
    model = sharp(kind)
    config = generation_config(model, 1, Sampling(10, 0, 1))
    alone = [continued(model, [prompt], config, "float32")[0] for prompt in PROMPTS]
    if kind == "mamba":  # its states would see what pads a prompt
        alone = continued(model, PROMPTS, config, "float32")
    widths = []
    forward = model.base_model.forward
    monkeypatch.setattr(
        model.base_model,
        "forward",
        lambda input_ids, *args, **kwargs: (
            widths.append(tuple(input_ids.shape)) or forward(input_ids, *args, **kwargs)
        ),
    )
    found = continued(model, PROMPTS, config, "float32", copies=3)
    assert found == [ids for ids in alone for _ in range(3)]
    assert len(set(map(tuple, alone))) == 4
    if kind != "mamba":  # the prompts are read once, then the copies token by token
        assert widths[0] == (4, 6) and set(widths[1:]) == {(12, 1)}


def test_copies_are_drawn_independently():
    model = sharp("llama")
    config = generation_config(model, 1, Sampling(6, 3.0, 1))
    found = continued(model, [[5, 6, 7]], config, "float32", copies=20)
    assert len(set(map(tuple, found))) > 15


def test_what_pads_a_row_behind_its_end_is_no_part_of_it():
    assert ended([5, 6, 1, 1, 1], [1, 2]) == [5, 6, 1]
    assert ended([5, 2, 6], [1, 2]) == [5, 2] and ended([5, 6], [1]) == [5, 6]
