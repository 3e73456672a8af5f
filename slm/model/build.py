"""Build or load the causal LM, split it into backbone and head.

Any Hugging Face causal LM whose logits are ``logit_scale * (hidden @ weight.T + bias)``, optionally
followed by ``softcap * tanh(logits / softcap)``, can be trained. Others are found by `check_model`,
which compares one batch with cross-entropy of the model's own logits, and refused by name.

Letters: B windows, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from slm.errors import UserError
from slm.model.architecture import (
    check_length,
    new_model,
    override_config,
    text_config,
    told,
    with_attention,
)
from slm.model.folder import check_savable, quiet_without_terminal
from slm.model.head import check_documents, check_head, head_arguments, hidden_states, loss_terms
from slm.model.selected import check_rows, selected_backward
from slm.model.sharded import is_building, local, outline, root_gathered
from slm.prepare.chat import end_of_turn
from slm.store.hub import FOLDER, check_model_folder, gguf_file, is_folder, place
from slm.store.tokenizer import check_same_tokenizer, first_line, load_tokenizer, with_eos_of
from slm.store.trust import check_no_code
from slm.store.windows import IGNORE_INDEX, Batch, to_device
from slm_kernels import (
    TokenCrossEntropy,
    WeightedCrossEntropy,
    token_cross_entropy,
    weighted_cross_entropy,
)

CHECK_TOKENS = 128  # of a window, for the checks that need the model's own logits
SAVED_TOLERANCE = 1e-3  # of the loss, or nats where that is below 1: two devices' rounding


def build_lm(
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    init_from: str | None,
    architecture: Mapping[str, Any],
    attn_implementation: str | None,
    activation_checkpointing: bool,
    compile: bool,
    logits_cache_bytes: int,
    backward: str = "exact",
    keys_cache_bytes: int = 0,
    override: Mapping[str, Any] | None = None,
) -> "SelectiveLM":
    """A float32 model of a stock class with its loss: loaded from `init_from`, else new.

    architecture:         fields of the Hugging Face config, model_type among them (ignored by
                          init_from)
    attn_implementation:  sdpa, eager, ...; null takes the best that the class supports
    compile:              torch.compile the backbone
    logits_cache_bytes:   memory for the loss to keep between forward and backward, which saves time
    backward:             exact, or selected: along the selected rows alone (selected.py)
    keys_cache_bytes:     with selected and activation_checkpointing, likewise for keys and values
    override:             fields of the config of init_from with other values: {rope_theta: 5e5}
    """
    if override and init_from is None:
        raise UserError(
            f"model.override has {', '.join(override)}, and there is no model.init_from whose "
            "config it would change: fields of a new model stand in model.architecture"
        )
    if compile and backward == "selected":
        raise UserError("model.backward=selected runs layers by itself: model.compile=false")
    if init_from is None:
        model = new_model(architecture, vocab_size, attn_implementation)
    else:
        if is_folder("model.init_from", init_from):
            check_model_folder("model.init_from", init_from)
        take_over_tokenizer(init_from, tokenizer)
        check_not_quantized(init_from)
        model = load_model(init_from, attn_implementation, override)
    check_loss_terms(model, init_from)
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    if rows < vocab_size:
        last = tokenizer.convert_ids_to_tokens(vocab_size - 1)
        raise UserError(
            f"model vocab_size is {rows}, the tokenizer has {vocab_size} tokens: {last!r} is "
            f"{vocab_size - 1}, for which the model has no embedding (resize_token_embeddings of "
            "transformers adds rows)"
        )
    set_special_ids(model, tokenizer, loaded=init_from is not None)
    check_savable(model, tokenizer, "model.architecture" if init_from is None else init_from)
    if activation_checkpointing:
        enable_checkpointing(model)
    if compile:
        model.base_model.compile()  # in place: the names of the parameters stay
    # What was loaded is in evaluation mode, where checkpointing and dropout do nothing.
    return SelectiveLM(model, logits_cache_bytes, backward, keys_cache_bytes).train()


def check_loss_terms(model: PreTrainedModel, init_from: str | None) -> None:
    term = loss_terms(model)
    if term is not None:
        where = "model.architecture" if init_from is None else f"config.json of {init_from}"
        raise UserError(
            f"{where}: {term}, which adds a term to the model's own loss that would be left out "
            "here; turn it off there to train without it"
        )


def check_not_quantized(init_from: str) -> None:
    """Quantized weights get no gradient, and most kinds are not saved again."""
    if gguf_file(init_from) is not None:
        return  # floats when they are loaded
    try:
        config, _ = PreTrainedConfig.get_config_dict(init_from)
    except OSError as error:
        raise UserError(f"no causal LM at {init_from}: {first_line(error)}") from None
    if "quantization_config" in config:
        raise UserError(
            f"config.json of {init_from} has a quantization_config ({quantized_by(config)}): "
            "quantized weights are not trained, take the model that they were made from"
        )


def quantized_by(config: Mapping[str, Any]) -> str:
    """gptq, awq, bitsandbytes, ..."""
    method = config["quantization_config"]
    named = isinstance(method, Mapping) and "quant_method" in method
    return str(method["quant_method"]) if named else "of no known method"


def enable_checkpointing(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{type(model).__name__} has no activation checkpointing")
    # The old name warns in transformers 5.23, the new one is absent in 5.17.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def take_over_tokenizer(init_from: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse other token ids; take over a chat template that the corpus's tokenizer lacks."""
    loaded = with_eos_of(init_from, load_tokenizer(init_from, needs_eos=False), tokenizer)
    check_same_tokenizer(f"model.init_from {init_from}", loaded, "the corpus", tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = loaded.chat_template


def load_model(
    folder: str | Path,
    attn_implementation: str | None = None,
    override: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    placed: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal LM of a folder, GGUF or hub name; placed: device_map, distributed_config."""
    quiet_without_terminal()
    where = place(folder)
    check_no_code(where[FOLDER])
    # A GGUF's weights as floats, else they count as quantized and are not saved again.
    more: dict[str, Any] = {**(placed or {})}
    if "gguf_file" in where:
        more["quantization_config"] = GgufConfig(dequantize=True)
    try:
        if override:
            more["config"] = AutoConfig.from_pretrained(**where, trust_remote_code=False)
            override_config(more["config"], override)
        if is_building():
            return outline(where, attn_implementation, **more)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where,
            **more,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except UserError:
        raise
    except Exception as error:  # a foreign config makes 150 kinds of models raise all sorts
        how = with_attention(attn_implementation)
        how += f" with model.override={dict(override)}" if override else ""
        raise UserError(f"no causal LM at {folder}{how}: {told(error)}") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random ones
        raise UserError(
            f"{folder} lacks {len(missing)} weights of {type(model).__name__}, e.g. {missing[0]}"
        )
    return model


def set_special_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, loaded: bool = False
) -> None:
    """Inference engines read the ids from the configs, not from the tokenizer.

    A new model has the tokenizer's. A loaded one keeps its own, which training does not concern.
    Among the ids to stop at are in both cases the tokenizer's EOS, which ends every document, and,
    for those who generate, what ends an answer in its chat template.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    text = text_config(model.config)
    for config in filter(None, (model.config, text, model.generation_config)):
        for name, own in (("bos_token_id", tokenizer.bos_token_id), ("pad_token_id", pad)):
            kept = id_in(config, name, text) if loaded else None
            setattr(config, name, own if kept is None else kept)
        before = ids_of(id_in(config, "eos_token_id", text)) if loaded else []
        stops = [*before, tokenizer.eos_token_id]
        if config is model.generation_config:
            stops += ids_of(end_of_turn(tokenizer))
        stops = list(dict.fromkeys(stops))
        config.eos_token_id = stops if len(stops) > 1 else stops[0]  # type: ignore


def id_in(config: Any, name: str, text: PreTrainedConfig) -> int | list[int] | None:
    """A config around the text's has none of its own, RWKV's knows no pad."""
    return getattr(config, name, getattr(text, name, None))


def ids_of(value: int | list[int] | None) -> list[int]:
    """As a config names them: one, several or none."""
    return value if isinstance(value, list) else [] if value is None else [value]


class SelectiveLM(nn.Module):
    """Backbone, head and loss in one forward: the module that DDP or FSDP wraps.

    FSDP shows the head's weight only inside the forward of the module it wraps, so the loss is
    computed here and not by the caller: wrap this module, and not the head by itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        logits_cache_bytes: int = 0,
        backward: str = "exact",
        keys_cache_bytes: int = 0,
    ):
        super().__init__()
        self.logits_cache_bytes, self.keys_cache_bytes = logits_cache_bytes, keys_cache_bytes
        self.backward = backward
        self.model = model
        self.computes_on: torch.device | None = None  # where its parameters wait elsewhere

    @property
    def device(self) -> torch.device:
        """Where a batch belongs."""
        return self.computes_on or next(self.parameters()).device

    def hidden(self, batch: Batch) -> Tensor:  # (B, T, D)
        return hidden_states(self.model, batch)

    def forward(
        self,
        batch: Batch,
        token_weight: Tensor | Callable[[Tensor], Tensor] | None = None,  # (B, T)
        *,
        denominator: float | None = None,
        max_rows: int | None = None,
        want_entropy: bool = False,
        takes_all: bool = False,
    ) -> WeightedCrossEntropy | TokenCrossEntropy:
        """The weighted loss with `token_weight`; without it the loss per token, no gradient.

        takes_all: every target has a weight, so backward=selected would cut nothing but what is no
                   target: the gradient is the exact one
        """
        cuts = self.backward == "selected" and token_weight is not None and not takes_all
        along = partial(selected_backward, self.model, self.keys_cache_bytes)
        with along() if cuts else nullcontext() as rows:
            hidden = self.hidden(batch)
        head = head_arguments(self.model)
        if token_weight is None:
            return token_cross_entropy(
                hidden, targets=batch["targets"], want_entropy=want_entropy, **head
            )
        output = weighted_cross_entropy(
            hidden,
            targets=batch["targets"],
            token_weight=token_weight,
            denominator=denominator,
            max_rows=max_rows,
            want_entropy=want_entropy,
            logits_cache_bytes=self.logits_cache_bytes,
            **head,
        )
        if rows is not None:
            rows.select(output.token_weight, max_rows)
        return output


def few_tokens(batch: Batch) -> Batch:
    """The first CHECK_TOKENS tokens of two windows, each with a target."""
    names = batch.keys() & {"input_ids", "targets", "position_ids"}
    few = {name: batch[name][:2, :CHECK_TOKENS] for name in names}
    # Any token does as a target here, and windows that begin with a prompt may have none there.
    no_target = few["targets"] == IGNORE_INDEX
    few["targets"] = torch.where(no_target, few["input_ids"], few["targets"])
    return few


def check_model(lm: SelectiveLM, batch: Batch) -> None:
    """Refuse a model that this trainer would train on something else than it seems.

    Costs a few forwards of `few_tokens`, since these keep all logits, in evaluation mode; the mode
    is put back.
    """
    check_length(lm.model.config, batch["input_ids"].shape[1])
    few = few_tokens(batch)
    training = lm.training
    try:
        with root_gathered(lm, few):
            if lm.backward == "selected":
                check_rows(lm.train().model, few)
            lm.eval()
            with attention_of_torch(lm.model):
                check_head(lm.model, few)
                if "position_ids" in few:
                    needed_by = "packing=documents, unlike packing=concat,"
                    check_documents(lm.model, few["input_ids"], needed_by)
    except RuntimeError as error:  # fields of its config that do not go together
        raise UserError(f"{type(lm.model).__name__} computes no batch: {told(error)}") from error
    lm.train(training)


@contextmanager
def attention_of_torch(model: PreTrainedModel) -> Iterator[None]:
    """Flash attentions compute neither on a CPU nor in float32, where the checks are made."""
    chosen = model.config._attn_implementation
    if chosen in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def check_trainable(lm: SelectiveLM, batch: Batch) -> None:
    """`check_model`, for a model that was in no evaluation yet and is going to be saved.

    RWKV's stock class divides weights in place in evaluation mode and puts them back at the next
    training step, so what is saved after an evaluation are others than were trained.
    """
    before = weight_sums(lm)
    check_model(lm, batch)
    changed = [name for name, value in weight_sums(lm).items() if value != before[name]]
    if changed:
        rescales = "rescale_every" in lm.model.config.to_dict()
        advice = "; it does not with rescale_every=0 in its config" if rescales else ""
        raise UserError(
            f"{type(lm.model).__name__} changes its weights in evaluation mode, e.g. {changed[0]}, "
            f"so what is saved would not be what was trained{advice}"
        )


def weight_sums(lm: SelectiveLM) -> dict[str, float]:
    return {name: local(value).sum().item() for name, value in lm.state_dict().items()}


@torch.no_grad()
def check_saved(lm: SelectiveLM, batch: Batch, folder: Path) -> None:
    """Refuse a saved folder that is another model than `lm`: compares the loss of `few_tokens`.

    On the CPU, since a device that has just trained may have no room for a second model.
    """
    few, training = few_tokens(batch), lm.training
    theirs = SelectiveLM(load_model(folder))(few).loss
    # A compilation is not worth it.
    with torch.compiler.set_stance("force_eager"), attention_of_torch(lm.model):
        ours = lm.eval()(to_device(few, lm.model.device)).loss.cpu()
    lm.train(training)
    difference = (ours - theirs).abs().mean().item()
    if not difference <= SAVED_TOLERANCE * max(1.0, ours.mean().item()):
        raise UserError(
            f"{type(lm.model).__name__}: the loss of one batch is {ours.mean():.5g} as trained and "
            f"{theirs.mean():.5g} as saved ({difference:.3g} a token), so the model was not "
            "written; the checkpoints hold it"
        )
