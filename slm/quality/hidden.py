"""Features of a document from a base model: the mean of the last hidden states of its tokens.

Phi-1 (arXiv 2306.11644, section 2.1) has them of a pretrained model of code. A document is read as
in training, after an EOS, and its first `context` tokens count. Costs one forward of the backbone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from slm.errors import UserError
from slm.model.architecture import position_limit
from slm.model.build import load_model
from slm.model.device import DTYPES, computing, pick_device
from slm.model.folder import model_sha256
from slm.model.head import hidden_states
from slm.prepare.encoder import Encoder, encoder_state
from slm.store.hub import check_model_folder
from slm.store.tokenizer import load_tokenizer

CHARACTERS_A_TOKEN = 32  # what lies behind so many characters a token is not encoded


class Hidden:
    """Called with texts: (n,) -> (n, D) float32."""

    def __init__(self, folder: str, context: int, batch_size: int, dtype: str, device: str):
        check_model_folder("base_model", folder)
        tokenizer = load_tokenizer(folder)
        self.encoder, self.eos = Encoder(encoder_state(tokenizer)), tokenizer.eos_token_id
        model: Any = load_model(folder)
        limit = position_limit(model.config)
        if limit is not None and context >= limit:
            raise UserError(
                f"context is {context}, with an EOS before it more than the {limit} positions of "
                f"{folder}: set context={limit - 1} or less"
            )
        self.sha256 = model_sha256(folder)
        self.device, self.dtype = pick_device(device), dtype
        self.model = model.to(self.device, DTYPES[dtype]).eval()
        self.context, self.batch_size = context, batch_size

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        ids = self.encode(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # of like length together
        found = np.empty((len(ids), self.width), np.float32)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            found[batch] = self.means([ids[i] for i in batch])
        return found

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """At least one token of each: of a text that has none the EOS that ends it."""
        cut = [text[: CHARACTERS_A_TOKEN * self.context] for text in texts]
        encoded = self.encoder.encode(cut, np.array([len(text.encode()) for text in cut]))
        ends = np.cumsum(encoded.lengths)
        tokens = [
            encoded.tokens[end - n : end] for n, end in zip(encoded.lengths, ends, strict=True)
        ]
        return [ids[: max(1, min(len(ids) - 1, self.context))] for ids in tokens]

    @torch.no_grad()
    def means(self, ids: Sequence[np.ndarray]) -> np.ndarray:  # (B, D)
        """Padded at the right, where a causal model does not see it from the text."""
        lengths = torch.tensor([len(one) for one in ids])
        padded = torch.full((len(ids), 1 + int(lengths.max())), self.eos)
        for row, one in enumerate(ids):
            padded[row, 1 : 1 + len(one)] = torch.from_numpy(one.astype(np.int64))
        with computing(self.device, self.dtype):
            hidden = hidden_states(self.model, {"input_ids": padded.to(self.device)})[:, 1:]
        is_text = torch.arange(hidden.shape[1]) < lengths[:, None]
        kept = hidden.float() * is_text[..., None].to(self.device)
        return (kept.sum(dim=1).cpu() / lengths[:, None]).numpy()
