#!/usr/bin/env bash
# One would guess that lm_eval's loglikelihood_rolling (perplexity, bits per byte of whole texts) scores the text's tokens, with
# one special token before them as context. Where the tokenizer begins a text with BOS, as Llama's and Gemma's do, BOS is in the
# text as well: the model is asked for BOS after BOS, which it never saw, and that log-prob counts as the text's. Who is hurt:
# whoever compares bits per byte of models with and without a BOS, the more the shorter the texts are; a model that was trained on
# more than one BOS gains. With add_bos_token=False the sum is the text's alone, and prompts of other tasks lose their BOS.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q lm_eval==0.4.13 transformers==5.23.0 torch==2.13.0 accelerate==1.12.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 env/bin/python - <<'PY'
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm_eval", version("lm_eval"))
words = ["<s>", "</s>", "a", "b", "c", "d"]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="d"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=6, max_position_embeddings=32, initializer_range=1.0, **sizes)).eval()
text, ids = "a b c a d", [2, 3, 4, 2, 5]


def logprob(tokens, first):
    """Of the tokens from `first` on, in float64."""
    with torch.no_grad():
        each = model.double()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    model.float()
    return sum(each[i - 1, tokens[i]].item() for i in range(first, len(tokens)))


def rolling(**options):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, **options)
    return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)[0]


of_text, with_bos = logprob([0, *ids], 1), logprob([0, 0, *ids], 1)
usual, without = rolling(), rolling(add_bos_token=False)
print(f"log p(text | BOS)                    {of_text:.4f}")
print(f"log p(BOS, text | BOS)               {with_bos:.4f}")
print(f"loglikelihood_rolling                {usual:.4f}")
print(f"the same with add_bos_token=False    {without:.4f}")
near = lambda a, b: abs(a - b) < 1e-3
raise SystemExit(not (near(usual, with_bos) and near(without, of_text) and not near(with_bos, of_text)))
PY
